"""TLS, by the certificates of `edgeml.core.security`: what transports need of it, in one place.

Always mutual but at a door, and always of one's own authority: a server takes none but its clients,
a client none but its server, whatever their hosts are called. A certificate alone lets nobody in:
the server's `Keyring` knows each by its fingerprint, and so it can be revoked.
"""

from __future__ import annotations

import socket
import ssl

from edgeml.core.deadline import Deadline
from edgeml.core.dial import dial
from edgeml.core.errors import EdgemlError, PermissionDenied
from edgeml.core.security import SERVER_NAME, Credentials, Keyring, TlsKeys
from edgeml.core.strangers import find_stranger
from edgeml.core.url import Url

__all__ = [
    "NO_KEY",
    "client_context",
    "client_keys",
    "door_context",
    "explain_refusal",
    "read_keys",
    "server_context",
    "server_keys",
]

NO_KEY = "its TLS handshake failed: it has no keys, or those of another server"
"""Why a server refused who never got as far as a handshake of edgeml's."""

_MOMENT = 0.3  # seconds in which a server says that it refuses a certificate
_SILENT = "it closed the connection: it doesn't seem to know these keys"
_TELLS = {  # what alerts of TLS mean here, by a part of OpenSSL's name for each
    "CERTIFICATE_REQUIRED": "it asks for keys, and these have no certificate",
    "UNKNOWN_CA": "it doesn't know the authority of this certificate: these keys are another's",
    "DECRYPT_ERROR": "it doesn't know the authority of this certificate: these keys are another's",
    "CERTIFICATE_EXPIRED": "this certificate has expired: make another with `edgeml keygen`",
    "CERTIFICATE_REVOKED": "this certificate has been revoked",
}


def server_keys(url: Url, credentials: Credentials | None) -> tuple[TlsKeys, Keyring] | None:
    """What a server takes of its credentials; None if they have nothing to do with TLS.

    Raises:
        ValueError: they have no certificate, or don't say whom to let in; the text says what to do.
    """
    if credentials is None or (credentials.tls is None and credentials.clients is None):
        return None
    if credentials.tls is None:
        raise _without_certificate(url)
    if credentials.clients is None:
        raise ValueError(
            f"the credentials for {url} don't say whom to let in (clients=): give the directory "
            "that `edgeml keygen DIR` made"
        )
    return credentials.tls, credentials.clients


def client_keys(url: Url, credentials: Credentials | None) -> TlsKeys | None:
    """What a client takes of its credentials; None if they have nothing to do with TLS.

    Raises:
        ValueError: they have a token and no certificate, so that it would be read on its way.
    """
    if credentials is None:
        return None
    if credentials.tls is None and credentials.token is not None:
        raise _without_certificate(url)
    return credentials.tls


def _without_certificate(url: Url) -> ValueError:
    return ValueError(
        f"the credentials for {url} have no certificate (tls=), and {url.scheme} needs one: "
        "`edgeml keygen DIR` makes a server's, `edgeml keygen DIR --client NAME` a client's"
    )


def read_keys(keys: TlsKeys) -> tuple[bytes, bytes, bytes]:
    """The authority's certificate, one's own, and one's key, in PEM."""
    return keys.authority.read_bytes(), keys.certificate.read_bytes(), keys.key.read_bytes()


def server_context(keys: TlsKeys) -> ssl.SSLContext:
    """What a server needs for a connection: it asks for a certificate of its authority."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, keys)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # what is resumed would ask nobody for a certificate
    return context


def door_context(keys: TlsKeys) -> ssl.SSLContext:
    """What a door needs for a connection: its clients have no certificates, and show tokens."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, keys)
    # A client that reads in one thread and writes in another, as websockets' does, may lose what it
    # writes while a ticket comes: OpenSSL's connections are for one thread.
    context.num_tickets = 0
    return context


def client_context(keys: TlsKeys) -> ssl.SSLContext:
    """What a client needs for a connection, to be used with `SERVER_NAME` for the server's name."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, keys)


def _context(protocol: int, keys: TlsKeys) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(keys.certificate, keys.key)
        context.load_verify_locations(keys.authority)
    except ssl.SSLError as error:
        raise ValueError(
            f"{keys.certificate}, {keys.key} and {keys.authority} are no keys of one another: "
            f"{error}"
        ) from None
    return context


def explain_refusal(
    url: Url, keys: TlsKeys | None, greeting: bytes, timeout: float
) -> EdgemlError | None:
    """Find out whether keys are why no connection came about, by a connection that asks for them.

    Args:
        url: where to.
        keys: those that were used; None for none.
        greeting: how a server of this transport without keys begins what it says, as a regular
            expression; see `find_stranger`.
        timeout: seconds that all of it may take.

    Returns:
        The error to raise; None if nobody answers, or keys are not the reason.
    """
    deadline = Deadline(timeout)
    try:
        if keys is None:
            return _explain_no_keys(url, deadline)
        why = _ask(url, client_context(keys), deadline)
        if why == _SILENT:
            why = _check_own(keys) or why
    except (OSError, UnicodeError):
        return None
    if why is None:  # a server in clear text is to be told from what is no server of ours
        return find_stranger(url, greeting, deadline.left) or PermissionDenied(
            f"{url} speaks no TLS, and this client has keys, so that all would go in clear text: "
            "start the server with credentials=, or leave them out here"
        )
    return PermissionDenied(f"{url}: {why}") if why else None


def _explain_no_keys(url: Url, deadline: Deadline) -> EdgemlError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # for nothing is sent
    with _connect(url, deadline) as plain, context.wrap_socket(plain) as secured:
        certificate = secured.getpeercert(binary_form=True) or b""
    if SERVER_NAME.encode() not in certificate:
        return None
    return PermissionDenied(
        f"{url} asks for keys: give credentials=, the directory that `edgeml keygen DIR --client "
        "NAME` made for this client"
    )


def _ask(url: Url, context: ssl.SSLContext, deadline: Deadline) -> str | None:
    """Why whoever listens refuses these keys; "" if it doesn't, or doesn't tell; None if it speaks
    no TLS.

    Raises:
        OSError: nobody answers.
    """
    with _connect(url, deadline) as plain:
        try:
            secured = context.wrap_socket(plain, server_hostname=SERVER_NAME)
        except ssl.SSLCertVerificationError as error:
            return f"this isn't the server whose keys these are ({error.verify_message})"
        except TimeoutError:
            return ""
        except ssl.SSLError as error:
            return _read_alert(error)
        except ConnectionError:
            return None
        with secured:
            secured.settimeout(max(1e-3, min(_MOMENT, deadline.left)))
            try:
                # With TLS 1.3 a certificate is refused when the handshake is over for the client.
                said = secured.recv(1)
            except TimeoutError:
                return ""
            except ssl.SSLError as error:
                return _read_alert(error) or _SILENT
            except ConnectionError:
                said = b""
            return "" if said else _SILENT


def _check_own(keys: TlsKeys) -> str:
    """What is wrong with a client's certificate by itself: it is shown to its own authority."""
    theirs = server_context(keys)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.check_hostname = False
    ours.verify_mode = ssl.CERT_NONE
    ours.load_cert_chain(keys.certificate, keys.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (ours.wrap_bio(back, there), theirs.wrap_bio(there, back, server_side=True))
    for end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            advice = "; make another with `edgeml keygen`" if "expired" in str(error) else ""
            return f"this client's certificate is refused: {error.verify_message}{advice}"
    return ""


def _connect(url: Url, deadline: Deadline) -> socket.socket:
    return dial(url.host or "localhost", url.port, deadline)


def _read_alert(error: ssl.SSLError) -> str | None:
    """What an error of TLS tells of keys; None if it is no alert."""
    name = error.reason or ""
    told = next((text for part, text in _TELLS.items() if part in name), None)
    return told or (f"TLS fails: {name}" if "ALERT" in name else None)
