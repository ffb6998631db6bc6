"""Inference: the machine with the GPU is the server. Clients call registered functions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from edgeml.core.dispatch import answer_with, require_plain
from edgeml.services.base import ClientSettings, ServerSettings, ServiceClient, ServiceServer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InferenceClient", "InferenceServer"]

_LIST = "/interfaces"  # users' own names do not start with a slash


class InferenceServer(ServiceServer):
    """Serves functions by name.

    Args:
        port_num: where to listen; 0 lets the system pick, and `url` tells.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``.
        settings: ``url``, ``workers``, ``codecs``, ``rate_limit``, ``advertise``, ``credentials``:
            see `ServiceServer`.
    """

    def __init__(
        self,
        port_num: int | None = None,
        host: str | None = None,
        transport: str | None = None,
        **settings: Unpack[ServerSettings],
    ) -> None:
        super().__init__("inference", host=host, port=port_num, transport=transport, **settings)
        self._names = interfaces = list[str]()
        self._server.register(_LIST, answer_with(lambda payload, _: sorted(interfaces)))

    def register_interface(self, name: str, function: Callable[[Any], Any]) -> None:
        """Serve ``function(payload) -> result`` under a name, before or after the start.

        The payload's arrays are read-only views; the result may be any value that the codec
        carries, and may be changed once the function is called again.

        Raises:
            ValueError: the name is taken, empty, or starts with a slash.
            TypeError: the function isn't callable, or is an ``async def``.
        """
        if not isinstance(name, str) or not name or name.startswith("/"):
            raise ValueError(f"an interface can't be called {name!r}")
        require_plain(f"interface {name!r}", function)
        if name in self._names:
            raise ValueError(f"there is an interface {name!r} already")
        self._server.register(name, answer_with(lambda payload, _: function(payload)))
        self._names.append(name)


class InferenceClient(ServiceClient):
    """Calls the functions of an `InferenceServer`.

    Args:
        host: where the server is; this machine by default.
        port_num: its port.
        transport: as for the server.
        timeout: seconds that connecting, or a call, may take unless told otherwise.
        wait_for_server: go on trying, for 600 s or the number of seconds given, when no server
            answers yet.
        settings: ``url``, ``server_ip``, ``client_id``, ``codec``, ``writable``, ``credentials``:
            see `ServiceClient`.

    Raises:
        Unreachable: nobody serves there.
        ConfigMismatch: what serves there is no inference server.
    """

    def __init__(
        self,
        host: str | None = None,
        port_num: int | None = None,
        transport: str | None = None,
        *,
        timeout: float = 10.0,
        wait_for_server: bool | float = False,
        **settings: Unpack[ClientSettings],
    ) -> None:
        super().__init__(
            "inference",
            host=host,
            port=port_num,
            transport=transport,
            timeout=timeout,
            wait_for_server=wait_for_server,
            **settings,
        )

    def interfaces(self) -> list[str]:
        """The names that can be called, sorted."""
        return list(self._client.call(_LIST, None))

    def call(self, name: str, payload: Any, timeout: float | None = None) -> Any:
        """Call a function of the server and return its result.

        The payload's arrays may be changed when this returns, and when it raises.

        Args:
            name: as registered.
            payload: any value that the codec carries.
            timeout: seconds; the client's own by default.

        Raises:
            RemoteError: the function raised; it carries the far side's traceback.
            UnknownInterface: no function of that name; the text lists those known.
            NotEncodable: the payload can't be carried; the text gives the path to what can't.
            DeadlineExceeded: no answer in time.
            Unreachable: nobody serves there, or the connection was lost under way.
        """
        return self._client.call(name, payload, timeout)

    def call_async(self, name: str, payload: Any, timeout: float | None = None) -> Future[Any]:
        """Call a function and return a future, whose result or exception is what `call`'s is.

        The payload's arrays may be changed when this returns. The future's own callbacks run in
        the transport's thread: keep them short.
        """
        return self._client.call_async(name, payload, timeout)
