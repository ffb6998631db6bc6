"""Servers placed, started anew and found by Ray, while calls go by edgeml's own transports.

::

    def make() -> InferenceServer:
        server = InferenceServer(0)
        server.register_interface("act", Policy().act)
        return server

    edgeml.ray.deploy(make, name="policy", replicas=4, num_gpus=1)

    client = InferenceClient(url="ray://policy")            # within Ray
    client = InferenceClient(url="ray://head:5550/policy")  # anywhere; needs no Ray

A learner's stores are deployed in shards by `deploy_trainer`, and `learner` learns from them.

Importing this imports no Ray; its functions do.
"""

from __future__ import annotations

from edgeml.ray.deployment import Autoscale, Failure, ReplicaStatus, Status
from edgeml.ray.operations import delete, deploy, scale, start, status, stop
from edgeml.ray.trainer import Learner, deploy_trainer, learner

__all__ = [
    "deploy",
    "deploy_trainer",
    "learner",
    "Learner",
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
