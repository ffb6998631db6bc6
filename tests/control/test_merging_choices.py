"""Each merging choice tracks as well as LeRobot's behaviour of its kind."""

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
        timeout=280,
        stdout=subprocess.DEVNULL,
    )
    results: dict[str, dict[str, float]] = json.loads(path.read_text())["results"]
    return results


def kinds_of(results: dict[str, dict[str, float]]) -> list[str]:
    return [name.removesuffix(", ours") for name in results if name.endswith(", ours")]


def check(results: dict[str, dict[str, float]], kinds: int) -> None:
    compared = 0
    for kind in kinds_of(results):
        ours, theirs = results[f"{kind}, ours"], results.get(f"{kind}, theirs")
        assert ours["half_ms"] == 0, f"{kind}: a gripper was averaged"
        if theirs is not None:
            compared += 1
            assert ours["error_mrad"] <= EQUAL * theirs["error_mrad"], kind
            assert ours["pauses"] <= theirs["pauses"], kind
    assert compared == kinds


def test_no_choice_tracks_worse_or_pauses_more_than_a_behaviour_of_its_kind(tmp_path: Path) -> None:
    """At 50 Hz, with 100 ms of inference and a link of 30 ms +- 20 either way."""
    results = compare(
        tmp_path / "figures.json", "--seconds", "20", "--seeds", "2", "--weathers", "jitter"
    )

    check(results, 8)
    for kind in kinds_of(results):  # no answer was lost, so there was always one to play
        assert results[f"{kind}, ours"]["pauses"] == 0, kind


@pytest.mark.slow
def test_nor_where_the_link_stalls_or_answers_are_lost(tmp_path: Path) -> None:
    results = compare(
        tmp_path / "figures.json",
        *("--seconds", "60", "--seeds", "6", "--weathers", "spikes", "lost"),
        *("--kinds", "append", "aligned", "blended", "real-time chunking"),
    )

    check(results, 8)  # four in either weather


@pytest.mark.slow
def test_figures_are_the_same_each_time(tmp_path: Path) -> None:
    def once(name: str) -> dict[str, dict[str, float]]:
        return compare(
            tmp_path / name,
            *("--seconds", "4", "--seeds", "1", "--weathers", "bad"),
            *("--kinds", "aligned", "real-time chunking", "average"),
        )

    assert once("one.json") == once("other.json")
