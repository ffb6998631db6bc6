"""Every end of every kind, in every way and at every moment: nothing hangs, and nothing is left.

Each case is a process of its own. The suite runs a few of them; `pytest -m slow tests/ends` all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ending_program as program
from edgeml import EdgemlError
from edgeml.testing.stopwatch import Stopwatch
from pairs import TRANSPORTS, started

BOUND = 12.0  # seconds that an end may take; the longest that is told of is three, of two ends
SLOWNESS = 12.0  # that many times what the program took to begin, where the machine is slow
SIGNALS = {
    "SIGINT": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
}
HOWS = ("stop", "drop", "exit", "raise", "callback", "fork", "multiprocessing", *SIGNALS)
MOMENTS = {
    "action": ("idle", "call", "broadcast", "start"),
    "inference": ("idle", "call", "start"),
    "trainer": ("idle", "call", "upload", "broadcast", "start"),
}
CLEAN = {"exit": 0, "raise": 1}
"""Exit codes, where they aren't 0 or a signal's."""


class Case(NamedTuple):
    transport: str
    role: str
    pair: str
    how: str
    moment: str


def is_a_case(case: Case) -> bool:
    if case.moment == "start":  # where it can be ended from outside, or by not being waited for
        return case.how in ("exit", *SIGNALS)
    if case.how == "callback":  # of which there is one
        return case.moment == "broadcast" if case.role == "client" else case.moment == "call"
    return True


CASES = [
    case
    for transport, role, pair, how in itertools.product(
        TRANSPORTS, ("server", "client"), MOMENTS, HOWS
    )
    for moment in MOMENTS[pair]
    if is_a_case(case := Case(transport, role, pair, how, moment))
]


@contextlib.contextmanager
def peer(case: Case) -> Iterator[Any]:
    """The server that a client under test has, in this process; None for others."""
    if case.role == "server" or case.transport == "inproc":
        yield None
        return
    free = threading.Event()
    server = program.make_server(
        case.pair, case.transport, lambda: {"cam": free.wait(program.HELD)} and {"cam": 1}
    )
    with started(server):
        if case.moment == "broadcast":

            def keep_publishing() -> None:
                while not free.wait(0.01):
                    program.publish(case.pair, server)

            thread = threading.Thread(target=keep_publishing)
            thread.start()
        try:
            yield server
        finally:
            free.set()
            if case.moment == "broadcast":
                thread.join()


@contextlib.contextmanager
def guest(case: Case, url: str) -> Iterator[None]:
    """A client of the server under test, in this process, at what the moment says."""
    client = program.Client(case.pair, url)
    work = {"call": client.call, "upload": getattr(client, "upload", None)}.get(case.moment)
    thread = None

    def run() -> None:
        with contextlib.suppress(EdgemlError):
            while work:
                work()

    if case.moment == "broadcast":
        client.subscribe(lambda value: None)
    elif work is not None:
        thread = threading.Thread(target=run, name="guest's")
        thread.start()
    try:
        yield
    finally:
        client.stop()
        if thread is not None:
            thread.join(10)
            assert not thread.is_alive(), "a call outlives its server and its client"


def run(case: Case, home: Path) -> None:
    """Bring one end to its end, and see that it is one."""
    env = {**os.environ, "TMPDIR": str(home), "PYTHONFAULTHANDLER": "1"}
    spec: dict[str, Any] = {**case._asdict()}
    if case.how in SIGNALS:
        spec["how"] = "wait"
    shared = set(os.listdir("/dev/shm"))
    with peer(case) as server:
        if server is not None:
            spec["url"] = server.url
        child = subprocess.Popen(
            [sys.executable, "-u", program.__file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        timer = threading.Timer(300.0, child.kill)  # it hangs
        timer.start()
        try:
            said, errors = bring_to_its_end(case, child)
        finally:
            timer.cancel()
            child.kill()
            child.communicate()
    text = f"{said}\n{errors}"
    allowed = {0, CLEAN.get(case.how, 0)}
    if case.how in SIGNALS:
        allowed |= {-SIGNALS[case.how], -signal.SIGINT, 1}
    assert child.returncode in allowed, f"exit code {child.returncode}: {text}"
    for bad in ("Fatal Python error", "Exception ignored", "Exception in thread", "never amid"):
        assert bad not in text, text
    if case.how not in ("raise", *SIGNALS):
        assert "Traceback" not in errors or case.how == "callback", text
    elif "Traceback" in errors:
        # Behind it there may be what the log says while all of it is stopped.
        expected = "LookupError" if case.how == "raise" else "KeyboardInterrupt"
        assert errors.count("Traceback") == 1, text
        assert any(line.startswith(expected) for line in errors.splitlines()), text
    for line in said:
        if line.startswith("left"):
            assert json.loads(line.partition(" ")[2]) == [], text
        if line.startswith("child"):
            assert line == "child 0", text
    if case.how in ("stop", "drop") and case.moment != "start":
        assert said[-1].startswith("left"), text
    assert list(home.iterdir()) == []
    ours = {name for name in set(os.listdir("/dev/shm")) - shared if "edgeml" in name}
    assert not ours


def bring_to_its_end(case: Case, child: subprocess.Popen[str]) -> tuple[list[str], str]:
    assert child.stdout is not None
    assert child.stdin is not None
    said: list[str] = []

    def read(until: str) -> str:
        for line in child.stdout or ():
            said.append(line.strip())
            if line.startswith(until):
                return line.strip().partition(" ")[2]
        return ""

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        read("starting")
        bound = max(BOUND, SLOWNESS * (time.monotonic() - began))
        watch = Stopwatch(child.pid)
        if case.moment == "start":
            if case.how in SIGNALS:
                time.sleep(
                    0.3 * (zlib.crc32(name_of(case).encode()) % 8) / 8
                )  # somewhere on the way
                child.send_signal(SIGNALS[case.how])
        else:
            if case.role == "server":
                url = read("at")
                if case.transport != "inproc":
                    stack.enter_context(guest(case, url))
            read("ready")
            watch = Stopwatch(child.pid)
            if case.how in SIGNALS:
                child.send_signal(SIGNALS[case.how])
            else:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write("\n")
                    child.stdin.flush()
        rest, errors = child.communicate()
        seconds = watch.seconds
    said += rest.splitlines()
    assert seconds < bound, f"it took {seconds:.1f} s: {said}\n{errors}"
    return said, errors


def name_of(case: Case) -> str:
    return "-".join(case)


SELECTED = CASES[::83]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", SELECTED, ids=name_of)
def test_an_end_ends(case, tmp_path):
    run(case, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_end_ends(case, tmp_path):
    run(case, tmp_path)
