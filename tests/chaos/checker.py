"""What must hold of a run whatever was done to it, and whether it did.

The model knows no faults and no code. An actor is a list of numbers, in the order in which it
inserted them; a learner's store is a mixture of such lists. So of each actor's items the store must
have a part, in that order and each once, and must have all of those that nobody was free to lose:

- with a log, each item of which the actor was told that it is inserted;
- without one, each item of an actor's life that wasn't ended by a kill, and of the others as many,
  from the first on, as it was told are durable; or are applied, where no learner was killed either.

What `update()` has said to be durable, and what an actor's store was told it may let go of, must be
in each checkpoint that a learner loads from then on.
And no call may outlive its deadline by more than 0.2 s, less what the machine and the harness (by
SIGSTOP) kept its process from running.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .history import Event

_BUSY = 3.0  # seconds that a machine may keep a process waiting, where it isn't known
_SHOWN = 8  # numbers in a text


@dataclass
class _Life:
    """Of an actor's process.

    Attributes:
        inserted: numbers that it was told are inserted, in order.
        begun: numbers, in order, of which nobody knows whether they were inserted.
        order: both.
        durable: moments, and how many items it had been told are durable by then.
        released: moments, and the numbers of items that its store was told to let go of, with all
            before them.
        applied: how many it was told are applied.
        ended: whether it came to its own end, with nothing left to send.
    """

    inserted: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    durable: list[tuple[float, int]] = field(default_factory=list)
    released: list[tuple[float, int]] = field(default_factory=list)
    applied: int = 0
    ended: bool = False


def check(events: list[Event], *, logs: bool, late: float = 0.2) -> list[str]:
    """Return what is wrong with a run, in words; nothing where all is well.

    Args:
        events: of all processes and of the harness, in the order of time; see `history`.
        logs: whether the actors had logs.
        late: seconds by which a call may outlive its deadline.
    """
    lives = _lives(events)
    last = max((event["life"] for event in events if event["who"] == "learner"), default=0)
    contents = [e for e in events if e["e"] == "contents" and e["life"] == last]
    found = [*_told(events), *_late(events, late), *_weights(events), *_ledgers(events)]
    if not contents:
        return [*found, "no learner came to tell what it has"]
    for actor, its in lives.items():
        has = [number for who, number in contents[-1]["contents"] if who == actor]
        found += _compare(f"actor {actor}", has, its, _must(events, its, logs))
    known = set(lives)
    if strangers := sorted({who for who, _ in contents[-1]["contents"]} - known):
        found.append(f"the learner has items of {strangers}, who inserted none")
    found += _durable(events, lives, logs)
    return found


def _lives(events: list[Event]) -> dict[int, list[_Life]]:
    lives: defaultdict[int, dict[int, _Life]] = defaultdict(dict)
    for event in events:
        if not event["who"].startswith("actor-"):
            continue
        actor = int(event["who"].removeprefix("actor-"))
        life = lives[actor].setdefault(event["life"], _Life())
        match event["e"]:
            case "insert":
                life.begun.append(event["n"])
                life.order.append(event["n"])
            case "inserted":
                life.begun.remove(event["n"])
                life.inserted.append(event["n"])
            case "not inserted":
                life.begun.remove(event["n"])
                life.order.pop()
            case "call" if event["name"] == "update":
                life.applied += event.get("applied", 0)
                before = life.durable[-1][1] if life.durable else 0
                life.durable.append((event["t"], before + (event.get("durable") or 0)))
            case "released":
                life.released.append((event["t"], event["n"]))
            case "end":
                life.ended = True
    return {actor: [its[n] for n in sorted(its)] for actor, its in sorted(lives.items())}


def _must(events: list[Event], lives: list[_Life], logs: bool) -> set[int]:
    """The numbers of an actor's items that nobody was free to lose."""
    if logs:
        return {number for life in lives for number in life.inserted}
    killed = any(e["e"] == "kill" and e["of"] == "learner" for e in events)
    must = set()
    for life in lives:
        if life.ended:
            must |= set(life.inserted)
            continue
        told = life.durable[-1][1] if life.durable else 0
        if not killed:
            told = max(told, life.applied)
        must |= set(life.order[:told]) - set(life.begun)
    return must


def _compare(whose: str, has: list[int], lives: list[_Life], must: set[int]) -> list[str]:
    found = []
    if twice := sorted(number for number, n in Counter(has).items() if n > 1):
        found.append(f"{whose}: the learner has {_some(twice)} more than once")
    if late := [b for a, b in pairwise(has) if a > b]:
        found.append(f"{whose}: out of order: {_some(late)} came after later ones")
    if made_up := sorted(set(has) - {number for life in lives for number in life.order}):
        found.append(f"{whose}: {_some(made_up)} were never inserted")
    if lost := sorted(must - set(has)):
        found.append(f"{whose}: lost {_some(lost)}")
    return found


def _durable(events: list[Event], lives: dict[int, list[_Life]], logs: bool) -> list[str]:
    """What was said to be durable must be in what learners loaded after that."""
    found = []
    started = {e["life"]: e["t"] for e in events if e["who"] == "learner" and e["e"] == "start"}
    for event in events:
        if event["e"] not in ("loaded", "began empty"):
            continue
        when = started[event["life"]]
        for actor, its in lives.items():
            has = {number for who, number in event.get("contents", ()) if who == actor}
            said: set[int] = set()
            order: list[int] = []
            begun: set[int] = set()
            for life in its:
                if not logs:  # each life's store is another one
                    order, begun = [], set()
                order, begun = order + life.order, begun | set(life.begun)
                # What a life before had been told may be told again, so counts don't add up.
                total = max((n for t, n in life.durable if t < when), default=0)
                let_go = max((n for t, n in life.released if t < when), default=0)
                said |= {*order[:total], *(n for n in order if n <= let_go)} - begun
            if missing := sorted(said - has):
                found.append(
                    f"actor {actor}: {_some(missing)} were said to be durable, and are not in what "
                    f"life {event['life']} of the learner loaded"
                )
    return found


def _late(events: list[Event], late: float) -> list[str]:
    found = []
    frozen = _frozen(events)
    calling: dict[tuple[str, int], Event] = {}
    slowest: dict[tuple[str, str], tuple[float, str]] = {}
    ends = {(e["of"], e["life_of"]): e["t"] for e in events if e["e"] == "kill"}
    limits = {e["name"]: e["limit"] for e in events if e["e"] == "call"}
    for event in events:
        key = event["who"], event["life"]
        if event["e"] == "calling":
            calling[key] = event
        elif event["e"] == "call":
            calling.pop(key, None)
            took = event["took"] - _overlap(frozen[key], event["began"], event["t"])
            if took > event["limit"] + late:
                text = (
                    f"{event['who']} life {event['life']}: {event['name']} took {took:.2f} s of "
                    f"{event['limit']:g}: {event['outcome']} {event.get('text', '')[:200]}"
                )
                which = event["who"], event["name"]
                slowest[which] = max(slowest.get(which, (0.0, "")), (took, text))
    for key, event in calling.items():  # that never came back
        end = ends.get(key, events[-1]["t"])
        took = end - event["t"] - _overlap(frozen[key], event["t"], end)
        if key not in ends or took > limits.get(event["name"], 0.0) + late + _BUSY:
            found.append(f"{key[0]} life {key[1]}: {event['name']} hadn't ended after {took:.2f} s")
    return found + [text for _, text in slowest.values()]


def _frozen(events: list[Event]) -> defaultdict[tuple[str, int], list[tuple[float, float]]]:
    """When each process was held by the harness."""
    times: defaultdict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    since: dict[tuple[str, int], float] = {}
    for event in events:
        if event["e"] == "freeze":
            since[event["of"], event["life_of"]] = event["t"]
        elif event["e"] in ("thaw", "kill"):
            key = event["of"], event["life_of"]
            if key in since:
                times[key].append((since.pop(key), event["t"]))
    return times


def _overlap(times: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    return sum(max(0.0, min(b, end) - max(a, begin)) for a, b in times)


def _weights(events: list[Event]) -> list[str]:
    found = []
    newest: dict[tuple[str, int], tuple[int, int]] = {}
    for event in events:
        if event["e"] == "weights":
            key, told = (event["who"], event["life"]), (event["of"], event["version"])
            if told < newest.get(key, (0, 0)):
                found.append(f"{key[0]} life {key[1]}: got weights {told} after {newest[key]}")
            newest[key] = told
    return found


def _ledgers(events: list[Event]) -> list[str]:
    """An actor's ledger must add up whenever it is looked at."""
    found: dict[str, str] = {}
    for event in events:
        stats: dict[str, Any] | None = event.get("stats") if event["e"] == "stats" else None
        if not stats:
            continue
        what = [stats["applied"], *stats["refused"].values()]
        total = sum(what) + stats["dropped"] + stats["lost"] + stats["waiting"]
        if stats["accepted"] != total:
            found[event["who"]] = f"{event['who']}: the ledger doesn't add up: {stats}"
        elif stats["durable"] > stats["applied"]:
            found[event["who"]] = f"{event['who']}: more durable than applied: {stats}"
        elif sum(stats["refused"].values()) + stats["dropped"] + stats["lost"]:
            found[event["who"]] = f"{event['who']}: refused, dropped or lost: {stats}"
    return list(found.values())


def _told(events: list[Event]) -> list[str]:
    """What the harness, or a process, says is wrong."""
    found = []
    for event in events:
        match event["e"]:
            case "died" | "stuck" | "traceback":
                found.append(f"{event['of']} life {event['life_of']}: {event['e']}: {event['why']}")
            case "another's answer":
                found.append(f"{event['who']}: asked {event['asked']}, and got {event['answer']}")
    return found


def _some(numbers: list[int]) -> str:
    """Numbers, as runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    more = [] if len(texts) <= _SHOWN else [f"and {len(texts) - _SHOWN} runs more"]
    return f"{len(numbers)} items (" + ", ".join(texts[:_SHOWN] + more) + ")"
