"""Our own reader of the format sees in an image what `qemu-img check` sees."""

import pytest
import trio

from crash.plans import Image, Plan
from crash.promises import assert_qemu_says_sound
from crash.record import record
from crash.scratch import scratch
from nbdserve.powercut.writelog import WriteLog
from qcow2_model import (
    COPIED,
    OFFSET,
    Layout,
    MemoryFile,
    Request,
    assert_sound,
    audit,
    new_image,
    open_memory,
    pattern,
)

CLUSTER = 512


def empty():
    with scratch() as folder:
        return new_image(folder, 64 * 1024, cluster_size=CLUSTER)


def damages():
    """(name, an image that was damaged by hand in one way)."""
    file = MemoryFile(empty())

    async def fill():
        async with open_memory(file) as (backend, _):
            await backend.write(0, pattern(1, 4096))

    trio.run(fill)
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    first = layout.words(l2, 1)[0] & OFFSET
    block = layout.words(layout.table_offset, 1)[0]

    def put(offset, value, width=8):
        image = bytearray(file.content)
        image[offset : offset + width] = value.to_bytes(width, "big")
        return bytes(image)

    yield "sound", bytes(file.content)
    yield "refcount of data is zero", put(block + first // CLUSTER * 2, 0, 2)
    yield "refcount of an L2 table is zero", put(block + l2 // CLUSTER * 2, 0, 2)
    yield "two owners", put(l2 + 8, first | COPIED)
    yield "data on a table", put(l2 + 8, l2 | COPIED)
    yield "unaligned data", put(l2, (first + 0x200 * 3 + 0x10) | COPIED)
    yield "not copied", put(l2, first)
    yield "data past the end", put(l2, (len(file.content) + 4096) | COPIED)
    yield "no refcount block", put(layout.table_offset, 0)
    yield "L2 table past the end", put(layout.l1_offset, (1 << 30) | COPIED)


@pytest.mark.peer("qemu-img")
def test_our_eyes_see_what_qemu_sees(tmp_path):
    path = tmp_path / "image"
    for name, image in damages():
        path.write_bytes(image)
        options = f"driver=qcow2,file.filename={path}"
        if audit(image).wrong:
            with pytest.raises(AssertionError):
                assert_qemu_says_sound(options)
        else:
            assert name == "sound"
            assert_qemu_says_sound(options)


@pytest.mark.parametrize("order", ["L1 entry first", "refcounts never"])
def test_our_eyes_see_a_wrong_order(order):
    content = empty()
    plan = Plan("order", Image(64 * 1024), ((Request("write", 0, 4096, 1),), (Request("flush"),)))
    history = record(plan, [content])
    layout = Layout(content)
    block = layout.words(layout.table_offset, 1)[0]
    first = order == "L1 entry first"
    log = WriteLog([content])
    log.records = [
        entry for entry in history.log.records
        if (entry.offset == layout.l1_offset if first else entry.offset != block)
    ]
    with pytest.raises(AssertionError):
        assert_sound(bytes(log.replay()[0]), leaks_allowed=True)
