"""What becomes of servers and clients that nobody has any more, or that somebody would pickle."""

import contextlib
import gc
import os
import pickle
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
from pairs import started, threads, wait_until

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
    ]:
        with started(InferenceServer(0, transport="zmq", advertise=advertise)) as server:
            assert server.url == server.urls()[0]
            assert server.url.startswith(expected.partition("{")[0])
    with started(InferenceServer(0, "0.0.0.0", transport="zmq")) as server:
        assert "0.0.0.0" not in server.url
        with InferenceClient("", 0, transport=server.url) as client:
            assert client.interfaces() == []


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
