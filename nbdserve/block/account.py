"""The accounts of a drive: requests, bytes, failures and latencies, by kind.

Law: a request is counted once, by the front end that answers it, when it answers it, and whichever
way it went through the block stack. So the numbers are those of the client: a read that was
answered in pieces is one operation. (QEMU has it so: block_acct_start and block_acct_done are
called by devices, and the BlockBackend only keeps the sums.)

What is answered inline comes in batches whose requests are all answered by one send. They are
credited at once, `Operations.add(n, ...)`, with the time of the batch: counting costs a batch some
hundred nanoseconds, and a request nothing.

Each connection has an account of its own; the drive's numbers are their sum (`Accounts`), so that
nothing is counted twice. Names are those of QEMU's BlockDeviceStats (query-blockstats) as far as it
has them; it counts write-zeroes as writes, and block status and prefetches not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.block.histogram import MICROSECOND, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["KINDS", "Account", "Accounts", "Operations"]

KINDS = ("rd", "wr", "flush", "unmap", "zero", "status", "prefetch")


class Operations:
    """Requests of one kind that were answered.

    nb_bytes: of those that succeeded; failed: answered with an error of the block stack; invalid:
    refused before it saw them; total_ns: the latencies of all but the invalid, added up.
    """

    __slots__ = ("_bins", "failed", "invalid", "latency", "nb_bytes", "total_ns")

    def __init__(self) -> None:
        self.nb_bytes = 0
        self.failed = 0
        self.invalid = 0
        self.total_ns = 0
        self.latency = Histogram()
        self._bins = self.latency.bins

    @property
    def succeeded(self) -> int:
        """Requests that were done. Not a counter: the histogram has them and those that failed."""
        return self.latency.count - self.failed

    def add(self, number: int, nb_bytes: int, nanoseconds: int) -> None:
        """So many requests were done, of so many bytes together, in so much time each."""
        self.nb_bytes += nb_bytes
        self.total_ns += nanoseconds * number
        self._bins[(nanoseconds // MICROSECOND).bit_length()] += number  # Histogram.add, no call

    def fail(self, nanoseconds: int) -> None:
        """A request failed."""
        self.failed += 1
        self.add(1, 0, nanoseconds)

    def merge(self, other: Operations) -> None:
        """Add what another has counted."""
        self.nb_bytes += other.nb_bytes
        self.failed += other.failed
        self.invalid += other.invalid
        self.total_ns += other.total_ns
        self.latency.merge(other.latency)


class Account:
    """Operations by kind. `unknown`: requests refused because they are of no kind at all."""

    def __init__(self, accounts: Iterable[Account] = ()) -> None:
        """With `accounts`, their sum."""
        self.operations = {kind: Operations() for kind in KINDS}
        self.unknown = 0
        for account in accounts:
            self.merge(account)

    def merge(self, other: Account) -> None:
        """Add what another has counted."""
        for kind, operations in self.operations.items():
            operations.merge(other.operations[kind])
        self.unknown += other.unknown

    def statistics(self) -> dict[str, object]:
        """By QEMU's names: rd_operations, rd_bytes, failed_rd_operations, invalid_rd_operations,
        rd_total_time_ns, rd_latency_histogram; the same for each kind."""
        found: dict[str, object] = {}
        for kind, operations in self.operations.items():
            found |= {
                f"{kind}_operations": operations.succeeded,
                f"{kind}_bytes": operations.nb_bytes,
                f"failed_{kind}_operations": operations.failed,
                f"invalid_{kind}_operations": operations.invalid,
                f"{kind}_total_time_ns": operations.total_ns,
                f"{kind}_latency_histogram": operations.latency.statistics(),
            }
        del found["flush_bytes"]  # a flush has none
        return found | {"invalid_unknown_operations": self.unknown}


class Accounts:
    """The accounts of one drive: those that are open, and the sum of those that were closed."""

    def __init__(self) -> None:
        self._open: set[Account] = set()
        self._closed = Account()
        self._nb_closed = 0

    def open(self) -> Account:
        """A new account, for a front end that begins to make requests."""
        account = Account()
        self._open.add(account)
        return account

    def close(self, account: Account) -> Account:
        """The front end makes no more requests. Those that are still under way it shall credit to
        the account that is returned, which all that have left share."""
        self._open.remove(account)
        self._closed.merge(account)
        self._nb_closed += 1
        return self._closed

    def total(self) -> Account:
        """The sum of all, as it is now."""
        return Account([self._closed, *self._open])

    def statistics(self) -> dict[str, object]:
        """Of those that were closed: how many, and their sum."""
        return {"connections": self._nb_closed, **self._closed.statistics()}
