"""The pages say what is so: their programs run, their links, paths and commands lead somewhere."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgeml import Feature, InferenceServer, Limits, PolicyContract, cli
from pairs import ROOT, free_port, started, wait_until

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = [
    "README.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "plugins").glob("*/README.md")),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
# Those that tell of the code as it is: not of what it was, nor of the wire, which tests/wire does.
TODAY = [name for name in NAMES if name not in ("CHANGELOG.md", "docs/wire.md")]

FLAGS = re.DOTALL | re.MULTILINE
BLOCK = re.compile(r"^```([^`\n]*)\n(.*?)^```$", FLAGS)


def blocks_of(page: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(PAGES[page]) if language in languages]


def prose_of(page: str) -> str:
    return BLOCK.sub("", PAGES[page])


def code_of(page: str) -> list[str]:
    """What stands in single backticks."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


# Programs -----------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A server and a client, in a process each; the programs' names, but for the side."""

    page: str
    name: str
    port: int
    prints: list[str]  # by the client
    ends: bool = False  # the server ends by itself


PAIRS = [
    Pair(
        *("docs/tutorials/action.md", "action", 6379),
        ["(224, 224, 3)", "dict_keys(['joints'])", "{'moved': True}"],
    ),
    Pair(
        *("docs/tutorials/action.md", "push", 6379),
        ["step ", " (7,)", "skipped "],
        ends=True,
    ),
    Pair(
        *("docs/tutorials/inference.md", "inference", 5557),
        ["['face_reg', 'voice_reg']", "'loudness': 1.0", "'brightness': 0.0"],
    ),
    Pair(*("docs/tutorials/trainer.md", "trainer", 5555), ["got weights of step 2"], ends=True),
    Pair(
        *("docs/guides/gym.md", "gym", 5557),
        ["(4,) Discrete(2)", "an episode of "],
    ),
    Pair(
        *("docs/guides/agentlace.md", "agentlace", 5555),
        ["sent: True kept: 100", "answer: {}", "weights (4, 2) of step 1"],
        ends=True,
    ),
    Pair(
        *("docs/guides/groot.md", "groot", 5555),
        [
            "{'status': 'ok', 'message': 'Server is running'}",
            "(1, 16, 7) 0.5\n(1, 16, 7) 1.0\n{}\n{'error': ",
        ],
    ),
    Pair(
        *("docs/guides/openpi.md", "openpi", 8000),
        ["metadata {}", "[16, 8] 2.0\n[16, 8] 2.0\n", "['infer_ms', 'prev_total_ms']"],
    ),
    Pair(
        *("docs/guides/vla-eval.md", "vla_eval", 8000),
        [
            "{'actions': {'name': 'actions', 'dims': 7,",
            "action 3 [2. 2. 2. 2. 2. 2. 2.]\naction 4 [4. 4. 4. 4. 4. 4. 4.]\n",
        ],
    ),
    Pair(*("docs/guides/cluster.md", "policy", 5557), ["100 answers, servers: 1 gain: 1.0"]),
    Pair(
        *("docs/guides/shared-memory.md", "camera", 6380),
        ["frames (480, 640, 3) copied on the way: 0"],
        ends=True,
    ),
]

ALONE = {
    ("README.md", "action.py"): ["(7,) {'moved': 0.1}"],
    ("README.md", "inference.py"): ["'action': array([1., 1., 1.])"],
    ("README.md", "trainer.py"): ["500 items arrived", "weights (17,)"],
    ("docs/tutorials/inference.md", "inference_errors.py"): [
        "the policy raised KeyError",
        "nobody answers: Unreachable",
    ],
    ("docs/tutorials/trainer.md", "trainer_requests.py"): ["{'seed': 42}"],
    ("docs/tutorials/trainer.md", "trainer_tunnel.py"): ["got weights (17,)"],
    ("docs/tutorials/replay.md", "replay_first.py"): [
        "(256, 3) float64",
        "2000 items, dict_keys(['reward'])",
    ],
    ("docs/tutorials/replay.md", "replay.py"): [
        "(256, 4, 64, 64, 3)",
        "2.9701",
        "an observation is kept once: True",
    ],
    ("docs/tutorials/replay.md", "replay_stacks.py"): [
        "a frame is kept once: True",
        "(256, 4, 64, 64, 3) False",
    ],
    ("docs/tutorials/replay.md", "replay_vector.py"): ["(32,) breaks 0"],
    ("docs/tutorials/replay.md", "replay_lanes.py"): ["of one robot: True breaks: 0"],
    ("docs/tutorials/replay.md", "replay_lag.py"): ["the oldest: True"],
    ("docs/tutorials/trajectories.md", "sequences.py"): [
        "(256, 8, 2) of which",
        "goals lie ahead: True",
    ],
    ("docs/tutorials/datasets.md", "episodes.py"): ["me (", ", 4) True", "(32, 4)"],
    ("docs/tutorials/checkpoints.md", "resume.py"): ["steps 100 items 100"],
    ("docs/tutorials/checkpoints.md", "resume_learner.py"): ["updates 7 items 100"],
    ("docs/guides/addresses.md", "one_url.py"): ["hello\nshm\n"],
    ("docs/guides/asyncio.md", "aio_calls.py"): ["[0, 1, 2]", "too late"],
    ("docs/guides/asyncio.md", "aio_observations.py"): ["last 99 skipped some: True"],
    ("docs/guides/transports.md", "transport_names.py"): ["shm hello", "zmq hello\nzmq hello"],
    ("docs/guides/transports.md", "transport_both.py"): ["shm\nzmq\ngrpc"],
    ("docs/guides/transports.md", "transport_url.py"): ["zmq://robot.local:"],
    ("docs/guides/delivery.md", "refused.py"): ["99 arrived, 1 refused"],
    ("docs/guides/delivery.md", "log.py"): ["200 arrived"],
    ("docs/guides/delivery.md", "log_each.py"): ["100 on the disk"],
    ("docs/guides/delivery.md", "ledger.py"): [
        "Delivered(applied=100, durable=0) 100 held",
        "Delivered(applied=0, durable=100) 0 held",
    ],
    ("docs/guides/serving.md", "serving_load.py"): ["early: loading, ", "\nready (7,)"],
    ("docs/guides/serving.md", "serving_session.py"): [
        "[1. 1. 1.] [1.5 1.5 1.5]\n[1. 1. 1.]\n",
        "end of left \n",
        "end of right \n",
        "end of left episode 2\n",
    ],
    ("docs/guides/serving.md", "serving_swap.py"): [
        "1\nbold of version 2\nbold waited True, ran True",
    ],
    ("docs/guides/serving.md", "serving_overload.py"): [
        "of about 50; refused: ",
        "refused_too_busy",
    ],
    ("docs/guides/serving.md", "serving_drain.py"): ["answered: [0, 1, 2]", "ended"],
    ("docs/guides/several-servers.md", "several.py"): [
        "all answer: True\n",
        "goes on: True\n",
        "goes on: {2}\n",
    ],
    ("docs/guides/several-servers.md", "several_sessions.py"): [
        "[1, 2, 3]\n",
        "\n1\n",
        "moved: True\n",
    ],
    ("docs/guides/shadow.md", "shadow_candidate.py"): [
        "the robot does [49. 49. 49.]\ncompared: True failed: {}\n",
        "policy['actions'] {'max': 0.3, 'mean': 0.133, 'last': 0.3}\n",
        "policy['grip'] {'max': 0.0, 'mean': 0.0, 'last': 0.0}\n",
    ],
    ("docs/guides/shadow.md", "shadow_own.py"): ["policy differs at 0.55\n"],
    ("docs/guides/images.md", "images_robot.py"): ["(480, 640, 3) uint8 off by "],
    ("docs/guides/images.md", "images_refused.py"): [
        "(480, 640, 3)",
        "value['image'] has dtype float32, so it is no image",
    ],
    ("docs/guides/images.md", "images_wanted.py"): ["(224, 224, 3)"],
    ("docs/guides/sharded-learner.md", "shards_plain.py"): ["(600,) of robots [0, 1, 2, 3, 4, 5]"],
    ("docs/guides/handlers.md", "handler_thread.py"): ["20 calls, one database"],
    ("docs/guides/batching.md", "batch_policy.py"): [
        "robot 0: 0, STACK; answered with ",
        "robot 7: 14, STACK; answered with ",
    ],
    ("docs/guides/handlers.md", "handler_log.py"): [
        "serving action on zmq://",
        "viewer at zmq://127.0.0.1 has come",
        "'obs' is called for the first time, by viewer",
        "viewer at zmq://127.0.0.1 has left",
    ],
    ("docs/guides/liveness.md", "liveness.py"): [
        "operator is here\noperator is gone, the arm holds\n",
        "noticed after ",
    ],
    ("docs/guides/safe-robots.md", "safe_robot.py"): [
        "moved\narm holds\n",
        "refused: Stale\n",
        "told of 1\n",
        "1 arm done v7 0.0\n2 arm halt None 0.2\n",
    ],
    ("docs/guides/safe-robots.md", "safe_record.py"): [
        "policy 1 done\npolicy 2 done\npolicy 3 done\nmissed 0",
    ],
    ("docs/guides/takeover.md", "takeover.py"): [
        "moved by the policy\n",
        "moved by hand\n",
        "again: True for the time 2\nmoved by the policy\n",
    ],
    ("docs/guides/liveness.md", "reconnect.py"): ["lost: True\nback: True\nhello\n"],
    ("docs/guides/control.md", "control_loop.py"): [
        "played most: True\n",
        " steps at 50 Hz: ",
        "left when a chunk came: ",
    ],
    ("docs/guides/control.md", "control_device.py"): ["moved True, and stopped by itself True\n"],
    ("docs/guides/control.md", "control_hold.py"): [
        "chunk 0.2\nchunk 0.2\nchunk 0.2\n",
        "hold 0.0\n",
    ],
    ("docs/guides/gym.md", "gym_shared.py"): ["in use by trainer", "(3,)"],
    ("docs/guides/gym.md", "gym_vector.py"): ["(4, 4) several episodes: True"],
    ("docs/guides/processes.md", "processes.py"): ["robot 1 got 2", "robot 2 got 4"],
    ("docs/guides/roles.md", "roles_observer.py"): [
        "sees {'joints': [0.0, ",
        "PermissionDenied: the key of 'viewer' has the role 'observe', which lacks act:move",
        "refused: 1",
    ],
    ("docs/security.md", "keys_first.py"): ["I am robot\n", "\nwithout keys: "],
    ("docs/security.md", "keys_limits.py"): ["refused so far: 0"],
    ("docs/security.md", "codec_cloudpickle.py"): ["42"],
    ("docs/guides/doors.md", "doors_all.py"): [
        "openpi://127.0.0.1:",
        "groot://127.0.0.1:",
        "vla-eval://127.0.0.1:",
        "(10, 7)",
    ],
    ("docs/guides/doors.md", "doors_names.py"): ["['openpi://127.0.0.1:", "'groot://127.0.0.1:"],
    ("docs/guides/groot.md", "groot_names.py"): ["groot://127.0.0.1:"],
    ("docs/guides/openpi.md", "openpi_names.py"): ["openpi://127.0.0.1:"],
    ("docs/guides/vla-eval.md", "vla_eval_names.py"): ["vla-eval://127.0.0.1:"],
    ("docs/guides/contracts.md", "contract.py"): [
        "50.0 Hz",
        "action: the order of names: at 0 expected 'elbow', the server has 'shoulder'",
        "(50, 3)",
    ],
    ("docs/guides/contracts.md", "contract_swap.py"): [
        "[0. 0.] at 50.0 Hz",
        "rate: expected 20.0, the server has 50.0",
    ],
}

PACKAGES = {  # which test_contributing.py installs and holds to the suites
    "docs/guides/write-a-transport.md": ["edgeml_tcp.py", "tests/test_tcp.py"],
    "docs/guides/write-a-door.md": ["edgeml_lines.py", "tests/test_lines.py"],
    "docs/guides/write-a-resolver.md": ["edgeml_listed.py", "tests/test_listed.py"],
    "docs/guides/write-a-codec.md": ["edgeml_zlib.py", "tests/test_zlib.py"],
    "docs/guides/write-a-store.md": ["recent.py", "test_recent.py"],
}

WITH_RAY = {  # which tests/ray/test_cluster_page.py runs
    "docs/guides/cluster.md": ["policies.py", "policy_ray.py"],
    "docs/guides/sharded-learner.md": ["shards_ray.py"],  # and test_shards_page.py
}

PROGRAM = re.compile(r"# ([\w/]+\.py)\n(.*)", re.DOTALL)
PORT = re.compile(r"\b(5555|5557|5558|6379|6380|8000|8001)\b")


def programs_of(page: str) -> dict[str, str]:
    """A page's programs by their files' names; all of its Python is one."""
    found = [PROGRAM.fullmatch(block) for block in blocks_of(page, "python")]
    assert all(found), f"a program of {page} doesn't begin with its file's name"
    return dict(match.groups() for match in found if match)


class Run:
    """A page's programs in a folder of their own, with free ports in place of the page's."""

    def __init__(self, folder: Path, page: str) -> None:
        self.folder = folder
        self.page = page
        self.programs = programs_of(page)
        self.ports: dict[str, str] = {}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        def other(match: re.Match[str]) -> str:
            return self.ports.setdefault(match[0], str(free_port()))

        for each, text in self.programs.items():  # some import others
            (self.folder / each).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / each).write_text(PORT.sub(other, text))
        if "credentials=" in self.programs[name]:
            self.make_keys()
        # Apart, as the log, by another thread, could come amid what is printed.
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, name, *arguments]
        return subprocess.Popen(command, cwd=self.folder, text=True, **pipes)

    def make_keys(self) -> None:
        """Make the keys as the page first says."""
        words = next(w for w in commands_of(self.page) if w[:2] == ["edgeml", "keygen"])
        command = [sys.executable, "-m", *words]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, timeout=60)

    def await_port(self, port: int, server: subprocess.Popen[str]) -> None:
        """Wait until a server listens at what stands for this port, or at any other."""

        def answers() -> bool:
            assert server.poll() is None, f"the server ended: {''.join(server.communicate())}"
            with suppress(ConnectionRefusedError):
                socket.create_connection(
                    ("127.0.0.1", int(self.ports.get(str(port), port))), 1
                ).close()
                return True
            return False

        wait_until(answers, timeout=60)


def end_of(program: subprocess.Popen[str]) -> str:
    """Wait until a program ends well; returns what it printed and then its log, each whole."""
    said = "".join(program.communicate(timeout=100))
    assert program.returncode == 0, said
    return said


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_server_and_a_client_run_as_they_stand(pair: Pair, tmp_path: Path) -> None:
    run = Run(tmp_path, pair.page)
    server = run.start(f"{pair.name}_server.py")
    try:
        run.await_port(pair.port, server)
        said = end_of(run.start(f"{pair.name}_client.py"))
        for text in pair.prints:
            assert text in said
        if not pair.ends:
            server.send_signal(signal.SIGINT)
        assert "Traceback" not in end_of(server)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(("page", "name"), ALONE, ids=lambda text: Path(text).name)
def test_a_program_of_one_process_runs_as_it_stands(page: str, name: str, tmp_path: Path) -> None:
    program = Run(tmp_path, page).start(name)
    try:
        said = end_of(program)
    finally:
        program.kill()
        program.wait()
    for text in ALONE[page, name]:
        assert text in said


def test_a_robots_program_calls_several_servers_as_it_calls_one(tmp_path: Path) -> None:
    run = Run(tmp_path, "docs/guides/cluster.md")
    ports = [free_port(), free_port()]
    started_ = [run.start("policy_server.py", str(port)) for port in ports]
    try:
        for port, server in zip(ports, started_, strict=True):
            run.await_port(port, server)
        client = run.start("policy_client.py", *(f"zmq://127.0.0.1:{port}" for port in ports))
        assert client.communicate(timeout=100) == ("100 answers, servers: 2 gain: 1.0\n", "")
    finally:
        for server in started_:
            server.kill()
            server.communicate()


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    run = Run(tmp_path, "docs/tutorials/checkpoints.md")
    for printed in ("steps 100 items 100\n", "steps 200 items 200\n"):
        assert run.start("resume.py").communicate(timeout=100)[0] == printed


SERVE_BEYOND = """
from edgeml import InferenceServer
server = InferenceServer(0, "0.0.0.0")
server.register_interface("whoami", lambda payload, context: context.identity)
with server.serving():
    print(server.port, flush=True)
    input()
"""
ASK = """
import sys
from edgeml import InferenceClient
with InferenceClient("127.0.0.1", int(sys.argv[1]), transport=sys.argv[2]) as client:
    print(client.call("whoami", None))
"""


@pytest.mark.parametrize("transport", ["zmq", "grpc"])
def test_keys_for_two_machines_take_five_lines(transport: str, tmp_path: Path) -> None:
    block = blocks_of("docs/security.md", "bash")[0]
    assert len([line for line in block.splitlines() if not line.startswith("#")]) == 5
    ours, theirs = block.split("# on the robot\n")
    server_home, client_home = tmp_path / "server", tmp_path / "robot"
    for home, program in ((server_home, SERVE_BEYOND), (client_home, ASK)):
        home.mkdir()
        (home / "program.py").write_text(program)

    def start(lines: str, home: Path, *arguments: str) -> subprocess.Popen[str]:
        stands_in = f"""
            set -e
            pip() {{ :; }}  # it is installed
            edgeml() {{ "{sys.executable}" -m edgeml "$@" > /dev/null; }}
            scp() {{ cp -rp "$2" "{client_home}/${{3#*:}}"; }}  # to the other machine
            export EDGEML_TRANSPORT={transport}
        """
        run = shlex.join([sys.executable, "-u", "program.py", *arguments])
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        script = f"{stands_in}\n{lines}\nexec {run}"
        return subprocess.Popen(["bash", "-c", script], cwd=home, text=True, **pipes)

    server = start(ours, server_home)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, server.communicate()[1]
        robot = start(theirs, client_home, port, transport)
        assert robot.communicate(timeout=100) == ("robot\n", ""), transport
        stranger = start("", client_home, port, transport)
        printed, error = stranger.communicate(timeout=100)
        assert not printed
        assert "PermissionDenied" in error
    finally:
        server.kill()
        server.communicate()


def test_all_limits_are_on_their_page() -> None:
    units = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+) ?(\w*) \|", prose_of("docs/security.md"), re.MULTILINE
    )
    told = {name: float(number.replace(",", "")) * units[unit] for name, number, unit in rows}
    assert told == dataclasses.asdict(Limits())


def test_every_program_on_every_page_is_run() -> None:
    runs = {
        *((page, name) for page, name in ALONE),
        *((pair.page, f"{pair.name}_{side}.py") for pair in PAIRS for side in ("server", "client")),
        *((page, name) for page, names in (PACKAGES | WITH_RAY).items() for name in names),
    }
    assert runs == {(page, name) for page in PAGES for name in programs_of(page)}


def test_every_program_is_formatted_and_free_of_lint(tmp_path: Path) -> None:
    for page in PAGES:
        for name, text in programs_of(page).items():
            path = tmp_path / page.replace("/", "_") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for check in (["check", "--select=E,F,W,I,UP,RUF"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--line-length=100", "--isolated", "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout


# Links, paths and names ---------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
    return {
        slug(heading)
        for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    }


@pytest.mark.parametrize("page", NAMES)
def test_every_link_resolves(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://[\w.-]+\.\w+(/|$)", target):
            continue  # no test reaches out; it is an address at least
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.is_file(), f"{page} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(path), f"{page} links to {target}: {anchors_of(path)}"


ROOMS = ["core", "data", "services", "transports", "codecs", "cli", "testing"]
FOLDERS = ["edgeml", "tests", "docs", "examples", "benchmarks", "plugins", ".ci", *ROOMS]
FILE = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*")
MODULE = re.compile(r"edgeml(?:\.\w+)+")


@pytest.mark.parametrize("page", TODAY)
def test_every_path_and_module_that_is_named_exists(page: str) -> None:
    for code in code_of(page):
        if FILE.fullmatch(code):
            # The library's own may be named short: `core/wire` for edgeml/core/wire.py.
            places = [
                (root, f"{code.rstrip('/')}{end}")
                for root in (ROOT, ROOT / "edgeml")
                for end in ("", ".py")
            ]
            assert any(any(root.glob(name)) for root, name in places), f"{page}: no {code}"
        elif MODULE.fullmatch(code):
            assert exists(code), f"{page}: no {code}"


def exists(dotted: str) -> bool:
    """Whether it is a module, an entry-point group of ours, or something in a module."""
    if dotted in ("edgeml.transports", "edgeml.codecs", "edgeml.resolvers"):
        return True
    module, _, name = dotted.rpartition(".")
    with suppress(ImportError):
        importlib.import_module(dotted)
        return True
    return exists(module) and hasattr(importlib.import_module(module), name)


@functools.cache
def words_of_the_code() -> set[str]:
    """All that has a name in the library, its plugins and its examples."""
    rooms = ("edgeml", "plugins", "examples")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    return set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))


ELSEWHERE = {"print", "bytes", "builder_from_directory", "devices", "DataLoader"} | {
    *("WebsocketClientPolicy", "infer", "api_key"),
}


@pytest.mark.parametrize("page", ["README.md", *(n for n in TODAY if n.startswith("docs/"))])
def test_every_function_class_and_argument_that_is_named_exists(page: str) -> None:
    for code in code_of(page):
        named = {
            *re.findall(r"(\w+)\(", code),  # what is called
            *re.findall(r"(\w+)=", code),  # and its arguments
            *re.findall(r"^([A-Z]\w*[a-z]\w*)$", code),  # a class
            *re.findall(r"\$(EDGEML_\w+)", code),
        }
        missing = named - words_of_the_code() - ELSEWHERE
        assert not missing, f"{page}: `{code}` names {missing}, which the code doesn't have"


# Commands -----------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"hatchling", "tox", "ruff", "mypy", "lint-imports", "sphinx-build", "python3", "."} | {
    *("scp", "rm", "export", "pip-audit"),
}
FROM_ELSEWHERE = {
    "tox",
    "tox-uv",
    "pip-audit",
    "torchrl",
    *(
        tomllib.loads(file.read_text())["project"]["name"]
        for file in ROOT.glob("plugins/*/pyproject.toml")
    ),
}  # what pip may be asked for


def commands_of(page: str) -> Iterator[list[str]]:
    """All commands that a page shows, in blocks and in lines of text."""
    inline = [code for code in code_of(page) if code.startswith(("python ", "edgeml ", "pip "))]
    for text in [*blocks_of(page, "bash"), *inline]:
        for line in text.splitlines():
            for command in re.split(r"&&|&$", line.partition("  #")[0]):
                words = shlex.split(command, comments=True)
                if words:
                    yield words


@functools.cache
def help_of(program: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_pip(words: list[str]) -> None:
    assert words[0] == "install", words
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        known = {".", PROJECT["name"], *FROM_ELSEWHERE}
        assert word == "-e" or name in known or (ROOT / name).is_dir(), word
        unknown = {e for e in extras.split(",") if e} - PROJECT["optional-dependencies"].keys()
        assert not unknown, f"pip install {word}: no extra {unknown}"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert (ROOT / words[1].replace(".", "/")).is_dir(), words
        return
    assert (ROOT / words[0]).is_file(), words
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in help_of(words[0]), f"{words[0]} has no option {option}"


def check_edgeml(words: list[str]) -> None:
    if len(words) == 1:
        words = [*words, "--help"]  # it is named, and needn't be all that is typed
    try:
        cli._parser().parse_args([word.replace("PORT", "5555") for word in words])
    except SystemExit as error:
        if error.code:  # --version and --help have 0
            raise AssertionError(f"edgeml {' '.join(words)} is not understood") from error


def check_pytest(words: list[str]) -> None:
    for word in words:
        assert word in ("-m", "slow") or (ROOT / word).exists(), words


CHECKS = {
    "pip": check_pip,
    "python": check_python,
    "edgeml": check_edgeml,
    "pytest": check_pytest,
}


@pytest.mark.parametrize("page", [page for page in NAMES if list(commands_of(page))])
def test_every_command_is_one_that_there_is(page: str) -> None:
    for command, *words in commands_of(page):
        own = command == "python" and words[0] in programs_of(page)
        if command not in TOOLS and not own:
            assert command in CHECKS, f"{page}: what is {command}?"
            CHECKS[command](words)


def shapes_of(text: str) -> set[str]:
    """Lines without their numbers and their columns' widths."""
    return {
        re.sub(r"\s+", " ", re.sub(r"\d[\d.]*", "#", line.replace("behind", "ahead of"))).strip()
        for line in text.splitlines()
    }


def test_the_command_line_prints_what_its_page_shows(tmp_path: Path) -> None:
    def prints(*words: str, codes: Sequence[int] = (0,)) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "edgeml", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode in codes, done.stderr
        return done.stdout

    plugins, doctor, looked, made, bench, soak, *_ = blocks_of("docs/command-line.md", "text")
    shown = "\n".join(line for line in plugins.splitlines() if "lidar" not in line)
    assert shapes_of(shown) <= shapes_of(prints("plugins"))
    joints = ("shoulder", "elbow", "wrist")
    contract = PolicyContract(
        {"state": Feature(3, "float32", joints, "rad", "state")},
        Feature((50, 3), "float32", joints, "rad", "action"),
        rate=50,
        horizon=50,
        identity="sha256:4ad7",
    )
    server = InferenceServer(0)
    server.register_interface("policy", lambda payload: payload, contract=contract)
    with started(server):
        printed = prints("doctor", "--transport", "shm", "zmq", "--url", server.url)
    shown = re.sub(r"(lent to one peer: )\d+", r"\1 1", doctor)
    assert shapes_of(shown) <= shapes_of(re.sub(r"(lent to one peer: )\d+", r"\1 1", printed))
    printed = prints("keygen", "keys", "--client", "robot").replace(str(tmp_path), "/home/me")
    assert shapes_of(made) == shapes_of(printed)
    prints("keygen", "keys", "--client", "viewer", "--role", "observe")
    printed = prints("doctor", "--transport", "inproc", "--credentials", "keys")
    assert shapes_of(looked) <= shapes_of(printed)
    assert shapes_of(bench) <= shapes_of(prints("bench", "--transport", "zmq", "--seconds", "0.05"))
    # Three seconds are too few to tell whether anything grows.
    printed = prints("soak", "--clients", "6", "--minutes", "0.05", codes=(0, 1))
    lines = [re.sub(r"[▁-█]+|[+-]|GROWS", "", text) for text in (soak, printed)]
    assert shapes_of(lines[0]) <= shapes_of(lines[1])


def test_tox_runs_every_python_that_the_package_says_it_runs_on() -> None:
    tox = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tox"]
    said = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert tox["env_list"] == said
    assert PROJECT["requires-python"] == f">={said[0]}"


# The site -----------------------------------------------------------------------------------


PUBLIC = [
    "edgeml",
    "edgeml.aio",
    "edgeml.control",
    "edgeml.core",
    "edgeml.data",
    "edgeml.data.rlds",
    "edgeml.gym",
    "edgeml.ray",
    "edgeml.testing",
]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_is_made_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    assert "sphinx-build -W docs site" in PAGES["CONTRIBUTING.md"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    there = {
        line.split(" ")[0].rpartition(".")[2]
        for line in zlib.decompress(inventory).decode().splitlines()
        if line.startswith("edgeml.")
    }
    public = {name for module in PUBLIC for name in importlib.import_module(module).__all__}
    packages = {"aio", "control", "core", "data", "services"}
    no_classes = {"DEFAULT_LIMITS", "OnRequest"}
    assert public - there == packages | no_classes


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^(\S+)$", "\n".join(blocks_in_braces("docs/index.md")), re.MULTILINE)
    pages = {
        str(path.relative_to(ROOT / "docs").with_suffix(""))
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert set(listed) == pages - {"index"}


def blocks_in_braces(page: str) -> list[str]:
    return re.findall(r"^```\{toctree\}\n(?::[^\n]*\n)*(.*?)^```$", PAGES[page], FLAGS)
