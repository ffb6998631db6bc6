"""No call of a client outlives its deadline, whatever it waits for; and so it is with its end."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

import edgeml
from edgeml.core import Closed, DeadlineExceeded, EdgemlError, Unreachable, Url
from edgeml.core import session as core_session
from edgeml.core.client import Client
from edgeml.core.errors import NotReady
from edgeml.core.plugins import load_transport
from edgeml.data import QueuedDataStore
from edgeml.testing.deadlines import SILENT, interrupted, no_answer
from pairs import TRANSPORTS, plain_client, process, started, took, wait_until

LATE = 1.0  # seconds beyond its deadline: what fails takes several
ACTION = edgeml.ActionConfig(0, action_keys=["grip"], observation_keys=["state"])
TRAINER = edgeml.TrainerConfig(0, None, request_types=["ask"])
SERVERS = """
import sys
import threading
import edgeml
from edgeml.data import QueuedDataStore

transport = sys.argv[1]
config = edgeml.ActionConfig(0, action_keys=["grip"], observation_keys=["state"])
robot = edgeml.ActionServer(
    config, lambda keys: {"state": 1}, lambda key, payload: {}, url=f"{transport}://127.0.0.1:0"
)
policy = edgeml.InferenceServer(url=f"{transport}://127.0.0.1:0")
policy.register_interface("policy", lambda observation: observation)
learner = edgeml.TrainerServer(
    edgeml.TrainerConfig(0, None, request_types=["ask"]),
    request_callback=lambda kind, payload: payload,
    url=f"{transport}://127.0.0.1:0",
)
learner.register_data_store("actor", QueuedDataStore(1000))
for each in (robot, policy, learner):
    each.start(threaded=True)
    print(each.url, flush=True)
threading.Event().wait()
"""


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
def servers(transport):
    """The three servers, in a process that can be frozen; and where they are."""
    if transport == "inproc":
        pytest.skip("it stays within one process")
    with process(SERVERS, transport) as made:
        yield made, [made.line() for _ in range(3)]
        made.popen.send_signal(signal.SIGCONT)


@pytest.fixture
def mute(transport):
    """Where somebody listens by the transport's rules, and never answers anything."""
    kept = []
    with load_transport(transport).serve(
        Url(transport), lambda message, reply: kept.append(reply)
    ) as endpoint:
        yield endpoint.url


@pytest.mark.parametrize("settings", [{"timeout": 0.6}, {"timeout": 10.0, "wait": 0.6}])
def test_a_hello_that_is_never_answered(mute, settings):
    with took(0.6 + LATE), pytest.raises(Unreachable):
        Client("inference", [mute], **settings)


def test_several_addresses_share_the_deadline(mute):
    with took(0.6 + LATE), pytest.raises(Unreachable):
        Client("inference", [mute] * 3, timeout=0.6)


def test_a_connection_that_comes_late_leaves_the_hello_what_is_left(monkeypatch, mute):
    real = load_transport(mute.scheme)

    class Late:
        def connect(self, url, timeout, credentials):
            made = real.connect(url, timeout)
            time.sleep(0.8 * timeout)
            return made

    monkeypatch.setattr(core_session, "load_transport", lambda name: Late())
    with took(1.0 + LATE), pytest.raises(Unreachable):
        Client("inference", [mute], timeout=1.0)


def test_a_server_that_is_never_ready(transport):
    loading = threading.Event()
    server = edgeml.InferenceServer(url=f"{transport}://127.0.0.1:0")
    server.load(lambda progress: loading.wait(60))
    with started(server):
        with took(0.6 + LATE), pytest.raises(NotReady):
            edgeml.InferenceClient(url=server.url, timeout=10, wait_for_server=0.6)
        loading.set()


@pytest.mark.parametrize("ask", ["call", "call_async"])
def test_what_a_payload_takes_to_encode_is_counted(transport, ask, monkeypatch):
    server = edgeml.InferenceServer(url=f"{transport}://127.0.0.1:0")
    called = []
    server.register_interface("policy", called.append)
    with started(server), plain_client(server) as client:
        encoder = type(client.sessions.current.spoken.encoder)
        for name in ("encode", "encode_owned"):
            slow = _slowly(getattr(encoder, name), 0.5)
            monkeypatch.setattr(encoder, name, slow)
        with took(0.5 + LATE), pytest.raises(DeadlineExceeded):
            done(getattr(client, ask)("policy", {}, timeout=0.3))
        monkeypatch.undo()
        client.call("policy", "next")
        assert called[-1] == "next"
        assert len(called) == 1 or ask == "call_async"


def done(answer):
    return answer.result(10) if isinstance(answer, Future) else answer


def _slowly(function, seconds):
    def slow(*arguments, **settings):
        time.sleep(seconds)
        return function(*arguments, **settings)

    return slow


def calls_of(robot, policy, actor, store):
    """What the three clients can be asked, each with the seconds that it may take."""
    large = {"image": np.zeros(8 << 20, np.uint8)}

    def update(ask):
        store.insert({"x": np.zeros(100_000)})
        return done(ask(0.4))

    return [
        (0.4, lambda: robot.obs(timeout=0.4)),
        (0.4, lambda: robot.act("grip", {}, timeout=0.4)),
        (0.4, lambda: done(robot.obs_async(timeout=0.4))),
        (0.4, lambda: robot.state(0.4)),
        (0.4, lambda: policy.call("policy", large, timeout=0.4)),
        (0.4, lambda: policy.call("policy", 1, timeout=0.4, timing=True)),
        (0.4, lambda: done(policy.call_async("policy", large, timeout=0.4))),
        (2.0, policy.interfaces),
        (2.0, lambda: policy.contract("policy")),
        (0.4, lambda: policy.reset(timeout=0.4)),
        (0.4, lambda: update(actor.update)),
        (0.4, lambda: update(actor.update_async)),
        (0.4, lambda: actor.request("ask", 1, timeout=0.4)),
    ]


def test_no_call_to_a_server_that_is_frozen_outlives_its_deadline(servers):
    frozen, urls = servers
    store = QueuedDataStore(100)
    over = threading.Event()
    robot = edgeml.ActionClient(config=ACTION, url=urls[0], on_disconnect=over.set)
    policy = edgeml.InferenceClient(url=urls[1], timeout=2.0)
    actor = edgeml.TrainerClient("actor", config=TRAINER, url=urls[2], data_store=store)
    frozen.signal(signal.SIGSTOP)
    for _ in range(2):
        for seconds, call in calls_of(robot, policy, actor, store):
            with took(seconds + LATE), interrupted(0.1), pytest.raises(EdgemlError):
                call()
        assert over.wait(20)  # and now each call has to connect first
    for client in (robot, policy, actor):
        with took(1.0 + LATE):
            client.stop()


def test_no_constructor_outlives_its_deadline(servers, monkeypatch):
    frozen, urls = servers
    frozen.signal(signal.SIGSTOP)
    others = [str(Url.parse(url).with_host(SILENT)) for url in urls]
    with no_answer(monkeypatch):
        for url in [*urls, *others]:
            for settings in ({"timeout": 0.5}, {"wait_for_server": 0.5}):
                with took(0.5 + LATE), pytest.raises(Unreachable):
                    edgeml.InferenceClient(url=url, **settings)


def test_no_call_by_asyncio_outlives_its_deadline(servers):
    asyncio.run(_ask_by_asyncio(*servers))


async def _ask_by_asyncio(frozen, urls):
    robot = edgeml.aio.ActionClient(config=ACTION, url=urls[0])
    policy = edgeml.aio.InferenceClient(url=urls[1])
    actor = edgeml.aio.TrainerClient("actor", config=TRAINER, url=urls[2])
    for client in (robot, policy, actor):
        await client.connect()
    frozen.signal(signal.SIGSTOP)
    calls = [
        lambda: robot.obs(timeout=0.4),
        lambda: robot.act("grip", timeout=0.4),
        lambda: robot.state(0.4),
        lambda: policy.call("policy", 1, timeout=0.4),
        lambda: actor.request("ask", 1, timeout=0.4),
    ]
    for call in calls:
        with took(0.4 + LATE), pytest.raises(EdgemlError):
            await call()
    with took(0.4 + LATE), pytest.raises(Unreachable):
        await edgeml.aio.InferenceClient(url=urls[1], timeout=0.4).connect()
    for client in (robot, policy, actor):
        with took(1.0 + LATE):
            await client.stop()


def amid_update(url, in_background=0.0):
    """A client that has 40 MB to send to a server that is about to be frozen."""
    store = QueuedDataStore(100)
    client = edgeml.TrainerClient("actor", config=TRAINER, url=url, data_store=store, timeout=60)
    for _ in range(40):
        store.insert({"x": np.random.default_rng(0).bytes(1 << 20)})
    if in_background:
        client.start_async_update(in_background)
    return client


@pytest.mark.parametrize("in_background", [0.0, 60.0])
def test_stop_gives_up_what_another_thread_is_amid(servers, in_background):
    frozen, urls = servers
    client = amid_update(urls[2], in_background)
    frozen.signal(signal.SIGSTOP)
    failure = []

    def update():
        try:
            client.update(60)
        except EdgemlError as error:
            failure.append(error)

    thread = threading.Thread(target=update)
    thread.start()
    wait_until(client._updates._turn.locked)
    with took((2.0 if in_background else 0.0) + 1.0 + LATE):
        client.stop()
    with took(LATE):
        thread.join()
    assert isinstance(failure[0], (Closed, Unreachable))  # which is noticed in three seconds


def test_ctrl_c_amid_an_update_waits_for_nobody(servers):
    frozen, urls = servers
    client = amid_update(urls[2])
    frozen.signal(signal.SIGSTOP)
    when = []

    def interrupt():
        wait_until(lambda: client._updates._uploaders[0]._unsure)
        time.sleep(0.1)
        when.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.update(30)
    late = time.monotonic() - when[0]
    thread.join()
    assert late < 1.0
    with took(1.0 + LATE):
        client.stop()
    frozen.signal(signal.SIGCONT)


def test_stop_is_bounded_while_a_client_connects_anew(transport, mute):
    """Where there was a server and now nobody answers."""
    server = edgeml.InferenceServer(url=f"{transport}://127.0.0.1:0")
    with started(server), plain_client(server) as client:
        client.sessions._urls = [mute]
        server.stop()
        wait_until(lambda: client.sessions._attempt is not None)
        with took(1.0 + LATE):
            client.close()
