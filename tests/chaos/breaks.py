"""Ways to break the library on purpose, by which the checker is tested; each in a real process."""

from __future__ import annotations

import itertools
import time
from collections import deque
from types import SimpleNamespace
from typing import Any


def break_learner(how: str, server: Any, store: Any) -> None:
    """Break a learner's server or store; does nothing where it is an actor's that is broken."""
    insert, save = store.batch_insert, server.save_checkpoint
    turns = itertools.count(1)

    def each(number: int) -> bool:
        return next(turns) % number == 0

    if how == "a chunk is dropped":
        store.batch_insert = lambda batch: None if each(5) else insert(batch)
    elif how == "a chunk is inserted twice":
        store.batch_insert = lambda batch: [insert(batch) for _ in range(2 if each(5) else 1)]
    elif how == "a chunk is turned about":
        store.batch_insert = lambda batch: insert([*batch][::-1])
    elif how == "an item is refused":
        store.batch_insert = lambda batch: _refuse(batch, insert)
    elif how == "an item is spoilt":
        store.batch_insert = lambda batch: insert(_spoil(batch) if each(5) else batch)
    elif how == "marks are saved too early":  # those of a moment at which the items weren't there
        _save_old_items()
    elif how == "marks are saved too late":
        _save_old_marks(server)
    elif how == "a checkpoint is said to be saved":
        server.save_checkpoint = lambda path, values: save(
            path.with_suffix(".elsewhere") if path.exists() else path, values
        )


def _refuse(batch: Any, insert: Any) -> None:
    if any(int(item["number"]) % 50 == 0 for item in batch):
        raise ValueError("fifty is too many")
    insert(batch)


def _spoil(batch: Any) -> Any:
    spoilt = [dict(item) for item in batch]
    spoilt[0]["data"] = spoilt[0]["data"] + 1
    return spoilt


def _save_old_items() -> None:
    from edgeml.data import ReplayBuffer
    from edgeml.services.trainer import server as module

    checkpoint: Any = module.checkpoint

    def save(path: Any, values: Any, stores: Any) -> Any:
        old = {name: ReplayBuffer(store.capacity) for name, store in stores.items()}
        for name, store in stores.items():
            old[name].batch_insert(store.get_latest_data(0))
        time.sleep(0.05)
        return checkpoint.save(path, values, old)

    module.checkpoint = SimpleNamespace(save=save, load=checkpoint.load)  # type: ignore[assignment]


def _save_old_marks(server: Any) -> None:
    state = server._intake.state
    before = deque([state()], maxlen=2)

    def older() -> Any:
        before.append(state())
        return before[0]

    server._intake.state = older


def break_actor(how: str, client: Any, store: Any) -> None:
    """Break an actor's client; does nothing where it is a learner's that is broken."""
    if how == "calls outlive their deadlines":
        request = client.request

        def late(*given: Any) -> Any:
            time.sleep(1.5)  # longer than any deadline here
            return request(*given)

        client.request = late
    elif how == "applied is said to be durable":
        update = client.update

        def boast(*given: Any) -> Any:
            done = update(*given)
            return (done, done) if isinstance(done, int) else (done[0], done[0])

        client.update = boast
    elif how == "an item is left out":
        insert = store.insert
        store.insert = lambda item: None if int(item["number"]) % 97 == 0 else insert(item)
