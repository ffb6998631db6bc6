"""One zygote for all tests here: it takes seconds to start."""

import pytest

from chaos.processes import Zygote


@pytest.fixture(scope="session")
def zygote():
    with Zygote() as made:
        yield made
