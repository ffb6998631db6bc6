"""The states of a server: loading with progress, warm, ready, and drained without losing a call."""

from __future__ import annotations

import signal
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Closed,
    DeadlineExceeded,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    NotReady,
    ServerState,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.client import Client
from edgeml.data import QueuedDataStore
from edgeml.services.batching import Batching
from pairs import free_port, know_of_the_end, no_thread_left, process, started, took, wait_until

PATIENCE = 20.0
NETWORKS = ["grpc", "shm", "ws", "zmq"]  # which lead to other processes


class Load:
    """Something to be loaded, which says when it has begun and ends when it is told to."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.thread = 0

    def __call__(self, report) -> None:
        self.thread = threading.get_ident()
        report(0.25, "layer 6 of 24")
        self.began.set()
        while not self.go_on.wait(0.01):
            report(0.25, "layer 6 of 24")


@contextmanager
def loading(server, load=None):
    """Run a server that is loading; let it go on at the end."""
    load = load or Load()
    server.load(load)
    with started(server):
        try:
            assert load.began.wait(PATIENCE)
            yield load
        finally:
            load.go_on.set()


def new_server(transport, **settings) -> InferenceServer:
    server = InferenceServer(0, transport=transport, **settings)
    server.register_interface("echo", lambda payload: payload)
    server.register_interface("thread", lambda _: threading.get_ident())
    return server


def client_of(server, transport, **settings) -> InferenceClient:
    return InferenceClient("127.0.0.1", server.port, transport, **settings)


# Loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_a_client_that_comes_while_a_server_loads_learns_so_and_how_far_it_is(transport, workers):
    server = new_server(transport, workers=workers)
    assert server.state() == ServerState("starting", 0.0, "")
    with loading(server) as load:
        assert server.state() == ServerState("loading", 0.25, "layer 6 of 24")
        with client_of(server, transport) as client:
            assert client.state() == ServerState("loading", 0.25, "layer 6 of 24")
            with pytest.raises(NotReady, match=r"25% done: layer 6 of 24.*wait_for_server"):
                client.call("echo", 1)
            with pytest.raises(NotReady):
                client.call_async("echo", 1).result(PATIENCE)
            load.go_on.set()
            wait_until(lambda: client.state().state == "ready")
            assert client.state() == server.state() == ServerState("ready", 1.0, "")
            assert client.call("echo", 1) == 1
            if workers == 1:
                assert client.call("thread", None) == load.thread
    assert server.state().state == "stopped"


def test_every_pair_tells_that_it_is_loading(transport):
    config = ActionConfig(0, ["move"], ["cam"], transport=transport)
    server = ActionServer(config, lambda keys: {"cam": 5}, lambda key, payload: payload)
    with loading(server) as load, ActionClient(url=server.url, config=config) as client:
        assert client.state().state == "loading"
        with pytest.raises(NotReady):
            client.obs()
        with pytest.raises(NotReady):
            client.act("move", 1)
        seen = []
        client.register_obs_callback(seen.append)
        server.publish_obs({"cam": 1})  # which is no call
        wait_until(lambda: seen == [{"cam": 1}])
        load.go_on.set()
        wait_until(lambda: client.state().state == "ready")
        assert client.obs() == {"cam": 5}
    learner = TrainerServer(TrainerConfig(0, broadcast_port=None, transport=transport))
    with loading(learner) as load:
        settings = TrainerConfig(learner.port, broadcast_port=None, transport=transport)
        store, kept = QueuedDataStore(10), QueuedDataStore(10)
        learner.register_data_store("actor", kept)
        with TrainerClient("actor", "127.0.0.1", settings, store) as client:
            assert client.state().state == "loading"
            store.insert({"step": 1})
            with pytest.raises(NotReady):
                client.update()
            load.go_on.set()
            wait_until(lambda: client.state().state == "ready")
            client.update()  # nothing was lost
            assert kept.latest_data_id() == 1


def test_several_loads_run_one_after_the_other_and_share_the_progress(transport):
    server = new_server(transport)
    seen = []

    @server.load
    def first(report):
        report(0.5, "half of the first")
        seen.append(server.state())
        report(7, "more than all")
        seen.append(server.state())

    server.load(lambda report: seen.append(server.state()))
    with started(server):
        wait_until(lambda: server.state().state == "ready")
    assert seen == [
        ServerState("loading", 0.25, "half of the first"),
        ServerState("loading", 0.5, "more than all"),
        ServerState("loading", 0.5, ""),
    ]
    with pytest.raises(RuntimeError, match="started"):
        server.load(lambda report: None)


def test_wait_for_server_waits_until_it_is_ready(transport):
    server = new_server(transport)
    with loading(server) as load, ThreadPoolExecutor(1) as pool:
        made = pool.submit(client_of, server, transport, wait_for_server=PATIENCE)
        wait_until(lambda: server.clients())
        assert not made.done()
        load.go_on.set()
        with made.result(PATIENCE) as client:
            assert client.call("echo", 1) == 1
    assert server.stats().get("NotReady", 0) == 0


def test_wait_for_server_ends_at_its_time_and_says_how_far_the_server_is(transport):
    server = new_server(transport)
    with loading(server):
        with (
            took(at_least=0.3, at_most=2.0),
            pytest.raises(NotReady, match="loading, 25% done: layer 6 of 24"),
        ):
            client_of(server, transport, wait_for_server=0.3)
        wait_until(lambda: not server.clients())  # and it has said goodbye


def test_a_load_that_fails_stops_the_server_and_those_who_wait_are_told(transport, caplog):
    server = new_server(transport)
    go_on = threading.Event()

    @server.load
    def load(report):
        assert go_on.wait(PATIENCE)
        raise OSError("no such file: weights.bin")

    with no_thread_left(), started(server), ThreadPoolExecutor(1) as pool:
        made = pool.submit(client_of, server, transport, wait_for_server=2.0)
        wait_until(lambda: server.clients())
        go_on.set()
        with pytest.raises((Unreachable, Closed)):
            made.result(PATIENCE)
        wait_until(lambda: server.state().state == "stopped")
        assert "weights.bin" in server.state().detail
    assert "weights.bin" in caplog.text


@pytest.mark.parametrize("known", [NotReady, Unreachable])
def test_who_waits_in_vain_is_told_what_was_known_where_the_last_answer_had_no_time(
    known, monkeypatch
):
    def state(client, timeout):
        if not timeout:
            raise DeadlineExceeded("no answer within 0 s")
        if known is Unreachable:
            raise Unreachable("it has gone")
        return ServerState("loading")

    monkeypatch.setattr(Client, "state", state)
    with started(new_server("inproc")) as server, pytest.raises(known):
        client_of(server, "inproc", wait_for_server=0.2)


def test_a_load_that_fails_is_what_start_raises(transport):
    server = new_server(transport)

    @server.load
    def load(report):
        raise OSError("no such file: weights.bin")

    with no_thread_left(), pytest.raises(OSError, match=r"weights\.bin"):
        server.start()


def test_a_server_that_is_stopped_while_it_loads_ends_at_the_next_report(transport):
    server = new_server(transport)
    load = Load()
    server.load(load)
    with no_thread_left():
        server.start(threaded=True)
        assert load.began.wait(PATIENCE)
        with client_of(server, transport), took(at_most=2.0):
            server.stop()
        wait_until(lambda: server.state().state == "stopped")


def test_ctrl_c_while_a_server_loads_ends_it_quietly(transport):
    source = f"""
        import time
        import edgeml

        server = edgeml.InferenceServer(0, transport={transport!r})

        @server.load
        def load(report):
            print("loading", flush=True)
            time.sleep(60)

        server.start()
        print("ended", flush=True)
    """
    with process(textwrap.dedent(source)) as child:
        assert child.line() == "loading"
        child.signal(signal.SIGINT)
        assert child.line() == "ended"
        assert child.end() == (0, "")


@pytest.mark.parametrize("transport", NETWORKS)
def test_ctrl_c_ends_a_server_also_where_python_drops_the_exception(transport):
    """As where pyzmq frees a frame, and looks for signals."""
    source = f"""
        import signal
        import edgeml

        class Lost:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        server = edgeml.InferenceServer(0, transport={transport!r})

        @server.register_interface("lose")
        def lose(payload):
            Lost()
            return payload

        server.load(lambda report: print(server.url, flush=True))
        server.start()
        print("ended", flush=True)
    """
    with process(textwrap.dedent(source)) as child:
        with InferenceClient(url=child.line(), wait_for_server=PATIENCE) as client:
            assert client.call("lose", 1) == 1
            wait_until(lambda: child.popen.poll() is not None)
        assert child.line() == "ended"
        code, err = child.end()
        assert code == 0
        assert "Exception ignored in" in err


# Warm-up ----------------------------------------------------------------------------------


def test_a_server_is_warm_before_it_is_ready(transport):
    sizes, payloads, ends = [], [], []
    server = new_server(transport)

    @server.register_interface("policy", batching=Batching(max_size=4))
    def policy(batch):
        sizes.append(len(batch["x"]))
        return batch["x"]

    @server.register_interface("told")
    def told(payload, context):
        payloads.append(payload)
        context.on_end(lambda: ends.append(payload))

    server.warmup("policy", {"x": 1.0})
    server.warmup("told", "an example")
    assert not sizes  # it begins with the start
    with started(server), client_of(server, transport, wait_for_server=PATIENCE) as client:
        assert set(sizes) == {1, 2, 4}
        assert payloads == ends == ["an example"]
        assert client.call("policy", {"x": 2.0}) == 2.0
        server.warmup("told", "another")  # at once
        assert payloads == ends == ["an example", "another"]
        server.register_interface("fails", lambda payload: 1 / payload)
        with pytest.raises(ZeroDivisionError):
            server.warmup("fails", 0)
        with pytest.raises(UnknownInterface, match="policy"):
            server.warmup("polcy", None)
        assert server.state().state == "ready"
    with pytest.raises(Closed):
        server.warmup("told", "too late")


# Draining ---------------------------------------------------------------------------------


class Gate:
    """A function that says when it is entered, and returns when it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, payload):
        self.entered.release()
        assert self.go_on.wait(PATIENCE)
        return payload


def is_refused(client, futures) -> bool:
    """Call once more; what is sent in the first moments may have been under way, and is taken."""
    future = client.call_async("gate", len(futures))
    if wait([future], 0.05).done:
        assert isinstance(future.exception(), NotReady)
        return True
    futures.append(future)
    return False


@pytest.mark.parametrize("batching", [None, Batching(max_size=4)], ids=["single", "batched"])
def test_draining_answers_what_is_under_way_and_what_waits_and_refuses_the_rest(
    transport, batching
):
    server = InferenceServer(0, transport=transport)
    gate = Gate()
    server.register_interface("gate", gate, batching=batching)
    with started(server), client_of(server, transport) as client, ThreadPoolExecutor(1) as pool:
        futures = [client.call_async("gate", n) for n in range(10)]
        assert gate.entered.acquire(timeout=PATIENCE)
        wait_until(lambda: server.stats()["calls"] + server.stats()["waiting"] == 10)  # all came
        drained = pool.submit(server.drain, PATIENCE)
        wait_until(lambda: server.state().state == "draining")
        assert client.state().state == "draining"
        with pytest.raises(NotReady, match="draining"):
            client_of(server, transport)
        wait_until(lambda: is_refused(client, futures))
        with pytest.raises(NotReady, match="draining"):
            client.call("gate", None)
        assert not drained.done()
        gate.go_on.set()
        assert [future.result(PATIENCE) for future in futures] == list(range(len(futures)))
        assert drained.result(PATIENCE)
        assert server.state().state == "stopped"


def test_draining_under_load_loses_no_call_that_was_taken(transport):
    """Each client calls until it is refused: of what was carried out nothing is without answer."""
    server = InferenceServer(0, transport=transport)
    done = []

    def work(payload):
        done.append(payload)
        return payload

    server.register_interface("work", work)
    go_on = threading.Event()

    def call(name: int) -> list[int]:
        answered, busy = [], False
        with client_of(server, transport) as client:
            for number in range(1_000_000):
                pending = [client.call_async("work", [name, number, part]) for part in range(4)]
                for future in pending:
                    try:
                        answered.append(future.result(PATIENCE))
                    except (NotReady, Closed, Unreachable) as error:
                        refused = error
                    else:
                        refused = None
                if not busy and len(answered) > 20:
                    busy = True
                    ready.release()  # once: one client may be so quick that others have not come
                if refused:
                    assert go_on.is_set()
                    return answered
        raise AssertionError

    ready = threading.Semaphore(0)
    with started(server), ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(call, name) for name in range(8)]
        for _ in callers:
            assert ready.acquire(timeout=PATIENCE)
        go_on.set()
        assert server.drain(PATIENCE)
        answered = [each for caller in callers for each in caller.result(PATIENCE)]
    assert sorted(answered) == sorted(done)


@pytest.mark.parametrize("end", ["time", "stop"])
def test_draining_gives_up_at_its_time_and_is_ended_by_a_stop(transport, end, monkeypatch):
    monkeypatch.setattr("edgeml.core.dispatch._GRACE", 0.2)  # for the handler that is held
    server = InferenceServer(0, transport=transport)
    gate = Gate()
    server.register_interface("gate", gate)
    with started(server), client_of(server, transport) as client, ThreadPoolExecutor(1) as pool:
        futures = [client.call_async("gate", n) for n in range(2)]
        assert gate.entered.acquire(timeout=PATIENCE)
        drained = pool.submit(server.drain, 0.2 if end == "time" else 60.0)
        wait_until(lambda: server.state().state != "ready")
        if end == "stop":
            server.stop()
        assert drained.result(PATIENCE) is False
        gate.go_on.set()
        with pytest.raises(EdgemlError):
            futures[1].result(PATIENCE)


def test_who_waits_for_a_server_while_one_drains_gets_the_next(transport):
    gate, port = Gate(), free_port()
    first = InferenceServer(port, transport=transport)
    first.register_interface("gate", gate)
    with started(first), client_of(first, transport) as client, ThreadPoolExecutor(2) as pool:
        under_way = client.call_async("gate", "first")
        assert gate.entered.acquire(timeout=PATIENCE)
        drained = pool.submit(first.drain, PATIENCE)
        wait_until(lambda: first.state().state == "draining")
        made = pool.submit(client_of, first, transport, wait_for_server=PATIENCE)
        wait_until(lambda: first.stats().get("NotReady"))
        gate.go_on.set()
        assert under_way.result(PATIENCE) == "first"
        assert drained.result(PATIENCE)
        know_of_the_end(client)
        second = InferenceServer(port, transport=transport)
        second.register_interface("which", lambda _: "second")
        with started(second), made.result(PATIENCE) as waited:
            assert waited.call("which", None) == "second"
            assert client.call("which", None) == "second"


def test_draining_may_begin_in_a_handler_and_its_call_is_answered(transport):
    server = InferenceServer(0, transport=transport)
    server.register_interface("drain", lambda _: server.drain(PATIENCE))
    with started(server), client_of(server, transport) as client:
        assert client.call("drain", None) is False
        wait_until(lambda: server.state().state == "stopped")


def test_draining_an_idle_server_is_quick_and_stops_it_once_and_for_all(transport):
    server = InferenceServer(0, transport=transport)
    with no_thread_left(), started(server), client_of(server, transport):
        with took(at_most=2.0):
            assert server.drain()
        assert server.drain()
        assert server.state().state == "stopped"
    assert InferenceServer(0, transport=transport).drain()  # which was never started


@pytest.mark.parametrize("transport", NETWORKS)
def test_a_signals_handler_may_drain_a_server_that_blocks_the_main_thread(transport):
    source = f"""
        import signal
        import time
        import edgeml

        server = edgeml.InferenceServer(0, transport={transport!r})

        @server.register_interface("slow")
        def slow(payload):
            time.sleep(0.3)
            return payload

        @server.load
        def load(report):
            signal.signal(signal.SIGTERM, lambda *_: server.drain())
            print(server.url, flush=True)

        server.start()
        print("ended", flush=True)
    """
    with process(textwrap.dedent(source)) as child:
        with InferenceClient(url=child.line(), wait_for_server=PATIENCE) as client:
            futures = [client.call_async("slow", n) for n in range(3)]
            assert futures[0].result(PATIENCE) == 0
            child.signal(signal.SIGTERM)
            assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]
        assert child.line() == "ended"
        assert child.end() == (0, "")
