"""The checker, by histories that are told here, and by a library that is broken on purpose."""

import pytest

from chaos.checker import check
from chaos.harness import Plan, run


def told(*events, actor="actor-0", life=1):
    return [{"who": actor, "life": life, **event} for event in events]


def inserted(first, last, t=1.0):
    events = []
    for n in range(first, last + 1):
        events += [{"e": "insert", "t": t, "n": n}, {"e": "inserted", "t": t, "n": n}]
    return events


def update(t, applied, durable=None, took=0.01, outcome="ok"):
    return {
        **{"e": "call", "name": "update", "t": t, "began": t - took, "took": took, "limit": 1.0},
        **{"applied": applied, "durable": durable, "outcome": outcome},
    }


def end(t=8.0):
    return {"e": "end", "t": t}


def learner(contents, t=9.0, life=1, e="contents"):
    started = [{"e": "start", "t": t - 0.1}] if e == "loaded" else []
    return told(*started, {"e": e, "t": t, "contents": contents}, actor="learner", life=life)


def items(*numbers, actor=0):
    return [[actor, n] for n in numbers]


def killed(who, life, t):
    return [{"who": "harness", "life": 0, "e": "kill", "of": who, "life_of": life, "t": t}]


def found(*parts, logs=False):
    return check(sorted((e for part in parts for e in part), key=lambda e: e["t"]), logs=logs)


def test_nothing_is_wrong_where_all_is_well():
    whole = told(*inserted(1, 5), update(2.0, 5, 5), end())
    assert found(whole, learner(items(1, 2, 3, 4, 5))) == []


def test_two_actors_may_come_in_any_order_of_each_other():
    a, b = told(*inserted(1, 2), end()), told(*inserted(1, 2), end(), actor="actor-1")
    mixed = [[1, 1], [0, 1], [0, 2], [1, 2]]
    assert found(a, b, learner(mixed)) == []


@pytest.mark.parametrize(
    ("has", "text"),
    [
        ((1, 2, 4, 5), "lost 1 items (3)"),
        ((1, 2, 3), "lost 2 items (4-5)"),
        ((1, 2, 3, 3, 4, 5), "1 items (3) more than once"),
        ((1, 3, 2, 4, 5), "out of order: 1 items (2)"),
        ((1, 2, 3, 4, 5, 6), "1 items (6) were never inserted"),
    ],
)
def test_what_the_learner_has_is_compared_item_by_item(has, text):
    (wrong,) = found(told(*inserted(1, 5), end()), learner(items(*has)))
    assert text in wrong


def test_items_of_nobody_are_found():
    (wrong,) = found(told(*inserted(1, 1), end()), learner([*items(1), [7, 1]]))
    assert "items of [7], who inserted none" in wrong


def test_what_a_killed_actor_held_may_be_lost_without_a_log_and_not_with_one():
    parts = told(*inserted(1, 5), update(2.0, 2)), killed("actor-0", 1, 3.0), learner(items(1, 2))
    assert found(*parts) == []
    assert "lost 3 items (3-5)" in found(*parts, logs=True)[0]


def test_what_a_killed_actor_began_to_insert_may_be_there_or_not():
    life = told(*inserted(1, 2), {"e": "insert", "t": 1.5, "n": 3}), killed("actor-0", 1, 3.0)
    for has in ((1, 2), (1, 2, 3)):
        assert found(*life, learner(items(*has)), logs=True) == []


def test_what_a_killed_actor_was_told_is_durable_must_be_there():
    life = told(*inserted(1, 5), update(2.0, 4, 3)), killed("actor-0", 1, 3.0)
    gone = killed("learner", 1, 3.0)
    again = learner(items(1, 2, 3), 4.0, 2, "loaded")
    assert found(*life, gone, again, learner(items(1, 2, 3), life=2)) == []
    lost = found(*life, gone, again, learner(items(1, 2), life=2))
    assert any("lost 1 items (3)" in text for text in lost)
    # Without a kill of the learner, what is applied stays.
    assert "lost 1 items (4)" in found(*life, learner(items(1, 2, 3)))[0]


def test_what_was_said_to_be_durable_must_be_in_what_is_loaded_from_then_on():
    actor = told(*inserted(1, 5), update(2.0, 3, 1), update(3.0, 2, 3), end())
    final = learner(items(1, 2, 3, 4, 5), life=2)
    for when, wants in ((1.0, 0), (2.5, 1), (5.0, 4)):
        for has in range(5):
            loaded = learner(items(*range(1, has + 1)), when, 2, "loaded")
            wrong = [text for text in found(actor, loaded, final) if "said to be durable" in text]
            assert bool(wrong) == (has < wants)


def test_what_a_store_was_told_to_let_go_of_must_be_in_what_is_loaded_from_then_on():
    first = told(*inserted(1, 4)), killed("actor-0", 1, 3.0)
    second = told(*inserted(5, 6, 4.0), {"e": "released", "t": 5.0, "n": 5}, end(), life=2)
    final = learner(items(1, 2, 3, 4, 5, 6), life=2)
    for when, has, wrong in ((4.5, 0, False), (6.0, 5, False), (6.0, 4, True)):
        loaded = learner(items(*range(1, has + 1)), when, 2, "loaded")
        texts = found(*first, second, loaded, final, logs=True)
        assert [text for text in texts if "1 items (5) were said" in text] == texts
        assert bool(texts) == wrong


def test_a_late_call_is_found_but_for_the_time_that_its_process_was_held():
    slow = told(*inserted(1, 1), update(5.0, 1, took=2.0), end())
    assert "update took 2.00 s of 1" in found(slow, learner(items(1)))[0]
    held = [
        {"who": "harness", "life": 0, "e": e, "of": "actor-0", "life_of": 1, "t": t}
        for e, t in (("freeze", 3.5), ("thaw", 4.5))
    ]
    assert found(slow, held, learner(items(1))) == []


def test_a_call_that_never_comes_back_is_found():
    life = told(*inserted(1, 1), {"e": "calling", "name": "update", "t": 2.0}, update(1.5, 1))
    life = sorted(life, key=lambda e: e["t"])
    assert found(life, killed("actor-0", 1, 2.5), learner(items(1))) == []
    (wrong,) = found(life, killed("actor-0", 1, 8.0), learner(items(1)))
    assert "update hadn't ended after 6.00 s" in wrong


def test_a_ledger_that_does_not_add_up_is_found():
    good = {"accepted": 5, "applied": 3, "durable": 2, "refused": {}, "dropped": 0, "lost": 0}
    for waiting, n in ((2, 0), (1, 1)):
        stats = {"e": "stats", "t": 2.0, "stats": {**good, "waiting": waiting}}
        wrong = found(told(*inserted(1, 1), stats, end()), learner(items(1)))
        assert len(wrong) == n


def test_older_weights_after_newer_ones_are_found():
    told_weights = [{"e": "weights", "t": t, "of": 1, "version": v} for t, v in ((1, 1), (2, 5))]
    older = {"e": "weights", "t": 3, "of": 1, "version": 4}
    parts = inserted(1, 1), end(), learner(items(1))
    assert found(told(*parts[0], *told_weights, parts[1]), parts[2]) == []
    assert found(told(*parts[0], *told_weights, older, parts[1]), parts[2])


def test_a_learner_that_never_comes_to_its_end_is_found():
    assert found(told(*inserted(1, 1), end())) == ["no learner came to tell what it has"]


# A library that is broken on purpose ---------------------------------------------------------

BREAKS = {
    "a chunk is dropped": ("none", "lost"),
    "a chunk is inserted twice": ("none", "more than once"),
    "a chunk is turned about": ("none", "out of order"),
    "an item is refused": ("none", "lost"),
    "an item is left out": ("none", "lost"),
    "an item is spoilt": ("none", "isn't theirs"),
    "calls outlive their deadlines": ("none", "echo took"),
    "marks are saved too early": ("kill-learner", "lost"),
    "marks are saved too late": ("kill-learner", "more than once"),
    "applied is said to be durable": ("kill-learner", "said to be durable"),
    "a checkpoint is said to be saved": ("kill-learner", "said to be durable"),
}
AT_ONCE = ["a chunk is dropped"]


@pytest.mark.parametrize("how", AT_ONCE)
def test_what_is_broken_is_found(zygote, tmp_path, how):
    fault, text = BREAKS[how]
    wrong: list[str] = []
    for seed in range(8):  # a kill must come at the wrong moment
        plan = Plan("zmq", fault, seed, items=600, seconds=1.0, breaks=how)
        wrong = run(plan, tmp_path / str(seed), zygote)
        if any(text in each for each in wrong):
            return
    pytest.fail(f"nothing about {text!r} is found, but: {wrong}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", sorted(set(BREAKS) - set(AT_ONCE)))
def test_whatever_is_broken_is_found(zygote, tmp_path, how):
    test_what_is_broken_is_found(zygote, tmp_path, how)
