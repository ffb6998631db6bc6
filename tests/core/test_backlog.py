"""How long an endpoint has been behind with reading, and what a server that is does."""

from __future__ import annotations

import itertools
import time
from contextlib import closing

import pytest

from edgeml import EdgemlError, Overloaded
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


def take_long(payload, _):
    time.sleep(0.02)
    return payload


def error_of(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except EdgemlError as error:
        return error


@pytest.fixture
def busy(monkeypatch, transport):
    """A server whose callers are refused, and which is said to be behind with reading."""
    server = Server("inference", resolve(transport, "127.0.0.1", 0))
    server.register("policy", answer_with(take_long))
    with closing(opened(server)):
        kinds = {type(end) for end in server._endpoints()}
        for kind in kinds:
            monkeypatch.setattr(kind, "behind", property(lambda _: 1.0))
        yield server


def test_where_calls_are_refused_those_that_may_have_lain_long_are_so_unseen(busy, transport):
    many = 400 if transport == "grpc" else 100  # which takes some time to read as many
    with closing(client_of(busy)) as client:
        for n in range(5):
            client.call("policy", n)
        patient = [client.call_async("policy", n, timeout=30) for n in range(many)]
        # Who wants his answer before all those has none, and is told so; not by all at first.
        wait_until(lambda: "takes" in str(error_of(client.call, "policy", 0, timeout=0.4)))
        for _ in range(3):
            with pytest.raises(Overloaded, match="not looked at"):
                client.call("policy", 0, timeout=0.4)
        assert client.call("policy", "last", timeout=20) == "last"
        assert [future.result(20) for future in patient] == list(range(many))
        stats = busy.stats()
        assert (stats["refused_unread"], stats["refused_too_busy"]) == (3, 1)
        assert stats["Overloaded"] == 4


def test_where_nothing_is_refused_it_does_not_matter(busy):
    with closing(client_of(busy)) as client:
        for n in range(10):
            assert client.call("policy", n, timeout=0.5) == n
        assert "refused_unread" not in busy.stats()
