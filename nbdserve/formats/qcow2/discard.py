"""Discard and write-zeroes: mapping changes that free clusters instead of taking them.

Law: only whole guest clusters change their mapping. A discard leaves partial ones alone; a
write-zeroes writes zeroes into them like any other write. Nothing is merged or rounded: a request
that covers part of a cluster never touches the rest, so it cannot meet a write in flight there
(QEMU 7.2 rounds where the rest reads as zeroes, and loses that write).

The end of the disk counts as the end of its last cluster. What an entry referred to goes into
quarantine. After discard_in_l2_slice and zero_in_l2_slice of QEMU.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from nbdserve.block.units import MIB
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.datafile import discard_raw, punch, zero_raw
from nbdserve.formats.qcow2.resolve import ClusterType
from nbdserve.formats.qcow2.spec import COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdserve.block.node import Buffer
    from nbdserve.formats.qcow2.image import Image

__all__ = ["discard", "write_zeroes"]

# Entries changed without letting anybody else run: 2.5 us for each that frees a cluster.
MAX_ENTRIES = 1024

_READS_AS_ZEROES = (ClusterType.ZERO_PLAIN, ClusterType.ZERO_ALLOC)


async def discard(image: Image, offset: int, length: int) -> None:
    """Free the whole clusters of the range; they read as zeroes afterwards.

    Version 2 has no zero flag: with a backing file its data would show through, so nothing is done.
    """
    if image.header.version < 3 and image.backing is not None:
        return
    first, last = _whole_clusters(image, offset, length)
    if image.header.data_file_is_raw:
        bits = image.geometry.cluster_bits
        start, end = first << bits, min((last + 1) << bits, image.geometry.size)
        if start < end:
            await discard_raw(image, start, end - start)
        return
    has_backing = image.backing is not None
    type_of = image.mapping.type_of
    freed = ZERO if image.header.version >= 3 else 0

    def rule(entry: int) -> int:
        kind = type_of(entry)
        if kind is ClusterType.ZERO_PLAIN or (
            kind is ClusterType.UNALLOCATED and not has_backing
        ):
            return entry
        return freed

    await _change(image, first, last, rule)


async def write_zeroes(
    image: Image,
    offset: int,
    length: int,
    *,
    may_unmap: bool,
    fallback: bool,
    write: Callable[[int, Buffer], Awaitable[None]],
) -> None:
    """Make the range read as zeroes. `write` is the node's own, for clusters partly covered.

    Without `may_unmap` clusters that are allocated stay reserved. Raises OSError(EOPNOTSUPP)
    without `fallback` if anything would have to be written.
    """
    if image.header.data_file_is_raw:
        await zero_raw(image, offset, length, may_unmap=may_unmap, fallback=fallback)
        return
    first, last = _whole_clusters(image, offset, length)
    whole = first <= last
    bits = image.geometry.cluster_bits
    end = offset + length
    start_of_whole = first << bits if whole else end
    end_of_whole = min((last + 1) << bits, image.geometry.size) if whole else end
    pieces = [(offset, min(start_of_whole, end)), (max(end_of_whole, offset), end)]
    if image.header.version < 3 and (image.backing is not None or not may_unmap) and whole:
        pieces = [(offset, end)]  # no way to mark a cluster zero
        whole = False
    edges = [piece for piece in pieces if piece[0] < piece[1]]
    edges = [piece for piece in edges if not await _reads_as_zeroes(image, *piece)]
    if edges and not fallback:
        raise OSError(errno.EOPNOTSUPP, "part of the range would have to be written")
    for start, stop in edges:
        await _write_zero_bytes(start, stop, write)
    if not whole:
        return

    type_of = image.mapping.type_of

    def rule(entry: int) -> int:
        if type_of(entry) in _READS_AS_ZEROES and not (may_unmap and entry & OFFSET_MASK):
            return entry
        if image.header.version < 3:
            return 0
        if not may_unmap and type_of(entry) is ClusterType.STANDARD and entry & COPIED:
            return entry | ZERO
        return ZERO

    await _change(image, first, last, rule)


def _whole_clusters(image: Image, offset: int, length: int) -> tuple[int, int]:
    """The first and last guest cluster that the range covers whole; last < first if none."""
    bits = image.geometry.cluster_bits
    end = offset + length
    if end == image.geometry.size:
        end += -end & image.geometry.in_cluster
    return (offset + image.geometry.in_cluster) >> bits, (end >> bits) - 1


async def _reads_as_zeroes(image: Image, start: int, stop: int) -> bool:
    """Whether a range needs no zeroes written; one that only a backing file decides does."""
    while start < stop:
        try:
            extent = await image.mapping.extent(start, stop - start)
        except CorruptImage as error:
            raise image.stop(error) from None
        if extent.type not in _READS_AS_ZEROES and not (
            extent.type is ClusterType.UNALLOCATED
            and (image.backing is None or start >= image.backing.size)
        ):
            return False
        start += extent.length
        await trio.lowlevel.checkpoint()
    return True


async def _write_zero_bytes(
    start: int, stop: int, write: Callable[[int, Buffer], Awaitable[None]]
) -> None:
    zeroes = bytes(min(stop - start, MIB))
    while start < stop:
        piece = min(len(zeroes), stop - start)
        await write(start, zeroes[:piece])
        start += piece


async def _change(image: Image, first: int, last: int, rule: Callable[[int], int]) -> None:
    """Replace the L2 entries of guest clusters by what `rule` makes of them."""
    geometry = image.geometry
    leaves_empty = rule(0) == 0
    while first <= last:
        stop = min(last, first | (geometry.l2_entries - 1), first + MAX_ENTRIES - 1)
        offset = first << geometry.cluster_bits
        async with image.locks.hold(first, stop):
            image.check_writable()
            empty = not image.mapping.l1.entries[offset >> geometry.l1_bits] & OFFSET_MASK
            if not (empty and leaves_empty):
                await _change_in_table(image, first, stop, rule)
        first = stop + 1
        await trio.lowlevel.checkpoint()  # nothing above waits if all tables are in memory


async def _change_in_table(
    image: Image, first: int, last: int, rule: Callable[[int], int]
) -> None:
    bits = image.geometry.cluster_bits
    start = first & (image.geometry.l2_entries - 1)
    freed: list[int] = []  # guest clusters that have no room in the data file any more
    try:
        table = await image.table(first << bits)
        for index in range(start, start + last - first + 1):
            old = table.entries[index]
            new = rule(old)
            if new != old:
                guest = first - start + index
                image.mapping.check_entry(old, guest << bits)
                if not new & OFFSET_MASK:
                    image.forget(old)
                if image.data_file is not None and old & COPIED and not new & COPIED:
                    freed.append(guest)
                table.set(index, new)
    except CorruptImage as error:
        raise image.stop(error) from None
    if freed:
        await punch(image, freed)
