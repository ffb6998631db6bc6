import socket

import pytest

from edgeml.testing import TransportTests
from shm_records import HELLO, record


class TestInproc(TransportTests):
    url = "inproc://127.0.0.1:0"
    between_processes = False


class TestZmq(TransportTests):
    url = "zmq://127.0.0.1:0"


class TestShm(TransportTests):
    url = "shm://127.0.0.1:0"
    has_paths = True

    def dial(self, url):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.connect(f"\0edgeml/{url.port}")
        return made

    def overhear(self, net):
        return [HELLO, record(header=b"header"), record([(0, 0, 0, 5)], b"header", b"12345")]


class TestGrpc(TransportTests):
    url = "grpc://127.0.0.1:0"
    sees_connections = False


def long(suite):
    """A suite's garbage alone, and ten thousand pieces of it."""
    tests = [name for name in dir(suite) if name.startswith("test_")]
    others = [name for name in tests if not name.startswith("test_garbage_")]
    made = type(suite.__name__, (suite,), {**dict.fromkeys(others), "garbage": 10_000})
    return pytest.mark.slow(pytest.mark.timeout(900)(made))


TestLongZmq = long(TestZmq)
TestLongShm = long(TestShm)
TestLongGrpc = long(TestGrpc)
