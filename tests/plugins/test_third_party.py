"""A stranger's plugins, installed by pip into an environment of their own, and used from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pairs import ROOT

EXAMPLE = ROOT / "examples" / "async_learner_actor.py"
# Not what conftest.py makes look installed.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(command: list[str | Path], where: Path, timeout: float = 100) -> str:
    """Run a program to its successful end; returns what it prints."""
    done = subprocess.run(
        command,
        cwd=where,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a copy of the plugins lies, and where they are installed."""
    place = tmp_path_factory.mktemp("stranger")
    shutil.copytree(
        ROOT / "plugins",
        place / "plugins",
        ignore=shutil.ignore_patterns("__pycache__", ".*"),
    )
    return place


@pytest.fixture(scope="session")
def python(place: Path) -> Path:
    """The interpreter of a fresh virtual environment with the two plugins in it."""
    directory = place / "venv"
    venv.create(directory, symlinks=True)
    bin_ = directory / ("Scripts" if os.name == "nt" else "bin")
    site = sysconfig.get_path("purelib", vars={"base": str(directory)})
    # What this environment has, that one has too, edgeml among it; pip must not need the network.
    also = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(also))
    (Path(site) / "parent.pth").write_text(lines)
    packages = sorted((place / "plugins").iterdir())
    pip = [sys.executable, "-m", "pip", "--python", bin_ / "python", "--disable-pip-version-check"]
    run([*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", *packages], place)
    return bin_ / "python"


@contextmanager
def process(python: Path, *arguments: str | Path, where: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program in the background, and end it after the block."""
    made = subprocess.Popen(
        [python, "-u", *arguments],
        cwd=where,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def test_both_are_found_without_being_told_of(python: Path, tmp_path: Path) -> None:
    program = (
        "from edgeml.core.plugins import find\n"
        "print([f'{each.name} of {each.package}' for kind in ('transport', 'codec')"
        " for each in find(kind)])\n"
        "import edgeml_websocket; print(edgeml_websocket.__file__)"
    )
    found, file = run([python, "-c", program], tmp_path).splitlines()
    assert "'ws of edgeml-websocket 0.1.0'" in found
    assert "'json of edgeml-json 0.1.0'" in found
    assert Path(file).is_relative_to(python.parent.parent)


@pytest.mark.parametrize(
    ("plugin", "some", "at_least"),
    [
        # All of the suite's run over it in tests/transports/test_transports.py.
        ("edgeml-websocket", "who_asks or arrive or another_process or keys_secure or clos", 35),
        ("edgeml-json", "", 90),
    ],
)
def test_their_own_tests_pass(
    plugin: str, some: str, at_least: int, place: Path, python: Path
) -> None:
    command = [python, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-k", some]
    printed = run([*command, place / "plugins" / plugin / "tests"], place, timeout=200)
    passed = re.search(r"(\d+) passed", printed)
    assert passed, printed
    assert int(passed[1]) >= at_least
    assert "failed" not in printed


def test_what_stands_in_for_agentlace_is_imported_by_its_name(place: Path, python: Path) -> None:
    command = [python, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    printed = run([*command, place / "plugins" / "agentlace" / "tests"], place)
    assert "1 passed" in printed


@pytest.mark.parametrize(
    "module", ["edgeml-websocket/edgeml_websocket/__init__.py", "edgeml-json/edgeml_json.py"]
)
def test_each_is_a_few_lines(module: str) -> None:
    # What a codec must refuse takes ten of them, and TLS and pongs that nobody reads twenty.
    assert len((ROOT / "plugins" / module).read_text().splitlines()) < 115


SERVER = """
import sys
import time
import numpy as np
from edgeml import ActionConfig, ActionServer, InferenceServer, TrainerConfig, TrainerServer
from edgeml.data import QueuedDataStore

trainer = TrainerServer(TrainerConfig(0, transport="ws"))
store = QueuedDataStore(1000)
trainer.register_data_store("actor", store)
inference = InferenceServer(0, transport="ws", codecs=["json"])
inference.register_interface("double", lambda payload: {"twice": 2 * payload["x"]})
action = ActionServer(
    ActionConfig(0, action_keys=["move"], observation_keys=["image"], transport="ws"),
    lambda keys: {key: np.full((100, 100, 3), 7, np.uint8) for key in keys},
    lambda key, payload: {"moved": payload},
)
with trainer, inference, action:
    for each in (trainer, inference, action):
        each.start(threaded=True)
    print(trainer.port, inference.port, action.port)
    while len(store) < 20:
        time.sleep(0.005)
    trainer.publish_network({"w": np.arange(200_000)})
    action.publish_obs({"image": np.full((100, 100, 3), 9, np.uint8)})
    sys.stdin.read()
print("ended")
"""

CLIENT = """
import queue
import sys
import numpy as np
from edgeml import ActionClient, ActionConfig, InferenceClient, TrainerClient, TrainerConfig
from edgeml.data import QueuedDataStore

ports = list(map(int, sys.argv[1:]))
with InferenceClient("127.0.0.1", ports[1], "ws", codec="json") as inference:
    answer = inference.call("double", {"x": np.arange(100_000.0)})
    assert (answer["twice"] == 2 * np.arange(100_000.0)).all()
config = ActionConfig(0, action_keys=["move"], observation_keys=["image"], transport="ws")
store = QueuedDataStore(1000)
with (
    ActionClient("127.0.0.1", ports[2], config=config) as action,
    TrainerClient("actor", "127.0.0.1", TrainerConfig(ports[0], transport="ws"), store) as trainer,
):
    assert action.obs()["image"].min() == 7
    assert action.act("move", {"by": 3}) == {"moved": {"by": 3}}
    weights, observations = queue.Queue(), queue.Queue()
    trainer.recv_network_callback(weights.put)
    action.register_obs_callback(observations.put)
    for index in range(20):
        store.insert({"reward": np.float32(index), "image": np.zeros((64, 64), np.uint8)})
    trainer.update()
    assert weights.get(timeout=20)["w"][-1] == 199_999
    assert observations.get(timeout=20)["image"].max() == 9
print("all fine")
"""


def test_the_three_pairs_run_over_it_in_two_processes(python: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [python, "-u", "-c", SERVER],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        try:
            assert server.stdout is not None
            ports = server.stdout.readline().split()
            assert run([python, "-c", CLIENT, *ports], tmp_path) == "all fine\n"
            printed, _ = server.communicate(timeout=60)
            assert (server.returncode, printed) == (0, "ended\n")
        finally:
            server.kill()


@pytest.mark.slow
def test_the_main_job_runs_over_it(
    python: Path,
    tmp_path: Path,
    compiled_once: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in compiled_once.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    arguments = [EXAMPLE, "--transport=ws", "--env=InvertedPendulum-v5", "--max_steps=400"]
    arguments += ["--random_steps=100", "--training_starts=100", "--eval_episodes=2"]
    with process(python, *arguments, "--learner", "--port=0", where=tmp_path) as learner:
        assert learner.stdout is not None
        line = ""
        while not (port := re.search(r"ws://\S+:(\d+)$", line.strip())):
            line = learner.stdout.readline()
            assert line, "the learner ended"
        printed = run([python, *arguments, "--actor", "--port", port[1]], tmp_path)
        assert re.search(r"evaluation return: \S+ \+- \S+ over 2 episodes", printed), printed
        learned, _ = learner.communicate(timeout=60)
        assert learner.returncode == 0, learned
        assert "updates from 400 transitions" in learned
