"""What is counted of the requests of real connections: every one once, whichever way it went."""

from __future__ import annotations

import errno
import random
from collections import Counter

import pytest

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.block.run import Miss
from nbdserve.nbd import batch
from transmission import (
    BLOCK_STATUS,
    CACHE,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    serving,
    settle,
)

SIZE = 1 << 20
KIND = {READ: "rd", WRITE: "wr", FLUSH: "flush", TRIM: "unmap", CACHE: "prefetch",
        WRITE_ZEROES: "zero", BLOCK_STATUS: "status"}  # fmt: skip


def counted(source):
    """The counters that are not zero, without times."""
    found = source.statistics()
    return {
        key: value
        for key, value in found.get("requests", found).items()
        if ("_operations" in key or "_bytes" in key) and value and not isinstance(value, dict)
    }


def latencies(source, kind):
    """How many durations are in the histogram."""
    found = source.statistics()
    return sum(found.get("requests", found)[f"{kind}_latency_histogram"].bins)


def filled():
    leaf = MemoryLeaf(SIZE)
    leaf.fill(0, b"".join(number.to_bytes(4) * 128 for number in range(1, SIZE // 512 + 1)))
    return leaf


@pytest.fixture(params=["inline", "late", "opaque"])
async def world(request):
    leaf = filled()
    leaf.would_block = request.param == "late"
    leaf.miss = Miss.OPAQUE if request.param == "opaque" else None
    async with serving(leaf) as world:
        yield world


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
async def test_a_mixture_is_counted_to_the_byte(world, structured):
    """Batches of reads, writes and all else, with lengths that differ, in one go."""
    rng = random.Random(7)
    client = await world.connect(structured=structured)
    kinds = [READ] * 10 + [WRITE] * 10 + [FLUSH, TRIM, CACHE, WRITE_ZEROES]
    kinds += [BLOCK_STATUS] * structured
    expected, messages = Counter(), []
    for _ in range(120):
        kind = rng.choice(kinds)
        length = 0 if kind == FLUSH else rng.randrange(1, 20_000)
        offset = 0 if kind == FLUSH else rng.randrange(SIZE - length)
        expected[f"{KIND[kind]}_operations"] += 1
        if kind != FLUSH:
            expected[f"{KIND[kind]}_bytes"] += length
        flags = FUA if kind == WRITE and rng.random() < 0.3 else 0
        payload = bytes(length) if kind == WRITE else b""
        messages.append(client.request(kind, offset, length, flags, payload))
    for first in range(0, len(messages), 8):  # fewer bytes than the sockets take
        batch = messages[first : first + 8]
        await client.send(b"".join(batch))
        assert not any(answer.error for answer in await client.answers(len(batch)))
    assert counted(client.connection) == expected
    assert counted(world.backend) == expected
    for kind in set(KIND.values()):
        assert latencies(client.connection, kind) == expected[f"{kind}_operations"]


async def test_replies_that_fill_more_than_one_send(world):
    client = await world.connect()
    length = 30_000
    number = 3 * batch.SEND_AT // length
    await client.send(b"".join(client.read(n * 100, length) for n in range(number)))
    await client.answers(number)
    assert counted(client.connection) == {
        "rd_operations": number, "rd_bytes": number * length,
    }  # fmt: skip


async def test_a_long_read_with_holes_is_one_operation_of_its_length():
    leaf = MemoryLeaf(SIZE)
    leaf.fill(4 * BLOCK, b"x" * BLOCK)
    async with serving(leaf) as world:
        client = await world.connect()
        short = client.read(0, 100)
        await client.send(short + client.read(0, 20 * BLOCK) + client.read(1, 1000))
        answers = await client.answers(3)
        assert len(answers[1].chunks) == 3
        assert counted(client.connection) == {
            "rd_operations": 3, "rd_bytes": 1100 + 20 * BLOCK,
        }  # fmt: skip
        assert latencies(client.connection, "rd") == 3


@pytest.mark.parametrize("would_block", [False, True])
async def test_failures_count_as_such_and_move_no_bytes(would_block):
    leaf = filled()
    leaf.would_block = would_block
    async with serving(leaf) as world:
        client = await world.connect()
        for number in (1, 2):
            leaf.fail_at(number, errno.EIO)
        requests = [client.read(0, 512), client.write(0, b"x" * 512), client.read(512, 512)]
        errors = [(await client.ask(request)).error for request in requests]
        assert errors == [errno.EIO, errno.EIO, 0]
        assert counted(client.connection) == {
            "failed_rd_operations": 1, "failed_wr_operations": 1,
            "rd_operations": 1, "rd_bytes": 512,
        }  # fmt: skip
        assert latencies(client.connection, "rd") == 2
        assert latencies(client.connection, "wr") == 1


async def test_a_long_read_that_fails_in_its_midst_is_one_failure():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        leaf.fail_at(2, errno.EIO)
        await client.send(client.read(0, 512) + client.read(0, 64 << 10))
        answers = await client.answers(2)
        assert [bool(answer.error) for answer in answers] == [False, True]
        assert counted(client.connection) == {
            "failed_rd_operations": 1, "rd_operations": 1, "rd_bytes": 512,
        }  # fmt: skip


async def test_what_is_refused_is_invalid_and_took_no_time(world):
    client = await world.connect()
    for message in (
        client.read(SIZE - 1, 2),
        client.write(SIZE, b"xy"),
        client.request(TRIM, SIZE, 1),
        client.request(77),
    ):
        assert (await client.ask(message)).error
    assert counted(client.connection) == {
        "invalid_rd_operations": 1, "invalid_wr_operations": 1, "invalid_unmap_operations": 1,
        "invalid_unknown_operations": 1,
    }  # fmt: skip
    assert latencies(client.connection, "rd") == 0


async def test_each_connection_has_its_own_and_the_drive_the_sum(world):
    one, other = await world.connect(), await world.connect(structured=False)
    await one.ask(one.read(0, 700))
    for _ in range(2):
        await other.ask(other.write(0, b"x" * 300))
    assert counted(one.connection) == {"rd_operations": 1, "rd_bytes": 700}
    assert counted(other.connection) == {"wr_operations": 2, "wr_bytes": 600}
    both = counted(one.connection) | counted(other.connection)
    assert counted(world.backend) == both
    other.sock.close()
    await other.ended.wait()
    assert counted(world.backend) == both
    left = world.backend.statistics()["left"]
    assert (left["connections"], left["wr_bytes"], left["rd_bytes"]) == (1, 600, 0)


async def test_what_is_done_when_the_client_was_cut_off_counts():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        leaf.hold()
        await client.send(client.write(0, b"x" * 4096, FUA))
        await settle()
        assert client.connection.statistics()["in_flight"] == 1
        client.scope.cancel()
        await client.ended.wait()
        assert counted(world.backend) == {}
        leaf.release()
        await settle()
        assert counted(world.backend) == {"wr_operations": 1, "wr_bytes": 4096}


async def test_what_was_done_counts_though_nobody_takes_the_reply(monkeypatch):
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()

        def send(_buffer):
            raise BrokenPipeError(errno.EPIPE, "gone")

        monkeypatch.setattr(client.connection._outbox, "send", send)
        await client.send(client.write(0, b"x" * 100) + client.read(0, 50))
        await client.ended.wait()
        assert counted(world.backend) == {
            "wr_operations": 1, "wr_bytes": 100, "rd_operations": 1, "rd_bytes": 50,
        }  # fmt: skip


async def test_before_transmission_there_is_nothing_to_tell(world):
    client = world.dial()
    assert client.connection.statistics() == {}
    assert world.backend.statistics()["left"]["connections"] == 0


async def test_latency_is_the_time_to_the_answer(monkeypatch):
    """By a clock that stands still but while the leaf works: 3 ms for each write."""
    now = [0]
    monkeypatch.setattr(batch, "perf_counter_ns", lambda: now[0])
    leaf = filled()
    store = leaf._store

    def slow(offset, data):
        now[0] += 3_000_000
        store(offset, data)

    leaf._store = slow
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.write(0, b"x") + client.write(1, b"y") + client.read(0, 4))
        await client.answers(3)
        found = client.connection.statistics()
    # One batch: all three were answered after 6 ms.
    assert (found["wr_total_time_ns"], found["rd_total_time_ns"]) == (12_000_000, 6_000_000)
    assert found["wr_latency_histogram"].bins[13] == 2  # 4.096 to 8.192 ms
