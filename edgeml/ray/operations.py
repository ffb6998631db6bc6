"""What programs ask of deployments."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from edgeml.core.deadline import Deadline
from edgeml.core.errors import DeadlineExceeded, RemoteError, UnknownInterface, text_of
from edgeml.core.url import DEFAULT_TRANSPORT, Url
from edgeml.extras import load_ray
from edgeml.ray import cluster
from edgeml.ray.controller import Controller
from edgeml.ray.deployment import Autoscale, Spec, Status, check_name
from edgeml.ray.names import DEFAULT_PORT
from edgeml.ray.servers import ServersSpec
from edgeml.services.base import ServiceServer

__all__ = ["delete", "deploy", "scale", "start", "status", "stop", "submit"]

T = TypeVar("T")

_LOOK = 0.1  # seconds between two looks at what a deployment is at
_ANSWER = 30.0  # seconds that the controller is given for an answer, a start of it anew included
_NAMES = f"127.0.0.1:{DEFAULT_PORT}"


def start(names: str | None = None, credentials: str | os.PathLike[str] | None = None) -> str:
    """Start the controller and its name service, if they aren't there; `deploy` does so by itself.

    They run on the head node, in an actor that outlives this program wherever Ray does.

    Args:
        names: where the name service listens, ``"HOST:PORT"``; by default ``$EDGEML_RAY_NAMES``,
            and else ``"127.0.0.1:5550"``, which only this machine reaches. In place of port 0 the
            system picks one, which it keeps.
        credentials: the folder of a server's keys, on the head node, that the name service asks
            clients for; ``$EDGEML_CREDENTIALS`` there by default. See ``docs/security.md``.

    Returns:
        Where the name service is, HOST:PORT, for ``url="ray://HOST:PORT/NAME"``.

    Raises:
        OSError: the port is taken.
        ValueError: that is no address.
        ImportError: Ray is not installed.
    """
    return _begin(names, credentials)[1]


def deploy(
    factory: Callable[[], ServiceServer],
    *,
    name: str,
    replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    autoscale: Autoscale | None = None,
    note: str = "",
    timeout: float = 600.0,
) -> Status:
    """Run servers in Ray, and wait until all of them are ready.

    Each is an actor of Ray's that outlives this program and is started anew when it dies. Where
    there is no Ray one is started, which ends with this program, and all deployed there with it.

    A name that is deployed is replaced, and no call is lost: new servers are ready before clients
    are told of them, and each takes the place of an old one, which answers what it has. Where the
    new ones can't be started the old ones stay.

    Args:
        factory: makes a server that isn't started, on a port that the system picks:
            ``InferenceServer(0)``. It is called in each actor. Listen at ``host="0.0.0.0"`` for
            clients on other nodes, which are told the node's address.
        name: what clients ask for: ``InferenceClient(url="ray://name")``. Small letters, digits,
            ``-``, ``_`` and ``.``.
        replicas: how many servers.
        num_cpus: cores that Ray sets aside for each.
        num_gpus: GPUs, or parts of one, that each has for itself.
        resources: others of Ray's, by name.
        autoscale: have there be more or fewer by how many calls wait.
        note: an opaque text, for `status` to give back.
        timeout: seconds.

    Returns:
        What it is at.

    Raises:
        RemoteError: the factory raised; it carries the traceback.
        DeadlineExceeded: not all were ready in time, as where Ray has no room for them; the text
            says what each is at.
        ValueError: an argument can't be.
        ImportError: Ray is not installed.
    """
    check_name(name)
    if not callable(factory):
        raise TypeError(f"factory is a function that makes a server, not {factory!r}")
    if isinstance(factory, ServiceServer):
        raise TypeError("factory is a function that makes a server, not a server")
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, not {replicas}")
    cluster.connect(start=True)
    payload = cluster.Payload.make(factory)
    options = payload.options(num_cpus, num_gpus, resources)
    spec = ServersSpec(
        name,
        note,
        replicas=replicas if autoscale is None else max(replicas, autoscale.least),
        autoscale=autoscale,
        options=options,
        timeout=timeout,
    )
    return submit(spec, timeout, cluster.pickle(payload), f"factory/{name}")


def submit(spec: Spec, timeout: float, payload: bytes | None = None, key: str = "") -> Status:
    """Hand a spec to the controller, and wait until what it says is there; see `deploy`.

    Args:
        spec: of a deployment.
        timeout: seconds.
        payload: bytes to be kept beside it, under ``key``, a slash and the version.
        key: see there.
    """
    deadline = Deadline(timeout + _ANSWER)  # the controller gives up first, and knows why
    controller, _ = _begin()
    version = _call(controller.deploy, cluster.pickle(spec), payload, key)
    while True:
        now: Status = _call(controller.status, spec.name)
        if now.version >= version and now.state == "ready":
            return now
        if now.failure is not None and now.state != "replacing":
            failure = now.failure
            if failure.type_name:
                raise RemoteError(failure.type_name, failure.text, failure.traceback)
            raise DeadlineExceeded(f"{spec.name!r} could not be deployed: {failure}")
        if not deadline.left:
            raise DeadlineExceeded(f"{spec.name!r} is still {now.state} after {timeout:g} s")
        time.sleep(_LOOK)


def scale(name: str, n: int) -> Status:
    """Have a deployment have so many servers from now on; returns at once.

    Those that are too many leave the list, answer what they have, and are ended.

    Raises:
        UnknownInterface: there is no such deployment.
        ValueError: ``n`` is less than 1, or the deployment scales by itself.
    """
    if n < 1:
        raise ValueError(f"a deployment has at least 1 replica, not {n}; delete() ends it")
    now: Status = _call(_existing(name).scale, name, n)
    return now


@overload
def status(name: None = None) -> dict[str, Status]: ...


@overload
def status(name: str) -> Status: ...


def status(name: str | None = None) -> Status | dict[str, Status]:
    """Return what a deployment is at, or of all of them, by name.

    Raises:
        UnknownInterface: there is no such deployment.
        Unreachable: there is no Ray.
    """
    if name is not None:
        now: Status = _call(_existing(name).status, name)
        return now
    cluster.connect()
    controller = cluster.find_actor(cluster.CONTROLLER)
    all_of_them: dict[str, Status] = {} if controller is None else _call(controller.statuses)
    return all_of_them


def delete(name: str, timeout: float = 90.0) -> None:
    """End a deployment: its servers answer what they have, and nothing of it is left.

    Args:
        name: which.
        timeout: seconds to wait for that; it goes on afterwards.

    Raises:
        UnknownInterface: there is no such deployment.
        DeadlineExceeded: it has not ended yet.
    """
    deadline = Deadline(timeout)
    controller = _existing(name)
    _call(controller.delete, name)
    while name in _call(controller.statuses):
        if not deadline.left:
            raise DeadlineExceeded(f"{name!r} has not ended within {timeout:g} s; it goes on to")
        time.sleep(_LOOK)


def stop(timeout: float = 90.0) -> None:
    """End all deployments, the controller and the name service; the cluster is as it was before.

    Raises:
        DeadlineExceeded: not all have ended yet.
    """
    ray = cluster.connect()
    controller = cluster.find_actor(cluster.CONTROLLER)
    if controller is None:
        return
    deadline = Deadline(timeout)
    for name in _call(controller.statuses):
        _call(controller.delete, name)
    while left := _call(controller.statuses):
        if not deadline.left:
            raise DeadlineExceeded(f"{', '.join(left)} have not ended within {timeout:g} s")
        time.sleep(_LOOK)
    _call(controller.close)
    ray.kill(controller, no_restart=True)


# ------------------------------------------------------------------------------------------


def _begin(
    names: str | None = None, credentials: str | os.PathLike[str] | None = None
) -> tuple[Any, str]:
    """Return the controller, started if need be, and where its name service is."""
    where = names or os.environ.get("EDGEML_RAY_NAMES") or _NAMES
    Url.parse(f"{DEFAULT_TRANSPORT}://{where}")  # which says what is wrong with it
    if ":" not in where:
        raise ValueError(f"the name service listens at HOST:PORT, not {where!r}")
    ray = cluster.connect(start=True)
    controller = (
        ray.remote(Controller)
        .options(
            name=cluster.CONTROLLER,
            namespace=cluster.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=32,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
        )
        .remote()
    )
    keys = None if credentials is None else os.fspath(credentials)
    return controller, _call(controller.listen, where, keys)


def _existing(name: str) -> Any:
    cluster.connect()
    controller = cluster.find_actor(cluster.CONTROLLER)
    if controller is None:
        raise UnknownInterface(f"there is no deployment {name!r}; nothing is deployed here")
    return controller


def _call(method: Any, *arguments: Any) -> Any:
    """Ask the controller, which may just be being started anew."""
    ray = load_ray()
    errors = ray.exceptions
    deadline = Deadline(_ANSWER)
    while True:
        try:
            return ray.get(method.remote(*arguments), timeout=max(0.1, deadline.left))
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.ActorUnavailableError as error:
            if not deadline.left:
                raise DeadlineExceeded(
                    f"edgeml's controller in Ray is away for {_ANSWER:g} s: {text_of(error)}"
                ) from error
        except errors.GetTimeoutError as error:
            raise DeadlineExceeded(
                f"edgeml's controller in Ray gives no answer for {_ANSWER:g} s"
            ) from error
        time.sleep(_LOOK)
