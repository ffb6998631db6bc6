"""The tools that hold the style; as tests, so that nobody has to remember them."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pairs import ROOT


@pytest.mark.timeout(300)  # mypy knows nothing of a fresh checkout yet
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
        timeout=280,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tests_ask_servers_and_clients_for_what_is_public():
    inside = re.compile(r"\._(server|client)\.")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        # But for the one function there that tells what state a client's connection is in.
        if inside.search(line) and path not in (Path(__file__), ROOT / "tests" / "pairs.py")
    ]
    assert not found, "\n".join(found)


def test_no_two_files_of_tests_have_one_name():
    """Where they have, pytest imports one of them and leaves the other out."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
