"""The formats in which images travel, each as one file: what it is given comes back in that shape.

What arrives may come from anybody. So the file's own header is read first, and nothing is decoded,
and no memory taken, unless it says exactly what the message says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.core.message import together
from edgeml.extras import has_pillow, has_simplejpeg, load_pillow, load_simplejpeg
from edgeml.images.files import decode_image, encode_image

__all__ = [
    "MOST_BYTES",
    "Format",
    "Jpeg",
    "Pixels",
    "Png",
    "check",
    "decode_into",
    "in_threads",
    "readable",
    "resize",
]

Pixels: TypeAlias = "np.ndarray[Any, Any]"
A = TypeVar("A")
B = TypeVar("B")

MOST_BYTES = 1 << 28
"""Of all images of a message, decoded."""

_BILINEAR = 2  # Pillow's number
_MOST_THREADS = 8
_WORTH_A_THREAD = 1 << 17  # bytes of pixels; a thread takes 60 us to start, these some 200
_MOST_SEGMENTS = 1000  # of a JPEG, before its size is told
_BASELINE = (0xC0, 0xC1)
_PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_PNG_CHANNELS = {0: 1, 2: 3, 6: 4}  # by its color type


@dataclass(frozen=True)
class Jpeg:
    """JPEG: a tenth of the size or less, and not exact. Holds 1 or 3 channels (RGB).

    Attributes:
        quality: 1 to 100; 90 can hardly be told from the original.
        size: (height, width) that images are resized to first, keeping their aspect, with black
            on the sides where it differs; None for as they are. Resizing needs Pillow.

    Raises:
        ValueError: no such quality or size.
    """

    quality: int = 90
    size: tuple[int, int] | None = None

    name: ClassVar[str] = "jpeg"
    channels: ClassVar[tuple[int, ...]] = (1, 3)

    def __post_init__(self) -> None:
        if type(self.quality) is not int or not 1 <= self.quality <= 100:
            raise ValueError(f"quality is an int from 1 to 100, not {self.quality!r}")
        object.__setattr__(self, "size", _checked(self.size))

    def encode(self, pixels: Pixels) -> bytes:
        """Return a file of pixels of shape (height, width, channels)."""
        if not has_simplejpeg():
            return encode_image(pixels, "jpeg", self.quality)
        # Color at half the resolution, which is what cameras give and eyes see: two thirds of
        # the size (measured: 640x480, 44 and 65 kB).
        sampling, space = ("420", "RGB") if pixels.shape[2] == 3 else ("Gray", "GRAY")
        return bytes(
            load_simplejpeg().encode_jpeg(
                np.ascontiguousarray(pixels), self.quality, space, sampling
            )
        )


@dataclass(frozen=True)
class Png:
    """PNG: exact. Of camera's pictures about half the size, and slow. Needs Pillow.

    Attributes:
        size: as for `Jpeg`.

    Raises:
        ValueError: no such size.
    """

    size: tuple[int, int] | None = None

    name: ClassVar[str] = "png"
    channels: ClassVar[tuple[int, ...]] = (1, 3, 4)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _checked(self.size))

    def encode(self, pixels: Pixels) -> bytes:
        """Return a file of pixels of shape (height, width, channels)."""
        return encode_image(pixels, "png")


Format: TypeAlias = Jpeg | Png


def readable() -> list[str]:
    """The names of the formats that are encoded and decoded here, with what is installed."""
    if has_pillow():
        return [Jpeg.name, Png.name]
    return [Jpeg.name] if has_simplejpeg() else []


def _checked(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    match size:
        case (int(height), int(width)) if 0 < height < 1 << 16 and 0 < width < 1 << 16:
            return height, width
    raise ValueError(f"size is a height and a width, or None, not {size!r}")


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return pixels of shape (height, width, channels) in another size.

    The whole image is there, in the middle and in its own aspect; the rest is black.
    """
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    scale = min(height / pixels.shape[0], width / pixels.shape[1])
    inner_height = min(height, max(1, round(pixels.shape[0] * scale)))
    inner_width = min(width, max(1, round(pixels.shape[1] * scale)))
    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    scaled = load_pillow().fromarray(flat).resize((inner_width, inner_height), _BILINEAR)
    out = np.zeros((height, width, pixels.shape[2]), np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    inner = np.asarray(scaled).reshape(inner_height, inner_width, -1)
    out[top : top + inner_height, left : left + inner_width] = inner
    return out


# Reading ----------------------------------------------------------------------------------


def check(format: str, data: memoryview, shape: tuple[int, int, int]) -> None:
    """Read a file's header, which takes no memory.

    Args:
        format: its name.
        data: the file, which may come from anybody.
        shape: (height, width, channels) that it must have.

    Raises:
        Malformed: it has another format or shape.
    """
    try:
        found = _jpeg_shape(data) if format == "jpeg" else _png_shape(data)
    except (IndexError, struct.error):
        raise Malformed(f"a {format} file that ends early") from None
    if found != shape:
        raise Malformed(f"an image of shape {found} where the message says {shape}")


def decode_into(format: str, data: memoryview, out: Pixels) -> None:
    """Decode a file that was checked into an array of its shape, contiguous in C order.

    Raises:
        Malformed: it is damaged.
        ImportError: what decodes it isn't installed.
    """
    if format == "jpeg" and has_simplejpeg():
        space = "RGB" if out.shape[2] == 3 else "GRAY"
        try:
            load_simplejpeg().decode_jpeg(data, space, buffer=out)
        except ValueError as error:
            raise Malformed(f"not an image: {error}") from None
    else:
        np.copyto(out, decode_image(data, out.shape), casting="no")


def _jpeg_shape(data: memoryview) -> tuple[int, int, int]:
    """What a JPEG's frame header says. (Of the two libraries one reads the first, one the last.)"""
    if bytes(data[:2]) != b"\xff\xd8":
        raise Malformed("not a JPEG")
    at = 2
    for _ in range(_MOST_SEGMENTS):
        mark, kind = data[at], data[at + 1]
        (length,) = struct.unpack_from(">H", data, at + 2)
        if mark != 0xFF or length < 2:
            break
        if kind in _BASELINE:
            depth, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if depth != 8:
                raise Malformed(f"a JPEG of {depth} bits")
            return height, width, channels
        # A progressive file of a few bytes can keep a decoder busy for long.
        if 0xC0 < kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            raise Malformed("a JPEG that isn't baseline")
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xDA:
            break
        at += 2 + length
    raise Malformed("a JPEG without its size in front")


def _png_shape(data: memoryview) -> tuple[int, int, int]:
    """What a PNG's header says."""
    if bytes(data[:16]) != _PNG_HEAD:
        raise Malformed("not a PNG")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    if depth != 8 or color not in _PNG_CHANNELS:
        raise Malformed(f"a PNG of {depth} bits and color type {color}: 8 bits; gray, RGB or RGBA")
    return height, width, _PNG_CHANNELS[color]


# Several at a time ------------------------------------------------------------------------


def in_threads(function: Callable[[A], B], jobs: Sequence[A], n_bytes: int) -> list[B]:
    """Do several jobs at a time, where they are worth it; raises what the first that fails does."""
    helpers = min(len(jobs), os.cpu_count() or 1, n_bytes // _WORTH_A_THREAD, _MOST_THREADS) - 1
    if helpers < 1:
        return [function(job) for job in jobs]
    results: list[Any] = [None] * len(jobs)
    left = iter(enumerate(jobs))
    errors: list[BaseException] = []

    def work() -> None:
        for i, job in left:  # whoever is free takes the next
            if errors:
                return
            try:
                results[i] = function(job)
            except BaseException as error:
                errors.append(error)

    together(work, helpers)
    if errors:
        raise errors[0]
    return results
