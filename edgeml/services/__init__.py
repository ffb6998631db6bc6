"""The three pairs that users call, written once, against `edgeml.core` alone."""

from edgeml.services.action import ActionClient, ActionConfig, ActionServer
from edgeml.services.inference import InferenceClient, InferenceServer
from edgeml.services.trainer import TrainerClient, TrainerConfig, TrainerServer, TrainerTunnel

__all__ = [
    "ActionClient",
    "ActionConfig",
    "ActionServer",
    "InferenceClient",
    "InferenceServer",
    "TrainerClient",
    "TrainerConfig",
    "TrainerServer",
    "TrainerTunnel",
]
