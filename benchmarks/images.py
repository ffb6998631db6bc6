"""Three cameras over a slow link: publications as JPEG, and how late they arrive beyond the link.

    python benchmarks/images.py                    # 640x480 at 30 Hz over 20 Mbit/s
    python benchmarks/images.py --quality 90 --noise 4

The link is the loopback of a network namespace of its own, shaped by tc's token bucket; no root is
needed where users may make namespaces. What a publication takes beyond the link is its latency,
from before `publish_obs` until the subscriber has the decoded frames, less the time that as many
bytes take on the link. Frames are made: smooth shades, forty edges, things that move, and Gaussian
noise, which is what a JPEG spends its bytes on. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from common import Array, Child
from edgeml import ActionClient, ActionConfig, ActionServer, Jpeg

_INSIDE = "EDGEML_BENCHMARK_NAMESPACE"
_CAMERAS = ("left", "right", "wrist")
_WARM_UP = 1.0  # seconds that are not counted
_N_FRAMES = 30  # that are made of each camera, and shown in turns


def config_of(transport: str) -> ActionConfig:
    return ActionConfig(0, observation_keys=["images", "at"], transport=transport)


def frames(height: int, width: int, noise: float, seed: int) -> list[Array]:
    """What one camera sees in a second."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    still = np.stack(
        [
            128 + 60 * np.sin(x / 90 + c) + 40 * np.cos(y / 70 - c) + 20 * np.sin(x * y / 9000 + c)
            for c in range(3)
        ],
        -1,
    )
    for _ in range(40):
        top, left = rng.integers(0, height - 40), rng.integers(0, width - 40)
        h, w = rng.integers(10, 120, 2)
        part = still[top : top + h, left : left + w]
        part[:] = 0.4 * part + 0.6 * rng.integers(0, 255, 3)
    made = []
    for i in range(_N_FRAMES):
        moved = np.roll(still, 3 * i, axis=1)
        made.append(np.clip(moved + rng.normal(0, noise, still.shape), 0, 255).astype(np.uint8))
    return made


def serve(pipe: Any, args: argparse.Namespace, quality: int | None) -> None:
    """A robot: publishes what its cameras see."""
    cameras = [frames(480, 640, args.noise, seed) for seed in range(len(_CAMERAS))]
    images = None if quality is None else {"images.*": Jpeg(quality)}
    with ActionServer(config_of(args.transport), None, None, images=images) as server:
        server.start(threaded=True)
        pipe.send(server.url)
        pipe.recv()  # somebody has subscribed
        due = time.monotonic()
        for i in range(int((args.seconds + _WARM_UP) * args.hz)):
            now = {name: seen[i % _N_FRAMES] for name, seen in zip(_CAMERAS, cameras, strict=True)}
            server.publish_obs({"images": now, "at": time.monotonic()})
            due += 1 / args.hz
            time.sleep(max(0.0, due - time.monotonic()))
        pipe.send("done")
        pipe.recv()


def watch(pipe: Any, args: argparse.Namespace) -> None:
    """A machine with a GPU: gets them."""
    url = pipe.recv()
    seen: list[tuple[float, float]] = []
    first = threading.Event()

    def take(obs: Any) -> None:
        seen.append((obs["at"], time.monotonic()))
        first.set()

    with ActionClient(url=url, config=config_of(args.transport)) as client:
        subscription = client.register_obs_callback(take)
        pipe.send("subscribed")
        pipe.recv()
        pipe.send((seen, subscription.missed))


def sent_bytes() -> int:
    """Bytes that have gone over the link, headers and acknowledgements included."""
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def measure(args: argparse.Namespace, quality: int | None) -> None:
    server, client = Child(serve, args, quality), Child(watch, args)
    client.pipe.send(server.receive(120))
    client.receive()
    before, began = sent_bytes(), time.monotonic()
    server.pipe.send("go")
    server.receive(args.seconds + 60)
    n_bytes, took = sent_bytes() - before, time.monotonic() - began
    client.pipe.send("done")
    seen, missed = client.receive()
    server.pipe.send("end")
    for child in (client, server):
        child.process.join(10)
    counted = [(at, arrived) for at, arrived in seen if at > began + _WARM_UP]
    size = n_bytes / max(1, len(seen))
    link = 8 * size / (args.rate * 1e6)
    late = np.array([arrived - at for at, arrived in counted]) * 1e3
    what = "as arrays" if quality is None else f"Jpeg({quality})"
    print(
        f"{what}: {len(counted) / args.seconds:.1f} of {args.hz:g} a second ({missed} missed), "
        f"{8e-6 * n_bytes / took:.1f} Mbit/s, {size / 1e3:.0f} kB each, "
        f"{1e3 * link:.0f} ms on the link"
    )
    p50, p99 = np.percentile(late, [50, 99])
    print(
        f"    latency p50 {p50:.1f} ms, p99 {p99:.1f} ms; "
        f"beyond the link p50 {p50 - 1e3 * link:.1f} ms, p99 {p99 - 1e3 * link:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=20.0, help="of the link, in Mbit/s")
    parser.add_argument("--quality", type=int, nargs="*", default=[75], help="of the JPEGs")
    parser.add_argument("--noise", type=float, default=2.0, help="sigma, of 255")
    parser.add_argument("--hz", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--transport", default="zmq", choices=["zmq", "grpc"])
    parser.add_argument("--arrays", action="store_true", help="without JPEG as well")
    args = parser.parse_args()
    if _INSIDE not in os.environ:
        inside = ["unshare", "--map-root-user", "--net", sys.executable, *sys.argv]
        sys.exit(subprocess.call(inside, env={**os.environ, _INSIDE: "1"}))
    shape = f"rate {args.rate:g}mbit burst 8kb limit 256kb"
    for command in (
        "ip link set lo mtu 1500 up",  # as Ethernet's: a bucket takes whole packets
        f"tc qdisc add dev lo root tbf {shape}",
    ):
        subprocess.run(command.split(), check=True)
    for quality in [*args.quality, *([None] if args.arrays else [])]:
        measure(args, quality)


if __name__ == "__main__":
    main()
