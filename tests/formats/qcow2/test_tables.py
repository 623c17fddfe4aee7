"""Tables: encoding is the inverse of decoding, and clean means written."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.qcow2.tables import (
    SLICE_SIZE,
    Table,
    TableWrite,
    decode_refcounts,
    decode_table,
    empty_refcounts,
)

K8 = 2 * SLICE_SIZE // 8  # entries of a table of two slices


def table(nb_entries=K8, **options):
    return Table(array("Q", bytes(8 * nb_entries)), 0x10000, **options)


def test_entries_are_big_endian():
    assert list(decode_table(bytes(range(16)))) == [0x0001020304050607, 0x08090A0B0C0D0E0F]
    assert list(decode_table(b"\1\2\3\4", 2)) == [0x0102, 0x0304]


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        (1, [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        (2, [2, 2, 1, 1, 1, 0, 0, 0]),
        (4, [0xA, 0x5, 1, 0]),
        (8, [0x5A, 1]),
        (16, [0x5A01]),
    ],
)
def test_refcounts_of_less_than_a_byte_begin_at_the_lowest_bits(bits, wanted):
    assert list(decode_refcounts(b"\x5a\x01", bits)) == wanted


@given(st.sampled_from((1, 2, 4, 8, 16, 32, 64)), st.binary(min_size=512, max_size=512))
def test_what_is_written_decodes_to_the_same(bits, data):
    entries = decode_refcounts(data, bits)
    assert len(entries) == 512 * 8 // bits
    (write,) = Table(entries, 512, entry_bits=bits, fresh=True).snapshot()
    assert write == TableWrite(512, data)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_an_empty_refcount_block(bits):
    entries = empty_refcounts(4096 // bits, bits)
    assert len(entries) == 4096 // bits
    assert not any(entries)
    entries[0] = 1
    assert Table(entries, 0, entry_bits=bits).nb_bytes == 512


def test_only_dirty_slices_are_written_neighbours_together():
    it = table(4 * SLICE_SIZE // 8)
    it.set(SLICE_SIZE // 8, 1)
    it.set(2 * SLICE_SIZE // 8, 2)
    it.set(0, 3)
    assert [(write.host_offset, len(write.data)) for write in it.snapshot()] == [
        (0x10000, 3 * SLICE_SIZE)
    ]
    it.written()
    it.set(0, 4)
    it.set(len(it.entries) - 1, 5)
    first, last = it.snapshot()
    assert first.host_offset == 0x10000
    assert first.data[:9] == bytes(7) + b"\4\0"
    assert last.host_offset == 0x10000 + 3 * SLICE_SIZE
    assert last.data[-9:] == b"\0" * 8 + b"\5"


def test_a_snapshot_does_not_follow_later_changes():
    it = table()
    it.set(0, 1)
    (write,) = it.snapshot()
    it.set(0, 2)
    assert write.data[:8] == bytes(7) + b"\1"
    it.written()
    assert not it.clean
    (write,) = it.snapshot()
    assert write.data[:8] == bytes(7) + b"\2"


def test_clean_only_when_written():
    it = table()
    assert it.clean
    it.set(0, 1)
    assert not it.clean
    it.snapshot()
    assert not it.dirty
    assert not it.clean
    it.written()
    assert it.clean


def test_what_was_not_written_is_dirty_again():
    it = table()
    it.set(0, 1)
    it.snapshot()
    it.set(K8 - 1, 2)
    it.not_written()
    assert it.dirty == {0, 1}
    (write,) = it.snapshot()
    assert len(write.data) == 2 * SLICE_SIZE


def test_fresh_until_written_and_dirty_all_over():
    it = table(fresh=True)
    assert it.dirty == {0, 1}
    it.snapshot()
    it.not_written()
    assert it.fresh
    it.snapshot()
    it.written()
    assert not it.fresh


def test_a_table_that_ends_within_a_slice():
    it = table(5, fresh=True)
    assert [len(write.data) for write in it.snapshot()] == [40]


def test_one_snapshot_at_a_time():
    it = table(fresh=True)
    it.snapshot()
    with pytest.raises(AssertionError):
        it.snapshot()


def test_a_table_is_in_its_registry_exactly_while_it_is_dirty():
    it, other = table(1024), table(1024)
    registry = it.registry = other.registry = {}
    other.set(0, 1)
    it.set(0, 1)
    it.set(900, 2)
    assert list(registry) == [other, it]
    it.snapshot()
    assert list(registry) == [other]
    it.set(1, 3)
    it.written()
    assert list(registry) == [other, it]
    it.snapshot()
    it.not_written()
    assert list(registry) == [other, it]
    it.snapshot()
    it.written()
    it.not_written()  # nothing was on its way
    assert list(registry) == [other]
    it.touch_all()
    assert list(registry) == [other, it]


def test_slices():
    it = table(2048)
    assert it.slices(0, 511) == range(0, 1)
    assert it.slices(511, 512) == range(0, 2)
    assert it.slices(1024, 2047) == range(2, 4)
    it.set(600, 1)
    assert [it.is_written(number) for number in range(4)] == [True, False, True, True]
    it.snapshot()
    assert not it.is_written(1)
    it.written()
    assert it.is_written(1)
