"""Both sides in one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from edgeml.core.security import Credentials
from edgeml.core.streams import Subscription
from edgeml.services.trainer.client import TrainerClient
from edgeml.services.trainer.config import TrainerConfig
from edgeml.services.trainer.server import TrainerServer
from edgeml.services.trainer.uploader import Delivered, OnRefused

__all__ = ["TrainerTunnel"]


class TrainerTunnel(TrainerServer):
    """A learner and an actor that share one process, and one store.

    It is both sides at once: a `TrainerServer` on the in-process transport, and the client's
    methods, answered through it. What the actor inserts into the store that was registered is there
    for the learner at once, so `update` has nothing to do.
    """

    def __init__(
        self,
        config: TrainerConfig | None = None,
        data_callback: Callable[..., Any] | None = None,
        request_callback: Callable[..., Any] | None = None,
    ) -> None:
        within = replace(
            config or TrainerConfig(), port_number=0, broadcast_port=None, transport="inproc"
        )
        # Nobody else is there, so no keys are asked for, whatever the environment says.
        super().__init__(within, data_callback, request_callback, credentials=Credentials())
        super().start(threaded=True)
        self._client = TrainerClient(
            "tunnel", "", replace(within, transport=self.url), credentials=Credentials()
        )

    def start(self, threaded: bool = False) -> None:
        """Block until `stop` or Ctrl-C, unless ``threaded``: it serves from the beginning."""
        if not threaded:
            self._block(self._stopped.wait)

    def update(self, timeout: float | None = None, on_refused: OnRefused = "skip") -> Delivered:
        """Nothing to send: both sides have the same store."""
        return Delivered(0, 0)

    def update_async(
        self, timeout: float | None = None, on_refused: OnRefused = "skip"
    ) -> Future[Delivered]:
        """Nothing to send: both sides have the same store."""
        done: Future[Delivered] = Future()
        done.set_result(Delivered(0, 0))
        return done

    def start_async_update(self, interval: float = 10) -> None:
        """Nothing to send: both sides have the same store."""

    def request(self, type: str, payload: Any = None, timeout: float | None = None) -> Any:
        """See `TrainerClient.request`."""
        return self._client.request(type, payload, timeout)

    def request_async(
        self, type: str, payload: Any = None, timeout: float | None = None
    ) -> Future[Any]:
        """See `TrainerClient.request_async`."""
        return self._client.request_async(type, payload, timeout)

    def recv_network_callback(self, function: Callable[[Any], None]) -> Subscription:
        """See `TrainerClient.recv_network_callback`."""
        return self._client.recv_network_callback(function)

    def stop(self) -> None:
        """End both sides; quick and idempotent."""
        self._client.stop()
        super().stop()
