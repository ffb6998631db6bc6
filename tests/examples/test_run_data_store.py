"""The data store example, in one process and in several."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from example_program import Example

LOST_NOTHING = r"nothing lost: inserted (\d+) == received (\d+)"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return partial(Example, "run_data_store.py", cwd=tmp_path)


@pytest.mark.parametrize("transport", ["zmq", "inproc"])
def test_one_process(run: Any, transport: str) -> None:
    arguments = ("--transport", transport, "--port", 0, "--steps", 2000, "--rate", 0)
    with run(*arguments) as both:
        assert both.until(r"(\d+) networks came back, with loss [\d.]+")[1] != "0"
        assert both.until(LOST_NOTHING)[1] == "2000"
        both.end()


def test_two_actors_feed_one_learner_and_lose_nothing(run: Any) -> None:
    with run("--server", "--port", 0) as server:
        arguments = ("--client", "--port", server.port(), "--steps", 3000, "--rate", 0)
        with run(*arguments) as first, run(*arguments) as second:
            for actor in (first, second):
                assert actor.until(LOST_NOTHING)[2] == "3000"
                actor.end()
        server.interrupt()
        printed = server.end()
    assert len(re.findall(r"received 3000 transitions from actor \d+", printed)) == 2


def test_ctrl_c_sends_what_there_is(run: Any) -> None:
    with run("--port", 0, "--steps", 1_000_000) as both:
        both.until(r"network [1-9]")
        both.interrupt()
        match = both.until(LOST_NOTHING)
        assert int(match[1]) == int(match[2]) > 0
        both.end()


def test_an_actor_waits_for_its_learner_and_ctrl_c_ends_that(run: Any) -> None:
    with run("--client", "--port", 1) as actor:
        actor.until(r"nobody answers .*; waiting for up to 60 s: start run_data_store\.py --server")
        actor.interrupt()
        actor.end()


def test_a_learner_thread_that_dies_ends_the_run_with_its_error(run: Any) -> None:
    failing = """
import edgeml.data
def fail(*arguments):
    raise OSError("no memory, say")
edgeml.data.ReplayBuffer.sample = fail
"""
    with run("--port", 0, "--steps", 1_000_000, before=failing) as both:
        assert both.end(code=1).endswith("error: no memory, say\n")


def test_an_actor_whose_learner_is_gone_says_so_while_its_queue_is_full(run: Any) -> None:
    with run("--server", "--port", 0) as server:
        server.until("for this machine only: --host 0.0.0.0 lets others in")
        port = int(re.search(r":(\d+)", server.printed)[1])  # type: ignore[index]
        with run("--client", "--port", port, "--steps", 1_000_000, "--rate", 0) as actor:
            actor.until(r"network [1-9]")
            server.kill()
            actor.until(r"actor: the queue is full; waiting for a learner for \d+ s")
            actor.interrupt()
            assert "error: " in actor.end(code=1)  # much was never sent


def test_help(run: Any) -> None:
    with run("--help") as help:
        printed = help.end()
    for option in ("--server", "--client", "--ip", "--host", "--port", "--transport", "--steps"):
        assert option in printed
