"""Several equal servers behind one client of each kind, over every transport."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    ConfigMismatch,
    Feature,
    InferenceClient,
    InferenceServer,
    PolicyContract,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    Unreachable,
    aio,
)
from edgeml.core import Place, Resolver
from edgeml.core import plugins as plugins_module
from edgeml.data import QueuedDataStore
from pairs import process, started, took, wait_until

PATIENCE = 20.0
NETWORKS = ["grpc", "shm", "ws", "zmq"]  # which lead to other processes

SERVER = """
import sys, time
from edgeml import InferenceServer

def count(payload, context):
    context.session["calls"] = context.session.get("calls", 0) + 1
    return context.session["calls"]

def work(payload):
    time.sleep(0.01)
    return payload

server = InferenceServer(0, transport=sys.argv[1], workers=8)
server.register_interface("work", work)
server.register_interface("count", count)
server.start(threaded=True)
print(server.url)
sys.stdin.read()
"""


class Caller:
    """Calls from a thread of its own until it is stopped, and keeps what was raised."""

    def __init__(self, client: InferenceClient, asynchronous: bool) -> None:
        self.answers = 0
        self.errors: list[Exception] = []
        self.slowest = 0.0
        self._asked = client
        self._ask = self._ask_async if asynchronous else self._ask_blocking
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _ask_blocking(self, value: int) -> None:
        assert self._asked.call("work", value, timeout=PATIENCE) == value

    def _ask_async(self, value: int) -> None:
        asked = [self._asked.call_async("work", value + i, timeout=PATIENCE) for i in range(3)]
        for i, future in enumerate(asked):
            self._take(future, value + i)

    def _take(self, future: Future, value: int) -> None:
        try:
            assert future.result(2 * PATIENCE) == value
        except Unreachable as error:
            self.errors.append(error)

    def _run(self) -> None:
        value = 0
        while not self._stopped.is_set():
            began = time.monotonic()
            value += 10
            try:
                self._ask(value)
                self.answers += 1
            except Exception as error:
                self.errors.append(error)
            self.slowest = max(self.slowest, time.monotonic() - began)

    def more(self, answers: int) -> None:
        before = self.answers
        wait_until(lambda: self.answers >= before + answers)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)


@pytest.mark.parametrize("transport", NETWORKS)
def test_a_server_that_is_killed_costs_only_what_was_under_way_in_it(transport):
    moves: list[tuple[str, str]] = []
    with ExitStack() as stack:
        programs = [stack.enter_context(process(SERVER, transport)) for _ in range(2)]
        urls = [program.line() for program in programs]
        client = stack.enter_context(InferenceClient(url=urls))
        robot = stack.enter_context(
            InferenceClient(url=urls, on_move=lambda old, new: moves.append((old, new)))
        )
        assert [robot.call("count", None) for _ in range(3)] == [1, 2, 3]
        (home,) = [i for i, url in enumerate(urls) if robot.stats()["servers"][url]["calls"]]
        callers = [Caller(client, asynchronous) for asynchronous in (False, False, True)]
        try:
            for each in callers:
                each.more(5)
            programs[home].signal(signal.SIGKILL)
            # Who asks just now may ask one that is there no more, and be told so.
            wait_until(lambda: robot.stats()["servers"][urls[home]]["state"] == "lost")
            assert robot.call("count", None, timeout=PATIENCE) == 1
            for each in callers:
                each.more(10)
        finally:
            for each in callers:
                each.stop()
        for each, most in zip(callers, (1, 1, 3), strict=True):
            assert len(each.errors) <= most
        for error in (error for each in callers for error in each.errors):
            assert isinstance(error, Unreachable)
            assert "may have been carried out" in str(error)
        wait_until(lambda: moves == [(urls[home], urls[1 - home])])
        counts = client.stats()["servers"]
        assert [counts[url]["state"] for url in urls].count("lost") == 1
        assert counts[urls[home]]["under_way"] == counts[urls[1 - home]]["under_way"] == 0


def test_what_was_under_way_is_told_at_once_and_what_was_not_is_answered(transport):
    entered: list[int] = []
    go_on = threading.Event()

    def stuck(number: int) -> None:
        entered.append(number)
        assert go_on.wait(PATIENCE)

    with ExitStack() as stack:
        made = [stack.enter_context(InferenceServer(0, transport=transport)) for _ in range(2)]
        for number, server in enumerate(made):
            server.register_interface("stuck", lambda payload, number=number: stuck(number))
            server.start(threaded=True)
        client = stack.enter_context(InferenceClient(url=[server.url for server in made]))
        asked = [client.call_async("stuck", None, timeout=PATIENCE) for _ in range(3)]
        wait_until(lambda: entered)
        (one,) = entered
        stopping = threading.Thread(target=made[one].stop)
        stopping.start()
        # The handler of the first runs there; the two behind it were refused, and go elsewhere.
        wait_until(lambda: 1 - one in entered)
        go_on.set()
        stopping.join(PATIENCE)
        for future in asked[1:]:
            assert future.result(PATIENCE) is None
        assert asked[0].done() or asked[0].result(PATIENCE) is None


def test_draining_loses_no_call(transport):
    with ExitStack() as stack:
        made = [stack.enter_context(InferenceServer(0, transport=transport)) for _ in range(2)]
        for server in made:
            server.register_interface("work", lambda payload: payload)
            server.start(threaded=True)
        urls = [server.url for server in made]
        busy, idle = (stack.enter_context(InferenceClient(url=urls)) for _ in range(2))
        callers = [Caller(busy, asynchronous) for asynchronous in (False, True)]
        try:
            for each in callers:
                each.more(10)
            with took(at_most=5.0):
                assert made[0].drain(PATIENCE)
            # Also who asked nothing knows, before the server has ended.
            assert idle.stats()["servers"][urls[0]]["state"] != "ready"
            for each in callers:
                each.more(10)
        finally:
            for each in callers:
                each.stop()
        assert [each.errors for each in callers] == [[], []]
        assert idle.call("work", 7) == 7


@pytest.mark.parametrize("transport", ["inproc", "zmq"])
def test_replacing_all_servers_one_by_one_loses_no_call(transport, listing):
    def serve() -> InferenceServer:
        server = InferenceServer(0, transport=transport)
        server.register_interface("work", lambda payload: payload)
        server.start(threaded=True)
        return server

    made = [serve() for _ in range(2)]
    listing.set(made)
    with InferenceClient(url="listing://policy") as client:
        callers = [Caller(client, asynchronous) for asynchronous in (False, True)]
        try:
            for _ in range(4):
                old = made.pop(0)
                made.append(serve())
                listing.set(made)
                for each in callers:
                    each.more(3)
                old.drain(PATIENCE)
        finally:
            for each in callers:
                each.stop()
            for server in made:
                server.stop()
        assert [each.errors for each in callers] == [[], []]


def test_a_contract_that_one_of_them_breaks_leaves_that_one_out():
    def contract(rows: int) -> PolicyContract:
        return PolicyContract(
            {"state": Feature((rows,), np.float32)}, {"action": Feature((2,), np.float32)}
        )

    def policy(observation):
        return {"action": np.zeros(2, np.float32)}

    with ExitStack() as stack:
        urls = []
        for rows in (3, 4, 4):
            server = stack.enter_context(InferenceServer(0, transport="inproc"))
            server.register_interface("policy", policy, contract=contract(rows))
            server.start(threaded=True)
            urls.append(server.url)
        with InferenceClient(url=urls, expect={"policy": contract(3)}) as client:
            for _ in range(10):
                client.call("policy", {"state": np.zeros(3, np.float32)})
            told = client.stats()["servers"]
            assert [told[url]["state"] for url in urls] == ["ready", "refused", "refused"]
            assert [told[url]["calls"] for url in urls] == [10, 0, 0]
        with pytest.raises(ConfigMismatch, match="state"):
            InferenceClient(url=urls[1:], expect={"policy": contract(3)})


# The other pairs --------------------------------------------------------------------------


def test_a_learners_client_stays_with_one_and_sends_the_next_what_it_holds():
    config = TrainerConfig()
    stores = [QueuedDataStore(100) for _ in range(2)]
    with ExitStack() as stack:
        made = [stack.enter_context(TrainerServer(config, url="inproc://")) for _ in range(2)]
        for server, store in zip(made, stores, strict=True):
            server.register_data_store("arm", store)
            server.start(threaded=True)
        own = QueuedDataStore(100)
        client = stack.enter_context(
            TrainerClient("arm", config=config, data_store=own, url=[s.url for s in made])
        )
        got: list[int] = []
        client.recv_network_callback(got.append)
        for number in range(5):
            own.insert({"x": number})
            client.update()
        assert sorted(len(store) for store in stores) == [0, 5]
        home = 0 if len(stores[0]) else 1
        made[home].stop()
        wait_until(lambda: client.stats()["servers"][made[1 - home].url]["state"] == "ready")
        own.insert({"x": 5})
        client.update()
        assert [item["x"] for item in stores[1 - home].get_latest_data(0)][-1] == 5
        made[1 - home].publish_network(7)
        wait_until(lambda: got[-1:] == [7])


def test_an_action_client_has_one_device_and_the_next_when_that_is_gone():
    config = ActionConfig(0, ["move"], ["joints"])
    done: list[int] = []
    with ExitStack() as stack:
        made = []
        for number in range(2):
            server = ActionServer(
                config,
                lambda keys, number=number: {"joints": number},
                lambda key, value, number=number: done.append(number),
                url="inproc://",
            )
            made.append(stack.enter_context(server))
            server.start(threaded=True)
        client = stack.enter_context(ActionClient(config=config, url=[s.url for s in made]))
        for _ in range(10):
            client.act("move")
        assert len(set(done)) == 1
        home = done[0]
        assert client.obs()["joints"] == home
        made[home].stop()
        client.act("move", timeout=PATIENCE)
        assert done[-1] == 1 - home


def test_a_client_for_asyncio_takes_several_as_well():
    import asyncio

    async def ask(urls: list[str]) -> list[int]:
        async with aio.InferenceClient(url=urls) as client:
            return [await client.call("double", i) for i in range(5)]

    with ExitStack() as stack:
        made = [stack.enter_context(InferenceServer(0, transport="inproc")) for _ in range(2)]
        for server in made:
            server.register_interface("double", lambda payload: 2 * payload)
            server.start(threaded=True)
        assert asyncio.run(ask([server.url for server in made])) == [0, 2, 4, 6, 8]


# How they are named -----------------------------------------------------------------------


@pytest.fixture
def listing(monkeypatch):
    """A resolver "listing", whose list a test sets."""

    class Listing(Resolver):
        name = "listing"
        asked: list[tuple[str, str]] = []  # noqa: RUF012

        def __init__(self) -> None:
            self.places: list[Place] = []
            self.tells: list = []

        def set(self, servers) -> None:
            self.places = [Place(server.url) for server in servers]
            for tell in list(self.tells):
                tell(self.places)

        def watch(self, url, tell, asker):
            self.asked.append((url.host, asker.service))
            tell(self.places)
            self.tells.append(tell)
            return lambda: self.tells.remove(tell) if tell in self.tells else None

    made = Listing()
    monkeypatch.setitem(plugins_module._loaded, ("resolver", "listing"), made)
    return made


def test_a_urls_scheme_may_be_a_resolvers(listing):
    with started(InferenceServer(0, transport="inproc")) as server:
        server.register_interface("double", lambda payload: 2 * payload)
        listing.set([server])
        with InferenceClient(url="listing://policy") as client:
            assert client.call("double", 4) == 8
            assert list(client.stats()["servers"]) == [server.url]
        assert listing.asked[-1] == ("policy", "inference")
        assert not listing.tells


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": []}, "a list of several"),
        ({"url": ["zmq://a:1", 7]}, "a list of several"),
        ({"url": 7}, "a list of several"),
        ({"url": (each for each in ())}, "a list of several"),
        ({"url": ["zmq://a:1", "nonsense"]}, "nonsense"),
        ({"url": ["zmq://a:1", "zmq://b"]}, "no port"),
        ({"url": ["zmq://a:1"], "host": "b"}, "'b' was given as well"),
        ({"url": "listing://a", "port_num": 5}, "5 was given as well"),
        ({"url": ["listing://a"]}, "give it alone"),
        ({"url": "listing://a,zmq://b:1"}, "give it alone"),
        ({"url": "zmq://b:1,listing://a"}, "give it alone"),
    ],
)
def test_addresses_that_are_none_are_refused_with_a_reason(listing, settings, message):
    with pytest.raises(ValueError, match=message):
        InferenceClient(**settings)


def test_each_of_a_list_may_have_several_ways():
    with started(InferenceServer(url="inproc://,zmq://127.0.0.1:0")) as server:
        server.register_interface("double", lambda payload: 2 * payload)
        ways = ",".join(["zmq://127.0.0.1:1", *server.urls()])
        with InferenceClient(url=[ways]) as client:
            assert client.call("double", 4) == 8
            assert list(client.stats()["servers"]) == [ways]


def test_what_gives_addresses_once_is_a_list_as_well():
    with started(InferenceServer(0, transport="inproc")) as server:
        urls = (each for each in [server.url])
        with InferenceClient(url=urls) as client:
            assert list(client.stats()["servers"]) == [server.url]


def test_one_server_has_no_statistics_of_several():
    server = InferenceServer(0, transport="inproc")
    with started(server), InferenceClient(url=server.url) as client:
        assert "servers" not in client.stats()
