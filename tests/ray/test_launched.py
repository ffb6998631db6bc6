"""`edgeml up` of files that start a Ray of their own: on this machine, and by Ray's launcher."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeml import InferenceClient
from pairs import ROOT, free_port, wait_until
from test_up import POLICIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILE = """
servers:
  policy:
    factory: policies_of_up:make_server
    arguments: {gain: GAIN}
    replicas: 2
    num_cpus: 1
"""
HERE = "machine: {num_cpus: 4, object_store_memory: 200MB}\n"
LAUNCHED = """
cluster:
  cluster_name: test
  max_workers: 0
  provider: {type: external, module: one_machine.OneMachine, home: HOME}
  auth: {ssh_user: me}
  available_node_types: {head: {node_config: {}, resources: {CPU: 4}, max_workers: 0}}
  head_node_type: head
  file_mounts: {}
  cluster_synced_files: []
  initialization_commands: []
  setup_commands: []
  head_setup_commands: []
  worker_setup_commands: []
  worker_start_ray_commands: []
  head_start_ray_commands:
    - nohup python -m ray.scripts.scripts start --head --block --port=PORT --num-cpus=4
      --include-dashboard=false --object-store-memory=200000000 --disable-usage-stats
      --dashboard-agent-listen-port=0 --metrics-export-port=0 > ~/ray.log 2>&1 & echo $! > ~/ray.pid
    - for i in $(seq 1800); do [ -s $RAY_TMPDIR/ray/ray_current_cluster ] && break; sleep 0.1; done
    - tail -n 5 ~/ray.log
"""


@pytest.fixture
def short():
    """A folder with a short path, as sockets lie there."""
    path = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def edgeml_(short, tmp_path):
    """Runs `edgeml`, as a program of its own; returns what it prints."""
    (tmp_path / "policies_of_up.py").write_text(POLICIES)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = [str(ROOT), str(ROOT / "tests" / "ray"), env.get("PYTHONPATH", "")]
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "EDGEML_RAY_NAMES": f"127.0.0.1:{free_port()}",
        "RAY_TMPDIR": str(short),
        "TMPDIR": str(short),
        "RAY_AUTH_MODE": "token",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }

    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "edgeml", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    run.names = env["EDGEML_RAY_NAMES"]
    return run


def processes_of(folder):
    """Those that have a folder's name in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def ask(names):
    with InferenceClient(url=f"ray://{names}/policy", wait_for_server=60) as client:
        return client.call("policy", 21)


def test_servers_live_on_this_machine_until_they_are_ended(edgeml_, short, tmp_path):
    file = tmp_path / "robots.yaml"
    file.write_text(FILE.replace("GAIN", "2") + HERE)
    assert "nothing runs on this machine" in edgeml_("status")
    assert "policy: started, 2 servers" in edgeml_("up", "robots.yaml")
    assert ask(edgeml_.names) == (42, str(tmp_path))
    file.write_text(FILE.replace("GAIN", "3") + HERE)
    assert "policy: replaced, now version 2" in edgeml_("up", "robots.yaml")
    assert ask(edgeml_.names)[0] == 63
    assert re.search("policy +servers  ready  2 of 2", edgeml_("status"))
    file.write_text(FILE.replace("GAIN", "3") + HERE.replace("4", "8"))
    edgeml_("up", "robots.yaml", code=1)  # it was told of another machine
    assert edgeml_("down") == "policy: ended\nthis machine's Ray has ended\n"
    assert not [*short.glob("edgeml*")]
    wait_until(lambda: not processes_of(short))
    assert "nothing runs on this machine" in edgeml_("down")


def test_a_ray_that_was_killed_is_none_and_its_remains_are_in_nobodys_way(edgeml_, short, tmp_path):
    (tmp_path / "robots.yaml").write_text(FILE.replace("GAIN", "2") + HERE)
    edgeml_("up", "robots.yaml")
    for pid in processes_of(short):
        os.kill(int(pid), 9)
    wait_until(lambda: not processes_of(short))
    assert "nothing runs on this machine" in edgeml_("status")
    assert "policy: started, 2 servers" in edgeml_("up", "robots.yaml")
    edgeml_("down", "robots.yaml")
    assert not [*short.glob("edgeml*")]


def test_machines_are_started_by_rays_launcher_and_given_back(edgeml_, short, tmp_path):
    home, port = short / "home", free_port() // 2  # below Ray's workers'
    home.mkdir()
    (home / "address").write_text(f"127.0.0.1:{port}")
    launched = LAUNCHED.replace("HOME", str(home)).replace("PORT", str(port))
    file = tmp_path / "robots.yaml"
    file.write_text(FILE.replace("GAIN", "2") + launched)
    try:
        edgeml_("up", "robots.yaml")
        result, folder = ask(edgeml_.names)
        assert result == 42
        assert folder != str(tmp_path)  # a copy, as on any node
        started = (home / "ray.pid").read_text()
        file.write_text(FILE.replace("GAIN", "3") + launched)
        edgeml_("up", "robots.yaml")
        assert ask(edgeml_.names)[0] == 63
        assert (home / "ray.pid").read_text() == started  # it goes on
        edgeml_("status", "robots.yaml")
        edgeml_("down", "robots.yaml")
        assert not (home / "tags.json").exists()
        wait_until(lambda: not processes_of(short))
    finally:
        for pid in processes_of(short):
            os.kill(int(pid), 9)
