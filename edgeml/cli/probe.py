"""Servers to try things with, in this process and in another, and asking a server who it is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from statistics import median

from edgeml.core import DeadlineExceeded, EdgemlError, Url, load_transport
from edgeml.core.errors import text_of
from edgeml.core.ping import ping
from edgeml.core.security import Credentials, CredentialsLike
from edgeml.core.state import ServerState, state_of
from edgeml.core.wire import Pong
from edgeml.services import InferenceServer

__all__ = [
    "ACK",
    "DESCRIPTORS",
    "NO_KEYS",
    "Answer",
    "ask",
    "make_server",
    "one_line",
    "serve_elsewhere",
    "serve_for_parent",
    "serve_here",
]

ACK = "bench_ack"
"""The interface that reads an array, a byte of each page, and gives a number back."""

DESCRIPTORS = "bench_descriptors"
"""The interface that tells how many file descriptors the server's process has open."""

NO_KEYS = Credentials()
"""For servers and clients that are tried on this machine, whatever the environment says."""

_PAGE = 4096  # bytes
_START = 60.0  # seconds that a process may take to start, on a small machine
_END = 2.0  # seconds that it is given to end by itself
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
from edgeml.cli.probe import serve_for_parent
with Connection(int(sys.argv[1])) as pipe:
    serve_for_parent(pipe, sys.argv[2])
"""
_ASKED = 10  # times


@dataclass(frozen=True)
class Answer:
    """What a server said of itself, and how long it took.

    Attributes:
        service: which kind of server it is.
        protocol: what it speaks; `edgeml.core.wire.PROTOCOL` is what we do.
        state: what it is at.
        typical: the median round trip in seconds.
        best: the fastest, in seconds.
        ahead: seconds that its clock is ahead of ours by the fastest, give or take half of that.
    """

    service: str
    protocol: int
    state: ServerState
    typical: float
    best: float
    ahead: float


def ask(url: Url, timeout: float, credentials: CredentialsLike = NO_KEYS) -> Answer:
    """Ask a server several times who it is.

    Args:
        url: where it is.
        timeout: seconds that connecting may take, and then the answers.
        credentials: a client's, for a server that asks for them.

    Raises:
        Unreachable, DeadlineExceeded: nobody answers there.
        Malformed: what answers is no edgeml server.
        PluginError: there is no such transport.
        PermissionDenied: the server asks for other keys than these.
    """
    given = Credentials.resolve(credentials)
    keys = None if given is None else given.for_client()
    pongs: list[tuple[Pong, float, float]] = []
    with load_transport(url.scheme).connect(url, timeout, credentials=keys) as requester:
        deadline = time.monotonic() + timeout
        while len(pongs) < _ASKED and (left := deadline - time.monotonic()) > 0:
            try:
                pongs.append(ping(requester, left))
            except DeadlineExceeded:
                if not pongs:
                    raise
    times = [took for _, took, _ in pongs]
    pong, best, ahead = min(pongs, key=lambda answer: answer[1])
    state = ServerState(state_of(pong.state), pong.progress, pong.detail)
    return Answer(pong.service, pong.protocol, state, median(times), best, ahead)


def one_line(error: BaseException) -> str:
    """What went wrong, for people to read."""
    text = " ".join(text_of(error).split())
    return text if isinstance(error, EdgemlError) else f"{type(error).__name__}: {text}"


def make_server(
    transport: str | None,
    host: str = "127.0.0.1",
    port: int = 0,
    credentials: CredentialsLike = NO_KEYS,
) -> InferenceServer:
    """A server of `ACK` and `DESCRIPTORS`, not yet started."""
    server = InferenceServer(port, host, transport, credentials=credentials)
    server.register_interface(ACK, lambda payload: int(payload[::_PAGE].sum()))
    server.register_interface(DESCRIPTORS, lambda _: _descriptors())
    return server


def _descriptors() -> int:
    """How many file descriptors this process has open; 0 if the system doesn't tell."""
    try:
        return len(os.listdir("/dev/fd")) - 1  # but for the one that lists them
    except OSError:
        return 0


@contextmanager
def serve_here(transport: str) -> Iterator[Url]:
    """Serve in this process; raises whatever the transport does."""
    with make_server(transport) as server:
        server.start(threaded=True)
        yield Url.parse(server.url)


@contextmanager
def serve_elsewhere(transport: str) -> Iterator[tuple[Url, int]]:
    """Serve in another process, which never outlives this one.

    Yields:
        Where, and how many file descriptors that process has open without any client.

    Raises:
        EdgemlError: it can't serve; the text says why.
    """
    pipe, theirs = Pipe()
    with pipe:
        with theirs:
            # Ctrl-C is for this process, which ends that one, whenever it comes: the terminal
            # sends it to neither another session nor what has not begun to listen, and whoever is
            # left alone finds that the pipe has ended.
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), transport],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            yield _wait_for_start(pipe, process)
        finally:
            pipe.close()  # which is what it waits for
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END)
            process.kill()
            process.wait()


def _wait_for_start(pipe: Connection, process: subprocess.Popen[bytes]) -> tuple[Url, int]:
    try:
        if not pipe.poll(_START):
            raise EdgemlError(f"the server's process said nothing for {_START:g} s")
        said, descriptors = pipe.recv()
    except (EOFError, ConnectionError):
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        raise EdgemlError(f"the server's process ended, with {process.returncode}") from None
    if descriptors is None:
        raise EdgemlError(said)
    return Url.parse(said), descriptors


def serve_for_parent(pipe: Connection, transport: str) -> None:
    """Serve until the pipe ends; sends what `serve_elsewhere` yields, or why it can't serve."""
    logging.getLogger("edgeml").addHandler(logging.NullHandler())  # the parent tells what fails
    try:
        with make_server(transport) as server:
            server.start(threaded=True)
            with suppress(EOFError, ConnectionError):
                pipe.send((server.url, _descriptors()))
                pipe.recv()
    except Exception as error:
        with suppress(ConnectionError):  # nobody wants to know any more
            pipe.send((f"it can't serve: {one_line(error)}", None))
