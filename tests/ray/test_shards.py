"""A learner in shards: actors each have their own, and nothing is lost or doubled when one dies."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

import edgeml.ray
from edgeml import (
    ConfigMismatch,
    EdgemlError,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    UnknownInterface,
)
from edgeml.core.resolver import Place
from edgeml.data import Mixture, QueuedDataStore, ReplayBuffer
from edgeml.ray.deployment import Ask, Host
from edgeml.ray.members import Member
from edgeml.ray.sharding import Trainer, TrainerSpec
from edgeml.ray.shards import ShardDescription
from edgeml.services.trainer.sharded import shard_of
from pairs import wait_until

CONFIG = TrainerConfig(0, None)
SHARDS = 2


def make() -> TrainerServer:
    server = TrainerServer(TrainerConfig(0, None, transport="auto"))
    server.register_data_store("robot", ReplayBuffer(10_000, example={"robot": 0, "step": 0}))
    return server


def fail() -> TrainerServer:
    raise LookupError("there is no such dataset")


class Robot:
    """An actor, and what it holds."""

    def __init__(self, name: str, number: int) -> None:
        self.number = number
        self.id = f"robot-{number}"
        self.store = QueuedDataStore(10_000)
        self.steps = 0
        self.client = TrainerClient(
            "robot", None, CONFIG, self.store, url=f"ray://{name}", client_id=self.id, timeout=5
        )

    def act(self, n: int) -> None:
        steps = range(self.steps, self.steps + n)
        self.store.batch_insert([{"robot": self.number, "step": step} for step in steps])
        self.steps += n

    def update(self) -> bool:
        """Whether the learner has all that it was to have."""
        with contextlib.suppress(EdgemlError):
            self.client.update()
        stats = self.client.stats()["stores"]["robot"]
        assert stats["dropped"] == stats["lost"] == 0
        return bool(stats["applied"] == self.steps)

    def durable(self) -> int:
        return int(self.client.stats()["stores"]["robot"]["durable"])


@contextlib.contextmanager
def robots(name: str, n: int):
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(n):
            made.append(robot := Robot(name, number))
            stack.callback(robot.client.stop)
        yield made


def saved(folder: Path) -> list[list[tuple[int, int]]]:
    """What each shard's checkpoint has: of each item, whose it is and its number."""
    found = []
    for number in range(SHARDS):
        server = make()
        server.load_checkpoint(folder / f"shard-{number}")
        items = server.data_store("robot").get_latest_data(0)
        found.append([(int(item["robot"]), int(item["step"])) for item in items])
        server.stop()
    return found


def pid_of(name: str, number: int) -> int:
    for each in edgeml.ray.status(name).replicas:
        if each.id == f"shard-{number}" and each.state == "ready":
            return each.pid
    return 0


def test_nothing_is_lost_or_doubled_when_a_shard_is_killed(name, tmp_path):
    now = edgeml.ray.deploy_trainer(
        make, name=name, shards=SHARDS, checkpoint_dir=tmp_path, checkpoint_every=0.3, num_cpus=0
    )
    assert (now.kind, now.state, now.wanted, now.ready) == ("trainer", "ready", SHARDS, SHARDS)
    with robots(name, 4) as actors, edgeml.ray.learner(name, "robot", CONFIG) as learner:
        number = shard_of(actors[0].id, SHARDS)
        assert {shard_of(robot.id, SHARDS) for robot in actors} == set(range(SHARDS))
        for robot in actors:
            robot.act(200)
            wait_until(robot.update)
        # All shards at once, and a source of a mixture.
        drawn = Counter(learner.sample(400)["robot"].tolist())
        assert drawn.keys() == {0, 1, 2, 3}
        batch = Mixture([(learner, 0.5), (learner, 0.5)]).sample(64)
        assert batch["step"].shape == (64,)
        # Some of it is told to be durable, and held no more; some is not.
        wait_until(lambda: actors[0].update() and actors[0].durable() >= 200)
        assert len(actors[0].store) == 0
        for robot in actors:
            robot.act(100)
            robot.update()
        before = pid_of(name, number)
        os.kill(before, signal.SIGKILL)
        for robot in actors:
            robot.act(100)
        theirs = [robot for robot in actors if shard_of(robot.id, SHARDS) != number]
        for robot in theirs:  # their shard is there, and they notice nothing
            assert robot.update()
        assert set(learner.sample(64)["robot"].tolist()) <= {robot.number for robot in theirs}
        wait_until(lambda: all(robot.update() for robot in actors))
        wait_until(lambda: pid_of(name, number))
        assert pid_of(name, number) != before
        wait_until(lambda: 0 in learner.sample(64)["robot"])
        assert learner.stats()["shards"][number]["missed"] > 0
    edgeml.ray.delete(name)
    found = saved(tmp_path)
    for shard, items in enumerate(found):
        mine = [robot.number for robot in actors if shard_of(robot.id, SHARDS) == shard]
        assert sorted(items) == [(robot, step) for robot in mine for step in range(400)]


def test_a_trainer_goes_on_from_what_was_saved(name, tmp_path):
    options = {"name": name, "shards": SHARDS, "checkpoint_dir": tmp_path, "num_cpus": 0}
    edgeml.ray.deploy_trainer(make, **options)
    with pytest.raises(ValueError, match="delete it first"):
        edgeml.ray.deploy_trainer(make, **options)
    with pytest.raises(ValueError, match="can't be moved"):
        edgeml.ray.scale(name, SHARDS + 1)
    with pytest.raises(ValueError, match="delete it first"):
        edgeml.ray.deploy(make, name=name)
    with pytest.raises(ConfigMismatch, match="request_types"):
        edgeml.ray.learner(name, "robot", TrainerConfig(0, None, ["stats"]))
    with robots(name, 2) as actors:
        for robot in actors:
            robot.act(50)
            assert robot.update()
        edgeml.ray.delete(name)
        assert sum(map(len, saved(tmp_path))) == 100
        with pytest.raises(RemoteError, match="shard 0 of 1, and is of shard 0 of 2"):
            edgeml.ray.deploy_trainer(make, **{**options, "shards": 1})
        edgeml.ray.delete(name)
        with pytest.raises(UnknownInterface):
            edgeml.ray.learner(name, "robot", CONFIG)
        for robot in actors:
            robot.act(50)
        edgeml.ray.deploy_trainer(make, **options)
        wait_until(lambda: all(robot.update() for robot in actors))
        with edgeml.ray.learner(name, "robot", CONFIG) as learner:
            assert len(learner.sample(8)["step"]) == 8
    edgeml.ray.delete(name)
    assert sorted(item for items in saved(tmp_path) for item in items) == [
        (robot, step) for robot in range(2) for step in range(100)
    ]


def test_what_can_not_be_started_says_why(name, tmp_path):
    options = {"name": name, "shards": 1, "num_cpus": 0, "timeout": 30}
    (tmp_path / "shard-0").write_bytes(b"no checkpoint")
    with pytest.raises(RemoteError, match="checkpoint"):
        edgeml.ray.deploy_trainer(make, checkpoint_dir=tmp_path, **options)
    with pytest.raises(RemoteError, match="LookupError: there is no such dataset"):
        edgeml.ray.deploy_trainer(fail, **options)
    for wrong in ({"shards": 0}, {"checkpoint_every": 0}, {"name": "No"}):
        with pytest.raises(ValueError, match=r"shards|checkpoint_every|called"):
            edgeml.ray.deploy_trainer(make, **{**options, **wrong})
    with pytest.raises(TypeError, match="factory"):
        edgeml.ray.deploy_trainer("make", **options)


# Who is told of what ---------------------------------------------------------------------------


def told_of(url: str, node: str, address: str) -> ShardDescription:
    return ShardDescription("ready", "", url, address, 1, node_id=node, config=CONFIG)


@pytest.fixture
def trainer(ray) -> Trainer:
    """Two shards on the first of two nodes, and a relay on each; without any actors."""
    made = Trainer(TrainerSpec("nobody", shards=2), Host(lambda spec: None, lambda: None))
    made._nodes = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
    for number in range(2):
        url = f"shm://127.0.0.1:{number},zmq://10.0.0.1:{number}"
        told = told_of(url, "n1", "10.0.0.1")
        made._shards[number] = Member(f"shard-{number}", "", None, number=number, told=told)
    for node, address in made._nodes.items():
        told = told_of(f"shm://127.0.0.1:9,zmq://{address}:9", node, address)
        made._relays[node] = Member(f"relay-{node}", "", None, node=node, told=told)
    return made


def test_each_client_is_told_of_its_shard_and_of_the_relay_of_its_node(trainer):
    def places(**asked):
        return trainer.places(Ask("trainer", **asked))

    first, second = (
        next(f"robot-{n}" for n in range(99) if shard_of(f"robot-{n}", 2) == number)
        for number in range(2)
    )
    assert places(client_id=first, node="n1", host="127.0.0.1") == [
        Place("shm://127.0.0.1:0,zmq://10.0.0.1:0", calls=True, topics=False),
        Place("shm://127.0.0.1:9,zmq://10.0.0.1:9", calls=False, topics=True),
    ]
    assert places(client_id=second, node="n2", host="10.0.0.2") == [
        Place("zmq://10.0.0.1:1", calls=True, topics=False),
        Place("shm://127.0.0.1:9,zmq://10.0.0.2:9", calls=False, topics=True),
    ]
    # Outside of Ray: by the machine's address, or else by the shard's node.
    assert places(client_id=second, host="10.0.0.2")[1].url == "shm://127.0.0.1:9,zmq://10.0.0.2:9"
    assert places(client_id=second, host="10.7.7.7") == [
        Place("zmq://10.0.0.1:1", calls=True, topics=False),
        Place("zmq://10.0.0.1:9", calls=False, topics=True),
    ]
    # The learner has a client of each shard.
    for number in range(2):
        (place,) = places(client_id=first, path=str(number), host="10.7.7.7")
        assert place == Place(f"zmq://10.0.0.1:{number}", calls=True, topics=False)
    for path in ("2", "-1", "x", "1/1", "1" * 999, "\u0662"):
        assert places(client_id=first, path=path) == []
    assert trainer.places(Ask("inference", first)) == []


def test_a_client_whose_shard_is_away_is_told_of_no_other(trainer):
    client = next(f"robot-{n}" for n in range(99) if shard_of(f"robot-{n}", 2) == 1)
    trainer._shards[1].lost = True
    (relay,) = trainer.places(Ask("trainer", client, "n2"))
    assert not relay.calls
    del trainer._shards[1]
    assert trainer.places(Ask("trainer", client, "n2")) == [relay]


def test_a_node_gets_a_relay_when_a_client_of_it_asks_and_a_name_that_is_none_gets_nothing(trainer):
    trainer._relays.clear()
    assert len(trainer.places(Ask("trainer", "robot-1", "n2"))) == 1
    assert trainer._wanted == {"n2"}
    trainer.places(Ask("trainer", "robot-1", "made up", "10.7.7.7"))
    assert trainer._wanted == {"n1", "n2"}  # its shard's
