"""Addresses: ``scheme://host:port``, where the scheme is the transport's name."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

__all__ = ["AUTO", "DEFAULT_TRANSPORT", "Url", "bindable", "is_loopback", "reached", "resolve"]

DEFAULT_TRANSPORT = "zmq"
AUTO = "auto"
"""Stands for the nearest first: shared memory where the server is on this machine and offers it,
else the network."""
_NEAREST_FIRST = ("shm", DEFAULT_TRANSPORT)


_UNSAID = ("", "127.0.0.1")  # the services' defaults; to give one contradicts nothing


@dataclass(frozen=True, slots=True)
class Url:
    """Where an endpoint is.

    Attributes:
        scheme: the transport's name.
        host: a host name or an address, without brackets; may be empty.
        port: 0 lets the system pick one when serving.
        path: what follows, with its slash, for transports that are reached by a file; else empty.
    """

    scheme: str
    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read ``scheme://host:port/path``; raise ValueError that says what is wrong with it."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        if not parts.scheme or "://" not in text:
            raise ValueError(f"{text!r} is not a URL; write it as 'zmq://host:port'")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{text!r} says more than scheme, host, port and path")
        path = "" if parts.path == "/" else parts.path
        return cls(parts.scheme, parts.hostname or "", port or 0, path)

    def with_port(self, port: int) -> Url:
        """The same address with another port."""
        return replace(self, port=port)

    def with_host(self, host: str) -> Url:
        """The same address with another host."""
        return replace(self, host=host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port or not self.path else ""
        return f"{self.scheme}://{host}{port}{self.path}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays within this machine."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def bindable(url: Url) -> str:
    """The numeric address to listen at, with brackets if need be; IPv4 where there is a choice.

    Raises:
        OSError: the host has no address; the text names the URL.
    """
    try:
        found = socket.getaddrinfo(url.host or "0.0.0.0", url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot serve {url}: {error}") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1
    address = str(found[0][4][0])
    return f"[{address}]" if ":" in address else address


def reached(url: Url, address: str, port: int) -> Url:
    """Where peers reach who listens at an address and port: what one listens on need not be it."""
    host = socket.gethostname() if address in ("0.0.0.0", "[::]") else url.host
    return Url(url.scheme, host, port)


def _each(url: Url) -> list[Url]:
    if url.scheme != AUTO:
        return [url]
    return [replace(url, scheme=scheme) for scheme in _NEAREST_FIRST]


def resolve(transport: str | None, host: str, port: int) -> list[Url]:
    """Turn what a user gives to a service into addresses.

    Args:
        transport: a name (``"zmq"``), a URL (``"zmq://host:port"``), several of them separated by
            commas, or None for ``$EDGEML_TRANSPORT``, which defaults to ``"zmq"``. The name
            ``"auto"`` is short for ``"shm,zmq"``, in a URL as well: a server listens at both, and a
            client takes the first that answers.
        host: the host, where the transport names none.
        port: the port, where the transport names none; 0 if it doesn't matter.

    Returns:
        One `Url` for each transport named.

    Raises:
        ValueError: a URL contradicts ``host`` or ``port``, or isn't one.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port must be from 0 to 65535, not {port}")
    text = transport or os.environ.get("EDGEML_TRANSPORT") or DEFAULT_TRANSPORT
    urls = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if "://" not in name:
            urls += _each(Url(name, host, port))
            continue
        url = Url.parse(name)
        if url.port and port and url.port != port:
            raise ValueError(
                f"transport {name!r} says port {url.port}, but port {port} was given as well; "
                "give one of them"
            )
        if url.host and host not in (url.host, *_UNSAID):
            raise ValueError(
                f"transport {name!r} says host {url.host}, but host {host} was given as well; "
                "give one of them"
            )
        if not url.path:
            url = Url(url.scheme, url.host or host, url.port or port)
        urls += _each(url)
    if not urls:
        raise ValueError(f"transport {text!r} names no transport")
    return urls
