"""A user's test as a type checker sees it: mypy --strict reads this file too (setup.cfg).

`assert_type` is mypy's to hold; what runs here says that the types are true.
"""

from pathlib import Path
from typing import Any, assert_type

from nbdserve.testing import (
    Fault,
    ImageFactory,
    InProcess,
    Outcome,
    Process,
    Served,
    ServerFactory,
    WriteLog,
    make_image,
    random,
    read_image,
    serving,
)
from nbdserve.testing.power import ServedOutcome


def test_what_serving_gives(tmp_path: Path) -> None:
    here = serving(size="1M", folder=tmp_path, faults=[Fault(ops="write", error="EIO")])
    there = serving(size=1 << 20, process=True, cache="none", discard="unmap")
    either: bool = bool(tmp_path.name)
    unknown = serving(content={0: random("4k"), "1M": b"x"}, process=either)
    assert_type(here, InProcess)
    assert_type(there, Process)
    assert_type(unknown, Served)
    assert (type(here), type(there), type(unknown)) == (InProcess, Process, Process)
    with here as server:
        assert_type(server, InProcess)
        assert_type(server.read(0, 4), bytes)
        assert_type(server.statistics(), dict[str, Any])
        assert_type(server.faults.stuck, int)
        assert_type(server.call(len, "four"), int)
        assert server.call(len, "four") == 4


def test_what_the_fixtures_give(tmp_path: Path) -> None:
    nbd_server, qcow2_image = ServerFactory(tmp_path), ImageFactory(tmp_path)
    server = nbd_server(qcow2_image("1M", cluster_size=4096), power_cut="disk")
    assert_type(server, InProcess)
    server.mark("noted")
    outcome = server.cut(seed=1)
    assert_type(outcome, ServedOutcome)
    promise: Outcome = outcome
    log: WriteLog = server.write_log
    assert list(promise.marks) == ["noted"]
    assert len(log) == 1
    assert_type(nbd_server(outcome), InProcess)
    nbd_server.stop()


def test_images(tmp_path: Path) -> None:
    make_image(tmp_path / "disk", content=b"content")
    assert_type(read_image(tmp_path / "disk"), bytes)
    assert read_image(tmp_path / "disk").startswith(b"content")
