"""The suite for doors can fail: the guide's door, spoilt in each way that a promise is there for.

That it passes as it stands, tests/project/test_contributing.py sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgeml.testing import DoorTests
from pairs import ROOT

FILES = dict(
    re.findall(
        r"```(?:python|toml)\n# (\S+)\n(.*?)```",
        (ROOT / "docs" / "guides" / "write-a-door.md").read_text(),
        re.DOTALL,
    )
)

# The test that notices, what is spoilt, and how.
FAULTS = [
    (
        "test_arrays_come_and_go_as_a_native_clients_bit_by_bit",
        "return restore(base64.b64decode(data, validate=True), dtype, shape)",
        "return restore(base64.b64decode(data, validate=True), dtype.replace('>', '<'), shape)",
    ),
    (
        "test_an_array_of_any_layout_is_an_answer",
        "value.tobytes()",
        'value.tobytes("A")',
    ),
    (
        "test_values_come_and_go_as_a_native_clients",
        "return json.dumps(result, default=plain).encode()",
        'return json.dumps(result, default=plain).replace("-0.0", "0.0").encode()',
    ),
    ("test_scalars_of_numpy_are_answers", "(np.ndarray, np.generic)", "np.ndarray"),
    (
        "test_large_arrays_arrive_whole",
        "for at in range(0, len(line), PIECE):",
        "for at in range(0, min(len(line), PIECE), PIECE):",
    ),
    (
        "test_a_result_may_be_changed_once_it_is_returned",
        r'lambda result: tell(b"ok %s\n" % encode(result)),',
        r'lambda result: self.door.loop.do(lambda: settle(b"ok %s\n" % encode(result))),',
    ),
    (
        "test_each_client_gets_its_own_answers_in_order",
        "return await answered",
        "self.door.last = getattr(self.door, 'last', None) or await answered; "
        "return self.door.last",
    ),
    ("test_names_differ_inside_and_outside", "return {key: revive(", "return {f'{key}s': revive("),
    (
        "test_what_a_function_raises_is_told_and_the_next_call_answered",
        "json.dumps(str(error)).encode()",
        "b'\"an error\"'",
    ),
    (
        "test_a_result_that_cannot_be_encoded_is_an_error",
        'raise TypeError(f"a {type(value).__name__} can\'t be said in JSON")',
        "return str(value)",
    ),
    (
        "test_a_function_that_hangs_is_an_error_in_time",
        "lambda error: tell(failure(error)),",
        "lambda error: None,",
    ),
    ("test_a_function_that_takes_long_keeps_nobody_out", "self.loop.relieve()", "pass"),
    (
        "test_a_message_beyond_the_limit_reaches_nobody_and_hurts_nobody",
        "if size > self.door.limits.message_bytes:",
        "if size > 1e12:",
    ),
    (
        "test_what_is_nested_too_deep_or_has_too_many_values_is_refused and nested",
        "if not nesting:",
        "if nesting < -1000:",
    ),
    (
        "test_what_is_nested_too_deep_or_has_too_many_values_is_refused and many",
        "> limits.nodes:",
        "> 1e12:",
    ),
    (
        "test_hostile_messages_are_refused_at_once_and_cost_nothing",
        "return restore(base64.b64decode(data, validate=True), dtype, shape)",
        "return np.zeros(shape, dtype)",
    ),
    (
        "test_mutated_messages_hold_up_nobody_and_cost_no_memory",
        'raise Malformed(f"a line that begins with {verb[:20]!r}")',
        "await asyncio.sleep(60)",
    ),
    (
        "test_mutated_messages_hold_up_nobody_and_cost_no_memory",
        'raise Malformed(f"no JSON, or no array: {error}") from None',
        "import logging; logging.getLogger('edgeml.x').exception('so'); raise error",
    ),
    (
        "test_garbage_connections_hold_up_nobody_and_cost_no_memory",
        "self.refusals.note(type(why)",
        "__import__('time').sleep(5); self.refusals.note(type(why)",
    ),
    (
        "test_who_asks_and_does_not_read_holds_up_nobody_and_costs_no_memory",
        "await self.in_time(self.writer.drain())",
        "pass",
    ),
    (
        "test_half_messages_of_many_cost_no_more_memory_than_is_allowed",
        "held.enter_context(self.door.incoming.take(self.peer, len(pieces[-1])))",
        "pass",
    ),
    (
        "test_who_asks_ahead_leaves_the_others_answered",
        'await self.send(await self.call(self.guest, said) if verb == b"call" else b"ok null\\n")',
        "time = __import__('time').sleep(0.3)",
    ),
    (
        "test_who_is_one_too_many_is_told",
        "await self.send(failure(error))\n                return False",
        "return False",
    ),
    (
        "test_half_a_message_is_given_up",
        "timeout=self.door.limits.stall",
        "timeout=None",
    ),
    (
        "test_a_message_that_comes_slowly_arrives",
        "timeout=self.door.limits.stall",
        "timeout=self.door.limits.stall / 10",
    ),
    (
        "test_connections_from_one_address_are_limited",
        "sock = self.gate.bind(url)",
        "import socket; sock = socket.create_server((url.host, url.port))",
    ),
    (
        "test_who_says_nothing_is_cut_off",
        "self.accepted += 1",
        "self.accepted += 1; self.gate.greet(writer.get_extra_info('peername'))",
    ),
    (
        "test_clients_that_come_and_go_leave_nothing",
        "talk.guest.leave()",
        "pass",
    ),
    (
        "test_memory_is_freed_without_the_garbage_collector",
        "verb, _, said =",
        "self.lines = [*getattr(self, 'lines', []), line]; verb, _, said =",
    ),
    (
        "test_a_forked_child_keeps_neither_the_address_nor_the_clients_of_a_server_that_is_killed",
        "self.server = await",
        "self.another = sock.dup(); self.server = await",
    ),
    (
        "test_any_address_of_this_machine_is_opened_and_reached",
        "sock = self.gate.bind(url)",
        "sock = self.gate.bind(url.with_host('127.0.0.1'))",
    ),
    (
        "test_a_door_reports_in_plain_words",
        'name = "lines"\n',
        'name = "lines"\n\n    def report(self):\n        return {"version": 1}\n',
    ),
    ("test_a_function_may_stop_its_server", "self.loop.close(self.stop, GRACE)", "pass"),
    (
        "test_calls_may_be_under_way_when_a_server_stops",
        "self.loop.close(self.stop, GRACE)",
        "pass",
    ),
    (
        "test_the_connection_of_who_is_revoked_ends",
        "self.loop.do(self.look)",
        "pass",
    ),
    ("test_a_door_tells_where_it_is", "sock.getsockname()[1]", "url.port"),
    (
        "test_an_address_that_is_taken_is_an_oserror",
        "sock = self.gate.bind(url)",
        "sock = self.gate.bind(url.with_port(0))",
    ),
    ("test_an_address_can_be_taken_again_at_once", "self.loop.close(self.stop, GRACE)", "pass"),
    (
        "test_an_answer_given_just_before_the_close_is_delivered",
        "self.reader.feed_eof()",
        "self.writer.transport.abort()",
    ),
    (
        "test_closing_ends_all_calls_and_connections_soon",
        "self.loop.close(self.stop, GRACE)",
        "pass",
    ),
    (
        "test_a_server_that_drains_answers_what_it_has_and_says_so_to_others",
        "json.dumps(str(error)).encode()",
        "b'\"an error\"'",
    ),
    ("test_a_server_that_loads_says_so", "json.dumps(str(error)).encode()", "b'\"an error\"'"),
    (
        "test_who_has_no_key_is_refused_told_and_counted and nothing",
        "await self.send(failure(error))\n                return False",
        "return False",
    ),
    (
        "test_who_has_no_key_is_refused_told_and_counted and revoked",
        'token = said[:1000].decode("utf-8", "replace") if verb == b"token" else None',
        "token = None",
    ),
    (
        "test_who_is_refused_again_and_again_fills_no_log",
        "await self.send(failure(error))\n                return False",
        "self.door.refusals._told.clear(); self.door.note(self.peer, error)\n                "
        "await self.send(failure(error))\n                return False",
    ),
    (
        "test_a_key_tells_who_calls",
        "if self.guest is None:",
        "self.guest = getattr(self.door, 'first', None)\n        if self.guest is not None:\n"
        "            pass\n        else:",
    ),
    (
        "test_who_is_revoked_is_answered_no_more",
        "lambda error: tell(failure(error)),",
        r'lambda error: tell(b"ok null\n"),',
    ),
    (
        "test_a_role_that_allows_no_calls_is_told",
        "lambda error: tell(failure(error)),",
        r'lambda error: tell(b"ok null\n"),',
    ),
    (
        "test_tokens_are_shown_to_nobody_else",
        "self.secured = tls is not None",
        "self.secured, tls = True, None",
    ),
    (
        "test_native_clients_share_its_batches",
        "guest.call(",
        "while getattr(self.door, 'busy', False):\n            await asyncio.sleep(0.001)\n"
        "        self.door.busy = True\n"
        "        answered.add_done_callback(lambda _: setattr(self.door, 'busy', False))\n"
        "        guest.call(",
    ),
    (
        "test_a_rate_limit_counts_for_its_clients",
        "if self.guest is None:",
        "if True:",
    ),
    (
        "test_each_connection_has_a_session_that_ends_with_it",
        "talk.guest.leave()",
        "pass",
    ),
    ("test_a_reset_begins_a_session_anew", "self.guest.begin_episode()", "pass"),
]


def run(where: Path, module: str, only: str, settings: str = "") -> tuple[int, str]:
    """Hold a module to some tests of the suite, with more settings of the suite's."""
    info = where / "edgeml_lines-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeml-lines\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[edgeml.doors]\nlines = edgeml_lines\n")
    (where / "edgeml_lines.py").write_text(module)
    suite = FILES["tests/test_lines.py"] + settings
    (where / "test_lines.py").write_text(suite)
    seconds = 600 if settings else 80
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-x", f"--timeout={seconds}", "-k", only]
    done = subprocess.run(
        [*pytest_, f"--basetemp={where / 'temporary'}", "test_lines.py"],
        cwd=where,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(where), str(ROOT)])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=10 + 2 * seconds,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("promise", "right", "wrong"), FAULTS, ids=[each[0] for each in FAULTS])
def test_a_door_that_breaks_a_promise_is_found_out(
    promise: str, right: str, wrong: str, tmp_path: Path
) -> None:
    module = FILES["edgeml_lines.py"]
    assert right in module
    status, printed = run(tmp_path, module.replace(right, wrong), promise)
    assert status == 1, printed
    assert re.search("1 (failed|error)", printed), printed


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_door_stands_ten_thousand_spoilt_messages_and_connections(tmp_path: Path) -> None:
    settings = "\n    mutations = garbage = 10_000\n"
    status, printed = run(tmp_path, FILES["edgeml_lines.py"], "mutated or garbage", settings)
    assert status == 0, printed


def test_there_is_a_fault_for_each_promise() -> None:
    promises = {name for name in dir(DoorTests) if name.startswith("test_")}
    assert {each[0].partition(" ")[0] for each in FAULTS} == promises
