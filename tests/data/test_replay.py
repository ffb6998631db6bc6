"""What the replay buffers give learners: random histories against a model, and the rest."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from edgeml.core.errors import Closed
from edgeml.data import (
    Batch,
    Mixture,
    Prefetch,
    PrioritizedReplayBuffer,
    QueuedDataStore,
    ReplayBuffer,
    ReplayBufferDataStore,
    checkpoint,
    on_device,
    prefetch,
    transition_example,
)
from edgeml.testing import StoreTests
from pairs import threads, wait_until
from replay_model import Model, PrioritizedModel, assert_same, observation, transition

Shape = tuple[int, int, int, int, bool]

SHAPES = [  # capacity, n_step, frame_stack, lanes that items tell, whether inserts tell some
    (5, 1, 1, 1, False),
    (1, 1, 1, 1, False),
    (2, 3, 1, 1, False),
    (7, 3, 1, 1, False),
    (1, 1, 3, 1, False),
    (6, 1, 3, 1, False),
    (7, 2, 4, 1, False),
    (7, 1, 1, 3, False),
    (3, 3, 1, 2, False),
    (9, 3, 1, 3, False),
    (8, 2, 3, 3, False),
    (7, 1, 1, 1, True),
    (9, 3, 1, 1, True),
    (8, 2, 3, 1, True),
    (11, 2, 3, 2, True),
]


def run(model: type[Model], shape: Shape, histories: int) -> None:
    names = "capacity", "n_step", "frame_stack", "lanes", "named"
    given = dict(zip(names, shape, strict=True))
    run_state_machine_as_test(
        type(f"{model.__name__}{shape}", (model,), given),
        settings=settings(
            max_examples=histories,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", [Model, PrioritizedModel])
def test_histories(model: type[Model], shape: Shape) -> None:
    run(model, shape, histories=6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", [Model, PrioritizedModel])
def test_thousands_of_histories(model: type[Model], shape: Shape) -> None:
    run(model, shape, histories=1000)


class TestTransitions(StoreTests):
    """Observations that are kept once come back as they were."""

    def make_store(self, capacity: int) -> ReplayBuffer:
        return ReplayBuffer(capacity, n_step=3, frame_stack=2)

    def make_item(self, i: int) -> Any:
        return transition(i, i, i + 1, False, i % 4 == 0)


class TestPrioritized(StoreTests):
    def make_store(self, capacity: int) -> ReplayBuffer:
        return PrioritizedReplayBuffer(capacity)

    def make_item(self, i: int) -> Any:
        return transition(i, i, i + 1, False, i % 4 == 0)


def episode(n: int, *, first: int = 1, **last: bool) -> list[dict[str, Any]]:
    """n transitions in a row, the last of which ends as told."""
    over = {"terminated": False, "truncated": False}
    return [
        transition(i, i, i + 1, **({**over, **last} if i == first + n - 1 else over))
        for i in range(first, first + n)
    ]


def carried(store: ReplayBuffer, other: ReplayBuffer, *between: Any) -> ReplayBuffer:
    """Fill another store as a checkpoint does; more is inserted after the first part was read."""
    latest, parts, at = store.latest_data_id(), [], 0
    while at < latest:
        parts.append(store.dump(at, limit=2 if between else latest - at))
        at = parts[-1][0].first_id + len(parts[-1][0]) - 1
        store.batch_insert(between)
        between = ()
    other.reset(parts[0][0].first_id)
    for part in parts:
        other.restore(*part)
    other.set_state(store.state())
    return other


class TestCheckpoints:
    """What a checkpoint has of a buffer beyond its items; the random histories have the rest."""

    @pytest.mark.parametrize("kind", [ReplayBuffer, PrioritizedReplayBuffer])
    @pytest.mark.parametrize("interrupted", [False, True])
    def test_a_larger_buffer_goes_on_as_the_smaller_one(
        self, kind: type[ReplayBuffer], interrupted: bool
    ) -> None:
        """Frames of items that are gone stay frames, and don't become items."""
        store = kind(3, frame_stack=3, n_step=2)
        store.batch_insert(episode(4))
        if interrupted:
            store.interrupt()
        store.batch_insert(episode(2, first=5))
        store.interrupt()
        store.batch_insert(episode(1, first=7))
        other = carried(store, kind(10, frame_stack=3, n_step=2))
        assert (len(store), len(other)) == (3, 3)
        other.batch_insert(episode(3, first=8))
        assert len(other) == 6
        before = [5, 5, 5] if interrupted else [3, 4, 5]
        expected = {  # first of its stack, and how far it looks ahead
            5: (before, 2),
            6: ([before[1], 5, 6], 1),
            7: ([7, 7, 7], 2),
            8: ([7, 7, 8], 2),
            9: ([7, 8, 9], 2),
            10: ([8, 9, 10], 1),
        }
        batch = other.sample(300)
        assert set(batch["actions"].tolist()) == expected.keys()
        for i, action in enumerate(batch["actions"].tolist()):
            frames, steps = expected[action]
            assert batch["observations"]["state"][i, :, 0].tolist() == frames
            assert batch["observations"]["image"][i, :, 0, 0].tolist() == frames
            assert batch["discounts"][i] == np.float32(0.99**steps)

    def test_inserts_between_its_parts_change_nothing(self) -> None:
        store = ReplayBuffer(4, frame_stack=2)
        store.batch_insert(episode(6))
        other = carried(store, ReplayBuffer(4, frame_stack=2), *episode(2, first=7))
        assert [item["actions"] for item in other.get_latest_data(0)] == [3, 4, 5, 6]
        batch = other.sample(100)
        assert (batch["observations"]["state"][:, 0, 0] == batch["actions"] - 1).all()

    def test_the_generator_goes_on(self) -> None:
        store = ReplayBuffer(50, seed=1)
        store.batch_insert(episode(50))
        store.sample(3)
        other = carried(store, ReplayBuffer(50, seed=2))
        np.testing.assert_array_equal(store.sample(9)["actions"], other.sample(9)["actions"])

    def test_priorities_go_into_a_smaller_buffer(self) -> None:
        store = PrioritizedReplayBuffer(9, frame_stack=2, seed=0)
        store.batch_insert(episode(8))
        store.update_priorities([6, 7, 8], [1e6, 1e6, 0])
        store.insert(episode(1, first=9)[0])  # which gets the highest
        other = carried(store, PrioritizedReplayBuffer(3, frame_stack=2))
        for expected in ((7, 9), (9, 10)):
            drawn = Counter(other.sample(1000)["ids"].tolist())
            assert min(drawn[i] for i in expected) > 450
            other.insert(episode(1, first=10)[0])


class TestKeepingOnce:
    def test_an_observation_takes_half_the_memory(self) -> None:
        n = 300
        store, apart = ReplayBuffer(n), ReplayBuffer(n)
        for item in episode(2 * n):
            store.insert(item)
            renamed = {f"{key}_": value for key, value in item.items()}
            apart.insert(renamed)
        assert store.nbytes < 0.55 * apart.nbytes
        for item in episode(n, first=900):  # it is the same in the long run
            store.batch_insert([item])
        assert store.nbytes < 0.55 * apart.nbytes

    def test_parts_may_come_in_another_order(self) -> None:
        """In the next observation, and in later items."""
        store, item = ReplayBuffer(5, n_step=2), episode(1)[0]
        item["next_observations"] = dict(reversed(item["next_observations"].items()))
        store.batch_insert([item, *(dict(reversed(i.items())) for i in episode(2, first=2))])
        batch = store.sample(30, keys=["actions", "next_observations"])
        following = np.minimum(batch["actions"] + 2, 4)
        assert (batch["next_observations"]["state"][:, 0] == following).all()
        assert (batch["next_observations"]["image"][:, 0, 0] == following).all()

    @pytest.mark.parametrize("part", ["image", "depth"])
    @pytest.mark.parametrize("together", [False, True])
    def test_what_differs_by_one_byte_is_kept_twice(self, part: str, together: bool) -> None:
        store = ReplayBuffer(10)
        items = episode(3)
        for item in items:
            for key in ("observations", "next_observations"):
                item[key]["depth"] = np.full((3, 500), item[key]["image"][0, 0], np.int8)
        items[1]["observations"][part][-1, -1] ^= 1
        if together:
            store.batch_insert(items)
        else:
            for item in items:
                store.insert(item)
        for back, item in zip(store.get_latest_data(0), items, strict=True):
            for key in ("observations", "next_observations"):
                for name, value in item[key].items():
                    np.testing.assert_array_equal(back[key][name], value)


class TestStacks:
    """Observations that come as stacks of frames; the random histories have the rest."""

    SHAPE = (3, 40, 40, 1)

    def make_items(self, n: int, *, cameras: int = 2) -> list[dict[str, Any]]:
        """Transitions of one episode, whose first stack repeats a frame."""
        frames = np.random.default_rng(0).integers(0, 256, (cameras, n + 3, *self.SHAPE[1:]))
        frames = frames.astype(np.uint8)
        frames[:, :2] = frames[:, 2:3]
        stacks = [
            {f"camera{i}": frames[i, t : t + 3] for i in range(cameras)} for t in range(n + 1)
        ]
        return [
            {
                "observations": {**stacks[t], "state": np.full((3, 2), t, np.float32)},
                "next_observations": {**stacks[t + 1], "state": np.full((3, 2), t + 1, np.float32)},
                "actions": np.int64(t),
                "rewards": np.float32(t),
                "masks": np.float32(1),
                "dones": np.bool_(t == n - 1),
            }
            for t in range(n)
        ]

    @pytest.mark.parametrize("together", [1, 7, 100])
    def test_a_frame_takes_memory_once(self, together: int) -> None:
        store, items = ReplayBuffer(50), self.make_items(100)
        frames = 2 * 40 * 40
        for _ in range(3):  # round the ring, again and again
            for first in range(0, 100, together):
                batch = items[first : first + together]
                store.insert(batch[0]) if together == 1 else store.batch_insert(batch)
            # Of each step one; two more where the episode begins; and where the last one led.
            assert 50 * frames <= store.nbytes - 50 * 100 <= (50 + together + 8) * frames
        for back, item in zip(store.get_latest_data(0), items[-50:], strict=True):
            assert_same(back, item)

    @pytest.mark.parametrize("together", [1, 3, 20])
    def test_memory_is_used_again(self, together: int) -> None:
        """Also where stacks don't overlap, and episodes are short."""
        store, items = ReplayBuffer(11), self.make_items(4, cameras=1)
        items[1]["next_observations"]["camera0"] = items[3]["observations"]["camera0"]
        sizes = []
        for _ in range(10):
            store.interrupt()
            for first in range(0, 100, together):
                batch = [items[i % 4] for i in range(first, min(100, first + together))]
                store.insert(batch[0]) if together == 1 else store.batch_insert(batch)
            sizes.append(store.nbytes)
        assert sizes[1] == sizes[-1]

    def test_two_robots_in_turn_take_it_once_as_well(self) -> None:
        items = [
            [{**item, "lane": np.int32(lane)} for item in self.make_items(40)] for lane in (0, 1)
        ]
        store = ReplayBuffer(60, lanes=2)
        store.batch_insert([item for step in zip(*items, strict=True) for item in step])
        assert store.nbytes < (60 + 60) * 2 * 40 * 40
        for item in store.get_latest_data(0):
            assert_same(item, items[item["lane"]][item["actions"]])

    def test_interventions_alone_are_kept_as_they_are(self) -> None:
        """What a person did in between: pieces of episodes, with gaps."""
        store, items = ReplayBuffer(100), self.make_items(60)
        pieces = [*items[3:9], *items[20:21], *items[40:55]]
        for item in pieces[:8]:
            store.insert(item)
        store.batch_insert(pieces[8:])
        for back, item in zip(store.get_latest_data(0), pieces, strict=True):
            assert_same(back, item)
        assert store.nbytes < (len(pieces) + 3 * 3) * 2 * 40 * 40 + 100 * 100

    @pytest.mark.parametrize("which", ["observations", "next_observations"])
    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize("together", [False, True])
    def test_one_byte_that_differs_is_kept(self, which: str, place: int, together: bool) -> None:
        store, items = ReplayBuffer(10), self.make_items(5)
        stack = items[2][which]["camera1"] = items[2][which]["camera1"].copy()
        stack[place, -1, -1] ^= 1
        if together:
            store.batch_insert(items)
        else:
            for item in items:
                store.insert(item)
        for back, item in zip(store.get_latest_data(0), items, strict=True):
            assert_same(back, item)

    def test_a_checkpoint_brings_them_back_kept_once(self, tmp_path: Path) -> None:
        store, items = ReplayBuffer(30), self.make_items(70)
        store.batch_insert(items)
        checkpoint.save(tmp_path / "saved", stores={"it": store})
        other = ReplayBuffer(30)
        checkpoint.load(tmp_path / "saved", {"it": other})
        assert other.nbytes <= store.nbytes
        for back, item in zip(other.get_latest_data(0), items[-30:], strict=True):
            assert_same(back, item)

    def test_both_observations_come_packed(self) -> None:
        store, items = ReplayBuffer(20), self.make_items(20)
        store.batch_insert(items)
        batch = store.sample(50, pack_obs_and_next_obs=True)
        assert batch.keys() == items[0].keys()
        assert batch["next_observations"].keys() == {"state"}
        out = store.empty_batch(50, ["observations", "actions"], pack_obs_and_next_obs=True)
        only = store.sample(50, keys=list(out), out=out, pack_obs_and_next_obs=True)
        for packed in batch, only:
            for key in "camera0", "camera1":
                assert packed["observations"][key].shape == (50, 4, 40, 40, 1)
                for t, frames in zip(packed["actions"], packed["observations"][key], strict=True):
                    np.testing.assert_array_equal(frames[:-1], items[t]["observations"][key])
                    np.testing.assert_array_equal(frames[1:], items[t]["next_observations"][key])
        assert (batch["next_observations"]["state"][:, 0, 0] == batch["actions"] + 1).all()

    @pytest.mark.parametrize("side", [40, 5])
    def test_stacks_of_one_frame_are_packed(self, side: int) -> None:
        """As HIL-SERL's environments give them; small ones, which lie elsewhere, too."""
        store = ReplayBuffer(20)
        for item in self.make_items(20, cameras=1):
            for which in "observations", "next_observations":
                item[which] = item[which]["camera0"][-1:, :side, :side]
            store.insert(item)
        batch = store.sample(30, pack_obs_and_next_obs=True)
        assert "next_observations" not in batch, "it was that array alone"
        apart = {int(item["actions"]): item for item in store.get_latest_data(0)}
        for t, frames in zip(batch["actions"].tolist(), batch["observations"], strict=True):
            np.testing.assert_array_equal(frames[:-1], apart[t]["observations"])
            np.testing.assert_array_equal(frames[1:], apart[t]["next_observations"])

    @pytest.mark.parametrize("side", [40, 5])
    def test_what_can_not_be_packed_is_said(self, side: int) -> None:
        items = self.make_items(3, cameras=1)
        for item in items:
            for which in "observations", "next_observations":
                item[which] = {"camera0": item[which]["camera0"][:, :side, :side].copy()}
        items[1]["next_observations"]["camera0"][0, 1, 1] ^= 1
        store = ReplayBuffer(20)
        store.batch_insert(items)
        error = r"\['next_observations'\]\['camera0'\] of the item 2 does not begin"
        with pytest.raises(ValueError, match=error):
            store.sample(50, pack_obs_and_next_obs=True)
        assert store.sample(50)["observations"]["camera0"].shape == (50, 3, side, side, 1)
        with pytest.raises(ValueError, match="among the keys"):
            store.sample(5, keys=["actions"], pack_obs_and_next_obs=True)
        store = ReplayBuffer(20)
        store.insert({"x": np.zeros((3, 4, 4, 1))})
        with pytest.raises(ValueError, match="transitions with stacks"):
            store.sample(5, pack_obs_and_next_obs=True)

    def test_stacks_of_the_buffer_s_own_are_packed(self) -> None:
        store = ReplayBuffer(20, frame_stack=2)
        items = self.make_items(8, cameras=1)
        for item in items:
            for which in "observations", "next_observations":
                item[which] = {"image": item[which]["camera0"][-1], "state": item[which]["state"]}
        store.batch_insert(items)
        batch = store.sample(50, pack_obs_and_next_obs=True)
        for t, frames in zip(batch["actions"], batch["observations"]["image"], strict=True):
            right = [items[max(0, t - 1)]["observations"], items[t]["observations"]]
            right.append(items[t]["next_observations"])
            np.testing.assert_array_equal(frames, [each["image"] for each in right])
        assert batch["observations"]["state"].shape == (50, 2, 3, 2)

    def test_a_mixture_packs_as_well(self) -> None:
        stores = ReplayBuffer(20), ReplayBuffer(20)
        for store in stores:
            store.batch_insert(self.make_items(20))
        mixture = Mixture([(stores[0], 0.5), (stores[1], 0.5)])
        with mixture.prefetch(10, pack_obs_and_next_obs=True) as batches:
            batch = next(batches)
        assert batch["observations"]["camera1"].shape == (10, 4, 40, 40, 1)
        assert batch["next_observations"].keys() == {"state"}

    def test_an_iterator_under_serl_s_name(self) -> None:
        store = ReplayBuffer(20)
        store.batch_insert(self.make_items(20))
        arguments = {"batch_size": 5, "pack_obs_and_next_obs": True}
        with store.get_iterator(sample_args=arguments, device=jax.devices()[0]) as batches:
            batch = next(batches)
            assert isinstance(batch["observations"]["camera0"], jax.Array)
            assert batch["observations"]["camera0"].shape == (5, 4, 40, 40, 1)
        with pytest.raises(TypeError, match="batch_size"):
            store.get_iterator()


class TestNSteps:
    def test_truncated_is_not_terminated(self) -> None:
        for ending, mask in (("terminated", 0.0), ("truncated", 1.0)):
            store = ReplayBuffer(10, n_step=4, discount=0.5)
            store.batch_insert(episode(2, **{ending: True}) + episode(4, first=10))
            batch = store.sample(200)
            first = batch["actions"] == 1
            np.testing.assert_allclose(batch["rewards"][first], -1 + 0.5 * 0)
            assert set(batch["discounts"][first]) == {0.25 * mask}
            assert set(batch["masks"][first]) == {mask}
            assert set(batch["next_observations"]["state"][first, 0]) == {3.0}

    def test_a_transition_is_needed(self) -> None:
        for options in ({"n_step": 2}, {"frame_stack": 2}):
            with pytest.raises(ValueError, match="next_observations"):
                ReplayBuffer(5, **options).insert({"observations": np.zeros(3)})
            for unlike in (np.zeros((33, 34), np.uint8), np.zeros((33, 33)), {"image": 0}):
                parts = {"observations": np.zeros((33, 33), np.uint8), "next_observations": unlike}
                with pytest.raises(ValueError, match=r"\(alike\)"):
                    ReplayBuffer(5, **options).insert({**episode(1)[0], **parts})
        with pytest.raises(ValueError, match="rewards as floats"):
            ReplayBuffer(5, n_step=2).insert({**episode(1)[0], "rewards": 1})
        with pytest.raises(ValueError, match="at least 1"):
            ReplayBuffer(5, n_step=0)
        with pytest.raises(ValueError, match="discount"):
            ReplayBuffer(5, discount=1.5)

    def test_a_key_that_is_added_is_refused_in_an_item(self) -> None:
        with pytest.raises(ValueError, match="'discounts'"):
            ReplayBuffer(5, n_step=2).insert({**episode(1)[0], "discounts": 1.0})

    def test_frames_of_states_are_stacked_too(self) -> None:
        store = ReplayBuffer(10, frame_stack=3)
        store.batch_insert(episode(5))
        batch = store.sample(50)
        for last, stack in zip(batch["actions"], batch["observations"]["state"], strict=True):
            assert stack[:, 0].tolist() == [max(1, last - 2), max(1, last - 1), last]


class TestSampling:
    def test_what_can_not_be_sampled_is_said(self) -> None:
        store = ReplayBuffer(5, example=episode(1)[0])
        with pytest.raises(ValueError, match="empty"):
            store.sample(1)
        store.batch_insert(episode(3))
        with pytest.raises(ValueError, match=r"\['other'\]; there are \['observations'"):
            store.sample(1, keys=["other"])
        with pytest.raises(ValueError, match="batch_size"):
            store.empty_batch(0)

    @pytest.mark.parametrize("size", [256 / 2, 128.0, np.float64(128), "128", None])
    def test_a_size_that_is_no_integer_spoils_nothing(self, size: Any) -> None:
        store = ReplayBuffer(5)
        store.batch_insert(episode(3))
        mixture = Mixture([(store, 1), (store, 1)])
        for source in (store, mixture):
            for draw in (source.sample, source.empty_batch):
                with pytest.raises(TypeError, match="batch_size is an integer"):
                    draw(size)
            assert len(source.sample(128)["actions"]) == 128
            assert len(source.sample(np.int64(128))["actions"]) == 128
        with pytest.raises(TypeError, match="batch_size"):
            store.sample(256 / 2, out=store.empty_batch(128))

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda out: out.pop("actions"),
            lambda out: out.update(rewards=np.zeros(5, np.float32)),
            lambda out: out.update(rewards=np.zeros(4, np.float64)),
            lambda out: out.update(rewards=np.zeros(8, np.float32)[::2]),
            lambda out: out.update(rewards=[0.0] * 4),
            lambda out: out["rewards"].setflags(write=False),
        ],
    )
    def test_out_must_fit(self, spoil: Any) -> None:
        store = ReplayBuffer(5)
        store.batch_insert(episode(3))
        out = store.empty_batch(4)
        spoil(out)
        with pytest.raises(ValueError, match=r"out|item"):
            store.sample(4, out=out)

    def test_the_version_of_the_policy_can_be_told(self) -> None:
        store = ReplayBuffer(1000)
        store.batch_insert(episode(999))  # of the versions 0 to 249
        assert min(store.sample(99, max_policy_lag=3)["policy_version"]) >= 246
        recent = store.sample(500, max_policy_lag=3, policy_version=252)["policy_version"]
        assert set(recent.tolist()) == {249}
        with pytest.raises(ValueError, match="from version 250 on"):
            store.sample(2, max_policy_lag=0, policy_version=250)
        other = ReplayBuffer(5)
        other.insert((1.0,))
        with pytest.raises(ValueError, match="policy_version"):
            other.sample(1, max_policy_lag=1)

    def test_few_that_are_new_enough_are_drawn_evenly(self) -> None:
        store = ReplayBuffer(5000)
        store.reset(4000)  # so that they lie around the end of the ring
        store.batch_insert(episode(3999))
        drawn = Counter(store.sample(4000, max_policy_lag=0)["actions"].tolist())
        assert drawn.keys() == set(range(3996, 4000))
        assert min(drawn.values()) > 850

    def test_all_versions_that_are_new_enough_are_drawn_evenly(self) -> None:
        store = ReplayBuffer(20)
        store.batch_insert(episode(15))  # of the versions 0 to 3
        drawn = Counter(store.sample(4000, max_policy_lag=1)["policy_version"].tolist())
        assert drawn.keys() == {2, 3}
        assert drawn[3] > 1700
        assert drawn[2] > 1700

    def test_extras_are_part_of_the_schema(self) -> None:
        import gymnasium as gym

        box = gym.spaces.Box(-1, 1, (2,), np.float32)
        store = ReplayBufferDataStore(box, box, 5, extras={"policy_version": 0})
        item = {**transition_example(box, box), "policy_version": 7}
        store.insert(item)
        assert store.sample(1)["policy_version"].tolist() == [7]


class TestPriorities:
    def test_items_are_drawn_by_their_priorities(self) -> None:
        store = PrioritizedReplayBuffer(4, alpha=0.5, seed=0)
        for i in range(1, 4):
            store.insert(episode(1, first=i)[0])
            assert sorted(store.sample(i)["ids"]) == list(range(1, i + 1))  # one of each part
        store.insert(episode(1, first=4)[0])
        store.update_priorities([1, 2, 3, 4], [0, 1, 4, 9])
        drawn = Counter(store.sample(60_000)["ids"].tolist())
        for item_id, share in ((2, 1 / 6), (3, 2 / 6), (4, 3 / 6)):
            assert abs(drawn[item_id] / 60_000 - share) < 0.01
        assert drawn[1] < 100
        assert {int(store.sample(1)["ids"][0]) for _ in range(60)} == {2, 3, 4}

    def test_weights_make_up_for_it(self) -> None:
        store = PrioritizedReplayBuffer(10, beta=1.0, seed=0)
        store.batch_insert(episode(4))
        store.update_priorities([1, 2, 3, 4], [1, 2, 3, 4])
        batch = store.sample(40_000)
        weights = {i: batch["weights"][batch["ids"] == i].sum() for i in (1, 2, 3, 4)}
        assert max(weights.values()) < 1.03 * min(weights.values())
        assert batch["weights"].max() == 1
        store.beta = 0
        assert set(store.sample(9)["weights"]) == {1.0}

    @pytest.mark.parametrize(
        ("ids", "priorities"),
        [
            ([1], [-1.0]),
            ([1], [np.nan]),
            ([1], [np.inf]),
            ([1, 2], [9, 1e300]),
            ([0], [1]),
            ([5], [1]),
            ([1, 2], [1]),
            ([[1]], [[1]]),
            ([1.0], [1]),
        ],
    )
    def test_what_makes_no_priority_is_refused(self, ids: Any, priorities: Any) -> None:
        store = PrioritizedReplayBuffer(3, alpha=2)
        store.batch_insert(episode(4))
        with pytest.raises(ValueError, match=r"priorit|ids|value"):
            store.update_priorities(ids, priorities)
        store.insert(episode(1, first=5)[0])
        assert set(store.sample(20)["weights"]) == {1.0}
        assert store.stale == 0

    def test_its_settings_are_checked(self) -> None:
        for settings_ in ({"alpha": -1}, {"alpha": np.nan}, {"epsilon": 0}, {"epsilon": np.inf}):
            with pytest.raises(ValueError, match="alpha"):
                PrioritizedReplayBuffer(10, **settings_)
        with pytest.raises(ValueError, match="'weights'"):
            PrioritizedReplayBuffer(10).insert({"weights": 1.0})

    def test_a_version_filter_keeps_to_the_priorities(self) -> None:
        store = PrioritizedReplayBuffer(4000, seed=0)
        store.batch_insert(episode(3999))
        store.update_priorities([3998, 3999], [0, 0])
        drawn = Counter(store.sample(2000, max_policy_lag=0)["ids"].tolist())
        assert set(drawn) <= {3996, 3997, 3998, 3999}
        assert drawn[3998] + drawn[3999] < 20


class TestMixture:
    def stores(self) -> tuple[ReplayBuffer, ReplayBuffer]:
        online, demonstrations = ReplayBuffer(50), ReplayBuffer(50)
        online.batch_insert(episode(20))
        demonstrations.batch_insert(episode(20, first=100))
        return online, demonstrations

    def test_half_and_half(self) -> None:
        online, demonstrations = self.stores()
        batch = Mixture([(online, 1), (demonstrations, 1)]).sample(8)
        assert (batch["actions"][:4] < 100).all()
        assert (batch["actions"][4:] >= 100).all()
        assert (batch["observations"]["state"][:, 0] == batch["actions"]).all()

    @pytest.mark.parametrize("shares", [(0.9, 0.1), (1, 2), (1e-3, 1), (5, 1e-9)])
    def test_shares_are_right_in_the_long_run(self, shares: tuple[float, float]) -> None:
        online, demonstrations = self.stores()
        mixture = Mixture([(online, shares[0]), (demonstrations, shares[1])])
        n = sum(
            int((mixture.sample(7, keys=["actions"])["actions"] < 100).sum()) for _ in range(200)
        )
        assert abs(n - 1400 * shares[0] / sum(shares)) <= 1

    def test_shares_of_many_are_right_at_any_size(self) -> None:
        shares = np.array([0.09, 0.7, 0.01, 0.09, 0.87])
        functions = [lambda n, keys, i=i: {"source": np.full(n, i)} for i in range(5)]
        mixture = Mixture(list(zip(functions, shares, strict=True)))
        rng = np.random.default_rng(1)  # whose sizes bring some their items too early
        sizes = [int(rng.integers(1, 4)) for _ in range(200)]
        drawn = np.concatenate([mixture.sample(n)["source"] for n in sizes])
        due = sum(sizes) * shares / shares.sum()
        assert np.abs(np.bincount(drawn, minlength=5) - due).max() < 1.5

    def test_a_function_will_do(self) -> None:
        online, _ = self.stores()

        def other(n: int, keys: Any) -> Any:
            assert tuple(keys) == ("rewards",)
            return {"rewards": jax.numpy.full(n, 7.0)}

        for sources in ([(online, 1), (other, 1)], [(other, 1), (online, 1)]):
            batch = Mixture(sources).sample(6, keys=("rewards",))
            assert (batch["rewards"] == 7).sum() == 3
        nested = Mixture([(Mixture([(online, 1)]), 1), (online, 1)])
        assert nested.sample(6)["actions"].shape == (6,)

    def test_a_store_that_is_empty_is_named(self) -> None:
        online, demonstrations = ReplayBuffer(5), PrioritizedReplayBuffer(5)
        online.batch_insert(episode(3))
        mixture = Mixture([(online, 1), (demonstrations, 1)])
        with pytest.raises(ValueError, match=r"source 1 .*a PrioritizedReplayBuffer.*empty"):
            mixture.sample(4, keys=["actions"])
        with pytest.raises(ValueError, match=r"source 0 .*empty"):
            Mixture([(demonstrations, 1), (online, 1)]).sample(4)

    def test_what_does_not_mix_is_said(self) -> None:
        online, _ = self.stores()
        for shares in ([], [(online, 0)], [(online, -1)], [(online, np.nan)]):
            with pytest.raises(ValueError, match="shares"):
                Mixture(shares)
        with pytest.raises(TypeError, match="give a function"):
            Mixture([(QueuedDataStore(3), 1)])
        with pytest.raises(ValueError, match="first source"):
            Mixture([(online, 1), (lambda n, keys: {"rewards": np.zeros(n)}, 1)]).sample(4)
        for wrong in (np.zeros(1, np.int64), np.int64(0), np.zeros(2), {"a": np.zeros(2)}):
            source = {"actions": wrong}
            with pytest.raises(
                ValueError, match=r"batch\['actions'\]: expected shape \(2,\) int64"
            ):
                Mixture([(online, 1), (lambda n, keys, s=source: s, 1)]).sample(4, keys=["actions"])
        for n in (3, 5):
            with pytest.raises(ValueError, match="items for a batch of 4"):
                Mixture([(online, 1)]).sample(4, out=online.empty_batch(n))


class TestPrefetch:
    def test_batches_come_on_the_device_and_stay_as_they_are(self) -> None:
        """On a CPU a device array is the numpy array's memory: none may be used twice."""
        store = ReplayBuffer(64)
        store.batch_insert(episode(64))
        with store.prefetch(2000, device=jax.devices()[0], keys=["actions", "rewards"]) as batches:
            kept = [(b, np.array(b["rewards"])) for b in itertools.islice(batches, 20)]
            assert isinstance(kept[0][0]["rewards"], jax.Array)
            gc.collect()
            for _ in range(20):
                store.sample(2000)
            for batch, rewards in kept:
                np.testing.assert_array_equal(np.asarray(batch["rewards"]), rewards)

    def test_arrays_put_on_a_device_may_be_used_again(self) -> None:
        array = np.zeros((1 << 20) + 1, np.float32)[1:]  # such as JAX can't take as it is
        for i in range(20):
            array[:] = i
            placed = on_device({"x": array}, jax.devices()[0])
            array[:] = -1
            assert (np.asarray(placed["x"]) == i).all()

    def test_an_error_comes_in_its_turn_and_ends_it(self) -> None:
        made: list[int] = []

        def sample() -> int:
            made.append(len(made))
            if len(made) == 3:
                raise SystemExit
            return made[-1]

        batches = Prefetch(sample, depth=9)
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(SystemExit):
            next(batches)
        assert list(batches) == []
        assert len(made) == 3

    def test_it_draws_no_further_ahead_and_ends_its_thread(self) -> None:
        before = set(threading.enumerate())
        ahead, made = threading.Semaphore(0), itertools.count()

        def sample() -> int:
            ahead.release()
            return next(made)

        with Prefetch(sample, depth=3) as batches:
            next(batches)
            for _ in range(5):  # the one taken, three that are ready, and one in hand
                assert ahead.acquire(timeout=10)
        assert next(made) == 5
        assert set(threading.enumerate()) <= before
        assert list(batches) == []

    @pytest.mark.parametrize("device", [None, jax.devices()[0]])
    def test_one_that_is_dropped_ends_its_threads_and_says_so(self, device: Any) -> None:
        before = threads()
        store = ReplayBuffer(64)
        store.batch_insert(episode(64))
        dropped = weakref.ref(store)
        batches = store.prefetch(4, device=device)
        next(batches)
        with pytest.warns(ResourceWarning, match="before it was closed"):
            del batches
        del store
        wait_until(lambda: threads() <= before)
        gc.collect()
        assert dropped() is None, "the buffer is still alive"

    def test_one_batch_is_drawn_while_another_is_put_on_the_device(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each waits for the other to be at work; where they take turns, both wait in vain."""
        both, drawn = threading.Barrier(2, timeout=10), itertools.count()

        def sample() -> int:
            if number := next(drawn):  # while the one before is being put
                both.wait()
            return number

        def place(batch: int, device: Any) -> int:
            both.wait()
            return batch

        monkeypatch.setattr(prefetch, "on_device", place)
        with Prefetch(sample, device="slow") as batches:
            assert list(itertools.islice(batches, 20)) == list(range(20))
            both.abort()

    def test_an_error_on_the_device_comes_in_its_turn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def place(batch: int, device: Any) -> int:
            if batch == 2:
                raise MemoryError("no more on the device")
            return batch

        monkeypatch.setattr(prefetch, "on_device", place)
        batches = Prefetch(itertools.count().__next__, device="small")
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(MemoryError, match="no more"):
            next(batches)
        assert list(batches) == []

    def test_a_forked_child_is_told_to_make_its_own(self) -> None:
        store = ReplayBuffer(8)
        store.batch_insert(episode(8))
        with store.prefetch(4) as batches:
            next(batches)
            child = os.fork()
            if not child:
                try:
                    try:
                        next(batches)
                    except Closed:
                        batches.close()
                        del batches
                        with store.prefetch(4) as own:
                            next(own)
                        os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(wait_for(child)) == 0

    def test_what_it_is_given_is_checked(self) -> None:
        with pytest.raises(ValueError, match="depth"):
            Prefetch(lambda: 1, depth=0)
        with pytest.raises(ValueError, match="no out"):
            ReplayBuffer(5).prefetch(1, out={})

    def test_keys_may_be_an_iterator(self) -> None:
        store = ReplayBuffer(5)
        store.batch_insert(episode(5))
        mixture = Mixture([(store, 1), (store, 1)])
        assert list(mixture.sample(2, keys=iter(["actions"]))) == ["actions"]
        for source in (store, mixture):
            with source.prefetch(2, keys=iter(["actions"])) as batches:
                assert [list(next(batches)) for _ in range(4)] == [["actions"]] * 4

    def test_a_program_may_end_with_one_open(self) -> None:
        """A thread that Python cuts off within JAX would abort it."""
        program = """
import jax, numpy as np
from edgeml.data import Prefetch
arrays = [np.zeros(30, np.float32)] * 300
batches = Prefetch(lambda: arrays, device=jax.devices()[0], depth=1000)
next(batches)
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, b"")


def wait_for(child: int, timeout: float = 20.0) -> int:
    """The status with which a forked child ended; it is killed where it takes too long."""
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            ended.append(status)
        return bool(pid)

    try:
        wait_until(has_ended, timeout)
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return ended[0]


def test_large_samples_may_be_changed_after_they_were_sent() -> None:
    """Their memory is reused, but it is no memory that messages take as theirs."""
    from edgeml.core.message import Message, is_owned, own

    store = ReplayBuffer(5)
    store.insert((np.zeros(100_000, np.uint8),))
    sampled = store.sample(3)[0]
    view = memoryview(sampled).cast("B")
    assert not is_owned(view)
    sent = own(Message(b"", [view]))
    sampled[:] = 1
    assert not any(sent.buffers[0][:100])


def test_observations_are_told_apart_in_the_model() -> None:
    assert (observation(1)["image"] != observation(2)["image"]).all()


def test_a_batch_of_the_store_can_be_inserted_again() -> None:
    store = ReplayBuffer(40, n_step=2)
    store.batch_insert(episode(30))
    other = ReplayBuffer(20)
    other.batch_insert(Batch.from_payload(store.get_latest_data(0).to_payload()))
    assert sorted(set(other.sample(400)["actions"].tolist())) == list(range(11, 31))
