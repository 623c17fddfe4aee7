"""The leaky buckets of a throttle: arithmetic, and nothing else.

There is no clock, no task and no queue here. Whoever calls says what time it is, in seconds of any
clock that never goes back, so that every vector can be computed by hand and held against it.

A bucket leaks at the average rate. A request that is let go pours its bytes, or its operations, in;
while more is in than the bucket holds, nothing is let go. So a request never waits for its own
size but for the debt of those before it, and one that is larger than the bucket passes all the same
and is paid for by those that follow. Without a burst maximum a bucket holds a tenth of a second's
worth, else the maximum times the burst length. A burst of more than one second has a second bucket,
which leaks at the maximum and holds a tenth of a second of it: else all of a long burst could be
had in its first moment.

Follows util/throttle.c of QEMU (throttle_leak_bucket, throttle_compute_wait, throttle_account).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.block.run import READ, WRITE

if TYPE_CHECKING:
    from nbdserve.block.run import Op
    from nbdserve.config import RateLimit, ThrottleLimits

__all__ = ["Buckets", "LeakyBucket"]

# A wait below this is none: QEMU counts in whole nanoseconds. It also keeps what rounding leaves of
# a wait that is over from being waited for again.
SHORTEST_WAIT = 1e-9

# What a bucket holds when nothing more is said: that part of one second's worth.
DEFAULT_PART = 10


class LeakyBucket:
    """One limit, in its unit (bytes or operations). `level` and `burst_level` are what is in."""

    __slots__ = ("_average", "_burst_rate", "_burst_size", "_size", "burst_level", "level")

    def __init__(self, limit: RateLimit) -> None:
        """An empty bucket. `limit` has an average; its units are those of `add`."""
        self.level = 0.0
        self.burst_level = 0.0
        self._average = limit.average
        self._size = limit.maximum * limit.length or limit.average / DEFAULT_PART
        self._burst_rate = limit.maximum if limit.length > 1 else 0
        self._burst_size = self._burst_rate / DEFAULT_PART

    def leak(self, seconds: float) -> None:
        """Let that much time pass."""
        self.level = max(self.level - self._average * seconds, 0.0)
        if self._burst_rate:
            self.burst_level = max(self.burst_level - self._burst_rate * seconds, 0.0)

    def wait(self) -> float:
        """Seconds until the next request may go; 0.0 if it may now."""
        seconds = (self.level - self._size) / self._average
        if seconds <= 0 and self._burst_rate:
            seconds = (self.burst_level - self._burst_size) / self._burst_rate
        return seconds if seconds >= SHORTEST_WAIT else 0.0

    def add(self, units: float) -> None:
        """A request of that many units goes; a negative number takes one back."""
        self.level = max(self.level + units, 0.0)
        if self._burst_rate:
            self.burst_level = max(self.burst_level + units, 0.0)


class Buckets:
    """All buckets of one set of limits: those of a total are shared by reads and writes."""

    def __init__(self, limits: ThrottleLimits, now: float) -> None:
        """Empty buckets at the time `now`."""
        made = {name: LeakyBucket(limit) for name, limit in limits.rates() if limit.average}
        self._all = list(made.values())
        self._bytes: dict[Op, list[LeakyBucket]] = {}
        self._operations: dict[Op, list[LeakyBucket]] = {}
        for op, direction in ((READ, "read"), (WRITE, "write")):
            for unit, table in (("bps", self._bytes), ("iops", self._operations)):
                names = (f"{unit}-total", f"{unit}-{direction}")
                table[op] = [made[name] for name in names if name in made]
        self._limiting = {op: self._bytes[op] + self._operations[op] for op in (READ, WRITE)}
        self._iops_size = limits.iops_size
        self._leaked = now

    def wait(self, op: Op, now: float) -> float:
        """Seconds from `now` until the next request of that direction may go; 0.0: it may now."""
        elapsed = now - self._leaked
        self._leaked = now
        for bucket in self._all:
            bucket.leak(elapsed)
        return max([bucket.wait() for bucket in self._limiting[op]], default=0.0)

    def add(self, op: Op, nb_bytes: int) -> None:
        """A request goes."""
        self._add(op, nb_bytes, 1)

    def take_back(self, op: Op, nb_bytes: int) -> None:
        """A request that was added did not go after all."""
        self._add(op, nb_bytes, -1)

    def _add(self, op: Op, nb_bytes: int, sign: int) -> None:
        for bucket in self._bytes[op]:
            bucket.add(sign * nb_bytes)
        operations = 1.0
        if 0 < self._iops_size < nb_bytes:
            operations = nb_bytes / self._iops_size
        for bucket in self._operations[op]:
            bucket.add(sign * operations)
