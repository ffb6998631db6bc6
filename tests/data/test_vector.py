"""Several environments fill one store, and no sample is of two of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from edgeml.data import (
    Batch,
    QueuedDataStore,
    ReplayBuffer,
    ReplayBufferDataStore,
    VectorTransitions,
    checkpoint,
)

N = 3
SIDE = 40  # of an image that is kept once


class Walk(gym.Env[Any, Any]):
    """Each observation is like no other: of which environment, episode and step it is."""

    observation_space = gym.spaces.Dict(
        at=gym.spaces.Box(0, 1000, (3,), np.int64),
        image=gym.spaces.Box(0, 255, (SIDE, SIDE), np.uint8),
    )
    action_space = gym.spaces.Box(-1e6, 1e6, (), np.float64)

    def __init__(self, lane: int) -> None:
        self.lane, self.episode, self.t = lane, -1, 0

    @property
    def length(self) -> int:
        return 1 + (2 * self.lane + 3 * self.episode) % 7

    def look(self) -> Any:
        at = np.array([self.lane, self.episode, self.t])
        return {"at": at, "image": np.full((SIDE, SIDE), at @ [100, 20, 1] % 256, np.uint8)}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        over, terminates = self.t == self.length, self.episode % 2 == 0
        return (
            self.look(),
            reward(self.lane, self.t),
            over and terminates,
            over and not terminates,
            {},
        )


def reward(lane: int, t: int) -> float:
    return 100.0 * lane + t


def batches(mode: AutoresetMode, steps: int, kind: Any = SyncVectorEnv, n: int = N) -> list[Batch]:
    """What the helper makes of a vector environment's steps."""
    if kind is AsyncVectorEnv:
        kind = partial(kind, context="spawn")
    envs = kind([partial(Walk, lane) for lane in range(n)], autoreset_mode=mode)
    made = []
    try:
        transitions = VectorTransitions(envs)
        observations, _ = envs.reset()
        transitions.begin(observations)
        for number in range(steps):
            actions = np.arange(n) + 10.0 * number
            step = envs.step(actions)
            made.append(transitions.take_step(actions, *step))
            over = step[2] | step[3]
            if mode == AutoresetMode.DISABLED and over.any():
                observations, _ = envs.reset(options={"reset_mask": over})
                transitions.begin(observations, over)
    finally:
        envs.close()
    return made


def check_samples(store: ReplayBuffer, n_step: int, frame_stack: int = 1, lanes: int = N) -> None:
    """See that each sample goes on within one episode of one environment, as far as it goes."""
    last = {}  # of each episode the last step that is in the store
    for item in store.get_latest_data(0):
        lane, episode, t = item["next_observations"]["at"].tolist()
        last[lane, episode] = t
    batch = store.sample(600)
    seen = set()
    for i in range(600):
        stack = batch["observations"]["at"][i].reshape(frame_stack, 3)
        following = batch["next_observations"]["at"][i].reshape(frame_stack, 3)
        lane, episode, t = stack[-1].tolist()
        seen.add(lane)
        end = min(t + n_step, last[lane, episode])
        assert following[-1].tolist() == [lane, episode, end]
        assert batch["rewards"][i] == sum(reward(lane, k) for k in range(t + 1, end + 1))
        frames = [max(0, t - k) for k in range(frame_stack - 1, -1, -1)]
        assert stack.tolist() == [[lane, episode, k] for k in frames]
        images = batch["observations"]["image"][i].reshape(frame_stack, SIDE, SIDE)[:, 0, 0]
        assert images.tolist() == [(stack[k] @ [100, 20, 1]) % 256 for k in range(frame_stack)]
        if lanes > 1:
            assert batch["lane"][i] == lane
        length = 1 + (2 * lane + 3 * episode) % 7
        over = end == length
        assert batch["dones"][i] == over
        assert batch["masks"][i] == (0 if over and episode % 2 == 0 else 1)
    assert seen == set(range(lanes))


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_samples_go_on_within_an_episode(mode: AutoresetMode, kind: Any) -> None:
    made = batches(mode, 40, kind)
    whole = ReplayBufferDataStore(
        Walk.observation_space, Walk.action_space, 500, n_step=3, discount=1.0, lanes=N, seed=0
    )
    for batch in made:
        whole.batch_insert(batch)
    check_samples(whole, 3)
    resets = 0 if mode != AutoresetMode.NEXT_STEP else 40 * N - len(whole)
    assert len(whole) == 40 * N - resets
    assert whole.breaks == 0


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("way", ["items", "uploaded", "round the ring", "loaded"])
def test_whichever_way_the_items_come(mode: AutoresetMode, way: str, tmp_path: Any) -> None:
    made = batches(mode, 60)
    capacity = 50 if way == "round the ring" else 500
    options = {"n_step": 2, "discount": 1.0, "frame_stack": 3, "lanes": N, "seed": 0}
    store = ReplayBuffer(capacity, **options)
    if way == "uploaded":
        queue = QueuedDataStore(500)
        for batch in made:
            queue.batch_insert(batch)
        sent = 0
        while len(part := queue.get_latest_data(sent, limit=7)):
            store.batch_insert(Batch.from_payload(part.to_payload()))
            sent += len(part)
    else:
        for batch in made:
            for item in batch if way == "items" else [batch]:
                (store.insert if way == "items" else store.batch_insert)(item)
    if way == "loaded":
        checkpoint.save(tmp_path / "saved", stores={"it": store})
        store = ReplayBuffer(capacity, **options)
        checkpoint.load(tmp_path / "saved", {"it": store})
    if way == "round the ring":
        batch = store.sample(500)
        at, following = batch["observations"]["at"], batch["next_observations"]["at"]
        assert (at[:, :, :2] == at[:, :1, :2]).all()
        assert (following[:, :, :2] == at[:, :, :2]).all()
        steps = at[:, -1, 2]
        assert (at[:, 0, 2] == np.maximum(steps - 2, 0)).all()
    else:
        check_samples(store, 2, frame_stack=3)
    assert store.breaks == 0


def test_images_of_all_lanes_are_kept_once() -> None:
    made = batches(AutoresetMode.NEXT_STEP, 200)
    store = ReplayBuffer(1000, lanes=N)
    rows = ReplayBuffer(1000, lanes=N, example=made[0][0]).nbytes  # without images
    for batch in made:
        store.batch_insert(batch)
    episodes = int(store.get_latest_data(0).columns["dones"].sum()) + N  # with those that go on
    assert store.nbytes - rows <= (len(store) + episodes) * SIDE * SIDE


def test_one_environment_has_no_lane() -> None:
    store = ReplayBuffer(500, n_step=3, discount=1.0, seed=0)
    for batch in batches(AutoresetMode.SAME_STEP, 40, n=1):
        assert "lane" not in batch.columns
        store.batch_insert(batch)
    check_samples(store, 3, lanes=1)


def test_without_lanes_it_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where a transition doesn't begin as the one before ended, nothing reaches across."""
    store = ReplayBuffer(500, n_step=3, discount=1.0, seed=0)
    for batch in batches(AutoresetMode.SAME_STEP, 40):
        for item in batch:
            store.insert(item)
    batch = store.sample(500)
    steps = batch["next_observations"]["at"] - batch["observations"]["at"]
    assert set(map(tuple, steps.tolist())) == {(0, 0, 1)}
    assert store.breaks > 50
    assert [record.message for record in caplog.records if "lanes=" in record.message] != []
    assert len(caplog.records) == 1, "it is told once"


@pytest.mark.parametrize("lane", [-1, N, 1 << 40])
def test_a_lane_that_is_not_there_is_refused(lane: int) -> None:
    made = batches(AutoresetMode.SAME_STEP, 3)
    store = ReplayBuffer(50, n_step=2, lanes=N)
    store.batch_insert(made[0])
    item = {**made[1][0], "lane": lane}
    for insert in (store.insert, lambda item: store.batch_insert([made[1][0], item])):
        with pytest.raises(ValueError, match="lane"):
            insert(item)
    assert len(store) == store.latest_data_id() == N
    with pytest.raises(ValueError, match="an integer at 'lane'"):
        ReplayBuffer(50, lanes=2).insert({k: v for k, v in made[0][0].items() if k != "lane"})
    with pytest.raises(ValueError, match="lanes need items with observations"):
        ReplayBuffer(50, lanes=2).insert({"lane": 1})
    with pytest.raises(ValueError, match="at least 1"):
        ReplayBuffer(50, lanes=0)


def test_what_does_not_go_together_is_said() -> None:
    envs = SyncVectorEnv([partial(Walk, 0)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    observations, _ = envs.reset()
    step = (observations, np.zeros(2), np.ones(2, bool), np.zeros(2, bool), {})
    transitions = VectorTransitions(envs)
    with pytest.raises(ValueError, match=r"\[0, 1\] have no episode"):
        transitions.take_step(np.zeros(2), *step)
    transitions.begin(observations)
    with pytest.raises(ValueError, match="of 2 environments"):
        transitions.begin({"at": np.zeros((3, 3)), "image": np.zeros((3, SIDE, SIDE))})
    transitions.take_step(np.zeros(2), *step)
    transitions.begin(observations, [True, False])
    with pytest.raises(ValueError, match=r"\[1\] have no episode"):
        transitions.take_step(np.zeros(2), *step)
    envs.metadata = {"autoreset_mode": "Sometimes"}
    with pytest.raises(ValueError, match="NextStep"):
        VectorTransitions(envs)
    envs.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    transitions = VectorTransitions(envs)
    transitions.begin(observations)
    with pytest.raises(ValueError, match="no final_obs"):
        transitions.take_step(np.zeros(2), *step)
    envs.close()


def test_extras_are_parts_of_the_items() -> None:
    envs = SyncVectorEnv([partial(Walk, lane) for lane in range(2)])
    transitions = VectorTransitions(envs)
    transitions.begin(envs.reset()[0])
    step = envs.step(np.zeros(2))
    batch = transitions.take_step(np.zeros(2), *step, extras={"policy_version": np.full(2, 7)})
    assert [item["policy_version"] for item in batch] == [7, 7]
    envs.close()
