"""Which numbers a store's items have: what makes an item known for ever, to whoever receives it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Numbering"]

_LONGEST = 64  # entries of a lineage
_BITS = 62
_ALL = 1 << 62  # above all ids


@dataclass(frozen=True, slots=True)
class Numbering:
    """The identity of a store's ids: an item is known by its numbering and its id in it.

    A store that was loaded from a file, reopened, or forked may get other items from there on than
    the one that was saved, under the same ids. So it goes on with a numbering of its own, that
    shares with the one before it the items up to there: a *branch*.

    Attributes:
        id: a random number of 62 bits, by which it is known.
        lineage: the numberings that it branched off, the oldest first: the id of each, and the
            newest item's that the two share.
    """

    id: int = field(default_factory=lambda: secrets.randbits(_BITS))
    lineage: tuple[tuple[int, int], ...] = ()

    def branch(self, at: int) -> Numbering:
        """Return a new numbering, whose items up to the id ``at`` are this one's."""
        shared: dict[int, int] = {}  # the numbering by how much of it is shared
        for known, newest in (*self.lineage, (self.id, at)):
            # Of those that share as much, the oldest will do: whoever has items of a later one
            # knows by its lineage that they are the oldest one's as well.
            shared.setdefault(min(newest, at), known)
        shared.pop(0, None)
        lineage = tuple((known, newest) for newest, known in shared.items())
        return Numbering(lineage=lineage[-_LONGEST:])

    def shared(self, other: Numbering) -> int:
        """Return the id up to which another numbering's items are this one's."""
        newest = {**dict(other.lineage), other.id: _ALL}
        mine = (*self.lineage, (self.id, _ALL))
        return max((min(at, newest[known]) for known, at in mine if known in newest), default=0)

    def to_list(self) -> list[tuple[int, int]]:
        """Return plain values for `from_list`."""
        return [*self.lineage, (self.id, 0)]

    @classmethod
    def from_list(cls, entries: Iterable[Iterable[int]]) -> Numbering:
        """Make the numbering of which `to_list` gave this, whoever says so.

        Raises:
            TypeError, ValueError: it is none.
        """
        *lineage, (known, _) = [(known, at) for known, at in entries]
        for entry in (*lineage, (known, 0)):
            if any(type(n) is not int or not 0 <= n < 1 << 63 for n in entry):
                raise ValueError("a numbering has random numbers and ids")
        if len(lineage) > _LONGEST:
            raise ValueError(f"a numbering has branched off {_LONGEST} others at most")
        return cls(known, tuple(lineage))
