"""Buffers of the pool on their way through the front end, with O_DIRECT and a real engine.

Each is given back exactly once and by nobody who still needs it, whatever its client does: reads
its replies or not, leaves in mid-request, or is cut off.
"""

import os
import random

import pytest
import trio

import peers
from nbdserve.drivers.open import open_file
from poisoned import PoisonedPool
from transmission import FLUSH, FUA, READ, serving, settle

pytestmark = pytest.mark.peer(peers.O_DIRECT)

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
ROUNDS = 25 if SOAK else 6

SHARE = 96 * 1024  # of the file, for each client
CLIENTS = 4
ODD = 300  # bytes past the last whole block
LONG = 60.0


@pytest.fixture
async def disk(tmp_path, engine):
    """(node, pool, content) of a file that ends within a block."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(9).randbytes(CLIENTS * SHARE + ODD))
    pool = PoisonedPool()
    node = open_file(str(path), engine, read_only=False, discard=True, direct=pool)
    yield node, pool, path
    with trio.fail_after(LONG):
        await engine.idle()
    assert pool.out == {}
    await node.close()


def requests_of(client, rng, model, start, stop):
    """Requests of one batch, none of which overlap: (message, expected data)."""
    asked, offset = [], start
    while offset < stop:
        length = min(rng.choice((1, 512, 700, 4096, 9000, 40_000)), stop - offset)
        what = rng.random()
        if what < 0.5:
            asked.append((client.read(offset, length), bytes(model[offset : offset + length])))
        elif what < 0.9:
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            asked.append((client.write(offset, data, rng.choice((0, 0, 0, FUA))), b""))
        else:
            asked.append((client.request(FLUSH), b""))
        offset += length
    rng.shuffle(asked)
    return asked


async def converse(client, rng, model, start, stop):
    asked = requests_of(client, rng, model, start, stop)
    expected = {int.from_bytes(message[8:16]): data for message, data in asked}
    client.at_once = rng.choice((1 << 12, 1 << 18))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"".join(message for message, _ in asked))
        if rng.random() < 0.3:
            await settle()  # all replies are there, and the socket has no room for them
        for answer in await client.answers(len(asked)):
            assert answer.error == 0
            assert answer.data == expected[answer.cookie]


async def leave(client, rng, model, start, stop):
    """Go, or be cut off, in the middle of something. No writes: whether they were done would not
    be known."""
    asked = requests_of(client, rng, bytearray(model), start, stop)
    reads = b"".join(message for message, _ in asked if message[7] == READ)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, reads)
        if rng.random() < 0.7:
            await client.exactly(16)
        if rng.random() < 0.5:
            await settle()  # replies are on their way and cannot go on
        nursery.cancel_scope.cancel()
    if rng.random() < 0.5:
        client.sock.close()
    else:
        client.scope.cancel()
    await client.ended.wait()


@pytest.mark.parametrize("structured", [False, True])
async def test_clients_that_stay_leave_and_are_cut_off(disk, engine, structured):
    node, pool, path = disk
    model = bytearray(path.read_bytes().ljust(node.size, b"\0"))
    with trio.fail_after(LONG):
        async with serving(node, engines=[engine], direct=True, buffers=pool) as world:

            async def client_of(number):
                rng = random.Random(f"{structured} {number}")
                start = number * SHARE
                stop = node.size if number == CLIENTS - 1 else start + SHARE
                for _ in range(ROUNDS):
                    client = await world.connect(
                        structured=structured, send_buffer=rng.choice((4096, 1 << 16))
                    )
                    await converse(client, rng, model, start, stop)
                    await leave(client, rng, model, start, stop)

            async with trio.open_nursery() as clients:
                for number in range(CLIENTS):
                    clients.start_soon(client_of, number)
    assert pool.lent > 100
    assert path.read_bytes() == model[: node.length]
