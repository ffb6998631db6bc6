"""What a step of a trajectory looks like: its parts, their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeml.data.spaces import map_space
from edgeml.data.tree import nest
from edgeml.extras import load_jax

__all__ = ["END", "DataShape", "list_shapes", "make_example", "narrow"]

END = "end_of_trajectory"
"""The key of an item that says whether it is the last of its trajectory."""

_NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32"}


class DataShape(NamedTuple):
    """What one part of a step looks like.

    Attributes:
        name: its key in an item; ``"observations/image"`` is the key ``"image"`` of the dict
            ``"observations"``.
        shape: of the part in one step; () is a number.
        dtype: numeric or bool, by name or as numpy knows it. Types of 64 bits are refused unless
            ``jax_enable_x64`` is set, for without it JAX would keep half of them.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: Any = "float32"


def list_shapes(name: str, space: Any) -> list[DataShape]:
    """Return the data shapes of a space's leaves, named by the keys that lead to them.

    Raises:
        TypeError: a Tuple, or a space whose samples have no fixed shape and dtype.
    """
    shapes = []

    def add(path: tuple[Any, ...], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        for key in path[1:]:
            if not isinstance(key, str) or "/" in key:
                raise TypeError(
                    f"{name}: of several parts, make a Dict, whose keys are str without '/' here; "
                    f"got {key!r} in {space!r}"
                )
        shapes.append(DataShape("/".join(path), shape, _NARROW.get(dtype.name, dtype)))

    map_space(space, add, (name,))
    return shapes


def make_example(data_shapes: Sequence[DataShape]) -> dict[str, Any]:
    """Return an item of zeros, nested as the names say."""
    if not data_shapes:
        raise ValueError("a step with nothing in it to store")
    # With the key that all items have, so that none is given that name.
    return nest(
        [
            *(
                (name.split("/"), np.zeros(shape, np.dtype(dtype)))
                for name, shape, dtype in data_shapes
            ),
            ([END], np.False_),
        ]
    )


def narrow(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what JAX keeps a dtype as: 32 bits for 64, unless ``jax_enable_x64`` is set."""
    kept: np.dtype[Any] = load_jax().dtypes.canonicalize_dtype(dtype)
    return kept
