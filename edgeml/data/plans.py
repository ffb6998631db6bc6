"""What is wanted of a sample, worked out once for each choice of keys."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeml.core.message import empty, private
from edgeml.data.tree import Array, describe, fill, leaves_of

__all__ = ["Plan", "check_size"]

_POOLED = 1 << 16  # bytes; below this malloc is fast enough


@dataclass(frozen=True)
class Plan:
    """The structure of a batch, and the arrays that it is made of.

    Attributes:
        skeleton: its structure, with the numbers of the leaves.
        specs: of an item's part of each leaf the shape and the dtype.
        added: those of the selector's keys that are wanted, and their leaves.
        packed: the pairs of leaves of which the first has the frames of both.
        sized: the shapes, for the last batch size, of the batch's leaves; and whether each is
            small.
    """

    skeleton: Any
    specs: dict[int, tuple[tuple[int, ...], np.dtype[Any]]]
    added: Sequence[tuple[str, int]] = ()
    packed: Sequence[tuple[int, int]] = ()
    sized: dict[int, list[tuple[int, tuple[int, ...], np.dtype[Any], bool]]] = field(
        default_factory=dict
    )

    def make_arrays(self, n: int) -> dict[int, Array]:
        """Return arrays to write n items to, with anything in them."""
        if n not in self.sized:
            self.sized.clear()
            self.sized[n] = [
                (leaf, (n, *shape), dtype, n * dtype.itemsize * math.prod(shape) < _POOLED)
                for leaf, (shape, dtype) in self.specs.items()
            ]
        return {
            leaf: np.empty(shape, dtype) if small else empty(private, shape, dtype)
            for leaf, shape, dtype, small in self.sized[n]
        }

    def take_arrays(self, n: int, out: Any) -> dict[int, Array]:
        """Return the arrays of ``out``, once they have been found to fit n items.

        Raises:
            ValueError: they don't.
        """
        outs = dict(zip(self.specs, leaves_of(self.skeleton, out), strict=True))
        for leaf, array in outs.items():
            shape, dtype = (n, *self.specs[leaf][0]), self.specs[leaf][1]
            if not (
                isinstance(array, np.ndarray)
                and (array.shape, array.dtype) == (shape, dtype)
                and array.flags.c_contiguous
                and array.flags.writeable
            ):
                raise ValueError(
                    f"out has {describe(array)} for a contiguous, writable array of {shape} {dtype}"
                )
        return outs

    def build(self, arrays: dict[int, Array]) -> dict[Any, Any]:
        """Return the batch that these arrays are the leaves of."""
        batch: dict[Any, Any] = fill(self.skeleton, arrays)
        return batch


def check_size(n: Any) -> int:
    """Return a batch size as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"batch_size is an integer, got {n!r}: write 256 // 2, say") from None
    if n < 1:
        raise ValueError(f"batch_size must be at least 1, got {n}")
    size: int = n
    return size
