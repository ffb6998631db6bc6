"""A device that publishes large observations, as a role of `zygote`.

Options: ``url``, ``nbytes`` (of an observation), ``hz``. The first answer is the URL, that to
``counts`` how often it has published.
"""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

import numpy as np


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Publish until the orders end."""
    from edgeml import ActionConfig, ActionServer

    config = ActionConfig(0, observation_keys=["camera"])
    with ActionServer(config, None, None, url=options["url"]) as server:
        server.start(threaded=True)
        orders.send(json.dumps(server.url).encode())
        frame = np.ones(options["nbytes"], np.uint8)
        number, due = 0, time.monotonic()
        while True:
            if select.select([orders], [], [], max(0.0, due - time.monotonic()))[0]:
                if not orders.recv(1 << 16):
                    return
                orders.send(json.dumps(number).encode())
            if time.monotonic() >= due:
                number += 1
                frame[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
                server.publish_obs({"camera": frame})
                due = max(due + 1 / options["hz"], time.monotonic())
