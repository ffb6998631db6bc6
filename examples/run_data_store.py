"""Move data from an actor to a learner, and a network back: the trainer pair and its stores.

    python examples/run_data_store.py                                   # both in one process
    python examples/run_data_store.py --server --host 0.0.0.0           # the learner
    python examples/run_data_store.py --client --ip LEARNER             # an actor, or several

The actor pushes a cart about and queues each transition, which goes to the learner in the
background. The learner keeps them in a replay buffer, fits the cart's dynamics to batches from it,
and publishes what it found; the actor sees its predictions get better. In the end the learner tells
how many transitions it got from this actor, which must be all of them, each once and in order.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import DeadlineExceeded, TrainerClient, TrainerConfig, TrainerServer
from edgeml.data import Batch, QueuedDataStore, ReplayBuffer
from terminal import (
    CtrlC,
    Pace,
    Side,
    StatusLines,
    add_connection_options,
    announce,
    connect,
    run,
)

Array = NDArray[np.float64]

STORE = "cart"
CAPACITY = 10_000  # transitions that an actor queues
PATIENCE = 60.0  # seconds that an actor waits for a learner, and for room in its queue
DYNAMICS = np.array([[1.0, 0.05, 0.0], [-0.1, 0.98, 0.2]])  # of position and speed, and a push


def make_config(args: argparse.Namespace, port: int) -> TrainerConfig:
    """Return what both sides share."""
    return TrainerConfig(
        port_number=port,
        broadcast_port=None,
        request_types=["received"],
        transport=args.transport,
    )


# The learner's side -----------------------------------------------------------------------


class Learner:
    """Keeps what actors send, fits a model to it, and publishes that."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.buffer = ReplayBuffer(capacity=100_000, seed=0)
        self.received: dict[int, int] = {}  # transitions, by actor
        self.model: Array = np.zeros_like(DYNAMICS)
        self.updates = 0
        self.server = TrainerServer(
            make_config(args, args.port), self.on_data, self.on_request, host=args.host
        )
        self.server.register_data_store(STORE, self.buffer)

    def on_data(self, store: str, batch: Batch) -> None:
        """Check what has just been inserted; a batch comes from one actor."""
        actor, first = int(batch[0]["actor"]), int(batch[0]["step"])
        expected = self.received.get(actor, 0)
        if first != expected:
            raise RuntimeError(f"step {first} of actor {actor} where {expected} was due")
        self.received[actor] = expected + len(batch)

    def on_request(self, kind: str, actor: int) -> int:
        """Tell an actor how much of its data is here."""
        return self.received.get(actor, 0)

    def learn(self, done: Callable[[], bool], status: StatusLines) -> None:
        """Update and publish, as long as there are new transitions to learn from."""
        seen = 0
        while not done():
            if self.buffer.latest_data_id() > seen:
                seen = self.buffer.latest_data_id()
                loss = self.update(self.buffer.sample(256))
                self.updates += 1
                self.server.publish_network(
                    {"model": self.model, "updates": self.updates, "loss": loss}
                )
            else:
                time.sleep(0.01)
            status.show(
                f"{self.buffer.latest_data_id()} transitions from {len(self.received)} actors, "
                f"{self.updates} updates",
                "learner",
            )

    def update(self, batch: dict[Any, Any]) -> float:
        """Take a step towards the batch's least squares; returns the loss before it."""
        inputs = np.column_stack([batch["observation"], batch["action"]])
        errors = batch["next_observation"] - inputs @ self.model.T
        gram = inputs.T @ inputs + 1e-6 * np.eye(3)
        self.model = self.model + 0.2 * np.linalg.solve(gram, inputs.T @ errors).T
        return float(np.mean(errors**2))


def serve(args: argparse.Namespace) -> None:
    learner = Learner(args)
    with learner.server as server, StatusLines() as status, CtrlC() as ctrl_c:
        server.start(threaded=True)
        announce(status, "learning", server.url, args.host)
        learner.learn(lambda: ctrl_c.pressed, status)
        for actor, count in learner.received.items():
            status.note(f"received {count} transitions from actor {actor}")


# The actor's side -------------------------------------------------------------------------


def act(
    args: argparse.Namespace,
    port: int,
    status: StatusLines,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    actor = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(actor)
    network: dict[str, Any] = {"model": np.zeros_like(DYNAMICS), "updates": 0}
    network_arrived = threading.Event()

    def on_network(newest: dict[str, Any]) -> None:
        network.update(newest)
        network_arrived.set()

    # "block" makes an actor that is faster than the connection wait, rather than lose data.
    store = QueuedDataStore(CAPACITY, on_full="block", timeout=PATIENCE)
    config = make_config(args, port)

    def make_client(wait: float) -> TrainerClient:
        return TrainerClient(STORE, args.ip, config, store, wait_for_server=wait)

    with ExitStack() as stack:
        # Actors are often started first.
        client = stack.enter_context(connect(make_client, "--server", status, PATIENCE))
        ctrl_c = stack.enter_context(CtrlC())
        status.note(f"actor {actor} makes {args.steps} transitions (Ctrl-C ends it)")
        client.recv_network_callback(on_network)
        client.start_async_update(interval=0.2)

        def over() -> bool:
            return ctrl_c.pressed or stopped()

        state, inserted, began = np.array([1.0, 0.0]), 0, time.monotonic()
        pace = Pace(args.steps, "transitions")
        while inserted < args.steps and not over():
            if not await_room(store, over, status):
                break
            push = rng.normal(size=1)
            inputs = np.concatenate([state, push])
            following = DYNAMICS @ inputs + rng.normal(scale=0.01, size=2)
            error = np.linalg.norm(network["model"] @ inputs - following)
            store.insert(
                {
                    "actor": actor,
                    "step": inserted,
                    "observation": state,
                    "action": push,
                    "next_observation": following,
                }
            )
            inserted += 1
            state = following
            status.show(
                f"{pace.text(inserted)}, {len(store)} on their way, "
                f"network {network['updates']}, prediction error {error:.3f}",
                "actor",
            )
            if args.rate:
                time.sleep(max(0.0, began + inserted / args.rate - time.monotonic()))
        if stopped():
            return  # the learner has failed, and says why

        client.update()  # what hasn't been sent yet
        received = client.request("received", actor)
        if received != inserted:
            raise SystemExit(f"LOST: inserted {inserted}, received {received}")
        if inserted and not network_arrived.wait(10):
            raise SystemExit("no network came back")
        status.note(f"{network['updates']} networks came back, with loss {network['loss']:.6f}")
        status.note(f"nothing lost: inserted {inserted} == received {received}")


def await_room(store: QueuedDataStore, over: Callable[[], bool], status: StatusLines) -> bool:
    """Wait, and say so, while the queue is full; False if there is no need for room any more."""
    began = time.monotonic()
    while len(store) >= CAPACITY:
        if over():
            return False
        if (waited := time.monotonic() - began) > PATIENCE:
            raise DeadlineExceeded(f"no learner took anything of {CAPACITY} transitions")
        if waited > 1.0:
            status.show(f"the queue is full; waiting for a learner for {waited:.0f} s", "actor")
        time.sleep(0.005)
    return True


def both(args: argparse.Namespace) -> None:
    learner, done = Learner(args), threading.Event()
    with StatusLines() as status, learner.server as server:
        server.start(threaded=True)
        with Side("learner", lambda: learner.learn(done.is_set, status), done.set):
            act(args, server.port, status, done.is_set)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--server", action="store_true", help="only learn")
    role.add_argument("--client", action="store_true", help="only act")
    add_connection_options(parser, port=5555)
    parser.add_argument(
        "--steps", type=int, default=5000, help="transitions to make (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=1000,
        help="transitions a second; 0 for as many as can be (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.server:
        serve(args)
    elif args.client:
        with StatusLines() as status:
            act(args, args.port, status)
    else:
        both(args)


if __name__ == "__main__":
    sys.exit(run(main))
