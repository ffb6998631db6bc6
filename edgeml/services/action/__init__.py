"""Action: the edge device is the server. It offers observations and takes actions."""

from edgeml.services.action.client import ActionClient
from edgeml.services.action.config import ActionConfig
from edgeml.services.action.lease import Lease
from edgeml.services.action.record import Executed
from edgeml.services.action.recording import Recording
from edgeml.services.action.server import ActionServer
from edgeml.services.action.stamps import Observation

__all__ = [
    "ActionClient",
    "ActionConfig",
    "ActionServer",
    "Executed",
    "Lease",
    "Observation",
    "Recording",
]
