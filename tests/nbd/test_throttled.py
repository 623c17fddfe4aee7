"""An export behind a throttle, seen by clients: who waits, and who does not."""

from __future__ import annotations

import pytest
import trio

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.throttle_group import ThrottleGroup
from nbdserve.nbd.late import MAX_IN_FLIGHT
from transmission import CACHE, FLUSH, TRIM, WRITE_ZEROES, serving, settle

SIZE = 1 << 20
NAME = b"slow"


class Account:
    """A throttle that lets all go, or as many as `left` says, and writes down who went."""

    def __init__(self):
        self.more = trio.Event()
        self.left = 1 << 30
        self.went = []

    def allow(self, number):
        self.left = number
        self.more.set()
        self.more = trio.Event()

    def admit_nowait(self, op, nb_bytes):
        if self.left:
            self.left -= 1
            self.went.append((op, nb_bytes))
            return True
        return False

    def take_back(self, op, nb_bytes):
        self.left += 1
        self.went.remove((op, nb_bytes))

    async def admit(self, op, nb_bytes):
        while not self.admit_nowait(op, nb_bytes):
            await self.more.wait()

    def drain_begin(self):
        self.allow(1 << 30)

    def statistics(self):
        return {}


def filled(size=SIZE):
    leaf = MemoryLeaf(size)
    leaf.fill(0, bytes(range(256)) * (size // 256))
    return leaf


@pytest.fixture
async def slow():
    """(world, backend, leaf, account, connect): one export behind a throttle, one without."""
    leaf, account = filled(), Account()
    async with serving(filled()) as world:
        backend = world.add_throttled("slow", leaf, account)
        yield world, backend, leaf, account


def total(account, op):
    return sum(nb_bytes for which, nb_bytes in account.went if which is op)


@pytest.mark.parametrize("structured", [True, False])
async def test_every_request_is_paid_for_once(slow, structured):
    world, _, leaf, account = slow
    client = await world.connect(structured=structured, name=NAME)
    for hold_back in (False, True):
        leaf.would_block = hold_back  # all go the late way
        account.went.clear()
        answers = [
            await client.ask(message)
            for message in (
                client.read(0, 512),
                client.read(100, 40000),
                client.write(512, b"x" * 700),
                client.request(WRITE_ZEROES, 1 << 19, 8192),
                client.request(TRIM, 1 << 19, 4096),
                client.request(CACHE, 0, 1000),
                client.request(FLUSH),
            )
        ]
        assert [answer.error for answer in answers] == [0] * 7
        assert total(account, READ) == 512 + 40000 + 1000
        assert account.went.count((WRITE, 700)) == 1
        assert total(account, WRITE) == 700 + 8192 + 4096


@pytest.mark.parametrize("left", [0, 1, 2, 3])
async def test_of_a_sparse_read_only_the_data_is_paid_for_and_once(slow, left):
    """As in QEMU, where holes of a structured read are found by block status."""
    world, _, leaf, account = slow
    for block in (1, 4, 9):
        leaf.holes.add(block)
        leaf.data[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    account.allow(left)
    client = await world.connect(name=NAME)
    await client.send(client.read(0, 64 << 10))
    await settle()
    account.allow(100)
    answer = await client.answer()
    assert answer.data == leaf.data[: 64 << 10]
    assert total(account, READ) == (64 << 10) - 3 * BLOCK


async def test_what_is_held_up_is_answered_later_and_a_flush_at_once(slow):
    world, backend, leaf, account = slow
    account.left = 0
    client = await world.connect(structured=False, name=NAME)
    writes = [client.write(number * 512, bytes([number]) * 512) for number in range(50)]
    await client.send(b"".join(writes) + client.request(FLUSH))
    flushed = await client.answer()
    assert flushed.error == 0
    assert len(client.sent) == 50  # still awaited: it was the flush that was answered
    assert [name for name, *_ in leaf.calls] == ["flush"]
    assert backend.misses[Miss.THROTTLED] == 50
    account.allow(100)
    assert {answer.error for answer in await client.answers(50)} == {0}
    assert leaf.data[: 50 * 512] == b"".join(bytes([number]) * 512 for number in range(50))


async def test_who_waits_for_the_throttle_holds_nobody_else_up(slow):
    world, _, _, account = slow
    account.left = 0
    throttled = await world.connect(structured=False, name=NAME)
    requests = 3 * MAX_IN_FLIGHT  # more than it may have in flight: it is not received from
    with trio.move_on_after(0.2):
        await throttled.send(b"".join(throttled.read(0, 512) for _ in range(requests)))
    await settle()
    other = await world.connect(structured=False)
    for number in range(200):
        answer = await other.ask(other.read(number * 512, 512))
        assert len(answer.data) == 512
        # Nothing needs the other tasks to run, so the poller goes on spinning for this client.
        assert world.poller.busy == 0
    assert account.went == []
    account.allow(1 << 30)
    assert {answer.error for answer in await throttled.answers(requests)} == {0}


async def test_a_stop_lets_them_go(slow):
    world, backend, _, account = slow
    account.left = 0
    client = await world.connect(structured=False, name=NAME)
    await client.send(b"".join(client.write(0, b"x") for _ in range(20)))
    await settle()
    backend.drain_begin()
    client.connection.shutdown()
    assert {answer.error for answer in await client.answers(20)} == {0}
    await client.end()


async def test_who_leaves_while_it_waits_is_waited_for_no_longer_than_it_must(slow):
    """Its requests are done when their turn comes; nobody awaits their replies."""
    world, _, leaf, account = slow
    account.left = 0
    client = await world.connect(structured=False, name=NAME)
    await client.send(client.write(0, b"last words"))
    await settle()
    client.sock.close()
    account.allow(1)
    await client.ended.wait()
    assert leaf.data[:10] == b"last words"


async def test_a_group_through_the_front_end(autojump_clock):
    """iops-total=200: 400 requests of 4 KiB take 1.895 s, one or many at a time."""
    member = ThrottleGroup("g", ThrottleLimits(iops_total=RateLimit(200))).join()
    leaf = filled()
    async with serving(leaf) as world:
        world.add_throttled("slow", leaf, member)
        clock = trio.lowlevel.current_clock()
        clock.autojump_threshold = 0.005  # the poller's epoll is not trio's: let it be asked
        client = await world.connect(structured=False, name=NAME)
        start = trio.current_time()
        for _ in range(4):
            await client.send(b"".join(client.read(0, 4096) for _ in range(100)))
            await client.answers(100)
        assert trio.current_time() - start == pytest.approx(1.895, abs=0.02)
