"""The control loop example: every way to merge chunks, and an operator who takes the arm."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from example_program import Example

CHOICES = ("zero delay", "append", "aligned", "blend", "ensemble", "real-time")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return partial(Example, "control_loop.py", cwd=tmp_path)


def errors_of(printed: str) -> dict[str, float]:
    """What the table says of each choice: mrad."""
    return {
        name.strip(): float(error)
        for name, error in re.findall(r"^([a-z][a-z ,-]{17}) +([\d.]+) +", printed, re.MULTILINE)
    }


def taken_of(printed: str) -> float:
    """For how many seconds the operator had the arm."""
    match = re.search(r"^blend, taken over .* ([\d.]+)\r?$", printed, re.MULTILINE)
    assert match is not None, printed
    return float(match[1])


def test_a_policy_that_takes_time_and_one_that_does_not_and_a_takeover(run: Any) -> None:
    with run("--seconds", 0.6, "--choices", "zero delay", "aligned") as both:
        printed = both.end()
    errors = errors_of(printed)
    assert list(errors) == ["zero delay", "aligned", "blend, taken over"]
    assert 0 < errors["zero delay"] < errors["aligned"]
    assert taken_of(printed) > 0


@pytest.mark.slow
def test_all_choices_and_a_picture(run: Any, tmp_path: Path) -> None:
    with run("--seconds", 3, "--plot_path", "loop.png") as both:
        printed = both.end()
    errors = errors_of(printed)
    assert list(errors) == [*CHOICES, "blend, taken over"]
    assert all(0 < error < 1000 for error in errors.values())
    assert errors["zero delay"] == min(errors.values())
    assert 0.5 < taken_of(printed) < 2.5
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_robot_and_a_policy_in_two_processes(run: Any) -> None:
    with run("--server", "--port", 0, "--delay", 0.05, "--jitter", 0.02) as server:
        arguments = ("--client", "--port", server.port(), "--takeover", "none")
        with run(*arguments, "--seconds", 0.5, "--choices", "aligned") as client:
            assert list(errors_of(client.end())) == ["aligned"]
        server.until(r"chunks: [1-9]")
        server.interrupt()
        server.end()


@pytest.mark.slow
def test_ctrl_c_tells_of_the_turns_that_there_were(run: Any) -> None:
    with run("--seconds", 1, "--choices", "aligned", "blend") as both:
        both.until(r"blend: ")
        both.interrupt()
        assert list(errors_of(both.end())) == ["aligned"]


@pytest.mark.slow
def test_at_the_keyboard_one_takes_the_arm_and_gives_it_back(run: Any) -> None:
    arguments = ("--takeover", "keyboard", "--choices", "zero delay", "--seconds", 1.5)
    with run(*arguments, terminal=True, COLUMNS="200") as both:
        both.until("space takes the arm")
        both.until("chunk")
        both.press(" w")
        both.until("taken")
        both.press(" ")
        assert 0 < taken_of(both.end()) < 2


def test_the_keyboard_needs_a_terminal(run: Any) -> None:
    with run("--takeover", "keyboard") as both:
        assert "--takeover keyboard needs a terminal" in both.end(code=1)
