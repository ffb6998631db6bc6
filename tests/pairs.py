"""What the tests of the services share: the transports they run over, and how they wait."""

from __future__ import annotations

import itertools
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edgeml.core.client import Client
from edgeml.core.url import Url
from edgeml.services.base import ServiceServer
from edgeml.testing.ends import until
from edgeml.testing.stopwatch import Stopwatch

ROOT = Path(__file__).parents[1]
"""Of the repository."""

TRANSPORTS = ("grpc", "inproc", "shm", "ws", "zmq")
"""Every test of the services runs over each of these."""

T = TypeVar("T", bound=ServiceServer)


def wait_until(predicate: Callable[[], Any], timeout: float = 30.0) -> None:
    """Return as soon as something holds; fail if it doesn't within ``timeout`` seconds."""
    if not until(predicate, timeout):
        raise AssertionError(f"not within {timeout:g} s")


@contextmanager
def started(server: T) -> Iterator[T]:
    """Run a server in the background."""
    with server:
        server.start(threaded=True)
        yield server


@contextmanager
def plain_client(server: ServiceServer, **settings: Any) -> Iterator[Client]:
    """A client of the core, which calls by name what the pairs' own clients have methods for."""
    kind = type(server).__name__.removesuffix("Server").lower()
    config = server.config.shared() if hasattr(server, "config") else None
    client = Client(kind, [Url.parse(server.url)], config=config, **settings)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def took(at_most: float, at_least: float = 0.0, others: Sequence[int] = ()) -> Iterator[None]:
    """Check how long something takes, in seconds: at most by a `Stopwatch`.

    Args:
        at_most: seconds.
        at_least: seconds.
        others: processes that are waited for.
    """
    began, watch = time.monotonic(), Stopwatch(*others)
    yield
    passed, seconds = time.monotonic() - began, watch.seconds
    assert at_least <= passed, f"it took {passed:.3f} s"
    assert seconds <= at_most, f"it took {seconds:.3f} s"


_ports = itertools.count(secrets.randbelow(2500))


def free_port() -> int:
    """A port that is free, and that nobody is given who asks for any, as it is below those.

    Where a test stops serving and then serves again, or expects that nobody answers, a port that
    the system picked could be somebody else's meanwhile.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 12_000 + 2500 * (worker % 8) + next(_ports) % 2500
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def stop_server(server: ServiceServer, *clients: Any) -> None:
    """Stop a server, and wait until these clients know.

    Who asks just then may be told that its connection was lost, and not whether that was done.
    """
    server.stop()
    know_of_the_end(*clients)


def know_of_the_end(*clients: Any) -> None:
    """Wait until these clients know that their connection is over."""
    for client in clients:
        wait_until(lambda client=client: session_of(client).lost)


def session_of(client: Any) -> Any:
    """Return the session that a client has now, which is nobody's business but core's."""
    return client._client.sessions.current


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set this process's clock ahead, until the test ends."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Have this process write no file beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Check that no thread outlives the block, beyond a moment for those that are ending."""
    before = threads()
    yield
    wait_until(lambda: threads() <= before)


def is_a_librarys(thread: threading.Thread) -> bool:
    """Whether it is one that pyzmq or grpc.aio keeps for the whole process, or a `Stopwatch`."""
    name = thread.name
    return (
        type(thread).__name__ == "GarbageCollectorThread"
        or "_poll_wrapper" in name
        or name == "stopwatch"
    )


def threads() -> set[threading.Thread]:
    """The threads that run, but for those that a library keeps for the whole process."""
    return {t for t in threading.enumerate() if not is_a_librarys(t)}


class Process:
    """A Python program in a process of its own."""

    def __init__(self, program: str, *arguments: object) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-u", "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise AssertionError(f"it ended: {self.popen.communicate()[1]}")
        return line.strip()

    def signal(self, number: int) -> None:
        """Send it a signal, and see it stop or end if that is what it says."""
        self.popen.send_signal(number)
        if number == signal.SIGKILL:
            self.popen.wait(30)
        if number == signal.SIGSTOP:
            stat = Path(f"/proc/{self.popen.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def end(self, timeout: float = 30.0) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it wrote to stderr."""
        stderr = self.popen.communicate(timeout=timeout)[1]
        return self.popen.returncode, stderr


@contextmanager
def process(program: str, *arguments: object) -> Iterator[Process]:
    """Run a Python program, and kill it at the end of the block if it still runs."""
    made = Process(program, *arguments)
    try:
        yield made
    finally:
        made.popen.kill()
        made.popen.communicate()


def run_fresh(program: str, timeout: float = 60.0) -> tuple[str, str]:
    """Run a program in a fresh interpreter, which is to end well; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def some_of(suite: type, *prefixes: str, **settings: Any) -> type:
    """A suite's tests whose names begin like this, with other settings."""
    tests = [name for name in dir(suite) if name.startswith("test_")]
    others = [name for name in tests if not name.startswith(prefixes)]
    return type(suite.__name__, (suite,), {**dict.fromkeys(others), **settings})


def long_form(suite: type, *prefixes: str, **settings: Any) -> Any:
    """As `some_of`; slow."""
    return pytest.mark.slow(pytest.mark.timeout(900)(some_of(suite, *prefixes, **settings)))


def make_keys(home: Path) -> dict[str, Path]:
    """Make directories of keys: of a server, of two clients, and of another server and its client.

    The second client's have expired.
    """
    from edgeml.cli.keygen import make_client_keys, make_server_keys

    ours, theirs = make_server_keys(home / "ours"), make_server_keys(home / "theirs")
    return {
        "server": ours,
        "robot": make_client_keys(ours, "robot"),
        "expired": make_client_keys(ours, "expired", days=-0.5),
        "other server": theirs,
        "stranger": make_client_keys(theirs, "stranger"),
    }
