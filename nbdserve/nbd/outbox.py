"""Bytes on their way to a client: sent at once as far as the socket takes them, the rest kept.

Synchronous. Whoever uses it waits for the socket to become writable and calls `resume`; while
anything is kept nothing else may be sent past it, so the stream of replies stays in order. Kept
buffers are views, not copies, of two kinds of memory that must go back when nothing is kept any
more: the buffer that a batch's replies are packed into (`page`), and those of the drive's pool
that late requests were read into (`lend`).

Law of memory: all that is kept is counted in the connection's share of the budget. When the server
is short, and little is kept of a page, it is copied, so that the page can be used by others.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nbdserve.nbd.budget import SMALL

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from nbdserve.block.buffers import BufferPool
    from nbdserve.block.node import Buffer
    from nbdserve.nbd.budget import Share
    from nbdserve.nbd.scratch import Scratch

__all__ = ["Outbox"]

# Buffers for one sendmsg; the kernel refuses more than 1024 (UIO_MAXIOV).
MAX_IOV = 256

# Up to so many bytes of a page are copied.
COPIED = 2 * SMALL


class Outbox:
    """What a non-blocking socket has not taken yet. All methods raise the OSError of a dead one.

    `pending`: whether something waits for the socket; an attribute, not a property, as it is looked
    at for each request.
    """

    def __init__(
        self, sock: socket.socket, pages: Scratch, pool: BufferPool, share: Share
    ) -> None:
        self.pending = False
        self._sock = sock
        self._kept: deque[memoryview] = deque()
        self._nb_kept = 0
        self._pages = pages
        self._page: memoryview | None = None
        self._pool = pool
        self._lent: list[memoryview] = []
        self._share = share

    def page(self) -> memoryview:
        """Where to pack replies, if nothing is pending; after `send`ing them call `settle`."""
        if self._page is None:
            self._page = self._pages.take()
        return self._page

    def settle(self) -> None:
        """No more is packed for now: the page goes back, or what it holds is counted."""
        if not self.pending:
            if self._page is not None:
                self._give_page()
            return
        if self._share.short and self._page is not None and self._nb_kept <= COPIED:
            self._kept = deque(memoryview(bytes(buffer)) for buffer in self._kept)
            self._give_page()
        self._count()

    def lend(self, buffer: memoryview) -> None:
        """The pool's, that something sent from now on points into."""
        self._lent.append(buffer)

    def send(self, buffer: memoryview) -> None:
        """Send one buffer."""
        sent = 0
        if not self._kept:
            try:
                sent = self._sock.send(buffer)
            except BlockingIOError:
                sent = 0
        if sent != len(buffer):
            self._keep([buffer[sent:]])

    def send_all(self, buffers: Sequence[Buffer]) -> None:
        """Send several buffers, one after the other."""
        if not self._kept and len(buffers) <= MAX_IOV:
            # What the kernel takes at once, which is nearly always all, needs no views.
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                sent = 0
            if sent == sum(map(len, buffers)):
                self._give_lent()
                return
            self._keep(buffers)
            self._took(sent)
        else:
            waiting = self.pending
            self._keep(buffers)
            if not waiting:
                self.resume()
        self._count()

    def resume(self) -> None:
        """Send what is kept until the socket takes no more."""
        kept = self._kept
        while kept:
            buffers = [kept[number] for number in range(min(len(kept), MAX_IOV))]
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                break
            self._share.moved += sent
            if not self._took(sent):
                break
        self._count()

    def drop(self) -> None:
        """The socket is dead: forget what it was to take."""
        self._kept.clear()
        self._nb_kept = 0
        self.pending = False
        self._count()

    def _keep(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            if buffer:
                self._kept.append(memoryview(buffer))
                self._nb_kept += len(buffer)
        self.pending = bool(self._kept)

    def _took(self, sent: int) -> bool:
        """So many bytes of what is kept are gone; False: it ended within a buffer."""
        kept = self._kept
        self._nb_kept -= sent
        while sent:
            length = len(kept[0])
            if sent < length:
                kept[0] = kept[0][sent:]
                return False
            sent -= length
            kept.popleft()
        self.pending = bool(kept)
        return True

    def _count(self) -> None:
        """What is held: the whole of a page, of which little may be kept, and all else."""
        if self.pending:
            page = 0 if self._page is None else len(self._page)
            self._share.set_outgoing(max(page, self._nb_kept))
            return
        self._share.set_outgoing(0)
        if self._page is not None:
            self._give_page()
        self._give_lent()

    def _give_page(self) -> None:
        assert self._page is not None
        self._pages.give(self._page)
        self._page = None

    def _give_lent(self) -> None:
        for buffer in self._lent:
            self._pool.give(buffer)
        self._lent.clear()
