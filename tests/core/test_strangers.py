"""Other servers on the port: what is said of them, and how soon."""

import contextlib
import socket
import threading

import pytest

from edgeml import InferenceClient, Unreachable
from edgeml.core import Url, load_transport
from edgeml.core.strangers import HTTP2, ZMTP, find_stranger
from pairs import TRANSPORTS, took

OVER_TCP = sorted(set(TRANSPORTS) - {"inproc", "shm"})


class Stranger:
    """Listens, says something unasked, and answers whatever comes line by line."""

    def __init__(self, first: bytes = b"", answer: bytes = b"", *, hang_up: bool = False):
        self._said = first, answer
        self._hang_up = hang_up
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                made, _ = self._listening.accept()
                self._open.append(made)
                self._threads.append(threading.Thread(target=self._serve, args=(made,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        first, answer = self._said
        with contextlib.suppress(OSError):
            sock.sendall(first)
            while received := sock.recv(4096):
                if answer and b"\n" in received:
                    sock.sendall(answer)
                    if self._hang_up:
                        return sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._open:
            each.close()


SSH = {"first": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"}
HTTP = {"answer": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"}
CLOSING_HTTP = {"answer": b"HTTP/1.0 400 Bad Request\r\n\r\n", "hang_up": True}
REDIS = {"answer": b"-ERR unknown command\r\n"}
KNOWN = [
    (SSH, "an SSH server ('SSH-2.0-OpenSSH_9.2p1 Debian-2')"),
    (HTTP, "an HTTP server ('HTTP/1.1 404 Not Found')"),
    (CLOSING_HTTP, "an HTTP server ('HTTP/1.0 400 Bad Request')"),
    (REDIS, "a Redis server ('-ERR unknown command')"),
    ({"first": b"220 mail ESMTP\r\n"}, "a mail or FTP server ('220 mail ESMTP')"),
    ({"first": b"\xff\0\0\0\0\0\0\0\1\x7f\3"}, "a ZeroMQ socket;"),
    ({"first": b"\0\0\6\4\0\0\0\0\0\0\3\0\0\0\x64"}, "a gRPC server;"),
    ({"answer": b"\x15\3\1\0\2\2\x0a"}, "a server that speaks TLS;"),
    ({"first": b"hello, who is there?"}, "no server of edgeml ('hello, who is there?')"),
    ({"first": bytes(range(128, 228))}, "no server of edgeml;"),
    ({"first": b"\x1b[31mred"}, "no server of edgeml;"),  # nothing is printed that does things
    ({"first": b"\r\n"}, "no server of edgeml;"),
]


@pytest.mark.parametrize(("says", "who"), KNOWN, ids=[who for _, who in KNOWN])
def test_who_listens_is_told_by_what_it_says(says, who):
    with Stranger(**says) as stranger, took(2.0):
        url = Url("zmq", "127.0.0.1", stranger.port)
        assert who in str(find_stranger(url))
        assert str(url) in str(find_stranger(url))


@pytest.mark.parametrize("transport", OVER_TCP)
def test_a_server_of_ours_is_no_stranger_to_its_own_transport(transport):
    made = {each: load_transport(each) for each in OVER_TCP}
    ours = {"grpc": HTTP2, "ws": made["ws"].greeting, "zmq": ZMTP}
    with made[transport].serve(Url(transport), lambda message, reply: reply(message)) as endpoint:
        for each in OVER_TCP:
            assert (find_stranger(endpoint.url, ours[each]) is None) == (each == transport)


def test_a_long_answer_is_cut_short():
    with Stranger(b"SSH-" + b"x" * 10_000_000) as stranger:
        assert len(str(find_stranger(Url("zmq", "127.0.0.1", stranger.port)))) < 300


def test_nobody_is_told_of_where_nobody_listens_or_says_anything():
    with Stranger() as stranger, took(2.0):
        url = Url("zmq", "127.0.0.1", stranger.port)
        assert find_stranger(url, timeout=0.3) is None
    with took(2.0):
        assert find_stranger(url) is None
        assert find_stranger(Url("zmq", "no.such.host.invalid.", 80)) is None


@pytest.mark.parametrize("transport", OVER_TCP)
@pytest.mark.parametrize(
    "says", [SSH, HTTP, CLOSING_HTTP, REDIS], ids=["ssh", "http", "closing", "redis"]
)
def test_another_server_on_the_port_is_named_at_once(transport, says):
    with Stranger(**says) as stranger, took(4.0):
        with pytest.raises(Unreachable, match=r"something else listens at .*server") as caught:
            InferenceClient("127.0.0.1", stranger.port, transport, timeout=30.0)
        assert "transport?" in str(caught.value)


@pytest.mark.parametrize("transport", OVER_TCP)
def test_who_says_nothing_is_waited_for(transport):
    with Stranger() as stranger, took(4.0, at_least=1.0), pytest.raises(Unreachable):
        InferenceClient("127.0.0.1", stranger.port, transport, timeout=1.0)
