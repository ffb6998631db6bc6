"""What functions are told of a call and may keep about its client, and when that ends."""

from __future__ import annotations

import functools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import edgeml.core.server
from edgeml import Context, InferenceClient, InferenceServer, Malformed
from edgeml.core.client import Client
from edgeml.core.url import Url
from edgeml.services.batching import Batching
from pairs import free_port, plain_client, process, started, stop_server, took, wait_until

PATIENCE = 20.0
NETWORKS = ["grpc", "shm", "ws", "zmq"]  # which lead to other processes


class Counter:
    """Counts each client's calls in its session, and notes the ends of sessions."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, int]] = []
        self.threads: set[int] = set()

    def __call__(self, payload, context: Context) -> int:
        self.threads.add(threading.get_ident())
        session = context.session
        if not session:
            session["calls"] = 0
            context.on_end(lambda: self._end(context.client_id, session))
        session["calls"] += 1
        return session["calls"]

    def _end(self, who: str, session) -> None:
        self.threads.add(threading.get_ident())
        self.ended.append((who, session["calls"]))


@pytest.fixture
def server(transport):
    with started(InferenceServer(0, transport=transport)) as server:
        yield server


@pytest.fixture
def counter(server):
    counter = Counter()
    server.register_interface("count", counter)
    return counter


def client_of(server, client_id=None, **settings) -> InferenceClient:
    return InferenceClient(url=server.url, client_id=client_id, **settings)


# What a function is told ------------------------------------------------------------------


def test_a_function_is_told_who_calls_and_until_when_they_wait(server):
    seen: list[Context] = []
    server.register_interface("policy", lambda payload, context: seen.append(context))
    with client_of(server, "robot-7") as client:
        before = time.monotonic()
        client.call("policy", 1, timeout=20)
        episode = client.reset()
        client.call("policy", 2, timeout=20)
        assert client.reset("grasp 12") == "grasp 12"
        client.call("policy", 3)
    context = seen[0]
    assert (context.name, context.client_id, context.label) == ("policy", "robot-7", "")
    assert context.identity is None
    assert before + 19.0 < context.deadline < time.monotonic() + 20.0
    assert context.session == {}
    assert [context.episode for context in seen] == ["", episode, "grasp 12"]


def prefixed(prefix, payload, context):
    return prefix + context.client_id


class Method:
    def __call__(self, payload, context):
        return context.client_id

    def policy(self, payload, context):
        return context.client_id


def with_default(payload, scale=2):
    return payload * scale


def named(payload, context=None):
    return context.client_id


def two(observation, who):
    return who.client_id


@pytest.mark.parametrize(
    ("function", "flag", "expected"),
    [
        (Method(), None, "me"),
        (Method().policy, None, "me"),
        (functools.partial(prefixed, ">"), None, ">me"),
        (named, None, "me"),
        (two, None, "me"),
        (lambda *arguments: arguments[1].client_id, True, "me"),
        (with_default, None, 42),
        (abs, None, 21),
        (lambda payload, **more: payload, None, 21),
        (lambda payload, context=1: context, False, 1),
    ],
    ids=["object", "method", "partial", "named", "two", "flag", "default", "abs", "more", "not"],
)
def test_whether_a_function_takes_a_context_is_told_by_its_signature_or_a_flag(
    function, flag, expected
):
    with started(InferenceServer(0, transport="inproc")) as server:
        server.register_interface("policy", function, with_context=flag)
        with client_of(server, "me") as client:
            assert client.call("policy", 21) == expected


def test_an_episodes_id_that_is_none_is_refused(server, counter):
    with plain_client(server) as client:
        assert client.call("count", None) == 1
        for episode in (None, 7, "x" * 201, ["a"]):
            with pytest.raises(Malformed, match="at most 200"):
                client.call("/reset", episode)
        assert client.call("count", None) == 2


# What is kept -----------------------------------------------------------------------------


def test_each_client_has_a_session_of_its_own_until_it_resets_or_leaves(server, counter):
    with client_of(server, "a") as a, client_of(server, "b") as b:
        assert [a.call("count", None) for _ in range(3)] == [1, 2, 3]
        assert b.call("count", None) == 1
        a.reset()
        wait_until(lambda: counter.ended == [("a", 3)])
        assert a.call("count", None) == 1
        assert b.call("count", None) == 2
    wait_until(lambda: sorted(counter.ended) == [("a", 1), ("a", 3), ("b", 2)])
    assert len(counter.threads) == 1  # that of the handlers
    with client_of(server, "a") as again:  # another run of the same robot's program
        assert again.call("count", None) == 1


def test_two_clients_that_call_themselves_the_same_share_nothing(server, counter):
    with client_of(server, "robot") as one, client_of(server, "robot") as other:
        assert one.call("count", None) == 1
        assert other.call("count", None) == 1
        assert one.call("count", None) == 2


def test_the_ends_of_sessions_come_when_the_server_stops(transport):
    counter = Counter()
    server = InferenceServer(0, transport=transport)
    server.register_interface("count", counter)
    with started(server), client_of(server, "a") as a, client_of(server, "b") as b:
        a.call("count", None)
        b.call("count", None)
        server.stop()
        assert sorted(counter.ended) == [("a", 1), ("b", 1)]
    assert len(counter.threads) == 1


@pytest.mark.parametrize("transport", NETWORKS)
def test_the_ends_of_sessions_come_in_the_main_thread_where_that_serves(transport):
    program = """
import sys, threading
import edgeml

server = edgeml.InferenceServer(0, transport=sys.argv[1])

@server.register_interface("policy")
def policy(payload, context):
    context.on_end(lambda: print("ended", threading.current_thread().name, flush=True))

@server.load
def load(report):
    print(server.url, flush=True)

server.register_interface("drain", lambda _: server.drain())
server.start()
"""
    with process(program, transport) as child, client_of_process(child) as client:
        client.call("policy", None)
        assert client.call("drain", None) is False
        assert child.line() == "ended MainThread"
        assert child.end() == (0, "")


def client_of_process(child) -> InferenceClient:
    return InferenceClient(url=child.line(), wait_for_server=PATIENCE)


@pytest.mark.parametrize("transport", NETWORKS)
def test_a_client_that_dies_is_forgotten_after_a_silence(transport, monkeypatch):
    monkeypatch.setattr(edgeml.core.server, "_FORGET", 1.0)
    counter = Counter()
    server = InferenceServer(0, transport=transport)
    server.register_interface("count", counter)
    program = """
import sys, time
import edgeml

client = edgeml.InferenceClient(url=sys.argv[1], client_id="dies")
print(client.call("count", None), flush=True)
time.sleep(60)
"""
    with started(server), process(program, server.url) as child:
        assert child.line() == "1"
        child.signal(signal.SIGKILL)
        with took(at_least=0.5, at_most=10.0):
            wait_until(lambda: counter.ended == [("dies", 1)])
    assert len(counter.threads) == 1


def test_what_is_done_at_an_end_may_fail_and_the_newest_is_done_first(server, caplog):
    done = []

    @server.register_interface("policy")
    def policy(payload, context):
        context.on_end(lambda: done.append("first"))
        context.on_end(lambda: 1 / 0)
        context.on_end(lambda: done.append("last"))

    with client_of(server) as client:
        client.call("policy", None)
        client.reset()
        wait_until(lambda: done == ["last", "first"])
        assert client.call("policy", None) is None
    assert "ZeroDivisionError" in caplog.text


# Calls that came before -------------------------------------------------------------------


@pytest.mark.parametrize("batching", [None, Batching(max_size=2)], ids=["single", "batched"])
def test_a_reset_takes_nothing_from_calls_that_came_before_it(transport, batching):
    """They wait behind one that is under way; then a reset comes, and its end waits for them."""
    entered, go_on = threading.Event(), threading.Event()
    seen, ended = [], []

    def policy(payload, context):
        contexts = context if batching else [context]
        entered.set()
        assert go_on.wait(PATIENCE)
        for each in contexts:
            if not each.session:
                each.session["first"] = True
                each.on_end(lambda session=each.session: ended.append(len(seen)))
            seen.append((each.episode, id(each.session)))
        return payload

    server = InferenceServer(0, transport=transport, workers=2)
    server.register_interface("policy", policy, batching=batching, with_context=True)
    with started(server), client_of(server) as client:
        before = [client.call_async("policy", n) for n in range(6)]
        assert entered.wait(PATIENCE)
        wait_until(lambda: server.stats()["waiting"] >= 2)
        resets = ThreadPoolExecutor(1).submit(client.reset, "second")
        try:
            if batching:  # the other worker takes it at once
                assert resets.result(PATIENCE) == "second"
            assert not ended
        finally:
            go_on.set()
        assert [future.result(PATIENCE) for future in before] == list(range(6))
        assert resets.result(PATIENCE) == "second"
        wait_until(lambda: ended)
        assert client.call("policy", 7) == 7
    assert [episode for episode, _ in seen] == [""] * 6 + ["second"]
    assert len({session for _, session in seen[:6]}) == 1
    assert ended[0] == 6  # not before the last of them was answered


# A connection that is lost ----------------------------------------------------------------


def test_a_client_whose_connection_was_lost_finds_its_session_as_it_was(server, counter):
    with plain_client(server, client_id="a") as client:
        assert client.call("count", None) == 1
        for expected in (2, 3):
            client.sessions.current.requester.close()
            assert client.call("count", None) == expected
            assert client.sessions.current.extensions == {"resume": True}
        assert len(server.clients()) == 1
        assert not counter.ended
    wait_until(lambda: counter.ended == [("a", 3)])


def test_a_session_is_only_for_whoever_knows_its_key_and_name(server, counter):
    with plain_client(server, client_id="a") as a:
        assert a.call("count", None) == 1
        key = a.sessions.current.key
        for asked, who in ((b"", "a"), ("text", "a"), ([key], "a"), (bytes(16), "a"), (key, "b")):
            url = Url.parse(server.url)
            client = Client("inference", [url], client_id=who, extensions={"resume": asked})
            try:
                assert client.sessions.current.extensions == {"resume": False}
                assert client.call("count", None) == 1
            finally:
                client.close()
        assert a.call("count", None) == 2


def test_after_a_restart_of_the_server_a_client_has_a_new_session(transport):
    port = free_port()
    with started(InferenceServer(port, transport=transport)) as first:
        first.register_interface("count", Counter())
        with client_of(first, "a") as client:
            assert [client.call("count", None) for _ in range(2)] == [1, 2]
            stop_server(first, client)
            with started(InferenceServer(port, transport=transport)) as second:
                second.register_interface("count", Counter())
                assert client.call("count", None) == 1
