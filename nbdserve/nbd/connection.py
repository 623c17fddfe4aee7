"""One client: handshake, then batches of requests until it leaves.

The handshake is an ordinary coroutine. In transmission the poller calls `_on_event`, which is
synchronous: receive, parse all complete requests, execute each (nbd/batch.py), send all replies.
What cannot be answered at once is late (nbd/late.py), and its reply is sent when it comes, in any
order.

Law: while a client does not read its replies, or has too many late requests, nothing more is
received from it; and what it makes us hold is counted in the server's budget (nbd/budget.py). A
client that sends nonsense, or vanishes, ends its own connection and no other.
"""

from __future__ import annotations

import errno
import select
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from nbdserve.nbd.batch import Executor
from nbdserve.nbd.intake import Arrived, Intake
from nbdserve.nbd.late import LateRequests
from nbdserve.nbd.negotiate import negotiate
from nbdserve.nbd.outbox import Outbox
from nbdserve.nbd.poller import READABLE, WRITABLE
from nbdserve.nbd.requests import ProtocolError

if TYPE_CHECKING:
    import logging
    from collections.abc import Sequence

    from nbdserve.block.node import Buffer
    from nbdserve.nbd.budget import Budget
    from nbdserve.nbd.export import Export
    from nbdserve.nbd.handshake import Transmission
    from nbdserve.nbd.poller import Poller

__all__ = ["Connection"]

BYTES, NOTHING, END = Arrived.BYTES, Arrived.NOTHING, Arrived.END


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
            "structured_replies": self._session.structured_replies,
            "in_flight": self._late.in_flight,
            **self._late.account.statistics(),
        }

    # --- transmission --------------------------------------------------------------------------

    def _begin(self, session: Transmission) -> None:
        self._session = session
        self._backend = session.export.backend
        self._plug = self._backend.plug
        self._share = self._budget.open(self._granted, self._owes, self._drop)
        self._intake = Intake(self._sock, self._budget, self._share)
        pool = self._backend.buffers
        self._outbox = Outbox(self._sock, self._budget.sending, pool, self._share)
        self._replies: list[Buffer] = []  # of late requests, not given to the outbox yet
        self._late = LateRequests(
            session, self._poller, self._share, self._send_late, self._disconnect, self._log
        )
        self._execute = Executor(
            session, self._intake, self._outbox, self._late, self._budget, self._log,
            end=self._end, lose=self._lose, has_ended=self._ended.is_set,
        ).execute  # fmt: skip
        self._wanted = READABLE

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

    # --- late requests -------------------------------------------------------------------------

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
