"""Where the parts of a new image lie: the arithmetic, for sizes no test would write to disk."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.qcow2.layout import Layout, MappedClusters

CLUSTER_SIZES = st.sampled_from([1 << bits for bits in range(9, 22)])
REFCOUNT_BITS = st.sampled_from([1 << order for order in range(7)])


@given(
    l1_table_bytes=st.integers(0, 32 << 20),
    nb_l2_tables=st.integers(0, 1 << 22),
    cluster_size=CLUSTER_SIZES,
    refcount_bits=REFCOUNT_BITS,
)
def test_everything_is_counted_and_no_more_is_there(
    l1_table_bytes, nb_l2_tables, cluster_size, refcount_bits
):
    layout = Layout.of(l1_table_bytes, nb_l2_tables, cluster_size, refcount_bits)
    in_block, in_table = cluster_size * 8 // refcount_bits, cluster_size // 8
    assert layout.nb_clusters == (
        1
        + layout.nb_table_clusters
        + layout.nb_blocks
        + -(-l1_table_bytes // cluster_size)
        + nb_l2_tables
    )
    assert layout.nb_clusters <= layout.nb_blocks * in_block
    assert layout.nb_blocks <= layout.nb_table_clusters * in_table
    # The least: with a block less, or a table cluster less, something would not be counted.
    assert layout.nb_blocks == 1 or layout.nb_clusters - 1 > (layout.nb_blocks - 1) * in_block
    assert layout.nb_table_clusters == 1 or (
        layout.nb_blocks > (layout.nb_table_clusters - 1) * in_table
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("l1_table_bytes", [0, 8, 4096, 200_000])
def test_each_cluster_has_a_refcount_of_one(bits, l1_table_bytes):
    layout = Layout.of(l1_table_bytes, 3, 512, bits)
    blocks = layout.refcount_blocks(512, bits)
    assert len(blocks) == layout.nb_blocks * 512
    if bits < 8:  # the first refcount of a byte is in its lowest bits
        each = [byte >> shift & (1 << bits) - 1 for byte in blocks for shift in range(0, 8, bits)]
    else:
        step = bits // 8
        each = [int.from_bytes(blocks[i : i + step], "big") for i in range(0, len(blocks), step)]
    assert each[: layout.nb_clusters] == [1] * layout.nb_clusters
    assert not any(each[layout.nb_clusters :])


def test_the_refcount_table_names_the_blocks_behind_it():
    layout = Layout.of(4 << 20, 0, 512, 64)
    assert layout.nb_table_clusters == 3
    table = layout.refcount_table(512)
    assert len(table) == layout.nb_table_clusters * 512
    named = [offset for (offset,) in struct.iter_unpack(">Q", table) if offset]
    first = (1 + layout.nb_table_clusters) * 512
    assert named == [first + number * 512 for number in range(layout.nb_blocks)]
    assert named[-1] + 512 == layout.l1_table_cluster * 512


@pytest.mark.parametrize("nb_clusters", [1, 63, 64, 65, 200])
def test_mapped_clusters_are_at_their_own_offsets(nb_clusters):
    copied = 1 << 63
    l1, *tables = MappedClusters(512, nb_clusters, l2_offset=4096).tables()
    assert len(tables) == -(-nb_clusters // 64)
    entries = struct.unpack(f">{len(l1) // 8}Q", l1)
    assert list(entries[: len(tables)]) == [copied | 4096 + 512 * i for i in range(len(tables))]
    assert not any(entries[len(tables) :])
    found = [entry for table in tables for (entry,) in struct.iter_unpack(">Q", table)]
    assert found[:nb_clusters] == [copied | 512 * number for number in range(nb_clusters)]
    assert not any(found[nb_clusters:])
