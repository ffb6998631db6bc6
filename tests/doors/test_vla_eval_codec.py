"""The messages of vla-eval's protocol, as `edgeml_vla_eval.codec` reads and writes them."""

from __future__ import annotations

import io
import random
import tracemalloc
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from edgeml_vla_eval.codec import read, read_payload, write, write_action
from PIL import Image

from edgeml import Limits
from edgeml.core import Malformed, NotEncodable
from edgeml.images import formats
from edgeml.testing.doors import mutate

RNG = np.random.default_rng(14)
DTYPES = ["?", "i1", "u1", "<i2", ">u2", "<i4", ">i4", "<i8", "<u8", "<f2", "<f4", ">f4", "<f8"]
pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


def message(payload: Any, **other: Any) -> bytes:
    return pack(
        {"type": "observation", "payload": payload, "seq": 7, "timestamp": 1700000000.5, **other}
    )


def decoded(payload: Any, limits: Limits | None = None) -> Any:
    data = message(payload)
    return read_payload(data, read(data), limits or Limits())


def array(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "__ndarray__": True,
        "data": value.tobytes(),
        "dtype": value.dtype.str,
        "shape": list(value.shape),
    }


def image(pixels: np.ndarray[Any, Any], format: str, **options: Any) -> dict[str, Any]:
    if format == "raw":
        return {"__image__": True, "format": "raw", **dict(list(array(pixels).items())[1:])}
    file = io.BytesIO()
    flat = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    Image.fromarray(flat).save(file, format.upper(), **options)
    shape = list(pixels.shape)
    return {"__image__": True, "format": format, "data": file.getvalue(), "shape": shape}


def pixels(channels: int = 3, height: int = 20, width: int = 30) -> np.ndarray[Any, Any]:
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 3 + columns * (channel + 1) for channel in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def answered(result: Any) -> Any:
    """What a client reads of a result, arrays put together as its own codec does."""
    said = unpack(write_action(result, 7))
    assert said["type"] == "action"
    assert said["seq"] == 7
    return restored(said["payload"])


def restored(value: Any) -> Any:
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__ndarray__" in value:
        assert set(value) == {"__ndarray__", "data", "dtype", "shape"}
        assert value["__ndarray__"] is True
        data, dtype, shape = value["data"], value["dtype"], value["shape"]
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    return {key: restored(item) for key, item in value.items()}


def same(found: Any, expected: np.ndarray[Any, Any]) -> bool:
    return (
        isinstance(found, np.ndarray)
        and found.dtype.str == expected.dtype.str
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


# What arrives -----------------------------------------------------------------------------


def test_a_message_is_read_but_for_its_payload() -> None:
    received = read(message({"a": 1}, seq=41))
    assert (received.type, received.seq) == ("observation", 41)
    assert bytes(received.payload) == pack({"a": 1})


def test_a_message_needs_no_time_and_may_have_other_keys() -> None:
    data = pack({"also": [{}], "payload": {}, "seq": 2**64 - 1, "type": "hello"})
    assert (read(data).type, read(data).seq) == ("hello", 2**64 - 1)


@pytest.mark.parametrize(
    "data",
    [
        "a text",
        b"",
        b"\xc1",
        b"\x84",
        pack([1]),
        pack(None),
        pack({"type": "observation", "seq": 1}),
        pack({"type": "observation", "payload": {}}),
        pack({"payload": {}, "seq": 1}),
        message({}, seq=1.5),
        message({}, seq="1"),
        message({}, seq=None),
        message({}, seq=True),
        message({}, type=b"hello"),
        message({}) + b"\0",
        message({})[:-1],
        b"\x83\xa4type\xa1\xff\xa7payload\x80\xa3seq\x01",
        b"\x81\xa1x" + b"\x91" * 100_000,
        b"\x81\xa7payload" + b"\x91" * 100_000,
    ],
)
def test_what_is_no_message_is_refused(data: bytes | str) -> None:
    with pytest.raises(Malformed):
        read(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_an_array_arrives_as_it_was(dtype: str, shape: tuple[int, ...]) -> None:
    sent = RNG.integers(0, 2, shape).astype(dtype)
    found = decoded({"nested": [{"x": array(sent)}]})["nested"][0]["x"]
    assert same(found, sent.astype(sent.dtype.newbyteorder("=")))
    assert not found.size or not found.flags.writeable


def test_the_rest_of_a_payload_arrives_as_it_was() -> None:
    sent = {
        "task_description": "lift the ölkanne",
        "plain": [None, True, -1, 2**64 - 1, 0.1, b"bytes", [], {}],
        "nested": {"deeper": {"x": [1, [2, [3]]]}},
    }
    assert decoded(sent) == sent


def test_a_payload_may_be_anything() -> None:
    assert decoded(3) == 3
    assert same(decoded(array(np.arange(3))), np.arange(3))
    assert same(decoded(image(pixels(), "png")), pixels())


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("format", ["raw", "png"])
def test_an_image_arrives_as_it_was(format: str, channels: int) -> None:
    found = decoded({"images": {"wrist": image(pixels(channels), format)}})["images"]["wrist"]
    assert same(found, pixels(channels))
    assert not found.flags.writeable


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_arrives_as_whoever_decodes_it_sees_it(channels: int) -> None:
    said = image(pixels(channels), "jpeg", quality=95)
    found = decoded({"wrist": said})["wrist"]
    seen = np.asarray(Image.open(io.BytesIO(said["data"]))).reshape(found.shape).astype(int)
    assert found.shape == (20, 30, channels)
    assert np.abs(found - seen).max() <= 2
    assert np.abs(found - pixels(channels).astype(int)).mean() < 12


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_a_gray_image_may_have_no_axis_of_channels(format: str) -> None:
    said = image(pixels(1)[:, :, 0], format)
    assert decoded({"wrist": said})["wrist"].shape == (20, 30)


def test_many_images_arrive_each_in_its_place() -> None:
    sent = [RNG.integers(0, 256, (64, 96, 3), np.uint8) for _ in range(6)]
    said = {"images": [image(each, "png") for each in sent], "state": array(np.arange(7.0))}
    found = decoded(said)
    assert all(map(same, found["images"], sent))
    assert same(found["state"], np.arange(7.0))


RAW, PNG, JPEG = (image(pixels(), format) for format in ("raw", "png", "jpeg"))
PALETTE = io.BytesIO()
Image.fromarray(pixels()).convert("P").save(PALETTE, "PNG")
DEEP = io.BytesIO()
Image.fromarray(pixels(1)[:, :, 0].astype(np.uint16)).save(DEEP, "PNG")
PROGRESSIVE = image(pixels(), "jpeg", progressive=True)
ARRAY = array(np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({**ARRAY, "shape": [2, 4]}, "32 bytes, and 24 came"),
        ({**ARRAY, "shape": [2, -3]}, "is no shape"),
        ({**ARRAY, "shape": [2, 3.0]}, "is no shape"),
        ({**ARRAY, "shape": [1 << 40]}, "24 came"),
        ({**ARRAY, "shape": 6}, "a shape is a list"),
        ({**ARRAY, "dtype": "<f8"}, "24 came"),
        *(({**ARRAY, "dtype": d}, "not taken") for d in ("|O", "|V4", "<c8", "<M8", "<U1", "S4")),
        ({**ARRAY, "dtype": "f4,f4"}, "is no dtype"),
        ({**ARRAY, "dtype": 4}, "a dtype is a text"),
        ({**ARRAY, "data": "abc"}, "data are bytes"),
        ({"__ndarray__": True}, "a dtype is a text"),
        ({"__image__": True}, "format None"),
        ({**RAW, "shape": [20, 30, 4]}, "1800 came"),
        ({**RAW, "dtype": "|O"}, "not taken"),
        ({"__image__": True, "format": "raw", "data": b"", "shape": [0]}, "a dtype is a text"),
        ({**PNG, "shape": [20, 30, 4]}, "shape (20, 30, 3) where the message says (20, 30, 4)"),
        ({**PNG, "shape": [20, 30]}, "where the message says (20, 30, 1)"),
        ({**PNG, "shape": [20, 30, 3, 1]}, "height, width, channels"),
        ({**PNG, "shape": [20.0, 30, 3]}, "height, width, channels"),
        ({**PNG, "shape": None}, "height, width, channels"),
        ({**PNG, "shape": [1 << 30, 1 << 30, 3]}, "where the message says"),
        ({**PNG, "format": "jpeg"}, "not a JPEG"),
        ({**JPEG, "format": "png"}, "not a PNG"),
        ({**PNG, "format": "webp"}, "format 'webp', which is not known here"),
        ({**PNG, "format": ["png"]}, "not known here"),
        ({**PNG, "data": "text"}, "data are bytes"),
        ({**PNG, "data": b""}, "not a PNG"),
        ({**PNG, "data": PNG["data"][:60]}, "image"),
        ({**PNG, "data": PALETTE.getvalue()}, "color type 3"),
        ({**PNG, "data": DEEP.getvalue(), "shape": [20, 30, 1]}, "16 bits"),
        ({**JPEG, "data": JPEG["data"][:40]}, "ends early"),
        (PROGRESSIVE, "isn't baseline"),
    ],
)
def test_what_is_no_array_and_no_image_is_refused_by_its_place(said: Any, why: str) -> None:
    with pytest.raises(Malformed) as raised:
        decoded({"images": [{"wrist": said}]})
    assert why in str(raised.value)
    assert str(raised.value).startswith("payload['images'][0]['wrist']: ")


def test_images_too_large_together_are_refused_before_there_is_memory_for_them() -> None:
    # Files that say that they have 201 MB each, as the message does.
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x20\0\0\0\x20\0\x08\x02"
    large = {**PNG, "data": head + bytes(100), "shape": [8192, 8192, 3]}
    data = message({"one": large, "two": large})
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="at most 33554432"):
            read_payload(data, read(data))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_images_need_what_decodes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "has_pillow", lambda: False)
    with pytest.raises(Malformed, match="pip install"):
        decoded({"wrist": PNG})
    assert same(decoded({"wrist": RAW})["wrist"], pixels())


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ({1: 2}, "a key that is not a str"),
        ({b"key": 2}, "a key that is not a str"),
        ({"x": msgspec.msgpack.Ext(5, b"abc")}, "unknown ext 5"),
        ({"x": datetime.fromtimestamp(0).astimezone()}, "unknown ext"),
        ({"x": list(range(200))}, "more values"),
        ({"x": [[[[[[[[[]]]]]]]]]}, "nested more than"),
    ],
)
def test_a_payload_of_more_than_is_taken_is_refused(payload: Any, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        decoded(payload, Limits(nodes=100, nesting=8))


def test_a_payload_whose_text_is_no_text_is_refused() -> None:
    data = message({"x": "ab"}).replace(b"\xa2ab", b"\xa2\xff\xff")
    with pytest.raises(Malformed, match="payload: "):
        read_payload(data, read(data))


# What is sent -----------------------------------------------------------------------------


def test_a_message_has_four_keys() -> None:
    said = unpack(write("hello", {"protocol_version": 1}, 3))
    assert list(said) == ["type", "payload", "seq", "timestamp"]
    assert (said["type"], said["payload"], said["seq"]) == ("hello", {"protocol_version": 1}, 3)
    assert abs(said["timestamp"] - datetime.now().timestamp()) < 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_an_array_is_sent_as_it_is(dtype: str, shape: tuple[int, ...]) -> None:
    sent = RNG.integers(0, 2, shape).astype(dtype)
    little = sent.astype(sent.dtype.newbyteorder("<"))
    assert same(answered({"actions": sent})["actions"], little)
    assert same(answered({"actions": sent.T})["actions"], little.T)


def test_an_array_that_is_not_contiguous_is_sent_as_it_is() -> None:
    sent = np.arange(24.0).reshape(4, 6)[::-2, 1::2]
    assert same(answered([{"deep": (sent,)}])["actions"][0]["deep"][0], sent)


def test_images_are_sent_as_arrays_and_exact() -> None:
    assert same(answered({"goal": pixels()})["goal"], pixels())


def test_scalars_of_numpy_are_numbers() -> None:
    result = {
        "a": np.float32(0.1),
        "b": np.int8(-3),
        "c": np.bool_(True),
        "d": np.uint64(2**64 - 1),
    }
    found = answered(result)
    assert found == {"a": float(np.float32(0.1)), "b": -3, "c": True, "d": 2**64 - 1}
    assert [type(value) for value in found.values()] == [float, int, bool, int]


class OnDevice:
    """As JAX's arrays are."""

    def copy_to_host_async(self) -> None: ...

    def __array__(self, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
        return np.arange(3.0)


class Level(IntEnum):
    HIGH = 3


class Gripper(str, Enum):
    OPEN = "open"


@dataclass
class Plan:
    actions: Any
    level: Level = Level.HIGH


Chunk = namedtuple("Chunk", "actions horizon")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({}, {}),
        (
            {"a": None, "b": [1, (2.5, "x")], "c": b"d"},
            {"a": None, "b": [1, [2.5, "x"]], "c": b"d"},
        ),
        (OrderedDict(a=bytearray(b"x")), {"a": b"x"}),
        (MappingProxyType({"a": memoryview(b"x")}), {"a": b"x"}),
        (Plan([1]), {"actions": [1], "level": 3}),
        (Chunk([1], 2), {"actions": [1], "horizon": 2}),
        (
            {"a": Gripper.OPEN, "b": np.str_("x"), "c": np.bytes_(b"x")},
            {"a": "open", "b": "x", "c": b"x"},
        ),
        ([1.0, 2.0], {"actions": [1.0, 2.0]}),
        (3, {"actions": 3}),
        (None, {"actions": None}),
    ],
)
def test_a_result_is_a_map_or_lies_in_one_under_actions(result: Any, expected: Any) -> None:
    assert answered(result) == expected


def test_an_array_alone_lies_under_actions() -> None:
    assert same(answered(np.arange(7.0))["actions"], np.arange(7.0))
    assert same(answered(OnDevice())["actions"], np.arange(3.0))
    assert answered(np.float64(2.0)) == {"actions": 2.0}


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (1j, "builtins.complex"),
        ({1, 2}, "builtins.set"),
        (object(), "builtins.object"),
        (datetime(2026, 1, 1), "datetime.datetime"),
        (np.zeros(3, complex), "dtype complex128"),
        (np.complex64(1), "dtype complex64"),
        (np.zeros(3, "M8[s]"), "dtype datetime64[s]"),
        (np.array([None]), "dtype object"),
        (np.array(["x"]), "dtype <U1"),
        (np.zeros(3, [("x", "f4")]), "dtype [('x', '<f4')]"),
        (np.ma.masked_array([1.0], [True]), "MaskedArray"),
        (LOOP, "nested more than 32 deep"),
        ({3: 1}, "has the key 3"),
        ({b"k": 1}, "has the key b'k'"),
        ({"__ndarray__": 1}, "has the key '__ndarray__'"),
        ({"__image__": 1}, "has the key '__image__'"),
    ],
)
def test_what_cannot_be_said_is_refused_by_its_place(value: Any, why: str) -> None:
    with pytest.raises(NotEncodable) as raised:
        write_action({"plans": [{"best": value}]}, 1)
    assert str(raised.value).startswith("result['plans'][0]['best']")
    assert why in str(raised.value)


def test_numbers_and_texts_that_messagepack_lacks_are_refused() -> None:
    with pytest.raises(NotEncodable, match="64 bits"):
        write_action({"a": 1 << 64}, 1)
    with pytest.raises(NotEncodable, match="surrogates"):
        write_action({"a": "\ud800"}, 1)


@pytest.mark.skipif(np.dtype("longdouble").itemsize == 8, reason="no wider float here")
def test_floats_that_differ_from_machine_to_machine_are_refused() -> None:
    with pytest.raises(NotEncodable, match=r"use \.astype"):
        write_action({"a": np.zeros(2, "longdouble")}, 1)
    with pytest.raises(NotEncodable, match=r"use \.astype"):
        write_action({"a": np.longdouble(1)}, 1)


def test_bfloat16_is_to_be_converted() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(NotEncodable, match="bfloat16"):
        write_action({"a": np.zeros(2, ml_dtypes.bfloat16)}, 1)


# Spoilt on the way ------------------------------------------------------------------------


def test_a_message_that_was_spoilt_is_read_or_refused() -> None:
    rng = random.Random(14)
    state = {"state": array(np.arange(7.0)), "task": "lift", "mask": [array(np.ones(3, bool))]}
    small = [image(pixels(3, 4, 5), format) for format in ("raw", "png", "jpeg")]
    valid = message({"images": small, **state})
    refused = 0
    for _ in range(3000):
        spoilt = mutate(valid, rng)
        try:
            read_payload(spoilt, read(spoilt))
        except Malformed:
            refused += 1
    assert 300 < refused < 3000
