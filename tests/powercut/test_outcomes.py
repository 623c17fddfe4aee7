"""What a power cut may leave: exactly what the law at the head of powercut.py allows.

The law is spelled out once more here, as slow as can be: all subsets of all sectors of requests.
"""

import itertools
import random

import pytest

from nbdserve.powercut.outcomes import States, all_cuts, cut, digest, nb_stretches, state_at
from nbdserve.powercut.writelog import Kind, WriteLog

S = 512


def sectors(text):
    """A sector full of each letter."""
    return b"".join(letter.encode() * S for letter in text)


def letters(content):
    """The first letter of each sector; a dot for zero."""
    return bytes(content)[::S].replace(b"\0", b".").decode()


def outcomes(log, moment=None):
    """All first files that a cut at a moment may leave, in letters."""
    state = state_at(log, len(log) if moment is None else moment)
    return sorted(letters(images[0]) for images in state.outcomes())


def write(log, offset, text, *, file=0, durable=False):
    log.end(log.begin(Kind.WRITE, file, offset * S, sectors(text)), durable=durable)


def flush(log, file=0):
    log.end(log.begin(Kind.FLUSH, file))


@pytest.fixture
def log():
    return WriteLog([sectors("aaaa")])


def test_each_sector_is_there_or_not(log):
    write(log, 1, "xy")
    assert outcomes(log) == ["aaaa", "aaya", "axaa", "axya"]
    assert outcomes(log, 0) == ["aaaa"]
    assert outcomes(log, 1) == outcomes(log)  # begun is enough


def test_a_flush_covers_what_had_returned_when_it_began(log):
    first = log.begin(Kind.WRITE, 0, 0, sectors("x"))
    write(log, 1, "y")
    number = log.begin(Kind.FLUSH)
    log.end(first)
    write(log, 2, "z")
    assert len(outcomes(log)) == 8  # it has not returned
    log.end(number)
    assert outcomes(log) == ["ayaa", "ayza", "xyaa", "xyza"]


def test_a_flush_covers_its_own_file_only():
    log = WriteLog([sectors("a"), sectors("b")])
    write(log, 0, "x")
    write(log, 0, "y", file=1)
    flush(log, file=1)
    assert outcomes(log) == ["a", "x"]
    assert {letters(images[1]) for images in state_at(log, len(log)).outcomes()} == {"y"}


def test_a_write_with_fua_is_there_and_nothing_else_is(log):
    write(log, 0, "x")
    write(log, 1, "y", durable=True)
    number = log.begin(Kind.WRITE, 0, 2 * S, sectors("z"))
    assert outcomes(log) == ["ayaa", "ayza", "xyaa", "xyza"]
    log.end(number, durable=True)
    assert outcomes(log) == ["ayza", "xyza"]


def test_the_death_of_a_process_takes_only_what_had_not_returned(log):
    write(log, 0, "x")
    log.begin(Kind.WRITE, 0, S, sectors("yz"))
    found = state_at(log, len(log), power=False).outcomes()
    assert sorted(letters(images[0]) for images in found) == ["xaaa", "xaza", "xyaa", "xyza"]


def test_writes_of_one_sector_come_in_their_order(log):
    write(log, 0, "x")
    write(log, 0, "y")
    assert outcomes(log) == ["aaaa", "xaaa", "yaaa"]
    write(log, 0, "z", durable=True)
    assert outcomes(log) == ["zaaa"]
    write(log, 0, "w")
    assert outcomes(log) == ["waaa", "zaaa"]


def test_zeroes_and_discards_are_like_writes_of_zeroes(log):
    log.end(log.begin(Kind.WRITE_ZEROES, 0, 3 * S, 2 * S))
    log.end(log.begin(Kind.DISCARD, 0, 0, S))
    assert outcomes(log) == [".aa.", ".aa..", ".aaa", ".aaa.", "aaa.", "aaa..", "aaaa", "aaaa."]


def test_the_end_of_the_file_is_where_something_was_kept(log):
    write(log, 5, "xy")
    assert outcomes(log) == ["aaaa", "aaaa..y", "aaaa.x", "aaaa.xy"]


def test_what_was_refused_may_be_there_only_until_then(log):
    log.refused(log.begin(Kind.WRITE_ZEROES, 0, 0, S))
    assert outcomes(log, 1) == [".aaa", "aaaa"]
    assert outcomes(log) == ["aaaa"]
    assert letters(log.replay()[0]) == "aaaa"


def test_what_makes_no_difference_is_no_outcome(log):
    write(log, 0, "aaaa")
    assert outcomes(log) == ["aaaa"]


def random_log(seed, length=9, *, history=True):
    chooser = random.Random(seed)
    log = WriteLog([sectors("ab"), sectors("c")], history=history)
    begun = []
    for number in range(length):
        kind = chooser.choice((Kind.WRITE, Kind.WRITE, Kind.WRITE, Kind.WRITE_ZEROES,
                               Kind.DISCARD, Kind.FLUSH))
        offset, length = chooser.choice(((0, S), (S, S), (0, 2 * S), (100, 600), (3 * S, 40)))
        data = bytes([65 + number]) * length if kind is Kind.WRITE else length
        file = chooser.randrange(2)
        begun.append((log.begin(kind, file) if kind is Kind.FLUSH
                      else log.begin(kind, file, offset, data), kind is Kind.WRITE))
        while begun and chooser.random() < 0.6:
            number, is_write = begun.pop(chooser.randrange(len(begun)))
            log.end(number, durable=is_write and chooser.random() < 0.2)
    return log


def by_the_law(log, moment):
    """All outcomes, by going through all subsets of all sectors; None: there are too many."""
    records = log.records[:moment]
    returned = {record.number: at for at, record in enumerate(records)
                if record.kind in (Kind.END, Kind.DURABLE, Kind.FLUSHED)}
    todo = []
    for record in records:
        if record.kind not in (Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD):
            continue
        at = returned.get(record.number)
        durable = at is not None and (
            records[at].kind is Kind.DURABLE
            or any(other.kind is Kind.FLUSH and other.file == record.file
                   and other.number > at and other.number in returned for other in records)
        )
        for place in range(record.offset // S, (record.offset + record.length - 1) // S + 1):
            todo.append((record, max(place * S, record.offset),
                         min(place * S + S, record.offset + record.length), durable))
    if sum(not durable for *_, durable in todo) > 9:
        return None
    found = set()
    for kept in itertools.product(*((True,) if piece[3] else (False, True) for piece in todo)):
        files = [bytearray(bytes(content)) for content in log.initial]
        for (record, low, high, _), keep in zip(todo, kept, strict=True):
            content = files[record.file]
            if record.kind is Kind.DISCARD:
                high = min(high, len(content))
            if keep and low < high:
                content.extend(bytes(max(0, high - len(content))))
                start = low - record.offset
                content[low:high] = (record.data or bytes(record.length))[start:][: high - low]
        found.add(tuple(bytes(content) for content in files))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_outcomes_are_those_of_the_law(seed):
    log = random_log(seed)
    for moment in range(len(log) + 1):
        expected = by_the_law(log, moment)
        if expected is None:
            continue
        state = state_at(log, moment)
        found = list(state.outcomes())
        assert {pad(images) for images in found} == {pad(images) for images in expected}
        assert found[0] == state.nothing_kept()
        for number in range(20):
            assert pad(cut(log, moment, number)) in {pad(images) for images in expected}


def pad(images):
    """Where a file ends within a sector, or in zeroes, is not asked."""
    return tuple(bytes(content).rstrip(b"\0") for content in images)


def test_a_seed_says_all():
    log = random_log(1)
    assert cut(log, len(log), 5) == cut(log, len(log), 5)
    assert len({digest(cut(log, len(log), seed)) for seed in range(50)}) > 3


def test_all_styles_of_tearing_are_drawn():
    """Of 32 sectors in one write: all, none, some in blocks of eight, some one by one."""
    log = WriteLog([sectors("a" * 32)])
    write(log, 0, "x" * 32)
    found = [letters(cut(log, len(log), seed)[0]) for seed in range(300)]
    blocks = [[text[at : at + 8] for at in range(0, 32, 8)] for text in found]
    assert "a" * 32 in found
    assert "x" * 32 in found
    by_blocks = [all(len(set(block)) == 1 for block in each) for each in blocks]
    whole = [len(set(text)) == 1 for text in found]
    assert sum(whole) > 30
    assert sum(by_blocks) > sum(whole) + 30
    assert len(found) > sum(by_blocks) + 30


# --- all_cuts -------------------------------------------------------------------------------------


def test_all_cuts_are_all_there_are(log):
    write(log, 0, "x")
    write(log, 1, "y")
    flush(log)
    write(log, 2, "zz")
    cuts = list(all_cuts(log, 1000))
    assert sorted(letters(images[0]) for _, images, _ in cuts) == [
        "aaaa", "ayaa", "xaaa", "xyaa", "xyaz", "xyza", "xyzz"]
    for moment, images, seed in cuts:
        assert images in list(state_at(log, moment).outcomes())
        assert images == cut(log, moment, seed)


def test_what_differs_by_a_mark_alone_comes_twice(log):
    write(log, 0, "x")
    log.mark(b"the write was acknowledged")
    found = [
        (letters(images[0]), len(log.marks(moment))) for moment, images, _ in all_cuts(log, 99)
    ]
    assert sorted(found) == [("aaaa", 0), ("aaaa", 1), ("xaaa", 0), ("xaaa", 1)]


def test_a_limit_is_kept_and_spread():
    log = WriteLog([bytes(64 * S)])
    for number in range(20):
        write(log, number, "xyzxyzxyzxyz")
        flush(log)
    assert nb_stretches(log) == 21
    assert len({moment for moment, _, _ in all_cuts(log, 21)}) == 21
    for limit in (1, 7, 100, 700):
        cuts = list(all_cuts(log, limit))
        assert len(cuts) == limit
        assert len({digest(images) for _, images, _ in cuts}) == limit
        if limit >= 100:
            assert len({moment for moment, _, _ in cuts}) > 15
    assert list(all_cuts(log, 50, seed=1)) == list(all_cuts(log, 50, seed=1))
    assert list(all_cuts(log, 50, seed=1)) != list(all_cuts(log, 50, seed=2))


# --- many outcomes --------------------------------------------------------------------------------


@pytest.fixture
def many():
    """Forty writes of 64 sectors, which overlap, and a durable one among them."""
    log = WriteLog([sectors("a" * 100), sectors("b")])
    for number in range(40):
        write(log, number * 40, chr(48 + number) * 64, durable=number == 20)
    write(log, 3, "z", file=1)
    return log


def test_seeds_go_through_what_shows_most_first(many):
    state = state_at(many, len(many))
    assert state.nb_outcomes is None
    assert state.outcome(0) == state.nothing_kept()
    assert state.outcome(1) == state.all_kept()
    lost, kept = set(), set()
    for seed in range(2, 2 + 5 * 40):
        found = letters(state.outcome(seed)[0])
        for number in range(40):
            letter = chr(48 + number)
            if letter not in found and all(chr(48 + other) in found for other in range(40)
                                           if other != number):
                lost.add(number)
            if letter in found and set(found) <= set("a.D" + letter):
                kept.add(number)
    assert lost >= set(range(40)) - {20}
    assert len(kept) >= 39


def test_the_short_ways_are_right(many):
    """One lost, and one kept, are made otherwise than by doing all the rest."""
    state = state_at(many, len(many))
    for chosen, (_, certain) in enumerate(state.changes):
        if not certain:
            others = {number: 0.0 for number in state._uncertain if number != chosen}
            nothing = random.Random(0)
            assert state._one_lost(chosen, 0) == state._apply({chosen: 0.0}, 1 << 62, nothing)
            assert state._one_kept(chosen, 0) == state._apply(others, 1 << 62, nothing)


def test_a_search_with_another_seed_begins_otherwise(many):
    one, other = (list(all_cuts(many, 60, seed=seed)) for seed in (3, 4))
    assert len({digest(found.images) for found in one + other}) > 100
    for moment, images, seed in one:
        assert cut(many, moment, seed) == images


def test_a_long_log_has_the_states_of_its_moments():
    """They are found from checkpoints, not from the start."""
    log = WriteLog([bytes(100 * S)])
    chooser = random.Random(1)
    for number in range(1500):
        write(log, chooser.randrange(99), chr(97 + number % 26), durable=number % 7 == 0)
        if number % 50 == 0:
            flush(log)
    states = States(log)
    for moment in chooser.sample(range(len(log) + 1), 60):
        assert states.at(moment).outcome(5) == state_at(log, moment).outcome(5)
    with pytest.raises(ValueError, match=f"moment {len(log) + 1}: the write log has 0 to"):
        states.at(len(log) + 1)


# --- a log that forgets ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_log_that_forgets_has_the_same_outcomes_now(seed):
    full, forgetful = random_log(seed, 30), random_log(seed, 30, history=False)
    assert len(full) == len(forgetful)
    assert forgetful.first_moment > 0
    assert len(forgetful.records) < len(full.records)
    now = len(full)
    one, other = state_at(full, now), state_at(forgetful, now)
    assert one.base == other.base
    assert [(record[3:], sure) for record, sure in one.changes] == [
        (record[3:], sure) for record, sure in other.changes]
    assert [cut(full, now, number) for number in range(20)] == [
        cut(forgetful, now, number) for number in range(20)]
    assert {found.moment for found in all_cuts(forgetful, 50)} == {now}
    with pytest.raises(ValueError, match="moment 0: the write log has"):
        cut(forgetful, 0, 0)
