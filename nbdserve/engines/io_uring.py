"""The `io_uring` engine: the kernel's submission and completion rings, through ctypes and mmap.

No compiler is needed: the rings are shared memory, an SQE is packed by one `struct.pack_into`, a
batch (a plug) is handed over by one io_uring_enter, completions are unpacked from the ring without
any system call. PyPI's liburing cannot read into aligned memory of ours, which O_DIRECT needs.

System calls 425 to 427 have these numbers on every architecture since they exist, x86_64 and
aarch64 among them. The layout of SQE, CQE and io_uring_params is the same on all with 64 bits.

Order of memory accesses, which Python gives us no barriers for:

* SQEs and the SQ tail are read by the kernel inside our own io_uring_enter (no SQPOLL): one thread,
  program order, whatever the architecture.
* The CQ tail may be raised by another processor, after the CQE. x86_64 does not reorder loads. On
  aarch64 it may; but the place of each CQE is computed *from the tail that was read* (`tail -
  count + n`), an address dependency, which the architecture keeps in order. Aligned 32-bit accesses
  through a memoryview are single loads and stores.
* Nothing depends on when the kernel sees the CQ head: the CQ has twice as many entries as requests
  are in flight, so a CQE is overwritten only by a request submitted after it was read, and
  io_uring_enter lies between.

Needed are READ and WRITE (Linux 5.6). After io_uring_setup(2), io_uring_enter(2) and
include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

import trio

from nbdserve.engines.kernel_queue import FSYNC, GROUP, READ, WRITE, WRITEV, KernelQueue, Request

__all__ = ["IoUringEngine"]

# SQ entries, and the most requests with the kernel at a time; the CQ has twice as many.
DEPTH = 256

_SETUP, _ENTER, _REGISTER = 425, 426, 427

_FEATURES = 1 << 0 | 1 << 1 | 1 << 3  # one mapping for both rings; no drops; READ and WRITE
_REGISTER_EVENTFD = 4
_OFFSET_SQES = 0x10000000
_FSYNC_DATASYNC = 1

_OPCODES = {READ: 22, WRITE: 23, WRITEV: 2, FSYNC: 3}

_SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, flags, tag
_CQE = struct.Struct("<QiI")  # tag, result, flags
_PARAMS_SIZE = 120
_PARAMS_HEAD = struct.Struct("<6I")  # sq_entries, cq_entries, flags, -, -, features
_SQ_OFFSETS = struct.Struct("<7I")  # head, tail, mask, entries, flags, dropped, array
_SQ_OFFSETS_AT = 40
_CQ_OFFSETS = struct.Struct("<6I")  # head, tail, mask, entries, overflow, cqes
_CQ_OFFSETS_AT = 80

_WRAP = 0xFFFFFFFF


class IoUringEngine(KernelQueue):
    """One ring. Raises OSError if the kernel has none for us (ENOSYS, EPERM, ENOMEM, ...)."""

    name = "io_uring"

    def __init__(self) -> None:
        self._syscall = _syscall()
        params = ctypes.create_string_buffer(_PARAMS_SIZE)
        self._fd = self._setup(params)
        try:
            self._map(params)
            super().__init__(DEPTH)
            try:
                self._register_eventfd()
            except BaseException:
                os.close(self.eventfd)
                self._threads.close()
                raise
        except BaseException:
            os.close(self._fd)
            raise
        trio.lowlevel.spawn_system_task(self._watch)

    def _setup(self, params: ctypes.Array[ctypes.c_char]) -> int:
        # No flags: with COOP_TASKRUN, where completions wait for our next system call, 4 KiB random
        # reads 32 deep were slower by a sixth.
        fd: int = self._syscall(_SETUP, DEPTH, ctypes.addressof(params), 0, 0, 0, 0)
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if _PARAMS_HEAD.unpack_from(params)[5] & _FEATURES != _FEATURES:
            os.close(fd)
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old")
        return fd

    def _map(self, params: ctypes.Array[ctypes.c_char]) -> None:
        sq_entries, cq_entries, *_ = _PARAMS_HEAD.unpack_from(params)
        _, self._sq_tail, _, _, _, _, array = (
            offset // 4 for offset in _SQ_OFFSETS.unpack_from(params, _SQ_OFFSETS_AT)
        )
        head, tail, _, _, _, self._cqes = _CQ_OFFSETS.unpack_from(params, _CQ_OFFSETS_AT)
        self._cq_head, self._cq_tail = head // 4, tail // 4
        self._sq_mask, self._cq_mask = sq_entries - 1, cq_entries - 1
        size = max(array * 4 + sq_entries * 4, self._cqes + cq_entries * _CQE.size)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._ring = mmap.mmap(self._fd, size, flags=flags)
        self._sqes = mmap.mmap(self._fd, sq_entries * _SQE.size, flags=flags, offset=_OFFSET_SQES)
        self._words = memoryview(self._ring)[: size & ~3].cast("I")
        for index in range(sq_entries):  # an entry stays where it is: no indirection
            self._words[array + index] = index
        self._tail = self._words[self._sq_tail]
        self._head = self._words[self._cq_head]

    def _register_eventfd(self) -> None:
        fd = ctypes.c_int(self.eventfd)
        if self._syscall(_REGISTER, self._fd, _REGISTER_EVENTFD, ctypes.addressof(fd), 1, 0, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def _prepare(self, tag: int, request: Request) -> None:
        # There is room: the SQ has as many entries as requests may be with the kernel.
        kind, tail = request.kind, self._tail
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) * 64,
            _OPCODES[kind], 0, 0, request.fd, request.offset, request.address, request.count,
            _FSYNC_DATASYNC if kind == FSYNC else request.flags, tag,
        )  # fmt: skip
        self._tail = tail + 1 & _WRAP

    def _hand_over(self, nb_requests: int) -> int:
        self._words[self._sq_tail] = self._tail
        taken: int = self._syscall(_ENTER, self._fd, nb_requests, 0, 0, 0, 0)
        return taken if taken >= 0 else -ctypes.get_errno()

    def _withdraw(self, error: int) -> int:
        # An error of io_uring_enter is not one of a request: all that it did not take fail.
        number = len(self._prepared)
        self._tail = self._tail - number & _WRAP
        self._words[self._sq_tail] = self._tail
        return number

    def _completions(self) -> list[tuple[int, int]]:
        tail = self._words[self._cq_tail]
        count = tail - self._head & _WRAP
        if not count:
            return []
        if count > GROUP:
            tail = tail - (count - GROUP) & _WRAP  # from the tail that was read, here too
            count = GROUP
        found = []
        ring, mask, first = self._ring, self._cq_mask, self._cqes
        for index in range(tail - count, tail):  # from `tail`: see above
            tag, result, _ = _CQE.unpack_from(ring, first + (index & mask) * 16)
            found.append((tag, result))
        self._head = tail
        self._words[self._cq_head] = tail
        return found

    def close(self) -> None:
        super().close()
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)


def _syscall() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.argtypes = (ctypes.c_long,) * 7
    function.restype = ctypes.c_long
    return function
