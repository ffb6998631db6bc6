"""One zygote for all tests here, and one set of machines: they take seconds to start."""

import pytest

from chaos.machines import Machines
from chaos.processes import Zygote


@pytest.fixture(scope="session")
def zygote():
    with Zygote() as made:
        yield made


@pytest.fixture(scope="session")
def machines():
    with Machines() as made:
        yield made
