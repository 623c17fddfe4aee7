"""From received bytes to requests: the batch parser of the transmission phase.

Law: bytes are received once, in place, and never moved but for what is left of an incomplete
request at the end of the buffer. A WRITE's payload is a view of the receive buffer. `parse` takes
all complete requests of a `recv` at once: one call per batch, no object per request but a tuple.

A request that does not fit gets a buffer of its own size for as long as it takes to receive it.
Who has nothing to keep holds no buffer (`settle`), and who has little a copy of it: so a client
that is silent, or sends a byte at a time, costs what it has sent.
Bad magic, or a payload longer than we announced, raises ProtocolError: the stream cannot be
followed any further (NBD protocol, "Request message"). What came before is returned first, so that
it does not depend on how the bytes were split which requests are seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.nbd.budget import CAPACITY, SMALL
from nbdserve.nbd.export import MAXIMUM_PAYLOAD
from nbdserve.nbd.proto import REQUEST_MAGIC, Command, CommandFlag
from nbdserve.nbd.scratch import new_buffer
from nbdserve.nbd.wire import REQUEST_HEAD

if TYPE_CHECKING:
    from nbdserve.nbd.scratch import Scratch

__all__ = [
    "FUA_WRITE",
    "PLAIN_READ",
    "PLAIN_WRITE",
    "ProtocolError",
    "Request",
    "RequestBuffer",
    "command_name",
    "command_of",
    "flags_of",
]

Request = tuple[int, int, int, int, memoryview | None]
"""head, cookie, offset, length, payload (of a WRITE). The head is magic, flags and command in one
number: what is done most, a READ or WRITE without flags, is recognized by one comparison.
`flags_of` and `command_of` take it apart."""

PLAIN_READ = REQUEST_MAGIC << 32
PLAIN_WRITE = PLAIN_READ | int(Command.WRITE)
FUA_WRITE = PLAIN_WRITE | int(CommandFlag.FUA) << 16

# Left over bytes up to which they are copied and the buffer goes back at once, and a payload from
# which on it keeps the buffer it came in: at most one can.
COPIED = 4096
PINS_FROM = CAPACITY // 2 + 1

HEADER_SIZE = REQUEST_HEAD.size
_WRITE = int(Command.WRITE)
_NAMES = {int(command): command.name for command in Command}
_unpack_from = REQUEST_HEAD.unpack_from


def flags_of(head: int) -> int:
    """The command flags."""
    return head >> 16 & 0xFFFF


def command_of(head: int) -> int:
    """The request type."""
    return head & 0xFFFF


def command_name(request: Request) -> str:
    """For messages."""
    command = command_of(request[0])
    return _NAMES.get(command, f"command {command}")


class ProtocolError(Exception):
    """The client does not speak NBD; the connection is closed."""


class RequestBuffer:
    """Bytes received and not parsed yet: `_view[_start:_end]`. `needed` is what the next request
    takes, as far as known; `held` the size of what is kept until more comes."""

    def __init__(self, scratch: Scratch) -> None:
        """`scratch`: of buffers of CAPACITY."""
        self.needed = HEADER_SIZE
        self._scratch = scratch
        self._view: memoryview | None = None
        self._start = 0
        self._end = 0
        self._pinned = False

    def room(self) -> memoryview:
        """Where to receive into; payloads of earlier batches are overwritten unless pinned."""
        view = self._view
        if view is None:
            view = self._view = self._scratch.take()
        elif self._pinned or self.needed > len(view) - self._start or self._is_oversized(view):
            view = self._move(view)
        return view[self._end :]

    def received(self, nb_bytes: int) -> None:
        """That many bytes were put into `room()`."""
        self._end += nb_bytes

    def pin(self) -> None:
        """Payloads of this batch are kept: receive into another buffer from now on."""
        self._pinned = True

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return 0 if self._view is None else len(self._view)

    @property
    def incomplete(self) -> bool:
        """Whether the client has sent a part of a request."""
        return self._end > self._start

    def settle(self, *, sparing: bool = False) -> None:
        """All requests that were parsed are executed: keep no more than is needed.

        `sparing`: even if the rest is going to be copied back and forth.
        """
        view, rest = self._view, self._end - self._start
        if view is None:
            return
        if not rest:
            self._let_go(view)
            self._view = None
        elif rest <= (SMALL if sparing else COPIED) and len(view) > rest:
            self._view = memoryview(bytes(view[self._start : self._end]))
            self._start, self._end = 0, rest
            self._let_go(view)

    def put_back(self) -> None:
        """Nothing was received into `room`, and nothing is kept."""
        if self._view is not None:
            self._scratch.give(self._view)
            self._view = None

    def drop(self) -> None:
        """Forget what was received. Payloads that were parsed stay what they are."""
        self._view = None
        self._start = self._end = 0

    def parse(self, limit: int) -> list[Request]:
        """The complete requests at hand, at most `limit` of them.

        Raises ProtocolError where no request can follow, after all before it have been returned.
        """
        view, start, end = self._view, self._start, self._end
        if view is None:
            return []
        requests: list[Request] = []
        needed = HEADER_SIZE
        broken = ""
        while end - start >= HEADER_SIZE and len(requests) < limit:
            head, cookie, offset, length = _unpack_from(view, start)
            if head == PLAIN_READ:
                start += HEADER_SIZE
                requests.append((head, cookie, offset, length, None))
                continue
            if head >> 32 != REQUEST_MAGIC:
                broken = f"bad request magic {head >> 32:#x}"
                break
            payload = None
            if head & 0xFFFF == _WRITE:
                if length > MAXIMUM_PAYLOAD:
                    broken = f"WRITE of {length} bytes is over {MAXIMUM_PAYLOAD}"
                    break
                needed = HEADER_SIZE + length
                if end - start < needed:
                    break
                payload = view[start + HEADER_SIZE : start + needed]
            requests.append((head, cookie, offset, length, payload))
            start += needed
            needed = HEADER_SIZE
        if broken and not requests:
            raise ProtocolError(broken)
        self._start, self.needed = start, needed
        if start == end:
            self._start = self._end = 0
        return requests

    def _is_oversized(self, view: memoryview) -> bool:
        return len(view) > CAPACITY and self.needed <= CAPACITY

    def _move(self, view: memoryview) -> memoryview:
        """Bring the incomplete request to the front, of another buffer if this one will not do."""
        rest = view[self._start : self._end]
        size = max(CAPACITY, self.needed)
        if self._pinned or size != len(view):
            moved = self._scratch.take() if size == CAPACITY else new_buffer(size)
            moved[: len(rest)] = rest
            self._let_go(view)
        else:
            moved = view
            moved[: len(rest)] = rest  # memmove: may overlap
        self._view, self._start, self._end = moved, 0, len(rest)
        return moved

    def _let_go(self, view: memoryview) -> None:
        if len(view) == CAPACITY and not self._pinned:
            self._scratch.give(view)
        self._pinned = False
