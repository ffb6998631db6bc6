"""This machine's own Ray: started where none runs, and alive until it is ended.

`ray start --head --block` runs in the background. All that it writes lies in one folder,
``edgeml-<uid>`` in ``$RAY_TMPDIR`` or ``/tmp`` (paths of sockets may not be long), which is gone
when it has been ended. It inherits a lock that it holds for as long as it lives; so its number is
never taken for that of another process, and one that was killed is never taken for alive.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from edgeml.core.errors import Unreachable
from edgeml.extras import load_ray
from edgeml.ray import cluster

__all__ = ["Machine", "connected", "end", "find", "start"]

_RAY = (sys.executable, "-u", "-m", "ray.scripts.scripts")
_BEAT = 0.05  # seconds between two looks
_TO_START = 120.0  # seconds; 4 with nothing else to do, 14 on a busy machine
_TO_END = 30.0  # seconds until it is killed


class Machine(NamedTuple):
    """This machine's Ray, which runs."""

    address: str
    given: Mapping[str, Any]  # what it was told that the machine has
    pid: int


def find() -> Machine | None:
    """Return this machine's Ray, or None where none runs that `start` has started."""
    _show_token()
    home = _home()
    return _running(home) if home.is_dir() else None


def start(given: Mapping[str, Any]) -> Machine:
    """Return this machine's Ray; start it where it doesn't run.

    Args:
        given: what this machine has, where Ray is not to find that out: `num_cpus`, `num_gpus`,
            `resources`, and `object_store_memory` in bytes.

    Raises:
        ValueError: it runs, and was given something else.
        Unreachable: it doesn't start; the text has the end of its log.
        ImportError: the extra `ray` is not installed.
    """
    _show_token()
    load_ray()
    with _locked(make=True) as home:
        running = _running(home)
        if running is None:
            _clear(home)
            return _start(home, given)
    if given and dict(given) != dict(running.given):
        raise ValueError(
            f"this machine's Ray was started with {dict(running.given) or 'all that it found'}, "
            f"and the file says {dict(given)}; end it with `edgeml down` first"
        )
    return running


def end() -> bool:
    """End this machine's Ray, and all that runs in it; leaves nothing behind.

    Returns:
        Whether there was one.
    """
    if not _home().is_dir():
        return False
    with _locked() as home:
        running = _running(home)
        if running is not None:
            _end(home, running.pid)
        shutil.rmtree(home)
    return running is not None


def _show_token() -> None:
    """Have this user's programs, and nobody else's, be let in by Ray, as where a program begins it.

    Ray reads this when it is imported, and without it an address is talked to without a token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def _home() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"edgeml-{os.getuid()}"


@contextmanager
def _locked(make: bool = False) -> Iterator[Path]:
    """Have the folder to oneself, for as long as the block runs."""
    home = _home()
    while True:
        if make:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            # What lies there says which process is ended: so it has to be this user's own.
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise PermissionError(
                    f"{home} belongs to somebody else, or others may write there; remove it, or "
                    "choose another place by RAY_TMPDIR"
                )
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is_still(fd, home):
                continue  # it was removed while this one waited
            yield home
            return
        finally:
            os.close(fd)


def _is_still(fd: int, home: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(home))
    return False


def _running(home: Path) -> Machine | None:
    """What the folder tells, if the process lives."""
    try:
        told = json.loads((home / "ray.json").read_text())
    except FileNotFoundError:
        return None
    return Machine(told["address"], told["given"], told["pid"]) if _is_alive(home) else None


def _is_alive(home: Path) -> bool:
    """Whether somebody holds the lock."""
    try:
        fd = os.open(home / "alive", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _clear(home: Path) -> None:
    """Remove what a Ray that was killed has left."""
    for path in home.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _start(home: Path, given: Mapping[str, Any]) -> Machine:
    command = [
        *(*_RAY, "start", "--head", "--block"),
        *("--port=0", f"--temp-dir={home / 'ray'}", "--include-dashboard=false"),
        *("--disable-usage-stats", "--dashboard-agent-listen-port=0", "--metrics-export-port=0"),
    ]
    for name, value in given.items():
        text = json.dumps(value) if name == "resources" else str(value)
        command.append(f"--{name.replace('_', '-')}={text}")
    env = {
        **os.environ,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # servers are drained before
    }
    _make_token(env)
    lock = os.open(home / "alive", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(home / "log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C here is not for it
                env=env,
            )
    finally:
        os.close(lock)
    told = home / "ray" / "ray_current_cluster"
    deadline = time.monotonic() + _TO_START
    try:
        while not (told.is_file() and (address := told.read_text().strip())):
            if process.poll() is not None or time.monotonic() > deadline:
                end = (home / "log").read_text(errors="replace")[-2000:].strip()
                raise Unreachable(f"Ray doesn't start on this machine; it said:\n{end}")
            time.sleep(_BEAT)
    except BaseException:
        _end(home, process.pid)
        process.wait()
        shutil.rmtree(home)
        raise
    machine = Machine(address, dict(given), process.pid)
    made = home / "ray.json.new"
    made.write_text(json.dumps(machine._asdict()))
    made.rename(home / "ray.json")
    process.returncode = 0  # it goes on by itself, and nobody here is to wait for it
    return machine


def _make_token(env: Mapping[str, str]) -> None:
    """Have Ray make the token by which it knows this user's programs, if there is none yet."""
    told = "RAY_AUTH_TOKEN" in env or "RAY_AUTH_TOKEN_PATH" in env
    there = told or (Path.home() / ".ray" / "auth_token").exists()
    if env["RAY_AUTH_MODE"] == "token" and not there:
        command = [*_RAY, "get-auth-token", "--generate"]
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True, timeout=60)


def _end(home: Path, pid: int) -> None:
    """End it; the reaper that Ray has beside it ends its processes, also where it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + _TO_END
        while _is_alive(home) and time.monotonic() < deadline:
            time.sleep(_BEAT)
        if not _is_alive(home):
            return
    raise TimeoutError(f"this machine's Ray, process {pid}, doesn't end")


@contextmanager
def connected(address: str, folder: Path | None = None) -> Iterator[None]:
    """Be a program of a Ray that runs, for as long as the block does; or of the one it is of now.

    Args:
        address: as `ray.init` takes it.
        folder: what is sent there along, in which servers run; None for nothing.

    Raises:
        Unreachable: nobody is there.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # who is told what is this program's affair
    env = {"working_dir": str(folder)} if folder is not None else None
    try:
        cluster.probe(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        ray.init(
            address=address,
            namespace=cluster.NAMESPACE,
            runtime_env=env,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise Unreachable(f"no Ray at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
