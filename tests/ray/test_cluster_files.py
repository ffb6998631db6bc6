"""The file of `edgeml up`: what it says, and what is told of a file that says it wrongly."""

import json
import os
import sys

import pytest

from edgeml.ray.files import Entry, Factory, read
from pairs import took

FILE = """
servers:
  policy:
    factory: policies:make_server
    arguments:
      checkpoint: pi0
      sizes: [1, 2]
    replicas: 4
    num_gpus: 0.5
    resources: {arm: 1}
  small:
    factory: policies:make_small
    autoscale: {least: 1, most: 4, waiting: 2}
trainers:
  learner:
    factory: learner.main:make
    shards: 2
    checkpoint_dir: /shared/learner
"""


@pytest.fixture
def file(tmp_path):
    """Writes a file."""

    def write(text, name="robots.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_file_says_which_servers_how_many_and_on_what(file):
    plan = read(file(FILE))
    assert [(entry.kind, entry.name, entry.replicas) for entry in plan.entries] == [
        ("servers", "policy", 4),
        ("servers", "small", None),
        ("trainers", "learner", None),
    ]
    policy, small, learner = plan.entries
    assert policy.settings() == {"replicas": 4, "num_gpus": 0.5, "resources": {"arm": 1}}
    assert small.settings() == {"autoscale": {"least": 1, "most": 4, "waiting": 2}}
    assert learner.settings() == {"shards": 2, "checkpoint_dir": "/shared/learner"}
    assert policy.factory(None) == Factory(
        "policies:make_server", {"checkpoint": "pi0", "sizes": [1, 2]}
    )
    assert learner.factory(plan.folder).folder == str(plan.folder)
    assert (plan.address, plan.cluster, plan.machine) == (None, None, {})


def test_a_path_is_one_from_where_it_is_read(file, tmp_path, monkeypatch):
    file(FILE)
    monkeypatch.chdir(tmp_path)
    assert read("robots.yaml").folder == tmp_path


def test_where_it_is_to_be_is_said_in_one_way(file):
    assert read(file(FILE + "address: head:6379\n")).address == "head:6379"
    said = read(file(FILE + "machine: {num_cpus: 8, object_store_memory: 0.5GB}\n")).machine
    assert said == {"num_cpus": 8, "object_store_memory": 500_000_000}
    content = {"cluster_name": "lab", "provider": {"type": "local", "head_ip": "192.0.2.1"}}
    text = FILE + f"cluster: {json.dumps(content)}\n"
    assert read(file(text)).cluster == content
    launcher = file("cluster_name: lab\n", "lab.yaml")
    assert read(file(FILE + "cluster: lab.yaml\n")).cluster == launcher
    with pytest.raises(ValueError, match="there is 'address' already; say one of them"):
        read(file(FILE + "address: head:6379\nmachine: {num_cpus: 8}\n"))


def test_it_says_where_names_are_told_and_to_whom(file, tmp_path):
    plan = read(file(FILE + "names: 0.0.0.0:5550\ncredentials: keys\n"))
    assert (plan.names, plan.credentials) == ("0.0.0.0:5550", tmp_path / "keys")


def test_what_is_kept_of_an_entry_tells_whether_it_has_changed():
    said = {"factory": "a:b", "replicas": 2, "num_cpus": 1}
    one = Entry("policy", "servers", said)
    assert Entry("policy", "servers", {**said, "replicas": 3}).note == one.note
    assert Entry("policy", "servers", dict(reversed(said.items()))).note == one.note
    for change in ({"num_cpus": 2}, {"factory": "a:c"}, {"arguments": {"x": 1}}):
        assert Entry("policy", "servers", {**said, **change}).note != one.note
    assert Entry("policy", "trainers", said).note != one.note


WRONG = {
    "": "empty",
    "servers: {}": "it names nothing",
    "- policy": "line 1: this is to be a mapping",
    "servers: [policy]": "line 1: servers: this is to be a mapping",
    "servers:\n  policy:\n": "line 2: servers.policy: this is to be a mapping",
    "servers:\n  policy: {replicas: 2}": "line 2: servers.policy: 'factory' is missing",
    "server:\n  policy: {factory: a:b}": "line 1: server: there is no such key; did you mean "
    "'servers'?",
    "servers:\n  policy:\n    factory: a:b\n    replica: 3": "line 4: servers.policy.replica: "
    "there is no such key; did you mean 'replicas'? Known are factory,",
    "servers:\n  p: {factory: a:b}\n  p: {factory: a:b}": "line 3: servers.p: it stands in line 2",
    "servers:\n  Policy: {factory: a:b}": "line 2: servers.Policy: a name is of lower-case",
    "servers:\n  p: {factory: policies.make}": "line 2: servers.p.factory: 'policies.make' names "
    "no function; write it as 'module:function'",
    "servers:\n  p: {factory: 7}": "line 2: servers.p.factory: 7 names no function",
    "servers:\n  p: {factory: 'os:system(1)'}": "names no function",
    "servers:\n  p: {factory: a:b, replicas: 0}": "line 2: servers.p.replicas: 0 is no number of",
    "servers:\n  p: {factory: a:b, replicas: yes}": "replicas: True is no number of servers",
    "servers:\n  p: {factory: a:b, num_cpus: -1}": "num_cpus: -1 is no amount",
    "servers:\n  p: {factory: a:b, num_gpus: .inf}": "num_gpus: inf is no amount",
    "servers:\n  p: {factory: a:b, num_gpus: .nan}": "num_gpus: nan is no amount",
    "servers:\n  p: {factory: a:b, resources: {GPU: 1}}": "resources.GPU: say it as num_gpus",
    "servers:\n  p: {factory: a:b, resources: {arm: x}}": "resources.arm: 'x' is no amount",
    "servers:\n  p: {factory: a:b, autoscale: {least: 2}}": "autoscale: 'most' is missing",
    "servers:\n  p: {factory: a:b, autoscale: {least: 3, most: 2}}": "'least' is more than 'most'",
    "servers:\n  p: {factory: a:b, autoscale: {most: 2, waiting: 0}}": "waiting: 0 calls that wait",
    "servers:\n  p: {factory: a:b, autoscale: {most: 2}, replicas: 2}": "both say how many",
    "servers:\n  p: {factory: a:b, arguments: {a-b: 1}}": "a-b: no function has such an argument",
    "servers:\n  p: {factory: a:b, arguments: {day: 2026-11-29}}": "arguments.day: it may be text",
    "servers:\n  p: {factory: a:b, arguments: {x: &x [*x]}}": "it can't be read: found unconst",
    "servers:\n  p: {factory: a:b}\ntrainers:\n  p: {factory: a:b}": "a server has this name",
    "trainers:\n  p: {factory: a:b, replicas: 2}": "line 2: trainers.p.replicas: there is no such",
    "machine: {num_cpus: 1.5}": "num_cpus: 1.5 is no whole number",
    "machine: {object_store_memory: 2 TB}": "'2 TB' is no size; write it as 200MB or 4GB",
    "names: 5550": "line 1: names: 5550 is no address; write it as '0.0.0.0:5550'",
    "names: a/b:1": "'a/b:1' is no address",
    "address: 7": "line 1: address: 7 is no text",
    "cluster: none.yaml": "line 1: cluster: there is no file",
    "servers: {p: {factory: !!python/name:os.system x}}": "line 1: it can't be read: could not",
    "servers:\n\tp: 1": "line 2: it can't be read: found character",
    "a: 1\n---\nb: 2": "line 2: it can't be read",
    "servers: {? [a, b] : 1}": "line 1: servers: a key is to be a name",
    "servers: {p: {factory: a:b, arguments: {day: 2026-13-99}}}": "servers.p.arguments.day: it is "
    "not what it looks like (month must be in 1..12); write texts in quotes",
    "servers: {p: {factory: a:b, arguments: {x: !!int ''}}}": "arguments.x: it is not what",
    "servers: {p: {factory: a:b, arguments: {x: !!bool 7}}}": "arguments.x: it is not what",
    "servers: {p: {factory: a:b, arguments: {x: !!timestamp y}}}": "arguments.x: it is not what",
    "servers:\n  p: {factory: a:b, replicas: " + "9" * 5000 + "}": "line 2: servers.p.replicas: ",
    "servers:\n  p: {factory: a:b, arguments: {x: {1: 2, a: 3}}}": "with texts as keys",
    "servers:\n  p: {factory: a:b, arguments: {x: " + "[" * 500 + "]" * 500 + "}}": "too deeply",
    "servers:\n  p: {factory: a:b, num_cpus: 1.0e+308}": "num_cpus: 1e+308 is no amount",
    "servers:\n  p: {factory: a:b, num_gpus: 1.5}": "1.5 is no number of GPUs",
    "servers:\n  p: {factory: a:b, resources: {'': 1}}": "a resource is to have a name",
    "machine: {num_cpus: 1" + "0" * 30 + "}": "is no whole number",
    "machine: {object_store_memory: " + "9" * 400 + "GB}": "is no size; write it as 200MB or 4GB",
    "names: 127.0.0.1:65536": "'127.0.0.1:65536' is no address",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_told_with_its_line_and_what_to_do(file, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # its text is looked at
        read(file(text))
    assert WRONG[text] in str(caught.value)
    assert str(caught.value).startswith("robots.yaml")


def test_a_few_lines_that_stand_for_more_than_a_machine_holds_are_refused_at_once(file):
    """Ten aliases of ten aliases, and so on: 10**20 values, once they are written out."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 20)]
    text = "servers:\n  p:\n    factory: a:b\n    arguments:\n"
    with took(5.0), pytest.raises(ValueError, match=r"robots.yaml: it has more than 100000"):
        read(file(text + "".join(f"      {line}\n" for line in lines)))
    shared = "{gains: &g [1, 2, 3], again: *g}"
    (entry,) = read(file(f"servers: {{p: {{factory: a:b, arguments: {shared}}}}}")).entries
    assert entry.said["arguments"] == {"gains": [1, 2, 3], "again": [1, 2, 3]}


def test_a_file_that_is_no_text_is_told_by_its_name(tmp_path):
    path = tmp_path / "robots.yaml"
    path.write_bytes(b"servers: \xff\xfe")
    with pytest.raises(ValueError, match=r"^robots.yaml: it is no text in UTF-8"):
        read(path)


def test_all_that_is_wrong_is_told_at_once(file):
    lines = "".join(f"  p{n}: {{factory: a:b, replicas: 0}}\n" for n in range(30))
    with pytest.raises(ValueError, match="p0") as caught:
        read(file(f"servers:\n{lines}"))
    told = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in told[:20]] == [
        f"robots.yaml, line {n}" for n in range(2, 22)
    ]
    assert told[20:] == ["and 10 more"]


def test_a_factory_finds_its_module_where_its_server_runs(tmp_path, monkeypatch):
    (tmp_path / "policies_of_a_test.py").write_text(
        "import os\ndef make(size=1):\n    return os.getcwd(), size\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir("/")
    factory = Factory("policies_of_a_test:make", {"size": 3}, str(tmp_path))
    assert factory() == (str(tmp_path), 3)
    monkeypatch.delitem(sys.modules, "policies_of_a_test")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("no_such_module_anywhere:make", "no module 'no_such_module_anywhere' in "),
        ("no_such.module:make", "no module 'no_such.module' in "),
        ("json:make", "the module has no function 'make'"),
    ],
)
def test_a_factory_that_is_not_there_says_where_it_was_looked_for(function, told):
    with pytest.raises(ImportError, match=told) as caught:
        Factory(function)()
    assert repr(function) in str(caught.value)
    assert "json" in function or os.getcwd() in str(caught.value)
