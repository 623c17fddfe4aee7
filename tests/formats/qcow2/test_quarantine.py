"""A cluster leaves quarantine when its unlinking is durable and nobody can be using it."""

import pytest

from nbdserve.block.epoch import Epochs
from nbdserve.formats.qcow2.quarantine import Quarantine


@pytest.fixture
def epochs():
    return Epochs()


@pytest.fixture
def quarantine(epochs):
    return Quarantine(epochs)


def test_nothing_leaves_before_it_is_durable(quarantine):
    quarantine.add(7)
    assert quarantine.release() == []
    quarantine.mark_durable()  # of a write-back that began before
    assert quarantine.release() == []
    quarantine.seal()
    assert quarantine.release() == []
    quarantine.mark_durable()
    assert quarantine.release() == [7]
    assert quarantine.release() == []
    assert not quarantine


def test_what_is_unlinked_during_a_write_back_waits_for_the_next(quarantine):
    quarantine.add(7)
    quarantine.seal()
    quarantine.add(8)
    quarantine.mark_durable()
    assert quarantine.release() == [7]
    assert len(quarantine) == 1


def test_a_request_from_before_the_unlinking_keeps_it(quarantine, epochs):
    early = epochs.enter()
    quarantine.add(7)
    quarantine.seal()
    late = epochs.enter()
    quarantine.mark_durable()
    assert quarantine.release() == []
    epochs.leave(early)
    assert quarantine.release() == [7]
    epochs.leave(late)


def test_a_request_between_the_unlinking_and_the_write_back_keeps_it_too(quarantine, epochs):
    """It cannot have resolved onto the cluster, but nobody keeps books so exact."""
    quarantine.add(7)
    request = epochs.enter()
    quarantine.seal()
    quarantine.mark_durable()
    assert quarantine.release() == []
    epochs.leave(request)
    assert quarantine.release() == [7]


def test_several_groups_come_out_together_in_order(quarantine):
    for cluster in (9, 3, 5, 3):
        quarantine.add(cluster)
        quarantine.seal()
    assert len(quarantine) == 4
    quarantine.mark_durable()
    assert quarantine.release() == [3, 3, 5, 9]


def test_what_could_not_be_freed_comes_out_again(quarantine, epochs):
    quarantine.put_back([])
    assert not quarantine
    epochs.enter()
    quarantine.put_back([3, 4])
    assert len(quarantine) == 2
    assert quarantine.release() == [3, 4]
