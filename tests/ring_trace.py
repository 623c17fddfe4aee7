"""ring_trace.py LOG ARGUMENTS...: nbdserve, with a line in LOG for each request in its ring.

io_uring takes requests from memory it shares with us, where strace cannot look: it sees that the
kernel took so many, and no more. So this program reads the entries back from the ring, as the
kernel finds them, and writes down each one that was taken and each completion. It writes them with
write(2), a line at a time, so they are in strace's log too, in their place among all other calls;
that as many are written down as io_uring_enter took is for strace.py to see.

    submit TAG OPCODE FD OFFSET FLAGS
    complete TAG RESULT
"""

# A test's other half: as little annotated as tests are, and seen by no mypy.
# ruff: noqa: ANN001, ANN202

import os
import struct
import sys

from nbdserve.cli.main import main
from nbdserve.engines import io_uring

# include/uapi/linux/io_uring.h: opcode, fd, off, rw_flags or fsync_flags, user_data
SQE = struct.Struct("<B3xiQ8x4xIQ24x")


class TracedEngine(io_uring.IoUringEngine):
    """The engine, and what is in its ring."""

    log = -1

    def _hand_over(self, nb_requests):
        first = self._tail - nb_requests
        taken = super()._hand_over(nb_requests)
        for index in range(first, first + max(taken, 0)):
            opcode, fd, offset, flags, tag = SQE.unpack_from(
                self._sqes, (index & self._sq_mask) * SQE.size
            )
            self._write(f"submit {tag} {opcode} {fd} {offset} {flags}")
        return taken

    def _completions(self):
        found = super()._completions()
        for tag, result in found:
            self._write(f"complete {tag} {result}")
        return found

    def _write(self, line):
        os.write(self.log, f"{line}\n".encode())


if __name__ == "__main__":
    TracedEngine.log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    io_uring.IoUringEngine = TracedEngine
    main(sys.argv[2:])
