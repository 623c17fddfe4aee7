"""O_DIRECT against a model: many tasks at once, each with bytes of its own in shared blocks.

The file is cut into pieces of odd and even lengths, some past its end, and each piece belongs to
one task. So tasks meet in blocks and pages and never in a byte: after any order of theirs each byte
is what its owner did last. With a disk of 4096-byte sectors where root can make one.
NBDSERVE_SOAK=1 runs longer.
"""

import itertools
import mmap
import os
import random
from pathlib import Path

import pytest
import trio

import facilities
import peers
from nbdserve.drivers.alignment import Alignment
from nbdserve.drivers.open import open_file
from nbdserve.engines.engine import completion
from poisoned import PoisonedPool

pytestmark = pytest.mark.peer(peers.O_DIRECT)

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
SEEDS = range(10) if SOAK else range(2)
STEPS = 400 if SOAK else 100
TASKS = 8
LONG = 120.0

SIZE = 300_000  # of the pieces together; about
ODD_END = 123_457
LENGTHS = (1, 7, 100, 511, 512, 513, 1024, 4000, 4096, 5000, 8192, 12_288, 20_000)


@pytest.fixture(scope="module")
def loop_device(tmp_path_factory):
    """A block device with sectors of 4096 bytes."""
    path = tmp_path_factory.mktemp("loop") / "disk"
    path.write_bytes(b"\xee" * (SIZE // 4096 * 4096))
    with facilities.loop_device(path, sector=4096) as device:
        yield device


class Soak:
    """One file, its model, and what may be done to it."""

    def __init__(self, node, pool, model, limit, rng):
        self.node = node
        self.pool = pool
        self.model = model  # as long as the file will be
        self.end = node.length
        unit = 4096 if limit > 100_000 else 512
        lengths = [length for length in LENGTHS if length <= limit // 6]
        stops = [0]
        while stops[-1] < limit:
            if rng.random() < 0.3:  # the next begins aligned, for whole blocks
                stops.append(min(-(-stops[-1] // unit) * unit, limit))
            stops.append(min(stops[-1] + rng.choice(lengths), limit))
        pieces = [(start, stop) for start, stop in itertools.pairwise(stops) if start < stop]
        rng.shuffle(pieces)
        self.pieces = [pieces[number::TASKS] for number in range(TASKS) if number < len(pieces)]

    async def task(self, number, seed):
        rng = random.Random(f"{seed} {number}")
        actions = [self.write, self.queue, self.zero, self.discard, self.flush]
        weights = [4, 4, 2, 1, 0.5]
        for _ in range(STEPS):
            start, stop = rng.choice(self.pieces[number])
            if rng.random() < 0.4:
                start += rng.randrange(stop - start)
                stop = rng.randrange(start, stop) + 1
            [action] = rng.choices(actions, weights)
            await action(rng, start, stop)
            start, stop = rng.choice(self.pieces[number])
            assert await self.read(rng, start, stop) == self.model[start:stop]

    async def read(self, rng, start, stop):
        """Into memory that is aligned, or not; and some of others' bytes with it."""
        more = rng.choice((0, 0, 1, 600))
        memory = memoryview(mmap.mmap(-1, stop - start + more + 1))
        skipped = rng.randrange(2)
        buffer = memory[skipped : skipped + stop - start + more]
        buffer[:] = b"\xcc" * len(buffer)
        await self.node.read(start, buffer)
        return bytes(buffer[: stop - start])

    def wrote(self, start, data):
        self.model[start : start + len(data)] = data
        self.end = max(self.end, start + len(data))

    async def write(self, rng, start, stop):
        data = rng.randbytes(stop - start)
        half = rng.randrange(len(data) + 1)
        await self.node.writev(start, (data[:half], bytearray(data[half:])))
        self.wrote(start, data)

    async def queue(self, rng, start, stop):
        """As the front end does it."""
        data = rng.randbytes(stop - start)
        buffer = self.pool.take(len(data))
        piece = buffer[: len(data)]
        piece[:] = data
        try:
            fua = rng.random() < 0.2
            await completion(lambda done: self.node.submit_write(start, piece, done, fua=fua))
        finally:
            self.pool.give(buffer)
        self.wrote(start, data)

    async def zero(self, rng, start, stop):
        await self.node.write_zeroes(start, stop - start, may_unmap=rng.random() < 0.5)
        self.wrote(start, bytes(stop - start))

    async def discard(self, rng, start, stop):
        await self.node.discard(start, stop - start)
        found = await self.read(rng, start, stop)
        old = self.model[start:stop]
        assert all(now in (0, before) for now, before in zip(found, old, strict=True))
        self.model[start:stop] = found

    async def flush(self, rng, start, stop):
        await self.node.flush()


def content_of(path):
    """Through the page cache."""
    return Path(path).read_bytes()


async def soak(engine, path, seed, *, limit, block=None):
    rng = random.Random(seed)
    pool = PoisonedPool()
    node = open_file(str(path), engine, read_only=False, discard=True, direct=pool)
    try:
        if block is not None and node.alignment.request <= block:  # as if it were larger
            node.alignment = Alignment(block, block)
            node._in_block = node._in_memory = block - 1
        model = bytearray(content_of(path).ljust(limit, b"\0"))
        world = Soak(node, pool, model, limit, rng)
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                for number in range(len(world.pieces)):
                    nursery.start_soon(world.task, number, seed)
            await node.flush()
        assert node.gate.statistics() == (0, 0)
        assert pool.out == {}
        assert world.end == node.length
        content = content_of(path)
        assert len(content) == world.end
        assert content == model[: world.end]
        assert not any(model[world.end :])
    finally:
        await node.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [None, 4096])
async def test_a_file_with_an_odd_end_that_grows(tmp_path, engine, block, seed):
    path = tmp_path / "file"
    path.write_bytes(random.Random(seed).randbytes(ODD_END))
    await soak(engine, path, seed, limit=SIZE, block=block)
    assert path.stat().st_size > ODD_END


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("limit", [3000, 7001])
async def test_a_small_file_whose_odd_end_stays(tmp_path, engine, limit, seed):
    """So that many writes meet in the page that holds the end."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(seed).randbytes(limit))
    await soak(engine, path, seed, limit=limit)
    assert path.stat().st_size == limit


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_disk_with_large_sectors(loop_device, engine, seed):
    await soak(engine, loop_device, seed, limit=SIZE // 4096 * 4096)
