"""What every test is held to: it leaves no thread, no child process and no temporary file.

And the plugins of this repository are made to look installed, here and in child processes, so that
the tests of the services run over them too; tests/plugins/test_third_party.py really installs them.
"""

import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pairs import ROOT, TRANSPORTS, threads

# How long an example takes, or making it, tells of the machine.
settings.register_profile("edgeml", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgeml")

RAY = ROOT / "tests" / "ray"

_added = pytest.StashKey[tuple[Path, list[str], str | None]]()


def pytest_configure(config: pytest.Config) -> None:
    """Put the plugins on the path, with what an installer would have written about them."""
    site = Path(tempfile.mkdtemp(prefix="plugins-for-edgeml-"))
    added = [str(site)]
    for file in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        added.append(str(file.parent))
        _describe(tomllib.loads(file.read_text())["project"], site)
    # What one process of hundreds has compiled, the others need not.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Nor what hypothesis works out, which takes it seconds wherever it begins anew.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".hypothesis"))
    # Some set it where tests run; then what a program prints comes in pieces, as nobody sees it.
    os.environ.pop("PYTHONUNBUFFERED", None)
    config.stash[_added] = site, added, os.environ.get("PYTHONPATH")
    sys.path += added
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *added]))


def _describe(project: dict[str, Any], site: Path) -> None:
    """Write a distribution's name, version and entry points where Python looks for them."""
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in entries.items())
            for group, entries in project.get("entry-points", {}).items()
        )
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    site, added, path = config.stash[_added]
    sys.path[:] = [each for each in sys.path if each not in added]
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    shutil.rmtree(site)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one process run all that needs Ray, as each would start its own.

    What comes first is given to one process, which does it first, and others take from the end.
    """
    items.sort(key=lambda item: RAY not in item.path.parents)


def pytest_collection_finish() -> None:
    """Have each `gc.collect()` of a test look at what came since, and not at ten thousand tests."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the suite among processes; files that are named, and the long runs, need no other."""
    named = [Path(name.partition("::")[0]) for name in config.option.file_or_dir]
    alone = [path for path in named if path.is_dir() and path.resolve() != RAY]
    if config.option.markexpr == "slow" or (named and not alone):
        return 0
    return min(2 * (os.cpu_count() or 1), 8)  # half of the time they wait


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let every report reach the process that prints it, which takes no lone surrogates."""
    return _printable((yield))


def _printable(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {_printable(key): _printable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(_printable, data))
    return data


_PATIENCE = 10.0  # seconds that what a test has ended may take to be gone


def _children() -> dict[int, str]:
    """Processes that this one started and has not waited for; empty where /proc is missing."""
    found = {}
    for pid in _pids():
        entry = Path(f"/proc/{pid}")
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(")")
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        # multiprocessing's own lives as long as this process.
        if int(rest.split()[1]) == os.getpid() and b"resource_tracker" not in command:
            found[pid] = name.partition("(")[2]
    return found


def _pids() -> set[int]:
    """Of all that may be children of this process."""
    found: set[int] = set()
    try:
        for task in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError), open(f"/proc/self/task/{task}/children") as file:
                found.update(map(int, file.read().split()))
    except FileNotFoundError:  # not every system tells; then all that there are
        return {int(entry.name) for entry in Path("/proc").glob("[0-9]*")}
    return found


@pytest.fixture(scope="session")
def _temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for temporary files that no other process writes to."""
    path = tmp_path_factory.mktemp("temporary")
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(path)
    yield path
    tempfile.tempdir = before[0]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_temporary: Path) -> Iterator[None]:
    running, children, files = threads(), _children(), set(_temporary.iterdir())
    yield
    deadline = time.monotonic() + _PATIENCE
    while True:
        left = {
            "threads": [thread.name for thread in threads() - running],
            "processes": [f"{p} {n}" for p, n in _children().items() if p not in children],
            "files": [str(path) for path in set(_temporary.iterdir()) - files],
        }
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in left.items() if names)
    pytest.fail(f"the test left behind {said}", pytrace=False)


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables by which a program takes what another has compiled by JAX: most of its work."""
    where = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        where = where.parent  # which is all workers'
    where = where / "compiled"
    where.mkdir(exist_ok=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(where),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """The transport that a test of the services runs over: each in turn."""
    return request.param


@pytest.fixture
def connected(request):
    """An echoing endpoint of the module's transport, and a connection to it."""
    transport, anywhere = request.module.transport, request.module.ANYWHERE
    with (
        transport.serve(anywhere, lambda message, reply: reply(message)) as endpoint,
        transport.connect(endpoint.url, 20) as requester,
    ):
        yield endpoint, requester


@pytest.fixture
def parking(request):
    """An endpoint that keeps every request in a list, with that, and a connection to it."""
    transport, anywhere = request.module.transport, request.module.ANYWHERE
    taken = []
    with (
        transport.serve(
            anywhere, lambda message, reply: taken.append((message, reply))
        ) as endpoint,
        transport.connect(endpoint.url, 20) as requester,
    ):
        yield endpoint, requester, taken
