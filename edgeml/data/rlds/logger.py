"""Writes episodes as a dataset in the RLDS format, which tensorflow_datasets reads."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeml.core.message import copy, empty, pooled
from edgeml.core.owned import ClosedAtExit
from edgeml.data.rlds.directory import FEATURES, Shards
from edgeml.data.rlds.layout import Layout, Step, flatten
from edgeml.data.rlds.writer import EpisodeWriter
from edgeml.data.tree import Array

__all__ = ["RLDSLogger"]

_TRANSITION = {
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "masks",
    "dones",
    "end_of_trajectory",  # as the stores of trajectories have it, which say it by the argument
}


class RLDSLogger(ClosedAtExit):
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

    **Time.** A step is checked and copied, which takes a fraction of a millisecond; a thread of the
    logger's encodes it, and writes the episodes. Only the call that ends an episode waits for it,
    until all of that episode is on the disk. Where steps come faster than they are encoded for so
    long that more than ``max_waiting_bytes`` wait, the next call waits, too: that is logged as a
    warning, now and then, and counted by `stats`. Nothing is dropped.

    All methods may be called from any thread. A logger that is forgotten, or was not closed when
    the program ends, is closed then. In a forked child it can't be used.

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
        max_waiting_bytes: of steps that are still to be encoded (default 256 MiB); one that is
            larger is taken when no other waits.

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
            the next call tries again. What else goes wrong in the thread is raised likewise, by
            the next call, which does nothing then.
        DeadlineExceeded: by the methods, if nothing has got to the disk for ten minutes.
        Closed: by the methods, in a forked child.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "edgeml",
        metadata: Mapping[str, Any] | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        max_shard_bytes: int = 256 << 20,
        max_waiting_bytes: int = 256 << 20,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a dataset's name is a word in lower case, got {name!r}")
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format is 'png' or 'jpeg', got {image_format!r}")
        directory = Path(directory)
        defaults = flatten(dict(metadata or {}), "")
        self._layout = Layout(defaults, image_format)
        self._defaults = _copy(self._layout.metadata.fit(defaults))
        # Of the episode under way: the observation that the last step led to, if any did, and what
        # it says of itself. Its steps are with the thread.
        self._current: list[Any] | None = None
        self._metadata = self._defaults
        self._shards = Shards(directory, name, max_shard_bytes)
        try:
            episodes, features = self._shards.episodes, directory / FEATURES
            if episodes or features.exists():
                self._layout.take_over(features, is_ours=episodes > 0)
            self._writer = EpisodeWriter(directory, self._shards, self._layout, max_waiting_bytes)
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
        with self._turn():
            current = _copy(self._layout.fit_observation(observation))
            changed = self._change(self._defaults, metadata)
            self._end_episode()
            self._metadata = changed
            self._current = current

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
        with self._turn():
            if self._current is None:
                raise RuntimeError("no episode is under way: call log_reset first")
            after = self._layout.fit_observation(observation)
            discount = 0.0 if terminated else 1.0
            outcome = self._layout.fit_outcome(action, reward, discount, extra or {})
            changed = self._change(self._metadata, metadata)
            self._add(self._current, outcome, after, terminated, changed)
            if terminated or truncated:
                self._end_episode()

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
        with self._turn():
            before = self._layout.fit_observation(transition["observations"])
            after = self._layout.fit_observation(transition["next_observations"])
            outcome = self._layout.fit_outcome(
                transition["actions"], transition["rewards"], mask.item(), extra
            )
            if self._current is None or not _are_equal(self._current, before):
                self._end_episode()
                before = _copy(before)
            else:
                before = self._current
            self._add(before, outcome, after, terminal, self._metadata)
            if terminal or done.item() or end_of_trajectory:
                self._end_episode()

    def end_episode(self) -> None:
        """End the episode under way, if there is one: truncated, unless it has terminated.

        One that has no step yet is forgotten.
        """
        with self._turn():
            self._end_episode()

    def stats(self) -> dict[str, float]:
        """Return how far the thread is behind, and what that has cost.

        Returns:
            ``waiting_steps`` and ``waiting_bytes``, of steps that are still to be encoded; how
            often a call had to wait until they were fewer, ``waits``, and for how many seconds in
            all, ``waited``.
        """
        return self._writer.stats()

    def close(self) -> None:
        """End the episode under way, as `end_episode` does, and let go of the directory.

        What can't be written now is lost, and the error raised. In a forked child nothing is done.
        """
        if self._writer.abandoned:
            return
        with self._writer.turn:
            self._forget_episode()
            self._writer.close()

    def _leave(self) -> None:
        self.close()

    def __del__(self) -> None:
        writer: EpisodeWriter | None = self.__dict__.get("_writer")  # None if it wasn't made
        if writer is not None and not writer.closed:
            writer.forget()
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one thread at a time in, and none where nothing can be logged."""
        self._writer.check_process()
        with self._writer.turn:
            self._writer.check()
            yield

    def _change(self, before: list[Any], metadata: Mapping[str, Any] | None) -> list[Any]:
        return _copy(self._layout.fit_metadata(before, metadata)) if metadata else before

    def _add(
        self,
        before: list[Any],
        outcome: list[Any],
        after: list[Any],
        terminal: bool,
        metadata: list[Any],
    ) -> None:
        outcome, after = _copy(outcome), _copy(after)
        step = Step(before, outcome, after, bool(terminal), metadata)
        nbytes = sum(value.nbytes for value in (*outcome, *after) if not isinstance(value, str))
        # After Ctrl-C here it is not known whether the step was taken, so none may follow upon it.
        current, self._current = self._current, None
        try:
            self._writer.put(step, nbytes)
        except Exception:
            self._current = current
            raise
        self._current, self._metadata = after, metadata

    def _end_episode(self) -> None:
        # Forgotten first: whatever the end comes to, the thread has the episode.
        self._forget_episode()
        self._writer.end_episode()

    def _forget_episode(self) -> None:
        self._current, self._metadata = None, self._defaults


def _copy(values: list[Any]) -> list[Any]:
    """Return the values with arrays that nobody else has."""
    return [_copy_array(value) if isinstance(value, np.ndarray) else value for value in values]


def _copy_array(array: Array) -> Array:
    # Memory that has been used before: page faults take ten times as long as the copy (measured).
    kept = empty(pooled, array.shape, array.dtype)
    if array.flags.c_contiguous:
        copy(memoryview(_view_bytes(kept)), memoryview(_view_bytes(array)))
    else:
        kept[...] = array
    return kept


def _are_equal(values: list[Any], others: list[Any]) -> bool:
    """Whether two observations are the same, byte for byte."""
    return all(
        a == b if isinstance(a, str) else np.array_equal(_view_bytes(a), _view_bytes(b))
        for a, b in zip(values, others, strict=True)
    )


def _view_bytes(value: Array) -> Any:
    """Return the bytes of an array, without a copy where they lie in order."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
