"""The device: the user's two callbacks, and what they may be asked for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

from edgeml.core.dispatch import Call, Caller
from edgeml.core.errors import Malformed, UnknownInterface, shown
from edgeml.services.action.config import ActionConfig
from edgeml.services.functions import Callback

__all__ = ["Device"]

_log = logging.getLogger(__name__)


class Device:
    """The two callbacks, and what they may be asked for."""

    def __init__(
        self,
        config: ActionConfig,
        obs: Callable[..., Any] | None,
        act: Callable[..., Any] | None,
    ) -> None:
        self._config = config
        self._obs = None if obs is None else Callback("obs_callback", obs, 1)
        self._act = None if act is None else Callback("act_callback", act, 2)
        self.counts = Counter[str]()  # of actions
        self._acting = WeakSet[Caller]()  # who has had one carried out

    def observe(self, call: Call) -> None:
        """Answer a call for observations."""
        known = list(self._config.observation_keys)
        keys = call.payload()
        if keys is None:
            keys = known
        elif not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Malformed("obs takes a list of names")
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
        call.answer(observations)

    def act(self, call: Call) -> None:
        """Carry out an action, and answer with what the user's function gives."""
        match call.payload():
            case [str(key), argument]:
                call.detail = repr(key)
            case _:
                raise Malformed("act takes a name and a payload")
        call.caller.require("act", key)
        known = list(self._config.action_keys)
        if key not in known:
            raise _unknown("action", key, known)
        if self._act is None:
            raise UnknownInterface("this server takes no actions")
        self._note(call, key)
        call.answer(self._act(call, key, key, argument))

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


def _unknown(what: str, key: str, known: list[str]) -> UnknownInterface:
    return UnknownInterface(f"there is no {what} {key!r}; known: {', '.join(known) or 'none'}")
