"""The transport that CONTRIBUTING.md shows, as it stands: installed, and held to the suite."""

import os
import re
import subprocess
import sys
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))


def run(where: Path, *arguments: str | Path, path: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(path or "")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_transport_of_an_afternoon_passes_the_suite(tmp_path: Path) -> None:
    assert sorted(FILES) == ["edgeml_tcp.py", "pyproject.toml", "tests/test_tcp.py"]
    package, site = tmp_path / "edgeml-tcp", tmp_path / "site"
    (package / "tests").mkdir(parents=True)
    for name, text in FILES.items():
        (package / name).write_text(text)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(package, "pip", "install", *offline, "--target", site, ".")
    printed = run(tmp_path, "pytest", "-q", "-W", "error", package / "tests", path=site)
    assert re.search(r"\d\d passed", printed), printed
    for check in (["ruff", "format", "--check", "--line-length=100"], ["mypy", "--strict"]):
        run(package, *check, "edgeml_tcp.py")
