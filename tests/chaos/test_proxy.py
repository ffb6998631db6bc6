"""Each fault of the proxy, seen from both ends of a connection through it."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from pairs import took, wait_until


@pytest.fixture
def proxy(zygote):
    """A proxy with a listener behind it; its ``port`` is where to connect."""
    process = zygote.start("proxy", seed=0)
    process.port = process.hear()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process.listener = listener
        process.ask(do="target", port=listener.getsockname()[1])
        yield process
    process.kill()


@contextmanager
def connected(proxy):
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        server, _ = proxy.listener.accept()
        server.settimeout(10)
        with server:
            yield client, server


def exactly(end, n):
    received = b""
    while len(received) < n:
        piece = end.recv(n - len(received))
        assert piece, f"it ended after {len(received)} of {n} bytes"
        received += piece
    return received


def test_passes_everything_on_both_ways(proxy):
    data = bytes(range(256)) * 10_000
    with connected(proxy) as (client, server):
        for a, b in ((client, server), (server, client)):
            thread = threading.Thread(target=a.sendall, args=[data])
            thread.start()
            assert exactly(b, len(data)) == data
            thread.join()
    wait_until(lambda: proxy.ask(do="counts")["open"] == 0)
    assert proxy.ask(do="counts")["up"] == len(data)


def test_an_end_is_passed_on_after_what_came_before_it(proxy):
    proxy.ask(do="set", delay=0.1)
    with connected(proxy) as (client, server):
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert exactly(server, 10) == b"last words"
        assert server.recv(1) == b""
        server.sendall(b"heard")
        assert exactly(client, 5) == b"heard"


@pytest.mark.parametrize(
    "weather",
    [{"delay": 0.2}, {"delay": 0.2, "jitter": 0.1}, {"loss": 1.0}, {"bandwidth": 50_000.0}],
    ids=["delay", "jitter", "loss", "bandwidth"],
)
def test_is_as_slow_as_it_is_told_and_keeps_the_order(proxy, weather):
    with connected(proxy) as (client, server):
        proxy.ask(do="set", **weather)
        began = time.monotonic()
        for number in range(10):
            client.sendall(bytes([number]) * 1000)
            time.sleep(0.001)  # so that they are pieces of their own
        assert exactly(server, 10_000) == b"".join(bytes([n]) * 1000 for n in range(10))
        assert time.monotonic() - began > 0.18
        proxy.ask(do="calm")
        began = time.monotonic()
        with took(0.15):
            client.sendall(b"x")
            exactly(server, 1)


def test_passes_on_a_few_bytes_at_a_time(proxy):
    with connected(proxy) as (client, server):
        proxy.ask(do="set", piece=3)
        client.sendall(b"x")  # it waits for as much as it was told before
        exactly(server, 1)
        client.sendall(bytes(100))
        exactly(server, 100)
        wait_until(lambda: proxy.ask(do="counts")["pieces"] >= 34)


@pytest.mark.parametrize("dark", ["up", "down", "both"])
def test_nothing_passes_in_the_dark_and_all_of_it_afterwards(proxy, dark):
    with connected(proxy) as (client, server):
        proxy.ask(do="set", dark=dark)
        client.sendall(b"up")
        server.sendall(b"down")
        for name, end in (("up", server), ("down", client)):
            end.settimeout(0.3)
            if dark in (name, "both"):
                with pytest.raises(TimeoutError):
                    end.recv(10)
            else:
                assert exactly(end, len(name)) == name.encode()
            end.settimeout(10)
        proxy.ask(do="calm")
        for name, end in (("up", server), ("down", client)):
            if dark in (name, "both"):
                assert exactly(end, len(name)) == name.encode()


def test_a_new_connection_in_the_dark_gets_no_answer(proxy):
    proxy.ask(do="set", dark="both")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.3) as client:
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.listener.settimeout(10)
        proxy.ask(do="calm")
        proxy.listener.accept()[0].close()


def test_cut_connections_end_and_new_ones_are_made(proxy):
    with connected(proxy) as (client, server):
        proxy.ask(do="cut")
        assert client.recv(1) == b""
        assert server.recv(1) == b""
    with connected(proxy) as (client, server):
        client.sendall(b"x")
        exactly(server, 1)


def test_reset_connections_are_reset_at_both_ends(proxy):
    with connected(proxy) as (client, server):
        proxy.ask(do="reset")
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)


def test_of_a_half_open_connection_the_client_is_told_nothing(proxy):
    with connected(proxy) as (client, server):
        proxy.ask(do="half-open")
        with pytest.raises(ConnectionResetError):
            server.recv(1)
        client.sendall(b"into the void")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.ask(do="calm")
        client.settimeout(10)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_without_a_target_connections_are_refused_at_the_same_port(proxy):
    proxy.ask(do="target", port=None)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    proxy.ask(do="target", port=proxy.listener.getsockname()[1])
    with connected(proxy) as (client, server):
        client.sendall(b"x")
        exactly(server, 1)
