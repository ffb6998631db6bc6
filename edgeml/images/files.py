"""Images as PNG and JPEG files in memory. Needs Pillow, which is imported when it is used."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.extras import load_pillow

__all__ = ["decode_image", "encode_image"]

_Pixels = np.ndarray[Any, Any]

_FORMATS = ("PNG", "JPEG", "BMP", "GIF")  # that are decoded
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def encode_image(pixels: _Pixels, format: Literal["png", "jpeg"], quality: int = 95) -> bytes:
    """Return the bytes of an image file.

    Args:
        pixels: of shape (height, width, channels) uint8, with 1, 3 (RGB) or 4 channels (RGBA).
        format: "png", which is exact; or "jpeg", which takes a tenth of the room, and has no
            fourth channel.
        quality: of a JPEG, 1 to 100.

    Raises:
        ImportError: Pillow is not installed.
        ValueError, OSError: what the format doesn't hold, as Pillow says it.
    """
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    # What a camera sees has noise, in which runs alone repeat. With Pillow's own settings a PNG of
    # it takes 2.5 times as long, for a file of the same size (measured: 640x480, 89 and 35 ms);
    # at the same level without this, 1.4 times as long for a file that is longer by an eighth.
    png = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    options = {"quality": quality} if format == "jpeg" else png
    file = io.BytesIO()
    load_pillow().fromarray(pixels).save(file, format.upper(), **options)
    return file.getvalue()


def decode_image(
    data: Any, shape: Sequence[int | None] = (None, None, None), dtype: Any = np.uint8
) -> _Pixels:
    """Return the pixels of an image file, which may be one that was not asked for.

    Args:
        data: the bytes of a PNG, JPEG, BMP or GIF file.
        shape: (height, width, channels) that it is to have; None stands for any number. An image
            of another size is not decoded, which would take as much memory as the file says; to
            another number of channels it is converted.
        dtype: uint8, or uint16 for gray images of 16 bits.

    Returns:
        An array of shape (height, width, channels), which may be read-only.

    Raises:
        ImportError: Pillow is not installed.
        Malformed: not such an image.
    """
    height, width, channels = shape
    mode = _MODES.get(channels or 0)
    pillow = load_pillow()
    try:
        with pillow.open(io.BytesIO(data), formats=_FORMATS) as file:
            if height not in (None, file.height) or width not in (None, file.width):
                raise Malformed(f"an image of {file.height}x{file.width}, not {height}x{width}")
            if dtype == np.uint16:
                if not file.mode.startswith("I"):
                    raise Malformed(f"an image of mode {file.mode}, not of 16 bits")
                pixels = np.asarray(file).astype(np.uint16)
            else:
                pixels = np.asarray(file if mode in (None, file.mode) else file.convert(mode))
    except (Malformed, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises for what is no image
        raise Malformed(f"not an image: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
