"""Soft Actor-Critic with automatic temperature (Haarnoja et al. 2018, arXiv 1812.05905).

Plain JAX and optax. The whole agent is one pytree, `State`, made by `create` and trained by
`update`, which takes K batches and makes K gradient steps in one dispatch:

    state = create(seed=0, obs_dim=17, act_dim=6)
    state, metrics = update(state, batches)         # arrays of shape (K, batch size, ...)
    params = actor_params(state)                    # for policy.NumpyPolicy, in another process

The agent's actions are in [-1, 1]; `policy.scale_action` maps them to an environment's bounds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from policy import LOG_STD_MAX, LOG_STD_MIN, Params

BATCH_KEYS = ("observations", "next_observations", "actions", "rewards", "masks")
"""What `update` reads of a batch, float32 all. A mask is 0 where the episode terminated, else 1: a
truncated episode would have gone on, so its last mask is 1."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters. The defaults suit HalfCheetah and its like.

    Attributes:
        hidden: sizes of the hidden layers, of the actor and of each critic.
        actor_lr, critic_lr, temperature_lr: learning rates of Adam.
        decay_steps: gradient steps over which all learning rates fall linearly to `lr_end` times
            themselves, where they stay. None: they are constant.
        discount: of future rewards.
        tau: how much of the critics their target copies take up at each step.
        actor_ema: as `tau`, for the averaged actor, which is the steadier one to evaluate. 1: the
            averaged actor is the actor.
        init_temperature: what the weight of the entropy starts from.
        target_entropy: what the policy's entropy is held at. None: -act_dim / 2.
        log_std_bounds: of the policy's Gaussian, before tanh.
        reward_scale: multiplies all rewards.
    """

    hidden: tuple[int, ...] = (256, 256)
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-4
    decay_steps: int | None = None
    lr_end: float = 0.0
    discount: float = 0.99
    tau: float = 0.005
    actor_ema: float = 1.0
    init_temperature: float = 1.0
    target_entropy: float | None = None
    log_std_bounds: tuple[float, float] = (LOG_STD_MIN, LOG_STD_MAX)
    reward_scale: float = 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("actor", "actor_average", "critics", "target_critics", "log_temperature"),
        *("actor_opt", "critic_opt", "temperature_opt", "key", "step"),
    ],
    meta_fields=["config"],
)
@dataclass(frozen=True)
class State:
    """An agent in training: a pytree.

    The critics' arrays have one more leading axis, of 2: both are evaluated by one `vmap`.
    """

    actor: Params
    actor_average: Params
    critics: Params
    target_critics: Params
    log_temperature: jax.Array
    actor_opt: Any
    critic_opt: Any
    temperature_opt: Any
    key: jax.Array
    step: jax.Array
    config: Config


def _init_mlp(rng: np.random.Generator, sizes: tuple[int, ...], copies: tuple[int, ...]) -> Params:
    """Glorot-uniform weights, those of the last layer a tenth of that, and zero biases."""
    layers: Params = []
    for n_in, n_out in itertools.pairwise(sizes):
        limit = (6 / (n_in + n_out)) ** 0.5
        w = rng.uniform(-limit, limit, (*copies, n_in, n_out)).astype(np.float32)
        layers.append({"w": w, "b": np.zeros((*copies, n_out), np.float32)})
    layers[-1]["w"] *= 0.1
    return layers


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    for p in params[:-1]:
        x = jax.nn.relu(x @ p["w"] + p["b"])
    out: jax.Array = x @ params[-1]["w"] + params[-1]["b"]
    return out


def _normalised_mlp(params: Params, x: jax.Array) -> jax.Array:
    """With each hidden layer normalised, which keeps a critic from overestimating what it has not
    seen (Ball et al. 2023, arXiv 2302.02948)."""
    for p in params[:-1]:
        x = x @ p["w"] + p["b"]
        x = x - x.mean(-1, keepdims=True)
        x = jax.nn.relu(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6))
    out: jax.Array = x @ params[-1]["w"] + params[-1]["b"]
    return out


def _adam(lr: float, config: Config) -> Any:
    if config.decay_steps is None:
        return optax.adam(lr)
    return optax.adam(optax.linear_schedule(lr, lr * config.lr_end, config.decay_steps))


def create(seed: int, obs_dim: int, act_dim: int, config: Config | None = None) -> State:
    """A fresh agent."""
    config = config or Config()
    rng = np.random.default_rng(seed)  # NumPy's, as JAX would spend seconds compiling all this.
    actor = _init_mlp(rng, (obs_dim, *config.hidden, 2 * act_dim), ())
    critics = _init_mlp(rng, (obs_dim + act_dim, *config.hidden, 1), (2,))

    @jax.jit
    def build(actor: Params, critics: Params, key: jax.Array) -> State:
        log_temperature = jnp.log(jnp.float32(config.init_temperature))
        return State(
            actor=actor,
            actor_average=actor,
            critics=critics,
            target_critics=critics,
            log_temperature=log_temperature,
            actor_opt=_adam(config.actor_lr, config).init(actor),
            critic_opt=_adam(config.critic_lr, config).init(critics),
            temperature_opt=_adam(config.temperature_lr, config).init(log_temperature),
            key=key,
            step=jnp.zeros((), jnp.int32),
            config=config,
        )

    # A copy of each leaf: `update` donates them all, and no buffer can be given away twice.
    state: State = jax.tree.map(jnp.array, build(actor, critics, jax.random.key(seed)))
    return state


def _mean_and_log_std(
    actor: Params, obs: jax.Array, log_std_bounds: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """The Gaussian that the policy squashes by tanh."""
    mean, raw = jnp.split(_mlp(actor, obs), 2, axis=-1)
    low, high = log_std_bounds
    return mean, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1)


def _sample(
    actor: Params, obs: jax.Array, key: jax.Array, log_std_bounds: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Actions in (-1, 1) and their log densities."""
    mean, log_std = _mean_and_log_std(actor, obs, log_std_bounds)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    # log(1 - tanh(u)^2), in a form that does not underflow for large u.
    log_slope = 2 * (np.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (log_normal - log_slope).sum(-1)


def _q_values(critics: Params, obs: jax.Array, actions: jax.Array) -> jax.Array:
    """Shape (2, batch)."""
    x = jnp.concatenate([obs, actions], axis=-1)
    return jax.vmap(_normalised_mlp, in_axes=(0, None))(critics, x)[..., 0]


def _step(state: State, batch: Mapping[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    """One gradient step of the critics, the actor and the temperature."""
    config = state.config
    key, next_key, actor_key = jax.random.split(state.key, 3)
    obs, actions = batch["observations"], batch["actions"]
    temperature = jnp.exp(state.log_temperature)

    next_actions, next_log_probs = _sample(
        state.actor, batch["next_observations"], next_key, config.log_std_bounds
    )
    next_q = _q_values(state.target_critics, batch["next_observations"], next_actions).min(0)
    target_q = config.reward_scale * batch["rewards"] + config.discount * batch["masks"] * (
        next_q - temperature * next_log_probs
    )

    def critic_loss(critics: Params) -> tuple[jax.Array, jax.Array]:
        q = _q_values(critics, obs, actions)
        return ((q - target_q) ** 2).mean(-1).sum(), q.mean()

    (critic_loss_value, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critics
    )
    updates, critic_opt = _adam(config.critic_lr, config).update(grads, state.critic_opt)
    critics = optax.apply_updates(state.critics, updates)

    def actor_loss(actor: Params) -> tuple[jax.Array, jax.Array]:
        new_actions, log_probs = _sample(actor, obs, actor_key, config.log_std_bounds)
        q = _q_values(critics, obs, new_actions).min(0)
        return (temperature * log_probs - q).mean(), -log_probs.mean()

    (actor_loss_value, entropy), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor)
    updates, actor_opt = _adam(config.actor_lr, config).update(grads, state.actor_opt)
    actor = optax.apply_updates(state.actor, updates)

    act_dim = actions.shape[-1]
    target = -act_dim / 2 if config.target_entropy is None else config.target_entropy
    # The gradient of exp(log_temperature) * (entropy - target).
    updates, temperature_opt = _adam(config.temperature_lr, config).update(
        temperature * (entropy - target), state.temperature_opt
    )
    state = replace(
        state,
        actor=actor,
        actor_average=_lerp(state.actor_average, actor, config.actor_ema),
        critics=critics,
        target_critics=_lerp(state.target_critics, critics, config.tau),
        log_temperature=optax.apply_updates(state.log_temperature, updates),
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        temperature_opt=temperature_opt,
        key=key,
        step=state.step + 1,
    )
    metrics = {
        "critic_loss": critic_loss_value,
        "actor_loss": actor_loss_value,
        "q": q_mean,
        "entropy": entropy,
        "temperature": temperature,
    }
    return state, metrics


def _lerp(old: Params, new: Params, weight: float) -> Params:
    averaged: Params = jax.tree.map(lambda a, b: a + weight * (b - a), old, new)
    return averaged


@functools.partial(jax.jit, donate_argnums=0)
def _update(state: State, batches: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    state, metrics = jax.lax.scan(_step, state, batches)
    return state, {name: values.mean() for name, values in metrics.items()}


def update(state: State, batches: Mapping[str, ArrayLike]) -> tuple[State, dict[str, jax.Array]]:
    """Make K gradient steps, one on each of K batches, in one dispatch.

    Each different shape of the batches is compiled once, which takes seconds.

    Args:
        state: used up: its buffers become those of the returned state.
        batches: has `BATCH_KEYS`, each of shape (K, batch size, ...); other keys are not looked at.

    Returns:
        The new state, and the metrics' means over the K steps. They may still be being computed:
        reading one waits for it.
    """
    updated: tuple[State, dict[str, jax.Array]]
    updated = _update(state, {name: batches[name] for name in BATCH_KEYS})
    return updated


def to_arrays(state: State) -> list[np.ndarray[Any, Any]]:
    """All of an agent, optimizers and random key among it, as NumPy arrays for a checkpoint."""
    plain = replace(state, key=jax.random.key_data(state.key))
    return [np.array(leaf) for leaf in jax.tree.leaves(plain)]


def from_arrays(state: State, arrays: Sequence[ArrayLike]) -> State:
    """The agent that `to_arrays` took apart.

    Args:
        state: one that was created with the same sizes and configuration.
        arrays: what `to_arrays` gave.

    Raises:
        ValueError: it was created otherwise.
    """
    plain = replace(state, key=jax.random.key_data(state.key))
    leaves, structure = jax.tree.flatten(plain)
    new = [jnp.array(array) for array in arrays]
    if [(a.shape, a.dtype) for a in new] != [(b.shape, b.dtype) for b in leaves]:
        raise ValueError("the checkpoint is of an agent of other sizes, or another configuration")
    restored: State = jax.tree.unflatten(structure, new)
    return replace(restored, key=jax.random.wrap_key_data(restored.key))


def actor_params(state: State, *, average: bool = False) -> Params:
    """The policy as plain NumPy arrays, which stay as they are when training goes on.

    Args:
        state: the agent.
        average: take the averaged actor, which is for evaluation; the other is for exploring.
    """
    # np.asarray would give views into buffers that the next `update` overwrites.
    params: Params = jax.tree.map(np.array, state.actor_average if average else state.actor)
    return params
