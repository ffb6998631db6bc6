"""The rule by which every item arrives once; see the package. It stores and sends nothing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from edgeml.core.errors import PermissionDenied

__all__ = ["Ledger", "Verdict"]

_SHUT_OUT = 256  # incarnations of one client id that are remembered


@dataclass(slots=True)
class _Mark:
    incarnation: int
    number: int
    shut_out: deque[int] = field(default_factory=lambda: deque(maxlen=_SHUT_OUT))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of an upload.

    Attributes:
        mark: the number of the newest item that there is, once those that are new are inserted.
        repeated: how many of its items are there already, from the first on; the others are new.
        lost: how many items between those and the new ones the client has lost for good.
        gap: whether items before it are missing, so that none of it may be inserted.
    """

    mark: int
    repeated: int = 0
    lost: int = 0
    gap: bool = False


class Ledger:
    """How far each client's uploads to each store have come.

    Numbers of items count from 1 in each store of a client. Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], _Mark] = {}
        self._restored = False

    def accept(
        self,
        client: str,
        incarnation: int,
        store: str,
        *,
        acknowledged: int,
        after: int,
        first: int,
        count: int,
    ) -> Verdict:
        """Say what of an upload is new; call `advance` with the mark once that is inserted.

        Args:
            client: who sends it.
            incarnation: of the client; one that is seen for the first time shuts out the one
                before it.
            store: the store that it is for.
            acknowledged: the newest mark that the client was told; 0 for none.
            after: the number of the item that was sent before it.
            first: the number of its first item, above ``after``; those between are lost.
            count: how many items it has.

        Raises:
            PermissionDenied: the incarnation has been shut out.
        """
        # Of a client that isn't known, what was acknowledged counts: of several uploads that
        # are under way, a later one may be the first to come. But a checkpoint that doesn't
        # know it has nothing of it, and all that it still holds is to come again.
        start = 0 if self._restored else acknowledged
        mark = self._marks.setdefault((client, store), _Mark(incarnation, start))
        if incarnation in mark.shut_out:
            raise PermissionDenied(f"a newer client calls itself {client!r}; give each its own id")
        if incarnation != mark.incarnation:
            mark.shut_out.append(mark.incarnation)
            mark.incarnation, mark.number = incarnation, start
        if after > mark.number:
            return Verdict(mark.number, gap=True)  # the client goes on from there
        repeated = min(count, max(0, mark.number + 1 - first))
        if repeated == count:
            return Verdict(mark.number, repeated)
        return Verdict(first + count - 1, repeated, max(0, first - mark.number - 1))

    def advance(self, client: str, store: str, mark: int) -> None:
        """Note that the items of an accepted upload are in the store, up to the number ``mark``."""
        self._marks[client, store].number = mark

    def state(self) -> list[Any]:
        """Return all marks, as plain values, for `restore`."""
        return [
            [client, store, mark.incarnation, mark.number, list(mark.shut_out)]
            for (client, store), mark in self._marks.items()
        ]

    @classmethod
    def restore(cls, state: Any) -> Ledger:
        """Make a ledger that goes on from what `state` gave.

        Clients that it doesn't know are taken to have nothing in the stores.

        Raises:
            TypeError, ValueError: nothing that `state` could have given.
        """
        ledger = cls()
        for client, store, incarnation, number, shut_out in state:
            mark = _Mark(incarnation, number)
            mark.shut_out.extend(shut_out)
            ledger._marks[client, store] = mark
        ledger._restored = True
        return ledger
