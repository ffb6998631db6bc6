"""What publications promise: the latest value, in order, whoever is late, slow or gone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Closed,
    DeadlineExceeded,
    NotEncodable,
    Overloaded,
    UnknownInterface,
    Unreachable,
)
from edgeml.core import wire
from pairs import no_thread_left, plain_client, process, started, threads, took, wait_until


def new_server(transport, port=0, keep=1, act=None) -> ActionServer:
    config = ActionConfig(port, ["move"], transport=transport)
    return ActionServer(config, None, act or (lambda key, payload: payload), keep=keep)


@pytest.fixture
def server(transport):
    with started(new_server(transport)) as server:
        yield server


@contextlib.contextmanager
def connected(server, transport, **kwargs):
    config = ActionConfig(server.port, ["move"], transport=transport)
    with ActionClient("127.0.0.1", config=config, **kwargs) as client:
        yield client


class Subscriber:
    """Notes what it gets, and can be held up."""

    def __init__(self, held: bool = False) -> None:
        self.seen: list = []
        self.entered = threading.Event()
        self._open = threading.Event()
        if not held:
            self._open.set()

    def __call__(self, value) -> None:
        self.seen.append(value)
        self.entered.set()
        assert self._open.wait(60)

    def hold(self) -> None:
        self._open.clear()
        self.entered.clear()

    def let_go(self) -> None:
        self._open.set()

    def has(self, value):
        return lambda: bool(self.seen) and self.seen[-1] == value


def rss() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Who gets what --------------------------------------------------------------------------------


def test_one_who_comes_after_the_only_publication_gets_it(server, transport):
    assert server.publish_obs({"cam": np.arange(3)}) == 1
    with connected(server, transport) as client:
        got = Subscriber()
        with took(at_most=2.5):  # sooner than after a heartbeat
            subscription = client.register_obs_callback(got)
            assert got.entered.wait(20)
        assert got.seen[0]["cam"].tolist() == [0, 1, 2]
        assert subscription.version[1] == 1
        assert subscription.missed == 0


def test_what_is_published_before_the_start_is_there_after_it(transport):
    with new_server(transport) as server:
        assert [server.publish_obs(n) for n in range(3)] == [1, 2, 3]
        server.start(threaded=True)
        with connected(server, transport) as client:
            got = Subscriber()
            client.register_obs_callback(got)
            wait_until(got.has(2))
        assert got.seen == [2]


def test_publications_are_numbered_and_arrive_within_a_moment(server, transport):
    with connected(server, transport) as client:
        got = Subscriber()
        subscription = client.register_obs_callback(got)
        for n in range(1, 21):
            with took(at_most=2.5):
                assert server.publish_obs(n) == n
                wait_until(got.has(n))
        assert got.seen == list(range(1, 21))
        with plain_client(server) as other:
            assert subscription.version == (other.epoch, 20)
        assert (subscription.received, subscription.missed, subscription.errors) == (20, 0, 0)


def test_publishing_after_the_stop_is_closed(server, transport):
    server.stop()
    with pytest.raises(Closed, match="stopped"):
        server.publish_obs(1)


def test_a_value_that_cannot_be_carried_is_refused_and_takes_no_number(server, transport):
    with connected(server, transport) as client:
        got = Subscriber()
        client.register_obs_callback(got)
        with pytest.raises(NotEncodable, match=r"\['cam'\]"):
            server.publish_obs({"cam": object()})
        assert server.publish_obs("fine") == 1
        wait_until(got.has("fine"))


def test_publishing_to_nobody_costs_no_memory(server):
    frame = np.zeros(1_000_000, np.uint8)
    for _ in range(20):
        server.publish_obs(frame)
    before = rss()
    for _ in range(300):
        server.publish_obs(frame)
    assert rss() - before < 50e6


def test_every_subscriber_gets_every_publication_that_it_has_time_for(server, transport):
    with contextlib.ExitStack() as stack:
        everybody = []
        for _ in range(4):
            client = stack.enter_context(connected(server, transport))
            for _ in range(2):  # two on one client are two subscribers
                everybody.append(Subscriber())
                client.register_obs_callback(everybody[-1])
        for n in range(1, 11):
            server.publish_obs(n)
            for each in everybody:
                wait_until(each.has(n))
        assert all(each.seen == list(range(1, 11)) for each in everybody)


def test_a_subscriber_that_is_slow_delays_no_other(server, transport):
    with connected(server, transport) as client, connected(server, transport) as other:
        slow, quick, third = Subscriber(held=True), Subscriber(), Subscriber()
        client.register_obs_callback(slow)
        client.register_obs_callback(quick)
        other.register_obs_callback(third)
        for n in range(1, 31):
            server.publish_obs(n)
            wait_until(quick.has(n))
            wait_until(third.has(n))
            assert client.act("move", n) == n
        assert slow.seen == [1]
        slow.let_go()
        wait_until(slow.has(30))


def test_arrays_that_arrive_are_read_only_unless_asked_otherwise(server, transport):
    with (
        connected(server, transport) as client,
        connected(server, transport, writable=True) as writer,
    ):
        reads, writes = Subscriber(), Subscriber()
        client.register_obs_callback(reads)
        writer.register_obs_callback(writes)
        for size in (10, 1_000_000):
            reads.entered.clear()
            writes.entered.clear()
            server.publish_obs(np.zeros(size, np.uint8))
            assert reads.entered.wait(20)
            assert writes.entered.wait(20)
            assert not reads.seen[-1].flags.writeable
            writes.seen[-1][:] = 1
            assert reads.seen[-1].max() == 0


# Slow subscribers -----------------------------------------------------------------------------


def test_a_slow_subscriber_gets_the_latest_and_not_the_backlog(server, transport):
    with connected(server, transport) as client:
        times = {}

        def slow(n) -> None:
            times[n] = time.monotonic()
            time.sleep(0.1)

        subscription = client.register_obs_callback(slow)
        for n in range(1, 101):
            server.publish_obs(n)
            time.sleep(0.002)  # a camera's pace, not a wait for something
        published = time.monotonic()
        wait_until(lambda: 100 in times)
        assert times[100] - published < 2.5  # the backlog would take 10 s
        assert len(times) < 60  # a few, unless publishing takes a busy machine seconds
        assert list(times) == sorted(times)
        assert subscription.received == len(times)
        assert subscription.received + subscription.missed == 100 - min(times) + 1


def test_one_that_was_held_up_skips_to_the_newest_at_once(server, transport):
    with connected(server, transport) as client:
        got = Subscriber(held=True)
        subscription = client.register_obs_callback(got)
        server.publish_obs(1)
        assert got.entered.wait(20)
        for n in range(2, 101):
            server.publish_obs(n)
        got.let_go()
        with took(at_most=2.5):
            wait_until(got.has(100))
        assert got.seen == [1, 100]
        assert subscription.missed == 98


def test_missed_publications_are_counted_exactly_however_many_requests_are_under_way(
    server, transport
):
    with connected(server, transport) as client:
        got = Subscriber()
        subscription = client.register_obs_callback(got)
        subscription._credits = 8  # as many as a long round trip would have made it
        server.publish_obs(1)
        wait_until(got.has(1))
        got.hold()
        server.publish_obs(2)
        assert got.entered.wait(20)
        for n in range(3, 31):
            server.publish_obs(n)
        got.let_go()
        wait_until(got.has(30))
        assert got.seen == sorted(set(got.seen))
        assert subscription.received + subscription.missed == 30
        assert subscription.received == len(got.seen)


def test_a_flood_of_publications_is_seen_in_order_and_every_one_accounted_for(server, transport):
    with connected(server, transport) as client:
        got = Subscriber()
        subscription = client.register_obs_callback(got)
        server.publish_obs(1)
        wait_until(got.has(1))
        for n in range(2, 2_001):
            server.publish_obs(n)
        wait_until(got.has(2_000))
        assert got.seen == sorted(set(got.seen))
        assert subscription.received + subscription.missed == 2_000
        assert subscription.version[1] == 2_000


def test_what_is_kept_all_arrives_in_order_at_one_that_is_briefly_slow(transport):
    with (
        started(new_server(transport, keep=50)) as server,
        connected(server, transport) as client,
    ):
        got = Subscriber(held=True)
        subscription = client.register_obs_callback(got)
        server.publish_obs(1)
        assert got.entered.wait(20)
        for n in range(2, 51):
            server.publish_obs(n)
        got.let_go()
        wait_until(got.has(50))
        for n in range(51, 101):
            server.publish_obs(n)
            wait_until(lambda n=n: len(got.seen) > n - 20)
        wait_until(got.has(100))
        assert got.seen == list(range(1, 101))
        assert subscription.missed == 0


def test_what_is_kept_no_longer_is_counted_as_missed(transport):
    with (
        started(new_server(transport, keep=10)) as server,
        connected(server, transport) as client,
    ):
        got = Subscriber(held=True)
        subscription = client.register_obs_callback(got)
        server.publish_obs(1)
        assert got.entered.wait(20)
        for n in range(2, 101):
            server.publish_obs(n)
        got.let_go()
        wait_until(got.has(100))
        assert got.seen[0] == 1
        assert got.seen[-10:] == list(range(91, 101))
        assert got.seen == sorted(set(got.seen))
        assert subscription.received + subscription.missed == 100
        assert subscription.missed >= 88  # one or two may have been on their way


def test_a_late_joiner_gets_all_that_is_kept(transport):
    with started(new_server(transport, keep=5)) as server:
        for n in range(1, 9):
            server.publish_obs(n)
        with connected(server, transport) as client:
            got = Subscriber()
            client.register_obs_callback(got)
            wait_until(got.has(8))
        assert got.seen == [4, 5, 6, 7, 8]


# Subscribers that fail, or go -----------------------------------------------------------------


def test_a_callback_that_raises_is_logged_and_called_again(server, transport, caplog):
    with connected(server, transport) as client:
        seen = []

        def bad(n) -> None:
            seen.append(n)
            raise ValueError(f"no {n}")

        subscription = client.register_obs_callback(bad)
        with caplog.at_level(logging.ERROR, "edgeml"):
            for n in range(1, 4):
                server.publish_obs(n)
                wait_until(lambda n=n: seen[-1:] == [n])
            wait_until(lambda: subscription.errors == 3)
        assert "no 3" in caplog.text
        assert client.act("move", 1) == 1


def test_a_closed_subscription_gets_nothing_more_and_the_others_go_on(server, transport):
    with connected(server, transport) as client:
        first, second = Subscriber(), Subscriber()
        subscription = client.register_obs_callback(first)
        client.register_obs_callback(second)
        server.publish_obs(1)
        wait_until(first.has(1))
        wait_until(second.has(1))
        with took(at_most=2.5):
            subscription.close()
            subscription.close()
        for n in range(2, 6):
            server.publish_obs(n)
            wait_until(second.has(n))
        assert first.seen == [1]
        third = Subscriber()
        client.register_obs_callback(third)
        wait_until(third.has(5))


@pytest.mark.parametrize("keep", [1, 20])
def test_a_callback_may_close_its_own_subscription_and_is_not_called_again(transport, keep):
    with (
        started(new_server(transport, keep=keep)) as server,
        connected(server, transport) as client,
    ):
        seen: list[int] = []
        entered, ready = threading.Event(), threading.Event()

        def once(n) -> None:
            entered.set()
            assert ready.wait(20)
            if seen:
                subscription.close()
            seen.append(n)

        subscription = client.register_obs_callback(once)
        subscription._credits = 8
        server.publish_obs(0)
        assert entered.wait(20)
        for n in range(1, 21):
            server.publish_obs(n)
        ready.set()
        wait_until(lambda: len(seen) == 2)
        other = Subscriber()
        client.register_obs_callback(other)
        server.publish_obs(21)
        wait_until(other.has(21))
        assert len(seen) == 2


def test_subscriptions_that_come_and_go_leave_nothing_behind(server, transport, monkeypatch):
    monkeypatch.setattr("edgeml.core.streams.HOLD", 0.25)  # that long the server remembers them
    with connected(server, transport) as client:
        server.publish_obs(0)
        before = len(threads())
        made = []
        for _ in range(50):
            got = Subscriber()
            subscription = client.register_obs_callback(got)
            made.append(weakref.ref(subscription))
            wait_until(got.has(0))
            subscription.close()
        wait_until(lambda: len(threads()) <= before)
        del subscription
        wait_until(lambda: not any(each() for each in made))


def test_a_callback_may_use_its_own_client(server):
    with plain_client(server) as client:
        answers = []

        def use(n) -> None:
            answers.append(client.call("act", ["move", n]))
            answers.append(client.call_async("act", ["move", n]).result(20))

        client.subscribe("observations", use)
        for n in range(1, 4):
            server.publish_obs(n)
            wait_until(lambda n=n: len(answers) == 2 * n)
        assert answers == [1, 1, 2, 2, 3, 3]


def test_a_callback_may_subscribe_and_may_stop_its_client_or_the_server(transport):
    with no_thread_left(), started(new_server(transport)) as server:
        server.publish_obs(1)
        with connected(server, transport) as client:
            got = Subscriber()
            client.register_obs_callback(lambda _: client.register_obs_callback(got))
            wait_until(got.has(1))
        for end in ("client", "server"):
            with connected(server, transport) as client:
                done = threading.Event()
                ends = {"client": client.stop, "server": server.stop}

                def stop(_, end=ends[end], done=done) -> None:
                    end()
                    done.set()

                client.register_obs_callback(stop)
                assert done.wait(20)


def test_stopping_a_client_is_quick_with_a_callback_that_hangs(server, transport):
    with connected(server, transport) as client:
        got = [Subscriber(held=True) for _ in range(4)]
        for each in got:
            client.register_obs_callback(each)
        server.publish_obs(1)
        for each in got:
            assert each.entered.wait(20)
        with took(at_most=5.0):
            client.stop()
        for each in got:
            each.let_go()


def test_subscribing_on_a_stopped_client_is_closed(server, transport):
    with connected(server, transport) as client:
        pass
    with pytest.raises(Closed):
        client.register_obs_callback(print)


def test_an_unknown_topic_is_told_with_those_that_are_known(server):
    with plain_client(server) as client, pytest.raises(UnknownInterface) as caught:
        client.subscribe("weather", print)
    assert str(caught.value) == "there is no topic 'weather'; known: observations"


def test_a_subscriber_that_hangs_costs_the_server_no_memory(server, transport):
    frame = np.zeros(1_000_000, np.uint8)
    with connected(server, transport) as client:
        got = Subscriber(held=True)
        subscription = client.register_obs_callback(got)
        subscription._credits = 4
        for _ in range(20):
            server.publish_obs(frame)
        assert got.entered.wait(20)
        before = rss()
        for _ in range(300):
            server.publish_obs(frame)
        assert rss() - before < 60e6
        got.let_go()


SUBSCRIBER = """
import sys, threading
from edgeml import ActionClient, ActionConfig
config = ActionConfig(int(sys.argv[1]), ["move"])
with ActionClient("127.0.0.1", config=config) as client:
    client.register_obs_callback(lambda value: print(value["n"], flush=True))
    threading.Event().wait(60)
"""


def test_a_subscriber_whose_process_freezes_costs_no_memory_and_thaws_to_the_latest():
    frame = np.zeros(1_000_000, np.uint8)
    with (
        started(new_server("zmq")) as server,
        process(SUBSCRIBER, server.port) as frozen,
        connected(server, "zmq") as client,
    ):
        quick = Subscriber()
        subscription = client.register_obs_callback(lambda value: quick(value["n"]))
        server.publish_obs({"n": 1, "frame": frame})
        assert frozen.line() == "1"
        frozen.signal(signal.SIGSTOP)
        before = 0
        for n in range(2, 302):
            if n == 22:
                before = rss()
            server.publish_obs({"n": n, "frame": frame})
            if n % 10 == 0:
                wait_until(lambda n=n: subscription.version[1] == n)
        wait_until(quick.has(301))
        assert rss() - before < 60e6
        frozen.signal(signal.SIGCONT)
        lines = [frozen.line()]
        while lines[-1] != "301":
            lines.append(frozen.line())
        assert len(lines) < 10


def test_a_subscriber_whose_process_is_killed_hurts_nobody():
    with (
        started(new_server("zmq")) as server,
        process(SUBSCRIBER, server.port) as victim,
        connected(server, "zmq") as client,
    ):
        quick = Subscriber()
        client.register_obs_callback(lambda value: quick(value["n"]))
        server.publish_obs({"n": 1})
        assert victim.line() == "1"
        victim.signal(signal.SIGKILL)
        victim.end()
        for n in range(2, 50):
            server.publish_obs({"n": n})
            wait_until(quick.has(n))


# Ownership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 5_000, 20_000, 301_056, 3_000_000])
def test_an_array_changed_right_after_publishing_arrives_as_it_was(transport, size):
    times = 10 if size > 1_000_000 else 80
    array = np.empty(size, np.uint8)
    with (
        started(new_server(transport, keep=times)) as server,
        connected(server, transport) as client,
    ):
        seen: list[tuple[int, int]] = []
        client.register_obs_callback(lambda a: seen.append((int(a.min()), int(a.max()))))
        for n in range(times):
            array[:] = n % 250
            server.publish_obs(array)
            array[:] = 255
        wait_until(lambda: len(seen) == times)
        assert seen == [(n % 250, n % 250) for n in range(times)]


def test_what_a_late_joiner_gets_is_what_was_published(server, transport):
    for size in (100, 1_000_000):
        array = np.full(size, 7, np.uint8)
        server.publish_obs(array)
        array[:] = 255
        with connected(server, transport) as client:
            got = Subscriber()
            client.register_obs_callback(got)
            assert got.entered.wait(20)
            assert got.seen[0].min() == got.seen[0].max() == 7


def test_what_has_arrived_stays_as_it_is_for_as_long_as_it_is_kept(transport):
    with (
        started(new_server(transport, keep=40)) as server,
        connected(server, transport) as client,
    ):
        got = Subscriber()
        client.register_obs_callback(got)
        for n in range(40):
            server.publish_obs(np.full(300_000, n, np.uint8))
        wait_until(lambda: len(got.seen) == 40)
    for n, array in enumerate(got.seen):
        assert array.min() == array.max() == n


# While the server is busy, away, or another ---------------------------------------------------


def test_a_subscriber_gets_what_is_published_while_a_handler_computes(transport):
    """Even if the handler had always been quick, and so was run by the loop itself."""
    entered, go_on = threading.Event(), threading.Event()

    def compute(key, payload):
        if payload == "slow":
            entered.set()
            assert go_on.wait(60)
        return payload

    with (
        started(new_server(transport, act=compute)) as server,
        plain_client(server, timeout=60.0) as client,
    ):
        got = Subscriber()
        subscription = client.subscribe("observations", got)
        for _ in range(20):
            client.call("act", ["move", "fast"])
        busy = client.call_async("act", ["move", "slow"])
        assert entered.wait(20)
        began = time.monotonic()
        for n in range(1, 100):
            server.publish_obs(n)
            with took(at_most=2.5):
                wait_until(got.has(n))
            with pytest.raises(DeadlineExceeded):
                client.call("act", ["move", "in between"], timeout=0.2)
            if time.monotonic() - began > 1.2 * wire.SILENCE:  # some heartbeats
                break
        go_on.set()
        assert busy.result(20) == "slow"
        assert subscription.missed == 0
        assert len(server.clients()) == 1, "nobody had to connect again"


def test_publishing_never_waits_for_a_handler_or_a_subscriber(transport):
    entered, go_on = threading.Event(), threading.Event()

    def compute(key, payload):
        entered.set()
        assert go_on.wait(60)

    with (
        started(new_server(transport, act=compute)) as server,
        plain_client(server) as client,
    ):
        got = Subscriber(held=True)
        client.subscribe("observations", got)
        busy = client.call_async("act", ["move", 1])
        assert entered.wait(20)
        with took(at_most=5):
            for n in range(500):
                server.publish_obs(n)
        go_on.set()
        got.let_go()
        busy.result(20)


def test_a_handler_may_publish(transport):
    def act(key, payload):
        return server.publish_obs(payload)

    with (
        started(new_server(transport, act=act)) as server,
        connected(server, transport) as client,
    ):
        got = Subscriber()
        client.register_obs_callback(got)
        for n in range(1, 30):
            assert client.act("move", n) == n
            wait_until(got.has(n))


def test_a_subscription_outlives_restarts_of_the_server(transport):
    """The new server counts from 1 again, and that is news all the same."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(started(new_server(transport)))
        client = stack.enter_context(connected(server, transport))
        got = Subscriber()
        subscription = client.register_obs_callback(got)
        epochs = []
        for restart in range(3):
            for n in range(3 - restart):
                server.publish_obs(f"{restart} {n}")
                wait_until(got.has(f"{restart} {n}"))
            epochs.append(subscription.version[0])
            port = server.port
            server.stop()
            server = stack.enter_context(started(new_server(transport, port)))
        assert got.seen == ["0 0", "0 1", "0 2", "1 0", "1 1", "2 0"]
        assert epochs == sorted(set(epochs))
        assert subscription.missed == 0
        server.publish_obs("last")
        wait_until(got.has("last"))


def test_a_subscriber_that_hears_of_the_stop_still_gets_the_answers_under_way(transport):
    entered, go_on = threading.Event(), threading.Event()

    def compute(key, payload):
        entered.set()
        assert go_on.wait(60)
        return payload

    with (
        started(new_server(transport, act=compute)) as server,
        plain_client(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.subscribe("observations", Subscriber())
        busy = client.call_async("act", ["move", 1])
        assert entered.wait(20)
        session = client.sessions.current
        stopped = pool.submit(server.stop)
        wait_until(lambda: session.lost)
        time.sleep(0.1)  # for whoever would now hang up
        go_on.set()
        assert busy.result(20) == 1
        stopped.result(20)


def test_a_connection_that_is_lost_costs_a_subscriber_nothing_that_is_kept(transport):
    with (
        started(new_server(transport, keep=100)) as server,
        plain_client(server) as client,
    ):
        got = Subscriber()
        subscription = client.subscribe("observations", got)
        for n in range(1, 91):
            server.publish_obs(n)
            if n % 30 == 0:
                client.sessions.current.lose(Unreachable("cut for a test"))
        wait_until(got.has(90))
        assert got.seen == list(range(1, 91))
        assert subscription.missed == 0


@pytest.mark.parametrize(
    "transport",
    ["zmq", "grpc", *(pytest.param(x, marks=pytest.mark.slow) for x in ("inproc", "shm", "ws"))],
)
def test_calls_that_fill_the_connection_cost_neither_it_nor_its_subscriptions(transport):
    """Thousands of calls under way leave no room for a heartbeat, which must not end them all."""
    entered, go_on = threading.Event(), threading.Event()

    def compute(key, payload):
        entered.set()
        assert go_on.wait(60)
        return payload

    with (
        started(new_server(transport, act=compute)) as server,
        plain_client(server, timeout=60) as client,
    ):
        got = Subscriber()
        client.subscribe("observations", got)
        calls = []

        def fill() -> None:
            with contextlib.suppress(Overloaded):
                while True:
                    calls.append(client.call_async("act", ["move", len(calls)]))

        try:
            fill()
            deadline = time.monotonic() + 1.2 * wire.SILENCE  # some heartbeats
            while time.monotonic() < deadline:
                fill()  # without a pause: whatever comes free is taken
            assert entered.is_set()
        finally:
            go_on.set()
        outcomes = [call.exception(60) for call in calls]
        lost = [error for error in outcomes if isinstance(error, Unreachable)]
        assert not lost, lost[0]
        server.publish_obs("after")
        wait_until(got.has("after"))
