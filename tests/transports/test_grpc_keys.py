"""gRPC with keys: who is let in, who is told what, and what is readable on the way."""

import errno
import gc
import random
import socket
import sys
import threading
import time
from collections import Counter

import grpc
import pytest

from edgeml import PermissionDenied
from edgeml.cli.keygen import make_client_keys, make_server_keys, revoke
from edgeml.core import Credentials, Limits, Message, Unreachable, Url, load_transport
from edgeml.core.refusals import Refusals
from edgeml.core.security import SERVER_NAME, ClientKey, Keyring
from edgeml.core.tls import read_keys
from edgeml.testing.ends import resident_memory
from edgeml.testing.stopwatch import Stopwatch
from edgeml.transports.grpc.sockets import Sockets
from pairs import later, make_keys, took, wait_until

ANYWHERE = Url("grpc", "127.0.0.1", 0)
COUNT = 800  # of garbage connections; ten thousand did no harm either

transport = load_transport("grpc")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def credentials(keys):
    return {name: Credentials.load(directory) for name, directory in keys.items()}


def resident() -> int:
    """Bytes of memory in use, but for garbage."""
    gc.collect()
    return resident_memory()


@pytest.fixture
def requests():
    return []


@pytest.fixture
def endpoint(credentials, requests):
    def take(message, reply):
        requests.append((message.header, reply.peer))
        reply(message)

    with transport.serve(ANYWHERE, take, credentials=credentials["server"]) as endpoint:
        yield endpoint


def test_both_ends_know_that_it_is_secured_and_who_asks(endpoint, credentials, requests):
    assert endpoint.secured
    assert endpoint.local
    large = Message(b"large", [memoryview(bytes(9 << 20))])
    with transport.connect(endpoint.url, 20, credentials=credentials["robot"]) as requester:
        assert requester.secured
        assert requester.local
        assert requester.call(Message(b"x"), 20).header == b"x"
        assert requester.call(large, 20).buffers[0].nbytes == 9 << 20
        assert requester.request(Message(b"y")).result(20).header == b"y"
    assert [header for header, _ in requests] == [b"x", b"large", b"y"]
    assert {peer.identity for _, peer in requests} == {"robot"}
    assert {peer.host for _, peer in requests} == {"127.0.0.1"}
    assert not endpoint.counts


def test_without_keys_nothing_is_secured_and_nobody_has_an_identity(requests):
    def take(message, reply):
        requests.append(reply.peer)
        reply(message)

    with (
        transport.serve(Url("grpc", "0.0.0.0", 0), take) as endpoint,
        transport.connect(Url("grpc", "localhost", endpoint.url.port), 20) as requester,
    ):
        requester.call(Message(b"x"), 20)
        assert not endpoint.secured
        assert not endpoint.local
        assert not requester.secured
        assert requester.local
    assert [peer.identity for peer in requests] == [None]


WRONG = {  # the client's, and what it is told
    "nothing": (None, "asks for keys: give credentials="),
    "another server's": ("stranger", "isn't the server whose keys these are"),
    "expired": ("expired", "expired; make another with `edgeml keygen`"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_who_has_the_wrong_keys_is_denied_at_once_and_reaches_nothing(
    endpoint, credentials, requests, wrong
):
    name, told = WRONG[wrong]
    with took(at_most=2.0), pytest.raises(PermissionDenied, match=told):
        transport.connect(endpoint.url, 20, credentials=credentials.get(name))
    assert not requests


def test_who_has_the_servers_authority_but_a_key_of_another_is_denied_by_the_server(
    endpoint, credentials, requests
):
    """Half of the right keys: it knows the server, and the server doesn't know it."""
    right, wrong = credentials["robot"].tls, credentials["stranger"].tls
    mixed = Credentials(tls=type(right)(right.authority, wrong.certificate, wrong.key))
    with (
        took(at_most=2.0),
        pytest.raises(PermissionDenied, match="certificate is refused"),
    ):
        transport.connect(endpoint.url, 20, credentials=mixed)
    assert not requests


def test_a_server_that_has_only_a_clients_key_is_not_taken_for_the_server(credentials, requests):
    """A client of the same authority can't stand in for its server."""
    client = credentials["expired"].tls
    posing = Credentials(tls=credentials["robot"].tls, clients=Keyring())
    with (
        transport.serve(ANYWHERE, lambda *_: requests.append(1), credentials=posing) as endpoint,
        pytest.raises(PermissionDenied, match="isn't the server whose keys these are"),
    ):
        transport.connect(endpoint.url, 20, credentials=Credentials(tls=client, token="x" * 43))
    assert not requests


def test_a_server_without_keys_is_not_talked_to_by_a_client_that_has_some(credentials, requests):
    with (
        transport.serve(ANYWHERE, lambda *_: requests.append(1)) as endpoint,
        took(at_most=2.0),
        pytest.raises(PermissionDenied, match="in clear text"),
    ):
        transport.connect(endpoint.url, 20, credentials=credentials["robot"])
    assert not requests


def test_something_else_on_the_port_is_still_told_apart(credentials):
    def serve(listener):
        while True:
            try:
                peer = listener.accept()[0]
            except OSError:
                return
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = ANYWHERE.with_port(listener.getsockname()[1])
        for each in (None, credentials["robot"]):
            with pytest.raises(Unreachable, match="an SSH server"):
                transport.connect(url, 20, credentials=each)
        listener.shutdown(socket.SHUT_RDWR)


def test_who_is_refused_is_counted_and_logged_once_with_its_name(credentials, caplog):
    serving = Credentials(tls=credentials["server"].tls, clients=Keyring())
    with transport.serve(ANYWHERE, lambda *_: None, credentials=serving) as endpoint:
        for _ in range(3):
            with pytest.raises(PermissionDenied, match="knows no such certificate"):
                transport.connect(endpoint.url, 20, credentials=credentials["robot"])
        assert endpoint.counts["PermissionDenied"] == 3
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1
    assert "127.0.0.1" in told[0]
    assert "'robot'" in told[0]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/fd")
@pytest.mark.parametrize("wrong", WRONG)
def test_handshakes_that_fail_are_counted_and_logged_once(
    endpoint, credentials, caplog, requests, wrong
):
    """gRPC itself tells nothing of them."""

    def fail() -> bool:
        with pytest.raises(PermissionDenied):
            transport.connect(endpoint.url, 20, credentials=credentials.get(WRONG[wrong][0]))
        return "refused" in caplog.text

    for _ in range(3):
        fail()
    with transport.connect(endpoint.url, 20, credentials=credentials["robot"]) as requester:
        wait_until(lambda: endpoint.counts["PermissionDenied"] >= 3)
        wait_until(fail)  # one that has gone before it is looked at is counted, without its name
        assert requester.call(Message(b"x"), 20).header == b"x"
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1
    assert "127.0.0.1" in told[0]
    assert len(requests) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/fd")
def test_clients_that_come_and_go_are_not_taken_for_handshakes_that_failed(endpoint, credentials):
    for _ in range(20):
        with transport.connect(endpoint.url, 20, credentials=credentials["robot"]) as requester:
            requester.call(Message(b"x"), 20)
    wait_until(lambda: not endpoint._sockets._asked)
    assert not endpoint.counts


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/fd")
@pytest.mark.parametrize("with_keys", [False, True], ids=["plain", "with keys"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_one_address_has_so_many_connections_and_no_more(credentials, with_keys, host, monkeypatch):
    monkeypatch.setattr("edgeml.transports.grpc.sockets._PERIOD", 0.1)
    server, client = (credentials["server"], credentials["robot"]) if with_keys else (None, None)
    limits = Limits(connections_per_address=3, handshake=60.0)
    with transport.serve(
        Url("grpc", host, 0),
        lambda message, reply: reply(message),
        credentials=server,
        limits=limits,
    ) as endpoint:
        url = ANYWHERE.with_port(endpoint.url.port)
        with transport.connect(url, 20, credentials=client) as requester:
            wait_until(lambda: endpoint._sockets._descriptors)
            address = ("127.0.0.1", url.port)
            more = [socket.create_connection(address, 20) for _ in range(5)]
            wait_until(lambda: endpoint.counts["Overloaded"] == 3)
            assert requester.call(Message(b"x"), 20).header == b"x"
            for each in more:
                each.close()
            wait_until(lambda: len(endpoint._sockets._descriptors) == 1)
            with transport.connect(url, 20, credentials=client) as new:
                assert new.call(Message(b"x"), 20).header == b"x"


def test_keys_are_added_and_revoked_while_the_server_runs(tmp_path):
    server = make_server_keys(tmp_path / "server")
    clients = Keyring(directory=server / "allowed")
    loaded = Credentials.load(server)
    credentials = Credentials(tls=loaded.tls, clients=clients)
    with transport.serve(
        ANYWHERE, lambda message, reply: reply(message), credentials=credentials
    ) as endpoint:
        robot = Credentials.load(make_client_keys(server, "robot"))
        clients.refresh()
        with transport.connect(endpoint.url, 20, credentials=robot) as requester:
            assert requester.call(Message(b"x"), 20).header == b"x"
            revoke(server, "robot")
            clients.refresh()
            for ask in (
                lambda: requester.call(Message(b"x"), 20),
                lambda: requester.request(Message(b"x")).result(20),
                lambda: requester.call(Message(b"x", [memoryview(bytes(5 << 20))]), 20),
            ):
                with pytest.raises(PermissionDenied):
                    ask()
        assert endpoint.counts["PermissionDenied"] == 3


def test_a_key_that_expires_while_its_client_is_connected_ends_there(credentials, monkeypatch):
    known = credentials["server"].clients.by_name("robot")
    soon = time.time() + 1800
    clients = Keyring([ClientKey("robot", certificate=known.certificate, expires=soon)])
    serving = Credentials(tls=credentials["server"].tls, clients=clients)
    with (
        transport.serve(
            ANYWHERE, lambda message, reply: reply(message), credentials=serving
        ) as endpoint,
        transport.connect(endpoint.url, 20, credentials=credentials["robot"]) as requester,
    ):
        assert requester.call(Message(b"x"), 20).header == b"x"
        later(monkeypatch, 3600)
        with pytest.raises(PermissionDenied, match="expired"):
            requester.call(Message(b"x"), 20)


def test_keys_that_lack_what_is_needed_are_refused_and_say_what_to_do(credentials):
    def serve(given):
        transport.serve(ANYWHERE, lambda *_: None, credentials=given)

    with pytest.raises(ValueError, match=r"no certificate.*edgeml keygen"):
        serve(Credentials(clients=Keyring()))
    with pytest.raises(ValueError, match="whom to let in"):
        serve(credentials["robot"])
    with pytest.raises(ValueError, match=r"no certificate.*edgeml keygen"):
        transport.connect(ANYWHERE.with_port(1), 1.0, credentials=Credentials(token="secret"))


def test_what_passes_is_not_readable(endpoint, credentials):
    """A proxy between the two records every byte."""
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward(source, sink):
            try:
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    sink.sendall(data)
            except OSError:
                pass

        def serve():
            try:
                near = listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", endpoint.url.port))
            with near, far:
                back = threading.Thread(target=forward, args=(far, near), daemon=True)
                back.start()
                forward(near, far)
                far.shutdown(socket.SHUT_RDWR)
                back.join(20)

        proxy = threading.Thread(target=serve, daemon=True)
        proxy.start()
        url = ANYWHERE.with_port(listener.getsockname()[1])
        with transport.connect(url, 20, credentials=credentials["robot"]) as requester:
            secret = Message(b"a-secret-header", [memoryview(b"a-secret-buffer" * 100)])
            assert requester.call(secret, 20).header == b"a-secret-header"
        proxy.join(20)
    assert len(seen) > 1000
    for word in (b"secret", b"edgeml.Transport", b"Request", b"robot"):
        assert word not in seen


def test_health_is_told_to_clients_with_a_certificate_only(endpoint, credentials):
    def check(channel):
        with channel:
            return channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)

    target = f"127.0.0.1:{endpoint.url.port}"
    authority, certificate, key = read_keys(credentials["robot"].tls)
    options = [
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    known = grpc.ssl_channel_credentials(authority, key, certificate)
    assert check(grpc.secure_channel(target, known, options)) == b"\x08\x01"
    for unknown in (
        grpc.secure_channel(target, grpc.ssl_channel_credentials(authority), options),
        grpc.insecure_channel(target),
    ):
        with pytest.raises(grpc.RpcError):
            check(unknown)


def test_a_handshake_that_never_ends_is_cut_off(credentials):
    limits = Limits(handshake=0.3)
    for keys in (None, credentials["server"]):
        with (
            transport.serve(ANYWHERE, lambda *_: None, credentials=keys, limits=limits) as endpoint,
            socket.create_connection(("127.0.0.1", endpoint.url.port), 20) as slow,
            took(at_most=4.0),
        ):
            slow.sendall(b"\x16\x03\x01" if keys else b"PRI * ")
            while slow.recv(1 << 16):
                pass


def test_without_descriptors_it_is_told_once_that_nobody_can_be_seen(monkeypatch, caplog):
    """Each handshake logged a traceback: 3 MB of them in 12 s."""

    def fail(_):
        raise OSError(errno.EMFILE, "Too many open files")

    sockets = Sockets(lambda *_: None, Limits(), Refusals("here", Counter()), secured=True)
    sockets.port = 1
    with monkeypatch.context() as patch:
        patch.setattr("edgeml.transports.grpc.sockets.os.listdir", fail)
        for _ in range(100):
            sockets.begin()
        for _ in range(3):
            assert sockets.check() >= 1.0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Too many open files" in caplog.text
    sockets.check()  # and once they are there again, all is as before
    assert len(caplog.records) == 1


def test_a_url_with_a_path_is_refused():
    url = Url("grpc", "127.0.0.1", 0, "/x")
    with pytest.raises(ValueError, match="/x"):
        transport.serve(url, lambda *_: None)
    with pytest.raises(ValueError, match="/x"):
        transport.connect(url, 1.0)


# Whatever comes ---------------------------------------------------------------------------

GREETINGS = (
    b"",
    b"\xff" + bytes(8) + b"\x7f",
    b"SSH-2.0-x\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/fd")
@pytest.mark.parametrize("with_keys", [False, True], ids=["plain", "with keys"])
def test_garbage_connections_do_no_harm(credentials, with_keys):
    """Of many kinds, and a good client is answered within a second; no memory is left behind."""
    rng = random.Random(7)
    server, client = (credentials["server"], credentials["robot"]) if with_keys else (None, None)
    with (
        transport.serve(
            ANYWHERE, lambda message, reply: reply(message), credentials=server
        ) as endpoint,
        transport.connect(endpoint.url, 20, credentials=client) as good,
    ):
        address = ("127.0.0.1", endpoint.url.port)
        slow = [socket.create_connection(address, 20) for _ in range(50)]

        took_each = []

        def flood(count):
            for index in range(count):
                with socket.create_connection(address, 20) as peer:
                    peer.sendall(rng.choice(GREETINGS) + rng.randbytes(rng.choice((0, 10, 1000))))
                if index % 20 == 0:
                    watch = Stopwatch()
                    assert good.call(Message(b"x"), 20).header == b"x"
                    took_each.append(watch.seconds)

        flood(200)
        wait_until(lambda: len(endpoint._sockets._descriptors) <= 60)
        before = resident()
        flood(COUNT)
        wait_until(lambda: len(endpoint._sockets._descriptors) <= 60)
        assert sorted(took_each)[-3] < 1.0  # a busy machine may keep one or two
        wait_until(lambda: resident() - before < 16 << 20)
        for each in slow:
            each.close()
        with (
            took(at_most=2.0),
            transport.connect(endpoint.url, 20, credentials=client) as new,
        ):
            assert new.call(Message(b"new"), 20).header == b"new"
        if with_keys:
            wait_until(lambda: endpoint.counts["PermissionDenied"] > COUNT // 2)
