"""Who drives a device, as a role of `zygote`: a policy, a script or a human, at a steady rate.

Options: ``name``, ``url``, ``history``, ``ahead`` (of `machines`), ``client_id``, ``timeout`` (of
each call), ``rate`` (Hz), ``keys``, ``sees`` ("asked" for observations that it asks for, "told" for
those that are published, "blind" for none), ``valid`` (seconds, or None), ``age`` (seconds that it
says its blind actions have), ``priority`` (of its lease; None to act without one), ``ttl``,
``merge`` and ``policy`` (a URL: think by a `ChunkedPolicy`; None for a plain loop). Orders:
``take`` and ``give`` the lease, ``check`` (answered once an action has been taken), ``stop``.

What it tells is compared with the device's notes, which alone are believed: ``sent`` for what it
is certain of, ``told`` for what it was answered.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from contextlib import suppress
from typing import Any

from . import witness
from .history import Writer

_PATIENCE = 10.0  # seconds that an action may take to be taken when all is calm
_SLOW = 0.0005  # seconds between looking at a clock and having sent that are worth a word


class Driver:
    """Does what `main` is told."""

    def __init__(self, orders: socket.socket, options: dict[str, Any]) -> None:
        self.orders, self.options = orders, options
        self.history = Writer(options["history"], options["ahead"])
        self.newest: tuple[Any, int] | None = None
        self.numbers = dict.fromkeys(options["keys"], 0)
        self.acted = 0  # how often it was told so
        self.client: Any = None
        self.policy: Any = None
        self.thinker: Any = None
        self.leases = options["priority"] is not None
        self.lease: Any = None
        self.taken = 0  # leases, so far
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    # The loop -----------------------------------------------------------------------------

    def run(self) -> None:
        witness.watch(self.history)
        self.orders.send(b"null")
        while not self.connect():
            if self.obey(time.monotonic() + 0.05):
                self.orders.send(b"null")
                return
        self.history.tell("connected")
        if self.options["eager"]:
            self.take()
        due = time.monotonic()
        while True:
            self.tick()
            due = max(due + 1 / self.options["rate"], time.monotonic() - 0.1)
            if self.obey(due):
                break
        if self.policy is not None:
            self.policy.stop()
            self.thinker.stop()
        self.history.tell("leaving")
        self.client.stop()
        self.history.tell("end")
        self.orders.send(b"null")

    def obey(self, until: float) -> bool:
        """Wait for the next tick, and do meanwhile what is ordered; True to stop."""
        while True:
            wait = max(0.0, until - time.monotonic())
            ready = select.select([self.orders, self.wake], [], [], wait)[0]
            if self.wake in ready:
                os.eventfd_read(self.wake)
                return False  # the lease has come: act now
            if not ready:
                return False
            packet = self.orders.recv(1 << 16)
            if not packet:
                raise SystemExit("nobody is left to obey")
            match json.loads(packet)["do"]:
                case "take":
                    self.take()
                case "give":
                    self.give()
                case "check" if self.client is not None:
                    self.check()
                case "stop":
                    return True
            self.orders.send(b"null")

    def check(self) -> None:
        """Go on until an action is taken."""
        acted, began, since = self.acted, time.monotonic(), self.history.now()
        while self.acted == acted and time.monotonic() < began + _PATIENCE:
            self.tick()
            time.sleep(1 / self.options["rate"])
        if self.acted == acted:
            self.history.tell("not taken", since=since, stats=self.client.stats())

    def tick(self) -> None:
        if self.leases and not self.held and self.policy is None:
            return
        if self.options["sees"] == "blind":
            for key in self.options["keys"]:
                self.act(key, made=self.history.now(), age=self.options["age"])
            return
        if self.options["sees"] == "asked":
            self.ask()
        if self.newest is None:
            return
        if self.policy is not None:
            self.step()
            return
        values, taken = self.newest
        for key in self.options["keys"]:
            self.act(key, taken, rests_on=values["state"])

    def ask(self) -> None:
        from edgeml import EdgemlError

        with suppress(EdgemlError):
            self.newest = self.client.observe(timeout=0.2)

    def step(self) -> None:
        """Act as the policy says, or not at all."""
        assert self.newest is not None
        values, taken = self.newest
        action = self.policy.step(values, observation_id=taken)
        if action is None:
            return
        blended = self.options["merge"] not in ("append", "aligned")
        rests_on = None if blended else [int(action[1]), int(action[2])]
        self.act(self.options["keys"][0], self.policy.latest.observation_id, rests_on=rests_on)

    def act(self, key: str, observation: int | None = None, **more: Any) -> None:
        from edgeml import EdgemlError

        number = self.numbers[key] = self.numbers[key] + 1
        age = more.get("age", 0.0)
        payload = {
            "by": self.options["name"],
            "of": self.options["life"],
            "n": number,
            "valid": self.options["valid"],
            **more,
        }
        began = more.get("made", self.history.now())
        try:
            future = self.client.act_async(
                key,
                payload,
                observation=observation,
                age=age,
                valid=self.options["valid"],
                policy=f"{self.options['name']}-{self.options['life']}",
            )
        except EdgemlError as error:
            self.history.tell("told", key=key, n=number, outcome=type(error).__name__)
            return
        if (took := self.history.now() - began) > _SLOW:
            self.history.tell("sent", key=key, n=number, took=took)

        def done(future: Any) -> None:
            error = future.exception() if not future.cancelled() else None
            outcome = "ok" if error is None else type(error).__name__
            self.acted += outcome == "ok"
            self.history.tell("told", key=key, n=number, outcome=outcome)

        future.add_done_callback(done)

    # What it stands on --------------------------------------------------------------------

    def connect(self) -> bool:
        """Have all clients; returns whether they are there."""
        from edgeml import ActionClient, ActionConfig, EdgemlError

        config = ActionConfig(
            0,
            self.options["all_keys"],
            ["state"],
            action_timeout=self.options["action_timeout"],
            action_rate=self.options["action_rate"],
        )
        try:
            if self.client is None:
                self.client = ActionClient(
                    config=config,
                    url=self.options["url"],
                    client_id=self.options["client_id"],
                    task_id=self.options["name"],
                    timeout=self.options["timeout"],
                )
                if self.options["sees"] == "told":
                    self.client.register_obs_callback(self.seen)
            if self.options["merge"] is not None:
                self.think()
        except EdgemlError as error:
            self.history.tell("not connected", why=f"{type(error).__name__}: {error}")
            return False
        return True

    def seen(self, values: Any, observation_id: int) -> None:
        self.newest = values, observation_id

    def think(self) -> None:
        from edgeml import InferenceClient
        from edgeml.control import Blend, ChunkedPolicy, Ensemble

        merges = {"blend": Blend(steps=5, only=[0]), "ensemble": Ensemble(decay=0.01)}
        self.thinker = InferenceClient(url=self.options["policy"], timeout=self.options["timeout"])
        self.policy = ChunkedPolicy(
            self.thinker,
            rate=self.options["rate"],
            merge=merges.get(self.options["merge"], self.options["merge"]),
            max_age=self.options["max_age"],
            lease=self if self.leases else None,
        )

    # The lease ----------------------------------------------------------------------------

    @property
    def held(self) -> bool:
        return self.lease is not None and self.lease.held

    @property
    def since(self) -> int:
        """Rises whenever it has come, for a `ChunkedPolicy`."""
        return (self.taken << 32) + (self.lease.since if self.lease is not None else 0)

    def take(self) -> None:
        """Want the lease, from now on."""
        if not self.leases or self.lease is not None or self.client is None:
            return
        self.history.tell("wants")
        self.taken += 1
        self.lease = self.client.lease(
            self.options["keys"][0],
            priority=self.options["priority"],
            ttl=self.options["ttl"],
            wait=0.0,
            on_change=self.changed,
        )

    def give(self) -> None:
        """Want it no more."""
        if self.lease is not None:
            self.history.tell("gives")
            self.lease.release()
            self.lease = None
            self.history.tell("given")

    def changed(self, held: bool) -> None:
        self.history.tell("held", held=held)
        if held:
            os.eventfd_write(self.wake, 1)


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Drive until told to stop; the first answer comes at once."""
    Driver(orders, options).run()
