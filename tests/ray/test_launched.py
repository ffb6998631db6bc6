"""`edgeml up` of files that start a Ray of this machine's own."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POLICIES = """
import os
from edgeml import InferenceServer

def make_server(gain=1):
    server = InferenceServer(0)
    server.register_interface("policy", lambda x: (gain * x, os.getcwd()))
    return server
"""
FILE = """
servers:
  policy:
    factory: policies_of_up:make_server
    arguments: {gain: GAIN}
    replicas: 2
    num_cpus: 1
"""
HERE = "machine: {num_cpus: 4, object_store_memory: 200MB}\n"


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
