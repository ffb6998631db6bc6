"""What is played of chunks that come late, by a clock that is a number."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from edgeml.control.chunks import Chunks, Request
from edgeml.control.merging import Blend, Chunk, Ensemble, Merge, RealTime, rule_of

RATE = 50.0
PERIOD = 1 / RATE
ALL: list[Merge] = ["append", "aligned", Blend(4), Ensemble(), RealTime()]
ids = [str(merge) for merge in ALL]


class Loop:
    """Plays chunks in ticks; the time is that of the tick."""

    def __init__(self, merge: Merge, **settings: Any) -> None:
        self.chunks = Chunks(merge, rate=RATE, **settings)

    @property
    def now(self) -> float:
        return self.chunks.tick * PERIOD

    def ask(self) -> Request:
        return self.chunks.ask(self.now, self.chunks.tick)

    def answer(self, request: Request, chunk: Any) -> str:
        return self.chunks.answer(request, chunk, self.now)

    def play(self, times: int = 1) -> list[Any]:
        played = [self.chunks.play(self.now) for _ in range(times)]
        return [None if each is None else each.action for each in played]


def ramp(first: float, steps: int = 10) -> np.ndarray:
    """Steps of one component, that count up by one."""
    return np.arange(first, first + steps)[:, None]


# What is played ----------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_a_lone_chunk_is_played_from_its_first_action_to_its_last(merge: Merge) -> None:
    loop = Loop(merge)
    request = loop.ask()
    assert loop.play(3) == [None] * 3
    assert loop.answer(request, ramp(0.0)) == "merged"
    assert [action.tolist() for action in loop.play(10)] == ramp(0).tolist()
    assert loop.play() == [None]


def test_appended_chunks_follow_each_other() -> None:
    loop = Loop("append")
    loop.answer(loop.ask(), ramp(0.0))
    loop.play(5)
    request = loop.ask()
    loop.play(3)
    loop.answer(request, ramp(100.0))
    assert np.ravel(loop.play(12)).tolist() == [8, 9, *range(100, 110)]


@pytest.mark.parametrize("merge", ["aligned", RealTime(), Blend(0), Blend(1)])
def test_an_aligned_chunk_replaces_the_future_but_for_what_was_played_meanwhile(
    merge: Merge,
) -> None:
    loop = Loop(merge)
    loop.answer(loop.ask(), ramp(0.0))
    loop.play(2)
    request = loop.ask()  # its chunk is meant for step 2 and those after
    assert np.ravel(loop.play(3)).tolist() == [2, 3, 4]
    loop.answer(request, ramp(100.0, 6))
    assert np.ravel(loop.play(3)).tolist() == [103, 104, 105]
    assert loop.play() == [None]  # and not what the first one had for this step


def test_what_the_robot_missed_while_it_held_is_not_cut_off() -> None:
    loop = Loop("aligned")
    loop.answer(loop.ask(), ramp(0.0))
    loop.play(8)
    request = loop.ask()
    loop.play(20)  # two steps, and then nothing
    loop.answer(request, ramp(100.0))
    assert np.ravel(loop.play(1)).tolist() == [102]


def test_blending_passes_from_one_chunk_to_the_other() -> None:
    loop = Loop(Blend(4))
    loop.answer(loop.ask(), np.zeros((10, 1)))
    loop.play(2)
    request = loop.ask()
    loop.play(2)
    loop.answer(request, np.ones((10, 1)))
    assert np.ravel(loop.play(5)) == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_blending_takes_as_many_steps_as_are_left() -> None:
    loop = Loop(Blend(9))
    loop.answer(loop.ask(), np.zeros((10, 1)))
    loop.play(6)
    loop.answer(loop.ask(), np.ones((10, 1)))
    assert np.ravel(loop.play(6)) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_blending_goes_on_from_what_is_still_blended() -> None:
    loop = Loop(Blend(4))
    loop.answer(loop.ask(), np.zeros((10, 1)))
    loop.play(1)
    loop.answer(loop.ask(), np.ones((10, 1)))
    assert np.ravel(loop.play(1)) == pytest.approx([0.25])
    loop.answer(loop.ask(), np.full((10, 1), 2.0))
    # The plan would have been 0.5, 0.75 and 1; the shares of the third are a quarter and so on.
    assert np.ravel(loop.play(4)) == pytest.approx([0.875, 1.375, 1.75, 2.0])


def test_a_gripper_is_never_averaged() -> None:
    for merge in (Blend(9, only=["arm"]), Ensemble(only=["arm"])):
        loop = Loop(merge)
        loop.answer(loop.ask(), {"arm": np.zeros((9, 2)), "gripper": np.zeros(9)})
        loop.answer(loop.ask(), {"arm": np.ones((9, 2)), "gripper": np.ones(9)})
        (action,) = loop.play()
        assert 0 < action["arm"][0] < 1
        assert action["gripper"] == 1


def test_what_has_no_fractions_is_never_averaged() -> None:
    for merge in (Blend(9), Ensemble()):
        loop = Loop(merge)
        loop.answer(loop.ask(), {"arm": np.zeros((9, 2)), "grip": np.zeros(9, bool)})
        loop.answer(loop.ask(), {"arm": np.ones((9, 2)), "grip": np.ones(9, bool)})
        (action,) = loop.play()
        assert 0 < action["arm"][0] < 1
        assert action["grip"].dtype == bool
        assert action["grip"]


@pytest.mark.parametrize(
    ("only", "averaged"),
    [
        (["x"], [True, False, False]),
        (["x", "y"], [True, True, False]),
        ([0, -2], [True, True, False]),
        ([], [False, False, False]),
        (None, [True, True, True]),
    ],
)
def test_components_are_named_by_the_contract_or_by_index(only: Any, averaged: list[bool]) -> None:
    loop = Loop(Blend(9, only=only), names={(): ("x", "y", "gripper")})
    loop.answer(loop.ask(), np.zeros((9, 3), np.float32))
    loop.answer(loop.ask(), np.ones((9, 3), np.float32))
    (action,) = loop.play()
    assert action.dtype == np.float32
    assert (action < 1).tolist() == averaged


def test_components_are_named_by_paths_in_nested_actions() -> None:
    names = {("left", "joints"): ("a", "b"), ("right", "joints"): ("a", "b")}

    def chunk(value: float) -> Any:
        return {
            side: {"joints": np.full((9, 2), value), "grip": np.full(9, value)}
            for side in ("right", "left")
        }

    def averaged(*only: str | int) -> list[Any]:
        loop = Loop(Blend(9, only=only), names=names)
        loop.answer(loop.ask(), chunk(0.0))
        loop.answer(loop.ask(), chunk(1.0))
        (action,) = loop.play()
        return [
            [*(action[side]["joints"] < 1), action[side]["grip"] < 1] for side in ("left", "right")
        ]

    assert averaged("left") == [[True, True, True], [False, False, False]]
    assert averaged("left/joints", "right/grip") == [[True, True, False], [False, False, True]]
    assert averaged("b") == [[False, True, False], [False, True, False]]
    assert averaged("b", "left/joints") == [[True, True, False], [False, True, False]]
    for wrong in ("middle", "joints", 0):
        with pytest.raises(ValueError, match="no component that can be averaged"):
            averaged(wrong)


def test_what_can_not_be_averaged_is_not_to_be_named() -> None:
    loop = Loop(Blend(only=["grip"]))
    with pytest.raises(ValueError, match=r"'grip', which is no component .* grip: \(\) int64"):
        loop.answer(loop.ask(), {"arm": np.zeros((9, 2)), "grip": np.zeros(9, np.int64)})


def test_an_ensemble_weighs_all_chunks_and_the_oldest_most() -> None:
    loop = Loop(Ensemble(decay=0.5))
    for value in (0.0, 1.0, 5.0):
        loop.answer(loop.ask(), np.full((4, 1), value))
        loop.play()
    weights = np.exp([0, -0.5, -1])
    mean = weights @ [0, 1, 5] / weights.sum()
    # The first has four steps, of which three were played.
    assert np.ravel(loop.play(3)) == pytest.approx(
        [mean, weights[:2] @ [1, 5] / weights[:2].sum(), 5.0]
    )
    assert loop.play() == [None]


def test_real_time_chunking_is_told_what_is_left_and_how_late_its_answer_will_be() -> None:
    loop = Loop(RealTime())
    first = loop.ask()
    assert (first.prev_chunk, first.inference_delay) == (None, 0)
    loop.play(3)
    loop.answer(first, {"b": ramp(0), "a": ramp(50)})
    loop.play(4)
    second = loop.ask()
    assert second.prev_chunk["a"].ravel().tolist() == [54, 55, 56, 57, 58, 59]
    assert second.prev_chunk["b"].ravel().tolist() == [4, 5, 6, 7, 8, 9]
    assert second.inference_delay == 3
    loop.play(4)
    third = loop.ask()
    assert len(third.prev_chunk["a"]) == 2
    assert third.inference_delay == 2  # for no more steps will be played
    loop.play(2)
    assert loop.ask().prev_chunk is None


def test_only_real_time_chunking_sends_the_plan() -> None:
    for merge in ("append", "aligned", Blend(), Ensemble()):
        loop = Loop(merge)
        loop.answer(loop.ask(), ramp(0))
        assert loop.ask().prev_chunk is None


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_neither_the_caller_nor_the_policy_can_change_what_is_played(merge: Merge) -> None:
    loop = Loop(merge)
    chunk = {"arm": np.zeros((5, 2)), "grip": np.zeros(5)}
    loop.answer(loop.ask(), chunk)
    chunk["arm"] += 9
    (action,) = loop.play()
    action["arm"] += 9
    request = loop.ask()
    if request.prev_chunk is not None:
        request.prev_chunk["arm"] += 9
    (action,) = loop.play()
    assert action["arm"].tolist() == [0, 0]
    assert action["arm"].flags.writeable


# Ages --------------------------------------------------------------------------------------


def test_an_action_is_as_old_as_the_oldest_that_it_stands_on() -> None:
    for merge, ages in [("aligned", [9, 9, 9]), (Blend(2), [5, 9, 9]), (Ensemble(), [5, 5, 5])]:
        chunks = Chunks(merge, rate=RATE)
        chunks.answer(chunks.ask(5.0, 55), ramp(0), 6.0, version=1)
        chunks.answer(chunks.ask(9.0, 99), ramp(0), 10.0, version=2)
        played = [chunks.play(10.0) for _ in range(3)]
        assert [each.observed_at for each in played] == ages
        assert [each.observation_id for each in played] == [11 * age for age in ages]
        assert {each.version for each in played} == {2}


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_nothing_is_played_that_is_too_old(merge: Merge) -> None:
    loop = Loop(merge, max_age=4 * PERIOD + 1e-6)
    loop.answer(loop.ask(), ramp(0))
    assert loop.chunks.left(loop.now) == 5
    assert np.ravel(loop.play(5)).tolist() == [0, 1, 2, 3, 4]
    assert loop.play(2) == [None, None]
    loop.answer(loop.ask(), ramp(100))
    assert np.ravel(loop.play(5)).tolist() == [100, 101, 102, 103, 104]


def test_what_is_too_old_is_not_blended_in() -> None:
    for merge in (Blend(9), Ensemble()):
        loop = Loop(merge, max_age=3 * PERIOD + 1e-6)
        loop.answer(loop.ask(), np.zeros((9, 1)))
        loop.play(3)
        loop.answer(loop.ask(), np.ones((9, 1)))
        first, second = np.ravel(loop.play(2))
        assert first < 1
        assert second == 1


def test_appended_chunks_that_grow_too_old_as_they_wait_are_passed_over() -> None:
    loop = Loop("append", max_age=12 * PERIOD + 1e-6)
    loop.answer(loop.ask(), ramp(0))
    loop.answer(loop.ask(), ramp(100))
    loop.play(5)
    loop.answer(loop.ask(), ramp(200))
    assert loop.chunks.left(loop.now) == 5 + 3 + 5
    played = np.ravel(loop.play(13)).tolist()
    assert played == [5, 6, 7, 8, 9, 100, 101, 102, 200, 201, 202, 203, 204]
    assert loop.play() == [None]


# What is dropped ---------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [each for each in ALL if each != "append"])
def test_an_answer_whose_steps_are_over_is_late(merge: Merge) -> None:
    loop = Loop(merge)
    loop.answer(loop.ask(), ramp(0, 20))
    request = loop.ask()
    loop.play(5)
    assert loop.answer(request, ramp(100, 5)) == "late"
    assert np.ravel(loop.play()).tolist() == [5]


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_an_answer_is_stale_that_is_older_than_what_is_played(merge: Merge) -> None:
    loop = Loop(merge)
    old, new = loop.ask(), loop.ask()
    assert loop.answer(new, ramp(0)) == "merged"
    assert loop.answer(old, ramp(100)) == "stale"
    assert loop.answer(new, ramp(100)) == "stale"
    assert np.ravel(loop.play()).tolist() == [0]


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_an_answer_is_stale_that_is_too_old(merge: Merge) -> None:
    loop = Loop(merge, max_age=2 * PERIOD)
    request = loop.ask()
    loop.play(3)
    assert loop.answer(request, ramp(0)) == "stale"
    assert loop.play() == [None]


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_after_clearing_all_begins_anew(merge: Merge) -> None:
    loop = Loop(merge)
    loop.answer(loop.ask(), ramp(0))
    request = loop.ask()
    loop.chunks.clear()
    assert loop.chunks.left(loop.now) == 0
    assert loop.play() == [None]
    assert loop.answer(request, ramp(0)) == "stale"
    assert loop.answer(loop.ask(), {"built": np.zeros((3, 1)), "anew": np.ones(3)}) == "merged"
    assert loop.play()[0]["anew"] == 1


# Chunks that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        (None, "a chunk is an array of numbers"),
        (3.0, "whose first axis is the steps"),
        (["up", "down"], "array of numbers"),
        ({}, "no parts"),
        ({"arm": [[1, 2], [3]]}, "arm is ragged"),
        (np.zeros((0, 7)), r"at least one; these have \[0\]"),
        ({"arm": np.zeros((3, 1)), "grip": np.zeros(4)}, r"these have \[3, 4\]"),
        (
            {"arm": {"j": [[0.0], [float("nan")]]}},
            "arm/j has a value that is not finite, at step 1",
        ),
        ({3: np.zeros((3, 1))}, "keys of an action are str"),
    ],
)
def test_what_is_no_chunk_is_refused(actions: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Chunk(actions)


def test_lists_and_integers_are_chunks() -> None:
    loop = Loop(Ensemble())
    loop.answer(loop.ask(), [[1, 2], [3, 4]])
    assert [action.tolist() for action in loop.play(2)] == [[1, 2], [3, 4]]


def test_a_chunk_is_like_those_before() -> None:
    loop = Loop("aligned")
    loop.answer(loop.ask(), {"arm": np.zeros((9, 6), np.float32), "grip": np.zeros(9)})
    loop.answer(loop.ask(), {"grip": np.zeros(7), "arm": np.zeros((7, 6), np.float32)})
    for other in ({"arm": np.zeros((9, 7), np.float32), "grip": np.zeros(9)}, np.zeros((9, 6))):
        with pytest.raises(ValueError, match=r"those before had arm: \(6,\) float32, grip: \(\)"):
            loop.answer(loop.ask(), other)


@pytest.mark.parametrize("merge", ["Aligned", "", None, 3, Blend])
def test_an_unknown_rule_is_refused(merge: Any) -> None:
    with pytest.raises(ValueError, match=r"'append' or 'aligned', or Blend"):
        rule_of(merge)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Blend(-1),
        lambda: Blend(2.5),  # type: ignore[arg-type]
        lambda: Blend(only="arm"),
        lambda: Ensemble(float("nan")),
        lambda: Ensemble(only=[None]),  # type: ignore[list-item]
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="not "):
        make()


# Asking ------------------------------------------------------------------------------------


def test_it_asks_when_as_little_is_left_as_the_worst_turnaround_and_one_tick() -> None:
    loop = Loop("aligned", refill=0)
    assert loop.chunks.due(loop.now)
    request = loop.ask()
    loop.play(4)
    loop.answer(request, ramp(0, 20))
    dues = []
    for _ in range(20):
        dues.append(loop.chunks.due(loop.now))
        loop.play()
    assert dues.index(True) == 20 - (4 + 1)
    assert all(dues[15:])


def turnaround(loop: Loop, ticks: int, lost: int = 0) -> int:
    """Have an answer take so long, after some that were lost; returns the worst turnaround."""
    for _ in range(lost):
        loop.ask()
        loop.play(10)
    request = loop.ask()
    loop.play(ticks)
    loop.answer(request, ramp(0, 50))
    return loop.chunks.turnaround


def test_the_worst_turnaround_is_that_of_the_last_hundred_answers() -> None:
    loop = Loop("aligned")
    assert [turnaround(loop, ticks) for ticks in (3, 7, 5)] == [3, 7, 7]
    for _ in range(98):
        assert turnaround(loop, 2) == 7
    assert turnaround(loop, 2) == 5


def test_the_first_turnaround_counts_until_there_is_another() -> None:
    loop = Loop(RealTime())
    assert turnaround(loop, 40) == 40
    assert turnaround(loop, 3) == 3
    assert loop.ask().inference_delay == 3


def test_with_what_was_lost_before_it_an_answer_took_longer_and_its_delay_is_its_own() -> None:
    loop = Loop(RealTime())
    turnaround(loop, 0)
    turnaround(loop, 1)
    assert turnaround(loop, 3, lost=2) == 23
    assert loop.ask().inference_delay == 3


def test_what_is_appended_is_asked_for_no_earlier_after_a_loss() -> None:
    loop = Loop("append")
    turnaround(loop, 0)
    turnaround(loop, 1)
    assert turnaround(loop, 3, lost=2) == 3


def test_it_asks_at_half_a_chunk_or_where_it_is_told_to() -> None:
    for refill, left in [(None, 10), (0, 1), (15, 15)]:
        loop = Loop("aligned", refill=refill)
        loop.answer(loop.ask(), ramp(0, 20))
        while not loop.chunks.due(loop.now):
            loop.play()
        assert loop.chunks.left(loop.now) == left


def test_an_ensemble_asks_whenever_it_can() -> None:
    loop = Loop(Ensemble(), refill=0)
    loop.answer(loop.ask(), ramp(0, 20))
    assert loop.chunks.due(loop.now)


@pytest.mark.parametrize("merge", ALL, ids=ids)
def test_with_turnarounds_that_vary_there_is_always_something_to_play(merge: Merge) -> None:
    rng = random.Random(1)
    loop = Loop(merge, max_age=1.0)
    loop.answer(loop.ask(), ramp(0, 50))
    under_way: tuple[int, Request] | None = None
    for tick in range(5000):
        if under_way is not None and under_way[0] == tick:
            assert loop.answer(under_way[1], ramp(tick, 50)) == "merged"
            under_way = None
        if under_way is None and loop.chunks.due(loop.now):
            under_way = tick + rng.randint(5, 11), loop.ask()
        played = loop.chunks.play(loop.now)
        assert played is not None, tick


# By chance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ALL, ids=ids)
@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_when_it_keeps_its_promises(merge: Merge, seed: int) -> None:
    """Each value tells its request and its step, so that what is played tells where it is from."""
    rng = random.Random(seed)
    max_age = rng.choice([None, 0.1, 0.3, 1.0])
    loop = Loop(merge, max_age=max_age, refill=rng.choice([None, 0, 5, 30]))
    under_way: list[tuple[int, Request]] = []
    seen: Counter[str] = Counter()
    merged: dict[int, Request] = {}
    position = 0
    for tick in range(600):
        for due, request in [*under_way]:
            if due <= tick:
                under_way.remove((due, request))
                steps = request.position + np.arange(rng.randint(1, 40))
                chunk = np.stack([steps, np.full_like(steps, request.number)], axis=1)
                outcome = loop.answer(request, chunk)  # ints, so that nothing is averaged
                seen[outcome] += 1
                if outcome == "merged":
                    assert not merged or request.number > max(merged)
                    merged[request.number] = request
                if max_age is not None and loop.now - request.observed_at > max_age:
                    assert outcome != "merged"
        if len(under_way) < 2 and loop.chunks.due(loop.now):
            under_way.append((tick + rng.choice([0, 1, 3, 8, 60]), loop.ask()))
        if rng.random() < 0.005:
            loop.chunks.clear()
            merged.clear()
        left = loop.chunks.left(loop.now)
        played = loop.chunks.play(loop.now - 0.0)
        assert (played is None) == (left == 0)
        if played is None:
            continue
        seen["played"] += 1
        now = (loop.chunks.tick - 1) * PERIOD
        step, number = played.action.tolist()
        assert number in merged
        assert max_age is None or now - played.observed_at <= max_age
        assert played.observed_at <= merged[number].observed_at
        if merge != "append":
            assert step == position, "an aligned step is played at its own time"
            if not isinstance(merge, Ensemble):
                assert number == max(merged)
        position += 1
    assert seen["played"] > 50
    assert seen["merged"] > 5
