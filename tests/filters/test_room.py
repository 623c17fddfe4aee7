"""A full disk: what writes take, what discards give back, and who waits for whom."""

import errno

import pytest
import trio
import trio.testing

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.block.node import Extent
from nbdserve.filters.fault import FaultNode
from nbdserve.filters.room import NoRoomError
from qcow2_model import MemoryFile

SIZE = 64 * BLOCK


def full(room, size=SIZE):
    leaf = MemoryLeaf(size)
    return FaultNode(leaf, room=room), leaf


async def refuses(node, call):
    with pytest.raises(OSError, match="No space left on device") as caught:
        await call
    assert caught.value.errno == errno.ENOSPC
    assert node.faults.room >= 0


async def test_new_space_is_used_up_and_overwriting_goes_on():
    node, leaf = full(2 * BLOCK)
    await node.write(0, b"a" * BLOCK)
    assert node.faults.room == BLOCK
    await node.write(0, b"b" * BLOCK)
    await node.write(100, b"c" * 200)
    assert node.faults.room == BLOCK
    await refuses(node, node.write(2 * BLOCK, b"d" * 2 * BLOCK))
    await node.write(2 * BLOCK, b"e")  # takes a whole block
    assert node.faults.room == 0
    await node.write(2 * BLOCK, b"f" * BLOCK)
    await refuses(node, node.write(3 * BLOCK - 1, b"gg"))
    await node.write(0, b"h" * BLOCK)
    assert leaf.data == b"h" * BLOCK + bytes(BLOCK) + b"f" * BLOCK + bytes(61 * BLOCK)


async def test_no_room_from_the_start():
    node, leaf = full(0)
    leaf.fill(BLOCK, b"x" * BLOCK)
    for call in (node.write(0, b"a"), node.write_fua(0, b"a"), node.writev(0, [b"a", b"b"]),
                 node.write_zeroes(0, BLOCK, may_unmap=False)):  # fmt: skip
        await refuses(node, call)
    await node.write_zeroes(0, BLOCK, may_unmap=True)
    await node.write(BLOCK, b"y" * BLOCK)
    await node.read(0, memoryview(bytearray(SIZE)))
    await node.flush()


@pytest.mark.parametrize("how", ["discard", "zeroes"])
async def test_room_is_given_back(how):
    node, _ = full(2 * BLOCK)
    await node.write(0, b"a" * 2 * BLOCK)
    if how == "discard":
        await node.discard(10, 2 * BLOCK - 10)  # one whole block
    else:
        await node.write_zeroes(10, 2 * BLOCK - 10, may_unmap=True)
    assert node.faults.room == BLOCK
    await node.write(10 * BLOCK, b"b" * BLOCK)
    await refuses(node, node.write(11 * BLOCK, b"c"))


async def test_zeroes_that_stay_take_room_as_data_does():
    node, _ = full(BLOCK)
    await node.write_zeroes(0, BLOCK, may_unmap=False)
    assert node.faults.room == 0
    await refuses(node, node.write_zeroes(BLOCK, BLOCK, may_unmap=False))
    await node.write_zeroes(0, BLOCK, may_unmap=False)


async def test_a_write_that_fails_gives_back_what_it_did_not_use():
    node, leaf = full(2 * BLOCK)
    leaf.fail_at(2, errno.EIO)  # after one look at what is there
    with pytest.raises(OSError, match="Input/output"):
        await node.write(0, b"a" * BLOCK)
    assert node.faults.room == 2 * BLOCK


async def test_a_write_that_is_cancelled_gives_back_what_it_did_not_use():
    node, leaf = full(2 * BLOCK)
    write = leaf.write

    async def stuck(offset, data):
        await trio.sleep_forever()

    leaf.write = stuck
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 0, b"a" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        assert node.faults.room == BLOCK
        nursery.cancel_scope.cancel()
    assert node.faults.room == 2 * BLOCK
    leaf.write = write
    await node.write(0, b"a" * 2 * BLOCK)


async def test_two_writes_at_once_do_not_share_the_last_room():
    node, leaf = full(BLOCK)
    leaf.hold()
    errors = []

    async def write(offset):
        try:
            await node.write(offset, b"a" * BLOCK)
        except NoRoomError as error:
            errors.append((error.needed, error.left))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(write, number * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        leaf.release()
    assert errors == [(BLOCK, 0)] * 3


async def test_two_writes_to_the_same_space_pay_once():
    node, leaf = full(3 * BLOCK)
    leaf.hold()
    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(node.write, number * BLOCK, b"a" * 2 * BLOCK)
            nursery.start_soon(node.write, number * 100, b"a" * 200)
        await trio.testing.wait_all_tasks_blocked()
        leaf.release()
    assert node.faults.room == 0


async def test_what_another_layer_holds_is_new_space_here():
    node, leaf = full(BLOCK)
    leaf.fill(0, b"x" * SIZE)

    async def of_backing(offset, length):
        return [Extent(length, data=True, zero=False, allocated=False)]

    leaf.block_status = of_backing
    await refuses(node, node.write(0, b"a" * 2 * BLOCK))


async def test_a_disk_that_ends_within_a_block_and_a_file_that_grows():
    leaf = MemoryLeaf(BLOCK + 512)
    node = FaultNode(leaf, room=512)
    await node.write(BLOCK + 511, b"a")
    assert node.faults.room == 0
    file = MemoryFile(b"x" * BLOCK)
    node = FaultNode(file, room=BLOCK)
    await node.write(0, b"y" * BLOCK)
    await node.write(BLOCK, b"z" * BLOCK)
    await refuses(node, node.write(2 * BLOCK, b"z"))
    assert file.content == b"y" * BLOCK + b"z" * BLOCK


async def test_room_can_be_made_and_taken_while_it_is_open():
    node, _ = full(0)
    await refuses(node, node.write(0, b"a"))
    node.faults.room = BLOCK
    await node.write(0, b"a")
    node.faults.room = None
    await node.write(BLOCK, b"a" * 10 * BLOCK)
    node.faults.room = 0
    await refuses(node, node.write(20 * BLOCK, b"a"))
    await node.discard(BLOCK, 3 * BLOCK)
    assert node.statistics()["room"] == 3 * BLOCK
