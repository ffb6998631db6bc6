"""Image files in memory: what was encoded comes back, and nothing else is taken for an image."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from edgeml.core.errors import Malformed
from edgeml.images import decode_image, encode_image

RAMP = np.broadcast_to(np.linspace(0, 255, 32)[:, None, None], (32, 16, 4)).astype(np.uint8)


def pixels(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (5, 4, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_is_exact(channels):
    data = encode_image(pixels(channels), "png")
    assert data.startswith(b"\x89PNG")
    for like in (data, memoryview(data), np.frombuffer(data, np.uint8)):
        assert np.array_equal(decode_image(like), pixels(channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_nearly_the_same(channels):
    image = RAMP[:, :, :channels]
    found = decode_image(encode_image(image, "jpeg"))
    assert found.shape == image.shape
    assert np.abs(found.astype(int) - image).max() <= 4
    rough = encode_image(pixels(channels), "jpeg", quality=5)
    assert len(rough) < len(encode_image(pixels(channels), "jpeg"))


def test_a_jpeg_has_no_fourth_channel():
    with pytest.raises(OSError, match="RGBA"):
        encode_image(pixels(4), "jpeg")


def test_channels_are_converted_to_those_asked_for():
    gray = encode_image(RAMP[:, :, :1], "png")
    assert np.array_equal(decode_image(gray, (32, 16, 3)), RAMP[:, :, :3])


def test_one_of_another_size_is_not_decoded():
    data = encode_image(pixels(3), "png")
    for shape in ((6, 4, 3), (None, 5, 3)):
        with pytest.raises(Malformed, match="an image of 5x4, not"):
            decode_image(data, shape)


def test_images_of_16_bits():
    import PIL.Image

    depth = np.arange(20, dtype=np.uint16).reshape(5, 4) * 3000
    file = io.BytesIO()
    PIL.Image.fromarray(depth).save(file, "PNG")
    found = decode_image(file.getvalue(), (5, 4, 1), np.uint16)
    assert found.dtype == np.uint16
    assert np.array_equal(found[:, :, 0], depth)
    with pytest.raises(Malformed, match="not of 16 bits"):
        decode_image(encode_image(pixels(1), "png"), dtype=np.uint16)


@pytest.mark.parametrize("data", [b"", b"nothing", encode_image(pixels(3), "png")[:-30]])
def test_what_is_no_image_is_told(data):
    with pytest.raises(Malformed, match="not an image"):
        decode_image(data)


def test_without_pillow_it_says_what_to_install(monkeypatch):
    data = encode_image(pixels(3), "png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"edgeml-robotics\[images\]"):
        encode_image(pixels(3), "png")
    with pytest.raises(ImportError, match=r"edgeml-robotics\[images\]"):
        decode_image(data)
