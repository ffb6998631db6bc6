"""The default codec: msgpack, with arrays out of band. This docstring is the wire contract.

A message is a *header* and a list of *buffers*. The header is exactly one msgpack object (the
`specification <https://github.com/msgpack/msgpack/blob/master/spec.md>`_ of 2013 and later) with
nothing after it. The key words below are the types of that specification; everything inside an
ext that is ours is **little-endian**, while msgpack's own lengths and numbers stay big-endian.

===========================  =====================================================================
value                        on the wire
===========================  =====================================================================
None, bool, float, str       nil, bool, float 64 (float 32 is read too), str (valid UTF-8)
int, -2**63 to 2**64 - 1     int, of any width
list, mapping                array, map; a key is a str or an int (never bool; a writer uses no ext
                             there), in a map of more than 4,096 pairs a str. Keys that repeat:
                             the last one counts
bytes                        bin, or ext 4, which `encode` uses above 8 KiB, but in sets
anything else                ext, of a type in the table below; no other type is allowed, msgpack's
                             own timestamp (-1) neither
===========================  =====================================================================

====  ==============  ============================================================================
ext   value           payload
====  ==============  ============================================================================
1     array           descriptor, u32 index of the buffer that holds the elements
2     small array     descriptor, the elements. `encode` uses it up to 8 KiB
3     numpy scalar    descriptor with ndim 0, the element
4     bytes           u32 index of the buffer that holds them
5     tuple           one msgpack array: the items
6     set             one msgpack array: the members, all of them hashable and no two equal (as 1,
                      1.0 and true are); of more than 4,096 each is a str or bytes. `encode` puts
                      them in ascending order of their bytes
7     frozenset       as 6
8     large int       two's complement, beyond what an int holds, in as few bytes as it takes, at
                      most 1,024
9     complex         f64 real part, f64 imaginary part
10    datetime        ASCII, ISO 8601: ``YYYY-MM-DDTHH:MM:SS[.ffffff][+HH:MM[:SS[.ffffff]]]``;
                      without the offset it is naive. What is in brackets is left out where it is
                      0, but for the offset; that of UTC is ``+00:00``
11    date            ASCII, ``YYYY-MM-DD``
12    time            ASCII, ``HH:MM:SS[.ffffff]``, and an offset as in 10
13    timedelta       i32 days, i32 seconds (0 to 86,399), i32 microseconds (0 to 999,999)
====  ==============  ============================================================================

**Descriptor**: u8 length of the dtype's name, u8 ndim (at most 32), the name in ASCII, zeros up to
a multiple of 8 bytes, and ndim times a u64: the shape. **Elements** are little-endian, in C order
(the last index runs fastest), without padding: exactly product of the shape (1 if ndim is 0) times
the element's size in bytes.
The names, with that size:

- 1: ``bool`` (a byte 0 or 1), ``int8``, ``uint8``; 2: ``int16``, ``uint16``, ``float16``;
  4: ``int32``, ``uint32``, ``float32``; 8: ``int64``, ``uint64``, ``float64``, ``complex64``
  (real, imaginary); 16: ``complex128``
- 8: ``datetime64[U]`` and ``timedelta64[U]`` with U one of D, h, m, s, ms, us, ns: an int64 count
  of U (since 1970-01-01T00:00), -2**63 being "not a time"
- 2: ``bfloat16``; 1: ``float8_e3m4``, ``float8_e4m3``, ``float8_e4m3b11fnuz``, ``float8_e4m3fn``,
  ``float8_e4m3fnuz``, ``float8_e5m2``, ``float8_e5m2fnuz``, ``float8_e8m0fnu``, ``float4_e2m1fn``,
  ``float6_e2m3fn``, ``float6_e3m2fn``, ``int2``, ``int4``, ``uint2``, ``uint4`` (a byte for each
  element, whose unused bits, the high ones, are 0). Python needs the package ``ml_dtypes`` for
  these.

**Rules for a reader.** Each buffer is used by exactly one ext 1 or 4: none twice, none left over.
Arrays, maps and exts 5 to 7 nest at most 32 deep, an ext 5 to 7 with its array being one level.
A header has at most 524,288 nodes: each value and each key is one, an array, a map or an ext
counts four, an ext 5 to 7 together with its array. There are at most 16,384 buffers. (These three
are `Codec.limits`.) Bytes that break a rule are refused as a whole (`Malformed` here), before
anything is allocated for what they claim. A set in which more than 64 members share Python's hash
is refused as well: such sets, and large ones and large maps of ints, are made to make the reader
slow.

**One spelling.** What is in an ext can be written in one way alone. So what was decoded encodes to
the bytes that it came from, but for what is left to a writer above: widths of ints, floats and
lengths, repeated keys, the order of a set's members, and what travels in buffers.

What a Python value becomes: bytearray and memoryview arrive as bytes; dataclasses, namedtuples
and `Mapping`s as dict; IntEnum and other subclasses of int, str, float, ... as their base; JAX
arrays as numpy arrays; big-endian arrays as little-endian ones; a time zone as its offset.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache, partial
from types import NoneType
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np

from edgeml.core.codec import Codec
from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Allocator, Message, aligned, copy, own, owned
from edgeml.core.plugins import hookimpl
from edgeml.core.tokens import HEAVY, MANY, TEXT_OR_INT, check

__all__ = ["MsgpackCodec", "edgeml_codec"]

Array: TypeAlias = "np.ndarray[Any, Any]"
DType: TypeAlias = "np.dtype[Any]"

_MAX_NDIM = 32
_MAX_INT = 1024  # bytes; arithmetic on larger ones, and printing them, can take for ever
_SMALL_HEADER = 16_384  # bytes
_INLINE = 8192  # bytes; up to here a copy costs less than a buffer more (measured, also on zmq)

(_ARRAY, _SMALL, _SCALAR, _BYTES, _TUPLE, _SET, _FROZENSET, _INT) = range(1, 9)
(_COMPLEX, _DATETIME, _DATE, _TIME, _TIMEDELTA) = range(9, 14)

_Ext = msgspec.msgpack.Ext
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.decode
_u32 = struct.Struct("<I")
_pair = struct.Struct("<dd")
_delta = struct.Struct("<iii")


class MsgpackCodec(Codec):
    """Carries plain Python values and arrays; safe to decode whoever sent the bytes.

    The module's docstring is the contract, byte by byte.
    """

    name: ClassVar[str] = "msgpack"

    def __init__(self) -> None:
        self.limits = DEFAULT_LIMITS

    @property
    def limits(self) -> Limits:
        """See `Codec.limits`."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        # Bytes of a header that can't have too many nodes; and too few to do harm before it is
        # looked at. Small messages are many, so these are not worked out for each.
        self._bounded = limits.nodes // HEAVY
        self._small = min(_SMALL_HEADER, self._bounded)

    def encode(self, value: Any) -> Message:
        """Encode a value; arrays and bytes of more than 8 KiB become buffers that alias them.

        An array that isn't contiguous in C order, or is big-endian, is copied. Those on a device
        (JAX's) are fetched from it, all at once.

        Raises:
            NotEncodable: for a type, dtype or nesting outside the contract, or a cycle; the text
                says where, as in ``value['cam'][3].meta``, and what to do.
        """
        return self._encode(value, None)

    def encode_owned(self, value: Any, allocate: Allocator | None = None) -> Message:
        """See `Codec.encode_owned`; each array on a device is put in place as it arrives."""
        return own(self._encode(value, allocate), allocate)

    def _encode(self, value: Any, allocate: Allocator | None) -> Message:
        limits = self._limits
        try:
            try:
                walk = _Walk(value, allocate, limits.nesting)
                header = _pack(walk.value(value, 0))
            except (UnicodeEncodeError, OverflowError):
                # Looking into each str and int would slow everyone for the few that need it.
                walk = _CarefulWalk(value, allocate, limits.nesting)
                header = _pack(walk.value(value, 0))
        except _Refused as refused:
            raise NotEncodable(f"value{refused.path} {refused.why}") from None
        if len(header) > self._bounded:
            try:
                _check(header, limits)
            except Malformed as error:
                raise NotEncodable(f"value has {error}: put numbers into arrays") from None
        if walk.buffers and len(walk.buffers) > limits.buffers:
            raise NotEncodable(
                f"value has {len(walk.buffers)} large arrays, of which {limits.buffers} are "
                "carried in one message: stack them"
            )
        return Message(header, walk.buffers)

    def decode(self, message: Message, *, writable: bool = False) -> Any:
        """Decode a message.

        Arrays are read-only views of the buffers (a copy where a buffer isn't aligned for its
        dtype), small ones read-only copies; with ``writable`` they all are private copies.

        Raises:
            Malformed: whatever else the bytes are, also if a dtype needs ``ml_dtypes`` and that
                isn't installed.
        """
        header = message.header
        small = len(header) <= self._small
        try:
            if not small:
                _check(header, self._limits)
            if message.buffers or writable:
                if len(message.buffers) > self._limits.buffers:
                    raise Malformed(f"more than {self._limits.buffers} buffers")
                reader = _Reader(message.buffers, writable)
                value = _unpack(header, ext_hook=reader.ext)
                if reader.unused:
                    raise Malformed(f"{reader.unused} buffers are not used")
            else:
                value = _unpack_alone(header)
            if small and type(value) in _LOOKED_INTO:
                _check_value(value, header, self._limits)
        except Malformed:
            raise
        except _Refused as refused:
            raise Malformed(f"an array {refused.why}") from None
        except Exception as error:
            # Forged bytes reach numpy, datetime, ... and each has its own ways to complain.
            text = f"not a message of the msgpack codec: {type(error).__name__}: {error}"
            raise Malformed(text) from error
        return value


@hookimpl
def edgeml_codec() -> type[Codec]:
    """Answer the registry."""
    return MsgpackCodec


# dtypes and descriptors

_NUMPY: dict[str, DType] = {
    np.dtype(code).name: np.dtype("<" + code)
    for code in (
        *("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"),
        *(f"{k}8[{unit}]" for k in "mM" for unit in ("D", "h", "m", "s", "ms", "us", "ns")),
    )
}
_ML_DTYPES = frozenset(
    (
        *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int2", "int4", "uint2", "uint4"),
    )
)
# What a byte may hold at most, of dtypes that leave some of its bits unused.
_MOST = {"bool": 1, "int2": 3, "uint2": 3, "int4": 15, "uint4": 15, "float4_e2m1fn": 15}
_MOST |= {"float6_e2m3fn": 63, "float6_e3m2fn": 63}
_UP_TO = {most: bytes(range(most + 1)) for most in set(_MOST.values())}


def _refuse_bits(data: bytes | memoryview, most: int) -> None:
    """Refuse elements that have bits where their dtype has none."""
    if len(data) <= 1024:  # where calling numpy costs more than the looking
        wrong = bool(bytes(data).translate(None, _UP_TO[most]))
    else:
        wrong = bool(np.maximum.reduce(np.frombuffer(data, np.uint8)) > most)
    if wrong:
        raise _Refused("has elements with bits that their dtype does not use")


def _dtype(name: str) -> DType | None:
    """The little-endian dtype of that name, None if the contract doesn't have it."""
    if name in _ML_DTYPES:
        try:
            import ml_dtypes

            known: DType = np.dtype(getattr(ml_dtypes, name))
            return known
        except (ImportError, AttributeError):
            why = f"has dtype {name}, which needs a recent ml_dtypes: install it here"
            raise _Refused(why) from None
    return _NUMPY.get(name)


def _pad(length: int) -> int:
    """Bytes in front of the shape, given the length of the dtype's name."""
    return (length + 9) & ~7


@lru_cache(maxsize=1024)
def _describe(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, DType | None, int | None]:
    """The descriptor, the dtype to convert to first, if it differs, and what is in `_MOST`."""
    wire = _dtype(dtype.name)
    if wire is None or dtype.newbyteorder("<") != wire:
        advice = _DTYPE_ADVICE.get(dtype.kind, "convert it to a dtype of numbers with .astype")
        raise _Refused(f"has dtype {dtype}, which is not carried: {advice}")
    if len(shape) > _MAX_NDIM:
        raise _Refused(f"has {len(shape)} dimensions; at most {_MAX_NDIM} are carried")
    name = dtype.name.encode()
    padded = _pad(len(name)) - 2
    head = struct.pack(f"<BB{padded}s{len(shape)}Q", len(name), len(shape), name, *shape)
    return head, None if wire == dtype else wire, _MOST.get(dtype.name)


@lru_cache(maxsize=1024)
def _parse(head: bytes) -> tuple[DType, tuple[int, ...], int, int | None]:
    """The dtype, the shape and the size in bytes that a descriptor claims, and `_MOST`'s."""
    length, ndim = head[0], head[1]
    if ndim > _MAX_NDIM:
        raise Malformed(f"an array of {ndim} dimensions")
    name, *shape = struct.unpack(f"<2x{_pad(length) - 2}s{ndim}Q", head)
    if any(name[length:]):
        raise Malformed("a descriptor that is padded with something")
    dtype = _dtype(name[:length].decode())
    if dtype is None:
        raise Malformed(f"unknown dtype {name!r}")
    return dtype, tuple(shape), math.prod(shape) * dtype.itemsize, _MOST.get(dtype.name)


# Encoding: one walk that replaces what msgpack lacks by exts, before msgspec sees the value.
# (msgspec would flatten tuples, sets, namedtuples and enums without asking.)


class _Refused(Exception):
    """Something isn't carried; the path grows from its end while this unwinds."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.path = ""


class _Walk:
    """One encoding. `depth` is the number of containers around a value."""

    __slots__ = ("allocate", "arrivals", "buffers", "in_set", "nesting", "root")
    plain: ClassVar[frozenset[type]] = frozenset({NoneType, bool, int, float, str})
    plain_keys: ClassVar[frozenset[type]] = frozenset({str, int})

    def __init__(self, root: Any, allocate: Allocator | None, nesting: int) -> None:
        self.root = root
        self.allocate = allocate
        self.nesting = nesting
        self.arrivals: _Arrivals | None = None  # made with the first array that is on a device
        self.buffers: list[memoryview] = []
        self.in_set = 0

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in self.plain:
            return value
        return _CONVERT[kind](self, value, depth)

    def pairs(
        self, pairs: Iterable[tuple[Any, Any]], n: int, form: str, depth: int
    ) -> dict[Any, Any]:
        if self.in_set:
            raise _Refused("would arrive as a dict, which no set can hold: send a list of them")
        if depth == self.nesting:
            raise _Refused(f"is nested more than {self.nesting} deep, or contains itself")
        plain, plain_keys = self.plain, self.plain_keys
        changed = False
        out = {}
        key = None
        try:
            for key, item in pairs:
                kind = type(item)
                if type(key) not in plain_keys:
                    key = self.key(key)
                    changed = True
                out[key] = item if kind in plain else _CONVERT[kind](self, item, depth + 1)
        except _Refused as refused:
            refused.path = form.format(key) + refused.path
            raise
        if changed and len(out) != n:
            raise _Refused("has keys that would arrive as one, as they differ in their type alone")
        if n > MANY and not all(type(key) is str for key in out):
            raise _Refused(f"has more than {MANY} keys, some of them int: use their str")
        return out

    def items(self, items: Iterable[Any], form: str, depth: int) -> list[Any]:
        if depth == self.nesting:
            raise _Refused(f"is nested more than {self.nesting} deep, or contains itself")
        items = list(items)
        plain = self.plain
        if plain.issuperset(map(type, items)):
            return items
        out: list[Any] = []
        try:
            for item in items:
                kind = type(item)
                out.append(item if kind in plain else _CONVERT[kind](self, item, depth + 1))
        except _Refused as refused:
            refused.path = form.format(len(out)) + refused.path
            raise
        return out

    def key(self, key: Any) -> str | int:
        if isinstance(key, str):
            return self.text(key, 0)
        if not isinstance(key, int) or isinstance(key, bool):
            raise _Refused(f"has a key of type {type(key).__name__}: use str or int")
        value = int.__index__(key)
        if not -(1 << 63) <= value < 1 << 64:
            raise _Refused("has a key beyond 64 bits: use its str")
        return value

    def text(self, value: str, depth: int) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            why = "has surrogates, which UTF-8 lacks: send value.encode(errors='surrogateescape')"
            raise _Refused(why) from None
        return str.__str__(value)

    def integer(self, value: int, depth: int) -> Any:
        value = int.__index__(value)
        if -(1 << 63) <= value < 1 << 64:
            return value
        size = _size_of(value)
        if size > _MAX_INT:
            raise _Refused(f"is an int of more than {_MAX_INT} bytes: send it as bytes")
        return _Ext(_INT, value.to_bytes(size, "little", signed=True))

    def mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        return self.pairs(value.items(), len(value), "[{!r:.80}]", depth)

    def dataclass(self, value: Any, depth: int) -> Any:
        names = [field.name for field in fields(value)]
        pairs = ((name, getattr(value, name)) for name in names)
        return self.pairs(pairs, len(names), ".{}", depth)

    def namedtuple(self, value: Any, depth: int) -> Any:
        pairs = zip(value._fields, value, strict=True)
        return self.pairs(pairs, len(value), ".{}", depth)

    def sequence(self, value: list[Any], depth: int) -> Any:
        return self.items(value, "[{}]", depth)

    def tuple_(self, value: tuple[Any, ...], depth: int) -> Any:
        return _Ext(_TUPLE, _pack(self.items(value, "[{}]", depth)))

    def set_(self, value: Iterable[Any], depth: int, code: int = _SET) -> Any:
        self.in_set += 1
        members = self.items(value, "{{...}}", depth)
        self.in_set -= 1
        # In their bytes' order, or a set would have others in each process that makes it.
        packed = _pack([msgspec.Raw(member) for member in sorted(map(_pack, members))])
        if not self.in_set and not (len(members) <= 64 and self.plain.issuperset(map(type, value))):
            # What hashes here may arrive as what doesn't, or as what is equal to another.
            try:
                _READER.ext(code, memoryview(packed))
            except (Malformed, TypeError) as error:
                raise _Refused(f"would arrive as what is no set: {error}") from None
        return _Ext(code, packed)

    def frozenset_(self, value: frozenset[Any], depth: int) -> Any:
        return self.set_(value, depth, _FROZENSET)

    def bytes_(self, value: Any, depth: int) -> Any:
        view = memoryview(value)
        if view.nbytes <= _INLINE or self.in_set:  # a set's bytes are put in order
            return view.tobytes()
        flat = view.format == "B" and view.ndim == 1 and view.c_contiguous
        self.buffers.append(view if flat else memoryview(view.tobytes()))
        return _Ext(_BYTES, _u32.pack(len(self.buffers) - 1))

    def array(self, value: Array, depth: int) -> Any:
        head, wire, most = _describe(value.dtype, value.shape)
        if wire is not None:
            value = value.astype(wire)
        if value.nbytes <= _INLINE:
            data = value.tobytes()
            if most is not None:
                _refuse_bits(data, most)
            return _Ext(_SMALL, head + data)
        buffer = _flat(value)
        if most is not None:
            _refuse_bits(buffer, most)
        self.buffers.append(buffer)
        return _Ext(_ARRAY, head + _u32.pack(len(self.buffers) - 1))

    def jax_array(self, value: Any, depth: int) -> Any:
        if self.arrivals is None:
            self.arrivals = _Arrivals(self.root, self.allocate)
        try:
            array = np.asarray(value)  # waits for this one alone
        except (RuntimeError, TypeError, ValueError) as error:
            raise _Refused(f"is a JAX array without values that could be sent: {error}") from None
        before = len(self.buffers)
        ext = self.array(array, depth)
        if len(self.buffers) > before:
            self.buffers[-1] = self.arrivals.place(value, array, self.buffers[-1])
        return ext

    def scalar(self, value: Any, depth: int) -> Any:
        head, _, most = _describe(value.dtype, ())
        data = value.tobytes()
        if most is not None:
            _refuse_bits(data, most)
        return _Ext(_SCALAR, head + data)


def _flat(array: Array) -> memoryview:
    """An array's memory, or that of a copy where it can't be sent from there."""
    try:
        return array.data.cast("B")
    except (BufferError, NotImplementedError, TypeError, ValueError):
        # Not contiguous, or of a dtype that exports no buffer of its own, as uint8 always does.
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class _Arrivals:
    """The arrays of one value that lie on a device, on their way to this machine's memory.

    All of them are under way at once, so one can be put in place while others still come. The small
    ones go first: the header waits for them.
    """

    def __init__(self, root: Any, allocate: Allocator | None) -> None:
        arrays = _arrays_on_devices(root)
        for array in sorted(arrays, key=lambda array: bool(array.nbytes > _INLINE)):
            # What can't be copied is refused where it is reached, and with its path.
            with suppress(Exception):
                array.copy_to_host_async()
        size = sum(aligned(array) for array in arrays if array.nbytes > _INLINE)
        self._free = allocate(size) if allocate is not None and size else None

    def place(self, value: Any, array: Array, buffer: memoryview) -> memoryview:
        """Return the memory to send an array from that has arrived: what was allocated, if any."""
        size = aligned(buffer)
        if self._free is not None and size <= self._free.nbytes:
            taken, self._free = self._free[: buffer.nbytes], self._free[size:]
            copy(taken, buffer)
            return taken.toreadonly()
        # JAX changes no array, so a copy that it has made stays as it is. But what lies in this
        # machine's memory anyway isn't copied, and is given away to a function that is donated it.
        return owned(buffer) if _is_copy(value, array) else buffer


def _arrays_on_devices(root: Any) -> list[Any]:
    """The arrays in a value that have to be fetched, each once, in the order of the walk."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    left = [root]
    while left:
        item = left.pop()
        kind = type(item)
        if hasattr(kind, "copy_to_host_async"):
            found[id(item)] = item
            continue
        inner: Iterable[Any]
        if issubclass(kind, Mapping):
            inner = item.values()
        elif issubclass(kind, (list, tuple, set, frozenset)):
            inner = item
        elif is_dataclass(kind):
            inner = [getattr(item, field.name) for field in fields(item)]
        else:
            continue
        if id(item) not in seen:
            seen[id(item)] = item
            left += reversed(list(inner))
    return list(found.values())


def _is_copy(value: Any, array: Array) -> bool:
    """Whether an array's memory is another than that of the JAX array it was made from."""
    try:
        return bool(value.unsafe_buffer_pointer() != array.ctypes.data)
    except Exception:  # one that lies on several devices has no such pointer
        return False


class _CarefulWalk(_Walk):
    """Looks into every str and int too; slower, and wanted only after msgspec has refused one."""

    __slots__ = ()
    plain = frozenset({NoneType, bool, float})
    plain_keys = frozenset()


_Convert: TypeAlias = Callable[[_Walk, Any, int], Any]


class _Converters(dict[type, _Convert]):
    def __missing__(self, kind: Any) -> _Convert:
        return _inherited(kind)


_CONVERT = _Converters(
    {
        dict: _Walk.mapping,
        list: _Walk.sequence,
        tuple: _Walk.tuple_,
        set: _Walk.set_,
        frozenset: _Walk.frozenset_,
        bytes: _Walk.bytes_,
        bytearray: _Walk.bytes_,
        memoryview: _Walk.bytes_,
        np.ndarray: _Walk.array,
        int: _Walk.integer,
        str: _Walk.text,
        float: lambda walk, value, depth: float.__float__(value),
        complex: lambda walk, value, depth: _Ext(_COMPLEX, _pair.pack(value.real, value.imag)),
        dt.datetime: lambda walk, value, depth: _Ext(_DATETIME, value.isoformat().encode()),
        dt.date: lambda walk, value, depth: _Ext(_DATE, value.isoformat().encode()),
        dt.time: lambda walk, value, depth: _Ext(_TIME, value.isoformat().encode()),
        dt.timedelta: lambda walk, value, depth: _Ext(
            _TIMEDELTA, _delta.pack(value.days, value.seconds, value.microseconds)
        ),
    }
)
_BASES = (int, str, float, complex, bytes, bytearray, list, tuple, set, frozenset, np.ndarray)


@lru_cache(maxsize=256)
def _inherited(kind: type) -> _Convert:
    """How to convert a type that isn't in the table itself."""
    if is_dataclass(kind):
        return _Walk.dataclass
    if issubclass(kind, np.generic) and not issubclass(kind, (str, bytes)):
        return _Walk.scalar
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _Walk.namedtuple
    if issubclass(kind, np.ma.MaskedArray):
        raise _Refused("is a MaskedArray: send its .data and its .mask")
    for base in _BASES:
        if issubclass(kind, base):
            return _CONVERT[base]
    if issubclass(kind, Mapping):
        return _Walk.mapping
    if hasattr(kind, "copy_to_host_async") or issubclass(
        kind, getattr(sys.modules.get("jax"), "Array", ())
    ):
        return _Walk.jax_array
    advice = _ADVICE.get(kind.__module__.partition(".")[0], "send a dict of what it holds")
    if issubclass(kind, Enum):
        advice = "send its .value"
    raise _Refused(f"is a {kind.__module__}.{kind.__qualname__}, which is not carried: {advice}")


_ADVICE = {
    "torch": "send value.detach().cpu().numpy()",
    "tensorflow": "send value.numpy()",
    "pandas": "send value.to_numpy()",
    "PIL": "send numpy.asarray(value)",
}
_DTYPE_ADVICE = {
    "O": "send value.tolist(), or convert it to a dtype of numbers with value.astype",
    "U": "send value.tolist()",
    "S": "send value.tolist()",
    "T": "send value.tolist()",
    "V": "send a dict with an array for each field",
}


# Decoding: a check of the structure, which allocates nothing, and then msgspec.

_EXTS = {code: _TUPLE <= code <= _FROZENSET for code in range(_ARRAY, _TIMEDELTA + 1)}


def _check(header: bytes, limits: Limits) -> None:
    """Refuse what msgspec would accept: keys that flood a hash table, depth, foreign exts.

    A dict is filled while msgspec decodes, so keys must have been looked at before.
    """
    check(header, nodes=limits.nodes, nesting=limits.nesting, keys=TEXT_OR_INT, exts=_EXTS)


def _check_value(value: Any, header: bytes, limits: Limits) -> None:
    """Refuse what msgspec accepted: keys, depth, timestamps. Several times as fast as `_check`."""
    level = [value]
    depth, nesting = 0, limits.nesting
    timestamps = False
    while level:
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind not in _LOOKED_INTO:
                continue
            if kind is dt.datetime:
                timestamps = True
                continue
            if depth == nesting:
                raise Malformed(f"nested more than {nesting} deep")
            if kind is not dict:
                inner += item
            elif _KEY_TYPES.issuperset(map(type, item)):
                inner += item.values()
            else:
                raise Malformed("a key that is neither str nor int")
        level = inner
        depth += 1
    # msgspec makes datetimes of msgpack's own ext for them, without asking.
    if timestamps and any(head in header for head in _TIMESTAMPS):
        _check(header, limits)


_KEY_TYPES = frozenset({str, int})
_LOOKED_INTO = frozenset({dict, list, tuple, set, frozenset, dt.datetime})
_TIMESTAMPS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")  # whatever else may look like that


class _Reader:
    """One decoding: the buffers that are left, and what msgspec asks for each ext."""

    __slots__ = ("buffers", "unused", "writable")

    def __init__(self, buffers: Sequence[memoryview], writable: bool) -> None:
        self.buffers: list[memoryview | None] = list(buffers)
        self.unused = len(buffers)
        self.writable = writable

    def ext(self, code: int, data: memoryview) -> Any:
        if code <= _SCALAR:
            if code < _ARRAY:
                raise Malformed(f"unknown ext {code}")
            return self.array(code, data)
        if code == _BYTES:
            return bytes(self.take(data))
        if code <= _FROZENSET:
            items = _unpack(data, ext_hook=self.ext)
            if type(items) is not list:
                raise Malformed("a tuple or set that is no array")
            if code == _TUPLE:
                return tuple(items)
            return _set_of(items, code)
        return _READ[code](bytes(data))

    def take(self, data: bytes | memoryview) -> memoryview:
        index: int = _u32.unpack(data)[0]
        buffer = self.buffers[index]
        if buffer is None:
            raise Malformed(f"buffer {index} is used twice")
        self.buffers[index] = None
        self.unused -= 1
        return buffer.toreadonly()

    def array(self, code: int, data: memoryview) -> Any:
        raw = bytes(data)
        split = ((raw[0] + 9) & ~7) + 8 * raw[1]
        dtype, shape, nbytes, most = _parse(raw[:split])
        if code == _SCALAR and shape:
            raise Malformed(f"a scalar of shape {shape}")
        buffer = self.take(raw[split:]) if code == _ARRAY else None
        size = len(raw) - split if buffer is None else len(buffer)
        if size != nbytes:
            raise Malformed(f"{size} bytes for an array of {nbytes}")
        array: Array
        if buffer is None:
            array = np.ndarray(shape, dtype, raw, split)  # aligned, as the split is
        else:
            # np.ndarray(buffer=...) would see through the memoryview to memory that may be
            # writable, and let the receiver set the flag.
            array = np.frombuffer(buffer, dtype)
            if len(shape) != 1:
                array = array.reshape(shape)
            if not array.flags.aligned:
                array = array.copy()
                array.flags.writeable = False
        if most is not None:
            _refuse_bits(raw[split:] if buffer is None else buffer, most)
        if self.writable:
            array = array.copy()
        return array[()] if code == _SCALAR else array


_READER = _Reader((), False)
_unpack_alone = msgspec.msgpack.Decoder(ext_hook=_READER.ext).decode
"""Decodes a header that comes without buffers; a reader made once serves them all."""


def _set_of(items: list[Any], code: int) -> set[Any] | frozenset[Any]:
    # int, float, complex and tuple have hashes that a sender can choose: equal ones, or such that
    # each member meets all others; str and bytes don't.
    if len(items) > 64:
        if len(items) > MANY and not _UNCHOSEN.issuperset(map(type, items)):
            raise Malformed(f"a set of more than {MANY}, and not only of str and bytes")
        if max(Counter(map(hash, items)).values()) > 64:
            raise Malformed("a set that floods its hash table")
    members = set(items) if code == _SET else frozenset(items)
    if len(members) != len(items):
        raise Malformed("a set with members that are equal")
    return members


_UNCHOSEN = frozenset({str, bytes})


# Of each value there is one spelling, so that nobody need look at two.


def _read_int(data: bytes) -> int:
    if len(data) > _MAX_INT:
        raise Malformed(f"an int of {len(data)} bytes")
    value = int.from_bytes(data, "little", signed=True)
    if -(1 << 63) <= value < 1 << 64 or _size_of(value) != len(data):
        raise Malformed("a large int that has a shorter form")
    return value


def _size_of(value: int) -> int:
    """Bytes of an int in two's complement."""
    return (value if value >= 0 else ~value).bit_length() // 8 + 1


_DATE_FORM = rb"\d{4}-\d\d-\d\d"
_CLOCK = rb"(?:[01]\d|2[0-3]):[0-5]\d"
_FRACTION = rb"(?:\.(?!0{6})\d{6})"
_TIME_FORM = (
    rb"%(clock)b:[0-5]\d%(fraction)b?"
    rb"(?:(?!-00:00$)[+-]%(clock)b(?::(?!00$)[0-5]\d%(fraction)b?)?)?"
) % {b"clock": _CLOCK, b"fraction": _FRACTION}
_FORMS = {
    dt.date: re.compile(_DATE_FORM),
    dt.time: re.compile(_TIME_FORM),
    dt.datetime: re.compile(_DATE_FORM + b"T" + _TIME_FORM),
}


def _read_date(kind: Any, data: bytes) -> Any:
    # What fromisoformat takes differs between versions of Python, and isoformat is slow.
    if not _FORMS[kind].fullmatch(data):
        raise Malformed(f"a {kind.__name__} in a form that is not carried")
    value = kind.fromisoformat(data.decode())
    if data[-16:-15] in (b"+", b"-"):  # an offset with microseconds, which it may lose
        offset = dt.time.fromisoformat(data[-15:].decode())
        east = dt.datetime.combine(dt.date.min, offset) - dt.datetime.min
        value = value.replace(tzinfo=dt.timezone(east if data[-16:-15] == b"+" else -east))
    return value


def _read_delta(data: bytes) -> dt.timedelta:
    days, seconds, microseconds = _delta.unpack(data)
    if not (0 <= seconds < 86_400 and 0 <= microseconds < 1_000_000):
        raise Malformed("a timedelta whose seconds or microseconds are a day's, or a second's")
    return dt.timedelta(days, seconds, microseconds)


_READ: dict[int, Callable[[bytes], Any]] = {
    _INT: _read_int,
    _COMPLEX: lambda data: complex(*_pair.unpack(data)),
    _DATETIME: partial(_read_date, dt.datetime),
    _DATE: partial(_read_date, dt.date),
    _TIME: partial(_read_date, dt.time),
    _TIMEDELTA: _read_delta,
}
