"""Starts processes in milliseconds: it has imported what they need, and forks.

    python -m tests.chaos.zygote DESCRIPTOR

It has no threads, imports transports and opens none, and waits for orders at a Unix socket. An
order names a role, a module of this package with a function ``main(orders, options)``, and brings
the descriptor of the new process's own socket for orders. What it started dies with it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any

PACKET = 1 << 16  # bytes; the largest order, and the largest answer
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Obey until whoever gives the orders is gone."""
    from edgeml.core import PluginError, load_transport
    from edgeml.core.plugins import find
    from edgeml.services import ActionServer, InferenceServer, TrainerServer  # noqa: F401
    from edgeml.testing import stopwatch  # noqa: F401

    for found in find("transport"):
        with suppress(PluginError):
            load_transport(found.name)
    orders = socket.socket(fileno=int(sys.argv[1]))
    orders.send(b"ready")
    while True:
        if select.select([orders], [], [], 0.2)[0]:
            packet, given, _, _ = socket.recv_fds(orders, PACKET, 1)
            if not packet:
                return
            order = json.loads(packet)
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                orders.close()
                _become(order["role"], socket.socket(fileno=given[0]), order["options"])
            os.close(given[0])
            orders.send(str(pid).encode())
        _bury(os.WNOHANG)


def _bury(flags: int) -> None:
    """Take leave of those that have ended."""
    while True:
        try:
            if os.waitpid(-1, flags)[0] == 0:
                return
        except ChildProcessError:
            return


def _become(role: str, orders: socket.socket, options: dict[str, Any]) -> None:
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        if path := options.get("log"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
        importlib.import_module(f"{__package__}.{role}").main(orders, options)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # As a program does at its end, but for the modules: what the library runs at exit counts.
        try:
            import atexit
            import threading

            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


if __name__ == "__main__":
    main()
