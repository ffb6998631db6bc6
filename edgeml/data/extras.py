"""What is optional, imported when it is used."""

from __future__ import annotations

from typing import Any

__all__ = ["load_jax"]


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
