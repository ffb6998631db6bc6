"""Trainer: the learner is the server. Actors send it what they see and get new weights.

Delivery. Every item that an actor uploads is known by who sends it (client id and incarnation),
the store, and its number there. The server keeps one high-water mark for each (`ledger`): what is
at or under it is there already and dropped, a gap is refused and answered with the mark, from which
the client then goes on (`uploader`). So an update that is repeated, because its answer was lost,
adds nothing twice. This is Kafka's idempotent producer (KIP-98).

An incarnation is one `TrainerClient` object. Of those with the same explicit client id, the one
that the server saw last shuts the others out; no clock has a say, for a robot's may be reset.
"""

from edgeml.services.trainer.client import TrainerClient
from edgeml.services.trainer.config import TrainerConfig
from edgeml.services.trainer.server import TrainerServer
from edgeml.services.trainer.sharded import ShardedLearner
from edgeml.services.trainer.tunnel import TrainerTunnel
from edgeml.services.trainer.uploader import Delivered

__all__ = [
    "Delivered",
    "ShardedLearner",
    "TrainerClient",
    "TrainerConfig",
    "TrainerServer",
    "TrainerTunnel",
]
