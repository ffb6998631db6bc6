"""All three pairs between two network namespaces, as between two machines, with all recorded.

    python two_machines.py RECORD TRANSPORT SERVER_KEYS CLIENT_KEYS

This process is the server's machine, in a namespace of its own (``unshare --net``); the client's is
started from here. What passes between them is written to the file RECORD, as frames with lengths.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

HERE, THERE = "10.99.0.1", "10.99.0.2"
PORTS = {"action": 6379, "inference": 5557, "trainer": 5555}
DEADLINE = 60.0  # seconds

FILES = "TEST_FILES"
"""The environment variable with the directory of the files that ``shm`` connects by."""

ALL_FRAMES = 0x0003  # ETH_P_ALL
SOL_PACKET, PACKET_RX_RING, PACKET_STATISTICS = 263, 5, 6
SLOT, SLOTS = 1 << 17, 512  # bytes of one frame at most, and how many may wait
HEADER, STATUS = struct.Struct("@LIIHH"), struct.Struct("@L")  # of a slot: struct tpacket_hdr
FRAME = struct.Struct("<I")

NAMES = (
    *("key-of-an-observation", "key-of-an-action", "name-of-an-interface", "name-of-a-store"),
    *("type-of-a-request", "key-of-a-payload", "text-of-a-payload"),
    *("text-of-an-error", "id-of-a-client"),
)
"""What is said, by whom and about what; nobody else is to read it."""


def secret(number: int) -> Any:
    """Bytes of an array that nobody else has, a megabyte or nearly none."""
    size = 1_000_000 if number % 2 else 48
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


# The two programs ---------------------------------------------------------------------------


def url(service: str, transport: str, host: str) -> str:
    """Where a service is: at a port of its own, or at a file that both machines share."""
    if transport == "shm":
        return f"shm://{os.environ[FILES]}/{service}"
    return f"{transport}://{host}:{PORTS[service]}"


def configs() -> tuple[Any, Any]:
    from edgeml import ActionConfig, TrainerConfig

    action = ActionConfig(
        0, action_keys=["key-of-an-action"], observation_keys=["key-of-an-observation"]
    )
    return action, TrainerConfig(0, None, request_types=["type-of-a-request"])


def serve(transport: str, keys: str) -> None:
    """Serve the three pairs until the process is ended."""
    from edgeml import ActionServer, InferenceServer, TrainerServer
    from edgeml.data import ReplayBuffer

    def given(service: str) -> Any:
        return {"url": url(service, transport, "0.0.0.0"), "credentials": keys or None}

    config, trainer_config = configs()
    robot = ActionServer(
        config,
        lambda keys: {"key-of-an-observation": secret(1)},
        lambda key, payload: {"key-of-a-payload": secret(2)},
        **given("action"),
    )
    policy = InferenceServer(**given("inference"))

    def answer(payload: Any) -> Any:
        if payload is None:
            raise KeyError("text-of-an-error")
        return {"key-of-a-payload": [secret(3), secret(4), "text-of-a-payload"]}

    policy.register_interface("name-of-an-interface", answer)
    learner = TrainerServer(
        trainer_config, request_callback=lambda kind, payload: secret(5), **given("trainer")
    )
    learner.register_data_store("name-of-a-store", ReplayBuffer(100))
    with robot.serving(), policy.serving(), learner.serving():
        print("ready", flush=True)
        while True:  # until it is killed
            time.sleep(0.05)
            robot.publish_obs({"key-of-an-observation": secret(6)})
            learner.publish_network({"key-of-a-payload": secret(7)})


def use(transport: str, keys: str) -> None:
    """Use everything once, and see that it came whole."""
    print("here", flush=True)
    assert input() == "go"
    from edgeml import ActionClient, InferenceClient, RemoteError, TrainerClient
    from edgeml.data import QueuedDataStore

    def given(service: str) -> Any:
        at = url(service, transport, HERE)
        return {"url": at, "credentials": keys or None, "timeout": 10}

    config, trainer_config = configs()
    arrived: SimpleQueue[Any] = SimpleQueue()

    def same(got: Any, number: int) -> None:
        assert np.array_equal(got, secret(number)), number

    with ActionClient(config=config, **given("action")) as robot:
        same(robot.obs()["key-of-an-observation"], 1)
        same(robot.act("key-of-an-action", {"by": secret(8)})["key-of-a-payload"], 2)
        robot.register_obs_callback(arrived.put)
        same(arrived.get(timeout=10)["key-of-an-observation"], 6)
    with InferenceClient(**given("inference")) as policy:
        got = policy.call("name-of-an-interface", {"key-of-a-payload": [secret(9), secret(10)]})
        same(got["key-of-a-payload"][0], 3)
        same(got["key-of-a-payload"][1], 4)
        with contextlib.suppress(RemoteError):
            policy.call("name-of-an-interface", None)
            raise AssertionError("the policy should have raised")
    store = QueuedDataStore(100)
    weights: SimpleQueue[Any] = SimpleQueue()
    stores: Any = {"name-of-a-store": store}
    actor = TrainerClient(
        "name-of-an-actor",
        config=trainer_config,
        data_stores=stores,
        client_id="id-of-a-client",
        **given("trainer"),
    )
    with actor:
        actor.recv_network_callback(weights.put)
        for _ in range(3):
            store.insert({"key-of-a-payload": secret(11)})
        assert actor.update().applied == 3
        same(actor.request("type-of-a-request", {"key-of-a-payload": secret(12)}), 5)
        same(weights.get(timeout=10)["key-of-a-payload"], 7)
    print("done", flush=True)


# The machines -------------------------------------------------------------------------------


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=DEADLINE)


class Recorder(threading.Thread):
    """Writes each frame that passes a network interface to a file.

    They come through a ring of memory that the system fills (packet(7), PACKET_RX_RING): a socket's
    own buffer is too small for bursts, unless the system's administrator has enlarged it.
    """

    def __init__(self, interface: str, path: Path) -> None:
        super().__init__(daemon=True)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        ring = struct.pack("IIII", SLOT, SLOTS, SLOT, SLOTS)  # blocks and frames are the same
        self._socket.setsockopt(SOL_PACKET, PACKET_RX_RING, ring)
        self._ring = mmap.mmap(self._socket.fileno(), SLOT * SLOTS)
        self._socket.bind((interface, ALL_FRAMES))
        self._file = path.open("wb")
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        at = 0
        while True:
            status, _, size, start, _ = HEADER.unpack_from(self._ring, at)
            if status & 1:  # ours to read
                self._file.write(FRAME.pack(size) + self._ring[at + start : at + start + size])
                STATUS.pack_into(self._ring, at, 0)
                at = (at + SLOT) % (SLOT * SLOTS)
            elif self._over.is_set():
                return
            else:
                select.select([self._socket], [], [], 0.2)

    def end(self) -> int:
        """Stop; how many frames were missed."""
        self._over.set()
        self.join()
        self._file.close()
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        missed: int = struct.unpack("II", statistics)[1]
        return missed


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def main(record: str, transport: str, server_keys: str, client_keys: str) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    this = [sys.executable, __file__]
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[str]:
            process = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(process.kill)
            return process

        client = start("unshare", "--net", *this, "use", transport, client_keys)
        assert line_of(client) == "here"
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "near", "type", "veth", "peer", "far", "netns", str(client.pid))
        run("ip", "addr", "add", f"{HERE}/24", "dev", "near")
        run("ip", "link", "set", "near", "up")
        there = ("nsenter", f"--net=/proc/{client.pid}/ns/net", "ip")
        run(*there, "link", "set", "lo", "up")
        run(*there, "addr", "add", f"{THERE}/24", "dev", "far")
        run(*there, "link", "set", "far", "up")
        recorder = Recorder("near", Path(record))
        server = start(*this, "serve", transport, server_keys)
        assert line_of(server) == "ready"
        printed, _ = client.communicate("go\n", timeout=DEADLINE)
        server.kill()
        missed = recorder.end()
        assert printed.split() == ["done"], printed
        assert client.returncode == 0
        assert not missed, f"{missed} frames were not recorded"


# What was recorded --------------------------------------------------------------------------


def streams_of(record: Path) -> list[bytes]:
    """What passed: each direction of each TCP connection as a whole, and every other frame."""
    data = record.read_bytes()
    parts: dict[bytes, dict[int, bytes]] = {}
    others = []
    at = 0
    while at < len(data):
        (size,) = FRAME.unpack_from(data, at)
        frame = data[at + FRAME.size : at + FRAME.size + size]
        at += FRAME.size + size
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            others.append(frame)
            continue
        start = 14 + 4 * (frame[14] & 15)
        (length,) = struct.unpack_from(">H", frame, 16)
        end = 14 + length if length else len(frame)  # 0 where the system sends more than 64 KiB
        (sequence,) = struct.unpack_from(">I", frame, start + 4)
        payload = frame[start + 4 * (frame[start + 12] >> 4) : end]
        parts.setdefault(frame[26:34] + frame[start : start + 4], {})[sequence] = payload
    whole = []
    for pieces in parts.values():
        first = min(pieces)  # none of these streams is long enough to begin anew at 0
        if max(pieces) - first > 1 << 31:
            first = min(sequence for sequence in pieces if sequence > 1 << 31)
        stream = bytearray()
        for sequence, payload in pieces.items():
            offset = (sequence - first) % (1 << 32)
            stream.extend(bytes(max(0, offset + len(payload) - len(stream))))
            stream[offset : offset + len(payload)] = payload
        whole.append(bytes(stream))
    return [*whole, *others]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    what, *rest = sys.argv[1:]
    {"serve": serve, "use": use}.get(what, lambda *arguments: main(what, *arguments))(*rest)
