"""The loop that asyncio's transports run in, and what such a transport does for them all."""

import asyncio
import errno
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from edgeml.core import Closed, Limits, Message, Url, load_transport
from edgeml.core.frames import frame
from edgeml.core.loops import Loop
from edgeml.core.pieces import PREFIX
from pairs import took, wait_until


@pytest.fixture
def loop():
    loop = Loop("a loop")
    yield loop
    loop.close()


REFUSED = 1 << 63  # of a reply's number


# The loop ---------------------------------------------------------------------------------


def test_what_is_done_in_the_loop_is_done_in_order_and_in_its_thread(loop):
    done = queue.SimpleQueue()
    for index in range(100):
        assert loop.do(lambda index=index: done.put((index, loop.inside)))
    assert [done.get(timeout=20) for _ in range(100)] == [(index, True) for index in range(100)]
    assert not loop.inside


def test_what_fails_is_logged_and_the_loop_goes_on(loop, caplog):
    loop.do(lambda: 1 // 0)

    async def fine():
        return 1

    assert loop.start(fine()).result(20) == 1
    wait_until(lambda: "ZeroDivisionError" in caplog.text)


def test_who_connects_as_a_server_closes_is_not_left_waiting(loop):
    async def come_too_late():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        peer = socket.create_connection(server.sockets[0].getsockname(), 20)
        for _ in range(2):  # rounds: in the second the connection has come, and no more than that
            await asyncio.sleep(0)
        server.close()
        return peer

    with loop.start(come_too_late()).result(20) as peer, suppress(ConnectionResetError):
        peer.settimeout(20)
        assert peer.recv(1) == b""


def test_connections_that_nobody_closed_end_with_the_loop(loop):
    made = threading.Event()

    class Server(asyncio.Protocol):
        def connection_made(self, transport):
            made.set()

    async def serve():
        return await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)

    async def stop():
        server.close()

    server = loop.start(serve()).result(20)
    address = server.sockets[0].getsockname()
    with socket.create_connection(address, 20) as peer, suppress(ConnectionResetError):
        assert made.wait(20)
        loop.close(stop)
        assert peer.recv(1) == b""


def test_only_the_first_close_runs_its_last_coroutine_and_all_wait_for_it(loop):
    ran = []

    async def last():
        await asyncio.sleep(0.2)
        ran.append(threading.current_thread().name)

    closing = [threading.Thread(target=loop.close, args=(last,)) for _ in range(5)]
    for each in closing:
        each.start()
    for each in closing:
        each.join(20)
        assert ran == ["a loop"]
    assert not any(thread.name == "a loop" for thread in threading.enumerate())


def test_a_last_coroutine_that_hangs_or_fails_ends_the_loop_all_the_same(caplog):
    async def hang():
        await asyncio.Event().wait()

    async def fail():
        raise ValueError("why")

    for last in (hang, fail):
        loop = Loop("a loop")
        with took(at_most=5.0):
            loop.close(last, 0.1)
        assert not loop.do(print)
    assert "why" in caplog.text


def test_what_runs_at_the_end_is_cancelled_and_nothing_starts_afterwards(loop):
    async def hang():
        await asyncio.Event().wait()

    under_way = [loop.start(hang()) for _ in range(3)]
    loop.close()
    assert all(future.cancelled() for future in under_way)
    with pytest.raises(Closed):
        loop.start(hang())
    assert not loop.do(print)
    loop.relieve()
    loop.close()


def test_a_request_that_is_passed_on_as_the_loop_ends_is_not_handled(loop):
    handled = []

    async def last():
        loop.pass_on(lambda message, reply: handled.append(message), Message(b""), None)
        loop._finished = True

    loop.close(last)
    assert not handled


FORK = """
import gc
import os
import sys
from edgeml.core import Closed, Message, Url, load_transport

transport = load_transport("ws")
endpoint = transport.serve(Url("ws"), lambda message, reply: reply(message))
requester = transport.connect(endpoint.url, 20)
assert requester.call(Message(b"x"), 20).header == b"x"
child = os.fork()
if not child:
    for _ in range(2):
        try:
            requester.call(Message(b"x"), 1)
        except Closed:
            requester.close()
            endpoint.close()
    del requester, endpoint
    gc.collect()  # which must not touch what the parent polls
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
for _ in range(10):
    assert requester.call(Message(b"parent"), 20).header == b"parent"
requester.close()
endpoint.close()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_leaves_the_parent_alone_and_ends_at_once_in_the_child():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


# Links ------------------------------------------------------------------------------------


@pytest.fixture
def requests():
    return queue.SimpleQueue()


@pytest.fixture
def endpoint(requests):
    serve = load_transport("ws").serve
    with serve(Url("ws"), lambda message, reply: requests.put((message, reply))) as endpoint:
        yield endpoint


def piece(number, message):
    content = frame(message)
    return PREFIX.pack(number, len(content)) + content


def receive(peer):
    """The number and the size of the next message, all its pieces read."""
    number, size = PREFIX.unpack_from(first := peer.recv(timeout=20))
    left = size - len(first) + PREFIX.size
    while left:
        left -= len(peer.recv(timeout=20))
    return number, size


def test_a_peer_that_does_not_read_gets_so_much_and_no_more(requests):
    big = Message(b"", [memoryview(bytes(1 << 20))])
    limits = Limits(replies_per_client=1 << 20)
    with (
        load_transport("ws").serve(
            Url("ws"), lambda message, reply: requests.put((message, reply)), limits=limits
        ) as endpoint,
        connect(str(endpoint.url), compression=None, max_size=None, close_timeout=0.1) as peer,
    ):
        for number in range(1, 61):
            peer.send(piece(number, Message(b"more")))
        for _ in range(60):
            reply = requests.get(timeout=20)[1]
            with took(at_most=2.0):
                reply(big)
        wait_until(lambda: 5 < endpoint.dropped < 60)
        told = [receive(peer) for _ in range(60)]
        assert len([number for number, size in told if size > 1 << 20]) == 60 - endpoint.dropped
        refused = [number for number, size in told if size < 1 << 20]
        assert all(number & REFUSED for number in refused)
        peer.send(piece(99, Message(b"and now")))
        assert requests.get(timeout=20)[0].header == b"and now"


@pytest.mark.parametrize("sent", [b"", b"1234567", bytes(8), bytes(100), "text"])
def test_who_speaks_something_else_is_cut_off_and_nobody_is_hurt(endpoint, requests, sent):
    with (
        connect(str(endpoint.url)) as stranger,
        load_transport("ws").connect(endpoint.url, 20) as requester,
    ):
        stranger.send(sent)
        with pytest.raises(Exception, match="close frame"):
            stranger.recv(timeout=20)
        future = requester.request(Message(b"x"))
        requests.get(timeout=20)[1](Message(b"y"))
        assert future.result(20).header == b"y"


def test_a_web_page_is_refused(endpoint):
    with pytest.raises(InvalidStatus, match="403"):
        connect(str(endpoint.url), origin="http://localhost:8000")


def test_links_take_turns_however_much_each_has_sent():
    order: list[bytes] = []
    go = threading.Event()

    def take(message, reply):
        if message.header == b"first":
            assert go.wait(20)
        else:
            time.sleep(0.002)  # so much work it is
            order.append(message.header)

    with (
        load_transport("ws").serve(Url("ws"), take) as endpoint,
        connect(str(endpoint.url), compression=None) as one,
        connect(str(endpoint.url), compression=None) as other,
    ):
        one.send(piece(1, Message(b"first")))
        for peer, name in ((one, b"one"), (other, b"other")):
            for number in range(2, 22):
                peer.send(piece(number, Message(name)))
        go.set()
        wait_until(lambda: len(order) == 40)
    assert {b"one", b"other"} == set(order[:6])


def test_a_lack_of_descriptors_is_told_in_one_line_and_rested_from(endpoint, monkeypatch, caplog):
    asked = []

    def accept(sock):
        asked.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", accept)
    with socket.create_connection(("127.0.0.1", endpoint.url.port), 20):
        wait_until(lambda: len(asked) >= 3)
    assert asked[2] - asked[0] > 1.0
    assert caplog.text.count("out of system resource") == 1
    assert "Traceback" not in caplog.text
