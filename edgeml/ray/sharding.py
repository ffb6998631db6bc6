"""Shards and relays: what a trainer that is deployed consists of, kept by the controller.

An actor's items belong to one shard, which is found by a hash of its client id and nothing else:
the shard's ledger knows what of them it has. So there is a fixed number of shards, each with its
own checkpoint; one that dies is started anew from that, and its actors wait for it and send again
what was not saved, as they do with any learner.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from edgeml.core.resolver import Place
from edgeml.core.url import Url, is_loopback
from edgeml.extras import load_ray
from edgeml.ray import cluster
from edgeml.ray.deployment import (
    Ask,
    Deployment,
    Failure,
    Host,
    Spec,
    State,
    Status,
)
from edgeml.ray.members import (
    FIRST_ANSWER,
    FIRST_PAUSE,
    GOING,
    LONGEST_PAUSE,
    Member,
    ask_all,
)
from edgeml.ray.relay import Board, Relay, board_name
from edgeml.ray.replica import Description
from edgeml.ray.shards import Saving, Shard, ShardDescription
from edgeml.services import TrainerConfig
from edgeml.services.trainer.sharded import shard_of

__all__ = ["Trainer", "TrainerSpec"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerSpec(Spec):
    """What a trainer in shards is made of.

    Attributes:
        shards: how many there are.
        saving: where they are saved; None for nowhere.
        options: what Ray is asked for each.
        credentials: see `deploy_trainer`.
        until: when all have to be ready, by the clock `time.time`.
        settled: whether they were, at one time; what fails since is started anew, for ever.
        failure: why they could not be started.
    """

    kind: ClassVar[str] = "trainer"
    shards: int = 1
    saving: Saving | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    credentials: str | None = None
    until: float = 0.0
    settled: bool = False
    failure: Failure | None = None

    def open(self, host: Host) -> Trainer:
        """See `Spec.open`."""
        return Trainer(self, host)


class Trainer(Deployment):
    """Shards and relays in Ray's actors, behind one name."""

    def __init__(self, spec: TrainerSpec, host: Host) -> None:
        self._ray = load_ray()
        self._host = host
        self._lock = threading.RLock()
        self._spec = spec
        self._shards: dict[int, Member] = {}
        self._relays: dict[str, Member] = {}  # by node
        # Of what failed, by its id: how long it is left alone the next time, and until when.
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._wanted: set[str] = set()  # nodes that are to have a relay
        self._nodes: dict[str, str] = {}  # that there are, and their addresses
        self._listed: object = None
        for each in cluster.list_actors():
            self._adopt(each)
        ask_all(
            self._members(), self._lock, FIRST_ANSWER
        )  # so that clients are told of no less than there is

    def _adopt(self, actor_name: str) -> None:
        name, _, mine = actor_name.partition("/")
        kind, _, which = mine.partition("-")
        if name != self._spec.name or kind not in ("shard", "relay"):
            return
        actor = cluster.find_actor(actor_name)
        if actor is None:
            return
        if kind == "shard":
            self._shards[int(which)] = self._member(mine, actor, number=int(which))
        else:
            self._relays[which] = self._member(mine, actor, node=which)

    def _member(self, mine: str, actor: Any, **which: Any) -> Member:
        return Member(mine, f"{self._spec.name}/{mine}", actor, self._spec.version, **which)

    # What the controller asks -------------------------------------------------------------

    def replace(self, spec: Spec) -> None:
        """See `Deployment.replace`: only what could not be started is replaced."""
        assert isinstance(spec, TrainerSpec)
        with self._lock:
            if self._spec.failure is not None:
                self._keep(spec)
                return
        raise ValueError(
            f"{self._spec.name!r} is deployed, and the items in its shards can't be moved: delete "
            "it first, which saves them; the next one goes on from its checkpoints"
        )

    def scale(self, n: int) -> None:
        """See `Deployment.scale`."""
        raise ValueError(
            f"{self._spec.name!r} is a trainer of {self._spec.shards} shards, whose items can't be "
            "moved: it stays with them"
        )

    def places(self, ask: Ask) -> Sequence[Place]:
        """Return an actor's own shard, and the relay of its node; or the shard that is asked for.

        Nothing while that is away: its items belong to no other.
        """
        if ask.service != "trainer":
            return []
        spec = self._spec
        with self._lock:
            if ask.path:
                known = ask.path.isascii() and ask.path.isdecimal() and len(ask.path) < 5
                number = int(ask.path) if known else spec.shards
                shard = self._shards.get(number)
                return self._list(ask, shard, calls=True)
            shard = self._shards.get(shard_of(ask.client_id, spec.shards))
            found = self._list(ask, shard, calls=True)
            node = self._find_node(ask, shard)
            if node:
                self._wanted.add(node)
                found += self._list(ask, self._relays.get(node), calls=False)
            return found

    def _list(self, ask: Ask, member: Member | None, calls: bool) -> list[Place]:
        if member is None or not member.ready or member.told is None:
            return []
        url = _reached(member.told, self._node_of(member), ask)
        return [Place(url, calls=calls, topics=not calls)] if url else []

    def _node_of(self, member: Member) -> str:
        if isinstance(member.told, ShardDescription):
            return member.told.node_id
        return member.node

    def _find_node(self, ask: Ask, shard: Member | None) -> str:
        """Return the node from which a client gets weights: its own, or else its shard's."""
        if ask.node in self._nodes:
            return ask.node
        for node, address in self._nodes.items():
            if address == ask.host:
                return node
        return "" if shard is None else self._node_of(shard)

    def status(self) -> Status:
        """See `Deployment.status`."""
        with self._lock:
            spec = self._spec
            state: State = "ready" if spec.settled else "starting"
            if spec.failure is not None:
                state = "failed"
            shards = sorted(self._shards.items())
            members = [member for _, member in shards] + list(self._relays.values())
            return Status(
                name=spec.name,
                kind=spec.kind,
                state=state,
                wanted=spec.shards,
                ready=sum(member.ready for member in self._shards.values()),
                version=spec.version,
                replicas=tuple(member.tell() for member in members),
                failure=spec.failure,
                note=spec.note,
            )

    # What the controller's thread does ----------------------------------------------------

    def step(self) -> None:
        """See `Deployment.step`."""
        nodes = {
            each["NodeID"]: each["NodeManagerAddress"]
            for each in self._ray.nodes()
            if each["Alive"]
        }
        ask_all(self._members(), self._lock)
        with self._lock:
            self._nodes = nodes
            self._wanted &= nodes.keys()
            for node in self._relays.keys() - nodes.keys():
                self._relays.pop(node).kill()
            if self._spec.failure is None:
                self._look_for_failures()
            if self._spec.failure is not None:
                return
            self._start_missing()
            if not self._spec.settled and self._are_ready():
                self._keep(replace(self._spec, settled=True))
            # What clients are told of, in whatever words each of them is.
            listed = [(m.id, m.ready, m.told and m.told.url) for m in self._members()]
            if listed != self._listed:
                self._listed = listed
                self._host.changed()

    def end(self) -> None:
        """See `Deployment.end`."""
        until = time.monotonic() + GOING
        asked: set[int] = set()
        while self._shards and time.monotonic() < until:
            ask_all(self._members(), self._lock)
            with self._lock:
                for number, member in list(self._shards.items()):
                    told = member.told
                    if member.gone or (told is not None and told.state in ("left", "failed")):
                        self._shards.pop(number).kill()
                    elif told is not None and not member.lost and number not in asked:
                        asked.add(number)
                        member.actor.leave.remote()
        for member in self._members():
            member.kill()
        self._shards, self._relays = {}, {}
        board = cluster.find_actor(board_name(self._spec.name))
        if board is not None:
            self._ray.kill(board, no_restart=True)
        for key in cluster.keys(f"factory/{self._spec.name}/"):
            cluster.drop(key)

    def _keep(self, spec: TrainerSpec) -> None:
        self._spec = spec
        self._host.keep(spec)

    def _members(self) -> list[Member]:
        return [*self._shards.values(), *self._relays.values()]

    def _are_ready(self) -> bool:
        return sum(member.ready for member in self._shards.values()) == self._spec.shards

    def _look_for_failures(self) -> None:
        spec = self._spec
        for member in self._members():
            failure = member.failure
            if failure is None:
                if member.ready:
                    self._pauses.pop(member.id, None)
                continue
            if member.number >= 0 and not spec.settled:
                self._give_up(failure)
                return
            # It was ready once, so it may be again: when the disk has room, the folder is there.
            pause = self._pauses.get(member.id, FIRST_PAUSE)
            self._pauses[member.id] = min(2 * pause, LONGEST_PAUSE)
            self._due[member.id] = time.monotonic() + pause
            text = "%s/%s failed, and is started anew in %.0f s: %s"
            _log.warning(text, spec.name, member.id, pause, failure)
            member.kill()
            if member.number >= 0:
                del self._shards[member.number]
            else:
                del self._relays[member.node]
        if not spec.settled and time.time() > spec.until:
            late = [f"{m.id} is {m.at}" for m in self._shards.values() if not m.ready]
            options = ", ".join(f"{k}={v}" for k, v in spec.options.items() if k != "runtime_env")
            self._give_up(
                Failure(
                    "",
                    f"not ready in time: {', '.join(late) or 'none has been started'}; each is to "
                    f"have {options}, and of all that the nodes have "
                    f"{self._ray.available_resources()} is left",
                )
            )

    def _give_up(self, failure: Failure) -> None:
        _log.error("%s failed: %s", self._spec.name, failure)
        self._keep(replace(self._spec, failure=failure))
        for member in self._members():
            member.kill()
        self._shards, self._relays = {}, {}

    def _start_missing(self) -> None:
        spec = self._spec
        if cluster.find_actor(board_name(spec.name)) is None:
            self._start(Board, "weights", {"num_cpus": 0})
        for number in range(spec.shards):
            mine = f"shard-{number}"
            if number not in self._shards and self._may_start(mine):
                actor = self._start(
                    *(Shard, mine, {**spec.options, "max_concurrency": 4}),
                    *(spec.name, spec.version, number, spec.saving),
                )
                self._shards[number] = self._member(mine, actor, number=number)
        for node in self._wanted - self._relays.keys():
            mine = f"relay-{node}"
            config, host = self._find_config()
            if config is None or not self._may_start(mine):
                continue
            affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            options = {"num_cpus": 0, "scheduling_strategy": affinity(node, soft=False)}
            options["max_concurrency"] = 4
            actor = self._start(
                *(Relay, mine, options), *(spec.name, config, host, spec.credentials)
            )
            self._relays[node] = self._member(mine, actor, node=node)

    def _start(self, kind: type, mine: str, options: Mapping[str, Any], *arguments: Any) -> Any:
        return (
            self._ray.remote(kind)
            .options(
                name=f"{self._spec.name}/{mine}",
                namespace=cluster.NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                get_if_exists=True,
                **options,
            )
            .remote(*arguments)
        )

    def _may_start(self, mine: str) -> bool:
        """Whether it is time to start what failed before."""
        return time.monotonic() >= self._due.get(mine, 0.0)

    def _find_config(self) -> tuple[TrainerConfig | None, str]:
        """Return the shards' configuration, and at which addresses relays listen."""
        for member in self._shards.values():
            told = member.told
            if isinstance(told, ShardDescription) and told.config is not None:
                urls = [Url.parse(each) for each in told.url.split(",")]
                within = all(each.path or is_loopback(each.host) for each in urls)
                return told.config, "127.0.0.1" if within else "0.0.0.0"
        return None, ""


def _reached(told: Description, node: str, ask: Ask) -> str:
    """Return those ways to a server that lead there from where a client is.

    All of them where none does: its error says what to do about that.
    """
    here = ask.node == node if ask.node else is_loopback(ask.host) or ask.host == told.node
    ways = [Url.parse(each) for each in told.url.split(",")]
    beyond = [way for way in ways if not (way.path or is_loopback(way.host))]
    return ",".join(map(str, ways if here or not beyond else beyond))
