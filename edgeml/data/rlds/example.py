"""`tf.train.Example`, the protocol buffer in which records hold named lists, without protobuf.

An example is a map from names to lists of bytes, of float32 or of int64 (fields 1, 2 and 3 of
`Feature`); see https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/
and https://protobuf.dev/programming-guides/encoding/ for what is what on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.tree import Array

__all__ = ["Values", "decode_example", "encode_example"]

Values = list[bytes] | Array  # the array is of float32 or int64, and has one axis

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_LONGEST = 10  # bytes of a varint of 64 bits


def encode_example(features: Mapping[str, Values]) -> bytes:
    """Return the bytes of an example.

    Args:
        features: names with lists of bytes, arrays of shape (n,) float32, or integer or boolean
            ones, which become int64.
    """
    entries = []
    for name, values in features.items():
        if isinstance(values, list):
            kind, packed = 1, b"".join(_tag(1, value) for value in values)
        elif values.dtype.kind == "f":
            kind, packed = 2, _tag(1, values.astype("<f4", copy=False).tobytes())
        else:
            kind, packed = 3, _tag(1, _write_varints(values))
        entries.append(_tag(1, _tag(1, name.encode()) + _tag(2, _tag(kind, packed))))
    return _tag(1, b"".join(entries))


def decode_example(data: bytes) -> dict[str, Values]:
    """Return the named lists of an example: bytes, or arrays of shape (n,) float32 or int64.

    Raises:
        Malformed: not an example.
    """
    features: dict[str, Values] = {}
    view = memoryview(data)
    for field, example in _read_fields(view):
        if field != 1 or isinstance(example, int):
            continue  # as protocol buffers do with what a later version has added
        for field, entry in _read_fields(example):
            if field != 1 or isinstance(entry, int):
                continue
            parts = dict(_read_fields(entry))  # of a repeated one the last counts
            name, feature = parts.get(1, b""), parts.get(2, b"")
            if isinstance(name, int) or isinstance(feature, int):
                raise Malformed("a feature's name or value is a number")
            try:
                features[str(name, "utf-8")] = _read_values(memoryview(feature))
            except UnicodeDecodeError:
                raise Malformed("a feature's name is not UTF-8") from None
    return features


def _read_values(feature: memoryview) -> Values:
    kind, content = 1, memoryview(b"")
    for field, value in _read_fields(feature):
        if field in (1, 2, 3):
            if isinstance(value, int):
                raise Malformed("a feature's list is a number")
            kind, content = field, value
    elements = [value for field, value in _read_fields(content) if field == 1]
    if kind == 1:
        if any(isinstance(value, int) for value in elements):
            raise Malformed("a number in a list of bytes")
        return list(map(bytes, elements))
    # Each element is a run of packed numbers, or a single one that was not packed.
    if kind == 2:
        if any(isinstance(value, int) or len(value) % 4 for value in elements):
            raise Malformed("a list of float32 that is not a multiple of 4 bytes long")
        return np.frombuffer(b"".join(elements), "<f4")
    runs = [
        np.array([value], np.uint64).view(np.int64)
        if isinstance(value, int)
        else _read_varints(value)
        for value in elements
    ]
    return runs[0] if len(runs) == 1 else np.concatenate([np.empty(0, np.int64), *runs])


def _tag(field: int, content: bytes) -> bytes:
    return bytes((field << 3 | _BYTES,)) + _write_varint(len(content)) + content


def _write_varint(number: int) -> bytes:
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    result.append(number)
    return bytes(result)


def _write_varints(values: Array) -> bytes:
    """Encode integers, each in 1 to 10 bytes, 7 bits in each and the lowest first."""
    if values.dtype != np.uint64:
        values = values.astype(np.int64).view(np.uint64)  # negative ones take all 10 bytes
    if not values.size or values.max() <= 0x7F:
        return values.astype(np.uint8).tobytes()
    shifts = np.arange(_LONGEST, dtype=np.uint64) * np.uint64(7)
    groups = values[:, None] >> shifts
    more = groups > 0x7F  # whether another byte follows
    octets = (groups & np.uint64(0x7F)).astype(np.uint8) | more.astype(np.uint8) << 7
    used = np.ones_like(more)
    used[:, 1:] = more[:, :-1]
    encoded: Array = octets[used]
    return encoded.tobytes()


def _read_varints(data: memoryview) -> Array:
    """Decode what `_write_varints` encodes, as int64."""
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    if not octets.size or len(ends) == octets.size:
        return octets.astype(np.int64)
    if octets[-1] > 0x7F:
        raise Malformed("a list of int64 that ends within a number")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends + 1 - starts
    if lengths.max() > _LONGEST:
        raise Malformed("an int64 of more than 10 bytes")
    places = np.arange(octets.size) - np.repeat(starts, lengths)
    bits = (octets & 0x7F).astype(np.uint64) << (places * 7).astype(np.uint64)
    numbers: Array = np.add.reduceat(bits, starts).view(np.int64)
    return numbers


def _read_fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yield a message's field numbers with their values: an int for a varint, else a view."""
    position, size = 0, len(data)
    while position < size:
        tag, position = _read_varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            number, position = _read_varint(data, position)
            yield field, number
            continue
        if wire == _BYTES:
            length, position = _read_varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise Malformed(f"a field of the unknown wire type {wire}")
        if length > size - position:
            raise Malformed(f"a field of {length} bytes where {size - position} are left")
        yield field, data[position : position + length]
        position += length


def _read_varint(data: Any, position: int) -> tuple[int, int]:
    number = shift = 0
    for octet in data[position : position + _LONGEST]:
        number |= (octet & 0x7F) << shift
        position += 1
        if octet < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise Malformed("a varint without an end")
