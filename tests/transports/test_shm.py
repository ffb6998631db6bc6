"""What shm promises beyond what every transport does; its faults are in test_shm_faults.py."""

import array
import gc
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from edgeml import ActionClient, ActionConfig, ActionServer, InferenceClient, InferenceServer
from edgeml.core import (
    Credentials,
    EdgemlError,
    Limits,
    Malformed,
    Message,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    Unreachable,
    Url,
    load_transport,
    wire,
)
from edgeml.core.session import SessionKeeper
from edgeml.testing import TransportTests
from edgeml.transports.shm import channel, memory, segments, sockets
from edgeml.transports.shm.waiting import Waiter
from pairs import free_port, plain_client, process, wait_until
from shm_records import FORGET, HEAD, HELLO, MAP, MESSAGE, RETURN, record

ANY = Url.parse("shm://127.0.0.1:0")
SHM = load_transport("shm")
MB = 1 << 20


def echo(message, reply):
    reply(message)


def view(size, value=0):
    return memoryview(np.full(size, value, np.uint8))


class Serving:
    """An endpoint that keeps what it is asked, and one connection to it."""

    def __init__(self, on_request=None):
        self.taken = []
        self.endpoint = SHM.serve(ANY, on_request or self._take)
        self.requester = SHM.connect(self.endpoint.url, 20)

    def _take(self, message, reply):
        self.taken.append((message, reply))

    def take(self, count=1):
        wait_until(lambda: len(self.taken) >= count)
        return self.taken[count - 1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.taken.clear()
        self.requester.close()
        self.endpoint.close()


# Elsewhere than on Linux ------------------------------------------------------------------


class TestElsewhere(TransportTests):
    """Streams, socket files and temporary files in place of what only Linux has."""

    url = "shm://127.0.0.1:0"
    has_paths = True
    between_processes = False  # which would need the patch as well

    @pytest.fixture(autouse=True)
    def _not_linux(self, monkeypatch):
        monkeypatch.setattr(segments, "SEALABLE", False)
        monkeypatch.setattr(sockets, "LINUX", False)
        monkeypatch.setattr(sockets, "_identify", lambda _: (0, os.geteuid()))


# Copies -----------------------------------------------------------------------------------


def test_what_is_filled_in_place_is_sent_without_a_copy():
    with Serving() as serving:
        buffer = serving.requester.allocate(MB)
        array_ = np.frombuffer(buffer, np.uint8)
        array_[:] = 1
        serving.requester.request(Message(b"", [buffer]))
        (received,) = serving.take()[0].buffers
        assert received[0] == received[-1] == 1
        array_[-1] = 2  # which nobody should do; it shows that the memory is the same
        assert received[-1] == 2


def test_a_part_of_what_is_filled_in_place_is_sent_without_a_copy():
    with Serving() as serving:
        array_ = np.frombuffer(serving.requester.allocate(4 * MB), np.float32).reshape(1024, 1024)
        array_[:] = 1
        serving.requester.request(Message(b"", [array_[100:300].reshape(-1).data.cast("B")]))
        (received,) = serving.take()[0].buffers
        assert len(received) == 200 * 1024 * 4
        array_[100] = 2
        assert np.frombuffer(received, np.float32)[0] == 2


def test_memory_of_one_endpoint_is_ordinary_memory_to_another():
    with Serving() as one, Serving() as other:
        buffer = one.requester.allocate(MB)
        buffer[:] = view(MB, 3)
        other.requester.request(Message(b"", [buffer]))
        (received,) = other.take()[0].buffers
        buffer[0] = 4
        assert received[0] == 3


def test_allocated_memory_is_not_used_again_while_anybody_has_it():
    with Serving() as serving:
        endpoint = serving.endpoint
        allocated = [endpoint.allocate(MB) for _ in range(8)]
        for number, buffer in enumerate(allocated):
            buffer[:] = view(MB, number)
        future = serving.requester.request(Message(b""))
        serving.take()[1](Message(b"", allocated[:4]))
        received = future.result(20).buffers
        del allocated
        for _ in range(20):
            endpoint.allocate(MB)[:] = view(MB, 99)
        assert [buffer[0] for buffer in received] == [0, 1, 2, 3]
        assert [buffer[-1] for buffer in received] == [0, 1, 2, 3]


VIEWS = {
    "memoryview": lambda buffer: buffer,
    "slice": lambda buffer: buffer[5:10],
    "frombuffer": lambda buffer: np.frombuffer(buffer, np.uint8),
    "ndarray": lambda buffer: np.ndarray((MB,), np.uint8, buffer),
    "asarray": np.asarray,
    "array": lambda buffer: np.array(buffer, copy=False),
    "view of views": lambda buffer: np.asarray(buffer).view(np.int32).reshape(512, -1)[3:5].T,
    "cast": lambda buffer: np.asarray(buffer).view(np.int32).data.cast("B"),
}


@pytest.mark.parametrize("how", VIEWS)
def test_any_view_of_allocated_memory_keeps_it(how):
    with Serving() as serving:
        pool = serving.requester._pool
        kept = VIEWS[how](serving.requester.allocate(MB))
        gc.collect()
        tokens = {pool.take(MB).token for _ in range(4)}
        assert not pool._dead
        assert not tokens & {lease.token for lease in pool._allocations.values()}
        assert len(pool._allocations) == 1
        del kept
        assert not pool._allocations


@pytest.mark.parametrize("how", VIEWS)
def test_any_view_of_what_was_received_keeps_it(how):
    with Serving(echo) as serving:
        got = serving.requester.call(Message(b"", [view(MB)]), 20).buffers[0]
        kept = VIEWS[how](got)
        leases = serving.requester._local.line.channel._leases
        del got
        gc.collect()
        assert len(leases) == 1
        del kept
        assert len(leases) == 0


def test_a_broadcast_is_written_once_for_all():
    with Serving() as serving:
        others = [SHM.connect(serving.endpoint.url, 20) for _ in range(7)]
        futures = [each.request(Message(b"")) for each in (serving.requester, *others)]
        serving.take(8)
        array_ = np.ones(16 * MB, np.uint8)
        before = mapped()
        serving.endpoint.reply_many(
            [reply for _, reply in serving.taken], Message(b"", [array_.data])
        )
        received = [future.result(20).buffers[0] for future in futures]
        assert all(buffer[0] == buffer[-1] == 1 for buffer in received)
        # One file, which this process maps once as the writer and 8 times as readers.
        new = [line for line in mapped() if line not in before]
        assert len({line.split()[4] for line in new}) == 1
        assert len(new) == 9
        for each in others:
            each.close()


def mapped():
    with open("/proc/self/maps") as file:
        return [line for line in file if "memfd:edgeml" in line]


def test_services_give_memory_to_fill():
    config = ActionConfig(0, [], ["image"], transport="shm")
    with ActionServer(config, None, None) as server:
        assert server.empty((480, 640, 3), np.uint8).shape == (480, 640, 3)  # not started yet
        server.start(threaded=True)
        with ActionClient("localhost", server.port, config=config) as client:
            frames = []
            client.register_obs_callback(frames.append)
            frame = server.empty((480, 640, 3), np.uint8)
            frame[:] = 7
            server.publish_obs({"image": frame})
            wait_until(lambda: frames)
            assert not frames[0]["image"].flags.writeable
            assert (frames[0]["image"] == 7).all()
            frame[0, 0, 0] = 8
            assert frames[0]["image"][0, 0, 0] == 8
            assert client.empty(3, np.float32).shape == (3,)
            assert client.stats()["replies_copied"] == 0


def test_a_round_of_whoever_carries_the_loop_brings_all_that_has_come():
    """Or a server whose handlers take long would see one call of each client per handler."""
    came = []

    def on_request(message, reply):
        came.append(message.header)
        if message.header == b"first":
            reply(message)

    endpoint = SHM.serve(Url.parse("shm://127.0.0.1:0"), on_request)
    with endpoint, SHM.connect(endpoint.url, 5.0) as requester:
        requester.call(Message(b"first"), 5.0)
        comes = [True]
        endpoint.carry(lambda: bool(comes and comes.pop()))
        for n in range(30):
            requester.request(Message(b"%d" % n))
        endpoint.carry(lambda: False)
        assert came == [b"first", *(b"%d" % n for n in range(30))]
        endpoint.relieve()


# Limits -----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setenv("EDGEML_SHM_LIMIT_MB", "4")


@pytest.mark.usefixtures("few")
def test_a_message_beyond_the_limit_is_refused_with_a_reason():
    with Serving() as serving:
        with pytest.raises(NotEncodable, match="4 MiB are lent"):
            serving.requester.call(Message(b"", [view(5 * MB)]), 20)
        serving.requester.request(Message(b""))
        with pytest.raises(NotEncodable, match="EDGEML_SHM_LIMIT_MB"):
            serving.take()[1](Message(b"", [view(5 * MB)]))


@pytest.mark.usefixtures("few")
def test_a_peer_that_does_not_read_is_lent_no_more_than_the_limit():
    reads = threading.Event()

    def on_request(message, reply):
        reads.wait(10)
        reply(Message(b""))

    with Serving(on_request) as serving:
        message = Message(b"", [view(MB)])
        futures = [serving.requester.request(message) for _ in range(4)]
        with pytest.raises(Overloaded, match=r"4 MiB are lent .*EDGEML_SHM_LIMIT_MB"):
            serving.requester.request(message)
        reads.set()
        wait_until(lambda: all(future.done() for future in futures))
        wait_until(lambda: can_allocate(serving))


def can_allocate(serving):
    try:
        return serving.requester.request(Message(b"", [view(MB)]))
    except Overloaded:
        return None


@pytest.mark.usefixtures("few")
def test_a_reply_beyond_the_limit_is_dropped_and_counted():
    with Serving() as serving:
        kept = [serving.requester.request(Message(b"")) for _ in range(10)]
        serving.take(10)
        for _, reply in serving.taken:
            reply(Message(b"", [view(MB)]))
        refused = [future for future in kept if isinstance(future.exception(20), Overloaded)]
        assert 0 < len(refused) == serving.endpoint.dropped <= 6
        with pytest.raises(Overloaded, match=r"could not be given: the peer .* 4 MiB"):
            refused[0].result()
        assert all(future.result().buffers[0][0] == 0 for future in kept if future not in refused)


@pytest.mark.usefixtures("few")
def test_who_holds_what_is_lent_goes_on_with_copies():
    with InferenceServer(0, transport="shm") as server:
        server.register_interface("frame", lambda n: np.full(300_000, n, np.uint8))
        server.start(threaded=True)
        with InferenceClient("localhost", server.port, "shm") as client:
            kept = []

            def keep(first):
                kept.extend(client.call("frame", first + index, timeout=20) for index in range(10))

            threads = [threading.Thread(target=keep, args=(10 * number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(frame[-1] for frame in kept) == list(range(40))
            assert client.stats()["replies_copied"] > 20


@pytest.mark.usefixtures("few")
def test_a_subscriber_that_keeps_publications_gets_the_next_ones_all_the_same():
    config = ActionConfig(0, transport="shm")
    with ActionServer(config, None, None) as server:
        server.start(threaded=True)
        with ActionClient("localhost", server.port, config=config) as client:
            kept = []
            subscription = client.register_obs_callback(lambda value: kept.append(value["x"]))
            for number in range(1, 31):
                server.publish_obs({"x": np.full(900_000, number, np.uint8)})
                wait_until(lambda n=number: kept and kept[-1][0] == n)
            assert [array_[-1] for array_ in kept] == list(range(1, 31))
            assert subscription.missed == 0
            assert client.stats()["replies_copied"] > 20


@pytest.mark.usefixtures("few")
def test_a_publication_that_can_not_be_lent_is_missed_and_the_next_comes():
    config = ActionConfig(0, transport="shm")
    with ActionServer(config, None, None) as server:
        server.start(threaded=True)
        with ActionClient("localhost", server.port, config=config) as client:
            kept = []
            # Half of what may be lent is held as it is; with this, nothing is left.
            client.register_obs_callback(lambda value: kept.append(value["x"]))
            server.publish_obs({"x": np.full(2 * MB - 1000, 1, np.uint8)})
            wait_until(lambda: len(kept) == 1)
            server.publish_obs({"x": np.full(4 * MB - 1000, 2, np.uint8)})
            wait_until(lambda: server.stats()["replies_dropped"])
            kept.clear()
            wait_until(lambda: published(server, kept))


def published(server, kept):
    server.publish_obs({"x": np.full(3 * MB, 3, np.uint8)})
    return kept


@pytest.mark.usefixtures("few")
def test_memory_beyond_the_limit_is_ordinary_memory():
    with Serving() as serving:
        assert serving.requester.allocate(5 * MB) is None
        assert serving.endpoint.allocate(3 * MB) is not None


def test_clients_that_leave_are_no_dropped_replies(monkeypatch):
    # A goodbye in time, on a busy machine; and not just before the client's own first heartbeat,
    # which would be answered to nobody.
    monkeypatch.setattr("edgeml.core.session._FAREWELL", 5.0)
    beats, ask = [], SessionKeeper._ask
    monkeypatch.setattr(SessionKeeper, "_ask", lambda *given: beats.append(given) or ask(*given))
    with new_server("shm") as server:
        with plain_client(server) as client:
            wait_until(lambda: beats)
            time.sleep(0.05)
            client.call("echo", 1)
        wait_until(lambda: not server.clients())
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            beats.clear()
            with plain_client(server) as client:
                wait_until(lambda: beats)
                time.sleep(0.05)  # for it to be there: it goes by a socket of its own
                session = client.sessions.current
                heartbeat = wire.Request(
                    wire.NEXT, session.key, wire.HEARTBEAT, 10.0, wire.pack(wire.Credit(0, 0, 0))
                )
                waiting = session.requester.request(Message(wire.pack(heartbeat)))
                client.call("echo", 1)  # comes behind it, so it is parked
                assert not waiting.done()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert server.stats()["replies_dropped"] == 0


@pytest.mark.parametrize("value", ["0", "-1", "lots"])
def test_a_limit_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("EDGEML_SHM_LIMIT_MB", value)
    with pytest.raises(ValueError, match="EDGEML_SHM_LIMIT_MB"):
        SHM.serve(ANY, echo)


def test_who_keeps_views_gets_copies_that_are_counted():
    with InferenceServer(0, transport="shm") as server:
        server.register_interface("frame", lambda n: np.full(300_000, n, np.uint8))
        server.start(threaded=True)
        with InferenceClient("localhost", server.port, "shm") as client:
            kept = [client.call("frame", index) for index in range(200)]
            assert [frame[-1] for frame in kept] == list(range(200))
            assert 100 < client.stats()["replies_copied"] < 200
            kept.clear()
            client.call("frame", 0)
            before = client.stats()["replies_copied"]
            for index in range(100):
                client.call("frame", index)
            assert client.stats()["replies_copied"] == before


def test_memory_that_is_not_used_any_more_is_given_up(monkeypatch):
    monkeypatch.setattr(memory, "_KEEP", 0.0)
    with Serving(echo) as serving:
        before = len(mapped())
        serving.requester.call(Message(b"", [view(3 * MB)]), 20)
        assert len(mapped()) > before
        wait_until(lambda: len(mapped()) == before)


# Addresses --------------------------------------------------------------------------------


def test_a_path_is_an_address(tmp_path):
    url = Url.parse(f"shm://{tmp_path}/robot.sock")
    with SHM.serve(url, echo) as endpoint:
        assert endpoint.url == url
        assert os.stat(url.path).st_mode & 0o77 == 0
        with SHM.connect(url, 20) as requester:
            assert requester.call(Message(b"x"), 20).header == b"x"
        with pytest.raises(OSError, match="in use"):
            SHM.serve(url, echo)
    assert not os.path.exists(url.path)
    with pytest.raises(Unreachable):
        SHM.connect(url, 20)


def test_a_socket_that_was_left_behind_is_replaced(tmp_path):
    url = Url.parse(f"shm://{tmp_path}/robot.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(url.path)
    with pytest.raises(Unreachable):
        SHM.connect(url, 20)
    with SHM.serve(url, echo), SHM.connect(url, 20) as requester:
        assert requester.call(Message(b"x"), 20).header == b"x"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(OSError, match=r".+"):
        SHM.serve(Url.parse(f"shm://{path}"), echo)
    assert path.read_text() == "mine"


def test_a_path_may_have_as_many_bytes_as_the_system_takes_and_no_more(tmp_path):
    most = sockets.LONGEST_PATH - len(os.fsencode(tmp_path)) - 1
    with SHM.serve(Url.parse(f"shm://{tmp_path}/{'x' * most}"), echo) as endpoint:
        SHM.connect(endpoint.url, 20).close()
    # Of two bytes each, for it is bytes that count.
    longer = Url.parse(f"shm://{tmp_path}/{'é' * (most // 2 + 1)}")
    with pytest.raises(OSError, match=rf"has \d+ bytes.* {sockets.LONGEST_PATH} at most.*shorter"):
        SHM.serve(longer, echo)
    with pytest.raises(Unreachable, match=f"{sockets.LONGEST_PATH} at most.*shorter") as caught:
        SHM.connect(longer, 5)
    assert "server started" not in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_another_machine_is_out_of_reach(host):
    with pytest.raises(OSError, match="not on this machine"):
        SHM.serve(Url("shm", host, 5), echo)
    with pytest.raises(Unreachable, match="not on this machine"):
        SHM.connect(Url("shm", host, 5), 5)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "::1", socket.gethostname(), ""])
def test_this_machine_has_many_names(host):
    with SHM.serve(Url("shm", host, 0), echo) as endpoint:
        SHM.connect(Url("shm", "127.0.0.1", endpoint.url.port), 5).close()


# Several transports -----------------------------------------------------------------------


def new_server(transport, port=0):
    server = InferenceServer(port, transport=transport)
    server.register_interface("echo", lambda payload: payload)
    server.start(threaded=True)
    return server


def carrier(server):
    """Which transport the server's one client came over."""
    wait_until(lambda: len(server.clients()) == 1)
    return "shm" if "shm" in server.clients()[0].address else "zmq"


@pytest.mark.parametrize("transport", ["shm,zmq", "zmq,shm", "auto"])
def test_a_server_has_one_port_on_all_its_transports(transport):
    with new_server(transport) as server:
        for name, expected in (("zmq", "zmq"), ("shm", "shm"), ("auto", "shm")):
            with InferenceClient("localhost", server.port, name) as client:
                assert carrier(server) == expected
                assert client.call("echo", 1) == 1
            wait_until(lambda: not server.clients())
        with InferenceClient("", 0, f"auto://127.0.0.1:{server.port}"):
            assert carrier(server) == "shm"


def test_auto_takes_the_network_where_there_is_no_shm():
    with (
        new_server("zmq") as server,
        InferenceClient("localhost", server.port, "auto"),
    ):
        assert carrier(server) == "zmq"


def test_auto_says_all_that_it_tried():
    with pytest.raises(Unreachable, match=r"(?s)shm://.*zmq://"):
        InferenceClient("localhost", 1, "auto")


def test_auto_comes_back_by_whatever_the_server_offers_after_a_restart():
    port = free_port()
    server = new_server("auto", port)
    with InferenceClient("localhost", port, "auto") as client:
        server.stop()
        again = InferenceServer(port, transport="zmq")
        again.register_interface("echo", lambda payload: payload)
        with again:
            again.start(threaded=True)
            wait_until(lambda: called(client) == 2)
            assert carrier(again) == "zmq"


def called(client):
    try:
        return client.call("echo", 2, timeout=1)
    except EdgemlError:
        return None


def test_a_publication_reaches_subscribers_on_every_transport():
    config = ActionConfig(0, transport="auto")
    with ActionServer(config, None, None) as server:
        server.start(threaded=True)
        got = {}
        with (
            ActionClient("localhost", server.port, config=config, transport="shm") as near,
            ActionClient("localhost", server.port, config=config, transport="zmq") as far,
        ):
            near.register_obs_callback(lambda value: got.update(near=value["x"]))
            far.register_obs_callback(lambda value: got.update(far=value["x"]))
            array_ = np.arange(100_000)
            server.publish_obs({"x": array_})
            array_[:] = 0
            wait_until(lambda: len(got) == 2)
            for value in got.values():
                assert (value == np.arange(100_000)).all()


# Other users ------------------------------------------------------------------------------

NOBODY = 65534
AS_NOBODY = "import os; os.setgid(65534); os.setuid(65534)\n"

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@root_only
def test_another_user_can_not_connect(tmp_path):
    # Loaded before it becomes nobody, who may not read the checkout.
    program = (
        "import sys; from edgeml.core import *\n"
        "t = load_transport('shm'); u = Url.parse(sys.argv[1])\n"
        "import socket, os; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"{AS_NOBODY}"
        "try: t.connect(u, 5)\n"
        "except PermissionDenied as error: print('refused:', error)\n"
        # One that doesn't look who serves is refused by who does.
        "s.connect(f'\\0edgeml/{u.port}'); s.settimeout(20)\n"
        "print(s.recv(1000)[0], s.recv(1000))\n"
    )
    with SHM.serve(ANY, echo) as endpoint, process(program, endpoint.url) as other:
        assert other.line().startswith("refused: the process on the other side is run by user 0")
        assert other.line() == "5 b''"  # a refusal, and the end
        assert endpoint.counts == {"PermissionDenied": 2}
        with SHM.connect(endpoint.url, 20) as requester:
            assert requester.call(Message(b"x"), 20).header == b"x"


@root_only
def test_another_users_server_is_not_talked_to():
    program = (
        "from edgeml.core import *\n"
        "t = load_transport('shm')\n"
        f"{AS_NOBODY}"
        "e = t.serve(Url.parse('shm://127.0.0.1:0'), lambda m, r: r(m)); print(e.url.port)\n"
        "import sys; sys.stdin.read()\n"
    )
    done = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with done:
        port = int(done.stdout.readline())
        with pytest.raises(PermissionDenied, match="run by user 65534"):
            SHM.connect(ANY.with_port(port), 20)
        with pytest.raises(PermissionError):
            InferenceClient("", port, "shm")
        done.stdin.close()


# What another user's client does: whatever it is told to, line by line.
FOREIGN_CLIENT = (
    "import sys; from edgeml.core import *\n"
    "t = load_transport('shm'); u = Url.parse(sys.argv[1])\n"
    "c = Credentials(users=eval(sys.argv[2]))\n"
    f"{AS_NOBODY}"
    "try:\n"
    "    with t.connect(u, 5, credentials=c) as requester:\n"
    "        buffer = requester.allocate(1 << 20)\n"
    "        buffer[:] = bytes([1]) * len(buffer)\n"
    "        print(requester.call(Message(b'x', [buffer]), 20).header)\n"
    "        buffer[:] = bytes([2]) * len(buffer)\n"
    "        print('changed')\n"
    "        input()\n"
    "except Exception as error: print(type(error).__name__, error)\n"
)


@root_only
@pytest.mark.parametrize("where", ["by number", "at a path"])
@pytest.mark.parametrize("listed", [(NOBODY,), ("nobody",), ("daemon", "nobody")])
def test_users_who_list_each_other_talk(where, listed, open_folder):
    url = ANY if where == "by number" else Url("shm", "", 0, f"{open_folder}/socket")
    taken = []

    def on_request(message, reply):
        taken.append((message, reply.peer))
        reply(Message(b"answered"))

    credentials = Credentials(users=listed)
    with (
        SHM.serve(url, on_request, credentials=credentials) as endpoint,
        process(FOREIGN_CLIENT, endpoint.url, ("root",)) as other,
    ):
        assert other.line() == "b'answered'"
        assert other.line() == "changed"
        ((message, peer),) = taken
        assert (np.frombuffer(message.buffers[0], np.uint8) == 1).all()  # a copy, unlike our own
        assert "user 65534" in peer.address
        assert peer.host == "user 65534"
        assert not endpoint.counts
        with SHM.connect(endpoint.url, 20) as requester:  # and one's own as ever
            requester.call(Message(b"x"), 20)
        assert taken[-1][1].host == "user 0"


@pytest.fixture
def open_folder():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield folder


@root_only
@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        ((), ("root",), "is served by user 0, who doesn't talk to user 65534: list him"),
        (("daemon",), ("root",), "is served by user 0, who doesn't talk to user 65534: list him"),
        (("nobody",), (), "the process on the other side is run by user 0, this one by 65534"),
    ],
    ids=["not by the server", "another by the server", "not by the client"],
)
def test_one_who_is_not_listed_is_refused_at_once_and_counted(server, client, says):
    taken = []
    credentials = Credentials(users=server)
    with (
        SHM.serve(ANY, lambda *got: taken.append(got), credentials=credentials) as endpoint,
        process(FOREIGN_CLIENT, endpoint.url, client) as other,
    ):
        line = other.line()
        assert line.startswith("PermissionDenied")
        assert says in line
        assert not taken
        assert endpoint.counts == ({"PermissionDenied": 1} if client else {})


def test_a_user_whom_this_machine_does_not_know_is_an_error():
    credentials = Credentials(users=("no such user",))
    with pytest.raises(ValueError, match="no such user"):
        SHM.serve(ANY, echo, credentials=credentials)
    with pytest.raises(ValueError, match="no such user"):
        SHM.connect(ANY.with_port(5555), 1.0, credentials=credentials)


def test_who_can_not_be_told_from_others_is_not_trusted(monkeypatch):
    monkeypatch.setattr(sockets, "_names_all_users", lambda: False)  # as in a container
    with pytest.raises(ValueError, match="can't tell whom it talks to"):
        SHM.serve(ANY, echo, credentials=Credentials(users=(NOBODY,)))
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with pytest.raises(ValueError, match="can't tell whom it talks to"):
        SHM.serve(ANY, echo)


@pytest.fixture
def squatter():
    """Takes shm's name of a port as another user, and serves there whoever comes, or does not."""
    program = (
        "import signal, socket, sys\n"
        f"{AS_NOBODY}"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.bind(f'\\0edgeml/{sys.argv[1]}')\n"
        "if sys.argv[2] == 'listens': s.listen()\n"
        "print('taken')\n"
        "signal.pause()\n"
    )
    with ExitStack() as stack:

        def take(port, listens=True):
            said = "listens" if listens else "is silent"
            assert stack.enter_context(process(program, port, said)).line() == "taken"

        yield take


@root_only
@pytest.mark.parametrize("listens", [True, False])
def test_who_takes_the_name_first_stops_no_server_that_has_another_address(
    squatter, caplog, listens
):
    port = free_port()
    squatter(port, listens)
    with InferenceServer(port, transport="auto") as server:
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        assert "does without shm" in caplog.text
        assert not listens or "user 65534" in caplog.text
        with InferenceClient("localhost", port, "auto") as client:
            assert client.call("echo", 1) == 1
            assert carrier(server) == "zmq"


@root_only
def test_who_takes_the_name_first_is_named_where_there_is_no_other_address(squatter):
    port = free_port()
    squatter(port)
    with (
        pytest.raises(PermissionDenied, match="taken by a process of user 65534"),
        InferenceServer(port, transport="shm") as server,
    ):
        server.start(threaded=True)


def test_no_server_does_without_a_name_that_another_of_the_same_user_has():
    with SHM.serve(ANY, echo) as endpoint:
        with (
            pytest.raises(OSError, match="cannot serve shm://") as raised,
            InferenceServer(endpoint.url.port, transport="auto") as server,
        ):
            server.start(threaded=True)
        assert not isinstance(raised.value, PermissionDenied)


# Garbage ----------------------------------------------------------------------------------


class Stranger:
    """Speaks to an endpoint by hand."""

    def __init__(self, endpoint, hello=HELLO):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(f"\0edgeml/{endpoint.url.port}")
        self.socket.settimeout(20)
        assert self.socket.recv(100)[HEAD.size :].startswith(channel._MAGIC)
        if hello:
            self.socket.send(hello)

    def send(self, *records):
        for each in records:
            self.socket.send(each)

    def send_segment(self, fd, size, number=1):
        self.send(HEAD.pack(MAP, 0, 0, 1, 0, number) + struct.pack("<Q", size))
        socket.send_fds(self.socket, [b"\0"], [fd])

    def refused(self):
        with self.socket:
            try:
                return self.socket.recv(100) == b""
            except ConnectionResetError:
                return True


FORGED = {
    "no hello": None,
    "another version": [b"\0" * HEAD.size + b"edgeml\0\7" + b"x" * 24],
    "a byte": [HELLO, b"x"],
    "an unknown kind": [HELLO, HEAD.pack(9, 0, 0, 0, 0, 0)],
    "hello twice, then more": [HELLO, HELLO],
    "a header cut short": [HELLO, record(size=100)],
    "a header too long": [HELLO, record(header=b"xx", size=1)],
    "more buffers than there are": [HELLO, record(count=5)],
    "very many buffers": [HELLO, record(count=1 << 31)],
    "a very large header": [HELLO, record(size=1 << 31, count=1)],
    "a buffer cut short": [HELLO, record([(0, 0, 0, 10)], rest=b"x")],
    "an endless buffer": [HELLO, record([(0, 0, 0, 1 << 63)], rest=b"x")],
    "a segment never given": [HELLO, record([(7, 1, 0, 10)])],
    "a far header in no segment": [HELLO, record([(7, 1, 0, 10)], flags=1)],
    "a far header without a place": [HELLO, record(flags=1)],
    "a refusal of no kind": [HELLO, HEAD.pack(5, 9, 0, 0, 0, 0)],
    "returns of what was never lent": [HELLO, record(returns=[5])],
    "returns cut short": [HELLO, HEAD.pack(RETURN, 0, 1000, 0, 0, 0)],
    "segments forgotten, cut short": [HELLO, HEAD.pack(FORGET, 0, 0, 1 << 30, 0, 0)],
    "a segment without a size": [HELLO, HEAD.pack(MAP, 0, 0, 1, 0, 1)],
    "a segment without a descriptor": [
        HELLO,
        HEAD.pack(MAP, 0, 0, 1, 0, 1) + struct.pack("<Q", 4096),
        b"\0",
    ],
}


@pytest.mark.parametrize("name", FORGED)
def test_a_peer_that_sends_garbage_is_cut_off_and_hurts_nobody(name):
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint, hello=None)
        stranger.send(*(FORGED[name] or [record()]))
        assert stranger.refused()
        assert serving.endpoint.counts == {"Malformed": 1}
        assert serving.requester.call(Message(b"x", [view(MB)]), 20).header == b"x"


def test_random_records_hurt_nobody():
    rng = random.Random(0)
    with Serving(echo) as serving:
        for _ in range(300):
            stranger = Stranger(serving.endpoint)
            kind = rng.randrange(5)
            stranger.send(bytes([kind]) + rng.randbytes(rng.choice([3, 20, 100, 5000])))
            stranger.socket.close()
        assert serving.requester.call(Message(b"x", [view(MB)]), 20).header == b"x"
        wait_until(lambda: len(serving.endpoint._reactor.channels) == 2)  # the requester's two


def sealed(size, seals=segments._SEALS, *, large=False):
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if large else 0)
    try:
        fd = os.memfd_create("test", flags)
    except OSError:
        pytest.skip("this system has no large pages")
    os.truncate(fd, size)
    import fcntl

    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def temporary(size):
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


@pytest.mark.parametrize(
    ("make", "claims"),
    [
        (lambda: sealed(8192, 0), 8192),  # which could be truncated
        (lambda: sealed(8192, 0x04), 8192),
        (lambda: sealed(4096), 8192),
        (lambda: sealed(8192), 0),
        (lambda: sealed(8192), 1 << 62),
        (lambda: temporary(8192), 8192),
        (lambda: os.open("/dev/zero", os.O_RDONLY), 8192),
    ],
    ids=["unsealed", "half sealed", "too small", "empty", "endless", "a file", "a device"],
)
def test_memory_that_can_not_be_trusted_is_not_mapped(make, claims):
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint)
        fd = make()
        stranger.send_segment(fd, claims)
        os.close(fd)
        assert stranger.refused()
        assert serving.requester.call(Message(b"x"), 20).header == b"x"


def test_memory_whose_pages_its_sender_could_take_back_is_not_mapped():
    with pytest.raises(Malformed, match="large pages"):
        segments.map_segment(sealed(1 << 21, large=True), 1 << 21, whole=False)


def test_buffers_beyond_their_segment_are_refused():
    for offset, size in ((4096, 1), (0, 4097), (1, 4096), (1 << 63, 1), (4095, 1 << 63)):
        with Serving(echo) as serving:
            stranger = Stranger(serving.endpoint)
            fd = sealed(4096)
            stranger.send_segment(fd, 4096)
            os.close(fd)
            stranger.send(record([(1, 1, offset, size)]))
            assert stranger.refused()


def test_what_a_stranger_says_correctly_is_answered():
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint)
        fd = sealed(4096)
        stranger.send_segment(fd, 4096)
        os.close(fd)
        stranger.send(record([(1, 77, 0, 10)], header=b"head"))
        answer = stranger.socket.recv(1000)
        kind, _, returns, count, size, number = HEAD.unpack_from(answer)
        assert (kind, returns, count, size, number) == (MESSAGE, 0, 1, 4, 1)
        assert answer[HEAD.size :] == struct.pack("<IIQQ", 0, 0, 0, 10) + b"head" + bytes(10)
        # The token comes back with the next.
        stranger.send(record())
        answer = stranger.socket.recv(1000)
        assert HEAD.unpack_from(answer)[2] == 1
        assert struct.unpack_from("<I", answer, HEAD.size) == (77,)
        stranger.socket.close()


def test_threads_that_come_and_go_quickly_leave_no_more_than_a_few_sockets():
    with Serving(echo) as serving:
        serving.requester.call(Message(b""), 20)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            thread = threading.Thread(target=serving.requester.call, args=(Message(b""), 5.0))
            thread.start()
            thread.join()
        assert len(os.listdir("/proc/self/fd")) < before + 50  # each has one at either end


def test_descriptors_that_nobody_asked_for_are_not_kept():
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint)
        before = len(os.listdir("/proc/self/fd"))
        with socket.socket() as other:
            for _ in range(50):
                fds = array.array("i", [other.fileno()] * 10)
                stranger.socket.sendmsg(
                    [record(header=b"x")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                )
                stranger.socket.recv(1000)
        assert len(os.listdir("/proc/self/fd")) <= before
        stranger.socket.close()


# Limits -----------------------------------------------------------------------------------


def limited(**limits):
    return SHM.serve(ANY, echo, limits=Limits(**limits))


def test_who_does_not_say_hello_is_cut_off():
    with limited(handshake=1.0) as endpoint, SHM.connect(endpoint.url, 20) as requester:
        stranger = Stranger(endpoint, hello=None)
        assert stranger.refused()
        assert endpoint.counts == {"HandshakeTimeout": 1}
        assert requester.call(Message(b"x"), 20).header == b"x"


def test_who_announces_memory_that_never_comes_is_cut_off():
    with limited(stall=0.5) as endpoint:
        stranger = Stranger(endpoint)
        stranger.send(HEAD.pack(MAP, 0, 0, 1, 0, 1) + struct.pack("<Q", 4096))
        assert stranger.refused()
        assert endpoint.counts == {"Stalled": 1}


def test_connections_of_one_user_are_limited_and_one_that_ends_makes_room():
    with limited(connections_per_address=3) as endpoint:
        strangers = [Stranger(endpoint) for _ in range(3)]
        with pytest.raises(Unreachable, match="connections_per_address"):
            SHM.connect(endpoint.url, 20)
        assert endpoint.counts == {"Overloaded": 1}
        strangers.pop().socket.close()
        wait_until(lambda: len(endpoint._reactor.channels) == 2)
        with SHM.connect(endpoint.url, 20) as requester:
            assert requester.request(Message(b"x")).result(20).header == b"x"
            with pytest.raises(Overloaded, match="connections_per_address"):
                requester.call(Message(b"x"), 20)  # which takes another
        for stranger in strangers:
            stranger.socket.close()


@pytest.mark.parametrize("how", ["call", "request"])
@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Message(b"x", [b"y"] * 11), "11 arrays; this server takes 10"),
        (Message(b"x", [view(MB)]), "bytes; this server takes 500000"),
        (Message(bytes(600_000), [view(1)]), "bytes; this server takes 500000"),
    ],
    ids=["arrays", "bytes", "header"],
)
def test_a_message_beyond_the_limits_is_refused_and_nothing_else(message, says, how):
    with (
        limited(buffers=10, message_bytes=500_000) as endpoint,
        SHM.connect(endpoint.url, 20) as requester,
    ):
        ask = {
            "call": lambda: requester.call(message, 20),
            "request": lambda: requester.request(message).result(20),
        }[how]
        for _ in range(3):
            with pytest.raises(Malformed, match=says):
                ask()
            assert requester.call(Message(b"x", [b"y"] * 10), 20).header == b"x"
        assert endpoint.counts == {"Malformed": 3}
        wait_until(lambda: not requester._pool.segments or not lent(requester))


def lent(requester):
    return sum(segment.live for segment in requester._pool.segments.values())


def test_what_is_asked_is_not_read_from_who_leaves_the_answers_unread():
    with SHM.serve(ANY, echo) as endpoint, SHM.connect(endpoint.url, 20) as requester:
        stranger = Stranger(endpoint)
        stranger.socket.setblocking(False)
        big = record(header=bytes(16000))
        sent = 0
        ended = time.monotonic() + 30
        idle = 0
        while idle < 100 and time.monotonic() < ended:
            try:
                stranger.send(big)
                sent, idle = sent + 1, 0
            except BlockingIOError:
                idle += 1
                assert requester.call(Message(b"x"), 20).header == b"x"
        assert idle == 100
        channels = endpoint._reactor.channels
        assert max(len(channel._outbox) for channel in channels) < 5
        stranger.socket.setblocking(True)
        for _ in range(sent):  # and all are answered once they are read
            assert len(stranger.socket.recv(1 << 16)) == len(big)
        stranger.socket.close()


def test_at_the_limit_of_open_files_nobody_is_lost_and_the_loop_rests(caplog):
    with SHM.serve(ANY, echo) as endpoint, SHM.connect(endpoint.url, 20) as requester:
        requester.call(Message(b"x"), 20)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # nothing more can be opened
        try:
            for each in waiting:
                each.connect(f"\0edgeml/{endpoint.url.port}")
            wait_until(lambda: "nobody can connect now" in caplog.text)
            began, cpu = time.monotonic(), time.process_time()
            while time.monotonic() < began + 1.0:
                assert requester.call(Message(b"x"), 20).header == b"x"
                time.sleep(0.1)
            assert time.process_time() - cpu < 0.5
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in waiting:
            each.settimeout(20)
            assert each.recv(100)[HEAD.size :].startswith(channel._MAGIC)
            each.close()
        assert caplog.text.count("nobody can connect now") == 1


def test_no_memory_for_what_one_sends_hurts_nobody_else(monkeypatch):
    read = channel.Channel._read_message

    def fail(self, data, *args):
        if b"too much" in data:
            raise MemoryError
        return read(self, data, *args)

    monkeypatch.setattr(channel.Channel, "_read_message", fail)
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint)
        stranger.send(record(header=b"too much"))
        assert stranger.refused()
        assert serving.endpoint.counts == {"MemoryError": 1}
        assert serving.requester.call(Message(b"x"), 20).header == b"x"


def test_memory_with_holes_is_not_filled_before_it_is_read():
    with Serving(echo) as serving:
        stranger = Stranger(serving.endpoint)
        fd = sealed(1 << 40)
        stranger.send_segment(fd, 1 << 40)
        stranger.send(record([(1, 1, (1 << 40) - 4096, 4096)]))
        assert stranger.socket.recv(1 << 16)[0] == MESSAGE
        assert os.fstat(fd).st_blocks * 512 <= 1 << 16
        os.close(fd)
        stranger.socket.close()


def test_refusals_are_logged_once_for_each_reason(caplog):
    with Serving(echo) as serving:
        for _ in range(5):
            assert Stranger(serving.endpoint, hello=b"garbage, and long enough").refused()
        wait_until(lambda: serving.endpoint.counts == {"Malformed": 5})
        told = [each for each in caplog.records if each.levelname == "WARNING"]
        assert len(told) == 1
        assert f"refused process {os.getpid()}" in told[0].getMessage()


# Waiting ----------------------------------------------------------------------------------


class Socket:
    """Something to look at: ready after so many seconds."""

    def __init__(self):
        self.looks = []

    def after(self, seconds):
        self._ready = time.perf_counter() + seconds
        self.looks = []
        return self

    def __call__(self, timeout):
        self.looks.append(timeout)
        left = self._ready - time.perf_counter()
        if left <= 0:
            return [1]
        if timeout:
            time.sleep(min(left, timeout))
            return [1] if timeout >= left else []
        return []

    @property
    def polled(self):
        return self.looks.count(0)


def test_what_comes_late_is_slept_for():
    waiter, sock = Waiter(), Socket()
    for _ in range(5):
        assert waiter.wait(sock.after(5e-3), 1.0)
        assert sock.polled == 0


def test_what_comes_soon_is_polled_for_from_the_second_time_on():
    waiter, sock = Waiter(), Socket()
    assert waiter.wait(sock.after(0), 1.0)
    assert sock.looks == [1.0]
    assert waiter.wait(sock.after(0), 1.0)
    assert sock.looks == [0]


def test_polling_that_does_not_pay_ends_and_is_tried_ever_more_rarely():
    waiter, sock = Waiter(), Socket()
    tried = []
    for _ in range(6):
        rested = 0
        while waiter.wait(sock.after(0), 1.0) and sock.looks != [0]:
            rested += 1  # what would have paid is slept for all the same
        tried.append(rested)
        for _ in range(10):
            waiter.wait(sock.after(2e-3), 1.0)
        assert sock.polled == 0
    assert tried == sorted(tried)
    assert tried[-1] > 4 * (tried[1] + 1)


def test_a_wait_keeps_its_deadline_while_it_polls():
    waiter, sock = Waiter(), Socket()
    waiter.wait(sock.after(0), 1.0)
    assert waiter.wait(sock.after(9), 0.0) == []
    assert waiter.wait(sock.after(9), 1e-4) == []


# Fork -------------------------------------------------------------------------------------


FORK = """
import os, sys
from edgeml.core import Closed, Message, Url, load_transport

def say(line):  # in one write, for two processes speak
    os.write(1, line.encode() + b"\\n")

requester = load_transport("shm").connect(Url.parse(sys.argv[1]), 5)
requester.call(Message(b""), 20)
if not os.fork():
    try:
        requester.call(Message(b""), 1)
    except Closed as error:
        say(f"child: {error}")
    sys.stdin.read()  # it lives on
    os._exit(0)
say(requester.call(Message(b"parent"), 20).header.decode())
requester.close()
say("closed")
sys.stdin.read()
os.wait()
"""


def test_a_forked_child_has_no_connection_and_keeps_none_open():
    with SHM.serve(ANY, echo) as endpoint:
        program = subprocess.Popen(
            [sys.executable, "-u", "-c", FORK, str(endpoint.url)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with program:
            lines = {program.stdout.readline().strip()[:20] for _ in range(3)}
            assert lines == {"child: the connectio", "parent", "closed"}
            wait_until(lambda: not endpoint._reactor.channels)
            program.stdin.close()
        assert program.returncode == 0


def test_no_memory_is_left_mapped_once_all_is_closed():
    gc.collect()
    before = mapped()
    with Serving(echo) as serving:
        for size in (1000, 100_000, 3 * MB, 20 * MB):
            serving.requester.call(Message(b"", [view(size)]), 20)
            serving.requester.request(Message(b"", [view(size)])).result(20)
        assert len(mapped()) > len(before)
    wait_until(lambda: mapped() == before)
