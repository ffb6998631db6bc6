"""The trainer pair: what actors upload arrives once and whole, and weights come back."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgeml import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.client import Client
from edgeml.core.message import pooled
from edgeml.core.url import Url
from edgeml.data import Batch, QueuedDataStore, ReplayBuffer, checkpoint
from pairs import (
    free_port,
    no_thread_left,
    plain_client,
    process,
    started,
    stop_server,
    took,
    wait_until,
)


def config_of(transport, port=0, **kwargs) -> TrainerConfig:
    return TrainerConfig(port, None, **{"request_types": ["stats"], **kwargs}, transport=transport)


@contextlib.contextmanager
def learner(transport, port=0, store=None, name="actor_env", config=None, **kwargs):
    """A started server with a store for ``name``; it has room for all that a test sends."""
    server = TrainerServer(config or config_of(transport, port), **kwargs)
    if store is None:
        store = QueuedDataStore(1_000_000)
    server.register_data_store(name, store)
    with started(server):
        yield server


def actor(server, store=None, name="actor_env", **kwargs) -> TrainerClient:
    config = config_of(server.config.transport, server.port)
    return TrainerClient(name, "127.0.0.1", config, store, **kwargs)


def transition(n: int) -> dict:
    return {
        "observations": np.full(3, n, np.float32),
        "actions": np.full(2, n, np.float32),
        "rewards": float(n),
        "id": n,
    }


def filled(n: int, first: int = 0) -> QueuedDataStore:
    store = QueuedDataStore(100_000)
    store.batch_insert([transition(k) for k in range(first, first + n)])
    return store


def ids(store) -> list[int]:
    return [int(item["id"]) for item in store.get_latest_data(0)]


# The program that the README shows -------------------------------------------------------------


def test_the_program_of_the_readme(transport):
    weights = []
    received = threading.Event()

    def data_callback(store_name, batch):
        assert store_name == "agent1"
        arrived.set()

    def callback(params):
        weights.append(params)
        received.set()

    arrived = threading.Event()
    trainer_config = TrainerConfig(port_number=0, broadcast_port=0, transport=transport)
    server = TrainerServer(trainer_config, data_callback)
    buffer = ReplayBuffer(capacity=2000)
    server.register_data_store("agent1", buffer)
    server.start(threaded=True)

    data_store = ReplayBuffer(capacity=2000)
    client = TrainerClient(
        "agent1",
        "localhost",
        TrainerConfig(port_number=server.port, transport=transport),
        data_store,
    )
    client.recv_network_callback(callback)
    client.start_async_update(interval=10)
    env_step = (np.zeros(4, np.float32), 1.0, False, False)
    for _ in range(25):
        data_store.insert(env_step)
    client.update()
    assert arrived.wait(20)
    assert len(buffer) == 25
    sample = buffer.sample(8)
    assert sample[0].shape == (8, 4)

    server.publish_network({"layer": {"w": np.ones((2, 2)), "b": np.zeros(2)}})
    assert received.wait(20)
    assert weights[0]["layer"]["w"].tolist() == [[1, 1], [1, 1]]
    client.stop()
    server.stop()


# Uploads --------------------------------------------------------------------------------------


def test_an_update_sends_what_is_new_and_tells_how_much(transport):
    with learner(transport) as server, actor(server, store := QueuedDataStore(1000)) as client:
        assert client.update().applied == 0
        for n in range(10):
            store.insert(transition(n))
        assert client.update().applied == 10
        assert client.update().applied == 0
        store.batch_insert([transition(n) for n in range(10, 15)])
        assert client.update(timeout=20).applied == 5
        there = server.data_store("actor_env")
        assert ids(there) == list(range(15))
        item = next(iter(there.get_latest_data(6, limit=1)))
        assert item["observations"].dtype == np.float32
        assert item["observations"].tolist() == [6, 6, 6]
        assert server.stats()["items"] == 15
        assert client.lost == 0


@pytest.mark.parametrize(
    "items",
    [
        [{"obs": {"cam": np.zeros((4, 4), np.uint8), "q": np.ones(3)}, "done": False}] * 5,
        [(np.zeros(3), 1.0, False, {"success": True})] * 5,
        [{"text": "pick it up", "frame": np.zeros(5)}, {"other": [1, 2.5, None]}],
        [{"frames": np.zeros((n, 2))} for n in range(1, 5)],
    ],
    ids=["nested dicts", "tuples of env.step", "items unlike", "arrays of many lengths"],
)
def test_items_of_any_kind_arrive_as_they_were(transport, items):
    with learner(transport) as server, actor(server, store := QueuedDataStore(10)) as client:
        store.batch_insert(items)
        assert client.update().applied == len(items)
        there = list(server.data_store("actor_env").get_latest_data(0))
    assert repr(there) == repr(list(store_of(items)))


def store_of(items):
    """The same items through a store alone, which may make numpy scalars of numbers."""
    store = QueuedDataStore(10)
    store.batch_insert(items)
    return store.get_latest_data(0)


def test_replay_buffers_on_both_sides_agree(transport):
    with (
        learner(transport, store=ReplayBuffer(500)) as server,
        actor(server, mine := ReplayBuffer(500)) as client,
    ):
        for n in range(300):
            mine.insert(transition(n))
            if n % 70 == 0:
                client.update()
        client.update()
        there = server.data_store("actor_env")
        assert ids(there) == ids(mine) == list(range(300))
        assert there.sample(16)["observations"].shape == (16, 3)


def test_what_is_inserted_may_be_changed_at_once(transport):
    with learner(transport) as server, actor(server, store := QueuedDataStore(1000)) as client:
        frame = np.empty(50_000, np.uint8)
        for n in range(20):
            frame[:] = n
            store.insert({"frame": frame})
            frame[:] = 255
            if n % 5 == 4:
                client.update()
        there = server.data_store("actor_env").get_latest_data(0)
        assert [(item["frame"].min(), item["frame"].max()) for item in there] == [
            (n, n) for n in range(20)
        ]


def test_large_uploads_go_in_pieces_of_a_few_megabytes(transport):
    batches: list[Batch] = []
    for as_columns in (True, False):
        batches.clear()
        with (
            learner(transport, data_callback=lambda name, batch: batches.append(batch)) as server,
            actor(server, store := QueuedDataStore(1000), timeout=30) as client,
        ):
            extra = {} if as_columns else {"text": "no number, so no column"}
            for n in range(100):
                store.insert({"frame": np.full(500_000, n, np.uint8), "n": n, **extra})
            assert client.update().applied == 100
            sizes = [len(batch) for batch in batches]
            assert sum(sizes) == 100
            assert max(sizes) * 500_000 < 10e6, sizes
            frames = [int(item["frame"][0]) for batch in batches for item in batch]
            assert frames == list(range(100))


def test_small_items_go_many_at_a_time(transport):
    batches: list[int] = []
    with (
        learner(transport, data_callback=lambda name, batch: batches.append(len(batch))) as server,
        actor(server, filled(20_000)) as client,
    ):
        assert client.update().applied == 20_000
    assert len(batches) < 10


def test_a_client_may_have_several_stores(transport):
    stores = {"left": QueuedDataStore(10), "right": QueuedDataStore(10)}
    with learner(transport, name="arm") as server:
        for name in stores:
            server.register_data_store(name, QueuedDataStore(10))
        assert sorted(server.store_names()) == ["arm", "left", "right"]
        with actor(server, QueuedDataStore(10), "arm", data_stores=stores) as client:
            stores["left"].insert({"id": 1})
            stores["right"].batch_insert([{"id": 2}, {"id": 3}])
            assert client.update().applied == 3
        assert {name: ids(server.data_store(name)) for name in server.store_names()} == {
            "arm": [],
            "left": [1],
            "right": [2, 3],
        }


def test_a_store_given_twice_or_registered_twice_is_refused(transport):
    with learner(transport) as server:
        with pytest.raises(ValueError, match="actor_env"):
            server.register_data_store("actor_env", QueuedDataStore(1))
        with no_thread_left(), pytest.raises(ValueError, match="both"):
            actor(server, QueuedDataStore(1), data_stores={"actor_env": QueuedDataStore(1)})


def test_a_store_that_the_learner_lacks_is_told_with_those_it_has(transport):
    with learner(transport) as server:
        with pytest.raises(UnknownInterface, match=r"'nobody'; known: actor_env"):
            server.data_store("nobody")
        with actor(server, filled(3), "nobody") as client:
            for _ in range(2):
                with pytest.raises(UnknownInterface, match=r"'nobody'; known: actor_env"):
                    client.update()
            server.register_data_store("nobody", late := QueuedDataStore(10))
            assert client.update().applied == 3
            assert ids(late) == [0, 1, 2]


def test_what_the_store_refuses_is_told_and_nothing_of_it_is_in(transport):
    with learner(transport, store=ReplayBuffer(100)) as server:
        with actor(server, filled(5)) as client:
            client.update()
        with actor(server, store := QueuedDataStore(10)) as client:
            store.insert({"observations": "of another shape"})
            for _ in range(2):
                with pytest.raises(
                    RemoteError, match="ValueError: store 'actor_env', item 1: item"
                ):
                    client.update(on_refused="raise")
        assert len(server.data_store("actor_env")) == 5


def test_an_item_that_cannot_be_carried_is_told(transport):
    with learner(transport) as server, actor(server, store := QueuedDataStore(10)) as client:
        store.insert({"obs": {1, (2, "x")}, "bad": complex})
        with pytest.raises(NotEncodable, match=r"item\['bad'\] is"):
            client.update(on_refused="raise")


def test_a_full_store_that_refuses_holds_the_client_up_and_loses_nothing(transport):
    there = QueuedDataStore(10, on_full="raise")
    with learner(transport, store=there) as server, actor(server, store := filled(8)) as client:
        client.update()
        for n in range(8, 16):
            store.insert(transition(n))
        for _ in range(2):
            with pytest.raises(Overloaded):
                client.update()
        taken = ids(there)
        there.release(8)
        assert client.update().applied == 8
        assert taken + ids(there) == list(range(16))


# Once and only once ---------------------------------------------------------------------------


@pytest.fixture
def raw(transport):
    """A learner, and a client that speaks its protocol by hand."""
    with learner(transport) as server:
        config = config_of(transport)
        urls = [Url(transport, "127.0.0.1", server.port)]
        with contextlib.closing(
            Client("trainer", urls, config=config.shared(), client_id="me")
        ) as client:

            def upload(first, n, after=None, incarnation=1, store="actor_env", **more):
                after = first - 1 if after is None else after
                items = [{"id": k} for k in range(first, first + n)]
                payload = Batch.of(items, first).to_payload()
                upload = {
                    "store": store,
                    "incarnation": incarnation,
                    "acknowledged": after,
                    "after": after,
                    "batch": payload,
                    **more,
                }
                return client.call("update", upload)["mark"]

            yield server, client, upload


def test_an_upload_that_is_repeated_adds_nothing(raw):
    server, _, upload = raw
    for _ in range(3):
        assert upload(1, 10) == 10
    assert upload(6, 10, after=5) == 15  # half of it is there
    assert upload(2, 3, after=1) == 15  # an old one, late
    assert ids(server.data_store("actor_env")) == list(range(1, 16))
    assert server.stats()["items_repeated"] == 28


def test_a_gap_is_refused_and_answered_with_where_to_go_on(raw):
    server, _, upload = raw
    assert upload(1, 10) == 10
    assert upload(15, 5) == 10
    assert ids(server.data_store("actor_env")) == list(range(1, 11))
    assert upload(11, 9) == 19


def test_what_the_sender_says_is_lost_is_no_gap_and_counted(raw):
    server, _, upload = raw
    assert upload(1, 10) == 10
    assert upload(15, 5, after=10) == 19
    assert server.stats()["items_lost_by_clients"] == 4


def test_a_learner_that_does_not_know_the_items_asks_for_all_that_are_held(raw):
    server, _, upload = raw
    assert upload(101, 10, after=100) == 0
    assert upload(101, 10, after=0, acknowledged=0) == 110  # those before are gone
    assert ids(server.data_store("actor_env")) == list(range(101, 111))


def test_a_later_of_several_uploads_that_comes_first_is_a_gap(raw):
    """The learner has restarted in the midst of them."""
    server, _, upload = raw
    assert upload(11, 10, acknowledged=0) == 0
    assert upload(1, 10, acknowledged=0) == 10
    assert upload(11, 10, acknowledged=0) == 20
    assert upload(31, 10, acknowledged=20) == 20
    assert ids(server.data_store("actor_env")) == list(range(1, 21))


def test_items_are_known_by_their_stores_numbering_whichever_client_sends_them(raw):
    server, _, upload = raw
    assert upload(1, 10, numbering=[[7, 0]]) == 10
    assert upload(1, 12, numbering=[[7, 0]], incarnation=2) == 12
    assert upload(1, 15, numbering=[[7, 11], [8, 0]], incarnation=2) == 15  # branched off it at 11
    assert upload(1, 12, numbering=[[7, 0]], incarnation=2) == 12
    assert ids(server.data_store("actor_env")) == [*range(1, 13), *range(12, 16)]


def test_a_newer_incarnation_starts_anew_and_shuts_the_older_out(raw):
    server, _, upload = raw
    assert upload(1, 3, incarnation=5) == 3
    assert upload(1, 2, incarnation=6) == 2
    with pytest.raises(PermissionDenied, match="'me'"):
        upload(4, 3, incarnation=5)
    assert upload(3, 1, incarnation=6) == 3
    assert ids(server.data_store("actor_env")) == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"store": "actor_env"},
        {
            "store": 3,
            "incarnation": 1,
            "acknowledged": 0,
            "after": 0,
            "batch": {"first_id": 1, "items": []},
        },
        {"store": "actor_env", "incarnation": "1", "acknowledged": 0, "after": 0, "batch": {}},
        {
            "store": "actor_env",
            "incarnation": 1,
            "acknowledged": 0,
            "after": -1,
            "batch": {"first_id": 1},
        },
        {
            "store": "actor_env",
            "incarnation": 1,
            "acknowledged": 0,
            "after": 0,
            "batch": {"first_id": 0, "items": []},
        },
        {
            "store": "actor_env",
            "incarnation": 1,
            "acknowledged": 0,
            "after": 3,
            "batch": {"first_id": 3, "items": []},
        },
        {
            "store": "actor_env",
            "incarnation": 1,
            "acknowledged": 0,
            "after": 0,
            "batch": {"first_id": 1, "items": 7},
        },
        {"store": "actor_env", "incarnation": 1, "acknowledged": 0, "after": 0, "batch": None},
        *(
            {
                "store": "actor_env",
                "incarnation": 1,
                "acknowledged": 0,
                "after": 0,
                "batch": {"first_id": 1, "items": [{"id": 1}]},
                **wrong,
            }
            for wrong in (
                {"numbering": None},
                {"numbering": []},
                {"numbering": [1]},
                {"numbering": [[1]]},
                {"numbering": [["1", 0]]},
                {"numbering": [[1 << 63, 0]]},
                {"numbering": [[1, -1], [2, 0]]},
                {"numbering": [[k, k] for k in range(70)]},
                {"epoch": "1"},
                {"epoch": True},
            )
        ),
        {
            "store": "actor_env",
            "incarnation": 1,
            "acknowledged": 0,
            "after": 0,
            "batch": {"first_id": 1, "columns": {"a": np.zeros(2), "b": np.zeros(3)}},
        },
    ],
)
def test_an_upload_that_makes_no_sense_is_refused(raw, payload):
    server, client, upload = raw
    with pytest.raises(Malformed):
        client.call("update", payload)
    assert upload(1, 3) == 3
    assert ids(server.data_store("actor_env")) == [1, 2, 3]


def test_two_clients_with_one_name_feed_one_store_and_nothing_is_lost_or_doubled(transport):
    with learner(transport) as server, contextlib.ExitStack() as stack:
        stores = [QueuedDataStore(10_000) for _ in range(3)]
        clients = [stack.enter_context(actor(server, store)) for store in stores]
        assert len({client.client_id for client in clients}) == 3

        def act(k) -> None:
            for n in range(300):
                stores[k].insert({"id": 1000 * k + n})
                if n % 20 == 0:
                    clients[k].update()
            clients[k].update()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(act, range(3)))
        arrived = ids(server.data_store("actor_env"))
        for k in range(3):
            assert [n for n in arrived if n // 1000 == k] == list(range(1000 * k, 1000 * k + 300))
        assert len(arrived) == 900


def test_updates_from_many_threads_of_one_client_send_everything_once(transport):
    with learner(transport) as server, actor(server, store := QueuedDataStore(10_000)) as client:

        def act(k) -> int:
            for n in range(100):
                store.insert({"id": 100 * k + n})
                if n % 10 == 0:
                    client.update()
            return client.update()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(act, range(4)))
        assert sorted(ids(server.data_store("actor_env"))) == list(range(400))
        assert server.stats()["items"] == 400
        assert client.lost == 0


def test_an_update_whose_answer_comes_too_late_is_not_lost_and_not_doubled(transport):
    slow = threading.Event()
    with (
        learner(transport, data_callback=lambda name, batch: slow.wait(10)) as server,
        actor(server, store := filled(10)) as client,
    ):
        with pytest.raises(DeadlineExceeded):
            client.update(timeout=0.2)
        slow.set()
        for n in range(10, 15):
            store.insert(transition(n))
        assert client.update().applied == 15
        assert client.update().applied == 0
        assert ids(server.data_store("actor_env")) == list(range(15))
        assert len(store) == 0  # all were released
        assert client.lost == 0


def test_an_update_whose_answer_is_lost_under_way_adds_nothing_twice(transport, monkeypatch):
    with learner(transport) as server, actor(server, store := QueuedDataStore(100)) as client:
        dice = random.Random(1)

        def flaky(self, name, payload, timeout=None, call=Client.call):
            answer = call(self, name, payload, timeout)
            if dice.random() < 0.5:
                raise Unreachable("cut after it arrived")
            return answer

        failures = 0
        with monkeypatch.context() as patch:
            patch.setattr(Client, "call", flaky)
            for n in range(30):
                store.insert(transition(n))
                try:
                    client.update()
                except Unreachable:
                    failures += 1
        client.update()
        assert failures >= 10
        assert ids(server.data_store("actor_env")) == list(range(30))
        assert client.lost == 0


def test_a_local_store_that_overwrote_what_was_not_sent_counts_it(transport, caplog):
    with learner(transport) as server, actor(server, store := ReplayBuffer(10)) as client:
        for n in range(25):
            store.insert(transition(n))
        assert client.update().applied == 10
        assert client.lost == 15
        assert "15 items of 'actor_env' are held no more" in caplog.text
        assert ids(server.data_store("actor_env")) == list(range(15, 25))
        assert server.stats()["items_lost_by_clients"] == 15
        for n in range(25, 30):
            store.insert(transition(n))
        assert client.update().applied == 5
        assert client.lost == 15


def test_what_was_lost_is_counted_although_the_answer_or_a_later_piece_was_not_got(transport):
    hold = threading.Event()
    for when in ("first piece", "second piece"):
        hold.clear()
        pieces = []

        def wait(name, batch, when=when, pieces=pieces) -> None:
            pieces.append(len(batch))
            if len(pieces) == (1 if when == "first piece" else 2):
                hold.wait(10)

        with (
            learner(transport, data_callback=wait) as server,
            actor(server, store := ReplayBuffer(1000)) as client,
        ):
            for n in range(1300):
                store.insert(transition(n))
            with pytest.raises(DeadlineExceeded):
                client.update(timeout=0.2)
            hold.set()
            client.update()
            assert client.lost == 300
            assert ids(server.data_store("actor_env")) == list(range(300, 1300))


def test_what_arrived_before_it_was_overwritten_is_not_counted_as_lost(transport):
    arrived, slow = threading.Event(), threading.Event()

    def wait(name, batch):
        arrived.set()
        slow.wait(20)

    with (
        learner(transport, data_callback=wait) as server,
        actor(server, store := ReplayBuffer(10)) as client,
    ):
        for n in range(8):
            store.insert(transition(n))
        while not arrived.is_set():
            with pytest.raises(DeadlineExceeded):
                client.update(timeout=0.2)
        slow.set()
        for n in range(8, 18):
            store.insert(transition(n))
        client.update()
        assert client.lost == 0
        assert ids(server.data_store("actor_env")) == list(range(18))


def test_of_two_clients_with_one_explicit_id_the_newer_goes_on(transport):
    with learner(transport) as server:
        with actor(server, old := filled(5), client_id="arm-1") as first:
            assert first.client_id == "arm-1"
            assert first.update().applied == 5
            with actor(server, filled(3, 100), client_id="arm-1") as second:
                assert second.update().applied == 3
                old.insert(transition(5))
                for _ in range(2):
                    with pytest.raises(PermissionDenied, match="arm-1") as caught:
                        first.update()
                assert isinstance(caught.value, PermissionError)
                with actor(server, filled(2, 200)) as third:  # of no interest to others
                    assert third.update().applied == 2
        assert ids(server.data_store("actor_env")) == [0, 1, 2, 3, 4, 100, 101, 102, 200, 201]


def test_uploads_survive_restarts_of_the_learner_without_loss_or_doubles(transport):
    """The store outlives the server here, so that every item can be counted."""
    there = QueuedDataStore(100_000)
    store = QueuedDataStore(100_000)
    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(learner(transport, port, store=there))
        client = stack.enter_context(actor(server, store, timeout=5))
        client.start_async_update(interval=0.002)
        n = 0
        for _ in range(6):
            goal = len(there) + 50
            while len(there) < goal:
                store.insert(transition(n))
                n += 1
                time.sleep(0.0005)  # a robot's pace, not a wait for something
            server.stop()
            for _ in range(20):
                store.insert(transition(n))
                n += 1
            server = stack.enter_context(learner(transport, port, there))
        wait_until(lambda: len(there) >= n)
        client.stop()
        assert ids(there) == list(range(n))
        assert client.stats()["stores"]["actor_env"]["dropped"] == 0


def test_an_update_while_the_learner_is_away_says_so_and_sends_it_all_later(transport):
    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(learner(transport, port))
        client = stack.enter_context(actor(server, store := filled(5)))
        client.update()
        server.stop()
        store.insert(transition(5))
        with took(at_most=2), pytest.raises((Unreachable, Closed)):
            client.update()
        server = stack.enter_context(learner(transport, port))
        assert client.update().applied == 1
        assert ids(server.data_store("actor_env")) == [5]


# In the background ----------------------------------------------------------------------------


def test_async_updates_come_by_themselves_and_stop_sends_the_rest(transport):
    with no_thread_left(), learner(transport) as server:
        there = server.data_store("actor_env")
        client = actor(server, store := QueuedDataStore(1000))
        with client:
            client.start_async_update(interval=0.02)
            store.insert(transition(0))
            wait_until(lambda: ids(there) == [0])
            store.insert(transition(1))
            wait_until(lambda: ids(there) == [0, 1])
        with actor(server, store := QueuedDataStore(1000)) as client:
            client.start_async_update(interval=60)
            store.batch_insert([transition(n) for n in range(2, 500)])
            with took(at_most=10):  # not the minute
                client.stop()
                client.stop()
        assert ids(there) == list(range(500))


def test_without_async_updates_stop_sends_nothing(transport):
    with learner(transport) as server:
        with actor(server, filled(5)):
            pass
        assert len(server.data_store("actor_env")) == 0


def test_an_update_that_is_asked_for_is_sent_while_the_program_goes_on(transport):
    hold = threading.Event()
    with (
        no_thread_left(),
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
    ):
        with actor(server, store := filled(5)) as client:
            with took(at_most=5):
                futures = [client.update_async() for _ in range(3)]
            wait_until(lambda: len(server.data_store("actor_env")) == 5)
            assert not futures[0].done()
            store.insert(transition(5))  # goes with the next
            hold.set()
            assert [future.result(10).applied for future in futures] == [5, 1, 0]
            assert client.update().applied == 0
            with pytest.raises(ValueError, match="on_refused is one of"):
                client.update_async(on_refused="ignore")
        with pytest.raises(Closed):
            client.update_async()
        assert ids(server.data_store("actor_env")) == list(range(6))


def test_updates_of_all_kinds_take_turns_and_each_item_arrives_once_and_in_order(transport):
    with learner(transport) as server, actor(server, store := QueuedDataStore(100_000)) as client:
        client.start_async_update(interval=0.002)
        with ThreadPoolExecutor(2) as pool:
            counts = []
            for n in range(300):
                store.insert(transition(n))
                counts.append(client.update_async() if n % 2 else pool.submit(client.update))
            told = [future.result(20).applied for future in counts]
        wait_until(lambda: ids(server.data_store("actor_env")) == list(range(300)))
        assert 0 <= sum(told) <= 300  # what went by itself is told to nobody


def test_an_update_that_is_asked_for_raises_what_update_raises(transport):
    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(learner(transport, port))
        client = stack.enter_context(actor(server, store := filled(5), timeout=2))
        assert client.update_async().result(10).applied == 5
        store.insert({"id": object()})
        with pytest.raises(NotEncodable, match="item 6"):
            client.update_async(on_refused="raise").result(10)
        assert client.update_async().result(10).applied == 0
        assert client.stats()["items_refused"] == 1
        server.stop()
        store.insert(transition(7))
        with pytest.raises((Unreachable, Closed)):
            client.update_async().result(10)
        server = stack.enter_context(learner(transport, port))
        assert client.update_async().result(10).applied == 1


def test_an_update_that_is_cancelled_before_its_turn_is_left_out(transport):
    hold = threading.Event()
    with (
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
        actor(server, store := filled(5)) as client,
    ):
        first = client.update_async()
        wait_until(lambda: len(server.data_store("actor_env")) == 5)
        assert not first.cancel()
        second, third = client.update_async(), client.update_async()
        assert second.cancel()
        store.insert(transition(5))
        hold.set()
        assert [first.result(10).applied, third.result(10).applied] == [5, 1]
        assert second.cancelled()


def test_stop_sends_what_updates_that_were_asked_for_wait_for(transport, caplog):
    hold = threading.Event()
    with (
        no_thread_left(),
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
    ):
        with ThreadPoolExecutor(1) as pool, actor(server, store := filled(5)) as client:
            first = client.update_async()
            wait_until(lambda: len(server.data_store("actor_env")) == 5)
            store.insert(transition(5))
            rest = [client.update_async() for _ in range(3)]
            rest[0].cancel()
            stopping = pool.submit(client.stop)
            hold.set()
            stopping.result(20)
        assert first.result(0).applied == 5
        assert [future.result(0).applied for future in rest[1:]] == [1, 0]
        assert ids(server.data_store("actor_env")) == list(range(6))
    assert "not sent" not in caplog.text


def test_stop_does_not_wait_long_for_updates_that_were_asked_for(transport, caplog, monkeypatch):
    monkeypatch.setattr("edgeml.services.trainer.updates._LAST_UPDATE", 0.3)
    hold = threading.Event()
    with (
        no_thread_left(),
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
    ):
        client = actor(server, store := filled(5), timeout=20)
        first = client.update_async()
        wait_until(lambda: len(server.data_store("actor_env")) == 5)
        store.insert(transition(5))
        second = client.update_async()
        with took(at_most=5):
            client.stop()
        for future in (first, second):
            with pytest.raises(Closed):
                future.result(20)
        hold.set()
    assert "were not sent" in caplog.text


def test_a_client_may_be_stopped_by_what_an_update_tells(transport):
    with no_thread_left(), learner(transport) as server:
        client = actor(server, filled(5))
        stopped = threading.Event()

        def stop(future) -> None:
            client.stop()
            stopped.set()

        client.update_async().add_done_callback(stop)
        assert stopped.wait(10)
        with pytest.raises(Closed):
            client.update_async()


def test_no_more_updates_wait_than_can_be_told(transport, monkeypatch):
    monkeypatch.setattr("edgeml.services.trainer.updates._MOST_WAITING", 3)
    hold = threading.Event()
    with (
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
        actor(server, filled(5)) as client,
    ):
        futures = [client.update_async()]
        wait_until(lambda: len(server.data_store("actor_env")) == 5)
        futures += [client.update_async() for _ in range(3)]
        with pytest.raises(Overloaded, match="3 updates wait"):
            client.update_async()
        hold.set()
        assert [future.result(10).applied for future in futures] == [5, 0, 0, 0]


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_must_be_positive_and_updates_start_once(transport, interval):
    with learner(transport) as server, actor(server) as client:
        with pytest.raises(ValueError, match="interval"):
            client.start_async_update(interval)
        client.start_async_update()
        with pytest.raises(RuntimeError, match="already"):
            client.start_async_update()


def test_async_updates_go_on_after_failures_of_any_kind(transport, caplog):
    class Moody(QueuedDataStore):
        fails = 3

        def latest_data_id(self) -> int:
            if self.fails:
                self.fails -= 1
                raise OSError("the disk is full")
            return super().latest_data_id()

    with (
        caplog.at_level(logging.WARNING, "edgeml"),
        learner(transport) as server,
        actor(server, store := Moody(10)) as client,
    ):
        store.insert(transition(0))
        client.start_async_update(interval=0.01)
        wait_until(lambda: ids(server.data_store("actor_env")) == [0])
    assert caplog.text.count("the disk is full") >= 3


@pytest.mark.parametrize("state", ["stopped", "silent"])
def test_stop_is_quick_when_the_learner_does_not_answer_and_tells_what_is_unsent(
    transport, caplog, state, monkeypatch
):
    monkeypatch.setattr("edgeml.services.trainer.updates._LAST_UPDATE", 0.3)
    hold = threading.Event()
    with (
        no_thread_left(),
        learner(transport, data_callback=lambda name, batch: hold.wait(20)) as server,
    ):
        client = actor(server, store := filled(5), timeout=20)
        client.start_async_update(interval=0.01)
        wait_until(lambda: len(server.data_store("actor_env")) == 5)
        for n in range(5, 12):
            store.insert(transition(n))
        if state == "stopped":
            hold.set()
            wait_until(lambda: len(server.data_store("actor_env")) == 12)
            server.stop()
            store.insert(transition(12))
        with took(at_most=5):
            client.stop()
        hold.set()
    assert "were not sent" in caplog.text


# Weights --------------------------------------------------------------------------------------


def test_one_who_connects_after_the_only_publication_gets_the_weights(transport):
    with learner(transport) as server:
        tree = {"dense": [{"w": np.ones((3, 2), np.float16)}, (np.int8(3), None)]}
        assert server.publish_network(tree) == 1
        with actor(server) as client:
            got: list = []
            subscription = client.recv_network_callback(got.append)
            wait_until(lambda: got)
            assert repr(got[0]) == repr(tree)
            with plain_client(server) as other:
                assert subscription.version == (other.epoch, 1)


def test_weights_changed_in_place_right_after_publishing_arrive_as_they_were(transport):
    params = {"w": np.empty(300_000, np.float32), "b": np.empty(10, np.float32)}
    with learner(transport) as server, actor(server) as client:
        torn: list = []
        newest: list = [0.0]

        def check(received) -> None:
            values = {float(a.min()) for a in received.values()}
            values |= {float(a.max()) for a in received.values()}
            if len(values) != 1:
                torn.append(values)
            newest[0] = max(values)

        client.recv_network_callback(check)
        for n in range(1, 201):
            for array in params.values():
                array[:] = n
            server.publish_network(params)
            for array in params.values():
                array[:] = -1
            if n % 20 == 0:
                wait_until(lambda n=n: newest[0] == n)
        assert not torn


def test_weights_reach_an_actor_while_the_learner_computes(transport):
    entered, hold = threading.Event(), threading.Event()

    def compute(name, batch) -> None:
        entered.set()
        hold.wait(20)

    with (
        learner(transport, data_callback=compute) as server,
        actor(server, filled(3)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        got: list = []
        client.recv_network_callback(got.append)
        update = pool.submit(client.update)
        assert entered.wait(20)
        for n in range(5):
            server.publish_network(n)
            with took(at_most=2.5):  # sooner than after a heartbeat
                wait_until(lambda n=n: got[-1:] == [n])
        with took(at_most=2.5), actor(server) as late:
            newest: list = []
            late.recv_network_callback(newest.append)
            wait_until(lambda: newest == [4])
        hold.set()
        assert update.result(20).applied == 3


def test_weights_that_cannot_be_carried_and_publishing_after_the_stop_are_errors(transport):
    with learner(transport) as server:
        with pytest.raises(NotEncodable):
            server.publish_network({"w": object()})
        server.stop()
        with pytest.raises(Closed):
            server.publish_network({})


# Requests -------------------------------------------------------------------------------------


def test_requests_are_answered_by_the_callback(transport):
    asked = []

    def answer(kind, payload):
        asked.append((kind, payload))
        if payload == "fail":
            raise KeyError("no such thing")
        return {"step": 7}

    with (
        learner(transport, request_callback=answer) as server,
        actor(server) as client,
    ):
        assert client.request("stats", {"verbose": True}) == {"step": 7}
        assert client.request("stats") == {"step": 7}
        assert client.request(type="stats", payload=[1], timeout=20) == {"step": 7}
        assert asked == [("stats", {"verbose": True}), ("stats", {}), ("stats", [1])]
        with pytest.raises(RemoteError, match="no such thing"):
            client.request("stats", "fail")
        with pytest.raises(UnknownInterface, match=r"request type 'reset'; known: stats"):
            client.request("reset")
        assert client.request("stats") == {"step": 7}


def test_a_learner_without_a_request_callback_says_so(transport):
    with learner(transport) as server, actor(server) as client:
        with pytest.raises(UnknownInterface, match="no requests"):
            client.request("stats")
        with plain_client(server) as plain, pytest.raises(Malformed):
            plain.call("request", "stats")


def test_the_data_callback_gets_what_is_new_after_it_is_in_the_store(transport):
    calls = []

    def look(name, batch) -> None:
        calls.append((name, [int(item["id"]) for item in batch], len(server.data_store(name))))

    with (
        learner(transport, data_callback=look) as server,
        actor(server, store := filled(3)) as client,
    ):
        client.update()
        client.update()
        store.insert(transition(3))
        client.update()
    assert calls == [("actor_env", [0, 1, 2], 3), ("actor_env", [3], 4)]


def test_a_data_callback_that_raises_is_told_and_the_data_are_in(transport):
    def fail(name, batch) -> None:
        raise ValueError("out of memory")

    with learner(transport, data_callback=fail) as server, actor(server, filled(3)) as client:
        with pytest.raises(RemoteError, match="out of memory"):
            client.update()
        assert client.update().applied == 3
        assert ids(server.data_store("actor_env")) == [0, 1, 2]


# Limits and waiting ---------------------------------------------------------------------------


def test_calls_beyond_the_rate_limit_wait_their_turn(transport):
    config = config_of(transport, rate_limit=20)
    with (
        learner(transport, config=config, request_callback=lambda kind, payload: 1) as server,
        plain_client(server, timeout=60) as client,
        actor(server) as other,
        took(at_least=0.24, at_most=5.0),
    ):
        calls = [client.call_async("request", ["stats", n]) for n in range(400)]
        wait_until(lambda: server.stats()["waiting"] > 50)
        other.request("stats")  # the limit is each client's own
        assert not calls[-1].done()
        assert calls[5].result(10) == 1


def test_calls_whose_turn_is_beyond_their_deadline_are_refused_at_once(transport):
    config = config_of(transport, rate_limit=0.125)  # so that a turn is far off for a while
    with (
        learner(transport, config=config, request_callback=lambda kind, payload: 1) as server,
        plain_client(server, timeout=4.0) as client,
    ):
        assert client.call("request", ["stats", 0]) == 1
        refused = [client.call_async("request", ["stats", n]) for n in range(30)]
        for future in refused:
            # Long before its deadline, or that had passed; and none of them takes a turn.
            with pytest.raises(
                Overloaded, match=r"of 0\.125 calls/s: the next turn is in \d\.\d\d s"
            ):
                future.result(10)
        assert server.stats()["calls"] == 1


def test_a_call_whose_turn_comes_while_the_server_stops_is_refused_and_leaves_no_thread(transport):
    entered, go_on = threading.Event(), threading.Event()
    begun = []

    def answer(kind, payload):
        begun.append(payload)
        entered.set()
        assert go_on.wait(10)
        return payload

    config = config_of(transport, rate_limit=5)
    with (
        no_thread_left(),
        learner(transport, config=config, request_callback=answer, workers=2) as server,
        plain_client(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = client.call_async("request", ["stats", 1])
        assert entered.wait(20)
        second = client.call_async("request", ["stats", 2])
        stopped = pool.submit(server.stop)
        time.sleep(0.3)  # its turn comes
        go_on.set()
        assert first.result(20) == 1
        with pytest.raises((Closed, Unreachable)):
            second.result(20)
        stopped.result(20)
    assert begun == [1]


def test_weights_and_heartbeats_are_not_held_up_by_the_rate_limit(transport):
    with (
        learner(transport, config=config_of(transport, rate_limit=0.1)) as server,
        actor(server) as client,
    ):
        got: list = []
        client.recv_network_callback(got.append)
        for n in range(20):
            server.publish_network(n)
            with took(at_most=2.5):
                wait_until(lambda n=n: got[-1:] == [n])


def test_all_that_differs_is_told_at_once_with_both_values(transport):
    with learner(transport) as server:
        config = TrainerConfig(server.port, None, ["reset"], version="2", transport=transport)
        with pytest.raises(ConfigMismatch) as caught:
            TrainerClient("actor", "127.0.0.1", config)
    assert sorted(str(caught.value).split("; ")) == [
        "request_types: the server has ['stats'], the client has ['reset']",
        "version: the server has '1', the client has '2'",
    ]


def test_a_client_may_wait_for_a_learner_that_is_not_there_yet(transport):
    port = free_port()
    config = config_of(transport, port)
    with took(at_most=5), pytest.raises(Unreachable):
        TrainerClient("a", "127.0.0.1", config)
    with took(at_least=0.2, at_most=5), pytest.raises(Unreachable):
        TrainerClient("a", "127.0.0.1", config, wait_for_server=0.3)
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(TrainerClient, "a", "127.0.0.1", config, wait_for_server=True)
        with pytest.raises(TimeoutError):
            client.result(0.2)
        with (
            learner(transport, port, request_callback=lambda kind, payload: "there"),
            client.result(10) as made,
        ):
            assert made.request("stats") == "there"


# The tunnel -----------------------------------------------------------------------------------


def test_a_tunnel_is_a_learner_and_an_actor_in_one():
    asked = []

    def answer(kind, payload):
        asked.append((kind, payload))
        return "answer"

    config = TrainerConfig(request_types=["stats"], rate_limit=1000)
    with no_thread_left(), TrainerTunnel(config, request_callback=answer) as tunnel:
        store = ReplayBuffer(100)
        tunnel.register_data_store("actor_env", store)
        tunnel.start(threaded=True)
        assert tunnel.data_store("actor_env") is store
        got: list = []
        tunnel.recv_network_callback(got.append)
        tunnel.start_async_update(interval=1)
        store.insert(transition(1))
        assert tunnel.update() == (0, 0)
        assert len(tunnel.data_store("actor_env")) == 1
        params = {"w": np.zeros(100_000)}
        tunnel.publish_network(params)
        params["w"][:] = 1
        wait_until(lambda: got)
        assert got[0]["w"].max() == 0
        assert tunnel.request("stats", 1) == "answer"
        assert asked == [("stats", 1)]
        with pytest.raises(UnknownInterface, match="stats"):
            tunnel.request("other")
        assert tunnel.url.startswith("inproc://")


def test_tunnels_do_not_get_in_each_others_way_and_stop_when_told():
    with no_thread_left(), TrainerTunnel() as one, TrainerTunnel() as two:
        got: list = []
        one.recv_network_callback(got.append)
        two.publish_network(2)
        one.publish_network(1)
        wait_until(lambda: got == [1])
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(one.start)
            with pytest.raises(TimeoutError):
                blocked.result(0.1)
            one.stop()
            one.stop()
            assert blocked.result(20) is None
        with pytest.raises(EdgemlError):
            one.publish_network(3)


# Processes ------------------------------------------------------------------------------------

ACTOR = """
import sys, time
import numpy as np
from edgeml import TrainerClient, TrainerConfig
from edgeml.data import QueuedDataStore
port, base, n = map(int, sys.argv[1:])
store = QueuedDataStore(100_000)
config = TrainerConfig(port, request_types=["stats"])
with TrainerClient("actor_env", "localhost", config, store) as client:
    client.start_async_update(interval=0.01)
    print("connected", flush=True)
    for k in range(n):
        store.insert({"id": base + k, "frame": np.full(1000, k % 256, np.uint8)})
        time.sleep(0.0005)
print("done", flush=True)
"""


def test_actors_in_processes_feed_one_store_and_one_that_is_killed_harms_no_other():
    with (
        learner("zmq") as server,
        process(ACTOR, server.port, 0, 500) as first,
        process(ACTOR, server.port, 10_000, 500) as second,
        process(ACTOR, server.port, 20_000, 1_000_000) as third,
    ):
        there = server.data_store("actor_env")
        for each in (first, second, third):
            assert each.line() == "connected"
        wait_until(lambda: any(n >= 20_100 for n in ids(there)))
        third.signal(signal.SIGKILL)
        for each in (first, second):
            assert each.line() == "done"
            assert each.end() == (0, "")
        arrived = ids(there)
        assert [n for n in arrived if n < 10_000] == list(range(500))
        assert [n for n in arrived if 10_000 <= n < 20_000] == list(range(10_000, 10_500))
        cut = [n for n in arrived if n >= 20_000]
        assert cut == list(range(20_000, 20_000 + len(cut)))
        frames = [item["frame"] for item in there.get_latest_data(0)]
        assert all(frame.min() == frame.max() for frame in frames)


LEARNER = """
import sys, time
from edgeml import TrainerConfig, TrainerServer
from edgeml.data import QueuedDataStore
server = TrainerServer(TrainerConfig(int(sys.argv[1]), None, ["stats"]),
                       request_callback=lambda kind, payload: len(store))
store = QueuedDataStore(1_000_000)
server.register_data_store("actor_env", store)
server.start(threaded=True)
server.publish_network({"from": sys.argv[2]})
print(server.port, flush=True)
time.sleep(60)
"""


def test_an_actor_outlives_its_learners_death_and_gets_the_next_ones_weights():
    with process(LEARNER, 0, "the first") as first:
        port = int(first.line())
        with TrainerClient(
            "actor_env", "localhost", config_of("zmq", port), store := QueuedDataStore(10_000)
        ) as client:
            got: list = []
            client.recv_network_callback(got.append)
            client.start_async_update(interval=0.01)
            store.batch_insert([transition(n) for n in range(100)])
            wait_until(lambda: got and client.request("stats") == 100)
            first.signal(signal.SIGKILL)
            first.end()
            store.batch_insert([transition(n) for n in range(100, 150)])
            with process(LEARNER, port, "the second") as second:
                second.line()
                wait_until(lambda: client.request("stats") == 50)
                wait_until(lambda: len(got) == 2)
                assert [weights["from"] for weights in got] == ["the first", "the second"]
                # A learner that never saves; so the queue had let go of what it had.
                wait_until(lambda: client.stats()["stores"]["actor_env"]["applied"] == 50)
                counts = client.stats()["stores"]["actor_env"]
                assert (counts["lost"], counts["dropped"]) == (100, 0)


def test_the_newer_of_two_clients_goes_on_whatever_the_clock_says(transport, monkeypatch):
    with learner(transport) as server:
        store = QueuedDataStore(10)
        for clock in (2e9, 1e9):
            monkeypatch.setattr("time.time_ns", lambda clock=clock: int(clock))
            store.insert({"n": clock})
            with actor(server, store, client_id="robot") as client:
                client.update()
        assert server.data_store("actor_env").latest_data_id() >= 2


def test_an_item_that_cannot_be_sent_is_named_and_can_be_given_up(transport):
    with learner(transport) as server:
        store = QueuedDataStore(10)
        with actor(server, store) as client:
            store.insert({"bad": object()})
            store.insert({"good": 1})
            with pytest.raises(NotEncodable, match=r"store 'actor_env', item 1: item\['bad'\]"):
                client.update(on_refused="raise")
            store.release(1)
            assert client.update().applied == 1


UNSTOPPED = """
import sys
from edgeml import TrainerClient, TrainerConfig
from edgeml.data import QueuedDataStore
store = QueuedDataStore(500)
config = TrainerConfig(int(sys.argv[1]), request_types=["stats"])
client = TrainerClient("actor_env", "127.0.0.1", config, store)
client.start_async_update(interval=600)
for n in range(100):
    store.insert({"n": n})
print("done", flush=True)
"""


def test_a_program_that_ends_without_a_stop_sends_the_rest():
    with learner("zmq") as server:
        with process(UNSTOPPED, server.port) as program:
            assert program.line() == "done"
            program.end()
        assert server.data_store("actor_env").latest_data_id() == 100


def test_what_stop_leaves_unsent_is_told(transport, caplog):
    with learner(transport) as server:
        store = QueuedDataStore(10)
        with actor(server, store):
            store.insert({"n": 1})
        assert "up to 1 items of 'actor_env' were not sent" in caplog.text


@pytest.mark.parametrize("local", [ReplayBuffer, QueuedDataStore])
def test_many_chunks_under_way_arrive_once_each_and_in_order_whatever_fails(transport, local):
    """Some are refused, some answers come too late to be waited for; then it is tried again."""
    rng = random.Random(0)

    class Moody(QueuedDataStore):
        def batch_insert(self, batch):
            mood = rng.random()
            if mood < 0.2:
                raise RuntimeError("not now")
            super().batch_insert(batch)
            if mood > 0.9:
                time.sleep(0.15)  # it is in, yet the actor no longer waits

    there, here = Moody(10_000), local(10_000)
    with learner(transport, store=there) as server:
        with actor(server, here) as client:
            for round_ in range(10):
                here.batch_insert(
                    [
                        {"id": round_ * 60 + k, "image": np.full(60_000, k, np.uint8)}
                        for k in range(60)
                    ]
                )
                while True:
                    with contextlib.suppress(RemoteError, DeadlineExceeded):
                        client.update(timeout=0.1)
                        break
            assert client.lost == 0
        assert ids(there) == list(range(600))


# Episodes, and learners that come back ------------------------------------------------------


class Interrupted(ReplayBuffer):
    """Notes after which items it was told that an episode goes no further."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.after: list[int] = []

    def interrupt(self) -> None:
        super().interrupt()
        self.after.append(self.latest_data_id())


def test_an_episode_goes_on_in_the_next_upload_of_its_actor_alone(transport):
    store = Interrupted(1000)
    with learner(transport, store=store) as server:
        one, other = filled(3), filled(4, first=100)
        with actor(server, one) as first, actor(server, other) as second:
            for _ in range(2):  # three of the first one's in a row
                first.update()
                one.insert(transition(7))
            first.update()
            second.update()
            other.insert(transition(8))
            one.insert(transition(9))
            first.update()
            second.update()
    assert ids(store) == [0, 1, 2, 7, 7, 100, 101, 102, 103, 9, 8]
    assert store.after == [0, 5, 9, 10]


def test_an_episode_does_not_go_on_over_what_others_insert(transport):
    store = Interrupted(1000)
    with learner(transport, store=store) as server:
        local = filled(3)
        with actor(server, local) as client:
            client.update()
            store.insert(transition(9))
            local.insert(transition(3))
            client.update()
    assert store.after == [0, 4]


def test_an_episode_does_not_go_on_over_what_was_lost(transport):
    store = Interrupted(1000)
    with learner(transport, store=store) as server:
        local = QueuedDataStore(3)
        with actor(server, local) as client:
            local.batch_insert([transition(n) for n in range(2)])
            client.update()
            local.batch_insert([transition(n) for n in range(2, 9)])
            client.update()
    assert ids(store) == [0, 1, 6, 7, 8]
    assert store.after == [0, 2]


def test_an_interruption_at_the_actor_reaches_the_learner(transport):
    store = Interrupted(1000)
    with learner(transport, store=store) as server:
        local = ReplayBuffer(1000)
        with actor(server, local) as client:
            local.batch_insert([transition(n) for n in range(3)])
            local.interrupt()
            local.batch_insert([transition(n) for n in range(3, 5)])
            client.update()
            local.interrupt()
            local.insert(transition(5))
            client.update()
    assert ids(store) == [0, 1, 2, 3, 4, 5]
    assert store.get_latest_data(0).cuts == (3, 5)


def test_a_local_store_that_is_reset_sends_what_comes_then(transport):
    with learner(transport) as server:
        local = ReplayBuffer(1000)
        with actor(server, local) as client:
            local.batch_insert([transition(n) for n in range(10)])
            client.update()
            local.reset()
            local.batch_insert([transition(n) for n in range(20, 28)])
            assert client.update().applied == 8
            assert client.lost == 0
        assert ids(server.data_store("actor_env")) == [*range(10), *range(20, 28)]
        assert local.allocate is pooled


def test_a_learner_that_comes_back_gets_again_what_its_checkpoint_lacks(transport, tmp_path):
    path = tmp_path / "learner.checkpoint"
    local = ReplayBuffer(1000)
    local.batch_insert([transition(n) for n in range(10)])
    with contextlib.ExitStack() as stack:
        port = free_port()
        with learner(transport, port, ReplayBuffer(1000)) as server:
            client = stack.enter_context(actor(server, local))
            client.update()
            weights = np.arange(5.0)
            report = server.save_checkpoint(path, lambda: {"weights": weights, "updates": 3})
            assert report.items == {"actor_env": 10}
            local.batch_insert([transition(n) for n in range(10, 15)])
            assert client.update().applied == 5
            stop_server(server, client)
        store = ReplayBuffer(1000)
        again = TrainerServer(config_of(transport, port))
        again.register_data_store("actor_env", store)
        values = again.load_checkpoint(path)
        assert values["updates"] == 3
        np.testing.assert_array_equal(values["weights"], weights)
        assert ids(store) == list(range(10))
        with started(again):
            # Although there is nothing new to send.
            wait_until(lambda: client.update().applied > 0 or len(store) > 10)
            assert ids(store) == list(range(15))
            local.insert(transition(15))
            client.update()
            assert ids(store) == list(range(16))
            assert client.lost == 0


def test_a_learner_that_comes_back_gets_again_what_came_of_those_its_checkpoint_does_not_know(
    transport, tmp_path
):
    local = ReplayBuffer(1000)
    local.batch_insert([transition(n) for n in range(10)])
    with contextlib.ExitStack() as stack:
        port = free_port()
        with learner(transport, port, ReplayBuffer(1000)) as server:
            server.save_checkpoint(tmp_path / "early")
            client = stack.enter_context(actor(server, local))
            client.update()
            stop_server(server, client)
        store = ReplayBuffer(1000)
        again = TrainerServer(config_of(transport, port))
        again.register_data_store("actor_env", store)
        again.load_checkpoint(tmp_path / "early")
        with started(again):
            wait_until(lambda: client.update().applied > 0 or len(store) > 0)
            assert ids(store) == list(range(10))
            assert client.lost == 0


def test_a_file_of_another_kind_is_no_learners_checkpoint(transport, tmp_path):
    with learner(transport) as server:
        checkpoint.save(tmp_path / "other", {"mine": 1}, {"actor_env": filled(3)})
        with pytest.raises(Malformed, match="no checkpoint of a TrainerServer"):
            server.load_checkpoint(tmp_path / "other")
        assert ids(server.data_store("actor_env")) == []
