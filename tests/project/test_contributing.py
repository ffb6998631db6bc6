"""What the guides build in an afternoon, as it stands: installed, and held to the suites."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pairs import ROOT

GUIDES = ROOT / "docs" / "guides"


def files_of(guide: str) -> dict[str, str]:
    """The files that a page shows, by name."""
    text = (GUIDES / f"{guide}.md").read_text()
    return dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", text, re.DOTALL))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run(where: Path, *arguments: str | Path, path: Path | None = None) -> str:
    places = [str(path)] if path else []
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=where,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*places, str(ROOT)]),
            "MYPYPATH": str(ROOT),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check(where: Path, *names: str) -> None:
    """Check format and types, as the checkout's are, and with what mypy once found out of it."""
    run(where, "ruff", "format", "--check", "--line-length=100", *names)
    known = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    run(where, "mypy", "--strict", *known, *names)


@pytest.mark.timeout(300)  # it is a suite of a hundred tests
@pytest.mark.parametrize(
    ("guide", "module", "test"),
    [
        pytest.param(
            "write-a-transport", "edgeml_tcp.py", "tests/test_tcp.py", marks=pytest.mark.slow
        ),
        pytest.param(
            "write-a-door", "edgeml_lines.py", "tests/test_lines.py", marks=pytest.mark.slow
        ),
        pytest.param(
            "write-a-resolver", "edgeml_listed.py", "tests/test_listed.py", marks=pytest.mark.slow
        ),
        ("write-a-codec", "edgeml_zlib.py", "tests/test_zlib.py"),
    ],
)
def test_the_package_of_an_afternoon_passes_the_suite(
    guide: str, module: str, test: str, tmp_path: Path
) -> None:
    files = files_of(guide)
    assert sorted(files) == sorted([module, "pyproject.toml", test])
    package, site = tmp_path / "package", tmp_path / "site"
    write(package, files)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(package, "pip", "install", *offline, "--target", site, ".")
    pytest_ = ["pytest", "-q", "-W", "error", f"--basetemp={tmp_path / 'temporary'}"]
    printed = run(tmp_path, *pytest_, package / "tests", path=site)
    assert re.search(r"\d passed", printed), printed
    check(package, module)


def test_the_store_passes_the_suite(tmp_path: Path) -> None:
    files = files_of("write-a-store")
    assert sorted(files) == ["recent.py", "test_recent.py"]
    write(tmp_path, files)
    pytest_ = ["pytest", "-q", "-W", "error", f"--basetemp={tmp_path / 'temporary'}"]
    printed = run(tmp_path, *pytest_, "test_recent.py")
    assert re.search(r"\d\d passed", printed), printed
    check(tmp_path, "recent.py")
