"""A client written from docs/wire.md alone, to show that the page says enough.

It imports nothing of edgeml. ``python stranger.py zmq|grpc|stream inference|action PORT``
talks to a server that tests/wire/test_vectors.py runs; anything unexpected ends it with an error.
"""

import itertools
import struct
import sys
import time
import zlib

import grpc
import zmq
from msgspec import msgpack

HELLO, CALL, NEXT, GOODBYE, PING = range(5)
OK, NOTHING_YET, NO_SESSION = range(3)
PIECE = 4 << 20
LARGE = 5_000_000

Buffers = list[bytes]


def descriptor(dtype: str, *shape: int) -> bytes:
    head = struct.pack("<BB", len(dtype), len(shape)) + dtype.encode()
    return head + bytes(-len(head) % 8) + struct.pack(f"<{len(shape)}Q", *shape)


def large_array() -> tuple[bytes, Buffers]:
    """A codec's header and buffers: an array of 5 MB, out of band."""
    head = msgpack.Ext(1, descriptor("uint8", LARGE) + struct.pack("<I", 0))
    return msgpack.encode(head), [b"\x07" * LARGE]


def picture() -> tuple[bytes, Buffers]:
    """A message of the extension "images": {"image": a PNG of 3 x 2 pixels of one color}."""

    def chunk(name: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + end

    size = struct.pack(">IIBBBBB", 2, 3, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([200, 100, 50]) * 2) * 3)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    inner = msgpack.encode({"image": None})
    return b"\xc1" + msgpack.encode([inner, [[["image"], "png", [3, 2, 3]]]]), [file]


def frame(header: bytes, buffers: Buffers) -> bytes:
    made = struct.pack(f"<II{len(buffers)}Q", len(header), len(buffers), *map(len, buffers))
    made += header
    for buffer in buffers:
        made += bytes(-len(made) % 64) + buffer
    return made


def unframe(piece: bytes) -> tuple[bytes, Buffers]:
    header_size, count = struct.unpack_from("<II", piece)
    sizes = struct.unpack_from(f"<{count}Q", piece, 8)
    at = 8 + 8 * count + header_size
    header, buffers = piece[at - header_size : at], []
    for size in sizes:
        at += -at % 64
        buffers.append(piece[at : at + size])
        at += size
    assert at == len(piece)
    return header, buffers


class Zmq:
    def __init__(self, port: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvtimeo = 10_000
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._numbers = itertools.count(1)

    def exchange(self, header: bytes, buffers: Buffers) -> tuple[bytes, Buffers]:
        number = struct.pack("<Q", next(self._numbers))
        self._socket.send_multipart([number + header, *buffers])
        while True:
            head, *rest = self._socket.recv_multipart()
            if head[:8] == number:
                return head[8:], rest

    def close(self) -> None:
        self._context.destroy()


class Grpc:
    """Unary where it fits, else by Stream and Fetch; with ``stream``, everything by Stream."""

    def __init__(self, port: int, stream: bool = False) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        # No serializers are given: bytes go in and come out.
        self._request = self._channel.unary_unary("/edgeml.Transport/Request")
        self._stream = self._channel.stream_stream("/edgeml.Transport/Stream")
        self._fetch = self._channel.unary_stream("/edgeml.Transport/Fetch")
        connect = self._channel.unary_unary("/edgeml.Transport/Connect")
        self._server, _ = struct.unpack("<QQ", connect(b"", timeout=10))
        self._always = stream

    def exchange(self, header: bytes, buffers: Buffers) -> tuple[bytes, Buffers]:
        content = frame(header, buffers)
        piece = struct.pack("<QQ", self._server, len(content)) + content
        if self._always or len(piece) > PIECE:
            cut = (piece[at : at + PIECE] for at in range(0, len(piece), PIECE))
            reply = b"".join(self._stream(cut, timeout=10))
        else:
            reply = self._request(piece, timeout=10)
            key, _ = struct.unpack_from("<QQ", reply)
            if key:
                reply = b"".join(self._fetch(struct.pack("<QQ", self._server, key), timeout=10))
        _, size = struct.unpack_from("<QQ", reply)
        assert size == len(reply) - 16
        return unframe(reply[16:])

    def close(self) -> None:
        self._channel.close()


class Client:
    version = 0  # of what it calls

    def __init__(self, wire: Zmq | Grpc, service: str, config: dict[str, object]) -> None:
        self._wire = wire
        self._session = b""
        hello = {
            "protocol": 1,
            "service": service,
            "client_id": "stranger",
            "label": "",
            "codec": "msgpack",
            "config": config,
            "extensions": {
                "images": {"decodes": [], "encodes": ["png"]},
                "only a stranger knows": [1],
            },
        }
        status, body, *_ = self.ask(HELLO, "", 0.0, msgpack.encode(hello))
        assert status == OK, msgpack.decode(body)
        self.welcome = msgpack.decode(body)
        self._session = self.welcome["session"]
        assert "only a stranger knows" not in self.welcome.get("extensions", {})

    def ask(self, kind: int, name: str, timeout: float, body: bytes, buffers: Buffers = []):  # noqa: B006
        request = msgpack.encode([kind, self._session, name, timeout, body])
        header, received = self._wire.exchange(request, buffers)
        status, body, epoch, number, *more = msgpack.decode(header)
        self.served = more[0] if more else None
        return status, body, epoch, number, received

    def call(self, name: str, value: object) -> object:
        status, body, *_ = self.ask(CALL, name, 10.0, msgpack.encode(value))
        assert status == OK, msgpack.decode(body)
        version, batch_size, queue, compute, *_ = self.served
        assert version == (0 if name[0] == "/" else self.version)
        assert batch_size == 1
        assert 0 <= queue < 10
        assert 0 <= compute < 10
        return msgpack.decode(body)

    def next(self, topic: str, epoch: int, number: int):
        return self.ask(NEXT, topic, 10.0, msgpack.encode([1, epoch, number]))

    def heartbeat(self) -> None:
        status, *_ = self.ask(NEXT, "", 10.0, msgpack.encode([0, 0, 0]))
        assert status == NOTHING_YET

    def goodbye(self) -> None:
        assert self.ask(GOODBYE, "", 0.2, b"")[0] == OK
        assert self.ask(CALL, "anything", 10.0, b"\xc0")[0] == NO_SESSION


def inference(wire: Zmq | Grpc) -> None:
    client = Client(wire, "inference", {})
    client.version = 1
    assert client.call("/interfaces", None) == ["echo", "fail", "picture", "zeros"]
    assert client.call("echo", {"a": [1, 2.5, None]}) == {"a": [1, 2.5, None]}
    header, buffers = large_array()
    status, body, _, _, received = client.ask(CALL, "echo", 10.0, header, buffers)
    assert (status, body, received) == (OK, header, buffers)  # 5 MB there and back
    status, body, _, _, received = client.ask(CALL, "zeros", 10.0, msgpack.encode(LARGE))
    assert (status, received) == (OK, [bytes(LARGE)])  # 5 MB for a small request
    assert msgpack.decode(body).data == descriptor("uint8", LARGE) + bytes(4)
    status, body, *_ = client.ask(CALL, "fail", 10.0, b"\xc0")
    assert (status, msgpack.decode(body)[:2]) == (3, ["ValueError", "no"])
    status, body, *_ = client.ask(CALL, "nothing", 10.0, b"\xc0")
    assert (status, len(msgpack.decode(body))) == (4, 1)
    status, body, *_ = client.ask(PING, "", 1.0, b"")
    pong = msgpack.decode(body)
    assert (status, pong["protocol"], pong["service"]) == (OK, 1, "inference")
    assert (pong.get("state", "ready"), client.served) == ("ready", None)
    assert abs(pong["clock"] - time.time()) < 60
    assert "png" in client.welcome["extensions"]["images"]["decodes"]
    header, buffers = picture()
    status, body, *_ = client.ask(CALL, "picture", 10.0, header, buffers)
    assert (status, msgpack.decode(body)) == (OK, [200, 100, 50])
    status, *_ = client.ask(CALL, "picture", 10.0, header, [buffers[0][:-40]])
    assert status == 5
    client.heartbeat()
    client.goodbye()


def action(wire: Zmq | Grpc) -> None:
    keys = {"action_keys": ["move"], "observation_keys": ["cam"]}
    status, body, *_ = refused(wire, {"version": "2", **keys})
    assert status == 9, msgpack.decode(body)
    client = Client(wire, "action", {"version": "1", **keys})
    assert client.welcome["topics"]["observations"] == 1
    assert client.call("obs", None) == {"cam": 5}
    assert client.call("obs", ["cam"]) == {"cam": 5}
    assert client.next("observations", 0, 0)[0] == NOTHING_YET
    assert client.call("act", ["move", {"x": 3}]) == {"moved": 3}  # and it publishes 1 and 2
    status, body, epoch, number, _ = client.next("observations", 0, 0)
    assert (status, msgpack.decode(body), number) == (OK, {"cam": 2}, 2)
    observation, taken = client.call("observe", ["cam"])
    assert observation == {"cam": 5}
    stamp = [1, taken, 0.0, 0.0, 10.0, taken, "v1", None, 7]
    result, clock, halts = client.call("act", ["move", {"x": 4}, msgpack.encode(stamp)])
    assert (result, halts) == ({"moved": 4}, 0)
    assert taken < clock <= client.call("clock", None)
    late = [2, taken, 0.0, 11.0, 10.0, None, None, None, 7]
    for again in (stamp, late):  # the one is no later than itself, the other is too old
        status, *_ = client.ask(
            CALL, "act", 10.0, msgpack.encode(["move", {}, msgpack.encode(again)])
        )
        assert status == 12
    start, ended, missed, rows = client.call("executed", [0, 0])
    assert (ended, missed, len(rows)) == (2, 0, 2)
    assert rows[1][:7] == [2, "move", "stranger", "", None, 1, "v1"]
    assert rows[1][7] == taken
    assert client.call("executed", [start, ended]) == [start, ended, 0, []]
    assert epoch == client.welcome["epoch"]
    assert client.next("observations", epoch, number)[0] == NOTHING_YET
    assert client.next("observations", epoch, 99)[0] == 5
    grant, who = client.call("lease", ["move", 7, 1, 60.0, 0, 0.0])
    assert (grant > 0, who) == (True, "")
    assert client.call("lease", ["move", 7, 1, 60.0, grant, 0.1]) == [grant, ""]
    other, who = client.call("lease", ["move", 8, 0, 60.0, 0, 0.0])
    assert (other, "priority 1" in who) == (0, True)
    status, *_ = client.ask(CALL, "act", 10.0, msgpack.encode(["move", {"x": 3}]))
    assert status == 13
    for token in (7, 8):
        assert client.call("lease", ["move", token, 0, 0.0])[0] == 0
    client.goodbye()


def refused(wire: Zmq | Grpc, config: dict[str, object]):
    hello = {"protocol": 1, "service": "action", "client_id": "", "label": "", "codec": "msgpack"}
    body = msgpack.encode({**hello, "config": config})
    return msgpack.decode(wire.exchange(msgpack.encode([HELLO, b"", "", 0.0, body]), [])[0])


if __name__ == "__main__":
    how, what, port = sys.argv[1:]
    wire = Zmq(int(port)) if how == "zmq" else Grpc(int(port), how == "stream")
    {"inference": inference, "action": action}[what](wire)
    wire.close()
    assert not any(name.partition(".")[0] == "edgeml" for name in sys.modules)
    print("done")
