"""A slow, obvious model of the replay buffers: lists, against which random histories are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgeml.data import Batch, PrioritizedReplayBuffer, ReplayBuffer

SIDE = 33  # an image of more than 1 KiB, which is kept once
DEPTH = 3  # frames in a stack that comes as one

Frames = tuple[int, ...]


def observation(t: int, frames: Frames | None = None) -> dict[str, Any]:
    """One like no other t's; images repeat themselves after 251.

    Args:
        t: when it was.
        frames: of its stack, the oldest first (default: as they come one after the other).
    """
    frames = frames or tuple(range(t + 1 - DEPTH, t + 1))
    stack = np.stack([np.full((SIDE, SIDE, 1), f % 251, np.uint8) for f in frames])
    stack[:, :-1] = 7  # they differ in their last row only
    return {
        "image": np.full((SIDE, SIDE), t % 251, np.uint8),
        "state": np.array([t, -t], np.float32),
        "stack": stack,
    }


def transition(
    item_id: int,
    obs: int,
    following: int,
    terminated: bool,
    truncated: bool,
    lane: int | None = None,
    frames: tuple[Frames | None, Frames | None] = (None, None),
) -> dict[str, Any]:
    return {
        "observations": observation(obs, frames[0]),
        "next_observations": observation(following, frames[1]),
        "actions": np.int64(item_id),
        "rewards": np.float32(item_id % 7 - 2),
        "masks": np.float32(not terminated),
        "dones": np.bool_(terminated or truncated),
        "policy_version": np.int64(item_id // 4),
        **({} if lane is None else {"lane": np.int32(lane)}),
    }


Lane = tuple[str | None, int, int]
"""What the inserts call it, the number that the items' own store gave it, and their key."""


@dataclass
class Kept:
    """One item of the model."""

    obs: int
    following: int
    terminated: bool
    done: bool
    lane: Lane
    opening: int  # of its lane in the store: how many had been opened
    before: int  # id of the item that it follows upon; 0 for none
    after: int = 0  # and of that which follows upon it


class Model(RuleBasedStateMachine):
    """Histories of a replay buffer."""

    capacity = 5
    n_step = 1
    frame_stack = 1
    discount = 0.9
    lanes = 1
    named = False  # whether inserts tell lanes

    def make(self) -> ReplayBuffer:
        return ReplayBuffer(self.capacity, **self.options())

    def options(self) -> dict[str, Any]:
        return {
            "n_step": self.n_step,
            "frame_stack": self.frame_stack,
            "discount": self.discount,
            "lanes": self.lanes,
            "seed": 1,
        }

    @initialize()
    def begin(self) -> None:
        self.store = self.make()
        self.items: dict[int, Kept] = {}  # all since the last reset
        self.cuts: set[int] = set()  # ids before which there was an interruption
        self.latest = 0
        self.clock = 0
        self.frames: dict[int, Frames] = {}  # of each observation those in its stack
        self.newest: dict[Lane, int] = {}  # of each lane the id of its newest item
        self.ended: set[int] = set()  # ids upon which nothing follows
        self.openings: dict[tuple[str | None, int], int] = {}  # of lanes that are open
        self.opened = 0

    # Inserting ------------------------------------------------------------------------------

    def make_item(
        self, ending: str, follows: bool, key: int, moves_on: bool, name: str | None, part: int
    ) -> dict[str, Any]:
        """Return the next item, noted in the model."""
        lane = name, part, key % self.lanes
        if lane[:2] not in self.openings:
            self.opened += name is not None or part > 0
            self.openings[name, part] = self.opened if name is not None or part else 0
        last = self.newest.get(lane, 0)
        before = self.items.get(last)
        if before is not None and follows:
            obs = before.following
        else:
            self.clock += 1
            obs = self.clock
            self.frames[obs] = (obs,) * DEPTH  # as at the start of an episode
        self.clock += 1
        if moves_on:
            self.frames[self.clock] = (*self.frames[obs][1:], self.clock)
        else:
            self.frames[self.clock] = tuple(self.clock + 100 * place for place in range(DEPTH))
        self.latest += 1
        opening = self.openings[name, part]
        kept = Kept(obs, self.clock, ending == "terminated", ending != "", lane, opening, 0)
        if before is not None and last not in self.ended and follows:
            kept.before, before.after = last, self.latest
        if kept.done:
            self.ended.add(self.latest)
        self.newest[lane] = self.latest
        self.items[self.latest] = kept
        return self.as_inserted(self.latest)

    def as_inserted(self, item_id: int) -> dict[str, Any]:
        kept = self.items[item_id]
        truncated = kept.done and not kept.terminated
        lane = kept.lane[2] if self.lanes > 1 else None
        frames = self.frames[kept.obs], self.frames[kept.following]
        ends = kept.terminated, truncated
        return transition(item_id, kept.obs, kept.following, *ends, lane, frames)

    endings = st.sampled_from(["", "", "", "terminated", "truncated"])
    mostly = st.integers(0, 4).map(bool)
    steps = st.tuples(endings, mostly, st.integers(0, 2), mostly)
    names = st.sampled_from([None, "a", "b", "b"])

    @rule(step=steps, name=names)
    def insert(self, step: tuple[str, bool, int, bool], name: str | None) -> None:
        name = name if self.named else None
        self.store.insert(self.make_item(*step, name, 0), lane=name)

    @rule(
        steps=st.lists(st.tuples(steps, st.integers(0, 2)), max_size=14),
        columns=st.booleans(),
        name=names,
        cut=st.integers(0, 30),
    )
    def batch_insert(
        self,
        steps: list[tuple[tuple[str, bool, int, bool], int]],
        columns: bool,
        name: str | None,
        cut: int,
    ) -> None:
        name = name if self.named else None
        parts = [part if self.named else 0 for _, part in steps]
        items = []
        for i, (step, _) in enumerate(steps):
            if i == cut:
                self.note_cut(name)
            items.append(self.make_item(*step, name, parts[i]))
        if not columns and not any(parts) and cut >= len(items):
            self.store.batch_insert(items, lane=name)
            return
        batch = Batch.of(items).cut([cut] if cut < len(items) else [])
        if any(parts):
            batch = batch.in_lanes(np.array(parts))
        self.store.batch_insert(batch, lane=name)

    @rule(name=names)
    def interrupt(self, name: str | None) -> None:
        self.store.interrupt(name if self.named else None)
        self.note_cut(name if self.named else None)

    def note_cut(self, name: str | None) -> None:
        if name is None:
            if self.latest:
                self.cuts.add(self.latest + 1)
            self.ended.update(self.newest.values())
            return
        for lane in [lane for lane in self.openings if lane[0] == name]:
            del self.openings[lane]
        for lane in [lane for lane in self.newest if lane[0] == name]:
            del self.newest[lane]

    @rule(next_id=st.integers(1, 30))
    def reset(self, next_id: int) -> None:
        self.store.reset(next_id)
        self.items, self.cuts, self.newest, self.ended = {}, set(), {}, set()
        self.openings = {}
        self.latest = next_id - 1

    @rule(limit=st.integers(1, 9), anew=st.booleans())
    def save_and_load(self, limit: int, anew: bool) -> None:
        """Carry all over to another store, as a checkpoint does."""
        other = self.make()
        if not anew:  # into one that has been used before
            lane = 0 if self.lanes > 1 else None
            other.batch_insert(
                [transition(i, i, i + 1, False, i % 3 == 0, lane) for i in range(1, 9)]
            )
        state, parts, at = self.store.state(), [], 0
        while len((part := self.store.dump(at, limit=limit))[0]):
            parts.append(part)
            at = part[0].first_id + len(part[0]) - 1
        other.reset(parts[0][0].first_id if parts else self.latest + 1)
        for batch, extra in parts:
            other.restore(Batch.from_payload(batch.to_payload()), extra)
        other.set_state(state)
        self.store = other

    # Looking --------------------------------------------------------------------------------

    @property
    def held(self) -> list[int]:
        return [i for i in self.items if i > self.latest - self.capacity]

    @invariant()
    def holds_the_newest(self) -> None:
        assert self.store.latest_data_id() == self.latest
        assert len(self.store) == len(self.held)

    @rule(back=st.integers(0, 6), limit=st.one_of(st.none(), st.integers(0, 6)))
    def read(self, back: int, limit: int | None) -> None:
        after = max(0, self.latest - back)
        ids = [i for i in self.held if i > after][:limit]
        batch = self.store.get_latest_data(after, limit=limit)
        assert len(batch) == len(ids)
        assert batch.cuts == tuple(n for n, i in enumerate(ids) if i in self.cuts)
        openings = [self.items[i].opening for i in ids]
        if batch.lanes is None:
            assert not any(openings)
        else:
            numbers = batch.lanes.tolist()
            pairs = set(zip(openings, numbers, strict=True))
            assert len(pairs) == len(set(openings)) == len(set(numbers))
            assert all(bool(opening) == bool(number) for opening, number in pairs)
        for item, item_id in zip(batch, ids, strict=True):
            assert_same(item, self.as_inserted(item_id))

    @precondition(lambda self: self.held)
    @rule(n=st.integers(1, 12), lag=st.one_of(st.none(), st.integers(0, 2)))
    def sample(self, n: int, lag: int | None) -> None:
        batch = self.store.sample(n, max_policy_lag=lag)
        for i, item_id in enumerate(batch["actions"].tolist()):
            assert item_id in self.held
            if lag is not None:
                assert item_id // 4 >= self.latest // 4 - lag
            assert_same(
                {key: take(value, i) for key, value in batch.items() if key not in self.added},
                self.expected(item_id),
            )

    @precondition(lambda self: self.held)
    @rule()
    def sample_some_keys(self) -> None:
        keys = ["actions", "next_observations"]
        out = self.store.empty_batch(3, keys)
        assert self.store.sample(3, keys=keys, out=out) is out
        assert list(out) == keys
        for i, item_id in enumerate(out["actions"].tolist()):
            expected = self.expected(item_id)["next_observations"]
            assert_same(take(out["next_observations"], i), expected)

    @precondition(lambda self: self.held)
    @rule(n=st.integers(1, 12))
    def sample_packed(self, n: int) -> None:
        """One array has the frames of both observations, or it is refused."""
        if self.n_step > 1:
            with pytest.raises(ValueError, match="n_step"):
                self.store.sample(n, pack_obs_and_next_obs=True)
            return
        apart = self.frame_stack == 1 and any(map(self.stands_apart, self.held))
        try:
            batch = self.store.sample(n, pack_obs_and_next_obs=True)
        except ValueError:
            if not apart:
                raise
            return
        for i, item_id in enumerate(batch["actions"].tolist()):
            expected = self.expected(item_id)
            now = expected["observations"]["stack"]
            following = expected["next_observations"].pop("stack")
            assert (now[1:] == following[:-1]).all()
            expected["observations"]["stack"] = np.concatenate([now, following[-1:]])
            assert_same(
                {key: take(value, i) for key, value in batch.items() if key not in self.added},
                expected,
            )

    def stands_apart(self, item_id: int) -> bool:
        """Whether an item's two stacks have other frames in common than all but one."""
        kept = self.items[item_id]
        return self.frames[kept.obs][1:] != self.frames[kept.following][:-1]

    added: tuple[str, ...] = ()

    def expected(self, item_id: int) -> dict[str, Any]:
        """What a sample of this item is."""
        ids = [item_id]
        while len(ids) < self.n_step and (after := self.items[ids[-1]].after):
            ids.append(after)
        end = self.items[ids[-1]]
        rewards = [self.discount**j * (i % 7 - 2) for j, i in enumerate(ids)]
        expected: dict[str, Any] = {
            "observations": self.stacked(item_id, None),
            "next_observations": self.stacked(ids[-1], end.following),
            "actions": np.int64(item_id),
            "rewards": np.float32(sum(rewards)),
            "masks": np.float32(not end.terminated),
            "dones": np.bool_(end.done),
            "policy_version": np.int64(item_id // 4),
        }
        if self.lanes > 1:
            expected["lane"] = np.int32(self.items[item_id].lane[2])
        if self.n_step > 1:
            expected["discounts"] = np.float32(self.discount ** len(ids) * (not end.terminated))
        return expected

    def stacked(self, item_id: int, following: int | None) -> dict[str, Any]:
        frames = [self.items[item_id].obs]
        spare = (self.frame_stack - 1) * (1 if self.lanes == 1 else 2 * self.lanes)
        gone = max(0, self.latest - self.capacity - spare)  # up to here nothing is left
        while len(frames) < self.frame_stack:
            before = self.items[item_id].before
            item_id = before if before > gone else item_id
            frames.insert(0, self.items[item_id].obs)
        if following is not None:
            frames = [*frames[1:], following]
        observations = [observation(t, self.frames[t]) for t in frames]
        if self.frame_stack == 1:
            return observations[0]
        return {key: np.stack([o[key] for o in observations]) for key in observations[0]}


class PrioritizedModel(Model):
    """Histories of a prioritized one."""

    alpha, beta, epsilon = 0.7, 0.5, 0.01
    added = ("ids", "weights")

    def make(self) -> ReplayBuffer:
        return PrioritizedReplayBuffer(
            self.capacity,
            alpha=self.alpha,
            beta=self.beta,
            epsilon=self.epsilon,
            **self.options(),
        )

    @initialize()
    def begin_priorities(self) -> None:
        self.priorities: dict[int, float] = {}
        self.highest = 1.0
        self.stale = 0

    @invariant()
    def new_items_have_the_highest(self) -> None:
        if hasattr(self, "priorities"):
            self.priorities = {i: self.priorities.get(i, self.highest) for i in self.held}

    @rule(
        changes=st.lists(
            st.tuples(st.integers(0, 7), st.sampled_from([0.0, 0.1, 1.0, 5.0])), max_size=6
        )
    )
    def update_priorities(self, changes: list[tuple[int, float]]) -> None:
        changes = [(self.latest - back, p) for back, p in changes if self.latest - back >= 1]
        assert isinstance(self.store, PrioritizedReplayBuffer)
        self.store.update_priorities([i for i, _ in changes], [p for _, p in changes])
        for item_id, priority in changes:
            if item_id in self.held:
                self.priorities[item_id] = priority
                self.highest = max(self.highest, priority)
            else:
                self.stale += 1
        assert self.store.stale == self.stale

    @precondition(lambda self: self.held)
    @rule(n=st.integers(1, 12))
    def sample_weighted(self, n: int) -> None:
        batch = self.store.sample(n)
        assert batch["ids"].tolist() == batch["actions"].tolist()
        lowest = min((p + self.epsilon) ** self.alpha for p in self.priorities.values())
        for item_id, weight in zip(batch["ids"].tolist(), batch["weights"], strict=True):
            value = (self.priorities[item_id] + self.epsilon) ** self.alpha
            np.testing.assert_allclose(weight, (value / lowest) ** -self.beta, rtol=1e-5)

    @rule(next_id=st.integers(1, 30))
    def reset(self, next_id: int) -> None:
        super().reset(next_id)
        self.priorities = {}


def take(node: Any, i: int) -> Any:
    """One item of a batch."""
    if isinstance(node, dict):
        return {key: take(child, i) for key, child in node.items()}
    return node[i]


def assert_same(left: Any, right: Any) -> None:
    """Equal in structure, dtypes and values, which may differ by a rounding of float32."""
    if isinstance(right, dict):
        assert left.keys() == right.keys()
        for key, child in right.items():
            assert_same(left[key], child)
        return
    assert np.asarray(left).dtype == np.asarray(right).dtype
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)
