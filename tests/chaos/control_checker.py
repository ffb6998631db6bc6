"""What must hold of a control loop whatever was done to it, and whether it did.

Judged is what the device noted, each time by its own clock: what it did (`act_callback`), when it
was made safe, and what its server has on record. Drivers are not believed: of them counts what they
had when they sent an action (which observation, or when by a clock that here can be translated),
and when they wanted the robot.

- **Age**: no action began past its time, by the age that it truly had. What rests on an observation
  is as old as that; what rests on none is as old as it was when it was made, and since.
- **Order**: the numbers of one driver's actions rise.
- **Record**: what was done is on it, each once, and nothing else.
- **Safe**: a tick after `action_timeout` has passed since the last action began, at the latest, the
  device is safe; once, and never sooner.
- **One writer**: the first action of another one begins a period after the last one's, and not
  while that is at work. Who may have the robot and is able to, has it a tick after the other's
  lease has ended, at the latest.

A program that the machine keeps waiting is late; by how much, a `witness` in it tells.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from .hands import Hands, Process
from .history import Event

TICK = 0.02
"""Seconds."""

_SHOWN = 3  # of a kind, in texts
_EPSILON = 1e-6  # seconds, of numbers that were rounded
_NEAR = 0.005  # seconds between a judgement and the first line of a user's function
_TRIPS = 0.01  # seconds for who has the robot to be told, to observe it, and to act on it


class Waits:
    """How long machines kept programs waiting."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._waits: defaultdict[Process, list[tuple[float, float, float]]] = defaultdict(list)
        for event in events:
            if event["e"] == "waited":
                told = event["since"], event["t"], event["seconds"]
                self._waits[event["who"], event["life"]].append(told)
        self._ends = {key: [end for _, end, _ in told] for key, told in self._waits.items()}

    def between(self, process: Process, begin: float, end: float) -> float:
        """Seconds that a program may have waited in that time."""
        told = self._waits.get(process, [])
        total = 0.0
        for since, until, seconds in told[bisect_left(self._ends.get(process, []), begin) :]:
            total += max(0.0, min(seconds, min(until, end) - max(since, begin)))
        return min(total, end - begin)


@dataclass
class Action:
    """One that a device carried out.

    Attributes:
        t: when the user's function began.
        at: when it was judged, by the record; `t` where that is not known.
        done: when the user's function ended; infinite where it didn't.
    """

    t: float
    key: str
    writer: Process
    number: int
    event: Event
    row: Event | None = None
    at: float = 0.0
    done: float = float("inf")


@dataclass
class Halt:
    """The device was made safe.

    Attributes:
        t: when the user's function began.
        at: when that was decided, by the record; `t` where that is not known.
    """

    t: float
    key: str
    at: float = 0.0


@dataclass
class Life:
    """Of a device's process.

    Attributes:
        actions, halts: that it noted, in this order.
        rows: of its record as it went on; what was noted last before a kill may be missing.
        final: rows of its record at its end.
        last: when it noted anything, which it does all the time; by its death it is told of later.
    """

    process: Process
    ahead: float = 0.0
    actions: list[Action] = field(default_factory=list)
    halts: list[Halt] = field(default_factory=list)
    rows: list[Event] = field(default_factory=list)
    final: list[Event] = field(default_factory=list)
    stopping: float | None = None
    ended: float | None = None
    killed: float | None = None
    last: float = 0.0
    stats: dict[str, int] = field(default_factory=dict)


def check(events: list[Event], *, late: float = 0.0) -> list[str]:
    """Return what is wrong with a run, in words; nothing where all is well.

    Args:
        events: of all processes and of the harness, in the order of time; see `history`.
        late: seconds by which anything may be later than the witnesses explain.
    """
    return _Check(events, late).all()


class _Check:
    def __init__(self, events: list[Event], late: float) -> None:
        self.events, self.late = events, late
        self.plan = next(event for event in events if event["e"] == "plan")
        self.timeouts: dict[str, float] = self.plan["action_timeout"] or {}
        self.waits = Waits(events)
        self.lives = _lives(events)
        self.found: defaultdict[str, list[str]] = defaultdict(list)

    def all(self) -> list[str]:
        for event in self.events:
            if event["e"] in ("died", "stuck", "traceback"):
                self.say("told", f"{event['of']} {event['life_of']}: {event['e']}: {event['why']}")
            elif event["e"] == "not taken":
                since, devices = event["since"], [life.process for life in self.lives.values()]
                waited = sum(self.waits.between(each, since, event["t"]) for each in devices)
                if waited < (event["t"] - since) / 2:  # else the machine has other things to do
                    text = f"{event['who']}: no action is taken in calm: {event['stats']}"
                    self.say("told", text)
        for life in self.lives.values():
            self.record(life)
            self.ages(life)
            self.order(life)
            self.safe(life)
            self.writers(life)
        self.claims()
        self.gaps()
        if not any(life.ended for life in self.lives.values()):
            self.say("told", "no device came to tell what it did")
        texts = []
        for some in self.found.values():
            texts += some[:_SHOWN]
            if len(some) > _SHOWN:
                texts.append(f"... and {len(some) - _SHOWN} more like that")
        return texts

    def say(self, kind: str, text: str) -> None:
        self.found[kind].append(text)

    # The record ---------------------------------------------------------------------------

    def record(self, life: Life) -> None:
        """Find each action's row; what was done is on the record, each once, and nothing else."""
        name = _name(life.process)
        for told in (life.rows, life.final):
            for a, b in pairwise(told):
                if b["index"] != a["index"] + 1:
                    self.say("record", f"{name}: after {a['index']} comes {b['index']} on record")
        if life.ended and len(life.final) < len(life.rows):
            self.say("record", f"{name}: the record has lost some of its beginning")
        rows: defaultdict[tuple[str, str, int], list[Event]] = defaultdict(list)
        halts: defaultdict[str, list[Event]] = defaultdict(list)
        for row in life.final if life.ended else life.rows:
            if row["outcome"] == "halt":
                halts[row["key"]].append(row)
            else:
                rows[row["key"], row["client_id"], row["number"]].append(row)
        for action in life.actions:
            event = action.event
            fitting = rows[event["key"], event["client"], event["n"]]
            # A restarted driver of the same name counts from one again.
            fitting = [row for row in fitting if self.at(life, row) <= action.t + _EPSILON]
            if fitting:
                action.row = fitting[-1]
                rows[event["key"], event["client"], event["n"]].remove(action.row)
                action.at = self.at(life, action.row)
                self.row(life, action, action.row)
            else:
                action.at = action.t
                if life.ended:
                    self.say("record", f"{name}: {_action(action)} is not on record")
        for left in rows.values():
            for row in left:
                if life.ended or row["outcome"] == "done":
                    self.say("record", f"{name}: on record, and never done: {row}")
        for key in {*halts, *(halt.key for halt in life.halts)}:
            noted = [halt for halt in life.halts if halt.key == key]
            for halt, row in zip(noted, halts[key], strict=False):
                halt.at = self.at(life, row)
            if len(halts[key]) > len(noted) or (life.ended and len(halts[key]) < len(noted)):
                text = f"{len(noted)} times, and {len(halts[key])} times by the record"
                self.say("record", f"{name}: {key} was made safe {text}")
        if life.ended:
            counted = life.stats.get("actions", 0), life.stats.get("halts", 0)
            if counted != (len(life.actions), len(life.halts)):
                text = f"{len(life.actions)} actions and {len(life.halts)} halts"
                self.say("stats", f"{name}: {text}, but counted were {counted}")

    def row(self, life: Life, action: Action, row: Event) -> None:
        """Compare a row of the record with what was done."""
        event, name = action.event, f"{_name(life.process)}: {_action(action)}"
        if row["policy"] != f"{event['by']}-{event['of']}":
            self.say("row", f"{name}: the record calls its policy {row['policy']}")
        if row["label"] != event["by"]:
            self.say("row", f"{name}: the record calls its sender {row['label']}")
        if (row["observation"] is None) != ("made" in event):
            self.say("row", f"{name}: the record has its observation as {row['observation']}")
        if life.ended and action.done < float("inf") and row["outcome"] != "done":
            self.say("row", f"{name}: the record has its outcome as {row['outcome']}")
        if life.ended and action.done == float("inf"):
            self.say("row", f"{name}: it never ended")
        behind = action.t - action.at - self.waits.between(life.process, action.at, action.t)
        if behind > TICK + self.late:
            self.say("row", f"{name}: it began {behind * 1e3:.0f} ms after it was judged")

    def at(self, life: Life, row: Event) -> float:
        at: float = row["at"] - life.ahead
        return at

    # Ages ---------------------------------------------------------------------------------

    def ages(self, life: Life) -> None:
        """No action began past its time."""
        seen = {
            (e["life"], e["n"]): e["not_after"]
            for e in self.events
            if e["who"] == "device" and e["e"] == "observed"
        }
        sent = {
            (e["who"], e["life"], e["key"], e["n"]): e["took"]
            for e in self.events
            if e["e"] == "sent"
        }
        for action in life.actions:
            event, row, doubt = action.event, action.row, 0.0
            born = None
            if "made" in event:
                born = event["made"] - event["age"]
                who = *action.writer, action.key, action.number
                end = event["made"] + _NEAR
                doubt = sent.get(who, self.waits.between(action.writer, event["made"], end))
                doubt += _NEAR / 10
            else:
                if rests_on := event.get("rests_on"):
                    born = seen.get((rests_on[0], rests_on[1]), float("inf"))
                if row is not None and row["observation"] is not None:
                    # An id is of a clock that began anew with the device's machine.
                    its = self.lives[rests_on[0]] if rests_on else life
                    taken = row["observation"] / 1e9 - its.ahead
                    if born is not None and taken > born + _EPSILON:
                        self.say("id", f"{_action(action)}: its observation is older than its id")
                    born = taken if born is None else min(born, taken)
            if born is None:
                continue
            age = action.at - born - doubt
            if row is not None and row["age"] < age - _EPSILON:
                text = f"its age is {age * 1e3:.1f} ms, on record are {row['age'] * 1e3:.1f} ms"
                self.say("age told", f"{_name(life.process)}: {_action(action)}: {text}")
            most = event["valid"]
            if most is None:
                most = self.timeouts.get(action.key, float("inf"))
            if row is None:  # the callback's own note: what came between is the machine's
                age -= _NEAR + self.waits.between(life.process, action.at - _NEAR, action.at)
            if age > most + _EPSILON:
                text = f"began at an age of {age * 1e3:.1f} ms, and was valid for {most * 1e3:.0f}"
                self.say("age", f"{_name(life.process)}: {_action(action)} {text}")

    def order(self, life: Life) -> None:
        """The numbers of a driver rise, by what was done and by the record."""
        newest: dict[tuple[str, Process], int] = {}
        for action in life.actions:  # as the function saw them
            of = action.key, action.writer
            if action.number <= newest.get(of, 0):
                text = f"came after number {newest[of]}"
                self.say("order", f"{_name(life.process)}: {_action(action)} {text}")
            newest[of] = max(action.number, newest.get(of, 0))

    # Safety -------------------------------------------------------------------------------

    def safe(self, life: Life) -> None:
        """The device was made safe in time, once, and not without need."""
        name = _name(life.process)
        for key, timeout in self.timeouts.items():
            begun = [(action.at, action) for action in life.actions if action.key == key]
            made = [(halt.at or halt.t, halt) for halt in life.halts if halt.key == key]
            both: list[tuple[float, Action | Halt]] = sorted([*begun, *made], key=lambda e: e[0])
            if both and isinstance(both[0][1], Halt):
                self.say("halt", f"{name}: {key} was made safe before it had done anything")
            for (before, what), (after, then) in pairwise(both):
                if isinstance(what, Halt):
                    if isinstance(then, Halt):
                        self.say("halt", f"{name}: {key} was made safe twice in one silence")
                    continue
                bound = before + timeout
                if isinstance(then, Halt):
                    stops = life.stopping is not None and life.stopping <= then.t
                    if after < bound - _EPSILON and not stops:
                        text = f"{(bound - after) * 1e3:.1f} ms too early"
                        self.say("halt", f"{name}: {key} was made safe {text}")
                    self.in_time(life, key, bound, then.t, "was made safe")
                else:
                    self.in_time(life, key, bound, after, "went on unsafe")
            if not both or isinstance(both[-1][1], Halt):
                continue
            if life.ended:
                self.say("halt", f"{name}: {key} was not made safe as the device stopped")
            elif life.killed:
                bound = both[-1][0] + timeout
                self.in_time(life, key, bound, life.last, "was left unsafe")

    def in_time(self, life: Life, key: str, bound: float, then: float, what: str) -> None:
        late = then - bound - TICK - self.late
        if late > 0:
            waited = self.waits.between(life.process, bound - TICK, then)
            if late > waited:
                text = f"{what} {(then - bound) * 1e3:.0f} ms after the bound"
                self.say("late", f"{_name(life.process)}: {key} {text}, waits {waited * 1e3:.0f}")

    # One writer ---------------------------------------------------------------------------

    def writers(self, life: Life) -> None:
        """Never two writers in one period, nor at once."""
        period = self.plan["action_rate"] and 1 / self.plan["action_rate"]
        if not period:
            return
        for key in {action.key for action in life.actions}:
            actions = sorted((a for a in life.actions if a.key == key), key=lambda a: a.at)
            for a, b in pairwise(actions):
                if a.writer == b.writer:
                    continue
                before, then = _action(a), f"{_name(life.process)}: {_action(b)} began"
                if b.at - a.at < period - _EPSILON:
                    self.say("writers", f"{then} {(b.at - a.at) * 1e3:.1f} ms after {before}")
                if b.at < a.done - _EPSILON:
                    self.say("writers", f"{then} while {before} was at work")

    def gaps(self) -> None:
        """Whoever may have the robot has it in time."""
        hands = Hands(self.events)
        if not hands.priorities:
            return
        actions = sorted(
            (a for life in self.lives.values() for a in life.actions if a.key == hands.key),
            key=lambda a: a.at,
        )
        for a, b in pairwise(actions):
            for name in hands.priorities:
                free = a.done if a.done < b.at else a.at
                for since, due in hands.due(name, a.writer, free, b.writer, b.at):
                    late = b.at - due - TICK - _TRIPS - self.late
                    if late > 0 and late > self.waited(hands, name, b, due):
                        text = f"{(b.at - due) * 1e3:.0f} ms after it could have had the robot"
                        text += f", which it wanted since {since:.3f}"
                        self.say("gap", f"{name} {text}: {_action(a)} was before {_action(b)}")

    def waited(self, hands: Hands, name: str, then: Action, due: float) -> float:
        """Seconds that those on whom it depends were kept waiting."""
        who = {("device", life) for life in self.lives} | {(name, n) for n in hands.lives(name)}
        who |= {then.writer, (f"proxy-{name}", 0), (f"proxy-{then.writer[0]}", 0)}
        return sum(self.waits.between(process, due - TICK, then.at) for process in who)

    # What drivers were told ---------------------------------------------------------------

    def claims(self) -> None:
        """What a driver was told is done was done."""
        done = {(*a.writer, a.key, a.number) for life in self.lives.values() for a in life.actions}
        for event in self.events:
            if event["e"] == "told" and event["outcome"] == "ok":
                which = event["who"], event["life"], event["key"], event["n"]
                if which not in done:
                    self.say("claims", f"{which} was said to be done, and is not")


def _name(process: Process) -> str:
    return f"{process[0]} {process[1]}"


def _action(action: Action) -> str:
    return f"{action.key} {action.number} of {_name(action.writer)} at {action.at:.3f}"


def _lives(events: list[Event]) -> dict[int, Life]:
    lives: dict[int, Life] = {}
    for event in events:
        if event["e"] == "kill" and event["of"] == "device":
            lives[event["life_of"]].killed = event["t"]
        elif event["e"] == "clock" and event["of"] == "device":
            life = lives.setdefault(event["life_of"], Life(("device", event["life_of"])))
            life.ahead = event["ahead"]
        if event["who"] != "device":
            continue
        life = lives.setdefault(event["life"], Life(("device", event["life"])))
        life.last = event["t"]
        match event["e"]:
            case "act":
                writer = event["by"], event["of"]
                life.actions.append(Action(event["t"], event["key"], writer, event["n"], event))
            case "acted":
                for action in reversed(life.actions):
                    if (action.key, action.writer[0], action.number) == (
                        event["key"],
                        event["by"],
                        event["n"],
                    ):
                        action.done = event["t"]
                        break
            case "halt":
                life.halts.append(Halt(event["t"], event["key"]))
            case "row":
                life.rows.append(event)
            case "on record":
                life.final.append(event)
            case "stopping":
                life.stopping = event["t"]
            case "stopped":
                life.stats = event["stats"]
            case "end":
                life.ended = event["t"]
    return lives
