"""Publications over parked requests.

A subscriber sends a few requests ahead, its *credits*: each asks for one publication past its
*cursor*, the newest that it has. The server keeps the last ``keep`` publications in one ring for
all subscribers and answers a credit with the oldest of them past the cursor, now or when there is
one. So a late joiner gets the current value at once, a slow subscriber skips what it had no time
for, nobody queues for anybody, and the server knows what each subscriber holds.

A publication's version is ``(epoch, number)``: the epoch changes with each start of the server, so
a subscriber that comes back to a restarted one is answered at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from edgeml.core.codec import Codec, Wrapped
from edgeml.core.ending import tell_left_behind
from edgeml.core.errors import (
    Closed,
    EdgemlError,
    Malformed,
    Overloaded,
    PermissionDenied,
    Unreachable,
)
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Allocator, Message
from edgeml.core.session import Session
from edgeml.core.transport import Reply
from edgeml.core.wire import (
    HOLD,
    NEXT,
    NOTHING_YET,
    OK,
    Answer,
    Credit,
    Publication,
    Request,
    error_of,
    pack,
    pack_error,
    unpack,
)

__all__ = ["Answerer", "Subscription", "Topic"]

_log = logging.getLogger(__name__)

_MOST_SILENCE = 120.0  # seconds that one publication may take to arrive
_FORGET = 20.0  # seconds without a credit after which a subscription is forgotten
_REFUSED = 1.0  # seconds until a subscription that was refused is tried again
_MOST_CREDITS = 16  # that a subscriber sends ahead
_BYTES_AHEAD = 64 << 20  # that a subscriber asks for ahead, beyond one publication
_NOTHING_YET = Message(pack(Answer(NOTHING_YET)))

Answerer = Callable[[Iterable[Reply], Message], None]
"""Answers several requests of one endpoint with one message."""


@dataclass(slots=True)
class _Parked:
    until: float
    codec: Codec
    answerer: Answerer
    reply: Reply


@dataclass(slots=True)
class _Subscriber:
    cursor: int  # the number of the newest publication that was sent to it; 0 for none
    codec: Codec
    seen: float
    parked: deque[_Parked] = field(default_factory=deque)


class _Publication:
    """What was published, as it is sent to those who speak one codec or another.

    Each codec that clients may ask for encodes it at once, so that it is there for whoever comes
    late. What is around one of these costs more, so it encodes only for those who are there; for
    one who comes later, the first time.
    """

    def __init__(self, number: int, messages: dict[str, Message]) -> None:
        self.number = number
        self._messages = messages  # by the names of the codecs

    def message(self, codec: Codec) -> Message:
        found = self._messages.get(codec.name)
        if found is None:
            assert isinstance(codec, Wrapped)
            inner = self._messages[codec.inner.name]
            answer = unpack(Publication, inner.header)
            value = codec.inner.decode(Message(answer.body, inner.buffers))
            body = codec.encode_owned(value)
            found = _publish(body, answer.epoch, answer.number, answer.taken)
            self._messages[codec.name] = found
        return found


def _publish(body: Message, epoch: int, number: int, taken: int) -> Message:
    answer = Answer(OK, body.header, epoch, number)
    if taken:
        answer = Publication(OK, body.header, epoch, number, None, taken)
    return Message(pack(answer), body.buffers)


class Topic:
    """The server's side of one stream. Safe to use from any thread.

    Args:
        name: what subscribers ask for.
        codecs: every publication is encoded once with each.
        epoch: of this start of the server.
        keep: how many publications are kept for subscribers that are behind.
        allocate: gives memory to keep them in, from which they are sent without another copy.
        check: raises the NotEncodable of those to which a value can't be sent, if they come later.
        needs: the permission, for this name, without which nobody may subscribe; empty for none.
        limits: of what each subscriber may ask for ahead.
    """

    def __init__(
        self,
        name: str,
        codecs: Iterable[Codec],
        epoch: int,
        keep: int = 1,
        allocate: Allocator | None = None,
        check: Callable[[Any], None] | None = None,
        needs: str = "",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name
        self.keep = keep
        self.needs = needs
        self.number = 0
        """The number of the newest publication; 0 before the first."""
        self._codecs = list(codecs)
        self._epoch = epoch
        self._allocate = allocate
        self._check = check
        self._ring: deque[_Publication] = deque(maxlen=keep)
        self._subscribers: dict[Hashable, dict[int, _Subscriber]] = {}  # of each client
        self._limits = limits
        self._lock = threading.Lock()
        self._notice: Message | None = None
        self._closed = False

    def publish(self, value: Any, taken: int = 0) -> int:
        """Give ``value`` to all who subscribe, now or later; returns its number.

        Where it is told when it was taken, in ns of this machine's clock, they are told as well.

        The value is encoded and copied before this returns, so it may be changed afterwards.
        """
        with self._lock:
            spoken = {subscriber.codec.name: subscriber.codec for subscriber in self._all()}
        spoken.update((codec.name, codec) for codec in self._codecs)
        if self._check is not None:
            self._check(value)
        bodies = {name: codec.encode_owned(value, self._allocate) for name, codec in spoken.items()}
        with self._lock:
            if self._closed:
                raise Closed(f"the server of {self.name!r} has been stopped")
            self.number += 1
            number, epoch = self.number, self._epoch
            messages = {name: _publish(body, epoch, number, taken) for name, body in bodies.items()}
            self._ring.append(_Publication(number, messages))
            due = [
                (subscriber.parked.popleft(), self._next(subscriber))
                for subscriber in self._all()
                if subscriber.parked
            ]
        self._answer((parked, publication.message(parked.codec)) for parked, publication in due)
        return number

    def _all(self) -> Iterator[_Subscriber]:
        return (each for own in self._subscribers.values() for each in own.values())

    def _next(self, subscriber: _Subscriber) -> _Publication:
        """The oldest publication past the cursor, which moves there."""
        oldest = self.number - len(self._ring) + 1
        subscriber.cursor = max(subscriber.cursor + 1, oldest)
        return self._ring[subscriber.cursor - oldest]

    def _answer(self, due: Iterable[tuple[_Parked, Message]]) -> None:
        """Answer, all alike in one call: not under the lock, for a transport may call back."""
        groups: dict[tuple[Answerer, int], tuple[Message, list[Reply]]] = {}
        for parked, message in due:
            group = groups.setdefault((parked.answerer, id(message)), (message, []))
            group[1].append(parked.reply)
        for (answerer, _), (message, replies) in groups.items():
            answerer(replies, message)

    def park(
        self,
        who: Hashable,
        codec: Codec,
        credit: Credit,
        reply: Reply,
        answerer: Answerer,
        hold: float | None = None,
    ) -> None:
        """Take a credit: answer it at once if there is something past the cursor.

        Else it is answered "nothing yet" after ``hold`` seconds, by default and at most `HOLD`.
        """
        now = time.monotonic()
        held = HOLD if hold is None or not hold < HOLD else hold
        parked = _Parked(now + held, codec, answerer, reply)
        with self._lock:
            if self._closed:
                raise Closed("the server has been stopped")
            cursor = credit.number if credit.epoch == self._epoch else 0
            if not 0 <= cursor <= self.number:
                raise Malformed(f"a cursor of {cursor} in {self.name!r}, which is at {self.number}")
            own = self._subscribers.setdefault(who, {})
            subscriber = own.get(credit.subscription)
            if subscriber is None:
                if len(own) >= self._limits.subscriptions_per_client:
                    most = self._limits.subscriptions_per_client
                    raise Overloaded(f"this client has {most} subscriptions to {self.name!r}")
                own[credit.subscription] = subscriber = _Subscriber(cursor, codec, now)
            subscriber.seen = now
            subscriber.cursor = max(subscriber.cursor, cursor)
            if subscriber.cursor == self.number and held > 0 and self._notice is None:
                if len(subscriber.parked) >= self._limits.credits:
                    most = self._limits.credits
                    raise Overloaded(f"{most} credits of one subscription are parked")
                subscriber.parked.append(parked)
                return
            news = None if subscriber.cursor == self.number else self._next(subscriber)
            nothing = self._notice or _NOTHING_YET
        reply(nothing if news is None else news.message(codec))

    def announce(self, notice: str) -> None:
        """Answer "nothing yet" with a notice to all who wait, and at once to all who ask."""
        message = Message(pack(Answer(NOTHING_YET, notice.encode())))
        with self._lock:
            self._notice = message
            due = [parked for subscriber in self._all() for parked in subscriber.parked]
            for subscriber in self._all():
                subscriber.parked.clear()
        self._answer((parked, message) for parked in due)

    def forget(self, who: Hashable, why: EdgemlError | None = None) -> None:
        """Let go of a client: one that has left and waits for no answers, or is told ``why``."""
        with self._lock:
            own = self._subscribers.pop(who, {})
        if why is not None:
            self._tell(own, Message(pack_error(why)))

    def release(self, who: Hashable) -> None:
        """Let go of a client that is silent; if it lives it is told to ask again."""
        with self._lock:
            own = self._subscribers.pop(who, {})
        self._tell(own, _NOTHING_YET)

    def _tell(self, own: dict[int, _Subscriber], message: Message) -> None:
        self._answer((parked, message) for each in own.values() for parked in each.parked)

    def tick(self) -> None:
        """Answer what has been parked for long, and forget who has not been heard from."""
        now = time.monotonic()
        due: list[_Parked] = []
        with self._lock:
            for who, own in list(self._subscribers.items()):
                for number, subscriber in list(own.items()):
                    while subscriber.parked and subscriber.parked[0].until <= now:
                        due.append(subscriber.parked.popleft())
                    if now - subscriber.seen > _FORGET:
                        del own[number]
                if not own:
                    del self._subscribers[who]
        self._answer((parked, _NOTHING_YET) for parked in due)

    def close(self) -> None:
        """Tell all who wait that the server has been stopped."""
        with self._lock:
            self._closed = True
            due = [parked for subscriber in self._all() for parked in subscriber.parked]
            self._subscribers.clear()
            self._ring.clear()
        farewell = Message(pack_error(Closed("the server has been stopped")))
        self._answer((parked, farewell) for parked in due)


class Subscription:
    """A client's side of one stream: calls a function with each publication that it gets.

    The function runs in a thread of its own, so a slow one delays nothing else; what is published
    meanwhile is skipped and counted, unless the server keeps it.

    How many credits are sent ahead follows what happens: one more whenever a publication was
    missed and the wait for it was longer than the function's work (the round trip is the
    bottleneck), one less whenever publications pile up behind the function (it is the bottleneck,
    and asking later gives a newer value).

    Attributes:
        version: ``(epoch, number)`` of the newest publication received; ``(0, 0)`` before any.
        received: publications given to the function.
        missed: publications that were skipped since the first one received.
        errors: exceptions that the function raised; they are logged.
    """

    def __init__(
        self,
        topic: str,
        number: int,
        function: Callable[..., None],
        next_session: Callable[[], Session | None],
        writable: bool = False,
        tell_taken: bool = False,
    ) -> None:
        self.topic = topic
        self.version = (0, 0)
        self.received = 0
        self.missed = 0
        self.errors = 0
        self._number = number
        self._function = function
        self._next_session = next_session
        self._writable = writable
        self._tell_taken = tell_taken
        self._credits = 1
        self._refused = False  # whether the last answer could not be given
        self._busy = 0.0  # seconds that the function took for what came last
        self._entered = 0.0  # when, while it runs
        self._under_way: deque[Future[Message]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, name=f"edgeml subscription to {topic}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop calling the function; idempotent. Waits for one that runs, up to a second."""
        self.end()
        self.join(1.0)

    def end(self) -> None:
        """Stop calling the function, without waiting for one that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, unless this is it; tell of a function that runs on."""
        if self._thread is threading.current_thread():
            return
        self._thread.join(timeout)
        if self._thread.is_alive() and (since := self._entered):
            what = f"the subscriber's function for {self.topic!r}"
            assert self._thread.ident is not None
            tell_left_behind(_log, what, time.monotonic() - since, self._thread.ident)

    def _run(self) -> None:
        while not self._closed and (session := self._next_session()) is not None:
            self._under_way.clear()
            try:
                while not self._closed:
                    self._turn(session)
            except PermissionDenied as error:  # our role has changed, or the key is revoked
                if not self._refused:
                    _log.warning("publications of %r are missed: %s", self.topic, error)
                self._refused = True
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, _REFUSED)
            except EdgemlError as error:
                session.lose(error)
            except Exception as error:
                _log.exception("the subscription to %r failed and starts anew", self.topic)
                session.lose(Unreachable(f"a subscription failed: {error}"))
        for future in self._under_way:
            future.cancel()
        self._under_way.clear()  # they refer to this

    def _turn(self, session: Session) -> None:
        """Send the credits that are due, wait for an answer, and hand on what has come."""
        try:
            while len(self._under_way) < self._credits:
                self._send_credit(session)
        except Overloaded:  # calls fill the connection; what is under way will do
            if not self._under_way:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, 0.1)
                return
        keep = session.topics[self.topic]
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready(keep), _MOST_SILENCE)
            if self._closed:
                return
        waited = time.monotonic() - began
        if not self._closed and not self._ready(keep):
            raise Unreachable(f"no answer to a subscription for {_MOST_SILENCE:g} s")
        done = self._take(session, keep)
        values = [pair for pair in map(_open, done) if self._is_news(pair[0])]
        values.sort(key=lambda pair: pair[0].number)
        if keep == 1 and len(values) > 1:
            # They piled up while the function was busy: skip to the newest, and ask for less.
            self._credits = max(1, self._credits - 1)
            self.missed += len(values) - 1
            for answer, _ in values[:-1]:
                self._see(answer)
            del values[:-1]
        for answer, message in values:
            if self._closed:
                return
            self._deliver(session, answer, message, waited)

    def _send_credit(self, session: Session) -> None:
        credit = pack(Credit(self._number, *self.version))
        header = pack(Request(NEXT, session.key, self.topic, HOLD, credit))
        began = time.monotonic()
        future = session.requester.request(Message(header))
        future.began = began  # type: ignore[attr-defined]
        self._under_way.append(future)
        future.add_done_callback(self._notify)

    def _notify(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def _ready(self, keep: int) -> bool:
        # Where nothing may be skipped, answers are taken in the order of their credits.
        if keep > 1:
            return self._under_way[0].done()
        return any(future.done() for future in self._under_way)

    def _take(self, session: Session, keep: int) -> list[Message]:
        """Remove and return the answers that may be handed on."""
        if keep > 1:
            done = list(takewhile(Future.done, self._under_way))
        else:
            done = [future for future in self._under_way if future.done()]
        for future in done:
            self._under_way.remove(future)
        messages = []
        for future in done:
            try:
                messages.append(future.result())
            except Overloaded as error:  # it is missed, and counted with the next that comes
                if not self._refused:
                    _log.warning("publications of %r are missed: %s", self.topic, error)
                self._refused = True
                with self._changed:  # not at once again, since nothing may have changed
                    self._changed.wait_for(lambda: self._closed, 0.1)
            else:
                self._refused = False
                session.note_life(future.began)  # type: ignore[attr-defined]
        return messages

    def _is_news(self, answer: Answer) -> bool:
        """Whether there is something newer in it; what was overtaken has been counted as missed."""
        epoch, number = self.version
        return answer.status == OK and not (epoch == answer.epoch and number >= answer.number)

    def _see(self, answer: Answer) -> int:
        """Move to this version; returns how many were missed before it."""
        epoch, number = self.version
        gap = answer.number - number - 1 if epoch == answer.epoch else 0
        self.missed += gap
        self.version = (answer.epoch, answer.number)
        return gap

    def _deliver(
        self, session: Session, answer: Publication, message: Message, waited: float
    ) -> None:
        if self._see(answer) and waited > self._busy:
            ahead = (self._credits + 1) * message.nbytes
            if self._credits < _MOST_CREDITS and ahead <= _BYTES_AHEAD:
                self._credits += 1
        body = Message(answer.body, message.buffers)
        value = session.spoken.decoder.decode(body, writable=self._writable)
        self.received += 1
        self._entered = began = time.monotonic()
        try:
            self._function(value, answer.taken) if self._tell_taken else self._function(value)
        except BaseException:  # its sys.exit() ends nothing here
            _log.exception("the subscriber's function for %r failed", self.topic)
            self.errors += 1  # last: who sees it counted finds it logged
        finally:
            self._entered = 0.0
        self._busy = time.monotonic() - began


def _open(message: Message) -> tuple[Publication, Message]:
    answer = unpack(Publication, message.header)
    if answer.status not in (OK, NOTHING_YET):
        raise error_of(answer)
    return answer, message
