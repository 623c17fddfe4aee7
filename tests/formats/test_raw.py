"""The raw format: the window, and the first sector of an image that was only guessed to be raw."""

import contextlib
import errno

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeLeaf, FakeNode
from memory_leaf import MemoryLeaf
from nbdserve.block.node import Extent
from nbdserve.block.run import READ, WRITE, WRITE_FUA, Miss
from nbdserve.formats.probe import PROBE_SIZE, looks_like_format
from nbdserve.formats.raw import RawNode

SIZE = 1 << 16
WINDOW = 1000


# --- the window ------------------------------------------------------------------------------


async def test_a_window_with_an_end_is_not_left():
    leaf = MemoryLeaf(512)
    await leaf.write(0, b"0123456789")
    node = RawNode(leaf, offset=2, size=4)
    assert node.size == 4
    data = memoryview(bytearray(4))
    await node.read(0, data)
    assert bytes(data) == b"2345"
    await node.write(2, b"xy")
    await node.write_zeroes(0, 1, may_unmap=False)
    before = bytes(leaf.data)
    assert before.startswith(b"01\x003xy6789")
    for number, request in (
        (errno.EINVAL, node.read(1, data)),
        (errno.ENOSPC, node.write(3, b"12")),
        (errno.ENOSPC, node.write_fua(3, b"12")),
        (errno.ENOSPC, node.writev(3, [b"1", b"2"])),
        (errno.ENOSPC, node.write_zeroes(0, 5, may_unmap=True)),
        (errno.EINVAL, node.discard(4, 1)),
    ):
        with pytest.raises(OSError, match=r"memory: . is beyond 4 bytes") as caught:
            await request
        assert caught.value.errno == number
    # Of a write in pieces the first ones may have been done.
    assert bytes(leaf.data) == b"01\x003x16789" + bytes(502)
    for op in (READ, WRITE):
        assert node.resolve(op, 3, 2) is Miss.OPAQUE
        assert node.resolve(op, 3, 1) == [(leaf, 5, 1)]


def test_the_window_ends_where_the_child_ends():
    file = FakeLeaf(SIZE)
    node = RawNode(file, offset=WINDOW)
    assert node.size == SIZE - WINDOW
    assert node.children == {"file": file}
    assert (node.filename, node.read_only, node.no_flush) == ("fake", False, False)
    assert RawNode(FakeLeaf(SIZE, no_flush=True)).no_flush


@pytest.mark.parametrize("offset", [0, WINDOW])
def test_a_range_resolves_to_the_childs_leaves(offset):
    file = FakeLeaf(SIZE)
    node = RawNode(file, offset=offset)
    assert node.resolve(READ, 7, 9) == [(file, 7 + offset, 9)]
    assert node.resolve(WRITE, 0, 512) == [(file, offset, 512)]


def test_a_childs_miss_is_the_answer():
    assert RawNode(FakeNode()).resolve(READ, 0, 1) is Miss.OPAQUE


def test_allocating_and_cluster_size_are_the_childs():
    class Allocating(FakeNode):
        cluster_size = 4096

        def allocate_nowait(self, offset, data):
            self._record("allocate_nowait", offset, data)
            return True

    file = Allocating()
    node = RawNode(file, offset=WINDOW)
    assert node.cluster_size == 4096
    assert node.allocate_nowait(24, b"x") is True
    assert file.calls == [("allocate_nowait", 24 + WINDOW, b"x")]


@pytest.mark.parametrize("offset", [0, WINDOW])
async def test_requests_are_passed_on_moved(offset):
    file = FakeLeaf(SIZE)
    node = RawNode(file, offset=offset)
    await node.write(5, b"hello")
    assert file.bytes[offset + 5 : offset + 10] == b"hello"
    data = memoryview(bytearray(7))
    await node.read(4, data)
    assert data == b"\0hello\0"
    await node.write_zeroes(5, 2, may_unmap=True, fallback=False)
    await node.discard(20, 30)
    assert await node.block_status(0, 10) == [Extent(10, data=True, zero=False)]
    assert file.calls == [
        ("write", 5 + offset, 5),
        ("read", 4 + offset, 7),
        ("write_zeroes", 5 + offset, 2, True, False),
        ("discard", 20 + offset, 30),
        ("block_status", offset, 10),
    ]


async def test_a_flush_reaches_the_file():
    file = FakeLeaf(SIZE)
    await RawNode(file).flush()
    assert file.names() == ["flush_to_os", "flush_to_disk"]


# --- the guarded first sector ----------------------------------------------------------------

QCOW2 = b"QFI\xfb\0\0\0\x03"


def guarded(content=b""):
    file = FakeLeaf(SIZE)
    file.bytes[: len(content)] = content
    return RawNode(file, guarded=True), file


def test_writes_to_the_first_sector_must_be_seen():
    node, file = guarded()
    assert node.resolve(WRITE, PROBE_SIZE - 1, 1) is Miss.OPAQUE
    assert node.resolve(WRITE, 0, SIZE) is Miss.OPAQUE
    assert node.resolve(WRITE, PROBE_SIZE, 1) == [(file, PROBE_SIZE, 1)]
    assert node.resolve(READ, 0, 512) == [(file, 0, 512)]


@pytest.mark.parametrize(
    ("content", "offset", "data"),
    [
        (b"", 0, QCOW2 + bytes(504)),
        (b"", 0, QCOW2),
        (b"", 0, QCOW2 + bytes(4096)),  # longer than the sector
        (b"QFI", 3, b"\xfb"),
        (b"\0FI\xfb", 0, b"Q"),
        (b"", 64, b"\x7f\x10\xda\xbe"),  # a signature that is not at the start
        (b"conectix"[:4], 4, memoryview(b"ctix")),
        (b"conectix"[:4], 4, bytearray(b"ctix")),
    ],
)
async def test_a_write_that_would_make_another_format_is_refused(content, offset, data):
    node, file = guarded(content)
    before = bytes(file.bytes)
    with pytest.raises(OSError, match=r"fake: .* look like") as caught:
        await node.write(offset, data)
    assert caught.value.errno == errno.EPERM
    assert file.bytes == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "offset", "data"),
    [
        (b"", 0, b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa"),  # a boot sector
        (b"QFI\xfb", 0, b"X"),  # away from a signature, however it came there
        (b"", 1, QCOW2),  # elsewhere it is none
        (b"", PROBE_SIZE, QCOW2),
        (b"", 500, bytes(100)),
        (b"", 0, b""),
    ],
)
async def test_other_writes_pass(content, offset, data):
    node, file = guarded(content)
    await node.write(offset, data)
    assert file.bytes[offset : offset + len(data)] == data


async def test_an_image_whose_format_was_named_is_not_guarded():
    file = FakeLeaf(SIZE)
    await RawNode(file).write(0, QCOW2)
    assert file.names() == ["write"]


async def test_an_image_of_less_than_a_sector():
    file = FakeLeaf(100)
    node = RawNode(file, guarded=True)
    await node.write(90, b"x" * 10)
    with pytest.raises(OSError, match="qcow2"):
        await node.write(0, QCOW2)


async def test_zeroes_can_complete_a_signature():
    """QED's ends in a zero byte. QEMU pads such a request to a sector and checks that."""
    node, file = guarded(b"QEDx")
    with pytest.raises(OSError, match="look like qed"):
        await node.write_zeroes(3, 1, may_unmap=False)
    assert file.bytes[:4] == b"QEDx"
    await node.write_zeroes(0, SIZE, may_unmap=True, fallback=False)
    assert file.calls[-1] == ("write_zeroes", 0, SIZE, True, False)
    await node.write_zeroes(PROBE_SIZE, 10, may_unmap=False)
    assert file.calls[-1] == ("write_zeroes", PROBE_SIZE, 10, False, True)


@pytest.mark.parametrize(
    ("offset", "length", "passed"),
    [
        (3, 1, None),
        (0, 511, None),
        (1, 511, None),
        (1, 1000, (512, 489)),
        (0, 512, (0, 512)),
        (0, SIZE, (0, SIZE)),
        (512, 5, (512, 5)),
    ],
)
async def test_so_can_a_discard_and_of_the_first_sector_no_part_is_passed_on(
    offset, length, passed
):
    node, file = guarded(b"QEDx")
    await node.discard(offset, length)
    assert file.calls == ([("discard", *passed)] if passed else [])


async def test_two_writes_at_once_do_not_make_up_a_signature():
    """Each alone is harmless; together they are a qcow2 header."""
    node, file = guarded()
    file.gates["write"] = trio.Event()
    refused = []

    async def write(offset, data):
        try:
            await node.write(offset, data)
        except OSError:
            refused.append(data)

    async with trio.open_nursery() as nursery:
        for offset, data in [(0, b"QF"), (2, b"I\xfb")]:
            nursery.start_soon(write, offset, data)
            await trio.testing.wait_all_tasks_blocked()
        file.gates["write"].set()
    assert looks_like_format(bytes(file.bytes[:512])) is None
    assert refused == [b"I\xfb"]


async def test_a_write_and_zeroes_at_once_do_not_either():
    node, file = guarded(b"\0\0\0x")
    file.gates["write"] = file.gates["write_zeroes"] = trio.Event()

    async def zeroes():
        with pytest.raises(OSError, match="qed"):
            await node.write_zeroes(3, 1, may_unmap=False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 0, b"QED")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(zeroes)
        await trio.testing.wait_all_tasks_blocked()
        file.gates["write"].set()
    assert file.bytes[:4] == b"QEDx"


# Bytes that signatures are made of, in places where they would be.
PIECES = st.sampled_from(
    [b"Q", b"QF", b"FI", b"I\xfb", b"\xfb", b"ED", b"D\0", b"\0", b"\0\0\0\x01", b"KDMV", b"DMV",
     b"COW", b"D", b"vhdx", b"file", b"LUKS", b"\xba\xbe\0\x01", b"\x7f\x10", b"\xda\xbe"]
)  # fmt: skip
OFFSETS = st.sampled_from([0, 1, 2, 3, 4, 6, 62, 64, 66])


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["write", "zeroes", "discard"]), OFFSETS, PIECES)))
def test_no_sequence_of_requests_makes_another_format(requests):
    node, file = guarded()

    async def discard(offset, length):
        file.bytes[offset : offset + length] = bytes(length)

    file.discard = discard

    async def main():
        for kind, offset, piece in requests:
            with contextlib.suppress(PermissionError):
                if kind == "write":
                    await node.write(offset, piece)
                elif kind == "zeroes":
                    await node.write_zeroes(offset, len(piece), may_unmap=True)
                else:
                    await node.discard(offset, len(piece))
            assert looks_like_format(bytes(file.bytes[:PROBE_SIZE])) is None

    trio.run(main)


# --- FUA and flushes -------------------------------------------------------------------------


class Durable(FakeLeaf):
    fua = True

    async def write_fua(self, offset, data):
        await self._do("write_fua", offset, len(data))
        return True


async def test_fua_is_passed_on():
    file = Durable(SIZE)
    node = RawNode(file, offset=WINDOW)
    assert await node.write_fua(7, b"abc") is True
    assert file.calls == [("write_fua", 7 + WINDOW, 3)]
    assert node.resolve(WRITE_FUA, 7, 3) == [(file, 7 + WINDOW, 3)]


async def test_a_child_that_cannot_says_so():
    file = FakeLeaf(SIZE)
    node = RawNode(file, offset=WINDOW)
    assert await node.write_fua(7, b"abc") is False
    assert file.calls == [("write", 7 + WINDOW, 3)]
    assert node.resolve(WRITE_FUA, 7, 3) is Miss.NEEDS_FLUSH


async def test_the_first_sector_is_guarded_from_durable_writes_too():
    file = Durable(SIZE)
    node = RawNode(file, guarded=True)
    assert node.resolve(WRITE_FUA, 0, 512) is Miss.OPAQUE
    assert node.resolve(WRITE_FUA, PROBE_SIZE, 512) == [(file, PROBE_SIZE, 512)]
    with pytest.raises(PermissionError, match="look like qcow2"):
        await node.write_fua(0, b"QFI\xfb" + bytes(508))
    assert "write_fua" not in file.names()
    assert await node.write_fua(0, b"harmless") is True
    assert await node.write_fua(PROBE_SIZE, b"QFI\xfb") is True
