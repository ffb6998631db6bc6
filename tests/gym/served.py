"""Environments that the tests serve, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from edgeml.gym import EnvServer
from pairs import started

EVERY_SPACE = {
    "box": spaces.Box(-1, 1, (2, 3)),
    "box_of_arrays": spaces.Box(
        np.array([-1.0, -np.inf]), np.array([np.inf, 2.5]), dtype=np.float64
    ),
    "box_scalar": spaces.Box(-2.0, 2.0, ()),
    "box_unbounded_ints": spaces.Box(-np.inf, np.inf, (3,), np.int32),
    "box_uint8": spaces.Box(0, 255, (4, 5, 3), np.uint8),
    "box_half": spaces.Box(0, 1, (2,), np.float16),
    "box_bool": spaces.Box(0, 1, (2,), np.bool_),
    "box_empty": spaces.Box(0, 1, (0,)),
    "discrete": spaces.Discrete(3),
    "discrete_from": spaces.Discrete(5, start=-2),
    "multi_binary": spaces.MultiBinary(4),
    "multi_binary_2d": spaces.MultiBinary([2, 3]),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_discrete_2d": spaces.MultiDiscrete(
        np.array([[2, 3], [4, 5]]), start=np.ones((2, 2), int)
    ),
    "multi_discrete_narrow": spaces.MultiDiscrete([2, 3], dtype=np.int8),
    "text": spaces.Text(8),
    "text_of": spaces.Text(3, min_length=0, charset="zäb"),
    "dict": spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(0, 1, (2,)))]),
    "dict_of_numbers": spaces.Dict({0: spaces.Discrete(2), 1: spaces.Discrete(3)}),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Dict(x=spaces.Box(0, 1, (1,)))]),
    "tuple_empty": spaces.Tuple([]),
    "sequence": spaces.Sequence(spaces.Box(0, 1, (2,))),
    "sequence_stacked": spaces.Sequence(spaces.Box(0, 1, (2,)), stack=True),
    "graph": spaces.Graph(spaces.Box(-1, 1, (3,)), spaces.Discrete(4)),
    "graph_without_edges": spaces.Graph(spaces.Discrete(4), None),
    "sequence_of_graphs": spaces.Sequence(
        spaces.Graph(spaces.Box(-1, 1, (3,)), spaces.Discrete(4))
    ),
    "one_of": spaces.OneOf([spaces.Discrete(3), spaces.Box(0, 1, (2,))]),
    "one_of_graphs": spaces.OneOf(
        [
            spaces.Graph(spaces.Discrete(4), None),
            spaces.Tuple([spaces.Graph(spaces.Discrete(4), None)]),
        ]
    ),
}

# Gymnasium won't have empty ones in an environment, and of a vector's it gives scalars for arrays.
LIVED_IN = {k: space for k, space in EVERY_SPACE.items() if not k.endswith(("empty", "scalar"))}


class Room(gymnasium.Env):
    """Seen and steered by every kind of space; an episode has as many steps as it was told."""

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10, "autoreset": print}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, steps: int = 7) -> None:
        self.render_mode = render_mode
        self.steps = steps
        self.observation_space = spaces.Dict(deepcopy(LIVED_IN))
        self.action_space = spaces.Dict(deepcopy(LIVED_IN))
        self.closed_in: int | None = None

    def _look(self) -> tuple[Any, dict[str, Any]]:
        seen = self.observation_space.sample()
        return seen, {"taken": self.taken, "mean": np.full(2, self.taken), "in": {"room": "blue"}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        self.taken = (options or {}).get("taken", 0)
        return self._look()

    def step(self, action):
        assert action in self.action_space, action
        self.taken += 1
        seen, info = self._look()
        return seen, 0.5 * self.taken, self.taken == self.steps, False, info

    def render(self):
        if self.render_mode == "ansi":
            return f"a room after {self.taken} steps"
        return np.full((4, 6, 3), self.taken, np.uint8)


class Faulty(gymnasium.Env):
    """A number that can be counted up, and things that go wrong when they are asked for."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, closed: Callable[[], object] = int) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Discrete(1000)
        self.action_space = spaces.Box(-1, 1, (2,))
        self.closed = closed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options:
            raise KeyError("no such room")
        self.number = 0
        return np.int64(0), {}

    def step(self, action):
        if action[0] > 1:
            raise ZeroDivisionError("too far")
        action += 1  # as some do to what they are given
        self.number += 1
        info = {"unsendable": object()} if action[1] > 2 else {}
        return np.int64(self.number), 1.0, False, False, info

    def close(self):
        self.closed()


@contextmanager
def serving(env: Any, transport: str = "zmq", **settings: Any) -> Iterator[EnvServer]:
    """Serve what makes environments, one, or one of gymnasium's by its name."""
    if isinstance(env, str):
        env = functools.partial(gymnasium.make, env)
    with started(EnvServer(env, 0, transport=transport, **settings)) as server:
        yield server


@contextmanager
def remote(server: EnvServer, **settings: Any) -> Iterator[gymnasium.Env]:
    """A remote environment, closed at the end."""
    env = gymnasium.make("edgeml/Remote-v0", url=server.url, **settings)
    try:
        yield env
    finally:
        env.close()
