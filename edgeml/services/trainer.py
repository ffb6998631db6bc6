"""Trainer: the learner is the server. Actors send it what they see and get new weights.

Delivery. Every item that an actor uploads is known by who sends it (client id and incarnation),
the store, and its number there. The server keeps one high-water mark for each: what is at or under
it is there already and dropped, a gap is refused and answered with the mark, from which the client
then goes on. So an update that is repeated, because its answer was lost, adds nothing twice. This
is Kafka's idempotent producer (KIP-98).

An incarnation is one `TrainerClient` object. Of those with the same explicit client id, the one
that the server saw last shuts the others out; no clock has a say, for a robot's may be reset.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from edgeml.core.client import Client
from edgeml.core.errors import (
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotEncodable,
    PermissionDenied,
    UnknownInterface,
)
from edgeml.core.message import pooled
from edgeml.core.server import Server, Session
from edgeml.core.streams import Subscription
from edgeml.core.transport import Credentials
from edgeml.core.url import resolve
from edgeml.data import Batch, DataStoreBase, checkpoint
from edgeml.data.checkpoint import Report
from edgeml.services.base import ServiceClient, ServiceServer, listening_urls, names

__all__ = ["TrainerClient", "TrainerConfig", "TrainerServer", "TrainerTunnel"]

_log = logging.getLogger(__name__)

_NETWORK = "network"
_LARGE_COLUMN = 1 << 20  # bytes
_CHUNK_BYTES = 4 << 20  # larger messages of images are slower, not faster
_WINDOW = 4  # chunks under way: one is collected, sent or inserted while others are
_MOST_ITEMS = 4096  # in a chunk
_FIRST_ITEMS = 32  # in the first chunk, since the size of the items isn't known yet
_WAIT_FOR_SERVER = 600.0  # seconds, where the user just says "wait"
_SHUT_OUT = 256  # incarnations of one client id that are remembered
_LAST_UPDATE = 2.0  # seconds that stopping may spend on what hasn't been sent


@dataclass
class TrainerConfig:
    """What a learner serves; both sides have one, and what they must share is compared.

    Attributes:
        port_number: where the server listens; 0 lets the system pick. Not compared.
        broadcast_port: a second port that answers just as well; None for none. Where it is taken,
            the server warns and does without. Not compared.
        request_types: the names that `TrainerClient.request` may be given.
        rate_limit: calls per second and client; those beyond wait their turn within their
            deadline. None for any number. Not compared.
        version: of the two programs' agreement.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``. Not compared.
    """

    port_number: int = 5555
    broadcast_port: int | None = 5556
    request_types: Sequence[str] = field(default_factory=list)
    rate_limit: float | None = None
    version: str = "1"
    transport: str | None = None

    def shared(self) -> dict[str, Any]:
        """What the two sides' configurations must agree on."""
        return {
            "version": self.version,
            "request_types": sorted(names("request_types", self.request_types)),
        }


@dataclass
class _Mark:
    incarnation: int
    number: int
    shut_out: deque[int] = field(default_factory=lambda: deque(maxlen=_SHUT_OUT))


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
        credentials: Credentials = None,
    ) -> None:
        self.config = config
        self._data_callback = data_callback
        self._request_callback = request_callback
        self._stores: dict[str, DataStoreBase] = {}
        self._marks: dict[tuple[str, str], _Mark] = {}
        self._lock = threading.Lock()
        # Of each store, who uploaded last, the number of that client's next item, and the store's
        # newest id after it, as others may insert too.
        self._last: dict[str, tuple[str, int, int, int]] = {}
        self._restored = False  # from a checkpoint
        server = Server(
            "trainer",
            *listening_urls(config.transport, host, config.port_number, config.broadcast_port),
            config=config.shared(),
            codecs=codecs,
            workers=workers,
            rate_limit=config.rate_limit,
            credentials=credentials,
        )
        server.register("update", self._update)
        server.register("request", lambda payload, _: self._request(payload))
        self._topic = server.topic(_NETWORK)
        super().__init__(server)

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
            marks = [
                [client, name, mark.incarnation, mark.number, list(mark.shut_out)]
                for (client, name), mark in self._marks.items()
            ]
            return {"values": values() if callable(values) else values, "marks": marks}

        return checkpoint.save(path, all_values, self._stores)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Any:
        """Fill all registered stores from what `save_checkpoint` wrote, and return the values.

        Call it before `start`.

        Raises:
            FileNotFoundError: there is none.
            Malformed, ConfigMismatch, ValueError: see `edgeml.data.checkpoint.load`.
        """
        marks: dict[tuple[str, str], _Mark] = {}

        def take_marks(saved: Any) -> None:
            try:
                for client, name, incarnation, number, shut_out in saved["marks"]:
                    shut = deque[int](shut_out, maxlen=_SHUT_OUT)
                    marks[client, name] = _Mark(incarnation, number, shut)
                saved["values"]
            except (KeyError, TypeError, ValueError):
                raise Malformed(
                    f"{os.fspath(path)} is no checkpoint of a TrainerServer: "
                    "load it with edgeml.data.checkpoint.load"
                ) from None

        saved = checkpoint.load(path, self._stores, check=take_marks)
        self._marks, self._last, self._restored = marks, {}, True
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

    def _update(self, payload: Any, session: Session) -> int:
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
            # Of a client that isn't known, what was acknowledged counts: of several uploads that
            # are under way, a later one may be the first to come. But a checkpoint that doesn't
            # know it has nothing of it, and all that it still holds is to come again.
            start = 0 if self._restored else acknowledged
            mark = self._marks.setdefault((session.client_id, name), _Mark(incarnation, start))
            if incarnation in mark.shut_out:
                raise PermissionDenied(
                    f"a newer client calls itself {session.client_id!r}; give each its own id"
                )
            if incarnation != mark.incarnation:
                mark.shut_out.append(mark.incarnation)
                mark.incarnation, mark.number = incarnation, start
            if after > mark.number:
                return mark.number  # a gap: the client goes on from here
            new = batch[max(0, mark.number + 1 - batch.first_id) :]
            self._server.counts["items_repeated"] += len(batch) - len(new)
            if len(new):
                self._server.counts["items_lost_by_clients"] += max(
                    0, batch.first_id - mark.number - 1
                )
                sender, newest = (session.client_id, incarnation), store.latest_data_id()
                if self._last.get(name) != (*sender, new.first_id, newest):
                    store.interrupt()
                store.batch_insert(new)
                self._server.counts["items"] += len(new)
                mark.number = batch.first_id + len(batch) - 1
                self._last[name] = (*sender, mark.number + 1, store.latest_data_id())
            number = mark.number
        if len(new) and self._data_callback is not None:
            self._data_callback(name, new)
        return number


class TrainerClient(ServiceClient):
    """An actor's side: uploads its data and receives weights.

    Args:
        name: selects the learner's store; every actor of a kind passes the same one.
        host: where the learner is.
        config: see `TrainerConfig`.
        data_store: what is uploaded to the store of that name.
        data_stores: further stores, by name.
        wait_for_server: go on trying, for 600 s or the number of seconds given, when no learner
            answers yet.
        timeout: seconds that connecting, or a call, may take.
        client_id: this client's identity. Random by default; of two clients with the same one, the
            newer shuts the older out.
        transport: in place of the configuration's.
        codec: the codec's name.
        writable: whether received arrays are private copies rather than read-only views.
        credentials: the transport's keys.

    Raises:
        Unreachable: no learner answers.
        ConfigMismatch: the learner is configured differently; the text names field and values.
    """

    def __init__(
        self,
        name: str,
        host: str,
        config: TrainerConfig,
        data_store: DataStoreBase | None = None,
        data_stores: dict[str, DataStoreBase] | None = None,
        wait_for_server: bool | float = False,
        timeout: float = 10.0,
        *,
        client_id: str | None = None,
        transport: str | None = None,
        codec: str = "msgpack",
        writable: bool = False,
        credentials: Credentials = None,
    ) -> None:
        self.name = name
        self.config = config
        self._stores = dict(data_stores or {})
        if data_store is not None:
            if name in self._stores:
                raise ValueError(f"data_store and data_stores both give a store for {name!r}")
            self._stores[name] = data_store
        self._sent = dict.fromkeys(self._stores, 0)  # what the server is known to have
        # Uploads under way, or whose answer was lost: the item that each follows, and its first.
        self._unsure: dict[str, deque[tuple[int, int]]] = {name: deque() for name in self._stores}
        self._chunk = dict.fromkeys(self._stores, _FIRST_ITEMS)  # items that make a good message
        self._incarnation = secrets.randbits(63)
        self._updating = threading.Lock()
        self._stopping = threading.Event()
        self._updater: threading.Thread | None = None
        wait = _WAIT_FOR_SERVER if wait_for_server is True else float(wait_for_server)
        client = Client(
            "trainer",
            resolve(transport or config.transport, host, config.port_number),
            config=config.shared(),
            client_id=client_id,
            label=name,
            codec=codec,
            timeout=timeout,
            wait=wait,
            writable=writable,
            credentials=credentials,
        )
        super().__init__(client)
        self._epochs = dict.fromkeys(self._stores, client.epoch)
        for store in self._stores.values():
            store.allocate = self._allocate_batch
        self.lost = 0
        """Items that a store had overwritten before they could be sent."""

    def update(self, timeout: float | None = None) -> int:
        """Send what the learner doesn't have yet; returns how many items it now has more.

        Nothing is sent twice or left out, whatever happens under way: an error means that the
        rest will be sent by the next call.

        Args:
            timeout: seconds for each message; the client's own by default.

        Raises:
            DeadlineExceeded, Unreachable: no answer.
            UnknownInterface: the learner has no store of that name; the text lists those known.
            RemoteError: the learner's store refused the data, or its callback raised.
            PermissionDenied: a newer client has the same explicit ``client_id``.
            NotEncodable: an item can't be carried; the text says where it is, and what to do.
        """
        with self._updating:
            return sum(self._update(name, store, timeout) for name, store in self._stores.items())

    def _allocate_batch(self, nbytes: int) -> memoryview | None:
        """Where the transport sends from, for what is large; else memory that was used before."""
        place = self._allocate(nbytes) if nbytes >= _LARGE_COLUMN else None
        return place if place is not None else pooled(nbytes)

    def _update(self, name: str, store: DataStoreBase, timeout: float | None) -> int:
        before, lost_before = self._sent[name], self.lost
        newest = store.latest_data_id()  # what comes in meanwhile goes with the next update
        under_way: deque[tuple[Callable[[], int], int]] = deque()  # with the last item of each
        epoch = self._client.epoch
        if self._unsure[name] or epoch != self._epochs[name]:
            # A server that was started anew may have its stores from a checkpoint, and lack what
            # came after that; this store may hold it yet.
            self._ask_how_far(name, timeout)
            self._epochs[name] = epoch
        cursor = self._sent[name]
        try:
            while True:
                while cursor < newest and len(under_way) < _WINDOW:
                    batch = self._next_batch(name, store, cursor)
                    if not len(batch):
                        newest = cursor
                        break
                    last = batch.first_id + len(batch) - 1
                    alone = last >= newest and not under_way
                    under_way.append((self._upload(name, batch, cursor, timeout, alone), last))
                    cursor = last
                if not under_way:
                    break
                answer, last = under_way.popleft()
                mark = answer()
                if mark < last:  # refused, and with it those that follow
                    _wait_for(under_way)
                    self._ask_how_far(name, timeout)
                    cursor = self._sent[name]
                else:
                    self._acknowledge(name, mark)
        except BaseException:
            _wait_for(under_way)
            raise
        return max(0, self._sent[name] - before - (self.lost - lost_before))

    def _next_batch(self, name: str, store: DataStoreBase, after: int) -> Batch:
        chunk = self._chunk[name]
        # A little more in one piece, rather than a little piece at the end.
        limit = 2 * chunk if store.latest_data_id() - after <= 2 * chunk else chunk
        batch = store.get_latest_data(after, limit=limit)
        if len(batch):
            self._chunk[name] = fitting = _fitting(batch)
            if len(batch) > 2 * fitting:
                batch = batch[:fitting]
        return batch

    def _upload(
        self, name: str, batch: Batch, after: int, timeout: float | None, alone: bool
    ) -> Callable[[], int]:
        """Send a batch that follows the item ``after``; returns what gives the server's mark."""
        upload = {
            "store": name,
            "incarnation": self._incarnation,
            "acknowledged": self._sent[name],
            "after": after,
            "batch": batch.to_payload(),
        }
        unsure = self._unsure[name]
        unsure.append((after, batch.first_id))
        try:
            if not alone:
                future: Future[int] = self._client.call_async("update", upload, timeout)
                return future.result
            mark: int = self._client.call("update", upload, timeout)  # spares two thread hops
        except NotEncodable as error:
            unsure.pop()  # nothing of it was sent
            raise NotEncodable(
                f"store {name!r}, in the {len(batch)} items from id {batch.first_id} on: {error}; "
                "its release(id) gives up the items up to that id"
            ) from None
        return lambda: mark

    def _ask_how_far(self, name: str, timeout: float | None) -> None:
        """Learn the server's mark rather than send again what is there."""
        sent = self._sent[name]
        mark = self._upload(name, Batch.of([], sent + 1), sent, timeout, True)()
        self._unsure[name].pop()
        self._acknowledge(name, mark)
        self._unsure[name].clear()  # what isn't there by now will be sent anew

    def _acknowledge(self, name: str, mark: int) -> None:
        """The server has all items up to ``mark``, but for those that were overwritten here."""
        unsure = self._unsure[name]
        while unsure and unsure[0][1] <= mark:
            after, first = unsure.popleft()
            if lost := first - after - 1:
                self.lost += lost
                _log.warning("%d items of %r were overwritten before they were sent", lost, name)
        self._sent[name] = mark
        self._stores[name].release(mark)

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
        return self._client.call("request", [type, {} if payload is None else payload], timeout)

    def recv_network_callback(self, function: Callable[[Any], None]) -> Subscription:
        """Call ``function`` with the weights that the learner publishes, the current at once.

        It runs in a thread of its own. A slow one skips to the newest (see `Subscription`). Arrays
        are read-only views, unless this client is ``writable``.
        """
        return self._client.subscribe(_NETWORK, function)

    def start_async_update(self, interval: float = 10) -> None:
        """Call `update` every ``interval`` seconds in the background, and once more at the end.

        The end is `stop`, or that of the program. The first of several failures is logged, and the
        data goes with a later update.
        """
        if not interval > 0:
            raise ValueError(f"interval must be positive, not {interval}")
        if self._updater is not None:
            raise RuntimeError("updates are running already")
        self._updater = threading.Thread(
            target=self._keep_updating, args=(interval,), name="edgeml updates", daemon=True
        )
        self._updater.start()
        atexit.register(self.stop)

    def _keep_updating(self, interval: float) -> None:
        failures = 0
        while not self._stopping.wait(interval):
            try:
                self.update()
                if failures:
                    _log.warning("updates of %r go on after %d failures", self.name, failures)
                failures = 0
            except PermissionDenied as error:
                _log.error("updates of %r end: %s", self.name, error)
                return
            except Exception as error:  # of a user's own store, too
                failures += 1
                if failures == 1:
                    known = isinstance(error, EdgemlError)
                    text = "an update of %r failed, and will be repeated: %s"
                    _log.warning(text, self.name, error, exc_info=not known)

    def _count_unsent(self) -> int:
        return sum(s.latest_data_id() - self._sent[n] for n, s in self._stores.items())

    def stop(self) -> None:
        """Send what start_async_update hasn't yet, close the connection and end every thread.

        What isn't sent, because no updates were running or no learner answers, is logged.
        """
        atexit.unregister(self.stop)
        first = not self._stopping.is_set()
        self._stopping.set()
        why = "update() was not called for them"
        updater, self._updater = self._updater, None
        if updater is not None and updater is not threading.current_thread():
            updater.join(_LAST_UPDATE)
            try:
                if updater.is_alive():
                    raise DeadlineExceeded("an update is under way, and gets no answer")
                self.update(_LAST_UPDATE)
            except EdgemlError as error:
                why = str(error)
        unsent = self._count_unsent()
        if first and unsent:
            text = "up to %d items of %r were not sent, or not known to have arrived: %s"
            _log.warning(text, unsent, self.name, why)
        for store in self._stores.values():
            if store.allocate == self._allocate_batch:
                store.allocate = pooled
        super().stop()
        if updater is not None and updater is not threading.current_thread():
            updater.join(_LAST_UPDATE)


def _wait_for(under_way: deque[tuple[Callable[[], int], int]]) -> None:
    """Wait for uploads whose answers do not matter any more."""
    while under_way:
        with suppress(Exception):
            under_way.popleft()[0]()


def _fitting(batch: Batch) -> int:
    """How many items like these make a message of a good size."""
    size = batch.nbytes or sum(map(_nbytes, batch))
    return max(1, min(_MOST_ITEMS, _CHUNK_BYTES * len(batch) // max(1, size)))


def _nbytes(value: Any) -> int:
    """Roughly what a value takes in a message."""
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(map(_nbytes, value))
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    size = getattr(value, "nbytes", None)
    return size if isinstance(size, int) else 8


class TrainerTunnel(TrainerServer):
    """A learner and an actor that share one process, and one store.

    It is both sides at once: a `TrainerServer` on the in-process transport, and the client's
    methods, answered through it. What the actor inserts into the store that was registered is there
    for the learner at once, so `update` has nothing to do.
    """

    def __init__(
        self,
        config: TrainerConfig | None = None,
        data_callback: Callable[[str, Batch], Any] | None = None,
        request_callback: Callable[[str, Any], Any] | None = None,
    ) -> None:
        within = replace(
            config or TrainerConfig(), port_number=0, broadcast_port=None, transport="inproc"
        )
        super().__init__(within, data_callback, request_callback)
        super().start(threaded=True)
        self._client = TrainerClient("tunnel", "", replace(within, transport=self.url))

    def start(self, threaded: bool = False) -> None:
        """Block until `stop` or Ctrl-C, unless ``threaded``: it serves from the beginning."""
        if not threaded:
            self._block()

    def update(self, timeout: float | None = None) -> int:
        """Nothing to send: both sides have the same store."""
        return 0

    def start_async_update(self, interval: float = 10) -> None:
        """Nothing to send: both sides have the same store."""

    def request(self, type: str, payload: Any = None, timeout: float | None = None) -> Any:
        """See `TrainerClient.request`."""
        return self._client.request(type, payload, timeout)

    def recv_network_callback(self, function: Callable[[Any], None]) -> Subscription:
        """See `TrainerClient.recv_network_callback`."""
        return self._client.recv_network_callback(function)

    def stop(self) -> None:
        """End both sides; quick and idempotent."""
        self._client.stop()
        super().stop()
