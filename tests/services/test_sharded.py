"""Batches of several servers' stores, drawn as from one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from edgeml import (
    Closed,
    Malformed,
    ShardedLearner,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.call import LocalCall
from edgeml.core.message import pooled
from edgeml.core.server import Server
from edgeml.core.url import Url
from edgeml.data import Mixture, PrioritizedReplayBuffer, QueuedDataStore, ReplayBuffer
from edgeml.services.trainer.sampling import Sampling
from edgeml.services.trainer.sharded import divide, shard_of
from pairs import free_port, process, started, took, wait_until

CONFIG = TrainerConfig(0, None, request_types=["stats"])


def item(n: int) -> dict:
    return {"id": n, "image": np.full((40, 40, 3), n % 251, np.uint8), "reward": float(n)}


def items(n: int, first: int = 0) -> list[dict]:
    return [item(k) for k in range(first, first + n)]


@contextlib.contextmanager
def shard(store, transport: str = "zmq", port: int = 0, serve: bool = True):
    config = TrainerConfig(port, None, CONFIG.request_types, transport=transport)
    server = TrainerServer(config)
    server.register_data_store("robot", store)
    if serve:
        server.serve_samples()
    with started(server):
        yield server


@contextlib.contextmanager
def sharded(*stores, transport: str = "zmq", **options):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(shard(store, transport)) for store in stores]
        urls = [server.url for server in servers]
        yield stack.enter_context(ShardedLearner("robot", urls, CONFIG, **options))


def filled(*counts: int, make=ReplayBuffer) -> list:
    stores, first = [], 0
    for n in counts:
        stores.append(store := make(10_000, example=item(0), seed=n))
        if n:
            store.batch_insert(items(n, first))
        first += n
    return stores


# What a batch is -------------------------------------------------------------------------------


def test_a_batch_is_what_one_store_gives(transport):
    stores = filled(300, 100, 200)
    one = ReplayBuffer(10_000, example=item(0))
    with sharded(*stores, transport=transport) as learner:
        for size in (1, 7, 256):
            batch, like = learner.sample(size), None
            one.batch_insert(items(3))
            like = one.sample(size)
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
                k: (v.shape, v.dtype) for k, v in like.items()
            }
            assert (batch["image"][:, 0, 0, 0] == batch["id"] % 251).all()
            assert (batch["reward"] == batch["id"]).all()
            for array in batch.values():
                assert array.flags.c_contiguous
                array[...] = 0  # it is the caller's own
        assert sorted(learner.sample(5, keys=["reward", "id"])) == ["id", "reward"]


def test_tuples_and_nested_items_are_keyed_as_a_store_does(transport):
    store = ReplayBuffer(10)
    store.insert(({"joints": np.arange(3.0)}, 1.0, True))
    with sharded(store, ReplayBuffer(10), transport=transport) as learner:
        batch = learner.sample(4)
        assert batch[0]["joints"].tolist() == [[0, 1, 2]] * 4
        assert batch[2].dtype == bool
        assert list(learner.sample(2, keys=[1])) == [1]


def test_stacks_are_packed_as_a_store_does():
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] + np.zeros((4, 4, 1), np.uint8)
    stores = [ReplayBuffer(100, frame_stack=3) for _ in range(2)]
    for store in stores:
        for n in range(9):
            store.insert(
                {
                    "observations": frames[n],
                    "next_observations": frames[n + 1],
                    "rewards": float(n),
                    "masks": 1.0,
                    "dones": False,
                }
            )
    with sharded(*stores) as learner:
        batch = learner.sample(16, pack_obs_and_next_obs=True)
        assert batch["observations"].shape == (16, 4, 4, 4, 1)
        assert "next_observations" not in batch
        last = batch["observations"][:, -1, 0, 0, 0]
        assert (last == batch["rewards"] + 1).all()


def test_what_is_written_to_is_the_given_batch():
    with sharded(*filled(30, 10)) as learner:
        out = learner.empty_batch(64, ["id", "image"])
        assert sorted(out) == ["id", "image"]
        assert learner.sample(64, keys=["id", "image"], out=out) is out
        assert (out["image"][:, 0, 0, 0] == out["id"] % 251).all()
        with pytest.raises(ValueError, match="out has"):
            learner.sample(32, keys=["id", "image"], out=out)
        with pytest.raises(ValueError, match="expected"):
            learner.sample(64, keys=["id"], out=out)


def test_a_mixture_takes_it_for_a_source():
    demonstrations = ReplayBuffer(100, example=item(0))
    demonstrations.batch_insert(items(10, 5000))
    with sharded(*filled(30, 10)) as learner:
        mixed = Mixture([(learner, 0.5), (demonstrations, 0.5)])
        batch = mixed.sample(64)
        assert (batch["id"] >= 5000).sum() == 32
        with mixed.prefetch(16) as batches:
            assert len(next(batches)["id"]) == 16
        with learner.prefetch(16, keys=["id"]) as batches:
            assert list(next(batches)) == ["id"]


# Shares ----------------------------------------------------------------------------------------


def test_shares_are_exact_and_rounded_so_that_the_mean_is():
    rng = np.random.default_rng(0)
    for masses in ([3, 1], [1000, 0, 1, 7], [0, 5], [5, 0], [0.1, 0.2, 0.3], [1e-300, 1e300]):
        masses, n = np.array(masses, float), 37
        exact = n * masses / masses.sum()
        counts = np.array([divide(n, masses, rng.random()) for _ in range(2000)])
        assert (counts.sum(1) == n).all()
        assert (np.abs(counts - exact) < 1).all()
        assert np.abs(counts.mean(0) - exact).max() < 0.07  # 6 sigma of a mean of 2000 roundings
    for offset in (0.0, 0.5, np.nextafter(1, 0)):
        for n in (1, 3, 1 << 20):
            assert divide(n, np.array([0.0, 1.0, 0.0]), offset).tolist() == [0, n, 0]
    assert divide(5, np.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_each_item_comes_as_often_as_any_other():
    with sharded(*filled(60, 0, 20, 120), seed=1) as learner:
        drawn = Counter()
        for _ in range(100):
            drawn.update(learner.sample(400, keys=["id"])["id"].tolist())
    counts = np.array([drawn[n] for n in range(200)])
    # Uniform: 200 each. The sum of squares has 200 - 1 degrees of freedom: 199 +- 20.
    assert 110 < ((counts - 200) ** 2 / 200).sum() < 310
    assert abs(counts[:60].sum() - 12_000) < 100  # each batch within 1 of its share


def test_a_share_is_as_of_the_draw_while_actors_insert():
    """A store that grows tenfold between two batches gives its new share at once."""
    stores = filled(100, 100)
    with sharded(*stores) as learner:
        learner.sample(100)
        stores[1].batch_insert(items(800, 1000))
        out = {"id": np.full(100, -1)}
        ids = learner.sample(100, keys=["id"], out=out)["id"]
        assert (ids >= 100).sum() == 90
        assert ids.min() >= 0  # all of them
        stores[1].reset()
        assert (learner.sample(100, keys=["id"])["id"] < 100).all()
        stores[0].reset()
        with pytest.raises(ValueError, match="all empty"):
            learner.sample(1)
        stores[1].insert(item(7))
        assert learner.sample(3)["id"].tolist() == [7, 7, 7]


def test_samples_and_inserts_go_on_together():
    stores = filled(10, 10)
    going = threading.Event()

    def insert() -> None:
        n = 20
        while not going.is_set():
            stores[n % 2].batch_insert(items(5, n))
            n += 5

    with sharded(*stores) as learner:
        thread = threading.Thread(target=insert)
        thread.start()
        try:
            for _ in range(200):
                batch = learner.sample(64)
                assert (batch["image"][:, 0, 0, 0] == batch["id"] % 251).all()
        finally:
            going.set()
            thread.join()


def test_batches_drawn_ahead_have_exact_shares_each():
    with sharded(*filled(30, 10)) as learner, learner.prefetch(41, depth=3) as batches:
        seen, before = Counter(), [0]
        for _ in range(60):
            batch = next(batches)
            assert (batch["image"][:, 0, 0, 0] == batch["id"] % 251).all()
            assert abs((batch["id"] < 30).sum() - 30.75) < 2
            assert batch["id"].tolist() != before
            before = batch["id"].tolist()
            seen.update(before)
    assert len(seen) == 40
    assert max(seen.values()) < 100  # 60 each


# Prioritized -----------------------------------------------------------------------------------


def prioritized(n: int, first: int) -> PrioritizedReplayBuffer:
    store = PrioritizedReplayBuffer(
        1000, alpha=1.0, beta=0.7, epsilon=1e-9, example=item(0), seed=n
    )
    store.batch_insert(items(n, first))
    return store


def test_priorities_count_as_in_one_store():
    priorities = np.random.default_rng(3).uniform(0.5, 8.0, 100)
    stores = [prioritized(70, 0), prioritized(30, 70)]
    one = prioritized(100, 0)
    one.update_priorities(np.arange(1, 101), priorities)
    weights = {}
    for _ in range(20):
        batch = one.sample(256)
        weights.update(zip(batch["id"].tolist(), batch["weights"].tolist(), strict=True))
    with sharded(*stores, seed=5) as learner:
        seen = {}
        while len(seen) < 100:
            batch = learner.sample(256)
            seen.update(zip(batch["id"].tolist(), batch["ids"].tolist(), strict=True))
        ids = np.array([seen[n] for n in range(100)])
        learner.update_priorities(ids, priorities)
        drawn = Counter()
        for _ in range(100):
            batch = learner.sample(256)
            drawn.update(batch["id"].tolist())
            for n, weight in zip(batch["id"].tolist(), batch["weights"].tolist(), strict=True):
                if n in weights:
                    assert weight == pytest.approx(weights[n], rel=1e-5)
    expected = 25_600 * priorities / priorities.sum()
    counts = np.array([drawn[n] for n in range(100)])
    assert ((counts - expected) ** 2 / expected).sum() < 180  # 99 +- 14, or less as it's stratified


def test_priorities_that_come_too_late_are_counted():
    stores = [prioritized(10, 0), prioritized(10, 10)]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(shard(store)) for store in stores]
        urls = [server.url for server in servers]
        learner = stack.enter_context(ShardedLearner("robot", urls, CONFIG))
        batch = learner.sample(64)
        stores[1].reset(1)  # as one that has lost what it had not saved
        learner.update_priorities(batch["ids"], np.ones(64))
        assert servers[1].stats()["priorities_stale"] == (batch["id"] >= 10).sum() > 0
        with pytest.raises(ValueError, match="of no shard"):
            learner.update_priorities([1 << 60], [1.0])
        with pytest.raises(ValueError, match=r"shard 0 at .*from 0 up"):
            learner.update_priorities([1], [-1.0])
        servers[1].stop()
        learner.update_priorities(batch["ids"], np.ones(64))
        assert learner.stats()["priorities_lost"] == (batch["id"] >= 10).sum()


# What can't be done ----------------------------------------------------------------------------


def test_errors_name_the_shard():
    with sharded(*filled(5, 5)) as learner:
        with pytest.raises(ValueError, match=r"shard 0 at zmq://.*no such keys"):
            learner.sample(4, keys=["other"])
        with pytest.raises(ValueError, match="at least 1"):
            learner.sample(0)
        with pytest.raises(TypeError, match="an integer"):
            learner.sample(2.5)
        with pytest.raises(ValueError, match="ask for fewer"):
            learner.sample(1 << 40)
        assert len(learner.sample(4)["id"]) == 4  # and goes on
    other = ReplayBuffer(10)
    other.insert({"id": 1})
    with (
        sharded(*filled(5), other) as learner,
        pytest.raises(ValueError, match="shard 1: batch: expected a dict"),
    ):
        learner.sample(64)
    with (
        sharded(*filled(5), QueuedDataStore(5)) as learner,
        pytest.raises(ValueError, match="a QueuedDataStore, from which nothing can be sampled"),
    ):
        learner.sample(1)


def test_who_serves_no_samples_says_so():
    with shard(filled(5)[0], serve=False) as other, shard(filled(5)[0]) as server:
        for name, url, known in (("robot", other.url, "sample"), ("robo", server.url, "robot")):
            with (
                ShardedLearner(name, [url], CONFIG) as learner,
                pytest.raises(UnknownInterface, match=rf"shard 0 at zmq://.*{known}"),
            ):
                learner.sample(1)
    with pytest.raises(Unreachable, match="shard 0 at zmq://"):
        ShardedLearner("robot", [f"zmq://127.0.0.1:{free_port()}"], CONFIG)
    with pytest.raises(ValueError, match="a list of each"):
        ShardedLearner("robot", "zmq://127.0.0.1:5555", CONFIG)


def test_only_so_many_choices_of_keys_are_kept():
    store = ReplayBuffer(10, example={str(n): 0.0 for n in range(10)})
    store.insert({str(n): 0.0 for n in range(10)})

    def sample_all_choices() -> None:
        for n in range(1, 100):
            learner.sample(1, keys=[k for bit, k in enumerate("0123456789") if n >> bit & 1])

    with sharded(store) as learner:
        for keys in permutations("012345", 3):  # which are 20, whatever their order
            learner.sample(1, keys=keys)
        with pytest.raises(ValueError, match="64 different choices"):
            sample_all_choices()


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"store": "robot", "n": -1, "keys": None, "pack": False},
        {"store": "robot", "n": 1, "keys": [[1]], "pack": False},
        {"store": "robot", "n": 1, "keys": "id", "pack": False},
        {"store": "robot", "n": 1 << 62, "keys": None, "pack": False},
        {"store": "robot", "n": 1, "keys": None, "pack": True},
    ],
)
def test_what_is_no_question_is_malformed(payload):
    sampling = Sampling({"robot": filled(5)[0]}.__getitem__, pooled)
    with pytest.raises(Malformed):
        sampling.sample(LocalCall("sample", payload))


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {"store": "robot", "ids": [1], "priorities": [1.0]},
        {"store": "robot", "ids": np.array([0]), "priorities": np.array([1.0])},
        {"store": "robot", "ids": np.array([1]), "priorities": np.array([1.0, 2.0, 3.0])},
        {"store": "robot", "ids": np.array([[1]]), "priorities": "x"},
        {"store": "robot", "ids": np.array(1), "priorities": np.array([1.0])},
        {"store": "plain", "ids": np.array([1]), "priorities": np.array([1.0])},
    ],
)
def test_what_are_no_priorities_is_malformed(payload):
    stores = {"robot": prioritized(5, 0), "plain": filled(5)[0]}
    with pytest.raises(Malformed):
        Sampling(stores.__getitem__, pooled).update_priorities(LocalCall("", payload))


def test_items_are_written_where_they_are_sent_from():
    """The rows of a large leaf are copied once, by the draw itself, into the transport's memory."""
    given = []

    def allocate(nbytes: int) -> memoryview:
        given.append(memory := memoryview(bytearray(nbytes)))
        return memory

    call = LocalCall("sample", {"store": "robot", "n": 64, "keys": None, "pack": False})
    Sampling({"robot": filled(5)[0]}.__getitem__, allocate).sample(call)
    image = call.future.result()["batch"]["image"]
    assert len(given) == 1
    assert np.shares_memory(image, np.frombuffer(given[0], np.uint8))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"mass": -1.0, "largest_weight": None, "batch": None},
        {"mass": float("nan"), "largest_weight": None, "batch": None},
        {"mass": 1.0, "largest_weight": "x", "batch": None},
        {"mass": 1.0, "largest_weight": None, "batch": {"a": [1.0]}},
        {"mass": 1.0, "largest_weight": None, "batch": {"a": np.zeros(2), "b": np.zeros(3)}},
        {"mass": 1.0, "largest_weight": None, "batch": {"a": np.float64(1)}},
    ],
)
def test_an_answer_that_is_none_is_told_with_the_shard(answer):
    server = Server("trainer", [Url.parse("inproc://")], config=CONFIG.shared())
    server.register("sample", lambda call: call.answer(answer))
    server.open()
    server.dispatcher.start()
    try:
        with (
            ShardedLearner("robot", [str(server.urls[0])], CONFIG) as learner,
            pytest.raises(ValueError, match="shard 0 at"),
        ):
            learner.sample(2)
    finally:
        server.close()


# A shard is away -------------------------------------------------------------------------------

PROGRAM = """
import sys
import numpy as np
from edgeml import TrainerConfig, TrainerServer
from edgeml.data import ReplayBuffer

server = TrainerServer(TrainerConfig(int(sys.argv[1]), None, ["stats"], transport="zmq"))
store = ReplayBuffer(1000, example={"id": 0})
store.batch_insert([{"id": n} for n in range(100, 200)])
server.register_data_store("robot", store)
server.serve_samples()
with server.serving():
    print(server.url)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_while_a_shard_is_away_the_others_give(how, caplog):
    here, port = ReplayBuffer(1000, example={"id": 0}), free_port()
    here.batch_insert([{"id": n} for n in range(100)])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(shard(here))
        other = stack.enter_context(process(PROGRAM, port))
        urls = [server.url, other.line()]
        learner = stack.enter_context(ShardedLearner("robot", urls, CONFIG))
        assert (learner.sample(64)["id"] >= 100).sum() == 32
        other.signal(how)
        with took(at_most=5.0):
            assert (learner.sample(64)["id"] < 100).all()
        with took(at_most=0.5):  # nobody waits for it again
            for _ in range(10):
                assert (learner.sample(64)["id"] < 100).all()
        told = learner.stats()["shards"]
        assert [each["missed"] for each in told] == [0, 11]
        assert not told[1]["there"]
        assert f"shard 1 at zmq://127.0.0.1:{port}" in told[1]["why"]
        assert "drawn without it" in caplog.text
        if how == signal.SIGSTOP:
            other.signal(signal.SIGCONT)
        else:
            other.end()
            stack.enter_context(process(PROGRAM, port)).line()
        wait_until(lambda: (learner.sample(64)["id"] >= 100).any())
        assert "is back" in caplog.text


def test_where_all_are_away_it_waits_for_one_and_then_says_why():
    port, store = free_port(), filled(5)[0]
    with shard(store, port=port) as server:
        learner = ShardedLearner("robot", [server.url], CONFIG, timeout=1.0)
        learner.sample(1)
    with learner:
        with (
            took(at_most=3.0, at_least=0.9),
            pytest.raises(Unreachable, match=r"no shard answers within 1 s: shard 0 at zmq://"),
        ):
            learner.sample(1)
        again = threading.Timer(
            0.3, lambda: opened.append(stack.enter_context(shard(store, port=port)))
        )
        opened: list = []
        with contextlib.ExitStack() as stack:
            again.start()
            assert len(learner.sample(3)["id"]) == 3
            again.join()
    with pytest.raises(Closed):
        learner.sample(1)


# Which shard is whose --------------------------------------------------------------------------


def test_which_shard_is_whose_is_the_same_for_ever():
    names = [f"robot-{n}" for n in range(2000)]
    assert [shard_of(f"robot-{n}", 4) for n in range(12)] == [0, 2, 0, 0, 0, 3, 3, 1, 3, 2, 2, 1]
    counts = Counter(shard_of(name, 4) for name in names)
    assert all(abs(counts[number] - 500) < 100 for number in range(4))
    moved = [name for name in names if shard_of(name, 4) != shard_of(name, 5)]
    assert all(shard_of(name, 5) == 4 for name in moved)  # only to the new one
    assert 300 < len(moved) < 500


def test_actors_and_the_learner_use_one_server(transport):
    store = ReplayBuffer(1000, example=item(0))
    with shard(store, transport) as server:
        mine = QueuedDataStore(1000)
        mine.batch_insert(items(50))
        with (
            TrainerClient("robot", None, CONFIG, mine, url=server.url) as actor,
            ShardedLearner("robot", [server.url], CONFIG) as learner,
        ):
            actor.update()
            assert len(learner.sample(16)["id"]) == 16
            assert server.stats()["items_sampled"] == 16
            assert learner.stats()["batches"] == 1
