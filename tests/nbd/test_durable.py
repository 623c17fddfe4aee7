"""Flushes, FUA and the write cache as a client sees them: what is answered when, by which way, and
what a failure looks like on the wire and in the log."""

import errno
import logging

import pytest
import trio

from memory_leaf import MemoryLeaf
from nbdserve.block.flush import FlushFailed
from nbdserve.block.node import MAX_INLINE
from nbdserve.block.run import Miss
from transmission import FLUSH, FUA, READ, TRIM, WRITE_ZEROES, serving, settle

SIZE = 4 << 20
EIO = 5

both_replies = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


@pytest.fixture
def leaf():
    """Can submit flushes and durable writes."""
    leaf = MemoryLeaf(SIZE)
    leaf.queues = leaf.fua = True
    return leaf


def names(leaf):
    return [name for name, _, _ in leaf.calls]


# --- flushes -----------------------------------------------------------------------------------


@both_replies
async def test_with_nothing_to_flush_the_answer_is_inline(leaf, structured):
    leaf.flushed = True
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        for _ in range(3):
            assert (await client.ask(client.request(FLUSH))).error == 0
        assert leaf.calls == []
        assert world.backend.statistics()["requests"]["flush_operations"] == 3


@both_replies
async def test_a_flush_that_is_a_sync_takes_no_task(leaf, structured):
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        await client.send(client.request(FLUSH) + client.read(0, 512))
        answer = await client.answer()  # the read overtakes it
        assert len(answer.data) == 512
        assert world.poller.busy == 0
        leaf.release()
        assert (await client.answer()).error == 0
        assert names(leaf)[-1] == "submit_flush"


async def test_another_flush_takes_one(leaf):
    leaf.queues = False
    async with serving(leaf) as world:
        client = await world.connect()
        assert (await client.ask(client.request(FLUSH))).error == 0
        assert leaf.calls == [("flush", 0, 0)]


async def test_a_client_that_goes_away_waits_for_its_flush(leaf):
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.request(FLUSH))
        await settle()
        client.sock.close()
        await settle()
        assert not client.ended.is_set()
        leaf.release()
        await client.ended.wait()


@both_replies
async def test_a_flush_that_fails_is_eio_and_later_ones_too(leaf, structured, caplog):
    caplog.set_level(logging.DEBUG)
    failure = FlushFailed(errno.EIO, "disk.img: a flush failed: bad sector")
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        leaf.fail_at(1, errno.EIO)
        assert (await client.ask(client.request(FLUSH))).error == EIO
        leaf.failed = failure
        caplog.clear()
        for _ in range(3):
            answer = await client.ask(client.request(FLUSH))
            assert answer.error == EIO
            if structured:
                assert answer.message == "disk.img: a flush failed: bad sector"
        assert (await client.ask(client.read(0, 1))).error == 0
    # The leaf has said so, once; what follows from it is not news.
    assert [record.levelname for record in caplog.records if "FLUSH" in record.message] == [
        "DEBUG"
    ] * 3


# --- FUA ---------------------------------------------------------------------------------------


@both_replies
@pytest.mark.parametrize("write_cache", [True, False])
async def test_a_durable_write_takes_no_task(leaf, structured, write_cache):
    leaf.hold()
    async with serving(leaf, write_cache=write_cache) as world:
        client = await world.connect(structured=structured)
        for length in (1, 4096, MAX_INLINE):
            data = bytes([length % 251 + 1]) * length
            await client.send(client.write(512, data, FUA if write_cache else 0))
            await settle()
            assert world.poller.busy == 0
            assert leaf.waiting == 1
            leaf.release(1)
            assert (await client.answer()).error == 0
            assert leaf.calls[-1] == ("submit_write+fua", 512, length)
            assert leaf.data[512:][:length] == data
        leaf.release()


@both_replies
@pytest.mark.parametrize("write_cache", [True, False])
async def test_with_o_direct_writes_of_all_kinds_take_no_task(leaf, structured, write_cache):
    leaf.would_block = True
    leaf.hold()
    async with serving(leaf, write_cache=write_cache, direct=True) as world:
        client = await world.connect(structured=structured)
        for flags in (0, FUA):
            for length in (512, 65536, MAX_INLINE):  # the hot loop's, and longer ones
                await client.send(client.write(0, bytes(length), flags))
                await settle()
                assert world.poller.busy == 0
                leaf.release(1)
                await client.answer()
                durable = flags or not write_cache
                assert names(leaf)[-1] == ("submit_write+fua" if durable else "submit_write")
        leaf.release()


async def test_one_without_fua_is_not_submitted(leaf):
    async with serving(leaf) as world:
        client = await world.connect()
        await client.ask(client.write(0, b"x"))
        assert names(leaf) == ["write"]


@pytest.mark.parametrize("reason", ["too long", "the node cannot", "no length"])
async def test_what_cannot_be_submitted_takes_a_task(leaf, reason):
    length = {"too long": MAX_INLINE + 1, "the node cannot": 512, "no length": 0}[reason]
    leaf.fua = reason != "the node cannot"
    async with serving(leaf) as world:
        client = await world.connect()
        assert (await client.ask(client.write(0, bytes(length), FUA))).error == 0
        assert names(leaf) == ["write", "flush"]


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
async def test_zeroes_and_trim_with_fua_are_flushed(leaf, command):
    async with serving(leaf) as world:
        client = await world.connect()
        await client.ask(client.request(command, 0, 4096, FUA))
        assert names(leaf)[-1] == "flush"


@both_replies
async def test_a_durable_write_that_fails(leaf, structured, caplog):
    leaf.fail_at(1, errno.EIO)
    async with serving(leaf) as world:
        client = await world.connect(structured=structured)
        assert (await client.ask(client.write(0, b"x", FUA))).error == EIO
        assert "WRITE of 1 bytes at 0: Input/output error" in caplog.text
        free = world.backend.buffers.statistics()
        assert (await client.ask(client.write(0, b"x", FUA))).error == 0
        assert world.backend.buffers.statistics() == free


async def test_a_durable_write_refused_at_once(leaf):
    """After a failed flush: the leaf raises from inside the submission."""

    def refuse(*_args, fua=False):
        raise FlushFailed(errno.EIO, "a flush failed")

    leaf.submit_write = refuse
    async with serving(leaf) as world:
        client = await world.connect()
        for _ in range(3):
            assert (await client.ask(client.write(0, b"x", FUA))).error == EIO
        assert (await client.ask(client.write(0, b"x"))).error == 0


async def test_writes_beyond_the_end_are_refused_before(leaf):
    async with serving(leaf) as world:
        client = await world.connect()
        assert (await client.ask(client.write(SIZE, b"x", FUA))).error == 28
        assert leaf.calls == []


# --- the write cache, changed while clients are there ------------------------------------------


async def test_connections_respect_the_write_cache_at_once(leaf):
    async with serving(leaf) as world:
        client = await world.connect()
        await client.ask(client.write(0, b"a"))
        await world.backend.set_write_cache(False)
        await client.ask(client.write(0, b"b"))
        await client.ask(client.write(0, b"c", FUA))
        await world.backend.set_write_cache(True)
        await client.ask(client.write(0, b"d"))
        assert names(leaf) == ["write", "flush", "submit_write+fua", "submit_write+fua", "write"]
        other = await world.connect()  # was told the same of the export as the first
        assert (await other.ask(other.request(FLUSH))).error == 0


async def test_a_write_in_flight_when_it_goes_off_is_durable_when_answered(leaf):
    leaf.would_block = True
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.write(0, b"a"))
        await settle()
        assert leaf.waiting == 1
        switched = trio.Event()

        async def switch():
            await world.backend.set_write_cache(False)
            switched.set()

        world.nursery.start_soon(switch)
        await settle()
        leaf.release(1)  # the write
        await settle()
        assert names(leaf) == ["write"]
        leaf.release()
        await client.answer()
        await switched.wait()
        assert names(leaf) == ["write", "flush", "flush"]


async def test_reads_are_what_they_were(leaf):
    async with serving(leaf, write_cache=False) as world:
        client = await world.connect()
        leaf.miss = Miss.NOT_CACHED
        assert (await client.ask(client.request(READ, 0, 512))).error == 0
