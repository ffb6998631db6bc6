"""Each merging choice tracks as well as LeRobot's behaviour of its kind, and misses no tick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pairs import ROOT

EQUAL = 1.005  # a ratio up to which two errors are the same


def compare(path: Path, *arguments: str) -> dict[str, dict[str, float]]:
    subprocess.run(
        [sys.executable, "benchmarks/control.py", *arguments, "--json", str(path)],
        cwd=ROOT,
        check=True,
        timeout=590,
        stdout=subprocess.DEVNULL,
    )
    results: dict[str, dict[str, float]] = json.loads(path.read_text())["results"]
    return results


def kinds_of(results: dict[str, dict[str, float]]) -> list[str]:
    return [name.removesuffix(", ours") for name in results if name.endswith(", ours")]


def check(results: dict[str, dict[str, float]]) -> None:
    compared = 0
    for kind in kinds_of(results):
        ours, theirs = results[f"{kind}, ours"], results.get(f"{kind}, theirs")
        assert ours["half_ms"] == 0, f"{kind}: a gripper was averaged"
        if theirs is not None:
            compared += 1
            assert ours["error_mrad"] <= EQUAL * theirs["error_mrad"], kind
            assert ours["pauses"] <= theirs["pauses"], kind
    assert compared >= 7


def test_no_choice_tracks_worse_or_pauses_more_than_a_behaviour_of_its_kind(tmp_path: Path) -> None:
    """At 50 Hz, with 100 ms of inference and a link of 30 ms +- 20 either way."""
    results = compare(
        tmp_path / "figures.json", "--seconds", "20", "--seeds", "2", "--weathers", "jitter"
    )

    check(results)
    for kind in kinds_of(results):  # no answer was lost, so there was always one to play
        assert results[f"{kind}, ours"]["pauses"] == 0, kind


@pytest.mark.slow
def test_nor_where_the_link_stalls_or_answers_are_lost(tmp_path: Path) -> None:
    results = compare(
        tmp_path / "figures.json",
        "--seconds",
        "60",
        "--seeds",
        "10",
        "--weathers",
        "spikes",
        "lost",
    )

    check(results)


def test_figures_are_the_same_each_time(tmp_path: Path) -> None:
    def once(name: str) -> dict[str, dict[str, float]]:
        return compare(
            tmp_path / name,
            *("--seconds", "4", "--seeds", "1", "--weathers", "bad"),
            *("--kinds", "aligned", "real-time chunking", "average"),
        )

    assert once("one.json") == once("other.json")


# In real time -----------------------------------------------------------------------------


def check_ticks(results: dict[str, dict[str, float]], choices: int, held: int) -> None:
    assert len(results) == choices
    for name, row in results.items():
        assert row["held"] <= held, f"{name}: steps were held up; {row}"
        if row["failed"] == 0:  # or there was a fault: the server had no core for half a second
            assert row["empty"] == 0, f"{name}: nothing to play; {row}"


@pytest.mark.parametrize("transport", ["zmq", "shm", "grpc"])
def test_steps_never_wait_for_the_network(tmp_path: Path, transport: str) -> None:
    """Waits would show a hundred times. Other tests keep the cores from these processes, too."""
    choices = ["aligned", "Blend(5)", "Ensemble(log 0.5)", "RealTime()"]
    results = compare(
        tmp_path / "figures.json",
        *("--real", "--seconds", "20", "--refill", "0.9"),
        *("--transports", transport, "--merges", *choices),
    )

    check_ticks(results, len(choices), held=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["zmq", "shm", "grpc"])
def test_no_tick_is_missed_in_five_minutes(tmp_path: Path, transport: str) -> None:
    """Of 15,000, on a machine that does nothing else."""
    results = compare(
        tmp_path / "figures.json", *("--real", "--seconds", "300", "--transports", transport)
    )

    check_ticks(results, 8, held=0)
