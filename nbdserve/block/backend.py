"""The BlockBackend: what a front end sees of a tree of nodes.

Everything that belongs to the drive and not to a node is here, once: bounds, the write cache
setting (WCE) that turns writes into FUA writes, the emulation of FUA (`_make_durable`), zero
detection, the accounts (kept here, credited by who answers: block/account.py); and the two ways of
a request.

* `*_nowait` does a request at once if its range resolves and the leaves need not wait. It makes no
  task and awaits nothing. A `Miss` means: nothing was done, take the other way.
* the coroutines of the same name do everything. They enter an epoch while they run, so that no
  host cluster they resolved to is handed out to somebody else under them (block/epoch.py).

Offsets and lengths are in bytes and lie within `size`: the front end has checked them against the
size that it told its client, and `_assert_inside` holds it to that. Errors are OSError.

After block/block-backend.c (blk_co_do_pwritev_part) and bdrv_driver_pwritev of QEMU.
"""

from __future__ import annotations

import errno
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from nbdserve.block.account import Accounts
from nbdserve.block.buffers import BufferPool
from nbdserve.block.completions import plug_of
from nbdserve.block.emulate import is_zero
from nbdserve.block.node import MAX_INLINE, Buffer, Extent, Leaf, Node
from nbdserve.block.run import READ, WRITE, WRITE_FUA, Miss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import trio

    from nbdserve.block.completions import Completions
    from nbdserve.block.epoch import Epochs

    Done = Callable[[OSError | None], None]

__all__ = ["BlockBackend"]


class BlockBackend:
    """A drive: `root` is the tree, `nursery` where requests run that outlive their client.

    `throttled`: whether requests may wait for their turn (block/throttled.py). `on_wait` is called
    with 1 when one begins to, there or at a filter above the format, and with -1 when it ends.
    """

    throttled = False

    def __init__(
        self,
        root: Node,
        epochs: Epochs,
        nursery: trio.Nursery,
        *,
        write_cache: bool,
        detect_zeroes: str = "off",
        discard: bool = True,
        direct: bool = False,
        engines: Sequence[Completions] = (),
        buffers: BufferPool | None = None,
    ) -> None:
        """`write_cache`: WCE, off in writethrough. `detect_zeroes`: off, on, unmap. `discard`:
        whether discards are passed on, else they do nothing. `direct`: the leaves can do nothing
        at once (O_DIRECT). `engines`: of all leaves; what a front end submits in `with
        backend.plug():` is handed over together. `buffers`: what the leaves use too."""
        self.root = root
        self.size = root.size
        self.read_only = root.read_only
        self.filename = root.filename
        self.nursery = nursery
        self.engines = engines
        self.plug = plug_of(engines)
        self.misses: Counter[Miss] = Counter()
        self.accounts = Accounts()
        self.on_wait: Callable[[int], object] = lambda requests: None
        self._epochs = epochs
        self._resolve = root.resolve
        self._detect_zeroes = detect_zeroes
        self._discard = discard
        self._direct = direct
        self._turn_write_cache(write_cache)
        self.buffers = buffers or BufferPool()
        self.queues_reads = direct
        """Ask `submit_read` before `read_nowait`."""
        self.queues_writes = direct and detect_zeroes == "off"
        """The same of `submit_write`."""
        # Only where requests themselves come by: a format below waits for reasons of its own.
        while root.is_filter:
            root.on_wait = lambda requests: self.on_wait(requests)
            root = root.children["file"]

    def _turn_write_cache(self, enabled: bool) -> None:
        self.write_cache = enabled
        # Writes that must be looked into, or be durable when answered, never take the short way.
        self._writes_inline = (
            enabled and self._detect_zeroes == "off" and not self._direct
        )

    async def set_write_cache(self, enabled: bool) -> None:
        """Turn the write cache on or off while requests run (blk_set_enable_write_cache).

        Turned off: from now on each write is durable when it is acknowledged, those in flight
        included; on return so is every one that was acknowledged before. Raises the OSError of
        the flush that does this; the cache is off all the same. What clients were told of the
        export does not change: they may go on flushing.
        """
        self._turn_write_cache(enabled)
        if not enabled:
            await self.flush()

    # --- the synchronous way -------------------------------------------------------------------

    def read_nowait(self, offset: int, buffer: memoryview) -> Miss | None:
        """Fill `buffer` at once; or say why not, its content being undefined then."""
        runs = self._resolve(READ, offset, len(buffer))
        if type(runs) is not list:
            self.misses[runs] += 1  # type: ignore[index]
            return runs  # type: ignore[return-value]
        if len(runs) == 1:
            leaf, host_offset, length = runs[0]
            if leaf is not None:
                return None if leaf.read_nowait(host_offset, buffer) else self._would_block()
            buffer[:] = bytes(length)
            return None
        if len(buffer) > MAX_INLINE:
            return Miss.WOULD_BLOCK
        for leaf, host_offset, length in runs:
            piece = buffer[:length]
            if leaf is None:
                piece[:] = bytes(length)
            elif not leaf.read_nowait(host_offset, piece):
                return self._would_block()
            buffer = buffer[length:]
        return None

    def map_nowait(self, offset: int, length: int) -> list[tuple[bool, int]] | None:
        """(reads as zeroes, length) for each piece of the range, neighbours joined; None: cannot
        tell without waiting."""
        runs = self._resolve(READ, offset, length)
        if type(runs) is not list:
            return None
        pieces: list[tuple[bool, int]] = []
        for leaf, _, length in runs:
            is_hole = leaf is None
            if pieces and pieces[-1][0] is is_hole:
                pieces[-1] = (is_hole, pieces[-1][1] + length)
            else:
                pieces.append((is_hole, length))
        return pieces

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> bool:
        """Queue a read with its leaf; `done` is called later, in the trio thread.

        False: it does not resolve to one run of a leaf; take another way.
        """
        runs = self._resolve(READ, offset, len(buffer))
        if type(runs) is not list or len(runs) != 1:
            return False
        leaf, host_offset, _ = runs[0]
        if leaf is None:
            return False
        self._submit(leaf.submit_read, host_offset, buffer, done)
        return True

    def submit_write(self, offset: int, data: Buffer, done: Done, *, fua: bool = False) -> bool:
        """As `submit_read`, a write in place; `data` is ours until it is done. False also if FUA,
        asked for or due to the write cache, takes a flush."""
        if self._detect_zeroes != "off":
            return False
        durable = fua or not self.write_cache
        runs = self._resolve(WRITE_FUA if durable else WRITE, offset, len(data))
        if type(runs) is not list or len(runs) != 1:
            if isinstance(runs, Miss):  # a read's is counted by `read_nowait`, which comes next
                self.misses[runs] += 1
            return False
        leaf, host_offset, _ = runs[0]
        submit = _leaf(leaf).submit_write
        if durable:
            self._submit(partial(submit, fua=True), host_offset, data, done)
        else:
            self._submit(submit, host_offset, data, partial(self._written, done))
        return True

    def _written(self, done: Done, error: OSError | None) -> None:
        """A write without FUA has completed; the write cache may have been turned off since."""
        if not self.write_cache and error is None:
            self.nursery.start_soon(self._flush_before, done)
        else:
            done(error)

    async def _flush_before(self, done: Done) -> None:
        try:
            await self.root.flush()
        except OSError as error:
            done(error)
        except Exception as error:  # whoever waits gets an answer, whatever it is
            done(OSError(errno.EIO, f"internal error: {error!r}"))
        else:
            done(None)

    def _submit(
        self,
        submit: Callable[[int, Any, Done], None],
        host_offset: int,
        data: Buffer,
        done: Done,
    ) -> None:
        """In an epoch of its own: the host cluster is nobody else's until it is done."""
        epochs = self._epochs
        epoch = epochs.enter()

        def completed(error: OSError | None) -> None:
            epochs.leave(epoch)
            done(error)

        try:
            submit(host_offset, data, completed)
        except BaseException:
            epochs.leave(epoch)
            raise

    def flush_nowait(self) -> bool:
        """Flush if there is nothing to do for it; False: there is, or may be. Raises OSError."""
        return self.root.flush_nowait()

    def submit_flush(self, done: Done) -> bool:
        """Flush without a task; `done` is called later, in the trio thread. False: it takes more
        than a leaf's sync, use `flush`. Ask `flush_nowait` first. Raises OSError."""
        return self.root.submit_flush(done)

    def write_nowait(self, offset: int, data: Buffer) -> Miss | None:
        """Write at once; or say why not, nothing having been written. Raises OSError."""
        if not self._writes_inline or len(data) > MAX_INLINE:
            return Miss.WOULD_BLOCK
        runs = self._resolve(WRITE, offset, len(data))
        if type(runs) is not list:
            if runs is Miss.NEEDS_ALLOC and self.root.allocate_nowait(offset, data):
                return None
            self.misses[runs] += 1  # type: ignore[index]
            return runs  # type: ignore[return-value]
        if len(runs) == 1:
            leaf, host_offset, _ = runs[0]
            return None if leaf.write_nowait(host_offset, data) else self._would_block()  # type: ignore[union-attr]
        rest = memoryview(data)
        for leaf, host_offset, length in runs:
            if not _leaf(leaf).write_nowait(host_offset, rest[:length]):
                return self._would_block()
            rest = rest[length:]
        return None

    def _would_block(self) -> Miss:
        self.misses[Miss.WOULD_BLOCK] += 1
        return Miss.WOULD_BLOCK

    # --- the asynchronous way ------------------------------------------------------------------

    @contextmanager
    def _request(self, kind: str, offset: int, length: int) -> Iterator[None]:
        assert 0 <= offset <= offset + length <= self.size, f"{kind} of {length} at {offset}"
        epoch = self._epochs.enter()
        try:
            yield
        finally:
            self._epochs.leave(epoch)

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`."""
        with self._request("read", offset, len(buffer)):
            await self.root.read(offset, buffer)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write `data`; durable on return with `fua` or without a write cache."""
        with self._request("write", offset, len(data)):
            if self._detect_zeroes != "off" and is_zero(data):
                may_unmap = self._detect_zeroes == "unmap"
                await self.root.write_zeroes(offset, len(data), may_unmap=may_unmap)
            elif self.write_cache and not fua:
                await self.root.write(offset, data)
            elif await self.root.write_fua(offset, data):
                return
        await self._make_durable(fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range zeroes. `fast`: OSError(EOPNOTSUPP) rather than writing them."""
        with self._request("write_zeroes", offset, length):
            await self.root.write_zeroes(
                offset, length, may_unmap=may_unmap and self._discard, fallback=not fast
            )
        await self._make_durable(fua)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """The range's content is no longer needed. Without a write cache too that is durable only
        with `fua`: nobody may rely on what a discard leaves (as blk_co_pdiscard)."""
        with self._request("discard", offset, length):
            if self._discard:
                await self.root.discard(offset, length)
        if fua:
            await self.root.flush()

    async def flush(self) -> None:
        """Make every write answered so far durable."""
        await self.root.flush()

    async def block_status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """What the range consists of, neighbours alike joined; at least the first extent, or its
        beginning, and with `one` only that. The lengths add up to at most `length`."""
        extents: list[Extent] = []
        with self._request("block_status", offset, length):
            for _ in range(MAX_EXTENTS):
                if not length or len(extents) >= MAX_EXTENTS:
                    break
                for piece in await self.root.block_status(offset, length):
                    last = extents[-1] if extents else None
                    if last is not None and last[1:] == piece[1:]:
                        extents[-1] = last._replace(length=last.length + piece.length)
                    elif last is not None and one:
                        return extents
                    else:
                        extents.append(piece)
                    offset += piece.length
                    length -= piece.length
        return extents

    async def _make_durable(self, fua: bool) -> None:
        """Something was written. FUA is emulated here and nowhere else, by the flush chain
        (bdrv_driver_pwritev); that includes what was in flight when the write cache went off."""
        if fua or not self.write_cache:
            await self.root.flush()

    def drain_begin(self) -> None:
        """From now on hold no request up but for its I/O: the server is stopping."""
        for _, node in self._nodes():
            node.drain_begin()

    def statistics(self) -> dict[str, object]:
        """Counters since the image was opened, of the backend and all nodes.

        requests: of all clients together; left: of those that have gone; misses: requests that
        could not go the synchronous way, by reason, those that never do left out.
        """
        return {
            "requests": self.accounts.total().statistics(),
            "left": self.accounts.statistics(),
            "misses": {miss.name: count for miss, count in self.misses.items()},
            "buffers": {"free_bytes": self.buffers.statistics()},
            "nodes": {
                role: {
                    "node_name": node.node_name,
                    "driver": node.driver,
                    "filename": node.filename,
                    **node.statistics(),
                }
                for role, node in self._nodes()
            },
        }

    def _nodes(self) -> Iterator[tuple[str, Node]]:
        """(role, node) of the tree, the root first; a role tells the way from there."""
        pending = [("root", self.root)]
        while pending:
            role, node = pending.pop()
            yield role, node
            pending += [(f"{role}.{name}", child) for name, child in node.children.items()]


# A block status answer holds about this many extents at most, and is made of as many looks at the
# root; the client asks again for the rest.
MAX_EXTENTS = 2048


def _leaf(leaf: Leaf | None) -> Leaf:
    if leaf is None:
        raise OSError(errno.EIO, "a write resolved to a run without a leaf")
    return leaf
