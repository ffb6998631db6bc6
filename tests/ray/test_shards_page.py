"""The page of learners in shards: its program with Ray runs as it stands."""

import os
import re
import subprocess
import sys

from pairs import ROOT

PAGE = (ROOT / "docs" / "guides" / "sharded-learner.md").read_text()


def test_its_program(ray, tmp_path):
    (program,) = re.findall(
        r"^```python\n# shards_ray.py\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )
    (tmp_path / "shards_ray.py").write_text(program)
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "shards_ray.py"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "TMPDIR": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "100 sent\n(256,)\nweights came: True\n"
