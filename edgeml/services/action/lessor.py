"""The device's end of leases: takes what clients ask of them, and tells each when that changes.

A question is kept until its client is to be told something else than it knows, or for as long as it
says. So the holder that loses a key, and the one that gets it, are told at once; and each question
is a sign of its client. They are answered where they come in, in a loop's thread, that no action
which takes long holds them up.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec

from edgeml.core.alarms import Alarm
from edgeml.core.dispatch import Call, Caller, Gatherer, Turns
from edgeml.core.errors import Malformed, UnknownInterface, printable
from edgeml.core.forks import watch_forks
from edgeml.core.lines import Lines
from edgeml.services.action.leases import LONGEST_TTL, Leases, Writer

__all__ = ["Lessor", "Question"]

_log = logging.getLogger(__name__)

_LARGEST = 4096  # bytes of a question
_LONGEST_HOLD = 1.0  # seconds that one is kept, for a server that stops waits for its answer

_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=LONGEST_TTL)]


class Question(msgspec.Struct, array_like=True, frozen=True):
    """What a client asks of the lease of a key.

    Attributes:
        key: the action's name.
        token: which names the client's claim, and nobody else knows; random.
        priority: the higher one has the lease.
        ttl: seconds after which the claim ends without another sign; 0 to give the lease back.
        known: the number of the grant that the client knows it has; 0 for none.
        hold: seconds that the answer may take as long as that is so.
    """

    key: str
    token: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    ttl: _Seconds = 0.0
    known: int = 0
    hold: _Seconds = 0.0


class _Answer(NamedTuple):
    """What a question is answered with: the number of the client's grant, and who is in its way."""

    call: Call
    grant: int
    told: str


@dataclass
class _Kept:
    """A question whose client knows all there is to know."""

    call: Call
    known: int
    until: float


@dataclass
class _Key:
    """A key's rule, and the questions about it."""

    rule: Leases
    kept: dict[Writer, _Kept] = field(default_factory=dict)
    holder: Writer | None = None  # that has been told of in the log

    @property
    def due(self) -> float:
        return min([self.rule.due, *(kept.until for kept in self.kept.values())])

    def answer(self, call: Call, writer: Writer) -> _Answer:
        return _Answer(call, self.rule.grant_of(writer), self.rule.tell(writer))


class Lessor(Gatherer):
    """Lets and takes back the leases of a device's keys. Safe to use from any thread.

    Args:
        keys: the actions' names.
        period: seconds between the last action of a writer and the first of the next.
    """

    def __init__(self, keys: Sequence[str], period: float = 0.0) -> None:
        first = 1 + secrets.randbits(48)
        self._keys = {key: _Key(Leases(key, period, first)) for key in keys}
        self._lock = threading.RLock()  # a signal's handler may stop the server within it
        self._lines = Lines(_log)
        self._unsaid: deque[str] = deque()  # for the log, which may be slow
        self._turns: Turns | None = None
        self._alarm: Alarm | None = None
        self._alarm_at = math.inf
        self._closed = False
        watch_forks(self)

    def abandon(self) -> None:
        """Leave it to the parent of this child, which is no device."""
        self._lock = threading.RLock()
        self._closed = True

    @property
    def counts(self) -> Counter[str]:
        """What became of leases, of all keys together; see `Leases.counts`."""
        total = Counter(Leases("").counts)
        for each in self._keys.values():
            total.update(each.rule.counts)
        return total

    # Questions ----------------------------------------------------------------------------

    def attach(self, turns: Turns) -> None:
        """See `Gatherer.attach`."""
        self._turns = turns

    def take(self, call: Call) -> None:
        """See `Gatherer.take`."""
        assert self._turns is not None
        if not self._turns.begin(call):
            return
        call.began = time.monotonic()
        try:
            question = _read(call)
            if question.key not in self._keys:
                known = ", ".join(map(repr, self._keys)) or "none"
                raise UnknownInterface(f"there is no action {question.key!r}; known: {known}")
            call.caller.require("act", question.key)
            answers = self._ask(call, question)
        except Exception as error:
            self._turns.fail(call, error)
        else:
            self._tell(answers)

    def _ask(self, call: Call, question: Question) -> list[_Answer]:
        key, known = self._keys[question.key], question.known
        caller = call.caller
        writer = Writer(caller.client_id, question.token)
        with self._lock:
            if self._closed:
                return [_Answer(call, 0, "")]  # as it is stopped, of which its client hears anyway
            now = time.monotonic()
            if question.ttl:
                key.rule.claim(writer, _name(caller), question.priority, question.ttl, now)
            else:
                key.rule.give_back(writer, now)
            answers = []
            if (before := key.kept.pop(writer, None)) is not None:  # its connection was lost, say
                answers.append(key.answer(before.call, writer))
            hold = min(question.hold, _LONGEST_HOLD, call.deadline - now)
            if question.ttl and hold > 0 and key.rule.grant_of(writer) == known:
                key.kept[writer] = _Kept(call, known, now + hold)
            else:
                answers.append(key.answer(call, writer))
            answers += self._settle(key, now)
        return answers

    def _settle(self, key: _Key, now: float) -> list[_Answer]:
        """Do what is due of a key, and return what is to be answered; under the lock."""
        rule = key.rule
        rule.settle(now)
        told = [
            writer
            for writer, kept in key.kept.items()
            if now >= kept.until or rule.grant_of(writer) != kept.known
        ]
        answers = [key.answer(key.kept.pop(writer).call, writer) for writer in told]
        if rule.holder != key.holder:
            key.holder = rule.holder
            self._unsaid.append(f"{rule}")
        if (due := key.due) < self._alarm_at and not self._closed:
            self._plan(due, now)
        return answers

    def _plan(self, due: float, now: float) -> None:
        """Look again when something is due; under the lock."""
        assert self._turns is not None
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = due
        self._alarm = self._turns.after(due - now, self._look)

    def _look(self) -> None:
        answers: list[_Answer] = []
        with self._lock:
            self._alarm, self._alarm_at = None, math.inf
            now = time.monotonic()
            for key in self._keys.values():
                answers += self._settle(key, now)
        self._tell(answers)

    def _tell(self, answers: list[_Answer]) -> None:
        """Answer, and write to the log; not under the lock."""
        for call, grant, told in answers:
            try:
                call.answer([grant, told])
            except Exception:  # it is anybody's code, and the others are to be told
                _log.exception("an answer about a lease did not reach its client")
        while self._unsaid:
            with suppress(IndexError):  # another thread took it
                self._lines.write(logging.INFO, self._unsaid.popleft())

    # Actions ------------------------------------------------------------------------------

    def acting(self, key: str, caller: Caller, token: int | None) -> Acting:
        """Return a context manager in which an action is carried out; see `Acting`.

        Args:
            key: the action's name.
            caller: whose action it is.
            token: of its client's lease; None where it has none.
        """
        return Acting(self, self._keys[key], Writer(caller.client_id, token or 0))

    def begin(self, key: _Key, writer: Writer) -> float:
        """Begin an action, and return when; see `Acting`."""
        with self._lock:
            now = time.monotonic()
            key.rule.begin(writer, now)
        return now

    def end(self, key: _Key, writer: Writer) -> None:
        """End an action, and let the next one have the key."""
        with self._lock:
            now = time.monotonic()
            key.rule.end(writer, now)
            changed = key.rule.pending or key.rule.holder != key.holder
            answers = self._settle(key, now) if changed else []
        self._tell(answers)

    # The rest of `Gatherer` ---------------------------------------------------------------

    def run(self) -> None:
        """See `Gatherer.run`; no turns are asked for."""

    def has_enough(self) -> bool:
        """See `Gatherer.has_enough`."""
        return True

    def close(self) -> list[Call]:
        """See `Gatherer.close`."""
        with self._lock:
            self._closed = True
            if self._alarm is not None:
                self._alarm.cancel()
            calls = [kept.call for key in self._keys.values() for kept in key.kept.values()]
            for key in self._keys.values():
                key.kept.clear()
        return calls


class Acting:
    """That one writer acts on a key, for as long as this is entered.

    Entering it gives when the action began, on the clock `time.monotonic`, from which a period is
    counted, or raises NotHolder.
    """

    __slots__ = ("_key", "_lessor", "_writer")

    def __init__(self, lessor: Lessor, key: _Key, writer: Writer) -> None:
        self._lessor = lessor
        self._key = key
        self._writer = writer

    def __enter__(self) -> float:
        return self._lessor.begin(self._key, self._writer)

    def __exit__(self, *_: object) -> None:
        self._lessor.end(self._key, self._writer)


def _read(call: Call) -> Question:
    if call.nbytes > _LARGEST:
        raise Malformed(
            f"a question about a lease of {call.nbytes} bytes, and {_LARGEST} are taken"
        )
    try:
        return msgspec.convert(call.payload(), Question)
    except msgspec.ValidationError as error:
        raise Malformed(f"lease takes [key, token, priority, ttl, known, hold]: {error}") from None


def _name(caller: Caller) -> str:
    """Whom other clients are told of: not of its address."""
    name = printable(caller.label or f"client {caller.client_id}")
    return name if caller.identity is None else f"{name} with the key of {caller.identity}"
