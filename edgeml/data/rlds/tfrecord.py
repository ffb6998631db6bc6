"""TFRecord files: records one after the other, each with checksums of its length and its data.

A record is the length of its data (uint64, little-endian), the masked CRC of those 8 bytes
(uint32), the data, and the masked CRC of the data (uint32); see
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details.
"""

from __future__ import annotations

import functools
import os
import struct
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.tree import Array

__all__ = [
    "FRAMING",
    "crc32c",
    "crc32c_numpy",
    "frame_record",
    "is_torn",
    "masked_crc32c",
    "read_records",
]

_HEAD = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAMING = _HEAD.size + _CRC.size  # bytes that a record is longer than its data

_PAGE = 4096  # bytes that get to the disk together

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed (RFC 3720, section 12.1)
_LANE = 64  # bytes
_CHUNK = 1 << 16  # bytes that are checked at a time, so that what is between fits a cache


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of ``data``, by `google_crc32c` where that is installed."""
    return _choose_crc32c()(data)


def masked_crc32c(data: bytes) -> int:
    """Return the CRC as TFRecords hold it: rotated, with a constant added.

    So that the CRC of a text which itself holds CRCs is none of a special kind.
    """
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _choose_crc32c() -> Callable[[bytes], int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it was built without C
        try:
            import google_crc32c
        except ImportError:
            return crc32c_numpy
    if google_crc32c.implementation == "python":  # a hundred times slower than numpy's
        return crc32c_numpy
    value: Callable[[bytes], int] = google_crc32c.value
    return value


def crc32c_numpy(data: bytes) -> int:
    """Return the CRC-32C of ``data`` by numpy: 10 to 20 ns a byte where there are many.

    A CRC without its first and last inversion is linear: that of a text is the xor of those of
    its bytes, each followed by as many zeros as there are bytes after it. So 64 bytes are looked
    up in 64 tables, all lanes of 64 bytes at once, and neighbours are joined until one is left.
    """
    state = 0xFFFFFFFF
    head = len(data) % _LANE
    table = _make_byte_table()
    for byte in data[:head]:
        state = table[(state ^ byte) & 0xFF] ^ state >> 8
    lookup, offsets, joins = _make_lane_tables()
    for start in range(head, len(data), _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        crcs = np.bitwise_xor.reduce(lookup.take(chunk.reshape(-1, _LANE) + offsets), axis=1)
        crcs[0] ^= _append_zeros(joins[0], np.array([state], np.uint32))[0]
        for join in joins:
            if len(crcs) == 1:
                break
            if len(crcs) % 2:
                crcs = np.concatenate((np.zeros(1, np.uint32), crcs))
            crcs = _append_zeros(join, crcs[::2]) ^ crcs[1::2]
        state = int(crcs[0])
    return state ^ 0xFFFFFFFF


@functools.cache
def _make_byte_table() -> tuple[int, ...]:
    """For each byte, its CRC."""
    crcs: Array = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crcs = crcs >> 1 ^ np.where(crcs & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return tuple(crcs.tolist())


@functools.cache
def _make_lane_tables() -> tuple[Array, Array, list[Array]]:
    """What looks lanes up and joins them.

    Returns:
        (64 * 256,) uint32, for each place in a lane and each byte there its CRC with the zeros
        that follow; (64,) int64, where each place begins in it; and for each time that lanes are
        joined, (4, 256) uint32 for `_append_zeros`, over as many zeros as a lane is long by then.
    """
    crcs = np.array(_make_byte_table(), np.uint32)
    places = [crcs]
    for _ in range(_LANE - 1):
        places.append(crcs[places[-1] & 0xFF] ^ places[-1] >> 8)
    lookup = np.stack(places[::-1])
    joins = [lookup[:4]]  # a state is the CRC of a lane that begins with it
    while _LANE << len(joins) < _CHUNK:
        joins.append(np.stack([_append_zeros(joins[-1], row) for row in joins[-1]]))
    return lookup.reshape(-1), np.arange(_LANE) * 256, joins


def _append_zeros(join: Array, states: Array) -> Array:
    """Return what states become over the zeros that ``join`` stands for."""
    result: Array = join[0][states & 0xFF]
    for place in (1, 2, 3):
        result = result ^ join[place][states >> 8 * place & 0xFF]
    return result


def frame_record(data: bytes) -> list[bytes]:
    """Return the pieces of a record of ``data``."""
    length = struct.pack("<Q", len(data))
    return [
        length + _CRC.pack(masked_crc32c(length)),
        data,
        _CRC.pack(masked_crc32c(data)),
    ]


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Read a file's records, checking every checksum.

    Yields:
        the offset in the file at which a record begins, and its data.

    Raises:
        FileNotFoundError: no such file.
        Malformed: what follows is no record, or ends before its end; the text names the file and
            the offset. What was yielded before is whole.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0

        def explain(what: str) -> Malformed:
            return Malformed(f"{os.fspath(path)}, the record at byte {offset}: {what}")

        while head := file.read(_HEAD.size):
            if len(head) < _HEAD.size:
                raise explain("ends before its length is told")
            length, crc = _HEAD.unpack(head)
            if crc != masked_crc32c(head[:8]):
                raise explain("the checksum of its length is wrong")
            # Checked before memory is asked for: a length is what the file says it is.
            if length > size - offset - FRAMING:
                raise explain(f"it has {length} bytes, more than the file has left")
            data = file.read(length)
            tail = file.read(_CRC.size)
            if len(data) < length or len(tail) < _CRC.size:
                raise explain("the file was cut while it was read")
            if _CRC.unpack(tail)[0] != masked_crc32c(data):
                raise explain("the checksum of its data is wrong")
            yield offset, data
            offset += FRAMING + length


def is_torn(path: str | os.PathLike[str], offset: int) -> bool:
    """Whether what follows the last whole record is one that was being written in a crash.

    Such a record is the file's last. Its bytes are missing, or they are there as zeros: after a
    power cut a file may be as long as it was to be, but not have all of its pages. What looks
    otherwise, or has more after it, was damaged.

    Args:
        path: the file's.
        offset: where its last whole record ends, before the file's end.
    """
    rest = np.memmap(path, np.uint8, "r", offset)  # not read: it may be most of a large file
    if not rest[_HEAD.size :].any():
        return True
    length, crc = _HEAD.unpack(rest[: _HEAD.size].tobytes())
    if crc != masked_crc32c(rest[:8].tobytes()):
        return False
    size = length + FRAMING
    if size != len(rest):
        return bool(size > len(rest))
    pages = range(_PAGE - offset % _PAGE, size, _PAGE)
    pieces = [*(rest[at : at + _PAGE] for at in pages), rest[-_CRC.size :]]
    return not all(piece.any() for piece in pieces)
