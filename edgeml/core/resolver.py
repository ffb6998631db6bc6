"""The fourth kind of plugin: a resolver, which tells a client of the servers that there are.

A client that is given a URL whose scheme is a resolver's, ``"ray://policy"``, asks it which servers
stand behind that name, and is told anew whenever they change. The resolver opens no connection to
them and sees no call: `edgeml.core.pool` does all else, alike for every resolver, and for a list of
URLs, which is a resolver that tells once.

Publish a class through the entry-point group ``edgeml.resolvers`` whose module answers the hook
``edgeml_resolver``, and hold it to `edgeml.testing.ResolverTests` by subclassing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgeml.core.security import Credentials
from edgeml.core.url import Url

__all__ = ["Asker", "Place", "Resolver", "Tell", "Watch", "listed"]


@dataclass(frozen=True)
class Place:
    """One server, and what it is there for.

    Attributes:
        url: where it is, as a client is told: one URL, or several separated by commas, which are
            ways to this one server, and of which the first that answers is taken.
        calls: whether calls go to it.
        topics: whether subscriptions do.
    """

    url: str
    calls: bool = True
    topics: bool = True


@dataclass(frozen=True)
class Asker:
    """Who asks a resolver, so that it can tell each client of what is meant for it.

    Attributes:
        service: the kind of server that is wanted: ``"inference"``, ``"trainer"`` or ``"action"``.
        client_id: the client's identity.
        timeout: seconds that the resolver may take to tell of the servers that there are now.
        credentials: the client's keys; None where it has none.
    """

    service: str
    client_id: str
    timeout: float
    credentials: Credentials | None = None


Tell = Callable[[Sequence[Place]], None]
"""Is given all servers that there are; from any thread, and it returns quickly."""

Watch = Callable[[Tell, Asker], Callable[[], None]]
"""`Resolver.watch` of one URL: what a client of several servers is given."""


def listed(places: Sequence[Place]) -> Watch:
    """Return what tells of these servers, once."""

    def watch(tell: Tell, asker: Asker) -> Callable[[], None]:
        del asker
        tell(places)
        return lambda: None

    return watch


class Resolver(ABC):
    """One way of finding servers, chosen by a URL's scheme. Its instances hold no state."""

    name: ClassVar[str]
    """The URL scheme; the same as the entry point's name."""

    @abstractmethod
    def watch(self, url: Url, tell: Tell, asker: Asker) -> Callable[[], None]:
        """Tell of the servers behind a URL: now, and anew after each change.

        ``tell`` has been called once when this returns, with an empty list where there is no server
        at present. From then on it is called from any thread, each time with *all* servers; what a
        list leaves out is no longer used, so one that can't be asked anew is not told of as empty.

        Args:
            url: as the user wrote it.
            tell: takes the servers.
            asker: who wants to know.

        Returns:
            What ends it: called from any thread, more than once without harm. It frees everything
            and doesn't wait for long; ``tell`` may still be called while it runs, not afterwards.

        Raises:
            Unreachable: whoever knows of the servers can't be asked within ``asker.timeout``.
            PermissionDenied: it doesn't let this client ask.
            UnknownInterface: it knows of no such name; the text lists those known.
            ValueError: the URL says what this resolver has no meaning for.
        """
