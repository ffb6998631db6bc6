"""One run: a device and its drivers, faults, the end of it, and what the checker says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .control_checker import TICK, check
from .harness import TCP
from .history import read
from .machines import Machine, Machines
from .processes import Died
from .stage import Stage

KEYS = ["arm", "gripper"]
DRIVERS = {"policy": 0, "script": 0, "human": 10}
"""Who drives, and the priority of their leases."""

SEEN: Counter[str] = Counter()
"""What all runs so far have seen, of which a run without findings says little if it is nothing."""

_RATE = 1 / TICK
_TIMEOUT = 1.0  # seconds, of the drivers' calls
_LONGEST = 60.0  # seconds that hand-overs may take


@dataclass(frozen=True)
class Plan:
    """What is run; the seed says the rest.

    Attributes:
        transport: by name.
        fault: one of `control_faults.FAULTS`.
        seed: chooses moments, lengths, and how the drivers work.
        seconds: that faults go on.
        handovers: how many are to be seen, in place of `seconds`, among all drivers; 0 for no
            matter how many.
        leases: whether drivers have them; None lets the seed choose.
        thinking: whether the policy is a `ChunkedPolicy`; None lets the seed choose.
        breaks: what is broken on purpose; see `control_breaks`.
        late: seconds by which anything may be later than the machine explains.
    """

    transport: str
    fault: str
    seed: int
    seconds: float = 4.0
    handovers: int = 0
    leases: bool | None = None
    thinking: bool | None = None
    breaks: str = ""
    late: float = 0.0

    @property
    def name(self) -> str:
        parts = [self.transport, self.fault, str(self.seed), *self.breaks.split()]
        return "-".join(parts).replace("'", "")


class Run(Stage):
    """What a fault may do to a run.

    Attributes:
        plan: what is run.
        drivers: their names.
    """

    def __init__(self, plan: Plan, directory: Path, machines: Machines) -> None:
        super().__init__(plan, directory)
        self.plan, self._machines = plan, machines
        choose, contest = self.rng.choice, plan.fault == "handovers"
        self._leases = choose([True, False]) if plan.leases is None else plan.leases
        thinks = choose([True, False]) if plan.thinking is None else plan.thinking
        self._device_on = machines.here
        self._device = {
            "keys": KEYS,
            "action_timeout": dict(zip(KEYS, self.rng.sample([0.1, 0.2, 0.4], 2), strict=True)),
            "action_rate": _RATE if self._leases else None,
        }
        self._own_thread = choose([True, False])
        self._delay = choose([0.01, 0.05, 0.1])
        self._merge = choose(["append", "aligned", "blend", "ensemble"]) if thinks else None
        self._ttl = choose([0.2, 0.3, 0.5])
        self._styles: dict[str, dict[str, Any]] = {}
        for name in DRIVERS:
            held = self._leases and (contest or name != "script")
            plays = name == "policy" and thinks
            self._styles[name] = {
                "keys": KEYS[:1] if held or name != "script" else KEYS[1:],
                "sees": choose(["asked", "told"]) if plays else choose(["asked", "told", "blind"]),
                "valid": choose([0.7, 1.0] if plays else [None, 0.05, 0.15, 0.3, 1.0]),
                "age": choose([0.0, 0.0, 0.02]),
                "priority": DRIVERS[name] if held else None,
                "client_id": choose([None, name]),
                "merge": self._merge if plays else None,
                "max_age": choose([None, 0.3, 1.0]),
            }
        self.drivers = [*DRIVERS] if self._leases else ["policy", "script"]
        self._wants = {name: name == "policy" for name in DRIVERS}
        self._urls: dict[str, str] = {}
        self._read: Counter[str] = Counter()  # bytes of the device's notes
        self._writer: tuple[str, int] | None = None
        self._handovers = 0
        self.history.tell(
            "plan",
            **asdict(plan),
            **self._device,
            styles=self._styles,
            ttl=self._ttl,
            own_thread=self._own_thread,
            delay=self._delay,
        )

    # What happens in it -------------------------------------------------------------------

    def carry_out(self, fault: Callable[[Run], None]) -> list[str]:
        """Do all of it; returns what is wrong."""
        try:
            self.start("device")
            for name in ["thinker"] * bool(self._merge) + self.drivers:
                self.start(name)
            self.last(_LONGEST if self.plan.handovers else self.plan.seconds)
            while self.time_left() and not 0 < self.plan.handovers <= self._handovers:
                fault(self)
                self._look()
            self._recover()
            self._finish()
        except Died as error:
            self.history.tell("stuck", of="harness", life_of=0, why=repr(error))
        finally:
            self.end_all()
        self.read_logs()
        events = read(self.directory)
        for event in events:
            if event["e"] in ("act", "halt"):
                SEEN[f"{event['e']}s"] += 1
            elif event["e"] == "told":
                SEEN[event["outcome"]] += 1
            elif event["e"] == "stopped":
                for name in ("actions_stale", "actions_out_of_order", "actions_not_holder"):
                    SEEN[name] += event["stats"].get(name, 0)
        SEEN["handovers"] += self._handovers
        return check(events, late=self.plan.late)

    def _look(self) -> None:
        """See who acts, and how often that has changed."""
        for path in sorted(self.directory.glob("device.*.jsonl")):
            text = path.read_bytes()[self._read[path.name] :]
            text = text[: text.rfind(b"\n") + 1]  # the last line may be torn
            self._read[path.name] += len(text)
            for line in text.splitlines():
                if b'"e": "act",' in line:
                    event = json.loads(line)
                    if event["key"] == KEYS[0]:
                        writer = event["by"], event["of"]
                        self._handovers += self._writer not in (None, writer)
                        self._writer = writer

    @property
    def writer(self) -> str:
        """Who acted last."""
        return self._writer[0] if self._writer is not None else self.drivers[0]

    def _recover(self) -> None:
        """Undo whatever a fault left, and have everybody there."""
        self.calm()
        for name in ["device", *["thinker"] * bool(self._merge), *self.drivers]:
            if name in self.processes and self.processes[name].frozen:
                self.thaw(name)
            self.start(name)

    def _finish(self) -> None:
        """See that everybody's actions are taken, one after the other, and end."""
        self.history.tell("calm")
        for name in self.drivers:
            self.want(name, False)
        for name in self.drivers:
            self.want(name, True)
            self.order(name, "check")
            self.want(name, False)
        for name in [*self.drivers, *["thinker"] * bool(self._merge), "device"]:
            if not self.given_up:
                self.end(name)
            elif self.processes[name].alive():
                self.tell("kill", name)

    # What faults may do -------------------------------------------------------------------

    def order(self, name: str, what: str, **more: Any) -> None:
        """Have a process do something, and wait until it has."""
        if not self.given_up:
            self.processes[name].tell(do=what, **more)
            self.hear(name)

    def start(self, name: str) -> None:
        """Start a process of that name, unless it runs."""
        if self.runs(name):
            return
        if name in ("device", "thinker"):
            return self._start_server(name)
        machine = self._machines.far
        process = self.begin(
            machine.zygote,
            name,
            "driver",
            name=name,
            url=self._url_for(name, "device"),
            policy=self._url_for("policy-to-thinker", "thinker") if self._merge else None,
            ahead=machine.ahead,
            rate=_RATE,
            timeout=_TIMEOUT,
            ttl=self._ttl,
            all_keys=KEYS,
            action_timeout=self._device["action_timeout"],
            action_rate=self._device["action_rate"],
            eager=self._wants[name],
            **self._styles[name],
        )
        process.hear()

    def _start_server(self, name: str) -> None:
        machine = self._device_on if name == "device" else self._machines.far
        options: dict[str, Any] = {"ahead": machine.ahead, "url": self._listen_at(name)}
        if name == "device":
            options |= {**self._device, "rate": _RATE, "own_thread": self._own_thread}
            options |= {"breaks": self.plan.breaks}
        else:
            options |= {"steps": 25, "delay": self._delay, "jitter": self._delay / 4}
        process = self.begin(machine.zygote, name, name, **options)
        self._urls[name] = process.hear()
        self.tell("clock", name, ahead=machine.ahead)
        self._lead(name)

    def _listen_at(self, name: str) -> str:
        if self.plan.transport in TCP:
            return f"{self.plan.transport}://127.0.0.1:0"
        return f"{self.plan.transport}://{self.directory}/{name}"

    def _url_for(self, name: str, server: str) -> str:
        """Where a client finds a server: behind a proxy of its own, where there can be one."""
        if self.plan.transport not in TCP:
            return self._urls[server]
        if name not in self._urls:
            port = self.open_proxy(self._machines.here.zygote, name)
            self._urls[name] = f"{self.plan.transport}://127.0.0.1:{port}"
            self._lead(server)
        return self._urls[name]

    def _lead(self, server: str) -> None:
        """Have proxies lead to a server, or refuse for it where it is no more."""
        alive = self.runs(server)
        port = int(self._urls[server].rpartition(":")[2]) if alive and self.proxies else None
        self.order_proxies(self.links(server), do="target", port=port)

    def links(self, server: str = "") -> list[str]:
        """The proxies that lead to a server, or all; none over shared memory."""
        thinker = [name for name in self.proxies if name not in self.drivers]
        device = [name for name in self.proxies if name in self.drivers]
        return {"thinker": thinker, "device": device}.get(server, device + thinker)

    def _refuse_for(self, name: str) -> None:
        if name in ("device", "thinker") and not self.given_up:
            self._lead(name)

    def reboot_device(self) -> None:
        """Have the device's machine start anew, with a clock that begins near nothing."""
        self.kill("device")
        anew: Machine = self._machines.anew
        self._device_on = self._machines.here if self._device_on is anew else anew

    def hang(self, seconds: float) -> None:
        """Have the device take so long over its next action."""
        with suppress(Died):
            self.processes["device"].ask(do="hang", seconds=seconds)

    def want(self, name: str, wants: bool) -> None:
        """Have a driver want the robot's lease, or no more."""
        self._wants[name] = wants
        self.order(name, "take" if wants else "give")

    def toggle(self, name: str) -> None:
        """Have a driver want what it doesn't; but somebody always does."""
        self.want(name, not self._wants[name])
        if not any(self._wants.values()):
            self.want(self.rng.choice([each for each in self.drivers if each != name]), True)


def run(plan: Plan, directory: Path, machines: Machines) -> list[str]:
    """Carry out a plan; returns what is wrong. All that was told is in the directory."""
    from .control_faults import FAULTS

    directory.mkdir(parents=True)
    return Run(plan, directory, machines).carry_out(FAULTS[plan.fault])
