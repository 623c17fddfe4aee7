"""What the judge of reads lets pass, and what it does not."""

import pytest

from races.history import History

OLD = b"o" * 8


@pytest.fixture
def history():
    return History(OLD)


def write(history, name, effect, offset=0):
    interval = history.begin(name, offset, effect)
    history.end(interval)
    return interval


def sees(history, data, offset=0, begun=None):
    history.read(begun or history.begin("r"), offset, data)
    try:
        history.check()
    except AssertionError:
        return False
    return True


def test_nothing_was_written(history):
    assert sees(history, OLD)
    assert not sees(history, b"ooooooox")


def test_what_was_answered_is_there_and_nothing_older(history):
    write(history, "a", b"aaaa")
    assert sees(history, b"aaaaoooo")
    assert not sees(history, b"aaaooooo")


def test_beside_a_write_each_byte_is_old_or_new(history):
    begun = history.begin("r")
    write(history, "a", b"abab", 2)
    assert sees(history, b"ooaoaboo", begun=begun)
    assert not sees(history, b"ooxoaboo", begun=begun)


def test_a_write_that_has_not_ended_may_be_seen_or_not(history):
    history.begin("a", 0, b"a" * 8)
    assert sees(history, OLD)
    assert sees(history, b"a" * 8)
    assert sees(history, OLD)


def test_of_two_writes_at_once_either_may_be_last(history):
    one = history.begin("a", 0, b"a" * 8)
    write(history, "b", b"b" * 8)
    history.end(one)
    assert sees(history, b"aaaabbbb")
    assert not sees(history, b"aaaabbbo")


def test_what_was_surely_overwritten_does_not_come_back(history):
    write(history, "a", b"a" * 8)
    write(history, "b", b"b" * 4)
    assert sees(history, b"bbbbaaaa")
    assert not sees(history, b"abbbaaaa")


def test_a_request_that_was_cut_off_hides_nothing(history):
    write(history, "a", b"a" * 8)
    history.begin("cut", 0, b"c" * 8)
    write(history, "b", b"b" * 4)
    assert sees(history, b"cbcbaaca")  # the one that was cut off may come at any time
    assert not sees(history, b"abbbaaaa")


def test_the_report_says_whose_bytes_they_are():
    history = History(bytes(32) + bytes(range(1, 33)))
    history.read(history.begin("r"), 0, bytes(range(1, 33)))
    with pytest.raises(AssertionError, match=r"r saw 0x1 at 0x0, .* it is that of before at 0x20"):
        history.check()
