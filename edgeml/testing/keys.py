"""Directories of keys, as users make them."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgeml.core import Credentials
from edgeml.core.security import Keyring

__all__ = ["Keys", "make_keys"]


class Keys:
    """Directories as users make them, for all tests of a process.

    Attributes:
        home: where they are.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        for server, client in (("server", "robot"), ("server", "viewer"), ("other", "stranger")):
            subprocess.run(
                [sys.executable, "-m", "edgeml", "keygen", self.home / server, "--client", client],
                check=True,
                capture_output=True,
            )

    def server(self, name: str = "server") -> Credentials:
        """A server's, with a keyring that the test may change."""
        loaded = Credentials.load(self.home / name)
        assert loaded.clients is not None
        ring = Keyring(loaded.clients.by_name(client) for client in loaded.clients.names())
        return replace(loaded, clients=ring)

    def client(self, name: str) -> Credentials:
        """A client's."""
        server = "other" if name == "stranger" else "server"
        return Credentials.load(self.home / server / "clients" / name)

    def wrong(self, how: str) -> tuple[Credentials, Credentials | None]:
        """A server's, and what a client has who is not let in."""
        server, robot = self.server(), self.client("robot")
        ring = server.clients
        assert ring is not None
        if how == "nothing":
            return server, None
        if how == "another server's":
            return server, self.client("stranger")
        if how == "another's token":
            return server, replace(robot, token=self.client("stranger").token)
        if how == "expired":
            ring.add(replace(ring.by_name("robot"), expires=time.time() - 1))
        else:
            ring.revoke("robot")
        return server, robot


_made: list[Keys] = []


def make_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Return directories of keys, made once for all tests of a process."""
    pytest.importorskip("cryptography", reason="edgeml keygen needs it")
    if not _made:
        _made.append(Keys(tmp_path_factory.mktemp("keys")))
    return _made[0]
