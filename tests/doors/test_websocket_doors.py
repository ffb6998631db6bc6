"""What every door does whose clients come by WebSocket, whatever they say: shown by openpi's."""

from __future__ import annotations

import gc
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from edgeml_websocket.doors import WebSocketDoor
from edgeml_websocket.frames import Connection

from edgeml import InferenceServer, Limits
from edgeml.core import Url, plugins
from edgeml.core.security import SERVER_NAME
from edgeml.testing.ends import MB, resident_memory
from edgeml.testing.keys import Keys, make_keys
from pairs import took, wait_until
from raw_websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    RawWebSocket,
    Refused,
    frame,
)

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode


@contextmanager
def serving(
    function: Any = lambda x: x,
    *,
    url: str = "openpi://127.0.0.1:0",
    credentials: Any = None,
    **limits: Any,
) -> Any:
    """A server behind a door; gives it and the door's port."""
    server = InferenceServer(
        url="inproc://127.0.0.1:0", limits=Limits(**limits), credentials=credentials
    )
    server.register_interface("policy", function)
    server.open_door(url)
    with server.serving():
        yield server, Url.parse(server.doors()[0]).port


@pytest.fixture
def port() -> Any:
    with serving() as (_, port):
        yield port


@contextmanager
def visiting(port: int, *more: str, **settings: Any) -> Any:
    """A client that has been told the metadata."""
    with RawWebSocket(port, "/", *more, **settings) as client:
        client.receive()
        yield client


def is_well(client: RawWebSocket) -> bool:
    client.send(encode({"x": 1}))
    return bool(decode(client.receive())["x"] == 1)


# Frames -----------------------------------------------------------------------------------

SIZES = [0, 1, 7, 100, 112, 113, 1000, 1 << 14, (1 << 16) - 20, 1 << 16, 300_001]
LARGE = [(1 << 20) - 19, (1 << 20) - 10, 1 << 20, 3 * MB + 5]


@pytest.mark.parametrize("size", SIZES + LARGE)
def test_messages_of_any_size_arrive_whole(port: int, size: int) -> None:
    sent = np.random.default_rng(size).bytes(size)
    with visiting(port) as client:
        for _ in range(2):
            client.send(encode({"x": sent}))
            assert decode(client.receive())["x"] == sent


def test_messages_arrive_whole_however_they_are_cut(port: int) -> None:
    sent = np.random.default_rng(0).bytes(40_000)
    message = encode({"x": sent})
    with visiting(port) as client:
        for cut in (1, 2, 5, 6, 13, 16_383, 16_384, 16_385, 39_999):
            whole = frame(BINARY, message)
            for part in (whole[:cut], whole[cut : cut + 3], whole[cut + 3 :]):
                client.say(part)
                time.sleep(0.002)  # so that it comes by itself
            assert decode(client.receive())["x"] == sent
        small = frame(BINARY, encode({"x": 1}))
        for byte in small:
            client.say(bytes((byte,)))
        assert decode(client.receive())["x"] == 1
        client.say(*[frame(BINARY, encode({"x": number})) for number in range(100)])
        assert [decode(client.receive())["x"] for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("piece", [1, 50, 17_000])
def test_a_message_may_come_in_fragments_with_pings_between(port: int, piece: int) -> None:
    sent = np.random.default_rng(0).bytes(400 if piece == 1 else 50_000)
    message = encode({"x": sent})
    parts = [message[at : at + piece] for at in range(0, len(message), piece)]
    with visiting(port) as client:
        for number, part in enumerate(parts):
            kind = CONTINUATION if number else BINARY
            client.say(frame(kind, part, last=False))
            if number < 3:
                client.say(frame(PING, b"ping %d" % number))
                assert client.next_frame() == (PONG, b"ping %d" % number)
        client.say(frame(CONTINUATION, b""))
        assert decode(client.receive())["x"] == sent
        assert is_well(client)


BAD = {
    "not masked": frame(BINARY, b"\x80", mask=False),
    "a reserved bit": b"\xc2" + frame(BINARY, b"\x80")[1:],
    "an opcode that there is not": frame(3, b"\x80"),
    "a control that there is not": frame(11, b""),
    "a ping in parts": frame(PING, b"", last=False),
    "a ping that is too long": frame(PING, bytes(126)),
    "a continuation of nothing": frame(CONTINUATION, b"\x80"),
    "a message within a message": frame(BINARY, b"", last=False) + frame(TEXT, b""),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_frame_ends_the_connection_and_is_counted(what: str) -> None:
    with serving() as (server, port), visiting(port) as good, visiting(port) as bad:
        bad.say(BAD[what])
        assert bad.ending(2.0)[0] == 1002
        assert is_well(good)
        assert server.stats()["Malformed"] == 1


def test_a_text_that_is_not_utf8_ends_the_connection(port: int) -> None:
    with visiting(port) as client:
        client.say(frame(TEXT, b"\xff"))
        assert client.ending()[0] == 1007


def test_a_size_that_is_only_claimed_takes_no_memory() -> None:
    with serving(message_bytes=1 << 32, bytes=1 << 34, bytes_per_client=1 << 33) as (server, port):
        with visiting(port) as good, ExitStack() as opened:
            before = resident_memory()
            for _ in range(20):
                client = opened.enter_context(visiting(port))
                client.say(frame(BINARY, b"")[:1] + b"\xff" + (200 * MB).to_bytes(8, "big"))
                client.say(bytes(1000))
            assert is_well(good)
            assert resident_memory() - before < 20 * MB
        with visiting(port) as client:
            client.say(frame(BINARY, b"")[:1] + b"\xff" + bytes((255,)) * 8 + bytes(4))
            assert client.ending()[0] == 1009
        assert server.stats()["Malformed"] == 1


@pytest.mark.parametrize("fragments", [False, True])
def test_a_message_beyond_the_limit_is_refused_before_it_comes(fragments: bool) -> None:
    with serving(message_bytes=100_000) as (server, port), visiting(port) as client:
        if fragments:
            client.say(frame(BINARY, bytes(60_000), last=False))
            client.say(frame(CONTINUATION, bytes(60_000)))
        else:
            client.say(frame(BINARY, bytes(100_001))[:20])
        code, reason = client.ending()
        assert code == 1009
        assert "100000" in reason
        assert server.stats()["Malformed"] == 1


def test_what_is_half_sent_by_all_is_bounded() -> None:
    half = frame(BINARY, bytes(MB))[:-1]
    with serving(bytes=5 * MB) as (server, port), visiting(port) as good:
        with ExitStack() as opened:
            for _ in range(3):
                opened.enter_context(visiting(port)).say(half)
            wait_until(lambda: server.stats().get("Overloaded") == 1)  # of one machine half of all
            assert is_well(good)
        wait_until(lambda: len(server.clients()) == 1)
        good.send(encode({"x": bytes(MB)}))
        assert decode(good.receive())["x"] == bytes(MB)
        assert server.stats()["Overloaded"] == 1


def test_fragments_of_nothing_count_as_well() -> None:
    first = frame(BINARY, b"", last=False)
    more = frame(CONTINUATION, b"", last=False) * 100
    with serving(bytes=2 * MB, bytes_per_client=MB) as (server, port), visiting(port) as client:
        client.say(first)
        for _ in range(10):  # a quarter of what is allowed, as it is counted by doubling
            client.say(more)
        assert not server.stats().get("Overloaded")
        with suppress(ConnectionError):
            for _ in range(1000):
                client.say(more)
        wait_until(lambda: server.stats().get("Overloaded") == 1)


def test_half_a_message_and_half_a_frame_are_given_up() -> None:
    whole = frame(BINARY, encode({"x": bytes(100_000)}))
    with serving(stall=0.3) as (server, port), visiting(port) as good:
        for number, half in enumerate(
            [whole[:1], whole[:5], whole[:9000], whole[:-1], frame(BINARY, b"\x80", last=False)]
        ):
            with visiting(port) as client, took(2.0):
                client.say(half)
                assert client.ending()[0] == 1008
            assert server.stats()["DeadlineExceeded"] == number + 1
        assert is_well(good)  # which had nothing to say, and may


def test_what_waits_for_a_slow_function_is_not_given_up() -> None:
    go_on = threading.Event()

    def function(observation: Any) -> Any:
        assert go_on.wait(10)
        return observation

    whole = frame(BINARY, encode({"x": bytes(30_000)}))
    with serving(function, stall=0.2) as (_, port), visiting(port) as client:
        client.say(whole, whole, whole[:20_000])  # of which two are read, and then no more
        time.sleep(0.7)
        client.say(whole[20_000:])
        go_on.set()
        for _ in range(3):
            assert decode(client.receive())["x"] == bytes(30_000)


def test_who_reads_nothing_is_given_up() -> None:
    answer = {"x": bytes(8 * MB)}
    with serving(lambda _: answer, stall=1.0) as (server, port), visiting(port) as good:
        with RawWebSocket(port) as deaf:
            deaf.send(encode({}))
            wait_until(lambda: server.stats().get("DeadlineExceeded") == 1)
            wait_until(lambda: len(server.clients()) == 1)
        good.send(encode({}))
        assert len(decode(good.receive())["x"]) == 8 * MB


def test_who_reads_slowly_is_not_given_up() -> None:
    answer = {"x": bytes(8 * MB)}
    with serving(lambda _: answer, stall=1.5) as (server, port), visiting(port) as slow:
        slow.send(encode({}))
        for _ in range(10):
            time.sleep(0.2)
            slow._need(len(slow._data) + MB // 2)
        assert len(decode(slow.receive())["x"]) == 8 * MB
        assert server.stats().get("DeadlineExceeded", 0) == 0


def test_who_asks_for_pongs_and_reads_none_is_cut_off() -> None:
    with serving() as (server, port), visiting(port) as good, RawWebSocket(port) as deaf:
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pings = frame(PING, bytes(125)) * 150_000  # 20 MB; the system keeps a few
        with pytest.raises(ConnectionError):
            deaf.say(pings)
        assert is_well(good)
        assert server.stats()["Overloaded"] == 1


def test_a_close_is_answered_with_its_code_and_leaves_no_session() -> None:
    with serving() as (server, port), visiting(port) as client:
        wait_until(lambda: len(server.clients()) == 1)
        client.say(frame(CLOSE, (1001).to_bytes(2, "big") + b"going"))
        assert client.ending() == (1001, "going")
        wait_until(lambda: not server.clients())
        assert sum(server.stats()[kind] for kind in ("Malformed",) if kind in server.stats()) == 0


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 1005),
        *((number.to_bytes(2, "big") + b"why", number) for number in (1000, 1001, 3000, 4999)),
        *((number.to_bytes(2, "big"), 1002) for number in (0, 999, 1004, 1005, 1006, 2999, 65535)),
        (b"\3", 1002),
        ((1000).to_bytes(2, "big") + b"\xff", 1007),
    ],
)
def test_a_close_is_echoed_if_it_is_one(port: int, content: bytes, code: int) -> None:
    with visiting(port) as client:
        client.say(frame(CLOSE, content))
        kind, answer = client.next_frame()
        assert kind == CLOSE
        assert (int.from_bytes(answer[:2], "big") if answer else 1005) == code


def test_a_close_within_a_message_is_none(port: int) -> None:
    with visiting(port) as client:
        client.say(frame(BINARY, b"", last=False), frame(CLOSE, b"\3\xe8"))
        assert client.ending()[0] == 1002


def test_claims_keep_nobody_out() -> None:
    with serving(bytes=2 * MB) as (server, port), ExitStack() as opened:
        for _ in range(5):
            claims = opened.enter_context(visiting(port))
            claims.say(frame(BINARY, bytes(MB))[:100])
        with visiting(port) as good:
            good.send(encode({"x": bytes(300_000)}))
            assert decode(good.receive())["x"] == bytes(300_000)
        assert not server.stats().get("Overloaded")


def test_small_messages_are_kept_out_by_nobody() -> None:
    with serving(bytes=2 * MB) as (_, port), visiting(port) as large, visiting(port) as good:
        large.say(frame(BINARY, bytes(MB))[:-1])
        with visiting(port) as other:
            other.say(frame(BINARY, bytes(300_000)))
            assert other.ending()[0] == 1013
        assert is_well(good)


def test_a_message_that_comes_for_ever_is_given_up() -> None:
    whole = frame(BINARY, bytes(100_000))
    with serving(stall=0.1) as (server, port), visiting(port) as client, took(5.0):
        slowest, began = 0.0, time.monotonic()
        with suppress(ConnectionError):
            for at in range(200):
                last = time.monotonic()
                client.say(whole[at : at + 1])
                time.sleep(0.02)
                slowest = max(slowest, time.monotonic() - last)
        # Where nothing came for so long, as the machine was busy, it was given up for that.
        assert time.monotonic() - began > 1.0 or slowest > 0.08
        wait_until(lambda: server.stats().get("DeadlineExceeded") == 1)


def test_a_client_that_goes_while_it_is_answered_leaves_no_session() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def function(observation: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return observation

    with serving(function) as (server, port):
        with visiting(port) as client:
            client.send(encode({"x": 1}))
            assert begun.wait(10)
        wait_until(lambda: not server.clients())
        go_on.set()
        with visiting(port) as client:
            assert is_well(client)


# Handshakes -------------------------------------------------------------------------------


def test_web_pages_are_not_let_in_and_libraries_that_name_an_origin_are() -> None:
    with serving() as (server, port):
        for origin in (
            "http://evil.example",
            "null",
            f"http://evil.example:{port}",
            "http://[",
            "",
        ):
            with pytest.raises(Refused) as refused:
                RawWebSocket(port, "/", f"Origin: {origin}")
            assert refused.value.status == 403
        assert server.stats()["PermissionDenied"] == 5
        with visiting(port, f"Origin: http://127.0.0.1:{port}") as client:
            assert is_well(client)


def test_a_name_that_was_made_to_lead_here_is_a_web_page() -> None:
    with serving() as (_, port), socket.create_connection(("127.0.0.1", port), 10) as page:
        page.sendall(
            b"GET / HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"Origin: http://evil.example\r\n\r\n"
        )
        assert page.recv(100).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"\r\n\r\n",
        b"\x16\3\1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
    ],
)
def test_what_is_no_handshake_is_over_soon_and_counted(said: bytes) -> None:
    with serving() as (server, port), visiting(port) as good:
        with socket.create_connection(("127.0.0.1", port), 10) as stranger, took(3.0):
            try:
                stranger.sendall(said)
                while stranger.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
        wait_until(lambda: server.stats().get("Malformed") == 1)
        assert is_well(good)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost"])
def test_a_handshake_that_takes_too_long_is_cut_off(said: bytes) -> None:
    with serving(handshake=1.0) as (server, port), visiting(port) as good:
        with socket.create_connection(("127.0.0.1", port), 10) as silent, took(3.0):
            silent.sendall(said)
            assert not silent.recv(100)
        assert server.stats()["HandshakeTimeout"] == 1
        assert is_well(good)


def test_who_asks_whether_it_is_well_is_no_stranger_and_stays_no_longer() -> None:
    with serving() as (server, port):
        for _ in range(3):
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            asked.request("GET", "/healthz")
            answer = asked.getresponse()
            assert (answer.status, answer.read()) == (200, b"OK\n")
            assert asked.sock is None or not asked.sock.recv(1)
            asked.close()
        with socket.create_connection(("127.0.0.1", port), 10) as stays, took(3.0):
            stays.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            while stays.recv(1000):
                pass
        assert server.stats().get("Malformed", 0) == 0


def test_a_request_that_is_no_text_is_one_all_the_same() -> None:
    with serving() as (server, port), socket.create_connection(("127.0.0.1", port), 10) as odd:
        odd.sendall(
            b"GET / HTTP/1.1\r\nHost: \xff\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"User-Agent: \xff robot\r\nAuthorization: Api-Key \xff\xfe\r\n\r\n"
        )
        assert odd.recv(100).startswith(b"HTTP/1.1 101 ")
        str(server.clients()).encode()


# Keys -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory)


def test_who_shows_no_key_is_told_by_http(keys: Keys) -> None:
    with serving(credentials=keys.server()) as (server, port):
        shown = (
            "Authorization: Api-Key nonsense",
            "Authorization: Api-Key",
            "Authorization: Api-Key \xff",
        )
        for more in ([], *([each] for each in shown)):
            with pytest.raises(Refused) as refused:
                RawWebSocket(port, "/", *more)
            assert refused.value.status == 401
            assert b"key" in refused.value.body or b"token" in refused.value.body
        assert server.stats()["PermissionDenied"] == 4
        for scheme in ("Api-Key", "api-key", "Bearer"):
            shown = f"Authorization: {scheme} {keys.client('robot').token}"
            with visiting(port, shown) as client:
                assert is_well(client)


def test_who_is_revoked_is_hung_up_on(keys: Keys) -> None:
    credentials = keys.server()
    with serving(credentials=credentials) as (_, port):
        shown = f"Authorization: Api-Key {keys.client('viewer').token}"
        with visiting(port, shown) as client:
            assert is_well(client)
            credentials.clients.revoke("viewer")
            with took(3.0):
                assert client.ending()[0] == 1008


def test_beyond_this_machine_a_door_with_keys_speaks_tls(keys: Keys) -> None:
    credentials = keys.server()
    shown = f"Authorization: Api-Key {keys.client('robot').token}"
    url = "openpi://0.0.0.0:0"
    with serving(url=url, credentials=credentials) as (server, port):
        context = ssl.create_default_context(cafile=credentials.tls.authority)
        with visiting(port, shown, tls=(context, SERVER_NAME)) as client:
            for size in SIZES + LARGE:
                client.send(encode({"x": bytes(size)}))
                assert decode(client.receive())["x"] == bytes(size)
            # Its coming would make websockets' client lose what it writes meanwhile, now and then.
            assert not client.sock.session.has_ticket
            client.say(frame(PING, bytes(126)))
            assert client.ending()[0] == 1002
        with pytest.raises(Refused) as refused:
            RawWebSocket(port, tls=(context, SERVER_NAME))
        assert refused.value.status == 401
        with pytest.raises((ConnectionError, OSError)):
            RawWebSocket(port, "/", shown)
        wait_until(lambda: server.stats().get("Malformed") == 2)


# Faults -----------------------------------------------------------------------------------


def test_a_door_that_fails_hangs_up_and_tells_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(WebSocketDoor):
        name = "faulty"
        health = "/"

        def answer_health(self, state: Any) -> tuple[int, str, bytes]:
            return 200, "text/plain", b""

        async def talk(self, visit: Any) -> None:
            await visit.receive()
            raise KeyError("a fault of the door's own")

    monkeypatch.setitem(plugins._loaded, ("door", "faulty"), Faulty())
    with serving(url="faulty://127.0.0.1:0") as (_, port), RawWebSocket(port, "/x") as client:
        client.send(b"")
        assert client.ending()[0] == 1011
    assert "a fault of the door's own" in caplog.text


def test_strangers_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    said = [b"x\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 20_000]
    with serving() as (server, port), caplog.at_level(logging.INFO):
        for number in range(20):
            with socket.create_connection(("127.0.0.1", port), 10) as stranger:
                stranger.sendall(said[number % len(said)])
                wait_until(lambda: server.stats().get("Malformed") == number + 1)  # noqa: B023
        for number in range(10):
            with visiting(port) as client, suppress(ConnectionError):
                client.say(list(BAD.values())[number % len(BAD)])
                client.ending()
    lines = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(lines) == 1, caplog.text


def test_who_sends_ahead_and_goes_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    ahead = frame(BINARY, encode({"endpoint": "reset"})) * 2000
    with serving() as (server, port):
        for number in range(20):
            with RawWebSocket(port, "/v1/realtime/robot/openpi") as client:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.say(ahead)
                time.sleep(number / 2000)  # so that some go in the middle of it
        wait_until(lambda: not server.clients())
        with visiting(port) as good:
            assert is_well(good)
    assert not [each for each in caplog.records if each.name == "asyncio"]


def test_connections_and_errors_are_freed_without_the_garbage_collector() -> None:
    def function(_: Any) -> Any:
        raise ValueError

    def connections() -> int:
        return sum(isinstance(each, Connection) for each in gc.get_objects())

    with serving(function) as (server, port):
        gc.collect()
        gc.disable()
        try:
            before, used = connections(), []
            for index in range(60):
                with visiting(port) as client:
                    client.send(encode({"x": bytes(MB)}))
                    assert isinstance(client.receive(), str)
                if index in (20, 59):
                    used.append(resident_memory())
            wait_until(lambda: not server.clients())
            assert connections() - before <= 2
            assert used[1] - used[0] < 20 * MB
        finally:
            gc.enable()
