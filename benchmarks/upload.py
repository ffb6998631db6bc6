"""Time uploads of transitions to a learner, side by side with the peers, in one run.

    python benchmarks/upload.py [--json FILE]

A batch of items lies in a local store; the time is until the learner, in another process, has
acknowledged that it is in its store. The peers without stores send a list of dicts, and the learner
appends dicts of arrays to a deque.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from abc import ABC, abstractmethod
from collections import deque
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import msgspec
import numpy as np

from common import (
    Array,
    Child,
    Row,
    Table,
    add_ratios,
    interleaved,
    medians,
    parser,
    save,
    transports,
)
from links import installed, socket_path, workspace

CASES = {"state, 168 B": 1000, "image, 49 KB": 100}
"""Items a batch."""

Item = dict[str, Any]
Check = tuple[int, float, float]
"""How many items have arrived, and the reward and the sum of the observation of the newest."""


def make_items(case: str) -> list[Item]:
    rng = np.random.default_rng(0)
    items: list[Item] = []
    for _ in range(CASES[case]):
        item = {
            "observations": rng.random(17, np.float32),
            "actions": rng.random(6, np.float32),
            "next_observations": rng.random(17, np.float32),
            "rewards": np.float32(0),
            "masks": np.float32(1),
        }
        if case.startswith("image"):
            item["image"] = rng.integers(0, 256, (128, 128, 3), np.uint8)
        items.append(item)
    return items


def check(count: int, newest: Item) -> Check:
    return count, float(newest["rewards"]), float(np.sum(newest["observations"]))


class Peer(ABC):
    """A learner in a process of its own, and an actor here."""

    name: ClassVar[str]
    busy: ClassVar[bool] = False
    """Whether the learner uses the CPU while nothing comes, so that it is stopped meanwhile."""
    patience: ClassVar[float] = 0.0
    """Seconds that the learner may take to end by itself."""

    def __init__(self, *options: Any) -> None:
        self.learner = Child(self.serve, *options)
        self.connect(self.learner.receive())
        self._sent = 0
        self.rest()

    @staticmethod
    @abstractmethod
    def serve(pipe: Connection, *options: Any) -> None:
        """Run the learner: send its address, then serve until killed, or the pipe is closed."""

    @abstractmethod
    def connect(self, address: Any) -> None: ...

    @abstractmethod
    def fill(self, items: list[Item]) -> None:
        """Put a batch into the local store; not timed."""

    @abstractmethod
    def update(self) -> None:
        """Send what is in the local store, and wait until it is acknowledged."""

    @abstractmethod
    def check(self) -> Check: ...

    def wake(self) -> None:
        """Begin a turn."""
        if self.busy:
            self.learner.resume()

    def rest(self) -> None:
        """End a turn."""
        if self.busy:
            self.learner.pause()

    def one_round(self, items: list[Item], batches: int) -> Row:
        self.wake()
        times = []
        for _ in range(batches):
            items[-1]["rewards"] = np.float32(self._sent % 1000)
            self.fill(items)
            began = time.perf_counter()
            self.update()
            times.append(time.perf_counter() - began)
            self._sent += len(items)
        if self.check() != check(self._sent, items[-1]):
            raise AssertionError(f"{self.name} brought something else")
        self.rest()
        return {"items_per_s": len(items) / float(np.median(times))}

    def close(self) -> None:
        self.learner.close(self.patience)


class Edgeml(Peer):
    """`TrainerClient.update` into a `ReplayBuffer`, from a store of either kind."""

    transport: ClassVar[str]
    local: ClassVar[str]
    patience = 2.0

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        super().__init__(capacity, self.transport)

    @staticmethod
    def serve(pipe: Connection, *options: Any) -> None:
        import edgeml
        from edgeml.data import ReplayBuffer

        capacity, transport = options
        store = ReplayBuffer(capacity)

        def answer(kind: str, payload: Any) -> Check:
            count = store.latest_data_id()
            return check(count, store.get_latest_data(count - 1)[0])

        config = edgeml.TrainerConfig(0, None, ["check"], transport=transport)
        with edgeml.TrainerServer(config, request_callback=answer) as server:
            server.register_data_store("actor", store)
            server.start(threaded=True)
            pipe.send(server.url)
            with contextlib.suppress(EOFError):
                pipe.recv()

    def connect(self, address: str) -> None:
        import edgeml
        from edgeml.data import DataStoreBase, QueuedDataStore, ReplayBuffer

        self._store: DataStoreBase = (
            QueuedDataStore(self._capacity)
            if self.local == "queue"
            else ReplayBuffer(self._capacity)
        )
        config = edgeml.TrainerConfig(0, None, ["check"], transport=address)
        self._client = edgeml.TrainerClient("actor", "", config, self._store, timeout=30)

    def fill(self, items: list[Item]) -> None:
        for item in items:
            self._store.insert(item)

    def update(self) -> None:
        self._client.update()

    def check(self) -> Check:
        count, reward, total = self._client.request("check")
        return count, reward, total

    def close(self) -> None:
        self._client.stop()
        super().close()


class QueueZmq(Edgeml):
    name = "edgeml zmq, queue"
    transport, local = "zmq", "queue"


class ReplayZmq(Edgeml):
    name = "edgeml zmq, replay"
    transport, local = "zmq", "replay"


class QueueShm(Edgeml):
    name = "edgeml shm, queue"
    transport, local = "shm", "queue"


class ReplayShm(Edgeml):
    name = "edgeml shm, replay"
    transport, local = "shm", "replay"


class _Wire(msgspec.Struct, gc=False):
    """An item in a message; small arrays are copied out of it, since that is cheaper."""

    observations: bytes
    actions: bytes
    next_observations: bytes
    rewards: float
    masks: float
    image: memoryview | None = None


_decode = msgspec.msgpack.Decoder(list[_Wire]).decode


class _Deque:
    """What the peers without stores have at the learner: dicts of arrays, unpacked in place."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[Item] = deque(maxlen=capacity)
        self._count = 0

    def add(self, message: Any) -> bool:
        f32, array = np.dtype(np.float32), np.frombuffer
        for wire in _decode(message):
            item = {
                "observations": array(wire.observations, f32),
                "actions": array(wire.actions, f32),
                "next_observations": array(wire.next_observations, f32),
                "rewards": wire.rewards,
                "masks": wire.masks,
            }
            if wire.image is not None:
                item["image"] = array(wire.image, np.uint8).reshape(128, 128, 3)
            self._items.append(item)
            self._count += 1
        return True

    def check(self) -> Check:
        return check(self._count, self._items[-1])


class _Columns(_Deque):
    """The same copied into preallocated arrays, as a replay buffer that can be sampled has them."""

    def __init__(self, capacity: int) -> None:
        self._count = 0
        self._columns: dict[str, Array] = {
            name: np.zeros((capacity, *shape), np.float32)
            for name, shape in {
                "observations": (17,),
                "actions": (6,),
                "next_observations": (17,),
                "rewards": (),
                "masks": (),
            }.items()
        }
        self._columns["image"] = np.zeros((capacity, 128, 128, 3), np.uint8)

    def add(self, message: Any) -> bool:
        f32, array, columns = np.dtype(np.float32), np.frombuffer, self._columns
        capacity = len(columns["image"])
        for wire in _decode(message):
            row = self._count % capacity
            columns["observations"][row] = array(wire.observations, f32)
            columns["actions"][row] = array(wire.actions, f32)
            columns["next_observations"][row] = array(wire.next_observations, f32)
            columns["rewards"][row] = wire.rewards
            columns["masks"][row] = wire.masks
            if wire.image is not None:
                columns["image"][row] = array(wire.image, np.uint8).reshape(128, 128, 3)
            self._count += 1
        return True

    def check(self) -> Check:
        row = (self._count - 1) % len(self._columns["image"])
        return check(self._count, {name: column[row] for name, column in self._columns.items()})


class _Packing(Peer):
    """Packs the dicts as msgpack, into memory that is kept."""

    def __init__(self, *options: Any) -> None:
        self._packer = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        super().__init__(*options)

    def fill(self, items: list[Item]) -> None:
        self._items = items

    def pack(self) -> bytearray:
        wire = [
            {k: v.data if type(v) is np.ndarray else float(v) for k, v in item.items()}
            for item in self._items
        ]
        self._packer.encode_into(wire, self._buffer)
        return self._buffer


class RawZmq(_Packing):
    """DEALER and ROUTER over ipc."""

    name = "pyzmq"

    @staticmethod
    def serve(pipe: Connection, *options: Any) -> None:
        RawZmq.serve_into(_Deque(*options), pipe)

    @staticmethod
    def serve_into(store: _Deque, pipe: Connection) -> None:
        import zmq

        router = zmq.Context().socket(zmq.ROUTER)
        router.bind(f"ipc://{socket_path('upload')}")
        pipe.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
        while True:
            identity, frame = router.recv_multipart(copy=False)
            answer = store.add(frame.buffer) if len(frame) else store.check()
            router.send_multipart([identity, msgspec.msgpack.encode(answer)])

    def connect(self, address: str) -> None:
        import zmq

        # Below the threshold a copy is cheaper, as measured.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER, copy_threshold=512 << 10)
        self._socket.connect(address)

    def update(self) -> None:
        self._socket.send(self.pack(), copy=False)
        self._socket.recv()

    def check(self) -> Check:
        self._socket.send(b"")
        answer: Check = msgspec.msgpack.decode(self._socket.recv(), type=Check)
        return answer

    def close(self) -> None:
        self._socket.close(linger=0)
        super().close()


class RawZmqColumns(RawZmq):
    """The same into arrays."""

    name = "pyzmq, arrays"

    @staticmethod
    def serve(pipe: Connection, *options: Any) -> None:
        RawZmq.serve_into(_Columns(*options), pipe)


class Portal(_Packing):
    """portal, with a message of one buffer: it can't send more than a thousand."""

    name = "portal"
    busy = True

    @staticmethod
    def serve(pipe: Connection, *options: Any) -> None:
        portal = importlib.import_module("portal")
        store, port = _Deque(*options), portal.free_port()
        server = portal.Server(port, logging=False)
        server.bind("add", store.add)
        server.bind("check", store.check)
        pipe.send(port)
        server.start()

    def connect(self, address: int) -> None:
        self._address = address
        self.wake()

    def wake(self) -> None:
        super().wake()
        portal = importlib.import_module("portal")
        self._client = portal.Client(f"127.0.0.1:{self._address}", logging=False)
        self._client.connect()

    def rest(self) -> None:
        self._client.close()  # its thread wakes up thousands of times a second
        super().rest()

    def update(self) -> None:
        self._client.call("add", self.pack()).result()

    def check(self) -> Check:
        count, reward, total = self._client.call("check").result()
        return int(count), float(reward), float(total)


def find() -> dict[str, type[Peer]]:
    """Those that are installed, by name."""
    found: list[type[Peer]] = [RawZmq, RawZmqColumns] + [Portal] * installed("portal")
    for peer in (QueueZmq, ReplayZmq, QueueShm, ReplayShm):
        found += [peer] * (peer.transport in transports())
    return {peer.name: peer for peer in found}


def measure(kinds: dict[str, type[Peer]], case: str, rounds: int, batches: int) -> dict[str, Row]:
    """Medians over rounds of items a second."""
    items = make_items(case)
    kept: dict[str, list[Row]] = {name: [] for name in kinds}
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, kind in kinds.items():
            peers[name] = kind(4 * len(items))
            stack.callback(peers[name].close)
            peers[name].one_round(items, 8)  # until all stores are full and all memory is there
        for name in interleaved(peers, rounds):
            kept[name].append(peers[name].one_round(items, batches))
    rows = {name: medians(kept[name]) for name in kinds}
    add_ratios(rows, [RawZmq.name], "items_per_s")
    return rows


def main() -> None:
    known = find()
    options = parser(__doc__, known, rounds=15)
    options.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options.add_argument("--batches", type=int, default=20, help="in a round (default 20)")
    given = options.parse_args()
    kinds = {name: known[name] for name in given.peers}
    results = {}
    with workspace():
        table = Table(*(14, 20), items_per_s="12.0", items_per_s_ratio="6.2")
        for case in given.cases:
            results[case] = measure(kinds, case, given.rounds, given.batches)
            for name, row in results[case].items():
                table.add(case, name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
