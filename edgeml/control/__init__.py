"""A control loop that never waits for its policy: chunks of actions, played by age and merged.

- `ChunkedPolicy` asks a policy, remote or local, early enough and gives one action at each tick.
- `Blend`, `Ensemble` and `RealTime` are ways to merge a new chunk into what is being played.
- `Ticks` keeps a loop's rate without drift.
"""

from __future__ import annotations

from edgeml.control.merging import Blend, Ensemble, RealTime
from edgeml.control.policy import ChunkedPolicy, Step
from edgeml.control.ticks import Ticks

__all__ = ["Blend", "ChunkedPolicy", "Ensemble", "RealTime", "Step", "Ticks"]
