"""agentlace's API over edgeml: its ways, one by one."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import logging
import queue
import re
import socket
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from agentlace.action import ActionClient, ActionConfig, ActionServer
from agentlace.data.data_store import DataStoreBase, QueuedDataStore
from agentlace.inference import InferenceClient, InferenceServer
from agentlace.internal import utils, values
from agentlace.trainer import TrainerClient, TrainerConfig, TrainerServer, TrainerSMInterface

import edgeml
from edgeml.cli.keygen import make_client_keys, make_server_keys
from pairs import ROOT, free_port, took, wait_until


@contextmanager
def running(server: Any) -> Iterator[Any]:
    server.start(threaded=True)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def trainer(
    stores: dict[str, Any] | None = None, request_types: list[str] | None = None, **options: Any
) -> Iterator[tuple[TrainerServer, TrainerConfig]]:
    """A learner that runs, and the configuration by which actors find it."""
    config = TrainerConfig(0, 0, request_types or [])
    server = TrainerServer(config, **options)
    for name, store in (stores or {}).items():
        server.register_data_store(name, store)
    with running(server):
        yield server, TrainerConfig(server.port, 0, request_types or [])


@contextmanager
def actor(config: TrainerConfig, *arguments: Any, **options: Any) -> Iterator[TrainerClient]:
    options.setdefault("timeout_ms", 5000)
    client = TrainerClient("actor", "127.0.0.1", config, *arguments, **options)
    try:
        yield client
    finally:
        client.stop()


# Signatures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            TrainerClient,
            "name server_ip config data_store=None data_stores=None log_level=20"
            " wait_for_server=False timeout_ms=800",
        ),
        (TrainerServer, "config data_callback=None request_callback=None log_level=20"),
        (
            TrainerConfig,
            "port_number=5555 broadcast_port=5556 request_types=<factory> rate_limit=None"
            " version='0.0.2' experimental_pipeline_port=None",
        ),
        (
            ActionConfig,
            "port_number action_keys observation_keys broadcast_port=None version='0.0.1'",
        ),
        (ActionServer, "config obs_callback act_callback log_level=30"),
        (ActionClient, "server_ip config wait_for_server=False timeout_ms=800"),
        (InferenceServer, "port_num"),
        (InferenceClient, "server_ip port_num"),
        (QueuedDataStore, "capacity"),
        (TrainerClient.request, "self type payload"),
        (TrainerClient.start_async_update, "self interval=10"),
        (TrainerClient.update_datastore, "self name from_id confirm_update=False"),
        (ActionClient.register_obs_callback, "self callback"),
        (TrainerServer.start, "self threaded=False"),
    ],
)
def test_arguments_are_called_ordered_and_preset_as_agentlaces(
    function: Any, expected: str
) -> None:
    parameters = inspect.signature(function).parameters.values()
    told = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    assert " ".join(told) == expected


def test_the_log_level_is_the_sixth_of_a_clients_arguments_and_the_fourth_of_a_servers() -> None:
    log = logging.getLogger("agentlace")
    config = TrainerConfig(0, 0)
    with running(TrainerServer(config, None, None, logging.ERROR)) as server:
        assert log.level == logging.ERROR
        config = TrainerConfig(server.port, 0)
        client = TrainerClient("actor", "127.0.0.1", config, None, {}, logging.CRITICAL)
        client.stop()
    assert log.level == logging.CRITICAL
    log.setLevel(logging.NOTSET)


def test_servers_are_reached_at_every_address_of_the_machine() -> None:
    action = ActionServer(ActionConfig(0, [], [], 0), None, None)
    for server in (TrainerServer(TrainerConfig(0, 0)), InferenceServer(0), action):
        with running(server):
            for address in ("127.0.0.1", "127.0.0.2"):
                socket.create_connection((address, server.port), 20).close()


def test_what_differs_between_the_configurations_is_refused() -> None:
    with trainer() as (_, config):
        config.request_types = ["get-stats"]
        with pytest.raises(edgeml.ConfigMismatch, match="get-stats"):
            TrainerClient("actor", "127.0.0.1", config)


# Answers ------------------------------------------------------------------------------------


def test_a_request_is_answered_with_arrays_that_may_be_written_to() -> None:
    def answer(type: str, payload: Any) -> Any:
        payload["x"] += 1  # as may those that the learner is given
        return {"type": type, "x": payload["x"]}

    with (
        trainer(request_types=["add"], request_callback=answer) as (_, config),
        actor(config) as client,
    ):
        got = client.request("add", {"x": np.zeros(3000)})
        got["x"] += 1
        assert got["type"] == "add"
        assert (got["x"] == 2).all()


def test_a_request_without_a_callback_is_answered_by_an_empty_dict() -> None:
    with trainer(request_types=["get"]) as (_, config), actor(config) as client:
        assert client.request("get", {}) == {}


def test_none_is_the_answer_to_an_unknown_request_a_failing_one_and_a_late_one() -> None:
    release = threading.Event()

    def answer(type: str, payload: Any) -> Any:
        if type == "fail":
            raise ValueError("of the learner")
        release.wait(10)
        return {}

    with (
        trainer(request_types=["fail", "wait"], request_callback=answer) as (_, config),
        actor(config, timeout_ms=300) as client,
    ):
        assert client.request("unknown", {}) is None
        assert client.request("fail", {}) is None
        with took(2.0, at_least=0.25):
            assert client.request("wait", {}) is None
        release.set()


def test_the_timeout_can_be_changed_while_it_runs() -> None:
    release = threading.Event()
    with (
        trainer(request_types=["wait"], request_callback=lambda *_: release.wait(10)) as (
            _,
            config,
        ),
        actor(config) as client,
    ):
        client.req_rep_client.timeout_ms = 100
        client.req_rep_client.reset_socket()
        with took(2.0):
            assert client.request("wait", {}) is None
        release.set()


def test_requests_beyond_the_rate_limit_are_not_sent() -> None:
    with trainer(request_types=["get"]) as (_, config):
        config.rate_limit = 1
        with actor(config) as client:
            assert client.request("get", {}) == {}
            assert client.request("get", {}) is None
            assert client.update() is False


def test_nobody_is_there() -> None:
    config = TrainerConfig(free_port(), 0)
    with pytest.raises(edgeml.Unreachable):
        TrainerClient("actor", "127.0.0.1", config)


def test_a_client_waits_for_a_server_that_comes_later() -> None:
    config = TrainerConfig(free_port(), None)
    server = TrainerServer(config)
    later = threading.Timer(0.5, server.start, [True])
    later.start()
    with took(20.0, at_least=0.3), actor(config, wait_for_server=True):
        pass
    later.join()
    server.stop()


# Stores -------------------------------------------------------------------------------------


def test_a_queue_counts_from_0_and_keeps_what_it_sent() -> None:
    learners, store = QueuedDataStore(10), QueuedDataStore(3)
    assert store.latest_data_id() == -1
    assert store.get_latest_data(-1) == []
    store.insert({"x": 0})
    assert store.latest_data_id() == 0
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        assert len(learners) == 1  # by the update of the construction
        store.batch_insert([{"x": 1}, {"x": 2}, {"x": 3}])
        assert client.update() is True
        assert [item["x"] for item in learners.get_latest_data(-1)] == [0, 1, 2, 3]
        assert [item["x"] for item in store.get_latest_data(-1)] == [1, 2, 3]
        assert store.get_latest_data(2) == [{"x": 3}]
        assert learners.latest_data_id() == store.latest_data_id() == 3
        assert client.get_server_last_update_id("actor") == 3
        assert client.get_server_last_update_id("unknown") is None


def test_what_is_inserted_may_be_changed_afterwards() -> None:
    store, frame = QueuedDataStore(2), np.zeros(3)
    store.insert({"frame": frame})
    frame[:] = 1
    assert not store.get_latest_data(-1)[0]["frame"].any()


def test_an_update_tells_whether_a_learner_has_it_all() -> None:
    store = QueuedDataStore(10)
    with trainer({"actor": QueuedDataStore(10)}) as (server, config), actor(config) as without:
        assert without.update() is False  # it has no store
        with actor(config, store) as client:
            assert client.update() is True
            assert client.update_datastore("actor", -1, confirm_update=True) is True
            assert client.update_datastore("unknown", -1) is False
            server.stop()
            assert client.update() is False
    with trainer() as (_, config), actor(config, store) as client:
        store.insert(1)
        assert client.update() is False  # this one has no store of that name


def test_a_learner_that_starts_anew_is_sent_what_the_queue_still_has() -> None:
    port, store = free_port(), QueuedDataStore(3)
    config = TrainerConfig(port, None)
    first, second = QueuedDataStore(9), QueuedDataStore(9)
    server = TrainerServer(config)
    server.register_data_store("actor", first)
    with running(server), actor(config, store) as client:
        for number in range(5):
            store.insert({"x": number})
            client.update()
        server.stop()
        assert client.update() is False
        server = TrainerServer(config)
        server.register_data_store("actor", second)
        with running(server):
            wait_until(client.update)
    assert [item["x"] for item in first.get_latest_data(-1)] == [0, 1, 2, 3, 4]
    assert [item["x"] for item in second.get_latest_data(-1)] == [2, 3, 4]


def test_items_arrive_one_by_one_writable_and_without_what_cannot_be_sent() -> None:
    class Learners(DataStoreBase):
        """What a script has of its own, extra keys and all."""

        def __init__(self) -> None:
            super().__init__(100)
            self.items: list[Any] = []
            self._lock = threading.Lock()

        def insert(self, data: Any) -> None:
            data["observations"] += 1  # in place
            self.items.append({"observations": data["observations"]})

        def latest_data_id(self) -> int:
            return len(self.items) % 3  # SERL's goes round with its ring

        def get_latest_data(self, from_id: Any) -> list[Any]:
            raise NotImplementedError

        def __len__(self) -> int:
            return len(self.items)

    learners, store = Learners(), QueuedDataStore(100)
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        for number in range(10):
            store.insert({"observations": np.full(4, number), "infos": {"t": np.float32(1)}})
        assert client.update()
        store.insert({"observations": np.full(4, 10), "infos": {"lock": threading.Event}})
        assert client.update()
        assert client.left_out == client.stats()["left_out"] == 1
    assert [int(item["observations"][0]) for item in learners.items] == list(range(1, 12))


def test_an_item_that_a_store_refuses_is_left_out_and_the_others_are_taken_once() -> None:
    class Picky(QueuedDataStore):
        def insert(self, data: Any) -> None:
            if data == 2:
                raise ValueError("not this one")
            super().insert(data)

    learners, store = Picky(10), QueuedDataStore(10)
    with trainer({"actor": learners}) as (server, config), actor(config, store) as client:
        store.batch_insert(range(5))
        client.update()
        assert learners.get_latest_data(-1) == [0, 1, 3, 4]
        assert server.stats()["items_refused"] == client.stats()["items_refused"] == 1


def test_a_store_that_inserts_batches_by_itself_does_so() -> None:
    class Whole(QueuedDataStore):
        batches: list[Any]

        def batch_insert(self, batch_data: Any) -> None:
            self.batches = [*getattr(self, "batches", []), batch_data]

    learners, store = Whole(10), QueuedDataStore(10)
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        store.batch_insert(range(5))
        client.update()
    assert learners.batches == [[0, 1, 2, 3, 4]]


def test_edgemls_own_stores_do_at_both_ends() -> None:
    learners = edgeml.data.ReplayBuffer(10)
    store = edgeml.data.QueuedDataStore(10)
    store.insert({"x": 0.0})
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        store.insert({"x": 1.0})
        assert client.update()
        assert learners.get_latest_data(0).columns["x"].tolist() == [0, 1]
        assert len(store) == 0  # these let go of what has arrived
        assert client.stats()["items_lost"] == 0


def test_items_that_come_during_updates_arrive_once_and_in_order() -> None:
    learners, store = QueuedDataStore(20_000), QueuedDataStore(20_000)

    def insert_all() -> None:
        for number in range(10_000):
            store.insert({"x": number})

    inserting = threading.Thread(target=insert_all)
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        inserting.start()
        while inserting.is_alive():
            assert client.update()
        assert client.update()
    assert [item["x"] for item in learners.get_latest_data(-1)] == [*range(10_000)]


def test_several_stores_are_sent_by_their_names() -> None:
    learners = {name: QueuedDataStore(10) for name in ("actor_env", "actor_env_intvn")}
    stores = {name: QueuedDataStore(10) for name in learners}
    with trainer(learners) as (_, config), actor(config, data_stores=stores) as client:
        stores["actor_env"].batch_insert([1, 2])
        stores["actor_env_intvn"].insert(2)
        assert client.update()
    assert [len(store) for store in learners.values()] == [2, 1]


def test_the_data_callback_is_given_items_and_the_last_ones_id() -> None:
    told = queue.Queue[Any]()
    store = QueuedDataStore(10)
    with (
        trainer({"actor": QueuedDataStore(10)}, data_callback=lambda *a: told.put(a)) as (
            _,
            config,
        ),
        actor(config, store) as client,
    ):
        store.batch_insert([{"x": np.zeros(2)}, {"x": np.ones(2)}])
        client.update()
        name, payload = told.get(timeout=20)
        assert (name, sorted(payload), payload["last_id"]) == ("actor", ["data", "last_id"], 1)
        assert payload["last_id"] == store.latest_data_id()
        payload["data"][1]["x"] += 1
        assert payload["data"][1]["x"].tolist() == [2, 2]


def test_registering_a_name_again_replaces_the_store() -> None:
    first, second, store = QueuedDataStore(10), QueuedDataStore(10), QueuedDataStore(10)
    with trainer({"actor": first}) as (server, config), actor(config, store) as client:
        store.insert(1)
        client.update()
        server.register_data_store("actor", second)
        store.insert(2)
        client.update()
        assert (len(first), len(second)) == (1, 1)
        assert server.data_store("actor") is second
        assert server.data_store("unknown") is None
        assert server.store_names() == {"actor"}


def test_updates_in_the_background_begin_at_once_and_end_with_the_last_items() -> None:
    learners, store = QueuedDataStore(10), QueuedDataStore(10)
    with trainer({"actor": learners}) as (_, config), actor(config, store) as client:
        store.insert(1)
        client.start_async_update(interval=60)
        client.start_async_update(interval=60)  # which changes nothing
        wait_until(lambda: len(learners) == 1)
        store.insert(2)
        client.stop()
        assert len(learners) == 2


# Weights ------------------------------------------------------------------------------------


class State(NamedTuple):
    step: int
    params: dict[str, Any]


def test_a_current_weight_is_delivered_again_only_to_whom_asks_for_it() -> None:
    fresh, all_of_them = queue.Queue[Any](), queue.Queue[Any]()
    with trainer() as (server, config), actor(config) as client:
        server.publish_network({"w": np.zeros(3)})
        client.recv_network_callback(fresh.put)
        client.recv_network_callback(all_of_them.put, current=True)
        assert all_of_them.get(timeout=20)["w"].tolist() == [0, 0, 0]
        server.publish_network({"w": np.ones(3)})
        weights = fresh.get(timeout=20)["w"]
        weights += 1  # they may be written to
        assert weights.tolist() == [2, 2, 2]
        assert all_of_them.get(timeout=20)["w"].tolist() == [1, 1, 1]


def test_weights_of_a_server_that_starts_anew_are_news() -> None:
    config = TrainerConfig(free_port(), None)
    got = queue.Queue[Any]()
    server = TrainerServer(config)
    with running(server), actor(config) as client:
        for number in range(3):
            server.publish_network(number)
        client.recv_network_callback(got.put)
        server.stop()
        server = TrainerServer(config)
        server.publish_network("anew")
        with running(server):
            assert got.get(timeout=20) == "anew"


def test_a_servers_own_in_edgeml_publishes_to_these_clients_too() -> None:
    got = queue.Queue[Any]()
    config = edgeml.TrainerConfig(0, 0, version="0.0.2")
    with (
        edgeml.TrainerServer(config).serving() as server,
        actor(TrainerConfig(server.port, 0)) as client,
    ):
        client.recv_network_callback(got.put)
        server.publish_network({"w": np.ones(3)})
        assert got.get(timeout=20)["w"].tolist() == [1, 1, 1]


def test_trees_come_back_in_the_types_in_which_they_were_published() -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    params = {"layer": {"kernel": jax.numpy.ones((2, 3)), "bias": np.zeros(3)}, "@agentlace": 1}
    tree = {
        "params": params,
        "opt_state": optax.adam(1e-3).init(params["layer"]),
        "mine": State(3, {"x": [np.float32(1), (2, "two", None)]}),
    }
    got = queue.Queue[Any]()
    with trainer() as (server, config), actor(config) as client:
        client.recv_network_callback(got.put)
        server.publish_network(tree)
        back = got.get(timeout=10)
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(tree)
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(np.array_equal, back, tree))
    assert isinstance(back["params"]["layer"]["kernel"], jax.Array)
    assert isinstance(back["params"]["layer"]["bias"], np.ndarray)
    assert isinstance(back["mine"], State)


@dataclasses.dataclass(frozen=True)
class Trained:
    params: Any
    step: int

    def __post_init__(self) -> None:
        raise AssertionError("this runs where it is made, and not where it arrives")


class FrozenDict(Mapping[str, Any]):
    """As flax has it."""

    def __init__(self, parts: Any) -> None:
        self._parts = dict(parts)

    def unfreeze(self) -> dict[str, Any]:
        return dict(self._parts)

    def __getitem__(self, key: str) -> Any:
        return self._parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def test_flaxs_trees_come_back_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flax.core.frozen_dict")
    module.FrozenDict = FrozenDict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flax.core.frozen_dict", module)
    monkeypatch.setattr(FrozenDict, "__module__", "flax.core.frozen_dict")
    monkeypatch.setattr(Trained, "_flax_dataclass", True, raising=False)
    trained = object.__new__(Trained)
    object.__setattr__(trained, "params", FrozenDict({"w": np.ones(2)}))
    object.__setattr__(trained, "step", 3)
    back = values.unpack(values.pack({"state": trained}))["state"]
    assert type(back) is Trained
    assert back.step == 3
    assert type(back.params) is FrozenDict
    assert back.params["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("subprocess:Popen", {"args": "false"}),
        ("builtins:dict", {"a": 1}),
        ("edgeml.services.trainer.config:TrainerConfig", {"port_number": 1}),  # a dataclass
        ("test_agentlace:State", {"step": 1}),  # not all of its fields
        ("nowhere:Unknown", {"a": 1}),
        ("os:environ.data", {}),
        ("", {}),
    ],
)
def test_a_name_that_came_makes_nothing_but_containers(name: str, parts: dict[str, Any]) -> None:
    assert values.unpack({"@agentlace": name, "of": parts}) == parts
    assert type(values.unpack({"@agentlace": name, "of": parts})) is dict


@pytest.mark.parametrize(
    "value", [{"@agentlace": 1, "of": {}}, {"@agentlace": "dict"}, {"@agentlace": "dict", "of": 1}]
)
def test_what_no_client_sends_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="typed value"):
        values.unpack(value)


def test_weights_that_cannot_be_sent_are_told_of_at_once() -> None:
    server = TrainerServer(TrainerConfig(0, 0))
    with pytest.raises(edgeml.NotEncodable, match="apply_fn"):
        server.publish_network({"apply_fn": print})
    server.stop()


# Infos --------------------------------------------------------------------------------------


def test_infos_pass_with_whatever_is_in_them() -> None:
    told = queue.Queue[Any]()

    def answer(type: str, payload: Any) -> dict[str, Any]:
        told.put(payload)
        return {"kept": 1, "thread": threading.current_thread()}

    cycle: dict[str, Any] = {"again": 1}
    cycle["cycle"] = cycle
    info = {
        "episode": {"r": np.float32(2.5), "l": np.int64(7), "t": 0.25, "image": np.zeros((2, 2))},
        "success": np.True_,
        "counts": collections.OrderedDict(a=1),
        "where": (1.0, "left"),
        "env": object(),
        "final_info": np.array([None, {}], dtype=object),
        "list": [1, print, 3],
        ("a", "tuple"): 1,
    }
    with (
        trainer(request_types=["send-stats"], request_callback=answer) as (_, config),
        actor(config) as client,
    ):
        assert client.request("send-stats", {"environment": info}) == {"kept": 1}
        got = told.get(timeout=20)["environment"]
        assert client.left_out == 4
        assert got.pop("episode").pop("image").tolist() == [[0, 0], [0, 0]]
        assert got == {"success": True, "counts": {"a": 1}, "where": (1.0, "left"), "list": [1, 3]}
        assert client.request("send-stats", cycle) == {"kept": 1}
        assert told.get(timeout=20)["again"] == 1
        assert client.request("send-stats", print) == {"kept": 1}
        assert told.get(timeout=20) == {}


# Both in one process ------------------------------------------------------------------------


def test_the_interface_of_one_process_calls_directly() -> None:
    both = TrainerSMInterface()
    got: list[Any] = []
    assert both.request("get", {}) is None
    both.publish_network(0)
    both.recv_network_callback(callback_fn=got.append)
    both.register_request_callback(callback_fn=lambda type, payload: {type: payload})
    both.start(threaded=True)
    both.start_async_update(interval=1)
    both.publish_network(params={"w": 1})
    both.update()
    assert both.request(type="get", payload=2) == {"get": 2}
    both.stop()
    assert got == [{"w": 1}]


# Action -------------------------------------------------------------------------------------


@contextmanager
def device(**changes: Any) -> Iterator[tuple[ActionServer, ActionConfig]]:
    settings = {"action_keys": ["move"], "observation_keys": ["cam", "arm"], "broadcast_port": 0}
    settings.update(changes)
    asked: list[Any] = []

    def observe(keys: set[str]) -> dict[str, Any]:
        asked.append(keys)
        if keys == {"arm"}:
            raise RuntimeError("of the arm")
        return {"cam": np.zeros((4, 4)), "status": "only what there is"}

    def act(key: str, payload: Any) -> Any:
        return {"key": key, "payload": payload, "env": object()}

    server = ActionServer(ActionConfig(0, **settings), observe, act)
    with running(server):
        yield server, ActionConfig(server.port, **settings)
    assert all(type(keys) is set for keys in asked)


@contextmanager
def controller(config: ActionConfig, **options: Any) -> Iterator[ActionClient]:
    client = ActionClient("127.0.0.1", config, timeout_ms=5000, **options)
    try:
        yield client
    finally:
        client.stop()


def test_a_device_answers_what_its_callbacks_give() -> None:
    with device() as (_, config), controller(config) as client:
        observation = client.obs()
        observation["cam"] += 1
        assert observation["status"] == "only what there is"
        assert client.obs({"cam"})["cam"].shape == (4, 4)
        assert client.obs(keys={"arm"}) is None  # its callback raised
        assert client.act("move", {"x": np.ones(2)})["payload"]["x"].tolist() == [1, 1]
        assert client.act("move") == {"key": "move", "payload": {}}
        with pytest.raises(AssertionError, match="head"):
            client.obs({"head"})
        with pytest.raises(ValueError, match="dance"):
            client.act("dance", {})
        with pytest.raises(edgeml.NotEncodable):
            client.act("move", {"x": object()})


def test_observations_are_published_to_those_who_listen() -> None:
    got = queue.Queue[Any]()
    with device() as (server, config), controller(config) as client:
        assert server.publish_obs({"cam": 0}) is True
        client.register_obs_callback(callback=got.put)
        server.publish_obs({"cam": 1})
        assert got.get(timeout=20) == {"cam": 1}
        server.stop()
        assert client.obs() is None


def test_nothing_is_published_without_a_broadcast_port() -> None:
    with device(broadcast_port=None) as (server, config), controller(config) as client:
        assert server.publish_obs({"cam": 1}) is False
        with pytest.raises(RuntimeError, match="broadcast_port"):
            client.register_obs_callback(callback=print)


def test_a_device_without_callbacks_says_so() -> None:
    config = ActionConfig(0, ["move"], ["cam"])
    with running(ActionServer(config, None, None)) as server:
        config.port_number = server.port
        with controller(config, wait_for_server=True) as client:
            assert client.obs()["success"] is False
            assert client.act("move", {})["success"] is False


# Inference ----------------------------------------------------------------------------------


def test_functions_are_called_by_name_and_replaced_by_registering_again() -> None:
    server = InferenceServer(0)
    server.register_interface("double", lambda payload: payload)
    server.register_interface("double", lambda payload: {"x": 2 * payload["x"]})
    server.register_interface("fail", lambda payload: 1 / 0)
    with running(server):
        client = InferenceClient("127.0.0.1", server.port)
        assert client.interfaces() == {"double", "fail"}
        result = client.call("double", {"x": np.ones(3)})
        result["x"] += 1
        assert result["x"].tolist() == [3, 3, 3]
        assert client.call("fail", {}) is None
        unknown = client.call("unknown", {})
        assert (unknown["success"], sorted(unknown)) == (False, ["message", "success"])
        client.stop()


def test_a_client_of_functions_may_be_there_before_its_server() -> None:
    port = free_port()
    client = InferenceClient("127.0.0.1", port)
    assert client.call("double", {}) is None
    assert client.interfaces() == set()
    server = InferenceServer(port)
    server.register_interface("double", lambda payload: 2 * payload)
    with running(server):
        assert client.call("double", 2) == 4
    client.stop()


# Environments -------------------------------------------------------------------------------


class Counting(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Dict({"n": gymnasium.spaces.Box(0, 9, (2,), np.float32)})
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return {"n": np.zeros(2, np.float32)}, {"seed": seed}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation = {"n": np.full(2, self.steps, np.float32) + action}
        return (
            observation,
            0.5,
            self.steps == 3,
            False,
            {"cycle": np.int32(1), "env": self, "at": State(1, {})},
        )


def test_an_environment_is_stepped_from_afar() -> None:
    from agentlace.gym_env import GymEnvClient, GymEnvServerWrapper

    with running(GymEnvServerWrapper(Counting(), port=0)) as server:
        env = GymEnvClient("127.0.0.1", server.port, timeout_ms=5000)
        assert env.observation_space == Counting.observation_space
        assert env.action_space == Counting.action_space
        assert env.reset(seed=3)[1] == {"seed": 3}
        for number in range(1, 4):
            observation, reward, done, truncated, info = env.step(np.ones(2, np.float32))
            observation["n"] -= 1
            assert observation["n"].tolist() == [number, number]
            expected = {"cycle": 1, "at": State(1, {})}
            assert (reward, done, truncated, info) == (0.5, number == 3, False, expected)
            assert type(info["at"]) is State
        env.close()
        assert server.left_out == 3


# Keys and transports --------------------------------------------------------------------------


def test_who_has_no_key_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "keys"
    make_server_keys(home)
    make_client_keys(home, "actor")
    learners, store = QueuedDataStore(10), QueuedDataStore(10)
    got = queue.Queue[Any]()
    monkeypatch.setenv("EDGEML_CREDENTIALS", str(home))
    with trainer({"actor": learners}) as (server, config):
        monkeypatch.setenv("EDGEML_CREDENTIALS", str(home / "clients" / "actor"))
        with actor(config, store) as client:
            client.recv_network_callback(got.put)
            server.publish_network("weights")
            assert got.get(timeout=20) == "weights"
            store.insert(1)
            assert client.update()
        monkeypatch.delenv("EDGEML_CREDENTIALS")
        with pytest.raises(edgeml.EdgemlError):
            TrainerClient("actor", "127.0.0.1", config)
    assert len(learners) == 1


@pytest.mark.parametrize("name", ["shm", "grpc"])
def test_the_transport_is_the_environments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEML_TRANSPORT", name)
    learners, store = QueuedDataStore(10), QueuedDataStore(10)
    with trainer({"actor": learners}) as (server, config), actor(config, store) as client:
        assert server.url.startswith(f"{name}://")
        store.insert({"x": np.zeros(1000)})
        assert client.update()
    assert len(learners) == 1


def test_nothing_knows_of_pickles() -> None:
    for path in (ROOT / "plugins" / "agentlace" / "agentlace").rglob("*.py"):
        imported = re.findall(r"^ *(?:import|from) ([\w.]+)", path.read_text(), re.MULTILINE)
        assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {*imported}, path


# Helpers ------------------------------------------------------------------------------------


def test_images_travel_as_jpeg_in_opencvs_order_of_colours() -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :24, 0] = 250  # blue, by OpenCV
    file = utils.mat_to_jpeg(image)
    assert file[:2] == b"\xff\xd8"
    back = utils.jpeg_to_mat(file)
    assert back.dtype == np.uint8
    assert back.shape == image.shape
    assert np.abs(back.astype(int) - image).mean() < 3
    assert utils.jpeg_to_mat(utils.mat_to_jpeg(image[:, :, 0])).shape == image.shape
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(back.astype(int) - theirs).max() <= 2


def test_the_other_helpers(capsys: pytest.CaptureFixture[str]) -> None:
    compress, decompress = utils.make_compression_method("zlib")
    value = {"x": np.zeros(10_000), "name": "zeros"}
    assert len(compress(value)) < 1000
    assert decompress(compress(value))["x"].shape == (10_000,)
    with pytest.raises(ValueError, match="unknown"):
        utils.make_compression_method("unknown")
    assert utils.compute_hash({"a": 1}) == utils.compute_hash({"a": 1}) != utils.compute_hash({})
    assert len(utils.compute_hash("x")) == 32
    utils.print_error("red")
    utils.print_warning("yellow")
    utils.print_size(value)
    assert capsys.readouterr().out.startswith("\033[91mred\033[0m\n\033[93myellow\033[0m\n")
