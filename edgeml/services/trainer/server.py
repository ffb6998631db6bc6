"""The learner's side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from edgeml.core.dispatch import Caller, answer_with
from edgeml.core.errors import Malformed, UnknownInterface
from edgeml.core.server import Server
from edgeml.core.transport import Credentials
from edgeml.data import Batch, DataStoreBase, checkpoint
from edgeml.data.checkpoint import Report
from edgeml.services.base import ServiceServer, listening_urls
from edgeml.services.trainer.config import NETWORK, TrainerConfig
from edgeml.services.trainer.ledger import Ledger

__all__ = ["TrainerServer"]


class TrainerServer(ServiceServer):
    """A learner's side: collects the actors' data and publishes weights to them.

    Args:
        config: see `TrainerConfig`.
        data_callback: ``data_callback(store_name, batch)``, called after a batch was inserted,
            with a `Batch` of what is new.
        request_callback: ``request_callback(type, payload)``; what it returns is the answer.
        host: the address to listen at; name another than 127.0.0.1 to let other machines in.
        workers: how many callbacks may run at a time.
        codecs: names of the codecs that clients may speak.
        advertise: where others reach this server, as `url` tells: ``"host"`` or ``"host:port"``;
            None for where it listens.
        credentials: the transport's keys.
    """

    def __init__(
        self,
        config: TrainerConfig,
        data_callback: Callable[[str, Batch], Any] | None = None,
        request_callback: Callable[[str, Any], Any] | None = None,
        host: str = "127.0.0.1",
        *,
        workers: int = 1,
        codecs: Sequence[str] = ("msgpack",),
        advertise: str | None = None,
        credentials: Credentials = None,
    ) -> None:
        self.config = config
        self._data_callback = data_callback
        self._request_callback = request_callback
        self._stores: dict[str, DataStoreBase] = {}
        self._ledger = Ledger()
        self._lock = threading.Lock()
        # Of each store, who uploaded last, the number of that client's next item, and the store's
        # newest id after it, as others may insert too.
        self._last: dict[str, tuple[str, int, int, int]] = {}
        server = Server(
            "trainer",
            *listening_urls(config.transport, host, config.port_number, config.broadcast_port),
            config=config.shared(),
            codecs=codecs,
            workers=workers,
            rate_limit=config.rate_limit,
            credentials=credentials,
        )
        server.register("update", answer_with(self._update))
        server.register("request", answer_with(lambda payload, _: self._request(payload)))
        self._topic = server.topic(NETWORK)
        super().__init__(server, advertise)

    def register_data_store(self, name: str, store: DataStoreBase) -> None:
        """Put what clients of this name upload into ``store``.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._stores:
            raise ValueError(f"there is a store {name!r} already")
        self._stores[name] = store

    def data_store(self, name: str) -> DataStoreBase:
        """Return the store of a name; raises UnknownInterface, which lists those known."""
        try:
            return self._stores[name]
        except KeyError:
            known = ", ".join(self._stores) or "none"
            raise UnknownInterface(f"there is no store {name!r}; known: {known}") from None

    @property
    def store_names(self) -> list[str]:
        """The names of the registered stores."""
        return list(self._stores)

    def save_checkpoint(
        self, path: str | os.PathLike[str], values: Any | Callable[[], Any] = None
    ) -> Report:
        """Save all registered stores, and values of your own, to one file.

        Also how far each client's uploads have come: after `load_checkpoint` nothing is inserted
        twice, and a client that still holds what the file lacks sends that again. Uploads and
        calls go on meanwhile. See `edgeml.data.checkpoint.save`, which has the promises.

        Args:
            path: of the file, which is replaced as a whole.
            values: what a codec carries, such as weights and counters; or a function that returns
                it, called at the very moment that the stores are saved as of.

        Raises:
            NotEncodable: a value that the codec doesn't carry.
            OSError: what the system says.
        """

        def all_values() -> Any:
            given = values() if callable(values) else values
            return {"values": given, "marks": self._ledger.state()}

        return checkpoint.save(path, all_values, self._stores)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Any:
        """Fill all registered stores from what `save_checkpoint` wrote, and return the values.

        Call it before `start`.

        Raises:
            FileNotFoundError: there is none.
            Malformed, ConfigMismatch, ValueError: see `edgeml.data.checkpoint.load`.
        """
        ledger = Ledger()

        def restore_ledger(saved: Any) -> None:
            nonlocal ledger
            try:
                ledger = Ledger.restore(saved["marks"])
                saved["values"]
            except (KeyError, TypeError, ValueError):
                raise Malformed(
                    f"{os.fspath(path)} is no checkpoint of a TrainerServer: "
                    "load it with edgeml.data.checkpoint.load"
                ) from None

        saved = checkpoint.load(path, self._stores, check=restore_ledger)
        self._ledger, self._last = ledger, {}
        return saved["values"]

    def publish_network(self, params: Any) -> int:
        """Send weights to every client, those that connect later included.

        Never waits for a client: one that is behind skips to the newest. The weights may be
        changed as soon as this returns.

        Returns:
            The number of this publication, counted from 1.

        Raises:
            NotEncodable: the weights.
            Closed: the server has been stopped.
        """
        return self._topic.publish(params)

    def _request(self, payload: Any) -> Any:
        match payload:
            case [str(kind), argument]:
                pass
            case _:
                raise Malformed("request takes a type and a payload")
        if kind not in self.config.request_types:
            known = ", ".join(self.config.request_types) or "none"
            raise UnknownInterface(f"there is no request type {kind!r}; known: {known}")
        if self._request_callback is None:
            raise UnknownInterface("this server answers no requests")
        return self._request_callback(kind, argument)

    def _update(self, payload: Any, caller: Caller) -> int:
        """Insert what is new of an upload; returns the mark."""
        match payload:
            case {
                "store": str(name),
                "incarnation": int(incarnation),
                "acknowledged": int(acknowledged),
                "after": int(after),
            }:
                batch = Batch.from_payload(payload.get("batch"))
            case _:
                raise Malformed("update takes a store, an incarnation, two numbers and a batch")
        if not 0 <= acknowledged <= after < batch.first_id:
            raise Malformed(
                f"a batch from {batch.first_id} on cannot come after {after}, or {acknowledged}"
            )
        store = self.data_store(name)
        # The store's own lock, too, so that a checkpoint finds items and marks at the same point.
        # It alone won't do, since a store that waits for room lets go of it.
        with self._lock, store.lock:
            verdict = self._ledger.accept(
                caller.client_id,
                incarnation,
                name,
                acknowledged=acknowledged,
                after=after,
                first=batch.first_id,
                count=len(batch),
            )
            if verdict.gap:
                return verdict.mark
            new = batch[verdict.repeated :]
            self._server.counts["items_repeated"] += verdict.repeated
            if len(new):
                self._server.counts["items_lost_by_clients"] += verdict.lost
                sender, newest = (caller.client_id, incarnation), store.latest_data_id()
                if self._last.get(name) != (*sender, new.first_id, newest):
                    store.interrupt()
                store.batch_insert(new)
                self._server.counts["items"] += len(new)
                self._ledger.advance(caller.client_id, name, verdict.mark)
                self._last[name] = (*sender, verdict.mark + 1, store.latest_data_id())
        if len(new) and self._data_callback is not None:
            self._data_callback(name, new)
        return verdict.mark
