"""How a new chunk and those before it become one plan: the rules, which are plain values.

A rule is asked for one step at a time, when it is played: which of the chunks that have a value for
it count, and how much. So what is too old by then is simply not among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from edgeml.core.errors import Malformed, shown
from edgeml.data.tree import describe, fill, is_plain, leaves_of, paths_of, skeleton_of

__all__ = [
    "Blend",
    "Chunk",
    "Ensemble",
    "Merge",
    "Names",
    "Planned",
    "RealTime",
    "Rule",
    "Where",
    "components_of",
    "mix",
    "rule_of",
]

Array = np.ndarray[Any, Any]
Only: TypeAlias = "Sequence[str | int] | None"
Names: TypeAlias = Mapping[tuple[str, ...], Sequence[str]]
"""Names of the components along the last axis of an action's parts, by the keys that lead there."""


# Chunks -----------------------------------------------------------------------------------


class Chunk:
    """The actions of some steps: arrays with the steps along their first axis.

    Args:
        actions: an array, or dicts of arrays, nested as an action is; it is copied.

    Raises:
        Malformed: it is no such thing, or has a value that is not finite; the text says where.
    """

    def __init__(self, actions: Any) -> None:
        arrays = _arrays_of(actions, ())
        self.skeleton = skeleton_of(arrays)
        self.leaves: list[Array] = leaves_of(self.skeleton, arrays)
        self.paths = paths_of(self.skeleton)
        lengths = {len(leaf) for leaf in self.leaves}
        if len(lengths) != 1 or lengths == {0}:
            raise Malformed(
                "all parts of a chunk have one number of steps along their first axis, at least "
                f"one; these have {sorted(lengths) or 'no parts'}"
            )
        self.steps: int = lengths.pop()

    def is_like(self, other: Chunk) -> bool:
        """Whether its actions are built as another's."""
        return bool(self.skeleton == other.skeleton) and all(
            mine.shape[1:] == theirs.shape[1:] and mine.dtype == theirs.dtype
            for mine, theirs in zip(self.leaves, other.leaves, strict=True)
        )

    def describe(self) -> str:
        """Return what an action of it is like."""
        parts = zip(self.paths, self.leaves, strict=True)
        return ", ".join(
            f"{'/'.join(path) or 'an array'}: {leaf.shape[1:]} {leaf.dtype}" for path, leaf in parts
        )

    def rest(self, first: int) -> Any:
        """Return a copy of the steps from one on, built as the policy gave them."""
        return fill(self.skeleton, [leaf[first:].copy() for leaf in self.leaves])


def _arrays_of(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        node = node._asdict()
    if isinstance(node, Mapping):
        if not all(isinstance(key, str) for key in node):
            raise Malformed(f"the keys of an action are str, not {shown(list(node))}")
        # Sorted, for a policy may name them in another order each time.
        return {key: _arrays_of(node[key], (*path, key)) for key in sorted(node)}
    where = "/".join(path) or "a chunk"
    try:
        array = np.array(node)  # a copy, for its owner may write there again
    except ValueError:
        raise Malformed(f"{where} is ragged: its parts have different lengths") from None
    if not is_plain(array.dtype) or not array.ndim:
        raise Malformed(
            f"{where} is an array of numbers whose first axis is the steps, not {describe(node)}"
        )
    if _is_float(array.dtype) and not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array))[0][0])
        raise Malformed(f"{where} has a value that is not finite, at step {step}")
    return array


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


@dataclass(eq=False)
class Planned:
    """A chunk that has its place among the steps, which are counted as they are played.

    Attributes:
        chunk: what is to be played.
        number: of its request; a greater one is newer.
        observed_at: seconds of the robot's clock.
        observation_id: of what it was made from, if that has one.
        version: of the policy, if that is known.
        anchor: the step for which its first action is meant.
        start: the step from which on it counts.
        end: the step before which it ends.
    """

    chunk: Chunk
    number: int
    observed_at: float
    observation_id: int | None
    version: int | None
    anchor: int
    start: int
    end: int


# Rules ------------------------------------------------------------------------------------


class Rule:
    """What is common to all rules; each says what differs."""

    aligned: ClassVar[bool] = True
    """Whether a chunk's first action is meant for the step of its observation."""
    eager: ClassVar[bool] = False
    """Whether the next chunk is asked for as soon as there is an answer."""
    tells: ClassVar[bool] = False
    """Whether a request has what is left of the plan, and how late the answer will be."""

    def place(self, plan: list[Planned], new: Planned) -> list[Planned]:
        """Return a plan, oldest chunk first, with a new one."""
        return [new]

    def weigh(self, plan: Sequence[Planned], position: int) -> list[float]:
        """Return how much each counts of those that have a value for a step, oldest first."""
        return [1.0]

    def averaged(self) -> Only:
        """Return the names of those components that are averaged; None for all that can be."""
        return None


@dataclass(frozen=True)
class Append(Rule):
    """One chunk after the other."""

    aligned: ClassVar[bool] = False

    def place(self, plan: list[Planned], new: Planned) -> list[Planned]:
        """Return a plan with a new chunk at its end."""
        return [*plan, new]

    def weigh(self, plan: Sequence[Planned], position: int) -> list[float]:
        """Return the weight of the one that there is: no two have a value for one step."""
        return [1.0]


@dataclass(frozen=True)
class Aligned(Rule):
    """The newest chunk alone, from the step on that is played when it comes."""


@dataclass(frozen=True)
class RealTime(Rule):
    """Real-time chunking (Black et al. 2025, https://arxiv.org/abs/2506.07339).

    The policy makes a chunk that goes on smoothly from the one that is being played; here it is
    merged as ``"aligned"``. For that a request has two things more. ``prev_chunk`` is what is left
    of the newest chunk from the observation's step on, built as the policy gave it, or None where
    nothing is. ``inference_delay`` is how many of these steps will have been played when the answer
    comes, by the worst of the last 10. An observation that is a dict has them as two keys more; any
    other is sent as ``{"observation": ..., "prev_chunk": ..., "inference_delay": ...}``.
    """

    tells: ClassVar[bool] = True


@dataclass(frozen=True)
class Blend(Rule):
    """Pass from the plan to a new chunk little by little.

    Args:
        steps: over how many steps, or as many as were left: of the i-th, from 1, the new chunk's
            share is i / steps.
        only: names of the components that are averaged; all others, a gripper say, have the new
            chunk's value at once. A name is a key of the action, ``"arm"``, or several,
            ``"arm/joints"``; a component's own where the policy's contract has names; or an index
            along the last axis, where the action is one array. By default all numbers with
            fractions are averaged; others never are.
    """

    steps: int = 10
    only: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"steps is a number of control steps, not {shown(self.steps)}")
        _check_names(self.only)

    def place(self, plan: list[Planned], new: Planned) -> list[Planned]:
        """Return the plan with a new chunk, beyond whose end the others don't count."""
        for old in plan:
            old.end = min(old.end, new.end)
        whole = [i for i, old in enumerate(plan) if new.start - old.start >= self.steps - 1]
        return [*plan[whole[-1] if whole else 0 :], new]  # what it has replaced is not needed

    def weigh(self, plan: Sequence[Planned], position: int) -> list[float]:
        """Return each one's share, which grows with the steps since it came."""
        shares = [1.0]
        for old, each in itertools.pairwise(plan):
            over = max(1, min(self.steps, old.end - each.start))
            new = min(1.0, (position - each.start + 1) / over)
            shares = [*(share * (1.0 - new) for share in shares), new]
        return shares

    def averaged(self) -> Only:
        """Return the names of those components that are averaged; None for all that can be."""
        return self.only


@dataclass(frozen=True)
class Ensemble(Rule):
    """Average all chunks that have a value for a step (ACT's ensembling, Zhao et al. 2023).

    The next chunk is asked for as soon as there is an answer, so that there are many.

    Args:
        decay: the weight of a chunk is exp(-decay * i), where i counts from 0 for the oldest, as in
            https://arxiv.org/abs/2304.13705, where a chunk comes at each step. Here they come more
            seldom and later, and a negative one, by which new chunks count more, follows better:
            with log(0.5) each counts twice as much as the one before.
        only: names of the components that are averaged, as for `Blend`.
    """

    decay: float = 0.01
    only: Sequence[str | int] | None = None
    eager: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.decay, (bool, str)) or not math.isfinite(self.decay):
            raise ValueError(f"decay is a number, not {shown(self.decay)}")
        _check_names(self.only)

    def place(self, plan: list[Planned], new: Planned) -> list[Planned]:
        """Return the plan with a new chunk among the others."""
        return [*plan, new]

    def weigh(self, plan: Sequence[Planned], position: int) -> list[float]:
        """Return each one's weight."""
        return [math.exp(-self.decay * i) for i in range(len(plan))]

    def averaged(self) -> Only:
        """Return the names of those components that are averaged; None for all that can be."""
        return self.only


Merge: TypeAlias = "Literal['append', 'aligned'] | Rule"
"""A rule, or the name of one that has no settings."""

_NAMED = {"append": Append, "aligned": Aligned}


def rule_of(merge: Merge) -> Rule:
    """Return the rule that is meant.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(merge, Rule):
        return merge
    if not isinstance(merge, str) or merge not in _NAMED:
        raise ValueError(
            f"merge is {' or '.join(map(repr, _NAMED))}, or Blend(...), Ensemble(...) or "
            f"RealTime(), not {shown(merge)}"
        )
    return _NAMED[merge]()


def _check_names(only: Only) -> None:
    if only is None:
        return
    if isinstance(only, str) or not all(isinstance(name, (str, int)) for name in only):
        raise ValueError(f"only is a list of names or indices, not {shown(only)}")


# One action of several chunks -------------------------------------------------------------

Where: TypeAlias = "bool | list[int]"
"""Which components of a part are averaged: all, none, or those of an index."""


def components_of(only: Only, chunk: Chunk, names: Names) -> list[Where]:
    """Return what is averaged of each part of an action.

    Args:
        only: see `Blend`.
        chunk: one of those that are averaged.
        names: of components, where they have any.

    Raises:
        ValueError: a name is none of a component that can be averaged.
    """
    floats = [_is_float(leaf.dtype) for leaf in chunk.leaves]
    if only is None:
        return list(floats)
    found: list[Where] = [False] * len(floats)
    for name in only:
        hits = [_named(name, i, chunk, names) for i in range(len(floats))]
        if not any(hits) or any(
            hit and not number for hit, number in zip(hits, floats, strict=True)
        ):
            called = [name for each in names.values() for name in each]
            raise ValueError(
                f"only has {name!r}, which is no component that can be averaged of an action with "
                f"{chunk.describe()}{' and names ' + ', '.join(called) if called else ''}"
            )
        found = [_either(a, b) for a, b in zip(found, hits, strict=True)]
    return found


def _named(name: str | int, part: int, chunk: Chunk, names: Names) -> Where:
    """Which components of a part have a name."""
    path, leaf = chunk.paths[part], chunk.leaves[part]
    components = leaf.shape[-1] if leaf.ndim > 1 else 0
    if isinstance(name, int):
        there = len(chunk.leaves) == 1 and -components <= name < components
        return [name % components] if there else False
    keys = tuple(name.split("/"))
    if keys == path[: len(keys)]:
        return True
    called = list(names.get(path, ()))
    return [called.index(name)] if name in called and len(called) == components else False


def _either(one: Where, other: Where) -> Where:
    if isinstance(one, bool) or isinstance(other, bool):
        return one or other if not (one is True or other is True) else True
    return sorted({*one, *other})


def mix(
    plan: Sequence[Planned], weights: Sequence[float], position: int, where: Sequence[Where]
) -> Any:
    """Return the action of a step, made of those chunks that have a value for it.

    Args:
        plan: these chunks, oldest first.
        weights: how much each counts.
        position: the step.
        where: what is averaged of each part; all else is the newest one's.
    """
    total = sum(weights)
    leaves = []
    for part, averaged in enumerate(where):
        values = [each.chunk.leaves[part][position - each.anchor] for each in plan]
        leaf = values[-1].copy()  # the caller's own
        if averaged and len(plan) > 1:
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
            if averaged is True:
                leaf = mean.astype(leaf.dtype)
            else:
                leaf[..., averaged] = mean[..., averaged]
        leaves.append(leaf)
    return fill(plan[-1].chunk.skeleton, leaves)
