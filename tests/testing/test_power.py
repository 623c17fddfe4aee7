"""Power cuts of servers for tests: the world stops, and outcomes say what they were promised."""

import itertools
import threading

import pytest
from ledger import Device

from nbdserve.errors import ConfigError
from nbdserve.faults import Fault
from nbdserve.formats.qcow2.create import create_image
from nbdserve.powercut.content import Content
from nbdserve.powercut.powercut import PowerLost, outcomes_of
from nbdserve.powercut.writelog import Kind, WriteLog
from nbdserve.testing import make_image, serving
from nbdserve.testing.power import StreamedLog

BOTH = pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
ANYWHERE = pytest.mark.parametrize("where", ["disk", "file"])
A, B = b"a" * 4096, b"b" * 4096


def on(outcome, **arguments):
    """The first two blocks of what an outcome holds."""
    with serving(outcome, **arguments) as server, Device(server.socket) as device:
        return device.read(0, 4096), device.read(4096, 4096)


@BOTH
@ANYWHERE
def test_what_was_flushed_is_there_and_the_rest_may_be(process, where):
    with serving(size="1M", power_cut=where, process=process) as server:
        with Device(server.socket) as device:
            device.write(0, A)
            device.flush()
            server.mark("a")
            device.write(4096, B)
            server.mark("b")
            outcome = server.cut()
            with pytest.raises(OSError):  # noqa: PT011 - it depends on who was first
                device.read(0, 512)
        assert not server.socket.exists()
        assert outcome.marks == ("a", "b")
        assert outcome.format == ("raw" if where == "disk" else "qcow2")
        assert on(outcome) == (A, bytes(4096))
        assert server.cut(1).moment == outcome.moment
        outcomes = [server.cut(seed) for seed in range(2, 10)]
        all_kept = server.cut(1)
    assert {on(outcome)[0] for outcome in outcomes} == {A}
    if where == "disk":  # below, what links it was not written yet
        assert on(all_kept)[1] == B


@BOTH
def test_outcomes_of_every_moment_while_the_server_goes_on(process):
    with serving(size="1M", power_cut="disk", process=process) as server:
        with Device(server.socket) as device:
            for number in range(4):
                device.write(4096 * number, A)
                device.flush()
                server.mark(str(number))
            outcomes = list(server.all_cuts(50))
            device.write(0, B)
        for outcome in outcomes:
            for number in range(len(outcome.marks)):
                assert outcome.content.read(4096 * number, 4096) == A
            assert B not in bytes(outcome.content)
        assert {len(outcome.marks) for outcome in outcomes} == set(range(5))
    assert len(list(server.all_cuts(50))) >= len(outcomes)  # after its end, too


def test_an_outcome_is_served_in_either_way_and_stays_as_it_is():
    with serving(content=A + A, power_cut="file") as server:
        outcome = server.cut()
    for process in (False, True):
        with serving(outcome, process=process) as again, Device(again.socket) as device:
            assert device.read(0, 4096) == A
            device.write(0, B)
            device.flush()
    assert on(outcome) == (A, A)


def test_the_power_is_cut_again_on_an_outcome():
    with serving(content=A + A, power_cut="file") as server:
        outcome = server.cut()
    with serving(outcome, power_cut="file") as again:
        again.write(0, B)
        again.flush()
        assert on(again.cut()) == (B, A)


def test_an_overlay_finds_its_backing_file(tmp_path, monkeypatch):
    make_image(tmp_path / "base", content=A + A)
    create_image(str(tmp_path / "top"), 8192, backing_file="base", backing_format="qcow2")
    with serving(tmp_path / "top", power_cut="file") as server:
        server.write(4096, B)
        server.flush()
        outcome = server.cut()
    monkeypatch.chdir("/")
    assert on(outcome) == (A, B)


def test_a_content_needs_a_format():
    with pytest.raises(ConfigError, match="format: is this content a disk"):
        serving(Content.of(A))
    assert on(Content.of(A + B), format="raw") == (A, B)
    with pytest.raises(ConfigError, match="image that is made"):
        serving(Content.of(A), format="raw", size=5)


@BOTH
def test_without_power_cut_there_is_none(process):
    with serving(size="1M", process=process) as server:
        for use in (
            server.cut, lambda: server.mark("x"), lambda: server.write_log,
            lambda: server.all_cuts(1),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match="ask for power_cut="):
                use()
        Device(server.socket).close()  # it goes on


@BOTH
def test_after_the_cut_nothing_is_noted(process):
    with serving(size="1M", power_cut="disk", process=process) as server:
        server.cut()
        with pytest.raises(PowerLost):
            server.mark("too late")


def test_what_is_stuck_had_not_returned():
    stuck = [Fault(ops="write", stuck=True)]
    with serving(size="1M", power_cut="disk", file_faults=stuck) as server:
        device = Device(server.socket)
        failed = []

        def write():
            try:
                device.write(0, A)
            except OSError as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        server.file_faults.wait_stuck()
        outcome = server.cut()
        writer.join()
        device.close()
        [error] = failed
        assert isinstance(error, ConnectionError)  # and no answer
        assert on(outcome)[0] == bytes(4096)
        assert A in {on(server.cut(seed))[0] for seed in range(1, 10)}


@BOTH
def test_the_log_can_be_kept(process, tmp_path):
    with serving(size="1M", power_cut="disk", process=process) as server:
        with Device(server.socket) as device:
            device.write(0, A)
            server.mark("a")
        server.write_log.save(tmp_path / "log")
    log = WriteLog.load(tmp_path / "log")
    assert log.names == [server.image.name]
    kinds = [record.kind for record in log.records]
    assert (kinds[0], kinds.count(Kind.MARK)) == (Kind.WRITE, 1)
    assert {outcome.marks for outcome in outcomes_of(log, 10)} == {(), ("a",)}


@BOTH
def test_the_log_may_be_a_file_from_the_start(process, tmp_path):
    arguments = {"power_cut": "file", "write_log": tmp_path / "log", "process": process}
    make_image(tmp_path / "disk", "1M")
    with serving(tmp_path / "disk", **arguments) as server:
        server.mark("noted here")
        with Device(server.socket) as device:
            device.write(0, A)
        assert len(WriteLog.load(tmp_path / "log")) >= 2
    found = WriteLog.load(tmp_path / "log").replay()[0]
    assert bytes(found).rstrip(b"\0") == server.image.read_bytes().rstrip(b"\0")
    assert server.write_log.marks(len(server.write_log)) == [b"noted here"]


def test_the_log_of_a_server_that_goes_on_is_a_copy():
    with serving(size="1M", power_cut="disk") as server:
        server.write(0, A)
        log = server.write_log
        moment = len(log)
        server.write(0, B)
        assert len(log) == moment
        assert log.replay()[0].read(0, 4096) == A
        assert server.write_log.replay()[0].read(0, 4096) == B


def test_a_log_that_forgets_has_all_marks():
    with serving(size="1M", power_cut="disk", history=False) as server:
        server.write(0, A)
        server.mark("a")
        server.flush()
        assert server.write_log.first_moment > 0
        assert [outcome.marks for outcome in server.all_cuts(5)] == [("a",)]


def test_notes_of_a_streamed_log_are_where_they_were_made(tmp_path):
    log = WriteLog([Content(4096)])
    log.stream_to(tmp_path / "log")
    streamed = StreamedLog(tmp_path / "log")
    whole = itertools.count()
    for number in range(3):
        streamed.mark(f"before {number}")
        log.end(log.begin(Kind.WRITE, 0, 0, b"x" * (number + 1)))
        next(whole)
        streamed.mark(f"after {number}")
    log.close()
    found = [
        record.data.decode() if record.kind is Kind.MARK else record.kind
        for record in streamed.read().records
    ]
    one = [Kind.WRITE, Kind.END]
    assert found == ["before 0", *one, "after 0", "before 1", *one, "after 1", "before 2", *one,
                     "after 2"]  # fmt: skip


def test_a_record_that_is_not_whole_yet_is_of_the_future(tmp_path):
    log = WriteLog([Content(4096)])
    log.stream_to(tmp_path / "log")
    log.begin(Kind.WRITE, 0, 0, b"x" * 100)
    log.close()
    whole = (tmp_path / "log").read_bytes()
    for length in range(len(whole) - 100, len(whole)):
        (tmp_path / "log").write_bytes(whole[:length])
        streamed = StreamedLog(tmp_path / "log")
        streamed.mark("early")
        (tmp_path / "log").write_bytes(whole)
        assert [record.kind for record in streamed.read().records] == [Kind.MARK, Kind.WRITE]
