"""A learner, as a role of `zygote`: it serves, saves checkpoints, and tells what it has.

Options: ``url``, ``history`` (a file), ``checkpoint`` (a file; None for none), ``every`` (seconds
between two), ``capacity``, ``size`` (of an item's data), ``clock`` (a file of `clock`), ``breaks``
(of `breaks`). Orders: ``save``, ``slow`` (seconds that each batch takes), ``stop``.
"""

from __future__ import annotations

import json
import select
import socket
import time
from pathlib import Path
from typing import Any

from . import breaks, clock, items
from .history import Writer


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Serve until told to stop; the first answer is the URL."""
    if options.get("clock"):
        clock.follow(options["clock"])
    from edgeml import TrainerConfig, TrainerServer
    from edgeml.data import ReplayBuffer
    from edgeml.testing.stopwatch import Stopwatch

    history = Writer(options["history"])
    history.tell("start")
    slow = 0.0

    def received(name: str, batch: Any) -> None:
        if slow:
            time.sleep(slow)

    config = TrainerConfig(0, None, request_types=["echo"])
    server = TrainerServer(config, received, lambda kind, payload: payload, url=options["url"])
    store = ReplayBuffer(options["capacity"], example=items.make(0, 0, options["size"]))
    server.register_data_store("data", store)
    path = Path(options["checkpoint"]) if options.get("checkpoint") else None
    if options.get("breaks"):
        breaks.break_learner(options["breaks"], server, store)
    try:
        if path is None:
            raise FileNotFoundError
        server.load_checkpoint(path)
    except FileNotFoundError:
        history.tell("began empty")
    else:
        history.tell("loaded", contents=items.tell(store.get_latest_data(0)))

    def save() -> None:
        assert path is not None
        history.tell("saving")
        try:
            server.save_checkpoint(path, {"life": options["life"]})
        except OSError as error:
            history.tell("not saved", why=str(error))
        else:
            history.tell("saved")

    server.start(threaded=True)
    history.tell("serving")
    orders.send(json.dumps(server.url).encode())
    due = time.monotonic()
    version = 0
    while True:
        if path is not None and time.monotonic() >= due:
            save()
            due = time.monotonic() + options["every"]
        version += 1
        server.publish_network({"life": options["life"], "version": version})
        if not select.select([orders], [], [], 0.02)[0]:
            continue
        packet = orders.recv(1 << 16)
        if not packet:
            return
        match json.loads(packet):
            case {"do": "save"}:
                save()
            case {"do": "slow", "seconds": seconds}:
                slow = seconds
            case {"do": "stop"}:
                break
        orders.send(b"null")
    began, watch = time.monotonic(), Stopwatch()
    server.stop()
    history.tell("call", name="stop", limit=3.0, began=began, took=watch.seconds, outcome="ok")
    history.tell("contents", contents=items.tell(store.get_latest_data(0)), stats=server.stats())
    orders.send(b"null")
