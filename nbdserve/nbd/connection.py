"""One client: handshake, then batches of requests until it leaves.

The handshake is an ordinary coroutine. In transmission the poller calls `_on_event`, which is
synchronous: receive, parse all complete requests, execute each, send all replies. A request that
can be answered at once costs no task, no await and no object of its own; its reply is packed into
the one outgoing buffer. Everything else is late (nbd/late.py), and its reply is sent when it comes,
in any order.

Law: while a client does not read its replies, or has too many late requests, nothing more is
received from it. A client that sends nonsense, or vanishes, ends its own connection and no other.
"""

from __future__ import annotations

import errno
from time import perf_counter_ns
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import MAX_INLINE
from nbdserve.nbd import replies
from nbdserve.nbd.commands import HOLES_FROM, hole_chunk, read_reply_head
from nbdserve.nbd.handshake import Handshake, Transmission
from nbdserve.nbd.late import LateRequests
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
    PLAIN_READ,
    PLAIN_WRITE,
    ProtocolError,
    Request,
    RequestBuffer,
    command_name,
    command_of,
    flags_of,
)
from nbdserve.nbd.validate import Validator
from nbdserve.nbd.wire import OFFSET_DATA_CHUNK, SIMPLE_REPLY

if TYPE_CHECKING:
    import logging
    import socket
    from collections.abc import Callable, Sequence

    from nbdserve.block.node import Buffer
    from nbdserve.block.run import Miss
    from nbdserve.nbd.export import Export
    from nbdserve.nbd.poller import Poller

__all__ = ["Connection"]

# Seconds a client may take to negotiate; as QEMU since 9.1 (NBD_DEFAULT_HANDSHAKE_MAX_SECS).
HANDSHAKE_TIMEOUT = 10.0

# Bytes received at a time in the handshake; fit into an empty RequestBuffer.
HANDSHAKE_RECEIVE = 1 << 16

# Requests taken from one connection before another has its turn.
BATCH = 128

# Replies are sent when that many bytes have come together: what the client's cache still holds.
SEND_AT = 256 << 10

# Pieces of data and zeroes in one long read that are answered inline, and room for their heads.
MAX_PIECES = 256
CHUNK_ROOM = MAX_PIECES * 32 + 4096

# A payload below this is copied if its request must wait; a larger one keeps its receive buffer.
COPY_BELOW = 64 << 10

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
        log: logging.Logger,
    ) -> None:
        self.negotiated = False
        self._sock = sock
        self._exports = exports
        self._poller = poller
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
            session, trailing = await self._negotiate()
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
            self._return_buffers()
            self._poller.unregister(self._sock.fileno())
            self._late.close_account()

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

    async def _negotiate(self) -> tuple[Transmission | None, bytes]:
        handshake = Handshake(self._exports)
        with self._handshake_scope:
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                await self._send_all(handshake.greeting())
                while handshake.outcome is None:
                    await trio.lowlevel.wait_readable(self._sock)
                    try:
                        data = self._sock.recv(HANDSHAKE_RECEIVE)
                    except BlockingIOError:
                        continue
                    if not data:
                        return None, b""
                    await self._send_all(handshake.receive(data))
                if isinstance(handshake.outcome, Transmission):
                    return handshake.outcome, handshake.trailing
                self._log.info("handshake: %s", handshake.outcome.reason)
                return None, b""
            self._log.info("handshake: not finished after %g s", HANDSHAKE_TIMEOUT)
        return None, b""

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    # --- transmission --------------------------------------------------------------------------

    def _begin(self, session: Transmission) -> None:
        self._session = session
        self._backend = session.export.backend
        self._plug = self._backend.plug
        self._validate = Validator.of(session).validate
        self._structured = session.structured_replies
        self._size = session.size
        self._writable = TransmissionFlag.READ_ONLY not in session.flags
        self._buffer = RequestBuffer()
        self._requests: list[Request] = []  # parsed; those from _next on are not executed yet
        self._next = 0
        self._out = bytearray(SEND_AT + MAX_INLINE + CHUNK_ROOM)
        self._out_view = memoryview(self._out)
        self._outbox = Outbox(self._sock)
        self._replies: list[Buffer] = []  # of late requests, not given to the outbox yet
        self._lent: list[memoryview] = []  # buffers that replies on their way point into
        self._late = LateRequests(session, self._poller, self._send_late, self._log)
        self._queue = self._queues()
        # Of what is done in the hot loop. Longer reads may get hole chunks.
        self._longest = HOLES_FROM - 1 if self._structured else MAX_INLINE
        self._wanted = READABLE
        self._received = False

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
            self._buffer.room()[: len(data)] = data
            self._buffer.received(len(data))
            self._want(READABLE | WRITABLE)  # writable at once: start with what is there

    def _end(self, reason: str) -> None:
        """No more requests; `run` waits for those in flight and their replies."""
        if not self._ended.is_set():
            self._log.info("%s", reason)
            self._ended.set()
            self._requests = []

    def _lose(self, error: OSError) -> None:
        """The socket is dead: replies are dropped, requests in flight go on."""
        self._end(f"the connection was lost: {error.strerror or error}")
        self._outbox.drop()
        self._return_buffers()
        self._lost = True
        self._idle.set()

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
                if not self._outbox.pending:
                    self._return_buffers()
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
        if self._next >= len(self._requests):
            self._requests = self._buffer.parse(BATCH) or self._receive()
            self._next = 0
            if not self._requests:
                self._want(READABLE)
                return self._received
        first = self._next
        with self._plug():
            self._execute()
        if self._outbox.pending:
            self._want(WRITABLE)
        return 0 if self._outbox.pending or self._ended.is_set() else self._next - first

    def _receive(self) -> list[Request]:
        self._received = False
        try:
            received = self._sock.recv_into(self._buffer.room())
        except BlockingIOError:
            return []
        self._received = True
        if not received:
            # It may have closed its sending half only and still be waiting for replies.
            self._end("the client closed the connection")
            return []
        self._buffer.received(received)
        return self._buffer.parse(BATCH)

    def _execute(self) -> None:
        """The hot loop: execute the parsed requests in order, their replies side by side."""
        requests, position = self._requests, self._next
        out, view, fill = self._out, self._out_view, 0
        structured, size, writable = self._structured, self._size, self._writable
        # For the account. Reads are not counted, they are what is left: of the requests those that
        # are neither writes nor `others`, of the bytes sent those that are no heads and not theirs.
        first = position
        others = others_sent = sent = nb_writes = written = 0
        head_size = OFFSET_DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        longest = self._longest
        read_nowait, write_nowait = self._backend.read_nowait, self._backend.write_nowait
        outbox, late, queue = self._outbox, self._late, self._queue
        late.began = began = perf_counter_ns()
        while position < len(requests):
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
                    miss = read_nowait(offset, view[start : start + length])
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
                    before, fill = fill, self._special(request, fill)
                    others += 1
                    others_sent += fill - before
            except OSError as error:
                reply = late.failure(request, error, late.began)
                fill = self._put(fill, reply)
                others += 1
                others_sent += len(reply)
            if fill >= SEND_AT:
                self._send(view[:fill])
                sent += fill
                fill = 0
            if outbox.pending or late.full or self._ended.is_set():
                break
        self._next = position
        if fill:
            self._send(view[:fill])
        nanoseconds = perf_counter_ns() - began
        if nb_writes:
            late.writes.add(nb_writes, written, nanoseconds)
            others += nb_writes
            others_sent += nb_writes * SIMPLE_REPLY.size
        nb_reads = position - first - others
        if nb_reads:
            nb_bytes = sent + fill - others_sent - nb_reads * head_size
            late.reads.add(nb_reads, nb_bytes, nanoseconds)

    def _send(self, buffer: memoryview) -> None:
        try:
            self._outbox.send(buffer)
        except OSError as error:  # what was done is counted all the same
            self._lose(error)

    def _put(self, fill: int, reply: bytes) -> int:
        end = fill + len(reply)
        self._out[fill:end] = reply
        return end

    def _special(self, request: Request, fill: int) -> int:
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
            return self._put(fill, reply)
        # With a throttle not: of several pieces the first would be charged twice if a later one
        # had to wait.
        if (
            head == PLAIN_READ
            and HOLES_FROM <= length <= MAX_INLINE
            and self._structured
            and not self._backend.throttled
        ):
            return self._read_sparse(request, fill)
        if command == FLUSH and self._backend.flush_nowait():
            self._late.answered(request)
            return self._put(fill, replies.done(cookie, structured=False))
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

    def _read_sparse(self, request: Request, fill: int) -> int:
        """A long read: a chunk for each piece of data or zeroes."""
        _, cookie, offset, length, _ = request
        pieces = self._backend.map_nowait(offset, length)
        if pieces is None or len(pieces) > MAX_PIECES:
            self._start_late(request)
            return fill
        end = offset + length
        position = fill
        for is_hole, nb_bytes in pieces:
            last = offset + nb_bytes == end
            if is_hole:
                position = self._put(position, hole_chunk(cookie, offset, nb_bytes, last=last))
            else:
                position = self._put(
                    position, read_reply_head(cookie, offset, nb_bytes, structured=True, last=last)
                )
                miss = self._backend.read_nowait(
                    offset, self._out_view[position : position + nb_bytes]
                )
                if miss is not None:
                    self._start_late(request, miss)
                    return fill
                position += nb_bytes
            offset += nb_bytes
        self._late.answered(request)
        return position

    # --- late requests -------------------------------------------------------------------------

    def _start_late(self, request: Request, miss: Miss | None = None) -> None:
        payload = request[4]
        data: memoryview | bytes | None = payload
        if payload is not None:
            if len(payload) < COPY_BELOW:
                data = bytes(payload)
            else:
                self._buffer.pin()
        self._late.start(request, data, miss)

    def _send_late(self, reply: Sequence[Buffer], buffer: memoryview | None) -> None:
        """A late request is done. Never raises."""
        if buffer is not None:
            self._lent.append(buffer)
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
            self._return_buffers()
            self._idle.set()
            return
        try:
            self._outbox.send_all(reply)
        except OSError as error:
            self._lose(error)
        if not self._outbox.pending:
            self._return_buffers()
        if self._ended.is_set():
            self._idle.set()
        elif self._outbox.pending:
            self._want(WRITABLE)
        elif self._wanted == 0:
            self._want(READABLE | WRITABLE)  # writable at once: go on with what was left over

    def _return_buffers(self) -> None:
        """Nothing that was sent, or is never going to be, points into them any more."""
        for buffer in self._lent:
            self._backend.buffers.give(buffer)
        self._lent.clear()
