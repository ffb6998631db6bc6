"""Payloads stacked along a new first axis, each written once, and a result split into rows.

A payload is a tree of dicts, lists and tuples. Its *layout* is what payloads must have in common to
be stacked: keys, lengths, and of each leaf the dtype and shape. It is a nested tuple, hashable, of
which the tree can be built again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from edgeml.core.errors import shown
from edgeml.core.message import empty, private

__all__ = ["Layout", "Stack", "flatten", "split"]

Array = np.ndarray[Any, Any]
Layout = Hashable

_NUMBERS: dict[type, tuple[str, Any, tuple[()]]] = {
    kind: ("array", np.dtype(kind), ()) for kind in (bool, int, float, complex)
}
_OTHER = ("list",)
_INTEGERS = range(-(1 << 63), 1 << 63)
_DEEPEST = 32  # what the codecs carry


def flatten(value: Any) -> tuple[Layout, list[Any]]:
    """Return a payload's layout and its leaves, dicts in the order of their keys.

    Raises:
        ValueError: nested deeper than codecs carry.
    """
    leaves: list[Any] = []
    return _flatten(value, leaves, 0), leaves


def _flatten(value: Any, leaves: list[Any], depth: int) -> Layout:
    kind = type(value)
    if kind is np.ndarray and value.dtype.kind != "O":
        leaves.append(value)
        return ("array", value.dtype, value.shape)
    if depth > _DEEPEST:
        raise ValueError(f"a payload that is nested deeper than {_DEEPEST}")
    if kind is dict:
        keys = tuple(value)
        if len(keys) > 1:
            keys = _sort(keys)
        return ("dict", keys, tuple([_flatten(value[key], leaves, depth + 1) for key in keys]))
    if kind is list or kind is tuple:
        return (kind.__name__ + "s", tuple([_flatten(x, leaves, depth + 1) for x in value]))
    leaves.append(value)
    number = _NUMBERS.get(kind)
    if number is not None and (kind is not int or value in _INTEGERS):
        return number
    if isinstance(value, np.generic) and value.dtype.kind != "O":
        return ("array", value.dtype, ())
    return _OTHER


def _sort(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return tuple(sorted(keys))
    except TypeError:  # str and int
        return tuple(sorted(keys, key=lambda key: (type(key).__name__, key)))


def _build(layout: Any, leaves: Iterator[Any]) -> Any:
    match layout:
        case ("dict", keys, parts):
            return {key: _build(part, leaves) for key, part in zip(keys, parts, strict=True)}
        case ("lists", parts):
            return [_build(part, leaves) for part in parts]
        case ("tuples", parts):
            return tuple(_build(part, leaves) for part in parts)
    return next(leaves)


def _leaf_layouts(layout: Any) -> Iterator[Any]:
    if layout[0] in ("array", "list"):
        yield layout
    else:
        for part in layout[-1]:
            yield from _leaf_layouts(part)


class Stack:
    """Rows of one layout, in memory that is used again once nobody looks at it any more.

    A single row is not copied, and stays where it came.

    Args:
        layout: of each payload.
        capacity: rows that there is room for. Memory that no row is written to isn't touched.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self._single: list[Any] | None = None  # the leaves of row 0, as long as it is alone
        self._made: list[Any] = []

    @property
    def _columns(self) -> list[Any]:
        """The memory, from the first time that it is needed."""
        if not self._made:
            self._made = [
                empty(private, (self.capacity, *leaf[2]), leaf[1])
                if leaf[0] == "array"
                else [None] * self.capacity
                for leaf in _leaf_layouts(self.layout)
            ]
        if self._single is not None:
            alone, self._single = self._single, None
            self.write(0, alone)
        return self._made

    def write(self, row: int, leaves: list[Any]) -> None:
        """Put a payload's leaves into a row."""
        if row == 0 and not self._made:
            self._single = leaves
            return
        for column, leaf in zip(self._columns, leaves, strict=True):
            column[row] = leaf

    def row(self, row: int) -> list[Any]:
        """Return a row's leaves."""
        if self._single is not None:
            return self._single
        return [column[row] for column in self._columns]

    def copy_row(self, source: int, target: int) -> None:
        """Copy one row to another."""
        for column in self._columns:
            column[target] = column[source]

    def pad(self, rows: int, size: int) -> None:
        """Fill up to ``size`` rows with copies of the last, which are as valid as it is."""
        if rows < size:
            for column in self._columns:
                if isinstance(column, list):
                    column[rows:size] = [column[rows - 1]] * (size - rows)
                else:
                    column[rows:size] = column[rows - 1]

    def select(self, rows: list[int]) -> Stack:
        """Return another one with copies of these rows, and as much room."""
        other = Stack(self.layout, self.capacity)
        for target, source in enumerate(rows):
            other.write(target, self.row(source))
        return other

    def tree(self, size: int) -> Any:
        """Return the first ``size`` rows as one value, built as a payload is; read-only arrays."""
        if self._single is not None:  # and so it has one row, as `pad` makes others of it
            return _build(self.layout, map(_add_axis, _leaf_layouts(self.layout), self._single))
        return _build(self.layout, (_show(column[:size]) for column in self._columns))


def _show(column: Any) -> Any:
    """Return a column as functions see it, whether it is one row or many."""
    if not isinstance(column, list):
        column.flags.writeable = False
    return column


def _add_axis(layout: Any, leaf: Any) -> Any:
    if layout[0] == "list":
        return [leaf]
    return _show(np.asarray(leaf, layout[1])[None])


def split(result: Any, size: int, rows: int) -> list[Any]:
    """Return the first rows of what a function gave for a batch.

    Args:
        result: a tree of dicts, tuples and dataclasses. Its leaves are arrays, of numpy or of
            a device, whose first axis has the length ``size``, and lists of so many values without
            arrays in them: nobody could tell whether those are a row's, or part of all rows'.
        size: of the batch, padding included.
        rows: how many of them are wanted.

    Returns:
        For each row a tree of the same build, dataclasses and namedtuples being dicts. Rows of
        arrays are views.

    Raises:
        ValueError, TypeError: it isn't such; the text gives the path.
    """
    columns: list[Any] = []
    layout = _flatten_result(result, columns, "")
    for column, _ in columns:
        fetch = getattr(column, "copy_to_host_async", None)  # JAX: all that are to be fetched
        if fetch is not None:
            fetch()
    checked = [_check(column, path, size) for column, path in columns]
    if layout == _OTHER:
        return list(checked[0][:rows])
    return [_build(layout, iter([column[row] for column in checked])) for row in range(rows)]


def _flatten_result(value: Any, columns: list[Any], path: str) -> Layout:
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        parts = [_flatten_result(part, columns, f"{path}[{key!r}]") for key, part in value.items()]
        return ("dict", tuple(value), tuple(parts))
    if isinstance(value, tuple):
        parts = [_flatten_result(part, columns, f"{path}[{i}]") for i, part in enumerate(value)]
        return ("tuples", tuple(parts))
    columns.append((value, path))
    return _OTHER


def _has_arrays(value: Any) -> bool:
    """Whether a value is an array, or holds one; what can't be told is for the codec."""
    if isinstance(value, Mapping):
        return any(map(_has_arrays, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_arrays, value))
    return bool(getattr(value, "shape", ()))


def _check(column: Any, path: str, size: int) -> Any:
    """Return a leaf of a result as something to be indexed by row."""
    if isinstance(column, list):
        if any(map(_has_arrays, column)):
            raise TypeError(
                f"result{path} is a list with arrays in it: give one array whose first axis is the "
                "batch, or where they are parts of a row a tuple or a dict of such arrays"
            )
        if len(column) != size:
            raise ValueError(
                f"result{path} is a list of {len(column)} for a batch of {size} rows: it needs "
                "one value for each row"
            )
        return column
    if not hasattr(column, "shape"):
        raise TypeError(
            f"result{path} is {shown(column)}, for a batch of {size} rows: give an array whose "
            "first axis is the batch, or a list of one value for each row"
        )
    array = np.asarray(column)
    if array.ndim == 0 or len(array) != size:
        raise ValueError(
            f"result{path} has the shape {array.shape}, for a batch of {size} rows: the first axis "
            f"must have the length {size}"
        )
    return array
