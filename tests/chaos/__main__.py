"""The command line: `python -m tests.chaos --help`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from . import control, control_faults, faults, harness, replicas
from .machines import Machines
from .processes import Zygote
from .slow import watch
from .stage import Planned, run_all

TRANSPORTS = ("zmq", "grpc", "shm")


def main() -> int:
    """Run what is asked for; 1 where something was found."""
    options = _options()
    return options.do(options)


def _run(options: argparse.Namespace) -> int:
    """Carry out plans, and show a table of what they found."""
    plans = options.plans(options)
    directory = Path(options.directory or tempfile.mkdtemp(prefix="chaos-"))
    began, done, wrong = time.monotonic(), Counter(), Counter()

    def tell(plan: Planned, found: list[str], seconds: float) -> None:
        done[plan.transport, plan.fault] += 1
        if found:
            wrong[plan.transport, plan.fault] += 1
            print(f"\n{plan.name} ({seconds:.1f} s), in {directory / plan.name}:")
            for text in found:
                print(f"  {text}", flush=True)
        if sys.stdout.isatty() or done.total() % 20 == 0:
            print(
                f"\r{done.total()} of {len(plans)} runs, {wrong.total()} with findings, "
                f"{time.monotonic() - began:.0f} s ",
                end="" if sys.stdout.isatty() else "\n",
                flush=True,
            )

    run_all(plans, options.run, options.share, directory, options.jobs, tell)
    transports = list(dict.fromkeys(plan.transport for plan in plans))
    print(f"\n\n{'runs with findings':<20}" + "".join(f"{name:>12}" for name in transports))
    for fault in dict.fromkeys(plan.fault for plan in plans):
        cells = [(wrong[name, fault], done[name, fault]) for name in transports]
        print(f"{fault:<20}" + "".join(f"{f'{a} of {b}' if b else '-':>12}" for a, b in cells))
    if seen := control.SEEN + replicas.SEEN:
        print("\nseen: " + ", ".join(f"{n:,} {name}" for name, n in sorted(seen.items())))
    if not wrong and not options.directory:
        shutil.rmtree(directory)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Runs of a learner and two actors, of 1,000 numbered items, in real processes, "
        "to which something is done at moments that a seed chooses. What came of it is compared "
        "with what must hold: nothing lost, nothing twice, in order; nothing called durable that "
        "isn't; no call past its deadline. What a run with findings told is kept.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    each = commands.add_parser("faults", help="transports x faults x seeds")
    each.add_argument("--faults", metavar="NAMES", help="with commas between; all by default")
    each.add_argument("--seeds", type=int, default=20, help="of each (default: %(default)s)")
    each.set_defaults(do=_run, plans=_faults, run=harness.run, share=Zygote)

    kills = commands.add_parser("kills", help="kill -9 of learner and actors, a number of runs")
    kills.add_argument("--runs", type=int, default=200, help="of each transport (default 200)")
    kills.set_defaults(do=_run, plans=_kills, run=harness.run, share=Zygote)

    slow = commands.add_parser("slow", help="memory, with many slow subscribers of much")
    slow.add_argument("--transports", default=",".join(TRANSPORTS), metavar="NAMES")
    slow.add_argument("--subscribers", type=int, default=100, metavar="N")
    slow.add_argument("--megabytes", type=float, default=10.0, help="of a publication")
    slow.add_argument("--hz", type=float, default=100.0, help="publications a second")
    slow.add_argument(
        "--pause", type=float, default=5.0, help="seconds a subscriber takes over one"
    )
    slow.add_argument("--seconds", type=float, default=120.0)
    slow.set_defaults(do=_slow)

    for command in (each, kills):
        _add_common(command, jobs=3)
        command.add_argument("--items", type=int, default=1000, help="of a run")
        command.add_argument("--actors", type=int, default=2, help="on one store (default 2)")
        command.add_argument("--seconds", type=float, default=2.0, help="that the items take")
        command.add_argument("--without-checkpoints", action="store_true")
        command.add_argument("--without-logs", action="store_true")

    loop = commands.add_parser("control", help="a robot's control loop: transports x seeds")
    loop.add_argument(
        "--faults", metavar="NAMES", help="with commas between, each for all seeds; a mixture"
    )
    loop.add_argument("--seeds", type=int, default=200, help="(default: %(default)s)")
    loop.add_argument("--seconds", type=float, default=4.0, help="that faults go on")
    loop.set_defaults(plans=_control)

    hands = commands.add_parser("handovers", help="a robot that goes from hand to hand")
    hands.add_argument("--runs", type=int, default=40, help="of each transport (default 40)")
    hands.add_argument("--handovers", type=int, default=25, help="of a run (default 25)")
    hands.set_defaults(plans=_handovers)

    several = commands.add_parser("replicas", help="servers in Ray: killed, replaced, scaled")
    several.add_argument("--faults", metavar="NAMES", help="with commas between; all by default")
    several.add_argument("--runs", type=int, default=20, help="of each (default: %(default)s)")
    several.add_argument("--turns", type=int, default=3, help="that a fault takes (default 3)")
    _add_common(several, jobs=1, transports="zmq")
    several.set_defaults(do=_run, plans=_replicas, run=replicas.run, share=replicas.Cluster)

    for command in (loop, hands):
        _add_common(command, jobs=5)
        command.set_defaults(do=_run, run=control.run, share=Machines)
    return parser.parse_args()


def _add_common(
    command: argparse.ArgumentParser, jobs: int, transports: str = ",".join(TRANSPORTS)
) -> None:
    command.add_argument(
        "--transports", default=transports, metavar="NAMES", help="(default: %(default)s)"
    )
    command.add_argument("--first-seed", type=int, default=0, metavar="N")
    command.add_argument(
        "--jobs", type=int, default=jobs, help="runs at a time (default %(default)s)"
    )
    command.add_argument("--directory", metavar="DIR", help="for what the processes tell")


def _slow(options: argparse.Namespace) -> int:
    found = []
    for transport in options.transports.split(","):
        found += watch(
            transport,
            options.subscribers,
            int(options.megabytes * 1e6),
            options.hz,
            options.pause,
            options.seconds,
        )
    print("\n".join(found))
    return 1 if found else 0


def _faults(options: argparse.Namespace) -> list[harness.Plan]:
    chosen = options.faults.split(",") if options.faults else None
    return [
        _plan(options, transport, fault, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for transport in options.transports.split(",")
        for fault in faults.of_transport(transport)
        if chosen is None or fault in chosen
    ]


def _kills(options: argparse.Namespace) -> list[harness.Plan]:
    return [
        _plan(options, transport, "kills", seed)
        for seed in range(options.first_seed, options.first_seed + options.runs)
        for transport in options.transports.split(",")
    ]


def _control(options: argparse.Namespace) -> list[control.Plan]:
    chosen = options.faults.split(",") if options.faults else ["storm"]
    return [
        control.Plan(transport, fault, seed, seconds=options.seconds)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for transport in options.transports.split(",")
        for fault in chosen
        if fault in control_faults.of_transport(transport)
    ]


def _handovers(options: argparse.Namespace) -> list[control.Plan]:
    return [
        control.Plan(
            transport,
            "handovers",
            seed,
            handovers=options.handovers,
            leases=True,
            thinking=False,
        )
        for seed in range(options.first_seed, options.first_seed + options.runs)
        for transport in options.transports.split(",")
    ]


def _replicas(options: argparse.Namespace) -> list[replicas.Plan]:
    chosen = options.faults.split(",") if options.faults else [*replicas.FAULTS]
    return [
        replicas.Plan(transport, fault, seed, turns=options.turns)
        for seed in range(options.first_seed, options.first_seed + options.runs)
        for transport in options.transports.split(",")
        for fault in chosen
    ]


def _plan(options: argparse.Namespace, transport: str, fault: str, seed: int) -> harness.Plan:
    return harness.Plan(
        transport,
        fault,
        seed,
        items=options.items,
        actors=options.actors,
        checkpoints=not options.without_checkpoints,
        logs=not options.without_logs,
        seconds=options.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
