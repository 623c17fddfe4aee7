"""From received bytes to requests: the batch parser of the transmission phase.

Law: bytes are received once, in place, and never moved but for what is left of an incomplete
request at the end of the buffer. A WRITE's payload is a view of the receive buffer. `parse` takes
all complete requests of a `recv` at once: one call per batch, no object per request but a tuple.

A request that does not fit gets a buffer of its own size for as long as it takes to receive it.
Bad magic, or a payload longer than we announced, raises ProtocolError: the stream cannot be
followed any further (NBD protocol, "Request message"). What came before is returned first, so that
it does not depend on how the bytes were split which requests are seen.
"""

from __future__ import annotations

from nbdserve.nbd.export import MAXIMUM_PAYLOAD
from nbdserve.nbd.proto import REQUEST_MAGIC, Command, CommandFlag
from nbdserve.nbd.wire import REQUEST_HEAD

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

# Large enough for some 256 KiB writes on the way, small enough to stay in the processor's cache.
CAPACITY = 1 << 20

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
    """Bytes received and not parsed yet: `_view[_start:_end]`."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(CAPACITY))
        self._start = 0
        self._end = 0
        self._needed = HEADER_SIZE  # bytes the next request takes, as far as known
        self._pinned = False

    def room(self) -> memoryview:
        """Where to receive into; payloads of earlier batches are overwritten unless pinned."""
        if self._pinned or self._needed > len(self._view) - self._start or self._is_oversized():
            self._move()
        return self._view[self._end :]

    def received(self, nb_bytes: int) -> None:
        """That many bytes were put into `room()`."""
        self._end += nb_bytes

    def pin(self) -> None:
        """Payloads of this batch are kept: receive into another buffer from now on."""
        self._pinned = True

    def parse(self, limit: int) -> list[Request]:
        """The complete requests at hand, at most `limit` of them.

        Raises ProtocolError where no request can follow, after all before it have been returned.
        """
        view, start, end = self._view, self._start, self._end
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
        self._start, self._needed = start, needed
        if start == end:
            self._start = self._end = 0
        return requests

    def _is_oversized(self) -> bool:
        return len(self._view) > CAPACITY and self._needed <= CAPACITY

    def _move(self) -> None:
        """Bring the incomplete request to the front, of another buffer if this one will not do."""
        rest = self._view[self._start : self._end]
        size = max(CAPACITY, self._needed)
        if self._pinned or size != len(self._view):
            view = memoryview(bytearray(size))
            self._pinned = False
        else:
            view = self._view
        view[: len(rest)] = rest  # memmove: may overlap
        self._view, self._start, self._end = view, 0, len(rest)
