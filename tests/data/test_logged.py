"""A log keeps what was inserted, whatever becomes of the process, the disk and the files."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    NotEncodable,
    Overloaded,
)
from edgeml.data import Batch, DataStoreBase, LoggedDataStore, Sync, checkpoint, log_writer
from edgeml.testing import StoreTests
from pairs import no_file_larger_than, no_thread_left, took, wait_until


def transition(i: int) -> dict[str, Any]:
    return {
        "obs": {"cam": np.full((20, 20, 3), i % 251, np.uint8), "state": np.full(3, i, np.float32)},
        "reward": float(i),
        "done": i % 2 == 0,
    }


def flat(i: int) -> dict[str, Any]:
    return {"x": np.full(4, i, np.float32), "y": np.int64(i), "z": float(i)}


def text(i: int) -> dict[str, Any]:
    return {"task": f"pick up {i}", "path": [np.full(i % 3 + 1, i)], "more": None}


def held(store: DataStoreBase, after: int = 0) -> dict[int, Any]:
    """All items by their ids, however many reads that takes."""
    found: dict[int, Any] = {}
    while len(batch := store.get_latest_data(after)):
        found.update(enumerate(batch, batch.first_id))
        after = batch.first_id + len(batch) - 1
    return found


def check(items: dict[int, Any], make: Any = flat) -> None:
    for i, item in items.items():
        np.testing.assert_equal(item, make(i))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, and a disk that takes no time."""
    monkeypatch.setattr(log_writer, "_SIZES", (1 << 13, 1 << 13))
    monkeypatch.setattr(log_writer, "_sync", lambda fd: None)
    monkeypatch.setattr(log_writer, "sync_names", lambda directory: None)


class _Logged(StoreTests):
    @pytest.fixture(autouse=True)
    def _directories(self, tmp_path: Path) -> Iterator[None]:
        self._paths = (tmp_path / f"log{i}" for i in itertools.count())
        self._stores: list[LoggedDataStore] = []
        yield
        for store in self._stores:
            store.close()

    def make_store(self, capacity: int) -> DataStoreBase:
        store = LoggedDataStore(next(self._paths), capacity, "drop_oldest")
        self._stores.append(store)
        return store


class TestLoggedRows(_Logged):
    def make_item(self, i: int) -> Any:
        return transition(i)


class TestLoggedFlatRows(_Logged):
    def make_item(self, i: int) -> Any:
        return flat(i)


class TestLoggedValues(_Logged):
    def make_item(self, i: int) -> Any:
        return text(i)


class Pair(NamedTuple):
    x: int
    y: float


class TestItems:
    @pytest.mark.parametrize(
        "item",
        [
            {"a": 1, "b": True, "c": 1.5, "d": np.float16(2)},
            (np.arange(6).reshape(2, 3), [np.bool_(True), {"x": {3: np.zeros((0, 2)), "y": 1}}]),
            np.arange(3, dtype=np.complex64),
            {"x": np.asfortranarray(np.arange(6).reshape(2, 3)), "y": np.arange(8)[::2]},
            {"x": np.arange(3, dtype=">i4"), "y": 2},
            {"x": np.zeros((2, 0)), "y": np.uint8(7)},
            {"big": 1 << 70, "none": None, "raw": b"x", "set": {1, 2}},
            {"image": np.arange(3 << 20, dtype=np.uint8).reshape(1024, 1024, 3)},
            {"ragged": [np.zeros(2), "text"], "nothing": {}},
            "text",
            5,
        ],
        ids=lambda item: str(item)[:30],
    )
    def test_they_come_back_as_they_were(self, item: Any, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path / "log", 10) as log:
            for _ in range(2):
                log.insert(item)
            log.batch_insert([item, item])
            before = list(log.get_latest_data(0))
        with LoggedDataStore(tmp_path / "log", 10) as log:
            after = list(log.get_latest_data(0))
        for each in (*before, *after):
            np.testing.assert_equal(each, item)
        assert len(after) == 4
        plain = next(iter(Batch.of([item])))
        if isinstance(plain, dict) and isinstance(plain.get("x"), np.ndarray):
            assert after[0]["x"].dtype == plain["x"].dtype.newbyteorder("=")

    def test_numbers_of_other_kinds_are_not_taken_for_each_other(self, tmp_path: Path) -> None:
        values = [1, 1.0, True, np.int8(1), np.float32(1), np.ones(1), 1 << 63, np.ones((1, 1))]
        with LoggedDataStore(tmp_path / "log", 100) as log:
            for value in (*values, *values[::-1]):
                log.insert({"a": value, "b": np.zeros(2)})
            log.insert({"b": np.zeros(2), "a": 1})
            log.insert({"a": 1})
            log.insert({"a": 1, "c": np.zeros(2)})
        with LoggedDataStore(tmp_path / "log", 100) as log:
            items = list(log.get_latest_data(0))
        for value, item in zip((*values, *values[::-1]), items, strict=False):
            assert np.asarray(item["a"]).dtype == np.asarray(value).dtype
            np.testing.assert_equal(item["a"], value)
        assert [sorted(item) for item in items[-3:]] == [["a", "b"], ["a"], ["a", "c"]]

    def test_a_namedtuple_comes_back_as_the_dict_that_codecs_make_of_it(
        self, tmp_path: Path
    ) -> None:
        with LoggedDataStore(tmp_path / "log", 10) as log:
            log.insert(Pair(1, 2.0))
            assert list(log.get_latest_data(0)) == [{"x": 1, "y": 2.0}]

    def test_items_of_ever_other_shapes_are_kept_all_the_same(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path / "log", 2000) as log:
            for i in range(600):
                log.insert({"x": np.full(i, i)})
        with LoggedDataStore(tmp_path / "log", 2000) as log:
            check(held(log), lambda i: {"x": np.full(i - 1, i - 1)})
            assert len(log) == 600

    def test_what_no_codec_carries_is_refused_and_nothing_is_inserted(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path / "log", 10) as log:
            log.insert(flat(1))
            with pytest.raises(NotEncodable):
                log.insert({"x": object()})
            with pytest.raises(NotEncodable):
                log.batch_insert([{"x": "fine"}, {"x": object()}])
            log.insert(flat(2))
            check(held(log))
            assert len(log) == 2

    def test_a_large_batch_lies_in_a_file_of_its_size(self, small: None, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path / "log", 10_000) as log:
            log.insert(flat(1))
            log.batch_insert([flat(i) for i in range(2, 2000)])
            log.batch_insert(Batch.of([flat(i) for i in range(2000, 4000)]).cut([5, 70]))
            log.insert(flat(4000))
        with LoggedDataStore(tmp_path / "log", 10_000) as log:
            check(held(log))
            assert log.latest_data_id() == len(log) == 4000
            assert log.get_latest_data(0).cuts == (2004, 2069)


class TestReopening:
    def test_what_comes_next_follows_upon_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with LoggedDataStore(path, 100) as log:
            for i in range(1, 6):
                log.insert(flat(i))
            log.interrupt()
            log.insert(flat(6))
            first = log.numbering
        with LoggedDataStore(path, 100) as log:
            assert (len(log), log.latest_data_id(), log.lost, log.synced_id) == (6, 6, 0, 6)
            log.insert(flat(7))
            batch = log.get_latest_data(0)
            check(dict(enumerate(batch, 1)))
            assert batch.cuts == (5, 6)
            assert log.numbering.id != first.id
            assert log.numbering.lineage == ((first.id, 6),)
        with LoggedDataStore(path, 100) as log:
            assert (first.id, 6) in log.numbering.lineage

    def test_what_was_released_stays_so(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with LoggedDataStore(path, 100) as log:
            log.batch_insert([flat(i) for i in range(1, 21)])
            log.release(15)
            assert len(log) == 5
        with LoggedDataStore(path, 100) as log:
            assert sorted(held(log)) == [16, 17, 18, 19, 20]
            log.release(50)
            assert (len(log), log.latest_data_id()) == (0, 20)
        with LoggedDataStore(path, 100) as log:
            log.insert(flat(21))
            assert sorted(held(log)) == [21]

    @pytest.mark.usefixtures("small")
    def test_files_are_deleted_when_all_their_items_are_released(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with LoggedDataStore(path, 10_000) as log:
            for i in range(1, 1001):
                log.insert(flat(i))
            files = len(list(path.glob("*.log")))
            assert files > 5
            log.release(500)
            wait_until(lambda: len(list(path.glob("*.log"))) <= files // 2 + 2)
            check(items := held(log))
            assert sorted(items) == list(range(501, 1001))
            log.release(1000)
            wait_until(lambda: len(list(path.glob("*.log"))) <= 2)
            log.insert(flat(1001))
        with LoggedDataStore(path, 10_000) as log:
            assert sorted(held(log)) == [1001]

    @pytest.mark.usefixtures("small")
    def test_ids_that_were_begun_anew_stay_so(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with LoggedDataStore(path, 10_000) as log:
            for i in range(1, 301):
                log.insert(flat(i))
            before = log.numbering
            log.reset(5)
            assert log.numbering.id != before.id
            assert not log.numbering.lineage
            log.insert(flat(5))
        with LoggedDataStore(path, 10_000) as log:
            check(items := held(log))
            assert sorted(items) == [5]

    def test_a_smaller_capacity_keeps_the_newest_where_it_may(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        with LoggedDataStore(path, 100) as log:
            log.batch_insert([flat(i) for i in range(1, 21)])
        with LoggedDataStore(path, 5) as log:
            assert len(log) == 20
            with pytest.raises(Overloaded, match="20 of 5 not taken yet"):
                log.insert(flat(21))
        with LoggedDataStore(path, 5, "drop_oldest") as log:
            assert (log.dropped, sorted(held(log))) == (15, [16, 17, 18, 19, 20])

    def test_one_store_has_the_directory(self, tmp_path: Path) -> None:
        with (
            LoggedDataStore(tmp_path, 5),
            pytest.raises(BlockingIOError, match=r"another store keeps its log there.*close it"),
        ):
            LoggedDataStore(tmp_path, 5)
        LoggedDataStore(tmp_path, 5).close()

    def test_a_directory_that_is_none_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="choose a directory that can be written to"):
            LoggedDataStore(tmp_path / "file", 5)

    def test_one_that_is_dropped_is_closed(self, tmp_path: Path) -> None:
        with no_thread_left():
            log = LoggedDataStore(tmp_path, 5)
            log.insert(flat(1))
            del log
            gc.collect()
        with LoggedDataStore(tmp_path, 5) as log:
            assert sorted(held(log)) == [1]

    def test_one_that_is_closed_says_so(self, tmp_path: Path) -> None:
        log = LoggedDataStore(tmp_path, 5)
        log.insert(flat(1))
        log.close()
        log.close()
        for use in (lambda: log.insert(flat(2)), lambda: log.get_latest_data(0), log.sync):
            with pytest.raises(Closed, match="has been closed"):
                use()
        assert log.latest_data_id() == 1

    def test_no_descriptor_or_mapping_is_left(self, small: None, tmp_path: Path) -> None:
        def count() -> int:
            gc.collect()
            mapped = Path("/proc/self/maps").read_text().count(str(tmp_path))
            return len(os.listdir("/proc/self/fd")) + mapped

        before = count()
        for _ in range(3):
            with LoggedDataStore(tmp_path, 10_000) as log:
                for i in range(1000):
                    log.insert(flat(i))
                log.release(log.latest_data_id() - 10)
        del log
        assert count() <= before

    def test_a_log_with_a_hole_goes_into_a_checkpoint(self, small: None, tmp_path: Path) -> None:
        damage(tmp_path / "log", 300, lambda content, size: content[size // 2 : size // 2 + 99])
        with LoggedDataStore(tmp_path / "log", 1000) as log:
            assert log.lost > 0
            checkpoint.save(tmp_path / "saved", stores={"it": log})
        with LoggedDataStore(tmp_path / "other", 1000) as log:
            checkpoint.load(tmp_path / "saved", {"it": log})
            check(items := held(log))
            assert max(items) == 300


class TestFull:
    def test_it_raises_blocks_or_drops_the_oldest(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path / "raise", 3) as log:
            log.batch_insert([flat(1), flat(2)])
            with pytest.raises(Overloaded, match="is full: 2 of 3"):
                log.batch_insert([flat(3), flat(4)])
            log.insert(flat(3))
            with pytest.raises(Overloaded):
                log.insert(flat(4))
            with pytest.raises(ValueError, match="a batch of 4"):
                log.batch_insert([flat(i) for i in range(4)])
            log.release(1)
            log.insert(flat(4))
            assert sorted(held(log)) == [2, 3, 4]
        with LoggedDataStore(tmp_path / "block", 1, "block", timeout=0.05) as log:
            log.insert(flat(1))
            with pytest.raises(DeadlineExceeded, match="no room for 1"):
                log.insert(flat(2))
        with LoggedDataStore(tmp_path / "block", 1, "block") as log:
            thread = threading.Timer(0.05, log.release, [1])
            thread.start()
            log.insert(flat(2))
            thread.join()
            assert sorted(held(log)) == [2]
        with LoggedDataStore(tmp_path / "drop", 2, "drop_oldest") as log:
            for i in range(1, 6):
                log.insert(flat(i))
            log.batch_insert([flat(i) for i in range(6, 10)])
            assert (log.dropped, sorted(held(log))) == (7, [8, 9])

    def test_a_full_disk_is_told_and_goes_on_when_there_is_room(self, small_disk: Path) -> None:
        path = small_disk / "log"
        image = {"x": np.zeros((100, 1000), np.uint8)}
        with LoggedDataStore(path, 1000) as log:
            text = r"bytes are needed; nothing was inserted.*free some"
            with pytest.raises(OSError, match=text) as at:
                deque(map(log.insert, [image] * 100), 0)
            assert at.value.errno == errno.ENOSPC
            n = log.latest_data_id()
            assert len(log) == n == len(held(log)) > 10
            with pytest.raises(OSError, match="free some space"):
                log.batch_insert([image] * 5)
            assert log.latest_data_id() == n
        with LoggedDataStore(path, 1000) as log:  # there is room to open it
            assert len(log) == n
            log.release(n - 2)

            def try_again() -> bool:
                try:
                    log.insert(image)
                except OSError:
                    return False
                return True

            wait_until(try_again)
            assert sorted(held(log)) == [n - 1, n, n + 1]

    def test_a_limit_of_the_system_is_told(self, tmp_path: Path) -> None:
        with no_file_larger_than(1 << 19), pytest.raises(OSError, match="File too large"):
            LoggedDataStore(tmp_path / "log", 10).insert({"x": np.zeros(1 << 20, np.uint8)})

    def test_a_disk_that_fails_is_told_until_it_works(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(log_writer, "_RETRY", 0.05)
        with LoggedDataStore(tmp_path / "log", 100, sync=Sync(items=1)) as log:
            log.insert(flat(1))
            log.sync()

            def fail(fd: int) -> None:
                raise OSError(errno.EIO, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(log_writer, "_sync", fail)
                log.insert(flat(2))
                with pytest.raises(OSError, match="Input/output error; the disk doesn't take"):
                    log.sync()
                with pytest.raises(OSError, match="nothing was inserted: see to the disk"):
                    log.insert(flat(3))
                assert sorted(held(log)) == [1, 2]
                log.release(1)
            log.sync()
            log.insert(flat(3))
            log.sync()
            assert log.synced_id == 3
            check(held(log))
        told = [each for each in caplog.messages if "the disk under the log" in each]
        assert len(told) == 2


class TestSync:
    def test_by_seconds(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path, 1000, sync=Sync(2.0)) as log:
            for i in range(1, 11):
                log.insert(flat(i))
            assert log.synced_id < 10
            wait_until(lambda: log.synced_id == 10)

    def test_by_items(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path, 1000, sync=Sync(1e6, items=10)) as log:
            for i in range(1, 10):
                log.insert(flat(i))
            time.sleep(0.1)
            assert log.synced_id == 0
            log.insert(flat(10))
            wait_until(lambda: log.synced_id == 10)
            log.batch_insert([flat(i) for i in range(11, 31)])
            wait_until(lambda: log.synced_id == 30)

    def test_each(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path, 1000, sync=Sync(1e6, items=1)) as log:
            for i in range(1, 51):
                log.insert(flat(i))
            wait_until(lambda: log.synced_id == 50)

    def test_when_asked(self, tmp_path: Path) -> None:
        with LoggedDataStore(tmp_path, 1000, sync=Sync(1e6)) as log:
            log.insert(flat(1))
            assert log.synced_id == 0
            log.sync()
            assert log.synced_id == 1
        with LoggedDataStore(tmp_path, 1000) as log:
            assert log.synced_id == 1

    def test_never_in_the_thread_that_inserts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with LoggedDataStore(tmp_path, 100_000, sync=Sync(items=1)) as log:
            begun, go_on = threading.Event(), threading.Event()

            def wait(fd: int) -> None:
                assert threading.current_thread() is not threading.main_thread()
                begun.set()
                go_on.wait(10)

            monkeypatch.setattr(log_writer, "_sync", wait)
            log.insert(flat(1))
            assert begun.wait(10)
            for i in range(2, 101):
                log.insert(flat(i))
            with pytest.raises(DeadlineExceeded, match="the disk has not followed in"):
                log.sync(0.05)
            go_on.set()
            log.sync()

    @pytest.mark.parametrize("wrong", [{"seconds": 0}, {"items": 0}, {"seconds": -1.0}])
    def test_what_makes_no_sense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="above 0"):
            Sync(**wrong)


# Kills -----------------------------------------------------------------------------------------

ACTOR = """
import os, random, sys
import numpy as np
from edgeml.data import LoggedDataStore, Sync, log_writer

log_writer._SIZES = (1 << 13, 1 << 13)

def flat(i):
    return {"x": np.full(4, i, np.float32), "y": np.int64(i), "z": float(i)}

def work(path, seed):
    rng = random.Random(seed)
    log = LoggedDataStore(path, 100_000, sync=Sync(0.001))
    told = os.open(path + ".told", os.O_RDWR | os.O_CREAT)
    gone = 0
    while True:
        i = log.latest_data_id() + 1
        if rng.random() < 0.1:
            n = rng.randrange(20)
            log.batch_insert([flat(k) for k in range(i, i + n)])
        else:
            log.insert(flat(i))
        os.pwrite(told, log.latest_data_id().to_bytes(8, "little"), 0)
        if rng.random() < 0.05:
            gone = max(gone, log.latest_data_id() - rng.randrange(300))
            os.pwrite(told, gone.to_bytes(8, "little"), 8)
            log.release(gone)

print("ready", flush=True)
for line in sys.stdin:  # a fresh process for each, without the time that imports take
    path, seed = line.split()
    child = os.fork()
    if not child:
        work(path, int(seed))
    print(child, flush=True)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.usefixtures("small")
@pytest.mark.timeout(300)
def test_what_insert_returned_from_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(15)
    path, told = tmp_path / "log", tmp_path / "log.told"
    command = [sys.executable, "-u", "-c", ACTOR]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as actors:
        assert actors.stdin is not None
        assert actors.stdout is not None
        assert actors.stdout.readline() == "ready\n"
        released = 0
        for run in range(60):
            told.write_bytes(b"")
            print(path, run, file=actors.stdin, flush=True)
            child = int(actors.stdout.readline())
            wait_until(lambda: read_told(told) != (0, 0))
            time.sleep(rng.random() ** 3 * 0.05)
            os.kill(child, signal.SIGKILL)
            assert int(actors.stdout.readline()) == signal.SIGKILL
            latest, gone = read_told(told)
            with LoggedDataStore(path, 1_000_000) as log:
                assert log.lost == 0
                assert log.latest_data_id() >= latest
                batch = log.get_latest_data(0)
                ids = np.arange(batch.first_id, log.latest_data_id() + 1)
                assert batch.first_id <= max(released, gone) + 1
                assert len(batch) == len(ids)
                if len(batch):
                    np.testing.assert_array_equal(batch.columns["y"], ids)
                    np.testing.assert_array_equal(batch.columns["z"], ids)
                    np.testing.assert_array_equal(batch.columns["x"].T, [ids] * 4)
                released = max(released, gone, log.latest_data_id() - 500)
                log.release(released)


def read_told(path: Path) -> tuple[int, int]:
    content = path.read_bytes().ljust(16, b"\0") if path.exists() else bytes(16)
    return int.from_bytes(content[:8], "little"), int.from_bytes(content[8:16], "little")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_a_forked_child_leaves_the_files_to_its_parent(tmp_path: Path) -> None:
    log = LoggedDataStore(tmp_path, 100)
    log.insert(flat(1))
    numbering = log.numbering
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = []
        for use in (
            lambda: log.insert(flat(66)),
            lambda: log.release(1),
            lambda: log.reset(),
            lambda: log.get_latest_data(0),
        ):
            try:
                use()
                said.append("nothing")
            except Closed:
                said.append("closed")
        log.close()
        os.write(write, " ".join(said).encode())
        signal.pause()
        os._exit(0)
    try:
        assert os.read(read, 100) == b"closed closed closed closed"
        log.insert(flat(2))
        assert log.numbering is numbering
        log.close()
        with LoggedDataStore(tmp_path, 100) as log:  # though the child is there
            check(items := held(log))
            assert sorted(items) == [1, 2]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


# Damage ----------------------------------------------------------------------------------------


def write(path: Path, n: int, make: Any = flat) -> list[Path]:
    """A log of so many items, and its files."""
    with LoggedDataStore(path, 10_000) as log:
        for i in range(1, n + 1):
            log.insert(make(i))
    return sorted(path.glob("*.log"))


def damage(path: Path, n: int, part: Any) -> None:
    """A log in whose middle file some bytes are zeros."""
    files = write(path, n)
    file = files[len(files) // 2]
    content = np.fromfile(file, np.uint8)
    part(content, size_of(content))[:] = 0
    content.tofile(file)


def size_of(content: np.ndarray[Any, Any]) -> int:
    """How many bytes of a file there are before the zeros at its end."""
    return int(np.flatnonzero(content)[-1]) + 1


def reopen(path: Path, n: int, make: Any = flat) -> tuple[list[int], int]:
    """What is there, and how many are lost, once it has been used again."""
    with LoggedDataStore(path, 10_000) as log:
        check(items := held(log), make)
        lost, latest = log.lost, log.latest_data_id()
        assert len(items) == len(log) <= latest <= n
        assert all(a < b for a, b in itertools.pairwise(items))
        log.insert(make(latest + 1))
        log.batch_insert([make(latest + 2), make(latest + 3)])
    with LoggedDataStore(path, 10_000) as log:
        check(again := held(log), make)
        assert list(again) == [*items, latest + 1, latest + 2, latest + 3]
    return list(items), lost


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("make", [flat, text])
def test_a_tail_that_is_cut_off_anywhere_costs_what_was_in_it(make: Any, tmp_path: Path) -> None:
    (file,) = write(tmp_path / "log", 8, make)
    whole = np.fromfile(file, np.uint8)
    size = size_of(whole)
    before = [*range(1, 9)]
    for end in (*range(size, size - 250, -1), *range(size - 250, 0, -11)):
        path = tmp_path / f"cut{end}"
        path.mkdir()
        whole[:end].tofile(path / file.name)
        items, lost = reopen(path, 8, make)
        assert items == [*range(1, len(items) + 1)]
        assert len(before) - 1 <= len(items) <= len(before)
        if len(items) < len(before):
            assert lost == 1
        before = items
        shutil.rmtree(path)
    assert before == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(4))
def test_a_tail_of_garbage_or_zeros_is_cut_off(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    (file,) = write(tmp_path / "log", 8)
    whole = np.fromfile(file, np.uint8)
    size = size_of(whole)
    for begin in rng.integers(200, size, 30):
        for tail in (0, rng.integers(0, 256, len(whole) - begin)):
            path = tmp_path / "spoilt"
            path.mkdir()
            spoilt = whole.copy()
            spoilt[begin:] = tail
            spoilt.tofile(path / file.name)
            items, lost = reopen(path, 8)
            assert items == [*range(1, len(items) + 1)]
            assert lost > 0 or len(items) == 8 or not np.any(tail)
            shutil.rmtree(path)


@pytest.mark.usefixtures("small")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [flat, text])
def test_a_bit_that_flips_anywhere_costs_one_item(make: Any, tmp_path: Path) -> None:
    (file,) = write(tmp_path / "log", 6, make)
    whole = np.fromfile(file, np.uint8)
    rng = random.Random(0)
    # Every third byte: of six alike, so that each place in a record has its turn.
    for at in range(0, size_of(whole), 3):
        path = tmp_path / f"flip{at}"
        path.mkdir()
        spoilt = whole.copy()
        spoilt[at] ^= 1 << rng.randrange(8)
        spoilt.tofile(path / file.name)
        with LoggedDataStore(path, 10_000) as log:
            check(items := held(log), make)
            lost = log.lost
        missing = 6 - len(items)
        assert missing <= 1
        assert lost >= missing
        shutil.rmtree(path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(3))
def test_damage_in_the_middle_leaves_what_is_after_it(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    files = write(tmp_path / "log", 600)
    assert len(files) > 4
    for _ in range(4):
        path = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "log", path)
        file = path / files[rng.integers(1, len(files) - 1)].name
        content = np.fromfile(file, np.uint8)
        begin = int(rng.integers(0, len(content)))
        length = int(rng.integers(1, 2000))
        content[begin : begin + length] = rng.integers(0, 256, len(content[begin:][:length]))
        content.tofile(file)
        items, lost = reopen(path, 600)
        assert lost == 600 - len(items)
        assert items[-1] == 600
        shutil.rmtree(path)
    (path := tmp_path / "log" / files[2].name).unlink()
    items, lost = reopen(path.parent, 600)
    assert lost == 600 - len(items) > 0
    with LoggedDataStore(path.parent, 10_000) as log:
        gap = next(i for i in range(1, 600) if i not in items)
        batch = log.get_latest_data(0)
        assert len(batch) == gap - 1, "a batch has no holes"
        following = log.get_latest_data(gap - 1)
        assert following.first_id == gap + lost
        assert following.cuts[:1] == (0,)


@pytest.mark.usefixtures("small")
def test_many_marks_that_are_none_take_no_time(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "log", 3)
    content = np.fromfile(file, np.uint8)
    mark = content[64 + 4 : 64 + 8]
    big = np.zeros(1 << 20, np.uint8)
    big[: len(content)] = content
    words = big.reshape(-1, 8)
    words[len(content) // 8 :, 4:] = mark
    words[len(content) // 8 :, 0] = 1
    big.tofile(file)
    with took(at_most=20.0), LoggedDataStore(tmp_path / "log", 100) as log:
        assert sorted(held(log)) == [1, 2, 3]
        assert log.lost > 0


def test_another_version_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir()
    (path / f"{1:016d}-{7:08x}.log").write_bytes(b"\x89edglog\x02" + bytes(1000))
    with pytest.raises(Malformed, match="of version 2, and this edgeml reads version 1: use the"):
        LoggedDataStore(path, 5)


@pytest.mark.usefixtures("small")
def test_files_that_are_none_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, 5)
    (path / f"{7:016d}-{7:08x}.log").write_bytes(b"")
    (path / f"{8:016d}-{7:08x}.log").write_bytes(b"\x89ed")
    (path / f"{9:016d}-{7:08x}.log").write_bytes(bytes(8192))
    (path / "notes.log").write_bytes(b"mine")
    items, lost = reopen(path, 5)
    assert (items, lost) == ([1, 2, 3, 4, 5], 0)
    assert (path / "notes.log").exists()
