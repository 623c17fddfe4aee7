"""The plans get everywhere: each way in which a cluster changes, and all that metadata does."""

import collections
import itertools

import pytest

from crash.plans import draw_plan
from crash.record import record
from qcow2_model import COMPRESSED, OFFSET, ZERO, Layout

NB_PLANS = 80

# What a guest cluster was and has become, between one flush and the next.
WANTED = {
    ("backing", "data"),
    ("backing", "zero"),
    ("nothing", "data"),
    ("zero", "data"),
    ("zero, reserved", "data"),
    ("compressed", "data"),
    ("compressed", "zero"),
    ("data", "zero"),
    ("data", "zero, reserved"),
    ("data", "other data"),
    ("zero, reserved", "zero"),
}


def kinds(image, layout):
    """What each guest cluster is: (kind, L2 entry)."""
    size = layout.cluster_size
    found = {
        guest: ("backing" if guest * size < image.backing else "nothing", 0)
        for guest in range(-(-image.size // size))
    }
    for guest, entry in layout.l2_entries():
        if entry & COMPRESSED:
            kind = "compressed"
        elif entry & ZERO:
            kind = "zero, reserved" if entry & OFFSET else "zero"
        else:
            kind = "data"
        found[guest] = kind, entry
    return found


def changes(history):
    """What became of clusters between two flushes: (kind, kind)."""
    moments = sorted({promise.moment for promise in history.flushed})
    images = [kinds(history.image, Layout(bytes(history.log.replay(at)[0]))) for at in moments]
    for before, after in itertools.pairwise(images):
        for guest, (kind, entry) in after.items():
            was, old_entry = before[guest]
            if entry != old_entry:
                yield was, "other data" if was == kind == "data" else kind


@pytest.mark.peer("qemu-img")
def test_the_plans_get_everywhere():
    counts = collections.Counter()
    found = collections.Counter()
    for number in range(NB_PLANS):
        plan = draw_plan(f"reach/{number}")
        history = record(plan, plan.image.files())
        counts.update(history.counts)
        found.update(changes(history))
    assert found.keys() >= WANTED, WANTED - found.keys()
    assert all(count > 0 for count in counts.values()), counts
    assert counts["tables moved"] > 1
