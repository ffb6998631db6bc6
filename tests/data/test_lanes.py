"""Lanes: what several sources insert by turns goes on within each as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeml.core.errors import Malformed
from edgeml.data import Batch, DataStoreBase, PrioritizedReplayBuffer, QueuedDataStore, ReplayBuffer
from edgeml.data.batch import MOST_LANES
from edgeml.data.lanes import Lanes

SIDE = 40  # of an image that is kept once
SOURCES = ("left", "right", "third")


def transition(source: int, t: int) -> dict[str, Any]:
    """A step of an endless walk with an end now and then; like no other's."""
    done = t % (5 + source) == 4
    return {
        "observations": observation(source, t),
        "next_observations": observation(source, t + 1),
        "actions": np.array([source, t]),
        "rewards": float(100 * source + t),
        "masks": 1.0 - done * (t % 2),
        "dones": done,
    }


def observation(source: int, t: int) -> dict[str, Any]:
    image = np.full((SIDE, SIDE), (7 * t + 80 * source) % 256, np.uint8)
    return {"image": image, "at": np.array([source, t], np.float32)}


@functools.cache  # whichever way the other store was filled
def alone(make: Callable[[], ReplayBuffer], source: int, n: int) -> dict[int, dict[str, Any]]:
    """What a sample of each step is in a buffer that has only this source's."""
    store = make()
    store.batch_insert([transition(source, t) for t in range(n)])
    return by_step(store, source)


def by_step(store: ReplayBuffer, source: int) -> dict[int, dict[str, Any]]:
    """What samples give, by the steps of one source."""
    batch, found = store.sample(800), {}
    for i, (of, t) in enumerate(batch["actions"].tolist()):
        if of == source:
            found[t] = {key: pick(part, i) for key, part in batch.items() if key not in LEFT_OUT}
    return found


LEFT_OUT = {"ids", "weights"}


def pick(part: Any, i: int) -> Any:
    if isinstance(part, dict):
        return {key: pick(child, i) for key, child in part.items()}
    return part[i].tolist()


def turns(n: int, seed: int = 0) -> list[tuple[int, range]]:
    """Which source brings which of its steps next."""
    rng = np.random.default_rng(seed)
    at, order = [0] * len(SOURCES), []
    while min(at) < n:
        source = int(rng.integers(len(SOURCES)))
        steps = range(at[source], min(n, at[source] + int(rng.integers(1, 6))))
        if steps:
            order.append((source, steps))
            at[source] = steps.stop
    return order


MAKERS: dict[str, Callable[[], ReplayBuffer]] = {
    "n-step": lambda: ReplayBuffer(200, n_step=3, seed=0),
    "stacks": lambda: ReplayBuffer(200, frame_stack=4, seed=0),
    "both": lambda: ReplayBuffer(200, n_step=2, frame_stack=3, seed=0),
    "prioritized": lambda: PrioritizedReplayBuffer(200, n_step=4, frame_stack=2, seed=0),
}
WAYS = ["one by one", "sources", "batches of all", "queued"]


def fill(store: DataStoreBase, way: str, n: int) -> None:
    """Insert n steps of each source, as they take turns."""
    if way == "one by one":
        for source, steps in turns(n):
            for t in steps:
                store.insert(transition(source, t), lane=SOURCES[source])  # type: ignore[call-arg]
    elif way == "sources":
        for source, steps in turns(n):
            batch = Batch.of([transition(source, t) for t in steps])
            store.insert_from(SOURCES[source], batch)
    elif way == "batches of all":
        pairs = [(source, t) for source, steps in turns(n) for t in steps]
        for first in range(0, len(pairs), 17):
            part = pairs[first : first + 17]
            batch = Batch.of([transition(*pair) for pair in part])
            store.batch_insert(batch.in_lanes(np.array([source for source, _ in part])))
    else:  # by an actor's queue, in uploads that end anywhere
        queue, other = QueuedDataStore(1000), QueuedDataStore(1000)
        for source, steps in turns(n):
            for t in steps:
                queue.insert(transition(source, t), lane=source)
        other.batch_insert([transition(3, t) for t in range(3 * n)])
        for after in range(0, len(queue), 7):
            for client, each in (("actor", queue), ("another", other)):
                payload = each.get_latest_data(after, limit=7).to_payload()
                store.insert_from(client, Batch.from_payload(payload))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MAKERS)
def test_returns_and_stacks_are_those_of_each_source_alone(kind: str, way: str) -> None:
    store = MAKERS[kind]()
    fill(store, way, 24)
    assert store.breaks == 0
    for source in range(len(SOURCES)):
        found = by_step(store, source)
        assert len(found) > 20, "too few were drawn"
        expected = alone(MAKERS[kind], source, 24)
        assert found == {t: expected[t] for t in found}


@pytest.mark.parametrize("way", ["one by one", "queued"])
def test_frames_are_kept_once_in_each_lane(way: str) -> None:
    store = ReplayBuffer(300, example=transition(0, 0))
    fill(store, way, 48)
    assert store.nbytes < 1.1 * len(store) * SIDE * SIDE + 300 * 100


def test_an_actor_that_starts_anew_cuts_only_its_own_lane() -> None:
    store = ReplayBuffer(100, n_step=3)
    store.insert_from("a", Batch.of([transition(0, t) for t in range(2)]))
    store.insert_from("b", Batch.of([transition(1, t) for t in range(2)]))
    store.interrupt_from("a")
    store.insert_from("a", Batch.of([transition(0, t) for t in range(2, 4)]))
    store.insert_from("b", Batch.of([transition(1, t) for t in range(2, 4)]))
    for source, step, last in ((0, 0, 1), (0, 2, 3), (1, 0, 2), (1, 1, 3)):
        found = by_step(store, source)[step]
        assert found["next_observations"]["at"] == [source, last + 1]


def test_of_frames_that_are_gone_the_oldest_left_stands_for_them() -> None:
    """A lane's item outlives those before it where many of others' came in between."""
    store = ReplayBuffer(10, frame_stack=4)
    store.insert_from("a", Batch.of([transition(0, t) for t in range(3)]))
    store.insert_from("b", Batch.of([transition(1, t) for t in range(8)]))
    store.insert_from("a", Batch.of([transition(0, 3)]))
    assert [at[1] for at in by_step(store, 0)[3]["observations"]["at"]] == [0, 1, 2, 3]
    store.insert_from("b", Batch.of([transition(1, t) for t in range(8, 11)]))
    assert [at[1] for at in by_step(store, 0)[3]["observations"]["at"]] == [2, 2, 2, 3]
    assert store.breaks == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_lanes_go_on_after_a_checkpoint(kind: str, tmp_path: Any) -> None:
    from edgeml.data import checkpoint

    whole, begun, loaded = MAKERS[kind](), MAKERS[kind](), MAKERS[kind]()
    order = turns(24)
    for store in whole, begun:
        for source, steps in order[:11]:
            batch = Batch.of([transition(source, t) for t in steps])
            store.insert_from(SOURCES[source], batch)
    checkpoint.save(tmp_path / "saved", stores={"it": begun})
    checkpoint.load(tmp_path / "saved", {"it": loaded})
    for store in whole, loaded:
        for source, steps in order[11:]:
            batch = Batch.of([transition(source, t) for t in steps])
            store.insert_from(SOURCES[source], batch)
    for source in range(len(SOURCES)):
        one, other = by_step(whole, source), by_step(loaded, source)
        assert {t: one[t] for t in one.keys() & other.keys()} == {
            t: other[t] for t in one.keys() & other.keys()
        }


class TestLanes:
    def test_there_are_only_so_many_and_who_opens_them_loses_its_own(self) -> None:
        lanes = Lanes(10)
        quiet = lanes.find("quiet")
        for part in range(3 * MOST_LANES):
            lanes.find("loud", part)
        assert lanes.find("quiet") == quiet
        assert lanes.given_up == 3 * MOST_LANES - (MOST_LANES - 2)
        assert lanes.is_open(lanes.find("loud", 3 * MOST_LANES - 1))

    def test_no_number_is_given_twice(self) -> None:
        lanes, seen = Lanes(10), set[int]()
        for i in range(3 * MOST_LANES):
            number = lanes.find(f"client {i}")
            assert number
            assert number not in seen
            seen.add(number)
            if i % 3:
                lanes.close(f"client {i}")

    def test_a_lane_is_named_by_a_text_or_a_number(self) -> None:
        store = QueuedDataStore(5)
        with pytest.raises(TypeError, match="a lane is a text or an integer"):
            store.insert(1, lane=(1, 2))  # type: ignore[arg-type]
        store.insert(1, lane=3)
        store.insert(2)
        assert store.get_latest_data(0).lanes.tolist()[1] == 0  # type: ignore[union-attr]

    def test_a_store_that_has_no_lanes_says_nothing_of_them(self) -> None:
        store = QueuedDataStore(5)
        store.batch_insert([1, 2])
        assert store.get_latest_data(0).lanes is None
        assert store.get_latest_data(0).to_payload().keys() == {"first_id", "columns"}

    @pytest.mark.parametrize(
        "lanes",
        [
            [1, 2],
            np.array([1]),
            np.array([1, -1]),
            np.array([1.0, 2.0]),
            np.array([1, 1 << 60]),
            np.array([[1], [2]]),
        ],
    )
    def test_lanes_from_the_network_are_looked_at(self, lanes: Any) -> None:
        with pytest.raises(Malformed, match="lanes"):
            Batch.from_payload({"first_id": 1, "items": [1, 2], "lanes": lanes})

    def test_a_batch_is_of_so_many_lanes_at_most(self) -> None:
        n = MOST_LANES + 1
        payload = {"first_id": 1, "items": [0] * n, "lanes": np.arange(n)}
        with pytest.raises(Malformed, match=f"up to {MOST_LANES} lanes"):
            Batch.from_payload(payload)

    @pytest.mark.parametrize(
        "spoil",
        [
            {"open": [["a", 0, 5], ["b", 0, 5]]},
            {"open": [["a", 0, 5], ["b", 0, 5 + MOST_LANES]]},
            {"open": [[(1,), 0, 5]]},
            {"open": [["a", 0, 0]]},
            {"open": [["a", 0, -3]]},
            {"fresh": MOST_LANES + 1},
            {"free": [1 << 60]},
            {"gone": None},
        ],
    )
    def test_a_made_up_state_is_refused(self, spoil: Any) -> None:
        lanes = Lanes(5)
        for name in "abcdef":
            lanes.find(name)
        state = {**lanes.state(), **spoil}
        with pytest.raises((TypeError, ValueError)):
            Lanes.check_state(state)
        assert Lanes.check_state(lanes.state()) is None  # type: ignore[func-returns-value]


def test_a_store_of_four_methods_is_interrupted_where_sources_take_turns() -> None:
    class Plain(DataStoreBase):
        def __init__(self) -> None:
            super().__init__(100)
            self.items: list[Any] = []
            self.interruptions: list[int] = []

        def insert(self, item: Any) -> None:
            self.items.append(item)

        def latest_data_id(self) -> int:
            return len(self.items)

        def get_latest_data(self, from_id: int) -> Any:
            return self.items[from_id:]

        def __len__(self) -> int:
            return len(self.items)

        def interrupt(self) -> None:
            super().interrupt()
            self.interruptions.append(self.latest_data_id())

    store = Plain()
    assert not store.knows_lanes
    store.insert_from("a", Batch.of([1, 2]))
    store.insert_from("a", Batch.of([3]))
    store.insert_from("b", Batch.of([4]).in_lanes(np.array([7])))
    store.insert_from("b", Batch.of([5, 6, 7]).in_lanes(np.array([7, 8, 8])))
    store.insert(8)  # by somebody else
    store.insert_from("b", Batch.of([9]).in_lanes(np.array([8])))
    store.interrupt_from("a")  # whose turn it isn't
    store.insert_from("b", Batch.of([10]).in_lanes(np.array([8])))
    store.interrupt_from("b")
    store.insert_from("b", Batch.of([11]).in_lanes(np.array([8])))
    assert store.interruptions == [0, 3, 8, 10]
    assert store.get_latest_data(0).cuts == (3, 5, 8, 10)  # type: ignore[attr-defined]
