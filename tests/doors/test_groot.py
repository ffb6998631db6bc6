"""The door for GR00T's clients: the suite, REP's ways, and what each endpoint answers."""

from __future__ import annotations

import gc
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import zmq
from edgeml_groot.endpoint import GrootEndpoint, _Line, _Refused

from edgeml import Feature, InferenceServer, Limits, PolicyContract
from edgeml.core import Url, plugins
from edgeml.testing import DoorTests, Refused
from edgeml.testing.ends import resident_memory
from edgeml.testing.stopwatch import Stopwatch
from groot_client import Client, Wire, dial, pack, unpack
from pairs import long_form, make_keys, took, wait_until


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    width = "<H" if version == b"\1\0" else "<I"
    return b"\x93NUMPY" + version + struct.pack(width, len(header)) + header.encode() + data


class TestGroot(DoorTests):
    url = "groot://127.0.0.1:0"
    client = Client
    keys_each_call = True

    def hostile(self, client: Client) -> dict[str, bytes]:
        said = "{'descr': %s, 'fortran_order': False, 'shape': %s, }\n"
        arrays = {
            "objects": npy(said % ("'|O'", "(1,)"), b"\x80\x04N."),
            "a structure": npy(said % ("[('a', '<f4')]", "(1,)"), bytes(4)),
            "raw bytes": npy(said % ("'|V4'", "(1,)"), bytes(4)),
            "dates": npy(said % ("'<M8[ns]'", "(1,)"), bytes(8)),
            "too few bytes": npy(said % ("'<f4'", "(1000000000, 1000000000)"), bytes(4)),
            "too many bytes": npy(said % ("'<f4'", "(1,)"), bytes(8)),
            "a large size": npy(said % ("'<f4'", "(" + "9" * 900 + ",)"), bytes(4)),
            "a size below zero": npy(said % ("'<f4'", "(-1,)"), b""),
            "a call": npy(said % ("__import__('os').getcwd()", "(1,)"), bytes(4)),
            "parentheses": npy("(" * 1000, b""),
            "a long header": npy(" " * 60_000, b""),
            "a longer header": npy(" " * 60_000, b"", b"\2\0"),
            "a header that ends too early": npy(said % ("'<f4'", "(1,)"))[:30],
            "an unknown version": npy(said % ("'<f4'", "(1,)"), bytes(4), b"\3\0"),
            "a pickle": b"\x80\x04cos\ngetcwd\n(tR.",
            "an archive": b"PK\3\4" + bytes(100),
            "nothing": b"",
        }
        spoilt = {
            what: pack(
                {"endpoint": "get_action", "data": {"x": {"__ndarray_class__": 1, "as_npy": data}}}
            )
            for what, data in arrays.items()
        }
        said = client.encode({"x": 1})
        nd = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": bytes(8)}
        for what, change in {
            "nd: pickled objects": {b"kind": b"O", b"data": b"\x80\x04N."},
            "nd: objects": {b"type": "|O"},
            "nd: a structure": {b"kind": b"V", b"type": [["a", "<f4"]]},
            "nd: sizes": {b"shape": [1 << 40, 1 << 40]},
            "nd: a size": {b"shape": [-2]},
            "nd: no sizes": {b"shape": None},
            "nd: a text": {b"data": "12345678"},
        }.items():
            spoilt[what] = pack({"data": {"x": {**nd, **change}}})
        return {
            **spoilt,
            "not even a map": pack([1, 2]),
            "no MessagePack": b"\xc1",
            "half of one": said[: len(said) // 2],
            "more than one": said + said,
            "empty": b"",
            "levels": b"\x81\xa4data" + b"\x91" * 100_000,
            "a list of billions": b"\x81\xa4data\xdd\xff\xff\xff\xff",
            "bytes of billions": b"\x81\xa4data\xc6\xff\xff\xff\xff",
            "keys that are numbers": pack({"data": {1: 2}}),
            "an endpoint that is a number": pack({"endpoint": 7}),
            "a token that is a number": pack({"api_token": 7}),
            "no observation": pack({"endpoint": "get_action", "data": None}),
            "an observation that is a list": pack({"data": {"observation": [1], "options": None}}),
        }


TestLongGroot = long_form(
    TestGroot, "test_mutated_", "test_garbage_", mutations=10_000, garbage=10_000
)


# REP's ways --------------------------------------------------------------------------------


@contextmanager
def served(function=lambda observation: observation, door=None, **settings):
    """A server with a door, and where the door is."""
    with InferenceServer(url="inproc://127.0.0.1:0", **settings) as server:
        server.register_interface("policy", function)
        server.open_door("groot://127.0.0.1:0", **(door or {}))
        with server.serving():
            yield server, Url.parse(server.doors()[0])


@pytest.fixture
def echo() -> Iterator[Url]:
    with served() as (_, url):
        yield url


@contextmanager
def zmq_peer(kind: int, url: Url, **options: Any) -> Iterator[zmq.Socket]:
    with zmq.Context() as context, context.socket(kind) as made:
        made.linger = 0
        made.rcvtimeo = 10_000
        for name, value in options.items():
            setattr(made, name, value)
        made.connect(f"tcp://127.0.0.1:{url.port}")
        yield made


@contextmanager
def sending(wire: Wire, data: bytes) -> Iterator[None]:
    """Send in the background, and read what comes."""

    def read() -> None:
        with suppress(OSError, ValueError):
            while wire.socket.recv(1 << 16):
                pass

    threads = [threading.Thread(target=each) for each in (lambda: wire.socket.sendall(data), read)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        with suppress(OSError):
            wire.socket.shutdown(socket.SHUT_RDWR)
        for each in threads:
            each.join()


def hear_out(sock: socket.socket) -> None:
    """Read until the other end has hung up."""
    with suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass


def kept(kind: type) -> int:
    """How many objects of a class there are."""
    return sum(type(each) is kind for each in gc.get_objects())


PING = pack({"endpoint": "ping"})


def asking(**observation: Any) -> bytes:
    return pack({"data": observation})


def test_a_req_is_answered(echo):
    with zmq_peer(zmq.REQ, echo) as peer:
        for number in range(3):
            peer.send(asking(number=number))
            assert unpack(peer.recv()) == {"number": number}
            assert not peer.getsockopt(zmq.RCVMORE)


def test_a_dealer_gets_back_what_it_put_in_front(echo):
    with zmq_peer(zmq.DEALER, echo) as peer:
        for front in ([b""], [b"a", b""], [b"a", b"\0" * 255, b"c", b""]):
            peer.send_multipart([*front, asking(number=1)])
            *back, answer = peer.recv_multipart()
            assert back == front
            assert unpack(answer) == {"number": 1}


@pytest.mark.parametrize(
    ("frames", "front", "missing"),
    [
        # As it would read an answer: without an empty frame where it sent none.
        ([asking(x=1)], [], "an empty frame in front"),
        ([asking(x=1), asking(x=1)], [], "an empty frame in front"),
        ([b""], [b""], "exactly one frame"),
        ([b"", asking(x=1), b""], [b""], "exactly one frame"),
        ([b"", b"", asking(x=1)], [b""], "exactly one frame"),
        ([b"a", b"", asking(x=1), asking(x=1)], [b"a", b""], "exactly one frame"),
        ([b"", *[asking(x=1)] * 100], [b""], "exactly one frame"),
        ([*[b"a"] * 16, b"", asking(x=1), b"more"], [*[b"a"] * 16, b""], "exactly one frame"),
        ([*[b"a"] * 17, b"", asking(x=1)], [b""], "a shorter return address"),
        ([b"a" * 256, b"", asking(x=1)], [b""], "a shorter return address"),
    ],
)
def test_what_is_no_request_of_a_reqs_is_told_so(echo, frames, front, missing):
    with zmq_peer(zmq.DEALER, echo) as peer:
        peer.send_multipart(frames)
        *came, answer = peer.recv_multipart()
        assert missing in unpack(answer)["error"]
        assert came == front
        peer.send_multipart([b"", asking(x=2)])
        assert unpack(peer.recv_multipart()[1]) == {"x": 2}


def test_a_client_of_a_libzmq_of_old_is_cut_off_and_the_log_says_why(caplog):
    hello = b"\xff" + bytes(8) + b"\x7f\x01\x03" + b"\0\0"  # ZMTP 2, a REQ without a name
    with served() as (server, url):
        for older in (hello + b"\x01\0" + b"\0\x01\x80", b"\1\0" + b"\1\1" + b"\2\0\x80"):
            with dial(url) as old:
                old.sendall(older)
                hear_out(old)
        wait_until(lambda: server.stats().get("Malformed", 0) == 2)
        with zmq_peer(zmq.REQ, url) as peer:
            peer.send(asking(x=1))
            assert unpack(peer.recv()) == {"x": 1}
    assert "libzmq 4" in caplog.text


def test_what_one_client_asks_at_once_is_answered_in_order():
    running = []
    with (
        served(lambda observation: running.append(1) or observation) as (_, url),
        zmq_peer(zmq.DEALER, url) as peer,
    ):
        watch = Stopwatch()
        for number in range(200):
            kind = number % 4
            if kind == 0:
                peer.send_multipart([b"", asking(number=number)])
            elif kind == 1:
                peer.send_multipart([b"", pack({"endpoint": "ping"})])
            elif kind == 2:
                peer.send_multipart([b"", pack({"endpoint": f"no. {number}"})])
            else:
                peer.send_multipart([b"", b"1", b"2"])
        for number in range(200):
            delimiter, answer = peer.recv_multipart()
            assert delimiter == b""
            answer = unpack(answer)
            if number % 4 == 0:
                assert answer == {"number": number}
            elif number % 4 == 1:
                assert answer["status"] == "ok"
            elif number % 4 == 2:
                assert f"no. {number};" in answer["error"]
            else:
                assert "exactly one frame" in answer["error"]
        assert len(running) == 50
    assert watch.seconds < 2.0  # and none waits until the door looks around


def test_one_client_has_one_call_at_a_time_and_others_do_not_wait_for_it():
    most = []
    under_way = threading.Semaphore(0)
    go_on = threading.Event()

    def function(observation):
        under_way.release()
        assert go_on.wait(10)
        most.append(observation["number"])
        return observation

    with served(function, workers=2) as (_, url), zmq_peer(zmq.DEALER, url) as peer:
        for number in range(3):
            peer.send_multipart([b"", asking(number=number)])
        assert under_way.acquire(timeout=10)
        assert not under_way.acquire(timeout=0.1)  # the second waits for the first
        go_on.set()
        with zmq_peer(zmq.REQ, url) as other:
            other.send(asking(number=10))
            assert unpack(other.recv()) == {"number": 10}
        assert [unpack(peer.recv_multipart()[1])["number"] for _ in range(3)] == [0, 1, 2]


def test_who_asks_for_more_than_may_wait_is_told_for_each_and_takes_up_nothing():
    go_on = threading.Event()
    count = 20_000
    limits = Limits(calls_per_client=4)
    with served(lambda _: go_on.wait(20) and {}, limits=limits) as (server, url):
        before, before_them = resident_memory(), kept(_Refused)
        with zmq_peer(zmq.DEALER, url, rcvhwm=0, sndhwm=0) as peer:
            request = asking(x=1)
            for _ in range(count):
                peer.send_multipart([b"", request])
            wait_until(lambda: server.stats().get("Overloaded", 0) == count - 5)
            assert kept(_Refused) - before_them == 1
            with zmq_peer(zmq.REQ, url) as other:  # who is not held up
                other.send(pack({"endpoint": "ping"}))
                with took(at_most=3.0):
                    assert unpack(other.recv())["status"] == "ok"
            if sys.platform == "linux":
                assert resident_memory() - before < 48 << 20
            go_on.set()
            answers = [unpack(peer.recv_multipart()[1]) for _ in range(5)]
            assert answers == [{}] * 5
            assert "wait already" in unpack(peer.recv_multipart()[1])["error"]


@pytest.mark.slow
def test_what_one_client_is_told_at_once_holds_up_nobody():
    """Its answers are due together, once what they waited for has returned."""
    go_on = threading.Event()
    count = 200_000
    limits = Limits(calls_per_client=1000)
    with (
        served(lambda _: go_on.wait(60) and {}, limits=limits) as (server, url),
        Client(url) as good,
        closing(Wire(url)) as wire,
    ):
        wire.send(b"", asking(x=1))
        with sending(wire, b"\x01\0\0\x01\x80" * count):
            wait_until(lambda: server.stats().get("Overloaded", 0) == count - 1000, timeout=60)
            go_on.set()
            worst = 0.0
            for number in range(100):
                watch = Stopwatch()
                assert good.call({"x": number}) == {}
                worst = max(worst, watch.seconds)
    assert worst < 0.4


def test_what_waits_is_bounded_in_bytes():
    go_on = threading.Event()
    limits = Limits(bytes_per_client=1 << 20)
    with (
        served(lambda _: go_on.wait(20) and {}, limits=limits) as (server, url),
        zmq_peer(zmq.DEALER, url) as peer,
    ):
        for _ in range(10):
            peer.send_multipart([b"", asking(image=np.zeros(300_000, np.uint8))])
        wait_until(lambda: server.stats().get("Overloaded", 0) == 6)
        go_on.set()
        answers = [unpack(peer.recv_multipart()[1]) for _ in range(10)]
        assert [answer == {} for answer in answers] == [True] * 4 + [False] * 6
        assert all("requests waiting" in answer["error"] for answer in answers[4:])


def test_who_asks_by_a_proxy_has_a_session_of_its_own(monkeypatch):
    monkeypatch.setattr("edgeml_groot.endpoint._FORGET", 3.0)
    ended = []

    def function(observation, context):
        context.on_end(lambda: ended.append(observation["who"]))
        count = context.session["count"] = context.session.get("count", 0) + 1
        return {"count": count}

    with served(function) as (server, url), zmq.Context() as context, ExitStack() as stack:
        front, back = (stack.enter_context(context.socket(k)) for k in (zmq.ROUTER, zmq.DEALER))
        stop, stopped = (stack.enter_context(context.socket(zmq.PAIR)) for _ in range(2))
        stopped.bind("inproc://stop")
        stop.connect("inproc://stop")
        front.linger = back.linger = 0
        place = url.with_port(front.bind_to_random_port("tcp://127.0.0.1"))
        back.connect(f"tcp://127.0.0.1:{url.port}")
        proxy = threading.Thread(target=zmq.proxy_steerable, args=(front, back, None, stopped))
        proxy.start()
        try:
            with zmq_peer(zmq.REQ, place) as one, zmq_peer(zmq.REQ, place) as two:
                for count in (1, 2, 3):
                    one.send(asking(who=1))
                    assert unpack(one.recv()) == {"count": count}
                two.send(asking(who=2))
                assert unpack(two.recv()) == {"count": 1}
                assert len(server.clients()) == 2
            # Nobody tells the door that they have gone.
            wait_until(lambda: not server.clients())
            wait_until(lambda: sorted(ended) == [1, 1, 1, 2])
        finally:
            stop.send(b"TERMINATE")
            proxy.join(10)


def test_a_connection_has_so_many_clients_and_each_is_told():
    before = kept(_Line)  # by what other tests have left to the garbage collector
    with served() as (server, url), zmq_peer(zmq.DEALER, url) as peer:
        most = Limits().sessions_per_connection
        answers = []
        for number in range(200):
            peer.send_multipart([b"%d" % number, b"", asking(number=number)])
            *front, answer = peer.recv_multipart()
            assert front == [b"%d" % number, b""]
            answers.append(unpack(answer))
        assert answers[:most] == [{"number": number} for number in range(most)]
        assert all("error" in answer for answer in answers[most:])
        assert len(server.clients()) == most
        wait_until(lambda: kept(_Line) - before == most)


def test_a_client_that_names_itself_may_come_again():
    """Its name is another connection's by then, and its descriptor perhaps the same."""

    def function(observation, context):
        count = context.session["count"] = context.session.get("count", 0) + 1
        return {"count": count}

    with served(function) as (server, url):
        for _ in range(20):
            with zmq_peer(zmq.REQ, url, routing_id=b"robot") as peer:
                for count in (1, 2):
                    peer.send(asking(x=1))
                    assert unpack(peer.recv()) == {"count": count}
            wait_until(lambda: not server.clients())


def test_who_sends_more_than_the_limit_is_told_once_it_has():
    limits = Limits(message_bytes=1 << 20)
    with served(limits=limits) as (server, url), zmq_peer(zmq.REQ, url) as peer:
        for count, size in enumerate((1 << 20, 32 << 20, 128 << 20), 1):
            peer.send(asking(image=np.zeros(size, np.uint8)))
            assert "Limits.message_bytes" in unpack(peer.recv())["error"]
            peer.send(asking(x=1))
            assert unpack(peer.recv()) == {"x": 1}
            assert server.stats()["Malformed"] == count


def test_a_request_of_countless_frames_takes_up_nothing_and_is_answered():
    with served() as (server, url), Client(url) as good, closing(Wire(url)) as wire:
        before = resident_memory() if sys.platform == "linux" else 0
        for _ in range(60):  # 4 MB, which would take 120
            wire.socket.sendall(b"\x01\x00" * (1 << 15))
            with took(at_most=3.0):
                assert good.call({"x": 1}) == {"x": 1}
        wire.socket.sendall(b"\x00\x00")
        delimiter, answer = wire.receive()
        assert delimiter == b""
        assert "exactly one frame" in unpack(answer)["error"]
        if sys.platform == "linux":
            assert resident_memory() - before < 16 << 20
        assert server.stats()["Malformed"] == 1
        wire.send(b"", asking(x=2))
        assert unpack(wire.receive()[1]) == {"x": 2}


def test_who_does_not_read_is_sent_a_bounded_number_of_answers():
    limits = Limits(replies_per_client=1 << 22)
    answered = []

    def function(observation):
        answered.append(1)
        return {"image": np.zeros(observation["nbytes"], np.uint8)}

    with served(function, limits=limits) as (server, url):
        wire = Wire(url)
        before = resident_memory()
        for nbytes, count in ((1 << 20, 60), (30_000, 1000)):
            answered.clear()
            for _ in range(count):
                wire.send(b"", asking(nbytes=nbytes))
            wait_until(lambda count=count: len(answered) == count)
        assert server.stats()["Overloaded"] > 500
        if sys.platform == "linux":
            assert resident_memory() - before < 32 << 20
        heard = [unpack(wire.receive()[1]) for _ in range(1060)]  # but there is one for each
        told = [answer["error"] for answer in heard if "error" in answer]
        assert len(told) == server.stats()["Overloaded"]
        assert "not read" in told[0]
        wire.send(b"", asking(nbytes=1))
        assert len(unpack(wire.receive()[1])["image"]) == 1
        wire.close()


def test_all_that_wait_are_told_that_the_server_stops():
    begun, go_on = threading.Event(), threading.Event()

    def function(observation):
        begun.set()
        assert go_on.wait(20)

    with (
        served(function) as (server, url),
        zmq_peer(zmq.DEALER, url) as one,
        zmq_peer(zmq.REQ, url) as two,
    ):
        for number in range(3):
            one.send_multipart([b"", asking(number=number)])
        one.send_multipart([b"", b"1", b"2"])
        two.send(asking(number=3))
        assert begun.wait(10)
        wait_until(lambda: server.stats()["calls_by_groot"] == 2)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        try:
            for _ in range(4):
                assert unpack(one.recv_multipart()[1]).keys() == {"error"}
            assert "stopped" in unpack(two.recv())["error"]
        finally:
            go_on.set()
            stopping.join()


def test_of_too_many_connections_the_last_are_refused_and_those_that_say_nothing_go():
    limits = Limits(connections_per_address=6, handshake=1.5)
    with served(limits=limits) as (server, url), ExitStack() as stack:
        good = [stack.enter_context(Client(url)) for _ in range(3)]
        for each in good:
            each.call({"x": 1})
        silent = [stack.enter_context(dial(url)) for _ in range(5)]
        for each in reversed(silent):
            hear_out(each)
        wait_until(lambda: server.stats().get("HandshakeTimeout", 0) == 3)
        assert server.stats()["Overloaded"] == 2

        def comes_in() -> bool:
            with suppress(ConnectionError):
                late = stack.enter_context(Client(url))
                assert late.call({"x": 2}) == {"x": 2}
                return True
            return False

        for _ in range(3):
            wait_until(comes_in)
        for each in good:
            assert each.call({"x": 3}) == {"x": 3}


def test_what_comes_while_it_closes_is_answered(monkeypatch):
    monkeypatch.setattr("edgeml_groot.endpoint._LAST", 10.0)
    monkeypatch.setattr("edgeml_groot.endpoint._QUIET", 1.0)
    begun = threading.Event()
    stop = GrootEndpoint._stop

    async def tell_and_stop(endpoint):
        begun.set()
        await stop(endpoint)

    monkeypatch.setattr(GrootEndpoint, "_stop", tell_and_stop)
    with served() as (server, url), Client(url) as client:
        client.call({"x": 1})
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert begun.wait(10)
        client.wire.send(b"", asking(x=2))
        assert "stopped" in unpack(client.wire.receive()[1])["error"]
        client.close()
        stopping.join()


# What ZeroMQ's protocol allows -------------------------------------------------------------


def command(name: bytes, said: bytes = b"") -> bytes:
    content = bytes([len(name)]) + name + said
    return bytes([6]) + struct.pack(">Q", len(content)) + content


def prop(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def greeting(mechanism: bytes = b"NULL", major: int = 3) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f" + bytes([major, 0]) + mechanism.ljust(20, b"\0") + bytes(32)


def ready(kind: bytes = b"REQ", **properties: bytes) -> bytes:
    more = b"".join(prop(name.encode(), value) for name, value in properties.items())
    return command(b"READY", prop(b"Socket-Type", kind) + more)


def frame(content: bytes, more: bool = False) -> bytes:
    return bytes([more, len(content)]) + content


def hear(sock: socket.socket, ending: bytes) -> bytes:
    heard = b""
    while not heard.endswith(ending):
        data = sock.recv(1 << 16)
        assert data
        heard += data
    return heard


def test_a_peer_may_call_itself_anything_and_hurts_nobody():
    """As libzmq would call others: its ROUTER ends the process when it comes to that name."""
    names = [b"\0" + struct.pack(">I", number) for number in range(64)]
    names += [b"", b"\0", b"robot", b"robot", b"\xff" * 255, bytes(1000)]
    with served() as (server, url), ExitStack() as stack:
        peers = []
        for number, name in enumerate(names):
            peers.append(stack.enter_context(dial(url)))
            said = greeting() + ready(Identity=name) + frame(b"", True)
            peers[-1].sendall(said + frame(asking(number=number)))
        for number, peer in enumerate(peers):
            hear(peer, frame(b"", True) + frame(asking(number=number)[6:]))
        for name in (b"robot", b"\0\0\0\0\1"):  # as libzmq would not let one do
            with suppress(zmq.ZMQError), zmq_peer(zmq.REQ, url, routing_id=name) as peer:
                peer.send(asking(x=1))
                assert unpack(peer.recv()) == {"x": 1}
        assert len(server.clients()) >= len(names)


def test_what_comes_byte_by_byte_and_what_comes_at_once_are_the_same(echo):
    said = greeting() + ready(b"DEALER", Identity=b"me", **{"X-More": bytes(300)})
    said += (
        command(b"PING", b"\0\0") + frame(b"a" * 255, True) + command(b"WHAT") + frame(b"", True)
    )
    said += b"\2" + struct.pack(">Q", len(asking(x=7))) + asking(x=7)
    ending = frame(b"a" * 255, True) + frame(b"", True) + frame(asking(x=7)[6:])
    heard = []
    for size in (1, 2, 7, 64, len(said)):
        with dial(echo) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(said), size):
                sock.sendall(said[at : at + size])
            heard.append(hear(sock, ending))
    assert heard.count(heard[0]) == len(heard)
    assert frame(b"\4PONG")[1:] in heard[0]


def test_a_ping_is_answered_with_its_context_and_who_promised_to_speak_is_given_up():
    with served() as (server, url):
        with closing(Wire(url)) as wire:
            wire.socket.sendall(command(b"PING", b"\0\0" + b"sixteen bytes at most"))
            assert wire._receive() == (False, b"\4PONGsixteen bytes at")
            wire.socket.sendall(command(b"PING", struct.pack(">H", 2)))  # tenths of a second
            assert wire._receive() == (False, b"\4PONG")
            with took(at_most=2.0), pytest.raises(ConnectionError):
                wire._receive()
        assert server.stats()["Stalled"] == 1


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        greeting(b"CURVE"),
        greeting(b"PLAIN"),
        greeting(major=2),
        greeting() + frame(b"", True) + frame(b"x"),
        greeting() + command(b"HELLO"),
        greeting() + command(b""),
        greeting() + b"\4\0",
        greeting() + command(b"READY"),
        greeting() + command(b"READY", b"\xff"),
        greeting() + command(b"READY", b"\x0bSocket-Type\xff\xff\xff\xffREQ"),
        greeting() + ready(b"SUB"),
        greeting() + ready(b"REQ", More=bytes(5000)),
        greeting() + ready() + b"\x08\0",
        greeting() + ready() + b"\5\0",
        greeting() + ready() + b"\2" + b"\xff" * 8,
        greeting() + ready() + b"\6" + struct.pack(">Q", 1 << 40),
    ],
)
def test_what_is_no_zeromq_of_ours_is_cut_off_and_counted_once(said):
    with served() as (server, url), Client(url) as good:
        with dial(url) as sock:
            sock.sendall(said)
            with took(at_most=2.0):
                hear_out(sock)
        wait_until(lambda: server.stats().get("Malformed", 0) == 1)
        assert good.call({"x": 1}) == {"x": 1}
        assert server.stats()["Malformed"] == 1


def test_what_is_only_said_to_come_keeps_nobody_out_and_small_requests_nothing():
    limits = Limits(bytes=2 << 20)  # of one machine half
    head = frame(b"", True) + b"\2" + struct.pack(">Q", 1 << 20)
    large, small = asking(image=np.zeros(300_000, np.uint8)), asking(x=1)
    with served(lambda _: {}, limits=limits) as (_, url), ExitStack() as stack:
        wires = [stack.enter_context(closing(Wire(url))) for _ in range(8)]
        for wire in wires[:5]:
            wire.socket.sendall(head + b"x")

        good, slow = wires[6], wires[7]

        def ask(request: bytes) -> Any:
            good.send(b"", request)
            return unpack(good.receive()[1])

        def pass_rounds(number: int) -> None:
            """Let the door read all that came before, in as many parts at most."""
            for _ in range(number):
                assert ask(small) == {}

        def ask_slowly() -> str:
            said = frame(b"", True) + b"\2" + struct.pack(">Q", len(large)) + large
            slow.socket.sendall(said[:200_000])
            pass_rounds(3)
            slow.socket.sendall(said[200_000:])
            return unpack(slow.receive()[1]).get("error", "")

        assert ask(large) == {}
        assert ask_slowly() == ""
        wires[5].socket.sendall(head + bytes((1 << 20) - 1))
        pass_rounds(100)
        assert "on their way" in ask_slowly()
        wires[5].socket.sendall(b"x")
        assert "error" in unpack(wires[5].receive()[1])  # as it was nothing of GR00T's
        assert ask_slowly() == ""


def test_a_message_that_comes_for_ever_is_given_up():
    with served(limits=Limits(stall=0.1)) as (server, url), closing(Wire(url)) as wire:
        slowest, began = 0.0, time.monotonic()
        with took(at_most=5.0), suppress(ConnectionError):
            wire.socket.sendall(frame(b"", True) + b"\2" + struct.pack(">Q", 1 << 20))
            for _ in range(500):
                last = time.monotonic()
                wire.socket.sendall(b"x")
                time.sleep(0.02)
                slowest = max(slowest, time.monotonic() - last)
        # Where nothing came for so long, as the machine was busy, it was given up for that.
        assert time.monotonic() - began > 0.9 or slowest > 0.08
        wait_until(lambda: server.stats().get("Stalled", 0) == 1)


def test_a_socket_that_cannot_ask_is_told_in_zeromqs_words(echo):
    with dial(echo) as sock:
        sock.sendall(greeting() + ready(b"SUB"))
        heard = b""
        with suppress(ConnectionError):
            while said := sock.recv(4096):
                heard += said
    assert b"\5ERROR" in heard
    assert b"use a REQ" in heard


def test_heartbeats_keep_a_client_that_waits():
    go_on = threading.Event()
    with (
        served(lambda observation: go_on.wait(observation["seconds"]) or observation) as (_, url),
        zmq_peer(zmq.REQ, url, heartbeat_ivl=50, heartbeat_timeout=200, heartbeat_ttl=300) as peer,
        peer.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor,
    ):
        for seconds in (1.0, 0.0):
            peer.send(asking(seconds=seconds))
            assert unpack(peer.recv()) == {"seconds": seconds}
        assert not monitor.poll(0)
        peer.disable_monitor()


def test_a_req_that_gave_up_and_asks_again_gets_the_second_answer_and_keeps_its_session():
    """REQ_RELAXED lets it, and by REQ_CORRELATE a number comes in front of each request."""
    begun, go_on = threading.Event(), threading.Event()

    def function(observation, context):
        if observation["x"] == 30:
            begun.set()
            assert go_on.wait(10)
        context.session["count"] = count = context.session.get("count", 0) + 1
        return {"x": observation["x"], "count": count}

    with (
        served(function, workers=2) as (server, url),
        zmq_peer(zmq.REQ, url, req_relaxed=1, req_correlate=1) as peer,
    ):
        for number in range(30):
            peer.send(asking(x=number))
            assert unpack(peer.recv()) == {"x": number, "count": number + 1}
        peer.send(asking(x=30))
        assert begun.wait(10)
        peer.send(asking(x=31))
        peer.send(asking(x=32))
        go_on.set()
        assert unpack(peer.recv()) == {"x": 32, "count": 33}
        assert len(server.clients()) == 1


def test_a_req_that_asks_on_and_on_is_cut_off():
    """By numbers in front of its requests no two of which are the same."""
    go_on = threading.Event()
    limits = Limits(calls_per_client=10)
    with served(lambda _: go_on.wait(20) and {}, limits=limits) as (server, url):
        with closing(Wire(url)) as wire, suppress(ConnectionError):
            for number in range(1000):
                wire.send(b"%d" % number, b"", asking(x=1))
            wire.receive()
        wait_until(lambda: not server.clients())
        go_on.set()
        with Client(url) as client:
            assert client.call({"x": 1}) == {}


def test_what_lingers_is_sent_and_who_is_gone_amid_a_request_is_forgotten():
    begun, go_on, ran = threading.Semaphore(0), threading.Event(), []

    def function(observation):
        ran.append(observation["x"])
        begun.release()
        assert go_on.wait(10)
        return observation

    with served(function, workers=2) as (server, url):
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.linger = 10_000
            peer.connect(f"tcp://127.0.0.1:{url.port}")
            peer.send_multipart([b"", PING])  # or it may be gone before it is begun
            peer.recv_multipart()
            peer.send_multipart([b"", asking(x=1, image=np.zeros(1 << 20, np.uint8))])
            assert begun.acquire(timeout=10)
            peer.send_multipart([b"", asking(x=0, image=np.zeros(1 << 23, np.uint8))])
        wait_until(lambda: server.stats()["calls_by_groot"] == 2 or not server.clients())
        wait_until(lambda: not server.clients())
        go_on.set()
        with Wire(url).socket as half:
            half.sendall(b"\1\0\2" + struct.pack(">Q", 1 << 20) + bytes(1 << 19))
        with Client(url) as client:
            assert client.call({"x": 2}) == {"x": 2}
        assert [x for x in ran if x] == [1, 2]


def test_who_sends_ahead_and_goes_fills_no_log(caplog):
    ahead = (b"\1\0" + bytes((0, len(PING))) + PING) * 2000  # each an empty frame and one more
    with served(lambda observation: observation) as (_, url):
        for _ in range(10):
            with closing(Wire(url)) as wire:
                reset = struct.pack("ii", 1, 0)
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                wire.socket.sendall(ahead)
        with Client(url) as client:
            assert client.call({"x": 1}) == {"x": 1}
    assert len(caplog.records) < 10, caplog.text


# What is asked ----------------------------------------------------------------------------


@pytest.fixture
def asked(echo):
    """A client, whose `ask` is as an older client asks."""
    with Client(echo) as made:
        yield made


def test_an_older_client_asks_with_the_observation_and_gets_the_action(asked):
    state = np.arange(3, dtype=np.float32)
    answer = asked.ask("get_action", {"state": state, "task": "pick"})
    assert answer.keys() == {"state", "task"}
    assert answer["state"].dtype == np.float32
    assert answer["state"].tolist() == [0, 1, 2]


def test_a_newer_client_asks_with_options_and_gets_an_info_as_well():
    got = []

    def function(observation):
        got.append(observation)
        if observation.get("informed"):
            return {"arm": np.ones(2)}, {"value": 7}
        return {"arm": np.ones(2)}

    with served(function) as (_, url), Client(url) as client:
        for options in (None, {}, {"speed": 2}):
            observation = {"state": {"arm": [1.0]}}
            data = {"observation": observation, "options": options}
            action, info = client.ask("get_action", data)
            assert action["arm"].tolist() == [1, 1]
            assert info == {}
            assert got.pop() == {**observation, **({"options": options} if options else {})}
        _, info = client.ask(None, {"observation": {"informed": True}})  # get_action, too
        assert info == {"value": 7}
        assert client.ask(None, {"informed": True})["arm"].tolist() == [1, 1]
        with pytest.raises(Refused, match="options"):
            client.ask(None, {"observation": {"options": 1}, "options": {"speed": 2}})


def test_a_client_is_answered_as_it_asks_each_time(asked):
    for _ in range(2):
        assert asked.ask("get_action", {"x": 1}) == {"x": 1}
        assert asked.ask("get_action", {"observation": {"x": 1}, "options": None}) == [{"x": 1}, {}]
    assert asked.ask("get_action") == {}


def test_a_ping_tells_what_the_server_is_at():
    go_on = threading.Event()

    def load(report):
        report(0.25, "reading weights")
        assert go_on.wait(10)

    with InferenceServer(url="inproc://127.0.0.1:0") as server:
        server.register_interface("policy", lambda observation: observation)
        server.load(load)
        server.open_door("groot://127.0.0.1:0")
        server.start(threaded=True)
        with Client(Url.parse(server.doors()[0])) as client:
            wait_until(lambda: server.state().progress > 0)
            said = client.ask("ping")
            assert said["status"] == "loading"
            assert "25%" in said["message"]
            assert "reading weights" in said["message"]
            with pytest.raises(Refused, match="loading"):
                client.call({"x": 1})
            go_on.set()
            wait_until(lambda: server.state().state == "ready")
            assert client.ask("ping") == {"status": "ok", "message": "Server is running"}


def test_a_reset_begins_an_episode_between_two_calls():
    ended = []

    def function(observation, context):
        context.on_end(lambda: ended.append(observation["number"]))
        return {}

    with served(function) as (_, url), Client(url) as client:
        for number, data in enumerate((None, {}, {"options": None}, {"options": {"seed": 1}})):
            client.ask(None, {"number": number})
            assert client.ask("reset", data) == {}
            wait_until(lambda number=number: ended == list(range(number + 1)))
        with pytest.raises(Refused, match="options"):
            client.ask("reset", {"options": 7})
        with pytest.raises(Refused, match="map"):
            client.ask("reset", [1])


def test_no_client_stops_the_server(asked, echo):
    with pytest.raises(Refused, match="can't stop"):
        asked.ask("kill")
    with Client(echo) as other:
        assert other.ask("ping")["status"] == "ok"
    assert asked.ask("ping")["status"] == "ok"


def test_an_unknown_endpoint_is_told_those_that_there_are(asked):
    with pytest.raises(Refused, match=r"Unknown endpoint: get_weather.*get_action.*reset"):
        asked.ask("get_weather", {"x": 1})
    with pytest.raises(Refused, match=r"Unknown endpoint: a\\nb"):
        asked.ask("a\nb")


def test_what_a_policy_works_with_is_told_from_metadata():
    metadata = {
        "video": {"delta_indices": [0], "modality_keys": ["front"]},
        "state": '{"delta_indices": [0], "modality_keys": ["arm"]}',
        "note": "not a modality",
    }
    with served(door={"metadata": metadata}) as (_, url), Client(url) as client:
        told = client.ask("get_modality_config")
    assert told["note"] == "not a modality"
    for name in ("video", "state"):  # both words for it
        assert told[name].pop("__ModalityConfig_class__") is True
        assert told[name].pop("__ModalityConfig__") is True
        assert told[name] == {"as_json": metadata[name]}


def test_what_a_policy_works_with_is_told_from_its_contract():
    contract = PolicyContract(
        observation={
            "video": {"front": Feature((64, 64, 3), np.uint8)},
            "wrist": Feature((64, 64, 3), np.uint8),
            "depth": Feature((64, 64), np.uint8, kind="depth"),
            "state": {"arm": Feature((7,), np.float32)},
            "gripper": Feature((1,), np.float32),
            "task": Feature((), str),
        },
        action={"arm": Feature((4, 7), np.float32)},
        horizon=4,
    )
    with InferenceServer(url="inproc://127.0.0.1:0") as server:
        server.register_interface("policy", lambda observation: {}, contract=contract)
        server.open_door("groot://127.0.0.1:0")
        with server.serving(), Client(Url.parse(server.doors()[0])) as client:
            told = client.ask("get_modality_config")
    assert {name: each["as_json"] for name, each in told.items()} == {
        "video": {"delta_indices": [0], "modality_keys": ["front", "wrist"]},
        "state": {"delta_indices": [0], "modality_keys": ["depth", "arm", "gripper"]},
        "language": {"delta_indices": [0], "modality_keys": ["task"]},
        "action": {"delta_indices": [0, 1, 2, 3], "modality_keys": ["arm"]},
    }


def test_a_policy_of_which_nothing_is_said_works_with_nothing(asked):
    assert asked.ask("get_modality_config") == {}


def test_a_token_is_asked_for_whatever_is_asked(tmp_path):
    keys = make_keys(tmp_path)
    with served(credentials=keys["server"]) as (server, url):
        token = (keys["robot"] / "token").read_text().strip()
        with Client(url) as client:
            for endpoint in ("ping", "reset", "get_modality_config", "kill", "get_action", "what"):
                with pytest.raises(Refused, match="Unauthorized"):
                    client.ask(endpoint)
            client.token = {"api_token": token}
            assert client.ask("ping")["status"] == "ok"
            assert client.ask(None, {"x": 1}) == {"x": 1}
            assert len(server.clients()) == 1
            client.token = {}  # each request shows it
            with pytest.raises(Refused, match="Unauthorized"):
                client.ask("ping")
            assert not server.clients()


def test_who_shows_other_tokens_in_a_row_is_answered_in_order(tmp_path):
    before = kept(_Line)
    keys = make_keys(tmp_path)
    token = (keys["robot"] / "token").read_text().strip()

    def function(observation):
        time.sleep(0.01)
        return observation

    with (
        served(function, credentials=keys["server"]) as (_, url),
        zmq_peer(zmq.DEALER, url) as peer,
    ):
        shown = [token, "another", None, token, None, None, token, "another", token] * 5
        for number, each in enumerate(shown):
            said = {} if each is None else {"api_token": each}
            peer.send_multipart([b"", pack({"data": {"number": number}, **said})])
        for number, each in enumerate(shown):
            answer = unpack(peer.recv_multipart()[1])
            if each == token:
                assert answer == {"number": number}
            else:
                assert "Unauthorized" in answer["error"]
    wait_until(lambda: kept(_Line) <= before)


def test_a_door_has_no_path_and_names_what_it_is_made_of():
    with InferenceServer(url="inproc://127.0.0.1:0") as server:
        server.register_interface("policy", lambda observation: observation)
        server.open_door("groot://127.0.0.1:0/path")
        with pytest.raises(ValueError, match="path"):
            server.start(threaded=True)
    assert plugins.load_door("groot").report()["ZMTP"] == "3.1"
