"""A drive by the whole front end: a client's requests through a connection and the poller."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from faults.trial import Failed
from nbdserve.block.backend import BlockBackend
from nbdserve.nbd.poller import Poller
from nbdserve.nbd.replies import nbd_error
from transmission import BLOCK_STATUS, FLUSH, FUA, NO_HOLE, TRIM, WRITE_ZEROES, Client, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from faults.trial import Drive
    from qcow2_model import Request

__all__ = ["by_client"]


@asynccontextmanager
async def by_client(backend: BlockBackend, *, direct: bool) -> AsyncIterator[Drive]:
    """A connected client; `direct`: the server takes the leaves for ones with O_DIRECT."""
    if direct:
        backend = BlockBackend(
            backend.root, backend._epochs, backend.nursery, write_cache=True, direct=True
        )
    poller = Poller(())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            client = await World(backend, poller, nursery).connect()
            try:
                yield ClientDrive(client)
            finally:
                client.sock.close()
            await client.ended.wait()
            assert poller.busy == 0
            nursery.cancel_scope.cancel()
    finally:
        poller.close()


class ClientDrive:
    """One client's requests."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def seen(self, number: int) -> int:
        return nbd_error(number)

    async def perform(self, request: Request) -> bytes | None:
        client = self._client
        offset, length = request.offset, request.length
        match request.kind:
            case "write":
                message = client.write(offset, request.data, FUA if request.flag else 0)
            case "read":
                message = client.read(offset, length)
            case "zero":
                flags = 0 if request.flag else NO_HOLE
                message = client.request(WRITE_ZEROES, offset, length, flags)
            case "discard":
                message = client.request(TRIM, offset, length)
            case "status":
                message = client.request(BLOCK_STATUS, offset, length)
            case _:
                message = client.request(FLUSH)
        answer = await client.ask(message)
        if answer.error:
            raise Failed(answer.error)
        return answer.data if request.kind == "read" else None
