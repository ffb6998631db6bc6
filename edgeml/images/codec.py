"""A codec around any other: images leave as files, and all else by the other codec.

The message of a value in which images were found: a header of the byte 0xC1, with which no msgpack
and no UTF-8 text begins, and then one msgpack array: the other codec's header (bin), in whose value
each image's place has a nil; and of each image ``[path, format, shape]``, in any order. After the
other codec's buffers come the files, in that order: one, or of a stack (more than three
dimensions) as many as the product of its leading dimensions. All else is the other codec's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, TypeAlias

import msgspec
import numpy as np

from edgeml.core.codec import Codec, Wrapped
from edgeml.core.errors import Malformed, NotEncodable, shown
from edgeml.core.message import Allocator, Message, empty, pooled, private
from edgeml.images.formats import (
    MOST_BYTES,
    Format,
    Pixels,
    check,
    decode_into,
    in_threads,
    readable,
    resize,
)

__all__ = ["MARK", "ImageCodec", "Plan"]

MARK = b"\xc1"
"""What the header of a message with images begins with."""

_MOST_DEPTH = 32
_MOST_FILES = 1 << 13
_MOST_NAMES = 1 << 10  # of leaves, that are remembered
_MOST_SIDE = 65_500  # pixels, of a JPEG
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[bytes, list[tuple[list[str | int], str, list[int]]]]).decode

Path: TypeAlias = tuple[Any, ...]


class Plan:
    """Which leaves are images, and how they travel.

    A pattern is one for `fnmatch`, of as many parts, between dots, as are compared with the last
    keys of a leaf: ``"image*"`` with its own, ``"cameras.*"`` with the one above as well. A key of
    several parts counts as several, and an index of a list as none.

    Args:
        patterns: the first that matches counts.
        wanted: by the other end; what of it matches first gives the size, where it says one, and
            all of it where none of ``patterns`` matches.
    """

    def __init__(
        self, patterns: Mapping[str, Format], wanted: Mapping[str, Format] | None = None
    ) -> None:
        self._patterns = [(pattern.split("."), format) for pattern, format in patterns.items()]
        self._wanted = [(p.split("."), format) for p, format in (wanted or {}).items()]
        self._known: dict[str, Format | None] = {}

    def __bool__(self) -> bool:
        """Whether anything is an image."""
        return bool(self._patterns or self._wanted)

    def format(self, name: str) -> Format | None:
        """How a leaf travels that the keys joined by dots lead to; None if it is no image."""
        try:
            return self._known[name]
        except KeyError:
            pass
        if len(self._known) >= _MOST_NAMES:
            self._known.clear()
        keys = name.split(".")
        own, wanted = _first(self._patterns, keys), _first(self._wanted, keys)
        if own is not None and wanted is not None and wanted.size is not None:
            own = replace(own, size=wanted.size)
        self._known[name] = found = own or wanted
        return found

    def take(self, value: Any) -> tuple[Any, list[_Image]]:
        """Part a value from its images, in whose places None is left.

        Raises:
            NotEncodable: what should be an image is none.
        """
        walk = _Walk(self)
        rest = walk.value(value, (), "") if self else value
        n_bytes = sum(math.prod(image.shape) for image in walk.images)
        n_files = sum(_n_files(image.shape) for image in walk.images)
        if n_bytes > MOST_BYTES or n_files > _MOST_FILES:
            raise NotEncodable(
                f"value has {n_files} images of {n_bytes >> 20} MiB: send them in several parts"
            )
        return rest, walk.images


def _first(patterns: list[tuple[list[str], Format]], keys: list[str]) -> Format | None:
    for parts, format in patterns:
        last = keys[-len(parts) :]
        if len(last) == len(parts) and all(map(fnmatchcase, last, parts)):
            return format
    return None


class ImageCodec(Wrapped):
    """Encodes images as files, and leaves all else to another codec.

    Args:
        inner: the other codec.
        plan: which leaves are images; by default none. What arrives is decoded in any case.
    """

    def __init__(self, inner: Codec, plan: Plan | None = None) -> None:
        self.inner = inner
        self.name = f"{inner.name}+images"  # type: ignore[misc]
        self.executes = inner.executes  # type: ignore[misc]
        self._plan = plan or Plan({})

    def encode(self, value: Any) -> Message:
        """Encode a value; several images in several threads.

        Containers with images in them that are neither dict, list nor tuple (dataclasses,
        namedtuples, other mappings) arrive as dicts.

        Raises:
            NotEncodable: as the other codec, and of a leaf that should be an image and is none.
        """
        return self._encode(value, self.inner.encode)

    def encode_owned(self, value: Any, allocate: Allocator | None = None) -> Message:
        """See `Codec.encode_owned`; files are nobody else's anyway."""
        return self._encode(value, lambda rest: self.inner.encode_owned(rest, allocate))

    def _encode(self, value: Any, encode: Callable[[Any], Message]) -> Message:
        rest, images = self._plan.take(value)
        message = encode(rest)
        if not images and not message.header.startswith(MARK):
            return message
        jobs = [(image, pixels) for image in images for pixels in _each(image.pixels)]
        files = in_threads(_encode_file, jobs, sum(image.pixels.nbytes for image in images))
        entries = [[image.path, image.format.name, image.shape] for image in images]
        header = MARK + _pack([message.header, entries])
        return Message(header, [*message.buffers, *(memoryview(file) for file in files)])

    def decode(self, message: Message, *, writable: bool = False) -> Any:
        """Decode a message, of this codec or of the other one; several images in several threads.

        Raises:
            Malformed: on any bytes that `encode` could not have made, and images that would take
                up more than 256 MiB together; both before anything is decoded.
        """
        if not message.header.startswith(MARK):
            return self.inner.decode(message, writable=writable)
        try:
            header, entries = _unpack(memoryview(message.header)[1:])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Malformed(f"not a message with images: {error}") from None
        shapes = [_checked(format, shape) for _, format, shape in entries]
        n_bytes, n_files = sum(map(math.prod, shapes)), sum(map(_n_files, shapes))
        if n_bytes > MOST_BYTES:
            raise Malformed(f"images of {n_bytes} bytes; at most {MOST_BYTES} in a message")
        n_others = len(message.buffers) - n_files
        if n_others < 0:
            raise Malformed(f"{len(message.buffers)} buffers for {n_files} images")
        places = _places([path for path, _, _ in entries])
        rest = self.inner.decode(Message(header, message.buffers[:n_others]), writable=writable)
        _check_places(rest, places)
        files = iter(message.buffers[n_others:])
        pairs = [(shape, [*islice(files, _n_files(shape))]) for shape in shapes]
        for (_, format, _), (shape, parts) in zip(entries, pairs, strict=True):
            for file in parts:
                check(format, file, _image_shape(shape))
        # Only now is there memory for what was claimed.
        arrays = [empty(private if writable else pooled, shape, np.uint8) for shape in shapes]
        jobs = [
            (format, file, out)
            for (_, format, _), (_, parts), array in zip(entries, pairs, arrays, strict=True)
            for file, out in zip(parts, _each(array), strict=True)
        ]
        in_threads(lambda job: decode_into(*job), jobs, n_bytes)
        return _put(rest, places, arrays if writable else list(map(_read_only, arrays)))


# Leaves -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """A leaf that was found, how it travels, and the shape in which it arrives."""

    path: Path
    format: Format
    pixels: Pixels
    shape: tuple[int, ...]


class _Walk:
    """One look through a value for its images."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.images: list[_Image] = []

    def value(self, value: Any, path: Path, name: str) -> Any:
        """Return the value with None in place of images; itself where it has none."""
        kind = type(value)
        if kind in _PLAIN:  # most are; those without a key were never meant
            if name and self._plan.format(name) is not None:
                raise _refuse(path, f"is {shown(value, 60)}, not an image")
            return value
        if len(path) > _MOST_DEPTH:
            return value  # which the other codec refuses
        if kind is list or kind is tuple:
            return self._items(value, path, name)
        if issubclass(kind, Mapping):
            return self._pairs(value, value.items(), path, name)
        if issubclass(kind, (list, tuple)):
            if hasattr(kind, "_fields"):
                return self._pairs(value, zip(value._fields, value, strict=True), path, name)
            return self._items(value, path, name)
        if is_dataclass(kind):
            pairs = ((field.name, getattr(value, field.name)) for field in fields(kind))
            return self._pairs(value, pairs, path, name)
        format = self._plan.format(name)
        if format is None:
            return value
        self.images.append(_image(value, path, format))
        return None

    def _pairs(self, value: Any, pairs: Iterable[tuple[Any, Any]], path: Path, name: str) -> Any:
        before = len(self.images)
        prefix = f"{name}." if name else ""
        rest = {key: self.value(item, (*path, key), f"{prefix}{key}") for key, item in pairs}
        return value if len(self.images) == before else rest

    def _items(self, value: Sequence[Any], path: Path, name: str) -> Any:
        if _PLAIN.issuperset(map(type, value)) and (not name or self._plan.format(name) is None):
            return value
        before = len(self.images)
        rest = [self.value(item, (*path, i), name) for i, item in enumerate(value)]
        if len(self.images) == before:
            return value
        return tuple(rest) if isinstance(value, tuple) else rest


def _image(value: Any, path: Path, format: Format) -> _Image:
    """Look at a leaf that should be an image, or several."""
    if hasattr(type(value), "copy_to_host_async"):  # JAX's
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        what = f"has dtype {value.dtype}" if isinstance(value, np.ndarray) else "is no array"
        raise _refuse(path, f"{what}, so it is no image, which is an array of uint8")
    shape = value.shape
    if len(shape) < 2 or (len(shape) > 2 and shape[-1] not in (1, 3, 4)) or 0 in shape:
        raise _refuse(
            path,
            f"has shape {shape}, so it is no image: (height, width), or (height, width, channels) "
            "with 1, 3 or 4 of them, or several of these along further axes in front",
        )
    height, width, channels = _image_shape(shape)
    if channels not in format.channels:
        raise _refuse(path, f"has {channels} channels, which {format.name} doesn't hold: use Png()")
    if max(height, width) > _MOST_SIDE:
        raise _refuse(path, f"has shape {shape}; an image has at most {_MOST_SIDE} pixels a side")
    keys = tuple(key if type(key) is int else _key(key, path) for key in path)
    if format.size is not None:
        shape = (
            (*shape[:-2], *format.size)
            if len(shape) == 2
            else (*shape[:-3], *format.size, channels)
        )
    return _Image(keys, format, value, shape)


def _key(key: Any, path: Path) -> str | int:
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return int.__index__(key)
    raise _refuse(path, f"lies under a key of type {type(key).__name__}: use str or int")


def _refuse(path: Path, why: str) -> NotEncodable:
    return NotEncodable(f"value{''.join(f'[{shown(key, 80)}]' for key in path)} {why}")


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(height, width, channels) of each image in an array."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return shape[-3], shape[-2], shape[-1]


def _n_files(shape: Sequence[int]) -> int:
    return math.prod(shape[:-3])


def _each(pixels: Pixels) -> Iterable[Pixels]:
    return pixels.reshape(-1, *_image_shape(pixels.shape))


def _encode_file(job: tuple[_Image, Pixels]) -> bytes:
    image, pixels = job
    try:
        if image.format.size is not None:
            pixels = resize(pixels, image.format.size)
        return image.format.encode(pixels)
    except (ValueError, OSError) as error:  # what a library says
        raise _refuse(image.path, f"can't become a {image.format.name} file: {error}") from None


# Putting images into their places ---------------------------------------------------------


def _checked(format: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that an entry claims."""
    if format not in readable():
        known = ", ".join(readable()) or "none"
        raise Malformed(f"an image of format {shown(format, 40)}; known here: {known}")
    if not 2 <= len(shape) <= _MOST_DEPTH or min(shape) < 1:
        raise Malformed(f"an image of shape {shown(shape)}")
    return tuple(shape)


def _places(paths: list[list[str | int]]) -> Any:
    """The images' numbers, in dicts nested as the containers that they lie in are."""
    root: Any = {}
    for i, path in enumerate(paths):
        if len(path) > _MOST_DEPTH:
            raise Malformed(f"an image nested more than {_MOST_DEPTH} deep")
        if not path:
            return i if len(paths) == 1 else _raise_twice(path)
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if type(node) is not dict:
                _raise_twice(path)
        if path[-1] in node:
            _raise_twice(path)
        node[path[-1]] = i
    return root


def _raise_twice(path: list[str | int]) -> Any:
    raise Malformed(f"two images in one place, {shown(path, 200)}")


def _check_places(node: Any, places: Any) -> None:
    """Refuse places that aren't there, or that something is in."""
    if type(places) is not dict:
        if node is not None:
            raise Malformed("an image where there is something else")
        return
    kind = type(node)
    for key, inner in places.items():
        if kind is dict:
            there = key in node
        else:
            there = kind in (list, tuple) and type(key) is int and 0 <= key < len(node)
        if not there:
            raise Malformed(f"an image at {shown(key)}, which isn't there")
        _check_places(node[key], inner)


def _put(node: Any, places: Any, arrays: Sequence[Pixels]) -> Any:
    """Return a value with images in their places; its dicts and lists are changed."""
    if type(places) is not dict:
        return arrays[places]
    items = list(node) if type(node) is tuple else node
    for key, inner in places.items():
        items[key] = _put(items[key], inner, arrays)
    return tuple(items) if type(node) is tuple else items


def _read_only(array: Pixels) -> Pixels:
    return np.asarray(array.data.toreadonly())
