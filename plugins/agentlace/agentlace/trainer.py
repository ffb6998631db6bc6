"""Training: the learner is the server. Actors send it what they see, and get its weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import edgeml
from agentlace.internal.adapters import Inlet, Outlet, as_sent
from agentlace.internal.ends import ServerBase, answer_or_none
from agentlace.internal.published import COUNT, Counted, news_for
from agentlace.internal.values import LeftOut, unpack

__all__ = ["TrainerClient", "TrainerConfig", "TrainerSMInterface", "TrainerServer"]

_log = logging.getLogger(__name__)

DataCallback = Callable[[str, dict[str, Any]], Any]
RequestCallback = Callable[[str, Any], Any]


@dataclass
class TrainerConfig:
    """What both sides agree on.

    Attributes:
        port_number: where the server listens.
        broadcast_port: a second port that answers just as well; None for none.
        request_types: the names that `TrainerClient.request` may be given; compared.
        rate_limit: requests and updates per second that a client may make; None for any number.
        version: of the two programs' agreement; compared.
        experimental_pipeline_port: has no effect, since uploads are pipelined anyway.
    """

    port_number: int = 5555
    broadcast_port: int | None = 5556
    request_types: list[str] = field(default_factory=list)
    rate_limit: int | None = None
    version: str = "0.0.2"
    experimental_pipeline_port: int | None = None


class _Config(edgeml.TrainerConfig):
    """The same for edgeml, with one request that is nobody's but the shim's."""

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__(
            config.port_number,
            config.broadcast_port,
            [*config.request_types, COUNT],
            version=config.version,
        )

    def shared(self) -> dict[str, Any]:
        shared = super().shared()
        shared["request_types"].remove(COUNT)
        return shared


class TrainerServer(ServerBase):
    """A learner's side: collects what actors send, and publishes weights to them.

    It listens at all addresses of the machine, from `start` on.

    Args:
        config: see `TrainerConfig`.
        data_callback: ``data_callback(store_name, {"data": items, "last_id": id})``, called after
            these items were inserted; the id is the last one's in the actor's store.
        request_callback: ``request_callback(type, payload)``; what it returns is the answer.
        log_level: of the logger ``agentlace``.
    """

    _server: edgeml.TrainerServer

    def __init__(
        self,
        config: TrainerConfig,
        data_callback: DataCallback | None = None,
        request_callback: RequestCallback | None = None,
        log_level: int = logging.INFO,
    ) -> None:
        logging.getLogger("agentlace").setLevel(log_level)
        self.config = config
        self.data_stores: dict[str, Any] = {}
        self._inlets: dict[str, Inlet] = {}
        left_out = LeftOut()
        self._counted = counted = Counted()  # the functions know this, not the server itself

        def tell_of(store_name: str, batch: edgeml.data.Batch) -> None:
            assert data_callback is not None
            last_id = batch.first_id + len(batch) - 2  # an actor counts from 0
            data_callback(store_name, {"data": [*map(unpack, batch)], "last_id": last_id})

        def answer(type: str, payload: Any) -> Any:
            if type == COUNT:
                return counted.count()
            if request_callback is None:
                return {}
            return left_out.keep_rest(request_callback(type, unpack(payload)))

        self._server = edgeml.TrainerServer(
            _Config(config),
            None if data_callback is None else tell_of,
            answer,
            host="0.0.0.0",
        )

    def register_data_store(self, name: str, data_store: Any) -> None:
        """Put what actors send under this name into a store, in place of one that was there."""
        self.data_stores[name] = data_store
        if name in self._inlets:
            self._inlets[name].lead_to(data_store)
        else:
            self._inlets[name] = Inlet(data_store)
            self._server.register_data_store(name, self._inlets[name])

    def data_store(self, name: str) -> Any:
        """Return the store of a name, or None."""
        return self.data_stores.get(name)

    def store_names(self) -> set[str]:
        """Return the names of the registered stores."""
        return set(self.data_stores)

    def publish_network(self, payload: Any) -> None:
        """Send weights to all clients that listen now; they get trees of the same types.

        Raises:
            edgeml.NotEncodable: something in them can't be sent; the text says where it is.
        """
        self._counted.publish(self._server.publish_network, payload)


class _Requests:
    """What agentlace's clients have for their socket; all that is left of it is the timeout."""

    def __init__(self, timeout_ms: float) -> None:
        self.timeout_ms = timeout_ms

    @property
    def timeout(self) -> float:
        """The same in seconds."""
        return self.timeout_ms / 1000

    def reset_socket(self) -> None:
        """Do nothing: a connection that is lost is made anew by itself."""


class TrainerClient:
    """An actor's side: sends what is in its stores, and receives weights.

    What the stores hold already is sent at once.

    Args:
        name: of the learner's store that ``data_store`` is sent to.
        server_ip: where the learner is.
        config: see `TrainerConfig`.
        data_store: what to send.
        data_stores: what to send in place of that, by the names of the learner's stores.
        log_level: of the logger ``agentlace``.
        wait_for_server: wait until a learner answers, for as long as it takes.
        timeout_ms: milliseconds that a request, or each message of an update, may take.

    Raises:
        edgeml.Unreachable: no learner answers.
        edgeml.ConfigMismatch: the learner is configured differently.
    """

    def __init__(
        self,
        name: str,
        server_ip: str,
        config: TrainerConfig,
        data_store: Any = None,
        data_stores: dict[str, Any] | None = None,
        log_level: int = logging.INFO,
        wait_for_server: bool = False,
        timeout_ms: float = 800,
    ) -> None:
        logging.getLogger("agentlace").setLevel(log_level)
        self.client_name = name
        self.server_ip = server_ip
        self.config = config
        self.data_store = data_store
        self.data_stores_map = data_stores or {}
        self._left_out = LeftOut()
        self.req_rep_client = _Requests(timeout_ms)
        self._requested = -math.inf  # when, by time.monotonic
        self._updating = False
        stores = self.data_stores_map if data_store is None else {name: data_store}
        self._outlets = {name: as_sent(store, self._left_out) for name, store in stores.items()}
        self._client = edgeml.TrainerClient(
            name,
            server_ip,
            _Config(config),
            data_stores=dict(self._outlets),
            wait_for_server=math.inf if wait_for_server else False,
            timeout=self.req_rep_client.timeout,
            writable=True,
        )
        self.update()

    def update(self) -> bool:
        """Send what the learner doesn't have yet; whether it has all now.

        What isn't sent, because no answer came in time, goes with a later update.
        """
        if not self._outlets or self._is_too_soon():
            return False
        try:
            # Where nothing is to be sent, too, it is to be known whether it is there, and the same.
            self._client.state(self.req_rep_client.timeout)
            self._client.update(self.req_rep_client.timeout)
        except Exception as error:  # of a user's own store, too
            _log.warning("an update of %r failed, and may be repeated: %s", self.client_name, error)
            return False
        return True

    def update_datastore(self, name: str, from_id: int, confirm_update: bool = False) -> bool:
        """Send what the learner doesn't have yet, whatever id is named; whether it has it now."""
        del from_id, confirm_update
        if name not in self._outlets:
            _log.error("there is no store %r", name)
            return False
        return self.update()

    def get_server_last_update_id(self, name: str) -> int | None:
        """Return the store's id up to which the learner is known to have it; -1 for nothing.

        None if there is no such store, or it is one of edgeml's.
        """
        outlet = self._outlets.get(name)
        return outlet.acknowledged if isinstance(outlet, Outlet) else None

    def request(self, type: str, payload: Any) -> Any:
        """Ask the learner something; returns its answer.

        None where there is none: no such type, no answer in time, a learner's error, which is
        logged, or more requests than the rate limit allows. What of the payload can't be sent is
        left out, and counted in `left_out`.
        """
        if type not in self.config.request_types or self._is_too_soon():
            return None
        return self._ask(type, self._left_out.keep_rest(payload))

    def _ask(self, type: str, payload: Any = None) -> Any:
        timeout = self.req_rep_client.timeout
        return answer_or_none(lambda: self._client.request(type, payload, timeout))

    def _is_too_soon(self) -> bool:
        now, limit = time.monotonic(), self.config.rate_limit
        if limit and now - self._requested < 1 / limit:
            _log.warning("more than %s requests per second; this one is not sent", limit)
            return True
        self._requested = now
        return False

    @property
    def left_out(self) -> int:
        """How many parts of requests and items were left out, since they can't be sent."""
        return self._left_out.count

    def recv_network_callback(
        self, callback: Callable[[Any], None], *, current: bool = False
    ) -> None:
        """Call ``callback`` with the weights that are published from now on.

        It runs in a thread of its own; a slow one skips to the newest.

        Args:
            callback: is given what was published: its types where they are loaded here, JAX's
                arrays as such, others writable.
            current: begin with what was published last.
        """
        known = None if current else self._ask(COUNT)
        self._client.recv_network_callback(news_for(callback, known))

    def start_async_update(self, interval: float = 10) -> None:
        """Send what is new now, every ``interval`` seconds, and at the end; once is enough."""
        if not self._updating:
            self._updating = True
            self._client.update_async()
            self._client.start_async_update(interval)

    def stop(self) -> None:
        """Send what `start_async_update` hasn't yet, and close the connection."""
        self._client.stop()

    def stats(self) -> dict[str, int]:
        """Counts since the start; see `edgeml.TrainerClient.stats`."""
        return {**self._client.stats(), "left_out": self.left_out}


class TrainerSMInterface:
    """A `TrainerServer` and its only client in one: they share the stores, and call each other."""

    def __init__(self) -> None:
        self._on_network: Callable[[Any], None] | None = None
        self._on_request: RequestCallback | None = None

    def recv_network_callback(self, callback_fn: Callable[[Any], None]) -> None:
        """Call a function with what is published from now on, in the publisher's thread."""
        self._on_network = callback_fn

    def publish_network(self, params: Any) -> None:
        """Give weights to the actor."""
        if self._on_network is not None:
            self._on_network(params)

    def register_request_callback(self, callback_fn: RequestCallback) -> None:
        """Have a function answer requests."""
        self._on_request = callback_fn

    def request(self, type: str, payload: Any) -> Any:
        """Return what the learner's function answers; None if there is none."""
        return None if self._on_request is None else self._on_request(type, payload)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as all of these."""

    def stop(self) -> None:
        """Do nothing."""

    def update(self) -> None:
        """Do nothing: what the actor inserts is there."""

    def start_async_update(self, interval: float = 10) -> None:
        """Do nothing."""
