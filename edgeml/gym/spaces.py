"""Gymnasium's spaces as plain values, and how samples of them travel.

A space is sent as a dict whose ``type`` names it, with what its constructor takes; nothing is
pickled, and what comes is given to the constructors of gymnasium's own spaces alone. Samples
travel as they are, but for a graph's, which a codec would take for a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.spaces import GraphInstance, Space

from edgeml.core import Malformed
from edgeml.core.errors import shown

__all__ = ["action_reader", "packer", "space_from_plain", "space_to_plain", "unpacker"]

Convert = Callable[[Any], Any]

_KNOWN = "Box, Discrete, MultiBinary, MultiDiscrete, Text, Dict, Tuple, Sequence, Graph and OneOf"
_DEEPEST = 24  # of spaces in spaces; the codec's messages nest no deeper than 32


# Spaces -----------------------------------------------------------------------------------


def space_to_plain(space: Space[Any]) -> dict[str, Any]:
    """Return a space as a dict of plain values and arrays, which `space_from_plain` reads.

    The state of its random generator is left out: seed the space where it is sampled.

    Raises:
        TypeError: the space is none of gymnasium's own, or a Dict's keys are neither str nor int.
    """
    return _to_plain(space, "the space", 0)


def _to_plain(space: Any, where: str, depth: int) -> dict[str, Any]:
    kind = type(space)
    if depth > _DEEPEST:
        raise TypeError(f"{where} is nested more than {_DEEPEST} deep, and can't be sent")
    write = _WRITE.get(kind)
    if write is None:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which can't be sent: only "
            f"gymnasium's own are, {_KNOWN}; give the environment a wrapper that has such a one"
        )
    return {"type": kind.__name__, **write(space, where, depth + 1)}


def _box(space: spaces.Box, where: str, depth: int) -> dict[str, Any]:
    return {
        "low": space.low,
        "high": space.high,
        "dtype": space.dtype.name,
        # Of integers, a bound that is missing stands in `low` as the least there is.
        "bounded": [space.bounded_below, space.bounded_above],
    }


def _discrete(space: spaces.Discrete, where: str, depth: int) -> dict[str, Any]:
    dtype = np.dtype(space.dtype).name
    return {"n": int(space.n), "start": int(space.start), "dtype": dtype}


def _multi_binary(space: spaces.MultiBinary, where: str, depth: int) -> dict[str, Any]:
    return {"n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}


def _multi_discrete(space: spaces.MultiDiscrete, where: str, depth: int) -> dict[str, Any]:
    return {"nvec": space.nvec, "start": space.start, "dtype": np.dtype(space.dtype).name}


def _text(space: spaces.Text, where: str, depth: int) -> dict[str, Any]:
    return {
        "min_length": space.min_length,
        "max_length": space.max_length,
        "charset": "".join(space.character_list),
    }


def _dict(space: spaces.Dict, where: str, depth: int) -> dict[str, Any]:
    for key in space.spaces:
        if type(key) not in (str, int):
            raise TypeError(
                f"{where} has the key {shown(key)}, a {type(key).__name__}, and can't be sent: "
                "its keys must be str or int"
            )
    parts = space.spaces.items()
    return {"spaces": [[k, _to_plain(part, f"{where}[{k!r}]", depth)] for k, part in parts]}


def _several(space: Any, where: str, depth: int) -> dict[str, Any]:
    parts = enumerate(space.spaces)
    return {"spaces": [_to_plain(part, f"{where}[{i}]", depth) for i, part in parts]}


def _sequence(space: spaces.Sequence, where: str, depth: int) -> dict[str, Any]:
    return {
        "space": _to_plain(space.feature_space, f"{where}'s feature space", depth),
        "stack": bool(space.stack),
    }


def _graph(space: spaces.Graph, where: str, depth: int) -> dict[str, Any]:
    edges = space.edge_space
    return {
        "nodes": _to_plain(space.node_space, f"{where}'s node space", depth),
        "edges": None if edges is None else _to_plain(edges, f"{where}'s edge space", depth),
    }


_WRITE: dict[type, Callable[[Any, str, int], dict[str, Any]]] = {
    spaces.Box: _box,
    spaces.Discrete: _discrete,
    spaces.MultiBinary: _multi_binary,
    spaces.MultiDiscrete: _multi_discrete,
    spaces.Text: _text,
    spaces.Dict: _dict,
    spaces.Tuple: _several,
    spaces.OneOf: _several,
    spaces.Sequence: _sequence,
    spaces.Graph: _graph,
}


def space_from_plain(plain: Any) -> Space[Any]:
    """Return the space that `space_to_plain` described.

    Raises:
        Malformed: it describes none.
    """
    try:
        read: Convert = _READ[plain["type"]]
        space: Space[Any] = read(plain)
    except Malformed:
        raise
    except Exception as error:  # forged values reach gymnasium's constructors and numpy
        text = f"not the description of a space: {type(error).__name__}: {error}"
        raise Malformed(text[:1000]) from error
    return space


def _read_box(plain: Any) -> Space[Any]:
    # Copied, since the constructor may write to them, and what was received is read-only.
    low, high = np.array(plain["low"]), np.array(plain["high"])
    space = spaces.Box(low, high, low.shape, np.dtype(plain["dtype"]).type)
    below, above = (np.array(each, bool) for each in plain["bounded"])
    if below.shape != space.shape or above.shape != space.shape:
        raise Malformed("a Box whose bounds don't fit its shape")
    space.bounded_below, space.bounded_above = below, above
    return space


def _read_discrete(plain: Any) -> Space[Any]:
    kind = np.dtype(plain["dtype"])
    if kind == np.int64:
        return spaces.Discrete(int(plain["n"]), start=int(plain["start"]))
    return spaces.Discrete(int(plain["n"]), start=int(plain["start"]), dtype=kind.type)


def _read_multi_discrete(plain: Any) -> Space[Any]:
    kind = np.dtype(plain["dtype"])
    return spaces.MultiDiscrete(np.array(plain["nvec"]), kind.type, start=np.array(plain["start"]))


def _read_text(plain: Any) -> Space[Any]:
    return spaces.Text(
        plain["max_length"], min_length=plain["min_length"], charset=plain["charset"]
    )


def _read_dict(plain: Any) -> Space[Any]:
    # As pairs, the keys keep their order, on which flattening depends.
    return spaces.Dict([(key, space_from_plain(part)) for key, part in plain["spaces"]])


def _read_graph(plain: Any) -> Space[Any]:
    edges = plain["edges"]
    return spaces.Graph(
        space_from_plain(plain["nodes"]), None if edges is None else space_from_plain(edges)
    )


_READ: dict[str, Convert] = {
    "Box": _read_box,
    "Discrete": _read_discrete,
    "MultiBinary": lambda plain: spaces.MultiBinary(plain["n"]),
    "MultiDiscrete": _read_multi_discrete,
    "Text": _read_text,
    "Dict": _read_dict,
    "Tuple": lambda plain: spaces.Tuple(tuple(map(space_from_plain, plain["spaces"]))),
    "OneOf": lambda plain: spaces.OneOf(tuple(map(space_from_plain, plain["spaces"]))),
    "Sequence": lambda plain: spaces.Sequence(
        space_from_plain(plain["space"]), stack=bool(plain["stack"])
    ),
    "Graph": _read_graph,
}


# Samples ----------------------------------------------------------------------------------


def packer(space: Space[Any]) -> Convert | None:
    """Return what makes of a sample what is sent for it; None where that is the sample itself."""
    return _converter(space, lambda graph: [graph.nodes, graph.edges, graph.edge_links])


def unpacker(space: Space[Any]) -> Convert | None:
    """Return what makes a sample of what was sent for it; None where that is the sample itself."""
    return _converter(space, lambda sent: GraphInstance(*sent))


def _converter(space: Any, graph: Convert) -> Convert | None:
    if isinstance(space, spaces.Graph):
        return graph
    if isinstance(space, spaces.Sequence):
        each = _converter(space.feature_space, graph)
        return None if each is None else lambda sample: tuple(map(each, sample))
    if not isinstance(space, (spaces.Dict, spaces.Tuple, spaces.OneOf)):
        return None
    inner: Any = space.spaces
    named = isinstance(inner, Mapping)
    pairs = inner.items() if named else enumerate(inner)
    parts = {key: _converter(part, graph) or _same for key, part in pairs}
    if all(part is _same for part in parts.values()):
        return None
    if named:
        return lambda sample: {key: parts[key](value) for key, value in sample.items()}
    if isinstance(space, spaces.OneOf):
        return lambda sample: (sample[0], parts[int(sample[0])](sample[1]))
    return lambda sample: tuple(
        part(value) for part, value in zip(parts.values(), sample, strict=True)
    )


def _same(sample: Any) -> Any:
    return sample


# Actions, which come from the network -----------------------------------------------------


def action_reader(space: Space[Any]) -> Convert:
    """Return what makes an action for the environment of what a client sent for it.

    An action must have the structure, shapes and kinds of number that the space has, and of what
    is counted or written it must be one that the space contains. Bounds of a Box are left to the
    environment, which may clip. Arrays are private copies, which an environment may change.

    It raises `Malformed`, with the place in the action and what the space wants there.
    """
    return _reader(space, "the action")


def _reader(space: Any, where: str) -> Convert:
    if isinstance(space, spaces.Discrete):
        return _discrete_reader(space, where)
    if isinstance(space, (spaces.Box, spaces.MultiBinary, spaces.MultiDiscrete)):
        return _array_reader(space, where)
    if isinstance(space, spaces.Dict):
        return _dict_reader(space, where)
    if isinstance(space, spaces.Tuple):
        return _tuple_reader(space, where)
    if isinstance(space, spaces.OneOf):
        return _one_of_reader(space, where)
    if isinstance(space, spaces.Sequence) and not space.stack:
        each = _reader(space.feature_space, f"an item of {where}")

        def read_sequence(sent: Any) -> Any:
            if not isinstance(sent, (tuple, list)):
                raise _refuse(where, space, sent)
            return tuple(map(each, sent))

        return read_sequence

    def read(sent: Any) -> Any:
        # A graph, a text or a stacked sequence.
        try:
            made = _writable(GraphInstance(*sent) if isinstance(space, spaces.Graph) else sent)
            fits = space.contains(made)
        except Exception:
            fits = False
        if not fits:
            raise _refuse(where, space, sent)
        return made

    return read


def _writable(sample: Any) -> Any:
    if isinstance(sample, np.ndarray):
        return sample.copy()
    if isinstance(sample, GraphInstance):
        return GraphInstance(*map(_writable, sample))
    if isinstance(sample, tuple):
        return tuple(map(_writable, sample))
    if isinstance(sample, dict):
        return {key: _writable(value) for key, value in sample.items()}
    return sample


def _discrete_reader(space: spaces.Discrete, where: str) -> Convert:
    start = int(space.start)
    end = start + int(space.n)

    def read(sent: Any) -> Any:
        if type(sent) is not int and not isinstance(sent, (int, np.integer)):
            whole = isinstance(sent, np.ndarray) and sent.shape == () and sent.dtype.kind in "iu"
            if not whole:
                raise _refuse(where, space, sent)
        if not start <= sent < end:
            raise _refuse(where, space, sent)
        return sent

    return read


def _array_reader(space: Any, where: str) -> Convert:
    shape = space.shape
    kinds = "biuf" if isinstance(space, spaces.Box) else "biu"
    low: Any = None
    high: Any = None
    if isinstance(space, spaces.MultiBinary):
        low, high = 0, 1
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + (space.nvec - 1)

    def read(sent: Any) -> Any:
        if isinstance(sent, np.ndarray):
            made = sent.copy()
        else:
            try:
                made = np.array(sent)
            except Exception as error:
                raise _refuse(where, space, sent) from error
        if made.shape != shape or made.dtype.kind not in kinds:
            raise _refuse(where, space, sent)
        if low is not None and not ((low <= made) & (made <= high)).all():
            raise _refuse(where, space, sent)
        return made

    return read


def _dict_reader(space: spaces.Dict, where: str) -> Convert:
    parts = {key: _reader(part, f"{where}[{key!r}]") for key, part in space.spaces.items()}

    def read(sent: Any) -> Any:
        if not isinstance(sent, dict) or sent.keys() != parts.keys():
            raise _refuse(where, space, sent)
        return {key: part(sent[key]) for key, part in parts.items()}

    return read


def _tuple_reader(space: Any, where: str) -> Convert:
    parts = [_reader(part, f"{where}[{i}]") for i, part in enumerate(space.spaces)]

    def read(sent: Any) -> Any:
        if not isinstance(sent, (tuple, list)) or len(sent) != len(parts):
            raise _refuse(where, space, sent)
        return tuple(part(each) for part, each in zip(parts, sent, strict=True))

    return read


def _one_of_reader(space: Any, where: str) -> Convert:
    parts = [_reader(part, f"{where}[1]") for part in space.spaces]
    index = _discrete_reader(spaces.Discrete(len(parts)), f"{where}[0]")

    def read(sent: Any) -> Any:
        if not isinstance(sent, (tuple, list)) or len(sent) != 2:
            raise _refuse(where, space, sent)
        number = index(sent[0])
        return (number, parts[int(number)](sent[1]))

    return read


def _refuse(where: str, space: Any, sent: Any) -> Malformed:
    got = f"an array of {sent.dtype}, shape {sent.shape}" if _is_large(sent) else shown(sent, 200)
    return Malformed(f"{where} must be of {shown(space, 300)}, not {got}; nothing was done with it")


def _is_large(sent: Any) -> bool:
    return isinstance(sent, np.ndarray) and sent.size > 16
