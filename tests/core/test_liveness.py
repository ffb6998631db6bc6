"""What clients and servers tell of each other's end, and what of it older ones understand."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import threading
import time
from contextlib import closing

import pytest

import edgeml
from edgeml import InferenceClient, InferenceServer, Unreachable
from edgeml.core import wire
from edgeml.core.guests import Known
from edgeml.core.message import Message
from edgeml.core.notices import Notices
from edgeml.core.server import Server
from edgeml.core.streams import HOLD
from edgeml.testing.liveness import Noticing
from pairs import plain_client, process, started, wait_until

PATIENCE = 20.0


class Told:
    """What was told, in order."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def saying(self, what: str):
        return lambda *who: self._told.put(" ".join([what, *(peer.id for peer in who)]))

    def next(self) -> str:
        return self._told.get(timeout=PATIENCE)

    def nothing(self) -> bool:
        return self._told.empty()


def new_server(transport, told=None, port=0, **settings) -> InferenceServer:
    if told is not None:
        settings.update(on_connect=told.saying("came"), on_disconnect=told.saying("went"))
    server = InferenceServer(port, transport=transport, **settings)
    server.register_interface("echo", lambda payload: payload)
    return server


def client_of(server, told, **settings) -> InferenceClient:
    return InferenceClient(
        url=server.url,
        on_disconnect=told.saying("lost"),
        on_reconnect=told.saying("back"),
        **settings,
    )


# Functions that are called ----------------------------------------------------------------


def test_a_client_is_told_that_its_server_ends_and_is_back(transport):
    told = Told()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(new_server(transport)))
        client = stack.enter_context(client_of(first, told))
        port = first.port
        assert told.nothing()
        for _ in range(2):
            first.stop()
            assert told.next() == "lost"
            with pytest.raises(Unreachable):
                client.call("echo", 1, timeout=0.1)
            first = stack.enter_context(started(new_server(transport, port=port)))
            assert told.next() == "back"
            assert client.call("echo", 2) == 2
        client.stop()
    assert told.nothing()  # for it was its own end


def test_a_call_that_connects_anew_tells_of_both(server_on):
    told = Told()
    given = {"on_disconnect": told.saying("lost"), "on_reconnect": told.saying("back")}
    with plain_client(server_on, **given) as client:
        client.sessions.current.lose(Unreachable("cut for a test"))
        assert client.call("echo", 1) == 1
        assert [told.next(), told.next()] == ["lost", "back"]
    assert told.nothing()


@pytest.fixture
def server_on(transport):
    with started(new_server(transport)) as server:
        yield server


def test_what_is_told_runs_in_order_in_a_thread_of_its_own_and_may_use_the_client(server_on):
    said: list[object] = []
    done = threading.Event()

    def lost() -> None:
        said.append(threading.current_thread().name)
        time.sleep(0.3)  # the client has long been back
        said.append("lost")
        raise ValueError("a mistake in what is told")

    def back() -> None:
        said.append(client.call("echo", "back"))
        client.close()  # and so it may end it
        done.set()

    with plain_client(server_on, on_disconnect=lost, on_reconnect=back) as client:
        client.sessions.current.lose(Unreachable("cut for a test"))
        assert done.wait(PATIENCE)
    assert said == ["edgeml notices", "lost", "back"]


def test_an_error_in_what_is_told_is_logged_and_the_next_is_told(caplog):
    notices, said = Notices("told"), []
    notices.tell(lambda: 1 / 0)
    notices.tell(said.append, "next")
    notices.tell(None)
    wait_until(lambda: said == ["next"])
    notices.close()
    assert "ZeroDivisionError" in caplog.text
    notices.tell(said.append, "too late")
    assert said == ["next"]


def test_one_thing_is_told_at_a_time_and_none_after_the_end():
    notices, running, most, said = Notices("told"), [], [], []

    def tell(number: int) -> None:
        running.append(number)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        said.append(number)

    threads = [
        threading.Thread(target=lambda n=n: [notices.tell(tell, n + i) for i in range(50)])
        for n in (0, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(said) == 100)
    notices.close()
    assert max(most) == 1
    assert [n for n in said if n < 100] == list(range(50))


@pytest.mark.parametrize("name", ["on_disconnect", "on_reconnect"])
def test_what_no_thread_can_run_is_refused(server_on, name):
    async def told() -> None: ...

    with pytest.raises(TypeError, match=name):
        InferenceClient(url=server_on.url, **{name: told})
    with pytest.raises(TypeError, match="on_connect"):
        InferenceServer(0, on_connect=1)


def test_a_server_tells_who_has_come_and_left(transport):
    told = Told()
    with started(new_server(transport, told)) as server:
        with client_of(server, told, client_id="arm"):
            assert told.next() == "came arm"
        assert told.next() == "went arm"
        with plain_client(server, client_id="other"):
            assert told.next() == "came other"
            server.stop()
    assert told.nothing()


def test_a_connection_that_is_made_anew_is_no_client_that_left(transport):
    told = Told()
    with started(new_server(transport, told)) as server:
        with plain_client(server, client_id="arm") as client:
            assert told.next() == "came arm"
            for _ in range(3):
                client.sessions.current.lose(Unreachable("cut for a test"))
                assert client.call("echo", 1) == 1
            assert len(server.clients()) == 1
            assert told.nothing()
        assert told.next() == "went arm"


def test_an_aio_client_tells_too(transport):
    import asyncio

    told = Told()

    async def use(url: str) -> None:
        async with edgeml.aio.InferenceClient(
            url=url, on_disconnect=told.saying("lost"), on_reconnect=told.saying("back")
        ) as client:
            assert await client.call("echo", 1) == 1
            server.stop()
            assert await asyncio.to_thread(told.next) == "lost"

    with started(new_server(transport)) as server:
        asyncio.run(use(server.url))


# Who is cut off ---------------------------------------------------------------------------


class Relay:
    """Passes TCP on to a port, until it is cut: then connections stay, and nothing passes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(
                        threading.Thread(target=self._pump, args=pair, daemon=True)
                    )
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._open.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._open.set()
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)
        for each in [self._listener, *self._sockets]:
            each.close()


@pytest.mark.parametrize("transport", ["zmq", "grpc", "ws"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_network_that_passes_nothing_on_is_noticed_at_both_ends(transport, busy):
    here, there = Told(), Told()
    with (
        started(new_server(transport, there)) as server,
        closing(Relay(server.port)) as relay,
        InferenceClient(
            url=f"{transport}://127.0.0.1:{relay.port}",
            client_id="arm",
            on_disconnect=here.saying("lost"),
            on_reconnect=here.saying("back"),
        ) as client,
    ):
        assert there.next() == "came arm"
        ends = time.monotonic() + wire.SILENCE
        while time.monotonic() < ends:
            if busy:
                assert client.call("echo", 1) == 1
            time.sleep(0.02)
        assert here.nothing()
        noticing = Noticing(client._client, server._server)
        relay.cut()
        assert here.next() == "lost"
        noticing.check()
        assert there.next() == "went arm"
        noticing.check()
        assert not server.clients()
        relay.mend()
        assert here.next() == "back"
        assert there.next() == "came arm"
        assert client.call("echo", 2) == 2


# Older ones -------------------------------------------------------------------------------


def test_an_older_client_is_given_the_time_that_it_is_used_to(server_on):
    with plain_client(server_on) as client:
        old = client.sessions
        old.current.silence = wire.OLD_SILENCE
        hello = wire.Hello(wire.PROTOCOL, "inference", "old", "", "msgpack", {})
        requester = old.current.requester
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, wire.pack(hello)))
        reply = wire.unpack(wire.Answer, requester.call(Message(header), PATIENCE).header)
        welcome = wire.unpack(wire.Welcome, reply.body)
        assert wire.ALIVE not in welcome.extensions
        began = time.monotonic()
        credit = wire.pack(wire.Credit(0, 0, 0))
        header = wire.pack(wire.Request(wire.NEXT, welcome.session, wire.HEARTBEAT, 0.0, credit))
        reply = wire.unpack(wire.Answer, requester.call(Message(header), PATIENCE).header)
        assert reply.status == wire.NOTHING_YET
        assert time.monotonic() - began >= HOLD - 0.1
        wait_until(lambda: "old" in [peer.id for peer in server_on.clients()])


def test_whoever_is_forgotten_has_been_told_of_however_slow_it_was(transport, monkeypatch):
    monkeypatch.setattr("edgeml.core.server._FORGET", 1.0)
    monkeypatch.setattr(Known, "note_lag", lambda known, usual: setattr(known, "lag", 100.0))
    told = Told()
    with started(new_server(transport, told)) as server, plain_client(server) as client:
        assert told.next().startswith("came")
        monkeypatch.setattr(client.sessions, "_ask", lambda *given: time.sleep(0.1) or True)
        assert told.next().startswith("went")
        assert not server.clients()


def test_an_older_server_is_given_the_time_that_it_is_used_to(transport, monkeypatch):
    hello, told = Server._hello, Told()

    def hello_of_old(self, body, message, peer):
        said = wire.unpack(wire.Hello, body)
        del said.extensions[wire.ALIVE]
        return hello(self, wire.pack(said), message, peer)

    monkeypatch.setattr(Server, "_hello", hello_of_old)
    with (
        started(new_server(transport)) as server,
        plain_client(server, on_disconnect=told.saying("lost")) as client,
    ):
        session = client.sessions.current
        assert session.silence == wire.OLD_SILENCE
        time.sleep(2 * HOLD)
        assert client.call("echo", 1) == 1
        assert told.nothing()


@pytest.mark.parametrize("asked", [0, -1.0, "long", True, None, float("nan")])
def test_a_silence_that_is_none_is_refused(asked, monkeypatch):
    monkeypatch.setattr("edgeml.core.session.wire.SILENCE", asked)
    with started(new_server("inproc")) as server, pytest.raises(edgeml.Malformed, match="alive"):
        InferenceClient(url=server.url)


def test_who_freezes_again_and_again_is_noticed_each_time_as_soon(transport):
    """Patience with the slow is learned from those that are slow, not from those that were gone."""
    if transport == "inproc":
        pytest.skip("a thread can't be frozen")
    program = """
import sys, threading
import edgeml
client = edgeml.InferenceClient(url=sys.argv[1], client_id="arm")
print("up", flush=True)
threading.Event().wait(100)
"""
    told = Told()
    with started(new_server(transport, told)) as server, process(program, server.url) as child:
        assert child.line() == "up"
        assert told.next() == "came arm"
        for _ in range(3):
            child.signal(signal.SIGSTOP)
            noticing = Noticing(server._server)
            assert told.next() == "went arm"
            noticing.check()
            child.signal(signal.SIGCONT)
            assert told.next() == "came arm"
    assert server.stats()["clients_lost"] >= 3
