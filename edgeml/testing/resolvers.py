"""What every resolver promises: subclass `ResolverTests` to hold one of your own to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from edgeml.core.errors import EdgemlError, Unreachable
from edgeml.core.resolver import Asker, Place, Resolver
from edgeml.core.url import Url
from edgeml.testing.ends import until

__all__ = ["ResolverTests"]

_LISTS: tuple[list[int], ...] = ([1], [1, 2, 3], [3, 1], [], [2])  # of servers, one after another
_TIMEOUT = 20.0  # seconds


class _Told:
    """What a resolver has told, in the order in which it did."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []

    def __call__(self, places: Sequence[Place]) -> None:
        assert all(isinstance(place, Place) for place in places), places
        self.lists.append(sorted(place.url for place in places))

    @property
    def last(self) -> list[str] | None:
        return self.lists[-1] if self.lists else None

    def comes_to(self, wanted: list[str]) -> bool:
        return until(lambda: self.last == wanted, _TIMEOUT)


class ResolverTests:
    """The conformance suite of resolvers, for pytest.

    ::

        class TestMyResolver(ResolverTests):
            resolver = MyResolver()
            known = Url.parse("mine://policy")

            def set_servers(self, urls):
                registry["policy"] = urls

    A subclass may start what its resolver asks in a fixture of its own, with ``autouse=True``.

    Attributes:
        resolver: what is tested.
        known: a URL that it can resolve; an instance's, where a fixture makes it.
        nobody: a URL where whoever knows the servers can't be asked; None where there is no such.
    """

    resolver: Resolver
    known: Url
    nobody: Url | None = None

    def set_servers(self, urls: Sequence[str]) -> None:
        """Have these be all servers behind `known`, from now on."""
        raise NotImplementedError

    def asker(self, client_id: str = "robot-7", timeout: float = _TIMEOUT) -> Asker:
        """Return who asks: a client of an inference server."""
        return Asker("inference", client_id, timeout)

    @pytest.fixture
    def watching(self) -> Iterator[Callable[[Callable[[Sequence[Place]], None]], object]]:
        """Gives a function that has the resolver tell another of `known`, until the test ends."""
        stops: list[Callable[[], None]] = []

        def watch(tell: Callable[[Sequence[Place]], None]) -> Callable[[], None]:
            stops.append(self.resolver.watch(self.known, tell, self.asker()))
            return stops[-1]

        yield watch
        for stop in stops:
            stop()

    def test_its_name_is_the_scheme(self) -> None:
        """A resolver is found by its URL's scheme."""
        assert self.resolver.name == self.known.scheme

    def test_it_has_told_when_it_returns(
        self, watching: Callable[[_Told], Callable[[], None]]
    ) -> None:
        """Who asks knows the servers when `watch` has returned."""
        self.set_servers(_urls([1, 2]))
        assert until(lambda: self._ask() == _urls([1, 2]), _TIMEOUT)
        told = _Told()
        watching(told)
        assert told.last == _urls([1, 2])

    def test_it_tells_each_change_in_full(
        self, watching: Callable[[_Told], Callable[[], None]]
    ) -> None:
        """After each change all servers are told, those that stayed among them, or none."""
        told, other = _Told(), _Told()
        watching(told)
        watching(other)
        for numbers in _LISTS:
            wanted = _urls(numbers)
            self.set_servers(wanted)
            assert told.comes_to(wanted), told.lists
            assert other.comes_to(wanted), other.lists

    def test_nothing_is_told_once_it_is_stopped(
        self, watching: Callable[[_Told], Callable[[], None]]
    ) -> None:
        """Who has stopped watching hears no more, and may stop again, while others go on."""
        self.set_servers(_urls([1]))
        stopped, other = _Told(), _Told()
        stop = watching(stopped)
        watching(other)
        began = time.monotonic()
        stop()
        stop()
        assert time.monotonic() - began < _TIMEOUT / 2
        before = len(stopped.lists)
        self.set_servers(_urls([2, 3]))
        assert other.comes_to(_urls([2, 3]))
        assert len(stopped.lists) == before

    def test_who_is_told_may_stop_it(
        self, watching: Callable[[Callable[[Sequence[Place]], None]], Callable[[], None]]
    ) -> None:
        """A client that is told may just be closing; neither waits for the other."""
        self.set_servers(_urls([1]))
        stop: list[Callable[[], None]] = []
        done = threading.Event()

        def tell(places: Sequence[Place]) -> None:
            if stop:
                stop[0]()
                done.set()

        stop.append(watching(tell))
        self.set_servers(_urls([2]))
        assert done.wait(_TIMEOUT)

    def test_who_cannot_be_asked_is_unreachable_in_time(self) -> None:
        """An error of ours says so, within the seconds that the asker has."""
        if self.nobody is None:
            pytest.skip("there is nobody who could be away")
        began = time.monotonic()
        told = _Told()
        with pytest.raises(Unreachable):
            self.resolver.watch(self.nobody, told, self.asker(timeout=2.0))
        assert time.monotonic() - began < 2.0 + _TIMEOUT / 2
        assert not told.lists

    def test_a_url_that_means_nothing_is_refused(self) -> None:
        """What is no address of its kind raises a ValueError or one of our own errors."""
        wrong = Url(self.known.scheme, "", 0, "/" + "x" * 300)
        with pytest.raises((ValueError, EdgemlError)):
            self.resolver.watch(wrong, _Told(), self.asker(timeout=2.0))

    def _ask(self) -> list[str] | None:
        told = _Told()
        self.resolver.watch(self.known, told, self.asker())()
        return told.last


def _urls(numbers: Sequence[int]) -> list[str]:
    return [f"zmq://127.0.0.1:{number}" for number in sorted(numbers)]
