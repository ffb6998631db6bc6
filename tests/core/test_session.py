"""What is said in the handshake, and what becomes of a session when its connection is lost."""

from __future__ import annotations

from contextlib import closing

import pytest

from edgeml import Closed, ConfigMismatch, Malformed, NotReady, Unreachable
from edgeml.core import wire
from edgeml.core.client import Client
from edgeml.core.dispatch import answer_with
from edgeml.core.server import Server
from edgeml.core.session import Session, SessionKeeper
from edgeml.core.url import Url, resolve


def server_at(transport: str, port: int = 0) -> Server:
    server = Server("inference", resolve(transport, "127.0.0.1", port))
    server.register("echo", answer_with(lambda payload, _: payload))
    return server


def opened(server: Server) -> Server:
    server.open()
    server.dispatcher.start()
    return server


def client_of(server: Server, **settings) -> Client:
    return Client("inference", [Url.parse(str(server.urls[0]))], **settings)


def test_an_extension_that_both_ends_know_is_agreed_and_others_are_ignored(transport):
    asked = []
    server = server_at(transport)
    server.extend("known", lambda value, caller: asked.append((value, caller.client_id)) or [1])
    server.extend("never asked for", lambda value, caller: 1 / 0)
    with closing(opened(server)):
        wanted = {"known": {"a": [1, 2.5, None]}, "unheard of": True}
        with closing(client_of(server, client_id="me", extensions=wanted)) as client:
            assert client.sessions.current.extensions == {"known": [1]}
            assert client.call("echo", 1) == 1
        with closing(client_of(server)) as client:
            assert client.sessions.current.extensions == {}
    assert asked == [({"a": [1, 2.5, None]}, "me")]


def test_extensions_are_agreed_anew_with_a_server_that_has_restarted(transport):
    first = server_at(transport)
    first.extend("known", lambda value, caller: "first")
    with closing(opened(first)), closing(client_of(first, extensions={"known": 1})) as client:
        assert client.sessions.current.extensions == {"known": "first"}
        port = first.urls[0].port
        first.close()
        second = server_at(transport, port)
        second.extend("known", lambda value, caller: "second")
        with closing(opened(second)):
            assert client.call("echo", 1) == 1
            assert client.sessions.current.extensions["known"] == "second"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigMismatch("known: no"), ConfigMismatch),
        (Malformed("known: garbage"), Malformed),
        (KeyError("known"), Malformed),  # whatever garbage does to who reads it
    ],
)
def test_a_server_may_refuse_a_client_for_what_it_asks(transport, error, expected):
    def refuse(value, caller):
        raise error

    server = server_at(transport)
    server.extend("known", refuse)
    with closing(opened(server)):
        with pytest.raises(expected, match="known"):
            client_of(server, extensions={"known": 1})
        assert not server.callers
        with closing(client_of(server)) as client:
            assert client.call("echo", 1) == 1


def test_a_client_that_is_closed_as_nobody_answers_says_that_it_is_closed(monkeypatch):
    def connect(keeper: SessionKeeper, timeout: float) -> None:
        keeper.close()
        raise Unreachable("nobody answers")

    monkeypatch.setattr(SessionKeeper, "connect", connect)
    with pytest.raises(Closed):
        Client("inference", [Url("inproc", "", 1)], wait=10.0)


def test_not_ready_is_told_as_it_is_and_is_one_kind_of_unreachable():
    error = NotReady("the server is loading: 50 %")
    told = wire.error_of(wire.unpack(wire.Answer, wire.pack_error(error)))
    assert isinstance(told, NotReady)
    assert isinstance(told, Unreachable)
    assert str(told) == str(error)


def test_a_client_tells_a_server_the_time_that_is_left_without_the_way_and_never_less_than_half(
    transport,
):
    server = server_at(transport)
    server.dispatcher.register(
        "left", lambda call: call.answer(call.deadline - call.arrived), newest_first=False
    )
    with closing(opened(server)), closing(client_of(server)) as client:
        session = client.sessions.current
        for way, most in ((0.0, 10.0), (2.0, 8.0), (60.0, 5.0)):
            session.way = way
            assert most - 1.0 < client.call("left", None, 10.0) <= 10 - min(way, 5) + 1e-6
            session.way = way
            assert client.call_async("left", None, 10.0).result(10) <= most + 1e-6
        session.way = 0.0
        for _ in range(5):
            client.call("left", None)
        assert 0 < session.way < 1


def test_what_the_way_takes_is_learned_slowly_where_it_grows_and_quickly_where_it_shrinks():
    session = Session(None, b"", None, {}, 0)
    served = wire.Served(1, 1, 0.1, 0.2)
    session.note_way(100.3, served)  # held up
    assert session.way < 0.001
    for _ in range(60):
        session.note_way(0.35, served)
    assert session.way == pytest.approx(0.05, rel=0.1)
    for _ in range(6):
        session.note_way(0.31, served)
    assert session.way == pytest.approx(0.01, rel=0.2)
    session.note_way(0.002, None)  # refused at once: it can't be longer
    assert session.way == 0.002
    for strange in (float("nan"), float("inf"), -1e9):
        session.note_way(0.35, wire.Served(1, 1, strange, 0.0))
        assert 0 <= session.way < 1
