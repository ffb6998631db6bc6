"""Trajectory buffers: what is drawn, from where, and that no history mixes two trajectories."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeml.core.errors import Malformed
from edgeml.data import Batch, device
from edgeml.data.samplers import (
    FutureSampler,
    LatestSampler,
    PrioritySampler,
    Sampler,
    SequenceSampler,
    Steps,
)
from edgeml.data.shapes import DataShape
from edgeml.data.spans import Ranges, Spans
from edgeml.data.trajectory import TrajectoryBuffer
from edgeml.data.trajectory_store import (
    TrajectoryBufferDataStore,
    make_default_trajectory_buffer,
)
from edgeml.testing import StoreTests

SHAPES = [
    DataShape("o/v", (2,)),
    DataShape("o/image", (2, 2), "uint8"),
    DataShape("x"),
    DataShape("p"),
]
# Compiling takes most of the time here: one capacity, and few batch sizes and configs, for all.
CAPACITY = 40
SAMPLERS = {
    "x": LatestSampler(),
    "o": LatestSampler(),
    "around": SequenceSampler(-2, 3, source="x"),
    "next": SequenceSampler(1, 2, squeeze=True, source="x"),
    "future": FutureSampler(max_future=3, source="o"),
    "far": FutureSampler("exponential", lambda_=0.3, source="x"),
    "priority": PrioritySampler("p", source="x"),
}


def step(i: int, p: float = 1.0) -> dict[str, Any]:
    """What is inserted; all but p tell the number."""
    return {
        "o": {"v": np.full(2, i, np.float32), "image": np.full((2, 2), i % 251, np.uint8)},
        "x": float(i),
        "p": p,
    }


def item(i: int, end: bool = False, p: float = 1.0) -> dict[str, Any]:
    return step(i, p) | {"end_of_trajectory": end}


class TestDataStore(StoreTests):
    def make_store(self, capacity: int) -> TrajectoryBufferDataStore:
        return TrajectoryBufferDataStore(capacity, SHAPES)

    def make_item(self, i: int) -> Any:
        return item(i, i % 5 == 0)


def buffer_of(*lengths: int, priorities: Any = None, **options: Any) -> TrajectoryBuffer:
    """A buffer of ended trajectories, of steps 1, 2, ... with these priorities."""
    store = TrajectoryBuffer(CAPACITY, SHAPES, **options)
    i = 0
    for length in lengths:
        for t in range(length):
            i += 1
            p = 1.0 if priorities is None else priorities[i - 1]
            store.insert(step(i, p), end_of_trajectory=t == length - 1)
    return store


def assert_distributed(drawn: Any, weights: dict[float, float]) -> None:
    """Hold a sample to a distribution: chi-square within 5 standard deviations of its mean."""
    drawn = np.asarray(drawn).ravel()
    values, counts = np.unique(drawn, return_counts=True)
    positive = {value: weight for value, weight in weights.items() if weight}
    assert set(values) <= set(positive), "something was drawn that never should be"
    total = sum(positive.values())
    seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
    chi_square = sum(
        (seen.get(value, 0) - len(drawn) * weight / total) ** 2 / (len(drawn) * weight / total)
        for value, weight in positive.items()
    )
    freedom = len(positive) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


# Which steps there are ----------------------------------------------------------------------


class Every:
    """Draws every number once, in order."""

    def integers(self, low: int, high: int, n: int) -> Any:
        del n
        return np.arange(low, high)


def check_spans(seed: int) -> None:
    """One random history of a table, against lists."""
    rng = np.random.default_rng(seed)
    capacity, min_length = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    spans = Spans(capacity, Ranges(min_length))
    ranges: list[tuple[int, int]] = []
    rows: list[tuple[int, int]] = []  # id, and number of the trajectory
    number, next_id, is_open = 0, 1, False
    for _ in range(40):
        what = rng.integers(8)
        if what == 0 and len(ranges) < 3:
            a = int(rng.integers(-3, 3))
            ranges.append((a, a + int(rng.integers(1, 5))))
            spans.add_range(ranges[-1])
        elif what == 1:
            spans.end()
            number, is_open = number + is_open, False
        elif what == 2 and rng.random() < 0.2:
            next_id = int(rng.integers(1, 50))
            spans.reset(next_id)
            rows, number, is_open = [], number + 1, False
        else:
            ends = rng.random(rng.integers(80 if what == 3 else 8)) < 0.3
            spans.extend(len(ends), next_id + 1 + np.flatnonzero(ends))
            for end in ends:
                rows.append((next_id, number))
                next_id, number, is_open = next_id + 1, number + end, not end
        held, trajectory_of = rows[-capacity:], dict(rows)
        trajectories: dict[int, list[int]] = {}
        for i, k in held:
            trajectories.setdefault(k, []).append(i)
        assert (spans.next_id, spans.is_open) == (next_id, is_open)
        assert spans.short == sum(
            len(ids) < min_length
            for k, ids in trajectories.items()
            if not (is_open and k == number)
        )
        if held:
            begins = [trajectory_of.get(i - 1) != k for i, k in held]
            assert spans.begins(held[0][0], len(held)).tolist() == begins
        for range_ in ranges:
            a, b = min(range_[0], 0), max(range_[1], 1)
            right = [
                ((ids[0] - 1) % capacity, i - ids[0], len(ids))
                for ids in trajectories.values()
                if len(ids) >= min_length
                for i in ids
                if ids[0] <= i + a and i + b - 1 <= ids[-1]
            ]
            given = spans.draw(spans.add_range(range_), 1, Every())  # type: ignore[arg-type]
            assert ([] if given is None else list(zip(*given, strict=True))) == right
            valid = [
                i
                for ids in trajectories.values()
                if len(ids) >= min_length
                for i in ids
                if ids[0] <= i + a and i + b - 1 <= ids[-1]
            ]
            located = spans.locate(spans.add_range(range_), np.array(valid, np.int64))
            assert list(zip(*located, strict=True)) == right
            other = int(rng.integers(-2, next_id + 3))
            if other not in valid:
                with pytest.raises(ValueError, match=f"id {other} "):
                    spans.locate(spans.add_range(range_), np.array([other]))


@pytest.mark.parametrize("seed", range(20))
def test_every_step_that_fits_has_one_number(seed: int) -> None:
    check_spans(seed)


@pytest.mark.slow
def test_every_step_that_fits_has_one_number_over_thousands_of_histories() -> None:
    for seed in range(3000):
        check_spans(1000 + seed)


# Against a slow, obvious model --------------------------------------------------------------

NAMES = st.sampled_from([None, "a", "b", "b"])
RANGES = {"any": (0, 1), "around": (-1, 3), "next": (1, 2)}


class Histories(RuleBasedStateMachine):
    """Whatever happens to a buffer, a list of steps with their trajectories tells the same."""

    named = False  # whether inserts tell lanes

    def __init__(self) -> None:
        super().__init__()
        self.store = self.fresh()
        self.rows: list[dict[str, Any]] = []
        self.began, self.value, self.next_id = 0, 0, 1
        # Of each lane, by its name and the number its items have, the trajectory that goes on.
        self.open: dict[tuple[Any, int], int] = {}

    def fresh(self) -> TrajectoryBuffer:
        store = buffer_of(min_trajectory_length=2)
        for name, range_ in RANGES.items():
            store.register_sample_config(name, SAMPLERS, sample_range=range_)
        return store

    def new(self, end: bool, priority: float, lane: tuple[Any, int] = (None, 0)) -> dict[str, Any]:
        self.value += 1
        if lane not in self.open:
            self.began += 1
            self.open[lane] = self.began
        row = {"id": self.next_id, "number": self.open[lane], "end": end, "p": priority}
        self.rows.append(row | {"x": self.value})
        self.next_id += 1
        if end:
            del self.open[lane]
        return item(self.value, end, priority)

    def stop(self, name: str | None) -> None:
        """Let nothing go on: of one name, or of all."""
        self.open = {} if name is None else {k: n for k, n in self.open.items() if k[0] != name}

    @rule(end=st.booleans(), priority=st.sampled_from([0.0, 0.0, 1.0, 2.5]), name=NAMES)
    def insert(self, end: bool, priority: float, name: str | None) -> None:
        name = name if self.named else None
        self.new(end, priority, (name, 0))
        self.store.insert(step(self.value, priority), end_of_trajectory=end, lane=name)

    @rule(
        steps=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0]), st.integers(0, 2)),
            max_size=60,
        ),
        columns=st.booleans(),
        name=NAMES,
        parted=st.booleans(),
        cut=st.integers(0, 100),
    )
    def batch_insert(
        self,
        steps: list[tuple[int, float, int]],
        columns: bool,
        name: str | None,
        parted: bool,
        cut: int,
    ) -> None:
        name = name if self.named else None
        parts = [part if parted and self.named else 0 for _, _, part in steps]
        items = []
        for i, (end, priority, _) in enumerate(steps):
            if i == cut:
                self.stop(name)
            items.append(self.new(end == 0, priority, (name, parts[i])))
        if not (columns or any(parts) or cut < len(items)):
            self.store.batch_insert(items, lane=name)
            return
        batch = Batch.of(items).cut([cut] if cut < len(items) else [])
        batch = batch.in_lanes(np.array(parts)) if any(parts) else batch
        self.store.batch_insert(batch, lane=name)

    @rule(name=NAMES)
    def end_trajectory(self, name: str | None) -> None:
        name = name if self.named else None
        number = self.open.pop((name, 0), None)
        if number is not None:
            [row for row in self.rows if row["number"] == number][-1]["end"] = True
        self.store.end_trajectory(name)

    @rule(name=NAMES)
    def interrupt(self, name: str | None) -> None:
        name = name if self.named else None
        self.stop(name)
        self.store.interrupt(name)

    @precondition(lambda self: len(self.rows) > 30)
    @rule(next_id=st.integers(1, 200))
    def reset(self, next_id: int) -> None:
        self.stop(None)
        self.rows.clear()
        self.next_id = next_id
        self.store.reset(next_id)

    @rule()
    def save_and_load(self) -> None:
        other = self.fresh()
        with tempfile.TemporaryDirectory() as directory:
            self.store.save(Path(directory) / "buffer")
            other.load(Path(directory) / "buffer")
        assert_same_samples(self.store, other, "any")
        self.store = other

    @rule(name=st.sampled_from(sorted(RANGES)))
    def sample(self, name: str) -> None:
        a, b = min(RANGES[name][0], 0), max(RANGES[name][1], 1)
        trajectories: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows[-CAPACITY:]:
            trajectories.setdefault(row["number"], []).append(row)
        places = {
            row["x"]: (rows, t)
            for rows in trajectories.values()
            for t, row in enumerate(rows)
            if len(rows) >= 2 and t + a >= 0 and t + b <= len(rows)
        }
        if not places:
            with pytest.raises(ValueError, match="no step can be sampled"):
                self.store.sample(name, 16)
            return
        data, mask = jax.tree.map(np.asarray, self.store.sample(name, 16))
        assert mask["x"].all()
        assert (data["o"]["v"] == data["x"][:, None]).all()
        assert (data["o"]["image"] == data["x"][:, None, None] % 251).all()
        for i, x in enumerate(data["x"]):
            assert x in places, "a step that doesn't fit was drawn"
            rows, t = places[x]
            xs = [row["x"] for row in rows]
            around = range(t - 2, t + 3)
            assert mask["around"][i].tolist() == [0 <= u < len(xs) for u in around]
            clipped = [xs[min(max(u, 0), len(xs) - 1)] for u in around]
            assert data["around"][i].tolist() == clipped
            assert (data["next"][i], mask["next"][i]) == (clipped[3], t + 1 < len(xs))
            is_last = t == len(xs) - 1
            for key, furthest in (("future", 3), ("far", CAPACITY)):
                assert mask[key][i] == (not is_last)
                later = xs[t + 1 : t + 1 + furthest]
                x = data[key][i] if key == "far" else data[key]["v"][i, 0]
                assert x in (xs[t:] if is_last else later)
            assert data["future"]["image"][i, 0, 0] == data["future"]["v"][i, 0] % 251
            drawn = [row["p"] for row in rows if row["x"] == data["priority"][i]]
            assert len(drawn) == 1, "a priority led to another trajectory"
            assert mask["priority"][i] == any(row["p"] for row in rows)
            assert not mask["priority"][i] or drawn[0] > 0

    @invariant()
    def holds_the_same_items(self) -> None:
        held = self.rows[-CAPACITY:]
        assert (self.store.latest_data_id(), len(self.store)) == (self.next_id - 1, len(held))
        lengths: dict[int, int] = {}
        for row in held:
            lengths[row["number"]] = lengths.get(row["number"], 0) + 1
        for number in self.open.values():
            lengths.pop(number, None)
        assert self.store.short_trajectories == sum(length < 2 for length in lengths.values())

    @rule(back=st.integers(0, CAPACITY))
    def read(self, back: int) -> None:
        held = self.rows[-CAPACITY:][-back:] if back else []
        batch = self.store.get_latest_data(max(self.next_id - 1 - back, 0))
        assert [item["x"] for item in batch] == [row["x"] for row in held]
        assert [item["end_of_trajectory"] for item in batch] == [row["end"] for row in held]


def assert_same_samples(one: TrajectoryBuffer, other: TrajectoryBuffer, name: str) -> None:
    """The next samples of both are the same, and so is their state."""
    for _ in range(2):
        try:
            expected = one.sample(name, 16)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)[:30]):
                other.sample(name, 16)
            return
        jax.tree.map(np.testing.assert_array_equal, expected, other.sample(name, 16))


LESS = settings(
    max_examples=25,
    stateful_step_count=25,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestHistories = Histories.TestCase
TestHistories.settings = LESS


class LanedHistories(Histories):
    """Those of several lanes, whose steps come by turns."""

    named = True


TestLanedHistories = LanedHistories.TestCase
TestLanedHistories.settings = LESS


class ManyHistories(Histories):
    """The same, for longer."""


class ManyLanedHistories(LanedHistories):
    """The same, for longer."""


MORE = settings(LESS, max_examples=3000, stateful_step_count=40)
TestManyHistories = pytest.mark.slow(pytest.mark.timeout(1800)(ManyHistories.TestCase))
TestManyHistories.settings = MORE
TestManyLanedHistories = pytest.mark.slow(pytest.mark.timeout(1800)(ManyLanedHistories.TestCase))
TestManyLanedHistories.settings = MORE


# Samplers -----------------------------------------------------------------------------------


def drawn(store: TrajectoryBuffer, sampler: Sampler, ids: Any, n: int = 1) -> Any:
    """What a sampler gives of x, and its mask, for these steps, n times each."""
    store.register_sample_config("it", {"x": sampler})
    ids = np.repeat(ids, n)
    data, mask = store.sample("it", len(ids), force_indices=ids)
    return np.asarray(data["x"]), np.asarray(mask["x"])


class TestSamplers:
    def test_uniform_over_the_steps_that_fit(self) -> None:
        store = buffer_of(1, 9, 2, 28, 5)  # of the second, 5 are left
        store.register_sample_config("it", {"x": LatestSampler()}, sample_range=(-1, 3))
        fit = [*range(7, 9), *range(14, 39), *range(42, 44)]
        draws = np.concatenate([store.sample("it", 5000)[0]["x"] for _ in range(4)])
        assert_distributed(draws, {float(i): 1.0 for i in fit})

    def test_a_sequence(self) -> None:
        data, mask = drawn(buffer_of(4, 5), SequenceSampler(-1, 3), [4, 5, 7])
        assert data.tolist() == [[3, 4, 4, 4], [5, 5, 6, 7], [6, 7, 8, 9]]
        assert mask.tolist() == [[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]

    def test_a_squeezed_sequence(self) -> None:
        data, mask = drawn(buffer_of(4, 5), SequenceSampler(2, 3, squeeze=True), [2, 3, 5])
        assert (data.tolist(), mask.tolist()) == ([4, 4, 7], [True, False, True])

    def test_burn_in(self) -> None:
        """Each step is learned from, with up to 4 of its trajectory before to warm up on."""
        store = buffer_of(9, 12)
        burn_in, learned = 4, 6
        store.register_sample_config(
            "r2d2",
            {
                "x": SequenceSampler(-burn_in, learned),
                "state": SequenceSampler(-burn_in, 1 - burn_in, squeeze=True, source="o/v"),
            },
            sample_range=(0, learned),
        )
        data, mask = store.sample("r2d2", 200)
        x, warm = np.asarray(data["x"]), np.asarray(mask["x"])[:, :burn_in]
        assert np.asarray(mask["x"])[:, burn_in:].all()
        first = x[:, burn_in]
        assert set(first) == {*range(1, 5), *range(10, 17)}
        begins = np.where(first < 10, 1, 10)
        assert (warm.sum(axis=1) == np.minimum(first - begins, burn_in)).all()
        assert (np.asarray(data["state"])[:, 0] == np.maximum(first - burn_in, begins)).all()
        # What is masked comes first, and stands for the trajectory's first step.
        assert (np.diff(warm.astype(int), axis=1) >= 0).all()
        assert (
            x == np.maximum(first[:, None] + np.arange(-burn_in, learned), begins[:, None])
        ).all()

    @pytest.mark.parametrize("most", [None, 5])
    def test_a_uniform_future(self, most: int | None) -> None:
        data, mask = drawn(buffer_of(3, 12), FutureSampler(max_future=most), [6], 5000)
        assert mask.all()
        assert_distributed(data, {float(7 + k): 1.0 for k in range(most or 9)})

    @pytest.mark.parametrize(("lambda_", "most"), [(0.01, None), (0.3, 5)])
    def test_an_exponential_future_is_truncated_not_clipped(
        self, lambda_: float, most: int | None
    ) -> None:
        sampler = FutureSampler("exponential", max_future=most, lambda_=lambda_)
        data, mask = drawn(buffer_of(3, 12), sampler, [6], 5000)
        assert mask.all()
        assert_distributed(data, {7.0 + k: math.exp(-lambda_ * k) for k in range(most or 9)})

    @pytest.mark.parametrize("distribution", ["uniform", "exponential"])
    def test_the_last_step_has_no_future(self, distribution: Any) -> None:
        data, mask = drawn(buffer_of(3, 5), FutureSampler(distribution), [3, 8])
        assert (data.tolist(), mask.tolist()) == ([3, 8], [False, False])

    @pytest.mark.parametrize("late", [False, True])
    def test_priorities(self, late: bool) -> None:
        """Registered before the steps come, or after; also where a trajectory lost its first."""
        rng = np.random.default_rng(0)
        priorities = np.where(rng.random(60) < 0.3, 0, rng.exponential(size=60)).astype(np.float32)
        priorities[30:45] = 0
        if late:
            store = buffer_of(15, 15, 15, 15, priorities=priorities)
        else:
            store = buffer_of()
            store.register_sample_config("it", {"x": PrioritySampler("p")})
            items = [item(i, i % 15 == 0, priorities[i - 1]) for i in range(1, 61)]
            store.insert(step(1, priorities[0]))
            store.batch_insert(items[1:20])
            store.batch_insert(items[20:])
        for ids in (range(21, 31), range(46, 61)):
            data, mask = drawn(store, PrioritySampler("p"), [ids[-1]], 5000)
            assert mask.all()
            assert_distributed(data, {float(i): float(priorities[i - 1]) for i in ids})
        data, mask = drawn(store, PrioritySampler("p"), [35], 5000)
        assert not mask.any()
        assert ((data > 30) & (data <= 45)).all()

    def test_one_priority_among_zeros_is_always_found(self) -> None:
        for place in (0, 5, 6):
            priorities = np.zeros(10)
            priorities[3 + place] = 1e-30
            store = buffer_of(3, 7, priorities=priorities)
            data, mask = drawn(store, PrioritySampler("p"), [4], 5000)
            assert mask.all()
            assert (data == 4 + place).all()

    def test_large_priorities_drown_none_of_another_trajectory(self) -> None:
        priorities = [1e30, 1e30, 1.0, 2.0, 3.0, 4.0]
        one_by_one, at_once = buffer_of(), buffer_of()
        for store in (one_by_one, at_once):
            store.register_sample_config("it", {"x": PrioritySampler("p")})
        rows = [item(i + 1, i in (1, 5), p) for i, p in enumerate(priorities)]
        for row in rows:
            one_by_one.batch_insert([row])
        at_once.batch_insert(rows)
        for store in (one_by_one, at_once, buffer_of(2, 4, priorities=priorities)):
            data, _ = drawn(store, PrioritySampler("p"), [5], 5000)
            assert_distributed(data, {3.0: 1.0, 4.0: 2.0, 5.0: 3.0, 6.0: 4.0})

    def test_what_an_endless_trajectory_has_lost_drowns_none(self) -> None:
        store = buffer_of()
        store.register_sample_config("it", {"x": PrioritySampler("p")})
        for i in range(1, 2 * CAPACITY + 10):
            store.insert(step(i, 1e9 if i == 1 else 1.0))
        data, mask = drawn(store, PrioritySampler("p"), [2 * CAPACITY], 5000)
        assert mask.all()
        held = range(CAPACITY + 10, 2 * CAPACITY + 10)
        assert_distributed(data, {float(i): 1.0 for i in held})

    @pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, 3e38])
    def test_what_can_be_no_priority_is_refused(self, wrong: float) -> None:
        store = buffer_of(3, priorities=[0, 3e38, 1])
        store.register_sample_config("it", {"x": PrioritySampler("p")})
        with pytest.raises(ValueError, match="p is a priority"):
            store.batch_insert([item(4, p=1e38), item(5, p=wrong)])
        assert store.latest_data_id() == 3
        with pytest.raises(ValueError, match="one real number"):
            store.register_sample_config("it", {"x": PrioritySampler("o/v")})
        store = buffer_of(2, priorities=[1, wrong if wrong < 0 else math.nan])
        with pytest.raises(ValueError, match="p is a priority"):
            store.register_sample_config("it", {"x": PrioritySampler("p")})

    def test_one_of_your_own(self) -> None:
        @dataclass(frozen=True)
        class FirstAbove(Sampler):
            """The trajectory's first step if it is odd."""

            source: str | None = None

            def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
                first = jnp.zeros_like(steps.position)
                return jnp.where(steps.read("x", first) % 2 == 1, first, -5)

        data, mask = drawn(buffer_of(4, 5, 3), FirstAbove(), [3, 7, 12])
        assert (data.tolist(), mask.tolist()) == ([1, 5, 10], [True, True, False])

    def test_a_transform(self) -> None:
        def relabel(data: Any, mask: Any) -> Any:
            reached = data["x"] == data["goal"]
            return {"rewards": reached * 1.0, "x": data["x"]}, mask["goal"]

        store = buffer_of(6)
        samplers = {"x": LatestSampler(), "goal": SequenceSampler(1, 2, True, "x")}
        store.register_sample_config("it", samplers, transform=relabel)
        data, mask = store.sample("it", 2, force_indices=[2, 6])
        assert (data["rewards"].tolist(), mask.tolist()) == ([0, 1], [True, False])

    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (lambda: SequenceSampler(2, 2), "no steps"),
            (lambda: SequenceSampler(0, 2, squeeze=True), "one step"),
            (lambda: FutureSampler("normal"), "uniform"),  # type: ignore[arg-type]
            (lambda: FutureSampler(max_future=0), "max_future"),
            (lambda: FutureSampler(lambda_=0.0), "lambda_"),
        ],
    )
    def test_senseless_samplers_are_refused(self, make: Callable[[], Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            make()


# Buffers ------------------------------------------------------------------------------------


class TestBuffer:
    def test_seeds_repeat_samples(self) -> None:
        stores = [buffer_of(30, 30, seed=seed) for seed in (1, 1, 2)]
        for store in stores:
            store.register_sample_config("it", SAMPLERS)
        one, same, other = (jax.tree.map(np.ndarray.tolist, np_sample(s)) for s in stores)
        assert one == same
        for key in ("x", "far", "priority"):
            assert one[key] != other[key]
        assert np_sample(stores[0])["x"].tolist() != one["x"], "the same batch twice"
        goals = [stores[0].sample("it", 16, force_indices=[45] * 16)[0]["far"] for _ in range(2)]
        assert goals[0].tolist() != goals[1].tolist()

    def test_steps_can_be_sampled_at_once(self) -> None:
        store = buffer_of(min_trajectory_length=3)
        store.register_sample_config("it", {"x": LatestSampler()})
        for i in range(1, 4):
            with pytest.raises(ValueError, match=f"{i - 1} are held"):
                store.sample("it", 1)
            store.insert(step(i))
        assert set(np_sample(store)["x"]) == {1, 2, 3}

    def test_short_trajectories_are_counted(self) -> None:
        store = buffer_of(1, 5, 2, 1, 2, min_trajectory_length=3)
        assert store.short_trajectories == 4
        store.insert(step(9))
        assert store.short_trajectories == 4, "one that goes on may yet be long enough"
        store.register_sample_config("it", {"x": LatestSampler()})
        assert set(np_sample(store)["x"]) == {2, 3, 4, 5, 6}

    def test_forced_ids(self) -> None:
        store = buffer_of(1, 5, 37)
        store.register_sample_config("it", {"x": LatestSampler()}, sample_range=(0, 2))
        data, _ = store.sample("it", 3, force_indices=[42, 4, 4])
        assert data["x"].tolist() == [42, 4, 4]
        for wrong, text in [(3, "not held"), (44, "not held"), (43, "can't"), (6, "can't")]:
            with pytest.raises(ValueError, match=f"id {wrong} .*{text}|id {wrong} is {text}"):
                store.sample("it", 2, force_indices=[10, wrong])
        for ids in ([4], [4.0, 5.0], [[4, 5]]):
            with pytest.raises(ValueError, match="expected 2 ids"):
                store.sample("it", 2, force_indices=ids)

    def test_what_was_sampled_stays_while_the_arrays_are_donated(self) -> None:
        store = buffer_of(30, 30)
        store.register_sample_config("it", SAMPLERS)
        sampled, read = store.sample("it", 16), store.get_latest_data(0)
        copies = jax.tree.map(np.array, (sampled, read.columns))
        for i in range(200):
            store.insert(step(1000 + i))
            if i % 7 == 0:
                store.sample("it", 16)
        jax.tree.map(np.testing.assert_array_equal, (sampled, read.columns), copies)

    def test_staged_memory_is_not_used_again(self) -> None:
        """Rows that JAX may still be reading, or hold as they are, are not written over."""
        n = 40_000  # large enough for a copy to take a while
        store = TrajectoryBuffer(64, [DataShape("x", (n,))])
        store.register_sample_config("it", {"x": LatestSampler()})
        for i in range(200):
            store.insert({"x": np.full(n, i, np.float32)})
        rows = store.get_latest_data(0).columns["x"]
        assert (rows == np.arange(136, 200)[:, None]).all()

    @pytest.mark.parametrize("n", [1, 3])
    def test_an_insert_that_is_interrupted_is_none(
        self, n: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(*_: Any) -> None:
            raise KeyboardInterrupt

        store = buffer_of(CAPACITY - 1)
        i = CAPACITY - 1
        with monkeypatch.context() as patched:
            compiled = device._compile()._replace(write=write)
            patched.setattr(device, "_compile", lambda: compiled)
            with suppress(KeyboardInterrupt):
                while i < 3 * CAPACITY:
                    store.batch_insert([item(i + k, True) for k in range(1, n + 1)])
                    i += n
        assert store.latest_data_id() == i < 3 * CAPACITY
        store.batch_insert([item(i + k, True) for k in range(1, n + 1)])
        held = [each["x"] for each in store.get_latest_data(0)]
        assert held == [*range(i + n - CAPACITY + 1, i + n + 1)]

    def test_threads(self) -> None:
        store = TrajectoryBufferDataStore(CAPACITY, SHAPES)
        store.register_sample_config("it", SAMPLERS)
        store.batch_insert([item(i, i % 10 == 0) for i in range(1, 21)])
        stop = threading.Event()

        def write() -> None:
            i = 20
            while not stop.is_set():
                i += 1
                if i % 3:
                    store.insert(item(i, i % 10 == 0))
                else:
                    store.batch_insert([item(i, i % 10 == 0), item(i + 1, (i + 1) % 10 == 0)])
                    i += 1

        def check() -> None:
            for _ in range(150):
                data, mask = jax.tree.map(np.asarray, store.sample("it", 16))
                x, around, real = data["x"][:, None], data["around"], mask["around"]
                assert (data["o"]["v"] == x).all()
                assert (data["o"]["image"][:, 0] == x % 251).all()
                # Ten steps a trajectory, and consecutive where they are real.
                assert ((around - 1) // 10 == (x - 1) // 10).all()
                assert (around[real] == (x + np.arange(-2, 3))[real]).all()

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(3) as pool:
                writer = pool.submit(write)
                readers = [pool.submit(check) for _ in range(2)]
                try:
                    for reader in readers:
                        reader.result(timeout=60)
                finally:
                    stop.set()
                writer.result(timeout=10)
        finally:
            sys.setswitchinterval(interval)

    def test_save_and_load_restore_all(self, tmp_path: Path) -> None:
        store = buffer_of(13, 30)
        store.register_sample_config("it", SAMPLERS)
        store.sample("it", 16)
        for i in range(9):  # of a trajectory that goes on, and not all of them written yet
            store.insert(step(44 + i, i % 3))
        store.save(tmp_path / "buffer")
        other = buffer_of(3, seed=9)
        other.register_sample_config("it", SAMPLERS)
        other.load(tmp_path / "buffer")
        assert (other.latest_data_id(), len(other)) == (52, CAPACITY)
        for buffer in (store, other):
            buffer.insert(step(53))
        assert_same_samples(store, other, "it")
        items, same = store.get_latest_data(0).columns, other.get_latest_data(0).columns
        jax.tree.map(np.testing.assert_array_equal, items, same)
        data, mask = drawn(other, SequenceSampler(1, 2, True), [52, 43])
        assert (data.tolist(), mask.tolist()) == ([53, 43], [True, False])
        wrong = TrajectoryBuffer(CAPACITY, [DataShape("x")])
        with pytest.raises(ValueError, match="expected a dict"):
            wrong.load(tmp_path / "buffer")
        (tmp_path / "torn").write_bytes((tmp_path / "buffer").read_bytes()[:-50])
        with pytest.raises(Malformed):
            other.load(tmp_path / "torn")
        assert other.latest_data_id() == 53, "a file that is refused changes nothing"

    def test_an_interruption_survives_a_checkpoint(self, tmp_path: Path) -> None:
        store = buffer_of()
        rows = [item(i) for i in range(1, 9)]
        store.batch_insert(rows[:3])
        store.interrupt()
        store.batch_insert(rows[3:5])
        store.interrupt()
        store.save(tmp_path / "buffer")
        other = buffer_of()
        other.load(tmp_path / "buffer")
        other.batch_insert(rows[5:])
        assert not any(row["end_of_trajectory"] for row in other.get_latest_data(0))
        data, _ = drawn(other, SequenceSampler(-9, 10), [1, 4, 6])
        assert data[:, [0, -1]].tolist() == [[1, 3], [4, 5], [6, 8]]

    def test_loading_logs_nothing(self, tmp_path: Path) -> None:
        logged: list[Any] = []
        store = TrajectoryBufferDataStore(CAPACITY, SHAPES)
        store.batch_insert([item(1), item(2)])
        store.interrupt()
        store.save(tmp_path / "buffer")
        other = TrajectoryBufferDataStore(
            CAPACITY, SHAPES, rlds_logger=lambda *arguments: logged.append(arguments)
        )
        other.load(tmp_path / "buffer")
        assert (len(other), logged) == (2, [])
        other.insert(item(3))
        assert other.get_latest_data(0).cuts == (2,)

    def test_ending_late_warns_once_who_has_the_last_step(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = buffer_of(2)
        store.end_trajectory()
        store.insert(step(3))
        store.end_trajectory()
        assert not caplog.records
        for i in range(2):
            store.insert(step(4 + i))
            store.get_latest_data(0)
            with caplog.at_level(logging.WARNING):
                store.end_trajectory()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        ends = store.get_latest_data(0).columns["end_of_trajectory"]
        assert ends.tolist() == [False, True, True, True, True]

    def test_dtypes_are_kept(self) -> None:
        dtypes = ["float32", np.float16, "int8", np.uint32, np.dtype(bool), ml_dtypes.bfloat16]
        store = TrajectoryBuffer(8, [DataShape(f"{i}", (2,), d) for i, d in enumerate(dtypes)])
        for _ in range(2):
            store.insert({f"{i}": np.ones(2, dtype) for i, dtype in enumerate(dtypes)})
        store.register_sample_config("it", {f"{i}": LatestSampler() for i in range(len(dtypes))})
        data, _ = store.sample("it", 2)
        read = store.get_latest_data(0).columns
        for i, dtype in enumerate(dtypes):
            assert data[f"{i}"].dtype == read[f"{i}"].dtype == dtype
            assert (data[f"{i}"] == 1).all()

    @pytest.mark.parametrize("dtype", [np.float64, "int64", np.uint64, np.complex128])
    def test_64_bits_are_refused_while_jax_keeps_32(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"x would lose half .*jax_enable_x64"):
            TrajectoryBuffer(8, [DataShape("x", (), dtype)])

    @pytest.mark.slow
    def test_64_bits_are_kept_where_jax_keeps_them(self) -> None:
        program = (
            "import jax; jax.config.update('jax_enable_x64', True)\n"
            "from edgeml.data import *\n"
            "b = TrajectoryBuffer(8, [DataShape('x', (), 'float64'), DataShape('p')])\n"
            "b.register_sample_config('it', {'x': LatestSampler(), 's': SequenceSampler(-1, 2, "
            "source='x'), 'f': FutureSampler(source='x'), 'e': FutureSampler('exponential', "
            "source='x'), 'p': PrioritySampler('p', source='x')})\n"
            "for i in range(20): b.insert({'x': i + 1e-12, 'p': 1.0})\n"
            "data, mask = b.sample('it', 64)\n"
            "assert all(v.dtype == 'float64' and (v != v.round()).any() for v in data.values())\n"
            "assert b.get_latest_data(19)[0]['x'] == 19 + 1e-12\n"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=100)

    @pytest.mark.parametrize(
        "names", [["x", "x"], ["a", "a/b"], ["a/b", "a"], ["end_of_trajectory"], []]
    )
    def test_names_that_cannot_be(self, names: list[str]) -> None:
        with pytest.raises(ValueError, match=r"name|nothing"):
            TrajectoryBuffer(8, [DataShape(name) for name in names])

    def test_senseless_arguments_are_refused(self) -> None:
        for options in ({"min_trajectory_length": 0}, {"capacity": 1 << 31}, {"capacity": 0}):
            with pytest.raises(ValueError, match=r"at (least|most)"):
                TrajectoryBuffer(**{"capacity": 8, "data_shapes": SHAPES} | options)
        store = buffer_of(5)
        with pytest.raises(ValueError, match="no data 'y'; there is"):
            store.register_sample_config("it", {"x": LatestSampler("y")})
        with pytest.raises(ValueError, match="no steps"):
            store.register_sample_config("it", {"x": LatestSampler()}, sample_range=(1, 1))
        with pytest.raises(ValueError, match="without a sampler"):
            store.register_sample_config("it", {})
        with pytest.raises(ValueError, match="no sample config 'it'"):
            store.sample("it", 1)
        store.register_sample_config("it", {"x": LatestSampler()})
        with pytest.raises(ValueError, match="batch_size"):
            store.sample("it", 0)

    @pytest.mark.parametrize(
        ("wrong", "text"),
        [
            (item(4), "is an argument here"),
            ({"x": 1.0}, "expected a dict of"),
            (5, "expected a dict of"),
            ({"o": {"v": np.zeros(3), "image": np.zeros((2, 2), int)}, "x": 1, "p": 1}, "'v'"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, wrong: Any, text: str) -> None:
        store = buffer_of(3)
        with pytest.raises(ValueError, match=text):
            store.insert(wrong)
        with pytest.raises(ValueError, match="expected"):
            store.batch_insert([item(4), step(5) if text.startswith("is") else wrong])
        assert store.latest_data_id() == 3

    def test_a_data_store_wants_to_be_told_of_ends(self) -> None:
        store = TrajectoryBufferDataStore(8, SHAPES)
        with pytest.raises(ValueError, match="end_of_trajectory"):
            store.insert(step(1))
        store.insert(step(1), end_of_trajectory=True)
        assert store.get_latest_data(0)[0]["end_of_trajectory"]

    def test_a_device_can_be_chosen(self) -> None:
        device = jax.devices()[-1]
        store = buffer_of(5, device=device)
        store.register_sample_config("it", {"x": LatestSampler()})
        assert store.sample("it", 4)[0]["x"].devices() == {device}

    def test_without_jax_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jax", None)
        monkeypatch.setitem(sys.modules, "jax.numpy", None)
        with pytest.raises(ImportError, match=r'pip install "edgeml-robotics\[jax\]"'):
            TrajectoryBuffer(8, SHAPES)

    def test_importing_loads_no_jax(self) -> None:
        program = (
            "import sys, edgeml.data.trajectory, edgeml.data.samplers; "
            "assert not {'jax', 'gymnasium'} & sys.modules.keys()"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def np_sample(store: TrajectoryBuffer) -> Any:
    return jax.tree.map(np.asarray, store.sample("it", 16)[0])


class TestDefaultBuffer:
    def test_nested_spaces_and_64_bits(self) -> None:
        spaces = gym.spaces
        observations = spaces.Dict(
            {
                "state": spaces.Box(-1, 1, (3,), np.float64),
                "cams": spaces.Dict({"wrist": spaces.Box(0, 255, (4, 4, 3), np.uint8)}),
                "mode": spaces.Discrete(5),
            }
        )
        store = make_default_trajectory_buffer(observations, spaces.Box(-1, 1, (2,)), 50)
        items = [
            {
                "observations": observations.sample(),
                "next_observations": observations.sample(),
                "actions": np.full(2, i, np.float32),
                "rewards": float(i),
                "masks": 1.0 - (i == 3),
                "end_of_trajectory": i == 3,
            }
            for i in range(4)
        ]
        store.insert(items[3])  # a trajectory of one step is sampled too
        store.batch_insert(items)
        data, mask = store.sample("training", 200)
        assert data.keys() == items[0].keys() - {"end_of_trajectory"}
        assert all(np.asarray(each).all() for each in mask.values())
        assert set(np.asarray(data["rewards"])) == {0, 1, 2, 3}
        data = jax.tree.map(np.asarray, data)
        for i in range(200):
            row = dict(items[int(data["rewards"][i])])
            del row["end_of_trajectory"]
            jax.tree.map(
                lambda column, value, i=i: np.testing.assert_allclose(column[i], value, 1e-6),
                data,
                row,
            )
        assert data["observations"]["state"].dtype == np.float32
        assert data["observations"]["mode"].dtype == np.int32

    @pytest.mark.parametrize(
        "space",
        [
            gym.spaces.Text(5),
            gym.spaces.Tuple([gym.spaces.Discrete(2)]),
            gym.spaces.Dict({"a/b": gym.spaces.Discrete(2)}),
            None,
        ],
    )
    def test_other_spaces_are_refused(self, space: Any) -> None:
        with pytest.raises(TypeError, match="observations"):
            make_default_trajectory_buffer(space, gym.spaces.Discrete(2), 10)

    @pytest.mark.parametrize("way", ["one by one", "at once", "loaded"])
    def test_no_trajectory_goes_on_in_another_environment(
        self, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where an observation is not what the step before led to, it is another's."""
        space = gym.spaces.Dict(at=gym.spaces.Box(-9, 999, (2,)), n=gym.spaces.Discrete(9))
        store = make_default_trajectory_buffer(space, gym.spaces.Discrete(9), 100)
        runs = [(0, 3), (1, 1), (0, 1), (1, 4)]  # of which environment, and how many steps
        items, at = [], [0, 0]
        for env, n in runs:
            for _ in range(n):
                here, at[env] = at[env], at[env] + 1
                items.append(
                    {
                        "observations": {"at": np.array([env, here], np.float32), "n": 0},
                        "next_observations": {"at": np.array([env, here + 1], np.float32), "n": 0},
                        "actions": 0,
                        "rewards": 0.0,
                        "masks": 1.0,
                        "end_of_trajectory": False,
                    }
                )
        if way == "one by one":
            for each in items:
                store.insert(each)
        else:
            store.batch_insert(items[:4])
            store.batch_insert(items[4:])
        if way == "loaded":
            store.save(tmp_path / "saved")
            store = make_default_trajectory_buffer(space, gym.spaces.Discrete(9), 100)
            store.load(tmp_path / "saved")
        store.register_sample_config("all", {"observations": SequenceSampler(0, 9)})
        data, mask = store.sample("all", 9, force_indices=np.arange(1, 10))
        lengths = np.asarray(mask["observations"]).sum(axis=1)
        assert lengths.tolist() == [left for _, n in runs for left in range(n, 0, -1)]
        seen = np.asarray(data["observations"]["at"][:, :, 0])
        assert all(len(set(row[:n])) == 1 for row, n in zip(seen, lengths, strict=True))
        assert store.breaks == 3
        assert len([r for r in caplog.records if "with a lane= of its own" in r.message]) >= 1

    def test_what_is_inserted_is_logged(self) -> None:
        logged: list[Any] = []
        store = TrajectoryBufferDataStore(
            10, SHAPES, rlds_logger=lambda row, end: logged.append((row, end))
        )
        first = item(1)
        store.insert(first)
        first["o"]["v"][:] = 9
        store.batch_insert([item(2), item(3, True)])
        with pytest.raises(ValueError, match="expected"):
            store.batch_insert([item(4), {}])
        store.interrupt()  # nothing goes on
        store.insert(item(4), end_of_trajectory=True)
        store.insert(item(5))
        store.interrupt()
        store.insert(item(6))
        store.end_trajectory()
        store.insert(item(7))
        store.reset()
        steps = [(row and row["x"], end) for row, end in logged]
        assert steps == [
            (1, False),
            (2, False),
            (3, True),
            (4, True),
            (5, False),
            (None, True),
            (6, False),
            (None, True),
            (7, False),
            (None, True),
        ]
        assert logged[0][0]["o"]["v"].tolist() == [1, 1]
        assert logged[2][0]["end_of_trajectory"]
        assert store.latest_data_id() == 7
