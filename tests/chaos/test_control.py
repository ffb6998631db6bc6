"""Some runs of `python -m tests.chaos control` and `handovers`; most of it is by command."""

import pytest

from chaos.control import Plan, run
from chaos.control_faults import FAULTS, of_transport

TRANSPORTS = ("grpc", "shm", "zmq")
LATE = 0.3  # seconds more: the machine is shared with other tests, of which a witness knows little


@pytest.mark.parametrize(("transport", "leases"), [("grpc", False), ("shm", True), ("zmq", True)])
def test_no_action_is_late_and_no_silence_is_unsafe_whatever_is_done(
    machines, tmp_path, transport, leases
):
    plan = Plan(transport, "storm", 3, seconds=2.0, leases=leases, late=LATE)
    assert run(plan, tmp_path / "run", machines) == []


def test_a_robot_has_one_writer_whoever_wants_it_or_fails(machines, tmp_path):
    plan = Plan("zmq", "handovers", 0, handovers=6, leases=True, thinking=False, late=LATE)
    assert run(plan, tmp_path / "run", machines) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_action_is_late_and_no_silence_is_unsafe_at_any_moment(
    machines, tmp_path, transport, fault
):
    for seed in range(1, 4) if fault in [*of_transport(transport), "handovers"] else ():
        plan = Plan(transport, fault, seed, leases=fault == "handovers" or None)
        assert run(plan, tmp_path / str(seed), machines) == []
