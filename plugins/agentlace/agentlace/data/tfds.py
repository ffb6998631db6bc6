"""RLDS datasets, put into stores; without TensorFlow where they lie in a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agentlace.data.data_store import QueuedDataStore
from agentlace.data.jaxrl_data_store import ReplayBufferDataStore, make_default_trajectory_buffer
from edgeml.data.rlds import read_episodes, transitions_of

__all__ = ["make_datastore", "populate_datastore"]

DataTransformFunction = Callable[[dict[str, Any], dict[str, Any]], "dict[str, Any] | None"]

_DONE = {"with_dones": "dones", "trajectory_buffer": "end_of_trajectory"}
_KEPT = {"observation", "action", "reward", "is_terminal", "is_last"}


def make_datastore(
    dataset_dir: str | os.PathLike[str],
    capacity: int,
    type: str = "replay_buffer",
    data_transform: DataTransformFunction | None = None,
) -> Any:
    """Make a store for the transitions of a dataset, all of its splits, and insert them.

    Args:
        dataset_dir: where it lies.
        capacity: of the store.
        type: "replay_buffer", "trajectory_buffer" or "queued_datastore".
        data_transform: see `populate_datastore`.

    Raises:
        ValueError: no such type, or nothing in the dataset.
        FileNotFoundError, edgeml.Malformed: there is none, or it is damaged.
    """
    if type == "queued_datastore":
        return populate_datastore(QueuedDataStore(capacity), dataset_dir, type, data_transform)
    makers: dict[str, Callable[..., Any]] = {
        "replay_buffer": ReplayBufferDataStore,
        "trajectory_buffer": make_default_trajectory_buffer,
    }
    if type not in makers:
        raise ValueError(f"type is one of {[*makers, 'queued_datastore']}, got {type!r}")
    first = next(_read(dataset_dir), None)
    if first is None:
        raise ValueError(f"{os.fspath(dataset_dir)} has no episode")
    steps = first["steps"]
    store = makers[type](_space_of(steps["observation"]), _space_of(steps["action"]), capacity)
    return populate_datastore(store, dataset_dir, type, data_transform)


def populate_datastore(
    datastore: Any,
    dataset: Any,
    type: str | None = None,
    data_transform: DataTransformFunction | None = None,
) -> Any:
    """Insert the transitions of a dataset into a store, and return that.

    An episode's last step, whose action and reward usually mean nothing, is one of them: of its
    observation onto itself.

    Args:
        datastore: whatever has an `insert`.
        dataset: of episodes: a `tf.data.Dataset` that tensorflow_datasets made, or the directory of
            one that lies there.
        type: "with_dones" or "trajectory_buffer" for transitions that have ``dones``, or
            ``end_of_trajectory``.
        data_transform: ``data_transform(transition, metadata)``, which returns what to insert, or
            None for nothing. The metadata is ``step``, from 0, ``step_size``, which is how many
            there are, and what else the step has.
    """
    for episode in _read(dataset):
        steps = episode["steps"]
        columns = transitions_of(episode, "keep")
        done = columns.pop("dones")
        if type in _DONE:
            columns[_DONE[type]] = done
        rest = {key: column for key, column in steps.items() if key not in _KEPT}
        for i in range(len(done)):
            data = _take(columns, i)
            if data_transform is not None:
                metadata = {"step": i, "step_size": len(done), **_take(rest, i)}
                data = data_transform(data, metadata)
            if data is not None:
                datastore.insert(data)
    return datastore


def _read(dataset: Any) -> Iterator[dict[str, Any]]:
    """The episodes, each a dict of columns."""
    if isinstance(dataset, (str, os.PathLike)):
        info = json.loads((Path(dataset) / "dataset_info.json").read_bytes())
        for split in info["splits"]:
            yield from read_episodes(dataset, split["name"])
        return
    for episode in dataset:
        steps = [_plain(step) for step in episode["steps"]]
        if steps:
            yield {"steps": _stack(steps)}


def _plain(value: Any) -> Any:
    """What TensorFlow has as tensors, as arrays and texts."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    value = value.numpy() if hasattr(value, "numpy") else value
    return value.decode() if isinstance(value, bytes) else value


def _stack(steps: list[Any]) -> Any:
    if isinstance(steps[0], dict):
        return {key: _stack([step[key] for step in steps]) for key in steps[0]}
    return np.array(steps, object if isinstance(steps[0], str) else None)


def _take(tree: Any, i: int) -> Any:
    if isinstance(tree, dict):
        return {key: _take(part, i) for key, part in tree.items()}
    value = tree[i]
    return value.copy() if isinstance(value, np.ndarray) else value


def _space_of(columns: Any) -> Any:
    if isinstance(columns, dict):
        return SimpleNamespace(spaces={key: _space_of(part) for key, part in columns.items()})
    return SimpleNamespace(shape=columns.shape[1:], dtype=columns.dtype)
