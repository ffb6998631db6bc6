"""What the learner does with uploads."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from edgeml.core.dispatch import Call, Caller
from edgeml.core.errors import EdgemlError, Malformed, UnknownInterface
from edgeml.data import Batch, DataStoreBase
from edgeml.data.numbering import Numbering
from edgeml.services.functions import Callback
from edgeml.services.trainer.account import ServerAccount
from edgeml.services.trainer.ledger import Ledger, Upload
from edgeml.services.trainer.refusals import Refusals, reason

__all__ = ["Intake"]

_log = logging.getLogger(__name__)

_LEARNT = (
    "store %r was given no example=, so the first item that fits any, of %s, says what all items "
    "must be like"
)

# What a store raises about an item; all else is about the store, and the items are to come again.
_UNFIT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)


class Intake:
    """Puts uploads into stores, each item once.

    Args:
        callback: is given the name of a store and what was inserted into it, and a `Context` where
            it takes one.

    Attributes:
        stores: by the names that clients give.
        counts: of items, by what became of them.
    """

    def __init__(self, callback: Callable[..., Any] | None) -> None:
        self.stores: dict[str, DataStoreBase] = {}
        self.counts: Counter[str] = Counter()
        self._accounts: dict[str, ServerAccount] = {}
        self._loaded: set[str] = (
            set()
        )  # names of stores in a checkpoint that were not filled from it
        self._callback = None if callback is None else Callback("data_callback", callback, 2)
        self._refusals = Refusals()
        self._ledger = Ledger()
        self._lock = threading.Lock()

    def store(self, name: str) -> DataStoreBase:
        """Return the store of a name; raises UnknownInterface, which lists those known."""
        try:
            return self.stores[name]
        except KeyError:
            known = ", ".join(self.stores) or "none"
            raise UnknownInterface(f"there is no store {name!r}; known: {known}") from None

    def register(self, name: str, store: DataStoreBase) -> None:
        """See `TrainerServer.register_data_store`."""
        if name in self.stores:
            raise ValueError(f"there is a store {name!r} already")
        if name in self._loaded:
            raise ValueError(
                f"the checkpoint that was loaded has a store {name!r}, which was not filled: "
                "register all stores before load_checkpoint"
            )
        self._accounts[name] = ServerAccount()
        self.stores[name] = store

    def state(self) -> Any:
        """Return what `saved` and `Ledger.restore` need; call it under the stores' locks."""
        applied = {name: account.applied for name, account in self._accounts.items()}
        return self._ledger.state(), applied

    # Whoever saves doesn't wait for an upload, which may wait for room in a store, or for the very
    # learner that saves to take samples.

    def expect(self) -> None:
        """Note that marks will be saved: until then, nothing is durable."""
        self._ledger.saves = True

    def saved(self, state: Any) -> None:
        """Note that what `state` gave is in a file, and the stores' items of then."""
        marks, applied = state
        self._ledger.saved(marks)
        for name, n in applied.items():
            self._accounts[name].durable = max(self._accounts[name].durable, n)

    def resume(self, ledger: Ledger) -> None:
        """Go on from what a ledger of before knows, as far as it fits the stores."""
        with self._lock:
            self._loaded = ledger.keep(self.stores)
            self._ledger = ledger

    def stats(self) -> dict[str, Any]:
        """Return all counts."""
        stores = {name: account.count() for name, account in list(self._accounts.items())}
        return {**self.counts, "stores": stores}

    def update(self, call: Call) -> None:
        """Insert what is new of an upload, and answer it.

        The answer is a dict of the ``mark``, the ``durable`` one (None where nothing is saved), the
        ledger's ``epoch``, and ``refused``, its runs, where the upload lets items be left out and
        some above what it acknowledges were.
        """
        payload, caller = call.payload(), call.caller
        match payload:
            case {
                "store": str(name),
                "incarnation": int(incarnation),
                "acknowledged": int(acknowledged),
                "after": int(after),
            }:
                call.detail = repr(name)
                caller.require("upload", name)
                batch = Batch.from_payload(payload.get("batch"))
            case _:
                raise Malformed("update takes a store, an incarnation, two numbers and a batch")
        numbering, epoch = _read_numbering(payload, incarnation), payload.get("epoch")
        if not (epoch is None or type(epoch) is int):
            raise Malformed("an upload's epoch is a number")
        if not 0 <= acknowledged <= after < batch.first_id:
            raise Malformed(
                f"a batch from {batch.first_id} on cannot come after {after}, or {acknowledged}"
            )
        skip_refused = payload.get("skip_refused") is True
        store, client = self.store(name), caller.client_id
        upload = Upload(
            name,
            client,
            incarnation,
            caller.identity,
            numbering,
            epoch,
            acknowledged,
            after,
            batch.first_id,
            len(batch),
        )
        inserted: list[Batch] = []
        failure: Exception | None = None
        # The store's own lock, too, so that a checkpoint finds items and marks at the same point.
        # It alone won't do, since a store that waits for room lets go of it.
        with self._lock, store.lock:
            account = self._accounts[name]
            verdict = self._ledger.accept(upload)
            self.counts["items_repeated"] += verdict.repeated
            account.repeated += verdict.repeated
            new = batch[len(batch) if verdict.gap else verdict.repeated :]
            if len(new):
                self.counts["items_lost_by_clients"] += verdict.lost
                account.dropped += verdict.lost
                if verdict.lost:
                    store.interrupt_from(numbering.id)
                if store.learns:
                    _log.info(_LEARNT, name, caller)
                try:
                    inserted.extend(self._insert(upload, caller, new, skip_refused))
                except Exception as error:  # some may be in, of which the callback is told first
                    failure = error
            answer = {
                "mark": verdict.mark,
                "durable": self._ledger.durable(upload),
                "epoch": self._ledger.epoch,
                "refused": [*map(list, self._ledger.refused(upload))] if skip_refused else [],
            }
        if self._callback is not None:
            for part in inserted:
                self._callback(call, name, name, part)
        if failure is not None:
            raise failure
        call.answer(answer)

    def _insert(
        self, upload: Upload, caller: Caller, batch: Batch, skip_refused: bool
    ) -> Iterator[Batch]:
        """Insert a batch, and where the store refuses that, by halves all that it doesn't refuse.

        Yields:
            What is in, in order.
        """
        name, parts = upload.store, [batch]
        store, account = self.stores[name], self._accounts[name]
        # An item follows upon the one before in its own store, whichever client sends them.
        source = upload.numbering.id
        while parts:
            part = parts.pop()
            before = store.latest_data_id()
            error: Exception | None = None
            done = part
            try:
                store.insert_from(source, part)
            except Exception as raised:
                error = raised
                # A user's store that inserts one by one has some of them although it raises. Ours
                # has none, and may have let others insert while it waited for room.
                some = 0 if isinstance(error, EdgemlError) else store.latest_data_id() - before
                done = part[:some]
            if len(done):
                self.counts["items"] += len(done)
                account.applied += len(done)
                if caller.identity is not None:
                    self.counts[f"items_of_{caller.identity}"] += len(done)
                self._ledger.advance(upload, done.first_id + len(done) - 1)
                yield done
            if error is None or len(done) == len(part):
                continue
            if not isinstance(error, _UNFIT):
                raise error
            rest = part[len(done) :]
            if len(rest) > 1:
                half = len(rest) // 2
                parts += [rest[half:], rest[:half]]
                continue
            item, why = rest.first_id, reason(error)
            if not skip_refused:
                raise ValueError(f"store {name!r}, item {item}: {why}") from error
            store.interrupt_from(source)  # what comes next doesn't follow upon what came before
            self.counts["items_refused"] += 1
            account.refuse(why)
            self._ledger.refuse(upload, item, why)
            key = "" if caller.identity is None else f", with the key of {caller.identity}"
            self._refusals.add(name, item, 1, f"{why} (from {upload.client!r}{key})")


def _read_numbering(payload: dict[str, Any], incarnation: int) -> Numbering:
    """An upload's numbering; clients of before this was told numbered anew in each incarnation."""
    try:
        return Numbering.from_list(payload.get("numbering", [(incarnation, 0)]))
    except (TypeError, ValueError) as error:
        raise Malformed(f"an upload's numbering is none: {error}") from None
