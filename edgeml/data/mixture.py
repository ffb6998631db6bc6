"""Batches drawn from several stores at a fixed ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from edgeml.data.locks import make_lock
from edgeml.data.plans import check_size
from edgeml.data.prefetch import Prefetch
from edgeml.data.tree import describe

__all__ = ["Mixture", "Samples"]


class Samples(Protocol):
    """What a mixture is made of: a replay buffer, or another mixture."""

    def sample(
        self,
        batch_size: int,
        *,
        keys: Iterable[Any] | None = None,
        out: Any = None,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Draw a batch."""

    def empty_batch(
        self,
        batch_size: int,
        keys: Iterable[Any] | None = None,
        *,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Return a batch to write to."""


class Mixture:
    """Draws each batch from several sources, such as what is seen online and demonstrations.

    ::

        mixture = Mixture([(online, 0.5), (demonstrations, 0.5)])
        batch = mixture.sample(256)  # 128 items of each, those of the first source first

    Half and half, with everything else as it was, is RLPD's "symmetric sampling" (Ball et al.
    2023, arXiv 2302.02948). Where a share is no whole number of items, the shares differ by one
    from batch to batch, so that they are right in the long run.

    The first source gives the batches their structure. Keys that only some sources have, such as
    the ``weights`` of a `PrioritizedReplayBuffer`, are left out by naming ``keys``.

    A batch is not shuffled: where it is cut into several, shuffle it, or sample each.

    Args:
        sources: pairs of a store and how much of each batch comes from it; these are numbers
            above 0, of which only the ratio counts. In place of a store any function of the batch
            size and the keys will do that gives such a batch: ``lambda n, keys: ...``. The arrays
            may be JAX's, and come to the host.

    Raises:
        ValueError: no sources, or a share that is not above 0.
        TypeError: a source that is none, such as a `TrajectoryBuffer`: give a function.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Samples | Callable[[int, Iterable[Any] | None], Any], float]],
    ) -> None:
        shares = np.array([share for _, share in sources], np.float64)
        if not len(shares) or not (np.isfinite(shares) & (shares > 0)).all():
            raise ValueError(f"at least one source, with shares above 0, got {shares.tolist()}")
        self._sources = [source for source, _ in sources]
        for source in self._sources:
            if not callable(source) and not hasattr(source, "empty_batch"):
                raise TypeError(
                    f"a {type(source).__name__} gives no batches by itself: give a function, such "
                    "as lambda n, keys: buffer.sample('training', n)[0]"
                )
        self._shares = shares / shares.sum()
        self._lock = make_lock()
        self._owed = np.zeros(len(shares))  # what earlier batches were short of, or over (below 0)

    def sample(
        self,
        batch_size: int,
        *,
        keys: Iterable[Any] | None = None,
        out: Any = None,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Draw a batch; see `ReplayBuffer.sample`. Functions among the sources pack by themselves.

        Raises:
            ValueError: what the sources raise, or they don't agree in structure.
        """
        batch_size = check_size(batch_size)
        keys = None if keys is None else tuple(keys)
        options: dict[str, Any] = {"pack_obs_and_next_obs": True} if pack_obs_and_next_obs else {}
        batch = self.empty_batch(batch_size, keys, **options) if out is None else out
        start = 0
        parts = self._divide(batch_size)
        for number, (source, n) in enumerate(zip(self._sources, parts, strict=True)):
            if not n:
                continue
            part = _cut(batch, slice(start, start + n), batch_size)
            with self._name_source(number):
                if callable(source):
                    _copy(source(n, keys), part, "batch")
                else:
                    source.sample(n, keys=keys, out=part, **options)
            start += n
        return batch

    def empty_batch(
        self,
        batch_size: int,
        keys: Iterable[Any] | None = None,
        *,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Return a batch as `sample` gives it, with anything in it, for its ``out``."""
        options: dict[str, Any] = {"pack_obs_and_next_obs": True} if pack_obs_and_next_obs else {}
        batch_size = check_size(batch_size)
        first = self._sources[0]
        with self._name_source(0):
            if not callable(first):
                return first.empty_batch(batch_size, keys, **options)
            batch: dict[Any, Any] = _make_empty(first(1, keys), batch_size)
            return batch

    def prefetch(
        self,
        batch_size: int,
        *,
        device: Any = None,
        depth: int = 2,
        keys: Any = None,
        pack_obs_and_next_obs: bool = False,
    ) -> Prefetch[dict[Any, Any]]:
        """Return an endless iterator of samples drawn ahead; see `ReplayBuffer.prefetch`."""
        keys = None if keys is None else tuple(keys)  # an iterator would do for one batch only

        def sample() -> dict[Any, Any]:
            return self.sample(batch_size, keys=keys, pack_obs_and_next_obs=pack_obs_and_next_obs)

        return Prefetch(sample, device=device, depth=depth)

    @contextmanager
    def _name_source(self, number: int) -> Iterator[None]:
        """Tell whose a ValueError is."""
        try:
            yield
        except ValueError as error:
            kind = type(self._sources[number]).__name__
            raise ValueError(
                f"source {number} of the mixture, a {kind} (of {len(self._sources)}, counted from "
                f"0): {error}"
            ) from error

    def _divide(self, batch_size: int) -> list[int]:
        """How many items come from each source: whole numbers, and over time the right ones."""
        with self._lock:
            due = self._shares * batch_size + self._owed
            parts = np.maximum(np.floor(due), 0).astype(int)
            for _ in range(batch_size - int(parts.sum())):
                parts[np.argmax(due - parts)] += 1
            for _ in range(int(parts.sum()) - batch_size):
                parts[np.argmin(np.where(parts > 0, due - parts, np.inf))] -= 1
            self._owed = due - parts
        counts: list[int] = parts.tolist()
        return counts


def _cut(batch: Any, part: slice, n: int) -> Any:
    """A part of a batch of n items."""
    if isinstance(batch, dict):
        return {key: _cut(child, part, n) for key, child in batch.items()}
    if len(batch) != n:
        raise ValueError(f"out has arrays of {len(batch)} items for a batch of {n}")
    return batch[part]


def _make_empty(batch: Any, n: int) -> Any:
    if isinstance(batch, dict):
        return {key: _make_empty(child, n) for key, child in batch.items()}
    return np.empty((n, *batch.shape[1:]), batch.dtype)


def _copy(batch: Any, into: Any, path: str) -> None:
    if not isinstance(into, dict):
        array = np.asarray(batch)
        if array.shape != into.shape or not np.can_cast(array.dtype, into.dtype, "same_kind"):
            raise ValueError(f"{path}: expected {describe(into)}, got {describe(array)}")
        into[...] = array
        return
    if not isinstance(batch, dict) or batch.keys() != into.keys():
        raise ValueError(f"{path}: the first source has {list(into)}, another one not: name keys=")
    for key, child in into.items():
        _copy(batch[key], child, f"{path}[{key!r}]")
