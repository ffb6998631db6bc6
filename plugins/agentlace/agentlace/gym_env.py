"""Environments of gymnasium that run on another machine."""

from __future__ import annotations

from typing import Any

import gymnasium

from agentlace.internal.ends import ServerBase
from agentlace.internal.values import LeftOut, unpack
from edgeml.gym import EnvServer, RemoteEnv

__all__ = ["GymEnvClient", "GymEnvServerWrapper"]

_PORT = 5546
_PATIENCE = 60.0  # seconds that a reset or a step may take, if not told that it takes longer


class GymEnvClient(RemoteEnv):
    """An environment that a `GymEnvServerWrapper` runs; see `edgeml.gym.RemoteEnv`.

    Args:
        host: where it runs.
        port: of its server.
        retry_interval: has no effect: a step is never repeated, since it may have been taken.
        timeout_ms: milliseconds that a reset or a step may take, where that is above a minute.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = _PORT,
        retry_interval: float = 0.5,
        timeout_ms: float = 800,
    ) -> None:
        del retry_interval
        super().__init__(f"zmq://{host}:{port}", timeout=max(_PATIENCE, timeout_ms / 1000))

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see `gymnasium.Env.reset`."""
        observation, info = super().reset(**options)
        return observation, unpack(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one step; see `gymnasium.Env.step`."""
        *outcome, info = super().step(action)
        return (*outcome, unpack(info))


class _Sent(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose infos have what can be sent, and no more."""

    def __init__(self, env: gymnasium.Env[Any, Any], left_out: LeftOut) -> None:
        super().__init__(env)
        self._left_out = left_out

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        return observation, self._left_out.keep_rest(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        *outcome, info = self.env.step(action)
        return (*outcome, self._left_out.keep_rest(info))


class GymEnvServerWrapper(ServerBase, gymnasium.Wrapper[Any, Any, Any, Any]):
    """Serves an environment to one client at a time, at all addresses of the machine.

    Args:
        env: the environment.
        port: where to listen.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], port: int = _PORT) -> None:
        gymnasium.Wrapper.__init__(self, env)
        self._left_out = LeftOut()
        self._server = EnvServer(_Sent(env, self._left_out), port, "0.0.0.0", "zmq")

    @property
    def left_out(self) -> int:
        """How many parts of infos were left out, since they can't be sent."""
        return self._left_out.count
