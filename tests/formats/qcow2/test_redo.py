"""The server dies at any moment and its redo log is replayed: nothing acknowledged is lost.

Random programs run on a file in memory. At many moments the process "dies": what is left is the
file as it is then, which is what the kernel has, and the log. After the replay

* the image leaks at most;
* every byte is that of the last acknowledged request, or of one that was in flight;
* and if the power goes during the replay, it is as after any other power cut.
"""

import os
import random
import tempfile
from functools import cache

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.block import redo
from nbdserve.block.redo import CLEAR, RedoLog, replay
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2 import ordering
from nbdserve.formats.qcow2.node import CacheSizes
from nbdserve.formats.qcow2.redo import Watcher
from nbdserve.formats.raw import RawNode
from nbdserve.powercut.outcomes import state_at
from nbdserve.powercut.writelog import Kind, WriteLog
from qcow2_model import (
    OFFSET,
    Disk,
    Layout,
    MemoryFile,
    Request,
    assert_sound,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
    run_batch,
)

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
CLUSTER = 512
SIZE = 96 * 1024
DEATHS = 12  # of each program
HEADER_TABLE_OFFSET = 48  # where the header says where the refcount table is


@cache
def empty(refcount_bits):
    with tempfile.TemporaryDirectory() as folder:
        return new_image(folder, SIZE, cluster_size=CLUSTER, refcount_bits=refcount_bits)


class Replayed:
    """The file in the hands of the guardian; writes are logged, and flushes as None."""

    def __init__(self, content):
        self.content = bytearray(content)
        self.log = []

    def read(self, offset, length):
        return bytes(self.content[offset : offset + length])

    def write(self, offset, data):
        self.log.append((offset, data))
        put(self.content, offset, data)

    def flush(self):
        self.log.append(None)


def put(content, offset, data):
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


class Death:
    """What is left of the process at one moment. written: how much of the file's log was."""

    def __init__(self, file, log, before, effects):
        self.content = bytes(file.content)
        self.records = list(log.records())
        self.written = len(file.writes)
        self.before = before
        self.effects = effects


async def record(program, content, backing, sizes, patience, seed, deaths=DEATHS):
    """Run a program, dying now and then."""
    file = MemoryFile(content, patience=patience, seed=seed)
    below = RawNode(MemoryFile(backing)) if backing else None
    disk = Disk(backing[:SIZE].ljust(SIZE, b"\0"), CLUSTER, discards=True)
    chooser = random.Random(seed)
    log = RedoLog()
    found = []
    effects = []

    def die_perhaps(kind, offset):
        if chooser.random() < 0.15:
            found.append(Death(file, log, bytes(disk.content), effects))

    file.fail = die_perhaps
    try:
        async with open_memory(
            file, backing=below, cache_sizes=sizes, log=log, settle=True
        ) as (backend, _):
            for batch in program:
                effects = [
                    effect for request in batch if (effect := disk.effect(request)) is not None
                ]
                await run_batch(backend, disk, batch)
                effects = []
                found.append(Death(file, log, bytes(disk.content), []))
        assert not replay(log.records(), Replayed(b""))  # a clean close leaves nothing to do
    finally:
        log.close()
    assert_sound(file.content)
    return file, chooser.sample(found, min(deaths, len(found)))


def rescued(death):
    after = Replayed(death.content)
    replay(death.records, after)
    return after


def assert_nothing_is_lost(death, image, backing):
    assert_sound(image, leaks_allowed=True)
    actual = guest_bytes(image, backing)
    for at, (is_now, was) in enumerate(zip(actual, death.before, strict=True)):
        if is_now != was:
            assert is_now in {
                effect.data[at - effect.offset]
                for effect in death.effects
                if effect.offset <= at < effect.offset + len(effect.data)
            }, f"byte {at:#x} is {is_now:#x}"


def power_cut(initial, file, death, after, chooser):
    """The power goes during the replay, so that of everything since the last flush any sector may
    be missing: of what the server wrote and of what the guardian did."""
    log = WriteLog.of([initial], file.writes.records[: death.written])
    for entry in after.log[: chooser.randint(0, len(after.log))]:
        log.end(log.begin(Kind.FLUSH) if entry is None else log.begin(Kind.WRITE, 0, *entry))
    return bytearray(bytes(state_at(log, len(log)).sample(chooser)[0]))


@st.composite
def requests(draw):
    kind = draw(st.sampled_from(("write", "write", "write", "discard", "zero", "flush")))
    if kind == "flush":
        return Request("flush")
    offset = draw(st.integers(0, 15)) * CLUSTER * draw(st.sampled_from((1, 1, 11)))
    offset += draw(st.sampled_from((0, 0, 100)))
    length = draw(st.sampled_from((60, CLUSTER, 3 * CLUSTER, 40 * CLUSTER)))
    flags = draw(st.booleans()), draw(st.booleans())
    return Request(kind, offset, min(length, SIZE - offset), draw(st.integers(0, 99)), *flags)


programs = st.lists(
    st.sampled_from((1, 1, 2, 3)).flatmap(lambda n: st.lists(requests(), min_size=n, max_size=n)),
    min_size=3,
    max_size=14,
)


@settings(
    max_examples=3000 if SOAK else 120,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(
    programs,
    st.sampled_from((0, 20 * 1024)),
    st.sampled_from((16, 64, 1)),
    st.sampled_from((1, 3, None)),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_nothing_is_lost_by_a_death(
    program, backing_size, refcount_bits, tables, patience, seed
):
    backing = pattern(7, backing_size)
    sizes = CacheSizes(tables * 1024, tables * 1024) if tables else None
    initial = empty(refcount_bits)
    file, deaths = trio.run(record, program, initial, backing, sizes, patience, seed)
    chooser = random.Random(seed)
    for death in deaths:
        after = rescued(death)
        assert_nothing_is_lost(death, after.content, backing)
        for _ in range(3):
            image = power_cut(initial, file, death, after, chooser)
            assert_sound(image, leaks_allowed=True)


def growth(patience):
    """With 64-bit refcounts and clusters of 512 bytes the first table reaches to 2 MiB."""
    size = 2100 * 1024
    program = [[Request("write", at, 150 * 1024, at)] for at in range(0, size, 150 * 1024)]
    return size, program, patience


async def grow(folder, patience):
    size, program, patience = growth(patience)
    initial = new_image(folder, size, cluster_size=CLUSTER, refcount_bits=64)
    file = MemoryFile(initial, patience=patience, seed=3)
    disk = Disk(bytes(size), CLUSTER, discards=True)
    log = RedoLog()
    deaths = []
    async with open_memory(file, log=log) as (backend, _):
        for batch in program:
            await run_batch(backend, disk, batch)
            deaths.append(Death(file, log, bytes(disk.content), []))
    log.close()
    return initial, file, deaths


@pytest.mark.parametrize("patience", [0, 2])
def test_the_refcount_table_has_moved(tmp_path, patience):
    initial, file, deaths = trio.run(grow, tmp_path, patience)
    last = rescued(deaths[-1])
    assert Layout(last.content).table_offset != Layout(initial).table_offset
    assert any(record.action == CLEAR for record in deaths[-1].records)
    chooser = random.Random(patience)
    for death in deaths[-3:]:
        after = rescued(death)
        assert_nothing_is_lost(death, after.content, b"")
        for _ in range(10):
            image = power_cut(initial, file, death, after, chooser)
            assert_sound(image, leaks_allowed=True)


def test_a_death_between_two_records(tmp_path):
    """Nothing was written back in this program, so all that was entered up to some record is what a
    death right after it leaves."""
    _, _, deaths = trio.run(grow, tmp_path, 0)
    death = deaths[-1]
    made = [
        number
        for number, record in enumerate(death.records)
        if record.action == CLEAR or record.offset == HEADER_TABLE_OFFSET
    ]
    assert len(made) > 10
    for number in made[-30:]:
        for length in range(number, min(number + 14, len(death.records))):
            if death.records[length].offset in range(HEADER_TABLE_OFFSET + 1, 60):
                continue  # the header's fields were entered together
            after = Replayed(death.content)
            replay(death.records[:length], after)
            assert_sound(after.content, leaks_allowed=True)


async def test_a_copied_table_is_in_the_log(tmp_path):
    """An L2 table without COPIED belongs to a snapshot too, and is copied before it is changed."""
    content = bytearray(new_image(tmp_path, 64 * 1024, cluster_size=CLUSTER))
    file = MemoryFile(content)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 4096))
    layout = Layout(file.content)
    image = bytearray(file.content)
    image[layout.l1_offset] &= 0x7F
    disk = Disk(guest_bytes(image), CLUSTER, discards=True)
    file = MemoryFile(image)
    log = RedoLog()
    async with open_memory(file, log=log) as (backend, _):
        await run_batch(backend, disk, [Request("write", 8192, 512, 3)])
        death = Death(file, log, bytes(disk.content), [])
    log.close()
    after = rescued(death)
    assert guest_bytes(after.content) == disk.content
    assert Layout(after.content).l1[0] & OFFSET != layout.l1[0] & OFFSET


async def test_a_log_that_gets_low_is_made_room_in(tmp_path, monkeypatch):
    monkeypatch.setattr(redo, "LOW", redo.CAPACITY - 200)
    size = 512 * 1024
    file = MemoryFile(new_image(tmp_path, size, cluster_size=CLUSTER))
    log = RedoLog()
    most = 0
    async with open_memory(file, log=log) as (backend, _):
        for at in range(0, size, 4096):
            await backend.write(at, pattern(1, 4096))
            most = max(most, len(log))
        await backend.discard(0, size)
        most = max(most, len(log))
        await backend.flush()
    log.close()
    assert 200 <= most < 1500  # a few hundred at a time, of some thousand changes
    assert_sound(file.content)


@pytest.mark.parametrize("planted", [False, True])
async def test_a_new_table_may_be_linked_though_the_write_back_failed(planted, monkeypatch):
    """L1 was to be written last and could not be; perhaps it was. From then on the entries of the
    L2 table wait for refcounts as those of any other do."""
    if planted:
        monkeypatch.setattr(Watcher, "written", lambda self, table: None)
    image = empty(16)
    l1_offset = Layout(image).l1_offset
    file = MemoryFile(image)
    log = RedoLog()

    def fail_at_l1(kind, offset):
        if (kind, offset) == ("write", l1_offset):
            raise OSError(5, "no")

    async with open_memory(file, log=log) as (backend, node):
        await backend.write(0, pattern(1, 512))
        file.fail = fail_at_l1
        with pytest.raises(OSError, match="no"):
            await backend.flush()
        await backend.write(512, pattern(2, 512))
        death = Death(file, log, b"", [])
        table = node.image.mapping.l1.entries[0] & OFFSET
        file.fail = None
    log.close()
    after = rescued(death)
    written = [None if entry is None else entry[0] for entry in after.log]
    refcounts = Layout(image).words(Layout(image).table_offset, 1)[0]
    flush = written.index(None, written.index(refcounts))
    assert (written.index(table) > flush) is not planted


async def test_of_a_damaged_image_nothing_is_replayed(tmp_path):
    file = MemoryFile(new_image(tmp_path, 64 * 1024, cluster_size=CLUSTER))
    log = RedoLog()
    async with open_memory(file, log=log) as (backend, node):
        await backend.write(0, pattern(1, 4096))
        assert list(log.records())
        node.image.stop(CorruptImage("damaged"))
        assert not list(log.records())
    log.close()


# --- the tests see what they are there to see -----------------------------------------------------


def forget_l2(monkeypatch):
    """L2 entries are not in the log."""
    changed = Watcher.changed
    kind = ordering.STAGE[ordering.What.L2_ENTRY]

    def forgetful(self, table, index, value):
        if (self._put >> 2) & 3 != kind:
            changed(self, table, index, value)

    monkeypatch.setattr(Watcher, "changed", forgetful)


def dropped_too_early(monkeypatch):
    """The log is emptied when a write-back begins."""
    mark = RedoLog.mark

    def eager(self):
        self.drop(mark(self))
        return mark(self)

    monkeypatch.setattr(RedoLog, "mark", eager)


def in_one_stage(monkeypatch):
    """The replay does not flush."""
    monkeypatch.setattr(Replayed, "flush", lambda self: None)


def unchecked_drop(monkeypatch):
    """What came after the mark is dropped too."""
    monkeypatch.setattr(RedoLog, "drop", lambda self, mark: self._drop(self._head))


@pytest.mark.parametrize("bug", [forget_l2, dropped_too_early, in_one_stage, unchecked_drop])
def test_a_planted_bug_is_found(bug, monkeypatch):
    """Within 60 programs."""
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        many_programs(60)


def many_programs(nb_programs):
    chooser = random.Random(11)
    for seed in range(nb_programs):
        program = [
            [
                Request(
                    chooser.choice(("write", "write", "write", "discard", "flush")),
                    chooser.randrange(150) * CLUSTER,
                    chooser.choice((60, CLUSTER, 3 * CLUSTER)),
                    number,
                    quick=chooser.random() < 0.5,
                )
                for _ in range(chooser.randint(1, 3))
            ]
            for number in range(12)
        ]
        file, deaths = trio.run(record, program, empty(16), b"", None, 2, seed, 40)
        for death in deaths:
            after = rescued(death)
            assert_nothing_is_lost(death, after.content, b"")
            for _ in range(4):
                image = power_cut(empty(16), file, death, after, chooser)
                assert_sound(image, leaks_allowed=True)
