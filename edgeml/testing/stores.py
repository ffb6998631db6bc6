"""What every data store promises: subclass `StoreTests` to hold one of your own to it."""

from __future__ import annotations

import copy
import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.core.errors import Closed
from edgeml.core.frames import frame
from edgeml.core.plugins import load_codec
from edgeml.data import Batch, DataStoreBase, checkpoint

__all__ = ["StoreTests"]


class StoreTests:
    """The conformance suite of data stores, for pytest.

    ::

        class TestMyStore(StoreTests):
            def make_store(self, capacity):
                return MyStore(capacity)

            def make_item(self, i):
                return {"state": np.full(3, i, np.float32), "reward": float(i)}

    A store that has `DataStoreBase`'s own `batch_insert` lacks one promise, and the test of it is
    skipped and says so: of a batch that fails, what came before stays.
    """

    def make_store(self, capacity: int) -> DataStoreBase:
        """Return an empty store that lets go of its oldest items when it is full."""
        raise NotImplementedError

    def make_item(self, i: int) -> Any:
        """Return a fresh item, like no other i's, with at least one array in it."""
        raise NotImplementedError

    def fill_store(self, capacity: int, n: int) -> DataStoreBase:
        """Return a store into which items 1 to n were inserted one by one."""
        store = self.make_store(capacity)
        for i in range(1, n + 1):
            store.insert(self.make_item(i))
        return store

    def assert_holds(self, batch: Batch, first: int, last: int) -> None:
        """Assert that a batch holds items ``first`` to ``last``, each as `make_item` made it."""
        assert batch.first_id == first
        assert len(batch) == last + 1 - first
        for i, item in enumerate(batch, first):
            assert _same(item, self.make_item(i)), f"item {i} came back as {item}"

    def test_its_own_items_can_be_told_apart(self) -> None:
        """What the other tests rest on: items differ, and have arrays."""
        assert _same(self.make_item(1), self.make_item(1))
        assert not _same(self.make_item(1), self.make_item(2))
        assert _list_arrays(self.make_item(1)), "make_item(i) gives at least one array"

    def test_an_empty_store(self) -> None:
        """A new store is empty, and its first id will be 1."""
        store = self.make_store(5)
        assert store.capacity == 5
        assert len(store) == store.latest_data_id() == 0
        self.assert_holds(store.get_latest_data(0), 1, 0)

    def test_a_store_has_room_for_something(self) -> None:
        """A capacity below 1 is refused."""
        with pytest.raises(ValueError, match="capacity"):
            self.make_store(0)

    def test_ids_count_insertions_from_one(self) -> None:
        """Every insert takes the next id, and no more than the capacity is held."""
        store = self.make_store(5)
        for i in range(1, 13):
            store.insert(self.make_item(i))
            assert store.latest_data_id() == i
            assert len(store) == min(i, 5)

    @pytest.mark.parametrize("from_id", range(13))
    def test_gives_what_is_past_an_id_and_still_held(self, from_id: int) -> None:
        """A reader gets what it lacks, and sees by the first id what it missed."""
        store = self.fill_store(capacity=5, n=12)
        self.assert_holds(store.get_latest_data(from_id), max(from_id + 1, 8), 12)

    def test_an_id_of_the_future_gives_nothing(self) -> None:
        """A reader that has more than the store ever had gets nothing."""
        assert len(self.fill_store(capacity=5, n=3).get_latest_data(7)) == 0

    @pytest.mark.parametrize("limit", [0, 1, 3, 5, 100])
    def test_a_limit_gives_the_oldest(self, limit: int) -> None:
        """A limited read gives the oldest items, so that reading on misses none."""
        store = self.fill_store(capacity=5, n=12)
        self.assert_holds(store.get_latest_data(0, limit=limit), 8, min(7 + limit, 12))
        self.assert_holds(store.get_latest_data(10, limit=limit), 11, min(10 + limit, 12))

    @pytest.mark.parametrize("columns", [False, True])
    def test_a_batch_is_inserted_as_its_items_would_be(self, columns: bool) -> None:
        """A batch, of items or columns, ends as single inserts would."""
        store = self.make_store(5)
        last = 0
        for n in (1, 3, 0, 4, 5, 2, 13, 5):  # across the end of a ring, and longer than it
            items = [self.make_item(i) for i in range(last + 1, last + n + 1)]
            store.batch_insert(Batch.of(items) if columns else items)
            last += n
            assert store.latest_data_id() == last
            assert len(store) == min(last, 5)
            self.assert_holds(store.get_latest_data(0), max(1, last - 4), last)

    def test_of_a_batch_that_fails_nothing_is_inserted(self) -> None:
        """All or none: else nobody knew what to send again."""
        store = self.fill_store(capacity=10, n=3)
        if type(store).batch_insert is DataStoreBase.batch_insert:
            pytest.skip("its batch_insert is DataStoreBase's: what came before a failure stays")

        class Torn(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                yield self[0]
                raise OSError("the second can't be read")

        with pytest.raises(OSError, match="the second"):
            store.batch_insert(Torn([self.make_item(4), self.make_item(5)]))
        store.insert(self.make_item(4))
        self.assert_holds(store.get_latest_data(0), 1, 4)

    def test_singles_and_batches_mix(self) -> None:
        """Reads span what came singly, as items and as columns."""
        store = self.make_store(20)
        store.insert(self.make_item(1))
        store.batch_insert([self.make_item(i) for i in range(2, 6)])
        store.batch_insert(Batch.of([self.make_item(i) for i in range(6, 10)]))
        store.insert(self.make_item(10))
        self.assert_holds(store.get_latest_data(0), 1, 10)
        self.assert_holds(store.get_latest_data(3, limit=4), 4, 7)

    @pytest.mark.parametrize("way", ["insert", "items", "columns"])
    def test_what_was_inserted_may_be_changed_afterwards(self, way: str) -> None:
        """The store holds copies of what it was given."""
        store = self.make_store(5)
        item = self.make_item(1)
        if way == "insert":
            store.insert(item)
        elif way == "items":
            store.batch_insert([item])
        else:
            batch = Batch.of([item])
            if batch.columns is None:
                pytest.skip("these items make no columns")
            item = _map_leaves(batch.columns, np.copy)
            store.batch_insert(Batch.from_columns(item))
        _spoil(item)
        self.assert_holds(store.get_latest_data(0), 1, 1)

    def test_what_was_returned_may_be_changed(self) -> None:
        """Changing what a reader got, where it can be, changes no store."""
        store = self.fill_store(capacity=5, n=3)
        batch = store.get_latest_data(0)
        for item in [*batch, batch.columns]:
            _spoil(item)
        self.assert_holds(store.get_latest_data(0), 1, 3)

    def test_what_was_returned_stays_as_it_is(self) -> None:
        """Later inserts change nothing that a reader already has."""
        store = self.fill_store(capacity=5, n=7)
        batch = store.get_latest_data(0)
        store.batch_insert([self.make_item(i) for i in range(8, 11)])
        for i in range(11, 20):
            store.insert(self.make_item(i))
        self.assert_holds(batch, 3, 7)

    def test_releasing_leaves_later_items(self) -> None:
        """Releasing touches no later item and no id."""
        store = self.fill_store(capacity=5, n=4)
        store.release(2)
        self.assert_holds(store.get_latest_data(2), 3, 4)
        store.release(100)
        assert store.latest_data_id() == 4
        store.insert(self.make_item(5))
        self.assert_holds(store.get_latest_data(4), 5, 5)

    @pytest.mark.parametrize("next_id", [1, 8, 1000])
    def test_a_reset_store_is_empty_and_counts_from_where_it_is_told(self, next_id: int) -> None:
        """Nothing of before is left, and ids go on from the one given."""
        store = self.fill_store(capacity=5, n=7)
        store.reset(next_id)
        assert len(store) == 0
        assert store.latest_data_id() == next_id - 1
        self.assert_holds(store.get_latest_data(0), next_id, next_id - 1)
        for i in range(next_id, next_id + 7):
            store.insert(self.make_item(i))
            assert store.latest_data_id() == i
            assert len(store) == min(i + 1 - next_id, 5)
        self.assert_holds(store.get_latest_data(0), next_id + 2, next_id + 6)

    def test_a_reset_store_counts_on_unless_told_otherwise(self) -> None:
        """So that who reads it misses nothing, and takes nothing for what it has."""
        store = self.fill_store(capacity=5, n=7)
        store.reset()
        assert (len(store), store.latest_data_id()) == (0, 7)
        store.insert(self.make_item(8))
        self.assert_holds(store.get_latest_data(7), 8, 8)
        with pytest.raises(ValueError, match="from 1 on"):
            store.reset(0)

    def test_an_interruption_is_told_to_whoever_reads(self) -> None:
        """And goes on to be told by the store that the items go to, and by a checkpoint's."""
        store = self.make_store(5)
        store.interrupt()  # before the first there is nothing to interrupt
        for i in range(1, 5):
            store.insert(self.make_item(i))
        store.interrupt()
        store.batch_insert([self.make_item(5), self.make_item(6)])
        assert store.get_latest_data(0).cuts == (3,)
        assert store.get_latest_data(4).cuts == (0,)
        assert store.get_latest_data(5).cuts == store.get_latest_data(0, limit=3).cuts == ()
        store.interrupt()
        other = self.make_store(20)
        other.batch_insert([self.make_item(i) for i in range(1, 4)])
        other.batch_insert(Batch.from_payload(store.get_latest_data(4).to_payload()))
        assert other.get_latest_data(1).cuts == (2,)  # of the second that came
        anew = self.make_store(5)
        _carry(store, anew)
        anew.insert(self.make_item(7))
        assert anew.get_latest_data(0).cuts == (2, 4)
        anew.reset()
        anew.insert(self.make_item(8))
        assert anew.get_latest_data(0).cuts == (0,), "what came before a reset is over"
        anew.reset(8)
        anew.insert(self.make_item(8))
        assert anew.get_latest_data(0).cuts == ()

    def test_an_interruption_changes_no_item(self) -> None:
        """Interrupting concerns episodes, not items."""
        store = self.fill_store(capacity=5, n=3)
        store.interrupt()
        store.interrupt()
        store.insert(self.make_item(4))
        self.assert_holds(store.get_latest_data(0), 1, 4)

    def test_sources_that_take_turns_keep_their_episodes(self) -> None:
        """Whoever reads can tell what follows upon what; where it knows no lanes, nothing does.

        Not across another source's items, that is. A store to which the items go on can tell, too,
        and a checkpoint's.
        """
        store, other = self.make_store(20), self.make_store(20)
        laned = store.knows_lanes

        def insert(source: str, *numbers: int) -> None:
            store.insert_from(source, Batch.of([self.make_item(i) for i in numbers]))

        insert("a", 1, 2)
        insert("b", 3, 4)
        insert("a", 5)
        insert("b", 6)
        store.interrupt_from("a")
        insert("a", 7)
        insert("b", 8)
        insert("a", 9, 10)
        leaders = {2: 1, 4: 3, 10: 9} | ({5: 2, 6: 4, 8: 6, 9: 7} if laned else {})
        assert _find_leaders(store.get_latest_data(0)) == leaders
        later = {item: leader for item, leader in leaders.items() if leader > 3}
        assert _find_leaders(store.get_latest_data(3)) == later
        for first, n in ((0, 4), (4, 2), (6, 4)):  # as it is uploaded, in pieces
            batch = store.get_latest_data(first, limit=n)
            other.insert_from("c", Batch.from_payload(batch.to_payload()))
            other.insert_from("d", Batch.of([self.make_item(99)]))
        places = {i: i + (i > 4) + (i > 6) for i in range(1, 11)}
        told = other.knows_lanes
        expected = {
            places[item]: places[leader]
            for item, leader in leaders.items()
            if told or (item, leader) in {(2, 1), (4, 3), (10, 9)}
        }
        found = _find_leaders(other.get_latest_data(0))
        assert {i: leader for i, leader in found.items() if i in places.values()} == expected
        anew = self.make_store(20)
        _carry(store, anew)
        store = anew
        insert("b", 11)
        insert("a", 12)
        if laned:
            leaders |= {11: 8, 12: 10}
        assert _find_leaders(store.get_latest_data(0)) == leaders
        store.interrupt()  # in all lanes
        insert("a", 13)
        insert("b", 14)
        assert _find_leaders(store.get_latest_data(0)) == leaders

    @pytest.mark.parametrize("n", [0, 3, 5, 12])
    def test_a_checkpoint_brings_it_back(self, n: int, tmp_path: Path) -> None:
        """A store loaded from a checkpoint is the one that was saved, and goes on as that would."""
        report = checkpoint.save(
            tmp_path / "saved", stores={"it": self.fill_store(capacity=5, n=n)}
        )
        assert report.items == {"it": min(n, 5)}
        assert report.missed == {"it": 0}
        for store in self.make_store(5), self.fill_store(capacity=5, n=4):
            checkpoint.load(tmp_path / "saved", {"it": store})
            for last in n, n + 1, n + 7:
                for i in range(store.latest_data_id() + 1, last + 1):
                    store.insert(self.make_item(i))
                assert store.latest_data_id() == last
                assert len(store) == min(last, 5)
                self.assert_holds(store.get_latest_data(0), max(1, last - 4), last)

    @pytest.mark.parametrize("capacity", [1, 3, 8])
    def test_a_checkpoint_fits_another_capacity(self, capacity: int, tmp_path: Path) -> None:
        """The newest items go into a smaller store, and a larger one has room for more."""
        checkpoint.save(tmp_path / "saved", stores={"it": self.fill_store(capacity=5, n=12)})
        store = self.make_store(capacity)
        checkpoint.load(tmp_path / "saved", {"it": store})
        assert store.latest_data_id() == 12
        assert len(store) == min(5, capacity)
        self.assert_holds(store.get_latest_data(0), max(8, 13 - capacity), 12)
        store.insert(self.make_item(13))
        self.assert_holds(store.get_latest_data(0), max(8, 14 - capacity), 13)

    def test_what_a_checkpoint_is_given_stays_as_it_is(self) -> None:
        """It is written while inserts go on, which must not change it."""
        store = self.fill_store(capacity=5, n=7)
        batch, extra = store.dump(3, limit=4)
        self.assert_holds(batch, 4, 7)
        given = [batch.to_payload(), extra, store.state()]
        codec = load_codec("msgpack")
        before = frame(codec.encode(given))
        for i in range(8, 20):
            store.insert(self.make_item(i))
        assert frame(codec.encode(given)) == before

    def test_a_batch_survives_its_payload(self) -> None:
        """A batch is the same at the far side, and goes into a store there."""
        batch = self.fill_store(capacity=5, n=7).get_latest_data(0)
        received = Batch.from_payload(batch.to_payload())
        self.assert_holds(received, 3, 7)
        other = self.make_store(5)
        other.batch_insert(received)
        for here, there in zip(other.get_latest_data(0), batch, strict=True):
            assert _same(here, there)

    def test_items_of_unlike_structure_break_nothing(self, tmp_path: Path) -> None:
        """Two clients may send what they like: each is taken or refused, and nothing is lost."""
        store = self.fill_store(capacity=30, n=3)
        expected = [self.make_item(i) for i in range(1, 4)]
        x = np.arange(2.0)
        for columns in ({"x": x}, {"x": {"y": x}}, {"x": (x, x)}, {"x": [{"y": x}]}, {"x": x > 0}):
            for batch in (Batch.from_columns(columns), list(Batch.from_columns(columns))):
                try:
                    store.batch_insert(batch)
                except ValueError:
                    continue
                expected += list(batch)
        store.insert(self.make_item(4))
        expected.append(self.make_item(4))
        for first in range(len(expected)):
            for limit in (1, 3, None):
                batch = store.get_latest_data(first, limit=limit)
                assert batch.first_id == first + 1
                for item, right in zip(batch, expected[first:][:limit], strict=True):
                    assert _same(item, right)
        checkpoint.save(tmp_path / "saved", stores={"it": store})
        other = self.make_store(30)
        checkpoint.load(tmp_path / "saved", {"it": other})
        for item, right in zip(other.get_latest_data(0), expected, strict=True):
            assert _same(item, right)

    @pytest.mark.parametrize("sizes", [[1] * 12, [12], [1, 4, 1, 1, 5]])
    def test_stacks_of_frames_stay_each_item_s_own(self, sizes: list[int], tmp_path: Path) -> None:
        """What items seem to have in common may be kept once, but comes back as it was of each."""
        store, items = self.make_store(5), _make_stacked()
        try:
            self.make_store(5).insert(items[0])
        except ValueError:
            pytest.skip("it takes no transitions with stacks of frames")
        last = 0
        for size in sizes:
            batch = items[last : last + size]
            store.insert(batch[0]) if size == 1 else store.batch_insert(Batch.of(batch))
            last += size
            held = items[max(0, last - 5) : last]
            for back, item in zip(store.get_latest_data(0), held, strict=True):
                assert _same(back, item)
        checkpoint.save(tmp_path / "saved", stores={"it": store})
        other = self.make_store(5)
        checkpoint.load(tmp_path / "saved", {"it": other})
        for back, item in zip(other.get_latest_data(0), items[-5:], strict=True):
            assert _same(back, item)

    @pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_it_says_what_to_do_instead_of_pickling(self, copied: Callable[[Any], Any]) -> None:
        """A process that is spawned gets no store with its arguments: it makes its own."""
        with pytest.raises(TypeError, match=r"make it in the process that uses it.*checkpoint"):
            copied(self.fill_store(capacity=5, n=3))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
    @pytest.mark.filterwarnings("ignore:.*fork")
    def test_a_forked_child_has_it_whole(self) -> None:
        """Also where other threads were amid an insert and a read: nothing there waits for them.

        What can't be used in a child says so at once, with `Closed`.
        """
        items = [self.make_item(i) for i in range(1, 50)]
        store = self.make_store(16)
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                store.batch_insert(items[: 1 + store.latest_data_id() % 8])
                store.insert(items[0])

        def read() -> None:
            while not ended.is_set():
                store.get_latest_data(0)

        with _switch_eagerly(), ThreadPoolExecutor(2) as pool:
            running = [pool.submit(write), pool.submit(read)]
            try:
                for _ in range(6):
                    assert _run_in_child(lambda: _use(store, items)) == ""
            finally:
                ended.set()
            for thread in running:
                thread.result(timeout=30)

    def test_readers_never_see_half_an_insert(self) -> None:
        """Whatever threads do, an item read is one that was written, and its id is right."""
        last = 1500
        items = [self.make_item(i) for i in range(last + 1)]
        store = self.make_store(16)
        start = threading.Barrier(3, timeout=30)

        def write() -> None:
            start.wait()
            i = 1
            while i <= last:
                n = min(1 + i % 4, last + 1 - i)
                if n == 1:
                    store.insert(items[i])
                else:
                    store.batch_insert(items[i : i + n])
                i += n

        def read() -> int:
            start.wait()
            newest = 0
            while newest < last:
                batch = store.get_latest_data(max(0, newest - 4))
                for i, item in enumerate(batch, batch.first_id):
                    assert _same(item, items[i]), f"torn: item {i} came back as {item}"
                assert batch.first_id + len(batch) > newest, "older than before"
                newest = batch.first_id + len(batch) - 1
            return newest

        with _switch_eagerly(), ThreadPoolExecutor(3) as pool:
            writer, *readers = pool.submit(write), pool.submit(read), pool.submit(read)
            assert [reader.result(timeout=60) for reader in readers] == [last, last]
            writer.result(timeout=60)

    def test_writers_lose_nothing_of_each_other(self) -> None:
        """Two threads that insert at once both get everything in."""
        n = 200
        store = self.make_store(2 * n)
        start = threading.Barrier(2, timeout=30)

        def write(first: int) -> None:
            start.wait()
            for i in range(first, first + n):
                store.insert(self.make_item(i))

        with _switch_eagerly(), ThreadPoolExecutor(2) as pool:
            list(pool.map(write, [0, n]))
        assert store.latest_data_id() == len(store) == 2 * n
        held = list(store.get_latest_data(0))
        for i in [0, 1, n - 1, n, n + 1, 2 * n - 1]:
            assert sum(_same(item, self.make_item(i)) for item in held) == 1, f"item {i} is lost"


def _make_stacked() -> list[Any]:
    """Transitions with stacks of three frames, which move on by one, or don't, or not wholly."""
    frames = np.arange(15, dtype=np.uint8)[:, None, None, None] * np.ones((40, 40, 1), np.uint8)
    frames[:, 0] = 0  # where they begin they are the same
    items = [
        {
            "observations": frames[t : t + 3].copy(),
            "next_observations": frames[t + 1 : t + 4].copy(),
            "rewards": float(t),
            "masks": 1.0,
            "dones": t == 6,
        }
        for t in range(12)
    ]
    items[2]["next_observations"][0, -1, -1] += 1  # the item's own second frame, but for a byte
    items[4]["observations"][2, -1, -1] += 1  # the one that the item before led to, likewise
    items[7]["observations"][:] = items[7]["observations"][2]  # an episode begins with one frame
    items[8] = {**items[8], "observations": items[5]["observations"]}  # an item is missing, say
    items[10]["next_observations"] = items[1]["next_observations"]
    return items


def _use(store: DataStoreBase, items: list[Any]) -> None:
    """Use a store in a forked child."""
    latest = store.latest_data_id()
    try:
        for i, item in enumerate(items, 1):
            store.insert(item)
            assert store.latest_data_id() == latest + i
        held = store.get_latest_data(latest)
        store.batch_insert(items[:3])
        store.release(1)
        store.state()
        store.reset()
    except Closed:
        return
    for here, there in zip(held, items[-16:], strict=True):
        assert _same(here, there)


def _run_in_child(work: Callable[[], None]) -> str:
    """Run something in a forked child, and return what went wrong there."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(write)
    try:
        if not select.select([read], [], [], 20)[0]:  # until it has ended
            return "it froze"
        return os.read(read, 4000).decode()
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _find_leaders(batch: Batch) -> dict[int, int]:
    """Return upon which item each one follows, by their ids, as far as a batch tells."""
    leaders, newest = {}, dict[int, int]()
    lanes = [0] * len(batch) if batch.lanes is None else batch.lanes.tolist()
    for position, lane in enumerate(lanes):
        item_id = batch.first_id + position
        if position in batch.cuts:
            newest.clear()
        if lane in newest:
            leaders[item_id] = newest[lane]
        newest[lane] = item_id
    return leaders


def _carry(store: DataStoreBase, other: DataStoreBase) -> None:
    """Take everything over to another store, as a checkpoint does."""
    batch, extra = store.dump(0)
    other.reset(batch.first_id)
    other.restore(batch, extra)
    other.set_state(store.state())


def _same(left: Any, right: Any) -> bool:
    """Whether two items are equal, a numpy scalar being equal to Python's number."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (dict, tuple, list)) or isinstance(right, (dict, tuple, list)):
        return (
            type(left) is type(right) and len(left) == len(right) and all(map(_same, left, right))
        )
    return np.shape(left) == np.shape(right) and bool(np.all(left == right))


def _map_leaves(node: Any, function: Any) -> Any:
    """Return a tree with the function applied to each leaf."""
    if isinstance(node, dict):
        return {key: _map_leaves(child, function) for key, child in node.items()}
    if isinstance(node, (tuple, list)):
        return type(node)([_map_leaves(child, function) for child in node])
    return function(node)


def _list_arrays(node: Any) -> list[Any]:
    """Return the arrays in a tree."""
    arrays: list[Any] = []
    _map_leaves(node, lambda leaf: arrays.append(leaf) if isinstance(leaf, np.ndarray) else None)
    return arrays


def _spoil(node: Any) -> None:
    """Change all that can be changed in a tree."""
    for array in _list_arrays(node):
        if array.flags.writeable:
            array[...] = np.where(array == 0, 1, 0)
    if isinstance(node, (dict, list)):
        node.clear()


@contextmanager
def _switch_eagerly() -> Iterator[None]:
    """Let threads interrupt each other as often as Python can, so that a missing lock shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
