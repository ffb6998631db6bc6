"""A candidate that is asked what the real server is, and whose answers are only compared."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from edgeml import (
    DeadlineExceeded,
    InferenceClient,
    InferenceServer,
    PluginError,
    PolicyContract,
    RemoteError,
    aio,
)
from edgeml.services.shadow import compare
from pairs import (
    free_port,
    no_thread_left,
    process,
    run_fresh,
    session_of,
    started,
    took,
    wait_until,
)

OBSERVATION = {"image": np.zeros((224, 224, 3), np.uint8), "state": np.arange(3.0)}


def serve(transport, policy=None, port=0, **settings):
    server = InferenceServer(url=f"{transport}://127.0.0.1:{port}", **settings)
    server.asked = []

    def note(payload):
        server.asked.append(payload)
        return {"actions": payload["state"] * 2, "task": "pick"}

    server.register_interface("policy", policy or note)
    return started(server)


@contextmanager
def client_of(real, candidate, **settings):
    """A client with a shadow, once that is there."""
    with InferenceClient(url=real.url, shadow=candidate.url, **settings) as client:
        wait_until(lambda: shadow_of(client)["connected"])
        yield client


def shadow_of(client):
    return client.stats()["shadow"]


def await_answers(client, number):
    wait_until(lambda: shadow_of(client)["answered"] >= number)


def ask_until(client, condition, payload=OBSERVATION):
    """Go on calling until something holds of the shadow; every real call has its answer."""

    def call():
        assert client.call("policy", payload, 20)["task"] == "pick"
        return condition(shadow_of(client))

    wait_until(call)


@pytest.fixture
def real(transport):
    with serve(transport) as server:
        yield server


# What comes of it -----------------------------------------------------------------------------


def test_the_real_answers_are_returned_and_the_candidates_compared(real, transport):
    def policy(payload):
        return {"actions": payload["state"] * 2 + [0.0, 0.25, 0.5], "task": "place"}

    with serve(transport, policy) as candidate, client_of(real, candidate) as client:
        for number in range(3):
            answer, timing = client.call("policy", OBSERVATION, timing=True)
            np.testing.assert_equal(answer, {"actions": np.arange(3.0) * 2, "task": "pick"})
            assert timing.compute > 0
            await_answers(client, number + 1)
        future = client.call_async("policy", OBSERVATION)
        assert future.result(20)["task"] == "pick"
        assert future.timing.round_trip > 0
        await_answers(client, 4)
        assert shadow_of(client) == {
            "connected": True,
            "asked": 4,
            "answered": 4,
            "failed": {},
            "skipped": 0,
            "last_error": None,
            "different_structure": 0,
            "differences": {
                "policy['actions']": {"max": 0.5, "mean": 0.25, "last": 0.5},
                "policy['task']": {"max": 1.0, "mean": 1.0, "last": 1.0},
            },
            "leaves_left_out": 0,
        }


def test_a_client_without_a_shadow_says_nothing_of_one(real):
    with InferenceClient(url=real.url) as client:
        assert "shadow" not in client.stats()


def test_the_candidate_gets_what_the_real_server_got_whatever_users_do_with_it_later(
    real, transport
):
    payload = {"image": np.zeros((224, 224, 3), np.uint8), "state": np.zeros(3)}
    with (
        serve(transport) as candidate,
        client_of(real, candidate, writable=True) as client,
    ):
        for number in range(10):
            payload["image"][:] = number
            payload["state"][:] = number
            if number % 2:
                answer = client.call("policy", payload)
            else:
                future = client.call_async("policy", payload)
                payload["image"][:] = payload["state"][:] = 77
                answer = future.result(20)
            payload["image"][:] = payload["state"][:] = 99
            answer["actions"][:] = 111  # as writable answers may be
            answer.clear()
            await_answers(client, number + 1)
        assert [int(asked["image"].min()) for asked in candidate.asked] == list(range(10))
        assert [int(asked["image"].max()) for asked in candidate.asked] == list(range(10))
        differences = shadow_of(client)["differences"]
        assert {each["max"] for each in differences.values()} == {0.0}


def test_a_slow_candidate_is_asked_one_thing_at_a_time_and_the_newest_when_it_is_free(
    real, transport
):
    go_on, asked = threading.Semaphore(0), []

    def slow(payload):
        asked.append(payload["state"][0])
        go_on.acquire(timeout=60)
        return {"actions": payload["state"], "task": "pick"}

    with serve(transport, slow) as candidate, client_of(real, candidate) as client:
        client.call("policy", {"state": np.full(1, 0.0)})
        wait_until(lambda: asked)
        with took(at_most=10):
            for number in range(1, 20):
                client.call("policy", {"state": np.full(1, float(number))})
        told = shadow_of(client)
        assert (told["asked"], told["answered"], told["skipped"]) == (1, 0, 19)
        go_on.release()
        await_answers(client, 1)
        client.call("policy", {"state": np.full(1, 20.0)})
        wait_until(lambda: len(asked) == 2)
        assert asked == [0.0, 20.0]
        go_on.release()
        await_answers(client, 2)


def test_what_has_another_form_is_counted(real, transport):
    forms = iter(
        [
            {"actions": np.zeros(4), "task": "pick"},
            {"actions": np.zeros(3)},
            [1, 2],
            {"actions": np.arange(3.0) * 2, "task": "pick"},
        ]
    )
    with (
        serve(transport, lambda payload: next(forms)) as candidate,
        client_of(real, candidate) as client,
    ):
        for number in range(4):
            client.call("policy", OBSERVATION)
            await_answers(client, number + 1)
        told = shadow_of(client)
        assert told["different_structure"] == 3
        assert told["differences"]["policy['actions']"] == {"max": 0.0, "mean": 0.0, "last": 0.0}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("real", "candidate", "found"),
    [
        (1, 3, [("", 2.0, 2.0)]),
        (True, False, [("", 1.0, 1.0)]),
        (np.float32(1.5), 1, [("", 0.5, 0.5)]),
        (np.uint8([0, 255]), np.uint8([255, 255]), [("", 255.0, 127.5)]),
        (np.array([True, False]), np.array([True, True]), [("", 1.0, 0.5)]),
        (np.array(1 + 1j), np.array(1.0), [("", 1.0, 1.0)]),
        (np.array([NAN, INF, 1]), np.array([NAN, INF, 1]), [("", 0.0, 0.0)]),
        (np.array([NAN, 1]), np.array([1.0, 1]), [("", INF, INF)]),
        (np.array([INF]), np.array([-INF]), [("", INF, INF)]),
        (np.zeros((0, 3)), np.zeros((0, 3)), [("", 0.0, 0.0)]),
        (np.array(["a", "b"]), np.array(["a", "c"]), [("", 1.0, 1.0)]),
        ("text", "text", [("", 0.0, 0.0)]),
        (b"a", b"b", [("", 1.0, 1.0)]),
        (None, 0.0, [("", 1.0, 1.0)]),
        (2**80, 2**80, [("", 0.0, 0.0)]),
        ([0.0, 1.0], (0.5, 1.0), [("", 0.5, 0.25)]),
        ([], [], []),
        ({"a": [1, "x"], 3: {1, 2}}, {3: {1}, "a": [2, "x"]}, None),
        ({"a": 1}, {"b": 1}, "other"),
        ([1, 2], [1, 2, 3], "other"),
        ({"a": 1}, [1], "other"),
        (["a"], "a", "other"),
        ([1, 2.5], np.array([1, 2]), [("", 0.5, 0.25)]),
        (np.zeros(3), np.zeros((3, 1)), "other"),
        (np.zeros(3), 0.0, "other"),
    ],
)
def test_answers_are_apart_by(real, candidate, found):
    if found == "other":
        with pytest.raises(Exception, match=r"^$"):
            list(compare(real, candidate))
    elif found is None:
        expected = [("['a'][0]", 1.0, 1.0), ("['a'][1]", 0.0, 0.0), ("[3]", 1.0, 1.0)]
        assert list(compare(real, candidate)) == expected
    else:
        assert list(compare(real, candidate)) == found


def test_numbers_of_ml_dtypes_are_numbers():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    real = np.array([1.0, 2.0], ml_dtypes.bfloat16)
    assert list(compare({"a": real}, {"a": real + 1})) == [("['a']", 1.0, 1.0)]


def test_what_is_kept_of_answers_is_bounded(real, transport):
    real.register_interface("many", lambda keys: dict.fromkeys(keys, 1.0))
    with serve(transport) as candidate, client_of(real, candidate) as client:
        candidate.register_interface("many", lambda keys: dict.fromkeys(keys, 2.0))
        client.call("many", list(range(1200)))
        await_answers(client, 1)
        told = shadow_of(client)
        assert len(told["differences"]) == 1000
        assert told["leaves_left_out"] == 200


def test_on_shadow_is_called_with_both_answers_and_may_fail(real, transport, caplog):
    pairs = []

    def look(name, payload, ours, theirs):
        pairs.append((name, payload["state"].tolist(), ours["task"], theirs["task"]))
        raise KeyError("of the user")

    def policy(payload):
        return {"actions": payload["state"], "task": "place"}

    with (
        serve(transport, policy) as candidate,
        client_of(real, candidate, on_shadow=look) as client,
    ):
        for number in range(2):
            client.call("policy", OBSERVATION)
            await_answers(client, number + 1)
    assert pairs == [("policy", [0.0, 1.0, 2.0], "pick", "place")] * 2
    assert "on_shadow failed" in caplog.text


def test_the_candidate_begins_the_episodes_that_the_real_server_does(transport):
    def policy(payload, context):
        memory = context.session.setdefault("seen", [])
        memory.append(payload["step"])
        return {"episode": context.episode, "seen": list(memory)}

    with serve(transport, policy) as real, serve(transport, policy) as candidate:
        pairs = []
        with client_of(real, candidate, on_shadow=lambda *pair: pairs.append(pair[2:])) as client:
            for number, reset in enumerate([client.reset, None, client.reset_async, None]):
                if reset is not None:
                    begun = reset(f"episode {number}")
                    assert begun if isinstance(begun, str) else begun.result(20)
                client.call("policy", {"step": number})
                await_answers(client, number + 1)
        assert [ours for ours, _ in pairs] == [theirs for _, theirs in pairs]
        assert pairs[3][1]["seen"] == [2, 3]


def test_asyncio_has_it_too(real, transport):
    async def ask(url):
        async with aio.InferenceClient(url=real.url, shadow=url) as client:
            while not client.stats()["shadow"]["connected"]:
                await asyncio.sleep(0.01)
            answer, timing = await client.call("policy", OBSERVATION, timing=True)
            assert answer["task"] == "pick"
            assert timing.round_trip > 0
            while client.stats()["shadow"]["answered"] < 1:
                await asyncio.sleep(0.01)
            return client.stats()["shadow"]

    with serve(transport) as candidate:
        told = asyncio.run(asyncio.wait_for(ask(candidate.url), 60))
    assert told["differences"]["policy['actions']"]["max"] == 0.0


# Candidates that do not answer ----------------------------------------------------------------


def test_a_candidate_may_come_and_go(real, transport, caplog):
    caplog.set_level(logging.INFO, "edgeml.services.shadow")
    port = free_port()
    with InferenceClient(
        url=real.url, shadow=f"{transport}://127.0.0.1:{port}", timeout=20
    ) as client:
        ask_until(client, lambda told: told["skipped"] >= 3 and told["last_error"])
        assert shadow_of(client)["asked"] == 0
        assert "Unreachable" in shadow_of(client)["last_error"]
        for _ in range(2):
            before = shadow_of(client)["answered"]
            with serve(transport, port=port):
                ask_until(client, lambda told, before=before: told["answered"] >= before + 3)
                assert shadow_of(client)["last_error"] is None
            ask_until(client, lambda told: not told["connected"])
        told = shadow_of(client)
        assert told["asked"] == told["answered"] + sum(told["failed"].values())
    assert caplog.text.count("the shadow's candidate answers") == 2
    assert "the shadow's candidate does not answer: Unreachable" in caplog.text


def test_a_candidate_that_was_made_for_another_robot_is_asked_nothing(transport):
    ours = PolicyContract(rate=50.0)
    theirs = PolicyContract(rate=20.0)
    with (
        started(InferenceServer(url=f"{transport}://127.0.0.1:0")) as real,
        started(InferenceServer(url=f"{transport}://127.0.0.1:0")) as candidate,
    ):
        for server, contract in ((real, ours), (candidate, theirs)):
            server.register_interface("policy", lambda payload: payload, contract=contract)
        with InferenceClient(url=real.url, shadow=candidate.url, expect={"policy": ours}) as client:
            wait_until(lambda: shadow_of(client)["last_error"])
            assert "rate: expected 50.0, the server has 20.0" in shadow_of(client)["last_error"]
            assert client.call("policy", {"state": np.zeros(2, np.float32)}) is not None
            told = shadow_of(client)
            assert (told["asked"], told["skipped"]) == (0, 1)


def test_a_candidate_that_fails_is_counted_by_error_and_asked_again(real, transport):
    errors = iter([KeyError("of the candidate")])

    def policy(payload):
        error = next(errors, None)
        if error is not None:
            raise error
        return {"actions": payload["state"], "task": "pick"}

    real.register_interface("more", lambda payload: payload)
    with serve(transport, policy) as candidate, client_of(real, candidate) as client:
        ask_until(client, lambda told: told["failed"])
        assert "of the candidate" in shadow_of(client)["last_error"]
        ask_until(client, lambda told: told["answered"])
        assert shadow_of(client)["last_error"] is None
        wait_until(lambda: client.call("more", 1) == 1 and len(shadow_of(client)["failed"]) > 1)
        assert shadow_of(client)["failed"].keys() == {"RemoteError", "UnknownInterface"}
        assert shadow_of(client)["failed"]["RemoteError"] == 1


def test_what_the_real_server_did_not_answer_the_candidate_is_not_asked(real, transport):
    let_go = threading.Event()
    real.register_interface("wait", lambda payload: let_go.wait(60))
    real.register_interface("fail", lambda payload: 1 / 0)
    with serve(transport) as candidate, client_of(real, candidate) as client:
        with pytest.raises(RemoteError):
            client.call("fail", None)
        with pytest.raises(RemoteError):
            client.call_async("fail", None).result(20)
        with pytest.raises(DeadlineExceeded):
            client.call_async("wait", None, 0.01).result(20)
        assert client.call_async("wait", None).cancel()
        wait_until(lambda: not session_of(client).under_way)  # the real call is given up as well
        let_go.set()
        assert shadow_of(client)["asked"] == 0
        client.call("policy", OBSERVATION)  # and it is free for what comes then
        await_answers(client, 1)
        assert shadow_of(client)["skipped"] == 0


FROZEN = """
import sys
from edgeml import InferenceServer
server = InferenceServer(url=sys.argv[1])
server.register_interface("policy", lambda payload: {"actions": payload["state"], "task": "pick"})
server.start(threaded=True)
print(server.url)
sys.stdin.read()
"""


@pytest.mark.parametrize("transport", ["zmq", "grpc", "shm"])
def test_a_frozen_candidate_holds_up_neither_calls_nor_the_end(real, transport):
    with process(FROZEN, f"{transport}://127.0.0.1:0") as candidate:
        client = InferenceClient(url=real.url, shadow=candidate.line())
        ask_until(client, lambda told: told["answered"])
        candidate.signal(signal.SIGSTOP)
        with took(at_most=10):
            for _ in range(100):
                client.call("policy", OBSERVATION)
        with no_thread_left_in_the_end(client), took(at_most=0.5):
            client.stop()
        candidate.signal(signal.SIGCONT)


@contextmanager
def no_thread_left_in_the_end(client):
    yield
    wait_until(lambda: not any("shadow" in thread.name for thread in threading.enumerate()))


def test_to_stop_waits_for_no_candidate_and_leaves_no_thread(real, transport):
    let_go, asked = threading.Event(), threading.Event()

    def policy(payload):
        asked.set()
        let_go.wait(60)

    with serve(transport, policy) as candidate:
        with no_thread_left():
            with client_of(real, candidate, timeout=100) as client:
                client.call("policy", OBSERVATION)
                assert asked.wait(30)
                with took(at_most=1):
                    client.stop()
            assert shadow_of(client)["answered"] == 0
        let_go.set()
    nobody = f"{transport}://127.0.0.1:{free_port()}"
    with no_thread_left(), InferenceClient(url=real.url, shadow=nobody) as client:
        wait_until(lambda: shadow_of(client)["last_error"])


def test_one_that_is_dropped_ends_its_shadow(real, transport):
    with serve(transport) as candidate, no_thread_left():
        client = InferenceClient(url=real.url, shadow=candidate.url)
        with pytest.warns(ResourceWarning, match="dropped without stop"):
            del client


@pytest.mark.parametrize("transport", ["zmq", "grpc", "shm"])
def test_a_program_that_stops_nothing_ends_at_once(real, transport):
    with process(FROZEN, f"{transport}://127.0.0.1:0") as candidate:
        url = candidate.line()
        candidate.signal(signal.SIGSTOP)
        with took(at_most=20):
            run_fresh(
                f"""
                import warnings, numpy as np
                from edgeml import InferenceClient
                client = InferenceClient(url={real.url!r}, shadow={url!r})
                for _ in range(10):
                    client.call("policy", {{"state": np.zeros(3)}})
                print(client.stats()["shadow"]["skipped"])
                """
            )


@pytest.mark.parametrize("transport", ["zmq", "shm"])
def test_in_a_forked_child_calls_go_on_without_a_shadow(real, transport):
    with serve(transport) as candidate:
        printed, _ = run_fresh(
            f"""
            import os, time, numpy as np
            from edgeml import InferenceClient
            payload = {{"state": np.zeros(3)}}
            with InferenceClient(url={real.url!r}, shadow={candidate.url!r}) as client:
                while not client.stats()["shadow"]["connected"]:
                    time.sleep(0.01)
                for number in range(5):
                    client.call("policy", payload)
                    child = os.fork()
                    if child == 0:
                        before = client.stats()["shadow"]["skipped"]
                        client.call("policy", payload)
                        client.call_async("policy", payload).result(20)
                        told = client.stats()["shadow"]
                        assert told["skipped"] == before + 2, told
                        assert "before the fork" in told["last_error"], told
                        client.stop()
                        os._exit(7)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                while client.stats()["shadow"]["answered"] < 1:
                    time.sleep(0.01)
                print("ended")
            """
        )
    assert printed == "ended\n"


# What is said wrongly -------------------------------------------------------------------------


def test_an_address_that_can_lead_nowhere_is_refused_before_anything_is_done():
    for shadow, error in [
        ("", ValueError),
        (5557, ValueError),
        ("zmq://gpu", ValueError),
        ("nothing://gpu:5557", PluginError),
    ]:
        with pytest.raises(error):
            InferenceClient(port_num=1, shadow=shadow)
    with pytest.raises(ValueError, match="shadow="):
        InferenceClient(port_num=1, on_shadow=print)
    with pytest.raises(TypeError, match="on_shadow"):
        InferenceClient(port_num=1, shadow="zmq://gpu:1", on_shadow="print")
