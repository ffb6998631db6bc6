"""Gymnasium's spaces, walked in one place.

A space is known by what it has (``shape`` and ``dtype``, or ``spaces``), so gymnasium itself is
not needed, and the spaces of its forerunners will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from edgeml.data.tree import Array, is_plain, path_of

__all__ = ["map_space", "zeros_of"]

T = TypeVar("T")


def map_space(
    space: Any,
    leaf: Callable[[tuple[Any, ...], tuple[int, ...], np.dtype[Any]], T],
    path: tuple[Any, ...] = (),
) -> Any:
    """Return a tree as a sample of the space is one, with what a function gives for each leaf.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them.
        leaf: is given the keys that lead to a leaf, its shape and its dtype.
        path: the keys that lead to the space itself, for ``leaf`` and for errors.

    Returns:
        Dicts for a Dict, tuples for a Tuple.

    Raises:
        TypeError: a space whose samples have no fixed shape and dtype.
    """
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {key: map_space(part, leaf, (*path, key)) for key, part in parts.items()}
    # A OneOf has a sequence of spaces, too, but a sample of it is of one of them.
    if isinstance(parts, Sequence) and (isinstance(space, Sequence) or "Tuple" in _names_of(space)):
        return tuple(map_space(part, leaf, (*path, i)) for i, part in enumerate(parts))
    shape, dtype = getattr(space, "shape", None), getattr(space, "dtype", None)
    if shape is None or dtype is None or not is_plain(np.dtype(dtype)):
        raise TypeError(f"{path_of(path)}: {space!r} has no fixed shape and numeric dtype to store")
    return leaf(path, tuple(shape), np.dtype(dtype))


def _names_of(space: Any) -> list[str]:
    return [kind.__name__ for kind in type(space).__mro__]


def zeros_of(space: Any, *path: Any) -> Any:
    """Return a sample of zeros; see `map_space`."""

    def make_zeros(path: tuple[Any, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        del path
        return np.zeros(shape, dtype)

    return map_space(space, make_zeros, path)
