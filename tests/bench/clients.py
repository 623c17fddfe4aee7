"""Runs one case's client against a URI, or on a file, and returns what it achieved.

fio's own figures are used (its JSON), so that starting it costs nobody anything; nbdcopy
reports none and is timed from outside, some milliseconds of start for every server alike.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import peers
from bench.cases import MIB, Case, Fio, Nbdcopy, Unit
from bench.images import SIZE_BYTES, Images


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One run: `rate` in the case's unit; `p99_us`, the completion latency, from fio only.

    That of the flushes where each write is followed by one.
    """

    rate: float
    p99_us: float | None = None


def measure(case: Case, where: str | pathlib.Path, images: Images, *, seconds: float) -> Sample:
    """Run the case once; nbdcopy copies in `images.raw`.  Raises `peers.PeerFailed`."""
    if isinstance(case.client, Fio):
        return _fio(case, case.client, where, seconds)
    return _nbdcopy(case.client, str(where), images)


def _fio(case: Case, job: Fio, where: str | pathlib.Path, seconds: float) -> Sample:
    command = [
        "fio", "--name=bench", "--output-format=json", *_engine(job, where),
        f"--rw={job.pattern}", f"--bs={job.block_bytes}", f"--iodepth={job.depth}",
        # Threads, not forks, and one summary line however many connections.
        f"--numjobs={job.connections}", "--thread", "--group_reporting",
        # Of the clocks fio reads for each request only the completion latency's is needed.
        "--disable_lat=1", "--disable_slat=1",
    ]
    if job.total_bytes:
        # Every block once, in the same random order for every server.
        command += [f"--io_size={job.total_bytes}", "--randrepeat=1"]
    else:
        # The start, the first table loads with it, is not timed.
        command += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--ramp_time=500ms",
                    "--norandommap"]
    # The engine tells stdout that it is connected before fio writes its JSON there.
    said = peers.run(*command).stdout
    result = json.loads(said[said.index("{"):])["jobs"][0]
    if job.flush and not isinstance(where, pathlib.Path):
        check_flushes(result, job)
    return sample_of(result, case, job)


def _engine(job: Fio, where: str | pathlib.Path) -> list[str]:
    """The same job on a file is the reference: asynchronous and past the page cache."""
    if isinstance(where, pathlib.Path):
        return ["--ioengine=io_uring", "--direct=1", f"--filename={where}",
                # What the servers call at a flush, not fsync: that writes timestamps, too.  The
                # nbd engine takes but fsync for a flush, and fio counts but fsyncs.
                f"--fdatasync={int(job.flush)}"]
    return ["--ioengine=nbd", f"--uri={where}", f"--fsync={int(job.flush)}"]


def sample_of(result: Mapping[str, Any], case: Case, job: Fio) -> Sample:
    """From a job of fio's JSON."""
    side = result["write" if "write" in job.pattern else "read"]
    rate = side["iops"] if case.unit is Unit.IOPS else side["bw_bytes"] / MIB
    return Sample(rate, _p99_us(result["sync"]["lat_ns"] if job.flush else side["clat_ns"]))


def check_flushes(result: Mapping[str, Any], job: Fio) -> None:
    """Raise `peers.PeerFailed` unless as many flushes as writes were done."""
    flushes, writes = result["sync"]["total_ios"], result["write"]["total_ios"]
    # Each connection may begin or end the timed part between its write and its flush.
    if abs(flushes - writes) > 2 * job.connections:
        raise peers.PeerFailed(f"fio: {flushes} flushes for {writes} writes, not one for each")


def _p99_us(latency_ns: Mapping[str, Mapping[str, float]]) -> float | None:
    percentiles = latency_ns.get("percentile", {})
    return percentiles["99.000000"] / 1000 if "99.000000" in percentiles else None


def _nbdcopy(job: Nbdcopy, uri: str, images: Images) -> Sample:
    pair = [str(images.raw.path), uri] if job.into_server else [uri, "null:"]
    begin = time.perf_counter()
    peers.run("nbdcopy", *pair)
    return Sample(SIZE_BYTES / MIB / (time.perf_counter() - begin))
