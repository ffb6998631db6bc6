"""What is optional, imported when it is used."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

__all__ = [
    "has_pillow",
    "has_simplejpeg",
    "load_jax",
    "load_matplotlib",
    "load_pillow",
    "load_ray",
    "load_simplejpeg",
    "load_yaml",
    "need_cryptography",
    "need_images",
]


def load_jax() -> Any:
    """Return the module `jax`.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import jax
    except ImportError as error:
        raise _explain("this needs JAX", "jax") from error
    return jax


def load_matplotlib() -> Any:
    """Return the module `matplotlib`, which draws to files alone.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise _explain("a picture needs matplotlib", "soak") from error
    matplotlib.use("Agg")
    return matplotlib


def load_pillow() -> Any:
    """Return the module `PIL.Image`.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise _explain("images need Pillow", "images") from error
    return PIL.Image


def load_ray() -> Any:
    """Return the module `ray`.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import ray
    except ImportError as error:
        raise _explain("this needs Ray", "ray") from error
    return ray


def load_simplejpeg() -> Any:
    """Return the module `simplejpeg`.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise _explain("this needs simplejpeg", "images") from error
    return simplejpeg


def load_yaml() -> Any:
    """Return the module `yaml`, which comes with Ray.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import yaml
    except ImportError as error:
        raise _explain("a file of servers needs PyYAML", "ray") from error
    return yaml


def has_pillow() -> bool:
    """Whether Pillow is installed, which importing it would take some time to tell."""
    return _is_there("PIL")


def has_simplejpeg() -> bool:
    """Whether simplejpeg is installed."""
    return _is_there("simplejpeg")


def need_cryptography(what: str) -> ImportError:
    """Return the ImportError of whoever needs `cryptography`, which is not installed."""
    return _explain(f"{what} needs cryptography", "keys")


def need_images(what: str) -> None:
    """Raise the ImportError of whoever needs what is not installed for images."""
    raise _explain(f"{what} need simplejpeg or Pillow", "images")


def _is_there(module: str) -> bool:
    loaded = sys.modules.get(module, False)
    return _is_installed(module) if loaded is False else loaded is not None


@lru_cache
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def _explain(need: str, extra: str) -> ImportError:
    return ImportError(f'{need}: pip install "edgeml-robotics[{extra}]"')
