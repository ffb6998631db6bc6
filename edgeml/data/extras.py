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
        raise ImportError('this needs JAX: pip install "edgeml-robotics[jax]"') from error
    return jax


def load_pillow() -> Any:
    """Return the module `PIL.Image`.

    Raises:
        ImportError: it is not installed; the text says how to.
    """
    try:
        import PIL.Image
    except ImportError:
        raise ImportError("images need Pillow: pip install 'edgeml-robotics[rlds]'") from None
    return PIL.Image
