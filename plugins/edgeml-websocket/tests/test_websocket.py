import base64
import os
import socket

import pytest

from edgeml.core import Message, Url, load_transport
from edgeml.testing import TransportTests


class TestWebSocket(TransportTests):
    url = "ws://127.0.0.1:0"


def test_who_asks_for_pongs_and_reads_none_is_cut_off():
    ping = b"\x89\xfd\0\0\0\0" + bytes(125)
    transport = load_transport("ws")
    with (
        transport.serve(Url("ws"), lambda message, reply: reply(message)) as endpoint,
        transport.connect(endpoint.url, 20) as good,
        socket.socket() as peer,
    ):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(10.0)
        peer.connect(("127.0.0.1", endpoint.url.port))
        key = base64.b64encode(os.urandom(16))
        peer.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
        )
        assert peer.recv(1000).startswith(b"HTTP/1.1 101 ")
        pings = ping * 250_000  # 32 MB; the system keeps a few
        with pytest.raises(ConnectionError):
            peer.sendall(pings)
        assert good.call(Message(b"x"), 20).header == b"x"
        # Others may come by, looking for who had this port before.
        assert endpoint.counts["Overloaded"] == 1
