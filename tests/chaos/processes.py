"""Processes that a `zygote` starts, and what can be done to them from outside."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .zygote import PACKET

_ROOT = Path(__file__).parents[len(__package__.split("."))]
PATIENCE = 60.0  # seconds that anything may take which nobody holds up


class Died(Exception):
    """A process that was to answer is gone."""


class Zygote:
    """Starts processes; a context manager that ends all of them.

    Args:
        prefix: a command that runs it, as in ``unshare``.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", f"{__package__}.zygote", str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*prefix, *command],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._orders.settimeout(PATIENCE)
        if self._orders.recv(PACKET) != b"ready":
            raise Died("the zygote didn't start")

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        self._orders.close()
        self.process.wait(PATIENCE)

    def start(self, role: str, /, **options: Any) -> Process:
        """Start a process that plays a role, which is a module of this package."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = json.dumps({"role": role, "options": options}).encode()
        socket.send_fds(self._orders, [order], [theirs.fileno()])
        theirs.close()
        return Process(int(self._orders.recv(PACKET)), ours)


class Process:
    """A process that obeys orders, until it is killed."""

    def __init__(self, pid: int, orders: socket.socket) -> None:
        self.pid = pid
        self._handle: int | None = os.pidfd_open(pid)  # names it also when the number is another's
        self._orders = orders
        self.frozen = False

    def tell(self, **order: Any) -> None:
        """Give an order, and don't wait for its answer: `hear` it."""
        try:
            self._orders.send(json.dumps(order).encode())
        except OSError as error:
            raise Died(str(error)) from None

    def hear(self, timeout: float = PATIENCE) -> Any:
        """Return the answer to an order.

        Raises:
            Died: it is gone.
            TimeoutError: it doesn't come.
        """
        if not select.select([self._orders], [], [], timeout)[0]:
            raise TimeoutError(f"no answer in {timeout:g} s")
        with suppress(ConnectionError):
            if packet := self._orders.recv(PACKET):
                return json.loads(packet)
        raise Died("it ended")

    def ask(self, timeout: float = PATIENCE, **order: Any) -> Any:
        """Give an order and return its answer; raises what `hear` does."""
        self.tell(**order)
        return self.hear(timeout)

    @property
    def gone(self) -> bool:
        """Whether it has been taken leave of."""
        return self._handle is None

    def alive(self) -> bool:
        return self._handle is not None and not select.select([self._handle], [], [], 0)[0]

    def kill(self) -> None:
        """End it at once, as `kill -9` does."""
        if self._handle is not None:
            self._signal(signal.SIGKILL)
            self.wait()

    def freeze(self) -> None:
        """Stop it where it is; returns once that has come about."""
        self._signal(signal.SIGSTOP)
        self.frozen = True
        stat = Path(f"/proc/{self.pid}/stat")
        deadline = time.monotonic() + PATIENCE
        while self.alive() and stat.read_text().rpartition(")")[2].split()[0] != "T":
            if time.monotonic() > deadline:
                raise TimeoutError("it doesn't stop")
            time.sleep(0.001)

    def thaw(self) -> None:
        self.frozen = False
        self._signal(signal.SIGCONT)

    def limit_files(self, nbytes: int | None) -> None:
        """Let no file, nor memory that is one, be longer; None for as long as any."""
        most = resource.RLIM_INFINITY
        with suppress(ProcessLookupError):
            resource.prlimit(
                self.pid, resource.RLIMIT_FSIZE, (most if nbytes is None else nbytes, most)
            )

    def wait(self, timeout: float = PATIENCE) -> None:
        """Wait for its end.

        Raises:
            TimeoutError: it doesn't come.
        """
        if self._handle is None:
            return
        if not select.select([self._handle], [], [], timeout)[0]:
            raise TimeoutError(f"it runs after {timeout:g} s")
        os.close(self._handle)
        self._handle = None
        self._orders.close()

    def _signal(self, number: int) -> None:
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
