"""The redo log and its replay: what is recorded, what a mark drops, and in which order it is
written."""

import os
import random

import pytest

from nbdserve.block import redo
from nbdserve.block.redo import CLEAR, PUT, REACHED, Record, RedoLog, encode, replay


@pytest.fixture
def log():
    log = RedoLog()
    yield log
    log.close()


def put(log, offset, value, *, stage=2, width=8):
    log.append(encode(PUT, stage, width, offset), value)


class File:
    """Bytes, and what was done to them in order."""

    def __init__(self, content=b""):
        self.content = bytearray(content)
        self.calls = []

    def read(self, offset, length):
        return bytes(self.content[offset : offset + length])

    def write(self, offset, data):
        self.content.extend(bytes(max(0, offset + len(data) - len(self.content))))
        self.content[offset : offset + len(data)] = data
        self.calls.append((offset, len(data)))

    def flush(self):
        self.calls.append("flush")


def values(log):
    return [record.value for record in log.records()]


def test_records_come_back_as_they_were(log):
    wanted = [
        Record(PUT, 2, 8, (1 << 56) - 8, (1 << 64) - 1),
        Record(CLEAR, 0, 0, 512, 1 << 20),
        Record(PUT, 1, 1, 0, 255),
        Record(REACHED, 0, 0, 65536, 0),
    ]
    for record in wanted:
        log.append(encode(*record[:4]), record.value)
    assert list(log.records()) == wanted
    assert len(log) == 4


def test_another_process_sees_what_is_in_it(log):
    put(log, 8, 1)
    other = RedoLog(os.dup(log.fd))
    put(log, 16, 2)
    assert values(other) == [1, 2]
    other.close()


def test_what_was_before_the_mark_is_dropped(log):
    put(log, 8, 1)
    mark = log.mark()
    put(log, 8, 2)
    assert values(log) == [1, 2]
    log.drop(mark)
    assert values(log) == [2]


def test_it_goes_round(log):
    for number in range(redo.CAPACITY * 5 // 2):
        put(log, 8, number)
        if number % 1000 == 0:
            log.drop(log.mark())
    assert values(log) == list(range(redo.CAPACITY * 5 // 2))[-len(log) :]
    assert 0 < len(log) <= 1000
    assert not log.low


def fill(log):
    for number in range(redo.CAPACITY):
        put(log, 8, number)


def test_it_is_low_long_before_it_is_full(log):
    for _ in range(redo.CAPACITY - redo.LOW):
        assert not log.low
        put(log, 8, 0)
    put(log, 8, 0)
    assert log.low


def test_with_a_gap_nothing_is_replayed_until_that_is_written(log):
    fill(log)
    assert len(values(log)) == redo.CAPACITY
    put(log, 8, 1)  # one too many
    assert values(log) == []
    failed = log.mark()
    put(log, 8, 2)
    mark = log.mark()
    put(log, 8, 3)
    assert values(log) == []  # the snapshot is not written yet
    log.drop(mark)
    assert values(log) == [3]
    assert failed < mark


def test_full_again_before_that_is_written(log):
    fill(log)
    put(log, 8, 1)
    mark = log.mark()
    fill(log)
    put(log, 8, 2)
    log.drop(mark)
    assert values(log) == []
    log.drop(log.mark())
    put(log, 8, 3)
    assert values(log) == [3]


def test_once_stopped_it_is_never_replayed(log):
    put(log, 8, 1)
    log.stop()
    put(log, 8, 2)
    assert values(log) == []
    assert log.low
    log.drop(log.mark())  # a write-back that was waiting meanwhile
    put(log, 8, 3)
    assert values(log) == []


def test_several_records_count_together_or_not_at_all(log):
    log.append_all([(encode(PUT, 1, 1, 48), 7), (encode(PUT, 1, 1, 49), 8)])
    assert values(log) == [7, 8]
    for number in range(redo.CAPACITY - 3):
        put(log, 8, number)
    log.append_all([(encode(PUT, 1, 1, 48), 7), (encode(PUT, 1, 1, 49), 8)])
    assert len(log) == redo.CAPACITY - 1
    assert values(log) == []  # a gap


def test_stages_are_written_in_order_each_after_a_flush():
    file = File(bytes(4096))
    nb_writes = replay(
        [
            Record(PUT, 2, 8, 1024, 1),
            Record(PUT, 1, 2, 2048, 2),
            Record(PUT, 0, 1, 3072, 3),
            Record(PUT, 2, 8, 512, 4),
        ],
        file,
    )
    assert nb_writes == 4
    assert file.calls == [(3072, 512), "flush", (2048, 512), "flush", (512, 512), (1024, 512)]
    assert file.content[1024:1032] == bytes(7) + b"\1"
    assert file.content[2048:2050] == b"\0\2"
    assert file.content[3072:3073] == b"\3"


def test_the_last_value_counts_and_neighbours_stay():
    file = File(b"\xee" * 512)
    replay([Record(PUT, 1, 2, 6, 1), Record(PUT, 1, 2, 6, 0x1234)], file)
    assert file.content == b"\xee" * 6 + b"\x12\x34" + b"\xee" * 504


def test_a_new_table_is_written_whole_in_its_own_stage():
    file = File(b"\xee" * 4096)
    replay(
        [
            Record(PUT, 2, 8, 1024, 7),  # of whoever had the place before
            Record(CLEAR, 0, 0, 1024, 1024),
            Record(PUT, 2, 8, 2040, 5),
            Record(PUT, 1, 8, 0, 1024),
        ],
        file,
    )
    assert file.calls == [(1024, 1024), "flush", (0, 512)]
    assert file.content[1024:2048] == bytes(1023) + b"\5"
    assert file.content[2048:] == b"\xee" * 2048


def test_one_that_was_reached_is_as_any_other():
    file = File(b"\xee" * 2048)
    replay(
        [
            Record(CLEAR, 0, 0, 1024, 512),
            Record(PUT, 2, 8, 1024, 5),
            Record(REACHED, 0, 0, 1024, 0),
            Record(PUT, 2, 8, 1032, 6),
        ],
        file,
    )
    assert file.calls == ["flush", (1024, 512)]
    assert file.content[1024:1048] == bytes(7) + b"\5" + bytes(7) + b"\6" + b"\xee" * 8


def test_behind_the_end_there_are_zeroes():
    file = File(b"\xee" * 100)
    replay([Record(PUT, 1, 1, 1000, 9)], file)
    assert file.content == b"\xee" * 100 + bytes(900) + b"\x09" + bytes(23)


def test_replaying_twice_changes_nothing():
    chooser = random.Random(1)
    records = [Record(CLEAR, 1, 0, 2048, 1024)]
    records += [
        Record(PUT, 2, 8, 8 * chooser.randrange(1024), chooser.getrandbits(64)) for _ in range(500)
    ]
    file = File(chooser.randbytes(4096))
    replay(records, file)
    once = bytes(file.content)
    replay(records, file)
    assert file.content == once
