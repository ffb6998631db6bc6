"""The device: the user's two callbacks, and what they may be asked for."""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import msgspec

from edgeml.core.dispatch import Call, Caller, Gatherer, Turns, require_plain
from edgeml.core.errors import Closed, Malformed, UnknownInterface, shown
from edgeml.services.action.config import ActionConfig
from edgeml.services.action.gate import Gate
from edgeml.services.action.lessor import Lessor
from edgeml.services.action.record import Record, rows_of
from edgeml.services.action.stamps import read
from edgeml.services.base import names
from edgeml.services.functions import Callback, takes

__all__ = ["AtOnce", "Device"]

_log = logging.getLogger(__name__)

_LARGEST = 4096  # bytes of a question about the record


class Device:
    """The two callbacks, and what they may be asked for.

    Args:
        config: what it offers.
        obs: gives observations.
        act: carries out an action.
        keep: how many actions are kept on record.
    """

    def __init__(
        self,
        config: ActionConfig,
        obs: Callable[..., Any] | None,
        act: Callable[..., Any] | None,
        keep: int,
    ) -> None:
        self._config = config
        self._obs = None if obs is None else Callback("obs_callback", obs, 1)
        self._act = None if act is None else Callback("act_callback", act, 2)
        self.counts = Counter[str]()  # of actions
        self.record = Record(keep)
        self.lessor = Lessor(names("action_keys", config.action_keys), config.period())
        self._acting = WeakSet[Caller]()  # who has had one carried out
        timeouts, halt = config.timeouts(), _safe_action(config)
        self._gates = {
            key: Gate(key, timeouts.get(key), halt, self.record)
            for key in names("action_keys", config.action_keys)
        }

    def observe(self, call: Call) -> None:
        """Answer a call for observations."""
        call.answer(self._observations(call))

    def observe_stamped(self, call: Call) -> None:
        """Answer a call for observations with these and when they were taken, at the earliest."""
        taken = time.monotonic_ns()
        call.answer([self._observations(call), taken])

    def _observations(self, call: Call) -> Mapping[str, Any]:
        known = list(self._config.observation_keys)
        keys = call.payload()
        if keys is None:
            keys = known
        elif not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Malformed(f"{call.name} takes a list of names")
        for key in keys or [""]:
            call.caller.require("observe", key)
        for key in keys:
            if key not in known:
                raise _unknown("observation", key, known)
        if self._obs is None:
            raise UnknownInterface("this server offers no observations")
        observations = self._obs(call, call.name, keys)
        if not isinstance(observations, Mapping):
            raise TypeError(
                f"obs_callback gave {shown(observations)}: it is to return a dict of observations"
            )
        if missing := [key for key in keys if key not in observations]:
            raise ValueError(
                f"obs_callback gave no {', '.join(map(repr, missing))}, which it was asked for"
            )
        return observations

    def act(self, call: Call) -> None:
        """Carry out an action, and answer with what the user's function gives."""
        key, argument, stamp = read(call.payload())
        call.detail = repr(key)
        call.caller.require("act", key)
        gate = self._gates.get(key)
        if gate is None:
            raise _unknown("action", key, list(self._gates))
        if self._act is None:
            raise UnknownInterface("this server takes no actions")
        token = None if stamp is None else stamp.lease
        with self.lessor.acting(key, call.caller, token) as began:
            try:
                entry = gate.begin(call, stamp, began)
            except Closed as error:
                call.fail(error)
                return
            outcome = "failed"
            try:
                self._note(call, key)
                result = self._act(call, key, key, argument)
                outcome = "done"
            finally:
                self.record.end(entry, outcome)
        call.answer(result if stamp is None else [result, time.monotonic_ns(), gate.halts])

    def _note(self, call: Call, key: str) -> None:
        """Have it on record whose key an action is of, before it is carried out."""
        self.counts["actions"] += 1
        if (identity := call.caller.identity) is None:
            return
        self.counts[f"actions_of_{identity}"] += 1
        if call.caller not in self._acting:
            self._acting.add(call.caller)
            _log.info("the first action of %s: %r", call.caller, key)
        else:
            _log.debug("an action of %s: %r", call.caller, key)

    def tell_clock(self, call: Call) -> int:
        """Return what the device's clock says."""
        del call
        return time.monotonic_ns()

    def tell_executed(self, call: Call) -> list[Any]:
        """Return what has been carried out since the caller asked last."""
        if call.nbytes > _LARGEST:
            raise Malformed(f"a question of {call.nbytes} bytes, and {_LARGEST} are taken")
        try:
            started, ended = msgspec.convert(call.payload(), tuple[int, int])
        except msgspec.ValidationError as error:
            raise Malformed(f"executed takes two numbers: {error}") from None
        part = self.record.part(started, ended)
        return [part.started, part.ended, part.missed, rows_of(part.entries)]

    def stats(self) -> dict[str, int]:
        """Count what became of actions."""
        gates = self._gates
        return {
            **self.counts,
            **self.lessor.counts,
            "actions_stale": sum(gate.stale for gate in gates.values()),
            "actions_out_of_order": sum(gate.disordered for gate in gates.values()),
            "halts": sum(gate.halts for gate in gates.values()),
            **{f"halts_of_{key}": gate.halts for key, gate in gates.items() if gate.has_switch},
        }

    def close(self) -> None:
        """Begin no action any more, and call each safe action that is due at some time now."""
        for gate in self._gates.values():
            gate.close()
        for gate in self._gates.values():
            gate.join()


class AtOnce(Gatherer):
    """Answers calls where they come in, which no handler holds up that takes long.

    Args:
        function: gives the answer; quick.
    """

    def __init__(self, function: Callable[[Call], Any]) -> None:
        self._function = function
        self._turns: Turns | None = None

    def attach(self, turns: Turns) -> None:
        """See `Gatherer.attach`."""
        self._turns = turns

    def take(self, call: Call) -> None:
        """See `Gatherer.take`."""
        assert self._turns is not None
        if self._turns.begin(call):
            call.began = time.monotonic()
            try:
                call.answer(self._function(call))
            except Exception as error:
                self._turns.fail(call, error)

    def run(self) -> None:
        """See `Gatherer.run`; no turn is asked for."""

    def has_enough(self) -> bool:
        """See `Gatherer.has_enough`."""
        return True

    def close(self) -> list[Call]:
        """See `Gatherer.close`."""
        return []


def _safe_action(config: ActionConfig) -> Callable[[str], object] | None:
    """Return the user's function as one of a key.

    Raises:
        ValueError: it is there without a timeout, or a timeout without it.
        TypeError: it can't be called like that.
    """
    function = config.on_action_timeout
    if (function is None) != (config.action_timeout is None):
        raise ValueError(
            "action_timeout and on_action_timeout go together: say after how many seconds without "
            "an action what is to be done"
        )
    if function is None:
        return None
    require_plain("on_action_timeout", function)
    bare = function
    told = takes(function, 0, "key")
    try:
        inspect.signature(function).bind(*["key"] * told)
    except ValueError:  # of some that are written in C nobody knows
        pass
    except TypeError:
        raise TypeError(
            "on_action_timeout is called with the key, or with nothing where it needs no argument; "
            f"{shown(function)} takes {inspect.signature(function)}"
        ) from None
    return function if told else lambda key: bare()


def _unknown(what: str, key: str, known: list[str]) -> UnknownInterface:
    return UnknownInterface(f"there is no {what} {key!r}; known: {', '.join(known) or 'none'}")
