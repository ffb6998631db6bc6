"""Trajectory buffers for either end of a trainer's client and server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from edgeml.data.batch import Batch
from edgeml.data.lanes import Lane, Numbers
from edgeml.data.samplers import LatestSampler
from edgeml.data.shapes import END, DataShape, list_shapes
from edgeml.data.trajectory import TrajectoryBuffer
from edgeml.data.tree import fill

__all__ = ["TrajectoryBufferDataStore", "make_default_trajectory_buffer"]

StepLogger: TypeAlias = Callable[[Any, bool], None]


class TrajectoryBufferDataStore(TrajectoryBuffer):
    """A `TrajectoryBuffer` for either end of a trainer's client and server.

    What is inserted is a whole item, with the key ``end_of_trajectory``, so that none can be
    forgotten; the same items come out of `get_latest_data`.

    Args:
        capacity: see `TrajectoryBuffer`, as for all others.
        rlds_logger: is called as ``rlds_logger(item, end_of_trajectory)`` with each item as it is
            inserted, and as ``rlds_logger(None, True)`` where a trajectory ended, or was
            interrupted, after its last item. Its arrays are its own. Where it raises, nothing is
            inserted, though some of a batch may be logged. Of several lanes' trajectories that go
            on at once it is given pieces: another one's item ends the one under way.
        ignore_unknown: see `TrajectoryBuffer`.
    """

    def __init__(
        self,
        capacity: int,
        data_shapes: Sequence[DataShape],
        min_trajectory_length: int = 2,
        seed: int = 0,
        device: Any = None,
        rlds_logger: StepLogger | None = None,
        *,
        ignore_unknown: bool = False,
    ) -> None:
        super().__init__(
            capacity,
            data_shapes,
            min_trajectory_length,
            seed,
            device,
            ignore_unknown=ignore_unknown,
        )
        self._rlds_logger = rlds_logger
        self._logged: int | None = None  # the lane whose trajectory goes on in the log

    def insert(self, item: Any, end_of_trajectory: bool = False, lane: Lane = None) -> None:
        """Insert a copy of one item.

        Args:
            item: a dict of all data shapes and ``end_of_trajectory``.
            end_of_trajectory: True is the same as if the item said so.
            lane: see `TrajectoryBuffer.insert`.
        """
        if end_of_trajectory and isinstance(item, dict):
            item = {**item, END: True}
        self._insert(item, lane)

    def end_trajectory(self, lane: Lane = None) -> None:
        """End the trajectory that goes on, as `TrajectoryBuffer.end_trajectory` does."""
        with self.lock:
            if self._logged == self._lanes.find(lane):
                self._log_end()
            super().end_trajectory(lane)

    def interrupt(self, lane: Lane = None) -> None:
        """End the trajectories that go on, as `TrajectoryBuffer.interrupt` does."""
        with self.lock:
            if lane is None or self._logged in self._lanes.numbers_of(lane):
                self._log_end()
            super().interrupt(lane)

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items, as `TrajectoryBuffer.reset` does."""
        with self.lock:
            self._log_end()
            super().reset(next_id)

    def _insert(self, item: Any, lane: Lane) -> None:
        with self.lock:
            if self._rlds_logger:
                self._log(item, 0 if lane is None else self._lanes.find(lane))
            super()._insert(item, lane)

    def _insert_batch(self, batch: Batch, numbers: Numbers, cuts: Sequence[int]) -> None:
        if self._rlds_logger and batch:
            self._schema.fit_batch(batch)  # or some would be logged before another is refused
            all_numbers = np.broadcast_to(numbers, len(batch)).tolist()
            for i, (item, number) in enumerate(zip(batch, all_numbers, strict=True)):
                if i in cuts:
                    self._log_end()
                self._log(item, number)
        super()._insert_batch(batch, numbers, cuts)

    def _log(self, item: Any, number: int) -> None:
        assert self._rlds_logger
        leaves = [np.array(leaf)[()] for leaf in self._schema.fit(item)]
        if self._logged != number:  # of several that go on, the log has pieces
            self._log_end()
        ended = bool(leaves[-1])
        self._rlds_logger(fill(self._schema.skeleton, leaves), ended)
        self._logged = None if ended else number

    def _log_end(self) -> None:
        if self._rlds_logger and self._logged is not None:
            self._rlds_logger(None, True)
        self._logged = None


def make_default_trajectory_buffer(
    observation_space: Any,
    action_space: Any,
    capacity: int,
    device: Any = None,
    rlds_logger: StepLogger | None = None,
    *,
    seed: int = 0,
    ignore_unknown: bool = False,
) -> TrajectoryBufferDataStore:
    """Make a store of the transitions of off-policy learning, to be sampled as ``"training"``.

    An item is what `ReplayBufferDataStore` takes, but for the last key:

    ==================  ======================  =================================================
    observations        like observation_space
    next_observations   like observation_space
    actions             like action_space
    rewards             () float32
    masks               () float32              0 where the episode terminated, else 1
    end_of_trajectory   () bool                 the episode ended, terminated or truncated
    ==================  ======================  =================================================

    ``sample("training", n)`` gives all but the last, of any step that is in. Register other
    configs for sequences and goals. float64 and int64, which gymnasium's spaces often have, are
    kept as float32 and int32, as JAX computes with them; an integer beyond these is refused.

    Args:
        observation_space: of gymnasium, or like it: Box, Discrete, MultiDiscrete, MultiBinary, and
            a Dict of them, nested as you like.
        action_space: the same.
        capacity: how many transitions are held at most. All of their memory is set aside on the
            device at once, both observations of each.
        device: see `TrajectoryBuffer`.
        rlds_logger: see `TrajectoryBufferDataStore`.
        seed: of all that is random in `sample`.
        ignore_unknown: see `TrajectoryBuffer`.

    Raises:
        TypeError: a space whose samples have no fixed shape and dtype, or a Tuple.
    """
    data_shapes = [
        *list_shapes("observations", observation_space),
        *list_shapes("next_observations", observation_space),
        *list_shapes("actions", action_space),
        DataShape("rewards"),
        DataShape("masks"),
    ]
    # Each item is a transition by itself, so that even a trajectory of one is of use.
    store = TrajectoryBufferDataStore(
        capacity, data_shapes, 1, seed, device, rlds_logger, ignore_unknown=ignore_unknown
    )
    keys = ("observations", "next_observations", "actions", "rewards", "masks")
    store.register_sample_config("training", {key: LatestSampler() for key in keys})
    return store
