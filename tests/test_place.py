"""Where in a tree a node is: the locks of all uses, paths in errors, long paths and loops."""

import os

import pytest

from nbdserve import place as place_module
from nbdserve.blockdev import FileOptions
from nbdserve.drivers.file import FileNode
from nbdserve.drivers.locks import PERMISSIONS, Permission, Role
from nbdserve.errors import ImageError, LockedError
from nbdserve.inherit import Effective
from nbdserve.place import MAX_CHAIN, ROLES, Place, Use


class File(FileNode):
    """As much of a FileNode as a place asks for; refuses so many locks first."""

    def __init__(self, path, refusals=0):
        self.filename = str(path)
        self.fd = os.open(path, os.O_RDONLY)
        self.locks = []
        self._refusals = refusals

    def lock(self, permissions, shared):
        self.locks.append((permissions, shared))
        if len(self.locks) <= self._refusals:
            raise LockedError(f"{self.filename}: in use")


@pytest.fixture
def opened(tmp_path):
    """Opens files of this folder, which are made if they are not there."""
    files = []

    def opened(name, refusals=0):
        (tmp_path / name).touch()
        files.append(File(tmp_path / name, refusals))
        return files[-1]

    yield opened
    for file in files:
        os.close(file.fd)


ROOT = Place("", Use.EXPORT, False)
OPTIONS = FileOptions(filename="disk")


def test_who_may_write_has_another_role_than_who_reads():
    assert len(set(ROLES.values())) == len(ROLES)
    assert {use for use, _ in ROLES} == set(Use)
    assert (Use.BACKING, False) not in ROLES  # nothing writes to a backing file


@pytest.mark.parametrize(("use", "only_reads"), ROLES)
async def test_the_use_of_a_file_decides_its_lock(opened, use, only_reads):
    file = opened("disk")
    place = Place("", use, only_reads)
    await place.lock(file, OPTIONS, Effective())
    assert file.locks == [PERMISSIONS[ROLES[use, only_reads]]]


async def test_who_shares_by_force_shares_everything(opened):
    file = opened("disk")
    await ROOT.lock(file, OPTIONS, Effective(force_share=True))
    assert file.locks == [(PERMISSIONS[Role.RAW_RW][0], Permission.ALL)]


async def test_locking_off_takes_none(opened):
    file = opened("disk")
    await ROOT.lock(file, FileOptions(filename="disk", locking="off"), Effective())
    assert file.locks == []


async def test_a_lock_is_waited_for_a_while(opened, autojump_clock):
    file = opened("disk", refusals=3)
    await ROOT.lock(file, OPTIONS, Effective())
    assert len(file.locks) == 4


@pytest.mark.parametrize("rescued", [False, True])
async def test_but_not_for_ever(opened, autojump_clock, monkeypatch, rescued):
    monkeypatch.setattr(place_module, "is_being_rescued", lambda fd: rescued)
    started = autojump_clock.current_time()
    with pytest.raises(LockedError, match="in use"):
        await ROOT.lock(opened("disk", refusals=1 << 20), OPTIONS, Effective())
    patience = place_module.RESCUE_PATIENCE if rescued else place_module.PATIENCE
    assert patience < autojump_clock.current_time() - started < patience + 0.1


def test_paths_and_uses_of_what_is_below(opened):
    file = opened("disk")
    writes, reads = Effective(), Effective(read_only=True)
    assert ROOT.file(Use.FORMAT, writes) == Place("file.", Use.FORMAT, False, (), 1)
    assert ROOT.file(Use.FORMAT, reads).only_reads
    backing = ROOT.backing(file)
    assert backing == Place("backing.", Use.BACKING, True, (file,), 1)
    assert backing.data_file(file, reads) == (
        Place("backing.data-file.", Use.DATA, True, (file, file), 2)
    )
    assert ROOT.data_file(file, writes) == Place("data-file.", Use.DATA, False, (file,), 1)


def test_a_path_is_only_so_long():
    ROOT._replace(depth=MAX_CHAIN).check_depth("a")
    with pytest.raises(ImageError, match=f"^a: the backing chain is longer than {MAX_CHAIN}"):
        ROOT._replace(depth=MAX_CHAIN + 1).check_depth("a")


def test_a_file_is_above_itself_only_once(opened, tmp_path):
    """By what it is, not by its name."""
    disk, other = opened("disk"), opened("other")
    os.link(tmp_path / "disk", tmp_path / "link")
    ROOT.backing(disk).check_is_new(other)
    below = ROOT.backing(disk).backing(other)
    for same in (opened("disk"), opened("link")):
        with pytest.raises(ImageError, match="the backing chain is a loop"):
            below.check_is_new(same)
        with pytest.raises(ImageError, match="holds an image of this chain already"):
            below.data_file(other, Effective()).check_is_new(same)
