"""The asynchronous read, of each kind of cluster and across them."""

import zlib

import pytest

from nbdserve.block.run import Miss
from nbdserve.formats.raw import RawNode
from qcow2_model import OFFSET, Layout, MemoryFile, new_image, open_memory, pattern

C = 4096
SIZE = 12 * C


def deflate(data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


@pytest.fixture
async def mixed(tmp_path):
    """Cluster 0 data, 1 zero, 2 compressed, 3 unallocated, 4 data; and what it reads as."""
    file = MemoryFile(new_image(tmp_path, SIZE, cluster_size=C))
    text = pattern(3, 50).ljust(C, b"\x22")
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 5 * C))
        await backend.discard(C, C)
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    third = layout.words(l2 + 16, 1)[0] & OFFSET
    file.content[third + 700 : third + 700 + len(deflate(text))] = deflate(text)
    file.content[l2 + 16 : l2 + 24] = (1 << 62 | third + 700).to_bytes(8, "big")
    file.content[l2 + 24 : l2 + 32] = bytes(8)
    old = pattern(5, 4 * C - 100)
    wanted = bytearray(pattern(1, 5 * C).ljust(SIZE, b"\0"))
    wanted[C : 2 * C] = bytes(C)
    wanted[2 * C : 3 * C] = text
    wanted[3 * C : 4 * C] = old[3 * C :].ljust(C, b"\0")
    return file, old, bytes(wanted), third + 700


async def test_every_range(mixed):
    file, old, wanted, _ = mixed
    async with open_memory(file, backing=RawNode(MemoryFile(old)), read_only=True) as (backend, _):
        edges = [at for n in range(13) for at in (n * C - 1, n * C, n * C + 1) if 0 <= at <= SIZE]
        for start in edges:
            for end in edges:
                if start < end:
                    data = memoryview(bytearray(b"\xee" * (end - start)))
                    await backend.read(start, data)
                    assert data == wanted[start:end]


async def test_a_compressed_cluster_is_inflated_once_for_all_its_pieces(mixed):
    file, old, wanted, where = mixed
    async with open_memory(file, backing=RawNode(MemoryFile(old))) as (backend, _):
        reads = []
        file.fail = lambda kind, offset: reads.append(offset) if kind == "read" else None
        for start in range(2 * C, 3 * C, 512):
            data = memoryview(bytearray(512))
            assert backend.read_nowait(start, data) in (Miss.COMPRESSED, Miss.NOT_CACHED)
            await backend.read(start, data)
            assert data == wanted[start : start + 512]
        assert reads.count(where) == 1
        assert backend.statistics()["nodes"]["root"]["compressed"] == (1, 7)


@pytest.mark.parametrize("damage", [b"\xff\xff\xff\xff\xff", deflate(b"short")])
async def test_a_damaged_compressed_cluster_is_an_error_of_its_own(mixed, damage):
    """Reading it fails, writing a part of it fails, and the image goes on."""
    file, old, _, where = mixed
    file.content[where : where + len(damage)] = damage
    async with open_memory(file, backing=RawNode(MemoryFile(old))) as (backend, node):
        data = memoryview(bytearray(10))
        with pytest.raises(OSError, match="cannot decompress") as caught:
            await backend.read(2 * C, data)
        assert caught.value.errno == 5
        with pytest.raises(OSError, match="cannot decompress"):
            await backend.write(2 * C + 1, b"part")
        assert node.image.broken is None
        await backend.write(2 * C, b"w" * C)  # nothing of it is kept
        await backend.read(2 * C, data)
        assert data == b"w" * 10
    assert file.content[79] == 0


async def test_an_entry_reused_is_not_taken_for_what_was_kept(mixed):
    file, old, _, where = mixed
    async with open_memory(file, backing=RawNode(MemoryFile(old))) as (backend, node):
        data = memoryview(bytearray(C))
        await backend.read(2 * C, data)
        await backend.discard(2 * C, C)
        await backend.flush()
        table = await node.image.table(0)
        other = b"another".ljust(C, b"!")
        file.content[where : where + len(deflate(other))] = deflate(other)
        table.set(2, 1 << 62 | where)
        await backend.read(2 * C, data)
        assert data == other


async def test_an_error_below_reaches_the_reader(mixed):
    file, old, _, _ = mixed

    def fail(kind, offset):
        raise OSError(5, "bad sector")

    below = MemoryFile(old)
    async with open_memory(file, backing=RawNode(below), read_only=True) as (backend, _):
        below.fail = fail
        with pytest.raises(OSError, match="bad sector"):
            await backend.read(3 * C, memoryview(bytearray(5)))
        file.fail = fail
        with pytest.raises(OSError, match="bad sector"):
            await backend.read(0, memoryview(bytearray(5)))
