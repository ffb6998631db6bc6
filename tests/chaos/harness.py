"""One run: a learner and its actors, a fault, the end of it, and what the checker says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from . import clock
from .checker import check
from .history import Event, read
from .processes import Died, Zygote
from .stage import Stage

TCP = ("zmq", "grpc", "ws")
_TIMEOUT = 1.0  # seconds, of the actors' calls
_EVERY = 0.15  # seconds between two checkpoints
_MOST = 0.9  # of the items are inserted while the fault goes on
_LONGEST = 4.0  # times the time that they take without one
_DISK = 24 << 20  # bytes of the small disk

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

    @property
    def name(self) -> str:
        parts = [self.transport, self.fault, str(self.seed)]
        parts += [] if self.checkpoints else ["no-checkpoints"]
        parts += ["logs"] if self.logs else []
        parts += [self.breaks.replace(" ", "-").replace("'", "")] if self.breaks else []
        return "-".join(parts)


class Run(Stage):
    """What a fault may do to a run.

    Attributes:
        plan: what is run.
        actors: their names.
    """

    def __init__(self, plan: Plan, directory: Path, zygote: Zygote) -> None:
        super().__init__(plan, directory)
        self.plan = plan
        self.actors = [f"actor-{n}" for n in range(plan.actors)]
        self._zygote = zygote
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
        self.history.tell("plan", styles=self._styles, size=self._size, **asdict(plan))
        self._url = f"shm://{directory}/learner"

    # What happens in it -------------------------------------------------------------------

    def carry_out(self, fault: Callable[[Run], None]) -> list[str]:
        """Do all of it; returns what is wrong."""
        try:
            if self.plan.transport in TCP:
                port = self.open_proxy(self._zygote, "learner")
                self._url = f"{self.plan.transport}://127.0.0.1:{port}"
            self.start("learner")
            for name in self.actors:
                self.start(name)
            self.last(_LONGEST * self.plan.seconds)
            while self.time_left() and self.begun() < _MOST * self.plan.items:
                fault(self)
            self._recover()
            self._finish()
        except Died as error:
            self.history.tell("stuck", of="harness", life_of=0, why=repr(error))
        finally:
            self.end_all()
        self.read_logs()
        return check(self.events(), logs=self.plan.logs, late=self.plan.late)

    def events(self) -> list[Event]:
        return read(self.directory)

    def _recover(self) -> None:
        """Undo whatever a fault left, and have everybody there."""
        self.calm()
        for name in ["learner", *self.actors]:
            if name in self.processes and self.processes[name].frozen:
                self.thaw(name)
            self.limit_files(name, None)
            self.start(name)
        self.slow(0.0)

    def _finish(self) -> None:
        for durable in (False, True) if self.plan.checkpoints else (False,):
            for name in self.actors:
                self.processes[name].tell(do="finish", durable=durable)
            for name in self.actors:
                self.hear(name)
            if self.given_up:
                break
            if not durable and self.plan.checkpoints:
                self.processes["learner"].tell(do="save")
                self.hear("learner")
        for name in [*self.actors, "learner"]:
            if not self.given_up:
                self.end(name)
            # What waits for ever is looked at where it is.
            elif self.processes[name].alive():
                self.tell("kill", name)

    # What faults may do -------------------------------------------------------------------

    def begun(self) -> int:
        """How many items the actors have begun to insert."""
        files = self.directory.glob("actor-*.jsonl")
        return sum(path.read_bytes().count(b'"e": "insert",') for path in files)

    def start(self, name: str) -> None:
        """Start a process of that name, unless it runs."""
        if self.runs(name):
            return
        common = {
            "size": self._size,
            "clock": str(self._clock) if self.plan.fault == "clock" else None,
            "breaks": self.plan.breaks,
        }
        if name == "learner":
            process = self.begin(
                self._zygote,
                name,
                "learner",
                url=f"{self.plan.transport}://127.0.0.1:0" if self.proxies else self._url,
                checkpoint=str(self._disk / "checkpoint") if self.plan.checkpoints else None,
                every=_EVERY,
                capacity=4 * self.plan.items,
                **common,
            )
            url = process.hear()
            if self.proxies:
                self.order_proxies(do="target", port=int(url.rpartition(":")[2]))
            return
        number, share = self.actors.index(name), self.plan.items // self.plan.actors
        begun = [e["n"] for e in self.events() if e["who"] == name and e["e"] == "insert"]
        process = self.begin(
            self._zygote,
            name,
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

    def _refuse_for(self, name: str) -> None:
        if name == "learner" and not self.given_up:
            self.order_proxies(do="target", port=None)

    def limit_files(self, name: str, nbytes: int | None) -> None:
        """Let a process make no longer files, shared memory included; None for any length."""
        if name in self.processes:
            self.processes[name].limit_files(nbytes)

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
        for name in self.processes:  # where no disk of our own can be had
            self.limit_files(name, 1 << 20)
        yield
        for name in self.processes:
            self.limit_files(name, None)

    def slow(self, seconds: float) -> None:
        """Have the learner take so long over each batch."""
        with suppress(Died):
            self.processes["learner"].ask(do="slow", seconds=seconds)

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
