"""Steer an arm by a policy that is far away: what each way to merge its chunks of actions costs.

    python examples/control_loop.py                                    # all in one process
    python examples/control_loop.py --server --host 0.0.0.0 --delay 0.2      # the policy
    python examples/control_loop.py --client --ip POLICY                     # the robot

A simulated arm is to follow a target, at 50 Hz. The policy thinks for a while, and then says what
to do in the second after its observation; the longer ago that was, the less of it is true. Each way
of `edgeml.control` to merge these chunks has its turn, and so has a policy that takes no time.
Last, an operator takes the arm away from the policy and gives it back: a script, or you, by the
keyboard. In the end there are a table and a picture of how far the arm was from its target.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    InferenceClient,
    InferenceServer,
    NotHolder,
    PolicyContract,
    Stale,
)
from edgeml.control import Blend, ChunkedPolicy, Ensemble, RealTime, Ticks
from terminal import (
    CtrlC,
    Side,
    StatusLines,
    add_connection_options,
    announce,
    check_writable,
    connect,
    run,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[np.float64]
Tree = dict[str, Any]
Show = Callable[[str], None]

RATE = 50.0  # control steps per second
HORIZON = 50  # steps of a chunk
MAX_AGE = 1.5  # seconds after its observation for which the arm takes a command
SILENCE = 0.2  # seconds without a command after which the arm stops by itself
PATIENCE = 60.0  # seconds that the robot waits for a policy

CHOICES: dict[str, Any] = {
    "zero delay": None,  # a policy that takes no time, asked at every step
    "append": "append",
    "aligned": "aligned",
    "blend": Blend(10, only=["joints"]),  # a gripper is open or closed, and nothing in between
    "ensemble": Ensemble(only=["joints"]),
    "real-time": RealTime(),
}
TAKEN_OVER = "blend"  # is played when the operator comes


# The arm ----------------------------------------------------------------------------------

JOINTS = 6
SERVO = 2 * math.pi * 3.0  # rad/s: how quickly a joint follows its command, critically damped
LAG = 2 / SERVO  # seconds that it is behind a steady motion
FRAME = 0.005  # seconds between two looks at how far it is off

_SWINGS = np.array(
    [[0.06, 0.2], [0.08, 0.18], [0.1, 0.16], [0.05, 0.22], [0.12, 0.14], [0.07, 0.17]]
)
_SIZES = np.array([0.5, 0.1])  # rad, of each joint's two swings


def target_at(times: Array) -> tuple[Array, Array]:
    """Where the target is, and how fast it moves, in the arm's joints: rad, rad/s."""
    turns = 2 * math.pi * _SWINGS  # joints x swings
    phases = turns * np.asarray(times)[..., None, None] + np.arange(JOINTS)[:, None]
    return (_SIZES * np.sin(phases)).sum(-1), (_SIZES * turns * np.cos(phases)).sum(-1)


def gripper_at(now: float) -> float:
    """Whether the gripper is to be open, 1, or closed, 0."""
    return float(int(now / 2) % 2)


class Arm:
    """Joints that go where they are told, and a record of how that was. Used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = self._time = time.monotonic()
        self._joints = target_at(np.zeros(()))[0]
        self._speeds = np.zeros(JOINTS)
        self._command = self._joints
        self._frames: list[tuple[Array, Array]] = []  # times, and where the joints were
        self.started: float | None = None  # when the first command came
        self.jump = 0.0  # rad; the largest from one command to the next
        self.stops = 0

    def obs(self, keys: list[str]) -> Tree:
        """What is seen of it and its target."""
        with self._lock:
            now = self._move()
            target, speed = target_at(np.array(now))
            seen = {"joints": self._joints, "target": target, "speed": speed}
            return {"state": {**seen, "gripper": gripper_at(now)}}

    def act(self, key: str, command: Mapping[str, Array]) -> None:
        """Go somewhere."""
        joints = np.array(command["joints"], float)
        if joints.shape != (JOINTS,):
            raise ValueError(f"the arm has {JOINTS} joints, not {joints.shape}")
        with self._lock:
            now = self._move()
            if self.started is None:
                self.started = now
            else:
                self.jump = max(self.jump, float(np.abs(joints - self._command).max()))
            self._command = joints

    def now(self) -> float:
        """Seconds since the first command; 0 before it."""
        with self._lock:
            return 0.0 if self.started is None else self._move() - self.started

    def stop(self) -> None:
        """Stay where it is: what the device itself does when commands cease."""
        with self._lock:
            self._move()
            self._command = self._joints
            self.stops += 1

    def _move(self) -> float:
        """Bring it to where it is by now; returns the time since the beginning."""
        now = time.monotonic()
        frames = max(1, int((now - self._time) / FRAME))
        passed = (now - self._time) * np.arange(1, frames + 1)[:, None] / frames
        # How a critically damped spring goes to its rest.
        gap, decay = self._joints - self._command, np.exp(-SERVO * passed)
        push = self._speeds + SERVO * gap
        joints = self._command + (gap + push * passed) * decay
        speeds = (self._speeds - SERVO * push * passed) * decay
        self._frames.append((self._time - self._began + passed[:, 0], joints))
        self._joints, self._speeds, self._time = joints[-1], speeds[-1], now
        return now - self._began

    def record(self) -> tuple[Array, Array, Array]:
        """Times since the first command, where the joints were, and where the target was."""
        with self._lock:
            self._move()
            times = np.concatenate([times for times, _ in self._frames])
            joints = np.concatenate([joints for _, joints in self._frames])
        started = math.inf if self.started is None else self.started
        begin = times.searchsorted(started)
        return times[begin:] - started, joints[begin:], target_at(times[begin:])[0]


# The policy -------------------------------------------------------------------------------


class Policy:
    """Guesses where the target will be: further on as it moves now. No two guesses are alike."""

    def __init__(self, delay: float, jitter: float) -> None:
        self._delay = delay
        self._jitter = jitter
        self._rng = np.random.default_rng(0)
        self.chunks = 0

    def think(self, observation: Tree) -> Tree:
        """Plan, and take as long as a large model far away does."""
        time.sleep(max(0.0, self._delay + self._rng.uniform(-self._jitter, self._jitter)))
        return self.plan(observation)

    def plan(self, observation: Tree) -> Tree:
        """Return a chunk: what to do at each step from that of the observation on."""
        self.chunks += 1
        ahead = np.arange(HORIZON)[:, None] / RATE + LAG
        joints = observation["target"] + observation["speed"] * ahead
        joints += self._rng.normal(0, 0.04, JOINTS)
        gripper = np.full((HORIZON, 1), observation["gripper"])
        previous = observation.get("prev_chunk")
        if previous is not None:  # real-time chunking: go on from what is being played
            before, delay = previous["joints"], observation["inference_delay"]
            left = np.arange(len(before))
            certain = np.exp(-np.maximum(left - delay, 0) / 10)[:, None]
            joints[: len(before)] = certain * before + (1 - certain) * joints[: len(before)]
        return {"actions": {"joints": joints, "gripper": gripper}}


def policy_server(policy: Policy, args: argparse.Namespace, port: int) -> InferenceServer:
    """Return a server of the policy, which says for what loops it was made."""
    server = InferenceServer(port, args.host, args.transport)
    contract = PolicyContract(rate=RATE, horizon=HORIZON)
    server.register_interface("policy", policy.think, contract=contract, check="none")
    return server


def serve(args: argparse.Namespace) -> None:
    policy = Policy(args.delay, args.jitter)
    server = policy_server(policy, args, args.port)
    with server.serving(), StatusLines() as status, CtrlC() as ctrl_c:
        announce(status, f"a policy that takes {args.delay:g} s", server.url, args.host)
        while not ctrl_c.pressed:
            status.show(f"chunks: {policy.chunks}")
            time.sleep(0.1)


# The operator -----------------------------------------------------------------------------

Hand = Callable[[float], "Array | None"]
"""What an operator does at a time: moves the joints, by rad in a step, or lets go by None."""


class Script:
    """Takes the arm in the middle third of the time, and turns its first joint."""

    def __init__(self, seconds: float) -> None:
        self._third = seconds / 3

    def __call__(self, now: float) -> Array | None:
        return 0.01 * np.eye(JOINTS)[0] if self._third < now < 2 * self._third else None


class Keyboard:
    """Takes the arm when you press space, and gives it back when you do so again."""

    help = "space takes the arm and gives it back; w, s, a, d move it"
    _MOVES: Mapping[str, tuple[int, float]] = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1)}

    def __init__(self) -> None:
        self._has_it = False

    def __enter__(self) -> Self:
        self._settings = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)

    def __call__(self, now: float) -> Array | None:
        push = np.zeros(JOINTS)
        while select.select([sys.stdin], [], [], 0)[0]:
            key = os.read(sys.stdin.fileno(), 1).decode(errors="replace")
            if key == " ":
                self._has_it = not self._has_it
            elif key in self._MOVES:
                joint, sign = self._MOVES[key]
                push[joint] += 0.1 * sign
        return push if self._has_it else None


def operate(hand: Hand, client: ActionClient, over: threading.Event) -> None:
    """Do with the arm what the hand does, as long as it has it."""
    with ExitStack() as leases:
        has_it = False
        for tick in Ticks(RATE):
            push = hand(tick / RATE)
            if over.is_set():
                return
            if push is None:
                leases.close()  # gives it back
                has_it = False
                continue
            if not has_it:
                leases.enter_context(client.lease("arm", priority=10))
                has_it = True
                joints = client.obs()["state"]["joints"].copy()
            joints += push
            with suppress(NotHolder):  # somebody with a higher priority still
                client.act("arm", {"joints": joints})


# The robot --------------------------------------------------------------------------------


@dataclass
class Turn:
    """What came of one turn.

    Attributes:
        name: of the choice.
        times: seconds since the first command.
        joints: where they were at these times, rad.
        target: where they were to be.
        jump: rad; the largest from one command to the next.
        age: seconds since the observation of the oldest thing that was played.
        holds: how often nothing was left to play.
        late: steps that came late.
        taken: the times at which another had the arm.
    """

    name: str
    times: Array
    joints: Array
    target: Array
    jump: float
    age: float
    holds: int
    late: int
    taken: Array

    def errors(self) -> Array:
        """How far it was off at each time: rad, the root of the mean square of all joints."""
        errors: Array = np.sqrt(((self.joints - self.target) ** 2).mean(axis=1))
        return errors

    def error(self) -> float:
        """The same over all of the time."""
        return float(np.sqrt((self.errors() ** 2).mean())) if len(self.times) else math.nan


def play(
    name: str, args: argparse.Namespace, client: InferenceClient, show: Show, hand: Hand | None
) -> Turn:
    """Steer a new arm for a while, in one of the ways; where there is a hand, it may take it."""
    arm, ticks, taken = Arm(), Ticks(RATE), []
    config = ActionConfig(
        0,
        ["arm"],
        ["state"],
        action_timeout=SILENCE,
        on_action_timeout=arm.stop,
        action_rate=RATE,
    )
    source: Any = client
    settings: dict[str, Any] = {"merge": CHOICES[name], "refill": args.refill}
    if CHOICES[name] is None:
        source, settings = Policy(0.0, 0.0).plan, {"sync": True, "refill": HORIZON}
    with ExitStack() as stack:
        server = ActionServer(config, arm.obs, arm.act, transport=args.transport)
        stack.enter_context(server.serving())
        robot = stack.enter_context(ActionClient(config=config, url=server.url))
        lease = stack.enter_context(robot.lease("arm"))
        policy = stack.enter_context(
            ChunkedPolicy(source, rate=RATE, max_age=MAX_AGE, lease=lease, **settings)
        )
        if hand is not None:
            over = threading.Event()
            operator = stack.enter_context(ActionClient(config=config, url=server.url))
            work = partial(operate, hand, operator, over)
            stack.enter_context(Side("operator", work, over.set))
        for tick in ticks:
            if tick >= args.seconds * RATE:
                break
            seen, taken_at = robot.observe()
            action = policy.step(seen["state"], observation_id=taken_at)
            latest = policy.latest
            if action is not None:
                with suppress(NotHolder, Stale):  # the arm knows best
                    robot.act("arm", action, observation=latest.observation_id, valid=MAX_AGE)
            if latest.source == "taken":
                taken.append(arm.now())
            show(f"{name}: {tick / RATE:.0f} of {args.seconds:g} s, {latest.source}")
        figures = policy.stats()
    return Turn(
        name if hand is None else f"{name}, taken over",
        *arm.record(),
        jump=arm.jump,
        age=figures["age_max"],
        holds=int(figures["holds"]),
        late=ticks.late,
        taken=np.array(taken),
    )


def play_all(args: argparse.Namespace, client: InferenceClient, status: StatusLines) -> list[Turn]:
    turns: list[Turn] = []
    with CtrlC() as ctrl_c, ExitStack() as stack:

        def show(text: str) -> None:
            if ctrl_c.pressed:
                raise KeyboardInterrupt
            status.show(text)

        with suppress(KeyboardInterrupt):
            turns.extend(play(name, args, client, show, None) for name in args.choices)
            if args.takeover != "none":
                hand: Hand = Script(args.seconds)
                if args.takeover == "keyboard":
                    hand = stack.enter_context(Keyboard())
                    status.note(Keyboard.help)
                turns.append(play(TAKEN_OVER, args, client, show, hand))
    return turns


# What came of it --------------------------------------------------------------------------


def table(turns: list[Turn]) -> str:
    """Return a line for each turn."""
    best = next((turn.error() for turn in turns if turn.name == "zero delay"), math.nan)
    lines = [f"{'':18}  error  ratio   jump  oldest  holds  late  taken"]
    for turn in turns:
        error, jump = 1e3 * turn.error(), 1e3 * turn.jump
        lines.append(
            f"{turn.name:18} {error:6.1f} {turn.error() / best:6.2f} {jump:6.1f} "
            f"{turn.age:7.2f} {turn.holds:6} {turn.late:5} {len(turn.taken) / RATE:6.2f}"
        )
    return "\n".join(
        [*lines, "error and jump: mrad; ratio: to zero delay; oldest, taken: s; late: steps"]
    )


def draw(turns: list[Turn], path: Path) -> None:
    """Draw how far off each turn was, and the one in which the arm was taken away."""
    from matplotlib.figure import Figure  # only here: it takes a second

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    above.set_title("how far the arm is from its target", loc="left", fontweight="bold")
    above.set_ylabel("mrad, root of the mean square of a second")
    window = int(1 / FRAME)
    for turn in turns:
        if len(turn.taken) or len(turn.times) < 2:
            continue
        squares = np.convolve(turn.errors() ** 2, np.full(window, 1 / window), "valid")
        above.plot(
            turn.times[len(turn.times) - len(squares) :],
            1e3 * np.sqrt(squares),
            label=f"{turn.name}: {1e3 * turn.error():.0f}",
            color="black" if turn.name == "zero delay" else None,
        )
    turn = turns[-1]
    below.set_title(f"the first joint: {turn.name}", loc="left", fontweight="bold")
    below.set_ylabel("rad")
    below.plot(turn.times, turn.target[:, 0], color="black", linewidth=1, label="target")
    below.plot(turn.times, turn.joints[:, 0], label="arm")
    for times in np.split(turn.taken, np.flatnonzero(np.diff(turn.taken) > 0.2) + 1):
        if len(times):
            below.axvspan(times[0], times[-1] + 1 / RATE, color="orange", alpha=0.2, linewidth=0)
    for axes in (above, below):
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.25)
        axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=150)


def control(args: argparse.Namespace, url: str | None = None) -> None:
    """Have all turns against a policy, and tell what came of them."""
    where: dict[str, Any] = {"url": url}
    if url is None:
        where = {"host": args.ip, "port_num": args.port, "transport": args.transport}
    with StatusLines() as status:
        make = partial(InferenceClient, **where)
        client = connect(lambda wait: make(wait_for_server=wait), "--server", status, PATIENCE)
        with client:
            turns = play_all(args, client, status)
        if turns:
            status.note(table(turns))
    if turns and args.plot_path:
        try:
            draw(turns, args.plot_path)
        except ImportError as error:
            print(f"no picture: {error}")
        else:
            print(f"picture: {args.plot_path}")


def both(args: argparse.Namespace) -> None:
    with policy_server(Policy(args.delay, args.jitter), args, 0).serving() as server:
        control(args, server.url)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--server", action="store_true", help="only the policy")
    role.add_argument("--client", action="store_true", help="only the robot")
    add_connection_options(parser, port=5557)
    option = parser.add_argument
    option("--delay", type=float, default=0.13, help="seconds of an answer (default: %(default)s)")
    option("--jitter", type=float, default=0.04, help="more or less (default: %(default)s)")
    option("--seconds", type=float, default=10.0, help="of each turn (default: %(default)s)")
    option("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="who has a turn")
    option("--refill", type=int, help="steps left at which to ask (default: half a chunk)")
    option(
        "--takeover",
        choices=("script", "keyboard", "none"),
        default="script",
        help=f"who takes the arm in a last turn, of {TAKEN_OVER!r} (default: %(default)s)",
    )
    option("--plot_path", type=Path, help="draw a picture, such as control_loop.png")
    args = parser.parse_args()
    if args.takeover == "keyboard" and not args.server and not sys.stdin.isatty():
        raise SystemExit("--takeover keyboard needs a terminal to read keys from")
    if args.plot_path:
        check_writable("--plot_path", args.plot_path)
    if args.server:
        serve(args)
    elif args.client:
        control(args)
    else:
        both(args)


if __name__ == "__main__":
    sys.exit(run(main))
