"""Power cuts find planted bugs the way a user would find them, and the real stack has none.

`WITHIN`: in how many cuts each is caught, about four times as many as it took here at most, with
ten seeds; docs/powercut.md has the same numbers. With NBDSERVE_SOAK=1 the real stack goes through
2,000 cuts in each mode, above the format and below it.
"""

import contextlib
import os

import pytest
import trio

import peers
from crash import planted
from crash.commits import cuts_until_caught, run_program
from nbdserve.block.backend import BlockBackend
from nbdserve.config import CACHE_MODES

CUTS = 2000 if os.environ.get("NBDSERVE_SOAK") == "1" else 100

PAST_THE_CACHE = pytest.mark.peer(peers.O_DIRECT)
MODES = [
    pytest.param(name, marks=[PAST_THE_CACHE] if mode.direct else [])
    for name, mode in CACHE_MODES.items()
    if not mode.no_flush  # which promises nothing
]


def acknowledge_before_writing(monkeypatch):
    """The drive answers a write and then passes it on to the tree."""
    write = BlockBackend.write

    async def later(self, offset, data, fua):
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        with contextlib.suppress(OSError):
            await write(self, offset, data, fua=fua)

    async def acknowledge(self, offset, data, *, fua=False):
        self.nursery.start_soon(later, self, offset, bytes(data), fua)

    monkeypatch.setattr(BlockBackend, "write", acknowledge)


WITHIN = {
    ("below", "skips the flush before the L2 update"): (planted.no_flush_before_l2, 800),
    ("below", "ignores FUA"): (planted.ignore_fua, 10),
    ("above", "ignores FUA"): (planted.ignore_fua, 10),
    ("below", "acknowledges before writing"): (acknowledge_before_writing, 10),
    ("above", "acknowledges before writing"): (acknowledge_before_writing, 10),
}


@pytest.mark.parametrize(("place", "name"), WITHIN)
async def test_a_planted_bug_is_caught(place, name, monkeypatch, tmp_path):
    plant, within = WITHIN[place, name]
    plant(monkeypatch)
    mode = CACHE_MODES["writeback"]
    found = await cuts_until_caught(place, str(tmp_path / "image"), mode, 1000)
    assert found is not None
    assert found <= within


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["above", "below"])
async def test_the_real_stack_survives(place, mode, tmp_path):
    number, wrong = await run_program(
        place, str(tmp_path / "image"), CACHE_MODES[mode], seed=1, check_limit=CUTS
    )
    assert wrong is None
    assert number == CUTS


async def test_what_does_not_flush_does_not_survive(tmp_path):
    """So the program asks for enough."""
    for place in ("above", "below"):
        path = str(tmp_path / place)
        assert await cuts_until_caught(place, path, CACHE_MODES["unsafe"], 20) is not None
