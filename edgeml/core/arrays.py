"""Arrays out of what a message says of them: bytes, a dtype, a shape, none of which is believed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from edgeml.core.errors import Malformed, shown

__all__ = ["restore", "to_native"]

# Of those that `numpy.dtype` understands: no field names, no nested shapes, no aliases of old.
_PLAIN = re.compile(r"[<>=|]?[A-Za-z?][0-9]{0,9}|[a-z]{3,7}[0-9]{0,3}")
_LONGEST = 20  # characters of a dtype
_MOST_DIMENSIONS = 32  # numpy 1's; more than anybody has

Dtype = np.dtype[Any]


@lru_cache(maxsize=256)
def _dtype(text: str) -> Dtype:
    try:
        if not _PLAIN.fullmatch(text):
            raise TypeError
        return np.dtype(text)
    except (TypeError, ValueError, DeprecationWarning):
        raise Malformed(f"{shown(text)} is no dtype") from None


def restore(
    data: object, dtype: object, shape: object, kinds: str = "biuf"
) -> np.ndarray[Any, Dtype]:
    """Return a read-only array of received bytes.

    Without a copy, but for one whose bytes are in the other order: what functions get is in this
    machine's, as from native clients.

    Args:
        data: bytes or a memoryview, in C order.
        dtype: its text, as ``"<f4"`` or ``"float32"``; bytes of ASCII, too.
        shape: a list or tuple of sizes.
        kinds: of the dtypes that are taken, as in `numpy.dtype.kind`.

    Raises:
        Malformed: this makes no such array.
    """
    if not isinstance(dtype, (str, bytes)):
        raise Malformed(f"a dtype is a text, not {type(dtype).__name__}")
    if len(dtype) > _LONGEST:
        raise Malformed(f"{shown(dtype)} is no dtype")
    if isinstance(dtype, bytes):
        dtype = dtype.decode("latin-1")
    made = _dtype(dtype)
    if made.kind not in kinds or made.hasobject or not made.itemsize:
        raise Malformed(f"arrays of dtype {dtype!r} are not taken: only kinds {', '.join(kinds)}")
    if not isinstance(data, (bytes, memoryview)):
        raise Malformed(f"an array's data are bytes, not {type(data).__name__}")
    if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)):
        raise Malformed(f"a shape is a list of sizes, not {type(shape).__name__}")
    if len(shape) > _MOST_DIMENSIONS or not all(
        type(size) is int and 0 <= size < 1 << 62 for size in shape
    ):
        raise Malformed(f"{shown(shape)} is no shape")
    nbytes = memoryview(data).nbytes
    needed = math.prod(shape) * made.itemsize
    if nbytes != needed:
        raise Malformed(
            f"an array of shape {shown(tuple(shape))} and dtype {dtype!r} has {needed} bytes, "
            f"and {nbytes} came"
        )
    try:
        array = np.frombuffer(data, made).reshape(shape) if needed else np.empty(shape, made)
    except ValueError:  # sizes beside a zero may be more than numpy can multiply
        raise Malformed(f"{shown(shape)} is no shape") from None
    return to_native(array)


def to_native(array: np.ndarray[Any, Dtype]) -> np.ndarray[Any, Dtype]:
    """Return an array of received bytes in this machine's order, read-only: itself if it is.

    Raises:
        Malformed: it has elements that are none of its dtype, which whoever reads them would crash
            on or take for others.
    """
    kind = array.dtype.kind
    if kind == "b":
        _require_most(array, np.uint8, 1)
    elif kind == "U" and array.dtype.itemsize:
        _require_most(array, np.dtype(np.uint32).newbyteorder(array.dtype.byteorder), 0x10FFFF)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def _require_most(array: np.ndarray[Any, Dtype], unit: Any, most: int) -> None:
    """Refuse an array that is made of larger numbers than these."""
    if array.size and np.maximum.reduce(array.reshape(-1).view(unit)) > most:
        raise Malformed(f"an array of dtype {array.dtype.str} has elements that are none of it")
