"""What `edgeml.core.Transport` promises of deadlines: each is for all that is done by it."""

# ruff: noqa: D102 - a test's name says what is promised

from __future__ import annotations

import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import pytest

from edgeml.core import Closed, DeadlineExceeded, Message, Unreachable, Url
from edgeml.testing.ends import (
    KB,
    MB,
    PATIENCE,
    Child,
    EndsTests,
    Net,
    Parked,
    make_message,
    within,
)

__all__ = ["SILENT", "DeadlineTests", "dropping", "interrupted", "no_answer", "resolve"]

_LATE = 1.0  # seconds beyond its deadline: 0.2 are promised, and what fails takes several
SILENT = "silent.invalid"  # a host


class DeadlineTests(EndsTests):
    """See `TransportTests`."""

    def listen_silently(self, host: str = "127.0.0.1") -> tuple[socket.socket, Url]:
        """A socket that listens, at which nobody answers, and its address; to be overridden by a
        transport that isn't over TCP.
        """
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        made = socket.create_server((host, 0), backlog=0)
        return made, Url.parse(self.url).with_port(made.getsockname()[1])

    def _try(self, net: Net, url: Url, timeout: float) -> None:
        """Connect and ask, as a session does, where there is no answer; all by one deadline."""
        with within(timeout + _LATE), pytest.raises((Unreachable, DeadlineExceeded)):
            # Some can tell only now that nobody is there.
            net.connect_to(url, timeout / 2).call(Message(b""), timeout / 2)

    @pytest.mark.parametrize("size", [0, 3 * MB])
    def test_signals_do_not_put_a_deadline_off(self, net: Net, parked: Parked, size: int) -> None:
        requester = net.connect(net.serve(parked))
        message = make_message(b"", size)
        for _ in range(2):  # a first call may have to connect
            with within(0.6 + _LATE), interrupted(0.1), pytest.raises(DeadlineExceeded):
                requester.call(message, 0.6)
        request = requester.request(Message(b"before"))  # goes another way
        with within(0.6 + _LATE), interrupted(0.1), pytest.raises(DeadlineExceeded):
            requester.call(message, 0.6)
        request.cancel()

    def test_signals_do_not_put_off_the_end_of_connecting(self, net: Net) -> None:
        listening, url = self.listen_silently()
        with closing(listening), interrupted(0.1):
            self._try(net, url, 0.8)

    def test_who_accepts_and_says_nothing_holds_up_nobody_beyond_the_deadline(
        self, net: Net
    ) -> None:
        listening, url = self.listen_silently()
        with closing(listening):
            for timeout in (0.2, 1.2):
                self._try(net, url, timeout)

    def test_a_server_that_is_frozen_holds_up_nobody_beyond_the_deadline(self, net: Net) -> None:
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        child = Child("serve", self.url)
        try:
            url = Url.parse(child.line())
            requester = net.connect_to(url)
            requester.call(Message(b""), PATIENCE)
            child.freeze()
            for size in (0, 100 * KB, 8 * MB):
                with within(0.5 + _LATE), pytest.raises(DeadlineExceeded):
                    requester.call(make_message(b"", size), 0.5)
            # A thread that hasn't called yet may have to connect first.
            late = net.start(requester.call, Message(b""), 0.5)
            with within(0.5 + _LATE), pytest.raises((DeadlineExceeded, Unreachable)):
                late.result(PATIENCE)
            self._try(net, url, 0.8)
            with within(1.0):
                requester.close()
        finally:
            child.thaw()
            child.end()

    def test_a_server_that_was_frozen_answers_what_is_sent_steadily_from_then_on(
        self, net: Net
    ) -> None:
        """And waits for nothing that was given up meanwhile, and may never come."""
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        child = Child("serve", self.url)
        try:
            requester = net.connect_to(Url.parse(child.line()))
            requester.call(Message(b""), PATIENCE)
            child.freeze()
            under_way = deque[Future[Message]]()
            for number in range(200):
                under_way.append(requester.request(Message(b"")))
                if len(under_way) > 10:
                    under_way.popleft().cancel()
                if number == 20:
                    child.thaw()
                if wait(under_way, 0.02, FIRST_COMPLETED).done:
                    break
            else:
                pytest.fail("nothing is answered any more")
            requester.call(Message(b""), PATIENCE)
        finally:
            child.thaw()
            child.end()

    def test_closing_wakes_whoever_waits_for_a_server_that_is_frozen(self, net: Net) -> None:
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        child = Child("serve", self.url)
        try:
            requester = net.connect_to(Url.parse(child.line()))
            requester.call(Message(b""), PATIENCE)
            child.freeze()
            # In a thread that hasn't called yet, and may have to connect first.
            waiting = net.start(requester.call, Message(b""), 10 * PATIENCE)
            with pytest.raises(FutureTimeout):
                waiting.result(0.3)
            with within(1.0):
                requester.close()
            with within(1.0), pytest.raises(Closed):
                waiting.result(PATIENCE)
        finally:
            child.thaw()
            child.end()

    def test_a_name_server_that_does_not_answer_holds_up_nobody_beyond_the_deadline(
        self, net: Net, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listening, url = self.listen_silently()
        with closing(listening), no_answer(monkeypatch):
            for timeout in (0.2, 1.0):
                self._try(net, url.with_host(SILENT), timeout)

    def test_many_addresses_at_which_nobody_answers_share_the_deadline(
        self, net: Net, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listening, url = self.listen_silently()
        with closing(listening), ExitStack() as stack:
            hosts = [f"127.0.0.{number}" for number in range(2, 6)]
            for host in hosts:
                stack.enter_context(dropping(host, url.port))
            resolve(monkeypatch, {SILENT: hosts})
            self._try(net, url.with_host(SILENT), 1.0)


@contextmanager
def interrupted(period: float) -> Iterator[None]:
    """Send the main thread, which this is, a signal that has a handler every so many seconds."""
    main = threading.main_thread()
    if threading.current_thread() is not main:
        pytest.skip("signals are handled in the main thread")
    over = threading.Event()

    def insist() -> None:
        while not over.wait(period):
            assert main.ident is not None
            signal.pthread_kill(main.ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    thread = threading.Thread(target=insist, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def no_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a name server not answer for one host within the block."""
    over = threading.Event()
    before = socket.getaddrinfo

    def look_up(host: Any, *more: Any, **settings: Any) -> Any:
        if host in (SILENT, SILENT.encode()):
            over.wait(PATIENCE)
            raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")
        return before(host, *more, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        yield
    finally:
        over.set()


def resolve(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
    """Have names stand for addresses."""
    before = socket.getaddrinfo

    def look_up(host: Any, *more: Any, **settings: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return [
            entry for each in known.get(name, [name]) for entry in before(each, *more, **settings)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@contextmanager
def dropping(host: str, port: int) -> Iterator[None]:
    """Have an address take no connections and refuse none: its queue of them is full."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind((host, port))
        full.listen(0)
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect((host, port))
        yield
