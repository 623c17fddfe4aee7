"""A leaf in memory does to its content what a file does to itself, on every way."""

import random

import trio

from nbdserve.block.run import Op
from nbdserve.drivers.memory import MemoryNode
from nbdserve.powercut.content import PAGE, Content


def node(content=b"old." * 256, **options):
    return MemoryNode(Content.of(content), "memory", read_only=False, **options)


async def submitted(submit, *arguments, **options):
    done = trio.Event()
    errors = []

    def completed(error):
        errors.append(error)
        done.set()

    submit(*arguments, completed, **options)
    assert not done.is_set()  # never from inside the submission
    await done.wait()
    assert errors == [None]


async def test_every_way_reads_and_writes():
    leaf = node()
    assert leaf.resolve(Op.WRITE_FUA, 4, 8) == [(leaf, 4, 8)]
    assert leaf.write_nowait(0, b"a")
    assert leaf.writev_nowait(1, [b"b", b"c"])
    await leaf.write(3, b"d")
    await leaf.writev(4, [b"e", b"f"])
    assert await leaf.write_fua(6, b"g")
    await submitted(leaf.submit_write, 7, b"h", fua=True)
    buffers = [bytearray(9) for _ in range(3)]
    assert leaf.read_nowait(0, memoryview(buffers[0]))
    await leaf.read(0, memoryview(buffers[1]))
    await submitted(leaf.submit_read, 0, memoryview(buffers[2]))
    assert buffers == [b"abcdefgho"] * 3
    assert leaf.flush_nowait()
    await leaf.flush()
    await submitted(leaf.submit_flush)


async def test_it_grows_by_sectors_and_reads_zeroes_behind():
    leaf = node()
    assert leaf.size == 1024
    await leaf.write(2000, b"xy")
    assert leaf.size == 2048
    await leaf.write_zeroes(3000, 10, may_unmap=True)
    assert leaf.size == 3072
    await leaf.discard(0, 100_000)
    assert leaf.size == 3072
    buffer = bytearray(b"?" * 10)
    await leaf.read(5000, memoryview(buffer))
    assert buffer == bytes(10)


async def test_block_status_is_true_and_complete():
    chooser = random.Random(1)
    content = Content(3 << 20)
    for _ in range(40):
        content.write(chooser.randrange((3 << 20) - 5000), b"x" * chooser.choice((1, 5000)))
    leaf = MemoryNode(content, "memory", read_only=True)
    at = 700
    while at < leaf.size:
        for extent in await leaf.block_status(at, leaf.size - at):
            data = content.read(at, extent.length)
            assert extent.zero is not extent.data
            assert extent.zero is not any(data)
            at += extent.length
    assert at == leaf.size
    many = Content()
    for page in range(0, 6000, 2):
        many.write(page * PAGE, b"x")
    extents = await MemoryNode(many, "memory", read_only=True).block_status(0, many.size)
    assert len(extents) == 1024
