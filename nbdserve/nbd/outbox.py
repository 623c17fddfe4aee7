"""Bytes on their way to a client: sent at once as far as the socket takes them, the rest kept.

Synchronous. Whoever uses it waits for the socket to become writable and calls `resume`; while
anything is kept nothing else may be sent past it, so the stream of replies stays in order. Kept
buffers are views, not copies: a caller that reuses a buffer must wait until `pending` is false.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from nbdserve.block.node import Buffer

__all__ = ["Outbox"]

# Buffers for one sendmsg; the kernel refuses more than 1024 (UIO_MAXIOV).
MAX_IOV = 256


class Outbox:
    """What a non-blocking socket has not taken yet. All methods raise the OSError of a dead one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._kept: deque[memoryview] = deque()

    @property
    def pending(self) -> bool:
        """Whether something waits for the socket."""
        return bool(self._kept)

    def send(self, buffer: memoryview) -> None:
        """Send one buffer."""
        if self._kept:
            self._kept.append(buffer)
            return
        try:
            sent = self._sock.send(buffer)
        except BlockingIOError:
            sent = 0
        if sent != len(buffer):
            self._kept.append(buffer[sent:])

    def send_all(self, buffers: Sequence[Buffer]) -> None:
        """Send several buffers, one after the other."""
        if not self._kept and len(buffers) <= MAX_IOV:
            # What the kernel takes at once, which is nearly always all, needs no views.
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                sent = 0
            if sent == sum(map(len, buffers)):
                return
            self._kept.extend(memoryview(buffer) for buffer in buffers if buffer)
            self._took(sent)
            return
        waiting = bool(self._kept)
        self._kept.extend(memoryview(buffer) for buffer in buffers if buffer)
        if not waiting:
            self.resume()

    def resume(self) -> None:
        """Send what is kept until the socket takes no more."""
        kept = self._kept
        while kept:
            buffers = [kept[number] for number in range(min(len(kept), MAX_IOV))]
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                return
            if not self._took(sent):
                return

    def _took(self, sent: int) -> bool:
        """So many bytes of what is kept are gone; False: it ended within a buffer."""
        kept = self._kept
        while sent:
            length = len(kept[0])
            if sent < length:
                kept[0] = kept[0][sent:]
                return False
            sent -= length
            kept.popleft()
        return True

    def drop(self) -> None:
        """The socket is dead: forget what it was to take."""
        self._kept.clear()
