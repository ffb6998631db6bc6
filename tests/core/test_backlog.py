"""How long an endpoint has been behind with reading, and what a server that is does."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import closing

import pytest

from edgeml import Overloaded
from edgeml.core.dispatch import answer_with
from edgeml.core.message import Message
from edgeml.core.plugins import load_transport
from edgeml.core.server import Server
from edgeml.core.url import resolve
from pairs import wait_until
from test_session import client_of, opened

KNOWING = ["shm", "ws", "zmq"]


@pytest.mark.parametrize("name", KNOWING)
def test_what_is_read_late_shows_how_late_it_may_be(name):
    behind = []

    def on_request(message, reply):
        behind.append(endpoint.behind)
        time.sleep(0.01)
        reply(message)

    way = load_transport(resolve(name, "127.0.0.1", 0)[0].scheme)
    endpoint = way.serve(resolve(name, "127.0.0.1", 0)[0], on_request)
    with endpoint, way.connect(endpoint.url, 5.0) as requester:
        for future in [requester.request(Message(b"")) for _ in range(40)]:
            future.result(10)
    # The first few may have been read before the others came.
    assert behind[-1] > 0.2
    assert all(later >= at for at, later in itertools.pairwise(behind[10:]))


class Policy:
    """Answers with what it is given, and takes its time, or as much as the test wants, if told."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def __call__(self, payload, _):
        if payload == "slow":
            time.sleep(0.02)
        elif payload == "held":
            assert self.free.wait(30)
        return payload


@pytest.fixture
def policy():
    made = Policy()
    yield made
    made.free.set()


@pytest.fixture
def busy(monkeypatch, transport, policy):
    """A server whose callers are refused, and which is said to be behind with reading."""
    server = Server("inference", resolve(transport, "127.0.0.1", 0))
    server.register("policy", answer_with(policy))
    with closing(opened(server)):
        kinds = {type(end) for end in server._endpoints()}
        for kind in kinds:
            monkeypatch.setattr(kind, "behind", property(lambda _: 2.0))
        yield server


def test_where_calls_are_refused_those_that_may_have_lain_long_are_so_unseen(busy, policy):
    asked = ["held", *range(300)]  # of 20 ms each, as the server has it
    with closing(client_of(busy)) as client:
        for _ in range(5):
            client.call("policy", "slow")
        patient = [client.call_async("policy", each, timeout=30) for each in asked]
        wait_until(lambda: busy.dispatcher.waiting == len(asked) - 1)
        # Who wants his answer before all those has none, and is told so; not by all at first.
        for told in ("takes", *["not looked at"] * 3):
            with pytest.raises(Overloaded, match=told):
                client.call("policy", 0, timeout=4)
        last = client.call_async("policy", "last", timeout=20)
        policy.free.set()
        assert [future.result(20) for future in (*patient, last)] == [*asked, "last"]
        stats = busy.stats()
        assert (stats["refused_unread"], stats["refused_too_busy"]) == (3, 1)
        assert stats["Overloaded"] == 4


def test_where_nothing_is_refused_it_does_not_matter(busy):
    with closing(client_of(busy)) as client:
        for _ in range(10):
            assert client.call("policy", "slow", timeout=4) == "slow"
        assert "refused_unread" not in busy.stats()
