"""Refusing a damaged image costs little, whatever its numbers say; and leaves nothing behind.

Bounds are on what is allocated and read, which no other process changes; times are in the table
that `make refusals` prints.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from fuzz import loop
from fuzz.damages import BOMB, DAMAGES, KIB, MIB, attempt, measure
from fuzz.image import ImageFile, open_node
from fuzz.planted import Bug, planted
from nbdserve.config import ImageConfig
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.compressed import Decompressor
from nbdserve.formats.qcow2.consistency import _check_region
from nbdserve.formats.qcow2.open import read_header
from nbdserve.graph import open_backend

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = 192 * KIB
"""Bytes that any refusal may take, most of them the decompressor's."""

READS = 6
"""The beginning, the header, L1, the refcount table, an L2 table, a cluster."""


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_what_a_refusal_costs(damage):
    cost = measure(damage, repetitions=0)
    assert damage.says in cost.error
    assert cost.error.startswith("fuzzed.qcow2: ")
    assert cost.error.isprintable()
    assert len(cost.error) < 400
    assert cost.reads <= READS
    assert cost.largest <= max(len(damage.data), 1024)
    assert cost.nb_bytes <= 2 * len(damage.data) + 4 * KIB
    assert cost.peak <= MEMORY + damage.extra, f"{cost.peak:,} bytes"


def test_a_limit_that_is_gone_is_missed():
    """Without the limits of the header the snapshot table is no longer what is wrong."""
    [damage] = [damage for damage in DAMAGES if damage.name == "2**32-1 snapshots"]
    with planted(Bug(_check_region, "region.nb_bytes > region.limit", "False")):
        assert damage.says not in attempt(damage)[0]


def test_what_a_compressed_cluster_inflates_to_is_bounded():
    """60 MiB in 60 KiB: only the first cluster's worth is ever produced."""
    file = ImageFile(BOMB)
    produced = []
    inflate = Decompressor.__call__

    def recorded(self, data, guest_offset):
        cluster = inflate(self, data, guest_offset)
        produced.append(len(cluster))
        return cluster

    async def read():
        node, _ = await open_node(file, await read_header(file), read_only=True)
        buffer = bytearray(b"x" * 512)
        await node.read(0, memoryview(buffer))
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decompressor, "__call__", recorded)
        assert loop.run(read) == bytes(512)
    assert produced == [64 * KIB]


def nb_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_after_a_thousand_damaged_images(tmp_path):
    """Through the same door as a server's, each in a file; some with a backing file, which is open
    by the time the image above it is refused."""
    small = [damage for damage in DAMAGES if len(damage.data) < MIB and not damage.reads]
    paths = []
    for number, damage in enumerate(small):
        path = tmp_path / f"{number}.qcow2"
        path.write_bytes(damage.data)
        os.truncate(path, min(max(len(damage.data), damage.size), 1 << 40))
        paths.append(path)

    async def refuse(path: Path) -> None:
        with pytest.raises(ImageError, match=str(path)):
            async with open_backend(ImageConfig(str(path), "qcow2", aio="threads")):
                pass

    async def refuse_all() -> tuple[int, int]:
        await refuse(paths[0])
        before = nb_descriptors()
        for number in range(1000):
            await refuse(paths[number % len(paths)])
        return before, nb_descriptors()

    before, after = trio.run(refuse_all)
    assert after == before
