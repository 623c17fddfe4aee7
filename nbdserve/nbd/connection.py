"""One client: handshake, then batches of requests until it leaves.

The only module of the front end that does I/O. The handshake is an ordinary coroutine. In
transmission the poller calls `_on_event`, which is synchronous: receive, parse all complete
requests, execute each, send all replies. A request that can be answered at once costs no task, no
await and no object of its own; its reply is packed into the one outgoing buffer. Everything else
goes one of two ways, and its reply is sent when it comes ("late"), in any order:

* a read that only waits for the disk is queued with its leaf and answered by a callback;
* the rest runs as a task in the backend's nursery, so that a client that goes away cancels nothing.

Law of memory: at most `MAX_IN_FLIGHT` late requests and about `MAX_BYTES` of theirs exist for a
connection, and while a client does not read its replies nothing more is received from it.
"""

from __future__ import annotations

import errno
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import MAX_INLINE
from nbdserve.block.run import Miss
from nbdserve.nbd import replies
from nbdserve.nbd.commands import HANDLERS, HOLES_FROM, hole_chunk, read_reply_head
from nbdserve.nbd.handshake import Handshake, Transmission
from nbdserve.nbd.poller import READABLE, WRITABLE
from nbdserve.nbd.proto import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    ReplyType,
    TransmissionFlag,
)
from nbdserve.nbd.requests import (
    PLAIN_READ,
    PLAIN_WRITE,
    ProtocolError,
    Request,
    RequestBuffer,
    command_of,
    flags_of,
)
from nbdserve.nbd.validate import Validator
from nbdserve.nbd.wire import OFFSET_DATA_CHUNK, SIMPLE_REPLY

if TYPE_CHECKING:
    import logging
    import socket
    from collections.abc import Sequence

    from nbdserve.nbd.export import Export
    from nbdserve.nbd.poller import Poller

__all__ = ["Connection"]

# Seconds a client may take to negotiate; as QEMU since 9.1 (NBD_DEFAULT_HANDSHAKE_MAX_SECS).
HANDSHAKE_TIMEOUT = 10.0

# Requests taken from one connection before another has its turn.
BATCH = 128

# Requests of one connection that wait for something, and their bytes. QEMU allows 16 (each costs it
# a coroutine's stack); deep queues on cold disks want more.
MAX_IN_FLIGHT = 128
MAX_BYTES = 64 << 20

# Replies are sent when that many bytes have come together: what the client's cache still holds.
SEND_AT = 256 << 10

# Pieces of data and zeroes in one long read that are answered inline, and room for their heads.
MAX_PIECES = 256
CHUNK_ROOM = MAX_PIECES * 32 + 4096

# Buffers for one sendmsg (the kernel's UIO_MAXIOV is 1024).
MAX_IOV = 64

# A payload below this is copied if its request must wait; a larger one keeps its receive buffer.
COPY_BELOW = 64 << 10

READ = int(Command.READ)
WRITE = int(Command.WRITE)
DISC = int(Command.DISC)
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
            self._poller.unregister(self._sock.fileno())

    async def _negotiate(self) -> tuple[Transmission | None, bytes]:
        handshake = Handshake(self._exports)
        with self._handshake_scope:
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                await self._send_all(handshake.greeting())
                while handshake.outcome is None:
                    await trio.lowlevel.wait_readable(self._sock)
                    try:
                        data = self._sock.recv(1 << 16)
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
        self._validate = Validator.of(session).validate
        self._structured = session.structured_replies
        self._size = session.size
        self._writable = TransmissionFlag.READ_ONLY not in session.flags
        self._buffer = RequestBuffer()
        self._requests: list[Request] = []  # parsed; those from _next on are not executed yet
        self._next = 0
        self._out = bytearray(SEND_AT + MAX_INLINE + CHUNK_ROOM)
        self._out_view = memoryview(self._out)
        self._unsent: deque[memoryview] = deque()  # what the socket had no room for, in order
        self._in_flight = 0
        self._bytes = 0
        self._received = False
        self._wanted = READABLE
        self._ended = trio.Event()
        self._idle = trio.Event()

    def _take(self, data: bytes) -> None:
        """Requests that arrived together with the last option."""
        while data and not self._ended.is_set():
            room = self._buffer.room()
            piece = data[: len(room)]
            room[: len(piece)] = piece
            self._buffer.received(len(piece))
            data = data[len(piece) :]
            self._on_event()

    def _end(self, reason: str) -> None:
        """No more requests; `run` waits for those in flight and their replies."""
        if not self._ended.is_set():
            self._log.info("%s", reason)
            self._ended.set()
            self._requests = []

    def _lost(self, error: OSError) -> None:
        """The socket is dead: replies are dropped, requests in flight go on."""
        self._end(f"the connection was lost: {error.strerror or error}")
        self._unsent.clear()
        self._sendable = False
        self._idle.set()

    _sendable = True

    async def _drain(self) -> None:
        while self._in_flight or self._unsent:
            self._want(WRITABLE if self._unsent else 0)
            self._idle = trio.Event()
            await self._idle.wait()

    def _want(self, events: int) -> None:
        if events != self._wanted:
            self._wanted = events
            self._poller.want(self._sock.fileno(), events)

    def _on_event(self) -> bool:
        """The socket is ready for what was wanted, or may be. Never raises.

        True: something was done, there may be more to do at once.
        """
        try:
            if self._unsent:
                self._send_unsent()
            if self._unsent:
                self._want(WRITABLE)
            elif self._ended.is_set():
                self._want(0)
                self._idle.set()
            else:
                return self._step()
        except ProtocolError as error:
            self._end(str(error))
        except OSError as error:
            self._lost(error)
        except Exception as error:
            # A bug of ours; the other clients shall not suffer from it.
            self._log.exception("internal error")
            self._lost(OSError(errno.EIO, f"internal error: {error!r}"))
        return False

    def _step(self) -> bool:
        """One batch: of requests left over, else of bytes at hand, else of what the socket has."""
        if self._full():
            self._want(0)  # _finish wakes us
            return False
        if self._next >= len(self._requests):
            self._requests = self._buffer.parse(BATCH) or self._receive()
            self._next = 0
            if not self._requests:
                self._want(READABLE)
                return self._received
        self._execute()
        if self._unsent:
            self._want(WRITABLE)
        return not self._unsent and not self._ended.is_set()

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

    def _full(self) -> bool:
        return self._in_flight >= MAX_IN_FLIGHT or self._bytes >= MAX_BYTES

    def _execute(self) -> None:
        """The hot loop: execute the parsed requests in order, their replies side by side."""
        requests, position = self._requests, self._next
        out, view, fill = self._out, self._out_view, 0
        structured, size, writable = self._structured, self._size, self._writable
        head_size = OFFSET_DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        longest = HOLES_FROM - 1 if structured else MAX_INLINE
        read_nowait, write_nowait = self._backend.read_nowait, self._backend.write_nowait
        while position < len(requests):
            request = requests[position]
            head, cookie, offset, length, payload = request
            position += 1
            try:
                if head == PLAIN_READ and 0 < length <= longest and offset + length <= size:
                    start = fill + head_size
                    miss = read_nowait(offset, view[start : start + length])
                    if miss is not None:
                        self._later(request, miss)
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
                    and 0 < length
                    and offset + length <= size
                    and write_nowait(offset, payload) is None  # type: ignore[arg-type]
                ):
                    _pack_simple(out, fill, SIMPLE_REPLY_MAGIC, 0, cookie)
                    fill += 16
                else:
                    fill = self._special(request, fill)
            except OSError as error:
                fill = self._put(fill, self._failure(request, error))
            if fill >= SEND_AT:
                self._send(view[:fill])
                fill = 0
            if self._unsent or self._in_flight >= MAX_IN_FLIGHT or self._ended.is_set():
                break
        self._next = position
        if fill:
            self._send(view[:fill])

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
            message = f"{_name(command)} of {length} bytes at {offset} refused"
            self._log.debug("%s: %d", message, error)
            reply = replies.error_reply(cookie, error, message, structured=self._structured)
            return self._put(fill, reply)
        if head == PLAIN_READ and HOLES_FROM <= length <= MAX_INLINE and self._structured:
            return self._read_sparse(request, fill)
        self._later(request)
        return fill

    def _read_sparse(self, request: Request, fill: int) -> int:
        """A long read: a chunk for each piece of data or zeroes."""
        _, cookie, offset, length, _ = request
        pieces = self._backend.map_nowait(offset, length)
        if pieces is None or len(pieces) > MAX_PIECES:
            self._later(request)
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
                    self._later(request, miss)
                    return fill
                position += nb_bytes
            offset += nb_bytes
        return position

    # --- late requests -------------------------------------------------------------------------

    def _later(self, request: Request, miss: Miss | None = None) -> None:
        """Start what cannot be answered at once."""
        head, cookie, offset, length, payload = request
        command = command_of(head)
        self._in_flight += 1
        self._poller.busy += 1
        nb_bytes = length if command in (READ, WRITE) else 0
        self._bytes += nb_bytes
        if miss is Miss.WOULD_BLOCK and self._queue_read(request):
            return
        data: memoryview | bytes | None = payload
        if payload is not None:
            if length < COPY_BELOW:
                data = bytes(payload)
            else:
                self._buffer.pin()
        self._backend.nursery.start_soon(self._run_late, head, cookie, offset, length, data)

    def _queue_read(self, request: Request) -> bool:
        _, cookie, offset, length, _ = request
        data = bytearray(length)

        def done(error: OSError | None) -> None:
            if error is not None:
                self._finish(length, [self._failure(request, error)])
            else:
                head = read_reply_head(cookie, offset, length, structured=self._structured)
                self._finish(length, [head, data])

        return self._backend.submit_read(offset, memoryview(data), done)

    async def _run_late(
        self, head: int, cookie: int, offset: int, length: int, payload: memoryview | bytes | None
    ) -> None:
        command = command_of(head)
        request: Request = (head, cookie, offset, length, None)
        reply: list[bytes | bytearray] = []
        try:
            reply = await HANDLERS[command](
                self._session, flags_of(head), cookie, offset, length, payload
            )
        except OSError as error:
            reply = [self._failure(request, error)]
        except Exception as error:
            self._log.exception("internal error in %s", _name(command))
            reply = [self._failure(request, OSError(errno.EIO, f"internal error: {error!r}"))]
        finally:
            self._finish(length if command in (READ, WRITE) else 0, reply)

    def _failure(self, request: Request, error: OSError) -> bytes:
        """The reply to a request that failed; the whole error goes to the log before it is
        narrowed to an NBD error value."""
        head, cookie, offset, length, _ = request
        reason = error.strerror or str(error)
        name = _name(command_of(head))
        self._log.warning("%s of %d bytes at %d: %s", name, length, offset, reason)
        return replies.error_reply(
            cookie, replies.nbd_error(error.errno), reason, structured=self._structured
        )

    def _finish(self, nb_bytes: int, reply: list[bytes | bytearray]) -> None:
        """A late request is done. Never raises."""
        was_full = self._full()
        self._in_flight -= 1
        self._bytes -= nb_bytes
        self._poller.busy -= 1
        if reply and self._sendable:
            try:
                self._send(*[memoryview(buffer) for buffer in reply])
            except OSError as error:
                self._lost(error)
        if self._ended.is_set():
            self._idle.set()
        elif self._unsent:
            self._want(WRITABLE)
        elif was_full:
            self._want(READABLE | WRITABLE)  # writable at once: go on with what was left over

    # --- sending -------------------------------------------------------------------------------

    def _send(self, *buffers: memoryview) -> None:
        """Send now what the socket takes, keep the rest. Raises the OSError of a dead socket.

        The outgoing buffer may be among `buffers`: it is not filled again before all is sent.
        """
        if self._unsent:
            self._unsent.extend(buffers)
            return
        try:
            if len(buffers) == 1:
                sent = self._sock.send(buffers[0])
            else:
                sent = self._sock.sendmsg(buffers)
        except BlockingIOError:
            sent = 0
        self._keep(buffers, sent)

    def _keep(self, buffers: Sequence[memoryview], sent: int) -> None:
        for buffer in buffers:
            if sent >= len(buffer):
                sent -= len(buffer)
            else:
                self._unsent.append(buffer[sent:])
                sent = 0

    def _send_unsent(self) -> None:
        buffers = list(islice(self._unsent, MAX_IOV))
        for _ in buffers:
            self._unsent.popleft()
        try:
            sent = self._sock.sendmsg(buffers)
        except BlockingIOError:
            sent = 0
        rest, self._unsent = self._unsent, deque()
        self._keep(buffers, sent)
        self._unsent.extend(rest)


def _name(command: int) -> str:
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"
