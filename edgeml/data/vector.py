"""Transitions of gymnasium's vector environments, in whichever way these begin episodes anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeml.data.batch import Batch
from edgeml.data.transitions import LANE
from edgeml.data.tree import Array, fill, leaves_of, skeleton_of

__all__ = ["VectorTransitions"]

_MODES = ("NextStep", "SameStep", "Disabled")  # values of gymnasium's AutoresetMode


class VectorTransitions:
    """Makes transitions of the steps of a gymnasium vector environment.

    ::

        envs = gymnasium.make_vec("Hopper-v5", num_envs=8)
        store = ReplayBufferDataStore(
            envs.single_observation_space, envs.single_action_space, 100_000,
            n_step=3, lanes=envs.num_envs,
        )
        transitions = VectorTransitions(envs)
        observations, _ = envs.reset()
        transitions.begin(observations)
        while True:
            actions = policy(observations)
            step = envs.step(actions)
            store.batch_insert(transitions.take_step(actions, *step))
            observations = step[0]

    It knows gymnasium's three ways to begin an episode anew. In NEXT_STEP mode, the step after an
    episode's end only resets that environment, and makes no transition. In SAME_STEP mode, the
    observation that ended the episode is taken from ``infos["final_obs"]``. In DISABLED mode,
    reset the environments whose episodes are over, and tell::

            over = step[2] | step[3]
            if over.any():
                observations, _ = envs.reset(options={"reset_mask": over})
                transitions.begin(observations, over)

    Args:
        envs: the vector environment, of gymnasium 1.0 or later.

    Raises:
        ValueError: ``envs.metadata["autoreset_mode"]`` is none of the three.
    """

    def __init__(self, envs: Any) -> None:
        mode = (getattr(envs, "metadata", None) or {}).get("autoreset_mode", "NextStep")
        self._mode = getattr(mode, "value", mode)
        if self._mode not in _MODES:
            raise ValueError(f"autoreset_mode is one of {_MODES}, got {mode!r}")
        self._n: int = envs.num_envs
        self._lanes = np.arange(self._n, dtype=np.int32)
        self._over = np.ones(self._n, np.bool_)  # no episode is under way
        self._skeleton: Any = None
        self._leaves: list[Array] = []  # of the observations that the next step starts from

    def begin(self, observations: Any, mask: Any = None) -> None:
        """Tell what `reset` gave.

        Args:
            observations: as `reset` returned them, of all environments.
            mask: (num_envs,) bool, which of them were reset (default: all).

        Raises:
            ValueError: they are of another structure or length than those before.
        """
        mask = np.ones(self._n, np.bool_) if mask is None else np.asarray(mask, np.bool_)
        leaves = self._take_apart(observations)
        for old, new in zip(self._leaves, leaves, strict=False):
            new[~mask] = old[~mask]
        self._leaves = leaves
        self._over &= ~mask

    def take_step(
        self,
        actions: Any,
        observations: Any,
        rewards: Any,
        terminations: Any,
        truncations: Any,
        infos: Mapping[str, Any],
        *,
        extras: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Return the transitions of a step of all environments, for a store's `batch_insert`.

        Args:
            actions: that were given to `step`.
            observations, rewards, terminations, truncations, infos: that it returned.
            extras: further parts of the items, arrays of shape (num_envs, ...), such as
                ``{"policy_version": np.full(num_envs, version)}``.

        Returns:
            Up to num_envs transitions, as `ReplayBufferDataStore` describes them, with the key
            ``lane`` where there are several environments.

        Raises:
            ValueError: an episode is not begun; ``final_obs`` is missing; or the observations are
                of another structure or length than those before.
        """
        resetting = self._over
        if resetting.any() and (self._mode != "NextStep" or not self._leaves):
            lanes = np.flatnonzero(resetting).tolist()
            raise ValueError(f"environments {lanes} have no episode: call begin() after reset()")
        following = self._take_apart(observations)
        terminations = np.asarray(terminations, np.bool_)
        dones = terminations | np.asarray(truncations, np.bool_)
        led_to = following
        if self._mode == "SameStep" and dones.any():
            led_to = [leaf.copy() for leaf in following]
            for lane in np.flatnonzero(dones):
                final = leaves_of(self._skeleton, _find_final(infos, int(lane)))
                for leaf, value in zip(led_to, final, strict=True):
                    leaf[lane] = value
        columns = {
            "observations": fill(self._skeleton, self._leaves),
            "next_observations": fill(self._skeleton, led_to),
            "actions": actions,
            "rewards": np.asarray(rewards, np.float32),
            "masks": (~terminations).astype(np.float32),
            "dones": dones,
            **(extras or {}),
        }
        if self._n > 1:
            columns[LANE] = self._lanes
        self._leaves = following
        self._over = np.zeros_like(dones) if self._mode == "SameStep" else dones.copy()
        taken = np.flatnonzero(~resetting)
        if not len(taken):
            return Batch.of([])
        skeleton = skeleton_of(columns)
        leaves = [np.asarray(leaf) for leaf in leaves_of(skeleton, columns)]
        if len(taken) < self._n:
            leaves = [leaf[taken] for leaf in leaves]
        return Batch.from_columns(fill(skeleton, leaves))

    def _take_apart(self, observations: Any) -> list[Array]:
        """Copies of the leaves of all environments' observations, which are theirs to use again."""
        if self._skeleton is None:
            self._skeleton = skeleton_of(observations)
        leaves = [np.array(leaf) for leaf in leaves_of(self._skeleton, observations)]
        for leaf in leaves:
            if not leaf.ndim or len(leaf) != self._n:
                raise ValueError(
                    f"observations of {self._n} environments, got an array of shape {leaf.shape}"
                )
        return leaves


def _find_final(infos: Mapping[str, Any], lane: int) -> Any:
    """The observation that ended an environment's episode."""
    finals = infos.get("final_obs")
    if finals is None:
        raise ValueError(
            "the environment is in SAME_STEP mode, and its infos have no final_obs: take the "
            "NEXT_STEP mode, where no observation is lost"
        )
    if isinstance(finals, np.ndarray):
        return finals[lane]
    skeleton = skeleton_of(finals)  # batched, as no environment of gymnasium's own has it
    return fill(skeleton, [leaf[lane] for leaf in leaves_of(skeleton, finals)])
