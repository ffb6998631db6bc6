"""What must hold of replicas that are killed, replaced and scaled while clients call them.

- Each call ends: with its answer, or an error, within its deadline.
- None is carried out twice, and an answer is of the one that did.
- None fails, but those that were under way in a replica as it was killed, or sent to it before the
  client could know: these say that they may have been carried out, and no other has begun them.
  Nor those for which the machine kept a replica, or the client, waiting for so long that it was
  taken to be gone: they are counted.
- What is settled is so: replicas that were ended or replaced take no call that is asked later.
- In place of one that was killed another takes calls within ten seconds.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from .history import Event

NEW_WITHIN = 10.0  # seconds
_SLACK = 0.25  # seconds by which a call may end late
_NOTICED = 0.5  # seconds in which a client knows that a replica was killed
_UNDER_WAY = "may have been carried out"
_SILENCE = 2.5  # seconds after which a client takes a replica to be gone
_GONE = 1.0  # seconds; who is kept waiting for as long of them may be taken to be gone
_TOLD = 5  # of each kind


def check(
    events: Sequence[Event], late: float = 0.0, seen: Counter[str] | None = None
) -> list[str]:
    """Return what is wrong, in words; counts in `seen` what there was."""
    return _Checker(events, late, Counter() if seen is None else seen).check()


class _Checker:
    def __init__(self, events: Sequence[Event], late: float, seen: Counter[str]) -> None:
        self._events, self._late, self._seen = events, late, seen
        self._found: dict[str, list[str]] = defaultdict(list)
        self._asked: dict[str, Event] = {}
        self._ended: dict[str, list[Event]] = defaultdict(list)
        self._begun: dict[str, list[Event]] = defaultdict(list)
        self._waited: dict[tuple[str, int], list[Event]] = defaultdict(list)
        self._kills = [event for event in events if event["e"] == "kill"]
        for event in events:
            match event["e"]:
                case "ask":
                    self._asked[event["call"]] = event
                case "answer" | "fail":
                    self._ended[event["call"]].append(event)
                case "begin":
                    self._begun[event["call"]].append(event)
                case "waited":
                    self._waited[event["who"], event["life"]].append(event)

    def check(self) -> list[str]:
        self._seen["calls"] += len(self._asked)
        for call, asked in self._asked.items():
            self._check_call(call, asked)
        for call in self._begun.keys() - self._asked.keys():
            self._wrong("carried out", f"{call} was, which nobody has asked")
        self._check_settled()
        self._check_new()
        for event in self._events:
            if event["e"] in ("died", "stuck", "traceback", "unsettled"):
                why = event.get("why", "")
                self._wrong(event["e"], f"{event.get('of', 'it')} at {event['t']:.2f}: {why}")
        if not self._asked:
            self._wrong("nothing", "was asked")
        found = []
        for kind, texts in self._found.items():
            found += [f"{kind}: {text}" for text in texts[:_TOLD]]
            if len(texts) > _TOLD:
                found.append(f"{kind}: and {len(texts) - _TOLD} more")
        return found

    def _wrong(self, kind: str, text: str) -> None:
        self._found[kind].append(text)

    def _check_call(self, call: str, asked: Event) -> None:
        ended, begun = self._ended[call], self._begun[call]
        if len(begun) > 1:
            self._wrong("twice", f"{call} was carried out by {[each['life'] for each in begun]}")
        if len(ended) != 1:
            self._wrong("never", f"{call}, asked at {asked['t']:.2f}, ended {len(ended)} times")
            return
        (end,) = ended
        deadline = asked["t"] + asked["timeout"]
        if end["t"] > deadline + _SLACK + self._late + self._longest_wait(asked, end):
            self._wrong("late", f"{call} ended {end['t'] - deadline:.2f} s after its deadline")
        if end["e"] == "answer":
            by = [each["life"] for each in begun]
            if end["its_call"] != call or end["its_pid"] not in by:
                self._wrong("answer", f"{call} was answered by {end['its_pid']}, and begun by {by}")
            return
        if (why := self._not_excused(asked, end, begun)) is not None:
            if self._kept_waiting(asked, end):
                self._seen["calls failed, the machine's doing"] += 1
                return
            at = f"asked at {asked['t']:.2f}, failed at {end['t']:.2f}"
            self._wrong("failed", f"{call}, {at}: {why}; {end['error']}: {end['text']}")

    def _not_excused(self, asked: Event, end: Event, begun: Sequence[Event]) -> str | None:
        """Why a call may not have failed; None where it may."""
        known = _NOTICED + self._late + self._longest_wait(asked, end)
        kills = [
            kill
            for kill in self._kills
            if asked["t"] <= kill["t"] + known and kill["since"] <= end["t"]
        ]
        if not kills:
            return "no replica was killed meanwhile"
        if not any(url in end["text"] for kill in kills for url in kill["url"].split(",")):
            return "it is not told of one that was killed meanwhile"
        others = [each["life"] for each in begun if each["life"] not in [k["pid"] for k in kills]]
        if others:
            return f"{others[0]} had begun it, which was not killed"
        if end["unharmed"] or end["error"] != "Unreachable" or _UNDER_WAY not in end["text"]:
            return "it doesn't say that it may have been carried out"
        how = "begun" if begun else "unread"
        if not begun and all(asked["t"] > kill["t"] for kill in kills):
            how = "sent to one that was no more"
        self._seen[f"calls failed, {how}"] += 1
        return None

    def _kept_waiting(self, asked: Event, end: Event) -> bool:
        """Whether the machine kept the client or a replica waiting for long, all in all."""
        since = asked["t"] - _SILENCE
        return end["error"] == "Unreachable" and any(
            sum(e["seconds"] for e in waits if e["t"] >= since and e["since"] <= end["t"]) >= _GONE
            for (who, life), waits in self._waited.items()
            if who == "replica" or (who, life) == (asked["who"], asked["life"])
        )

    def _longest_wait(self, asked: Event, end: Event) -> float:
        """Seconds for which the machine has kept the client's process waiting."""
        waits = self._waited[asked["who"], asked["life"]]
        return max(
            (
                each["seconds"]
                for each in waits
                if each["t"] >= asked["t"] and each["since"] <= end["t"]
            ),
            default=0.0,
        )

    def _check_settled(self) -> None:
        """Who takes calls once something is done is who was told to be there then."""
        changes = [e for e in self._events if e["e"] in ("settled", "change", "kill")]
        times = [event["t"] if event["e"] != "kill" else event["since"] for event in changes]
        self._seen["settled"] += sum(event["e"] == "settled" for event in changes)
        for call, begun in self._begun.items():
            asked = self._asked.get(call)
            if asked is None:
                continue
            before = bisect.bisect_right(times, asked["t"]) - 1
            if before < 0 or changes[before]["e"] != "settled":
                continue
            settled = changes[before]
            for each in begun:
                after = bisect.bisect_right(times, each["t"]) - 1
                if after == before and each["life"] not in settled["pids"]:
                    self._wrong(
                        "settled",
                        f"{call}, asked at {asked['t']:.2f}, was begun by {each['life']}, which "
                        f"had been ended by {settled['t']:.2f}",
                    )

    def _check_new(self) -> None:
        made = {e["life"]: e["t"] for e in self._events if e["e"] == "made"}
        first: dict[Any, float] = {}
        for event in self._events:
            if event["e"] == "begin":
                first.setdefault(event["life"], event["t"])
        for kill in self._kills:
            self._seen["kills"] += 1
            if not kill["alone"]:
                continue
            new = [
                first[pid] - kill["t"]
                for pid, at in made.items()
                if at > kill["since"] and pid in first
            ]
            soonest = min(new, default=None)
            if soonest is None or soonest > NEW_WITHIN + self._late:
                took = "no other one took calls" if soonest is None else f"it took {soonest:.1f} s"
                self._wrong("new", f"after the kill at {kill['t']:.2f}: {took}")
            else:
                self._seen["longest until a new one takes calls, ms"] = max(
                    self._seen["longest until a new one takes calls, ms"], int(soonest * 1e3)
                )
