"""Items that one side can't take: left out and told, while all others arrive once."""

from __future__ import annotations

import contextlib
import logging
import random
import re

import numpy as np
import pytest

from edgeml import (
    DeadlineExceeded,
    Malformed,
    NotEncodable,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
    Unreachable,
)
from edgeml.core.client import Client
from edgeml.core.url import Url
from edgeml.data import Batch, QueuedDataStore, ReplayBuffer
from edgeml.services.trainer.refusals import Refusals, reason
from pairs import free_port, started, stop_server, wait_until

NAME = "arm"


@contextlib.contextmanager
def learner(transport, store, port=0, **kwargs):
    server = TrainerServer(TrainerConfig(port, None, transport=transport), **kwargs)
    server.register_data_store(NAME, store)
    with started(server):
        yield server


def actor(server, store, **kwargs) -> TrainerClient:
    config = TrainerConfig(server.port, None, transport=server.config.transport)
    return TrainerClient(NAME, "127.0.0.1", config, store, **kwargs)


def queue(items=()) -> QueuedDataStore:
    store = QueuedDataStore(1_000_000)
    store.batch_insert(list(items))
    return store


def item(n: int, **more) -> dict:
    return {"id": n, **more}


def unsendable(n: int) -> dict:
    return {"id": n, "note": object()}


def unfit(n: int) -> dict:
    return {"id": n, "note": "not for this store"}


def ids(store) -> list[int]:
    return [int(item["id"]) for item in store.get_latest_data(0)]


class Choosy(QueuedDataStore):
    """Refuses items with a note, all of a batch or none."""

    def batch_insert(self, batch):
        for k, each in enumerate(batch):
            if "note" in each:
                raise ValueError(f"item['note']: this store takes none, and {k} have come before")
        super().batch_insert(batch)


# The whole of it --------------------------------------------------------------------------------


def test_items_that_do_not_fit_are_left_out_counted_and_told_and_the_others_arrive(
    transport, caplog
):
    there, here = ReplayBuffer(10_000), queue()
    caplog.set_level(logging.WARNING, "edgeml")
    with learner(transport, there) as server, actor(server, here) as client:
        client.start_async_update(interval=0.01)
        for n in range(1, 1001):
            # The first reward is an int, so the store can take no fraction.
            here.insert({"id": n, "reward": 0.5 if n in (300, 301, 900) else 0})
            if n % 100 == 0:
                wait_until(lambda: len(here) == 0)
        assert ids(there) == [n for n in range(1, 1001) if n not in (300, 301, 900)]
        assert client.stats()["items_refused"] == server.stats()["items_refused"] == 3
        assert client.lost == client.stats()["items_lost"] == 0
        assert server.stats()["items"] == 997
    here_told = [r.getMessage() for r in caplog.records if "(from" not in r.getMessage()]
    refused = [text for text in here_told if "refused" in text]
    assert len(refused) == 1, refused
    assert re.match(r"store 'arm': items? 300 .*refused.*: item\['reward'\]: expected", refused[0])
    assert len([r for r in caplog.records if f"(from {client.client_id!r})" in r.getMessage()]) == 1
    assert "not sent" not in caplog.text


@pytest.mark.parametrize("bad", [unsendable, unfit])
@pytest.mark.parametrize("where", ["first", "middle", "last", "next to each other", "all"])
def test_wherever_they_are(transport, bad, where):
    n = 300
    which = {
        "first": {1},
        "middle": {150},
        "last": {n},
        "next to each other": {99, 100, 101, 200, 201},
        "all": set(range(1, n + 1)),
    }[where]
    here, there = queue(bad(k) if k in which else item(k) for k in range(1, n + 1)), Choosy(1000)
    with learner(transport, there) as server, actor(server, here) as client:
        assert client.update().applied == n - len(which)
        assert ids(there) == [k for k in range(1, n + 1) if k not in which]
        assert client.stats()["items_refused"] == len(which)
        assert len(here) == 0
        assert client.update().applied == 0
        here.insert(item(n + 1))
        assert client.update().applied == 1
        assert ids(there)[-1] == n + 1
        assert client.stats()["items_refused"] == len(which)
        assert client.lost == 0


def test_columns_are_taken_apart_too(transport):
    """Of a batch whose items agree, some may have values that don't fit, or none fits at all."""
    there = ReplayBuffer(1000, example={"id": np.int64(0), "n": np.int8(0)})
    mine = ReplayBuffer(1000)
    with learner(transport, there) as server, actor(server, mine) as client:
        mine.batch_insert([{"id": k, "n": 1000 if k in (7, 50) else k} for k in range(1, 101)])
        assert client.update().applied == 98
        assert ids(there) == [k for k in range(1, 101) if k not in (7, 50)]
        assert client.stats()["items_refused"] == 2
    with learner(transport, there) as server, actor(server, other := ReplayBuffer(1000)) as client:
        other.batch_insert([{"id": k, "n": np.zeros(3)} for k in range(1, 101)])
        assert client.update().applied == 0
        assert client.stats()["items_refused"] == server.stats()["items_refused"] == 100
        assert client.update().applied == 0
    assert len(there) == 98


def test_what_a_local_store_keeps_is_not_tried_again(transport, monkeypatch):
    mine = QueuedDataStore(100)
    monkeypatch.setattr(mine, "release", lambda up_to_id: None)  # as a replay buffer has it
    with learner(transport, there := Choosy(100)) as server, actor(server, mine) as client:
        mine.batch_insert([item(1), unsendable(2), unfit(3), unsendable(4)])
        for _ in range(3):
            client.update()
            calls = server.stats()["calls"]
        assert client.update().applied == 0
        assert server.stats()["calls"] == calls
        mine.insert(item(5))
        assert client.update().applied == 1
        assert ids(there) == [1, 5]
        assert client.stats()["items_refused"] == 3
        assert client.lost == 0
    assert len(mine) == 5


def test_an_item_that_the_learner_cannot_read_is_left_out(transport, monkeypatch):
    """As where it lacks a package for the dtype: that is found before any store is asked."""

    def read(payload, from_payload=Batch.from_payload):
        batch = from_payload(payload)
        if any("note" in each for each in batch):
            raise Malformed("bfloat16 needs ml_dtypes")
        return batch

    items = [unfit(k) if k in (5, 6, 80) else item(k) for k in range(1, 101)]
    with learner(transport, there := queue()) as server, actor(server, queue(items)) as client:
        monkeypatch.setattr("edgeml.services.trainer.intake.Batch.from_payload", read)
        assert client.update().applied == 97
        assert ids(there) == [k for k in range(1, 101) if k not in (5, 6, 80)]
        assert client.stats()["items_refused"] == 3


def test_a_learner_that_can_read_nothing_at_all_costs_no_item(transport, monkeypatch):
    def fail(payload):
        raise Malformed("another version")

    with learner(transport, there := queue()) as server:
        with actor(server, here := queue(map(item, range(1, 41)))) as client:
            with monkeypatch.context() as patch:
                patch.setattr("edgeml.services.trainer.intake.Batch.from_payload", fail)
                with pytest.raises(Malformed, match="another version"):
                    client.update()
            assert len(here) == 40
            assert client.update().applied == 40
            assert client.stats()["items_refused"] == 0
        assert ids(there) == list(range(1, 41))


# To be told -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (unsendable, NotEncodable, r"store 'arm', item 60: item\['note'\] is a builtins.object"),
        (unfit, RemoteError, r"ValueError: store 'arm', item 60: item\['note'\]: this store"),
    ],
)
def test_who_wants_an_error_gets_one_after_the_items_before(transport, bad, error, text):
    here = queue(bad(k) if k == 60 else item(k) for k in range(1, 101))
    with learner(transport, there := Choosy(1000)) as server, actor(server, here) as client:
        for _ in range(2):
            with pytest.raises(error, match=text):
                client.update(on_refused="raise")
            assert ids(there) == list(range(1, 60))
            assert 60 in ids(here)
        assert client.stats()["items_refused"] == 0
        here.release(60)
        assert client.update(on_refused="raise").applied == 40
        assert ids(there) == [k for k in range(1, 101) if k != 60]
        here.batch_insert([bad(101), item(102)])
        with pytest.raises(error):
            client.update(on_refused="raise")
        assert client.update().applied == 1
        assert client.stats()["items_refused"] == 1


def test_on_refused_is_one_of_two(transport):
    with (
        learner(transport, queue()) as server,
        actor(server, queue()) as client,
        pytest.raises(ValueError, match="'skip', 'raise'"),
    ):
        client.update(on_refused="ignore")
    with TrainerTunnel() as tunnel:
        assert tunnel.update(on_refused="raise") == (0, 0)


def test_the_data_callback_is_given_what_is_in(transport):
    got = []
    here = queue(unfit(k) if k in (3, 7) else item(k) for k in range(1, 11))
    with (
        learner(transport, Choosy(100), data_callback=lambda _, batch: got.append(batch)) as server,
        actor(server, here) as client,
    ):
        client.update()
    assert [int(each["id"]) for batch in got for each in batch] == [1, 2, 4, 5, 6, 8, 9, 10]
    for batch in got:  # a batch is of consecutive items
        assert [int(each["id"]) for each in batch] == [
            batch.first_id + k for k in range(len(batch))
        ]


def test_what_comes_after_a_refused_item_does_not_follow_upon_what_came_before(transport):
    there = Choosy(100)
    bad = {3: unfit, 5: unsendable, 8: unfit}
    here = queue(bad.get(k, item)(k) for k in range(1, 9))
    with learner(transport, there) as server, actor(server, here) as client:
        client.update()
        here.insert(item(9))
        client.update()
        here.insert(item(10))
        client.update()
    assert ids(there) == [1, 2, 4, 6, 7, 9, 10]
    assert there.get_latest_data(0).cuts == (2, 3, 5)


def test_refusals_are_told_by_kind_and_now_and_then(caplog):
    refusals = Refusals()
    for k in range(1, 251):
        refusals.add("a", k, 1, f"expected shape (3,), got shape ({k},)")
    refusals.add("a", 300, 800, "nan")
    refusals.add("b", 9, 1, "nan")
    assert refusals.count == 1051
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "store 'a': item 1 is refused and left out: expected shape (3,), got shape (1,)",
        "store 'a': item 10 is refused and left out (10 like this so far): "
        "expected shape (3,), got shape (10,)",
        "store 'a': item 100 is refused and left out (100 like this so far): "
        "expected shape (3,), got shape (100,)",
        "store 'a': items 300 to 1099 are refused and left out: nan",
        "store 'b': item 9 is refused and left out: nan",
    ]
    caplog.clear()
    for k in range(10_000):
        refusals.add("c", k, 1, "kind " + "x" * k)
    assert len(caplog.records) < 110
    assert refusals.count == 11_051


def test_a_reason_is_one_line_that_can_be_sent():
    class Silent(ValueError):
        def __str__(self) -> str:
            raise RuntimeError

    assert reason(ValueError("no\n  such")) == "no such"
    assert reason(KeyError("k")) == "KeyError: 'k'"
    assert reason(NotEncodable("item is one")) == "item is one"
    assert len(reason(ValueError("x" * 10_000))) == 300
    assert reason(ValueError("\ud800")) == "\\ud800"
    assert "__str__ failed" in reason(Silent())


# Once and only once all the same ---------------------------------------------------------------


def test_what_a_store_that_fails_has_taken_is_not_added_again(transport):
    """One that inserts one by one, and raises in the midst of it."""

    class Plain(QueuedDataStore):
        fail_at = 20
        failure: Exception = OSError("the disk is full")

        def batch_insert(self, batch):
            for each in batch:
                if each["id"] == self.fail_at:
                    raise self.failure
                if "note" in each:
                    raise KeyError("note")
                super().batch_insert([each])

    there = Plain(1000)
    here = queue(unfit(k) if k in (10, 30) else item(k) for k in range(1, 41))
    got = []
    with (
        learner(transport, there, data_callback=lambda _, batch: got.extend(batch)) as server,
        actor(server, here) as client,
    ):
        for _ in range(2):
            with pytest.raises(RemoteError, match="disk is full"):
                client.update()
            assert ids(there) == [k for k in range(1, 20) if k != 10]
        there.fail_at = 0
        client.update()
        assert ids(there) == [k for k in range(1, 41) if k not in (10, 30)]
        assert [int(each["id"]) for each in got] == ids(there)
        assert client.stats()["items_refused"] == 2
        assert len(here) == 0


def test_a_store_without_room_refuses_no_item(transport):
    there = QueuedDataStore(30, on_full="raise")
    here = queue(unsendable(k) if k == 40 else item(k) for k in range(1, 101))
    with learner(transport, there) as server, actor(server, here) as client:
        arrived = []
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                client.update()
            arrived += ids(there)
            there.release(there.latest_data_id())
            if not len(here):
                break
        assert arrived == [k for k in range(1, 101) if k != 40]
        assert client.stats()["items_refused"] == 1


@pytest.mark.parametrize("local", [QueuedDataStore, ReplayBuffer])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_fails_each_good_item_arrives_once_and_each_bad_one_counts_once(
    local, seed, monkeypatch
):
    rng = random.Random(seed)

    class Moody(Choosy):
        def batch_insert(self, batch):
            if rng.random() < 0.05:
                raise RuntimeError("not now")
            if isinstance(batch, Batch) and any(each["id"] % 7 == 3 for each in batch):
                raise ValueError("of seven, not the third")
            super().batch_insert(batch)

    there, here = Moody(10_000), local(10_000)

    def is_bad(n: int) -> bool:
        return n % 7 == 3 or (local is QueuedDataStore and (n % 31 == 5 or n % 40 in (1, 2, 3)))

    def make(n: int) -> dict:
        if local is ReplayBuffer:
            return {"id": n, "image": np.zeros(2000, np.uint8)}
        if n % 31 == 5:
            return unsendable(n)
        return unfit(n) if n % 40 in (1, 2, 3) else item(n)

    with learner("inproc", there) as server, actor(server, here) as client:

        def flaky(self, name, payload, timeout=None, call=Client.call):
            if rng.random() < 0.1:
                raise Unreachable("cut before it was sent")
            answer = call(self, name, payload, timeout)
            if rng.random() < 0.2:
                raise Unreachable("cut after it arrived")
            return answer

        monkeypatch.setattr(Client, "call", flaky)
        n = arrived = 0
        for _ in range(12):
            for _ in range(rng.randrange(1, 120)):
                n += 1
                here.insert(make(n))
            for _ in range(rng.randrange(5)):
                with contextlib.suppress(RemoteError, DeadlineExceeded, Unreachable):
                    arrived += client.update().applied
        monkeypatch.undo()
        while True:
            with contextlib.suppress(RemoteError):
                arrived += client.update().applied
                break
        good = [k for k in range(1, n + 1) if not is_bad(k)]
        assert ids(there) == good
        assert client.lost == 0
        assert client.stats()["items_refused"] == n - len(good)


def test_refusals_whose_answer_is_lost_are_counted_all_the_same(transport, monkeypatch):
    here = queue(unfit(k) if k % 10 == 0 else item(k) for k in range(1, 21))
    with learner(transport, there := Choosy(100)) as server, actor(server, here) as client:

        def cut(self, name, payload, timeout=None, call=Client.call):
            call(self, name, payload, timeout)
            raise Unreachable("cut after it arrived")

        with monkeypatch.context() as patch:
            patch.setattr(Client, "call", cut)
            with pytest.raises(Unreachable):
                client.update()
        assert client.update().applied == 18
        assert client.stats()["items_refused"] == 2
        assert len(there) == 18


def test_a_learner_that_comes_back_refuses_again_and_the_actor_counts_once(transport, tmp_path):
    local = ReplayBuffer(1000)
    local.batch_insert([{"id": k, "n": 1000 if k == 7 else k} for k in range(1, 11)])
    example = {"id": np.int64(0), "n": np.int8(0)}
    with contextlib.ExitStack() as stack:
        port = free_port()
        with learner(transport, ReplayBuffer(1000, example=example), port) as server:
            client = stack.enter_context(actor(server, local))
            client.update()
            server.save_checkpoint(tmp_path / "saved")
            local.batch_insert([{"id": k, "n": 1000 if k == 15 else k} for k in range(11, 21)])
            client.update()
            assert client.stats()["items_refused"] == 2
            stop_server(server, client)
        again = TrainerServer(TrainerConfig(port, None, transport=transport))
        again.register_data_store(NAME, there := ReplayBuffer(1000, example=example))
        again.load_checkpoint(tmp_path / "saved")
        assert len(there) == 9
        with started(again):
            wait_until(lambda: client.update().applied > 0 or len(there) > 9)
            assert ids(there) == [k for k in range(1, 21) if k not in (7, 15)]
            assert client.stats()["items_refused"] == 2
            assert client.lost == 0


# The wire ---------------------------------------------------------------------------------------


def test_a_client_that_does_not_say_that_items_may_be_left_out_gets_an_error(transport):
    with learner(transport, there := Choosy(100)) as server:
        urls = [Url(transport, "127.0.0.1", server.port)]
        config = server.config.shared()
        with contextlib.closing(Client("trainer", urls, config=config)) as client:

            def upload(items, first=1, acknowledged=0, **more):
                return client.call(
                    "update",
                    {
                        "store": NAME,
                        "incarnation": 1,
                        "acknowledged": acknowledged,
                        "after": first - 1,
                        "batch": Batch.of(items, first).to_payload(),
                        **more,
                    },
                )

            items = [item(1), unfit(2), unfit(3), item(4)]
            for more in ({}, {"skip_refused": False}, {"skip_refused": 1}):
                with pytest.raises(RemoteError, match="store 'arm', item 2"):
                    upload(items, **more)
            assert ids(there) == [1]
            answer = upload(items, skip_refused=True)
            why = "item['note']: this store takes none, and 0 have come before"
            assert (answer["mark"], answer["refused"]) == (4, [[2, 2, why]])
            assert upload([], 5, acknowledged=0, skip_refused=True) == answer
            answer["refused"] = []
            assert upload([], 5, acknowledged=4, skip_refused=True) == answer
            assert upload([], 5) == answer
            assert answer["durable"] is None
            assert ids(there) == [1, 4]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "7",
        {"mark": 7},
        {"mark": "7", "refused": []},
        {"mark": 7, "refused": [[0, 1, "no"]]},
        {"mark": 7, "refused": [[1, 0, "no"]]},
        {"mark": 7, "refused": [[1, 1]]},
        {"mark": 7, "refused": [[1, 1, 5]]},
        {"mark": 7, "refused": 5},
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(answer, monkeypatch):
    with learner("inproc", queue()) as server, actor(server, here := queue([item(1)])) as client:
        with monkeypatch.context() as patch:
            patch.setattr(client._client, "call", lambda *_: answer)
            with pytest.raises(Malformed):
                client.update()
        assert len(here) == 1
        assert client.update().applied == 1


def test_a_callback_that_is_a_coroutine_function_is_refused_at_once():
    async def callback(*_):
        raise AssertionError

    for which in ("data_callback", "request_callback"):
        with pytest.raises(TypeError, match=f"{which} is an `async def`"):
            TrainerServer(TrainerConfig(0, None), **{which: callback})
