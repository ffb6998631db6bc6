"""What an example holds of values, and how they are got back from it.

An example names the values of nested features by the path to them, such as
``steps/observation/image``, and holds the values of all steps one after the other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.rlds.example import Values
from edgeml.data.rlds.features import Feature, Image, Leaf, Series, Tensor, Text
from edgeml.data.tree import Array
from edgeml.images import decode_image, encode_image

__all__ = ["join", "pack", "read"]

_INFLATED = 1 << 30  # bytes that zlib may make of a value whose shape is not known


def pack(leaf: Leaf, value: Any) -> Any:
    """Return how a value is held until its example is written: bytes, or a copy of the array."""
    if isinstance(leaf, Text):
        return value.encode()
    if isinstance(leaf, Tensor):
        return np.array(value) if leaf.encoding == "none" else np.asarray(value).tobytes()
    return encode_image(value, leaf.encoding)  # type: ignore[arg-type]


def join(leaf: Leaf, packed: list[Any]) -> Values:
    """Return what an example holds of values that `pack` returned."""
    if isinstance(leaf, Tensor) and leaf.encoding == "none":
        return np.asarray(packed).reshape(-1)
    return packed


def read(feature: Feature, values: dict[str, Values]) -> Any:
    """Return what an example holds of a feature.

    Args:
        feature: of the whole example.
        values: the example's lists.

    Returns:
        Dicts for dicts. For a leaf an array, a numpy scalar, a str, bytes, or None where an
        optional one is missing. For a leaf in a series an array with an axis for the values,
        an array of objects where they are texts, byte strings or arrays of several shapes.

    Raises:
        Malformed: the example doesn't hold it; the text names the part.
        ImportError: it has images, and Pillow is not installed.
    """
    return _read(feature, values, (), 0)


def _read(feature: Feature, values: dict[str, Values], path: tuple[str, ...], depth: int) -> Any:
    if isinstance(feature, dict):
        return {k: _read(part, values, (*path, k), depth) for k, part in feature.items()}
    if isinstance(feature, Series):
        return _read(feature.feature, values, path, depth + 1)
    name = "/".join(path)
    dynamic = isinstance(feature, Tensor) and feature.shape.count(None) > 1
    part = f"{name}/value" if dynamic else name
    optional = isinstance(feature, Tensor | Text) and feature.optional
    if optional and not depth and part not in values:
        return None
    # What is in two series or more lies flat, beside the lengths of its rows.
    flat = "/ragged_flat_values" if depth > 1 else ""
    try:
        shapes = values[f"{name}/shape{flat}"] if dynamic else None
        column = _take_column(feature, values[part + flat], shapes, None if depth else 1)
        for i in reversed(range(depth - 1)):
            column = _cut(column, values[f"{part}/ragged_row_lengths_{i}"])
    except KeyError as error:
        raise Malformed(f"there is no {error.args[0]}") from None
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from None
    if depth:
        return column
    if len(column) != 1:
        raise Malformed(f"{name}: {len(column)} values instead of one")
    return column[0]


def _take_column(leaf: Leaf, values: Values, shapes: Values | None, n: int | None) -> Array:
    """Return a leaf's values, one after the other; ``n`` is their number where it is known."""
    if isinstance(leaf, Tensor) and leaf.encoding == "none":
        return _take_numbers(leaf, values, n)
    if not isinstance(values, list):
        raise Malformed("a list of numbers where one of bytes was expected")
    if isinstance(leaf, Text):
        # Some published datasets hold text that is not UTF-8; this way nothing of it is lost.
        return _collect([value.decode("utf-8", "surrogateescape") for value in values])
    if isinstance(leaf, Image):
        if not values:
            return _reshape(np.empty(0, leaf.dtype), (0, *(n or 0 for n in leaf.shape)))
        return _stack([_decode(leaf, value) for value in values])
    if leaf.encoding == "zlib":
        values = [_inflate(leaf, value) for value in values]
    if None not in leaf.shape:
        size = leaf.dtype.itemsize * math.prod(map(int, leaf.shape))  # type: ignore[arg-type]
        if any(len(value) != size for value in values):
            raise Malformed(f"expected {size} bytes for shape {leaf.shape} {leaf.dtype}")
        return _take_bytes(leaf, b"".join(values), (len(values), *leaf.shape))
    if shapes is None:
        return _stack([_take_bytes(leaf, value, leaf.shape) for value in values])
    if isinstance(shapes, list) or len(shapes) != len(values) * len(leaf.shape):
        raise Malformed("as many shapes as values were expected")
    rows = shapes.reshape(len(values), len(leaf.shape)).tolist()
    return _stack([_take_bytes(leaf, v, row) for v, row in zip(values, rows, strict=True)])


def _take_numbers(tensor: Tensor, values: Values, n: int | None) -> Array:
    dtype = tensor.dtype
    if isinstance(values, list):
        if values and dtype.kind != "O":
            raise Malformed(f"a list of bytes where one of {dtype} was expected")
        array = _collect(values) if values else np.empty(0, dtype)  # whose kind is not told
    elif (values.dtype.kind == "i") != (dtype.kind in "biu") or dtype.kind == "O":
        raise Malformed(f"a list of {values.dtype} where one of {dtype} was expected")
    elif dtype == np.bool_:
        array = values != 0
    elif dtype == np.uint64:
        array = values.view(np.uint64)
    else:
        array = values.astype(dtype)
        if dtype.kind in "iu" and not np.array_equal(array, values):
            raise Malformed(f"a number beyond {dtype}")
    return _reshape(array, (-1 if n is None else n, *tensor.shape))


def _take_bytes(tensor: Tensor, data: bytes, shape: Sequence[int | None]) -> Array:
    if tensor.dtype == np.bool_:
        return _reshape(np.frombuffer(data, np.uint8) != 0, shape)
    try:
        return _reshape(np.frombuffer(data, tensor.dtype), shape)
    except ValueError as error:  # not a whole number of them
        raise Malformed(str(error)) from None


def _reshape(array: Array, shape: Sequence[int | None]) -> Array:
    try:
        return array.reshape([-1 if n is None else n for n in shape])
    except ValueError:
        raise Malformed(f"{array.size} elements where shape {(*shape,)} was expected") from None


def _inflate(tensor: Tensor, data: bytes) -> bytes:
    sizes = [n for n in tensor.shape if n is not None]
    limit = _INFLATED
    if len(sizes) == len(tensor.shape):
        limit = min(limit, tensor.dtype.itemsize * math.prod(sizes))
    inflater = zlib.decompressobj()
    try:
        result = inflater.decompress(data, limit + 1)  # 0 would stand for no limit
    except zlib.error as error:
        raise Malformed(str(error)) from None
    if len(result) > limit or not inflater.eof:
        raise Malformed(f"zlib data that is cut, or gives more than {limit} bytes")
    return result


def _decode(image: Image, data: bytes) -> Array:
    if image.dtype == np.float32:  # kept as 4 channels of uint8
        pixels = decode_image(data, (*image.shape[:2], 4))
        return np.ascontiguousarray(pixels).view("<f4")
    return decode_image(data, image.shape, image.dtype)


def _cut(column: Array, lengths: Values) -> Array:
    """Cut a column into rows of the lengths given."""
    if isinstance(lengths, list) or lengths.dtype.kind != "i":
        if len(lengths):
            raise Malformed("the lengths of rows are integers")
        lengths = np.empty(0, np.int64)
    if (len(lengths) and lengths.min() < 0) or lengths.sum() != len(column):
        raise Malformed(f"rows of {lengths.sum()} values in all, but there are {len(column)}")
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return _stack([column[a:b] for a, b in zip(starts, ends, strict=False)])


def _stack(values: list[Array]) -> Array:
    """Make an array of arrays of one shape, or else an array of objects."""
    return np.stack(values) if len({value.shape for value in values}) == 1 else _collect(values)


def _collect(values: list[Any]) -> Array:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):  # numpy would make one array of arrays of one length
        array[i] = value
    return array
