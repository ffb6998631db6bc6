"""iceoryx2 and zenoh, reduced to what the peers need of them: publish, and take.

Both are used by the fastest way that their Python API allows, as measured: in iceoryx2 two
publish-subscribe services rather than request-response, memory that was loaned and one copy into
it; in zenoh memory of its shared-memory provider, over a Unix socket. zenoh takes nothing but bytes
and bytearray, and gives nothing but bytes: that is one copy more on each side.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common import Array

_SPACE = "EDGEML_BENCHMARK"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """A directory for every file and socket, and nothing left behind, in /dev/shm neither."""
    before = set(glob.glob("/dev/shm/*.zenoh"))
    os.environ[_SPACE] = space = tempfile.mkdtemp(prefix="edgeml_benchmark_")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        yield
    finally:
        shutil.rmtree(space, ignore_errors=True)
        # Both leave segments where a process was killed, and zenoh where it was closed, too.
        for left in (set(glob.glob("/dev/shm/*.zenoh")) - before) | set(
            glob.glob(f"/dev/shm/{os.path.basename(space)}_*")
        ):
            with contextlib.suppress(OSError):
                os.unlink(left)


def socket_path(name: str) -> str:
    """Where a process may put a socket or a file of this name."""
    return os.path.join(os.environ[_SPACE], f"{name}-{os.getpid()}")


class Iceoryx:
    """A node of iceoryx2."""

    def __init__(self) -> None:
        self._iox = iox = importlib.import_module("iceoryx2")
        iox.set_log_level(iox.LogLevel.Error)
        config = iox.config.default()
        config.global_cfg.root_path = iox.Path.new(os.environ[_SPACE])
        config.global_cfg.prefix = iox.FileName.new(os.path.basename(os.environ[_SPACE]) + "_")
        off = iox.SignalHandlingMode.Disabled
        builder = iox.NodeBuilder.new().config(config).signal_handling_mode(off)
        self._node = builder.create(iox.ServiceType.Ipc)

    def _service(self, topic: str, readers: int) -> Any:
        iox = self._iox
        builder = self._node.service_builder(iox.ServiceName.new(topic))
        builder = builder.publish_subscribe(iox.Slice[ctypes.c_uint8])
        builder = builder.max_publishers(1).max_subscribers(readers).history_size(0)
        # The fewer samples there are, the more likely is the next one still in the cache.
        builder = builder.subscriber_max_buffer_size(1).subscriber_max_borrowed_samples(1)
        return builder.max_nodes(readers + 1).open_or_create()

    def publisher(self, topic: str, size: int, readers: int = 1) -> Any:
        builder = self._service(topic, readers).publisher_builder()
        return builder.initial_max_slice_len(size).create()

    def subscriber(self, topic: str, readers: int = 1) -> Any:
        return self._service(topic, readers).subscriber_builder().create()

    def _event(self, topic: str, readers: int) -> Any:
        builder = self._node.service_builder(self._iox.ServiceName.new(topic)).event()
        return builder.max_listeners(readers).max_nodes(readers + 1).open_or_create()

    def notifier(self, topic: str, readers: int = 1) -> Any:
        return self._event(topic, readers).notifier_builder().create()

    def listener(self, topic: str, readers: int = 1) -> Any:
        return self._event(topic, readers).listener_builder().create()

    @staticmethod
    def put(publisher: Any, arrays: Sequence[Array]) -> None:
        """Publish the arrays, one after the other, with one copy."""
        loaned = publisher.loan_slice_uninit(sum(array.nbytes for array in arrays))
        at = loaned.payload_ptr
        for array in arrays:
            _memory(at, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
            at += array.nbytes
        loaned.assume_init().send()

    @staticmethod
    def view(sample: Any) -> Array:
        """What was received, without a copy: valid until ``sample.delete()``."""
        return _memory(sample.payload_ptr, sample.header.number_of_elements)


def _memory(pointer: int, size: int) -> Array:
    # This took a quarter of the time of ctypes.memmove with ndarray.ctypes.data.
    there: Any = (ctypes.c_uint8 * size).from_address(pointer)
    return np.frombuffer(there, np.uint8)


class Zenoh:
    """A session of zenoh with one other, or several others, which connect to the one's path."""

    def __init__(self, *, listen: str = "", connect: str = "") -> None:
        self._zenoh = zenoh = importlib.import_module("zenoh")
        config = zenoh.Config()
        for key, value in {
            "mode": '"peer"',
            "scouting/multicast/enabled": "false",
            "scouting/gossip/enabled": "false",
            "listen/endpoints": f'["unixsock-stream/{listen}"]' if listen else "[]",
            "connect/endpoints": f'["unixsock-stream/{connect}"]' if connect else "[]",
            "transport/shared_memory/enabled": "true",
            "transport/shared_memory/mode": '"init"',
        }.items():
            config.insert_json5(key, value)
        self.session = zenoh.open(config)
        self._pool: Any = None
        self._size = 0
        self._kept = bytearray()

    def publisher(self, topic: str, readers: bool = False) -> Any:
        """Declare a publisher, and wait until it knows of a subscriber, if ``readers``."""
        block = self._zenoh.CongestionControl.BLOCK
        made = self.session.declare_publisher(topic, congestion_control=block, express=True)
        while readers and not made.matching_status.matching:
            time.sleep(0.01)
        return made

    def put(self, publisher: Any, arrays: Sequence[Array]) -> None:
        """Publish the arrays, one after the other, from its shared memory."""
        size = sum(array.nbytes for array in arrays)
        shm = self._zenoh.shm
        if size > self._size:
            self._pool = shm.ShmProvider.default_backend(3 * max(size, 1 << 16))
            self._size = size
        memory = self._pool.alloc(size, shm.BlockOn(shm.GarbageCollect()))
        at = 0
        for array in arrays:
            if len(self._kept) != array.nbytes:
                self._kept = bytearray(array.nbytes)
            np.frombuffer(self._kept, np.uint8)[:] = array.reshape(-1).view(np.uint8)
            memory[at : at + array.nbytes] = self._kept
            at += array.nbytes
        publisher.put(memory)
