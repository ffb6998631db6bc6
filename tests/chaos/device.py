"""A device, as a role of `zygote`: it takes actions, and notes each, by its own clock.

Options: ``url``, ``history`` (a file), ``ahead`` (of `machines`), ``keys``, ``action_timeout`` (s
of each key, or None), ``action_rate`` (Hz, or None), ``rate`` (Hz, of what it publishes),
``own_thread`` (whether actions have one), ``breaks`` (of `control_breaks`). Orders: ``hang``
(``seconds`` that the next action takes), ``stop``.

What it notes is the history that the checker believes: ``act`` as ``act_callback`` begins and
``acted`` as it ends, ``halt`` when it is made safe, ``row`` for what is on the server's record.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import time
from dataclasses import asdict
from typing import Any

from . import control_breaks, witness
from .history import Writer


class Device:
    """Does what `main` is told."""

    def __init__(self, options: dict[str, Any]) -> None:
        from edgeml import ActionConfig, ActionServer

        self.options = options
        self.history = Writer(options["history"], options["ahead"])
        self.hang = 0.0
        self.taken = itertools.count(1)
        self.told = 0  # rows of the record
        config = ActionConfig(
            0,
            options["keys"],
            ["state"],
            action_timeout=options["action_timeout"],
            on_action_timeout=self.halt,
            action_rate=options["action_rate"],
        )
        if options.get("breaks"):
            control_breaks.break_device(options["breaks"])
        self.server = ActionServer(
            config,
            self.observe,
            self.act,
            url=options["url"],
            act_in_own_thread=options["own_thread"],
        )

    def observe(self, keys: list[str]) -> dict[str, Any]:
        del keys
        number, now = next(self.taken), self.history.now()
        self.history.tell("observed", n=number, not_after=now)
        return {"state": [self.options["life"], number]}

    def publish(self) -> None:
        number, taken = next(self.taken), time.monotonic_ns()
        values = {"state": [self.options["life"], number]}
        self.server.publish_obs(values, taken=taken)
        self.history.tell("observed", n=number, not_after=taken / 1e9 - self.options["ahead"])

    def act(self, key: str, payload: Any, context: Any) -> Any:
        self.history.tell("act", key=key, client=context.client_id, **payload)
        if self.hang:
            seconds, self.hang = self.hang, 0.0
            time.sleep(seconds)
        self.history.tell("acted", key=key, by=payload["by"], n=payload["n"])
        return {"n": payload["n"]}

    def halt(self, key: str) -> None:
        self.history.tell("halt", key=key)

    def tell_rows(self) -> None:
        """Tell what is new on the record; the outcome may still change."""
        for row in self.server.executed(self.told):
            self.history.tell("row", **asdict(row))
            self.told = row.index

    def run(self, orders: socket.socket) -> None:
        witness.watch(self.history)
        self.server.start(threaded=True)
        self.history.tell("serving", url=self.server.url)
        orders.send(json.dumps(self.server.url).encode())
        due = time.monotonic()
        while True:
            self.publish()
            self.tell_rows()
            due += 1 / self.options["rate"]
            if not select.select([orders], [], [], max(0.0, due - time.monotonic()))[0]:
                continue
            packet = orders.recv(1 << 16)
            if not packet:
                return
            match json.loads(packet):
                case {"do": "hang", "seconds": seconds}:
                    self.hang = seconds
                case {"do": "stop"}:
                    break
            orders.send(b"null")
        self.history.tell("stopping")
        self.server.stop()
        self.history.tell("stopped", stats=self.server.stats())
        for row in self.server.executed():
            self.history.tell("on record", **asdict(row))
        self.history.tell("end")
        orders.send(b"null")


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Serve until told to stop; the first answer is the URL."""
    Device(options).run(orders)
