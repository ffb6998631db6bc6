"""A checkpoint is whole and exact, or an error and the one before; and nobody waits for it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml.core.errors import ConfigMismatch, Malformed, NotEncodable
from edgeml.core.frames import frame
from edgeml.core.plugins import load_codec
from edgeml.data import (
    DataShape,
    DataStoreBase,
    PrioritizedReplayBuffer,
    PrioritySampler,
    QueuedDataStore,
    ReplayBuffer,
    TrajectoryBufferDataStore,
    checkpoint,
)
from edgeml.data.records import RecordReader, RecordWriter
from pairs import no_file_larger_than

IMAGE = (64, 64, 3)


def item(i: int) -> dict[str, Any]:
    return {"obs": np.full(3, i, np.float32), "reward": float(i)}


def filled(capacity: int = 5, n: int = 7) -> ReplayBuffer:
    store = ReplayBuffer(capacity, seed=0)
    for i in range(1, n + 1):
        store.insert(item(i))
    return store


def held(store: DataStoreBase) -> list[float]:
    """The ids of a store's items, read from the items themselves and checked against the store."""
    batch = store.get_latest_data(0)
    ids = [each["reward"] for each in batch]
    assert ids == list(range(batch.first_id, store.latest_data_id() + 1))
    assert all(np.all(each["obs"] == each["reward"]) for each in batch)
    return ids


class Meddled(ReplayBuffer):
    """Calls something after each part that has been read, where another thread might come in."""

    def __init__(self, capacity: int, meddle: Callable[[], object]) -> None:
        super().__init__(capacity)
        self._meddle = meddle

    def dump(self, from_id: int, *, limit: int | None = None) -> Any:
        dumped = super().dump(from_id, limit=limit)
        self._meddle()
        return dumped


class TestRoundTrip:
    def test_values(self, tmp_path: Path) -> None:
        values = {
            "params": [np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((0, 5))],
            "opt": (np.ones(100_000), np.int64(3), None),
            "steps": 2**80,
            "name": "run 7",
        }
        checkpoint.save(tmp_path / "c", values)
        loaded = checkpoint.load(tmp_path / "c")
        np.testing.assert_equal(loaded, values)
        loaded["params"][0][:] = 5  # private, and made to go on with
        loaded["opt"][0][:] = 5
        np.testing.assert_equal(checkpoint.load(tmp_path / "c"), values)

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c")
        assert checkpoint.load(tmp_path / "c") is None

    def test_several_stores_and_only_those_asked_for(self, tmp_path: Path) -> None:
        queue = QueuedDataStore(9)
        queue.batch_insert([item(i) for i in range(1, 4)])
        report = checkpoint.save(
            tmp_path / "c", {"n": 1}, {"replay": filled(), "queue": queue, "empty": filled(3, 0)}
        )
        assert report.nbytes == (tmp_path / "c").stat().st_size
        assert report.items == {"replay": 5, "queue": 3, "empty": 0}
        assert report.missed == {"replay": 0, "queue": 0, "empty": 0}
        assert checkpoint.load(tmp_path / "c") == {"n": 1}
        other = QueuedDataStore(9)
        assert checkpoint.load(str(tmp_path / "c"), {"queue": other}) == {"n": 1}
        assert held(other) == [1, 2, 3]

    def test_a_store_that_the_file_lacks(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c", stores={"replay": filled()})
        stores = {"replay": filled(4, 9), "demos": filled(4, 2)}
        with pytest.raises(ConfigMismatch, match=r"no store \['demos'\]; it has \['replay'\]"):
            checkpoint.load(tmp_path / "c", stores)
        assert [held(store) for store in stores.values()] == [[6, 7, 8, 9], [1, 2]]

    def test_items_of_any_kind_and_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint, "_PART", 1 << 16)
        items = [
            {"text": "pick up", "path": [np.arange(3), None, (1, b"x")]},
            {"larger than a part": np.arange(30_000)},
            *({"small": i} for i in range(300)),
            "no dict",
            {"larger than a part": np.arange(90_000)},
        ]
        store = QueuedDataStore(1000)
        for each in items:
            store.insert(each)
        checkpoint.save(tmp_path / "c", stores={"it": store})
        other = QueuedDataStore(1000)
        checkpoint.load(tmp_path / "c", {"it": other})
        np.testing.assert_equal(list(other.get_latest_data(0)), items)

    def test_many_items_that_are_no_columns(self, tmp_path: Path) -> None:
        store = QueuedDataStore(9000)
        items: list[Any] = [{"path": [["fell", i], [0] * 60]} for i in range(9000)]
        store.batch_insert(items)
        checkpoint.save(tmp_path / "c", items, {"it": store})
        other = QueuedDataStore(9000)
        assert checkpoint.load(tmp_path / "c", {"it": other}) == items
        assert list(other.get_latest_data(0)) == items

    def test_a_smaller_store_that_refuses_what_it_has_no_room_for(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c", stores={"it": filled(20, 33)})
        queue = QueuedDataStore(6, on_full="raise")
        checkpoint.load(tmp_path / "c", {"it": queue})
        assert held(queue) == [28, 29, 30, 31, 32, 33]

    def test_a_store_that_was_made_otherwise(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c", stores={"a": filled(), "b": filled()})
        wrong = ReplayBuffer(5, example={"obs": np.zeros(4), "reward": 0.0})
        wrong.insert({"obs": np.zeros(4), "reward": 0.0})
        right = filled()
        with pytest.raises(ValueError, match=r"item\['obs'\]: expected shape .*4") as raised:
            checkpoint.load(tmp_path / "c", {"a": right, "b": wrong})
        if sys.version_info >= (3, 11):  # Python 3.10 has no notes
            assert "the store 'b'" in raised.value.__notes__[0]
        assert held(right) == [3, 4, 5, 6, 7]
        assert len(wrong) == 1

    def test_a_store_of_another_kind(self, tmp_path: Path) -> None:
        queue = QueuedDataStore(5)
        queue.insert(item(1))
        checkpoint.save(tmp_path / "c", stores={"a": queue})
        store = filled()
        with pytest.raises(ValueError, match=r"'a' in .* of another kind than ReplayBuffer"):
            checkpoint.load(tmp_path / "c", {"a": store})
        assert held(store) == [3, 4, 5, 6, 7]

    def test_a_store_that_cannot_tell_before_is_empty_after(self, tmp_path: Path) -> None:
        class Choosy(QueuedDataStore):
            def restore(self, batch: Any, extra: Any) -> None:
                super().restore(batch, extra)
                if self.latest_data_id() == 7:
                    raise RuntimeError("not the seventh")

        checkpoint.save(tmp_path / "c", stores={"a": filled(), "b": filled()})
        stores = {"a": filled(9, 2), "b": Choosy(9)}
        with pytest.raises(RuntimeError, match="not the seventh"):
            checkpoint.load(tmp_path / "c", stores)
        assert [len(store) for store in stores.values()] == [0, 0]

    def test_values_are_asked_for_while_all_stores_are_locked(self, tmp_path: Path) -> None:
        stores = {"a": filled(), "b": filled()}
        free: list[bool] = []

        def values() -> int:
            for store in stores.values():
                thread = threading.Thread(
                    target=lambda lock=store.lock: free.append(lock.acquire(blocking=False))
                )
                thread.start()
                thread.join()
            return 7

        checkpoint.save(tmp_path / "c", values, stores)
        assert free == [False, False]
        assert checkpoint.load(tmp_path / "c") == 7


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[bytes, Path]]:
    """A small checkpoint's bytes, and a path to write others to."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as d:
        path = Path(d) / "c"
        checkpoint.save(path, {"n": 7}, {"it": filled(3, 7)})
        yield path.read_bytes(), path


class TestDamage:
    def refused(self, small: tuple[bytes, Path], content: bytes, match: str) -> None:
        """Assert that this is refused with the path and a reason, and no store is touched."""
        path = small[1]
        path.write_bytes(content)
        store = filled(4, 9)
        with pytest.raises(Malformed, match=match) as raised:
            checkpoint.load(path, {"it": store})
        assert str(path) in str(raised.value)
        assert held(store) == [6, 7, 8, 9]

    def test_what_the_others_rest_on(self, small: tuple[bytes, Path]) -> None:
        small[1].write_bytes(small[0])
        store = filled(4, 9)
        assert checkpoint.load(small[1], {"it": store}) == {"n": 7}
        assert held(store) == [5, 6, 7]

    def test_cut_at_every_byte(self, small: tuple[bytes, Path]) -> None:
        for size in range(len(small[0])):
            self.refused(small, small[0][:size], "is cut off")

    def test_every_byte_damaged(self, small: tuple[bytes, Path]) -> None:
        for at in range(len(small[0])):
            damaged = bytearray(small[0])
            damaged[at] ^= 1 << at % 8
            why = "no checkpoint" if at < 7 else "is damaged|or damaged"
            self.refused(small, bytes(damaged), why)

    def test_a_record_is_missing_repeated_or_from_another_file(
        self, small: tuple[bytes, Path]
    ) -> None:
        content, path = small
        heads = [i for i in range(0, len(content), 64) if content[i : i + 6] == b"record"]
        checkpoint.save(path, {"n": 8}, {"it": filled(3, 7)})
        other = path.read_bytes()
        assert len(other) == len(content)
        for begin, end in itertools.pairwise(heads):
            self.refused(small, content[:begin] + content[end:], "is damaged")
            self.refused(small, content[:end] + content[begin:], "is damaged")
            self.refused(small, other[:end] + content[end:], "is damaged")

    def test_more_after_the_end(self, small: tuple[bytes, Path]) -> None:
        self.refused(small, small[0] + bytes(64), "64 bytes after its end")
        self.refused(small, small[0] * 2, "bytes after its end")

    @pytest.mark.parametrize("content", [b"hello", b"PK\3\4" + bytes(1000), bytes(4096)])
    def test_a_foreign_file(self, small: tuple[bytes, Path], content: bytes) -> None:
        self.refused(small, content, "is no checkpoint of edgeml: it begins with")

    def test_a_newer_version(self, small: tuple[bytes, Path]) -> None:
        head = bytearray(small[0][:60])
        head[7] = 2
        content = bytes(head) + zlib.crc32(head).to_bytes(4, "little") + b"anything"
        self.refused(small, content, "of version 2, and this edgeml reads version 1")

    def test_an_index_of_records_that_are_none(self, small: tuple[bytes, Path]) -> None:
        """One that was made up asks for no memory, whatever is said where it points to."""
        path, stores = small[1], {"it": {"latest_id": 0, "state": 0, "parts": []}}
        for at in (32, 1 << 40, -64):
            with open(path, "wb") as file:
                RecordWriter(file.fileno(), path, "").append_index({"values": at, "stores": stores})
            self.refused(small, path.read_bytes(), f"no record is at byte {at}")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            checkpoint.load(tmp_path / "c")


def transitions(n: int) -> Iterator[dict[str, Any]]:
    for i in range(1, n + 1):
        now, then = np.full(300, i, np.float32), np.full(300, i + 1, np.float32)
        yield {
            "observations": now, "next_observations": then, "actions": np.int32(i % 3),
            "rewards": np.float32(i), "masks": np.float32(1), "dones": i % 5 == 0,
            "lane": np.int32(i % 2),
        }  # fmt: skip


def stacked(capacity: int, n: int) -> ReplayBuffer:
    store = PrioritizedReplayBuffer(capacity, n_step=3, frame_stack=2, lanes=2, seed=0)
    for each in transitions(n):
        store.insert(each)
    return store


def queued(capacity: int, n: int) -> QueuedDataStore:
    store = QueuedDataStore(capacity)
    for i in range(1, n + 1):
        store.insert(item(i) if i % 2 else {"text": ["fell", i]})
    return store


def trajectories(capacity: int, n: int) -> DataStoreBase:
    pytest.importorskip("jax")
    store = TrajectoryBufferDataStore(capacity, [DataShape("obs", (3,)), DataShape("priority")])
    samplers = {"obs": PrioritySampler("priority", source="obs")}
    store.register_sample_config("it", samplers)
    for i in range(1, n + 1):
        step = {"obs": np.full(3, i, np.float32), "priority": np.float32(i)}
        store.insert({**step, "end_of_trajectory": i % 4 == 0})
    return store


def with_sums(content: bytes) -> bytes:
    """The same records, with sums as somebody would make them who made the file up."""
    made, at, crc = bytearray(content), 0, 0
    while at + 64 <= len(made):
        end = at + 64 + -(-int.from_bytes(made[at + 8 : at + 16], "little") // 64) * 64
        crc = zlib.crc32(made[at + 64 : end], zlib.crc32(made[at : at + 60], crc))
        made[at + 60 : at + 64] = crc.to_bytes(4, "little")
        at = end
    return bytes(made)


def look_of(store: DataStoreBase) -> bytes:
    """All that a checkpoint would have of a store."""
    batch, extra = store.dump(0)
    return frame(load_codec("msgpack").encode([batch.to_payload(), extra, store.state()]))


KINDS = [filled, stacked, queued, trajectories]


class TestMadeUp:
    """A file that somebody made with right sums is taken whole, or refused and nothing touched."""

    def refused(self, path: Path, store: DataStoreBase, match: str = "") -> None:
        before = look_of(store)
        with pytest.raises(ValueError, match=match):
            checkpoint.load(path, {"it": store})
        assert look_of(store) == before

    @pytest.mark.parametrize("make", KINDS)
    def test_any_bytes_changed(self, make: Callable[..., DataStoreBase], tmp_path: Path) -> None:
        path = tmp_path / "c"
        checkpoint.save(path, {"n": 7}, {"it": make(9, 14)})
        content = path.read_bytes()
        rng = random.Random(0)
        store = make(9, 4)
        before = look_of(store)
        taken = 0
        for _ in range(200):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(64, len(content))
                changed[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
            path.write_bytes(with_sums(changed))
            try:
                checkpoint.load(path, {"it": store})
            except ValueError:  # Malformed and ConfigMismatch are
                assert look_of(store) == before
            else:
                taken += 1
                store.get_latest_data(0)
                store = make(9, 4)
        assert 0 < taken < 200

    @pytest.mark.parametrize("make", KINDS)
    def test_any_value_changed(self, make: Callable[..., DataStoreBase], tmp_path: Path) -> None:
        """One value of a record, or of the index, is another."""
        path = tmp_path / "c"
        checkpoint.save(path, {"n": 7}, {"it": make(9, 14)})
        with open(path, "rb") as file:
            reader = RecordReader(file.fileno(), str(path), "checkpoint")
            index = reader.index
            records = {at: reader.read(at) for at in sorted(reader._sizes) if reader._sizes[at]}
        records.pop(max(records))  # the index
        store = make(9, 4)
        before = look_of(store)
        for at, place, other in changes({**records, "index": index}):
            with open(path, "wb") as file:
                writer = RecordWriter(file.fileno(), path, "")
                places = {
                    old: writer.append(changed(value, place, other) if old == at else value)
                    for old, value in records.items()
                }
                moved = move(index, places)
                if at == "index":
                    moved = changed(moved, place, other)
                writer.append_index(moved)
            try:
                checkpoint.load(path, {"it": store})
            except ValueError:
                assert look_of(store) == before, (at, place, other)
            else:
                store.get_latest_data(0)
                store = make(9, 4)

    def test_no_file_makes_ids_that_cannot_be(self, tmp_path: Path) -> None:
        path, store = tmp_path / "c", filled(4, 9)
        for latest, parts in ((-1, []), (1 << 62, []), (1 << 63, []), (9, [[10, 64]])):
            stored = {"latest_id": latest, "state": 64, "parts": parts}
            with open(path, "wb") as file:
                writer = RecordWriter(file.fileno(), path, "")
                assert writer.append(filled().state()) == 64
                writer.append_index({"values": 64, "stores": {"it": stored}})
            self.refused(path, store, "latest id|order of their ids")


OTHERS = (
    *(None, True, -1, 0, 3, 1 << 62, 1 << 64, -1.0, float("nan"), float("inf"), "x", b"x", [], {}),
    *([[]], {"interrupted": True}, np.zeros(3), np.full((2, 3), np.nan, np.float32)),
)


def changes(records: dict[Any, Any]) -> Iterator[tuple[Any, list[Any], Any]]:
    """Each place in each record, with each other value."""
    for at, value in records.items():
        for place in places_of(value):
            for other in OTHERS:
                yield at, place, other


def places_of(value: Any) -> list[list[Any]]:
    found: list[list[Any]] = [[]]
    keys: Any = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, (list, tuple)):
        keys = range(min(len(value), 2))
    for key in keys:
        found += [[key, *place] for place in places_of(value[key])]
    return found


def changed(value: Any, place: list[Any], other: Any) -> Any:
    if not place:
        return other
    if isinstance(value, dict):
        return {**value, place[0]: changed(value[place[0]], place[1:], other)}
    items = list(value)
    items[place[0]] = changed(items[place[0]], place[1:], other)
    return type(value)(items)


def move(index: Any, places: dict[int, int]) -> Any:
    """An index for records that lie elsewhere."""
    ((name, stored),) = index["stores"].items()
    parts = [[first, places[at]] for first, at in stored["parts"]]
    stored = {**stored, "state": places[stored["state"]], "parts": parts}
    return {"values": places[index["values"]], "stores": {name: stored}}


KILLED = """
import sys
import numpy as np
from edgeml.data import ReplayBuffer, checkpoint

class Stuck(ReplayBuffer):
    def dump(self, from_id, *, limit=None):
        if from_id > 100:
            print("amid", flush=True)
            sys.stdin.read()
        return super().dump(from_id, limit=limit)

store = Stuck(1000)
for i in range(1000):
    store.insert({"x": np.full(1000, i)})
checkpoint.save(sys.argv[1], "new", {"it": store})
"""


class TestAtomic:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        checkpoint.save(tmp_path / "c", "old")
        return tmp_path / "c"

    def assert_old(self, path: Path) -> None:
        assert checkpoint.load(path) == "old"
        assert os.listdir(path.parent) == ["c"]

    @pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
    def test_a_store_raises(self, path: Path, error: BaseException) -> None:
        def fail() -> None:
            if store.latest_data_id():
                raise error

        store = Meddled(5, fail)
        for i in range(1, 6):
            store.insert(item(i))
        with pytest.raises(type(error)):
            checkpoint.save(path, "new", {"it": store})
        self.assert_old(path)

    def test_an_item_that_no_codec_carries(self, path: Path) -> None:
        store = QueuedDataStore(5)
        store.batch_insert([1, "two", object()])
        with pytest.raises(NotEncodable, match=r"builtins\.object"):
            checkpoint.save(path, "new", {"it": store})
        self.assert_old(path)

    def test_no_room(self, path: Path) -> None:
        # As a full disk fails: after some of the bytes were written.
        with no_file_larger_than(1 << 20), pytest.raises(OSError, match="too large") as raised:
            checkpoint.save(path, np.zeros(1 << 20))
        self.assert_explained(raised.value, path, 8 << 20)
        self.assert_old(path)

    def assert_explained(self, error: OSError, path: Path, needed: int) -> None:
        """Assert that it names the file, the bytes that were needed, and what is still there."""
        assert error.filename == str(path)
        found = re.search("at least ([0-9,]+) bytes are needed; the file that was", str(error))
        assert found
        assert needed < int(found[1].replace(",", "")) < 3 * needed
        assert "is as it was" in str(error)

    def test_the_disk_is_full(self, small_disk: Path) -> None:
        path = small_disk / "c"
        checkpoint.save(path, "old")
        store = QueuedDataStore(40)
        for i in range(40):
            store.insert({"x": np.full(1 << 18, i, np.uint8)})
        for values, stores, needed in (
            (np.zeros(1 << 20), None, 8 << 20),
            ("new", {"it": store}, 4 << 20),  # as soon as a part doesn't fit
        ):
            with pytest.raises(OSError, match="No space left on device: at least") as raised:
                checkpoint.save(path, values, stores)
            assert raised.value.errno == errno.ENOSPC
            self.assert_explained(raised.value, path, needed)
            self.assert_old(path)
        checkpoint.save(path, "new")
        assert checkpoint.load(path) == "new"

    def test_errors_of_what_is_saved_are_left_as_they_are(self, path: Path) -> None:
        mine = OSError(errno.ENOSPC, "mine")

        def fail() -> None:
            raise mine

        with pytest.raises(OSError, match="mine") as raised:
            checkpoint.save(path, fail)
        assert raised.value is mine
        self.assert_old(path)

    def test_a_system_that_writes_less_than_it_was_given(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def some(fd: int, pieces: list[memoryview]) -> int:
            return os.write(fd, b"".join(pieces)[:777])

        monkeypatch.setattr(os, "writev", some)
        values = [np.arange(5000) + i for i in range(3)]
        report = checkpoint.save(path, values)
        assert report.nbytes == path.stat().st_size
        np.testing.assert_equal(checkpoint.load(path), values)

    def test_the_disk_fails_at_the_end(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fsync(fd: int) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="Input/output error; the file that was") as raised:
                checkpoint.save(path, "new")
        assert raised.value.filename == str(path)
        self.assert_old(path)

    def test_no_such_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for name, error in ("none", FileNotFoundError), ("file", NotADirectoryError):
            with pytest.raises(error, match="No such directory, make it first") as raised:
                checkpoint.save(tmp_path / name / "c", 1)
            assert raised.value.filename == str(tmp_path / name)

    def test_it_is_on_the_disk_before_it_has_the_name(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(fd: int) -> None:
            fsync(fd)
            done.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")

        def noted_replace(source: Path, target: Path) -> None:
            replace(source, target)
            done.append("renamed")

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        checkpoint.save(path, "new")
        assert done == ["file", "renamed", "directory"]

    def test_killed_amid(self, path: Path) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"amid\n"
                with pytest.raises(BlockingIOError, match="under way"):
                    checkpoint.save(path, "another")
            finally:
                process.kill()
        assert checkpoint.load(path) == "old"
        left = path.with_name(".c.tmp")
        assert left.stat().st_size > 1 << 19
        left.write_bytes(left.read_bytes() * 2)  # longer than what comes now
        checkpoint.save(path, "newer")
        assert checkpoint.load(path) == "newer"
        assert os.listdir(path.parent) == ["c"]

    def test_two_at_once(self, path: Path) -> None:
        def another() -> None:
            with pytest.raises(BlockingIOError, match="another save to the same path"):
                checkpoint.save(path, "another")
            tried.append(True)

        tried: list[bool] = []
        store = Meddled(1, another)
        store.insert(item(1))
        checkpoint.save(path, "new", {"it": store})
        assert tried == [True]
        assert checkpoint.load(path) == "new"
        assert os.listdir(path.parent) == ["c"]

    def test_another_has_finished_between_opening_and_locking(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was opened bears the other's name by then, and must not be written to."""
        flock, theirs = fcntl.flock, path.with_name("theirs")

        def late(fd: int, operation: int) -> None:
            if not theirs.exists():
                path.with_name(".c.tmp").rename(theirs)
                theirs.write_bytes(b"theirs")
            flock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        checkpoint.save(path, "new")
        assert theirs.read_bytes() == b"theirs"
        assert checkpoint.load(path) == "new"

    def test_many_who_save_to_one_path(self, path: Path) -> None:
        """Whoever is let through replaces the whole; the others are told."""

        def save(values: list[np.ndarray[Any, Any]]) -> None:
            for _ in range(30):
                try:
                    checkpoint.save(path, values)
                except BlockingIOError:
                    refused.append(True)

        refused: list[bool] = []
        threads = [threading.Thread(target=save, args=([np.full(5000, i)],)) for i in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if (values := checkpoint.load(path)) != "old":
                assert len(values[0]) == 5000
                assert np.all(values[0] == values[0][0])
        for thread in threads:
            thread.join()
        assert len(refused) < 90
        assert os.listdir(path.parent) == ["c"]


class TestMeanwhile:
    @settings(max_examples=60)
    @given(
        begun=st.integers(0, 20),
        inserts=st.lists(st.integers(0, 7), max_size=12),
        capacity=st.integers(1, 9),
    )
    def test_what_is_overwritten_is_missing(
        self, begun: int, inserts: list[int], capacity: int
    ) -> None:
        """However many items come after each part is read: a run of ids up to the save's start."""
        left = iter(inserts)

        def insert() -> None:
            for _ in range(next(left, 0)):
                store.insert(item(store.latest_data_id() + 1))

        store = Meddled(capacity, insert)
        for i in range(1, begun + 1):
            store.insert(item(i))
        before = held(store)
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint, "_MOST", 2)
            report = checkpoint.save(f"{directory}/c", store.latest_data_id, {"it": store})
            other = ReplayBuffer(9)
            assert checkpoint.load(f"{directory}/c", {"it": other}) == begun
        kept = held(other)
        assert other.latest_data_id() == begun
        assert report.items["it"] == len(kept)
        assert report.missed["it"] == len(before) - len(kept)
        assert kept == before[report.missed["it"] :]
        if sum(inserts) + len(before) <= capacity:
            assert kept == before

    def test_no_more_is_missing_than_was_overwritten(self, tmp_path: Path) -> None:
        store = Meddled(5, lambda: store.batch_insert([item(6), item(7)]))
        for i in range(1, 6):
            store.insert(item(i))
        # Item 1 is read, then 2 is overwritten: 1 does not count without it.
        assert checkpoint.save(tmp_path / "c", stores={"it": store}).missed == {"it": 2}
        other = ReplayBuffer(5)
        checkpoint.load(tmp_path / "c", {"it": other})
        assert held(other) == [3, 4, 5]

    def test_a_store_that_is_emptied(self, tmp_path: Path) -> None:
        store = Meddled(5, lambda: store.reset())
        for i in range(1, 6):
            store.insert(item(i))
        report = checkpoint.save(tmp_path / "c", stores={"it": store})
        assert (report.items, report.missed) == ({"it": 0}, {"it": 5})
        other = filled()
        checkpoint.load(tmp_path / "c", {"it": other})
        assert (len(other), other.latest_data_id()) == (0, 5)

    def test_values_and_stores_are_of_one_moment(self, tmp_path: Path) -> None:
        """A thread that inserts all the while: every save has a count that fits the items."""
        n = 8000
        image = np.arange(n, dtype=np.uint32)[:, None].view(np.uint8)
        store = ReplayBuffer(n)  # 100 MB
        count = 0

        def insert() -> None:
            nonlocal count
            with store.lock:
                count += 1
                cam = np.empty(IMAGE, np.uint8)
                cam.reshape(-1, 4)[:] = image[count % n]
                store.insert({"cam": cam, "count": count})

        for _ in range(n + 100):
            insert()
        stop = threading.Event()

        def write() -> None:
            while not stop.wait(0.0005):
                insert()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            reports = [
                checkpoint.save(tmp_path / f"c{k}", lambda: {"count": count}, {"it": store})
                for k in range(2)
            ]
        finally:
            stop.set()
            thread.join()
        for k, report in enumerate(reports):
            other = ReplayBuffer(n)
            values = checkpoint.load(tmp_path / f"c{k}", {"it": other})
            (tmp_path / f"c{k}").unlink()
            assert other.latest_data_id() == values["count"] < count
            assert report.items["it"] + report.missed["it"] == n
            assert len(other) == report.items["it"] > n // 2
            columns = other.get_latest_data(0).columns
            first = values["count"] + 1 - len(other)
            ids = np.arange(first, values["count"] + 1)
            np.testing.assert_array_equal(columns["count"], ids)
            cams = columns["cam"].reshape(len(ids), -1, 4)
            assert np.array_equal(cams, np.broadcast_to(image[ids % n][:, None], cams.shape))


LIMIT = 0.05  # seconds, that an insert may wait for a checkpoint


def starved(*threads: int) -> float:
    """Seconds in which these threads could have run and the machine ran others; 0 if unknown."""
    stats = [Path(f"/proc/self/task/{thread}/schedstat") for thread in threads]
    return sum(int(each.read_text().split()[1]) / 1e9 for each in stats if each.exists())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_insert_waits_for_a_checkpoint_of_4_gb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, shape = 85_000, (128, 128, 3)
    images = np.random.default_rng(0).integers(0, 256, (100, *shape), np.uint8)
    store = ReplayBuffer(n)

    def insert() -> None:
        i = store.latest_data_id() + 1
        store.insert({"cam": images[i % 100], "action": np.full(7, i, np.float32), "i": i})

    for _ in range(n):
        insert()

    def while_inserting(work: Callable[[], Any]) -> tuple[Any, float, list[float]]:
        """Insert 200 items a second; returns the result, the seconds it took, and two waits.

        They are the longest that an insert had to wait for the lock, and the longest if what the
        two threads were starved by others on this machine is taken off.
        """
        stop = threading.Event()
        waits, own = [0.0], [0.0]
        worker = threading.get_native_id()

        def write() -> None:
            both = worker, threading.get_native_id()
            while not stop.wait(0.005):
                lost = starved(*both)
                begin = time.perf_counter()
                with store.lock:
                    waits.append(time.perf_counter() - begin)
                    own.append(waits[-1] + lost - starved(*both))
                    insert()

        thread = threading.Thread(target=write)
        thread.start()
        begin = time.perf_counter()
        try:
            result = work()
        finally:
            took = time.perf_counter() - begin
            stop.set()
            thread.join()
        return result, took, [max(waits), max(own)]

    def plain() -> None:
        """What the disk can do: the same bytes in the same pieces, and nothing else."""
        piece = memoryview(images[:100].reshape(-1))
        with open(tmp_path / "plain", "wb", buffering=0) as file:
            for _ in range(n // 100):
                file.write(piece)
            os.fsync(file.fileno())
        (tmp_path / "plain").unlink()

    def told(what: str, size: int, took: float, waits: list[float]) -> str:
        of_all, own = (1e3 * wait for wait in waits)
        return f"{what}: {size / took / 1e6:.0f} MB/s, wait {of_all:.1f} ms, {own:.1f} of its own"

    path = tmp_path / "c"
    lines = []
    longest = []
    for _ in range(3):
        _, took, waits = while_inserting(plain)
        lines.append(told("write and fsync", n * images[0].nbytes, took, waits))
        report, took, waits = while_inserting(
            lambda: checkpoint.save(path, store.latest_data_id, {"it": store})
        )
        lines.append(told("save", report.nbytes, took, waits))
        longest.append(waits[1])
        assert report.nbytes > 4e9
        assert report.items["it"] + report.missed["it"] == n
        assert report.missed["it"] < n // 100
    other = ReplayBuffer(n)
    begin = time.perf_counter()
    latest = checkpoint.load(path, {"it": other})
    lines.append(f"load: {report.nbytes / (time.perf_counter() - begin) / 1e6:.0f} MB/s")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert other.latest_data_id() == latest
    assert len(other) == report.items["it"]
    for first in range(latest - len(other), latest, 1000):
        columns = other.get_latest_data(first, limit=1000).columns
        ids = np.arange(first + 1, first + 1 + len(columns["i"]))
        np.testing.assert_array_equal(columns["i"], ids)
        assert np.array_equal(columns["cam"], images[ids % 100])
    # Of one save in three, since a virtual machine that writes so much stands still now and then: a
    # copy of 4 MB was seen to take 60 ms, without a fault or a switch.
    assert min(longest) < LIMIT, lines
