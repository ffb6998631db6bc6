"""Episodes of actors, and of their environments, that feed one store by turns."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from edgeml import TrainerClient, TrainerConfig, TrainerServer
from edgeml.data import Batch, QueuedDataStore, ReplayBuffer
from pairs import TRANSPORTS, free_port, started

NAME = "arm"
STEPS = 30


def transition(env, t):
    """A step of an environment, whose episodes end now and then; like no other's."""
    done = t % (6 + env) == 5
    return {
        "observations": {"at": np.array([env, t], np.float32)},
        "next_observations": {"at": np.array([env, t + 1], np.float32)},
        "actions": np.array([env, t]),
        "rewards": float(100 * env + t),
        "masks": 1.0 - done * (t % 2),
        "dones": done,
    }


def make_store():
    return ReplayBuffer(1000, n_step=3, frame_stack=4, seed=1, example=transition(0, 0))


def samples(store, env):
    """What samples are, by the steps of one environment."""
    batch, found = store.sample(2000), {}
    for i, (of, t) in enumerate(batch["actions"].tolist()):
        if of == env:
            found[t] = [
                batch["observations"]["at"][i].tolist(),
                batch["next_observations"]["at"][i].tolist(),
                *(batch[key][i].tolist() for key in ("rewards", "masks", "dones", "discounts")),
            ]
    return found


def expected(env, runs=(range(STEPS),)):
    """What they are where nothing else is in the store."""
    store = make_store()
    for steps in runs:
        store.interrupt()
        store.batch_insert([transition(env, t) for t in steps])
    return samples(store, env)


class Lab:
    """A learner at one address, that may go and come back."""

    def __init__(self, transport, path):
        self.config = TrainerConfig(free_port(), None, transport=transport)
        self.path = path
        self.stack = contextlib.ExitStack()
        self.server = None

    def serve(self, store):
        if self.server is not None:
            self.server.save_checkpoint(self.path)
            self.stack.close()
        server = TrainerServer(self.config)
        server.register_data_store(NAME, store)
        if self.server is not None:
            server.load_checkpoint(self.path)
        self.server = server
        self.stack.enter_context(started(server))
        return store

    def actor(self, local):
        return TrainerClient(NAME, "127.0.0.1", self.config, local, wait_for_server=30)


@pytest.fixture(params=TRANSPORTS)
def lab(request, tmp_path):
    lab = Lab(request.param, tmp_path / "checkpoint")
    with lab.stack:
        yield lab


def test_two_actors_one_of_two_environments_go_on_as_each_alone(lab):
    """Uploads come by turns, and the learner restarts from a checkpoint amid them."""
    there = lab.serve(make_store())
    pair, single = QueuedDataStore(1000), ReplayBuffer(1000)
    with lab.actor(pair) as first, lab.actor(single) as second:
        for t in range(STEPS):
            for env in (0, 1):
                pair.insert(transition(env, t), lane=env)
            single.insert(transition(2, t))
            if t == STEPS // 2:
                there = lab.serve(make_store())
            if t % 3 != 2:
                first.update()
            if t % 2:
                second.update()
        first.update()
        second.update()
    assert len(there) == 3 * STEPS
    assert there.breaks == 0
    for env in range(3):
        found = samples(there, env)
        assert found == {t: value for t, value in expected(env).items() if t in found}
        assert len(found) > STEPS // 2


def test_an_actor_that_starts_anew_begins_its_own_episode_anew(lab):
    there = lab.serve(make_store())
    other = QueuedDataStore(100)
    with lab.actor(other) as second:
        for k, steps in enumerate((range(3), range(3, 5))):
            other.insert(transition(1, k))
            second.update()
            local = QueuedDataStore(100)
            with lab.actor(local) as client:
                for t in steps:
                    local.insert(transition(0, t))
                    client.update()
        other.insert(transition(1, 2))
        second.update()
    assert samples(there, 0) == expected(0, [range(3), range(3, 5)])
    assert samples(there, 1) == expected(1, [range(3)])


def test_what_was_lost_cuts_only_the_lane_of_who_lost_it(lab):
    there = lab.serve(make_store())
    small, whole = QueuedDataStore(3), QueuedDataStore(100)
    with lab.actor(small) as first, lab.actor(whole) as second:
        small.batch_insert([transition(0, t) for t in range(2)])
        whole.batch_insert([transition(1, t) for t in range(2)])
        first.update()
        second.update()
        small.batch_insert([transition(0, t) for t in range(2, 9)])
        whole.batch_insert([transition(1, t) for t in range(2, 9)])
        first.update()
        second.update()
    assert samples(there, 0) == expected(0, [range(2), range(6, 9)])
    assert samples(there, 1) == expected(1, [range(9)])


def test_a_store_that_knows_no_lanes_is_interrupted(lab):
    class Plain(QueuedDataStore):
        def batch_insert(self, batch):
            super().batch_insert(batch)

    there = lab.serve(Plain(100))
    one, other = QueuedDataStore(100), QueuedDataStore(100)
    with lab.actor(one) as first, lab.actor(other) as second:
        for t in range(2):
            one.insert(transition(0, t), lane=0)
            one.insert(transition(1, t), lane=1)
            other.insert(transition(2, t))
            first.update()
            second.update()
    assert there.get_latest_data(0).cuts == (1, 2, 3, 4, 5)
    assert there.get_latest_data(0).lanes is None


def test_steps_of_two_actors_are_trajectories_of_their_own(tmp_path):
    jax = pytest.importorskip("jax")
    from edgeml.data import DataShape, SequenceSampler, TrajectoryBufferDataStore

    lab = Lab("inproc", tmp_path / "checkpoint")
    there = TrajectoryBufferDataStore(100, [DataShape("x", (2,)), DataShape("actions", (1,))])
    there.register_sample_config("it", {"x": SequenceSampler(0, 6)})
    with lab.stack:
        lab.serve(there)
        locals_ = [QueuedDataStore(100) for _ in range(2)]
        with lab.actor(locals_[0]) as first, lab.actor(locals_[1]) as second:
            for t in range(12):
                for env, local in enumerate(locals_):
                    step = {"x": np.array([env, t], np.float32), "actions": np.zeros(1, np.float32)}
                    local.insert({**step, "end_of_trajectory": t == 7 + env})
                if t % 3 == 1:
                    first.update()
                if t % 2:
                    second.update()
            first.update()
            second.update()
    rows = [each["x"].tolist() for each in there.get_latest_data(0)]
    data, mask = jax.tree.map(
        np.asarray, there.sample("it", len(rows), force_indices=np.arange(1, len(rows) + 1))
    )
    for i, (env, t) in enumerate(rows):
        end = 8 + env if t < 8 + env else 12
        left = min(6, int(end - t))
        assert mask["x"][i].tolist() == [k < left for k in range(6)]
        assert data["x"][i][:left].tolist() == [[env, t + k] for k in range(left)]
    assert isinstance(there.get_latest_data(0), Batch)
