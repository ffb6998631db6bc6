"""Replay and trajectory buffers of transitions, by gymnasium's spaces.

They are for either side: a learner registers one, and samples from it. Batches are flax's
FrozenDicts where flax has been imported, and dicts else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import edgeml.data
from agentlace.data.sampler import LatestSampler
from agentlace.data.trajectory_buffer import DataShape, TrajectoryBuffer
from agentlace.internal.items import add_key
from edgeml.data import Batch, Prefetch, transition_example

__all__ = [
    "MemoryEfficientReplayBufferDataStore",
    "ReplayBufferDataStore",
    "TrajectoryBufferDataStore",
    "make_default_trajectory_buffer",
]


class ReplayBufferDataStore(edgeml.data.ReplayBuffer):
    """The newest transitions; see `edgeml.data.ReplayBufferDataStore`.

    Large observations are kept once, and so are frames that stacks have in common. What an item
    has beyond the keys there is ignored; without ``dones`` its ``masks`` tell.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them.
        action_space: the same.
        capacity: how many transitions are held at most.
        rlds_logger: an `edgeml.data.rlds.RLDSLogger`, or a function, that is given each transition.
        include_next_actions: whether an item has ``next_actions`` and ``next_intvn``.
        include_label: ... ``labels``.
        include_grasp_penalty: ... ``grasp_penalty``.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        capacity: int,
        rlds_logger: Any = None,
        *,
        include_next_actions: bool = False,
        include_label: bool = False,
        include_grasp_penalty: bool = False,
    ) -> None:
        example = transition_example(observation_space, action_space)
        if include_next_actions:
            example |= {"next_actions": example["actions"], "next_intvn": np.False_}
        if include_label:
            example["labels"] = np.int64(0)
        if include_grasp_penalty:
            example["grasp_penalty"] = np.float32(0)
        super().__init__(capacity, example=example, ignore_unknown=True)
        self._rlds_logger = rlds_logger

    def insert(self, data: Any, lane: Any = None) -> None:
        """Insert a copy of one transition; the lane is one of `edgeml.data.ReplayBuffer`'s."""
        if isinstance(data, dict) and "dones" not in data and "masks" in data:
            data = {**data, "dones": not data["masks"]}
        with self.lock:
            super().insert(data, lane)
            if self._rlds_logger is not None:
                self._rlds_logger(data)

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Any = None) -> None:
        """Insert copies of transitions in one step."""
        batch = add_key(batch, "dones", lambda part, _: part["masks"] == 0)
        with self.lock:
            super().batch_insert(batch, lane)
            if self._rlds_logger is not None:
                for item in batch:
                    self._rlds_logger(item)

    def sample(  # type: ignore[override]
        self,
        batch_size: int,
        keys: Iterable[str] | None = None,
        indx: None = None,
        pack_obs_and_next_obs: bool = False,
    ) -> Any:
        """Draw a batch of transitions, uniformly and with replacement.

        Args:
            batch_size: how many.
            keys: an item's outermost keys that are wanted (default: all).
            indx: transitions can't be named; None.
            pack_obs_and_next_obs: see `edgeml.data.ReplayBuffer.sample`.

        Raises:
            NotImplementedError: ``indx`` was given.
            ValueError: there is nothing to be drawn.
        """
        if indx is not None:
            raise NotImplementedError("transitions can't be named: leave indx out")
        batch = super().sample(batch_size, keys=keys, pack_obs_and_next_obs=pack_obs_and_next_obs)
        flax = sys.modules.get("flax.core.frozen_dict")
        return batch if flax is None else flax.freeze(batch)

    def get_iterator(
        self,
        queue_size: int = 2,
        sample_args: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> Prefetch[Any]:
        """Return an endless iterator of batches, drawn ahead and put on a device.

        Args:
            queue_size: how many are kept ready.
            sample_args: for `sample`, ``batch_size`` among them.
            device: JAX's, or a sharding (default: JAX's default device).
        """
        if device is None:
            import jax

            device = jax.devices()[0]
        return super().get_iterator(queue_size, sample_args, device)


class MemoryEfficientReplayBufferDataStore(ReplayBufferDataStore):
    """The same, by the name and arguments of SERL's.

    Args:
        observation_space: see `ReplayBufferDataStore`.
        action_space: the same.
        capacity: the same.
        image_keys: of the observations that are stacks of frames, which is seen without them, too.
        rlds_logger: see `ReplayBufferDataStore`.
        options: ``include_next_actions`` and the like.

    Raises:
        KeyError: there is no such observation.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        capacity: int,
        image_keys: Iterable[str] = ("image",),
        rlds_logger: Any = None,
        **options: bool,
    ) -> None:
        for key in image_keys:
            observation_space[key]
        super().__init__(observation_space, action_space, capacity, rlds_logger, **options)


class TrajectoryBufferDataStore(TrajectoryBuffer):
    """The same as `TrajectoryBuffer`, whose arguments come in another order.

    Args:
        capacity: see there, as for all others.
        rlds_logger: an `edgeml.data.rlds.RLDSLogger`, or a function that is given each item, and
            whether its trajectory ends there.
    """

    def __init__(
        self,
        capacity: int,
        data_shapes: Sequence[Any],
        device: Any = None,
        seed: int = 0,
        min_trajectory_length: int = 2,
        rlds_logger: Any = None,
    ) -> None:
        super().__init__(
            capacity, data_shapes, seed, min_trajectory_length, device, rlds_logger=rlds_logger
        )


def make_default_trajectory_buffer(
    observation_space: Any,
    action_space: Any,
    capacity: int,
    device: Any = None,
    rlds_logger: Any = None,
) -> TrajectoryBufferDataStore:
    """Make a store of transitions, to be sampled as ``"training"``.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, and a Dict of them.
        action_space: the same.
        capacity: how many are held at most.
        device: see `TrajectoryBuffer`.
        rlds_logger: see `TrajectoryBufferDataStore`.
    """
    example = transition_example(observation_space, action_space)
    del example["dones"]
    # Each item is a transition by itself, so that even a trajectory of one is of use.
    store = TrajectoryBufferDataStore(
        capacity, _shapes_of(example), device, min_trajectory_length=1, rlds_logger=rlds_logger
    )
    store.register_sample_config("training", {key: LatestSampler() for key in example})
    return store


def _shapes_of(example: Mapping[str, Any], path: str = "") -> list[DataShape]:
    shapes = []
    for key, part in example.items():
        if isinstance(part, Mapping):
            shapes += _shapes_of(part, f"{path}{key}/")
        else:
            shapes.append(DataShape(f"{path}{key}", np.shape(part), part.dtype))
    return shapes
