"""What the suites for transports are made of: ends that are closed, threads, and processes."""

from __future__ import annotations

import ipaddress
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from edgeml.core import (
    Credentials,
    Endpoint,
    Message,
    OnRequest,
    Reply,
    Requester,
    Transport,
    Url,
    load_transport,
)
from edgeml.testing.stopwatch import Stopwatch

PATIENCE = 20.0  # seconds that a test waits for what should come at once
KB = 1 << 10
MB = 1 << 20

T = TypeVar("T")

_warm: list[Transport] = []


class EndsTests:
    """Gives the tests of a suite ends to work with.

    Attributes:
        url: where to serve; port 0 lets the system pick.
        between_processes: whether another process can connect to an endpoint.
    """

    url: ClassVar[str]
    between_processes: ClassVar[bool] = True

    @pytest.fixture
    def net(self) -> Iterator[Net]:
        """Makes endpoints and threads, ends them all after the test, and finds what is left."""
        transport = load_transport(Url.parse(self.url).scheme)  # as users load it
        if transport not in _warm:
            live_once(transport, self.url)
            _warm.append(transport)
        before = set(threading.enumerate())
        net = Net(transport, self.url)
        yield net
        net.close()
        until(lambda: not threads_beside(before))
        left = threads_beside(before)
        assert not left, "threads that outlive their endpoint"

    @pytest.fixture
    def parked(self) -> Parked:
        """An ``on_request`` that answers nothing; the test takes the requests from it."""
        return Parked()


class Threads:
    """Runs functions in threads of their own, and waits for all of them."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function in a thread of its own."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def join(self) -> None:
        """Wait for all threads."""
        for thread in self._threads:
            thread.join(PATIENCE)


def threads_beside(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads that there are now beside those, and those of stopwatches."""
    return {each for each in {*threading.enumerate()} - before if each.name != "stopwatch"}


class Net(Threads):
    """Makes endpoints, connections and threads, and ends them all."""

    def __init__(self, transport: Transport, url: str) -> None:
        super().__init__()
        self.transport = transport
        self._url = Url.parse(url)
        self._ends: list[Endpoint] = []

    def serve(self, on_request: OnRequest, url: Url | None = None, **settings: Any) -> Endpoint:
        """Serve at the suite's address, or another."""
        endpoint = self.transport.serve(url or self._url, on_request, **settings)
        self._ends.append(endpoint)
        return endpoint

    def connect(self, endpoint: Endpoint, timeout: float = PATIENCE, **settings: Any) -> Requester:
        """Connect to an endpoint."""
        return self.connect_to(endpoint.url, timeout, **settings)

    def connect_to(self, url: Url, timeout: float = PATIENCE, **settings: Any) -> Requester:
        """Connect to an address."""
        requester = self.transport.connect(url, timeout, **settings)
        self._ends.append(requester)
        return requester

    def carry(self, parts: list[memoryview] | None = None) -> Handlers:
        """Serve with an echo that runs between the rounds of a loop that a thread carries."""
        return Handlers(self, parts)

    def close(self) -> None:
        """Close all ends, and wait for all threads."""
        for end in reversed(self._ends):
            end.close()
        self.join()


def live_once(transport: Transport, url: str) -> None:
    """The threads that are left afterwards are a library's own, one for each process."""
    net = Net(transport, url)
    requester = net.connect(net.serve(echo))
    requester.call(make_message(b"", MB), PATIENCE)
    requester.request(make_message(b"", MB)).result(PATIENCE)
    net.close()


class Parked:
    """An ``on_request`` that answers nothing; the test takes the requests from it."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Message, Reply]] = queue.SimpleQueue()

    def __call__(self, message: Message, reply: Reply) -> None:
        """Keep a request."""
        self._arrived.put((message, reply))

    def take(self) -> tuple[Message, Reply]:
        """The next request, waited for."""
        return self._arrived.get(timeout=PATIENCE)


class Handlers:
    """A thread that carries an endpoint's loop, and handles what came between its rounds."""

    def __init__(self, net: Net, parts: list[memoryview] | None = None) -> None:
        self.stuck: queue.SimpleQueue[None] = queue.SimpleQueue()  # of each that blocks
        self.go_on: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.kept: queue.SimpleQueue[Reply] = queue.SimpleQueue()  # for somebody else to answer
        self.ident = 0
        self._parts = parts
        self._waiting: deque[tuple[Message, Reply]] = deque()
        self._closing = threading.Event()
        self.endpoint = net.serve(self._take)
        if not self.endpoint.carry(lambda: False):
            pytest.skip("this transport has no loop that could be carried")
        self.thread = net.start(self._run)

    def _take(self, message: Message, reply: Reply) -> None:
        if message.header == b"at once":
            reply(Message(str(threading.get_ident()).encode()))
        else:
            self._waiting.append((message, reply))
            if threading.get_ident() != self.ident:
                self.endpoint.wake()

    def _stay(self) -> bool:
        return not self._waiting and not self._closing.is_set()

    def _run(self) -> None:
        self.ident = threading.get_ident()
        while not self._closing.is_set():
            if not self._waiting and not self.endpoint.carry(self._stay):
                return
            while self._waiting:
                self._handle(*self._waiting.popleft())

    def _handle(self, message: Message, reply: Reply) -> None:
        header = message.header
        if header == b"block":
            self.stuck.put(None)
            self.go_on.get(timeout=PATIENCE)
        elif header == b"keep":
            self.kept.put(reply)
            return
        elif header == b"close":
            self.endpoint.close()
        elif header.startswith(b"thread"):
            header = str(threading.get_ident()).encode()
        reply(Message(header, self._parts or message.buffers))

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self.endpoint.wake()


class Child:
    """Another process at work, which ends with its standard input.

    Args:
        role: what it does.
        url: where.
        keys: a directory of them.
        module: of `edgeml.testing`, whose ``live_in_child`` takes all this.
    """

    def __init__(self, role: str, url: str, keys: str = "", module: str = "ends") -> None:
        told = f"{role!r}, {url!r}, {keys!r}"
        program = f"from edgeml.testing import {module}; {module}.live_in_child({told})"
        # sys.path, because a plugin may have been put there by hand.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self._process.kill()
        self._process.wait(PATIENCE)

    def freeze(self) -> None:
        """Stop it, as a machine that hangs does: its connections stay, but nobody reads."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until it has stopped

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill it, and free its pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def live_in_child(role: str, url: str, keys: str) -> None:
    """What a `Child` does, with the keys of a directory, if any."""
    credentials = Credentials.load(keys) if keys else None
    transport = load_transport(Url.parse(url).scheme)
    parked: list[Reply] = []

    def on_request(message: Message, reply: Reply) -> None:
        if message.header == b"park":
            parked.append(reply)
            print("parked", flush=True)
        else:
            if message.header == b"fork":
                fork_idly()
            if message.header == b"memory":
                message = Message(str(resident_memory()).encode())
            reply(message)

    if role == "serve":
        with transport.serve(Url.parse(url), on_request, credentials=credentials) as endpoint:
            print(endpoint.url, flush=True)
            sys.stdin.read()
    else:
        with transport.connect(Url.parse(url), PATIENCE) as requester:
            array = np.full(300 * KB, 7, np.uint8)
            for _ in range(20):
                requester.request(Message(b"park", [as_view(array)]))
            if role == "ask and fork":
                fork_idly()
                print("forked", flush=True)
            sys.stdin.read()


def fork_idly() -> None:
    """Fork a child that does nothing until standard input ends."""
    there, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        if os.fork():
            os.close(tell)
            os.read(there, 1)  # what it does first, as a child that was forked, is done
            os.close(there)
            return
    os.write(tell, b".")
    while os.read(0, 1):
        pass
    os._exit(0)


def echo(message: Message, reply: Reply) -> None:
    """Answer with what was asked."""
    reply(message)


def as_view(array: np.ndarray[Any, Any]) -> memoryview:
    """An array's memory."""
    return memoryview(array)  # type: ignore[arg-type]


def make_message(header: bytes, *sizes: int) -> Message:
    """A message with buffers of these sizes, of random bytes that are the same each time."""
    rng = np.random.default_rng(sum(sizes))
    return Message(header, [as_view(rng.integers(0, 256, size, np.uint8)) for size in sizes])


def assert_same(got: Message, sent: Message) -> None:
    """Check that what arrived is what was sent."""
    assert got.header == sent.header
    assert [len(buffer) for buffer in got.buffers] == [len(buffer) for buffer in sent.buffers]
    for got_buffer, buffer in zip(got.buffers, sent.buffers, strict=True):
        # Not compared as a whole, or a failure would print megabytes.
        assert np.array_equal(np.frombuffer(got_buffer, np.uint8), np.frombuffer(buffer, np.uint8))


def filled_with(view: memoryview) -> int | None:
    """The one value that all bytes have; None if they differ."""
    array = np.frombuffer(view, np.uint8)
    return int(array[0]) if (array == array[0]).all() else None


def crc_of(message: Message) -> int:
    """The checksum of a message's one buffer, which its header tells as well."""
    (buffer,) = message.buffers
    assert message.header.endswith(b" %d" % zlib.crc32(buffer))
    return zlib.crc32(buffer)


def results_of(futures: list[Future[T]], timeout: float = PATIENCE) -> list[T]:
    """What futures give, within ``timeout`` seconds in all."""
    deadline = time.monotonic() + timeout
    return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]


def until(condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
    """Wait until something is so, and tell whether it came to be."""
    deadline = time.monotonic() + timeout
    while not condition():
        began = time.monotonic()
        if began > deadline:
            return False
        time.sleep(2e-3)
        # A process that stood still meanwhile had no chance to do it.
        deadline += max(0.0, time.monotonic() - began - 0.1)
    return True


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Check that a block takes less than so long, by a `Stopwatch`."""
    watch = Stopwatch()
    yield
    took = watch.seconds
    assert took < seconds, f"took {took:.2f} s"


def has_ipv6() -> bool:
    """Whether this machine has IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def find_link_local() -> str:
    """An address of this machine that means something in one of its networks only."""
    try:
        with open("/proc/net/if_inet6") as file:
            interfaces = [line.split() for line in file]
    except OSError:
        interfaces = []
    for digits, _, _, scope, _, interface in interfaces:
        if scope == "20":
            return f"{ipaddress.IPv6Address(int(digits, 16))}%{interface}"
    pytest.skip("this machine has no link-local address, or does not tell")


def count_open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/dev/fd"))


def resident_memory() -> int:
    """Bytes of memory in use; where the system does not tell, the most that ever were."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else KB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
