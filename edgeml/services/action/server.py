"""The server of the action pair: offers a device's observations and takes actions for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgeml.services.action.config import CLOCK, OBSERVATIONS, ActionConfig
from edgeml.services.action.device import AtOnce, Device
from edgeml.services.action.record import Executed
from edgeml.services.base import ServerSettings, ServiceServer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ActionServer"]


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
        record: how many of the actions that it has carried out are kept; see `executed`.
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
        record: int = 10_000,
        **settings: Unpack[ServerSettings],
    ) -> None:
        self.config = config
        self._device = device = Device(config, obs_callback, act_callback, record)
        super().__init__("action", config, host=host, transport=transport, **settings)
        self._server.at_close = device.close
        self._server.extend(CLOCK, lambda asked, caller: time.monotonic_ns())
        self._server.register(CLOCK, AtOnce(device.tell_clock))
        self._server.register("obs", device.observe)
        self._server.register("observe", device.observe_stamped)
        self._server.register("executed", AtOnce(device.tell_executed), needs="observe")
        self._server.register("act", device.act, lane="act" if act_in_own_thread else "")
        self._server.register("lease", device.lessor)
        self._topic = self._server.topic(OBSERVATIONS, keep, needs="observe")

    def publish_obs(self, payload: dict[str, Any], taken: int | None = None) -> int:
        """Send observations to every client that registered for them.

        Never waits for a client: one that is behind gets the newest later. The payload may be
        changed as soon as this returns.

        Args:
            payload: the observations.
            taken: when they were taken, as `time.monotonic_ns` told just before; now by default.
                It is the observation's id, by which clients say what their actions rest on.

        Returns:
            The number of this publication, counted from 1.

        Raises:
            NotEncodable: the payload.
            Closed: the server has been stopped.
        """
        return self._topic.publish(payload, time.monotonic_ns() if taken is None else taken)

    def executed(self, since: int = 0) -> list[Executed]:
        """Return the newest actions that were carried out, or are, and calls of the safe action.

        Args:
            since: only those of a higher ``index``.

        Returns:
            At most as many as ``record`` says, in the order in which they began.
        """
        return self._device.record.since(since)

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything refused or dropped, by reason.

        Among them ``actions`` that were carried out, and ``actions_of_NAME`` for each key of a
        client; ``actions_stale``, ``actions_out_of_order`` and ``actions_not_holder``, which were
        refused; ``halts``, calls of the safe action, with ``halts_of_KEY`` for each action that has
        one; and ``leases_granted``, ``leases_taken`` by a higher priority and ``leases_expired``.
        """
        return {**super().stats(), **self._device.stats()}
