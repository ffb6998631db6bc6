"""What clients of GR00T's policy server and it say to each other, as bytes.

A request is one MessagePack map, ``{"endpoint"?, "data"?, "api_token"?}``; an answer is whatever
the endpoint gives, or ``{"error": text}``. There are three kinds of clients, and each is answered
as it asks:

========  ====================================  ======================================  ===========
client    ``data`` of ``get_action``            answer                                  arrays
========  ====================================  ======================================  ===========
N1.5      the observation                       the action                              ``as_npy``
N1.6      ``{"observation", "options"}``        ``[action, info]``                      ``as_npy``
later     the same                              the same                                ``nd``
========  ====================================  ======================================  ===========

``as_npy`` is ``{"__ndarray_class__": True, "as_npy": what numpy.save writes}``. ``nd`` is what the
package msgpack-numpy makes, whose keys are bytes: ``{b"nd": True, b"type": dtype, b"kind": b"",
b"shape": sizes, b"data": bytes}``, and for a scalar ``{b"nd": False, b"type", b"data"}``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from edgeml.core import Limits, Malformed, NotEncodable
from edgeml.core.arrays import restore
from edgeml.core.errors import shown
from edgeml.core.tokens import TEXT_OR_BYTES, check

__all__ = [
    "Form",
    "Request",
    "modality_config",
    "read_action",
    "read_options",
    "read_request",
    "write",
    "write_action",
    "write_error",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

_KINDS = "biufcSU"  # of dtypes: numbers and text
_LARGEST_HEADER = 1024  # bytes of what describes an array; numpy.save's have 118 to some hundred
_NPY = re.compile(  # as numpy.save writes it; numpy.load would have it evaluated
    rb"\{ *'descr': *'([^']{1,16})', *'fortran_order': *(True|False), "
    rb"*'shape': *\(([0-9, ]*)\),? *\}[ \n]*"
)


# A text that is kept for as long as its client is there, or told in an error.
_Name = Annotated[str, msgspec.Meta(max_length=1000)]


class Request(msgspec.Struct):
    """What a client asks; ``data`` is decoded where the call is handled."""

    endpoint: _Name = "get_action"
    data: msgspec.Raw = msgspec.Raw(b"\x80")  # a map of nothing
    api_token: _Name | None = None


class Form:
    """How a client asks for an action, and so how it is answered.

    Attributes:
        paired: whether it expects the action together with an info.
        inline: whether its arrays are ``nd``.
    """

    __slots__ = ("inline", "paired")

    def __init__(self) -> None:
        self.paired = False
        self.inline = False


_requests = msgspec.msgpack.Decoder(Request)


def read_request(body: bytes, limits: Limits) -> Request:
    """Read what a client asks.

    Raises:
        Malformed: it is none, or more than the limits allow.
    """
    check(body, nodes=limits.nodes, nesting=limits.nesting, keys=TEXT_OR_BYTES)
    try:
        return _requests.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no request of GR00T's: {error}") from None


def _read_map(data: msgspec.Raw, form: Form) -> dict[Any, Any]:
    """Read the data of a request, which `read_request` has looked at; note the client's form.

    Raises:
        Malformed: it is no map, or its arrays are none.
    """
    try:
        value = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no data of GR00T's: {error}") from None
    if type(value) is not dict:
        raise Malformed(f"data is a map, not {type(value).__name__}")
    restored = _restore(value, form)
    if type(restored) is not dict:
        raise Malformed("data is a map, not an array")
    return restored


def read_action(data: msgspec.Raw, form: Form) -> dict[Any, Any]:
    """Read the observation for which an action is asked, and note the client's form.

    The options of a client that has some are among the observation, as ``"options"``.

    Raises:
        Malformed: there is none.
    """
    value = _read_map(data, form)
    if "observation" not in value or not value.keys() <= {"observation", "options"}:
        return value
    observation = value["observation"]
    if type(observation) is not dict:
        if "options" in value:
            raise Malformed(f"an observation is a map, not {type(observation).__name__}")
        return value  # an older client's, one part of which has this name
    form.paired = True
    if value.get("options"):
        if "options" in observation:
            raise Malformed("there are options in the observation, and beside it")
        observation["options"] = value["options"]
    return observation


def read_options(data: msgspec.Raw) -> dict[Any, Any]:
    """Read the options of a reset, which may be left out.

    Raises:
        Malformed: they are something else.
    """
    if bytes(data) == b"\xc0":  # nil
        return {}
    options = _read_map(data, Form()).get("options")
    if options is not None and type(options) is not dict:
        raise Malformed(f"options are a map, not {type(options).__name__}")
    return options or {}


def _restore(value: Any, form: Form) -> Any:
    """Return a decoded value with arrays where maps describe them."""
    if type(value) is list:
        return [_restore(each, form) if type(each) in (dict, list) else each for each in value]
    if "__ndarray_class__" in value:
        return _from_npy(value.get("as_npy"))
    if b"nd" in value:
        form.inline = True
        return _from_nd(value)
    if b"complex" in value:
        raise Malformed("complex numbers are taken in arrays alone")
    return {
        key: _restore(each, form) if type(each) in (dict, list) else each
        for key, each in value.items()
    }


def _from_npy(data: object) -> Array:
    if type(data) is not bytes or data[:6] != b"\x93NUMPY":
        raise Malformed("as_npy is not what numpy.save writes")
    width = {b"\1\0": 2, b"\2\0": 4}.get(data[6:8])
    if width is None:
        raise Malformed(f"as_npy has the unknown version {data[6:8].hex()}")
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    if not start < end <= min(len(data), _LARGEST_HEADER):
        raise Malformed("as_npy has a header that is too long")
    dtype, in_columns, shape = _parse(data[start:end])
    restored = restore(memoryview(data)[end:], dtype, shape, _KINDS)
    return restored.T if in_columns else restored


@lru_cache(maxsize=256)
def _parse(header: bytes) -> tuple[bytes, bool, list[int]]:
    """Return dtype, whether the first index runs fastest, and the sizes, the slowest first."""
    found = _NPY.fullmatch(header)
    if found is None:
        raise Malformed(f"as_npy has the header {shown(header, 200)}, which is no array's")
    dtype, in_columns, sizes = found.groups()
    try:
        shape = [int(size) for size in sizes.split(b",") if size.strip()]
    except ValueError:
        raise Malformed(f"({sizes.decode()[:100]}) is no shape") from None
    return dtype, in_columns == b"True", shape[::-1] if in_columns == b"True" else shape


def _from_nd(value: dict[Any, Any]) -> Any:
    if value.get(b"kind") not in (None, b"", ""):
        raise Malformed(f"arrays of kind {shown(value[b'kind'], 20)} are not taken")
    data, dtype = value.get(b"data"), value.get(b"type")
    if value[b"nd"] is not True:
        return restore(data, dtype, (), _KINDS)[()]
    return restore(data, dtype, value.get(b"shape"), _KINDS)


# Answers ----------------------------------------------------------------------------------


def _to_npy(value: Any) -> dict[str, Any]:
    array = _to_array(value)
    in_columns = array.flags.fnc  # numpy.save's word for it
    header = _npy_header(array.dtype.str, in_columns, array.shape)
    return {
        "__ndarray_class__": True,
        "as_npy": header + array.tobytes("F" if in_columns else "C"),
    }


@lru_cache(maxsize=256)
def _npy_header(dtype: str, in_columns: bool, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    said = {"descr": dtype, "fortran_order": in_columns, "shape": shape}
    np.lib.format.write_array_header_1_0(header, said)
    return header.getvalue()


def _to_nd(value: Any) -> dict[bytes, Any]:
    array = _to_array(value)
    if isinstance(value, np.generic):
        return {b"nd": False, b"type": array.dtype.str, b"data": array.tobytes()}
    said = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape}
    return {**said, b"data": array.tobytes()}


def _to_array(value: Any) -> Array:
    if not hasattr(value, "__array__"):
        kind = type(value).__name__
        raise NotEncodable(f"GR00T's clients can't be sent a {kind}: make it an array or a dict")
    array = np.asarray(value)
    if array.dtype.kind not in _KINDS:
        raise NotEncodable(
            f"GR00T's clients can't be sent an array of dtype {array.dtype}: convert it, as with "
            ".astype(numpy.float32)"
        )
    return array


_with_npy = msgspec.msgpack.Encoder(enc_hook=_to_npy)
_with_nd = msgspec.msgpack.Encoder(enc_hook=_to_nd)


def write(value: Any, limits: Limits, *, inline: bool = False) -> bytes:
    """Return an answer as bytes that a client can read.

    Args:
        value: plain values and arrays; numpy's scalars become arrays without dimensions.
        limits: of what is nested, and how many values there are.
        inline: whether arrays are ``nd``.

    Raises:
        NotEncodable: it can't be sent; the text says why.
    """
    try:
        data = (_with_nd if inline else _with_npy).encode(value)
        check(data, nodes=limits.nodes, nesting=limits.nesting, keys=TEXT_OR_BYTES)
    except NotEncodable:
        raise
    except Exception as error:  # keys that are numbers, cycles, lone surrogates, large integers
        raise NotEncodable(f"GR00T's clients can't be sent this result: {error}") from None
    return data


def write_action(result: Any, form: Form, limits: Limits) -> bytes:
    """Return the answer to who has asked for an action.

    Args:
        result: the action, or a tuple of it and an info, as GR00T's policies return.
        form: how it was asked for.
        limits: see `write`.

    Raises:
        NotEncodable: see `write`.
    """
    action, info = result if type(result) is tuple and len(result) == 2 else (result, {})
    return write([action, info] if form.paired else action, limits, inline=form.inline)


def write_error(text: str) -> bytes:
    """Return the answer that tells of an error."""
    valid = text.encode("utf-8", "backslashreplace").decode()
    return msgspec.msgpack.encode({"error": valid})


# What a policy works with -----------------------------------------------------------------


def modality_config(metadata: Mapping[str, Any], contract: Mapping[str, Any] | None) -> Any:
    """Return the answer to ``get_modality_config``: for each modality, its keys and steps.

    Args:
        metadata: it, if there is any: ``{"video": {"delta_indices": [0], "modality_keys":
            ["front"]}, ...}``. Clients of N1.5 want each of these as JSON text, and others as is.
        contract: or else what the function takes and gives; see `PolicyContract.to_plain`.
    """
    stated = metadata or _from_contract(contract or {})
    return {name: _mark(config) for name, config in stated.items()}


def _mark(config: Any) -> Any:
    """Say that this is one modality's, if it is: as older and as newer clients look for it."""
    plain = config
    if isinstance(config, str):
        try:
            plain = json.loads(config)
        except ValueError:
            return config
    if not isinstance(plain, Mapping) or not {"delta_indices", "modality_keys"} <= plain.keys():
        return config
    return {"__ModalityConfig_class__": True, "__ModalityConfig__": True, "as_json": config}


def _from_contract(contract: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, list[str]] = {}
    for path, feature in _leaves(contract.get("observation"), ()):
        modality = _modality(path, feature)
        name = path[1:] if len(path) > 1 and path[0] == modality else path
        keys.setdefault(modality, []).append(".".join(name))
    stated = {name: {"delta_indices": [0], "modality_keys": each} for name, each in keys.items()}
    if actions := [".".join(path) for path, _ in _leaves(contract.get("action"), ())]:
        steps = list(range(contract.get("horizon") or 1))
        stated["action"] = {"delta_indices": steps, "modality_keys": actions}
    return stated


def _leaves(
    features: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each named feature of a contract, with the keys that lead to it."""
    if not isinstance(features, dict) or (not path and isinstance(features.get("dtype"), str)):
        return  # nothing stated, or one feature without a name
    for key, each in features.items():
        if isinstance(each.get("dtype"), str):
            yield (*path, key), each
        else:
            yield from _leaves(each, (*path, key))


def _modality(path: tuple[str, ...], feature: dict[str, Any]) -> str:
    if len(path) > 1 and path[0] in ("video", "state", "language"):
        return path[0]
    if feature["dtype"] == "str":
        return "language"
    shape = feature["shape"]
    if feature.get("kind") == "image" or (
        feature["dtype"] == "uint8" and len(shape) > 2 and shape[-1] in (1, 3, 4)
    ):
        return "video"
    return "state"
