"""A loop at 50 Hz whose policy takes 100 ms to think, at the other end of a bad link."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaos.processes import Process, Zygote
from edgeml import InferenceClient
from edgeml.control import Blend, ChunkedPolicy, Ensemble, RealTime, Ticks
from edgeml.testing.stopwatch import Stopwatch
from pairs import process, wait_until

RATE = 50
HORIZON = 50
AT_MOST = 0.005  # seconds that a step may take
PATIENCE = 0.5  # seconds after which another chunk has come, where nothing else keeps the machine
LINK = {"delay": 0.010, "jitter": 0.040}  # seconds each way: 30, and 20 more or less

# Over shared memory there is no link, so the function sleeps for one, too.
SERVER = """
import random, sys, time
import numpy as np
import edgeml

transport, link = sys.argv[1:]
seconds = iter(random.Random(1).random, None)

def policy(observation):
    assert observation["image"].nbytes == 2_764_800
    time.sleep(0.1 + (0.02 + 0.04 * (next(seconds) + next(seconds)) if link == "here" else 0.0))
    state = observation["state"]
    steps = np.arange(50)[:, None]
    return {"arm": state[0] + steps + np.zeros((50, 7)), "grip": np.zeros(50, bool)}

with edgeml.InferenceServer(0, transport=transport) as server:
    server.register_interface("policy", policy)
    server.start(threaded=True)
    print(server.url, server.port, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as made:
        yield made


class Far:
    """A server at the other end of a link that faults can be switched on of."""

    def __init__(self, transport: str, proxy: Process | None) -> None:
        self._transport, self._proxy = transport, proxy
        self._server: Any = None
        self._port = proxy.hear() if proxy is not None else 0
        self.url = ""
        self.pids = [] if proxy is None else [proxy.pid]

    @contextmanager
    def serving(self) -> Iterator[Any]:
        link = "here" if self._proxy is None else "away"
        with process(SERVER, self._transport, link) as server:
            self.url, port = server.line().split()
            if self._proxy is not None:
                self._proxy.ask(do="target", port=int(port))
                self._proxy.ask(do="set", **LINK)
                self.url = f"{self._transport}://127.0.0.1:{self._port}"
            yield server

    def link(self, **weather: Any) -> None:
        assert self._proxy is not None
        self._proxy.ask(do="set", **weather)


@pytest.fixture
def far(zygote: Zygote, transport: str) -> Iterator[Far]:
    proxy = None if transport == "shm" else zygote.start("proxy", seed=1)
    yield Far(transport, proxy)
    if proxy is not None:
        proxy.kill()


class Watch:
    """Tells what has passed, less what the machine kept any of these processes waiting meanwhile.

    What one thread waits for may wait for another in turn, as all do for the GIL, so the waits of
    all of them are added up. Where nobody else wants the processors they are nothing.
    """

    def __init__(self, *others: int) -> None:
        self._processes = ("self", *others)
        self._waited = self._waits()
        self._other = Stopwatch(*others)  # knows of machines that stand still
        self._began = time.monotonic()

    def _waits(self) -> float:
        seconds = 0.0
        for each in self._processes:
            for thread in Path(f"/proc/{each}/task").glob("*/schedstat"):  # on Linux
                with suppress(OSError):
                    seconds += int(thread.read_text().split()[1]) / 1e9
        return seconds

    @property
    def seconds(self) -> float:
        passed = time.monotonic() - self._began
        return min(self._other.seconds, passed - (self._waits() - self._waited))


class Loop:
    """Steps, and holds them to their time, less what the machine ran other programs meanwhile.

    Args:
        policy: that is stepped.
        others: processes that it waits for.
    """

    def __init__(self, policy: ChunkedPolicy, *others: int) -> None:
        self.policy = policy
        self._others = others
        self._since_chunk = Watch(*others)  # came
        self._age = math.inf
        self.ticks = iter(Ticks(RATE))
        self.image = np.random.default_rng(1).integers(0, 255, (2, 640, 720, 3), np.uint8)
        self.longest = 0.0  # seconds, of a step
        self.over = 0  # steps that took longer than they may, by the clock alone

    def step(self) -> Any:
        tick = next(self.ticks)
        self.image[0, 0, 0] = tick % 256
        observation = {"image": self.image, "state": np.array([float(tick)])}
        watch = Watch()
        began = time.monotonic()
        action = self.policy.step(observation)
        took = time.monotonic() - began
        self.over += took > AT_MOST
        if took > AT_MOST:
            took = min(took, watch.seconds)
        if self.policy.latest.age < self._age:
            self._since_chunk = Watch(*self._others)
        self._age = self.policy.latest.age
        self.longest = max(self.longest, took)
        # The first takes new memory for its copy, before the robot moves.
        assert tick == 0 or took <= AT_MOST, f"step {tick} took {took * 1e3:.1f} ms"
        return action

    def play(self) -> None:
        """Step, and have something to play, unless the machine left no time for asking."""
        self.step()
        if self.policy.latest.source != "chunk":
            late = self._since_chunk.seconds
            assert late < PATIENCE, f"nothing to play {late:.2f} s after a chunk came"

    def until(self, predicate: Callable[[], Any]) -> None:
        """Step until something holds."""

        def holds() -> bool:
            self.step()
            return bool(predicate())

        wait_until(holds)


def run(far: Far, merge: Any, seconds: float) -> None:
    with (
        far.serving() as server,
        InferenceClient(url=far.url) as client,
        ChunkedPolicy(client, rate=RATE, merge=merge, refill=40, max_age=1.0) as policy,
    ):
        loop = Loop(policy, server.popen.pid, *far.pids)
        loop.until(lambda: policy.latest.source == "chunk")  # before that there is nothing to play
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            loop.play()
        policy.report()
        print(
            f"longest step {loop.longest * 1e3:.2f} ms; {loop.over} that the machine kept waiting"
        )
        assert policy.latest.action["arm"].shape == (7,)
        assert policy.stats()["age_max"] <= 1.0


MERGES = ["append", "aligned", Blend(10, only=["arm"]), Ensemble(), RealTime()]


@pytest.mark.parametrize("transport", ["zmq", "grpc", "shm"])
def test_no_tick_is_missed(far: Far) -> None:
    run(far, "aligned", 20.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("merge", MERGES, ids=str)
@pytest.mark.parametrize("transport", ["zmq", "grpc", "shm"])
def test_no_tick_is_missed_in_five_minutes(far: Far, merge: Any) -> None:
    run(far, merge, 300.0)


@pytest.mark.parametrize("transport", ["zmq", "grpc"])
def test_a_step_waits_for_nobody_whatever_has_become_of_the_server(far: Far) -> None:
    with far.serving() as server:
        client = InferenceClient(url=far.url)
        policy = ChunkedPolicy(client, rate=RATE, max_age=0.6)
        with client, policy:
            loop = Loop(policy)

            def holds() -> bool:
                return policy.latest.source == "hold"

            def plays() -> bool:
                return policy.latest.source == "chunk"

            loop.until(plays)
            far.link(dark="both")
            loop.until(holds)
            far.link(dark="")
            loop.until(plays)
            server.signal(signal.SIGSTOP)
            loop.until(holds)
            server.signal(signal.SIGCONT)
            loop.until(plays)
            server.popen.kill()
            loop.until(holds)
            for _ in range(RATE):
                loop.step()
            with far.serving():
                loop.until(plays)
            assert policy.stats()["age_max"] <= 0.6
