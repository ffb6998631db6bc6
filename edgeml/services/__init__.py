"""The three pairs that users call, written once, against `edgeml.core` alone."""

from edgeml.services.action import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Executed,
    Lease,
    Observation,
    Recording,
)
from edgeml.services.batching import Batching
from edgeml.services.contract import Feature, PolicyContract
from edgeml.services.functions import Context
from edgeml.services.inference import InferenceClient, InferenceServer
from edgeml.services.trainer import (
    Delivered,
    ShardedLearner,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
)

__all__ = [
    "ActionClient",
    "ActionConfig",
    "ActionServer",
    "Batching",
    "Context",
    "Delivered",
    "Executed",
    "Feature",
    "InferenceClient",
    "InferenceServer",
    "Lease",
    "Observation",
    "PolicyContract",
    "Recording",
    "ShardedLearner",
    "TrainerClient",
    "TrainerConfig",
    "TrainerServer",
    "TrainerTunnel",
]
