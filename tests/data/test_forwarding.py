"""What is inserted into a store goes into its log in the same step: into both, or into neither."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.core.errors import NotEncodable, Overloaded
from edgeml.data import (
    Batch,
    DataStoreBase,
    LoggedDataStore,
    QueuedDataStore,
    ReplayBuffer,
    TrajectoryBufferDataStore,
    checkpoint,
    log_writer,
    make_default_trajectory_buffer,
)
from test_data_store import Foreign
from test_logged import flat, held


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LoggedDataStore]:
    with LoggedDataStore(tmp_path / "log", 10_000) as made:
        yield made


def make_replay() -> ReplayBuffer:
    return ReplayBuffer(1000)


STORES = {
    "replay": make_replay,
    "queue": lambda: QueuedDataStore(1000),
    "foreign": lambda: Foreign(1000),
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_both_have_all_of_it(make: Any, log: LoggedDataStore) -> None:
    store = make()
    store.insert(flat(1))
    store.batch_insert([flat(2), flat(3)])
    store.forward_to(log)
    for i in range(4, 10):
        store.insert(flat(i))
    store.batch_insert([flat(i) for i in range(10, 15)])
    store.interrupt()
    store.insert(flat(15))
    store.batch_insert(Batch.of([flat(i) for i in range(16, 20)]).cut([2]))
    items = held(log)
    assert sorted(items) == [*range(1, 20)]
    for i, item in items.items():
        np.testing.assert_equal(item, flat(i))
    assert log.get_latest_data(0).cuts == (14, 17)
    assert store.latest_data_id() == 19
    assert len(store) == (0 if isinstance(store, QueuedDataStore) else 19)
    store.forward_to(None)
    store.insert(flat(20))
    assert log.latest_data_id() == 19


@pytest.mark.parametrize(
    "item",
    [
        {"x": np.ones(3), "r": 1.5, "n": 3, "done": True},
        {"x": np.ones(3, np.float32), "r": np.float64(1.1), "n": np.int32(3), "done": np.True_},
        {"x": np.ones(3, np.float16), "r": np.float32(1.1), "n": np.uint8(3), "done": False},
        {"x": np.arange(3), "r": 7, "n": 3, "done": False},
        {"x": np.ones((3, 2))[:, 0], "r": 1.5, "n": 3, "done": False},
    ],
)
def test_the_log_gets_what_the_store_made_of_it(item: Any, log: LoggedDataStore) -> None:
    like = {"x": np.zeros(3, np.float32), "r": np.float32(0), "n": np.int16(0), "done": False}
    store = ReplayBuffer(10, example=like)
    store.forward_to(log)
    for i in range(4):
        store.insert({**item, "r": item["r"] + i})
    for here, there in zip(store.get_latest_data(0), log.get_latest_data(0), strict=True):
        np.testing.assert_equal(here, there)
        assert all(here[key].dtype == there[key].dtype for key in here)


@pytest.mark.parametrize("make", [make_replay, lambda: QueuedDataStore(1000)])
def test_items_of_several_lanes_are_not_taken_for_one_s(make: Any, log: LoggedDataStore) -> None:
    """A log has one lane: so it is cut wherever another's item comes."""
    store = make()
    store.insert(flat(1), lane="a")
    store.insert(flat(2), lane="b")
    store.forward_to(log)
    store.insert(flat(3), lane="b")
    store.insert(flat(4), lane="b")
    store.insert(flat(5), lane="a")
    store.insert(flat(6))
    store.insert(flat(7))
    lanes = np.array([1, 1, 2])
    store.batch_insert(Batch.of([flat(i) for i in range(8, 11)]).in_lanes(lanes))
    store.insert(flat(11))
    assert sorted(held(log)) == [*range(1, 12)]
    # A log begins anew where it is filled.
    assert {1, 4, 5, 7, 9, 10} <= set(log.get_latest_data(0).cuts) <= {1, 2, 4, 5, 7, 9, 10}


def test_keys_that_are_left_out_are_not_logged(log: LoggedDataStore) -> None:
    store = ReplayBuffer(10, example={"x": 0.0, "y": 0.0}, ignore_unknown=True)
    store.forward_to(log)
    for i in range(3):
        store.insert({"x": float(i), "y": 0.0, "infos": object()})
    assert [float(item["x"]) for item in log.get_latest_data(0)] == [0, 1, 2]
    assert log.get_latest_data(0)[0].keys() == {"x", "y"}


def test_what_the_store_refuses_is_not_in_the_log(log: LoggedDataStore) -> None:
    store = make_replay()
    store.forward_to(log)
    store.insert(flat(1))
    store.insert(flat(2))
    for wrong in ({"x": 1}, {**flat(3), "x": np.zeros(5)}, {**flat(3), "y": "text"}):
        with pytest.raises(ValueError, match="expected"):
            store.insert(wrong)
    with pytest.raises(ValueError, match="expected"):
        store.batch_insert([flat(3), {"x": 1}])
    assert log.latest_data_id() == store.latest_data_id() == 2


def test_of_a_batch_that_fails_half_way_the_log_has_what_the_store_has(
    log: LoggedDataStore,
) -> None:
    class Picky(Foreign):
        def insert(self, data: Any) -> None:
            if data["y"] == 3:
                raise ValueError("not 3")
            super().insert(data)

    store = Picky(100)
    store.forward_to(log)
    with pytest.raises(ValueError, match="not 3"):
        store.batch_insert([flat(1), flat(2), flat(3), flat(4)])
    assert sorted(held(log)) == [1, 2]


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_what_the_log_has_no_room_for_is_not_in_the_store(make: Any, tmp_path: Path) -> None:
    with LoggedDataStore(tmp_path / "log", 3) as log:
        store = make()
        store.forward_to(log)
        store.batch_insert([flat(1), flat(2)])
        store.insert(flat(3))
        for insert in (lambda: store.insert(flat(4)), lambda: store.batch_insert([flat(4)])):
            with pytest.raises(Overloaded):
                insert()
        assert store.latest_data_id() == log.latest_data_id() == 3
        log.release(2)
        store.insert(flat(4))
        assert sorted(held(log)) == [3, 4]


def test_a_full_disk_leaves_both_as_they_were(
    log: LoggedDataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_replay()
    store.forward_to(log)
    store.insert({"x": np.zeros(100_000)})

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log_writer.Segment, "create", fail)
        with pytest.raises(OSError, match="No space left"):
            deque(map(store.insert, [{"x": np.zeros(100_000)}] * 1000), 0)
    n = store.latest_data_id()
    assert n == len(held(log)) > 1
    store.insert({"x": np.zeros(100_000)})
    assert store.latest_data_id() == len(held(log)) == n + 1


def test_what_no_codec_carries_is_in_neither(log: LoggedDataStore) -> None:
    store = QueuedDataStore(10)
    store.forward_to(log)
    store.insert({"x": "text"})
    with pytest.raises(NotEncodable):
        store.insert({"x": object()})
    store.insert({"x": "more"})
    assert list(log.get_latest_data(0)) == [{"x": "text"}, {"x": "more"}]


def test_a_trajectory_that_ends_late_is_cut(log: LoggedDataStore) -> None:
    import gymnasium as gym

    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    store = make_default_trajectory_buffer(space, space, 100)
    assert isinstance(store, TrajectoryBufferDataStore)
    store.forward_to(log)
    example = store._schema
    item = {
        path.split("'")[1]: np.zeros(shape, dtype)
        for path, shape, dtype in zip(example.paths, example.shapes, example.dtypes, strict=True)
    }
    store.insert(item)
    store.insert(item, end_of_trajectory=True)
    store.insert(item)
    store.end_trajectory()
    store.insert(item)
    batch = log.get_latest_data(0)
    assert batch.columns["end_of_trajectory"].tolist() == [False, True, False, False]
    assert batch.cuts == (3,)


def test_a_log_follows_one_store(log: LoggedDataStore) -> None:
    make_replay().forward_to(log)
    with pytest.raises(ValueError, match="another store's items go to the log"):
        make_replay().forward_to(log)


def test_a_store_that_is_let_go_of_is_freed(log: LoggedDataStore) -> None:
    store = make_replay()
    store.forward_to(log)
    store.insert(flat(1))
    gone = weakref.ref(store)
    store.forward_to(None)
    del store
    assert gone() is None, "without the collector"
    gc.collect()


class TestCatchingUp:
    """A log that is found again has the items of a store up to somewhere."""

    def test_a_store_that_lives_on_gives_what_came_meanwhile(self, tmp_path: Path) -> None:
        store = make_replay()
        for begin in range(1, 30, 10):
            with LoggedDataStore(tmp_path / "log") as log:
                store.forward_to(log)
                for i in range(begin, begin + 5):
                    store.insert(flat(i))
                store.forward_to(None)
                for i in range(begin + 5, begin + 10):
                    store.insert(flat(i))
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(log)
            assert sorted(held(log)) == [*range(1, 31)]
            for i, item in held(log).items():
                np.testing.assert_equal(item, flat(i))

    @pytest.mark.parametrize("begun_anew", [False, True])
    def test_a_store_from_a_checkpoint_gives_what_the_log_lacks(
        self, begun_anew: bool, tmp_path: Path
    ) -> None:
        store = make_replay()
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(log)
            for i in range(1, 6):
                store.insert(flat(i))
            checkpoint.save(tmp_path / "early", stores={"it": store})
            store.insert(flat(6))
            checkpoint.save(tmp_path / "late", stores={"it": store})
            store.forward_to(None)
            for i in range(7, 9):
                store.insert(flat(i))
            checkpoint.save(tmp_path / "later", stores={"it": store})
        for name, expected in (("late", 6), ("early", 6), ("later", 8)):
            other = make_replay()
            with LoggedDataStore(tmp_path / "log") as log:
                if begun_anew:
                    checkpoint.load(tmp_path / name, {"it": other})
                    other.forward_to(log)
                else:
                    other.forward_to(log)
                    checkpoint.load(tmp_path / name, {"it": other})
                assert [int(item["y"]) for item in held(log).values()] == [*range(1, expected + 1)]

    def test_items_of_after_a_load_are_other_ones(self, tmp_path: Path) -> None:
        store = make_replay()
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(log)
            for i in (1, 2):
                store.insert(flat(i))
            checkpoint.save(tmp_path / "saved", stores={"it": store})
            for i in (3, 4):
                store.insert(flat(i))
            checkpoint.load(tmp_path / "saved", {"it": store})
            store.insert(flat(33))
            assert [int(item["y"]) for item in held(log).values()] == [1, 2, 3, 4, 33]
            assert log.get_latest_data(0).cuts == (4,)
            assert store.latest_data_id() == 3
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(None)
            store.forward_to(log)
            assert len(log) == 5

    def test_a_store_that_is_reset_goes_on(self, tmp_path: Path) -> None:
        store = make_replay()
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(log)
            for next_id in (None, 1, 500):
                store.insert(flat(1))
                store.reset(next_id)
            store.insert(flat(2))
            assert len(log) == 4
            assert log.get_latest_data(0).cuts == (1, 2, 3)
        with LoggedDataStore(tmp_path / "log") as log:
            store.forward_to(None)
            store.insert(flat(3))
            store.forward_to(log)
            assert [int(item["y"]) for item in held(log).values()] == [1, 1, 1, 2, 3]

    def test_another_store_gives_all_it_has(self, tmp_path: Path) -> None:
        for n in (1, 2):
            store = make_replay()
            store.batch_insert([flat(1), flat(2)])
            with LoggedDataStore(tmp_path / "log") as log:
                store.forward_to(log)
                assert len(log) == 2 * n

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
    def test_a_forked_child_goes_on_without_the_log(self, log: LoggedDataStore) -> None:
        store: DataStoreBase = make_replay()
        store.forward_to(log)
        store.insert(flat(1))
        child = os.fork()
        if not child:
            status = 1
            try:
                store.insert(flat(2))
                store.batch_insert([flat(3)])
                status = 0 if store.latest_data_id() == 3 else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        store.insert(flat(22))
        assert [int(item["y"]) for item in held(log).values()] == [1, 22]
