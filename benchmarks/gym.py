"""Time steps of a remote CartPole beside the raw round trip of the same bytes, in one run.

    python benchmarks/gym.py [--peers zmq shm grpc] [--rounds 9] [--json FILE]

For each transport a server's process runs the environment, and beside it an endpoint of the bare
transport, which answers at once with as many bytes as a step's reply has; a client's process takes
rounds of each in turn. What is printed are medians over rounds, of times in microseconds, and their
ratios to the raw round trip. `call` is a call of a function that returns such a reply at once,
`by hand` one that steps the environment and does nothing else; `local` is the environment in this
process, whose step is part of what the remote one takes.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from common import Child, Row, Table, interleaved, medians, parser, save, transports

_STEPS = 2000  # in a round
_REPLY = [np.zeros(4, np.float32), 1.0, False, False]
_KINDS = ("raw", "call", "by hand", "remote", "local")


def _sizes() -> tuple[int, int]:
    """Bytes of a step's request and of its reply, envelopes and all."""
    from edgeml.core import load_codec, wire

    codec = load_codec("msgpack")
    body, answer = codec.encode(1).header, codec.encode(_REPLY).header
    request = wire.pack(wire.Request(wire.CALL, bytes(16), "/env/step", 59.9, body))
    return len(request), len(wire.pack(wire.Answer(wire.OK, answer)))


def serve(pipe: Connection, name: str) -> None:
    """Run as a child: the environment, and the bare transport."""
    from edgeml.core import Message, Url, load_transport
    from edgeml.gym import EnvServer

    reply = Message(secrets.token_bytes(_sizes()[1]))
    anywhere = Url(name, "127.0.0.1", 0)
    endpoint = load_transport(name).serve(anywhere, lambda _, answer: answer(reply))
    make = functools.partial(gymnasium.make, "CartPole-v1")
    with endpoint, EnvServer(make, 0, transport=name) as server:
        server.register_interface("reply", lambda _: _REPLY)
        server.register_interface("by hand", _by_hand(make()))
        server.start(threaded=True)
        pipe.send((str(endpoint.url), server.url))
        pipe.poll(None)


def _by_hand(env: Any) -> Callable[[Any], Any]:
    env.reset(seed=0)

    def step(action: Any) -> list[Any]:
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
        return [observation, reward, terminated, truncated]

    return step


def client(pipe: Connection, name: str, raw_url: str, url: str) -> None:
    """Run as a child: for each kind that comes, take a round of it, and send the times."""
    import edgeml.gym  # noqa: F401 - registers the remote environment
    from edgeml.core import Message, Url, load_transport

    request = Message(secrets.token_bytes(_sizes()[0]))
    requester = load_transport(name).connect(Url.parse(raw_url), 10.0)
    remote: Any = gymnasium.make("edgeml/Remote-v0", url=url)
    local = gymnasium.make("CartPole-v1")
    call = remote.unwrapped.client.call
    rounds: dict[str, Callable[[], list[float]]] = {
        "raw": lambda: _times(lambda: requester.call(request, 10.0)),
        "call": lambda: _times(lambda: call("reply", 1)),
        "by hand": lambda: _times(lambda: call("by hand", 1)),
        "remote": lambda: _steps(remote),
        "local": lambda: _steps(local),
    }
    pipe.send("ready")
    try:
        while True:
            pipe.send(rounds[pipe.recv()]())
    except EOFError:
        remote.close()
        requester.close()


def _times(function: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times


def _steps(env: Any) -> list[float]:
    env.reset(seed=0)
    times = []
    for number in range(_STEPS):
        began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(number % 2)
        times.append(time.perf_counter() - began)
        if terminated or truncated:
            env.reset()
    return times


def measure(name: str, rounds: int) -> dict[str, Row]:
    """Medians over rounds of what each kind takes over one transport, in microseconds."""
    server = Child(serve, name)
    stepper = Child(client, name, *server.receive())
    stepper.receive()
    kept: dict[str, list[Row]] = {kind: [] for kind in _KINDS}
    try:
        for number, kind in enumerate(interleaved(_KINDS, rounds + 1)):
            stepper.pipe.send(kind)
            times = stepper.receive()
            if number >= len(_KINDS):  # the first round warms up
                row = {"p50_us": float(np.median(times)) * 1e6, "per_s": len(times) / sum(times)}
                kept[kind].append(row)
    finally:
        stepper.close()
        server.close()
    rows = {kind: medians(kept[kind]) for kind in _KINDS}
    for row in rows.values():
        row["p50_us_ratio"] = row["p50_us"] / rows["raw"]["p50_us"]
        row["per_s_ratio"] = rows["raw"]["per_s"] / row["per_s"]
    return rows


def main() -> None:
    options = parser(__doc__, transports(), rounds=9).parse_args()
    table = Table(6, 8, p50_us="9.1", p50_us_ratio="6.2", per_s="9.0", per_s_ratio="6.2")
    results = {}
    for name in options.peers:
        results[name] = measure(name, options.rounds)
        for kind, row in results[name].items():
            table.add(name, kind, row=row)
    save(options, results)


if __name__ == "__main__":
    main()
