"""Environments of gymnasium that run on another machine."""

from __future__ import annotations

from typing import Any

import gymnasium

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


class GymEnvServerWrapper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Serves an environment to one client at a time, at all addresses of the machine.

    Args:
        env: the environment.
        port: where to listen.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], port: int = _PORT) -> None:
        super().__init__(env)
        self._server = EnvServer(env, port, "0.0.0.0", "zmq")

    def start(self, threaded: bool = False) -> None:
        """Serve until `stop` or Ctrl-C; in the background with ``threaded``."""
        self._server.start(threaded)

    def stop(self) -> None:
        """Stop serving; the environment stays open."""
        self._server.stop()
