"""RLDS datasets, side by side with tensorflow_datasets: each reads what the other wrote.

    pytest -m slow tests/data/test_rlds_tfds.py

TensorFlow is installed for it, in an environment of its own, which takes minutes. Where you have
one with tensorflow and tensorflow_datasets, EDGEML_TFDS_PYTHON may name its python.
"""

import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.data.rlds import RLDSLogger, make_datastore, read_episodes, transitions_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROGRAM = Path(__file__).with_name("tfds_program.py")


@pytest.fixture(scope="module")
def tfds_python(tmp_path_factory) -> str:
    """The python of an environment with tensorflow_datasets."""
    if "EDGEML_TFDS_PYTHON" in os.environ:
        return os.environ["EDGEML_TFDS_PYTHON"]
    directory = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = str(directory / "bin" / "python")
    packages = ["tensorflow-cpu", "tensorflow_datasets"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def run(python: str, command: str, directory: Path, out: Path) -> tuple[str, int, int, list[Any]]:
    """Return the dataset's full name, its numbers of episodes and shards, and the episodes."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["TMPDIR"] = str(out.parent)  # which tfds leaves things in
    subprocess.run([python, PROGRAM, command, directory, out], check=True, env=environment)
    with out.open("rb") as file:
        result: tuple[str, int, int, list[Any]] = pickle.load(file)
    return result


def compare(found: Any, expected: Any, path: str = "", most: int = 0) -> int:
    """Assert that what we read is what tfds read, and return how many values that are."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        return sum(
            compare(found[key], part, f"{path}/{key}", 3 if key == "jpeg" else 0)
            for key, part in expected.items()
        )
    if isinstance(expected, bytes):
        assert (found if isinstance(found, bytes) else found.encode()) == expected, path
        return 1
    if isinstance(expected, list) or getattr(expected, "dtype", None) == np.dtype(object):
        assert len(found) == len(expected), path
        return sum(
            compare(mine, theirs, f"{path}[{i}]")
            for i, (mine, theirs) in enumerate(zip(found, expected, strict=True))
        )
    if hasattr(expected, "dtype"):
        assert np.asarray(found).dtype == expected.dtype, path
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, path
    if most:  # tfds decodes JPEG by a faster and less exact method
        assert np.abs(found.astype(int) - expected).max() <= most, path
    else:
        assert found.astype(expected.dtype).tobytes() == expected.tobytes(), path
    return 1


def at(node: Any, i: int) -> Any:
    return {key: at(part, i) for key, part in node.items()} if isinstance(node, dict) else node[i]


def compare_episodes(found: list[Any], expected: list[Any]) -> int:
    assert len(found) == len(expected)
    n = 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert len(mine["steps"]["is_last"]) == len(theirs["steps"])
        for i, step in enumerate(theirs["steps"]):
            n += compare(at(mine["steps"], i), step, f"steps[{i}]")
        n += compare(mine.get("episode_metadata", {}), theirs.get("episode_metadata", {}))
    return n


def observation(i: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    numbers = rng.integers(-100, 100, (2, 3))
    names = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "?")
    return {
        **{np.dtype(name).name: numbers.astype(name) for name in names},
        "exact": rng.normal(size=3) * 1e300,
        "largest": np.array([2**63 - 1, -(2**63)]),
        "scalar": np.float64(i / 3),
        "image": rng.integers(0, 256, (8, 9, 3)).astype(np.uint8),
        "gray": rng.integers(0, 256, (8, 9, 1)).astype(np.uint8),
        "rgba": rng.integers(0, 256, (8, 9, 4)).astype(np.uint8),
        "frames": rng.integers(0, 256, (2, 8, 9, 3)).astype(np.uint8),
        "nested": {"deeper": {"x": np.float32(i)}, "pair": (np.int32(i), "left")},
        "task": f"pick ü {i}",
    }


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_tfds_reads_what_we_wrote(tmp_path, tfds_python, image_format):
    logged, lengths = [], [1, 7, 4, 2, 5]
    for part in (lengths[:3], lengths[3:]):  # by two loggers, one after the other
        with RLDSLogger(
            tmp_path / "log",
            name="robot",
            metadata={"who": "", "n": 0, "map": np.eye(2)},
            image_format=image_format,
            max_shard_bytes=30_000,
        ) as log:
            for length in part:
                k = len(logged)
                log.log_reset(observation(k), {"n": k, "who": f"ü{k}"})
                logged.append((length, k))
                for t in range(1, length + 1):
                    log.log_step(
                        {"arm": np.full(2, t, np.float32), "grip": t % 2 == 0},
                        observation(k + t),
                        t / 10,
                        terminated=t == length and k % 2 == 0,
                        truncated=t == length,
                        extra={"language_instruction": f"go {t}"},
                    )
    name, n, shards, episodes = run(tfds_python, "read", tmp_path / "log", tmp_path / "out")
    assert (name, n) == ("robot/1.0.0", 5)
    assert shards == len(list((tmp_path / "log").glob("*tfrecord*"))) > 1

    ours = list(read_episodes(tmp_path / "log"))
    if image_format == "jpeg":  # which makes something else of noise
        for mine, theirs in zip(ours, episodes, strict=True):
            for part in [mine["steps"], *theirs["steps"]]:
                del part["observation"]["image"], part["observation"]["gray"]
    compare_episodes(ours, episodes)

    # And it is what was logged, value by value.
    for episode, (length, k) in zip(episodes, logged, strict=True):
        said = {"n": np.int64(k), "who": f"ü{k}".encode(), "map": np.eye(2)}
        compare(said, episode["episode_metadata"])
        assert len(episode["steps"]) == length + 1
        for t, step in enumerate(episode["steps"]):
            expected = observation(k + t)
            expected["nested"]["pair"] = dict(zip("01", expected["nested"]["pair"], strict=True))
            if image_format == "jpeg":
                del expected["image"], expected["gray"]
            last = t == length
            done = t == length - 1 and k % 2 == 0
            expected = {
                "observation": expected,
                "action": {
                    "arm": np.full(2, 0 if last else t + 1, np.float32),
                    "grip": np.bool_(not last and t % 2 == 1),
                },
                "reward": np.float64(0 if last else (t + 1) / 10),
                "discount": np.float32(0 if last or done else 1),
                "is_first": np.bool_(t == 0),
                "is_last": np.bool_(last),
                "is_terminal": np.bool_(last and k % 2 == 0),
                "language_instruction": b"" if last else f"go {t + 1}".encode(),
            }
            compare(expected, step, f"episode {k}, step {t}")


def test_we_read_what_tfds_wrote(tmp_path, tfds_python):
    _, n, _, expected = run(tfds_python, "write", tmp_path / "data", tmp_path / "out")
    directory = tmp_path / "data" / "everything" / "1.0.0"
    episodes = list(read_episodes(directory))
    assert n == len(episodes) == 5
    for episode in expected:  # None as tfds gives it: the least int32
        if episode["episode_metadata"]["optional"] == np.iinfo(np.int32).min:
            episode["episode_metadata"]["optional"] = None
    assert any(episode["episode_metadata"]["optional"] is None for episode in expected)
    assert compare_episodes(episodes, expected) > 5 * 3 * 30
    assert len(list(read_episodes(directory, "other"))) == 2

    def transform(columns: dict[str, Any], episode: dict[str, Any]) -> dict[str, Any]:
        for key in ("observations", "next_observations"):
            columns[key] = {name: columns[key][name] for name in ("image", "state")}
        return columns

    store = make_datastore(directory, 100, transform=transform)
    columns = store.get_latest_data(0).columns
    assert len(store) == sum(len(episode["steps"]) - 1 for episode in expected)
    i = 0
    for episode in expected:
        steps = episode["steps"]
        for before, after in pairwise(steps):
            for key in ("image", "state"):
                compare(columns["observations"][key][i], before["observation"][key])
                compare(columns["next_observations"][key][i], after["observation"][key])
            compare(columns["actions"][i], before["action"])
            compare(columns["rewards"][i], before["reward"])
            assert columns["masks"][i] == (0 if after["is_terminal"] else 1)
            assert columns["dones"][i] == after["is_last"]
            i += 1
    assert transitions_of(episodes[0])["dones"].sum() == 1
