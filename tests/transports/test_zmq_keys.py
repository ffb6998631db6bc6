"""Keys over ZeroMQ: who comes in, who is refused and told so, and what others can see of it."""

import contextlib
import logging
import socket
import struct
import threading
import time

import pytest
import zmq
from zmq.utils import z85

from edgeml.core import Message, PermissionDenied, Unreachable, Url, load_transport
from edgeml.core.limits import Limits
from edgeml.core.security import ClientKey, Credentials, CurveKeys, Keyring
from pairs import later, took, wait_until

ANYWHERE = Url("zmq", "127.0.0.1", 0)

transport = load_transport("zmq")


def curve() -> CurveKeys:
    public, secret = zmq.curve_keypair()
    return CurveKeys(public.decode(), secret.decode())


class Keys:
    """A server's credentials, and those of clients that it knows."""

    def __init__(self, **settings) -> None:
        self.ring = Keyring()
        self.server = Credentials(curve=curve(), clients=self.ring)

    def client(self, name: str = "alice", known: bool = True, **settings) -> Credentials:
        keys = curve()
        if known:
            self.ring.add(ClientKey(name, curve=keys.public, **settings))
        return Credentials(name=name, curve=keys, curve_server=self.server.curve.public)


@pytest.fixture
def keys():
    return Keys()


class Served:
    """An endpoint that echoes, and notes who asked."""

    def __init__(self, credentials=None, **limits) -> None:
        self.peers = []
        self.endpoint = transport.serve(
            ANYWHERE, self._take, credentials=credentials, limits=Limits(**limits)
        )
        self.url = self.endpoint.url

    def _take(self, message, reply) -> None:
        self.peers.append(reply.peer)
        reply(message)

    def connect(self, credentials=None, timeout=20.0):
        return transport.connect(self.url, timeout, credentials=credentials)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.endpoint.close()


@pytest.fixture
def served(keys):
    with Served(keys.server) as made:
        yield made


def test_a_client_that_the_server_knows_is_called_by_its_keys_name(keys, served):
    assert served.endpoint.secured
    with served.connect(keys.client("alice")) as alice, served.connect(keys.client("bob")) as bob:
        assert alice.secured
        large = Message(b"x", [memoryview(bytes(3_000_000)), memoryview(b"small")])
        for requester, name in ((alice, "alice"), (bob, "bob")):
            assert requester.call(large, 20) == large
            assert requester.request(large).result(20) == large
            assert {peer.identity for peer in served.peers} == {name}
            assert {peer.host for peer in served.peers} == {"127.0.0.1"}
            served.peers.clear()
    assert not served.endpoint.counts


def test_without_keys_nobody_is_secured_and_nobody_has_an_identity():
    with Served() as served, served.connect() as requester:
        requester.call(Message(b"x"), 20)
        assert served.peers[0].identity is None
        assert not requester.secured
        assert not served.endpoint.secured
        assert requester.local
        assert served.endpoint.local


def test_an_address_that_others_can_reach_is_not_local():
    with transport.serve(Url("zmq", "0.0.0.0", 0), lambda message, reply: None) as endpoint:
        assert not endpoint.local


def unknown(keys):
    return keys.client("mallory", known=False)


def none(keys):
    return None


def expired(keys):
    return keys.client("old", expires=time.time() - 1)


def revoked(keys):
    made = keys.client("former")
    keys.ring.revoke("former")
    return made


def of_another_server(keys):
    made = keys.client()
    return Credentials(name=made.name, curve=made.curve, curve_server=curve().public)


REFUSED = {
    unknown: "doesn't let this client's key in",
    none: "asks for keys",
    expired: "doesn't let this client's key in",
    revoked: "doesn't let this client's key in",
    of_another_server: "not the server whose key",
}


@pytest.mark.parametrize("who", REFUSED, ids=lambda who: who.__name__)
def test_who_is_not_let_in_is_told_so_in_time_counted_and_logged_once(keys, served, who, caplog):
    credentials = who(keys)
    for _ in range(4):
        with took(at_most=2.0), pytest.raises(PermissionDenied, match=REFUSED[who]):
            served.connect(credentials)
    counts = served.endpoint.counts
    wait_until(lambda: counts["PermissionDenied"] >= 4)
    assert set(counts) == {"PermissionDenied"}
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    # Who has gone before it was looked at has no address any more.
    told = [line for line in lines if "refuses 127.0.0.1" in line]
    assert len(told) <= 1
    assert len(lines) - len(told) <= 1
    assert lines
    assert not served.peers


def test_a_server_that_talks_in_the_clear_is_refused_by_a_client_with_keys(keys):
    with Served() as served:
        with took(at_most=2.0), pytest.raises(PermissionDenied, match="talks in the clear"):
            served.connect(keys.client())
        assert not served.peers


def test_an_impostor_who_has_the_servers_public_key_alone_gets_nothing(keys):
    """It can neither read what the client says nor answer it."""
    impostor = Credentials(
        curve=CurveKeys(keys.server.curve.public, curve().secret), clients=keys.ring
    )
    with Served(impostor) as served:
        with took(at_most=2.0), pytest.raises(PermissionDenied, match="not the server whose key"):
            served.connect(keys.client())
        assert not served.peers


def test_nobody_answers_in_time_is_no_question_of_keys(keys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = ANYWHERE.with_port(silent.getsockname()[1])
        with took(at_most=2.0), pytest.raises(Unreachable):
            transport.connect(url, 0.5, credentials=keys.client())


@pytest.mark.parametrize(
    "greeting",
    [
        b"\x01\0",  # ZMTP 1.0
        b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\0\0",  # ZMTP 2.0
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31),
        b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(15) + b"\0" + bytes(31),
    ],
    ids=["1.0", "2.0", "NULL", "PLAIN"],
)
def test_no_older_or_weaker_handshake_gets_in(keys, served, greeting):
    ready = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    with (
        socket.create_connection(("127.0.0.1", served.url.port), 20) as peer,
        contextlib.suppress(OSError),  # it is cut off, at one of these
    ):
        peer.sendall(greeting)
        peer.sendall(ready + b"\0\x0912345678x" * 10)
        while peer.recv(1000):
            pass
    with served.connect(keys.client()) as requester:
        requester.call(Message(b"x"), 20)
    assert len(served.peers) == 1


def test_keys_that_are_added_are_let_in_and_revoked_ones_cut_off_within_a_second(keys, served):
    later = keys.client("later", known=False)
    with pytest.raises(PermissionDenied):
        served.connect(later)
    keys.ring.add(ClientKey("later", curve=later.curve.public))
    with served.connect(later) as requester, served.connect(keys.client("stays")) as other:
        for each in (requester, other):
            each.request(Message(b"x")).result(20)
            each.call(Message(b"x"), 20)
        keys.ring.revoke("later")
        with took(at_most=1.0):
            wait_until(lambda: requester.lost)
        assert served.endpoint.counts["PermissionDenied"] >= 2
        assert other.call(Message(b"x"), 20).header == b"x"
        with pytest.raises(PermissionDenied):
            served.connect(later)


def test_who_calls_and_asks_nothing_else_is_told_of_being_cut_off(keys, served):
    """A thread's calls go by a connection of its own, and the server ends that one."""
    with served.connect(keys.client("robot")) as requester:

        def call_on() -> None:
            while True:
                requester.call(Message(b"x"), 20.0)

        requester.call(Message(b"x"), 20)
        keys.ring.revoke("robot")
        with took(5.0), pytest.raises((PermissionDenied, Unreachable)):
            call_on()
        assert requester.lost


def test_a_call_under_way_is_told_of_being_cut_off(keys):
    def revoke(message, reply):
        keys.ring.revoke("robot")

    with (
        transport.serve(ANYWHERE, revoke, credentials=keys.server) as endpoint,
        transport.connect(endpoint.url, 20, credentials=keys.client("robot")) as requester,
        took(5.0),
        pytest.raises((PermissionDenied, Unreachable)),
    ):
        requester.call(Message(b"x"), 20.0)


def test_a_key_that_is_replaced_is_cut_off_and_one_that_expires_too(keys, served, monkeypatch):
    first = keys.client("robot")
    short = keys.client("short", expires=time.time() + 1800)
    with served.connect(first) as old, served.connect(short) as brief:
        for each in (old, brief):
            each.request(Message(b"x")).result(20)
        with served.connect(keys.client("robot")) as new:
            new.request(Message(b"x")).result(20)
            with took(at_most=1.0):
                wait_until(lambda: old.lost)
            later(monkeypatch, 3600)
            with took(at_most=1.0):
                wait_until(lambda: brief.lost)
            assert new.request(Message(b"x")).result(20).header == b"x"


def test_nobody_is_let_in_when_nobody_can_be_asked(keys, served, monkeypatch):
    """Whoever decides has failed, and that is no reason to let all in."""
    monkeypatch.setattr("edgeml.transports.zmq.guard.answer_zap", lambda *_: 1 / 0)
    with pytest.raises((PermissionDenied, Unreachable)):
        served.connect(keys.client(), timeout=1.0)
    assert not served.peers


def test_nobody_passes_as_another_by_a_routing_id_or_a_property(keys, served):
    alice = keys.client("alice")
    mallory = keys.client("mallory")

    def ask(context, credentials) -> bool:
        with context.socket(zmq.DEALER) as peer:
            peer.linger = 0
            peer.rcvtimeo = 500
            peer.routing_id = b"the same"
            peer.curve_publickey = credentials.curve.public.encode()
            peer.curve_secretkey = credentials.curve.secret.encode()
            peer.curve_serverkey = keys.server.curve.public.encode()
            peer.metadata = b"X-Edgeml-Connection:alice"
            peer.connect(f"tcp://127.0.0.1:{served.url.port}")
            peer.send(b"12345678x")
            with contextlib.suppress(zmq.Again):  # as the other one has not quite gone yet
                return bool(peer.recv())
            return False

    with zmq.Context() as context:
        for credentials in (alice, mallory, alice):
            wait_until(lambda c=credentials: ask(context, c))
    assert [peer.identity for peer in served.peers] == ["alice", "mallory", "alice"]


def test_a_property_of_a_peers_own_is_no_identity():
    ready = (
        b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        b"\x07User-Id" + struct.pack(">I", 5) + b"admin"
    )
    with (
        Served() as served,
        socket.create_connection(("127.0.0.1", served.url.port), 20) as peer,
        peer.makefile("rb") as heard,
    ):
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31))
        heard.read(64)
        peer.sendall(b"\x04" + bytes([len(ready)]) + ready + b"\0\x0912345678x")
        wait_until(lambda: served.peers)
    assert served.peers[0].identity is None


def test_nothing_of_what_is_said_can_be_read_on_the_way(keys, served):
    """Not what is asked or answered, nor the name of the client or its key's."""
    seen = bytearray()
    ends = []
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def pump(source, sink):
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    near = relay.accept()[0]
                    far = socket.create_connection(("127.0.0.1", served.url.port))
                    ends.extend((near, far))
                    for pair in ((near, far), (far, near)):
                        threads.append(threading.Thread(target=pump, args=pair))
                        threads[-1].start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        credentials = keys.client("alice-of-the-lab")
        url = served.url.with_port(relay.getsockname()[1])
        with transport.connect(url, 20, credentials=credentials) as requester:
            secret = b"what nobody is to read"
            sent = Message(secret, [memoryview(secret * 10_000), memoryview(secret)])
            assert requester.call(sent, 20) == sent
            assert requester.request(sent).result(20) == sent
        relay.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)
        for end in ends:
            end.close()
    assert len(seen) > 4 * 220_000
    public = credentials.curve.public
    for text in (secret, b"alice", public.encode(), z85.decode(public), requester._who.encode()):
        assert text not in seen


def test_what_credentials_lack_is_said(keys):
    def serve(**parts):
        transport.serve(ANYWHERE, lambda message, reply: None, credentials=Credentials(**parts))

    def connect(**parts):
        transport.connect(ANYWHERE.with_port(1), 1.0, credentials=Credentials(**parts))

    for lacking in (
        lambda: serve(clients=Keyring()),
        lambda: serve(curve=curve()),
        lambda: connect(token="secret"),
        lambda: connect(curve=curve()),
    ):
        with pytest.raises(ValueError, match="edgeml keygen"):
            lacking()


def test_a_path_is_refused_at_both_ends():
    with pytest.raises(ValueError, match="path"):
        transport.serve(Url("zmq", "127.0.0.1", 0, "/x"), lambda message, reply: None)
    with pytest.raises(ValueError, match="path"):
        transport.connect(Url("zmq", "127.0.0.1", 1, "/x"), 1.0)


def test_a_handshake_with_keys_takes_less_than_100_ms(keys, served):
    def connect() -> float:
        began = time.monotonic()
        with served.connect(credentials) as requester:
            requester.call(Message(b"x"), 20)
            return time.monotonic() - began

    credentials = keys.client()
    assert min(connect() for _ in range(5)) < 0.1
