"""What robots see in these tests, and what the policy makes of it. It knows no edgeml."""

import numpy as np

FAILING = "break the arm"
"""The task at which the policy raises."""


def observe(number):
    """Two cameras of 224 x 224 and seven joints, of the number's own."""
    rng = np.random.default_rng(number)
    front, wrist = rng.integers(0, 256, (2, 224, 224, 3), np.uint8)
    return front, wrist, rng.random(7)


def act(front, wrist, state):
    """The chunk of actions, which depends on all that was seen."""
    brightness = [front.mean(dtype=np.float64), wrist.mean(dtype=np.float64)]
    chunk = np.arange(1, 11)[:, None] * state + np.resize(brightness, 7)
    return chunk.astype(np.float32)


def check(actions, seen):
    expected = act(*seen)
    assert actions.dtype == expected.dtype, actions.dtype
    assert np.array_equal(actions, expected), actions
