"""Several servers behind one client of the core: which of them calls go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, contextmanager

import pytest

from edgeml.core.client import Client
from edgeml.core.dispatch import answer_with
from edgeml.core.resolver import Place, listed
from edgeml.core.server import Server
from edgeml.core.url import Url


def server_at(number: int, url: str = "inproc://") -> Server:
    server = Server("inference", [Url.parse(url)])
    server.register("who", answer_with(lambda payload, _: number))
    server.open()
    server.dispatcher.start()
    return server


@contextmanager
def servers(n: int):
    with ExitStack() as stack:
        yield [stack.enter_context(closing(server_at(number))) for number in range(n)]


def places(servers: Sequence[Server], **flags: bool) -> list[Place]:
    return [Place(str(server.urls[0]), **flags) for server in servers]


def client_of(servers: Sequence[Server], **settings) -> Client:
    return Client("inference", listed(places(servers)), **settings)


class List:
    """A list of servers that a test changes."""

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self.places = list(places)
        self.tells: list[Callable[[Sequence[Place]], None]] = []

    def watch(self, tell, asker):
        self.tells.append(tell)
        tell(self.places)
        return lambda: self.tells.remove(tell) if tell in self.tells else None

    def change(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        for tell in list(self.tells):
            tell(self.places)


def test_calls_go_to_all_servers_alike():
    with servers(3) as made, closing(client_of(made)) as client:
        asked = Counter(client.call("who", None) for _ in range(300))
        assert sorted(asked) == [0, 1, 2]
        assert min(asked.values()) > 50
        counts = client.stats()["servers"]
        assert sum(each["calls"] for each in counts.values()) == 300
        assert {each["state"] for each in counts.values()} == {"ready"}
        assert {each["under_way"] for each in counts.values()} == {0}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_list_that_changes(asynchronous):
    with servers(3) as made:
        one, two, three = places(made)
        known = List([one])
        with closing(Client("inference", known.watch)) as client:

            def asked() -> set[int]:
                if asynchronous:
                    return {future.result(5) for future in [client.call_async("who", None)] * 60}
                return {client.call("who", None) for _ in range(60)}

            assert asked() == {0}
            known.change([two])
            assert asked() == {1}
            known.change([two, three])
            known.change([three])
            assert asked() == {2}
        assert known.tells == []
