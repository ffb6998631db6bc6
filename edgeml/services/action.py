"""Action: the edge device is the server. It offers observations and takes actions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from edgeml.core.dispatch import Call, Caller
from edgeml.core.errors import Malformed, UnknownInterface, shown
from edgeml.core.streams import Subscription
from edgeml.services.base import (
    ClientSettings,
    ServerSettings,
    ServiceClient,
    ServiceServer,
    named,
    names,
)
from edgeml.services.functions import Callback

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ActionClient", "ActionConfig", "ActionServer"]

_log = logging.getLogger(__name__)

_OBSERVATIONS = "observations"


@dataclass
class ActionConfig:
    """What a device offers; both sides have one, and what they must share is compared.

    Attributes:
        port_number: where the server listens; 0 lets the system pick. Not compared.
        action_keys: the names of the actions that it takes.
        observation_keys: the names of the observations that it offers.
        broadcast_port: a second port that answers just as well; None for none. Where it is taken,
            the server warns and does without. Not compared.
        version: of the two programs' agreement.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``. Not compared.
    """

    port_number: int
    action_keys: Sequence[str] = field(default_factory=list)
    observation_keys: Sequence[str] = field(default_factory=list)
    broadcast_port: int | None = None
    version: str = "1"
    transport: str | None = None

    def shared(self) -> dict[str, Any]:
        """What the two sides' configurations must agree on."""
        return {
            "version": self.version,
            "action_keys": sorted(names("action_keys", self.action_keys)),
            "observation_keys": sorted(names("observation_keys", self.observation_keys)),
        }


class ActionServer(ServiceServer):
    """Offers a device's observations and takes actions for it.

    Args:
        config: see `ActionConfig`.
        obs_callback: ``obs_callback(keys) -> dict``: the observations of these names. All of
            ``config.observation_keys`` where a client asks for no particular ones. A client gets a
            `RemoteError` that names what is missing.
        act_callback: ``act_callback(key, payload) -> dict``: carry out an action; what it returns
            is the client's answer. With one more argument, or one called ``context``, each of the
            two callbacks is told who asks: see `Context`.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        keep: how many publications are kept for clients that are behind; 1 for only the newest.
        act_in_own_thread: whether ``act_callback`` runs in a thread of its own, so that neither
            callback waits for the other.
        transport: in place of the configuration's.
        settings: ``url``, ``workers``, ``codecs``, ``images``, ``wants_images``, ``rate_limit``,
            ``advertise``, ``credentials``, ``limits``, ``on_connect``, ``on_disconnect``: see
            `ServiceServer`.

    A callback that raises hurts only the call that it was for, whose client gets a `RemoteError`.
    """

    def __init__(
        self,
        config: ActionConfig,
        obs_callback: Callable[..., dict[str, Any]] | None,
        act_callback: Callable[..., Any] | None,
        host: str | None = None,
        *,
        keep: int = 1,
        act_in_own_thread: bool = False,
        transport: str | None = None,
        **settings: Unpack[ServerSettings],
    ) -> None:
        self.config = config
        self._device = device = _Device(config, obs_callback, act_callback)
        super().__init__("action", config, host=host, transport=transport, **settings)
        self._server.register("obs", device.observe)
        self._server.register("act", device.act, lane="act" if act_in_own_thread else "")
        self._topic = self._server.topic(_OBSERVATIONS, keep, needs="observe")

    def publish_obs(self, payload: dict[str, Any]) -> int:
        """Send observations to every client that registered for them.

        Never waits for a client: one that is behind gets the newest later. The payload may be
        changed as soon as this returns.

        Returns:
            The number of this publication, counted from 1.

        Raises:
            NotEncodable: the payload.
            Closed: the server has been stopped.
        """
        return self._topic.publish(payload)

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything refused or dropped, by reason.

        Among them ``actions`` that were carried out, and ``actions_of_NAME`` for each key.
        """
        return {**super().stats(), **self._device.counts}


class _Device:
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
            ``credentials``, ``on_disconnect``, ``on_reconnect``: see `ServiceClient`.

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
        super().__init__(
            "action",
            config,
            label=task_id or "",
            host=host,
            port=port_number,
            transport=transport,
            timeout=timeout,
            wait_for_server=wait_for_server,
            **settings,
        )

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

    def act(self, key: str, payload: Any = None, timeout: float | None = None) -> Any:
        """Carry out an action and return what ``act_callback`` gives.

        Args:
            key: the action's name.
            payload: any value that the codec carries; an empty dict by default.
            timeout: seconds; the client's own by default.

        Raises:
            UnknownInterface: no action of that name; the text lists those known.
            RemoteError: ``act_callback`` raised.
            DeadlineExceeded, Unreachable: no answer; whether the action was taken is not known.
        """
        return self._client.call("act", named(key, payload), timeout)

    def act_async(self, key: str, payload: Any = None, timeout: float | None = None) -> Future[Any]:
        """Send an action, and return a future of what `act` returns or raises.

        Actions of one thread arrive in the order of the calls. The payload's arrays may be changed
        when this returns. The future's own callbacks run in the transport's thread: keep them
        short.
        """
        return self._client.call_async("act", named(key, payload), timeout)

    def register_obs_callback(self, function: Callable[[Any], None]) -> Subscription:
        """Call ``function`` with what the server publishes, the current value at once.

        It runs in a thread of its own. A slow one skips to the newest (see `Subscription`).
        """
        return self._client.subscribe(_OBSERVATIONS, function)
