"""Time replay buffers, side by side with the peers, in one run.

    python benchmarks/replay.py [--cases states insert] [--json FILE]

Rounds of the peers are interleaved, so that a noisy moment hits all of them; what is printed are
medians over rounds of each round's median, and ratios to the fastest of the other libraries and the
obvious numpy buffer. Read the ratios: times are this machine's. Every buffer has a process of its
own and is filled with the same episodes; all of a case are there at once, which with the larger
images takes 14 GB. Their memory is by how much a process has grown when its buffer is full.

An item can be told by its number, and an observation by its own, so that batches can be checked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import math
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, ClassVar

import numpy as np

from common import Array, Child, Row, Table, add_ratios, interleaved, medians, parser, save
from links import installed

Columns = dict[str, Any]  # arrays, each with a leading axis, in the library's own type
Spec = tuple[tuple[int, ...], type[np.generic]]

SIZES = (256, 2048)
_EPISODE = 200  # items
_WARM_UP = 4  # batches at the start of a turn; more than are ready when they are drawn ahead
_MOST_CALLS = 5000  # in a round


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        kind: what is timed: "sample", "device" (a batch as JAX arrays), "packed" (a batch in
            which both observations are one array), "prioritized" (draw one and give it new
            priorities), or "insert".
        items: how many there are, which is the capacity.
        observation: shape and dtype; with four axes, a stack of the newest frames.
        sizes: of a batch.
    """

    kind: str
    items: int
    observation: Spec
    sizes: tuple[int, ...] = SIZES

    @property
    def images(self) -> bool:
        return len(self.observation[0]) > 1

    @property
    def depth(self) -> int:
        """How many frames an observation has."""
        return self.observation[0][0] if len(self.observation[0]) == 4 else 1

    @property
    def specs(self) -> dict[str, Spec]:
        """Of an item's parts."""
        specs: dict[str, Spec] = {
            "observations": self.observation,
            "next_observations": self.observation,
            "actions": ((6,), np.float32),
            "rewards": ((), np.float32),
            "masks": ((), np.float32),
        }
        return specs | {"dones": ((), np.bool_)} if self.images else specs

    @property
    def nbytes(self) -> int:
        """Of an item."""
        return sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.specs.values()
        )

    def episodes(self) -> Iterator[dict[str, Array]]:
        """All items, in the order in which they happened."""
        shape, dtype = self.observation
        n, depth = _EPISODE, self.depth
        shape = shape if depth == 1 else shape[1:]
        noise = np.random.default_rng(0).integers(0, 256, (n + depth, *shape)).astype(dtype)
        actions = np.random.default_rng(0).random((n, 6), np.float32)
        for episode in range(self.items // n):
            frames = noise.copy()  # one more than there are items: where the last one led
            number = np.arange(n + depth, dtype=np.int32) + episode * (n + 1)
            _bytes(frames)[:, :4] = number[:, None].view(np.uint8)
            if depth > 1:
                stacks = np.lib.stride_tricks.sliding_window_view(frames, depth, axis=0)
                frames = np.moveaxis(stacks, -1, 1)
            columns = {
                "observations": frames[:-1],
                "next_observations": frames[1:],
                "actions": actions,
                "rewards": np.arange(n, dtype=np.float32) + episode * n,
                "masks": np.ones(n, np.float32),
                "dones": np.arange(n) == n - 1,
            }
            yield {key: columns[key] for key in self.specs}

    def check(self, columns: Columns, n: int) -> None:
        """Raise an error unless these are n of the items, each with its own parts."""
        arrays = {key: np.asarray(column) for key, column in columns.items()}
        for key, (shape, dtype) in self.specs.items():
            if arrays[key].dtype != dtype or arrays[key].size != n * math.prod(shape):
                raise AssertionError(f"{key}: {arrays[key].dtype} {arrays[key].shape}")
        items = arrays["rewards"].reshape(n).astype(np.int64)
        frames = items + items // _EPISODE
        right = (
            (_number(arrays["observations"]) == frames).all()
            and (_number(arrays["next_observations"]) == frames + 1).all()
            and (arrays["masks"] == 1).all()
            and ("index" not in arrays or (arrays["index"] == items).all())
        )
        if not right or (n > 20 and len(set(items.tolist())) < 10):
            raise AssertionError("a batch is not what was inserted")


def _bytes(frames: Array) -> Array:
    return frames.reshape(len(frames), -1).view(np.uint8)


def _unpack(batch: Columns) -> Columns:
    """A batch with both observations."""
    if "next_observations" in batch:
        return batch
    frames = batch["observations"]
    return {**batch, "observations": frames[:, :-1], "next_observations": frames[:, 1:]}


def _number(frames: Array) -> Array:
    return np.ascontiguousarray(_bytes(frames)[:, :4]).view(np.int32)[:, 0]


_STATE: Spec = ((17,), np.float32)
_STACK: Spec = ((3, 256, 128, 3), np.uint8)  # of two cameras, 128x128x3, one above the other
CASES = {
    "states": Case("sample", 200_000, _STATE),
    "to jax": Case("device", 200_000, _STATE),
    "84x84x3": Case("sample", 20_000, ((84, 84, 3), np.uint8)),
    "128x128x3": Case("sample", 20_000, ((128, 128, 3), np.uint8)),
    "prioritized": Case("prioritized", 1_000_000, _STATE, (256,)),
    "insert": Case("insert", 200_000, _STATE, (1, 1000)),
    "stacks": Case("sample", 3000, _STACK, (256,)),
    "packed": Case("packed", 3000, _STACK, (256,)),
    "insert stacks": Case("insert", 3000, _STACK, (1, 20)),
}
_STACKED = ("stacks", "packed", "insert stacks")


class Peer(ABC):
    """A library's replay buffer for a case, used as its documentation says."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    cases: ClassVar[tuple[str, ...]] = tuple(name for name in CASES if name not in _STACKED)
    modules: ClassVar[tuple[str, ...]] = ()
    """What it imports; they don't count as its memory."""

    @abstractmethod
    def __init__(self, case: Case) -> None: ...

    @abstractmethod
    def extend(self, columns: dict[str, Array]) -> None:
        """Insert items, the whole of an episode or a part of it."""

    def insert(self, item: dict[str, Any]) -> None:
        """Insert one item."""
        raise NotImplementedError

    @abstractmethod
    def sample(self, n: int) -> Any:
        """Draw a batch, in the library's own arrays."""

    def columns(self, batch: Any) -> Columns:
        """A batch by the items' keys. "index": numbers of items, from 0."""
        columns: Columns = batch
        return columns

    def check(self, case: Case, batch: Any, n: int) -> None:
        """Raise an error unless a batch has n items as they were inserted; not timed."""
        case.check(self.columns(batch), n)

    def to_jax(self, n: int) -> Any:
        """Draw a batch, in JAX arrays on its first device."""
        jax = importlib.import_module("jax")
        return jax.block_until_ready(jax.device_put(self.sample(n), jax.devices()[0]))

    def update(self, batch: Any, priorities: Array) -> None:
        """Give the items of a batch other priorities."""
        raise NotImplementedError

    def prioritize(self, first: int, priorities: Array) -> None:
        """Give items their first priorities, by number."""
        raise NotImplementedError


class Numpy(Peer):
    """The obvious buffer: an array for each part of an item, indexed by an array of numbers."""

    name = "numpy"
    cases = ("states", "to jax", "84x84x3", "128x128x3", "insert", "stacks", "insert stacks")

    def __init__(self, case: Case) -> None:
        self._items = case.items
        self._columns = {
            key: np.zeros((case.items, *shape), dtype) for key, (shape, dtype) in case.specs.items()
        }
        self._row = self._size = 0
        self._rng = np.random.default_rng()

    def extend(self, columns: dict[str, Array]) -> None:
        n = len(columns["rewards"])
        before_end = min(n, self._items - self._row)
        for key, column in self._columns.items():
            column[self._row : self._row + before_end] = columns[key][:before_end]
            column[: n - before_end] = columns[key][before_end:]
        self._advance(n)

    def insert(self, item: dict[str, Any]) -> None:
        for key, column in self._columns.items():
            column[self._row] = item[key]
        self._advance(1)

    def _advance(self, n: int) -> None:
        self._row = (self._row + n) % self._items
        self._size = min(self._size + n, self._items)

    def sample(self, n: int) -> Any:
        index = self._rng.integers(0, self._size, n)
        return {key: column[index] for key, column in self._columns.items()}


class Sliding(Peer):
    """Frames once in a row, as HIL-SERL's buffer has them; stacks are windows that slide over it.

    Where an episode begins its first frames take a place each, and no item ends there.
    """

    name = "sliding"
    note = "sliding takes it that stacks overlap, and looks at the newest frame of each only"
    cases = _STACKED

    def __init__(self, case: Case) -> None:
        self._depth, self._packed = case.depth, case.kind == "packed"
        shape, dtype = case.observation
        n = case.items + case.depth * (case.items // _EPISODE)
        self._frames = np.zeros((n, *shape[1:]), dtype)
        self._is_item = np.zeros(n, np.bool_)
        self._columns = {
            key: np.zeros((n, *shape), dtype)
            for key, (shape, dtype) in case.specs.items()
            if "observations" not in key
        }
        self._row, self._begins = 0, True
        self._rng = np.random.default_rng()

    def insert(self, item: dict[str, Any]) -> None:
        if self._begins:
            for frame in item["observations"]:
                self._frames[self._row], self._is_item[self._row] = frame, False
                self._advance()
        self._frames[self._row] = item["next_observations"][-1]
        for key, column in self._columns.items():
            column[self._row] = item[key]
        self._is_item[self._row], self._begins = True, bool(item["dones"])
        self._advance()
        # The oldest ones' frames are going.
        self._is_item[(self._row + np.arange(self._depth)) % len(self._is_item)] = False

    def _advance(self) -> None:
        self._row = (self._row + 1) % len(self._frames)

    def extend(self, columns: dict[str, Array]) -> None:
        for row in zip(*columns.values(), strict=True):
            self.insert(dict(zip(columns, row, strict=True)))

    def sample(self, n: int) -> Any:
        index = self._rng.integers(0, len(self._frames), n)
        while len(wrong := np.flatnonzero(~self._is_item[index])):
            index[wrong] = self._rng.integers(0, len(self._frames), len(wrong))
        batch = {key: column[index] for key, column in self._columns.items()}
        frames = self._frames[index[:, None] + np.arange(-self._depth, 1)]
        if self._packed:
            return {**batch, "observations": frames}
        return {**batch, "observations": frames[:, :-1], "next_observations": frames[:, 1:]}

    def columns(self, batch: Any) -> Columns:
        return _unpack(batch)


class Take(Peer):
    """np.take into kept memory, of rows with all that is small, and of frames kept once."""

    name = "take"
    note = "take and memcpy write into kept memory: bounds"
    cases = ("states", "84x84x3", "128x128x3")

    def __init__(self, case: Case) -> None:
        small = [
            (key, dtype, shape)
            for key, (shape, dtype) in case.specs.items()
            if not (case.images and "observations" in key)
        ]
        self._rows = np.zeros(case.items, np.dtype(small))
        self._raw = self._rows.view(f"V{self._rows.itemsize}")
        shape, dtype = case.observation
        n_frames = case.items + case.items // _EPISODE if case.images else 0
        self._frames = np.zeros((n_frames, *shape), dtype)
        self._row = 0
        self._kept: dict[int, list[Array]] = {}
        self._rng = np.random.default_rng()

    def extend(self, columns: dict[str, Array]) -> None:
        n = len(columns["rewards"])
        for key in self._rows.dtype.names or ():
            self._rows[key][self._row : self._row + n] = columns[key]
        if len(self._frames):
            first = self._row + self._row // n
            self._frames[first : first + n] = columns["observations"]
            self._frames[first + n] = columns["next_observations"][-1]
        self._row += n

    def sample(self, n: int) -> Any:
        if n not in self._kept:
            both = [np.empty((n, *self._frames.shape[1:]), self._frames.dtype) for _ in range(2)]
            self._kept[n] = [np.empty(n, self._raw.dtype), *both]
        rows, now, following = self._kept[n]
        index = self._rng.integers(0, len(self._rows), n)
        self._raw.take(index, mode="clip", out=rows)
        if len(self._frames):
            index += index // _EPISODE
            self._frames.take(index, axis=0, mode="clip", out=now)
            self._frames.take(index + 1, axis=0, mode="clip", out=following)
        return rows, now, following

    def columns(self, batch: Any) -> Columns:
        rows = batch[0].view(self._rows.dtype)
        columns = {key: rows[key].copy() for key in rows.dtype.names}
        if len(self._frames):
            columns |= {"observations": batch[1], "next_observations": batch[2]}
        return columns


class Memcpy(Peer):
    """One copy of as many bytes as a batch has, from anywhere in as much memory as the items."""

    name = "memcpy"
    cases = ("states", "84x84x3", "128x128x3")

    def __init__(self, case: Case) -> None:
        self._size = case.nbytes
        self._all = np.empty((case.items // 2, case.nbytes), np.uint8)
        self._all[:] = np.arange(len(self._all))[:, None].astype(np.uint8)
        self._kept: dict[int, Array] = {}
        self._rng = np.random.default_rng()

    def extend(self, columns: dict[str, Array]) -> None: ...

    def sample(self, n: int) -> Any:
        out = self._kept.setdefault(n, np.empty((n, self._size), np.uint8))
        first = self._rng.integers(0, len(self._all) - n)
        np.copyto(out, self._all[first : first + n])
        return out

    def check(self, case: Case, batch: Any, n: int) -> None:
        if (np.diff(batch[:, -1]) != 1).any():  # unsigned bytes: 0 follows upon 255
            raise AssertionError("not what was copied")


class Edgeml(Peer):
    """`ReplayBuffer` and `PrioritizedReplayBuffer`."""

    name = "edgeml"
    cases = tuple(CASES)
    modules = ("edgeml.data",)

    def __init__(self, case: Case) -> None:
        import edgeml.data as data

        kind = data.PrioritizedReplayBuffer if case.kind == "prioritized" else data.ReplayBuffer
        self._buffer: Any = kind(case.items)
        self._batch = data.Batch
        self._options = {"pack_obs_and_next_obs": True} if case.kind == "packed" else {}

    def extend(self, columns: dict[str, Array]) -> None:
        self._buffer.batch_insert(self._batch.from_columns(columns))

    def insert(self, item: dict[str, Any]) -> None:
        self._buffer.insert(item)

    def sample(self, n: int) -> Any:
        return self._buffer.sample(n, **self._options)

    def columns(self, batch: Any) -> Columns:
        return {**batch, "index": batch["ids"] - 1} if "ids" in batch else _unpack(batch)

    def update(self, batch: Any, priorities: Array) -> None:
        self._buffer.update_priorities(batch["ids"], priorities)

    def prioritize(self, first: int, priorities: Array) -> None:
        ids = np.arange(first + 1, first + 1 + len(priorities))
        self._buffer.update_priorities(ids, priorities)

    def to_jax(self, n: int) -> Any:
        from edgeml.data import on_device

        jax = importlib.import_module("jax")
        return jax.block_until_ready(on_device(self.sample(n), jax.devices()[0]))


class EdgemlOut(Edgeml):
    """The same, into a batch that is kept."""

    name = "edgeml out"
    cases = ("states", "84x84x3", "128x128x3")

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._kept: dict[int, Any] = {}

    def sample(self, n: int) -> Any:
        if n not in self._kept:
            self._kept[n] = self._buffer.empty_batch(n)
        return self._buffer.sample(n, out=self._kept[n])


class EdgemlPrefetch(Edgeml):
    """The same, drawn ahead and put on the device by a thread of its own."""

    name = "edgeml prefetch"
    note = "edgeml prefetch does nothing between its batches: they come as fast as they are drawn"
    cases = ("to jax",)

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._jax = importlib.import_module("jax")
        self._iterators: dict[int, Any] = {}

    def to_jax(self, n: int) -> Any:
        if n not in self._iterators:
            self._iterators[n] = self._buffer.prefetch(n, device=self._jax.devices()[0])
        return self._jax.block_until_ready(next(self._iterators[n]))


class Cpprb(Peer):
    """cpprb, with both observations of an item stored."""

    name = "cpprb"
    modules = ("cpprb",)
    shared: ClassVar[bool] = False

    def __init__(self, case: Case) -> None:
        cpprb = importlib.import_module("cpprb")
        kind = cpprb.PrioritizedReplayBuffer if case.kind == "prioritized" else cpprb.ReplayBuffer
        spaces = {
            key: {"shape": shape or 1, "dtype": dtype}
            for key, (shape, dtype) in case.specs.items()
            if not (self.shared and key == "next_observations")
        }
        options = {"next_of": "observations"} if self.shared else {}
        self._buffer = kind(case.items, spaces, **options)

    def extend(self, columns: dict[str, Array]) -> None:
        self._buffer.add(**columns)
        if self.shared:
            self._buffer.on_episode_end()

    def insert(self, item: dict[str, Any]) -> None:
        self._buffer.add(**item)

    def sample(self, n: int) -> Any:
        return self._buffer.sample(n)

    def columns(self, batch: Any) -> Columns:
        return {**batch, "index": batch["indexes"]} if "weights" in batch else batch

    def update(self, batch: Any, priorities: Array) -> None:
        self._buffer.update_priorities(batch["indexes"], priorities)

    def prioritize(self, first: int, priorities: Array) -> None:
        index = np.arange(first, first + len(priorities))
        self._buffer.update_priorities(index, priorities)


class CpprbNextOf(Cpprb):
    """The same, with `next_of`: each observation is stored once."""

    name = "cpprb next_of"
    cases = ("84x84x3", "128x128x3")
    shared = True


class Torchrl(Peer):
    """torchrl's ReplayBuffer over a LazyTensorStorage; takes and gives TensorDicts."""

    name = "torchrl"
    note = "torchrl gives torch tensors, and to JAX they go by DLPack"
    modules = ("torch", "tensordict", "torchrl.data")

    def __init__(self, case: Case) -> None:
        data = importlib.import_module("torchrl.data")
        self._torch = importlib.import_module("torch")
        self._tensordict = importlib.import_module("tensordict").TensorDict
        storage = data.LazyTensorStorage(case.items)
        self._prioritized = case.kind == "prioritized"
        if self._prioritized:
            self._buffer = data.PrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage)
        else:
            self._buffer = data.ReplayBuffer(storage=storage)

    def extend(self, columns: dict[str, Array]) -> None:
        self._buffer.extend(self._tensordict(columns, batch_size=[len(columns["rewards"])]))

    def insert(self, item: dict[str, Any]) -> None:
        self._buffer.add(self._tensordict(item, batch_size=[]))

    def sample(self, n: int) -> Any:
        return self._buffer.sample(n, return_info=self._prioritized)

    def columns(self, batch: Any) -> Columns:
        items, info = batch if self._prioritized else (batch, {})
        return {**items, "index": info["index"]} if info else dict(items)

    def to_jax(self, n: int) -> Any:
        jax = importlib.import_module("jax")
        batch = {key: jax.dlpack.from_dlpack(value) for key, value in self.sample(n).items()}
        return jax.block_until_ready(jax.device_put(batch, jax.devices()[0]))

    def update(self, batch: Any, priorities: Array) -> None:
        self._buffer.update_priority(batch[1]["index"], self._torch.from_numpy(priorities))

    def prioritize(self, first: int, priorities: Array) -> None:
        index = self._torch.arange(first, first + len(priorities))
        self._buffer.update_priority(index, self._torch.from_numpy(priorities))


class Flashbax(Peer):
    """flashbax's item buffers, all in jitted functions that take over the buffer's memory.

    Its flat buffer stores observations once, but has no place for the last one of an episode, and
    gives actions and rewards twice; with images it took 1.5 to 3 times as long.
    """

    name = "flashbax"
    note = "flashbax gives JAX arrays, and probabilities where others give importance weights"
    modules = ("jax", "flashbax")

    def __init__(self, case: Case) -> None:
        self._jax = jax = importlib.import_module("jax")
        self._flashbax = importlib.import_module("flashbax")
        self._case = case
        self._key = jax.random.key(0)
        self._samples: dict[int, Callable[[Any, Any], Any]] = {}
        first = {key: np.zeros(shape, dtype) for key, (shape, dtype) in case.specs.items()}
        self._state = self._made(1).init(jax.tree.map(jax.numpy.asarray, first))
        self._add = jax.jit(self._made(1).add, donate_argnums=0)
        self._extend = jax.jit(self._made(1, add_sequences=True).add, donate_argnums=0)
        if case.kind == "prioritized":
            self._set = jax.jit(self._made(1).set_priorities, donate_argnums=0)

    def _made(self, n: int, **options: Any) -> Any:
        """Pure functions, for batches of n."""
        common: dict[str, Any] = {
            "max_length": self._case.items,
            "min_length": 1,
            "sample_batch_size": n,
        }
        if self._case.kind == "prioritized":
            common |= {"priority_exponent": 0.6, "device": self._jax.default_backend()}
            return self._flashbax.make_prioritised_item_buffer(**common, **options)
        return self._flashbax.make_item_buffer(**common, **options)

    def extend(self, columns: dict[str, Array]) -> None:
        self._state = self._jax.block_until_ready(self._extend(self._state, columns))

    def insert(self, item: dict[str, Any]) -> None:
        self._state = self._jax.block_until_ready(self._add(self._state, item))

    def sample(self, n: int) -> Any:
        if n not in self._samples:
            jax, draw = self._jax, self._made(n).sample

            def sample(state: Any, key: Any) -> Any:
                key, now = jax.random.split(key)
                return key, draw(state, now)

            self._samples[n] = jax.jit(sample)
        self._key, batch = self._samples[n](self._state, self._key)
        return self._jax.block_until_ready(batch)

    to_jax = sample

    def columns(self, batch: Any) -> Columns:
        if self._case.kind == "prioritized":
            # Its sums are float32, which at this size now and then leads past the last item; what
            # it gives is then another.
            return {**batch.experience, "index": batch.indices % self._case.items}
        columns: Columns = batch.experience
        return columns

    def update(self, batch: Any, priorities: Array) -> None:
        updated = self._set(self._state, batch.indices, priorities)
        self._state = self._jax.block_until_ready(updated)

    def prioritize(self, first: int, priorities: Array) -> None:
        index = np.arange(first, first + len(priorities))
        self._state = self._set(self._state, index, priorities)


ALL = (
    *(Numpy, Cpprb, CpprbNextOf, Torchrl, Flashbax, Sliding),
    *(Edgeml, EdgemlOut, EdgemlPrefetch, Take, Memcpy),
)
REFERENCES = (Numpy.name, Cpprb.name, CpprbNextOf.name, Torchrl.name, Flashbax.name)
"""Ratios refer to the best of these."""


def find() -> dict[str, type[Peer]]:
    """Those that are installed, by name."""
    there = [kind for kind in ALL if all(installed(m.partition(".")[0]) for m in kind.modules)]
    return {kind.name: kind for kind in there}


def work(peer: Peer, case: Case) -> Callable[[int], Any]:
    """What is timed, for a batch of n, and returns a batch where it draws one."""
    if case.kind == "device":
        return peer.to_jax
    if case.kind == "prioritized":
        rng = np.random.default_rng()
        priorities = itertools.cycle([rng.random(case.sizes[0], np.float32) for _ in range(100)])

        def sample_and_update(n: int) -> Any:
            batch = peer.sample(n)
            peer.update(batch, next(priorities))
            return batch

        return sample_and_update
    if case.kind == "insert":
        few = list(itertools.islice(case.episodes(), 10 * case.sizes[1] // _EPISODE))
        columns = {key: np.concatenate([each[key] for each in few]) for key in few[0]}
        rows = zip(*columns.values(), strict=True)
        items = itertools.cycle([dict(zip(columns, row, strict=True)) for row in rows])
        parts = itertools.cycle(
            {key: column[first : first + case.sizes[1]] for key, column in columns.items()}
            for first in range(0, len(columns["rewards"]), case.sizes[1])
        )

        def insert(n: int) -> None:
            if n == 1:
                peer.insert(next(items))
            else:
                peer.extend(next(parts))

        return insert
    return peer.sample


def fill(peer: Peer, case: Case) -> None:
    for columns in case.episodes():
        peer.extend(columns)
    if case.kind == "prioritized":
        rng = np.random.default_rng(0)
        for first in range(0, case.items, 10_000):
            peer.prioritize(first, rng.random(10_000, np.float32))


def _resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def child(pipe: Connection, kind: type[Peer], case: Case) -> None:
    """Fill a buffer and send how much memory it takes; then on each (n, calls) send a median."""
    os.environ["RL_LOGGING_LEVEL"] = "WARNING"
    for module in kind.modules:
        importlib.import_module(module)
    before = _resident()
    peer = kind(case)
    fill(peer, case)
    pipe.send(_resident() - before)
    timed = work(peer, case)
    with contextlib.suppress(EOFError):
        while True:
            n, calls = pipe.recv()
            times = []
            for _ in range(_WARM_UP):
                batch = timed(n)
            for _ in range(calls):
                began = time.perf_counter()
                batch = timed(n)
                times.append(time.perf_counter() - began)
            if case.kind == "insert":
                batch, n = peer.sample(SIZES[0]), SIZES[0]
            peer.check(case, batch, n)
            pipe.send(median(times))
            batch = None  # its memory is for others now


def measure(
    case: Case, peers: dict[str, type[Peer]], rounds: int, seconds: float
) -> dict[int, dict[str, Row]]:
    """Medians over rounds of the time of a call, by the batch's size and the peer."""
    rows: dict[int, dict[str, Row]] = {}
    with contextlib.ExitStack() as stack:
        running, memory = {}, {}
        for name, kind in peers.items():
            running[name] = Child(child, kind, case)
            stack.callback(running[name].close, patience=5.0)
            memory[name] = running[name].receive(timeout=300)  # one after the other

        def one_round(name: str, n: int, calls: int) -> float:
            running[name].pipe.send((n, calls))
            took: float = running[name].receive(timeout=300)
            return took

        for n in case.sizes:
            calls = {}
            for name in peers:
                one_round(name, n, 3)  # compilers, pages and branch predictors
                calls[name] = min(_MOST_CALLS, max(10, int(seconds / one_round(name, n, 5))))
            kept: dict[str, list[Row]] = {name: [] for name in peers}
            for name in interleaved(peers, rounds):
                kept[name].append({"us": one_round(name, n, calls[name]) * 1e6})
            rows[n] = {name: medians(kept[name]) for name in peers}
            for name, row in rows[n].items():
                row["mb"] = memory[name] / 1e6
    return rows


def main() -> None:
    known = find()
    options = parser(__doc__, known, rounds=5)
    options.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options.add_argument("--seconds", type=float, default=0.25, help="length of a round")
    given = options.parse_args()
    results: dict[str, Any] = {}
    notes = set()
    for label in given.cases:
        case = CASES[label]
        peers = {name: known[name] for name in given.peers if label in known[name].cases}
        if case.kind == "device" and not installed("jax"):
            continue
        notes |= {kind.note for kind in peers.values() if kind.note}
        print(f"{label}: {case.items} items of {case.nbytes} B")
        rows = measure(case, peers, given.rounds, given.seconds)
        results[label] = rows
        if case.kind == "insert":
            report_inserts(case, rows)
            continue
        table = Table(8, 16, us="10.1", us_ratio="6.2", mb="8.0", mb_ratio="6.2")
        for n, of_size in rows.items():
            references = (Flashbax.name,) if case.kind == "device" else REFERENCES
            add_ratios(of_size, references, "us")
            add_ratios(of_size, REFERENCES, "mb")
            for name, row in of_size.items():
                table.add(str(n), name, row=row)
    for note in sorted(notes):
        print(f"note: {note}")
    save(given, results)


def report_inserts(case: Case, rows: dict[int, dict[str, Row]]) -> None:
    """Print the inserts, with what a batch gains over items one by one."""
    one, many = case.sizes
    for of_size in rows.values():
        add_ratios(of_size, REFERENCES, "us")
    if Numpy.name in rows[one]:
        for row in rows[one].values():
            row["beyond_numpy_us"] = row["us"] - rows[one][Numpy.name]["us"]
    for name, row in rows[many].items():
        row["gain"] = rows[one][name]["us"] * many / row["us"]
    table = Table(8, 16, us="10.2", us_ratio="6.2", beyond_numpy_us="15.2", gain="8.1")
    for n, of_size in rows.items():
        for name, row in of_size.items():
            table.add(str(n), name, row=row)


if __name__ == "__main__":
    main()
