"""What the items of a replay buffer look like, and the refusal of all others."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeml.data.batch import Batch
from edgeml.data.tree import (
    Array,
    Skeleton,
    describe,
    is_plain,
    key_by_position,
    leaves_of,
    path_of,
    paths_of,
    skeleton_of,
)

__all__ = ["Schema"]


class Schema:
    """The structure of an item, with the shape, the dtype and the path of each leaf.

    Args:
        example: an item.
        ignore_unknown: items may have further keys, and what lies under these is left out. None:
            they may not, and whoever reads the error has no such option.

    Raises:
        ValueError: not a dict, tuple or list with arrays of numbers in it.
    """

    def __init__(self, example: Any, *, ignore_unknown: bool | None = None) -> None:
        self._ignore_unknown = ignore_unknown
        self.skeleton: Skeleton = skeleton_of(example)
        if type(self.skeleton) is int:
            raise ValueError(f"an item is a dict or a tuple, got {describe(example)}")
        self.keyed: Skeleton = key_by_position(self.skeleton)
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[np.dtype[Any]] = []
        self.paths = [path_of(keys) for keys in paths_of(self.skeleton)]
        for path, leaf in zip(self.paths, leaves_of(self.skeleton, example), strict=True):
            array = _as_array(leaf)
            if array is None or not is_plain(array.dtype):
                raise ValueError(f"{path}: expected an array or a number, got {describe(leaf)}")
            self.shapes.append(array.shape)
            self.dtypes.append(array.dtype.newbyteorder("="))
        if not any(0 not in shape for shape in self.shapes):
            raise ValueError("an item with nothing in it to store")

    def fit(self, item: Any, rows: int | None = None) -> list[Any]:
        """Return an item's leaves in the shapes and dtypes of this schema, copied only if need be.

        Args:
            item: an item; or columns, the same structure of arrays with a leading axis.
            rows: the length of that axis.

        Raises:
            ValueError: it doesn't fit; the text gives the path and what was expected there.
        """
        leaves = self._take_apart(item)
        for i, leaf in enumerate(leaves):
            shape = self.shapes[i] if rows is None else (rows, *self.shapes[i])
            dtype = self.dtypes[i]
            if isinstance(leaf, (np.ndarray, np.generic)):
                if leaf.shape == shape and leaf.dtype == dtype:
                    continue
            elif type(leaf) is float and not shape and dtype.kind == "f":
                leaves[i] = dtype.type(leaf)  # a reward, most likely: five times as fast
                continue
            leaves[i] = self._convert(leaf, i, shape)
        return leaves

    def fit_batch(self, batch: Batch) -> list[Any]:
        """Return a batch's leaves as columns in the shapes and dtypes of this schema.

        Raises:
            ValueError: an item doesn't fit, as `fit` says.
        """
        if batch.columns is not None:
            return self.fit(batch.columns, len(batch))
        rows = [self.fit(item) for item in batch]
        return [np.stack(column) for column in zip(*rows, strict=True)]

    def _take_apart(self, item: Any) -> list[Any]:
        try:
            return leaves_of(self.skeleton, item, ignore_unknown=self._ignore_unknown is True)
        except ValueError as error:
            if self._ignore_unknown is None:
                raise
            try:
                leaves_of(self.skeleton, item, ignore_unknown=True)
            except ValueError:
                raise error from None
            raise ValueError(
                f"{error}: to leave out the further keys, make the store with ignore_unknown=True"
            ) from None

    def _convert(self, leaf: Any, i: int, shape: tuple[int, ...]) -> Array:
        array, dtype, beyond = _as_array(leaf), self.dtypes[i], ""
        if array is not None and array.shape == shape:
            if array.dtype.kind in "iu" and dtype.kind in "iu":
                limits = np.iinfo(dtype)
                if not array.size or limits.min <= array.min() <= array.max() <= limits.max:
                    return array.astype(dtype)
                beyond = f" beyond {dtype}"
            elif np.can_cast(array.dtype, dtype, "same_kind"):
                return array.astype(dtype)
            elif dtype.kind in "iu" and array.dtype.kind == "f":
                beyond = (
                    ": it is an integer where the store learned what items look like, from its "
                    "example or the first item: give it as a float there, such as 0.0"
                )
        raise ValueError(
            f"{self.paths[i]}: expected shape {shape} {dtype}, got {describe(leaf)}{beyond}"
        )


def _as_array(leaf: Any) -> Array | None:
    try:
        return np.asarray(leaf)
    except ValueError:  # a list of lists of different lengths
        return None
