"""What is optional, imported when it is used."""

from __future__ import annotations

from typing import Any

__all__ = ["load_jax", "load_pillow"]


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


def _explain(need: str, extra: str) -> ImportError:
    return ImportError(f'{need}: pip install "edgeml-robotics[{extra}]"')
