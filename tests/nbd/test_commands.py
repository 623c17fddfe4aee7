"""Each command against a backend that writes down what it was asked, and its reply whole."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from nbdserve.block.node import Extent
from nbdserve.nbd import proto
from nbdserve.nbd.commands import CACHE_STEP, HANDLERS, HOLES_FROM, hole_chunk, read_reply_head
from nbdserve.nbd.proto import (
    Command,
    CommandFlag,
    ReplyFlag,
    ReplyType,
)
from nbdserve.nbd.validate import COMMANDS

COOKIE = 0x0102030405060708
KIB = 1024


class RecordingBackend:
    """Reads as a pattern that tells the offset; `pieces` is its map, `error` what it raises."""

    def __init__(self, pieces=None, error=None):
        self.calls = []
        self.pieces = pieces
        self.error = error

    def map_nowait(self, offset, length):
        self.calls.append(("map", offset, length))
        return self.pieces

    async def read(self, offset, buffer):
        buffer[:] = pattern(offset, len(buffer))
        self._called("read", offset, len(buffer))

    async def write(self, offset, data, *, fua=False):
        self._called("write", offset, bytes(data), fua)

    async def flush(self):
        self._called("flush")

    async def discard(self, offset, length, *, fua=False):
        self._called("discard", offset, length, fua)

    async def write_zeroes(self, offset, length, *, may_unmap, fast=False, fua=False):
        self._called("zeroes", offset, length, may_unmap, fast, fua)

    async def block_status(self, offset, length, *, one=False):
        self._called("status", offset, length, one)
        return [Extent(4096, data=True, zero=False), Extent(length, data=False, zero=True)]

    def _called(self, *call):
        self.calls.append(call)
        if self.error:
            raise self.error


def pattern(offset, length):
    return bytes(position // 512 % 251 for position in range(offset, offset + length))


async def run(
    backend, command, *, flags=0, offset=0, length=0, payload=None, structured=True, contexts=1
):
    session = SimpleNamespace(
        export=SimpleNamespace(backend=backend),
        structured_replies=structured,
        contexts=tuple((7 + number, f"c{number}") for number in range(contexts)),
    )
    reply = await HANDLERS[command](session, int(flags), COOKIE, offset, length, payload)
    return b"".join(bytes(buffer) for buffer in reply)


def simple(data=b""):
    return proto.SIMPLE_REPLY.build({"error": 0, "cookie": COOKIE}) + data


def data_chunk(offset, data, *, last):
    flags = ReplyFlag.DONE if last else 0
    fields = {"flags": flags, "type": ReplyType.OFFSET_DATA, "cookie": COOKIE, "offset": offset}
    return proto.OFFSET_DATA_CHUNK.build(fields | {"length": 8 + len(data)}) + data


def hole(offset, length, *, last):
    return proto.OFFSET_HOLE_CHUNK.build(
        {
            "flags": ReplyFlag.DONE if last else 0,
            "type": ReplyType.OFFSET_HOLE,
            "cookie": COOKIE,
            "length": 12,
            "offset": offset,
            "hole_size": length,
        }
    )


def test_there_is_a_handler_for_every_command_that_has_an_answer():
    assert set(HANDLERS) == set(COMMANDS)


@pytest.mark.parametrize("last", [False, True])
def test_heads_equal_their_declarations(last):
    head = read_reply_head(COOKIE, 1 << 40, 512, structured=True, last=last)
    assert head + bytes(512) == data_chunk(1 << 40, bytes(512), last=last)
    assert read_reply_head(COOKIE, 1 << 40, 512, structured=False, last=last) == simple()
    assert hole_chunk(COOKIE, 1 << 40, 1 << 31, last=last) == hole(1 << 40, 1 << 31, last=last)


# READ


@pytest.mark.parametrize("length", [1, 512, HOLES_FROM, 3 << 20])
async def test_read_simple(length):
    backend = RecordingBackend(pieces=[(True, length)])
    reply = await run(backend, Command.READ, offset=4096, length=length, structured=False)
    assert reply == simple(pattern(4096, length))
    assert backend.calls == [("read", 4096, length)]


async def test_read_structured_with_holes():
    pieces = [(False, 4 * KIB), (True, 60 * KIB), (False, 512), (True, 512)]
    backend = RecordingBackend(pieces)
    reply = await run(backend, Command.READ, offset=KIB, length=65 * KIB)
    assert reply == (
        data_chunk(KIB, pattern(KIB, 4 * KIB), last=False)
        + hole(5 * KIB, 60 * KIB, last=False)
        + data_chunk(65 * KIB, pattern(65 * KIB, 512), last=False)
        + hole(65 * KIB + 512, 512, last=True)
    )
    assert backend.calls == [
        ("map", KIB, 65 * KIB),
        ("read", KIB, 4 * KIB),
        ("read", 65 * KIB, 512),
    ]


async def test_read_structured_of_zeroes_reads_nothing():
    backend = RecordingBackend([(True, 1 << 20)])
    reply = await run(backend, Command.READ, length=1 << 20)
    assert reply == hole(0, 1 << 20, last=True)
    assert backend.calls == [("map", 0, 1 << 20)]


@pytest.mark.parametrize(
    ("flags", "length", "pieces"),
    [
        (CommandFlag.DF, HOLES_FROM, [(True, HOLES_FROM)]),
        (CommandFlag.DF | CommandFlag.FUA, HOLES_FROM, [(True, HOLES_FROM)]),
        (0, HOLES_FROM - 1, [(True, HOLES_FROM - 1)]),
        (0, HOLES_FROM, None),
        (0, HOLES_FROM, [(False, HOLES_FROM)]),
        (CommandFlag.FUA, 1, None),
    ],
    ids=["DF", "DF and FUA", "short", "cannot tell", "data only", "FUA"],
)
async def test_read_structured_in_one_chunk(flags, length, pieces):
    backend = RecordingBackend(pieces)
    reply = await run(backend, Command.READ, flags=flags, offset=512, length=length)
    assert reply == data_chunk(512, pattern(512, length), last=True)


@pytest.mark.parametrize("flags", [0, CommandFlag.DF])
async def test_read_of_nothing(flags):
    backend = RecordingBackend()
    none = {"flags": ReplyFlag.DONE, "type": ReplyType.NONE, "cookie": COOKIE, "length": 0}
    assert await run(backend, Command.READ, flags=flags) == proto.CHUNK.build(none)
    assert await run(backend, Command.READ, flags=flags, structured=False) == simple()
    assert backend.calls == []


# What has no data to return. Also with structured replies these get a simple one.


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("fua", [0, CommandFlag.FUA])
async def test_write(structured, fua):
    backend = RecordingBackend()
    what = {"flags": fua, "offset": 5, "length": 9, "payload": memoryview(b"some data")}
    assert await run(backend, Command.WRITE, structured=structured, **what) == simple()
    assert backend.calls == [("write", 5, b"some data", bool(fua))]


@pytest.mark.parametrize("fua", [0, CommandFlag.FUA])
async def test_flush(fua):
    backend = RecordingBackend()
    assert await run(backend, Command.FLUSH, flags=fua) == simple()
    assert backend.calls == [("flush",)]


@pytest.mark.parametrize("fua", [0, CommandFlag.FUA])
async def test_trim(fua):
    backend = RecordingBackend()
    reply = await run(backend, Command.TRIM, flags=fua, offset=512, length=0xFFFFFFFF)
    assert reply == simple()
    assert backend.calls == [("discard", 512, 0xFFFFFFFF, bool(fua))]


@pytest.mark.parametrize("fua", [0, CommandFlag.FUA])
@pytest.mark.parametrize("no_hole", [0, CommandFlag.NO_HOLE])
@pytest.mark.parametrize("fast", [0, CommandFlag.FAST_ZERO])
async def test_write_zeroes(fua, no_hole, fast):
    backend = RecordingBackend()
    reply = await run(
        backend, Command.WRITE_ZEROES, flags=fua | no_hole | fast, offset=512, length=1 << 31
    )
    assert reply == simple()
    assert backend.calls == [("zeroes", 512, 1 << 31, not no_hole, bool(fast), bool(fua))]


@pytest.mark.parametrize("length", [0, 1, CACHE_STEP, CACHE_STEP + 1, 3 * CACHE_STEP])
async def test_cache_reads_all_of_it_step_by_step(length):
    backend = RecordingBackend()
    assert await run(backend, Command.CACHE, offset=100, length=length) == simple()
    position = 100
    for name, offset, step in backend.calls:
        assert (name, offset) == ("read", position)
        assert 0 < step <= CACHE_STEP
        position += step
    assert position == 100 + length


# BLOCK_STATUS


@pytest.mark.parametrize("one", [0, CommandFlag.REQ_ONE])
@pytest.mark.parametrize("contexts", [1, 2, 3])
async def test_block_status(one, contexts):
    backend = RecordingBackend()
    reply = await run(
        backend, Command.BLOCK_STATUS, flags=one, offset=512, length=8192, contexts=contexts
    )
    expected = b""
    for number in range(contexts):
        expected += proto.BLOCK_STATUS_CHUNK.build(
            {
                "flags": ReplyFlag.DONE if number == contexts - 1 else 0,
                "type": ReplyType.BLOCK_STATUS,
                "cookie": COOKIE,
                "length": 20,
                "context_id": 7 + number,
                "extents": [{"length": 4096, "status": 0}, {"length": 8192, "status": 3}],
            }
        )
    assert reply == expected
    assert backend.calls == [("status", 512, 8192, bool(one))]


@pytest.mark.parametrize("command", HANDLERS)
async def test_errors_are_not_handled_here(command):
    backend = RecordingBackend(error=OSError(errno.ENOSPC, "full"))
    with pytest.raises(OSError, match="full"):
        await run(backend, command, length=4096, payload=b"x" * 4096)


