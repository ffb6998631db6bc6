"""What a device has carried out, kept for a while."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

import msgspec

from edgeml.core.errors import Malformed

__all__ = ["Entry", "Executed", "Part", "Record", "read_part", "rows_of"]

_MOST_AT_A_TIME = 200  # that are told in one answer, for which a loop's thread stops


@dataclass(frozen=True)
class Executed:
    """One action that a device has begun, or one call of its safe action.

    Attributes:
        index: counts all of the device's from 1, in the order in which they began.
        key: of the action.
        client_id: who sent it; empty for the safe action, as the next three.
        label: what the client calls itself.
        identity: the name of its key; None where the server asks for none.
        number: which of that client object's of this key it is; 0 where it isn't said.
        policy: the version of what chose it, as the sender says; None where it isn't said.
        observation: the id of the observation that it rests on; None where it isn't said.
        age: seconds by which what it rests on was old, as it was judged when it began; of the safe
            action, seconds since the last action began.
        at: when it began, in seconds of the device's clock, `time.monotonic`.
        took: seconds that it took; 0 while it runs.
        outcome: "done", "failed" if the callback raised, "running", or "halt": the safe action.
    """

    index: int
    key: str
    client_id: str
    label: str
    identity: str | None
    number: int
    policy: str | None
    observation: int | None
    age: float
    at: float
    took: float
    outcome: str


class Entry(msgspec.Struct, gc=False):
    """An action as it is kept, in the fields of `Executed`; the first and the last two change.

    Of ten thousand that live long the garbage collector needs to know nothing.
    """

    key: str
    client_id: str
    label: str
    identity: str | None
    number: int
    policy: str | None
    observation: int | None
    age: float
    at: float
    took: float = 0.0
    outcome: str = "running"
    index: int = 0

    def tell(self) -> Executed:
        """Return it as it is now."""
        return Executed(**msgspec.structs.asdict(self))


class Part(NamedTuple):
    """Some of a record, as it travels to who follows it.

    Attributes:
        started: names this start of the device.
        ended: how many had ended when the last of these did.
        missed: how many were not kept long enough to be told.
        entries: those that have ended since, in that order.
    """

    started: int
    ended: int
    missed: int
    entries: list[Executed]


class Record:
    """The newest actions of a device. Safe to use from any thread.

    Args:
        keep: how many.
    """

    def __init__(self, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"record must be at least 1, not {keep}")
        self._started = time.time_ns()
        self._begun: deque[Entry] = deque(maxlen=keep)
        self._over: deque[Entry] = deque(maxlen=keep)
        self._count = 0  # that began
        self._ended = 0
        self._lock = threading.Lock()

    def begin(self, entry: Entry) -> Entry:
        """Note that an action begins."""
        with self._lock:
            self._count = entry.index = self._count + 1
            self._begun.append(entry)
        return entry

    def begin_halt(self, key: str, age: float, at: float) -> Entry:
        """Note that the safe action of a key begins; it is told at once, since it may hang."""
        entry = self.begin(Entry(key, "", "", None, 0, None, None, age, at))
        self.end(entry, "halt")
        return entry

    def end(self, entry: Entry, outcome: str) -> None:
        """Note what became of an action."""
        entry.took = time.monotonic() - entry.at
        entry.outcome = outcome
        with self._lock:
            self._ended += 1
            self._over.append(entry)

    def end_halt(self, entry: Entry) -> None:
        """Note that a safe action is over."""
        entry.took = time.monotonic() - entry.at

    def since(self, index: int) -> list[Executed]:
        """Return those kept that began after the one of this index, in that order."""
        with self._lock:
            newer = min(max(self._count - index, 0), len(self._begun))
            entries = list(islice(self._begun, len(self._begun) - newer, None))
        return [entry.tell() for entry in entries]

    def part(self, started: int, ended: int) -> Part:
        """Return those that have ended since so many had, of the start of that name."""
        with self._lock:
            if started != self._started or not 0 <= ended <= self._ended:
                ended = 0
            newer = min(self._ended - ended, len(self._over))
            missed = self._ended - ended - newer
            first = len(self._over) - newer
            entries = list(islice(self._over, first, first + _MOST_AT_A_TIME))
        told = [entry.tell() for entry in entries]
        return Part(self._started, ended + missed + len(told), missed, told)


_FIELDS = get_type_hints(Executed)
_Told: Any = tuple[tuple(_FIELDS.values())]  # type: ignore[misc]


_Part: Any = tuple[int, int, int, list[_Told]]


def read_part(answer: Any) -> Part:
    """Return a part of a record as it came.

    Raises:
        Malformed: it is none.
    """
    try:
        started, ended, missed, rows = msgspec.convert(answer, _Part)
    except msgspec.ValidationError as error:
        raise Malformed(f"no record of actions: {error}") from None
    return Part(started, ended, missed, [Executed(*row) for row in rows])


def rows_of(entries: Sequence[Executed]) -> list[list[Any]]:
    """Return actions as they travel."""
    return [[getattr(each, name) for name in _FIELDS] for each in entries]
