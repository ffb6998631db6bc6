"""What one ZeroMQ peer may take of a server: memory, connections, files, and its time."""

import contextlib
import itertools
import random
import socket
import struct
import sys
import threading
import time

import pytest
import zmq

from edgeml.core import DeadlineExceeded, Message, Overloaded, Unreachable, Url, load_transport
from edgeml.core.limits import Limits
from edgeml.core.security import ClientKey, Credentials, CurveKeys, Keyring
from edgeml.testing.ends import resident_memory
from edgeml.testing.stopwatch import Stopwatch
from pairs import process, run_fresh, took, wait_until

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
ANYWHERE = Url("zmq", "127.0.0.1", 0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its connections")

transport = load_transport("zmq")


class Peer:
    """A DEALER that does as it likes, byte by byte."""

    def __init__(self, port: int, hello: bytes = GREETING + READY, host="127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 5.0, (host, 0))
        self.heard = b""
        if hello:
            self.socket.sendall(hello[:64])
            self.hear(lambda: len(self.heard) >= 64)
        if hello[64:]:
            self.socket.sendall(hello[64:])
            self.hear(lambda: b"ROUTER" in self.heard)

    def hear(self, enough) -> None:
        """Read until it is enough."""
        while not enough():
            self.heard += self.socket.recv(1 << 16)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, *frames: bytes, more: bool = False) -> None:
        for number, frame in enumerate(frames):
            flags = 2 | (more or number < len(frames) - 1)
            self.socket.sendall(bytes([flags]) + struct.pack(">Q", len(frame)) + frame)

    def is_cut(self) -> bool:
        """Whether the other end has hung up; what it says is lost."""
        self.socket.setblocking(False)
        try:
            while True:
                if not self.socket.recv(1 << 16):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.socket.settimeout(20)


@contextlib.contextmanager
def served(on_request=lambda message, reply: reply(message), credentials=None, **limits):
    with transport.serve(
        ANYWHERE, on_request, credentials=credentials, limits=Limits(**limits)
    ) as endpoint:
        yield endpoint


def ask(endpoint) -> None:
    """See a stranger answered at once."""
    with took(at_most=2.0), transport.connect(endpoint.url, 20) as requester:
        assert requester.call(Message(b"new"), 20).header == b"new"


# Replies that nobody reads --------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(100_000, 1500), (1 << 20, 150)])
def test_who_does_not_read_its_replies_is_kept_a_bounded_number_of_them(size, count):
    answered = []

    def on_request(message, reply) -> None:
        if message.header == b"much":
            reply(Message(b"", [memoryview(b"1" * size)]))
            answered.append(message)
        else:
            reply(message)

    limit = 1 << 22
    with served(on_request, replies_per_client=limit) as endpoint, Peer(endpoint.url.port) as peer:
        ask(endpoint)
        before = resident_memory() if sys.platform == "linux" else 0
        for sent in range(count):
            peer.send(struct.pack("<Q", sent) + b"much")
        wait_until(lambda: len(answered) == count)
        assert endpoint.counts["Overloaded"] > count // 2
        ask(endpoint)
        if sys.platform == "linux":
            assert resident_memory() - before < 32 << 20
        # It is told which replies it will never get; once it reads, it is answered again.
        heard = bytearray()
        while b"\x01\x00\x00\x08" + struct.pack("<Q", count - 1) not in heard[-100:]:
            heard += peer.socket.recv(1 << 20)
        peer.send(struct.pack("<Q", count) + b"again")
        while struct.pack("<Q", count) + b"again" not in heard[-100:]:
            heard += peer.socket.recv(1 << 20)
        told = heard.count(b"\x01\x00\x00\x08")
        assert told == endpoint.counts["Overloaded"] == endpoint.dropped


@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is told by Linux")
def test_what_many_do_not_read_is_bounded_together():
    def on_request(message, reply) -> None:
        if message.header == b"much":
            reply(Message(b"", [memoryview(bytes(1 << 20))]))
        else:
            reply(message)

    with (
        served(on_request, bytes=1 << 25, replies_per_client=1 << 24) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        ask(endpoint)
        before = resident_memory()
        for _ in range(30):
            peer = stack.enter_context(Peer(endpoint.url.port))
            for number in range(20):
                peer.send(struct.pack("<Q", number) + b"much")
            ask(endpoint)
        wait_until(lambda: endpoint.counts["Overloaded"] > 100)
        # The system itself takes some MB of each; of 600 MB the rest is refused.
        assert resident_memory() - before < 192 << 20
        with transport.connect(endpoint.url, 20) as requester:  # who reads gets all

            def got() -> bool:
                # Where libzmq tells late of what it has written, it is too much, and asked again.
                with contextlib.suppress(Overloaded):
                    return len(requester.call(Message(b"much"), 20).buffers[0]) == 1 << 20
                return False

            for _ in range(50):
                wait_until(got)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is told by Linux")
def test_a_message_of_countless_small_frames_is_cut_off():
    with served(bytes_per_client=1 << 25) as endpoint, Peer(endpoint.url.port) as peer:
        ask(endpoint)
        before = resident_memory()
        frames = b"\x01\x00" * (1 << 15)
        with contextlib.suppress(OSError):
            for _ in range(300):  # 19 MB, which would take 600
                peer.socket.sendall(frames)
                ask(endpoint)
        wait_until(lambda: endpoint.counts["Overloaded"] == 1)
        assert resident_memory() - before < 400 << 20
        ask(endpoint)


def test_small_replies_that_nobody_reads_are_dropped_and_counted_as_well():
    asked = itertools.count(1)

    def on_request(message, reply) -> None:
        reply(Message(bytes(500)))
        next(asked)

    with served(on_request) as endpoint, Peer(endpoint.url.port) as peer:
        for start in range(0, 60_000, 1000):
            numbers = (struct.pack("<Q", start + number) for number in range(1000))
            peer.socket.sendall(b"".join(b"\0\x09" + number + b"x" for number in numbers))
        wait_until(lambda: endpoint.dropped > 1000, timeout=30.0)
        assert endpoint.counts["Overloaded"] == endpoint.dropped


def test_one_reply_is_given_however_large_and_the_next_once_it_was_read():
    large = memoryview(bytes(8 << 20))
    with (
        served(
            lambda message, reply: reply(Message(b"", [large])), replies_per_client=1
        ) as endpoint,
        transport.connect(endpoint.url, 20) as requester,
    ):
        for _ in range(10):
            assert requester.call(Message(b"x"), 20).buffers[0].nbytes == large.nbytes
            assert requester.request(Message(b"x")).result(20).buffers[0].nbytes == large.nbytes
            # libzmq may tell a while after the client has read.
            wait_until(lambda: not any(each.marks for each in endpoint._remotes.values()))
        assert not endpoint.counts


def test_a_reply_that_the_server_dropped_is_told_as_overloaded():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            while True:
                identity, head = router.recv_multipart()
                if head[8:] == b"end":
                    return
                dropped = head[8:] == b"drop"
                router.send_multipart([identity, b"", head[:8]] if dropped else [identity, head])

        thread = threading.Thread(target=serve)
        thread.start()
        with transport.connect(ANYWHERE.with_port(port), 20) as requester:
            for _ in range(2):
                with pytest.raises(Overloaded, match="not been read"):
                    requester.call(Message(b"drop"), 20)
                with pytest.raises(Overloaded, match="not been read"):
                    requester.request(Message(b"drop")).result(20)
                assert requester.call(Message(b"x"), 20).header == b"x"
                assert requester.request(Message(b"x")).result(20).header == b"x"
            requester.request(Message(b"end"))
            thread.join(20)


# Messages -------------------------------------------------------------------------------


def test_a_message_beyond_the_limits_is_not_handed_over_but_counted():
    taken = []

    def on_request(message, reply) -> None:
        taken.append(message)
        reply(Message(b"ok"))

    with (
        served(on_request, message_bytes=1 << 20, buffers=4) as endpoint,
        transport.connect(endpoint.url, 20) as requester,
    ):
        half = memoryview(bytes(1 << 19))
        just = Message(b"", [half, half])
        assert requester.request(just).result(20).header == b"ok"
        for number, beyond in enumerate(
            (Message(b"x", [half, half]), Message(b"", [memoryview(b"")] * 5)), 1
        ):
            requester.request(beyond)
            wait_until(lambda n=number: endpoint.counts["Malformed"] == n)
        assert requester.request(just).result(20).header == b"ok"
        assert len(taken) == 2
        future = requester.request(Message(b"", [memoryview(bytes((1 << 20) + 100))]))
        with pytest.raises(Unreachable):  # libzmq itself cuts off whoever announces a larger frame
            future.result(20)


@LINUX
def test_a_message_that_never_ends_is_cut_off():
    with served(message_bytes=4 << 20) as endpoint, Peer(endpoint.url.port) as peer:
        before = resident_memory()
        with contextlib.suppress(OSError):
            while not peer.is_cut():
                peer.send(bytes(1 << 18), more=True)
        wait_until(lambda: endpoint.counts["Malformed"] == 1)
        assert resident_memory() - before < 512 << 20  # as much as comes between two looks
        ask(endpoint)


@LINUX
def test_halves_of_messages_of_many_are_bounded_together():
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(served(bytes=4 << 20, message_bytes=4 << 20))
        peers = [stack.enter_context(Peer(endpoint.url.port)) for _ in range(4)]
        for number, peer in enumerate(peers):
            peer.send(bytes((number + 1) << 19), more=True)
        wait_until(lambda: peers[-1].is_cut())
        assert endpoint.counts == {"Overloaded": 1}
        peers[0].send(b"the rest")
        ask(endpoint)
        assert not any(peer.is_cut() for peer in peers[:-1])


@LINUX
def test_half_a_message_without_a_further_byte_is_cut_off():
    with (
        served(stall=0.5) as endpoint,
        Peer(endpoint.url.port) as peer,
        Peer(endpoint.url.port) as slow,
    ):
        peer.send(bytes(100_000), more=True)
        watch = Stopwatch()
        slow.socket.sendall(b"\x02" + struct.pack(">Q", 1 << 20) + b"12345678")
        while not peer.is_cut():
            slow.socket.sendall(bytes(10_000))
            assert watch.seconds < 5.0
            time.sleep(0.05)  # a slow network
        assert endpoint.counts == {"Stalled": 1}
        assert not slow.is_cut()


@LINUX
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "curve"])
def test_who_sends_whole_messages_is_never_taken_for_one_that_stalls(monkeypatch, secured):
    """What a peer has sent and what was taken of it are compared byte for byte."""
    monkeypatch.setattr("edgeml.transports.zmq.guard._UNSEEN", 2000)
    rng = random.Random(0)
    ours = theirs = None
    if secured:
        ring = Keyring()
        one, other = (CurveKeys(*(k.decode() for k in zmq.curve_keypair())) for _ in range(2))
        ring.add(ClientKey("alice", curve=one.public))
        ours = Credentials(curve=other, clients=ring)
        theirs = Credentials(name="alice", curve=one, curve_server=other.public)
    with (
        served(credentials=ours, stall=0.3) as endpoint,
        transport.connect(endpoint.url, 5.0, credentials=theirs) as requester,
    ):
        for number in range(5000):
            sizes = [rng.choice((0, 1, 200, 255, 256, 3000)) for _ in range(number % 4)]
            buffers = [memoryview(bytes(size)) for size in sizes]
            sent = Message(bytes(rng.choice((0, 10, 213, 214, 246, 247, 248, 5000))), buffers)
            future = requester.request(sent)
            if number % 10 == 0:
                requester.call(sent, 20)
                future.result(20)
        future.result(10.0)
        time.sleep(1.0)  # long enough to be looked at
        assert not endpoint.counts
        assert not requester.lost


# Connections ----------------------------------------------------------------------------


@pytest.mark.parametrize("hello", [b"", GREETING[:30], GREETING], ids=["none", "half", "greeting"])
def test_a_handshake_that_takes_too_long_is_cut_off(hello):
    with (
        served(handshake=0.5) as endpoint,
        socket.create_connection(("127.0.0.1", endpoint.url.port), 20) as peer,
    ):
        peer.sendall(hello)
        with took(at_most=2.5), contextlib.suppress(ConnectionResetError):
            while peer.recv(1000):
                pass
        wait_until(lambda: endpoint.counts["HandshakeTimeout"] == 1)


@LINUX
def test_of_one_address_those_who_do_not_shake_hands_make_room_for_the_new():
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(served(connections_per_address=20))
        with transport.connect(endpoint.url, 20) as good:  # which asks nothing over one of its two
            good.call(Message(b"x"), 20)
            peers = [
                stack.enter_context(Peer(endpoint.url.port, hello))
                for hello in (b"", GREETING) * 25
            ]
            wait_until(lambda: sum(not peer.is_cut() for peer in peers) <= 18)
            ask(endpoint)
            assert good.call(Message(b"x"), 20).header == b"x"
            assert not good.lost
        assert endpoint.counts["Overloaded"] >= 32


def test_of_one_address_no_more_come_in_when_all_have_shaken_hands():
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(served(connections_per_address=10))
        many = [stack.enter_context(Peer(endpoint.url.port)) for _ in range(10)]
        others = [stack.enter_context(Peer(endpoint.url.port, b"")) for _ in range(5)]
        wait_until(lambda: all(peer.is_cut() for peer in others))
        assert not any(peer.is_cut() for peer in many)
        if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
            with Peer(endpoint.url.port, host="127.0.0.2") as elsewhere:
                elsewhere.send(b"12345678x")
                elsewhere.hear(lambda: b"12345678x" in elsewhere.heard)


def test_a_descriptor_that_is_somebody_elses_by_now_is_left_alone():
    """A connection may have gone, and its descriptor be a user's, before it is looked at."""
    with (
        served(connections_per_address=1) as endpoint,
        Peer(endpoint.url.port),
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as theirs,
    ):
        endpoint._guard._accept(theirs.fileno())
        theirs.sendall(b"goes on")
        with listener.accept()[0] as other:
            assert other.recv(100) == b"goes on"
        assert not endpoint.counts


OUT_OF_FILES = """
import os, resource, threading, time
from edgeml.core import Message, Url, load_transport

held = []

def on_request(message, reply):
    if message.header == b"take":
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(8):  # of what the guard keeps to spare, and may just have let go of
                os.close(held.pop())
    if message.header == b"give":
        while held:
            os.close(held.pop())
    reply(Message(str(time.process_time()).encode()))

endpoint = load_transport("zmq").serve(Url("zmq", "127.0.0.1", 0), on_request)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
print(endpoint.url.port)
threading.Event().wait()
"""


@LINUX
def test_at_the_limit_of_open_files_no_core_is_spun_and_the_good_are_answered():
    with process(OUT_OF_FILES) as child, contextlib.ExitStack() as stack:
        url = ANYWHERE.with_port(int(child.line()))
        good = stack.enter_context(transport.connect(url, 20))

        def tell(what: bytes) -> float:
            """Returns the seconds of processors' time that it has used."""
            with took(at_most=1.0, others=[child.popen.pid]):
                return float(good.call(Message(what), 20).header)

        def load() -> float:
            """Of its cores, over a while."""
            before, began = tell(b""), time.monotonic()
            time.sleep(1.5)
            return (tell(b"") - before) / (time.monotonic() - began)

        def is_let_in() -> bool:
            with (
                contextlib.suppress(Unreachable, DeadlineExceeded),
                transport.connect(url, 1.0) as new,
            ):
                return bool(new.call(Message(b""), 1.0).header)
            return False

        tell(b"")
        for _ in range(200):  # more than it has files
            stack.enter_context(socket.create_connection(("127.0.0.1", url.port), 20))
        assert load() < 0.5
        wait_until(is_let_in)
        tell(b"take")  # and where it is not connections that took them all
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", url.port), 20))
        assert load() < 0.5
        tell(b"give")
        wait_until(is_let_in)


NO_MEMORY = """
import resource, sys, threading
from pathlib import Path
from edgeml.core import Message, Url, load_transport

endpoint = load_transport("zmq").serve(
    Url("zmq", "127.0.0.1", 0), lambda message, reply: reply(Message(message.header[:10]))
)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (500 << 20), now + (500 << 20)))
print(endpoint.url.port)
threading.Event().wait()
"""


@LINUX
@pytest.mark.parametrize("megabytes", [300, 700], ids=["its copy", "itself"])
def test_who_sends_more_than_there_is_memory_for_does_not_end_the_loop(megabytes):
    block = bytes(1 << 20)
    with process(NO_MEMORY) as child, contextlib.ExitStack() as stack:
        url = ANYWHERE.with_port(int(child.line()))
        good = stack.enter_context(transport.connect(url, 20))
        assert good.call(Message(b"x"), 20).header == b"x"
        for _ in range(3):
            peer = stack.enter_context(Peer(url.port))
            with contextlib.suppress(OSError):  # cut off, and rightly so
                peer.socket.sendall(b"\x02" + struct.pack(">Q", megabytes << 20))
                for _ in range(megabytes):
                    peer.socket.sendall(block)
        for _ in range(10):
            assert good.call(Message(b"x"), 20.0).header == b"x"
        with transport.connect(url, 20) as new:
            assert new.call(Message(b"x"), 20).header == b"x"


# Names ----------------------------------------------------------------------------------

FIRST_NAME = """
    import zmq
    from edgeml.core import Message, Url, load_transport
    names = []
    def on_request(message, reply):
        names.append(reply.peer.id)
        reply(message)
    for _ in range(2):
        with load_transport("zmq").serve(Url("zmq", "127.0.0.1", 0), on_request) as endpoint:
            with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
                peer.connect(f"tcp://127.0.0.1:{endpoint.url.port}")
                peer.send(b"12345678x")
                peer.recv()
    print(*names)
"""


def test_what_a_router_calls_its_first_peer_cannot_be_foreseen():
    """libzmq counts from what C's rand() gives, in a fresh process always 0x6b8b4567."""
    names = [name for _ in range(2) for name in run_fresh(FIRST_NAME)[0].split()]
    assert len(set(names)) == 4
    numbers = sorted(int(name, 16) for name in names)
    assert all(b - a > 1 << 10 for a, b in itertools.pairwise(numbers))
    assert not any(0 <= number - 0x6B8B4567 < 1 << 10 for number in numbers)
