"""What openpi's clients and servers say: MessagePack, with numpy's arrays and scalars as maps.

==================  ==================================================================
value               map, whose keys are bytes; str are read as well
==================  ==================================================================
array               ``__ndarray__``: true, ``data``, ``dtype`` (``"<f4"``), ``shape``
scalar              ``__npgeneric__``: true, ``data`` (a number), ``dtype``
array, read only    ``nd``: true, ``data``, ``type``, ``kind``, ``shape``
scalar, read only   ``nd``: false, ``data`` (bytes), ``type``, ``kind``
==================  ==================================================================

Arrays of structs, objects and complex numbers are neither read nor written: openpi's ends refuse
them, since an array of objects made of somebody's bytes crashes Python.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
import numpy as np

from edgeml.core import DEFAULT_LIMITS, Limits, Malformed, NotEncodable
from edgeml.core.arrays import restore
from edgeml.core.errors import shown
from edgeml.core.tokens import TEXT_OR_BYTES, check

__all__ = ["Data", "check_message", "read", "read_checked", "read_words", "restored", "write"]

Data: TypeAlias = "bytes | memoryview"

_KINDS = "biufSU"
_NUMBERS = {"b": (bool, int), "i": (int,), "u": (int,), "f": (int, float)}
_FEW = 1 << 14  # bytes, which are copied rather than keep a whole message alive
_LONGEST_WORD = 1000  # bytes
_MAPS = {*range(0x80, 0x90), 0xDE, 0xDF}  # how a map begins in MessagePack, ...
_MARKS = {b"__ndarray__", "__ndarray__", b"nd", "nd"}  # of arrays
_BYTES = {0xC4: 2, 0xC5: 3, 0xC6: 5}  # ... and bytes, with the length of that


# In ---------------------------------------------------------------------------------------


def check_message(data: Data | str, limits: Limits) -> Data:
    """Return a message that may be decoded.

    Raises:
        Malformed: it is a text, or no MessagePack, or has too many values, or too deep.
    """
    if isinstance(data, str):
        raise Malformed("a text: the messages of this protocol are binary, in MessagePack")
    check(data, nodes=limits.nodes, nesting=limits.nesting, keys=TEXT_OR_BYTES)
    return data


def read(data: Data | str, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Return the value of a message. Arrays are read-only, and large ones views of the message.

    Raises:
        Malformed: it has none.
    """
    return read_checked(check_message(data, limits))


def read_checked(data: Data) -> Any:
    """As `read`, of a message that `check_message` has let pass."""
    try:
        return _made(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"this is no MessagePack: {error}") from None


def read_words(data: Data, names: tuple[str, ...]) -> dict[str, str]:
    """Return the short texts, or numbers as texts, that a checked message has by these names.

    Raises:
        Malformed: it is no map, or one of them is something else.
    """
    words = {}
    try:
        there = _decode_map(data)
        for name in names:
            if name not in there:
                continue
            if len(memoryview(there[name])) > _LONGEST_WORD:
                raise Malformed(f"{name} is longer than {_LONGEST_WORD} bytes")
            value = _decode(there[name])
            if type(value) not in (str, int, type(None)):
                raise Malformed(f"{name} is a text, not {type(value).__name__}")
            if value is not None:
                words[name] = str(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"a message of this protocol is a map: {error}") from None
    return words


_decode_map = msgspec.msgpack.Decoder(dict[Any, msgspec.Raw]).decode
_decode = msgspec.msgpack.Decoder().decode


def _made(data: Any) -> Any:
    """Return the value of some MessagePack, of which large arrays are not copied."""
    view = memoryview(data)
    if len(view) <= _FEW or view[0] not in _MAPS:
        return restored(_decode(data))
    there = _decode_map(data)
    if _MARKS.isdisjoint(there):
        return {key: _made(value) for key, value in there.items()}
    made = restored({key: _read_bytes(memoryview(value)) for key, value in there.items()})
    return restored(_decode(data)) if type(made) is dict else made  # a user's own map


def _read_bytes(data: memoryview) -> Any:
    """Return the value of some MessagePack: of many bytes, a view."""
    if len(data) > _FEW and data[0] in _BYTES:
        return data[_BYTES[data[0]] :].toreadonly()
    return _decode(data)


def restored(value: Any) -> Any:
    """Return a decoded value with its arrays and scalars.

    Raises:
        Malformed: one of them is none.
    """
    if type(value) is dict:
        if b"__ndarray__" in value or "__ndarray__" in value:
            data, dtype, shape = (_field(value, name) for name in ("data", "dtype", "shape"))
            return restore(data, dtype, shape, _KINDS)
        if b"__npgeneric__" in value or "__npgeneric__" in value:
            return _scalar(_field(value, "data"), _field(value, "dtype"))
        if b"nd" in value or "nd" in value:
            fields = [_field(value, name) for name in ("nd", "data", "type", "kind")]
            if None not in fields:  # or it is a user's own map
                return _of_four(value, *fields)
        return {key: restored(each) for key, each in value.items()}
    if type(value) is list:
        return [restored(each) for each in value]
    return value


def _field(value: dict[Any, Any], name: str) -> Any:
    return value.get(name.encode(), value.get(name))


def _scalar(data: Any, dtype: Any) -> Any:
    made = restore(b"", dtype, (0,), _KINDS).dtype  # which is believed no more than an array's
    if made.kind in _NUMBERS and type(data) not in _NUMBERS[made.kind]:
        raise Malformed(f"a scalar of dtype {made.str} is no {type(data).__name__}")
    if made.kind in "SU" and (type(data) is not (bytes if made.kind == "S" else str)):
        raise Malformed(f"a scalar of dtype {made.str} is no {type(data).__name__}")
    if made.kind in "iu" and not np.iinfo(made).min <= data <= np.iinfo(made).max:
        raise Malformed(f"{data} is no {made.name}")
    with np.errstate(over="ignore"):
        return made.type(data)


def _of_four(value: dict[Any, Any], many: Any, data: Any, dtype: Any, kind: Any) -> Any:
    array = restore(data, dtype, _field(value, "shape") if many else (), _KINDS)
    if isinstance(kind, bytes):
        kind = kind.decode("latin-1")
    if kind not in ("", array.dtype.kind):
        raise Malformed(f"an array of dtype {array.dtype.str} is not of kind {shown(kind, 20)}")
    return array if many else array[()]


# Out --------------------------------------------------------------------------------------


def write(value: Any) -> bytes:
    """Return a value's message.

    Raises:
        NotEncodable: it has something that the protocol doesn't carry; the text says what to do.
    """
    try:
        data = _encode(value)
        # Their readers take no other keys, and neither do ours.
        check(data, nodes=len(data) * 4, nesting=DEFAULT_LIMITS.nesting, keys=TEXT_OR_BYTES)
    except NotEncodable:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotEncodable(
            "openpi's clients take dicts whose keys are str, lists, str, bytes, bools, numbers of "
            f"up to 64 bits, None, and numpy's arrays and scalars: {error}"
        ) from None
    return data


def _plain(value: Any) -> Any:
    """Return a numpy value as the map that stands for it."""
    if isinstance(value, np.generic):
        _require_kind(value.dtype)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    if isinstance(value, getattr(sys.modules.get("jax"), "Array", ())):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        _require_kind(value.dtype)
        array = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        few = array.nbytes < _FEW
        return {
            b"__ndarray__": True,
            b"data": array.tobytes() if few else array.reshape(-1).view(np.uint8).data,
            b"dtype": array.dtype.str,
            b"shape": array.shape,
        }
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it has a {type(value).__module__}.{type(value).__qualname__}")


_encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode


def _require_kind(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in _KINDS:
        raise NotEncodable(
            f"openpi's clients take no arrays of dtype {dtype}: convert it first, as by "
            ".astype(np.float32)"
        )
