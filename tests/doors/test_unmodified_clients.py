"""Clients that others published, unmodified, against a running server.

    pytest -m slow tests/doors/test_unmodified_clients.py

Each is installed by pip from the package index, in an environment of its own. Where you have them,
EDGEML_CLIENTS may name the directory; what is missing there is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from edgeml import Batching, Feature, InferenceClient, InferenceServer, PolicyContract
from pairs import make_keys, started
from robot import FAILING, act, check, observe
from small_clients import GrootClient, RealtimeClient, RemoteFailure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
# What is installed with them, and what without the rest of what it asks for: vla-eval and
# strands-robots name far more than their clients import, and openpi-client less.
PACKAGES = {
    "openpi": (["openpi-client==0.1.2", "typing_extensions"], None),
    "vla": (["anyio", "msgpack", "numpy", "pillow", "websockets"], "vla-eval==0.8.0"),
    "groot": (["msgpack", "numpy", "pyzmq"], None),
}
ROBOTS = "strands-robots==0.3.8"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def pip(python: str | Path, *words: str | Path) -> None:
    command = [python, "-m", "pip", "-q", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env=ENVIRONMENT, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("EDGEML_CLIENTS")
    return Path(given) if given else tmp_path_factory.mktemp("clients")


def python_of(place: Path, name: str) -> Path:
    """The python of a client's environment, which is made where it isn't there."""
    directory = place / f"venv-{name}"
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        packages, alone = PACKAGES[name]
        if alone is not None:
            pip(python, "install", "--no-deps", alone)
        pip(python, "install", *packages)
    return python


@contextmanager
def client(python: Path, program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    words = [str(python), "-u", str(HERE / program), *map(str, arguments)]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    made = subprocess.Popen(words, env=ENVIRONMENT, text=True, **pipes)
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def told_by(made: subprocess.Popen[str]) -> str:
    assert made.stdout is not None
    line = made.stdout.readline()
    assert line, made.communicate()[1]
    return line.strip()


def go_on(made: subprocess.Popen[str]) -> None:
    assert made.stdin is not None
    made.stdin.write("\n")
    made.stdin.flush()


CONTRACT = PolicyContract(
    {
        "front": Feature((224, 224, 3), "uint8", kind="image"),
        "wrist": Feature((224, 224, 3), "uint8", kind="image"),
        "state": Feature(7, "float64", kind="state"),
        "task": Feature((), str, kind="text"),
    },
    {"actions": Feature((10, 7), "float32", kind="action")},
    rate=50,
)


def policy(observation: Any, context: Any) -> dict[str, Any]:
    if observation["task"] == FAILING:
        raise ValueError("the arm is not to be broken")
    step = context.session.get("step", 0)
    context.session["step"] = step + 1
    seen = [observation[key] for key in ("front", "wrist", "state")]
    return {"actions": act(*seen), "step": np.array(step)}


def without_row_axis(observation: Any) -> Any:
    """What GR00T's clients put in front of everything, taken off; and their options left out."""
    return {key: value[0] for key, value in observation.items() if key != "options"}


def flat(observation: Any) -> Any:
    images = observation["images"]
    return {
        "front": images["front"],
        "wrist": images["wrist"],
        "state": observation["state"],
        "task": observation["task_description"],
    }


DOORS: dict[str, dict[str, Any]] = {
    "openpi": {
        "names": {
            "observation/image": "front",
            "observation/wrist_image": "wrist",
            "observation/state": "state",
            "prompt": "task",
        },
        "metadata": {"robot": "folds towels"},
    },
    "groot": {
        "names": {
            "video.front": "front",
            "video.wrist": "wrist",
            "state.arm": "state",
            "annotation.human.task_description": "task",
            "action.arm": "actions",
        },
        "before": without_row_axis,
    },
    "vla-eval": {"before": flat},
}


@contextmanager
def serving(door: str, port: int = 0, **settings: Any) -> Iterator[int]:
    """A server with a door, behind which it has the policy; gives the door's port."""
    server = InferenceServer(0, **settings)
    server.register_interface("policy", policy, contract=CONTRACT, check="all")
    server.open_door(f"{door}://127.0.0.1:{port}", **DOORS[door])
    with started(server):
        (url,) = server.doors()
        yield int(url.rpartition(":")[2])


def run(door: str, python: Path, program: str, *arguments: object, **settings: Any) -> Any:
    """Have the client do what it does, with the server started anew before its last call."""
    with ExitStack() as ends:
        with serving(door, **settings) as port:
            made = ends.enter_context(client(python, program, port, *arguments))
            told = json.loads(told_by(made))
        with serving(door, port, **settings):
            go_on(made)
            assert told_by(made) == "again"
            assert made.wait(20) == 0
    return told


needs_old_numpy = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="openpi-client pins numpy < 2, which is not made there"
)


@needs_old_numpy
@pytest.mark.parametrize("keys", [False, True], ids=["no keys", "keys"])
def test_openpi_client(place: Path, tmp_path: Path, keys: bool) -> None:
    settings, arguments = {}, []
    if keys:
        made = make_keys(tmp_path)
        settings["credentials"] = made["server"]
        arguments.append((made["robot"] / "token").read_text().strip())
    python = python_of(place, "openpi")
    told = run("openpi", python, "openpi_program.py", *arguments, **settings)
    assert told["metadata"]["robot"] == "folds towels"
    assert "ValueError: the arm is not to be broken" in told["failed"]
    assert told["code"] == 1011
    assert 0 < told["timing"]["infer_ms"] < 1000


def test_vla_eval(place: Path) -> None:
    told = run("vla-eval", python_of(place, "vla"), "vla_program.py")
    assert told["server"]["protocol_version"] == 1
    assert {"model_server", "capabilities", "action_spec", "observation_spec"} <= told[
        "server"
    ].keys()
    for spec in ("action_spec", "observation_spec"):
        for each in told["server"][spec].values():
            assert {"name", "dims", "format"} <= each.keys()
    assert "the arm is not to be broken" in told["failed"]
    assert told["steps"] == [*range(25)] * 8


def file_of_strands(place: Path) -> Path:
    """The one file of strands-robots that its client is."""
    file = place / "strands" / "strands_robots" / "policies" / "groot" / "client.py"
    if not file.exists():
        pip(sys.executable, "download", "--no-deps", "-d", place / "dl", ROBOTS)
        (wheel,) = (place / "dl").glob("strands_robots*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(str(file.relative_to(place / "strands")), place / "strands")
    return file


def test_the_groot_client_of_strands_robots(place: Path) -> None:
    told = run("groot", python_of(place, "groot"), "groot_program.py", file_of_strands(place))
    assert "action.arm" in told["keys"]
    assert "the arm is not to be broken" in told["failed"]
    assert "front" in told["unlike"], told["unlike"]


def test_openpis_second_dialect() -> None:
    def infer(robot: RealtimeClient, number: int, task: str = "fold") -> Any:
        front, wrist, state = seen = observe(number)
        names = ("observation/image", "observation/wrist_image", "observation/state", "prompt")
        result = robot.call(dict(zip(names, (front, wrist, state, task), strict=True)))
        check(result["actions"], seen)
        return int(result["step"])

    with serving("openpi") as port:
        robot = RealtimeClient(f"openpi://127.0.0.1:{port}")
        assert {
            "image_resolution",
            "n_external_cameras",
            "needs_wrist_camera",
            "needs_session_id",
            "action_space",
        } <= robot.metadata.keys()
        assert [infer(robot, number) for number in range(200)] == [*range(200)]
        assert robot.reset() == {"status": "reset successful"}
        assert infer(robot, 0) == 0
        with pytest.raises(RemoteFailure, match="the arm is not to be broken"):
            infer(robot, 0, FAILING)
        assert infer(robot, 1) == 1
    with pytest.raises(ConnectionClosed):
        infer(robot, 2)
    robot.close()
    with serving("openpi", port), closing(RealtimeClient(f"openpi://127.0.0.1:{port}")) as robot:
        assert infer(robot, 2) == 0


def test_groots_newer_form() -> None:
    def get_action(robot: GrootClient, number: int, task: str = "fold") -> Any:
        front, wrist, state = seen = observe(number)
        names = ("video.front", "video.wrist", "state.arm", "annotation.human.task_description")
        values = (front[None], wrist[None], state[None], [task])
        action = robot.call(dict(zip(names, values, strict=True)), {"seed": 1})
        check(action["action.arm"], seen)
        assert isinstance(robot.info, dict)
        return int(action["step"])

    with ExitStack() as ends:
        with serving("groot") as port:
            robot = ends.enter_context(closing(GrootClient(f"groot://127.0.0.1:{port}")))
            assert robot.ask("ping")["status"] == "ok"
            assert [get_action(robot, number) for number in range(200)] == [*range(200)]
            robot.reset()
            assert get_action(robot, 0) == 0
            with pytest.raises(RemoteFailure, match="the arm is not to be broken"):
                get_action(robot, 0, FAILING)
            for endpoint in ("kill", "no such"):
                with pytest.raises(RemoteFailure):
                    robot.ask(endpoint)
            assert get_action(robot, 1) == 1
        with serving("groot", port):  # the socket connects anew by itself
            assert get_action(robot, 2) == 0


@needs_old_numpy
def test_all_of_them_and_native_ones_are_rows_of_one_batch(place: Path) -> None:
    together: Counter[frozenset[str]] = Counter()

    def policy_of_batch(batch: Any, contexts: list[Any]) -> dict[str, Any]:
        together[frozenset(context.client_id.rpartition("-")[0] for context in contexts)] += 1
        rows = [
            policy({key: batch[key][row] for key in batch}, context)
            for row, context in enumerate(contexts)
        ]
        return {key: np.stack([row[key] for row in rows]) for key in ("actions", "step")}

    # All have the same port, so that two by TCP need an address each.
    server = InferenceServer(url="zmq://127.0.0.1:0,grpc://127.0.0.2:0,shm://127.0.0.1:0")
    batching = Batching(max_size=6, max_delay=0.05, sizes="any")
    server.register_interface("policy", policy_of_batch, batching=batching)
    for door, settings in DOORS.items():
        server.open_door(f"{door}://127.0.0.1:0", **settings)
    over = threading.Event()

    def run_native(url: str) -> int:
        kind, calls = url.partition(":")[0], 0
        with InferenceClient(url=url, client_id=f"{kind}-1", timeout=60) as robot:
            while not over.is_set():
                front, wrist, state = seen = observe(calls % 20)
                observation = {"front": front, "wrist": wrist, "state": state, "task": "fold"}
                check(robot.call("policy", observation)["actions"], seen)
                calls += 1
        return calls

    with started(server), ThreadPoolExecutor(3) as natives, ExitStack() as ends:
        calls = [natives.submit(run_native, url) for url in server.urls()]
        ends.callback(over.set)
        ports = {url.partition(":")[0]: url.rpartition(":")[2] for url in server.doors()}
        made = [
            ends.enter_context(client(python_of(place, name), program, *arguments))
            for name, program, *arguments in (
                ("openpi", "openpi_program.py", ports["openpi"]),
                ("groot", "groot_program.py", ports["groot"], file_of_strands(place)),
                ("vla", "vla_program.py", ports["vla-eval"]),
            )
        ]
        for each in made:
            json.loads(told_by(each))
        over.set()
        assert all(each.result(60) > 20 for each in calls)
        stats = server.stats()
    assert all(stats[f"calls_by_{door}"] >= 200 for door in DOORS)
    assert together[frozenset({"openpi", "groot", "vla-eval", "zmq", "grpc", "shm"})] > 20, together
