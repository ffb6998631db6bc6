"""What this room asks of Ray: to be connected, actors by name, and a few values kept."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from edgeml.core.deadline import Deadline
from edgeml.core.errors import Unreachable, text_of
from edgeml.extras import load_ray

__all__ = [
    "CONTROLLER",
    "NAMESPACE",
    "Payload",
    "connect",
    "drop",
    "find_actor",
    "get",
    "keys",
    "list_actors",
    "node_address",
    "node_id",
    "pickle",
    "probe",
    "put",
    "unpickle",
]

NAMESPACE = "edgeml"
"""Where all of its named actors are, whatever namespace a program is in."""

CONTROLLER = "controller"
"""The name of the one that keeps all deployments."""

_ANSWER = 30.0  # seconds that a Ray that runs may take to let this program join

# Kept by Ray's control store (GCS), which keeps the actors' names and what they are made of, too:
# so this outlives every process but that one, and is lost together with the actors.
_PREFIX = "edgeml:"


def connect(timeout: float = _ANSWER, start: bool = False) -> Any:
    """Return the module `ray`, connected.

    An initialised Ray is taken as it is; else, as Ray does it, the one that ``RAY_ADDRESS`` names,
    or that ``ray start`` has begun on this machine.

    Args:
        timeout: seconds that it may take to join one that runs.
        start: whether to start one for this program where there is none. It ends with the program,
            and all that is deployed there with it.

    Raises:
        ImportError: Ray is not installed.
        Unreachable: there is none, or it doesn't answer.
    """
    ray = load_ray()
    if ray.is_initialized():
        return ray
    try:
        address = import_module("ray._private.services").canonicalize_bootstrap_address(None)
        if address is None and start:
            ray.init(namespace=NAMESPACE, include_dashboard=False)
        elif address is None:
            raise OSError("none runs on this machine")
        else:
            _join(ray, address, timeout)
    except OSError as error:
        raise Unreachable(
            f"no Ray is reached from here ({text_of(error)}): call ray.init(), or run `ray start "
            "--head`, or set RAY_ADDRESS; a client needs no Ray with 'ray://HOST:PORT/NAME', the "
            "address of the name service"
        ) from error
    return ray


_joining = threading.Lock()


def _join(ray: Any, address: str, timeout: float) -> None:
    """Connect to a Ray that runs, or raise an OSError in time.

    Ray itself tries for minutes. So a thread does it that is left behind; if that still comes to an
    end, all the better.
    """
    deadline = Deadline(timeout)
    probe(address, timeout)
    late = f"{address} gives no answer within {timeout:g} s"
    if not _joining.acquire(timeout=deadline.left):
        raise TimeoutError(late)
    failed: list[BaseException] = []

    def init() -> None:
        try:
            if not ray.is_initialized():
                ray.init(address=address, namespace=NAMESPACE)
        except BaseException as error:
            failed.append(error)
        finally:
            _joining.release()

    thread = threading.Thread(target=init, name="edgeml joins Ray", daemon=True)
    thread.start()
    thread.join(deadline.left)
    if thread.is_alive():
        raise TimeoutError(late)
    if failed:
        raise ConnectionError(text_of(failed[0])) from failed[0]


def probe(address: str, timeout: float = _ANSWER) -> None:
    """Raise an OSError where nobody listens, as Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()


def node_id() -> str:
    """Return the id of the node that this process runs on, "" where it is not connected to Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_node_id())


def node_address() -> str:
    """Return the address of the node that this process runs on, as Ray's other nodes reach it."""
    return str(load_ray().util.get_node_ip_address())


def find_actor(name: str) -> Any:
    """Return a handle of an actor; None where there is none of that name."""
    try:
        return load_ray().get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def list_actors() -> list[str]:
    """Return the names of all actors of ours that live or are about to."""
    found = load_ray().util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in found if each["namespace"] == NAMESPACE]


# Values -----------------------------------------------------------------------------------


def _store() -> Any:
    return import_module("ray.experimental.internal_kv")


def put(key: str, value: bytes) -> None:
    """Keep a value, for as long as Ray runs."""
    _store()._internal_kv_put(_PREFIX + key, value)


def get(key: str) -> bytes | None:
    """Return a value that is kept."""
    found: bytes | None = _store()._internal_kv_get(_PREFIX + key)
    return found


def drop(key: str) -> None:
    """Keep a value no longer."""
    _store()._internal_kv_del(_PREFIX + key)


def keys(prefix: str) -> list[str]:
    """List the keys of what is kept that begin like this."""
    found = _store()._internal_kv_list(_PREFIX + prefix)
    return sorted(key.decode().removeprefix(_PREFIX) for key in found)


def pickle(value: Any) -> bytes:
    """Pickle a value as Ray does, functions of a program's main module included."""
    data: bytes = import_module("ray.cloudpickle").dumps(value)
    return data


def unpickle(data: bytes) -> Any:
    """Return what was pickled by this user, in this cluster."""
    return import_module("ray.cloudpickle").loads(data)


@dataclass(frozen=True)
class Payload:
    """A function, and what it takes to call it in another process.

    Actors are made by the controller, which belongs to whichever program deployed first. So what
    Ray hands on from a program to its own actors travels with the function here.

    Attributes:
        function: pickled.
        path: folders in which the program that gave it looks for modules.
        runtime_env: Ray's, of that program.
    """

    function: bytes
    path: tuple[str, ...] = ()
    runtime_env: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, function: Any) -> Payload:
        """Pack a function that this program has."""
        context = load_ray().get_runtime_context()
        path = tuple(os.path.abspath(each) for each in sys.path if os.path.isdir(each or "."))
        return cls(pickle(function), path, dict(context.runtime_env))

    def load(self) -> Any:
        """Return the function, whose modules are found from now on."""
        # What is installed here goes first, and a folder that another node lacks does no harm.
        sys.path += [each for each in self.path if each not in sys.path]
        return unpickle(self.function)

    def options(
        self, num_cpus: float, num_gpus: float, resources: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return what Ray is asked for each actor that is to call the function.

        Raises:
            ValueError: there can be no such amounts.
        """
        amounts = {"num_cpus": num_cpus, "num_gpus": num_gpus, **(resources or {})}
        for name, amount in amounts.items():
            if not 0 <= amount < math.inf:
                raise ValueError(f"{name} is a number from 0 on, not {amount}")
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError(f"num_gpus is a part of one, or whole ones, not {num_gpus}")
        options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if resources:
            options["resources"] = dict(resources)
        if self.runtime_env:
            options["runtime_env"] = self.runtime_env
        return options
