import socket

from edgeml.core import Url
from edgeml.testing import TransportTests
from pairs import long_form
from shm_records import HELLO, record


class TestInproc(TransportTests):
    url = "inproc://127.0.0.1:0"
    between_processes = False


class TestZmq(TransportTests):
    url = "zmq://127.0.0.1:0"


def _bound(sock, port):
    try:
        sock.bind(f"\0edgeml/{port}")
    except OSError:
        return False
    return True


class TestShm(TransportTests):
    url = "shm://127.0.0.1:0"
    has_paths = True

    def dial(self, url):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.connect(f"\0edgeml/{url.port}")
        return made

    def listen_silently(self):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        port = next(port for port in range(49152, 65536) if _bound(made, port))
        made.listen(1)
        return made, Url("shm", "127.0.0.1", port)

    def overhear(self, net):
        return [HELLO, record(header=b"header"), record([(0, 0, 0, 5)], b"header", b"12345")]


class TestGrpc(TransportTests):
    url = "grpc://127.0.0.1:0"
    sees_connections = False


class TestWebSocket(TransportTests):
    """A third party's; tests/plugins/test_third_party.py installs it."""

    url = "ws://127.0.0.1:0"


TestLongZmq = long_form(TestZmq, "test_garbage_", garbage=10_000)
TestLongShm = long_form(TestShm, "test_garbage_", garbage=10_000)
TestLongGrpc = long_form(TestGrpc, "test_garbage_", garbage=10_000)
