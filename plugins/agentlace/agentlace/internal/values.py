"""What scripts hand over, made into what a codec carries, and back.

agentlace pickles. Here types are told by name, and a name only ever chooses among types that the
receiving program has loaded itself and that are nothing but containers: namedtuples, flax's
FrozenDict and its dataclasses. They are filled without running any of their code.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeml.core import NotEncodable, load_codec
from edgeml.core.errors import shown

__all__ = ["LeftOut", "pack", "unpack"]

_log = logging.getLogger(__name__)
_codec = load_codec("msgpack")

# A value that msgpack has no type for is a dict of these two keys, and so is a dict that has the
# first one itself, under the name of its own type.
_TYPE, _VALUE = "@agentlace", "of"
_DICT, _JAX, _FROZEN = "dict", "jax:Array", "flax.core.frozen_dict:FrozenDict"

_DEEPEST = 12  # nodes in one another, of a value that is only kept where it can be
_PLAIN = (bool, int, float, str, bytes, type(None))


def pack(value: Any) -> Any:
    """Return a value with every typed node as a dict that says its type, for `unpack`."""
    apart = _take_apart(value)
    if apart is None:
        return {_TYPE: _JAX, _VALUE: value} if _is_jax(value) else value
    name, children = apart
    return _put_together(name, {key: pack(child) for key, child in children})


def _take_apart(value: Any) -> tuple[str, list[tuple[Any, Any]]] | None:
    """The name of a container's type and what is in it, by keys; None of anything else."""
    kind = type(value)
    if kind in _PLAIN or kind is np.ndarray:
        return None
    if _name_of(kind) == _FROZEN:
        return _FROZEN, [*value.unfreeze().items()]  # in which all dicts are plain again
    if isinstance(value, Mapping):
        return _DICT, [*value.items()]
    fields = _fields_of(kind)
    if fields is not None:
        return _name_of(kind), [(field, getattr(value, field)) for field in fields]
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", [*enumerate(value)]
    return None


def _put_together(name: str, parts: dict[Any, Any]) -> Any:
    if name == "list" or name == "tuple":
        return [*parts.values()] if name == "list" else tuple(parts.values())
    return parts if name == _DICT and _TYPE not in parts else {_TYPE: name, _VALUE: parts}


def unpack(value: Any) -> Any:
    """Return what was packed: its types where this program has them, and writable arrays.

    Of a type that isn't loaded here a dict is left.
    """
    if type(value) is np.ndarray:
        return value if value.flags.writeable else value.copy()
    if type(value) is list or type(value) is tuple:
        return type(value)(map(unpack, value))
    if type(value) is not dict:
        return value
    if _TYPE not in value:
        return {key: unpack(child) for key, child in value.items()}
    name, content = value[_TYPE], value.get(_VALUE)
    if type(name) is not str or len(value) != 2:
        raise ValueError(f"a typed value is a name and a value, not {shown(value)}")
    if name == _JAX:
        jax = sys.modules.get("jax")
        return unpack(content) if jax is None else jax.device_put(unpack(content))
    if type(content) is not dict:
        raise ValueError(f"a typed value is a dict of its parts, not {shown(content)}")
    return _rebuild(name, {key: unpack(child) for key, child in content.items()})


class LeftOut:
    """Leaves out of values what can't be carried, and counts it.

    Attributes:
        count: how many parts there were, of all values.
    """

    def __init__(self) -> None:
        self.count = 0

    def keep_rest(self, value: Any) -> Any:
        """Return what of a value can be carried, packed; the log tells of the first that can't."""
        packed = pack(value) if _depth(value) <= _DEEPEST else value
        if _is_carried(packed):
            return packed
        missing: list[str] = []
        pruned = _prune(value, "", missing, _DEEPEST)
        if not self.count:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            _log.warning("what can't be sent is left out, and the rest sent: %s", names)
        self.count += len(missing)
        return None if pruned is _NOTHING else pruned


_NOTHING = object()


def _prune(value: Any, path: str, missing: list[str], deeper: int) -> Any:
    """Do as `pack`, and leave out what can't be carried, or lies too deep."""
    apart = _take_apart(value) if deeper else None
    if apart is None:
        packed = pack(value) if deeper else value
        if _is_carried(packed):
            return packed
        missing.append(path or "all of it")
        return _NOTHING
    name, children = apart
    kept = {}
    for key, child in children:
        where = f"{path}[{key!r}]"
        if not _is_carried({key: None}):
            missing.append(where)
            continue
        pruned = _prune(child, where, missing, deeper - 1)
        if pruned is not _NOTHING:
            kept[key] = pruned
    return _put_together(name, kept)


def _is_carried(value: Any) -> bool:
    try:
        _codec.encode(value)
    except (NotEncodable, RecursionError):
        return False
    return True


def _depth(value: Any, most: int = _DEEPEST + 1) -> int:
    """How deep containers lie in one another, up to ``most``: one may even contain itself."""
    apart = _take_apart(value) if most else None
    if apart is None:
        return 0
    return 1 + max((_depth(child, most - 1) for _, child in apart[1]), default=0)


def _is_jax(value: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def _name_of(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _fields_of(kind: Any) -> tuple[str, ...] | None:
    """The fields of a namedtuple, or of a dataclass that flax made a tree; None of other types."""
    if isinstance(kind, type) and issubclass(kind, tuple):
        return getattr(kind, "_fields", None)
    if dataclasses.is_dataclass(kind) and getattr(kind, "_flax_dataclass", False):
        return tuple(field.name for field in dataclasses.fields(kind))
    return None


def _rebuild(name: str, parts: dict[Any, Any]) -> Any:
    if name == _DICT:
        return parts
    kind = _find(name)
    if name == _FROZEN and kind is not None:
        return kind(parts)
    fields = _fields_of(kind)
    if kind is None or fields is None or set(fields) != set(parts):
        return parts
    if issubclass(kind, tuple):
        return tuple.__new__(kind, [parts[field] for field in fields])
    made = object.__new__(kind)
    for field, part in parts.items():
        object.__setattr__(made, field, part)
    return made


def _find(name: str) -> type[Any] | None:
    """The class of that name, of those that this program has loaded; nothing is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) else None
