"""Many environments that run elsewhere, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from edgeml.core import Malformed
from edgeml.core.errors import shown
from edgeml.core.security import CredentialsLike
from edgeml.gym.env import RemoteEnv

__all__ = ["RemoteVectorEnv"]

Array = np.ndarray[Any, Any]


class RemoteVectorEnv(VectorEnv[Any, Any, Array]):
    """Environments that one or several `EnvServer` run, as one of gymnasium's vector environments.

    The steps of all go out at once, and are waited for together. Each has a client, and so an
    environment, of its own.

    If one of them raises, so does the whole, once all have answered, and `reset` is needed.

    Args:
        url: of the server, or of several, among which the environments are spread in turn.
        num_envs: how many there are; by default one for each url.
        render_mode: as for `RemoteEnv`.
        autoreset_mode: what happens when an episode ends: ``AutoresetMode.NEXT_STEP`` begins
            another one with the next step, ``SAME_STEP`` with the same one, whose final
            observation and info are in the infos ``final_obs`` and ``final_info``, and
            ``DISABLED`` leaves it to ``reset(options={"reset_mask": ...})``.
        timeout: as for `RemoteEnv`.
        wait_for_server: as for `RemoteEnv`.
        codec: the codec's name.
        credentials: the keys, as the directory that ``edgeml keygen`` made or as `Credentials`;
            ``$EDGEML_CREDENTIALS`` by default. See ``docs/security.md``.

    Raises:
        ValueError: there are fewer environments than urls, or their spaces differ.
        Unreachable, Overloaded, RemoteError: as for `RemoteEnv`.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        num_envs: int | None = None,
        render_mode: str | None = None,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        timeout: float = 60.0,
        wait_for_server: bool | float = False,
        codec: str = "msgpack",
        credentials: CredentialsLike = None,
    ) -> None:
        self.envs: list[RemoteEnv] = []  # first, since one that isn't made is closed as well
        urls = [url] if isinstance(url, str) else list(url)
        self.num_envs = len(urls) if num_envs is None else num_envs
        if self.num_envs < max(1, len(urls)) or not urls:
            raise ValueError(
                f"num_envs={self.num_envs} for {len(urls)} urls: give at least one for each url"
            )
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        try:
            for number in range(self.num_envs):
                self.envs.append(
                    RemoteEnv(
                        urls[number % len(urls)],
                        render_mode,
                        timeout=timeout,
                        wait_for_server=wait_for_server,
                        codec=codec,
                        credentials=credentials,
                    )
                )
            first = self.envs[0]
            for env in self.envs:
                _require_equal("observation spaces", first.observation_space, env.observation_space)
                _require_equal("action spaces", first.action_space, env.action_space)
        except BaseException:
            self.close_extras()
            self.closed = True
            raise
        self.metadata = {**first.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = first.render_mode
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observations: list[Any] = [None] * self.num_envs
        self._ended = np.zeros(self.num_envs, np.bool_)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in all of them, or in those that a mask names.

        Args:
            seed: one for each of them; of a number, the first one gets it, the next one that and 1,
                and so on.
            options: given to each of them; but for ``reset_mask``, an array of bool of shape
                ``(num_envs,)``: only those marked begin anew, the others' observations are the last
                ones.

        Raises:
            RemoteError, ConfigMismatch: as for `RemoteEnv.reset`.
        """
        seeds: Sequence[int | None]
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        chosen = np.ones(self.num_envs, np.bool_)
        if options is not None and "reset_mask" in options:
            chosen = self._check_mask(options["reset_mask"])
            options = {key: value for key, value in options.items() if key != "reset_mask"}
        numbers = np.flatnonzero(chosen).tolist()
        infos: dict[str, Any] = {}
        for number, info in self._reset_those(numbers, seeds, options):
            infos = self._add_told(infos, info, number)
        for number in np.flatnonzero(~chosen).tolist():  # nobody gets the same object twice
            self._observations[number] = deepcopy(self._observations[number])
        self._ended[chosen] = False
        return self._batch(), infos

    def _check_mask(self, mask: Any) -> Array:
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"reset_mask must be a numpy array of bool, not {shown(mask)}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask must have the shape ({self.num_envs},) and mark at least one, not "
                f"{shown(mask)}"
            )
        return mask

    def _reset_those(
        self,
        numbers: Sequence[int],
        seeds: Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reset some at once; gives their infos, and keeps their observations."""
        seeds = [None] * self.num_envs if seeds is None else seeds
        sent = {
            number: _attempt(self.envs[number]._reset_later, seeds[number], options)
            for number in numbers
        }
        for number, answer in self._gather(sent).items():
            yield number, self._begin(number, answer, seeds[number], options)

    def _begin(
        self,
        number: int,
        answer: Any,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keep the observation that answers a reset, and return the info."""
        env = self.envs[number]
        if answer is None:  # there is no environment: one is made
            observation, info = env.reset(seed=seed, options=options)
        else:
            observation, info = env._began(answer)
        self._observations[number] = observation
        return info

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Take a step in each; see `gymnasium.vector.VectorEnv.step`.

        Raises:
            ResetNeeded: gymnasium's; as for `RemoteEnv.step`, and in DISABLED mode for one whose
                episode has ended.
            RemoteError, Malformed, DeadlineExceeded, Unreachable: as for `RemoteEnv.step`.
        """
        rewards = np.zeros(self.num_envs, np.float64)
        terminations, truncations = np.zeros((2, self.num_envs), np.bool_)
        infos: dict[str, Any] = {}
        resetting = np.zeros(self.num_envs, np.bool_)
        if self._ended.any():
            if self.autoreset_mode is AutoresetMode.DISABLED:
                raise gymnasium.error.ResetNeeded(
                    f"the episodes of {np.flatnonzero(self._ended).tolist()} have ended: call "
                    'reset(options={"reset_mask": ...}) first'
                )
            resetting = self._ended.copy()
        each = list(iterate(self.action_space, actions))
        if len(each) != self.num_envs:
            raise ValueError(f"{len(each)} actions for {self.num_envs} environments")
        sent: dict[int, Future[Any]] = {}
        for number, action in enumerate(each):
            env = self.envs[number]
            if resetting[number]:
                sent[number] = _attempt(env._reset_later, None, None)
            else:
                sent[number] = _attempt(env._step_later, action)
        answers = self._gather(sent)
        again = []
        for number, env in enumerate(self.envs):
            if resetting[number]:
                info = self._begin(number, answers[number])
            else:
                observation, reward, terminated, truncated, info = env._stepped(answers[number])
                if np.shape(reward) != ():
                    raise Malformed(f"a reward of one environment is a number, not {shown(reward)}")
                self._observations[number], rewards[number] = observation, reward
                terminations[number], truncations[number] = terminated, truncated
                if (terminated or truncated) and self.autoreset_mode is AutoresetMode.SAME_STEP:
                    final = {"final_obs": observation, "final_info": info}
                    infos = self._add_told(infos, final, number)
                    again.append(number)
                    continue
            infos = self._add_told(infos, info, number)
        for number, info in self._reset_those(again):
            infos = self._add_told(infos, info, number)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            self._ended = terminations | truncations
        return self._batch(), rewards, terminations, truncations, infos

    def _gather(self, sent: dict[int, Future[Any]]) -> dict[int, Any]:
        """Wait for all, and raise what the first that failed did."""
        answers = {}
        failed: BaseException | None = None
        for number, future in sent.items():
            try:
                answers[number] = future.result()
            except BaseException as error:  # Ctrl-C as well: the rest is on its way
                failed = failed or error
                if not isinstance(error, Exception):
                    break
        if failed is not None:
            for number in sent:
                self.envs[number]._lose(f"one of the batch raised {type(failed).__name__}")
            raise failed
        return answers

    def _add_told(self, infos: dict[str, Any], info: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            return self._add_info(infos, info, number)
        except Exception as error:  # gymnasium's own; it makes arrays of what it finds
            raise Malformed(f"an info that is none: {shown(info)}: {error}") from error

    def _batch(self) -> Any:
        space = self.single_observation_space
        place: Any = create_empty_array(space, self.num_envs, fn=np.zeros)
        try:
            return concatenate(space, self._observations, place)
        except Exception as error:  # whatever comes of a value that has another form
            raise Malformed(f"an observation that is none of {space}: {error}") from error

    def render(self) -> tuple[Any, ...]:
        """Return what each of them renders; see `RemoteEnv.render`."""
        sent = {i: _attempt(env._render_later) for i, env in enumerate(self.envs)}
        answers = self._gather(sent)
        return tuple(env._rendered(answers[i]) for i, env in enumerate(self.envs))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of each `RemoteEnv`, or get an attribute; not of what runs elsewhere."""
        found = (env.get_wrapper_attr(name) for env in self.envs)
        return tuple(each(*args, **kwargs) if callable(each) else each for each in found)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute of each `RemoteEnv`; not of what runs elsewhere."""
        return tuple(env.get_wrapper_attr(name) for env in self.envs)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of each `RemoteEnv`: one value for all, or a list of one for each."""
        if not isinstance(values, (list, tuple)):
            values = [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(f"{len(values)} values for {self.num_envs} environments")
        for env, value in zip(self.envs, values, strict=True):
            env.set_wrapper_attr(name, value)

    @property  # type: ignore[misc]  # as gymnasium's own vector environments have it
    def np_random(self) -> Any:
        """The generators of each `RemoteEnv`."""
        return self.get_attr("np_random")

    @property
    def np_random_seed(self) -> Any:
        """The seeds of each `RemoteEnv`."""
        return self.get_attr("np_random_seed")

    def close_extras(self, **kwargs: Any) -> None:
        """Close each of them, and raise what the first that failed did."""
        failed: Exception | None = None
        for env in self.envs:
            try:
                env.close()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed


def _attempt(function: Callable[..., Future[Any]], *args: Any) -> Future[Any]:
    """Call a function; what it raises is what its future does."""
    try:
        return function(*args)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


def _require_equal(what: str, first: Any, other: Any) -> None:
    if first != other:
        raise ValueError(f"the {what} differ, and can't be one: {first} and {other}")
