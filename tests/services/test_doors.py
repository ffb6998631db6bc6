"""What a server does for every door: shown by one that hears whatever a test says."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import pytest

from edgeml import (
    Batching,
    Credentials,
    Feature,
    InferenceClient,
    InferenceServer,
    Limits,
    PolicyContract,
)
from edgeml.cli.keygen import make_client_keys
from edgeml.core import Door, Endpoint, Peer, Url, plugins
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    NotReady,
    Overloaded,
    PermissionDenied,
    PluginError,
    RemoteError,
    UnknownInterface,
)
from pairs import make_keys, took, wait_until

ADDRESS = "local://127.0.0.1"


class LocalEnd(Endpoint):
    def __init__(self, url, secured):
        self.url = url.with_port(url.port or 4321)
        self.local = url.host == "127.0.0.1"
        self.secured = secured
        self.closed = False

    def close(self):
        self.closed = True


class LocalDoor(Door):
    """Guests come in by `Visitors`, below."""

    name = "local"
    secured = False

    def __init__(self):
        self.opened = []

    def open(self, url, dispatch, *, credentials=None, limits=None):
        if url.port == 1:
            raise OSError("taken")
        end = LocalEnd(url, self.secured)
        self.opened.append((dispatch, end, credentials))
        return end

    @property
    def dispatch(self):
        return self.opened[-1][0]

    def enter(self, number=1, **settings):
        return self.dispatch.enter(Peer(str(number), f"there:{number}", "there"), **settings)


def ask(guest, payload, *, encode=lambda result: result, timeout=None, nbytes=0):
    """A future of what the guest is told, as the exactly one thing that it is told."""
    future = Future()

    def answer(result):
        encoded = encode(result)
        assert not future.done()
        future.set_result(encoded)

    def fail(error):
        assert not future.done()
        future.set_exception(error)

    decode = payload if callable(payload) else lambda: payload
    guest.call(decode, answer, fail, nbytes=nbytes, timeout=timeout)
    return future


@pytest.fixture
def door(monkeypatch):
    made = LocalDoor()
    monkeypatch.setitem(plugins._loaded, ("door", "local"), made)
    return made


@pytest.fixture
def server(door):
    with InferenceServer(0, doors=[ADDRESS]) as made:
        yield made


def test_a_guest_and_a_client_are_answered_by_the_same_function(door, server):
    server.register_interface("policy", lambda x: {"actions": x["state"] * 2})
    with server.serving(), InferenceClient(url=server.url) as client:
        payload = {"state": np.arange(4, dtype=np.float32)}
        ours = client.call("policy", payload)
        theirs = ask(door.enter(), payload).result(10)
        np.testing.assert_array_equal(theirs["actions"], ours["actions"])
        assert server.doors() == ["local://127.0.0.1:4321"]
        assert server.url.startswith("zmq://")  # a door is no address of ours
        assert len(server.urls()) == 1
        stats = server.stats()
        assert stats["calls"] == 2
        assert stats["calls_by_local"] == 1


def test_guests_and_clients_share_batches(door, server):
    seen = []

    def act(batch):
        seen.append(len(batch["state"]))
        return {"actions": batch["state"] + 1}

    server.register_interface("policy", act, batching=Batching(max_size=4, max_delay=5.0))
    with server.serving(), InferenceClient(url=server.url) as client:
        payloads = [{"state": np.full(3, n, np.float32)} for n in range(4)]
        futures = [ask(door.enter(n), payloads[n]) for n in range(3)]
        futures.append(client.call_async("policy", payloads[3]))
        for n, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(10)["actions"], payloads[n]["state"] + 1)
    assert seen == [4]


def test_names_and_functions_stand_between(door):
    def twice(payload):
        return {"action": payload["image"] * 2, "info": sorted(payload)}

    with InferenceServer(0) as server:
        server.register_interface("twice", twice)
        server.register_interface("other", twice)
        server.open_door(
            ADDRESS,
            "twice",
            names={"observation/image": "image", "actions": "action"},
            before=lambda payload: {**payload, "image": payload["image"][0]},
            after=lambda result: {**result, "action": result["action"] + 1},
        )
        with server.serving():
            guest = door.enter()
            got = ask(guest, {"observation/image": [4], "state": 1}).result(10)
            assert got == {"actions": 9, "info": ["image", "state"]}
            with pytest.raises(Malformed, match="the same name"):
                ask(guest, {"observation/image": [4], "image": [1]}).result(10)
            with pytest.raises(RemoteError, match="KeyError"):
                ask(guest, {"nothing": 1}).result(10)
            with pytest.raises(RemoteError, match="TypeError"):
                ask(guest, 5).result(10)
            assert ask(guest, {"image": [4]}).result(10)["actions"] == 9
        with pytest.raises(ValueError, match="the same name"):
            server.open_door(ADDRESS, "twice", names={"a": "x", "b": "x"})


def test_which_interface_is_meant(door):
    with InferenceServer(0) as server:
        assert server.open_door(ADDRESS) == ADDRESS + ":0"
        with pytest.raises(ValueError, match="which interface does local"):
            server.start(threaded=True)
    with InferenceServer(0, doors=[ADDRESS]) as server:
        server.register_interface("a", lambda x: x)
        server.register_interface("b", lambda x: x)
        with pytest.raises(ValueError, match=r"There are a, b, .*open_door"):
            server.start(threaded=True)
    with InferenceServer(0, doors=[ADDRESS]) as server:
        server.register_interface("a", lambda x: 1)
        server.register_interface("policy", lambda x: 2)
        with server.serving():
            assert ask(door.enter(), None).result(10) == 2
            with pytest.raises(UnknownInterface, match="known: a, policy"):
                server.open_door(ADDRESS, "c")


def test_a_door_may_be_opened_while_the_server_runs(door):
    with InferenceServer(0) as server:
        server.register_interface("a", lambda x: 1)
        with server.serving():
            assert server.doors() == []
            assert server.open_door(ADDRESS) == "local://127.0.0.1:4321"
            assert ask(door.enter(), None).result(10) == 1
            with pytest.raises(OSError, match="taken"):
                server.open_door(ADDRESS + ":1")
            assert server.doors() == ["local://127.0.0.1:4321"]
        assert door.opened[0][1].closed
        with pytest.raises(RuntimeError, match="stopped"):
            server.open_door(ADDRESS)


def test_doors_are_advertised_as_the_server_is(door):
    with InferenceServer(0, doors=[ADDRESS], advertise="robot.example:99") as server:
        server.register_interface("a", lambda x: 1)
        with server.serving():
            assert server.url == "zmq://robot.example:99"
            assert server.doors() == ["local://robot.example:4321"]


def test_a_door_that_can_not_be_opened_stops_the_start(door):
    with InferenceServer(0, doors=[ADDRESS + ":1"]) as server:
        server.register_interface("a", lambda x: 1)
        with pytest.raises(OSError, match="taken"):
            server.start(threaded=True)
    with pytest.raises(
        PluginError, match=r"there is no door 'nothing'.*pip install edgeml-nothing"
    ):
        InferenceServer(0, doors=["nothing://127.0.0.1:0"])
    with pytest.raises(ValueError, match="list of URLs"):
        InferenceServer(0, doors=ADDRESS)


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ValueError, "timeout", {"timeout": 0}),
        (TypeError, "a dict of texts", {"names": ["a"]}),
        (TypeError, "a dict of texts", {"names": {"a": 1}}),
        (TypeError, "before needs a function", {"before": 3}),
        (TypeError, "after needs a function", {"after": "x"}),
        (TypeError, "a dict of what clients are told", {"metadata": [1]}),
        (TypeError, "at a URL such as", {"url": 8000}),
        (ValueError, "is not a URL", {"url": "8000"}),
    ],
)
def test_a_door_is_asked_for_in_one_way(door, error, match, settings):
    with InferenceServer(0) as server, pytest.raises(error, match=match):
        server.open_door(**{"url": ADDRESS, **settings})


def test_a_function_that_hangs_keeps_no_guest_waiting(door):
    go_on = threading.Event()

    def hang(payload):
        assert go_on.wait(20)
        return payload

    with InferenceServer(0) as server:
        server.register_interface("a", hang)
        server.open_door(ADDRESS, timeout=0.3)
        with server.serving():
            guest = door.enter()
            with took(at_most=5.0, at_least=0.3):
                first, second = ask(guest, 1), ask(guest, 2)  # which never begins
                for future in (first, second):
                    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
                        future.result(10)
            go_on.set()
            assert ask(guest, 3, timeout=10).result(10) == 3
            wait_until(lambda: server.stats()["answered_too_late"] == 1)
            assert server.stats()["DeadlineExceeded"] == 1  # the one that never began


def test_a_result_that_can_not_be_encoded_is_an_error(door, server):
    def encode(result):
        raise TypeError("no such type")

    server.register_interface("a", lambda x: x)
    with server.serving():
        guest = door.enter()
        with pytest.raises(RemoteError, match="no such type"):
            ask(guest, 1, encode=encode).result(10)
        assert ask(guest, 1).result(10) == 1


def test_what_can_not_be_decoded_is_malformed(door, server):
    def decode():
        raise Malformed("no such bytes")

    server.register_interface("a", lambda x: x)
    with server.serving():
        guest = door.enter()
        with pytest.raises(Malformed, match="no such bytes"):
            ask(guest, decode).result(10)


def test_sessions_are_each_guests_own_and_end_with_it(door, server):
    ended = []

    def count(payload, context):
        if not context.session:
            context.on_end(lambda: ended.append(context.label))
        context.session["n"] = context.session.get("n", 0) + 1
        return context.session["n"]

    server.register_interface("a", count)
    with server.serving():
        one, two = door.enter(1, label="one"), door.enter(1, label="two")
        assert [ask(one, 0).result(10) for _ in range(3)] == [1, 2, 3]
        assert ask(two, 0).result(10) == 1
        one.begin_episode("second")
        assert ask(one, 0).result(10) == 1
        wait_until(lambda: ended == ["one"])
        assert "two at there:1" in {peer.address for peer in server.clients()}
        two.leave()
        two.leave()
        wait_until(lambda: ended == ["one", "two"])
        assert len(server.clients()) == 1
        with pytest.raises(Closed, match="has left"):
            ask(two, 0).result(10)


def test_silence_is_leaving_where_the_door_says_so(door, server):
    server.register_interface("a", lambda x: x)
    with server.serving():
        silent, patient = door.enter(1, forget=0.3), door.enter(2)
        assert ask(silent, 1).result(10) == 1
        wait_until(lambda: silent.left)
        assert not patient.left
        assert ask(patient, 1).result(10) == 1


def test_what_waits_of_a_guest_that_left_is_not_run(door, server):
    entered, go_on, ran = threading.Event(), threading.Event(), []

    def act(payload):
        entered.set()
        assert go_on.wait(20)
        ran.append(payload)
        return payload

    server.register_interface("a", act)
    with server.serving():
        guest, other = door.enter(1), door.enter(2)
        first = ask(guest, 1)
        assert entered.wait(10)
        second, third = ask(guest, 2), ask(other, 3)
        guest.leave()
        go_on.set()
        assert third.result(10) == 3
        for future in (first, second):
            with suppress(DeadlineExceeded):
                future.result(10)
        assert ran == [1, 3]


def test_a_server_that_is_not_ready_says_so(door, server):
    go_on = threading.Event()
    server.load(lambda report: go_on.wait(20))
    server.register_interface("a", lambda x: x)
    with server.serving():
        wait_until(lambda: door.dispatch.state.state == "loading")
        guest = door.enter()
        with pytest.raises(NotReady, match="loading"):
            ask(guest, 1).result(10)
        go_on.set()
        wait_until(lambda: door.dispatch.state.state == "ready")
        assert ask(guest, 1).result(10) == 1


def test_draining_answers_what_there_is(door, server):
    entered, go_on = threading.Event(), threading.Event()

    def act(payload):
        entered.set()
        assert go_on.wait(20)
        return payload

    server.register_interface("a", act)
    with server.serving():
        guest = door.enter()
        first = ask(guest, 1)
        assert entered.wait(10)
        drained = []
        thread = threading.Thread(target=lambda: drained.append(server.drain(20)))
        thread.start()
        wait_until(lambda: door.dispatch.state.state == "draining")
        time.sleep(0.15)  # what may have been under way as it began
        with pytest.raises(NotReady, match="draining"):
            ask(guest, 2).result(10)
        with pytest.raises(NotReady, match="draining"):
            door.enter(2)
        go_on.set()
        assert first.result(10) == 1
        thread.join(10)
        assert drained == [True]
        with pytest.raises(Closed):
            door.enter(3)


def test_who_waits_as_the_server_stops_is_told(door, server):
    entered, go_on = threading.Event(), threading.Event()

    def act(payload):
        entered.set()
        go_on.wait(20)

    server.register_interface("a", act)
    with server.serving():
        guest = door.enter()
        running, waiting = ask(guest, 1), ask(guest, 2)
        assert entered.wait(10)
        server.stop()
        for future in (running, waiting):
            with pytest.raises(Closed, match="stopped"):
                future.result(0)
        go_on.set()


def test_guests_have_limits_as_others_have(door):
    limits = Limits(sessions_per_connection=2, sessions_per_address=3, calls_per_client=2)
    entered, go_on = threading.Event(), threading.Event()

    def act(payload):
        entered.set()
        assert go_on.wait(20)
        return payload

    with InferenceServer(0, doors=[ADDRESS], limits=limits) as server:
        server.register_interface("a", act)
        with server.serving():
            guest = door.enter(1)
            door.enter(1)
            with pytest.raises(Overloaded, match="on this connection"):
                door.enter(1)
            door.enter(2).leave()
            door.enter(3)
            with pytest.raises(Overloaded, match="at there"):
                door.enter(4)
            running = ask(guest, 0)
            assert entered.wait(10)
            futures = [ask(guest, n) for n in range(1, 4)]
            with pytest.raises(Overloaded, match="of this client"):
                futures[-1].result(10)
            go_on.set()
            assert [f.result(10) for f in (running, *futures[:2])] == [0, 1, 2]


def test_the_contract_is_told_and_checked(door, server):
    contract = PolicyContract(
        observation={"state": Feature((3,), "float32")}, action=Feature((2,), "float32")
    )
    server.register_interface("policy", lambda x: x["state"][:2], contract=contract)
    server.register_interface("other", lambda x: x)
    with server.serving():
        assert door.dispatch.contract() == contract.to_plain()
        guest = door.enter()
        with pytest.raises(Malformed, match="does not take this"):
            ask(guest, {"state": np.zeros(4, np.float32)}).result(10)
        assert ask(guest, {"state": np.zeros(3, np.float32)}).result(10).shape == (2,)
        server.open_door(ADDRESS, "policy", names={"observation/state": "state"})
        told = door.dispatch.contract()
        assert told["observation"] == {"observation/state": {"shape": [3], "dtype": "float32"}}
        assert told["action"] == contract.to_plain()["action"]
        server.open_door(ADDRESS, "other", metadata={"robot": "arm"}, timeout=3)
        assert door.dispatch.contract() is None
        assert door.dispatch.metadata == {"robot": "arm"}
        assert (door.dispatch.interface, door.dispatch.timeout) == ("other", 3)


def test_guests_show_the_tokens_of_their_keys(door, tmp_path):
    keys = make_keys(tmp_path)
    watcher = make_client_keys(keys["server"], "watcher", role="observe")
    credentials = Credentials.load(keys["server"])

    def token(name):
        return Credentials.load(name).token

    with InferenceServer(0, doors=[ADDRESS], credentials=credentials) as server:
        server.register_interface("a", lambda x, context: context.identity)
        with server.serving():
            assert door.opened[-1][2] is not None
            for wrong in (None, "", "wrong"):
                with pytest.raises(PermissionDenied):
                    door.enter(token=wrong)
            guest = door.enter(token=token(keys["robot"]))
            assert guest.peer.identity == "robot"
            assert ask(guest, 1).result(10) == "robot"
            with pytest.raises(PermissionDenied, match="lacks call:a"):
                ask(door.enter(2, token=token(watcher)), 1).result(10)
            credentials.clients.revoke("robot")
            wait_until(lambda: guest.left)
            with pytest.raises(PermissionDenied, match="revoked"):
                ask(guest, 1).result(10)


def test_a_door_that_sends_clear_text_lets_no_keys_be_read(door, tmp_path, caplog):
    keys = make_keys(tmp_path)["server"]
    everywhere = "local://0.0.0.0"
    with InferenceServer(0, doors=[everywhere], credentials=keys) as server:
        server.register_interface("a", lambda x: x)
        with pytest.raises(PermissionDenied, match="can't be protected by keys"):
            server.start(threaded=True)
    assert door.opened[-1][1].closed
    door.secured = True
    with InferenceServer(0, doors=[everywhere], credentials=keys) as server:
        server.register_interface("a", lambda x: x)
        with server.serving():
            assert server.doors() == ["local://0.0.0.0:4321"]
    door.secured = False
    with InferenceServer(0, doors=[everywhere]) as server:
        server.register_interface("a", lambda x: x)
        caplog.clear()
        with server.serving():
            assert "WHOEVER REACHES THIS MACHINE CAN USE IT" in caplog.text


def test_a_server_with_doors_that_is_dropped_is_noticed(door):
    held = [InferenceServer(0, doors=[ADDRESS])]
    held[0].register_interface("a", lambda x: x)
    held[0].start(threaded=True)
    gone = weakref.ref(held[0])

    def drop():
        held.clear()
        gc.collect()

    with pytest.warns(ResourceWarning):
        drop()
    assert gone() is None
    wait_until(lambda: door.opened[-1][1].closed)


def test_urls_of_doors_are_parsed():
    assert Url.parse("openpi://0.0.0.0:8000") == Url("openpi", "0.0.0.0", 8000)
