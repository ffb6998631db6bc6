"""Action: the device is the server. It offers observations and takes actions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import edgeml
from agentlace.internal.ends import ServerBase, answer_or_none
from agentlace.internal.published import COUNT, Counted, news_for
from agentlace.internal.values import LeftOut, pack, unpack

__all__ = ["ActionClient", "ActionConfig", "ActionServer"]

_log = logging.getLogger(__name__)

ObsCallback = Callable[[set[str]], dict[str, Any]]
ActCallback = Callable[[str, Any], Any]


@dataclass
class ActionConfig:
    """What both sides agree on.

    Attributes:
        port_number: where the server listens.
        action_keys: the names of the actions that it takes; compared.
        observation_keys: the names of the observations that it offers; compared.
        broadcast_port: a second port that answers just as well; None for no publications.
        version: of the two programs' agreement; compared.
    """

    port_number: int
    action_keys: list[str]
    observation_keys: list[str]
    broadcast_port: int | None = None
    version: str = "0.0.1"


class _Config(edgeml.ActionConfig):
    """The same for edgeml, with one observation that is nobody's but the shim's."""

    def __init__(self, config: ActionConfig) -> None:
        super().__init__(
            config.port_number,
            list(config.action_keys),
            [*config.observation_keys, COUNT],
            config.broadcast_port,
            config.version,
        )

    def shared(self) -> dict[str, Any]:
        shared = super().shared()
        shared["observation_keys"].remove(COUNT)
        return shared


class _AsGiven(dict[str, Any]):
    """What a callback gave, which needn't be all that it was asked for."""

    def __contains__(self, key: object) -> bool:
        return True


class ActionServer(ServerBase):
    """Offers a device's observations and takes actions for it.

    It listens at all addresses of the machine, from `start` on.

    Args:
        config: see `ActionConfig`.
        obs_callback: ``obs_callback(keys)``, a set of names; what it returns is the answer.
        act_callback: ``act_callback(key, payload)``, likewise.
        log_level: of the logger ``agentlace``.
    """

    _server: edgeml.ActionServer

    def __init__(
        self,
        config: ActionConfig,
        obs_callback: ObsCallback | None,
        act_callback: ActCallback | None,
        log_level: int = logging.WARNING,
    ) -> None:
        logging.getLogger("agentlace").setLevel(log_level)
        self.config = config
        left_out = LeftOut()
        self._counted = counted = Counted()

        def observe(keys: list[str]) -> dict[str, Any]:
            if keys == [COUNT]:
                return {COUNT: counted.count()}
            if obs_callback is None:
                return _AsGiven(success=False, message="this server offers no observations")
            given = obs_callback(set(keys) - {COUNT})
            return _AsGiven(left_out.keep_rest(given))

        def act(key: str, payload: Any) -> Any:
            if act_callback is None:
                return {"success": False, "message": "this server takes no actions"}
            return left_out.keep_rest(act_callback(key, unpack(payload)))

        self._server = edgeml.ActionServer(_Config(config), observe, act, host="0.0.0.0")

    def publish_obs(self, payload: dict[str, Any]) -> bool:
        """Send observations to all clients that listen now; False without a broadcast port."""
        if self.config.broadcast_port is None:
            _log.warning("nothing is published: the configuration has no broadcast_port")
            return False
        self._counted.publish(self._server.publish_obs, payload)
        return True


class ActionClient:
    """Reads a device's observations and sends it actions.

    Args:
        server_ip: where the device is.
        config: see `ActionConfig`.
        wait_for_server: wait until it answers, for as long as it takes.
        timeout_ms: milliseconds that an answer may take.

    Raises:
        edgeml.Unreachable: no device answers.
        edgeml.ConfigMismatch: the device is configured differently.
    """

    def __init__(
        self,
        server_ip: str,
        config: ActionConfig,
        wait_for_server: bool = False,
        timeout_ms: float = 800,
    ) -> None:
        self.server_ip = server_ip
        self.config = config
        self._client = edgeml.ActionClient(
            server_ip,
            config=_Config(config),
            wait_for_server=math.inf if wait_for_server else False,
            timeout=timeout_ms / 1000,
            writable=True,
        )

    def obs(self, keys: Iterable[str] | None = None) -> Any:
        """Return what the device answers for these names, or all; None if it doesn't.

        Raises:
            AssertionError: no such name in the configuration.
        """
        wanted = sorted(self.config.observation_keys if keys is None else keys)
        for key in wanted:
            assert key in self.config.observation_keys, f"there is no observation {key!r}"
        return answer_or_none(lambda: self._client.obs(wanted))

    def act(self, key: str, payload: Any = None) -> Any:
        """Carry out an action, and return what the device answers; None if it doesn't.

        Raises:
            ValueError: no such name in the configuration.
            edgeml.NotEncodable: the payload can't be sent; the text says where it is.
        """
        if key not in self.config.action_keys:
            raise ValueError(f"there is no action {key!r}")
        return answer_or_none(lambda: self._client.act(key, pack(payload)))

    def register_obs_callback(self, callback: Callable[[Any], None]) -> None:
        """Call ``callback`` with what the device publishes from now on, in a thread of its own.

        Raises:
            RuntimeError: the configuration has no ``broadcast_port``.
        """
        if self.config.broadcast_port is None:
            raise RuntimeError("nothing is published: the configuration has no broadcast_port")
        known = answer_or_none(lambda: self._client.obs([COUNT]))
        known = known.get(COUNT) if isinstance(known, dict) else None
        self._client.register_obs_callback(news_for(callback, known))

    def stop(self) -> None:
        """Close the connection."""
        self._client.stop()
