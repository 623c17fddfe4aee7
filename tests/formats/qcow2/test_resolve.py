"""What L1 and L2 entries mean: each kind of entry, what is damaged, runs through a chain."""

from array import array

import pytest

from nbdserve.block.node import Node
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.cache import TableCache
from nbdserve.formats.qcow2.durability import Durability
from nbdserve.formats.qcow2.geometry import Geometry
from nbdserve.formats.qcow2.resolve import ClusterType, Mapping, cluster_type
from nbdserve.formats.qcow2.spec import COMPRESSED, COPIED, ZERO
from nbdserve.formats.qcow2.tables import Table
from qcow2_model import MemoryFile

C = 4096
HOST = 0x50000
FILE = MemoryFile(b"")
BASE = MemoryFile(bytes(5 * C))

TYPES = [
    (0, ClusterType.UNALLOCATED),
    (COPIED, ClusterType.UNALLOCATED),
    (ZERO, ClusterType.ZERO_PLAIN),
    (ZERO | COPIED | HOST, ClusterType.ZERO_ALLOC),
    (HOST, ClusterType.STANDARD),
    (HOST | COPIED, ClusterType.STANDARD),
    (COMPRESSED | 12345, ClusterType.COMPRESSED),
]


@pytest.mark.parametrize(("entry", "kind"), TYPES)
def test_cluster_type(entry, kind):
    assert cluster_type(entry) is kind


def mapping(entries, *, backing=None, version=3, metadata=(), l1=(0x8000 | COPIED,), cached=True,
            durability=None):
    geometry = Geometry(12, 4, 1024 * C)
    it = Mapping(
        FILE,
        backing,
        geometry,
        Table(array("Q", [*l1, 0]), 0x1000),
        filename="disk.qcow2",
        has_zero_flag=version >= 3,
        metadata=set(metadata),
        durability=durability or Durability(),
    )

    async def never(*_):
        raise AssertionError("I/O")

    it.set_cache(TableCache(1 << 20, never, never))
    if cached:
        table = array("Q", entries)
        table.extend([0] * (512 - len(entries)))
        it.l2.add(0, Table(table, 0x8000))
    return it


def test_a_plain_cluster_in_and_across_clusters():
    it = mapping([HOST | COPIED, (HOST + C) | COPIED])
    for op in (READ, WRITE):
        assert it.resolve(op, 5, 10) == [(FILE, HOST + 5, 10)]
        assert it.resolve(op, C, C) == [(FILE, HOST + C, C)]
        assert it.resolve(op, C - 1, 2) == [(FILE, HOST + C - 1, 2)]


def test_clusters_apart_make_runs_apart():
    it = mapping([HOST | COPIED, (HOST + 2 * C) | COPIED])
    wanted = [(FILE, HOST + 1, C - 1), (FILE, HOST + 2 * C, C)]
    assert it.resolve(READ, 1, 2 * C - 1) == wanted
    assert it.resolve(WRITE, 1, 2 * C - 1) == wanted


NOT_PLAIN = [
    (0, [(None, 0, 9)], Miss.NEEDS_ALLOC),
    (COPIED, [(None, 0, 9)], Miss.NEEDS_ALLOC),
    (ZERO, [(None, 0, 9)], Miss.NEEDS_ALLOC),
    (ZERO | HOST | COPIED, [(None, 0, 9)], Miss.NEEDS_ALLOC),
    (HOST, [(FILE, HOST + 7, 9)], Miss.NEEDS_COW),
    (COMPRESSED | 999, Miss.COMPRESSED, Miss.COMPRESSED),
    (HOST | COPIED | 2, Miss.OPAQUE, Miss.OPAQUE),
    ((HOST + 512) | COPIED, Miss.OPAQUE, Miss.OPAQUE),
    (HOST | COPIED | 1 << 60, Miss.OPAQUE, Miss.OPAQUE),
    (HOST | COPIED | 1 << 56, Miss.OPAQUE, Miss.OPAQUE),
]


@pytest.mark.parametrize(("entry", "read", "write"), NOT_PLAIN)
def test_other_clusters(entry, read, write):
    it = mapping([entry])
    assert it.resolve(READ, 7, 9) == read
    assert it.resolve(WRITE, 7, 9) == write


@pytest.mark.parametrize("entry", [entry for entry, read, _ in NOT_PLAIN if read is Miss.OPAQUE])
def test_damaged_entries(entry):
    with pytest.raises(CorruptImage, match=r"^disk.qcow2: the L2 entry 0x\w+ .* offset 0x1000 is"):
        mapping([0, entry]).extent_at(C + 5, 1)


def test_the_zero_flag_is_a_mistake_in_version_2():
    assert mapping([ZERO], version=2).resolve(READ, 0, 1) is Miss.OPAQUE
    assert mapping([HOST | COPIED], version=2).resolve(READ, 0, 1) == [(FILE, HOST, 1)]


def test_no_write_resolves_onto_metadata():
    it = mapping([HOST | COPIED, (HOST + C) | COPIED], metadata=[HOST + C])
    assert it.resolve(WRITE, 0, C) == [(FILE, HOST, C)]
    assert it.resolve(WRITE, C, 1) is Miss.OPAQUE
    assert it.resolve(WRITE, 0, 2 * C) is Miss.OPAQUE
    assert it.resolve(READ, 0, 2 * C) == [(FILE, HOST, 2 * C)]


def test_when_writes_are_refused_reads_are_not():
    it = mapping([HOST | COPIED, ZERO])
    it.refuse_writes()
    assert it.resolve(READ, 0, C) == [(FILE, HOST, C)]
    assert it.resolve(WRITE, 0, C) is Miss.OPAQUE
    assert it.resolve(WRITE, 0, 2 * C) is Miss.OPAQUE


def test_a_table_not_in_memory():
    it = mapping([], cached=False)
    assert it.resolve(READ, 0, 1) is Miss.NOT_CACHED
    assert it.resolve(WRITE, 0, 1) is Miss.NOT_CACHED
    assert it.extent_at(0, 1) is None


def test_no_table_needs_no_cache():
    it = mapping([], cached=False, l1=(0,))
    assert it.resolve(READ, 3, 5 * C) == [(None, 0, 5 * C)]
    assert it.resolve(WRITE, 3, 5 * C) is Miss.NEEDS_ALLOC


def test_a_range_over_two_tables_stops_at_the_first_that_is_missing():
    it = mapping([0] * 511 + [HOST | COPIED], l1=(0x8000 | COPIED, 0))
    assert it.resolve(READ, 511 * C, 2 * C) == [(FILE, HOST, C), (None, 0, C)]
    it = mapping([0] * 511 + [HOST | COPIED])
    it.l1.entries[1] = 0x9000
    assert it.resolve(READ, 511 * C, 2 * C) is Miss.NOT_CACHED


def test_a_backing_file_shorter_than_the_overlay():
    it = mapping([0] * 4 + [0, 0, ZERO, 0], backing=BASE)
    assert it.resolve(READ, 3 * C, C) == [(BASE, 3 * C, C)]
    assert it.resolve(READ, 3 * C + 9, 3 * C) == [
        (BASE, 3 * C + 9, 2 * C - 9),
        (None, 0, C),  # past the end of the backing file
        (None, 0, 9),  # marked zero
    ]
    assert it.resolve(READ, 6 * C, 2 * C) == [(None, 0, C), (None, 0, C)]
    assert it.resolve(WRITE, 4 * C, 1) is Miss.NEEDS_COW
    assert it.resolve(WRITE, 5 * C, 1) is Miss.NEEDS_ALLOC
    assert it.resolve(WRITE, 6 * C, 1) is Miss.NEEDS_ALLOC


def test_a_backing_node_that_cannot_say():
    class Opaque(Node):
        pass

    it = mapping([0, HOST | COPIED], backing=Opaque("base", 9 * C, read_only=True))
    assert it.resolve(READ, 0, 1) is Miss.OPAQUE
    assert it.resolve(READ, C, 1) == [(FILE, HOST, 1)]


EXTENTS = [
    ([HOST, HOST + C, HOST + 2 * C, HOST + 9 * C], 5, 9 * C, 3 * C - 5),
    ([HOST | COPIED, HOST + C], 5, 9 * C, C - 5),
    ([ZERO, ZERO, 0], 0, 9 * C, 2 * C),
    ([HOST | ZERO, (HOST + C) | ZERO, ZERO], 0, 9 * C, 2 * C),
    ([COMPRESSED, COMPRESSED], 9, 9 * C, C - 9),
    ([0] * 512, 0, 9 * C, 9 * C),
    ([0] * 512, 510 * C, 9 * C, 2 * C),
    ([HOST, HOST + C], 0, C + 1, C + 1),
]


@pytest.mark.parametrize(("entries", "offset", "wanted", "length"), EXTENTS)
def test_how_far_an_extent_reaches(entries, offset, wanted, length):
    extent = mapping(entries).extent_at(offset, wanted)
    assert extent.length == length
    assert extent.entry == entries[offset // C]


def test_an_extent_says_where_and_whether_it_may_be_overwritten():
    it = mapping([HOST | COPIED, HOST])
    assert it.extent_at(3, 1).host_offset == HOST + 3
    assert it.extent_at(3, 1).copied
    assert not it.extent_at(C, 1).copied
