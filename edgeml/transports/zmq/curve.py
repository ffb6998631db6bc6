"""CURVE (https://rfc.zeromq.org/spec/26): encrypted sockets that know each other by their keys.

A server's ROUTER lets in the keys of a `Keyring` and no others. libzmq asks for each by ZAP
(https://rfc.zeromq.org/spec/27), a request on a socket of the same context, which the listener's
guard answers; with nobody there to answer it lets in no one. What it is told to call the peer, its
user id, comes with each of the peer's messages. It is the key itself, so that one look at the
keyring tells who that is, and whether it may still be here.

Only the server's own key opens a client's first message, so a client whose handshake comes about
talks to the server whose key it has. What goes wrong with a handshake libzmq tells in part, and
neither end tells the other: so a client asks the server once more for its mechanism, which both
say in the clear before all else.
"""

from __future__ import annotations

from contextlib import suppress

import zmq
from zmq.utils import z85

from edgeml.core.deadline import Deadline
from edgeml.core.dial import dial
from edgeml.core.errors import PermissionDenied
from edgeml.core.security import Credentials, Keyring
from edgeml.core.url import Url

__all__ = [
    "ZAP",
    "answer_zap",
    "client_keys",
    "explain_refusal",
    "find_mechanism",
    "lock",
    "server_keys",
    "unlock",
]

ZAP = "inproc://zeromq.zap.01"
"""Where libzmq asks, in the context of the socket that is asked for."""

_MADE = "`edgeml keygen DIR` makes a server's, `edgeml keygen DIR --client NAME` a client's"
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03"  # as far as it goes before the mechanism
_MECHANISM = slice(12, 32)  # of the other's


def server_keys(credentials: Credentials | None) -> Keyring | None:
    """Return whom a server lets in; None where it has no keys and talks in the clear.

    Raises:
        ValueError: it has keys, but not those that CURVE takes.
    """
    if credentials is None or (credentials.curve is None and credentials.clients is None):
        return None
    if credentials.curve is None:
        raise ValueError(f"these credentials have no CURVE keys, which zmq takes: {_MADE}")
    if credentials.clients is None:
        raise ValueError(
            f"these credentials don't say which clients to let in, so they are a client's: {_MADE}"
        )
    _require_curve()
    return credentials.clients


def client_keys(credentials: Credentials | None) -> Credentials | None:
    """Return what a client's sockets take to be encrypted; None where it talks in the clear.

    Raises:
        ValueError: it has keys, but not those that CURVE takes.
    """
    if credentials is None or not (credentials.curve or credentials.token):
        return None
    if credentials.curve is None:
        raise ValueError(f"these credentials have no CURVE keys, which zmq takes: {_MADE}")
    if credentials.curve_server is None:
        raise ValueError(
            f"these credentials lack the server's public CURVE key, so they are a server's: {_MADE}"
        )
    _require_curve()
    return credentials


def _require_curve() -> None:
    if not zmq.has("curve"):
        raise ValueError("this libzmq knows no CURVE: install pyzmq from its wheel")


def lock(router: zmq.Socket[bytes], credentials: Credentials) -> None:
    """Have a server's socket let in those whom ZAP is told of, and nobody where it isn't asked."""
    assert credentials.curve is not None
    router.curve_server = True
    router.curve_publickey = credentials.curve.public.encode()
    router.curve_secretkey = credentials.curve.secret.encode()
    router.zap_domain = b"edgeml"
    router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # or it lets in all where nobody answers


def unlock(line: zmq.Socket[bytes], credentials: Credentials) -> None:
    """Have a client's socket talk to no server but the one whose key it has."""
    assert credentials.curve is not None
    assert credentials.curve_server is not None
    line.curve_publickey = credentials.curve.public.encode()
    line.curve_secretkey = credentials.curve.secret.encode()
    line.curve_serverkey = credentials.curve_server.encode()


def answer_zap(keyring: Keyring, request: list[bytes]) -> tuple[list[bytes], str, str]:
    """Decide upon a request of ZAP's: return the answer, and who it is from and why not, if so."""
    _, number, _, address, _, mechanism, *keys = request
    why = ""
    key = b""
    if mechanism != b"CURVE" or len(keys) != 1:
        why = "it shows no CURVE key"
    else:
        key = z85.encode(keys[0])
        try:
            keyring.by_curve(key)
        except PermissionDenied as error:
            why = str(error)
    status, text, who = (b"400", b"refused", b"") if why else (b"200", b"", key)
    return [b"1.0", number, status, text, who, b""], address.decode("ascii", "replace"), why


def find_mechanism(address: Url, timeout: float, ours: str) -> str:
    """Ask a server which mechanism it has (``"NULL"``, ``"CURVE"``); "" if it doesn't say.

    It is told ours in turn, so that it can count whom it has refused.
    """
    deadline = Deadline(timeout)
    said, theirs = b"", ""
    with suppress(OSError), dial(address.host, address.port, deadline) as sock:
        sock.sendall(_GREETING)
        while more := sock.recv(64):
            said += more
            if len(said) >= _MECHANISM.stop and not theirs:
                theirs = said[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
                if theirs == ours:
                    break
                sock.sendall(b"\0" + ours.encode().ljust(20, b"\0") + bytes(32))  # and it hangs up
            sock.settimeout(max(1e-3, deadline.left))
    return theirs


def explain_refusal(
    url: Url, address: Url, credentials: Credentials | None, told: bool
) -> PermissionDenied | None:
    """Say how keys made a handshake fail; None if they didn't.

    Args:
        url: of the server, for people to read.
        address: of the server.
        credentials: the client's, or None.
        told: whether the server said that it refuses the key.
    """
    if told:
        return PermissionDenied(
            f"{url} doesn't let this client's key in: it is unknown there, has expired or was "
            "revoked; `edgeml keygen DIR --client NAME` on the server makes another"
        )
    theirs = find_mechanism(address, 0.5, "NULL" if credentials is None else "CURVE")
    if credentials is None:
        if theirs != "CURVE":
            return None
        return PermissionDenied(
            f"{url} asks for keys: give credentials=, the directory that `edgeml keygen DIR "
            "--client NAME` made on the server"
        )
    if theirs == "CURVE":
        return PermissionDenied(
            f"{url} is not the server whose key this client has, or it takes no more connections; "
            "are the credentials those that were made for this client on that server?"
        )
    if theirs:
        return PermissionDenied(
            f"{url} talks in the clear, but this client has keys: start the server with "
            "credentials=, or look who listens there in its place"
        )
    return None
