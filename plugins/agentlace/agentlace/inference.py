"""Inference: the machine with the GPU is the server. Clients call registered functions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import edgeml
from agentlace.internal.ends import ServerBase, answer_or_none
from agentlace.internal.values import pack, unpack
from edgeml import UnknownInterface

__all__ = ["InferenceClient", "InferenceServer"]

_TIMEOUT = 0.8  # seconds


class InferenceServer(ServerBase):
    """Serves functions by name, at all addresses of the machine, from `start` on.

    Args:
        port_num: where to listen.
    """

    _server: edgeml.InferenceServer

    def __init__(self, port_num: int) -> None:
        self.interfaces: dict[str, Callable[[Any], Any]] = {}
        self._server = edgeml.InferenceServer(port_num, "0.0.0.0")

    def register_interface(self, name: str, callback: Callable[[Any], Any]) -> None:
        """Serve a function under a name, in place of one that was there."""
        known = name in self.interfaces
        self.interfaces[name] = callback
        if not known:
            interfaces = self.interfaces  # and not self, which is closed when it is dropped
            self._server.register_interface(
                name, lambda payload: pack(interfaces[name](unpack(payload)))
            )


class InferenceClient:
    """Calls the functions of an `InferenceServer`, to which it connects with the first call.

    Args:
        server_ip: where the server is.
        port_num: its port.
    """

    def __init__(self, server_ip: str, port_num: int) -> None:
        self._address = server_ip, port_num
        self._lock = threading.Lock()
        self._connected: edgeml.InferenceClient | None = None

    def interfaces(self) -> set[str]:
        """Return the names that can be called; none where no server answers."""
        found = answer_or_none(lambda: self._connect().interfaces())
        return set(found or ())

    def call(self, name: str, payload: Any) -> Any:
        """Call a function and return its result; None if there is none.

        Of a name that isn't known the result is ``{"success": False, "message": ...}``.

        Raises:
            edgeml.NotEncodable: the payload can't be sent; the text says where it is.
        """

        def ask() -> Any:
            try:
                return self._connect().call(name, pack(payload))
            except UnknownInterface as error:
                return {"success": False, "message": str(error)}

        return answer_or_none(ask)

    def _connect(self) -> edgeml.InferenceClient:
        with self._lock:
            if self._connected is None:
                host, port = self._address
                self._connected = edgeml.InferenceClient(
                    host, port, timeout=_TIMEOUT, writable=True
                )
            return self._connected

    def stop(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            if self._connected is not None:
                self._connected.stop()
