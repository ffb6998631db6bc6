"""`edgeml up`, `status` and `down`: what a file says is made so, changing only what differs."""

import os
import re

import pytest

import edgeml.ray
from edgeml import InferenceClient, cli
from edgeml.ray import machine

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
  {name}:
    factory: policies_of_up:{function}
    arguments: {{gain: {gain}}}
    replicas: {replicas}
    num_cpus: 0
"""


@pytest.fixture
def here(ray, monkeypatch):
    """Have the tests' Ray be this machine's own."""
    found = machine.Machine(ray.get_runtime_context().gcs_address, {}, os.getpid())
    monkeypatch.setattr(machine, "start", lambda given: found)
    monkeypatch.setattr(machine, "find", lambda: found)
    monkeypatch.setattr(machine, "end", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def edgeml_(here, name, tmp_path, capsys):
    """Runs `edgeml COMMAND FILE`, of a file that says so; returns the code and what it prints."""
    (tmp_path / "policies_of_up.py").write_text(POLICIES)

    def run(command, *words, named=name, function="make_server", gain=1, replicas=1):
        path = tmp_path / "robots.yaml"
        said = {"name": named, "function": function, "gain": gain, "replicas": replicas}
        path.write_text(FILE.format(**said))
        code = cli.main([command, str(path), *words])
        told = capsys.readouterr()
        return code, told.out + told.err

    return run


def ids(name):
    return {each.id for each in edgeml.ray.status(name).replicas}


def test_what_a_file_says_is_made_so_and_only_what_differs_is_changed(edgeml_, name, tmp_path):
    code, told = edgeml_("up")
    url = edgeml.ray.status(name).url
    assert (code, told) == (0, f"{name}: started, 1 server; {url}\n")
    first = ids(name)
    assert edgeml_("up") == (0, f"{name}: as it was, 1 server; {url}\n")
    code, told = edgeml_("up", replicas=2)
    assert (code, told) == (0, f"{name}: 2 servers in place of 1; {url}\n")
    assert first < ids(name)
    first = ids(name)
    code, told = edgeml_("up", gain=2, replicas=2)
    assert (code, told) == (0, f"{name}: replaced, now version 2, 2 servers; {url}\n")
    assert not first & ids(name)
    with InferenceClient(url=url) as client:
        assert client.call("policy", 21) == (42, str(tmp_path))

    code, told = edgeml_("status", replicas=2)
    assert code == 0
    assert re.search(rf"{name} +servers  ready  2 of 2   2        {url}\n", told)
    assert len(re.findall(r"^2\.\w+ +ready  0        2 .* zmq://", told, re.MULTILINE)) == 2

    # One that can't be started leaves all as it is, and is told of.
    first = ids(name)
    code, told = edgeml_("up", function="forgotten", replicas=2)
    assert code == 1
    assert f"edgeml: {name}: ImportError: factory 'policies_of_up:forgotten': the module " in told
    assert ids(name) == first
    code, told = edgeml_("status", replicas=2)
    assert code == 1
    assert "the module has no function 'forgotten'" in told

    # Another file's are left alone, unless that is wanted.
    code, told = edgeml_("status", named=f"{name}-b")
    assert (code, told.splitlines()[1].split()) == (1, [f"{name}-b", "missing"])
    code, told = edgeml_("down", named=f"{name}-b")
    assert (code, told) == (0, "")
    assert name in edgeml.ray.status()
    code, told = edgeml_("down")
    assert told == f"{name}: ended\n"
    assert name not in edgeml.ray.status()
