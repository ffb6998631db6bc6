"""Programs that have a Ray of their own: one that a deployment starts, and one of several nodes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeml import InferenceClient, Unreachable
from pairs import Process, free_port, process, run_fresh, wait_until

pytestmark = pytest.mark.slow

SERVERS = """
import os
import edgeml, edgeml.ray

def make():
    server = edgeml.InferenceServer(0)
    server.register_interface("who", lambda payload: os.getpid())
    return server
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray has its files, and nothing that runs there at the end."""
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(home))
    monkeypatch.setenv("EDGEML_RAY_NAMES", f"127.0.0.1:{free_port()}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield home
    wait_until(lambda: not running(home), 60)
    shutil.rmtree(home)


def running(home: Path) -> list[str]:
    """Command lines that name this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if bytes(home) in words:
            found.append(words.decode())
    return found


def test_one_machine_needs_no_set_up_and_nothing_outlives_the_program(home):
    program = f"""
{SERVERS}
status = edgeml.ray.deploy(make, name="policy", replicas=2, timeout=100)
with edgeml.InferenceClient(url="ray://policy") as client:
    assert client.call("who", None) in [each.pid for each in status.replicas]
print(*[each.pid for each in status.replicas], status.names)
"""
    *pids, names = run_fresh(program, 200)[0].split()
    assert names == os.environ["EDGEML_RAY_NAMES"]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)


NODES = f"""
{SERVERS}
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(True, head_node_args={{"num_cpus": 2, "include_dashboard": False}})
nodes = [cluster.add_node(num_cpus=2, resources={{"robots": 2}}) for _ in range(2)]
ray.init(cluster.address, namespace="mine", log_to_driver=False)
status = edgeml.ray.deploy(
    make, name="policy", replicas=2, resources={{"robots": 1}}, num_cpus=1, timeout=100
)
print(status.url, flush=True)
input()
cluster.remove_node(nodes[0], allow_graceful=False)
print("removed", flush=True)
while True:
    now = edgeml.ray.status("policy")
    there = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    if len(there) == 2 and now.ready == 2:
        break
print("again", flush=True)
input()
ray.shutdown()
cluster.shutdown()
"""


def await_line(program: Process, begins: str) -> str:
    """Return the next line that begins like this; Ray has a lot to say when a node dies."""
    while not (line := program.line()).startswith(begins):
        pass
    return line


@pytest.mark.timeout(300)
def test_servers_of_a_node_that_dies_are_started_on_another(home):
    with process(NODES) as program:
        with InferenceClient(url=await_line(program, "ray://"), timeout=60) as client:
            assert client.call("who", None)
            program.popen.stdin.write("\n")
            program.popen.stdin.flush()
            await_line(program, "removed")
            failed = []
            for _ in range(1000):
                try:
                    assert client.call("who", None)
                except Unreachable as error:
                    failed.append(str(error))
            assert all("carried out" in text for text in failed)
            assert len(failed) <= 2  # the call under way, for each server there
            await_line(program, "again")
            assert client.call("who", None)
        program.popen.stdin.write("\n")
        program.popen.stdin.flush()
        assert program.end(60)[0] == 0
