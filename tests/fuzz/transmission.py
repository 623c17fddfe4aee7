"""Transmission bytes, served: a well-formed reply to each request that a naive parser sees, then
the connection is closed; and nothing stays in flight, and another client is served as before.

Real connections, sockets and poller in front of a leaf in memory that may be slow or fail. `Client`
(tests/transmission.py) holds every reply against the document. The head of an input is that of
requests.py, and says in other bits what the leaf does: see `make_leaf`. Cookies are made different
from each other, since the replies are told apart by them.
"""

from __future__ import annotations

import socket
import struct

import trio

from fuzz import loop
from fuzz.requests import (
    DICTIONARY,
    HEAD,
    HEADER,
    LONGEST,
    MESSAGE_MAGIC,
    SIZE,
    SMALL_PAYLOADS,
    Foreseen,
    Session,
    error_of,
    fix_length,
    foresee,
    seeds,
    split,
)
from fuzz.scale import scaled
from memory_leaf import MemoryLeaf
from nbdserve.block.run import Miss
from nbdserve.nbd import batch, poller
from transmission import DISC, TRIM, WRITE, WRITE_ZEROES, Client, World, serving

__all__ = ["DICTIONARY", "MESSAGE_MAGIC", "fix_length", "seeds", "split", "transmission"]

ERRORS = (5, 28, 95, 122)
INLINE = 64 << 10
SEND_AT = 16 << 10

_TEMPLATE = MemoryLeaf(SIZE)
for _start in range(0, SIZE, 64 << 10):
    _TEMPLATE.fill(_start, bytes(range(1, 251)) * 80)


SMALL_CONNECTION = [
    *SMALL_PAYLOADS,
    (batch, "SEND_AT", SEND_AT),
    (batch, "MAX_INLINE", INLINE),
    (poller, "SPIN", 0),
    (poller, "PATIENCE", 0),
    (poller, "SLICE", 0),
]
"""And what a connection collects before it sends, and reads at once; and a poller that never spins
and always lets the others run, so that nothing depends on a clock."""


def make_leaf(head: bytes, *, read_only: bool) -> MemoryLeaf:
    """Some data, some holes. Its synchronous way may refuse, or not resolve; an operation fails."""
    _, way, _, seed = head.ljust(HEAD, b"\0")
    leaf = MemoryLeaf(SIZE, read_only=read_only)
    leaf.data[:] = _TEMPLATE.data
    leaf.holes = set(_TEMPLATE.holes)
    leaf.would_block = way % 4 == 1
    leaf.miss = Miss.OPAQUE if way % 4 == 2 else None
    if seed:
        leaf.fail_at(seed % 11 + 1, ERRORS[seed % len(ERRORS)])
    return leaf


def transmission(data: bytes) -> None:
    """The target."""
    with scaled(SMALL_CONNECTION):
        loop.run(lambda: _transmission(data))


async def _transmission(data: bytes) -> None:
    head = data[:HEAD]
    session = Session.of(head)
    stream, asked = numbered(data[HEAD:])
    leaf = make_leaf(head, read_only=session.read_only)
    fails = bool(leaf._failures)
    async with serving(leaf) as world:
        other = await world.connect() if session.seed & 1 else None
        contexts = session.contexts and session.structured
        session = session._replace(contexts=contexts)
        glued = session.seed & 2
        client = await world.connect(
            structured=session.structured, contexts=contexts, glued=stream if glued else b""
        )
        for cookie, request in asked.items():
            client.expect(cookie, request.command, request.offset, request.length, request.flags)
        if not glued:
            world.nursery.start_soon(send, client, stream, session.piece or len(stream))
        else:
            client.sock.shutdown(socket.SHUT_WR)
        for answer in await client.answers(len(asked)):
            wanted = error_of(asked[answer.cookie], session)
            if wanted:
                assert answer.error == wanted, f"{asked[answer.cookie]}: {answer.error}"
            elif not fails and not asked[answer.cookie].flags:
                assert not answer.error, f"{asked[answer.cookie]}: {answer.error}, {answer.message}"
        await client.end()
        if not (fails or leaf.would_block or leaf.miss):
            check_content(
                leaf, [request for request in asked.values() if not error_of(request, session)]
            )
        await check_world(world, other, leaf)


def numbered(stream: bytes) -> tuple[bytes, dict[int, Foreseen]]:
    """The stream with a cookie of its own for each request; these by their cookies, up to the one
    that disconnects."""
    changed = bytearray(stream)
    found, _ = foresee(stream)
    at = 0
    asked: dict[int, Foreseen] = {}
    for number, request in enumerate(found):
        if request.command == DISC:
            break
        struct.pack_into(">Q", changed, at + 8, number)
        asked[number] = request
        at += HEADER + len(request.payload or b"")
    return bytes(changed), asked


def check_content(leaf: MemoryLeaf, done: list[Foreseen]) -> None:
    """What was written is there. Only where all writes are plain ones, which are done at once and
    so one after the other."""
    if any(r.command in (TRIM, WRITE_ZEROES) or (r.command == WRITE and r.flags) for r in done):
        return
    wanted = bytearray(_TEMPLATE.data)
    for request in done:
        if request.payload is not None:
            wanted[request.offset : request.offset + request.length] = request.payload
    assert leaf.data == wanted, "other bytes were written than were sent"


async def send(client: Client, stream: bytes, piece: int) -> None:
    """Until the server has had enough."""
    try:
        for start in range(0, len(stream), piece or 1):
            await client.send(stream[start : start + piece])
        client.sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, trio.ClosedResourceError):
        pass  # the server has closed it


async def check_world(world: World, other: Client | None, leaf: MemoryLeaf) -> None:
    """All is as it was, but for the data."""
    assert world.poller.busy == 0, "something still runs"
    assert not world.backend._epochs._active, "a request has not left its epoch"
    leaf.miss, leaf.would_block = None, False
    leaf._failures.clear()
    if other is not None:
        answer = await other.ask(other.read(0, LONGEST))
        assert answer.data == leaf.data[:LONGEST], "another client reads something else"
