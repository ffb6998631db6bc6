"""Action: the edge device is the server. It offers observations and takes actions."""

from edgeml.services.action.client import ActionClient
from edgeml.services.action.config import ActionConfig
from edgeml.services.action.server import ActionServer

__all__ = ["ActionClient", "ActionConfig", "ActionServer"]
