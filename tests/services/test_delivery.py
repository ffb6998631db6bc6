"""What becomes of every item, whatever becomes of learners and actors; and that it adds up."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np
import pytest

from edgeml import EdgemlError, Overloaded, TrainerClient, TrainerConfig, TrainerServer
from edgeml.data import QueuedDataStore, ReplayBuffer, checkpoint
from pairs import free_port, started

NAME = "arm"


@pytest.fixture(params=["inproc", "zmq"])
def transport(request):
    return request.param


def item(n):
    return {"id": n, "x": np.full(3, n, np.float32)}


def fill(store, first, n):
    for k in range(first, first + n):
        store.insert(item(k))
    return store


def ids(store):
    return [int(each["id"]) for each in store.get_latest_data(0)]


class Lab:
    """A learner at one address, that may die and come back, and actors of it."""

    def __init__(self, transport, path):
        self.config = TrainerConfig(free_port(), None, transport=transport)
        self.path = path
        self.stack = contextlib.ExitStack()
        self.there = None

    def learner(self, *, load=False, store=None):
        """Start one, in place of the one before, which had no time to save anything."""
        self.stack.close()
        self.server = TrainerServer(self.config)
        store = QueuedDataStore(100_000) if store is None else store
        self.server.register_data_store(NAME, store)
        if load:
            with contextlib.suppress(FileNotFoundError):
                self.server.load_checkpoint(self.path)
        self.there = store
        self.stack.enter_context(started(self.server))

    def save(self):
        self.server.save_checkpoint(self.path)

    def actor(self, store, **more):
        return TrainerClient(NAME, "127.0.0.1", self.config, store, **more)


@pytest.fixture
def lab(transport, tmp_path):
    lab = Lab(transport, tmp_path / "checkpoint")
    with lab.stack:
        yield lab
    lab.stack.close()


def counts(client):
    told = client.stats()["stores"][NAME]
    gone = sum(told["refused"].values()) + told["dropped"] + told["lost"]
    assert told["accepted"] == told["applied"] + gone + told["waiting"]
    assert 0 <= told["durable"] <= told["applied"]
    return told


def test_a_learner_that_starts_anew_gets_all_that_its_actors_hold(lab):
    lab.learner()
    store = fill(ReplayBuffer(1000), 0, 12)
    with lab.actor(store) as client:
        assert client.update() == (12, 0)
        lab.learner()
        fill(store, 12, 2)
        assert client.update() == (14, 0)
        assert ids(lab.there) == list(range(14))
        assert counts(client)["repeated"] >= 12


def test_what_a_learner_forgot_and_nobody_holds_is_lost_and_told(lab, caplog):
    lab.learner()
    store = fill(QueuedDataStore(1000), 0, 12)
    with lab.actor(store) as client:
        client.update()
        assert len(store) == 0  # this learner will never save them
        lab.learner()
        fill(store, 12, 2)
        assert client.update() == (2, 0)
        told = counts(client)
        assert (told["applied"], told["lost"], told["dropped"]) == (2, 12, 0)
        assert client.lost == 12
    assert "up to 0 only, where it had 12" in caplog.text
    assert "12 items of 'arm' are held no more" in caplog.text


@pytest.mark.parametrize("make", [QueuedDataStore, ReplayBuffer])
def test_a_learner_that_goes_back_to_a_checkpoint_gets_again_what_came_after_it(lab, make):
    lab.learner(load=True)  # there is none yet, but it asked
    store = fill(make(1000), 0, 5)
    with lab.actor(store) as client:
        assert client.update() == (5, 0)
        lab.learner(load=True)  # it was killed before it had saved any
        assert client.update() == (5, 0)
        assert ids(lab.there) == [0, 1, 2, 3, 4]
        lab.save()
        fill(store, 5, 5)
        assert client.update() == (5, 5)
        assert counts(client)["durable"] == 5
        lab.learner(load=True)
        assert client.update().applied == 5
        assert ids(lab.there) == list(range(10))
        assert client.lost == 0
        lab.save()
        assert client.update() == (0, 5)
        assert counts(client)["durable"] == 10
        if make is QueuedDataStore:
            assert len(store) == 0


def test_a_queue_lets_go_of_what_is_durable_and_no_more(lab):
    lab.learner(load=True)
    store = fill(QueuedDataStore(6, on_full="raise"), 0, 6)
    with lab.actor(store) as client:
        client.update()
        with pytest.raises(Overloaded):
            store.insert(item(6))
        lab.save()
        client.update()
        fill(store, 6, 3)
        assert ids(store) == [6, 7, 8]


def test_a_checkpoint_that_could_not_be_written_makes_nothing_durable(lab, tmp_path):
    lab.learner()
    store = fill(QueuedDataStore(100), 0, 3)
    with lab.actor(store) as client:
        lab.path = tmp_path / "nowhere" / "file"
        with pytest.raises(OSError, match="nowhere"):
            lab.save()
        assert client.update() == (3, 0)
        assert client.update() == (0, 0)
        assert len(store) == 3


def test_a_checkpoint_and_counts_do_not_wait_for_an_upload_that_waits_for_room(lab):
    begun = threading.Event()

    class Full(QueuedDataStore):
        def batch_insert(self, batch):
            begun.set()
            super().batch_insert(batch)

    lab.learner(store=fill(Full(5, on_full="block", timeout=60), 0, 3))
    store = fill(QueuedDataStore(100), 3, 4)
    with lab.actor(store) as client:
        update = client.update_async(timeout=60)
        assert begun.wait(60)
        lab.save()
        assert lab.server.stats()["stores"][NAME]["applied"] == 0
        assert not update.done()
        lab.there.release(3)
        assert update.result(60) == (4, 0)


def test_an_actor_that_restarts_with_its_store_sends_nothing_twice(lab, tmp_path):
    lab.learner()
    store = fill(ReplayBuffer(1000), 0, 100)
    with lab.actor(store, client_id="me") as client:
        client.update()
        checkpoint.save(tmp_path / "actor", None, {"a": store})
        fill(store, 100, 10)  # and goes on after that
        client.update()
    with lab.actor(store, client_id="me") as client:
        assert client.update() == (0, 0)
        fill(store, 110, 10)
        assert client.update() == (10, 0)
    assert ids(lab.there) == list(range(120))
    loaded = ReplayBuffer(1000, example=item(0))
    checkpoint.load(tmp_path / "actor", {"a": loaded})
    fill(loaded, 1000, 20)  # what it does now is something else, though its ids are the same
    with lab.actor(loaded, client_id="me") as client:
        assert client.update() == (20, 0)
        assert counts(client)["applied"] == 120
    with lab.actor(store) as client:  # also by another client
        assert client.update() == (0, 0)
    assert ids(lab.there) == [*range(120), *range(1000, 1020)]


def test_marks_are_taken_with_their_stores_only(lab, tmp_path):
    lab.learner()
    store = fill(ReplayBuffer(1000), 0, 5)
    with lab.actor(store) as client:
        client.update()
        lab.save()
        lab.stack.close()
        lab.server = TrainerServer(lab.config)
        lab.server.load_checkpoint(lab.path)
        with pytest.raises(ValueError, match="register all stores before load_checkpoint"):
            lab.server.register_data_store(NAME, QueuedDataStore(10))
        lab.server.stop()


def test_the_ledger_tells_why_items_were_refused(lab):
    class Choosy(QueuedDataStore):
        def batch_insert(self, batch):
            for each in batch:
                if each["id"] % 5 == 3:
                    raise ValueError(f"no {each['id']} here")
            super().batch_insert(batch)

    lab.learner(store=Choosy(1000))
    store = fill(QueuedDataStore(100), 0, 20)
    store.insert({"id": object()})
    fill(store, 20, 1)
    with lab.actor(store) as client:
        assert client.update() == (17, 0)
        refused = counts(client)["refused"]
        assert refused.pop("no # here") == 4
        assert [n for why, n in refused.items() if "object" in why] == [1]
        told = lab.server.stats()["stores"][NAME]
        assert told["refused"] == {"no # here": 4}
        assert (told["applied"], told["dropped"]) == (17, 1)
        lab.learner(load=True)  # which takes all of them, as far as they are held
        fill(store, 21, 1)
        client.update()
        assert counts(client)["refused"].get("no # here", 0) == 0


def test_what_was_refused_before_a_client_came_counts_as_nothing_of_its_own(lab):
    class Choosy(QueuedDataStore):
        def batch_insert(self, batch):
            if any(each["id"] == 19 for each in batch):
                raise ValueError("not this one")
            super().batch_insert(batch)

    lab.learner(store=Choosy(1000))
    store = fill(ReplayBuffer(100), 0, 20)
    with lab.actor(store) as client:
        assert client.update() == (19, 0)
    with lab.actor(store) as client:
        assert client.update() == (0, 0)
        assert counts(client)["refused"] == {"not this one": 1}
        fill(store, 20, 3)
        assert client.update() == (3, 0)


@pytest.mark.parametrize("seed", range(8))
def test_it_adds_up_at_any_moment(tmp_path, seed):
    rng = random.Random(seed)
    lab = Lab("inproc", tmp_path / "checkpoint")
    saves = rng.random() < 0.7

    class Choosy(QueuedDataStore):
        def batch_insert(self, batch):
            if any(each["id"] % 11 == 3 for each in batch):
                raise ValueError("not these")
            if self is lab.there and rng.random() < 0.1:  # not as it is loaded
                raise OSError("no space")
            super().batch_insert(batch)

    with lab.stack:
        lab.learner(load=saves, store=Choosy(100_000))
        store = rng.choice([ReplayBuffer, QueuedDataStore])(rng.choice([40, 1000]))
        n = 0
        saved: list[int] = []
        with lab.actor(store, timeout=20) as client:
            for _ in range(80):
                match rng.randrange(10):
                    case 0 | 1 | 2 | 3:
                        k = rng.randrange(30)
                        fill(store, n, k)
                        n += k
                    case 4 | 5 | 6 | 7:
                        with contextlib.suppress(EdgemlError):
                            client.update()
                    case 8 if saves:
                        saved = ids(lab.there)
                        lab.save()
                    case 9:
                        lab.learner(load=saves, store=Choosy(100_000))
                        assert ids(lab.there) == saved
                told = counts(client)
                assert told["accepted"] == n
                assert told["durable"] <= len(saved)
                there = ids(lab.there)
                assert there == sorted(set(there))
                server = lab.server.stats()["stores"][NAME]
                took = server["applied"] + sum(server["refused"].values()) + server["repeated"]
                assert server["accepted"] == took
            while True:
                with contextlib.suppress(EdgemlError):
                    client.update()
                    if counts(client)["waiting"] == 0:
                        break
            told = counts(client)
            assert told["applied"] == len(ids(lab.there))
            if store.capacity > n and (saves or isinstance(store, ReplayBuffer)):
                assert client.lost == 0
                assert ids(lab.there) == [k for k in range(n) if k % 11 != 3]
    lab.stack.close()
