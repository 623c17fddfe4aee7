"""Runs one case's client against a URI and returns what it achieved.

fio's own figures are used (its JSON), so that starting it costs nobody anything; nbdcopy
reports none and is timed from outside, some milliseconds of start for every server alike.
"""

import dataclasses
import json
import time
from collections.abc import Mapping

import peers
from bench.cases import MIB, Case, Fio, Nbdcopy, Unit
from bench.images import SIZE_BYTES, Image


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One run: `rate` in the case's unit; `p99_us`, the completion latency, from fio only."""

    rate: float
    p99_us: float | None = None


def measure(case: Case, uri: str, source: Image, *, seconds: float) -> Sample:
    """Run the case once; `source` is what nbdcopy copies in.  Raises `peers.PeerFailed`."""
    if isinstance(case.client, Fio):
        return _fio(case, case.client, uri, seconds)
    return _nbdcopy(case.client, uri, source)


def _fio(case: Case, job: Fio, uri: str, seconds: float) -> Sample:
    command = [
        "fio", "--name=bench", "--output-format=json", "--ioengine=nbd", f"--uri={uri}",
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
    side = result["write" if "write" in job.pattern else "read"]
    rate = side["iops"] if case.unit is Unit.IOPS else side["bw_bytes"] / MIB
    return Sample(rate, _p99_us(side))


def _p99_us(side: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float | None:
    percentiles = side["clat_ns"].get("percentile", {})
    return percentiles["99.000000"] / 1000 if "99.000000" in percentiles else None


def _nbdcopy(job: Nbdcopy, uri: str, source: Image) -> Sample:
    pair = [str(source.path), uri] if job.into_server else [uri, "null:"]
    begin = time.perf_counter()
    peers.run("nbdcopy", *pair)
    return Sample(SIZE_BYTES / MIB / (time.perf_counter() - begin))
