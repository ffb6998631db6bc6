"""RLDS datasets: what was logged is read back, whatever happened meanwhile."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.data import ReplayBuffer
from edgeml.data.rlds import (
    RLDSLogger,
    make_datastore,
    populate_datastore,
    read_episodes,
    transitions_of,
)
from edgeml.data.rlds import directory as directory_module
from edgeml.data.rlds.example import decode_example, encode_example
from edgeml.data.rlds.features import from_json, to_json
from edgeml.data.rlds.tfrecord import (
    crc32c,
    crc32c_numpy,
    frame_record,
    is_torn,
    masked_crc32c,
    read_records,
)
from edgeml.data.rlds.values import read

# A record of an example with lists "b" [b"x", b""], "f" [1.5, -2.0] and "i" [0, -1, 300, 2**62],
# as TensorFlow 2.21 writes it.
TENSORFLOWS = bytes.fromhex(
    "440000000000000043592e9a0a420a0c0a016212070a050a01780a000a110a0166120c120a0a080000c03f000000"
    "c00a1f0a0169121a1a180a1600ffffffffffffffffff01ac02808080808080808040731a4dbe"
)


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal, dtypes and all."""
    if isinstance(left, dict) or isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, str) or isinstance(right, str):
        return bool(left == right)
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype == object:
        return left.shape == right.shape and all(map(same, left.flat, right.flat))
    return left.shape == right.shape and left.dtype == right.dtype and same_bytes(left, right)


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tobytes() == right.tobytes()


def transition(i: int, *, mask: float = 1.0, done: bool = False) -> dict[str, Any]:
    """The i-th of a series in which each begins where the one before led to."""
    return {
        "observations": {"x": np.full(3, i, np.float32), "n": np.float64(i / 3)},
        "next_observations": {"x": np.full(3, i + 1, np.float32), "n": np.float64((i + 1) / 3)},
        "actions": np.full(2, -i, np.float32),
        "rewards": np.float32(i / 2),
        "masks": np.float32(mask),
        "dones": np.bool_(done),
    }


def log_episodes(directory: Path, lengths: list[int], start: int = 0, **options: Any) -> None:
    """Log episodes of these lengths, every other one terminated."""
    with RLDSLogger(directory, **options) as log:
        for length in lengths:
            for i in range(start, start + length):
                last = i == start + length - 1
                log(transition(i, mask=0.0 if last and length % 2 else 1.0, done=last), last)
            start += length + 1


def read_transitions(directory: Path) -> list[dict[str, Any]]:
    columns = map(transitions_of, read_episodes(directory))
    return [item for part in columns for item in items(part, len(part["dones"]))]


def items(columns: dict[str, Any], n: int) -> Iterator[dict[str, Any]]:
    def at(node: Any, i: int) -> Any:
        return {k: at(v, i) for k, v in node.items()} if isinstance(node, dict) else node[i]

    return (at(columns, i) for i in range(n))


def lengths_of(directory: Path) -> list[int]:
    return [len(episode["steps"]["is_last"]) - 1 for episode in read_episodes(directory)]


class TestChecksums:
    @pytest.mark.parametrize("function", [crc32c, crc32c_numpy])
    @pytest.mark.parametrize(
        ("data", "crc"),
        [  # RFC 3720, B.4, and the check value of the CRC catalogues
            (bytes(32), 0x8A9136AA),
            (b"\xff" * 32, 0x62A8AB43),
            (bytes(range(32)), 0x46DD794E),
            (bytes(range(31, -1, -1)), 0x113FDB5C),
            (
                bytes.fromhex(
                    "01c00000000000000000000000000000140000000000040000000014000000182800000000000000"
                    "0200000000000000"
                ),
                0xD9963A56,
            ),
            (b"123456789", 0xE3069283),
            (b"", 0),
        ],
    )
    def test_published_values(self, function: Callable[[bytes], int], data: bytes, crc: int):
        assert function(data) == crc

    @pytest.mark.parametrize("size", [*range(130), 65535, 65536, 65537, 65600, 200_003])
    def test_numpy_agrees_with_the_library(self, size: int):
        google_crc32c = pytest.importorskip("google_crc32c")
        data = np.random.default_rng(size).bytes(size)
        assert crc32c_numpy(data) == google_crc32c.value(data)

    def test_without_the_library_the_same_files_are_written(self, tmp_path, monkeypatch):
        log_episodes(tmp_path / "with", [3])
        monkeypatch.setattr("edgeml.data.rlds.tfrecord._choose_crc32c", lambda: crc32c_numpy)
        log_episodes(tmp_path / "without", [3])
        shard = "edgeml-train.tfrecord-00000"
        assert (tmp_path / "with" / shard).read_bytes() == (
            tmp_path / "without" / shard
        ).read_bytes()


class TestRecordsAndExamples:
    def test_tensorflows_record_is_read(self, tmp_path):
        (tmp_path / "record").write_bytes(TENSORFLOWS)
        [(offset, data)] = read_records(tmp_path / "record")
        assert offset == 0
        assert b"".join(frame_record(data)) == TENSORFLOWS
        values = decode_example(data)
        assert values["b"] == [b"x", b""]
        assert same(values["f"], np.array([1.5, -2], np.float32))
        assert same(values["i"], np.array([0, -1, 300, 2**62]))
        assert encode_example(values) == data

    @given(
        st.dictionaries(
            st.text(max_size=9),
            st.lists(st.binary(max_size=200), max_size=4)
            | st.lists(st.floats(width=32), max_size=9).map(lambda x: np.array(x, np.float32))
            | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(
                lambda x: np.array(x, np.int64)
            ),
        )
    )
    def test_examples_come_back(self, values):
        decoded = decode_example(encode_example(values))
        assert decoded.keys() == values.keys()
        for name, value in values.items():
            if isinstance(value, list):
                assert decoded[name] == value
            else:
                assert same(decoded[name], value)

    def test_numbers_that_are_not_packed_are_read(self):
        floats = b"\x0d" + np.float32(2).tobytes() + b"\x0d" + np.float32(3).tobytes()
        ints = b"\x08\x05\x08\xac\x02"
        entries = b"".join(
            b"\x0a" + bytes([len(entry)]) + entry
            for kind, values, name in ((0x12, floats, b"f"), (0x1A, ints, b"i"))
            for feature in [bytes([kind, len(values)]) + values]
            for entry in [b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature]
        )
        decoded = decode_example(b"\x0a" + bytes([len(entries)]) + entries)
        assert same(decoded, {"f": np.array([2, 3], np.float32), "i": np.array([5, 300])})

    @given(st.binary(max_size=60))
    def test_garbage_is_no_example(self, data):
        with suppress(Malformed):
            decode_example(data)

    def test_every_damaged_byte_is_noticed(self, tmp_path):
        path = tmp_path / "records"
        whole = b"".join(frame_record(b"first") + frame_record(b"second"))
        for i in range(len(whole)):
            damaged = bytearray(whole)
            damaged[i] ^= 0x10
            path.write_bytes(damaged)
            found = []
            with pytest.raises(Malformed, match=f"{path}, the record at byte {21 * (i >= 21)}"):
                found.extend(data for _, data in read_records(path))
            assert found == [b"first"][: i // 21]

    def test_every_cut_is_noticed(self, tmp_path):
        path = tmp_path / "records"
        whole = b"".join(frame_record(b"first") + frame_record(b"second"))
        for size in set(range(len(whole))) - {0, 21}:
            path.write_bytes(whole[:size])
            with pytest.raises(Malformed, match=f"at byte {21 * (size > 21)}"):
                list(read_records(path))

    def test_torn_is_what_a_crash_leaves(self, tmp_path):
        """The last record with its end missing, or with pages or checksums that are zeros."""
        path = tmp_path / "records"

        def torn(rest: bytes) -> bool:
            path.write_bytes(first + rest)
            return is_torn(path, len(first))

        first = b"".join(frame_record(b"first"))
        record = b"".join(frame_record(np.random.default_rng(0).bytes(10_000)))
        assert all(torn(record[:size]) for size in (1, 5, 11, 12, 13, 5000, len(record) - 1))
        assert all(torn(record[:12] + bytes(n)) for n in (0, 1, 10_000, len(record) - 12))
        assert all(torn(bytes(n)) for n in (1, 12, 5000))
        assert torn(record[:-4] + bytes(4))
        page = 4096 - len(first)
        assert torn(record[:page] + bytes(4096) + record[page + 4096 :])
        assert torn(record[:page] + bytes(len(record) - page))
        # Not: a changed bit; something after it; a page that is lost in the midst of others.
        for at in (0, 9, 12, 5000, len(record) - 1):
            damaged = bytearray(record)
            damaged[at] ^= 1
            assert not torn(damaged)
            assert not torn(damaged + record)
            assert not torn(damaged + b"x")
        assert not torn(bytes(page) + record[page:])

    def test_a_huge_length_asks_for_no_memory(self, tmp_path):
        length = (1 << 60).to_bytes(8, "little")
        path = tmp_path / "records"
        path.write_bytes(length + masked_crc32c(length).to_bytes(4, "little") + bytes(100))
        with pytest.raises(Malformed, match="more than the file has left"):
            list(read_records(path))


class TestWhatWasLogged:
    def observation(self, i: int) -> dict[str, Any]:
        rng = np.random.default_rng(i)
        return {
            **{
                np.dtype(name).name: rng.integers(-50, 50, (2, 3)).astype(name)
                for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4")
            },
            "double": rng.normal(size=3),
            "large": np.array([2**63 - 1, -(2**63), i]),
            "unsigned": np.uint64(2**64 - 1 - i),
            "bool": rng.random((2, 2)) < 0.5,
            "complex": rng.normal(size=2) + 1j,
            "image": rng.integers(0, 256, (5, 4, 3)).astype(np.uint8),
            "gray": rng.integers(0, 256, (5, 4, 1)).astype(np.uint8),
            "rgba": rng.integers(0, 256, (5, 4, 4)).astype(np.uint8),
            "stack": rng.integers(0, 256, (2, 5, 4, 3)).astype(np.uint8),
            "nested": {"deeper": {"x": np.float32(i)}, "pair": (np.int32(i), "left")},
            "task": f"pick ü {i}",
        }

    def logged(self, directory: Path, **options: Any) -> None:
        with RLDSLogger(
            directory, metadata={"who": "me", "n": 0, "map": np.eye(2)}, **options
        ) as log:
            log.log_reset(self.observation(0), {"n": 7})
            for i in range(1, 4):
                log.log_step(
                    {"arm": np.full(2, i, np.float32), "grip": i % 2 == 0},
                    self.observation(i),
                    i / 10,
                    terminated=i == 3,
                    extra={"language_instruction": f"go {i}", "policy_version": i},
                    metadata={"who": "you"} if i == 3 else None,
                )

    def test_everything_comes_back(self, tmp_path):
        self.logged(tmp_path)
        [episode] = read_episodes(tmp_path)
        assert same(episode["episode_metadata"], {"who": "you", "n": np.int64(7), "map": np.eye(2)})
        steps = episode["steps"]
        for i, found in enumerate(items(steps["observation"], 4)):
            expected = self.observation(i)
            expected["nested"]["pair"] = {"0": np.int32(i), "1": "left"}
            assert same(found, expected)
        assert same(steps["action"]["arm"], np.float32([[1, 1], [2, 2], [3, 3], [0, 0]]))
        assert same(steps["action"]["grip"], np.array([False, True, False, False]))
        assert same(steps["reward"], np.array([0.1, 0.2, 0.3, 0.0]))
        assert same(steps["discount"], np.float32([1, 1, 0, 0]))
        assert same(steps["is_first"], np.array([True, False, False, False]))
        assert same(steps["is_last"], np.array([False, False, False, True]))
        assert same(steps["is_terminal"], np.array([False, False, False, True]))
        assert steps["language_instruction"].tolist() == ["go 1", "go 2", "go 3", ""]
        assert same(steps["policy_version"], np.array([1, 2, 3, 0]))

    def test_features_come_back(self, tmp_path):
        self.logged(tmp_path)
        content = (tmp_path / "features.json").read_bytes()
        assert to_json(from_json(content)) == json.loads(content)

    def test_jpeg_images_are_nearly_the_same(self, tmp_path):
        ramp = np.linspace(0, 255, 32)[:, None, None]
        image = np.broadcast_to(ramp, (32, 32, 3)).astype(np.uint8)
        for image_format in ("png", "jpeg"):
            with RLDSLogger(tmp_path / image_format, image_format=image_format) as log:
                log.log_reset({"rgb": image, "gray": image[:, :, :1]})
                log.log_step(0, {"rgb": image, "gray": image[:, :, :1]}, 0.0)
        for image_format, most in (("png", 0), ("jpeg", 4)):
            [episode] = read_episodes(tmp_path / image_format)
            for key, expected in (("rgb", image), ("gray", image[:, :, :1])):
                found = episode["steps"]["observation"][key]
                assert found.shape == (2, *expected.shape)
                assert np.abs(found.astype(int) - expected).max() <= most

    def test_without_pillow_images_say_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with RLDSLogger(tmp_path) as log:
            with pytest.raises(ImportError, match=r"edgeml-robotics\[images\]"):
                log.log_reset(np.zeros((4, 4, 3), np.uint8))
            monkeypatch.undo()
            log.log_reset(np.zeros((4, 4, 3), np.uint8))
            log.log_step(0, np.zeros((4, 4, 3), np.uint8), 0.0)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"edgeml-robotics\[images\]"):
            list(read_episodes(tmp_path))
        with pytest.raises(ImportError, match=r"edgeml-robotics\[images\]"):
            RLDSLogger(tmp_path)

    def test_an_unfinished_episode_is_truncated(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(np.zeros(2))
            log.log_step(1, np.ones(2), 0.5)
            log.log_reset(np.zeros(2))  # before the first has ended
            log.log_step(1, np.ones(2), 0.5)
            log.log_step(1, np.ones(2), 0.5, truncated=True)
            log.log_reset(np.zeros(2))
            log.log_step(1, np.ones(2), 0.5)
            assert log.episodes == 2
        assert lengths_of(tmp_path) == [1, 2, 1]
        for episode in read_episodes(tmp_path):
            assert episode["steps"]["is_last"].tolist()[-1]
            assert not episode["steps"]["is_terminal"].any()
            assert transitions_of(episode)["masks"].all()

    def test_arrays_may_be_changed_afterwards(self, tmp_path):
        with RLDSLogger(tmp_path, metadata={"m": np.zeros(1)}) as log:
            observation, action, said = np.zeros(2), np.ones(2), {"m": np.ones(1)}
            log.log_reset(observation, said)
            said["m"][:] = observation[:] = 9
            log.log_step(action, observation, 1.0)
            action[:] = observation[:] = 8
        [episode] = read_episodes(tmp_path)
        assert same(episode["steps"]["observation"], np.array([[0.0, 0], [9, 9]]))
        assert same(episode["steps"]["action"], np.array([[1.0, 1], [0, 0]]))
        assert same(episode["episode_metadata"]["m"], np.ones(1))

    def test_whole_rewards_at_first_are_numbers_all_the_same(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(0)
            log.log_step(0, 0, 1)
            log.log_step(0, 0, 0.25)
        [episode] = read_episodes(tmp_path)
        assert episode["steps"]["reward"].tolist() == [1, 0.25, 0]


class TestTransitions:
    def test_are_aligned(self, tmp_path):
        """Each transition is what was logged: the action upon its observation, and its reward."""
        log_episodes(tmp_path, [3, 2, 1])
        expected = [
            transition(0),
            transition(1),
            transition(2, mask=0, done=True),
            transition(4),
            transition(5, done=True),
            transition(7, mask=0, done=True),
        ]
        found = read_transitions(tmp_path)
        assert len(found) == len(expected)
        assert all(map(same, found, expected))

    def test_one_that_does_not_follow_begins_another_episode(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            for i in (0, 1, 5, 6, 7, 6):
                log(transition(i))
        assert lengths_of(tmp_path) == [2, 3, 1]
        found = read_transitions(tmp_path)
        assert [t["rewards"] for t in found] == [0, 0.5, 2.5, 3, 3.5, 3]
        assert all(t["masks"] == 1 for t in found)

    def test_nan_follows_upon_nan(self, tmp_path):
        nan = np.full(2, np.nan)
        with RLDSLogger(tmp_path) as log:
            for _ in range(3):
                log({"observations": nan, "next_observations": nan, "actions": 0, "rewards": 0.0})
        assert lengths_of(tmp_path) == [3]

    @pytest.mark.parametrize("way", ["mask", "done", "key", "argument", "afterwards"])
    def test_ways_to_end(self, tmp_path, way):
        with RLDSLogger(tmp_path) as log:
            item = transition(0)
            if way == "mask":
                item["masks"] = np.float32(0)
            if way == "done":
                item["dones"] = True
            if way == "key":
                del item["dones"]
                item["end_of_trajectory"] = np.True_
            log(item, way in ("argument", "key"))
            if way == "afterwards":
                log(None, True)
            assert log.episodes == 1
            log(None, True)
            log(transition(1))  # follows upon the first, which has ended
        assert lengths_of(tmp_path) == [1, 1]
        first, _ = read_episodes(tmp_path)
        assert first["steps"]["is_terminal"].tolist() == [False, way == "mask"]

    def test_other_keys_are_features_of_the_step(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            log({**transition(0), "policy_version": np.int64(3), "who": "me"})
        [episode] = read_episodes(tmp_path)
        assert same(episode["steps"]["policy_version"], np.array([3, 0]))
        assert episode["steps"]["who"].tolist() == ["me", ""]
        assert "dones" not in episode["steps"]

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(1, 6), st.booleans(), st.sampled_from(["log", "reopen"])),
            min_size=1,
            max_size=6,
        ),
        st.integers(1, 2000),
    )
    def test_any_history_comes_back(self, tmp_path_factory, history, max_shard_bytes):
        directory = tmp_path_factory.mktemp("any")
        options = {"name": "any", "max_shard_bytes": max_shard_bytes}
        log = RLDSLogger(directory, **options)
        expected, i = [], 0
        for length, terminal, then in history:
            for k in range(length):
                last = k == length - 1
                item = transition(i, mask=0.0 if last and terminal else 1.0, done=last)
                log(item, last)
                expected.append(item)
                i += 1
            if then == "reopen":
                log.close()
                log = RLDSLogger(directory, **options)
        log.close()
        found = read_transitions(directory)
        assert len(found) == len(expected)
        assert all(map(same, found, expected))
        shutil.rmtree(directory)

    def test_of_other_datasets(self):
        steps = {
            "observation": np.arange(4),
            "action": np.arange(4) * 10,
            "is_first": np.arange(4) == 0,
            "is_last": np.arange(4) == 3,
        }
        columns = transitions_of({"steps": steps})
        assert same(columns["masks"], np.float32([1, 1, 1]))
        assert same(columns["rewards"], np.float32([0, 0, 0]))
        assert same(columns["next_observations"], np.array([1, 2, 3]))
        # The terminal flag may be on more steps than the last.
        columns = transitions_of({"steps": steps | {"is_terminal": np.arange(4) > 1}})
        assert same(columns["masks"], np.float32([1, 1, 0]))
        # The last step may mean something, though what it led to was not kept.
        columns = transitions_of({"steps": steps | {"is_terminal": np.arange(4) > 2}}, "keep")
        assert same(columns["observations"], np.arange(4))
        assert same(columns["next_observations"], np.array([1, 2, 3, 3]))
        assert same(columns["actions"], np.arange(4) * 10)
        assert same(columns["masks"], np.float32([1, 1, 1, 0]))
        assert same(columns["dones"], np.arange(4) == 3)
        for n in (0, 1):
            few = {key: column[:n] for key, column in steps.items()}
            assert len(transitions_of({"steps": few}, "keep")["next_observations"]) == n
        with pytest.raises(ValueError, match="'keep' or 'drop', got 'maybe'"):
            transitions_of({"steps": steps}, "maybe")
        one = {key: column[:1] for key, column in steps.items()}
        assert not len(transitions_of({"steps": one})["dones"])
        del steps["action"]
        with pytest.raises(ValueError, match="no action"):
            transitions_of({"steps": steps})


class TestShards:
    def test_a_new_one_is_begun_when_one_is_full(self, tmp_path):
        log_episodes(tmp_path, [2] * 7)
        size = (tmp_path / "edgeml-train.tfrecord-00000").stat().st_size // 7
        shutil.rmtree(tmp_path)
        log_episodes(tmp_path, [2] * 7, max_shard_bytes=3 * size)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "dataset_info.json",
            *(f"edgeml-train.tfrecord-0000{i}" for i in range(3)),
            "features.json",
        ]
        [split] = json.loads((tmp_path / "dataset_info.json").read_bytes())["splits"]
        assert split["shardLengths"] == ["3", "3", "1"]
        assert split["numBytes"] == str(7 * size)
        assert [t["rewards"] for t in read_transitions(tmp_path)] == [
            np.float32(i / 2) for e in range(7) for i in (3 * e, 3 * e + 1)
        ]
        log_episodes(tmp_path, [2] * 3, start=21, max_shard_bytes=3 * size)
        assert len(read_transitions(tmp_path)) == 20
        assert lengths_of(tmp_path) == [2] * 10

    def test_an_episode_larger_than_a_shard_has_its_own(self, tmp_path):
        log_episodes(tmp_path, [2, 2], max_shard_bytes=1)
        assert len(list(tmp_path.glob("*tfrecord*"))) == 2
        assert lengths_of(tmp_path) == [2, 2]

    def test_there_is_a_last(self, tmp_path, monkeypatch):
        monkeypatch.setattr(directory_module, "_MOST", 2)
        with RLDSLogger(tmp_path, max_shard_bytes=1) as log:
            log(transition(0), True)
            log(transition(0), True)
            with pytest.raises(ValueError, match="max_shard_bytes"):
                log(transition(0), True)
            monkeypatch.undo()
        assert lengths_of(tmp_path) == [1, 1, 1]


class TestReopening:
    def test_goes_on(self, tmp_path):
        log_episodes(tmp_path, [3])
        log_episodes(tmp_path, [2], start=4)
        assert [t["rewards"] for t in read_transitions(tmp_path)] == [0, 0.5, 1, 2, 2.5]

    def test_what_fits_is_settled(self, tmp_path):
        log_episodes(tmp_path, [1])
        with RLDSLogger(tmp_path) as log:
            with pytest.raises(ValueError, match=r"observation/x.*\(3,\).*\(4,\)"):
                log({**transition(0), "observations": {"x": np.zeros(4), "n": 0.0}})
            with pytest.raises(ValueError, match="observation/x, but got observation"):
                log({**transition(0), "observations": np.zeros(4)})
            with pytest.raises(ValueError, match="a step has action, discount, reward, but"):
                log({**transition(0), "more": 1})
            log({**transition(0), "actions": np.zeros(2)})  # float64, which can be converted
        assert lengths_of(tmp_path) == [1, 1]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"name": "other"}, "named 'edgeml'"),
            ({"metadata": {"who": "me"}}, "have the metadata nothing, not who"),
            ({"image_format": "jpeg"}, "observation in .* are png, not jpeg"),
        ],
    )
    def test_what_was_chosen_is_settled(self, tmp_path, options, text):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(np.zeros((4, 4, 3), np.uint8))
            log.log_step(0, np.zeros((4, 4, 3), np.uint8), 0.0)
        with pytest.raises(ConfigMismatch, match=text):
            RLDSLogger(tmp_path, **options)
        RLDSLogger(tmp_path).close()  # nobody has it open

    def test_another_dataset_is_left_alone(self, tmp_path):
        log_episodes(tmp_path, [1])
        info = json.loads((tmp_path / "dataset_info.json").read_bytes())
        (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"moduleName": "other"}))
        with pytest.raises(ConfigMismatch, match="not logged by edgeml"):
            RLDSLogger(tmp_path)

    def test_by_two_at_once_is_refused(self, tmp_path):
        with (
            RLDSLogger(tmp_path),
            pytest.raises(BlockingIOError, match="another logger"),
        ):
            RLDSLogger(tmp_path)
        RLDSLogger(tmp_path).close()

    def test_damage_is_told_and_left(self, tmp_path):
        log_episodes(tmp_path, [1, 1, 1])
        shard = tmp_path / "edgeml-train.tfrecord-00000"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        with pytest.raises(Malformed, match="the record at byte"):
            RLDSLogger(tmp_path)
        assert shard.read_bytes() == data
        shard.unlink()
        with pytest.raises(FileNotFoundError, match="is missing"):
            RLDSLogger(tmp_path)

    @pytest.mark.parametrize("info", ["lost", "old"])
    @pytest.mark.parametrize("episode", [0, 10, 19])
    def test_damage_where_nothing_is_counted_is_left(self, tmp_path, info, episode):
        shard, counts = tmp_path / "edgeml-train.tfrecord-00000", tmp_path / "dataset_info.json"
        if info == "old":
            log_episodes(tmp_path, [1])
            old = counts.read_bytes()
            log_episodes(tmp_path, [1] * 20, start=2)
            counts.write_bytes(old)
        else:
            log_episodes(tmp_path, [1] * 20)
            counts.unlink()
        data = bytearray(shard.read_bytes())
        at = [offset for offset, _ in read_records(shard)][episode]
        for damaged in (at, at + 8, at + 40):  # the length, its checksum, the data
            data[damaged] ^= 4
            shard.write_bytes(data)
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            with pytest.raises(Malformed, match=rf"{shard}, the record at byte {at}: .* backup"):
                RLDSLogger(tmp_path)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
            data[damaged] ^= 4
        shard.write_bytes(data)
        with RLDSLogger(tmp_path) as log:
            assert log.episodes == 20 + (info == "old")

    @pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
    def test_only_the_last_shard_may_end_early(self, tmp_path, damage):
        log_episodes(tmp_path, [1, 1, 1], max_shard_bytes=1)
        (tmp_path / "dataset_info.json").unlink()
        shard = tmp_path / "edgeml-train.tfrecord-00001"
        data = shard.read_bytes()
        if damage == "missing":
            shard.unlink()
        else:
            shard.write_bytes(data + data[:30] if damage == "torn" else b"")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises((FileNotFoundError, Malformed), match=f"{shard}.*Nothing was changed"):
            RLDSLogger(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        shard.write_bytes(data)
        with RLDSLogger(tmp_path) as log:
            assert log.episodes == 3

    def test_features_of_others_are_left(self, tmp_path):
        log_episodes(tmp_path / "logged", [1])
        ours = (tmp_path / "logged" / "features.json").read_bytes()
        path = tmp_path / "features.json"
        for content in (
            b"",
            b"{}",
            b'{"features": 1}',
            json.dumps(json.loads(ours), indent=4).encode(),  # as tfds writes it
        ):
            path.write_bytes(content)
            with pytest.raises(ConfigMismatch, match=f"{path} was not written by edgeml"):
                RLDSLogger(tmp_path)
            assert path.read_bytes() == content

    def test_features_without_an_episode_are_kept(self, tmp_path, caplog):
        """A crash may come between the two."""
        log_episodes(tmp_path / "logged", [1])
        path = tmp_path / "features.json"
        path.write_bytes((tmp_path / "logged" / "features.json").read_bytes())
        with RLDSLogger(tmp_path) as log:
            assert f"{path} is there, but no episode" in caplog.text
            with pytest.raises(ValueError, match="an observation has"):
                log({**transition(0), "observations": 0})
            log(transition(0))
        assert path.read_bytes() == (tmp_path / "logged" / "features.json").read_bytes()
        assert lengths_of(tmp_path) == [1]


CHILD = """
import sys
import numpy as np
from edgeml.data.rlds import RLDSLogger
from test_rlds import transition
log = RLDSLogger(sys.argv[1])
for i in range(int(sys.argv[2])):
    for k in range(3):
        log(transition(4 * i + k, done=k == 2))
for k in range(2):
    log(transition(100 + k))
print("in the midst of an episode", flush=True)
sys.stdin.read()
"""


class TestCrashes:
    def test_a_killed_process_loses_the_episode_under_way(self, tmp_path):
        for n in (2, 3):
            path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
            with subprocess.Popen(
                [sys.executable, "-c", CHILD, str(tmp_path), str(n)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            ) as child:
                assert child.stdout is not None
                assert child.stdout.readline() == b"in the midst of an episode\n"
                child.kill()
        assert lengths_of(tmp_path) == [3] * 5
        log_episodes(tmp_path, [1], start=50)
        assert lengths_of(tmp_path) == [3] * 5 + [1]

    @pytest.mark.parametrize("max_shard_bytes", [1, 1 << 20])
    def test_at_any_moment(self, tmp_path, monkeypatch, max_shard_bytes):
        """Whatever the directory is like in between, it has all episodes or all but the last.

        Its state is kept before each operation on files, and in the midst of writes.
        """
        live = tmp_path / "live"
        states: list[tuple[int, Path]] = []
        episodes = 0

        def keep() -> None:
            state = tmp_path / f"state {len(states)}"
            shutil.copytree(live, state)
            states.append((episodes, state))

        def half(fd: int, data: Any) -> int:
            keep()
            return write(fd, data[: (len(data) + 1) // 2])

        def watched(function: Any) -> Any:
            def call(*args: Any) -> Any:
                keep()
                return function(*args)

            return call

        log = RLDSLogger(live, max_shard_bytes=max_shard_bytes)
        write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            for name in ("fsync", "replace", "ftruncate"):
                patch.setattr(os, name, watched(getattr(os, name)))
            for episodes in range(3):
                log(transition(episodes), True)
        log.close()
        assert len(states) > 60
        for n, state in states:
            counted = len(lengths_of(state)) if (state / "dataset_info.json").exists() else 0
            with RLDSLogger(state, max_shard_bytes=max_shard_bytes) as log:
                assert n <= counted <= log.episodes <= n + 1
                log(transition(7), True)
            rewards = [t["rewards"] for t in read_transitions(state)]
            assert rewards == [*(i / 2 for i in range(len(rewards) - 1)), 3.5]
            assert len(rewards) in (n + 1, n + 2)

    @pytest.mark.parametrize("zeros", [False, True])
    def test_a_torn_tail_is_cut_off(self, tmp_path, caplog, zeros):
        """Whether its end is missing, or the file is longer than what was written to it."""
        log_episodes(tmp_path, [1])
        shard, info = tmp_path / "edgeml-train.tfrecord-00000", tmp_path / "dataset_info.json"
        first, counts = shard.read_bytes(), info.read_bytes()
        log_episodes(tmp_path, [2], start=2)
        both = shard.read_bytes()
        for size in range(len(first), len(both), 7):
            torn = both[:size]
            if zeros:  # nothing or its head is all that was written, then zeros
                torn = both[: min(size, len(first) + 12)] + bytes(size)
            shard.write_bytes(torn)
            caplog.clear()
            info.write_bytes(counts)
            assert lengths_of(tmp_path) == [1]  # even before it is cut off
            with RLDSLogger(tmp_path) as log:
                assert log.episodes == 1
            assert shard.read_bytes() == first
            told = f"{shard}: cut off {len(torn) - len(first)} bytes"
            assert (told in caplog.text) == (len(torn) > len(first))
        shard.write_bytes(both)
        info.write_bytes(counts)
        with RLDSLogger(tmp_path) as log:
            assert log.episodes == 2  # it was all there, only not counted
        assert lengths_of(tmp_path) == [1, 2]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_an_error_at_any_moment(self, tmp_path, monkeypatch, error):
        """An episode that could not be written is kept, and written by the next call."""
        log = RLDSLogger(tmp_path)
        log(transition(0), True)
        happened = True
        after = 0
        while happened:
            calls, happened = after, False

            def failing(function: Any) -> Any:
                def call(*args: Any) -> Any:
                    nonlocal calls, happened
                    calls -= 1
                    if calls == -1:
                        happened = True
                        raise error("on purpose")
                    return function(*args)

                return call

            with monkeypatch.context() as patch:
                for name in ("write", "fsync", "replace"):
                    patch.setattr(os, name, failing(getattr(os, name)))
                try:
                    log(transition(after + 1, mask=0), True)
                except error:
                    assert happened
                    assert len(lengths_of(tmp_path)) == log.episodes
                    log.end_episode()
            after += 1
        log.close()
        assert after > 5
        assert [t["rewards"] for t in read_transitions(tmp_path)] == [
            np.float32(i / 2) for i in range(after + 1)
        ]
        assert all(t["masks"] == 0 for t in read_transitions(tmp_path)[1:])


class TestRefusals:
    def test_a_refused_step_changes_nothing(self, tmp_path):
        with RLDSLogger(tmp_path, metadata={"ok": False}) as log:
            log.log_reset(np.zeros(2))
            log.log_step(np.zeros(1), np.ones(2), 0.0)
            for action, observation, reward, options, text in (
                (np.zeros(2), np.ones(2), 0.0, {}, "action"),
                (np.zeros(1), np.ones(3), 0.0, {}, "observation"),
                (np.zeros(1), np.ones(2), "much", {}, "reward"),
                (np.zeros(1), np.ones(2), 0.0, {"metadata": {"no": 1}}, "metadata has ok"),
                (np.zeros(1), np.ones(2), 0.0, {"metadata": {"ok": "yes"}}, "ok"),
                (np.zeros(1), np.ones(2), 0.0, {"extra": {"reward": 1}}, "meaning of its own"),
                (np.zeros(1), np.ones(2), 0.0, {"extra": {"is_last": 1}}, "meaning of its own"),
            ):
                with pytest.raises(ValueError, match=text):
                    log.log_step(action, observation, reward, terminated=True, **options)
            log.log_step(np.zeros(1), np.full(2, 2.0), 0.0, metadata={"ok": True})
        [episode] = read_episodes(tmp_path)
        assert same(episode["steps"]["observation"], np.array([[0.0, 0], [1, 1], [2, 2]]))
        assert same(episode["episode_metadata"], {"ok": np.True_})

    @pytest.mark.parametrize(
        "observation",
        [None, np.array(["a"]), b"bytes", {"a/b": 1}, {"": 1}, {1.5: 1}, np.zeros(0), {"x": None}],
    )
    def test_what_no_feature_holds(self, tmp_path, observation):
        with RLDSLogger(tmp_path) as log, pytest.raises(ValueError, match=r"expected|keys are"):
            log.log_reset(observation)

    def test_transitions_without_what_they_need(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            with pytest.raises(ValueError, match=r"without \['next_observations', 'rewards'\]"):
                log({"observations": 0, "actions": 0})
            with pytest.raises(ValueError, match="one mask"):
                log({**transition(0), "masks": np.zeros(2)})

    def test_steps_need_a_reset(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            with pytest.raises(RuntimeError, match="log_reset"):
                log.log_step(0, 0, 0.0)
            log.log_reset(0)
            log.log_step(0, 0, 0.0, terminated=True)
            with pytest.raises(RuntimeError, match="log_reset"):
                log.log_step(0, 0, 0.0)

    def test_after_closing(self, tmp_path):
        log = RLDSLogger(tmp_path)
        log.log_reset(0)
        log.close()
        log.close()
        for call in (lambda: log.log_reset(0), lambda: log(transition(0))):
            with pytest.raises(ValueError, match="closed"):
                call()
        assert not list(tmp_path.iterdir())  # nothing was logged

    @pytest.mark.parametrize("options", [{"name": "My-Data"}, {"image_format": "gif"}])
    def test_options_that_can_not_be(self, tmp_path, options):
        with pytest.raises(ValueError, match=r"word in lower case|'png' or 'jpeg'"):
            RLDSLogger(tmp_path, **options)


class TestReading:
    """Of what we don't write ourselves; tests/data/test_rlds_tfds.py reads what tfds wrote."""

    def feature(self, name: str, **content: Any) -> dict[str, Any]:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", **content}

    def tensor(self, *shape: int, dtype: str = "int32", **content: Any) -> dict[str, Any]:
        return self.feature(
            "tensor_feature.Tensor",
            tensor={"shape": {"dimensions": [*map(str, shape)]}, "dtype": dtype, **content},
        )

    def series(self, feature: dict[str, Any], name: str = "sequence_feature.Sequence") -> Any:
        return self.feature(name, sequence={"feature": feature, "length": "-1"})

    def read(self, feature: dict[str, Any], values: dict[str, Any]) -> Any:
        whole = self.feature(
            "features_dict.FeaturesDict", featuresDict={"features": {"x": feature}}
        )
        features = from_json(json.dumps(whole))
        return read(features, decode_example(encode_example(values)))["x"]

    def test_series_in_series(self):
        found = self.read(
            self.series(self.series(self.series(self.tensor()))),
            {
                "x/ragged_flat_values": np.arange(6),
                "x/ragged_row_lengths_0": np.array([2, 0, 1]),
                "x/ragged_row_lengths_1": np.array([1, 2, 3]),
            },
        )
        assert [[inner.tolist() for inner in outer] for outer in found] == [
            [[0], [1, 2]],
            [],
            [[3, 4, 5]],
        ]
        found = self.read(
            self.series(self.series(self.tensor(2))),
            {
                "x/ragged_flat_values": np.arange(8),
                "x/ragged_row_lengths_0": np.array([2, 2]),
            },
        )
        assert same(found, np.arange(8, dtype=np.int32).reshape(2, 2, 2))

    def test_shapes_that_are_told_with_the_values(self):
        arrays = [np.arange(n, dtype=np.int16).reshape(-1, 2) for n in (2, 6)]
        found = self.read(
            self.series(self.tensor(-1, -1, dtype="int16", encoding="zlib")),
            {
                "x/shape": np.array([1, 2, 3, 2]),
                "x/value": [zlib.compress(array.tobytes()) for array in arrays],
            },
        )
        assert all(map(same, found, arrays))
        found = self.read(self.tensor(-1, 2, dtype="float32"), {"x": np.float32([1, 2, 3, 4])})
        assert same(found, np.float32([[1, 2], [3, 4]]))

    def test_optional_values_may_be_missing(self):
        assert self.read(self.tensor(optional=True), {}) is None
        assert self.read(self.tensor(optional=True), {"x": np.array([5])}) == 5

    @pytest.mark.parametrize(
        ("feature", "values", "text"),
        [
            ("int", {}, "there is no x"),
            ("int", {"x": np.array([1, 2])}, "x: 2 elements"),
            ("int", {"x": np.array([2**31])}, "x: a number beyond int32"),
            ("int", {"x": np.float32([1])}, "x: a list of float32"),
            ("int", {"x": [b"1"]}, "x: a list of bytes"),
            ("bytes", {"x": np.array([1])}, "x: a list of numbers"),
            ("bytes", {"x": [bytes(7)]}, "x: expected 8 bytes"),
            ("zlib", {"x": [b"nothing"]}, "x: Error -3"),
            ("zlib", {"x": [zlib.compress(bytes(99))]}, "more than 8 bytes"),
            ("zlib", {"x": [zlib.compress(bytes(8))[:-2]]}, "cut"),
            ("image", {"x": [b"nothing"]}, "x: not an image"),
            ("ragged", {"x/ragged_flat_values": np.arange(3)}, "no x/ragged_row_lengths_0"),
            (
                "ragged",
                {
                    "x/ragged_flat_values": np.arange(3),
                    "x/ragged_row_lengths_0": np.array([4, -1]),
                },
                "rows of 3",
            ),
        ],
    )
    def test_what_does_not_fit_is_told(self, feature, values, text):
        features = {
            "int": self.tensor(),
            "bytes": self.tensor(2, encoding="bytes"),
            "zlib": self.tensor(2, encoding="zlib"),
            "ragged": self.series(self.series(self.tensor())),
            "image": self.feature(
                "image_feature.Image",
                image={"shape": {"dimensions": ["2", "2", "3"]}, "dtype": "uint8"},
            ),
        }
        with pytest.raises(Malformed, match=text):
            self.read(features[feature], values)

    def test_features_that_are_not_read_are_named(self):
        for feature in (
            self.feature("audio_feature.Audio", audio={}),
            self.tensor(encoding="gzip"),
            self.tensor(dtype="float7"),
        ):
            with pytest.raises(TypeError, match=r"Audio|gzip|float7"):
                self.read(feature, {})

    def test_an_image_of_another_size_is_not_decoded(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(np.zeros((5, 4, 3), np.uint8))
            log.log_step(0, np.zeros((5, 4, 3), np.uint8), 0.0)
        path = tmp_path / "features.json"
        path.write_text(path.read_text().replace('"5"', '"6"'))
        with pytest.raises(Malformed, match="5x4, not 6x4"):
            list(read_episodes(tmp_path))

    def test_no_dataset(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no dataset in"):
            list(read_episodes(tmp_path))
        log_episodes(tmp_path, [1])
        with pytest.raises(ValueError, match=r"splits \['train'\], but no 'test'"):
            list(read_episodes(tmp_path, "test"))
        shard = tmp_path / "edgeml-train.tfrecord-00000"
        shard.write_bytes(b"")
        with pytest.raises(Malformed, match=r"has 0 episodes, but dataset_info\.json counts 1"):
            list(read_episodes(tmp_path))
        shard.unlink()
        with pytest.raises(FileNotFoundError):
            list(read_episodes(tmp_path))

    @pytest.mark.parametrize("template", ["../{SPLIT}", "/etc/passwd", "{DATASET.x}", "{NO}"])
    def test_files_elsewhere_are_not_read(self, tmp_path, template):
        log_episodes(tmp_path, [1])
        path = tmp_path / "dataset_info.json"
        info = json.loads(path.read_bytes())
        info["splits"][0]["filepathTemplate"] = template
        path.write_text(json.dumps(info))
        with pytest.raises((Malformed, FileNotFoundError)):
            list(read_episodes(tmp_path))

    def test_a_split_needs_a_name(self, tmp_path):
        log_episodes(tmp_path, [1])
        path = tmp_path / "dataset_info.json"
        info = json.loads(path.read_bytes())
        info["splits"][0] |= {"name": [], "filepathTemplate": "{DATASET}"}
        path.write_text(json.dumps(info))
        with pytest.raises(Malformed, match="not what tensorflow_datasets writes"):
            list(read_episodes(tmp_path))

    def test_other_files_are_told(self, tmp_path):
        log_episodes(tmp_path, [1])
        path = tmp_path / "dataset_info.json"
        path.write_text(path.read_text().replace('"tfrecord"', '"riegeli"'))
        with pytest.raises(TypeError, match="riegeli"):
            list(read_episodes(tmp_path))

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_garbage_is_told(self, tmp_path, data):
        """Whatever is changed in the files, an error says so, or an episode comes out."""
        if not (tmp_path / "whole").exists():
            TestWhatWasLogged().logged(tmp_path / "whole")
        directory = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", directory, dirs_exist_ok=True)
        name = data.draw(
            st.sampled_from(["features.json", "dataset_info.json", "edgeml-train.tfrecord-00000"])
        )
        content = (directory / name).read_bytes()
        if "tfrecord" in name:
            content = content[12:-4]
        at = data.draw(st.integers(0, len(content)))
        new = data.draw(st.binary(max_size=4) | st.sampled_from([b"{}", b"[", b"null", b"-1"]))
        content = content[:at] + new + content[at + data.draw(st.integers(0, 9)) :]
        if "tfrecord" in name:
            content = b"".join(frame_record(content))
        (directory / name).write_bytes(content)
        told = None
        try:
            list(read_episodes(directory))
        except (Malformed, FileNotFoundError):
            pass
        except (TypeError, ValueError) as error:
            told = str(error)
        if told is not None:
            assert re.search("not read|not known|no RLDS dataset|has the splits", told), told


class TestStores:
    def test_a_replay_buffer(self, tmp_path):
        log_episodes(tmp_path, [3, 4, 5])
        store = make_datastore(tmp_path, 100, seed=1)
        assert isinstance(store, ReplayBuffer)
        held = list(store.get_latest_data(0))
        assert all(map(same, held, read_transitions(tmp_path)))
        assert len(held) == 12
        assert store.sample(4)["observations"]["x"].shape == (4, 3)

    def test_holds_the_last_of_a_larger_dataset(self, tmp_path):
        log_episodes(tmp_path, [3, 4, 5])
        store = make_datastore(tmp_path, 7)
        assert len(store) == 7
        assert all(map(same, store.get_latest_data(0), read_transitions(tmp_path)[-7:]))

    def test_populating_what_is_there(self, tmp_path):
        log_episodes(tmp_path, [3, 2])
        store = ReplayBuffer(100, example=transition(0))
        store.insert(transition(50))
        assert populate_datastore(store, tmp_path) == 5
        assert populate_datastore(store, tmp_path) == 5
        assert len(store) == 11
        with pytest.raises(ValueError, match="observations"):
            populate_datastore(ReplayBuffer(9, example={"observations": 1.0}), tmp_path)

    def test_transforms(self, tmp_path):
        with RLDSLogger(tmp_path) as log:
            log.log_reset({"task": "pick", "x": 1.0})
            log.log_step(0, {"task": "pick", "x": 2.0}, 0.5, extra={"version": 4})
        with pytest.raises(ValueError, match="observations/task is text"):
            make_datastore(tmp_path, 10)

        def transform(columns: dict[str, Any], episode: dict[str, Any]) -> dict[str, Any]:
            return {"x": columns["observations"]["x"], "version": episode["steps"]["version"][:-1]}

        store = make_datastore(tmp_path, 10, transform=transform)
        assert list(store.get_latest_data(0)) == [{"x": 1.0, "version": 4}]

    def give_last_steps(self, directory: Path, **values: Any) -> None:
        """Give every other episode's last step values, as tfds's template for episodes has them."""
        shard = directory / "edgeml-train.tfrecord-00000"
        records = []
        for i, (_, data) in enumerate(read_records(shard)):
            example = decode_example(data)
            for key, value in values.items() if i % 2 == 0 else ():
                column = np.array(example[f"steps/{key}"])
                n = len(column) // len(example["steps/is_last"])
                column[-n:] = value
                example[f"steps/{key}"] = column
            records += frame_record(encode_example(example))
        shard.write_bytes(b"".join(records))

    @pytest.mark.parametrize("type", ["replay_buffer", "trajectory_buffer"])
    def test_a_last_reward_is_kept(self, tmp_path, type, caplog):
        if type == "trajectory_buffer":
            pytest.importorskip("jax")
        log_episodes(tmp_path, [3, 2, 1])
        self.give_last_steps(tmp_path, reward=4.0)

        def rewards(**options: Any) -> list[float]:
            caplog.clear()
            store = make_datastore(tmp_path, 100, type, **options)
            assert all(item["masks"] == 1 for item in list(store.get_latest_data(0))[:2])
            return [float(item["rewards"]) for item in store.get_latest_data(0)]

        found = rewards()
        assert found == [0, 0.5, 1, 4, 2, 2.5, 3.5, 4]
        [record] = caplog.records
        assert f"{tmp_path}: the last step of 2 of 3 episodes" in record.message
        assert "last_step='drop'" in record.message
        assert rewards(last_step="keep") == [0, 0.5, 1, 4, 2, 2.5, 0, 3.5, 4]
        assert not caplog.records
        assert rewards(last_step="drop") == [0, 0.5, 1, 2, 2.5, 3.5]
        assert not caplog.records
        with pytest.raises(ValueError, match="last_step"):
            rewards(last_step="never")

    def test_a_last_action_is_kept(self, tmp_path, caplog):
        log_episodes(tmp_path, [3, 2])
        self.give_last_steps(tmp_path, action=np.float32([0, 7]))
        store = make_datastore(tmp_path, 100)
        last = list(store.get_latest_data(0))[3]
        assert same(last["actions"], np.float32([0, 7]))
        assert same(last["observations"], last["next_observations"])
        assert same(last["observations"], transition(2)["next_observations"])
        assert (last["masks"], last["dones"]) == (0, True)
        assert "1 of 2 episodes" in caplog.text
        assert populate_datastore(store, tmp_path, last_step="drop") == 5
        assert populate_datastore(store, tmp_path, last_step="keep") == 7
        assert populate_datastore(store, tmp_path) == 6

    def test_what_was_logged_here_has_no_last_steps(self, tmp_path, caplog):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(0)
            log.log_step({"text": "go", "x": 1}, 1, 5.0, terminated=True)
        store = make_datastore(tmp_path, 9, transform=lambda c, _: {"rewards": c["rewards"]})
        assert list(store.get_latest_data(0)) == [{"rewards": 5.0}]
        assert not caplog.records

    def test_nothing_to_make_one_of(self, tmp_path):
        with pytest.raises(ValueError, match="'trajectory_buffer'"):
            make_datastore(tmp_path, 10, "queue")
        log_episodes(tmp_path, [1])
        info = tmp_path / "dataset_info.json"
        info.write_text(info.read_text().replace('"1"', '"0"'))
        with pytest.raises(ValueError, match="has no transition"):
            make_datastore(tmp_path, 10)

    def test_a_trajectory_buffer(self, tmp_path):
        pytest.importorskip("jax")
        log_episodes(tmp_path, [3, 4])
        store = make_datastore(tmp_path, 100, "trajectory_buffer")
        assert populate_datastore(store, tmp_path) == 7
        held = list(store.get_latest_data(0))
        assert [item["end_of_trajectory"] for item in held] == [i in (2, 6) for i in range(7)] * 2
        for item, expected in zip(held, read_transitions(tmp_path) * 2, strict=True):
            assert item["observations"]["n"].dtype == np.float32  # what JAX keeps of float64
            for key in ("actions", "rewards", "masks"):
                assert same(item[key], expected[key])
            assert same(item["observations"]["x"], expected["observations"]["x"])

    def test_no_trajectory_goes_on_in_a_dataset(self, tmp_path):
        pytest.importorskip("jax")
        from edgeml.data import DataShape, TrajectoryBufferDataStore

        log_episodes(tmp_path, [2])
        calls: list[Any] = []
        store = TrajectoryBufferDataStore(
            9,
            [DataShape("rewards")],
            rlds_logger=lambda item, end: calls.append((item and float(item["rewards"]), end)),
        )
        store.insert({"rewards": 7.0, "end_of_trajectory": False})
        populate_datastore(
            store,
            tmp_path,
            transform=lambda columns, _: {key: columns[key] for key in ("rewards", "dones")},
        )
        assert calls == [(7.0, False), (None, True), (0.0, False), (0.5, True)]

    def test_a_store_that_logs(self, tmp_path):
        """What is inserted into a store with a logger is what makes a store of the log."""
        pytest.importorskip("jax")
        from edgeml.data import DataShape, TrajectoryBufferDataStore

        shapes = [
            *(
                DataShape(f"{name}/{key}", shape)
                for name in ("observations", "next_observations")
                for key, shape in (("x", (3,)), ("n", ()))
            ),
            DataShape("actions", (2,)),
            DataShape("rewards"),
            DataShape("masks"),
        ]
        with RLDSLogger(tmp_path) as log:
            store = TrajectoryBufferDataStore(100, shapes, rlds_logger=log)
            for i, end in enumerate([False, False, True, False, False, False, True]):
                item = transition(i)
                del item["dones"]
                store.insert({**item, "end_of_trajectory": end})
            store.insert({**item, "end_of_trajectory": False})
            store.interrupt()
        assert lengths_of(tmp_path) == [3, 4, 1]
        copy = make_datastore(tmp_path, 100, "trajectory_buffer")
        for key in ("observations", "next_observations", "actions", "rewards", "masks"):
            found = copy.get_latest_data(0).columns[key]
            assert same(found, store.get_latest_data(0).columns[key])


def test_nothing_heavy_is_imported():
    code = (
        "import sys, edgeml.data.rlds\n"
        "print({'PIL', 'google_crc32c', 'jax', 'gymnasium', 'tensorflow'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout == b"set()\n"
