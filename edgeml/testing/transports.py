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
import ipaddress
import itertools
import os
import queue
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from edgeml.core import (
    Closed,
    DeadlineExceeded,
    Endpoint,
    Message,
    OnRequest,
    Overloaded,
    Reply,
    Requester,
    Transport,
    Unreachable,
    Url,
    load_transport,
)

__all__ = ["TransportTests"]

_PATIENCE = 10.0  # seconds that a test waits for what should come at once
_KB = 1 << 10
_MB = 1 << 20
_SIZES = (
    *(0, 1, 63, 64, 65, 4 * _KB),
    # Around the sizes at which transports begin to share memory rather than copy.
    *(63 * _KB, 64 * _KB, 65 * _KB, 255 * _KB, 256 * _KB, 257 * _KB),
    *(5 * _MB, 32 * _MB),
)

T = TypeVar("T")


class TransportTests:
    """Subclass it and set ``url``; see the module's docstring.

    Attributes:
        url: where to serve; port 0 lets the system pick.
        between_processes: whether another process can connect to an endpoint.
    """

    url: ClassVar[str]
    between_processes: ClassVar[bool] = True

    @pytest.fixture
    def net(self) -> Iterator[_Net]:
        """Makes endpoints and threads, ends them all after the test, and finds what is left."""
        transport = load_transport(Url.parse(self.url).scheme)  # as users load it
        if transport not in _warm:
            _live_once(transport, self.url)
            _warm.append(transport)
        before = set(threading.enumerate())
        net = _Net(transport, self.url)
        yield net
        net.close()
        _until(lambda: set(threading.enumerate()) <= before)
        left = set(threading.enumerate()) - before
        assert not left, "threads that outlive their endpoint"

    @pytest.fixture
    def parked(self) -> _Parked:
        """An ``on_request`` that answers nothing; the test takes the requests from it."""
        return _Parked()

    # Messages -----------------------------------------------------------------------------

    @pytest.mark.parametrize("size", _SIZES)
    def test_a_buffer_of_any_size_arrives_as_it_was(self, net: _Net, size: int) -> None:
        requester = net.connect(net.serve(_echo))
        sent = _message(b"header", size)
        _assert_same(requester.call(sent, _PATIENCE), sent)
        _assert_same(requester.request(sent).result(_PATIENCE), sent)

    @pytest.mark.parametrize(
        ("header", "sizes"),
        [
            (b"", []),
            (b"only a header", []),
            (b"", [10]),
            (bytes(range(256)) * 4096, []),
            (b"empty", [0]),
            (b"empties", [0, 0, 0]),
            (b"empty among others", [0, 300 * _KB, 0, 1, 0]),
            (b"large ones", [_MB, 300 * _KB, 2 * _MB]),
            (b"many", [index % 7 for index in range(2000)]),
        ],
        ids=lambda value: value.decode() if isinstance(value, bytes) and len(value) < 99 else "",
    )
    def test_any_header_and_number_of_buffers_arrive(
        self, net: _Net, header: bytes, sizes: list[int]
    ) -> None:
        requester = net.connect(net.serve(_echo))
        sent = _message(header, *sizes)
        _assert_same(requester.call(sent, _PATIENCE), sent)
        _assert_same(requester.request(sent).result(_PATIENCE), sent)

    def test_what_arrives_is_private_bytes_and_flat_readonly_views(
        self, net: _Net, parked: _Parked
    ) -> None:
        requester = net.connect(net.serve(parked))
        for sizes in ([], [10, 0], [300 * _KB], [5 * _MB]):
            sent = Message(b"h", [_view(np.ones(size, np.uint8)) for size in sizes])
            future = requester.request(sent)
            request, reply = parked.take()
            reply(sent)
            for got in (request, future.result(_PATIENCE)):
                assert type(got.header) is bytes
                for buffer in got.buffers:
                    assert type(buffer) is memoryview
                    assert buffer.readonly
                    assert (buffer.format, buffer.ndim, buffer.contiguous) == ("B", 1, True)
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        np.frombuffer(buffer, np.uint8).flags.writeable = True

    def test_received_views_stay_valid_as_long_as_they_live(
        self, net: _Net, parked: _Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        sizes = (100, 65 * _KB, 300 * _KB, 2 * _MB)
        kept: list[tuple[memoryview, int]] = []
        for round_ in range(4):
            for size in sizes:
                sent = Message(b"", [_view(np.full(size, round_, np.uint8))])
                future = requester.request(sent)
                request, reply = parked.take()
                reply(sent)
                for got in (request, future.result(_PATIENCE)):
                    # A slice must keep the whole alive.
                    kept.append((got.buffers[0][size // 2 :], round_))
        del request, reply, future, got
        requester.close()
        endpoint.close()
        gc.collect()
        np.zeros(64 * _MB, np.uint8)  # so that memory given back would be used again
        for view, value in kept:
            assert _filled_with(view) == value

    # Addresses ----------------------------------------------------------------------------

    def test_an_endpoint_tells_where_peers_reach_it(self, net: _Net) -> None:
        first, second = net.serve(_echo), net.serve(_echo)
        assert first.url != second.url
        for endpoint in (first, second):
            requester = net.connect(endpoint)
            assert requester.url == endpoint.url
            assert requester.call(Message(b"x"), _PATIENCE).header == b"x"

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "link-local"])
    def test_any_address_of_this_machine_serves_and_is_reached(self, net: _Net, host: str) -> None:
        if host == "link-local":
            host = _link_local()
        if ":" in host and not _has_ipv6():
            pytest.skip("this machine has no IPv6")
        endpoint = net.serve(_echo, Url.parse(self.url).with_host(host))
        assert endpoint.url.host == host.strip("[]")
        for url in (endpoint.url, Url.parse(str(endpoint.url)), endpoint.url.with_host(host)):
            requester = net.connect_to(url)
            assert requester.call(Message(b"x"), _PATIENCE).header == b"x"
            assert requester.request(Message(b"x")).result(_PATIENCE).header == b"x"

    def test_an_address_that_is_taken_is_an_oserror(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        with pytest.raises(OSError, match=r".+"):
            net.serve(_echo, endpoint.url)
        assert net.connect(endpoint).call(Message(b"unharmed"), _PATIENCE).header == b"unharmed"

    def test_where_nobody_listens_is_unreachable_within_the_timeout(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        endpoint.close()
        with _within(3.0), pytest.raises(Unreachable):
            net.connect(endpoint, 1.0).call(Message(b""), 1.0)

    def test_an_address_can_be_taken_again_at_once(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        for _ in range(5):
            requester = net.connect(endpoint)
            requester.call(_message(b"", 300 * _KB), _PATIENCE)
            endpoint.close()
            endpoint = net.serve(_echo, endpoint.url)
        assert net.connect(endpoint).call(Message(b"new"), _PATIENCE).header == b"new"

    def test_a_lost_connection_stays_lost(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        requester = net.connect(endpoint)
        requester.call(Message(b""), _PATIENCE)
        endpoint.close()
        net.serve(_echo, endpoint.url)

        def lost() -> bool:
            try:
                requester.request(Message(b""))
            except Unreachable:
                return True
            return False

        assert _until(lost, 2.0)
        with _within(1.0), pytest.raises(Unreachable):
            requester.call(Message(b""), _PATIENCE)

    def test_endpoints_are_context_managers(self, net: _Net) -> None:
        with net.serve(_echo) as endpoint, net.connect(endpoint) as requester:
            assert requester.call(Message(b"x"), _PATIENCE).header == b"x"
        with pytest.raises(Closed):
            requester.call(Message(b"x"), _PATIENCE)

    # Ownership ----------------------------------------------------------------------------

    @pytest.mark.parametrize(("size", "count"), [(1000, 300), (300_000, 300), (3_000_000, 40)])
    def test_an_array_may_be_changed_once_request_has_returned(
        self, net: _Net, size: int, count: int
    ) -> None:
        torn = []

        def on_request(message: Message, reply: Reply) -> None:
            if _filled_with(message.buffers[0]) != message.header[0]:
                torn.append(message.header[0])
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        futures = []
        for index in range(count):
            array.fill(index % 250)
            futures.append(requester.request(Message(bytes([index % 250]), [_view(array)])))
            array.fill(255)
        _results(futures)
        assert not torn

    @pytest.mark.parametrize(("size", "count"), [(1000, 200), (300_000, 200), (3_000_000, 30)])
    def test_an_array_may_be_changed_once_call_has_returned(
        self, net: _Net, size: int, count: int
    ) -> None:
        kept: list[tuple[Message, int]] = []

        def on_request(message: Message, reply: Reply) -> None:
            kept.append((message, message.header[0]))
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        for index in range(count):
            array.fill(index % 250)
            requester.call(Message(bytes([index % 250]), [_view(array)]), _PATIENCE)
            array.fill(255)
            if len(kept) > 10:  # read after the sender has changed its array
                message, value = kept.pop(0)
                assert _filled_with(message.buffers[0]) == value

    @pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
    def test_an_array_may_be_changed_once_call_has_raised(self, net: _Net, size: int) -> None:
        open_again = threading.Event()
        torn, arrived = [], []

        def on_request(message: Message, reply: Reply) -> None:
            open_again.wait(_PATIENCE)
            arrived.append(message.header)
            if _filled_with(message.buffers[0]) != message.header[0]:
                torn.append(message.header[0])
            reply(Message(message.header))

        requester = net.connect(net.serve(on_request))
        array = np.empty(size, np.uint8)
        for index in range(12):
            array.fill(index)
            with pytest.raises(DeadlineExceeded):
                requester.call(Message(bytes([index]), [_view(array)]), 0.03)
            array.fill(255)
        open_again.set()
        array.fill(99)
        reply = requester.call(Message(bytes([99]), [_view(array)]), _PATIENCE)
        assert reply.header == bytes([99])
        assert arrived
        assert not torn

    @pytest.mark.parametrize("where", ["inline", "from another thread"])
    @pytest.mark.parametrize(("size", "count"), [(1000, 200), (300_000, 200), (3_000_000, 30)])
    def test_an_array_may_be_changed_once_it_is_replied(
        self, net: _Net, size: int, count: int, where: str
    ) -> None:
        output = np.empty(size, np.uint8)

        def answer(message: Message, reply: Reply) -> None:
            output.fill(message.header[0])
            reply(Message(message.header, [_view(output)]))
            output.fill(255)

        parked = _Parked()
        requester = net.connect(net.serve(answer if where == "inline" else parked))
        # Many under way, so that replies queue behind others.
        futures = [requester.request(Message(bytes([i % 250]))) for i in range(count)]
        if where != "inline":
            for _ in range(count):
                answer(*parked.take())
        for index, future in enumerate(futures):
            reply = future.result(_PATIENCE)
            assert reply.header[0] == index % 250
            assert _filled_with(reply.buffers[0]) == index % 250

    @pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
    def test_an_array_may_be_changed_once_it_is_broadcast(
        self, net: _Net, parked: _Parked, size: int
    ) -> None:
        endpoint = net.serve(parked)
        requesters = [net.connect(endpoint) for _ in range(4)]
        output = np.empty(size, np.uint8)
        for value in range(5):
            futures = [each.request(Message(b"")) for each in requesters * 3]
            replies = [parked.take()[1] for _ in futures]
            output.fill(value)
            endpoint.reply_many(iter(replies), Message(b"all", [_view(output)]))
            output.fill(255)
            for reply in _results(futures):
                assert reply.header == b"all"
                assert _filled_with(reply.buffers[0]) == value

    def test_what_is_filled_in_room_arrives_and_stays(self, net: _Net, parked: _Parked) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        if requester.allocate(_MB) is None:
            assert endpoint.allocate(_MB) is None
            pytest.skip("this transport has no memory of its own")
        kept = []
        for value in range(20):
            asked, answered = requester.allocate(_MB), endpoint.allocate(_MB)
            assert asked is not None
            assert answered is not None
            assert len(asked) == len(answered) == _MB
            asked[:], answered[:] = bytes([value]) * _MB, bytes([value + 100]) * _MB
            future = requester.request(Message(b"", [asked, asked[100:200]]))
            message, reply = parked.take()
            reply(Message(b"", [answered]))
            kept.append((value, message.buffers, future.result(_PATIENCE).buffers))
            del asked, answered, message, reply, future
        for value, request, (back,) in kept:
            assert [_filled_with(buffer) for buffer in request] == [value, value]
            assert _filled_with(back) == value + 100

    # Replies ------------------------------------------------------------------------------

    def test_parked_requests_hold_no_thread_and_each_gets_its_own_reply(
        self, net: _Net, parked: _Parked
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

        _results([net.start(answer, taken[start::3]) for start in range(3)])
        replies = [reply.header for reply in _results(futures)]
        assert replies == [b"for %d" % index for index in range(500)]

    def test_a_broadcast_answers_every_parked_request(self, net: _Net, parked: _Parked) -> None:
        endpoint = net.serve(parked)
        requesters = [net.connect(endpoint) for _ in range(3)]
        futures = [each.request(Message(b"")) for each in requesters for _ in range(170)]
        replies = [parked.take()[1] for _ in futures]
        sent = _message(b"news", 100, 300 * _KB)
        endpoint.reply_many(replies, sent)
        for reply in _results(futures):
            _assert_same(reply, sent)

    def test_a_broadcast_from_within_on_request_is_delivered(self, net: _Net) -> None:
        waiting: list[Reply] = []

        def on_request(message: Message, reply: Reply) -> None:
            waiting.append(reply)
            if message.header == b"now":
                endpoint.reply_many(waiting, Message(b"news"))

        endpoint = net.serve(on_request)
        requester = net.connect(endpoint)
        futures = [requester.request(Message(header)) for header in (b"", b"", b"now")]
        assert [reply.header for reply in _results(futures)] == [b"news"] * 3

    def test_a_late_reply_is_never_taken_for_the_next_ones(
        self, net: _Net, parked: _Parked
    ) -> None:
        requester = net.connect(net.serve(parked))
        for index in range(20):
            with pytest.raises(DeadlineExceeded):
                requester.call(Message(b"late"), 0.01)
            next_one = net.start(requester.call, Message(b"%d" % index), _PATIENCE)
            late, last = parked.take(), parked.take()
            assert (late[0].header, last[0].header) == (b"late", b"%d" % index)
            late[1](_message(b"too late", 300 * _KB))
            last[1](Message(b"%d" % index))
            assert next_one.result(_PATIENCE).header == b"%d" % index

    @pytest.mark.parametrize("timeout", [0.001, 0.05, 0.3])
    def test_a_deadline_is_kept(self, net: _Net, parked: _Parked, timeout: float) -> None:
        requester = net.connect(net.serve(parked))
        for message in (Message(b""), _message(b"", 3 * _MB)):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                requester.call(message, timeout)
            assert timeout - 1e-3 <= time.monotonic() - began < timeout + 0.5

    def test_a_call_may_wait_for_ever(self, net: _Net) -> None:
        requester = net.connect(net.serve(_echo))
        for timeout in (1e6, 1e9):
            assert requester.call(Message(b"x"), timeout).header == b"x"

    def test_a_request_may_be_sent_from_a_futures_callback(self, net: _Net) -> None:
        requester = net.connect(net.serve(_echo))
        second: queue.SimpleQueue[Future[Message]] = queue.SimpleQueue()
        first = requester.request(Message(b"first"))
        first.add_done_callback(lambda _: second.put(requester.request(Message(b"second"))))
        assert second.get(timeout=_PATIENCE).result(_PATIENCE).header == b"second"

    def test_a_call_may_be_made_in_a_futures_callback(self, net: _Net) -> None:
        watched = threading.Event()

        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"first":
                watched.wait(_PATIENCE)
            reply(message)

        requester = net.connect(net.serve(on_request))
        second: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()

        def call(_: Future[Message]) -> None:
            try:
                second.put(requester.call(Message(b"second"), 2.0))
            except Exception as error:
                second.put(error)

        requester.request(Message(b"first")).add_done_callback(call)
        watched.set()
        got = second.get(timeout=_PATIENCE)
        assert isinstance(got, Message), got
        assert got.header == b"second"
        assert requester.call(Message(b"third"), _PATIENCE).header == b"third"

    def test_a_callback_that_raises_hurts_nobody(self, net: _Net, parked: _Parked) -> None:
        requester = net.connect(net.serve(parked))
        future = requester.request(Message(b"first"))
        future.add_done_callback(lambda _: 1 // 0)
        parked.take()[1](Message(b""))
        future.result(_PATIENCE)
        other = requester.request(Message(b"second"))
        parked.take()[1](Message(b"fine"))
        assert other.result(_PATIENCE).header == b"fine"

    # Peers --------------------------------------------------------------------------------

    def test_a_peer_is_the_same_for_all_requests_over_one_connection(
        self, net: _Net, parked: _Parked
    ) -> None:
        endpoint = net.serve(parked)
        ids = []
        for _ in range(2):
            requester = net.connect(endpoint)
            under_way = [net.start(requester.call, Message(b""), _PATIENCE) for _ in range(3)]
            under_way += [requester.request(Message(b"")) for _ in range(3)]
            peers = []
            for _ in under_way:
                _, reply = parked.take()
                assert reply.expired in (False, True)
                peers.append(reply.peer)
                reply(Message(b""))
            _results(under_way)
            assert all(isinstance(peer.address, str) and peer.address for peer in peers)
            assert len({peer.id for peer in peers}) == 1
            ids.append(peers[0].id)
        assert ids[0] != ids[1]

    def test_a_reply_to_a_peer_that_has_gone_is_dropped_and_counted(
        self, net: _Net, parked: _Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        replies = []
        for _ in range(200):
            requester.request(Message(b""))
            replies.append(parked.take()[1])
        requester.close()

        def counted() -> bool:
            with _within(1.0):
                replies.pop()(_message(b"", 300 * _KB))
            return endpoint.dropped > 0

        assert _until(counted, 2.0)
        dropped = endpoint.dropped
        endpoint.reply_many(replies[:5], Message(b""))
        assert _until(lambda: endpoint.dropped >= dropped + 5)
        assert net.start(net.connect(endpoint).request, Message(b"other")).result(_PATIENCE)
        assert parked.take()[0].header == b"other"

    # Many at once -------------------------------------------------------------------------

    def test_threads_and_connections_may_call_at_once(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        shared = [net.connect(endpoint) for _ in range(2)]
        threads = 8
        barrier = threading.Barrier(threads)

        def work(number: int) -> None:
            requester = shared[number % 2]
            rng = np.random.default_rng(number)
            sizes = rng.choice([0, 10, 1000, 65_000, 260_000, 600_000], 30)
            barrier.wait(_PATIENCE)
            futures = []
            for size in [*sizes, 3_000_000]:
                data = rng.integers(0, 256, size, np.uint8)
                check = zlib.crc32(data)
                message = Message(b"%d %d" % (number, check), [_view(data)])
                if rng.random() < 0.7:
                    assert _crc(requester.call(message, _PATIENCE)) == check
                else:
                    futures.append((requester.request(message), check))
            for future, check in futures:
                assert _crc(future.result(_PATIENCE)) == check

        _results([net.start(work, number) for number in range(threads)], 3 * _PATIENCE)

    def test_what_one_thread_asks_arrives_in_the_order_in_which_it_was_asked(
        self, net: _Net
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
            for _ in range(40):
                futures = []
                for _ in range(rng.randrange(4)):
                    size = rng.choice((0, 1000, 100 * _KB, 300 * _KB, 3 * _MB, 5 * _MB))
                    sent = _message(b"%d %d" % (seed, next(numbers)), size)
                    futures.append(requester.request(sent))
                for size in (0, rng.choice((1000, 5 * _MB))):
                    sent = _message(b"%d %d" % (seed, next(numbers)), size)
                    requester.call(sent, _PATIENCE)
                if rng.random() < 0.5:
                    _results(futures)

        ask(0)
        _results([net.start(ask, seed) for seed in (1, 2)], 3 * _PATIENCE)
        for numbers in arrived.values():
            assert numbers == sorted(numbers)

    def test_what_a_futures_callback_asks_arrives_in_order_too(self, net: _Net) -> None:
        arrived = []

        def on_request(message: Message, reply: Reply) -> None:
            arrived.append(message.header)
            reply(Message(b""))

        requester = net.connect(net.serve(on_request))
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def ask(_: Future[Message]) -> None:
            try:
                requester.request(_message(b"second", _MB))
                requester.call(Message(b"third"), 2.0)
                done.put(None)
            except Exception as error:
                done.put(error)

        for _ in range(20):
            requester.request(Message(b"first")).add_done_callback(ask)
            assert done.get(timeout=_PATIENCE) is None
        assert arrived == [b"first", b"second", b"third"] * 20

    def test_a_thread_that_has_called_and_ended_leaves_nothing_behind(self, net: _Net) -> None:
        requester = net.connect(net.serve(_echo))

        def use() -> None:
            requester.call(Message(b"x"), _PATIENCE)
            requester.request(Message(b"x")).result(_PATIENCE)
            requester.call(_message(b"", 300 * _KB), _PATIENCE)

        net.start(use).result(_PATIENCE)
        before = _open_files()
        for _ in range(100):
            thread = threading.Thread(target=use)
            thread.start()
            thread.join(_PATIENCE)
        assert _until(lambda: _open_files() < before + 10, 1.0)

    def test_requests_are_passed_on_one_at_a_time(self, net: _Net) -> None:
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
        _results([each.request(Message(b"")) for _ in range(100) for each in requesters])
        assert all(most)

    # Overload -----------------------------------------------------------------------------

    def test_request_returns_at_once_though_nobody_reads(self, net: _Net) -> None:
        open_again = threading.Event()

        def on_request(message: Message, reply: Reply) -> None:
            open_again.wait(_PATIENCE)
            reply(message)

        endpoint = net.serve(on_request)
        requester = net.connect(endpoint)
        message = _message(b"", 100 * _KB)
        futures = []
        for _ in range(400):
            with _within(0.5):
                futures.append(requester.request(message))
        open_again.set()
        for reply in _results(futures):
            _assert_same(reply, message)

    def test_what_is_overloaded_says_so_and_recovers(self, net: _Net, parked: _Parked) -> None:
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
        assert all(reply.header == b"done" for reply in _results(futures))
        last = requester.request(Message(b"again"))
        parked.take()[1](Message(b"fine"))
        assert last.result(_PATIENCE).header == b"fine"

    def test_to_cancel_is_to_forget(self, net: _Net, parked: _Parked) -> None:
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
        assert next_one.result(_PATIENCE).header == b"in time"
        assert forgotten() is None

    # Slow and failing handlers ------------------------------------------------------------

    @pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
    def test_a_handler_that_raises_is_logged_and_the_endpoint_lives(
        self, net: _Net, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
    ) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"raise":
                raise kind("a handler's own fault")
            reply(message)

        requester = net.connect(net.serve(on_request))
        for _ in range(3):
            requester.request(Message(b"raise"))
            assert requester.call(Message(b"fine"), _PATIENCE).header == b"fine"
        assert _until(lambda: caplog.text.count("a handler's own fault") >= 3)

    # Whose thread it is -------------------------------------------------------------------

    def test_requests_are_taken_in_the_thread_that_carries_the_loop(self, net: _Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        for index in range(20):
            reply = requester.call(Message(b"thread %d" % index), _PATIENCE)
            assert reply.header == str(handlers.ident).encode()
            _assert_same(
                requester.call(_message(b"", 300 * _KB), _PATIENCE), _message(b"", 300 * _KB)
            )

    def test_the_loop_goes_on_without_whoever_carries_it_once_relieved(self, net: _Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        for _ in range(3):
            blocked = requester.request(Message(b"block"))
            handlers.stuck.get(timeout=_PATIENCE)
            handlers.endpoint.relieve()
            for _ in range(2):
                called = requester.call(Message(b"at once"), _PATIENCE)
                assert called.header != str(handlers.ident).encode()
            assert not blocked.done()
            handlers.go_on.put(None)
            assert blocked.result(_PATIENCE).header == b"block"
            # And comes back.
            thread = requester.call(Message(b"thread"), _PATIENCE).header
            assert thread == str(handlers.ident).encode()

    def test_what_another_thread_replies_waits_for_nobody_who_is_away(self, net: _Net) -> None:
        handlers = net.carry()
        requester = net.connect(handlers.endpoint)
        kept = requester.request(Message(b"keep"))
        late = handlers.kept.get(timeout=_PATIENCE)
        blocked = requester.request(Message(b"block"))
        handlers.stuck.get(timeout=_PATIENCE)
        late(Message(b"late"))
        assert kept.result(_PATIENCE).header == b"late"
        assert not blocked.done()
        handlers.go_on.put(None)
        assert blocked.result(_PATIENCE).header == b"block"

    def test_wake_has_a_carrier_that_waits_look_up(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        if not endpoint.carry(lambda: False):
            pytest.skip("this transport has no loop that could be carried")
        staying, looked = threading.Event(), threading.Semaphore(0)
        staying.set()

        def stay() -> bool:
            looked.release()
            return staying.is_set()

        carrying = net.start(endpoint.carry, stay)
        assert looked.acquire(timeout=_PATIENCE)
        staying.clear()
        endpoint.wake()
        assert carrying.result(_PATIENCE)
        endpoint.relieve()
        assert net.connect(endpoint).call(Message(b"x"), _PATIENCE).header == b"x"

    def test_two_carry_one_loop_in_turns(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
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
                assert requester.call(Message(header), _PATIENCE).header == header
        finally:
            done.set()
            endpoint.wake()
            endpoint.relieve()
        for each in carrying:
            while not each.done():
                endpoint.wake()
                endpoint.relieve()
            each.result(_PATIENCE)

    def test_relieve_and_wake_are_harmless_where_nobody_carries(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        requester = net.connect(endpoint)
        for _ in range(5):
            endpoint.relieve()
            endpoint.wake()
            sent = _message(b"", 300 * _KB)
            _assert_same(requester.call(sent, _PATIENCE), sent)

    def test_relieve_may_come_at_any_moment(self, net: _Net) -> None:
        # Many parts take a while to send, in which the loop may change hands.
        parts = [_view(np.ones(size, np.uint8)) for size in [300] * 100 + [300_000]]
        handlers = net.carry(parts)
        requester = net.connect(handlers.endpoint)
        done = threading.Event()

        def relieve() -> None:
            while not done.is_set():
                handlers.endpoint.relieve()
                done.wait(1e-4)

        relieving = net.start(relieve)
        try:
            for index in range(200):
                futures = [requester.request(Message(b"%d %d" % (index, i))) for i in range(3)]
                called = requester.call(Message(b"%d" % index), _PATIENCE)
                assert called.header == b"%d" % index
                for i, reply in enumerate(_results(futures)):
                    assert reply.header == b"%d %d" % (index, i)
                    assert list(map(len, reply.buffers)) == list(map(len, parts))
        finally:
            done.set()
        relieving.result(_PATIENCE)

    # The end ------------------------------------------------------------------------------

    def test_when_close_returns_the_threads_have_ended(self, net: _Net) -> None:
        before = set(threading.enumerate())
        for _ in range(5):
            endpoint = net.serve(_echo)
            requester = net.connect(endpoint)
            requester.call(Message(b""), _PATIENCE)
            requester.request(Message(b"")).result(_PATIENCE)
            requester.close()
            endpoint.close()
            assert set(threading.enumerate()) <= before

    def test_an_end_that_has_been_closed_is_kept_alive_by_nobody(self, net: _Net) -> None:
        endpoint = net.transport.serve(Url.parse(self.url), _echo)
        requester = net.transport.connect(endpoint.url, _PATIENCE)
        requester.call(Message(b""), _PATIENCE)
        requester.request(_message(b"", 5 * _MB)).result(_PATIENCE)
        net.start(requester.call, Message(b""), _PATIENCE).result(_PATIENCE)
        left = {weakref.ref(end) for end in (endpoint, requester)}
        requester.close()
        endpoint.close()
        del endpoint, requester

        def gone() -> bool:
            gc.collect()
            return not any(end() for end in left)

        assert _until(gone, 3.0)

    def test_closing_a_requester_wakes_all_who_wait_with_closed(
        self, net: _Net, parked: _Parked
    ) -> None:
        requester = net.connect(net.serve(parked))
        waiting = [net.start(requester.call, Message(b""), _PATIENCE) for _ in range(3)]
        waiting += [requester.request(Message(b"")) for _ in range(3)]
        for _ in waiting:
            parked.take()
        with _within(2.0):
            requester.close()
            for each in waiting:
                with pytest.raises(Closed):
                    each.result(_PATIENCE)
        for _ in range(2):
            with pytest.raises(Closed):
                requester.request(Message(b""))
            with pytest.raises(Closed):
                requester.call(Message(b""), 1.0)
            requester.close()

    def test_closing_an_endpoint_wakes_all_who_wait_for_it(
        self, net: _Net, parked: _Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        waiting = [net.start(requester.call, Message(b""), _PATIENCE) for _ in range(3)]
        waiting += [requester.request(Message(b"")) for _ in range(3)]
        replies = [parked.take()[1] for _ in waiting]
        with _within(2.5):
            endpoint.close()
            for each in waiting:
                with pytest.raises((Unreachable, Closed)):
                    each.result(_PATIENCE)
        for reply in replies:  # late, and harmless
            reply(Message(b""))
        endpoint.reply_many(replies, Message(b""))
        endpoint.relieve()
        endpoint.close()

    def test_an_endpoint_closes_though_whoever_carries_it_is_away(self, net: _Net) -> None:
        handlers = net.carry()
        endpoint = handlers.endpoint
        future = net.connect(endpoint).request(Message(b"block"))
        handlers.stuck.get(timeout=_PATIENCE)
        with _within(3.0):
            endpoint.close()
            with pytest.raises((Unreachable, Closed)):
                future.result(_PATIENCE)
        with net.serve(_echo, endpoint.url) as another:
            assert net.connect(another).call(Message(b"x"), _PATIENCE).header == b"x"
        handlers.go_on.put(None)
        handlers.thread.result(_PATIENCE)
        assert not endpoint.carry(lambda: True)

    def test_a_handler_may_close_the_endpoint_that_its_thread_carries(self, net: _Net) -> None:
        handlers = net.carry()
        future = net.connect(handlers.endpoint).request(Message(b"close"))
        with pytest.raises((Unreachable, Closed)):
            future.result(_PATIENCE)
        handlers.thread.result(_PATIENCE)

    @pytest.mark.parametrize("size", [0, 300_000, 3_000_000])
    def test_replies_given_just_before_the_close_are_delivered(
        self, net: _Net, parked: _Parked, size: int
    ) -> None:
        for _ in range(10):
            endpoint = net.serve(parked)
            requester = net.connect(endpoint)
            waiting = [net.start(requester.call, Message(b""), _PATIENCE) for _ in range(3)]
            waiting += [requester.request(Message(b"")) for _ in range(3)]
            for _, reply in [parked.take() for _ in waiting]:
                reply(_message(b"last", size))
            endpoint.close()
            assert [reply.header for reply in _results(waiting)] == [b"last"] * 6

    def test_a_last_reply_from_within_on_request_is_delivered(self, net: _Net) -> None:
        for _ in range(10):

            def on_request(message: Message, reply: Reply) -> None:
                reply(message)
                endpoint.close()  # noqa: B023 - called before the next one is made

            endpoint = net.serve(on_request)
            assert net.connect(endpoint).call(Message(b"last"), _PATIENCE).header == b"last"
            endpoint.close()

    def test_either_end_may_be_closed_from_within_on_request(self, net: _Net) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            (endpoint if message.header == b"endpoint" else requester).close()

        for header in (b"endpoint", b"requester"):
            endpoint = net.serve(on_request)
            requester = net.connect(endpoint)
            future = requester.request(Message(header))
            with _within(2.5), pytest.raises((Unreachable, Closed)):
                future.result(_PATIENCE)

    def test_either_end_may_be_closed_from_within_a_callback(self, net: _Net) -> None:
        endpoint = net.serve(_echo)
        for end in ("requester", "endpoint"):
            requester = net.connect(endpoint)
            closed = threading.Event()

            def close(_: object, end: Endpoint, closed: threading.Event) -> None:
                end.close()
                closed.set()

            which = requester if end == "requester" else endpoint
            future = requester.request(Message(b""))
            future.add_done_callback(lambda f, e=which, c=closed: close(f, e, c))  # type: ignore[misc]
            with _within(2.5):
                assert closed.wait(_PATIENCE)
                with pytest.raises((Closed, Unreachable)):
                    requester.call(Message(b""), _PATIENCE)

    def test_either_end_may_be_closed_from_the_callback_that_tells_of_the_end(
        self, net: _Net, parked: _Parked
    ) -> None:
        endpoint = net.serve(parked)
        requester = net.connect(endpoint)
        future = requester.request(Message(b""))
        closed = threading.Event()
        future.add_done_callback(lambda _: (requester.close(), endpoint.close(), closed.set()))  # type: ignore[func-returns-value]
        parked.take()
        with _within(2.5):
            endpoint.close()
            assert closed.wait(_PATIENCE)

    def test_several_threads_may_close_at_once(self, net: _Net, parked: _Parked) -> None:
        for _ in range(5):
            endpoint = net.serve(parked)
            requester = net.connect(endpoint)
            future = requester.request(Message(b""))
            parked.take()
            barrier = threading.Barrier(6)

            def close(end: Endpoint, barrier: threading.Barrier) -> None:
                barrier.wait(_PATIENCE)
                end.close()

            ends = (endpoint, requester) * 3
            with _within(3.0):
                _results([net.start(close, end, barrier) for end in ends])
                with pytest.raises((Unreachable, Closed)):
                    future.result(_PATIENCE)

    def test_traffic_may_be_under_way_when_either_end_closes(self, net: _Net) -> None:
        for which in (0, 1) * 5:
            endpoint = net.serve(_echo)
            requester = net.connect(endpoint)
            calls = threading.Semaphore(0)

            def work(requester: Requester, calls: threading.Semaphore) -> None:
                sent = _message(b"", 300 * _KB)
                while True:
                    try:
                        future = requester.request(sent)
                        _assert_same(requester.call(sent, _PATIENCE), sent)
                        _assert_same(future.result(_PATIENCE), sent)
                    except (Closed, Unreachable):
                        return
                    calls.release()

            workers = [net.start(work, requester, calls) for _ in range(2)]
            for _ in range(4):
                assert calls.acquire(timeout=_PATIENCE)
            with _within(3.0):
                (endpoint, requester)[which].close()
                _results(workers)

    # Other processes ----------------------------------------------------------------------

    @pytest.fixture
    def child(self) -> Iterator[Callable[..., _Child]]:
        """Starts processes, and ends them after the test."""
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        children: list[_Child] = []

        def start(role: str, url: Url | str) -> _Child:
            children.append(_Child(role, str(url)))
            return children[-1]

        yield start
        for each in children:
            each.end()

    def test_another_process_answers_and_killing_it_is_noticed(
        self, net: _Net, child: Callable[..., _Child]
    ) -> None:
        server = child("serve", self.url)
        requester = net.transport.connect(Url.parse(server.line()), _PATIENCE)
        with requester:
            for size in (0, 1000, 300 * _KB, 5 * _MB):
                sent = _message(b"echo", size)
                _assert_same(requester.call(sent, _PATIENCE), sent)
            waiting = [net.start(requester.call, Message(b"park"), _PATIENCE) for _ in range(2)]
            waiting += [requester.request(Message(b"park")) for _ in range(2)]
            for _ in waiting:
                assert server.line() == "parked"
            server.kill()
            with _within(2.0):
                for each in waiting:
                    with pytest.raises(Unreachable):
                        each.result(_PATIENCE)
                with pytest.raises(Unreachable):
                    requester.request(Message(b"")).result(_PATIENCE)
                with pytest.raises(Unreachable):
                    requester.call(Message(b""), 1.0)

    def test_a_client_that_is_killed_does_not_hurt_the_server(
        self, net: _Net, parked: _Parked, child: Callable[..., _Child]
    ) -> None:
        endpoint = net.serve(parked)
        client = child("ask", endpoint.url)
        taken = [parked.take() for _ in range(20)]
        client.kill()
        for message, reply in taken[:10]:
            with _within(1.0):
                reply(Message(b"", message.buffers))
        endpoint.reply_many([reply for _, reply in taken[10:]], _message(b"", 300 * _KB))
        # What was received from it is still there.
        assert all(_filled_with(message.buffers[0]) == 7 for message, _ in taken)
        other = net.connect(endpoint).request(Message(b"other"))
        while (last := parked.take())[0].header != b"other":
            pass
        last[1](Message(b"fine"))
        assert other.result(_PATIENCE).header == b"fine"

    def test_no_call_outlives_its_deadline_beside_a_stalled_upload(
        self, net: _Net, child: Callable[..., _Child]
    ) -> None:
        server = child("serve", self.url)
        url = Url.parse(server.line())
        with net.transport.connect(url, _PATIENCE) as requester:
            requester.call(Message(b""), _PATIENCE)
            server.freeze()
            upload = requester.request(_message(b"", 10 * _MB))
            waiting = net.start(requester.call, Message(b""), 0.2)
            with pytest.raises(DeadlineExceeded):
                waiting.result(2.0)
            assert upload.cancel()
            for size in (0, 5 * _MB, 0):
                waiting = net.start(requester.call, _message(b"", size), 0.1)
                with pytest.raises(DeadlineExceeded):
                    waiting.result(2.0)
            with _within(2.0):
                requester.close()
        server.thaw()
        with net.transport.connect(url, _PATIENCE) as requester:
            assert requester.call(Message(b"unharmed"), _PATIENCE).header == b"unharmed"

    def test_a_forked_child_keeps_neither_the_address_nor_the_clients_of_a_server_that_is_killed(
        self, net: _Net, child: Callable[..., _Child]
    ) -> None:
        server = child("serve", self.url)
        url = Url.parse(server.line())
        with net.transport.connect(url, _PATIENCE) as requester:
            requester.call(Message(b"fork"), _PATIENCE)
            waiting: list[Future[Message]] = [
                net.start(requester.call, Message(b"park"), _PATIENCE),
                net.start(lambda: requester.request(Message(b"park")).result(_PATIENCE)),
            ]
            for _ in waiting:
                assert server.line() == "parked"
            server.kill()
            with _within(2.0):
                for each in waiting:
                    with pytest.raises(Unreachable):
                        each.result(_PATIENCE)
        endpoint = net.serve(_echo, url)
        assert net.connect(endpoint).call(Message(b"new"), _PATIENCE).header == b"new"

    def test_a_forked_child_keeps_no_connection_of_a_client_that_is_killed(
        self, net: _Net, parked: _Parked, child: Callable[..., _Child]
    ) -> None:
        endpoint = net.serve(parked)
        client = child("ask and fork", endpoint.url)
        replies = [parked.take()[1] for _ in range(20)]
        assert client.line() == "forked"
        client.kill()

        def counted() -> bool:
            if replies:
                replies.pop()(Message(b""))
            return endpoint.dropped > 0

        assert _until(counted, 2.0)

    # Memory -------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["call", "request", "late", "cancelled"])
    def test_memory_is_freed_without_the_garbage_collector(
        self, net: _Net, parked: _Parked, how: str
    ) -> None:
        def on_request(message: Message, reply: Reply) -> None:
            if message.header == b"late":
                late.append(reply)
            else:
                reply(message)

        late: list[Reply] = []
        requester = net.connect(net.serve(on_request))
        message = _message(b"late" if how in ("late", "cancelled") else b"", _MB)
        used = []
        gc.collect()
        gc.disable()
        try:
            for index in range(200):
                if how == "call":
                    requester.call(message, _PATIENCE)
                elif how == "request":
                    requester.request(message).result(_PATIENCE)
                elif how == "late":
                    with pytest.raises(DeadlineExceeded):
                        requester.call(message, 0.001)
                else:
                    requester.request(message).cancel()
                    requester.call(Message(b""), _PATIENCE)
                while late:
                    late.pop()(message)
                if index in (50, 199):
                    requester.call(Message(b""), _PATIENCE)
                    used.append(_resident())
        finally:
            gc.enable()
        assert used[1] - used[0] < 64 * _MB

    @pytest.mark.parametrize("how", ["call", "request"])
    def test_a_received_buffer_dies_with_its_last_view(self, net: _Net, how: str) -> None:
        received: list[weakref.ref[memoryview]] = []

        def on_request(message: Message, reply: Reply) -> None:
            received.append(weakref.ref(message.buffers[0]))
            reply(message)

        requester = net.connect(net.serve(on_request))
        sent = _message(b"", _MB)
        gc.collect()
        gc.disable()
        try:
            if how == "call":
                got = requester.call(sent, _PATIENCE)
            else:
                got = requester.request(sent).result(_PATIENCE)
            received.append(weakref.ref(got.buffers[0]))
            del got
            assert _until(lambda: not any(view() for view in received), 2.0)
        finally:
            gc.enable()


# What the tests are made of ---------------------------------------------------------------


class _Net:
    """Makes endpoints, connections and threads, and ends them all."""

    def __init__(self, transport: Transport, url: str) -> None:
        self.transport = transport
        self._url = Url.parse(url)
        self._ends: list[Endpoint] = []
        self._threads: list[threading.Thread] = []

    def serve(self, on_request: OnRequest, url: Url | None = None) -> Endpoint:
        endpoint = self.transport.serve(url or self._url, on_request)
        self._ends.append(endpoint)
        return endpoint

    def connect(self, endpoint: Endpoint, timeout: float = _PATIENCE) -> Requester:
        return self.connect_to(endpoint.url, timeout)

    def connect_to(self, url: Url, timeout: float = _PATIENCE) -> Requester:
        requester = self.transport.connect(url, timeout)
        self._ends.append(requester)
        return requester

    def carry(self, parts: list[memoryview] | None = None) -> _Handlers:
        """Serve with an echo that runs between the rounds of a loop that a thread carries."""
        return _Handlers(self, parts)

    def start(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function in a thread of its own."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def close(self) -> None:
        for end in reversed(self._ends):
            end.close()
        for thread in self._threads:
            thread.join(_PATIENCE)


_warm: list[Transport] = []


def _live_once(transport: Transport, url: str) -> None:
    """The threads that are left afterwards are a library's own, one for each process."""
    net = _Net(transport, url)
    requester = net.connect(net.serve(_echo))
    requester.call(_message(b"", _MB), _PATIENCE)
    requester.request(_message(b"", _MB)).result(_PATIENCE)
    net.close()


class _Parked:
    """An ``on_request`` that answers nothing; the test takes the requests from it."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Message, Reply]] = queue.SimpleQueue()

    def __call__(self, message: Message, reply: Reply) -> None:
        self._arrived.put((message, reply))

    def take(self) -> tuple[Message, Reply]:
        """The next request, waited for."""
        return self._arrived.get(timeout=_PATIENCE)


class _Handlers:
    """A thread that carries an endpoint's loop, and handles what came between its rounds."""

    def __init__(self, net: _Net, parts: list[memoryview] | None = None) -> None:
        self.stuck: queue.SimpleQueue[None] = queue.SimpleQueue()  # of each that blocks
        self.go_on: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.kept: queue.SimpleQueue[Reply] = queue.SimpleQueue()  # for somebody else to answer
        self.ident = 0
        self._parts = parts
        self._waiting: deque[tuple[Message, Reply]] = deque()
        self._closing = threading.Event()
        self.endpoint = net.serve(self._take)
        if not self.endpoint.carry(lambda: False):
            pytest.skip("this transport has no loop that could be carried")
        self.thread = net.start(self._run)

    def _take(self, message: Message, reply: Reply) -> None:
        if message.header == b"at once":
            reply(Message(str(threading.get_ident()).encode()))
        else:
            self._waiting.append((message, reply))
            if threading.get_ident() != self.ident:
                self.endpoint.wake()

    def _stay(self) -> bool:
        return not self._waiting and not self._closing.is_set()

    def _run(self) -> None:
        self.ident = threading.get_ident()
        while not self._closing.is_set():
            if not self._waiting and not self.endpoint.carry(self._stay):
                return
            while self._waiting:
                self._handle(*self._waiting.popleft())

    def _handle(self, message: Message, reply: Reply) -> None:
        header = message.header
        if header == b"block":
            self.stuck.put(None)
            self.go_on.get(timeout=_PATIENCE)
        elif header == b"keep":
            self.kept.put(reply)
            return
        elif header == b"close":
            self.endpoint.close()
        elif header.startswith(b"thread"):
            header = str(threading.get_ident()).encode()
        reply(Message(header, self._parts or message.buffers))

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self.endpoint.wake()


class _Child:
    """Another process at work, which ends with its standard input."""

    def __init__(self, role: str, url: str) -> None:
        program = f"from edgeml.testing import transports as t; t._in_child({role!r}, {url!r})"
        # sys.path, because a plugin may have been put there by hand.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self._process.kill()
        self._process.wait(_PATIENCE)

    def freeze(self) -> None:
        """Stop it, as a machine that hangs does: its connections stay, but nobody reads."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until it has stopped

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _in_child(role: str, url: str) -> None:
    """What a `_Child` does."""
    transport = load_transport(Url.parse(url).scheme)
    parked: list[Reply] = []

    def on_request(message: Message, reply: Reply) -> None:
        if message.header == b"park":
            parked.append(reply)
            print("parked", flush=True)
        else:
            if message.header == b"fork":
                _fork()
            reply(message)

    if role == "serve":
        with transport.serve(Url.parse(url), on_request) as endpoint:
            print(endpoint.url, flush=True)
            sys.stdin.read()
    else:
        with transport.connect(Url.parse(url), _PATIENCE) as requester:
            array = np.full(300 * _KB, 7, np.uint8)
            for _ in range(20):
                requester.request(Message(b"park", [_view(array)]))
            if role == "ask and fork":
                _fork()
                print("forked", flush=True)
            sys.stdin.read()


def _fork() -> None:
    """Fork a child that does nothing until standard input ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        if os.fork():
            return
    while os.read(0, 1):
        pass
    os._exit(0)


def _echo(message: Message, reply: Reply) -> None:
    reply(message)


def _view(array: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(array)  # type: ignore[arg-type]


def _message(header: bytes, *sizes: int) -> Message:
    rng = np.random.default_rng(sum(sizes))
    return Message(header, [_view(rng.integers(0, 256, size, np.uint8)) for size in sizes])


def _assert_same(got: Message, sent: Message) -> None:
    assert got.header == sent.header
    assert [len(buffer) for buffer in got.buffers] == [len(buffer) for buffer in sent.buffers]
    for got_buffer, buffer in zip(got.buffers, sent.buffers, strict=True):
        # Not compared as a whole, or a failure would print megabytes.
        assert np.array_equal(np.frombuffer(got_buffer, np.uint8), np.frombuffer(buffer, np.uint8))


def _filled_with(view: memoryview) -> int | None:
    """The one value that all bytes have; None if they differ."""
    array = np.frombuffer(view, np.uint8)
    return int(array[0]) if (array == array[0]).all() else None


def _crc(message: Message) -> int:
    (buffer,) = message.buffers
    assert message.header.endswith(b" %d" % zlib.crc32(buffer))
    return zlib.crc32(buffer)


def _results(futures: list[Future[T]], timeout: float = _PATIENCE) -> list[T]:
    deadline = time.monotonic() + timeout
    return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]


def _until(condition: Callable[[], bool], timeout: float = _PATIENCE) -> bool:
    """Wait until something is so, and tell whether it came to be."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(2e-3)
    return True


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.2f} s"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _link_local() -> str:
    """An address of this machine that means something in one of its networks only."""
    try:
        with open("/proc/net/if_inet6") as file:
            interfaces = [line.split() for line in file]
    except OSError:
        interfaces = []
    for digits, _, _, scope, _, interface in interfaces:
        if scope == "20":
            return f"{ipaddress.IPv6Address(int(digits, 16))}%{interface}"
    pytest.skip("this machine has no link-local address, or does not tell")


def _open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/dev/fd"))


def _resident() -> int:
    """Bytes of memory in use; where the system does not tell, the most that ever were."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else _KB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
