"""Writes episodes as a dataset in the RLDS format, which tensorflow_datasets reads."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.data.rlds.directory import FEATURES, Shards, write_whole
from edgeml.data.rlds.example import Values, encode_example
from edgeml.data.rlds.features import (
    Feature,
    Image,
    Leaf,
    Series,
    Tensor,
    Text,
    feature_of,
    from_json,
    joined,
    pack,
    to_json,
)
from edgeml.data.schema import Schema
from edgeml.data.tree import describe, nested
from edgeml.extras import load_pillow

__all__ = ["RLDSLogger"]

_log = logging.getLogger(__name__)

_FLAGS = ("is_first", "is_last", "is_terminal")
_TRANSITION = {
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "masks",
    "dones",
    "end_of_trajectory",  # as the stores of trajectories have it, which say it by the argument
}
_BOOL = Tensor((), np.dtype(bool))


class RLDSLogger:
    """Logs what agents do, episode by episode, into a directory that is an RLDS dataset.

    The directory is then read by `edgeml.data.rlds.read_episodes`, or where TensorFlow is, by
    ``tensorflow_datasets.builder_from_directory(directory)``; neither it nor protobuf is needed
    to write. There are two ways to log, each ending in a sequence of steps:

    - from an environment, `log_reset` and `log_step`, as `env.reset` and `env.step` go;
    - from transitions, by calling the logger with each, as a store does with what it is given.

    **Steps.** An episode of n transitions has n + 1 steps, as RLDS has it
    (https://github.com/google-research/rlds#dataset-format). Step t holds the observation, the
    action taken upon it, and the reward and discount got for that; the last step holds the final
    observation, and zeros (texts: "") for all else. ``is_first`` marks the first step and
    ``is_last`` the last one; ``is_terminal`` the last one too, where the episode terminated
    rather than was truncated. The discount is the transition's mask.

    **Features.** Observations and actions are arrays, numbers and texts, or dicts, tuples and
    lists of them, whose parts are read back as dicts, tuples' keyed "0", "1" and so on. The first
    step settles keys, shapes and dtypes; later ones are converted where that keeps what they
    mean (see `ReplayBuffer`), or refused. A str is a Text; a uint8 array of shape (height, width,
    1, 3 or 4) an Image; and all else a Tensor that keeps its dtype exactly, float64 too: where
    `tf.train.Example` has no list that does, as bytes.

    **Crashes.** An episode is on the disk, and counted, when the call that ended it returns, and
    what is there then stays whatever happens later. So a crash loses the episode under way and
    no other. If it comes while an episode is being written, what it left is put right when the
    next logger opens the directory: what is there of that episode is cut off, with a warning.
    Damage that is not a crash's is never cut off, but raises `Malformed`.

    All methods may be called from any thread.

    Args:
        directory: of the dataset, made if need be. If it has one that was logged, the episodes
            are added to that.
        name: of the dataset, a word in lower case. With a directory ``.../NAME/1.0.0``,
            ``tfds.load(NAME, data_dir=...)`` finds it too.
        metadata: what every episode says of itself, under ``episode_metadata``: texts, numbers
            and arrays, nested as you like. An episode may have other values; the keys, shapes and
            dtypes are these.
        image_format: "png", which is exact, or "jpeg", which takes a tenth of the room. Needs
            Pillow.
        max_shard_bytes: a file that would become larger is left, and a new one begun.

    Raises:
        BlockingIOError: another logger has the directory open.
        ConfigMismatch: it has a dataset with another name, metadata or image format, or a
            `features.json` that no logger wrote.
        FileNotFoundError: a file of the dataset in it is missing.
        Malformed: the dataset in it is damaged; the text names the file and the byte.
        ImportError: it has images, and Pillow is not installed; by the methods, too.
        ValueError: by the methods, for what doesn't fit. The text gives the part, what was
            expected and what came; the episode is as it was before.
        OSError: by the methods that end an episode, if it can't be written. It is kept then, and
            the next call tries again.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "edgeml",
        metadata: Mapping[str, Any] | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        max_shard_bytes: int = 256 << 20,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a dataset's name is a word in lower case, got {name!r}")
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format is 'png' or 'jpeg', got {image_format!r}")
        self._path = Path(directory) / FEATURES
        self._image_format = image_format
        self._lock = threading.RLock()
        self._observation: _Part | None = None
        self._outcome: _Part | None = None  # of a step: all but the observation and the flags
        defaults = _flat(dict(metadata or {}), "")
        self._metadata = _Part.like(defaults, "metadata", image_format)
        self._defaults = self._metadata.fit(defaults)
        # The episode under way: what it said of itself, the steps taken, and the observation
        # that the last one led to.
        self._said: list[Any] = self._defaults
        self._steps: list[tuple[list[Any], list[Any]]] = []
        self._current: list[Any] | None = None
        self._terminal = self._over = False
        self._shards = Shards(Path(directory), name, max_shard_bytes)
        try:
            self._take_up_features()
        except BaseException:
            self._shards.close()
            raise

    @property
    def episodes(self) -> int:
        """How many episodes the dataset has, those of earlier loggers among them."""
        return self._shards.episodes

    def log_reset(self, observation: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Begin an episode; one that is under way ends here, truncated.

        Args:
            observation: the first.
            metadata: what this episode says of itself otherwise than the rest, see the class.
        """
        with self._lock:
            observed = self._observed(observation)
            said = self._saying(self._defaults, metadata)
            self.end_episode()
            self._current, self._said = [*map(_copy, observed)], said

    def log_step(
        self,
        action: Any,
        observation: Any,
        reward: Any,
        *,
        terminated: bool = False,
        truncated: bool = False,
        extra: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Log one step of the environment; the episode is written if it ends with it.

        Args:
            action: what was done upon the last observation.
            observation: what it led to.
            reward: what it brought.
            terminated: whether the task has ended, so that nothing more is to be got.
            truncated: whether the episode ends here for another reason.
            extra: other features of a step, by name, such as an instruction; always the same.
            metadata: what the episode says of itself from now on, such as its success.

        Raises:
            RuntimeError: no episode is under way: call `log_reset` first.
        """
        with self._lock:
            if self._over:
                self.end_episode()
            if self._current is None:
                raise RuntimeError("no episode is under way: call log_reset first")
            observed = self._observed(observation)
            outcome = self._outcome_of(action, reward, 0.0 if terminated else 1.0, extra or {})
            said = self._saying(self._said, metadata)
            self._add(self._current, outcome, observed, terminated, terminated or truncated)
            self._said = said
            if self._over:
                self.end_episode()

    def __call__(
        self, transition: Mapping[str, Any] | None, end_of_trajectory: bool = False
    ) -> None:
        """Log a transition, such as is inserted in a `ReplayBufferDataStore`.

        A transition that doesn't begin with the observation that the last one led to, byte for
        byte, begins a new episode, and the last one ends truncated. So what is read back is
        always what was logged.

        Args:
            transition: a dict of ``observations``, ``next_observations``, ``actions`` and
                ``rewards``; ``masks`` (default 1), 0 where the episode terminated; and ``dones``
                (default False). What else it has is logged as features of the step. None stands
                for no further one.
            end_of_trajectory: whether the episode ends here, as it does where ``masks`` is 0 or
                ``dones`` True.
        """
        if transition is None:
            if end_of_trajectory:
                self.end_episode()
            return
        missing = {"observations", "next_observations", "actions", "rewards"} - transition.keys()
        if missing:
            raise ValueError(f"a transition without {sorted(missing)}")
        mask = np.asarray(transition.get("masks", 1.0), np.float32)
        done = np.asarray(transition.get("dones", False))
        if mask.size != 1 or done.size != 1:
            raise ValueError("a transition has one mask and one done")
        terminal = not mask.item()
        extra = {key: value for key, value in transition.items() if key not in _TRANSITION}
        with self._lock:
            before = self._observed(transition["observations"])
            after = self._observed(transition["next_observations"])
            outcome = self._outcome_of(
                transition["actions"], transition["rewards"], mask.item(), extra
            )
            if self._over or not _same(self._current, before):
                self.end_episode()
                before = [*map(_copy, before)]
            else:
                assert self._current is not None
                before = self._current
            over = terminal or bool(done.item()) or end_of_trajectory
            self._add(before, outcome, after, terminal, over)
            if over:
                self.end_episode()

    def end_episode(self) -> None:
        """End the episode under way, if there is one: truncated, unless it has terminated.

        One that has no step yet is forgotten.
        """
        with self._lock:
            if not self._steps:
                self._forget()
                return
            episodes = self._shards.episodes
            if not self._path.exists():
                write_whole(self._path, _content(self._features()))
            try:
                self._shards.append(encode_example(self._example()))
            finally:  # also if Ctrl-C came after it was counted
                if self._shards.episodes > episodes:
                    self._forget()

    def close(self) -> None:
        """End the episode under way, as `end_episode` does, and let go of the directory."""
        with self._lock:
            if self._shards.closed:
                return
            try:
                self.end_episode()
            finally:
                self._shards.close()

    def __enter__(self) -> RLDSLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _observed(self, observation: Any) -> list[Any]:
        if self._shards.closed:
            raise ValueError("the logger is closed")
        flat = _flat(observation, "observation")
        if self._observation is None:
            self._observation = _Part.like(flat, "an observation", self._image_format)
        return self._observation.fit(flat)

    def _outcome_of(
        self, action: Any, reward: Any, discount: float, extra: Mapping[str, Any]
    ) -> list[Any]:
        flat = _flat(action, "action")
        flat["reward"], flat["discount"] = reward, np.float32(discount)
        for name, value in extra.items():
            if name == "observation" or name in _FLAGS or name in flat:
                raise ValueError(f"{name!r} has a meaning of its own in a step; rename the extra")
            flat |= _flat(value, name)
        if self._outcome is None:
            array = np.asarray(reward)
            if array.dtype.kind in "biu":  # or all later ones would have to be whole
                flat["reward"] = array.astype(np.result_type(array, np.float32))
            self._outcome = _Part.like(flat, "a step", self._image_format)
        return self._outcome.fit(flat)

    def _saying(self, before: list[Any], metadata: Mapping[str, Any] | None) -> list[Any]:
        if not metadata:
            return before
        values = dict(zip(self._metadata.leaves, before, strict=True))
        return [*map(_copy, self._metadata.fit(values | _flat(dict(metadata), "")))]

    def _add(
        self,
        before: list[Any],
        outcome: list[Any],
        after: list[Any],
        terminal: bool,
        over: bool,
    ) -> None:
        assert self._observation is not None
        assert self._outcome is not None
        self._steps.append((self._observation.pack(before), self._outcome.pack(outcome)))
        self._current = [*map(_copy, after)]
        self._terminal, self._over = bool(terminal), bool(over)

    def _forget(self) -> None:
        self._steps, self._current, self._said = [], None, self._defaults
        self._terminal = self._over = False

    def _features(self) -> dict[str, Any]:
        assert self._observation is not None
        assert self._outcome is not None
        steps = self._observation.leaves | self._outcome.leaves | dict.fromkeys(_FLAGS, _BOOL)
        features: dict[str, Any] = {"steps": Series(_nested(steps), dataset=True)}
        if self._metadata.leaves:
            features["episode_metadata"] = _nested(self._metadata.leaves)
        return features

    def _example(self) -> dict[str, Values]:
        assert self._observation is not None
        assert self._outcome is not None
        assert self._current is not None
        values: dict[str, Values] = {}
        observations, outcomes = map(list, zip(*self._steps, strict=True))
        observations.append(self._observation.pack(self._current))
        outcomes.append(self._outcome.pack(self._outcome.zeros()))
        for part, rows in (self._observation, observations), (self._outcome, outcomes):
            columns = zip(*rows, strict=True)
            for (key, leaf), column in zip(part.leaves.items(), columns, strict=True):
                values[f"steps/{key}"] = joined(leaf, list(column))
        at = np.arange(len(observations))
        values["steps/is_first"] = at == 0
        values["steps/is_last"] = at == at[-1]
        values["steps/is_terminal"] = (at == at[-1]) & self._terminal
        said = zip(self._metadata.leaves.items(), self._metadata.pack(self._said), strict=True)
        for (key, leaf), value in said:
            values[f"episode_metadata/{key}"] = joined(leaf, [value])
        return values

    def _take_up_features(self) -> None:
        """Go on with the features of the episodes that are there."""
        if not self._shards.episodes:
            if not self._path.exists():
                return
            self._check_leftover()
        features = from_json(self._path.read_bytes())
        found = features.get("steps") if isinstance(features, dict) else None
        if not isinstance(features, dict) or not isinstance(found, Series):
            raise ConfigMismatch(f"{self._path} has no steps, so edgeml didn't log this dataset")
        metadata = _leaves(features.get("episode_metadata", {}))
        if metadata != self._metadata.leaves:
            raise ConfigMismatch(
                f"the episodes in {self._path.parent} have the metadata {_named(metadata)}, "
                f"not {_named(self._metadata.leaves)}"
            )
        leaves = _leaves(found.feature)
        for key, leaf in leaves.items():
            if not isinstance(leaf, Image) or leaf.shape[2] == 4:
                continue
            if leaf.encoding != self._image_format:
                raise ConfigMismatch(
                    f"the images {key} in {self._path.parent} are {leaf.encoding}, "
                    f"not {self._image_format}"
                )
        observed = {key: leaves[key] for key in leaves if key.split("/")[0] == "observation"}
        outcome = {
            key: leaf for key, leaf in leaves.items() if key not in observed and key not in _FLAGS
        }
        self._observation = _Part(observed, "an observation")
        self._outcome = _Part(outcome, "a step")

    def _check_leftover(self) -> None:
        """Tell what a logger left that didn't come to its first episode from any other file."""
        content = self._path.read_bytes()
        try:
            ours = content == _content(from_json(content))
        except (Malformed, TypeError):
            ours = False
        if not ours:
            raise ConfigMismatch(
                f"{self._path} was not written by edgeml, and its dataset isn't there: log into "
                "another directory, or remove the file if nothing needs it"
            )
        _log.warning(
            "%s is there, but no episode: what is logged has to fit it. Remove it to begin anew",
            self._path,
        )


class _Part:
    """A part of a step: leaves that come together, by the path to each.

    Args:
        leaves: the feature of each.
        what: this is, for the texts of errors.
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

    @classmethod
    def like(cls, flat: Mapping[str, Any], what: str, image_format: str) -> _Part:
        """Make a part for values like these."""
        return cls({key: feature_of(value, image_format, key) for key, value in flat.items()}, what)

    def fit(self, flat: Mapping[str, Any]) -> list[Any]:
        """Return the values in the order of the leaves, in the leaves' shapes and dtypes."""
        if flat.keys() != self.leaves.keys():
            raise ValueError(f"{self._what} has {_named(self.leaves)}, but got {_named(flat)}")
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


def _flat(node: Any, path: str) -> dict[str, Any]:
    """Return a tree's leaves by the path to each, its keys with slashes between."""
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


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of dicts of which `_flat` makes this."""
    return nested((path.split("/"), value) for path, value in flat.items())


def _content(features: Feature) -> bytes:
    """Return the content of `features.json`."""
    return json.dumps(to_json(features), indent=2, sort_keys=True).encode()


def _leaves(feature: Any) -> dict[str, Leaf]:
    return _flat(feature, "")


def _named(keys: Any) -> str:
    return ", ".join(sorted(keys)) or "nothing"


def _same(values: list[Any] | None, others: list[Any]) -> bool:
    """Whether two observations are the same, byte for byte."""
    return values is not None and all(
        a == b if isinstance(a, str) else a.tobytes() == b.tobytes()
        for a, b in zip(values, others, strict=True)
    )


def _copy(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value
