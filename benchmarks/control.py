"""Play chunks of a policy that is late, by edgeml's merging choices and by LeRobot's behaviours.

    python benchmarks/control.py                    # in virtual time: error, pauses, jumps, ages
    python benchmarks/control.py --weathers bad --refill 1 --seeds 20
    python benchmarks/control.py --real --seconds 300       # over zmq, shm and grpc, in real time
    python benchmarks/control.py --cost             # what a step takes, and an action

**What is played.** Two arms of six joints and a gripper each follow commands at 50 Hz, pass by a
moving target on either side, and are pushed now and then. A policy plans 50 steps ahead. It knows
all that can be known of the target's motion, so its plans get worse with their age for one reason
alone: the target does what nobody could know. Each plan has an error of its own, and successive
plans may choose different sides (`arm.py`). The *error* is the distance to the nearer way past the
target, RMS over joints and time: between two ways, where averages of two plans lead, is no way.

**What it is compared with.** `x zero` is the ratio to *no delay*: a plan at each tick, whose first
step is played at once. `x theirs` and `jump x` are ratios to LeRobot's behaviour of the same kind,
as its documentation describes it (`players.py`). *Pauses* are times in which there was nothing to
play (the last command stays), a minute; *paused* is how long they took together. The *jump* is the
step of one joint between two commands, at the 99.9th percentile. *Oldest* is the greatest age of an
observation that a command stood on. *Half* is how long a gripper's command was neither open nor
closed, in a minute; no plan ever says so. *Plans* are those that the server had to make.

**What makes it fair.**

- The world is the same for all: target, pushes, the plan that is made of an observation of a tick,
  and how long an answer takes that is asked for at a tick, are functions of the seed and the tick.
  If they went by the number of the request, whoever asks more often would meet another world.
- The same refill for both, in seconds, where the behaviour has one, and g = refill / chunk for
  asynchronous inference; for all else what LeRobot's pages give as default or example, and edgeml
  at equal settings (5 steps of blending for 5). Nothing was tuned on the seeds that are shown.
- The same server, which makes one plan at a time, the same deadline for an answer, the same hold
  when there is nothing to play, the same policy for real-time chunking.
- LeRobot's are shown in their best light: remote inference stops for good when it runs out of
  actions, here it plays on; and no observation is left out for being like the last one.
- Asynchronous inference sends observations at every tick while its queue is low, so the server
  plans twice where edgeml, with one request under way, has it plan once. So ``latest_only`` is
  compared with an edgeml that refills 0.2 s earlier, which still makes fewer plans. With
  ``--refill 1``, g = 1, it has the server plan without a pause, 10 times a second of 50
  observations, and tracks better for it than one request at a time can, of which there are 6.
- In "bad" weather answers take up to the deadline by themselves. Whoever has one request under way
  and gives it up then pauses often; whoever has several, and never gives up, pauses less.
- The two differ only where they decide: what is asked when, and what a new chunk does to the old.

**In real time** (`--real`) robots, one of each merging choice, run at once, each in a process of
its own, against one server process that sleeps for 100 ms a call; a TCP proxy adds 30 ms +- 20
either way, and for shm, where there is none, the server does. *Slow* are ticks in which `step` took
over 5 ms, *empty* those for which there was nothing to play: both are missed. *Held* are the slow
ones that the machine doesn't account for: without the time for which the robot's threads were ready
and had no core. *Late* are ticks that came late to the loop, or not at all; *failed* are requests
whose answers didn't come in time, and *worst* is what one of the others took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import math
import multiprocessing
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arm import (
    CALM,
    DIMS,
    GRIPPERS,
    HORIZON,
    JOINTS,
    RATE,
    STEP,
    WEATHERS,
    Arm,
    Policy,
    Server,
    Trace,
    Weather,
    World,
)
from common import Array, Child, Row, Table, add_ratios, interleaved, save, transports
from edgeml.core.url import Url
from players import DEADLINE, KINDS, MERGES, Edgeml, Fresh, Player, Request

if TYPE_CHECKING:
    import edgeml

_WARM_UP = 100  # ticks that are not counted
_TCP = ("zmq", "grpc")
_TOO_LONG = 0.005  # s for a step
_EQUAL = 1.005  # a ratio up to which two errors are the same


# In virtual time --------------------------------------------------------------------------


class Score:
    """What came of playing."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._off: list[float] = []
        self._jumps: list[float] = []
        self._ages: list[int] = []
        self._half = 0
        self._paused: list[bool] = []

    def note(
        self, tick: int, arm: Arm, command: Array, before: Array, age: int, paused: bool
    ) -> None:
        """Note a tick, once the arm has followed it."""
        if tick < _WARM_UP or tick + 1 >= self._world.ticks:
            return
        self._off.append(self._world.off(tick + 1, arm))
        self._jumps.append(float(np.max(np.abs(command - before)[JOINTS])))
        self._ages.append(age)
        hands = command[list(GRIPPERS)]
        self._half += bool(np.any((hands > 0.01) & (hands < 0.99)))
        self._paused.append(paused)

    def row(self) -> Row:
        paused = np.array(self._paused)
        ticks = len(paused)
        per_minute = 60 * RATE / ticks
        return {
            "error_mrad": math.sqrt(float(np.mean(self._off))) * 1e3,
            "pauses": float(np.sum(paused[1:] & ~paused[:-1]) + paused[0]) * per_minute,
            "paused_ms": float(np.sum(paused)) * STEP * 1e3 * per_minute,
            "jump_mrad": float(np.quantile(self._jumps, 0.999)) * 1e3,
            "oldest_ms": max(self._ages) * STEP * 1e3,
            "half_ms": self._half * STEP * 1e3 * per_minute,
        }


def play(player: Player, seed: int, weather: Weather, ticks: int) -> Row:
    """Play in virtual time, and return what came of it."""
    world = World(seed, ticks)
    arm, policy, score = Arm(world), Policy(world), Score(world)
    server = Server(Trace(weather, seed, ticks), policy.plan)
    pending: deque[tuple[Request, dict[str, Any]]] = deque()
    command, observed = np.zeros(DIMS), 0
    command[JOINTS] = arm.state[0]

    def deliver(tick: int) -> None:
        for observation, chunk in server.answers(tick * STEP):
            for each in list(pending):
                if each[1] is observation:
                    pending.remove(each)
                    player.answer(each[0], chunk, tick)

    for tick in range(ticks):
        deliver(tick)
        while pending and (tick - pending[0][0].tick) * STEP >= player.deadline:
            pending.popleft()
            player.give_up()
        if (request := player.ask(tick)) is not None:
            observation = {**world.observe(tick, arm), **request.extra}
            server.ask(tick, observation)
            pending.append((request, observation))
            deliver(tick)
        step, before = player.play(tick), command
        if step is not None:
            command, observed = step
        arm.follow(tick, command)
        score.note(tick, arm, command, before, tick - observed, step is None)
    return {**score.row(), "plans_per_s": server.plans / (ticks * STEP)}


def play_named(kind: str, whose: str, refill: float, weather: str, seed: int, ticks: int) -> Row:
    """Play one of a kind: "theirs", "ours"; or "zero", of any kind and weather."""
    if whose == "zero":
        return play(Fresh(), seed, CALM, ticks)
    two = KINDS[kind]
    if whose == "theirs":
        assert two.theirs is not None
        return play(two.theirs(refill), seed, WEATHERS[weather], ticks)
    assert two.ours is not None
    return play(Edgeml(MERGES[two.ours], two.refill(refill)), seed, WEATHERS[weather], ticks)


def together(rows: Sequence[Row]) -> Row:
    """Of several seeds: the mean; of ages the greatest."""
    return {
        key: float((max if key == "oldest_ms" else np.mean)([row[key] for row in rows]))
        for key in rows[0]
    }


_COLUMNS = {
    "error_mrad": "11.1",
    "x_zero": "7.2",
    "x_theirs": "9.3",
    "pauses": "7.1",
    "paused_ms": "10.0",
    "jump_mrad": "10.0",
    "jump_x": "7.2",
    "oldest_ms": "10.0",
    "half_ms": "8.0",
    "plans_per_s": "12.1",
}


def compare(options: argparse.Namespace) -> None:
    """Print a table for each weather, and what edgeml is worse at."""
    ticks, seeds = (
        round(options.seconds * RATE),
        range(options.first_seed, options.first_seed + options.seeds),
    )
    kinds = {kind: KINDS[kind] for kind in options.kinds}
    results: dict[str, Row] = {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def start(kind: str, whose: str, weather: str) -> list[Future[Row]]:
            return [
                pool.submit(play_named, kind, whose, options.refill, weather, seed, ticks)
                for seed in seeds
            ]

        def rows(under_way: list[Future[Row]]) -> list[Row]:
            return [future.result() for future in under_way]

        zero = start("", "zero", "")
        under_way = {
            (weather, kind, whose): start(kind, whose, weather)
            for weather in options.weathers
            for kind, two in kinds.items()
            for whose in ("theirs", "ours")
            if getattr(two, whose) is not None
        }
        base = results["no delay"] = together(rows(zero))
        worse = []
        for weather in options.weathers:
            told = WEATHERS[weather]
            print(f"\n{weather}: {told}")
            table = Table(*(20, 18), **_COLUMNS)
            table.add("no delay", "", row=base)
            for kind, two in kinds.items():
                theirs: list[Row] = []
                for whose in ("theirs", "ours"):
                    if (weather, kind, whose) not in under_way:
                        continue
                    each = rows(under_way[weather, kind, whose])
                    row = together(each)
                    row["x_zero"] = row["error_mrad"] / base["error_mrad"]
                    if theirs:
                        other = together(theirs)
                        row["x_theirs"] = row["error_mrad"] / other["error_mrad"]
                        row["jump_x"] = row["jump_mrad"] / other["jump_mrad"]
                        if row["x_theirs"] > _EQUAL or row["pauses"] > other["pauses"]:
                            worse.append(f"{weather}, {kind}")
                    theirs = each
                    results[f"{weather}, {kind}, {whose}"] = row
                    name = "LeRobot" if whose == "theirs" else str(two.ours)
                    table.add(kind if whose == "theirs" or not two.theirs else "", name, row=row)
    print(f"\na greater error, or more pauses, than LeRobot's: {'; '.join(worse) or 'nowhere'}")
    save(options, results)


# In real time -----------------------------------------------------------------------------


def serve(pipe: Connection, transport: str, robots: int, seed: int, ticks: int) -> None:
    """Run as a child: the policy's server, which takes 100 ms for a call."""
    import edgeml

    policy, weather = Policy(World(seed, ticks)), WEATHERS["jitter"]
    rng = random.Random(seed)

    def plan(observation: dict[str, Any]) -> Array:
        link = 0.0 if transport in _TCP else rng.uniform(*weather.link) + rng.uniform(*weather.link)
        time.sleep(rng.uniform(*weather.think) + link)
        return policy.plan(observation)

    with edgeml.InferenceServer(0, transport=transport, workers=robots) as server:
        server.register_interface("policy", plan)
        server.start(threaded=True)
        pipe.send(server.url)
        pipe.poll(None)


def link(pipe: Connection, port: int, seed: int) -> None:
    """Run as a child: a TCP proxy with the delays of the link."""
    from tests.chaos.proxy import Proxy

    async def run() -> None:
        proxy, (least, most) = Proxy(seed), WEATHERS["jitter"].link
        await proxy.obey({"do": "set", "delay": least, "jitter": most - least})
        await proxy.obey({"do": "target", "port": port})
        pipe.send(proxy.port)
        await asyncio.Event().wait()

    asyncio.run(run())


def waited_for_a_core() -> float:
    """Seconds that threads of this process were ready to run and others had the cores (Linux).

    Of all threads, as a step waits, too, for one that lost its core while it had the GIL.
    """
    waited = 0
    for name in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(OSError),  # it may have ended
            open(f"/proc/self/task/{name}/schedstat") as file,
        ):
            waited += int(file.read().split()[1])
    return waited / 1e9


def control(pipe: Connection, url: str, name: str, refill: float, seed: int, ticks: int) -> None:
    """Run as a child: a robot, with its loop."""
    import edgeml
    from edgeml.control import ChunkedPolicy, Ticks

    world = World(seed, ticks)
    arm, score = Arm(world), Score(world)
    command = np.zeros(DIMS)
    command[JOINTS] = arm.state[0]
    took: list[float] = []
    slow = held = empty = at = 0
    gc.freeze()  # what was imported, which is not looked through again and again
    with (
        edgeml.InferenceClient(url=url, timeout=10) as client,
        ChunkedPolicy(
            client,
            rate=RATE,
            merge=MERGES[name],
            refill=round(refill * RATE),
            timeout=DEADLINE,
        ) as policy,
    ):
        pipe.send("there")
        time.sleep(max(0.0, pipe.recv() - time.monotonic()))
        beats = Ticks(RATE)
        for tick in beats:
            for left_out in range(at, min(tick, ticks)):  # the arm went on meanwhile
                arm.follow(left_out, command)
            if tick >= ticks:
                break
            observation = world.observe(tick, arm)
            waited, began = waited_for_a_core(), time.perf_counter()
            action = policy.step(observation)
            seconds = time.perf_counter() - began
            waited = waited_for_a_core() - waited
            before, latest = command, policy.latest
            if action is not None:
                command = action
            arm.follow(tick, command)
            at = tick + 1
            if tick >= _WARM_UP:
                took.append(seconds)
                slow += seconds > _TOO_LONG
                held += seconds - waited > _TOO_LONG
                empty += latest.source != "chunk"
            age = round(latest.age * RATE) if math.isfinite(latest.age) else 0
            score.note(tick, arm, command, before, age, latest.source != "chunk")
        late = beats.late
        stats = policy.stats()
    p50, p99 = np.quantile(took, [0.5, 0.99]) * 1e6
    row = score.row()
    row |= {
        "slow": slow,
        "held": held,
        "empty": empty,
        "late": late,
        "failed": stats["requests_failed"],
        "worst_ms": stats["turnaround_max"] * 1e3,
        "p50_us": p50,
        "p99_us": p99,
        "max_us": max(took) * 1e6,
    }
    pipe.send(row)


def control_in_real_time(options: argparse.Namespace) -> None:
    """Run all robots at once, over one transport after the other."""
    sys.path.append(str(Path(__file__).parents[1]))  # for the proxy of the tests
    ticks, seed = round(options.seconds * RATE), options.first_seed
    base = play(Fresh(), seed, CALM, ticks)
    results: dict[str, Row] = {}
    table = Table(
        *(6, 18),
        slow="6.0",
        held="6.0",
        empty="6.0",
        late="6.0",
        failed="7.0",
        worst_ms="9.0",
        p50_us="7.0",
        p99_us="7.0",
        max_us="7.0",
        **{key: _COLUMNS[key] for key in ("error_mrad", "x_zero", "oldest_ms", "half_ms")},
    )
    for transport in options.transports:
        children: list[Child] = []
        try:
            server = Child(serve, transport, len(options.merges), seed, ticks)
            children.append(server)
            url = server.receive()
            if transport in _TCP:
                where = Url.parse(url)
                children.append(between := Child(link, where.port, seed))
                url = str(where.with_port(between.receive()))
            robots = {
                name: Child(control, url, name, options.refill, seed, ticks)
                for name in options.merges
            }
            children += robots.values()
            for robot in robots.values():
                robot.receive()
            begin = time.monotonic() + 0.5
            for i, robot in enumerate(robots.values()):
                robot.pipe.send(begin + i * STEP / len(robots))  # not all at the same moment
            for name, robot in robots.items():
                row = robot.receive(timeout=options.seconds + 60)
                row["x_zero"] = row["error_mrad"] / base["error_mrad"]
                results[f"{transport}, {name}"] = row
                table.add(transport, name, row=row)
        finally:
            for child in children:
                child.close()
    missed = sum(row["slow"] + row["empty"] for row in results.values())
    print(f"\nmissed (slow, empty): {missed:.0f} of {len(results) * (ticks - _WARM_UP)} ticks")
    save(options, results)


# What it costs ----------------------------------------------------------------------------


_ACTS = ("a function's call", "action", "observation told", "dead-man switch", "lease")
"""What is timed; each has what the one before it has."""


def offer(pipe: Connection, transport: str, what: str) -> None:
    """Run as a child: a device that does nothing, or a server of a function that doesn't."""
    import edgeml

    server: edgeml.InferenceServer | edgeml.ActionServer
    if what == _ACTS[0]:
        server = edgeml.InferenceServer(0, transport=transport)
        server.register_interface("arms", lambda payload: None)
    else:
        config = _device(what)
        server = edgeml.ActionServer(
            config, lambda keys: {"at": 0}, lambda key, payload: None, transport=transport
        )
    with server:
        server.start(threaded=True)
        pipe.send(server.url)
        pipe.poll(None)


def _device(what: str) -> edgeml.ActionConfig:
    import edgeml

    guard: dict[str, Any] = {}
    if what in _ACTS[3:]:
        guard = {"action_timeout": 60.0, "on_action_timeout": lambda key: None}
    return edgeml.ActionConfig(0, action_keys=["arms"], observation_keys=["at"], **guard)


def time_acts(transport: str, rounds: int) -> dict[str, Row]:
    """Return what an action takes, by what it tells and is guarded by."""
    import edgeml

    payload = np.zeros(DIMS)
    took: dict[str, list[float]] = {what: [] for what in _ACTS}
    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], Any]] = {}
        for what in _ACTS:
            child = Child(offer, transport, what)
            stack.callback(child.close)
            url = child.receive()
            if what == _ACTS[0]:
                caller = stack.enter_context(edgeml.InferenceClient(url=url))
                calls[what] = functools.partial(caller.call, "arms", payload)
                continue
            client = stack.enter_context(edgeml.ActionClient(url=url, config=_device(what)))
            says: dict[str, Any] = {}
            if what in _ACTS[4:]:
                stack.enter_context(client.lease("arms"))
            if what in _ACTS[2:]:
                says = {"observation": client.observe().id, "valid": 600.0, "policy": "v1"}
            calls[what] = functools.partial(client.act, "arms", payload, **says)
        for what in interleaved(_ACTS, rounds):
            for number in range(120):
                began = time.perf_counter()
                calls[what]()
                if number >= 20:
                    took[what].append(time.perf_counter() - began)
    return {
        what: {
            "p50_us": float(np.median(each)) * 1e6,
            "p99_us": float(np.quantile(each, 0.99)) * 1e6,
        }
        for what, each in took.items()
    }


def time_steps(name: str, seconds: float) -> Row:
    """Return what a step takes, by a plan alone and in a loop that sleeps between."""
    from edgeml.control import ChunkedPolicy, Ticks

    world = World(0, 1000)
    policy, arm = Policy(world), Arm(world)
    chunks = [policy.plan(world.observe(tick, arm)) for tick in range(1000)]
    player, hot = Edgeml(MERGES[name], HORIZON * STEP), []
    asked: deque[Request] = deque()
    for tick in range(1000):
        began = time.perf_counter()
        if (request := player.ask(tick)) is not None:
            asked.append(request)
        if asked and tick - asked[0].tick == 8:
            player.answer(asked.popleft(), chunks[tick], tick)
        player.play(tick)
        hot.append(time.perf_counter() - began)

    def think(observation: dict[str, Any]) -> Array:
        time.sleep(0.16)
        return chunks[int(observation["tick"]) % 1000]

    took = []
    with ChunkedPolicy(think, rate=RATE, merge=MERGES[name], refill=HORIZON) as loop:
        for tick in Ticks(RATE):
            if tick > seconds * RATE + _WARM_UP:
                break
            observation = world.observe(tick % 1000, arm)
            began = time.perf_counter()
            loop.step(observation)
            if tick > _WARM_UP:
                took.append(time.perf_counter() - began)
    return {
        "plan_us": float(np.median(hot)) * 1e6,
        "p50_us": float(np.median(took)) * 1e6,
        "p99_us": float(np.quantile(took, 0.99)) * 1e6,
    }


def measure_costs(options: argparse.Namespace) -> None:
    """Print what a step takes by each merging choice, and an action."""
    results: dict[str, Row] = {}
    table = Table(26, plan_us="8.0", p50_us="7.0", p99_us="7.0")
    for name in options.merges:
        results[name] = time_steps(name, min(options.seconds, 20.0))
        table.add(f"step, {name}", row=results[name])
    table = Table(*(26, 6), p50_us="7.0", p99_us="7.0", p50_us_ratio="6.2")
    for transport in options.transports:
        rows = time_acts(transport, rounds=20)
        add_ratios(rows, _ACTS[:1], "p50_us")
        for name, row in rows.items():
            results[f"{transport}, {name}"] = row
            table.add(name, transport, row=row)
    save(options, results)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = options.add_mutually_exclusive_group()
    what.add_argument("--real", action="store_true", help="in real time, over the transports")
    what.add_argument("--cost", action="store_true", help="what a step and an action take")
    options.add_argument("--seconds", type=float, default=60.0, help="that are played")
    options.add_argument("--refill", type=float, default=0.5, help="s that are left when it asks")
    options.add_argument("--first-seed", type=int, default=100)
    options.add_argument("--seeds", type=int, default=4, help="how many, in virtual time")
    options.add_argument(
        "--weathers", nargs="*", default=["jitter", "spikes", "lost", "bad"], choices=WEATHERS
    )
    options.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    options.add_argument("--transports", nargs="*", default=transports(), help="in real time")
    options.add_argument(
        "--merges", nargs="*", default=list(MERGES), choices=MERGES, help="in real time"
    )
    options.add_argument("--json", metavar="FILE", help="keep the figures in a file")
    given = options.parse_args()
    if given.real:
        control_in_real_time(given)
    elif given.cost:
        measure_costs(given)
    else:
        compare(given)


if __name__ == "__main__":
    main()
