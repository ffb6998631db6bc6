"""What strangers can have a server log."""

import logging
import time

from edgeml.core import lines
from edgeml.core.lines import Lines

log = logging.getLogger("edgeml.test_lines")


def test_a_flood_is_a_few_lines_a_second_and_the_rest_is_counted(caplog, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    written = Lines(log)
    for number in range(1000):
        written.write(logging.WARNING, f"no. {number}")
    assert [r.message for r in caplog.records] == [f"no. {n}" for n in range(50)]
    caplog.clear()
    now = 101.0
    written.write(logging.WARNING, "later")
    assert [r.message for r in caplog.records] == [
        "950 lines were left out, as there were too many",
        "later",
    ]


def test_a_line_is_one_line_and_short(caplog):
    Lines(log).write(logging.WARNING, "a\nWARNING: forged\x1b[2J" + 1000 * "x")
    (record,) = caplog.records
    assert record.message.isprintable()
    assert len(record.message) < 600


def test_what_was_said_once_is_not_said_again_though_others_say_much(caplog, monkeypatch):
    monkeypatch.setattr(lines, "_EACH_SECOND", 10**6)
    written = Lines(log)
    for number in range(5000):
        written.write_once(logging.WARNING, f"no. {number}")
        written.write_once(logging.WARNING, f"no. {number}")
    assert len(caplog.records) == 5000
    assert len(written._said) <= 1024


def test_what_nobody_reads_takes_no_room(caplog):
    caplog.set_level(logging.WARNING, log.name)
    written = Lines(log)
    for number in range(1000):
        written.write(logging.INFO, f"no. {number}")
    written.write(logging.WARNING, "seen")
    assert [r.message for r in caplog.records] == ["seen"]
