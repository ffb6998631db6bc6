from edgeml.testing import TransportTests


class TestWebSocket(TransportTests):
    url = "ws://127.0.0.1:0"
