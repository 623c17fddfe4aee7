"""A request that shall have no reply: its client is dropped at once, and nobody else notices."""

import errno

import pytest
import trio
import trio.testing

from memory_leaf import MemoryLeaf
from nbdserve.errors import DisconnectError
from nbdserve.faults import Fault
from nbdserve.filters.fault import FaultNode
from transmission import FLUSH, TRIM, serving, settle

SIZE = 1 << 20

MESSAGES = {
    "read": lambda client: client.read(0, 512),
    "long read": lambda client: client.read(0, 64 << 10),
    "write": lambda client: client.write(0, b"x" * 512),
    "trim": lambda client: client.request(TRIM, 0, 4096),
    "flush": lambda client: client.request(FLUSH),
}


@pytest.fixture
async def faulty():
    """(world, node)."""
    leaf = MemoryLeaf(SIZE)
    leaf.fill(0, b"d" * SIZE)
    node = FaultNode(leaf)
    async with serving(node) as world:
        world.backend.on_wait = world.poller.waits
        yield world, node


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("kind", MESSAGES)
async def test_the_client_sees_the_end_and_no_reply(faulty, kind, structured):
    world, node = faulty
    client = await world.connect(structured=structured)
    other = await world.connect()
    await client.ask(MESSAGES[kind](client))
    node.faults.add(Fault(disconnect=True, count=1))
    await client.send(MESSAGES[kind](client))
    with trio.fail_after(5):
        await client.end()
    assert not (await other.ask(MESSAGES[kind](other))).error
    await settle()
    assert world.poller.busy == 0
    assert world.budget.statistics()["held"] == 0


async def test_it_does_not_wait_for_other_requests_of_the_client(faulty):
    """The socket ends now, and what is stuck goes on until it is let go."""
    world, node = faulty
    client = await world.connect()
    other = await world.connect()
    node.faults.add(Fault(ops="write", stuck=True))
    node.faults.add(Fault(ops="flush", disconnect=True))
    await client.send(client.write(0, b"x" * 512))
    await node.faults.wait_stuck()
    await client.send(client.request(FLUSH))
    with trio.fail_after(5):
        assert await client.sock.recv(1) == b""
    assert not client.ended.is_set()
    assert (await other.ask(other.read(0, 512))).data == b"d" * 512
    node.faults.release()
    with trio.fail_after(5):
        await client.ended.wait()
    assert (await other.ask(other.read(0, 512))).data == b"x" * 512


async def test_a_client_that_goes_while_its_request_is_stuck(faulty):
    world, node = faulty
    client, other = await world.connect(), await world.connect()
    rule = node.faults.add(Fault(ops="write", stuck=True))
    await client.send(client.write(0, b"x" * 512))
    await node.faults.wait_stuck()
    client.sock.close()
    await settle()
    assert node.faults.stuck == 1
    assert (await other.ask(other.read(0, 512))).data == b"d" * 512
    node.faults.remove(rule)
    with trio.fail_after(5):
        await client.ended.wait()
    assert (await other.ask(other.read(0, 512))).data == b"x" * 512


async def test_what_is_stuck_keeps_no_other_request_waiting_and_the_poller_asleep(faulty):
    world, node = faulty
    client = await world.connect()
    node.faults.add(Fault(ops="write", stuck=True, count=20))
    for number in range(20):
        await client.send(client.write(number * 512, b"x" * 512))
    await node.faults.wait_stuck(20)
    assert world.poller.busy == 0
    assert (await client.ask(client.read(100_000, 512))).data == b"d" * 512
    assert not (await client.ask(client.write(100_000, b"y"))).error
    world.backend.drain_begin()
    assert {answer.error for answer in await client.answers(20)} == {0}
    assert world.poller.busy == 0


async def test_requests_reach_the_nodes_in_the_order_in_which_they_were_sent(faulty):
    """Else no fault could be told by its number. Trio begins tasks in any order."""
    world, node = faulty
    client = await world.connect()
    for _ in range(8):
        node.faults.clear()
        node.faults.add(Fault(error="EIO", after=5, count=1))
        node.faults.add(Fault(error="ENOSPC", after=12))
        messages = [MESSAGES[kind](client) for kind in ("read", "write", "trim", "flush") * 4]
        cookies = [int.from_bytes(message[8:16], "big") for message in messages]
        await client.send(b"".join(messages))
        errors = {answer.cookie: answer.error for answer in await client.answers(16)}
        assert [errors[cookie] for cookie in cookies] == [0] * 5 + [5] + [0] * 6 + [28] * 4


async def test_errors_go_to_the_client_with_their_reason(faulty):
    world, node = faulty
    client = await world.connect()
    node.faults.add(Fault(error="EROFS"))
    answer = await client.ask(client.read(0, 512))
    assert (answer.error, answer.message) == (1, "Read-only file system (a fault)")


def test_who_does_not_know_it_takes_it_for_a_lost_connection():
    error = DisconnectError()
    assert isinstance(error, OSError)
    assert isinstance(error, ConnectionError)
    assert error.errno == errno.ECONNABORTED
