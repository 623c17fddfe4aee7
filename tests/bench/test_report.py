"""The arithmetic of the benchmark: ratios within a round, medians over rounds, verdicts."""

import json

import pytest

from bench import report
from bench.cases import CASES, Case, Disk, Fio, Unit
from bench.clients import Sample
from bench.servers import OURS, SERVERS

CASE = Case("case", Fio("randread", 4096, 1), Disk.FULL, Unit.IOPS, {"qemu": 2.0})
FAMILIES = {"ours": "ours", "threads": "qemu", "uring": "qemu", "kit": "nbdkit"}


def samples(*rates: float) -> list[Sample]:
    return [Sample(rate, p99_us=1000 / rate) for rate in rates]


def test_the_better_engine_of_each_round_is_the_opponent() -> None:
    rounds = {
        "ours": samples(300, 100, 200),
        "threads": samples(100, 10, 40),  # the better one in the first round only
        "uring": samples(50, 40, 80),
    }
    (ratio,) = report.ratios(CASE, rounds, FAMILIES, "ours")
    assert (ratio.family, ratio.median, ratio.lowest, ratio.highest) == ("qemu", 2.5, 2.5, 3.0)


def test_a_slow_minute_changes_no_ratio() -> None:
    rounds = {"ours": samples(200, 20, 200), "uring": samples(100, 10, 100)}
    (ratio,) = report.ratios(CASE, rounds, FAMILIES, "ours")
    assert (ratio.lowest, ratio.highest) == (2.0, 2.0)


@pytest.mark.parametrize(("ours", "verdict"), [(200, "ok"), (199, "MISS")])
def test_the_verdict_is_the_median_beside_the_target(ours: float, verdict: str) -> None:
    rounds = {"ours": samples(ours), "uring": samples(100)}
    assert [r.verdict for r in report.ratios(CASE, rounds, FAMILIES, "ours")] == [verdict]


def test_each_family_has_its_ratio_and_no_target_means_no_verdict() -> None:
    rounds = {"ours": samples(30), "uring": samples(10), "kit": samples(20)}
    qemu, kit = report.ratios(CASE, rounds, FAMILIES, "ours")
    assert (qemu.median, kit.median, kit.verdict) == (3.0, 1.5, "")


def test_the_device_is_a_family_of_its_own_and_never_the_opponent() -> None:
    families = {**FAMILIES, "disk": "device"}
    rounds = {"ours": samples(30), "uring": samples(10), "disk": samples(60)}
    qemu, device = report.ratios(CASE, rounds, families, "ours")
    assert (qemu.median, qemu.verdict) == (3.0, "ok")
    assert (device.family, device.median, device.verdict) == ("device", 0.5, "")


def test_without_us_there_is_a_table_and_no_ratio() -> None:
    results = {"case": {"uring": samples(10, 30, 20)}}
    assert report.ratios(CASE, results["case"], FAMILIES, "ours") == []
    last = report.table(results, {"case": CASE}, FAMILIES, "ours").splitlines()[-1]
    assert last.split() == ["case", "IOPS", "20"]


def test_the_document_keeps_every_sample() -> None:
    results = {"case": {"ours": samples(10, 20), "uring": samples(5, 5)}}
    made = report.document(results, {"case": CASE}, FAMILIES, "ours", {"cpus": 2})
    assert json.loads(json.dumps(made)) == made
    assert [r["rate"] for r in made["cases"]["case"]["servers"]["ours"]["rounds"]] == [10, 20]
    assert made["cases"]["case"]["servers"]["ours"]["p99_us"] == 75
    assert made["cases"]["case"]["ratios"][0]["verdict"] == "ok"


def test_every_target_is_against_a_server_of_its_case() -> None:
    for case in CASES.values():
        families = {s.family for s in SERVERS.values() if case.name in s.cases}
        assert case.targets.keys() <= families - {OURS}, case.name
