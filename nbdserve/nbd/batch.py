"""What a connection does with the requests that it has: a batch at a time, in their order.

The hot loop. A request that can be answered at once costs no task, no await and no object of its
own; its reply is packed into the one outgoing buffer, behind those before it. What waits for the
disk is submitted, and everything else is started as a late request (late.py).

Law: nothing here waits, and nothing here receives. When the client does not take its replies, or
has too many late requests, or the connection has ended, the batch stops where it is.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

from nbdserve.block.node import MAX_INLINE
from nbdserve.nbd import replies
from nbdserve.nbd.budget import SMALL
from nbdserve.nbd.commands import HOLES_FROM
from nbdserve.nbd.proto import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    ReplyType,
    TransmissionFlag,
)
from nbdserve.nbd.requests import (
    FUA_WRITE,
    PINS_FROM,
    PLAIN_READ,
    PLAIN_WRITE,
    Request,
    command_name,
    command_of,
    flags_of,
)
from nbdserve.nbd.sparse import put, read_sparse
from nbdserve.nbd.validate import Validator
from nbdserve.nbd.wire import OFFSET_DATA_CHUNK, SIMPLE_REPLY

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from nbdserve.block.run import Miss
    from nbdserve.nbd.budget import Budget
    from nbdserve.nbd.intake import Intake
    from nbdserve.nbd.late import LateRequests
    from nbdserve.nbd.options import Transmission
    from nbdserve.nbd.outbox import Outbox

__all__ = ["Executor"]

# Replies are sent when that many bytes have come together: what the client's cache still holds.
SEND_AT = 256 << 10

# The same when the server is short of memory.
SEND_AT_SHORT = 32 << 10

DISC = int(Command.DISC)
FLUSH = int(Command.FLUSH)
WRITE = int(Command.WRITE)
DONE = replies.DONE
OFFSET_DATA = int(ReplyType.OFFSET_DATA)
_pack_data_chunk = OFFSET_DATA_CHUNK.pack_into
_pack_simple = SIMPLE_REPLY.pack_into


class Executor:
    """Of one connection. `end` and `lose` are called when the client says goodbye, or its socket is
    dead; `has_ended` tells whether there was either."""

    def __init__(
        self,
        session: Transmission,
        intake: Intake,
        outbox: Outbox,
        late: LateRequests,
        budget: Budget,
        log: logging.Logger,
        *,
        end: Callable[[str], None],
        lose: Callable[[OSError], None],
        has_ended: Callable[[], bool],
    ) -> None:
        self._backend = session.export.backend
        self._validate = Validator.of(session).validate
        self._structured = session.structured_replies
        self._size = session.size
        self._writable = TransmissionFlag.READ_ONLY not in session.flags
        self._intake = intake
        self._outbox = outbox
        self._late = late
        self._budget = budget
        self._log = log
        self._end = end
        self._lose = lose
        self._has_ended = has_ended
        self._queue = self._queues()
        # Of what is done in the hot loop. Longer reads may get hole chunks.
        self._longest = HOLES_FROM - 1 if self._structured else MAX_INLINE

    def _queues(self) -> dict[int, Callable[[Request], bool]]:
        """By request head: what nothing at once can be done for, and is submitted."""
        queues: dict[int, Callable[[Request], bool]] = {}
        if self._backend.queues_reads:
            queues[PLAIN_READ] = self._late.queue_read
        if self._backend.queues_writes and self._writable:
            queues[PLAIN_WRITE] = queues[FUA_WRITE] = self._late.queue_write
        return queues

    def execute(self, stop: int) -> int:
        """The hot loop: execute the parsed requests up to `stop` in order, their replies side by
        side. Returns how many were done: fewer if others must wait."""
        requests, position = self._intake.requests, 0
        out, fill = self._outbox.page(), 0
        structured, size, writable = self._structured, self._size, self._writable
        # For the account. Reads are not counted, they are what is left: of the requests those that
        # are neither writes nor `others`, of the bytes sent those that are no heads and not theirs.
        others = others_sent = sent = nb_writes = written = 0
        head_size = OFFSET_DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        longest, send_at = self._longest, SEND_AT
        if self._budget.short:
            longest, send_at = min(longest, SMALL), SEND_AT_SHORT
        read_nowait, write_nowait = self._backend.read_nowait, self._backend.write_nowait
        outbox, late, queue = self._outbox, self._late, self._queue
        late.began = began = perf_counter_ns()
        while position < stop:
            request = requests[position]
            head, cookie, offset, length, payload = request
            position += 1
            try:
                if (
                    queue
                    and head in queue
                    and 0 < length <= longest
                    and offset + length <= size
                    and queue[head](request)
                ):
                    others += 1
                elif head == PLAIN_READ and 0 < length <= longest and offset + length <= size:
                    start = fill + head_size
                    miss = read_nowait(offset, out[start : start + length])
                    if miss is not None:
                        self._start_late(request, miss)
                        others += 1
                    else:
                        if structured:
                            _pack_data_chunk(
                                out, fill, STRUCTURED_REPLY_MAGIC, DONE, OFFSET_DATA,
                                cookie, length + 8, offset,
                            )  # fmt: skip
                        else:
                            _pack_simple(out, fill, SIMPLE_REPLY_MAGIC, 0, cookie)
                        fill = start + length
                elif (
                    head == PLAIN_WRITE
                    and writable
                    and length > 0
                    and offset + length <= size
                    and write_nowait(offset, payload) is None  # type: ignore[arg-type]
                ):
                    _pack_simple(out, fill, SIMPLE_REPLY_MAGIC, 0, cookie)
                    fill += 16
                    nb_writes += 1
                    written += length
                else:
                    before, fill = fill, self._special(request, out, fill)
                    others += 1
                    others_sent += fill - before
            except OSError as error:
                reply = late.failure(request, error, late.began)
                fill = put(out, fill, reply)
                others += 1
                others_sent += len(reply)
            if fill >= send_at:
                self._send(out[:fill])
                sent += fill
                fill = 0
            if outbox.pending or late.full or self._has_ended():
                break
        self._intake.executed(position)
        if fill:
            self._send(out[:fill])
        nanoseconds = perf_counter_ns() - began
        if nb_writes:
            late.writes.add(nb_writes, written, nanoseconds)
            others += nb_writes
            others_sent += nb_writes * SIMPLE_REPLY.size
        nb_reads = position - others
        if nb_reads:
            nb_bytes = sent + fill - others_sent - nb_reads * head_size
            late.reads.add(nb_reads, nb_bytes, nanoseconds)
        return position

    def _send(self, buffer: memoryview) -> None:
        try:
            self._outbox.send(buffer)
        except OSError as error:  # what was done is counted all the same
            self._lose(error)

    def _special(self, request: Request, out: memoryview, fill: int) -> int:
        """A request that is not a plain read or write, or one that the fast way did not do."""
        head, cookie, offset, length, _ = request
        command = command_of(head)
        if command == DISC:
            self._end("the client disconnected")
            return fill
        error = self._validate(flags_of(head), command, offset, length)
        if error:
            message = f"{command_name(request)} of {length} bytes at {offset} refused"
            self._log.debug("%s: %d", message, error)
            self._late.refused(request)
            reply = replies.error_reply(cookie, error, message, structured=self._structured)
            return put(out, fill, reply)
        # With a throttle not: of several pieces the first would be charged twice if a later one
        # had to wait.
        if (
            head == PLAIN_READ
            and HOLES_FROM <= length <= (SMALL if self._budget.short else MAX_INLINE)
            and self._structured
            and not self._backend.throttled
        ):
            end, miss = read_sparse(self._backend, cookie, offset, length, out, fill)
            if end is None:
                self._start_late(request, miss)
                return fill
            self._late.answered(request)
            return end
        if command == FLUSH and self._backend.flush_nowait():
            self._late.answered(request)
            return put(out, fill, replies.done(cookie, structured=False))
        if not self._queue_special(request):
            self._start_late(request)
        return fill

    def _queue_special(self, request: Request) -> bool:
        """Submit a flush, or a write that waits for the disk; False: it needs a task."""
        head, _, _, length, _ = request
        if command_of(head) == FLUSH:
            return self._late.queue_flush(request)
        if head in self._queue and length <= self._longest:
            return False  # asked in the hot loop
        return command_of(head) == WRITE and self._late.queue_waiting_write(request)

    def _start_late(self, request: Request, miss: Miss | None = None) -> None:
        payload = request[4]
        data: memoryview | bytes | None = payload
        if payload is not None:
            if len(payload) < PINS_FROM:
                data = bytes(payload)
            else:
                self._intake.pin()
        self._late.start(request, data, miss)
