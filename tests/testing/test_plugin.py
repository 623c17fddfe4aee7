"""The fixtures, in runs of pytest of their own."""

import subprocess
import sys

import pytest

OURS = ("-p", "no:nbdserve", "-p", "nbdserve.testing.plugin")  # whatever is installed here


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))

    def pytest_on(source, *options):
        (tmp_path / "test_it.py").write_text(source)
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        return subprocess.run(
            [sys.executable, "-m", "pytest", *OURS, "-p", "no:cacheprovider",
             f"--basetemp={tmp_path / 'base'}", *options],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip

    return pytest_on


REPORTS = """
import pytest
from ledger import Device
from nbdserve.testing import serving

@pytest.fixture(scope="module")
def shared():
    with serving(size="1M", export="shared") as server:
        yield server

@pytest.fixture
def broken():
    yield
    raise OSError("a teardown that fails")

def test_passes(nbd_server):
    nbd_server(size="1M")

def test_fails(nbd_server, shared):
    nbd_server(size="1M", export="one")
    nbd_server(size="1M", export="two", process=True)
    assert 0

def test_does_not_start(nbd_server, tmp_path):
    (tmp_path / "bad").write_bytes(b"no image")
    nbd_server(tmp_path / "bad", file_room="1M")

def test_teardown(nbd_server, broken):
    nbd_server(size="1M", export="three")

def test_without():
    assert 0
"""


def test_a_failure_is_reported_with_the_logs_of_the_servers(run):
    said = run(REPORTS)
    assert "3 failed, 2 passed, 1 error" in said
    fails, starts, without, teardown = (
        next(part for part in said.split("\n_____") if f" {name} ____" in part)
        for name in ("test_fails", "test_does_not_start", "test_without",
                     "ERROR at teardown of test_teardown")
    )  # fmt: skip
    for name in ("one", "two", "shared"):
        assert f"at nbd+unix:///{name}?socket=" in fails
    assert fails.count("log of the nbdserve at ") == 3
    assert "faults by seed" in starts
    assert "log of the nbdserve at" in starts
    assert "/shared?socket" in without  # it is still there, and may have its part in it
    assert "at nbd+unix:///three?socket=" in teardown


ENDS = """
import os, signal, pytest
from ledger import Device
from nbdserve.testing import Fault

def test_one(nbd_server):
    server = nbd_server(size="1M")
    server.write(0, b"x")
    server.file_faults.add(Fault(ops="write+flush", error="EIO"))
    nbd_server(size="1M")

def test_two(nbd_server):
    for _ in range(2):
        server = nbd_server(size="1M", process=True)
        server.process.kill()

def test_three():
    from nbdserve.testing.served import running
    assert running == []
"""


def test_errors_at_the_end_are_told_and_all_servers_stop(run):
    said = run(ENDS)
    assert "3 passed, 2 errors" in said
    assert "Input/output error" in said
    assert said.count("the server ended with status -9") >= 2
    assert "servers that did not stop as they should" in said


ALONE = """
import sys

def test_nothing_is_imported_that_nobody_needs():
    assert "nbdserve.testing.plugin" in sys.modules
    loaded = {name for name in sys.modules if name.startswith("nbdserve")}
    assert loaded == {"nbdserve", "nbdserve.testing", "nbdserve.testing.plugin"}
    assert "construct" not in sys.modules
"""


def test_who_does_not_use_it_does_not_pay_for_it(run):
    assert "1 passed" in run(ALONE, "-p", "no:trio", "-p", "no:xdist", "-p", "no:hypothesispytest")


def test_the_fixtures_say_what_they_are(run):
    said = run("", "--fixtures")
    assert 'Makes servers: ``nbd_server(size="1G")``' in said
    assert "Makes qcow2 images in tmp_path" in said


MANY = """
import gc, weakref, pytest

seen = weakref.WeakSet()

@pytest.mark.parametrize("process", [False, False, True])
def test_one(nbd_server, process):
    seen.add(nbd_server(size="1M", power_cut="disk", process=process))

def test_last():
    gc.collect()
    assert len(seen) == 0
"""


def test_servers_of_earlier_tests_are_not_kept(run):
    assert "4 passed" in run(MANY)
