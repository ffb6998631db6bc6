"""What the episodes of a dataset are made of: the features of a step, and what fits them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.data.rlds.example import Values
from edgeml.data.rlds.features import (
    Feature,
    Image,
    Leaf,
    Series,
    Tensor,
    Text,
    from_json,
    infer_feature,
    to_json,
)
from edgeml.data.rlds.values import join, pack
from edgeml.data.schema import Schema
from edgeml.data.tree import describe, nest
from edgeml.extras import load_pillow

__all__ = ["Layout", "Part", "Step", "flatten"]

_log = logging.getLogger(__name__)

_FLAGS = ("is_first", "is_last", "is_terminal")
_BOOL = Tensor((), np.dtype(bool))


@dataclass(frozen=True, slots=True)
class Step:
    """What was done upon an observation, and what it led to, as the parts of a layout fit it.

    Attributes:
        before: the observation.
        outcome: the action, and what was got for it.
        after: the next observation.
        terminal: whether the episode has terminated with it.
        metadata: of the episode, as known by then.
    """

    before: list[Any]
    outcome: list[Any]
    after: list[Any]
    terminal: bool
    metadata: list[Any]


class Part:
    """A part of an episode: leaves that come together, by the path to each.

    Args:
        leaves: the feature of each.
        what: this is, for the texts of errors.

    Raises:
        ImportError: it has images, and Pillow is not installed.
    """

    def __init__(self, leaves: Mapping[str, Leaf], what: str) -> None:
        texts = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Text)}
        arrays = {key: leaf for key, leaf in leaves.items() if not isinstance(leaf, Text)}
        self.leaves: dict[str, Leaf] = arrays | texts  # in the order of what `fit` returns
        self._what, self._arrays, self._texts = what, list(arrays), list(texts)
        if any(isinstance(leaf, Image) for leaf in leaves.values()):
            load_pillow()  # rather than fail later, when one is packed
        self._zeros = {
            key: np.zeros([n or 0 for n in leaf.shape], leaf.dtype) for key, leaf in arrays.items()
        }
        self._schema = Schema(self._zeros) if arrays else None

    def fit(self, flat: Mapping[str, Any]) -> list[Any]:
        """Return the values in the order of the leaves, in the leaves' shapes and dtypes.

        They may be the arrays that were given.

        Raises:
            ValueError: they don't fit; the text gives the part and what was expected.
        """
        if flat.keys() != self.leaves.keys():
            raise ValueError(f"{self._what} has {_list(self.leaves)}, but got {_list(flat)}")
        values: list[Any] = []
        if self._schema is not None:
            values = self._schema.fit({key: flat[key] for key in self._arrays})
        for key in self._texts:
            if not isinstance(flat[key], str):
                raise ValueError(f"{key}: expected a str, got {describe(flat[key])}")
            values.append(flat[key])
        return values

    def pack(self, values: list[Any]) -> list[Any]:
        """Return how the values are held until they are written."""
        return [pack(leaf, value) for leaf, value in zip(self.leaves.values(), values, strict=True)]

    def zeros(self) -> list[Any]:
        """Return values that say nothing."""
        return [*self._zeros.values(), *([""] * len(self._texts))]

    def join(self, rows: Sequence[list[Any]]) -> dict[str, Values]:
        """Return what an example holds of rows that were packed, by the path to each leaf."""
        columns = map(list, zip(*rows, strict=True))
        leaves = zip(self.leaves.items(), columns, strict=True)
        return {key: join(leaf, column) for (key, leaf), column in leaves}


class Layout:
    """The parts of a dataset's episodes; what the first step brings settles those of steps.

    Args:
        metadata: an example of what every episode says of itself, by the path to each leaf.
        image_format: "png" or "jpeg", of images yet to come.

    Attributes:
        metadata, observation, outcome: the parts; of a step all but the observation and the flags
            is its outcome.
    """

    def __init__(self, metadata: Mapping[str, Any], image_format: str) -> None:
        self._image_format = image_format
        self.metadata = self._infer(metadata, "metadata")
        self.observation: Part | None = None
        self.outcome: Part | None = None

    def fit_observation(self, observation: Any) -> list[Any]:
        """Return the values of an observation; see `Part.fit`."""
        flat = flatten(observation, "observation")
        if self.observation is None:
            self.observation = self._infer(flat, "an observation")
        return self.observation.fit(flat)

    def fit_outcome(
        self, action: Any, reward: Any, discount: float, extra: Mapping[str, Any]
    ) -> list[Any]:
        """Return the values of all else that a step has; see `Part.fit`."""
        flat = flatten(action, "action")
        flat["reward"], flat["discount"] = reward, np.float32(discount)
        for name, value in extra.items():
            if name == "observation" or name in _FLAGS or name in flat:
                raise ValueError(f"{name!r} has a meaning of its own in a step; rename the extra")
            flat |= flatten(value, name)
        if self.outcome is None:
            array = np.asarray(reward)
            if array.dtype.kind in "biu":  # or all later ones would have to be whole
                flat["reward"] = array.astype(np.result_type(array, np.float32))
            self.outcome = self._infer(flat, "a step")
        return self.outcome.fit(flat)

    def fit_metadata(self, values: list[Any], changes: Mapping[str, Any]) -> list[Any]:
        """Return the values of an episode's metadata with some of them changed; see `Part.fit`."""
        before = dict(zip(self.metadata.leaves, values, strict=True))
        return self.metadata.fit(before | flatten(dict(changes), ""))

    def pack(self, step: Step) -> tuple[list[Any], list[Any]]:
        """Return how the observation that a step began with, and its outcome, are held."""
        observation, outcome = self._parts()
        return observation.pack(step.before), outcome.pack(step.outcome)

    def join(self, rows: list[tuple[list[Any], list[Any]]], last: Step) -> dict[str, Values]:
        """Return the example of an episode.

        Args:
            rows: its steps, as `pack` returned them.
            last: the last of these.
        """
        observation, outcome = self._parts()
        observations, outcomes = map(list, zip(*rows, strict=True))
        observations.append(observation.pack(last.after))
        outcomes.append(outcome.pack(outcome.zeros()))
        at = np.arange(len(observations))
        steps: dict[str, Values] = {
            **observation.join(observations),
            **outcome.join(outcomes),
            "is_first": at == 0,
            "is_last": at == at[-1],
            "is_terminal": (at == at[-1]) & last.terminal,
        }
        said = self.metadata.join([self.metadata.pack(last.metadata)])
        return {
            **{f"steps/{key}": values for key, values in steps.items()},
            **{f"episode_metadata/{key}": values for key, values in said.items()},
        }

    def encode(self) -> bytes:
        """Return the content of `features.json`."""
        observation, outcome = self._parts()
        steps = observation.leaves | outcome.leaves | dict.fromkeys(_FLAGS, _BOOL)
        features: dict[str, Any] = {"steps": Series(_nest(steps), dataset=True)}
        if self.metadata.leaves:
            features["episode_metadata"] = _nest(self.metadata.leaves)
        return _encode(features)

    def take_over(self, path: Path, *, is_ours: bool) -> None:
        """Settle the parts of a step by a `features.json` that is there.

        Args:
            path: of the file.
            is_ours: whether a logger is known to have written it. Otherwise it is what one left
                that didn't come to its first episode, which is told, or anybody's.

        Raises:
            ConfigMismatch: it is of other metadata or another image format, or no logger's.
        """
        if not is_ours:
            _check_leftover(path)
        features = from_json(path.read_bytes())
        found = features.get("steps") if isinstance(features, dict) else None
        if not isinstance(features, dict) or not isinstance(found, Series):
            raise ConfigMismatch(f"{path} has no steps, so edgeml didn't log this dataset")
        metadata = flatten(features.get("episode_metadata", {}), "")
        if metadata != self.metadata.leaves:
            raise ConfigMismatch(
                f"the episodes in {path.parent} have the metadata {_list(metadata)}, "
                f"not {_list(self.metadata.leaves)}"
            )
        leaves: dict[str, Leaf] = flatten(found.feature, "")
        for key, leaf in leaves.items():
            if not isinstance(leaf, Image) or leaf.shape[2] == 4:
                continue
            if leaf.encoding != self._image_format:
                raise ConfigMismatch(
                    f"the images {key} in {path.parent} are {leaf.encoding}, "
                    f"not {self._image_format}"
                )
        observed = {key: leaves[key] for key in leaves if key.split("/")[0] == "observation"}
        outcome = {
            key: leaf for key, leaf in leaves.items() if key not in observed and key not in _FLAGS
        }
        self.observation = Part(observed, "an observation")
        self.outcome = Part(outcome, "a step")

    def _infer(self, flat: Mapping[str, Any], what: str) -> Part:
        leaves = {key: infer_feature(value, self._image_format, key) for key, value in flat.items()}
        return Part(leaves, what)

    def _parts(self) -> tuple[Part, Part]:
        assert self.observation is not None
        assert self.outcome is not None
        return self.observation, self.outcome


def flatten(node: Any, path: str) -> dict[str, Any]:
    """Return a tree's leaves by the path to each, its keys with slashes between.

    Raises:
        ValueError: a key is neither a str nor an int, or has a slash.
    """
    flat: dict[str, Any] = {}
    _collect(node, path, flat)
    return flat


def _collect(node: Any, path: str, flat: dict[str, Any]) -> None:
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        node = node._asdict()
    if isinstance(node, dict):
        parts: Any = node.items()
    elif isinstance(node, (tuple, list)):
        parts = enumerate(node)
    else:
        flat[path] = node
        return
    for key, part in parts:
        name = str(key)
        if not isinstance(key, (str, int)) or not name or "/" in name:
            raise ValueError(f"{path}: keys are str or int, without a slash, got {key!r}")
        _collect(part, f"{path}/{name}" if path else name, flat)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of dicts of which `flatten` makes this."""
    return nest((path.split("/"), value) for path, value in flat.items())


def _encode(features: Feature) -> bytes:
    return json.dumps(to_json(features), indent=2, sort_keys=True).encode()


def _check_leftover(path: Path) -> None:
    """Tell what a logger left that didn't come to its first episode from any other file."""
    content = path.read_bytes()
    try:
        is_ours = content == _encode(from_json(content))
    except (Malformed, TypeError):
        is_ours = False
    if not is_ours:
        raise ConfigMismatch(
            f"{path} was not written by edgeml, and its dataset isn't there: log into "
            "another directory, or remove the file if nothing needs it"
        )
    _log.warning(
        "%s is there, but no episode: what is logged has to fit it. Remove it to begin anew", path
    )


def _list(keys: Any) -> str:
    return ", ".join(sorted(keys)) or "nothing"
