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
from edgeml_groot.connections import Connections
from edgeml_groot.endpoint import GrootEndpoint, _Line, _Refused

from edgeml import Feature, InferenceServer, Limits, PolicyContract
from edgeml.core import Url, plugins
from edgeml.testing import DoorTests, Refused
from edgeml.testing.ends import resident_memory
from edgeml.testing.stopwatch import Stopwatch
from groot_client import Client, Polite, Wire, dial, pack, unpack
from pairs import long_form, make_keys, run_fresh, took, wait_until


@pytest.fixture(scope="module", autouse=True)
def _pyzmqs_thread() -> None:
    """pyzmq keeps one for the whole process from the first message that is sent in place."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as one, context.socket(zmq.PULL) as two:
        port = two.bind_to_random_port("tcp://127.0.0.1")
        one.connect(f"tcp://127.0.0.1:{port}")
        one.send(bytes(1 << 17), copy=False)
        two.recv()


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    width = "<H" if version == b"\1\0" else "<I"
    return b"\x93NUMPY" + version + struct.pack(width, len(header)) + header.encode() + data


class TestGroot(DoorTests):
    url = "groot://127.0.0.1:0"
    client = Client
    keys_each_call = True

    def dial(self, url: Url) -> Polite:
        return dial(url)

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


def kept(kind: type) -> int:
    """How many objects of a class there are."""
    return sum(type(each) is kind for each in gc.get_objects())


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


def test_a_client_of_a_libzmq_of_old_is_told_so(echo):
    greeting = b"\xff" + bytes(8) + b"\x7f\x01\x03" + b"\0\0"  # ZMTP 2, a REQ without a name
    with dial(echo) as old:
        old.sendall(greeting + b"\x01\0" + b"\0\x01\x80")
        heard = b""
        while b"ZMTP 3" not in heard:
            heard += old.recv(4096)
    with zmq_peer(zmq.REQ, echo) as peer:
        peer.send(asking(x=1))
        assert unpack(peer.recv()) == {"x": 1}


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
                with took(at_most=1.0):
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
    monkeypatch.setattr("edgeml_groot.endpoint._FORGET", 0.5)
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


def test_who_sends_more_than_the_limit_is_told_if_libzmq_takes_it():
    limits = Limits(message_bytes=1 << 20)
    with served(limits=limits) as (server, url):
        with zmq_peer(zmq.REQ, url) as peer:
            peer.send(asking(image=np.zeros(32 << 20, np.uint8)))
            assert "Limits.message_bytes" in unpack(peer.recv())["error"]
            peer.send(asking(x=1))
            assert unpack(peer.recv()) == {"x": 1}
        assert server.stats()["Malformed"] == 1
        wire = Wire(url)
        wire.socket.sendall(b"\x01\x00\x02" + struct.pack(">Q", 1 << 27))
        with pytest.raises(ConnectionError):
            wire.receive()
        wire.close()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is told by Linux")
def test_a_request_of_countless_frames_is_given_up():
    with served(limits=Limits(bytes_per_client=1 << 25)) as (server, url), Client(url) as good:
        wire = Wire(url)
        wire.socket.settimeout(1.0)
        before = resident_memory()
        with suppress(OSError):
            for _ in range(300):  # 19 MB, which would take 600
                wire.socket.sendall(b"\x01\x00" * (1 << 15))
                assert good.call({"x": 1}) == {"x": 1}
        wait_until(lambda: server.stats().get("Overloaded", 0) == 1)
        assert resident_memory() - before < 400 << 20
        wire.close()
        assert good.call({"x": 1}) == {"x": 1}


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


def hear_out(sock: Polite) -> None:
    """Read until the other end has hung up."""
    with suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass


def test_of_too_many_connections_those_that_said_nothing_go_first():
    with served(limits=Limits(connections_per_address=6)) as (server, url), ExitStack() as stack:
        good = [stack.enter_context(Client(url)) for _ in range(3)]
        for each in good:
            each.call({"x": 1})
        silent = [stack.enter_context(dial(url)) for _ in range(5)]
        wait_until(lambda: server.stats().get("Overloaded", 0) == 2)
        for oldest in silent[:2]:
            hear_out(oldest)
        late = [stack.enter_context(Client(url)) for _ in range(3)]
        for each in good + late:
            assert each.call({"x": 2}) == {"x": 2}
        assert server.stats()["Overloaded"] == 5
        with dial(url) as last:  # when all have something to say
            hear_out(last)
        for each in good + late:
            assert each.call({"x": 3}) == {"x": 3}


def test_what_comes_while_it_closes_is_answered(monkeypatch):
    closing, sent = threading.Event(), threading.Event()
    empty_outbox = GrootEndpoint._empty_outbox

    def empty_slowly(endpoint):
        if endpoint._closed:
            closing.set()
            assert sent.wait(10)
        empty_outbox(endpoint)

    monkeypatch.setattr(GrootEndpoint, "_empty_outbox", empty_slowly)
    with served() as (server, url), Client(url) as client:
        client.call({"x": 1})
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert closing.wait(10)
        client.wire.send(b"", asking(x=2))
        sent.set()
        assert "stopped" in unpack(client.wire.receive()[1])["error"]
        stopping.join()


def test_a_connection_is_not_taken_for_the_one_before():
    """Which had the same name, and most likely the same descriptor."""
    ended = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        there = Connections(context, router, Limits(), 1 << 20, print, ended.append)
        there.port = router.bind_to_random_port("tcp://127.0.0.1")
        router.rcvtimeo = 10_000
        found = []
        for _ in range(5):
            with zmq_peer(zmq.REQ, Url("groot", port=there.port), routing_id=b"robot") as peer:
                peer.send(b"x")
                assert router.recv() == b"robot"
                descriptor = router.recv(copy=False).get(zmq.SRCFD)
                router.recv()
                address = (b"robot", b"")
                connection = there.find(descriptor, address)
                assert connection not in found
                connection.lines[address] = connection
                found.append(connection)
            # libzmq tells of its end before the name is free for another.
            wait_until(there.monitor.poll)
        assert ended == found[:-1]
        there.close()


FIRST_NAME = """
import sys, zmq
sys.path.insert(0, {plugin!r})
from edgeml.core import Limits, Url
from edgeml_groot.endpoint import GrootEndpoint
for _ in range(2):
    with GrootEndpoint(Url("groot"), None, Limits()) as endpoint:
        take, names = endpoint._take, []
        endpoint._take = lambda name, *more: (names.append(name[1:].hex()), take(name, *more))
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.connect(f"tcp://127.0.0.1:{{endpoint.url.port}}")
            peer.send(b"x")
            peer.recv()
        print(*names)
"""


def test_what_a_router_calls_its_first_peer_cannot_be_foreseen():
    """libzmq counts from what C's rand() gives, in a fresh process always the same."""
    plugin = next(path for path in sys.path if path.endswith("edgeml-groot"))
    program = FIRST_NAME.format(plugin=plugin)
    names = [name for _ in range(2) for name in run_fresh(program)[0].split()]
    assert len(set(names)) == 4


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
    assert plugins.load_door("groot").report()["ZeroMQ"] == zmq.zmq_version()
