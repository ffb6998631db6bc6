"""The name service, which tells clients where a deployment's servers are, and the clients' end.

One call, "resolve": it is answered at once where the client doesn't know yet what there is to know,
and else when that changes, or with nothing new shortly before nobody waits any more. What a client
knows is named by a digest of it, so that a name service which was started anew has nothing to
remember.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgeml.core.alarms import Alarms
from edgeml.core.client import Client
from edgeml.core.deadline import Deadline
from edgeml.core.dispatch import Call, Caller
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    Overloaded,
    UnknownInterface,
    Unreachable,
    shown,
    text_of,
)
from edgeml.core.plugins import hookimpl
from edgeml.core.resolver import Asker, Place, Resolver
from edgeml.core.security import CredentialsLike
from edgeml.core.server import Server
from edgeml.core.url import DEFAULT_TRANSPORT, Url, is_loopback
from edgeml.extras import load_ray
from edgeml.ray import cluster
from edgeml.ray.deployment import Ask, check_name

__all__ = ["DEFAULT_PORT", "NameService", "RayResolver", "edgeml_resolver"]

_log = logging.getLogger(__name__)

DEFAULT_PORT = 5550
"""Where the name service listens unless told otherwise."""

_SERVICE = "names"
_RESOLVE = "resolve"
_ASK_AGAIN = 20.0  # seconds that a question may wait for something new
_SPARE = 5.0  # seconds before the end of that in which "nothing new" is answered
_LOOK = 1.0  # seconds between two looks for questions whose time is over
_LONGEST_ASK = 60.0  # seconds that a question waits at most, whatever it says
_MOST_ASKS = 64  # questions of one client that wait
_MOST_PLACES = 4096
_LONGEST = 2000  # characters of a place's URL
_IMPATIENCE = 0.1  # seconds; the first pause after a failure
_PATIENCE = 2.0  # seconds; the longest

Find = Callable[[str, Ask], "Sequence[Place] | None"]
"""``find(name, ask)`` tells the places of a deployment; None where there is none of that name."""


# The server's end -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parked:
    """A question that waits until its answer is another than the one that is known."""

    call: Call
    ask: Ask
    known: str
    until: float


class NameService:
    """Answers where servers are, as a server of edgeml.

    Args:
        url: where to listen.
        find: see `Find`; quick.
        names: tells the names that there are.
        credentials: whom to let in, as for any server.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, url: Url, find: Find, names: Callable[[], list[str]], credentials: CredentialsLike
    ) -> None:
        self._find = find
        self._names = names
        self._lock = threading.Lock()
        self._parked: dict[Caller, dict[str, _Parked]] = {}  # by client and name, one each
        self._alarms = Alarms("edgeml names")
        self._server = Server(_SERVICE, [url], credentials=credentials)
        self._server.register(_RESOLVE, self._resolve)
        self._server.open()
        self._server.dispatcher.start()
        self._alarms.after(_LOOK, self._look)

    @property
    def url(self) -> Url:
        """Where it listens, the real port filled in."""
        return self._server.urls[0]

    def close(self) -> None:
        """Stop it."""
        self._alarms.close()
        self._server.close()

    def tell(self, name: str) -> None:
        """Answer the questions about a name whose answer has changed, in a thread for that."""
        self._alarms.after(0.0, partial(self._tell, name))

    def _tell(self, name: str) -> None:
        with self._lock:
            for asked in self._parked.values():
                parked = asked.get(name)
                if parked is not None:
                    answer = self._answer(name, parked.ask)
                    if answer["token"] != parked.known:
                        del asked[name]
                        _give(parked.call, answer)

    def _resolve(self, call: Call) -> None:
        name, known, ask = _read(call)
        with self._lock:
            answer = self._answer(name, ask)
            if answer["token"] != known:
                call.answer(answer)
                return
            asked = self._parked.setdefault(call.caller, {})
            before = asked.pop(name, None)
            if len(asked) >= _MOST_ASKS:
                raise Overloaded(f"{_MOST_ASKS} questions of this client wait already")
            until = min(call.deadline - _SPARE, time.monotonic() + _LONGEST_ASK)
            asked[name] = _Parked(call, ask, known, until)
        if before is not None:
            _give(before.call, answer)

    def _answer(self, name: str, ask: Ask) -> dict[str, Any]:
        found = self._find(name, ask)
        if found is None:
            return {"token": "none", "names": self._names()}
        places = [[each.url, each.calls, each.topics] for each in found]
        return {
            "token": hashlib.sha256(repr(places).encode()).hexdigest()[:32],
            "places": places,
        }

    def _look(self) -> None:
        now = time.monotonic()
        try:
            with self._lock:
                for caller, asked in list(self._parked.items()):
                    for name, parked in list(asked.items()):
                        if parked.until < now:
                            del asked[name]
                            _give(parked.call, {"token": parked.known})
                    if not asked:
                        del self._parked[caller]
        finally:
            self._alarms.after(_LOOK, self._look)


def _give(call: Call, answer: dict[str, Any]) -> None:
    with suppress(RuntimeError):  # it was refused meanwhile, as the server closes
        call.answer(answer)


def _read(call: Call) -> tuple[str, str, Ask]:
    asked = call.payload()
    fields = ("name", "path", "known", "service", "node")
    if not isinstance(asked, dict) or not all(
        isinstance(asked.get(field), str) and len(asked[field]) <= 200 for field in fields
    ):
        raise Malformed(f"a question has the texts {', '.join(fields)}, and is not {shown(asked)}")
    caller = call.caller
    ask = Ask(asked["service"], caller.client_id, asked["node"], caller.peer.host, asked["path"])
    return asked["name"], asked["known"], ask


# The client's end -------------------------------------------------------------------------


class RayResolver(Resolver):
    """Finds the servers of a deployment.

    ``ray://name`` asks Ray, which has to be reached from this process, where the name service is;
    ``ray://host:port/name`` says that, and needs no Ray. What follows the name and a slash is up to
    the deployment.
    """

    name = "ray"

    def watch(
        self, url: Url, tell: Callable[[Sequence[Place]], None], asker: Asker
    ) -> Callable[[], None]:
        """See `Resolver.watch`.

        Raises:
            Unreachable: the name service doesn't answer, or there is no Ray.
            UnknownInterface: there is no such deployment.
            ImportError: it takes Ray, which is not installed.
        """
        watch = _Watch(url, tell, asker)
        watch.begin()
        return watch.close


class _Watch:
    """One client's questions about one name."""

    def __init__(self, url: Url, tell: Callable[[Sequence[Place]], None], asker: Asker) -> None:
        path = url.path.removeprefix("/")
        self._names: Url | None = None
        name = url.host
        if url.port:
            if not path:
                raise ValueError(f"{url} names no deployment: write {url}/NAME")
            self._names = Url(DEFAULT_TRANSPORT, url.host, url.port)
            name, _, path = path.partition("/")
        self._name, self._path = check_name(name), path
        self._tell = tell
        self._asker = asker
        self._known = ""
        self._client: Client | None = None
        self._lock = threading.Lock()
        self._telling = threading.RLock()  # who is told may close this
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._follow, name=f"edgeml names {self._name}", daemon=True
        )

    def begin(self) -> None:
        """Ask for the first time, and go on in a thread."""
        deadline = Deadline(self._asker.timeout)
        try:
            if self._names is None:
                # Only now: who has left Ray is not to be brought back by a thread.
                cluster.connect(deadline.left)
            answer = self._ask(deadline.left)
            if "places" not in answer:
                known = ", ".join(_texts(answer.get("names"))) or "none"
                raise UnknownInterface(f"there is no deployment {self._name!r}; known: {known}")
            self._take(answer)
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def close(self) -> None:
        """Ask no more; idempotent."""
        self._closed.set()
        with self._telling:  # nothing is told once this returns
            pass
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _follow(self) -> None:
        pause, told = _IMPATIENCE, ""
        while not self._closed.is_set():
            try:
                self._take(self._ask(_ASK_AGAIN))
                pause, told = _IMPATIENCE, ""
            except Exception as error:
                # The servers that are known go on; the name service is there again before long.
                if self._closed.is_set():
                    return
                if told != (told := text_of(error)):
                    _log.info("%s: no news of its servers: %s", self._name, told)
                self._closed.wait(pause)
                pause = min(2 * pause, _PATIENCE)

    def _ask(self, timeout: float) -> dict[str, Any]:
        deadline = Deadline(timeout)
        client = self._connect(deadline)
        question = {
            "name": self._name,
            "known": self._known,
            "path": self._path,
            "service": self._asker.service,
            "node": cluster.node_id(),
        }
        try:
            answer = client.call(_RESOLVE, question, deadline.left)
        except (Unreachable, Closed, DeadlineExceeded):
            if self._names is None:  # it may be elsewhere by now
                with self._lock:
                    self._client = None
                client.close()
            raise
        if not isinstance(answer, dict) or not isinstance(answer.get("token"), str):
            raise Malformed(f"the name service answers with a dict, not {shown(answer)}")
        return answer

    def _connect(self, deadline: Deadline) -> Client:
        client = self._client
        if client is not None:
            return client
        url = self._names or _ask_ray(deadline)
        asker = self._asker
        made = Client(
            _SERVICE,
            [url],
            client_id=asker.client_id,
            timeout=max(0.01, deadline.left),
            credentials=asker.credentials,
        )
        with self._lock:
            if not self._closed.is_set():
                self._client = made
                return made
        made.close()
        raise Closed("this client has been closed")

    def _take(self, answer: dict[str, Any]) -> None:
        if answer["token"] == self._known:
            return
        places = _places(answer["places"]) if "places" in answer else []
        with self._telling:
            if self._closed.is_set():
                return
            self._tell(places)
        self._known = answer["token"][:100]


def _ask_ray(deadline: Deadline) -> Url:
    """Ask the controller where the name service is."""
    ray = load_ray()
    if not ray.is_initialized():
        raise Unreachable("this program has left Ray")
    controller = cluster.find_actor(cluster.CONTROLLER)
    if controller is None:
        raise Unreachable("nothing is deployed in this Ray cluster: see edgeml.ray.deploy")
    try:
        asked = [controller.address.remote(), controller.node.remote()]
        address, node = ray.get(asked, timeout=max(0.01, deadline.left))
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise Unreachable(f"edgeml's controller in Ray doesn't answer: {text_of(error)}") from error
    url = Url.parse(f"{DEFAULT_TRANSPORT}://{address}")
    if is_loopback(url.host) and node != cluster.node_address():
        raise Unreachable(
            f"the name service listens at {address}, which only its own machine {node} reaches: "
            f"begin with edgeml.ray.start('0.0.0.0:{url.port}')"
        )
    return url


def _texts(given: object) -> list[str]:
    if not isinstance(given, list):
        return []
    return [shown(each) for each in given[:20] if isinstance(each, str)]


def _places(given: object) -> list[Place]:
    """Check the places that a name service told."""
    if not isinstance(given, list) or len(given) > _MOST_PLACES:
        raise Malformed(f"places are a list of at most {_MOST_PLACES}, not {shown(given)}")
    return [_place(each) for each in given]


def _place(given: object) -> Place:
    if not isinstance(given, list) or len(given) != 3:
        raise Malformed(f"a place is a URL and two flags, not {shown(given)}")
    url, calls, topics = given
    if not isinstance(url, str) or len(url) > _LONGEST:
        raise Malformed(f"a place has a URL, not {shown(url)}")
    try:
        schemes = [Url.parse(each).scheme for each in url.split(",")]
    except ValueError as error:
        raise Malformed(f"the name service tells of a place that is none: {error}") from None
    if RayResolver.name in schemes:
        raise Malformed(f"a place is a server, and not a name again: {shown(url)}")
    return Place(url, calls is True, topics is True)


@hookimpl
def edgeml_resolver() -> type[RayResolver]:
    """Return the class."""
    return RayResolver
