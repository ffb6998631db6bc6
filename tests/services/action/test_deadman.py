"""The dead-man switch: when commands stop, the device itself does what is safe."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import threading
import time
import traceback
import warnings

import pytest

from edgeml import ActionClient, ActionConfig, ActionServer, Closed, Executed, RemoteError, Stale
from edgeml.core.dispatch import LocalCall
from edgeml.services.action.gate import Gate
from edgeml.services.action.record import Record
from edgeml.services.action.stamps import Stamp, pack
from pairs import (
    TRANSPORTS,
    no_thread_left,
    plain_client,
    process,
    run_fresh,
    started,
    took,
    wait_until,
)

TICK = 0.02  # seconds, of a loop of 50 Hz
NAME = "edgeml safe action of 'arm'"


def config_of(transport, **kwargs) -> ActionConfig:
    return ActionConfig(0, ["arm", "base"], ["joints"], transport=transport, **kwargs)


class Safe:
    """A safe action that notes when it is called, and can be held up."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, key) -> None:
        self.keys.append(key)
        assert self.free.wait(30)


@pytest.fixture
def safe():
    made = Safe()
    yield made
    made.free.set()


def device_of(transport, safe, act=lambda key, payload: payload, timeout=0.1, **settings):
    config = config_of(transport, action_timeout=timeout, on_action_timeout=safe)
    return ActionServer(config, lambda keys: {"joints": 1.0}, act, **settings)


class Patient(ActionClient):
    """A client whose actions may take their time on the way, as on a busy machine."""

    def act(self, *what, **how):
        return super().act(*what, **{"valid": 30.0, **how})

    def act_async(self, *what, **how):
        return super().act_async(*what, **{"valid": 30.0, **how})


def client_of(server, transport, **settings) -> ActionClient:
    return Patient("127.0.0.1", server.port, config=config_of(transport), **settings)


def halts_of(server) -> list[Executed]:
    return [each for each in server.executed() if each.outcome == "halt"]


# When commands stop -----------------------------------------------------------------------------


def test_when_commands_stop_the_safe_action_is_called_once(transport, safe, caplog):
    with (
        started(device_of(transport, safe)) as server,
        client_of(server, transport) as client,
    ):
        client.act("arm", 1)
        wait_until(lambda: safe.keys)
        time.sleep(0.3)  # and it stays at that
        assert safe.keys == ["arm"]
        [halt] = halts_of(server)
        [done] = [each for each in server.executed() if each.outcome == "done"]
        assert (halt.key, halt.number, halt.client_id) == ("arm", 0, "")
        assert halt.at >= done.at + 0.1
        assert halt.age == pytest.approx(halt.at - done.at, abs=1e-5)
        assert server.stats()["halts"] == server.stats()["halts_of_arm"] == 1
        assert server.stats()["halts_of_base"] == 0
        with caplog.at_level(logging.WARNING):
            client.act("base", 2)
            assert client.stats()["halts"] == 0  # of that key it isn't told
            client.act("arm", 3)
        assert client.stats()["halts"] == 1
        assert "the device has called its safe action of 'arm'" in caplog.text
        wait_until(lambda: sorted(safe.keys) == ["arm", "arm", "base"])  # armed again by these
        with client_of(server, transport) as other:
            other.act("arm", 4)  # what was before doesn't concern it
            assert other.stats()["halts"] == 0


def test_while_commands_come_it_is_not_called(transport, safe):
    with (
        started(device_of(transport, safe, timeout=5.0)) as server,
        client_of(server, transport) as client,
    ):
        for n in range(100):
            client.act("arm", n)
        assert safe.keys == []
        assert server.stats()["halts"] == 0


def test_what_is_too_old_or_overtaken_keeps_nobody_alive(transport, safe):
    with started(device_of(transport, safe)) as server, plain_client(server) as plain:

        def send(number, age=0.0):
            stamp = Stamp(number, None, 0.0, age, None, None, None, None, 7)
            return plain.call("act", ["arm", number, pack(stamp)])

        send(5)
        refused = 0
        while not safe.keys:
            for number, age in ((4, 0.0), (6, 3.0)):
                with pytest.raises(Stale):
                    send(number, age)
                refused += 1
        assert halts_of(server)[0].age < 5.0
        assert refused >= 2


def test_a_device_without_a_timeout_has_no_such_thread(transport):
    with (
        no_thread_left(),
        started(ActionServer(config_of(transport), None, lambda key, n: n)) as server,
        client_of(server, transport) as client,
    ):
        client.act("arm", 1)
        assert not any("safe action" in thread.name for thread in threading.enumerate())
        assert "halts_of_arm" not in server.stats()


def test_a_thread_is_there_from_the_first_action_and_ends_with_the_server(transport, safe):
    def there() -> bool:
        return any(thread.name == NAME for thread in threading.enumerate())

    with no_thread_left():
        with started(device_of(transport, safe)) as server, client_of(server, transport) as client:
            client.obs()
            assert not there()
            client.act("arm", 1)
            assert there()
        assert not there()


def test_only_those_named_have_a_switch(transport, safe):
    with (
        started(device_of(transport, safe, timeout={"base": 0.1})) as server,
        client_of(server, transport) as client,
    ):
        client.act("arm", 1)
        client.act("base", 2)
        wait_until(lambda: safe.keys)
        assert safe.keys == ["base"]


# What can't hold it up --------------------------------------------------------------------------


def spin(until: float) -> None:
    """Compute in Python, and keep its lock as much as any code does."""
    while time.monotonic() < until:
        sum(range(2000))


def test_a_busy_handler_holds_it_up_by_less_than_a_tick(transport, safe):
    """Both handlers compute in Python, in a thread each."""
    best = 10.0

    def act(key, payload):
        if key == "base":
            spin(time.monotonic() + 0.3)

    server = device_of(transport, safe, act, timeout={"arm": 0.1}, workers=3)
    with (
        started(server),
        client_of(server, transport) as client,
        client_of(server, transport) as other,
    ):
        for n in range(1, 30):
            client.act("arm")
            busy = [each.act_async("base") for each in (client, other)]
            wait_until(lambda n=n: len(safe.keys) == n)
            best = min(best, halts_of(server)[-1].age - 0.1)
            for each in busy:
                each.result(20)
            if best < TICK:
                break
    assert 0 <= best < TICK


def test_an_action_that_hangs_holds_it_up_no_more(transport, safe):
    free, busy = threading.Event(), threading.Event()

    def act(key, payload):
        busy.set()
        assert free.wait(30)

    with (
        started(device_of(transport, safe, act)) as server,
        client_of(server, transport) as client,
    ):
        future = client.act_async("arm")
        assert busy.wait(20)
        wait_until(lambda: safe.keys)  # while it hangs
        assert [each.outcome for each in server.executed()] == ["running", "halt"]
        free.set()
        future.result(20)


def test_while_an_action_hangs_the_record_and_the_clock_are_told(transport, safe):
    """With one worker, whose thread it has."""
    free, busy = threading.Event(), threading.Event()
    got: list[Executed] = []

    def act(key, payload):
        busy.set()
        assert free.wait(30)

    with (
        started(device_of(transport, safe, act)) as server,
        client_of(server, transport) as client,
        plain_client(server) as plain,
    ):
        client.register_executed_callback(got.append)
        future = client.act_async("arm", timeout=60)
        assert busy.wait(20)
        wait_until(lambda: got)
        assert got[0].outcome == "halt"
        assert plain.call("clock", None) <= time.monotonic_ns()
        free.set()
        future.result(20)
        wait_until(lambda: len(got) == 2)
        assert got[1].outcome == "done"


def test_a_safe_action_that_hangs_holds_up_no_other_key(transport, safe):
    def halt(key):
        safe.keys.append(key)
        if key == "arm":
            assert safe.free.wait(30)

    safe.free.clear()
    with (
        started(device_of(transport, halt)) as server,
        client_of(server, transport) as client,
    ):
        client.act("arm")
        wait_until(lambda: safe.keys == ["arm"])
        client.act("base")
        wait_until(lambda: safe.keys == ["arm", "base"])
        safe.free.set()


def test_while_the_safe_action_runs_nothing_else_of_its_key_does(transport, safe):
    moved: list = []
    safe.free.clear()
    with (
        started(device_of(transport, safe, lambda key, n: moved.append(n))) as server,
        client_of(server, transport) as client,
    ):
        client.act("arm", 1)
        wait_until(lambda: safe.keys)
        with pytest.raises(Stale, match="safe action of 'arm' is just running"):
            client.act("arm", 2)
        safe.free.set()
        wait_until(lambda: halts_of(server)[0].took > 0)

        def goes_on() -> bool:
            try:
                client.act("arm", 3)
            except Stale:
                return False
            return True

        wait_until(goes_on)
        assert moved == [1, 3]


def test_a_safe_action_that_raises_is_logged_and_called_again(transport, caplog):
    def halt() -> None:
        raise SystemExit("no motor answers")

    with (
        started(device_of(transport, halt)) as server,
        client_of(server, transport) as client,
    ):
        for n in range(1, 3):
            client.act("arm", n)
            wait_until(lambda n=n: server.stats()["halts"] == n)
            wait_until(lambda n=n: caplog.text.count("the safe action of 'arm' failed") == n)
    assert "no motor answers" in caplog.text


def test_an_action_that_no_thread_can_watch_over_is_not_begun(transport, safe, monkeypatch):
    moved: list = []
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == NAME:
            raise RuntimeError("can't start new thread")
        start(thread)

    with (
        started(device_of(transport, safe, lambda key, n: moved.append(n))) as server,
        client_of(server, transport) as client,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RemoteError, match="can't start new thread"):
                client.act("arm", 1)
        assert server.executed() == []
        client.act("arm", 2)
        assert moved == [2]
        wait_until(lambda: safe.keys == ["arm"])


# Clients that die -------------------------------------------------------------------------------

ROBOT = """
import sys
from edgeml import ActionClient, ActionConfig
config = ActionConfig(int(sys.argv[2]), ["arm", "base"], ["joints"], transport=sys.argv[1])
client = ActionClient(config=config)
n = 0
while True:
    client.act("arm", n, timeout=60, valid=30)
    if n == 5:
        print("moving", flush=True)
    n += 1
"""
OTHERS = [each for each in TRANSPORTS if each != "inproc"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("transport", OTHERS)
def test_a_client_that_is_killed_or_frozen_is_noticed(transport, how, safe):
    with started(device_of(transport, safe, timeout=0.3)) as server:
        with process(ROBOT, transport, server.port) as robot:
            assert robot.line() == "moving"
            robot.signal(how)
            before = server.executed()[-1].index
            wait_until(lambda: server.executed()[-1].outcome == "halt")
            time.sleep(0.2)
            # Where the machine is busy that was for an earlier silence, and one was on its way yet.
            wait_until(lambda: server.executed()[-1].outcome == "halt")
            since = [each.outcome for each in server.executed(since=before)]
            assert sum(outcome != "halt" for outcome in since) <= 1
            if how == signal.SIGSTOP:
                robot.signal(signal.SIGCONT)
                wait_until(lambda: server.executed()[-1].outcome != "halt")
        wait_until(lambda: server.executed()[-1].outcome == "halt")


# The end ----------------------------------------------------------------------------------------


def test_stop_calls_it_at_once_and_waits_for_it(transport, safe, caplog):
    moved: list = []
    server = device_of(transport, safe, lambda key, n: moved.append(n), timeout=60.0)
    with no_thread_left(), client_of_started(server, transport) as client:
        client.act("arm", 1)
        with took(at_most=5.0):
            server.stop()
        assert safe.keys == ["arm"]
        assert halts_of(server)[0].took > 0
        assert "'arm' was called, as the server stops" in caplog.text
        server.stop()
        assert safe.keys == ["arm"]


def client_of_started(server, transport) -> ActionClient:
    server.start(threaded=True)
    return client_of(server, transport)


def test_stop_calls_nothing_where_nothing_has_moved_or_it_was_called(transport, safe):
    server = device_of(transport, safe)
    with client_of_started(server, transport) as client:
        client.act("arm", 1)
        wait_until(lambda: safe.keys == ["arm"])
        server.stop()
        assert safe.keys == ["arm"]


def test_a_safe_action_that_hangs_at_the_end_is_left_behind(transport, safe, caplog):
    safe.free.clear()
    server = device_of(transport, safe, timeout=60.0)
    with client_of_started(server, transport) as client:
        client.act("arm", 1)
        with took(at_most=10.0, at_least=1.0):
            server.stop()
        assert f"{NAME} is still running" in caplog.text
        safe.free.set()
        wait_until(lambda: not any(thread.name == NAME for thread in threading.enumerate()))


def test_a_safe_action_may_stop_the_server(transport):
    stopped = threading.Event()
    servers: list[ActionServer] = []

    def halt(key):
        servers[0].stop()
        stopped.set()

    with no_thread_left():
        servers.append(device_of(transport, halt))
        with client_of_started(servers[0], transport) as client:
            client.act("arm", 1)
            assert stopped.wait(20)
        assert len(halts_of(servers[0])) == 1


def test_a_drained_device_answers_what_it_has_and_then_does_what_is_safe(transport, safe):
    free, busy = threading.Event(), threading.Event()
    order: list = []

    def act(key, payload):
        busy.set()
        assert free.wait(30)
        order.append(payload)

    server = device_of(transport, lambda key: order.append(key), act, timeout=60.0)
    with client_of_started(server, transport) as client:
        future = client.act_async("arm", 1)
        assert busy.wait(20)
        drained: list = []
        thread = threading.Thread(target=lambda: drained.append(server.drain(20)))
        thread.start()
        wait_until(lambda: server.state().state == "draining")
        free.set()
        thread.join(30)
        future.result(20)
        assert drained == [True]
        assert order == [1, "arm"]


def test_a_server_that_is_dropped_does_what_is_safe(transport, safe):
    server = device_of(transport, safe, timeout=60.0)
    with client_of_started(server, transport) as client:
        client.act("arm", 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del server
            gc.collect()
        wait_until(lambda: safe.keys == ["arm"])
        assert any(each.category is ResourceWarning for each in caught)


ENDS = """
import os, signal, sys, threading
from edgeml import ActionClient, ActionConfig, ActionServer
config = ActionConfig(0, ["arm"], transport="zmq", action_timeout=60.0,
                      on_action_timeout=lambda: print("safe", flush=True))
server = ActionServer(config, None, lambda key, payload: payload)
server.start(threaded=True)
client = ActionClient("127.0.0.1", server.port, config=config)
client.act("arm")
"""


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "sys.exit(0)",
        "os.kill(os.getpid(), signal.SIGTERM); signal.pause()",
        "server.stop()",
        "server.drain()",
        "signal.signal(signal.SIGALRM, lambda *_: server.stop())\n"
        "os.kill(os.getpid(), signal.SIGALRM)",
    ],
)
def test_the_end_of_the_program_does_what_is_safe(end):
    with process(ENDS + end) as device:
        printed, error = device.popen.communicate(timeout=60)
    assert printed == "safe\n", error


def test_a_program_that_fails_does_what_is_safe():
    with process(ENDS + "1 / 0") as device:
        printed, error = device.popen.communicate(timeout=60)
    assert printed == "safe\n"
    assert "ZeroDivisionError" in error


def test_a_server_that_is_stopped_by_a_signal_amid_an_action_ends(tmp_path):
    """Handlers run in the main thread, as its signal handlers do: at any point of theirs."""
    program = """
        import os, signal, threading, time
        from edgeml import ActionClient, ActionConfig, ActionServer
        halts = []
        config = ActionConfig(0, ["arm"], transport="inproc", action_timeout=60.0,
                              on_action_timeout=halts.append)
        for n in range(40):
            server = ActionServer(config, None, lambda key, payload: payload)
            signal.signal(signal.SIGUSR1, lambda *_: server.stop())

            def move():
                while not server.urls():
                    time.sleep(0.001)
                client = ActionClient("127.0.0.1", server.port, config=config)
                client.act("arm")
                threading.Timer(0.002 + n * 0.0001, os.kill, (os.getpid(), signal.SIGUSR1)).start()
                try:
                    while True:
                        client.act("arm", timeout=10)
                except ConnectionError:
                    client.stop()

            thread = threading.Thread(target=move)
            thread.start()
            server.start()
            thread.join()
        print(len(halts))
    """
    assert run_fresh(program, timeout=120)[0] == "40\n"


def test_nothing_begins_once_the_server_stops(transport, safe):
    moved: list = []
    server = device_of(transport, safe, lambda key, n: moved.append(n), timeout=60.0)
    with client_of_started(server, transport) as client:
        client.act("arm", 1)
        server._device.close()  # as the server does, before it waits for handlers
        assert safe.keys == ["arm"]
        with pytest.raises(Closed):
            client.act("arm", 2)
        assert moved == [1]
        server.stop()
        assert safe.keys == ["arm"]


def test_an_action_that_comes_as_the_server_stops_puts_nothing_off(safe):
    record = Record(10)
    gate, call = Gate("arm", 60.0, safe, record), LocalCall("act", None)
    gate.begin(call, None, time.monotonic())
    with gate._lock:  # so the switch's thread is only about to act
        gate.close()
        with pytest.raises(Closed):
            gate.begin(call, None, time.monotonic())
    gate.join()
    assert safe.keys == ["arm"]
    assert [each.outcome for each in record.since(0)] == ["running", "halt"]


def test_an_action_that_was_to_begin_before_the_safe_action_does_not_begin_after_it(safe):
    record = Record(10)
    gate = Gate("arm", 0.05, safe, record)
    gate.begin(LocalCall("act", None), None, time.monotonic())
    held_up = time.monotonic()  # as a thread may be just here
    wait_until(lambda: safe.keys == ["arm"])
    wait_until(lambda: not gate._switch.bars(time.monotonic()))  # it has returned
    with pytest.raises(Stale, match="safe action of 'arm'"):
        gate.begin(LocalCall("act", None), None, held_up)
    gate.begin(LocalCall("act", None), None, time.monotonic())
    gate.close()
    gate.join()
    assert [each.outcome for each in record.since(0)] == ["running", "halt", "running", "halt"]
    assert gate.stale == 1


def test_what_a_signal_stops_just_as_an_action_begins_is_safe_in_the_end(safe, monkeypatch):
    record = Record(10)
    gate, call = Gate("arm", 60.0, safe, record), LocalCall("act", None)
    monkeypatch.setattr("edgeml.services.action.deadman._GRACE", 0.1)
    gate.begin(call, None, time.monotonic())
    feed = gate._switch.feed

    def interrupted(now):
        gate.close()  # as a signal's handler does in this thread
        gate.join()
        feed(now)

    monkeypatch.setattr(gate._switch, "feed", interrupted)
    with pytest.raises(Closed):
        gate.begin(call, None, time.monotonic())
    wait_until(lambda: safe.keys == ["arm"])
    wait_until(lambda: not any(thread.name == NAME for thread in threading.enumerate()))
    assert safe.keys == ["arm"]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_does_nothing_of_the_kind(safe):
    server = device_of("inproc", safe, timeout=60.0)
    with client_of_started(server, "inproc") as client:
        client.act("arm", 1)
        pid = os.fork()
        if not pid:
            try:
                server._device.close()
                assert safe.keys == []
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        server.stop()
        assert safe.keys == ["arm"]


# What may be given ------------------------------------------------------------------------------


def test_the_safe_action_is_given_the_key_if_it_takes_one(transport):
    got: list = []

    class Robot:
        def stop(self):
            got.append("stop")

        def halt(self, key):
            got.append(key)

    robot = Robot()
    for function in (
        lambda key: got.append(key),
        lambda: got.append("bare"),
        lambda speed=0.5: got.append(speed),
        lambda key="none": got.append(key),
        functools.partial(got.append, "bound"),
        robot.stop,
        robot.halt,
        got.append,
    ):
        server = device_of(transport, function, timeout=60.0)
        with client_of_started(server, transport) as client:
            client.act("arm", 1)
            server.stop()
    assert got == ["arm", "bare", 0.5, "arm", "bound", "stop", "arm", "arm"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"action_timeout": 0.1}, ValueError),
        ({"on_action_timeout": print}, ValueError),
        ({"action_timeout": 0.0, "on_action_timeout": print}, ValueError),
        ({"action_timeout": -1, "on_action_timeout": print}, ValueError),
        ({"action_timeout": float("nan"), "on_action_timeout": print}, ValueError),
        ({"action_timeout": "soon", "on_action_timeout": print}, ValueError),
        ({"action_timeout": True, "on_action_timeout": print}, ValueError),
        ({"action_timeout": {"leg": 0.1}, "on_action_timeout": print}, ValueError),
        ({"action_timeout": 0.1, "on_action_timeout": "stop"}, TypeError),
        ({"action_timeout": 0.1, "on_action_timeout": lambda a, b: None}, TypeError),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_moves(settings, error):
    with pytest.raises(error, match="action_timeout"):
        ActionServer(config_of("inproc", **settings), None, lambda key, payload: payload)


def test_the_ends_need_not_agree_on_it(transport, safe):
    with (
        started(device_of(transport, safe, timeout=60.0)) as server,
        client_of(server, transport) as client,
    ):
        assert client.act("arm", 1) == 1
