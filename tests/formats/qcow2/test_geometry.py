"""Index arithmetic, against numbers from the specification's formulas worked out by hand."""

import pytest

from nbdserve.formats.qcow2.geometry import Geometry


@pytest.mark.parametrize(
    ("cluster_bits", "refcount_order", "l2_entries", "guest_bytes_of_l2", "block_entries"),
    [
        (9, 6, 64, 32 << 10, 64),
        (9, 0, 64, 32 << 10, 4096),
        (12, 4, 512, 2 << 20, 2048),
        (16, 4, 8192, 512 << 20, 32768),
        (21, 4, 1 << 18, 512 << 30, 1 << 20),
    ],
)
def test_derived(cluster_bits, refcount_order, l2_entries, guest_bytes_of_l2, block_entries):
    geometry = Geometry(cluster_bits, refcount_order, 10 << 20)
    assert geometry.cluster_size == 1 << cluster_bits
    assert geometry.in_cluster == geometry.cluster_size - 1
    assert geometry.l2_entries == l2_entries == 1 << geometry.l2_bits
    assert 1 << geometry.l1_bits == guest_bytes_of_l2
    assert geometry.block_entries == block_entries == 1 << geometry.block_bits
    assert geometry.refcount_bits == 1 << refcount_order


@pytest.mark.parametrize(("size", "l1_entries"), [(0, 0), (512, 1), (32 << 10, 1), (32769, 2)])
def test_an_l1_entry_for_each_table_begun(size, l1_entries):
    assert Geometry(9, 4, size).l1_entries == l1_entries


@pytest.mark.parametrize(("nb_bytes", "nb_clusters"), [(0, 0), (1, 1), (512, 1), (513, 2)])
def test_clusters_round_up(nb_bytes, nb_clusters):
    assert Geometry(9, 4, 0).clusters(nb_bytes) == nb_clusters
