"""Unix sockets as shm needs them: whole records, file descriptors, and who is on the other side.

Linux has sockets that keep the bounds of records, names that go with their process, and tells who
connects. Elsewhere (macOS) records have a length in front of them, and a socket is a file.
"""

from __future__ import annotations

import array
import errno
import os
import pwd
import select
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from edgeml.core import Deadline, PermissionDenied, Url
from edgeml.core.advice import explain_no_connection

__all__ = [
    "LARGEST_RECORD",
    "LONGEST_PATH",
    "Lost",
    "Records",
    "accept",
    "connect",
    "find_users",
    "listen",
    "unlink",
]

LINUX = sys.platform == "linux"

LARGEST_RECORD = 1 << 16
"""Bytes; a good part of what a socket has room for (net.core.wmem_default, 208 KiB)."""

LONGEST_PATH = 107 if LINUX else 103
"""Bytes that a socket's path may have, as the system has it."""

_LENGTH = struct.Struct("<I")
_BACKLOG = 4096
_ROOM = socket.CMSG_SPACE(array.array("i").itemsize)
_NAMELESS = 65534  # the user that Linux shows in place of one who has no name in a container


class Lost(Exception):
    """The peer has gone, or can't be trusted any more.

    Attributes:
        kind: under what it is counted; empty where the peer has just gone.
    """

    def __init__(self, why: str, kind: str = "") -> None:
        super().__init__(why)
        self.kind = kind


# socket.send_fds and recv_fds take flags, and leave them out (Python 3.11).


def _send_fd(sock: socket.socket, data: bytes, fd: int) -> int:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    return sock.sendmsg([data], control)


def _receive_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """Bytes, the descriptors that came with them, and whether there were more than expected."""
    data, control, flags, _ = sock.recvmsg(size, _ROOM)
    fds = array.array("i")
    for level, kind, value in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, fds.tolist(), bool(flags & socket.MSG_CTRUNC)


class Records:
    """A connected socket that carries records. Sends never wait.

    Attributes:
        fd: the socket's.
        process: the id of the process on the other side; 0 where the system does not tell.
        user: who runs it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.process, self.user = _identify(sock)
        sock.setblocking(False)
        self._socket = sock
        self.fd = sock.fileno()

    @property
    def foreign(self) -> bool:
        """Whether another user's process is on the other side."""
        return self.user != os.geteuid()

    def send(self, record: bytes, fd: int | None = None) -> bool:
        """Send a record, with a file descriptor if need be; False where there is no room now."""
        try:
            if fd is None:
                self._socket.send(record)
            else:
                _send_fd(self._socket, record, fd)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Lost(str(error)) from None
        return True

    def receive(self) -> bytes | None:
        """The next record; None where there is none now."""
        try:
            record = self._socket.recv(LARGEST_RECORD)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Lost(str(error)) from None
        if not record:
            raise Lost("the peer has closed the connection")
        return record

    def receive_fd(self) -> int | None:
        """The file descriptor that comes with the next record; None where there is none now."""
        try:
            record, fds, more = _receive_fds(self._socket, 1)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Lost(str(error)) from None
        if not record:
            raise Lost("the peer has closed the connection")
        if len(fds) != 1 or more:
            for fd in fds:
                os.close(fd)
            raise Lost(
                "no file descriptor came where one was due; if this process has too many files "
                "open, raise the limit (ulimit -n)",
                "Malformed",
            )
        return fds[0]

    def shutdown(self) -> None:
        """End it in both directions, which wakes whoever waits; what has come can be read."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, so that the peer can still read all that was sent."""
        self.shutdown()
        # A socket that is closed with something unread resets its peer, who then loses the rest.
        with suppress(Lost):
            while self.receive() is not None:
                pass
        self._socket.close()

    def forget(self) -> None:
        """Close this process's copy after a fork, and leave the connection to the parent."""
        self._socket.close()


class StreamRecords(Records):
    """Records on a stream: each has its length in front."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._unsent = b""
        self._come = b""
        self._fds: list[int] = []

    def send(self, record: bytes, fd: int | None = None) -> bool:
        try:
            if self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            if self._unsent:
                return False
            data = _LENGTH.pack(len(record)) + record
            sent = self._socket.send(data) if fd is None else _send_fd(self._socket, data, fd)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Lost(str(error)) from None
        self._unsent = data[sent:]
        if self._unsent:  # a record that was begun must be finished; there will be room soon
            self._finish()
        return True

    def _finish(self) -> None:
        while self._unsent:
            if not select.select([], [self._socket], [], 1.0)[1]:
                raise Lost("the peer reads half a record")
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise Lost(str(error)) from None

    def receive(self) -> bytes | None:
        # Exactly one record, so that what follows it still makes the socket readable.
        while True:
            size = _LENGTH.size
            if len(self._come) >= size:
                size += _LENGTH.unpack_from(self._come)[0]
                if size > LARGEST_RECORD + _LENGTH.size:
                    raise Lost("a record that is too large", "Malformed")
                if len(self._come) == size:
                    record, self._come = self._come[_LENGTH.size :], b""
                    return record
            try:
                data, fds, more = _receive_fds(self._socket, size - len(self._come))
            except BlockingIOError:
                return None
            except OSError as error:
                raise Lost(str(error)) from None
            self._fds += fds
            if len(self._fds) > 1 or more:
                raise Lost(
                    "file descriptors that nobody asked for, or no room for one", "Malformed"
                )
            if not data:
                raise Lost("the peer has closed the connection")
            self._come += data

    def receive_fd(self) -> int | None:
        if self.receive() is None:
            return None
        if not self._fds:
            raise Lost("no file descriptor came where one was due", "Malformed")
        return self._fds.pop()

    def close(self) -> None:
        super().close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _open_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if LINUX else socket.SOCK_STREAM)


def _wrap(sock: socket.socket) -> Records:
    return Records(sock) if LINUX else StreamRecords(sock)


def _format_address(port: int, path: str) -> str:
    if path:
        return path
    if LINUX:
        return f"\0edgeml/{port}"  # abstract: gone with its process
    return os.path.join(tempfile.gettempdir(), f"edgeml-{os.geteuid()}-{port}.sock")


def find_users(listed: Iterable[int | str]) -> frozenset[int]:
    """The ids of the users whose processes are talked to: this one's, and those that are listed.

    Raises:
        ValueError: this machine knows no user of that name; or it is one whom the system does not
            tell from others.
    """
    users = {os.geteuid()}
    for each in listed:
        try:
            users.add(each if isinstance(each, int) else pwd.getpwnam(each).pw_uid)
        except KeyError:
            raise ValueError(f"users: this machine has no user {each!r}; give name or id") from None
    if _NAMELESS in users and not _names_all_users():
        raise ValueError(
            f"in this container user {_NAMELESS} stands for everybody who has no name in it, so "
            "shm can't tell whom it talks to: run as another user, or use another transport"
        )
    return frozenset(users)


def _names_all_users() -> bool:
    """Whether each user of the machine has an id of its own here, as outside of containers."""
    try:
        ranges = Path("/proc/self/uid_map").read_text().split()
    except OSError:  # a system without containers
        return True
    return sum(map(int, ranges[2::3])) >= _NAMELESS * 2


def listen(port: int, path: str, *, to_all: bool = False) -> socket.socket:
    """Listen by a number, or at a path.

    Args:
        port: the number.
        path: the path, which counts if there is one.
        to_all: whether other users find their way through a path's permissions; `accept` looks who
            they are.

    Raises:
        PermissionDenied: another user has taken the address; its ``errno`` is ``EADDRINUSE``.
        OSError: somebody listens there.
    """
    sock = _open_socket()
    address = _format_address(port, path)
    try:
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            abstract = address.startswith("\0")
            if abstract or not _is_abandoned(address):
                if abstract and (whose := _find_squatter(address)):
                    raise PermissionDenied(errno.EADDRINUSE, whose) from None
                raise
            os.unlink(address)
            sock.bind(address)
        if not address.startswith("\0"):
            os.chmod(address, 0o666 if to_all else 0o600)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_abandoned(address: str) -> bool:
    """Whether a file is a socket, left behind by a process that was killed."""
    if not stat.S_ISSOCK(os.stat(address).st_mode):
        return False
    with _open_socket() as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _find_squatter(address: str) -> str:
    """Who has taken a name, where that is not a process of this user which listens there.

    Abstract names are anybody's to take, and such a one may belong to a user who wants this one's
    server not to start. Ours listen as soon as they have the name.
    """
    with _open_socket() as probe:
        try:
            probe.setblocking(False)
            probe.connect(address)
            _, user = _identify(probe)
        except OSError as error:
            return f"taken by somebody who does not listen there ({error.strerror})"
    return f"taken by a process of user {user}" if user != os.geteuid() else ""


def unlink(port: int, path: str) -> None:
    """Remove the file of a socket that has been closed, where it has one."""
    address = _format_address(port, path)
    if not address.startswith("\0"):
        with suppress(OSError):
            os.unlink(address)


def accept(sock: socket.socket) -> Records | None:
    """The next who connects, whoever it is; None where there is none now."""
    try:
        made, _ = sock.accept()
    except BlockingIOError:
        return None
    try:
        return _wrap(made)
    except BaseException:
        made.close()
        raise


def connect(url: Url, deadline: Deadline, users: frozenset[int]) -> Records:
    """Connect to who listens at a path, or else by the number of a port.

    Raises:
        Unreachable: nobody does.
        PermissionDenied: somebody does who is none of these users.
    """
    sock = _open_socket()
    try:
        sock.settimeout(max(1e-3, deadline.left))
        sock.connect(_format_address(url.port, url.path))
        made = _wrap(sock)
        if made.user not in users:
            raise PermissionDenied(
                f"the process on the other side is run by user {made.user}, this one by "
                f"{os.geteuid()}; shm connects the processes of one user, unless both ends list "
                "the other's: Credentials.users, or the file `users` among the keys"
            )
        return made
    except PermissionDenied:
        sock.close()
        raise
    except PermissionError as error:  # the file of a socket is its owner's
        sock.close()
        raise PermissionDenied(f"{url} belongs to another user: {error}") from None
    except OSError as error:
        sock.close()
        raise explain_no_connection(
            url,
            error,
            error.errno,
            "is the server started, on this machine, with shm among its transports?",
        ) from error
    except BaseException:
        sock.close()
        raise


def _identify(sock: socket.socket) -> tuple[int, int]:
    """The process and the user on the other side, as the system tells; process 0 if it doesn't."""
    if LINUX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        process, user, _ = struct.unpack("iII", credentials)
        return process, user
    # LOCAL_PEERCRED of unix(4): a struct xucred
    _, user = struct.unpack_from("II", sock.getsockopt(0, 1, 76))
    return 0, user
