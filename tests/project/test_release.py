"""What is released: the library, and nothing that happens to lie beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgeml import __version__
from pairs import ROOT

NAME = f"edgeml_robotics-{__version__}"
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
# What a run or a user leaves in a checkout: keys, tokens, settings, traces.
STRAYS = [
    *("edgeml/keys/ca.key", "edgeml/keys/clients/robot/token", "edgeml/cert.pem", "edgeml/.env"),
    *("keys/curve.secret", ".env", "id_ed25519", ".netrc", "core.1234", "edgeml/notes.md"),
    *("edgeml/core/heap.prof", "edgeml/__pycache__/aio.cpython-310.pyc", "runs/log.txt"),
]


def build(project: Path, where: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel of a project."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "-d",
            str(where),
            "-t",
            "sdist",
            "-t",
            "wheel",
        ],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = where.glob("*.tar.gz"), where.glob("*.whl")
    return sdist, wheel


def names_in(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return set(opened.namelist())
    with tarfile.open(archive) as opened:
        assert all(member.isfile() for member in opened), "a link may lead anywhere"
        return {member.name.partition("/")[2] for member in opened}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both distributions, built from a copy of this tree in which more lies than should go out."""
    place = tmp_path_factory.mktemp("release")
    tree = place / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
    )
    for stray in STRAYS:
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_text("secret")
    return build(tree, place / "dist")


@pytest.fixture(scope="module")
def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "edgeml").rglob("*.py")}


def test_a_wheel_holds_the_library_alone(released: tuple[Path, Path], modules: set[str]) -> None:
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    expected = {*modules, "edgeml/py.typed", *(f"{NAME}.dist-info/{name}" for name in about)}
    assert names_in(released[1]) == expected


def test_a_source_distribution_holds_what_the_wheel_is_built_from(
    released: tuple[Path, Path], modules: set[str]
) -> None:
    about = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"}
    assert names_in(released[0]) == {*modules, "edgeml/py.typed", *about, ".gitignore"}


def test_the_source_distribution_builds_the_same_wheel(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    sdist, wheel = released
    shutil.unpack_archive(sdist, tmp_path)
    _, again = build(tmp_path / NAME, tmp_path / "dist")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_wheel_runs_from_where_it_is_unpacked(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.unpack_archive(released[1], tmp_path, "zip")
    done = subprocess.run(
        [sys.executable, "-m", "edgeml", "--version"],
        cwd=tmp_path,  # the first place where it is looked for
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"edgeml {__version__}\n"), done.stderr


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugins_wheel_holds_its_modules_alone(plugin: Path, tmp_path: Path) -> None:
    tree = tmp_path / plugin.name
    shutil.copytree(plugin, tree, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "token").write_text("secret")
    (tree / "tests").mkdir(exist_ok=True)
    (tree / "tests" / "key.pem").write_text("secret")
    sdist, wheel = build(tree, tmp_path / "dist")
    modules = {str(path.relative_to(plugin)) for path in plugin.rglob("*.py")}
    modules = {name for name in modules if not name.startswith("tests/")}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == modules
    assert names_in(sdist) <= {*modules, "README.md", "pyproject.toml", "PKG-INFO"}
