"""Latencies as a histogram: how many requests took how long, in powers of two.

Pure: no clock, no I/O. Bin 0 counts what took less than a microsecond, bin n what took at least
2**(n-1) and less than 2**n microseconds. A bin is found by `bit_length`, so that counting costs no
search and no bounds need be chosen beforehand; the price is that a percentile is only known to
within a factor of two, and estimated in between.

Histograms add up (`merge`), which averages do not. `boundaries` and `bins` are as in QEMU's
BlockLatencyHistogramInfo (qapi/block-core.json), boundaries in nanoseconds: bins[0] counts what is
below boundaries[0], the last bin what is not below the last boundary.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MICROSECOND", "NB_BINS", "Histogram", "HistogramStatistics"]

# In nanoseconds.
MICROSECOND = 1000

# Nanoseconds of 63 bits, as any clock counts them, are microseconds of 54 bits at most.
NB_BINS = 55


class HistogramStatistics(NamedTuple):
    """Up to the last bin that is not empty; see the top of the module."""

    boundaries: list[int]
    bins: list[int]


class Histogram:
    """Counts by duration."""

    __slots__ = ("bins",)

    def __init__(self) -> None:
        self.bins = [0] * NB_BINS

    def add(self, nanoseconds: int, count: int = 1) -> None:
        """That many took so long."""
        self.bins[(nanoseconds // MICROSECOND).bit_length()] += count

    def merge(self, other: Histogram) -> None:
        """Add what another has counted."""
        self.bins[:] = map(int.__add__, self.bins, other.bins)

    @property
    def count(self) -> int:
        """All that was counted."""
        return sum(self.bins)

    def percentile(self, percent: float) -> float:
        """An estimate of the duration, in microseconds, that so many percent did not exceed.

        Within a bin durations are taken to be spread evenly. 0 if nothing was counted.
        """
        wanted = self.count * percent / 100
        for number, count in enumerate(self.bins):
            if count and wanted <= count:
                low = 1 << number >> 1
                return low + ((1 << number) - low) * wanted / count
            wanted -= count
        return 0.0

    def statistics(self) -> HistogramStatistics:
        """What was counted."""
        used = max((number for number, count in enumerate(self.bins) if count), default=0) + 1
        return HistogramStatistics(
            [MICROSECOND << number for number in range(used - 1)], self.bins[:used]
        )
