"""Machines by Ray's own cluster launcher: started, led, and given back.

What is to be done in the cluster is done on its head, where the file's folder is copied to and
`edgeml` is run: so this machine needs to reach the head by ssh alone, as Ray's launcher does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from edgeml.core.errors import Unreachable, text_of
from edgeml.extras import load_ray
from edgeml.ray.files import Plan

__all__ = ["begin", "give_back", "run"]


def begin(plan: Plan) -> None:
    """Start the machines that the launcher's file names, or change them to what it says.

    Ray's processes on the head go on where they run already, and with them all servers.
    """
    sdk = _sdk()
    with _told(plan):
        sdk.create_or_update_cluster(_config(plan), no_restart=True)


def run(plan: Plan, words: Sequence[str]) -> None:
    """Run `edgeml` on the head, in a copy of the file's folder, with these words.

    Raises:
        Unreachable: it can't be run there, or failed, of which it has told.
    """
    sdk = _sdk()
    folder = f"edgeml/{plan.path.stem}"
    command = shlex.join(["python", "-m", "edgeml", *words])
    with _told(plan):
        sdk.run_on_cluster(_config(plan), cmd=f"mkdir -p ~/{folder}")
        sdk.rsync(_config(plan), source=f"{plan.folder}/", target=f"~/{folder}/", down=False)
        sdk.run_on_cluster(_config(plan), cmd=f"cd ~/{folder} && {command}")


def give_back(plan: Plan) -> None:
    """Give all machines back, the head too."""
    sdk = _sdk()
    with _told(plan):
        sdk.teardown_cluster(_config(plan))


def _sdk() -> Any:
    load_ray()
    return import_module("ray.autoscaler.sdk")


def _config(plan: Plan) -> Any:
    """What the launcher takes: a path, or the content."""
    return dict(plan.cluster) if isinstance(plan.cluster, dict) else str(plan.cluster)


@contextmanager
def _told(plan: Plan) -> Iterator[None]:
    """Say in one line what the launcher failed by, which it has told at length."""
    try:
        yield
    except (Exception, SystemExit) as error:  # click's, subprocess's, the provider's own
        where = plan.cluster if not isinstance(plan.cluster, dict) else plan.path
        raise Unreachable(
            f"Ray's cluster launcher failed with {where}: {text_of(error)}"
        ) from error
