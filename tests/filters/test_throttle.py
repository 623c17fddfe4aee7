"""The throttle node: passes on what it is asked, when its group allows."""

import pytest
import trio
import trio.testing

from fakes import FakeLeaf, FakeNode
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.throttle import ThrottleNode
from nbdserve.filters.throttle_group import ThrottleGroup

SIZE = 1 << 20

# Each request that is limited: how to make it of 1000 bytes, and what the child is asked.
LIMITED = {
    "read": (lambda node: node.read(8, memoryview(bytearray(1000))), ("read", 8, 1000)),
    "write": (lambda node: node.write(8, bytes(1000)), ("write", 8, 1000)),
    "writev": (lambda node: node.writev(8, [bytes(600), bytes(400)]), ("write", 8, 600)),
    "zeroes": (
        lambda node: node.write_zeroes(8, 1000, may_unmap=True, fallback=False),
        ("write_zeroes", 8, 1000, True, False),
    ),
    "discard": (lambda node: node.discard(8, 1000), ("discard", 8, 1000)),
}


def throttled(child, **limits):
    group = ThrottleGroup("g", ThrottleLimits(**limits))
    return ThrottleNode(child, group.join())


@pytest.mark.parametrize("kind", LIMITED)
async def test_a_request_waits_for_the_one_before_and_reaches_the_child(autojump_clock, kind):
    call, expected = LIMITED[kind]
    child = FakeLeaf(SIZE)
    node = throttled(child, bps_total=RateLimit(1000))
    start = trio.current_time()
    await call(node)
    assert trio.current_time() == start
    assert child.calls[0] == expected
    await call(node)
    assert trio.current_time() - start == pytest.approx(0.9)  # 1000 bytes less the 100 that fit


@pytest.mark.parametrize("kind", LIMITED)
async def test_only_a_read_counts_as_a_read(autojump_clock, kind):
    node = throttled(FakeLeaf(SIZE), iops_read=RateLimit(1))
    start = trio.current_time()
    for _ in range(5):
        await LIMITED[kind][0](node)
    assert trio.current_time() - start == pytest.approx(3.9 if kind == "read" else 0)


async def test_gathered_buffers_are_one_request(autojump_clock):
    node = throttled(FakeLeaf(SIZE), iops_total=RateLimit(1))
    start = trio.current_time()
    await node.writev(0, [b"a"] * 100)
    assert trio.current_time() == start


async def test_a_flush_goes_straight_to_the_child(autojump_clock):
    child = FakeLeaf(SIZE)
    node = throttled(child, iops_total=RateLimit(1))
    start = trio.current_time()
    for _ in range(10):
        await node.flush()
        await node.block_status(0, SIZE)
    assert trio.current_time() == start
    assert child.names()[:2] == ["flush_to_os", "flush_to_disk"]


async def test_it_looks_like_its_child():
    child = FakeNode(12345, no_flush=True)
    node = throttled(child, iops_total=RateLimit(1))
    assert (node.size, node.read_only, node.no_flush, node.filename) == (12345, False, True, "fake")
    assert node.cluster_size == child.cluster_size
    assert node.children == {"file": child}
    assert await node.block_status(0, 100) == await child.block_status(0, 100)


async def test_nothing_passes_it_unseen(nursery):
    child = FakeLeaf(SIZE)
    node = throttled(child, iops_total=RateLimit(1))
    assert node.resolve(READ, 0, 512) is node.resolve(WRITE, 0, 512) is Miss.OPAQUE
    backend = BlockBackend(node, Epochs(), nursery, write_cache=True)
    assert backend.write_nowait(0, b"x") is Miss.OPAQUE
    assert child.calls == []


async def test_a_request_that_waits_says_so_to_the_front_end(nursery, autojump_clock):
    """So that it does not keep the poller from spinning for others; not what waits for a format."""
    node = throttled(FakeLeaf(SIZE), iops_total=RateLimit(10))
    below = throttled(FakeLeaf(SIZE), iops_total=RateLimit(10))
    waits = []
    for root in (node, FakeNode(SIZE, file=below)):
        backend = BlockBackend(root, Epochs(), nursery, write_cache=True)
        backend.on_wait = waits.append
    for asked in (node, below):
        for _ in range(4):
            await asked.write(0, b"x")
    assert waits == [1, -1] * 2  # two go at once


async def test_a_backend_that_stops_lets_go_what_waits_in_its_nodes(nursery, autojump_clock):
    node = throttled(FakeLeaf(SIZE), iops_total=RateLimit(1))
    backend = BlockBackend(FakeNode(SIZE, file=node), Epochs(), nursery, write_cache=True)
    start = trio.current_time()
    async with trio.open_nursery() as requests:
        for _ in range(20):
            requests.start_soon(node.write, 0, b"x")
        await trio.testing.wait_all_tasks_blocked()
        backend.drain_begin()
    assert trio.current_time() == start


async def test_closed_it_has_left_the_group(autojump_clock):
    group = ThrottleGroup("g", ThrottleLimits(iops_total=RateLimit(10)))
    node, other = ThrottleNode(FakeLeaf(SIZE), group.join()), group.join()
    await node.read(0, memoryview(bytearray(1)))
    assert node.statistics()["admitted"] == 1
    await node.close()
    for _ in range(4):
        await other.admit(READ, 1)
    assert [*group._lanes[READ].turns] == [other]


@pytest.mark.parametrize("durable", [True, False])
async def test_a_durable_write_waits_like_any_and_is_passed_on(autojump_clock, durable):
    child, asked = FakeLeaf(SIZE), []

    async def write_fua(offset, data):
        asked.append((trio.current_time() - start, offset, len(data)))
        return durable

    child.write_fua = write_fua
    node = throttled(child, bps_write=RateLimit(1000))
    start = trio.current_time()
    for _ in range(2):
        assert await node.write_fua(8, bytes(1000)) is durable
    assert asked == [(0, 8, 1000), (pytest.approx(0.9), 8, 1000)]
