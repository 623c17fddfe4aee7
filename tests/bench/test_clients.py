"""What is taken from fio's JSON, and what it is not allowed to hide."""

import pathlib
from typing import Any

import pytest

import peers
from bench.cases import Case, Disk, Fio, Unit
from bench.clients import check_flushes, measure, sample_of
from bench.images import Images

FLUSHING = Fio("randwrite", 4096, 1, connections=2, flush=True)


def result(*, writes: int, flushes: int) -> dict[str, Any]:
    """A job of fio's JSON: writes take 10 us, flushes 200 us, 99 of 100."""
    return {
        "write": {"iops": 5000.0, "bw_bytes": 5 << 20, "total_ios": writes,
                  "clat_ns": {"percentile": {"99.000000": 10_000}}},
        "read": {"iops": 0.0, "bw_bytes": 0, "total_ios": 0, "clat_ns": {}},
        "sync": {"total_ios": flushes, "lat_ns": {"percentile": {"99.000000": 200_000}}},
    }


def case(job: Fio, unit: Unit = Unit.IOPS) -> Case:
    return Case("case", job, Disk.FULL, unit)


@pytest.mark.parametrize(
    ("job", "unit", "rate", "p99_us"),
    [
        (FLUSHING, Unit.IOPS, 5000, 200),
        (Fio("randwrite", 4096, 32), Unit.IOPS, 5000, 10),
        (Fio("write", 4096, 32), Unit.MIB, 5, 10),
        (Fio("randread", 4096, 32), Unit.IOPS, 0, None),
    ],
)
def test_the_rate_is_the_writes_and_the_latency_that_of_the_flushes(
    job: Fio, unit: Unit, rate: float, p99_us: float | None
) -> None:
    sample = sample_of(result(writes=100, flushes=100), case(job, unit), job)
    assert (sample.rate, sample.p99_us) == (rate, p99_us)


@pytest.mark.parametrize("flushes", [96, 100, 104])
def test_a_connection_may_be_between_write_and_flush_at_start_and_end(flushes: int) -> None:
    check_flushes(result(writes=100, flushes=flushes), FLUSHING)


@pytest.mark.parametrize("flushes", [0, 95, 105])
def test_writes_without_their_flush_are_no_measurement(flushes: int) -> None:
    with pytest.raises(peers.PeerFailed, match=f"{flushes} flushes for 100 writes"):
        check_flushes(result(writes=100, flushes=flushes), FLUSHING)


def test_deeper_than_one_fio_does_not_flush_after_each_write() -> None:
    with pytest.raises(ValueError, match="1 deep"):
        Fio("randwrite", 4096, 16, flush=True)


@pytest.mark.peer("fio", "nbdkit")
def test_each_of_several_writers_flushes_after_each_write(tmp_path: pathlib.Path) -> None:
    """By a server's log: on each connection a flush comes when the write before it is answered."""
    job = Fio("randwrite", 4096, 1, connections=3, total_bytes=20 * 4096, flush=True)
    log = tmp_path / "log"
    with peers.nbdkit("--filter=log", "memory", "1M", f"logfile={log}") as server:
        measure(case(job), server.uri, Images(tmp_path), seconds=0)
    connections: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        _day, _time, name, *said = line.split()
        if {"Write", "Flush", "...Write", "...Flush"} & set(said):
            connections.setdefault(name, []).append(said[0])
    turn = ["Write", "...Write", "Flush", "...Flush"]
    assert len(connections) == 3
    for name, events in connections.items():
        # The last write of a job is not flushed.
        assert events == (turn * 20)[:len(events)], name
        assert len(events) in (4 * 20, 4 * 20 - 2)
