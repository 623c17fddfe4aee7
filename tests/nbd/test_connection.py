"""Requests and their replies: a real Connection, Poller and BlockBackend over a leaf in memory.

The client checks each reply against the protocol's rules (tests/transmission.py); the tests say
what must be in it. How a connection begins, ends and is held back: test_connection_life.py.
"""

from __future__ import annotations

import contextlib
import errno
import random

import pytest

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.block.node import MAX_INLINE
from nbdserve.block.run import Miss
from nbdserve.nbd.commands import HOLES_FROM
from transmission import (
    BLOCK_STATUS,
    CACHE,
    DATA_CHUNK,
    DF,
    FAST_ZERO,
    FLUSH,
    FUA,
    HOLE_CHUNK,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    serving,
    settle,
)

SIZE = 4 << 20
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95

both_replies = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


def filled(size=SIZE, **options):
    """A leaf whose every sector differs, without holes."""
    leaf = MemoryLeaf(size, **options)
    leaf.fill(0, b"".join(number.to_bytes(4) * 128 for number in range(1, size // 512 + 1)))
    return leaf


def sparse(size=SIZE, data=1, holes=1):
    """A leaf of so many blocks of data and so many of holes, in turn."""
    leaf = MemoryLeaf(size)
    for block in range(size // BLOCK):
        if block % (data + holes) < data:
            leaf.fill(block * BLOCK, (block + 1).to_bytes(4) * (BLOCK // 4))
    return leaf


def make_late(leaf, how):
    """Make requests take the way that `how` names."""
    if how == "queued":
        leaf.would_block = True
    elif how == "task":
        leaf.miss = Miss.OPAQUE


each_way = pytest.mark.parametrize("way", ["inline", "queued", "task"])


# Every command


@both_replies
@each_way
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (511, 2), (4096, 4096), (SIZE - 1, 1), (100, HOLES_FROM - 1), (100, HOLES_FROM),
     (512, MAX_INLINE), (512, MAX_INLINE + 1), (0, SIZE), (0, 0), (SIZE, 0)],
)  # fmt: skip
async def test_read(structured, way, offset, length):
    leaf = filled()
    make_late(leaf, way)
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        for flags in (0, FUA, *([DF] if structured else [])):
            answer = await client.ask(client.read(offset, length, flags))
            assert answer.error == 0
            assert answer.data == leaf.data[offset : offset + length]


@both_replies
@each_way
@pytest.mark.parametrize("length", [1, 4096, 1 << 16, MAX_INLINE, MAX_INLINE + 1, 2 << 20])
@pytest.mark.parametrize("flags", [0, FUA])
async def test_write(structured, way, length, flags):
    leaf = filled()
    make_late(leaf, way)
    data = random.Random(length).randbytes(length)
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        answer = await client.ask(client.write(513, data, flags))
        assert (answer.error, answer.chunks) == (0, [])
        assert leaf.data[513 : 513 + length] == data
        assert [call for call in leaf.calls if call[0] == "flush"] == [("flush", 0, 0)] * flags


@both_replies
@pytest.mark.parametrize(
    ("command", "flags", "calls"),
    [
        (FLUSH, 0, [("flush", 0, 0)]),
        (FLUSH, FUA, [("flush", 0, 0)]),
        (TRIM, 0, [("discard", 4096, 8192)]),
        (TRIM, FUA, [("discard", 4096, 8192), ("flush", 0, 0)]),
        (CACHE, 0, [("read", 4096, 8192)]),
        (WRITE_ZEROES, 0, [("zeroes+unmap", 4096, 8192)]),
        (WRITE_ZEROES, NO_HOLE, [("zeroes", 4096, 8192)]),
        (WRITE_ZEROES, FAST_ZERO, [("zeroes+unmap+fast", 4096, 8192)]),
        (WRITE_ZEROES, FAST_ZERO | NO_HOLE | FUA, [("zeroes+fast", 4096, 8192), ("flush", 0, 0)]),
    ],
)
async def test_commands_without_data(structured, command, flags, calls):
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        where = (0, 0) if command == FLUSH else (4096, 8192)
        answer = await client.ask(client.request(command, *where, flags))
        assert (answer.error, answer.chunks) == (0, [])
        assert leaf.calls == calls
        zeroed = command in (TRIM, WRITE_ZEROES)
        assert (leaf.data[4096:12288] == bytes(8192)) is zeroed


@both_replies
async def test_commands_of_no_length_succeed(structured):
    async with serving(filled()) as world:
        client = await world.connect(structured=structured)
        for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
            for offset in (0, SIZE):
                assert (await client.ask(client.request(command, offset, 0))).error == 0


@pytest.mark.parametrize("flags", [0, REQ_ONE])
async def test_block_status(flags):
    async with serving(sparse(data=2, holes=1)) as world:
        client = await world.connect()
        answer = await client.ask(client.request(BLOCK_STATUS, 512, 5 * BLOCK, flags))
        extents = [(2 * BLOCK - 512, 0), (BLOCK, 3), (2 * BLOCK, 0), (512, 3)]
        assert answer.extents == extents[: 1 if flags else None]


async def test_without_a_write_cache_every_write_is_durable_when_answered():
    leaf = filled()
    async with serving(leaf, write_cache=False) as world:
        client = await world.connect()
        await client.ask(client.write(0, b"x"))
        assert leaf.calls == [("write", 0, 1), ("flush", 0, 0)]


# Holes


@pytest.mark.parametrize(("data", "holes"), [(1, 1), (3, 1), (1, 7), (0, 1), (100, 100)])
@pytest.mark.parametrize("length", [HOLES_FROM, 1 << 17, MAX_INLINE, SIZE])
@pytest.mark.parametrize("flags", [0, DF])
@each_way
async def test_holes_in_a_long_read(data, holes, length, flags, way):
    leaf = sparse(data=data, holes=holes)
    async with serving(leaf) as world:
        make_late(leaf, way)
        client = await world.connect()
        for offset in (0, SIZE - length, *([100] if length < SIZE else [])):
            answer = await client.ask(client.read(offset, length, flags))
            assert answer.data == leaf.data[offset : offset + length]
            kinds = {chunk.kind for chunk in answer.chunks}
            if way == "task" or flags:
                assert kinds == {DATA_CHUNK}
            elif holes < length // BLOCK > data:
                assert HOLE_CHUNK in kinds


async def test_a_read_of_more_pieces_than_one_sendmsg_takes():
    """IOV_MAX is 1024 buffers; 4 MiB of clusters of 512 bytes would be 12,288."""
    leaf = sparse(8 << 20)
    async with serving(leaf) as world:
        client = await world.connect()
        answer = await client.ask(client.read(0, 8 << 20))
        assert len(answer.chunks) == (8 << 20) // BLOCK
        assert answer.data == leaf.data


async def test_short_reads_and_simple_replies_have_no_holes():
    leaf = sparse()
    async with serving(leaf) as world:
        client = await world.connect()
        answer = await client.ask(client.read(0, HOLES_FROM - 1))
        assert [chunk.kind for chunk in answer.chunks] == [DATA_CHUNK]
        client = await world.connect(structured=False)
        assert (await client.ask(client.read(0, SIZE))).data == leaf.data


# Refused, and failed


@both_replies
@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (READ, SIZE, 1, 0, EINVAL),
        (READ, SIZE - 1, 2, 0, EINVAL),
        (READ, (1 << 64) - 1, 1, 0, EINVAL),
        (READ, 0, 1, NO_HOLE, EINVAL),
        (READ, 0, 1, 1 << 15, EINVAL),
        (WRITE, SIZE - 1, 2, 0, ENOSPC),
        (WRITE, 0, 2, DF, EINVAL),
        (TRIM, SIZE, 1, 0, EINVAL),
        (CACHE, SIZE, 1, 0, EINVAL),
        (WRITE_ZEROES, SIZE, 1, 0, ENOSPC),
        (FLUSH, 0, 1, 0, EINVAL),
        (BLOCK_STATUS, 0, 0, 0, EINVAL),
        (BLOCK_STATUS, SIZE, 1, 0, EINVAL),
        (8, 0, 1, 0, EINVAL),
        (99, 0, 0, 0, EINVAL),
        (0xFFFF, 0, 0, 0xFFFF, EINVAL),
    ],
)
async def test_a_bad_request_is_refused_and_the_connection_goes_on(
    structured, command, offset, length, flags, error
):
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        payload = b"x" * length if command == WRITE else b""
        bad = client.request(command, offset, length, flags, payload)
        await client.send(client.read(0, 4) + bad + client.read(4, 4))
        first, refused, last = await client.answers(3)
        assert refused.error == error
        assert ("refused" in refused.message) is structured
        assert first.data + last.data == leaf.data[:8]
        assert [call[0] for call in leaf.calls] == ["read", "read"]


async def test_a_read_only_export():
    leaf = filled(read_only=True)
    before = bytes(leaf.data)
    async with serving(leaf) as world:
        client = await world.connect()
        for command in (WRITE, TRIM, WRITE_ZEROES):
            payload = b"x" * (command == WRITE)
            answer = await client.ask(client.request(command, 0, 1, 0, payload))
            assert answer.error == EPERM
        assert (await client.ask(client.read(0, 512))).data == before[:512]
        assert (await client.ask(client.request(FLUSH))).error == 0
    assert leaf.data == before


async def test_a_read_that_is_too_long():
    leaf = MemoryLeaf(65 << 20)
    async with serving(leaf) as world:
        for structured, error in ((True, EOVERFLOW), (False, EINVAL)):
            client = await world.connect(structured=structured)
            assert (await client.ask(client.read(0, (64 << 20) + 1))).error == error
        client = await world.connect()
        answer = await client.ask(client.read(0, 64 << 20))
        assert [chunk.kind for chunk in answer.chunks] == [HOLE_CHUNK]


async def test_block_status_without_a_context_is_refused():
    async with serving(filled()) as world:
        client = await world.connect(contexts=False)
        assert (await client.ask(client.request(BLOCK_STATUS, 0, 512))).error == EINVAL


@both_replies
@each_way
@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, EIO), (errno.ENOSPC, ENOSPC), (errno.EROFS, EPERM), (errno.EBADMSG, EIO)],
)
async def test_a_failed_request_is_answered_and_the_connection_goes_on(
    structured, way, number, error, caplog
):
    leaf = filled()
    make_late(leaf, way)
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        for request in (client.read(0, 4096), client.write(0, b"x" * 4096), client.read(0, SIZE)):
            leaf.fail_at(1, number)
            answer = await client.ask(request)
            assert answer.error == error
            assert answer.message == (errno_text(number) if structured else "")
            assert (await client.ask(client.read(512, 512))).data == leaf.data[512:1024]
    assert f"WRITE of 4096 bytes at 0: {errno_text(number)}" in caplog.text


def errno_text(number):
    return {
        errno.EIO: "Input/output error",
        errno.ENOSPC: "No space left on device",
        errno.EROFS: "Read-only file system",
        errno.EBADMSG: "Bad message",
    }[number]


@pytest.mark.parametrize("command", [FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
async def test_a_failed_command_is_answered(command):
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        where = (0, 0) if command == FLUSH else (0, 4096)
        leaf.fail_at(1, errno.ENOSPC)
        assert (await client.ask(client.request(command, *where))).error == ENOSPC
        assert (await client.ask(client.read(512, 4))).data == leaf.data[512:516]


async def test_a_read_that_fails_in_the_middle_is_one_error():
    """The pieces read before are not sent."""
    leaf = sparse()
    async with serving(leaf) as world:
        client = await world.connect()
        for length in (1 << 16, SIZE):
            leaf.fail_at(5, errno.EIO)
            answer = await client.ask(client.read(0, length))
            assert (answer.error, answer.data) == (EIO, b"")
            assert len(answer.chunks) == 1


async def test_fast_zero_that_would_not_be_fast():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        leaf.fail_at(1, errno.EOPNOTSUPP)
        answer = await client.ask(client.request(WRITE_ZEROES, 0, 512, FAST_ZERO))
        assert answer.error == ENOTSUP


# Batches


async def test_reads_of_a_batch_that_wait_for_the_disk_are_handed_over_together():
    """The engine's plug is closed when the first is submitted, and opened once, after the last."""
    leaf = filled()
    leaf.would_block = True
    async with serving(leaf) as world:
        order = []

        @contextlib.contextmanager
        def plug():
            order.append("plugged")
            yield
            order.append("unplugged")

        def submit(*args, submit_read=leaf.submit_read):
            order.append("read")
            submit_read(*args)

        world.backend.plug = plug
        leaf.submit_read = submit
        client = await world.connect()
        await client.send(b"".join(client.read(512 * number, 512) for number in range(3)))
        answers = await client.answers(3)
    assert sorted(answer.data for answer in answers) == [
        leaf.data[512 * number : 512 * number + 512] for number in range(3)
    ]
    assert order == ["plugged", *3 * ["read"], "unplugged"]


# Bugs


@each_way
async def test_a_bug_in_the_block_stack(way, caplog):
    """On the way of all batches it costs the client its connection, in a task only the request."""

    class Buggy(MemoryLeaf):
        def _count(self, name, offset, length):
            if offset == 512:
                raise RuntimeError("a bug")
            super()._count(name, offset, length)

    leaf = Buggy(SIZE)
    leaf.fill(0, b"x" * 4096)
    leaf.would_block = way == "task"
    async with serving(leaf) as world:
        bad, good = await world.connect(), await world.connect()
        if way == "task":
            answer = await bad.ask(bad.write(512, b"y"))
            assert (answer.error, answer.message) == (EIO, "internal error: RuntimeError('a bug')")
            assert (await bad.ask(bad.read(0, 1))).data == b"x"
        else:
            await bad.send(bad.read(512, 1))
            await bad.end()
        assert (await good.ask(good.read(0, 1))).data == b"x"
    assert "RuntimeError: a bug" in caplog.text


@pytest.mark.parametrize(
    ("error", "number"),
    [(OSError(errno.ENOMEM, "no thread"), 12), (RuntimeError("no thread"), EIO)],
)
async def test_an_engine_that_takes_no_more(error, number):
    leaf = filled()
    leaf.would_block = True

    def refuse(offset, buffer, done):
        raise error

    leaf.submit_read = refuse
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.read(0, 512) + client.write(0, b"x"))
        failed, written = sorted(await client.answers(2))
        assert (failed.error, written.error) == (number, 0)
        assert "no thread" in failed.message
        assert world.poller.busy == 0
        assert world.backend._epochs._active == {}


# Batches


@both_replies
async def test_a_thousand_requests_in_one_send(structured):
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        expected, requests = {}, []
        for number in range(1000):
            offset = number * 512
            request = client.write(offset, number.to_bytes(2)) if number % 3 else client.read(
                offset, 512
            )
            expected[int.from_bytes(request[8:16])] = b"" if number % 3 else bytes(
                leaf.data[offset : offset + 512]
            )
            requests.append(request)
        world.nursery.start_soon(client.send, b"".join(requests))
        answers = await client.answers(1000)
        assert {answer.cookie: answer.data for answer in answers} == expected
        assert [answer.cookie for answer in answers] == list(expected)  # inline ones stay in order
        assert leaf.data[512:514] == b"\0\x01"


@each_way
async def test_byte_by_byte(way):
    leaf = filled()
    make_late(leaf, way)
    async with serving(leaf) as world:
        client = await world.connect()
        for byte in client.write(512, b"abc") + client.read(512, 4):
            await client.send(bytes([byte]))
            await settle()
        write, read = await client.answers(2)
        assert (write.error, read.data) == (0, b"abc\x02")


async def test_the_same_cookie_twice():
    """A client that reuses cookies only confuses itself."""
    async with serving(filled()) as world:
        client = await world.connect()
        request = client.read(0, 512)
        await client.send(request * 2)
        first = await client.answer()
        client.read(0, 512)
        client.sent[first.cookie] = client.sent.popitem()[1]
        assert await client.answer() == first


async def test_late_replies_come_as_they_are_ready():
    leaf = filled()
    leaf.would_block = True
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect()
        requests = [client.read(number * 512, 512) for number in range(5)]
        cookies = [int.from_bytes(request[8:16]) for request in requests]
        await client.send(b"".join(requests))
        await settle()
        assert leaf.waiting == 5
        for _ in range(5):
            leaf.release(1, newest_first=True)
        answers = await client.answers(5)
        assert [answer.cookie for answer in answers] == cookies[::-1]
        assert {answer.cookie: answer.data for answer in answers} == {
            cookie: leaf.data[number * 512 : number * 512 + 512]
            for number, cookie in enumerate(cookies)
        }


async def test_what_can_be_answered_does_not_wait_for_what_cannot():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        leaf.hold()
        flush = client.request(FLUSH)
        await client.ask(client.write(0, b"x"))
        await client.send(flush)
        assert (await client.ask(client.read(0, 1))).data == b"x"
        leaf.release()
        assert (await client.answer()).cookie == int.from_bytes(flush[8:16])


@pytest.mark.parametrize("length", [100, (64 << 10) - 1, 64 << 10, 300_000, 3 << 20])
async def test_payloads_that_wait_stay_intact_while_others_arrive(length):
    leaf = filled(16 << 20)
    async with serving(leaf) as world:
        client = await world.connect()
        leaf.would_block = True
        leaf.hold()
        count = min(20, (12 << 20) // length)
        datas = [random.Random(number).randbytes(length) for number in range(count)]
        for number, data in enumerate(datas):
            await client.send(client.write(number * length, data))
            await settle()
        assert leaf.waiting == count
        leaf.would_block = False
        for _ in range(30):
            await client.ask(client.write(15 << 20, bytes(100_000)))
        leaf.release()
        assert {answer.error for answer in await client.answers(count)} == {0}
        assert leaf.data[: count * length] == b"".join(datas)
