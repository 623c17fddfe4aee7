"""A connection in transmission, and the client at its other end, for tests of the front end.

`serving` runs a real Poller and real Connections over socket pairs in front of a BlockBackend.
`Client` speaks the protocol with messages packed by hand, so that nothing here rests on what is
tested, and holds every reply against the rules of the document ("Structured replies"): known
cookie, one DONE and only on the last chunk, pieces of a READ that add up and do not overlap, text
that is UTF-8. A reply that breaks one of them fails the test, whatever it was looking at.
"""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
import trio.testing

from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.throttled import Throttle, ThrottledBackend
from nbdserve.nbd.budget import Budget
from nbdserve.nbd.connection import Connection
from nbdserve.nbd.export import Export
from nbdserve.nbd.poller import Poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nbdserve.block.completions import Completions
    from nbdserve.block.node import Node

__all__ = ["Answer", "Chunk", "Client", "World", "option", "request", "serving", "settle"]

LONG = 15.0  # longer than the handshake may take

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
DATA_CHUNK, HOLE_CHUNK, STATUS_CHUNK, ERROR_CHUNK, ERROR_OFFSET_CHUNK = 1, 2, 5, 32769, 32770
SIMPLE_MAGIC, CHUNK_MAGIC = 0x67446698, 0x668E33EF
STRUCTURED_REPLY, SET_META_CONTEXT, GO = 8, 10, 7
ACK, META_CONTEXT = 1, 4


class Chunk(NamedTuple):
    """One structured reply chunk as it came."""

    flags: int
    kind: int
    payload: bytes


class Answer(NamedTuple):
    """The whole answer to a request. `chunks` is empty for a simple reply; `data` is what a READ
    brought, holes as zeroes."""

    cookie: int
    error: int
    message: str
    data: bytes
    chunks: list[Chunk]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """(length, status flags) of a BLOCK_STATUS."""
        [chunk] = self.chunks
        assert chunk.kind == STATUS_CHUNK
        return list(struct.iter_unpack(">II", chunk.payload[4:]))


class _Sent(NamedTuple):
    command: int
    offset: int
    length: int
    flags: int


def request(
    command: int, cookie: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
) -> bytes:
    """A request message ("Request message")."""
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def option(number: int, data: bytes = b"") -> bytes:
    """An option ("Option haggling")."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def hello(*, structured: bool, contexts: bool, name: bytes = b"") -> bytes:
    """All that a client sends until transmission begins."""
    sized = struct.pack(">I", len(name)) + name
    messages = [struct.pack(">I", 3)]
    if structured:
        messages.append(option(STRUCTURED_REPLY))
    if contexts:
        query = b"base:allocation"
        messages.append(
            option(SET_META_CONTEXT, sized + struct.pack(">II", 1, len(query)) + query)
        )
    messages.append(option(GO, sized + b"\0\0"))
    return b"".join(messages)


class Client:
    """One end of a socket pair. `ended` is set when the server's `run` has returned, `scope` is
    what it runs in; the client receives `at_once` bytes at most."""

    def __init__(self, sock: trio.socket.SocketType, connection: Connection) -> None:
        self.sock = sock
        self.connection = connection
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self.at_once = 1 << 18
        self.structured = False
        self.sent: dict[int, _Sent] = {}
        self._cookie = 0xC0_0000_0000_0000
        self._chunks: dict[int, list[Chunk]] = {}
        self._received = bytearray()

    # --- asking --------------------------------------------------------------------------------

    def request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> bytes:
        """A request with a cookie of its own, whose answer is awaited from now on."""
        self._cookie += 1
        self.expect(self._cookie, command, offset, length, flags)
        return request(command, self._cookie, offset, length, flags, payload)

    def expect(self, cookie: int, command: int, offset: int, length: int, flags: int) -> None:
        """An answer to this is awaited from now on, wherever the request was packed."""
        self.sent[cookie] = _Sent(command, offset, length, flags)

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """A READ."""
        return self.request(READ, offset, length, flags)

    def write(self, offset: int, data: bytes, flags: int = 0) -> bytes:
        """A WRITE."""
        return self.request(WRITE, offset, len(data), flags, data)

    async def send(self, data: bytes) -> None:
        """Send all of it; waits while the server does not receive."""
        view = memoryview(data)
        while view:
            view = view[await self.sock.send(view) :]

    async def ask(self, message: bytes) -> Answer:
        """Send one request; its answer must be the next."""
        await self.send(message)
        answer = await self.answer()
        assert answer.cookie == struct.unpack_from(">Q", message, 8)[0]
        return answer

    # --- answers -------------------------------------------------------------------------------

    async def answers(self, number: int) -> list[Answer]:
        """The next ones, as they come."""
        return [await self.answer() for _ in range(number)]

    async def answer(self) -> Answer:
        """The next answer that is complete."""
        while True:
            [magic] = struct.unpack(">I", await self.exactly(4))
            if magic == SIMPLE_MAGIC:
                return await self._simple_reply()
            assert magic == CHUNK_MAGIC, f"{magic:#x} where a reply should begin"
            answer = await self._chunk()
            if answer is not None:
                return answer

    async def end(self) -> None:
        """The server has closed the connection, and not in the middle of a reply."""
        assert not self._received
        assert await self._receive() == b""
        assert not self._chunks
        await self.ended.wait()

    async def exactly(self, nb_bytes: int) -> bytes:
        """That many bytes of the stream."""
        while len(self._received) < nb_bytes:
            data = await self._receive()
            assert data, f"end of stream after {bytes(self._received)!r}"
            self._received += data
        data = bytes(self._received[:nb_bytes])
        del self._received[:nb_bytes]
        return data

    async def _receive(self) -> bytes:
        try:
            return await self.sock.recv(self.at_once)
        except ConnectionResetError:  # how AF_UNIX says that the server left requests unread
            return b""

    async def _simple_reply(self) -> Answer:
        error, cookie = struct.unpack(">IQ", await self.exactly(12))
        sent = self.sent.pop(cookie)
        assert error or sent.command != BLOCK_STATUS, "a simple reply to BLOCK_STATUS"
        assert not (self.structured and sent.command == READ), "a simple reply to READ"
        assert cookie not in self._chunks
        data = b""
        if sent.command == READ and not error:
            data = await self.exactly(sent.length)
        return Answer(cookie, error, "", data, [])

    async def _chunk(self) -> Answer | None:
        flags, kind, cookie, length = struct.unpack(">HHQI", await self.exactly(16))
        assert self.structured
        assert flags in (0, 1)
        assert cookie in self.sent, f"a chunk with an unknown cookie {cookie:#x}"
        chunks = self._chunks.setdefault(cookie, [])
        chunks.append(Chunk(flags, kind, await self.exactly(length)))
        if not flags & 1:
            return None
        return _assemble(cookie, self.sent.pop(cookie), self._chunks.pop(cookie))


def _assemble(cookie: int, sent: _Sent, chunks: list[Chunk]) -> Answer:
    error, message = 0, ""
    pieces: list[tuple[int, bytes]] = []
    for _, kind, payload in chunks:
        if kind == ERROR_CHUNK:
            error, length = struct.unpack_from(">IH", payload)
            assert error
            assert length == len(payload) - 6
            message = payload[6:].decode()
        elif kind == DATA_CHUNK:
            assert len(payload) > 8, "an empty chunk of data"
            pieces.append((struct.unpack_from(">Q", payload)[0], payload[8:]))
        elif kind == HOLE_CHUNK:
            offset, length = struct.unpack(">QI", payload)
            assert length, "an empty hole"
            pieces.append((offset, bytes(length)))
        elif kind == STATUS_CHUNK:
            _check_extents(sent, payload)
        else:
            assert (kind, payload) == (0, b"")
            assert len(chunks) == 1
    assert not pieces or sent.command == READ
    if sent.command == READ and not error:
        position = sent.offset
        for offset, data in sorted(pieces):
            assert offset == position, f"a piece at {offset}, {position} is missing"
            position += len(data)
        assert position == sent.offset + sent.length
        assert not sent.flags & DF or len(pieces) <= 1
    return Answer(cookie, error, message, b"".join(data for _, data in sorted(pieces)), chunks)


def _check_extents(sent: _Sent, payload: bytes) -> None:
    assert sent.command == BLOCK_STATUS
    lengths = [length for length, _ in struct.iter_unpack(">II", payload[4:])]
    assert lengths
    assert all(lengths)
    if sent.flags & REQ_ONE:
        assert len(lengths) == 1
        assert sum(lengths) <= sent.length
    assert sum(lengths[:-1]) < sent.length


@dataclass
class World:
    """A poller, a backend and the connections to it."""

    backend: BlockBackend
    poller: Poller
    nursery: trio.Nursery
    clients: list[Client] = field(default_factory=list)
    others: list[Export] = field(default_factory=list)  # beside the default export
    budget: Budget = field(default_factory=Budget)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("nbdserve.test"))

    def dial(self, *, send_buffer: int | None = None) -> Client:
        """A connected client that has said nothing yet; `send_buffer` bytes for the server."""
        ours, theirs = socket.socketpair()
        if send_buffer is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        ours.setblocking(False)
        exports = [Export("", self.backend), *self.others]
        connection = Connection(ours, exports, self.poller, budget=self.budget, log=self.log)
        client = Client(trio.socket.from_stdlib_socket(theirs), connection)
        self.clients.append(client)
        self.nursery.start_soon(_run, client, ours)
        return client

    def add_throttled(self, name: str, root: Node, throttle: Throttle) -> BlockBackend:
        """One more export, behind a throttle."""
        backend = ThrottledBackend(
            root, Epochs(), self.backend.nursery, throttle, write_cache=True
        )
        backend.on_wait = self.poller.waits
        self.others.append(Export(name, backend))
        return backend

    async def connect(
        self,
        *,
        structured: bool = True,
        contexts: bool | None = None,
        glued: bytes = b"",
        send_buffer: int | None = None,
        name: bytes = b"",
    ) -> Client:
        """A client in transmission; `glued` is sent together with its last option."""
        client = self.dial(send_buffer=send_buffer)
        contexts = structured if contexts is None else contexts
        client.structured = structured
        await client.send(hello(structured=structured, contexts=contexts, name=name) + glued)
        assert (await client.exactly(18))[:8] == b"NBDMAGIC"
        while True:
            number, kind, length = struct.unpack(">8xIII", await client.exactly(20))
            await client.exactly(length)
            assert kind < 1 << 31
            if (number, kind) == (GO, ACK):
                return client


async def _run(client: Client, sock: socket.socket) -> None:
    try:
        with client.scope:
            await client.connection.run()
    finally:
        sock.close()
        client.ended.set()


@asynccontextmanager
async def serving(
    root: Node,
    *,
    write_cache: bool = True,
    engines: Sequence[Completions] = (),
    **options: Any,  # noqa: ANN401 - checked by BlockBackend
) -> AsyncIterator[World]:
    """A world in front of `root`; `options`: BlockBackend's. In the end every client must be able
    to leave."""
    poller = Poller(engines)
    world = None
    try:
        with trio.fail_after(LONG):
            async with trio.open_nursery() as late, trio.open_nursery() as nursery:
                backend = BlockBackend(
                    root, Epochs(), late, write_cache=write_cache, engines=engines, **options
                )
                nursery.start_soon(poller.run)
                world = World(backend, poller, nursery)
                yield world
                for client in world.clients:
                    client.sock.close()
                    await client.ended.wait()
                assert poller.busy == 0
                nursery.cancel_scope.cancel()
                late.cancel_scope.cancel()
    finally:
        for client in world.clients if world else ():
            client.sock.close()
        poller.close()


async def settle() -> None:
    """Wait until the server has done all that it can do by itself."""
    await trio.testing.wait_all_tasks_blocked(0.005)
