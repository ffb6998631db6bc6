"""Some runs of `python -m tests.chaos`; all of its faults are slow."""

import pytest

from chaos.faults import FAULTS, of_transport
from chaos.harness import Plan, run

TRANSPORTS = ("grpc", "shm", "ws", "zmq")
SEEDS = 3


@pytest.mark.parametrize(
    ("transport", "fault"),
    [("grpc", "kills"), ("shm", "kills"), ("ws", "storm"), ("zmq", "kills"), ("zmq", "storm")],
)
def test_nothing_is_lost_or_late_whatever_is_done(zygote, tmp_path, transport, fault):
    # The machine is shared with other tests, of which waits know little.
    plan = Plan(transport, fault, 0, items=400, seconds=1.0, late=1.0)
    assert run(plan, tmp_path / "run", zygote) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_lost_or_late_whatever_is_done_at_any_moment(zygote, tmp_path, transport, fault):
    for seed in range(1, 1 + SEEDS) if fault in [*of_transport(transport), "kills"] else ():
        plan = Plan(transport, fault, seed)
        assert run(plan, tmp_path / str(seed), zygote) == []
