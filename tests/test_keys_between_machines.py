"""With keys, nobody on the way between two machines can read a byte of what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import two_machines
from edgeml.cli.keygen import make_client_keys, make_server_keys
from pairs import ROOT

UNSHARE = ["unshare", "--map-root-user", "--net"]
CHUNK = 24  # bytes; random ones, so many are nowhere by chance


def may_make_machines() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    probe = "ip link add near type veth peer far"
    done = subprocess.run([*UNSHARE, *probe.split()], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(
    not may_make_machines(), reason="this system does not let us make network namespaces"
)


def between(transport: str, record: Path, server: Path | str = "", client: Path | str = "") -> None:
    """Have the three pairs speak between two machines, and record what passes."""
    program = ROOT / "tests" / "two_machines.py"
    arguments = [str(record), transport, str(server), str(client)]
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, two_machines.FILES: str(record.parent)},
    )
    assert done.returncode == 0, done.stdout


def unmasked(data: bytes) -> bytes:
    """What is the same whatever four bytes all has been masked with, as WebSockets' clients do."""
    array = np.frombuffer(data, np.uint8)
    return (array[4:] ^ array[:-4]).tobytes()


def readable(record: Path, names: dict[str, bytes]) -> set[str]:
    """Which of some things can be read in what passed."""
    streams = two_machines.streams_of(record)
    masked = [unmasked(stream) for stream in streams]
    return {
        name
        for name, data in names.items()
        if any(data in stream for stream in streams)
        or any(unmasked(data) in stream for stream in masked)
    }


def things() -> dict[str, bytes]:
    """All that is said, pieces of it where it is long."""
    found = {name: name.encode() for name in two_machines.NAMES}
    for number in range(1, 13):
        data = two_machines.secret(number).tobytes()
        for start in (0, len(data) // 2 // CHUNK * CHUNK, len(data) - CHUNK):
            found[f"payload {number} at {start}"] = data[start : start + CHUNK]
    return found


@pytest.mark.parametrize("transport", ["grpc", "ws", "zmq"])
def test_without_keys_all_can_be_read_on_the_way(transport, tmp_path):
    """So what the other test looks for is there to be found."""
    between(transport, tmp_path / "record")
    assert readable(tmp_path / "record", things()) == things().keys()


@pytest.mark.parametrize("transport", ["grpc", "ws", "zmq"])
def test_with_keys_nothing_can_be_read_on_the_way(transport, tmp_path):
    keys = make_server_keys(tmp_path / "keys")
    robot = make_client_keys(keys, "name-of-a-key")
    between(transport, tmp_path / "record", keys, robot)
    secrets = {
        str(path.relative_to(keys)): path.read_bytes().strip()
        for path in (keys / "curve.secret", robot / "curve.secret", robot / "token", robot / "name")
    }
    assert readable(tmp_path / "record", {**things(), **secrets}) == set()
    passed = sum(map(len, two_machines.streams_of(tmp_path / "record")))
    assert passed > 5_000_000  # it was recorded, and all of it was said


def test_what_is_shared_in_memory_passes_no_network(tmp_path):
    """Two containers of one machine, say, with a folder in common."""
    keys = make_server_keys(tmp_path / "keys")
    between("shm", tmp_path / "record", keys, make_client_keys(keys, "robot"))
    assert readable(tmp_path / "record", things()) == set()
    assert sum(map(len, two_machines.streams_of(tmp_path / "record"))) < 10_000
