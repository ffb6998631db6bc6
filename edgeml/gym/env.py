"""An environment that runs elsewhere."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from edgeml.core import (
    Closed,
    ConfigMismatch,
    EdgemlError,
    Malformed,
    NotEncodable,
    Overloaded,
    RemoteError,
    UnknownInterface,
)
from edgeml.core.errors import shown
from edgeml.core.security import CredentialsLike
from edgeml.gym.spaces import packer, space_from_plain, unpacker
from edgeml.services.inference import InferenceClient

__all__ = ["RemoteEnv", "register"]

_log = logging.getLogger(__name__)

_ID = "edgeml/Remote-v0"
# After these it is known what the environment did: nothing, or what itself raised.
_STANDING = (RemoteError, Malformed, NotEncodable, Overloaded)
_GONE = "the server was started anew, or ended this client's session"
_MOST = 1 << 1000  # of a reward that is a whole number, which a float holds as well
_CLOSING = 5.0  # seconds that the environment's own close may take


def register() -> None:
    """Tell gymnasium of ``edgeml/Remote-v0``, unless it knows."""
    if _ID not in gymnasium.registry:
        gymnasium.register(
            _ID,
            entry_point="edgeml.gym.env:_make",
            vector_entry_point="edgeml.gym.vector:RemoteVectorEnv",
        )


def _make(**settings: Any) -> RemoteEnv:
    # A class would say which render modes there are, and that is known once it is connected.
    return RemoteEnv(**settings)


class RemoteEnv(gymnasium.Env[Any, Any]):
    """An environment that an `EnvServer` runs.

    Spaces, metadata and everything that the methods return are as they would be here, arrays are
    private copies; only that a namedtuple or a dataclass in an info arrives as a dict. Errors of
    the environment are raised as `edgeml.RemoteError`, with its traceback.

    ``np_random`` is a generator of this end's, seeded as the environment's own was: to draw from it
    changes nothing there.

    Args:
        url: where the server is: ``"zmq://host:port"``.
        render_mode: that the environment is made with; see its ``metadata["render_modes"]``.
        timeout: seconds that connecting, making the environment, a reset or a step may take.
        wait_for_server: go on trying, for 600 s or the number of seconds given, when no server
            answers yet.
        client_id: this client's identity; random by default.
        codec: the codec's name.
        credentials: the keys, as the directory that ``edgeml keygen`` made or as `Credentials`;
            ``$EDGEML_CREDENTIALS`` by default. See ``docs/security.md``.

    Raises:
        Unreachable: nobody serves there.
        ConfigMismatch: what serves there is no `EnvServer`.
        Overloaded: the server has one environment, and another client uses it.
        RemoteError: the environment can't be made.
    """

    def __init__(
        self,
        url: str,
        render_mode: str | None = None,
        *,
        timeout: float = 60.0,
        wait_for_server: bool | float = False,
        client_id: str | None = None,
        codec: str = "msgpack",
        credentials: CredentialsLike = None,
    ) -> None:
        self.client = InferenceClient(
            url=url,
            timeout=timeout,
            wait_for_server=wait_for_server,
            client_id=client_id,
            codec=codec,
            writable=True,
            credentials=credentials,
        )
        """What it stands on; calls other functions of the server, too."""
        self._asked = render_mode
        self._why = "it was not reset yet"  # it can't be stepped; "" when it can
        self._closed = False
        try:
            told = self._open()
            self.observation_space = space_from_plain(told["observation_space"])
            self.action_space = space_from_plain(told["action_space"])
            self.metadata = told["metadata"]
            self.render_mode = told["render_mode"]
        except BaseException:
            self.client.stop()
            raise
        self._pack = packer(self.action_space)
        self._unpack = unpacker(self.observation_space)

    def _open(self) -> dict[str, Any]:
        try:
            told = self.client.call("/env/open", {"render_mode": self._asked})
        except UnknownInterface as error:
            raise ConfigMismatch(
                "what serves there has no environment; start an edgeml.gym.EnvServer"
            ) from error
        match told:
            case {
                "observation_space": _,
                "action_space": _,
                "metadata": dict(metadata),
                "render_mode": str() | None,
            } if all(isinstance(key, str) for key in metadata):
                return dict(told)
        raise Malformed(f"the server told nothing of its environment, but {shown(told)}")

    # Gymnasium's own ----------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see `gymnasium.Env.reset`.

        If the server was started anew, or this client was away for too long, a new environment is
        made there first.

        Raises:
            RemoteError: the environment raised.
            ConfigMismatch: the server has another environment now.
        """
        super().reset(seed=seed)
        self._why = "its reset failed"
        answer = self.client.call("/env/reset", [seed, options])
        if answer is None:
            self._open_anew()
            answer = self.client.call("/env/reset", [seed, options])
        return self._began(answer)

    def _open_anew(self) -> None:
        told = self._open()
        for name in ("observation_space", "action_space"):
            ours, theirs = getattr(self, name), space_from_plain(told[name])
            if ours != theirs:
                raise ConfigMismatch(
                    f"the server has another environment now: its {name} is {theirs}, and was "
                    f"{ours}; make this one anew"
                )

    def _began(self, answer: Any) -> tuple[Any, dict[str, Any]]:
        match answer:
            case [observation, dict(info)]:
                observation = self._observed(observation)
                self._why = ""
                return observation, info
        raise Malformed(f"no answer to a reset: {shown(answer)}")

    def _observed(self, sent: Any) -> Any:
        """What is an observation here, of what was sent for it."""
        if self._unpack is None:
            return sent
        try:
            return self._unpack(sent)
        except Exception as error:  # whatever comes of a value that has another form
            raise Malformed(f"no observation of {self.observation_space}: {shown(sent)}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one step; see `gymnasium.Env.step`.

        Raises:
            ResetNeeded: gymnasium's; the environment was not reset yet, is gone because the
                server was started anew, or may have taken a step whose answer was lost.
            RemoteError: the environment raised.
            Malformed: the action is none of the action space, by its shape or kind; the
                environment didn't see it.
            DeadlineExceeded, Unreachable: no answer.
        """
        if self._why:
            raise self._cannot()
        try:
            if self._pack is not None:
                action = self._pack(action)
            answer = self.client.call("/env/step", action)
        except _STANDING:
            raise
        except BaseException as error:
            # Whether the step was taken isn't known.
            self._lose(f"the answer to its last step was lost ({type(error).__name__})")
            raise
        return self._stepped(answer)

    def _stepped(self, answer: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if answer is None:
            self._why = _GONE
            raise self._cannot()
        if not isinstance(answer, list) or len(answer) not in (4, 5):
            raise Malformed(f"no answer to a step: {shown(answer)}")
        observation, reward, terminated, truncated, *rest = answer
        info = rest[0] if rest else {}
        if not (
            _is_number(reward)
            and _is_flag(terminated)
            and _is_flag(truncated)
            and isinstance(info, dict)
        ):
            told = [reward, terminated, truncated, info]
            raise Malformed(f"no reward, two flags and info of a step: {shown(told, 200)}")
        return self._observed(observation), reward, terminated, truncated, info

    def _lose(self, why: str) -> None:
        """Take no further step before a reset."""
        self._why = why

    def _cannot(self) -> Exception:
        if self._closed:
            return Closed("this environment has been closed; make a new one")
        return ResetNeeded(
            f"the remote environment can't go on: {self._why}; call reset() to begin an episode"
        )

    def render(self) -> Any:
        """Return what the environment renders in the mode it was made with.

        Raises:
            ResetNeeded: gymnasium's; the environment is gone because the server was started anew.
            RemoteError: the environment raised.
        """
        return self._rendered(self.client.call("/env/render", None))

    def _rendered(self, answer: Any) -> Any:
        if answer is None:
            self._why = _GONE
            raise self._cannot()
        if not isinstance(answer, list) or len(answer) != 1:
            raise Malformed(f"nothing that was rendered: {shown(answer)}")
        return answer[0]

    def close(self) -> None:
        """Close the environment there, and the connection; idempotent.

        Raises:
            RemoteError: the environment's own close raised; the connection is closed all the same.
        """
        try:
            with suppress(Closed):
                self.client.call("/env/close", None, _CLOSING)
        except RemoteError:
            raise
        except EdgemlError as error:
            _log.info("the server was not told that its environment is closed: %s", error)
        finally:
            self._closed = True
            self._why = "it has been closed"
            self.client.stop()

    # Of many at once, for `RemoteVectorEnv` ------------------------------------------------

    def _reset_later(self, seed: int | None, options: dict[str, Any] | None) -> Future[Any]:
        super().reset(seed=seed)
        self._why = "its reset failed"
        return self.client.call_async("/env/reset", [seed, options])

    def _step_later(self, action: Any) -> Future[Any]:
        if self._why:
            raise self._cannot()
        return self.client.call_async(
            "/env/step", action if self._pack is None else self._pack(action)
        )

    def _render_later(self) -> Future[Any]:
        return self.client.call_async("/env/render", None)


def _is_number(value: Any) -> bool:
    """Whether it is a reward; of several objectives it is an array."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    if type(value) is int:
        return -_MOST < value < _MOST
    return isinstance(value, (int, float, np.number, np.bool_))


def _is_flag(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "biu"
    return isinstance(value, (int, np.integer, np.bool_))
