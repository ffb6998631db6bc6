"""async_learner_actor.py never pretends: the real program tells within seconds what goes wrong."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from example_program import Example

ENV = ("--env", "InvertedPendulum-v5")
SMALL = (*ENV, "--random_steps=100", "--training_starts=100", "--eval_episodes=2")
WEIGHTS = r"(\d+) updates from (\d+) transitions; the last weights are published"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return partial(Example, "async_learner_actor.py", cwd=tmp_path)


FAILING_UPDATE = """
import sac
update, calls = sac.update, []
def fail_late(*arguments):
    calls.append(None)
    if len(calls) > 3:
        raise RuntimeError("no memory, say")
    return update(*arguments)
sac.update = fail_late
"""


@pytest.mark.slow
def test_a_learner_thread_that_dies_ends_the_run_with_its_error(run: Any, tmp_path: Path) -> None:
    with run(*SMALL, "--max_steps=2000", before=FAILING_UPDATE) as both:
        printed = both.end(code=1, traceback=True)
    assert printed.endswith("RuntimeError: no memory, say\n")
    assert "evaluation return" not in printed
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")  # what there is


@pytest.mark.slow
def test_a_learner_killed_and_restarted_without_a_checkpoint_goes_on(run: Any) -> None:
    """With the 200 transitions that the actor still holds, though it has made far more steps."""
    some = (*SMALL, "--steps_per_update=10", "--checkpoint_period=50", "--max_steps=1500")
    with run("--learner", "--port=0", *some) as learner:
        port = learner.port()
        with run("--actor", f"--port={port}", *some) as actor:
            learner.until(r"learner: [4-9]\d\d/")
            learner.kill()
            actor.until(r"the learner is away \(.*\); waiting for up to 300 s")
            with run("--learner", f"--port={port}", *some) as another:
                actor.until("another learner is there, .* steps it can have 200")
                printed = actor.end()
                match = another.until(WEIGHTS)
                another.end()
    assert re.search(r"evaluation return: \d", printed)
    assert int(match[1]) == (int(match[2]) - 100) // 10 * 10
    assert 200 < int(match[2]) < 1500


def test_a_learner_says_what_it_waits_for(run: Any) -> None:
    with run("--learner", "--port=0", *SMALL) as learner:
        learner.until(r"--host 0\.0\.0\.0 lets others in")
        learner.until(
            r"learner: waiting for actors \(none is connected: start one with --actor\) to send "
            r"the first 100 transitions, 0 of them are here, for 2 s now"
        )
        learner.interrupt()
        learner.end()


def test_an_actor_says_that_it_waits_for_a_learner_and_how_to_let_it_in(run: Any) -> None:
    with run("--actor", "--port=1", *ENV) as actor:
        actor.until(
            r"nobody answers at zmq://127\.0\.0\.1:1.*; waiting for up to 300 s: "
            r"start async_learner_actor\.py --learner there, with --host 0\.0\.0\.0"
        )
        actor.until("waiting for the server, 29[0-9] s more")
        actor.interrupt()
        actor.end()


@pytest.mark.slow
def test_a_checkpoint_that_fails_is_told_and_training_goes_on(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    saving = ("--checkpoint_path=disk/run", "--checkpoint_period=100", "--max_steps=500")
    with run(*SMALL, *saving) as both:
        both.until("learning InvertedPendulum-v5 in one process")
        shutil.rmtree(folder)
        both.until("the checkpoint disk/run was not saved, training goes on: .*disk")
        both.until("400 updates from 500 transitions")
        printed = both.end(code=1)
    assert "evaluation return" in printed
    assert printed.splitlines()[-1].startswith("error: ")  # there is no checkpoint, after all


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["both", "two"])
def test_ctrl_c_draws_the_curve_so_far(run: Any, tmp_path: Path, roles: str) -> None:
    long = (*SMALL, "--max_steps=1000000")
    saving = (*long, "--checkpoint_path=run", "--checkpoint_period=1000000")
    learner = run("--learner", "--port=0", *saving) if roles == "two" else None
    mine = ("--actor", f"--port={learner.port()}", *long) if learner else saving
    with run(*mine) as actor:
        actor.until("steps/s, .* left, last return")
        actor.interrupt()
        assert "learning curve: learning_curve.png" in actor.end()
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    if learner:
        with learner:
            learner.interrupt()
            learner.end()
    assert (tmp_path / "run").exists()  # the learner's


def test_what_cannot_end_well_is_refused_at_the_start(run: Any, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    without_optax = "import sys; sys.modules['optax'] = None"
    with (
        run("--curve=nowhere/curve.png") as no_folder,
        run("--curve=folder.png") as is_folder,
        run("--curve=curve.txt") as no_picture,
        run("--learner", "--checkpoint_path=nowhere/run") as no_checkpoint,
        run("--learner", before=without_optax) as no_optax,
        run("--actors=2") as two_in_one,
    ):
        assert "--curve nowhere/curve.png cannot be written: No such file" in no_folder.end(code=1)
        assert "--curve folder.png cannot be written: Is a directory" in is_folder.end(code=1)
        assert "--curve curve.txt must end in one of: " in no_picture.end(code=1)
        assert "--checkpoint_path nowhere/run cannot be" in no_checkpoint.end(code=1)
        assert 'This needs optax: pip install -e ".[examples]"' in no_optax.end(code=1)
        assert "several actors need --learner" in two_in_one.end(code=2)


def test_two_sides_that_would_wait_for_each_other_are_told_so(run: Any) -> None:
    with run("--learner", "--port=0", *SMALL) as learner:
        with run("--actor", f"--port={learner.port()}", *SMALL, "--utd_ratio=2") as actor:
            printed = actor.end(code=1)
        learner.interrupt()
        learner.end()
    assert "--utd_ratio=2.0" in printed
    assert "--utd_ratio=1.0" in printed


@pytest.mark.slow
def test_the_defaults_give_no_warnings_and_a_history(run: Any) -> None:
    with run("--max_steps=4000", JAX_ENABLE_COMPILATION_CACHE="false") as both:
        printed = both.end()
    assert not re.search("warn|deprecat", printed, re.IGNORECASE), printed
    assert re.search(r"(?m)^actor: [\d,]+/4,000 steps, [\d,]+ steps/s, \d+ s left", printed)
    assert re.search(r"(?m)^learner: [\d,]+/3,000 updates, [\d,]+ updates/s, \d+ s left", printed)
    assert printed.splitlines()[-2].startswith("evaluation return: ")


@pytest.mark.slow
def test_a_terminal_shows_a_line_for_each_side(run: Any) -> None:
    with run(*SMALL, "--max_steps=1000", terminal=True, TERM="xterm", COLUMNS="100") as both:
        printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", both.end())
    shown = re.findall(r"actor: [\d,]+[^\n]*\n(?:[^\n]*\r)?learner: [^\n]*", printed)
    assert shown, printed  # one below the other, many times over
    assert "evaluation return" in printed
