"""What a dataset's `features.json` says: how each value is kept, and how it is got back.

The features are those of `tensorflow_datasets` (https://www.tensorflow.org/datasets/features).
An example names the values of nested features by the path to them, such as
``steps/observation/image``, and holds the values of all steps one after the other.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.rlds.example import Values
from edgeml.data.tree import Array, describe, is_plain
from edgeml.images import decode_image, encode_image

__all__ = [
    "Feature",
    "Image",
    "Leaf",
    "Series",
    "Tensor",
    "Text",
    "infer_feature",
    "from_json",
    "join",
    "pack",
    "read",
    "to_json",
]

_CLASSES = "tensorflow_datasets.core.features."
_DICT = "features_dict.FeaturesDict"
_SEQUENCE = "sequence_feature.Sequence"
_DATASET = "dataset_feature.Dataset"
_TENSOR = "tensor_feature.Tensor"
_SCALAR = "scalar.Scalar"
_TEXT = "text_feature.Text"
_IMAGE = "image_feature.Image"
_LABEL = "class_label_feature.ClassLabel"
_BOX = "bounding_boxes.BBoxFeature"

# What lists of float32 and int64 keep exactly, as it is what they are of, or narrower. tfds can't
# read uint32 from bytes; all others are kept as bytes, which is exact and most often shorter.
_LISTED = ("float32", "int32", "int64", "uint32", "bool")
_INFLATED = 1 << 30  # bytes that zlib may make of a value whose shape is not known


@dataclass(frozen=True)
class Tensor:
    """An array.

    Attributes:
        shape: None stands for an axis of any length.
        dtype: object for byte strings.
        encoding: "none", a list of numbers; "bytes", as they lie in memory; or "zlib".
        optional: whether it may be missing.
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    encoding: str = "none"
    optional: bool = False


@dataclass(frozen=True)
class Text:
    """A str, in UTF-8."""

    optional: bool = False


@dataclass(frozen=True)
class Image:
    """An image, kept as a PNG or JPEG file.

    Attributes:
        shape: (height, width, channels); None stands for any number.
        dtype: uint8; uint16 with one channel; or float32 with one, kept as 4 channels of uint8.
        encoding: "png" or "jpeg"; "" where the dataset doesn't say.
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    encoding: str = "png"


@dataclass(frozen=True)
class Series:
    """Any number of values of one feature, as the steps of an episode are.

    Attributes:
        dataset: whether it is tfds's ``Dataset`` rather than its ``Sequence``.
    """

    feature: Feature
    dataset: bool = False


Leaf = Tensor | Text | Image
Feature = Leaf | Series | dict[str, Any]  # of features, by name


def infer_feature(value: Any, image_format: str, path: str) -> Leaf:
    """Return the feature that keeps values like this one exactly (a JPEG image: nearly).

    A str is a text, a uint8 array of shape (height, width, 1, 3 or 4) an image, and all else a
    tensor. JPEG has no fourth channel: an image with one is kept as PNG.

    Raises:
        ValueError: neither a str nor a number or a numeric array with anything in it.
    """
    if isinstance(value, str):
        return Text()
    try:
        array = np.asarray(value)
    except ValueError:  # a list of lists of different lengths
        array = np.asarray(None)
    if not is_plain(array.dtype) or not array.size:
        raise ValueError(
            f"{path}: expected a number, an array of numbers or a str, got {describe(value)}"
        )
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (1, 3, 4):
        return Image(array.shape, array.dtype, "png" if array.shape[2] == 4 else image_format)
    dtype = array.dtype.newbyteorder("=")
    return Tensor(array.shape, dtype, "none" if dtype.name in _LISTED else "bytes")


# To and from features.json.


def to_json(feature: Feature) -> dict[str, Any]:
    """Return what `features.json` says of a feature."""
    if isinstance(feature, dict):
        parts = {name: to_json(part) for name, part in feature.items()}
        return _described(_DICT, "featuresDict", {"features": parts})
    if isinstance(feature, Series):
        inner = {"feature": to_json(feature.feature), "length": "-1"}
        return _described(_DATASET if feature.dataset else _SEQUENCE, "sequence", inner)
    if isinstance(feature, Text):
        return _described(_TEXT, "text", {"optional": True} if feature.optional else {})
    dimensions = [str(-1 if n is None else n) for n in feature.shape]
    content: dict[str, Any] = {
        "shape": {"dimensions": dimensions} if dimensions else {},
        "dtype": "string" if feature.dtype == object else feature.dtype.name,
    }
    if isinstance(feature, Image):
        content["encodingFormat"] = feature.encoding
        return _described(_IMAGE, "image", content)
    content["encoding"] = feature.encoding
    if feature.optional:
        content["optional"] = True
    return _described(_TENSOR, "tensor", content)


def _described(name: str, field: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": _CLASSES + name, field: content}


def from_json(text: str | bytes) -> Feature:
    """Return the feature that a `features.json` describes.

    Raises:
        Malformed: not what tfds writes, from its version 4.4 on.
        TypeError: a feature that is not among those that this module has; the text names it.
    """
    try:
        return _feature(json.loads(text), ())
    except (_NotRead, Malformed):
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Malformed(f"no features of tensorflow_datasets 4.4 or later: {error!r}") from None


class _NotRead(TypeError):
    """Not among the features that are read, to be told from Python's own TypeError."""


def _feature(content: Any, path: tuple[str, ...]) -> Feature:
    where = "/".join(path) or "the dataset"
    if not isinstance(content, dict) or not isinstance(content.get("pythonClassName"), str):
        raise Malformed(f"{where} has no pythonClassName; was it written by an old tfds?")
    name = content["pythonClassName"].removeprefix(_CLASSES)
    if name == _DICT:
        parts = content["featuresDict"].get("features", {})
        return {key: _feature(part, (*path, key)) for key, part in parts.items()}
    if name in (_SEQUENCE, _DATASET):
        return Series(_feature(content["sequence"]["feature"], path), name == _DATASET)
    if name == _TEXT:
        return Text(bool(content.get("text", {}).get("optional", False)))
    if name == _LABEL:
        return Tensor((), np.dtype(np.int64))
    if name == _BOX:
        return Tensor((4,), np.dtype(np.float32))
    if name == _IMAGE:
        part = content["image"]
        image = Image(_shape(part), _dtype(part), part.get("encodingFormat", ""))
        if len(image.shape) != 3 or not (
            image.dtype == np.uint8
            or (image.dtype in (np.uint16, np.float32) and image.shape[2] == 1)
        ):
            raise _NotRead(f"{where}: images {image.shape} {image.dtype} are not read")
        return image
    if name in (_TENSOR, _SCALAR):
        part = content["tensor"]
        encoding = part.get("encoding") or "none"
        tensor = Tensor(_shape(part), _dtype(part), encoding, bool(part.get("optional", False)))
        if encoding not in ("none", "bytes", "zlib"):
            raise _NotRead(f"{where}: the tensor's encoding {encoding!r} is not read")
        return tensor
    raise _NotRead(
        f"{where}: the feature {name} is not read; those that are: FeaturesDict, Dataset, "
        "Sequence, Tensor, Scalar, Text, Image, ClassLabel and BBoxFeature"
    )


def _shape(part: Any) -> tuple[int | None, ...]:
    dimensions = [int(n) for n in part.get("shape", {}).get("dimensions", [])]
    if any(n >= 1 << 31 for n in dimensions):
        raise Malformed(f"an axis of {max(dimensions)}")
    return tuple(None if n < 0 else n for n in dimensions)


def _dtype(part: Any) -> np.dtype[Any]:
    name = part["dtype"]
    if name == "string":
        return np.dtype(object)
    dtype: np.dtype[Any]
    try:
        dtype = np.dtype(name)
    except TypeError:
        try:
            import ml_dtypes

            dtype = np.dtype(getattr(ml_dtypes, name))
        except (ImportError, AttributeError, TypeError):
            raise _NotRead(f"the dtype {name!r} is not known; ml_dtypes has more") from None
    if not is_plain(dtype):
        raise _NotRead(f"the dtype {name!r} is not read")
    return dtype


# From values to an example's lists.


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


# From an example's lists to values.


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
        column = _column(feature, values[part + flat], shapes, None if depth else 1)
        for i in reversed(range(depth - 1)):
            column = _rows(column, values[f"{part}/ragged_row_lengths_{i}"])
    except KeyError as error:
        raise Malformed(f"there is no {error.args[0]}") from None
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from None
    if depth:
        return column
    if len(column) != 1:
        raise Malformed(f"{name}: {len(column)} values instead of one")
    return column[0]


def _column(leaf: Leaf, values: Values, shapes: Values | None, n: int | None) -> Array:
    """Return a leaf's values, one after the other; ``n`` is their number where it is known."""
    if isinstance(leaf, Tensor) and leaf.encoding == "none":
        return _listed(leaf, values, n)
    if not isinstance(values, list):
        raise Malformed("a list of numbers where one of bytes was expected")
    if isinstance(leaf, Text):
        # Some published datasets hold text that is not UTF-8; this way nothing of it is lost.
        return _objects([value.decode("utf-8", "surrogateescape") for value in values])
    if isinstance(leaf, Image):
        if not values:
            return _shaped(np.empty(0, leaf.dtype), (0, *(n or 0 for n in leaf.shape)))
        return _stacked([_decode(leaf, value) for value in values])
    if leaf.encoding == "zlib":
        values = [_inflated(leaf, value) for value in values]
    if None not in leaf.shape:
        size = leaf.dtype.itemsize * math.prod(map(int, leaf.shape))  # type: ignore[arg-type]
        if any(len(value) != size for value in values):
            raise Malformed(f"expected {size} bytes for shape {leaf.shape} {leaf.dtype}")
        return _from_bytes(leaf, b"".join(values), (len(values), *leaf.shape))
    if shapes is None:
        return _stacked([_from_bytes(leaf, value, leaf.shape) for value in values])
    if isinstance(shapes, list) or len(shapes) != len(values) * len(leaf.shape):
        raise Malformed("as many shapes as values were expected")
    rows = shapes.reshape(len(values), len(leaf.shape)).tolist()
    return _stacked([_from_bytes(leaf, v, row) for v, row in zip(values, rows, strict=True)])


def _listed(tensor: Tensor, values: Values, n: int | None) -> Array:
    dtype = tensor.dtype
    if isinstance(values, list):
        if values and dtype.kind != "O":
            raise Malformed(f"a list of bytes where one of {dtype} was expected")
        array = _objects(values) if values else np.empty(0, dtype)  # whose kind is not told
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
    return _shaped(array, (-1 if n is None else n, *tensor.shape))


def _from_bytes(tensor: Tensor, data: bytes, shape: Sequence[int | None]) -> Array:
    if tensor.dtype == np.bool_:
        return _shaped(np.frombuffer(data, np.uint8) != 0, shape)
    try:
        return _shaped(np.frombuffer(data, tensor.dtype), shape)
    except ValueError as error:  # not a whole number of them
        raise Malformed(str(error)) from None


def _shaped(array: Array, shape: Sequence[int | None]) -> Array:
    try:
        return array.reshape([-1 if n is None else n for n in shape])
    except ValueError:
        raise Malformed(f"{array.size} elements where shape {(*shape,)} was expected") from None


def _inflated(tensor: Tensor, data: bytes) -> bytes:
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


def _rows(column: Array, lengths: Values) -> Array:
    """Cut a column into rows of the lengths given."""
    if isinstance(lengths, list) or lengths.dtype.kind != "i":
        if len(lengths):
            raise Malformed("the lengths of rows are integers")
        lengths = np.empty(0, np.int64)
    if (len(lengths) and lengths.min() < 0) or lengths.sum() != len(column):
        raise Malformed(f"rows of {lengths.sum()} values in all, but there are {len(column)}")
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return _stacked([column[a:b] for a, b in zip(starts, ends, strict=False)])


def _stacked(values: list[Array]) -> Array:
    """Make an array of arrays of one shape, or else an array of objects."""
    return np.stack(values) if len({value.shape for value in values}) == 1 else _objects(values)


def _objects(values: list[Any]) -> Array:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):  # numpy would make one array of arrays of one length
        array[i] = value
    return array
