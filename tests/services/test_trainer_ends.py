"""However a program or a client ends, what it holds is sent, or it is told what is not."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgeml import Closed, EdgemlError, TrainerClient, TrainerConfig, TrainerServer, TrainerTunnel
from edgeml.core.message import pooled
from edgeml.data import QueuedDataStore
from pairs import no_thread_left, process, started, took, wait_until

NETWORKS = ["grpc", "shm", "ws", "zmq"]


@contextlib.contextmanager
def learner(transport, **kwargs):
    server = TrainerServer(TrainerConfig(0, None, transport=transport), **kwargs)
    server.register_data_store("arm", QueuedDataStore(1_000_000))
    with started(server):
        yield server


def arrived(server) -> int:
    return server.data_store("arm").latest_data_id()


def actor(server, store, **kwargs) -> TrainerClient:
    config = TrainerConfig(server.port, None, transport=server.url)
    return TrainerClient("arm", "127.0.0.1", config, store, **kwargs)


def filled(n: int) -> QueuedDataStore:
    store = QueuedDataStore(1_000_000)
    store.batch_insert([{"x": np.float32(k)} for k in range(n)])
    return store


# The program ------------------------------------------------------------------------------------

ACTOR = """
import signal, sys, time, threading
import numpy as np
from edgeml import TrainerClient, TrainerConfig
from edgeml.data import QueuedDataStore
store = QueuedDataStore(10_000)
client = TrainerClient("arm", "127.0.0.1", TrainerConfig(0, transport=sys.argv[1]), store)
{before}
client.start_async_update(interval=600)
for n in range(500):
    store.insert({{"n": n, "frame": np.zeros(20_000, np.uint8)}})
print("ready", flush=True)
{after}
"""


def actor_program(before: str = "", after: str = "time.sleep(60)") -> str:
    return ACTOR.format(before=before, after=after)


@pytest.mark.parametrize(
    ("transport", "number"),
    [
        *((name, signal.SIGTERM) for name in NETWORKS),
        ("zmq", signal.SIGHUP),
        ("zmq", signal.SIGINT),
    ],
)
def test_a_program_that_is_told_to_end_sends_what_it_holds(transport, number):
    with learner(transport) as server, process(actor_program(), server.url) as program:
        assert program.line() == "ready"
        program.signal(number)
        code, stderr = program.end()
        assert arrived(server) == 500
        assert code == -signal.SIGINT  # as a Ctrl-C that nobody catches
        assert "KeyboardInterrupt" in stderr


def test_it_goes_the_way_that_it_goes_for_ctrl_c():
    after = """
try:
    print("waiting", flush=True)
    time.sleep(60)
except KeyboardInterrupt as error:
    print(error)
finally:
    print("finally")
"""
    program = actor_program(after=after)
    with learner("zmq") as server, process(program, server.url) as running:
        assert [running.line(), running.line()] == ["ready", "waiting"]
        running.signal(signal.SIGTERM)
        assert [running.line(), running.line()] == ["SIGTERM", "finally"]
        assert running.end() == (0, "")
        assert arrived(server) == 500


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_that_the_program_has_set_is_left_alone(when):
    handler = """
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(print('mine', flush=True)))
"""
    after = "while not got: time.sleep(0.01)\nprint('on', flush=True)"
    if when == "before":
        program = actor_program(handler, after)
    else:
        program = actor_program("", f"{handler}print('set', flush=True)\n{after}")
    with learner("zmq") as server, process(program, server.url) as running:
        assert running.line() == "ready"
        if when == "after":
            assert running.line() == "set"
        running.signal(signal.SIGTERM)
        assert [running.line(), running.line()] == ["mine", "on"]
        assert running.end() == (0, "")
        assert arrived(server) == 500


def test_a_signal_that_the_program_ignores_is_ignored():
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    program = actor_program(ignore, "time.sleep(0.5)\nprint('on', flush=True)")
    with learner("zmq") as server, process(program, server.url) as running:
        assert running.line() == "ready"
        running.signal(signal.SIGHUP)
        assert running.line() == "on"
        assert running.end() == (0, "")


def test_signals_do_what_they_did_once_no_client_has_anything_to_send():
    after = "client.stop()\nprint(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)"
    program = actor_program(after=f"{after}\ntime.sleep(60)")
    with learner("zmq") as server, process(program, server.url) as running:
        assert [running.line(), running.line()] == ["ready", "True"]
        running.signal(signal.SIGTERM)
        assert running.end() == (-signal.SIGTERM, "")


def test_what_is_unsent_when_a_program_is_told_to_end_is_logged():
    with learner("zmq") as server, process(actor_program(), server.url) as program:
        assert program.line() == "ready"
        server.stop()
        program.signal(signal.SIGTERM)
        code, stderr = program.end()
        assert code == -signal.SIGINT
        assert "up to 500 items of 'arm' were not sent" in stderr
        assert "update() was not called" not in stderr


def test_a_forked_child_ends_by_a_signal_as_it_always_did_and_leaves_sending_to_its_parent():
    after = """
import multiprocessing, os
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
os.kill(child.pid, signal.SIGTERM)
child.join(10)
print(child.exitcode, flush=True)
if os.fork() == 0:
    sys.exit(0)
os.wait()
"""
    # grpc and zmq can't be forked without a word, and shm can.
    with learner("shm") as server, process(actor_program(after=after), server.url) as program:
        assert [program.line(), program.line()] == ["ready", str(-signal.SIGTERM)]
        assert program.end() == (0, "")
        assert arrived(server) == 500


def test_an_actor_that_is_a_child_process_sends_what_it_holds():
    program = """
import multiprocessing, sys
import numpy as np
from edgeml import TrainerClient, TrainerConfig
from edgeml.data import QueuedDataStore

def act(url):
    store = QueuedDataStore(1000)
    client = TrainerClient("arm", "127.0.0.1", TrainerConfig(0, transport=url), store)
    client.start_async_update(interval=600)
    for n in range(100):
        store.insert({"n": n})

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=act, args=(sys.argv[1],))
    child.start()
    child.join(20)
    print(child.exitcode, flush=True)
"""
    with learner("shm") as server, process(program, server.url) as running:
        assert running.line() == "0"
        running.end()
        assert arrived(server) == 100


# Python 3.12 starts no thread once it has begun to end the program, before any atexit function.
NO_THREADS = """
def refuse(*_):
    raise RuntimeError("can't create new thread at interpreter shutdown")

def shut_down(before=threading._shutdown):
    threading._start_new_thread = threading._start_joinable_thread = refuse
    before()

threading._shutdown = shut_down
"""


@pytest.mark.parametrize(
    ("transport", "end"),
    [
        *((name, "") for name in NETWORKS),
        ("zmq", "sys.exit(3)"),
        ("zmq", "1 / 0"),
        ("zmq", "signal.raise_signal(15)"),
    ],
)
def test_the_end_of_a_program_starts_no_thread(transport, end):
    program = actor_program(NO_THREADS, end)
    with learner(transport) as server, process(program, server.url) as running:
        assert running.line() == "ready"
        code, stderr = running.end()
        assert arrived(server) == 500, stderr
        assert "thread" not in stderr, stderr
        assert code == {"": 0, "sys.exit(3)": 3, "1 / 0": 1}.get(end, -signal.SIGINT)


@pytest.mark.parametrize("transport", NETWORKS)
def test_the_end_of_a_program_that_finds_no_learner_starts_no_thread_and_tells(transport):
    with learner(transport) as server:
        program = actor_program(NO_THREADS, "time.sleep(60)")
        with process(program, server.url) as running:
            assert running.line() == "ready"
            server.stop()
            running.signal(signal.SIGTERM)
            _, stderr = running.end()
            assert "up to 500 items of 'arm' were not sent" in stderr


# stop() -----------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    """The seconds that stopping may spend on what hasn't been sent."""
    monkeypatch.setattr("edgeml.services.trainer.updates._LAST_UPDATE", 0.3)
    return 0.3


@pytest.mark.parametrize("background", [True, False])
def test_stop_does_not_wait_for_an_update_of_another_thread(transport, background, caplog, soon):
    """One that has a lot to send, to a learner that takes its time."""
    with (
        no_thread_left(),
        learner(transport, data_callback=lambda *_: time.sleep(0.4)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        client = actor(server, filled(100_000))
        if background:
            client.start_async_update(60)
        update = pool.submit(client.update, 60)
        wait_until(lambda: arrived(server) > 0)
        with took(at_most=5.0):
            client.stop()
        with pytest.raises(EdgemlError):
            update.result(20)
        assert "were not sent" in caplog.text
        assert "update() was not called" not in caplog.text


def test_stop_ends_in_time_although_each_message_is_answered_in_time(transport, soon):
    with learner(transport, data_callback=lambda *_: time.sleep(soon / 3)) as server:
        client = actor(server, filled(100_000))
        client.start_async_update(60)
        with took(at_most=5.0):
            client.stop()


def test_two_threads_that_stop_a_client_both_find_it_sent(transport):
    with learner(transport, data_callback=lambda *_: time.sleep(0.2)) as server:
        client = actor(server, filled(100))
        client.start_async_update(60)
        start = threading.Barrier(2)

        def stop(_) -> int:
            start.wait()
            client.stop()
            return arrived(server)

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(stop, range(2))) == [100, 100]


def test_what_was_tried_and_failed_is_told_with_why_it_failed(transport, caplog):
    def unsent() -> str:
        return [r.getMessage() for r in caplog.records if "were not sent" in r.getMessage()][-1]

    with learner(transport) as server:
        store = filled(5)
        with actor(server, store) as client:
            client.update()
            store.insert({"x": np.float32(0)})
        assert unsent().endswith("update() was not called for them")
        with actor(server, store := filled(5)) as client:
            server.stop()
            with pytest.raises(EdgemlError) as caught:
                client.update(1)
        assert unsent().startswith("up to 5 items of 'arm'")
        assert unsent().endswith(f": {caught.value}")


def test_a_stopped_client_lets_go_of_its_store_and_updates_no_more(transport):
    with learner(transport) as server:
        client = actor(server, store := filled(5))
        assert store.allocate is not pooled
        client.stop()
        assert store.allocate is pooled
        with pytest.raises(Closed):
            client.update()


# Dropped ----------------------------------------------------------------------------------------


def told_to_close() -> pytest.WarningsRecorder:
    return pytest.warns(ResourceWarning, match="dropped without stop")


def test_a_client_that_is_dropped_is_closed_and_tells_what_it_has_not_sent(transport, caplog):
    with learner(transport) as server, no_thread_left():
        store = filled(5)
        client = actor(server, store)
        gone = weakref.ref(client)
        with told_to_close():
            del client
            gc.collect()
        assert gone() is None
        wait_until(lambda: "up to 5 items of 'arm' were not sent" in caplog.text)
        wait_until(lambda: store.allocate is pooled)


def test_a_client_that_is_dropped_while_it_updates_in_the_background_sends_the_rest(transport):
    with learner(transport) as server, no_thread_left():
        client = actor(server, store := filled(5))
        client.start_async_update(0.01)
        wait_until(lambda: arrived(server) == 5)  # its thread is amid its rounds
        client.stop()
        client = actor(server, store := filled(5))
        client.start_async_update(60)
        with told_to_close():
            del client
            gc.collect()
        wait_until(lambda: arrived(server) == 10)
        wait_until(lambda: len(store) == 0)


def test_a_server_that_is_dropped_is_closed(transport, caplog):
    server = TrainerServer(
        TrainerConfig(0, None, ["stats"], transport=transport), request_callback=lambda *_: 1
    )
    with no_thread_left():
        server.register_data_store("arm", store := QueuedDataStore(10))
        server.start(threaded=True)
        config = TrainerConfig(server.port, None, ["stats"], transport=server.url)
        with TrainerClient("arm", "", config, here := filled(3)) as client:
            client.update()
            assert client.request("stats") == 1
            gone = weakref.ref(server)
            with told_to_close():
                del server
                gc.collect()
            assert gone() is None

            def is_closed() -> bool:
                try:
                    client.request("stats", timeout=0.2)
                except EdgemlError:
                    return True
                return False

            wait_until(is_closed)
            assert len(store) == 3
            del here


def test_a_tunnel_that_is_dropped_is_closed():
    with no_thread_left():
        tunnel = TrainerTunnel()
        tunnel.recv_network_callback(print)
        gone = weakref.ref(tunnel)
        with told_to_close():
            del tunnel
            gc.collect()
        assert gone() is None


def test_nothing_is_said_of_a_client_that_had_nothing_to_send(transport, caplog):
    caplog.set_level(logging.WARNING, "edgeml")
    with learner(transport) as server:
        with actor(server, filled(3)) as client:
            client.update()
        with actor(server, QueuedDataStore(3)) as client:
            client.start_async_update(60)
    assert caplog.text == ""
