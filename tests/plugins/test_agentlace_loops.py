"""The loops of SERL's and HIL-SERL's actors and learners, in two processes each.

They use agentlace as the scripts do, to the letter of its API; environment and agent stand in.
"""

from __future__ import annotations

import json
import socket

import pytest

from pairs import process

# What both scripts have of their own: an environment with an intervening human, and an agent.
COMMON = """
import json, sys, threading, time
import gymnasium
import numpy as np
from gymnasium.wrappers import RecordEpisodeStatistics
from agentlace.trainer import TrainerConfig, TrainerServer, TrainerClient
from agentlace.data.data_store import DataStoreBase, QueuedDataStore

EPISODES, LENGTH = 6, 10

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict({
        "state": gymnasium.spaces.Box(-np.inf, np.inf, (1, 4), np.float64),
        "wrist": gymnasium.spaces.Box(0, 255, (1, 16, 16, 3), np.uint8),
    })
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    steps = 0
    def observe(self):
        return {"state": np.full((1, 4), self.steps / 7),
                "wrist": np.full((1, 16, 16, 3), self.steps % 251, np.uint8)}
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps += 1
        self.left = LENGTH
        return self.observe(), {}
    def step(self, action):
        self.steps += 1
        self.left -= 1
        info = {"left": True, "grasp_penalty": -0.1, "succeed": np.bool_(True), "env": self}
        if self.left % 5 == 0:
            info["intervene_action"] = np.ones(3, np.float32)
        return self.observe(), np.float64(self.left == 0), self.left == 0, False, info

class Agent:
    def __init__(self, params):
        self.params = params
    def sample_actions(self, observations):
        assert observations["state"].shape == (1, 4)
        return np.tanh(self.params["modules_actor"]["kernel"]).astype(np.float32)

def make_agent():
    return Agent({"modules_actor": {"kernel": np.zeros(3)}, "step": np.int64(0)})

def make_trainer_config(port_number=int(sys.argv[1]), broadcast_port=int(sys.argv[2])):
    return TrainerConfig(
        port_number=port_number, broadcast_port=broadcast_port, request_types=["send-stats"])
"""

ACTOR = """
def actor(agent, data_store, intvn_data_store, env, two_stores):
    if two_stores:
        client = TrainerClient(
            "actor_env", "localhost", make_trainer_config(),
            data_stores={"actor_env": data_store, "actor_env_intvn": intvn_data_store},
            wait_for_server=True, timeout_ms=3000)
    else:
        client = TrainerClient(
            "actor_env", "localhost", make_trainer_config(), data_store, wait_for_server=True)
    newest = threading.Event()
    def update_params(params):
        nonlocal agent
        params["modules_actor"]["kernel"] += 0  # as may be done in place
        agent = Agent(params)
        if params["step"] == -1:
            newest.set()
    client.recv_network_callback(update_params)
    obs, _ = env.reset()
    episodes = 0
    while not (episodes >= EPISODES and newest.is_set()):
        actions = np.asarray(agent.sample_actions(observations=obs))
        next_obs, reward, done, truncated, info = env.step(actions)
        info.pop("left")
        intervened = "intervene_action" in info
        if intervened:
            actions = info.pop("intervene_action")
        transition = dict(
            observations=obs, actions=actions, next_observations=next_obs,
            rewards=reward, masks=1.0 - done, dones=done)
        if two_stores:
            transition["grasp_penalty"] = info["grasp_penalty"]
        data_store.insert(transition)
        if intervened:
            intvn_data_store.insert(transition)
        obs = next_obs
        if done or truncated:
            episodes += 1
            info["episode"]["intervention_count"] = 2
            client.request("send-stats", {"environment": info})
            client.update()
            obs, _ = env.reset()
    ends = time.monotonic() + 20  # since a busy machine may take longer than 0.8 s
    while not client.update():
        assert time.monotonic() < ends
    print(json.dumps([len(data_store), len(intvn_data_store), client.left_out, episodes]))
    client.request("send-stats", {"end": True})
    client.stop()

two_stores = sys.argv[3] == "hil"
actor(make_agent(), QueuedDataStore(50000), QueuedDataStore(50000),
      RecordEpisodeStatistics(Env()), two_stores)
"""

LEARNER = """
def learner(agent, replay_buffer, demo_buffer, iterators, logged):
    step, ended = 0, threading.Event()
    def stats_callback(type: str, payload: dict) -> dict:
        assert type == "send-stats", f"Invalid request type: {type}"
        if "end" in payload:
            ended.set()
        else:
            logged.append((payload, step))
        return {}
    server = TrainerServer(make_trainer_config(), request_callback=stats_callback)
    server.register_data_store("actor_env", replay_buffer)
    if demo_buffer is not None:
        server.register_data_store("actor_env_intvn", demo_buffer)
    server.start(threaded=True)
    while len(replay_buffer) < 20:
        time.sleep(0.01)
    server.publish_network(agent.params)
    batches = iterators()
    for step in range(30):
        sizes = {next(each)["actions"].shape for each in batches}
        agent.params["modules_actor"]["kernel"] += 0.01
        agent.params["step"] += 1
        if step % 10 == 0:
            server.publish_network(agent.params)
    agent.params["step"] = np.int64(-1)
    server.publish_network(agent.params)
    print("published")
    assert ended.wait(60)
    print(json.dumps([len(replay_buffer), len(demo_buffer or []), len(logged), sorted(sizes)]))
    print(json.dumps(sorted(logged[0][0]["environment"])))
    print(json.dumps(sorted(logged[0][0]["environment"]["episode"])))
    for each in batches:
        each.close()
    server.stop()
"""

HIL_LEARNER = """
from agentlace.data.jaxrl_data_store import MemoryEfficientReplayBufferDataStore
import jax

replay_buffer, demo_buffer = (
    MemoryEfficientReplayBufferDataStore(
        Env.observation_space, Env.action_space, capacity=1000, image_keys=["wrist"],
        include_grasp_penalty=True)
    for _ in range(2)
)
def iterators():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = [
        buffer.get_iterator(
            sample_args={"batch_size": 8, "pack_obs_and_next_obs": True}, device=sharding)
        for buffer in (replay_buffer, demo_buffer)
    ]
    assert next(made[0])["observations"]["wrist"].shape == (8, 2, 16, 16, 3)
    assert next(made[1])["grasp_penalty"].shape == (8,)
    return made
learner(make_agent(), replay_buffer, demo_buffer, iterators, [])
"""

SERL_LEARNER = """
class ReplayBufferDataStore(DataStoreBase):
    # Of four methods, filled and read under a lock of its own, as serl_launcher's.
    def __init__(self, capacity):
        DataStoreBase.__init__(self, capacity)
        self._capacity, self._size, self._insert_index = capacity, 0, 0
        self.dataset_dict = {
            "observations": {"state": np.empty((capacity, 1, 4)),
                             "wrist": np.empty((capacity, 1, 16, 16, 3), np.uint8)},
            "actions": np.empty((capacity, 3), np.float32),
            "rewards": np.empty((capacity,), np.float32),
        }
        self._lock = threading.Lock()
    def _insert(self, place, data):
        for key, part in place.items():
            if isinstance(part, dict):
                self._insert(part, data[key])
            else:
                part[self._insert_index] = data[key]
    def insert(self, data):
        with self._lock:
            self._insert(self.dataset_dict, data)
            self._insert_index = (self._insert_index + 1) % self._capacity
            self._size = min(self._size + 1, self._capacity)
    def __len__(self):
        return self._size
    def latest_data_id(self):
        return self._insert_index
    def get_latest_data(self, from_id):
        raise NotImplementedError
    def get_iterator(self, sample_args):
        while True:
            rows = np.random.randint(self._size, size=sample_args["batch_size"])
            with self._lock:
                batch = {"actions": self.dataset_dict["actions"][rows]}
            yield batch

replay_buffer = ReplayBufferDataStore(10_000)
learner(make_agent(), replay_buffer, None,
        lambda: [replay_buffer.get_iterator(sample_args={"batch_size": 8})], [])
"""


@pytest.mark.parametrize(("kind", "program"), [("hil", HIL_LEARNER), ("serl", SERL_LEARNER)])
def test_actor_and_learner_run_unchanged(kind: str, program: str) -> None:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    with (
        process(COMMON + LEARNER + program, *ports, kind) as learner,
        process(COMMON + ACTOR, *ports, kind) as actor,
    ):
        assert learner.line() == "published"
        sent, intervened, left_out, episodes = json.loads(actor.line())
        assert actor.end()[0] == 0
        got, interventions, logged, sizes = json.loads(learner.line())
        assert got == sent == 10 * episodes  # each once
        assert interventions == (intervened if kind == "hil" else 0)
        assert intervened == 2 * episodes
        assert 0 < logged <= episodes  # one that is late, on a busy machine, is not answered
        assert left_out == episodes  # the environment itself, which is in each episode's info
        assert sizes == [[8, 3]]
        assert json.loads(learner.line()) == ["episode", "grasp_penalty", "succeed"]
        assert json.loads(learner.line()) == ["intervention_count", "l", "r", "t"]
        assert learner.end()[0] == 0
