"""Inference: the machine with the GPU is the server. Clients call registered functions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from edgeml.core.client import Timing
from edgeml.core.dispatch import Caller, answer_with, require_plain, unknown
from edgeml.core.errors import Malformed, shown
from edgeml.core.guests import Entrance, Passage
from edgeml.core.plugins import load_codec, load_door, load_transport
from edgeml.core.security import PERMISSIONS
from edgeml.core.server import Server
from edgeml.core.url import Url
from edgeml.services.base import (
    ClientSettings,
    ServerSettings,
    ServiceClient,
    ServiceServer,
    checked,
    find_server,
)
from edgeml.services.batching import Batcher, Batching
from edgeml.services.checks import EXTENSION, Check, Contracts
from edgeml.services.contract import PolicyContract
from edgeml.services.functions import Function, Single
from edgeml.services.shadow import OnShadow, Shadow

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InferenceClient", "InferenceServer"]

F = TypeVar("F", bound=Callable[..., Any])

# Users' own names do not start with a slash.
_LIST = "/interfaces"
_CONTRACT = "/contract"
_RESET = "/reset"
_USUAL = "policy"  # what an interface is called that doors mean where there are several
_LONGEST_ID = 200  # characters


class InferenceServer(ServiceServer):
    """Serves functions by name.

    Args:
        port_num: where to listen; 0 lets the system pick, and `url` tells.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``.
        doors: where other people's clients come in, by URLs such as ``"openpi://0.0.0.0:8000"``,
            to call the server's one interface, or of several the one called ``"policy"``;
            `open_door` says more.
        settings: ``url``, ``workers``, ``codecs``, ``images``, ``wants_images``, ``rate_limit``,
            ``advertise``, ``credentials``, ``limits``, ``on_connect``, ``on_disconnect``: see
            `ServiceServer`.
    """

    def __init__(
        self,
        port_num: int | None = None,
        host: str | None = None,
        transport: str | None = None,
        *,
        doors: Sequence[str] = (),
        **settings: Unpack[ServerSettings],
    ) -> None:
        super().__init__("inference", host=host, port=port_num, transport=transport, **settings)
        self._interfaces = interfaces = dict[str, Single | Batcher]()
        self._contracts = contracts = Contracts(interfaces)
        self._server.extend(EXTENSION, contracts.negotiate)
        self._server.register(_LIST, answer_with(lambda payload, _: sorted(interfaces)))
        self._server.register(_CONTRACT, answer_with(lambda name, _: contracts.tell(name)))
        self._server.register(_RESET, answer_with(partial(_reset, self._server)))
        if isinstance(doors, str):
            raise ValueError(f"doors must be a list of URLs, not {doors!r}")
        for door in doors:
            self.open_door(door)

    @overload
    def register_interface(
        self,
        name: str,
        function: None = None,
        *,
        batching: Batching | None = None,
        with_context: bool | None = None,
        contract: PolicyContract | None = None,
        check: Check = "first",
        permission: str = "call",
        newest_first: bool = False,
    ) -> Callable[[F], F]: ...

    @overload
    def register_interface(
        self,
        name: str,
        function: F,
        *,
        batching: Batching | None = None,
        with_context: bool | None = None,
        contract: PolicyContract | None = None,
        check: Check = "first",
        permission: str = "call",
        newest_first: bool = False,
    ) -> F: ...

    def register_interface(
        self,
        name: str,
        function: F | None = None,
        *,
        batching: Batching | None = None,
        with_context: bool | None = None,
        contract: PolicyContract | None = None,
        check: Check = "first",
        permission: str = "call",
        newest_first: bool = False,
    ) -> F | Callable[[F], F]:
        """Serve ``function(payload) -> result`` under a name, before or after the start.

        The payload's arrays are read-only views; the result may be any value that the codec
        carries, and may be changed once the function is called again. Without a function this is a
        decorator.

        Args:
            name: of the interface.
            function: what answers.
            batching: answers the calls of all clients together: the function gets a payload built
                as each of theirs, in which every array and number has one more axis in front, and
                everything else is a list. It returns a result in which every array has that axis
                too, or a list of results.
            with_context: whether the function takes a `Context`, too, or with ``batching`` a list
                of them, one for each call; by default where it needs two arguments, or its second
                is called ``context``.
            contract: what a payload and a result are like. Clients can ask for it, and one that
                expects something else is refused. What does not fit is refused, too: a payload is
                Malformed, a result a RemoteError.
            check: which calls are checked: ``"first"`` for those of each client until one has
                passed, ``"all"``, or ``"none"``.
            permission: what a client's role must allow, with this interface's name, where the
                server asks for keys: ``"administer"`` for what only its keepers are to do.
            newest_first: whether of the calls of one client that wait the newest is answered
                first, as robots want it that ask at a steady rate; older ones are answered where
                there is time for them. By default they are answered in the order in which they
                were asked, as a function with a memory needs it.

        Returns:
            The function.

        Raises:
            ValueError: the name is taken, empty, or starts with a slash; or there is no such
                permission.
            TypeError: the function isn't callable, or is an ``async def``.
        """
        if permission not in PERMISSIONS:
            known = ", ".join(PERMISSIONS)
            raise ValueError(f"{permission!r} is no permission; known: {known}")
        if not isinstance(name, str) or not name or name.startswith("/"):
            raise ValueError(f"an interface can't be called {name!r}")
        if function is None:
            return lambda given: self.register_interface(
                name,
                given,
                batching=batching,
                with_context=with_context,
                contract=contract,
                check=check,
                permission=permission,
                newest_first=newest_first,
            )
        with self._contracts.changing:
            if name in self._interfaces:
                raise ValueError(f"there is an interface {name!r} already")
            made = Function.make(f"interface {name!r}", function, 1, with_context)
            made = made._replace(checks=self._contracts.offer(name, contract, check))
            handler = Single(made) if batching is None else Batcher(made, batching, newest_first)
            self._server.register(name, handler, needs=permission, newest_first=newest_first)
            self._interfaces[name] = handler
        return function

    def open_door(
        self,
        url: str,
        interface: str | None = None,
        *,
        names: Mapping[str, str] | None = None,
        before: Callable[[Any], Any] | None = None,
        after: Callable[[Any], Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
    ) -> str:
        """Let other people's clients call an interface, in their own protocol.

        Their calls are calls as any others: in the same batches, with a session each, by the same
        limits, keys and contracts. Before the start the door is opened as the server starts.

        Args:
            url: where, and by its scheme which door: ``"openpi://0.0.0.0:8000"``. ``edgeml
                plugins`` lists those that are installed.
            interface: the function that the protocol means; by default the only one that there is,
                or the one called ``"policy"``.
            names: of an observation's keys, theirs and ours: ``{"observation/image": "image"}``.
                In results that are dicts ours become theirs.
            before: ``before(observation)`` makes the function's payload of theirs, after ``names``;
                it runs wherever calls come in, so keep it short.
            after: ``after(result)`` makes their result of the function's, before ``names``.
            metadata: what clients are told of the policy, where their protocol has a place for it.
            timeout: seconds that a call may take, as most of these protocols name no deadline.

        Returns:
            Where clients reach it; once the server has started, with the real port.

        Raises:
            TypeError: an argument is of another type.
            ValueError: this is no URL, or it isn't clear which interface is meant, or ``names``
                give two keys one name.
            UnknownInterface: there is no such interface.
            PluginError: no such door is installed.
            OSError: the address is taken.
            PermissionDenied: the server asks for keys, and this door sends clear text there.
            RuntimeError: the server has been stopped.
        """
        if not isinstance(url, str):
            raise TypeError(
                f"a door is opened at a URL such as 'openpi://0.0.0.0:8000', not {url!r}"
            )
        place = Url.parse(url)
        load_door(place.scheme)
        interfaces, contracts = self._interfaces, self._contracts  # not self, which may be dropped
        entrance = Entrance(
            self._server,
            place.scheme,
            interface or "",
            Passage(names or {}, before, after),
            metadata or {},
            timeout,
            lambda name: contracts.tell(name) if name in interfaces else None,
        )
        choose = partial(_choose, interfaces, url, interface)
        opened = self._server.open_door(place, entrance, choose)
        others = [each for each in self._server.doors if each != opened]
        return str(self._tell_advertised([*others, opened], doors=True)[-1])

    def doors(self) -> list[str]:
        """Return where other people's clients reach it; none until it is started."""
        return list(map(str, self._tell_advertised(self._server.doors, doors=True)))

    def swap(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        with_context: bool | None = None,
        contract: PolicyContract | None = None,
    ) -> int:
        """Replace the function of an interface, between two of its calls or batches.

        No call is lost, and each is answered by one of the two; `Timing.version` tells which.

        Args:
            name: of the interface.
            function: what answers from now on.
            with_context: as for `register_interface`.
            contract: the interface's new one; by default it keeps the one that it has. Calls of
                clients that expect another are refused with ConfigMismatch from now on.

        Returns:
            The new version.

        Raises:
            UnknownInterface: there is no interface of that name.
            TypeError: the function isn't callable, or is an ``async def``.
        """
        handler = self._find(name)
        with self._contracts.changing:
            version = handler.function.version + 1
            made = Function.make(f"interface {name!r}", function, version, with_context)
            handler.function = made._replace(checks=self._contracts.offer(name, contract))
        return version

    def warmup(self, name: str, example: Any) -> None:
        """Run a function on an example, in every size of batch where its calls are batched.

        So what is compiled is compiled before the first call, and how long batches take is known.
        Before the start this is done as the server loads, see `load`. Afterwards it is done between
        two calls, and this waits for it.

        Args:
            name: of the interface.
            example: a payload, as clients will send it.

        Raises:
            UnknownInterface: there is no interface of that name.
            ValueError: the example doesn't fit the interface's contract.
            What the function raises, after the start.
        """
        handler = self._find(name)
        contract = self._contracts.find(name)
        if contract is not None:
            contract.check_observation(example)
        if self._server.state.state == "starting":
            self._server.load(lambda report: handler.warm_up(example, report))
        elif self._server.dispatcher.inside:
            handler.warm_up(example, _do_nothing)
        else:
            self._server.dispatcher.do(lambda: handler.warm_up(example, _do_nothing)).result()

    def _find(self, name: str) -> Single | Batcher:
        try:
            return self._interfaces[name]
        except KeyError:
            raise unknown("interface", name, self._interfaces) from None


def _choose(interfaces: Mapping[str, object], url: str, interface: str | None) -> str:
    """Name the interface that a door leads to."""
    if interface is not None:
        if interface not in interfaces:
            raise unknown("interface", interface, interfaces)
        return interface
    if len(interfaces) == 1:
        return next(iter(interfaces))
    if _USUAL in interfaces:
        return _USUAL
    known = ", ".join(sorted(interfaces)) or "none"
    raise ValueError(
        f"which interface does {url} mean? There are {known}, and none is called {_USUAL!r}: say "
        f"so by open_door({url!r}, interface=...)"
    )


def _do_nothing(fraction: float, detail: str) -> None:
    """Stand in for a report that nobody reads."""


def _plain(expect: Mapping[str, PolicyContract]) -> dict[str, Any]:
    if not isinstance(expect, Mapping) or not all(
        isinstance(name, str) and isinstance(contract, PolicyContract)
        for name, contract in expect.items()
    ):
        raise TypeError(
            f"expect has a PolicyContract for each interface that it names, not {shown(expect)}"
        )
    return {name: contract.to_plain() for name, contract in expect.items()}


def _reset(server: Server, episode: Any, caller: Caller) -> str:
    if not isinstance(episode, str) or len(episode) > _LONGEST_ID:
        raise Malformed(f"an episode's id is a string of at most {_LONGEST_ID} characters")
    server.begin_episode(caller, episode)
    return episode


def _chosen(episode: str | None) -> str:
    return secrets.token_hex(8) if episode is None else episode


def _begun(chosen: str, shadow: Shadow | None, answer: Any) -> str:
    if not isinstance(answer, str) or answer != chosen:
        raise Malformed(f"the server was to begin episode {chosen!r}, and began {shown(answer)}")
    if shadow is not None:
        shadow.begin_episode(answer)
    return answer


_ALIKE = ("codec", "images", "credentials")  # settings that a shadow has, too


def _stop_both(shadow: Shadow, close: Callable[[], object]) -> None:
    shadow.stop()
    close()


class InferenceClient(ServiceClient):
    """Calls the functions of an `InferenceServer`.

    Args:
        host: where the server is; this machine by default.
        port_num: its port.
        transport: as for the server.
        timeout: seconds that connecting, or a call, may take unless told otherwise.
        wait_for_server: go on trying, for 600 s or the number of seconds given, until a server
            answers and is ready.
        expect: what the policies are like that this client was made for, by their interfaces'
            names. It is compared whenever the client connects, after a restart of the server too,
            and what differs is refused before anything is called.
        shadow: the URL of a candidate: a server that is asked the same as the real one, as often as
            it is free, and whose answers are compared with the real ones and never returned. It may
            be slow, dead, or not there yet, without any effect on calls. It gets this client's
            settings, what is expected included. `stats` tells how it does.
        on_shadow: ``on_shadow(name, payload, real, candidate)`` is called with an interface's name,
            a payload and both answers, in a thread of the shadow's own. It may take its time, in
            which the candidate is not asked; what it raises is logged.
        settings: ``url``, ``server_ip``, ``client_id``, ``codec``, ``images``, ``writable``,
            ``credentials``, ``on_disconnect``, ``on_reconnect``, ``on_move``: see `ServiceClient`.

    Raises:
        Unreachable: nobody serves there.
        ConfigMismatch: what serves there is no inference server, or differs from what is expected;
            the text names all that does.
    """

    def __init__(
        self,
        host: str | None = None,
        port_num: int | None = None,
        transport: str | None = None,
        *,
        timeout: float = 10.0,
        wait_for_server: bool | float = False,
        expect: Mapping[str, PolicyContract] | None = None,
        shadow: str | None = None,
        on_shadow: OnShadow | None = None,
        **settings: Unpack[ClientSettings],
    ) -> None:
        if shadow is not None:
            for place in find_server(shadow):
                load_transport(place.scheme)
        if on_shadow is not None:
            require_plain("on_shadow", on_shadow)
            if shadow is None:
                raise ValueError("on_shadow is called with a shadow's answers: say shadow=, too")
        super().__init__(
            "inference",
            host=host,
            port=port_num,
            transport=transport,
            timeout=timeout,
            wait_for_server=wait_for_server,
            needs=None if expect is None else {EXTENSION: _plain(expect)},
            begins=_RESET,
            stays=False,
            **settings,
        )
        self._shadow: Shadow | None = None
        if shadow is not None:
            alike: Any = {name: settings.get(name) for name in _ALIKE if name in settings}
            self._shadow = Shadow(
                partial(InferenceClient, url=shadow, timeout=timeout, expect=expect, **alike),
                load_codec(settings.get("codec", "msgpack")),
                on_shadow,
            )
            self._close_by(partial(_stop_both, self._shadow, self._close))

    def interfaces(self) -> list[str]:
        """The names that can be called, sorted."""
        names = self._client.call(_LIST, None)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Malformed(f"the server's interfaces are a list of names, not {shown(names)}")
        return names

    def contract(self, name: str) -> PolicyContract | None:
        """Return what an interface takes and gives; None if the server doesn't state it.

        Raises:
            UnknownInterface: no function of that name.
        """
        plain = self._client.call(_CONTRACT, name)
        return None if plain is None else PolicyContract.from_plain(plain)

    def reset(self, episode: str | None = None, timeout: float | None = None) -> str:
        """Begin an episode: the server forgets what its functions keep about this client.

        Calls that were made before are answered as if this had come after them.

        Args:
            episode: its id, at most 200 characters; random by default.
            timeout: seconds; the client's own by default.

        Returns:
            The id.
        """
        chosen = _chosen(episode)
        return _begun(chosen, self._shadow, self._client.call(_RESET, chosen, timeout))

    def reset_async(self, episode: str | None = None, timeout: float | None = None) -> Future[str]:
        """Begin an episode, and return a future of what `reset` returns or raises."""
        chosen = _chosen(episode)
        asked = self._client.call_async(_RESET, chosen, timeout)
        return checked(asked, partial(_begun, chosen, self._shadow))

    @overload
    def call(
        self,
        name: str,
        payload: Any,
        timeout: float | None = None,
        *,
        timing: Literal[False] = False,
    ) -> Any: ...

    @overload
    def call(
        self, name: str, payload: Any, timeout: float | None = None, *, timing: Literal[True]
    ) -> tuple[Any, Timing]: ...

    def call(
        self, name: str, payload: Any, timeout: float | None = None, *, timing: bool = False
    ) -> Any:
        """Call a function of the server and return its result.

        The payload's arrays may be changed when this returns, and when it raises.

        Args:
            name: as registered.
            payload: any value that the codec carries.
            timeout: seconds; the client's own by default.
            timing: whether to return the result and a `Timing`, which tells how it was served.

        Raises:
            RemoteError: the function raised; it carries the far side's traceback.
            UnknownInterface: no function of that name; the text lists those known.
            Malformed: the payload doesn't fit the interface's contract; the text says where.
            ConfigMismatch: the contract is no longer what this client expects; nothing was run.
            NotEncodable: the payload can't be carried; the text gives the path to what can't.
            DeadlineExceeded: no answer in time.
            Unreachable: nobody serves there, or the connection was lost under way.
        """
        if timing:
            result, served = self._client.call_timed(name, payload, timeout)
        else:
            result, served = self._client.call(name, payload, timeout), None
        if self._shadow is not None:
            self._shadow.ask(name, payload, result)
        return (result, served) if timing else result

    def call_async(self, name: str, payload: Any, timeout: float | None = None) -> Future[Any]:
        """Call a function and return a future, whose result or exception is what `call`'s is.

        The payload's arrays may be changed when this returns. The future's own callbacks run in
        the transport's thread: keep them short. Once it has a result, its attribute ``timing`` is
        a `Timing`.
        """
        future = self._client.call_async(name, payload, timeout)
        if self._shadow is not None:
            return self._shadow.follow(future, name, payload)
        return future

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``replies_copied``, see `ServiceClient.stats`, and ``shadow``.

        The latter where there is one: ``connected``; ``asked``, ``answered``, ``failed`` by error,
        and ``skipped``, as it was busy or away; ``last_error``, a text, or None as long as it
        answers; ``different_structure``, answers that have other keys, lengths or shapes; and
        ``differences`` by places such as ``"policy['actions']"``: the greatest and the mean
        absolute difference of all that were compared, and the greatest of the last one, as ``max``,
        ``mean`` and ``last``. What is no number counts as 0 where it is equal, and as 1 where not.
        Of 1,000 places at most; ``leaves_left_out`` counts beyond.
        """
        counts: dict[str, Any] = {**super().stats()}
        if self._shadow is not None:
            counts["shadow"] = self._shadow.stats()
        return counts
