"""The conformance suite for codecs. A third party's whole test file::

from edgeml.testing import CodecTests
from mine import MyCodec

class TestMyCodec(CodecTests):
    codec = MyCodec()
"""

from __future__ import annotations

import datetime as dt
import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest

from edgeml.core.codec import Codec, Wrapped, limited
from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.limits import Limits
from edgeml.core.message import Message

__all__ = ["CodecTests", "assert_same"]

_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_LARGE = 1 << 18  # bytes; every codec sends an array of this size out of band


def assert_same(got: Any, sent: Any) -> None:
    """Assert that a value arrived as it was sent.

    Types are equal, NaN equals NaN, 0.0 isn't -0.0, and arrays may differ in nothing but byte
    order and memory layout.
    """
    assert type(got) is type(sent)
    if isinstance(sent, dict):
        assert list(got) == list(sent)
        assert list(map(type, got)) == list(map(type, sent))
        for key, item in sent.items():
            assert_same(got[key], item)
    elif isinstance(sent, (list, tuple)):
        assert len(got) == len(sent)
        for got_item, item in zip(got, sent, strict=True):
            assert_same(got_item, item)
    elif isinstance(sent, (np.ndarray, np.generic)):
        assert got.dtype.newbyteorder("=") == sent.dtype.newbyteorder("=")
        assert got.shape == sent.shape
        # Bytes, because NaN differs from itself; in one byte order, because that may change.
        native = sent.dtype.newbyteorder("=")
        assert got.astype(native).tobytes() == sent.astype(native).tobytes()
    elif isinstance(sent, float):
        assert got.hex() == sent.hex()
    else:
        assert got == sent


def _received(message: Message) -> Message:
    """The message as a transport hands it over: other memory, which nobody may write to."""
    return Message(message.header, [memoryview(bytes(b)) for b in message.buffers])


class _Text(str):
    """One that is equal to nothing but itself."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class _Rows(list[int]):
    """A list that can be hashed, which no list that arrives can be."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = {"k": value} if level % 2 else [value]
    return value


def _sample() -> dict[str, Any]:
    """A value with a bit of everything that every codec carries."""
    rng = np.random.default_rng(0)
    return {
        "name": "käfer",
        "step": 12,
        "reward": -0.5,
        "done": False,
        "info": None,
        "raw": b"\x00\xff",
        "nested": [1, [2.5, {"deep": [True, "x"]}]],
        "state": rng.random(7),
        "image": rng.integers(0, 256, (64, 64, 32), np.uint8),
        "mask": rng.random(5) > 0.5,
        "scalar": np.float32(3),
    }


class CodecTests:
    """What every codec promises; subclass it and set `codec`.

    Tests with forged bytes are skipped for a codec that says that it ``executes``.
    """

    codec: ClassVar[Codec]

    @pytest.fixture
    def no_gc(self) -> Iterator[None]:
        """Leave the freeing to reference counts alone."""
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def round_trip(self, value: Any, *, writable: bool = False) -> Any:
        """Encode, let the buffers travel, and decode."""
        return self.codec.decode(_received(self.codec.encode(value)), writable=writable)

    def value_or_malformed(self, header: bytes, buffers: list[memoryview]) -> None:
        """Decode what may be damaged; anything but a value or `Malformed` fails the test."""
        try:
            self.codec.decode(Message(header, buffers))
        except Malformed:
            pass
        except BaseException as error:
            raise AssertionError(f"decoding {header!r} raised {error!r}") from error

    # Values

    def test_describes_itself(self) -> None:
        """It has a name, and says whether decoding runs the sender's code."""
        assert isinstance(self.codec, Codec)
        assert isinstance(self.codec.name, str)
        assert self.codec.name
        assert isinstance(self.codec.executes, bool)

    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, False, 0, 1, -1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)),
            *(0.0, -0.0, 1.5, 1e300, float("inf"), float("-inf"), float("nan")),
            *("", "x", "käfer \U0001f916", "x" * 100_000, b"", b"\x00\xff", bytes(100_000)),
            *([], [None], [1, "a", 2.5, b"b", True], {}, {"": 0}, {"a": 1, "b": [2, {"c": 3}]}),
            *([[[[1], []], {}]], [{"a": [{"b": {}}]}] * 3, list(range(1000))),
        ],
        ids=lambda value: f"{value!r:.30}",
    )
    def test_plain_values(self, value: Any) -> None:
        """Values of the basic types arrive equal, and of the same type."""
        assert_same(self.round_trip(value), value)
        assert_same(self.round_trip({"key": [value]}), {"key": [value]})

    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (7, 1, 5), (300, 201)], ids=str)
    def test_arrays(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Arrays of the common dtypes arrive equal, in any shape: 0-d, empty, large."""
        array = np.asarray(np.random.default_rng(0).normal(0, 50, shape)).astype(np.int8)
        assert_same(self.round_trip(array.astype(dtype)), array.astype(dtype))

    @pytest.mark.parametrize("side", [8, 400])
    def test_layouts(self, side: int) -> None:
        """Strided, reversed, transposed, broadcast and big-endian arrays arrive equal."""
        array = np.arange(side * side, dtype=np.int32).reshape(side, side)
        for value in (
            np.arange(side * side)[::2],
            *(array[::2], array[:, 1::3], array[::-1], array.T, array[:, 0]),
            *(np.broadcast_to(array[0], (side, side)), array.astype(">i4"), array.T.astype(">f8")),
        ):
            assert_same(self.round_trip(value), value)

    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_numpy_scalars(self, dtype: str) -> None:
        """A numpy scalar stays one, of the same dtype."""
        value = np.ones((), dtype)[()]
        assert_same(self.round_trip({"x": value})["x"], value)

    def test_many_at_once(self) -> None:
        """A value with a bit of everything arrives equal, and more than once."""
        message = _received(self.codec.encode(_sample()))
        assert_same(self.codec.decode(message), _sample())
        assert_same(self.codec.decode(message), _sample())

    def test_what_no_codec_carries(self) -> None:
        """What can't travel is refused as `NotEncodable`."""
        for value in (threading.Lock(), (i for i in [1])):
            with pytest.raises(NotEncodable):
                self.codec.encode(value)
            with pytest.raises(NotEncodable):
                self.codec.encode({"a": [1, value]})

    # Memory

    def test_encode_does_not_copy(self) -> None:
        """A large array is sent from where it lies, in a flat buffer of bytes."""
        array = np.arange(_LARGE, dtype=np.uint8).reshape(-1, 64)
        message = self.codec.encode({"x": [array]})
        assert len(message.header) < 4096
        (buffer,) = message.buffers
        assert (buffer.format, buffer.ndim, buffer.nbytes) == ("B", 1, array.nbytes)
        array[0, 0] = 77
        assert buffer[0] == 77

    def test_decode_does_not_copy(self) -> None:
        """A large array arrives as a read-only view, whoever else may write to the buffer."""
        array = np.arange(_LARGE // 8, dtype=np.float64)
        message = self.codec.encode({"x": array})
        for kind in (bytes, bytearray):
            memory = kind(message.buffers[0])
            got = self.codec.decode(Message(message.header, [memoryview(memory)]))["x"]
            assert np.shares_memory(got, np.frombuffer(memory, np.uint8))
            assert not got.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                got.flags.writeable = True
            assert_same(got, array)

    def test_writable(self) -> None:
        """With `writable`, arrays of any size are private, also if the sender's were read-only."""
        for size in (1, 1000, _LARGE):
            array = np.arange(size)
            frozen = array.copy()
            frozen.flags.writeable = False
            message = _received(self.codec.encode([array, frozen]))
            for got in self.codec.decode(message, writable=True):
                got[:] = -1
            assert_same(self.codec.decode(message, writable=True), [array, array])

    def test_misaligned_buffers(self) -> None:
        """A buffer may start anywhere."""
        array = np.arange(_LARGE // 8, dtype=np.float64)
        message = self.codec.encode(array)
        for offset in (1, 4):
            memory = memoryview(bytes(offset) + bytes(message.buffers[0]))[offset:]
            got = self.codec.decode(Message(message.header, [memory]))
            assert_same(got, array)
            assert not got.flags.writeable

    @pytest.mark.usefixtures("no_gc")
    def test_buffers_die_with_the_last_view(self) -> None:
        """Encoding and decoding leave no reference cycle, also where they fail."""
        array = np.zeros(_LARGE, np.uint8)
        sent = weakref.ref(array)
        header = self.codec.encode([{"x": array}]).header
        with pytest.raises(NotEncodable):
            self.codec.encode([{"x": array}, threading.Lock()])
        memory = array.copy()
        received = weakref.ref(memory)
        got = self.codec.decode(Message(header, [memoryview(memory)]))
        with pytest.raises(Malformed):
            self.codec.decode(Message(header, [memoryview(memory)[1:]]))
        del array
        assert sent() is None
        del memory
        assert received() is not None
        del got
        assert received() is None

    def test_threads(self) -> None:
        """One codec serves several threads at once."""
        threads = 4
        barrier = threading.Barrier(threads)

        def work(seed: int) -> None:
            value = _sample() | {"state": np.full(10_000, seed), "step": [seed] * seed}
            barrier.wait(10)
            for _ in range(50):
                assert_same(self.round_trip(value), value)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))

    # What the other end makes of it

    def test_what_is_encoded_is_decoded(self) -> None:
        """What the other end would refuse is refused here already, where somebody can mend it."""
        modulus = sys.hash_info.modulus
        for value in (
            *(_nested(depth) for depth in (8, 30, 33, 100, 900)),
            *([0] * 600_000, [[]] * 200_000, {str(i): i for i in range(300_000)}),
            *(dict.fromkeys(range(4096), 0), {i << 32: 0 for i in range(5000)}),
            *(set(range(5000)), {i * modulus for i in range(100)}, {1.5, (1, "a"), frozenset("b")}),
            *(2**63, 2**64, -(2**70), 2**9000, "\ud800", {"\ud800": 1}, {_Text("a"): 1, "a": 2}),
            *({True: 1}, {(1,): 1}, {None: 1}, {_Text("a"), "a"}, {_Rows((1,))}),
            *(np.frombuffer(b"\x02\x01", bool), np.zeros((1,) * 33), np.zeros((0, 1 << 40))),
            *([np.zeros(_LARGE, np.uint8)] * 3, dt.datetime(1, 1, 1), dt.timedelta.max),
        ):
            try:
                message = self.codec.encode(value)
            except NotEncodable:
                continue
            self.codec.decode(_received(message))

    def test_what_is_decoded_encodes_to_the_same_bytes(self) -> None:
        """There is one way to write a value, in each process and after each journey."""
        if isinstance(self.codec, Wrapped):
            pytest.skip("what is kept as a file, such as a JPEG, need not be what is made again")
        self._skip_if_it_executes()
        for value in (_sample(), [1, 1.0, True, "1", b"1", None, -0.0, {"b": 1, "a": 2}]):
            message = self.codec.encode(value)
            again = self.codec.encode(self.codec.decode(_received(message)))
            assert again.header == message.header
            assert list(map(bytes, again.buffers)) == list(map(bytes, message.buffers))

    def test_limits(self) -> None:
        """It keeps to its limits, both ways; a copy with others leaves it as it is."""
        self._skip_if_it_executes()
        if isinstance(self.codec, Wrapped):
            pytest.skip("they are the inner codec's")
        strict = limited(self.codec, Limits(nodes=1000, nesting=8, buffers=2))
        large = np.zeros(_LARGE, np.uint8)
        value: Any
        for value in ([0] * 900, [[]] * 150, _nested(8), [large] * 2, _nested(7)):
            assert_same(strict.decode(_received(strict.encode(value))), value)
        for value in ([0] * 1001, [[]] * 1001, [{"a": 1}] * 501, _nested(9), [large] * 3):
            with pytest.raises(NotEncodable):
                strict.encode(value)
            with pytest.raises(Malformed):
                strict.decode(_received(self.codec.encode(value)))
            assert_same(self.round_trip(value), value)

    # Bytes that nobody encoded

    def test_truncated(self) -> None:
        """A message that was cut short is refused."""
        message = self.codec.encode(_sample())
        for length in range(len(message.header)):
            self.value_or_malformed(message.header[:length], list(message.buffers))

    def test_wrong_buffers(self) -> None:
        """Buffers that are missing, cut short or too long are refused; one too many may be."""
        message = self.codec.encode(_sample())
        (buffer,) = message.buffers
        longer = memoryview(bytes(buffer) + b"x")
        for buffers in ([], [buffer[:-1]], [buffer[:0]], [longer]):
            with pytest.raises(Malformed):
                self.codec.decode(Message(message.header, buffers))
        self.value_or_malformed(message.header, [buffer, buffer])

    def test_random_bytes(self) -> None:
        """Noise is a value or refused."""
        self._skip_if_it_executes()
        rng = np.random.default_rng(1)
        for length in [0, 1, 2, 3] * 300 + [10, 100, 1000] * 300:
            self.value_or_malformed(rng.bytes(length), [memoryview(b"12345678")] * (length % 3))

    def test_flipped_bytes(self) -> None:
        """A damaged message is a value or refused."""
        self._skip_if_it_executes()
        rng = np.random.default_rng(2)
        message = self.codec.encode(_sample())
        tracemalloc.start()
        try:
            for position in range(len(message.header)):
                for change in (1, 0x80, 0xFF, *rng.integers(1, 256, 4)):
                    header = bytearray(message.header)
                    header[position] ^= int(change)
                    self.value_or_malformed(bytes(header), list(message.buffers))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < message.nbytes + (1 << 20), "memory was taken for what was merely claimed"

    def _skip_if_it_executes(self) -> None:
        if self.codec.executes:
            pytest.skip("forged bytes may do anything to a codec that executes what it is sent")
