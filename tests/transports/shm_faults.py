"""Processes that talk to each other and can be killed, stopped or forked, and how to watch them.

A *zygote* imports edgeml once, never opens a transport, and forks a process whenever a test asks
for one, which takes milliseconds. Each process plays a role, `Server` or `Client`: it obeys
orders, which are calls of the role's methods, while its threads carry on in the background.

Every message carries the crc32 of itself. Whoever receives one checks it on the spot, keeps it for
a random while, and checks it again. A process that finds anything wrong in the background ends at
once with status 70 and its traceback on stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from edgeml.core import (
    Endpoint,
    Message,
    Overloaded,
    Reply,
    Requester,
    Unreachable,
    Url,
    load_transport,
)
from edgeml.testing.stopwatch import Stopwatch

KB, MB = 1 << 10, 1 << 20
PATIENCE = 20.0  # seconds that anything may take which should come at once
PARKED = 50  # requests that a client under way leaves unanswered at its server
BROKEN = 70  # exit status of a process that found something wrong
_PACKET = 1 << 17  # bytes; the largest order


# Messages ---------------------------------------------------------------------------------

ANSWER, PARK = 1, 2  # what a request asks for: a reply, or to be kept waiting

_random_bytes = memoryview(np.random.default_rng(0).integers(0, 256, 8 * MB, np.uint8))
_CRC = struct.Struct("<I")
_FIELDS = struct.Struct("<BQI")


@dataclass(frozen=True, slots=True)
class Said:
    """What a message says of itself.

    Attributes:
        kind: `ANSWER` or `PARK`.
        number: what the reply repeats; of a parked request, who asks.
        size: bytes that the reply is to have; of a parked request, how many will come.
    """

    kind: int
    number: int
    size: int


def compose(nbytes: int, said: Said) -> Message:
    """A message of random bytes in one buffer or up to 1,001, its crc32 first in the header."""
    (count,) = random.choices((0, 1, 3, 1000), (60, 20, 18, 2))
    cuts = sorted(random.randrange(nbytes + 1) for _ in range(count))
    lengths = [end - start for start, end in itertools.pairwise((0, *cuts, nbytes))]
    starts = [random.randrange(len(_random_bytes) - length) for length in lengths]
    buffers = [_random_bytes[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    text = _FIELDS.pack(said.kind, said.number, said.size) + repr(lengths).encode()
    return Message(_CRC.pack(_crc(text, buffers)) + text, buffers)


def check(message: Message) -> Said:
    """Find that a message is, to the byte, what was sent."""
    text = message.header[_CRC.size :]
    (crc,) = _CRC.unpack_from(message.header)
    lengths = list(map(len, message.buffers))
    assert text[_FIELDS.size :] == repr(lengths).encode(), f"buffers of other lengths: {lengths}"
    assert crc == _crc(text, message.buffers), f"wrong bytes in buffers of {lengths}"
    return Said(*_FIELDS.unpack_from(text))


def _crc(text: bytes, buffers: list[memoryview]) -> int:
    crc = zlib.crc32(text)
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def wide() -> int:
    """A size from 0 to 4 MB, half of them small."""
    return random.randrange(4 * MB + 1) if random.random() < 0.5 else mostly_small()


def mostly_small() -> int:
    """A size from 0 to 4 MB, of every magnitude; the mean is 60 KB, one in 50 exceeds 1 MB."""
    which = random.random()
    if which < 0.02:
        return 0
    if which < 0.98:
        return int((64 * KB if which < 0.9 else MB) ** random.random())
    return random.randrange(MB, 4 * MB + 1)


SIZES = {"wide": wide, "mostly small": mostly_small}


class Kept:
    """Messages that were received, each kept for a random while and checked again at its end.

    Args:
        room: how many are kept at a time; None for all.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._messages: list[Message] = []

    def add(self, message: Message) -> None:
        with self._lock:
            self._messages.append(message)
            if self._room is None or len(self._messages) <= self._room:
                return
            index = random.randrange(len(self._messages))
            self._messages[index], self._messages[-1] = message, self._messages[index]
            oldest = self._messages.pop()
        check(oldest)

    def recheck(self) -> int:
        """Check all; returns how many there are."""
        with self._lock:
            return len([check(message) for message in self._messages])

    def let_go(self, first: int = 0, step: int = 1) -> None:
        """Check some, all unless told otherwise, and let go of them."""
        with self._lock:
            for message in self._messages[first::step]:
                check(message)
            del self._messages[first::step]


# Roles: their public methods are the orders ------------------------------------------------


class Role:
    """What a process does."""

    orders: socket.socket  # where they come from

    def __init__(self) -> None:
        self.kept = Kept(32)
        self.hoard = self.kept

    def give_up_idle_memory_soon(self) -> None:
        """Let no pool of shared memory hide what is never given up."""
        memory = sys.modules.get("edgeml.transports.shm.memory")
        if memory:  # it is the transport that is tested
            memory._KEEP = 0.2  # seconds

    def let_go(self) -> None:
        self.kept.let_go()

    def recheck_hoard(self) -> int:
        """Check all that was hoarded; returns how many messages that is."""
        return self.hoard.recheck()

    def let_go_of_hoard(self, first: int, step: int) -> None:
        self.hoard.let_go(first, step)

    def close(self) -> None:
        raise NotImplementedError


class Server(Role):
    """Answers each request at once or, as often, from another thread and in another order."""

    def __init__(self) -> None:
        super().__init__()
        self._endpoint: Endpoint
        self._parked: defaultdict[int, list[Reply]] = defaultdict(list)
        self._later: SimpleQueue[tuple[Said, Reply] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._answer_later)

    def serve(self, url: str, hoard: bool = False) -> str:
        """Serve, and keep all that is received if told so; returns the URL."""
        if hoard:
            self.kept = self.hoard = Kept(None)
        transport = load_transport(Url.parse(url).scheme)
        self._endpoint = transport.serve(Url.parse(url), fatal_if_it_fails(self._on_request))
        self._thread.start()
        return str(self._endpoint.url)

    def _on_request(self, message: Message, reply: Reply) -> None:
        said = check(message)
        self.kept.add(message)
        if said.kind == PARK:
            parked = self._parked[said.number]
            parked.append(reply)
            if len(parked) == said.size:  # tells the client that all have come
                parked.pop()(compose(0, said))
        elif random.random() < 0.5:
            self._answer(said, reply)
        else:
            self._later.put((said, reply))

    def _answer_later(self) -> None:
        some: list[tuple[Said, Reply]] = []
        while (asked := self._later.get()) is not None:
            some.append(asked)
            del asked  # or a client's last reply lives as long as nobody else asks
            if self._later.empty():
                random.shuffle(some)
                while some:
                    self._answer(*some.pop())

    def _answer(self, said: Said, reply: Reply) -> None:
        reply(compose(said.size, said))

    def gone(self, number: int) -> float:
        """Answer a client that has died until that is seen to be dropped; returns when it was."""
        began, watch = time.monotonic(), Stopwatch()
        before = self._endpoint.dropped
        for reply in self._parked.pop(number):
            reply(compose(wide(), Said(PARK, number, 0)))
            if until(lambda: self._endpoint.dropped > before, 0.03):
                return began + watch.seconds
        raise AssertionError("replies to a client that has died are not dropped")

    def answer_parked(self, number: int, count: int, nbytes: int, together: bool) -> float:
        """Answer some of a client's parked requests; returns the seconds that one took at most."""
        parked = self._parked[number]
        replies = [parked.pop() for _ in range(min(count, len(parked)))]
        message = compose(nbytes, Said(PARK, number, 0))
        slowest = 0.0
        for some in [replies] if together else [[reply] for reply in replies]:
            watch = Stopwatch()
            if together:
                self._endpoint.reply_many(some, message)
            else:
                some[0](message)
            slowest = max(slowest, watch.seconds)
        return slowest

    def dropped(self) -> int:
        return self._endpoint.dropped

    def close(self) -> None:
        self._endpoint.close()
        self._later.put(None)
        self._thread.join(PATIENCE)
        self.kept.let_go()


class Client(Role):
    """Exchanges messages over any number of connections."""

    def __init__(self) -> None:
        super().__init__()
        self.hoard = Kept(None)
        self._requesters: list[Requester] = []
        self._numbers = itertools.count(1)
        self._under_way: dict[int, Future[Message]] = {}
        self._parked: list[Future[Message]] = []
        self._tally = {"answered": 0, "failed": 0}
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._slowest = 0.0  # seconds, of all calls
        self._fork: socket.socket

    def connect(self, url: str, connections: int = 1) -> None:
        for _ in range(connections):
            self._connect(url)

    def _connect(self, url: str) -> Requester:
        made = load_transport(Url.parse(url).scheme).connect(Url.parse(url), PATIENCE)
        self._requesters.append(made)
        return made

    def disconnect(self) -> None:
        while self._requesters:
            self._requesters.pop().close()

    # Traffic

    def start(self, url: str, number: int, pause: float = 0.0) -> None:
        """Leave requests unanswered and exchange messages in the background, until the end.

        Args:
            url: the server.
            number: by what the server knows whose requests are parked.
            pause: seconds between two exchanges.
        """
        self._stop.clear()
        self.park(url, number, PARKED)
        for _ in range(2):
            turns = self._turns_until_stopped(pause)
            thread = _start(self._exchange_until_lost, self._requesters[-1], wide, turns)
            self._threads.append(thread)

    def _turns_until_stopped(self, pause: float) -> Iterator[None]:
        while not self._stop.wait(pause):
            yield

    def _join(self) -> None:
        while self._threads:
            self._threads.pop().join()

    def stop(self) -> float:
        """End what `start` began, nothing having failed; returns the slowest call's seconds."""
        self._stop.set()
        self._join()
        for requester in self._requesters:
            self._call(requester, 0, 0)
        return self._slowest

    def lost(self) -> float:
        """Find that all that was under way has failed as unreachable; returns when it had."""
        began, watch = time.monotonic(), Stopwatch()
        self._join()
        for future in (*self._under_way.values(), *self._parked):
            if error := future.exception(PATIENCE):  # none for the last to arrive
                assert isinstance(error, (Unreachable, Overloaded)), error
        when = began + watch.seconds
        for requester in self._requesters:
            assert _says_unreachable(requester)
        self.disconnect()
        self._under_way.clear()
        self._parked.clear()
        return when

    def exchange(self, count: int, threads: int = 2, sizes: str = "mostly small") -> None:
        """Exchange ``count`` requests and replies over all connections, and wait for the end."""
        turns = iter(range(count))  # shared by all threads
        requesters = itertools.islice(itertools.cycle(self._requesters), threads)
        started = [_start(self._exchange, each, SIZES[sizes], turns) for each in requesters]
        for thread in started:
            thread.join()

    def _exchange_until_lost(self, requester: Requester, *args: Any) -> None:
        try:
            self._exchange(requester, *args)
        except Unreachable:
            assert until(lambda: requester.lost, PATIENCE)

    def _exchange(
        self, requester: Requester, size: Callable[[], int], turns: Iterator[None]
    ) -> None:
        for _ in turns:
            if random.random() < 0.5:
                self._call(requester, size(), size())
                continue
            numbers = [self._request(requester, size(), size())]
            numbers += [
                self._request(requester, size(), size())
                for _ in itertools.islice(turns, random.randrange(8))
            ]
            for number in numbers:
                self._take(number, self._under_way[number].result(PATIENCE))
                del self._under_way[number]

    def _call(self, requester: Requester, nbytes: int, back: int) -> Message:
        number = next(self._numbers)
        message = compose(nbytes, Said(ANSWER, number, back))
        watch = Stopwatch()
        reply = requester.call(message, PATIENCE)
        self._slowest = max(self._slowest, watch.seconds)
        self._take(number, reply)
        return reply

    def _request(self, requester: Requester, nbytes: int, back: int) -> int:
        number = next(self._numbers)
        message = compose(nbytes, Said(ANSWER, number, back))
        self._under_way[number] = requester.request(message)
        return number

    def _take(self, number: int, reply: Message) -> None:
        said = check(reply)
        assert said.number == number, f"the reply to {said.number}, taken for that to {number}"
        assert said.size == sum(map(len, reply.buffers))
        self.kept.add(reply)

    def call(self, count: int, nbytes: int, back: int) -> float:
        """Call on the first connection and hoard the replies; returns the slowest's seconds."""
        self._slowest = 0.0
        for _ in range(count):
            self.hoard.add(self._call(self._requesters[0], nbytes, back))
        return self._slowest

    # Requests whose replies are late or never come

    def park(self, url: str, number: int, count: int) -> None:
        """Leave ``count`` requests at the server, over as many connections as that takes."""
        requester = self._connect(url)
        while len(self._parked) < count:
            try:
                self._parked.append(requester.request(compose(0, Said(PARK, number, count))))
            except Overloaded:
                requester = self._connect(url)
        done, _ = wait(self._parked, PATIENCE, FIRST_COMPLETED)  # the last to arrive is answered
        assert done, "requests do not arrive"

    def flood(self, count: int, nbytes: int) -> tuple[int, float]:
        """Request without taking replies; returns how many were refused, and the slowest."""
        requester = self._requesters[-1]
        message = compose(nbytes, Said(ANSWER, 0, 0))
        refused, slowest = 0, 0.0
        for _ in range(count):
            watch = Stopwatch()
            try:
                self._parked.append(requester.request(message))
            except Overloaded:
                refused += 1
            slowest = max(slowest, watch.seconds)
        return refused, slowest

    def tally(self) -> dict[str, int]:
        """What has become so far of the requests of `park` and `flood`."""
        waiting = []
        for future in self._parked:
            if not future.done():
                waiting.append(future)
            elif error := future.exception():
                assert isinstance(error, (Unreachable, Overloaded)), error
                self._tally["failed"] += 1
            else:
                check(future.result())
                self._tally["answered"] += 1
        self._parked = waiting
        return self._tally | {"waiting": len(waiting)}

    def works(self) -> list[bool]:
        """Call over each connection; tells of each whether it answers or says why not."""
        return [not _says_unreachable(requester) for requester in self._requesters]

    # Forks

    def fork(self) -> int:
        """Fork, and return the child's id.

        The child has what was hoarded. It obeys this process by `in_fork`, and once this one has
        died, whoever gave this one its orders.
        """
        self._fork, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            self._fork.close()
            self.kept = Kept(32)  # a thread that is not here may have had its lock
            _obey(self, theirs)
            _obey(self, self.orders)
            os._exit(0)
        theirs.close()
        return pid

    def in_fork(self, do: str, *args: Any) -> Any:
        """Have the forked child obey an order."""
        return _order(self._fork, do, *args)

    def close(self) -> None:
        self.disconnect()
        self.kept.let_go()
        self.hoard.let_go()


def _start(function: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def _says_unreachable(requester: Requester) -> bool:
    """Whether both ways to ask say that the server can't be reached; else both get an answer."""
    message = compose(0, Said(ANSWER, 0, 0))
    unreachable = []
    for ask in (requester.call, lambda m, seconds: requester.request(m).result(seconds)):
        try:
            check(ask(message, PATIENCE))
            unreachable.append(False)
        except Unreachable:
            unreachable.append(True)
    assert len(set(unreachable)) == 1
    return unreachable[0]


def fatal_if_it_fails(on_request: Callable[..., None]) -> Callable[..., None]:
    """Keep a transport from merely logging what a check found."""

    def guarded(message: Message, reply: Reply) -> None:
        try:
            on_request(message, reply)
        except BaseException:
            _fatal()

    return guarded


def _fatal(*_: Any) -> None:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(BROKEN)


# Orders, and the process that forks ---------------------------------------------------------


def _order(channel: socket.socket, do: str, *args: Any) -> Any:
    """Give an order and wait for what comes of it."""
    channel.send(json.dumps([do, args]).encode())
    packet = channel.recv(_PACKET)
    if not packet:
        raise ConnectionResetError
    result, error = json.loads(packet)
    assert not error, f"{do} failed: {error}"
    return result


def _obey(role: Role, orders: socket.socket) -> None:
    """Carry out orders until whoever gives them is gone."""
    while packet := orders.recv(_PACKET):
        do, args = json.loads(packet)
        try:
            answer = getattr(role, do)(*args), ""
        except Exception:
            answer = None, traceback.format_exc()
        orders.send(json.dumps(answer).encode())


def _live(kind: str, seed: int, orders: socket.socket) -> None:
    """What a forked process does."""
    threading.excepthook = _fatal
    random.seed(seed)
    role = {"Server": Server, "Client": Client}[kind]()
    role.orders = orders
    _obey(role, orders)
    role.close()


def _zygote(requests: socket.socket) -> None:
    """Fork processes and bury them, until whoever asks for that is gone."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))  # as on most machines
    alive = set()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, _PACKET, 1)
        if not packet:
            break
        what, *args = json.loads(packet)
        if what == "fork":
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads can't be forked"
            with socket.socket(fileno=descriptors[0]) as orders:
                pid = os.fork()
                if not pid:
                    requests.close()
                    _live(*args, orders)
                    return
            alive.add(pid)
            answer = pid
        else:
            (pid,) = args
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            alive.remove(pid)
        requests.send(json.dumps(answer).encode())
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


# The test's side ----------------------------------------------------------------------------


class Zygote:
    """Starts processes; a context manager that kills those that are left."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._children: list[Child] = []

    def spawn(self, kind: str) -> Child:
        """Start a process that plays a role, by the name of its class."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = self._ask(theirs, "fork", kind, random.getrandbits(32))
        self._children.append(Child(self, pid, ours))
        return self._children[-1]

    def bury(self, child: Child) -> int:
        """Wait for a process to end; returns its exit status."""
        status = self._ask(None, "wait", child.pid)
        self._children.remove(child)
        return status

    def _ask(self, lent: socket.socket | None, *what: Any) -> int:
        descriptors = [lent.fileno()] if lent else []
        self._requests.settimeout(2 * PATIENCE)
        socket.send_fds(self._requests, [json.dumps(what).encode()], descriptors)
        return json.loads(self._requests.recv(_PACKET))

    def __enter__(self) -> Zygote:
        return self

    def kill_all(self) -> None:
        """Kill those that are left, of a test that failed."""
        for child in list(self._children):
            os.kill(child.pid, signal.SIGKILL)
            child.status()

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            os.kill(child.pid, signal.SIGKILL)
            child.orders.close()
        self._requests.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()


class Child:
    """A process that plays a role."""

    def __init__(self, zygote: Zygote, pid: int, orders: socket.socket) -> None:
        self.pid = pid
        self.orders = orders
        self.orders.settimeout(100.0)  # seconds; nobody is asked for more at a time
        self._zygote = zygote

    def ask(self, do: str, *args: Any) -> Any:
        """Call a method of the role there; returns what it returns."""
        try:
            return _order(self.orders, do, *args)
        except ConnectionError:
            raise AssertionError(f"{do}: the process has ended with {self.status()}") from None

    def signal(self, number: int) -> float:
        """Send a signal, and see it stop if that is what it says; returns when it was sent."""
        when = time.monotonic()
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            assert until(lambda: set(_states(self.pid)) == {"T"}, PATIENCE)
        return when

    def status(self) -> int:
        """Wait for its end; returns its exit status."""
        self.orders.close()
        return self._zygote.bury(self)

    def end(self) -> None:
        """Have it close everything and end, in good health."""
        assert self.status() == 0, "the process ended badly"


@dataclass(frozen=True)
class Held:
    """What a process holds of the system.

    Attributes:
        descriptors: what its file descriptors lead to.
        mappings: the files without a name that it has mapped.
        sockets: the names of its Unix sockets.
        threads: how many it has.
        memory: bytes, the shared memory that it has open or mapped included.
    """

    descriptors: tuple[str, ...]
    mappings: tuple[str, ...]
    sockets: tuple[str, ...]
    threads: int
    memory: int

    @classmethod
    def by(cls, child: Child) -> Held:
        """Look at a process."""
        proc = Path(f"/proc/{child.pid}")
        descriptors, shared = [], {}
        for entry in (proc / "fd").iterdir():
            try:
                descriptors.append(str(entry.readlink()))
                if descriptors[-1].startswith("/memfd:"):
                    shared[entry.stat().st_ino] = entry.stat().st_blocks * 512
            except FileNotFoundError:  # closed meanwhile
                continue
        mappings = []
        for line in (proc / "maps").read_text().splitlines():
            span, _, offset, _, inode, *name = line.split(maxsplit=5)
            if name and ("memfd:" in name[0] or "(deleted)" in name[0]):
                if not name[0].startswith("/dev/zero"):  # memory that only this process has
                    mappings.append(name[0])
                start, end = (int(address, 16) for address in span.split("-"))
                size = int(offset, 16) + end - start
                shared[int(inode)] = max(size, shared.get(int(inode), 0))
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        private = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile")) * KB
        named = {f"socket:[{w[6]}]": w[7] for w in _unix_sockets() if len(w) > 7}
        return cls(
            tuple(sorted(descriptors)),
            tuple(sorted(mappings)),
            tuple(sorted(named[each] for each in descriptors if each in named)),
            int(status["Threads"]),
            private + sum(shared.values()),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """How many descriptors, mappings, sockets and threads."""
        return len(self.descriptors), len(self.mappings), len(self.sockets), self.threads

    def beyond(self, before: Held, more: int = 0, memory: int = 256 * MB) -> str:
        """What this is more than it was before, for people to read; empty if it isn't.

        Args:
            before: the same process, earlier.
            more: descriptors, and mappings, that may have been added.
            memory: bytes that may have been, for pools of memory take a while to fill.
        """
        said = []
        for what in ("descriptors", "mappings", "sockets"):
            now, then = getattr(self, what), getattr(before, what)
            if len(now) > len(then) + more:
                said.append(f"{what}: {len(then)} -> {len(now)}, {_kinds(now)}")
        if self.threads > before.threads:
            said.append(f"threads: {before.threads} -> {self.threads}")
        if self.memory > before.memory + memory:
            said.append(f"memory: {before.memory / MB:.0f} -> {self.memory / MB:.0f} MB")
        return "; ".join(said)


def _kinds(names: tuple[str, ...]) -> str:
    counts = Counter(name.partition("[")[0] for name in names)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _unix_sockets() -> list[list[str]]:
    return [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]


def _states(pid: int) -> list[str]:
    """What each thread of a process is doing: R, S, T and so on; empty if there is none."""
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return [task.read_text().rpartition(")")[2].split()[0] for task in tasks]


def is_alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return not set(_states(pid)) <= {"Z", "X"}
    except OSError:
        return False


def names_left() -> set[str]:
    """Files named as edgeml names them, or Python its shared memory, where programs leave such.

    Others may be another program's. Sockets without a file go with the process.
    """
    places = ("/dev/shm", "/tmp", "/run/user/*")
    return {
        name for place in places for own in ("edgeml-*", "psm_*") for name in glob(f"{place}/{own}")
    }


def until(condition: Callable[[], Any], timeout: float) -> bool:
    """Wait until something is so, and tell whether it came to be."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(2e-3)
    return True


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(0)) as _requests:
        _zygote(_requests)
