"""The suite of resolvers: who keeps its promises passes, and others fail, by one test each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from edgeml import Unreachable
from edgeml.core.resolver import Asker, Place, Resolver
from edgeml.core.url import Url
from edgeml.testing import ResolverTests


class Registry(Resolver):
    """Tells of what is set; in the thread that sets it."""

    name = "registry"

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.places: list[Place] = []
        self.tells: list[Callable[[Sequence[Place]], None]] = []

    def set(self, urls: Sequence[str]) -> None:
        with self.lock:
            self.places = [Place(url) for url in urls]
            for tell in list(self.tells):
                tell(self.places)

    def watch(self, url: Url, tell, asker: Asker) -> Callable[[], None]:
        if url.path:
            raise ValueError(f"{url} has a path")
        if url.host == "nobody":
            raise Unreachable("nobody is there")
        with self.lock:
            tell(self.places)
            self.tells.append(tell)
        return lambda: self.tells.remove(tell) if tell in self.tells else None


class TestRegistry(ResolverTests):
    resolver = Registry()
    known = Url.parse("registry://policy")
    nobody = Url.parse("registry://nobody")

    def set_servers(self, urls: Sequence[str]) -> None:
        self.resolver.set(urls)


# Broken ones ------------------------------------------------------------------------------


class Late(Registry):
    def watch(self, url, tell, asker):
        stop = super().watch(url, lambda places: None, asker)
        threading.Timer(0.1, lambda: tell(self.places)).start()
        return stop


class OnlyNew(Registry):
    def watch(self, url, tell, asker):
        known: set[Place] = set()

        def only_new(places: Sequence[Place]) -> None:
            tell([place for place in places if place not in known])
            known.update(places)

        return super().watch(url, only_new, asker)


class Once(Registry):
    def watch(self, url, tell, asker):
        tell(self.places)
        return lambda: None


class OneOnly(Registry):
    def watch(self, url, tell, asker):
        self.tells.clear()
        return super().watch(url, tell, asker)


class Unstoppable(Registry):
    def watch(self, url, tell, asker):
        super().watch(url, tell, asker)
        return lambda: None


class StopsAll(Registry):
    def watch(self, url, tell, asker):
        super().watch(url, tell, asker)
        return self.tells.clear


class StopsOnce(Registry):
    def watch(self, url, tell, asker):
        super().watch(url, tell, asker)
        return lambda: self.tells.remove(tell)


class Locks(Registry):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def watch(self, url, tell, asker):
        super().watch(url, tell, asker)

        def stop() -> None:
            if self.lock.acquire(timeout=0.5):
                self.lock.release()
            else:
                raise RuntimeError("it waits for ever")

        return stop


class Empty(Registry):
    def watch(self, url, tell, asker):
        try:
            return super().watch(url, tell, asker)
        except Unreachable:
            tell([])
            return lambda: None


class Lenient(Registry):
    def watch(self, url, tell, asker):
        return super().watch(Url(url.scheme, url.host), tell, asker)


class Nameless(Registry):
    name = "other"


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        (Nameless, "its_name_is_the_scheme"),
        (Late, "it_has_told_when_it_returns"),
        (OnlyNew, "it_tells_each_change_in_full"),
        (Once, "it_tells_each_change_in_full"),
        (OneOnly, "it_tells_each_change_in_full"),
        (Unstoppable, "nothing_is_told_once_it_is_stopped"),
        (StopsAll, "nothing_is_told_once_it_is_stopped"),
        (StopsOnce, "nothing_is_told_once_it_is_stopped"),
        (Locks, "who_is_told_may_stop_it"),
        (Empty, "who_cannot_be_asked_is_unreachable_in_time"),
        (Lenient, "a_url_that_means_nothing_is_refused"),
    ],
)
def test_a_promise_that_is_broken_fails_its_test(broken, caught, monkeypatch):
    monkeypatch.setattr("edgeml.testing.resolvers._TIMEOUT", 0.5)
    suite = TestRegistry()
    suite.resolver = broken()
    method = getattr(suite, f"test_{caught}")

    def watching(tell: Callable[[Sequence[Place]], None]) -> Callable[[], None]:
        return suite.resolver.watch(suite.known, tell, suite.asker())

    arguments = [watching] if "watching" in method.__code__.co_varnames[:2] else []
    with pytest.raises((AssertionError, ValueError, RuntimeError, pytest.fail.Exception)):
        method(*arguments)
