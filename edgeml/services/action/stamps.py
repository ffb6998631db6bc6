"""What goes with an action: its number, and by what the device judges its age.

No two clocks are compared. An observation is known by the time at which the device took it, so the
device finds by its own clock how old what an action rests on is. Where an action names none, the
client repeats what the device's clock said, and says how long ago that came, by its own: so the
device knows the earliest time at which the action was sent. All errors of that, the way of an
answer and clocks that run at different speeds, make an action seem older than it is.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import msgspec

from edgeml.core.errors import Malformed

__all__ = ["DRIFT", "Clock", "Observation", "Stamp", "age_of", "pack", "read"]

DRIFT = 1e-3
"""By how much of a second two clocks may go apart in one. Quartz is within a tenth of that, and a
clock that is being set is slewed by half of it."""

_LESS = 1 - DRIFT

_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Observation(NamedTuple):
    """What a device has seen, and when.

    Attributes:
        values: the observations by their names.
        id: when the device took them, in ns of its own clock, `time.monotonic_ns`. Give it to
            `ActionClient.act` as ``observation`` with whatever rests on them.
    """

    values: Any
    id: int


class Stamp(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What goes with an action, as it travels.

    Attributes:
        number: counts up from 1 for each client object and key.
        seen: what the device's clock said, in ns; None where the client doesn't know.
        elapsed: seconds from when that was here until the action was sent.
        age: seconds by which what it rests on was older than its sending, as its sender says.
        valid: seconds of age at which it may still begin; None for the device's own bound.
        observation: the id of the one that it rests on; None for none.
        policy: the version of what chose it.
        lease: the token of the sender's lease of the key.
        stream: a random number of the client object, which the action's number belongs to.
    """

    number: _Number
    seen: _Number | None
    elapsed: _Seconds
    age: _Seconds
    valid: _Seconds | None
    observation: _Number | None
    policy: Annotated[str, msgspec.Meta(max_length=200)] | None
    lease: _Number | None
    stream: _Number


pack = msgspec.msgpack.Encoder().encode
"""Return a stamp as bytes."""

_unpack = msgspec.msgpack.Decoder(Stamp).decode


def read(payload: Any) -> tuple[str, Any, Stamp | None]:
    """Return the key, the argument and the stamp of an action as it came; None for no stamp.

    Raises:
        Malformed: it is no action.
    """
    # Not by `match`, which takes several times as long.
    if not isinstance(payload, list) or len(payload) < 2 or not isinstance(payload[0], str):
        raise Malformed("act takes a name and a payload, and may take a stamp")
    if len(payload) == 2:
        return payload[0], payload[1], None
    try:
        return payload[0], payload[1], _unpack(payload[2])
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"an action's stamp is wrong: {error}") from None


def age_of(stamp: Stamp, now: int, waited: float) -> float:
    """Return the seconds by which what an action rests on is old, at most as far as is known.

    Args:
        stamp: the action's.
        now: what the device's clock says, in ns.
        waited: seconds since the action came here, which is all that is known of one that tells
            nothing of when it was sent.
    """
    observation, said = stamp.observation, stamp.age
    if observation is not None and not said:
        return (now - observation) * 1e-9
    seen = stamp.seen
    sent = waited if seen is None else (now - seen) * 1e-9 - stamp.elapsed * _LESS
    return sent + said if observation is None else max(sent + said, (now - observation) * 1e-9)


class Clock:
    """What a client knows of the device's clock: one sample, the one that says most.

    A sample is what that clock said, and when that was here by the client's own. So what the
    device's clock says now is at least as much more as has passed since, and of several samples the
    one counts by which that is the most. Times are in ns. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._sample: tuple[int, int] | None = None

    def note(self, seen: int, here: int, asked: int | None = None) -> None:
        """Take in a sample.

        Args:
            seen: what the device's clock said.
            here: when that was here.
            asked: when it was asked for, at the latest; None if that isn't known.
        """
        sample = self._sample
        if sample is not None:
            now = sample[0] + (here - sample[1]) * _LESS
            # It says more, and that can be: when it was asked, the clock said no more than this.
            if now >= seen and (asked is None or now - (here - asked) * _LESS <= seen):
                return
        self._sample = seen, here

    def forget(self) -> None:
        """Know nothing, as of another device."""
        self._sample = None

    def tell(self, now: int) -> tuple[int | None, float]:
        """Return what goes with an action that is sent now: `Stamp.seen` and `Stamp.elapsed`."""
        sample = self._sample
        return (None, 0.0) if sample is None else (sample[0], (now - sample[1]) * 1e-9)
