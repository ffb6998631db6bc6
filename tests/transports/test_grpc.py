"""What is gRPC's own: strangers, codes, streams, large messages, signals and forks."""

import asyncio
import contextlib
import random
import signal
import socket
import struct
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import edgeml
from edgeml import (
    Closed,
    DeadlineExceeded,
    InferenceClient,
    InferenceServer,
    Malformed,
    Overloaded,
    PermissionDenied,
    Unreachable,
)
from edgeml.core import Deadline, Limits, Message, Url, load_transport, loops, wire
from edgeml.core.errors import NotCarriedOut
from edgeml.core.frames import frame
from edgeml.core.pieces import Assembly
from edgeml.core.session import SessionKeeper
from edgeml.testing.ends import resident_memory
from edgeml.transports.grpc import order
from edgeml.transports.grpc.failures import find_proxy
from edgeml.transports.grpc.protocol import QUEUES
from pairs import process, run_fresh, session_of, started, took, wait_until

ANYWHERE = Url("grpc", "127.0.0.1", 0)
LIMIT = 4 << 20  # gRPC's own
READY = grpc.ChannelConnectivity.READY
PREFIX = struct.Struct("<QQ")

transport = load_transport("grpc")


class Stranger:
    """A client that knows what gRPC is, and no more; its limits are gRPC's own."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        self.channel = grpc.insecure_channel(
            f"{host}:{port}", [("grpc.use_local_subchannel_pool", 1)]
        )

    def connect(self, data: bytes = b"") -> bytes:
        return self.channel.unary_unary("/edgeml.Transport/Connect")(data, timeout=10)

    def request(self, data: bytes, timeout: float = 10) -> bytes:
        return self.channel.unary_unary("/edgeml.Transport/Request")(data, timeout=timeout)

    def stream(self, pieces, timeout: float = 10) -> bytes:
        call = self.channel.stream_stream("/edgeml.Transport/Stream")
        return b"".join(call(iter(pieces), timeout=timeout))

    def fetch(self, data: bytes) -> bytes:
        return b"".join(self.channel.unary_stream("/edgeml.Transport/Fetch")(data, timeout=10))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


def request_of(message: Message, number: int = 0) -> bytes:
    content = frame(message)
    return PREFIX.pack(number, len(content)) + content


@contextlib.contextmanager
def refused(code: grpc.StatusCode):
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value


@pytest.fixture
def stranger(connected):
    with Stranger(connected[0].url.port) as made:
        yield made


@pytest.fixture
def unharmed(connected):
    """Holds the endpoint to answering, to old friends and new, and to leaving nothing behind."""
    endpoint, requester = connected
    requester.call(Message(b"x"), 20)
    before = under_way(endpoint)
    yield
    assert requester.call(Message(b"known"), 20).header == b"known"
    with transport.connect(endpoint.url, 20) as new:
        large = Message(b"new", [memoryview(bytes(LIMIT))])
        assert new.call(large, 20).header == b"new"
    wait_until(lambda: under_way(endpoint) <= before)


def under_way(endpoint) -> int:
    """How many calls the endpoint is at work on, and what else its loop has to do."""
    for _ in range(10):
        with contextlib.suppress(RuntimeError):  # it changed meanwhile
            return len(asyncio.all_tasks(endpoint._loop._asyncio))
    return 1 << 30


@pytest.fixture
def assemblies(monkeypatch):
    """The streams of which an endpoint has had a piece, as long as it keeps what came."""
    known = weakref.WeakSet()

    class Watched(Assembly):
        def add(self, piece: bytes) -> None:
            super().add(piece)
            known.add(self)

    monkeypatch.setattr("edgeml.transports.grpc.listener.Assembly", Watched)
    return known


# Strangers --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["/edgeml.Transport/Nothing", "/other.Service/Request", "/x"])
def test_a_method_that_does_not_exist_is_unimplemented(stranger, unharmed, method):
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        stranger.channel.unary_unary(method)(b"", timeout=10)
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        list(stranger.channel.stream_stream(method)(iter([b"x"]), timeout=10))


def test_whoever_connects_is_told_the_same_number_and_a_queue_of_its_own(stranger, unharmed):
    told = [PREFIX.unpack(stranger.connect(data)) for data in (b"", b"whatever") * QUEUES]
    number, queue = told[0]
    assert number
    assert {each for each, _ in told} == {number}
    assert {each for _, each in told} == set(range(1, QUEUES + 1))
    request = stranger.channel.unary_unary(f"/edgeml.Transport/Request{queue}")
    asked = request_of(Message(b"x"), number)
    assert request(asked, timeout=10) == request_of(Message(b"x"))
    assert stranger.request(request_of(Message(b"x"), number)) == request_of(Message(b"x"))
    assert stranger.stream([request_of(Message(b"x"), number)]) == request_of(Message(b"x"))


def garbage() -> list[bytes]:
    rng = random.Random(0)
    whole = request_of(Message(b"head", [memoryview(b"buffer")]))
    made = [b"", bytes(7), bytes(15), PREFIX.pack(0, 1), PREFIX.pack(0, (1 << 64) - 1)]
    made += [whole[:-1], whole + b"x", whole[:20], PREFIX.pack(0, 8) + b"\xff" * 8]
    made += [PREFIX.pack(0, 8) + struct.pack("<II", 1, 0), PREFIX.pack(0, 0)]
    made += [PREFIX.pack(0, size) + rng.randbytes(size) for size in (1, 7, 8, 9, 100, 5000)]
    return made + [bytes(12) + rng.randbytes(rng.randrange(2000)) for _ in range(50)]


def test_garbage_is_an_invalid_argument(stranger, unharmed):
    for data in garbage():
        for send in (stranger.request, lambda data: stranger.stream([data])):
            with refused(grpc.StatusCode.INVALID_ARGUMENT):
                send(data)
        if len(data) != PREFIX.size or data[:8] == bytes(8):
            with refused(grpc.StatusCode.INVALID_ARGUMENT):
                stranger.fetch(data)
    for pieces in ([], [b""], [bytes(8)] * 2, [bytes(16), b"x"], [request_of(Message(b"x"))] * 2):
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            stranger.stream(pieces)


def test_a_method_of_another_kind_does_no_harm(stranger, unharmed):
    """A stream for a unary method, and the other way round."""
    piece = request_of(Message(b"x"))
    for method in ("Connect", "Request", "Stream", "Fetch"):
        for count in (0, 1, 2):
            with contextlib.suppress(grpc.RpcError):
                call = stranger.channel.stream_stream(f"/edgeml.Transport/{method}")
                list(call(iter([piece] * count), timeout=0.5))
        with contextlib.suppress(grpc.RpcError):
            stranger.channel.unary_unary(f"/edgeml.Transport/{method}")(piece, timeout=0.5)


def nearly_valid(rng: random.Random, session: bytes) -> bytes:
    """A request that was valid before a few of its bytes were changed."""
    hello = wire.pack(wire.Hello(wire.PROTOCOL, "inference", "me", "label", "msgpack", {}))
    name, body = rng.choice([("", hello), ("echo", b"\x93\x01\x02\x03"), ("echo", b"\xc1")])
    timeout = rng.choice((1.0, 0.0, -1.0, 1e300, float("nan"), float("inf")))
    header = wire.pack(wire.Request(rng.choice((0, 1, 3, 4, -1)), session, name, timeout, body))
    buffers = [memoryview(rng.randbytes(rng.randrange(100))) for _ in range(rng.choice((0, 1, 5)))]
    data = bytearray(request_of(Message(header, buffers)))
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        data[rng.randrange(8, len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def test_nearly_valid_requests_are_answered_and_do_no_harm():
    rng = random.Random(1)
    codes = set()
    with started(edgeml.InferenceServer(0, transport="grpc")) as server:
        server.register_interface("echo", lambda payload: payload)
        with InferenceClient("127.0.0.1", server.port, "grpc") as client:
            with Stranger(server.port) as stranger:
                hello = wire.pack(wire.Hello(wire.PROTOCOL, "inference", "me", "", "msgpack", {}))
                greeting = Message(wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, hello)))
                reply = wire.unpack(wire.Answer, stranger.request(request_of(greeting))[24:])
                session = wire.unpack(wire.Welcome, reply.body).session
                for index in range(600):
                    data = nearly_valid(rng, rng.choice((session, session, b"")))
                    cut = rng.randrange(16, 64)
                    try:
                        if index % 2:
                            stranger.request(data, timeout=0.5)
                        else:
                            stranger.stream([data[:cut], data[cut:]], timeout=0.5)
                    except grpc.RpcError as error:
                        codes.add(error.code())
            # A NEXT that is parked is not answered within half a second.
            assert codes <= {
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            }
            assert client.call("echo", "known") == "known"


def test_what_is_not_answered_in_time_exceeds_the_deadline(parking):
    endpoint, _, taken = parking
    with Stranger(endpoint.url.port) as stranger:
        for send in (stranger.request, lambda data, timeout: stranger.stream([data], timeout)):
            with took(at_most=2.0), refused(grpc.StatusCode.DEADLINE_EXCEEDED):
                send(request_of(Message(b"park")), 0.2)
        wait_until(lambda: all(reply.expired for _, reply in taken))
        assert len(taken) == 2
        for _, reply in taken:
            reply(Message(b"late"))
        wait_until(lambda: endpoint.dropped == 2)


def test_more_than_grpc_takes_in_one_piece_is_refused_and_up_to_that_all_is_taken(
    stranger, unharmed
):
    def of(size: int) -> bytes:
        return request_of(Message(b"\0" * (size - PREFIX.size - 8)))

    assert stranger.request(of(LIMIT)) == of(LIMIT)
    assert stranger.stream([of(LIMIT)]) == of(LIMIT)
    for send in (stranger.request, lambda data: stranger.stream([data])):
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            send(of(LIMIT + 1))


def ask_for(path: bytes, port: int) -> socket.socket:
    """Ask for a path as no gRPC library does: as it is."""
    fields = b"\x83\x86\x04" + bytes([len(path)]) + path  # HPACK (RFC 7541): POST, http, and it
    fields += b"\x41\x01x\x5f\x10application/grpc\x40\x02te\x08trailers"
    made = socket.create_connection(("127.0.0.1", port), 20)
    made.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">3xBBI", 4, 0, 0))
    made.sendall(struct.pack(">I", len(fields))[1:] + struct.pack(">BBI", 1, 4, 1) + fields)
    return made


def test_a_path_that_is_no_text_ends_neither_the_server_nor_what_is_under_way():
    parked = []

    def on_request(message: Message, reply) -> None:
        if message.header == b"park":
            parked.append(reply)
        else:
            reply(message)

    with transport.serve(ANYWHERE, on_request) as endpoint:
        for count in range(1, 4):
            with transport.connect(endpoint.url, 20) as requester:
                future = requester.request(Message(b"park"))
                wait_until(lambda n=count: len(parked) == n)
                with ask_for(b"/edgeml/\xd1\xff", endpoint.url.port):
                    wait_until(lambda n=count: endpoint.counts["Malformed"] == n)
                    parked[-1](Message(b"answered"))
                    assert future.result(20).header == b"answered"

            def answered() -> bool:
                try:
                    with transport.connect(endpoint.url, 1.0) as requester:
                        return requester.call(Message(b"x"), 1.0).header == b"x"
                except Unreachable:
                    return False

            with took(at_most=5.0):
                wait_until(answered)


def test_an_http_client_and_noise_do_no_harm(connected, unharmed):
    port = connected[0].url.port
    rng = random.Random(2)
    start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for sent in (
        b"GET / HTTP/1.1\r\nHost: robot\r\n\r\n",
        start,
        *(start + bytes(3) + b"\4" + bytes(5) + rng.randbytes(3000) for _ in range(20)),
        *(rng.randbytes(3000) for _ in range(20)),
    ):
        with (
            socket.create_connection(("127.0.0.1", port), 20) as peer,
            contextlib.suppress(OSError),  # cut off, and rightly so
        ):
            peer.sendall(sent)


# What codes mean to a client --------------------------------------------------------------


class Strange:
    """A server that is not edgeml's; ``behave`` may be changed while it serves."""

    def __init__(self, behave=None, connect=None):
        self.behave = behave
        self._pool = ThreadPoolExecutor(4)
        self._grpc = grpc.server(self._pool)
        methods = {
            "Connect": grpc.unary_unary_rpc_method_handler(
                connect or (lambda data, context: PREFIX.pack(7, 0))
            ),
            "Request": grpc.unary_unary_rpc_method_handler(self._once),
            "Stream": grpc.stream_stream_rpc_method_handler(self._each),
            "Fetch": grpc.unary_stream_rpc_method_handler(self._each),
        }
        handler = grpc.method_handlers_generic_handler("edgeml.Transport", methods)
        self._grpc.add_generic_rpc_handlers((handler,))
        self.url = Url("grpc", "127.0.0.1", self._grpc.add_insecure_port("127.0.0.1:0"))
        self._grpc.start()

    def _once(self, data, context):
        return self.behave(data, context)

    def _each(self, data, context):
        yield from self.behave(data, context)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._grpc.stop(0).wait()
        self._pool.shutdown()


MEANS = {
    grpc.StatusCode.ABORTED: NotCarriedOut,
    grpc.StatusCode.INVALID_ARGUMENT: Malformed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
}  # any other is the end of the connection

SMALL = Message(b"x")
LARGE = Message(b"x", [memoryview(bytes(LIMIT))])


ASK = (
    lambda requester, message: requester.call(message, 20),
    lambda requester, message: requester.request(message).result(20),
)


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK], ids=str
)
@pytest.mark.parametrize("large", [False, True])
def test_a_code_is_an_error_of_ours(code, large):
    def abort(data, context):
        context.abort(code, "because")

    message = LARGE if large else SMALL
    with Strange(abort) as server:
        for ask in ASK:
            with transport.connect(server.url, 20) as requester:
                meant = MEANS.get(code, Unreachable)
                with pytest.raises(meant) as caught:
                    ask(requester, message)
                assert type(caught.value) is meant
                assert requester.lost == issubclass(meant, Unreachable)


@pytest.mark.parametrize("piece", [b"", bytes(15), PREFIX.pack(0, 9), PREFIX.pack(0, 8) + b"x" * 8])
def test_a_reply_that_is_none_is_malformed(piece):
    with (
        Strange(lambda data, context: piece) as server,
        transport.connect(server.url, 20) as requester,
    ):
        for _ in range(2):
            with pytest.raises(Malformed):
                requester.call(SMALL, 20)
            with pytest.raises(Malformed):
                requester.request(SMALL).result(20)
        server.behave = lambda data, context: [piece]
        with pytest.raises(Malformed):
            requester.call(LARGE, 20)
        with pytest.raises(Malformed):
            requester.request(LARGE).result(20)
        assert not requester.lost


def test_a_large_reply_that_can_not_be_fetched_is_an_error():
    def behave(data, context):
        if len(data) != PREFIX.size:  # a request
            return PREFIX.pack(1, LIMIT)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too late")

    with Strange(behave) as server, transport.connect(server.url, 20) as requester:
        for send in (
            lambda: requester.call(SMALL, 20),
            lambda: requester.request(SMALL).result(20),
        ):
            with pytest.raises(Malformed, match="too late"):
                send()


PIECE = bytes(1 << 20)


@pytest.mark.parametrize(
    ("promised", "first"),
    [
        (0, 1 << 40),
        (LIMIT - PREFIX.size, 3 << 30),  # which would have come in one piece
        ((4 << 30) + 1, 3 << 30),
        (1 << 62, 3 << 30),
        (LIMIT, 3 << 30),
        (LIMIT, LIMIT),
    ],
)
@pytest.mark.parametrize("ask", ASK)
def test_a_large_reply_that_is_not_as_promised_is_malformed_and_read_no_further(
    promised, first, ask
):
    sent, ended = [], threading.Event()

    def endless(context):
        context.add_callback(ended.set)
        yield PREFIX.pack(0, first) + PIECE
        while not ended.is_set():
            sent.append(len(PIECE))
            yield PIECE

    def behave(data, context):
        if len(data) != PREFIX.size:  # a request
            return PREFIX.pack(77, promised)
        return endless(context)

    with Strange(behave) as server, transport.connect(server.url, 20) as requester:
        with pytest.raises(Malformed), took(at_most=2.5):
            ask(requester, SMALL)
        assert not requester.lost
        if sent:
            assert ended.wait(20)
        assert sum(sent) <= 100 << 20


def test_a_reply_to_what_is_large_is_read_no_further_than_its_prefix_says():
    ended = threading.Event()

    def endless(data, context):
        context.add_callback(ended.set)
        yield PREFIX.pack(0, 10)
        while not ended.is_set():
            yield PIECE

    with Strange(endless) as server, transport.connect(server.url, 20) as requester:
        for ask in ASK:
            ended.clear()
            with pytest.raises(Malformed), took(at_most=2.5):
                ask(requester, LARGE)
            assert ended.wait(20)
        assert not requester.lost


@pytest.mark.parametrize("welcome", [b"", bytes(15), bytes(17)])
def test_a_welcome_that_is_none_is_unreachable(welcome):
    with (
        Strange(connect=lambda data, context: welcome) as server,
        pytest.raises(Unreachable, match="no edgeml server"),
    ):
        transport.connect(server.url, 20)


def test_another_grpc_server_is_unreachable():
    def not_found(data, context):
        context.abort(grpc.StatusCode.NOT_FOUND, "")

    with Strange(connect=not_found) as strange, pytest.raises(Unreachable):
        transport.connect(strange.url, 20)
    pool = ThreadPoolExecutor(1)
    server = grpc.server(pool)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(Unreachable):
        transport.connect(ANYWHERE.with_port(port), 20)
    server.stop(0).wait()
    pool.shutdown()


# Large messages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "megabytes", [25, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_large_messages_go_both_ways_within_grpcs_own_limit(megabytes):
    size = megabytes * 1_000_000
    array = np.arange(size // 4, dtype=np.uint32)
    sent = Message(b"large", [memoryview(array).cast("B")])

    def on_request(message, reply) -> None:
        reply(sent if message.header == b"give" else Message(b"%d" % message.nbytes))

    def check(got: Message) -> None:
        assert got.header == b"large"
        assert (np.frombuffer(got.buffers[0], np.uint32) == array).all()

    with (
        transport.serve(ANYWHERE, on_request) as endpoint,
        transport.connect(endpoint.url, 20) as requester,
        Stranger(endpoint.url.port) as stranger,
    ):
        taken = b"%d" % (size + 5)
        assert requester.call(sent, 60.0).header == taken
        assert requester.request(sent).result(60.0).header == taken
        check(requester.call(Message(b"give"), 60.0))
        check(requester.request(Message(b"give")).result(60.0))
        if megabytes < 100:
            reply = stranger.stream([request_of(Message(b"give"))], timeout=60)
            assert reply == request_of(sent)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_at_the_limit_nothing_is_off_by_one(connected, extra):
    _, requester = connected
    header = b"\0" * (LIMIT - PREFIX.size - 8 + extra)
    assert requester.call(Message(header), 20).header == header
    assert requester.request(Message(header)).result(20).header == header


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streams_that_claim_4_gib_and_send_nothing_take_no_memory(assemblies):
    def nothing_more():
        yield PREFIX.pack(0, 1 << 32)
        over.wait(10)

    over = threading.Event()
    all_of_it = Limits(message_bytes=1 << 32, bytes_per_client=1 << 40, bytes=1 << 40)
    with (
        transport.serve(ANYWHERE, lambda message, reply: None, limits=all_of_it) as endpoint,
        Stranger(endpoint.url.port) as stranger,
    ):
        before = resident_memory()
        method = stranger.channel.stream_stream("/edgeml.Transport/Stream")
        calls = [method(nothing_more(), timeout=20) for _ in range(8)]
        wait_until(lambda: len(assemblies) == 8)
        assert stranger.connect()
        assert resident_memory() - before < 64 << 20
        for call in calls:
            call.cancel()
        over.set()
        wait_until(lambda: not endpoint._incoming.nbytes)


def test_what_one_client_and_one_host_send_at_a_time_is_bounded(assemblies):
    """Eight unfinished streams of 400 MiB, without a session, took 3.5 GB."""

    def nothing_more(size):
        yield PREFIX.pack(0, size)
        over.wait(10)

    over = threading.Event()
    limits = Limits(bytes_per_client=1 << 24, bytes=1 << 26)
    with transport.serve(ANYWHERE, lambda message, reply: reply(message), limits=limits) as served:
        strangers = [Stranger(served.url.port) for _ in range(4)]

        def begin(stranger, size):
            method = stranger.channel.stream_stream("/edgeml.Transport/Stream")
            return method(nothing_more(size), timeout=20)

        calls = [begin(strangers[0], 20 << 20)]  # one of it is taken, however large
        wait_until(lambda: len(assemblies) == 1)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            next(begin(strangers[0], 5 << 20))
        assert served.counts["Overloaded"] == 1
        calls.append(begin(strangers[1], 10 << 20))
        wait_until(lambda: len(assemblies) == 2)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):  # half of what all may have
            next(begin(strangers[2], 5 << 20))
        assert strangers[3].request(request_of(Message(b"small"))) == request_of(Message(b"small"))
        for call in calls:
            call.cancel()
        over.set()
        wait_until(lambda: not served._incoming.nbytes)
        large = request_of(Message(b"", [memoryview(bytes(5 << 20))]))
        assert strangers[2].stream([large[: 4 << 20], large[4 << 20 :]]) == large
        for stranger in strangers:
            stranger.channel.close()


class HalfSender:
    """Speaks HTTP/2 by hand: requests on many streams, none of which it ever finishes."""

    DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
    ACK, END_HEADERS = 1, 4

    def __init__(self, port: int, method: str, streams: int):
        self.sock = socket.create_connection(("127.0.0.1", port), 20)
        self.received = b""
        self.sent = dict.fromkeys(range(1, 2 * streams, 2), 0)
        self.windows = dict.fromkeys((0, *self.sent), 65_535)
        self.first_window = 65_535
        self.sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(self.SETTINGS, 0, 0, b"")
        fields = {":path": method, ":authority": "x", "content-type": "application/grpc"}
        headers = b"\x83\x86"  # a POST, over http
        for name, value in (fields | {"te": "trailers"}).items():
            headers += b"\0" + bytes([len(name)]) + name.encode()
            headers += bytes([len(value)]) + value.encode()
        for stream in self.sent:
            self.send(self.HEADERS, self.END_HEADERS, stream, headers)

    def send(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        head = len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self.sock.sendall(head + content)

    def listen(self) -> None:
        """Take what windows there are."""
        self.sock.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            self.received += data
        self.sock.settimeout(20)
        while len(self.received) >= (end := 9 + int.from_bytes(self.received[:3], "big")):
            frame, self.received = self.received[:end], self.received[end:]
            kind, flags = frame[3:5]
            stream, content = int.from_bytes(frame[5:9], "big"), frame[9:]
            if kind == self.WINDOW_UPDATE:
                self.windows[stream] += int.from_bytes(content, "big")
            elif kind == self.PING and not flags:
                self.send(self.PING, self.ACK, 0, content)
            elif kind == self.SETTINGS and not flags:
                for key, value in struct.iter_unpack(">HI", content):
                    if key == 4:
                        for stream in self.sent:
                            self.windows[stream] += value - self.first_window
                        self.first_window = value
                self.send(self.SETTINGS, self.ACK, 0, b"")

    def flood(self) -> int:
        """Send all but the end of 4 MB on each stream until cut off; returns what was sent."""
        most = LIMIT - 1000
        with contextlib.suppress(OSError):
            while any(sent < most for sent in self.sent.values()):
                self.listen()
                for stream, sent in self.sent.items():
                    size = min(self.windows[0], self.windows[stream], most - sent, 16_000)
                    if size < 5:
                        continue
                    begin = b"" if sent else b"\0" + LIMIT.to_bytes(4, "big")
                    self.send(self.DATA, 0, stream, begin + bytes(size - len(begin)))
                    self.sent[stream] += size
                    self.windows[stream] -= size
                    self.windows[0] -= size
        self.sock.close()
        return sum(self.sent.values())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for what a connection received")
@pytest.mark.parametrize(
    "method",
    [
        *(f"/edgeml.Transport/{name}" for name in ("Connect", "Request", "Stream", "Fetch")),
        *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch")),
    ],
)
def test_requests_that_are_half_sent_are_bounded_for_each_connection(method):
    """gRPC itself holds 4 MB of each, of as many as there are: 2 GB a second."""
    limits = Limits(bytes_per_client=1 << 20)
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(message), limits=limits) as served,
        transport.connect(served.url, 20) as good,
    ):
        sender = HalfSender(served.url.port, method, streams=200)
        flooding = ThreadPoolExecutor(1).submit(sender.flood)
        while not flooding.done():
            with took(at_most=3.0):
                assert good.call(Message(b"x"), 20).header == b"x"
        assert flooding.result() < 600 << 20
        wait_until(lambda: served.counts["Overloaded"] == 1)
        wait_until(lambda: len(served._sockets._flows) <= 1)


def test_a_busy_client_is_not_taken_for_one_that_sends_by_halves():
    """What is half sent is small however much there is of it."""
    limits = Limits(bytes_per_client=1 << 20)
    message = Message(b"x", [memoryview(bytes(1 << 20))])
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(Message(b"y")), limits=limits) as s,
        transport.connect(s.url, 20) as one,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(one.call, message, 20.0) for _ in range(200)]
        assert all(call.result().header == b"y" for call in calls)
        assert not s.counts


def test_a_stream_that_stalls_is_given_up_and_counted(assemblies):
    def half():
        yield PREFIX.pack(0, 10 << 20)
        over.wait(10)

    over = threading.Event()
    limits = Limits(stall=0.2)
    with (
        transport.serve(ANYWHERE, lambda message, reply: None, limits=limits) as served,
        Stranger(served.url.port) as stranger,
        refused(grpc.StatusCode.DEADLINE_EXCEEDED),
        took(at_most=3.0),
    ):
        stranger.stream(half(), timeout=20)
    over.set()
    assert served.counts["DeadlineExceeded"] == 1
    wait_until(lambda: not served._incoming.nbytes)
    wait_until(lambda: not assemblies)


def test_replies_that_nobody_reads_are_bounded_told_and_counted():
    """Three hundred of 8 MB that were not fetched took 2.4 GB; small ones are under way."""
    answer = Message(b"", [memoryview(bytes(5 << 20))])
    limits = Limits(replies_per_client=12 << 20)
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(answer), limits=limits) as served,
        Stranger(served.url.port) as stranger,
        Stranger(served.url.port) as other,
    ):
        kept = [PREFIX.unpack(stranger.request(request_of(Message(b"x"))))[0] for _ in range(2)]
        for _ in range(2):
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                stranger.request(request_of(Message(b"x")))
        assert served.counts["Overloaded"] == served.dropped == 2
        assert PREFIX.unpack(other.request(request_of(Message(b"x"))))[0]
        assert len(stranger.fetch(PREFIX.pack(0, kept[0]))) > 5 << 20
        assert PREFIX.unpack(stranger.request(request_of(Message(b"x"))))[0]
        stranger.channel.close()


def test_what_has_been_read_counts_no_more():
    answer = Message(b"", [memoryview(bytes(1 << 20))])
    large = Message(b"", [memoryview(bytes(6 << 20))])
    limits = Limits(replies_per_client=8 << 20)
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(message), limits=limits) as served,
        transport.connect(served.url, 20) as requester,
    ):
        for _ in range(12):
            assert requester.call(answer, 20).buffers[0].nbytes == 1 << 20
            assert requester.call(large, 20).buffers[0].nbytes == 6 << 20
            assert requester.request(large).result(20).buffers[0].nbytes == 6 << 20
        wait_until(lambda: not served._unread.nbytes)
        assert not served._incoming.nbytes
        assert not served.counts


def test_a_claim_that_there_is_no_memory_for_is_told_as_overloaded(stranger, unharmed, monkeypatch):
    import mmap

    def no_memory(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", no_memory)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            stranger.stream([PREFIX.pack(0, 1 << 31)])


def test_a_claim_beyond_what_is_taken_is_refused_at_once(stranger, unharmed):
    over = threading.Event()

    def claim():
        yield PREFIX.pack(0, Limits().message_bytes + 1)
        over.wait(10)

    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        stranger.stream(claim())
    over.set()


def test_a_stream_that_never_ends_goes_no_further_than_its_prefix(stranger, unharmed):
    pieces = 0

    def for_ever():
        nonlocal pieces
        yield PREFIX.pack(0, 10 << 20)
        while True:
            pieces += 1
            yield bytes(1 << 20)

    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        stranger.stream(for_ever())
    assert pieces < 100


@pytest.mark.parametrize("how", ["cancelled", "cut off"])
def test_a_stream_that_is_broken_off_is_forgotten(parking, assemblies, how):
    endpoint, requester, taken = parking
    over = threading.Event()

    def half():
        yield PREFIX.pack(0, 10 << 20)
        for _ in range(5):
            yield bytes(1 << 20)
        over.wait(10)

    with Stranger(endpoint.url.port) as stranger:
        call = stranger.channel.stream_stream("/edgeml.Transport/Stream")(half(), timeout=20)
        wait_until(lambda: assemblies)
        if how == "cancelled":
            call.cancel()
        else:
            stranger.channel.close()
        wait_until(lambda: not assemblies, Limits().stall / 2)
        over.set()
    future = requester.request(Message(b"x"))
    wait_until(lambda: taken)
    assert [message.header for message, _ in taken] == [b"x"]
    taken[0][1](Message(b"fine"))
    assert future.result(20).header == b"fine"


def test_a_large_reply_that_is_not_fetched_is_dropped_and_counted(
    connected, unharmed, stranger, monkeypatch
):
    endpoint, _ = connected
    monkeypatch.setattr("edgeml.transports.grpc.listener._KEPT", 0.05)
    key, size = PREFIX.unpack(stranger.request(_growing(endpoint)))
    assert key
    wait_until(lambda: endpoint.dropped == 1)
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        stranger.fetch(PREFIX.pack(0, key))
    assert not endpoint._kept
    assert size > LIMIT


def _growing(endpoint) -> bytes:
    """A request that fits in one piece, and has a reply of 40 MB."""
    huge = Message(b"x", [memoryview(bytes(40_000_000))])
    endpoint._on_request = lambda message, reply: reply(huge if message.header == b"g" else message)
    return request_of(Message(b"g"))


def test_a_large_reply_may_take_longer_to_fetch_than_it_is_kept(connected, unharmed, stranger):
    endpoint, _ = connected
    key, size = PREFIX.unpack(stranger.request(_growing(endpoint)))
    fetch = stranger.channel.unary_stream("/edgeml.Transport/Fetch")
    received = iter(fetch(PREFIX.pack(0, key), timeout=10))
    pieces = [next(received)]
    endpoint._loop.do(endpoint._forget, key)  # as after that time; most of it has not been read
    pieces += received
    assert sum(map(len, pieces)) == PREFIX.size + size
    assert endpoint.dropped == 0
    with refused(grpc.StatusCode.INVALID_ARGUMENT):  # it is fetched once
        stranger.fetch(PREFIX.pack(0, key))


def test_a_large_reply_whose_fetch_is_broken_off_is_dropped_and_counted(
    connected, unharmed, stranger
):
    endpoint, _ = connected
    key, _ = PREFIX.unpack(stranger.request(_growing(endpoint)))
    call = stranger.channel.unary_stream("/edgeml.Transport/Fetch")(PREFIX.pack(0, key), timeout=10)
    next(iter(call))
    call.cancel()
    wait_until(lambda: endpoint.dropped == 1)
    assert not endpoint._kept


@pytest.mark.parametrize("size", [1000, LIMIT + 1], ids=["small", "large"])
def test_a_request_that_is_cancelled_is_given_up_at_both_ends(parking, size):
    _, requester, taken = parking
    before = set(threading.enumerate())
    future = requester.request(Message(b"x", [memoryview(bytes(size))]))
    wait_until(lambda: taken)
    assert future.cancel()
    wait_until(lambda: taken[0][1].expired)
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert not requester.lost


# Health -----------------------------------------------------------------------------------

HEALTH = "/grpc.health.v1.Health/"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


@pytest.mark.parametrize("name", ["", "edgeml.Transport"])
def test_grpcs_own_health_client_is_told_that_the_server_serves(connected, unharmed, name):
    endpoint, _ = connected
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.url.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(request, timeout=5).status == serving
        watch = stub.Watch(request, timeout=5)
        assert next(watch).status == serving
        watch.cancel()
        listed = stub.List(health_pb2.HealthListRequest(), timeout=5).statuses
        assert {each: listed[each].status for each in listed} == {
            "": serving,
            "edgeml.Transport": serving,
        }


def test_a_service_that_is_not_there_is_not_found_and_may_be_watched_for(connected, unharmed):
    endpoint, _ = connected
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.url.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="other.Service")
        with refused(grpc.StatusCode.NOT_FOUND):
            stub.Check(request, timeout=5)
        watch = stub.Watch(request, timeout=0.3)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):  # it is left open
            next(watch)


def test_who_watches_is_told_that_the_server_stops():
    endpoint = transport.serve(ANYWHERE, lambda message, reply: reply(message))
    with Stranger(endpoint.url.port) as stranger:
        watch = stranger.channel.unary_stream(f"{HEALTH}Watch")(b"", timeout=10)
        assert next(watch) == SERVING
        endpoint.close()
        assert list(watch) == [NOT_SERVING]


def test_health_is_answered_while_a_handler_computes():
    over = threading.Event()
    with edgeml.InferenceServer(0, transport="grpc") as server:
        server.register_interface("wait", lambda _: over.wait(10))
        server.start(threaded=True)
        with (
            Stranger(server.port) as stranger,
            InferenceClient("127.0.0.1", server.port, "grpc") as client,
        ):
            future = client.call_async("wait", None)
            check = stranger.channel.unary_unary(f"{HEALTH}Check")
            for _ in range(5):
                assert check(b"", timeout=20) == SERVING
            assert not future.done()
            over.set()
            assert future.result(20)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", SERVING),
        (b"\x0a\x00", SERVING),
        (b"\x0a\x10edgeml.Transport", SERVING),
        (b"\x0a\x01x\x0a\x10edgeml.Transport", SERVING),  # the last one counts
        # Fields that a later version may add, one of each kind.
        (b"\x10\x96\x01\x19" + bytes(8) + b"\x22\x02hi\x2d" + bytes(4), SERVING),
        (b"\x0a\x05other", grpc.StatusCode.NOT_FOUND),
        (b"\x0a", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x05ot", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x02\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0b", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0f", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x19\x00", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a" + b"\xff" * 20, grpc.StatusCode.INVALID_ARGUMENT),
        (b"\xff" * 9 + b"\x7f", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_health_is_read_byte_by_byte(stranger, unharmed, data, answer):
    check = stranger.channel.unary_unary(f"{HEALTH}Check")
    watch = stranger.channel.unary_stream(f"{HEALTH}Watch")
    if isinstance(answer, bytes):
        assert check(data, timeout=5) == answer
        call = watch(data, timeout=5)
        assert next(call) == answer
        call.cancel()
        return
    with refused(answer):
        check(data, timeout=5)
    if answer is not grpc.StatusCode.NOT_FOUND:
        with refused(answer):
            next(watch(data, timeout=5))


def test_noise_does_not_hurt_the_health_service(stranger, unharmed):
    check = stranger.channel.unary_unary(f"{HEALTH}Check")
    rng = random.Random(0)
    for _ in range(300):
        with contextlib.suppress(grpc.RpcError):
            check(rng.randbytes(rng.randrange(40)), timeout=5)
    assert check(b"", timeout=5) == SERVING


# Ends -------------------------------------------------------------------------------------


@contextlib.contextmanager
def connecting_anew(requester):
    """Wait until gRPC has lost a connection, as it does in this block, and made it anew."""
    states, take = [], lambda state: states.append(state)
    requester._channel.subscribe(take)
    wait_until(lambda: states == [READY])
    yield
    wait_until(lambda: len(states) > 1)
    requester._channel.unsubscribe(take)
    grpc.channel_ready_future(requester._channel).result(10)


@pytest.mark.parametrize("message", [SMALL, LARGE], ids=["small", "large"])
def test_another_server_on_the_port_is_not_taken_for_the_first(message):
    first = transport.serve(ANYWHERE, lambda message, reply: reply(message))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(transport.connect(first.url, 20)) for _ in range(2)]
        stranger = stack.enter_context(Stranger(first.url.port))
        number, _ = PREFIX.unpack(stranger.connect())
        asked = []
        with connecting_anew(connections[0]), connecting_anew(connections[1]):
            first.close()
            stack.enter_context(
                transport.serve(first.url, lambda message, reply: asked.append(reply(message)))
            )
        with pytest.raises(NotCarriedOut):
            connections[0].call(message, 20)
        with pytest.raises(NotCarriedOut):
            connections[1].request(message).result(20)
        assert all(requester.lost for requester in connections)

        def answered_by_another() -> bool:
            try:
                stranger.request(request_of(SMALL, number), timeout=5)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.ABORTED and "restarted" in error.details()
            return False

        wait_until(answered_by_another)  # once gRPC has connected anew
        assert not asked
        # While what a reply is fetched for has been carried out, by the first.
        with refused(grpc.StatusCode.UNAVAILABLE):
            stranger.fetch(PREFIX.pack(number, 1))
        with transport.connect(first.url, 20) as requester:
            assert requester.call(SMALL, 20).header == b"x"


def test_a_call_that_another_server_on_the_port_refused_is_made_again(monkeypatch):
    beat = threading.Event()
    monkeypatch.setattr(SessionKeeper, "_watch", lambda *_: beat.wait(30))  # it notices nothing
    with contextlib.ExitStack() as stack:
        stack.callback(beat.set)
        first = stack.enter_context(started(InferenceServer(0, transport="grpc")))
        url = first.url
        first.register_interface("which", lambda _: 1)
        clients = [stack.enter_context(InferenceClient(url=url)) for _ in range(2)]
        assert [client.call("which", None) for client in clients] == [1, 1]
        sessions = [session_of(client) for client in clients]
        with connecting_anew(sessions[0].requester), connecting_anew(sessions[1].requester):
            first.stop()
            second = InferenceServer(Url.parse(url).port, transport="grpc")
            second.register_interface("which", lambda _: 2)
            stack.enter_context(started(second))
        assert not any(session.lost for session in sessions)
        assert clients[0].call("which", None) == 2
        assert clients[1].call_async("which", None).result(10) == 2


def test_a_server_that_closes_tells_strangers_so(parking):
    endpoint, _, taken = parking
    with Stranger(endpoint.url.port) as stranger:
        call = stranger.channel.unary_unary("/edgeml.Transport/Request").future(
            request_of(Message(b"park")), timeout=10
        )
        wait_until(lambda: taken)
        endpoint.close()
        with pytest.raises(grpc.RpcError):
            call.result(10)
        assert call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("end", ["client", "server"])
def test_either_end_may_be_closed_while_large_streams_go_both_ways(end):
    large = Message(b"large", [memoryview(bytes(50_000_000))])

    def on_request(message, reply) -> None:
        arrived.set()
        reply(large)

    for _ in range(3):
        arrived = threading.Event()
        with (
            transport.serve(ANYWHERE, on_request) as endpoint,
            transport.connect(endpoint.url, 20) as requester,
            ThreadPoolExecutor(4) as pool,
        ):
            asked = [requester.request(large if i % 2 else SMALL) for i in range(4)]
            asked += [pool.submit(requester.call, (SMALL, large)[i % 2], 30.0) for i in range(4)]
            assert arrived.wait(10)
            with took(at_most=3.0):
                (requester if end == "client" else endpoint).close()
            for future in asked:
                with contextlib.suppress(Closed, Unreachable):
                    assert future.result(20).header == b"large"


def test_two_servers_in_one_process_do_not_mind_each_other():
    def answering(text: bytes):
        return transport.serve(ANYWHERE, lambda message, reply: reply(Message(text)))

    with answering(b"1") as one, transport.connect(one.url, 20) as to_one:
        with answering(b"2") as two, transport.connect(two.url, 20) as to_two:
            assert one.url.port != two.url.port
            for _ in range(20):
                assert to_one.call(SMALL, 20).header == b"1"
                assert to_two.call(LARGE, 20).header == b"2"
        assert to_one.call(LARGE, 20).header == b"1"
        with answering(b"3") as three, transport.connect(three.url, 20) as to_three:
            assert to_three.call(SMALL, 20).header == b"3"


def test_with_4096_requests_parked_others_are_answered_and_no_more_are_taken(parking):
    endpoint, requester, taken = parking
    asked = [requester.request(Message(b"%d" % index)) for index in range(4096)]
    with pytest.raises(Overloaded, match="4096"):
        requester.request(Message(b"one more"))
    wait_until(lambda: len(taken) == 4096, 30.0)
    endpoint._on_request = lambda message, reply: reply(message)
    with transport.connect(endpoint.url, 20) as other:
        for each in (requester, other):
            with took(at_most=2.0):
                for _ in range(20):
                    assert each.call(Message(b"now"), 20).header == b"now"
    endpoint.reply_many([reply for _, reply in taken], Message(b"all"))
    assert {future.result(20.0).header for future in asked} == {b"all"}
    assert endpoint.dropped == 0
    assert requester.request(Message(b"again")).result(20).header == b"again"


# Addresses --------------------------------------------------------------------------------


def test_a_port_that_is_taken_by_whomever_is_an_oserror(connected):
    with pytest.raises(OSError, match="cannot serve"):
        transport.serve(connected[0].url, lambda message, reply: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = ANYWHERE.with_port(listener.getsockname()[1])
        with pytest.raises(OSError, match="cannot serve"):
            transport.serve(taken, lambda message, reply: None)


@pytest.fixture
def proxy(monkeypatch):
    """A proxy to which nobody listens; the name of the variable that names it."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://secret@127.0.0.1:1")
    return "http_proxy"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_no_proxy_is_asked_for_this_machine(proxy, host):
    with transport.serve(Url("grpc", "0.0.0.0", 0), lambda message, reply: reply(message)) as end:
        transport.connect(end.url.with_host(host), 20).close()


def test_a_proxy_that_swallows_a_connection_is_named(proxy, monkeypatch):
    url = Url("grpc", "192.0.2.1", 5557)
    with pytest.raises(Unreachable, match=rf"\${proxy}.*no_proxy") as caught:
        transport.connect(url, 20)
    assert "secret" not in str(caught.value)
    for excepted, asked in [("10.0.0.1, .2.1", ""), ("192.0.2.1", ""), (" ,", proxy), ("x", proxy)]:
        monkeypatch.setenv("no_proxy", excepted)
        assert find_proxy(url.host, Deadline(5.0)) == asked


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0", "", "::1", "::"])
def test_a_host_may_be_a_name_or_an_address(host):
    if ":" in host:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    with transport.serve(Url("grpc", host, 0), lambda message, reply: reply(message)) as endpoint:
        near = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        for url in (endpoint.url.with_host(near), Url.parse(str(endpoint.url.with_host(near)))):
            with transport.connect(url, 20) as requester:
                assert requester.call(Message(b"x"), 20).header == b"x"
        if ":" in host:
            with Stranger(endpoint.url.port, f"[{near}]") as stranger:
                assert stranger.request(request_of(SMALL)) == request_of(SMALL)


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "." * 5, "a" * 300])
def test_a_host_that_is_not_this_machine_can_not_be_served_at(host):
    with pytest.raises(OSError, match="cannot serve"):
        transport.serve(Url("grpc", host, 0), lambda message, reply: None)


@pytest.mark.parametrize("host", ["no such host", "." * 5, "a" * 300])
def test_a_host_that_does_not_exist_is_unreachable(host):
    with pytest.raises(Unreachable):
        transport.connect(Url("grpc", host, 5555), 1.0)


# Signals and forks ------------------------------------------------------------------------

INTERRUPTED = """
import sys, time
import numpy as np
from edgeml.core import Message, Url, load_transport

url = Url.parse(sys.argv[1])
large = Message(b"park", [memoryview(bytes(int(sys.argv[2])))])
requester = load_transport("grpc").connect(url, 20)
for _ in range(3):
    try:
        print("asking")
        requester.call(large, 30.0)
    except KeyboardInterrupt:
        print("interrupted")
    assert requester.call(Message(b"echo"), 20).header == b"echo"
began = time.monotonic()
requester.close()
assert time.monotonic() - began < 10.0  # not the half minute
print("closed")
"""


@pytest.mark.parametrize("size", [0, 20_000_000])
def test_ctrl_c_ends_a_call_at_once_and_the_connection_goes_on(size):
    taken = []

    def on_request(message, reply) -> None:
        if message.header == b"echo":
            reply(message)
        else:
            taken.append(reply)

    with transport.serve(ANYWHERE, on_request) as endpoint:
        with process(INTERRUPTED, endpoint.url, size) as program:
            for count in (1, 2, 3):
                assert program.line() == "asking"
                wait_until(lambda count=count: len(taken) == count)
                with took(at_most=2.0):
                    program.signal(signal.SIGINT)
                    assert program.line() == "interrupted"
            assert program.line() == "closed"
            assert program.end() == (0, "")
        wait_until(lambda: all(reply.expired for reply in taken))


def _run(program: str, timeout: float = 60.0) -> None:
    """Run a program in a fresh interpreter, which is to end well and without a complaint."""
    _, stderr = run_fresh(program, timeout)
    assert not stderr


def test_a_forked_child_has_no_part_in_its_parents_connections(connected):
    endpoint, _ = connected
    _run(f"""
        import os, sys, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        from edgeml.core import Closed, Message, Url, load_transport
        transport = load_transport("grpc")
        requester = transport.connect(Url.parse("{endpoint.url}"), 20)
        large = Message(b"x", [memoryview(bytes(5 << 20))])
        requester.call(Message(b"x"), 20)
        requester.request(large).result(20)
        child = os.fork()
        if not child:
            began = time.monotonic()
            for send in (requester.request, lambda m: requester.call(m, 20)):
                for message in (Message(b"x"), large):
                    try:
                        send(message)
                    except Closed as error:
                        assert "fork" in str(error)
                    else:
                        raise AssertionError
            requester.close()
            assert time.monotonic() - began < 15  # not the deadlines
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert requester.call(Message(b"parent"), 20).header == b"parent"
        assert requester.request(large).result(20).header == b"x"
        requester.close()
    """)


def test_a_child_forked_beside_grpc_is_told_to_be_spawned(connected):
    endpoint, _ = connected
    _run(f"""
        import os, time, warnings, edgeml
        from edgeml.core import Message, PermissionDenied, Url, load_transport
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        server = edgeml.InferenceServer(0, transport="grpc")
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        client = edgeml.InferenceClient("127.0.0.1", server.port, "grpc")
        requester = load_transport("grpc").connect(Url.parse("{endpoint.url}"), 20)
        client.call("echo", 1)

        def told(function):
            began = time.monotonic()
            try:
                function()
            except edgeml.EdgemlError as error:
                assert "spawn" in str(error) and "forkserver" in str(error), error
                assert time.monotonic() - began < 9.0  # not the deadline
                return isinstance(error, PermissionDenied)
            raise AssertionError

        child = os.fork()
        if not child:
            told(lambda: requester.call(Message(b"x"), 20))
            assert told(lambda: client.call("echo", 1))
            assert told(lambda: client.call_async("echo", 1).result(20))
            assert told(lambda: edgeml.InferenceClient("127.0.0.1", server.port, "grpc"))
            config = edgeml.TrainerConfig(server.port, server.port)
            assert told(lambda: edgeml.TrainerClient(
                "x", "127.0.0.1", config, transport="grpc", wait_for_server=True
            ))
            assert told(lambda: edgeml.InferenceServer(0, transport="grpc").start(threaded=True))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert client.call("echo", 1) == 1
        client.stop(), server.stop(), requester.close()
    """)


def test_a_forked_child_that_uses_no_grpc_comes_to_no_harm():
    _run("""
        import os, time, warnings, edgeml
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        server = edgeml.InferenceServer(0, transport="grpc")
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        client = edgeml.InferenceClient("127.0.0.1", server.port, "grpc")
        for _ in range(20):
            client.call("echo", 1)
            child = os.fork()
            if not child:
                time.sleep(0.05)  # of a life of its own
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        client.stop(), server.stop()
    """)


def test_a_process_forked_before_grpc_is_used_may_use_it(connected):
    endpoint, _ = connected
    _run(f"""
        import os
        from edgeml.core import Message, Url, load_transport
        transport = load_transport("grpc")
        child = os.fork()
        with transport.connect(Url.parse("{endpoint.url}"), 20) as requester:
            assert requester.call(Message(b"x"), 20).header == b"x"
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "client.stop(); server.stop()"])
def test_a_program_that_ends_without_closing_anything_ends(how):
    _run(
        f"""
        import sys, warnings, edgeml, numpy as np
        warnings.simplefilter("ignore", ResourceWarning)  # what was not closed is the point
        server = edgeml.InferenceServer(0, transport="grpc")
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        client = edgeml.InferenceClient("127.0.0.1", server.port, "grpc")
        client.call("echo", np.zeros(5 << 20, np.uint8))
        client.call_async("echo", np.zeros(5 << 20, np.uint8))
        {how}
        """,
        timeout=60,
    )


# Order ------------------------------------------------------------------------------------


def test_a_request_waits_for_the_one_that_it_comes_after_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(order, "_PATIENCE", 0.2)

    async def run() -> list[int]:
        turns, passed_on = order.Turns(), []

        async def pass_on(number: int, after: int) -> None:
            await turns.take([("edgeml-order", f"lane {number} {after}")], contextlib.nullcontext)
            passed_on.append(number)

        later = [asyncio.create_task(pass_on(*each)) for each in ((4, 3), (3, 1))]
        await asyncio.sleep(0)
        await pass_on(1, 0)
        await asyncio.wait_for(asyncio.gather(*later), 5)
        await asyncio.wait_for(pass_on(9, 8), 5)  # 8 was cancelled, and never came
        return passed_on

    assert asyncio.run(run()) == [1, 3, 4, 9]


def test_a_request_does_not_wait_for_one_that_was_given_up_before_the_oldest_under_way():
    async def run() -> list[int]:
        turns, passed_on = order.Turns(), []

        async def pass_on(number: int, after: int, oldest: int) -> None:
            said = [("edgeml-order", f"lane {number} {after}"), ("edgeml-oldest", f"{oldest}")]
            await turns.take(said, contextlib.nullcontext)
            passed_on.append(number)

        # 1 to 3 were given up, and never come; 5 came by another way than 4, which is to be first.
        early = [asyncio.create_task(pass_on(*each)) for each in ((6, 5, 1), (5, 4, 4))]
        await asyncio.sleep(0)
        assert passed_on == []
        await asyncio.wait_for(pass_on(4, 3, 4), 1)
        await asyncio.wait_for(asyncio.gather(*early), 1)
        return passed_on

    assert asyncio.run(run()) == [4, 5, 6]


def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_is_forgotten():
    async def run() -> None:
        turns = order.Turns()

        def take(number: int, after: int):
            value = f"lane {number} {after}"
            return turns.take([("edgeml-order", value)], contextlib.nullcontext)

        waiting = [asyncio.create_task(take(number, 100)) for number in range(1, 4)]
        await asyncio.sleep(0)
        assert len(turns._lanes["lane"].waiting) == 3
        waiting[1].cancel()
        await asyncio.wait([waiting[1]], timeout=5)
        assert len(turns._lanes["lane"].waiting) == 2
        await take(100, 0)
        await asyncio.wait_for(asyncio.gather(waiting[0], waiting[2]), 5)
        assert not turns._lanes["lane"].waiting

    asyncio.run(run())


@pytest.mark.parametrize(("size", "most"), [(1 << 20, 4), (0, 256)])
@pytest.mark.parametrize("method", ["Request", "Stream"])
def test_what_waits_for_its_turn_is_bounded_for_each_connection(size, most, method):
    """400 requests of 3.9 MB, without a session, that came after nothing took 1.9 GB."""
    limits = Limits(bytes_per_client=1 << 22, bytes=1 << 28)
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(message), limits=limits) as served,
        Stranger(served.url.port) as stranger,
        Stranger(served.url.port) as other,
    ):
        before = under_way(served)
        data = request_of(Message(b"x", [memoryview(bytes(size))]))
        path = f"/edgeml.Transport/{method}"

        def ask(channel, lane, number, after):
            metadata = (("edgeml-order", f"{lane} {number} {after}"),)
            if method == "Request":
                return channel.unary_unary(path).future(data, timeout=20, metadata=metadata)
            return channel.stream_stream(path)(iter([data]), timeout=20, metadata=metadata)

        def answer(call):
            return call.result(20) if method == "Request" else b"".join(call)

        def ask_in_turn(channel):
            """A request, and then the one that it comes after: neither is held up."""
            with took(at_most=4.0):
                late = ask(channel, "mine", 2, 1)
                assert answer(ask(channel, "mine", 1, 0)) == data
                assert answer(late) == data

        calls = [ask(stranger.channel, n, 2, 1 << 30) for n in range(most + 8)]
        wait_until(lambda: served.counts["Overloaded"] >= 8)
        assert served.counts["Overloaded"] <= 9  # what is around the bytes counts too
        assert stranger.request(data) == data
        ask_in_turn(other.channel)
        for call in calls:
            call.cancel()
        wait_until(lambda: under_way(served) < before + most)
        ask_in_turn(stranger.channel)


LONG = f"{'x' * 100} 1 0"


@pytest.mark.parametrize("value", [LONG, "", "lane", "lane 1", "lane 1 x", "lane 1 2 3"])
def test_an_order_that_makes_no_sense_is_malformed(value):
    with pytest.raises(Malformed, match="edgeml-order"):
        asyncio.run(order.Turns().take([("edgeml-order", value)], contextlib.nullcontext))


def test_a_server_forgets_the_oldest_lanes(monkeypatch):
    monkeypatch.setattr(order, "_MOST_LANES", 10)
    turns = order.Turns()
    for index in range(100):
        asyncio.run(turns.take([("edgeml-order", f"{index} 1 0")], contextlib.nullcontext))
    assert len(turns._lanes) == 10


def test_the_requests_of_many_clients_are_taken_together(monkeypatch):
    """And not each in rounds of its own, for which all others wait: seconds, beside other work."""
    rounds = 0
    taken = []

    def counted(loop, run=loops._Loop._run_once):
        nonlocal rounds
        rounds += 1
        run(loop)

    def take(message, reply):
        taken.append(rounds)
        reply(message)

    def ask_at_once() -> int:
        """In how many rounds the requests are taken that all sent while the loop stood still."""
        free = threading.Event()
        endpoint._loop.do(free.wait, 10.0)
        sent = [each.request(Message(b"x")) for each in clients]
        free.set()
        for future in sent:
            future.result(10.0)
        counts = len(set(taken))
        taken.clear()
        return counts

    monkeypatch.setattr(loops._Loop, "_run_once", counted)
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(transport.serve(ANYWHERE, take))
        clients = [stack.enter_context(transport.connect(endpoint.url, 20)) for _ in range(28)]
        taken.clear()
        # Some may come only after the loop goes on, which takes rounds of their own.
        wait_until(lambda: ask_at_once() <= len(clients) / 2)


def test_a_request_whose_connection_has_ended_before_it_is_looked_at_ends_without_a_word(caplog):
    class Gone:
        """What gRPC gives then: it doesn't know any more where the request is from."""

        def peer(self) -> str:
            return ""

    with transport.serve(ANYWHERE, lambda message, reply: reply(message)) as endpoint:
        for answer in (endpoint._connect, endpoint._request, endpoint._stream, endpoint._fetch):
            with pytest.raises(asyncio.CancelledError):  # of which grpc.aio says nothing
                asyncio.run(answer(None, Gone()))
    assert not caplog.records
