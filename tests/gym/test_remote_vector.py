"""Many remote environments are, as one, what gymnasium's own vector environments are."""

import functools
import signal
import threading
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import edgeml
from edgeml.data import ReplayBufferDataStore, VectorTransitions
from edgeml.gym import RemoteVectorEnv
from pairs import process, took
from served import Faulty, Room, serving

MODES = list(AutoresetMode)


class Short(gymnasium.Env):
    """Counts; its episodes are as long as they began, and end by turns in the two ways."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(-100, 100, (2,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        self.episodes += 1
        self.number = 0
        return self._look(), {"began": self.episodes, "options": str(options)}

    def _look(self):
        return np.array([self.number, self.episodes], np.float64)

    def step(self, action):
        self.number += 1
        over = self.number >= self.left
        info = {"at": np.array([self.number]), **({"last": "yes"} if over else {})}
        return self._look(), float(action), over and self.episodes % 2 == 0, over, info

    def render(self):
        return np.full((2, 2, 3), self.number, np.uint8)


def equal(ours, theirs):
    """Whether results are equal, and of the same types; those of infos in whichever order."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert _same(our, their), (our, their)


def _same(our, their):
    if isinstance(our, np.ndarray) and our.dtype == object:
        return len(our) == len(their) and all(map(_same, our, their))
    if isinstance(our, dict):
        return our.keys() == their.keys() and all(_same(our[key], their[key]) for key in our)
    return data_equivalence(our, their, exact=True)


def same_steps(ours, theirs, steps, seed=7):
    """Step both alike, and begin anew what has ended where that is left to the user."""
    ours.action_space.seed(seed)
    theirs.action_space.seed(seed)
    equal(ours.reset(seed=seed), theirs.reset(seed=seed))
    for _ in range(steps):
        action = ours.action_space.sample()
        mine, other = ours.step(action), theirs.step(action)
        equal(mine, other)
        ended = mine[2] | mine[3]
        if ours.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            # Both may take what they are given apart.
            equal(
                ours.reset(options={"reset_mask": ended.copy(), "more": 1}),
                theirs.reset(options={"reset_mask": ended.copy(), "more": 1}),
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env", [Short, Room, "CartPole-v1"])
def test_steps_are_those_of_the_environments_here(env, mode):
    make = functools.partial(gymnasium.make, env) if isinstance(env, str) else env
    local = SyncVectorEnv([make] * 3, autoreset_mode=mode)
    with serving(env) as server:
        ours = RemoteVectorEnv(server.url, 3, autoreset_mode=mode)
        assert ours.observation_space == local.observation_space
        assert ours.action_space == local.action_space
        assert ours.single_observation_space == local.single_observation_space
        assert ours.single_action_space == local.single_action_space
        assert ours.num_envs == 3
        same_steps(ours, local, steps=20 if env is Room else 100)
        ours.close()
    local.close()


def test_steps_are_equal_over_each_transport(transport):
    local = SyncVectorEnv([Short] * 2)
    with serving(Short, transport) as server:
        ours = RemoteVectorEnv(server.url, 2)
        same_steps(ours, local, steps=20)
        ours.close()


def test_final_observations_and_infos_are_those_of_the_episode_that_ended():
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2, autoreset_mode="SameStep")
        envs.reset(seed=[1, 2])
        seen = 0
        for _ in range(20):
            observations, _, terminated, truncated, infos = envs.step(np.array([1, 0]))
            for number in np.flatnonzero(terminated | truncated):
                seen += 1
                assert observations[number][0] == 0  # of the new episode
                assert infos["final_obs"][number][0] > 0  # of the old one
                assert infos["final_info"]["last"][number] == "yes"
                assert infos["final_info"]["at"][number] == infos["final_obs"][number][0]
                assert infos["began"][number] == observations[number][1]
        assert seen > 5
        envs.close()


def test_gymnasium_makes_it_and_warns_of_nothing():
    with serving("CartPole-v1") as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gymnasium.make_vec("edgeml/Remote-v0", num_envs=2, url=server.url)
        assert isinstance(envs, RemoteVectorEnv)
        assert envs.spec.id == "edgeml/Remote-v0"
        assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        observations, infos = envs.reset(seed=4)
        assert observations.shape == (2, 4)
        assert infos == {}
        envs.close()
        envs.close()
        assert envs.closed


def test_gymnasiums_own_vectors_hold_remote_ones_too():
    with serving("CartPole-v1") as server:
        envs = gymnasium.make_vec(
            "edgeml/Remote-v0", num_envs=2, url=server.url, vectorization_mode="sync"
        )
        assert isinstance(envs, SyncVectorEnv)
        envs.reset(seed=1)
        assert envs.step(envs.action_space.sample())[0].shape == (2, 4)
        envs.close()


def test_they_are_spread_over_several_servers():
    seen = []

    def maker(name):
        def make():
            seen.append(name)
            return Short()

        return make

    with serving(maker("a")) as first, serving(maker("b"), "shm") as second:
        envs = RemoteVectorEnv([first.url, second.url], 4)
        assert seen == ["a", "b", "a", "b"]
        envs.reset(seed=0)
        envs.step(np.ones(4, int))
        envs.close()
        envs = RemoteVectorEnv([first.url, second.url])
        assert envs.num_envs == 2
        envs.close()


class Meeting(Short):
    """Ends its step when two others are amid theirs."""

    together = threading.Barrier(3)

    def step(self, action):
        self.together.wait(10)
        return super().step(action)


def test_steps_go_out_at_once():
    with serving(Meeting) as first, serving(Meeting) as second, serving(Meeting) as third:
        envs = RemoteVectorEnv([first.url, second.url, third.url])
        envs.reset(seed=0)
        envs.step(np.ones(3, int))
        envs.close()


def test_frames_come_of_all():
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2, render_mode="rgb_array")
        assert envs.render_mode == "rgb_array"
        envs.reset(seed=1)
        frames = envs.render()
        assert [int(frame.max()) for frame in frames] == [0, 0]
        envs.close()


def test_attributes_are_those_of_this_end():
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2)
        envs.reset(seed=5)
        assert envs.np_random_seed == (5, 6)
        assert envs.get_attr("render_mode") == (None, None)
        envs.set_attr("note", [1, 2])
        assert envs.get_attr("note") == (1, 2)
        envs.set_attr("note", 3)
        assert envs.call("get_wrapper_attr", "note") == (3, 3)
        with pytest.raises(ValueError, match="3 values for 2"):
            envs.set_attr("note", [1, 2, 3])
        with pytest.raises(AttributeError):  # it is there, and not here
            envs.get_attr("episodes")
        envs.close()


@pytest.mark.parametrize("mode", MODES)
def test_its_steps_are_transitions_for_a_replay_buffer(mode):
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 3, autoreset_mode=mode)
        spaces = envs.single_observation_space, envs.single_action_space
        store = ReplayBufferDataStore(*spaces, 1000, lanes=3)
        transitions = VectorTransitions(envs)
        observations, _ = envs.reset(seed=0)
        transitions.begin(observations)
        for _ in range(40):
            actions = np.ones(3, int)
            step = envs.step(actions)
            store.batch_insert(transitions.take_step(actions, *step))
            over = step[2] | step[3]
            if mode is AutoresetMode.DISABLED and over.any():
                observations, _ = envs.reset(options={"reset_mask": over})
                transitions.begin(observations, over)
        batch = store.sample(64)
        taken = batch["next_observations"] - batch["observations"]
        assert (taken == [1, 0]).all()  # a step on, in the same episode
        envs.close()


# What goes wrong --------------------------------------------------------------------------


def test_there_must_be_one_for_each_server():
    for url, number in ([], None), ("zmq://127.0.0.1:1", 0), (["zmq://a:1", "zmq://b:1"], 1):
        with pytest.raises(ValueError, match="give at least one for each url"):
            RemoteVectorEnv(url, number)


def test_spaces_that_differ_are_refused_and_all_is_closed():
    closed = []
    with (
        serving(lambda: Faulty(closed=lambda: closed.append(1))) as first,
        serving(Short) as second,
        pytest.raises(ValueError, match="the observation spaces differ"),
    ):
        RemoteVectorEnv([first.url, second.url])
    assert closed == [1]


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ([True, False], TypeError),
        (np.ones(2), TypeError),
        (np.ones(3, bool), ValueError),
        (np.zeros(2, bool), ValueError),
    ],
    ids=str,
)
def test_a_mask_that_isnt_one_is_refused(mask, error):
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2, autoreset_mode=AutoresetMode.DISABLED)
        envs.reset(seed=0)
        with pytest.raises(error, match="reset_mask must"):
            envs.reset(options={"reset_mask": mask})
        with pytest.raises(ValueError, match="1 seeds for 2"):
            envs.reset(seed=[1])
        envs.close()


def test_an_ended_episode_isnt_stepped_where_resets_are_the_users():
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2, autoreset_mode=AutoresetMode.DISABLED)
        envs.reset(seed=0)
        over = np.zeros(2, bool)
        while not over.any():
            _, _, terminated, truncated, _ = envs.step(np.ones(2, int))
            over = terminated | truncated
        with pytest.raises(ResetNeeded, match=r"the episodes of \[.*\] have ended"):
            envs.step(np.ones(2, int))
        options = {"reset_mask": over}
        envs.reset(options=options)
        assert "reset_mask" in options  # what the user gave is the user's
        envs.step(np.ones(2, int))
        envs.close()


def test_a_wrong_number_of_actions_is_refused_before_any_step():
    with serving(Short) as server:
        envs = RemoteVectorEnv(server.url, 2)
        envs.reset(seed=1)
        for actions in (np.ones(1, int), np.ones(3, int)):
            with pytest.raises(ValueError, match="actions for 2 environments"):
                envs.step(actions)
        assert envs.step(np.ones(2, int))[0][:, 0].tolist() == [1, 1]
        envs.close()


def test_if_one_raises_so_does_the_whole_and_a_reset_is_needed():
    with serving(Faulty) as server:
        envs = RemoteVectorEnv(server.url, 3)
        envs.reset()
        actions = np.zeros((3, 2), np.float32)
        envs.step(actions)
        actions[1] = 2
        with pytest.raises(edgeml.RemoteError, match="too far"):
            envs.step(actions)
        with pytest.raises(ResetNeeded, match="one of the batch raised RemoteError"):
            envs.step(np.zeros((3, 2), np.float32))
        envs.reset()
        assert envs.step(np.zeros((3, 2), np.float32))[0].tolist() == [1, 1, 1]
        envs.close()


SERVER = """
import functools, signal, sys, gymnasium
from edgeml.gym import EnvServer
server = EnvServer(functools.partial(gymnasium.make, "CartPole-v1"), url=sys.argv[1])
with server:
    server.start(threaded=True)
    print(server.url, flush=True)
    signal.pause()
"""


def test_a_server_that_is_killed_and_started_again_needs_a_reset_of_all():
    with process(SERVER, "zmq://127.0.0.1:0") as first:
        url = first.line()
        envs = RemoteVectorEnv(url, 2, timeout=10.0)
        local = SyncVectorEnv([functools.partial(gymnasium.make, "CartPole-v1")] * 2)
        same_steps(envs, local, steps=5)
        first.signal(signal.SIGKILL)
        first.popen.wait()
        with pytest.raises((edgeml.EdgemlError, ResetNeeded)):
            envs.step(np.ones(2, int))
    with process(SERVER, url) as second:
        assert second.line() == url
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            envs.step(np.ones(2, int))
        same_steps(envs, local, steps=30)
        envs.close()
        local.close()


def test_all_answers_are_awaited_within_the_timeout():
    going = threading.Event()

    class Stuck(Short):
        def step(self, action):
            going.wait(10)
            return super().step(action)

    with serving(Stuck) as first, serving(Short) as second:
        envs = RemoteVectorEnv([first.url, second.url], timeout=0.4)
        envs.reset(seed=0)
        with took(3.0), pytest.raises(edgeml.DeadlineExceeded):
            envs.step(np.ones(2, int))
        going.set()
        with pytest.raises(ResetNeeded):
            envs.step(np.ones(2, int))
        envs.close()
