"""Shared memory between the processes of one user on one machine.

``shm://127.0.0.1:PORT`` names a Unix socket that is gone with its process; ``shm:///run/robot.sock``
one at a path, for containers that share a folder. What is large lies in memory that both sides map
(`segments`), lent by the one to the other (`memory`); what is small goes through the socket,
together with the word where the rest is (`channel`). A message is copied once, into that memory; to
many peers it is copied once for all.

Threads. A listener has one loop (`reactor`). A connection gives each calling thread a socket of its
own, on which `call` sends and waits without a thread hop; what `request` sends has one socket and
one loop. Whoever sends a message writes it to the socket itself.

Only processes of the same user are talked to, and of those users whom `Credentials.users` lists on
both sides; the system vouches for who they are. Processes of the same user are trusted not to
change what they have sent, as they could do worse, but nothing else of what they send is. What
another user's send is copied before anybody looks at it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

from edgeml.core import (
    DEFAULT_LIMITS,
    Credentials,
    Deadline,
    DeadlineExceeded,
    Endpoint,
    Limits,
    OnRequest,
    Overloaded,
    Requester,
    Transport,
    Unreachable,
    Url,
    hookimpl,
)
from edgeml.transports.shm.connection import Connection
from edgeml.transports.shm.listener import Listener, check_address
from edgeml.transports.shm.memory import limit_of_environment
from edgeml.transports.shm.segments import SEALABLE
from edgeml.transports.shm.sockets import LINUX, Lost, find_users

__all__ = ["ShmTransport", "edgeml_transport"]


class ShmTransport(Transport):
    """``shm://127.0.0.1:PORT`` or ``shm:///path``: between processes of one user, or of some."""

    name: ClassVar[str] = "shm"

    def report(self) -> dict[str, str]:
        """See `Transport.report`: what the memory is, how much there is, and how much is lent."""
        try:
            limit = f"{limit_of_environment() >> 20} MiB at most, see EDGEML_SHM_LIMIT_MB"
        except ValueError as error:
            limit = str(error)
        return {
            "memory": "memfd" if SEALABLE else f"unlinked files in {tempfile.gettempdir()}",
            "available": f"{_available() >> 20} MiB",
            "lent to one peer": limit,
        }

    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Transport.serve`; of the credentials only ``users`` counts, as the system itself
        tells who connects.

        ``$EDGEML_SHM_LIMIT_MB`` is how much memory may be lent to one peer at a time, in MiB; by
        default a quarter of the machine's, and 2048 at most.

        Raises:
            PermissionDenied: another user has taken the address; its ``errno`` is ``EADDRINUSE``.
        """
        return Listener(url, on_request, _users(url, credentials), limits)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`.

        Raises:
            PermissionDenied: another user's process serves there, who is not among
                ``credentials.users``; or this one's user isn't among the server's.
        """
        deadline = Deadline(timeout)
        users = _users(url, credentials)
        try:
            check_address(url, deadline)
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from None
        try:
            return Connection(url, deadline, users)
        except (Lost, DeadlineExceeded, Overloaded) as error:
            raise Unreachable(f"no connection to {url}: {error}") from None


def _users(url: Url, credentials: Credentials | None) -> frozenset[int]:
    """Whose processes are talked to."""
    users = find_users(() if credentials is None else credentials.users)
    if len(users) > 1 and not LINUX and not url.path:
        raise ValueError(
            f"on this system other users find no {url}: serve at a path that they can reach, "
            "as in shm:///path"
        )
    return users


def _available() -> int:
    """Bytes that could be shared now: of memory, or where files stand in for it, of the disk."""
    if not SEALABLE:
        return shutil.disk_usage(tempfile.gettempdir()).free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    try:  # a container may have less than the machine
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, max(0, int(most) - int(used)))
    except (OSError, ValueError):  # none, or "max"
        return free


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return ShmTransport
