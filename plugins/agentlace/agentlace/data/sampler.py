"""Which rows of a trajectory a batch is made of; see `edgeml.data.Sampler`."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import edgeml.data
from edgeml.data import PrioritySampler, Sampler

__all__ = ["FutureSampler", "LatestSampler", "PrioritySampler", "Sampler", "SequenceSampler"]


class LatestSampler(edgeml.data.LatestSampler):
    """The step itself.

    Args:
        source: name of the data (default: that under which the sampler is registered).
        use_jax: has no effect.
    """

    def __init__(self, source: str | None = None, use_jax: bool = False) -> None:
        del use_jax
        super().__init__(source)


class SequenceSampler(edgeml.data.SequenceSampler):
    """Steps i + begin to i + end - 1 around step i; see `edgeml.data.SequenceSampler`."""

    def __init__(
        self, squeeze: bool = False, begin: int = 0, end: int = 1, source: str | None = None
    ) -> None:
        super().__init__(begin, end, squeeze, source)


class FutureSampler(edgeml.data.FutureSampler):
    """A later step of the same trajectory; see `edgeml.data.FutureSampler`.

    Args:
        distribution: of how much later it is.
        max_future: the largest offset (default: none).
        lambda_: the mean offset of the exponential distribution.
        source: name of the data (default: that under which the sampler is registered).
    """

    class Distribution(IntEnum):
        """Of the offsets."""

        UNIFORM = 0
        EXPONENTIAL = 1

    def __init__(
        self,
        distribution: Any = Distribution.UNIFORM,
        max_future: int | None = None,
        lambda_: float | None = None,
        source: str | None = None,
    ) -> None:
        name = self.Distribution(distribution).name.lower()
        rate = {} if lambda_ is None else {"lambda_": 1 / lambda_}  # edgeml has the rate
        super().__init__(name, max_future, source=source, **rate)  # type: ignore[arg-type]
