"""The power is cut at any moment, or the process dies: the image leaks at most, and what was
promised is there. A few plans of each cache mode; `make crash` goes through many.

plans.py has the programs, promises.py what is asked of each crash.
"""


import pytest

from crash import planted
from crash.plans import Image, Plan, draw_plan, growth_plan, zero_overwrite_plan
from crash.promises import Judge
from crash.record import record
from crash.search import search
from nbdserve.config import CACHE_MODES
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.formats.qcow2.ordering import What
from nbdserve.powercut.outcomes import all_cuts
from nbdserve.powercut.writelog import CHANGES
from qcow2_model import Request

NB_PLANS = 20  # of each mode


def assert_harmless(plan, limit, **options):
    searched = search(plan, limit, **options)
    assert searched.found is None, searched.found
    return searched


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("mode", CACHE_MODES)
def test_crashes_are_harmless(mode):
    states = set()
    for number in range(NB_PLANS):
        plan = draw_plan(f"test/{mode}/{number}", mode=mode)
        states |= assert_harmless(plan, 50, qemu_every=60, again_every=60).states
    assert len(states) > 20 * NB_PLANS


# --- a qemu-nbd of 7.2 loses data here ------------------------------------------------------------


@pytest.mark.parametrize("length", [8 * 512, 5 * 512 + 60])
def test_an_overwrite_of_zero_clusters_never_shows_zeroes_where_data_was(length):
    """Data, a zero cluster with a host cluster, one without, nothing, data, data: one write over
    all of them, and the power cut at every moment of it."""
    image = Image(10 * 512, start="mixed")
    write = Request("write", 100, length, 1, quick=False)
    plan = Plan("overwrite", image, ((write,), (Request("flush"),)))
    history = record(plan, image.files())
    judge = Judge(history)
    moments = set()
    for moment, images, _ in all_cuts(history.log, 5000):
        judge.assert_harmless(moment, tuple(map(bytes, images)))
        moments.add(moment)
    writes = [record for record in history.log.records if record.kind in CHANGES]
    assert len(writes) > 5
    assert len(moments) >= 3


@pytest.mark.parametrize("number", range(4))
def test_overwrites_of_zero_clusters(number):
    assert_harmless(zero_overwrite_plan(f"test/{number}"), 100)


# --- the refcount table moves ---------------------------------------------------------------------

TABLE_FIELD = 48  # where the header says where the refcount table is


@pytest.mark.parametrize("number", range(3))
def test_cuts_while_the_refcount_table_moves(number):
    plan = growth_plan(f"test/{number}")
    if plan.image.start != "full":
        assert_harmless(plan, 60)
        return
    history = record(plan, plan.image.files())
    moved = [
        moment for moment, record in enumerate(history.log.records)
        if record.kind in CHANGES and record.offset == TABLE_FIELD
    ]
    assert moved
    assert_harmless(plan, 60)


# --- unsafe ---------------------------------------------------------------------------------------


def unsafe_histories():
    for number in range(20):
        plan = draw_plan(f"test/unsafe/{number}", mode="unsafe")
        yield record(plan, plan.image.files())


def test_unsafe_promises_nothing_when_the_power_goes():
    """And so the cuts are strong enough to break what does not flush."""
    states = broken = 0
    for history in unsafe_histories():
        judge = Judge(history)
        for moment, images, _ in all_cuts(history.log, 20):
            states += 1
            try:
                judge.assert_harmless(moment, tuple(map(bytes, images)))
            except AssertionError:
                broken += 1
        if broken > 20:
            break
    assert broken > 20
    assert states < 200


def test_our_eyes_see_what_the_death_of_an_unsafe_process_leaves(monkeypatch):
    """Metadata handed over in another order than WRITE_ORDER's."""
    planted.at_stage(What.L2_ENTRY, 0)(monkeypatch)
    found = [
        searched.found
        for number in range(3)
        if (searched := search(draw_plan(f"test/unsafe/{number}", mode="unsafe"), 50)).found
    ]
    assert found
    assert "has refcount 0, not 1" in found[0].reason


def test_our_eyes_see_a_clean_stop_that_is_none(monkeypatch):
    async def nothing(self):
        pass

    monkeypatch.setattr(Qcow2Node, "flush_to_os", nothing)
    monkeypatch.setattr(Qcow2Node, "close", nothing)
    plan = draw_plan("test/unsafe/0", mode="unsafe")
    with pytest.raises(AssertionError, match="after a clean stop"):
        record(plan, plan.image.files())
