"""What makes an item known, through checkpoints and forks."""

import os

import pytest

from edgeml.data import QueuedDataStore, checkpoint
from edgeml.data.numbering import Numbering


def test_a_branch_shares_what_came_before_it():
    first = Numbering()
    second = first.branch(100)
    assert second.id != first.id
    assert second.lineage == ((first.id, 100),)
    third = second.branch(150)
    assert third.lineage == ((first.id, 100), (second.id, 150))
    assert third.branch(120).lineage == ((first.id, 100), (second.id, 120))
    assert third.branch(80).lineage == ((first.id, 80),)  # of what all three share, once
    assert first.branch(0).lineage == ()


def test_a_lineage_is_bounded():
    numbering = Numbering()
    for at in range(1, 200):
        numbering = numbering.branch(at)
    assert len(numbering.lineage) == 64
    assert numbering.lineage[-1][1] == 199
    assert Numbering.from_list(numbering.to_list()) == numbering


def test_restarts_that_get_no_further_make_a_lineage_no_longer():
    first = Numbering()
    numbering = first
    for _ in range(200):
        numbering = numbering.branch(7)
    assert numbering.lineage == ((first.id, 7),)


@pytest.mark.parametrize("wrong", [[], [(1,)], [(-1, 0)], [(1 << 63, 0)], [(1, 2)] * 70, [1]])
def test_what_is_no_numbering_is_refused(wrong):
    with pytest.raises((TypeError, ValueError)):
        Numbering.from_list(wrong)


def filled(n):
    store = QueuedDataStore(100)
    for i in range(n):
        store.insert(i)
    return store


def test_a_store_that_is_loaded_branches_off_the_one_that_was_saved(tmp_path):
    store = filled(5)
    checkpoint.save(tmp_path / "file", None, {"a": store})
    store.insert(5)
    loaded = [QueuedDataStore(100), QueuedDataStore(100)]
    for each in loaded:
        checkpoint.load(tmp_path / "file", {"a": each})
        assert each.numbering.lineage == ((store.numbering.id, 5),)
    assert loaded[0].numbering.id != loaded[1].numbering.id


def test_a_store_whose_ids_begin_anew_has_another_numbering():
    store = filled(5)
    before = store.numbering
    store.reset()
    assert store.numbering == before  # ids go on
    store.reset(next_id=3)
    assert store.numbering.id != before.id
    assert not store.numbering.lineage


def test_a_forked_childs_store_branches_off_its_parents():
    store = filled(5)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        store.insert(5)
        os.write(writing, repr(store.numbering.to_list()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    told = os.read(reading, 1000).decode()
    os.close(reading)
    os.close(writing)
    assert told.startswith(f"[({store.numbering.id}, 5), (")
