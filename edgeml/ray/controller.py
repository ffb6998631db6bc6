"""The controller: one actor that keeps all deployments, and has the name service.

What it knows by itself it could lose at any moment: what is wanted lies in Ray's store, and what
there is the replicas tell. So one that was killed is started anew by Ray, and finds all again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from edgeml.core.errors import UnknownInterface, text_of
from edgeml.core.resolver import Place
from edgeml.core.url import DEFAULT_TRANSPORT, Url
from edgeml.ray import cluster
from edgeml.ray.deployment import Ask, Deployment, Host, Spec, Status
from edgeml.ray.names import NameService

__all__ = ["Controller"]

_log = logging.getLogger(__name__)

_AGAIN = 1.0  # seconds between two tries to listen
_STEP = 0.25  # seconds between two looks at what a deployment is at

# Keys in Ray's store.
_NAMES = "names"
_SPEC = "spec/"
_COUNT = "count/"
_ENDING = "ending/"


@dataclass(eq=False)
class _Kept:
    """A deployment, and the thread that brings it along."""

    deployment: Deployment
    wake: threading.Event = field(default_factory=threading.Event)
    ending: bool = False


class Controller:
    """The actor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._names: NameService | None = None  # there once all deployments are
        for key in cluster.keys(_SPEC):
            name = key.removeprefix(_SPEC)
            data = cluster.get(key)
            assert data is not None
            try:
                kept = _Kept(cluster.unpickle(data).open(self._host(name)))
            except Exception:
                _log.exception("deployment %s can't be kept; deploy it again", name)
                continue
            kept.ending = cluster.get(_ENDING + name) is not None
            self._kept[name] = kept
        self._address = ""
        self._credentials: str | None = None
        if (before := cluster.get(_NAMES)) is not None:
            self._address, self._credentials = cluster.unpickle(before)
            threading.Thread(target=self._listen_again, name="edgeml names", daemon=True).start()
        for name, kept in list(self._kept.items()):
            self._begin(name, kept)

    def _listen(self) -> None:
        url = Url.parse(f"{DEFAULT_TRANSPORT}://{self._address}")
        made = NameService(url, self._find, self._list_names, self._credentials)
        self._address = str(url.with_port(made.url.port)).removeprefix(f"{url.scheme}://")
        self._names = made

    def _listen_again(self) -> None:
        """Listen where clients look for the names, though somebody may have it in between."""
        told = ""
        while self._names is None:
            try:
                self._listen()
            except Exception as error:
                if told != (told := text_of(error)):
                    _log.error("no names are told before this is possible: %s", told)
                time.sleep(_AGAIN)

    # What programs ask --------------------------------------------------------------------

    def listen(self, names: str, credentials: str | None) -> str:
        """Tell names, unless that is done already; returns where, HOST:PORT.

        Args:
            names: where the name service listens, HOST:PORT.
            credentials: the folder of the keys that it asks for.

        Raises:
            OSError: the port is taken.
        """
        with self._lock:
            if not self._address:
                self._address, self._credentials = names, credentials
                try:
                    self._listen()
                except BaseException:
                    self._address, self._credentials = "", None
                    raise
                kept = self._address, credentials
                cluster.put(_NAMES, cluster.pickle(kept))
        return self.address()

    def address(self) -> str:
        """Return where the name service is reached, HOST:PORT."""
        url = Url.parse(f"{DEFAULT_TRANSPORT}://{self._address}")
        if url.host in ("", "0.0.0.0", "::"):
            url = url.with_host(cluster.node_address())
        return str(url).removeprefix(f"{url.scheme}://")

    def node(self) -> str:
        """Return the address of the machine that this runs on."""
        return cluster.node_address()

    def pid(self) -> int:
        """Return its process."""
        return os.getpid()

    def deploy(self, pickled: bytes, payload: bytes | None = None, key: str = "") -> int:
        """Take a deployment in, or the next version of one; returns the version.

        Args:
            pickled: the spec.
            payload: is kept under ``key``, to which the version is added.
            key: see there.
        """
        spec: Spec = cluster.unpickle(pickled)
        name = spec.name
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None and kept.ending:
                raise ValueError(f"{name!r} is just being deleted; deploy it when that is done")
            if kept is not None and (kind := kept.deployment.status().kind) != spec.kind:
                raise ValueError(f"{name!r} is a deployment of {kind}; delete it first")
            version = int(cluster.get(_COUNT + name) or b"0") + 1
            cluster.put(_COUNT + name, str(version).encode())
            if payload is not None:
                cluster.put(f"{key}/{version}", payload)
            spec = replace(spec, version=version)
            if kept is None:
                self._keep(spec)
                kept = self._kept[name] = _Kept(spec.open(self._host(name)))
                self._begin(name, kept)
            else:
                kept.deployment.replace(spec)
        kept.wake.set()
        return version

    def scale(self, name: str, n: int) -> Status:
        """Want so many from now on."""
        kept = self._get(name)
        kept.deployment.scale(n)
        kept.wake.set()
        return self._tell(kept)

    def status(self, name: str) -> Status:
        """Return what a deployment is at."""
        return self._tell(self._get(name))

    def statuses(self) -> dict[str, Status]:
        """Return what all deployments are at."""
        with self._lock:
            kept = sorted(self._kept.items())
        return {name: self._tell(each) for name, each in kept}

    def delete(self, name: str) -> None:
        """Begin to end a deployment; it is unknown when it has ended."""
        kept = self._get(name)
        cluster.put(_ENDING + name, b"1")
        kept.ending = True
        kept.wake.set()

    def close(self) -> None:
        """Stop the name service, as nobody is to be told anything any more."""
        if self._names is not None:
            self._names.close()
        cluster.drop(_NAMES)

    # What deployments ask -----------------------------------------------------------------

    def _host(self, name: str) -> Host:
        return Host(self._keep, partial(self._changed, name))

    def _keep(self, spec: Spec) -> None:
        cluster.put(_SPEC + spec.name, cluster.pickle(spec))

    def _changed(self, name: str) -> None:
        if self._names is not None:
            self._names.tell(name)

    # What the name service asks -----------------------------------------------------------

    def _find(self, name: str, ask: Ask) -> Sequence[Place] | None:
        kept = self._kept.get(name)
        return None if kept is None else kept.deployment.places(ask)

    def _list_names(self) -> list[str]:
        return sorted(self._kept)

    # --------------------------------------------------------------------------------------

    def _get(self, name: str) -> _Kept:
        kept = self._kept.get(name)
        if kept is None:
            known = ", ".join(self._list_names()) or "none"
            raise UnknownInterface(f"there is no deployment {name!r}; known: {known}")
        return kept

    def _tell(self, kept: _Kept) -> Status:
        status = replace(kept.deployment.status(), names=self.address())
        return replace(status, state="ending") if kept.ending else status

    def _begin(self, name: str, kept: _Kept) -> None:
        threading.Thread(
            target=self._run, args=(name, kept), name=f"edgeml {name}", daemon=True
        ).start()

    def _run(self, name: str, kept: _Kept) -> None:
        told = ""
        while not kept.ending:
            try:
                kept.deployment.step()
                told = ""
            except Exception as error:
                if told != (told := text_of(error)):
                    _log.exception("deployment %s: it is tried again", name)
            kept.wake.wait(_STEP)
            kept.wake.clear()
        try:
            kept.deployment.end()
        except Exception:
            _log.exception("deployment %s has not ended as it should", name)
        with self._lock:
            del self._kept[name]
            for key in (_SPEC, _COUNT, _ENDING):
                cluster.drop(key + name)
        self._changed(name)
