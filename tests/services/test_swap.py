"""Functions that are replaced while they are called, and what replies tell of how they came."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from edgeml import InferenceClient, InferenceServer, RemoteError, Timing, UnknownInterface
from edgeml.services.batching import Batching
from pairs import started, wait_until

PATIENCE = 20.0
CLIENTS = 16
SWAPS = 1000


def client_of(server, **settings) -> InferenceClient:
    return InferenceClient(url=server.url, **settings)


class Version:
    """A function that answers by its number, computed in several steps that a mixture would mix."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, payload):
        began = self.number
        middle = payload * 0 + self.number
        return {"began": payload * 0 + began, "middle": middle, "ended": payload * 0 + self.number}


def any_failed(callers: list[Future[Any]]) -> bool:
    """Raise what one of them has raised, before it is over."""
    for caller in callers:
        if caller.done():
            caller.result()
    return False


@pytest.mark.parametrize("batching", [None, Batching(max_size=8)], ids=["single", "batched"])
def test_a_thousand_swaps_under_load_lose_no_call_and_mix_none(transport, batching):
    server = InferenceServer(0, transport=transport)
    server.register_interface("policy", Version(1), batching=batching)
    over = threading.Event()
    answered = threading.Semaphore(0)

    def call() -> tuple[int, int, int]:
        """Until it is over, and once more; returns the first and last version, and the calls."""
        versions = []
        with client_of(server) as client:
            last = False
            while not last:
                last = over.is_set()
                result, timing = client.call("policy", np.ones(3), timing=True)
                assert {int(v) for each in result.values() for v in each} == {timing.version}
                versions.append(timing.version)
                if len(versions) == 1:
                    answered.release()
        assert versions == sorted(versions)
        return versions[0], versions[-1], len(versions)

    with started(server), ThreadPoolExecutor(CLIENTS) as pool:
        callers = [pool.submit(call) for _ in range(CLIENTS)]
        try:
            for _ in callers:
                wait_until(lambda: answered.acquire(blocking=False) or any_failed(callers))
            for number in range(2, SWAPS + 2):
                assert server.swap("policy", Version(number)) == number
                if number % 100 == 0:  # so that calls come between
                    before = server.stats()["calls"]
                    wait_until(lambda: server.stats()["calls"] > before + CLIENTS)  # noqa: B023
        finally:
            over.set()  # or they would call for ever
        results = [caller.result(60) for caller in callers]
        calls = server.stats()["calls"]
    assert calls == sum(count for _, _, count in results)
    assert all(first < SWAPS and last == SWAPS + 1 for first, last, _ in results)


def test_a_swap_may_change_what_a_function_is_told_and_its_caller_sees_the_version(transport):
    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("policy", lambda payload: payload)
        with client_of(server, client_id="me") as client:
            assert client.call("policy", 1, timing=True)[1].version == 1
            assert server.swap("policy", lambda payload, context: context.client_id) == 2
            result, timing = client.call("policy", 1, timing=True)
            assert (result, timing.version) == ("me", 2)
            with pytest.raises(TypeError):
                server.swap("policy", None)
            with pytest.raises(UnknownInterface, match="policy"):
                server.swap("polcy", abs)
            assert client.call("policy", 1) == "me"


def test_a_call_that_is_under_way_is_answered_by_the_function_it_began_with(transport):
    entered, go_on = threading.Event(), threading.Event()

    def old(payload):
        entered.set()
        assert go_on.wait(PATIENCE)
        return "old"

    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("policy", old)
        with client_of(server) as client:
            first = client.call_async("policy", None)
            assert entered.wait(PATIENCE)
            second = client.call_async("policy", None)
            server.swap("policy", lambda payload: "new")
            go_on.set()
            assert (first.result(PATIENCE), first.timing.version) == ("old", 1)
            assert (second.result(PATIENCE), second.timing.version) == ("new", 2)


def test_a_decorated_function_is_registered_and_stays_as_it_is(transport):
    with started(InferenceServer(0, transport=transport)) as server:

        @server.register_interface("double")
        def double(payload):
            return 2 * payload

        assert double(4) == 8
        with client_of(server) as client:
            assert client.call("double", 4) == 8
        with pytest.raises(ValueError, match="already"):
            server.register_interface("double")(abs)
        with pytest.raises(ValueError, match="/x"):
            server.register_interface("/x")
        with pytest.raises(TypeError, match="async def"):

            @server.register_interface("later")
            async def later(payload):
                return payload


# Timing -----------------------------------------------------------------------------------


def test_a_reply_tells_how_long_the_call_waited_and_was_computed(transport):
    go_on = threading.Event()

    def slow(payload):
        assert go_on.wait(PATIENCE)
        time.sleep(0.1)
        return payload

    with started(InferenceServer(0, transport=transport)) as server, ThreadPoolExecutor(1) as pool:
        server.register_interface("slow", slow)
        with client_of(server) as client:
            began = time.monotonic()
            futures = [client.call_async("slow", n) for n in range(2)]
            wait_until(lambda: server.stats().get("calls") == 1)
            wait_until(lambda: server.stats()["waiting"] == 1)
            third = pool.submit(client.call, "slow", 2, timing=True)
            wait_until(lambda: server.stats()["waiting"] == 2)
            time.sleep(0.1)  # which two of them wait, and one is computed
            go_on.set()
            result, timing = third.result(PATIENCE)
            took = time.monotonic() - began
            assert result == 2
            assert isinstance(timing, Timing)
            assert (timing.version, timing.batch_size) == (1, 1)
            assert 0.1 <= timing.compute < took
            assert 0.3 <= timing.queue < took
            assert timing.queue + timing.compute <= timing.round_trip <= took
            first, second = (future.timing for future in futures if future.result(PATIENCE) >= 0)
            assert first.compute >= 0.2
            assert second.compute >= 0.1
            assert first.queue + first.compute < took
            assert client.call("slow", 3) == 3  # nobody has to look


def test_the_timing_is_there_when_a_futures_callbacks_run(transport):
    seen = []
    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("echo", lambda payload: payload)
        server.register_interface("fail", lambda payload: 1 / 0)
        with client_of(server) as client:
            future = client.call_async("echo", 1)
            future.add_done_callback(lambda done: seen.append(done.timing.version))
            assert future.result(PATIENCE) == 1
            wait_until(lambda: seen == [1])
            with pytest.raises(RemoteError):
                client.call("fail", None, timing=True)


def test_the_timing_of_a_batch_tells_its_size(transport):
    entered, go_on = threading.Semaphore(0), threading.Event()

    def policy(batch):
        entered.release()
        assert go_on.wait(PATIENCE)
        return batch

    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("policy", policy, batching=Batching(max_size=4))
        clients = [client_of(server) for _ in range(5)]
        try:
            first = clients[0].call_async("policy", 1.0)
            assert entered.acquire(timeout=PATIENCE)
            others = [client.call_async("policy", 1.0) for client in clients[1:]]
            wait_until(lambda: server.stats()["waiting"] == 4)
            go_on.set()
            assert first.result(PATIENCE) == 1.0
            assert all(future.result(PATIENCE) == 1.0 for future in others)
            assert first.timing.batch_size == 1
            assert [future.timing.batch_size for future in others] == [4] * 4
            assert all(future.timing.queue > 0 for future in others)
        finally:
            for client in clients:
                client.stop()
