"""One client: handshake, then batches of requests until it leaves.

The handshake is an ordinary coroutine. In transmission the poller calls `_on_event`, which is
synchronous: receive, parse all complete requests, execute each, send all replies. A request that
can be answered at once costs no task, no await and no object of its own; its reply is packed into
the one outgoing buffer. Everything else is late (nbd/late.py), and its reply is sent when it comes,
in any order.

Law: while a client does not read its replies, or has too many late requests, nothing more is
received from it; and what it makes us hold is counted in the server's budget (nbd/budget.py). A
client that sends nonsense, or vanishes, ends its own connection and no other.
"""

from __future__ import annotations

import errno
import select
import socket
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import MAX_INLINE
from nbdserve.nbd import replies
from nbdserve.nbd.budget import SMALL
from nbdserve.nbd.commands import HOLES_FROM
from nbdserve.nbd.intake import Arrived, Intake
from nbdserve.nbd.late import LateRequests
from nbdserve.nbd.negotiate import negotiate
from nbdserve.nbd.outbox import Outbox
from nbdserve.nbd.poller import READABLE, WRITABLE
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
    ProtocolError,
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
    from collections.abc import Callable, Sequence

    from nbdserve.block.node import Buffer
    from nbdserve.block.run import Miss
    from nbdserve.nbd.budget import Budget
    from nbdserve.nbd.export import Export
    from nbdserve.nbd.handshake import Transmission
    from nbdserve.nbd.poller import Poller

__all__ = ["Connection"]

# Replies are sent when that many bytes have come together: what the client's cache still holds.
SEND_AT = 256 << 10

# The same when the server is short of memory.
SEND_AT_SHORT = 32 << 10

BYTES, NOTHING, END = Arrived.BYTES, Arrived.NOTHING, Arrived.END
DISC = int(Command.DISC)
FLUSH = int(Command.FLUSH)
WRITE = int(Command.WRITE)
DONE = replies.DONE
OFFSET_DATA = int(ReplyType.OFFSET_DATA)
_pack_data_chunk = OFFSET_DATA_CHUNK.pack_into
_pack_simple = SIMPLE_REPLY.pack_into


class Connection:
    """`run` serves the client on a connected, non-blocking socket until it leaves.

    `negotiated`: it has reached transmission. Nothing that a client does makes `run` raise.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: Sequence[Export],
        poller: Poller,
        *,
        budget: Budget,
        log: logging.Logger,
    ) -> None:
        self.negotiated = False
        self._sock = sock
        self._exports = exports
        self._poller = poller
        self._budget = budget
        self._log = log
        self._stopping = False
        self._lost = False
        self._ended = trio.Event()
        self._idle = trio.Event()
        self._handshake_scope = trio.CancelScope()

    def shutdown(self) -> None:
        """Take no more requests, finish those in flight; `run` returns then."""
        self._stopping = True
        self._handshake_scope.cancel()
        if self.negotiated:
            self._end("the server is stopping")

    async def run(self) -> None:
        """Serve the client."""
        try:
            session, trailing = None, b""
            with self._handshake_scope:
                session, trailing = await negotiate(self._sock, self._exports, self._log)
        except OSError as error:
            self._log.info("handshake: %s", error.strerror or error)
            return
        if session is None or self._stopping:
            return
        self._begin(session)
        self._poller.register(self._sock.fileno(), self._on_event)
        self.negotiated = True
        try:
            self._take(trailing)
            await self._ended.wait()
            await self._drain()
        finally:
            self._lost = True  # cut off, perhaps, with replies on their way
            self._outbox.drop()
            self._intake.forget()
            self._poller.unregister(self._sock.fileno())
            self._late.close_account()
            self._share.close()

    def statistics(self) -> dict[str, object]:
        """Counters of the client's requests (see Account.statistics), and how it is served."""
        if not self.negotiated:
            return {}
        return {
            "export": self._session.export.name,
            "structured_replies": self._structured,
            "in_flight": self._late.in_flight,
            **self._late.account.statistics(),
        }

    # --- transmission --------------------------------------------------------------------------

    def _begin(self, session: Transmission) -> None:
        self._session = session
        self._backend = session.export.backend
        self._plug = self._backend.plug
        self._validate = Validator.of(session).validate
        self._structured = session.structured_replies
        self._size = session.size
        self._writable = TransmissionFlag.READ_ONLY not in session.flags
        self._share = self._budget.open(self._granted, self._owes, self._drop)
        self._intake = Intake(self._sock, self._budget, self._share)
        pool = self._backend.buffers
        self._outbox = Outbox(self._sock, self._budget.sending, pool, self._share)
        self._replies: list[Buffer] = []  # of late requests, not given to the outbox yet
        self._late = LateRequests(
            session, self._poller, self._share, self._send_late, self._disconnect, self._log
        )
        self._queue = self._queues()
        # Of what is done in the hot loop. Longer reads may get hole chunks.
        self._longest = HOLES_FROM - 1 if self._structured else MAX_INLINE
        self._wanted = READABLE

    def _queues(self) -> dict[int, Callable[[Request], bool]]:
        """By request head: what nothing at once can be done for, and is submitted."""
        queues: dict[int, Callable[[Request], bool]] = {}
        if self._backend.queues_reads:
            queues[PLAIN_READ] = self._late.queue_read
        if self._backend.queues_writes and self._writable:
            queues[PLAIN_WRITE] = queues[FUA_WRITE] = self._late.queue_write
        return queues

    def _take(self, data: bytes) -> None:
        """Requests that arrived together with the last option."""
        if data:
            self._intake.put(data)
            self._want(READABLE | WRITABLE)  # writable at once: start with what is there

    def _end(self, reason: str) -> None:
        """No more requests; `run` waits for those in flight and their replies."""
        if not self._ended.is_set():
            self._log.info("%s", reason)
            self._ended.set()
            self._intake.forget()

    def _lose(self, error: OSError) -> None:
        """The socket is dead: replies are dropped, requests in flight go on."""
        self._end(f"the connection was lost: {error.strerror or error}")
        self._outbox.drop()
        self._lost = True
        self._idle.set()

    def _disconnect(self, error: OSError) -> None:
        """No reply will come; the client learns it now, though other requests may be under way."""
        self._lose(error)
        with suppress(OSError):  # it has gone itself
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _drain(self) -> None:
        while self._late.in_flight or self._outbox.pending:
            self._want(WRITABLE if self._outbox.pending else 0)
            self._idle = trio.Event()
            await self._idle.wait()

    def _want(self, events: int) -> None:
        if events != self._wanted:
            self._wanted = events
            self._poller.want(self._sock.fileno(), events)

    def _on_event(self) -> int:
        """The socket is ready for what was wanted, or may be. Never raises.

        Returns how many requests were done; 0 if there is nothing more to do at once.
        """
        try:
            if self._outbox.pending:
                self._outbox.resume()
            if self._outbox.pending:
                self._want(WRITABLE)
            elif self._ended.is_set():
                self._want(0)
                self._idle.set()
            else:
                return self._step()
        except ProtocolError as error:
            self._end(str(error))
        except OSError as error:
            self._lose(error)
        except Exception as error:
            # A bug of ours; the other clients shall not suffer from it.
            self._log.exception("internal error")
            self._lose(OSError(errno.EIO, f"internal error: {error!r}"))
        return 0

    def _step(self) -> int:
        """One batch: of requests left over, else of bytes at hand, else of what the socket has."""
        if self._late.full:
            self._want(0)  # _send_late wakes us
            return 0
        intake = self._intake
        if not intake.requests:
            arrived = intake.receive()
            if arrived is END:
                # It may have closed its sending half only and still be waiting for replies.
                self._end("the client closed the connection")
            elif arrived is not BYTES:
                self._want(READABLE if arrived is NOTHING else 0)  # or _granted wakes us
            if not intake.requests:
                if arrived is not NOTHING or intake.holds:
                    intake.settle()
                return arrived is BYTES
        stop = intake.affordable() if self._budget.short else len(intake.requests)
        if not stop:
            self._want(0)  # _granted wakes us
            intake.settle()
            return 0
        with self._plug():
            done = self._execute(stop)
        intake.settle()
        self._outbox.settle()
        if self._outbox.pending:
            self._want(WRITABLE)
        return 0 if self._outbox.pending or self._ended.is_set() else done

    def _execute(self, stop: int) -> int:
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
            if outbox.pending or late.full or self._ended.is_set():
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

    # --- late requests -------------------------------------------------------------------------

    def _start_late(self, request: Request, miss: Miss | None = None) -> None:
        payload = request[4]
        data: memoryview | bytes | None = payload
        if payload is not None:
            if len(payload) < PINS_FROM:
                data = bytes(payload)
            else:
                self._intake.pin()
        self._late.start(request, data, miss)

    def _send_late(self, reply: Sequence[Buffer], buffer: memoryview | None) -> None:
        """A late request is done. Never raises."""
        if buffer is not None:
            self._outbox.lend(buffer)
        if not self._poller.in_round:
            self._replies += reply
            self._send_replies()
            return
        if not self._replies:
            self._poller.soon(self._send_replies)
        self._replies += reply

    def _send_replies(self) -> None:
        """What late requests answered, all that came together. Never raises."""
        reply, self._replies = self._replies, []
        if self._lost:
            self._outbox.drop()
            self._late.release()
            self._idle.set()
            return
        try:
            self._outbox.send_all(reply)
        except OSError as error:
            self._lose(error)
        self._late.release()
        if self._ended.is_set():
            self._idle.set()
        elif self._outbox.pending:
            self._want(WRITABLE)
        elif self._wanted == 0:
            self._want(READABLE | WRITABLE)  # writable at once: go on with what was left over

    # --- memory --------------------------------------------------------------------------------

    def _granted(self) -> None:
        """The budget has what we waited for."""
        if self._wanted == 0:
            self._want(READABLE | WRITABLE)

    def _owes(self) -> bool | None:
        """None if the client waits for us, else whether it has said goodbye."""
        if self._outbox.pending:
            return self._ended.is_set() or _has_said_goodbye(self._sock)
        return False if self._intake.incomplete and self._wanted & READABLE else None

    def _drop(self, reason: str) -> None:
        self._lose(OSError(errno.ETIMEDOUT, f"the client {reason}"))


def _has_said_goodbye(sock: socket.socket) -> bool:
    """Whether the client has closed its sending half, behind requests that we do not receive."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
