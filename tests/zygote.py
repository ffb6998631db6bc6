"""Starts Python programs in milliseconds, for a suite that starts hundreds of them.

Half a second goes into what a program of the tests imports, and most of that is other people's
packages. A process that has imported these, and nothing of edgeml, forks one that becomes the
program. It is `subprocess` that is made to ask for that, and to whoever waits for it the program is
a child process as any other.

What an interpreter does only at its start stays with it. So a program that has options but ``-u``,
another environment for Python, other limits, or anything else that is not ordinary, is started as
ever; `FRESH` is for one whose imports are what is tested.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FRESH = (sys.executable, "-W", "error")
"""Starts a program in an interpreter that has imported nothing yet."""

IMPORTED = ("asyncio", "cloudpickle", "grpc.aio", "msgspec", "numpy", "pluggy", "pytest", "zmq")
_AT_THE_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_")  # of a variable that is read
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_PACKET = 1 << 17  # bytes; the largest order
_SUBREAPER = 36  # of prctl: a process that takes in its descendants when their parents end


class Zygote:
    """Starts programs, from when it is installed until it is closed."""

    def __init__(self) -> None:
        self.pid = 0  # of the process that forks; it is started when the first program is
        self._orders: socket.socket | None = None
        self._lock = threading.Lock()
        # Since Python 3.11 it is looked up in the module itself.
        ours = hasattr(subprocess, "_fork_exec")
        self._place: Any = subprocess if ours else subprocess._posixsubprocess  # type: ignore[attr-defined]
        self._name = "_fork_exec" if ours else "fork_exec"
        self._as_ever = getattr(self._place, self._name)
        self._spawns = subprocess._USE_POSIX_SPAWN  # type: ignore[attr-defined]
        self._owner = os.getpid()
        self._ordinary: tuple[Any, ...] = ()
        self._surroundings: Any = None

    def install(self) -> None:
        """Have `subprocess` ask this one."""
        if sys.platform == "linux":
            setattr(self._place, self._name, self._fork_exec)
            subprocess._USE_POSIX_SPAWN = False  # type: ignore[attr-defined] # from 3.13 on, mostly

    def close(self) -> None:
        """Have `subprocess` start processes as ever, and end."""
        setattr(self._place, self._name, self._as_ever)
        subprocess._USE_POSIX_SPAWN = self._spawns  # type: ignore[attr-defined]
        if self._orders is not None:
            self._orders.close()
            os.waitpid(self.pid, 0)

    def _fork_exec(self, args: list[Any], executables: Any, *how: Any) -> int:
        """As `subprocess` calls what forks and executes; returns the process's id."""
        kept, cwd, env, tells = *how[1:4], how[11]
        variables = (
            dict(os.environ)
            if env is None
            else dict(os.fsdecode(each).split("=", 1) for each in env)  # type: ignore[misc]
        )
        order = _order_for([os.fsdecode(each) for each in args])
        if (
            order is not None
            and tuple(map(os.fsdecode, executables)) == (sys.executable,)
            and os.getpid() == self._owner  # else it was forked
            and (cwd is None or Path(os.fsdecode(cwd)).is_dir())
        ):
            with self._lock:
                if self._orders is None:
                    self._begin()
                if (kept, how[12:]) == ((tells,), self._ordinary) and (
                    self._surroundings == _surroundings(variables)
                ):
                    order["cwd"] = os.path.abspath(os.fsdecode(cwd or "."))
                    order["env"] = variables
                    order["deaf"] = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                    pipes = enumerate((how[4], how[7], how[9]))
                    ends = [end if end >= 0 else number for number, end in pipes]
                    with suppress(OSError, ValueError):  # it is too much to say, or gone
                        return self._ask(order, ends)
        return self._as_ever(args, executables, *how)  # type: ignore[no-any-return]

    def _begin(self) -> None:
        """Start the process, and note what is ordinary about that."""

        def note(*how: Any) -> int:
            self._ordinary = how[14:]
            return self._as_ever(*how)  # type: ignore[no-any-return]

        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setattr(self._place, self._name, note)
        try:
            with theirs:
                started = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=theirs,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
        finally:
            setattr(self._place, self._name, self._fork_exec)
        self.pid, started.returncode = started.pid, 0  # `close` waits for it
        self._surroundings = _surroundings(dict(os.environ))

    def _ask(self, order: dict[str, Any], ends: list[int]) -> int:
        assert self._orders is not None
        packet = json.dumps(order).encode()
        if len(packet) > _PACKET:
            raise OSError
        libc = ctypes.CDLL(None)
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._orders, [packet], ends)
            return int(self._orders.recv(_PACKET))
        finally:
            libc.prctl(_SUBREAPER, 0, 0, 0, 0)


def _order_for(words: list[str]) -> dict[str, Any] | None:
    """What the command says; None if the program has to be started as ever."""
    python, *rest = words
    unbuffered = rest[:1] == ["-u"]
    rest = rest[unbuffered:]
    if python != sys.executable or not rest:
        return None
    if rest[0] in ("-c", "-m"):
        return {"kind": rest[0], "argv": rest[1:], "unbuffered": unbuffered}
    if rest[0].startswith("-") or not rest[0].endswith(".py"):
        return None
    return {"kind": "file", "argv": rest, "unbuffered": unbuffered}


def _surroundings(env: Mapping[str, str]) -> Any:
    """All that a process has from the one that starts it, and that isn't passed on anew."""
    status = Path("/proc/thread-self/status").read_text()
    return (
        {k: v for k, v in env.items() if k.startswith(_AT_THE_START) and k != "PYTHONPATH"},
        [resource.getrlimit(limit) for limit in _LIMITS],
        [line for line in status.splitlines() if line.startswith(("Umask:", "Cpus_allowed:"))],
        [os.stat(f"/proc/thread-self/ns/{kind}").st_ino for kind in ("net", "user")],
    )


# The process that forks ---------------------------------------------------------------------


def serve(orders: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Start a process for each order; returns in that process, with the order and its pipes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # those that it starts have it, if any
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        packet, ends, _, _ = socket.recv_fds(orders, _PACKET, 3)
        if not packet:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                for each in (told, tell):
                    os.close(each)
                orders.close()
                return json.loads(packet), ends
            os.write(tell, str(pid).encode())
            os._exit(0)  # whereupon the process is the child of who asked
        for each in (tell, *ends):
            os.close(each)
        os.waitpid(between, 0)
        with os.fdopen(told, "rb") as pid_:
            orders.send(pid_.read())


def become(order: dict[str, Any], ends: list[int]) -> None:
    """Be the program that an order names, as an interpreter that was started with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if order["deaf"] else signal.default_int_handler)
    for number, end in enumerate(ends):
        os.dup2(end, number)
    for end in ends:
        os.close(end)
    os.chdir(order["cwd"])
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [each for each in sys.path[1:] if each not in inherited]
    os.environ.clear()
    os.environ.update(order["env"])
    mine = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = list(dict.fromkeys([*(os.path.abspath(each) for each in mine if each), *path]))
    importlib.invalidate_caches()
    _open_files(order["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED")))
    kind, (name, *_) = order["kind"], order["argv"]
    sys.argv = list(order["argv"])
    if kind == "-m":
        sys.path[:] = [os.getcwd(), *path]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv[0] = "-c"
        sys.path[:] = ["", *path]
        code = compile(name, "<string>", "exec", dont_inherit=True)
    else:
        main.__file__ = os.path.abspath(name)
        sys.path[:] = [os.path.dirname(os.path.realpath(name)), *path]
        code = compile(Path(name).read_bytes(), main.__file__, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _open_files(unbuffered: bool) -> None:
    """Open the standard files as an interpreter does at its start."""
    encodings = [(file.encoding, file.errors) for file in (sys.stdin, sys.stdout, sys.stderr)]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, buffering = ("wb", 0 if unbuffered else -1) if number else ("rb", -1)
        raw = open(number, mode, buffering, closefd=False)  # noqa: SIM115 - while it lives
        file = io.TextIOWrapper(
            raw,
            *encodings[number],
            line_buffering=number == 2 or raw.isatty(),
            write_through=bool(number) and unbuffered,
        )
        file.mode = mode[0]  # type: ignore[attr-defined]
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


if __name__ == "__main__":
    become(*serve(socket.socket(fileno=os.dup(0))))
