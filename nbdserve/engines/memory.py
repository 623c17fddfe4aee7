"""Addresses of Python's buffers, for system calls that take them as numbers.

An address is good for as long as somebody holds the buffer: whoever gives one to the kernel keeps
the object until the kernel is done.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.engines.engine import Buffer

__all__ = ["address_of"]

_addressof = ctypes.addressof
_from_buffer = ctypes.c_char.from_buffer

_PY_BUFFER_SPACE = 128  # struct Py_buffer has 80 bytes, and `buf` comes first
_POINTER = struct.Struct("@P")
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_release_buffer.restype = None


def address_of(buffer: Buffer) -> int:
    """Where a contiguous buffer begins. It may be read-only, but not empty."""
    try:
        return _addressof(_from_buffer(buffer))
    except TypeError:  # read-only
        description = ctypes.create_string_buffer(_PY_BUFFER_SPACE)
        _get_buffer(buffer, description, 0)
        address: int = _POINTER.unpack_from(description)[0]
        _release_buffer(description)
        return address
