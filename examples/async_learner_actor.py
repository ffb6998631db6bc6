"""An actor steps an environment, a learner trains SAC from what it sees, and new weights come back.

Both in one process, as threads that share one store:

    python examples/async_learner_actor.py --env InvertedPendulum-v5

In two processes, or on two machines, in any order:

    python examples/async_learner_actor.py --learner --host 0.0.0.0
    python examples/async_learner_actor.py --actor --ip ADDRESS_OF_THE_LEARNER

It ends with the line ``evaluation return: MEAN +- STD over N episodes`` and a picture of the
learning curve. With ``--checkpoint_path FILE`` the learner saves all that it has now and then, and
goes on from there when it is started again; actors outlive that. With ``--rlds_log_dir`` every step
that an actor takes is logged as a dataset.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from edgeml import (
    Closed,
    DeadlineExceeded,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
    Unreachable,
)
from edgeml.data import (
    DataStoreBase,
    RateLimiter,
    ReplayBuffer,
    ReplayBufferDataStore,
    TrajectoryBufferDataStore,
    make_default_trajectory_buffer,
)
from edgeml.data.rlds import RLDSLogger
from policy import NumpyPolicy, scale_action, use_one_thread
from terminal import StatusLine, add_connection_options, run

STORE = "actor_env"
PATIENCE = 300.0  # seconds that either side waits for the other; JAX compiles meanwhile


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="SAC with an actor and a learner: in one process, in two, or on two machines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--learner", action="store_true", help="train only, as the server")
    role.add_argument("--actor", action="store_true", help="act only, as a client")
    add_connection_options(parser, port=5555)
    option = parser.add_argument
    option("--actors", type=int, default=1, help="how many actors feed the learner")
    option("--env", default="HalfCheetah-v4", help="a gymnasium environment with Box spaces")
    option("--seed", type=int, default=0)
    option("--max_steps", type=int, default=25_000, help="environment steps of each actor")
    option("--random_steps", type=int, default=1_000, help="steps with random actions at first")
    option("--training_starts", type=int, default=1_000, help="steps before the first update")
    option("--steps_per_update", type=int, default=50, help="steps between uploads and weights")
    option("--utd_ratio", type=float, default=1.0, help="gradient steps for each step")
    option("--batch_size", type=int, default=256)
    option("--replay_buffer_capacity", type=int, default=1_000_000)
    option("--eval_period", type=int, default=5_000, help="steps between evaluations")
    option("--eval_episodes", type=int, default=10, help="episodes of the last evaluation")
    option("--checkpoint_path", type=Path, help="learner: where to save all, and to go on from")
    option("--checkpoint_period", type=int, default=5_000, help="steps between checkpoints")
    option("--use_traj_buffer", action="store_true", help="train from a JAX trajectory buffer")
    option("--rlds_log_dir", type=Path, help="actor: log all steps here, as an RLDS dataset")
    option("--curve", type=Path, default="learning_curve.png", help="actor: the picture's file")
    option("--render", action="store_true", help="actor: show the environment in a window")
    options = parser.parse_args(arguments)
    if options.steps_per_update * options.utd_ratio < 1:
        parser.error("steps_per_update * utd_ratio must be at least 1")
    if options.max_steps * options.actors <= options.training_starts:
        parser.error("max_steps must be more than training_starts, or nothing is learned")
    check(options.env)
    return options


def check(name: str) -> None:
    """End the program here, with a reason, if it can't learn this environment."""
    try:
        env = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise SystemExit(f"--env {name}: {error}") from None
    spaces = (env.observation_space, env.action_space)
    env.close()
    for space in spaces:
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise SystemExit(
                f"--env {name} has the space {space}; this SAC needs Boxes of one axis"
            )


def make_limiter(options: argparse.Namespace, actors: int) -> RateLimiter:
    """Holds updates and environment steps at the ratio asked for.

    Args:
        options: the program's.
        actors: 1 on the learner's side, which counts all inserts; on an actor's, which counts its
            own, the number of actors.
    """
    return RateLimiter(
        samples_per_insert=options.utd_ratio * actors,
        min_inserts=options.training_starts // actors,
        slack=3 * options.steps_per_update + 1 / options.utd_ratio,
    )


def make_store(
    options: argparse.Namespace, env: gymnasium.Env[Any, Any]
) -> ReplayBufferDataStore | TrajectoryBufferDataStore:
    spaces, capacity = (env.observation_space, env.action_space), options.replay_buffer_capacity
    if options.use_traj_buffer:
        return make_default_trajectory_buffer(*spaces, capacity)
    return ReplayBufferDataStore(*spaces, capacity)


# The learner ------------------------------------------------------------------------------


class Learner:
    """Trains on what the store has, at the ratio asked for, and publishes the weights."""

    def __init__(
        self, options: argparse.Namespace, server: TrainerServer, limiter: RateLimiter
    ) -> None:
        import sac  # only here: an actor needs no JAX

        self._options = options
        self._server = server
        self._sac = sac
        self._limiter = limiter
        self._uploaded: set[str] = set()  # actors that will send no more
        self._saved = 0  # how many transitions there were at the last save
        self._resumed_at = 0  # after how many steps of each actor this run goes on
        self._left = threading.Semaphore(0)  # released by each actor that has the last weights
        env = gymnasium.make(options.env)
        self.store = make_store(options, env)
        server.register_data_store(STORE, self.store)
        assert env.observation_space.shape
        assert env.action_space.shape
        self._state = sac.create(
            options.seed,
            env.observation_space.shape[0],
            env.action_space.shape[0],
            self._config(env.action_space.shape[0]),
        )
        env.close()
        self._resume()

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self._options.checkpoint_path
        if path is not None and path.exists():
            values = self._server.load_checkpoint(path)
            self._state = self._sac.from_arrays(self._state, values["agent"])
            self._saved = self.store.latest_data_id()
            self._limiter.advance_to(inserts=self._saved, samples=values["updates"])
            self._publish(final=False)
            self._resumed_at = self._saved // self._options.actors

    def _config(self, act_dim: int) -> Any:
        """SAC's usual settings; for the pendulum smaller and faster ones, which settle."""
        options = self._options
        if not options.env.startswith("InvertedPendulum"):
            return self._sac.Config(init_temperature=0.1, target_entropy=-float(act_dim))
        steps = options.max_steps * options.actors - options.training_starts
        return self._sac.Config(
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
        for _ in range(self._options.actors):
            self._left.acquire(timeout=60)

    def train(self, status: StatusLine) -> None:
        """Train until the actors have finished and all updates are done, or until stopped."""
        options = self._options
        if self._saved:
            status.note(
                f"going on from {options.checkpoint_path}: "
                f"{self._saved} transitions, {self._limiter.samples} updates"
            )
        rng = np.random.default_rng(options.seed)
        updates = max(1, round(options.steps_per_update * options.utd_ratio))
        try:
            while self._may_train(updates):
                batch = self._sample(updates * options.batch_size, rng)
                batches = {
                    key: batch[key].reshape(updates, options.batch_size, *batch[key].shape[1:])
                    for key in self._sac.BATCH_KEYS
                }
                self._state, metrics = self._sac.update(self._state, batches)
                q = float(metrics["q"])  # waits until the update is done
                self._limiter.sampled(updates)
                self._publish(final=False)
                if self.store.latest_data_id() - self._saved >= options.checkpoint_period:
                    self._save()
                status.show(f"learner: {self._limiter.samples} updates, mean q {q:.1f}")
        except Closed:
            self._save()
            return
        self._publish(final=True)
        self._save()
        status.note(
            f"{self._limiter.samples} updates from {self._limiter.inserts} transitions; "
            "the last weights are published"
        )

    def _may_train(self, updates: int) -> bool:
        """Wait for enough data; False once there will be no more."""
        while True:
            last_chance = len(self._uploaded) >= self._options.actors
            try:
                self._limiter.await_sample(updates, timeout=0.0 if last_chance else 1.0)
                return True
            except DeadlineExceeded:
                if last_chance:
                    return False

    def _publish(self, final: bool) -> None:
        network = {
            "policy": self._sac.actor_params(self._state),
            "average": self._sac.actor_params(self._state, average=True),
            "updates": self._limiter.samples,
            "final": final,
        }
        self._server.publish_network(network)

    def _sample(self, n: int, rng: np.random.Generator) -> Any:
        if isinstance(self.store, TrajectoryBufferDataStore):
            return self.store.sample("training", n)[0]
        return self.store.sample(n, rng, keys=self._sac.BATCH_KEYS)

    def _save(self) -> None:
        if self._options.checkpoint_path is not None:
            values = {"agent": self._sac.to_arrays(self._state), "updates": self._limiter.samples}
            self._server.save_checkpoint(self._options.checkpoint_path, values)
            self._saved = self.store.latest_data_id()

    def stop(self) -> None:
        self._limiter.close()


def run_learner(options: argparse.Namespace, config: TrainerConfig) -> None:
    limiter = make_limiter(options, actors=1)
    server = TrainerServer(
        config,
        data_callback=lambda name, batch: limiter.inserted(len(batch)),
        request_callback=lambda kind, actor: learner.on_request(kind, actor),
        host=options.host,
    )
    with StatusLine() as status, server:
        learner = Learner(options, server, limiter)
        server.start(threaded=True)
        status.note(f"learning {options.env} from what actors send to {server.url}")
        learner.train(status)
        learner.await_actors()


# The actor --------------------------------------------------------------------------------


@dataclass
class Point:
    """One point of the learning curve."""

    step: int
    mean: float
    std: float


class Actor:
    """Steps the environment with the newest policy, and evaluates it."""

    def __init__(
        self,
        options: argparse.Namespace,
        link: TrainerClient | TrainerTunnel,
        store: DataStoreBase,
        env: gymnasium.Env[Any, Any],
        limiter: RateLimiter,
    ) -> None:
        self._options = options
        self._link = link
        self._store = store
        self._env = env
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._low, self._high = space.low, space.high
        act_dim = space.shape[0]
        self._policy = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._average = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._random = NumpyPolicy(act_dim=act_dim, seed=options.seed)
        self._limiter = limiter
        self._final = threading.Event()
        self._name = secrets.token_hex(4)
        self.curve: list[Point] = []
        link.recv_network_callback(self._receive)

    def _receive(self, network: dict[str, Any]) -> None:
        self._policy.load(network["policy"])
        self._average.load(network["average"])
        self._limiter.advance_to(samples=network["updates"])
        if network["final"]:
            self._final.set()

    def act(self, status: StatusLine) -> None:
        """Collect all steps, evaluating now and then, and get the last weights."""
        steps = self._link.request("begin", self._name)["steps"]
        if steps:
            status.note(f"going on after step {steps}")
            self._limiter.advance_to(inserts=steps)
        with self._log() as log:
            self._collect(steps, log, status)
        self._end(status)

    def _log(self) -> AbstractContextManager[RLDSLogger | None]:
        directory = self._options.rlds_log_dir
        return nullcontext() if directory is None else RLDSLogger(directory)

    def _collect(self, steps: int, log: RLDSLogger | None, status: StatusLine) -> None:
        options = self._options
        returned = last_return = 0.0
        obs, _ = self._env.reset(seed=options.seed + steps)
        for step in range(steps + 1, options.max_steps + 1):
            self._await_turn()
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
            self._limiter.inserted()
            obs = next_obs
            returned += float(reward)
            if over:
                last_return, returned = returned, 0.0
                obs, _ = self._env.reset()
            if step % options.steps_per_update == 0:
                self._patiently(self._link.update)
            if step % options.eval_period == 0 and step < options.max_steps:
                self.curve.append(self.evaluate(step, episodes=3))
            point = f", evaluated at {self.curve[-1].mean:.0f}" if self.curve else ""
            status.show(
                f"actor: {step}/{options.max_steps} steps, {self._limiter.samples} updates heard "
                f"of, last return {last_return:.0f}{point}"
            )

    def _end(self, status: StatusLine) -> None:
        """See that the learner has everything, and get the last weights from it."""
        status.show("actor: waiting for the last weights")
        deadline = time.monotonic() + PATIENCE
        while not self._final.is_set():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"no last weights within {PATIENCE:g} s")
            # Again and again, since a learner that was started anew has forgotten it.
            self._patiently(self._link.update)
            self._patiently(lambda: self._link.request("uploaded", self._name))
            self._final.wait(5)
        self._link.request("finished", self._name)

    def _await_turn(self) -> None:
        """Wait until the learner has kept up."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._limiter.await_insert(timeout=1.0)
            except DeadlineExceeded:
                if time.monotonic() > deadline:
                    raise
            # A learner that was started anew may lack what it had.
            self._patiently(self._link.update)

    def _patiently(self, ask: Callable[[], Any]) -> None:
        """Ask the learner, which may be away for a while: somebody may start it anew."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                ask()
                return
            except (Unreachable, DeadlineExceeded):
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _scaled(self, action: Any) -> Any:
        return scale_action(action, self._low, self._high)

    def evaluate(self, step: int, episodes: int) -> Point:
        """Returns of the averaged policy without noise, over whole episodes."""
        env = gymnasium.make(self._options.env)
        policy = self._average
        returns = []
        for episode in range(episodes):
            obs, _ = env.reset(seed=10_000 + episode)
            total, over = 0.0, False
            while not over:
                action = self._scaled(policy.act(obs, deterministic=True))
                obs, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                over = terminated or truncated
            returns.append(total)
        env.close()
        return Point(step, float(np.mean(returns)), float(np.std(returns)))

    def finish(self, status: StatusLine) -> None:
        """Evaluate the last policy, and draw the curve."""
        options = self._options
        self.curve.append(self.evaluate(options.max_steps, options.eval_episodes))
        draw(self.curve, options.env, options.curve)
        status.note(f"learning curve: {options.curve}")
        last = self.curve[-1]
        status.note(
            f"evaluation return: {last.mean:.1f} +- {last.std:.1f} "
            f"over {options.eval_episodes} episodes"
        )


def draw(curve: list[Point], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [point.step for point in curve]
    means = np.array([point.mean for point in curve])
    stds = np.array([point.std for point in curve])
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(steps, means, marker="o")
    axes.fill_between(steps, means - stds, means + stds, alpha=0.2)
    axes.set(title=title, xlabel="environment steps", ylabel="evaluation return")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run_actor(options: argparse.Namespace, config: TrainerConfig) -> None:
    # It holds what a learner lacks that goes on from its last checkpoint.
    store = ReplayBuffer(2 * options.checkpoint_period + 10 * options.steps_per_update)
    env = gymnasium.make(options.env, render_mode="human" if options.render else None)
    with StatusLine() as status:
        status.note(f"acting in {options.env}, for a learner at {options.ip}")
        with TrainerClient(STORE, options.ip, config, store, wait_for_server=PATIENCE) as client:
            actor = Actor(options, client, store, env, make_limiter(options, options.actors))
            actor.act(status)
        actor.finish(status)
    env.close()


# Both -------------------------------------------------------------------------------------


def run_both(options: argparse.Namespace, config: TrainerConfig) -> None:
    limiter = make_limiter(options, actors=1)  # one process, one store, one limiter
    tunnel = TrainerTunnel(
        config, request_callback=lambda kind, actor: learner.on_request(kind, actor)
    )
    env = gymnasium.make(options.env, render_mode="human" if options.render else None)
    with StatusLine() as status, tunnel:
        status.note(f"learning {options.env} in one process")
        learner = Learner(options, tunnel, limiter)
        actor = Actor(options, tunnel, learner.store, env, limiter)
        trainer = threading.Thread(target=learner.train, args=(status,), name="learner")
        trainer.start()
        try:
            actor.act(status)
        finally:
            learner.stop()
            trainer.join()
        actor.finish(status)
    env.close()


def main() -> None:
    options = parse()
    config = TrainerConfig(
        port_number=options.port,
        broadcast_port=None,
        request_types=["begin", "uploaded", "finished"],
        transport=options.transport,
    )
    began = time.monotonic()
    if options.learner:
        run_learner(options, config)
    elif options.actor:
        run_actor(options, config)
    else:
        run_both(options, config)
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    use_one_thread()
    sys.exit(run(main))
