"""How what an end refuses is counted and told."""

from __future__ import annotations

import logging
import weakref
from collections import Counter

from edgeml.core.errors import Malformed
from edgeml.core.refusals import Refusals


class Large:
    """What somebody sent."""


def refuse(refusals: Refusals) -> weakref.ref[Large]:
    large = Large()
    try:
        raise Malformed("it is too short")
    except Malformed as error:
        refusals.note("Malformed", "zmq://192.0.2.7:1", "192.0.2.7", error)
    return weakref.ref(large)


def test_who_keeps_the_log_does_not_keep_what_was_refused(caplog):
    counts: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        sent = refuse(Refusals("here", counts))
    assert [record.getMessage() for record in caplog.records] == [
        "here refused zmq://192.0.2.7:1: it is too short (Malformed); more like it are counted"
    ]
    assert counts == {"Malformed": 1}
    assert sent() is None


def test_each_is_counted_and_of_each_host_and_kind_one_is_told_but_of_keys_each_reason(caplog):
    counts: Counter[str] = Counter()
    refusals = Refusals("here", counts)
    with caplog.at_level(logging.WARNING):
        for why in ("no key", "no key", "an old key"):
            for kind in ("Malformed", "PermissionDenied"):
                for host in ("192.0.2.7", "192.0.2.8"):
                    refusals.note(kind, host, host, why)
    assert counts == {"Malformed": 6, "PermissionDenied": 6}
    assert len(caplog.records) == 2 + 4
