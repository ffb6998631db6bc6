"""Ways to break a device's half of the library, by which the checker is tested; in its process."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any


def break_device(how: str) -> None:
    """Break the library in this process, before a device is made of it."""
    BREAKS[how]()


def _each(number: int) -> Callable[[], bool]:
    turns = itertools.count(1)
    return lambda: next(turns) % number == 0


# Ages ---------------------------------------------------------------------------------------


def _ignore_ages() -> None:
    from edgeml.services.action.gate import Gate

    Gate._refuse_old = lambda self, age, valid: max(age, 0.0)  # type: ignore[method-assign]


def _judge_as_it_came() -> None:
    """What an action waits for in the server is left out."""
    from edgeml.services.action.gate import Gate

    begin = Gate.begin

    def earlier(self: Any, call: Any, stamp: Any, at: float) -> Any:
        return begin(self, call, stamp, call.arrived)

    Gate.begin = earlier  # type: ignore[method-assign]


def _forget_the_way() -> None:
    """What an action rests on is as old as it was when it was sent."""
    from edgeml.services.action import gate

    gate.age_of = lambda stamp, now, waited: stamp.age + waited  # type: ignore[attr-defined]


def _number_observations_late() -> None:
    """An observation's id is that of a moment later."""
    from edgeml.services.action.server import ActionServer

    publish = ActionServer.publish_obs

    def later(self: Any, payload: Any, taken: int | None = None) -> int:
        del taken
        time.sleep(0.003)
        return publish(self, payload)

    ActionServer.publish_obs = later  # type: ignore[method-assign]


def _believe_in_the_future() -> None:
    """A negative age, as after the device's clock began anew, is none."""
    from edgeml.services.action import gate

    gate._AHEAD = 1e12


# Order and the record -----------------------------------------------------------------------


def _turn_about() -> None:
    """An action is carried out after the one that came after it."""
    from edgeml.services.action.device import Device

    make, each, kept = Device.__init__, _each(7), list[Any]()

    def init(self: Any, *given: Any) -> None:
        make(self, *given)
        act = self._act

        def disorderly(*call: Any) -> Any:
            if each():
                kept.append(call)
                return None
            result = act(*call)
            while kept:
                act(*kept.pop())
            return result

        self._act = disorderly

    Device.__init__ = init  # type: ignore[method-assign]


def _answer_without_acting() -> None:
    from edgeml.services.action.device import Device

    make, each = Device.__init__, _each(7)

    def init(self: Any, *given: Any) -> None:
        make(self, *given)
        act = self._act
        self._act = lambda *call: None if each() else act(*call)

    Device.__init__ = init  # type: ignore[method-assign]


def _act_twice() -> None:
    from edgeml.services.action.device import Device

    make, each = Device.__init__, _each(7)

    def init(self: Any, *given: Any) -> None:
        make(self, *given)
        act = self._act
        self._act = lambda *call: [act(*call) for _ in range(2 if each() else 1)]

    Device.__init__ = init  # type: ignore[method-assign]


def _leave_out_rows() -> None:
    from edgeml.services.action.record import Record

    since = Record.since
    Record.since = lambda self, index: [  # type: ignore[method-assign]
        row for row in since(self, index) if row.index % 7
    ]


def _double_rows() -> None:
    from edgeml.services.action.record import Record

    since = Record.since
    Record.since = lambda self, index: [  # type: ignore[method-assign]
        row for row in since(self, index) for _ in range(1 if row.index % 7 else 2)
    ]


# The switch ---------------------------------------------------------------------------------


def _switch(change: Callable[[Any, Callable[[str], object]], Callable[[str], object]]) -> None:
    """Have a switch call another function."""
    from edgeml.services.action.deadman import Switch

    make = Switch.__init__

    def init(self: Any, *given: Any) -> None:
        make(self, *given)
        self._function = change(self, self._function)

    Switch.__init__ = init  # type: ignore[method-assign]


def _halt_late() -> None:
    def late(switch: Any, halt: Callable[[str], object]) -> Callable[[str], object]:
        switch.timeout += 0.05
        return halt

    _switch(late)


def _halt_early() -> None:
    def early(switch: Any, halt: Callable[[str], object]) -> Callable[[str], object]:
        switch.timeout *= 0.5
        return halt

    _switch(early)


def _halt_never() -> None:
    _switch(lambda switch, halt: lambda key: None)


def _halt_twice() -> None:
    _switch(lambda switch, halt: lambda key: (halt(key), halt(key)))


def _halt_when_idle() -> None:
    """A handler that hangs holds the safe action up."""
    from edgeml.services.action.device import Device

    busy, make = threading.Lock(), Device.__init__

    def init(self: Any, *given: Any) -> None:
        make(self, *given)
        act = self._act

        def hold(*call: Any) -> Any:
            with busy:
                return act(*call)

        self._act = hold

    Device.__init__ = init  # type: ignore[method-assign]

    def wait(switch: Any, halt: Callable[[str], object]) -> Callable[[str], object]:
        del switch

        def patient(key: str) -> None:
            with busy:
                halt(key)

        return patient

    _switch(wait)


def _leave_unsafe() -> None:
    """Nothing is made safe as the server stops."""
    from edgeml.services.action.deadman import Switch

    def release(self: Any) -> None:
        self._due = float("inf")

    Switch.release = release  # type: ignore[method-assign]


# Leases -------------------------------------------------------------------------------------


def _let_anybody_act() -> None:
    from edgeml.services.action.leases import Leases

    def begin(self: Any, writer: Any, now: float) -> None:
        self._running[writer] += 1
        self._last = writer, now

    Leases.begin = begin  # type: ignore[method-assign]


def _claim(change: Callable[[int, float], tuple[int, float]]) -> None:
    """Have a claim be of another priority, or for another time."""
    from edgeml.services.action.leases import Leases

    claim = Leases.claim

    def changed(self: Any, writer: Any, name: str, priority: int, ttl: float, now: float) -> None:
        claim(self, writer, name, *change(priority, ttl), now)

    Leases.claim = changed  # type: ignore[method-assign]


def _leave_no_period() -> None:
    from edgeml.services.action.leases import Leases

    Leases._free_at = lambda self, writer: float("-inf")  # type: ignore[method-assign]


BREAKS = {
    "ages are ignored": _ignore_ages,
    "an action is judged as it came": _judge_as_it_came,
    "the way is forgotten": _forget_the_way,
    "ids are late": _number_observations_late,
    "the future is believed in": _believe_in_the_future,
    "actions are turned about": _turn_about,
    "actions are answered and not done": _answer_without_acting,
    "actions are done twice": _act_twice,
    "rows are left out": _leave_out_rows,
    "rows are doubled": _double_rows,
    "halts are late": _halt_late,
    "halts are early": _halt_early,
    "halts never come": _halt_never,
    "halts come twice": _halt_twice,
    "halts wait for handlers": _halt_when_idle,
    "the end is unsafe": _leave_unsafe,
    "anybody may act": _let_anybody_act,
    "leases last too long": lambda: _claim(lambda priority, ttl: (priority, ttl + 0.2)),
    "priorities are ignored": lambda: _claim(lambda priority, ttl: (0, ttl)),
    "writers leave no period": _leave_no_period,
}
