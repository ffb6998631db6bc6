"""What users keep: stores that actors fill and learners read, and the pace between them."""

from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.limiter import RateLimiter
from edgeml.data.log_writer import Sync
from edgeml.data.logged import LoggedDataStore
from edgeml.data.mixture import Mixture
from edgeml.data.prefetch import Prefetch, on_device
from edgeml.data.prioritized import PrioritizedReplayBuffer
from edgeml.data.queued import QueuedDataStore
from edgeml.data.replay import ReplayBuffer, ReplayBufferDataStore
from edgeml.data.samplers import (
    FutureSampler,
    LatestSampler,
    PrioritySampler,
    Sampler,
    SequenceSampler,
)
from edgeml.data.selectors import PrioritizedSelector, Selector, UniformSelector
from edgeml.data.shapes import DataShape
from edgeml.data.trajectory import TrajectoryBuffer
from edgeml.data.trajectory_store import (
    TrajectoryBufferDataStore,
    make_default_trajectory_buffer,
)
from edgeml.data.transitions import transition_example
from edgeml.data.vector import VectorTransitions

__all__ = [
    "DataStoreBase",
    "Batch",
    "QueuedDataStore",
    "LoggedDataStore",
    "Sync",
    "ReplayBuffer",
    "ReplayBufferDataStore",
    "PrioritizedReplayBuffer",
    "transition_example",
    "VectorTransitions",
    "Selector",
    "UniformSelector",
    "PrioritizedSelector",
    "TrajectoryBuffer",
    "TrajectoryBufferDataStore",
    "make_default_trajectory_buffer",
    "DataShape",
    "Sampler",
    "LatestSampler",
    "SequenceSampler",
    "FutureSampler",
    "PrioritySampler",
    "Mixture",
    "Prefetch",
    "on_device",
    "RateLimiter",
]
