"""Clients of replicas, as a role of `zygote`: each calls again as soon as it has its answer.

Options: ``url``, ``history``, ``log``, ``clients`` (their numbers), ``timeout`` (of a call) and
``breaks``. The first answer is that all have been answered once. Orders: ``stop``.
"""

from __future__ import annotations

import itertools
import random
import socket
import threading
from typing import Any

from .history import Writer
from .witness import watch


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Call until told to stop."""
    from .replicas_breaks import BREAKS

    if options["breaks"] in BREAKS:
        BREAKS[options["breaks"]]()
    history = Writer(options["history"])
    watch(history)
    over = threading.Event()
    there = [threading.Event() for _ in options["clients"]]
    threads = [
        threading.Thread(target=_call, args=(number, options, history, over, answered))
        for number, answered in zip(options["clients"], there, strict=True)
    ]
    for thread in threads:
        thread.start()
    for answered in there:
        answered.wait()
    orders.send(b"null")
    orders.recv(1 << 16)
    over.set()
    for thread in threads:
        thread.join()
    history.tell("end")
    orders.send(b"null")


def _call(
    number: int,
    options: dict[str, Any],
    history: Writer,
    over: threading.Event,
    answered: threading.Event,
) -> None:
    from edgeml import InferenceClient

    rng = random.Random(f"{options['life']} {number}")
    with InferenceClient(
        url=options["url"], timeout=options["timeout"], client_id=f"robot-{number}"
    ) as client:
        for n in itertools.count():
            if over.is_set():
                return
            burst = rng.choice([1, 1, 1, 3])  # under way at a time
            calls = [f"{number}-{n}-{k}" for k in range(burst)]
            timeout = options["timeout"] * rng.uniform(0.5, 1.0)
            for call in calls:
                history.tell("ask", call=call, timeout=timeout)
            if burst == 1:
                _note(history, calls[0], lambda: client.call("policy", calls[0], timeout))  # noqa: B023
            else:
                futures = [client.call_async("policy", call, timeout) for call in calls]
                for call, future in zip(calls, futures, strict=True):
                    _note(history, call, future.result)
            answered.set()


def _note(history: Writer, call: str, result: Any) -> None:
    """Tell what came of a call."""
    from edgeml.core.errors import EdgemlError, NotCarriedOut, NotReady, Overloaded

    try:
        answer = result()
    except EdgemlError as error:
        unharmed = isinstance(error, (NotCarriedOut, NotReady, Overloaded))
        kind = type(error).__name__
        history.tell("fail", call=call, error=kind, unharmed=unharmed, text=str(error))
    else:
        history.tell("answer", call=call, **{f"its_{k}": v for k, v in answer.items()})
