"""What a server answers is checked where it arrives: nothing but our errors reaches the user."""

from __future__ import annotations

import asyncio
import contextlib

import gymnasium
import numpy as np
import pytest

from edgeml import (
    InferenceClient,
    Malformed,
    TrainerClient,
    TrainerConfig,
    aio,
)
from edgeml.core.dispatch import answer_with
from edgeml.core.server import Server
from edgeml.core.url import Url
from edgeml.data import QueuedDataStore
from edgeml.gym import RemoteEnv, RemoteVectorEnv
from edgeml.gym.spaces import space_to_plain

_DEEP = [[[[[[[[["deep"]]]]]]]]]

ANSWERS = {
    "nothing": None,
    "true": True,
    "a negative number": -1,
    "a large number": 1 << 63,
    "a very large number": 1 << 200,
    "a float": 1.5,
    "not a number": float("nan"),
    "a text": "x",
    "no text": "",
    "bytes": b"\xff",
    "an empty list": [],
    "a list of numbers": [1, 2],
    "a list of a text and a number": ["a", 1],
    "a list of maps": [{}, {}],
    "a tuple": (1, 2),
    "a set": {1, 2},
    "an empty map": {},
    "a map of numbers": {1: 2},
    "an array": np.arange(3),
    "an array without axes": np.array(3),
    "an array without items": np.zeros((0, 3)),
    "a scalar": np.int64(3),
    "a scalar of floats": np.float32(3),
    "something deep": _DEEP,
}


@contextlib.contextmanager
def answering(service, answers, config=None, topics=()):
    """A server of the core that gives every call of a name the same answer."""
    server = Server(service, [Url.parse("inproc://127.0.0.1:0")], config=config)
    for topic in topics:
        server.topic(topic)
    for name, answer in answers.items():
        given = answer if callable(answer) else lambda payload, caller, answer=answer: answer
        server.register(name, answer_with(given))
    server.open()
    server.dispatcher.start()
    try:
        yield str(server.urls[0])
    finally:
        server.close()


def only_malformed(ask) -> object:
    """What is got by asking, if it isn't refused as Malformed."""
    try:
        return ask()
    except Malformed as error:
        return error


@pytest.fixture(params=ANSWERS.values(), ids=ANSWERS.keys())
def answer(request):
    return request.param


# Inference --------------------------------------------------------------------------------------


def test_names_of_interfaces_are_texts(answer):
    with answering("inference", {"/interfaces": answer}) as url, InferenceClient(url=url) as client:
        got = only_malformed(client.interfaces)
        assert isinstance(got, Malformed) or (got == [] and answer == [])


def test_a_contract_is_one_or_none(answer):
    with answering("inference", {"/contract": answer}) as url, InferenceClient(url=url) as client:
        got = only_malformed(lambda: client.contract("policy"))
        assert isinstance(got, Malformed) or got is None or not answer


def test_the_id_of_an_episode_is_the_one_that_was_asked_for(answer):
    with answering("inference", {"/reset": answer}) as url, InferenceClient(url=url) as client:
        for ask in (
            lambda: client.reset("mine"),
            lambda: client.reset_async("mine").result(20),
        ):
            assert isinstance(only_malformed(ask), Malformed)


def test_the_same_for_asyncio(answer):
    async def ask(url):
        async with aio.InferenceClient(url=url) as client:
            for what in (client.interfaces(), client.contract("policy"), client.reset("mine")):
                try:
                    got = await what
                except Malformed:
                    continue
                assert got is None or not answer

    names = ("/interfaces", "/contract", "/reset")
    with answering("inference", dict.fromkeys(names, answer)) as url:
        asyncio.run(ask(url))


@pytest.mark.parametrize(
    "forged",
    [
        {"observation": []},
        {"observation": {"a": 3}},
        {"observation": {"dtype": "f", "shape": 3}},
        {"observation": {"dtype": "float32", "shape": [1 << 80]}},
        {"observation": {"dtype": "float32", "shape": [np.zeros(3)]}},
        {"observation": {1: {"dtype": "float32", "shape": [3]}}},
        {"observation": {"dtype": "float32", "shape": [3], "names": 5}},
        {"observation": {"dtype": "float32", "shape": [3], "units": [{}, [], None]}},
        {"observation": {"dtype": "float32", "shape": [3], "kind": []}},
        {"action": np.zeros(3)},
        {"rate": np.zeros(3)},
        {"rate": [1]},
        {"rate": 1 << 2000},
        {"horizon": "3"},
        {"horizon": np.zeros(3)},
        {"identity": 5},
        {"metadata": [1]},
        {"metadata": {"a": np.zeros(3)}},
        {"metadata": {"a": {1: 1}}},
        {"later": 1},
        {1: 2},
    ],
)
def test_a_forged_contract_is_malformed(forged):
    with (
        answering("inference", {"/contract": forged}) as url,
        InferenceClient(url=url) as client,
        pytest.raises(Malformed),
    ):
        client.contract("policy")


# Trainer ----------------------------------------------------------------------------------------

CONFIG = TrainerConfig(0, None)


@contextlib.contextmanager
def actor_of(answer):
    store = QueuedDataStore(100)
    store.batch_insert([{"x": float(n)} for n in range(5)])
    served = {"update": answer, "request": None}
    with (
        answering("trainer", served, CONFIG.shared(), ["network"]) as url,
        TrainerClient("arm", None, CONFIG, store, url=url) as client,
    ):
        yield client, store


def test_a_mark_is_a_number_up_to_which_there_are_items(answer):
    with actor_of(answer) as (client, store):
        for _ in range(3):
            with pytest.raises(Malformed):
                client.update(1.0)
        with pytest.raises(Malformed):
            client.update_async(1.0).result(20)
        assert client.stats()["items_refused"] == client.lost == 0
        assert len(store.get_latest_data(0)) == 5, "something that wasn't sent was let go of"


@pytest.mark.parametrize(
    "answer",
    [
        {"mark": 5},
        {"mark": True},
        {"mark": 6},
        {"mark": -1},
        {"durable": 6},
        {"durable": -1},
        {"durable": True},
        {"durable": "5"},
        {"durable": ...},
        {"epoch": None},
        {"epoch": -1},
        {"epoch": 1 << 63},
        {"refused": None},
        {"refused": "ab"},
        {"refused": [[1, 2]]},
        {"refused": [[True, 1, "no"]]},
        {"refused": [[1, 5, b"no"]]},
        {"refused": [[0, 1, "no"]]},
        {"refused": [[1, 0, "no"]]},
        {"refused": [[1, 6, "no"]]},
        {"refused": [[4, 1 << 70, "no"]]},
        {"refused": [[3, 2, "no"], [4, 1, "no"]]},
        {"refused": [[4, 1, "no"], [3, 1, "no"]]},
        6,
        -1,
    ],
    ids=str,
)
def test_what_was_refused_are_items_that_were_sent(answer):
    if isinstance(answer, dict) and answer != {"mark": 5}:
        answer = {"mark": 5, "durable": None, "epoch": 1, "refused": []} | answer
        answer = {key: value for key, value in answer.items() if value is not ...}
    with actor_of(answer) as (client, store):
        for _ in range(2):
            with pytest.raises(Malformed):
                client.update(1.0)
        assert client.stats()["items_refused"] == 0
        assert len(store.get_latest_data(0)) == 5


def test_what_fits_goes_on_as_ever():
    refused = [[2, 1, "no"], [4, 2, "neither"]]
    told = {"mark": 5, "durable": 4, "epoch": 1, "refused": refused}
    with actor_of(told) as (client, _):
        client.update(1.0)
        counts = client.stats()["stores"]["arm"]
        assert counts["applied"] == 2
        assert counts["durable"] == 2
        assert counts["refused"] == {"no": 1, "neither": 2}


# Environments -----------------------------------------------------------------------------------

SPACE = {
    "observation_space": space_to_plain(gymnasium.spaces.Box(-1, 1, (3,), np.float32)),
    "action_space": space_to_plain(gymnasium.spaces.Discrete(2)),
    "metadata": {"render_modes": ["rgb_array"]},
    "render_mode": None,
}
BEGUN = [np.zeros(3, np.float32), {}]
EVERYTHING = {
    "/env/open": SPACE,
    "/env/reset": BEGUN,
    "/env/step": [np.zeros(3, np.float32), 1.0, False, False],
    "/env/render": [np.zeros((2, 2, 3), np.uint8)],
    "/env/close": None,
}


def test_an_environment_is_described_or_malformed(answer):
    forged = [answer, *({**SPACE, field: answer} for field in SPACE)]
    for told in forged:
        with answering("inference", {**EVERYTHING, "/env/open": told}) as url:
            try:
                env = RemoteEnv(url)
            except Malformed:
                continue
            env.reset()  # what is told of metadata and mode may be true
            env.close()


def is_refused(ask) -> bool:
    try:
        ask()
    except (Malformed, gymnasium.error.ResetNeeded):
        return True
    return False


ENVIRONMENTS = pytest.mark.parametrize(
    ("make", "action"), [(RemoteEnv, 1), (RemoteVectorEnv, [1])], ids=["one", "vector"]
)


@ENVIRONMENTS
def test_a_reset_is_one_or_malformed(answer, make, action):
    with (
        answering("inference", {**EVERYTHING, "/env/reset": answer}) as url,
        contextlib.closing(make(url)) as env,
    ):
        # Whether an observation fits its space is the environment's own affair.
        assert is_refused(env.reset) or (make is RemoteEnv and answer == [{}, {}])


@ENVIRONMENTS
def test_a_step_is_one_or_malformed(answer, make, action):
    with (
        answering("inference", {**EVERYTHING, "/env/step": answer}) as url,
        contextlib.closing(make(url)) as env,
    ):
        env.reset()
        assert is_refused(lambda: env.step(action))


@ENVIRONMENTS
def test_a_frame_is_one_or_malformed(answer, make, action):
    with (
        answering("inference", {**EVERYTHING, "/env/render": answer}) as url,
        contextlib.closing(make(url)) as env,
    ):
        env.reset()
        assert is_refused(env.render) or (isinstance(answer, list) and len(answer) == 1)


STEP = EVERYTHING["/env/step"]
FORGED = {
    f"{what!r:.10} at {position}": [*STEP[:position], what, *STEP[position + 1 :]]
    for position in (1, 2, 3)
    for what in (None, "x", {}, [], b"")
}


@ENVIRONMENTS
@pytest.mark.parametrize(
    "step",
    [*FORGED.values(), [*STEP, 5], [*STEP, {}, {}], STEP[:3], [STEP[0], 1 << 2000, *STEP[2:]]],
    ids=[*FORGED, "no info", "more than there is", "less", "beyond all numbers"],
)
def test_a_forged_step_is_malformed(step, make, action):
    with (
        answering("inference", {**EVERYTHING, "/env/step": step}) as url,
        contextlib.closing(make(url)) as env,
    ):
        env.reset()
        with pytest.raises(Malformed):
            env.step(action)


def test_observations_that_do_not_fit_in_one_array_are_malformed():
    step = [np.zeros(4, np.float32), *STEP[1:]]
    with (
        answering("inference", {**EVERYTHING, "/env/step": step}) as url,
        contextlib.closing(RemoteVectorEnv(url, 2)) as env,
    ):
        env.reset()
        with pytest.raises(Malformed, match="observation"):
            env.step([1, 1])
