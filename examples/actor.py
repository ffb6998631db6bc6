"""The actor of async_learner_actor.py: steps an environment with the newest policy."""

from __future__ import annotations

import argparse
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import gymnasium
import numpy as np

from curve import LearningCurve
from edgeml import Closed, DeadlineExceeded, TrainerClient, TrainerTunnel, Unreachable
from edgeml.data import DataStoreBase, RateLimiter
from edgeml.data.rlds import RLDSLogger
from policy import NumpyPolicy, scale_action
from terminal import Pace, StatusLines


class Actor:
    """Steps the environment with the newest policy, evaluates it, and draws the curve.

    Args:
        options: the program's.
        link: to the learner.
        store: what is uploaded to it.
        env: the environment.
        make_limiter: gives a limiter that counts this actor's steps and the learner's updates.
        status: where it tells what it does.
        patience: seconds to wait for a learner that is away or silent.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        link: TrainerClient | TrainerTunnel,
        store: DataStoreBase,
        env: gymnasium.Env[Any, Any],
        make_limiter: Callable[[], RateLimiter],
        status: StatusLines,
        patience: float,
    ) -> None:
        self._options = options
        self._link = link
        self._store = store
        self._env = env
        self._status = status
        self._patience = patience
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._low, self._high = space.low, space.high
        act_dim = space.shape[0]
        self._policy = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._average = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._random = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._make_limiter = make_limiter
        self._limiter = make_limiter()
        self._learner = ""  # the learner that was heard last; another one when it is started anew
        self._final = threading.Event()
        self._stopped = False
        self._name = secrets.token_hex(4)
        self._step = 0
        self._curve = LearningCurve(options.env, options.curve, options.training_starts)
        link.recv_network_callback(self._receive)

    def _receive(self, network: dict[str, Any]) -> None:
        if self._learner not in ("", network["run"]):
            self._meet_another(network)
        self._learner = network["run"]
        if network["updates"]:  # before the first, what this actor has is better
            self._policy.load(network["policy"])
            self._average.load(network["average"])
        self._limiter.advance_to(samples=network["updates"])
        if network["final"]:
            self._final.set()

    def _meet_another(self, network: dict[str, Any]) -> None:
        """Count as a learner does that was started anew, perhaps with less than was there."""
        # All that the store still holds is sent again if need be; see `Learner._resume`.
        steps = min(self._step, network["resumed_at"] + len(self._store))
        limiter = self._make_limiter()
        limiter.advance_to(inserts=steps)
        self._limiter = limiter
        self._status.note(
            f"another learner is there, after {network['updates']:,} updates; "
            f"of this actor's {self._step:,} steps it can have {steps:,}"
        )

    def run(self) -> None:
        """Collect all steps, evaluating now and then, and get the last weights."""
        self._step = int(self._link.request("begin", self._name)["steps"])
        if self._step:
            self._status.note(f"going on after step {self._step}")
            self._limiter.advance_to(inserts=self._step)
        else:
            self._evaluate(episodes=3)  # where learning starts from
        with self._log() as log:
            self._collect(log)
        self._end()

    def stop(self) -> None:
        """End `run` soon, with Closed."""
        self._stopped = True
        self._limiter.close()
        self._final.set()

    def _log(self) -> AbstractContextManager[RLDSLogger | None]:
        directory = self._options.rlds_log_dir
        return nullcontext() if directory is None else RLDSLogger(directory)

    def _collect(self, log: RLDSLogger | None) -> None:
        options = self._options
        pace = Pace(options.max_steps, "steps")
        returned = 0.0
        obs, _ = self._env.reset(seed=options.seed + self._step)
        while self._step < options.max_steps:
            self._await_turn()
            step = self._step + 1
            policy = self._random if step <= options.random_steps else self._policy
            action = policy.act(obs)
            next_obs, reward, terminated, truncated, _ = self._env.step(self._scaled(action))
            over = terminated or truncated
            item = {
                "observations": np.asarray(obs, np.float32),
                "next_observations": np.asarray(next_obs, np.float32),
                "actions": action,
                "rewards": np.float32(reward),
                "masks": np.float32(1 - terminated),
                "end_of_trajectory" if options.use_traj_buffer else "dones": bool(over),
            }
            self._store.insert(item)
            if log is not None:
                log(item, over)
            self._step = step
            self._limiter.inserted()
            obs = next_obs
            returned += float(reward)
            if over:
                self._curve.add_episode(step, returned)
                returned = 0.0
                obs, _ = self._env.reset()
            if step % options.steps_per_update == 0:
                self._patiently(self._link.update)
            if step % options.eval_period == 0 and step < options.max_steps:
                self._evaluate(episodes=3)
            self._show(f"{pace.text(step)}{self._results()}")

    def _show(self, text: str) -> None:
        self._status.show(text, "actor")

    def _results(self) -> str:
        curve = self._curve
        last = f", last return {curve.episodes[-1].total:.0f}" if curve.episodes else ""
        point = f", evaluated at {curve.evaluations[-1].mean:.0f}" if curve.evaluations else ""
        return last + point

    def _end(self) -> None:
        """See that the learner has everything, and get the last weights from it."""
        began = time.monotonic()
        while not self._final.is_set():
            if (waited := time.monotonic() - began) > self._patience:
                raise DeadlineExceeded(f"no last weights within {self._patience:g} s")
            # Again and again, since a learner that was started anew has forgotten it.
            self._patiently(self._link.update)
            self._patiently(lambda: self._link.request("uploaded", self._name))
            self._show(
                f"{self._step:,} steps; waiting for the last weights for {waited:.0f} s now, "
                f"after {self._limiter.samples:,} updates"
            )
            self._final.wait(1)
        if self._stopped:
            raise Closed("the actor is stopped")
        self._link.request("finished", self._name)

    def _await_turn(self) -> None:
        """Wait until the learner has kept up, and say so."""
        began = time.monotonic()
        while True:
            try:
                return self._limiter.await_insert(timeout=1.0)
            except DeadlineExceeded as error:
                if (waited := time.monotonic() - began) > self._patience:
                    raise DeadlineExceeded(
                        f"the learner made no use of this actor's {self._step} steps within "
                        f"{self._patience:g} s: {error}"
                    ) from None
            # A learner that was started anew may lack what it had.
            self._patiently(self._link.update)
            self._show(
                f"{self._step:,} steps; waiting for {waited:.0f} s now until the learner has "
                f"trained on them, after {self._limiter.samples:,} updates"
            )

    def _patiently(self, ask: Callable[[], Any]) -> None:
        """Ask the learner, which may be away for a while: somebody may start it anew."""
        deadline = time.monotonic() + self._patience
        told = False
        while True:
            try:
                ask()
                break
            except (Unreachable, DeadlineExceeded, Closed) as error:
                left = deadline - time.monotonic()
                if left < 0 or self._stopped:
                    raise
                if not told:
                    self._status.note(
                        f"the learner is away ({error}); waiting for up to {left:.0f} s "
                        "until it is started again"
                    )
                    told = True
            self._show(f"{self._step:,} steps; waiting for a learner, {left:.0f} s more")
            time.sleep(0.5)
        if told:
            self._status.note("the learner is back")

    def _scaled(self, action: Any) -> Any:
        return scale_action(action, self._low, self._high)

    def _evaluate(self, episodes: int) -> None:
        """Try the averaged policy without noise, over whole episodes."""
        env = gymnasium.make(self._options.env)
        returns = []
        for episode in range(episodes):
            obs, _ = env.reset(seed=10_000 + episode)
            total, over = 0.0, False
            while not over:
                action = self._scaled(self._average.act(obs, deterministic=True))
                obs, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                over = terminated or truncated
            returns.append(total)
        env.close()
        self._curve.add_evaluation(self._step, returns)

    def finish(self) -> None:
        """Evaluate the last policy, and draw the curve."""
        self._show(f"{self._step:,} steps; evaluating the last policy")
        self._evaluate(self._options.eval_episodes)
        self.draw()
        last = self._curve.evaluations[-1]
        self._status.note(
            f"evaluation return: {last.mean:.1f} +- {last.std:.1f} over {last.episodes} episodes"
        )

    def draw(self) -> None:
        """Draw the curve so far."""
        if self._curve.draw():
            self._status.note(f"learning curve: {self._curve.path}")

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw the curve so far where the block is cut short, by Ctrl-C or an error."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what cut it short is to be told
                self.draw()
            raise
