"""Rows on a device: the memory of a trajectory buffer, and the compiled functions that use it.

Inserts are gathered in numpy until there are enough, or somebody asks, to be worth writing to the
device. There, one compiled function writes them, and another lets samplers choose rows and gathers
these. The arrays are *donated* to the former: it writes in place, and the old references are
invalid from then on, so that all of this happens under the store's lock, and nothing but fresh
arrays is handed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from edgeml.core.errors import Closed
from edgeml.core.forks import watch_forks
from edgeml.core.message import Allocator, empty
from edgeml.data.samplers import Sampler, Steps
from edgeml.data.tree import Array, nest

if TYPE_CHECKING:
    import jax

__all__ = ["DeviceRing", "Part", "SampleConfig", "Transform"]

_STAGED = 1024  # rows that are gathered before they are written to the device, at most
_STAGED_BYTES = 4 << 20

Transform: TypeAlias = "Callable[[dict[str, Any], dict[str, jax.Array]], tuple[Any, Any]]"


class Rows(NamedTuple):
    """Columns by name: the data, and the running sums of priorities."""

    data: dict[str, Any]
    sums: dict[str, Any]


class Part(NamedTuple):
    """What one sampler is for: a key of the batch, from leaves (path in the batch, data's name)."""

    key: str
    sampler: Sampler
    leaves: tuple[tuple[tuple[str, ...], str], ...]


@dataclass(frozen=True)
class SampleConfig:
    """What a batch is made of, as the compiled functions are known by."""

    parts: tuple[Part, ...]
    transform: Transform | None


class DeviceRing:
    """A ring of rows on a device. Nothing here takes a lock.

    Args:
        capacity: how many rows.
        specs: shape and dtype of each column, by name.
        device: `jax.Device` or `jax.sharding.Sharding`; None for JAX's default.
    """

    def __init__(
        self,
        capacity: int,
        specs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        device: Any,
    ) -> None:
        self._capacity = capacity
        self._specs = specs
        self._device = device
        self._rows = Rows(
            {name: self._make_column(shape, dtype) for name, (shape, dtype) in specs.items()}, {}
        )
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        most = min(_STAGED, capacity, max(1, _STAGED_BYTES // max(1, size)))
        self._sizes = sorted({1, min(32, most), most})  # a compiled function for each
        self._staged = self._make_stage()
        self._abandoned = False
        self._order: tuple[Any, Any] = None, None  # of rows, as it was given, and on the device
        self.reset(1)
        watch_forks(self)

    def abandon(self) -> None:
        """Refuse all use of the device in a forked child: JAX's threads are not there."""
        self._abandoned = True

    def reset(self, next_id: int) -> None:
        """Forget all rows; the next one gets this id."""
        self._n_staged = 0
        self._next_written = next_id  # id of the first staged row

    def prepare(self, n: int) -> None:
        """Write what is staged to the device unless n more rows can be staged besides.

        It may fail, or Ctrl-C may come amid it: so call it before anything is changed.
        """
        if self._n_staged + n > self._sizes[-1]:
            self.flush()

    def extend(self, leaves: Iterable[Any], sums: Mapping[str, Array], n: int) -> None:
        """Append rows.

        Args:
            leaves: one row's, or n with a leading axis, in the order of the columns.
            sums: of each priority, shape (n,).
            n: how many; `prepare` has been called for them.
        """
        leaves = list(leaves)
        most = self._sizes[-1]
        for done in range(0, n, most):
            if done:
                self.flush()
            at, k = self._n_staged, min(n - done, most)
            for column, values in zip(self._staged.data.values(), leaves, strict=False):
                column[at : at + k] = values if k == n else values[done : done + k]
            for name, column in self._staged.sums.items():
                column[at : at + k] = sums[name][done : done + k]
            self._n_staged += k

    def flush(self) -> None:
        """Write what is staged to the device.

        Raises:
            Closed: this is a forked child.
        """
        if self._abandoned:
            raise Closed(
                "a trajectory buffer can't be used in a forked child, as JAX can't: start "
                "processes with spawn or forkserver, and make the buffer in the one that uses it"
            )
        n = self._n_staged
        if not n:
            return
        size = next(size for size in self._sizes if size >= n)
        rows = Rows(*({name: a[:size] for name, a in part.items()} for part in self._staged))
        start = np.int32((self._next_written - 1) % self._capacity)
        self._rows = _compile().write(self._rows, rows, start, np.int32(n))
        self._next_written += n
        # On a CPU, JAX may use the very memory that it was given, for as long as it likes.
        self._staged = self._make_stage()
        self._n_staged = 0

    def read(
        self, first_id: int, n: int, names: Iterable[str], allocate: Allocator
    ) -> dict[str, Array]:
        """Return columns of n rows, on the host."""
        self.flush()
        columns = {name: self._rows.data[name] for name in names}
        out = {
            name: empty(allocate, (n, *column.shape[1:]), column.dtype)
            for name, column in columns.items()
        }
        for done in range(0, n, self._sizes[-1]):
            k = min(n - done, self._sizes[-1])
            size = next(size for size in self._sizes if size >= k)
            start = np.int32((first_id - 1 + done) % self._capacity)
            for name, rows in _compile().read(columns, start, size).items():
                out[name][done : done + k] = np.asarray(rows)[:k]
        return out

    def draw(
        self, at: Array, words: Array, config: SampleConfig, order: Array | None = None
    ) -> tuple[Any, Any]:
        """Let samplers choose rows, and gather these: ``data, mask``; see `_draw`.

        An array of the order is put on the device once, and must not change.
        """
        import jax

        self.flush()
        if order is not self._order[0]:
            self._order = order, None if order is None else jax.device_put(order, self._device)
        data, mask = _compile().draw(self._rows, at, words, config, self._order[1])
        return data, mask

    def add_sums(self, name: str, first_id: int, sums: Array) -> None:
        """Keep the running sums of one more priority, or keep them anew.

        Args:
            name: of the priority.
            first_id: of the oldest row held.
            sums: of the rows held, shape (n,).
        """
        self.flush()
        column = self._make_column((), np.dtype(np.float32))
        n = len(sums)
        if n:
            rows = np.zeros(self._capacity, np.float32)
            rows[:n] = sums
            start = np.int32((first_id - 1) % self._capacity)
            column = _compile().write(column, rows, start, np.int32(n))
        self._rows.sums[name] = column
        self._staged = self._make_stage()

    def _make_stage(self) -> Rows:
        size = self._sizes[-1]
        return Rows(
            {name: np.empty((size, *shape), dtype) for name, (shape, dtype) in self._specs.items()},
            {name: np.empty(size, np.float32) for name in self._rows.sums},
        )

    def _make_column(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> jax.Array:
        import jax.numpy as jnp

        return jnp.zeros((self._capacity, *shape), dtype, device=self._device)


class _Compiled(NamedTuple):
    write: Callable[..., Any]
    read: Callable[..., Any]
    draw: Callable[..., Any]


@cache
def _compile() -> _Compiled:
    """The functions of all buffers, so that those alike are compiled once."""
    import jax

    return _Compiled(
        jax.jit(_write, donate_argnums=0),
        jax.jit(_read, static_argnums=2),
        jax.jit(_draw, static_argnums=3),
    )


def _write(columns: Any, rows: Any, start: jax.Array, n: jax.Array) -> Any:
    """Write the first n of the rows into columns, from ``start`` on and round the end."""
    import jax
    import jax.numpy as jnp

    def write(column: jax.Array, rows: jax.Array) -> jax.Array:
        capacity, i = column.shape[0], jnp.arange(rows.shape[0], dtype=jnp.int32)
        slots = jnp.where(i < n, (start + i) % capacity, capacity + i)
        return column.at[slots].set(rows, mode="drop", unique_indices=True)

    return jax.tree.map(write, columns, rows)


def _read(columns: dict[str, jax.Array], start: jax.Array, n: int) -> dict[str, jax.Array]:
    """Rows of columns, n from ``start`` on and round the end."""
    import jax.numpy as jnp

    i = start + jnp.arange(n, dtype=jnp.int32)
    return {
        name: column.at[i % len(column)].get(mode="promise_in_bounds")
        for name, column in columns.items()
    }


def _draw(
    rows: Rows,
    at: jax.Array,
    words: jax.Array,
    config: SampleConfig,
    order: jax.Array | None,
) -> tuple[Any, Any]:
    """Let samplers choose rows, and gather these.

    Args:
        rows: the columns.
        at: (3, B) int32: where a step's trajectory begins in the ring, the step's position in it,
            and its length.
        words: (2,) uint32, random.
        config: which samplers, and what for.
        order: (capacity,) int32: the rows in the order in which trajectories follow each other,
            for which ``at`` counts then; None where they lie in the ring like that.
    """
    import jax
    import jax.numpy as jnp

    begin, position, length = at
    capacity = len(next(iter(rows.data.values())))

    def beside(values: jax.Array, positions: jax.Array) -> jax.Array:
        return values.reshape(-1, *[1] * (positions.ndim - 1))

    def take(column: jax.Array, positions: jax.Array) -> jax.Array:
        inside = jnp.clip(positions, 0, beside(length, positions) - 1)
        slots = (beside(begin, positions) + inside) % capacity
        if order is not None:
            slots = order.at[slots].get(mode="promise_in_bounds")
        return column.at[slots].get(mode="promise_in_bounds")

    def read(name: str, positions: jax.Array) -> jax.Array:
        return take(rows.data[name], positions)

    def sums(name: str, positions: jax.Array) -> jax.Array:
        # A trajectory that has lost its first rows still has them in its sums.
        first = jnp.zeros_like(position)
        lost, own = take(rows.sums[name], first), read(name, first).astype(jnp.float32)
        return take(rows.sums[name], positions) - beside(lost, positions) + beside(own, positions)

    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    steps = Steps(position, length, read, sums)
    data: dict[str, Any] = {}
    mask: dict[str, jax.Array] = {}
    for i, part in enumerate(config.parts):
        positions = part.sampler.draw(jax.random.fold_in(key, i), steps)
        mask[part.key] = (positions >= 0) & (positions < beside(length, positions))
        data |= nest(((part.key, *path), read(name, positions)) for path, name in part.leaves)
    if config.transform is not None:
        data, mask = config.transform(data, mask)
    return data, mask
