"""What every test is held to: it leaves no thread, no child process and no temporary file."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PATIENCE = 3.0  # seconds that what a test has ended may take to be gone


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not is_a_librarys(t)}


def is_a_librarys(thread: threading.Thread) -> bool:
    """Whether it is one that pyzmq or grpc.aio keeps for the whole process."""
    return type(thread).__name__ == "GarbageCollectorThread" or "_poll_wrapper" in thread.name


def _children() -> dict[int, str]:
    """Processes that this one started and has not waited for; empty where /proc is missing."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # mostly there is none, and no need to read all of /proc
        return {}
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        if int(rest.split()[1]) == os.getpid():
            # multiprocessing's own, which lives as long as this process.
            command = (entry.parent / "cmdline").read_bytes()
            if b"resource_tracker" not in command:
                found[int(entry.parent.name)] = name.partition("(")[2]
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
    threads, children, files = _threads(), _children(), set(_temporary.iterdir())
    yield
    deadline = time.monotonic() + _PATIENCE
    while True:
        left = {
            "threads": [thread.name for thread in _threads() - threads],
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
