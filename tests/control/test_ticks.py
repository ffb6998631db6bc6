from __future__ import annotations

import time

import pytest

from edgeml.control import Ticks


class Clock:
    """Time that passes only where somebody sleeps, or works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_by)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_ticks_come_at_their_times_however_long_the_body_takes(clock: Clock) -> None:
    ticks = Ticks(50)
    times = []
    for tick in ticks:
        times.append(clock.now - 1000)
        clock.pass_by(0.001 * (tick % 19))
        if tick == 500:
            break
    assert times == pytest.approx([0.02 * tick for tick in range(501)])
    assert ticks.late == 0


def test_a_tick_after_a_long_body_comes_at_once_and_is_counted(clock: Clock) -> None:
    ticks = Ticks(50)
    times = {}
    for tick in ticks:
        times[tick] = clock.now - 1000
        clock.pass_by(0.025 if tick == 2 else 0.001)
        if tick == 5:
            break
    assert times == pytest.approx({0: 0.0, 1: 0.02, 2: 0.04, 3: 0.065, 4: 0.08, 5: 0.1})
    assert ticks.late == 1


def test_ticks_that_are_long_over_are_left_out_and_counted(clock: Clock) -> None:
    ticks = Ticks(50)
    times = {}
    for tick in ticks:
        times[tick] = clock.now - 1000
        clock.pass_by(0.125 if tick == 2 else 0.001)
        if tick >= 9:
            break
    assert times == pytest.approx({0: 0.0, 1: 0.02, 2: 0.04, 8: 0.165, 9: 0.18})
    assert ticks.late == 6


@pytest.mark.parametrize("rate", [0, -5, float("nan")])
def test_a_rate_is_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Ticks(rate)
