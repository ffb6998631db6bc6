"""The codec that sends images as files: what it promises beside others, and what it refuses."""

from __future__ import annotations

import dataclasses
import struct
import sys
import threading
import tracemalloc
from collections import namedtuple
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeml.codecs.cloudpickle import CloudpickleCodec
from edgeml.codecs.msgpack import MsgpackCodec
from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.message import Message, is_owned
from edgeml.extras import has_simplejpeg
from edgeml.images import ImageCodec, Jpeg, Plan, Png
from edgeml.testing import CodecTests
from edgeml.testing.codecs import assert_same

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (12, 10, 3), np.uint8)
PLAN = {"image*": Png(), "photo*": Jpeg(95), "views.*": Png()}
codec = ImageCodec(MsgpackCodec(), Plan(PLAN))


def smooth(height: int = 96, width: int = 128) -> np.ndarray[Any, Any]:
    """What a JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / 40 + i) + 50 * np.cos(y / 30 - i) for i in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def received(message: Message) -> Message:
    return Message(message.header, [memoryview(bytes(buffer)) for buffer in message.buffers])


def round_trip(value: Any, *, writable: bool = False) -> Any:
    return codec.decode(received(codec.encode(value)), writable=writable)


def forged(entries: Any, *files: bytes, inner: bytes = b"\x81\xa5image\xc0") -> Message:
    header = b"\xc1" + msgspec.msgpack.encode([inner, entries])
    return Message(header, list(map(memoryview, files)))


class TestMsgpackWithImages(CodecTests):
    # The suite has an array of 32 channels by the name of "image".
    codec = ImageCodec(MsgpackCodec(), Plan({"photo*": Jpeg(), "views.*": Png()}))


class TestCloudpickleWithImages(CodecTests):
    codec = ImageCodec(CloudpickleCodec(), Plan({"photo*": Jpeg()}))


# Images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(12, 10), (12, 10, 1), (12, 10, 3), (12, 10, 4), (1, 1), (5, 12, 10, 3), (2, 3, 4, 4, 1)],
    ids=str,
)
@pytest.mark.parametrize("writable", [False, True])
def test_images_of_any_shape_arrive_as_they_were(shape, writable):
    image = RNG.integers(0, 256, shape, np.uint8)
    value = {"step": 1, "image": image, "nested": [({"image_2": image[::-1]}, 2.5), image]}
    message = codec.encode(value)
    got = codec.decode(received(message), writable=writable)
    assert_same(got, value)
    assert got["image"].flags.writeable is writable
    assert got["nested"][0][0]["image_2"].flags.writeable is writable
    if not writable:
        with pytest.raises(ValueError, match="WRITEABLE"):
            got["image"].flags.writeable = True


@pytest.mark.parametrize("shape", [(96, 128), (96, 128, 1), (96, 128, 3), (4, 96, 128, 3)], ids=str)
def test_a_jpeg_is_small_and_nearly_the_same(shape):
    channels = shape[-1] if len(shape) > 2 else 1
    photo = np.broadcast_to(smooth()[:, :, :channels], (*shape[:-3], 96, 128, channels))
    photo = photo.reshape(shape)
    message = codec.encode({"photo": photo})
    assert message.nbytes < photo.nbytes / 4
    got = codec.decode(received(message))["photo"]
    assert got.shape == photo.shape
    assert np.abs(got.astype(int) - photo).mean() < 3


def test_without_images_the_bytes_are_those_of_the_other_codec():
    for value in ({"state": COLOR, "x": [1, (2, {"y": None})]}, 5, COLOR, [COLOR, "image"]):
        assert codec.encode(value) == MsgpackCodec().encode(value)
    none = ImageCodec(MsgpackCodec())
    assert none.encode({"image": COLOR}) == MsgpackCodec().encode({"image": COLOR})


def test_a_message_begins_with_what_no_other_codec_takes():
    message = codec.encode({"image": COLOR})
    assert message.header[0] == 0xC1
    for other in (MsgpackCodec(), CloudpickleCodec()):
        with pytest.raises(Malformed):
            other.decode(message)


def test_one_codec_in_another_is_taken_apart_again():
    twice = ImageCodec(codec)
    message = twice.encode({"image": COLOR})
    assert_same(twice.decode(message), {"image": COLOR})
    assert_same(codec.decode(codec.encode({"image": COLOR})), {"image": COLOR})


def test_what_is_an_image_is_told_by_the_last_keys():
    plan = Plan({"image*": Png(), "views.*": Jpeg(), "observation.images.top": Jpeg(50)})
    found = {
        "image": Png(),
        "obs.image_0": Png(),
        "image.raw": None,
        "views": None,
        "robot.views.left": Jpeg(),
        "left": None,
        "observation.images.top": Jpeg(50),
        "images.top": None,
        "": None,
    }
    assert {name: plan.format(name) for name in found} == found
    assert plan.take({"observation.images.top": COLOR})[1][0].format == Jpeg(50)
    assert plan.take({"views": {"left": [COLOR, (COLOR,)]}})[0] == {
        "views": {"left": [None, (None,)]}
    }
    assert ImageCodec(MsgpackCodec(), Plan({"*": Png()})).encode(COLOR).header[0] == 0xC1


Pair = namedtuple("Pair", "image other")


@dataclasses.dataclass
class Seen:
    image: Any
    at: float


def test_other_containers_arrive_as_dicts():
    value = {"a": Pair(COLOR, 1), "b": Seen(COLOR, 2.5)}
    expected = {"a": {"image": COLOR, "other": 1}, "b": {"image": COLOR, "at": 2.5}}
    assert_same(round_trip(value), expected)
    assert value["b"].image is COLOR  # and the sender's own isn't changed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"image": 3}, r"value\['image'\] is 3, not an image"),
        ({"image": None}, r"value\['image'\] is None"),
        ({"image": [1, 2]}, r"value\['image'\]\[0\] is 1"),
        ({"image": b"\xff\xd8"}, "not an image"),
        ({"a": [{"image": COLOR.astype("f4")}]}, r"value\['a'\]\[0\]\['image'\] has dtype float32"),
        ({"image": COLOR[..., :2]}, "channels"),
        ({"image": COLOR[0, :, 0]}, r"shape \(10,\)"),
        ({"image": COLOR[:0]}, r"shape \(0, 10, 3\)"),
        ({"image": {1, 2}}, "no array"),
        ({"image": object()}, "no array"),
        ({"views": {True: COLOR}}, "key of type bool"),
        ({"photo": RNG.integers(0, 256, (4, 4, 4), np.uint8)}, r"4 channels.*use Png\(\)"),
        ({"photo": np.broadcast_to(np.uint8(0), (1, 70_000))}, "65500 pixels"),
        ({"photo": np.broadcast_to(np.uint8(0), (400, 1000, 1000, 1))}, "several parts"),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_what_should_be_an_image_and_is_none_is_refused_by_its_path(value, text):
    with pytest.raises(NotEncodable, match=text):
        codec.encode(value)


def test_images_of_jax_are_fetched():
    jax = pytest.importorskip("jax")
    assert_same(round_trip({"image": jax.numpy.asarray(COLOR)}), {"image": COLOR})


@pytest.mark.parametrize("shape", [(40, 20, 3), (20, 40, 1), (16, 16), (3, 40, 20, 3)], ids=str)
def test_images_are_resized_within_their_aspect(shape):
    other = ImageCodec(MsgpackCodec(), Plan({"image": Png(size=(16, 16))}))
    got = other.decode(other.encode({"image": np.full(shape, 200, np.uint8)}))["image"]
    expected = list(shape)
    at = len(shape) - (3 if len(shape) > 2 else 2)
    expected[at : at + 2] = 16, 16
    assert got.shape == tuple(expected)
    one = got.reshape(-1, 16, 16, shape[-1] if len(shape) > 2 else 1)[0, :, :, 0]
    if shape == (20, 40, 1):
        one = one.T
    if shape != (16, 16):
        assert (one[:, :4] == 0).all()
        assert (one[:, 12:] == 0).all()
        one = one[:, 4:12]
    assert (one == 200).all()


def test_the_sender_may_change_its_image_once_it_is_encoded():
    image = COLOR.copy()
    large = np.zeros(100_000)
    message = codec.encode_owned({"image": image, "large": large})
    image[:], large[:] = 0, 1
    assert all(map(is_owned, message.buffers))
    assert_same(codec.decode(message), {"image": COLOR, "large": np.zeros(100_000)})


def test_several_images_are_done_in_several_threads(monkeypatch):
    seen, barrier = set[int](), threading.Barrier(2)
    encode = Png.encode

    def meet(self, pixels):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            barrier.wait(30)
        return encode(self, pixels)

    monkeypatch.setattr(Png, "encode", meet)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    large = RNG.integers(0, 256, (4, 200, 300, 3), np.uint8)
    before = threading.active_count()
    assert_same(round_trip({"image": large}), {"image": large})
    assert len(seen) == 2
    assert threading.active_count() == before


# Bytes that nobody encoded ----------------------------------------------------------------

PNG = Png().encode(COLOR)
JPEG = Jpeg().encode(smooth())
ENTRY = [["image"], "png", [12, 10, 3]]


def png_of(height: int, width: int, depth: int = 8, color: int = 2) -> bytes:
    return PNG[:16] + struct.pack(">IIBB", width, height, depth, color) + PNG[26:]


def jpeg_of(height: int, width: int) -> bytes:
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def test_a_forged_message_that_is_right_is_taken():
    assert_same(codec.decode(forged([ENTRY], PNG)), {"image": COLOR})


@pytest.mark.parametrize(
    "message",
    {
        "no array": Message(b"\xc1"),
        "something after it": Message(b"\xc1" + msgspec.msgpack.encode([b"\xc0", []]) + b"\0"),
        "other types": forged([["image", "png", [12, 10, 3]]], PNG),
        "no file": forged([ENTRY]),
        "a file too many": forged([ENTRY], PNG, PNG),
        "fewer files than a stack has": forged([[["image"], "png", [2, 12, 10, 3]]], PNG),
        "no such key": forged([[["other"], "png", [12, 10, 3]]], PNG),
        "a key too many": forged([[["image", "x"], "png", [12, 10, 3]]], PNG),
        "no key": forged([[[], "png", [12, 10, 3]]], PNG),
        "no keys, twice": forged([[[], "png", [12, 10, 3]]] * 2, PNG, PNG, inner=b"\xc0"),
        "an index where there is a key": forged([[[0], "png", [12, 10, 3]]], PNG),
        "a place that is taken": forged([ENTRY], PNG, inner=b"\x81\xa5image\x01"),
        "one place twice": forged([ENTRY, ENTRY], PNG, PNG),
        "one in another": forged([ENTRY, [["image", 0], "png", [12, 10, 3]]], PNG, PNG),
        "another in one": forged([[["image", 0], "png", [12, 10, 3]], ENTRY], PNG, PNG),
        "an index too large": forged([[[1], "png", [12, 10, 3]]], PNG, inner=b"\x91\xc0"),
        "an index below zero": forged([[[-1], "png", [12, 10, 3]]], PNG, inner=b"\x91\xc0"),
        "a key of a list": forged([[["0"], "png", [12, 10, 3]]], PNG, inner=b"\x91\xc0"),
        "a path without end": forged([[[0] * 1000, "png", [12, 10, 3]]], PNG, inner=b"\x91\xc0"),
        "another format": forged([[["image"], "gif", [12, 10, 3]]], PNG),
        "a png as jpeg": forged([[["image"], "jpeg", [12, 10, 3]]], PNG),
        "a jpeg as png": forged([[["image"], "png", [96, 128, 3]]], JPEG),
        "another shape": forged([[["image"], "png", [10, 12, 3]]], PNG),
        "other channels": forged([[["image"], "png", [12, 10, 4]]], PNG),
        "two channels": forged([[["image"], "png", [12, 10, 2]]], PNG),
        "one dimension": forged([[["image"], "png", [12]]], PNG),
        "many dimensions": forged([[["image"], "png", [1] * 100 + [12, 10, 3]]], PNG),
        "a negative shape": forged([[["image"], "png", [-1, -12, 10, 3]]], PNG),
        "a stack of none": forged([[["image"], "png", [0, 12, 10, 3]]]),
        "a cut png": forged([ENTRY], PNG[:-40]),
        "a cut head": forged([ENTRY], PNG[:20]),
        "nothing": forged([ENTRY], b""),
        "a cut jpeg": forged([[["image"], "jpeg", [96, 128, 3]]], JPEG[:-200]),
        "a cut jpeg's head": forged([[["image"], "jpeg", [96, 128, 3]]], JPEG[:30]),
        "a jpeg's ends": forged([[["image"], "jpeg", [96, 128, 3]]], b"\xff\xd8\xff\xd9"),
        "16 bits": forged([ENTRY], png_of(12, 10, 16)),
        "a palette": forged([ENTRY], png_of(12, 10, 8, 3)),
        "a jpeg of more than it has": forged(
            [[["image"], "jpeg", [960, 128, 3]]], jpeg_of(960, 128)
        ),
        "damage": forged([[["image"], "jpeg", [96, 128, 3]]], JPEG[:700] + bytes(80) + JPEG[780:]),
    }.items(),
    ids=lambda pair: pair[0],
)
@pytest.mark.parametrize("pillow_alone", [False, True])
def test_forged_images_are_malformed(message, pillow_alone, monkeypatch):
    if pillow_alone:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    if not has_simplejpeg() and message[0] in ("damage", "a jpeg of more than it has"):
        pytest.skip("Pillow makes what it can of a damaged JPEG")
    with pytest.raises(Malformed):
        codec.decode(message[1])


@pytest.mark.parametrize(
    ("format", "shape", "file"),
    [
        ("jpeg", [60_000, 60_000, 3], jpeg_of(60_000, 60_000)),
        ("png", [60_000, 60_000, 3], png_of(60_000, 60_000)),
        ("jpeg", [96, 128, 3], jpeg_of(60_000, 60_000)),
        ("png", [12, 10, 3], png_of(60_000, 60_000)),
        ("jpeg", [1 << 60, 1 << 60, 1 << 60, 3], JPEG),
    ],
)
def test_an_image_that_claims_much_is_refused_before_memory_is_taken(format, shape, file):
    codec.decode(forged([ENTRY], PNG))  # which loads what there is to load
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            codec.decode(forged([[["image"], format, shape]], file))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_progressive_jpeg_is_refused():
    import io

    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(smooth()).save(file, "JPEG", progressive=True)
    with pytest.raises(Malformed, match="baseline"):
        codec.decode(forged([[["image"], "jpeg", [96, 128, 3]]], file.getvalue()))


def test_damaged_messages_are_values_or_malformed():
    message = codec.encode({"image": COLOR, "photos": [{"photo": smooth(16, 16)}], "x": (1, None)})
    rng = np.random.default_rng(1)
    for position in range(len(message.header)):
        for change in (1, 0x80, 0xFF, *rng.integers(1, 256, 2)):
            header = bytearray(message.header)
            header[position] ^= int(change)
            _value_or_malformed(Message(bytes(header), message.buffers))
        _value_or_malformed(Message(message.header[:position], message.buffers))
    for number, buffer in enumerate(message.buffers):
        for _ in range(200):
            damaged = bytearray(buffer)
            damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
            buffers = list(message.buffers)
            buffers[number] = memoryview(bytes(damaged))
            _value_or_malformed(Message(message.header, buffers))


def _value_or_malformed(message: Message) -> None:
    try:
        codec.decode(message)
    except Malformed:
        pass
    except BaseException as error:
        raise AssertionError(f"decoding {message.header!r} raised {error!r}") from error


# What is installed ------------------------------------------------------------------------


def test_either_library_reads_what_the_other_wrote(monkeypatch):
    pytest.importorskip("simplejpeg")
    both = codec.encode({"photo": smooth()})
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    pillow = codec.encode({"photo": smooth()})
    one = codec.decode(both)["photo"].astype(int)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    two = codec.decode(pillow)["photo"]
    assert np.abs(one - two).mean() < 2
    assert codec.encode({"photo": smooth()}) == both


def test_without_pillow_a_png_is_refused(monkeypatch):
    pytest.importorskip("simplejpeg")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Malformed, match="known here: jpeg"):
        codec.decode(forged([ENTRY], PNG))


@pytest.mark.parametrize("make", [lambda: Jpeg(0), lambda: Jpeg(101), lambda: Jpeg(90.0),
    lambda: Jpeg(size=5), lambda: Png((0, 5)), lambda: Png((1 << 20, 5))])  # fmt: skip
def test_a_format_that_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="is a"):
        make()
