"""How many replicas there are to be, played through with a clock that is a number."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from edgeml.ray import Autoscale
from edgeml.ray.scaling import Scaling


def play(bounds: Autoscale, load, seconds: float, wanted: int = 1) -> list[int]:
    """How many there were at each look, four a second, under ``load(n)``: waiting, running."""
    scaling, there = Scaling(bounds), []
    for look in range(int(4 * seconds)):
        wanted = scaling.decide(wanted, wanted, *load(wanted), look / 4)
        there.append(wanted)
    return there


def test_looks_may_be_at_any_time():
    chance, scaling, wanted, now = random.Random(7), Scaling(Autoscale(1, 8)), 4, 0.0
    while wanted > 1:
        now += chance.uniform(0.2, 1.5)
        wanted = scaling.decide(wanted, wanted, 0, 0, now)
        assert now < 3 * 33


def closed(clients: int):
    """So many clients, each of which always has one call."""
    return lambda n: (max(0, clients - n), min(clients, n))


def open_loop(erlangs: float, seed: int = 7):
    """Poisson's arrivals at a common queue, by what is there in the steady state (M/M/1 each)."""
    chance = random.Random(seed)

    def load(n: int) -> tuple[int, int]:
        busy = min(erlangs / n, 0.999)
        waiting = running = 0
        for _ in range(n):
            there = int(math.log(1 - chance.random()) / math.log(busy))
            running += there > 0
            waiting += max(0, there - 1)
        return waiting, running

    return load


def test_nothing_to_do_leaves_the_least():
    assert set(play(Autoscale(2, 5), lambda n: (0, 0), 100, wanted=2)) == {2}


def test_more_are_started_once_too_many_have_waited_for_long_enough():
    there = play(Autoscale(1, 8, waiting=1.0, up_after=2.0), closed(8), 20)
    assert there[:8] == [1] * 8
    assert there[8] == 4  # which have one call each, and one that waits
    assert set(there[8:]) == {4}


def test_there_are_at_most_as_many_as_there_may_be():
    assert play(Autoscale(1, 3, waiting=1.0), closed(100), 20)[-1] == 3


def test_a_burst_starts_nothing():
    calls = iter([50] * 4 + [0] * 400)
    assert set(play(Autoscale(1, 8, waiting=10.0), lambda n: (next(calls), 1), 100)) == {1}


def test_they_are_ended_one_by_one_where_there_is_little_to_do():
    there = play(Autoscale(1, 8, down_after=10.0), lambda n: (0, 0), 100, wanted=4)
    assert [there.count(n) for n in (4, 3, 2)] == [40, 41, 41]
    assert there[-1] == 1


def test_those_that_just_keep_up_stay():
    assert set(play(Autoscale(1, 8), lambda n: (0, n), 600, wanted=4)) == {4}


@pytest.mark.parametrize("erlangs", [0.3, 1.5, 2.5, 4.5])
def test_a_steady_load_ends_in_a_number_that_stays(erlangs):
    there = play(Autoscale(1, 16), open_loop(erlangs), 1200)
    late = there[len(there) // 2 :]
    changes = sum(a != b for a, b in itertools.pairwise(late))
    assert changes <= 4, "in ten minutes"
    assert erlangs < min(late)
    assert max(late) <= 2 * erlangs + 2


def test_bounds_that_were_changed_hold_at_once():
    assert Scaling(Autoscale(2, 3)).decide(8, 8, 0, 8, 0.0) == 3
    assert Scaling(Autoscale(2, 3)).decide(1, 1, 0, 0, 0.0) == 2


def test_nothing_is_decided_while_what_was_decided_is_not_so():
    scaling = Scaling(Autoscale(1, 8, up_after=1.0))
    for look in range(100):
        assert scaling.decide(2, 1, 100, 1, look / 4) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 0},
        {"least": 3, "most": 2},
        {"waiting": 0},
        {"up_after": 0},
        {"down_after": -1},
    ],
)
def test_bounds_that_can_not_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"least|waiting|after"):
        Autoscale(**wrong)
