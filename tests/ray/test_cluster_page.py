"""The page of clusters: its programs run as they stand, and its files say what it says."""

import os
import re
import subprocess
import sys

import pytest

import edgeml.ray
from edgeml import cli
from edgeml.ray import machine
from edgeml.ray.files import read
from pairs import ROOT

PAGE = (ROOT / "docs" / "guides" / "cluster.md").read_text()


def blocks(language):
    """The page's programs or files, by name."""
    found = re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return dict(found)


def shape_of(text):
    """What is printed, without numbers and the width of columns."""
    text = re.sub(r"\b\d\.\w+|[\d.]+", "#", text)
    return [line.split() for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in (blocks("python") | blocks("yaml")).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_files_say_what_it_says(folder):
    plans = {name: read(name) for name in blocks("yaml")}
    assert len(plans) == 3
    for plan in plans.values():
        (policy,) = plan.entries
        assert policy.factory(None).function == "policies:make_server"
    assert plans["robots-cluster.yaml"].address == "head:6379"
    assert plans["robots-launched.yaml"].cluster["provider"]["type"] == "local"


def test_its_keys_are_those_that_there_are():
    from edgeml.ray import files

    said = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE))))
    there = {*files._FILE, *files._SERVERS, *files._TRAINERS}
    assert there <= said, there - said


def test_a_mistake_is_told_as_it_shows(folder, capsys):
    text = blocks("yaml")["robots.yaml"]
    (folder / "robots.yaml").write_text("\n" + text.replace("replicas: 2", "replica: 2"))
    shown = re.search(r"^```text\n(edgeml: .*)\n```$", PAGE, re.MULTILINE)[1]
    assert cli.main(["up", "robots.yaml"]) == 1
    told = capsys.readouterr().err.strip()
    assert re.sub(r"line \d+", "", told) == re.sub(r"line \d+", "", shown)


def test_the_same_program_with_ray_and_from_a_file(ray, folder, monkeypatch, capsys):
    address = ray.get_runtime_context().gcs_address

    def run(name, *words):
        done = subprocess.run(
            [sys.executable, name, *words],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("policy_ray.py") == "100 answers, servers: 2\n"
    found = machine.Machine(address, {}, os.getpid())
    monkeypatch.setattr(machine, "start", lambda given: found)
    monkeypatch.setattr(machine, "find", lambda: found)
    monkeypatch.setattr(machine, "end", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["up", "robots.yaml"]) == 0
    url = edgeml.ray.status("policy").url
    up, status = re.findall(
        r"^```text\n(.*?)^```$",
        (ROOT / "docs" / "command-line.md").read_text().partition("## Up, status, down")[2],
        re.DOTALL | re.MULTILINE,
    )
    assert shape_of(capsys.readouterr().out) == shape_of(up)
    assert cli.main(["status", "robots.yaml"]) == 0
    assert shape_of(capsys.readouterr().out) == shape_of(status)
    assert run("policy_client.py", url) == "100 answers, servers: 2 gain: 2.0\n"
    assert cli.main(["down", "robots.yaml"]) == 0
    assert capsys.readouterr().out == "policy: ended\n"
    assert "policy" not in edgeml.ray.status()
