"""``edgeml bench``: a short measurement of this machine, or of the link between two."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from edgeml.cli.probe import (
    ACK,
    NO_KEYS,
    ask,
    make_server,
    one_line,
    serve_elsewhere,
    serve_here,
)
from edgeml.core import ConfigMismatch, EdgemlError, UnknownInterface, Unreachable, Url
from edgeml.core.plugins import find
from edgeml.core.security import Credentials, CredentialsLike
from edgeml.core.url import resolve
from edgeml.services import InferenceClient

__all__ = ["run", "serve"]

_UNDER_WAY = 4  # calls at a time where throughput is measured
_WARM = 5  # calls before it counts
_HERE = 5.0  # seconds that a server in this process may take to answer


def run(
    transports: Sequence[str] | None,
    url: Url | None,
    sizes: Sequence[int],
    seconds: float,
    timeout: float,
    credentials: CredentialsLike = None,
) -> int:
    """Measure and print a table; 1 if something could not be measured.

    Args:
        transports: names; all that are installed by default.
        url: a server of `serve` to measure instead.
        sizes: of the payloads, in bytes.
        seconds: how long to measure each size.
        timeout: seconds that connecting, or a call, may take.
        credentials: a client's, for `url`; those of the environment by default.
    """
    print(
        f"{'transport':<10}{'payload':>9}{'p50 ms':>10}{'p99 ms':>10}{'calls/s':>10}{'MB/s':>9}",
        flush=True,
    )
    if url is not None:
        works = _measure_sizes(url, sizes, seconds, timeout, credentials)
    else:
        works = True
        for name in transports or sorted({each.name for each in find("transport")}):
            works &= _local(name, sizes, seconds, timeout, asked_for=bool(transports))
    print(
        "\np50, p99: round trips, one call after the other; calls/s, MB/s: payload to the server "
        f"with {_UNDER_WAY} calls under way"
    )
    return 0 if works else 1


def _local(
    name: str, sizes: Sequence[int], seconds: float, timeout: float, asked_for: bool
) -> bool:
    """Measure a transport to a server in another process."""
    try:
        with serve_elsewhere(name) as (url, _):
            try:
                InferenceClient(url=str(url), timeout=timeout, credentials=NO_KEYS).stop()
            except Unreachable:
                if not _works_here(name):
                    raise
                print(f"{name:<10}left out: it works within one process only")
                return not asked_for
            return _measure_sizes(url, sizes, seconds, timeout, NO_KEYS)
    except Exception as error:  # a transport may be anybody's
        print(f"{name:<10}FAILED: {one_line(error)}")
        return False


def _works_here(name: str) -> bool:
    try:
        with serve_here(name) as url:
            ask(url, _HERE)
    except Exception:
        return False
    return True


def _measure_sizes(
    url: Url, sizes: Sequence[int], seconds: float, timeout: float, credentials: CredentialsLike
) -> bool:
    """Print a row for each size; whether all could be measured."""
    works = True
    try:
        with InferenceClient(url=str(url), timeout=timeout, credentials=credentials) as client:
            for size in sizes:
                try:
                    row = _row(client, size, seconds)
                except UnknownInterface:
                    raise
                except EdgemlError as error:  # of one size: too large, or too slow
                    row = f"   FAILED: {one_line(error)}"
                    works = False
                print(f"{url.scheme:<10}{_size(size):>9}{row}", flush=True)
    except (UnknownInterface, ConfigMismatch) as error:
        why = f"what serves at {url} is no `edgeml bench serve` ({one_line(error)})"
        print(f"{url.scheme:<10}FAILED: {why}")
        return False
    except Exception as error:  # a transport may be anybody's
        print(f"{url.scheme:<10}FAILED: {one_line(error)}")
        return False
    return works


def _row(client: InferenceClient, size: int, seconds: float) -> str:
    payload = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    for _ in range(_WARM):
        client.call(ACK, payload)
    times: list[float] = []
    end = time.perf_counter() + seconds / 2
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        client.call(ACK, payload)
        times.append(time.perf_counter() - began)
    p50, p99 = np.percentile(times, (50, 99)) * 1e3

    under_way: deque[Future[Any]] = deque()
    calls = 0
    began = now = time.perf_counter()
    while not calls or now < began + seconds / 2:
        while len(under_way) < _UNDER_WAY:
            under_way.append(client.call_async(ACK, payload))
        under_way.popleft().result()
        calls += 1
        now = time.perf_counter()
    rate = calls / (now - began)
    for future in under_way:
        future.result()
    return f"{p50:>10.3f}{p99:>10.3f}{rate:>10.0f}{rate * size / 1e6:>9.1f}"


def _size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


def serve(transport: str | None, host: str, port: int, credentials: CredentialsLike = None) -> int:
    """Serve what `run` measures, until Ctrl-C; 0 then.

    Args:
        transport: as for any server.
        host: where to listen.
        port: 0 lets the system pick one.
        credentials: a server's; those of the environment by default.

    Raises:
        OSError: the port is taken.
        PluginError: the transport isn't installed, or is broken.
    """
    keys = Credentials.resolve(credentials)
    with make_server(transport, host, port, keys or NO_KEYS) as server:
        try:
            server.start(threaded=True)
            first = Url.parse(server.url)
            for url in resolve(transport, host, port):
                at = first if url.path else replace(first, scheme=url.scheme)
                print(f"serving; measure it with: edgeml bench --url {at}")
            if host in ("127.0.0.1", "localhost"):
                print("only this machine can reach it; --host 0.0.0.0 lets others in")
            elif keys is None:
                print("without keys: whoever reaches the port may call it; see `edgeml keygen`")
            print("Ctrl-C stops it", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
    print("\nstopped")
    return 0
