"""Which images a guardian takes care of: those whose metadata is in a host's file as it is."""

import pytest
import trio

from nbdserve.block.filter import FilterNode
from nbdserve.drivers.open import open_file
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.filters.fault import FaultNode
from nbdserve.filters.power_cut import PowerCutNode
from nbdserve.formats.raw import RawNode
from nbdserve.powercut.powercut import PowerCut
from nbdserve.wards import Wards


class FakeWard:
    log = "the log"

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


class FakeGuardian:
    def __init__(self):
        self.asked = []
        self.wards = []

    def watch(self, file, data_file, *, offset, no_flush):
        self.asked.append((file, data_file, offset, no_flush))
        self.wards.append(FakeWard())
        return self.wards[-1]


@pytest.fixture
async def file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8192))
    engine = ThreadsEngine()
    node = open_file(str(tmp_path / "file"), engine, read_only=False)
    yield node
    with trio.fail_after(10):
        await node.close()
        await engine.idle()
    engine.close()


PASSING = {
    "the file": (lambda file: file, 0),
    "a window": (lambda file: RawNode(file, offset=512), 512),
    "faults and windows": (
        lambda file: RawNode(FaultNode(RawNode(file, offset=1024)), offset=512), 1536
    ),
}


@pytest.mark.parametrize("kind", PASSING)
async def test_what_passes_bytes_on_is_watched(file, kind):
    stack, offset = PASSING[kind]
    guardian = FakeGuardian()
    wards = Wards(guardian)
    assert wards.watch(stack(file), None, no_flush=True) == "the log"
    assert guardian.asked == [(file, None, offset, True)]
    wards.close()
    assert guardian.wards[0].closed


@pytest.mark.parametrize("other", [FilterNode, lambda file: PowerCutNode(file, PowerCut(), 0)])
async def test_what_may_change_them_is_not(file, other):
    """A filter of a user's own may store something else than it is given."""
    guardian = FakeGuardian()
    for nodes in ((other(file), None), (RawNode(other(file)), None), (file, other(file))):
        assert Wards(guardian).watch(*nodes, no_flush=False) is None
    assert guardian.asked == []


async def test_a_data_file_is_watched_too(file):
    guardian = FakeGuardian()
    assert Wards(guardian).watch(file, RawNode(file), no_flush=False)
    assert guardian.asked == [(file, file, 0, False)]


async def test_without_a_guardian_nothing_is(file):
    assert Wards(None).watch(file, None, no_flush=False) is None
