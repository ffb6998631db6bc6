"""A codec whose messages can be read: JSON, with large arrays beside it; ``codecs=["json"]``.

What JSON has no word for is an object of one key: ``{"$array": [dtype, shape, numbers]}``, or the
number of a buffer in place of the numbers; ``$scalar`` likewise, ``$bytes`` and ``$tuple``.
"""

import base64
import json
import re
from functools import partial
from typing import Any, ClassVar

import numpy as np

from edgeml.core import Codec, Malformed, Message, NotEncodable, hookimpl

_TYPES = {np.dtype(code).str[1:] for code in "?bhiqBHIQefdFD"}
_SMALL = 1024  # bytes of an array whose numbers are written out


def _pack(value: Any, path: str, buffers: list[memoryview]) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str[1:] in _TYPES:
        kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
        flat = np.ascontiguousarray(value).reshape(-1)
        if flat.nbytes <= _SMALL and flat.dtype.kind != "c":
            return {kind: [flat.dtype.str, value.shape, flat.tolist()]}
        buffers.append(memoryview(flat.view(np.uint8)))  # type: ignore[arg-type]
        return {kind: [flat.dtype.str, value.shape, len(buffers) - 1]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = ((key, _pack(each, f"{path}[{key!r}]", buffers)) for key, each in value.items())
        return {f"${key}" if key.startswith("$") else key: each for key, each in items}
    if isinstance(value, list | tuple):
        packed = [_pack(each, f"{path}[{index}]", buffers) for index, each in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NotEncodable(f"{path} is a {type(value).__name__} that JSON can't carry")


def _unpack(packed: dict[str, Any], buffers: dict[int, memoryview], writable: bool) -> Any:
    match list(packed.items()):
        case [("$tuple", list(content))]:
            return tuple(content)
        case [("$bytes", str(content))]:
            return base64.b64decode(content, validate=True)
        case [("$array" | "$scalar" as kind, [str(name), shape, where])] if name[1:] in _TYPES:
            written = isinstance(where, list)
            data = np.array(where, name).tobytes() if written else buffers[where].toreadonly()
            array = np.frombuffer(data, name).reshape(shape)
            if list(array.shape) == shape:
                return array[()] if kind == "$scalar" else array.copy() if writable else array
    if any(key.startswith("$") and not key.startswith("$$") for key in packed):
        raise Malformed(f"an object that nobody packed: {list(packed)}")
    return {key[key.startswith("$") :]: value for key, value in packed.items()}


class JsonCodec(Codec):
    name: ClassVar[str] = "json"

    def _within_limits(self, message: Message) -> Message:
        bare = re.sub(rb'(?s)"(?:\\.|[^"\\])*"?|[^][{},:"]+', b"", message.header)
        nodes = len(bare) + len(bare.translate(None, b",:"))  # an array or map is four
        for _ in range(self.limits.nesting):  # each time the innermost go
            bare = re.sub(rb"\[,*\]|{[:,]*}", b"", bare)
        if (
            nodes > self.limits.nodes
            or bare.strip(b",:")
            or len(message.buffers) > self.limits.buffers
        ):
            raise ValueError("too many values, too deep, or too many large arrays")
        return message

    def encode(self, value: Any) -> Message:
        buffers: list[memoryview] = []
        try:
            text = json.dumps(_pack(value, "value", buffers), ensure_ascii=False)
            return self._within_limits(Message(text.encode(), buffers))
        except (ValueError, RecursionError) as error:  # half a surrogate pair, a cycle, a limit
            raise NotEncodable(str(error)) from None

    def decode(self, message: Message, *, writable: bool = False) -> Any:
        try:
            self._within_limits(message)
            made = partial(_unpack, buffers=dict(enumerate(message.buffers)), writable=writable)
            return json.loads(message.header, object_hook=made)
        except Exception as error:  # whatever the bytes may cause in json and numpy
            raise Malformed(f"{type(error).__name__}: {error}") from None


@hookimpl
def edgeml_codec() -> type[Codec]:
    return JsonCodec
