"""Late requests: those that cannot be answered at once, from start to reply.

A read or write that only waits for the disk is queued with its leaf and answered by a callback: no
task, no await. So is a flush that is but a leaf's sync, and a write with FUA that the leaf can make
durable. Everything else runs as a task in the backend's nursery (nbd/commands.py), so that a
client that goes away cancels nothing of it, least of all of an allocation that others wait for.

Law of memory: `full` says when a connection must take no further request. It bounds the number and
the bytes of what is under way; one request over the bound may always be. The bytes are counted in
the connection's share of the server's budget, and when that is short SMALL is the bound.

Each is credited to the connection's account when it is done, with the time since the batch that it
came in was begun (`began`).
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING

from nbdserve.block.flush import FlushFailed
from nbdserve.block.node import MAX_INLINE
from nbdserve.block.run import Miss
from nbdserve.errors import DisconnectError
from nbdserve.nbd import replies
from nbdserve.nbd.budget import CAPACITY, SMALL
from nbdserve.nbd.commands import CACHE_STEP, HANDLERS, read_reply_head
from nbdserve.nbd.proto import SIMPLE_REPLY_MAGIC, Command
from nbdserve.nbd.requests import FUA_WRITE, Request, command_name, command_of, flags_of
from nbdserve.nbd.wire import SIMPLE_REPLY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.block.account import Account, Operations
    from nbdserve.block.node import Buffer
    from nbdserve.nbd.budget import Share
    from nbdserve.nbd.options import Transmission
    from nbdserve.nbd.poller import Poller

__all__ = ["LateRequests"]

# Requests of one connection that wait for something, and their bytes. QEMU allows 16 (each costs it
# a coroutine's stack); deep queues on cold disks want more.
MAX_IN_FLIGHT = 128
MAX_BYTES = 64 << 20

# Bytes that a task and its frames take, and a reply without data.
TASK = 8 << 10

CARRY_DATA = frozenset({int(Command.READ), int(Command.WRITE)})

# What a command is in the accounts (block/account.py).
KINDS = {
    Command.READ: "rd",
    Command.WRITE: "wr",
    Command.FLUSH: "flush",
    Command.TRIM: "unmap",
    Command.WRITE_ZEROES: "zero",
    Command.BLOCK_STATUS: "status",
    Command.CACHE: "prefetch",
}


class LateRequests:
    """Those of one connection. `on_reply(reply, buffer)` is called for each as it is done; `buffer`
    is the pool's, to be given back once the reply is sent. After sending, `release`."""

    def __init__(
        self,
        session: Transmission,
        poller: Poller,
        share: Share,
        on_reply: Callable[[Sequence[Buffer], memoryview | None], None],
        on_disconnect: Callable[[OSError], None],
        log: logging.Logger,
    ) -> None:
        """`poller`: is told how many requests need the other tasks to run. `on_disconnect`: is
        called in place of an answer to a request that has none."""
        self.in_flight = 0
        self.full = False  # an attribute, not a property: looked at for each request
        self._bytes = 0
        self._replied = 0  # bytes of those that are done, and counted in the share
        self._session = session
        self._backend = session.export.backend
        self._buffers = session.export.backend.buffers
        self._structured = session.structured_replies
        self._poller = poller
        self._share = share
        self._on_reply = on_reply
        self._on_disconnect = on_disconnect
        self._log = log
        self._starting: deque[tuple[Request, memoryview | bytes | None, int, int]] = deque()
        self.began = 0  # perf_counter_ns() at which the batch was begun that requests are of
        self._credit(self._backend.accounts.open())

    def _credit(self, account: Account) -> None:
        self.account = account
        self._kinds: dict[int, Operations] = {
            int(command): account.operations[kind] for command, kind in KINDS.items()
        }
        self.reads = account.operations["rd"]
        self.writes = account.operations["wr"]
        self._flushes = account.operations["flush"]

    def close_account(self) -> None:
        """The client has left; what is still under way counts as that of one of those."""
        self._credit(self._backend.accounts.close(self.account))

    def answered(self, request: Request) -> None:
        """A request was done at once, not by the hot loop, which counts its own."""
        head, _, _, length, _ = request
        self._kinds[command_of(head)].add(1, length, perf_counter_ns() - self.began)

    def refused(self, request: Request) -> None:
        """A request was answered without a look at the drive: it is invalid."""
        operations = self._kinds.get(command_of(request[0]))
        if operations is None:
            self.account.unknown += 1
        else:
            operations.invalid += 1

    def _count(self, requests: int, nb_bytes: int) -> None:
        self.in_flight += requests
        self._bytes += nb_bytes
        if nb_bytes > 0:
            self._share.add(nb_bytes)
        else:
            self._replied -= nb_bytes  # held still: now it is a reply
        self.full = (
            self.in_flight >= MAX_IN_FLIGHT
            or self._bytes >= MAX_BYTES
            or (self._bytes >= SMALL and self._share.short)
        )

    def release(self) -> None:
        """What `on_reply` got is sent, or counted by the outbox: not before, or others would be
        granted the same memory."""
        if self._replied:
            replied, self._replied = self._replied, 0
            self._share.add(-replied)

    def start(self, request: Request, data: memoryview | bytes | None, miss: Miss | None) -> None:
        """Start a request that was validated. `data`: a WRITE's payload, ours until the reply."""
        try:
            if miss is Miss.WOULD_BLOCK and data is None and self.queue_read(request):
                return
        except Exception as error:
            self._on_reply([self._failed(request, error, self.began)], None)
            return
        nb_bytes = _nb_bytes(request)
        if isinstance(data, memoryview):
            nb_bytes = max(nb_bytes, CAPACITY)  # it keeps the whole buffer that it came in
        self._count(1, nb_bytes)
        self._poller.busy += 1
        self._starting.append((request, data, nb_bytes, self.began))
        self._backend.nursery.start_soon(self._run_next)

    def queue_read(self, request: Request) -> bool:
        """Submit a READ that is within bounds; False: it must go another way."""
        _, cookie, offset, length, _ = request
        buffers = self._buffers
        buffer = buffers.take(length)
        data = buffer[:length]
        began = self.began

        def done(error: OSError | None) -> None:
            self._count(-1, -length)
            if error is not None:
                self._on_reply([self.failure(request, error, began)], buffer)
            else:
                self.reads.add(1, length, perf_counter_ns() - began)
                head = read_reply_head(cookie, offset, length, structured=self._structured)
                self._on_reply([head, data], buffer)

        if not self._submit(self._backend.submit_read, offset, data, done, buffer):
            return False
        self._count(1, length)
        return True

    def queue_write(self, request: Request) -> bool:
        """Submit a WRITE, with FUA or not, that is within bounds; False: it must go another way.

        The payload is copied: out of the receive buffer, into memory that O_DIRECT takes.
        """
        head, cookie, offset, length, payload = request
        buffer = self._buffers.take(length)
        data = buffer[:length]
        data[:] = payload  # type: ignore[assignment]
        began = self.began
        submit = self._backend.submit_write

        def done(error: OSError | None) -> None:
            self._count(-1, -length)
            self._buffers.give(buffer)
            if error is not None:
                self._on_reply([self.failure(request, error, began)], None)
            else:
                self.writes.add(1, length, perf_counter_ns() - began)
                self._on_reply([SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)], None)

        if head == FUA_WRITE:
            submit = partial(submit, fua=True)
        if not self._submit(submit, offset, data, done, buffer):
            return False
        self._count(1, length)
        return True

    def queue_waiting_write(self, request: Request) -> bool:
        """As `queue_write`, if the write waits for the disk: because of FUA, of its own or for want
        of a write cache, or with O_DIRECT."""
        head, _, _, length, _ = request
        backend = self._backend
        waits = head == FUA_WRITE or not backend.write_cache or backend.queues_writes
        return waits and 0 < length <= MAX_INLINE and self.queue_write(request)

    def queue_flush(self, request: Request) -> bool:
        """Submit a FLUSH; False: it must go another way."""
        began = self.began

        def done(error: OSError | None) -> None:
            self._count(-1, 0)
            if error is not None:
                self._on_reply([self.failure(request, error, began)], None)
            else:
                self._flushes.add(1, 0, perf_counter_ns() - began)
                self._on_reply([SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request[1])], None)

        if not self._backend.submit_flush(done):
            return False
        self._count(1, 0)
        return True

    def _submit(
        self,
        submit: Callable[[int, memoryview, Callable[[OSError | None], None]], bool],
        offset: int,
        data: memoryview,
        done: Callable[[OSError | None], None],
        buffer: memoryview,
    ) -> bool:
        """`buffer` goes back if it was not taken, or failed at once."""
        taken = False
        try:
            taken = submit(offset, data, done)
        finally:
            if not taken:
                self._buffers.give(buffer)
        return taken

    async def _run_next(self) -> None:
        """Run the oldest that has no task yet: trio begins tasks in any order, and the nodes shall
        meet a client's requests in the client's."""
        request, data, nb_bytes, began = self._starting.popleft()
        head, cookie, offset, length, _ = request
        reply: list[bytes | bytearray] = []
        try:
            reply = await HANDLERS[command_of(head)](
                self._session, flags_of(head), cookie, offset, length, data
            )
            self._kinds[command_of(head)].add(1, length, perf_counter_ns() - began)
        except Exception as error:
            reply = [self._failed(request, error, began)]
        finally:
            self._poller.busy -= 1
            self._count(-1, -nb_bytes)
            self._on_reply(reply, None)

    def _failed(self, request: Request, error: Exception, began: int) -> bytes:
        if not isinstance(error, OSError):
            # A bug of ours; the client gets an answer all the same.
            self._log.error("internal error in %s", command_name(request), exc_info=error)
            error = OSError(errno.EIO, f"internal error: {error!r}")
        return self.failure(request, error, began)

    def failure(self, request: Request, error: OSError, began: int) -> bytes:
        """The reply to a request that failed; the whole error goes to the log before it is
        narrowed to an NBD error value. Empty for one that shall have no reply."""
        head, cookie, offset, length, _ = request
        self._kinds[command_of(head)].fail(perf_counter_ns() - began)
        if isinstance(error, DisconnectError):
            self._on_disconnect(error)
            return b""
        reason = error.strerror or str(error)
        name = command_name(request)
        # That a flush failed the log says once for each file, and not for each request after it.
        level = logging.DEBUG if isinstance(error, FlushFailed) else logging.WARNING
        self._log.log(level, "%s of %d bytes at %d: %s", name, length, offset, reason)
        return replies.error_reply(
            cookie, replies.nbd_error(error.errno), reason, structured=self._structured
        )


def _nb_bytes(request: Request) -> int:
    """What a task holds for it."""
    command, length = command_of(request[0]), request[3]
    if command in CARRY_DATA:
        return TASK + length
    return TASK + (min(length, CACHE_STEP) if command == Command.CACHE else 0)
