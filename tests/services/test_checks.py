"""Contracts over the wire: what differs is refused before anything moves, and calls are checked."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import numpy as np
import pytest

from edgeml import (
    ConfigMismatch,
    Feature,
    InferenceClient,
    InferenceServer,
    Malformed,
    PolicyContract,
    RemoteError,
    UnknownInterface,
)
from edgeml.core import Url
from edgeml.core.client import Client
from edgeml.core.dispatch import answer_with
from edgeml.core.server import Server
from edgeml.services.batching import Batching
from pairs import free_port, plain_client, started, stop_server, wait_until

JOINTS = ("shoulder", "elbow", "wrist")
STATE = Feature(3, "float32", names=JOINTS, units="rad", kind="state")
FRONT = Feature((8, 8, 3), "uint8", kind="image")
ACTION = Feature((5, 3), "float32", names=JOINTS, units="rad", kind="action")
CONTRACT = PolicyContract(
    {"front": FRONT, "state": STATE, "task": Feature((), str)},
    ACTION,
    rate=50.0,
    horizon=5,
    identity="sha256:1f",
    metadata={"robot": "so100"},
)
PAYLOAD = {
    "front": np.zeros((8, 8, 3), np.uint8),
    "state": np.zeros(3, np.float32),
    "task": "pick",
}


class Policy:
    """Gives actions of zeros, and knows what it was given."""

    def __init__(self, result=None):
        self.seen = []
        self.result = np.zeros((5, 3), np.float32) if result is None else result

    def __call__(self, payload):
        self.seen.append(payload)
        return self.result


@pytest.fixture
def policy():
    return Policy()


@pytest.fixture
def server(transport, policy):
    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("policy", policy, contract=CONTRACT)
        server.register_interface("free", lambda payload: payload)
        yield server


def connect(server, **settings):
    return InferenceClient(url=server.url, **settings)


# What a server states -------------------------------------------------------------------------


def test_a_client_reads_the_contract_of_an_interface(server):
    with connect(server) as client:
        assert client.contract("policy") == CONTRACT
        assert client.contract("free") is None
        with pytest.raises(UnknownInterface, match=r"'other'.*free.*policy"):
            client.contract("other")


def test_what_is_asked_for_by_no_name_is_malformed(server):
    with plain_client(server) as client:
        for payload in (None, 3, ["policy"]):
            with pytest.raises(Malformed):
                client.call("/contract", payload)


def test_what_is_no_contract_is_refused_when_it_is_registered(server):
    with pytest.raises(TypeError, match="PolicyContract"):
        server.register_interface("a", Policy(), contract=CONTRACT.to_plain())
    with pytest.raises(ValueError, match='"first", "all" or "none"'):
        server.register_interface("a", Policy(), contract=CONTRACT, check="often")
    with connect(server) as client:
        assert client.interfaces() == ["free", "policy"]


# What a client expects ------------------------------------------------------------------------


def with_state(**changes):
    state = dataclasses.replace(STATE, **changes)
    return {**CONTRACT.observation, "state": state}


def without(key):
    return {name: part for name, part in CONTRACT.observation.items() if name != key}


WRONG = {
    "joint order": (
        {"observation": with_state(names=("elbow", "shoulder", "wrist"))},
        r"observation\['state'\]: the order of names: at 0 expected 'elbow', .* 'shoulder'",
    ),
    "joint order of the action": (
        {"action": dataclasses.replace(ACTION, names=("elbow", "shoulder", "wrist"))},
        r"action: the order of names",
    ),
    "rate": ({"rate": 30.0}, r"rate: expected 30.0, the server has 50.0"),
    "unit": ({"observation": with_state(units="deg")}, r"units: expected 'deg', .* has 'rad'"),
    "dtype": ({"observation": with_state(dtype="float64")}, r"dtype: expected 'float64'"),
    "shape": ({"action": Feature((5, 4), "float32")}, r"action: expected shape \(5, 4\)"),
    "horizon": ({"horizon": 8, "action": None}, r"horizon: expected 8, the server has 5"),
    "identity": ({"identity": "sha256:2e"}, r"identity: expected 'sha256:2e'"),
    "name": (
        {"observation": {**without("front"), "camera": FRONT}},
        r"\['camera'\].*only 'front'.*\['front'\]: the policy needs",
    ),
    "missing camera": (
        {"observation": without("front")},
        r"observation\['front'\]: the policy needs .* the client states none",
    ),
    "camera that the policy lacks": (
        {"observation": {**CONTRACT.observation, "wrist": FRONT}},
        r"observation\['wrist'\]: expected",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_client_that_expects_something_else_is_refused_before_the_first_action(
    server, policy, what
):
    changes, said = WRONG[what]
    expected = dataclasses.replace(CONTRACT, **changes)
    with pytest.raises(ConfigMismatch, match=said) as raised:
        connect(server, expect={"policy": expected})
    assert "interface 'policy'" in str(raised.value)
    assert policy.seen == []
    assert server.clients() == []


def test_a_client_that_expects_what_there_is_is_served(server, policy):
    for expected in (CONTRACT, PolicyContract(), PolicyContract(rate=50)):
        with connect(server, expect={"policy": expected}) as client:
            assert client.call("policy", PAYLOAD).shape == (5, 3)
    assert len(policy.seen) == 3


def test_all_that_differs_is_told_at_once(server):
    expected = dataclasses.replace(
        CONTRACT, rate=30, observation=with_state(units="deg"), action=None, horizon=None
    )
    with pytest.raises(ConfigMismatch, match=r"units.*rate") as raised:
        connect(server, expect={"policy": expected, "other": CONTRACT})
    assert "an interface 'other'; the server has free, policy" in str(raised.value)


def test_what_is_expected_of_an_interface_without_a_contract_is_refused(server):
    with pytest.raises(ConfigMismatch, match="'free' has no contract"):
        connect(server, expect={"free": CONTRACT})
    with pytest.raises(ConfigMismatch, match="'other'; the server has free, policy"):
        connect(server, expect={"other": PolicyContract()})


@pytest.mark.parametrize("expect", [CONTRACT, [CONTRACT], {"policy": {}}, {3: CONTRACT}])
def test_what_is_no_expectation_is_refused_before_anything_is_sent(expect):
    with pytest.raises(TypeError, match="expect"):
        InferenceClient(url="inproc://nowhere", expect=expect)


@pytest.mark.parametrize(
    "forged",
    [
        None,
        [1],
        {"policy": None},
        {"policy": {"observation": {"x": {"shape": [-1], "dtype": "float32"}}}},
        {"policy": {"limits": 3}},
        {"policy": {"observation": {"x": {"shape": [1], "dtype": "os.system"}}}},
        {3: {}},
    ],
)
def test_a_forged_expectation_is_malformed(server, policy, forged):
    with pytest.raises(Malformed):
        Client("inference", [Url.parse(server.url)], extensions={"contracts": forged})
    with connect(server) as client:  # and hurts nobody
        assert client.call("policy", PAYLOAD).shape == (5, 3)


def test_a_server_that_compares_no_contracts_is_refused(transport):
    """One that is older: it passes over what it doesn't know."""
    url = Url.parse(f"{transport}://127.0.0.1:0" if transport != "inproc" else "inproc://old")
    old = Server("inference", [url])
    old.register("policy", answer_with(lambda payload, _: payload))
    old.open()
    old.dispatcher.start()
    try:
        with pytest.raises(ConfigMismatch, match="knows nothing of contracts"):
            InferenceClient(url=str(old.urls[0]), expect={"policy": CONTRACT})
        with InferenceClient(url=str(old.urls[0])) as client:
            assert client.call("policy", 3) == 3
    finally:
        old.close()


def serve(transport, port, contract, policy):
    server = InferenceServer(port, transport=transport)
    server.register_interface("policy", policy, contract=contract)
    server.start(threaded=True)
    return server


def test_a_server_that_comes_back_with_another_contract_is_refused_before_an_action(transport):
    first, second = Policy(), Policy()
    port = free_port()
    server = serve(transport, port, CONTRACT, first)
    with InferenceClient("127.0.0.1", port, transport, expect={"policy": CONTRACT}) as client:
        client.call("policy", PAYLOAD)
        stop_server(server, client)
        other = dataclasses.replace(CONTRACT, rate=30.0)
        with serve(transport, port, other, second) as again:
            for _ in range(3):
                with pytest.raises(ConfigMismatch, match=r"rate: expected 50.0, .* 30.0"):
                    client.call("policy", PAYLOAD)
            with pytest.raises(ConfigMismatch, match="rate"):
                client.call_async("policy", PAYLOAD).result(10)
            assert second.seen == []
            assert again.clients() == []
        with serve(transport, port, CONTRACT, first):  # the right one, in the end
            assert client.call("policy", PAYLOAD).shape == (5, 3)
    assert len(first.seen) == 2


# Calls ----------------------------------------------------------------------------------------

MISFITS = {
    "missing camera": ({"state": PAYLOAD["state"], "task": "pick"}, r"\['front'\]: missing"),
    "dtype": ({**PAYLOAD, "state": np.zeros(3)}, r"\['state'\]: .*float32, got .*float64"),
    "shape": ({**PAYLOAD, "state": np.zeros(4, np.float32)}, r"\['state'\]: .*\(3,\).*\(4,\)"),
    "text": ({**PAYLOAD, "task": 3}, r"\['task'\]: expected text"),
    "no dict": (PAYLOAD["state"], r"observation: expected a dict"),
    "nothing": (None, r"observation: expected a dict"),
}


@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("check", ["first", "all"])
def test_a_payload_that_does_not_fit_never_reaches_the_function(server, check, what):
    payload, said = MISFITS[what]
    policy = Policy()
    server.register_interface("checked", policy, contract=CONTRACT, check=check)
    with connect(server) as client:
        for _ in range(2):  # a call that was refused was not the first
            with pytest.raises(Malformed, match=said) as raised:
                client.call("checked", payload)
            assert "interface 'checked'" in str(raised.value)
        with pytest.raises(Malformed, match=said):
            client.call_async("checked", payload).result(10)
        assert policy.seen == []
        assert client.call("checked", PAYLOAD).shape == (5, 3)


def test_what_is_sent_beyond_the_contract_arrives(server, policy):
    with connect(server) as client:
        client.call("policy", {**PAYLOAD, "wrist": 3})
    assert policy.seen[0]["wrist"] == 3


@pytest.mark.parametrize(("check", "refused"), [("first", False), ("all", True), ("none", False)])
def test_later_calls_are_checked_as_asked(server, check, refused):
    policy = Policy()
    server.register_interface("checked", policy, contract=CONTRACT, check=check)
    with connect(server) as client:
        client.call("checked", PAYLOAD)
        policy.result = np.zeros((4, 3), np.float32)
        if refused:
            with pytest.raises(Malformed):
                client.call("checked", None)
            with pytest.raises(RemoteError, match=r"action: expected shape \(5, 3\)"):
                client.call("checked", PAYLOAD)
        else:
            assert client.call("checked", None).shape == (4, 3)


def test_nothing_is_checked_where_that_is_asked(server):
    policy = Policy("anything")
    server.register_interface("unchecked", policy, contract=CONTRACT, check="none")
    with connect(server, expect={"unchecked": CONTRACT}) as client:
        assert client.call("unchecked", None) == "anything"
    with pytest.raises(ConfigMismatch, match="rate"):
        connect(server, expect={"unchecked": PolicyContract(rate=3)})


def test_the_first_call_of_each_client_is_checked(server, policy):
    with connect(server) as one, connect(server) as other:
        one.call("policy", PAYLOAD)
        with pytest.raises(Malformed, match="front"):
            other.call("policy", {})
    assert len(policy.seen) == 1


@pytest.mark.parametrize("check", ["first", "all"])
@pytest.mark.parametrize(
    "result",
    [
        np.zeros((5, 4), np.float32),
        np.zeros((4, 3), np.float32),
        np.zeros((5, 3)),
        [[0.0] * 3] * 5,
        {"action": np.zeros((5, 3), np.float32)},
        "nothing",
    ],
    ids=["axis", "horizon", "dtype", "list", "dict", "text"],
)
def test_a_result_that_does_not_fit_is_not_given(server, check, result):
    policy = Policy(result)
    server.register_interface("checked", policy, contract=CONTRACT, check=check)
    with connect(server) as client:
        for _ in range(2):
            with pytest.raises(RemoteError, match=r"'checked' returned .* action: expected shape"):
                client.call("checked", PAYLOAD)
        policy.result = np.zeros((5, 3), np.float32)
        assert client.call("checked", PAYLOAD).shape == (5, 3)


def test_functions_of_any_form_are_checked(server):
    @server.register_interface("decorated", contract=CONTRACT)
    def act(payload, context):
        return np.zeros((5, 3), np.float32)

    with connect(server, expect={"decorated": CONTRACT}) as client:
        assert client.contract("decorated") == CONTRACT
        with pytest.raises(Malformed, match="front"):
            client.call("decorated", {})
        assert client.call("decorated", PAYLOAD).shape == (5, 3)


# Swaps ----------------------------------------------------------------------------------------


def test_a_swap_keeps_the_contract_and_checks_anew(server):
    with connect(server, expect={"policy": CONTRACT}) as client:
        client.call("policy", PAYLOAD)
        server.swap("policy", Policy("wrong"))
        assert client.contract("policy") == CONTRACT
        with pytest.raises(RemoteError, match="action: expected"):
            client.call("policy", PAYLOAD)


def test_a_swap_to_another_contract_refuses_those_who_expect_the_old(server):
    other = dataclasses.replace(CONTRACT, rate=30.0, identity="sha256:2e")
    new = Policy(np.ones((5, 3), np.float32))
    with (
        connect(server, expect={"policy": CONTRACT}) as strict,
        connect(server, expect={"policy": PolicyContract(action=ACTION)}) as open_minded,
        connect(server) as indifferent,
    ):
        for client in (strict, open_minded, indifferent):
            client.call("policy", PAYLOAD)
        server.swap("policy", new, contract=other)
        assert strict.contract("policy") == other
        for _ in range(2):
            with pytest.raises(ConfigMismatch, match=r"rate: expected 50.0.*identity"):
                strict.call("policy", PAYLOAD)
        assert new.seen == []
        for client in (open_minded, indifferent):
            assert client.call("policy", PAYLOAD)[0, 0] == 1
        with pytest.raises(ConfigMismatch, match="rate"):
            connect(server, expect={"policy": CONTRACT})
        with connect(server, expect={"policy": other}) as newcomer:
            assert newcomer.call("policy", PAYLOAD)[0, 0] == 1
        assert strict.call("free", 3) == 3  # of which it expects nothing
        server.swap("policy", new, contract=CONTRACT)
        assert strict.call("policy", PAYLOAD)[0, 0] == 1


def test_a_contract_may_come_with_a_swap(server):
    with connect(server) as client:
        assert client.call("free", 3) == 3
        server.swap("free", Policy(), contract=CONTRACT)
        assert client.contract("free") == CONTRACT
        with pytest.raises(Malformed, match="observation"):
            client.call("free", 3)


def test_no_client_is_served_by_a_policy_that_it_does_not_expect(server):
    """However hellos, calls and swaps fall together."""
    slow = dataclasses.replace(CONTRACT, rate=30.0)
    results = {
        50.0: (CONTRACT, Policy(np.full((5, 3), 50, np.float32))),
        30.0: (slow, Policy(np.full((5, 3), 30, np.float32))),
    }
    server.swap("policy", results[50.0][1], contract=CONTRACT)
    done = threading.Event()
    wrong = []

    def swap():
        while not done.is_set():
            for rate in (30.0, 50.0):
                contract, policy = results[rate]
                server.swap("policy", policy, contract=contract)

    def drive(rate):
        served = 0
        for _ in range(15):
            try:
                with connect(server, expect={"policy": results[rate][0]}) as client:
                    for _ in range(10):
                        got = client.call("policy", PAYLOAD)[0, 0]
                        served += 1
                        if got != rate:
                            wrong.append((rate, got))
            except ConfigMismatch:
                pass
        return served

    swapper = threading.Thread(target=swap)
    drivers = [threading.Thread(target=drive, args=(rate,)) for rate in results]
    for thread in (swapper, *drivers):
        thread.start()
    for thread in drivers:
        thread.join()
    done.set()
    swapper.join()
    assert wrong == []


# Batches --------------------------------------------------------------------------------------


class Batched:
    """Gives each row of a batch its place in the state, and may be held up."""

    def __init__(self, mark=0.0, steps=5):
        self.mark, self.steps = mark, steps
        self.rows = []
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, batch):
        self.entered.release()
        assert self.go_on.wait(30)
        self.rows += batch["state"][:, 0].tolist()
        action = np.zeros((len(batch["state"]), self.steps, 3), np.float32)
        action[:] = batch["state"][:, None, :] + self.mark
        return action


def numbered(number, **changes):
    return {**PAYLOAD, "state": np.full(3, number, np.float32), **changes}


@pytest.mark.parametrize("check", ["first", "all"])
def test_of_a_batch_each_call_is_checked_by_itself(server, check):
    batched = Batched()
    server.register_interface(
        "batched", batched, batching=Batching(max_size=4), contract=CONTRACT, check=check
    )
    batched.go_on.clear()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(4)]
        first = clients[0].call_async("batched", numbered(1))
        assert batched.entered.acquire(timeout=10)
        fits = clients[1].call_async("batched", numbered(2))
        lacks = clients[2].call_async("batched", {"state": np.zeros(3, np.float32)})
        wrong = clients[3].call_async("batched", numbered(4, state=np.zeros(4, np.float32)))
        with pytest.raises(Malformed, match=r"\['front'\]: missing"):
            lacks.result(10)
        with pytest.raises(Malformed, match=r"\['state'\]: expected"):
            wrong.result(10)
        batched.go_on.set()
        assert first.result(10)[0, 0] == 1
        assert fits.result(10)[0, 0] == 2
    assert sorted(batched.rows) == [1, 2]


def test_of_a_batchs_result_each_row_is_checked(server):
    server.register_interface(
        "batched", Batched(steps=4), batching=Batching(max_size=4), contract=CONTRACT
    )
    with connect(server) as client:
        futures = [client.call_async("batched", numbered(n)) for n in range(3)]
        for future in futures:
            with pytest.raises(RemoteError, match=r"action: expected shape \(5, 3\) .* \(4, 3\)"):
                future.result(10)


def test_calls_that_wait_in_a_batch_while_the_contract_changes(server):
    """Each is answered by a policy that it was made for, or told that it was not carried out."""
    old, new = Batched(), Batched(mark=100)
    old.go_on.clear()
    server.register_interface("batched", old, batching=Batching(max_size=4), contract=CONTRACT)
    expected = {"batched": CONTRACT}
    with connect(server, expect=expected) as strict, connect(server) as indifferent:
        running = strict.call_async("batched", numbered(1))
        assert old.entered.acquire(timeout=10)
        waiting = strict.call_async("batched", numbered(2))
        other = indifferent.call_async("batched", numbered(3))
        wait_until(lambda: server.stats()["waiting"] == 2)
        server.swap("batched", new, contract=dataclasses.replace(CONTRACT, identity="sha256:2e"))
        old.go_on.set()
        assert running.result(10)[0, 0] == 1
        with pytest.raises(ConfigMismatch, match="identity"):
            waiting.result(10)
        assert other.result(10)[0, 0] == 103  # for it the observation is the same
        assert strict.call("free", 1) == 1
        assert new.entered.acquire(timeout=10)

        new.go_on.clear()
        running = indifferent.call_async("batched", numbered(4))
        assert new.entered.acquire(timeout=10)
        waiting = indifferent.call_async("batched", numbered(5))
        wait_until(lambda: server.stats()["waiting"] == 1)
        narrower = dataclasses.replace(CONTRACT, observation=without("task"))
        server.swap("batched", Batched(), contract=narrower)
        new.go_on.set()
        assert running.result(10)[0, 0] == 104
        with pytest.raises(ConfigMismatch, match="another contract while this call waited"):
            waiting.result(10)
        assert indifferent.call("batched", numbered(6))[0, 0] == 6


def test_an_example_that_does_not_fit_is_refused_before_the_warm_up(server, policy):
    with pytest.raises(ValueError, match=r"\['front'\]: missing"):
        server.warmup("policy", {})
    assert policy.seen == []
    server.warmup("policy", PAYLOAD)
    assert len(policy.seen) == 1
