"""What a policy takes and gives: names, their order, units, shapes, dtypes and its rate.

A contract is a plain value. It checks payloads and results, is compared with another, and has a
plain form that any codec or file carries; servers and clients do the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from edgeml.core.errors import Malformed, shown
from edgeml.data.tree import describe

__all__ = ["Feature", "Features", "PolicyContract", "differences", "join_findings"]

_NUMBERS = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
        *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int2", "int4", "uint2", "uint4"),
    )
)
_TEXT = "str"
_KINDS = ("state", "image", "depth", "audio", "text", "action")
_CHANNELS = (1, 3, 4, None)
_MOST_AXES = 32  # what the codecs carry
_MOST_NAME = 200  # characters
_MOST_FEATURES = 4096
_DEEPEST = 16  # dicts within dicts
_MOST_SHOWN = 20  # differences or faults in an error's text


# Features ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """One part of an observation or an action: an array, a number or a text.

    Args:
        shape: length of each axis, None for any; () is a number or a text, and an int is one axis.
        dtype: as numpy knows it, or its name: ``"float32"``, ``"bfloat16"``; ``str`` for text.
        names: of each component along the last axis, in order: joints, or an image's channels.
        units: of all components, or of each along the last axis: ``"rad"``, ``("rad", "m")``.
        kind: ``"state"``, ``"image"`` (height x width x channels), ``"depth"``, ``"audio"``,
            ``"text"``, ``"action"``, or None for anything else.

    Raises:
        ValueError: the parts contradict each other; the text says which.
    """

    shape: tuple[int | None, ...]
    dtype: str
    names: tuple[str, ...] | None = None
    units: str | tuple[str, ...] | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # what users may give is more than what is kept
        put(self, "shape", _shape_of(self.shape))
        put(self, "dtype", _dtype_of(self.dtype))
        if self.names is not None:
            put(self, "names", self._per_component("names", self.names))
            name, times = Counter(self.names).most_common(1)[0] if self.names else ("", 0)
            if times > 1:
                raise ValueError(f"names has {name!r} {times} times")
        if isinstance(self.units, str):
            _text_of("units", self.units)
        elif self.units is not None:
            put(self, "units", self._per_component("units", self.units))
        self._check_kind()

    def _per_component(self, what: str, given: Sequence[str]) -> tuple[str, ...]:
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"{what} must be a list of text, not {shown(given)}")
        texts = tuple(_text_of(what, text) for text in given)
        last = self.shape[-1] if self.shape else 0
        if last != len(texts):
            raise ValueError(
                f"{what} has {len(texts)} entries, one for each component along the last axis, "
                f"but the shape is {self.shape}"
            )
        return texts

    def _check_kind(self) -> None:
        if self.kind is not None and self.kind not in _KINDS:
            known = ", ".join(map(repr, _KINDS))
            raise ValueError(f"kind is one of {known} or None, not {shown(self.kind)}")
        if self.dtype == _TEXT:
            if self.shape or self.units is not None:
                raise ValueError(
                    "a text has shape () and no units: give each text a key of its own"
                )
            if self.kind not in ("text", None):
                raise ValueError(f"kind {self.kind!r} has numbers, but the dtype is 'str'")
        elif self.kind == "text":
            raise ValueError(f"kind 'text' has dtype 'str', not {self.dtype!r}")
        if self.kind in ("image", "depth") and len(self.shape) < 2:
            raise ValueError(f"kind {self.kind!r} has height and width, but shape {self.shape}")
        if self.kind == "image" and len(self.shape) > 2 and self.shape[-1] not in _CHANNELS:
            raise ValueError(
                f"an image is height x width x channels, with 1, 3 or 4 channels; {self.shape} is "
                "not (for channels first, leave kind out)"
            )

    def __str__(self) -> str:
        return f"text ({_TEXT})" if self.dtype == _TEXT else f"shape {self.shape} {self.dtype}"

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None if it fits.

        An array must have the dtype named. Where the shape is (), Python's numbers fit too, if
        the dtype holds them: an int fits ``float32``, a float does not fit ``int64``.
        """
        if self.dtype == _TEXT:
            return None if isinstance(value, str) else f"expected {self}, got {describe(value)}"
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is not None and dtype is not None:
            name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]  # torch.float32
            if name == self.dtype and _fits(self.shape, tuple(shape)):
                return None
            return f"expected {self}, got shape {tuple(shape)} {name}"
        if self.shape == () and isinstance(value, (bool, int, float, complex)):
            if _holds(self.dtype, value):
                return None
            return f"expected {self}, got {type(value).__name__} {shown(value, 50)}"
        got = describe(value)
        if isinstance(value, (list, tuple, int, float)):
            got += f" (give it as an array: np.asarray(value, {self.dtype!r}))"
        return f"expected {self}, got {got}"

    def to_plain(self) -> dict[str, Any]:
        """Return it as a dict of lists, strings and ints; what is None is left out."""
        plain: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.names is not None:
            plain["names"] = list(self.names)
        if self.units is not None:
            plain["units"] = self.units if isinstance(self.units, str) else list(self.units)
        if self.kind is not None:
            plain["kind"] = self.kind
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> Feature:
        """Return the feature of a plain form, which may come from anybody.

        Raises:
            Malformed: it is none.
        """
        return _make(cls, plain, required=("shape", "dtype"))


Features: TypeAlias = "Feature | Mapping[str, Features]"
"""A feature, or dicts of them by name, nested as the payload is."""


def _shape_of(given: Any) -> tuple[int | None, ...]:
    if not isinstance(given, (tuple, list)):
        given = (given,)
    if len(given) > _MOST_AXES:
        raise ValueError(f"shape has {len(given)} axes, over {_MOST_AXES}")
    shape: list[int | None] = []
    for length in given:
        try:
            shape.append(None if length is None else index(length))
        except TypeError:
            shape.append(-1)
        if isinstance(length, bool) or (shape[-1] is not None and not 0 <= shape[-1] < 1 << 63):
            raise ValueError(f"shape is lengths, None for any, not {shown(given)}")
    return tuple(shape)


def _dtype_of(given: Any) -> str:
    if given is str:
        return _TEXT
    if isinstance(given, str):
        name = given
    else:
        try:
            name = np.dtype(given).name if given is not None else "None"
        except (TypeError, ValueError):
            name = repr(given)
    if name not in _NUMBERS and name != _TEXT:
        raise ValueError(f"dtype is a name such as 'float32', 'uint8' or 'str', not {shown(name)}")
    return name


def _text_of(what: str, given: Any) -> str:
    """A short text that can be sent, or a ValueError."""
    if not isinstance(given, str) or not 0 < len(given) <= _MOST_NAME:
        raise ValueError(f"{what} is text of 1 to {_MOST_NAME} characters, not {shown(given)}")
    _require_unicode(what, given)
    return given


def _require_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode: {text!a:.100}") from None


def _fits(stated: tuple[int | None, ...], shape: tuple[Any, ...]) -> bool:
    return len(stated) == len(shape) and all(
        want is None or want == got for want, got in zip(stated, shape, strict=True)
    )


def _holds(dtype: str, number: complex) -> bool:
    """Whether an array of that dtype takes a number of Python's."""
    if isinstance(number, bool) or dtype == "bool":
        return isinstance(number, bool) and dtype == "bool"
    if isinstance(number, int):
        if "int" not in dtype:
            return True
        bits = int(dtype.rpartition("int")[2])
        least, most = (0, 2**bits) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return bool(least <= number < most)
    holders = ("float", "bfloat", "complex") if isinstance(number, float) else ("complex",)
    return dtype.startswith(holders)


# Contracts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyContract:
    """What a policy takes and gives.

    Nested dicts are allowed wherever a dict of features is. What is None is not stated: a server
    then checks nothing of it, and a client expects nothing.

    Args:
        observation: features by their keys in the payload, or one where the payload is an array.
        action: as the result is: a feature, or features by their keys in it.
        rate: control steps per second that the policy was made for.
        horizon: control steps in a result, for a policy that gives chunks: the length of the first
            axis of each feature of the action.
        identity: which policy it is, as a checkpoint's hash: ``"sha256:..."``.
        metadata: anything else, of plain values: None, bool, int, float, str, lists and dicts.

    Raises:
        ValueError: the parts contradict each other; the text says which.
    """

    observation: Features | None = None
    action: Features | None = None
    rate: float | None = None
    horizon: int | None = None
    identity: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for what in ("observation", "action"):
            given = getattr(self, what)
            if given is not None:
                features = _copied(given, what)
                if sum(1 for _ in _each(features)) > _MOST_FEATURES:
                    raise ValueError(f"{what} has over {_MOST_FEATURES} features")
                put(self, what, features)
        if self.rate is not None:
            put(self, "rate", _rate_of(self.rate))
        if self.horizon is not None:
            put(self, "horizon", self._checked_horizon())
        if self.identity is not None:
            _text_of("identity", self.identity)
        if not isinstance(self.metadata, Mapping):
            raise ValueError(f"metadata is a dict, not {shown(self.metadata)}")
        put(self, "metadata", _plain(self.metadata, "metadata", 0))

    def _checked_horizon(self) -> int:
        try:
            horizon = 0 if isinstance(self.horizon, bool) else index(cast(int, self.horizon))
        except TypeError:
            horizon = 0
        if not 0 < horizon < 1 << 63:
            raise ValueError(f"horizon is a number of control steps, not {shown(self.horizon)}")
        if self.action is not None:
            for keys, feature in _each(self.action):
                if not feature.shape or feature.shape[0] not in (horizon, None):
                    raise ValueError(
                        f"with horizon {horizon}, {_path('action', keys)} has {horizon} control "
                        f"steps along its first axis, but its shape is {feature.shape}"
                    )
        return horizon

    # Checks ---------------------------------------------------------------------------

    def check_observation(self, payload: Any) -> None:
        """Raise a ValueError that says what of a payload doesn't fit; keys that are not stated
        may be there.
        """
        if not _fits_quickly(self._observation_leaves, payload):
            _require(self.observation, payload, "observation")

    def check_action(self, result: Any) -> None:
        """Raise a ValueError that says what of a result doesn't fit, as `check_observation`."""
        if not _fits_quickly(self._action_leaves, result):
            _require(self._chunk, result, "action")

    @cached_property
    def _chunk(self) -> Features | None:
        """The action, with the horizon where the first axis may have any length."""
        if self.action is None or self.horizon is None:
            return self.action
        return _with_first_axis(self.action, self.horizon)

    @cached_property
    def _observation_leaves(self) -> list[_Leaf]:
        return _leaves_of(self.observation)

    @cached_property
    def _action_leaves(self) -> list[_Leaf]:
        return _leaves_of(self._chunk)

    # The plain form -------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Return it as dicts, lists, strings and numbers, as for JSON; what is None is left out."""
        plain: dict[str, Any] = {}
        for what in ("observation", "action"):
            features = getattr(self, what)
            if features is not None:
                plain[what] = _features_to_plain(features)
        for what in ("rate", "horizon", "identity"):
            if getattr(self, what) is not None:
                plain[what] = getattr(self, what)
        if self.metadata:
            plain["metadata"] = _plain(self.metadata, "metadata", 0)
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> PolicyContract:
        """Return the contract of a plain form, which may come from anybody.

        A field of an unknown name is refused, not passed over, since what it states would then
        be held by nobody.

        Raises:
            Malformed: it is none, or contradicts itself.
        """
        if isinstance(plain, dict):
            plain = dict(plain)
            for what in ("observation", "action"):
                if plain.get(what) is not None:
                    plain[what] = _features_from_plain(plain[what], what, 0)
        return _make(cls, plain)

    def describe(self) -> list[str]:
        """Return it as lines for people to read, free of control characters."""
        facts = []
        if self.rate is not None:
            facts.append(f"{self.rate:g} Hz")
        if self.horizon is not None:
            facts.append(f"{self.horizon} control steps at a time")
        if self.identity is not None:
            facts.append(_shown(self.identity))
        lines = [", ".join(facts)] if facts else []
        for what in ("observation", "action"):
            features = getattr(self, what)
            for keys, feature in () if features is None else _each(features):
                said = [str(feature)]
                if feature.kind not in (None, "text"):
                    said.append(str(feature.kind))
                if feature.names is not None:
                    said.append(_shown(" ".join(feature.names)))
                if feature.units is not None:
                    units = feature.units
                    said.append(
                        "in " + _shown(units if isinstance(units, str) else " ".join(units))
                    )
                lines.append(f"{_path(what, keys)}: {', '.join(said)}")
        lines += [f"{_shown(key)}: {shown(value, 200)}" for key, value in self.metadata.items()]
        return lines


def _copied(features: Any, path: str, depth: int = 0) -> Features:
    if isinstance(features, Feature):
        return features
    if not isinstance(features, Mapping):
        raise ValueError(f"{path} is a Feature or a dict of them by name, not {shown(features)}")
    if depth >= _DEEPEST:
        raise ValueError(f"{path} is nested deeper than {_DEEPEST}")
    return {
        _text_of(f"a key of {path}", key): _copied(part, f"{path}[{key!r}]", depth + 1)
        for key, part in features.items()
    }


def _each(
    features: Features, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Feature]]:
    if isinstance(features, Feature):
        yield keys, features
        return
    for key, part in features.items():
        yield from _each(part, (*keys, key))


def _path(root: str, keys: Sequence[str]) -> str:
    return root + "".join(f"[{key!r}]" for key in keys)


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _rate_of(given: Any) -> float:
    try:
        rate = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if isinstance(given, str) or not 0 < rate < math.inf:
        raise ValueError(f"rate is control steps per second, positive, not {shown(given)}")
    return rate


def _plain(value: Any, path: str, depth: int) -> Any:
    """A copy of a value of plain types, tuples as lists; or a ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"{path} is nested deeper than {_DEEPEST}")
    if isinstance(value, Mapping):
        return {
            _text_of(f"a key of {path}", key): _plain(part, f"{path}[{key!r}]", depth + 1)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(value)]
    if isinstance(value, str):
        _require_unicode(path, value)
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise ValueError(
        f"{path} is None, a bool, int of 64 bits, float, str, list or dict, not {shown(value)}"
    )


def _with_first_axis(features: Features, length: int) -> Features:
    if isinstance(features, Feature):
        return replace(features, shape=(length, *features.shape[1:]))
    return {key: _with_first_axis(part, length) for key, part in features.items()}


# Checks of values -------------------------------------------------------------------------

_Leaf: TypeAlias = "tuple[str | None, tuple[str, ...], Any, Any, Feature]"
"""The first key that leads to a feature, those after it, its shape and dtype, and all of it."""


def _leaves_of(features: Features | None) -> list[_Leaf]:
    leaves: list[_Leaf] = []
    for keys, feature in () if features is None else _each(features):
        try:
            dtype = np.dtype(feature.dtype)
        except TypeError:  # of ml_dtypes, which isn't imported
            dtype = np.dtype("V0")  # as no array has
        leaves.append((keys[0] if keys else None, keys[1:], feature.shape, dtype, feature))
    return leaves


def _fits_quickly(leaves: list[_Leaf], tree: Any) -> bool:
    """Whether all is there as it is stated; where it isn't, `_require` tells what is wrong.

    A third of a microsecond for each array, so that every call can be checked.
    """
    try:
        for first, more, shape, dtype, feature in leaves:
            node = tree if first is None else tree[first]
            for key in more:
                node = node[key]
            if node.__class__ is np.ndarray and node.dtype == dtype:
                if node.shape == shape or _fits(shape, node.shape):
                    continue
            elif node.__class__ is str and feature.dtype == _TEXT:
                continue
            if feature.fault(node) is not None:
                return False
    except (LookupError, TypeError):
        return False
    return True


def _require(features: Features | None, value: Any, path: str) -> None:
    faults = [] if features is None else list(_faults(features, value, path))
    if faults:
        raise ValueError(join_findings(faults))


def _faults(features: Features, value: Any, path: str) -> Iterator[str]:
    if isinstance(features, Feature):
        fault = features.fault(value)
        if fault is not None:
            yield f"{path}: {fault}"
        return
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # which is how codecs carry it
    if not isinstance(value, Mapping):
        yield f"{path}: expected a dict of {sorted(features)}, got {describe(value)}"
        return
    for key, part in features.items():
        if key in value:
            yield from _faults(part, value[key], f"{path}[{key!r}]")
        else:
            yield f"{path}[{key!r}]: missing, expected {_outline(part)}, got {describe(value)}"


def _outline(features: Features) -> str:
    return str(features) if isinstance(features, Feature) else f"a dict of {sorted(features)}"


def join_findings(found: Sequence[str]) -> str:
    """Return what was found, as one text; of many the first ones."""
    more = len(found) - _MOST_SHOWN
    return "; ".join(found[:_MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# The plain form of features ---------------------------------------------------------------

_Made = TypeVar("_Made", Feature, PolicyContract)


def _features_to_plain(features: Features) -> dict[str, Any]:
    if isinstance(features, Feature):
        return features.to_plain()
    return {key: _features_to_plain(part) for key, part in features.items()}


def _features_from_plain(plain: Any, path: str, depth: int) -> Features:
    if not isinstance(plain, dict):
        raise Malformed(f"{path} of a contract is a map, not {describe(plain)}")
    if depth > _DEEPEST:
        raise Malformed(f"{path[:200]} of a contract is nested deeper than {_DEEPEST}")
    if isinstance(plain.get("dtype"), str):  # in a map of features it would be a map
        try:
            return Feature.from_plain(plain)
        except Malformed as error:
            raise Malformed(f"{path}: {error}") from None
    return {
        key: _features_from_plain(part, f"{path}[{shown(key)}]", depth + 1)
        for key, part in plain.items()
    }


def _make(cls: type[_Made], plain: Any, required: tuple[str, ...] = ()) -> _Made:
    """Make an object of a plain form whose keys are its arguments' names, or raise Malformed."""
    what = f"a {cls.__name__}"
    if not isinstance(plain, dict):
        raise Malformed(f"{what} is a map, not {describe(plain)}")
    known = cls.__match_args__
    unknown = [key for key in plain if key not in known]
    if unknown:
        raise Malformed(
            f"{what} has no field {shown(unknown[0])}: the other side may have a newer edgeml"
        )
    if not all(key in plain for key in required):
        raise Malformed(f"{what} has {' and '.join(required)}")
    try:
        return cls(**plain)
    except (ValueError, TypeError) as error:
        raise Malformed(f"{what} that contradicts itself: {error}") from None


# Comparing --------------------------------------------------------------------------------


def differences(expected: PolicyContract, offered: PolicyContract) -> list[str]:
    """Return how a policy differs from what a client expects, a line each; empty if it fits.

    Only what the expecting side states counts: None is anything, and so is a None in a shape. An
    observation that it states is all that it sends, so the policy needs nothing else; a result may
    have more than the action that it states.

    Args:
        expected: what the client states.
        offered: what the server states.
    """
    found: list[str] = []
    for what, ours, theirs in [
        ("observation", expected.observation, offered.observation),
        ("action", expected._chunk, offered._chunk),
    ]:
        if ours is None:
            continue
        if theirs is None:
            found.append(f"{what}: stated by the client, and not by the server")
        else:
            found += _compare(ours, theirs, what, sent=what == "observation")
    for what in ("rate", "horizon", "identity"):
        found += _compare_fact(what, getattr(expected, what), getattr(offered, what))
    for key, value in expected.metadata.items():
        found += _compare_fact(f"metadata[{key!r}]", value, offered.metadata.get(key))
    return found


def _compare(ours: Features, theirs: Features, path: str, *, sent: bool) -> Iterator[str]:
    """How features differ, those that the client sends or those that it gets."""
    if isinstance(ours, Feature) and isinstance(theirs, Feature):
        yield from _compare_features(ours, theirs, path, sent=sent)
    elif isinstance(ours, Feature) or isinstance(theirs, Feature):
        yield f"{path}: expected {_outline(ours)}, the server has {_outline(theirs)}"
    else:
        for key, part in ours.items():
            if key in theirs:
                yield from _compare(part, theirs[key], f"{path}[{key!r}]", sent=sent)
            else:
                has = f"only {', '.join(map(repr, theirs))}" if theirs else "none"
                yield f"{path}[{key!r}]: expected {_outline(part)}, the server has {has}"
        for key in theirs if sent else ():
            if key not in ours:
                needed = _outline(theirs[key])
                yield f"{path}[{key!r}]: the policy needs {needed}, and the client states none"


def _compare_features(ours: Feature, theirs: Feature, path: str, *, sent: bool) -> Iterator[str]:
    # An axis of any length takes whatever is sent, and promises nothing of what is got.
    if len(ours.shape) != len(theirs.shape) or not all(
        want is None or want == has or (sent and has is None)
        for want, has in zip(ours.shape, theirs.shape, strict=True)
    ):
        yield f"{path}: expected shape {ours.shape}, the server has {theirs.shape}"
    yield from _compare_fact(f"{path}: dtype", ours.dtype, theirs.dtype)
    if ours.names is not None and theirs.names is not None and ours.names != theirs.names:
        if sorted(ours.names) == sorted(theirs.names):
            yield f"{path}: the order of names: {_unlike(ours.names, theirs.names)}"
        else:
            yield f"{path}: names: {_unlike(ours.names, theirs.names)}"
    else:
        yield from _compare_fact(f"{path}: names", ours.names, theirs.names)
    yield from _compare_fact(f"{path}: units", *_alike(ours.units, theirs.units))
    yield from _compare_fact(f"{path}: kind", ours.kind, theirs.kind)


def _compare_fact(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    if ours is not None and ours != theirs:
        has = "doesn't say" if theirs is None else f"has {shown(theirs, 200)}"
        yield f"{what}: expected {shown(ours, 200)}, the server {has}"


def _alike(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Units in one form: one for all components is each of them."""
    if isinstance(ours, str) and isinstance(theirs, tuple):
        return (ours,) * len(theirs), theirs
    if isinstance(ours, tuple) and isinstance(theirs, str):
        return ours, (theirs,) * len(ours)
    return ours, theirs


def _unlike(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """Name the first component that differs, and then all of them."""
    first = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    mine, others = (repr(side[first]) if first < len(side) else "none" for side in (ours, theirs))
    return (
        f"at {first} expected {mine}, the server has {others} "
        f"(expected {shown(list(ours), 300)}, the server has {shown(list(theirs), 300)})"
    )
