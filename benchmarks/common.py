"""What the benchmarks share: child processes, interleaved rounds, ratios, tables and files."""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Row = dict[str, float]
"""Figures by name."""

PAGE = 4096
_SETTLE = 0.5  # seconds that all clients call before a round counts
_PR_SET_PDEATHSIG = 1
_SPAWN = multiprocessing.get_context("spawn")


def pipe() -> tuple[Connection, Connection]:
    """A reading and a writing end, which may be given to children."""
    return _SPAWN.Pipe(duplex=False)


def transports() -> list[str]:
    """Those of edgeml's transports between processes that are there."""
    from edgeml.core import PluginError, load_transport

    found = []
    for name in ("zmq", "shm", "grpc"):
        try:
            load_transport(name)
        except PluginError:
            continue
        found.append(name)
    return found


class Child:
    """A process that runs ``target(pipe, *args)``, and never outlives this one."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_run, args=(target, theirs, args), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, timeout: float = 60.0) -> Any:
        """What it sends next through its pipe."""
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"{self.process.name} said nothing in {timeout:g} s")
        return self.pipe.recv()

    def cpu(self) -> float:
        """Seconds of CPU that it has used, all threads together (Linux)."""
        assert self.process.pid is not None
        return time.clock_gettime(~self.process.pid << 3 | 2)  # what clock_getcpuclockid(3) gives

    def rss(self) -> int:
        """Bytes of memory that it has resident (Linux)."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def pause(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self, patience: float = 0.0) -> None:
        """Close its pipe, and kill it if it doesn't end then."""
        self.pipe.close()
        if patience:
            self.process.join(patience)
        self.process.kill()
        self.process.join()


def _run(target: Callable[..., None], pipe: Connection, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    # Killed with the parent, even where it has been stopped and could do nothing itself.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        return  # it has gone already
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a thousand clients need many
    target(pipe, *args)


Client = AbstractContextManager[Callable[[], None]]
"""Gives the function that makes one call of a client, and raises for another's answer."""


def call_together(pipe: Connection, makes: Sequence[Callable[[], Client]], patience: float) -> None:
    """Run as a child of `time_together`: clients in threads, which call from a begin to an end."""
    turn: list[float] = []
    told = threading.Event()
    there = threading.Barrier(len(makes) + 1)
    times: list[list[float]] = [[] for _ in makes]

    def run(make: Callable[[], Client], took: list[float]) -> None:
        with make() as call:
            there.wait()
            told.wait()
            begin, end = turn
            while (now := time.monotonic()) < end:
                call()
                if now >= begin:
                    took.append(time.monotonic() - now)

    threads = [
        threading.Thread(target=run, args=pair, daemon=True)
        for pair in zip(makes, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    there.wait(patience)
    pipe.send("there")
    turn.extend(pipe.recv())
    told.set()
    for thread in threads:
        thread.join()
    pipe.send(times)


def time_together(server: Child, children: Sequence[Child], seconds: float, patience: float) -> Row:
    """Have all clients of these children call for so long, and close the children."""
    try:
        for child in children:
            child.receive(timeout=patience)
        begin = time.monotonic() + 0.1 + _SETTLE  # one clock for all processes (Linux)
        for child in children:
            child.pipe.send((begin, begin + seconds))
        time.sleep(begin - time.monotonic())
        before = server.cpu()
        time.sleep(seconds)
        used = server.cpu() - before
        times = np.concatenate([t for child in children for t in child.receive(timeout=120)])
    finally:
        for child in children:
            child.close()
    return {
        "calls_per_s": len(times) / seconds,
        "p50_ms": float(np.median(times)) * 1e3,
        "p99_ms": float(np.percentile(times, 99)) * 1e3,
        "cpu_us": used / len(times) * 1e6,
    }


def interleaved(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in turning order, so that a noisy moment hits all of them."""
    names = list(names)
    for number in range(rounds):
        yield from names if number % 2 else reversed(names)


def medians(rounds: Iterable[Row]) -> Row:
    """The median over rounds of every figure."""
    rounds = list(rounds)
    return {key: float(np.median([row[key] for row in rounds])) for key in rounds[0]}


def add_ratios(
    rows: dict[str, Row], references: Iterable[str], *keys: str, suffix: str = "ratio"
) -> None:
    """Add to each row the ratio to the best of the references, where any of them was measured."""
    there = [rows[name] for name in references if name in rows]
    for key in keys if there else ():
        best = max if key.endswith("_per_s") else min
        base = best(row[key] for row in there)
        for row in rows.values():
            row[f"{key}_{suffix}"] = row[key] / base


class Table:
    """Prints rows as they come; columns are given as name=width or name=width.decimals."""

    def __init__(self, *labels: int, **columns: str) -> None:
        self._labels, self._columns = labels, columns
        print(" ".join(" " * width for width in labels), end="")
        figure = ""
        for key, width in columns.items():
            head = key.removeprefix(f"{figure}_")  # of its ratios, which follow it
            figure = key if head == key else figure
            print(f" {head.replace('_', ' '):>{int(float(width))}}", end="")
        print(flush=True)

    def add(self, *labels: str, row: Mapping[str, float]) -> None:
        print(" ".join(map(str.ljust, labels, self._labels)), end="")
        for key, width in self._columns.items():
            blank = " " * int(float(width))
            print(f" {row[key]:{width}f}" if key in row else f" {blank}", end="")
        print(flush=True)


def parser(doc: str | None, peers: Iterable[str], rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    peers = list(peers)
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--peers", nargs="*", default=peers, choices=peers, metavar="PEER")
    made.add_argument("--rounds", type=int, default=rounds, help=f"of each peer (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="keep the figures in a file")
    made.epilog = f"peers here: {', '.join(repr(peer) for peer in peers)}"
    return made


def save(options: argparse.Namespace, results: Any) -> None:
    """Write the figures where ``--json`` says."""
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "when": time.ctime()}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)
