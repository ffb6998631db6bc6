"""Gymnasium's wrappers do on a remote environment what they do on the environment here."""

import functools
import sys
import types

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import vector

from edgeml.gym import RemoteVectorEnv
from served import remote, serving
from test_env import same_episodes
from test_remote_vector import same_steps


class Dish(gymnasium.Env):
    """Seen as a dict, with a picture; steered by two numbers; ten steps long."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            state=gymnasium.spaces.Box(-10, 10, (3,), np.float32),
        )
        self.action_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)

    def _look(self):
        return {
            "image": self.np_random.integers(0, 256, (8, 8, 3), np.uint8),
            "state": self.np_random.uniform(-10, 10, 3).astype(np.float32),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = 0
        return self._look(), {"number": 0}

    def step(self, action):
        self.number += 1
        assert abs(action).max() <= 2
        info = {"number": self.number, "action": action}
        return self._look(), float(action.sum()), self.number == 10, False, info

    def render(self):
        return np.full((8, 8, 3), self.number, np.uint8)


def picture(env):
    return wrappers.TransformObservation(
        env, lambda seen: seen["image"], env.observation_space["image"]
    )


def state(env):
    return wrappers.FilterObservation(env, ["state"])


flat = wrappers.FlattenObservation


WRAPPERS = {
    "limited": lambda env: wrappers.TimeLimit(env, 4),
    "autoreset": lambda env: wrappers.Autoreset(wrappers.TimeLimit(env, 4)),
    "ordered": wrappers.OrderEnforcing,
    "checked": wrappers.PassiveEnvChecker,
    "time-aware": lambda env: wrappers.TimeAwareObservation(wrappers.TimeLimit(flat(env), 20)),
    "flat": flat,
    "filtered": state,
    "transformed": picture,
    "stacked": lambda env: wrappers.FrameStackObservation(env, 3),
    "stacked-pictures": lambda env: wrappers.FrameStackObservation(picture(env), 4),
    "delayed": lambda env: wrappers.DelayObservation(flat(env), 2),
    "dtype": lambda env: wrappers.DtypeObservation(picture(env), np.float32),
    "grey": lambda env: wrappers.GrayscaleObservation(picture(env)),
    "reshaped": lambda env: wrappers.ReshapeObservation(picture(env), (4, 48)),
    "normalized": lambda env: wrappers.NormalizeObservation(flat(env)),
    "rescaled": lambda env: wrappers.RescaleObservation(
        flat(state(env)), np.float32(0), np.float32(1)
    ),
    "max-and-skip": lambda env: wrappers.MaxAndSkipObservation(flat(env), 2),
    "clipped": wrappers.ClipAction,
    "rescaled-action": lambda env: wrappers.RescaleAction(env, np.float32(-1), np.float32(1)),
    "normalized-reward": wrappers.NormalizeReward,
    "clipped-reward": lambda env: wrappers.ClipReward(env, -1, 1),
    "transformed-reward": lambda env: wrappers.TransformReward(env, lambda reward: 2 * reward),
}
if hasattr(wrappers, "DiscretizeAction"):  # gymnasium 1.2
    WRAPPERS["discretized"] = lambda env: wrappers.DiscretizeAction(env, 5)
SEEING = {
    "rendered": wrappers.AddRenderObservation,
    "rendered-beside": functools.partial(wrappers.AddRenderObservation, render_only=False),
    "collected": wrappers.RenderCollection,
}


def same_wrapped(wrap, mode=None):
    local = wrap(Dish(mode))
    with serving(Dish) as server, remote(server, render_mode=mode) as made:
        ours = wrap(made)
        assert ours.observation_space == local.observation_space
        assert ours.action_space == local.action_space
        same_episodes(local, ours, steps=35, seed=9)
        if mode:
            np.testing.assert_array_equal(ours.render(), local.render())


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_sees_what_it_sees_here(name):
    same_wrapped(WRAPPERS[name])


@pytest.mark.parametrize("name", SEEING)
def test_a_wrapper_that_renders_sees_what_it_sees_here(name):
    same_wrapped(SEEING[name], "rgb_array")


def test_a_wrapper_that_draws_from_the_generator_can_be_repeated():
    def actions(env):
        env.reset(seed=3)
        env.action_space.seed(3)
        return [env.step(env.action_space.sample())[4]["action"].tolist() for _ in range(9)]

    with serving(Dish) as server, remote(server) as made:
        sticky = wrappers.StickyAction(made, 0.5)
        first = actions(sticky)
        assert len(set(map(tuple, first))) < 9
        assert actions(sticky) == first


def statistics(env):
    """A wrapped environment's infos but for the time that it took."""
    env.reset(seed=1)
    found = []
    for _ in range(35):
        _, _, terminated, truncated, info = env.step(np.ones(2, np.float32))
        if terminated or truncated:
            found.append((info["episode"]["r"], info["episode"]["l"]))
            env.reset()
    return found


def test_statistics_of_episodes_are_the_same():
    local = wrappers.RecordEpisodeStatistics(Dish())
    with serving(Dish) as server, remote(server) as made:
        assert statistics(wrappers.RecordEpisodeStatistics(made)) == statistics(local)
        assert len(statistics(local)) == 3


def test_a_video_is_recorded_of_what_is_rendered_there(monkeypatch, tmp_path):
    kept = []

    class Clip:
        def __init__(self, frames, fps):
            kept.append(([int(frame.max()) for frame in frames], fps))

        def write_videofile(self, path, logger):
            kept.append(path)

    # What writes the file isn't needed to see what would be written.
    for name in ("moviepy", "moviepy.video", "moviepy.video.io"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    writer = types.ModuleType("moviepy.video.io.ImageSequenceClip")
    writer.ImageSequenceClip = Clip
    monkeypatch.setitem(sys.modules, writer.__name__, writer)
    with serving(Dish) as server, remote(server, render_mode="rgb_array") as made:
        recorded = wrappers.RecordVideo(made, str(tmp_path / "videos"))
        recorded.reset()
        for _ in range(10):
            recorded.step(np.zeros(2, np.float32))
        recorded.reset()
        recorded.close()
        assert kept[0] == (list(range(11)), 10)
        assert kept[1].endswith("episode-0.mp4")


def test_attributes_are_found_through_wrappers():
    with serving(Dish) as server, remote(server) as made:
        wrapped = wrappers.TimeLimit(made, 5)
        assert wrapped.get_wrapper_attr("client") is made.unwrapped.client
        assert wrapped.render_mode is None
        wrapped.reset(seed=8)
        assert wrapped.np_random_seed == 8
        assert wrapped.metadata["render_fps"] == 10


def test_training_on_one_is_repeatable():
    def scores(env):
        env = wrappers.NormalizeReward(wrappers.NormalizeObservation(flat(env)))
        env.action_space.seed(0)
        env.reset(seed=0)
        return [float(env.step(env.action_space.sample())[1]) for _ in range(9)]

    with serving(Dish) as server, remote(server) as made:
        first = scores(made)
        assert scores(made) == first == scores(Dish())


@pytest.mark.parametrize(
    "wrap",
    [
        vector.FlattenObservation,
        lambda envs: vector.NormalizeObservation(vector.FlattenObservation(envs)),
        vector.NormalizeReward,
        vector.ClipAction,
        functools.partial(
            vector.RescaleAction, min_action=np.float32(-1), max_action=np.float32(1)
        ),
        functools.partial(vector.ClipReward, min_reward=0, max_reward=1),
        vector.DictInfoToList,
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrapper_of_vectors_sees_what_it_sees_here(wrap):
    local = wrap(SyncVectorEnv([Dish] * 2))
    with serving(Dish) as server:
        ours = wrap(RemoteVectorEnv(server.url, 2))
        same_steps(ours, local, steps=25)
        ours.close()
    local.close()


def test_statistics_of_vectors_are_the_same():
    def lengths(envs):
        envs = vector.RecordEpisodeStatistics(envs)
        envs.reset(seed=1)
        found = []
        for _ in range(30):
            infos = envs.step(np.ones((2, 2), np.float32))[4]
            if "episode" in infos:
                found.append((infos["episode"]["l"].tolist(), infos["episode"]["r"].tolist()))
        envs.close()
        return found

    with serving(Dish) as server:
        assert lengths(RemoteVectorEnv(server.url, 2)) == lengths(SyncVectorEnv([Dish] * 2))
