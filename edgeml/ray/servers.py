"""Equal servers: as many as are wanted, of the newest version, none lost in between."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgeml.core.resolver import Place
from edgeml.extras import load_ray
from edgeml.ray import cluster
from edgeml.ray.deployment import (
    Ask,
    Autoscale,
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
from edgeml.ray.replica import Replica, factory_key, starts_key
from edgeml.ray.scaling import Scaling

__all__ = ["Servers", "ServersSpec"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServersSpec(Spec):
    """What equal servers are made of.

    Attributes:
        replicas: how many are wanted.
        autoscale: the bounds, if they scale by themselves.
        options: what Ray is asked for each replica.
        timeout: seconds in which the version has to be ready.
        until: when these are over, by the controller's `time.time`.
        settled: whether it was, at one time; what fails since is started anew, for ever.
        before: the spec that it replaces, and falls back to.
        failure: why the version after this one could not be started.
    """

    kind = "servers"
    replicas: int = 1
    autoscale: Autoscale | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = math.inf
    until: float = 0.0
    settled: bool = False
    before: ServersSpec | None = None
    failure: Failure | None = None

    def open(self, host: Host) -> Servers:
        """See `Spec.open`."""
        return Servers(self._begun(), host)

    def _begun(self) -> ServersSpec:
        return self if self.until else replace(self, until=time.time() + self.timeout)


class Servers(Deployment):
    """Equal servers in Ray's actors, behind one name."""

    def __init__(self, spec: ServersSpec, host: Host) -> None:
        self._ray = load_ray()
        self._host = host
        self._lock = threading.RLock()  # of the spec and the members
        self._spec = spec
        self._members: list[Member] = []
        self._listed: list[Place] = []
        self._scaling: Scaling | None = None
        self._pause = FIRST_PAUSE
        self._again = 0.0  # when one may be started in place of one that failed
        for name in cluster.list_actors():
            self._adopt(name)
        ask_all(
            self._members, self._lock, FIRST_ANSWER
        )  # so that clients are told of no less than there is
        self._list()

    def _adopt(self, name: str) -> None:
        deployment, _, mine = name.partition("#")
        version = mine.partition(".")[0]
        if deployment == self._spec.name and version.isdecimal():
            actor = cluster.find_actor(name)
            if actor is not None:
                self._members.append(Member(mine, name, actor, int(version)))

    # What the controller asks -------------------------------------------------------------

    def replace(self, spec: Spec) -> None:
        """See `Deployment.replace`."""
        assert isinstance(spec, ServersSpec)
        with self._lock:
            # What was never ready is nothing to fall back to.
            now = self._spec
            before = now if now.settled else now.before
            if before is not None:
                before = replace(before, failure=None)
            if spec.autoscale is not None and before is not None:
                spec = replace(spec, replicas=spec.autoscale.within(now.replicas))
            self._keep(replace(spec._begun(), before=before))

    def scale(self, n: int) -> None:
        """See `Deployment.scale`."""
        with self._lock:
            if self._spec.autoscale is not None:
                bounds = self._spec.autoscale
                raise ValueError(
                    f"{self._spec.name!r} scales by itself, from {bounds.least} to {bounds.most}: "
                    "deploy it without autoscale= to say how many"
                )
            before = self._spec.before
            if before is not None:
                before = replace(before, replicas=n)
            self._keep(replace(self._spec, replicas=n, before=before))

    def places(self, ask: Ask) -> Sequence[Place]:
        """See `Deployment.places`."""
        return self._listed

    def status(self) -> Status:
        """See `Deployment.status`."""
        with self._lock:
            spec, members = self._spec, self._in_order()
            ready = sum(member.ready for member in members)
            state: State = "ready"
            version = spec.version
            if not spec.settled:
                state = "starting"
                if spec.failure is not None:
                    state = "failed"
                elif spec.before is not None:
                    state, version = "replacing", spec.before.version
            return Status(
                name=spec.name,
                kind=spec.kind,
                state=state,
                wanted=spec.replicas,
                ready=ready,
                version=version,
                replicas=tuple(member.tell() for member in members),
                autoscale=spec.autoscale,
                failure=spec.failure,
                note=spec.note,
            )

    # What the controller's thread does ----------------------------------------------------

    def step(self) -> None:
        """See `Deployment.step`."""
        ask_all(self._members, self._lock)
        with self._lock:
            if not self._is_failed():
                self._look_for_failures()
            if not self._is_failed():
                self._autoscale()
                self._fit()
            self._list()
            self._dismiss()

    def end(self) -> None:
        """See `Deployment.end`."""
        with self._lock:
            for member in self._members:
                member.begin_leaving()
            self._list()
        until = time.monotonic() + GOING
        while self._members and time.monotonic() < until:
            ask_all(self._members, self._lock)
            with self._lock:
                self._dismiss()
        for member in self._members:
            self._kill(member)
        for key in cluster.keys(f"factory/{self._spec.name}/"):
            cluster.drop(key)

    def _in_order(self) -> list[Member]:
        """All of them, in an order that another controller would find them in too."""
        return sorted(self._members, key=lambda member: (member.version, member.id))

    def _keep(self, spec: ServersSpec) -> None:
        self._spec = spec
        self._host.keep(spec)

    def _is_failed(self) -> bool:
        return not self._spec.settled and self._spec.failure is not None

    def _look_for_failures(self) -> None:
        spec = self._spec
        failed = [m for m in self._members if m.failure is not None and not m.leaving]
        for member in failed:
            if member.version == spec.version and not spec.settled:
                assert member.failure is not None
                self._give_up(member.failure)
                return
            # It was ready once, so it may be again: when the disk has room, a GPU is free.
            _log.warning(
                "%s#%s failed, and another is started in %.0f s: %s",
                spec.name,
                member.id,
                self._pause,
                member.failure,
            )
            self._remove(member)
            self._again = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not spec.settled and time.time() > spec.until:
            self._give_up(Failure("", self._explain_late()))

    def _explain_late(self) -> str:
        spec = self._spec
        mine = [m for m in self._members if m.version == spec.version and not m.leaving]
        parts = [
            f"{m.id} is {m.at}" + (f" ({m.told.detail})" if m.told and m.told.detail else "")
            for m in mine
            if not m.ready
        ]
        text = f"not ready in time: {', '.join(parts) or 'none has been started'}"
        if not any(m.told is None for m in mine):
            return text
        asked = {"CPU": spec.options.get("num_cpus", 0), "GPU": spec.options.get("num_gpus", 0)}
        asked.update(spec.options.get("resources") or {})
        left = self._ray.available_resources()
        if all(left.get(key, 0) >= value for key, value in asked.items()):
            return f"{text}; the factory has not returned"
        return (
            f"{text}; each is to have {_plain(asked)}, and of that the nodes have {_plain(left)} "
            f"left of {_plain(self._ray.cluster_resources())}"
        )

    def _give_up(self, failure: Failure) -> None:
        """Go on with what there was before, or with nothing."""
        spec = self._spec
        _log.error("version %d of %s failed: %s", spec.version, spec.name, failure)
        if spec.before is None:
            self._keep(replace(spec, failure=failure))
        else:
            # The number is used up: two versions are not to have one name.
            self._keep(replace(spec.before, failure=failure))
        for member in list(self._members):
            if member.version == spec.version and not member.leaving:
                if member.ready:
                    member.begin_leaving()
                else:
                    self._remove(member)
        cluster.drop(factory_key(spec.name, spec.version))

    def _autoscale(self) -> None:
        spec = self._spec
        if spec.autoscale is None or not spec.settled:
            return
        if self._scaling is None or self._scaling.bounds != spec.autoscale:
            self._scaling = Scaling(spec.autoscale)
        ready = [m for m in self._members if m.ready and m.told is not None]
        wanted = self._scaling.decide(
            spec.replicas,
            len(ready),
            sum(m.told.waiting for m in ready if m.told is not None),
            sum(m.told.running for m in ready if m.told is not None),
            time.monotonic(),
        )
        if wanted != spec.replicas:
            _log.info("%s: %d replicas in place of %d", spec.name, wanted, spec.replicas)
            self._keep(replace(spec, replicas=wanted))

    def _fit(self) -> None:
        """Start what is missing, and have leave what is too many."""
        spec = self._spec
        members = [m for m in self._members if not m.leaving]
        new = [m for m in members if m.version == spec.version]
        old = [m for m in members if m.version != spec.version]
        if len(new) < spec.replicas and time.monotonic() >= self._again:
            for _ in range(spec.replicas - len(new)):
                self._start()
        # The last to come are the first to go, and before them those that answer nobody yet.
        new.sort(key=lambda m: m.ready, reverse=True)
        for member in new[spec.replicas :]:
            member.begin_leaving()
        ready = sum(m.ready for m in new[: spec.replicas])
        # Each new one that is ready takes the place of an old one, which makes room for the next.
        there = spec.replicas if spec.before is None else spec.before.replicas
        stay_on = 0 if spec.settled or ready == spec.replicas else max(0, there - ready)
        old.sort(key=lambda m: m.ready, reverse=True)
        for member in old[stay_on:]:
            member.begin_leaving()
        if ready == spec.replicas:
            self._pause = FIRST_PAUSE
            if not spec.settled:
                self._keep(replace(spec, settled=True, before=None))
                for key in cluster.keys(f"factory/{spec.name}/"):
                    if key != factory_key(spec.name, spec.version):
                        cluster.drop(key)

    def _start(self) -> None:
        spec = self._spec
        mine = f"{spec.version}.{secrets.token_hex(3)}"
        name = f"{spec.name}#{mine}"
        actor = (
            self._ray.remote(Replica)
            .options(
                name=name,
                namespace=cluster.NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=4,
                **spec.options,
            )
            .remote(spec.name, spec.version, mine)
        )
        self._members.append(Member(mine, name, actor, spec.version))

    def _list(self) -> None:
        """Tell clients of those that are ready, if these are others than before."""
        listed = [Place(m.told.url) for m in self._in_order() if m.ready and m.told is not None]
        if listed != self._listed:
            self._listed = listed
            self._host.changed()

    def _dismiss(self) -> None:
        """See those off that leave; they are off the list by now."""
        for member in list(self._members):
            if not member.leaving:
                continue
            told = member.told
            if told is None or member.lost or member.gone or told.state in ("left", "failed"):
                self._remove(member)  # nobody is there, or nobody any more
            elif told.state != "leaving":
                member.actor.leave.remote()
            if time.monotonic() > member.leaving + GOING:
                self._remove(member)

    def _remove(self, member: Member) -> None:
        if member in self._members:
            self._members.remove(member)
            self._kill(member)

    def _kill(self, member: Member) -> None:
        member.kill()
        cluster.drop(starts_key(self._spec.name, member.id))


def _plain(resources: Mapping[str, float]) -> str:
    known = [f"{resources[key]:g} {key}" for key in ("CPU", "GPU") if resources.get(key)]
    others = [
        f"{value:g} {key}"
        for key, value in sorted(resources.items())
        if key not in ("CPU", "GPU", "memory", "object_store_memory") and ":" not in key
    ]
    return ", ".join(known + others) or "nothing"
