"""Reads RLDS datasets, those that `RLDSLogger` wrote and those of tensorflow_datasets."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeml.core.errors import Malformed
from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.replay import ReplayBuffer
from edgeml.data.rlds.directory import FEATURES, read_splits
from edgeml.data.rlds.example import decode_example
from edgeml.data.rlds.features import Series, from_json
from edgeml.data.rlds.values import read
from edgeml.data.samplers import LatestSampler
from edgeml.data.shapes import END, DataShape, narrow
from edgeml.data.trajectory import TrajectoryBuffer
from edgeml.data.trajectory_store import TrajectoryBufferDataStore
from edgeml.data.tree import Array, fill, leaves_of, paths_of, skeleton_of

__all__ = ["make_datastore", "populate_datastore", "read_episodes", "transitions_of"]

Transform = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
LastStep = Literal["keep", "drop"]

_log = logging.getLogger(__name__)


def read_episodes(
    dataset_dir: str | os.PathLike[str], split: str = "train"
) -> Iterator[dict[str, Any]]:
    """Read the episodes of a dataset, one at a time, in the order in which they lie there.

    All checksums are checked. What is in the files beyond what `dataset_info.json` counts, such
    as an episode that is just being written, is not read.

    Args:
        dataset_dir: the directory with `features.json` and `dataset_info.json`, which tfds names
            after the version.
        split: a split's name, without a slice.

    Yields:
        a dict of ``steps`` and what else the episodes of this dataset have, such as
        ``episode_metadata``. ``steps`` is a nested dict of arrays with an axis for the steps;
        texts are in arrays of objects, and so is what is not of one shape in all steps. Arrays
        may be read-only.

    Raises:
        FileNotFoundError: no dataset, or a file of it, is there.
        ValueError: it has no such split, or no steps.
        Malformed: a file is damaged. The text names it, and the byte where the episode begins.
        TypeError: it has a feature, or files, of a kind that is not read; see `features`.
        ImportError: it has images, and Pillow is not installed.
    """
    directory = Path(dataset_dir)
    found = read_splits(directory)
    if split not in found:
        raise ValueError(f"{directory} has the splits {sorted(found)}, but no {split!r}")
    path = directory / FEATURES
    try:
        features = from_json(path.read_bytes())
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from None
    steps = features.get("steps") if isinstance(features, dict) else None
    if not isinstance(steps, Series) or not isinstance(steps.feature, dict):
        raise ValueError(f"{path} tells of no steps, so that this is no RLDS dataset")
    for shard, offset, data in found[split].read():
        try:
            episode: dict[str, Any] = read(features, decode_example(data))
            lengths = {len(column) for column in _list_leaves(episode["steps"])}
            if len(lengths) > 1:
                raise Malformed(f"the steps' parts are of different lengths: {sorted(lengths)}")
        except Malformed as error:
            raise Malformed(f"{shard}, the record at byte {offset}: {error}") from None
        yield episode


def transitions_of(episode: dict[str, Any], last_step: LastStep = "drop") -> dict[str, Any]:
    """Return the transitions of an episode that `read_episodes` gave.

    Args:
        episode: of n steps, each with the action upon its observation and the reward for that.
        last_step: "drop" makes n - 1 transitions: the last step holds the observation that the last
            action led to, and its own action and reward mean nothing, as RLDS has it. In many
            published datasets they do, and the reward of success is there; but the observation
            after them was not kept. So "keep" makes one transition more, of the last observation
            onto itself.

    Returns:
        a dict of columns, see `ReplayBufferDataStore`: ``observations``, ``next_observations``,
        ``actions``, ``rewards`` (float32; 0 where the dataset has none), ``masks`` (float32; 0
        for the last, if the episode is terminal, else 1) and ``dones`` (True for the last).

    Raises:
        ValueError: the steps have no observation or no action, or no such ``last_step``.
    """
    if last_step not in ("keep", "drop"):
        raise ValueError(f"last_step is 'keep' or 'drop', got {last_step!r}")
    steps = episode["steps"]
    for key in ("observation", "action"):
        if key not in steps:
            raise ValueError(f"the steps have no {key}, only {sorted(steps)}")
    total = len(_list_leaves(steps)[0])
    keep = last_step == "keep"
    n = total if keep else max(0, total - 1)
    last = np.arange(n) == n - 1

    def follow(column: Array) -> Array:
        return np.concatenate((column[1:], column[-1:])) if keep else column[1:]

    terminal = follow(steps.get("is_terminal", np.zeros(total, bool)))
    rewards = steps.get("reward", np.zeros(total))
    return {
        "observations": _map(steps["observation"], lambda column: column[:n]),
        "next_observations": _map(steps["observation"], follow),
        "actions": _map(steps["action"], lambda column: column[:n]),
        "rewards": _map(rewards, lambda column: column[:n].astype(np.float32)),
        "masks": np.float32(1) - (last & terminal).astype(np.float32),
        "dones": last,
    }


def populate_datastore(
    store: DataStoreBase,
    dataset_dir: str | os.PathLike[str],
    *,
    split: str = "train",
    transform: Transform | None = None,
    last_step: LastStep | None = None,
) -> int:
    """Insert the transitions of a dataset into a store, an episode at a time.

    Args:
        store: takes items as `transitions_of` describes them; a `TrajectoryBuffer` gets
            ``end_of_trajectory`` in place of ``dones``.
        dataset_dir: see `read_episodes`, as for what is raised.
        split: see `read_episodes`.
        transform: called with an episode's transitions, a dict of columns, and the episode as
            `read_episodes` gives it; returns the columns to insert. For texts, which a store
            doesn't hold, for other features of the steps, other names or shapes. What it adds has
            as many rows as ``columns["dones"]``.
        last_step: "keep" or "drop", see `transitions_of`. By default the last step of an episode is
            kept where its reward or action is not zero; how many were is logged as a warning.

    Returns:
        how many were inserted.

    Raises:
        ValueError: the items don't fit the store. The episodes before are in it.
    """
    batches = _read_columns(dataset_dir, split, transform, last_step)
    return sum(_insert(store, columns) for columns in batches)


def make_datastore(
    dataset_dir: str | os.PathLike[str],
    capacity: int,
    type: Literal["replay_buffer", "trajectory_buffer"] = "replay_buffer",
    *,
    split: str = "train",
    transform: Transform | None = None,
    last_step: LastStep | None = None,
    **options: Any,
) -> DataStoreBase:
    """Make a store for the transitions of a dataset, and insert them.

    Args:
        dataset_dir: see `read_episodes`, as for what is raised.
        capacity: of the store; of a larger dataset it holds the last transitions.
        type: "replay_buffer", a `ReplayBuffer` of `transitions_of`; or "trajectory_buffer", a
            `TrajectoryBufferDataStore` of the same, such as `make_default_trajectory_buffer`
            makes, with 32 bits for what has 64 unless ``jax_enable_x64`` is set.
        split: see `read_episodes`.
        transform: see `populate_datastore`.
        last_step: "keep" or "drop", see `populate_datastore`.
        options: what else the store's class is made with, such as ``seed``.

    Raises:
        ValueError: the dataset has no transition, or no such type.
    """
    if type not in ("replay_buffer", "trajectory_buffer"):
        raise ValueError(f"type is 'replay_buffer' or 'trajectory_buffer', got {type!r}")
    store: DataStoreBase | None = None
    for columns in _read_columns(dataset_dir, split, transform, last_step):
        if store is None:
            example = Batch.from_columns(columns)[0]
            if type == "replay_buffer":
                store = ReplayBuffer(capacity, example=example, **options)
            else:
                store = _make_trajectory_buffer(capacity, example, options)
        _insert(store, columns)
    if store is None:
        raise ValueError(f"the split {split!r} of {os.fspath(dataset_dir)} has no transition")
    return store


def _read_columns(
    dataset_dir: str | os.PathLike[str],
    split: str,
    transform: Transform | None,
    last_step: LastStep | None,
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each episode that has a transition, which a store can hold."""
    episodes = kept = 0
    for episode in read_episodes(dataset_dir, split):
        episodes += 1
        if last_step is not None:
            columns = transitions_of(episode, last_step)
        elif _has_last_step(episode):
            columns = transitions_of(episode, "keep")
            kept += 1
        else:
            columns = transitions_of(episode, "drop")
        if not len(columns["dones"]):
            continue
        if transform is not None:
            columns = transform(columns, episode)
        skeleton = skeleton_of(columns)
        for path, column in zip(paths_of(skeleton), leaves_of(skeleton, columns), strict=True):
            if isinstance(column, np.ndarray) and column.dtype.kind == "O":
                raise ValueError(
                    f"{'/'.join(map(str, path))} is text, or not of one shape, which a store "
                    "doesn't hold: leave it out, or turn it into numbers, by a transform"
                )
        yield columns
    if kept:
        _log.warning(
            "%s: the last step of %d of %d episodes has an action or a reward, and was kept as a "
            "transition of its observation onto itself; last_step='drop' leaves it out, and 'keep' "
            "says that it is meant",
            os.fspath(dataset_dir),
            kept,
            episodes,
        )


def _has_last_step(episode: dict[str, Any]) -> bool:
    """Whether the last step has an action or a reward that is not zero, or a text that isn't ""."""
    steps = episode["steps"]
    columns = [
        column for key in ("action", "reward") for column in _list_leaves(steps.get(key, ()))
    ]
    return any(np.any(value) for column in columns for value in column[-1:])


def _insert(store: DataStoreBase, columns: dict[str, Any]) -> int:
    if isinstance(store, TrajectoryBuffer) and "dones" in columns:
        columns = dict(columns)
        columns[END] = columns.pop("dones")
    batch = Batch.from_columns(columns)
    with store.lock:
        store.interrupt()  # whatever goes on in the store, this is another episode
        store.batch_insert(batch)
    return len(batch)


def _make_trajectory_buffer(
    capacity: int, example: dict[str, Any], options: dict[str, Any]
) -> DataStoreBase:
    example = {key: part for key, part in example.items() if key != "dones"}
    skeleton = skeleton_of(example)
    shapes = []
    for path, leaf in zip(paths_of(skeleton), leaves_of(skeleton, example), strict=True):
        name = "/".join(map(str, path))
        shapes.append(DataShape(name, leaf.shape, narrow(leaf.dtype)))
    store = TrajectoryBufferDataStore(capacity, shapes, **{"min_trajectory_length": 1, **options})
    store.register_sample_config("training", {key: LatestSampler() for key in example})
    return store


def _list_leaves(tree: Any) -> list[Array]:
    return leaves_of(skeleton_of(tree), tree)


def _map(tree: Any, function: Callable[[Array], Array]) -> Any:
    skeleton = skeleton_of(tree)
    return fill(skeleton, [function(leaf) for leaf in leaves_of(skeleton, tree)])
