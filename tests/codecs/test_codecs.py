"""The conformance suite for the two built-in codecs, and what each promises beyond it."""

import collections
import dataclasses
import datetime as dt
import enum
import gc
import math
import os
import queue
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import weakref
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeml.codecs import msgpack as module
from edgeml.codecs.cloudpickle import CloudpickleCodec
from edgeml.codecs.msgpack import MsgpackCodec
from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.limits import Limits
from edgeml.core.message import Message, Owned
from edgeml.core.plugins import load_codec
from edgeml.testing import CodecTests
from edgeml.testing.codecs import assert_same

codec = MsgpackCodec()


def round_trip(value: Any, writable: bool = False) -> Any:
    message = codec.encode(value)
    buffers = [memoryview(bytes(b)) for b in message.buffers]
    return codec.decode(Message(message.header, buffers), writable=writable)


def ext(code: int, payload: bytes) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, payload))


def array_ext(name: bytes, shape: tuple[int, ...], data: bytes, code: int = 2) -> bytes:
    head = bytes([len(name), len(shape)]) + name
    head += bytes(-len(head) % 8) + struct.pack(f"<{len(shape)}Q", *shape)
    return ext(code, head + data)


class TestMsgpackConformance(CodecTests):
    codec = MsgpackCodec()


class TestCloudpickleConformance(CodecTests):
    codec = CloudpickleCodec()


def test_the_registry_finds_them() -> None:
    assert type(load_codec("msgpack")) is MsgpackCodec
    assert type(load_codec("cloudpickle")) is CloudpickleCodec


def test_importing_them_loads_nothing_heavy() -> None:
    code = (
        "import sys, pickle, edgeml.codecs.msgpack as m, edgeml.codecs.cloudpickle as c\n"
        "from edgeml.core.message import Message\n"
        "m.MsgpackCodec().encode({'a': {1}})\n"
        "assert c.CloudpickleCodec().decode(Message(pickle.dumps(1))) == 1\n"
        "assert not {'cloudpickle', 'ml_dtypes', 'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# msgpack: types


class Color(enum.IntEnum):
    RED = 3


class Mode(str, enum.Enum):
    FAST = "fast"


class Shape(enum.Enum):
    ROUND = 1


class Frame(np.ndarray[Any, Any]):
    pass


class Meters(float):
    pass


class Names(list[str]):
    pass


class Point(tuple[int, int]):
    pass


class Pose(collections.namedtuple("Pose", "x y")):
    pass


@dataclasses.dataclass(frozen=True)
class Camera:
    name: str
    meta: Any = None


def named(value: Any) -> str:
    """A test's name for a value: the same in every process, so without addresses or hashes."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    return re.sub(r" at 0x\w+", "", repr(value))[:40]


AMSTERDAM = dt.timezone(dt.timedelta(hours=1, minutes=19, seconds=32, microseconds=5))
NOON = dt.datetime(2024, 2, 29, 12, 0, 1, 5)


@pytest.mark.parametrize(
    "value",
    [
        *(2**63, 2**64 - 1, 2**64, -(2**63) - 1, 2**4000, -(2**4000), -(2**8191), 2**8191 - 1),
        *(1j, complex(math.inf, -0.0), (), (1, (2, [3, ()])), [(1,)], {1: (2,), "b": {-5: 1}}),
        *({1, "a", (2, b"x")}, set(), frozenset({1, frozenset({2})}), {2**70, 1.5, 2j, None}),
        *(NOON, NOON.replace(tzinfo=dt.UTC), NOON.replace(tzinfo=AMSTERDAM), dt.datetime.min),
        *(
            NOON.replace(tzinfo=dt.timezone(dt.timedelta(microseconds=n)))
            for n in (1, -1, -(10**7))
        ),
        *(NOON.date(), dt.date.max, NOON.time(), dt.time(1, tzinfo=AMSTERDAM)),
        *(dt.timedelta.min, dt.timedelta.max, dt.timedelta(microseconds=-1)),
        *(bytes(8192), bytes(8193), bytes(100_000), {2**64 - 1: 0, -(2**63): 0}),
        *(
            np.datetime64("2024-01-01T00:00:01", "ms"),
            np.timedelta64(3, "D"),
            np.datetime64("NaT", "s"),
        ),
        *(np.float32(1.5), np.float64(1.5), np.bool_(True), np.uint8(3), np.complex64(1j)),
    ],
    ids=named,
)
def test_arrives_equal(value: Any) -> None:
    got = round_trip([value])[0]
    assert_same(got, value)
    if isinstance(value, (dt.datetime, dt.time)):
        assert got.utcoffset() == value.utcoffset()


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        *((Color.RED, 3), (Mode.FAST, "fast"), (Meters(1.5), 1.5), (Names("ab"), ["a", "b"])),
        *((Point((1, 2)), (1, 2)), (Pose(1, (2,)), {"x": 1, "y": (2,)})),
        (
            Camera("left", Camera("right")),
            {"name": "left", "meta": {"name": "right", "meta": None}},
        ),
        *((bytearray(b"ab"), b"ab"), (memoryview(b"ab"), b"ab"), (bytearray(9000), bytes(9000))),
        *((memoryview(b"abcd")[::2], b"ac"), (memoryview(bytes(30_000))[::2], bytes(15_000))),
        (np.ones((100, 20), np.complex128).data, np.ones(2000, np.complex128).tobytes()),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (types.MappingProxyType({"a": (1,)}), {"a": (1,)}),
        *(({Color.RED: 1, Mode.FAST: 2}, {3: 1, "fast": 2}), ({np.str_("a"): 1}, {"a": 1})),
        *((np.str_("käfer"), "käfer"), (np.bytes_(b"x"), b"x")),
        (np.ones((2, 3)).view(Frame), np.ones((2, 3))),
    ],
    ids=named,
)
def test_arrives_as_what_it_is_at_heart(value: Any, arrives: Any) -> None:
    assert_same(round_trip(value), arrives)
    assert_same(round_trip({"a": [value, 1]}), {"a": [arrives, 1]})


def test_a_memory_mapped_file_is_an_array(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "frames", np.uint8, "w+", shape=(100, 100))
    mapped[:] = 7
    assert_same(round_trip(mapped), np.full((100, 100), 7, np.uint8))


TIMES = [f"{kind}64[{unit}]" for kind in ("datetime", "timedelta") for unit in
         ("D", "h", "m", "s", "ms", "us", "ns")]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (200, 100)], ids=str)
@pytest.mark.parametrize("name", [*TIMES, *sorted(module._ML_DTYPES)])
def test_arrays_that_export_no_buffer(name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    array = (np.arange(math.prod(shape)) % 2).reshape(shape).astype(np.int8).astype(dtype)
    for value in (array, array.T, array[..., ::-1] if shape else array):
        assert_same(round_trip(value), value)
    got = round_trip(array, writable=True)
    got[...] = array
    one = np.ones((), np.int8).astype(dtype)[()]
    assert_same(round_trip(one), one)


def test_bfloat16_travels_out_of_band_and_unchanged() -> None:
    array = np.random.default_rng(0).normal(size=10_000).astype(ml_dtypes.bfloat16)
    message = codec.encode(array)
    assert len(message.buffers) == 1
    got = codec.decode(message)
    assert got.dtype == ml_dtypes.bfloat16
    assert np.shares_memory(got.view(np.uint8), array.view(np.uint8))
    assert not got.flags.writeable


def test_without_ml_dtypes_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    message = codec.encode(np.zeros(123, ml_dtypes.float8_e4m3))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    module._parse.cache_clear()
    with pytest.raises(Malformed, match="float8_e4m3, which needs a recent ml_dtypes"):
        codec.decode(message)


def test_jax_arrays_arrive_as_numpy() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    for value in (jnp.arange(5.0), jnp.zeros((100, 100)), jnp.ones((), jnp.bfloat16)):
        assert_same(round_trip({"w": value})["w"], np.asarray(value))
    assert len(codec.encode(jnp.zeros((100, 100))).buffers) == 1

    with pytest.raises(NotEncodable, match=r"value\['k'\] is a JAX array without values"):
        codec.encode({"k": jax.random.key(0)})
    with pytest.raises(NotEncodable, match="Tracer"):
        jax.jit(lambda x: codec.encode(x).header)(1.0)


class OnDevice:
    """An array on a device, as JAX has them; notes when it is asked for."""

    def __init__(self, name: str, array: np.ndarray[Any, Any], log: list[str]) -> None:
        self.name, self.array, self.log = name, array, log
        self.dtype, self.shape, self.nbytes = array.dtype, array.shape, array.nbytes

    def copy_to_host_async(self) -> None:
        self.log.append(f"start {self.name}")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        self.log.append(f"wait {self.name}")
        return self.array

    def unsafe_buffer_pointer(self) -> int:
        return 0  # of the device's memory


@dataclasses.dataclass
class Agent:
    actor: Any
    critics: Any


def test_all_copies_from_a_device_are_started_before_one_is_waited_for() -> None:
    log: list[str] = []
    w1, w2 = (OnDevice(name, np.full((64, 64), 1.5), log) for name in ("w1", "w2"))
    b1, b2 = (OnDevice(name, np.arange(64.0), log) for name in ("b1", "b2"))
    value = {"agent": Agent([w1, b1], ({"w": w2, "b": b2},)), "again": [w1], "n": np.arange(9)}
    got = codec.decode(codec.encode(value))
    # What the header waits for comes first; and nothing is fetched twice.
    assert log[:4] == ["start b1", "start b2", "start w1", "start w2"]
    assert log[4:] == ["wait w1", "wait b1", "wait w2", "wait b2", "wait w1"]
    assert_same(got["agent"]["actor"], [w1.array, b1.array])
    assert_same(got["agent"]["critics"], ({"w": w2.array, "b": b2.array},))
    assert_same(got["again"], [w1.array])


def test_what_came_from_a_device_is_copied_once_into_memory_that_is_sent_from() -> None:
    log: list[str] = []
    arrays = [OnDevice(str(n), np.full((64, 64), n), log) for n in range(3)]
    places: list[np.ndarray[Any, Any]] = []

    def allocate(nbytes: int) -> memoryview:
        places.append(np.zeros(nbytes, np.uint8))
        return memoryview(Owned(nbytes, np.uint8, memoryview(places[-1])))

    in_place = codec.encode_owned(arrays, allocate)
    assert len(places) == 1
    assert all(np.shares_memory(np.frombuffer(b, np.uint8), places[0]) for b in in_place.buffers)
    assert_same(codec.decode(in_place), [array.array for array in arrays])
    # Elsewhere the copy that came from the device is sent itself.
    message = codec.encode_owned(arrays, lambda nbytes: None)
    for buffer, array in zip(message.buffers, arrays, strict=True):
        assert np.shares_memory(np.frombuffer(buffer, np.uint8), array.array)


def test_what_a_jax_array_is_on_this_machine_is_not_taken_for_a_copy() -> None:
    """It is given away to a function that is donated the array."""
    jnp = pytest.importorskip("jax").numpy
    array = jnp.arange(10_000)
    encoded, kept = codec.encode([array]), codec.encode_owned([array])
    assert np.shares_memory(np.frombuffer(encoded.buffers[0], np.uint8), np.asarray(array))
    assert not np.shares_memory(np.frombuffer(kept.buffers[0], np.uint8), np.asarray(array))
    assert_same(codec.decode(kept), [np.arange(10_000, dtype=np.int32)])


# msgpack: what is refused, and where


def nested(depth: int, *kinds: type) -> Any:
    value: Any = 1
    for level in range(depth):
        wrapped: dict[type, Any] = {list: [value], tuple: (value,), dict: {"k": value}}
        value = wrapped[kinds[level % len(kinds)]]
    return value


def cyclic() -> Any:
    value: list[Any] = []
    value.append({"again": value})
    return value


class Tensor:
    __module__ = "torch"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), r"^value is a builtins.object, which is not carried: send a dict"),
        ({"cam": [0, 1, 2, Camera("a", Tensor())]}, r"^value\['cam'\]\[3\].meta is a torch.Tensor.*"
         r"send value.detach\(\).cpu\(\).numpy\(\)"),
        ({"a": (1, {2: Pose(1, {object()})})}, r"^value\['a'\]\[1\]\[2\].y\{\.\.\.\} is a "),
        ([Shape.ROUND], r"^value\[0\] is a .*Shape.*send its .value"),
        (print, "builtin_function_or_method"),
        (range(3), "range"),
        (Camera, "type"),
        (queue.Queue(), "queue.Queue"),
        ([1, {"b": np.array([None])}], r"^value\[1\]\['b'\] has dtype object.*tolist"),
        (np.array(["a"]), "has dtype <U1, .*tolist"),
        (np.array([b"a"]), r"has dtype \|S1, .*tolist"),
        (np.zeros(2, "i4,f4"), "a dict with an array for each field"),
        (np.zeros(2, "i4,f4")[0], "a dict with an array for each field"),
        (np.zeros(2, np.longdouble), "astype"),
        (np.longdouble(1), "astype"),
        (np.zeros(2, "M8[10ns]"), "has dtype datetime64"),
        (np.zeros((1,) * 40), "40 dimensions"),
        (np.ma.masked_array([1, 2], [False, True]), "MaskedArray: send its .data and its .mask"),
        ({"a": ["ok", "\ud800"]}, r"^value\['a'\]\[1\] has surrogates"),
        ({"a": {"\ud800": 1}}, r"^value\['a'\]\['\\ud800'\] has surrogates"),
        ([1, 2**8192], r"^value\[1\] is an int of more than 1024 bytes"),
        ({"a": {2**64: 1}}, r"^value\['a'\]\[18446744073709551616\] has a key beyond 64 bits"),
        ({"a": {True: 1}}, r"^value\['a'\]\[True\] has a key of type bool"),
        ({1.5: 1}, "key of type float"),
        ({(1, 2): 1}, "key of type tuple"),
        ({np.int64(1): 1}, "key of type int64"),
        ({Pose(1, 2)}, r"would arrive as a dict, which no set can hold"),
        ({(Camera("a"),)}, r"value\{\.\.\.\}\[0\] would arrive as a dict"),
        (nested(33, list, tuple, dict), r"^value(\[0\]|\['k'\]){32} is nested more than 32 deep"),
        (cyclic(), "contains itself"),
        (nested(33, list), "nested more than 32 deep"),
        (nested(33, dict), "nested more than 32 deep"),
    ],
    ids=named,
)  # fmt: skip
def test_refused(value: Any, text: str) -> None:
    with pytest.raises(NotEncodable, match=text):
        codec.encode(value)


def test_nesting_of_32_is_carried() -> None:
    value = nested(32, list, tuple, dict)
    assert_same(round_trip(value), value)


# msgpack: memory


def test_what_is_small_stays_in_the_header() -> None:
    assert not codec.encode([np.zeros(8192, np.uint8), bytes(8192)]).buffers
    assert len(codec.encode([np.zeros(8193, np.uint8), bytes(8193)]).buffers) == 2


@pytest.mark.parametrize("size", [10, 5000])
def test_every_array_is_aligned_and_read_only(size: int) -> None:
    array = np.arange(size, dtype=np.float64)
    message = codec.encode({"x" * pad: array for pad in range(1, 9)})
    for offset in range(9):
        buffers = [memoryview(bytes(offset) + bytes(b))[offset:] for b in message.buffers]
        for got in codec.decode(Message(message.header, buffers)).values():
            assert got.flags.aligned
            assert not got.flags.writeable
            # A view would be free here, but it would keep the whole header alive.
            assert not np.shares_memory(got, np.frombuffer(message.header, np.uint8))
            assert_same(got, array)


def test_large_bytes_are_not_copied_by_encode() -> None:
    data = bytearray(10_000)
    (buffer,) = codec.encode({"jpeg": data}).buffers
    data[0] = 9
    assert buffer[0] == 9


def test_buffers_die_without_gc_from_deep_inside() -> None:
    array = np.zeros(100_000)
    alive = weakref.ref(array)
    value = {"a": ({1, 2}, [Camera("x", (array, {"b": array}))])}
    gc.collect()
    gc.disable()
    try:
        message = codec.encode(value)
        got = codec.decode(message)
        del array, value, message
        assert alive() is not None
        del got
        assert alive() is None
    finally:
        gc.enable()


# msgpack: the contract, byte by byte


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        ([None, True, 1.5, -1, "a"], "95 c0 c3 cb3ff8000000000000 ff a161"),
        (np.array([[1, 2]], "<i2"),
         "c71c02 05 02 696e743136 00 0100000000000000 0200000000000000 0100 0200"),
        (np.float32(1), "c71403 07 00 666c6f61743332 00000000000000 0000803f"),
        ((1, 2), "c70305 920102"),
        ({7}, "d506 9107"),
        (frozenset({7}), "d507 9107"),
        (2**64, "c70908 000000000000000001"),
        (1 + 2j, "d809 000000000000f03f 0000000000000040"),
        (dt.date(2024, 2, 29), "c70a0b" + b"2024-02-29".hex()),
        (NOON, "c71a0a" + b"2024-02-29T12:00:01.000005".hex()),
        (dt.time(1, 2), "d70c" + b"01:02:00".hex()),
        (dt.timedelta(-1, 2, 3), "c70c0d ffffffff 02000000 03000000"),
    ],
    ids=named,
)  # fmt: skip
def test_golden_bytes(value: Any, wire: str) -> None:
    assert codec.encode(value).header.hex() == wire.replace(" ", "")
    assert_same(round_trip(value), value)


def test_golden_bytes_out_of_band() -> None:
    array, data = np.arange(3000, dtype="<u4"), bytes(range(256)) * 40
    message = codec.encode([array, data])
    name, shape = b"uint32".hex(), "b80b000000000000"
    assert message.header.hex() == f"92c71401 0601{name}{shape}00000000 d604 01000000".replace(
        " ", ""
    )
    assert [bytes(b) for b in message.buffers] == [array.tobytes(), data]


def test_what_other_writers_may_send() -> None:
    cases = {
        b"\xca\x3f\x80\x00\x00": 1.0,
        b"\xd3" + bytes(7) + b"\x05": 5,
        b"\xdd\x00\x00\x00\x01\x01": [1],
        b"\xdf\x00\x00\x00\x01\xdb\x00\x00\x00\x01a\xd0\xff": {"a": -1},
        b"\xc9\x00\x00\x00\x04\x05\xdc\x00\x01\x07": (7,),
        ext(10, b"2024-02-29T12:00:01.000005"): NOON,
        ext(8, bytes(8) + b"\x01"): 2**64,
    }
    for header, value in cases.items():
        assert_same(codec.decode(Message(header)), value)
    empty = array_ext(b"int8", (0,), bytes(4), code=1)
    assert_same(codec.decode(Message(empty, [memoryview(b"")])), np.zeros(0, np.int8))


# msgpack: hostile bytes

ONE = [memoryview(bytes(range(16)))]
REF = bytes(4)

FORGED: dict[str, tuple[bytes, list[memoryview]]] = {
    "empty": (b"", []),
    "trailing bytes": (b"\x01\x01", []),
    "reserved tag": (b"\xc1", []),
    "invalid utf-8": (b"\xa1\xff", []),
    "ext 0": (ext(0, b"x"), []),
    "ext 14": (ext(14, b"x"), []),
    "empty descriptor": (b"\xc7\x00\x02", []),
    "descriptor padded with something": (
        array_ext(b"int8", (1,), b"x").replace(b"int8\0", b"int8x"), []
    ),
    "half a descriptor": (ext(2, b"\x05\x01int"), []),
    "unknown dtype": (array_ext(b"int7", (1,), b"x"), []),
    "object dtype": (array_ext(b"object", (1,), bytes(8)), []),
    "dtype that isn't ascii": (array_ext(b"\xff\xfe", (1,), bytes(8)), []),
    "dtype spelled otherwise": (array_ext(b"<i2", (1,), bytes(2)), []),
    "too few bytes": (array_ext(b"int16", (2,), bytes(3)), []),
    "too many bytes": (array_ext(b"int16", (2,), bytes(5)), []),
    "negative shape": (array_ext(b"int8", (2**64 - 1,), b"x"), []),
    "two negative dimensions": (array_ext(b"int8", (2**64 - 1, 2**64 - 1), b"x"), []),
    "shape that overflows to 0": (array_ext(b"int8", (2**32, 2**32), b""), []),
    "shape that overflows to 1": (array_ext(b"int64", (2**61, 1), b""), []),
    "zero beside a huge dimension": (array_ext(b"int8", (2**64 - 1, 0), b""), []),
    "33 dimensions": (array_ext(b"int8", (1,) * 33, b"x"), []),
    "bool of 2": (array_ext(b"bool", (2,), b"\x01\x02"), []),
    "bool of 2 out of band": (array_ext(b"bool", (16,), REF, 1), ONE),
    "scalar with a shape of two": (array_ext(b"int8", (2,), b"x", 3), []),
    "index out of range": (array_ext(b"int8", (16,), b"\x01" + bytes(3), 1), ONE),
    "index without buffers": (ext(4, REF), []),
    "huge index": (ext(4, b"\xff" * 4), ONE),
    "short index": (ext(4, bytes(3)), ONE),
    "long index": (ext(4, bytes(5)), ONE),
    "buffer of another size": (array_ext(b"int8", (15,), REF, 1), ONE),
    "buffer used twice": (b"\x92" + ext(4, REF) * 2, ONE),
    "buffer used in an array and as bytes": (
        b"\x92" + ext(4, REF) + array_ext(b"int8", (16,), REF, 1), ONE),
    "buffer not used": (b"\x01", ONE),
    "second buffer not used": (ext(4, REF), ONE * 2),
    "tuple that is no array": (ext(5, b"\x01"), []),
    "tuple that is a map": (ext(5, b"\x81\x01\x01"), []),
    "tuple with something after it": (ext(5, b"\x90\x01"), []),
    "tuple cut short": (ext(5, b"\x92\x01"), []),
    "tuple that takes what follows it": (b"\x92" + ext(5, b"\x92\x01") + b"\x02", []),
    "empty tuple": (b"\xc7\x00\x05", []),
    "tuple in a tuple without array": (ext(5, ext(5, b"\x90")), []),
    "list in a set": (ext(6, b"\x91\x90"), []),
    "array in a set": (ext(6, b"\x91" + array_ext(b"int8", (1,), b"x")), []),
    "set in a set": (ext(6, b"\x91" + ext(6, b"\x90")), []),
    "list as key": (b"\x81\x91\x01\x01", []),
    "map as key": (b"\x81\x80\x01", []),
    "tuple as key": (b"\x81" + ext(5, b"\x91\x01") + b"\x01", []),
    "bool as key": (b"\x81\xc3\x01", []),
    "float as key": (b"\x81\xca" + bytes(4) + b"\x01", []),
    "nil as key": (b"\x81\xc0\x01", []),
    "bytes as key": (b"\x81\xc4\x01a\x01", []),
    "key without value": (b"\x81\x01", []),
    "large int that is too large": (ext(8, bytes(1025)), []),
    "large int of zeros": (ext(8, bytes(1024)), []),
    "large int of no bytes": (ext(8, b""), []),
    "large int with a byte too many": (ext(8, bytes(8) + b"\x01\x00"), []),
    "large negative int with a byte too many": (ext(8, b"\xff" * 12), []),
    "timestamp": (ext(-1, bytes(4)), []),
    "timestamp with nanoseconds": (ext(-1, bytes(8)), []),
    "timestamp of 12 bytes": (ext(-1, bytes(12)), []),
    "timestamp deep inside": (
        b"\x81\xa1a\x92" + ext(5, b"\x91" + ext(7, b"\x91" + ext(-1, bytes(4)))) + b"\x01", []
    ),
    "timestamp beside a datetime": (
        b"\x92" + ext(10, b"2024-02-29T12:00:00+00:00") + ext(-1, bytes(4)), []
    ),
    "timestamp in a large header": (
        b"\x92" + ext(-1, bytes(4)) + msgspec.msgpack.encode("x" * 20_000), []
    ),
    "set with a member twice": (ext(6, b"\x92\xa1a\xa1a"), []),
    "set of 1 and true": (ext(6, b"\x92\x01\xc3"), []),
    "frozenset of 0 and -0.0": (ext(7, b"\x92\x00\xcb\x80" + bytes(7)), []),
    "float4 with a fifth bit": (array_ext(b"float4_e2m1fn", (2,), b"\x0f\x10"), []),
    "float6 with a seventh bit, out of band": (
        array_ext(b"float6_e3m2fn", (5000,), REF, 1),
        [memoryview(bytes(4999) + b"\x40")],
    ),
    "int2 with a third bit": (array_ext(b"int2", (), b"\x04", 3), []),
    "bool of 3 far inside": (array_ext(b"bool", (5000,), bytes(4999) + b"\x03"), []),
    "short complex": (ext(9, bytes(15)), []),
    "datetime of nonsense": (ext(10, b"2024-02-30T00:00:00"), []),
    "datetime of huge size": (ext(10, b"9" * 10_000), []),
    "date that isn't ascii": (ext(11, b"\xff" * 10), []),
    "date of arabic digits": (ext(11, "٢٠٢٤-٠٢-٢٩".encode()), []),
    "date of the year 0": (ext(11, b"0000-01-01"), []),
    "date and a line": (ext(11, b"2024-02-29\n"), []),
    "date in another form": (ext(11, b"2024-W09-4"), []),
    "datetime with another letter": (ext(10, b"2024-02-29t12:00:00"), []),
    "datetime at 24 o'clock": (ext(10, b"2024-02-29T24:00:00"), []),
    "datetime with a comma": (ext(10, b"2024-02-29T12:00:00,000001"), []),
    "datetime with a fraction that is none": (ext(10, b"2024-02-29T12:00:00.000000"), []),
    "datetime with a shorter fraction": (ext(10, b"2024-02-29T12:00:00.1"), []),
    "datetime with minus zero": (ext(10, b"2024-02-29T12:00:00-00:00"), []),
    "datetime with an offset's seconds that are none": (
        ext(10, b"2024-02-29T12:00:00+01:00:00"), []),
    "time with an offset of 60 minutes": (ext(12, b"12:00:00+00:60"), []),
    "time with an offset of a day": (ext(12, b"12:00:00+24:00"), []),
    "time without seconds": (ext(12, b"12:00"), []),
    "time in Zulu": (ext(12, b"12:00:00Z"), []),
    "timedelta out of range": (ext(13, b"\xff\xff\xff\x7f" * 3), []),
    "timedelta of too many days": (ext(13, b"\xff\xff\xff\x7f" + bytes(8)), []),
    "timedelta with a day of seconds": (ext(13, struct.pack("<iii", 0, 86_400, 0)), []),
    "timedelta with a second of microseconds": (ext(13, struct.pack("<iii", 0, 0, 10**6)), []),
    "timedelta with a negative second": (ext(13, struct.pack("<iii", 1, -1, 0)), []),
    "33 deep": (b"\x91" * 33, []),
    "33 maps deep": (b"\x81\x01" * 33 + b"\x01", []),
    "100,000 deep": (b"\x91" * 100_000, []),
    "list of 2**32 - 1": (b"\xdd\xff\xff\xff\xff\x01", []),
    "map of 2**32 - 1": (b"\xdf\xff\xff\xff\xff\x01\x01", []),
    "key that is a list of 2**32 - 1": (b"\x81\xdd\xff\xff\xff\xff\x01", []),
    "lists of 2**32 - 1 in each other": (b"\xdd\xff\xff\xff\xff" * 30, []),
    "bin of 2**32 - 1": (b"\xc6\xff\xff\xff\xff\x01", []),
    "str of 2**32 - 1": (b"\xdb\xff\xff\xff\xff\x01", []),
    "ext of 2**32 - 1": (b"\xc9\xff\xff\xff\xff\x02\x01", []),
    "array of 4 GiB in 1 byte": (array_ext(b"uint8", (2**32,), b"x"), []),
    "array of 2**62 in 16 bytes": (array_ext(b"uint8", (2**62,), REF, 1), ONE),
    "array of 2**2048": (array_ext(b"uint8", (2**64 - 1,) * 32, REF, 1), ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged(name: str) -> None:
    header, buffers = FORGED[name]
    for writable in (False, True):
        tracemalloc.start()
        try:
            with pytest.raises(Malformed):
                codec.decode(Message(header, buffers), writable=writable)
            assert tracemalloc.get_traced_memory()[1] < 50_000 + 4 * len(header)
        finally:
            tracemalloc.stop()


def test_nesting_counts_through_tuples_and_sets() -> None:
    for code in (5, 7):
        header = b"\x90"
        for _ in range(31):
            header = b"\x91" + ext(code, header)
        assert codec.decode(Message(ext(code, header))) is not None
        for _ in range(300):
            header = b"\x91" + ext(code, header)
            with pytest.raises(Malformed, match="nested more than 32 deep"):
                codec.decode(Message(ext(code, header)))


def large_ints(n: int, step: int) -> list[bytes]:
    values = [2**70 // step * step + i * step for i in range(n)]
    return [ext(8, each.to_bytes(each.bit_length() // 8 + 1, "little")) for each in values]


def test_a_set_made_to_be_slow_is_refused() -> None:
    def members(of: list[bytes]) -> Message:
        return Message(ext(6, b"\xdd" + struct.pack(">I", len(of)) + b"".join(of)))

    with pytest.raises(Malformed, match="floods"):
        codec.decode(members(large_ints(4000, sys.hash_info.modulus)))
    assert len(codec.decode(members(large_ints(4000, 2**62 + 1)))) == 4000
    # Ints that differ in their hashes can be such that each of them meets the others all the same.
    with pytest.raises(Malformed, match="more than 4096"):
        codec.decode(members(large_ints(4097, 2**62 + 1)))
    texts = [msgspec.msgpack.encode(str(n)) for n in range(20_000)]
    assert len(codec.decode(members(texts))) == 20_000


def colliding_ints(n: int) -> list[int]:
    """Keys of which each meets a good part of the others in a dict that takes them all."""
    mask = (1 << (n * 3 // 2).bit_length()) - 1
    start = list(range(mask // 2 + 1))
    rng = random.Random(0)
    by_end = collections.defaultdict(list)
    for _ in range(60_000):
        slot = rest = key = rng.getrandbits(28)
        slot &= mask
        while rest and slot <= mask // 2:
            rest >>= 5
            slot = (slot * 5 + rest + 1) & mask
        by_end[slot].append(key)
    return start + max(by_end.values(), key=len)


def test_a_map_made_to_be_slow_is_refused() -> None:
    for n in (4096, 4097):
        text = {str(key): 0 for key in range(n)}
        assert round_trip(text) == text
        numbers = {key + 2**40: 0 for key in range(n)}
        forged = msgspec.msgpack.encode(numbers)
        if n == 4096:
            assert round_trip(numbers) == numbers == codec.decode(Message(forged))
            continue
        with pytest.raises(Malformed, match="a key that is not a str"):
            codec.decode(Message(forged))
        with pytest.raises(NotEncodable, match=r"^value\['a'\] has more than 4096 keys.*use their"):
            codec.encode({"a": numbers})


# msgpack: how much


def listed(item: bytes, n: int) -> bytes:
    return b"\xdd" + struct.pack(">I", n) + item * n


BOMBS = {
    "8 MB of empty lists": listed(b"\x90", 8_000_000),
    "8 MB of empty maps": listed(b"\x80", 8_000_000),
    "8 MB of empty sets": listed(ext(6, b"\x90"), 2_000_000),
    "8 MB of ints": listed(b"\x01", 8_000_000),
    "8 MB of maps in maps": listed(b"\x81\xa0" * 30 + b"\x01", 130_000),
    "8 MB of lists said to be large": listed(b"\xdd\xff\xff\xff\xff" * 31, 52_000),
    "8 MB of small arrays": listed(array_ext(b"int8", (), b"x"), 640_000),
    "8 MB of datetimes": listed(ext(10, b"2024-02-29T12:00:01.000005"), 280_000),
    "a list that says 4 billion": listed(b"\x01", 100_000)[:1] + b"\xff" * 4 + bytes(100_000),
    "a map that says 4 billion": b"\xdf" + b"\xff" * 4 + b"\xa0\x01" * 100_000,
    "a text that says 4 GB": b"\xdb" + b"\xff" * 4 + bytes(100_000),
    "bytes that say 4 GB": b"\xc6" + b"\xff" * 4 + bytes(100_000),
    "an ext that says 4 GB": b"\xc9" + b"\xff" * 4 + b"\x05" + bytes(100_000),
    "a million ints": listed(b"\x01", 1_000_000),
    "a million texts": listed(b"\xa2ab", 1_000_000),
    "a map of half a million": b"\xdf" + struct.pack(">I", 500_000) + b"\xa0\x01" * 500_000,
}  # fmt: skip
ALL_THAT_IS_TAKEN: dict[str, tuple[bytes, int]] = {
    "ints": (b"\xcd\x01\x01", 1),
    "texts": (b"\xa4\xf0\x9f\xa4\x96", 1),
    "empty maps": (b"\x80", 4),
    "maps in maps": (b"\x81\x00" * 31 + b"\x01", 31 * 5 + 1),
    "empty sets": (ext(6, b"\x90"), 4),
    "small arrays": (array_ext(b"int8", (), b"x"), 4),
    "datetimes": (ext(10, b"2024-02-29T12:00:01.000005"), 4),
    "large ints": (ext(8, bytes(8) + b"\x01"), 4),
    "tuples in tuples": (ext(5, b"\x91" + ext(5, b"\x91" + ext(5, b"\x91\x01"))), 13),
    "ints that meet in a map": (
        b"\xde\x10\x00" + b"".join(msgspec.msgpack.encode(key) + b"\x01"
                                   for key in colliding_ints(4096)[:4096]), 8196),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once_and_in_no_memory(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(Malformed):
        codec.decode(Message(BOMBS[name]))
    assert time.thread_time() - began < 1
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            codec.decode(Message(BOMBS[name]))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ALL_THAT_IS_TAKEN)
def test_all_that_is_taken_takes_less_than_64_mb_and_a_second(name: str) -> None:
    item, counts = ALL_THAT_IS_TAKEN[name]
    header = listed(item, (codec.limits.nodes - 4) // counts)
    began = time.thread_time()
    codec.decode(Message(header))
    assert time.thread_time() - began < 1
    # An eighth of it, as measuring takes ten times as long.
    header = listed(item, (codec.limits.nodes // 8 - 4) // counts)
    tracemalloc.start()
    try:
        codec.decode(Message(header))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_limits_are_the_codec_s_and_hold_both_ways() -> None:
    small = MsgpackCodec()
    small.limits = Limits(nodes=40, nesting=3, buffers=2)
    large = np.zeros(9000, np.uint8)
    for fits, does_not, text in (
        ([0] * 36, [0] * 37, "more values"),
        ({"a": (1, [2])}, {"a": (1, [{2}])}, "nested more than 3 deep"),
        ([large] * 2, [large] * 3, "buffers|large arrays"),
        ([large.tobytes()] * 2, [large.tobytes()] * 3, "buffers|large arrays"),
    ):
        assert_same(small.decode(small.encode(fits)), fits)
        with pytest.raises(NotEncodable, match=text):
            small.encode(does_not)
        with pytest.raises(Malformed, match=text):
            small.decode(codec.encode(does_not))
    assert codec.limits.nodes == 1 << 19  # the instance's, and nobody else's


def test_half_a_million_numbers_are_carried_and_no_more() -> None:
    assert round_trip([0.5] * (codec.limits.nodes - 4)) == [0.5] * (codec.limits.nodes - 4)
    with pytest.raises(NotEncodable, match="more values than are taken in one message: put"):
        codec.encode([0.5] * (codec.limits.nodes - 3))


# msgpack: each value has one spelling


class Id(int):
    """One that is equal to nothing but itself."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Tag(str):
    """One that is equal to nothing but itself."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Track(list[int]):
    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({Tag("a"): 1, "a": 2}, "^value has keys that would arrive as one"),
        ({"a": {"a": 2, Tag("a"): 1}}, r"^value\['a'\] has keys that would arrive as one"),
        ({Id(1): 1, Id(1): 2}, "keys that would arrive as one"),
        ([{Id(1), Id(1)}], r"^value\[0\] would arrive as what is no set.*equal"),
        ({(Id(1),), (1,)}, "no set.*equal"),
        ({Track([1])}, "no set.*unhashable"),
        ({frozenset({Track([1])})}, "no set.*unhashable"),
        ({k * sys.hash_info.modulus for k in range(100)}, "no set.*floods"),
        (set(range(4097)), "no set.*more than 4096"),
        (np.frombuffer(b"\x02", bool), "bits that their dtype does not use"),
        ([np.frombuffer(bytes(9000) + b"\x02", bool)], r"value\[0\] has elements with bits"),
        (np.frombuffer(b"\x10", ml_dtypes.float4_e2m1fn), "bits that their dtype does not use"),
        (np.frombuffer(b"\x10", ml_dtypes.int4)[0], "bits that their dtype does not use"),
    ],
    ids=lambda value: f"{value!r:.40}",
)  # fmt: skip
def test_what_would_be_refused_there_is_refused_here(value: Any, text: str) -> None:
    with pytest.raises(NotEncodable, match=text):
        codec.encode(value)


def test_a_set_is_the_same_bytes_in_each_process() -> None:
    program = (
        "from edgeml.codecs.msgpack import MsgpackCodec\n"
        "value = [{'a', 'b', 'c', 1, (2, b'x' * 9000)}, frozenset(map(str, range(50)))]\n"
        "message = MsgpackCodec().encode(value)\n"
        "print(message.header.hex(), len(message.buffers))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(outputs) == 1


# msgpack: properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
OFFSETS = st.none() | st.timedeltas(
    min_value=dt.timedelta(hours=-23), max_value=dt.timedelta(hours=23)
).map(dt.timezone)
ARRAYS = hnp.arrays(
    st.sampled_from(
        [np.dtype(name) for name in [*module._NUMPY, *module._ML_DTYPES - {"float8_e8m0fnu"}] if
         hasattr(np, name) or "[" in name]
    ),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)  # fmt: skip
HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | TEXT
    | st.binary(max_size=100)
    | st.dates()
    | st.timedeltas()
    | st.datetimes(timezones=OFFSETS)
    | st.times(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
KEYS = TEXT | st.integers(-(2**63), 2**64 - 1)
VALUES = st.recursive(
    HASHABLE | st.floats() | ARRAYS | st.sets(HASHABLE, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=150)
def test_any_value_arrives_equal(value: Any) -> None:
    assert_same(round_trip(value), value)


@given(VALUES, st.integers(0, 2**32))
@settings(max_examples=100)
def test_any_damaged_message_is_a_value_or_malformed(value: Any, seed: int) -> None:
    message = codec.encode(value)
    decode_mutations(message, random.Random(seed), 20)


def decode_mutations(message: Message, rng: random.Random, times: int) -> int:
    """Damage a message in several ways; count how often it still was a value."""
    values = 0
    for _ in range(times):
        header = bytearray(message.header)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(header) + 1)
            kind = rng.randrange(4)
            if kind == 0 and at < len(header):
                header[at] = rng.choice((rng.randrange(256), 0, 255, header[at] ^ 1))
            elif kind == 1:
                header[at:at] = header[rng.randrange(len(header) + 1) :][: rng.randrange(40)]
            elif kind == 2:
                del header[at : at + rng.randrange(1, 9)]
            else:
                tag = rng.choice((0x91, 0x81, 0xC7, 0xC9, 0xD4, 0xDD, 0xDF, 0xC6, 0xDB))
                header[at:at] = bytes([tag, *rng.randbytes(rng.randrange(7))])
        try:
            codec.decode(Message(bytes(header), message.buffers), writable=rng.random() < 0.2)
            values += 1
        except Malformed:
            pass
    return values


def test_thirty_thousand_damaged_messages() -> None:
    message = codec.encode(
        {
            "cam": np.zeros((60, 60, 3), np.uint8),
            "state": np.arange(7.0),
            "mask": np.ones(3, bool),
            "raw": bytes(9000),
            "t": (NOON, NOON.date(), dt.time(1), dt.timedelta(1), 1j, 2**70),
            5: {1, "a", (2, frozenset({3}))},
            "deep": [[[{"a": [np.float32(1), None, True, b"x"]}]]],
            "bf": np.ones(3, ml_dtypes.bfloat16),
        }
    )
    values = decode_mutations(message, random.Random(0), 30_000)
    assert 1000 < values < 29_000  # else the mutations test nothing


# cloudpickle


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


def test_cloudpickle_carries_callables_and_odd_objects() -> None:
    pickler, factor = CloudpickleCodec(), 3
    got = pickler.decode(pickler.encode({"f": lambda x: x * factor, "camera": Camera("a")}))
    assert got["f"](2) == 6
    assert got["camera"] == Camera("a")


def test_cloudpickle_says_what_it_cannot_pickle() -> None:
    with pytest.raises(NotEncodable, match="not today"):
        CloudpickleCodec().encode([Unpicklable()])


def test_cloudpickle_refuses_surplus_buffers_and_missing_modules() -> None:
    pickler = CloudpickleCodec()
    message = pickler.encode(np.zeros(10_000))
    with pytest.raises(Malformed, match="more buffers"):
        pickler.decode(Message(message.header, [*message.buffers, memoryview(b"x")]))
    with pytest.raises(Malformed, match="No module named 'nowhere'"):
        pickler.decode(Message(b"cnowhere\nthing\n."))


def test_cloudpickle_keeps_fortran_order_without_a_copy() -> None:
    pickler = CloudpickleCodec()
    array = np.asfortranarray(np.random.default_rng(0).random((100, 200)))
    message = pickler.encode(array)
    assert np.shares_memory(np.frombuffer(message.buffers[0], np.uint8), array)
    for writable in (False, True):
        got = pickler.decode(message, writable=writable)
        assert got.flags.f_contiguous
        assert got.flags.writeable == writable
        assert_same(got, array)
