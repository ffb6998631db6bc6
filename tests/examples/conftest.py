"""What the tests of the examples share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(compiled_once: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compiled_once.items():
            patch.setenv(name, value)
        yield
