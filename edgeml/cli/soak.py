"""``edgeml soak``: many clients of all three kinds for a long time, and what that takes.

Each server, and each group of clients, is a process of its own. A few threads of each such group
have its clients call in turn; every answer is compared with what it must be.
"""

from __future__ import annotations

import heapq
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from edgeml.cli.probe import NO_KEYS, one_line
from edgeml.core import EdgemlError
from edgeml.data import QueuedDataStore, ReplayBuffer
from edgeml.extras import load_matplotlib
from edgeml.services import (
    ActionClient,
    ActionConfig,
    ActionServer,
    InferenceClient,
    InferenceServer,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
)

__all__ = ["run"]

KINDS = ("action", "inference", "trainer")
_GROUP = 100  # clients in a process
_THREADS = 8  # of a process, that have its clients call
_START = 120.0  # seconds that a process may take until it is ready
_END = 15.0  # seconds that it may take to end
_ROWS = 30  # of the table
_HELD = 50_000  # items of the learner
_PUBLISHING = 1.0  # seconds between two publications
_OBSERVATION = 10_000  # bytes
_WEIGHTS = 100_000  # bytes
_WARM = 60.0  # seconds after which memory counts, or the first quarter if that is less
_GROWTH = 0.02  # of memory, that is taken for none
_TIMES = 1000  # of calls that are kept for each row and process
_STEPS = "▁▂▃▄▅▆▇█"

_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Sample:
    """What was seen at one time.

    Attributes:
        seconds: since all clients were there.
        calls: since the sample before.
        times: how long some of them took, in seconds.
        errors: since the start, by what they were.
        memory: bytes resident of all servers, and of all clients.
        descriptors: open, of all processes.
        threads: of all processes.
    """

    seconds: float
    calls: int = 0
    times: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    memory: tuple[int, int] = (0, 0)
    descriptors: int = 0
    threads: int = 0


def run(
    transport: str | None,
    clients: int,
    seconds: float,
    rate: float,
    timeout: float,
    picture: Path | None = None,
) -> int:
    """Hold clients for a time and print what that took; 1 where something failed or grew.

    Args:
        transport: as for any server.
        clients: how many, of all three kinds together.
        seconds: for how long.
        rate: calls per second of each client.
        timeout: seconds that connecting, or a call, may take.
        picture: a PNG to write at the end, for which matplotlib is needed.

    Raises:
        ImportError: a picture is wanted, and matplotlib isn't installed.
        EdgemlError: a server or a group of clients doesn't start; the text says why.
    """
    plot = None if picture is None else _plotter()
    with ExitStack() as stack:
        servers = [stack.enter_context(_process(_serve, kind, transport)) for kind in KINDS]
        urls = {kind: server.ready() for kind, server in zip(KINDS, servers, strict=True)}
        firsts = range(0, clients, _GROUP)
        groups = [
            stack.enter_context(
                _process(_use, urls, range(first, min(first + _GROUP, clients)), rate, timeout)
            )
            for first in firsts
        ]
        for group in groups:
            group.ready()
        print(
            f"{clients} clients in {len(groups)} processes, {len(servers)} servers, "
            f"{rate:g} calls a second and client, for {seconds:g} s",
            flush=True,
        )
        samples: list[Sample] = []
        with suppress(KeyboardInterrupt):  # what has been seen by then is told
            _watch(servers, groups, seconds, samples)
    code = _conclude(samples)
    if plot is not None and picture is not None:
        plot(samples, picture)
        print(f"picture: {picture}")
    return code


# The table ----------------------------------------------------------------------------------


def _watch(
    servers: list[_Process], groups: list[_Process], seconds: float, samples: list[Sample]
) -> None:
    print(
        f"\n{'time s':>8}{'calls/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}"
        f"{'servers MB':>12}{'clients MB':>12}{'descriptors':>13}{'threads':>9}"
    )
    began = time.monotonic()
    samples.append(_look(servers, groups, 0.0))
    pause = max(1.0, seconds / _ROWS)
    while (now := time.monotonic() - began) < seconds:
        time.sleep(min(pause, max(0.0, seconds - now)))
        sample = _look(servers, groups, time.monotonic() - began)
        _print_row(sample, sample.seconds - samples[-1].seconds)
        samples.append(sample)


def _look(servers: list[_Process], groups: list[_Process], seconds: float) -> Sample:
    sample = Sample(seconds)
    for group in groups:
        calls, times, errors = group.ask()
        sample.calls += calls
        sample.times += times
        sample.errors += errors
    for server in servers:
        sample.errors += server.ask()
    memory = []
    for each in (servers, groups):
        seen = [process.look() for process in each]
        memory.append(sum(m for m, _, _ in seen))
        sample.descriptors += sum(d for _, d, _ in seen)
        sample.threads += sum(t for _, _, t in seen)
    sample.memory = memory[0], memory[1]
    return sample


def _print_row(sample: Sample, seconds: float) -> None:
    p50, p99 = np.percentile(sample.times, (50, 99)) * 1e3 if sample.times else (0.0, 0.0)
    print(
        f"{sample.seconds:>8.0f}{sample.calls / seconds:>9.0f}{p50:>9.2f}{p99:>9.2f}"
        f"{sample.errors.total():>8}{sample.memory[0] / 1e6:>12.1f}"
        f"{sample.memory[1] / 1e6:>12.1f}{sample.descriptors:>13}{sample.threads:>9}",
        flush=True,
    )


def _conclude(samples: list[Sample]) -> int:
    """Print what there is to say, and return 0 where all is well."""
    if len(samples) < 2:
        print("\nnothing was seen yet")
        return 1
    end = samples[-1].seconds
    warm = [each for each in samples if each.seconds >= min(_WARM, end / 4)]
    some = max(1, len(warm) // 5)  # of which the medians are compared
    well = True
    print()
    for name, get in _FIGURES.items():
        values = [get(sample) for sample in warm]
        first, last = median(values[:some]), median(values[-some:])
        growth = last / first - 1 if first else 0.0
        steady = growth <= (_GROWTH if "MB" in name else 0.0) or last - first < 1.0
        well &= steady
        print(
            f"{name:<12}{_line(values)}  {first:,.1f} to {last:,.1f}, {growth:+.1%}"
            f"{'' if steady else '  GROWS'}"
        )
    errors = samples[-1].errors
    print(f"{'errors':<12}{errors.total()}")
    for text, count in errors.most_common(20):
        print(f"{count:>8} x {text}")
    return 0 if well and not errors else 1


_FIGURES: dict[str, Callable[[Sample], float]] = {
    "servers MB": lambda sample: sample.memory[0] / 1e6,
    "clients MB": lambda sample: sample.memory[1] / 1e6,
    "descriptors": lambda sample: float(sample.descriptors),
    "threads": lambda sample: float(sample.threads),
}


def _line(values: Sequence[float]) -> str:
    """A picture in one line, from the least value to the greatest."""
    least, most = min(values), max(values)
    scale = (len(_STEPS) - 1) / (most - least) if most > least else 0.0
    return "".join(_STEPS[round((value - least) * scale)] for value in values)


def _plotter() -> Callable[[Sequence[Sample], Path], None]:
    load_matplotlib()
    from matplotlib import pyplot

    def plot(samples: Sequence[Sample], path: Path) -> None:
        times = [sample.seconds for sample in samples]
        figure, axes = pyplot.subplots(3, 2, figsize=(10, 8), sharex=True, layout="constrained")
        errors = ("errors", lambda sample: float(sample.errors.total()))
        rates = ("calls per sample", lambda sample: float(sample.calls))
        for axis, (name, get) in zip(axes.flat, [*_FIGURES.items(), errors, rates], strict=True):
            points = samples[1:] if "calls" in name else samples
            axis.plot(times[-len(points) :], [get(sample) for sample in points])
            axis.set_title(name)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        for axis in axes[-1]:
            axis.set_xlabel("s")
        figure.savefig(path)
        pyplot.close(figure)

    return plot


# Processes ----------------------------------------------------------------------------------


class _Process:
    """One that is ready at some time, and then says when asked what it has counted."""

    def __init__(self, target: Callable[..., None], *given: Any) -> None:
        self._name = target.__name__.strip("_")
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_play, args=(target, theirs, given), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> Any:
        """Return what it says once it is ready."""
        said, why = self._receive(_START)
        if why:
            raise EdgemlError(why)
        return said

    def ask(self) -> Any:
        """Return what it has counted."""
        self.pipe.send(None)
        return self._receive(_START)

    def _receive(self, timeout: float) -> Any:
        with suppress(EOFError, ConnectionError):
            if self.pipe.poll(timeout):
                return self.pipe.recv()
            raise EdgemlError(f"a process that is to {self._name} said nothing for {timeout:g} s")
        raise EdgemlError(f"a process that is to {self._name} ended")

    def look(self) -> tuple[int, int, int]:
        """Bytes of memory that are resident, open descriptors, and threads; 0 if unknown."""
        own = Path(f"/proc/{self.process.pid}")
        with suppress(OSError):  # elsewhere than on Linux
            pages = int((own / "statm").read_text().split()[1])
            return (
                pages * os.sysconf("SC_PAGE_SIZE"),
                len(os.listdir(own / "fd")),
                len(os.listdir(own / "task")),
            )
        return 0, 0, 0


@contextmanager
def _process(target: Callable[..., None], *given: Any) -> Iterator[_Process]:
    made = _Process(target, *given)
    try:
        yield made
    finally:
        made.pipe.close()  # which is what it waits for
        made.process.join(_END)
        made.process.kill()
        made.process.join()


def _play(target: Callable[..., None], pipe: Connection, given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    logging.getLogger("edgeml").addHandler(logging.NullHandler())  # what fails is counted
    if sys.platform != "win32":
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        target(pipe, *given)
    except Exception as error:
        with suppress(OSError):
            pipe.send((None, one_line(error)))


def _asked(pipe: Connection, timeout: float) -> bool | None:
    """Whether the parent asks; None when it is gone."""
    try:
        if pipe.poll(timeout):
            pipe.recv()
            return True
    except (EOFError, ConnectionError):
        return None
    return False


# The servers --------------------------------------------------------------------------------

_ACTION = ActionConfig(0, ["move"], ["camera"])
_TRAINER = TrainerConfig(0, None, ["echo"])


def _serve(pipe: Connection, kind: str, transport: str | None) -> None:
    server: ActionServer | InferenceServer | TrainerServer
    if kind == "action":
        server = ActionServer(
            _ACTION,
            lambda keys: {"camera": np.full(_OBSERVATION, 7, np.uint8)},
            lambda key, payload: payload,
            transport=transport,
            credentials=NO_KEYS,
        )
        observation = {"camera": np.full(_OBSERVATION, 7, np.uint8)}

        def publish() -> None:
            server.publish_obs(observation)  # type: ignore[union-attr]

    elif kind == "inference":
        server = InferenceServer(0, transport=transport, credentials=NO_KEYS)
        server.register_interface("policy", lambda payload: payload)

        def publish() -> None:
            pass

    else:
        server = TrainerServer(
            _TRAINER,
            request_callback=lambda kind, payload: payload,
            transport=transport,
            credentials=NO_KEYS,
        )
        store = ReplayBuffer(_HELD, example=_item(0, 0))
        store.batch_insert([_item(0, 0)] * _HELD)  # or memory grows until it is full
        server.register_data_store("data", store)
        weights = {"layer": np.full(_WEIGHTS, 7, np.uint8)}

        def publish() -> None:
            server.publish_network(weights)

    with server.serving():
        pipe.send((server.url, ""))
        due = time.monotonic()
        while True:
            asked = _asked(pipe, max(0.0, due - time.monotonic()))
            if asked is None:
                return
            if asked:
                pipe.send(_failures(server.stats()))
            if time.monotonic() >= due:
                publish()
                due = time.monotonic() + _PUBLISHING


def _failures(stats: dict[str, Any]) -> Counter[str]:
    """What a server counted that doesn't happen where all is well."""
    names = ("items_repeated", "items_refused", "items_lost_by_clients", "replies_dropped")
    return Counter({f"a server's {name}": n for name in names if (n := stats.get(name, 0))})


def _item(client: int, number: int) -> dict[str, Any]:
    return {"client": np.int64(client), "number": np.int64(number), "data": np.zeros(100, np.uint8)}


# The clients --------------------------------------------------------------------------------


class _Client(Protocol):
    def turn(self, number: int) -> bool:
        """Make calls, and say whether the answers are right."""

    def stop(self) -> None: ...


class _Robot:
    """A client of the action pair, which gets the device's publications too."""

    def __init__(self, url: str, client: int, timeout: float, wrong: Callable[[str], None]) -> None:
        self._client = ActionClient(config=_ACTION, url=url, timeout=timeout, credentials=NO_KEYS)
        self._id = client
        self._client.register_obs_callback(
            lambda payload: None if _is_sevens(payload.get("camera")) else wrong("a publication")
        )
        self.stop = self._client.stop

    def turn(self, number: int) -> bool:
        if number % 2:
            return _is_sevens(self._client.obs()["camera"])
        payload = {"client": self._id, "number": number}
        return bool(self._client.act("move", payload) == payload)


class _Policy:
    """A client of the inference pair."""

    def __init__(self, url: str, client: int, timeout: float, wrong: Callable[[str], None]) -> None:
        self._client = InferenceClient(url=url, timeout=timeout, credentials=NO_KEYS)
        self._id = client
        self.stop = self._client.stop

    def turn(self, number: int) -> bool:
        payload = {"client": self._id, "camera": np.full(_OBSERVATION, number % 251, np.uint8)}
        answer = self._client.call("policy", payload)
        return answer["client"] == self._id and bool((answer["camera"] == number % 251).all())


class _Actor:
    """A client of the trainer pair, which gets weights too."""

    def __init__(self, url: str, client: int, timeout: float, wrong: Callable[[str], None]) -> None:
        self._store = QueuedDataStore(1000, "raise")
        self._client = TrainerClient(
            "data",
            config=_TRAINER,
            data_store=self._store,
            url=url,
            timeout=timeout,
            credentials=NO_KEYS,
        )
        self._id = client
        self._client.recv_network_callback(
            lambda payload: None if _is_sevens(payload.get("layer")) else wrong("weights")
        )
        self.stop = self._client.stop

    def turn(self, number: int) -> bool:
        self._store.insert(_item(self._id, number))
        self._client.update()
        return True


def _is_sevens(value: Any) -> bool:
    return isinstance(value, np.ndarray) and bool((value == 7).all())


_MAKE: dict[str, Callable[..., _Client]] = {
    "action": _Robot,
    "inference": _Policy,
    "trainer": _Actor,
}


def _use(
    pipe: Connection, urls: dict[str, str], numbers: range, rate: float, timeout: float
) -> None:
    """Hold clients, and have each call at its rate."""
    crowd = _Crowd(rate)
    with ExitStack() as stack:
        made = []
        for number in numbers:
            kind = KINDS[number % len(KINDS)]
            client = _MAKE[kind](urls[kind], number, timeout, crowd.wrong)
            stack.callback(client.stop)
            made.append(client)
        stack.callback(crowd.stop)
        crowd.start(made)
        pipe.send((None, ""))
        while (asked := _asked(pipe, 3600.0)) is not None:
            if asked:
                pipe.send(crowd.counted())


class _Crowd:
    """Clients that a few threads have call: each client always by the same one, as programs do."""

    def __init__(self, rate: float) -> None:
        self._pause = 1 / rate
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # of what is counted
        self._calls = 0
        self._times: list[float] = []
        self._errors: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []

    def start(self, clients: Sequence[_Client]) -> None:
        began, share = time.monotonic(), self._pause / max(1, len(clients))
        turns = [(began + n * share, n, 0, client) for n, client in enumerate(clients)]
        for n in range(_THREADS):
            thread = threading.Thread(target=self._work, args=(turns[n::_THREADS],), daemon=True)
            self._threads.append(thread)
            thread.start()

    def wrong(self, what: str) -> None:
        """Count something that came and isn't what it must be."""
        with self._lock:
            self._errors[f"{what} isn't what was sent"] += 1

    def counted(self) -> tuple[int, list[float], Counter[str]]:
        """Calls, and times of some, since this was asked last; errors since the start."""
        with self._lock:
            calls, times = self._calls, self._times
            self._calls, self._times = 0, []
            return calls, times, self._errors.copy()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self, turns: list[tuple[float, int, int, _Client]]) -> None:
        """Have clients call, whoever is next first: when, a tie-break, which turn, whose."""
        while turns and not self._stopped.wait(max(0.0, turns[0][0] - time.monotonic())):
            due, order, number, client = turns[0]
            began = time.monotonic()
            failure = ""
            try:
                if not client.turn(number):
                    failure = "an answer isn't what was asked for"
            except Exception as error:
                failure = one_line(error)[:200]
            now = time.monotonic()
            with self._lock:
                self._calls += 1
                if len(self._times) < _TIMES:
                    self._times.append(now - began)
                if failure:
                    self._errors[failure] += 1
            heapq.heapreplace(turns, (max(due + self._pause, now), order, number + 1, client))
