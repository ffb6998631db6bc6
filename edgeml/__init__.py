"""edgeml connects machines with little compute to machines with a lot, and processes to each other.

- **Action**: the edge device is the server. `ActionServer`, `ActionClient`, `ActionConfig`.
- **Inference**: the GPU machine is the server. `InferenceServer`, `InferenceClient`.
- **Trainer**: the learner is the server. `TrainerServer`, `TrainerClient`, `TrainerConfig`, and
  `TrainerTunnel` for both in one process.
- `edgeml.control`: a robot's loop around a policy that is far away.
- `edgeml.aio`: the three clients for asyncio.
- `edgeml.data`: the stores that stand at either end of a trainer pair.
- `edgeml.core`: the seam, for those who write transports and codecs.
- `edgeml.testing`: the conformance suites for what they write.

The errors are here too: all of them are `EdgemlError`. Each name is imported when first used, so
that importing this costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgeml import aio, control, core, data, services
    from edgeml.core.client import Timing
    from edgeml.core.errors import (
        Closed,
        ConfigMismatch,
        DeadlineExceeded,
        EdgemlError,
        Malformed,
        NotEncodable,
        NotHolder,
        NotReady,
        Overloaded,
        PermissionDenied,
        PluginError,
        RemoteError,
        Stale,
        UnknownInterface,
        Unreachable,
    )
    from edgeml.core.limits import Limits
    from edgeml.core.security import Credentials
    from edgeml.core.state import ServerState
    from edgeml.core.streams import Subscription
    from edgeml.images import Jpeg, Png
    from edgeml.services import (
        ActionClient,
        ActionConfig,
        ActionServer,
        Batching,
        Context,
        Delivered,
        Executed,
        Feature,
        InferenceClient,
        InferenceServer,
        Lease,
        Observation,
        PolicyContract,
        Recording,
        ShardedLearner,
        TrainerClient,
        TrainerConfig,
        TrainerServer,
        TrainerTunnel,
    )

__all__ = [
    # the three pairs
    "ActionConfig",
    "ActionServer",
    "ActionClient",
    "InferenceServer",
    "InferenceClient",
    "TrainerConfig",
    "TrainerServer",
    "TrainerClient",
    "TrainerTunnel",
    "ShardedLearner",
    "Delivered",
    "Subscription",
    # what a device has seen and done
    "Observation",
    "Executed",
    "Recording",
    "Lease",
    # how a server answers
    "Batching",
    "Context",
    "ServerState",
    "Timing",
    # who may speak, and how much
    "Credentials",
    "Limits",
    # what a policy takes and gives
    "Feature",
    "PolicyContract",
    # how images travel
    "Jpeg",
    "Png",
    # packages
    "aio",
    "control",
    "core",
    "data",
    "services",
    # errors
    "EdgemlError",
    "Unreachable",
    "NotReady",
    "DeadlineExceeded",
    "Stale",
    "Closed",
    "Overloaded",
    "RemoteError",
    "UnknownInterface",
    "Malformed",
    "NotEncodable",
    "ConfigMismatch",
    "PermissionDenied",
    "NotHolder",
    "PluginError",
]

# Of what is neither an error nor one of the pairs.
_HOMES = {
    "Batching": "services",
    "Context": "services",
    "Credentials": "core.security",
    "Delivered": "services",
    "Executed": "services",
    "Feature": "services",
    "Jpeg": "images",
    "Lease": "services",
    "Limits": "core.limits",
    "Observation": "services",
    "Png": "images",
    "PolicyContract": "services",
    "Recording": "services",
    "ServerState": "core.state",
    "ShardedLearner": "services",
    "Subscription": "core.streams",
    "Timing": "core.client",
}

_PACKAGES = ("aio", "control", "core", "data", "services", "testing")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"edgeml.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'edgeml' has no attribute {name!r}")
    pairs = name.startswith(("Action", "Inference", "Trainer"))
    home = _HOMES.get(name, "services" if pairs else "core.errors")
    return getattr(import_module(f"edgeml.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
