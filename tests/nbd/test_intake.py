"""A connection and the budget: what it holds is counted, it waits, goes on, or is dropped."""

from __future__ import annotations

import socket

import pytest

from memory_leaf import MemoryLeaf
from nbdserve.nbd.budget import FAREWELL, SMALL, STALL, TICK, Budget
from transmission import serving, settle

MIB = 1 << 20
SIZE = 4 * MIB


def filled():
    leaf = MemoryLeaf(SIZE)
    leaf.fill(0, b"".join(number.to_bytes(4) * 128 for number in range(SIZE // 512)))
    return leaf


@pytest.fixture
def leaf():
    return filled()


def looks(budget, seconds):
    for _ in range(int(seconds / TICK)):
        budget.look()


async def test_who_waits_for_nothing_holds_nothing(leaf):
    async with serving(leaf) as world:
        client = await world.connect()
        for length in (1, 4096, MIB, 2 * MIB):
            await client.ask(client.read(0, length))
            await client.ask(client.write(0, bytes(length)))
        await settle()
        assert world.budget.used == 0
        assert client.connection._intake._buffer.held == 0
        assert client.connection._outbox._page is None


async def test_what_is_kept_is_counted_and_given_back(leaf):
    async with serving(leaf) as world:
        deaf, halfway = await world.connect(send_buffer=4096), await world.connect()
        await deaf.send(b"".join(deaf.read(0, MIB) for _ in range(3)))
        await halfway.send(halfway.write(0, bytes(3 * MIB))[: 2 * MIB])
        await settle()
        assert world.budget.used >= 4 * MIB
        halfway.sock.close()
        await halfway.ended.wait()
        for answer in await deaf.answers(3):
            assert answer.data == leaf.data[:MIB]
        await settle()
        assert world.budget.used == 0


@pytest.mark.parametrize("length", [4096, SMALL, SMALL + 1, MIB, SIZE])
async def test_the_honest_beside_those_that_hold_it_all(leaf, length):
    """Requests of every length are done, though nobody gives anything back."""
    async with serving(leaf) as world:
        world.budget = Budget(2 * MIB)
        bad = [await world.connect(send_buffer=4096) for _ in range(5)]
        for client in bad:
            await client.send(b"".join(client.read(0, MIB) for _ in range(3)))
        await settle()
        assert world.budget.short
        honest = await world.connect()

        async def tick():  # who stands still in the lane of others goes
            while True:
                await settle()
                world.budget.look()

        world.nursery.start_soon(tick)
        for _ in range(5):
            data = leaf.data[:length]
            assert (await honest.ask(honest.write(0, bytes(data)))).error == 0
            assert (await honest.ask(honest.read(0, length))).data == data


async def test_many_small_requests_when_memory_is_short(leaf):
    """In batches, and none of them is lost or in disorder."""
    async with serving(leaf) as world:
        world.budget = Budget(1)
        client = await world.connect()
        leaf.would_block = True
        requests = []
        for number in range(300):
            offset = number * 512
            length = (512, 5000, 70_000)[number % 3]
            requests.append(client.read(offset, length))
            requests.append(client.write(offset, bytes(leaf.data[offset : offset + length])))
        before = bytes(leaf.data)
        world.nursery.start_soon(client.send, b"".join(requests))
        for answer in await client.answers(600):
            assert answer.error == 0
        assert leaf.data == before
        await settle()
        assert world.budget.used == 0


async def test_who_stands_still_is_dropped_while_another_waits(leaf, caplog):
    caplog.set_level("INFO")
    async with serving(leaf) as world:
        world.budget = Budget(2 * MIB)
        halfway, waits = await world.connect(), await world.connect()
        await halfway.send(halfway.write(0, bytes(SIZE))[:MIB])
        await settle()
        looks(world.budget, 10 * STALL)
        assert not halfway.ended.is_set()
        message = waits.write(0, bytes(SIZE))
        world.nursery.start_soon(waits.send, message)
        await settle()
        assert world.budget.waiting == 1
        looks(world.budget, STALL + TICK)
        await halfway.ended.wait()
        assert (await waits.answer()).error == 0
    assert "the client stood still for 10 s" in caplog.text


async def test_a_half_closed_client_that_never_reads_is_dropped(leaf, caplog):
    caplog.set_level("INFO")
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=4096)
        await client.send(b"".join(client.read(0, MIB) for _ in range(4)))
        client.sock.shutdown(socket.SHUT_WR)
        await settle()
        looks(world.budget, FAREWELL - TICK)
        await settle()
        assert not client.ended.is_set()
        looks(world.budget, 2 * TICK)
        await client.ended.wait()
        assert world.budget.used == 0
    assert "said goodbye" in caplog.text
