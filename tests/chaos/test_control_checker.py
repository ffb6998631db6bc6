"""The checker, by histories that are told here, and by a library that is broken on purpose."""

import pytest

from chaos import control_breaks
from chaos.control import Plan, run
from chaos.control_checker import check

TIMEOUT = 0.2


def style(keys=("arm",), priority=None):
    return {"keys": [*keys], "priority": priority, "merge": None}


def plan(leases=False):
    priorities = {"policy": 0, "script": 0, "human": 10}
    return {
        **{"who": "harness", "life": 0, "e": "plan", "t": 0.0, "ttl": 0.3},
        "action_timeout": {"arm": TIMEOUT},
        "action_rate": 50.0 if leases else None,
        "styles": {n: style(priority=p if leases else None) for n, p in priorities.items()},
    }


class History:
    """Of a device's life, and of what else is told."""

    def __init__(self, leases=False, life=1, ahead=1000.0):
        self.events = [plan(leases)]
        self.life, self.ahead = life, ahead
        self.index = self.actions = self.halts = 0
        self.tell("clock", 0.1, who="harness", of="device", life_of=life, ahead=ahead)

    def tell(self, e, t, who="device", **more):
        life = {"device": self.life, "harness": 0}.get(who, 1)
        self.events.append({"who": who, "life": life, "e": e, "t": t, **more})

    def row(self, t, outcome="done", key="arm", index=None, **more):
        self.index += 1
        row = {
            **{"index": self.index if index is None else index, "key": key, "outcome": outcome},
            **{"client_id": None, "label": None, "number": None, "policy": None},
            **{"observation": None, "age": None, "at": t + self.ahead, **more},
        }
        for e in ("row", "on record"):
            self.tell(e, t, **row)

    def see(self, n, t):
        self.tell("observed", t, n=n, not_after=t)

    def act(
        self, t, n, by="policy", of=1, taken=None, valid=None, on_record=True, took=0.001, **more
    ):
        """An action that began at `t`, by what was observed at `taken`, or made just now."""
        self.actions += 1
        event = {"key": "arm", "client": by, "by": by, "of": of, "n": n, "valid": valid}
        row = {"client_id": by, "label": by, "number": n, "policy": f"{by}-{of}", "age": 0.0}
        if taken is None:
            event |= {"made": t, "age": 0.0}
        else:
            event |= {"rests_on": [self.life, n]}
            row |= {"observation": int((taken + self.ahead) * 1e9), "age": t - taken + 1e-5}
            self.see(n, taken)
        self.tell("act", t, **{**event, **more})
        if took is not None:
            self.tell("acted", t + took, key="arm", by=by, n=n)
        if on_record:
            self.row(t, **row)

    def halt(self, t, at=None):
        self.halts += 1
        self.row(t if at is None else at, "halt")
        self.tell("halt", t, key="arm")

    def end(self, t, halts=None):
        stats = {"actions": self.actions, "halts": self.halts if halts is None else halts}
        self.tell("stopping", t)
        self.tell("stopped", t + 0.01, stats=stats)
        self.tell("end", t + 0.02)
        return self

    def found(self):
        # What is told of one moment stays in the order in which it is told.
        self.events.sort(key=lambda event: event["t"])
        return check(self.events)


def steady(first=1, last=10, **more):
    history = History(**more)
    for n in range(first, last + 1):
        history.act(1.0 + n / 50, n, taken=1.0 + n / 50 - 0.005)
    return history


def test_nothing_is_wrong_where_all_is_well():
    history = steady()
    history.halt(1.2 + TIMEOUT + 0.001)
    assert history.end(2.0).found() == []


def test_blind_actions_are_as_old_as_they_are_said_to_be_and_since():
    for age, valid, wrong in ((0.0, 0.1, 0), (0.09, 0.1, 0), (0.11, 0.1, 1)):
        history = History()
        history.act(1.0, 1, valid=valid, age=age)
        history.events[-3]["age"] = history.events[-2]["age"] = 0.2
        for event in history.events:
            if event["e"] in ("row", "on record"):
                event["age"] = 0.2
        history.halt(1.0 + TIMEOUT)
        found = history.end(2.0).found()
        assert len(found) == wrong, found
        assert all("began at an age of 109.5 ms, and was valid for 100" in each for each in found)


@pytest.mark.parametrize(("valid", "age"), [(0.1, 0.11), (None, TIMEOUT + 0.001)])
def test_an_action_past_its_age_is_found(valid, age):
    history = History()
    history.act(2.0, 1, taken=2.0 - age, valid=valid)
    history.halt(2.0 + TIMEOUT)
    (wrong,) = history.end(3.0).found()
    assert f"began at an age of {age * 1e3:.1f} ms" in wrong


def test_an_observation_of_an_earlier_life_is_as_old_as_it_is_whatever_its_id():
    history = History()
    history.see(7, 1.0)
    history.tell("kill", 1.5, who="harness", of="device", life_of=1)
    history.life, history.ahead, history.index = 2, 0.5, 0
    history.tell("clock", 1.6, who="harness", of="device", life_of=2, ahead=0.5)
    # By the new clock what was observed at 1.0 looks like a moment ago.
    history.act(2.0, 7, taken=1.99, rests_on=[1, 7], valid=0.1)
    history.events = [e for e in history.events if e["e"] != "observed" or e["life"] == 1]
    history.halt(2.0 + TIMEOUT)
    assert any("began at an age of" in each for each in history.end(3.0).found())


def test_an_id_that_is_younger_than_its_observation_is_found():
    history = History()
    history.act(2.0, 1, taken=1.99)
    for event in history.events:
        if event["e"] == "observed":
            event["not_after"] = 1.95
    history.halt(2.0 + TIMEOUT)
    assert any("older than its id" in each for each in history.end(3.0).found())


def test_an_age_on_record_that_is_below_the_true_one_is_found():
    history = History()
    history.act(2.0, 1, taken=1.9)
    for event in history.events:
        if event["e"] in ("row", "on record"):
            event["age"] = 0.05
    history.halt(2.0 + TIMEOUT)
    (wrong,) = history.end(3.0).found()
    assert "its age is 100.0 ms, on record are 50.0 ms" in wrong


def test_numbers_of_one_driver_rise():
    history = History()
    for t, n in ((1.0, 1), (1.02, 3), (1.04, 2)):
        history.act(t, n, taken=t - 0.01)
    history.halt(1.04 + TIMEOUT)
    (wrong,) = history.end(2.0).found()
    assert "arm 2 of policy 1 at 1.040 came after number 3" in wrong
    history = History()
    for t, n, of in ((1.0, 5, 1), (1.02, 1, 2)):  # a new life begins anew
        history.act(t, n, of=of, taken=t - 0.01)
    history.halt(1.02 + TIMEOUT)
    assert history.end(2.0).found() == []


def test_the_record_has_each_action_once():
    history = steady()
    history.act(1.22, 11, taken=1.21, on_record=False)
    history.halt(1.22 + TIMEOUT)
    (wrong,) = history.end(2.0).found()
    assert "arm 11 of policy 1 at 1.220 is not on record" in wrong
    for more in ({"client_id": "policy", "number": 12}, {"client_id": "policy", "number": 10}):
        history = steady()
        history.row(1.21, **more)
        history.halt(1.2 + TIMEOUT)
        (wrong,) = history.end(2.0).found()
        assert "on record, and never done" in wrong
    history = steady()
    history.row(1.2 + TIMEOUT, "halt", index=12)
    history.tell("halt", 1.2 + TIMEOUT, key="arm")
    history.halts = 1
    (one, two) = history.end(2.0).found()
    assert "after 10 comes 12" in one
    assert "after 10 comes 12" in two


def test_of_a_killed_device_what_it_began_last_need_not_be_on_record():
    history = steady()
    history.act(1.22, 11, taken=1.21, on_record=False, took=None)
    history.tell("kill", 1.3, who="harness", of="device", life_of=1)
    assert history.found() == ["no device came to tell what it did"]


@pytest.mark.parametrize(
    ("late", "waited", "text"),
    [
        (-0.01, 0.0, "10.0 ms too early"),
        (0.0, 0.0, ""),
        (0.019, 0.0, ""),
        (0.03, 0.0, "arm was made safe 30 ms after the bound, waits 0"),
        (0.03, 0.02, ""),
    ],
)
def test_the_device_is_made_safe_within_a_tick_of_the_bound(late, waited, text):
    history = steady()
    bound = 1.2 + TIMEOUT
    if waited:
        history.tell("waited", bound + 0.015, since=bound - 0.01, seconds=waited)
    history.halt(bound + late)
    found = history.end(2.0).found()
    assert len(found) == bool(text), found
    assert all(text in each for each in found)


def test_a_silence_that_nobody_made_safe_is_found():
    history = steady()
    history.act(1.5, 11, taken=1.49)
    history.halt(1.5 + TIMEOUT)
    (wrong,) = history.end(2.0).found()
    assert "arm went on unsafe 100 ms after the bound" in wrong
    (wrong,) = steady().end(1.3).found()
    assert "arm was not made safe as the device stopped" in wrong
    history = steady()
    history.see(99, 1.5)
    history.tell("kill", 1.6, who="harness", of="device", life_of=1)
    assert any("arm was left unsafe 100 ms after" in each for each in history.found())


def test_a_device_is_made_safe_at_once_as_it_stops():
    history = steady()
    history.halts = 1
    history.end(1.25)
    history.halt(1.255)
    assert history.found() == []


def test_a_device_is_made_safe_once_in_a_silence_and_not_before_it_did_anything():
    history = History()
    history.halt(1.0)
    history.act(1.1, 1, taken=1.09)
    history.halt(1.1 + TIMEOUT)
    history.halt(1.1 + TIMEOUT + 0.1)
    early, twice = history.end(2.0).found()
    assert "before it had done anything" in early
    assert "made safe twice in one silence" in twice


def test_a_halt_that_an_action_overtook_counts_by_when_it_was_decided():
    history = steady()
    bound = 1.2 + TIMEOUT
    history.act(bound + 0.002, 11, taken=bound - 0.01)
    history.halt(bound + 0.003, at=bound + 0.001)
    history.index -= 2
    history.events = [e for e in history.events if e["e"] not in ("row", "on record")] + sorted(
        (e for e in history.events if e["e"] in ("row", "on record")), key=lambda e: e["at"]
    )
    rows = [e for e in history.events if e["e"] == "row"]
    for n, row in enumerate(rows, 1):
        row["index"] = n
    for n, row in enumerate((e for e in history.events if e["e"] == "on record"), 1):
        row["index"] = n
    for row in history.events:
        if row["e"] in ("row", "on record"):
            row["t"] = bound + 0.1
    history.halt(bound + 0.002 + TIMEOUT)
    for row in history.events[-3:]:
        if "index" in row:
            row["index"] = len(rows) + 1
    assert history.end(2.0).found() == []


def test_what_a_driver_was_told_is_done_was_done():
    history = steady()
    for n in (10, 11):
        history.tell("told", 1.25, who="policy", key="arm", n=n, outcome="ok")
    history.halt(1.2 + TIMEOUT)
    (wrong,) = history.end(2.0).found()
    assert "('policy', 1, 'arm', 11) was said to be done, and is not" in wrong


def test_a_driver_of_which_nothing_is_taken_in_calm_is_found_but_where_the_machine_is_busy():
    for waited, wrong in ((1.0, 1), (6.0, 0)):
        history = steady()
        history.halt(1.2 + TIMEOUT)
        history.tell("waited", 2.0 + waited, since=2.0, seconds=waited)
        history.tell("not taken", 12.0, who="policy", since=2.0, stats={})
        found = history.end(13.0).found()
        assert len(found) == wrong, found
        assert all("policy: no action is taken in calm" in each for each in found)


# Hands --------------------------------------------------------------------------------------


def contest(*writers, ready=()):
    """A history in which each of ``(name, first moment, last moment)`` acts in turn."""
    history = History(leases=True)
    for name in ("policy", "script", "human"):
        history.tell("connected", 0.5, who=name)
    history.numbers = dict.fromkeys(("policy", "script", "human"), 0)
    for name, since in ready:
        history.tell("wants", since, who=name)
    for writer in writers:
        write(history, *writer)
    return history


def write(history, name, first, last):
    for k in range(round((last - first) * 50) + 1):
        history.numbers[name] += 1
        t = first + k / 50
        history.act(t, history.numbers[name], taken=t - 0.005, by=name)


def over(history, t):
    history.halt(t + TIMEOUT)
    return history.end(t + 1.0).found()


def test_a_writer_begins_a_period_after_the_other_and_not_while_that_is_at_work():
    ready = [("policy", 0.6), ("human", 1.985)]
    assert over(contest(("policy", 1.0, 2.0), ("human", 2.02, 2.5), ready=ready), 2.5) == []
    found = over(contest(("policy", 1.0, 2.0), ("human", 2.015, 2.495), ready=ready), 2.495)
    assert len(found) == 1
    assert "human 1 at 2.015 began 15.0 ms after arm 51 of policy 1" in found[0]
    history = contest(("policy", 1.0, 1.98), ready=ready)
    history.act(2.0, 51, taken=1.99, took=0.1)
    for event in history.events:  # it wanted the robot only then
        event["t"] = 2.015 if (event["who"], event["e"]) == ("human", "wants") else event["t"]
    write(history, "human", 2.04, 2.5)
    (wrong,) = over(history, 2.5)
    assert "human 1 at 2.040 began while arm 51 of policy 1 at 2.000 was at work" in wrong


def test_who_has_priority_has_the_robot_a_tick_later():
    for since, wrong in ((1.99, 0), (1.95, 2)):
        ready = [("policy", 0.6), ("human", since)]
        found = over(contest(("policy", 1.0, 2.0), ("human", 2.02, 2.5), ready=ready), 2.5)
        assert len(found) == wrong, found
        assert all("after it could have had the robot, which it wanted" in each for each in found)


def test_who_has_none_has_it_a_tick_after_the_others_lease():
    for e, then, wrong in (
        ("kill", 2.33, 0),
        ("kill", 2.4, 1),
        ("stands", 2.33, 0),
        ("stands", 2.4, 1),
    ):
        history = contest(("policy", 1.0, 2.0), ready=[("policy", 0.6), ("script", 0.7)])
        history.tell(e, 2.01, who="harness", of="policy", life_of=1)
        history.halt(2.0 + TIMEOUT)
        write(history, "script", then, 3.0)
        found = over(history, then + round((3.0 - then) * 50) / 50)
        assert len(found) == wrong, found
        assert all("script 90 ms after it could" in each for each in found)


def test_who_waits_has_it_a_tick_after_it_was_given_back():
    for then, wrong in ((2.04, 0), (2.1, 1)):
        history = contest(("policy", 1.0, 2.0), ready=[("policy", 0.6), ("script", 0.7)])
        history.tell("gives", 2.01, who="policy")
        history.tell("given", 2.015, who="policy")
        write(history, "script", then, 2.5)
        assert len(over(history, then + round((2.5 - then) * 50) / 50)) == wrong


def test_who_is_kept_from_its_work_is_not_waited_for():
    history = contest(("policy", 1.0, 2.0), ready=[("policy", 0.6), ("script", 0.7)])
    history.tell("kill", 2.01, who="harness", of="policy", life_of=1)
    history.tell("proxy", 1.9, who="harness", of="script", do="set", dark="both", since=1.8)
    history.tell("proxy", 2.5, who="harness", of="script", do="calm", since=2.5)
    history.halt(2.0 + TIMEOUT)
    write(history, "script", 3.0, 3.5)
    assert over(history, 3.5) == []


# A library that is broken on purpose --------------------------------------------------------

BREAKS = {
    "ages are ignored": ("freeze-driver", "began at an age of"),
    "an action is judged as it came": ("hang-device", "ms after it was judged"),
    "the way is forgotten": ("freeze-driver", "began at an age of"),
    "ids are late": ("none", "its observation is older than its id"),
    "the future is believed in": ("reboot-device", "began at an age of"),
    "actions are turned about": ("none", "came after number"),
    "actions are answered and not done": ("none", "on record, and never done"),
    "actions are done twice": ("none", "is not on record"),
    "rows are left out": ("none", "on record"),
    "rows are doubled": ("none", "on record"),
    "halts are late": ("freeze-driver", "was made safe"),
    "halts are early": ("freeze-driver", "too early"),
    "halts never come": ("freeze-driver", "went on unsafe"),
    "halts come twice": ("freeze-driver", "made safe"),
    "halts wait for handlers": ("hang-device", "after the bound"),
    "the end is unsafe": ("restart-device", "was not made safe as the device stopped"),
    "anybody may act": ("handovers", "ms after arm"),
    "leases last too long": ("handovers", "after it could have had the robot"),
    "priorities are ignored": ("handovers", "after it could have had the robot"),
    "writers leave no period": ("handovers", "ms after arm"),
}
AT_ONCE = ["ids are late"]


@pytest.mark.parametrize("how", AT_ONCE)
def test_what_is_broken_is_found(machines, tmp_path, how):
    fault, text = BREAKS[how]
    wrong: list[str] = []
    for seed in range(8):  # the fault must come at the wrong moment, to the right driver
        leases = fault == "handovers"
        seconds = 6.0 if leases else 2.0
        plan = Plan("zmq", fault, seed, seconds, leases=leases, thinking=False, breaks=how)
        wrong = run(plan, tmp_path / str(seed), machines)
        if any(text in each for each in wrong):
            return
    pytest.fail(f"nothing about {text!r} is found, but: {wrong}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", sorted(set(BREAKS) - set(AT_ONCE)))
def test_whatever_is_broken_is_found(machines, tmp_path, how):
    test_what_is_broken_is_found(machines, tmp_path, how)


def test_each_way_to_break_it_is_looked_for():
    assert set(BREAKS) == set(control_breaks.BREAKS)
