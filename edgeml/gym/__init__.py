"""Gymnasium environments that run on another machine.

A server runs the environment, and a client steps it as if it were its own::

    server = EnvServer(functools.partial(gymnasium.make, "CartPole-v1"), 5556)
    env = gymnasium.make("edgeml/Remote-v0", url="zmq://127.0.0.1:5556")

Importing this registers ``edgeml/Remote-v0``; ``gymnasium.make("edgeml.gym:edgeml/Remote-v0")``
imports it by itself.
"""

from __future__ import annotations

try:
    import gymnasium  # noqa: F401 - to say what to do where it is missing
except ImportError as error:
    raise ImportError(
        'remote environments need gymnasium: pip install "edgeml-robotics[gym]"'
    ) from error

from edgeml.gym.env import RemoteEnv, register
from edgeml.gym.server import EnvServer
from edgeml.gym.spaces import space_from_plain, space_to_plain
from edgeml.gym.vector import RemoteVectorEnv

__all__ = [
    "EnvServer",
    "RemoteEnv",
    "RemoteVectorEnv",
    "space_from_plain",
    "space_to_plain",
]

register()
