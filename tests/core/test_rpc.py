"""What every pair promises of calls: errors, deadlines, ownership, liveness, restarts, stopping."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import sqlite3
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    PluginError,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    UnknownInterface,
    Unreachable,
)
from edgeml.core import wire
from edgeml.core.client import Client
from edgeml.core.dispatch import answer_with
from edgeml.core.limits import Limits
from edgeml.core.message import Message
from edgeml.core.plugins import load_transport
from edgeml.core.server import Server
from edgeml.core.url import Url, resolve
from pairs import (
    free_port,
    no_thread_left,
    plain_client,
    process,
    started,
    stop_server,
    threads,
    took,
    wait_until,
)


@pytest.fixture
def server(transport):
    """A server that echoes, not yet started."""
    with InferenceServer(0, transport=transport) as server:
        server.register_interface("echo", lambda payload: payload)
        yield server


def client_of(server, transport, **kwargs) -> InferenceClient:
    return InferenceClient("127.0.0.1", server.port, transport, **kwargs)


def new_server(transport, port=0, **kwargs) -> InferenceServer:
    server = InferenceServer(port, transport=transport, **kwargs)
    server.register_interface("echo", lambda payload: payload)
    return server


def run_in_thread(function, *args) -> Future:
    """Run a function in a thread of its own, and give its outcome."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# Errors ---------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Refused(PermissionDenied):
    """A user's own subclass of an error that reaches the client as it is."""


def fail(kind):
    match kind:
        case "unprintable":
            raise Unprintable
        case "surrogate":
            raise OSError("no such file: \udcff\udcfe")
        case "exit":
            raise SystemExit(3)
        case "recursion":
            raise RecursionError("too deep")
        case "huge":
            raise ValueError("x" * 5_000_000)
        case "subclass":
            raise Refused("not you")
        case "own error":
            raise DeadlineExceeded("the database was slow")
        case "key":
            return {}["missing"]
        case "quick":
            return "fine"


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("key", RemoteError, "KeyError: 'missing'"),
        ("unprintable", RemoteError, "Unprintable"),
        ("surrogate", RemoteError, "no such file"),
        ("exit", RemoteError, "SystemExit: 3"),
        ("recursion", RemoteError, "RecursionError"),
        ("huge", RemoteError, "ValueError: xxxx"),
        ("own error", RemoteError, "DeadlineExceeded: the database was slow"),
        ("subclass", PermissionDenied, "not you"),
    ],
)
def test_whatever_a_handler_raises_reaches_its_caller_and_the_next_call_works(
    server, transport, kind, expected, text
):
    server.register_interface("fail", fail)
    with started(server), client_of(server, transport) as client:
        for _ in range(2):
            with pytest.raises(expected) as caught:
                client.call("fail", kind, timeout=20)
            assert text in str(caught.value)
            assert len(str(caught.value)) < 50_000
            with pytest.raises(expected):
                client.call_async("fail", kind).result(20)
            assert client.call("fail", "quick", timeout=20) == "fine"
            assert client.call("echo", 7, timeout=20) == 7


def test_a_remote_error_tells_type_message_and_where_it_was_raised(server, transport):
    server.register_interface("fail", fail)
    with started(server), client_of(server, transport) as client:
        with pytest.raises(RemoteError) as caught:
            client.call("fail", "key")
        error = caught.value
        assert error.type_name == "KeyError"
        assert error.message == "'missing'"
        assert 'return {}["missing"]' in error.traceback
        assert __file__ in error.traceback
        assert "On the far side" in str(error)
        assert error.traceback in str(error)
        assert isinstance(error, RuntimeError)
        assert server.stats()["RemoteError"] == 1


def test_a_result_that_cannot_be_carried_is_the_callers_error_and_names_the_path(server, transport):
    server.register_interface("bad", lambda _: {"out": [1, object()]})
    with started(server), client_of(server, transport) as client:
        with pytest.raises(RemoteError, match="NotEncodable") as caught:
            client.call("bad", None, timeout=20)
        assert "['out'][1]" in str(caught.value)
        assert client.call("echo", 1) == 1


def test_a_payload_that_cannot_be_carried_is_refused_before_anything_is_sent(server, transport):
    with started(server), client_of(server, transport) as client:
        for send in (client.call, client.call_async):
            with pytest.raises(NotEncodable, match=r"\['cam'\]\[0\]"):
                send("echo", {"cam": [threading.Lock()]})
            with pytest.raises(TypeError):
                send("echo", object())
        assert server.stats().get("calls", 0) == 0
        assert client.call("echo", 1) == 1


def test_a_result_of_very_many_arrays_reaches_the_caller_as_a_value_or_an_error(server, transport):
    """Some carry 16,384 arrays in a message; what they can't carry must not just stay out."""
    array = np.zeros(8_200, np.uint8)
    server.register_interface("many", lambda _: [array] * 17_000)
    with started(server), client_of(server, transport, timeout=60) as client:
        try:
            got = len(client.call("many", None))
        except RemoteError as error:
            got = error.type_name
        assert got in (17_000, "NotEncodable")
        assert client.call("echo", 1) == 1


def test_an_unknown_interface_is_told_with_those_that_are_known(server, transport):
    server.register_interface("voice_reg", lambda payload: payload)
    with started(server), client_of(server, transport) as client:
        for attempt in (
            lambda: client.call("voice", {}),
            lambda: client.call_async("voice", {}).result(20),
        ):
            with pytest.raises(UnknownInterface) as caught:
                attempt()
            assert str(caught.value) == "there is no interface 'voice'; known: echo, voice_reg"
            assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [
        ("version", "1", "2"),
        ("action_keys", ["move"], ["move", "stop"]),
        ("observation_keys", ["cam"], ["camera"]),
    ],
)
def test_each_difference_of_two_action_configs_is_told_with_both_values(
    transport, field, ours, theirs
):
    common = {"action_keys": ["move"], "observation_keys": ["cam"], "version": "1"}
    mine = ActionConfig(0, **{**common, field: ours}, transport=transport)
    yours = ActionConfig(0, **{**common, field: theirs}, transport=transport)
    with started(ActionServer(mine, None, None)) as server:
        with pytest.raises(ConfigMismatch) as caught:
            ActionClient("127.0.0.1", server.port, config=yours)
        assert f"{field}: " in str(caught.value)
        assert repr(ours) in str(caught.value)
        assert repr(theirs) in str(caught.value)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [("version", "1", "2"), ("request_types", ["stats"], ["reset", "stats"])],
)
def test_each_difference_of_two_trainer_configs_is_told_with_both_values(
    transport, field, ours, theirs
):
    mine = TrainerConfig(0, **{field: ours}, transport=transport)
    with started(TrainerServer(mine)) as server:
        yours = TrainerConfig(server.port, **{field: theirs}, transport=transport)
        with pytest.raises(ConfigMismatch) as caught:
            TrainerClient("actor", "127.0.0.1", yours)
        assert f"{field}: " in str(caught.value)
        assert repr(ours) in str(caught.value)
        assert repr(theirs) in str(caught.value)


def test_ports_rate_limits_transports_and_the_order_of_keys_may_differ(transport):
    mine = ActionConfig(0, ["a", "b"], ("x", "y"), broadcast_port=0, transport=transport)
    with started(ActionServer(mine, None, None)) as server:
        yours = ActionConfig(1, ["b", "a"], ["y", "x"])
        with ActionClient("127.0.0.1", server.port, config=yours, transport=transport):
            pass
    mine = TrainerConfig(0, None, ["x", "y"], rate_limit=50, transport=transport)
    with started(TrainerServer(mine)) as server:
        yours = TrainerConfig(server.port, request_types=["y", "x"])
        with TrainerClient("a", "127.0.0.1", yours, transport=transport):
            pass


def test_a_client_of_another_kind_of_server_is_told_so(server, transport):
    with started(server), pytest.raises(ConfigMismatch, match=r"service.*'inference'.*'action'"):
        ActionClient("127.0.0.1", server.port, config=ActionConfig(0, transport=transport))


def test_a_codec_that_the_server_does_not_offer_is_refused_and_told(server, transport):
    with started(server), pytest.raises(ConfigMismatch, match=r"codec.*msgpack.*cloudpickle"):
        client_of(server, transport, codec="cloudpickle")
    with pytest.raises(PluginError, match=r"'jason'.*cloudpickle.*msgpack"):
        InferenceServer(0, codecs=["jason"])


def test_two_clients_may_speak_different_codecs_that_the_server_lists(transport):
    server = InferenceServer(0, transport=transport, codecs=["msgpack", "cloudpickle"])
    server.register_interface("apply", lambda payload: payload["function"](payload["x"]))
    server.register_interface("echo", lambda payload: payload)
    with (
        started(server),
        client_of(server, transport) as plain,
        client_of(server, transport, codec="cloudpickle") as friend,
    ):
        assert friend.call("apply", {"function": lambda x: x + 1, "x": np.arange(3)}).tolist() == [
            1,
            2,
            3,
        ]
        assert plain.call("echo", (1, "two")) == (1, "two")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.1.7", "robot.local", "::"])
def test_a_codec_that_runs_code_is_refused_beyond_loopback(transport, host):
    with pytest.raises(PermissionDenied, match="cloudpickle") as caught:
        InferenceServer(0, host, transport, codecs=["msgpack", "cloudpickle"])
    assert isinstance(caught.value, PermissionError)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_a_codec_that_runs_code_is_allowed_on_loopback(transport, host):
    InferenceServer(0, host, transport, codecs=["cloudpickle"]).stop()


def test_a_port_that_is_taken_is_an_oserror_and_hurts_nobody(server, transport):
    with no_thread_left(), started(server):
        second = new_server(transport, server.port)
        with pytest.raises(OSError, match=str(server.port)):
            second.start(threaded=True)
        second.stop()
        with client_of(server, transport) as client:
            assert client.call("echo", 1) == 1


def test_where_the_second_port_is_taken_the_server_warns_and_does_without(transport, caplog):
    """Two learners on one machine that differ in their first port alone must both start."""
    with started(new_server(transport)) as other, started(new_server(transport)) as free:
        port = free.port
        free.stop()
        config = ActionConfig(port, broadcast_port=other.port, transport=transport)
        server = ActionServer(config, lambda keys: {"x": 1}, None)
        with started(server), ActionClient("127.0.0.1", config=config) as client:
            assert str(other.port) in caplog.text
            assert client.obs() == {"x": 1}


def test_a_server_that_is_not_started_has_no_url(server, transport):
    with pytest.raises(Closed, match="isn't started"):
        _ = server.url
    with pytest.raises(Closed):
        _ = server.port
    server.start(threaded=True)
    assert server.url == f"{transport}://127.0.0.1:{server.port}"
    assert server.port > 0


def test_the_url_of_a_server_is_all_that_a_client_needs(server, transport):
    with started(server), InferenceClient("", 0, server.url) as client:
        assert client.call("echo", 1) == 1


def test_a_server_starts_once(server):
    server.start(threaded=True)
    with pytest.raises(RuntimeError, match="started"):
        server.start(threaded=True)


def test_a_server_that_was_stopped_does_not_start_again_and_listens_nowhere(transport):
    with started(new_server(transport, free_port())) as server:
        port = server.port
    with no_thread_left():
        for threaded in (True, False):
            again = new_server(transport, port)
            again.stop()
            with pytest.raises(RuntimeError, match="stopped"):
                again.start(threaded)
            with pytest.raises(RuntimeError):
                server.start(threaded)
    with started(new_server(transport, port)):
        pass


def test_nobody_there_is_told_at_once(transport):
    with started(new_server(transport, free_port())) as server:
        port = server.port
    with no_thread_left(), took(at_most=2), pytest.raises(Unreachable, match=str(port)) as caught:
        InferenceClient("127.0.0.1", port, transport)
    assert isinstance(caught.value, ConnectionError)


def test_one_who_listens_and_never_answers_is_given_up_at_the_deadline(transport):
    url = Url(transport, "127.0.0.1", 0)
    with (
        load_transport(transport).serve(url, lambda message, reply: None) as endpoint,
        no_thread_left(),
        took(at_least=0.3, at_most=5.0),
        pytest.raises(Unreachable, match="handshake"),
    ):
        InferenceClient("127.0.0.1", endpoint.url.port, transport, timeout=0.3)


def test_something_else_that_listens_on_the_port_is_given_up_at_the_deadline():
    with (
        socket.create_server(("127.0.0.1", 0)) as stranger,
        took(at_most=2),
        pytest.raises(Unreachable),
    ):
        InferenceClient("127.0.0.1", stranger.getsockname()[1], "zmq", timeout=0.5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: InferenceServer(0, transport="carrier-pigeon").start(), PluginError, "pigeon"),
        (lambda: InferenceClient("h", 1, "carrier-pigeon"), PluginError, "installed are: .*zmq"),
        (lambda: InferenceServer(5, transport="zmq://127.0.0.1:6"), ValueError, "6.*5"),
        (lambda: InferenceServer(0, workers=0), ValueError, "workers"),
        (lambda: InferenceClient("127.0.0.1", 1, timeout=0), ValueError, "timeout"),
        (lambda: ActionServer(ActionConfig(0, "move"), None, None), ValueError, "action_keys"),
        (lambda: ActionServer(ActionConfig(0, ["a", ""]), None, None), ValueError, "action_keys"),
        (lambda: ActionServer(ActionConfig(0, [], "cam"), None, None), ValueError, "observation"),
        (lambda: ActionServer(ActionConfig(0), None, None, keep=0), ValueError, "keep"),
        (lambda: TrainerServer(TrainerConfig(0, rate_limit=0)), ValueError, "rate_limit"),
        (lambda: TrainerServer(TrainerConfig(0, rate_limit=-1)), ValueError, "rate_limit"),
        (lambda: TrainerServer(TrainerConfig(0, request_types="x")), ValueError, "request_types"),
        (lambda: InferenceServer(70_000), ValueError, "70000"),
        (lambda: InferenceServer(-1), ValueError, "-1"),
        (
            lambda: ActionServer(ActionConfig(0, broadcast_port=1 << 16), None, None),
            ValueError,
            "65536",
        ),
        (lambda: InferenceClient("127.0.0.1", 0, "zmq"), (Unreachable, ValueError), "0"),
        (lambda: InferenceServer(0, "no.such.host.invalid", "zmq").start(), OSError, "no.such"),
        (lambda: InferenceClient("no.such.host.invalid", 1, "zmq"), Unreachable, "no.such.host"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_reason(make, error, text):
    with no_thread_left(), pytest.raises(error, match=text):
        make()


# Deadlines ------------------------------------------------------------------------------------


def add_gate(server):
    """An interface that waits until the gate is opened, and tells what ran."""

    class Gate(threading.Event):
        ran: list = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.ran = []
            self.entered = threading.Event()

        def __call__(self, payload):
            self.ran.append(payload)
            self.entered.set()
            assert self.wait(60)
            return payload

    gate = Gate()
    server.register_interface("gate", gate)
    return gate


@pytest.fixture
def gate(server):
    gate = add_gate(server)
    yield gate
    gate.set()


def test_a_call_that_gets_no_answer_ends_at_its_deadline(server, transport, gate):
    with started(server):
        with client_of(server, transport, timeout=0.3) as client:
            with took(at_least=0.3, at_most=5.0), pytest.raises(TimeoutError):
                client.call("gate", 1)  # the client's own
            with took(at_least=0.3, at_most=5.0), pytest.raises(DeadlineExceeded):
                client.call_async("gate", 1).result(10)
        with client_of(server, transport, timeout=60) as client:
            with took(at_least=0.1, at_most=5.0), pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
                client.call("gate", 2, timeout=0.1)
            with took(at_least=0.1, at_most=5.0), pytest.raises(DeadlineExceeded):
                client.call_async("gate", 3, timeout=0.1).result(10)
        gate.set()


def test_calls_that_nobody_waits_for_any_more_are_not_carried_out_and_counted(
    server, transport, gate
):
    with started(server), client_of(server, transport) as client:
        first = client.call_async("gate", "first")
        assert gate.entered.wait(20)
        # Time enough to arrive: of what is given up before that the server never hears.
        late = [client.call_async("gate", n, timeout=0.5) for n in range(3)]
        with pytest.raises(DeadlineExceeded):
            client.call("gate", "late", timeout=0.5)
        for future in late:
            with pytest.raises(DeadlineExceeded):
                future.result(20)
        time.sleep(0.5)  # the server counts from when a call arrives, a little later than we
        gate.set()
        assert first.result(20) == "first"
        assert client.call("gate", "last") == "last"
        assert gate.ran == ["first", "last"]
        assert server.stats()["DeadlineExceeded"] == 4
        assert server.stats()["calls"] == 2


def test_a_late_answer_is_never_taken_for_the_next_calls(server, transport, gate):
    for n in range(20):  # of which nobody knows how long they take, and that is too long
        server.register_interface(f"gate {n}", gate)
    with started(server), client_of(server, transport) as client:
        for n in range(20):
            gate.clear()
            with pytest.raises(DeadlineExceeded):
                client.call(f"gate {n}", f"late {n}", timeout=0.02)
            gate.set()
            assert client.call("echo", n) == n


@pytest.mark.parametrize("timeout", [0, -1, -math.inf])
def test_a_call_without_any_time_left_ends_at_once(server, transport, gate, timeout):
    with started(server), client_of(server, transport) as client:
        with took(at_most=3.0), pytest.raises(DeadlineExceeded):
            client.call("gate", 1, timeout=timeout)
        with took(at_most=3.0), pytest.raises(DeadlineExceeded):
            client.call_async("gate", 1, timeout=timeout).result(20)
        gate.set()
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 30 * 86_400])
def test_a_call_may_be_given_all_the_time_there_is(server, transport, timeout):
    with started(server), client_of(server, transport, timeout=timeout) as client:
        assert client.call("echo", 1) == 1
        assert client.call("echo", 1, timeout=timeout) == 1
        assert client.call_async("echo", 2, timeout=timeout).result(20) == 2


# Futures --------------------------------------------------------------------------------------


def test_thousands_of_calls_are_under_way_at_once_and_each_gets_its_own_answer(server, transport):
    with started(server), client_of(server, transport, timeout=30) as client:
        futures = [client.call_async("echo", n) for n in range(2_000)]
        assert [future.result(30) for future in futures] == list(range(2_000))


def test_more_calls_than_can_wait_are_refused_and_cancelled_ones_make_room(server, transport, gate):
    """None is kept unseen."""
    with started(server), client_of(server, transport, timeout=60) as client:
        futures = []
        with pytest.raises(Overloaded) as caught:  # noqa: PT012
            for n in range(10_000):
                futures.append(client.call_async("gate", n))  # noqa: PERF401
        assert isinstance(caught.value, ConnectionError)
        assert len(futures) >= 2_000
        for future in futures[1_000:]:
            future.cancel()
        more = [client.call_async("echo", n) for n in range(1_000)]
        gate.set()
        for each in (futures[:1_000], more):
            outcomes = [future.exception(60) for future in each]
            assert all(error is None or isinstance(error, Overloaded) for error in outcomes)
        answered = [n for n, future in enumerate(futures[:1_000]) if future.exception() is None]
        assert len(answered) >= 900
        assert all(futures[n].result() == n for n in answered)
        assert client.call("echo", 1) == 1
        assert client.call_async("echo", 1).result(30) == 1


@pytest.mark.parametrize("limit", ["bytes", "bytes_per_client"])
def test_one_call_is_always_taken_however_large_and_too_much_is_told_in_megabytes(transport, limit):
    server = new_server(transport, limits=Limits(**{limit: 1_000_000}))
    gate = add_gate(server)
    server.register_interface("size", lambda payload: payload.nbytes)
    server.register_interface("size, later", lambda payload: gate(payload).nbytes)
    large = np.ones(2_500_000, np.uint8)
    with server, started(server), client_of(server, transport) as client:
        assert (client.call("echo", large) == large).all()
        busy = client.call_async("size, later", large)  # also while another is handled
        assert gate.entered.wait(20)
        waiting = client.call_async("size", large)
        wait_until(lambda: server.stats()["waiting"] == 1)
        assert server.stats()["running"] == 1
        for _ in range(2):
            with pytest.raises(Overloaded, match=r"calls waiting already: 1, of 2\.5 MB; "):
                client.call("size", large)
        gate.set()
        assert busy.result(20) == waiting.result(20) == large.nbytes
        assert (client.call("echo", large) == large).all()
        wait_until(lambda: server.stats()["running"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        ("zmq", [1 << 30]),  # the largest array; with its header it is more than may wait
        ("zmq", [1 << 29] * 3),
        ("grpc", [3 << 29]),
        ("shm", [3 << 29]),
        ("ws", [1 << 29] * 2),
        ("inproc", [3 << 29]),
    ],
)
def test_messages_of_a_gigabyte_and_more_reach_an_idle_server(network, sizes, monkeypatch):
    monkeypatch.setenv("EDGEML_SHM_LIMIT_MB", "2048")
    server = InferenceServer(0, transport=network)
    # Some bytes of each tell that all have come; nothing as large goes back.
    server.register_interface("look", lambda arrays: [array[:: 1 << 27].copy() for array in arrays])
    with started(server), client_of(server, network, timeout=120) as client:
        arrays = [np.zeros(size, np.uint8) for size in sizes]
        for array in arrays:
            array[:: 1 << 27] = np.arange(1, 1 + -(-len(array) // (1 << 27)))
        assert [seen.tolist() for seen in client.call("look", arrays)] == [
            list(range(1, 1 + size // (1 << 27))) for size in sizes
        ]
        assert server.stats()["waiting"] == 0


def test_futures_work_with_the_tools_of_concurrent_futures(server, transport, gate):
    with started(server), client_of(server, transport) as client:
        futures = [client.call_async("echo", n) for n in range(10)]
        assert sorted(f.result() for f in as_completed(futures, 10)) == list(range(10))
        seen: Future = Future()
        client.call_async("echo", "called back").add_done_callback(
            lambda future: seen.set_result(future.result())
        )
        assert seen.result(20) == "called back"
        waiting = client.call_async("gate", 1)
        with pytest.raises(FutureTimeout):
            waiting.result(0.05)
        assert not waiting.done()
        gate.set()
        assert waiting.result(20) == 1


def test_a_cancelled_call_is_over_for_everybody_who_waits(server, transport, gate):
    with started(server), client_of(server, transport) as client:
        future = client.call_async("gate", 1)
        assert gate.entered.wait(20)
        waiter = run_in_thread(wait, [future])
        assert future.cancel()
        assert future.cancelled()
        with pytest.raises(CancelledError):
            future.result(20)
        assert waiter.result(20).done == {future}
        gate.set()
        assert client.call("echo", 1) == 1
        assert not client.call_async("echo", 1).exception(20)


def test_calls_under_way_when_the_client_is_stopped_are_closed(server, transport, gate):
    with started(server):
        client = client_of(server, transport)
        future = client.call_async("gate", 1)
        blocked = run_in_thread(client.call, "gate", 2)
        assert gate.entered.wait(20)
        wait_until(lambda: server.stats().get("calls", 0) == 1)
        with took(at_most=2.5):
            client.stop()
        for each in (future, blocked):
            with pytest.raises(Closed, match="this client"):
                each.result(20)
        with pytest.raises(Closed):
            client.call("echo", 1)
        with pytest.raises(Closed):
            client.call_async("echo", 1)
        gate.set()


def test_a_call_async_to_a_server_that_has_gone_fails_as_a_future(server, transport):
    with started(server), client_of(server, transport) as client:
        assert client.call("echo", 1) == 1
        server.stop()
        with took(at_most=2), pytest.raises(EdgemlError):
            client.call_async("echo", 1).result(20)


def have_forgotten(client) -> None:
    """Have the server forget a client that doesn't know it, as after half a minute of silence."""
    session = client.sessions.current
    goodbye = wire.pack(wire.Request(wire.GOODBYE, session.key, "", 5.0, b""))
    session.requester.call(Message(goodbye), 20)


def test_a_call_async_after_the_server_forgot_us_is_sent_again(server):
    with started(server), plain_client(server) as client:
        sessions = [client.sessions.current]
        have_forgotten(client)
        assert client.call_async("echo", 1).result(20) == 1
        sessions.append(client.sessions.current)
        have_forgotten(client)
        assert client.call("echo", 2) == 2
        sessions.append(client.sessions.current)
        assert len({session.key for session in sessions}) == 3


def test_a_call_async_that_cannot_be_sent_again_fails_with_the_reason(transport):
    config = {"version": "1"}
    with contextlib.ExitStack() as stack:
        server = Server("test", resolve(transport, "127.0.0.1", 0), config=config)
        stack.callback(server.close)
        server.register("echo", answer_with(lambda payload, caller: payload))
        server.open()
        server.dispatcher.start()
        client = Client("test", server.urls, config={"version": "1"}, timeout=30)
        stack.callback(client.close)
        config["version"] = "2"
        have_forgotten(client)
        with took(at_most=5), pytest.raises(ConfigMismatch):
            client.call_async("echo", 1).result(10)


# More than can be answered -----------------------------------------------------------------------


def test_a_server_that_is_asked_for_more_than_it_can_answer_answers_in_time_what_it_can(
    server, transport
):
    """Each of three clients asks as often as it could be answered alone."""
    runs = []

    def policy(payload):
        time.sleep(0.02)
        runs.append(payload)
        return payload

    server.register_interface("policy", policy)
    with started(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server, transport)) for _ in range(3)]
        futures = {client: [] for client in clients}
        pause, due = threading.Event(), time.monotonic()
        for n in range(120):
            for client in clients:
                futures[client].append(client.call_async("policy", n, timeout=0.5))
            due += 0.02
            pause.wait(max(0.0, due - time.monotonic()))
        errors = {client: [f.exception(10) for f in futures[client]] for client in clients}
    answered = [sum(error is None for error in errors[client]) for client in clients]
    assert sum(answered) > 0.6 * len(runs), (answered, len(runs))
    assert min(answered) > 0.5 * sum(answered) / 3, answered
    kinds = {type(error) for each in errors.values() for error in each if error is not None}
    assert Overloaded in kinds
    assert kinds <= {Overloaded, DeadlineExceeded}
    assert server.stats()["refused_too_busy"] > 0


def test_a_client_of_which_most_is_refused_keeps_most_of_that_to_itself(server, transport):
    """Or a server would be at work with refusing alone, and in the end not get to read in time."""

    def policy(payload):
        time.sleep(0.02)
        return payload

    server.register_interface("policy", policy)
    with started(server), client_of(server, transport) as client:
        asked = []
        pause, due = threading.Event(), time.monotonic()
        for n in range(1500):
            asked.append(client.call_async("policy", n, timeout=0.2))
            due += 1e-3
            pause.wait(max(0.0, due - time.monotonic()))
        patient = client.call_async("policy", "patient", timeout=10)
        errors = [future.exception(10) for future in asked]
        held_back = [error for error in errors if "not sent" in str(error)]
        assert patient.result(10) == "patient"  # it had the time, as those refused had not
        seen = server.stats()
        seen = sum(seen.get(kind, 0) for kind in ("calls", "Overloaded", "DeadlineExceeded"))
        assert client.stats()["calls_held_back"] == len(held_back) > len(asked) / 2
        assert seen < len(asked) / 2
        assert errors.count(None) > 5


# Ownership ------------------------------------------------------------------------------------

SIZES = [100, 5_000, 20_000, 301_056, 3_000_000]  # in the header, beside it, in place, and pooled


@pytest.mark.parametrize("size", SIZES)
def test_an_array_changed_right_after_call_async_arrives_as_it_was(server, transport, size):
    times = 10 if size > 1_000_000 else 60
    array = np.empty(size, np.uint8)
    server.register_interface("range", lambda payload: [payload.min(), payload.max()])
    with started(server), client_of(server, transport, timeout=30) as client:
        futures = []
        for n in range(times):
            array[:] = n
            futures.append(client.call_async("range", array))
            array[:] = 255
        for n, future in enumerate(futures):
            assert future.result(30) == [n, n]


@pytest.mark.parametrize("size", SIZES)
def test_an_array_changed_after_a_call_gave_up_arrives_as_it_was(server, transport, size):
    """However the call ends, the memory is the caller's again."""
    seen = []
    busy = threading.Lock()

    def look(payload):
        with busy:
            seen.append((int(payload.min()), int(payload.max())))

    for n in range(11):  # each for one call, or it would be known that these take too long
        server.register_interface(f"look {n}", look)
    array = np.empty(size, np.uint8)
    with started(server), client_of(server, transport) as client:
        for n in range(1, 11):
            with busy:
                array[:] = n
                with pytest.raises((DeadlineExceeded, Overloaded)):  # of which it's told in time
                    client.call(f"look {n}", array, timeout=0.01)
                array[:] = 255
        client.call("look 0", np.zeros(1, np.uint8))
    assert all(least == most < 255 for least, most in seen), seen


@pytest.mark.parametrize("size", SIZES)
def test_a_handler_may_use_its_output_array_again_for_the_next_call(server, transport, size):
    times = 5 if size > 1_000_000 else 25
    output = np.empty(size, np.uint8)

    def fill(n):
        output[:] = n
        return output

    server.register_interface("fill", fill)
    with started(server), client_of(server, transport, timeout=30) as client:

        def check(n) -> None:
            for _ in range(times):
                answer = client.call("fill", n)
                assert answer.min() == answer.max() == n

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(check, [1, 2, 3]))
        futures = [client.call_async("fill", n) for n in range(times)]
        for n, future in enumerate(futures):
            answer = future.result(30)
            assert answer.min() == answer.max() == n


def test_what_arrives_is_read_only_unless_the_client_asks_for_copies(server, transport):
    array = np.arange(100_000.0)
    flags = []
    server.register_interface("look", lambda payload: flags.append(payload.flags.writeable))
    with (
        started(server),
        client_of(server, transport) as client,
        client_of(server, transport, writable=True) as writer,
    ):
        client.call("look", array)
        assert flags == [False]
        answer = client.call("echo", array)
        with pytest.raises(ValueError, match="read-only"):
            answer[0] = 1
        for answer in (writer.call("echo", array), writer.call_async("echo", array).result(20)):
            answer[0] = 1
        assert array[0] == 0


def test_an_answer_stays_as_it_is_for_as_long_as_it_is_kept(server, transport):
    with started(server), client_of(server, transport) as client:
        kept = [client.call("echo", np.full(300_000, n, np.uint8)) for n in range(30)]
    for n, array in enumerate(kept):
        assert array.min() == array.max() == n


# Where handlers run ---------------------------------------------------------------------------


def test_handlers_run_one_at_a_time_unless_more_are_asked_for(server, transport):
    running = 0
    most = 0

    def count(pause):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(pause)
        running -= 1

    server.register_interface("count", count)
    with started(server), client_of(server, transport) as client:
        pauses = [0.001] * 20 + [0] * 100 + [0.001] * 20
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda pause: client.call("count", pause), pauses))
    assert most == 1


def test_four_workers_run_four_handlers_at_a_time_and_never_a_fifth(transport):
    running = 0
    most = 0
    lock = threading.Lock()
    together = threading.Barrier(4)

    def meet(_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(10)
        with lock:
            running -= 1

    server = InferenceServer(0, transport=transport, workers=4)
    server.register_interface("meet", meet)
    with started(server), client_of(server, transport) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: client.call("meet", n), range(16)))
    assert most == 4


SERVE_SLOWLY = """
import sys, time
import edgeml
server = edgeml.InferenceServer(0, transport=sys.argv[1])

def wait(payload):
    print("entered", flush=True)
    time.sleep(60)

server.register_interface("wait", wait)
import threading
def tell():
    while not server.urls():
        time.sleep(0.01)
    print(server.port, flush=True)
threading.Thread(target=tell).start()
server.start()
"""


class Slow:
    """A handler that is quick until it is told to be slow."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, payload):
        self.thread = threading.current_thread()
        if payload == 1:
            self.entered.set()
            assert self.go_on.wait(60)
        return payload


def slowly(server, transport, seconds) -> None:
    """Have a handler compute for so long, and see that nobody else is held up."""
    slow = Slow()
    server.register_interface("slow", slow)
    with started(server), client_of(server, transport, timeout=2 * seconds + 10) as client:
        busy = [client.call_async("slow", 1) for _ in range(3)]
        assert slow.entered.wait(20)
        until = time.monotonic() + seconds
        connects = 0
        while time.monotonic() < until:
            with took(at_most=5.0), client_of(server, transport):
                connects += 1
            with pytest.raises(DeadlineExceeded):  # it waits its turn, as it should
                client.call("echo", 0, timeout=0.2)
        slow.go_on.set()
        assert [future.result(20) for future in busy] == [1, 1, 1]
        assert client.call("echo", 5) == 5
        known = [peer.id for peer in server.clients()]
        assert known.count(client.client_id) == 1, "it took the server for dead, and came back"
    assert connects >= 2


def test_a_handler_that_computes_for_a_while_keeps_nobody_from_connecting(server, transport):
    slowly(server, transport, 1.2 * wire.SILENCE)


@pytest.mark.slow
def test_a_handler_that_computes_for_20_s_keeps_nobody_from_connecting(server, transport):
    slowly(server, transport, 20)


def test_several_handlers_that_are_suddenly_slow_keep_nobody_from_connecting(transport):
    first, second = Slow(), Slow()
    server = InferenceServer(0, transport=transport, workers=3)
    server.register_interface("first", first)
    server.register_interface("second", second)
    with started(server), client_of(server, transport, timeout=30) as client:
        for _ in range(20):  # the server takes them for quick
            client.call("first", 0)
            client.call("second", 0)
        one = client.call_async("first", 1)
        assert first.entered.wait(20)
        two = client.call_async("second", 1)
        assert second.entered.wait(20)
        with took(at_most=5.0), client_of(server, transport) as other:
            assert other.call("first", 0) == 0
        first.go_on.set()
        assert one.result(20) == 1
        with took(at_most=5.0), client_of(server, transport):
            pass
        second.go_on.set()
        assert two.result(20) == 1


def test_many_calls_that_wait_keep_nobody_from_connecting(server, transport):
    server.register_interface("sleep", time.sleep)
    with started(server), client_of(server, transport, timeout=30) as client:
        calls = [client.call_async("sleep", 0.01) for _ in range(400)]
        wait_until(lambda: server.stats()["waiting"])
        with client_of(server, transport):
            done = sum(call.done() for call in calls)
        assert done < 300, "who connects waited for calls that came before"
        calls[0].result(30)


# Which thread ---------------------------------------------------------------------------------


class Where:
    """Notes the thread that each call runs in, and takes as long as it is told."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, seconds):
        self.threads.append(threading.current_thread())
        time.sleep(seconds)


@pytest.mark.parametrize("threaded", [True, False])
def test_all_handlers_run_in_one_thread_however_long_they_take(server, transport, threaded):
    where, elsewhere = Where(), Where()
    server.register_interface("where", where)
    server.register_interface("elsewhere", elsewhere)
    serving = threading.Thread(target=server.start, args=(threaded,))
    with server:
        serving.start()
        wait_until(lambda: server.urls())
        with client_of(server, transport) as one, client_of(server, transport) as other:
            for seconds in (0, 0.001, 0.03, 0, 0.06, 0.001) * 2:
                future = other.call_async("elsewhere", seconds)
                one.call("where", seconds)
                future.result(20)
    serving.join()
    assert len(where.threads) == len(elsewhere.threads) == 12
    (only,) = set(where.threads + elsewhere.threads)
    assert (only is serving) is not threaded


@pytest.mark.parametrize("network", ["grpc", "ws", "zmq"])
def test_all_handlers_run_in_one_thread_over_several_transports_at_once(network):
    where = Where()
    with started(InferenceServer(0, transport=f"inproc,shm,{network}")) as server:
        server.register_interface("where", where)
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(InferenceClient("", 0, transport=url)) for url in server.urls()
            ]
            assert len(clients) == 3
            for seconds in (0, 0, 0.001, 0.03) * 3:
                futures = [client.call_async("where", seconds) for client in clients]
                for future in futures:
                    future.result(10)
            for client in clients:  # one after another, too
                for _ in range(12):
                    client.call("where", 0)
    assert len(where.threads) == 3 * 24
    assert len(set(where.threads)) == 1


def test_handlers_may_use_what_belongs_to_one_thread(server, transport):
    databases = []

    def insert(number):
        if not databases:
            databases.append(sqlite3.connect(":memory:"))
            databases[0].execute("create table numbers (number)")
        if number is None:
            return databases[0].close()
        time.sleep(number % 3 / 100)
        databases[0].execute("insert into numbers values (?)", (number,))
        return databases[0].execute("select count(*) from numbers").fetchone()[0]

    server.register_interface("insert", insert)
    with started(server), client_of(server, transport) as client:
        assert [client.call("insert", n) for n in range(10)] == list(range(1, 11))
        client.call("insert", None)


@pytest.mark.parametrize("workers", [2, 4])
def test_so_many_handlers_run_at_a_time_as_there_are_workers(transport, workers):
    meet = threading.Barrier(workers)
    server = InferenceServer(0, transport=transport, workers=workers)
    server.register_interface("meet", lambda payload: meet.wait(10) >= 0)
    with started(server), client_of(server, transport, timeout=20) as client:
        for _ in range(10):
            futures = [client.call_async("meet", None) for _ in range(workers)]
            assert all(future.result(15) for future in futures)


def test_an_async_def_is_refused_when_it_is_registered(transport):
    async def policy(payload):
        return payload

    class Policy:
        async def __call__(self, payload):
            return payload

    server = InferenceServer(0, transport=transport)
    for function in (policy, Policy()):
        with pytest.raises(TypeError, match="interface 'policy' is an `async def`"):
            server.register_interface("policy", function)


def test_ctrl_c_in_a_handler_ends_a_server_that_blocks_its_thread(transport):
    with process(SERVE_SLOWLY, transport) as served:
        port = int(served.line())
        if transport == "inproc":
            return  # nobody reaches it from here
        with InferenceClient("127.0.0.1", port, transport) as client:
            call = client.call_async("wait", None)
            assert served.line() == "entered"
            served.signal(signal.SIGINT)
            with pytest.raises(EdgemlError):
                call.result(10)
        code, stderr = served.end()
        assert code == 0, stderr
        assert "Traceback" not in stderr


# Many threads ---------------------------------------------------------------------------------


def test_many_threads_share_one_client(server, transport):
    with started(server), client_of(server, transport, timeout=30) as client:

        def work(k):
            for n in range(40):
                assert client.call("echo", [k, n]) == [k, n]
                if n % 10 == 0:
                    array = np.full(100_000, k, np.uint8)
                    assert (client.call("echo", array) == k).all()
                    assert client.call_async("echo", (k, n)).result(30) == (k, n)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))


def test_threads_that_come_and_go_leave_nothing_behind_in_their_client(server, transport):
    with started(server), client_of(server, transport) as client:
        client.call("echo", None)
        before = len(threads())
        for n in range(60):
            assert run_in_thread(client.call, "echo", n).result(20) == n
        wait_until(lambda: len(threads()) <= before)


def test_many_clients_in_one_process(server, transport):
    with started(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server, transport)) for _ in range(20)]
        for n, client in enumerate(clients):
            assert client.call("echo", n) == n
        assert {peer.id for peer in server.clients()} == {client.client_id for client in clients}


# Restarts -------------------------------------------------------------------------------------


def test_a_client_whose_server_restarts_recovers_on_its_next_call(transport):
    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(started(new_server(transport, port)))
        client = stack.enter_context(client_of(server, transport))
        other = stack.enter_context(client_of(server, transport))
        for n in range(3):
            assert client.call("echo", n) == n
            stop_server(server, client)
            server = stack.enter_context(started(new_server(transport, port)))
        assert client.call("echo", "again") == "again"
        assert client.call_async("echo", "again").result(20) == "again"
        assert other.call_async("echo", "again").result(20) == "again"


def test_calls_go_on_through_many_restarts_and_none_is_answered_wrongly(transport):
    """A call may fail while the server is away; it never hangs and never gets another's answer."""
    over = threading.Event()
    answered = []

    def keep_calling(k) -> None:
        n = 0
        while not over.is_set():
            n += 1
            try:
                assert client.call("echo", [k, n], timeout=20) == [k, n]
                answered.append(n)
            except (Unreachable, Closed):
                pass

    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(started(new_server(transport, port)))
        client = stack.enter_context(client_of(server, transport))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(over.set)
        workers = [pool.submit(keep_calling, k) for k in range(4)]
        for _ in range(5):
            so_far = len(answered)
            wait_until(lambda so_far=so_far: len(answered) > so_far + 10)
            server.stop()
            server = stack.enter_context(started(new_server(transport, port)))
        so_far = len(answered)
        wait_until(lambda: len(answered) > so_far + 10)
        over.set()
        for worker in workers:
            worker.result(10)


def test_a_call_while_the_server_is_away_fails_soon_and_says_so(server, transport):
    with started(server), client_of(server, transport) as client:
        server.stop()
        for _ in range(3):
            with took(at_most=2), pytest.raises((Unreachable, Closed)):
                client.call("echo", 1)


def test_a_server_that_comes_back_configured_differently_is_told_to_its_callers(transport):
    port = free_port()
    config = ActionConfig(port, ["move"], transport=transport)
    with (
        started(ActionServer(config, None, lambda key, payload: {})) as server,
        ActionClient("127.0.0.1", port, config=config) as client,
    ):
        assert client.act("move") == {}
        stop_server(server, client)
        changed = ActionConfig(port, ["move"], version="2", transport=transport)
        with started(ActionServer(changed, None, None)), pytest.raises(ConfigMismatch):
            client.act("move")
        with started(
            ActionServer(
                ActionConfig(port, ["move"], transport=transport),
                None,
                lambda key, payload: {"back": key},
            )
        ):
            assert client.act("move") == {"back": "move"}


SERVER = """
import sys, time
from edgeml import InferenceServer
server = InferenceServer(int(sys.argv[1]))
server.register_interface("echo", lambda payload: payload)
server.register_interface("sleep", time.sleep)
server.start(threaded=True)
print(server.port)
time.sleep(60)
"""


def test_a_server_that_is_killed_under_its_callers_fails_them_and_comes_back():
    with process(SERVER, 0) as first:
        port = int(first.line())
        with InferenceClient("127.0.0.1", port, timeout=10) as client:
            futures = [client.call_async("sleep", 30) for _ in range(3)]
            blocked = [run_in_thread(client.call, "sleep", 30) for _ in range(3)]
            wait_until(lambda: all(not each.done() for each in blocked))
            first.signal(signal.SIGKILL)
            with took(at_most=5):
                for each in [*futures, *blocked]:
                    with pytest.raises(Unreachable):
                        each.result(8)
            with took(at_most=2), pytest.raises(Unreachable):
                client.call("echo", 1)
            with process(SERVER, port) as second:
                assert int(second.line()) == port
                assert client.call("echo", 1) == 1
                assert client.call_async("echo", 2).result(20) == 2


def test_a_server_that_freezes_is_noticed_and_when_it_thaws_all_goes_on():
    with contextlib.ExitStack() as stack:
        frozen = stack.enter_context(process(SERVER, 0))
        client = stack.enter_context(InferenceClient("127.0.0.1", int(frozen.line()), timeout=30))
        assert client.call("echo", 1) == 1
        frozen.signal(signal.SIGSTOP)
        waiting = client.call_async("echo", 1)
        with took(at_most=3), pytest.raises(Unreachable, match="heartbeat"):
            waiting.result(20)
        frozen.signal(signal.SIGCONT)
        assert client.call("echo", 2) == 2


def test_a_client_stops_quickly_while_its_server_is_silent(server, transport):
    """While it connects anew, to one who listens and never answers."""
    with started(server), no_thread_left():
        client = client_of(server, transport, timeout=30)
        port = server.port
        server.stop()
        asked = threading.Event()
        with load_transport(transport).serve(
            Url(transport, "127.0.0.1", port), lambda message, reply: asked.set()
        ):
            assert asked.wait(10)
            blocked = run_in_thread(client.call, "echo", 1)
            with took(at_most=2.5):
                client.stop()
            with pytest.raises((Closed, Unreachable)):
                blocked.result(20)


CLIENT = """
import sys, threading
from edgeml import InferenceClient
client = InferenceClient("127.0.0.1", int(sys.argv[1]))
futures = [client.call_async("hold", n, timeout=60) for n in range(10)]
print("connected", flush=True)
threading.Event().wait(60)
"""


def test_a_client_that_stops_is_forgotten_at_once(server, transport):
    with started(server):
        with client_of(server, transport) as client:
            assert [peer.id for peer in server.clients()] == [client.client_id]
        assert server.clients() == []


def test_a_client_that_is_killed_hurts_nobody():
    server = new_server("zmq", workers=2)
    entered, go_on = threading.Event(), threading.Event()

    def hold(payload):
        entered.set()
        assert go_on.wait(60)
        return np.zeros(1_000_000)

    server.register_interface("hold", hold)
    with started(server), client_of(server, "zmq") as client:
        with process(CLIENT, server.port) as other:
            assert other.line() == "connected"
            assert entered.wait(10)
            wait_until(lambda: server.stats()["waiting"] == 8)  # and two with the workers
            other.signal(signal.SIGKILL)
            other.end()
        go_on.set()
        for n in range(50):
            assert client.call("echo", n) == n
        wait_until(lambda: server.stats()["calls"] >= 60)


# Starting and stopping ------------------------------------------------------------------------


def test_a_blocked_start_ends_when_another_thread_stops_the_server(server, transport):
    with no_thread_left():
        blocked = run_in_thread(server.start)
        wait_until(lambda: server.urls())
        with client_of(server, transport) as client:
            assert client.call("echo", 1) == 1
        assert not blocked.done()
        with took(at_most=1.9):  # not the time that handlers are given
            server.stop()
            assert blocked.result(20) is None


PROGRAM = """
import sys
from edgeml import *
match sys.argv[1]:
    case "inference":
        server = InferenceServer(0)
        server.register_interface("echo", lambda payload: payload)
    case "action":
        server = ActionServer(ActionConfig(0), None, None)
    case "trainer":
        server = TrainerServer(TrainerConfig(0))
    case "tunnel":
        server = TrainerTunnel()
import threading, time
def tell():
    while not server.urls():
        time.sleep(0.01)
    time.sleep(0.1)
    print(server.port, flush=True)
threading.Thread(target=tell, daemon=True).start()
server.start()
print("ended", flush=True)
"""


def test_ctrl_c_ends_every_kind_of_server_quietly():
    kinds = ["inference", "action", "trainer", "tunnel"]
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(process(PROGRAM, kind)) for kind in kinds]
        for kind, program in zip(kinds, programs, strict=True):
            port = int(program.line())
            if kind == "inference":
                client = stack.enter_context(InferenceClient("127.0.0.1", port))
                assert client.call("echo", 1) == 1
        for program in programs:
            program.signal(signal.SIGINT)
        with took(at_most=15):
            for kind, program in zip(kinds, programs, strict=True):
                assert program.line() == "ended"
                assert program.end() == (0, ""), kind


def test_stopping_is_quick_idempotent_and_leaves_no_thread(transport):
    with no_thread_left():
        server = new_server(transport, workers=3)
        server.start(threaded=True)
        client = client_of(server, transport)
        list(ThreadPoolExecutor(4).map(lambda n: client.call("echo", n), range(40)))
        futures = [client.call_async("echo", n) for n in range(40)]
        wait(futures, 10)
        for each in (client, client, server, server):
            with took(at_most=1.9):
                each.stop()


def test_many_threads_may_stop_a_server_at_once_and_it_is_over_when_each_returns(transport):
    for _ in range(5):
        with no_thread_left():  # the client's are gone, too: it connects again and again meanwhile
            port = free_port()
            server = new_server(transport, port)
            server.start(threaded=True)
            with client_of(server, transport) as client:
                client.call("echo", 1)
                barrier = threading.Barrier(8)

                def stop(server=server, port=port, barrier=barrier) -> None:
                    barrier.wait(20)
                    server.stop()
                    new_server(transport, port)  # whoever comes back may use the port

                with ThreadPoolExecutor(8) as pool:
                    for future in [pool.submit(stop) for _ in range(8)]:
                        future.result(20)
        with started(new_server(transport, port)):
            pass


def test_a_handler_may_stop_its_own_server(server, transport):
    def stop(payload):
        if payload:
            server.stop()
        return payload

    server.register_interface("stop", stop)
    with no_thread_left():
        blocked = run_in_thread(server.start)
        wait_until(lambda: server.urls())
        with client_of(server, transport) as client:
            with took(at_most=2), contextlib.suppress(Unreachable, Closed):
                client.call("stop", 1)
            assert blocked.result(20) is None
            with pytest.raises(EdgemlError):
                client.call("stop", 0)


def test_stopping_lets_a_running_handler_finish_and_its_caller_have_the_answer(server, transport):
    entered = threading.Event()
    stopping = threading.Event()

    def finish(payload):
        if payload:
            entered.set()
            assert stopping.wait(10)
            time.sleep(0.2)
        return payload

    server.register_interface("finish", finish)
    with started(server), client_of(server, transport) as client:
        running = run_in_thread(client.call, "finish", 1)
        assert entered.wait(20)
        waiting = client.call_async("echo", 2)
        wait_until(lambda: server.stats()["waiting"] == 1)
        stopped = run_in_thread(server.stop)
        with pytest.raises((Closed, Unreachable)):
            waiting.result(20)
        stopping.set()
        assert running.result(20) == 1
        stopped.result(20)


def test_stopping_does_not_wait_for_ever_for_handlers_that_do_not_return(
    transport, caplog, monkeypatch
):
    monkeypatch.setattr("edgeml.core.dispatch._GRACE", 0.3)
    server = InferenceServer(0, transport=transport, workers=3)
    entered = threading.Semaphore(0)
    go_on = threading.Event()

    def hang(_):
        entered.release()
        go_on.wait(60)

    server.register_interface("hang", hang)
    with no_thread_left():
        with started(server), client_of(server, transport) as client:
            futures = [client.call_async("hang", None) for _ in range(3)]
            for _ in futures:
                assert entered.acquire(timeout=20)
            with took(at_most=2):
                server.stop()
            for future in futures:
                with pytest.raises(EdgemlError):
                    future.result(20)
        assert "still running" in caplog.text
        go_on.set()


def test_no_handler_starts_once_the_server_is_stopped(server, transport, gate):
    with started(server), client_of(server, transport) as client:
        first = client.call_async("gate", 1)
        assert gate.entered.wait(20)
        rest = [client.call_async("gate", n) for n in range(2, 12)]
        wait_until(lambda: server.stats()["waiting"] == 10)
        stopped = run_in_thread(server.stop)
        for future in rest:
            with pytest.raises((Closed, Unreachable)):
                future.result(20)
        gate.set()
        stopped.result(20)
        assert first.result(20) == 1
        assert gate.ran == [1]


def test_calls_that_arrive_while_the_server_stops_start_no_thread(transport):
    for _ in range(20):
        with no_thread_left():
            server = new_server(transport)
            server.start(threaded=True)
            with client_of(server, transport) as client:
                futures = [client.call_async("echo", n) for n in range(50)]
                server.stop()
                for future in futures:
                    future.exception(20)


def test_a_call_back_of_a_future_may_stop_the_client(server, transport):
    with no_thread_left(), started(server):
        client = client_of(server, transport)
        done = threading.Event()

        def stop(_) -> None:
            client.stop()
            done.set()

        with took(at_most=4.5):
            client.call_async("echo", 1).add_done_callback(stop)
            assert done.wait(20)
        with pytest.raises(Closed):
            client.call("echo", 1)


def test_servers_and_clients_are_context_managers_that_pass_errors_on(transport):
    def fail() -> None:
        with started(new_server(transport)) as server, client_of(server, transport) as client:
            assert 1 // client.call("echo", 0)

    with no_thread_left(), pytest.raises(ZeroDivisionError):
        fail()


def test_a_server_that_was_never_started_stops(transport):
    with no_thread_left(), new_server(transport) as server:
        server.stop()


def test_two_transports_at_once_serve_the_same_functions():
    with InferenceServer(0, transport="zmq,inproc") as server:
        server.register_interface("echo", lambda payload: payload)
        server.start(threaded=True)
        urls = server.urls()
        assert len(urls) == 2
        for url in urls:
            with InferenceClient("", 0, url) as client:
                assert client.call("echo", url) == url


@pytest.mark.parametrize("network", ["grpc", "ws", "zmq"])
def test_a_port_is_picked_that_all_transports_have_free(network):
    with InferenceServer(0, transport=f"inproc,{network}") as server:
        server.start(threaded=True)
        picked = server.port
    taken = []
    with contextlib.ExitStack() as stack:
        for port in range(picked, picked + 4):
            with contextlib.suppress(OSError):  # another process may have it, and then it does
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                taken.append(port)
        with InferenceServer(0, transport=f"inproc,{network}") as server:
            server.start(threaded=True)
            assert len({Url.parse(url).port for url in server.urls()}) == 1
            assert server.port not in taken


def test_the_environment_sets_the_default_transport_and_the_keyword_wins(monkeypatch):
    monkeypatch.setenv("EDGEML_TRANSPORT", "inproc")
    with started(new_server(None)) as server:
        assert server.url.startswith("inproc://")
        with client_of(server, None) as client:
            assert client.call("echo", 1) == 1
    with started(new_server("zmq")) as server:
        assert server.url.startswith("zmq://")
