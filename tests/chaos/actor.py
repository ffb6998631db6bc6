"""An actor, as a role of `zygote`: it inserts numbered items and uploads them, and tells of both.

Options: ``url``, ``history`` (a file), ``actor`` (its number), ``first`` and ``last`` (numbers of
items), ``size`` (of an item's data), ``pause`` (seconds between two bursts, on average),
``timeout`` (of each call), ``store`` ("replay", "queue" or "logged"), ``outbox`` (a directory, for
an actor's log; None for none), ``saves`` (whether the learner saves checkpoints), ``updates``
("call", or "thread" for those in the background), ``seed``, ``clock``, ``breaks``. Orders:
``finish``, answered once all has been inserted and has arrived; with ``durable``, once all of it is
durable; and ``stop``.
"""

from __future__ import annotations

import errno
import json
import random
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from . import breaks, clock, items
from .history import Writer

_BURST = 30  # items, at most
_CHUNK = 32  # items that a message of an update has at least, where there are so many
_CLOSING = 2.0  # seconds that `stop` may spend on what is left, by its documentation


class Actor:
    """Does what `main` is told."""

    def __init__(self, orders: socket.socket, options: dict[str, Any]) -> None:
        from edgeml.data import LoggedDataStore, QueuedDataStore, ReplayBuffer

        self.orders, self.options = orders, options
        self.timeout: float = options["timeout"]
        self.history = Writer(options["history"])
        self.rng = random.Random(f"{options['seed']} {options['actor']} {options['life']}")
        self.next: int = options["first"]
        self.arrived = 1  # all items below it are with the learner
        count = max(1, options["last"])
        if options["store"] == "logged":
            self.store: Any = None
            while self.store is None:
                self.store = self.unless_full(lambda: LoggedDataStore(options["outbox"]))
        elif options["store"] == "queue":
            self.store = QueuedDataStore(count, "block", timeout=self.timeout)
        else:
            self.store = ReplayBuffer(count, example=items.make(0, 0, options["size"]))
        # A store that is kept in a log as well may let go of what that has.
        self.has_log = options.get("outbox") is not None and options["store"] != "logged"
        if options["saves"] and not self.has_log:
            self.watch_release()
        self.client: Any = None
        self.echoes = 0

    def run(self) -> None:
        self.history.tell("start")
        while self.client is None:
            self.timed("connect", self.timeout, self.connect)
            if self.client is None:
                time.sleep(0.05)
        self.timed("subscribe", self.timeout, self.subscribe)
        if self.options["updates"] == "thread":
            self.client.start_async_update(0.05)
        while True:
            busy = self.next <= self.options["last"]
            if busy:
                self.insert()
            if self.options["updates"] == "call" and busy and self.rng.random() < 0.5:
                self.update()
            if self.rng.random() < 0.2:
                self.echo()
            pause = self.rng.random() * 2 * self.options["pause"] if busy else 0.1
            match self.order(pause):
                case {"do": "finish", "durable": durable}:
                    self.finish(durable)
                    self.history.tell("end")
                    self.answer()
                case {"do": "stop"}:
                    self.timed("stop", _CLOSING, self.client.stop)
                    return self.answer()

    def order(self, timeout: float) -> Any:
        if not select.select([self.orders], [], [], timeout)[0]:
            return None
        packet = self.orders.recv(1 << 16)
        if not packet:
            raise SystemExit("nobody is left to obey")
        return json.loads(packet)

    def answer(self) -> None:
        self.orders.send(b"null")

    def timed(self, name: str, limit: float, function: Callable[[], Any], **told: Any) -> Any:
        """Call what has a deadline and tell what came of it; None where that was an error."""
        from edgeml import EdgemlError
        from edgeml.testing.stopwatch import Stopwatch

        result, outcome, text = None, "ok", ""
        self.history.tell("calling", name=name)
        began, watch = time.monotonic(), Stopwatch()
        try:
            result = function()
        except EdgemlError as error:
            outcome, text = type(error).__name__, str(error)
        seconds = watch.seconds
        if isinstance(result, tuple):
            told |= {"applied": result[0], "durable": result[1]}
        elif isinstance(result, int):
            told |= {"applied": result}
        self.history.tell(
            "call", name=name, limit=limit, began=began, took=seconds, outcome=outcome, text=text,
            **told,
        )  # fmt: skip
        return result if outcome == "ok" else None

    def connect(self) -> None:
        from edgeml import TrainerClient, TrainerConfig

        more = {"log": self.options["outbox"]} if self.has_log else {}
        self.client = self.unless_full(
            lambda: TrainerClient(
                "data",
                config=TrainerConfig(0, None, request_types=["echo"]),
                data_store=self.store,
                url=self.options["url"],
                client_id=f"actor-{self.options['actor']}",
                timeout=self.timeout,
                **more,
            )
        )
        if self.client is not None and self.options.get("breaks"):
            breaks.break_actor(self.options["breaks"], self.client, self.store)

    def unless_full(self, make: Callable[[], Any]) -> Any:
        """Make what has a log; None, a moment later, where the disk has no room for one yet."""
        try:
            return make()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            time.sleep(0.05)
            return None

    def watch_release(self) -> None:
        """Tell what the store is told that it may let go of, as it is durable."""
        release = self.store.release

        def released(up_to: int) -> None:
            batch = self.store.get_latest_data(max(0, up_to - 1), limit=1)
            if len(batch) and batch.first_id == up_to:  # else it was told before
                self.history.tell("released", n=int(batch[0]["number"]))
            release(up_to)

        self.store.release = released

    def subscribe(self) -> None:
        self.client.recv_network_callback(self.weights)

    def weights(self, value: Any) -> None:
        self.history.tell("weights", of=value["life"], version=value["version"])

    def insert(self) -> None:
        from edgeml import EdgemlError

        count = min(self.rng.randint(1, _BURST), self.options["last"] + 1 - self.next)
        for number in range(self.next, self.next + count):
            item = items.make(self.options["actor"], number, self.options["size"])
            self.history.tell("insert", n=number)
            try:
                self.store.insert(item)
            except (EdgemlError, OSError) as error:  # no room; the same one again, later
                self.history.tell("not inserted", n=number, why=f"{type(error).__name__}: {error}")
                return
            self.history.tell("inserted", n=number)
            self.next = number + 1

    def update(self) -> bool:
        # Each of its messages may take the timeout, and it goes on as long as answers come.
        messages = 2 + (self.next - self.arrived) // _CHUNK
        done = self.timed("update", messages * self.timeout, lambda: self.client.update())
        if done is not None:
            self.arrived = self.next
        stats = self.client.stats()
        self.history.tell("stats", stats=stats.get("stores", {}).get("data"))
        return done is not None

    def echo(self) -> bool:
        self.echoes += 1
        asked = {"actor": self.options["actor"], "echo": self.echoes}
        answer = self.timed("echo", self.timeout, lambda: self.client.request("echo", asked))
        if answer is not None and answer != asked:
            self.history.tell("another's answer", asked=asked, answer=answer)
        return answer is not None

    def finish(self, durable: bool) -> None:
        """Insert what is left, and upload until all has arrived."""
        while self.next <= self.options["last"]:
            self.insert()
            self.update()
        # An update that has nothing to send asks nobody, and so learns of no restart.
        while not (self.echo() and self.update()):
            time.sleep(0.05)
        while durable:
            stats = self.client.stats().get("stores", {}).get("data")
            if stats is None or stats["durable"] >= stats["applied"]:
                break
            self.update()
            time.sleep(0.02)


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Insert and upload until told to stop; the first answer comes at once."""
    if options.get("clock"):
        clock.follow(options["clock"])
    orders.send(b"null")
    Actor(orders, options).run()
