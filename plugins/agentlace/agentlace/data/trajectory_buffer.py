"""Trajectories, from which steps and sequences are drawn; on a device, by JAX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

import edgeml.data
from agentlace.internal.items import add_key
from edgeml.data import Batch, DataShape, checkpoint

__all__ = ["DataShape", "TrajectoryBuffer"]

_END = "end_of_trajectory"
_NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32"}  # as JAX has it


class TrajectoryBuffer(edgeml.data.TrajectoryBufferDataStore):
    """A ring of the newest steps with the trajectories that they belong to.

    See `edgeml.data.TrajectoryBuffer`. What an item has beyond the data shapes is ignored, but for
    ``end_of_trajectory``, which says what the argument of `insert` does.

    Args:
        capacity: how many steps are held at most.
        data_shapes: what a step consists of; 64 bits are kept as 32.
        seed: of all that is random in `sample`.
        min_trajectory_length: a trajectory of which fewer steps are held is not sampled.
        device: a `jax.Device` or a sharding (default: JAX's default device).
        use_jax: has no effect; it is used.
        rlds_logger: see `edgeml.data.TrajectoryBufferDataStore`.
    """

    def __init__(
        self,
        capacity: int,
        data_shapes: Sequence[Any],
        seed: int = 0,
        min_trajectory_length: int = 2,
        device: Any = None,
        use_jax: bool = False,
        *,
        rlds_logger: Any = None,
    ) -> None:
        del use_jax
        shapes = [
            DataShape(name, tuple(shape), _NARROW.get(np.dtype(dtype).name, dtype))
            for name, shape, dtype in data_shapes
            if name != _END
        ]
        super().__init__(
            capacity,
            shapes,
            min_trajectory_length,
            seed,
            device,
            rlds_logger,
            ignore_unknown=True,
        )
        self._made_with = {
            "capacity": capacity,
            "data_shapes": [(name, shape, np.dtype(dtype).name) for name, shape, dtype in shapes],
            "min_trajectory_length": min_trajectory_length,
        }

    def insert(self, data: Any, end_of_trajectory: bool = False, lane: Any = None) -> None:
        """Insert a copy of one step.

        Args:
            data: a dict of all data shapes.
            end_of_trajectory: this is the last step of its trajectory; `end_trajectory` does as
                well.
            lane: see `edgeml.data.TrajectoryBuffer.insert`.
        """
        super().insert({_END: False, **data}, end_of_trajectory, lane)

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Any = None) -> None:
        """Insert copies of items in one step."""
        batch = add_key(batch, _END, lambda _, shape: np.zeros(shape, bool)[()])
        super().batch_insert(batch, lane)

    def sample(
        self, sampler_name: str, batch_size: int, force_indices: Any = None
    ) -> tuple[Any, Any]:
        """Draw a batch; see `edgeml.data.TrajectoryBuffer.sample`.

        Args:
            sampler_name: under which a sample config was registered.
            batch_size: how many steps are drawn.
            force_indices: of the steps to be used in their place, counted from 0.
        """
        if force_indices is None:
            return super().sample(sampler_name, batch_size)
        ids = np.asarray(force_indices) + 1
        return super().sample(sampler_name, len(ids), ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save everything but the sample configs to a file, as `edgeml.data.checkpoint` does."""
        checkpoint.save(path, self._made_with, {"trajectories": self})

    @classmethod
    def load(  # type: ignore[override]
        cls, path: str | os.PathLike[str], device: Any = None, use_jax: bool = False
    ) -> TrajectoryBuffer:
        """Make a buffer of what `save` wrote; register the sample configs anew.

        Raises:
            FileNotFoundError: there is no such file.
            edgeml.Malformed: it is damaged, or something else.
        """
        made = TrajectoryBuffer(device=device, use_jax=use_jax, **checkpoint.load(path))
        checkpoint.load(path, {"trajectories": made})
        return made
