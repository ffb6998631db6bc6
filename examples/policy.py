"""A tanh-Gaussian policy in plain NumPy, for the process that acts.

Nothing here imports JAX: an edge device needs NumPy only, and for one observation a few small
matrix-vector products take some 15 us, where dispatching a compiled function takes about 100 us.

The parameters are a list of layers, each ``{"w": (in, out), "b": (out,)}``, float32. The last layer
gives the mean and the log standard deviation (before it is bounded), side by side. `sac.py` trains
the same parameters.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Params = list[dict[str, Any]]
"""The layers of a multi-layer perceptron. Arrays of NumPy or of JAX."""

Array = NDArray[np.float32]

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0

XLA_SINGLE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def use_one_thread() -> None:
    """Keep each process to one core, so that a learner and its actors do not fight over them.

    Sets environment variables, and so must run before JAX is first imported. A BLAS reads its own
    when NumPy is imported: it heeds them in the processes started from here on, not in this one.
    """
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_SINGLE_THREAD}".strip()


def scale_action(action: ArrayLike, low: ArrayLike, high: ArrayLike) -> Array:
    """Map an action in [-1, 1] to a Box's bounds, which must be finite."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    scaled: Array = low + (np.asarray(action, np.float32) + 1) * np.float32(0.5) * (high - low)
    return scaled


class NumpyPolicy:
    """Acts on one observation, or on a batch of them.

    Actions are in [-1, 1]: store those for training, and give an environment `scale_action` of
    them.

    Args:
        params: see `load`. Without any, actions are uniformly random until some are loaded.
        act_dim: how many numbers an action has.
        seed: of the noise.
        log_std_bounds: those of the agent that trains the policy.
    """

    def __init__(
        self,
        params: Params | None = None,
        *,
        act_dim: int,
        seed: int | None = None,
        log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX),
    ) -> None:
        self._layers: list[tuple[Array, Array]] | None = None
        self._act_dim = act_dim
        self._rng = np.random.default_rng(seed)
        self._log_std_bounds = log_std_bounds
        if params is not None:
            self.load(params)

    @property
    def loaded(self) -> bool:
        """Whether there are any parameters to act with."""
        return self._layers is not None

    def load(self, params: Params) -> None:
        """Act with these from now on. They are copied, and may be read-only or unaligned views.

        Another thread may do this while one acts: an action is computed from either the old
        parameters or the new.
        """
        self._layers = [
            (np.array(p["w"], np.float32, order="C"), np.array(p["b"], np.float32)) for p in params
        ]

    def act(self, obs: ArrayLike, *, deterministic: bool = False) -> Array:
        """An action in [-1, 1]: the policy's mode if `deterministic`, else a sample."""
        x = np.asarray(obs, np.float32)
        if self._layers is None:
            return self._rng.uniform(-1, 1, (*x.shape[:-1], self._act_dim)).astype(np.float32)
        *hidden, (w, b) = self._layers
        for hidden_w, hidden_b in hidden:
            x = np.maximum(x @ hidden_w + hidden_b, 0)
        out = x @ w + b
        mean = out[..., : self._act_dim]
        if not deterministic:
            low, high = self._log_std_bounds
            log_std = low + 0.5 * (high - low) * (np.tanh(out[..., self._act_dim :]) + 1)
            noise = self._rng.standard_normal(mean.shape, np.float32)
            mean = mean + np.exp(log_std, dtype=np.float32) * noise
        action: Array = np.tanh(mean)
        return action
