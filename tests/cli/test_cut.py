"""``nbdserve cut``: from a log to what the disk holds."""

import pytest

from cli.test_main import run
from nbdserve.powercut.powercut import PowerCut
from nbdserve.powercut.writelog import Kind, WriteLog

S = 512


@pytest.fixture
def path(tmp_path):
    """A log of one file: two orders, of which the second is not flushed."""
    log = WriteLog()
    log.add_file(b"." * 4 * S, "/some/where/disk.img")
    for number in range(2):
        log.end(log.begin(Kind.WRITE, 0, number * S, b"%d" % number * S))
        if not number:
            log.end(log.begin(Kind.FLUSH))
        log.mark(b"order %d" % number)
    log.save(tmp_path / "log")
    return str(tmp_path / "log")


def letters(path):
    return path.read_bytes()[::S].decode()


def test_it_lists(capsys, path):
    assert run(capsys, "cut", path) == (0, (
        "file disk.img: 2048 bytes, 4096 of data at first\n"
        "moments 0 to 8: 2 changes, 1 flushes, 0 durable writes\n"
        "5: order 0\n8: order 1\n"), "")


@pytest.mark.parametrize(("options", "expected"), [
    ([], "0..."),
    (["--seed", "1"], "01.."),
    (["--moment", "1"], "...."),
    (["--moment", "1", "--replay"], "0..."),
    (["--replay"], "01.."),
])
def test_an_outcome(capsys, path, tmp_path, options, expected):
    out = tmp_path / "out"
    assert run(capsys, "cut", path, "-o", str(out), *options) == (0, "", "")
    assert letters(out) == expected


def test_all_outcomes(capsys, path, tmp_path):
    out = tmp_path / "out"
    status, said, _ = run(capsys, "cut", path, "--all", "100", "-o", str(out))
    assert status == 0
    found = {line.split(":")[0]: line for line in said.splitlines()}
    assert {str(file) for file in out.iterdir()} == found.keys()
    assert sorted((letters(file), found[str(file)].partition("note: ")[2])
                  for file in out.iterdir()) == [
        ("....", ""), ("0...", ""), ("0...", "order 0"), ("0...", "order 1"), ("01..", "order 0"),
        ("01..", "order 1")]
    for file in out.iterdir():  # each can be had again
        _, moment, seed = file.name.split("-")
        again = tmp_path / "again"
        run(capsys, "cut", path, "-o", str(again), "--moment", moment[6:], "--seed", seed[4:])
        assert letters(again) == letters(file)


def test_several_files_go_into_a_folder(capsys, tmp_path):
    power_cut = PowerCut()
    power_cut.log.add_file(b"image", "image")
    power_cut.log.add_file(b"data", "data")
    power_cut.log.save(tmp_path / "log")
    out = tmp_path / "out"
    assert run(capsys, "cut", str(tmp_path / "log"), "-o", str(out)) == (0, "", "")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        "image": b"image", "data": b"data"}


@pytest.mark.parametrize(("options", "said"), [
    (["--seed", "1"], "--seed: where to is missing (-o)"),
    (["-o", "x", "--all", "3", "--moment", "1"], "--all and --moment exclude each other"),
    (["-o", "x", "--replay", "--seed", "1"], "--replay and --seed exclude each other"),
    (["-o", "x", "--moment", "9"], "--moment: moment 9: the write log has 0 to 8"),
    (["-o", "{log}"], "-o: {log} is the log"),
])
def test_refusals(capsys, path, options, said):
    options = [option.format(log=path) for option in options]
    status, out, error = run(capsys, "cut", path, *options)
    assert (status, out, error) == (1, "", f"nbdserve: {said.format(log=path)}\n")


def test_what_is_no_log_is_refused(capsys, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"something else")
    assert run(capsys, "cut", str(path)) == (1, "", f"nbdserve: {path}: not a write log\n")
    assert run(capsys, "cut", str(path) + "x")[2] == (
        f"nbdserve: {path}x: No such file or directory\n")
