"""Items that are alike, taken apart into rows of bytes, as quickly as a control thread needs it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from edgeml.data.segments import Layout
from edgeml.data.tree import leaves_of

__all__ = ["Packer"]

_CODES = dict(zip("?bBhHiIlLqQefd", "?bBhHiIqQqQefd", strict=True))  # struct's, of numpy's dtypes


class Packer:
    """Takes items apart that are like a first one, and gives their rows, quickly.

    Numbers become what the layout has, as a `ReplayBuffer` converts them: those of Python, and
    numpy's scalars and arrays of other floats. Where a value doesn't fit, there is no row.

    Args:
        layout: of the rows.
        item: the first one.

    Raises:
        ValueError: such items need more than that.
    """

    def __init__(self, layout: Layout, item: Any) -> None:
        self.layout = layout
        skeleton = layout.skeleton
        self._get: Callable[[Any], Sequence[Any]] | None = None
        self._length = 0
        if (
            type(item) is dict
            and type(skeleton) is dict
            and len(item) > 1
            and list(skeleton.values()) == [*range(len(item))]
        ):
            self._get, self._length = itemgetter(*skeleton), len(item)
        leaves = leaves_of(skeleton, item)
        self._types = list(map(type, leaves))
        self._arrays: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []
        self._changes: list[tuple[int, Callable[[Any], Any]]] = []
        specs = zip(leaves, layout.dtypes, layout.shapes, strict=True)
        for i, (leaf, dtype, shape) in enumerate(specs):
            kind = type(leaf)
            if kind is np.ndarray:
                self._arrays.append((i, leaf.dtype, shape))
            elif kind not in (bool, int, float) and not issubclass(kind, np.generic):
                raise ValueError(f"{kind.__name__} to {dtype}")
            if kind in (np.ndarray, bool) or kind not in (int, float):
                given = np.asarray(leaf).dtype
                if given == dtype and kind is not bool:
                    continue
            self._changes.append((i, _find_change(kind, np.asarray(leaf).dtype, dtype)))
        if self.pack(item) is None:
            raise ValueError("no buffers")

    def pack(self, item: Any) -> bytes | None:
        """Return the row of an item, or None where it isn't like the first one."""
        leaves: list[Any]
        try:
            if self._get is not None:
                if type(item) is not dict or len(item) != self._length:
                    return None
                leaves = [*self._get(item)]
            else:
                leaves = leaves_of(self.layout.skeleton, item)
            if list(map(type, leaves)) != self._types:
                return None
            for i, dtype, shape in self._arrays:
                leaf = leaves[i]
                if (leaf.dtype is not dtype and leaf.dtype != dtype) or leaf.shape != shape:
                    return None
            for i, change in self._changes:
                leaves[i] = change(leaves[i])
            return b"".join(leaves)
        except (ArithmeticError, BufferError, KeyError, TypeError, ValueError, struct.error):
            return None  # of another structure, not contiguous, beyond what fits


def _find_change(kind: type, given: np.dtype[Any], dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """What makes bytes of a leaf whose dtype isn't the layout's."""
    if kind is np.ndarray:
        if given.kind not in "fiu" or dtype.kind != "f":
            raise ValueError(f"{given} to {dtype}")
        return lambda leaf: leaf.astype(dtype)
    allowed = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
    if dtype.char not in _CODES or given.kind not in allowed[dtype.kind]:
        raise ValueError(f"{given} to {dtype}")
    return struct.Struct("<" + _CODES[dtype.char]).pack
