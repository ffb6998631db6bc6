"""What two ends agree on about images when they greet each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from edgeml.core.codec import Codec, Spoken, Wrapping
from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.extras import has_pillow, load_pillow, need_images
from edgeml.images.codec import ImageCodec, Plan
from edgeml.images.formats import Format, Jpeg, Png, readable

__all__ = ["Images"]

_log = logging.getLogger(__name__)

_MOST_PIXELS = 1 << 26  # that a server may want an image to have
_INSTALL = 'pip install "edgeml-robotics[images]"'


class Images(Wrapping):
    """How one end's images travel, and what it wants of those that it gets.

    Args:
        images: patterns and formats; see `Plan`. None for as arrays.
        wanted: the same, of what the other end sends; a server's alone.

    Raises:
        TypeError: no patterns and formats.
        ImportError: what encodes these formats isn't installed.
    """

    name: ClassVar[str] = "images"

    def __init__(
        self,
        images: Mapping[str, Format] | None = None,
        wanted: Mapping[str, Format] | None = None,
    ) -> None:
        self._images = _checked("images", images)
        self._wanted = _checked("wants_images", wanted)
        self._formats = sorted({format.name for format in self._images.values()})
        if not set(self._formats) <= set(readable()):
            need_images(f"{' and '.join(self._formats)} images")
        if any(format.size for format in self._images.values()):
            load_pillow()
        self._plan = Plan(self._images)
        self._codecs: dict[str, ImageCodec] = {}  # by the names of what they are around
        self._accepted: tuple[object, Spoken] | None = None  # what the server said last

    def ask(self) -> Any:
        """See `Wrapping.ask`."""
        return {"decodes": readable(), "encodes": self._formats}

    def answer(self, asked: Any, codec: Codec, client: object) -> tuple[Any, Spoken]:
        """See `Wrapping.answer`."""
        decodes, encodes = _names(asked, "decodes"), _names(asked, "encodes")
        if missing := encodes - set(readable()):
            raise ConfigMismatch(
                f"images: the client sends {_list(missing)}, which the server can't decode: "
                f"{_INSTALL} there"
            )
        answer = {
            "decodes": readable(),
            "encodes": self._formats,
            "wants": {
                pattern: {"format": format.name, **asdict(format)}
                for pattern, format in self._wanted.items()
            },
        }
        wrapped = self._codecs.setdefault(codec.name, ImageCodec(codec, self._plan))
        # Looking for images costs time, so it is done where some may come or go.
        decoder = wrapped if encodes or self._wanted else codec
        if not self._images:
            return answer, Spoken(codec, decoder)
        if missing := set(self._formats) - decodes:
            _log.warning("%s can't decode %s: it gets images as arrays", client, _list(missing))
            return answer, Spoken(codec, decoder)
        return answer, Spoken(wrapped, decoder)

    def accept(self, answered: Any, codec: Codec, server: object) -> Spoken:
        """See `Wrapping.accept`."""
        if answered is None:
            if self._images:
                raise ConfigMismatch(f"images: {server} doesn't know of images that are encoded")
            return Spoken(codec, codec)
        if missing := set(self._formats) - _names(answered, "decodes"):
            raise ConfigMismatch(f"images: {server} can't decode {_list(missing)}")
        encodes = _names(answered, "encodes")
        if missing := encodes - set(readable()):
            _log.warning(
                "images of %s come as arrays, since %s can't be decoded here: %s",
                *(server, _list(missing), _INSTALL),
            )
        wanted = _wanted(answered, server)
        if self._accepted is None or self._accepted[0] != (wanted, encodes):
            plan = Plan(self._images, wanted)
            wrapped = ImageCodec(codec, plan)
            spoken = Spoken(wrapped if plan else codec, wrapped if encodes else codec)
            self._accepted = (wanted, encodes), spoken
        return self._accepted[1]

    def check(self, value: Any) -> None:
        """See `Wrapping.check`."""
        self._plan.take(value)


def _checked(what: str, images: Mapping[str, Format] | None) -> dict[str, Format]:
    images = {} if images is None else images
    if not isinstance(images, Mapping) or not all(
        isinstance(pattern, str) and pattern and isinstance(format, (Jpeg, Png))
        for pattern, format in images.items()
    ):
        raise TypeError(
            f'{what} is a dict of patterns and formats, as {{"image*": Jpeg(90)}}, not {images!r}'
        )
    return dict(images)


def _names(said: Any, key: str) -> set[str]:
    """A list of formats in what the other end said, which may be later than this one."""
    names = said.get(key, []) if isinstance(said, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Malformed(f"images: {key} is a list of formats")
    return set(names)


def _list(names: set[str]) -> str:
    return " and ".join(sorted(name[:40] for name in names))


def _wanted(answered: Any, server: object) -> dict[str, Format]:
    """What a server wants, all of which can be done here."""
    wants = answered.get("wants", {})
    if not isinstance(wants, dict):
        raise Malformed("images: what is wanted is a map of patterns")
    wanted: dict[str, Format] = {}
    for pattern, want in wants.items():
        name = want.get("format") if isinstance(want, dict) else None
        if not isinstance(pattern, str) or not isinstance(name, str):
            raise Malformed("images: what is wanted is a format, and its settings")
        if name not in readable():
            raise ConfigMismatch(
                f"images: {server} wants {pattern!r} as {name[:40]}, which can't be encoded here: "
                f"{_INSTALL}"
            )
        try:
            size = want.get("size")
            made = Png(size) if name == Png.name else Jpeg(want.get("quality", 90), size)
        except ValueError as error:
            raise Malformed(f"images: {server} wants {pattern!r}, but {error}") from None
        if made.size is not None and made.size[0] * made.size[1] > _MOST_PIXELS:
            raise Malformed(f"images: {server} wants {pattern!r} in a size of {made.size}")
        if made.size is not None and not has_pillow():
            raise ConfigMismatch(
                f"images: {server} wants {pattern!r} in the size {made.size}, and resizing needs "
                f"Pillow: {_INSTALL}"
            )
        wanted[pattern] = made
    return wanted
