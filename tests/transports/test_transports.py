from edgeml.testing import TransportTests


class TestInproc(TransportTests):
    url = "inproc://127.0.0.1:0"
    between_processes = False


class TestZmq(TransportTests):
    url = "zmq://127.0.0.1:0"


class TestShm(TransportTests):
    url = "shm://127.0.0.1:0"


class TestGrpc(TransportTests):
    url = "grpc://127.0.0.1:0"
