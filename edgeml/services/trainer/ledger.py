"""The rule by which every item arrives once; see the package. It stores and sends nothing."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from edgeml.core.errors import PermissionDenied, shown
from edgeml.data.numbering import Numbering

__all__ = ["Ledger", "Run", "Upload", "Verdict"]

_SHUT_OUT = 256  # incarnations of one client id that are remembered
_REFUSED = 4096  # runs of refused items of one mark that are remembered until its client knows
_MOST_REFUSED = 1 << 16  # ... of all
_MOST_CLIENTS = 1 << 14  # ids of one key that are remembered, or of all where nobody has one
_MOST_MARKS = 1 << 15  # ... and numberings


Run = tuple[int, int, str]
"""Consecutive items that were refused for one reason: the first one's number, how many, and why."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client says of items that it sends.

    Attributes:
        store: the learner's name of the store that they are for.
        client: who sends them.
        incarnation: of the client; one that is seen for the first time shuts out the one before.
        identity: the name of the key that the client has shown; None where none is asked for.
        numbering: of the client's store.
        epoch: the ledger's that answered the client last; None for none.
        acknowledged: the newest mark that the client was told; 0 for none.
        after: the id of the item that was sent before them.
        first: the id of the first one, above ``after``; those between are lost.
        count: how many they are.
    """

    store: str
    client: str
    incarnation: int
    identity: str | None
    numbering: Numbering
    epoch: int | None
    acknowledged: int
    after: int
    first: int
    count: int


@dataclass(slots=True)
class _Mark:
    """How far the items of one numbering have come in one store."""

    number: int
    durable: int = 0
    refused: list[Run] = field(default_factory=list)


@dataclass(slots=True)
class _Client:
    owner: str | None  # whose key it belongs to; None where no key was asked for
    incarnations: dict[str, list[int]] = field(default_factory=dict)  # of each store, newest last


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of an upload.

    Attributes:
        mark: the id of the newest item that there is, once those that are new are inserted.
        repeated: how many of its items are there already, from the first on; the others are new.
        lost: how many items between those and the new ones the client has lost for good.
        gap: whether items before it are missing, so that none of it may be inserted.
    """

    mark: int
    repeated: int = 0
    lost: int = 0
    gap: bool = False


class Ledger:
    """How far what clients upload to each store has come: applied, and durable.

    Items are known by the numbering of the client's store and their ids in it, whichever client
    sends them. A client's id, and a numbering, belongs to the key with which it was first used:
    nobody else may upload in its name, or shut it out. Of those of one key, the ones used last are
    remembered. Not safe to use from several threads, but for `saves` and `saved`.

    Attributes:
        epoch: a random number; what a client was told in another one counts for nothing here.
        saves: whether marks are saved, so that there is something that is durable.
    """

    def __init__(self) -> None:
        self.epoch = secrets.randbits(62)
        self.saves = False
        self._clients: dict[str, _Client] = {}
        self._of: dict[str | None, OrderedDict[str, None]] = {}  # ids of each key, in order of use
        # The marks of each key, by store and numbering, in order of use; and whose each one is.
        self._marks: dict[str | None, OrderedDict[tuple[str, int], _Mark]] = {}
        self._owners: dict[tuple[str, int], str | None] = {}
        self._refused = 0  # runs, of all

    def accept(self, upload: Upload) -> Verdict:
        """Say what of an upload is new; call `advance` with the mark once that is inserted.

        Raises:
            PermissionDenied: the incarnation has been shut out, or the client's id or the
                numbering is that of another key.
        """
        owner = self._admit(upload)
        mark = self._find(upload, owner)
        told = 0
        while told < len(mark.refused) and _last(mark.refused[told]) <= upload.acknowledged:
            told += 1
        self._forget(mark, told)
        first, count = upload.first, upload.count
        if upload.after > mark.number:
            return Verdict(mark.number, gap=True)  # the client goes on from there
        repeated = min(count, max(0, mark.number + 1 - first))
        if repeated == count:
            return Verdict(mark.number, repeated)
        return Verdict(first + count - 1, repeated, max(0, first - mark.number - 1))

    def _admit(self, upload: Upload) -> str | None:
        """Refuse who is shut out, and shut out who was before; returns whose the client is."""
        known = self._claim(upload.client, upload.identity)
        incarnations = known.incarnations.setdefault(upload.store, [])
        if upload.incarnation in incarnations[:-1]:
            raise PermissionDenied(
                f"a newer client calls itself {upload.client!r}; give each its own id"
            )
        if upload.incarnation not in incarnations[-1:]:
            incarnations.append(upload.incarnation)
            del incarnations[: -1 - _SHUT_OUT]
        return known.owner

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
            del self._clients[ids.popitem(last=False)[0]]
        return known

    def _find(self, upload: Upload, owner: str | None) -> _Mark:
        """Return the mark of an upload's items, with what is known of where they branched off."""
        mark = self._mark(upload.store, upload.numbering.id, owner)
        if mark is None:
            # Of a numbering that isn't known, what this ledger acknowledged counts: of several
            # uploads that are under way, a later one may be the first to come, and old marks are
            # forgotten. What another one did is not here, so all that the client still holds is
            # to come again.
            same = upload.epoch == self.epoch
            mark = self._add(upload.store, upload.numbering.id, owner, _Mark(0))
            mark.number = upload.acknowledged if same else 0
        for parent, at in upload.numbering.lineage:
            before = self._get(upload.store, parent)  # whose ever it is
            if before is not None:
                mark.number = max(mark.number, min(before.number, at))
                mark.durable = max(mark.durable, min(before.durable, at))
        return mark

    def _get(self, store: str, numbering: int) -> _Mark | None:
        # In two steps that another thread may come between.
        key = (store, numbering)
        marks = self._marks.get(self._owners.get(key))
        return None if marks is None else marks.get(key)

    def _mark(self, store: str, numbering: int, owner: str | None) -> _Mark | None:
        key = (store, numbering)
        if key not in self._owners:
            return None
        theirs = self._owners[key]
        if theirs != owner:
            if theirs is not None:
                raise PermissionDenied(
                    f"these items of the store {store!r} were first sent with another key: "
                    "send them with that, or from a new store"
                )
            mark = self._marks[None].pop(key)  # from when no keys were asked for
            return self._add(store, numbering, owner, mark)
        self._marks[owner].move_to_end(key)
        return self._marks[owner][key]

    def _add(self, store: str, numbering: int, owner: str | None, mark: _Mark) -> _Mark:
        marks = self._marks.setdefault(owner, OrderedDict())
        marks[store, numbering] = mark
        self._owners[store, numbering] = owner
        if len(marks) > _MOST_MARKS:
            key, oldest = marks.popitem(last=False)
            del self._owners[key]
            self._forget(oldest, len(oldest.refused))
        return mark

    def _known(self, upload: Upload) -> _Mark:
        key = (upload.store, upload.numbering.id)
        return self._marks[self._owners[key]][key]

    def _forget(self, mark: _Mark, n: int) -> None:
        """Forget the first of the runs that were refused."""
        if n:
            del mark.refused[:n]
            self._refused -= n

    def advance(self, upload: Upload, number: int) -> None:
        """Note that the items of an accepted upload are in the store, up to this id."""
        mark = self._known(upload)
        mark.number = max(mark.number, number)
        owner = self._owners[upload.store, upload.numbering.id]
        for parent, at in upload.numbering.lineage:
            # They are items of these too, which another branch may send as well; but nobody
            # says of another key's that they are here.
            before = self._get(upload.store, parent)
            if before is None:
                before = self._add(upload.store, parent, owner, _Mark(0))
            elif self._owners[upload.store, parent] != owner:
                continue
            before.number = max(before.number, min(mark.number, at))

    def refuse(self, upload: Upload, number: int, why: str) -> None:
        """Note that the next item of an accepted upload is left out, for good."""
        self.advance(upload, number)
        mark = self._known(upload)
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

    def refused(self, upload: Upload) -> list[Run]:
        """Return what was left out above the mark that the client was told."""
        return list(self._known(upload).refused)

    def durable(self, upload: Upload) -> int | None:
        """Return the id up to which the items are saved; None where nothing ever is."""
        return self._known(upload).durable if self.saves else None

    def saved(self, state: Any) -> None:
        """Note that what `state` gave is in a file, and what is in the stores with it."""
        self.saves = True
        for store, numbering, number, *_ in state["marks"]:
            mark = self._get(store, numbering)
            if mark is not None:
                mark.durable = max(mark.durable, number)

    def owners(self) -> Iterator[tuple[str, str]]:
        """Give each client id that belongs to a key, and the name of that."""
        for client, known in self._clients.items():
            if known.owner is not None:
                yield client, known.owner

    def state(self) -> Any:
        """Return all that is known, as plain values, for `restore`."""
        return {
            "clients": [
                [client, known.owner, store, list(incarnations)]
                for client, known in self._clients.items()
                for store, incarnations in known.incarnations.items()
            ],
            "marks": [
                [store, numbering, mark.number, owner, [list(run) for run in mark.refused]]
                for owner, marks in self._marks.items()
                for (store, numbering), mark in marks.items()
            ],
        }

    @classmethod
    def restore(cls, state: Any) -> Ledger:
        """Make a ledger that goes on from what `state` gave, all of which is durable.

        Raises:
            LookupError, TypeError, ValueError: nothing that `state` could have given.
        """
        ledger = cls()
        ledger.saves = True
        if isinstance(state, list):
            state = _from_list(state)
        for client, owner, store, incarnations in state["clients"]:
            if not (
                type(client) is type(store) is str
                and _is_owner(owner)
                and isinstance(incarnations, list)
                and _are_numbers(incarnations)
                and len(incarnations) <= 1 + _SHUT_OUT
            ):
                raise ValueError(f"no client's incarnations: {shown([client, store])}")
            known = ledger._clients.get(client)
            if known is None:
                known = ledger._claim(client, owner)
            if store in known.incarnations or owner != known.owner:
                raise ValueError(f"a client that contradicts another: {shown([client, store])}")
            known.incarnations[store] = list(incarnations)
        for store, numbering, number, owner, refused in state["marks"]:
            if not (
                type(store) is str
                and _are_numbers([numbering, number])
                and _is_owner(owner)
                and isinstance(refused, list)
            ):
                raise ValueError(f"no mark: {shown([store, numbering, number])}")
            if (store, numbering) in ledger._owners:
                raise ValueError(f"a mark that contradicts another: {shown([store, numbering])}")
            runs = [_read_run(run, number) for run in refused[-_REFUSED:]]
            ledger._add(store, numbering, owner, _Mark(number, number, runs))
            ledger._refused += len(runs)
        return ledger

    def keep(self, stores: Collection[str]) -> set[str]:
        """Forget the marks of all other stores; returns their names."""
        others = [key for key in self._owners if key[0] not in stores]
        for key in others:
            mark = self._marks[self._owners.pop(key)].pop(key)
            self._forget(mark, len(mark.refused))
        return {store for store, _ in others}


def _from_list(state: list[Any]) -> dict[str, Any]:
    """Read what was saved when items were numbered by incarnations of clients."""
    clients, marks = [], []
    for client, store, incarnation, number, shut_out, *owner in state:
        if not isinstance(shut_out, list):
            raise ValueError(f"no client's mark: {shown(client)}")
        name = owner[0] if owner else None
        clients.append([client, name, store, [*shut_out, incarnation]])
        marks.append([store, incarnation, number, name, []])
    return {"clients": clients, "marks": marks}


def _read_run(run: Any, mark: int) -> Run:
    first, n, why = run
    if not (_are_numbers([first, n]) and 1 <= first <= first + n - 1 <= mark and type(why) is str):
        raise ValueError(f"no refused items: {shown(run)}")
    return first, n, why


def _last(run: Run) -> int:
    return run[0] + run[1] - 1


def _is_owner(value: Any) -> bool:
    return value is None or type(value) is str


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 64 for value in values)
