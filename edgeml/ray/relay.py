"""Weights, once to each node: by Ray's object store between nodes, and by our streams within.

The learner puts them into the object store of its own node, and the *board*, an actor, knows the
newest. On each node that has clients there is a *relay*, which asks the board for what is newer
than what it has, gets it over from the other node, once, and publishes it to all clients there.

An object of Ray's is lost with the process that put it there. So what a learner that has ended
published is still had from the relays that have it, and by no other until it publishes again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from typing import Any

from edgeml.core.deadline import Deadline
from edgeml.core.errors import EdgemlError, Unreachable, text_of
from edgeml.core.plugins import load_codec
from edgeml.extras import load_ray
from edgeml.ray import cluster
from edgeml.ray.deployment import Failure
from edgeml.ray.replica import Description, advertised
from edgeml.services import TrainerConfig, TrainerServer

__all__ = ["Board", "Relay", "board_name", "publish"]

_log = logging.getLogger(__name__)

_HOLD = 20.0  # seconds that the board keeps a question without an answer
_TRANSFER = 60.0  # seconds that weights may take from node to node
_AGAIN = 0.5  # seconds between two tries
_LOOK = 0.05  # seconds between two looks whether the board is there


def board_name(name: str) -> str:
    """Return what a deployment's board is called."""
    return f"{name}/weights"


class Board:
    """The actor that knows the newest weights.

    One that was started anew has none, until the learner publishes again; the relays go on.
    """

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._number = 0
        self._newest: Any = None  # in a list, by which Ray hands a reference on and not the value
        self._changed = asyncio.Condition()

    async def put(self, reference: list[Any]) -> int:
        """Take newer weights; returns their number, from 1."""
        async with self._changed:
            self._number += 1
            self._newest = reference
            self._changed.notify_all()
            return self._number

    async def next(self, epoch: str, number: int) -> tuple[str, int, list[Any]] | None:
        """Return the newest weights as soon as they are others than these; None for nothing yet."""

        def others() -> bool:
            return self._newest is not None and (epoch, number) != (self._epoch, self._number)

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(others), _HOLD)
            except asyncio.TimeoutError:
                return None
            return self._epoch, self._number, self._newest


def publish(name: str, weights: Any, timeout: float = _TRANSFER) -> int:
    """Give weights to the relays of a deployment; returns their number, from 1.

    Args:
        name: of the deployment.
        weights: are copied before this returns.
        timeout: seconds that the board may take to be there.

    Raises:
        NotEncodable: the weights.
        Unreachable: the board isn't there.
    """
    ray = load_ray()
    deadline = Deadline(timeout)
    # As subscribers get them, so that nobody on the way needs the library whose arrays they are.
    codec = load_codec("msgpack")
    plain = codec.decode(codec.encode(weights))
    while True:
        board = cluster.find_actor(board_name(name))
        if board is None:
            raise Unreachable(f"{name!r} is no trainer that is deployed")
        try:
            reference = ray.put(plain)
            number: int = ray.get(board.put.remote([reference]), timeout=max(_LOOK, deadline.left))
            return number
        except ray.exceptions.ActorDiedError as error:
            raise Unreachable(f"{name!r} has been deleted") from error
        except ray.exceptions.RayError as error:  # it is being started anew
            if not deadline.left:
                raise Unreachable(f"{name!r} takes no weights: {text_of(error)}") from error
        time.sleep(_LOOK)


class Relay:
    """The actor that publishes weights to the clients of one node.

    Args:
        name: of the deployment.
        config: of its shards, which clients compare theirs with.
        host: where it listens, beside shared memory.
        credentials: the folder of the keys that it asks for, on this node.
    """

    def __init__(
        self, name: str, config: TrainerConfig, host: str, credentials: str | None
    ) -> None:
        self._name = name
        self._server: TrainerServer | None = None
        self._failure: Failure | None = None
        self._published = self._failed = 0
        try:
            made = TrainerServer(config, host=host, transport="auto", credentials=credentials)
            made.start(threaded=True)
            self._server = made
        except Exception as error:
            _log.exception("%s: no relay", name)
            self._failure = Failure.of(error)
            return
        threading.Thread(target=self._follow, name="edgeml relay", daemon=True).start()

    def describe(self) -> Description:
        """Tell what it is at."""
        node, pid = cluster.node_address(), os.getpid()
        server = self._server
        if server is None:
            return Description("failed", "", "", node, pid, failure=self._failure)
        detail = f"{self._published} published to {len(server.clients())} clients"
        if self._failed:
            detail += f", {self._failed} failed"
        return Description(server.state().state, detail, advertised(server), node, pid)

    def _follow(self) -> None:
        """Publish what the board has, for ever."""
        ray = load_ray()
        server = self._server
        assert server is not None
        epoch, number, told = "", 0, ""
        while True:
            try:
                board = cluster.find_actor(board_name(self._name))
                if board is None:
                    raise Unreachable("there is no board")
                newest = ray.get(board.next.remote(epoch, number), timeout=2 * _HOLD)
                if newest is None:
                    continue
                weights = ray.get(newest[2][0], timeout=_TRANSFER)
                server.publish_network(weights)
                epoch, number, _ = newest
                self._published += 1
                told = ""
                del weights, newest  # or they stay in the object stores of both nodes
            except (EdgemlError, ray.exceptions.RayError) as error:
                self._failed += 1
                if told != (told := text_of(error)):
                    _log.warning("%s: those after %d not published: %s", self._name, number, told)
                time.sleep(_AGAIN)
