"""The `native` engine: Linux AIO (io_submit), for files opened with O_DIRECT.

Without O_DIRECT io_submit waits for the disk itself, and with it the whole server: the caller
(engines/start.py) refuses that, as QEMU does. It is here for kernels and containers that forbid
io_uring and for those who compare.

The kernel copies the control blocks in io_submit, so one array of them is used again and again. An
error of io_submit is that of the first control block that it did not take. Completions come by
io_getevents without waiting; an eventfd says when.

System call numbers differ between the architectures. After io_submit(2), io_getevents(2) and
include/uapi/linux/aio_abi.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

import trio

from nbdserve.engines.kernel_queue import FSYNC, READ, WRITE, WRITEV, KernelQueue, Request

__all__ = ["LinuxAioEngine"]

# Requests with the kernel at a time (as QEMU's MAX_EVENTS is 1024; fs.aio-max-nr bounds the sum).
DEPTH = 128


class _Numbers(NamedTuple):
    setup: int
    destroy: int
    submit: int
    getevents: int


_NUMBERS = {"x86_64": _Numbers(206, 207, 209, 208), "aarch64": _Numbers(0, 1, 2, 4)}

_OPCODES = {READ: 0, WRITE: 1, FSYNC: 3, WRITEV: 8}

# data, key, rw_flags, opcode, reqprio, fd, buf, nbytes, offset, -, flags, resfd
_IOCB = struct.Struct("<QIIHhIQQqQII")
_EVENT = struct.Struct("<QQqq")  # data, iocb, result, -
_FLAG_RESFD = 1


class LinuxAioEngine(KernelQueue):
    """One AIO context. Raises OSError if the kernel has none for us."""

    name = "native"

    def __init__(self) -> None:
        numbers = _NUMBERS.get(os.uname().machine)
        if numbers is None:
            raise OSError(errno.ENOSYS, f"no Linux AIO on {os.uname().machine}")
        self._numbers = numbers
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.argtypes = (ctypes.c_long,) * 6
        self._syscall.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        if self._syscall(numbers.setup, DEPTH, ctypes.addressof(context), 0, 0, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self._context = context.value
        self._blocks = ctypes.create_string_buffer(DEPTH * _IOCB.size)
        self._pointers = (ctypes.c_void_p * DEPTH)()
        self._free = list(range(DEPTH))
        self._events = ctypes.create_string_buffer(DEPTH * _EVENT.size)
        self._no_time = (ctypes.c_long * 2)(0, 0)
        self._places: list[int] = []  # of the prepared requests, in `_blocks`
        try:
            super().__init__(DEPTH)
        except BaseException:
            self._syscall(numbers.destroy, self._context, 0, 0, 0, 0)
            raise
        trio.lowlevel.spawn_system_task(self._watch)

    def _prepare(self, tag: int, request: Request) -> None:
        place = self._free.pop()
        _IOCB.pack_into(
            self._blocks, place * _IOCB.size,
            tag, 0, request.flags, _OPCODES[request.kind], 0, request.fd, request.address,
            request.count, request.offset, 0, _FLAG_RESFD, self.eventfd,
        )  # fmt: skip
        self._places.append(place)

    def _hand_over(self, nb_requests: int) -> int:
        base = ctypes.addressof(self._blocks)
        for number, place in enumerate(self._places):
            self._pointers[number] = base + place * _IOCB.size
        taken: int = self._syscall(
            self._numbers.submit, self._context, nb_requests,
            ctypes.addressof(self._pointers), 0, 0,
        )  # fmt: skip
        if taken < 0:
            return -ctypes.get_errno()
        self._forget(taken)
        return taken

    def _withdraw(self, error: int) -> int:
        self._forget(1)
        return 1

    def _forget(self, number: int) -> None:
        self._free += self._places[:number]
        del self._places[:number]

    def _completions(self) -> list[tuple[int, int]]:
        if len(self._pending) == len(self._prepared):
            return []  # nothing is with the kernel: no need to ask
        count = self._syscall(
            self._numbers.getevents, self._context, 0, DEPTH,
            ctypes.addressof(self._events), ctypes.addressof(self._no_time),
        )  # fmt: skip
        return [
            _EVENT.unpack_from(self._events, number * _EVENT.size)[0:3:2]
            for number in range(count)
        ]

    def close(self) -> None:
        super().close()
        self._syscall(self._numbers.destroy, self._context, 0, 0, 0, 0)
