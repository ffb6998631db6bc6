"""Certificates, as gRPC wants them, and who is at the other end by them."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import Any

import grpc

from edgeml.core import PermissionDenied
from edgeml.core.security import SERVER_NAME, ClientKey, Keyring, TlsKeys
from edgeml.core.tls import read_keys

__all__ = ["CHANNEL_OPTIONS", "Clients", "channel_credentials", "server_credentials"]

CHANNEL_OPTIONS = [("grpc.ssl_target_name_override", SERVER_NAME)]
"""By which a channel checks the server's certificate, whatever its host is called."""

_CERTIFICATE, _NAME = "x509_pem_cert", "x509_common_name"
_MOST_KNOWN = 1 << 12  # certificates that are looked up once

_Context = Any  # aio.ServicerContext; grpcio is published without types


def server_credentials(keys: TlsKeys, begin: Callable[[], object]) -> Any:
    """What a server's port is given: it takes clients with a certificate of its authority only.

    Args:
        keys: the server's.
        begin: is called as each handshake begins, in a thread of gRPC's.
    """
    authority, certificate, key = read_keys(keys)
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def fetch() -> None:  # no other certificate
        begin()

    return grpc.dynamic_ssl_server_credentials(
        configuration, fetch, require_client_authentication=True
    )


def channel_credentials(keys: TlsKeys) -> Any:
    """What a client's channel is given, beside `CHANNEL_OPTIONS`."""
    authority, certificate, key = read_keys(keys)
    return grpc.ssl_channel_credentials(authority, key, certificate)


class Clients:
    """Whose certificate a connection has; for the server's loop.

    Args:
        clients: whom the server lets in, now.
    """

    def __init__(self, clients: Keyring) -> None:
        self._clients = clients
        self._version = -1
        self._known: dict[bytes, ClientKey] = {}  # by certificate, as of that version

    def find(self, context: _Context) -> str:
        """Return the name of the client by whose connection a request came.

        Its certificate is looked at with each request, since the address of a connection may soon
        be another's, and a key may be revoked.

        Raises:
            PermissionDenied: it isn't let in, or no more.
        """
        proved = context.auth_context()
        certificates = proved.get(_CERTIFICATE)
        if not certificates:
            raise PermissionDenied("the connection has no certificate")
        certificate = certificates[0]
        version = self._clients.version
        if version != self._version or len(self._known) > _MOST_KNOWN:
            self._version = version
            self._known.clear()
        key = self._known.get(certificate)
        if key is None or (key.expires is not None and time.time() > key.expires):
            der = ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))
            try:
                key = self._known[certificate] = self._clients.by_certificate(der)
            except PermissionDenied as error:
                name = b", ".join(proved.get(_NAME, ())).decode("utf-8", "replace")
                raise PermissionDenied(f"{error}; it is {name!r}'s") from None
        return key.name
