"""An actor's side."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, get_args

from edgeml.core.streams import Subscription
from edgeml.data import DataStoreBase
from edgeml.services.base import ClientSettings, ServiceClient, named
from edgeml.services.trainer.config import NETWORK, TrainerConfig
from edgeml.services.trainer.outbox import Outbox
from edgeml.services.trainer.updates import Updates
from edgeml.services.trainer.uploader import Delivered, OnRefused

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TrainerClient"]


class TrainerClient(ServiceClient):
    """An actor's side: uploads its data and receives weights.

    Args:
        name: selects the learner's store; every actor of a kind passes the same one.
        host: where the learner is; this machine by default.
        config: see `TrainerConfig`.
        data_store: what is uploaded to the store of that name.
        data_stores: further stores, by name.
        wait_for_server: go on trying, for 600 s or the number of seconds given, until a learner
            answers and is ready.
        timeout: seconds that connecting, or a call, may take unless told otherwise.
        transport: in place of the configuration's.
        log: a directory in which each store's items are kept until the learner has them durably, in
            a `LoggedDataStore` of its own, which `DataStoreBase.forward_to` fills. What is uploaded
            is that: first what an earlier process left there. The ``client_id`` is kept there,
            too, unless it is given. One client has it at a time. A store that is a
            `LoggedDataStore` itself is uploaded as it is.
        settings: ``url``, ``server_ip``, ``client_id``, ``codec``, ``images``, ``writable``,
            ``credentials``, ``on_disconnect``, ``on_reconnect``, ``on_move``: see `ServiceClient`.
            Of two clients with the same ``client_id``, the newer shuts the older out.

    Raises:
        Unreachable: no learner answers.
        ConfigMismatch: the learner is configured differently; the text names field and values.
        BlockingIOError: another client has the ``log``.
        OSError: what the system says of the ``log``; the text says what to do.
    """

    def __init__(
        self,
        name: str,
        host: str | None = None,
        config: TrainerConfig | None = None,
        data_store: DataStoreBase | None = None,
        data_stores: dict[str, DataStoreBase] | None = None,
        wait_for_server: bool | float = False,
        timeout: float = 10.0,
        *,
        transport: str | None = None,
        log: str | os.PathLike[str] | None = None,
        **settings: Unpack[ClientSettings],
    ) -> None:
        if config is None:
            raise TypeError("a TrainerClient needs config=, the TrainerConfig of the learner")
        self.name = name
        self.config = config
        stores = dict(data_stores or {})
        if data_store is not None:
            if name in stores:
                raise ValueError(f"data_store and data_stores both give a store for {name!r}")
            stores[name] = data_store
        outbox = None if log is None else Outbox(log, stores)
        if outbox is not None:
            stores = outbox.stores
            settings["client_id"] = settings.get("client_id") or outbox.client_id
        try:
            super().__init__(
                "trainer",
                config,
                label=name,
                host=host,
                transport=transport,
                timeout=timeout,
                wait_for_server=wait_for_server,
                **settings,
            )
        except BaseException:
            if outbox is not None:
                outbox.close()
            raise
        self._updates = updates = Updates(name, self._client, stores, secrets.randbits(63))

        def close() -> None:
            updates.end()
            if outbox is not None:
                outbox.close()

        self._close_by(close)

    @property
    def lost(self) -> int:
        """Items that no learner will get, as the store holds them no more: dropped, or lost."""
        return int(self.stats()["items_lost"])

    def update(self, timeout: float | None = None, on_refused: OnRefused = "skip") -> Delivered:
        """Send what the learner doesn't have yet; returns how much more it has, and has saved.

        ``applied`` is how many items more its store has, and ``durable`` how many more are in a
        checkpoint of its, and so outlive it. Nothing is sent twice or left out, whatever happens
        under way: an error means that the rest will be sent by the next call. A learner that starts
        anew, or from an older checkpoint, is sent again what the stores still hold.

        But an item that the codec doesn't carry, or that the learner's store refuses, is left out
        for good: `stats` counts it, and the log tells the first of each kind, and some later ones,
        with id and path.

        Args:
            timeout: seconds for each message; the client's own by default.
            on_refused: "raise" to send the items before such a one and raise an error about it. It
                stays first in line then, until the store lets go of it.

        Raises:
            DeadlineExceeded, Unreachable: no answer.
            UnknownInterface: the learner has no store of that name; the text lists those known.
            RemoteError: the learner's store failed, or its callback; or it refused an item that
                was not to be skipped.
            PermissionDenied: a newer client has the same explicit ``client_id``.
            NotEncodable: an item that was not to be skipped can't be carried; the text says where
                it is, and what to do.
        """
        return self._updates.update(timeout, _checked(on_refused))

    def update_async(
        self, timeout: float | None = None, on_refused: OnRefused = "skip"
    ) -> Future[Delivered]:
        """Send what the learner doesn't have yet, and return a future of what `update` returns.

        Updates take turns, however they are asked for, and those that are asked for by this in the
        order of the calls. What is inserted until its turn comes may go with it. `stop` sends what
        those wait for that haven't had their turn. The future's own callbacks run in the thread
        that sends: keep them short.

        Raises:
            ValueError: ``on_refused`` is neither.
            Overloaded: too many wait for their turn.
            Closed: this client has been stopped.
        """
        return self._updates.update_later(timeout, _checked(on_refused))

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and of each store what became of its items.

        ``stores`` has of each, by name: ``accepted`` by the store, which is always the sum of
        ``applied`` (the learner has them), ``refused`` (a dict: reasons and counts; they can't be
        sent, or the learner's store refused them), ``dropped`` (overwritten before they were
        sent), ``lost`` (a learner had them and forgot them, and the store holds them no more) and
        ``waiting``. Of those applied how many are ``durable``, in a checkpoint of the learner's,
        and how many were ``sent``, ``repeated`` of them not for the first time. ``items_refused``,
        and ``items_lost`` (or dropped), are the sums of all stores.
        ``replies_copied`` are replies and publications that came as private copies, because too
        many received arrays are held for the transport to lend more.
        """
        stores = self._updates.count()
        refused = sum(sum(store["refused"].values()) for store in stores.values())
        lost = sum(store["dropped"] + store["lost"] for store in stores.values())
        sums = {"items_refused": refused, "items_lost": lost}
        return {**super().stats(), **sums, "stores": stores}

    def request(self, type: str, payload: Any = None, timeout: float | None = None) -> Any:
        """Ask the learner something; returns what its ``request_callback`` gives.

        Args:
            type: one of the configuration's ``request_types``.
            payload: any value that the codec carries; an empty dict by default.
            timeout: seconds; the client's own by default.

        Raises:
            UnknownInterface: no such type; the text lists those known.
            RemoteError: ``request_callback`` raised.
            DeadlineExceeded, Unreachable: no answer.
        """
        return self._client.call("request", named(type, payload), timeout)

    def request_async(
        self, type: str, payload: Any = None, timeout: float | None = None
    ) -> Future[Any]:
        """Ask the learner something, and return a future of what `request` returns or raises.

        The payload's arrays may be changed when this returns. The future's own callbacks run in
        the transport's thread: keep them short.
        """
        return self._client.call_async("request", named(type, payload), timeout)

    def recv_network_callback(self, function: Callable[[Any], None]) -> Subscription:
        """Call ``function`` with the weights that the learner publishes, the current at once.

        It runs in a thread of its own. A slow one skips to the newest (see `Subscription`). Arrays
        are read-only views, unless this client is ``writable``.
        """
        return self._client.subscribe(NETWORK, function)

    def start_async_update(self, interval: float = 10) -> None:
        """Call `update` every ``interval`` seconds in the background, and once more at the end.

        The end is `stop`, or that of the program, also by Ctrl-C, SIGTERM or SIGHUP. These two
        raise KeyboardInterrupt in the main thread from now on, as Ctrl-C does, unless the program
        has a handler of its own, or this is called in another thread. At the end up to 2 seconds
        are spent on what is left. The first of several failures is logged, and the data goes with
        a later update.

        Raises:
            ValueError: the interval isn't positive.
            RuntimeError: it was called before.
        """
        self._updates.start(interval)

    def stop(self) -> None:
        """Send what start_async_update hasn't yet, close the connection and end every thread.

        What isn't sent within 2 seconds, because no updates were running or no learner answers, is
        logged; an `update` that another thread is amid raises Closed.
        """
        self._updates.close()
        super().stop()


def _checked(on_refused: OnRefused) -> OnRefused:
    if on_refused not in get_args(OnRefused):
        raise ValueError(f"on_refused is one of {get_args(OnRefused)}, got {on_refused!r}")
    return on_refused
