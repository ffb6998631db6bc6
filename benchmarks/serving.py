"""Serve a policy to many robots: one function in batches, one at a time, and called directly.

    python benchmarks/serving.py [--policy sleep|transformer] [--clients 32] [--json FILE]

``sleep`` costs ``--fixed`` + rows x ``--each`` seconds, without the GIL. ``transformer`` is a
policy in JAX, on whatever device there is: two cameras of 224x224 as patches, ``--layers`` of width
``--width`` over 392 tokens, and an action chunk of 50 x 14. Clients call in a closed loop, from
``--processes`` processes; a round has its own server and clients.

- **direct**: the function, called with full batches in a process of its own, time after time;
  images come from numpy arrays, and actions end as such. It bounds what a server can do.
- **raw zmq** (of ``sleep``): a ROUTER that waits for a call of each client, runs them as one, and
  answers; it packs as edgeml does. What machine, clients and turnaround leave of the bound.
- **batched**: ``register_interface(..., batching=Batching(max_size))``; **one by one**: without.
- **batches of k** (``--best``): a server that waits until it has just k calls, of each k.

``share`` is the rate as a share of direct calls' in full batches. ``lone`` is what one client's
call takes as a multiple of a direct call with one row, and ``lone vs plain`` of one that isn't
batched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from common import (
    Array,
    Child,
    Row,
    Table,
    call_together,
    interleaved,
    medians,
    parser,
    save,
    time_together,
    transports,
)
from edgeml.core import Message, load_codec
from edgeml.services import InferenceClient, InferenceServer
from edgeml.services.batching import Batching

CHUNK = (50, 14)

Function = Callable[[Any], Any]
Settings = dict[str, Any]


# Policies ---------------------------------------------------------------------------------


def make_function(settings: Settings) -> Function:
    """The policy: a batch of observations to a batch of action chunks."""
    if settings["policy"] == "transformer":
        return make_transformer(settings["layers"], settings["width"])
    fixed, each = settings["fixed"], settings["each"]

    def sleep(batch: Any) -> Any:
        state = batch["state"]
        time.sleep(fixed + each * len(state))
        return {"actions": np.zeros((len(state), *CHUNK), np.float32), "number": state[:, 0]}

    return sleep


def make_observation(policy: str, number: int) -> dict[str, Array]:
    state = np.full(CHUNK[1], number, np.float32)
    if policy == "sleep":
        return {"state": state}
    rng = np.random.default_rng(number)
    cameras = rng.integers(0, 256, (2, 224, 224, 3), np.uint8)
    return {"state": state, "left": cameras[0], "right": cameras[1]}


def make_transformer(layers: int, width: int) -> Function:
    import jax
    import jax.numpy as jnp

    heads, patch = width // 64, 16
    keys = iter(jax.random.split(jax.random.key(0), 4 + 4 * layers))

    def weights(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) / np.sqrt(shape[0]).astype("f4")

    parameters = {
        "embed": weights(patch * patch * 3, width),
        "state": weights(CHUNK[1], width),
        "head": weights(width, CHUNK[0] * CHUNK[1]),
        "layers": [
            {
                "qkv": weights(width, 3 * width),
                "out": weights(width, width),
                "up": weights(width, 4 * width),
                "down": weights(4 * width, width),
            }
            for _ in range(layers)
        ],
    }
    parameters = jax.tree.map(lambda w: w.astype(jnp.bfloat16), parameters)

    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))

    @jax.jit
    def forward(parameters: Any, batch: Any) -> Any:
        images = jnp.stack([batch["left"], batch["right"]], 1)
        rows = images.shape[0]
        grid = images.reshape(rows, 2, 14, patch, 14, patch, 3).transpose(0, 1, 2, 4, 3, 5, 6)
        tokens = grid.reshape(rows, 392, -1).astype(jnp.bfloat16) / 255
        x = tokens @ parameters["embed"]
        x = x + (batch["state"].astype(jnp.bfloat16) @ parameters["state"])[:, None]
        for layer in parameters["layers"]:
            y = norm(x).astype(jnp.bfloat16) @ layer["qkv"]
            q, k, v = jnp.split(y.reshape(rows, 392, 3 * heads, 64), 3, axis=2)
            z = jax.nn.dot_product_attention(q, k, v).reshape(rows, 392, width)
            x = x + z @ layer["out"]
            x = x + jax.nn.gelu(norm(x).astype(jnp.bfloat16) @ layer["up"]) @ layer["down"]
        chunk = (jnp.mean(x, 1) @ parameters["head"]).reshape(rows, *CHUNK)
        return {"actions": chunk.astype(jnp.float32), "number": batch["state"][:, 0]}

    def policy(batch: Any) -> Any:
        return jax.tree.map(np.asarray, forward(parameters, batch))

    return policy


def stack(observations: list[dict[str, Array]]) -> dict[str, Array]:
    return {key: np.stack([each[key] for each in observations]) for key in observations[0]}


# Servers, each in a process of its own ------------------------------------------------------


def time_direct(pipe: Connection, settings: Settings) -> None:
    """Call the function directly, and tell seconds a call by number of rows."""
    function = make_function(settings)
    times = {}
    for rows in sorted({1, settings["clients"]}):
        batch = stack([make_observation(settings["policy"], n) for n in range(rows)])
        for _ in range(3):
            function(batch)
        took = []
        end = time.monotonic() + settings["seconds"] / 2
        while time.monotonic() < end:
            began = time.perf_counter()
            function(batch)
            took.append(time.perf_counter() - began)
        times[rows] = float(np.median(took))
    pipe.send(times)


def serve(pipe: Connection, settings: Settings, transport: str, batching: Batching | None) -> None:
    function = make_function(settings)
    server = InferenceServer(0, transport=transport)
    if batching is None:

        def one(observation: Any) -> Any:
            result = function({key: value[None] for key, value in observation.items()})
            return {key: value[0] for key, value in result.items()}

        server.register_interface("policy", one)
        one(make_observation(settings["policy"], 0))
    else:
        server.register_interface("policy", function, batching=batching)
        server.warmup("policy", make_observation(settings["policy"], 0))
    with server:
        server.start(threaded=True)
        pipe.send(server.url)
        with suppress(EOFError):
            pipe.recv()


def serve_raw(pipe: Connection, settings: Settings) -> None:
    import zmq

    codec, function = load_codec("msgpack"), make_function(settings)
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    pipe.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
    while True:
        asked: list[tuple[bytes, Any]] = []
        while len(asked) < settings["clients"] and (router.poll(200) or not asked):
            client, header, *frames = router.recv_multipart()
            value = codec.decode(Message(header, [memoryview(frame) for frame in frames]))
            asked.append((client, value))
        result = function(stack([value for _, value in asked]))
        for row, (client, _) in enumerate(asked):
            reply = codec.encode({key: column[row] for key, column in result.items()})
            router.send_multipart([client, reply.header, *reply.buffers])


# Clients ------------------------------------------------------------------------------------


class RawClient:
    def __init__(self, url: str) -> None:
        import zmq

        self._codec = load_codec("msgpack")
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(url)

    def call(self, name: str, payload: Any) -> Any:
        request = self._codec.encode(payload)
        self._socket.send_multipart([request.header, *request.buffers])
        header, *frames = self._socket.recv_multipart()
        return self._codec.decode(Message(header, [memoryview(frame) for frame in frames]))

    def stop(self) -> None:
        self._socket.close(linger=0)


def call_on(pipe: Connection, policy: str, url: str, numbers: list[int]) -> None:
    """Run as a child: clients of one server."""

    @contextmanager
    def client_of(number: int) -> Iterator[Callable[[], None]]:
        observation = make_observation(policy, number)
        client: Any = (
            RawClient(url)
            if url.startswith("tcp")
            else InferenceClient(url=url, wait_for_server=300)
        )

        def call() -> None:
            if client.call("policy", observation)["number"] != number:
                raise ValueError(f"client {number} got another's answer")

        try:
            yield call
        finally:
            client.stop()

    call_together(pipe, [partial(client_of, number) for number in numbers], patience=300)


def one_round(server: Child, settings: Settings, clients: int) -> Row:
    url = server.receive(timeout=600)
    processes = min(clients, settings["processes"])
    shares = [list(range(n, clients, processes)) for n in range(processes)]
    children = [Child(call_on, settings["policy"], url, share) for share in shares]
    return time_together(server, children, settings["seconds"], patience=300)


def measure(
    settings: Settings, name: str, batching: Batching | None, clients: int, direct: dict[int, float]
) -> Row:
    if name == "raw zmq":
        child = Child(serve_raw, settings)
    else:
        child = Child(serve, settings, name, batching)
    with closing(child) as server:
        row = one_round(server, settings, clients)
    most = max(direct)
    row["share"] = row["calls_per_s"] / (most / direct[most])
    row["p99_in_batches"] = row["p99_ms"] / 1e3 / direct[most]
    if clients == 1:
        row["lone"] = row["p50_ms"] / 1e3 / direct[1]
    return row


def main() -> None:
    options = parser(__doc__, transports(), rounds=3)
    options.add_argument("--policy", choices=("sleep", "transformer"), default="sleep")
    options.add_argument("--fixed", type=float, default=0.02, help="seconds of a batch (sleep)")
    options.add_argument("--each", type=float, default=0.0, help="seconds of a row more (sleep)")
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--processes", type=int, default=4)
    options.add_argument("--seconds", type=float, default=4.0, help="length of a round")
    options.add_argument("--best", action="store_true", help="look for the best fixed batch size")
    given = options.parse_args()
    settings = vars(given)
    with closing(Child(time_direct, settings)) as child:
        direct: dict[int, float] = child.receive(timeout=600)
    for rows, seconds in direct.items():
        print(f"direct, {rows} rows: {seconds * 1e3:.2f} ms, {rows / seconds:.0f} rows/s")
    most = given.clients
    # Each case: transport or peer, how it is batched, how many clients.
    cases: dict[str, tuple[str, Batching | None, int]] = {}
    if given.policy == "sleep":
        cases["raw zmq"] = "raw zmq", None, most
    for name in given.peers:
        cases[f"{name} batched"] = name, Batching(max_size=most), most
        cases[f"{name} one by one"] = name, None, most
        cases[f"{name} lone, batched"] = name, Batching(max_size=most), 1
        cases[f"{name} lone, plain"] = name, None, 1
    if given.best:
        for size in [1 << i for i in range(most.bit_length()) if 1 << i <= most]:
            fixed = Batching(max_size=size, max_delay=1.0, sizes=[size])
            cases[f"{given.peers[0]} batches of {size}"] = given.peers[0], fixed, most
    kept: dict[str, list[Row]] = {name: [] for name in cases}
    for case in interleaved(cases, given.rounds):
        kept[case].append(measure(settings, *cases[case], direct))
    table = Table(
        22,
        calls_per_s="11.0",
        share="6.3",
        p50_ms="8.2",
        p99_ms="8.2",
        p99_in_batches="15.2",
        lone="6.3",
        lone_vs_plain="14.3",
    )
    results = {name: medians(rows) for name, rows in kept.items()}
    for case, row in results.items():
        if case.endswith("lone, batched"):
            plain = results[case.replace("lone, batched", "lone, plain")]
            row["lone_vs_plain"] = row["p50_ms"] / plain["p50_ms"]
        table.add(case, row=row)
    save(given, {"direct": direct, "cases": results})


if __name__ == "__main__":
    main()
