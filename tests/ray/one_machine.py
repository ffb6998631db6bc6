"""A provider for Ray's cluster launcher whose only node is this machine, with a home of its own."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider


class Runner(CommandRunnerInterface):
    """Runs in a shell what would be run by ssh."""

    def __init__(self, home):
        self._home = home

    def run(self, cmd=None, *args, with_output=False, environment_variables=None, **kwargs):
        del args, kwargs
        if "ray stop" in (cmd or ""):
            return ""  # it ends each Ray of the machine it runs on, and this one is everybody's
        env = {**os.environ, "HOME": str(self._home)}
        for key, value in (environment_variables or {}).items():
            env[key] = value if isinstance(value, str) else json.dumps(value)
        if "-m edgeml" in (cmd or ""):
            # Others may run on this machine, of which "auto" could be any.
            env["RAY_ADDRESS"] = (self._home / "address").read_text()
        done = subprocess.run(
            ["bash", "-c", cmd or "true"],
            env=env,
            cwd=self._home,
            stdout=subprocess.PIPE if with_output else None,
            check=True,
        )
        return done.stdout.decode() if with_output else ""

    def _copy(self, source, target):
        source, target = (str(p).replace("~", str(self._home), 1) for p in (source, target))
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(source, target)

    def run_rsync_up(self, source, target, options=None):
        del options
        self._copy(source, target)

    def run_rsync_down(self, source, target, options=None):
        raise NotImplementedError

    def remote_shell_command_str(self):
        return "true"

    def run_init(self, *, as_head, file_mounts, sync_run_yet):
        del as_head, file_mounts, sync_run_yet


class OneMachine(NodeProvider):
    """Its node is there as long as a file tells its tags."""

    def __init__(self, provider_config, cluster_name):
        super().__init__(provider_config, cluster_name)
        self._home = Path(provider_config["home"])
        self._file = self._home / "tags.json"

    def _tags(self):
        with suppress(FileNotFoundError):
            return json.loads(self._file.read_text())
        return None

    def non_terminated_nodes(self, tag_filters):
        tags = self._tags()
        there = tags is not None and all(tags.get(k) == v for k, v in tag_filters.items())
        return ["head"] if there else []

    def is_running(self, node_id):
        return self._tags() is not None

    def is_terminated(self, node_id):
        return self._tags() is None

    def node_tags(self, node_id):
        return self._tags() or {}

    def external_ip(self, node_id):
        return "127.0.0.1"

    internal_ip = external_ip

    def create_node(self, node_config, tags, count):
        del node_config
        assert count == 1
        self._file.write_text(json.dumps(tags))

    def set_node_tags(self, node_id, tags):
        self._file.write_text(json.dumps(self.node_tags(node_id) | tags))

    def terminate_node(self, node_id):
        pid = int((self._home / "ray.pid").read_text())
        handle = os.pidfd_open(pid)
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        os.close(handle)
        self._file.unlink()

    def terminate_nodes(self, node_ids):
        for node_id in node_ids:
            self.terminate_node(node_id)

    def get_command_runner(self, *args, **kwargs):
        del args, kwargs
        return Runner(self._home)

    @staticmethod
    def bootstrap_config(cluster_config):
        return cluster_config
