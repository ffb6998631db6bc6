"""agentlace's buffers and datasets on edgeml's; among them agentlace's own tests, by hand."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from agentlace.data.data_store import QueuedDataStore
from agentlace.data.jaxrl_data_store import (
    MemoryEfficientReplayBufferDataStore,
    ReplayBufferDataStore,
    TrajectoryBufferDataStore,
    make_default_trajectory_buffer,
)
from agentlace.data.sampler import FutureSampler, LatestSampler, SequenceSampler
from agentlace.data.tfds import make_datastore, populate_datastore
from agentlace.data.trajectory_buffer import DataShape, TrajectoryBuffer

from edgeml.data.rlds import RLDSLogger

pytest.importorskip("jax")

# Trajectories: agentlace's tests/test_data_store.py ------------------------------------------

CAPACITY = 100


def make_buffer(min_trajectory_length: int = 2) -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(
        capacity=CAPACITY,
        data_shapes=[
            DataShape(name="data"),
            DataShape(name="index", dtype="int32"),
            DataShape(name="trajectory_id", dtype="int32"),
        ],
        min_trajectory_length=min_trajectory_length,
    )
    latest = {name: LatestSampler() for name in ("data", "index", "trajectory_id")}
    buffer.register_sample_config("default", latest)
    return buffer


def insert(buffer: TrajectoryBuffer, length: int, number: int, end: bool = True) -> None:
    for i in range(length):
        buffer.insert({"data": random.random(), "index": i, "trajectory_id": number}, False)
    if end:
        buffer.end_trajectory()


def test_what_was_inserted_can_be_sampled_by_its_place() -> None:
    buffer = make_buffer()
    for number, length in enumerate((10, 15, 20)):
        insert(buffer, length, number)
    data, _ = buffer.sample("default", 64, force_indices=np.arange(45))
    expected = [i for length in (10, 15, 20) for i in range(length)]
    assert np.asarray(data["index"]).tolist() == expected
    data, valid = buffer.sample("default", 64)
    assert data["data"].shape == valid["data"].shape == (64,)


def test_sequences_stay_in_their_trajectories_as_the_ring_goes_round() -> None:
    buffer = make_buffer()
    buffer.register_sample_config(
        "sequence",
        {
            "index_prev": SequenceSampler(begin=-3, end=1, source="index"),
            "index_future": SequenceSampler(begin=0, end=4, source="index"),
            "index": LatestSampler(),
            "trajectory_id": LatestSampler(),
        },
    )
    for number, length in enumerate((10, 15, 20, 75)):
        insert(buffer, length, number)
    assert len(buffer) == CAPACITY
    data, valid = buffer.sample("sequence", 100, force_indices=np.arange(20, 120))
    ids, index = np.asarray(data["trajectory_id"]), np.asarray(data["index"])
    assert set(ids) == {1, 2, 3}  # the first was overwritten, and part of the second
    before = index[:, None] + np.arange(-3, 1)
    lost = (ids == 1)[:, None] & (before < 10)
    assert not (np.asarray(valid["index_prev"]) & lost).any()
    length = np.array([0, 15, 20, 75])[ids]
    past = index[:, None] + np.arange(4) >= length[:, None]
    assert (np.asarray(valid["index_future"]) == ~past).all()
    assert (np.asarray(data["index_future"])[~past] == (index[:, None] + np.arange(4))[~past]).all()


def test_a_range_that_needs_neighbours_leaves_out_the_ends() -> None:
    buffer = make_buffer(min_trajectory_length=3)
    buffer.register_sample_config("padded", {"index": LatestSampler()}, (-1, 2))
    for number in range(3):
        insert(buffer, 40, number)
    index = np.asarray(buffer.sample("padded", 300)[0]["index"])
    assert index.min() > 0
    assert index.max() < 39


def test_trajectories_that_are_too_short_are_not_sampled() -> None:
    buffer = make_buffer(min_trajectory_length=3)
    latest = {"trajectory_id": LatestSampler()}
    buffer.register_sample_config("padded", latest, (-1, 2))
    insert(buffer, 10, 0)
    insert(buffer, 2, 1)
    assert not np.asarray(buffer.sample("padded", 100)[0]["trajectory_id"]).any()
    insert(buffer, 1, 2, end=False)  # it goes on, and has one step as yet
    assert not np.asarray(buffer.sample("padded", 100)[0]["trajectory_id"]).any()
    insert(buffer, 9, 2, end=False)
    assert (np.asarray(buffer.sample("padded", 300)[0]["trajectory_id"]) == 2).any()


def test_one_that_becomes_too_short_by_being_overwritten_is_not_sampled_either() -> None:
    buffer = make_buffer(min_trajectory_length=3)
    buffer.register_sample_config("padded", {"trajectory_id": LatestSampler()}, (-1, 2))
    for number in range(10):
        insert(buffer, 10, number)
    insert(buffer, 8, 10)
    assert np.asarray(buffer.sample("padded", 300)[0]["trajectory_id"]).all()


def test_a_buffer_is_saved_and_loaded(tmp_path: Path) -> None:
    buffer = make_buffer()
    for number in range(10):
        insert(buffer, 5, number)
    for number in range(8):
        insert(buffer, 8, number)
    buffer.save(tmp_path / "test.npz")
    loaded = TrajectoryBuffer.load(tmp_path / "test.npz")
    assert loaded.capacity == buffer.capacity
    assert loaded.latest_data_id() == buffer.latest_data_id() == 114
    ours, theirs = loaded.get_latest_data(0).columns, buffer.get_latest_data(0).columns
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    loaded.register_sample_config("default", {"index": LatestSampler()})
    assert loaded.sample("default", 4)[0]["index"].shape == (4,)


def test_a_later_step_is_drawn_from_the_same_trajectory() -> None:
    buffer = make_buffer()
    kinds = FutureSampler.Distribution
    buffer.register_sample_config(
        "goals",
        {
            "index": LatestSampler(use_jax=True),
            "soon": FutureSampler(max_future=3, source="index"),
            "later": FutureSampler(kinds.EXPONENTIAL, lambda_=2.0, source="index"),
        },
        sample_range=(0, 2),
    )
    insert(buffer, 30, 0)
    data, _ = buffer.sample("goals", 500)
    index, soon, later = (np.asarray(data[key]) for key in ("index", "soon", "later"))
    assert ((soon > index) & (soon <= index + 3)).all()
    assert 1 < (later - index).mean() < 3.5  # of offsets from 1 on


def test_a_store_of_trajectories_takes_items_with_and_without_their_end() -> None:
    shapes = [DataShape("x", dtype="float64"), DataShape("end_of_trajectory", dtype="bool")]
    store = TrajectoryBufferDataStore(10, shapes, None, 3, 1)
    store.register_sample_config("all", {"x": SequenceSampler(False, 0, 2)})
    store.insert({"x": 1.0, "extra": "ignored"})
    store.batch_insert([{"x": 2.0}, {"x": 3.0}])
    store.insert({"x": 4.0, "end_of_trajectory": True})
    store.batch_insert([{"x": 5.0, "end_of_trajectory": True}, {"x": 6.0}])
    assert store.latest_data_id() == 6
    _, valid = store.sample("all", 0, force_indices=range(6))
    assert np.asarray(valid["x"])[:, 1].tolist() == [True, True, True, False, False, False]


# Transitions --------------------------------------------------------------------------------

SPACES = gymnasium.spaces.Dict(
    {
        "position": gymnasium.spaces.Box(0, 10, (1,), np.int32),
        "velocity": gymnasium.spaces.Box(-1, 1, (1,), np.float32),
    }
)
ACTIONS = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


def transition(number: int, **more: Any) -> dict[str, Any]:
    def observation(number: int) -> dict[str, Any]:
        return {"position": np.array([number]), "velocity": np.array([number / 100])}

    return {
        "observations": observation(number),
        "next_observations": observation(number + 1),
        "actions": np.full(2, number / 100, np.float32),
        "rewards": 1.0,
        "masks": 1.0,
        **more,
    }


def test_a_replay_buffer_takes_what_scripts_insert() -> None:
    store = ReplayBufferDataStore(SPACES, ACTIONS, 100, include_grasp_penalty=True)
    assert store.latest_data_id() == 0
    store.insert(transition(0, grasp_penalty=0.5, infos={"env": object()}))
    store.insert(transition(1, masks=0.0, dones=True, grasp_penalty=0.0))
    store.batch_insert([transition(2, grasp_penalty=1), transition(3, masks=0, grasp_penalty=1)])
    assert (len(store), store.latest_data_id()) == (4, 4)
    assert store.get_latest_data(0).columns["dones"].tolist() == [False, True, False, True]
    batch = store.sample(64)
    assert batch["observations"]["position"].shape == (64, 1)
    assert batch["observations"]["velocity"].dtype == np.float32
    assert set(batch["grasp_penalty"]) <= {0.0, 0.5, 1.0}
    assert set(store.sample(2, ["actions", "rewards"])) == {"actions", "rewards"}
    with pytest.raises(NotImplementedError, match="indx"):
        store.sample(2, indx=np.arange(2))  # type: ignore[arg-type]


def test_batches_are_drawn_ahead_and_put_on_the_device() -> None:
    import jax

    store = ReplayBufferDataStore(SPACES, ACTIONS, 100)
    store.insert(transition(0))
    with store.get_iterator(queue_size=2, sample_args={"batch_size": 8}) as batches:
        batch = next(batches)
    assert isinstance(batch["actions"], jax.Array)
    assert batch["actions"].shape == (8, 2)


def test_batches_are_frozen_where_flax_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    flax = types.ModuleType("flax.core.frozen_dict")
    flax.freeze = lambda batch: ("frozen", batch)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flax.core.frozen_dict", flax)
    store = ReplayBufferDataStore(SPACES, ACTIONS, 100)
    store.insert(transition(0))
    assert store.sample(2)[0] == "frozen"


@pytest.mark.parametrize("n_frames", [1, 3])
def test_frames_of_both_observations_come_in_one_array(n_frames: int) -> None:
    space = gymnasium.spaces.Dict(
        {
            "state": gymnasium.spaces.Box(-1, 1, (n_frames, 4), np.float64),
            "wrist": gymnasium.spaces.Box(0, 255, (n_frames, 32, 32, 3), np.uint8),
        }
    )
    store = MemoryEfficientReplayBufferDataStore(
        space, ACTIONS, 300, image_keys=("wrist",), include_grasp_penalty=True
    )
    for _ in range(4):
        frames = [np.random.randint(0, 255, (32, 32, 3), np.uint8)] * n_frames
        for number in range(20):
            observations = {"state": np.full((n_frames, 4), number), "wrist": np.stack(frames)}
            frames = [*frames[1:], np.random.randint(0, 255, (32, 32, 3), np.uint8)]
            following = {"state": np.full((n_frames, 4), number + 1), "wrist": np.stack(frames)}
            store.insert(
                {
                    "observations": observations,
                    "next_observations": following,
                    "actions": np.zeros(2),
                    "rewards": 0.0,
                    "masks": 1.0,
                    "dones": number == 19,
                    "grasp_penalty": -0.1,
                }
            )
    held = store.get_latest_data(0)
    packed = store.sample(batch_size=64, pack_obs_and_next_obs=True)
    assert packed["observations"]["wrist"].shape == (64, n_frames + 1, 32, 32, 3)
    assert set(packed["next_observations"]) == {"state"}
    whole = {
        np.concatenate(
            (item["observations"]["wrist"], item["next_observations"]["wrist"][-1:])
        ).tobytes()
        for item in held
    }
    assert {stack.tobytes() for stack in packed["observations"]["wrist"]} <= whole
    frame = 32 * 32 * 3
    assert store.nbytes < 300 * frame * 2.5  # however many frames a stack has


def test_image_keys_name_observations() -> None:
    with pytest.raises(KeyError, match="wrist"):
        MemoryEfficientReplayBufferDataStore(SPACES, ACTIONS, 10, image_keys=("wrist",))


def test_the_default_trajectory_buffer_samples_transitions() -> None:
    store = make_default_trajectory_buffer(SPACES, ACTIONS, 100)
    for number in range(6):
        store.insert(transition(number, end_of_trajectory=number == 2))
    batch, mask = store.sample("training", 50)
    after, before = batch["next_observations"]["position"], batch["observations"]["position"]
    assert (np.asarray(after) == np.asarray(before) + 1).all()
    assert np.asarray(mask["rewards"]).all()


# Datasets: agentlace's tests/test_tfds.py -----------------------------------------------------

EPISODES, STEPS = 4, 15


def log_episodes(directory: Path, kind: str) -> None:
    """Log transitions by a store, as they are inserted."""
    with RLDSLogger(directory, name="test_rlds_env") as logger:
        make = {
            "replay_buffer": ReplayBufferDataStore,
            "trajectory_buffer": make_default_trajectory_buffer,
        }[kind]
        store = make(SPACES, ACTIONS, capacity=20, rlds_logger=logger)
        for _ in range(EPISODES):
            for number in range(STEPS - 1):
                last = number == STEPS - 2
                more = {"end_of_trajectory": last} if kind == "trajectory_buffer" else {}
                store.insert(transition(number, masks=0.0 if last else 1.0, dones=last, **more))


@pytest.mark.parametrize("kind", ["replay_buffer", "trajectory_buffer"])
def test_what_a_store_logged_makes_a_store_again(kind: str, tmp_path: Path) -> None:
    log_episodes(tmp_path, kind)
    told = []

    def transform(data: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any] | None:
        told.append(metadata["step"])
        assert metadata["step_size"] == STEPS
        assert metadata["is_first"] == (metadata["step"] == 0)
        return None if metadata["step"] == STEPS - 1 else data

    store = make_datastore(tmp_path, 200, kind, transform)
    assert told == list(range(STEPS)) * EPISODES
    assert len(store) == (STEPS - 1) * EPISODES
    last = store.get_latest_data(0)[STEPS - 2]
    assert last["observations"]["position"] == STEPS - 2
    assert last["next_observations"]["position"] == STEPS - 1


def test_a_queue_can_be_filled_too(tmp_path: Path) -> None:
    log_episodes(tmp_path, "replay_buffer")
    store = make_datastore(tmp_path, 1000, type="queued_datastore")
    items = store.get_latest_data(-1)
    assert len(items) == STEPS * EPISODES
    assert "dones" not in items[0]
    assert items[STEPS - 1]["masks"] == 0
    with pytest.raises(ValueError, match="queued_datastore"):
        make_datastore(tmp_path, 1000, type="unknown")


class Tensor:
    """What a dataset of tensorflow_datasets yields, as far as it is used."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def numpy(self) -> Any:
        return self.value


def test_a_dataset_of_tensorflows_is_read_step_by_step() -> None:
    def step(number: int, last: bool) -> dict[str, Any]:
        return {
            "observation": {"position": Tensor(np.array([number])), "text": Tensor(b"go")},
            "action": Tensor(np.zeros(2, np.float32)),
            "reward": Tensor(np.float32(number)),
            "is_first": Tensor(np.bool_(number == 0)),
            "is_last": Tensor(np.bool_(last)),
            "is_terminal": Tensor(np.bool_(last)),
            "language_instruction": Tensor(b"pick"),
        }

    dataset = [{"steps": [step(i, i == 2) for i in range(3)]}, {"steps": [step(0, False)]}]
    metadata: list[Any] = []
    store = populate_datastore(
        QueuedDataStore(10),
        dataset,
        type="with_dones",
        data_transform=lambda data, told: (metadata.append(told), data)[1],
    )
    items = store.get_latest_data(-1)
    assert [bool(item["dones"]) for item in items] == [False, False, True, True]
    assert [float(item["masks"]) for item in items] == [1, 1, 0, 1]
    assert [int(item["next_observations"]["position"][0]) for item in items] == [1, 2, 2, 0]
    assert items[0]["observations"]["text"] == "go"
    assert metadata[1] == {
        "step": 1,
        "step_size": 3,
        "is_first": False,
        "language_instruction": "pick",
    }
