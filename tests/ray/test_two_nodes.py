"""What crosses between two nodes, as the system counts it."""

import json
import os
import subprocess
import sys

import pytest

from pairs import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_cross_between_nodes_once(tmp_path):
    """100 MB to eight subscribers on the second node; it starts two Rays of its own."""
    program = ROOT / "benchmarks" / "shards.py"
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, program, "--only", "weights", "--json", figures],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["results"]["weights"]
    assert 1.0 <= rows["by Ray, once to the node"]["copies"] < 1.05
    # And what is counted is what crosses.
    assert 8.0 <= rows["by a TrainerServer, zmq"]["copies"] < 8.4
