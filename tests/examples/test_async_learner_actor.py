"""The main job, as a user runs it: the example in real processes, on a real environment."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeml.data.rlds import read_episodes, transitions_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "async_learner_actor.py"
SMALL = ["--max_steps=400", "--random_steps=100", "--training_starts=100", "--eval_episodes=2"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLE), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def two_processes(arguments: list[str], seconds: float) -> tuple[str, str]:
    """Run a learner and an actor to their end; returns what each printed."""
    learner = start("--learner", "--port", "0", *arguments)
    try:
        actor = start("--actor", "--port", port_of(learner), *arguments)
        try:
            acted, _ = actor.communicate(timeout=seconds)
            assert actor.returncode == 0, acted
        finally:
            actor.kill()
            actor.wait()
        learned, _ = learner.communicate(timeout=100)
        assert learner.returncode == 0, learned
    finally:
        learner.kill()
        learner.wait()
        if learner.stdout is not None:
            learner.stdout.close()
    return acted, learned


def port_of(learner: subprocess.Popen[str]) -> str:
    """The port that a learner says it has."""
    assert learner.stdout is not None
    line = ""
    while not (port := re.search(r"zmq://\S+:(\d+)$", line.strip())):  # after any warnings
        line = learner.stdout.readline()
        assert line, "the learner ended"
    return port[1]


def evaluation_return(printed: str) -> float:
    found = re.search(r"evaluation return: (-?[\d.]+) \+- [\d.]+ over \d+ episodes", printed)
    assert found, printed
    return float(found[1])


def test_both_in_one_process_end_with_a_return_and_a_picture(tmp_path: Path) -> None:
    curve = tmp_path / "curve.png"
    process = start("--env", "InvertedPendulum-v5", *SMALL, "--curve", str(curve))
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    evaluation_return(printed)
    assert curve.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_keep_the_ratio_of_updates_to_steps(tmp_path: Path) -> None:
    arguments = ["--env", "InvertedPendulum-v5", *SMALL, "--curve", str(tmp_path / "curve.png")]
    checkpoint = tmp_path / "run.checkpoint"
    acted, learned = two_processes(
        [*arguments, "--checkpoint_path", str(checkpoint), "--utd_ratio", "2"], seconds=100
    )
    evaluation_return(acted)
    assert "600 updates from 400 transitions" in learned  # (400 - 100) * 2
    assert checkpoint.exists()


def test_a_trajectory_buffer_learns_and_every_step_is_logged(tmp_path: Path) -> None:
    arguments = ["--env", "InvertedPendulum-v5", *SMALL, "--curve", str(tmp_path / "curve.png")]
    logs = tmp_path / "logs"
    process = start(*arguments, "--use_traj_buffer", "--rlds_log_dir", str(logs))
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    evaluation_return(printed)
    episodes = [transitions_of(episode) for episode in read_episodes(logs)]
    assert sum(len(episode["rewards"]) for episode in episodes) == 400
    assert all(episode["dones"].sum() == 1 for episode in episodes)
    terminal = [not episode["masks"][-1] for episode in episodes]
    assert all(terminal[:-1])  # a pendulum that fell; the last was cut off by the end, perhaps


def test_a_learner_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """And gets again what came after that, so that all updates and all steps are there."""
    arguments = ["--env", "InvertedPendulum-v5", *SMALL, "--curve", str(tmp_path / "curve.png")]
    saving = ["--checkpoint_path", str(tmp_path / "run"), "--checkpoint_period", "100"]
    processes = [start("--learner", "--port", "0", *arguments, *saving)]
    try:
        port = port_of(processes[0])
        processes.append(start("--actor", "--port", port, *arguments, "--max_steps", "700"))
        while not (tmp_path / "run").exists():
            assert processes[0].poll() is None
            time.sleep(0.01)
        processes[0].kill()
        processes.append(
            start("--learner", "--port", port, *arguments, *saving, "--max_steps", "700")
        )
        acted, _ = processes[1].communicate(timeout=100)
        assert processes[1].returncode == 0, acted
        evaluation_return(acted)
        learned, _ = processes[2].communicate(timeout=100)
        assert re.search(r"going on from \S+run: [1-6]\d\d transitions", learned), learned
        assert "600 updates from 700 transitions" in learned
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_ctrl_c_ends_a_waiting_learner_cleanly() -> None:
    learner = start("--learner", "--port", "0", "--env", "InvertedPendulum-v5")
    assert learner.stdout is not None
    learner.stdout.readline()
    learner.send_signal(signal.SIGINT)
    printed, _ = learner.communicate(timeout=100)
    assert learner.returncode == 0, printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("seed", "steps"),
    [
        (0, 12_000),
        *(pytest.param(seed, 20_000, marks=pytest.mark.slow) for seed in (0, 1, 2)),
    ],
)
def test_inverted_pendulum_is_learned(seed: int, steps: int, tmp_path: Path) -> None:
    arguments = ["--env", "InvertedPendulum-v5", "--max_steps", str(steps), "--seed", str(seed)]
    began = time.monotonic()
    acted, _ = two_processes([*arguments, "--curve", str(tmp_path / "curve.png")], seconds=150)
    took = time.monotonic() - began
    print(f"seed {seed}: {evaluation_return(acted)} in {took:.0f} s")
    assert evaluation_return(acted) >= 900


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [[], ["--use_traj_buffer", "--rlds_log_dir", "logs"]])
def test_half_cheetah_is_being_learned(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file where it runs
    # Seeds 0 to 3 reach 1,000 to 2,800.
    arguments = ["--env", "HalfCheetah-v4", "--max_steps", "25000", "--seed", "1", *more]
    acted, _ = two_processes([*arguments, "--curve", str(tmp_path / "curve.png")], seconds=800)
    print(f"HalfCheetah-v4 at 25,000 steps: {evaluation_return(acted)}")
    assert evaluation_return(acted) >= 1000
    if more:
        logged = [len(transitions_of(episode)["rewards"]) for episode in read_episodes("logs")]
        assert sum(logged) == 25_000
