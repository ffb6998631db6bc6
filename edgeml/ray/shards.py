"""A shard: the process of Ray's that has one part of a learner's stores, saved every so often."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeml.core.errors import text_of
from edgeml.ray import cluster
from edgeml.ray.deployment import Failure
from edgeml.ray.replica import Description, advertised, call_factory
from edgeml.services import TrainerConfig, TrainerServer

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ["Saving", "Shard", "ShardDescription"]

_log = logging.getLogger(__name__)

_DRAIN = 30.0  # seconds that uploads under way are given to end


@dataclass(frozen=True)
class Saving:
    """Where and how often a shard is saved.

    Attributes:
        folder: of the checkpoints, which every node reaches that a shard may run on.
        every: seconds from the end of one to the beginning of the next.
        shards: how many there are, which each checkpoint tells: with another number of them the
            items would be others' than those who send them again.
    """

    folder: str
    every: float
    shards: int

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return Path(self.folder) / f"shard-{number}"

    def load(self, server: TrainerServer, number: int) -> bool:
        """Fill a server from a shard's checkpoint; returns whether there is one.

        Raises:
            ValueError: it is of another shard, or of another number of them.
            What `TrainerServer.load_checkpoint` does.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = self.path(number)
        try:
            mark = server.load_checkpoint(path)
        except FileNotFoundError:
            return False
        if mark != self.mark(number):
            found = f"of shard {mark['shard']} of {mark['of']}" if _is_mark(mark) else "not of one"
            raise ValueError(
                f"{path} is to be of shard {number} of {self.shards}, and is {found}: deploy as "
                "many shards as there were, or in another folder"
            )
        return True

    def mark(self, number: int) -> dict[str, int]:
        """Return what a shard's checkpoint has besides its stores."""
        return {"shard": number, "of": self.shards}


@dataclass(frozen=True)
class ShardDescription(Description):
    """What a shard tells of itself.

    Attributes:
        node_id: Ray's id of its node.
        config: what clients compare theirs with; None where there is no server.
    """

    node_id: str = ""
    config: TrainerConfig | None = None


class Shard:
    """The actor. Ray starts it anew when its process ends, and it goes on from its checkpoint.

    Args:
        name: of the deployment.
        version: of the deployment.
        number: its own, from 0.
        saving: where it is saved; None for nowhere.
    """

    def __init__(self, name: str, version: int, number: int, saving: Saving | None) -> None:
        self._name, self._number = f"{name}/shard-{number}", number
        self._saving = saving
        self._server: TrainerServer | None = None
        self._failure: Failure | None = None
        self._trouble = ""  # with saving
        self._saved: object = None  # the stores' newest ids, as of the last checkpoint
        self._ending = threading.Event()
        self._leaving: threading.Thread | None = None
        self._left = False
        # Ray takes what a constructor raises to be final, and keeps its text to itself.
        try:
            made = call_factory(name, version)
            if not isinstance(made, TrainerServer):
                raise TypeError(
                    "the factory has to return a TrainerServer that isn't started, and it returned "
                    f"{type(made).__name__}"
                )
            made.serve_samples()
            if saving is not None and saving.load(made, number):
                self._saved = self._newest(made)
            made.start(threaded=True)
            self._server = made
        except Exception as error:
            _log.exception("%s failed", self._name)
            self._failure = Failure.of(error)
            return
        if saving is not None:
            threading.Thread(target=self._save_on, name="edgeml saves", daemon=True).start()

    def describe(self) -> ShardDescription:
        """Tell what it is at."""
        node, node_id, pid = cluster.node_address(), cluster.node_id(), os.getpid()
        server = self._server
        if server is None:
            return ShardDescription(
                "failed", "", "", node, pid, failure=self._failure, node_id=node_id
            )
        now = server.state()
        state: str = now.state
        failure: Failure | None = None
        if self._leaving is not None:
            state = "left" if self._left else "leaving"
        elif state in ("stopped", "draining"):
            state, failure = "failed", Failure("", now.detail or f"the server is {state}")
        stats = server.stats()
        # A plain one, as a class of the user's may not be known where this is read.
        own = server.config
        config = TrainerConfig(0, None, list(own.request_types), own.rate_limit, own.version)
        return ShardDescription(
            state,
            self._trouble or now.detail,
            advertised(server),
            node,
            pid,
            waiting=stats["waiting"],
            running=stats["running"],
            failure=failure,
            node_id=node_id,
            config=config,
        )

    def leave(self) -> None:
        """Take no more items, and save what there is; returns at once, and `describe` tells when.

        Clients hold what isn't saved.
        """
        if self._leaving is None:
            self._leaving = threading.Thread(target=self._leave, name="edgeml leave", daemon=True)
            self._leaving.start()

    def _leave(self) -> None:
        try:
            self._ending.set()
            if self._server is not None:
                self._server.drain(_DRAIN)
                self._save()
        finally:
            self._left = True

    # Saving -----------------------------------------------------------------------------------

    def _save_on(self) -> None:
        assert self._saving is not None
        while not self._ending.wait(self._saving.every):
            self._save()

    def _save(self) -> None:
        """Save the stores, unless nothing has come since the last time; what fails is told."""
        server, saving = self._server, self._saving
        if server is None or saving is None:
            return
        newest = self._newest(server)
        if newest == self._saved:
            return
        began = time.monotonic()
        try:
            server.save_checkpoint(saving.path(self._number), saving.mark(self._number))
        except Exception as error:
            if not self._trouble:
                _log.exception("%s can't be saved; actors hold what they have sent", self._name)
            self._trouble = f"can't be saved: {text_of(error)}"
            return
        self._trouble, self._saved = "", newest
        _log.debug("%s saved in %.2f s", self._name, time.monotonic() - began)

    @staticmethod
    def _newest(server: TrainerServer) -> object:
        return [server.data_store(name).latest_data_id() for name in server.store_names()]


def _is_mark(values: object) -> TypeGuard[dict[str, int]]:
    return isinstance(values, dict) and values.keys() == {"shard", "of"}
