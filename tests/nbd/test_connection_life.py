"""How a connection begins, is held back by its limits, and ends.

What is counted here is requests that reached the leaf and calls of handlers, never time.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest
import trio

from memory_leaf import MemoryLeaf
from nbdserve.nbd.intake import BATCH
from nbdserve.nbd.late import MAX_BYTES, MAX_IN_FLIGHT
from nbdserve.nbd.negotiate import HANDSHAKE_TIMEOUT
from nbdserve.nbd.poller import EAGERLY
from transmission import (
    DISC,
    FLUSH,
    READ,
    WRITE,
    WRITE_ZEROES,
    hello,
    option,
    request,
    serving,
    settle,
)

SIZE = 1 << 20
MIB = 1 << 20
LIST, ABORT = 3, 2


def filled(size=SIZE):
    leaf = MemoryLeaf(size)
    leaf.fill(0, b"".join(number.to_bytes(4) * 128 for number in range(1, size // 512 + 1)))
    return leaf


def stuck(size=SIZE):
    """Nothing is answered before `release()`."""
    leaf = filled(size)
    leaf.would_block = True
    leaf.hold()
    return leaf


def nb_descriptors():
    return len(os.listdir("/proc/self/fd"))


def count_events(world, client):
    """Let the poller count how often it calls this client's handler."""
    calls = []
    fd = client.connection._sock.fileno()
    handler = world.poller._handlers[fd]

    def counting():
        calls.append(1)
        return handler()

    world.poller._handlers[fd] = counting
    return calls


# The handshake


async def test_requests_behind_the_last_option():
    leaf = filled()
    async with serving(leaf) as world:
        glued = request(WRITE, 1, 512, 3, 0, b"abc") + request(READ, 2, 512, 3)
        client = await world.connect(structured=False, glued=glued)
        assert await client.exactly(35) == (
            struct.pack(">IIQ", 0x67446698, 0, 1) + struct.pack(">IIQ", 0x67446698, 0, 2) + b"abc"
        )
        assert client.connection.negotiated


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 1000])
async def test_more_than_a_batch_of_requests_behind_the_last_option(count):
    """More than is executed at once, and no event will come for the rest of it."""
    async with serving(filled()) as world:
        glued = b"".join(request(READ, number, 0, 4) for number in range(count))
        client = await world.connect(structured=False, glued=glued)
        replies = await client.exactly(count * 20)
        assert replies[-12:-4] == (count - 1).to_bytes(8)


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 60_000])
async def test_an_incomplete_request_behind_the_last_option(cut):
    leaf = filled()
    async with serving(leaf) as world:
        message = request(WRITE, 1, 0, 100_000, 0, b"x" * 100_000)
        client = await world.connect(structured=False, glued=message[:cut])
        await settle()
        assert leaf.calls == []
        await client.send(message[cut:])
        assert (await client.exactly(16))[:8] == struct.pack(">II", 0x67446698, 0)
        assert leaf.data[:100_000] == b"x" * 100_000


@pytest.mark.parametrize("glued", [request(DISC, 1, 0, 0), b"garbage" * 10])
async def test_the_end_behind_the_last_option(glued):
    async with serving(filled()) as world:
        client = await world.connect(glued=glued)
        await client.end()


async def test_requests_that_wait_behind_the_last_option():
    leaf = stuck()
    async with serving(leaf) as world:
        glued = b"".join(request(READ, number, 0, 4) for number in range(3))
        client = await world.connect(structured=False, glued=glued)
        await settle()
        assert leaf.waiting == 3
        leaf.release()
        await client.exactly(60)


@pytest.mark.parametrize("said", [b"", hello(structured=True, contexts=True)[:-3]])
async def test_a_handshake_that_takes_too_long(said, autojump_clock, caplog):
    caplog.set_level("INFO")
    async with serving(filled()) as world:
        client = world.dial()
        await client.send(said)
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(HANDSHAKE_TIMEOUT)
        assert not client.connection.negotiated
    assert "not finished after 10 s" in caplog.text


async def test_dripping_does_not_prolong_the_handshake(autojump_clock):
    async with serving(filled()) as world:
        client = world.dial()
        for byte in hello(structured=True, contexts=True):
            if client.ended.is_set():
                break
            await client.send(bytes([byte]))
            await trio.sleep(1)
        assert client.ended.is_set()
        assert trio.current_time() <= HANDSHAKE_TIMEOUT + 1


async def test_a_client_that_asks_and_does_not_listen(autojump_clock):
    async with serving(filled()) as world:
        client = world.dial(send_buffer=4096)
        await client.send(b"\0\0\0\3" + option(LIST) * 127)
        await client.ended.wait()
        assert trio.current_time() == pytest.approx(HANDSHAKE_TIMEOUT)


async def test_a_handshake_longer_than_the_send_buffer():
    async with serving(filled()) as world:
        client = world.dial(send_buffer=4096)
        await client.send(b"\0\0\0\3" + option(LIST) * 100)
        await client.exactly(18)
        for _ in range(100):
            for kind in (2, 1):
                number, got, length = struct.unpack(">8xIII", await client.exactly(20))
                assert (number, got) == (LIST, kind)
                await client.exactly(length)


@pytest.mark.parametrize(
    "said",
    [b"\0\0\0\3" + option(ABORT), b"\xff" * 4, b"\0\0\0\3" + b"no option at all"],
    ids=["abort", "flags", "magic"],
)
async def test_a_handshake_that_comes_to_nothing(said):
    async with serving(filled()) as world:
        client = world.dial()
        await client.send(said)
        await client.ended.wait()
        assert not client.connection.negotiated


async def test_a_client_that_leaves_during_the_handshake():
    async with serving(filled()) as world:
        for said in (b"", b"\0\0", hello(structured=True, contexts=True)[:-3]):
            polite, rude = world.dial(), world.dial()
            for client in (polite, rude):
                await client.send(said)
            await polite.exactly(18)
            polite.sock.shutdown(socket.SHUT_WR)
            rude.sock.close()
            await polite.ended.wait()
            await rude.ended.wait()


# Limits


@pytest.mark.parametrize("step", [1, 5])
async def test_no_more_than_max_in_flight_wait(step):
    leaf = stuck()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(b"".join(client.read(n * 512, 512) for n in range(4 * MAX_IN_FLIGHT)))
        await settle()
        assert leaf.waiting == MAX_IN_FLIGHT
        assert world.poller.busy == 0  # reads that were queued are no tasks
        for _ in range(10):
            leaf.release(step)
            await client.answers(step)
            await settle()
            assert leaf.waiting == MAX_IN_FLIGHT
        leaf.release()
        for answer in await client.answers(4 * MAX_IN_FLIGHT - 10 * step):
            assert len(answer.data) == 512
        assert world.poller.busy == 0
        assert len((await client.ask(client.read(0, 512))).data) == 512


@pytest.mark.parametrize("write_share", [0, 2, 1], ids=["reads", "both", "writes"])
async def test_no_more_than_max_bytes_wait(write_share):
    """One request may go over, so that any request is served."""
    leaf = stuck(8 * MIB)
    async with serving(leaf) as world:
        client = await world.connect()
        requests = [
            client.write(0, bytes(8 * MIB)) if write_share and not number % write_share
            else client.read(0, 8 * MIB)
            for number in range(20)
        ]
        world.nursery.start_soon(client.send, b"".join(requests))
        await settle()
        limit = MAX_BYTES // (8 * MIB)
        assert leaf.waiting == limit
        leaf.release(2)
        await client.answers(2)
        await settle()
        assert leaf.waiting == limit
        leaf.release()
        assert {answer.error for answer in await client.answers(18)} == {0}


async def test_commands_without_data_are_no_bytes():
    leaf = stuck(8 * MIB)
    async with serving(leaf) as world:
        client = await world.connect()
        zeroes = [client.request(WRITE_ZEROES, 0, 8 * MIB) for _ in range(50)]
        await client.send(b"".join(zeroes))
        await settle()
        assert leaf.waiting == 50
        leaf.release()
        await client.answers(50)


@pytest.mark.parametrize("late", [False, True])
async def test_from_a_client_that_does_not_read_nothing_more_is_received(late):
    leaf = filled()
    leaf.would_block = late
    async with serving(leaf) as world:
        client = await world.connect()
        requests = b"".join(client.read(0, SIZE) for _ in range(300))
        world.nursery.start_soon(client.send, requests)
        await settle()
        assert len(leaf.calls) <= (MAX_BYTES // SIZE if late else 4)
        held_back = len(leaf.calls)
        await settle()
        assert len(leaf.calls) == held_back
        for answer in await client.answers(300):
            assert answer.data == leaf.data


@pytest.mark.parametrize("at_once", [1 << 10, 1 << 16])
@pytest.mark.parametrize("way", ["inline", "queued", "task"])
async def test_replies_that_are_sent_in_part(at_once, way):
    """The stream stays whole whatever the socket takes of it: heads, data, holes, errors."""
    leaf = filled()
    leaf.holes.update(range(0, SIZE // 4096, 5))
    leaf.data = bytearray(
        b"".join(
            bytes(4096) if block in leaf.holes else leaf.data[block * 4096 : block * 4096 + 4096]
            for block in range(SIZE // 4096)
        )
    )
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=2048)
        client.at_once = at_once
        leaf.would_block = way == "queued"
        expected, requests = {}, []
        for number in range(200):
            offset, length = number * 512, (1, 512, 5000, 40_000, 0, 200_000)[number % 6]
            if number % 7 == 6:
                message, data = client.read(SIZE, 1), b""
            elif number % 11 == 10 or way == "task":
                message, data = client.read(offset, length, 1), leaf.data[offset : offset + length]
            else:
                message, data = client.read(offset, length), leaf.data[offset : offset + length]
            expected[int.from_bytes(message[8:16])] = data
            requests.append(message)
        world.nursery.start_soon(client.send, b"".join(requests))
        answers = await client.answers(200)
        assert {answer.cookie: answer.data for answer in answers} == expected


# Leaving


async def test_a_client_that_leaves():
    before = nb_descriptors()
    async with serving(filled()) as world:
        for _ in range(5):
            client = await world.connect()
            await client.ask(client.read(0, 1))
            client.sock.close()
            await client.ended.wait()
    assert nb_descriptors() == before


@pytest.mark.parametrize("way", ["read", "write", "flush"])
async def test_a_client_that_vanishes_with_requests_in_flight(way):
    """They are finished; the hangup costs no more than some calls while they last."""
    leaf = stuck()
    before = nb_descriptors()
    async with serving(leaf) as world:
        client = await world.connect()
        requests = {
            "read": lambda: client.read(0, 4096),
            "write": lambda: client.write(4096, b"x" * 4096),
            "flush": lambda: client.request(FLUSH),
        }
        await client.send(b"".join(requests[way]() for _ in range(3)))
        await settle()
        calls = count_events(world, client)
        client.sock.close()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert not client.ended.is_set()
        assert len(calls) < 10
        leaf.release()
        await client.ended.wait()
        assert world.poller.busy == 0
        assert len(leaf.calls) == 3
        if way == "write":
            assert leaf.data[4096:8192] == b"x" * 4096
    assert nb_descriptors() == before


async def test_a_client_that_vanishes_while_it_is_held_back():
    leaf = stuck()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(b"".join(client.read(0, 512) for _ in range(2 * MAX_IN_FLIGHT)))
        await settle()
        calls = count_events(world, client)
        client.sock.close()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert len(calls) < 10
        leaf.release()
        await client.ended.wait()
        assert world.poller.busy == 0


async def test_a_client_that_vanishes_with_replies_unsent():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=4096)
        await client.send(b"".join(client.read(0, SIZE) for _ in range(10)))
        await settle()
        client.sock.close()
        await client.ended.wait()


@pytest.mark.parametrize("end", ["half close", "DISC"])
@pytest.mark.parametrize("send_buffer", [None, 2048])
async def test_who_says_goodbye_gets_its_replies(end, send_buffer):
    leaf = stuck()
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=send_buffer)
        disc = request(DISC, 0, 0, 0) if end == "DISC" else b""
        reads = b"".join(client.read(number * 512, 100_000) for number in range(5))
        late = request(WRITE, 1, 0, 1, 0, b"x") if end == "DISC" else b""
        await client.send(reads + disc + late)
        if not disc:
            client.sock.shutdown(socket.SHUT_WR)
        await settle()
        assert leaf.waiting == 5
        assert not client.ended.is_set()
        leaf.release()
        for answer in await client.answers(5):
            assert len(answer.data) == 100_000
        await client.end()
        assert leaf.data[0] == 0  # nothing is taken after DISC


async def test_requests_at_hand_are_executed_before_the_end_is_seen():
    async with serving(filled()) as world:
        client = await world.connect()
        await client.send(b"".join(client.read(0, 4) for _ in range(3 * BATCH)))
        client.sock.shutdown(socket.SHUT_WR)
        await client.answers(3 * BATCH)
        await client.end()


async def test_an_incomplete_request_at_the_end_is_dropped():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.write(0, b"x" * 100)[:-1])
        client.sock.shutdown(socket.SHUT_WR)
        await client.end()
        assert leaf.calls == []


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("garbage", [b"\0" * 28, request(WRITE, 1, 0, (64 << 20) + 1)])
async def test_what_is_no_request_ends_the_connection(garbage, late, caplog):
    """What came before it is answered."""
    caplog.set_level("INFO")
    leaf = filled()
    async with serving(leaf) as world:
        client, other = await world.connect(), await world.connect()
        if late:
            leaf.would_block = True
            leaf.hold()
        await client.send(client.write(0, b"abcd") + client.read(0, 4) + garbage)
        await settle()
        leaf.release()
        assert len(await client.answers(2)) == 2
        await client.end()
        assert (await other.ask(other.read(512, 4))).data == leaf.data[512:516]
    assert "bad request magic 0x0" in caplog.text or "is over 67108864" in caplog.text


# The server stops


async def test_shutdown_before_the_connection_runs():
    async with serving(filled()) as world:
        client = world.dial()
        client.connection.shutdown()
        await client.ended.wait()


@pytest.mark.parametrize("said", [0, 2, 10, -3])
async def test_shutdown_during_the_handshake(said):
    async with serving(filled()) as world:
        client = world.dial()
        await client.send(hello(structured=True, contexts=True)[:said])
        await settle()
        client.connection.shutdown()
        await client.ended.wait()
        assert not client.connection.negotiated


async def test_shutdown_at_the_moment_the_handshake_ends():
    """The last option is there, and then the request to stop; no requests are taken."""
    leaf = filled()
    async with serving(leaf) as world:
        for turns in range(8):
            client = world.dial()
            glued = request(WRITE, 1, 0, 1, 0, b"x")
            await client.send(hello(structured=False, contexts=False) + glued)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            client.connection.shutdown()
            await client.ended.wait()


async def test_shutdown_of_an_idle_connection():
    async with serving(filled()) as world:
        client = await world.connect()
        await client.ask(client.read(0, 1))
        client.connection.shutdown()
        client.connection.shutdown()
        await client.end()


async def test_shutdown_finishes_what_is_in_flight():
    leaf = stuck()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(client.write(0, b"abc") + client.read(512, 4))
        await settle()
        client.connection.shutdown()
        await client.send(client.write(1024, b"too late"))
        await settle()
        assert not client.ended.is_set()
        leaf.release()
        assert {answer.error for answer in await client.answers(2)} == {0}
        assert leaf.data[:3] == b"abc"
        await client.ended.wait()
        assert leaf.data[1024:1028] == (3).to_bytes(4)


async def test_shutdown_waits_for_replies_to_be_read():
    leaf = filled()
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=4096)
        await client.send(client.read(0, SIZE))
        await settle()
        client.connection.shutdown()
        await settle()
        assert not client.ended.is_set()
        assert (await client.answer()).data == leaf.data
        await client.end()


async def test_shutdown_under_load(caplog):
    """Between any two batches; what was parsed and not begun is dropped, nothing breaks."""
    async with serving(filled()) as world:
        for turns in range(40):
            client = await world.connect(structured=False)
            await client.send(b"".join(request(READ, n, 0, 1) for n in range(1000)))
            for _ in range(turns % 8):
                await trio.lowlevel.checkpoint()
            client.connection.shutdown()
            await client.ended.wait()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("held_back", [False, True])
async def test_a_connection_that_is_cut_off(held_back):
    """`run` is cancelled and the socket closed; the requests in flight find nobody to answer."""
    leaf = stuck()
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=2048)
        count = 2 * MAX_IN_FLIGHT if held_back else 10
        await client.send(b"".join(client.read(0, 4096) for _ in range(count)))
        await settle()
        leaf.release(3)
        await settle()
        client.scope.cancel()
        await client.ended.wait()
        leaf.release()
        await settle()
        assert world.poller.busy == 0
        other = await world.connect()
        assert len((await other.ask(other.read(0, 1))).data) == 1


@pytest.mark.parametrize("unsent", [False, True])
@pytest.mark.parametrize("count", [5, 2 * MAX_IN_FLIGHT])
async def test_the_backend_is_closed_under_requests_in_flight(unsent, count):
    """They end without a reply, and the connection's accounts are in order."""
    leaf = filled()
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect(send_buffer=2048)
        await client.send(b"".join(client.read(0, 512, 1) for _ in range(count)))
        await settle()
        if unsent:
            await client.send(client.read(0, SIZE) if count == 5 else b"")
            await settle()
        world.backend.nursery.cancel_scope.cancel()
        await settle()
        client.sock.close()
        await client.ended.wait()
        assert world.poller.busy == 0


async def test_all_is_cut_off_at_once():
    """First `run`, then the requests: those that end without a reply find a closed socket."""
    leaf = filled()
    leaf.hold()
    async with serving(leaf) as world:
        client = await world.connect()
        await client.send(b"".join(client.read(0, 512, 1) for _ in range(2 * MAX_IN_FLIGHT)))
        await settle()
        client.scope.cancel()
        await client.ended.wait()
        world.backend.nursery.cancel_scope.cancel()
        await settle()
        assert world.poller.busy == 0


# Others


async def test_a_client_that_floods_does_not_starve_another():
    leaf = filled()
    async with serving(leaf) as world:
        flood, quiet = await world.connect(structured=False), await world.connect()
        delays = []
        for _ in range(5):
            before = len(leaf.calls)
            world.nursery.start_soon(
                flood.send, b"".join(request(READ, n, 0, 1) for n in range(5000))
            )
            while len(leaf.calls) == before:
                await trio.lowlevel.checkpoint()
            await quiet.send(quiet.read(512, 7))
            assert len((await quiet.answer()).data) == 7
            delays.append(leaf.calls.index(("read", 512, 7)) - before)
            del leaf.calls[:]
            await flood.exactly(5000 * 17)
        # A slice is a millisecond; five times as much would be all.
        assert sorted(delays)[2] < 2500 + BATCH * (EAGERLY + 1)


async def test_what_breaks_one_connection_leaves_others_alone(monkeypatch, caplog):
    async with serving(filled()) as world:
        bad, good = await world.connect(), await world.connect()
        monkeypatch.setattr(bad.connection, "_step", lambda: 1 / 0)
        await bad.send(bad.read(0, 1))
        await bad.end()
        assert len((await good.ask(good.read(0, 1))).data) == 1
    assert "ZeroDivisionError" in caplog.text


async def test_a_socket_that_fails(caplog):
    caplog.set_level("INFO")

    class Failing:
        def __init__(self, sock):
            self.fileno = sock.fileno

        def recv_into(self, buffer):
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

    async with serving(filled()) as world:
        client = await world.connect()
        intake = client.connection._intake
        intake._sock = Failing(intake._sock)
        await client.send(client.read(0, 1))
        await client.end()
    assert "the connection was lost: Connection timed out" in caplog.text
