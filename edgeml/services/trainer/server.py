"""The learner's side."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgeml.core.dispatch import Call, Handler
from edgeml.core.errors import Malformed, PermissionDenied, UnknownInterface
from edgeml.data import DataStoreBase, checkpoint
from edgeml.data.checkpoint import Report
from edgeml.services.base import ServerSettings, ServiceServer
from edgeml.services.functions import Callback
from edgeml.services.trainer.config import NETWORK, TrainerConfig
from edgeml.services.trainer.intake import Intake
from edgeml.services.trainer.ledger import Ledger
from edgeml.services.trainer.sampling import SAMPLE, UPDATE_PRIORITIES, Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TrainerServer"]


class TrainerServer(ServiceServer):
    """A learner's side: collects the actors' data and publishes weights to them.

    An item that its store refuses by a ValueError, TypeError, LookupError, ArithmeticError,
    AttributeError or AssertionError is left out, of which its actor and the log are told; the
    others are taken. Whatever else a store raises (no room, a full disk) fails the upload, which
    comes again.

    Args:
        config: see `TrainerConfig`.
        data_callback: ``data_callback(store_name, batch)``, called after a batch was inserted,
            with a `Batch` of what is new; where items were left out, with those between them.
        request_callback: ``request_callback(type, payload)``; what it returns is the answer. With
            one more argument, or one called ``context``, each of the two callbacks is told whose
            data or request it is: see `Context`.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        transport: in place of the configuration's.
        settings: ``url``, ``workers``, ``codecs``, ``images``, ``wants_images``, ``rate_limit`` in
            place of the configuration's, ``advertise``, ``credentials``, ``limits``,
            ``on_connect``, ``on_disconnect``: see `ServiceServer`.

    Raises:
        TypeError: a callback that is an ``async def``.
    """

    def __init__(
        self,
        config: TrainerConfig,
        data_callback: Callable[..., Any] | None = None,
        request_callback: Callable[..., Any] | None = None,
        host: str | None = None,
        *,
        transport: str | None = None,
        **settings: Unpack[ServerSettings],
    ) -> None:
        self.config = config
        self._intake = Intake(data_callback)
        requests = _answer_requests(config, request_callback)
        settings.setdefault("rate_limit", config.rate_limit)
        super().__init__("trainer", config, host=host, transport=transport, **settings)
        self._server.register("update", self._intake.update)
        self._server.register("request", requests)
        self._topic = self._server.topic(NETWORK, needs="subscribe")
        self._sampling: Sampling | None = None

    def register_data_store(self, name: str, store: DataStoreBase) -> None:
        """Put what clients of this name upload into ``store``.

        Give a `ReplayBuffer` an ``example``, or the first item of the first client says what all
        must be like.

        Raises:
            ValueError: the name is taken, or a checkpoint was loaded that has such a store, which
                is filled only where it was registered before.
        """
        self._intake.register(name, store)

    def data_store(self, name: str) -> DataStoreBase:
        """Return the store of a name; raises UnknownInterface, which lists those known."""
        return self._intake.store(name)

    def store_names(self) -> list[str]:
        """Return the names of the registered stores."""
        return list(self._intake.stores)

    def serve_samples(self) -> None:
        """Answer learners elsewhere, which draw batches from these stores: see `ShardedLearner`.

        Where keys are asked for, theirs need the permission ``call`` for ``sample``, and for
        ``update_priorities``. Call it before `start`.
        """
        self._sampling = sampling = Sampling(self._intake.store, self._server.allocate)
        self._server.register(SAMPLE, sampling.sample, needs="call")
        self._server.register(UPDATE_PRIORITIES, sampling.update_priorities, needs="call")

    def save_checkpoint(
        self, path: str | os.PathLike[str], values: Any | Callable[[], Any] = None
    ) -> Report:
        """Save all registered stores, and values of your own, to one file.

        Also how far each client's uploads have come: after `load_checkpoint` nothing is inserted
        twice, and a client that still holds what the file lacks sends that again. Once the file is
        there, clients are told that what is in it is durable, and queues let go of that. Uploads
        and calls go on meanwhile. See `edgeml.data.checkpoint.save`, which has the promises.

        Args:
            path: of the file, which is replaced as a whole.
            values: what a codec carries, such as weights and counters; or a function that returns
                it, called at the very moment that the stores are saved as of.

        Raises:
            NotEncodable: a value that the codec doesn't carry.
            OSError: what the system says.
        """

        state: Any = None

        def all_values() -> Any:
            nonlocal state
            given = values() if callable(values) else values
            state = self._intake.state()
            return {"values": given, "marks": state[0]}

        self._intake.expect()
        report = checkpoint.save(path, all_values, self._intake.stores)
        self._intake.saved(state)
        return report

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Any:
        """Fill all registered stores from what `save_checkpoint` wrote, and return the values.

        Call it before `start`, also where there may be no file yet: a learner that asks for one is
        one that saves, and clients hold what they have until it does.

        Raises:
            FileNotFoundError: there is none.
            Malformed, ConfigMismatch, ValueError: see `edgeml.data.checkpoint.load`.
        """
        self._intake.expect()
        ledger = Ledger()

        def check(saved: Any) -> None:
            nonlocal ledger
            try:
                ledger = Ledger.restore(saved["marks"])
                saved["values"]
            except (LookupError, PermissionDenied, TypeError, ValueError):
                raise Malformed(
                    f"{os.fspath(path)} is no checkpoint of a TrainerServer: "
                    "load it with edgeml.data.checkpoint.load"
                ) from None

        saved = checkpoint.load(path, self._intake.stores, check=check)
        self._intake.resume(ledger)
        for client_id, identity in ledger.owners():
            self._server.claim(client_id, identity)
        return saved["values"]

    def stats(self) -> dict[str, Any]:
        """Counts since the start: calls, and everything refused or dropped, by reason.

        Among them ``items`` that were inserted, ``items_refused`` by their stores,
        ``items_repeated``, which were there already, and ``items_lost_by_clients``, which a client
        overwrote before they were sent, or can't send; and ``items_of_NAME`` for each key.
        ``stores`` has of each store, by name: ``accepted``, which is always the sum of ``applied``,
        ``refused`` (a dict: reasons and counts) and ``repeated``; of those applied, how many are
        ``durable``, in a checkpoint; and ``dropped``, which clients don't hold any more. Where it
        serves samples, ``items_sampled`` by learners elsewhere, and ``priorities_stale`` of theirs
        that were of items which are not held.
        """
        sampled = {} if self._sampling is None else dict(self._sampling.counts)
        return {**super().stats(), **sampled, **self._intake.stats()}

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


def _answer_requests(config: TrainerConfig, function: Callable[..., Any] | None) -> Handler:
    """Return the handler of requests; it must not keep the server itself."""
    callback = None if function is None else Callback("request_callback", function, 2)

    def answer(call: Call) -> None:
        match call.payload():
            case [str(kind), argument]:
                call.detail = repr(kind)
            case _:
                raise Malformed("request takes a type and a payload")
        call.caller.require("call", kind)
        if kind not in config.request_types:
            known = ", ".join(config.request_types) or "none"
            raise UnknownInterface(f"there is no request type {kind!r}; known: {known}")
        if callback is None:
            raise UnknownInterface("this server answers no requests")
        call.answer(callback(call, kind, kind, argument))

    return answer
