"""What is installed can be imported, and takes nothing large with it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import agentlace.action, agentlace.inference, agentlace.trainer, agentlace.internal.utils
import agentlace.data.data_store, agentlace.data.tfds, agentlace.data.jaxrl_data_store
import agentlace.data.sampler, agentlace.data.trajectory_buffer
heavy = {"jax", "tensorflow", "tensorflow_datasets", "cv2", "PIL", "gymnasium", "pickle5", "lz4"}
print(sorted(heavy & set(sys.modules)))
"""


def test_nothing_optional_is_imported_before_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
