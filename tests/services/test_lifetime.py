"""What becomes of servers and clients that nobody has any more, or that somebody would pickle."""

import asyncio
import contextlib
import gc
import os
import pickle
import threading
import warnings
from dataclasses import replace

import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    InferenceClient,
    InferenceServer,
    PermissionDenied,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
)
from edgeml.data import QueuedDataStore
from pairs import free_port, started, threads, wait_until

ACTION = ActionConfig(0, ["move"], ["cam"])
TRAINER = TrainerConfig(0, None, ["stats"])


def action_server(transport):
    config = replace(ACTION, transport=transport)
    return ActionServer(config, lambda keys: {"cam": 1}, lambda key, payload: {})


def inference_server(transport):
    server = InferenceServer(0, transport=transport)
    server.register_interface("echo", lambda payload: payload)
    return server


def trainer_server(transport):
    server = TrainerServer(replace(TRAINER, transport=transport))
    server.register_data_store("actor", QueuedDataStore(10))
    return server


def action_client(url):
    client = ActionClient("", config=ACTION, transport=url)
    client.obs()
    client.register_obs_callback(lambda value: None)
    return client


def inference_client(url):
    client = InferenceClient("", 0, transport=url)
    client.call("echo", 1)
    client.call_async("echo", 1).result(20)
    return client


def trainer_client(url):
    store = QueuedDataStore(10)
    client = TrainerClient("actor", "", TRAINER, store, transport=url)
    store.insert({"x": 1.0})
    client.update()
    client.recv_network_callback(lambda value: None)
    return client


PAIRS = [
    (action_server, action_client),
    (inference_server, inference_client),
    (trainer_server, trainer_client),
]


@pytest.fixture(autouse=True)
def _only_what_the_test_makes_is_collected():
    """Else each collection looks at all that other tests have loaded, and holds up everybody."""
    gc.collect()
    gc.freeze()  # for good, as conftest.py did with what was there before the first test


def drop(kept):
    """Let go of what a list has, and see that there is a warning."""

    def let_go():
        kept.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match=r"was dropped without stop\(\)"):
        let_go()


def our_threads():
    """Those of edgeml: gRPC ends that of a connection which stays, and starts another."""
    return {thread for thread in threads() if thread.name.startswith("edgeml")}


@contextlib.contextmanager
def nothing_left():
    """Check that neither thread nor file descriptor outlives the block."""
    before, files = len(our_threads()), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    # Not which they are: a client that stays connects anew where a busy machine has held it up.
    wait_until(lambda: len(our_threads()) <= before, timeout=30)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files + 2, timeout=30)


@pytest.mark.parametrize(("serve", "connect"), PAIRS, ids=["action", "inference", "trainer"])
def test_a_client_that_is_dropped_is_closed_with_a_warning(transport, serve, connect):
    with started(serve(transport)) as server, connect(server.url):
        with nothing_left():
            for _ in range(5):
                drop([connect(server.url)])
        # The rest took too long to part on a busy machine, and will be taken to be gone.
        wait_until(lambda: len(server.clients()) == 1, timeout=20)


@pytest.mark.parametrize(("serve", "connect"), PAIRS, ids=["action", "inference", "trainer"])
def test_a_server_that_is_dropped_is_closed_with_a_warning(transport, serve, connect):
    with started(serve(transport)) as once, connect(once.url):
        pass  # what a library keeps is there from now on
    with nothing_left():
        for _ in range(3):
            server = serve(transport)
            server.start(threaded=True)
            with connect(server.url):
                kept = [server]
                del server
                drop(kept)


@pytest.mark.parametrize(("serve", "connect"), PAIRS, ids=["action", "inference", "trainer"])
def test_what_is_stopped_or_never_started_is_dropped_without_a_word(transport, serve, connect):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve(transport)
        server = serve(transport)
        server.start(threaded=True)
        client = connect(server.url)
        client.stop()
        server.stop()
        del client, server
        gc.collect()


@pytest.mark.parametrize(("serve", "connect"), PAIRS, ids=["action", "inference", "trainer"])
def test_what_would_be_pickled_says_to_make_it_where_it_is_used(serve, connect):
    with started(serve("zmq")) as server, connect(server.url) as client:
        for each in (server, client):
            with pytest.raises(TypeError, match="make it in the process that uses it"):
                pickle.dumps(each)


def test_a_server_tells_where_others_reach_it():
    for advertise, expected in [
        ("robot.example", "zmq://robot.example:{port}"),
        ("robot.example:80", "zmq://robot.example:80"),
        ("[fe80::1]:80", "zmq://[fe80::1]:80"),
        ("zmq://robot.example", "zmq://robot.example:{port}"),
        ("grpc://robot.example:80", "zmq://127.0.0.1:{port}"),
        ("grpc://a:80, zmq://b:90", "zmq://b:90"),
    ]:
        port = free_port()
        with started(InferenceServer(port, transport="zmq", advertise=advertise)) as server:
            assert server.url == server.urls()[0] == expected.format(port=port)
    with started(InferenceServer(0, "0.0.0.0", transport="zmq")) as server:
        assert "0.0.0.0" not in server.url
        with InferenceClient("", 0, transport=server.url) as client:
            assert client.interfaces() == []


class Relay:
    """What a NAT does for one port of TCP, in a thread."""

    def __init__(self) -> None:
        self.leads_to = 0
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._listener = self._loop.run_until_complete(
            asyncio.start_server(self._join, "127.0.0.1", 0)
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)

    async def _join(self, reader, writer) -> None:
        self.connections += 1
        there_reader, there = await asyncio.open_connection("127.0.0.1", self.leads_to)
        await asyncio.gather(self._pass(reader, there), self._pass(there_reader, writer))

    @staticmethod
    async def _pass(reader, writer) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._listener.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


def test_each_port_of_a_server_may_be_reached_at_another():
    ports = {letter: free_port() for letter in "ZSG"}
    both = "zmq://127.0.0.1:{Z},shm://127.0.0.1:{S},grpc://127.0.0.1:{G}".format(**ports)
    for advertise, expected in [
        ("gpu", ["zmq://gpu:Z", "shm://gpu:S", "grpc://gpu:G"]),
        ("gpu:80", ["zmq://gpu:80", "shm://gpu:S", "grpc://gpu:G"]),
        ("zmq://gpu:80,grpc://gpu:81", ["zmq://gpu:80", "shm://127.0.0.1:S", "grpc://gpu:81"]),
        ("gpu,grpc://door:81", ["zmq://gpu:Z", "shm://gpu:S", "grpc://door:81"]),
        ("shm:///run/there", ["zmq://127.0.0.1:Z", "shm:///run/there", "grpc://127.0.0.1:G"]),
    ]:
        with started(InferenceServer(url=both, advertise=advertise)) as server:
            assert server.urls() == [
                each[:-1] + str(ports.get(each[-1], each[-1])) for each in expected
            ]
    for wrong in (":80", "zmq://:80", "a:b"):
        with pytest.raises(ValueError, match=r"advertise=|Port could not"):
            InferenceServer(0, advertise=wrong)


@pytest.mark.parametrize("transport", ["grpc", "ws", "zmq"])
def test_a_server_behind_nat_is_reached_where_it_says(transport):
    relay = Relay()
    port = relay.leads_to = free_port()
    server = InferenceServer(port, transport=transport, advertise=f"127.0.0.1:{relay.port}")
    server.register_interface("double", lambda payload: 2 * payload)
    with relay, started(server):
        for url in (server.url, [server.url]):
            with InferenceClient(url=url) as client:
                assert client.call("double", 4) == 8
        assert relay.connections


@pytest.mark.parametrize("given", [object(), False, {}])
def test_what_is_no_credentials_lets_nobody_run_code_from_afar(given):
    with pytest.raises(TypeError, match="edgeml keygen"):
        InferenceServer(0, "0.0.0.0", codecs=["cloudpickle"], credentials=given)


@pytest.mark.parametrize("transport", ["grpc", "ws", "zmq"])
@pytest.mark.parametrize(
    "where",
    [
        {"port_num": 0, "host": "", "transport": "{}"},
        *({"url": f"{{}}://{at}"} for at in ("0.0.0.0:0", "0.0.0.0:0/x", "[::]:0", "[::]:0/x")),
    ],
    ids=lambda where: where.get("url", "no host"),
)
def test_no_spelling_of_an_address_lets_everybody_run_code(transport, where):
    """It is what was bound that decides."""
    where = {k: v.format(transport) if isinstance(v, str) else v for k, v in where.items()}

    def serve():
        with InferenceServer(**where, codecs=["cloudpickle"]) as server:
            server.start(threaded=True)

    with pytest.raises((PermissionDenied, ValueError)):
        serve()
