"""Write the vectors in this directory anew: ``python tests/wire/vectors/make.py``.

``docs/wire.md`` says how they read.
"""

from __future__ import annotations

import datetime as dt
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from edgeml.core import Message, load_codec, wire
from edgeml.core.frames import frame
from edgeml.images import MARK

Vector = dict[str, Any]

SESSION = bytes(range(16))
EPOCH = 1_700_000_000_000_000_000
NUMBER = 0x1122334455667789  # of a gRPC server
KEY = 0x99AABBCCDDEEFF01  # of a large reply
_codec = load_codec("msgpack")
_pack = msgspec.msgpack.encode


def shown(data: bytes | memoryview) -> Any:
    """Hex, or what is repeated where that is long."""
    data = bytes(data)
    if len(data) > 256:
        assert data == data[:4] * (len(data) // 4)
        return {"repeat": data[:4].hex(), "times": len(data) // 4}
    return data.hex()


def tagged(value: Any) -> Any:
    """A value as JSON that says what is what."""
    if value is None or isinstance(value, bool) or type(value) is str:
        return value
    kind = type(value)
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.name, list(value.shape), shown(value.tobytes())]
    if isinstance(value, np.generic):
        return ["scalar", value.dtype.name, value.tobytes().hex()]
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return [kind.__name__, value.isoformat()]
    if isinstance(value, dt.timedelta):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    if isinstance(value, bytes):
        return ["bytes", shown(value)]
    if isinstance(value, dict):
        return ["map", [[tagged(key), tagged(item)] for key, item in value.items()]]
    if isinstance(value, (set, frozenset)):
        return [kind.__name__, [tagged(member) for member in sorted(value, key=_pack)]]
    if isinstance(value, (list, tuple)):
        return [kind.__name__, [tagged(item) for item in value]]
    return [kind.__name__, repr(value)]


def _shown_all(buffers: Sequence[memoryview]) -> list[Any]:
    return [shown(buffer) for buffer in buffers]


# The envelope -----------------------------------------------------------------------------


def envelope(name: str, value: Any) -> Vector:
    fields = msgspec.structs.asdict(value)
    shown = {key: v.hex() if isinstance(v, bytes) else v for key, v in fields.items()}
    if isinstance(fields.get("served"), wire.Served):
        shown["served"] = list(msgspec.structs.astuple(fields["served"]))
    for key in ("epoch", "number", "taken"):  # more than the 53 bits of a double
        if key in shown:
            shown[key] = str(shown[key])
    return {
        "name": name,
        "type": "reply" if type(value) is wire.Answer else type(value).__name__.lower(),
        "value": shown,
        "hex": wire.pack(value).hex(),
    }


def envelopes() -> Vector:
    hello = wire.Hello(1, "inference", "robot-7", "arm", "msgpack", {})
    config = {"version": "1", "action_keys": ["grip", "move"], "observation_keys": ["cam"]}
    welcome = wire.Welcome(SESSION, EPOCH, {"": 1, "observations": 1}, [5555])
    served = wire.Served(3, 8, 0.5, 0.25, False)
    asks = wire.Hello(1, "inference", "a", "", "msgpack", {}, {"x-greeting": ["hello"]})
    expects = wire.Hello(
        1, "inference", "a", "", "msgpack", {}, {"contracts": {"policy": {"rate": 50.0}}}
    )
    answers = wire.Welcome(SESSION, EPOCH, {"": 1}, [5555], {"x-greeting": "welcome"})
    shows = wire.Hello(1, "inference", "a", "", "msgpack", {}, {"token": "s3cret"})
    agrees = wire.Welcome(SESSION, EPOCH, {"": 1}, [5555], {}, "msgpack")
    credit, first = wire.Credit(1, EPOCH, 41), wire.Credit(1, 0, 0)
    pong = wire.Pong(1, "inference", 1.7e9)
    loading = wire.Pong(1, "inference", 1.7e9, "loading", 0.25, "weights")
    errors: dict[int, list[str]] = {
        3: ["KeyError", "'cam'", "Traceback ..."],
        4: ["there is no interface 'x'; known: echo"],
        5: ["not an edgeml request: Expected `array`"],
        6: ["nobody waits for this call any more"],
        7: ["4096 calls are waiting already"],
        8: ["the server has been stopped"],
        9: ["service: the server has 'action', the client has 'inference'"],
        10: ["a newer client calls itself 'robot-7'"],
        11: ["the server is loading, 25% done: weights"],
    }
    request, reply = wire.Request, wire.Answer
    made = [
        envelope("hello body", hello),
        envelope("hello", request(wire.HELLO, b"", "", 0.0, wire.pack(hello))),
        envelope(
            "hello body of an action client", wire.Hello(1, "action", "a", "", "msgpack", config)
        ),
        envelope("hello body with an extension", asks),
        envelope("hello body that expects a contract", expects),
        envelope("welcome body", welcome),
        envelope("welcome body with an extension", answers),
        envelope("welcome body of a server that tells the codec", agrees),
        envelope("hello body with a token", shows),
        envelope("welcome", reply(wire.OK, wire.pack(welcome))),
        envelope("call", request(wire.CALL, SESSION, "echo", 2.5, _pack([1, "a"]))),
        envelope("result", wire.Result(wire.OK, _pack([1, "a"]), 0, 0, served)),
        envelope(
            "result that doesn't tell what is kept",
            wire.Result(wire.OK, _pack([1, "a"]), 0, 0, wire.Served(3, 8, 0.5, 0.25)),
        ),
        envelope("result of an older server", reply(wire.OK, _pack([1, "a"]))),
        envelope("first credit body", first),
        envelope(
            "first credit", request(wire.NEXT, SESSION, "observations", 10.0, wire.pack(first))
        ),
        envelope("credit body", credit),
        envelope("credit", request(wire.NEXT, SESSION, "observations", 10.0, wire.pack(credit))),
        envelope("publication", reply(wire.OK, _pack({"cam": 7}), EPOCH, 42)),
        envelope(
            "publication that tells when it was taken",
            wire.Publication(wire.OK, _pack({"cam": 7}), EPOCH, 42, None, 86_400_000_000_000),
        ),
        envelope("nothing yet", reply(wire.NOTHING_YET)),
        envelope(
            "heartbeat", request(wire.NEXT, SESSION, "", 10.0, wire.pack(wire.Credit(0, 0, 0)))
        ),
        envelope("goodbye", request(wire.GOODBYE, SESSION, "", 0.2, b"")),
        envelope("done", reply(wire.OK)),
        envelope("ping", request(wire.PING, b"", "", 1.0, b"")),
        envelope("pong body", pong),
        envelope("pong body of a server that loads", loading),
        envelope("pong", reply(wire.OK, wire.pack(pong))),
        envelope("no session", reply(wire.NO_SESSION)),
    ]
    for status, arguments in errors.items():
        vector = envelope(f"error {status}", reply(status, _pack(arguments)))
        made.append(vector | {"arguments": arguments})
    begun = envelope("error 8 amid a call", reply(8, _pack(errors[8]), 0, 1))
    made.append(begun | {"arguments": errors[8]})
    good = bytes.fromhex(next(v["hex"] for v in made if v["name"] == "call"))
    invalid = {
        "nothing": ("request", b""),
        "cut off": ("request", good[:-1]),
        "something after it": ("request", good + b"\xc0"),
        "a map": ("request", _pack({"kind": 1})),
        "too few elements": ("request", _pack([1, SESSION, "echo", 2.5])),
        "a session that is a str": ("request", _pack([1, "x", "echo", 2.5, b""])),
        "a name that is a bin": ("request", _pack([1, SESSION, b"echo", 2.5, b""])),
        "a timeout that is nil": ("request", _pack([1, SESSION, "echo", None, b""])),
        "a name that is no UTF-8": ("request", good.replace(b"echo", b"\xffcho")),
        "a hello without a codec": (
            "hello",
            _pack({"protocol": 1, "service": "x", "client_id": "", "label": "", "config": {}}),
        ),
        "a credit of two": ("credit", _pack([1, 2])),
        "a reply without a status": ("reply", _pack([])),
    }
    return {
        "valid": made,
        "read as well": [
            {
                "name": name,
                "type": kind,
                "hex": _pack(data).hex(),
                "means": means,
            }
            for name, kind, data, means in (
                ("a reply of one element", "reply", [0], "done"),
                (
                    "an older server's result",
                    "result",
                    [0, _pack([1, "a"]), 0, 0, [3, 8, 0.5, 0.25]],
                    "result that doesn't tell what is kept",
                ),
                ("a later version's reply", "reply", [0, b"", 0, 0, "more"], "done"),
                ("an int for the timeout", "request", [4, b"", "", 1, b""], "ping"),
                (
                    "a later version's pong",
                    "pong",
                    {"more": 1, "clock": 1.7e9, "service": "inference", "protocol": 1},
                    "pong body",
                ),
            )
        ],
        "invalid": [
            {"name": name, "type": kind, "hex": data.hex()}
            for name, (kind, data) in invalid.items()
        ],
    }


# The codec --------------------------------------------------------------------------------


def codec_vector(name: str, value: Any) -> Vector:
    message = _codec.encode(value)
    return {
        "name": name,
        "value": tagged(value),
        "header": message.header.hex(),
        "buffers": _shown_all(message.buffers),
    }


def read_only(name: str, value: Any, header: bytes, *buffers: bytes) -> Vector:
    """One that edgeml reads and doesn't write."""
    return {
        "name": name,
        "value": tagged(value),
        "header": header.hex(),
        "buffers": [b.hex() for b in buffers],
    }


def ext(code: int, payload: bytes) -> bytes:
    return _pack(msgspec.msgpack.Ext(code, payload))


def descriptor(dtype: str, *shape: int) -> bytes:
    room = (len(dtype) + 9) // 8 * 8 - 2
    return struct.pack(f"<BB{room}s{len(shape)}Q", len(dtype), len(shape), dtype.encode(), *shape)


def codecs() -> Vector:
    utc = dt.timezone(dt.timedelta(hours=5, minutes=30))
    index = struct.Struct("<I").pack
    values = {
        "nil": None,
        "true": True,
        "int": -5,
        "widest ints": [-(1 << 63), (1 << 64) - 1],
        "a large int": 1 << 64,
        "a large negative int": -(1 << 63) - 1,
        "float": 1.5,
        "infinity": float("inf"),
        "str": "grüße",
        "bytes": b"\x00\xff",
        "bytes out of band": b"\x07" * 8196,
        "list": [1, [2.5, None]],
        "map": {"cam": 1, 7: "seven"},
        "tuple": (1, ("a",)),
        "set": {3, 1, "a"},
        "frozenset": frozenset({"x"}),
        "complex": 1.0 - 2.0j,
        "datetime": dt.datetime(2024, 2, 29, 12, 30, 15, 250000, utc),
        "naive datetime": dt.datetime(2024, 2, 29, 12, 30, 15),
        "date": dt.date(2024, 2, 29),
        "time": dt.time(1, 2, 3),
        "timedelta": dt.timedelta(days=-1, seconds=3, microseconds=5),
        "small array": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32),
        "empty array": np.zeros((0, 3), np.uint8),
        "array without dimensions": np.array(7, np.int16),
        "bools": np.array([True, False]),
        "bfloat16": np.array([1.0, -2.0], ml_dtypes.bfloat16),
        "datetime64": np.array(["2024-02-29", "NaT"], "datetime64[D]"),
        "numpy scalar": np.float64(0.5),
        "array out of band": np.full((3, 4, 1024), 9, np.uint8),
        "two arrays out of band": {
            "cam": np.full((3, 4, 1024), 9, np.uint8),
            "depth": [np.full(4096, 1.0, np.float32)],
        },
        "act": ["move", {"x": 0.25}],
        "lease": ["move", 7, 1, 2.0, 0, 0.4],
        "act with a stamp": [
            "move",
            {"x": 0.25},
            _pack([5, 1_000_000_000, 0.01, 0, None, None, None, None, 7]),
        ],
        "observations wanted": ["cam"],
        "contract": {
            "observation": {"x": {"shape": [None, 2], "dtype": "uint8", "kind": "depth"}},
            "action": {"shape": [2], "dtype": "float32", "names": ["a", "b"], "units": "rad"},
            "rate": 50.0,
        },
        "upload": {
            "store": "demos",
            "incarnation": 12345,
            "numbering": [[678, 0]],
            "epoch": None,
            "acknowledged": 0,
            "after": 0,
            "batch": {
                "first_id": 1,
                "columns": {"reward": np.array([0.5, 1.0], np.float64)},
            },
        },
        "upload of items": {
            "store": "demos",
            "incarnation": 12345,
            "numbering": [[678, 2], [679, 0]],
            "epoch": 90,
            "acknowledged": 2,
            "after": 2,
            "batch": {"first_id": 3, "items": [{"note": "fell"}]},
        },
        "upload of what may be refused": {
            "store": "demos",
            "incarnation": 12345,
            "numbering": [[678, 2], [679, 0]],
            "epoch": 90,
            "acknowledged": 3,
            "after": 3,
            "batch": {"first_id": 4, "items": [{"note": "up"}, {"note": 7}, {"note": 8}]},
            "skip_refused": True,
        },
        "answer": {"mark": 3, "durable": 2, "epoch": 90, "refused": []},
        "refused": {
            "mark": 6,
            "durable": None,
            "epoch": 90,
            "refused": [[5, 2, "item['note'] is no text"]],
        },
    }
    array = ext(1, descriptor("uint8", 3) + index(0))
    also = [
        read_only("float 32", 0.5, struct.pack(">Bf", 0xCA, 0.5)),
        read_only("an int that is wider than it need be", 1, b"\xd3" + struct.pack(">q", 1)),
        read_only("a key that repeats", {"a": 2}, b"\x82\xa1a\x01\xa1a\x02"),
        read_only("a short array out of band", np.array([1, 2, 3], np.uint8), array, b"\1\2\3"),
        read_only("short bytes out of band", b"ab", ext(4, index(0)), b"ab"),
        read_only(
            "buffers in another order",
            [b"b", b"a"],
            b"\x92" + ext(4, index(1)) + ext(4, index(0)),
            b"a",
            b"b",
        ),
        read_only("a set in any order", {1, 2}, ext(6, b"\x92\x02\x01")),
    ]
    nested = b"\x91" * 33 + b"\xc0"
    invalid: dict[str, tuple[bytes, ...]] = {
        "nothing": (b"",),
        "cut off": (b"\x92\x01",),
        "something after it": (b"\xc0\xc0",),
        "a str that is no UTF-8": (b"\xa1\xff",),
        "a list of more than is there": (b"\xdd\xff\xff\xff\xff",),
        "a key that is a float": (b"\x81\xcb" + struct.pack(">d", 1.0) + b"\x01",),
        "a key that is a bool": (b"\x81\xc3\x01",),
        "a key that is nil": (b"\x81\xc0\x01",),
        "an unknown ext": (ext(14, b""),),
        "a negative ext": (ext(-2, b"ab"),),
        "an array in a negative ext": (ext(-2, descriptor("uint8", 1) + b"\1"),),
        "an array in ext 0": (ext(0, descriptor("uint8", 1) + b"\1"),),
        "nested 33 deep": (nested,),
        "tuples nested 33 deep": (_nested_tuples(33),),
        "a buffer that is not there": (array,),
        "a buffer that is not used": (b"\xc0", b"x"),
        "a buffer that is used twice": (b"\x92" + array + array, b"\1\2\3"),
        "an array longer than its buffer": (array, b"\1\2"),
        "an array shorter than its buffer": (array, b"\1\2\3\4"),
        "a small array that is too short": (ext(2, descriptor("uint16", 2) + b"\1\2\3"),),
        "an unknown dtype": (ext(2, descriptor("float128", 0)),),
        "a descriptor that is cut off": (ext(2, b"\x05\x01uint8"),),
        "a descriptor padded with something": (
            ext(2, b"\x05\x01uint8x" + struct.pack("<Q", 1) + b"\1"),
        ),
        "33 dimensions": (ext(2, descriptor("uint8", *[1] * 33) + b"\1"),),
        "a shape beyond all memory": (ext(2, descriptor("uint8", 1 << 63, 1 << 63) + b"\1"),),
        "a scalar with a shape": (ext(3, descriptor("uint8", 1) + b"\1"),),
        "a bool that is 2": (ext(2, descriptor("bool", 1) + b"\2"),),
        "a tuple that is no array": (ext(5, b"\x01"),),
        "a set that holds a list": (ext(6, b"\x91\x90"),),
        "an int of 1,025 bytes": (ext(8, b"\x01" * 1025),),
        "a complex of 15 bytes": (ext(9, bytes(15)),),
        "a date that is none": (ext(11, b"2023-02-29"),),
        "a date without dashes": (ext(11, b"20230228"),),
        "a date by its week": (ext(11, b"2023-W09-2"),),
        "a datetime with a space": (ext(10, b"2024-02-29 12:30:15"),),
        "a datetime in UTC by its letter": (ext(10, b"2024-02-29T12:30:15Z"),),
        "a datetime without seconds": (ext(10, b"2024-02-29T12:30"),),
        "a datetime with milliseconds": (ext(10, b"2024-02-29T12:30:15.250"),),
        "a datetime with microseconds that are none": (ext(10, b"2024-02-29T12:30:15.000000"),),
        "a time with a comma": (ext(12, b"01:02:03,000004"),),
        "msgpack's own timestamp": (b"\xd6\xff" + struct.pack(">I", 1_700_000_000),),
        "a timedelta to be summed": (ext(13, struct.pack("<iii", 0, 86400, 0)),),
        "a timedelta of less than no seconds": (ext(13, struct.pack("<iii", 0, -1, 0)),),
        "a large int that is small": (ext(8, b"\x01"),),
        "a large int that fits into 64 bits": (ext(8, b"\xff" * 8 + b"\x00"),),
        "a large int with a byte too many": (ext(8, bytes(8) + b"\x01\x00"),),
        "a large negative int with a byte too many": (ext(8, bytes(8) + b"\xfe\xff"),),
        "a large int of no bytes": (ext(8, b""),),
        "a set with a member twice": (ext(6, b"\x92\x01\x01"),),
        "a set of 1 and true": (ext(6, b"\x92\x01\xc3"),),
        "a frozenset of 1 and 1.0": (ext(7, b"\x92\x01\xcb" + struct.pack(">d", 1.0)),),
        "a float4 with a fifth bit": (ext(2, descriptor("float4_e2m1fn", 1) + b"\x10"),),
        "a float6 with a seventh bit": (ext(2, descriptor("float6_e2m3fn", 1) + b"\x40"),),
        "an int4 with its sign in each bit": (ext(3, descriptor("int4") + b"\xff"),),
    }
    return {
        "valid": [codec_vector(name, value) for name, value in values.items()],
        "read as well": also,
        "invalid": [
            {"name": name, "header": parts[0].hex(), "buffers": [b.hex() for b in parts[1:]]}
            for name, parts in invalid.items()
        ],
    }


def _nested_tuples(depth: int) -> bytes:
    made = b"\xc0"
    for _ in range(depth):
        made = ext(5, b"\x91" + made)
    return made


# Frames, ZeroMQ and gRPC ------------------------------------------------------------------

CALL = wire.pack(wire.Request(wire.CALL, SESSION, "echo", 2.5, _pack([1, "a"])))
MESSAGES = {
    "empty": Message(b""),
    "a header alone": Message(b"\x93\x01\x02\x03"),
    "two buffers": Message(b"head", [memoryview(b"\1\2\3"), memoryview(b"\4\5")]),
    "an empty buffer": Message(b"head", [memoryview(b""), memoryview(b"\4")]),
    "a call": Message(CALL),
}


def parts(message: Message) -> Vector:
    return {"header": message.header.hex(), "buffers": _shown_all(message.buffers)}


def frames() -> Vector:
    good = frame(MESSAGES["two buffers"])
    invalid = {
        "nothing": b"",
        "half a head": bytes(7),
        "a header that is cut off": struct.pack("<II", 5, 0) + b"head",
        "something after the header": struct.pack("<II", 4, 0) + b"header",
        "sizes that are cut off": struct.pack("<IIQ", 0, 2, 0),
        "a buffer that is cut off": good[:-1],
        "something after the last buffer": good + b"\0",
        "16,385 buffers": struct.pack("<II", 0, 16385),
        "a buffer of 2**64 - 1 bytes": struct.pack("<IIQ", 0, 1, (1 << 64) - 1) + bytes(48),
    }
    return {
        "valid": [
            {"name": name, "hex": frame(message).hex(), **parts(message)}
            for name, message in MESSAGES.items()
        ],
        "invalid": [{"name": name, "hex": data.hex()} for name, data in invalid.items()],
    }


def zmq_parts() -> Vector:
    return {
        "valid": [
            {
                "name": name,
                "number": str(number),
                "frames": [
                    (struct.pack("<Q", number) + message.header).hex(),
                    *_shown_all(message.buffers),
                ],
                **parts(message),
            }
            for number, (name, message) in enumerate(MESSAGES.items(), 1)
        ],
        "invalid": [
            {"name": "half a number", "frames": ["00000000"]},
            {"name": "the empty frame that a REQ socket sends first", "frames": ["", "01" * 20]},
        ],
    }


def grpc_pieces() -> Vector:
    def prefixed(first: int, content: bytes) -> str:
        return (struct.pack("<QQ", first, len(content)) + content).hex()

    whole = frame(MESSAGES["two buffers"])
    good = struct.pack("<QQ", 0, len(whole)) + whole
    requests = {
        "nothing": b"",
        "half a prefix": bytes(15),
        "a frame that is cut off": good[:-1],
        "something after the frame": good + b"\0",
        "no frame": struct.pack("<QQ", 0, 8) + b"\xff" * 8,
    }
    streams = {
        "nothing": [],
        "a first piece that is cut off": [good[:15], good[15:]],
        "a frame that is cut off": [good[:40], good[40:-1]],
        "something after the frame": [good, b"\0"],
        "a frame of more than 4 GiB": [struct.pack("<QQ", 0, (1 << 32) + 1)],
    }
    return {
        "number": str(NUMBER),
        "key": str(KEY),
        "connected": struct.pack("<QQ", NUMBER, 0).hex(),
        "fetch": struct.pack("<QQ", NUMBER, KEY).hex(),
        "kept": struct.pack("<QQ", KEY, 5_000_008).hex(),
        "valid": [
            {
                "name": name,
                "request": prefixed(NUMBER, frame(message)),
                "reply": prefixed(0, frame(message)),
                **parts(message),
            }
            for name, message in MESSAGES.items()
        ],
        "invalid requests": [{"name": n, "hex": data.hex()} for n, data in requests.items()],
        "invalid streams": [
            {"name": n, "pieces": [p.hex() for p in pieces]} for n, pieces in streams.items()
        ],
    }


def png(height: int, width: int, channels: int, pixels: bytes) -> bytes:
    """A PNG that isn't compressed, so that its bytes are everywhere the same."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    step = width * channels
    rows = b"".join(b"\0" + pixels[at : at + step] for at in range(0, height * step, step))
    color = {1: 0, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    # One block as it is, of any length up to 65,535, in zlib's own frame.
    size = struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF)
    body = b"\x78\x01\x01" + size + rows + struct.pack(">I", zlib.adler32(rows))
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def images() -> Vector:
    color = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    gray = np.arange(4, dtype=np.uint8).reshape(2, 2)
    stack = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    files = [png(2, 2, 3, each.tobytes()) for each in (color, *stack)]
    gray_file = png(2, 2, 1, gray.tobytes())

    def message(inner: Any, entries: list[Any], *buffers: bytes) -> Message:
        header = MARK + _pack([_pack(inner), entries])
        return Message(header, list(map(memoryview, buffers)))

    def entry(*path: str | int, shape: list[int], format: str = "png") -> list[Any]:
        return [list(path), format, shape]

    one = {"image": None}
    color_shape = [2, 2, 3]
    valid = {
        "an image": (
            {"step": 7, "image": color},
            message({"step": 7, "image": None}, [entry("image", shape=color_shape)], files[0]),
        ),
        "an image in a list, and a gray one": (
            {"views": [gray, color]},
            message(
                {"views": [None, None]},
                [entry("views", 0, shape=[2, 2]), entry("views", 1, shape=color_shape)],
                *(gray_file, files[0]),
            ),
        ),
        "a stack": (
            {"image": stack},
            message(one, [entry("image", shape=[2, 2, 2, 3])], *files[1:]),
        ),
        "nothing but an image": (color, message(None, [entry(shape=color_shape)], files[0])),
    }
    good = entry("image", shape=color_shape)
    invalid = {
        "no file": message(one, [good]),
        "a file too many": message(one, [good], files[0], files[0]),
        "a stack with a file too few": message(one, [entry("image", shape=[2, 2, 2, 3])], files[0]),
        "a place that isn't there": message(one, [entry("other", shape=color_shape)], files[0]),
        "a place that is taken": message({"image": 1}, [good], files[0]),
        "two in one place": message(one, [good, good], files[0], files[0]),
        "an index from the end": message([None], [entry(-1, shape=color_shape)], files[0]),
        "another size than the file's": message(one, [entry("image", shape=[2, 3, 3])], files[0]),
        "two channels": message(one, [entry("image", shape=[2, 2, 2])], files[0]),
        "an unknown format": message(
            one, [entry("image", shape=color_shape, format="x")], files[0]
        ),
        "another format": message(
            one, [entry("image", shape=color_shape, format="jpeg")], files[0]
        ),
        "half a file": message(one, [good], files[0][:40]),
        "something after the array": Message(
            message(one, [good], files[0]).header + b"\0", [memoryview(files[0])]
        ),
    }
    return {
        "valid": [
            {"name": name, "value": tagged(value), **parts(message)}
            for name, (value, message) in valid.items()
        ],
        "invalid": [{"name": name, **parts(message)} for name, message in invalid.items()],
    }


def build() -> dict[str, Vector]:
    return {
        "envelope": envelopes(),
        "codec": codecs(),
        "frame": frames(),
        "zmq": zmq_parts(),
        "grpc": grpc_pieces(),
        "images": images(),
    }


if __name__ == "__main__":
    for stem, content in build().items():
        path = Path(__file__).with_name(f"{stem}.json")
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
