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
from edgeml.services.functions import Callback
from edgeml.services.trainer.ledger import Ledger
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
        self._callback = None if callback is None else Callback("data_callback", callback, 2)
        self._refusals = Refusals()
        self._ledger = Ledger()
        self._lock = threading.Lock()
        # Of each store, who uploaded last, the number of that client's next item, and the store's
        # newest id after it, as others may insert too.
        self._last: dict[str, tuple[str, int, int, int]] = {}

    def store(self, name: str) -> DataStoreBase:
        """Return the store of a name; raises UnknownInterface, which lists those known."""
        try:
            return self.stores[name]
        except KeyError:
            known = ", ".join(self.stores) or "none"
            raise UnknownInterface(f"there is no store {name!r}; known: {known}") from None

    def state(self) -> Any:
        """Return the ledger's state; call it under the stores' locks."""
        return self._ledger.state()

    def resume(self, ledger: Ledger) -> None:
        """Go on from what a ledger of before knows, which must fit the stores."""
        self._ledger, self._last = ledger, {}

    def update(self, call: Call) -> None:
        """Insert what is new of an upload, and answer it.

        The answer is the mark; a dict of ``mark`` and ``refused``, the ledger's runs, where the
        upload lets items be left out and some above what it acknowledges were.
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
        if not 0 <= acknowledged <= after < batch.first_id:
            raise Malformed(
                f"a batch from {batch.first_id} on cannot come after {after}, or {acknowledged}"
            )
        skip_refused = payload.get("skip_refused") is True
        store, client, identity = self.store(name), caller.client_id, caller.identity
        inserted: list[Batch] = []
        failure: Exception | None = None
        # The store's own lock, too, so that a checkpoint finds items and marks at the same point.
        # It alone won't do, since a store that waits for room lets go of it.
        with self._lock, store.lock:
            verdict = self._ledger.accept(
                client,
                incarnation,
                name,
                identity=identity,
                acknowledged=acknowledged,
                after=after,
                first=batch.first_id,
                count=len(batch),
            )
            self.counts["items_repeated"] += verdict.repeated
            new = batch[len(batch) if verdict.gap else verdict.repeated :]
            if len(new):
                self.counts["items_lost_by_clients"] += verdict.lost
                sender = (client, incarnation)
                if self._last.get(name) != (*sender, new.first_id, store.latest_data_id()):
                    store.interrupt()
                if store.learns:
                    _log.info(_LEARNT, name, caller)
                try:
                    for part in self._insert(name, caller, new, skip_refused):
                        inserted.append(part)
                        following = part.first_id + len(part)
                        self._last[name] = (*sender, following, store.latest_data_id())
                except Exception as error:  # some may be in, of which the callback is told first
                    failure = error
            refused = list(map(list, self._ledger.refused(client, name))) if skip_refused else []
        if self._callback is not None:
            for part in inserted:
                self._callback(call, name, name, part)
        if failure is not None:
            raise failure
        call.answer({"mark": verdict.mark, "refused": refused} if refused else verdict.mark)

    def _insert(
        self, name: str, caller: Caller, batch: Batch, skip_refused: bool
    ) -> Iterator[Batch]:
        """Insert a batch, and where the store refuses that, by halves all that it doesn't refuse.

        Yields:
            What is in, in order.
        """
        store, parts, client = self.stores[name], [batch], caller.client_id
        while parts:
            part = parts.pop()
            before = store.latest_data_id()
            error: Exception | None = None
            done = part
            try:
                store.batch_insert(part)
            except Exception as raised:
                error = raised
                # A user's store that inserts one by one has some of them although it raises. Ours
                # has none, and may have let others insert while it waited for room.
                some = 0 if isinstance(error, EdgemlError) else store.latest_data_id() - before
                done = part[:some]
            if len(done):
                self.counts["items"] += len(done)
                if caller.identity is not None:
                    self.counts[f"items_of_{caller.identity}"] += len(done)
                self._ledger.advance(client, name, done.first_id + len(done) - 1)
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
            store.interrupt()  # what comes next doesn't follow upon what came before
            self.counts["items_refused"] += 1
            self._ledger.refuse(client, name, item, why)
            key = "" if caller.identity is None else f", with the key of {caller.identity}"
            self._refusals.add(name, item, 1, f"{why} (from {client!r}{key})")
