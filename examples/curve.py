"""A learning curve: what is learned, how steadily, and how long it takes; see `LearningCurve`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GREY, TRAINING, EVALUATION = "#5c6370", "#9db4cf", "#1f4e9c"


@dataclass(frozen=True)
class Episode:
    """One episode of training: the step that ended it, seconds since the start, its return."""

    step: int
    seconds: float
    total: float


@dataclass(frozen=True)
class Evaluation:
    """Returns of one policy over several episodes."""

    step: int
    seconds: float
    mean: float
    std: float
    episodes: int


class LearningCurve:
    """Returns over environment steps and wall time: of training, and of evaluations.

    Args:
        title: of the picture.
        path: of its file; its ending says the format.
        learning_starts: the step before which nothing is learned.
    """

    def __init__(self, title: str, path: Path, learning_starts: int) -> None:
        self.path = path
        self.episodes: list[Episode] = []
        self.evaluations: list[Evaluation] = []
        self._title = title
        self._learning_starts = learning_starts
        self._began = time.monotonic()

    def add_episode(self, step: int, total: float) -> None:
        """Note that an episode of training has ended."""
        self.episodes.append(Episode(step, time.monotonic() - self._began, total))

    def add_evaluation(self, step: int, totals: list[float]) -> None:
        """Note the returns of an evaluation's episodes."""
        seconds, mean, std = time.monotonic() - self._began, np.mean(totals), np.std(totals)
        self.evaluations.append(Evaluation(step, seconds, float(mean), float(std), len(totals)))

    def draw(self) -> bool:
        """Write the picture; returns False where there is nothing to draw yet.

        Raises:
            OSError: what the system says.
        """
        if not self.episodes and not self.evaluations:
            return False
        from matplotlib.figure import Figure  # only here: it takes a second

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        self._draw_training(axes)
        self._draw_evaluations(axes)
        end, seconds = max(self._times())
        step, result = end, ""
        if self.evaluations:
            last = self.evaluations[-1]
            step, seconds, result = last.step, last.seconds, f": {last.mean:.0f} ± {last.std:.0f}"
        axes.set_title(
            f"{self._title}{result} after {step:,} steps in {_clock(seconds)}",
            loc="left",
            fontweight="bold",
        )
        axes.set_xlabel("environment steps")
        axes.set_ylabel("return of an episode")
        axes.set_xlim(0, 1.02 * end)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        if self._learning_starts < end:
            axes.axvline(self._learning_starts, color=GREY, linestyle=":", label="learning starts")
        self._add_wall_time(axes)
        axes.grid(alpha=0.25)
        axes.spines[["right"]].set_visible(False)
        axes.legend(loc="best", frameon=False)
        figure.savefig(self.path, dpi=150)
        return True

    def _times(self) -> list[tuple[int, float]]:
        """When each step that is known of was taken."""
        episodes = [(episode.step, episode.seconds) for episode in self.episodes]
        return episodes + [(point.step, point.seconds) for point in self.evaluations]

    def _draw_training(self, axes: Any) -> None:
        if not self.episodes:
            return
        steps = np.array([episode.step for episode in self.episodes])
        totals = np.array([episode.total for episode in self.episodes])
        axes.scatter(
            steps, totals, s=14, color=TRAINING, label="training episodes", linewidths=0, zorder=3
        )
        # The mean of the tenth of all steps around each: episodes differ in length, and at the
        # start there are many short ones.
        width = steps[-1] / 20
        low = np.searchsorted(steps, steps - width)
        high = np.searchsorted(steps, steps + width, side="right")
        sums = np.concatenate([[0.0], np.cumsum(totals)])
        axes.plot(
            steps,
            (sums[high] - sums[low]) / (high - low),
            color=TRAINING,
            linewidth=2,
            label="training, moving mean",
        )

    def _draw_evaluations(self, axes: Any) -> None:
        if not self.evaluations:
            return
        steps = [point.step for point in self.evaluations]
        means = np.array([point.mean for point in self.evaluations])
        stds = np.array([point.std for point in self.evaluations])
        axes.fill_between(
            steps, means - stds, means + stds, color=EVALUATION, alpha=0.18, linewidth=0
        )
        axes.errorbar(
            steps,
            means,
            stds,
            color=EVALUATION,
            marker="o",
            markersize=5,
            linewidth=2,
            elinewidth=1,
            capsize=3,
            label="evaluation, mean ± std",
        )

    def _add_wall_time(self, axes: Any) -> None:
        """Tell on a second axis how long it took to get to a step."""
        points = sorted(self._times())
        steps = np.array([0, *(step for step, _ in points)], float)
        seconds = np.maximum.accumulate([0.0, *(seconds for _, seconds in points)])
        # Ticks at round times; several steps may fall on one second, as when training waits.
        end = float(seconds[-1])
        unit = next((unit for unit in _UNITS if end / unit <= 8), _UNITS[-1])
        marks = np.arange(0.0, end + 1e-9, unit)
        ticks: dict[float, str] = {}
        for mark, step in zip(marks, np.interp(marks, seconds, steps), strict=True):
            if not ticks or step - max(ticks) > 0.06 * steps[-1]:  # or labels would overlap
                ticks[float(step)] = _clock(mark)
        top = axes.secondary_xaxis("top")
        top.set_xticks(list(ticks), list(ticks.values()))
        top.set_xlabel("wall time", color=GREY)
        top.tick_params(colors=GREY)


_UNITS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)


def _clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
