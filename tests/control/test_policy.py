"""A control loop beside a policy that is asked in another thread."""

from __future__ import annotations

import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgeml import ConfigMismatch, Feature, InferenceClient, InferenceServer, PolicyContract
from edgeml.control import Blend, ChunkedPolicy, Ensemble, RealTime
from edgeml.control.asking import Asker
from edgeml.core.errors import Closed, DeadlineExceeded, Unreachable
from pairs import no_thread_left, started, wait_until

RATE = 50


class Brain:
    """A policy that answers when it is told to, with what it is told to; a client of nobody."""

    def __init__(self) -> None:
        self.asked: queue.Queue[Any] = queue.Queue()
        self.timeouts: list[float | None] = []
        self._answers: queue.Queue[Any] = queue.Queue()

    def call(self, name: str, payload: Any, timeout: float | None = None) -> Any:
        self.timeouts.append(timeout)
        self.asked.put(payload)
        answer = self._answers.get(timeout=30)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def give(self, policy: ChunkedPolicy, answer: Any) -> Any:
        """Answer the request that is under way, or comes; returns its payload."""
        payload = self.asked.get(timeout=30)
        self._answers.put(answer)
        wait_until(lambda: policy._asker._answers)
        return payload


@pytest.fixture
def brain() -> Brain:
    return Brain()


@pytest.fixture
def make(brain: Brain) -> Iterator[Callable[..., ChunkedPolicy]]:
    made: list[ChunkedPolicy] = []

    def make(source: Any = brain, **settings: Any) -> ChunkedPolicy:
        made.append(ChunkedPolicy(source, rate=RATE, **settings))
        return made[-1]

    yield make
    brain._answers.put(np.zeros((1, 1)))  # to whoever waits
    for each in made:
        each.stop()


def ramp(first: float, steps: int = 10) -> np.ndarray:
    return np.arange(first, first + steps, dtype=float)[:, None]


def steps(policy: ChunkedPolicy, times: int, observation: Any = 0.0) -> list[float | None]:
    actions = [policy.step(observation) for _ in range(times)]
    return [None if action is None else float(action[0]) for action in actions]


# What is played ----------------------------------------------------------------------------


def test_it_plays_a_chunk_while_the_next_is_asked_for(make: Any, brain: Brain) -> None:
    policy = make()
    assert steps(policy, 3) == [None] * 3
    assert policy.latest.source == "nothing"
    brain.give(policy, ramp(0))
    assert steps(policy, 7) == [0, 1, 2, 3, 4, 5, 6]  # half of which it asks again
    assert brain.give(policy, ramp(100)) == 0.0
    assert steps(policy, 3) == [102, 103, 104]
    assert policy.latest.source == "chunk"
    assert policy.latest.number == 12
    stats = policy.stats()
    assert stats["steps"] == 13
    assert stats["steps_played"] == 10
    assert stats["steps_without_action"] == 3
    assert (stats["requests"], stats["chunks"], stats["requests_failed"]) == (2, 2, 0)
    assert stats["margin_min"] == 3


@pytest.mark.parametrize(
    ("merge", "then"),
    [
        ("append", [7, 8, 9, 100]),
        ("aligned", [102, 103, 104, 105]),
        (Blend(2), [(7 + 102) / 2, 103, 104, 105]),
        (RealTime(), [102, 103, 104, 105]),
    ],
)
def test_each_way_to_merge(make: Any, brain: Brain, merge: Any, then: list[float]) -> None:
    policy = make(merge=merge)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    steps(policy, 7)
    brain.give(policy, ramp(100))
    assert steps(policy, 4) == then


def test_one_request_is_under_way_at_a_time(make: Any, brain: Brain) -> None:
    policy = make(merge=Ensemble())
    steps(policy, 20)
    brain.give(policy, ramp(0))
    steps(policy, 20)
    brain.asked.get(timeout=30)
    assert brain.asked.empty()
    assert policy.stats()["requests"] == 2


def test_real_time_chunking_sends_what_is_left_and_the_delay(make: Any, brain: Brain) -> None:
    policy = make(merge=RealTime(), actions="acts")
    steps(policy, 3, {"state": np.ones(2)})
    first = brain.give(policy, {"acts": {"arm": ramp(0)}})
    assert first["prev_chunk"] is None
    assert first["inference_delay"] == 0
    assert first["state"].tolist() == [1, 1]
    for _ in range(6):
        policy.step(np.ones(2))
    second = brain.give(policy, {"acts": {"arm": ramp(0)}})
    assert second["observation"].tolist() == [1, 1]
    assert second["prev_chunk"]["arm"].ravel().tolist() == [5, 6, 7, 8, 9]
    assert second["inference_delay"] == 3


def test_actions_are_dicts_and_may_be_changed(make: Any, brain: Brain) -> None:
    policy = make()
    policy.step(None)
    chunk = {"actions": {"arm": {"joints": ramp(0)}, "grip": np.zeros(10, bool)}, "took": 3.0}
    brain.give(policy, chunk)
    for i in range(12):
        action = policy.step(None)
        assert set(action) == {"arm", "grip"}
        assert action["arm"]["joints"].tolist() == [min(i, 9)]
        action["arm"]["joints"] += 1000


def test_the_observation_may_be_changed_once_step_has_returned(make: Any, brain: Brain) -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    turned = image[:, ::-1]
    state = np.zeros(3, np.float32)
    observation = {"image": image, "more": {"turned": turned, "state": state, "say": "up"}}
    policy = make(merge=Ensemble())
    for round_ in range(1, 5):
        image[:], state[:] = round_, round_
        policy.step(observation)
        image[:], state[:] = 99, 99
        seen = brain.give(policy, ramp(0))
        assert seen["more"]["say"] == "up"
        for part in (seen["image"], seen["more"]["turned"], seen["more"]["state"]):
            assert (part == round_).all()
        assert seen["image"].shape == image.shape
        assert seen["more"]["turned"].shape == turned.shape
        seen["image"][:] = 7  # it is the policy's own
        assert image[0, 0, 0] == 99


def test_a_function_is_a_policy_as_well(make: Any) -> None:
    policy = make(lambda observation: observation["at"] + ramp(0))
    wait_until(lambda: policy.step({"at": 5.0}) is not None)
    assert policy.latest.action.tolist() == [5]
    assert steps(policy, 3, {"at": 5.0}) == [6, 7, 8]


def test_synchronous_it_asks_when_nothing_is_left(make: Any) -> None:
    asked = []

    def function(observation: float) -> Any:
        asked.append(observation)
        return ramp(observation, 3)

    policy = make(function, sync=True)
    assert [float(policy.step(float(10 * i))[0]) for i in range(7)] == [0, 1, 2, 30, 31, 32, 60]
    assert asked == [0, 30, 60]
    assert "edgeml control" not in {thread.name for thread in threading.enumerate()}


def test_synchronous_it_can_be_interrupted(make: Any) -> None:
    answers = iter([KeyboardInterrupt(), ramp(7)])

    def function(observation: float) -> Any:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    policy = make(function, sync=True)
    with pytest.raises(KeyboardInterrupt):
        policy.step(0.0)
    assert steps(policy, 2) == [7, 8]


# Ages --------------------------------------------------------------------------------------


def test_each_step_tells_the_age_the_observation_and_the_version(make: Any, brain: Brain) -> None:
    policy = make(merge=Blend(3))
    now = time.monotonic()
    policy.step(0.0, observed_at=now - 5, observation_id=55)
    brain.give(policy, ramp(0))
    for _ in range(6):
        policy.step(0.0, observed_at=now, observation_id=66)
    assert policy.latest.observation_id == 55
    assert policy.latest.age == pytest.approx(time.monotonic() - now + 5, abs=0.5)
    brain.give(policy, ramp(0))
    ids = []
    for _ in range(3):
        policy.step(0.0)
        ids.append(policy.latest.observation_id)
    assert ids == [55, 55, 66]  # while any of the old one is in it, it is as old as that
    assert policy.stats()["age_max"] >= 5


def test_the_version_is_the_one_that_the_server_tells() -> None:
    server = InferenceServer(0, transport="inproc")
    server.register_interface("policy", lambda payload: ramp(0))
    with (
        started(server),
        InferenceClient(url=server.url) as client,
        ChunkedPolicy(client, rate=RATE) as policy,
    ):
        wait_until(lambda: policy.step(0.0) is not None)
        assert policy.latest.version == 1
        server.swap("policy", lambda payload: ramp(100))
        wait_until(lambda: policy.step(0.0)[0] >= 100)
        assert policy.latest.version == 2


def test_nothing_older_than_max_age_is_played(make: Any, brain: Brain) -> None:
    policy = make(max_age=1.0)
    policy.step(0.0)
    brain.give(policy, ramp(0))
    assert steps(policy, 1) == [0]
    policy.step(0.0, observed_at=time.monotonic() - 0.9)
    began = time.monotonic()
    while policy.latest.source == "chunk":
        policy._chunks._position = 1  # the chunk would never end
        policy.step(0.0)
        assert policy.latest.source == "hold" or policy.latest.age <= 1.0
    assert time.monotonic() - began < 1.5
    assert policy.latest.age > 1.0  # as it is the old command


def test_an_answer_that_would_be_too_old_is_not_waited_for(make: Any, brain: Brain) -> None:
    policy = make(max_age=0.5, timeout=7.0)
    policy.step(0.0, observed_at=time.monotonic() - 0.2)
    brain.asked.get(timeout=30)
    assert 0.1 < brain.timeouts[0] <= 0.3
    other = make(timeout=7.0)
    other.step(0.0)
    brain.asked.get(timeout=30)
    assert brain.timeouts[1] == 7.0
    third = make()
    third.step(0.0)
    brain.asked.get(timeout=30)
    assert brain.timeouts[2] is None
    for _ in range(2):
        brain._answers.put(ramp(0))


def test_of_an_observation_that_is_too_old_nothing_is_asked(make: Any, brain: Brain) -> None:
    policy = make(max_age=0.5)
    for _ in range(3):
        policy.step(0.0, observed_at=time.monotonic() - 1)
    assert policy.stats()["observations_too_old"] == 3
    assert policy.stats()["requests"] == 0


@pytest.mark.parametrize("at", [math.nan, math.inf, 4e9])
def test_another_clocks_time_is_refused(make: Any, at: float) -> None:
    with pytest.raises(ValueError, match=r"to come: now is .* by time.monotonic"):
        make().step(0.0, observed_at=at)


def test_after_a_quick_failure_nothing_is_asked_for_a_moment_and_after_a_slow_one_at_once() -> None:
    asker = Asker(lambda payload, timeout: (payload, None), None, here=True)
    asker.rest(0.0)
    assert not asker.idle
    asker.rest(0.5)  # it has waited long enough for what didn't come
    assert asker.idle
    asker.close()


# Holding -----------------------------------------------------------------------------------


def messages(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if "control" in record.name]


def test_out_of_steps_it_holds_and_says_so_once(make: Any, brain: Brain, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "edgeml")
    policy = make()
    steps(policy, 1)
    brain.give(policy, ramp(0))
    assert steps(policy, 14) == [*range(10), 9, 9, 9, 9]
    assert policy.latest.source == "hold"
    wait_until(lambda: len(messages(caplog)) == 1)
    assert messages(caplog)[0].startswith("nothing is left to play of the policy 'policy'")
    brain.give(policy, ramp(100))
    # It was asked for with five steps left, which have been played.
    assert steps(policy, 2) == [105, 106]
    wait_until(lambda: len(messages(caplog)) == 2)
    assert "is played again, after" in messages(caplog)[1]
    assert policy.stats()["holds"] == 1
    assert policy.stats()["steps_held"] == 4


def test_latched_it_holds_until_it_is_reset(make: Any, brain: Brain) -> None:
    policy = make(latch=True)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    steps(policy, 11)
    brain.give(policy, ramp(100))
    assert steps(policy, 3) == [9, 9, 9]
    assert brain.asked.empty()
    policy.reset()
    assert steps(policy, 1) == [None]
    brain.give(policy, ramp(200))
    assert steps(policy, 1) == [200]


def test_a_function_says_what_to_hold_and_is_asked_once(make: Any, brain: Brain) -> None:
    given = []

    def stop(last: Any) -> Any:
        given.append(last.tolist())
        return np.array([-1.0])

    policy = make(on_empty=stop)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    assert steps(policy, 13) == [*range(10), -1, -1, -1]
    assert given == [[9]]
    assert policy.latest.age == 0
    assert policy.latest.observation_id is None
    brain.give(policy, ramp(0, 6))
    assert steps(policy, 3) == [5, -1, -1]
    assert given == [[9], [5]]


def test_before_anything_was_played_there_is_nothing_to_hold(make: Any, brain: Brain) -> None:
    policy = make(on_empty=lambda last: pytest.fail("it is no hold"))
    assert steps(policy, 5) == [None] * 5
    assert policy.stats()["holds"] == 0
    assert policy.latest.age == math.inf


def test_a_held_action_is_as_old_as_it_is(make: Any, brain: Brain) -> None:
    policy = make()
    policy.step(0.0, observed_at=time.monotonic() - 5, observation_id=5)
    brain.give(policy, ramp(0, 2))
    steps(policy, 4)
    assert policy.latest.source == "hold"
    assert policy.latest.age > 5
    assert policy.latest.observation_id == 5


def test_reset_forgets_what_is_left_and_what_is_under_way(make: Any, brain: Brain) -> None:
    policy = make(refill=9)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    steps(policy, 3)  # and another is under way
    policy.reset()
    assert steps(policy, 1) == [None]
    brain.give(policy, ramp(100))
    assert steps(policy, 1) == [None]
    brain.give(policy, ramp(200))
    assert steps(policy, 2) == [200, 201]
    assert policy.stats()["chunks_stale"] == 1


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        Unreachable("nobody is there"),
        KeyError("image"),
        SystemExit(3),
        "text",
        {"other": "text"},
        np.full((5, 1), math.nan),
        np.zeros((5, 2)),  # where there was one component
        None,
    ],
    ids=str,
)
def test_whatever_a_policy_gives_step_goes_on(
    make: Any, brain: Brain, caplog: Any, answer: Any
) -> None:
    caplog.set_level(logging.INFO, "edgeml")
    policy = make()
    steps(policy, 1)
    brain.give(policy, ramp(0))
    steps(policy, 6)
    brain.give(policy, answer)
    assert steps(policy, 4) == [6, 7, 8, 9]
    assert policy.stats()["requests_failed"] == 1
    wait_until(lambda: policy.step(0.0) is not None and not brain.asked.empty())
    brain.give(policy, answer)
    wait_until(lambda: policy.step(0.0) is not None and not brain.asked.empty())
    brain.give(policy, ramp(100))
    wait_until(lambda: policy.step(0.0)[0] >= 100)
    wait_until(lambda: any("gives actions again" in text for text in messages(caplog)))
    assert sum("gives no actions" in text for text in messages(caplog)) == 1, "said once"
    assert policy.stats()["requests_failed"] == 2


def test_a_policy_that_fails_is_not_asked_at_every_tick(make: Any) -> None:
    asked = []

    def function(observation: Any) -> Any:
        asked.append(observation)
        raise RuntimeError("no")

    policy = make(function)
    began = time.monotonic()
    wait_until(lambda: policy.step(0.0) is None and len(asked) == 4)
    assert time.monotonic() - began >= 0.29


def test_answers_that_are_always_too_old_are_told_once_with_the_cause(
    make: Any, brain: Brain, caplog: Any
) -> None:
    policy = make(max_age=0.05)
    for _ in range(3):
        policy.step(0.0)
        wait_until(lambda: policy.step(0.0) is None and not brain.asked.empty())
        asked = time.monotonic()
        wait_until(lambda asked=asked: time.monotonic() > asked + 0.05)
        brain.give(policy, ramp(0))
        assert steps(policy, 1) == [None]
    assert policy.stats()["chunks_stale"] == 3
    wait_until(lambda: messages(caplog))
    (said,) = messages(caplog)
    assert "too old to be played: answers take 0." in said
    assert said.endswith("and max_age is 0.05 s")


def test_a_deadline_that_max_age_set_is_told_as_such(make: Any, brain: Brain, caplog: Any) -> None:
    policy = make(max_age=0.5)
    policy.step(0.0)
    brain.give(policy, DeadlineExceeded("no answer"))
    policy.step(0.0)
    wait_until(lambda: messages(caplog))
    assert messages(caplog)[0].endswith("no answer (max_age is 0.5 s)")


def test_chunks_shorter_than_an_answer_takes_are_told_once(
    make: Any, brain: Brain, caplog: Any
) -> None:
    policy = make()
    steps(policy, 1)
    for _ in range(4):
        brain.give(policy, ramp(0, 5))
        steps(policy, 8)
    assert policy.stats()["holds"] >= 2
    wait_until(lambda: any("so the robot holds between them" in text for text in messages(caplog)))
    said = [text for text in messages(caplog) if "5 steps at a time, and an answer takes" in text]
    assert len(said) == 1
    assert len(messages(caplog)) <= 2  # the first hold may be like any other


def test_components_that_there_are_not_are_told_at_once(make: Any, brain: Brain) -> None:
    policy = make(merge=Blend(only=["arm"]))
    policy.step(0.0)
    brain.give(policy, {"leg": ramp(0)})
    with pytest.raises(ValueError, match="'arm'"):
        policy.step(0.0)


# Another has the robot ---------------------------------------------------------------------


class Lease:
    def __init__(self) -> None:
        self.held = True
        self.since = 1


def test_while_another_has_the_robot_nothing_is_played_or_asked(make: Any, brain: Brain) -> None:
    lease = Lease()
    policy = make(lease=lease, refill=9)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    assert steps(policy, 3) == [0, 1, 2]
    brain.asked.get(timeout=30)  # another request, still under way
    lease.held = False
    assert steps(policy, 5) == [None] * 5
    assert policy.latest.source == "taken"
    lease.held, lease.since = True, 2
    assert steps(policy, 2) == [None] * 2
    assert policy.latest.source == "nothing"  # rather than the command from before
    brain._answers.put(ramp(100))
    wait_until(lambda: policy._asker._answers)
    assert steps(policy, 2, 7.0) == [None] * 2
    assert brain.give(policy, ramp(200)) == 7.0, "a fresh observation"
    assert steps(policy, 2) == [200, 201]
    assert policy.stats()["steps_taken"] == 5
    assert policy.stats()["holds"] == 0


def test_a_takeover_between_two_steps_is_noticed(make: Any, brain: Brain) -> None:
    lease = Lease()
    policy = make(lease=lease)
    steps(policy, 1)
    brain.give(policy, ramp(0))
    steps(policy, 3)
    lease.since = 3  # lost, and had again
    assert steps(policy, 1) == [None]
    brain.give(policy, ramp(100))
    assert steps(policy, 1) == [100]


def test_a_takeover_that_is_latched_ends_with_reset(make: Any, brain: Brain) -> None:
    lease = Lease()
    lease.held = False  # at first, which is no takeover
    policy = make(lease=lease, latch=True)
    assert steps(policy, 1) == [None]
    lease.held = True
    steps(policy, 1)
    brain.give(policy, ramp(0))
    assert steps(policy, 1) == [0]
    lease.held = False
    steps(policy, 1)
    lease.held, lease.since = True, 2
    assert steps(policy, 3) == [None] * 3
    assert policy.latest.source == "taken"
    assert brain.asked.empty()
    policy.reset()
    steps(policy, 1)
    brain.give(policy, ramp(100))
    assert steps(policy, 1) == [100]


def test_what_is_no_lease_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="a lease has held and since"):
        make(lease=object())


# Contracts ---------------------------------------------------------------------------------


def contracted(contract: PolicyContract | None) -> Any:
    brain = Brain()
    brain.contract = lambda name: contract  # type: ignore[attr-defined]
    return brain


def test_a_loop_at_another_rate_than_the_policys_is_refused() -> None:
    with pytest.raises(ConfigMismatch, match=r"30 steps per second, and this loop has 50"):
        ChunkedPolicy(contracted(PolicyContract(rate=30)), rate=50)


@pytest.mark.parametrize("settings", [{"refill": 17}, {"merge": Blend(20)}], ids=str)
def test_a_loop_that_needs_more_steps_than_a_chunk_has_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigMismatch, match=r"gives 16 steps at a time, and .* takes (17|20)"):
        ChunkedPolicy(contracted(PolicyContract(horizon=16)), rate=50, **settings)


@pytest.mark.parametrize(
    "contract", [None, PolicyContract(), PolicyContract(rate=50, horizon=16)], ids=str
)
def test_what_a_contract_does_not_state_is_not_checked(contract: Any) -> None:
    ChunkedPolicy(contracted(contract), rate=50, refill=16, merge=Blend(16)).stop()


def test_a_contract_gives_components_their_names() -> None:
    server = InferenceServer(0, transport="inproc")
    arm = Feature((4, 3), "float64", ("x", "y", "grip"))
    contract = PolicyContract(action={"actions": arm}, rate=RATE, horizon=4)
    chunks = iter([np.zeros((4, 3)), np.ones((4, 3))])
    server.register_interface("policy", lambda _: {"actions": next(chunks)}, contract=contract)
    with (
        started(server),
        InferenceClient(url=server.url) as client,
        ChunkedPolicy(
            client, rate=RATE, merge=Blend(2, only=["x", "y"]), sync=True, refill=3
        ) as policy,
    ):
        policy.step(0.0)
        assert policy.step(0.0).tolist() == [0.5, 0.5, 1]


# The rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 0},
        {"rate": math.inf},
        {"rate": "fast"},
        {"rate": 50, "max_age": 0},
        {"rate": 50, "timeout": -1},
        {"rate": 50, "refill": 2.5},
        {"rate": 50, "refill": -1},
        {"rate": 50, "on_empty": "stop"},
        {"rate": 50, "merge": "blend"},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="not "):
        ChunkedPolicy(lambda observation: ramp(0), **settings)


async def coroutine(observation: Any) -> Any:
    return ramp(0)


@pytest.mark.parametrize("source", [3, None, coroutine])
def test_what_can_not_be_asked_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="a policy is a client"):
        ChunkedPolicy(source, rate=50)


def test_stopped_it_ends_its_thread_and_gives_nothing_more() -> None:
    with no_thread_left():
        with ChunkedPolicy(lambda observation: ramp(0), rate=RATE) as policy:
            wait_until(lambda: policy.step(0.0) is not None)
        policy.stop()
        with pytest.raises(Closed, match="was stopped"):
            policy.step(0.0)


def test_dropped_it_is_stopped_and_that_is_told() -> None:
    with no_thread_left():
        held = [ChunkedPolicy(lambda observation: ramp(0), rate=RATE)]
        wait_until(lambda: held[0].step(0.0) is not None)
        with pytest.warns(ResourceWarning, match="ChunkedPolicy was dropped without stop"):
            held.clear()


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_child_is_told_that_it_has_no_thread() -> None:
    with ChunkedPolicy(lambda observation: ramp(0), rate=RATE) as policy:
        wait_until(lambda: policy.step(0.0) is not None)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                policy.step(0.0)
            except Closed:
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_report_prints_and_draws(make: Any, brain: Brain, tmp_path: Any, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    policy = make()
    policy.report()
    assert "0 steps at 50 Hz" in capsys.readouterr().out
    steps(policy, 2)
    brain.give(policy, ramp(0))
    steps(policy, 12)
    policy.report(tmp_path / "how.png")
    said = capsys.readouterr().out
    assert "14 steps at 50 Hz: 10 played, 2 held in 1 holds, 0 taken, 2 without action" in said
    assert (tmp_path / "how.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_report_says_what_to_install(
    make: Any, tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    policy = make()
    policy.report(tmp_path / "how.png")
    assert "pip install" in capsys.readouterr().out
    assert not (tmp_path / "how.png").exists()
