"""Links with keys, over WebSockets: who is let in, and what a peer may take up."""

import asyncio
import contextlib
import gc
import queue
import random
import shutil
import socket
import ssl
import sys
import threading

import pytest
from websockets.sync.client import connect

from edgeml import Overloaded, PermissionDenied
from edgeml.cli.keygen import make_client_keys, make_server_keys, revoke
from edgeml.core import Credentials, Limits, Message, Unreachable, Url, load_transport
from edgeml.core.frames import frame
from edgeml.core.links import LinkTransport
from edgeml.core.pieces import PREFIX
from edgeml.core.security import SERVER_NAME, Keyring
from edgeml.core.tls import client_context
from edgeml.testing.ends import resident_memory
from edgeml.testing.stopwatch import Stopwatch
from pairs import make_keys, took, wait_until

ANYWHERE = Url("ws", "127.0.0.1", 0)
COUNT = 400  # of garbage connections; ten thousand did no harm either


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


def serve(requests=None, **settings):
    def take(message, reply):
        if requests is not None:
            requests.append((message.header, reply.peer))
        reply(message)

    return load_transport("ws").serve(ANYWHERE, take, **settings)


def dial(endpoint, credentials=None):
    return load_transport("ws").connect(endpoint.url, 5.0, credentials=credentials)


@pytest.fixture
def endpoint(credentials, requests):
    with serve(requests, credentials=credentials["server"]) as endpoint:
        yield endpoint


def test_both_ends_know_that_it_is_secured_and_who_asks(endpoint, credentials, requests):
    assert endpoint.secured
    assert endpoint.local
    large = Message(b"large", [memoryview(bytes(9 << 20))])
    with dial(endpoint, credentials["robot"]) as requester:
        assert requester.secured
        assert requester.local
        assert requester.call(Message(b"x"), 20).header == b"x"
        assert requester.call(large, 20).buffers[0].nbytes == 9 << 20
    assert [header for header, _ in requests] == [b"x", b"large"]
    assert {peer.identity for _, peer in requests} == {"robot"}
    assert {peer.host for _, peer in requests} == {"127.0.0.1"}
    assert not endpoint.counts


def test_without_keys_nothing_is_secured_and_nobody_has_an_identity(requests):
    def take(message, reply):
        requests.append(reply.peer)
        reply(message)

    transport = load_transport("ws")
    with (
        transport.serve(Url("ws", "0.0.0.0", 0), take) as endpoint,
        transport.connect(Url("ws", "localhost", endpoint.url.port), 20) as requester,
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
def test_who_has_the_wrong_keys_is_denied_at_once_counted_and_reaches_nothing(
    endpoint, credentials, requests, caplog, wrong
):
    name, told = WRONG[wrong]
    for _ in range(2):
        with took(at_most=2.0), pytest.raises(PermissionDenied, match=told):
            dial(endpoint, credentials.get(name))
    wait_until(lambda: endpoint.counts["PermissionDenied"] >= 2)
    assert not requests
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1
    assert "127.0.0.1" in told[0]


def test_who_has_the_servers_authority_but_a_key_of_another_is_denied_by_the_server(
    endpoint, credentials, requests
):
    right, wrong = credentials["robot"].tls, credentials["stranger"].tls
    mixed = Credentials(tls=type(right)(right.authority, wrong.certificate, wrong.key))
    with took(at_most=2.0), pytest.raises(PermissionDenied, match="certificate is refused"):
        dial(endpoint, mixed)
    assert not requests


def test_a_server_that_has_only_a_clients_key_is_not_taken_for_the_server(credentials, requests):
    posing = Credentials(tls=credentials["robot"].tls, clients=Keyring())
    with (
        serve(requests, credentials=posing) as endpoint,
        pytest.raises(PermissionDenied, match="isn't the server whose keys these are"),
    ):
        dial(endpoint, credentials["expired"])
    assert not requests


def test_a_server_without_keys_is_not_talked_to_by_a_client_that_has_some(credentials, requests):
    with (
        serve(requests) as endpoint,
        took(at_most=2.0),
        pytest.raises(PermissionDenied, match="in clear text"),
    ):
        dial(endpoint, credentials["robot"])
    assert not requests


def test_a_key_that_the_server_does_not_know_is_told_so_with_its_name(credentials, caplog):
    serving = Credentials(tls=credentials["server"].tls, clients=Keyring())
    with serve(credentials=serving) as endpoint:
        for _ in range(3):
            with pytest.raises(PermissionDenied, match="knows no such certificate"):
                dial(endpoint, credentials["robot"])
        assert endpoint.counts["PermissionDenied"] == 3
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(told) == 1


def test_keys_are_added_and_revoked_while_the_server_runs(tmp_path):
    server = make_server_keys(tmp_path / "server")
    clients = Keyring(directory=server / "allowed")
    with serve(
        credentials=Credentials(tls=Credentials.load(server).tls, clients=clients)
    ) as served:
        copied = shutil.copytree(make_client_keys(server, "robot"), tmp_path / "robot")
        robot = Credentials.load(copied)
        other = Credentials.load(make_client_keys(server, "other"))
        clients.refresh()
        with dial(served, robot) as requester, dial(served, other) as unharmed:
            assert requester.call(Message(b"x"), 20).header == b"x"
            revoke(server, "robot")
            clients.refresh()
            with took(at_most=1.0):
                wait_until(lambda: requester.lost)
            with pytest.raises(Unreachable):
                requester.call(Message(b"x"), 20)
            with pytest.raises(PermissionDenied, match="revoked"):
                dial(served, robot)
            assert unharmed.call(Message(b"x"), 20).header == b"x"


def test_a_transport_that_does_not_secure_its_links_serves_and_reaches_nobody(credentials):
    """It may not have read what to do: its links are not taken for secured."""
    real = type(load_transport("ws"))

    class Careless(LinkTransport):
        name = "ws"

        async def listen(self, url, accept):
            accept._tls, accept.tls = accept.tls, None
            return await real.listen(self, url, accept)

        async def dial(self, url, tls):
            return await real.dial(self, url, None)

    careless = Careless()
    with (
        careless.serve(
            ANYWHERE, lambda message, reply: reply(message), credentials=credentials["server"]
        ) as endpoint,
        pytest.raises(PermissionDenied, match="no certificate"),
    ):
        careless.connect(endpoint.url, 5.0, credentials=credentials["robot"])
    assert endpoint.counts


def test_what_passes_is_not_readable(endpoint, credentials):
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward(source, sink):
            try:
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    sink.sendall(data)
            except OSError:
                pass

        def relay():
            near = listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", endpoint.url.port))
            with near, far:
                back = threading.Thread(target=forward, args=(far, near), daemon=True)
                back.start()
                forward(near, far)
                far.shutdown(socket.SHUT_RDWR)
                back.join(20)

        proxy = threading.Thread(target=relay, daemon=True)
        proxy.start()
        url = ANYWHERE.with_port(listener.getsockname()[1])
        with load_transport("ws").connect(url, 5.0, credentials=credentials["robot"]) as requester:
            secret = Message(b"a-secret-header", [memoryview(b"a-secret-buffer" * 100)])
            assert requester.call(secret, 20).header == b"a-secret-header"
        proxy.join(20)
    assert len(seen) > 1000
    for word in (b"secret", b"websocket", b"HTTP", b"robot"):
        assert word not in seen


def test_keys_that_lack_what_is_needed_are_refused_and_say_what_to_do(credentials):
    with pytest.raises(ValueError, match=r"no certificate.*edgeml keygen"):
        serve(credentials=Credentials(clients=Keyring()))
    with pytest.raises(ValueError, match="whom to let in"):
        serve(credentials=credentials["robot"])
    with pytest.raises(ValueError, match=r"no certificate.*edgeml keygen"):
        load_transport("ws").connect(
            ANYWHERE.with_port(1), 1.0, credentials=Credentials(token="secret")
        )


def test_a_url_with_a_path_is_refused():
    url = Url("ws", "127.0.0.1", 0, "/x")
    with pytest.raises(ValueError, match="/x"):
        load_transport("ws").serve(url, lambda *_: None)
    with pytest.raises(ValueError, match="/x"):
        load_transport("ws").connect(url, 1.0)


# What a peer may take up ------------------------------------------------------------------


def pieces(number, message, size=1 << 20):
    content = frame(message)
    whole = PREFIX.pack(number, len(content)) + content
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def answers(peer, count):
    """The numbers of the next messages, small ones."""
    return {PREFIX.unpack_from(peer.recv(timeout=20))[0] for _ in range(count)}


def test_a_message_that_is_announced_larger_than_is_taken_ends_the_connection():
    with (
        serve(limits=Limits(message_bytes=1 << 20)) as endpoint,
        connect(str(endpoint.url)) as peer,
    ):
        peer.send(PREFIX.pack(1, (1 << 20) + 1))
        with pytest.raises(Exception, match="close frame"):
            peer.recv(timeout=20)
    assert endpoint.counts["Malformed"] == 1


def test_a_piece_that_is_too_large_ends_the_connection():
    with serve() as endpoint, connect(str(endpoint.url), max_size=None) as peer:
        peer.send(PREFIX.pack(1, 1 << 22) + bytes(1 << 21))
        with pytest.raises(Exception, match="too big|close frame"):  # noqa: RUF043
            peer.recv(timeout=20)


def test_more_than_one_peer_may_send_at_a_time_is_refused_and_the_connection_goes_on():
    big = Message(b"", [memoryview(bytes(3 << 20))])
    limits = Limits(bytes_per_client=1 << 20, bytes=4 << 20)
    taken = queue.SimpleQueue()
    with (
        load_transport("ws").serve(
            ANYWHERE, lambda message, reply: taken.put(reply), limits=limits
        ) as endpoint,
        connect(str(endpoint.url)) as one,
        connect(str(endpoint.url)) as other,
    ):
        half = pieces(1, big)
        one.send(half[0])  # the first of a host is taken, however large
        wait_until(lambda: endpoint._incoming.nbytes)
        for piece in pieces(2, big):
            other.send(piece)
        assert answers(other, 1) == {2 | 1 << 63}
        assert endpoint.counts["Overloaded"] == 1
        for piece in half[1:]:
            one.send(piece)
        taken.get(timeout=20)(Message(b"fine"))
        assert answers(one, 1) == {1}
        wait_until(lambda: not endpoint._incoming.nbytes)
        for piece in pieces(3, big):
            other.send(piece)
        taken.get(timeout=20)(Message(b"fine"))
        assert answers(other, 1) == {3}


def test_a_client_is_told_that_its_request_or_its_reply_was_refused():
    big = Message(b"", [memoryview(bytes(3 << 20))])
    taken = queue.SimpleQueue()
    with (
        load_transport("ws").serve(
            ANYWHERE, lambda message, reply: taken.put(reply), limits=Limits(bytes=2 << 20)
        ) as endpoint,
        connect(str(endpoint.url)) as one,
        load_transport("ws").connect(endpoint.url, 20) as requester,
    ):
        one.send(pieces(1, big)[0])
        wait_until(lambda: endpoint._incoming.nbytes)
        with pytest.raises(Overloaded, match="are on their way"):
            requester.call(big, 20)
        future = requester.request(Message(b"x"))
        taken.get(timeout=20)(Message(b"y"))
        assert future.result(20).header == b"y"


def test_a_message_that_stalls_ends_its_connection_and_is_counted():
    with (
        serve(limits=Limits(stall=0.2)) as endpoint,
        connect(str(endpoint.url)) as idle,
        connect(str(endpoint.url)) as peer,
        took(at_most=4.0),
    ):
        peer.send(PREFIX.pack(1, 1 << 20) + bytes(1000))
        with pytest.raises(Exception, match="close frame"):
            peer.recv(timeout=20)
        wait_until(lambda: endpoint.counts["DeadlineExceeded"] == 1)
        assert not endpoint._incoming.nbytes
        idle.send(pieces(7, Message(b"x"))[0])  # who says nothing at all may stay
        assert answers(idle, 1) == {7}


def test_a_handshake_that_never_ends_is_cut_off_and_counted(credentials):
    for given, hello in ((None, b"GET / HTTP/1.1\r\n"), (credentials["server"], b"\x16\x03\x01")):
        with (
            serve(credentials=given, limits=Limits(handshake=0.3)) as endpoint,
            socket.create_connection(("127.0.0.1", endpoint.url.port), 20) as slow,
            socket.create_connection(("127.0.0.1", endpoint.url.port), 20) as silent,
            took(at_most=4.0),
        ):
            slow.sendall(hello)
            for each in (slow, silent):
                while each.recv(1 << 16):
                    pass
            assert endpoint.counts == {"HandshakeTimeout": 2}


def test_one_address_has_so_many_connections_and_no_more():
    with serve(limits=Limits(connections_per_address=3)) as endpoint:
        address = ("127.0.0.1", endpoint.url.port)
        with dial(endpoint) as requester:
            with socket.create_connection(address, 20), socket.create_connection(address, 20):
                wait_until(lambda: endpoint.counts == {})
                for _ in range(5):
                    with socket.create_connection(address, 20) as more:
                        assert not more.recv(1)
                assert endpoint.counts == {"Overloaded": 5}
                assert requester.call(Message(b"x"), 20).header == b"x"

            def come_in():
                try:
                    dial(endpoint).close()
                except Unreachable:
                    return False
                return True

            wait_until(come_in)  # as the others have gone


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("with_keys", [False, True], ids=["plain", "with keys"])
def test_garbage_connections_do_no_harm(credentials, with_keys):
    """Of many kinds, and a good client is answered within a second; no memory is left behind."""
    rng = random.Random(5)
    greetings = (
        b"",
        b"\xff" + bytes(8) + b"\x7f",
        b"SSH-2.0-x\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    )
    server, client = (credentials["server"], credentials["robot"]) if with_keys else (None, None)
    with serve(credentials=server) as endpoint, dial(endpoint, client) as good:
        address = ("127.0.0.1", endpoint.url.port)
        slow = [socket.create_connection(address, 20) for _ in range(50)]

        took_each = []

        def flood(count):
            for index in range(count):
                with socket.create_connection(address, 20) as peer:
                    peer.sendall(rng.choice(greetings) + rng.randbytes(rng.choice((0, 10, 1000))))
                if index % 20 == 0:
                    watch = Stopwatch()
                    assert good.call(Message(b"x"), 20).header == b"x"
                    took_each.append(watch.seconds)

        flood(COUNT)  # as much at a time has been in use before
        wait_until(lambda: len(endpoint._gate._waiting) == 50)
        before = resident()
        flood(COUNT)
        wait_until(lambda: len(endpoint._gate._waiting) == 50)
        assert sorted(took_each)[-3] < 1.0  # a busy machine may keep one or two
        wait_until(lambda: resident() - before < 32 << 20)
        for each in slow:
            each.close()
        with took(at_most=2.0), dial(endpoint, client) as new:
            assert new.call(Message(b"new"), 20).header == b"new"
        kind = "PermissionDenied" if with_keys else "Malformed"
        wait_until(lambda: endpoint.counts[kind] > COUNT // 2)


def test_garbage_pieces_cut_off_whoever_sends_them_and_nobody_else():
    rng = random.Random(6)
    with serve() as endpoint, dial(endpoint) as good:
        for _ in range(100):
            with connect(str(endpoint.url), close_timeout=0.1) as peer:
                whole = bytearray(pieces(1, Message(b"head", [memoryview(b"buffer")]))[0])
                for _ in range(rng.randrange(1, 4)):
                    whole[rng.randrange(8, len(whole))] = rng.randrange(256)
                peer.send(bytes(whole[: rng.randrange(1, len(whole) + 1)]))
        assert good.call(Message(b"x"), 20).header == b"x"
        wait_until(lambda: len(endpoint._links) == 1)
        wait_until(lambda: not endpoint._incoming.nbytes)


def test_who_shakes_hands_by_a_key_and_speaks_garbage_is_cut_off(credentials, requests):
    context = client_context(credentials["robot"].tls)
    with (
        serve(requests, credentials=credentials["server"], limits=Limits(handshake=2.0)) as served,
        socket.create_connection(("127.0.0.1", served.url.port), 20) as plain,
        context.wrap_socket(plain, server_hostname=SERVER_NAME) as secured,
        dial(served, credentials["robot"]) as requester,
    ):
        secured.sendall(b"\xff" * 100)
        with contextlib.suppress(ssl.SSLError):
            while secured.recv(1 << 16):
                pass
        assert requester.call(Message(b"x"), 20).header == b"x"
    assert len(requests) == 1


def test_what_waits_in_asyncio_is_no_task_left_behind(endpoint, credentials):
    with dial(endpoint, credentials["robot"]) as requester:
        requester.call(Message(b"x"), 20)
    wait_until(lambda: not endpoint._links)
    wait_until(lambda: len(asyncio.all_tasks(endpoint._loop._asyncio)) <= 1)
