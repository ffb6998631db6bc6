"""The learner of async_learner_actor.py: trains SAC on what actors send, publishes weights."""

from __future__ import annotations

import argparse
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import sac
from edgeml import Closed, DeadlineExceeded, TrainerServer
from edgeml.data import (
    RateLimiter,
    ReplayBufferDataStore,
    TrajectoryBufferDataStore,
    make_default_trajectory_buffer,
)
from terminal import Pace, StatusLines

LAST_WEIGHTS = 60.0  # seconds that actors have to fetch the last weights


class Learner:
    """Trains on what the store has, at the ratio asked for, and publishes the weights.

    Args:
        options: the program's.
        server: gets the store, called ``name``, and publishes.
        name: of the store.
        limiter: counts updates here; whoever inserts counts that.
        status: where it tells what it does.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        server: TrainerServer,
        name: str,
        limiter: RateLimiter,
        status: StatusLines,
    ) -> None:
        self._options = options
        self._server = server
        self._limiter = limiter
        self._status = status
        self._run = secrets.token_hex(4)  # tells actors that another learner is there
        self._uploaded: set[str] = set()  # actors that will send no more
        self._left = threading.Semaphore(0)  # released by each actor that has the last weights
        self._saved_at = 0  # how many transitions there were when a save was last tried
        self._resumed_at = 0  # after how many steps of each actor this run goes on
        self.not_saved: OSError | None = None
        """Why the newest checkpoint could not be written; None if it was."""
        env = gymnasium.make(options.env)
        self.store = _make_store(options, env)
        server.register_data_store(name, self.store)
        assert env.observation_space.shape
        assert env.action_space.shape
        act_dim = env.action_space.shape[0]
        self._state = sac.create(
            options.seed, env.observation_space.shape[0], act_dim, _config(options, act_dim)
        )
        env.close()
        self._resume()
        self._publish(final=False)

    def _resume(self) -> None:
        """Go on from the checkpoint if there is one, else from an empty one."""
        path = self._options.checkpoint_path
        if path is not None and path.exists():
            values = self._server.load_checkpoint(path)
            self._state = sac.from_arrays(self._state, values["agent"])
            self._saved_at = self.store.latest_data_id()
            self._limiter.advance_to(inserts=self._saved_at, samples=values["updates"])
            self._resumed_at = self._saved_at // self._options.actors
            self._status.note(
                f"going on from {path}: "
                f"{self._saved_at} transitions, {self._limiter.samples} updates"
            )
            return
        # Whatever a checkpoint lacks is sent again by actors that still hold it; so those that
        # a learner before this one has left behind help this one.
        with tempfile.TemporaryDirectory() as folder:
            nothing = Path(folder, "nothing")
            self._server.save_checkpoint(nothing)
            self._server.load_checkpoint(nothing)

    def on_request(self, kind: str, actor: str) -> dict[str, Any]:
        """An actor asks where to go on, will send no more, or has the last weights."""
        if kind == "begin":
            return {"steps": self._resumed_at}
        if kind == "uploaded":
            self._uploaded.add(actor)
        else:
            self._left.release()
        return {}

    def await_actors(self) -> None:
        """Wait until each actor has the last weights, or for a minute."""
        deadline = time.monotonic() + LAST_WEIGHTS
        missing = self._options.actors
        while missing and (left := deadline - time.monotonic()) > 0:
            self._status.show(
                f"waiting for {missing} actors to fetch the last weights, {left:.0f} s more",
                "learner",
            )
            if self._left.acquire(timeout=1.0):
                missing -= 1
        if missing:
            self._status.note(f"{missing} actors did not fetch the last weights")

    def train(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train until the actors have finished and all updates are done, or until stopped."""
        options, limiter = self._options, self._limiter
        rng = np.random.default_rng(options.seed)
        updates = max(1, round(options.steps_per_update * options.utd_ratio))
        goal = round(
            (options.max_steps * options.actors - options.training_starts) * options.utd_ratio
        )
        pace = Pace(goal, "updates")
        try:
            while self._may_train(updates, stopped):
                batch = self._sample(updates * options.batch_size, rng)
                batches = {
                    key: batch[key].reshape(updates, options.batch_size, *batch[key].shape[1:])
                    for key in sac.BATCH_KEYS
                }
                self._state, metrics = sac.update(self._state, batches)
                q = float(metrics["q"])  # waits until the update is done
                limiter.sampled(updates)
                self._publish(final=False)
                if self.store.latest_data_id() - self._saved_at >= options.checkpoint_period:
                    self._save()
                self._status.show(f"{pace.text(limiter.samples)}, mean q {q:.1f}", "learner")
        except Closed:
            self._save()
            return
        self._publish(final=True)
        self._save()
        self._status.note(
            f"{limiter.samples} updates from {limiter.inserts} transitions; "
            "the last weights are published"
        )

    def _may_train(self, updates: int, stopped: Callable[[], bool]) -> bool:
        """Wait for enough data, and say so; False once there will be no more."""
        began = time.monotonic()
        while not stopped():
            last_chance = len(self._uploaded) >= self._options.actors
            try:
                self._limiter.await_sample(updates, timeout=0.0 if last_chance else 0.5)
                return True
            except DeadlineExceeded:
                if last_chance:
                    return False
            self._status.show(self._waiting_for(time.monotonic() - began), "learner")
        raise Closed("the learner is stopped")

    def _waiting_for(self, seconds: float) -> str:
        options, here = self._options, self._limiter.inserts
        if here < options.training_starts:
            what = f"the first {options.training_starts:,} transitions, {here:,} of them are here"
        else:
            what = f"more than the {here:,} transitions that are here"
        actors = len(self._server.clients())
        who = f"{actors} connected" if actors else "none is connected: start one with --actor"
        return f"waiting for actors ({who}) to send {what}, for {seconds:.0f} s now"

    def _publish(self, final: bool) -> None:
        network = {
            "policy": sac.actor_params(self._state),
            "average": sac.actor_params(self._state, average=True),
            "updates": self._limiter.samples,
            "run": self._run,
            "resumed_at": self._resumed_at,
            "final": final,
        }
        self._server.publish_network(network)

    def _sample(self, n: int, rng: np.random.Generator) -> Any:
        if isinstance(self.store, TrajectoryBufferDataStore):
            return self.store.sample("training", n)[0]
        return self.store.sample(n, rng, keys=sac.BATCH_KEYS)

    def _save(self) -> None:
        """Save all, if that is wanted. A failure is told, and training goes on."""
        path = self._options.checkpoint_path
        if path is None:
            return
        self._saved_at = self.store.latest_data_id()
        values = {"agent": sac.to_arrays(self._state), "updates": self._limiter.samples}
        try:
            self._server.save_checkpoint(path, values)
            self.not_saved = None
        except OSError as error:
            self.not_saved = error
            self._status.note(f"the checkpoint {path} was not saved, training goes on: {error}")

    def stop(self) -> None:
        """End `train` soon, with a checkpoint."""
        self._limiter.close()


def _make_store(
    options: argparse.Namespace, env: gymnasium.Env[Any, Any]
) -> ReplayBufferDataStore | TrajectoryBufferDataStore:
    spaces, capacity = (env.observation_space, env.action_space), options.replay_buffer_capacity
    if options.use_traj_buffer:
        return make_default_trajectory_buffer(*spaces, capacity)
    return ReplayBufferDataStore(*spaces, capacity)


def _config(options: argparse.Namespace, act_dim: int) -> sac.Config:
    """SAC's usual settings; for the pendulum smaller and faster ones, which settle."""
    if not options.env.startswith("InvertedPendulum"):
        return sac.Config(init_temperature=0.1, target_entropy=-float(act_dim))
    steps = options.max_steps * options.actors - options.training_starts
    return sac.Config(
        hidden=(64, 64),
        actor_lr=1e-3,
        critic_lr=1e-3,
        temperature_lr=1e-3,
        decay_steps=round(steps * options.utd_ratio),
        lr_end=0.1,
        tau=0.02,
        actor_ema=0.005,
        init_temperature=0.1,
        target_entropy=-1.0,
    )
