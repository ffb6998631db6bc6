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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeml import TrainerClient, TrainerConfig, TrainerServer, TrainerTunnel
from edgeml.data import RateLimiter, ReplayBuffer
from policy import use_one_thread
from terminal import (
    CtrlC,
    Side,
    StatusLines,
    add_connection_options,
    announce,
    check_writable,
    connect,
    require,
    run,
)

if TYPE_CHECKING:
    import gymnasium

    from learner import Learner

STORE = "actor_env"
PATIENCE = 300.0  # seconds that an actor waits for a learner; JAX compiles meanwhile


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
    option("--env", default="InvertedPendulum-v5", help="a gymnasium environment with Box spaces")
    option("--seed", type=int, default=0)
    option("--max_steps", type=int, default=20_000, help="environment steps of each actor")
    option("--random_steps", type=int, default=1_000, help="steps with random actions at first")
    option("--training_starts", type=int, default=1_000, help="steps before the first update")
    option("--steps_per_update", type=int, default=50, help="steps between uploads and weights")
    option("--utd_ratio", type=float, default=1.0, help="gradient steps for each step")
    option("--batch_size", type=int, default=256)
    option("--replay_buffer_capacity", type=int, default=1_000_000)
    option("--eval_period", type=int, default=2_000, help="steps between evaluations")
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
    if options.actors != 1 and not (options.learner or options.actor):
        parser.error("several actors need --learner, and --actor for each: one process has one")
    return options


def check(options: argparse.Namespace) -> None:
    """End the program here, with a reason, if something is missing or it can't learn this."""
    require("gymnasium", *([] if options.actor else ["jax", "optax"]))
    if not options.learner:
        require("matplotlib")
        from matplotlib.figure import Figure

        formats = Figure().canvas.get_supported_filetypes()
        if options.curve.suffix[1:].lower() not in formats:
            raise SystemExit(f"--curve {options.curve} must end in one of: {', '.join(formats)}")
        check_writable("--curve", options.curve)
    if options.checkpoint_path is not None and not options.actor:
        check_writable("--checkpoint_path", options.checkpoint_path)
    import gymnasium

    try:
        env = gymnasium.make(options.env)
    except gymnasium.error.Error as error:
        raise SystemExit(f"--env {options.env}: {error}") from None
    spaces = (env.observation_space, env.action_space)
    env.close()
    for space in spaces:
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise SystemExit(
                f"--env {options.env} has the space {space}; this SAC needs Boxes of one axis"
            )


def make_config(options: argparse.Namespace) -> TrainerConfig:
    """Return what both sides share. Those that differ in it would wait for each other for ever."""
    common = ("env", "actors", "training_starts", "steps_per_update", "utd_ratio")
    return TrainerConfig(
        port_number=options.port,
        broadcast_port=None,
        request_types=["begin", "uploaded", "finished"],
        transport=options.transport,
        version=" ".join(f"--{name}={getattr(options, name)}" for name in common),
    )


def make_limiter(options: argparse.Namespace, actors: int) -> RateLimiter:
    """Hold updates and environment steps at the ratio asked for.

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


def make_env(options: argparse.Namespace) -> gymnasium.Env[Any, Any]:
    """Make what an actor steps."""
    import gymnasium

    env: gymnasium.Env[Any, Any]
    env = gymnasium.make(options.env, render_mode="human" if options.render else None)
    return env


def run_learner(options: argparse.Namespace) -> None:
    from learner import Learner

    limiter = make_limiter(options, actors=1)
    server = TrainerServer(
        make_config(options),
        data_callback=lambda name, batch: limiter.inserted(len(batch)),
        request_callback=lambda kind, actor: learner.on_request(kind, actor),
        host=options.host,
    )
    with StatusLines() as status, server:
        learner = Learner(options, server, STORE, limiter, status)
        server.start(threaded=True)
        announce(status, f"learning {options.env} from what actors send", server.url, options.host)
        with CtrlC() as ctrl_c:
            learner.train(lambda: ctrl_c.pressed)
        if not ctrl_c.pressed:
            learner.await_actors()
    complain(learner)


def complain(learner: Learner) -> None:
    """End with an error if what was learned isn't on the disk, though it should be."""
    if learner.not_saved is not None:
        raise learner.not_saved


def run_actor(options: argparse.Namespace) -> None:
    from actor import Actor

    # It holds what a learner lacks that goes on from its last checkpoint.
    store = ReplayBuffer(2 * options.checkpoint_period + 10 * options.steps_per_update)
    config = make_config(options)
    env = make_env(options)

    def make_client(wait: float) -> TrainerClient:
        return TrainerClient(STORE, options.ip, config, store, wait_for_server=wait)

    def make_actors_limiter() -> RateLimiter:
        return make_limiter(options, options.actors)

    with StatusLines() as status:
        status.note(f"acting in {options.env}, for a learner at {options.ip}")
        with connect(make_client, "--learner", status, PATIENCE) as client:
            actor = Actor(options, client, store, env, make_actors_limiter, status, PATIENCE)
            with actor.drawing():
                actor.run()
        with actor.drawing():
            actor.finish()
    env.close()


def run_both(options: argparse.Namespace) -> None:
    from actor import Actor
    from learner import Learner

    limiter = make_limiter(options, actors=1)  # one process, one store, one limiter
    tunnel = TrainerTunnel(
        make_config(options), request_callback=lambda kind, actor: learner.on_request(kind, actor)
    )
    env = make_env(options)

    def stop() -> None:
        learner.stop()
        actor.stop()

    with StatusLines() as status, tunnel:
        status.note(f"learning {options.env} in one process")
        learner = Learner(options, tunnel, STORE, limiter, status)
        actor = Actor(options, tunnel, learner.store, env, lambda: limiter, status, PATIENCE)
        with actor.drawing():
            with Side("learner", learner.train, stop):
                actor.run()
            actor.finish()
    env.close()
    complain(learner)


def main() -> None:
    options = parse()
    check(options)
    began = time.monotonic()
    part: Callable[[argparse.Namespace], None]
    part = run_learner if options.learner else run_actor if options.actor else run_both
    part(options)
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    use_one_thread()
    sys.exit(run(main))
