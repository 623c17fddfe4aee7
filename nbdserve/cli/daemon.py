"""Going to the background (--fork), with a foreground that knows how it went.

``detach`` forks before anything else exists: no trio, no threads, no open image. The
child goes on as the server; the parent waits on a pipe. The child keeps the terminal's
streams until it is ready, so that its one error line and its URI appear where the user
is looking, and gives them up before it reports readiness: a caller that reads our
output to the end (``out=$(nbdserve serve --fork ...)``) is not held up by the daemon.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from nbdserve.errors import NbdserveError

if TYPE_CHECKING:
    from collections.abc import Callable

_READY = b"\0"


def detach() -> Callable[[bool], None]:
    """Fork. The parent never returns from here: it exits with the child's fate.

    In the child the result is the function to call when ready; its argument says whether
    stderr stays what it was (for --verbose), as in qemu-nbd.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child != 0:
        os.close(to_parent)
        sys.exit(_fate(child, from_child))
    os.close(from_child)
    os.setsid()

    def ready(keep_stderr: bool) -> None:
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1) if keep_stderr else (0, 1, 2):
            os.dup2(nowhere, stream)
        if nowhere > 2:
            os.close(nowhere)
        os.chdir("/")  # so that no file system stays busy only because we began there
        os.write(to_parent, _READY)
        os.close(to_parent)

    return ready


def _fate(child: int, pipe: int) -> int:
    """Wait until the child is ready or gone; the exit status that says which."""
    try:
        if os.read(pipe, 1) == _READY:
            return 0
    except BaseException:
        # Interrupted: a server that nobody waits for must not come up behind our back.
        os.kill(child, signal.SIGTERM)
        raise
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        name = signal.Signals(-status).name
        raise NbdserveError(f"--fork: the server was killed by {name} before it was ready")
    return status
