"""docs/testing.md: all that stands there as code does what it says there."""

import pathlib
import re
import subprocess
import sys

import pytest

from nbdserve.testing import start

MANUAL = pathlib.Path(__file__).parents[2] / "docs" / "testing.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OURS = ("-p", "no:nbdserve", "-p", "nbdserve.testing.plugin")  # whatever is installed here


@pytest.mark.peer("nbdcopy")
def test_every_block_runs(tmp_path, monkeypatch):
    blocks = BLOCK.findall(MANUAL.read_text())
    module = "\n".join(["from ledger import Device", *blocks])
    (tmp_path / "test_manual.py").write_text(module)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OURS, "-p", "no:cacheprovider", "-W", "error", "-q"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    tests = len(re.findall(r"^def test_", module, re.MULTILINE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"\b{tests} passed in", done.stdout), done.stdout
    assert len(blocks) > 10


def test_every_argument_is_in_the_table():
    table = MANUAL.read_text().partition("## All that a server can be")[2].partition("\n##")[0]
    cells = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    known = {*start.Settings.__annotations__, "image", "process"}
    assert set(re.findall(r"`(\w+)`", cells)) == known


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([\w-]+\.md)\)", MANUAL.read_text())
    assert links
    assert [name for name in links if not (MANUAL.parent / name).exists()] == []
