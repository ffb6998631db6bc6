"""Clients that take long over each publication, as a role of `zygote`.

Options: ``url``, ``count`` (of clients), ``seconds`` (that each takes). The answer to ``counts`` is
how many publications came, and what was wrong with them.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Receive until the orders end; the first answer says that all are there."""
    from edgeml import ActionClient, ActionConfig

    config = ActionConfig(0, observation_keys=["camera"])
    received: Counter[str] = Counter()
    with ExitStack() as stack:
        for _ in range(options["count"]):
            client = ActionClient(config=config, url=options["url"], timeout=60.0)
            stack.callback(client.stop)
            client.register_obs_callback(_Slow(received, options["seconds"]))
        orders.send(b"null")
        while orders.recv(1 << 16):
            orders.send(json.dumps(received).encode())


class _Slow:
    def __init__(self, received: Counter[str], seconds: float) -> None:
        self._received, self._seconds = received, seconds
        self._newest = 0

    def __call__(self, payload: Any) -> None:
        frame = payload["camera"]
        number = int.from_bytes(frame[:8].tobytes(), "little")
        self._received["publications"] += 1
        if number <= self._newest:
            self._received["not newer"] += 1
        if not (frame[8:] == 1).all():
            self._received["spoilt"] += 1
        self._newest = number
        time.sleep(self._seconds)
