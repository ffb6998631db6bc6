"""Where servers are: what clients are told, and when; none of it takes Ray."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

import edgeml.ray.names
from edgeml import (
    Credentials,
    EdgemlError,
    InferenceServer,
    Malformed,
    Overloaded,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.client import Client
from edgeml.core.resolver import Asker, Place
from edgeml.core.url import Url
from edgeml.ray import cluster
from edgeml.ray.deployment import Ask
from edgeml.ray.names import NameService, RayResolver
from edgeml.testing import ResolverTests
from pairs import free_port, make_keys, run_fresh, started, took, wait_until

A, B = Place("zmq://127.0.0.1:1"), Place("shm:///run/b,zmq://127.0.0.1:2", topics=False)


QUESTION = {"name": "policy", "path": "", "known": "", "service": "trainer", "node": ""}


class Names:
    """A name service, and what it is to tell."""

    def __init__(self) -> None:
        self.places: dict[str, Sequence[Place]] = {}
        self.asked: list[Ask] = []
        self.service: NameService | None = None
        self.port = 0

    def start(self) -> None:
        url = Url("zmq", "127.0.0.1", self.port)
        self.service = NameService(url, self.find, lambda: sorted(self.places), None)
        self.port = self.service.url.port

    def find(self, name: str, ask: Ask) -> Sequence[Place] | None:
        self.asked.append(ask)
        return self.places.get(name)

    def tell(self, name: str, *places: Place) -> None:
        self.places[name] = places
        self.service.tell(name)

    def url(self, path: str) -> Url:
        return Url.parse(f"ray://127.0.0.1:{self.port}/{path}")


@pytest.fixture
def names() -> Iterator[Names]:
    made = Names()
    made.start()
    yield made
    made.service.close()


@contextmanager
def watching(url: Url, timeout: float = 5.0) -> Iterator[list[Sequence[Place]]]:
    """What a client is told."""
    told: list[Sequence[Place]] = []
    end = RayResolver().watch(url, told.append, Asker("trainer", "robot-7", timeout))
    try:
        yield told
    finally:
        end()


class TestRayResolver(ResolverTests):
    resolver = RayResolver()
    nobody = Url.parse(f"ray://127.0.0.1:{free_port()}/policy")

    @pytest.fixture(autouse=True)
    def _names(self, names: Names) -> None:
        names.places["policy"] = []
        self.names, self.known = names, names.url("policy")

    def set_servers(self, urls: Sequence[str]) -> None:
        self.names.tell("policy", *map(Place, urls))


def test_a_client_is_told_at_once_and_of_each_change(names):
    names.places["policy"] = [A]
    with watching(names.url("policy")) as told:
        assert told == [[A]]
        names.tell("policy", A, B)
        wait_until(lambda: told == [[A], [A, B]])
        names.tell("policy")
        wait_until(lambda: told[-1] == [])


def test_a_change_of_nothing_tells_nothing(names):
    names.places["policy"], names.places["other"] = [A], [A]
    with watching(names.url("policy")) as told:
        wait_until(lambda: len(names.asked) == 2)  # it has asked for news
        names.tell("other", B)
        names.tell("policy", A)
        names.tell("policy", B)
        wait_until(lambda: len(told) == 2)
        assert told == [[A], [B]]


def test_the_name_service_knows_who_asks(names):
    names.places["learner"] = [A]
    with watching(names.url("learner/2")):
        node = cluster.node_id()  # "", unless these tests come after others in one process
        assert names.asked[0] == Ask("trainer", "robot-7", node, "127.0.0.1", "2")


def test_a_name_that_is_not_there_is_said_with_those_that_are(names):
    names.places["policy"] = [A]
    with pytest.raises(UnknownInterface, match=r"no deployment 'polcy'; known: 'policy'"):
        RayResolver().watch(names.url("polcy"), [].append, Asker("inference", "me", 5.0))


def test_a_name_that_goes_leaves_no_servers(names):
    names.places["policy"] = [A]
    with watching(names.url("policy")) as told:
        del names.places["policy"]
        names.service.tell("policy")
        wait_until(lambda: told[-1] == [])
        names.tell("policy", B)
        wait_until(lambda: told[-1] == [B])


def test_a_name_service_that_restarts_is_asked_again_and_the_servers_are_kept_meanwhile(names):
    names.places["policy"] = [A]
    with watching(names.url("policy")) as told:
        names.service.close()
        names.places["policy"] = [A, B]
        names.start()
        wait_until(lambda: len(told) == 2)
        assert told == [[A], [A, B]]


def test_nobody_there_is_unreachable_within_the_timeout():
    url = Url.parse(f"ray://127.0.0.1:{free_port()}/policy")
    with took(2.0), pytest.raises(Unreachable):
        RayResolver().watch(url, [].append, Asker("inference", "me", 0.5))


@pytest.mark.parametrize("url", ["ray://127.0.0.1:5550", "ray://127.0.0.1:5550/Policy"])
def test_a_url_that_names_no_deployment_is_refused(url):
    with pytest.raises(ValueError, match=r"NAME|can't be called"):
        RayResolver().watch(Url.parse(url), [].append, Asker("inference", "me", 0.5))


def test_nothing_is_told_after_the_end(names):
    names.places["policy"] = [A]
    with watching(names.url("policy")) as told:
        wait_until(lambda: len(names.asked) == 2)
    names.tell("policy", B)
    assert told == [[A]]


def test_a_client_may_end_it_while_it_is_told(names):
    names.places["policy"] = [A]
    ended = threading.Event()

    def tell(places: Sequence[Place]) -> None:
        if list(places) == [B]:
            end()
            ended.set()

    end = RayResolver().watch(names.url("policy"), tell, Asker("inference", "me", 5.0))
    names.tell("policy", B)
    assert ended.wait(10)


@pytest.mark.parametrize(
    "places",
    [
        [Place("nowhere")],
        [Place("zmq://127.0.0.1:99999")],
        [Place("ray://127.0.0.1:5550/policy")],
        [Place("zmq://127.0.0.1:1,ray://policy")],
        [Place("zmq://" + "a" * 3000 + ":1")],
        [Place("zmq://127.0.0.1:1")] * 5000,
    ],
)
def test_what_a_name_service_tells_is_not_trusted(names, places):
    names.places["policy"] = places
    with pytest.raises(Malformed):
        RayResolver().watch(names.url("policy"), [].append, Asker("inference", "me", 5.0))


@pytest.mark.parametrize(
    "question",
    [
        None,
        [],
        {},
        {"name": "policy"},
        {**QUESTION, "name": 1},
        {**QUESTION, "node": "n" * 201},
    ],
)
def test_a_question_that_is_none_is_refused(names, question):
    client = Client("names", [names.service.url])
    try:
        with pytest.raises(Malformed):
            client.call("resolve", question)
    finally:
        client.close()


def test_of_one_client_one_question_waits(names):
    names.places["policy"] = [A]
    client = Client("names", [names.service.url])
    try:
        question = {**QUESTION, "known": client.call("resolve", QUESTION)["token"]}
        first = client.call_async("resolve", question, 60.0)
        second = client.call_async("resolve", question, 60.0)
        assert first.result(10)["token"] == question["known"]
        assert not second.done()
        names.tell("policy", B)
        assert second.result(10)["places"] == [[B.url, True, False]]
    finally:
        client.close()


def test_of_one_client_only_so_many_questions_wait(names):
    client = Client("names", [names.service.url])
    try:
        asked = [
            client.call_async("resolve", {**QUESTION, "name": f"n{n}", "known": "none"}, 60.0)
            for n in range(70)
        ]
        refused = [each for each in asked[64:] if isinstance(each.exception(20), Overloaded)]
        assert len(refused) == 6
        assert not any(each.done() for each in asked[:64])
        names.tell("n3", A)
        assert asked[3].result(20)["places"]
    finally:
        client.close()


def test_a_question_does_not_wait_for_ever(names, monkeypatch):
    monkeypatch.setattr(edgeml.ray.names, "_LONGEST_ASK", 0.5)
    client = Client("names", [names.service.url])
    try:
        with took(10.0):
            answer = client.call("resolve", {**QUESTION, "known": "none"}, 1e6)
        assert answer == {"token": "none"}
    finally:
        client.close()


def test_a_name_service_with_keys_tells_those_who_have_one(tmp_path):
    keys = make_keys(tmp_path)
    url = Url("zmq", "127.0.0.1", 0)
    service = NameService(url, lambda name, ask: [A], lambda: [], keys["server"])
    known = Url.parse(f"ray://127.0.0.1:{service.url.port}/policy")
    try:
        told: list[Sequence[Place]] = []
        mine = Credentials.load(keys["robot"])
        RayResolver().watch(known, told.append, Asker("inference", "robot", 20.0, mine))()
        assert told == [[A]]
        for credentials in (None, Credentials.load(keys["stranger"])):
            with pytest.raises(EdgemlError):
                RayResolver().watch(known, told.append, Asker("inference", "me", 2.0, credentials))
        assert told == [[A]]
    finally:
        service.close()


def test_a_question_is_answered_before_its_time_is_over(names):
    names.places["policy"] = [A]
    client = Client("names", [names.service.url])
    try:
        token = client.call("resolve", QUESTION)["token"]
        began = time.monotonic()
        assert client.call("resolve", {**QUESTION, "known": token}, 6.0) == {"token": token}
        assert time.monotonic() - began < 5.0
    finally:
        client.close()


def test_a_client_from_outside_needs_no_ray(names):
    with started(InferenceServer(0)) as server:
        server.register_interface("echo", lambda payload: payload)
        names.places["policy"] = [Place(server.url)]
        program = f"""
            import sys
            sys.modules["ray"] = None  # as where it is not installed
            from edgeml import InferenceClient

            with InferenceClient(url="{names.url("policy")}") as client:
                print(client.call("echo", "hello"))
            try:
                InferenceClient(url="ray://policy")
            except ImportError as error:
                print(error)
            """
        assert run_fresh(program)[0].splitlines() == [
            "hello",
            'this needs Ray: pip install "edgeml-robotics[ray]"',
        ]


def test_a_ray_that_is_not_there_is_unreachable_at_once():
    program = """
        import edgeml.ray
        from edgeml import Unreachable

        for call in (edgeml.ray.start, edgeml.ray.status, lambda: edgeml.ray.delete("policy")):
            try:
                call()
            except Unreachable as error:
                print("RAY_ADDRESS" in str(error))
        """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
        assert run_fresh(program)[0].splitlines() == ["True"] * 3


def test_a_ray_that_does_not_answer_is_unreachable_in_time():
    program = """
        import time
        from edgeml import InferenceClient, Unreachable

        for _ in range(2):
            began = time.monotonic()
            try:
                InferenceClient(url="ray://policy", timeout=1.0)
            except Unreachable as error:
                print("gives no answer within" in str(error), time.monotonic() - began < 10)
        """
    with socket.socket() as silent, pytest.MonkeyPatch.context() as patch:
        silent.bind(("0.0.0.0", 0))  # for Ray knows a machine by another name
        silent.listen()
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        assert run_fresh(program)[0].splitlines() == ["True True"] * 2


def test_without_ray_what_needs_it_says_which_extra():
    program = """
        import sys
        sys.modules["ray"] = None
        import edgeml.ray

        for call in (
            lambda: edgeml.ray.deploy(print, name="policy"),
            lambda: edgeml.ray.scale("policy", 2),
            lambda: edgeml.ray.status(),
            lambda: edgeml.ray.delete("policy"),
            lambda: edgeml.ray.start(),
            lambda: edgeml.ray.stop(),
        ):
            try:
                call()
            except ImportError as error:
                print(error)
        """
    said = run_fresh(program)[0].splitlines()
    assert said == ['this needs Ray: pip install "edgeml-robotics[ray]"'] * 6
