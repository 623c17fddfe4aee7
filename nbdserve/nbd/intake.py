"""The receive side of a connection: bytes from the socket, requests that wait to be executed.

Law of memory: what has been received and not executed is counted in the connection's share of the
budget, and when the server is short no more is received than its share allows. `receive` and
`affordable` then say that it must wait, and the share wakes the connection. Who has nothing to
keep holds nothing.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from nbdserve.nbd.budget import CAPACITY, SMALL
from nbdserve.nbd.export import MAXIMUM_PAYLOAD
from nbdserve.nbd.proto import Command
from nbdserve.nbd.requests import Request, RequestBuffer, command_of

if TYPE_CHECKING:
    import socket

    from nbdserve.nbd.budget import Budget, Share

__all__ = ["Arrived", "Intake"]

# Requests taken from one connection before another has its turn.
BATCH = 128

READ = int(Command.READ)


class Arrived(Enum):
    """What `receive` found."""

    BYTES = auto()
    NOTHING = auto()  # the socket is empty
    END = auto()
    HELD_BACK = auto()  # not asked: the budget has no memory for what comes next


BYTES, NOTHING, END, HELD_BACK = Arrived


class Intake:
    """`requests`: parsed and not executed yet, in order. `holds`: there may be something that was
    received; else there is nothing to settle."""

    def __init__(self, sock: socket.socket, budget: Budget, share: Share) -> None:
        self.requests: list[Request] = []
        self.holds = False
        self._sock = sock
        self._budget = budget
        self._share = share
        self._buffer = RequestBuffer(budget.receiving)
        self._copied = 0  # bytes of payloads of `requests` that are not in the buffer any more

    @property
    def incomplete(self) -> bool:
        """Whether the client has sent a part of a request."""
        return not self.requests and self._buffer.incomplete

    def put(self, data: bytes) -> None:
        """Bytes that were received otherwise, before anything else was."""
        self._buffer.room()[: len(data)] = data
        self._buffer.received(len(data))
        self.settle()

    def receive(self) -> Arrived:
        """The next batch of `requests`, which must all be executed: of what is at hand, else of
        what the socket has.

        :raises ProtocolError: what comes next is no request.
        :raises OSError: the socket is dead.
        """
        buffer = self._buffer
        if self.holds:
            self.requests = buffer.parse(BATCH)
            if self.requests:
                return BYTES
        room = self._room()
        if room is None:
            return HELD_BACK
        try:
            received = self._sock.recv_into(room)
        except BlockingIOError:
            if not self.holds:  # asked again and again while we spin, so at least cost
                buffer.put_back()
            return NOTHING
        self.holds = True
        if not received:
            return END
        buffer.received(received)
        self.requests = buffer.parse(BATCH)
        if not self.requests:
            self._share.moved += received
        return BYTES

    def _room(self) -> memoryview | None:
        """Where to receive into; None: not before others hold less."""
        buffer, short = self._buffer, self._budget.short
        if short or buffer.needed > CAPACITY:
            more = buffer.needed - buffer.held
            if more > SMALL and not self._share.may_take(more):
                return None
        room = buffer.room()
        return room[:SMALL] if short else room

    def affordable(self) -> int:
        """How many of `requests` the server, which is short, has the memory for.

        A WRITE's payload has been received, so there is nothing to wait for.
        """
        for number, (head, _, _, length, _) in enumerate(self.requests):
            if SMALL < length <= MAXIMUM_PAYLOAD and command_of(head) == READ:
                return number or int(self._share.may_take(length))
        return len(self.requests)

    def executed(self, number: int) -> None:
        """So many are done."""
        self.requests = self.requests[number:] if number < len(self.requests) else []

    def pin(self) -> None:
        """A payload is kept until its request is done."""
        self._buffer.pin()

    def settle(self) -> None:
        """Until the next turn hold what must be held, and count it."""
        share, buffer = self._share, self._buffer
        if not self.requests:
            self._copied = 0
            buffer.settle(sparing=share.short)
        elif share.short and buffer.held > SMALL:
            self._spare()
        held = buffer.held + self._copied
        self.holds = held > 0
        share.set_incoming(held)
        if share.granted:
            share.used()

    def _spare(self) -> None:
        """Keep copies of a few payloads instead of the whole buffer."""
        nb_bytes = sum(len(payload) for *_, payload in self.requests if payload is not None)
        if nb_bytes > SMALL:
            return
        self.requests = [
            (head, cookie, offset, length, payload and memoryview(bytes(payload)))
            for head, cookie, offset, length, payload in self.requests
        ]
        self._copied = nb_bytes
        self._buffer.settle(sparing=True)

    def forget(self) -> None:
        """Nothing more is going to be executed, nor received."""
        self.requests = []
        self._buffer.drop()
        self.settle()
