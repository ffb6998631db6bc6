"""Servers in Ray: started, found, replaced, and started anew."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import edgeml.ray
from edgeml import DeadlineExceeded, InferenceClient, InferenceServer, RemoteError, UnknownInterface
from edgeml.core.resolver import Asker, Place
from edgeml.core.url import Url
from edgeml.ray import cluster
from edgeml.ray.names import RayResolver
from pairs import took, wait_until


def serving(answer: object) -> Callable[[], InferenceServer]:
    """A factory of servers that tell what they were made for, and their process."""

    def make() -> InferenceServer:
        server = InferenceServer(0)
        server.register_interface("who", lambda payload: [answer, os.getpid()])
        return server

    return make


@contextmanager
def watching(url: str) -> Iterator[list[Sequence[Place]]]:
    told: list[Sequence[Place]] = []
    end = RayResolver().watch(Url.parse(url), told.append, Asker("inference", "me", 20.0))
    try:
        yield told
    finally:
        end()


def ask(place: Place) -> list[object]:
    with InferenceClient(url=place.url) as client:
        return client.call("who", None)


def test_servers_are_deployed_found_scaled_started_anew_replaced_and_deleted(name):
    status = edgeml.ray.deploy(serving("first"), name=name, replicas=2, note="a note", timeout=60)
    assert (status.state, status.wanted, status.ready, status.version) == ("ready", 2, 2, 1)
    assert (status.kind, status.note, status.failure) == ("servers", "a note", None)
    assert status.url == f"ray://{os.environ['EDGEML_RAY_NAMES']}/{name}"
    pids = {each.pid for each in status.replicas}

    with watching(f"ray://{name}") as told, watching(status.url) as outside:
        assert [ask(place) for place in told[0]] == [["first", r.pid] for r in status.replicas]
        assert outside == told

        edgeml.ray.scale(name, 3)
        wait_until(lambda: len(told[-1]) == 3)
        edgeml.ray.scale(name, 1)
        wait_until(lambda: len(told[-1]) == 1)
        (kept,) = (each for each in edgeml.ray.status(name).replicas if each.state == "ready")
        assert kept.pid in pids
        assert told[-1] == [Place(kept.url)]

        os.kill(kept.pid, signal.SIGKILL)
        wait_until(lambda: told[-1] and told[-1] != [Place(kept.url)])
        assert ask(told[-1][0])[0] == "first"
        assert ask(told[-1][0])[1] != kept.pid

        status = edgeml.ray.deploy(serving("second"), name=name, timeout=60)
        assert (status.state, status.version, status.note) == ("ready", 2, "")
        wait_until(lambda: ask(told[-1][0])[0] == "second")
        assert len(told[-1]) == 1

        edgeml.ray.delete(name)
        wait_until(lambda: told[-1] == [])
    assert name not in edgeml.ray.status()
    assert not [each for each in cluster.list_actors() if each.startswith(name)]
    assert not [key for key in cluster.keys("") if name in key]
    with pytest.raises(UnknownInterface, match=name):
        edgeml.ray.status(name)


def fail() -> InferenceServer:
    raise FileNotFoundError("the weights are not here")


def test_a_factory_that_raises_is_told_and_the_old_version_stays(name):
    with pytest.raises(RemoteError, match=r"the weights are not here[\s\S]*in fail"):
        edgeml.ray.deploy(fail, name=name, timeout=60)
    status = edgeml.ray.status(name)
    assert status.state == "failed"
    assert str(status.failure) == "FileNotFoundError: the weights are not here"
    assert status.replicas == ()

    edgeml.ray.deploy(serving("good"), name=name, replicas=2, timeout=60)
    before = edgeml.ray.status(name)
    assert (before.state, before.version, before.failure) == ("ready", 2, None)
    with pytest.raises(RemoteError, match="the weights are not here"):
        edgeml.ray.deploy(fail, name=name, timeout=60)
    status = edgeml.ray.status(name)
    assert (status.state, status.version, status.ready) == ("ready", 2, 2)
    assert status.failure is not None
    assert status.failure.text == "the weights are not here"
    assert status.replicas == before.replicas
    assert ask(Place(status.replicas[0].url))[0] == "good"


def end_process() -> InferenceServer:
    os._exit(3)


def test_a_process_that_dies_as_it_starts_is_told_before_the_time_is_over(name):
    with pytest.raises(RemoteError, match="its process died each of 3 times"):
        edgeml.ray.deploy(end_process, name=name, timeout=300)
    assert edgeml.ray.status(name).state == "failed"


def test_a_factory_that_does_not_return_is_given_up_in_time(name):
    with took(20.0), pytest.raises(DeadlineExceeded, match="the factory has not returned"):
        edgeml.ray.deploy(lambda: threading.Event().wait(), name=name, timeout=1)
    wait_until(lambda: edgeml.ray.status(name).replicas == ())


@pytest.mark.parametrize("names", ["here", "127.0.0.1:99999", "127.0.0.1"])
def test_a_name_service_has_an_address(names):
    with pytest.raises(ValueError, match=r"HOST:PORT|out of range"):
        edgeml.ray.start(names)


def test_the_name_service_stays_where_it_is(ray):
    there = edgeml.ray.start()
    assert there == edgeml.ray.start("127.0.0.1:0") == os.environ["EDGEML_RAY_NAMES"]


def test_all_is_ended_and_a_port_that_is_taken_is_told(ray, name):
    edgeml.ray.deploy(serving(1), name=name, timeout=60)
    edgeml.ray.stop()
    assert cluster.list_actors() == cluster.keys("") == []
    assert edgeml.ray.status() == {}
    edgeml.ray.stop()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            edgeml.ray.start(f"127.0.0.1:{taken.getsockname()[1]}")
    edgeml.ray.start()


def test_servers_for_which_there_is_no_room_say_what_they_need(name):
    with pytest.raises(DeadlineExceeded, match=r"each is to have 1 CPU, 2 GPU, and of that"):
        edgeml.ray.deploy(serving(1), name=name, num_gpus=2, timeout=2)
    wait_until(lambda: edgeml.ray.status(name).replicas == ())


def pid_of(ray: Any, controller: Any) -> int:
    """The controller's process; 0 while there is none."""
    try:
        return ray.get(controller.pid.remote(), timeout=30)
    except ray.exceptions.ActorUnavailableError:
        return 0


def test_a_controller_that_is_killed_is_back_and_finds_all_again(ray, name):
    status = edgeml.ray.deploy(serving("here"), name=name, replicas=2, note="n", timeout=60)
    before = edgeml.ray.status()
    controller = cluster.find_actor(cluster.CONTROLLER)
    with watching(f"ray://{name}") as told, watching(status.url) as outside:
        pid = pid_of(ray, controller)
        os.kill(pid, signal.SIGKILL)
        # Nobody tells anything while it is away, and so it is known where the servers are.
        wait_until(lambda: pid_of(ray, controller) not in (0, pid))
        assert edgeml.ray.status() == before
        assert told == outside == [[Place(each.url) for each in status.replicas]]

        edgeml.ray.scale(name, 1)  # it goes on as before
        wait_until(lambda: len(told[-1]) == len(outside[-1]) == 1)
        assert edgeml.ray.deploy(serving("new"), name=name, timeout=60).version == 2
