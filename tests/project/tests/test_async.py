"""Tests of each asynchronous kind, with the fixtures and without."""

import asyncio

import anyio
import pytest
import trio
from ledger import Device, Ledger

from nbdserve.testing import Fault, serving

GREETING = b"NBDMAGIC"


def keep(path, entry):
    with Device(path) as device:
        ledger = Ledger(device)
        ledger.append(entry)
        return ledger.entries


@pytest.mark.trio
async def test_trio(nbd_server):
    server = nbd_server(size="1M")
    stream = await trio.open_unix_socket(server.socket)
    async with stream:
        assert await stream.receive_some(8) == GREETING
    stuck = [Fault(ops="write", stuck=True)]
    async with serving(size="1M", faults=stuck) as other, trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, keep, other.socket, "one")
        await other.faults.until_stuck()
        other.faults.clear()
    assert server.statistics()["accepted"] == 1


@pytest.mark.asyncio
async def test_asyncio(nbd_server):
    server = nbd_server(size="1M")
    reader, writer = await asyncio.open_unix_connection(server.socket)
    assert await reader.readexactly(8) == GREETING
    writer.close()
    await writer.wait_closed()
    async with serving(size="1M", faults=[Fault(ops="write", stuck=True)]) as other:
        task = asyncio.create_task(asyncio.to_thread(keep, other.socket, "one"))
        await other.faults.until_stuck()
        assert not task.done()
        other.faults.clear()
        assert await task == ["one"]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_anyio(nbd_server, anyio_backend):
    server = nbd_server(size="1M")
    async with await anyio.connect_unix(server.socket) as stream:
        assert (await stream.receive(8)) == GREETING
    async with serving(size="1M") as other:
        assert await anyio.to_thread.run_sync(keep, other.socket, "one") == ["one"]
