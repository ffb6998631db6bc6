"""What runs in an actor, without one: a server from its factory to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from edgeml import DeadlineExceeded, InferenceClient, InferenceServer, NotReady
from edgeml.ray import cluster
from edgeml.ray.replica import Replica, advertised, factory_key, starts_key
from pairs import started, wait_until

ELSEWHERE = "192.0.2.7"


@pytest.fixture(autouse=True)
def store(monkeypatch) -> dict[str, object]:
    """What Ray would keep."""
    kept: dict[str, object] = {}
    monkeypatch.setattr(cluster, "get", kept.get)
    monkeypatch.setattr(cluster, "put", kept.__setitem__)
    monkeypatch.setattr(cluster, "drop", lambda key: kept.pop(key, None))
    monkeypatch.setattr(cluster, "unpickle", lambda value: value)
    monkeypatch.setattr(cluster, "node_address", lambda: ELSEWHERE)
    return kept


@pytest.fixture
def run(store) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def run(factory: Callable[[], object], **attributes: object) -> Replica:
        store[factory_key("policy", 3)] = SimpleNamespace(load=lambda: factory)
        made.append(Replica("policy", 3, "3.a"))
        return made[-1]

    yield run
    for replica in made:
        replica.leave()
        wait_until(lambda replica=replica: replica.describe().state in ("left", "failed"))


def echoing() -> InferenceServer:
    server = InferenceServer(0)
    server.register_interface("echo", lambda payload: payload)
    return server


def test_it_tells_how_its_server_is_reached(run, store):
    now = run(echoing).describe()
    assert (now.state, now.node, now.waiting, now.running) == ("ready", ELSEWHERE, 0, 0)
    with InferenceClient(url=now.url) as client:
        assert client.call("echo", 1) == 1
    assert starts_key("policy", "3.a") not in store


def test_what_loads_is_not_ready(run):
    gate = threading.Event()

    def loading() -> InferenceServer:
        server = echoing()

        @server.load
        def load(report: Callable[[float, str], None]) -> None:
            report(0.5, "half of the weights")
            gate.wait()

        return server

    replica = run(loading)
    wait_until(lambda: replica.describe().detail == "half of the weights")
    assert replica.describe().state == "loading"
    gate.set()
    wait_until(lambda: replica.describe().state == "ready")


def load_badly() -> InferenceServer:
    server = echoing()

    @server.load
    def load(report: object) -> None:
        raise OSError("the weights are torn")

    return server


def serve_already() -> InferenceServer:
    server = echoing()
    server.start(threaded=True)
    server.stop()
    return server


def fail() -> InferenceServer:
    raise FileNotFoundError("no weights")


@pytest.mark.parametrize(
    ("factory", "kind", "why"),
    [
        (fail, "FileNotFoundError", "no weights"),
        (load_badly, "RuntimeError", "loading failed: the weights are torn"),
        (serve_already, "RuntimeError", "make a new one"),
        (int, "TypeError", "InferenceServer(0), and it returned int"),
    ],
)
def test_what_makes_no_server_is_told(run, factory, kind, why):
    replica = run(factory)
    wait_until(lambda: replica.describe().state == "failed")
    failure = replica.describe().failure
    assert failure.type_name == kind
    assert why in failure.text
    assert str(failure) == f"{kind}: {failure.text}"


def test_a_server_that_stops_by_itself_has_failed(run):
    servers: list[InferenceServer] = []

    def make() -> InferenceServer:
        servers.append(echoing())
        return servers[0]

    replica = run(make)
    servers[0].stop()
    assert replica.describe().state == "failed"
    assert "stopped" in replica.describe().failure.text


def test_what_is_deployed_no_more_is_not_run(store):
    failure = Replica("policy", 3, "3.a").describe().failure
    assert "no longer deployed" in failure.text


def test_a_process_that_dies_as_it_starts_is_given_up_after_three_times(run, store):
    called = []

    def die() -> InferenceServer:
        called.append(1)
        raise SystemExit  # as far as this process goes

    for _ in range(3):
        with pytest.raises(SystemExit):
            run(die)
    replica = run(die)
    assert len(called) == 3
    assert "died each of 3 times" in replica.describe().failure.text


def is_refused(client: InferenceClient) -> bool:
    """Whether the server takes no more calls; one that may have been under way it still takes."""
    try:
        client.call("echo", 1, timeout=0.1)
    except NotReady:
        return True
    except DeadlineExceeded:
        return False
    raise AssertionError("it was answered")


def test_one_that_leaves_waits_for_its_clients_and_then_answers_what_it_has(run):
    gate, entered = threading.Event(), threading.Event()

    def make() -> InferenceServer:
        server = echoing()
        server.register_interface("wait", lambda _: (entered.set(), gate.wait(), "done")[2])
        return server

    replica = run(make)
    with InferenceClient(url=replica.describe().url) as client:
        answer = client.call_async("wait", None, 60.0)
        assert entered.wait(20)
        replica.leave()
        replica.leave()
        assert replica.describe().state == "leaving"
        wait_until(lambda: is_refused(client))
        assert replica.describe().state == "leaving"
        gate.set()
        assert answer.result(20) == "done"
        wait_until(lambda: replica.describe().state == "left")


def test_a_server_of_all_addresses_is_reached_at_its_nodes():
    with started(InferenceServer(0, host="0.0.0.0")) as server:
        assert advertised(server) == f"zmq://{ELSEWHERE}:{server.port}"
    with started(InferenceServer(0, host="0.0.0.0", advertise="cam.local:7000")) as server:
        assert advertised(server) == "zmq://cam.local:7000"
    with started(InferenceServer(url="shm://127.0.0.1:0,zmq://0.0.0.0:0")) as server:
        shm, zmq = advertised(server).split(",")
        assert shm.startswith("shm://127.0.0.1:")
        assert zmq.startswith(f"zmq://{ELSEWHERE}:")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_gpus": 1.5}, "num_gpus is a part of one, or whole ones, not 1.5"),
        ({"num_cpus": -1}, "num_cpus is a number from 0 on, not -1"),
        ({"resources": {"arm": float("nan")}}, "arm is a number from 0 on, not nan"),
    ],
)
def test_what_ray_could_never_give_is_refused_at_once(given, told):
    asked = {"num_cpus": 1, "num_gpus": 0, "resources": None, **given}
    with pytest.raises(ValueError, match=told):
        cluster.Payload(b"").options(**asked)
