"""The machine that runs the environment."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium

from edgeml.core import Malformed, Overloaded
from edgeml.core.dispatch import Call, Handler
from edgeml.core.errors import shown
from edgeml.gym.spaces import action_reader, packer, space_to_plain
from edgeml.services.inference import InferenceServer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgeml.services.base import ServerSettings

__all__ = ["EnvServer"]

_log = logging.getLogger(__name__)

_SEAT = "edgeml.gym"  # where a client's session has its seat
_LEFT_OUT = ("jax", "torch", "autoreset_mode")  # of metadata: clients get numpy's arrays


class EnvServer(InferenceServer):
    """Serves an environment, to many clients or to one at a time.

    Given a function that makes environments, each client gets one of its own, which is closed when
    the client closes it, leaves, or is silent for half a minute. Given an environment, the first
    client has it until then, others are told so, and closing it is left to whoever made it.

    All of the environments' methods run in one and the same thread, the handlers', one at a time.

    Args:
        env: an environment, or a function that makes one: ``functools.partial(gymnasium.make,
            "CartPole-v1")``. It is called as ``env()``, and as ``env(render_mode=...)`` for a
            client that asks for a mode.
        port_num: where to listen; 0 lets the system pick, and `url` tells.
        host: the address to listen at, 127.0.0.1 by default; name another to let other machines in.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``.
        settings: ``url``, ``codecs``, ``rate_limit``, ``advertise``, ``credentials``, ``limits``,
            ``on_connect``, ``on_disconnect``: see `ServiceServer`.

    Raises:
        TypeError: it is neither, or a space of the environment can't be sent.
        ValueError: ``workers`` were asked for.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any] | Callable[..., gymnasium.Env[Any, Any]],
        port_num: int | None = None,
        host: str | None = None,
        transport: str | None = None,
        **settings: Unpack[ServerSettings],
    ) -> None:
        if settings.get("workers", 1) != 1:
            raise ValueError(
                "environments are served in one thread, as many belong to one: leave workers out, "
                "and start further servers where more are to run at a time"
            )
        self._shared = None
        if isinstance(env, gymnasium.Env):
            self._shared = env
            _describe(env)
        elif not callable(env):
            raise TypeError(f"an environment, or a function that makes one, not {shown(env)}")
        self._env = env
        self._holder: _Seat | None = None  # of the shared environment
        super().__init__(port_num, host, transport, **settings)
        function: Callable[[Any, Call], Any]
        for name, function in (
            ("/env/open", self._open_env),
            ("/env/reset", _reset),
            ("/env/step", _step),
            ("/env/render", _render),
            ("/env/close", self._close_env),
        ):
            self._server.register(name, _handler(function), needs="call")

    def _open_env(self, payload: Any, call: Call) -> dict[str, Any]:
        mode = payload.get("render_mode") if isinstance(payload, dict) else payload
        if mode is not None and not isinstance(mode, str):
            raise Malformed(f"a render mode is a name, not {shown(mode)}")
        self._close_env(None, call)
        env = self._make_env(mode) if self._shared is None else self._lend(mode, call)
        try:
            described = _describe(env)
            seat = _Seat(env, call.caller.client_id, call.caller.label)
        except BaseException:
            if self._shared is None:
                env.close()
            raise
        if self._shared is not None:
            self._holder = seat
        call.episode.session[_SEAT] = seat
        call.episode.on_end(lambda: self._vacate(seat))
        return described

    def _make_env(self, mode: str | None) -> gymnasium.Env[Any, Any]:
        assert callable(self._env)
        made = self._env() if mode is None else self._env(render_mode=mode)
        if not isinstance(made, gymnasium.Env):
            raise TypeError(f"the server's function made no environment, but {shown(made)}")
        return made

    def _lend(self, mode: str | None, call: Call) -> gymnasium.Env[Any, Any]:
        assert self._shared is not None
        holder = self._holder
        # A client that lost its connection comes back before its old session has ended.
        if holder is not None and holder.client_id != call.caller.client_id:
            raise Overloaded(
                f"the environment is in use by {holder.label or holder.client_id}, and there is "
                "one: wait until that client has closed it, or serve a function that makes one "
                "for each client"
            )
        if mode is not None and mode != self._shared.render_mode:
            raise Malformed(
                f"the environment was made with render_mode={self._shared.render_mode!r}, so it "
                f"can't have {mode!r}: ask for that, or for none"
            )
        if holder is not None:
            holder.left = True
        return self._shared

    def _close_env(self, payload: Any, call: Call) -> None:
        seat = call.episode.session.pop(_SEAT, None)
        if seat is not None:
            self._vacate(seat)

    def _vacate(self, seat: _Seat) -> None:
        """Close what a client had, once; a shared environment waits for the next client."""
        if seat.left:
            return
        seat.left = True
        if self._shared is None:
            seat.env.close()
        elif self._holder is seat:
            self._holder = None


def _handler(function: Callable[[Any, Call], Any]) -> Handler:
    def handle(call: Call) -> None:
        call.answer(function(call.payload(), call))

    return handle


class _Seat:
    """An environment, as one client has it."""

    __slots__ = ("begun", "client_id", "env", "label", "left", "pack", "read", "step")

    def __init__(self, env: gymnasium.Env[Any, Any], client_id: str, label: str) -> None:
        self.env = env
        self.client_id = client_id
        self.label = label
        self.left = False
        self.begun = False  # by a reset, without which there is nothing to step
        self.step = env.step
        self.pack = packer(env.observation_space)
        self.read = action_reader(env.action_space)


# A reply of None says that there is no environment under this session, or none that was reset, and
# the client knows what to do. Observations come first, so that what is usual is all there is.


def _reset(payload: Any, call: Call) -> list[Any] | None:
    seat = call.episode.session.get(_SEAT)
    if seat is None or seat.left:
        return None
    seed, options = payload if isinstance(payload, list) and len(payload) == 2 else (payload, "")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise Malformed(f"a seed is a whole number or None, not {shown(seed)}")
    if options is not None and not isinstance(options, dict):
        raise Malformed(f"options are a dict or None, not {shown(options)}")
    seat.begun = False
    observation, info = seat.env.reset(seed=seed, options=options)
    seat.begun = True
    return [observation if seat.pack is None else seat.pack(observation), info]


def _step(payload: Any, call: Call) -> list[Any] | None:
    seat = call.episode.session.get(_SEAT)
    if seat is None or not seat.begun or seat.left:
        return None
    observation, reward, terminated, truncated, info = seat.step(seat.read(payload))
    if seat.pack is not None:
        observation = seat.pack(observation)
    if info:
        return [observation, reward, terminated, truncated, info]
    return [observation, reward, terminated, truncated]


def _render(payload: Any, call: Call) -> list[Any] | None:
    seat = call.episode.session.get(_SEAT)
    if seat is None or seat.left:
        return None
    frame = seat.env.render()
    return [frame.getvalue() if isinstance(frame, io.StringIO) else frame]


# What a client must know ------------------------------------------------------------------


def _describe(env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    return {
        "observation_space": _plain_space(env.observation_space, "observation space"),
        "action_space": _plain_space(env.action_space, "action space"),
        "metadata": _plain_metadata(env.metadata),
        "render_mode": env.render_mode,
    }


def _plain_space(space: Any, what: str) -> dict[str, Any]:
    try:
        return space_to_plain(space)
    except TypeError as error:
        raise TypeError(f"of the {what}: {error}") from None


def _plain_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in metadata.items() if key not in _LEFT_OUT}
    for key, value in list(plain.items()):
        if not isinstance(key, str) or not _is_plain(value):
            _log.warning("metadata %r is not sent, as it is no plain value: %.100r", key, value)
            del plain[key]
    return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (type(None), bool, int, float, str))
