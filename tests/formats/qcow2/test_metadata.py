"""Which clusters hold metadata: found at the open, looked up before anything is written."""

import pytest

from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.geometry import Geometry
from nbdserve.formats.qcow2.metadata import MetadataMap
from nbdserve.formats.qcow2.spec import COPIED, OFFSET_MASK, REFCOUNT_BLOCK_OFFSET_MASK


@pytest.fixture
def metadata():
    return MetadataMap("disk", Geometry(12, 4, 1 << 30), 1 << 20)


def test_a_table_takes_whole_clusters(metadata):
    metadata.add_table("L1 table", 0x2000, 0x1008)
    assert metadata.offsets == {0x2000, 0x3000}


def test_entries(metadata):
    metadata.add_entries("L2 table", [0, 0x1000 | COPIED, 0, 0x3000])
    assert metadata.offsets == {0x1000, 0x3000}


REFUSED = [
    (0x1200, OFFSET_MASK, r"^disk: the thing at 0x1200 is not aligned$"),
    (0x4000, OFFSET_MASK, r"^disk: the thing at 0x4000 overlaps other metadata; repair"),
    (1 << 20, OFFSET_MASK, r"^disk: the thing at 0x100000 is beyond the end of the file; repair"),
    # More than a signed 64-bit offset: no system call takes it.
    (1 << 63, REFCOUNT_BLOCK_OFFSET_MASK, r"^disk: the thing at 0x8.* beyond the end"),
]


@pytest.mark.parametrize(("entry", "mask", "reason"), REFUSED)
def test_misplaced(metadata, entry, mask, reason):
    metadata.add(0x4000)
    with pytest.raises(CorruptImage, match=reason):
        metadata.add_entries("thing", [entry], mask)


def test_allocating_metadata(metadata):
    metadata.add(0x4000)
    metadata.assert_free(3)
    metadata.assert_free(5)
    with pytest.raises(CorruptImage, match="refcount of the metadata at 0x4000 is zero"):
        metadata.assert_free(4)
    metadata.discard(0x4000)
    metadata.assert_free(4)


@pytest.mark.parametrize(
    ("offset", "nb_bytes"), [(0x4000, 1), (0x4FFF, 1), (0x3FFF, 2), (0, 1 << 16)]
)
def test_guest_data_on_metadata(metadata, offset, nb_bytes):
    metadata.add(0x4000)
    with pytest.raises(CorruptImage, match=r"guest data is mapped onto metadata at 0x4000$"):
        metadata.assert_data(offset, nb_bytes)


@pytest.mark.parametrize(("offset", "nb_bytes"), [(0x3000, 0x1000), (0x5000, 1), (0, 0x4000)])
def test_guest_data_beside_metadata(metadata, offset, nb_bytes):
    metadata.add(0x4000)
    metadata.assert_data(offset, nb_bytes)
