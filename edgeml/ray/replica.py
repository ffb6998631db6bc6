"""A replica: the process of Ray's in which one server of a deployment runs."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from edgeml.core.url import Url
from edgeml.ray import cluster
from edgeml.ray.deployment import Failure
from edgeml.services.base import ServiceServer

__all__ = ["Description", "Replica", "advertised", "call_factory", "factory_key", "starts_key"]

_log = logging.getLogger(__name__)

_FAREWELL = 5.0  # seconds that clients are given to go elsewhere before those left are refused
_LOOK = 0.02  # seconds between two looks whether they have gone
_DRAIN = 30.0  # seconds that calls under way are given to end


_MOST_DEATHS = 3  # as it was started, after which it is not tried again at once


@dataclass(frozen=True)
class Description:
    """What a replica tells of itself.

    Attributes:
        state: "loading", "ready", "leaving", "left", or "failed".
        detail: more of that, for people to read.
        url: where its server is reached, the ways separated by commas.
        node: the address of its machine.
        pid: its process.
        waiting: calls that wait.
        running: threads that are at a call, or at a batch of them.
        failure: why it failed.
    """

    state: str
    detail: str
    url: str
    node: str
    pid: int
    waiting: int = 0
    running: int = 0
    failure: Failure | None = None


def factory_key(name: str, version: int) -> str:
    """Return the key under which a deployment's factory is kept."""
    return f"factory/{name}/{version}"


def call_factory(name: str, version: int) -> Any:
    """Return what a deployment's factory makes; it raises what that raises.

    Raises:
        LookupError: this version is no longer deployed.
    """
    payload = cluster.get(factory_key(name, version))
    if payload is None:
        raise LookupError(f"version {version} of {name!r} is no longer deployed")
    return cluster.unpickle(payload).load()()


def starts_key(name: str, id: str) -> str:
    """Return the key under which a replica counts how often it was started, until it was."""
    return f"starts/{name}/{id}"


def advertised(server: ServiceServer) -> str:
    """Return where other nodes reach a started server, the ways separated by commas.

    One that listens at all addresses tells the machine's name, which other nodes need not know: so
    the node's address takes its place.
    """
    address, name = cluster.node_address(), socket.gethostname()
    urls = [Url.parse(each) for each in server.urls()]
    return ",".join(str(url.with_host(address) if url.host == name else url) for url in urls)


class Replica:
    """The actor. Ray starts it anew when its process ends, and so it takes all from the store.

    Args:
        name: of the deployment.
        version: of the deployment.
        id: of this replica.
    """

    def __init__(self, name: str, version: int, id: str) -> None:
        self._node = cluster.node_address()
        self._server: ServiceServer | None = None
        self._failure: Failure | None = None
        self._leaving: threading.Thread | None = None
        self._left = False
        # Ray takes what a constructor raises to be final, and starts one that dies for ever anew.
        try:
            begun = starts_key(name, id)
            deaths = int(cluster.get(begun) or b"0")
            if deaths >= _MOST_DEATHS:
                raise RuntimeError(f"its process died each of {deaths} times that it was started")
            cluster.put(begun, str(deaths + 1).encode())
            made = call_factory(name, version)
            if not isinstance(made, ServiceServer):
                raise TypeError(
                    "the factory has to return a server that isn't started, such as "
                    f"InferenceServer(0), and it returned {type(made).__name__}"
                )
            made.start(threaded=True)
            self._server = made
            cluster.drop(begun)
        except Exception as error:
            _log.exception("%s: the factory failed", name)
            self._failure = Failure.of(error)

    def describe(self) -> Description:
        """Tell what it is at."""
        server = self._server
        if server is None:
            return Description("failed", "", "", self._node, os.getpid(), failure=self._failure)
        now = server.state()
        state: str = now.state
        failure: Failure | None = None
        if self._left or self._leaving is not None:
            state = "left" if self._left else "leaving"
        elif state in ("stopped", "draining"):
            # By its own doing: loading failed, or a function stopped it.
            text = now.detail or f"the server is {state}"
            state, failure = "failed", Failure("RuntimeError", text)
        stats = server.stats()
        return Description(
            state,
            now.detail,
            advertised(server),
            self._node,
            os.getpid(),
            stats["waiting"],
            stats["running"],
            failure,
        )

    def leave(self) -> None:
        """Take no more calls, once clients have gone elsewhere, and end what is under way.

        Returns at once; `describe` tells when that is done. It is to be off the list before.
        """
        if self._leaving is None:
            self._leaving = threading.Thread(target=self._leave, name="edgeml leave", daemon=True)
            self._leaving.start()

    def _leave(self) -> None:
        server = self._server
        try:
            if server is not None:
                # Clients of the name service go by themselves, each when it has its answers. Those
                # who were told the address by hand stay, and are told that it ends.
                until = time.monotonic() + _FAREWELL
                while server.clients() and time.monotonic() < until:
                    time.sleep(_LOOK)
                server.drain(_DRAIN)
        except Exception:
            _log.exception("the server could not be drained")
        finally:
            self._left = True
