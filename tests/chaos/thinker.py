"""A policy's server, as a role of `zygote`: it takes a while over each chunk of actions.

Options: ``url``, ``history``, ``log``, ``steps`` (of a chunk), ``delay`` and ``jitter`` (seconds
that a chunk takes). Orders: ``stop``.
"""

from __future__ import annotations

import json
import random
import select
import socket
import time
from typing import Any

from .history import Writer


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Serve until told to stop; the first answer is the URL."""
    import numpy as np

    from edgeml import InferenceServer

    history = Writer(options["history"], options["ahead"])
    rng = random.Random(options["life"])

    def think(payload: Any) -> Any:
        time.sleep(options["delay"] + options["jitter"] * rng.random())
        life, number = payload["state"]
        chunk = np.zeros((options["steps"], 4))
        chunk[:, 0] = np.sin(number + np.arange(options["steps"]))
        chunk[:, 1], chunk[:, 2], chunk[:, 3] = life, number, np.arange(options["steps"])
        return {"actions": chunk}

    server = InferenceServer(url=options["url"])
    server.register_interface("policy", think)
    server.start(threaded=True)
    history.tell("serving")
    orders.send(json.dumps(server.url).encode())
    select.select([orders], [], [])
    if not orders.recv(1 << 16):
        return
    server.stop()
    history.tell("end")
    orders.send(b"null")
