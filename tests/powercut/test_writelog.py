"""The write log: what it replays, and that a file keeps it."""

import os
import struct

import pytest

from nbdserve.powercut.content import Content
from nbdserve.powercut.writelog import Kind, LogFull, WriteLog


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


@pytest.mark.parametrize(("kind", "number", "said"), [
    (Kind.END, 3, "what ended did not begin"),
    (Kind.FLUSHED, 0, "what ended did not begin"),
    (99, 0, "there is no kind 99"),
    (Kind.WRITE_ZEROES, 0, "0 begins twice"),
])
def test_damage_is_refused(kind, number, said, tmp_path):
    log = WriteLog([b"a" * 8])
    log.begin(Kind.WRITE, 0, 2, b"xyz")
    log.save(tmp_path / "log")
    with open(tmp_path / "log", "ab") as out:
        out.write(struct.pack("<BBQQQ", kind, 0, number, 0, 0))
    with pytest.raises(ValueError, match=f"log: damaged write log: {said}"):
        WriteLog.load(tmp_path / "log")


def test_the_file_takes_no_more_than_the_data(tmp_path):
    content = Content(1 << 40)
    content.write(1 << 39, b"x" * 5000)
    log = WriteLog([content])
    log.save(tmp_path / "log")
    assert (tmp_path / "log").stat().st_size < 10_000
    assert WriteLog.load(tmp_path / "log").initial == [content]


# --- streamed -------------------------------------------------------------------------------------


def test_what_is_streamed_is_there_at_once(log, tmp_path):
    path = tmp_path / "log"
    log.stream_to(path)
    third = log.add_file(b"c" * 10, "third")
    number = log.begin(Kind.WRITE, third, 0, b"more")
    assert WriteLog.load(path).records == log.records
    log.end(number)
    log.mark(b"third")
    loaded = WriteLog.load(path)
    assert loaded.records == log.records
    assert loaded.initial == log.initial
    assert loaded.names == ["", "", "third"]
    log.close()
    log.mark(b"no more")
    assert WriteLog.load(path).records == log.records[:-1]


def test_a_log_that_forgets_streams_all(tmp_path):
    path = tmp_path / "log"
    log = WriteLog([b"a" * 8], history=False)
    log.stream_to(path)
    for number in range(10):
        log.end(log.begin(Kind.WRITE, 0, 0, b"%d" % number))
        log.end(log.begin(Kind.FLUSH))
        log.mark(b"%d" % number)
    assert len(log.records) == 1  # the last note
    loaded = WriteLog.load(path)
    assert [bytes(loaded.replay(moment)[0])[:1] for moment in (0, 5, 10)] == [b"a", b"0", b"1"]
    assert loaded.marks(len(loaded)) == log.marks(len(log)) == [b"%d" % n for n in range(10)]
    log.save(tmp_path / "short")
    short = WriteLog.load(tmp_path / "short")
    assert short.replay() == log.replay() == loaded.replay()
    assert short.marks(len(short)) == log.marks(len(log))


def test_only_a_log_is_replaced(log, tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(b"something else")
    with pytest.raises(FileExistsError, match="exists and is no write log"):
        log.stream_to(path)
    assert path.read_bytes() == b"something else"
    log.save(tmp_path / "log")
    log.stream_to(tmp_path / "log")
    with pytest.raises(BlockingIOError, match="another process writes a log there"):
        log.save(tmp_path / "log")


def test_a_record_that_does_not_fit_is_not_made(log, tmp_path, monkeypatch):
    path = tmp_path / "log"
    log.stream_to(path)
    before = len(log)
    writev = os.writev

    def some(fd, buffers):
        return writev(fd, [b"".join(buffers)[:100]])

    def full(fd, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", some)
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            log.begin(Kind.WRITE, 0, 0, b"x" * 100)
    assert len(log) == before
    log.mark(b"short")
    assert WriteLog.load(path).records == log.records


# --- bounds ---------------------------------------------------------------------------------------


def test_there_is_room_for_so_much(log):
    log.max_data = log.size + 3000
    log.end(log.begin(Kind.WRITE, 0, 0, b"x" * 2000))
    before = len(log)
    with pytest.raises(LogFull, match="the write log is full"):
        log.begin(Kind.WRITE, 0, 0, b"x" * 2000)
    assert len(log) == before


def test_what_is_durable_takes_room_once_in_a_log_that_forgets():
    log = WriteLog([bytes(8192)], history=False, max_data=100_000)
    for durable in range(100):
        log.end(log.begin(Kind.WRITE, 0, 0, b"%04d" % durable * 1000))
        log.end(log.begin(Kind.FLUSH))
    for durable in range(100):
        assert log.size < 100_000
        log.end(log.begin(Kind.WRITE, 0, 0, b"%04d" % durable * 1000), durable=True)
    assert bytes(log.replay()[0])[:4] == b"0099"
