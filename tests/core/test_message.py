"""Memory that messages lie in: who may still change it, and how long it lives."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from edgeml.core import Message, Owned, is_owned, own
from edgeml.core.message import copy, empty, pooled

KB = 1 << 10


def test_pooled_memory_is_owned_however_it_is_looked_at():
    array = empty(pooled, (100, 1000), np.float32)
    assert is_owned(array.data.cast("B"))
    assert is_owned(array[10:20].reshape(-1).view(np.uint8).data)
    assert not is_owned(np.ones(1000).data.cast("B"))
    assert not is_owned(memoryview(bytearray(10)))
    assert is_owned(memoryview(b"bytes"))


def test_pooled_memory_lives_as_long_as_any_view_of_it():
    views = [
        np.asarray,
        lambda room: np.frombuffer(room, np.uint8)[5:],
        lambda room: np.ndarray((100,), np.uint8, room),
        lambda room: np.asarray(room).view(np.int32).reshape(2, -1).T[3:],
    ]
    for look in views:
        room = pooled(128 * KB)
        room[:] = bytes([1]) * len(room)
        kept = look(room)
        before = kept.copy()
        del room
        gc.collect()
        for _ in range(20):
            pooled(128 * KB)[:] = bytes([2]) * 128 * KB
        assert np.array_equal(kept, before)


def test_what_has_room_is_copied_into_it_and_the_rest_stays():
    rooms = []

    def room(nbytes):
        rooms.append(np.empty(nbytes, np.uint8).view(Owned))
        return memoryview(rooms[-1])

    arrays = [np.full(1000, 1, np.uint8), np.full(2000, 2, np.uint8)]
    message = Message(b"h", [arrays[0].data, memoryview(b"kept"), arrays[1].data])
    owned = own(message, room)
    assert [bytes(buffer) for buffer in owned.buffers] == [b"\1" * 1000, b"kept", b"\2" * 2000]
    assert len(rooms) == 1
    assert all(buffer.readonly for buffer in owned.buffers)
    arrays[0][:] = 9
    assert owned.buffers[0][0] == 1
    assert own(owned, room) is owned


@pytest.mark.parametrize("size", [0, 1, 1 << 24, (1 << 24) + 1, 40_000_001])
def test_a_copy_is_whole_by_one_thread_or_two(size):
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros(size, np.uint8)
    copy(target.data, source.data)
    assert np.array_equal(target, source)


FORK = """
import os
import numpy as np
from edgeml.core import Message, own

def owned(value):
    return own(Message(b"", [np.full(1 << 17, value, np.uint8).data])).buffers[0]

owned(0)  # leaves a block that both will find in the pool
ready, done = os.pipe(), os.pipe()
child = os.fork()
if not child:
    mine = owned(1)
    os.write(ready[1], b"x")
    os.read(done[0], 1)
    os._exit(0 if mine[0] == mine[-1] == 1 else 1)
os.read(ready[0], 1)
theirs = owned(2)
os.write(done[1], b"x")
print(os.waitpid(child, 0)[1], theirs[0])
"""


def test_a_forked_child_has_pooled_memory_of_its_own():
    # In a fresh process, since a library that does not like forks may be loaded in this one.
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "0 2\n"
