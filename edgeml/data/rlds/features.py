"""What a dataset's `features.json` says: how each value of an episode is kept.

The features are those of `tensorflow_datasets` (https://www.tensorflow.org/datasets/features).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.tree import describe, is_plain

__all__ = [
    "Feature",
    "Image",
    "Leaf",
    "Series",
    "Tensor",
    "Text",
    "from_json",
    "infer_feature",
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
        return _describe(_DICT, "featuresDict", {"features": parts})
    if isinstance(feature, Series):
        inner = {"feature": to_json(feature.feature), "length": "-1"}
        return _describe(_DATASET if feature.dataset else _SEQUENCE, "sequence", inner)
    if isinstance(feature, Text):
        return _describe(_TEXT, "text", {"optional": True} if feature.optional else {})
    dimensions = [str(-1 if n is None else n) for n in feature.shape]
    content: dict[str, Any] = {
        "shape": {"dimensions": dimensions} if dimensions else {},
        "dtype": "string" if feature.dtype == object else feature.dtype.name,
    }
    if isinstance(feature, Image):
        content["encodingFormat"] = feature.encoding
        return _describe(_IMAGE, "image", content)
    content["encoding"] = feature.encoding
    if feature.optional:
        content["optional"] = True
    return _describe(_TENSOR, "tensor", content)


def _describe(name: str, field: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": _CLASSES + name, field: content}


def from_json(text: str | bytes) -> Feature:
    """Return the feature that a `features.json` describes.

    Raises:
        Malformed: not what tfds writes, from its version 4.4 on.
        TypeError: a feature that is not among those that this module has; the text names it.
    """
    try:
        return _read_feature(json.loads(text), ())
    except (_NotRead, Malformed):
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Malformed(f"no features of tensorflow_datasets 4.4 or later: {error!r}") from None


class _NotRead(TypeError):
    """Not among the features that are read, to be told from Python's own TypeError."""


def _read_feature(content: Any, path: tuple[str, ...]) -> Feature:
    where = "/".join(path) or "the dataset"
    if not isinstance(content, dict) or not isinstance(content.get("pythonClassName"), str):
        raise Malformed(f"{where} has no pythonClassName; was it written by an old tfds?")
    name = content["pythonClassName"].removeprefix(_CLASSES)
    if name == _DICT:
        parts = content["featuresDict"].get("features", {})
        return {key: _read_feature(part, (*path, key)) for key, part in parts.items()}
    if name in (_SEQUENCE, _DATASET):
        return Series(_read_feature(content["sequence"]["feature"], path), name == _DATASET)
    if name == _TEXT:
        return Text(bool(content.get("text", {}).get("optional", False)))
    if name == _LABEL:
        return Tensor((), np.dtype(np.int64))
    if name == _BOX:
        return Tensor((4,), np.dtype(np.float32))
    if name == _IMAGE:
        part = content["image"]
        image = Image(_read_shape(part), _read_dtype(part), part.get("encodingFormat", ""))
        if len(image.shape) != 3 or not (
            image.dtype == np.uint8
            or (image.dtype in (np.uint16, np.float32) and image.shape[2] == 1)
        ):
            raise _NotRead(f"{where}: images {image.shape} {image.dtype} are not read")
        return image
    if name in (_TENSOR, _SCALAR):
        part = content["tensor"]
        encoding = part.get("encoding") or "none"
        tensor = Tensor(
            _read_shape(part), _read_dtype(part), encoding, bool(part.get("optional", False))
        )
        if encoding not in ("none", "bytes", "zlib"):
            raise _NotRead(f"{where}: the tensor's encoding {encoding!r} is not read")
        return tensor
    raise _NotRead(
        f"{where}: the feature {name} is not read; those that are: FeaturesDict, Dataset, "
        "Sequence, Tensor, Scalar, Text, Image, ClassLabel and BBoxFeature"
    )


def _read_shape(part: Any) -> tuple[int | None, ...]:
    dimensions = [int(n) for n in part.get("shape", {}).get("dimensions", [])]
    if any(n >= 1 << 31 for n in dimensions):
        raise Malformed(f"an axis of {max(dimensions)}")
    return tuple(None if n < 0 else n for n in dimensions)


def _read_dtype(part: Any) -> np.dtype[Any]:
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
