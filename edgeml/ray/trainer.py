"""What programs ask of a learner in shards: to deploy one, and to learn from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeml.ray import cluster
from edgeml.ray.deployment import Status, check_name
from edgeml.ray.operations import status, submit
from edgeml.ray.relay import publish
from edgeml.ray.sharding import TrainerSpec
from edgeml.ray.shards import Saving
from edgeml.services import ShardedLearner, TrainerConfig, TrainerServer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgeml.services.base import ClientSettings

__all__ = ["Learner", "deploy_trainer", "learner"]

_MOST_SHARDS = 1 << 10


def deploy_trainer(
    factory: Callable[[], TrainerServer],
    *,
    name: str,
    shards: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    credentials: str | os.PathLike[str] | None = None,
    note: str = "",
    timeout: float = 600.0,
) -> Status:
    """Run a learner's stores in several of Ray's actors, and wait until all of them are ready.

    ::

        def make() -> TrainerServer:
            server = TrainerServer(CONFIG)  # on port 0
            server.register_data_store("robot", ReplayBuffer(100_000, example=item))
            return server

        edgeml.ray.deploy_trainer(make, name="learner", shards=4, checkpoint_dir="/shared/run7")

        actor = TrainerClient("robot", url="ray://learner", config=CONFIG, data_store=seen)
        with edgeml.ray.learner("learner", "robot", CONFIG) as learner:
            batch = learner.sample(256)
            learner.publish_network(weights)

    Each actor is led to one shard, for ever the same, by its client id: give it a ``client_id``, or
    a ``log``, so that it keeps its shard when it is started anew with what it had. A shard that
    dies is started anew by Ray and goes on from its checkpoint; its actors wait for it, and send
    again what was not saved, so that nothing is lost or doubled.

    Args:
        factory: makes a `TrainerServer` that isn't started, on a port that the system picks:
            ``TrainerServer(TrainerConfig(0, None))``. It is called in each actor. Listen at
            ``host="0.0.0.0"`` for clients on other nodes, which are told the node's address.
        name: what clients ask for; see `deploy`.
        shards: how many.
        checkpoint_dir: a folder for their checkpoints, ``shard-0`` and so on, which every node
            reaches on which a shard may run; None to save nothing: then a shard that dies begins
            anew, and its actors send again all that their stores hold. Shards that find checkpoints
            there go on from them, as long as there are as many of them as there were.
        checkpoint_every: seconds from one checkpoint to the next; actors hold what came since.
        num_cpus, num_gpus, resources: for each shard, as for `deploy`.
        credentials: the folder of a server's keys, on each node, that the relays of weights ask
            clients for; ``$EDGEML_CREDENTIALS`` there by default. The shards' are the factory's.
        note: an opaque text, for `status` to give back.
        timeout: seconds.

    Returns:
        What it is at.

    Raises:
        RemoteError: the factory raised, or a checkpoint can't be loaded; it carries the traceback.
        DeadlineExceeded: not all were ready in time; the text says what each is at.
        ValueError: an argument can't be; or the name is deployed: its items would have to move.
        ImportError: Ray is not installed.
    """
    check_name(name)
    if not callable(factory) or isinstance(factory, TrainerServer):
        raise TypeError(f"factory is a function that makes a TrainerServer, not {factory!r}")
    if not 1 <= shards <= _MOST_SHARDS:
        raise ValueError(f"shards are from 1 to {_MOST_SHARDS}, not {shards}")
    if not checkpoint_every > 0:
        raise ValueError(f"checkpoint_every must be positive, not {checkpoint_every}")
    cluster.connect(start=True)
    payload = cluster.Payload.make(factory)
    options = payload.options(num_cpus, num_gpus, resources)
    saving = None
    if checkpoint_dir is not None:
        saving = Saving(os.path.abspath(os.fspath(checkpoint_dir)), float(checkpoint_every), shards)
    spec = TrainerSpec(
        name,
        note,
        shards=shards,
        saving=saving,
        options=options,
        credentials=None if credentials is None else os.path.abspath(os.fspath(credentials)),
        until=time.time() + timeout,
    )
    return submit(spec, timeout, cluster.pickle(payload), f"factory/{name}")


def learner(
    name: str, store: str, config: TrainerConfig, **settings: Unpack[ClientSettings]
) -> Learner:
    """Return the learner's end of a trainer that is deployed, within Ray.

    Args:
        name: as it was deployed.
        store: the name of the shards' store, from which it draws.
        config: the shards' `TrainerConfig`.
        settings: see `ShardedLearner`.

    Raises:
        UnknownInterface: there is no such deployment.
        ValueError: it is one of servers.
    """
    now = status(name)
    if now.kind != TrainerSpec.kind:
        raise ValueError(f"{name!r} is a deployment of {now.kind}, not of a trainer")
    urls = [f"ray://{name}/{number}" for number in range(now.wanted)]
    return Learner(name, store, urls, config, **settings)


class Learner(ShardedLearner):
    """A `ShardedLearner` of a trainer in Ray, which publishes weights to all nodes, too."""

    def __init__(
        self,
        name: str,
        store: str,
        urls: Sequence[str],
        config: TrainerConfig,
        **settings: Any,
    ) -> None:
        super().__init__(store, urls, config, **settings)
        self._name = name

    def publish_network(self, params: Any) -> int:
        """Send weights to every client, those that connect later included.

        They go into Ray's object store, from there once to each node that has clients, and there by
        a stream as `TrainerServer.publish_network` has it, over shared memory. Never waits for a
        client: one that is behind skips to the newest. The weights may be changed as soon as this
        returns.

        Returns:
            The number of this publication.

        Raises:
            NotEncodable: the weights.
            Unreachable: the trainer has been deleted, or Ray can't be reached.
            Closed: this has been stopped.
        """
        self._check_open()
        return publish(self._name, params)
