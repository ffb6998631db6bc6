"""A control loop, a device that judges by itself, and a human who takes over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeml import ActionClient, ActionConfig, ActionServer, Stale
from edgeml.control import ChunkedPolicy
from pairs import TRANSPORTS, started, wait_until

RATE = 50


class Robot:
    """An arm that goes where it is told to; it begins at 0, and a human puts it to 100."""

    def __init__(self) -> None:
        self.angle = 0.0
        self.moves: list[float] = []

    def observe(self, keys: Any) -> Any:
        return {"angle": self.angle}

    def act(self, key: str, action: Any) -> None:
        self.angle = float(action)
        self.moves.append(self.angle)


def config_of(transport: str) -> ActionConfig:
    return ActionConfig(0, ["arm"], ["angle"], transport=transport, action_rate=RATE)


def policy(seen: Any) -> Any:
    """Move on from where the robot is seen to be."""
    return seen["angle"] + 0.01 * np.arange(1, 51)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_human_takes_over_and_the_policy_goes_on_from_what_it_then_sees(transport: str) -> None:
    robot = Robot()
    config = config_of(transport)
    with (
        started(ActionServer(config, robot.observe, robot.act)) as device,
        ActionClient(config=config, url=device.url) as client,
        ActionClient(config=config, url=device.url) as human,
        client.lease("arm") as lease,
        ChunkedPolicy(policy, rate=RATE, lease=lease) as steps,
    ):

        def step() -> str:
            values, taken = client.observe()
            action = steps.step(values, observation_id=taken)
            if steps.latest.source == "chunk":
                client.act("arm", action, observation=steps.latest.observation_id)
            return steps.latest.source

        wait_until(lambda: step() == "chunk")
        wait_until(lambda: step() and len(robot.moves) > 5)
        with human.lease("arm", priority=1):
            wait_until(lambda: not lease.held)
            before = len(robot.moves)
            assert step() == "taken"
            human.act("arm", 100.0)
            for _ in range(5):
                assert step() == "taken"
            assert robot.moves[before:] == [100.0]
        wait_until(lambda: step() == "chunk")
        assert robot.moves[before + 1] == pytest.approx(100.01)


def test_a_held_action_is_refused_by_the_device_once_it_is_too_old() -> None:
    robot = Robot()
    config = config_of("inproc")
    chunks = iter([np.array([1.0, 2.0])])
    with (
        started(ActionServer(config, robot.observe, robot.act)) as device,
        ActionClient(config=config, url=device.url) as client,
        ChunkedPolicy(lambda seen: next(chunks), rate=RATE) as steps,  # fails from then on
    ):

        def is_refused() -> bool:
            values, taken = client.observe()
            action = steps.step(values, observation_id=taken)
            if action is None:
                return False
            try:
                client.act("arm", action, observation=steps.latest.observation_id, valid=0.3)
            except Stale:
                return True
            return False

        wait_until(is_refused)
        assert steps.latest.source == "hold"
        assert steps.latest.age >= 0.3 - 0.02  # the observation was taken a little earlier
        count = len(robot.moves)
        assert robot.moves == [1, *[2] * (count - 1)]
        assert is_refused()
        assert len(robot.moves) == count
