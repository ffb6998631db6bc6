"""The conformance suite for transports: what `edgeml.core.Transport` promises, one test each.

A third party's whole test file::

    from edgeml.testing import TransportTests

    class TestMine(TransportTests):
        url = "mine://127.0.0.1:0"

The transport is loaded by its scheme, as users load it, so its package has to be installed.
"""

# ruff: noqa: D102 - a test's name says what is promised

from __future__ import annotations

import gc
import itertools
import queue
import random
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import pytest

from edgeml.core import (
    Closed,
    DeadlineExceeded,
    Endpoint,
    Message,
    Overloaded,
    Reply,
    Requester,
    Unreachable,
    Url,
)
from edgeml.testing.deadlines import DeadlineTests
from edgeml.testing.ends import (
    KB,
    MB,
    PATIENCE,
    Child,
    Net,
    Parked,
    as_view,
    assert_same,
    count_open_files,
    crc_of,
    echo,
    filled_with,
    find_link_local,
    has_ipv6,
    make_message,
    resident_memory,
    results_of,
    threads_beside,
    until,
    within,
)
from edgeml.testing.liveness import LivenessTests
from edgeml.testing.safety import SafetyTests

__all__ = ["TransportTests"]

_SIZES = (
    *(0, 1, 63, 64, 65, 4 * KB),
    # Around the sizes at which transports begin to share memory rather than copy.
    *(63 * KB, 64 * KB, 65 * KB, 255 * KB, 256 * KB, 257 * KB),
    *(5 * MB, 32 * MB),
)

T = TypeVar("T")


class TransportTests(SafetyTests, LivenessTests, DeadlineTests):
    """Subclass it and set ``url``; see the module's docstring."""

    # Messages -----------------------------------------------------------------------------

    @pytest.mark.parametrize("size", _SIZES)
    def test_a_buffer_of_any_size_arrives_as_it_was(self, net: Net, size: int) -> None:
        requester = net.connect(net.serve(echo))
        sent = make_message(b"header", size)
        assert_same(requester.call(sent, PATIENCE), sent)
        assert_same(requester.request(sent).result(PATIENCE), sent)

    @pytest.mark.parametrize(
        ("header", "sizes"),
        [
            (b"", []),
            (b"only a header", []),
            (b"", [10]),
            (bytes(range(256)) * 4096, []),
            (b"empty", [0]),
            (b"empties", [0, 0, 0]),
            (b"empty among others", [0, 300 * KB, 0, 1, 0]),
            (b"large ones", [MB, 300 * KB, 2 * MB]),
            (b"many", [index % 7 for index in range(2000)]),
        ],
        ids=lambda value: value.decode() if isinstance(value, bytes) and len(value) < 99 else "",
    )
    def test_any_header_and_number_of_buffers_arrive(
        self, net: Net, header: bytes, sizes: list[int]
    ) -> None:
        requester = net.connect(net.serve(echo))
        sent = make_message(header, *sizes)
        assert_same(requester.call(sent, PATIENCE), sent)
        assert_same(requester.request(sent).result(PATIENCE), sent)

    def test_what_arrives_is_private_bytes_and_flat_readonly_views(
        self, net: Net, parked: Parked
    ) -> None:
        requester = net.connect(net.serve(parked))
        for sizes in ([], [10, 0], [300 * KB], [5 * MB]):
            sent = Message(b"h", [as_view(np.ones(size, np.uint8)) for size in sizes])
            future = requester.request(sent)
            request, reply = parked.take()
            reply(sent)
            for got in (request, future.result(PATIENCE)):
                assert type(got.header) is bytes
                for buffer in got.buffers:
                    assert type(buffer) is memoryview
                    assert buffer.readonly
                    assert (buffer.format, buffer.ndim, buffer.contiguous) == ("B", 1, True)
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        np.frombuffer(buffer, np.uint8).flags.writeable = True

    def test_received_views_stay_valid_as_long_as_they_live(self, net: Net, parked: Parked) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        sizes = (100, 65 * KB, 300 * KB, 2 * MB)
        kept: list[tuple[memoryview, int]] = []
        for round_ in range(4):
            for size in sizes:
                sent = Message(b"", [as_view(np.full(size, round_, np.uint8))])
                future = requester.request(sent)
                request, reply = parked.take()
                reply(sent)
                for got in (request, future.result(PATIENCE)):
                    # A slice must keep the whole alive.
                    kept.append((got.buffers[0][size // 2 :], round_))
        del request, reply, future, got
        requester.close()
        endpoint.close()
        gc.collect()
        np.zeros(64 * MB, np.uint8)  # so that memory given back would be used again
        for view, value in kept:
            assert filled_with(view) == value

    # Addresses ----------------------------------------------------------------------------

    def test_an_endpoint_tells_where_peers_reach_it(self, net: Net) -> None:
        first, second = net.serve(echo), net.serve(echo)
        assert first.url != second.url
        for endpoint in (first, second):
            requester = net.connect(endpoint)
            assert requester.url == endpoint.url
            assert requester.call(Message(b"x"), PATIENCE).header == b"x"

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "link-local"])
    def test_any_address_of_this_machine_serves_and_is_reached(self, net: Net, host: str) -> None:
        if host == "link-local":
            host = find_link_local()
        if ":" in host and not has_ipv6():
            pytest.skip("this machine has no IPv6")
        endpoint = net.serve(echo, Url.parse(self.url).with_host(host))
        assert endpoint.url.host == host.strip("[]")
        for url in (endpoint.url, Url.parse(str(endpoint.url)), endpoint.url.with_host(host)):
            requester = net.connect_to(url)
            assert requester.call(Message(b"x"), PATIENCE).header == b"x"
            assert requester.request(Message(b"x")).result(PATIENCE).header == b"x"

    def test_an_address_that_is_taken_is_an_oserror(self, net: Net) -> None:
        endpoint = net.serve(echo)
        with pytest.raises(OSError, match=r".+"):
            net.serve(echo, endpoint.url)
        assert net.connect(endpoint).call(Message(b"unharmed"), PATIENCE).header == b"unharmed"

    def test_where_nobody_listens_is_unreachable_within_the_timeout(self, net: Net) -> None:
        endpoint = net.serve(echo)
        endpoint.close()
        with within(3.0), pytest.raises(Unreachable):
            net.connect(endpoint, 1.0).call(Message(b""), 1.0)

    def test_an_address_can_be_taken_again_at_once(self, net: Net) -> None:
        endpoint = net.serve(echo)
        for _ in range(5):
            requester = net.connect(endpoint)
            requester.call(make_message(b"", 300 * KB), PATIENCE)
            endpoint.close()
            endpoint = net.serve(echo, endpoint.url)
        assert net.connect(endpoint).call(Message(b"new"), PATIENCE).header == b"new"

    def test_a_lost_connection_stays_lost(self, net: Net) -> None:
        endpoint = net.serve(echo)
        requester = net.connect(endpoint)
        requester.call(Message(b""), PATIENCE)
        endpoint.close()
        net.serve(echo, endpoint.url)

        def lost() -> bool:
            try:
                requester.request(Message(b""))
            except Unreachable:
                return True
            return False

        assert until(lost)
        with within(1.0), pytest.raises(Unreachable):
            requester.call(Message(b""), PATIENCE)

    def test_endpoints_are_context_managers(self, net: Net) -> None:
        with net.serve(echo) as endpoint, net.connect(endpoint) as requester:
            assert requester.call(Message(b"x"), PATIENCE).header == b"x"
        with pytest.raises(Closed):
            requester.call(Message(b"x"), PATIENCE)

    # Ownership ----------------------------------------------------------------------------

    @pytest.mark.parametrize(("size", "count"), [(1000, 300), (300_000, 300), (3_000_000, 40)])
    def test_an_array_may_be_changed_once_request_has_returned(
        self, net: Net, size: int, count: int
    ) -> None:
        torn = []

        def on_request(message: Message, reply: Reply) -> None:
            if filled_with(message.buffers[0]) != message.header[0]:
                torn.append(message.header[0])
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        futures = []
        for index in range(count):
            array.fill(index % 250)
            futures.append(requester.request(Message(bytes([index % 250]), [as_view(array)])))
            array.fill(255)
        results_of(futures)
        assert not torn

    @pytest.mark.parametrize(("size", "count"), [(1000, 200), (300_000, 200), (3_000_000, 30)])
    def test_an_array_may_be_changed_once_call_has_returned(
        self, net: Net, size: int, count: int
    ) -> None:
        kept: list[tuple[Message, int]] = []

        def on_request(message: Message, reply: Reply) -> None:
            kept.append((message, message.header[0]))
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        for index in range(count):
            array.fill(index % 250)
            requester.call(Message(bytes([index % 250]), [as_view(array)]), PATIENCE)
            array.fill(255)
            if len(kept) > 10:  # read after the sender has changed its array
                message, value = kept.pop(0)
                assert filled_with(message.buffers[0]) == value

    @pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
    def test_an_array_may_be_changed_once_call_has_raised(self, net: Net, size: int) -> None:
        open_again = threading.Event()
        torn, arrived = [], []

        def on_request(message: Message, reply: Reply) -> None:
            open_again.wait(PATIENCE)
            arrived.append(message.header)
            if filled_with(message.buffers[0]) != message.header[0]:
                torn.append(message.header[0])
            reply(Message(message.header))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        for index in range(12):
            array.fill(index)
            with pytest.raises(DeadlineExceeded):
                requester.call(Message(bytes([index]), [as_view(array)]), 0.03)
            array.fill(255)
        open_again.set()
        array.fill(99)
        reply = requester.call(Message(bytes([99]), [as_view(array)]), PATIENCE)
        assert reply.header == bytes([99])
        assert arrived
        assert not torn

    @pytest.mark.parametrize("where", ["inline", "from another thread"])
    @pytest.mark.parametrize(("size", "count"), [(1000, 200), (300_000, 200), (3_000_000, 30)])
    def test_an_array_may_be_changed_once_it_is_replied(
        self, net: Net, size: int, count: int, where: str
    ) -> None:
        output = np.empty(size, np.uint8)

        def answer(message: Message, reply: Reply) -> None:
            output.fill(message.header[0])
            reply(Message(message.header, [as_view(output)]))
            output.fill(255)

        parked = Parked()
        requester = net.connect(net.serve(answer if where == "inline" else parked))
        # Many under way, so that replies queue behind others.
        futures = [requester.request(Message(bytes([i % 250]))) for i in range(count)]
        if where != "inline":
            for _ in range(count):
                answer(*parked.take())
        for index, future in enumerate(futures):
            reply = future.result(PATIENCE)
            assert reply.header[0] == index % 250
            assert filled_with(reply.buffers[0]) == index % 250

    @pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
    def test_an_array_may_be_changed_once_it_is_broadcast(
        self, net: Net, parked: Parked, size: int
    ) -> None:
        endpoint = net.serve(parked)
        requesters = [net.connect(endpoint) for _ in range(4)]
        output = np.empty(size, np.uint8)
        for value in range(5):
            futures = [each.request(Message(b"")) for each in requesters * 3]
            replies = [parked.take()[1] for _ in futures]
            output.fill(value)
            endpoint.reply_many(iter(replies), Message(b"all", [as_view(output)]))
            output.fill(255)
            for reply in results_of(futures):
                assert reply.header == b"all"
                assert filled_with(reply.buffers[0]) == value

    def test_what_is_filled_in_room_arrives_and_stays(self, net: Net, parked: Parked) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        if requester.allocate(MB) is None:
            assert endpoint.allocate(MB) is None
            pytest.skip("this transport has no memory of its own")
        kept = []
        for value in range(20):
            asked, answered = requester.allocate(MB), endpoint.allocate(MB)
            assert asked is not None
            assert answered is not None
            assert len(asked) == len(answered) == MB
            asked[:], answered[:] = bytes([value]) * MB, bytes([value + 100]) * MB
            future = requester.request(Message(b"", [asked, asked[100:200]]))
            message, reply = parked.take()
            reply(Message(b"", [answered]))
            kept.append((value, message.buffers, future.result(PATIENCE).buffers))
            del asked, answered, message, reply, future
        for value, request, (back,) in kept:
            assert [filled_with(buffer) for buffer in request] == [value, value]
            assert filled_with(back) == value + 100

    # Replies ------------------------------------------------------------------------------

    def test_parked_requests_hold_no_thread_and_each_gets_its_own_reply(
        self, net: Net, parked: Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        requester.request(Message(b"warm")).add_done_callback(lambda _: None)
        parked.take()[1](Message(b""))
        threads = threading.active_count()
        futures = [requester.request(Message(b"%d" % index)) for index in range(500)]
        taken = [parked.take() for _ in futures]
        assert threading.active_count() <= threads
        assert not any(future.done() for future in futures)
        random.Random(0).shuffle(taken)

        def answer(some: list[tuple[Message, Reply]]) -> None:
            for message, reply in some:
                reply(Message(b"for " + message.header))

        results_of([net.start(answer, taken[start::3]) for start in range(3)])
        replies = [reply.header for reply in results_of(futures)]
        assert replies == [b"for %d" % index for index in range(500)]

    def test_a_broadcast_answers_every_parked_request(self, net: Net, parked: Parked) -> None:
        endpoint = net.serve(parked)
        requesters = [net.connect(endpoint) for _ in range(3)]
        futures = [each.request(Message(b"")) for each in requesters for _ in range(170)]
        replies = [parked.take()[1] for _ in futures]
        sent = make_message(b"news", 100, 300 * KB)
        endpoint.reply_many(replies, sent)
        for reply in results_of(futures):
            assert_same(reply, sent)

    def test_a_broadcast_from_within_on_request_is_delivered(self, net: Net) -> None:
        waiting: list[Reply] = []

        def on_request(message: Message, reply: Reply) -> None:
            waiting.append(reply)
            if message.header == b"now":
                endpoint.reply_many(waiting, Message(b"news"))

        endpoint = net.serve(on_request)
        requester = net.connect(endpoint)
        futures = [requester.request(Message(header)) for header in (b"", b"", b"now")]
        assert [reply.header for reply in results_of(futures)] == [b"news"] * 3

    def test_a_late_reply_is_never_taken_for_the_next_ones(self, net: Net, parked: Parked) -> None:
        requester = net.connect(net.serve(parked))
        arrived = 0
        for index in range(20):
            with pytest.raises(DeadlineExceeded):
                requester.call(Message(b"late"), 0.01)
            next_one = net.start(requester.call, Message(b"%d" % index), PATIENCE)
            message, reply = parked.take()
            if message.header == b"late":  # it may have been given up before it was sent
                arrived += 1
                reply(make_message(b"too late", 300 * KB))
                message, reply = parked.take()
            assert message.header == b"%d" % index
            reply(Message(b"%d" % index))
            assert next_one.result(PATIENCE).header == b"%d" % index
        assert arrived

    @pytest.mark.parametrize("timeout", [0.001, 0.05, 0.3])
    def test_a_deadline_is_kept(self, net: Net, parked: Parked, timeout: float) -> None:
        requester = net.connect(net.serve(parked))
        for message in (Message(b""), make_message(b"", 3 * MB)):
            began = time.monotonic()
            with within(timeout + 0.5), pytest.raises(DeadlineExceeded):
                requester.call(message, timeout)
            assert time.monotonic() - began >= timeout - 1e-3

    def test_a_call_may_wait_for_ever(self, net: Net) -> None:
        requester = net.connect(net.serve(echo))
        for timeout in (1e6, 1e9):
            assert requester.call(Message(b"x"), timeout).header == b"x"

    def test_a_request_may_be_sent_from_a_futures_callback(self, net: Net) -> None:
        requester = net.connect(net.serve(echo))
        second: queue.SimpleQueue[Future[Message]] = queue.SimpleQueue()
        first = requester.request(Message(b"first"))
        first.add_done_callback(lambda _: second.put(requester.request(Message(b"second"))))
        assert second.get(timeout=PATIENCE).result(PATIENCE).header == b"second"

    def test_a_call_may_be_made_in_a_futures_callback(self, net: Net) -> None:
        watched = threading.Event()

        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"first":
                watched.wait(PATIENCE)
            reply(message)

        requester = net.connect(net.serve(on_request))
        second: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()

        def call(_: Future[Message]) -> None:
            try:
                second.put(requester.call(Message(b"second"), PATIENCE / 2))
            except Exception as error:
                second.put(error)

        requester.request(Message(b"first")).add_done_callback(call)
        watched.set()
        got = second.get(timeout=PATIENCE)
        assert isinstance(got, Message), got
        assert got.header == b"second"
        assert requester.call(Message(b"third"), PATIENCE).header == b"third"

    @pytest.mark.parametrize("kind", [ValueError, SystemExit])
    def test_a_callback_that_raises_hurts_nobody(
        self, net: Net, parked: Parked, kind: type[BaseException]
    ) -> None:
        def fail(_: object) -> None:
            raise kind("a callback's own fault")

        requester = net.connect(net.serve(parked))
        future = requester.request(Message(b"first"))
        future.add_done_callback(fail)
        parked.take()[1](Message(b""))
        future.result(PATIENCE)
        other = requester.request(Message(b"second"))
        parked.take()[1](Message(b"fine"))
        assert other.result(PATIENCE).header == b"fine"

    # Peers --------------------------------------------------------------------------------

    def test_a_peer_is_the_same_for_all_requests_over_one_connection(
        self, net: Net, parked: Parked
    ) -> None:
        endpoint = net.serve(parked)
        ids = []
        for _ in range(2):
            requester = net.connect(endpoint)
            under_way = [net.start(requester.call, Message(b""), PATIENCE) for _ in range(3)]
            under_way += [requester.request(Message(b"")) for _ in range(3)]
            peers = []
            for _ in under_way:
                _, reply = parked.take()
                assert reply.expired in (False, True)
                peers.append(reply.peer)
                reply(Message(b""))
            results_of(under_way)
            assert all(isinstance(peer.address, str) and peer.address for peer in peers)
            assert len({peer.id for peer in peers}) == 1
            ids.append(peers[0].id)
        assert ids[0] != ids[1]

    def test_a_reply_to_a_peer_that_has_gone_is_dropped_and_counted(
        self, net: Net, parked: Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        replies = []
        for _ in range(200):
            requester.request(Message(b""))
            replies.append(parked.take()[1])
        requester.close()

        def counted() -> bool:
            if len(replies) > 5:
                with within(1.0):
                    replies.pop()(make_message(b"", 300 * KB))
            return endpoint.dropped > 0

        assert until(counted)
        dropped = endpoint.dropped
        endpoint.reply_many(replies[:5], Message(b""))
        assert until(lambda: endpoint.dropped >= dropped + 5)
        assert net.start(net.connect(endpoint).request, Message(b"other")).result(PATIENCE)
        assert parked.take()[0].header == b"other"

    # Many at once -------------------------------------------------------------------------

    def test_threads_and_connections_may_call_at_once(self, net: Net) -> None:
        endpoint = net.serve(echo)
        shared = [net.connect(endpoint) for _ in range(2)]
        threads = 8
        barrier = threading.Barrier(threads)

        def work(number: int) -> None:
            requester = shared[number % 2]
            rng = np.random.default_rng(number)
            sizes = rng.choice([0, 10, 1000, 65_000, 260_000, 600_000], 30)
            barrier.wait(PATIENCE)
            futures = []
            for size in [*sizes, 3_000_000]:
                data = rng.integers(0, 256, size, np.uint8)
                check = zlib.crc32(data)
                message = Message(b"%d %d" % (number, check), [as_view(data)])
                if rng.random() < 0.7:
                    assert crc_of(requester.call(message, PATIENCE)) == check
                else:
                    futures.append((requester.request(message), check))
            for future, check in futures:
                assert crc_of(future.result(PATIENCE)) == check

        results_of([net.start(work, number) for number in range(threads)], 3 * PATIENCE)

    def test_what_one_thread_asks_arrives_in_the_order_in_which_it_was_asked(
        self, net: Net
    ) -> None:
        arrived: dict[bytes, list[int]] = {}

        def on_request(message: Message, reply: Reply) -> None:
            who, number = message.header.split()
            arrived.setdefault(who, []).append(int(number))
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))

        def ask(seed: int) -> None:
            rng = random.Random(seed)
            numbers = itertools.count()
            for _ in range(20):
                futures = []
                for _ in range(rng.randrange(4)):
                    size = rng.choice((0, 1000, 100 * KB, 300 * KB, 3 * MB, 5 * MB))
                    sent = make_message(b"%d %d" % (seed, next(numbers)), size)
                    futures.append(requester.request(sent))
                for size in (0, rng.choice((1000, 5 * MB))):
                    sent = make_message(b"%d %d" % (seed, next(numbers)), size)
                    requester.call(sent, PATIENCE)
                if rng.random() < 0.5:
                    results_of(futures)

        ask(0)
        results_of([net.start(ask, seed) for seed in (1, 2)], 3 * PATIENCE)
        for numbers in arrived.values():
            assert numbers == sorted(numbers)

    def test_what_a_futures_callback_asks_arrives_in_order_too(self, net: Net) -> None:
        arrived = []

        def on_request(message: Message, reply: Reply) -> None:
            arrived.append(message.header)
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def ask(_: Future[Message]) -> None:
            try:
                requester.request(make_message(b"second", MB))
                requester.call(Message(b"third"), PATIENCE / 2)
                done.put(None)
            except Exception as error:
                done.put(error)

        for _ in range(20):
            requester.request(Message(b"first")).add_done_callback(ask)
            assert done.get(timeout=PATIENCE) is None
        assert arrived == [b"first", b"second", b"third"] * 20

    def test_a_thread_that_has_called_and_ended_leaves_nothing_behind(self, net: Net) -> None:
        requester = net.connect(net.serve(echo))

        def use() -> None:
            requester.call(Message(b"x"), PATIENCE)
            requester.request(Message(b"x")).result(PATIENCE)
            requester.call(make_message(b"", 300 * KB), PATIENCE)

        net.start(use).result(PATIENCE)
        before = count_open_files()
        for _ in range(100):
            thread = threading.Thread(target=use)
            thread.start()
            thread.join(PATIENCE)
        with within(1.0):
            assert until(lambda: count_open_files() < before + 10)

    def test_requests_are_passed_on_one_at_a_time(self, net: Net) -> None:
        running, most = itertools.count(), []
        lock = threading.Lock()

        def on_request(message: Message, reply: Reply) -> None:
            alone = lock.acquire(blocking=False)
            most.append(alone)
            next(running)
            reply(message)
            if alone:
                lock.release()

        endpoint = net.serve(on_request)
        requesters = [net.connect(endpoint) for _ in range(4)]
        results_of([each.request(Message(b"")) for _ in range(100) for each in requesters])
        assert all(most)

    # Overload -----------------------------------------------------------------------------

    def test_where_nothing_is_left_to_read_nobody_is_behind(self, net: Net) -> None:
        behind: list[float] = []

        def on_request(message: Message, reply: Reply) -> None:
            behind.append(endpoint.behind)
            reply(message)

        def behind_now() -> float:
            requester.call(Message(b""), PATIENCE)
            return behind[-1]

        endpoint = net.serve(on_request)
        requester = net.connect(endpoint)
        for _ in range(3):  # whoever asked before, and however long ago
            assert until(lambda: behind_now() == 0.0)

    def test_request_returns_at_once_though_nobody_reads(self, net: Net) -> None:
        open_again = threading.Event()

        def on_request(message: Message, reply: Reply) -> None:
            open_again.wait(PATIENCE)
            reply(message)

        endpoint = net.serve(on_request)
        requester = net.connect(endpoint)
        message = make_message(b"", 100 * KB)
        futures = []
        for _ in range(400):
            with within(0.5):
                futures.append(requester.request(message))
        open_again.set()
        for reply in results_of(futures):
            assert_same(reply, message)

    def test_what_is_overloaded_says_so_and_recovers(self, net: Net, parked: Parked) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        futures: list[Future[Message]] = []
        try:
            futures.extend(requester.request(Message(b"")) for _ in range(10_000))
        except Overloaded:
            assert len(futures) >= 256  # core sends dozens ahead for each subscription
        # One that is cancelled makes room for another, and need not be delivered.
        futures.pop().cancel()
        futures.append(requester.request(Message(b"room")))
        taken = [parked.take()]
        while taken[-1][0].header != b"room":
            taken.append(parked.take())
        endpoint.reply_many([reply for _, reply in taken], Message(b"done"))
        assert all(reply.header == b"done" for reply in results_of(futures))
        last = requester.request(Message(b"again"))
        parked.take()[1](Message(b"fine"))
        assert last.result(PATIENCE).header == b"fine"

    def test_to_cancel_is_to_forget(self, net: Net, parked: Parked) -> None:
        requester = net.connect(net.serve(parked))
        future = requester.request(Message(b"forget me"))
        _, reply = parked.take()
        assert future.cancel()
        assert future.cancel()
        forgotten = weakref.ref(future)
        del future
        next_one = requester.request(Message(b"next"))
        reply(Message(b"too late"))
        del reply
        parked.take()[1](Message(b"in time"))
        assert next_one.result(PATIENCE).header == b"in time"
        assert forgotten() is None

    # Slow and failing handlers ------------------------------------------------------------

    @pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
    def test_a_handler_that_raises_is_logged_and_the_endpoint_lives(
        self, net: Net, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
    ) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"raise":
                raise kind("a handler's own fault")
            reply(message)

        requester = net.connect(net.serve(on_request))
        for _ in range(3):
            requester.request(Message(b"raise"))
            assert requester.call(Message(b"fine"), PATIENCE).header == b"fine"
        assert until(lambda: caplog.text.count("a handler's own fault") >= 3)

    # Whose thread it is -------------------------------------------------------------------

    def test_requests_are_taken_in_the_thread_that_carries_the_loop(self, net: Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        for index in range(20):
            reply = requester.call(Message(b"thread %d" % index), PATIENCE)
            assert reply.header == str(handlers.ident).encode()
            assert_same(
                requester.call(make_message(b"", 300 * KB), PATIENCE), make_message(b"", 300 * KB)
            )

    def test_the_loop_goes_on_without_whoever_carries_it_once_relieved(self, net: Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        for _ in range(3):
            blocked = requester.request(Message(b"block"))
            handlers.stuck.get(timeout=PATIENCE)
            handlers.endpoint.relieve()
            for _ in range(2):
                called = requester.call(Message(b"at once"), PATIENCE)
                assert called.header != str(handlers.ident).encode()
            assert not blocked.done()
            handlers.go_on.put(None)
            assert blocked.result(PATIENCE).header == b"block"
            # And comes back.
            thread = requester.call(Message(b"thread"), PATIENCE).header
            assert thread == str(handlers.ident).encode()

    def test_what_another_thread_replies_waits_for_nobody_who_is_away(self, net: Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        kept = requester.request(Message(b"keep"))
        late = handlers.kept.get(timeout=PATIENCE)
        blocked = requester.request(Message(b"block"))
        handlers.stuck.get(timeout=PATIENCE)
        late(Message(b"late"))
        assert kept.result(PATIENCE).header == b"late"
        assert not blocked.done()
        handlers.go_on.put(None)
        assert blocked.result(PATIENCE).header == b"block"

    def test_wake_has_a_carrier_that_waits_look_up(self, net: Net) -> None:
        endpoint = net.serve(echo)
        if not endpoint.carry(lambda: False):
            pytest.skip("this transport has no loop that could be carried")
        staying, looked = threading.Event(), threading.Semaphore(0)
        staying.set()

        def stay() -> bool:
            looked.release()
            return staying.is_set()

        carrying = net.start(endpoint.carry, stay)
        assert looked.acquire(timeout=PATIENCE)
        staying.clear()
        endpoint.wake()
        assert carrying.result(PATIENCE)
        endpoint.relieve()
        assert net.connect(endpoint).call(Message(b"x"), PATIENCE).header == b"x"

    def test_two_carry_one_loop_in_turns(self, net: Net) -> None:
        endpoint = net.serve(echo)
        if not endpoint.carry(lambda: False):
            pytest.skip("this transport has no loop that could be carried")
        done = threading.Event()

        def carry() -> None:
            rounds = itertools.count()
            while not done.is_set():
                endpoint.carry(lambda: bool(next(rounds) % 3) and not done.is_set())

        carrying = [net.start(carry) for _ in range(2)]
        requester = net.connect(endpoint)
        try:
            for index in range(100):
                header = b"%d" % index
                assert requester.call(Message(header), PATIENCE).header == header
        finally:
            done.set()
            endpoint.wake()
            endpoint.relieve()
        for each in carrying:
            while not each.done():
                endpoint.wake()
                endpoint.relieve()
            each.result(PATIENCE)

    def test_relieve_and_wake_are_harmless_where_nobody_carries(self, net: Net) -> None:
        endpoint = net.serve(echo)
        requester = net.connect(endpoint)
        for _ in range(5):
            endpoint.relieve()
            endpoint.wake()
            sent = make_message(b"", 300 * KB)
            assert_same(requester.call(sent, PATIENCE), sent)

    def test_relieve_may_come_at_any_moment(self, net: Net) -> None:
        # Many parts take a while to send, in which the loop may change hands.
        parts = [as_view(np.ones(size, np.uint8)) for size in [300] * 100 + [300_000]]
        handlers = net.carry(parts)
        requester = net.connect(handlers.endpoint)
        done = threading.Event()

        def relieve() -> None:
            while not done.is_set():
                handlers.endpoint.relieve()
                done.wait(1e-4)

        relieving = net.start(relieve)
        try:
            for index in range(100):
                futures = [requester.request(Message(b"%d %d" % (index, i))) for i in range(3)]
                called = requester.call(Message(b"%d" % index), PATIENCE)
                assert called.header == b"%d" % index
                for i, reply in enumerate(results_of(futures)):
                    assert reply.header == b"%d %d" % (index, i)
                    assert list(map(len, reply.buffers)) == list(map(len, parts))
        finally:
            done.set()
        relieving.result(PATIENCE)

    # The end ------------------------------------------------------------------------------

    def test_when_close_returns_the_threads_have_ended(self, net: Net) -> None:
        before = set(threading.enumerate())
        for _ in range(5):
            endpoint = net.serve(echo)
            requester = net.connect(endpoint)
            requester.call(Message(b""), PATIENCE)
            requester.request(Message(b"")).result(PATIENCE)
            requester.close()
            endpoint.close()
            assert not threads_beside(before)

    def test_an_end_that_has_been_closed_is_kept_alive_by_nobody(self, net: Net) -> None:
        endpoint = net.transport.serve(Url.parse(self.url), echo)
        requester = net.transport.connect(endpoint.url, PATIENCE)
        requester.call(Message(b""), PATIENCE)
        requester.request(make_message(b"", 5 * MB)).result(PATIENCE)
        net.start(requester.call, Message(b""), PATIENCE).result(PATIENCE)
        left = {weakref.ref(end) for end in (endpoint, requester)}
        requester.close()
        endpoint.close()
        del endpoint, requester

        def gone() -> bool:
            gc.collect()
            return not any(end() for end in left)

        assert until(gone)

    def test_closing_a_requester_wakes_all_who_wait_with_closed(
        self, net: Net, parked: Parked
    ) -> None:
        requester = net.connect(net.serve(parked))
        waiting = [net.start(requester.call, Message(b""), PATIENCE) for _ in range(3)]
        waiting += [requester.request(Message(b"")) for _ in range(3)]
        for _ in waiting:
            parked.take()
        with within(2.0):
            requester.close()
            for each in waiting:
                with pytest.raises(Closed):
                    each.result(PATIENCE)
        for _ in range(2):
            with pytest.raises(Closed):
                requester.request(Message(b""))
            with pytest.raises(Closed):
                requester.call(Message(b""), 1.0)
            requester.close()

    def test_closing_an_endpoint_wakes_all_who_wait_for_it(self, net: Net, parked: Parked) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        waiting = [net.start(requester.call, Message(b""), PATIENCE) for _ in range(3)]
        waiting += [requester.request(Message(b"")) for _ in range(3)]
        replies = [parked.take()[1] for _ in waiting]
        with within(2.5):
            endpoint.close()
            for each in waiting:
                with pytest.raises((Unreachable, Closed)):
                    each.result(PATIENCE)
        for reply in replies:  # late, and harmless
            reply(Message(b""))
        endpoint.reply_many(replies, Message(b""))
        endpoint.relieve()
        endpoint.close()

    def test_an_endpoint_closes_though_whoever_carries_it_is_away(self, net: Net) -> None:
        handlers = net.carry()
        endpoint = handlers.endpoint
        future = net.connect(endpoint).request(Message(b"block"))
        handlers.stuck.get(timeout=PATIENCE)
        with within(3.0):
            endpoint.close()
            with pytest.raises((Unreachable, Closed)):
                future.result(PATIENCE)
        with net.serve(echo, endpoint.url) as another:
            assert net.connect(another).call(Message(b"x"), PATIENCE).header == b"x"
        handlers.go_on.put(None)
        handlers.thread.result(PATIENCE)
        assert not endpoint.carry(lambda: True)

    def test_a_handler_may_close_the_endpoint_that_its_thread_carries(self, net: Net) -> None:
        handlers = net.carry()
        future = net.connect(handlers.endpoint).request(Message(b"close"))
        with pytest.raises((Unreachable, Closed)):
            future.result(PATIENCE)
        handlers.thread.result(PATIENCE)

    @pytest.mark.parametrize("size", [0, 300_000, 3_000_000])
    def test_replies_given_just_before_the_close_are_delivered(
        self, net: Net, parked: Parked, size: int
    ) -> None:
        for _ in range(5):
            endpoint = net.serve(parked)
            requester = net.connect(endpoint)
            waiting = [net.start(requester.call, Message(b""), PATIENCE) for _ in range(3)]
            waiting += [requester.request(Message(b"")) for _ in range(3)]
            for _, reply in [parked.take() for _ in waiting]:
                reply(make_message(b"last", size))
            endpoint.close()
            assert [reply.header for reply in results_of(waiting)] == [b"last"] * 6

    def test_a_last_reply_from_within_on_request_is_delivered(self, net: Net) -> None:
        for _ in range(10):

            def on_request(message: Message, reply: Reply) -> None:
                reply(message)
                endpoint.close()  # noqa: B023 - called before the next one is made

            endpoint = net.serve(on_request)
            assert net.connect(endpoint).call(Message(b"last"), PATIENCE).header == b"last"
            endpoint.close()

    def test_either_end_may_be_closed_from_within_on_request(self, net: Net) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            (endpoint if message.header == b"endpoint" else requester).close()

        for header in (b"endpoint", b"requester"):
            endpoint = net.serve(on_request)
            requester = net.connect(endpoint)
            future = requester.request(Message(header))
            with within(2.5), pytest.raises((Unreachable, Closed)):
                future.result(PATIENCE)

    def test_either_end_may_be_closed_from_within_a_callback(self, net: Net) -> None:
        endpoint = net.serve(echo)
        for end in ("requester", "endpoint"):
            requester = net.connect(endpoint)
            closed = threading.Event()

            def close(_: object, end: Endpoint, closed: threading.Event) -> None:
                end.close()
                closed.set()

            which = requester if end == "requester" else endpoint
            future = requester.request(Message(b""))
            future.add_done_callback(lambda f, e=which, c=closed: close(f, e, c))  # type: ignore[misc]
            with within(2.5):
                assert closed.wait(PATIENCE)
                with pytest.raises((Closed, Unreachable)):
                    requester.call(Message(b""), PATIENCE)

    def test_either_end_may_be_closed_from_the_callback_that_tells_of_the_end(
        self, net: Net, parked: Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        future = requester.request(Message(b""))
        closed = threading.Event()
        future.add_done_callback(lambda _: (requester.close(), endpoint.close(), closed.set()))  # type: ignore[func-returns-value]
        parked.take()
        with within(2.5):
            endpoint.close()
            assert closed.wait(PATIENCE)

    def test_several_threads_may_close_at_once(self, net: Net, parked: Parked) -> None:
        for _ in range(5):
            endpoint = net.serve(parked)
            requester = net.connect(endpoint)
            future = requester.request(Message(b""))
            parked.take()
            barrier = threading.Barrier(6)

            def close(end: Endpoint, barrier: threading.Barrier) -> None:
                barrier.wait(PATIENCE)
                end.close()

            ends = (endpoint, requester) * 3
            with within(3.0):
                results_of([net.start(close, end, barrier) for end in ends])
                with pytest.raises((Unreachable, Closed)):
                    future.result(PATIENCE)

    def test_traffic_may_be_under_way_when_either_end_closes(self, net: Net) -> None:
        for which in (0, 1) * 5:
            endpoint = net.serve(echo)
            requester = net.connect(endpoint)
            calls = threading.Semaphore(0)

            def work(requester: Requester, calls: threading.Semaphore) -> None:
                sent = make_message(b"", 300 * KB)
                while True:
                    try:
                        future = requester.request(sent)
                        assert_same(requester.call(sent, PATIENCE), sent)
                        assert_same(future.result(PATIENCE), sent)
                    except (Closed, Unreachable):
                        return
                    calls.release()

            workers = [net.start(work, requester, calls) for _ in range(2)]
            for _ in range(4):
                assert calls.acquire(timeout=PATIENCE)
            with within(3.0):
                (endpoint, requester)[which].close()
                results_of(workers)

    # Other processes ----------------------------------------------------------------------

    @pytest.fixture
    def child(self) -> Iterator[Callable[..., Child]]:
        """Starts processes, and ends them after the test."""
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        children: list[Child] = []

        def start(role: str, url: Url | str) -> Child:
            children.append(Child(role, str(url)))
            return children[-1]

        yield start
        for each in children:
            each.end()

    def test_another_process_answers_and_killing_it_is_noticed(
        self, net: Net, child: Callable[..., Child]
    ) -> None:
        server = child("serve", self.url)
        requester = net.transport.connect(Url.parse(server.line()), PATIENCE)
        with requester:
            for size in (0, 1000, 300 * KB, 5 * MB):
                sent = make_message(b"echo", size)
                assert_same(requester.call(sent, PATIENCE), sent)
            waiting = [net.start(requester.call, Message(b"park"), PATIENCE) for _ in range(2)]
            waiting += [requester.request(Message(b"park")) for _ in range(2)]
            for _ in waiting:
                assert server.line() == "parked"
            server.kill()
            with within(2.0):
                for each in waiting:
                    with pytest.raises(Unreachable):
                        each.result(PATIENCE)
                with pytest.raises(Unreachable):
                    requester.request(Message(b"")).result(PATIENCE)
                with pytest.raises(Unreachable):
                    requester.call(Message(b""), 1.0)

    def test_a_client_that_is_killed_does_not_hurt_the_server(
        self, net: Net, parked: Parked, child: Callable[..., Child]
    ) -> None:
        endpoint = net.serve(parked)
        client = child("ask", endpoint.url)
        taken = [parked.take() for _ in range(20)]
        client.kill()
        for message, reply in taken[:10]:
            with within(1.0):
                reply(Message(b"", message.buffers))
        endpoint.reply_many([reply for _, reply in taken[10:]], make_message(b"", 300 * KB))
        # What was received from it is still there.
        assert all(filled_with(message.buffers[0]) == 7 for message, _ in taken)
        other = net.connect(endpoint).request(Message(b"other"))
        while (last := parked.take())[0].header != b"other":
            pass
        last[1](Message(b"fine"))
        assert other.result(PATIENCE).header == b"fine"

    def test_no_call_outlives_its_deadline_beside_a_stalled_upload(
        self, net: Net, child: Callable[..., Child]
    ) -> None:
        server = child("serve", self.url)
        url = Url.parse(server.line())
        with net.transport.connect(url, PATIENCE) as requester:
            requester.call(Message(b""), PATIENCE)
            server.freeze()
            upload = requester.request(make_message(b"", 10 * MB))
            waiting = net.start(requester.call, Message(b""), 0.2)
            with within(2.0), pytest.raises(DeadlineExceeded):
                waiting.result(PATIENCE)
            assert upload.cancel()
            for size in (0, 5 * MB, 0):
                waiting = net.start(requester.call, make_message(b"", size), 0.1)
                with within(2.0), pytest.raises(DeadlineExceeded):
                    waiting.result(PATIENCE)
            with within(2.0):
                requester.close()
        server.thaw()
        with net.transport.connect(url, PATIENCE) as requester:
            assert requester.call(Message(b"unharmed"), PATIENCE).header == b"unharmed"

    def test_a_forked_child_keeps_neither_the_address_nor_the_clients_of_a_server_that_is_killed(
        self, net: Net, child: Callable[..., Child]
    ) -> None:
        server = child("serve", self.url)
        url = Url.parse(server.line())
        with net.transport.connect(url, PATIENCE) as requester:
            requester.call(Message(b"fork"), PATIENCE)
            waiting: list[Future[Message]] = [
                net.start(requester.call, Message(b"park"), PATIENCE),
                net.start(lambda: requester.request(Message(b"park")).result(PATIENCE)),
            ]
            for _ in waiting:
                assert server.line() == "parked"
            server.kill()
            with within(2.0):
                for each in waiting:
                    with pytest.raises(Unreachable):
                        each.result(PATIENCE)
        endpoint = net.serve(echo, url)
        assert net.connect(endpoint).call(Message(b"new"), PATIENCE).header == b"new"

    def test_a_forked_child_keeps_no_connection_of_a_client_that_is_killed(
        self, net: Net, parked: Parked, child: Callable[..., Child]
    ) -> None:
        endpoint = net.serve(parked)
        client = child("ask and fork", endpoint.url)
        replies = [parked.take()[1] for _ in range(20)]
        assert client.line() == "forked"
        client.kill()

        def counted() -> bool:
            replies.pop()(Message(b""))
            return until(lambda: endpoint.dropped > 0, 0.5)

        assert any(counted() for _ in range(20))

    # Memory -------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["call", "request", "late", "cancelled"])
    def test_memory_is_freed_without_the_garbage_collector(
        self, net: Net, parked: Parked, how: str
    ) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"late":
                late.append(reply)
            else:
                reply(message)

        late: list[Reply] = []
        requester = net.connect(net.serve(on_request))
        message = make_message(b"late" if how in ("late", "cancelled") else b"", MB)
        used = []
        gc.collect()
        gc.disable()
        try:
            for index in range(200):
                if how == "call":
                    requester.call(message, PATIENCE)
                elif how == "request":
                    requester.request(message).result(PATIENCE)
                elif how == "late":
                    with pytest.raises(DeadlineExceeded):
                        requester.call(message, 0.001)
                else:
                    requester.request(message).cancel()
                    requester.call(Message(b""), PATIENCE)
                while late:
                    late.pop()(message)
                if index in (50, 199):
                    requester.call(Message(b""), PATIENCE)
                    used.append(resident_memory())
        finally:
            gc.enable()
        assert used[1] - used[0] < 64 * MB

    @pytest.mark.parametrize("how", ["call", "request"])
    def test_what_has_had_its_reply_leaves_nothing_behind(self, net: Net, how: str) -> None:
        """Also where nothing is under way in between, as with a heartbeat."""

        def ask() -> None:
            for _ in range(200):
                if how == "call":
                    requester.call(Message(b"x"), PATIENCE)
                else:
                    requester.request(Message(b"x")).result(PATIENCE)

        def count() -> int:
            gc.collect()
            return len(gc.get_objects())

        requester = net.connect(net.serve(echo))
        ask()
        frozen = gc.get_freeze_count()  # by who runs this, who keeps it so
        gc.collect()
        gc.freeze()  # what was there before, which takes a second to look through
        try:
            ask()
            before = count()
            ask()
            with within(PATIENCE):
                assert until(lambda: count() < before + 100)
        finally:
            if not frozen:
                gc.unfreeze()

    @pytest.mark.parametrize("how", ["call", "request"])
    def test_a_received_buffer_dies_with_its_last_view(self, net: Net, how: str) -> None:
        received: list[weakref.ref[memoryview]] = []

        def on_request(message: Message, reply: Reply) -> None:
            received.append(weakref.ref(message.buffers[0]))
            reply(message)

        requester = net.connect(net.serve(on_request))
        sent = make_message(b"", MB)
        gc.collect()
        gc.disable()
        try:
            if how == "call":
                got = requester.call(sent, PATIENCE)
            else:
                got = requester.request(sent).result(PATIENCE)
            received.append(weakref.ref(got.buffers[0]))
            del got
            assert until(lambda: not any(view() for view in received))
        finally:
            gc.enable()
