"""Decisions about faults: triggers, draws that nothing else shifts, and what a cut write leaves."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.faults import Fault
from nbdserve.filters.injector import SECTOR, Hit, Injector, Rule, flip_bits, pieces_done


def fired(injector, requests):
    """Which rules did something to each request."""
    return [
        [hit.rule.number for hit in injector.decide(*request)] for request in requests
    ]


def injector_of(*faults, seed=0, exists=lambda path: True):
    injector = Injector(seed, exists)
    for fault in faults:
        injector.add(fault)
    return injector


READS = [("read", 512 * n, 512) for n in range(12)]


@pytest.mark.parametrize(
    ("trigger", "met"),
    [
        ({}, range(12)),
        ({"after": 4}, range(4, 12)),
        ({"count": 2}, range(2)),
        ({"after": 4, "count": 2}, range(4, 6)),
        ({"offset": 1024, "length": 1024}, range(2, 4)),
        ({"offset": 1025, "length": 1024}, range(2, 5)),
        ({"offset": 1024, "after": 1, "count": 3}, range(3, 6)),
        ({"probability": 0.0}, range(0)),
        ({"ops": "write"}, range(0)),
    ],
)
def test_triggers(trigger, met):
    injector = injector_of(Fault(error="EIO", **trigger))
    assert [n for n, rules in enumerate(fired(injector, READS)) if rules] == [*met]


def test_a_file_switches_a_fault_on_and_off_and_others_are_not_counted():
    there = set()
    injector = injector_of(Fault(error="EIO", if_file="/f", after=1), exists=there.__contains__)
    seen = []
    for number, request in enumerate(READS):
        if number in (3, 8):
            there.add("/f")
        if number == 6:
            there.clear()
        seen.append(bool(injector.decide(*request)))
    assert [n for n, met in enumerate(seen) if met] == [4, 5, 8, 9, 10, 11]
    assert injector.rules[0].matched == 7


def test_the_file_is_the_one_that_was_meant_wherever_the_process_goes(tmp_path, monkeypatch):
    """A daemon leaves the directory that it was started in."""
    monkeypatch.chdir(tmp_path)
    injector = Injector(0)
    injector.add(Fault(error="EIO", if_file="broken"))
    (tmp_path / "broken").touch()
    monkeypatch.chdir("/")
    assert injector.decide("read", 0, 512)


def test_effects_add_up_until_one_decides_what_becomes_of_the_request():
    injector = injector_of(
        Fault(delay=1),
        Fault(error="EIO", count=2),
        Fault(error="ENOSPC", count=3),
        Fault(ops="read", flip_bits=1),
    )
    assert fired(injector, READS)[:6] == [[0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [0, 3]]
    assert [(rule.matched, rule.injected) for rule in injector.rules] == [
        (12, 12), (12, 2), (12, 3), (12, 7),
    ]  # fmt: skip


FAULTS = st.builds(
    Fault,
    ops=st.sampled_from(["read", "write", "read+write", "all"]),
    after=st.integers(0, 3),
    count=st.none() | st.integers(1, 5),
    probability=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    delay=st.just(1.0),
)
REQUESTS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "flush"]), st.integers(0, 4096), st.just(512)),
    max_size=30,
)
SEEDS = st.integers(0, 2**63 - 1)


@given(st.lists(FAULTS, max_size=4), REQUESTS, SEEDS)
def test_the_same_requests_meet_the_same_faults(faults, requests, seed):
    """And take as long: what is drawn depends on nothing that another run has not."""
    one, other = injector_of(*faults, seed=seed), injector_of(*faults, seed=seed)
    for request in requests:
        hits = one.decide(*request)
        again = other.decide(*request)
        assert [(h.rule.number, h.seconds()) for h in hits] == [
            (h.rule.number, h.seconds()) for h in again
        ]


@given(FAULTS, st.lists(FAULTS, max_size=3), REQUESTS, SEEDS)
def test_no_other_rule_shifts_what_a_rule_draws(fault, others, requests, seed):
    alone = injector_of(fault, seed=seed)
    beside = injector_of(fault, *others, seed=seed)
    for request in requests:
        first = [hit for hit in beside.decide(*request) if hit.rule.number == 0]
        assert [(h.match, h.seconds()) for h in alone.decide(*request)] == [
            (h.match, h.seconds()) for h in first
        ]


@given(FAULTS, REQUESTS, REQUESTS, SEEDS)
def test_requests_that_a_rule_is_not_about_shift_nothing(fault, requests, others, seed):
    """So what other clients do with other parts of the disk does not matter."""
    fault = Fault(ops="write", after=fault.after, probability=0.5, delay=1, jitter=1)
    plain = injector_of(fault, seed=seed)
    expected = [[h.seconds() for h in plain.decide(*request)] for request in requests]
    mixed, seen = injector_of(fault, seed=seed), []
    for number, request in enumerate(requests):
        seen.append([h.seconds() for h in mixed.decide(*request)])
        for _, offset, length in others[number : number + 1]:
            assert mixed.decide("read", offset, length) == []
    assert seen == expected


def test_seeds_differ_and_so_do_rules_and_the_share_is_the_probability():
    fault = Fault(error="EIO", probability=0.3)
    met = {
        seed: tuple(map(bool, fired(injector_of(fault, seed=seed), READS * 50)))
        for seed in range(20)
    }
    assert len(set(met.values())) == 20
    share = sum(map(sum, met.values())) / (20 * 600)
    assert 0.28 < share < 0.32
    two = injector_of(Fault(delay=1, probability=0.5), Fault(delay=1, probability=0.5))
    pairs = collections.Counter(map(tuple, fired(two, READS * 50)))
    assert min(pairs[key] for key in [(), (0,), (1,), (0, 1)]) > 100


def test_what_a_seed_means_is_part_of_the_interface():
    """A test of somebody's that found a bug with a seed shall find it again next year."""
    injector = injector_of(Fault(error="EIO", probability=0.5), seed=7)
    met = "".join("01"[bool(rules)] for rules in fired(injector, READS * 2))
    assert met == "001011101000001001000101"
    torn = pieces_done(hit_of(Fault(torn=True)), 0, 4096)
    assert torn == [(512, 1024), (2048, 1024), (3584, 512)]
    assert flipped(Fault(flip_bits=3), 0, 512) == [2057, 3842, 3884]
    assert round(hit_of(Fault(jitter=1)).seconds(), 6) == 0.815507


def hit_of(fault, match=1, seed=7):
    return Hit(Rule(fault, 0), match, seed)


WRITES = st.tuples(st.integers(0, 5000), st.integers(1, 8192))


@given(WRITES, st.integers(1, 100), st.booleans())
def test_a_cut_write_does_whole_sectors_and_never_all(write, match, is_torn):
    offset, length = write
    fault = Fault(torn=True) if is_torn else Fault(short="random")
    pieces = pieces_done(hit_of(fault, match), offset, length)
    done = bytearray(length)
    for start, nb_bytes in pieces:
        assert nb_bytes > 0
        assert offset <= start < start + nb_bytes <= offset + length
        assert not any(done[start - offset : start - offset + nb_bytes])
        done[start - offset : start - offset + nb_bytes] = b"\1" * nb_bytes
    sectors = collections.defaultdict(set)
    for position, value in enumerate(done, offset):
        sectors[position // SECTOR].add(value)
    assert all(len(values) == 1 for values in sectors.values())
    assert 0 in done
    if not is_torn:
        assert done == done.rstrip(b"\0").ljust(length, b"\0")
        assert 0 not in done.rstrip(b"\0")
    assert pieces == pieces_done(hit_of(fault, match), offset, length)


@pytest.mark.parametrize(
    ("sectors", "length", "done"),
    [(0, 4096, 0), (1, 4096, 512), (7, 4096, 3584), (8, 4096, 3584), (99, 512, 0), (1, 513, 512)],
)
def test_a_write_that_is_cut_where_it_is_told(sectors, length, done):
    pieces = pieces_done(hit_of(Fault(short=sectors)), 0, length)
    assert pieces == ([(0, done)] if done else [])


def test_a_cut_falls_between_the_sectors_of_the_disk_not_of_the_request():
    assert pieces_done(hit_of(Fault(short=1)), 500, 1000) == [(500, 12)]
    assert pieces_done(hit_of(Fault(short=2)), 500, 1000) == [(500, 524)]


@pytest.mark.parametrize("fault", [Fault(torn=True), Fault(short="random")])
def test_every_sector_is_sometimes_done_and_sometimes_not(fault):
    counts = collections.Counter()
    for match in range(200):
        for start, length in pieces_done(hit_of(fault, match), 0, 4096):
            counts.update(range(start // SECTOR, (start + length) // SECTOR))
    last = 7 if fault.torn else 6  # of a short write the last never is
    assert all(5 < counts[sector] < 195 for sector in range(last))


def test_a_lost_write_does_nothing():
    assert pieces_done(hit_of(Fault(lost=True)), 0, 4096) == []


def flipped(fault, offset, length, match=1):
    buffer = bytearray(length)
    bits = flip_bits(hit_of(fault, match), offset, memoryview(buffer))
    found = [
        (offset + number) * 8 + bit
        for number, byte in enumerate(buffer)
        for bit in range(8)
        if byte >> bit & 1
    ]
    assert bits == found
    return bits


@given(WRITES, st.integers(1, 100))
def test_as_many_bits_are_flipped_as_were_asked_for(read, number):
    offset, length = read
    bits = flipped(Fault(flip_bits=number), offset, length)
    assert len(bits) == min(number, length * 8)


def test_the_same_bytes_have_the_same_bits_flipped_whenever_they_are_read():
    spot = Fault(flip_bits=4, offset=1000, length=100)
    bits = flipped(spot, 0, 4096)
    assert bits == flipped(spot, 512, 1024, match=9) == flipped(spot, 1000, 100, match=3)
    assert all(1000 * 8 <= bit < 1100 * 8 for bit in bits)
    everywhere = Fault(flip_bits=4)
    assert flipped(everywhere, 0, 512) == flipped(everywhere, 0, 512, match=2)
    assert flipped(everywhere, 0, 512) != flipped(everywhere, 512, 512)[0:4]


def test_the_delay_has_its_jitter_spread_evenly():
    seconds = [hit_of(Fault(delay=2, jitter=1), match).seconds() for match in range(1000)]
    assert 2 <= min(seconds) < 2.01
    assert 2.99 < max(seconds) < 3
    assert 2.47 < sum(seconds) / 1000 < 2.53
