"""Servers placed, started anew and found by Ray, while calls go by edgeml's own transports.

::

    def make() -> InferenceServer:
        server = InferenceServer(0)
        server.register_interface("act", Policy().act)
        return server

    edgeml.ray.deploy(make, name="policy", replicas=4, num_gpus=1)

    client = InferenceClient(url="ray://policy")            # within Ray
    client = InferenceClient(url="ray://head:5550/policy")  # anywhere; needs no Ray

Importing this imports no Ray; its functions do.
"""

from __future__ import annotations

from edgeml.ray.deployment import Autoscale, Failure, ReplicaStatus, Status
from edgeml.ray.operations import delete, deploy, scale, start, status, stop

__all__ = [
    "deploy",
    "scale",
    "status",
    "delete",
    "start",
    "stop",
    "Autoscale",
    "Status",
    "ReplicaStatus",
    "Failure",
]
