"""The client of the action pair: reads a device's observations and sends it actions."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgeml.core.client import Client
from edgeml.core.deadline import Deadline
from edgeml.core.errors import EdgemlError, Malformed, Stale, shown
from edgeml.core.session import Session
from edgeml.core.streams import Subscription
from edgeml.services.action.config import CLOCK, OBSERVATIONS, ActionConfig
from edgeml.services.action.lease import Lease
from edgeml.services.action.record import Executed
from edgeml.services.action.recording import Recording
from edgeml.services.action.stamps import Clock, Observation, Stamp, pack
from edgeml.services.base import ClientSettings, ServiceClient, checked, named, names
from edgeml.services.functions import takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ActionClient"]

_log = logging.getLogger(__name__)

_FRESH = 10.0  # seconds after which what is known of the device's clock is asked for anew
_LONGEST = 1e9  # seconds that an age or a validity may be
_LONGEST_POLICY = 200  # characters of a version


def _wanted(keys: Sequence[str] | None) -> list[str] | None:
    return None if keys is None else names("keys", keys)


class ActionClient(ServiceClient):
    """Reads a device's observations and sends it actions.

    Args:
        host: where the server is; this machine by default.
        port_number: its port; the configuration's by default. The configuration may stand here.
        config: see `ActionConfig`.
        task_id: what this client calls itself in the server's `ActionServer.clients()`.
        transport: in place of the configuration's.
        timeout: seconds that connecting, or a call, may take unless told otherwise.
        wait_for_server: go on trying, for 600 s or the number of seconds given, until a device
            answers and is ready.
        settings: ``url``, ``server_ip``, ``client_id``, ``codec``, ``images``, ``writable``,
            ``credentials``, ``on_disconnect``, ``on_reconnect``, ``on_move``: see `ServiceClient`.

    Raises:
        Unreachable: nobody serves there.
        ConfigMismatch: the server is configured differently; the text names field and values.
    """

    def __init__(
        self,
        host: str | None = None,
        port_number: int | ActionConfig | None = None,
        config: ActionConfig | None = None,
        *,
        task_id: str | None = None,
        transport: str | None = None,
        timeout: float = 10.0,
        wait_for_server: bool | float = False,
        **settings: Unpack[ClientSettings],
    ) -> None:
        if isinstance(port_number, ActionConfig):
            if config is not None:
                raise ValueError("two configurations were given; give one of them")
            port_number, config = None, port_number
        if config is None:
            raise TypeError("an ActionClient needs config=, the ActionConfig of the device")
        self.config = config
        self._clock = Clock()
        self._greeted: Session | None = None  # whose welcome told the device's clock
        self._stream = secrets.randbits(63)
        self._numbers: dict[str, itertools.count[int]] = {}  # of actions, by key
        self._halts: dict[str, int] = {}  # that the device told of last, by key
        self._counts = Counter[str]()
        self._recordings = weakref.WeakSet[Recording]()
        self._leases: dict[str, Lease] = {}
        self._leasing = threading.Lock()
        super().__init__(
            "action",
            config,
            label=task_id or "",
            needs={CLOCK: None},
            host=host,
            port=port_number,
            transport=transport,
            timeout=timeout,
            wait_for_server=wait_for_server,
            **settings,
        )
        client, recordings, leases = self._client, self._recordings, self._leases
        self._close_by(lambda: _close(client, recordings, leases))

    # Observations -------------------------------------------------------------------------

    def obs(self, keys: Sequence[str] | None = None, timeout: float | None = None) -> Any:
        """Return the observations of these names, or all: whatever ``obs_callback`` gives.

        Raises:
            UnknownInterface: no observation of that name; the text lists those known.
            RemoteError: ``obs_callback`` raised.
            DeadlineExceeded, Unreachable: no answer.
        """
        return self._client.call("obs", _wanted(keys), timeout)

    def obs_async(
        self, keys: Sequence[str] | None = None, timeout: float | None = None
    ) -> Future[Any]:
        """Ask for observations, and return a future of what `obs` returns or raises.

        The future's own callbacks run in the transport's thread: keep them short.
        """
        return self._client.call_async("obs", _wanted(keys), timeout)

    def observe(
        self, keys: Sequence[str] | None = None, timeout: float | None = None
    ) -> Observation:
        """Return the observations of these names, or all, with the id by which they are known.

        Give that id to `act` with what rests on them: then the device knows how old that is.

        Raises:
            What `obs` does.
        """
        asked = time.monotonic_ns()
        return self._observed(asked, self._client.call("observe", _wanted(keys), timeout))

    def observe_async(
        self, keys: Sequence[str] | None = None, timeout: float | None = None
    ) -> Future[Observation]:
        """Ask for observations, and return a future of what `observe` returns or raises.

        The future's own callbacks run in the transport's thread: keep them short.
        """
        asked = time.monotonic_ns()
        future = self._client.call_async("observe", _wanted(keys), timeout)
        return checked(future, lambda answer: self._observed(asked, answer))

    def _observed(self, asked: int, answer: Any) -> Observation:
        if not isinstance(answer, list) or len(answer) < 2 or not isinstance(answer[1], int):
            raise Malformed(f"the device answered observe with {shown(answer)}")
        self._clock.note(answer[1], time.monotonic_ns(), asked)
        return Observation(answer[0], answer[1])

    def register_obs_callback(self, function: Callable[..., None]) -> Subscription:
        """Call ``function`` with what the server publishes, the current value at once.

        It runs in a thread of its own. A slow one skips to the newest (see `Subscription`). With
        one more argument, or one called ``observation_id``, it gets the observation's id as well:
        see `Observation`.
        """
        clock, told = self._clock, takes(function, 1, "observation_id")

        def receive(values: Any, taken: int) -> None:
            if taken:
                clock.note(taken, time.monotonic_ns())
            function(values, taken) if told else function(values)

        return self._client.subscribe(OBSERVATIONS, receive, tell_taken=True)

    # Actions ------------------------------------------------------------------------------

    def act(
        self,
        key: str,
        payload: Any = None,
        timeout: float | None = None,
        *,
        observation: int | None = None,
        age: float = 0.0,
        valid: float | None = None,
        policy: str | None = None,
    ) -> Any:
        """Carry out an action and return what ``act_callback`` gives.

        Actions of one key are begun in the order in which this client sent them: one that a later
        one has overtaken is refused.

        Args:
            key: the action's name.
            payload: any value that the codec carries; an empty dict by default.
            timeout: seconds; the client's own by default.
            observation: the id of the observation that it rests on; see `observe`.
            age: seconds by which what it rests on is older than this call, where no observation is
                named, or where it is the older of the two.
            valid: seconds after the observation, or after what ``age`` says, or after this call, up
                to which it may be begun; by default the device's own ``action_timeout``, or for
                ever.
            policy: the version of what chose it, for the device's record; up to 200 characters.

        Raises:
            Stale: it came too late to be begun, or a later one had come before.
            NotHolder: another client has the lease of the key, or this one has lost its own.
            UnknownInterface: no action of that name; the text lists those known.
            RemoteError: ``act_callback`` raised.
            DeadlineExceeded, Unreachable: no answer; whether the action was taken is not known.
        """
        asked, seen, elapsed = self._tell_clock()
        if elapsed > _FRESH:
            deadline = Deadline(self._client.timeout if timeout is None else timeout)
            self._note_clock(asked, self._client.call(CLOCK, None, deadline.left))
            timeout = deadline.left
            asked, seen, elapsed = self._tell_clock()
        stamp = self._stamp(key, seen, elapsed, observation, age, valid, policy)
        stamped = [*named(key, payload), pack(stamp)]
        try:
            answer = self._client.call("act", stamped, timeout)
        except Stale:
            self._note_stale()
            raise
        return self._acted(key, asked, answer)

    def act_async(
        self,
        key: str,
        payload: Any = None,
        timeout: float | None = None,
        *,
        observation: int | None = None,
        age: float = 0.0,
        valid: float | None = None,
        policy: str | None = None,
    ) -> Future[Any]:
        """Send an action, and return a future of what `act` returns or raises.

        Actions of one thread arrive in the order of the calls. The payload's arrays may be changed
        when this returns. The future's own callbacks run in the transport's thread: keep them
        short.
        """
        asked, seen, elapsed = self._tell_clock()
        if elapsed > _FRESH:
            self._ask_clock()
        stamp = self._stamp(key, seen, elapsed, observation, age, valid, policy)
        stamped = [*named(key, payload), pack(stamp)]
        future = self._client.call_async("act", stamped, timeout)
        future.add_done_callback(self._look_if_stale)  # before whoever waits is told
        return checked(future, lambda answer: self._acted(key, asked, answer))

    def lease(
        self,
        key: str,
        *,
        priority: int = 0,
        ttl: float = 1.0,
        wait: float | None = None,
        on_change: Callable[[bool], object] | None = None,
    ) -> Lease:
        """Ask for the right to act on a key alone, and return it once this client has it.

        Args:
            key: the action's name.
            priority: of this client. A higher one takes the lease from a lower one at once; those
                of equal priority wait for each other, in the order in which they came.
            ttl: seconds after the last sign of this client after which the lease is another's. The
                way to the device and back is to take less than a quarter of that.
            wait: seconds to wait for it; the client's timeout by default. With 0 it is returned at
                once, whether it is held or not.
            on_change: ``on_change(held)`` is called each time that the lease has come or is lost,
                in a thread of the library's; not when it is released.

        Returns:
            A context manager that gives it back. Until then this client's actions of that key are
            refused while it isn't held.

        Raises:
            NotHolder: another client has it; the text says who.
            RuntimeError: this client has a lease of that key, or asks for it.
            UnknownInterface: no action of that name; the text lists those known.
            PermissionDenied: the role of this client's key doesn't allow the action.
            DeadlineExceeded, Unreachable: no answer.
        """
        leases = self._leases
        with self._leasing:
            if key in leases:
                raise RuntimeError(f"this client has a lease of {key!r} already; release it first")
            forget = functools.partial(leases.pop, key, None)
            made = leases[key] = Lease(self._client, key, priority, ttl, on_change, forget)
        try:
            if wait is None or wait > 0:
                made.require(wait)
        except BaseException:
            made.release()
            raise
        return made

    def _tell_clock(self) -> tuple[int, int | None, float]:
        """Return the time, in ns, and what goes with an action that is sent then; see `Clock`."""
        if self._client.sessions.current is not self._greeted:
            self._greet()
        asked = time.monotonic_ns()
        seen, elapsed = self._clock.tell(asked)
        return asked, seen, elapsed

    def _stamp(
        self,
        key: str,
        seen: int | None,
        elapsed: float,
        observation: int | None,
        age: float,
        valid: float | None,
        policy: str | None,
    ) -> Stamp:
        """Return what goes with an action: its number, and all that tells its age."""
        if observation is not None:
            observation = _id("observation", observation)
        if age or valid is not None:
            age = _seconds("age", age)
            valid = None if valid is None else _seconds("valid", valid)
        if policy is not None and (not isinstance(policy, str) or len(policy) > _LONGEST_POLICY):
            raise ValueError(f"policy is a version of up to 200 characters, not {shown(policy)}")
        count = self._numbers.get(key)
        if count is None:
            count = self._numbers.setdefault(key, itertools.count(1))
        number, stream = next(count), self._stream
        lease = self._leases.get(key)
        token = None if lease is None else lease.token
        return Stamp(number, seen, elapsed, age, valid, observation, policy, token, stream)

    def _acted(self, key: str, asked: int, answer: Any) -> Any:
        """Return the result of an action, and take in what else the device says."""
        # Not by `match`, which takes several times as long.
        if not isinstance(answer, list) or len(answer) < 3:
            raise Malformed(f"the device answered an action with {shown(answer)}")
        seen, halts = answer[1], answer[2]
        if not isinstance(seen, int) or not isinstance(halts, int):
            raise Malformed(f"the device answered an action with {shown(answer)}")
        self._clock.note(seen, time.monotonic_ns(), asked)
        if (lease := self._leases.get(key)) is not None:
            lease.note_action(asked * 1e-9)
        known = self._halts.get(key)
        if halts != known:
            self._note_halts(key, known, halts)
        return answer[0]

    def _note_halts(self, key: str, known: int | None, halts: int) -> None:
        self._halts[key] = halts
        if known is None or halts < known:  # it is told for the first time, or the device is new
            return
        self._counts["halts"] += halts - known
        _log.warning(
            "the device has called its safe action of %r since the action before: none had come "
            "in time",
            key,
        )

    def _look_if_stale(self, done: Future[Any]) -> None:
        if not done.cancelled() and isinstance(done.exception(), Stale):
            self._note_stale()

    def _note_stale(self) -> None:
        """Count an action that was refused, and see that the next is not for the same reason."""
        self._counts["actions_stale"] += 1
        self._ask_clock()

    # The device's clock -------------------------------------------------------------------

    def _greet(self) -> None:
        """Take in what the welcome of a new session tells of the device's clock."""
        session, before = self._client.sessions.current, self._greeted
        if session is None:
            return
        if before is not None and session.epoch != before.epoch:
            self._clock.forget()
        self._greeted = session
        seen = session.extensions.get(CLOCK)
        if isinstance(seen, int):
            self._clock.note(seen, int(session.welcomed * 1e9))

    def _ask_clock(self) -> None:
        asked = time.monotonic_ns()
        with suppress(EdgemlError):
            future = self._client.call_async(CLOCK, None)
            future.add_done_callback(lambda done: self._receive_clock(asked, done))

    def _receive_clock(self, asked: int, done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            with suppress(EdgemlError):
                self._note_clock(asked, done.result())

    def _note_clock(self, asked: int, seen: Any) -> None:
        if not isinstance(seen, int):
            raise Malformed(f"the device's clock says {shown(seen)}")
        self._clock.note(seen, time.monotonic_ns(), asked)

    # What was carried out -----------------------------------------------------------------

    def register_executed_callback(self, function: Callable[[Executed], object]) -> Recording:
        """Call ``function`` with each action that the device has carried out, by whomever.

        It gets what the device has on record now, and from then on each action once it is over,
        within a fraction of a second, in a thread of its own; see `Recording`.

        Raises:
            PermissionDenied: the role of this client's key lacks ``observe:executed``.
            DeadlineExceeded, Unreachable: no answer.
        """
        made = Recording(self._client, function)
        self._recordings.add(made)
        return made

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``replies_copied``, as for every client; ``actions_stale``, that
        the device refused as too late; ``halts``, calls of its safe action that it told of.
        """
        return {**super().stats(), "actions_stale": 0, "halts": 0, **self._counts}


def _close(client: Client, recordings: Iterable[Recording], leases: dict[str, Lease]) -> None:
    for lease in list(leases.values()):
        lease.release()
    ended = list(recordings)
    for recording in ended:
        recording.end()
    client.close()
    for recording in ended:
        recording.close()


def _id(name: str, value: int) -> int:
    with suppress(TypeError):
        number = operator.index(value)
        if 0 <= number < 1 << 63 and not isinstance(value, bool):
            return number
    raise ValueError(f"{name} is the id that an Observation has, not {shown(value)}")


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not value >= 0 or (name == "age" and value == math.inf):
        raise ValueError(f"{name} is a number of seconds, 0 or more, not {value!r}")
    return min(float(value), _LONGEST)
