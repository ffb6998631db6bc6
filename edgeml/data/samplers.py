"""Which rows of a trajectory a sample is made of, given one step of it.

A `TrajectoryBuffer` draws steps, and for each part of a batch a sampler tells which rows of the
same trajectory that part is taken from. Samplers run inside `jax.jit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

if TYPE_CHECKING:
    import jax

__all__ = [
    "FutureSampler",
    "LatestSampler",
    "PrioritySampler",
    "Sampler",
    "SequenceSampler",
    "Steps",
]

Distribution: TypeAlias = Literal["uniform", "exponential"]


class Steps(NamedTuple):
    """A batch of B steps, each in its trajectory: what samplers are given.

    Positions count the rows of a trajectory that are held, from 0.

    Attributes:
        position: (B,) int32, where the step is.
        length: (B,) int32, how many rows of its trajectory are held.
        read: ``read(name, positions)`` gives the data of that name in the rows at the positions,
            which are of shape (B,) or (B, ...); those outside count as the nearest inside.
        sums: ``sums(name, positions)`` gives the sums of that data over all rows up to and with
            these, float32. Only for the name in `Sampler.priority`.
    """

    position: jax.Array
    length: jax.Array
    read: Callable[[str, jax.Array], jax.Array]
    sums: Callable[[str, jax.Array], jax.Array]


class Sampler(ABC):
    """Tells which rows of a trajectory to take, given one step of it.

    One of your own defines `draw` and, if it likes, the attributes. Compiled code is shared
    between samplers that are equal, so let it be a frozen dataclass, or never change it.

    Attributes:
        source: name of the data to be taken, a leaf or a dict of leaves, all from the same row.
            None: the name under which the sampler is registered.
        priority: name of the data whose running sums `draw` asks for, if any.
    """

    source: str | None = None
    priority: str | None = None

    @abstractmethod
    def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
        """Return positions in the steps' trajectories; it is traced by `jax.jit`.

        Args:
            key: a random key of its own.
            steps: a batch of B steps.

        Returns:
            Integers of shape (B,), or (B, T). One below 0, or not below the length, means that
            there is no such row: the nearest one is taken, and the mask is False there.
        """


@dataclass(frozen=True)
class LatestSampler(Sampler):
    """The step itself: data of shape (B, ...), and a mask (B,) that is True.

    Args:
        source: name of the data (default: that under which the sampler is registered).
    """

    source: str | None = None

    def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
        """See `Sampler.draw`."""
        del key
        return steps.position


@dataclass(frozen=True)
class SequenceSampler(Sampler):
    """Steps i + begin to i + end - 1 around step i: data of shape (B, T, ...), a mask (B, T).

    What would lie before the first or past the last row of the trajectory is that row again, and
    masked. To have none of this, register it with a ``sample_range`` that covers it.

    **Burn-in**, for recurrent networks that train on stored sequences (R2D2, Kapturowski et al.
    2019): 40 steps that only bring the recurrent state up to date, then 80 that are learned from::

        buffer.register_sample_config("r2d2", {
            "observations": SequenceSampler(-40, 80),
            "states": SequenceSampler(-40, -39, squeeze=True),  # to start from, as it was stored
        }, sample_range=(0, 80))

    Where a trajectory has fewer than 40 steps before, the masked ones come first, and the state
    is that of its first step: leave it as it is while the mask is False. With
    ``sample_range=(-40, 80)`` all 120 are always there, but then the first 40 steps of
    trajectories are never learned from.

    Args:
        begin: offset of the first step; negative for steps before.
        end: offset after the last one.
        squeeze: leave the axis T out; only where ``end - begin`` is 1.
        source: name of the data (default: that under which the sampler is registered).
    """

    begin: int
    end: int
    squeeze: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        if self.begin >= self.end:
            raise ValueError(f"a sequence from {self.begin} to {self.end} has no steps")
        if self.squeeze and self.end - self.begin != 1:
            raise ValueError("only a sequence of one step can be squeezed")

    def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
        """See `Sampler.draw`."""
        import jax.numpy as jnp

        del key
        if self.squeeze:
            return steps.position + self.begin
        return steps.position[:, None] + jnp.arange(self.begin, self.end, dtype=jnp.int32)


@dataclass(frozen=True)
class FutureSampler(Sampler):
    """A later step of the same trajectory: data of shape (B, ...), and a mask (B,).

    It is a goal that was reached, for hindsight (HER's strategy "future", Andrychowicz et al.
    2017). Offsets count from 1: the step itself is no future one. The last step has none, and
    gives itself, masked.

    Args:
        distribution: "uniform" (default) over all later steps; or "exponential", where offset k
            has a probability proportional to ``exp(-lambda_ * k)``. What lies past the end of the
            trajectory is left out of both, not moved to the end.
        max_future: the largest offset (default: none).
        lambda_: rate of the exponential, 1/steps; ``-log(discount)`` for the discounted future.
        source: name of the data (default: that under which the sampler is registered).
    """

    distribution: Distribution = "uniform"
    max_future: int | None = None
    lambda_: float = 0.1
    source: str | None = None

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"distribution is one of {get_args(Distribution)}, got {self.distribution!r}"
            )
        if self.max_future is not None and self.max_future < 1:
            raise ValueError(f"max_future must be at least 1, got {self.max_future}")
        if not self.lambda_ > 0:
            raise ValueError(f"lambda_ must be positive, got {self.lambda_}")

    def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
        """See `Sampler.draw`."""
        import jax
        import jax.numpy as jnp

        most = steps.length - 1 - steps.position
        if self.max_future is not None:
            most = jnp.minimum(most, self.max_future)
        most = jnp.maximum(most, 1)  # which leads past the end from the last step
        if self.distribution == "uniform":
            offset = jax.random.randint(key, most.shape, 1, most + 1, dtype=most.dtype)
        else:
            # The inverse of the distribution function (1 - exp(-lambda k)) / (1 - exp(-lambda n)).
            uniform = jax.random.uniform(key, most.shape, jnp.float32)
            passed = uniform * -jnp.expm1(-self.lambda_ * most)
            offset = 1 + jnp.floor(-jnp.log1p(-passed) / self.lambda_).astype(most.dtype)
            offset = jnp.minimum(offset, most)  # rounding
        return steps.position + offset


@dataclass(frozen=True)
class PrioritySampler(Sampler):
    """A step of the same trajectory, drawn in proportion to a priority: (B, ...), a mask (B,).

    The step that the buffer drew only chooses the trajectory. A priority of 0 is never drawn.
    Where all of a trajectory's are 0, the mask is False.

    It looks the step up in running sums, which the buffer keeps in float32: so a step's
    probability is right to about 1e-7, the whole trajectory's being 1. Steps that the ring has
    overwritten count in the whole, but no more than one round of them.

    Args:
        priority: name of the data that is the priority: one number for each step, at least 0, such
            as a TD error. The buffer refuses other numbers once a sampler is registered.
        source: name of the data to be taken (default: that under which the sampler is registered).
    """

    priority: str = field()  # or it would take its default from the base class
    source: str | None = None

    def draw(self, key: jax.Array, steps: Steps) -> jax.Array:
        """See `Sampler.draw`."""
        import jax
        import jax.numpy as jnp

        total = steps.sums(self.priority, steps.length - 1)
        target = jax.random.uniform(key, total.shape, total.dtype) * total  # is below the total

        # The first position whose sum is above the target lies between these.
        def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) // 2
            above = steps.sums(self.priority, middle) > target
            return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

        low, _ = jax.lax.while_loop(
            lambda bounds: (bounds[0] < bounds[1]).any(),
            halve,
            (jnp.zeros_like(steps.length), steps.length - 1),
        )
        return jnp.where(total > 0, low, -1)
