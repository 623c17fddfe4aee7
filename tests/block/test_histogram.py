"""Histograms against lists of the durations themselves."""

import itertools
import random

import pytest

from nbdserve.block.histogram import Histogram

US, MS, S = 1_000, 1_000_000, 1_000_000_000


def of(durations):
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    return histogram


def recounted(durations, boundaries):
    """The bins by their definition (BlockLatencyHistogramInfo)."""
    edges = [0, *boundaries, 1 << 63]
    return [
        sum(low <= duration < high for duration in durations)
        for low, high in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize(
    ("duration", "number"),
    [(0, 0), (999, 0), (US, 1), (2 * US - 1, 1), (2 * US, 2), (4 * US - 1, 2), (4 * US, 3),
     (MS, 10), (1024 * US, 11), (S, 20), ((1 << 63) - 1, 54)],
)  # fmt: skip
def test_the_bin_of_a_duration(duration, number):
    found = of([duration]).statistics()
    assert found.bins == [0] * number + [1]
    assert len(found.boundaries) == number


def test_bins_and_boundaries_say_what_was_counted():
    rng = random.Random(3)
    durations = [int(10 ** rng.uniform(0, 11)) for _ in range(3000)]
    found = of(durations).statistics()
    assert found.bins == recounted(durations, found.boundaries)
    assert found.boundaries[:4] == [1_000, 2_000, 4_000, 8_000]


def test_nothing():
    assert Histogram().statistics() == ([], [0])
    assert Histogram().percentile(50) == 0
    assert Histogram().count == 0


def test_many_at_once_are_many_one_by_one():
    histogram = Histogram()
    histogram.add(7 * US, 40)
    assert histogram.bins == of([7 * US] * 40).bins
    assert histogram.count == 40


def test_merged_is_as_if_counted_together():
    one, other = [5, 70 * US, 3 * MS], [70 * US, 9 * S]
    merged = of(one)
    second = of(other)
    merged.merge(second)
    assert merged.bins == of(one + other).bins
    assert second.bins == of(other).bins


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99, 99.9, 100])
def test_a_percentile_is_right_within_its_bin(percent):
    rng = random.Random(percent)
    durations = sorted(rng.randrange(1, 1 << rng.randrange(1, 40)) for _ in range(5000))
    true = durations[int(len(durations) * percent / 100 + 0.5) - 1] / US
    found = of(durations).percentile(percent)
    assert found <= max(1, 2 * true)
    assert found >= true / 2 if true >= 1 else found >= 0


def test_within_a_bin_durations_count_as_spread_evenly():
    histogram = of([100 * US] * 100)  # from 64 to 128 us
    assert histogram.percentile(50) == 96
    assert histogram.percentile(100) == 128
