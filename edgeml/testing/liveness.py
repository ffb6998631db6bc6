"""What every transport promises of peers that freeze, are cut off or go; a part of
`TransportTests`. Here core's client and server stand on the transport, since they notice it.
"""

# ruff: noqa: D102 - a test's name says what is promised

from __future__ import annotations

import ctypes
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edgeml.core import Message, Reply, Unreachable, Url, wire
from edgeml.core.client import Client
from edgeml.core.dispatch import Caller, answer_with
from edgeml.core.server import Server
from edgeml.testing.ends import PATIENCE, Child, EndsTests
from edgeml.testing.stopwatch import Stopwatch

__all__ = ["LivenessTests", "Noticing"]

NOTICED = 3.0  # seconds in which who is gone is noticed
_AGAIN = 0.75  # seconds that a client which was held up takes to ask once more
_HELD_UP = 0.1  # seconds by which it then is at least
SERVICE = "liveness"


class LivenessTests(EndsTests):
    """See the module's docstring."""

    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        """Makes a server and clients, here or in other processes, and ends them all."""
        with ExitStack() as stack:
            yield Pair(self.url, stack)

    def test_who_is_cut_off_is_noticed_at_both_ends_and_comes_back(self, pair: Pair) -> None:
        server = pair.serve()
        client = pair.connect(server.urls[0], "cut off")
        assert server.told() == "came: cut off"
        assert client.call("echo", 1) == 1
        server.deaf = True
        under_way = client.call_async("echo", 2, 60.0)
        pair.notice(client, "lost")
        pair.notice(server, "went: cut off")
        with pytest.raises(Unreachable):
            under_way.result(PATIENCE)
        assert not server.callers
        assert server.stats()["clients_lost"] == 1
        server.deaf = False
        assert client.told() == "back"
        assert server.told() == "came: cut off"
        assert client.call("echo", 3) == 3
        assert len(server.callers) == 1

    def test_who_is_cut_off_amid_calls_is_noticed_at_both_ends(self, pair: Pair) -> None:
        server = pair.serve()
        client = pair.connect(server.urls[0], "busy")
        assert server.told() == "came: busy"
        ends = time.monotonic() + 1.5 * wire.SILENCE  # so that no heartbeat is under way
        while time.monotonic() < ends:
            client.call("echo", 1)
            time.sleep(0.02)
        server.deaf = True
        pair.notice(client, "lost")
        pair.notice(server, "went: busy")

    def test_a_server_that_freezes_is_noticed_and_found_again_when_it_thaws(
        self, pair: Pair
    ) -> None:
        frozen = pair.child("serve", self.url, self.between_processes)
        client = pair.connect(Url.parse(frozen.line()))
        assert client.call("echo", 1) == 1
        frozen.freeze()
        under_way = client.call_async("echo", 2, 60.0)
        pair.notice(client, "lost")
        with pytest.raises(Unreachable, match="heartbeat"):
            under_way.result(PATIENCE)
        frozen.thaw()
        assert client.told() == "back"
        assert client.call("echo", 3) == 3

    def test_a_client_that_freezes_is_noticed_and_goes_on_when_it_thaws(self, pair: Pair) -> None:
        server = pair.serve()
        frozen = pair.child("call", server.urls[0], self.between_processes)
        assert server.told() == "came: child"
        assert frozen.line() == "called"
        frozen.freeze()
        pair.notice(server, "went: child")
        assert not server.callers
        frozen.thaw()
        assert server.told() == "came: child"
        # It was not its server that was silent meanwhile.
        time.sleep(wire.SILENCE)
        frozen.end_input()
        assert frozen.line() == "told []"

    def test_who_is_killed_is_noticed_at_the_other_end(self, pair: Pair) -> None:
        killed = pair.child("serve", self.url, self.between_processes)
        client = pair.connect(Url.parse(killed.line()))
        killed.kill()
        pair.notice(client, "lost")
        server = pair.serve()
        killed = pair.child("call", server.urls[0], self.between_processes)
        assert server.told() == "came: child"
        assert killed.line() == "called"
        killed.kill()
        pair.notice(server, "went: child")

    def test_who_leaves_is_told_of_at_once(self, pair: Pair) -> None:
        server = pair.serve()
        client = pair.connect(server.urls[0], "brief")
        assert server.told() == "came: brief"
        client.close()
        assert server.told() == "went: brief"
        assert "clients_lost" not in server.stats()
        assert client.nothing_told()

    def test_a_process_that_did_not_run_itself_takes_nobody_to_be_gone(self, pair: Pair) -> None:
        there = pair.child("serve", self.url, self.between_processes)
        client = pair.connect(Url.parse(there.line()))
        server = pair.serve()
        other = pair.child("call", server.urls[0], self.between_processes)
        assert server.told() == "came: child"
        assert other.line() == "called"
        hold_gil(2 * wire.SILENCE)  # none of our threads runs
        time.sleep(wire.SILENCE)
        assert client.nothing_told()
        assert server.nothing_told()

    def test_a_handler_that_computes_for_long_makes_nobody_look_gone(self, pair: Pair) -> None:
        server = pair.serve()
        client = pair.connect(server.urls[0], "patient")
        assert server.told() == "came: patient"
        assert client.call("sleep", 1.5 * wire.SILENCE, 60.0) is None
        assert client.call("compute", 1.5 * wire.SILENCE, 60.0) is None
        assert client.nothing_told()
        assert server.nothing_told()

    def test_where_calls_are_answered_there_are_few_heartbeats(self, pair: Pair) -> None:
        server = pair.serve()
        client = pair.connect(server.urls[0])
        seconds = 1.5 * wire.HOLD
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            client.call("echo", 1)
            time.sleep(0.02)
        # One for each time that the server keeps a request.
        assert server.heartbeats <= seconds / wire.HOLD + 1
        before, seconds = server.heartbeats, 1.5 * wire.SILENCE
        time.sleep(seconds)
        assert 0 < server.heartbeats - before <= seconds / (wire.SILENCE * wire.IDLE) + 2


class Noticing:
    """Tells whether it is in time that who is gone from now on is noticed.

    That is within three seconds, by ends that run and a peer that was quick while it was there.
    Who was late is given longer; and an end that is itself held up, as on a busy machine, asks once
    more each time.

    Args:
        ends: who is to notice.
    """

    def __init__(self, *ends: Server | Client) -> None:
        self._longer = [_longer(end) for end in ends]
        self._began, self._watch = time.monotonic(), Stopwatch()

    def check(self) -> None:
        """Fail if it is too late."""
        passed, seconds = time.monotonic() - self._began, self._watch.seconds
        questions = _AGAIN * ((passed - seconds) // _HELD_UP)
        learned = max(longer() for longer in self._longer)
        assert seconds < NOTICED + learned + questions, f"{seconds:.2f} s of {passed:.2f} s"


def _longer(end: Server | Client) -> Callable[[], float]:
    """Tells by how many seconds more than usual those who are here now may be silent."""
    if isinstance(end, Server):
        here = list(end._sessions.values())
        return lambda: max((each.patience - each.silence for each in here), default=0.0)
    session = end.sessions.current
    assert session is not None
    before = session.slowness  # with the calls under way, which end with it
    return lambda: max(before, session.slowness)


class Told:
    """What it was told, in order."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tell = self._told.put

    def __call__(self) -> str:
        """The next thing that is told."""
        return self._told.get(timeout=2 * PATIENCE)

    def nothing(self) -> bool:
        """Whether there is nothing more for now."""
        return self._told.empty()


class DeafServer(Server):
    """A server that may be cut off: it hears nothing, and so answers nothing."""

    def __init__(self, url: Url) -> None:
        self.told = Told()
        self.deaf = False
        self.heartbeats = 0
        super().__init__(
            SERVICE,
            [url],
            on_connect=lambda caller: self._tell("came", caller),
            on_disconnect=lambda caller: self._tell("went", caller),
        )
        self.register("echo", answer_with(lambda payload, _: payload))
        self.register("sleep", answer_with(lambda seconds, _: time.sleep(seconds)))
        self.register("compute", answer_with(lambda seconds, _: compute(seconds)))

    def _tell(self, what: str, caller: Caller) -> None:
        self.told.tell(f"{what}: {caller.client_id}")

    def nothing_told(self) -> bool:
        return self.told.nothing()

    def _on_request(self, listener: Any, message: Message, reply: Reply) -> None:
        if not self.deaf:
            request = wire.unpack(wire.Request, message.header)
            if request.kind == wire.NEXT and request.name == wire.HEARTBEAT:
                self.heartbeats += 1
            super()._on_request(listener, message, reply)


class ToldClient(Client):
    """A client that keeps what it was told."""

    def __init__(self, url: Url, client_id: str | None = None) -> None:
        self.told = Told()
        super().__init__(
            SERVICE,
            [url],
            client_id=client_id,
            on_disconnect=lambda: self.told.tell("lost"),
            on_reconnect=lambda: self.told.tell("back"),
        )

    def nothing_told(self) -> bool:
        return self.told.nothing()


class Pair:
    """Makes servers, clients and processes, and ends them all."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._url = url
        self._stack = stack

    def serve(self) -> DeafServer:
        """A server in this process."""
        server = DeafServer(Url.parse(self._url))
        self._stack.callback(server.close)
        server.open()
        server.dispatcher.start()
        return server

    def connect(self, url: Url, client_id: str | None = None) -> ToldClient:
        """A client in this process."""
        client = ToldClient(url, client_id)
        self._stack.callback(client.close)
        return client

    def child(self, role: str, url: object, between_processes: bool) -> LiveChild:
        """A server or a client in another process."""
        if not between_processes:
            pytest.skip("this transport stays within one process")
        child = LiveChild(role, str(url), module="liveness")
        self._stack.callback(child.end)
        return child

    def notice(self, end: DeafServer | ToldClient, what: str) -> None:
        """See that something is told in time from now."""
        noticing = Noticing(end)
        assert end.told() == what
        noticing.check()


def compute(seconds: float) -> None:
    """Keep a processor busy, in Python."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def hold_gil(seconds: float) -> None:
    """Keep all threads of this process from running Python."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


class LiveChild(Child):
    """See `Child`."""

    def end_input(self) -> None:
        """Have it do what it does last."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def live_in_child(role: str, url: str, keys: str) -> None:
    """What a `LiveChild` does."""
    del keys
    if role == "serve":
        server = DeafServer(Url.parse(url))
        server.open()
        server.dispatcher.start()
        print(server.urls[0], flush=True)
        sys.stdin.read()
        server.close()
    else:
        client = ToldClient(Url.parse(url), "child")
        client.call("echo", 1)
        print("called", flush=True)
        sys.stdin.read()
        told = []
        while not client.nothing_told():
            told.append(client.told())
        print("told", told, flush=True)
        client.close()
