"""The sum tree against running sums over a plain array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml.data.sumtree import SumTree

# Around the sizes of a node and of the top level, and of two and three levels.
CAPACITIES = [1, 2, 15, 16, 17, 300, 4096, 4097, 65_536, 65_537, 70_001]


def check(tree: SumTree, values: np.ndarray) -> None:
    """Compare everything that can be read; the values are whole numbers, so sums are exact."""
    every = np.arange(len(values))
    assert np.array_equal(tree.get(every), values)
    ends = values.cumsum()
    assert tree.total == ends[-1]
    positive = np.flatnonzero(values)
    assert tree.smallest == (values[positive].min() if len(positive) else math.inf)
    if len(positive):
        assert np.array_equal(tree.find((ends - values)[positive]), positive)
        assert np.array_equal(tree.find(ends[positive] - 0.5), positive)
        assert tree.find([ends[-1], np.inf]).tolist() == [positive[-1]] * 2


whole = st.integers(0, 1000).map(float)


@settings(max_examples=150)
@given(st.data())
def test_as_an_array_with_running_sums(data: st.DataObject) -> None:
    capacity = data.draw(st.sampled_from(CAPACITIES))
    tree, values = SumTree(capacity), np.zeros(capacity)
    leaf = st.integers(0, capacity - 1) | st.integers(max(0, capacity - 20), capacity - 1)
    assert len(tree) == capacity
    for step in data.draw(st.lists(st.sampled_from(["set", "range", "check"]), max_size=12)):
        if step == "check":
            check(tree, values)
        elif step == "set":
            index = data.draw(st.lists(leaf, max_size=8))  # the same leaf twice among them
            value = data.draw(st.lists(whole, min_size=len(index), max_size=len(index)) | whole)
            tree.set(np.array(index, np.int64), np.array(value))
            pairs = zip(index, value if isinstance(value, list) else [value] * 8, strict=False)
            for i, one in pairs:
                values[i] = one
        else:
            start, stop = sorted((data.draw(leaf), data.draw(leaf) + 1))
            single = data.draw(whole)
            run = (np.arange(stop - start) * 7 + single) % 5
            value = data.draw(st.sampled_from([single, run]))
            tree.set_range(start, stop, value)
            values[start:stop] = value
    check(tree, values)


def test_ranges_one_after_another_round_a_ring() -> None:
    tree, values = SumTree(5000), np.zeros(5000)
    tree.set_range(0, 5000, 1.0)
    values[:] = 1
    assert tree.total == 5000
    for i in [*range(4990, 5000), *range(20), 300, 200, 199, 201]:
        tree.set_range(i, i + 1, float(i % 3))
        values[i] = i % 3
    tree.set_range(2500, 2500, 9.0)  # empty
    check(tree, values)


@pytest.mark.parametrize("capacity", [1, 100, 5000, 70_001])
def test_no_leaf_of_value_0_is_found_in_spite_of_rounding(capacity: int) -> None:
    rng = np.random.default_rng(0)
    for spread in [0, 3, 12, 300]:
        values = 10.0 ** rng.uniform(-spread, min(spread, 290), capacity)
        values[rng.random(capacity) < 0.7] = 0
        values[rng.integers(capacity)] = 1
        tree = SumTree(capacity)
        tree.set_range(0, capacity, values)
        ends = values.cumsum()
        edges = np.concatenate([ends, np.nextafter(ends, 0), np.nextafter(ends, np.inf)])
        edges = np.append(edges, [tree.total, np.nextafter(tree.total, 0), 1e309, 0, 5e-324])
        found = tree.find(edges)
        assert (values[found] > 0).all()
        # and it is the right one
        slack = 1e-10 * ends[-1]
        mass = np.minimum(edges, ends[-1])
        assert (ends[found] >= mass - slack).all()
        assert ((ends - values)[found] <= mass + slack).all()


def test_sums_of_one_node_may_be_rounded_in_another_way_than_of_many() -> None:
    # numpy adds a single column up in another order.
    rng = np.random.default_rng(3)
    tree = SumTree(70_000)
    for _ in range(300):
        tree.set_range(1, 16, rng.random(15))  # leaf 0, of the same node, stays 0
        tree.set([rng.integers(1, 16)], rng.random())
        assert tree.find([np.nextafter(tree.total, 0)])[0] > 0


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e303])
def test_smallest_and_largest_numbers(value: float) -> None:
    tree = SumTree(70_000)
    tree.set(np.array([3, 69_999]), value)
    assert (tree.total, tree.smallest) == (2 * value, value)
    assert tree.find([0.0, value, 2 * value]).tolist() == [3, 69_999, 69_999]


def test_found_in_proportion_to_value() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(70_000) * (rng.random(70_000) < 0.01)
    tree = SumTree(70_000)
    tree.set(rng.permutation(70_000), 123.0)
    tree.set(np.arange(70_000), values)
    draws = 300_000
    counts = np.bincount(tree.find(rng.random(draws) * tree.total), minlength=70_000)
    assert not counts[values == 0].any()
    expected = draws * values / values.sum()
    often = expected > 5
    degrees = often.sum()
    assert degrees > 500
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_no_rounding_errors_add_up() -> None:
    rng = np.random.default_rng(2)
    values = rng.random(5000)
    used, fresh = SumTree(5000), SumTree(5000)
    for scale in [1e15, 1e-15, 1e8, 1.0]:
        for _ in range(20):
            used.set(rng.integers(5000, size=500), rng.random(500) * scale)
    order = rng.permutation(5000)
    used.set(order, values[order])
    fresh.set_range(0, 5000, values)
    assert used.total == pytest.approx(fresh.total, rel=1e-12)
    masses = rng.random(1000) * fresh.total
    assert np.array_equal(used.find(masses), fresh.find(masses))


@pytest.mark.parametrize("capacity", [1, 16, 70_000])
def test_empty(capacity: int) -> None:
    tree = SumTree(capacity)
    assert (tree.total, tree.smallest) == (0, math.inf)
    with pytest.raises(ValueError, match="all 0"):
        tree.find([0.0])
    none = np.empty(0, np.int64)
    tree.set(none, 1.0)
    tree.set(none, np.empty(0))
    assert tree.total == 0
    tree.set([0], 2)
    assert tree.find(np.empty(0)).shape == tree.get(none).shape == (0,)
    assert tree.find([0.0]).dtype == np.int64
    tree.set([0], 0)
    assert (tree.total, tree.smallest) == (0, math.inf)


def test_masses_are_not_written_to() -> None:
    tree = SumTree(5000)
    tree.set_range(0, 5000, 1.0)
    masses = np.linspace(0, 5000, 100)
    tree.find(masses)
    assert np.array_equal(masses, np.linspace(0, 5000, 100))


Act = Callable[[SumTree], Any]


@pytest.mark.parametrize("value", [-1.0, -5e-324, math.nan, math.inf, 1e308])
@pytest.mark.parametrize(
    "act",
    [
        lambda tree, value: tree.set([1], value),
        lambda tree, value: tree.set([0, 1], np.array([1.0, value])),
        lambda tree, value: tree.set_range(0, 1, value),
        lambda tree, value: tree.set_range(0, 2, np.array([1.0, value])),
    ],
)
def test_refuses_values(act: Callable[[SumTree, float], None], value: float) -> None:
    tree = SumTree(17)
    tree.set_range(0, 17, 3.0)
    with pytest.raises(ValueError, match="a value must be from 0"):
        act(tree, value)
    check(tree, np.full(17, 3.0))


@pytest.mark.parametrize(
    ("error", "act"),
    [
        (IndexError, lambda tree: tree.get([17])),
        (IndexError, lambda tree: tree.get([0, -1])),
        (IndexError, lambda tree: tree.set([0, 17], 1.0)),
        (IndexError, lambda tree: tree.set([-1], 1.0)),
        (IndexError, lambda tree: tree.set_range(-1, 1, 1.0)),
        (IndexError, lambda tree: tree.set_range(5, 4, 1.0)),
        (IndexError, lambda tree: tree.set_range(5, 18, 1.0)),
        (ValueError, lambda tree: tree.set([0, 1], [1.0, 2.0, 3.0])),
        (ValueError, lambda tree: tree.set_range(0, 2, [1.0, 2.0, 3.0])),
        (ValueError, lambda tree: tree.find([0.0, -1.0])),
        (ValueError, lambda tree: tree.find([math.nan])),
        (ValueError, lambda tree: SumTree(0)),
    ],
)
def test_errors(error: type[Exception], act: Act) -> None:
    tree = SumTree(17)
    tree.set_range(0, 17, 3.0)
    with pytest.raises(error):
        act(tree)
    check(tree, np.full(17, 3.0))
