"""What the three pairs share: starting and stopping, addresses, and being context managers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

import numpy as np

from edgeml.core.client import Client
from edgeml.core.dispatch import Caller, require_plain
from edgeml.core.errors import Closed, printable
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import empty
from edgeml.core.owned import ClosedAtExit, Unpicklable, close_when_dropped
from edgeml.core.plugins import load_resolver, resolves
from edgeml.core.resolver import Place, Watch, listed
from edgeml.core.security import CredentialsLike
from edgeml.core.server import Load, Server
from edgeml.core.state import ServerState
from edgeml.core.transport import Peer
from edgeml.core.url import Url, check_port, resolve
from edgeml.images import Format, Images

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClientSettings", "ServerSettings", "ServiceClient", "ServiceServer"]

F = TypeVar("F", bound=Load)
T = TypeVar("T")

_THIS_MACHINE = "127.0.0.1"
_WAIT_FOR_SERVER = 600.0  # seconds, where the user just says "wait"


class _Config(Protocol):
    """What a pair's configuration has, whatever else it says."""

    port_number: int
    broadcast_port: int | None
    transport: str | None

    def shared(self) -> dict[str, Any]: ...


class ServerSettings(TypedDict, total=False):
    """What every server takes by name; `ServiceServer` says what it means."""

    url: str | None
    workers: int
    codecs: Sequence[str]
    images: Mapping[str, Format] | None
    wants_images: Mapping[str, Format] | None
    rate_limit: float | None
    limits: Limits
    advertise: str | None
    credentials: CredentialsLike
    on_connect: Callable[[Peer], object] | None
    on_disconnect: Callable[[Peer], object] | None


class ClientSettings(TypedDict, total=False):
    """What every client takes by name; `ServiceClient` says what it means."""

    url: str | Sequence[str] | None
    server_ip: str | None
    client_id: str | None
    codec: str
    images: Mapping[str, Format] | None
    writable: bool
    credentials: CredentialsLike
    on_disconnect: Callable[[], object] | None
    on_reconnect: Callable[[], object] | None
    on_move: Callable[[str, str], object] | None


def _addresses(
    url: str | None, transport: str | None, host: str | None, port: int | None, default_port: int
) -> list[Url]:
    """Where a user says that an end is, in one of the two ways that there are.

    Raises:
        ValueError: it is said in both ways, or they aren't addresses.
    """
    if url is None:
        given = default_port if port is None else port
        return resolve(transport, _THIS_MACHINE if host is None else host, given)
    said = {"transport": transport, "host": host, "port": port}
    if extra := [f"{name} {value!r}" for name, value in said.items() if value is not None]:
        raise ValueError(
            f"url {url!r} says where and how, but {' and '.join(extra)} was given as well; "
            "give one of them"
        )
    if not isinstance(url, str) or not url:
        raise ValueError(f"url must be a text such as 'zmq://host:port', not {url!r}")
    for each in filter(None, (part.strip() for part in url.split(","))):
        Url.parse(each)
    found = resolve(url, _THIS_MACHINE, 0)
    default_port = check_port(default_port)
    return [each if each.port or each.path else each.with_port(default_port) for each in found]


def find_server(
    url: str | None,
    transport: str | None = None,
    host: str | None = None,
    port: int | None = None,
    default_port: int = 0,
) -> list[Url]:
    """Return where a user says that a server is.

    Raises:
        ValueError: it is said in two ways, or is no address, or has no port.
    """
    urls = _addresses(url, transport, host, port, default_port)
    if without := [each for each in urls if not each.port and not each.path]:
        raise ValueError(f"{without[0]} has no port; say at which port the server is")
    return urls


def find_servers(
    url: str | Sequence[str] | None,
    transport: str | None = None,
    host: str | None = None,
    port: int | None = None,
    default_port: int = 0,
) -> list[Url] | Watch:
    """Return where a user says that a server is, or of several what tells where they are.

    Raises:
        ValueError: it is said in two ways, or is no address, or has no port.
    """
    if url is None or (isinstance(url, str) and not _names_resolver(url)):
        return find_server(url, transport, host, port, default_port)
    if extra := [each for each in (transport, host, port) if each is not None]:
        raise ValueError(f"url {url!r} says where and how, but {extra[0]!r} was given as well")
    if isinstance(url, str):
        return partial(load_resolver(url.partition("://")[0]).watch, Url.parse(url))
    given = list(url) if isinstance(url, Iterable) else []
    if not given or not all(isinstance(each, str) for each in given):
        raise ValueError(
            f"url must be a text such as 'zmq://host:port', or a list of several, not {url!r}"
        )
    if found := [each for each in given if _names_resolver(each)]:
        raise ValueError(
            f"{found[0]!r} in a list: a resolver tells of all servers, so give it alone"
        )
    ways = [find_server(each, default_port=default_port) for each in given]
    return listed([Place(",".join(map(str, each))) for each in ways])


def _names_resolver(url: str) -> bool:
    """Whether a text is the URL of what a resolver resolves."""
    parts = [part.partition("://")[0].strip() for part in url.split(",") if "://" in part]
    if not any(map(resolves, parts)):
        return False
    if "," in url:
        raise ValueError(f"{url!r}: a resolver tells of all servers, so give it alone")
    return True


def _listening(
    config: _Config | None,
    url: str | None,
    transport: str | None,
    host: str | None,
    port: int | None,
) -> tuple[list[Url], list[Url]]:
    """The addresses that a server listens at, and those that it can do without.

    One listener does everything; a broadcast port that the configuration names answers in the same
    way. Where the system picks the port (0), it picks the broadcast port too. A ``url`` is all.
    """
    if config is None or url is not None:
        urls = _addresses(url, transport, host, port, 0)
        if url is None and port is None and not all(each.port or each.path for each in urls):
            raise ValueError("say where to listen: at a port (0 lets the system pick), or url=")
        return urls, []
    given = check_port(config.port_number)
    second = None if config.broadcast_port is None else check_port(config.broadcast_port)
    urls = _addresses(None, transport or config.transport, host, given, 0)
    if second is None or second == given:
        return urls, []
    return urls, [each.with_port(second if given else 0) for each in urls if not each.path]


class _Service(ClosedAtExit, Unpicklable):
    """What a server and a client have in common: memory to send from, and a context manager."""

    def _allocate(self, nbytes: int) -> memoryview | None:
        raise NotImplementedError

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """An array to be filled and sent, such as a camera's frame; its contents are arbitrary.

        Where a transport shares memory with the other side, the array lies there and is sent
        without a copy, as the whole of it or as a part. Fill it before it is sent, and only read it
        from then on, since the other side may be reading it: take a new one for the next frame,
        which costs next to nothing. On other transports it is an ordinary array.

        Args:
            shape: as for `numpy.empty`.
            dtype: as for `numpy.empty`.
        """
        return empty(self._allocate, shape, dtype)

    def stop(self) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        self.stop()


class ServiceServer(_Service):
    """What every server takes and does; a context manager that stops it.

    Args:
        url: where to listen and by which transport: ``"zmq://host:port"``, ``"shm:///path"``, or
            several of them separated by commas, in place of host, port and transport, and of the
            ports that a configuration names. Port 0 lets the system pick.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        transport: a transport's name, or a URL; None for what the configuration says, and else
            ``$EDGEML_TRANSPORT``, which defaults to ``"zmq"``.
        workers: how many functions may run at a time; see `start` for the threads.
        codecs: names of the codecs that clients may speak.
        images: which arrays that the server sends are images, and how they travel:
            ``{"image*": Jpeg(90)}``, by the names of their keys. A client that can't decode them
            gets arrays, with a warning at both ends.
        wants_images: the same, of those that clients send, sizes included. A client that can't do
            it is refused with ConfigMismatch; one that has no ``images=`` of its own for a key
            does as is said here.
        rate_limit: calls per second and client; those beyond wait their turn within their
            deadline. None for any number.
        limits: what clients may make this server keep or do; see `Limits`.
        advertise: where others reach this server, as `url` tells, if that isn't where it listens,
            as behind NAT or in a container: ``"host"``, or ``"host:port"``, of which the port is
            the first address's. Where it listens at several ports, a URL for each that is another:
            ``"zmq://host:8057,grpc://host:8058"``.
        credentials: the keys, as the directory that ``edgeml keygen`` made or as `Credentials`;
            ``$EDGEML_CREDENTIALS`` by default. See ``docs/security.md``.
        on_connect: ``on_connect(peer)`` is called with each client that has come, as `clients`
            tells of it, and with each that is back after it was taken to be gone.
        on_disconnect: ``on_disconnect(peer)`` is called with each client that has left, or is gone:
            has sent nothing for 2.5 seconds, in which a client that lives does. Both run in a
            thread of the library's, one call after another, and may take their time; what they
            raise is logged. `stop` calls neither.

    Raises:
        ValueError: the address is said in two ways, or is none.
    """

    def __init__(
        self,
        service: str,
        config: _Config | None = None,
        *,
        url: str | None = None,
        host: str | None = None,
        port: int | None = None,
        transport: str | None = None,
        workers: int = 1,
        codecs: Sequence[str] = ("msgpack",),
        images: Mapping[str, Format] | None = None,
        wants_images: Mapping[str, Format] | None = None,
        rate_limit: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
        advertise: str | None = None,
        credentials: CredentialsLike = None,
        on_connect: Callable[[Peer], object] | None = None,
        on_disconnect: Callable[[Peer], object] | None = None,
    ) -> None:
        self._server = Server(
            service,
            *_listening(config, url, transport, host, port),
            config=None if config is None else config.shared(),
            codecs=codecs,
            wrapping=Images(images, wants_images),
            workers=workers,
            rate_limit=rate_limit,
            limits=limits,
            credentials=credentials,
            on_connect=_given_peers("on_connect", on_connect),
            on_disconnect=_given_peers("on_disconnect", on_disconnect),
        )
        self._advertise = _read_advertised(advertise)
        self._stopped = threading.Event()
        self._disarm: Callable[[], object] = lambda: None

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve in the background within a ``with`` block, and stop at its end.

        ``with server.serving():`` is ``with server:`` and ``server.start(threaded=True)``, and
        raises what `start` does.
        """
        with self:
            self.start(threaded=True)
            yield self

    def start(self, threaded: bool = False) -> None:
        """Serve, until `stop` or Ctrl-C; in the background with ``threaded``.

        With one worker, which is the default, all handlers run in one and the same thread: the one
        that calls this, or with ``threaded`` one of the server's own. With more, they run in that
        one and in ``workers - 1`` of the server's.

        Raises:
            OSError: the port is taken.
            PluginError: the transport isn't installed, or is broken.
            RuntimeError: it was started before.
            What a function that was given to `load` raises; with ``threaded`` it is logged.
        """
        self._server.open()
        self._disarm = close_when_dropped(self, self._server.close)
        if threaded:
            self._server.dispatcher.start()
        else:
            self._block(self._server.dispatcher.run)
            if self._server.failure is not None:
                raise self._server.failure

    def _block(self, serve: Callable[[], object]) -> None:
        try:
            serve()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def load(self, function: F) -> F:
        """Have something done before the first call is answered, such as reading weights.

        It runs in the handlers' thread once the server listens. Until then the server is "loading":
        clients can connect, ask for its `state`, and wait with ``wait_for_server=``; what they call
        is refused with NotReady. If it raises, the server stops. A decorator, too.

        Args:
            function: ``function(report)``, which may tell how far it is by
                ``report(fraction, "what it is at")``; that raises Closed once the server has been
                stopped. Several run one after another.

        Returns:
            The function.

        Raises:
            RuntimeError: the server has been started.
        """
        self._server.load(function)
        return function

    def state(self) -> ServerState:
        """Return what this server is at."""
        return self._server.state

    def drain(self, timeout: float = 30.0) -> bool:
        """Stop once everything under way is answered; new calls and clients are refused.

        They get NotReady, and nothing of what they asked has been done. In the handlers' thread,
        which would wait for itself, this returns False at once, and the rest is done in the
        background: so a signal's handler may call it.

        Args:
            timeout: seconds after which to stop all the same.

        Returns:
            Whether everything was answered.
        """
        self._disarm()
        done = self._server.drain(timeout)
        self._stopped.set()
        return done

    def stop(self) -> None:
        """Tell the clients, stop serving and end every thread; idempotent.

        It is quick, but that handlers which still run are waited for, up to two seconds, and may
        answer. Those that run on are told of in the log, with where each of them is, and left
        behind: they end with the process, if not before.
        """
        self._disarm()
        self._stopped.set()
        self._server.close()

    def _allocate(self, nbytes: int) -> memoryview | None:
        return self._server.allocate(nbytes)

    @property
    def url(self) -> str:
        """Where clients reach it, the real port filled in; of several transports, the first.

        A server that listens at all addresses of its machine, ``0.0.0.0``, tells the machine's
        name, and one that others reach elsewhere, as behind NAT, what it was told to ``advertise``.

        Raises:
            Closed: it isn't started.
        """
        return str(self._first())

    def urls(self) -> list[str]:
        """Return where clients reach it, by each transport and port; none until it is started."""
        return list(map(str, self._tell_advertised(self._server.urls)))

    @property
    def port(self) -> int:
        """The port that it listens on; raises as `url` does."""
        return self._first().port

    def _first(self) -> Url:
        urls = self._server.urls
        if not urls:
            raise Closed("the server isn't started, so it has no address yet")
        return self._tell_advertised(urls)[0]

    def _tell_advertised(self, urls: Sequence[Url], doors: bool = False) -> list[Url]:
        """Return where others reach this server, or its doors, which listen at these addresses."""
        told = []
        seen: Counter[str] = Counter()  # addresses of each scheme
        for number, url in enumerate(urls, doors):
            named = [each for each in self._advertise if each.scheme == url.scheme]
            anywhere = [each for each in self._advertise if not each.scheme and not url.path]
            if len(named) > seen[url.scheme]:
                found = named[seen[url.scheme]]
                told.append(found if found.port or found.path else found.with_port(url.port))
            elif anywhere:
                port = url.port if number else anywhere[0].port or url.port
                told.append(Url(url.scheme, anywhere[0].host, port))
            else:
                told.append(url)
            seen[url.scheme] += 1
        return told

    def clients(self) -> list[Peer]:
        """Return the clients that are there.

        Their ids, for people their labels and addresses, and as ``identity`` the names of the keys
        that they have shown; None where this server asks for none.
        """
        return [_peer(caller) for caller in self._server.callers]

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything refused or dropped, by reason; and
        ``waiting``, the calls that wait for a handler now, and ``running``, the threads that are at
        one, or at a batch.
        """
        return self._server.stats()


def _read_advertised(text: str | None) -> list[Url]:
    """Return the addresses that a user says a server is reached at; without a scheme, by any."""
    told = []
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        url = Url.parse(part if "://" in part else f"any://{part}")
        told.append(url if "://" in part else replace(url, scheme=""))
        if not url.host and not url.path:
            raise ValueError(f"advertise={text!r} names no host; write 'host' or 'host:port'")
    return told


def _peer(caller: Caller) -> Peer:
    """Return a client as a server's user is told of it."""
    address = f"{printable(caller.label)} at {caller.peer.address}".strip()
    return Peer(caller.client_id, address, caller.peer.host, caller.identity)


def _given_peers(
    name: str, function: Callable[[Peer], object] | None
) -> Callable[[Caller], object] | None:
    """Return a user's function as the core calls it."""
    if function is None:
        return None
    require_plain(name, function)
    return lambda caller: function(_peer(caller))


class ServiceClient(_Service):
    """What every client takes and does; a context manager that stops it.

    Args:
        url: where the server is and by which transport: ``"zmq://host:port"``, ``"shm:///path"``,
            or several of them separated by commas, of which the first that answers is taken. In
            place of host, port and transport; a port that it leaves out is the configuration's. A
            list of such texts is several equal servers, and so is a text whose scheme is a
            resolver's: ``"ray://policy"``. See ``docs/guides/several-servers.md``.
        host: the server's name or address; this machine by default.
        server_ip: another name for ``host``.
        transport: a transport's name, or a URL; None for what the configuration says, and else
            ``$EDGEML_TRANSPORT``, which defaults to ``"zmq"``.
        timeout: seconds that connecting, or a call, may take unless told otherwise.
        wait_for_server: wait until a server answers and is ready, for 600 s or the number of
            seconds given.
        client_id: this client's identity; random by default.
        codec: the codec's name.
        images: which arrays that this client sends are images, and how they travel:
            ``{"image*": Jpeg(90)}``, by the names of their keys.
        writable: whether received arrays are private copies rather than read-only views.
        credentials: the keys, as the directory that ``edgeml keygen`` made or as `Credentials`;
            ``$EDGEML_CREDENTIALS`` by default. See ``docs/security.md``.
        on_disconnect: ``on_disconnect()`` is called when the connection is lost, or the server has
            given no sign of life for 2.5 seconds. The client connects anew by itself.
        on_reconnect: ``on_reconnect()`` is called when there is a connection again. Both run in a
            thread of the library's, one call after another, and may use the client; what they raise
            is logged. The first connection and `stop` call neither. Of several servers, they are
            called when none is left, and when there is one again.
        on_move: ``on_move(old, new)`` is called likewise, with two URLs, when the session had to
            begin anew, since the one of several servers that had it is lost: where it was, and
            where it is now. They are equal where that server came back without it.

    Raises:
        ValueError: the address is said in two ways, or is none.
        Unreachable: nobody serves there.
        ConfigMismatch: the server is of another kind, or configured differently; the text names
            field and values.
    """

    def __init__(
        self,
        service: str,
        config: _Config | None = None,
        *,
        label: str = "",
        needs: dict[str, Any] | None = None,  # extensions that the server must have
        begins: str = "",  # the interface by which a session begins
        stays: bool = True,  # whether all calls go to one of several servers
        url: str | Sequence[str] | None = None,
        host: str | None = None,
        server_ip: str | None = None,
        port: int | None = None,
        transport: str | None = None,
        timeout: float = 10.0,
        wait_for_server: bool | float = False,
        client_id: str | None = None,
        codec: str = "msgpack",
        images: Mapping[str, Format] | None = None,
        writable: bool = False,
        credentials: CredentialsLike = None,
        on_disconnect: Callable[[], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
        on_move: Callable[[str, str], object] | None = None,
        on_connecting: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        if server_ip is not None:
            if host is not None:
                raise ValueError(f"host {host!r} and server_ip {server_ip!r}: give one of them")
            host = server_ip
        told = {
            "on_disconnect": on_disconnect,
            "on_reconnect": on_reconnect,
            "on_move": on_move,
        }
        for name, function in told.items():
            if function is not None:
                require_plain(name, function)
        if url is None and config is not None:
            transport = transport or config.transport
        known = 0 if config is None else config.port_number
        urls = find_servers(url, transport, host, port, known)
        self._client = Client(
            service,
            urls,
            config=None if config is None else config.shared(),
            extensions=needs,
            needed=needs or (),
            label=label,
            client_id=client_id,
            codec=codec,
            wrapping=Images(images),
            timeout=timeout,
            wait=_WAIT_FOR_SERVER if wait_for_server is True else float(wait_for_server),
            writable=writable,
            credentials=credentials,
            on_disconnect=on_disconnect,
            on_reconnect=on_reconnect,
            on_move=on_move,
            begins=begins,
            stays=stays,
            on_connecting=on_connecting,
        )
        self._close: Callable[[], object] = lambda: None
        self._disarm: Callable[[], object] = lambda: None
        self._close_by(self._client.close)

    def _close_by(self, close: Callable[[], object]) -> None:
        """Have ``close``, which must not refer to this object, stop it, when it is dropped too."""
        self._disarm()
        self._close = close
        self._disarm = close_when_dropped(self, close)

    @property
    def client_id(self) -> str:
        """This client's identity."""
        return self._client.client_id

    def state(self, timeout: float | None = None) -> ServerState:
        """Ask the server what it is at; it answers while it loads, too.

        Raises:
            Unreachable, DeadlineExceeded: it doesn't answer.
        """
        return self._client.state(timeout)

    def _allocate(self, nbytes: int) -> memoryview | None:
        return self._client.allocate(nbytes)

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``replies_copied``, replies and publications that came as private
        copies because too many received arrays are held for the transport to lend more; and
        ``calls_held_back``, asynchronous calls that were not sent, as the server refused most of
        those before them.

        Of several servers ``servers`` has of each, by its URL: its ``state`` ("ready", "loading",
        "draining", "lost", or "refused" where it won't have this client), the calls ``under_way``,
        ``calls`` that it was given, and ``moved``, sessions that had to leave it.
        """
        return self._client.stats()

    def stop(self) -> None:
        """Close the connection and end every thread; idempotent.

        It is quick, but that a subscriber's function which still runs is waited for, up to a
        second. One that runs on is told of in the log, with where it is, and left behind.
        """
        self._disarm()
        self._close()


def names(what: str, given: Sequence[Any]) -> list[str]:
    """Check a configuration's list of names; a single string is a mistake that is easily made."""
    if isinstance(given, str) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{what} must be a list of names, not {given!r}")
    return list(given)


def named(name: str, payload: Any) -> list[Any]:
    """Return what an action or a request is sent as; an empty dict stands for no payload."""
    return [name, {} if payload is None else payload]


def checked(future: Future[Any], check: Callable[[Any], T]) -> Future[T]:
    """Return a future of what ``check`` makes of the result of another, or raises about it.

    To cancel it is to cancel the other. It has the other's `Timing` as well.
    """
    made: Future[T] = Future()

    def give_up(made: Future[T]) -> None:
        if made.cancelled():
            future.cancel()

    def pass_on(done: Future[Any]) -> None:
        if done.cancelled():
            made.cancel()
            return
        with suppress(InvalidStateError):  # it was cancelled
            try:
                result = check(done.result())
            except Exception as error:
                made.set_exception(error)
            else:
                made.timing = done.timing  # type: ignore[attr-defined]
                made.set_result(result)

    made.add_done_callback(give_up)
    future.add_done_callback(pass_on)
    return made
