"""What is done to a run. Each is a function that does it once; it is called until time is up.

Those of the network need a TCP proxy, so they don't apply to shm, whose ends hand descriptors to
each other: there the peers are what can fail, and the memory between them.
"""

from __future__ import annotations

from collections.abc import Callable

from .harness import TCP, Run

_HOUR = 3600.0


# Of the network ---------------------------------------------------------------------------


def none(run: Run) -> None:
    """Nothing at all."""
    run.sleep(0.1, 0.1)


def delay(run: Run) -> None:
    with run.weather(delay=run.rng.uniform(0.005, 0.2)):
        run.sleep(0.2, 1.0)


def jitter(run: Run) -> None:
    with run.weather(delay=0.005, jitter=run.rng.uniform(0.02, 0.3)):
        run.sleep(0.2, 1.0)


def loss(run: Run) -> None:
    with run.weather(delay=0.002, loss=run.rng.uniform(0.02, 0.3)):
        run.sleep(0.3, 1.5)


def bandwidth(run: Run) -> None:
    with run.weather(bandwidth=run.rng.uniform(20e3, 2e6)):
        run.sleep(0.3, 1.5)


def trickle(run: Run) -> None:
    """A few bytes at a time."""
    with run.weather(piece=run.rng.choice([1, 3, 17, 100]), delay=0.001):
        run.sleep(0.1, 0.5)


def black_hole(run: Run) -> None:
    with run.weather(dark="both"):
        run.sleep(0.1, 1.6)
    run.sleep(0.05, 0.5)


def one_way(run: Run) -> None:
    with run.weather(dark=run.rng.choice(["up", "down"])):
        run.sleep(0.1, 1.6)
    run.sleep(0.05, 0.5)


def cut(run: Run) -> None:
    run.sleep(0.02, 0.4)
    run.order_proxies(do="cut")


def reset(run: Run) -> None:
    run.sleep(0.02, 0.4)
    run.order_proxies(do="reset")


def half_open(run: Run) -> None:
    run.sleep(0.05, 0.5)
    run.order_proxies(do="half-open")
    run.sleep(0.1, 1.5)
    if run.rng.random() < 0.5:  # else the client has to find out by itself
        run.calm()


# Of processes -----------------------------------------------------------------------------


def kill_learner(run: Run) -> None:
    run.sleep(0.02, 0.6)
    run.kill("learner")
    run.sleep(0.0, 0.3)
    run.start("learner")


def kill_actor(run: Run) -> None:
    run.sleep(0.02, 0.4)
    name = run.rng.choice(run.actors)
    run.kill(name)
    run.sleep(0.0, 0.2)
    run.start(name)


def kills(run: Run) -> None:
    """Of whom chance chooses, the learner as often as all actors, or all at once."""
    run.sleep(0.02, 0.5)
    if run.rng.random() < 0.1:
        chosen = ["learner", *run.actors]
    else:
        chosen = [run.rng.choice(["learner", run.rng.choice(run.actors)])]
    for name in chosen:
        run.kill(name)
    run.sleep(0.0, 0.2)
    for name in chosen:
        run.start(name)


def restart_learner(run: Run) -> None:
    """It comes to its own end, and saves nothing then."""
    run.sleep(0.1, 0.6)
    run.end("learner")
    run.sleep(0.0, 0.3)
    run.start("learner")


def restart_actor(run: Run) -> None:
    run.sleep(0.05, 0.5)
    name = run.rng.choice(run.actors)
    run.end(name)
    run.start(name)


def freeze_learner(run: Run) -> None:
    run.sleep(0.02, 0.4)
    with run.frozen("learner"):
        run.sleep(0.05, 1.6)


def freeze_actor(run: Run) -> None:
    run.sleep(0.02, 0.4)
    with run.frozen(run.rng.choice(run.actors)):
        run.sleep(0.05, 1.6)


def slow_learner(run: Run) -> None:
    run.slow(run.rng.uniform(0.02, 0.4))
    run.sleep(0.2, 1.0)
    run.slow(0.0)
    run.sleep(0.0, 0.3)


def disk_full(run: Run) -> None:
    run.sleep(0.05, 0.4)
    with run.full_disk():
        run.sleep(0.1, 0.8)


def memory_full(run: Run) -> None:
    """No new file, and no new memory that both sides map, above a megabyte."""
    run.sleep(0.02, 0.3)
    for name in ("learner", *run.actors):
        run.limit_files(name, 1 << 20)
    run.sleep(0.1, 0.8)
    for name in ("learner", *run.actors):
        run.limit_files(name, None)


def wall_clock(run: Run) -> None:
    """It jumps, by up to two hours."""
    run.shift_clock(run.rng.choice([-1, 1]) * run.rng.choice([0.3, 5.0, 60.0, _HOUR, 2 * _HOUR]))
    run.sleep(0.02, 0.3)


def storm(run: Run) -> None:
    """Any of them, in turn."""
    others = [each for name, each in FAULTS.items() if name in of_transport(run.plan.transport)]
    run.rng.choice([each for each in others if each not in (storm, disk_full)])(run)


NETWORK: dict[str, Callable[[Run], None]] = {
    "delay": delay,
    "jitter": jitter,
    "loss": loss,
    "bandwidth": bandwidth,
    "trickle": trickle,
    "black-hole": black_hole,
    "one-way": one_way,
    "cut": cut,
    "reset": reset,
    "half-open": half_open,
}

PROCESSES: dict[str, Callable[[Run], None]] = {
    "kill-learner": kill_learner,
    "kill-actor": kill_actor,
    "restart-learner": restart_learner,
    "restart-actor": restart_actor,
    "freeze-learner": freeze_learner,
    "freeze-actor": freeze_actor,
    "slow-learner": slow_learner,
    "disk-full": disk_full,
    "memory-full": memory_full,
    "clock": wall_clock,
    "storm": storm,
}

FAULTS = {**NETWORK, **PROCESSES, "kills": kills, "none": none}
"""All, by name."""


def of_transport(transport: str) -> list[str]:
    """Names of the faults that a transport can have."""
    return [*(NETWORK if transport in TCP else ()), *PROCESSES, "none"]
