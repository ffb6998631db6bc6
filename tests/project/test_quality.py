"""The tools that hold the style; as tests, so that nobody has to remember them."""

import subprocess
import sys

import pytest

from pairs import ROOT


@pytest.mark.parametrize(
    "command",
    [
        ("mypy",),
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "edgeml", "tests", "benchmarks", "examples"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_checkout_passes(command):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
