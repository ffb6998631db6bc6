"""What users keep: stores that actors fill and learners read, and the pace between them."""

from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.limiter import RateLimiter
from edgeml.data.queued import QueuedDataStore
from edgeml.data.replay import ReplayBuffer, ReplayBufferDataStore

__all__ = [
    "DataStoreBase",
    "Batch",
    "QueuedDataStore",
    "ReplayBuffer",
    "ReplayBufferDataStore",
    "RateLimiter",
]
