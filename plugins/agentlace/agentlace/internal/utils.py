"""Small helpers: images as JPEG, compression, and coloured lines."""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from edgeml.core import frame, load_codec, unframe
from edgeml.images import decode_image, encode_image

__all__ = [
    "compute_hash",
    "jpeg_to_mat",
    "make_compression_method",
    "mat_to_jpeg",
    "print_error",
    "print_size",
    "print_warning",
]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_codec = load_codec("msgpack")


def mat_to_jpeg(img: Pixels) -> bytes:
    """Return an image as a JPEG file of quality 95.

    Args:
        img: (height, width) or (height, width, 1 or 3) uint8; three channels are blue, green and
            red, as OpenCV has them.
    """
    if img.ndim == 2:
        img = img[:, :, None]
    return encode_image(np.ascontiguousarray(img[:, :, ::-1]), "jpeg", 95)


def jpeg_to_mat(buf: bytes) -> Pixels:
    """Return a JPEG file's pixels, (height, width, 3) uint8: blue, green and red."""
    return np.ascontiguousarray(decode_image(buf, (None, None, 3))[:, :, ::-1])


def compute_hash(obj: Any) -> str:
    """Return a hash of a value that a message can carry, as 32 hexadecimal digits."""
    return hashlib.md5(frame(_codec.encode(obj)), usedforsecurity=False).hexdigest()


def make_compression_method(
    compression: str,
) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Return two functions, of which one makes bytes of a value and the other the value of these.

    Args:
        compression: "zlib" or "lz4"; the latter needs the package lz4.

    Raises:
        ValueError: it is neither.
        ImportError: lz4 is not installed.
    """
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]
    if compression == "lz4":
        lz4 = import_module("lz4.frame")
        pack, unpack = lz4.compress, lz4.decompress
    elif compression == "zlib":
        pack, unpack = zlib.compress, zlib.decompress
    else:
        raise ValueError(f"compression is 'lz4' or 'zlib', got {compression!r}")

    def compress(value: Any) -> bytes:
        return pack(frame(_codec.encode(value)))

    def decompress(data: bytes) -> Any:
        return _codec.decode(unframe(unpack(data)), writable=True)

    return compress, decompress


def print_size(obj: Any) -> None:
    """Print the size of an object itself in megabytes."""
    print(f"{sys.getsizeof(obj) / 2**20} MB")


def print_error(text: str) -> None:
    """Print a text in red."""
    print(f"\033[91m{text}\033[0m")


def print_warning(text: str) -> None:
    """Print a text in yellow."""
    print(f"\033[93m{text}\033[0m")
