"""A server or a client of one of the pairs that is brought to its end: a process of the matrix.

    python ending_program.py '{"transport": "zmq", "role": "client", "pair": "action",
                               "how": "stop", "moment": "call", "url": "zmq://..."}'

It prints "starting", with a server's address "at URL", "ready" once it is amid what its moment
says, and at an end that it survives "left [...]", which names what is left of its own.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
import weakref
from typing import Any

import numpy as np

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
)
from edgeml.data import QueuedDataStore

FRAME = np.zeros(200_000, np.uint8)
HELD = 1.0  # seconds that a handler takes
_PATIENCE = 20.0  # seconds that what has been ended may take to be gone
_A_FEW = 2  # descriptors that a library may open at any time; an end has more


def action_config(transport: str) -> ActionConfig:
    return ActionConfig(0, ["move"], ["cam"], transport=transport)


def trainer_config(transport: str) -> TrainerConfig:
    return TrainerConfig(0, None, ["stats"], transport=transport)


def make_server(pair: str, transport: str, hold: Any) -> Any:
    """A server whose one function calls ``hold``."""
    if pair == "action":
        return ActionServer(action_config(transport), lambda keys: hold(), lambda key, value: {})
    if pair == "inference":
        server = InferenceServer(0, transport=transport)
        server.register_interface("hold", lambda payload: hold())
        return server
    trainer = TrainerServer(
        trainer_config(transport), lambda name, batch: hold(), lambda kind, payload: hold()
    )
    trainer.register_data_store("actor", QueuedDataStore(100_000))
    return trainer


def publish(pair: str, server: Any) -> None:
    if pair == "action":
        server.publish_obs({"cam": FRAME})
    elif pair == "trainer":
        server.publish_network({"w": FRAME})


class Client:
    """A client of any of the pairs, by what all of them can do."""

    def __init__(self, pair: str, url: str) -> None:
        self.pair = pair
        if pair == "action":
            self.real: Any = ActionClient(None, config=action_config(url))
        elif pair == "inference":
            self.real = InferenceClient(None, url=url)
        else:
            self.store = QueuedDataStore(100_000)
            self.real = TrainerClient("actor", None, trainer_config(url), self.store)

    def call(self) -> Any:
        if self.pair == "action":
            return self.real.obs()
        if self.pair == "inference":
            return self.real.call("hold", 1)
        return self.real.request("stats", {})

    def upload(self) -> None:
        self.store.batch_insert([{"n": n, "frame": FRAME[:20_000]} for n in range(50)])
        self.real.update()

    def subscribe(self, function: Any) -> None:
        if self.pair == "action":
            self.real.register_obs_callback(function)
        else:
            self.real.recv_network_callback(function)

    def stop(self) -> None:
        self.real.stop()


def say(text: str) -> None:
    print(text, flush=True)


def again(work: Any) -> None:
    """Do something in a daemon thread until it can't be done any more."""

    def run() -> None:
        while True:
            try:
                work()
            except (EdgemlError, ReferenceError):
                return

    threading.Thread(target=run, name="a user's", daemon=True).start()


def functions(amid: threading.Event, how: str, moment: str) -> tuple[Any, Any]:
    """What a server calls, and what a subscriber does; they must not refer to what is dropped."""

    def hold() -> dict[str, Any]:
        amid.set()
        if how == "callback":
            sys.exit(5)
        time.sleep(HELD if moment == "call" else 0)
        return {"cam": 1}

    def take(value: Any) -> None:
        amid.set()
        if how == "callback":
            sys.exit(5)

    return hold, take


class Run:
    """One end, from its making to its end."""

    def __init__(self, spec: dict[str, str]) -> None:
        self.pair, self.role, self.moment = spec["pair"], spec["role"], spec["moment"]
        self.transport, self.url, self.how = spec["transport"], spec.get("url", ""), spec["how"]
        self.amid = threading.Event()
        self.ends: list[Any] = []
        self.hold, self.take = functions(self.amid, self.how, self.moment)

    def rehearse(self) -> None:
        """Do it once, with both ends here, so that what libraries keep for a process is there."""
        self.role = "both"
        self.begin()
        self.stop()

    def begin(self) -> None:
        """Make it, and return amid its moment."""
        if self.role != "client" or self.transport == "inproc":
            server = make_server(self.pair, self.transport, self.hold)
            self.ends.append(server)
            server.start(threaded=True)
            self.url = server.url
            if self.role == "server":
                say(f"at {self.url}")
            if self.moment == "broadcast":
                self._keep_publishing(weakref.proxy(server))
            del server
        if self.role != "server" or self.transport == "inproc":
            client = Client(self.pair, self.url)
            self.ends.insert(0, client)
            used, amid = weakref.proxy(client), self.amid  # so that it may be dropped
            if self.moment == "call":
                again(lambda: (amid.set(), used.call()))
            elif self.moment == "upload":
                again(lambda: (used.upload(), amid.set()))
            elif self.moment == "broadcast":
                client.subscribe(self.take)
        if self.moment in ("call", "upload", "broadcast") and not self.amid.wait(30):
            say("never amid it")

    def _keep_publishing(self, server: Any) -> None:
        pair, amid = self.pair, self.amid

        def work() -> None:
            publish(pair, server)
            amid.set()
            time.sleep(0.01)

        again(work)

    def stop(self) -> None:
        for end in self.ends:
            end.stop()
        self.ends.clear()


def ours() -> set[str]:
    """Threads that edgeml, or a user by it, has."""
    return {t.name for t in threading.enumerate() if t.name.startswith("edgeml")}


def files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sorted(found)


def tell_left(before: int) -> None:
    """Say what is left, once nothing is, or when that takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        gc.collect()
        threads, now = sorted(ours()), files()
        if (not threads and len(now) <= before + _A_FEW) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    left = threads + (now if len(now) > before + _A_FEW else [])
    say(f"left {json.dumps(left)}")


def in_child(ends: list[Any]) -> None:
    """What a forked child does: use what it can't, and drop it."""
    for end in ends:
        try:
            if isinstance(end, Client):
                end.call()
        except EdgemlError:
            continue
    ends.clear()
    gc.collect()


def main() -> None:
    spec = json.loads(sys.argv[1])
    how = spec["how"]
    warnings.simplefilter("ignore", ResourceWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
    say("starting")
    if how in ("stop", "drop") and spec["moment"] != "start":
        Run(spec).rehearse()
        deadline = time.monotonic() + _PATIENCE
        while ours() and time.monotonic() < deadline:
            time.sleep(0.02)
        before = len(files())
        run = Run(spec)
        run.begin()
        say("ready")
        sys.stdin.readline()
        if how == "stop":
            run.stop()
        run = None
        tell_left(before)
        return
    run = Run(spec)
    if spec["moment"] == "start" and how == "exit":
        threading.Thread(target=run.begin, daemon=True).start()
        return
    run.begin()
    say("ready")
    sys.stdin.readline()
    if how == "wait":  # for a signal
        while True:
            time.sleep(1.0)
    if how == "fork":
        child = os.fork()
        if not child:
            in_child(run.ends)
            sys.exit(0)
        say(f"child {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
        run.stop()
    elif how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=in_child, args=(run.ends,))
        process.start()
        process.join()
        say(f"child {process.exitcode}")
        run.stop()
    elif how == "callback":
        time.sleep(0.1)
        run.stop()
    elif how == "raise":
        raise LookupError("a user's")


if __name__ == "__main__":
    main()
