"""Every store keeps the promises of all stores, and each one its own."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest

from edgeml.core.errors import DeadlineExceeded, Malformed, Overloaded
from edgeml.data import (
    Batch,
    DataStoreBase,
    QueuedDataStore,
    ReplayBuffer,
    ReplayBufferDataStore,
    make_default_trajectory_buffer,
    transition_example,
)
from edgeml.testing import StoreTests


def transition(i: int) -> dict[str, Any]:
    return {
        "obs": {"cam": np.full((20, 20, 3), i % 251, np.uint8), "state": np.full(3, i, np.float32)},
        "reward": float(i),
        "done": i % 2 == 0,
    }


def step(i: int) -> tuple[Any, ...]:
    return (np.full(3, i, np.float32), float(i), False, i % 2 == 0, {"t": i, "nothing": {}})


class Point(NamedTuple):
    x: float
    y: Any


class TestQueuedColumns(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        return QueuedDataStore(capacity)

    def make_item(self, i: int) -> Any:
        return transition(i)


class TestQueuedItems(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        return QueuedDataStore(capacity)

    def make_item(self, i: int) -> Any:
        return {"task": f"pick up {i}", "path": [np.full(i % 3 + 1, i)], "more": None}


class TestReplayDict(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        return ReplayBuffer(capacity)

    def make_item(self, i: int) -> Any:
        return transition(i)


class TestReplayTuple(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        return ReplayBuffer(capacity)

    def make_item(self, i: int) -> Any:
        return step(i)


class TestReplayDataStore(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        box = gym.spaces.Box(-1, 1, (4,), np.float32)
        return ReplayBufferDataStore(box, gym.spaces.Discrete(1000), capacity)

    def make_item(self, i: int) -> Any:
        return {
            "observations": np.full(4, i, np.float32),
            "next_observations": np.full(4, i + 1, np.float32),
            "actions": np.int64(i % 1000),
            "rewards": float(i),
            "masks": 1.0,
            "dones": False,
        }


class Foreign(DataStoreBase):
    """Has four methods, as another library's stores have; it counts from 0, and keeps no copies."""

    first = 0

    def __init__(self, capacity: int) -> None:
        DataStoreBase.__init__(self, capacity)
        self._lock = threading.Lock()
        self._items: deque[Any] = deque(maxlen=self.capacity)
        self._last = self.first - 1

    def latest_data_id(self) -> int:
        return self._last

    def insert(self, data: Any) -> None:
        with self._lock:
            self._items.append(data)
            self._last += 1

    def get_latest_data(self, from_id: int) -> list[Any]:
        with self._lock:
            missing = max(0, self._last - from_id)
            return list(self._items)[-missing:] if missing else []

    def __len__(self) -> int:
        return len(self._items)


class Counted(Foreign):
    """One that counts from 1, and builds on another."""

    first = 1

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.seen = 0

    def insert(self, data: Any) -> None:
        super().insert(data)
        self.seen = self.latest_data_id()


class Ring:
    """A buffer of no library of ours, of which a store is made."""

    def __init__(self, size: int) -> None:
        self._size, self.rows = size, [None] * size
        self.n = 0

    def __len__(self) -> int:
        return min(self.n, self._size)

    def insert(self, data: Any) -> None:
        self.rows[self.n % self._size] = data
        self.n += 1


class Mixed(Ring, DataStoreBase):
    """That store: two of the methods come from the buffer; it hands out all that it has."""

    def __init__(self, capacity: int) -> None:
        DataStoreBase.__init__(self, capacity)
        Ring.__init__(self, capacity)

    def latest_data_id(self) -> int:
        return self.n

    def get_latest_data(self, from_id: int) -> list[Any]:
        return [self.rows[i % self._size] for i in range(self.n - len(self), self.n)]


class TestForeign(StoreTests):
    def make_store(self, capacity: int) -> DataStoreBase:
        return Foreign(capacity)

    def make_item(self, i: int) -> Any:
        return transition(i)


class TestForeignItems(TestQueuedItems):
    def make_store(self, capacity: int) -> DataStoreBase:
        return Counted(capacity)


class TestMixed(TestForeign):
    def make_store(self, capacity: int) -> DataStoreBase:
        return Mixed(capacity)


class TestFourMethods:
    """What a store of another library gets from the base class, and what it can't have."""

    def test_of_a_batch_that_fails_the_items_before_stay(self) -> None:
        class Choosy(Foreign):
            def insert(self, data: Any) -> None:
                if data == "bad":
                    raise ValueError("no")
                super().insert(data)

        store = Choosy(9)
        with pytest.raises(ValueError, match="no"):
            store.batch_insert(Batch.of(["a", "b", "bad", "c"]).cut([1, 3]))
        assert list(store.get_latest_data(0)) == ["a", "b"]
        assert store.get_latest_data(0).cuts == (1,)

    def test_its_own_methods_call_each_other_as_ever(self) -> None:
        store = Counted(3)
        store.batch_insert(["a", "b"])
        store.reset(100)
        store.insert("c")
        assert store.latest_data_id() == 100
        assert store.seen == 3  # by its own numbers

    def test_a_lock_of_its_own_has_another_name(self) -> None:
        class Locked(Foreign):
            def __init__(self, capacity: int) -> None:
                super().__init__(capacity)
                self.lock = threading.Lock()

        with pytest.raises(TypeError, match=r"Locked\.lock is the base class's"):
            Locked(3).insert(1)

    @pytest.mark.parametrize("made", [Foreign, Counted])
    def test_what_such_a_store_was_made_with_is_handed_out_too(self, made: type[Foreign]) -> None:
        class Filled(made):  # type: ignore[misc, valid-type]
            def __init__(self, capacity: int) -> None:
                super().__init__(capacity)
                self._items.extend([1, 2])
                self._last += 2

        store = Filled(5)
        store.insert(3)
        assert store.latest_data_id() == 3
        assert list(store.get_latest_data(0)) == [1, 2, 3]
        assert store.get_latest_data(0).first_id == 1

    def test_a_store_without_reset_says_so(self) -> None:
        class Whole(DataStoreBase):
            def insert(self, item: Any) -> None: ...
            def latest_data_id(self) -> int:
                return 0

            def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
                return Batch.of([])

            def __len__(self) -> int:
                return 0

        with pytest.raises(NotImplementedError, match=r"Whole has no reset\(\)"):
            Whole(3).reset()
        with pytest.raises(TypeError, match="abstract"):
            DataStoreBase(3)  # type: ignore[abstract]


class TestBatch:
    def test_items_that_agree_become_columns(self) -> None:
        batch = Batch.of([step(i) for i in range(4)], first_id=7)
        state, reward, terminated, truncated, info = batch.columns
        assert (state.shape, state.dtype) == ((4, 3), np.float32)
        assert reward.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert (terminated.dtype, truncated.tolist()) == (np.bool_, [True, False, True, False])
        assert (info["t"].dtype, info["nothing"]) == (np.int64, {})

    def test_items_come_back_as_they_were(self) -> None:
        batch = Batch.of([step(i) for i in range(4)], first_id=7)
        for i, item in [*enumerate(batch), (2, batch[2]), (3, batch[-1])]:
            assert type(item) is tuple
            np.testing.assert_array_equal(item[0], np.full(3, i))
            assert item[1:] == step(i)[1:]
        assert batch[0][4] is not batch[0][4]
        with pytest.raises(IndexError):
            batch[4]

    def test_slices_are_batches_that_know_their_ids(self) -> None:
        for items in ([step(i) for i in range(6)], ["any", 1, None, "thing", {}, ()]):
            batch = Batch.of(items, first_id=10)
            assert (batch.columns is None) == (items[0] == "any")
            part = batch[2:-1]
            assert isinstance(part, Batch)
            assert (part.first_id, len(part)) == (12, 3)
            assert str(part[0]) == str(batch[2])
            assert len(batch[4:2]) == 0
            with pytest.raises(ValueError, match="step 1"):
                batch[::2]

    @pytest.mark.parametrize(
        "items",
        [
            [{"a": 1}, {"b": 1}],
            [{"a": 1}, {"a": 1, "b": 1}],
            [{"a": 1}, (1,)],
            [(1,), [1]],
            [(1,), (1, 2)],
            [1, 1.0],
            [1, True],
            [2**63, 1],
            [np.float32(1), np.float64(1)],
            [np.zeros(3), np.zeros(4)],
            [np.zeros(3), np.zeros(4), np.zeros(2)],
            [np.zeros((2, 3)), np.zeros((3, 2))],
            [np.zeros((2, 3)), np.zeros((2, 4))],
            [np.zeros(3), np.zeros(3, np.float32)],
            [np.zeros(()), np.zeros((), np.float32)],
            [np.zeros(1), np.zeros(())],
            [np.zeros(()), np.zeros(1)],
            ["text", "text"],
            [np.array(["text"])] * 2,
            [np.array([None])] * 2,
            [np.str_("text")] * 2,
            [{1.5: 0}, {1.5: 0}],
            [{}, {}],
            [np.zeros(0), np.zeros(0)],
            [Point(1.0, 1.0)] * 2,
        ],
        ids=str,
    )
    def test_items_that_do_not_agree_stay_items(self, items: list[Any]) -> None:
        batch = Batch.of(items)
        assert batch.columns is None
        assert all(here is there for here, there in zip(batch, items, strict=True))

    @pytest.mark.parametrize(
        "value",
        [
            np.asfortranarray(np.arange(6).reshape(2, 3)),
            np.arange(6)[::2],
            np.arange(3, dtype=">f4"),
            np.array(1.5),
            np.uint8(7),
            np.ma.array([1, 2]),
            np.zeros((0, 3)),
        ],
        ids=repr,
    )
    def test_any_array_of_numbers_makes_a_column(self, value: Any) -> None:
        column, _ = Batch.of([(value, 1)] * 3).columns
        np.testing.assert_array_equal(column, np.stack([value] * 3))
        assert column.flags.c_contiguous
        assert column.dtype.isnative

    def test_extended_dtypes_and_jax_arrays_make_columns(self) -> None:
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        jnp = pytest.importorskip("jax.numpy")
        batch = Batch.of([(np.ones(2, bfloat16), jnp.ones(2)), (np.ones(2, bfloat16), jnp.ones(2))])
        assert [column.dtype for column in batch.columns] == [bfloat16, np.float32]

    def test_it_cannot_be_changed(self) -> None:
        mine = np.zeros(3)
        batch = Batch.from_columns({"a": mine})
        with pytest.raises(ValueError, match="read-only"):
            batch.columns["a"][0] = 1
        with pytest.raises(AttributeError):
            batch.first_id = 2  # type: ignore[misc]
        mine[0] = 1  # the caller's own array is as it was

    def test_columns_take_about_a_microsecond_an_item(self) -> None:
        leaf = np.zeros(17, np.float32)
        items = [dict.fromkeys("abc", leaf) | {"d": 1.0, "e": 2.0} for _ in range(1000)]

        def took() -> float:
            start = time.perf_counter()
            Batch.of(items)
            return time.perf_counter() - start

        assert min(took() for _ in range(20)) < 5e-3  # 0.7 ms on a quiet machine

    def test_bytes_are_those_of_columns(self) -> None:
        assert Batch.of([step(1), step(2)]).nbytes == 2 * (3 * 4 + 8 + 1 + 1 + 8)
        assert Batch.of(["a"]).nbytes == 0

    def test_a_payload_is_plain(self) -> None:
        payload = Batch.of([step(1), step(2)], first_id=3).to_payload()
        assert set(payload) == {"first_id", "columns"}
        assert Batch.of(["a"], first_id=3).to_payload() == {"first_id": 3, "items": ["a"]}
        assert len(Batch.from_payload(Batch.of([step(1)])[:0].to_payload())) == 0

    @pytest.mark.parametrize(
        "payload",
        [
            None,
            [],
            {},
            {"first_id": 1},
            {"first_id": 1, "columns": {}},
            {"first_id": 1, "columns": ()},
            {"first_id": 1, "columns": None},
            {"first_id": 1, "columns": [1, 2, 3]},
            {"first_id": 1, "columns": {"a": np.float64(1)}},
            {"first_id": 1, "columns": {"a": np.array(1)}},
            {"first_id": 1, "columns": {"a": np.array(["a"])}},
            {"first_id": 1, "columns": {"a": np.array([None])}},
            {"first_id": 1, "columns": {"a": np.zeros(3), "b": np.zeros(4)}},
            {"first_id": 1, "columns": {"a": np.zeros(3), "b": {"c": np.zeros((4, 3))}}},
            {"first_id": 1, "columns": {"a": np.zeros((10**15, 0))}},
            {"first_id": 1, "columns": {1.5: np.zeros(3)}},
            {"first_id": 1, "columns": {"a": np.zeros(3)}, "items": []},
            {"first_id": 1, "items": None},
            {"first_id": 1, "items": {"a": 1}},
            {"first_id": 1, "items": "text"},
            {"first_id": 0, "items": []},
            {"first_id": -1, "items": []},
            {"first_id": True, "items": []},
            {"first_id": 1.0, "items": []},
            {"first_id": "1", "items": []},
            {"items": [], "columns": {}},
        ],
        ids=str,
    )
    def test_a_forged_payload_is_refused(self, payload: Any) -> None:
        with pytest.raises(Malformed):
            Batch.from_payload(payload)

    def test_a_payload_nested_too_deep_is_refused(self) -> None:
        columns: Any = np.zeros(3)
        for _ in range(100):
            columns = {"a": columns}
        with pytest.raises(Malformed, match="deeper"):
            Batch.from_payload({"first_id": 1, "columns": columns})


class TestQueued:
    def test_dropping_is_counted(self) -> None:
        store = QueuedDataStore(5)
        for i in range(7):
            store.insert(i)
        assert store.dropped == 2
        store.release(4)  # ids 3 and 4 were taken
        assert (len(store), store.dropped) == (3, 2)
        store.batch_insert(range(10, 12))
        assert store.dropped == 2
        store.batch_insert(range(20, 32))  # 12 into 5: all 5 held, and 7 of its own
        assert store.dropped == 14
        assert list(store.get_latest_data(0)) == [27, 28, 29, 30, 31]

    def test_released_items_are_gone(self) -> None:
        store = QueuedDataStore(5)
        store.batch_insert(Batch.of([step(i) for i in range(5)]))
        store.release(3)
        store.release(1)  # an old acknowledgement changes nothing
        batch = store.get_latest_data(0)
        assert (len(store), batch.first_id, len(batch)) == (2, 4, 2)
        assert store.latest_data_id() == 5

    def test_raising_keeps_what_is_held(self) -> None:
        store = QueuedDataStore(3, on_full="raise")
        store.batch_insert([1, 2])
        with pytest.raises(Overloaded, match="2 of 3"):
            store.batch_insert([3, 4])
        with pytest.raises(ValueError, match="can't fit"):
            store.batch_insert([1, 2, 3, 4])
        assert list(store.get_latest_data(0)) == [1, 2]
        assert store.latest_data_id() == 2
        store.release(1)
        store.batch_insert([3, 4])
        assert list(store.get_latest_data(0)) == [2, 3, 4]
        assert store.dropped == 0

    def test_blocking_gives_up_after_its_timeout(self) -> None:
        store = QueuedDataStore(1, on_full="block", timeout=0.01)
        store.insert("a")
        with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
            store.insert("b")
        assert list(store.get_latest_data(0)) == ["a"]

    def test_blocking_hands_over_everything_in_order(self) -> None:
        store = QueuedDataStore(3, on_full="block", timeout=30)

        def insert() -> None:
            for i in range(0, 300, 2):
                store.batch_insert([i, i + 1])

        seen: list[int] = []
        with ThreadPoolExecutor(1) as pool:
            inserted = pool.submit(insert)
            while not (inserted.done() and len(seen) == store.latest_data_id()):
                seen += store.get_latest_data(len(seen))
                store.release(len(seen))
            inserted.result()
        assert seen == list(range(300))
        assert store.dropped == 0

    def test_an_unknown_policy_is_refused(self) -> None:
        with pytest.raises(ValueError, match="drop_oldest"):
            QueuedDataStore(3, on_full="explode")  # type: ignore[arg-type]

    def test_columns_are_kept_as_columns(self) -> None:
        store = QueuedDataStore(1000)
        for start in range(0, 1500, 300):
            store.batch_insert(Batch.of([step(i) for i in range(start, start + 300)]))
        store.insert(step(1500))
        batch = store.get_latest_data(0)
        assert (batch.first_id, len(batch)) == (502, 1000)
        assert batch.columns[1].tolist() == [float(i) for i in range(501, 1501)]

    def test_columns_of_two_kinds_come_as_items(self) -> None:
        store = QueuedDataStore(10)
        store.batch_insert(Batch.of([{"a": 1}, {"a": 2}]))
        store.batch_insert(Batch.of([{"a": 1.5}]))
        store.batch_insert(Batch.of([{"b": 3}]))
        assert list(store.get_latest_data(0)) == [{"a": 1}, {"a": 2}, {"a": 1.5}, {"b": 3}]

    def test_odd_objects_are_copied_too(self) -> None:
        class Note:
            def __init__(self) -> None:
                self.lines = ["a"]

        note = Note()
        store = QueuedDataStore(10)
        store.insert({"note": note})
        note.lines.append("b")
        assert store.get_latest_data(0)[0]["note"].lines == ["a"]


REFUSED: list[tuple[Any, str]] = [
    ({**transition(1), "extra": 1}, "item: expected a dict of ['done', 'obs', 'reward'], got"),
    ({"obs": 1}, "item: expected a dict of"),
    (step(1), "item: expected a dict of ['done', 'obs', 'reward'], got a tuple of 5"),
    ({**transition(1), "obs": {"cam": 1}}, "item['obs']: expected a dict of ['cam', 'state']"),
    ({**transition(1), "obs": None}, "item['obs']: expected a dict of"),
    ({**transition(1), "reward": "much"}, "item['reward']: expected shape () float64, got str"),
    ({**transition(1), "reward": None}, "got NoneType"),
    ({**transition(1), "reward": {}}, "got a dict of []"),
    ({**transition(1), "reward": [[1], [1, 2]]}, "got a list of 2"),
    ({**transition(1), "reward": np.zeros(1)}, "got shape (1,) float64"),
    ({**transition(1), "done": 1.0}, "item['done']: expected shape () bool, got float"),
    (
        {**transition(1), "obs": {**transition(1)["obs"], "state": np.zeros(4)}},
        "item['obs']['state']: expected shape (3,) float32, got shape (4,) float64",
    ),
    (
        {**transition(1), "obs": {**transition(1)["obs"], "cam": np.full((20, 20, 3), 256)}},
        "got shape (20, 20, 3) int64 beyond uint8",
    ),
    (
        {**transition(1), "obs": {**transition(1)["obs"], "cam": np.zeros((20, 20, 3))}},
        "item['obs']['cam']: expected shape (20, 20, 3) uint8, got shape (20, 20, 3) float64",
    ),
]


class TestReplay:
    def test_a_reward_that_began_as_an_integer(self) -> None:
        store = ReplayBuffer(10)
        store.insert({"rewards": 0})
        for insert in (store.insert, lambda item: store.batch_insert(Batch.of([item]))):
            with pytest.raises(ValueError, match=r"item\['rewards'\].*give it as a float there"):
                insert({"rewards": 0.5})

    def test_a_sample_has_the_structure_of_an_item(self) -> None:
        store = ReplayBuffer(10, seed=0)
        store.batch_insert([transition(i) for i in range(5)])
        batch = store.sample(32)
        assert list(batch) == ["obs", "reward", "done"]
        assert (batch["obs"]["cam"].shape, batch["obs"]["cam"].dtype) == ((32, 20, 20, 3), np.uint8)
        assert (batch["obs"]["state"].shape, batch["reward"].dtype) == ((32, 3), np.float64)
        for column in (*batch["obs"].values(), batch["reward"], batch["done"]):
            assert column.flags.c_contiguous
            assert column.flags.writeable
        assert set(batch["reward"]) == {0.0, 1.0, 2.0, 3.0, 4.0}

    def test_a_tuples_columns_are_keyed_by_position(self) -> None:
        store = ReplayBuffer(10)
        store.insert((np.zeros(3), (1.0, [2.0]), {"a": 3.0}))
        batch = store.sample(2)
        assert batch[0].shape == (2, 3)
        assert batch[1][1][0].tolist() == [2.0, 2.0]
        assert batch[2]["a"].tolist() == [3.0, 3.0]

    @pytest.mark.parametrize("shape", [(), (3,), (400,)])
    def test_samples_are_private(self, shape: tuple[int, ...]) -> None:
        store = ReplayBuffer(1)
        store.insert({"a": np.full(shape, 1.0)})
        sampled = store.sample(4)["a"]
        store.insert({"a": np.full(shape, 2.0)})
        assert (store.sample(4)["a"] == 2).all()
        assert (sampled == 1).all()
        sampled[...] = 3
        assert (store.sample(4)["a"] == 2).all()

    def test_sampling_is_uniform_over_what_is_held(self) -> None:
        store = ReplayBuffer(10, seed=1)
        store.batch_insert([{"i": i} for i in range(27)])
        values, counts = np.unique(store.sample(20_000)["i"], return_counts=True)
        assert values.tolist() == list(range(17, 27))
        # 5 standard deviations of a binomial around 2,000
        assert np.abs(counts - 2000).max() < 5 * math.sqrt(20_000 * 0.1 * 0.9)

    def test_seeds_repeat_a_sample(self) -> None:
        stores = [ReplayBuffer(50, seed=seed) for seed in (1, 1, 2)]
        for store in stores:
            store.batch_insert([{"i": i} for i in range(50)])
        one, same, other = (store.sample(20)["i"].tolist() for store in stores)
        assert one == same != other
        drawn = [stores[0].sample(20, rng=np.random.default_rng(9))["i"].tolist() for _ in range(2)]
        assert drawn[0] == drawn[1]

    @pytest.mark.parametrize("store", [ReplayBuffer(5), ReplayBuffer(5, example={"a": 1})])
    def test_an_empty_buffer_says_so(self, store: ReplayBuffer) -> None:
        with pytest.raises(ValueError, match="empty"):
            store.sample(1)

    @pytest.mark.parametrize("size", [0, -1])
    def test_a_sample_has_at_least_one_item(self, size: int) -> None:
        store = ReplayBuffer(5)
        store.insert({"a": 1})
        with pytest.raises(ValueError, match="batch_size"):
            store.sample(size)

    @pytest.mark.parametrize(("item", "message"), REFUSED, ids=[text for _, text in REFUSED])
    @pytest.mark.parametrize("way", ["insert", "batch", "columns"])
    def test_what_does_not_fit_is_refused_and_nothing_changed(
        self, item: Any, message: str, way: str
    ) -> None:
        store = ReplayBuffer(2)
        store.batch_insert([transition(1), transition(2)])
        if way == "columns":  # whose shapes in the text have one axis more
            columns = Batch.of([item] * 2).columns
            if columns is None:
                pytest.skip("these items make no columns")
            with pytest.raises(ValueError, match=r"^item.*: expected .*, got "):
                store.batch_insert(Batch.from_columns(columns))
        elif way == "batch":
            with pytest.raises(ValueError, match=re.escape(message)):
                store.batch_insert([transition(3), item])
        else:
            with pytest.raises(ValueError, match=re.escape(message)):
                store.insert(item)
        assert (len(store), store.latest_data_id()) == (2, 2)
        assert [item["reward"] for item in store.get_latest_data(0)] == [1.0, 2.0]

    @pytest.mark.parametrize(
        "item", [5, np.zeros(3), "text", {"a": "text"}, {"a": None}, {}, ((),)]
    )
    def test_what_can_be_no_schema_is_refused(self, item: Any) -> None:
        store = ReplayBuffer(2)
        with pytest.raises(ValueError, match=r"item"):
            store.insert(item)
        with pytest.raises(ValueError, match=r"item"):
            store.batch_insert([item])
        store.insert({"a": 1})  # a refused item gives no schema

    def test_a_refused_first_batch_gives_no_schema(self) -> None:
        store = ReplayBuffer(2)
        with pytest.raises(ValueError, match="expected shape"):
            store.batch_insert([{"reward": 0}, {"reward": 0.5}])
        store.insert({"reward": 0.5})

    @pytest.mark.parametrize(
        ("example", "value"),
        [
            (np.float32(0), 0.1),
            (np.float32(0), 3),
            (np.float32(0), np.float64(0.5)),
            (np.float32(0), np.bool_(True)),
            (np.uint8(0), 255),
            (np.zeros(2, np.float32), [1, 2.5]),
            (np.zeros(2, np.int32), np.array([1, 2], np.int64)),
            (np.zeros(2, np.float64), np.array([1, 2], ">f4")),
            (np.zeros(2, np.uint8), np.array([255, 0])),
            (np.zeros(2, ">f4"), np.array([1, 2], np.float32)),
        ],
    )
    def test_a_leaf_is_converted_where_that_keeps_its_meaning(
        self, example: Any, value: Any
    ) -> None:
        store = ReplayBuffer(10, example={"a": example})
        store.insert({"a": value})
        store.batch_insert([{"a": value}, {"a": example}])  # which makes no columns
        store.batch_insert(Batch.from_columns({"a": np.stack([value])}))
        expected = np.asarray(value).astype(example.dtype.newbyteorder("="))
        for item in [store.get_latest_data(0)[i] for i in (0, 1, 3)]:
            assert item["a"].dtype == expected.dtype
            np.testing.assert_array_equal(item["a"], expected)
        assert store.sample(1)["a"].dtype == expected.dtype

    def test_a_namedtuple_is_a_dict(self) -> None:
        store = ReplayBuffer(10)
        store.insert(Point(1.0, np.zeros(2)))
        store.batch_insert([Point(1.0, np.zeros(2)), {"x": 2.0, "y": np.zeros(2)}])
        assert store.sample(3)["y"].shape == (3, 2)

    def test_extended_dtypes_are_kept(self) -> None:
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        store = ReplayBuffer(10)
        store.insert({"a": np.ones(3, bfloat16), "b": np.float32(0)})
        assert store.sample(4)["a"].dtype == bfloat16

    def test_only_large_leaves(self) -> None:
        store = ReplayBuffer(4)
        store.batch_insert([{"image": np.full((64, 64), i)} for i in range(6)])
        assert set(store.sample(50)["image"][:, 0, 0]) == {2, 3, 4, 5}

    def test_sampling_under_inserts_never_tears_a_row(self) -> None:
        items = [transition(i) for i in range(251)]
        batches = [Batch.of(items[i : i + 5]) for i in range(0, 250, 5)]
        store = ReplayBuffer(8)
        store.insert(items[0])
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for item, batch in zip(items, batches, strict=False):
                    store.insert(item)
                    store.batch_insert(batch)

        def check(rng: np.random.Generator) -> None:
            for _ in range(300):
                batch = store.sample(16, rng)
                i = batch["reward"]
                assert (batch["obs"]["state"] == i[:, None]).all()
                assert (batch["obs"]["cam"] == i[:, None, None, None]).all()
                assert (batch["done"] == (i % 2 == 0)).all()

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(3) as pool:
                writer = pool.submit(write)
                readers = [pool.submit(check, np.random.default_rng(i)) for i in range(2)]
                try:
                    for reader in readers:
                        reader.result(timeout=60)
                finally:
                    stop.set()
                writer.result(timeout=10)
        finally:
            sys.setswitchinterval(interval)


class TestReplayBufferDataStore:
    def test_every_space_gives_its_columns(self) -> None:
        spaces = gym.spaces
        observations = spaces.Dict(
            {
                "cam": spaces.Box(0, 255, (8, 8, 3), np.uint8),
                "pair": spaces.Tuple([spaces.Discrete(3), spaces.MultiDiscrete([2, 3])]),
                "bits": spaces.MultiBinary(4),
            }
        )
        actions = spaces.Box(-1, 1, (6,), np.float32)
        store = ReplayBufferDataStore(observations, actions, 10, seed=0)
        for i in range(12):
            store.insert(
                {
                    "observations": observations.sample(),
                    "next_observations": observations.sample(),
                    "actions": actions.sample(),
                    "rewards": -1,
                    "masks": 1.0 - (i % 2),
                    "dones": True,
                }
            )
        batch = store.sample(16)
        for key in ("observations", "next_observations"):
            assert (batch[key]["cam"].shape, batch[key]["cam"].dtype) == ((16, 8, 8, 3), np.uint8)
            assert (batch[key]["pair"][0].shape, batch[key]["pair"][1].shape) == ((16,), (16, 2))
            assert (batch[key]["bits"].shape, batch[key]["bits"].dtype) == ((16, 4), np.int8)
        assert (batch["actions"].shape, batch["actions"].dtype) == ((16, 6), np.float32)
        assert batch["rewards"].dtype == batch["masks"].dtype == np.float32
        assert batch["dones"].dtype == np.bool_
        assert set(batch["masks"]) == {0.0, 1.0}

    @pytest.mark.parametrize(
        "space",
        [
            gym.spaces.Text(5),
            gym.spaces.Sequence(gym.spaces.Discrete(2)),
            gym.spaces.OneOf([gym.spaces.Discrete(2), gym.spaces.Discrete(3)]),
            gym.spaces.Dict(a=gym.spaces.OneOf([gym.spaces.Discrete(2)])),
            None,
        ],
    )
    def test_a_space_without_a_shape_is_refused(self, space: Any) -> None:
        with pytest.raises(TypeError, match="no fixed shape"):
            ReplayBufferDataStore(space, gym.spaces.Discrete(2), 10)

    def test_keys_beyond_the_schema_can_be_left_out(self) -> None:
        """Such as HIL-SERL's ``infos``."""
        space = gym.spaces.Dict(state=gym.spaces.Box(-1, 1, (2,), np.float32))
        plain = transition_example(space, gym.spaces.Discrete(2))
        item = {**plain, "infos": {"succeed": "yes"}}
        inside = {**plain, "observations": {**plain["observations"], "seen": 1}}
        store = ReplayBufferDataStore(space, gym.spaces.Discrete(2), 10)
        for refused in (item, inside):
            with pytest.raises(ValueError, match=r"expected a dict of .*ignore_unknown=True"):
                store.insert(refused)
            with pytest.raises(ValueError, match="ignore_unknown=True"):
                store.batch_insert([plain, refused])
        assert len(store) == 0
        store = ReplayBufferDataStore(space, gym.spaces.Discrete(2), 10, ignore_unknown=True)
        store.insert(item)
        store.batch_insert([item, plain, inside])
        store.batch_insert(Batch.of([{**plain, "lap": 1}] * 2))
        assert len(store) == 6
        assert set(store.sample(3)) == set(plain)
        with pytest.raises(ValueError, match=r"expected a dict of \['actions'") as refusal:
            store.insert({"infos": 1, "observations": 2})
        assert "ignore_unknown" not in str(refusal.value)

    def test_a_trajectory_buffer_leaves_them_out_too(self) -> None:
        pytest.importorskip("jax")
        space = gym.spaces.Box(-1, 1, (2,), np.float32)
        item = {**transition_example(space, space), "end_of_trajectory": False}
        del item["dones"]
        store = make_default_trajectory_buffer(space, space, 10)
        with pytest.raises(ValueError, match="ignore_unknown=True"):
            store.insert({**item, "infos": {}})
        store = make_default_trajectory_buffer(space, space, 10, ignore_unknown=True)
        store.insert({**item, "infos": {}})
        assert len(store) == 1
