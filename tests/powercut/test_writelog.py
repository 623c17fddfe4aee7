"""The write log: what it replays, and that a file keeps it."""

import pytest

from nbdserve.powercut.writelog import Kind, WriteLog


@pytest.fixture
def log():
    """All kinds of records on two files."""
    log = WriteLog([b"a" * 8])
    second = log.add_file(b"b" * 8)
    log.end(log.begin(Kind.WRITE, 0, 2, b"xyz"))
    log.end(log.begin(Kind.WRITE, second, 6, b"long"), durable=True)
    log.mark(b"first")
    log.begin(Kind.WRITE_ZEROES, 0, 4, 6)  # never returned
    log.end(log.begin(Kind.DISCARD, second, 8, 100))
    log.end(log.begin(Kind.FLUSH, second))
    log.mark(b"second")
    return log


def contents(log, moment=None):
    return [bytes(content) for content in log.replay(moment)]


def test_replay_to_any_point(log):
    assert contents(log, 0) == [b"a" * 8, b"b" * 8]
    assert contents(log, 1) == contents(log, 2) == [b"aaxyzaaa", b"b" * 8]
    assert contents(log, 3) == [b"aaxyzaaa", b"bbbbbblong"]
    assert contents(log, 6) == [b"aaxy" + bytes(6), b"bbbbbblong"]
    assert contents(log) == [b"aaxy" + bytes(6), b"bbbbbblo" + bytes(2)]  # a discard makes no room


def test_marks(log):
    assert log.marks(4) == []
    assert log.marks(5) == [b"first"]
    assert log.marks(len(log)) == [b"first", b"second"]


def test_what_was_saved_is_loaded(log, tmp_path):
    log.save(tmp_path / "log")
    loaded = WriteLog.load(tmp_path / "log")
    assert loaded.initial == log.initial
    assert loaded.records == log.records


def test_a_log_that_was_cut_off_has_the_records_that_are_whole(log, tmp_path):
    path = tmp_path / "log"
    log.save(path)
    whole = path.read_bytes()
    log.records.pop()
    log.save(path)
    for length in range(path.stat().st_size, len(whole)):
        path.write_bytes(whole[:length])
        assert WriteLog.load(path).records == log.records


@pytest.mark.parametrize("content", [b"", b"something else", b"nbdserve write log 1\n",
                                     b"nbdserve write log 2\n",
                                     b"nbdserve write log 2\n\x10four"])
def test_what_is_no_log_is_refused(content, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="write log"):
        WriteLog.load(path)
