"""How soon cuts show the mistakes that programs make: toys of a journal and of a rename, written
straight into a log. The numbers are in docs/powercut.md.

Each toy has a right variant, in which no cut shows anything, and one without a barrier.
"""

import pytest

from nbdserve.powercut.outcomes import all_cuts
from nbdserve.powercut.writelog import Kind, WriteLog

TIMES = 24
BODY = 16 << 10
HOME = 1 << 20  # where the journal's transactions go in the end
ELSEWHERE = 2 << 20


class Toy:
    """A disk of 4 MiB. `noise`: so many other writes before each transaction."""

    def __init__(self, noise):
        self.log = WriteLog([bytes(4 << 20)])
        self.noise = noise

    def write(self, offset, data):
        self.log.end(self.log.begin(Kind.WRITE, 0, offset, data))

    def flush(self):
        self.log.end(self.log.begin(Kind.FLUSH))

    def others(self, number):
        for place in range(self.noise):
            self.write(ELSEWHERE + place * 8192, text(number, 512))


def text(number, length):
    return b"%04d" % number * (length // 4)


def number_at(content, offset):
    return int(content.read(offset, 4).strip(b"\0") or 0)


def journal(right, noise=0):
    """A body, a commit block, then in place. Without a flush between, the block may come first."""
    toy = Toy(noise)
    for number in range(1, TIMES + 1):
        toy.others(number)
        toy.write(4096, text(number, BODY))
        if right:
            toy.flush()
        toy.write(0, text(number, 512))
        toy.flush()
        toy.log.mark(b"committed")
        toy.write(HOME, text(number, BODY))
        toy.flush()
    return toy.log


def journal_is_sound(content, committed):
    number = number_at(content, 0)
    body = text(number, BODY)
    there = content.read(HOME, BODY) == body or content.read(4096, BODY) == body
    return number >= committed and (not number or there)


def rename(right, noise=0):
    """A new file, then the name points to it. Without a flush between, it may before."""
    toy = Toy(noise)
    for number in range(1, TIMES + 1):
        toy.others(number)
        for offset in range(0, BODY, 4096):
            toy.write(8192 + number % 2 * BODY + offset, text(number, 4096))
        if right:
            toy.flush()
        toy.write(0, text(number, 512))
        toy.flush()
        toy.log.mark(b"renamed")
    return toy.log


def rename_is_sound(content, renamed):
    number = number_at(content, 0)
    body = content.read(8192 + number % 2 * BODY, BODY)
    return number >= renamed and (not number or body == text(number, BODY))


def append(right, noise=0):
    """A promise is made before, not after, the flush."""
    toy = Toy(noise)
    for number in range(1, TIMES + 1):
        toy.others(number)
        toy.write(0, text(number, 512))
        if right:
            toy.flush()
        toy.log.mark(b"written")
        toy.flush()
    return toy.log


def append_is_sound(content, written):
    return number_at(content, 0) >= written


def cuts_until_found(log, is_sound, seed, limit=1000):
    for number, (moment, images, _) in enumerate(all_cuts(log, limit, seed=seed), start=1):
        if not is_sound(images[0], len(log.marks(moment))):
            return number
    return None


TOYS = [
    (journal, journal_is_sound, 0, 150),
    (journal, journal_is_sound, 100, 150),
    (rename, rename_is_sound, 0, 100),
    (rename, rename_is_sound, 100, 100),
    (append, append_is_sound, 0, 20),
]


@pytest.mark.parametrize(("program", "is_sound", "noise", "within"), TOYS)
def test_a_missing_flush_is_found(program, is_sound, noise, within):
    log = program(False, noise)
    for seed in range(3):
        found = cuts_until_found(log, is_sound, seed)
        assert found is not None
        assert found <= within


@pytest.mark.parametrize("toy", [TOYS[0], TOYS[2], TOYS[4]])
def test_nothing_is_found_where_nothing_is_missing(toy):
    program, is_sound, *_ = toy
    assert cuts_until_found(program(True), is_sound, 0, 300) is None
