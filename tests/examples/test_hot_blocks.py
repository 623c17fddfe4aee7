"""examples/hot-blocks: its own tests, and the driver where its package is installed."""

import ast
import sys

import pytest

import peers
from nbdserve.testing import make_image


def test_it_is_thirty_lines(example):
    """With the empty ones, without the docstring."""
    text = (example("hot-blocks").folder / "hot_blocks.py").read_text()
    docstring = ast.parse(text).body[0]
    assert ast.get_docstring(ast.parse(text))
    assert len("\n".join(text.splitlines()[docstring.end_lineno:]).strip().splitlines()) <= 30


def test_its_own_tests(example):
    done = example("hot-blocks").run("python", "-m", "pytest", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_its_own_tests_find_a_bug(example):
    copy = example("hot-blocks")
    filter_ = copy.folder / "hot_blocks.py"
    filter_.write_text(filter_.read_text().replace("(offset + length - 1)", "offset"))
    done = copy.run("python", "-m", "pytest", "-q")
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.peer("qemu-io")
def test_the_driver_has_a_name_once_it_is_installed(example, tmp_path):
    copy = example("hot-blocks")
    site = tmp_path / "site"
    peers.run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}",
              copy.folder)
    make_image(tmp_path / "disk.qcow2", "64M")
    options = f"driver=hot-blocks,top=1,file.driver=qcow2,file.file.filename={tmp_path}/disk.qcow2"
    server = copy.start("nbdserve", "serve", "-v", f"-k{tmp_path}/s", "--image-opts", options,
                        PYTHONPATH=str(site))
    uri = next(word for word in server.stdout.readline().split() if word.startswith("nbd"))
    peers.qemu_io(uri, "write 1M 4k", "write 1M 4k", "write 2M 4k", options=("-f", "raw"))
    server.terminate()
    log = server.communicate(timeout=30)[1]
    assert server.returncode == 0
    assert "written" in log
    assert "1048576" in log
    assert "2097152" not in log.split("written")[1].splitlines()[0]
