"""A client that vanishes after any bytes leaves nothing behind; one that floods takes no memory.

What a client is answered that half-closes and listens is held by tests/fuzz/transmission.py. Here
it is gone in the middle: nothing stays in flight, another connection goes on. Each example is one
client; it sends its bytes in pieces of any size to a leaf that may be slow or fail.
"""

from __future__ import annotations

import socket
import tracemalloc

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memory_leaf import MemoryLeaf
from nbdserve.block.run import Miss
from nbdserve.nbd.export import MAXIMUM_PAYLOAD
from nbdserve.nbd.late import MAX_BYTES
from transmission import READ, WRITE, request, serving, settle

SIZE = 256 << 10
MIB = 1 << 20

# A poller, two connections with a receive and a send buffer each, what a test costs itself.
OVERHEAD = 24 * MIB


# Mostly what is in range or nearly so, for what is refused at once tells little.
lengths = st.one_of(
    st.sampled_from([0, 1, 512, 4096, 32 << 10, 33_000, SIZE, SIZE + 1, 0xFFFFFFFF]),
    st.integers(0, SIZE),
    st.integers(0, 0xFFFFFFFF),
)
offsets = st.one_of(
    st.sampled_from([0, 1, 4096, SIZE - 1, SIZE, (1 << 64) - 1]),
    st.integers(0, SIZE),
    st.integers(0, (1 << 64) - 1),
)
commands = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
flags = st.one_of(st.just(0), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 0xFFFF))
payloads = st.one_of(st.binary(max_size=200), st.integers(0, 100_000).map(bytes))

messages = st.one_of(
    st.builds(request, commands, st.integers(0, 0xFFFF), offsets, lengths, flags),
    st.builds(
        lambda cookie, offset, data, flag: request(WRITE, cookie, offset, len(data), flag, data),
        st.integers(0, 0xFFFF), offsets, payloads, flags,
    ),
    st.binary(max_size=60),
)  # fmt: skip

leaves = st.fixed_dictionaries(
    {
        "would_block": st.booleans(),
        "miss": st.sampled_from([None, None, Miss.OPAQUE]),
        "failures": st.lists(st.tuples(st.integers(1, 10), st.sampled_from([5, 28, 95]))),
    }
)


def make_leaf(*, would_block, miss, failures):
    leaf = MemoryLeaf(SIZE)
    for start in range(0, SIZE, 64 << 10):
        leaf.fill(start, b"x" * 20_000)
    leaf.would_block, leaf.miss = would_block, miss
    for number, error in failures:
        leaf.fail_at(number, error)
    return leaf


async def send_in_pieces(client, stream, sizes):
    """Until the server has had enough."""
    sizes = iter(sizes)
    try:
        while stream:
            size = next(sizes, len(stream))
            await client.send(stream[:size])
            stream = stream[size:]
        client.sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, trio.ClosedResourceError):
        pass  # the server, or the test, has closed it


@given(
    parts=st.lists(messages, max_size=12),
    sizes=st.lists(st.integers(1, 50_000), max_size=20),
    leaf=leaves.map(lambda options: make_leaf(**options)),
    structured=st.booleans(),
    held=st.booleans(),
)
async def test_any_bytes_from_a_client_that_vanishes(parts, sizes, leaf, structured, held):
    async with serving(leaf) as world:
        other = await world.connect()
        client = await world.connect(structured=structured)
        if held:
            leaf.hold()
        world.nursery.start_soon(send_in_pieces, client, b"".join(parts), sizes)
        await settle()
        client.sock.close()
        await settle()
        leaf.release()
        await client.ended.wait()
        await check_others(world, other, leaf)


async def check_others(world, other, leaf):
    assert world.poller.busy == 0
    assert world.backend._epochs._active == {}
    leaf.miss, leaf.would_block = None, False
    leaf._failures.clear()
    answer = await other.ask(other.read(0, SIZE))
    assert answer.data == leaf.data


# Memory. What the hypothesis above cannot reach in its small examples.


@pytest.fixture
def peak():
    """The most bytes that were allocated at a time, since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


FLOODS = {
    "reads": request(READ, 1, 0, 16 * MIB) * 1000,
    "reads of one sector": request(READ, 1, 0, 512) * 100_000,
    "write that never comes": request(WRITE, 1, 0, MAXIMUM_PAYLOAD) + bytes(MIB),
    "writes": request(WRITE, 1, 0, 256 << 10, 0, bytes(256 << 10)) * 400,
    "writes of which each pins a buffer": request(WRITE, 1, 0, 150_000, 0, bytes(150_000)) * 400,
    "small writes": request(WRITE, 1, 0, 4096, 0, bytes(4096)) * 10_000,
    "cache": request(5, 1, 0, 16 * MIB) * 1000,
    "block status": request(7, 1, 0, MIB) * 1000,
    "refused": request(READ, 1, 1 << 60, 512) * 100_000,
}


@pytest.mark.parametrize("way", ["inline", "stuck", "task"])
@pytest.mark.parametrize("flood", FLOODS)
async def test_memory_that_a_client_who_only_sends_can_take(flood, way, peak):
    leaf = MemoryLeaf(16 * MIB)
    for block in range(0, 16 * MIB, 8192):
        leaf.fill(block, b"x")
    if way != "inline":
        leaf.would_block = True
    if way == "stuck":
        leaf.hold()
    async with serving(leaf) as world:
        other, client = await world.connect(), await world.connect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        world.nursery.start_soon(send_in_pieces, client, FLOODS[flood], [])
        await settle()
        # MAX_BYTES, once exceeded by the last request; the buffers that payloads pin, or the
        # one that a payload is received into.
        assert peak() - before <= MAX_BYTES + MAXIMUM_PAYLOAD + OVERHEAD
        leaf.release()
        await settle()
        client.sock.close()
        await client.ended.wait()
        assert len((await other.ask(other.read(0, 512))).data) == 512
