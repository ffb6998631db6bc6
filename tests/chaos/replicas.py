"""One run: clients that call replicas in Ray, what is done to these, and what the checker says."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .history import read
from .processes import Died, Zygote
from .replica import Replicas
from .replicas_checker import check
from .stage import Stage

if TYPE_CHECKING:
    from typing_extensions import Self

SEEN: Counter[str] = Counter()
"""What all runs so far have seen, of which a run without findings says little if it is nothing."""

CLIENTS = 16
_PROCESSES = 4  # that they are in
_TIMEOUT = 20.0  # seconds that a call may take at most
_WORK = 0.02  # seconds that it does take
_SETTLES = 90.0  # seconds that replicas may take to be what they are to be
_LOOK = 0.02  # seconds between two looks
_LONGEST_TO_COME = 40.0  # seconds; what is too long is the checker's affair


@dataclass(frozen=True)
class Plan:
    """What is run; the seed says the rest.

    Attributes:
        transport: of the replicas, by name.
        fault: one of `FAULTS`.
        seed: chooses moments and numbers.
        replicas: how many there are at first.
        turns: how often something is done.
        breaks: what is broken on purpose; see `replicas_breaks`.
        late: seconds by which anything may be later than the machine explains.
    """

    transport: str
    fault: str
    seed: int
    replicas: int = 4
    turns: int = 3
    breaks: str = ""
    late: float = 0.0

    @property
    def name(self) -> str:
        return "-".join([self.transport, self.fault, str(self.seed), *self.breaks.split()])


class Cluster:
    """A Ray of this machine's own, and a zygote for clients; a context manager.

    Attributes:
        zygote: what starts clients.
    """

    def __init__(self) -> None:
        import edgeml.ray
        import ray

        self._began = not ray.is_initialized()
        if self._began:
            # Paths of sockets may not be long.
            self._directory = tempfile.mkdtemp(prefix="chaos-ray-", dir="/tmp")
            ray.init(
                num_cpus=64,
                include_dashboard=False,
                object_store_memory=200 << 20,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=self._directory,
            )
            edgeml.ray.start(names="127.0.0.1:0")
        self.zygote = Zygote()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        self.zygote.__exit__()
        if self._began:
            ray.shutdown()
            shutil.rmtree(self._directory, ignore_errors=True)


class Run(Stage):
    """What a fault may do to a run."""

    def __init__(self, plan: Plan, directory: Path, cluster: Cluster) -> None:
        super().__init__(plan, directory)
        self.plan, self._zygote = plan, cluster.zygote
        self._name = f"chaos-{plan.transport}-{plan.fault}-{plan.seed}"
        self._version = 0
        self._killed: set[int] = set()
        self.history.tell("plan", **asdict(plan))

    def carry_out(self, fault: Callable[[Run], None]) -> list[str]:
        """Carry out the run; returns what is wrong."""
        import edgeml.ray

        try:
            self.replace()
            self.settle()
            self._call()
            fault(self)
            self.settle()
            time.sleep(0.5)
            for name in [*self.processes]:
                if not self.given_up:
                    self.end(name)
        except Died as error:
            self.history.tell("stuck", of="harness", why=repr(error))
        finally:
            self.end_all()
            edgeml.ray.delete(self._name)
        self.read_logs()
        return check(read(self.directory), self.plan.late, SEEN)

    def _call(self) -> None:
        """Have all clients call."""
        import edgeml.ray

        url = edgeml.ray.status(self._name).url
        each = CLIENTS // _PROCESSES
        for number in range(_PROCESSES):
            self.begin(
                self._zygote,
                f"caller{number}",
                "caller",
                url=url,
                clients=[*range(number * each, (number + 1) * each)],
                timeout=_TIMEOUT,
                breaks=self.plan.breaks,
            )
        for name in self.processes:
            self.hear(name)

    # What faults may do -------------------------------------------------------------------

    def replace(self) -> None:
        """Have servers of the next version in place of what there is; returns when they are."""
        import edgeml.ray

        self._version += 1
        self.history.tell("change", what="replace", version=self._version)
        factory = Replicas(
            *(str(self.directory), self.plan.transport, self._version, _WORK, self.plan.breaks)
        )
        now = self.plan.replicas if self._version == 1 else self._wanted()
        edgeml.ray.deploy(factory, name=self._name, replicas=now, num_cpus=1, timeout=_SETTLES)

    def scale(self, number: int) -> None:
        """Have so many replicas; doesn't wait for them."""
        import edgeml.ray

        self.history.tell("change", what="scale", number=number)
        edgeml.ray.scale(self._name, number)

    def kill(self, alone: bool = True) -> None:
        """End one with `kill -9`; alone says that nothing else goes on, so another has to come."""
        there = self._ready()
        if len(there) < 2:
            return  # the calls that it would leave nobody to
        victim = self.rng.choice(there)
        self._killed.add(victim.pid)
        made = {path.name for path in self.directory.glob("replica.*")}
        handle = os.pidfd_open(victim.pid)
        since = time.monotonic()
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], _SETTLES)  # until it is no more
        os.close(handle)
        self.history.tell("kill", pid=victim.pid, url=victim.url, since=since, alone=alone)
        deadline = since + _LONGEST_TO_COME
        while alone and time.monotonic() < deadline:
            time.sleep(_LOOK)
            for path in self.directory.glob("replica.*"):
                if path.name not in made and b'"begin"' in path.read_bytes():
                    return

    def settle(self) -> None:
        """Wait until replicas are what they are to be, and tell which they are."""
        import edgeml.ray

        deadline = time.monotonic() + _SETTLES
        while True:
            now = edgeml.ray.status(self._name)
            there = [each.pid for each in now.replicas if each.state == "ready"]
            known = self._killed.isdisjoint(there)
            if now.state == "ready" and known and len(there) == len(now.replicas) == now.wanted:
                self.history.tell("settled", pids=there)
                return
            if time.monotonic() > deadline:
                self.history.tell("unsettled", why=repr(now))
                return
            time.sleep(_LOOK)

    def _wanted(self) -> int:
        import edgeml.ray

        wanted: int = edgeml.ray.status(self._name).wanted
        return wanted

    def _ready(self) -> list[Any]:
        import edgeml.ray

        deadline = time.monotonic() + _SETTLES
        while time.monotonic() < deadline:
            now = edgeml.ray.status(self._name).replicas
            there = [e for e in now if e.state == "ready" and e.pid not in self._killed]
            if there:
                return there
            time.sleep(_LOOK)
        raise Died("no replica is ready")

    def other_number(self) -> int:
        """Another number of replicas than there is."""
        now = self._wanted()
        return self.rng.choice([number for number in (1, 2, 3, 5, 6) if number != now])


# Faults -------------------------------------------------------------------------------------


def _kills(run: Run) -> None:
    for _ in range(run.plan.turns):
        run.sleep(0.3, 1.5)
        run.kill()
        run.settle()


def _rolling(run: Run) -> None:
    for _ in range(run.plan.turns):
        run.sleep(0.3, 1.5)
        run.replace()
        run.settle()


def _scaling(run: Run) -> None:
    for _ in range(2 * run.plan.turns):
        run.sleep(0.1, 1.0)
        run.scale(run.other_number())
        if run.rng.random() < 0.7:
            run.settle()


def _mixture(run: Run) -> None:
    for _ in range(2 * run.plan.turns):
        run.sleep(0.1, 1.0)
        choice = run.rng.choice(["kill", "replace", "scale"])
        if choice == "kill":
            run.kill(alone=False)
        elif choice == "replace":
            run.replace()
        else:
            run.scale(run.other_number())


FAULTS: dict[str, Callable[[Run], None]] = {
    "kills": _kills,
    "rolling": _rolling,
    "scaling": _scaling,
    "mixture": _mixture,
}


def run(plan: Plan, directory: Path, cluster: Cluster) -> list[str]:
    """Carry out a plan; returns what is wrong. All that was told is in the directory."""
    directory.mkdir(parents=True)
    return Run(plan, directory, cluster).carry_out(FAULTS[plan.fault])
