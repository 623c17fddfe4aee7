"""Does an update survive what disks do? Each test has a disk of its own, in milliseconds.

`nbd_server` comes with nbdserve; nothing is mounted, and nobody is root.
"""

import errno
import pathlib

import pytest
from disk import Disk
from slots import Damaged, Slots

from nbdserve.testing import Fault, random

OLD, NEW = (random("200k", seed=seed).at(0, 200_000) for seed in (1, 2))
# What tests compare: in CI pytest shows all of a difference, and takes minutes for so many bytes.
NAMES = {OLD: "old", NEW: "new", None: "none"}
# What CI keeps of a run that failed.
REPORTS = pathlib.Path(__file__).parents[1] / "reports"


@pytest.fixture
def server(nbd_server):
    """A disk that has OLD."""
    server = nbd_server(size="1M")
    with Disk(server.socket) as disk:
        Slots(disk).update(OLD)
    return server


def installed(server):
    with Disk(server.socket) as disk:
        return NAMES[Slots(disk).firmware()]


def test_an_update_is_installed(server) -> None:
    with Disk(server.socket) as disk:
        Slots(disk).update(NEW)
    assert installed(server) == "new"


@pytest.mark.parametrize(("fault", "error"), [
    (Fault(ops="write", error="EIO"), errno.EIO),
    (Fault(ops="write", error="ENOSPC", after=1), errno.ENOSPC),  # the header
    (Fault(ops="write", error="EIO", short=4096), errno.EIO),  # a part of it is there
    (Fault(ops="flush", error="EIO"), errno.EIO),
    (Fault(ops="write", disconnect=True, after=1), None),
], ids=["write", "header", "short write", "flush", "connection lost"])
def test_an_update_that_fails_leaves_the_old_one(server, fault, error) -> None:
    server.faults.add(fault)
    with Disk(server.socket) as disk, pytest.raises(OSError) as caught:  # noqa: PT011
        Slots(disk).update(NEW)
    if error:
        assert caught.value.errno == error
    server.faults.clear()
    assert installed(server) == "old"


def test_a_bit_that_flips_is_noticed(server) -> None:
    server.faults.add(Fault(ops="read", flip_bits=1, offset=1024, length=100_000))
    with pytest.raises(Damaged):
        installed(server)


def test_a_disk_that_hangs_is_given_up(server) -> None:
    server.faults.add(Fault(ops="flush", stuck=True))
    with Disk(server.socket, timeout=0.2) as disk, pytest.raises(TimeoutError):
        Slots(disk).update(NEW)


def test_power_cuts(nbd_server) -> None:
    REPORTS.mkdir(exist_ok=True)
    server = nbd_server(size="1M", power_cut="disk", write_log=REPORTS / "power-cut.log")
    with Disk(server.socket) as disk:
        for firmware in (OLD, NEW):
            Slots(disk).update(firmware)
            server.mark("installed")
    for outcome in server.all_cuts(60):
        allowed = ("none", "old", "new")[len(outcome.marks):][:2]
        after = nbd_server(outcome)
        try:
            assert installed(after) in allowed
        except (AssertionError, Damaged):
            # nbdserve cut reports/power-cut.log -o disk.img ... makes that disk again
            pytest.fail(f"the firmware is gone: --moment {outcome.moment} --seed {outcome.seed}")
        after.stop()
