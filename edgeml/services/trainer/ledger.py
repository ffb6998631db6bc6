"""The rule by which every item arrives once; see the package. It stores and sends nothing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from edgeml.core.errors import PermissionDenied

__all__ = ["Ledger", "Run", "Verdict"]

_SHUT_OUT = 256  # incarnations of one client id that are remembered
_REFUSED = 4096  # runs of refused items of one client that are remembered until it knows of them


Run = tuple[int, int, str]
"""Consecutive items that were refused for one reason: the first one's number, how many, and why."""


@dataclass(slots=True)
class _Mark:
    incarnation: int
    number: int
    shut_out: deque[int] = field(default_factory=lambda: deque(maxlen=_SHUT_OUT))
    refused: deque[Run] = field(default_factory=lambda: deque(maxlen=_REFUSED))


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
            mark.refused.clear()
        while mark.refused and mark.refused[0][0] + mark.refused[0][1] - 1 <= acknowledged:
            mark.refused.popleft()
        if after > mark.number:
            return Verdict(mark.number, gap=True)  # the client goes on from there
        repeated = min(count, max(0, mark.number + 1 - first))
        if repeated == count:
            return Verdict(mark.number, repeated)
        return Verdict(first + count - 1, repeated, max(0, first - mark.number - 1))

    def advance(self, client: str, store: str, number: int) -> None:
        """Note that the items of an accepted upload are in the store, up to this number."""
        self._marks[client, store].number = number

    def refuse(self, client: str, store: str, number: int, why: str) -> None:
        """Note that the next item of an accepted upload is left out, for good."""
        mark = self._marks[client, store]
        mark.number = number
        refused = mark.refused
        if refused and refused[-1][0] + refused[-1][1] == number and refused[-1][2] == why:
            first, n, _ = refused.pop()
            refused.append((first, n + 1, why))
        else:
            refused.append((number, 1, why))

    def refused(self, client: str, store: str) -> list[Run]:
        """Return what was left out above the mark that the client was told."""
        return list(self._marks[client, store].refused)

    def state(self) -> list[Any]:
        """Return all marks, as plain values, for `restore`; what was refused is not among it."""
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
