"""Trajectory buffers for JAX: rows on a device, from which steps, sequences and goals are drawn.

The work is divided so that a step costs little on either side. The host knows where trajectories
begin (`edgeml.data.spans`) and draws the steps; the device has the rows (`edgeml.data.device`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeml.data import checkpoint
from edgeml.data.base import DataStoreBase, check_random_state, check_state
from edgeml.data.batch import Batch
from edgeml.data.columns import equal_bytes
from edgeml.data.device import DeviceRing, Part, SampleConfig, Transform
from edgeml.data.lanes import Lane, Numbers, slot_of
from edgeml.data.plans import check_size
from edgeml.data.samplers import Sampler
from edgeml.data.schema import Schema
from edgeml.data.shapes import END, DataShape, make_example
from edgeml.data.spans import Ranges, Spans
from edgeml.data.strands import Strands
from edgeml.data.tree import Array, fill, paths_of
from edgeml.extras import load_jax

if TYPE_CHECKING:
    pass

__all__ = ["TrajectoryBuffer"]

_log = logging.getLogger(__name__)

_LARGEST = 1 << 30  # rows; an index and an offset still add up to an int32


@dataclass
class _Lane:
    """What goes on in a lane.

    Attributes:
        number: of the store's lane.
        goes_on: whether the next step of it goes on with its trajectory.
        last: the id of its newest step; 0 for none.
        led_to: that step's next observation.
        sums: of each priority, over the trajectory that goes on.
        trajectory: of the newest step, as `Strands` number it.
    """

    number: int
    goes_on: bool = False
    last: int = 0
    led_to: list[bytes] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    trajectory: int = 0


class TrajectoryBuffer(DataStoreBase):
    """A ring of the newest steps, kept on a device with the trajectories that they belong to.

    Steps come in their order. A trajectory ends with a step that says so, with `end_trajectory`
    or with `interrupt`, and the next step begins another. So does one whose ``observations`` are
    not, byte for byte, the ``next_observations`` of the one before, if there are such. What a
    sampler gives never mixes two. As the ring goes round, the oldest trajectory loses its first
    steps and is a shorter one.

    An item (as `get_latest_data` gives and `batch_insert` takes it) is a dict of all data shapes,
    nested as their names say, and the key ``end_of_trajectory``, a bool. A part of another dtype
    is converted where that keeps what it means, as in `ReplayBuffer`.

    ::

        buffer = TrajectoryBuffer(100_000, [
            DataShape("observations", (17,)), DataShape("actions", (6,)), DataShape("rewards"),
        ])
        buffer.register_sample_config("training", {
            "observations": LatestSampler(),
            "actions": SequenceSampler(0, 16),
            "goals": FutureSampler("exponential", lambda_=0.02, source="observations"),
        })
        buffer.insert({"observations": obs, "actions": action, "rewards": 0.0})
        buffer.end_trajectory()
        batch, mask = buffer.sample("training", 256)

    Args:
        capacity: how many steps are held at most; up to 2**30.
        data_shapes: what a step consists of.
        min_trajectory_length: a trajectory of which fewer steps are held is not sampled, whether
            it goes on (then it will be, later) or has ended (`short_trajectories` counts these).
            Else steps can be sampled as soon as they are in.
        seed: of all that is random in `sample`.
        device: `jax.Device` or `jax.sharding.Sharding` that the steps are kept on (default:
            JAX's default device).
        ignore_unknown: leave out what items have under keys beyond the schema's, such as ``infos``
            (default: such items are refused).

    Attributes:
        breaks: how many steps began a trajectory only because their observations were others.

    Raises:
        ImportError: JAX is not installed.
        ValueError: no capacity, or data shapes that can't be; and by the inserts, for an item
            that doesn't fit: the store is then as it was.
    """

    def __init__(
        self,
        capacity: int,
        data_shapes: Sequence[DataShape],
        min_trajectory_length: int = 2,
        seed: int = 0,
        device: Any = None,
        *,
        ignore_unknown: bool = False,
    ) -> None:
        super().__init__(capacity)
        if capacity > _LARGEST:
            raise ValueError(f"capacity must be at most {_LARGEST}, got {capacity}")
        if min_trajectory_length < 1:
            raise ValueError(
                f"min_trajectory_length must be at least 1, got {min_trajectory_length}"
            )
        jnp = load_jax().numpy
        self._schema = Schema(make_example(data_shapes), ignore_unknown=ignore_unknown)
        paths = paths_of(self._schema.skeleton)[:-1]
        self._paths = {"/".join(path): path for path in paths}
        specs = list(zip(self._schema.shapes, self._schema.dtypes, strict=True))[:-1]
        self._specs = dict(zip(self._paths, specs, strict=True))
        if jnp.result_type(float) != np.float64:  # jax_enable_x64 isn't set
            for name, (_, dtype) in self._specs.items():
                if dtype.itemsize > (8 if dtype.kind == "c" else 4):
                    raise ValueError(
                        f"{name} would lose half of its {dtype}: JAX keeps 32 bits. Ask for "
                        f"{dtype.kind}{dtype.itemsize // 2}, or set jax_enable_x64"
                    )
        self._rng = np.random.default_rng(seed)
        # `Spans` while no trajectory begins before the one before it is over, and else, from then
        # on, `Strands`.
        self._spans: Spans | Strands = Spans(capacity, Ranges(min_trajectory_length))
        self._lane = _Lane(0)  # with spans: that of the newest step
        self._lanes_by_slot: dict[int, _Lane] = {}  # with strands
        self._configs: dict[str, tuple[int, SampleConfig]] = {}
        self._ends = np.zeros(capacity, np.bool_)  # what items say under end_of_trajectory
        self._priorities: list[str] = []  # of which running sums are kept
        self._rows = DeviceRing(capacity, self._specs, device)
        self._handed_out = 0  # the newest id that get_latest_data gave
        self._warned = False
        # Positions of the parts of observations, and of the same parts of the next ones.
        self._pairs = _find_pairs(self._specs)
        self.breaks = 0
        self._told_of_breaks = False

    def __len__(self) -> int:
        with self.lock:
            return self._spans.next_id - self._spans.oldest_id

    @property
    def short_trajectories(self) -> int:
        """How many trajectories have ended, and are too short to be sampled, of those held."""
        with self.lock:
            if isinstance(self._spans, Spans):
                return self._spans.short
            lanes = self._lanes_by_slot.values()
            return self._spans.count_short({lane.trajectory for lane in lanes if lane.goes_on})

    def latest_data_id(self) -> int:
        """Return the id of the newest step ever inserted; 0 where there was none."""
        return self._spans.next_id - 1

    # What comes in --------------------------------------------------------------------------

    def insert(self, data: Any, end_of_trajectory: bool = False, lane: Lane = None) -> None:
        """Insert a copy of one step.

        Args:
            data: a dict of all data shapes, without the key ``end_of_trajectory``.
            end_of_trajectory: this is the last step of its trajectory.
            lane: which of several environments' it is, a text or a number (default: all steps are
                of one). It goes on with that lane's trajectory.
        """
        if isinstance(data, dict):
            if END in data:
                raise ValueError(f"{END} is an argument here, not a key")
            data = {**data, END: end_of_trajectory}
        self._insert(data, lane)

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Lane = None) -> None:
        """Insert copies of items in one step; the class tells what they are."""
        batch = batch if isinstance(batch, Batch) else Batch.of(batch)
        with self.lock:
            self._insert_batch(batch, *self.number_lanes(batch, lane))
            if lane is not None and batch.cuts:
                self._end_closed()

    def end_trajectory(self, lane: Lane = None) -> None:
        """End the trajectory that goes on, if any: its last item becomes an ``end_of_trajectory``.

        Who has had that item from `get_latest_data` before, such as a trainer's server, doesn't
        learn of it. So where you can, say it as you insert the last step.

        Args:
            lane: whose, as `insert` was told.
        """
        with self.lock:
            ending = self._find_lane(self._lanes.find(lane))
            if ending is None or not ending.goes_on:
                return
            if ending.last <= self._handed_out and not self._warned:
                self._warned = True
                _log.warning(
                    "a trajectory was ended after its last step had been handed out (uploaded, "
                    "say), and who has it takes the trajectory to go on: insert the last step with "
                    "end_of_trajectory=True"
                )
            if ending.last >= self._spans.oldest_id:
                self._ends[(ending.last - 1) % self._capacity] = True
            self._end(ending)

    def interrupt(self, lane: Lane = None) -> None:
        """End the trajectories that go on, if any, without a change to any item.

        Args:
            lane: whose (default: all lanes').
        """
        with self.lock:
            if lane is None:
                super().interrupt()
                self._end_all()
                return
            for number in self._lanes.close(lane):
                ending = self._find_lane(number)
                if ending is not None:
                    self._end(ending)

    def reset(self, next_id: int | None = None) -> None:
        """Forget all steps; see the base class.

        The sample configs stay, and so does the state of the random generator.
        """
        with self.lock:
            next_id = self.forget_cuts(next_id)
            self._spans = Spans(self._capacity, self._spans.ranges)
            self._spans.reset(next_id)
            self._lane, self._lanes_by_slot = _Lane(0), {}
            self._rows.reset(next_id)
            self._handed_out = next_id - 1

    def _insert(self, item: Any, lane: Lane) -> None:
        with self.lock:
            number = 0 if lane is None else self._lanes.find(lane)
            self._add(self._schema.fit(item), 1, (), number)
            if number or self._lanes.are_used:
                self.take_lanes(number, self._spans.next_id - 1, 1)

    def _insert_batch(self, batch: Batch, numbers: Numbers, cuts: Sequence[int]) -> None:
        if not batch:
            return
        if not isinstance(numbers, int) and (numbers == numbers[0]).all():
            numbers = int(numbers[0])
        columns = self._schema.fit_batch(batch)
        first_id = self._spans.next_id
        self._add(columns, len(batch), cuts, numbers)
        self.take_cuts(cuts, first_id)
        self.take_lanes(numbers, first_id, len(batch))

    def _add(self, leaves: Sequence[Any], n: int, cuts: Sequence[int], numbers: Numbers) -> None:
        """Take in what fits: one item's leaves, or n with a leading axis."""
        spans = self._spans
        if isinstance(spans, Spans):
            lane = self._lane
            if isinstance(numbers, int) and (numbers == lane.number or not lane.goes_on):
                self._lane = lane = lane if numbers == lane.number else _Lane(numbers)
                self._add_to_spans(spans, lane, leaves, n, cuts)
                return
            self._spans = spans = Strands(spans)
            lane.trajectory = spans.newest
            self._lanes_by_slot = {slot_of(lane.number): lane}
        columns = [
            np.asarray(leaf).reshape(n, *shape)
            for leaf, shape in zip(leaves, self._schema.shapes, strict=True)
        ]
        self._add_to_strands(spans, columns, n, cuts, np.broadcast_to(numbers, n))

    def _add_to_spans(
        self, spans: Spans, lane: _Lane, leaves: Sequence[Any], n: int, cuts: Sequence[int]
    ) -> None:
        """Take in steps of the lane that goes on, or of any where none does."""
        first_id = spans.next_id
        firsts: Sequence[int] | Array
        if n == 1:
            firsts = (first_id + 1,) if leaves[-1] else ()
        else:
            firsts = first_id + 1 + np.flatnonzero(leaves[-1])
        if cuts:
            firsts = np.union1d(firsts, np.add(cuts, first_id))
        broken = self._find_breaks(lane, leaves, n)
        if broken:
            known = {int(first) for first in firsts}
            firsts = sorted(known | broken)
            broken -= known
        sums = {}
        if self._priorities:
            columns = dict(zip(self._specs, leaves, strict=False))
            for name in self._priorities:
                before = lane.sums[name] if lane.goes_on else 0.0
                positions = np.subtract(firsts, first_id)
                sums[name] = _add_up_runs(name, columns[name], before, positions)
        self._store(leaves, sums, n)
        spans.extend(n, firsts)
        self._count_breaks(len(broken))
        lane.goes_on = not (leaves[-1] if n == 1 else leaves[-1][-1])
        lane.last = spans.next_id - 1
        lane.led_to = [
            np.asarray(leaves[b] if n == 1 else leaves[b][-1]).tobytes() for _, b in self._pairs
        ]
        for name, values in sums.items():
            lane.sums[name] = float(values[-1])
        if sums and first_id // self._capacity < spans.next_id // self._capacity:
            self._forget_lost_sums()  # once a round

    def _add_to_strands(
        self, spans: Strands, leaves: list[Array], n: int, cuts: Sequence[int], numbers: Array
    ) -> None:
        """Take in steps of any lanes."""
        first_id = spans.next_id
        columns = dict(zip(self._specs, leaves, strict=False))
        ended = leaves[-1].astype(np.bool_)
        pieces = np.searchsorted(cuts, np.arange(n), "right")  # how many cuts there are up to each
        sums = {name: np.empty(n) for name in self._priorities}
        groups: list[tuple[_Lane, Array, Array]] = []  # of each lane its items, and what begins
        broken = 0
        order = np.argsort(numbers, kind="stable")
        for places in np.split(order, 1 + np.flatnonzero(np.diff(numbers[order]))):
            number = int(numbers[places[0]])
            lane = self._find_lane(number) or _Lane(number)
            begins = np.append(not lane.goes_on or pieces[places[0]] > 0, ended[places[:-1]])
            begins[1:] |= pieces[places[1:]] != pieces[places[:-1]]
            goes_on = np.ones(len(places), np.bool_)
            for (a, b), led_to in zip(self._pairs, lane.led_to or self._pairs, strict=True):
                goes_on[0] &= leaves[a][places[0]].tobytes() == led_to
                goes_on[1:] &= equal_bytes(leaves[b][places[:-1]], leaves[a][places[1:]])
            broken += int(np.count_nonzero(~goes_on & ~begins))
            begins |= ~goes_on
            for name in sums:
                before = lane.sums.get(name, 0.0)
                values = columns[name][places]
                sums[name][places] = _add_up_runs(name, values, before, np.flatnonzero(begins))
            groups.append((lane, places, begins))
        self._store(leaves, sums, n)
        if cuts:
            self._end_all()
        for lane, places, begins in groups:  # of those in one slot the newest comes last
            last = int(places[-1])
            lane.trajectory = spans.continue_with(begins, places, lane.trajectory)
            lane.goes_on = not ended[last] and pieces[last] == len(cuts)
            lane.last = first_id + last
            lane.led_to = [leaves[b][last].tobytes() for _, b in self._pairs]
            lane.sums = {name: float(values[last]) for name, values in sums.items()}
            self._lanes_by_slot[slot_of(lane.number)] = lane
        spans.extend(n)
        self._count_breaks(broken)
        if sums and first_id // self._capacity < spans.next_id // self._capacity:
            self._forget_lost_sums()  # once a round

    def _store(self, leaves: Sequence[Any], sums: dict[str, Array], n: int) -> None:
        """Put steps into the ring's rows."""
        first_id = self._spans.next_id
        self._rows.prepare(n)
        if n == 1:  # what several items take costs as much again
            self._ends[(first_id - 1) % self._capacity] = leaves[-1]
        else:
            self._ends[np.arange(first_id - 1, first_id - 1 + n) % self._capacity] = leaves[-1]
        self._rows.extend(leaves[:-1], sums, n)

    def _find_lane(self, number: int) -> _Lane | None:
        """What is known of a lane; None where there was no step of it, or it is over for long."""
        if isinstance(self._spans, Spans):
            lane: _Lane | None = self._lane
        else:
            lane = self._lanes_by_slot.get(slot_of(number))
        return lane if lane is not None and lane.number == number else None

    def _end(self, lane: _Lane) -> None:
        """Let the next step of a lane begin a trajectory."""
        lane.goes_on = False
        if isinstance(self._spans, Spans):
            self._spans.end()

    def _end_all(self) -> None:
        for lane in (self._lane, *self._lanes_by_slot.values()):
            self._end(lane)

    def _end_closed(self) -> None:
        """End what goes on in lanes in which nothing comes any more."""
        for lane in (self._lane, *self._lanes_by_slot.values()):
            if not self._lanes.is_open(lane.number):
                self._end(lane)

    def _find_breaks(self, lane: _Lane, leaves: Sequence[Any], n: int) -> set[int]:
        """Ids of new items whose observation is another than the one before led to."""
        found = set()
        for (a, b), led_to in zip(self._pairs, lane.led_to or self._pairs, strict=True):
            first = leaves[a] if n == 1 else leaves[a][0]
            if lane.goes_on and np.asarray(first).tobytes() != led_to:
                found.add(0)
            if n > 1:
                same = equal_bytes(leaves[b][:-1], leaves[a][1:])
                found |= {1 + int(i) for i in np.flatnonzero(~same)}
        return {self._spans.next_id + position for position in found}

    def _count_breaks(self, n: int) -> None:
        self.breaks += n
        if n and not self._told_of_breaks:
            self._told_of_breaks = True
            _log.warning(
                "a step does not begin with the observation that the one before it led to, and so "
                "begins a new trajectory (`breaks` counts such): where there are several "
                "environments, insert each one's steps with a lane= of its own"
            )

    def _forget_lost_sums(self) -> None:
        """Sum priorities up anew where one trajectory fills the ring, or goes on for longer.

        Else its sums would grow for ever, and float32 would not tell its steps apart.
        """
        spans = self._spans
        if isinstance(spans, Strands) or not spans.begins(spans.oldest_id, len(self)).any():
            for name in self._priorities:
                self._sum_up(name)

    # What goes out --------------------------------------------------------------------------

    def register_sample_config(
        self,
        name: str,
        samplers: Mapping[str, Sampler],
        sample_range: tuple[int, int] = (0, 1),
        transform: Transform | None = None,
    ) -> None:
        """Say what `sample` gives under a name; an earlier config of that name is replaced.

        Args:
            name: of the config.
            samplers: for each key of the batch, where it comes from. A sampler's ``source``, by
                default the key, is a data shape's name, or a dict of several (``"observations"``
                of ``"observations/image"`` and ``"observations/state"``), all from the same row.
            sample_range: (a, b): step i is drawn uniformly, with replacement, from all those for
                which steps i + a to i + b - 1, and i, are held and in one trajectory.
            transform: is given ``data`` and ``mask``, and returns what `sample` then does, two
                values. `jax.jit` traces it, once for each batch size.

        Raises:
            ValueError: there is no such source or priority, or a priority is not at least 0.
        """
        a, b = sample_range
        if a >= b:
            raise ValueError(f"the sample_range {sample_range} has no steps")
        if not samplers:
            raise ValueError("a batch without a sampler is empty")
        parts = []
        for key, sampler in samplers.items():
            source = tuple((key if sampler.source is None else sampler.source).split("/"))
            leaves = tuple(
                (path[len(source) :], leaf)
                for leaf, path in self._paths.items()
                if path[: len(source)] == source
            )
            if not leaves:
                raise ValueError(f"{key}: no data {'/'.join(source)!r}; there is {[*self._specs]}")
            parts.append(Part(key, sampler, leaves))
        with self.lock:
            for sampler in samplers.values():
                if sampler.priority is not None and sampler.priority not in self._priorities:
                    self._sum_up(sampler.priority)
                    self._priorities.append(sampler.priority)
            self._configs[name] = (
                self._spans.add_range((a, b)),
                SampleConfig(tuple(parts), transform),
            )

    def sample(
        self, name: str, batch_size: int, force_indices: Sequence[int] | Array | None = None
    ) -> tuple[Any, Any]:
        """Draw a batch as a sample config says, of all steps that are in.

        Args:
            name: under which it was registered.
            batch_size: how many steps are drawn, B. Each new size is compiled first.
            force_indices: ids of the steps to be used rather than drawn, shape (B,).

        Returns:
            ``data, mask``, two dicts with the samplers' keys, of arrays on the device: the data,
            (B, ...) or (B, T, ...), a dict where the source is one; and bools, (B,) or (B, T),
            True where it is what the sampler asked for, and not a stand-in because the trajectory
            has no such step.

        Raises:
            ValueError: no such config, no steps that could be drawn, or an id of ``force_indices``
                that isn't held or is not to be sampled with this config.
        """
        batch_size = check_size(batch_size)
        with self.lock:
            if name not in self._configs:
                raise ValueError(f"no sample config {name!r}; there is {[*self._configs]}")
            range_number, config = self._configs[name]
            if force_indices is None:
                at = self._spans.draw(range_number, batch_size, self._rng)
                if at is None:
                    raise ValueError(
                        f"no step can be sampled: {len(self)} are held, and none in a trajectory "
                        f"that is long enough for {name!r}"
                    )
            else:
                ids = np.asarray(force_indices)
                if ids.shape != (batch_size,) or ids.dtype.kind not in "iu":
                    raise ValueError(
                        f"force_indices: expected {batch_size} ids, got shape {ids.shape} "
                        f"{ids.dtype}"
                    )
                at = self._spans.locate(range_number, ids.astype(np.int64))
            words = self._rng.integers(1 << 32, size=2, dtype=np.uint32)
            rows = self._spans.rows if isinstance(self._spans, Strands) else None
            data, mask = self._rows.draw(at.astype(np.int32), words, config, rows)
            return data, mask

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class."""
        with self.lock:
            batch = self._copy_items(from_id, limit)
            self._handed_out = max(self._handed_out, batch.first_id + len(batch) - 1)
            return batch

    def _copy_items(self, from_id: int, limit: int | None) -> Batch:
        first = max(from_id + 1, self._spans.oldest_id)
        n = self._spans.next_id - first
        if limit is not None:
            n = min(n, limit)
        if n <= 0:
            return Batch.of([], first)
        leaves = [*self._rows.read(first, n, self._specs, self.allocate).values()]
        leaves.append(self._ends[np.arange(first - 1, first - 1 + n) % self._capacity])
        batch = Batch.from_columns(fill(self._schema.skeleton, leaves), first)
        return batch.cut(self.cuts_within(first, n)).in_lanes(self.lanes_within(first, n))

    def _sum_up(self, name: str) -> None:
        """Begin to keep the running sums of a priority."""
        shape, dtype = self._specs.get(name, ((), np.dtype(np.void)))
        if shape or dtype.kind == "c" or name not in self._specs:
            raise ValueError(
                f"a priority is one real number of each step, and {name!r} isn't; "
                f"there is {[*self._specs]}"
            )
        first, n = self._spans.oldest_id, len(self)
        sums = np.zeros(n)
        if n:
            values = self._rows.read(first, n, [name], self.allocate)[name]
            if isinstance(self._spans, Spans):
                places, begun = np.arange(n), np.flatnonzero(self._spans.begins(first, n))
            else:
                places, begun = self._spans.sort_held()
            sums[places] = _add_up_runs(name, values[places], 0.0, begun)
        self._rows.add_sums(name, first, sums)
        for lane in (self._lane, *self._lanes_by_slot.values()):
            lane.sums[name] = float(sums[lane.last - first]) if lane.last >= first else 0.0

    # What checkpoints need ------------------------------------------------------------------

    def state(self) -> Any:
        """Return what the store knows beyond its items."""
        with self.lock:
            rng = self._rng.bit_generator.state
            return {**super().state(), "rng": rng, "breaks": self.breaks}

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave."""
        with self.lock:
            if "lanes" in state:
                self._lanes.set_state(state["lanes"])
                self._end_closed()
            if state["interrupted"]:
                TrajectoryBuffer.interrupt(self)  # and log nothing
            self._rng.bit_generator.state = state["rng"]
            self.breaks = int(state.get("breaks", 0))  # not those of loading

    def check_restore(self, parts: Iterable[tuple[Batch, Any]], state: Any) -> None:
        """See the base class."""
        with self.lock:
            totals = dict.fromkeys(self._priorities, 0.0)
            for batch, _ in parts:
                columns = dict(zip(self._specs, self._schema.fit_batch(batch), strict=False))
                for name, total in totals.items():  # as if they were one trajectory
                    totals[name] = float(_add_up_runs(name, columns[name], total, ())[-1])
            check_state(state)
            check_random_state(self._rng, state["rng"])

    def dump(self, from_id: int, *, limit: int | None = None) -> tuple[Batch, Any]:
        """Return items as `get_latest_data` does, but hand out none."""
        with self.lock:
            return self._copy_items(from_id, limit), None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save everything but the sample configs to a file, as `edgeml.data.checkpoint` does."""
        checkpoint.save(path, stores={"trajectories": self})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up what `save` wrote, in place of what is held.

        Raises:
            FileNotFoundError: there is no such file.
            Malformed: it is damaged, or something else.
            ValueError: the data shapes are not those of the buffer that was saved.
        """
        checkpoint.load(path, {"trajectories": self})

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave, and log nothing."""
        numbers = 0 if batch.lanes is None else batch.lanes
        with self.lock:
            TrajectoryBuffer._insert_batch(self, batch, numbers, batch.cuts)


def _find_pairs(specs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Positions of the parts of ``observations``, each with that of ``next_observations``."""
    names = list(specs)
    now = [name for name in names if name.split("/")[0] == "observations"]
    following = {name for name in names if name.split("/")[0] == "next_observations"}
    if following != {f"next_{name}" for name in now}:
        return []
    pairs = [(name, f"next_{name}") for name in now]
    if any(specs[a] != specs[b] for a, b in pairs):
        return []
    return [(names.index(a), names.index(b)) for a, b in pairs]


def _add_up_runs(name: str, values: Any, before: float, firsts: Any) -> Array:
    """Sums of a priority over each trajectory up to each row; ``before`` is that of the first.

    Args:
        name: of the data.
        values: shape (n,), or a number.
        before: the sum up to the row before, if its trajectory goes on.
        firsts: positions at which trajectories begin.

    Returns:
        Shape (n,) float64.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    pieces = np.split(values, [i for i in firsts if i < len(values)])
    sums = [np.cumsum(np.append(before, pieces[0]))[1:], *map(np.cumsum, pieces[1:])]
    whole = np.concatenate(sums)
    # NaN compares as False.
    if not (values >= 0).all() or not (whole <= np.finfo(np.float32).max).all():
        wrong = values[~((values >= 0) & (values < np.inf))]
        raise ValueError(
            f"{name} is a priority: finite numbers of at least 0, whose sum over a trajectory is "
            f"one of float32; got {wrong[0] if len(wrong) else whole.max()}"
        )
    return whole
