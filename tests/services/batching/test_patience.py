"""When a batch waits: the rule alone, with costs and clients made up, on a clock that is set."""

from __future__ import annotations

import pytest

from edgeml.core.dispatch import Caller
from edgeml.core.transport import Peer
from edgeml.services.batching import patience as module
from edgeml.services.batching.patience import Costs, Patience


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def crowd(number):
    return [Caller(f"c{i}", "", Peer(str(i), "here")) for i in range(number)]


def taught(clock, callers, cost, pace=0.001):
    """Patience that has seen these clients come back within a pace."""
    made = Patience(cost)
    for _ in range(2):
        made.decide(callers, 0, len(callers))
        for caller in callers:
            clock.now += pace / len(callers)
            made.arrive(caller, clock.now)
    return made


def fixed(rows):
    return 0.02 if rows else 0.0


def linear(rows):
    return 0.001 * rows


def test_where_a_batch_costs_the_same_at_any_size_all_are_waited_for(clock):
    callers = crowd(32)
    patience = taught(clock, callers, fixed)
    patience.decide(callers, 0, 32)
    assert patience.wanted == 32
    assert clock.now < patience.until < clock.now + 0.02
    patience.decide(callers[:16], 16, 32)
    assert patience.wanted == 32
    patience.decide(callers[:31], 1, 32)
    assert patience.wanted == 32


def test_where_each_row_costs_the_same_nobody_is_waited_for(clock):
    callers = crowd(32)
    patience = taught(clock, callers, linear)
    patience.decide(callers[:16], 16, 32)
    assert patience.wanted == 0


def test_a_lone_client_is_not_waited_for(clock):
    (alone,) = crowd(1)
    patience = taught(clock, [alone], fixed)
    patience.decide([alone], 0, 32)
    assert patience.wanted == 0


def test_who_comes_back_late_or_was_never_seen_to_is_not_waited_for(clock):
    callers = crowd(4)
    patience = taught(clock, callers[:2], fixed)
    slow = taught(clock, callers[:2], fixed, pace=0.5)
    slow.decide(callers[:2], 2, 32)
    assert slow.wanted == 0
    patience.decide(callers[2:], 1, 32)
    assert patience.wanted == 0


def test_a_full_batch_waits_for_nobody(clock):
    callers = crowd(32)
    patience = taught(clock, callers, fixed)
    patience.decide(callers, 32, 32)
    assert patience.wanted == 0


def test_the_fastest_are_waited_for_where_that_is_best(clock):
    fast, slow = crowd(8), crowd(1)
    patience = taught(clock, fast, fixed)
    patience.decide(slow, 0, 32)
    clock.now += 0.9
    for caller in slow:
        patience.arrive(caller, clock.now)
    patience.decide(fast + slow, 0, 32)
    assert patience.wanted == 8


def test_without_costs_nothing_waits(clock):
    callers = crowd(4)
    patience = taught(clock, callers, lambda rows: 0.0)
    patience.decide(callers, 1, 32)
    assert patience.wanted == 0


def test_clients_that_have_left_are_forgotten(clock):
    patience = Patience(fixed)
    for _ in range(100):
        clock.now += 2
        patience.decide(crowd(4), 0, 4)
    assert len(patience._away) < 32


# Costs ----------------------------------------------------------------------------------------


def test_the_first_batch_of_a_size_teaches_nothing_since_it_may_have_been_compiled():
    costs = Costs()
    costs.add(8, 30.0)
    assert costs.of(8) == 0.0
    costs.add(8, 0.02)
    assert costs.of(8) == 0.02


def test_unknown_sizes_cost_what_their_neighbours_do():
    costs = Costs()
    for size, seconds in ((4, 0.01), (16, 0.03)):
        costs.add(size, 1.0)
        costs.add(size, seconds)
    assert costs.of(0) == 0.0
    assert costs.of(1) == 0.01
    assert costs.of(10) == pytest.approx(0.02)
    assert costs.of(32) == 0.03


def test_costs_fall_quickly_rise_slowly_and_are_forgotten_when_old():
    costs = Costs()
    costs.add(1, 1.0)
    costs.add(1, 0.10)
    costs.add(1, 0.02)
    assert costs.of(1) == pytest.approx(0.06)
    costs.add(1, 0.16)
    assert costs.of(1) == pytest.approx(0.07)
    for _ in range(300):
        costs.add(2, 0.5)
    assert costs.of(1) == 0.5
