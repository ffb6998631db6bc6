"""Replay buffers: items as preallocated numpy columns, from which batches are sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeml.data.base import DataStoreBase, check_random_state, check_state
from edgeml.data.batch import Batch
from edgeml.data.columns import Columns
from edgeml.data.lanes import Lane, Numbers
from edgeml.data.plans import Plan, check_size
from edgeml.data.prefetch import Prefetch
from edgeml.data.ring import Ring
from edgeml.data.schema import Schema
from edgeml.data.selectors import Selector, UniformSelector
from edgeml.data.transitions import LANE, Transitions, count_spare_rows, transition_example
from edgeml.data.tree import Array, fill, leaves_of, prune

__all__ = ["ReplayBuffer", "ReplayBufferDataStore"]

_DRAWS = 8  # rounds in which items of too old a policy are drawn anew, before the others are listed
_VERSION = "policy_version"


class ReplayBuffer(DataStoreBase):
    """A ring of the newest items, held as numpy columns, from which batches are sampled.

    An item is a dict, or a tuple such as `env.step` gives, nested as deep as you like, with
    arrays and numbers for leaves. ``example``, else the first item, gives the schema (keys,
    shapes and dtypes), and memory for all items is set aside then. A leaf of another dtype is
    converted where that keeps what it means: between floats, from integers to floats, between
    integers where the value fits, from booleans to numbers. So give the first item's reward as
    a float, or all later ones are integers. Other items are refused.

    Dicts with the keys ``observations``, ``next_observations``, ``rewards``, ``masks`` and
    ``dones``, as `ReplayBufferDataStore` describes them, are *transitions*, inserted in the order
    in which they happened. ``n_step`` and ``frame_stack`` need those. They reach from one item to
    the next unless ``dones`` is true, `interrupt` was called, or the next item's observation is, in
    any byte, another than ``next_observations`` (`breaks` counts these). Where several environments
    fill one buffer in turn, insert each one's items with a ``lane`` of its own, in which they
    follow upon each other. (Or say how many ``lanes`` there are and give each item the key
    ``lane``, from 0, as `VectorTransitions` does for gymnasium's vector environments.) Of large
    observations (above 1 KiB) each is kept once: what one transition led to, and what the
    next one started from. Where they come as stacks of frames, (T, H, W, C), which move on by one
    from step to step, each frame is kept once. What is not, byte for byte, the same is kept apart.

    Args:
        capacity: how many items are held at most.
        example: an item that gives the schema; it is not inserted. Give it where items come from
            others (`TrainerServer`), or the first of them to come says what all must be like.
        seed: of the generator that `sample` uses unless it is given one.
        n_step: samples look so many transitions ahead within their episode (default 1). With more
            than 1, ``rewards``, which must be floats, are the discounted sums of up to n rewards;
            ``next_observations``, ``masks`` and ``dones`` are those of the last of these
            transitions; and there is one more key, ``discounts`` (float32), by which the value of
            ``next_observations`` is to be multiplied: ``discount ** m * masks`` of the m
            transitions that there were. An episode that was truncated keeps its value, and so
            does one that has got no further yet.
            (Sutton & Barto 2018, 7.1; Mnih et al. 2016.)
        discount: of future rewards, for ``n_step`` (default 0.99).
        frame_stack: samples have so many frames of each observation, the oldest first, as one
            more axis after the batch's (default 1: no such axis). Each frame is kept once. At the
            start of an episode its first frame is repeated. (Mnih et al. 2015.)

        lanes: how many environments fill the buffer in turn (default 1). With more than 1, items
            have the key ``lane``, an integer below that.
        ignore_unknown: leave out what items have under keys beyond the schema's, such as ``infos``
            (default: such items are refused).
        selector: chooses the items of a sample (default: a `UniformSelector`); it is this buffer's
            alone.

    Raises:
        ValueError: by the inserts, for an item that doesn't fit. The text gives the path to the
            part and both shapes or structures, and the store is as it was.
    """

    forwards_rows = True

    def __init__(
        self,
        capacity: int,
        *,
        example: Any = None,
        seed: int | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        frame_stack: int = 1,
        ignore_unknown: bool = False,
        lanes: int = 1,
        selector: Selector | None = None,
    ) -> None:
        super().__init__(capacity)
        if min(n_step, frame_stack, lanes) < 1:
            raise ValueError(
                "n_step, frame_stack and lanes are at least 1, got "
                f"{n_step}, {frame_stack}, {lanes}"
            )
        if not 0 <= discount <= 1:
            raise ValueError(f"discount is from 0 to 1, got {discount}")
        self._rng = np.random.default_rng(seed)
        self._ignore_unknown = ignore_unknown
        self._looks = n_step, discount, frame_stack, lanes
        # Rows are kept for the frames of the oldest item's stack, too.
        self._ring = Ring(capacity, spare=count_spare_rows(frame_stack, lanes))
        self._cuts_kept = self._lanes.kept = self._ring.n_rows
        self._selector = UniformSelector() if selector is None else selector
        self._selector.attach(self._ring)
        self._schema: Schema | None = None
        self._columns: Columns
        self._transitions: Transitions
        self._added: dict[str, int] = {}  # keys that samples have besides, and their leaves
        self._plans: dict[Any, Plan] = {}  # by the keys that are wanted, and whether packed
        if example is not None:
            self._set_schema(self._make_schema(example))

    def __len__(self) -> int:
        with self.lock:
            return self._ring.held

    @property
    def nbytes(self) -> int:
        """Bytes of memory for the items, of which what was never written to is not in use yet."""
        return 0 if self._schema is None else self._columns.nbytes

    @property
    def mass(self) -> float:
        """What an item's probability of being drawn is a share of: how many items are held.

        Or what the selector says: of a `PrioritizedReplayBuffer`, the sum of ``p ** alpha``. Who
        draws from several buffers as from one draws from each in proportion to it.
        """
        with self.lock:
            return self._selector.mass()

    @property
    def breaks(self) -> int:
        """How many items began a run only because of their observation.

        It was another than the one before (of that lane) led to, although that had not ended its
        episode. They are counted where it matters, with ``n_step`` or ``frame_stack``.
        """
        return 0 if self._schema is None else self._transitions.breaks

    @property
    def learns(self) -> bool:
        """Whether it has got no ``example``, and no item yet that would stand for one."""
        return self._schema is None

    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""
        with self.lock:  # `restore` goes back for a moment
            return self._ring.latest

    def insert(self, item: Any, lane: Lane = None) -> None:
        """Insert a copy of one item; the class tells what it raises.

        Args:
            item: like all others.
            lane: which of several environments' it is, a text or a number (default: all items are
                of one). It follows upon the item before of that lane.
        """
        with self.lock:
            number = 0 if lane is None else self._lanes.find(lane)
            schema = self._schema
            if schema is None:
                schema = self._make_schema(item)
                leaves = schema.fit(item)
                self._set_schema(schema)
            else:
                leaves = schema.fit(item)
            forwarding = self._forwarding
            row = None if forwarding is None else forwarding.reserve_row(schema, leaves, number)
            self._transitions.write(leaves, number)
            self._ring.latest += 1
            if number or self._lanes.are_used:
                self.take_lanes(number, self._ring.latest, 1)
            if forwarding is not None:
                forwarding.append_row(row)

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Lane = None) -> None:
        """Insert copies of items in one step; `insert` and the class tell the rest."""
        batch = batch if isinstance(batch, Batch) else Batch.of(batch)
        with self.lock:
            self._insert(batch, *self.number_lanes(batch, lane))

    def _insert(self, batch: Batch, numbers: Numbers, cuts: Sequence[int]) -> None:
        if not batch:
            return
        schema = self._schema or self._make_schema(batch[0])
        columns = schema.fit_batch(batch)
        if self._schema is None:
            self._set_schema(schema)
        ring = self._ring
        left_out = max(0, len(batch) - ring.n_rows)
        kept = len(batch) - left_out
        if left_out:
            columns = [column[left_out:] for column in columns]
            numbers = numbers if isinstance(numbers, int) else numbers[left_out:]
            cuts = [cut - left_out for cut in cuts if cut >= left_out]
        first = ring.latest + left_out + 1
        self._transitions.write_many(first, columns, kept, cuts, numbers)
        ring.latest += len(batch)
        self.take_cuts(cuts, first)
        self.take_lanes(numbers, first, kept)

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class."""
        with self.lock:
            first, n = self._ring.find_range(from_id, limit)
            grabbed = self._grab(first, n)
            cuts, lanes = self.cuts_within(first, n), self.lanes_within(first, n)
        return self._split(grabbed, first).cut(cuts).in_lanes(lanes)

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items; see the base class."""
        with self.lock:
            self._ring.reset(self.forget_cuts(next_id))
            self._selector.reset()
            if self._schema is not None:
                self._transitions.reset()

    def interrupt(self, lane: Lane = None) -> None:
        """End the episode under way: what is inserted next does not follow upon it.

        Args:
            lane: whose (default: all lanes').
        """
        with self.lock:
            if lane is not None:
                self._lanes.close(lane)
                return
            super().interrupt()
            if self._schema is not None:
                self._transitions.interrupt()

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator | None = None,
        *,
        keys: Iterable[Any] | None = None,
        out: dict[Any, Any] | None = None,
        max_policy_lag: int | None = None,
        policy_version: int | None = None,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Draw items with replacement; uniformly, unless the selector does otherwise.

        Args:
            batch_size: how many.
            rng: the generator to use (default: the store's own, see ``seed``).
            keys: an item's outermost keys that are wanted (default: all), such as
                ``("observations",)``; of tuples and lists, the positions.
            out: a batch of the same keys and size to write to, which is returned then. Its arrays
                are contiguous; `empty_batch` makes one. Don't give one that went to
                `jax.device_put`: on a CPU that takes the memory as it is (`on_device` copies).
            max_policy_lag: only items whose ``policy_version`` (a number in each item: of the
                weights that it was made with) is behind by no more than this.
            policy_version: behind which (default: that of the newest item).
            pack_obs_and_next_obs: give stacks of frames once for both observations, so that less
                is moved to a device. Each part of ``observations`` that is a stack in a sample,
                (batch_size, T, H, W, C) or with more axes, has T + 1 frames, of which the first T
                are the observation's and the last T the next one's, and is left out of
                ``next_observations``.

        Returns:
            The structure of an item as nested dicts, tuples and lists among it keyed by position
            (0, 1, ...), with a contiguous array of shape (batch_size, ...) for each leaf. The
            arrays are private copies.

        Raises:
            TypeError: batch_size is no integer.
            ValueError: batch_size is below 1; the store is empty, or has nothing that new; an
                unknown key; ``out`` doesn't fit; there are no stacks to pack, or those of an item
                don't overlap by all but one frame.
        """
        with self.lock:
            batch_size = check_size(batch_size)
            plan = self._find_plan(keys, pack_obs_and_next_obs)
            arrays = (
                plan.make_arrays(batch_size) if out is None else plan.take_arrays(batch_size, out)
            )
            least = self._compute_least_version(max_policy_lag, policy_version)
            rows = self._draw(batch_size, self._rng if rng is None else rng, least)
            discounts = self._added.get("discounts", -1)
            self._transitions.take(rows, arrays, discounts, plan.packed)
            if plan.added:
                self._selector.fill_added(rows, {key: arrays[leaf] for key, leaf in plan.added})
            return plan.build(arrays) if out is None else out

    def empty_batch(
        self,
        batch_size: int,
        keys: Iterable[Any] | None = None,
        *,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Return a batch as `sample` gives it, with anything in it, for its ``out``.

        Raises:
            ValueError: as `sample`.
        """
        with self.lock:
            plan = self._find_plan(keys, pack_obs_and_next_obs)
            return plan.build(plan.make_arrays(check_size(batch_size)))

    def prefetch(
        self, batch_size: int, *, device: Any = None, depth: int = 2, **options: Any
    ) -> Prefetch[dict[Any, Any]]:
        """Return an endless iterator of samples that are drawn ahead, in a thread of its own.

        Args:
            batch_size: how many items each has.
            device: a JAX device, or sharding, to put them on; None for numpy arrays.
            depth: how many are kept ready.
            options: ``keys``, ``pack_obs_and_next_obs`` and the like, for `sample`; no ``out``, as
                each batch has its own memory.
        """
        if options.get("out") is not None:
            raise ValueError("batches drawn ahead have memory of their own: give no out")
        if options.get("keys") is not None:
            options["keys"] = tuple(options["keys"])  # an iterator would do for one batch only
        return Prefetch(lambda: self.sample(batch_size, **options), device=device, depth=depth)

    def get_iterator(
        self,
        queue_size: int = 2,
        sample_args: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> Prefetch[dict[Any, Any]]:
        """Return what `prefetch` does, under the name and with the arguments that SERL has for it.

        Args:
            queue_size: how many batches are kept ready.
            sample_args: for `sample`; ``batch_size`` among them.
            device: a JAX device, or sharding, to put them on; None for numpy arrays.
        """
        return self.prefetch(**(sample_args or {}), device=device, depth=queue_size)

    # What checkpoints need ------------------------------------------------------------------

    def state(self) -> Any:
        """Return what the store knows beyond its items."""
        with self.lock:
            state = {**super().state(), "rng": self._rng.bit_generator.state, "breaks": self.breaks}
            return {**state, **self._selector.state()}

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave."""
        with self.lock:
            super().set_state(state)
            self._rng.bit_generator.state = state["rng"]
            self._selector.set_state(state)
            if self._schema is not None:
                self._transitions.breaks = int(state.get("breaks", 0))  # not those of loading

    def check_restore(self, parts: Iterable[tuple[Batch, Any]], state: Any) -> None:
        """See the base class."""
        with self.lock:
            schema, trial = self._schema, None
            for batch, extra in parts:
                extra = extra or {}
                older = Batch.from_payload(extra["older"]) if "older" in extra else Batch.of([])
                if len(older) >= batch.first_id:
                    raise ValueError(f"{len(older)} items before the one of id {batch.first_id}")
                for each in (older, batch):
                    if not each:
                        continue
                    schema = schema or self._make_schema(each[0])
                    trial = trial or self._make_transitions(Ring(1), schema)
                    trial.check(schema.fit_batch(each))
                self._selector.check_restore(len(batch), extra)
            check_state(state)
            check_random_state(self._rng, state["rng"])
            self._selector.check_state(state)

    def dump(self, from_id: int, *, limit: int | None = None) -> tuple[Batch, Any]:
        """Return items as `get_latest_data` does, with the frames before the oldest one.

        And with what the selector knows of them, such as priorities.
        """
        with self.lock:
            ring = self._ring
            first, n = ring.find_range(from_id, limit)
            extra = self._selector.dump(first, n)
            older = first - ring.oldest_kept
            if n and first == ring.oldest_id and older > 0:
                # Rows that are kept for the frames of the oldest items.
                start = first - older
                before = self._split(self._grab(start, older), start)
                before = before.cut(self.cuts_within(start, older))
                extra["older"] = before.in_lanes(self.lanes_within(start, older)).to_payload()
            grabbed = self._grab(first, n)
            cuts, lanes = self.cuts_within(first, n), self.lanes_within(first, n)
        return self._split(grabbed, first).cut(cuts).in_lanes(lanes), extra or None

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave."""
        extra = extra or {}
        with self.lock:
            if "older" in extra and not len(self):
                older = Batch.from_payload(extra["older"])
                self.reset(self._ring.latest + 1 - len(older))
                self._restore(older)
                self._ring.before = self._ring.latest
            self._restore(batch)
            self._selector.restore(len(batch), extra)

    def _restore(self, batch: Batch) -> None:
        self._insert(batch, 0 if batch.lanes is None else batch.lanes, batch.cuts)

    # Within --------------------------------------------------------------------------------

    def _make_schema(self, example: Any) -> Schema:
        return Schema(example, ignore_unknown=self._ignore_unknown)

    def _make_transitions(self, ring: Ring, schema: Schema) -> Transitions:
        transitions = Transitions(ring, schema, *self._looks)
        for key in (*transitions.added, *self._selector.added):
            if key in schema.keyed:
                raise ValueError(f"{key!r} is what samples have besides: rename the items' own")
        return transitions

    def _set_schema(self, schema: Schema) -> None:
        transitions = self._make_transitions(self._ring, schema)
        added = {**transitions.added, **self._selector.added}
        self._columns = transitions.columns
        self._added = {key: len(schema.shapes) + i for i, key in enumerate(added)}
        self._transitions = transitions
        self._schema = schema

    def _grab(self, first_id: int, n: int) -> list[Array]:
        if not n:
            return []
        return self._columns.grab(self._ring.find_row(first_id), n, self.allocate)

    def _split(self, grabbed: list[Array], first_id: int) -> Batch:
        """Make a batch of what was grabbed, which needs no lock."""
        if not grabbed:
            return Batch.of([], first_id)
        assert self._schema is not None
        leaves = self._columns.split(grabbed, self.allocate)
        return Batch.from_columns(fill(self._schema.skeleton, leaves), first_id)

    def _find_plan(self, keys: Iterable[Any] | None, pack: bool) -> Plan:
        if isinstance(keys, str):
            raise ValueError(f"keys are a list of keys, got {keys!r}")
        keys = None if keys is None else tuple(keys)
        try:
            return self._plans[keys, pack]
        except KeyError:
            pass
        schema = self._schema
        if schema is None:
            raise ValueError("can't sample from an empty replay buffer")
        transitions = self._transitions
        specs = [
            (transitions.shape_of(leaf, shape), dtype)
            for leaf, (shape, dtype) in enumerate(zip(schema.shapes, schema.dtypes, strict=True))
        ]
        specs += [
            ((), dtype) for dtype in (*transitions.added.values(), *self._selector.added.values())
        ]
        skeleton = {**schema.keyed, **self._added}
        if keys is not None:
            if unknown := [key for key in keys if key not in skeleton]:
                raise ValueError(f"no such keys: {unknown}; there are {list(skeleton)}")
            skeleton = {key: skeleton[key] for key in keys}
        packed = transitions.find_packed() if pack else []
        if packed and "observations" not in skeleton:
            raise ValueError("pack_obs_and_next_obs packs observations: have them among the keys")
        for leaf, _ in packed:
            (n, *frame), dtype = specs[leaf]
            specs[leaf] = (n + 1, *frame), dtype
        skeleton = prune(skeleton, [following for _, following in packed])
        wanted = {leaf: specs[leaf] for leaf in leaves_of(skeleton, skeleton)}
        added = [(key, skeleton[key]) for key in self._selector.added if key in skeleton]
        plan = self._plans[keys, pack] = Plan(skeleton, wanted, added, packed)
        return plan

    def _compute_least_version(self, lag: int | None, version: int | None) -> int | None:
        """The oldest version of the weights that will do, or None for any."""
        if lag is None:
            return None
        leaf = self._find_version()
        if version is None:
            newest = np.array(self._ring.find_row(self._ring.latest))
            version = int(self._columns.look(leaf, newest))
        return version - lag

    def _find_version(self) -> int:
        assert self._schema is not None
        leaf = self._schema.keyed.get(_VERSION)
        if type(leaf) is not int or self._schema.shapes[leaf] != ():
            raise ValueError(f"max_policy_lag needs items with a number at {_VERSION!r}")
        return leaf

    def _draw(self, n: int, rng: np.random.Generator, least: int | None) -> Array:
        """Rows of n items, of policies from the version ``least`` on."""
        ring, selector = self._ring, self._selector
        if not ring.held:
            raise ValueError("can't sample from an empty replay buffer")
        index = selector.draw(n, rng)
        if least is None:
            return index
        leaf = self._find_version()
        old = np.flatnonzero(self._columns.look(leaf, index) < least)
        for _ in range(_DRAWS):
            if not len(old):
                return index
            index[old] = selector.draw(len(old), rng)
            old = old[self._columns.look(leaf, index[old]) < least]
        rows = ring.find_rows(ring.oldest_id, ring.held)
        rows = rows[self._columns.look(leaf, rows) >= least]
        if not len(rows):
            raise ValueError(f"no item is of a policy from version {least} on")
        index[old] = selector.draw_among(rows, len(old), rng)
        return index


class ReplayBufferDataStore(ReplayBuffer):
    """The transitions of off-policy learning, with a schema from gymnasium spaces.

    An item is a dict of

    ==================  ======================  =================================================
    observations        like observation_space
    next_observations   like observation_space
    actions             like action_space
    rewards             () float32
    masks               () float32              0 where the episode terminated, else 1: what the
                                                value of the next observation is multiplied by
    dones               () bool                 the episode ended, terminated or truncated
    lane                () int32                which environment's it is, where there are lanes
    ==================  ======================  =================================================

    An episode that was truncated (by a time limit) did not terminate: its last item has mask 1
    and done True. In other words ``masks = 1.0 - terminated; dones = terminated or truncated``.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them.
        action_space: the same.
        capacity: how many transitions are held at most.
        extras: further parts of an item, each with an example: ``{"policy_version": 0}``.
        seed, n_step, discount, frame_stack, lanes, ignore_unknown: as for `ReplayBuffer`.

    Raises:
        TypeError: a space whose samples have no fixed shape and dtype.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        capacity: int,
        *,
        extras: Mapping[str, Any] | None = None,
        seed: int | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        frame_stack: int = 1,
        lanes: int = 1,
        ignore_unknown: bool = False,
    ) -> None:
        if lanes > 1:
            extras = {LANE: np.int32(0), **(extras or {})}
        super().__init__(
            capacity,
            example=transition_example(observation_space, action_space, extras),
            seed=seed,
            n_step=n_step,
            discount=discount,
            frame_stack=frame_stack,
            lanes=lanes,
            ignore_unknown=ignore_unknown,
        )
