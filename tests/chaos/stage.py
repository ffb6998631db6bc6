"""What every kind of run does with processes, proxies and time, whatever plays in it."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .history import Writer
from .processes import PATIENCE, Died, Process, Zygote

_LOGS = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error")


class Planned(Protocol):
    """What is run, as far as everybody needs to know it."""

    @property
    def transport(self) -> str: ...
    @property
    def fault(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Planned)
Z = TypeVar("Z")


class Stage:
    """Processes by name, proxies that lead to them, and what may be done to both.

    Attributes:
        directory: for what the processes tell.
        rng: of a plan's seed.
        history: the harness's own.
        processes: by name.
        lives: how many processes of each name there have been.
        proxies: by name.
        given_up: whether one that was to answer doesn't, so that the run is over.
    """

    def __init__(self, plan: Planned, directory: Path) -> None:
        self.directory = directory
        self.rng = random.Random(f"{plan.transport} {plan.fault} {plan.seed}")
        self.history = Writer(directory / "harness.0.jsonl")
        self.processes: dict[str, Process] = {}
        self.lives: dict[str, int] = {}
        self.proxies: dict[str, Process] = {}
        self.given_up = False
        self._seed = plan.seed
        self._end = float("inf")

    # Time ---------------------------------------------------------------------------------

    def last(self, seconds: float) -> None:
        """Let what is done now end after so many seconds."""
        self._end = time.monotonic() + seconds

    def time_left(self) -> float:
        """Seconds; 0 when the fault is to end."""
        return max(0.0, self._end - time.monotonic())

    def sleep(self, least: float, most: float) -> None:
        """Sleep for a time of the seed's choice, or until the fault is to end."""
        time.sleep(min(self.rng.uniform(least, most), self.time_left()))

    # Processes ----------------------------------------------------------------------------

    def runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].alive()

    def begin(self, zygote: Zygote, name: str, role: str, /, **options: Any) -> Process:
        """Start a process's next life; one that nobody had ended is told of."""
        if name in self.processes and not self.processes[name].frozen:
            self._bury(name)
        life = self.lives[name] = self.lives.get(name, 0) + 1
        process = self.processes[name] = zygote.start(
            role,
            history=str(self.directory / f"{name}.{life}.jsonl"),
            log=str(self.directory / f"{name}.{life}.log"),
            life=life,
            **options,
        )
        return process

    def _bury(self, name: str) -> None:
        process = self.processes[name]
        if not process.gone:
            self.tell("died", name, why="nobody had ended it")
            process.kill()

    def tell(self, e: str, name: str, **more: Any) -> None:
        """Tell of something that a process, in its present life, did or was done to."""
        self.history.tell(e, of=name, life_of=self.lives[name], **more)

    def hear(self, name: str) -> Any:
        """Return a process's answer; None, and the run is given up, where there is none."""
        try:
            return self.processes[name].hear()
        except Died as error:
            self.tell("died", name, why=str(error))
        except TimeoutError as error:
            self.tell("stuck", name, why=str(error))
        self.given_up = True
        return None

    def kill(self, name: str) -> None:
        """As `kill -9` does."""
        self.processes[name].kill()
        # Told afterwards: what it was told before may have been before its end.
        self.tell("kill", name)
        self.processes[name].frozen = False
        self._refuse_for(name)

    def end(self, name: str) -> None:
        """Have a process come to its own end."""
        self.processes[name].tell(do="stop")
        self.hear(name)
        if self.given_up:
            return
        try:
            self.processes[name].wait(PATIENCE)
        except TimeoutError as error:
            self.tell("stuck", name, why=f"at its end, {error}")
            self.processes[name].kill()
        self._refuse_for(name)

    def _refuse_for(self, name: str) -> None:
        """Have connections refused that are for one that is no more, where it has a proxy."""

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Hold a process still within a block."""
        self.tell("freeze", name)
        self.processes[name].freeze()
        self.tell("stands", name)
        yield
        self.thaw(name)

    def thaw(self, name: str) -> None:
        self.processes[name].thaw()
        self.tell("thaw", name)

    def end_all(self) -> None:
        """Leave nothing running."""
        for process in [*self.processes.values(), *self.proxies.values()]:
            process.kill()

    def read_logs(self) -> None:
        """Tell of what no program is to print."""
        for path in self.directory.glob("*.log"):
            text = path.read_text(errors="replace")
            if any(sign in text for sign in _LOGS):
                name, _, life = path.stem.rpartition(".")
                self.history.tell("traceback", of=name, life_of=life, why=text[-1500:])

    # The network --------------------------------------------------------------------------

    def open_proxy(self, zygote: Zygote, name: str) -> int:
        """Start a proxy, and return its port."""
        path = self.directory / f"proxy-{name}.0"
        proxy = self.proxies[name] = zygote.start(
            "proxy", seed=self._seed, log=f"{path}.log", history=f"{path}.jsonl"
        )
        port: int = proxy.hear()
        return port

    def order_proxies(self, names: Sequence[str] | None = None, **order: Any) -> None:
        """Have proxies do something: all, or those named; nothing where there are none."""
        for name in self.proxies if names is None else names:
            if name in self.proxies:
                since = time.monotonic()
                self.proxies[name].ask(**order)
                self.history.tell("proxy", of=name, since=since, **order)

    @contextmanager
    def weather(self, names: Sequence[str] | None = None, **fields: Any) -> Iterator[None]:
        """Have the network be like this within a block."""
        self.order_proxies(names, do="set", **fields)
        yield
        self.order_proxies(names, do="calm")

    def calm(self) -> None:
        self.order_proxies(do="calm")


def run_all(
    plans: Sequence[P],
    run: Callable[[P, Path, Z], list[str]],
    share: Callable[[], AbstractContextManager[Z]],
    directory: Path,
    jobs: int,
    tell: Callable[[P, list[str], float], None],
) -> None:
    """Carry out plans, several at a time; keeps the directories of those that found something.

    Args:
        plans: what is run.
        run: carries out one, in a directory; returns what is wrong.
        share: makes what the runs of one job share, which takes seconds.
        directory: for what the processes tell.
        jobs: how many at a time; most of each is waiting.
        tell: is given what each found, and the seconds that it took.
    """
    waiting, lock = list(reversed(plans)), threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        with share() as shared:
            while True:
                with lock:
                    if not waiting or failures:
                        return
                    plan = waiting.pop()
                where = directory / plan.name
                began = time.monotonic()
                try:
                    found = run(plan, where, shared)
                except BaseException as error:
                    failures.append(error)
                    raise
                with lock:
                    tell(plan, found, time.monotonic() - began)
                if not found:
                    shutil.rmtree(where)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
