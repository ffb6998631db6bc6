"""What every transport promises of keys, limits and hostile peers; a part of `TransportTests`.

Keys are those that ``edgeml keygen`` makes. A transport may secure its channel by them or leave
them alone; `edgeml.core` does the rest, and refuses to use keys over what is neither secured nor
within this machine. The last tests are of both together.
"""

# ruff: noqa: D102 - a test's name says what is promised

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from edgeml.core import (
    Credentials,
    Deadline,
    EdgemlError,
    Limits,
    Message,
    Overloaded,
    Peer,
    PermissionDenied,
    Reply,
    Requester,
    Unreachable,
    Url,
    wire,
)
from edgeml.core.security import Keyring
from edgeml.services import InferenceClient, InferenceServer
from edgeml.testing.ends import (
    KB,
    MB,
    PATIENCE,
    Child,
    EndsTests,
    Net,
    as_view,
    echo,
    make_message,
    results_of,
    until,
    within,
)
from edgeml.testing.garbage import bombard, busyness, pass_on
from edgeml.testing.keys import Keys, make_keys
from edgeml.testing.stopwatch import Stopwatch

__all__ = ["SafetyTests"]

_AT_ONCE = 2.0  # seconds in which whoever has the wrong keys is told
_STALL = 1.0  # seconds that nobody's misbehaviour may hold up anybody else
_GROWTH = 16 * MB  # that it may cost


class SafetyTests(EndsTests):
    """See `TransportTests`.

    Attributes:
        has_paths: whether the path of a URL means something to the transport.
        has_handshake: whether a connection begins with one also where there are no keys. Else
            nobody can tell who is silent from who has nothing to say, and who has no keys isn't
            told that it lacks them.
        sees_connections: whether it sees those that come to nothing; a library may hide them.
        garbage: how many garbage connections are made in a test of them.
    """

    has_paths: ClassVar[bool] = False
    has_handshake: ClassVar[bool] = True
    sees_connections: ClassVar[bool] = True
    garbage: ClassVar[int] = 300

    def dial(self, url: Url) -> socket.socket | None:
        """A bare connection to where an endpoint serves, or None where there is no such thing; to
        be overridden by a transport that isn't over TCP.
        """
        if not self.between_processes:
            return None
        return socket.create_connection((url.host or "127.0.0.1", url.port), PATIENCE)

    def overhear(self, net: Net) -> list[bytes]:
        """What a client says in a short conversation, in pieces; to be overridden likewise."""
        endpoint = net.serve(echo)
        over = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as tap:
            said = net.start(pass_on, tap, endpoint.url, over)
            try:
                url = endpoint.url.with_port(tap.getsockname()[1])
                with net.transport.connect(url, PATIENCE) as requester:
                    requester.call(make_message(b"header", 100, 300 * KB), PATIENCE)
            finally:
                over.set()
            return max(said.result(PATIENCE), key=lambda pieces: sum(map(len, pieces)))

    @pytest.fixture
    def keys(self, tmp_path_factory: pytest.TempPathFactory) -> Keys:
        """Of a server and two clients, and of another server and its client."""
        return make_keys(tmp_path_factory)

    def _prove(self, net: Net, keys: Keys) -> bool:
        """Whether the transport has its peers prove who they are by their keys."""
        peers: list[Peer] = []
        endpoint = net.serve(_noting(peers), credentials=keys.server())
        with net.transport.connect(
            endpoint.url, PATIENCE, credentials=keys.client("robot")
        ) as requester:
            requester.call(Message(b""), PATIENCE)
        endpoint.close()
        return peers[0].identity is not None

    def _denied(self, client: Credentials | None) -> type[EdgemlError]:
        """What a client is told that has the wrong keys, or none."""
        return PermissionDenied if client is not None or self.has_handshake else EdgemlError

    # Addresses ----------------------------------------------------------------------------

    def test_a_path_that_means_nothing_is_refused(self, net: Net) -> None:
        if self.has_paths:
            pytest.skip("a path is an address of this transport")
        url = replace(Url.parse(self.url), path="/somewhere")
        with pytest.raises(ValueError, match="somewhere"):
            net.serve(echo, url)
        endpoint = net.serve(echo)
        with pytest.raises(ValueError, match="somewhere"):
            net.connect_to(replace(endpoint.url, path="/somewhere"))

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "", "0.0.0.0", "here"])
    def test_what_is_local_is_not_reached_from_elsewhere(self, net: Net, host: str) -> None:
        here = _own_address()
        if host == "here" and here is None:
            pytest.skip("this machine has no address but its own loopback")
        url = Url.parse(self.url).with_host(here if host == "here" and here else host)
        endpoint = net.serve(echo, url)
        if endpoint.local and here is not None:
            with pytest.raises(OSError, match=r".+"):
                socket.create_connection((here, endpoint.url.port), 1.0).close()
        if host in ("127.0.0.1", "localhost"):
            requester = net.connect(endpoint)
            assert requester.call(Message(b"x"), PATIENCE).header == b"x"
            assert requester.local == endpoint.local

    # Keys ---------------------------------------------------------------------------------

    def test_without_keys_only_what_stays_on_the_machine_is_secured(self, net: Net) -> None:
        endpoint = net.serve(echo, Url.parse(self.url).with_host("0.0.0.0"))
        assert endpoint.local or not endpoint.secured
        endpoint = net.serve(echo)
        assert net.connect(endpoint).secured == endpoint.secured

    def test_keys_secure_a_channel_and_tell_who_asks_or_are_left_alone(
        self, net: Net, keys: Keys
    ) -> None:
        peers: list[Peer] = []
        endpoint = net.serve(_noting(peers), credentials=keys.server())
        for name in ("robot", "viewer"):
            requester = net.connect(endpoint, credentials=keys.client(name))
            sent = make_message(b"x", 10, 5 * MB)
            assert requester.call(sent, PATIENCE).header == b"x"
            assert requester.request(sent).result(PATIENCE).header == b"x"
            assert requester.secured == endpoint.secured
            assert {peer.identity for peer in peers} in ({None}, {name})
            assert peers[0].identity is None or endpoint.secured
            peers.clear()

    @pytest.mark.parametrize("wrong", ["nothing", "another server's", "expired", "revoked"])
    def test_who_has_the_wrong_keys_is_denied_at_once_counted_and_told(
        self, net: Net, keys: Keys, wrong: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        if not self._prove(net, keys):
            pytest.skip("this transport asks for no keys: core does")
        server, client = keys.wrong(wrong)
        peers: list[Peer] = []
        endpoint = net.serve(_noting(peers), credentials=server)
        with within(_AT_ONCE), pytest.raises(self._denied(client)):
            net.connect(endpoint, credentials=client).call(Message(b""), PATIENCE)
        if wrong in ("expired", "revoked") or (wrong == "nothing" and self.sees_connections):
            assert until(lambda: endpoint.counts["PermissionDenied"] > 0)
            assert until(lambda: "refuse" in caplog.text)
        right = net.connect(endpoint, credentials=keys.client("viewer"))
        assert right.call(Message(b""), PATIENCE).header == b""
        assert [peer.identity for peer in peers] == ["viewer"]

    @pytest.mark.parametrize("server", ["another", "without keys"])
    def test_a_server_that_is_not_the_one_whose_key_we_have_is_refused_at_once(
        self, net: Net, keys: Keys, server: str
    ) -> None:
        if not self._prove(net, keys):
            pytest.skip("this transport asks for no keys")
        peers: list[Peer] = []
        credentials = keys.server("other") if server == "another" else None
        endpoint = net.serve(_noting(peers), credentials=credentials)
        with within(_AT_ONCE), pytest.raises(PermissionDenied):
            net.connect(endpoint, credentials=keys.client("robot")).call(Message(b""), PATIENCE)
        assert not peers

    def test_keys_that_lack_what_the_transport_needs_are_refused_with_what_to_do(
        self, net: Net, keys: Keys
    ) -> None:
        if not self._prove(net, keys):
            pytest.skip("this transport asks for no keys")
        with pytest.raises(ValueError, match="edgeml keygen"):
            net.serve(echo, credentials=Credentials(clients=Keyring()))
        endpoint = net.serve(echo, credentials=keys.server())
        with pytest.raises(ValueError, match="edgeml keygen"):
            net.connect(endpoint, credentials=Credentials("robot", token="its token"))

    def test_who_is_let_in_may_change_while_a_server_runs(self, net: Net, keys: Keys) -> None:
        if not self._prove(net, keys):
            pytest.skip("this transport asks for no keys: core does")
        server = keys.server()
        ring = server.clients
        assert ring is not None
        robot = ring.by_name("robot")
        ring.revoke("robot")
        endpoint = net.serve(echo, credentials=server)
        with within(_AT_ONCE), pytest.raises(PermissionDenied):
            net.connect(endpoint, credentials=keys.client("robot")).call(Message(b""), PATIENCE)
        ring.add(robot)
        requester = net.connect(endpoint, credentials=keys.client("robot"))
        assert requester.call(Message(b"in"), PATIENCE).header == b"in"

    # Limits -------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["call", "request"])
    def test_a_message_beyond_the_limit_reaches_nobody_and_hurts_nobody(
        self, net: Net, how: str
    ) -> None:
        sizes: list[int] = []

        def on_request(message: Message, reply: Reply) -> None:
            sizes.append(message.nbytes)
            reply(Message(b""))

        endpoint = net.serve(on_request, limits=Limits(message_bytes=MB))
        good = net.connect(endpoint)
        message = make_message(b"", 4 * MB)
        requester = net.connect(endpoint)
        ask: Callable[[], Message] = {
            "call": lambda: requester.call(message, 2.0),
            "request": lambda: requester.wait_for(requester.request(message), Deadline(2.0)),
        }[how]
        with pytest.raises(EdgemlError):
            ask()
        good.call(make_message(b"", 900_000), PATIENCE)
        net.connect(endpoint).call(make_message(b"", 800_000), PATIENCE)
        assert sizes == [900_000, 800_000]

    def test_connections_from_one_address_are_limited(self, net: Net) -> None:
        if not self.sees_connections:
            pytest.skip("this transport doesn't see connections that say nothing")
        endpoint = net.serve(echo, limits=Limits(connections_per_address=8))
        good = net.connect(endpoint)
        good.call(Message(b""), PATIENCE)
        good.request(Message(b"")).result(PATIENCE)
        dialled: list[socket.socket] = []
        try:
            for _ in range(12):
                made = self.dial(endpoint.url)
                if made is None:
                    pytest.skip("nothing can be dialled")
                dialled.append(made)
            assert until(lambda: endpoint.counts["Overloaded"] >= 4)
            assert good.call(Message(b"x"), PATIENCE).header == b"x"
        finally:
            for made in dialled:
                made.close()

        def comes_in() -> bool:
            try:
                with net.transport.connect(endpoint.url, 1.0) as requester:
                    return requester.call(Message(b"y"), 1.0).header == b"y"
            except EdgemlError:
                return False

        assert until(comes_in)

    def test_who_says_nothing_is_cut_off(self, net: Net) -> None:
        if not self.has_handshake:
            pytest.skip("the silent can't be told from those that have nothing to say")
        endpoint = net.serve(echo, limits=Limits(handshake=1.0))
        good = net.connect(endpoint)
        silent = self.dial(endpoint.url)
        if silent is None:
            pytest.skip("nothing can be dialled")
        with silent:
            silent.settimeout(PATIENCE)
            with suppress(ConnectionError):
                while silent.recv(4 * KB):  # it may speak first
                    pass
        if self.sees_connections:
            assert until(lambda: endpoint.counts["HandshakeTimeout"] == 1)
        time.sleep(0.5)
        assert good.call(Message(b"x"), PATIENCE).header == b"x"  # which has said who it is

    def test_peers_from_one_place_have_one_host(self, net: Net) -> None:
        peers: list[Peer] = []
        endpoint = net.serve(_noting(peers))
        for _ in range(2):
            net.connect(endpoint).call(Message(b""), PATIENCE)
        assert peers[0].host == peers[1].host
        assert peers[0].id != peers[1].id

    # Garbage ------------------------------------------------------------------------------

    @pytest.mark.parametrize("protected", [False, True], ids=["plain", "with keys"])
    def test_garbage_connections_hold_up_nobody_and_cost_no_memory(
        self, net: Net, keys: Keys, protected: bool
    ) -> None:
        self.bombard(net, keys, self.garbage, protected=protected)

    def bombard(self, net: Net, keys: Keys, count: int, *, protected: bool) -> None:
        """Make garbage connections to a server in another process, beside a good client."""
        if not self.between_processes:
            pytest.skip("this transport stays within one process")
        if protected and not self._prove(net, keys):
            pytest.skip("this transport asks for no keys")
        pieces = self.overhear(net)
        home = str(keys.home / "server") if protected else ""
        stop = threading.Event()
        with ExitStack() as opened:
            server = Child("serve", self.url, home)
            opened.callback(server.end)
            url = Url.parse(server.line())
            credentials = keys.client("robot") if protected else None

            def connect() -> Requester:
                return net.transport.connect(url, PATIENCE, credentials=credentials)

            good, counting = _Good(connect), _Good(connect)
            opened.callback(good.close)
            opened.callback(counting.close)
            opened.callback(stop.set)
            slowest = net.start(good.keep_asking, Message(b"x"), stop, server.pid)
            memory: list[int] = []

            def dial(index: int) -> socket.socket:
                if index in (count // 3, 2 * count // 3, count - 1):
                    memory.append(int(counting.ask(Message(b"memory")).header))
                made = self.dial(url)
                assert made is not None
                return made

            connected = bombard(dial, pieces, count)
            stop.set()
            assert slowest.result(PATIENCE) < _STALL * busyness()
            assert connected > count // 2
            grown = [after - before for before, after in itertools.pairwise(memory)]
            assert min(grown) < _GROWTH  # a library's pools fill once; what leaks grows on
            again = _Good(connect)
            opened.callback(again.close)
            assert again.ask(Message(b"x")).header == b"x"

    # Together with the core ---------------------------------------------------------------

    @pytest.mark.parametrize(
        "wrong", ["nothing", "another server's", "expired", "revoked", "another's token"]
    )
    def test_a_server_with_keys_runs_nothing_for_who_has_the_wrong_ones(
        self, net: Net, keys: Keys, wrong: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        credentials, bad = keys.wrong(wrong)
        ran: list[str] = []
        with self._server(credentials) as server:
            server.register_interface("note", ran.append)
            if not _starts_with_keys(server):
                return  # it refuses what it can't honour, which is as well
            with within(_AT_ONCE), pytest.raises(self._denied(bad)):
                InferenceClient(url=server.url, credentials=bad, timeout=PATIENCE)
            if wrong in ("expired", "revoked", "another's token"):
                assert until(lambda: server.stats().get("PermissionDenied", 0) > 0)
                assert until(lambda: "refuse" in caplog.text)
            with InferenceClient(url=server.url, credentials=keys.client("viewer")) as client:
                client.call("note", "right")
                assert ran == ["right"]

    def test_who_is_revoked_is_cut_off_within_a_second(self, net: Net, keys: Keys) -> None:
        credentials = keys.server()
        ran: list[str] = []
        with self._server(credentials) as server:
            server.register_interface("note", ran.append)
            if not _starts_with_keys(server):
                return
            with InferenceClient(url=server.url, credentials=keys.client("robot")) as client:
                client.call("note", "before")
                assert credentials.clients is not None
                credentials.clients.revoke("robot")
                with within(1.0):
                    assert until(lambda: not server.clients())

                def denied() -> bool:
                    try:
                        client.call("note", "after", timeout=0.5)
                    except PermissionDenied:
                        return True
                    except EdgemlError:  # what was under way as the connection was cut
                        pass
                    return False

                assert until(denied)
        assert ran == ["before"]

    def test_a_flood_of_one_client_leaves_the_others_answered(self, net: Net) -> None:
        go_on = threading.Event()
        worked: list[str] = []

        def work(who: str) -> None:
            assert go_on.wait(PATIENCE)
            worked.append(who)

        with self._server(None) as server:
            server.register_interface("work", work)
            server.start(threaded=True)
            with (
                InferenceClient(url=server.url) as flooding,
                InferenceClient(url=server.url) as good,
            ):
                try:
                    asked = [flooding.call_async("work", "flooding") for _ in range(1000)]
                    assert until(lambda: server.stats()["waiting"] == 999)  # and one is worked on
                    asked += [good.call_async("work", "good") for _ in range(10)]
                    assert until(lambda: server.stats()["waiting"] == 1009)
                finally:
                    go_on.set()
                results_of(asked)
        assert worked.index("good") < 5
        assert worked[:40].count("good") == 10  # in turns, not after all of the flood

    def test_one_connection_does_not_take_all_sessions(self, net: Net) -> None:
        with self._server(None) as server:
            server.register_interface("echo", lambda value: value)
            server.start(threaded=True)
            requester = net.connect_to(Url.parse(server.url))
            hello = wire.Hello(wire.PROTOCOL, "inference", "greedy", "", "msgpack", {})
            header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, wire.pack(hello)))
            asked = [requester.request(Message(header)) for _ in range(100)]
            answers = [wire.unpack(wire.Answer, each.header) for each in results_of(asked)]
            welcome = [answer for answer in answers if answer.status == wire.OK]
            assert 0 < len(welcome) <= Limits().sessions_per_connection
            assert server.stats()["Overloaded"] == 100 - len(welcome)
            with InferenceClient(url=server.url) as client:
                assert client.call("echo", 1) == 1

    def test_garbage_envelopes_hold_up_nobody(self, net: Net) -> None:
        with self._server(None) as server:
            server.register_interface("echo", lambda value: value)
            server.start(threaded=True)
            url = Url.parse(server.url)
            rng = random.Random(7)
            with InferenceClient(url=server.url) as client:
                requester = net.connect_to(url)
                stop = threading.Event()
                good = _Good(lambda: net.transport.connect(url, PATIENCE))
                ping = Message(wire.pack(wire.Request(wire.PING, b"", "", 5.0, b"")))
                slowest = net.start(good.keep_asking, ping, stop)
                under_way: deque[Future[Message]] = deque()
                for _ in range(10 * self.garbage):
                    with suppress(Overloaded, Unreachable):
                        under_way.append(requester.request(_garble_envelope(rng)))
                    if len(under_way) > 20:
                        with suppress(EdgemlError):
                            under_way.popleft().result(PATIENCE)
                    if requester.lost:
                        requester = net.connect_to(url)
                stop.set()
                assert slowest.result(PATIENCE) < _STALL * busyness()
                good.close()
                assert client.call("echo", [1, 2]) == [1, 2]

    def _server(self, credentials: Credentials | None) -> InferenceServer:
        return InferenceServer(url=self.url, credentials=credentials)


# Keys -------------------------------------------------------------------------------------


def _starts_with_keys(server: InferenceServer) -> bool:
    """Start a server with keys; False if its transport can't be used with any."""
    try:
        server.start(threaded=True)
    except (PermissionDenied, ValueError):
        return False
    return True


def _noting(peers: list[Peer]) -> Callable[[Message, Reply], None]:
    def on_request(message: Message, reply: Reply) -> None:
        peers.append(reply.peer)
        reply(message)

    return on_request


# Garbage ----------------------------------------------------------------------------------


def _own_address() -> str | None:
    """An address of this machine by which others reach it, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; it is nobody's (RFC 5737)
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def _garble_envelope(rng: random.Random) -> Message:
    """A request that is nearly one of edgeml's, or nothing like it."""
    kind = rng.randrange(256) if rng.random() < 0.1 else rng.randrange(8)
    body = rng.choice((b"", rng.randbytes(20), wire.pack({"a": [1] * 20}), b"\xc1", b"\xdf" * 9))
    request = wire.pack(wire.Request(kind, rng.randbytes(16), "echo", rng.random(), body))
    header = bytearray(request)
    for _ in range(rng.choice((0, 1, 1, 3, 30))):
        header[rng.randrange(len(header))] = rng.randrange(256)
    if rng.random() < 0.3:
        del header[rng.randrange(len(header)) :]
    sizes = rng.choice(((), (), (0,), (5, 0, 3), (100_000,)))
    return Message(bytes(header), [as_view(np.zeros(size, np.uint8)) for size in sizes])


class _Good:
    """A client that asks over another connection where one is lost, as core's does."""

    def __init__(self, connect: Callable[[], Requester]) -> None:
        self._connect = connect
        self._requester = connect()

    def ask(self, message: Message) -> Message:
        """The answer, which comes sooner or later, or the test ends by its own timeout."""
        while True:
            try:
                return self._requester.call(message, PATIENCE)
            except Unreachable:
                self._requester.close()
                time.sleep(0.01)
                with suppress(Unreachable):
                    self._requester = self._connect()

    def keep_asking(self, message: Message, stop: threading.Event, *servers: int) -> float:
        """Ask until told to stop.

        Args:
            message: what.
            stop: tells it.
            servers: processes that answer.

        Returns:
            The longest time until an answer, in seconds.
        """
        slowest = 0.0
        while not stop.wait(0.005):
            watch = Stopwatch(*servers)
            self.ask(message)
            slowest = max(slowest, watch.seconds)
        return slowest

    def close(self) -> None:
        """End its connection."""
        self._requester.close()
