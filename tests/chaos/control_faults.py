"""What is done to a control loop. Each is a function that does it once, until time is up."""

from __future__ import annotations

from collections.abc import Callable

from .control import Run
from .harness import TCP

# Of the network, which over shared memory can't fail -----------------------------------------


def none(run: Run) -> None:
    """Nothing at all."""
    run.sleep(0.1, 0.1)


def blackout(run: Run) -> None:
    """Of two seconds, of all links to the device, or of one."""
    links = run.links()
    with run.weather(run.rng.choice([links, [run.rng.choice(links)]]), dark="both"):
        run.sleep(2.0, 2.0)
    run.sleep(0.3, 1.0)


def one_way(run: Run) -> None:
    """What is sent arrives and isn't answered, or isn't even sent."""
    with run.weather(run.links(), dark=run.rng.choice(["up", "down"])):
        run.sleep(0.1, 1.0)
    run.sleep(0.1, 0.5)


def loss(run: Run) -> None:
    """Of a packet in a hundred: what comes after it stalls."""
    with run.weather(delay=0.005, loss=0.01):
        run.sleep(1.0, 3.0)


def heavy_loss(run: Run) -> None:
    with run.weather(delay=0.005, loss=run.rng.uniform(0.05, 0.2)):
        run.sleep(0.5, 1.5)


def reorder(run: Run) -> None:
    """Packets overtake each other: those that came too early wait for the others."""
    with run.weather(delay=0.01, jitter=0.05, piece=run.rng.choice([100, 1000])):
        run.sleep(0.5, 2.0)


def delay(run: Run) -> None:
    with run.weather(delay=run.rng.uniform(0.01, 0.25)):
        run.sleep(0.3, 1.0)


def jitter(run: Run) -> None:
    with run.weather(delay=0.02, jitter=run.rng.uniform(0.02, 0.3)):
        run.sleep(0.5, 1.5)


def cut(run: Run) -> None:
    run.sleep(0.05, 0.6)
    run.order_proxies(do="cut")


def reset(run: Run) -> None:
    run.sleep(0.05, 0.6)
    run.order_proxies(do="reset")


def half_open(run: Run) -> None:
    run.sleep(0.05, 0.5)
    run.order_proxies(run.links(), do="half-open")
    run.sleep(0.2, 1.5)
    run.calm()


# Of processes ---------------------------------------------------------------------------------


def kill_device(run: Run) -> None:
    run.sleep(0.1, 0.8)
    run.kill("device")
    run.sleep(0.0, 0.3)
    run.start("device")


def reboot_device(run: Run) -> None:
    """Its clock is another one afterwards."""
    run.sleep(0.1, 0.8)
    run.reboot_device()
    run.sleep(0.0, 0.3)
    run.start("device")


def restart_device(run: Run) -> None:
    """It comes to its own end."""
    run.sleep(0.1, 0.8)
    run.end("device")
    run.sleep(0.0, 0.3)
    run.start("device")


def freeze_device(run: Run) -> None:
    run.sleep(0.05, 0.6)
    with run.frozen("device"):
        run.sleep(0.02, 1.5)


def hang_device(run: Run) -> None:
    """A function of the user's hangs."""
    run.sleep(0.1, 0.6)
    run.hang(run.rng.uniform(0.05, 1.5))
    run.sleep(0.1, 1.0)


def kill_driver(run: Run) -> None:
    run.sleep(0.05, 0.6)
    name = run.rng.choice(run.drivers)
    run.kill(name)
    run.sleep(0.0, 0.6)
    run.start(name)


def freeze_driver(run: Run) -> None:
    run.sleep(0.05, 0.6)
    with run.frozen(run.rng.choice(run.drivers)):
        run.sleep(0.02, 1.5)


def kill_thinker(run: Run) -> None:
    if "thinker" in run.processes:
        run.sleep(0.1, 0.6)
        run.kill("thinker")
        run.sleep(0.0, 0.5)
        run.start("thinker")


def freeze_thinker(run: Run) -> None:
    if "thinker" in run.processes:
        run.sleep(0.05, 0.6)
        with run.frozen("thinker"):
            run.sleep(0.1, 1.5)


def takeover(run: Run) -> None:
    """A human takes the robot for a moment."""
    run.sleep(0.05, 0.5)
    if "human" in run.drivers:
        run.want("human", True)
        run.sleep(0.05, 0.7)
        run.want("human", False)


def storm(run: Run) -> None:
    """Any of them, in turn."""
    names = [name for name in of_transport(run.plan.transport) if name not in ("storm", "none")]
    FAULTS[run.rng.choice(names)](run)


def handovers(run: Run) -> None:
    """The robot goes from hand to hand, of those who want it and of those who fail."""
    name = run.rng.choice([run.writer, *run.drivers])
    what = run.rng.random()
    run.sleep(0.03, 0.25)
    if what < 0.5:
        run.toggle(name)
    elif what < 0.55:
        run.hang(run.rng.uniform(0.02, 0.4))
    elif what < 0.7:
        run.kill(name)
        run.sleep(0.0, 0.2)
        run.start(name)
    elif what < 0.9 or not run.proxies:
        with run.frozen(name):
            run.sleep(0.02, 0.8)
    elif what < 0.95:
        with run.weather([name], dark=run.rng.choice(["up", "down", "both"])):
            run.sleep(0.02, 0.8)
    else:
        run.order_proxies([name], do=run.rng.choice(["cut", "reset"]))


NETWORK: dict[str, Callable[[Run], None]] = {
    "blackout": blackout,
    "one-way": one_way,
    "loss": loss,
    "heavy-loss": heavy_loss,
    "reorder": reorder,
    "delay": delay,
    "jitter": jitter,
    "cut": cut,
    "reset": reset,
    "half-open": half_open,
}

PROCESSES: dict[str, Callable[[Run], None]] = {
    "kill-device": kill_device,
    "reboot-device": reboot_device,
    "restart-device": restart_device,
    "freeze-device": freeze_device,
    "hang-device": hang_device,
    "kill-driver": kill_driver,
    "freeze-driver": freeze_driver,
    "kill-thinker": kill_thinker,
    "freeze-thinker": freeze_thinker,
    "takeover": takeover,
    "storm": storm,
}

FAULTS = {**NETWORK, **PROCESSES, "handovers": handovers, "none": none}
"""All, by name."""


def of_transport(transport: str) -> list[str]:
    """Names of the faults that a transport can have."""
    return [*(NETWORK if transport in TCP else ()), *PROCESSES, "none"]
