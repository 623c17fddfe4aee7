"""What a Python plugin of nbdkit's needs of C.

**Thread states.** nbdkit calls Python from threads that C made: each call makes a state for its
thread (PyGILState_Ensure) and throws it away afterwards, with a stack of 16 KiB that is mapped and
unmapped, which together costs more than a read of 4 KiB. A state that somebody else ensures too
stays. So the first call of a thread ensures it once more (`keep`), and when the connection that
the thread works for is closed that is taken back (`drop`). nbdkit joins a connection's threads
before it closes it, but for the one that does so: their states can be deleted by any other.

**Errors.** nbdkit logs what a callback raises by way of `traceback.format_exception`, whole. An
error that a user is told is one line here, as everywhere: `Told` is formatted so.
"""

from __future__ import annotations

import ctypes
import threading
import traceback
from typing import Any

__all__ = ["ThreadStates", "Told", "tell_in_one_line"]

_api = ctypes.pythonapi
_api.PyGILState_Ensure.restype = ctypes.c_int
_api.PyGILState_Release.argtypes = (ctypes.c_int,)
_api.PyGILState_Release.restype = None
_api.PyGILState_GetThisThreadState.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = (ctypes.c_void_p,)
_api.PyThreadState_Clear.restype = None
_api.PyThreadState_Delete.argtypes = (ctypes.c_void_p,)
_api.PyThreadState_Delete.restype = None

_LOCKED = 0  # PyGILState_LOCKED: the lock was held when it was ensured, as always in a callback


class ThreadStates:
    """Those of the threads that work for one connection."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}  # thread -> its PyThreadState

    def keep(self) -> None:
        """Keep this thread's state from one call to the next; it is not in `kept` yet."""
        if threading.current_thread() is threading.main_thread():
            self.kept[threading.get_ident()] = 0  # it has one anyway
            return
        _api.PyGILState_Ensure()
        self.kept[threading.get_ident()] = _api.PyGILState_GetThisThreadState()

    def drop(self) -> None:
        """The connection is closed, by this thread; the others have ended."""
        mine = threading.get_ident()
        for thread, state in self.kept.items():
            if not state:
                continue
            if thread == mine:
                _api.PyGILState_Release(_LOCKED)  # nbdkit's own release throws it away
            else:
                _api.PyThreadState_Clear(state)
                _api.PyThreadState_Delete(state)
        self.kept.clear()


class Told(Exception):
    """An error that is told as it is: its text is all there is to say."""


def tell_in_one_line() -> None:
    """From now on a `Told` that nbdkit logs is its text. This process is nbdkit's: nobody else
    asks for it."""
    whole: Any = traceback.format_exception

    def format_exception(*error: object, **options: object) -> list[str]:
        told = [str(part) for part in error if isinstance(part, Told)]
        return told or list(whole(*error, **options))

    traceback.format_exception = format_exception
