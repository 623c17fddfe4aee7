"""The leaky buckets, against vectors computed from their definition and not with their code.

A client that always has a request waiting finds a bucket that never runs empty. Then the request
number n (from 0) of u units each may go as soon as what the n before it poured in, less what has
leaked since the start, is no more than the bucket holds: n * u - rate * t <= size. `backlogged` is
that sentence; it knows no levels. `recurrence` is the definition step by step, in exact fractions.
"""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.run import READ, WRITE
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.bucket import Buckets


def go(buckets, op, nb_bytes, now):
    """Wait as told, then go; returns when that was."""
    for _ in range(2):  # the second time is for what rounding may leave
        now += buckets.wait(op, now)
    assert buckets.wait(op, now) == 0
    buckets.add(op, nb_bytes)
    return now


def times(limits, requests, start=1000.0):
    """When each of (op, bytes) goes, in seconds from the start, if each follows the one before."""
    buckets, now, found = Buckets(limits, start), start, []
    for op, nb_bytes in requests:
        now = go(buckets, op, nb_bytes, now)
        found.append(now - start)
    return found


def backlogged(number, units, average, maximum=0, length=1):
    size = maximum * length or Fraction(average, 10)
    poured = number * units
    at = max(Fraction(0), Fraction(poured - size) / average)
    if length > 1:
        at = max(at, (poured - Fraction(maximum, 10)) / maximum)
    return float(at)


@pytest.mark.parametrize(
    ("units", "limit"),
    [
        (1, RateLimit(200)),
        (1, RateLimit(3)),  # a bucket of less than one operation
        (1, RateLimit(100, 300)),
        (1, RateLimit(100, 100)),
        (1, RateLimit(50, 200, 1)),
        (1, RateLimit(50, 200, 2)),
        (1, RateLimit(7, 11, 5)),
        (1, RateLimit(100, 100, 3)),
    ],
    ids=str,
)
def test_a_backlog_goes_when_the_definition_says(units, limit):
    expected = [
        backlogged(n, units, limit.average, limit.maximum, limit.length) for n in range(1500)
    ]
    found = times(ThrottleLimits(iops_total=limit), [(READ, 4096)] * 1500)
    assert found == pytest.approx(expected, abs=1e-6)


def test_numbers_one_can_check_in_the_head():
    """20 fit in, and the 21st finds no more than 20; then one each 5 ms."""
    found = times(ThrottleLimits(iops_total=RateLimit(200)), [(WRITE, 4096)] * 1000)
    assert found[20] == 0
    assert found[21] == pytest.approx(0.005)
    assert found[399] == pytest.approx(1.895)
    assert found[999] == pytest.approx(4.895)


def test_a_long_burst_goes_at_the_maximum_and_then_at_the_average():
    """100/s, 2000/s for 60 s, as in QEMU's documentation: 120000 fit in, and since 100/s leak
    meanwhile the burst lasts a little over 63 s."""
    limits = ThrottleLimits(iops_total=RateLimit(100, 2000, 60))
    found = times(limits, [(READ, 1)] * 127_000)
    assert found[2000] == pytest.approx(0.9, abs=1e-3)
    assert found[120_000] == pytest.approx(59.9, abs=1e-2)
    end = 120_000 / (2000 - 100)  # the bucket is full
    assert found[int(2000 * end) - 300] == pytest.approx(end - 0.25, abs=1e-2)
    assert found[126_999] - found[126_899] == pytest.approx(1.0, abs=1e-3)


def test_bytes_are_counted_by_length():
    found = times(ThrottleLimits(bps_total=RateLimit(1 << 20)), [(READ, 65536)] * 100)
    assert found == pytest.approx([backlogged(n, 65536, 1 << 20) for n in range(100)])


def test_one_request_larger_than_the_bucket_passes_and_the_next_pays():
    found = times(ThrottleLimits(bps_total=RateLimit(1000)), [(WRITE, 5000), (WRITE, 1)])
    assert found == pytest.approx([0, (5000 - 100) / 1000])


@pytest.mark.parametrize(
    ("nb_bytes", "operations"), [(1, 1), (4095, 1), (4096, 1), (6144, 1.5), (8192, 2), (40960, 10)]
)
def test_iops_size_makes_several_of_a_long_request(nb_bytes, operations):
    limits = ThrottleLimits(iops_total=RateLimit(100), iops_size=4096)
    found = times(limits, [(READ, nb_bytes)] * 50)
    assert found == pytest.approx([backlogged(n, Fraction(operations), 100) for n in range(50)])


def test_a_total_is_shared_by_reads_and_writes():
    one = times(ThrottleLimits(iops_total=RateLimit(10)), [(READ, 1)] * 40)
    both = times(ThrottleLimits(iops_total=RateLimit(10)), [(READ, 1), (WRITE, 1)] * 20)
    assert both == pytest.approx(one)


def test_read_and_write_limits_are_apart():
    limits = ThrottleLimits(iops_read=RateLimit(10), iops_write=RateLimit(1000))
    buckets = Buckets(limits, 0.0)
    for _ in range(2):
        buckets.add(READ, 1)
    assert buckets.wait(READ, 0.0) == pytest.approx(0.1)
    assert buckets.wait(WRITE, 0.0) == 0
    only_reads = Buckets(ThrottleLimits(bps_read=RateLimit(1)), 0.0)
    only_reads.add(WRITE, 1 << 30)
    assert only_reads.wait(READ, 0.0) == only_reads.wait(WRITE, 0.0) == 0


def test_the_strictest_of_several_limits_counts():
    limits = ThrottleLimits(bps_total=RateLimit(1000), iops_total=RateLimit(10))
    assert times(limits, [(READ, 1)] * 10)[-1] == pytest.approx(backlogged(9, 1, 10))
    assert times(limits, [(READ, 900)] * 10)[-1] == pytest.approx(backlogged(9, 900, 1000))


def test_what_is_not_used_is_kept_up_to_the_size_of_the_bucket():
    buckets = Buckets(ThrottleLimits(iops_total=RateLimit(10, 50)), 0.0)
    for now in (0.0, 1e6, 2e6):  # idle for very long: no more than one bucket has come together
        for _ in range(51):
            assert buckets.wait(READ, now) == 0
            buckets.add(READ, 1)
        assert buckets.wait(READ, now) == pytest.approx(0.1)


def test_a_clock_that_stands_still_leaks_nothing():
    buckets = Buckets(ThrottleLimits(iops_total=RateLimit(10)), 5.0)
    buckets.add(READ, 1)
    buckets.add(READ, 1)
    assert buckets.wait(READ, 5.0) == buckets.wait(READ, 5.0) == pytest.approx(0.1)


def test_what_is_taken_back_was_never_there():
    limits = ThrottleLimits(
        bps_total=RateLimit(10_000, 20_000, 3), iops_write=RateLimit(10), iops_size=512
    )
    one, other = Buckets(limits, 0.0), Buckets(limits, 0.0)
    for buckets in (one, other):
        buckets.add(WRITE, 8000)
    other.add(WRITE, 7777)
    other.take_back(WRITE, 7777)
    assert one.wait(WRITE, 0.1) == pytest.approx(other.wait(WRITE, 0.1))


def test_no_bucket_is_emptier_than_empty():
    """What leaked meanwhile cannot be taken back."""
    limits = ThrottleLimits(iops_write=RateLimit(10), bps_write=RateLimit(1, 1000, 2))
    buckets = Buckets(limits, 0.0)
    for _ in range(3):
        buckets.take_back(WRITE, 50)
    buckets.add(WRITE, 1)
    assert buckets.wait(WRITE, 0.0) == 0
    buckets.add(WRITE, 1)
    assert buckets.wait(WRITE, 0.0) == pytest.approx((2 - 1) / 10)
    only_bytes = Buckets(ThrottleLimits(bps_write=RateLimit(1, 1000, 2)), 0.0)
    only_bytes.take_back(WRITE, 500)
    only_bytes.add(WRITE, 200)
    assert only_bytes.wait(WRITE, 0.0) == pytest.approx((200 - 100) / 1000)


# --- any sequence ----------------------------------------------------------------------------


def recurrence(steps, average, maximum, length):
    """The waits that the definition gives for (seconds since the last step, units), each request
    going whether it had to wait or not."""
    size = Fraction(maximum * length) if maximum else Fraction(average, 10)
    level = burst = Fraction(0)
    waits = []
    for elapsed, units in steps:
        level = max(level - average * elapsed, Fraction(0))
        burst = max(burst - maximum * elapsed, Fraction(0))
        if level > size:
            waits.append((level - size) / average)
        elif length > 1 and burst > Fraction(maximum, 10):
            waits.append((burst - Fraction(maximum, 10)) / maximum)
        else:
            waits.append(Fraction(0))
        level += units
        burst += units
    return waits


STEPS = st.lists(
    st.tuples(st.integers(0, 3000).map(lambda ms: Fraction(ms, 1000)), st.integers(1, 500)),
    max_size=60,
)


@given(STEPS, st.integers(1, 1000), st.integers(0, 3000), st.integers(1, 4))
def test_any_sequence_waits_as_the_recurrence_says(steps, average, more, length):
    maximum = average + more if more else 0
    length = length if maximum else 1
    limits = ThrottleLimits(bps_write=RateLimit(average, maximum, length))
    buckets, now, found = Buckets(limits, 0.0), Fraction(0), []
    for elapsed, units in steps:
        now += elapsed
        found.append(buckets.wait(WRITE, float(now)))
        buckets.add(WRITE, units)
    expected = [float(wait) for wait in recurrence(steps, average, maximum, length)]
    assert found == pytest.approx(expected, abs=1e-6)
