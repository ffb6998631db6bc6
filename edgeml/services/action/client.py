"""The client of the action pair: reads a device's observations and sends it actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from edgeml.core.streams import Subscription
from edgeml.services.action.config import OBSERVATIONS, ActionConfig
from edgeml.services.base import ClientSettings, ServiceClient, named, names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ActionClient"]


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
        return self._client.subscribe(OBSERVATIONS, function)
