"""The order of metadata on its way to the disk: the table of rules, and write-backs that fail."""

import errno

import pytest

from nbdserve.formats.qcow2.ordering import STAGE, WRITE_ORDER, What
from qcow2_model import (
    TINY,
    Layout,
    MemoryFile,
    assert_sound,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
)

K = 1024


@pytest.mark.parametrize("rule", WRITE_ORDER, ids=lambda it: f"{it.first.name}-{it.then.name}")
def test_each_rule_is_kept_by_a_flush_between_its_stages(rule):
    assert STAGE[rule.first] < STAGE[rule.then]


def test_everything_has_a_stage():
    assert set(STAGE) == set(What)


@pytest.fixture
def empty(tmp_path):
    return new_image(tmp_path, 200 * K, cluster_size=512, refcount_bits=64)


def stages(log):
    """The writes of a log, cut at its flushes."""
    found = [[]]
    for offset, data, *_ in log:
        if data is None:
            found.append([])
        else:
            found[-1].append(offset // 512)
    return found


async def test_the_stages_of_a_first_write(empty):
    file = MemoryFile(empty)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
        await backend.flush()
        layout = Layout(file.content)
        l2 = layout.l1[0] & ((1 << 63) - 1)
        data = layout.words(l2, 1)[0] & ((1 << 63) - 1)
        block = layout.words(layout.table_offset, 1)[0]
        assert stages(file.log) == [
            # The table's place is cleared when it is taken, so that the file has room for it.
            [data // 512, l2 // 512, block // 512, l2 // 512],
            [layout.l1_offset // 512],
            [],
        ]


async def test_the_stages_of_an_overwrite_in_place(empty):
    file = MemoryFile(empty)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
        await backend.flush()
        file.forget()
        await backend.write(0, pattern(2, 512))
        await backend.flush()
        assert len(stages(file.log)) == 2
        await backend.flush()
        assert len(stages(file.log)) == 2  # nothing was written: nothing is flushed


async def test_without_flushes_the_order_of_writes_is_the_same(empty):
    """cache=unsafe: all of it is still handed over, in order."""
    file = MemoryFile(empty)
    file.no_flush = True
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
        await backend.discard(0, 512)
        await backend.write(0, pattern(2, 512))
    assert len(stages(file.log)) == 1
    assert_sound(file.content)
    assert guest_bytes(file.content)[:512] == pattern(2, 512)


async def test_what_changes_during_a_write_back_waits_for_the_next(empty):
    file = MemoryFile(empty)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))

        def meddle(kind, offset):
            if kind == "flush" and not meddled:
                meddled.append(True)
                assert backend.write_nowait(512, pattern(2, 512)) is None

        meddled = []
        file.fail = meddle
        await backend.flush()
        file.fail = None
        assert meddled
        assert [guest for guest, _ in Layout(file.content).l2_entries()] == [0]
        await backend.flush()
        assert [guest for guest, _ in Layout(file.content).l2_entries()] == [0, 1]
    assert_sound(file.content)


class Planned(OSError):
    """A failure that the test asked for."""


async def workload(backend):
    """Everything that dirties anything; 64-bit refcounts of 64 clusters to a block."""
    await backend.write(0, pattern(1, 50 * K))
    await backend.discard(2 * K, 20 * K)
    await backend.write(100 * K, pattern(2, 30 * K))
    await backend.write_zeroes(110 * K, 10 * K, may_unmap=True)
    return bytes(
        pattern(1, 50 * K)[: 2 * K]
        + bytes(20 * K)
        + pattern(1, 50 * K)[22 * K :]
        + bytes(50 * K)
        + pattern(2, 30 * K)[: 10 * K]
        + bytes(10 * K)
        + pattern(2, 30 * K)[20 * K :]
        + bytes(70 * K)
    )


@pytest.mark.parametrize("kind", ["write", "flush", "discard"])
@pytest.mark.parametrize("sizes", [None, TINY])
async def test_a_flush_that_fails_anywhere_can_be_tried_again(empty, kind, sizes):
    """Each write and each flush of the write-back fails in turn, the image is cut off there or
    flushed again; nothing is wrong or lost."""
    number = 0
    while True:
        file = MemoryFile(empty)
        failed = []
        async with open_memory(file, cache_sizes=sizes) as (backend, _):
            wanted = await workload(backend)
            count = 0

            def fail(what, _offset):
                nonlocal count
                if what == kind:
                    count += 1
                    if count == number + 1:  # noqa: B023 - called within this round only
                        failed.append(what)  # noqa: B023
                        raise Planned(errno.ENOSPC, "not this one")

            file.fail = fail
            if kind == "discard":
                await backend.flush()
            else:
                for _ in range(5):
                    try:
                        await backend.flush()
                    except OSError:
                        assert failed
                        assert_sound(file.content, leaks_allowed=True)
                        file.generation._error = None  # unlike a real file's, it may be retried
            file.fail = None
        assert_sound(file.content)
        assert guest_bytes(file.content) == wanted
        if not failed:
            break
        number += 1
    assert number >= 3


@pytest.mark.parametrize("sizes", [None, TINY])
async def test_requests_that_fail_anywhere_leave_nothing_behind(empty, sizes):
    """Each request to the file fails in turn, while requests run and not while flushing."""
    number = 0
    while True:
        file = MemoryFile(empty)
        failed = []
        async with open_memory(file, cache_sizes=sizes) as (backend, _):
            count = 0

            def fail(what, _offset):
                nonlocal count
                count += 1
                if count == number + 1:  # noqa: B023 - called within this round only
                    failed.append(what)  # noqa: B023
                    raise Planned(errno.ENOSPC, "not this one")

            file.fail = fail
            for start in range(0, 60 * K, 7 * K):
                data = pattern(start, 5000)
                for _ in range(2):
                    try:
                        if backend.write_nowait(start, data) is not None:
                            await backend.write(start, data)
                        break
                    except OSError:
                        assert failed
                        file.generation._error = None
            file.fail = None
        assert_sound(file.content)
        disk = guest_bytes(file.content)
        for start in range(0, 60 * K, 7 * K):
            assert disk[start : start + 5000] == pattern(start, 5000)
        if not failed:
            break
        number += 1
    assert number >= 9


async def test_a_stopped_image_is_written_to_no_more_but_for_the_corrupt_bit(empty):
    file = MemoryFile(empty)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
    layout = Layout(file.content)
    l2 = layout.l1[0] & ((1 << 63) - 1)
    file.content[l2 + 8 : l2 + 16] = (l2 | 1 << 63).to_bytes(8, "big")  # data mapped onto its table
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(2, 512))
        await backend.write(4096, pattern(3, 512))  # leaves tables dirty
        file.forget()
        with pytest.raises(OSError, match="guest data is mapped onto metadata"):
            await backend.write(512, b"x")
        for attempt in (
            backend.write(0, b"x"),
            backend.write(8192, b"x"),
            backend.discard(0, 4096),
            backend.write_zeroes(0, 512, may_unmap=False),
            backend.flush(),
        ):
            with pytest.raises(OSError, match=r"stopped: .* mapped onto metadata") as caught:
                await attempt
            assert caught.value.errno == errno.EIO
        assert backend.write_nowait(0, b"x") is not None
        assert backend.write_nowait(8192, b"x") is not None
        data = bytearray(512)
        await backend.read(0, memoryview(data))
        assert data == pattern(2, 512)
    assert [entry[:2] for entry in file.log if entry.data] == [(72, bytes(7) + b"\2")]


async def test_version_2_has_no_corrupt_bit(tmp_path):
    file = MemoryFile(new_image(tmp_path, 200 * K, cluster_size=512, version=2))
    layout = Layout(file.content)
    file.content[layout.l1_offset : layout.l1_offset + 8] = (1 << 63 | 0x200).to_bytes(8, "big")
    file.content += bytes(4096)
    file.size = len(file.content)
    block = layout.words(layout.table_offset, 1)[0]
    file.content[layout.l1_offset : layout.l1_offset + 8] = bytes(8)
    file.content[block + layout.l1_offset // 512 * 2 + 1] = 0
    async with open_memory(file) as (backend, node):
        with pytest.raises(OSError, match="refcount of the metadata"):
            await backend.write(0, b"x" * 5000)
        assert node.image.broken is not None
    assert not file.log
