"""Stream video from a robot (or any machine with a camera) to whoever wants to see it.

    python examples/action_streamer.py --server --camera 0 --host 0.0.0.0      # on the robot
    python examples/action_streamer.py --client --ip ROBOT                     # anywhere

The server publishes frames (`publish_obs`), answers questions (`obs`) and takes orders (`act`).
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from collections import deque
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgeml import ActionClient, ActionConfig, ActionServer, EdgemlError, Jpeg
from frames import Source, add_source_options, open_sink, open_source
from terminal import (
    CtrlC,
    StatusLines,
    add_connection_options,
    announce,
    check_writable,
    connect,
    run,
)

Obs = dict[str, Any]


def make_config(args: argparse.Namespace) -> ActionConfig:
    """Return what both sides share."""
    return ActionConfig(
        port_number=args.port,
        action_keys=["pause", "set_fps"],
        observation_keys=["frame", "clock", "stream"],
        transport=args.transport,
    )


def frame_rate(given: str | float) -> float:
    """Check a number of frames per second."""
    if not 1 <= float(given) <= 1000:
        raise ValueError(f"fps must be within 1 and 1000, not {given}")
    return float(given)


# Server -----------------------------------------------------------------------------------


class Streamer:
    """Publishes what a source gives."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.fps = source.fps
        self.paused = threading.Event()
        self.newest: Obs = {}

    def obs(self, keys: list[str]) -> Obs:
        """Answer a client that asks for observations."""
        stream = {"source": self.source.name, "fps": self.fps, "paused": self.paused.is_set()}
        known = {"frame": self.newest, "clock": time.monotonic(), "stream": stream}
        return {key: known[key] for key in keys}

    def act(self, key: str, payload: Obs) -> Obs:
        """Carry out an order. What it raises is raised in the client that gave the order."""
        if key == "pause":
            paused = payload.get("paused", not self.paused.is_set())
            self.paused.set() if paused else self.paused.clear()
        elif key == "set_fps":
            self.fps = frame_rate(payload["fps"])
        return {"fps": self.fps, "paused": self.paused.is_set()}

    def frame(self, number: int) -> Obs:
        """Return the next frame as it is published."""
        frame = np.ascontiguousarray(self.source.read())
        return {"seq": number, "time": time.monotonic(), "frame": frame}


def serve(args: argparse.Namespace) -> None:
    with closing(open_source(args, args.fps)) as source:
        streamer = Streamer(source)
        config = make_config(args)
        # Frames leave as JPEG files, and are arrays again where they arrive.
        images = {"frame": Jpeg(args.jpeg)} if args.jpeg else None
        with (
            ActionServer(
                config, streamer.obs, streamer.act, host=args.host, images=images
            ) as server,
            StatusLines() as status,
            CtrlC() as ctrl_c,
        ):
            server.start(threaded=True)
            announce(status, f"streaming {source.name}", server.url, args.host)
            meter, number, due = Meter(), 0, time.monotonic()
            while not ctrl_c.pressed:
                if streamer.paused.is_set():
                    status.show(f"paused after {number} frames")
                    time.sleep(0.02)
                    continue
                number += 1
                streamer.newest = streamer.frame(number)
                server.publish_obs(streamer.newest)
                meter.add(time.monotonic(), number, streamer.newest["frame"].nbytes)
                status.show(f"{number} frames, {meter.rates()}, clients: {len(server.clients())}")
                # A source that is slower than the rate isn't made to catch up in a burst.
                due = max(due + 1 / streamer.fps, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
            status.note(f"streamed {number} frames")


# Client -----------------------------------------------------------------------------------


class RemoteClock:
    """Tells how old a frame is by the clock of the machine that took it.

    The two clocks have nothing to do with each other. If the way there takes as long as the way
    back, the server read its clock in the middle of a round trip; so of the last few round trips
    the shortest tells the difference best, and is wrong by no more than half its duration.
    """

    def __init__(self, client: ActionClient) -> None:
        self._client = client
        self._seen: deque[tuple[float, float]] = deque(maxlen=10)  # round trip, difference
        for _ in range(5):
            self.measure()

    def keep(self) -> None:
        """Measure once a second, for clocks drift and routes change."""
        if time.monotonic() - self._measured > 1.0:
            self.measure()

    def measure(self) -> None:
        """Make one more round trip."""
        self._measured = before = time.monotonic()
        there = self._client.obs(["clock"], timeout=2.0)["clock"]
        after = time.monotonic()
        round_trip, difference = after - before, there - (before + after) / 2
        if self._seen and abs(difference - min(self._seen)[1]) > self.round_trip + round_trip:
            self._seen.clear()  # another clock: the server's machine was restarted
        self._seen.append((round_trip, difference))

    @property
    def round_trip(self) -> float:
        """The shortest of the last round trips, in seconds."""
        return min(self._seen)[0]

    def age(self, taken: float, arrived: float) -> float:
        """Seconds between ``taken``, by the server's clock, and ``arrived``, by this one's."""
        return arrived + min(self._seen)[1] - taken


class Meter:
    """Frame rate and pixels of late, and what is told at the end."""

    WINDOW = 2.0  # seconds

    def __init__(self) -> None:
        self.frames = self.bytes = self.dropped = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._latencies: deque[float] = deque(maxlen=10_000)
        self._first = 0.0
        self._last = time.monotonic()
        self._newest = 0

    def add(self, now: float, number: int, size: int, latency: float = 0.0) -> None:
        """Count a frame."""
        # A number that isn't larger comes from a server that was started anew.
        if self.frames and number > self._newest:
            self.dropped += number - self._newest - 1
        self._newest = number
        self._first = self._first or now
        self._last = now
        self.frames += 1
        self.bytes += size
        self._latencies.append(latency)
        self._recent.append((now, size))
        while now - self._recent[0][0] > self.WINDOW:
            self._recent.popleft()

    def silence(self) -> float:
        """Seconds since the last frame."""
        return time.monotonic() - self._last

    def rates(self) -> str:
        """Frame rate and pixels of the last seconds."""
        return _rates(
            len(self._recent),
            sum(size for _, size in self._recent),
            self._recent[-1][0] - self._recent[0][0],
        )

    def latency(self, percent: float = 50, last: int = 30) -> str:
        """A percentile of the last so many latencies."""
        return f"{1e3 * np.percentile(list(self._latencies)[-last:], percent):.1f} ms"

    def summary(self) -> str:
        """Everything since the first frame."""
        if not self.frames:
            return "no frames"
        n, seconds = len(self._latencies), self._last - self._first
        return (
            f"{self.frames} frames in {seconds:.1f} s: {_rates(self.frames, self.bytes, seconds)}, "
            f"latency {self.latency(50, n)} (p95 {self.latency(95, n)}), {self.dropped} dropped"
        )


def _rates(frames: int, size: int, seconds: float) -> str:
    if frames < 2 or seconds <= 0:
        return "no rate yet"
    # n frames are n - 1 intervals.
    rate = (frames - 1) / seconds
    return f"{rate:.1f} fps, {rate * size / frames / 1e6:.2f} MB/s of pixels"


def watch(args: argparse.Namespace) -> None:
    if Path(args.output or "").suffix == ".mp4":
        check_writable("--output", Path(args.output))
    meter = Meter()
    arrivals: queue.Queue[tuple[Obs, float]] = queue.Queue(maxsize=8)

    def on_obs(obs: Obs) -> None:
        # Runs in a thread of the client's, while windows want the main one. Where that can't
        # keep up, frames are dropped here, and counted by their numbers.
        with suppress(queue.Full):
            arrivals.put_nowait((obs, time.monotonic()))

    def make_client(wait: float) -> ActionClient:
        return ActionClient(args.ip, config=make_config(args), task_id="action_streamer")

    with StatusLines() as status, connect(make_client, "--server", status) as client:
        clock = RemoteClock(client)
        if args.fps:
            client.act("set_fps", {"fps": args.fps})
        stream = client.obs(["stream"])["stream"]
        with (
            closing(open_sink(args.output, "edgeml action streamer", stream["fps"])) as sink,
            CtrlC() as ctrl_c,
        ):
            status.note(f"watching {stream['source']} into {sink.name} (Ctrl-C ends it)")
            client.register_obs_callback(on_obs)
            end, trouble = time.monotonic() + args.seconds, ""
            while meter.frames != args.frames and time.monotonic() < end and not ctrl_c.pressed:
                try:  # a server that is lost is found again by itself
                    match sink.key():
                        case "q":
                            break
                        case " ":
                            client.act("pause", timeout=2.0)
                    clock.keep()
                except EdgemlError as error:
                    trouble = f": {error}"
                try:
                    obs, arrived = arrivals.get(timeout=0.1)
                except queue.Empty:
                    if meter.silence() > 1.0:
                        status.show(f"no frames for {meter.silence():.0f} s{trouble}")
                    continue
                trouble = ""
                age = clock.age(obs["time"], arrived)
                meter.add(arrived, obs["seq"], obs["frame"].nbytes, age)
                if args.output != "none":
                    sink.write(obs["seq"], obs["frame"])
                status.show(
                    f"{meter.frames} frames, {meter.rates()}, latency {meter.latency()}, "
                    f"round trip {1e3 * clock.round_trip:.1f} ms, {meter.dropped} dropped"
                )
        if not meter.frames and time.monotonic() >= end:
            raise SystemExit(f"no frames came within {args.seconds:g} s")
        written = f"; written to {sink.name}" if meter.frames else ""
        status.note(meter.summary() + written)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--server", action="store_true", help="stream frames")
    role.add_argument(
        "--client",
        action="store_true",
        help="watch them; in the window, space makes the server pause, and q ends the client",
    )
    parser.add_argument(
        "--fps",
        type=frame_rate,
        help="server: frames per second (default: the camera's or the video's own, else 30); "
        "client: ask the server for as many",
    )
    add_connection_options(parser, port=5580)
    add_source_options(parser)
    parser.add_argument(
        "--jpeg",
        type=int,
        choices=range(1, 101),
        metavar="QUALITY",
        help="server: compress frames, with a quality of 1 to 100 (default: raw)",
    )
    group = parser.add_argument_group("client: what to do with the frames")
    group.add_argument(
        "--output",
        metavar="PATH",
        help="a file that ends in .mp4, a folder for pictures, or none for figures only "
        "(default: a window, or action_streamer.mp4 where there is no screen)",
    )
    group.add_argument("--frames", type=int, metavar="N", help="stop after N frames")
    group.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="stop after S seconds"
    )
    args = parser.parse_args()
    serve(args) if args.server else watch(args)


if __name__ == "__main__":
    sys.exit(run(main))
