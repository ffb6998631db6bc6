"""What a control loop has seen: counts, and figures of its last ten thousand steps."""

from __future__ import annotations

import math
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeml.extras import load_matplotlib

__all__ = ["Statistics"]

_KEPT = 10_000  # steps, and answers
_STEPS = ("chunk", "hold", "taken", "nothing")
_COLORS = {"chunk": "C0", "hold": "C3", "taken": "C1", "nothing": "0.5"}


class _Seen(NamedTuple):
    number: int
    source: str
    age: float
    left: int


class Statistics:
    """Counts steps and answers, in one thread; any may ask for the figures.

    Args:
        rate: steps per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.counts: Counter[str] = Counter()
        self._steps: deque[_Seen] = deque(maxlen=_KEPT)
        self._margins: deque[int] = deque(maxlen=_KEPT)
        self._turnarounds: deque[float] = deque(maxlen=_KEPT)

    def count_step(self, source: str, age: float, left: int) -> None:
        """Count a step, with the age of its action and how many were left after it."""
        self._steps.append(_Seen(self.counts["steps"], source, age, left))
        self.counts["steps"] += 1
        self.counts[source] += 1

    def count_answer(self, outcome: str, seconds: float, margin: int | None) -> None:
        """Count what became of a request, and how many steps were left as its answer came."""
        self.counts[outcome] += 1
        if outcome == "failed":
            return
        self._turnarounds.append(seconds)
        if margin is not None:
            self._margins.append(margin)

    def figures(self) -> dict[str, float]:
        """Return counts, and figures; see `ChunkedPolicy.stats`."""
        # Copies, each made at once: the loop goes on, and is not to wait for this.
        counts = self.counts.copy()
        margins, turnarounds = self._margins.copy(), self._turnarounds.copy()
        ages = [each.age for each in self._steps.copy() if each.source == "chunk"]
        return {
            "steps": counts["steps"],
            "steps_played": counts["chunk"],
            "steps_held": counts["hold"],
            "steps_taken": counts["taken"],
            "steps_without_action": counts["nothing"],
            "holds": counts["holds"],
            "requests": counts["requests"],
            "chunks": counts["merged"],
            "chunks_late": counts["late"],
            "chunks_stale": counts["stale"],
            "requests_failed": counts["failed"],
            "observations_too_old": counts["observations_too_old"],
            "margin_min": min(margins, default=math.nan),
            "margin_median": _quantile(margins, 0.5),
            "turnaround_median": _quantile(turnarounds, 0.5),
            "turnaround_max": max(turnarounds, default=math.nan),
            "age_median": _quantile(ages, 0.5),
            "age_max": max(ages, default=math.nan),
        }

    def describe(self) -> str:
        """Return the figures as a table."""
        f = self.figures()
        return "\n".join(
            [
                f"{f['steps']:.0f} steps at {self._rate:g} Hz: {f['steps_played']:.0f} played, "
                f"{f['steps_held']:.0f} held in {f['holds']:.0f} holds, "
                f"{f['steps_taken']:.0f} taken, {f['steps_without_action']:.0f} without action",
                f"{f['requests']:.0f} requests: {f['chunks']:.0f} chunks merged, "
                f"{f['chunks_late']:.0f} late, {f['chunks_stale']:.0f} stale, "
                f"{f['requests_failed']:.0f} failed",
                f"turnaround {_ms(f['turnaround_median'])}, at most {_ms(f['turnaround_max'])}",
                f"left when a chunk came: {_number(f['margin_median'])} steps, "
                f"at least {_number(f['margin_min'])}",
                f"age when played {_ms(f['age_median'])}, at most {_ms(f['age_max'])}",
            ]
        )

    def draw(self, path: Path) -> None:
        """Write a picture of the last ten thousand steps, as PNG or what the path's suffix says.

        Raises:
            ImportError: matplotlib is not installed; the text says how to.
        """
        load_matplotlib()
        from matplotlib import pyplot

        steps, turnarounds = self._steps.copy(), self._turnarounds.copy()
        figure, axes = pyplot.subplots(3, 1, figsize=(10, 8), layout="constrained")
        for source in _STEPS:
            there = [each for each in steps if each.source == source]
            times = [each.number / self._rate for each in there]
            ages = [each.age * 1e3 if math.isfinite(each.age) else 0.0 for each in there]
            style: dict[str, Any] = {"color": _COLORS[source], "s": 4}
            if there:
                axes[0].scatter(times, ages, label=f"{source} ({len(there)})", **style)
                axes[1].scatter(times, [each.left for each in there], **style)
        axes[0].set(title="age of each action", xlabel="s", ylabel="ms")
        axes[1].set(title="steps that were left", xlabel="s", ylabel="steps")
        if steps:
            axes[0].legend(loc="upper right")
        axes[2].hist([each * 1e3 for each in turnarounds], bins=50)
        axes[2].set(title="turnarounds of requests", xlabel="ms", ylabel="requests")
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.savefig(path)
        pyplot.close(figure)


def _quantile(values: Any, q: float) -> float:
    return float(np.quantile(list(values), q)) if values else math.nan


def _ms(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else f"{seconds * 1e3:.1f} ms"


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:g}"
