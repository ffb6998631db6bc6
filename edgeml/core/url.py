"""Addresses: ``scheme://host:port``, where the scheme is the transport's name."""

from __future__ import annotations

import ipaddress
import operator
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from edgeml.core.deadline import Deadline
from edgeml.core.dial import look_up

__all__ = [
    "AUTO",
    "DEFAULT_TRANSPORT",
    "Url",
    "find_address",
    "check_port",
    "is_loopback",
    "leads_to_loopback",
    "format_host",
    "tell_url",
    "require_no_path",
    "require_this_machine",
    "resolve",
]

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
        host: a host name or an address; may be empty. Brackets around it are taken off, and an
            IPv6 address may have a zone (``"fe80::1%eth0"``).
        port: 0 lets the system pick one when serving.
        path: what follows, with its slash, for transports that are reached by a file; else empty.
    """

    scheme: str
    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        """Take the brackets off an address."""
        if self.host.startswith("[") and self.host.endswith("]"):
            object.__setattr__(self, "host", self.host[1:-1])

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read ``scheme://host:port/path``; raise ValueError that says what is wrong with it."""
        if not text.isprintable():  # a line feed, say, which Python would leave away
            raise ValueError(f"{text!r} has characters in it that can't be seen; take them out")
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
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def leads_to_loopback(url: Url, deadline: Deadline) -> bool:
    """Whether a client that connects to a URL stays within this machine, by whatever name; False
    where that isn't known by the deadline.
    """
    if is_loopback(url.host or "localhost"):
        return True
    try:
        found = look_up(url.host, url.port, deadline)
    except (OSError, UnicodeError):
        return False
    return all(is_loopback(str(entry[4][0])) for entry in found)


def require_no_path(url: Url) -> None:
    """Raise a ValueError for a URL with a path, for a transport whose addresses have none."""
    if url.path:
        raise ValueError(
            f"{url} has the path {url.path!r}, and {url.scheme} is reached by a host and a port: "
            f"write {url.scheme}://host:port"
        )


def require_this_machine(host: str, deadline: Deadline) -> None:
    """Raise an OSError, which says why, for a host that is not this machine by any of its names, or
    isn't known to be by the deadline.
    """
    if host in ("", "localhost", "127.0.0.1", "0.0.0.0", "::", "::1", socket.gethostname()):
        return
    try:
        family, _, _, _, address = look_up(host, 0, deadline)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)  # which works for this machine's addresses alone
    except UnicodeError as error:
        raise OSError(f"no host has such a name: {error}") from None


def find_address(url: Url) -> str:
    """Return the numeric address to listen at, IPv4 where there is a choice; IPv6 has brackets, and
    its zone where it needs one.

    Raises:
        OSError: the host has no address; the text names the URL.
    """
    try:
        found = socket.getaddrinfo(url.host or "0.0.0.0", url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot serve {url}: {error}") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1
    address = format_host(found[0][4])
    return f"[{address}]" if ":" in address else address


def format_host(address: tuple[Any, ...]) -> str:
    """Return the host of a socket's address, with the zone in which an IPv6 one is meant."""
    host = str(address[0])
    zone = address[3] if len(address) > 3 else 0
    if not zone or "%" in host:
        return host
    return f"{host}%{socket.if_indextoname(zone)}"


def tell_url(url: Url, address: str, port: int) -> Url:
    """Return where peers reach who listens at an address and port, which need not be the same."""
    host = socket.gethostname() if address in ("0.0.0.0", "[::]") else url.host
    return Url(url.scheme, host, port)


def _expand(url: Url) -> list[Url]:
    if url.scheme != AUTO:
        return [url]
    return [replace(url, scheme=scheme) for scheme in _NEAREST_FIRST]


def check_port(port: object) -> int:
    """Return a port that a user gave as the integer it is, numpy's included.

    Raises:
        ValueError: it isn't one; the text says what to do.
    """
    try:
        number = operator.index(port)  # type: ignore[arg-type]  # numpy's integers, too
    except TypeError:
        if isinstance(port, str) and port.strip().isdecimal():
            raise ValueError(f"port is the text {port!r}; give it as a number: {port}") from None
        raise ValueError(f"port must be a whole number from 0 to 65535, not {port!r}") from None
    if not 0 <= number < 1 << 16:
        raise ValueError(f"port must be from 0 to 65535, not {number}")
    return number


def _check_host(host: object) -> str:
    if not isinstance(host, str):
        raise ValueError(
            f"host must be a name or an address as text, not {host!r}; leave it out for this "
            "machine"
        )
    if "/" in host:
        raise ValueError(
            f"host {host!r} is more than a name or an address; give a URL as transport=, "
            "as in transport='zmq://host:port'"
        )
    name, colon, port = host.rpartition(":")
    if colon and (":" not in name or name.endswith("]")):
        raise ValueError(
            f"host {host!r} names a port as well; give them apart: host={name!r}, port={port or 0}"
        )
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


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
        ValueError: a URL contradicts ``host`` or ``port``, or isn't one; or the host is none, or
            the port.
    """
    host, port = _check_host(host), check_port(port)
    text = transport or os.environ.get("EDGEML_TRANSPORT") or DEFAULT_TRANSPORT
    urls = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if "://" not in name:
            urls += _expand(Url(name, host, port))
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
        urls += _expand(url)
    if not urls:
        raise ValueError(f"transport {text!r} names no transport")
    return urls
