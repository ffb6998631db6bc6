"""Items as trees: dicts, tuples and lists with leaves in them, taken apart and put together again.

A *skeleton* is an item with its leaves numbered in the order in which a walk meets them:
``{"obs": (x, y), "reward": r}`` has the skeleton ``{"obs": (0, 1), "reward": 2}``. Against a
skeleton an item is a flat list of leaves, and a thousand items are a flat list of columns.
A namedtuple counts as the dict that it is, which is also how codecs carry it.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

__all__ = [
    "Array",
    "Skeleton",
    "copy_item",
    "describe",
    "fill",
    "is_plain",
    "key_by_position",
    "leaves_of",
    "nbytes_of",
    "nest",
    "path_of",
    "paths_of",
    "prune",
    "skeleton_of",
    "transpose",
]

Array = np.ndarray[Any, Any]
Skeleton = Any  # dict[str | int, Skeleton] | tuple[Skeleton, ...] | list[Skeleton] | int

_DEEPEST = 32  # what the codecs carry
_IMMUTABLE = frozenset({bool, int, float, complex, str, bytes, type(None)})


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of ``dtype`` hold numbers or booleans (the types of ml_dtypes included)."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.type is not np.void)


def path_of(keys: Sequence[Any]) -> str:
    """Return the expression that reaches a part of an item, e.g. ``item['obs'][0]``."""
    return "item" + "".join(f"[{key!r}]" for key in keys)


def skeleton_of(item: Any) -> Skeleton:
    """Return the skeleton of an item.

    Raises:
        ValueError: nested deeper than 32, or with a dict key that is not a str or int.
    """
    return _number(item, count(), ())


def _number(node: Any, numbers: Iterator[int], path: tuple[Any, ...]) -> Skeleton:
    if len(path) > _DEEPEST:
        raise ValueError(f"{path_of(path)} is nested deeper than {_DEEPEST}")
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        node = node._asdict()
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, (str, int)):
                raise ValueError(f"{path_of(path)}: keys are str or int, got {key!r}")
        return {key: _number(child, numbers, (*path, key)) for key, child in node.items()}
    if isinstance(node, (tuple, list)):
        children = [_number(child, numbers, (*path, i)) for i, child in enumerate(node)]
        return tuple(children) if isinstance(node, tuple) else children
    return next(numbers)


def leaves_of(skeleton: Skeleton, item: Any, *, ignore_unknown: bool = False) -> list[Any]:
    """Return the leaves of an item in the skeleton's order.

    Args:
        skeleton: of an item like it.
        item: to be taken apart.
        ignore_unknown: leave out what lies under keys that the skeleton's dicts don't have.

    Raises:
        ValueError: the item is built differently; the text gives the path and both structures.
    """
    leaves: list[Any] = []
    _collect(skeleton, item, leaves, (), ignore_unknown)
    return leaves


def _collect(
    skeleton: Skeleton, node: Any, into: list[Any], path: tuple[Any, ...], ignore_unknown: bool
) -> None:
    if type(skeleton) is int:
        into.append(node)
        return
    if isinstance(skeleton, dict):
        if isinstance(node, tuple) and hasattr(node, "_asdict"):
            node = node._asdict()
        if not isinstance(node, dict) or (
            node.keys() != skeleton.keys()
            and not (ignore_unknown and node.keys() >= skeleton.keys())
        ):
            raise _mismatch(skeleton, node, path)
    elif not isinstance(node, type(skeleton)) or len(node) != len(skeleton):
        raise _mismatch(skeleton, node, path)
    for key, child in _pair_up(skeleton):
        if type(child) is int:  # spares a call for each leaf, which is most of the work
            into.append(node[key])
        else:
            _collect(child, node[key], into, (*path, key), ignore_unknown)


def transpose(skeleton: Skeleton, items: list[Any]) -> list[list[Any]] | None:
    """Return for each leaf its values in all items, or None where an item is built differently.

    One pass for each container, not for each item: three times as fast as `leaves_of` in a loop.
    """
    if type(skeleton) is int:
        return [items]
    kinds = set(map(type, items))
    kind = kinds.pop()
    if kinds or not (
        issubclass(kind, dict) if isinstance(skeleton, dict) else kind is type(skeleton)
    ):
        return None
    if set(map(len, items)) != {len(skeleton)}:
        return None
    columns: list[list[Any]] = []
    for key, child in _pair_up(skeleton):
        try:
            values = [item[key] for item in items]
        except KeyError:
            return None
        below = transpose(child, values)
        if below is None:
            return None
        columns += below
    return columns


def _pair_up(skeleton: Skeleton) -> Iterable[tuple[Any, Skeleton]]:
    return skeleton.items() if isinstance(skeleton, dict) else enumerate(skeleton)


def _mismatch(skeleton: Skeleton, node: Any, path: tuple[Any, ...]) -> ValueError:
    return ValueError(f"{path_of(path)}: expected {describe(skeleton)}, got {describe(node)}")


def describe(node: Any) -> str:
    """Name the outer structure of a part of an item, for error messages."""
    if isinstance(node, dict):
        return f"a dict of {sorted(node, key=str)}"
    if isinstance(node, (tuple, list)):
        return f"a {type(node).__name__} of {len(node)}"
    if isinstance(node, (np.ndarray, np.generic)):
        return f"shape {node.shape} {node.dtype}"
    return type(node).__name__


def fill(skeleton: Skeleton, leaves: Sequence[Any] | Mapping[int, Any]) -> Any:
    """Build an item from its leaves: the opposite of `leaves_of`."""
    if type(skeleton) is int:
        return leaves[skeleton]
    if type(skeleton) is dict:
        return {
            key: leaves[child] if type(child) is int else fill(child, leaves)  # spares a call
            for key, child in skeleton.items()
        }
    return type(skeleton)([fill(child, leaves) for child in skeleton])


def copy_item(node: Any) -> Any:
    """Return a copy of an item: its containers and arrays, and other objects by `copy.deepcopy`."""
    kind = type(node)
    if kind is np.ndarray:
        return node.copy()
    if kind is dict:
        return {key: copy_item(child) for key, child in node.items()}
    if kind in _IMMUTABLE or issubclass(kind, np.generic):
        return node
    if kind is tuple or kind is list:
        return kind(map(copy_item, node))
    return np.array(node) if hasattr(kind, "__array__") else copy.deepcopy(node)


def nbytes_of(value: Any) -> int:
    """Return roughly how many bytes a value takes in a message."""
    if isinstance(value, dict):
        return sum(map(nbytes_of, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(map(nbytes_of, value))
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    size = getattr(value, "nbytes", None)
    return size if isinstance(size, int) else 8


def nest(parts: Iterable[tuple[Sequence[Any], Any]]) -> dict[Any, Any]:
    """Build dicts from values and the keys that lead to them.

    Raises:
        ValueError: two of them lead to one place, or one leads through another.
    """
    tree: dict[Any, Any] = {}
    for keys, value in parts:
        *parents, last = keys
        node: Any = tree
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            name = "/".join(map(str, keys))
            raise ValueError(f"the name {name!r} is taken already, or part of another")
        node[last] = value
    return tree


def prune(skeleton: Skeleton, leaves: Container[int]) -> Skeleton:
    """Return a skeleton of dicts without some leaves."""
    return {
        key: child if type(child) is int else prune(child, leaves)
        for key, child in skeleton.items()
        if type(child) is not int or child not in leaves
    }


def paths_of(skeleton: Skeleton, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return for each leaf the keys that lead to it."""
    if type(skeleton) is int:
        return [path]
    return [found for key, child in _pair_up(skeleton) for found in paths_of(child, (*path, key))]


def key_by_position(skeleton: Skeleton) -> Skeleton:
    """Return the skeleton with tuples and lists made dicts keyed 0, 1, and so on."""
    if type(skeleton) is int:
        return skeleton
    return {key: key_by_position(child) for key, child in _pair_up(skeleton)}
