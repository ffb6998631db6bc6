"""The rule by which every item arrives once; see the package. It stores and sends nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgeml.core.errors import PermissionDenied, shown

__all__ = ["Ledger", "Run", "Verdict"]

_SHUT_OUT = 256  # incarnations of one client id that are remembered
_REFUSED = 4096  # runs of refused items of one client that are remembered until it knows of them
_MOST_REFUSED = 1 << 16  # ... of all clients
_MOST_CLIENTS = 1 << 14  # ids of one key that are remembered, or of all where nobody has one


Run = tuple[int, int, str]
"""Consecutive items that were refused for one reason: the first one's number, how many, and why."""


@dataclass(slots=True)
class _Mark:
    incarnation: int
    number: int
    shut_out: list[int] = field(default_factory=list)
    refused: list[Run] = field(default_factory=list)


@dataclass(slots=True)
class _Client:
    owner: str | None  # whose key it belongs to; None where no key was asked for
    marks: dict[str, _Mark] = field(default_factory=dict)  # of each store


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

    Numbers of items count from 1 in each store of a client. A client's id belongs to the key with
    which it was first used: nobody else may upload in its name, or shut it out. Of the ids of one
    key, those used last are remembered. Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._of: dict[str | None, OrderedDict[str, None]] = {}  # ids of each key, in order of use
        self._refused = 0  # runs, of all
        self._restored = False

    def accept(
        self,
        client: str,
        incarnation: int,
        store: str,
        *,
        identity: str | None = None,
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
            identity: the name of the key that the client has shown; None where none is asked for.
            acknowledged: the newest mark that the client was told; 0 for none.
            after: the number of the item that was sent before it.
            first: the number of its first item, above ``after``; those between are lost.
            count: how many items it has.

        Raises:
            PermissionDenied: the incarnation has been shut out, or the id is that of another key.
        """
        known = self._claim(client, identity)
        # Of a client that isn't known, what was acknowledged counts: of several uploads that
        # are under way, a later one may be the first to come. But a checkpoint that doesn't
        # know it has nothing of it, and all that it still holds is to come again.
        start = 0 if self._restored else acknowledged
        mark = known.marks.setdefault(store, _Mark(incarnation, start))
        if incarnation in mark.shut_out:
            raise PermissionDenied(f"a newer client calls itself {client!r}; give each its own id")
        if incarnation != mark.incarnation:
            mark.shut_out.append(mark.incarnation)
            del mark.shut_out[:-_SHUT_OUT]
            mark.incarnation, mark.number = incarnation, start
            self._forget(mark, len(mark.refused))
        told = 0
        while told < len(mark.refused) and _last(mark.refused[told]) <= acknowledged:
            told += 1
        self._forget(mark, told)
        if after > mark.number:
            return Verdict(mark.number, gap=True)  # the client goes on from there
        repeated = min(count, max(0, mark.number + 1 - first))
        if repeated == count:
            return Verdict(mark.number, repeated)
        return Verdict(first + count - 1, repeated, max(0, first - mark.number - 1))

    def _claim(self, client: str, identity: str | None) -> _Client:
        """Return what is known of a client, whose id is from now on that of this key."""
        known = self._clients.get(client)
        if known is None:
            self._clients[client] = known = _Client(identity)
        elif identity is not None and known.owner != identity:
            if known.owner is not None:
                raise PermissionDenied(
                    f"the client id {client!r} belongs to another key than that of {identity!r}: "
                    "choose another client_id"
                )
            del self._of[None][client]  # from when no keys were asked for
            known.owner = identity
        ids = self._of.setdefault(known.owner, OrderedDict())
        ids[client] = None
        ids.move_to_end(client)
        if len(ids) > _MOST_CLIENTS:
            for mark in self._clients.pop(ids.popitem(last=False)[0]).marks.values():
                self._forget(mark, len(mark.refused))
            # Who isn't known any more may have items here: better go on from what it was told.
            self._restored = False
        return known

    def _forget(self, mark: _Mark, n: int) -> None:
        """Forget the first of the runs that were refused."""
        if n:
            del mark.refused[:n]
            self._refused -= n

    def advance(self, client: str, store: str, number: int) -> None:
        """Note that the items of an accepted upload are in the store, up to this number."""
        self._clients[client].marks[store].number = number

    def refuse(self, client: str, store: str, number: int, why: str) -> None:
        """Note that the next item of an accepted upload is left out, for good."""
        mark = self._clients[client].marks[store]
        mark.number = number
        refused = mark.refused
        if refused and _last(refused[-1]) + 1 == number and refused[-1][2] == why:
            first, n, _ = refused[-1]
            refused[-1] = first, n + 1, why
            return
        if len(refused) >= _REFUSED or self._refused >= _MOST_REFUSED:
            self._forget(mark, min(1, len(refused)))
        if self._refused < _MOST_REFUSED:
            refused.append((number, 1, why))
            self._refused += 1

    def refused(self, client: str, store: str) -> list[Run]:
        """Return what was left out above the mark that the client was told."""
        return list(self._clients[client].marks[store].refused)

    def owners(self) -> Iterator[tuple[str, str]]:
        """Give each client id that belongs to a key, and the name of that."""
        for client, known in self._clients.items():
            if known.owner is not None:
                yield client, known.owner

    def state(self) -> list[Any]:
        """Return all marks, as plain values, for `restore`; what was refused is not among it."""
        return [
            [client, store, mark.incarnation, mark.number, list(mark.shut_out)]
            + ([] if known.owner is None else [known.owner])
            for client, known in self._clients.items()
            for store, mark in known.marks.items()
        ]

    @classmethod
    def restore(cls, state: Any) -> Ledger:
        """Make a ledger that goes on from what `state` gave.

        Clients that it doesn't know are taken to have nothing in the stores.

        Raises:
            TypeError, ValueError: nothing that `state` could have given.
        """
        ledger = cls()
        for each in state:
            client, store, incarnation, number, shut_out, *owner = each
            if not (
                type(client) is type(store) is str
                and _are_numbers([incarnation, number])
                and isinstance(shut_out, list)
                and _are_numbers(shut_out)
                and len(shut_out) <= _SHUT_OUT
                and (not owner or (len(owner) == 1 and type(owner[0]) is str))
            ):
                raise ValueError(f"no client's mark: {shown(each)}")
            known = ledger._clients.get(client)
            if known is None:
                known = ledger._claim(client, owner[0] if owner else None)
            if store in known.marks or owner != ([] if known.owner is None else [known.owner]):
                raise ValueError(f"a client's mark that contradicts another: {shown(each)}")
            known.marks[store] = _Mark(incarnation, number, list(shut_out))
        ledger._restored = True
        return ledger


def _last(run: Run) -> int:
    return run[0] + run[1] - 1


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 64 for value in values)
