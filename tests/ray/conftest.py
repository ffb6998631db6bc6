"""Ray, once for all tests here, and what they deploy."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeml.ray
from pairs import free_port


@pytest.fixture(scope="session")
def ray() -> Iterator[object]:
    """The module `ray`, connected to a Ray of one node, which ends with the tests."""
    import ray

    # Sockets lie there, whose names may have some hundred characters.
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    os.environ["EDGEML_RAY_NAMES"] = f"127.0.0.1:{free_port()}"
    try:
        ray.init(
            num_cpus=16,
            include_dashboard=False,
            object_store_memory=200 << 20,
            log_to_driver=False,
            _temp_dir=str(home),
        )
        yield ray
    finally:
        ray.shutdown()
        del os.environ["EDGEML_RAY_NAMES"]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        shutil.rmtree(home)


@pytest.fixture
def name(ray) -> Iterator[str]:
    """A name for what a test deploys, which is deleted at its end."""
    name = f"test-{secrets.token_hex(3)}"
    yield name
    if name in edgeml.ray.status():
        edgeml.ray.delete(name)
