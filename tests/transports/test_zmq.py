"""What is ZeroMQ's own: hostile bytes, strange peers, signals, forks and addresses."""

import contextlib
import itertools
import os
import random
import secrets
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zmq

import edgeml
from edgeml import Closed, DeadlineExceeded, InferenceClient, NotEncodable, Overloaded, Unreachable
from edgeml.core import Message, Url, load_transport, wire
from edgeml.core.security import Credentials, CurveKeys
from edgeml.testing.ends import until
from edgeml.testing.stopwatch import Stopwatch
from pairs import process, run_fresh, threads, took

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
ANYWHERE = Url("zmq", "127.0.0.1", 0)

transport = load_transport("zmq")


class Server:
    """An inference server in another process."""

    PROGRAM = """
        import sys, time, edgeml
        from edgeml.core.security import ClientKey, Credentials, CurveKeys, Keyring
        keys = None
        if sys.argv[1:]:
            public, secret, client = sys.argv[1:]
            ring = Keyring([ClientKey("client", curve=client)])
            keys = Credentials(curve=CurveKeys(public, secret), clients=ring)
        with edgeml.InferenceServer(0, transport="zmq", credentials=keys) as server:
            server.register_interface("echo", lambda payload: payload)
            server.start(threaded=True)
            print(server.port, flush=True)
            sys.stdin.read()
    """

    def __init__(self, secured: bool = False):
        arguments = []
        self.credentials = None
        if secured:
            ours, theirs = ([k.decode() for k in zmq.curve_keypair()] for _ in range(2))
            self.credentials = Credentials(
                name="client", curve=CurveKeys(*theirs), curve_server=ours[0]
            )
            arguments = [*ours, theirs[0]]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(self.process.stdout.readline())

    def client(self, **kwargs) -> InferenceClient:
        return InferenceClient(
            "127.0.0.1", self.port, "zmq", credentials=self.credentials, **kwargs
        )

    def resident(self) -> int:
        """Bytes of memory in use."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: int) -> None:
        """Send it a signal, and see it stop if that is what it says."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.end()


@pytest.fixture
def unharmed(server):
    """Holds the server to answering within a second, and to little memory, whatever is done."""
    with server.client() as client:
        for _ in range(50):
            client.call("echo", np.zeros(300_000, np.uint8))
        before = server.resident() if sys.platform == "linux" else 0
        yield
        with took(at_most=1.0, others=[server.process.pid]):
            assert client.call("echo", "known") == "known"
            with server.client() as stranger:
                assert stranger.call("echo", "new") == "new"
    if sys.platform == "linux":
        assert server.resident() - before < 64 << 20


@pytest.fixture
def rng():
    return random.Random(0)


# Hostile bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", GREETING, GREETING + READY], ids=["raw", "met", "ready"])
def test_random_bytes_over_tcp_do_no_harm(server, unharmed, rng, start):
    for _ in range(40):
        with (
            socket.create_connection(("127.0.0.1", server.port), 20) as peer,
            contextlib.suppress(OSError),  # cut off, and rightly so
        ):
            peer.sendall(start)
            for _ in range(90):
                peer.sendall(rng.randbytes(rng.choice((1, 9, 64, 300, 5000))))


def garbage(rng: random.Random, session: bytes) -> list[bytes]:
    """One message: noise, or a request that was valid before a few of its bytes were changed."""
    if rng.random() < 0.2:
        return [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 6))]
    hello = wire.pack(wire.Hello(wire.PROTOCOL, "inference", "me", "label", "msgpack", {}))
    name, body = rng.choice(
        [
            ("", hello),
            ("echo", b"\x93\x01\x02\x03"),
            ("echo", rng.randbytes(30)),
            ("", wire.pack(wire.Credit(rng.randrange(100), 0, 0))),
            ("", wire.pack(wire.Credit(-1, -1, 1 << 60))),
        ]
    )
    timeout = rng.choice((1.0, 0.0, -1.0, 1e300, float("nan"), float("inf")))
    request = wire.Request(rng.choice((0, 1, 2, 3, -1)), session, name, timeout, body)
    header = bytearray(wire.pack(request))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 8))):
        header[rng.randrange(len(header))] = rng.randrange(256)
    if rng.random() < 0.2:
        del header[rng.randrange(len(header)) :]
    number = struct.pack("<Q", rng.getrandbits(64))
    buffers = [rng.randbytes(rng.randrange(100)) for _ in range(rng.choice((0, 0, 1, 5)))]
    return [number + bytes(header), *buffers]


GREETINGS = (
    b"",
    GREETING,
    GREETING.replace(b"NULL\0", b"CURVE"),
    GREETING + READY,
    b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\0\0",  # ZMTP 2.0
    b"GET / HTTP/1.1\r\nHost: robot\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
)


def babble(rng: random.Random) -> bytes:
    """What somebody says who is no client: a greeting, whole or not, and messages, or noise."""
    said = bytearray(rng.choice(GREETINGS))
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        if said:
            said[rng.randrange(len(said))] = rng.randrange(256)
    if rng.random() < 0.2:
        del said[rng.randrange(len(said) + 1) :]
    for part in garbage(rng, b""):
        said += b"\x02" + struct.pack(">Q", len(part)) + part if rng.random() < 0.8 else part
    return bytes(said)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "curve"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_good_are_answered_within_a_second_beside_thousands_who_babble(rng, count, secured):
    """And the server's memory stays as it was."""
    server = Server(secured)
    slowest = 0.0
    over = threading.Event()

    def ask() -> None:
        nonlocal slowest
        with server.client() as client:
            while not over.is_set():
                watch = Stopwatch(server.process.pid)
                assert client.call("echo", "good", 20) == "good"
                slowest = max(slowest, watch.seconds)
                over.wait(0.01)

    held: deque[socket.socket] = deque()  # who say no more, and stay
    try:
        with ThreadPoolExecutor(1) as pool:
            good = pool.submit(ask)
            try:
                for number in range(count):
                    peer = socket.create_connection(("127.0.0.1", server.port), 20)
                    with contextlib.suppress(OSError):
                        peer.sendall(babble(rng))
                    held.append(peer)
                    if len(held) > 200 or rng.random() < 0.5:
                        held.popleft().close()
                    if number == count // 2:
                        before = server.resident() if sys.platform == "linux" else 0
            finally:
                over.set()
            good.result(30)
        assert slowest < 1.0
        if sys.platform == "linux":
            assert server.resident() - before < 16 << 20
        with server.client() as stranger:
            assert stranger.call("echo", "new") == "new"
    finally:
        for peer in held:
            peer.close()
        server.end()


def test_random_messages_do_no_harm(server, unharmed, rng):
    hello = wire.pack(wire.Hello(wire.PROTOCOL, "inference", "me", "", "msgpack", {}))
    greeting = wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, hello))
    with zmq.Context() as context:
        for _ in range(20):
            with context.socket(zmq.DEALER) as peer:
                peer.linger = 1000
                peer.rcvtimeo = 5000
                peer.connect(f"tcp://127.0.0.1:{server.port}")
                peer.send(bytes(8) + greeting)
                reply = wire.unpack(wire.Answer, peer.recv()[8:])
                session = wire.unpack(wire.Welcome, reply.body).session
                for _ in range(500):
                    peer.send_multipart(garbage(rng, rng.choice((session, session, b""))))


def test_other_kinds_of_sockets_do_no_harm(server, unharmed):
    with zmq.Context() as context:
        for kind in (zmq.REQ, zmq.SUB, zmq.PUSH, zmq.PAIR, zmq.ROUTER, zmq.REP, zmq.XPUB):
            with context.socket(kind) as peer:
                peer.linger = 0
                peer.connect(f"tcp://127.0.0.1:{server.port}")
                with contextlib.suppress(zmq.ZMQError):
                    peer.send_multipart([b"x" * 8, b"", b"y" * 100], zmq.NOBLOCK)


def test_peers_that_claim_one_identity_do_no_harm(server, unharmed):
    with zmq.Context() as context:
        peers = []
        for _ in range(5):
            peers.append(context.socket(zmq.DEALER))
            peers[-1].routing_id = b"the same"
            peers[-1].linger = 0
            peers[-1].connect(f"tcp://127.0.0.1:{server.port}")
            peers[-1].send(b"x" * 20)
        for peer in peers:
            peer.close()


def test_peers_that_claim_what_others_are_to_be_called_do_no_harm():
    """libzmq ends the process where it is about to give a peer a name that another has taken."""
    server = Server()
    try:
        with zmq.Context() as context, contextlib.ExitStack() as peers:
            for number in range(100):
                peer = peers.enter_context(context.socket(zmq.DEALER))
                peer.linger = 0
                # As libzmq counts in a fresh process.
                peer.routing_id = b"\0" + struct.pack(">I", 0x6B8B4567 + number)
                peer.connect(f"tcp://127.0.0.1:{server.port}")
                peer.send(b"x" * 20)
            for number in range(30):
                with server.client() as client:
                    assert client.call("echo", number) == number
    finally:
        server.end()


@pytest.mark.parametrize("size", [1000, 1 << 30, (1 << 30) + 1, 1 << 40, (1 << 64) - 1])
def test_a_peer_that_announces_a_huge_frame_is_cut_off(server, unharmed, size):
    with socket.create_connection(("127.0.0.1", server.port), 20) as peer:
        peer.sendall(GREETING + READY)
        got = b""
        while b"ROUTER" not in got:  # from here on we are taken for one of its own
            got += peer.recv(1000)
        peer.sendall(b"\x02" + struct.pack(">Q", size) + bytes(100))
        if size <= 1 << 30:
            peer.settimeout(0.2)
            with pytest.raises(TimeoutError):
                peer.recv(1000)
        else:
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1000) == b""


def test_a_message_of_too_many_parts_is_ignored(server, unharmed):
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 1000
        peer.connect(f"tcp://127.0.0.1:{server.port}")
        peer.send_multipart([b"x" * 20] + [b""] * 20_000)
        peer.rcvtimeo = 100
        with pytest.raises(zmq.Again):
            peer.recv()


def test_an_http_client_gets_no_answer(server, unharmed):
    with socket.create_connection(("127.0.0.1", server.port), 20) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: robot\r\nConnection: close\r\n\r\n")
        peer.settimeout(0.3)
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while data := peer.recv(1000):
                got += data
        assert b"HTTP" not in got
        assert len(got) <= 64  # ZeroMQ's own greeting


def test_peers_that_connect_and_say_nothing_do_no_harm(server, unharmed):
    peers = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(200)]
    with server.client() as client:
        assert client.call("echo", 1) == 1
    for peer in peers:
        peer.close()


def test_many_clients_come_and_go(server, unharmed):
    def come_and_go(number: int) -> None:
        with server.client() as client:
            assert client.call("echo", number) == number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(60)))


# Strange servers --------------------------------------------------------------------------


def silent(peer: socket.socket) -> None:
    while peer.recv(1000):
        pass


def http(peer: socket.socket) -> None:
    peer.recv(1000)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nwhat was that?")


def ssh(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    silent(peer)


def noise(peer: socket.socket) -> None:
    while True:
        peer.sendall(secrets.token_bytes(1000))


def half_a_greeting(peer: socket.socket) -> None:
    peer.sendall(GREETING[:12])
    silent(peer)


def greeting_only(peer: socket.socket) -> None:
    peer.sendall(GREETING)
    silent(peer)


def hang_up(peer: socket.socket) -> None:
    pass


STRANGE = (silent, http, ssh, noise, half_a_greeting, greeting_only, hang_up)


@pytest.fixture
def strange():
    """Serves TCP at a port in its own way."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads, peers = [], []

    def serve(behave) -> int:
        def talk(peer: socket.socket) -> None:
            with peer, contextlib.suppress(OSError):
                behave(peer)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peers.append(listener.accept()[0])
                    start(talk, peers[-1])

        def start(*call) -> None:
            threads.append(threading.Thread(target=call[0], args=call[1:], daemon=True))
            threads[-1].start()

        start(accept)
        return listener.getsockname()[1]

    yield serve
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(20)


@pytest.mark.parametrize("behave", STRANGE, ids=lambda f: f.__name__)
def test_a_client_of_something_else_is_told_so_in_time(strange, behave):
    port = strange(behave)
    with took(at_most=2.0), pytest.raises(Unreachable):
        InferenceClient("127.0.0.1", port, "zmq", timeout=0.5)


@pytest.mark.parametrize("behave", STRANGE, ids=lambda f: f.__name__)
def test_a_connection_to_something_else_can_be_closed(strange, behave):
    with transport.connect(Url("zmq", "127.0.0.1", strange(behave)), 1.0) as requester:
        with contextlib.suppress(Unreachable):
            requester.request(Message(b"x", [memoryview(bytes(300_000))]))
        with pytest.raises((Unreachable, DeadlineExceeded)):
            requester.call(Message(b"x", [memoryview(bytes(300_000))]), 0.2)
        with took(at_most=2.0):
            requester.close()


def test_a_server_that_sends_replies_nobody_asked_for_does_no_harm(rng):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with transport.connect(Url("zmq", "127.0.0.1", port), 20) as requester:
            future = requester.request(Message(b"shared"))
            waiting = threading.Thread(target=lambda: got.append(requester.call(Message(b"x"), 20)))
            got = []
            waiting.start()
            for _ in range(2):
                identity, head = router.recv_multipart()
                for _ in range(500):
                    parts = [rng.randbytes(rng.randrange(20)) for _ in range(rng.randrange(1, 4))]
                    router.send_multipart([identity, *parts])
                router.send_multipart([identity] + [b"x" * 20] * 20_000)
                router.send_multipart([identity, head[:8] + b"the reply"])
            waiting.join(20)
            assert got[0].header == b"the reply"
            assert future.result(20).header == b"the reply"


def test_a_frozen_server_misses_the_deadline_and_goes_on_when_it_thaws():
    server = Server()
    try:
        with server.client() as client:
            client.call("echo", "warm")
            server.signal(signal.SIGSTOP)
            for timeout, size in ((0.3, 10), (0.3, 5_000_000), (0.5, 10)):
                with took(timeout + 1.0, at_least=timeout), pytest.raises(DeadlineExceeded):
                    client.call("echo", np.zeros(size, np.uint8), timeout)
            server.signal(signal.SIGCONT)
            assert client.call("echo", "thawed") == "thawed"
            with server.client() as other:
                assert other.call("echo", "new") == "new"
    finally:
        server.end()


# TCP connections that are lost ------------------------------------------------------------


class Relay:
    """Passes TCP on to a port, at a rate, until a connection is cut."""

    def __init__(self, port: int, rate: float = 1e9):
        self._target = port
        self._rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.pairs = []
        self._threads = []
        self._start(self._accept)

    def _start(self, *call) -> None:
        self._threads.append(threading.Thread(target=call[0], args=call[1:], daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self.pairs.append((near, far))
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                time.sleep(len(data) / self._rate)
        self._hang_up((source, sink))

    def _hang_up(self, pair) -> None:
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, index: int) -> None:
        self._hang_up(self.pairs[index])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self.pairs:
            self._hang_up(pair)
        for thread in self._threads:
            thread.join(20)
        for end in itertools.chain(*self.pairs):
            end.close()


def test_a_reply_that_comes_just_as_a_call_looks_whether_it_has_a_way_is_taken(parking):
    _, requester, taken = parking

    class Late:
        """Says that nothing has come in time when just then something has."""

        def __init__(self, poll):
            self.real = poll
            self.late = False

        def poll(self, timeout):
            if self.late:
                return self.real.poll(timeout)
            assert until(lambda: taken)
            taken[0][1](Message(b"reply"))
            assert self.real.poll(20_000)
            self.late = True
            return []

    requester._new_line()
    line = requester._local.line
    line._poll = Late(line._poll)
    assert requester.call(Message(b"request"), 20).header == b"reply"
    assert line._poll.late


def test_a_callers_own_connection_that_is_cut_is_made_anew(connected):
    endpoint, _ = connected
    with Relay(endpoint.url.port) as relay:
        url = endpoint.url.with_port(relay.port)
        with transport.connect(url, 20) as requester:
            requester.request(Message(b"shared")).result(20)
            before = len(relay.pairs)
            requester.call(Message(b"own"), 20)
            assert len(relay.pairs) == before + 1
            relay.cut(-1)
            assert until(lambda: len(relay.pairs) == before + 2)
            assert requester.call(Message(b"anew"), 20).header == b"anew"
            assert requester.request(Message(b"shared")).result(20).header == b"shared"


def test_a_shared_connection_that_is_cut_is_lost_to_all(connected):
    endpoint, _ = connected
    with (
        Relay(endpoint.url.port) as relay,
        transport.connect(endpoint.url.with_port(relay.port), 20) as requester,
    ):
        requester.request(Message(b"shared")).result(20)
        assert until(lambda: len(relay.pairs) == 2)  # the first only asked who is there
        requester.call(Message(b"own"), 20)
        relay.cut(1)

        def lost() -> bool:
            try:
                requester.call(Message(b""), 20)
            except Unreachable:
                return True
            return False

        assert until(lost)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_frame_that_takes_long_is_not_cut_off(connected):
    endpoint, _ = connected
    sent = Message(b"", [memoryview(bytes(30_000_000))])
    with (
        Relay(endpoint.url.port, rate=1e6) as relay,
        transport.connect(endpoint.url.with_port(relay.port), 20) as requester,
    ):
        future = requester.request(sent)
        assert requester.call(sent, 100.0).buffers[0].nbytes == 30_000_000
        assert future.result(100.0).buffers[0].nbytes == 30_000_000


# Limits -----------------------------------------------------------------------------------


def test_what_zmq_does_not_carry_is_refused_with_a_reason(connected):
    _, requester = connected
    too_many = Message(b"", [memoryview(b"x")] * ((1 << 14) + 1))
    too_large = Message(b"", [memoryview(np.empty((1 << 30) + 1, np.uint8))])
    for message, reason in ((too_many, "16385 arrays"), (too_large, "1073741825 bytes")):
        for send in (requester.request, lambda message: requester.call(message, 1.0)):
            with pytest.raises(NotEncodable, match=reason):
                send(message)
    as_many_as_go = Message(b"", [memoryview(b"x")] * (1 << 14))
    assert len(requester.call(as_many_as_go, 20).buffers) == 1 << 14


def test_a_publication_may_take_longer_than_a_heartbeat_on_a_slow_network():
    config = edgeml.TrainerConfig(0, transport="zmq")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(edgeml.TrainerServer(config))
        server.start(threaded=True)
        relay = stack.enter_context(Relay(server.port, rate=4e6))
        config = edgeml.TrainerConfig(relay.port, transport="zmq")
        client = stack.enter_context(edgeml.TrainerClient("slow", "127.0.0.1", config))
        came = threading.Event()
        subscription = client.recv_network_callback(lambda weights: came.set())
        server.publish_network(np.ones(20_000_000, np.uint8))  # five seconds' worth
        assert came.wait(30)
        assert subscription.missed == 0
        assert len(server.clients()) == 1  # it never took the server for dead, to come back anew


def test_a_reply_that_zmq_does_not_carry_is_refused_and_another_can_be_given(parking):
    _, requester, taken = parking
    future = requester.request(Message(b""))
    assert until(lambda: taken)
    reply = taken[0][1]
    with pytest.raises(NotEncodable, match="16385 arrays"):
        reply(Message(b"", [memoryview(b"x")] * ((1 << 14) + 1)))
    reply(Message(b"small"))
    assert future.result(20).header == b"small"


def test_what_a_frozen_peer_has_not_been_sent_can_be_forgotten():
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never reads
    port = listener.getsockname()[1]
    with listener, transport.connect(Url("zmq", "127.0.0.1", port), 20) as requester:
        large = Message(b"", [memoryview(np.ones(1 << 20, np.uint8))])
        tracemalloc.start()
        try:
            for future in [requester.request(large) for _ in range(300)]:
                future.cancel()
            requester.request(Message(b""))
            # Some are in libzmq's hands already; the others are not kept.
            assert until(lambda: tracemalloc.get_traced_memory()[0] < 100 << 20)
        finally:
            tracemalloc.stop()


def test_so_many_requests_may_be_under_way_and_no_more(parking):
    _, requester, _ = parking
    with pytest.raises(Overloaded, match="4096"):
        [requester.request(Message(b"")) for _ in range(4097)]


def test_no_file_descriptors_are_left():
    def live() -> None:
        with transport.serve(ANYWHERE, lambda message, reply: reply(message)) as endpoint:
            with transport.connect(endpoint.url, 20) as requester:
                requester.call(Message(b"", [memoryview(bytes(1 << 20))]), 20)
            with transport.connect(endpoint.url, 20) as requester:
                requester.request(Message(b"")).result(20)

    live()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        live()
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_no_free_file_descriptor_is_told_as_unreachable(connected):
    endpoint, _ = connected
    program = f"""
        import resource
        from edgeml.core import Message, Unreachable, Url, load_transport
        transport = load_transport("zmq")
        url = Url.parse("{endpoint.url}")
        first = transport.connect(url, 20)
        first.call(Message(b"x"), 20)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            transport.connect(url, 20)
        except Unreachable as error:
            assert "open files" in str(error), error
        else:
            raise AssertionError
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert first.call(Message(b"x"), 20).header == b"x"
        with transport.connect(url, 20) as second:
            assert second.call(Message(b"x"), 20).header == b"x"
        first.close()
    """
    _run(program)


class Relieving(Sequence):
    """Buffers that have their loop replaced while they are being sent."""

    def __init__(self, replace):
        self._buffers = [memoryview(b"a"), memoryview(b"b")]
        self._replace = replace

    def __len__(self):
        return len(self._buffers)

    def __getitem__(self, index):
        if index == 1:
            self._replace()
        return self._buffers[index]


def test_a_loop_that_is_replaced_while_it_sends_finishes_first():
    other = threading.Event()
    relieving = []

    def replace() -> None:
        thread = threading.Thread(target=endpoint.relieve)
        relieving.append(thread)
        thread.start()
        other.wait(0.1)  # would be set, if another loop were at work now

    def on_request(message, reply) -> None:
        if message.header == b"other":
            other.set()
            reply(Message(b"other"))
        else:
            reply(Message(b"first", Relieving(replace)))

    with transport.serve(ANYWHERE, on_request) as endpoint:
        with transport.connect(endpoint.url, 20) as requester:
            first = requester.request(Message(b"first"))
            second = requester.request(Message(b"other"))
            assert first.result(20) == Message(b"first", [b"a", b"b"])
            assert second.result(20) == Message(b"other")
        for thread in relieving:
            thread.join(20)


# Peers and addresses ----------------------------------------------------------------------


def test_a_peer_that_is_no_client_of_ours_has_an_id_too(parking):
    endpoint, _, taken = parking
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(f"tcp://127.0.0.1:{endpoint.url.port}")
        peer.send(b"12345678header")
        assert until(lambda: taken)
    assert taken[0][0].header == b"header"
    assert taken[0][1].peer.id
    assert "127.0.0.1" in taken[0][1].peer.address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0", "", "::1", "::"])
def test_a_host_may_be_a_name_or_an_address(host):
    if ":" in host:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    with transport.serve(Url("zmq", host, 0), lambda message, reply: reply(message)) as endpoint:
        near = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        for url in (endpoint.url.with_host(near), Url.parse(str(endpoint.url.with_host(near)))):
            with transport.connect(url, 20) as requester:
                assert requester.call(Message(b"x"), 20).header == b"x"
                assert requester.request(Message(b"x")).result(20).header == b"x"
        if host == "localhost":
            with transport.connect(endpoint.url.with_host("127.0.0.1"), 20) as requester:
                assert requester.call(Message(b"x"), 20).header == b"x"


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "." * 5, "a" * 300])
def test_a_host_that_is_not_this_machine_can_not_be_served_at(host):
    with pytest.raises(OSError, match="cannot serve"):
        transport.serve(Url("zmq", host, 0), lambda message, reply: None)


@pytest.mark.parametrize("host", ["no such host", "." * 5, "a" * 300])
def test_a_host_that_does_not_exist_is_unreachable(host):
    with pytest.raises(Unreachable, match="nobody answers"):
        transport.connect(Url("zmq", host, 5555), 1.0)


def test_port_0_is_unreachable():
    with pytest.raises(Unreachable):
        transport.connect(ANYWHERE, 1.0)


# Signals, forks and exits -----------------------------------------------------------------


@contextlib.contextmanager
def interrupted(number: int, delay: float):
    """Send this thread a signal in a while."""
    timer = threading.Timer(delay, signal.pthread_kill, (threading.get_ident(), number))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_ctrl_c_ends_a_call_and_the_array_may_be_changed(parking):
    _, requester, taken = parking
    array = np.empty(5_000_000, np.uint8)
    for index in range(10):
        array.fill(index)
        with pytest.raises(KeyboardInterrupt), interrupted(signal.SIGINT, 0.01):
            requester.call(Message(bytes([index]), [memoryview(array)]), 20)
        array.fill(255)
    answer = requester.request(Message(b"done"))
    # It has a way of its own, and may come before what was sent and given up.
    assert until(lambda: any(message.header == b"done" for message, _ in taken))
    for message, reply in list(taken):
        if message.header == b"done":
            reply(Message(b"fine"))
        else:
            assert (np.frombuffer(message.buffers[0], np.uint8) == message.header[0]).all()
    assert answer.result(20).header == b"fine"


def test_an_interrupt_between_two_parts_of_a_message_is_survived(connected, monkeypatch, caplog):
    _, requester = connected
    requester.call(Message(b""), 20)
    send = zmq.Socket.send

    def send_and_raise(self, data, flags=0, copy=True, **options):
        sent = send(self, data, flags, copy=copy, **options)
        if not copy and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return sent

    array = np.zeros(1_000_000, np.uint8)
    half = Message(b"half", [memoryview(array)] * 2)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(zmq.Socket, "send", send_and_raise)
            with took(at_most=2.0), pytest.raises(KeyboardInterrupt):
                requester.call(half, 20)
        assert requester.call(Message(b"whole"), 20) == Message(b"whole")
    assert "still holds" not in caplog.text


def test_signals_that_raise_at_any_moment_do_not_mix_up_messages(connected):
    endpoint, _ = connected
    program = f"""
        import random, signal, sys, threading
        from edgeml.core import Message, Url, load_transport

        # pyzmq lets handlers run while it frees a frame, where nothing can be raised.
        sys.unraisablehook = lambda *_: None

        class Raised(BaseException):
            pass

        armed = False
        raised = 0

        def handler(number, frame):
            global armed
            if armed:
                armed = False
                raise Raised

        def pester():
            rng = random.Random(0)
            while not stop.wait(rng.random() * 2e-3):
                signal.pthread_kill(main, signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, handler)
        stop, main = threading.Event(), threading.get_ident()
        thread = threading.Thread(target=pester)
        requester = load_transport("zmq").connect(Url.parse("{endpoint.url}"), 20)
        thread.start()
        for index in range(300):
            sizes = (index % 7, 300_000, 0, 20)
            sent = Message(b"%d" % index, [memoryview(bytes([index % 250]) * n) for n in sizes])
            try:
                armed = True
                if index % 3:
                    requester.call(sent, 20)
                else:
                    requester.request(sent).result(20)
            except Raised:
                raised += 1
            armed = False
            got = requester.call(sent, 20)
            assert got.header == sent.header
            assert got.buffers == sent.buffers
            if index % 10 == 0:
                assert requester.request(sent).result(20).buffers == sent.buffers
        stop.set()
        thread.join()
        requester.close()
        print(raised)
    """
    assert int(_run(program, complaint="still holds")) > 10


def _run(program: str, timeout: float = 60.0, complaint: str = "") -> str:
    """Run a program in a fresh interpreter, which is to end well, and without a complaint."""
    printed, stderr = run_fresh(program, timeout)
    assert not stderr or (complaint and complaint not in stderr), stderr
    return printed


def test_a_signals_handler_may_close_what_it_interrupted(parking):
    _, requester, _ = parking
    before = signal.signal(signal.SIGUSR1, lambda *_: requester.close())
    try:
        with took(at_most=2.0), pytest.raises(Closed), interrupted(signal.SIGUSR1, 0.05):
            requester.call(Message(b""), 20.0)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_forked_child_has_no_part_in_its_parents_connections(connected):
    endpoint, _ = connected
    program = f"""
        import os, sys, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        warnings.simplefilter("ignore", ResourceWarning)  # of the parent's sockets in the child
        from edgeml.core import Closed, Message, Url, load_transport
        transport = load_transport("zmq")
        ours = transport.serve(Url("zmq", "127.0.0.1", 0), lambda message, reply: reply(message))
        requester = transport.connect(Url.parse("{endpoint.url}"), 20)
        requester.call(Message(b"x"), 20)
        pending = requester.request(Message(b"x", [memoryview(bytes(1 << 20))]))
        child = os.fork()
        if not child:
            began = time.monotonic()
            for send in (requester.request, lambda m: requester.call(m, 20)):
                try:
                    send(Message(b"x"))
                except Closed as error:
                    assert "fork" in str(error)
                else:
                    raise AssertionError
            requester.close()
            ours.relieve()
            ours.close()
            with transport.connect(Url.parse("{endpoint.url}"), 20) as mine:
                assert mine.call(Message(b"child"), 20).header == b"child"
            assert time.monotonic() - began < 15  # not the deadlines
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(pending.result(20).buffers[0]) == 1 << 20
        assert requester.call(Message(b"parent"), 20).header == b"parent"
        with transport.connect(ours.url, 20) as mine:
            assert mine.call(Message(b"x"), 20).header == b"x"
        requester.close()
        ours.close()
    """
    _run(program)


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "client.stop(); server.stop()"])
def test_a_program_that_ends_without_closing_anything_ends(how):
    _run(
        f"""
        import sys, warnings, edgeml, numpy as np
        warnings.simplefilter("ignore", ResourceWarning)  # what was not closed is the point
        server = edgeml.InferenceServer(0, transport="zmq")
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        client = edgeml.InferenceClient("127.0.0.1", server.port, "zmq")
        client.call("echo", np.zeros(1 << 20, np.uint8))
        client.call_async("echo", np.zeros(1 << 20, np.uint8))
        {how}
        """,
        timeout=10,
    )


def test_closing_at_any_moment_raises_only_what_is_promised(connected):
    """Two hundred lives, each closed at a moment of its own."""
    endpoint, _ = connected
    rng = random.Random(0)
    large = Message(b"", [memoryview(bytes(400_000))])

    def use(requester) -> None:
        try:
            for _ in range(1000):
                requester.request(large)
                requester.call(large, 20)
                requester.call(Message(b""), 20)
        except (Closed, Unreachable):
            pass

    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            requester = transport.connect(endpoint.url, 20)
            users = [pool.submit(use, requester) for _ in range(2)]
            time.sleep(rng.random() * 5e-3)  # the moment
            requester.close()
            for user in users:
                user.result(20)


# Limits -----------------------------------------------------------------------------------

OUT_OF_FILES = """
import os, resource, sys
from edgeml.core import Message, Unreachable, Url, load_transport

transport = load_transport("zmq")
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
kept = []
try:
    while len(kept) < 200:
        kept.append(transport.connect(Url.parse(sys.argv[1]), 20))
        kept[-1].call(Message(b"x"), 20)
except Unreachable as error:
    print(error)
for each in kept[1:]:
    each.close()
print(kept[0].call(Message(b"still there"), 20).header.decode())
kept[0].close()
"""


def test_who_is_out_of_files_is_told_what_to_do_and_the_rest_goes_on():
    with (
        transport.serve(ANYWHERE, lambda message, reply: reply(message)) as endpoint,
        process(OUT_OF_FILES, endpoint.url) as child,
    ):
        assert "ulimit -n" in child.line()
        assert child.line() == "still there"
        assert child.end()[0] == 0


def test_hundreds_of_connections_of_one_process_share_a_context_and_close_at_once():
    with transport.serve(ANYWHERE, lambda message, reply: reply(message)) as endpoint:
        before = threads()
        many = [transport.connect(endpoint.url, 10.0) for _ in range(300)]
        for number, each in enumerate(many):
            assert each.call(Message(b"%d" % number), 10.0).header == b"%d" % number
        assert len(threads() - before) <= len(many)
        with took(at_most=10.0):
            for each in many:
                each.close()
        assert threads() <= before
