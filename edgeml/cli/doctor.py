"""``edgeml doctor``: what works on this machine, what limits it, and whether a server answers."""

from __future__ import annotations

import itertools
import platform
import resource
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime

import numpy as np

from edgeml import __version__
from edgeml.cli.probe import (
    ACK,
    DESCRIPTORS,
    NO_KEYS,
    ask,
    one_line,
    serve_elsewhere,
    serve_here,
)
from edgeml.core import (
    Door,
    EdgemlError,
    Malformed,
    PermissionDenied,
    Transport,
    Unreachable,
    Url,
    load_door,
    load_transport,
)
from edgeml.core.plugins import find
from edgeml.core.security import Credentials, CredentialsLike
from edgeml.core.url import resolve
from edgeml.core.wire import IDLE, PROTOCOL, SILENCE, TICK
from edgeml.services import InferenceClient, InferenceServer

__all__ = ["run"]

_CLIENTS = 4  # that are connected to see what one takes
_PICTURE = 300_000  # bytes that each of them sends
_SETTLED = 3.0  # seconds that they may take to open all that they need
_FEW = 4096  # open files; less is soon used up by a server
_PLENTY = 65536  # open files to advise where the system sets no bound


def run(
    transports: Sequence[str] | None,
    urls: Sequence[Url],
    timeout: float,
    credentials: CredentialsLike = None,
) -> int:
    """Look at everything and print it; 1 if something doesn't work.

    Args:
        transports: names; all that are installed by default.
        urls: servers to ask.
        timeout: seconds that connecting, and then an answer, may take.
        credentials: to look at, and for the servers if they are a client's; those of the
            environment by default.
    """
    print(f"edgeml {__version__}, protocol {PROTOCOL}")
    print(f"Python {platform.python_version()}, numpy {np.__version__}")
    print(platform.platform())
    names = transports or sorted({each.name for each in find("transport")})
    print("\nTransports: a server and a client, in this process and then in two")
    needs = {}
    works = True
    usable = []
    for name in names:
        here, need = _try_transport(name, timeout)
        works &= here
        usable += [name] * here
        if need is not None:
            needs[name] = need
    if usable and (doors := sorted({each.name for each in find("door")})):
        print("\nDoors for other people's clients: opened and closed again")
        for name in doors:
            works &= _try_door(name, usable[0])
    print("\nOpen files")
    _tell_open_files(needs)
    works &= _tell_keys(credentials)
    if urls:
        print("\nServers")
    for url in itertools.chain.from_iterable(resolve(str(url), "", 0) for url in urls):
        works &= _ask_server(url, timeout, credentials)
    if not works:
        print("\nNot everything works; see FAILED above")
    return 0 if works else 1


# Transports -------------------------------------------------------------------------------


def _try_transport(name: str, timeout: float) -> tuple[bool, tuple[int, int] | None]:
    """Try one; whether it works, and the descriptors that a server and each client take there."""
    need = None
    try:
        with serve_here(name) as url:
            said = f"ok, round trip {_show(ask(url, timeout).best)} in this process"
        try:
            with serve_elsewhere(name) as (url, base):
                said += f", {_show(ask(url, timeout).best)} between two"
                need = _count_descriptors(url, base, timeout)
        except Unreachable as error:
            said += f", within one process only ({one_line(error)})"
    except Exception as error:  # a transport may be anybody's
        print(f"  {name:<8} FAILED: {one_line(error)}")
        return False, None
    _tell_report(name, said, load_transport(name))
    return True, need


def _try_door(name: str, transport: str) -> bool:
    """Open a door of a server for a moment; whether it works."""
    try:
        with InferenceServer(0, transport=transport, credentials=NO_KEYS) as server:
            server.register_interface("policy", lambda observation: observation)
            server.open_door(f"{name}://127.0.0.1:0")
            server.start(threaded=True)
            url = server.doors()[0]
    except Exception as error:  # a door may be anybody's
        print(f"  {name:<8} FAILED: {one_line(error)}")
        return False
    _tell_report(name, f"ok, listened at {url}", load_door(name))
    return True


def _tell_report(name: str, said: str, plugin: Transport | Door) -> None:
    print(f"  {name:<8} {said}")
    try:
        report = plugin.report()
    except Exception as error:
        report = {"of itself it can't tell": one_line(error)}
    for key, value in report.items():
        print(f"           {key}: {value}")


def _count_descriptors(url: Url, base: int, timeout: float) -> tuple[int, int] | None:
    """How many a server has open without clients, and how many more each client takes there."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                InferenceClient("", 0, str(url), timeout=timeout, credentials=NO_KEYS)
            )
            for _ in range(_CLIENTS)
        ]
        for client in clients:  # memory that is shared has a descriptor too
            client.call(ACK, np.zeros(_PICTURE, np.uint8))
        time.sleep(SILENCE * IDLE + TICK)  # heartbeats, which have a connection, begin
        deadline = time.monotonic() + _SETTLED
        seen: list[int] = [base]
        while len(seen) < 3 or len(set(seen[-3:])) > 1:
            if time.monotonic() > deadline:
                break
            seen.append(max(client.call(DESCRIPTORS, None) for client in clients))
            time.sleep(0.02)
    each = round((seen[-1] - base) / _CLIENTS)
    return (base, each) if base and each > 0 else None


# Limits -----------------------------------------------------------------------------------


def _tell_open_files(needs: dict[str, tuple[int, int]]) -> None:
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    told = ["unlimited" if limit is None else str(limit) for limit in (soft, hard)]
    print("  connections and pieces of shared memory take one each, or more")
    print(f"  a process may have {told[0]} (soft limit), and raise that to {told[1]} (hard limit)")
    for name, (base, each) in needs.items():
        many = "any number of" if soft is None else f"about {_round_down((soft - base) // each)}"
        print(f"  {name}: a client of one thread takes {each} at the server: {many} clients")
    most = hard or _PLENTY
    if soft is not None and soft < most:
        print(f"  for more, say this in the server's shell before it starts: ulimit -n {most}")
    elif soft is not None and soft < _FEW:
        print("  which is few: `ulimit -n` can't raise it, but root can (limits.conf, systemd's")
        print("  LimitNOFILE=, docker run --ulimit nofile=65536)")


def _round_down(number: int) -> int:
    """A number to two digits, rounded down."""
    scale: int = 10 ** max(0, len(str(number)) - 2)
    return max(0, number // scale) * scale


# Keys -------------------------------------------------------------------------------------


def _tell_keys(credentials: CredentialsLike) -> bool:
    """Print whose keys there are, if any; whether they can be used."""
    try:
        keys = Credentials.resolve(credentials)
    except (EdgemlError, OSError, ValueError) as error:
        print(f"\nKeys\n  FAILED: {one_line(error)}")
        return False
    if keys is None:
        return True
    parts = {"CURVE": keys.curve, "certificate": keys.tls, "token": keys.token}
    has = ", ".join(name for name, part in parts.items() if part is not None)
    print("\nKeys")
    if keys.clients is None:
        print(f"  those of the client {_escape(keys.name)}: {has}")
        return True
    print(f"  those of a server: {has}; it lets in {len(keys.clients.names()) or 'nobody yet'}")
    for name in keys.clients.names():
        try:
            key = keys.clients.by_name(name)
        except PermissionDenied as error:
            print(f"  {_escape(name)}: {one_line(error)}")
        else:
            until = (
                "" if key.expires is None else f", until {datetime.fromtimestamp(key.expires):%F}"
            )
            print(f"  {_escape(name)}: may do {_escape(str(key.role))}{until}")
    return True


# Servers ----------------------------------------------------------------------------------


def _ask_server(url: Url, timeout: float, credentials: CredentialsLike) -> bool:
    try:
        answer = ask(url, timeout, credentials)
    except Malformed as error:
        print(f"  {url}  FAILED: what answers is no edgeml server, or an old one ({error})")
        return False
    except Exception as error:  # a transport may be anybody's
        print(f"  {url}  FAILED: {one_line(error)}")
        return False
    if answer.protocol != PROTOCOL:
        print(
            f"  {url}  FAILED: this {answer.service} server speaks protocol {answer.protocol}, "
            f"and edgeml {__version__} here speaks {PROTOCOL}: bring both to one version"
        )
        return False
    state = _escape(str(answer.state))
    print(f"  {url}  ok, {answer.service} server, protocol {answer.protocol}, {state}")
    print(f"      round trip {_show(answer.typical)} (median), {_show(answer.best)} (best)")
    off = f"{_show(abs(answer.ahead))} {'ahead of' if answer.ahead >= 0 else 'behind'} ours"
    print(f"      its clock is {off}, give or take {_show(answer.best / 2)}")
    if answer.service == "inference" and answer.state.state == "ready":
        _tell_contracts(url, timeout, credentials)
    return True


def _tell_contracts(url: Url, timeout: float, credentials: CredentialsLike) -> None:
    """Print what the server's policies take and give; whoever isn't let in sees why."""
    try:
        with InferenceClient(url=str(url), timeout=timeout, credentials=credentials) as client:
            for name in client.interfaces():
                contract = client.contract(name)
                print(f"      interface {name!r}{'' if contract else ', without a contract'}")
                for line in contract.describe() if contract else ():
                    print(f"          {line}")
    except Exception as error:  # as above
        print(f"      its contracts can't be had: {_escape(one_line(error))}")


def _escape(text: str) -> str:
    """A text of a server's that moves no terminal."""
    return text if text.isprintable() else ascii(text)


def _show(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.3f} s"
