"""One run: a learner and its actors, a fault, the end of it, and what the checker says."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import clock
from .checker import check
from .history import Event, Writer, read
from .processes import PATIENCE, Died, Process, Zygote

TCP = ("zmq", "grpc", "ws")
_TIMEOUT = 1.0  # seconds, of the actors' calls
_EVERY = 0.15  # seconds between two checkpoints
_MOST = 0.9  # of the items are inserted while the fault goes on
_LONGEST = 4.0  # times the time that they take without one
_DISK = 24 << 20  # bytes of the small disk
_LOGS = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error")


_STORES = ["replay", "replay", "queue"]
_LOGGED = [*_STORES, "logged"]  # the others have a log beside them
_HOLDING = ["replay"]  # a queue lets go of what a learner has that saves nothing


@dataclass(frozen=True)
class Plan:
    """What is run; the seed says the rest.

    Attributes:
        transport: by name.
        fault: one of `faults.FAULTS`.
        seed: chooses moments, lengths, and how the actors work.
        items: of all actors together.
        actors: how many.
        checkpoints: whether the learner saves any.
        logs: whether the actors have logs.
        seconds: that the items take without a fault.
        breaks: what is broken on purpose; see `breaks`.
        late: seconds by which a call may outlive its deadline.
    """

    transport: str
    fault: str
    seed: int
    items: int = 1000
    actors: int = 2
    checkpoints: bool = True
    logs: bool = True
    seconds: float = 2.0
    breaks: str = ""
    late: float = 0.2


class Run:
    """What a fault may do to a run.

    Attributes:
        plan: what is run.
        rng: of the plan's seed.
        actors: their names.
    """

    def __init__(self, plan: Plan, directory: Path, zygote: Zygote) -> None:
        self.plan, self.directory = plan, directory
        self.rng = random.Random(f"{plan.transport} {plan.fault} {plan.seed}")
        self.actors = [f"actor-{n}" for n in range(plan.actors)]
        self._zygote = zygote
        self._history = Writer(directory / "harness.0.jsonl")
        self._processes: dict[str, Process] = {}
        self._lives: dict[str, int] = {}
        self._given_up = False
        self._end = float("inf")
        self._disk = directory / "disk"
        self._disk.mkdir(exist_ok=True)
        self._clock = directory / "clock"
        clock.make(self._clock)
        stores = _LOGGED if plan.logs else _STORES if plan.checkpoints else _HOLDING
        self._styles = {
            name: {
                "store": self.rng.choice(stores),
                "updates": self.rng.choice(["call", "call", "thread"]),
            }
            for name in self.actors
        }
        self._size = 4000 if plan.fault == "disk-full" else self.rng.choice([16, 200, 3000])
        self._history.tell("plan", styles=self._styles, size=self._size, **asdict(plan))
        self._proxy: Process | None = None
        self._url = f"shm://{directory}/learner"

    # What happens in it -------------------------------------------------------------------

    def carry_out(self, fault: Callable[[Run], None]) -> list[str]:
        """Do all of it; returns what is wrong."""
        try:
            if self.plan.transport in TCP:
                self._proxy = self._zygote.start(
                    "proxy", seed=self.plan.seed, log=str(self.directory / "proxy.log")
                )
                self._url = f"{self.plan.transport}://127.0.0.1:{self._proxy.hear()}"
            self.start("learner")
            for name in self.actors:
                self.start(name)
            self._end = time.monotonic() + _LONGEST * self.plan.seconds
            while self.time_left() and self.begun() < _MOST * self.plan.items:
                fault(self)
            self._recover()
            self._finish()
        except Died as error:
            self._history.tell("stuck", of="harness", life_of=0, why=repr(error))
        finally:
            for process in [*self._processes.values(), self._proxy]:
                if process is not None:
                    process.kill()
        self._read_logs()
        return check(self.events(), logs=self.plan.logs, late=self.plan.late)

    def events(self) -> list[Event]:
        return read(self.directory)

    def _recover(self) -> None:
        """Undo whatever a fault left, and have everybody there."""
        self.calm()
        for name in ["learner", *self.actors]:
            if name in self._processes and self._processes[name].frozen:
                self.thaw(name)
            self.limit_files(name, None)
            self.start(name)
        self.slow(0.0)

    def _finish(self) -> None:
        for durable in (False, True) if self.plan.checkpoints else (False,):
            for name in self.actors:
                self._processes[name].tell(do="finish", durable=durable)
            for name in self.actors:
                self._hear(name)
            if self._given_up:
                break
            if not durable and self.plan.checkpoints:
                self._processes["learner"].tell(do="save")
                self._hear("learner")
        for name in [*self.actors, "learner"]:
            if not self._given_up:
                self.end(name)
            # What waits for ever is looked at where it is.
            elif self._processes[name].alive():
                self._history.tell("kill", of=name, life_of=self._lives[name])

    def _hear(self, name: str) -> None:
        process, life = self._processes[name], self._lives[name]
        try:
            process.hear()
        except Died as error:
            self._history.tell("died", of=name, life_of=life, why=str(error))
            self._given_up = True
        except TimeoutError as error:
            self._history.tell("stuck", of=name, life_of=life, why=str(error))
            self._given_up = True

    def _read_logs(self) -> None:
        for path in self.directory.glob("*.log"):
            text = path.read_text(errors="replace")
            if any(sign in text for sign in _LOGS):
                name, _, life = path.stem.rpartition(".")
                self._history.tell("traceback", of=name, life_of=life, why=text[-1500:])

    # What faults may do -------------------------------------------------------------------

    def time_left(self) -> float:
        """Seconds; 0 when the fault is to end."""
        return max(0.0, self._end - time.monotonic())

    def begun(self) -> int:
        """How many items the actors have begun to insert."""
        files = self.directory.glob("actor-*.jsonl")
        return sum(path.read_bytes().count(b'"e": "insert",') for path in files)

    def sleep(self, least: float, most: float) -> None:
        """Sleep for a time of the seed's choice, or until the fault is to end."""
        time.sleep(min(self.rng.uniform(least, most), self.time_left()))

    def start(self, name: str) -> None:
        """Start a process of that name, unless it runs."""
        if name in self._processes and self._processes[name].alive():
            return
        if name in self._processes and not self._processes[name].frozen:
            self._buried(name)
        life = self._lives[name] = self._lives.get(name, 0) + 1
        common = {
            "history": str(self.directory / f"{name}.{life}.jsonl"),
            "log": str(self.directory / f"{name}.{life}.log"),
            "life": life,
            "size": self._size,
            "clock": str(self._clock) if self.plan.fault == "clock" else None,
            "breaks": self.plan.breaks,
        }
        if name == "learner":
            process = self._processes[name] = self._zygote.start(
                "learner",
                url=f"{self.plan.transport}://127.0.0.1:0" if self._proxy else self._url,
                checkpoint=str(self._disk / "checkpoint") if self.plan.checkpoints else None,
                every=_EVERY,
                capacity=4 * self.plan.items,
                **common,
            )
            url = process.hear()
            self.order_proxy(do="target", port=int(url.rpartition(":")[2]) if self._proxy else None)
            return
        number, share = self.actors.index(name), self.plan.items // self.plan.actors
        begun = [e["n"] for e in self.events() if e["who"] == name and e["e"] == "insert"]
        process = self._processes[name] = self._zygote.start(
            "actor",
            url=self._url,
            actor=number,
            first=max(begun, default=0) + 1,
            last=share,
            pause=self.plan.seconds / (share / 15),
            timeout=_TIMEOUT,
            saves=self.plan.checkpoints,
            outbox=str(self._disk / f"outbox-{number}") if self.plan.logs else None,
            seed=self.plan.seed,
            **self._styles[name],
            **common,
        )
        process.hear()

    def _buried(self, name: str) -> None:
        """Take leave of a process, and tell if nobody had ended it."""
        process, life = self._processes[name], self._lives[name]
        if process._handle is not None:
            self._history.tell("died", of=name, life_of=life, why="nobody had ended it")
            process.kill()

    def kill(self, name: str) -> None:
        """As `kill -9` does."""
        process = self._processes[name]
        process.kill()
        # Told afterwards: what it was told before may have been before its end.
        self._history.tell("kill", of=name, life_of=self._lives[name])
        process.frozen = False
        if name == "learner":
            self.order_proxy(do="target", port=None)

    def end(self, name: str) -> None:
        """Have a process come to its own end."""
        process, life = self._processes[name], self._lives[name]
        process.tell(do="stop")
        self._hear(name)
        if self._given_up:
            return
        try:
            process.wait(PATIENCE)
        except TimeoutError as error:
            self._history.tell("stuck", of=name, life_of=life, why=f"at its end, {error}")
            process.kill()
        if name == "learner":
            self.order_proxy(do="target", port=None)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Hold a process still within a block."""
        self._history.tell("freeze", of=name, life_of=self._lives[name])
        self._processes[name].freeze()
        yield
        self.thaw(name)

    def thaw(self, name: str) -> None:
        self._processes[name].thaw()
        self._history.tell("thaw", of=name, life_of=self._lives[name])

    def order_proxy(self, **order: Any) -> None:
        """Have the proxy do something; nothing where there is none."""
        if self._proxy is not None:
            self._history.tell("proxy", **order)
            self._proxy.ask(**order)

    @contextmanager
    def weather(self, **fields: Any) -> Iterator[None]:
        """Have the network be like this within a block."""
        self.order_proxy(do="set", **fields)
        yield
        self.order_proxy(do="calm")

    def calm(self) -> None:
        self.order_proxy(do="calm")

    def limit_files(self, name: str, nbytes: int | None) -> None:
        """Let a process make no longer files, shared memory included; None for any length."""
        if name in self._processes:
            self._processes[name].limit_files(nbytes)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Have no room on the disk that checkpoints and logs are on."""
        small = Path(f"/proc/{self._zygote.process.pid}/root{self._disk}")
        if small.is_mount() or small.stat().st_dev != self.directory.stat().st_dev:
            ballast = small / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
            yield
            ballast.unlink()
            return
        for name in self._processes:  # where no disk of our own can be had
            self.limit_files(name, 1 << 20)
        yield
        for name in self._processes:
            self.limit_files(name, None)

    def slow(self, seconds: float) -> None:
        """Have the learner take so long over each batch."""
        with suppress(Died):
            self._processes["learner"].ask(do="slow", seconds=seconds)

    def shift_clock(self, seconds: float) -> None:
        """Move the wall clock of all processes."""
        clock.shift(self._clock, seconds)


@contextmanager
def zygote_for(plan: Plan, directory: Path) -> Iterator[Zygote]:
    """A zygote that a plan needs which no other can share: with a small disk of its own."""
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f'mount -t tmpfs -o size={_DISK} tmpfs "{directory}/disk"'
    (directory / "disk").mkdir()
    try:
        tried = subprocess.run([*prefix, "sh", "-c", mount], capture_output=True, check=False)
        works = not tried.returncode
    except FileNotFoundError:
        works = False
    with Zygote([*prefix, "sh", "-c", f'{mount} && exec "$@"', "sh"] if works else []) as zygote:
        yield zygote


def run(plan: Plan, directory: Path, zygote: Zygote) -> list[str]:
    """Carry out a plan; returns what is wrong. All that was told is in the directory."""
    from .faults import FAULTS

    directory.mkdir(parents=True)
    with ExitStack() as stack:
        if plan.fault == "disk-full":
            zygote = stack.enter_context(zygote_for(plan, directory))
        return Run(plan, directory, zygote).carry_out(FAULTS[plan.fault])


def run_all(
    plans: list[Plan],
    directory: Path,
    jobs: int,
    tell: Callable[[Plan, list[str], float], None],
) -> None:
    """Carry out plans, several at a time; keeps the directories of those that found something.

    Args:
        plans: what is run.
        directory: for what the processes tell.
        jobs: how many at a time; most of each is waiting.
        tell: is given what each found, and the seconds that it took.
    """
    waiting, lock = list(reversed(plans)), threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        with Zygote() as zygote:
            while True:
                with lock:
                    if not waiting or failures:
                        return
                    plan = waiting.pop()
                where = directory / name_of(plan)
                began = time.monotonic()
                try:
                    found = run(plan, where, zygote)
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


def name_of(plan: Plan) -> str:
    parts = [plan.transport, plan.fault, str(plan.seed)]
    parts += [] if plan.checkpoints else ["no-checkpoints"]
    parts += ["logs"] if plan.logs else []
    parts += [plan.breaks.replace(" ", "-").replace("'", "")] if plan.breaks else []
    return "-".join(parts)
