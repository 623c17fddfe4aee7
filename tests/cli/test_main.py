"""Whatever goes wrong is one line on stderr and exit status 1; --help and --version are 0."""

import os
import subprocess
import sys

import click
import pytest

from nbdserve import __version__
from nbdserve.cli import main as cli_main
from nbdserve.errors import ConfigError, ImageError


def run(capsys, *argv):
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        cli_main.main(argv)
    return end.value.code, *capsys.readouterr()


REFUSED = [
    ([], "Missing command"),
    (["frobnicate"], "'frobnicate'"),
    (["--frobnicate"], "--frobnicate"),
    (["serve"], "'IMAGE'"),
    (["serve", "a", "b"], "extra argument"),
    (["serve", "--frobnicate", "disk"], "--frobnicate"),
    (["serve", "-t", "disk"], "No such option"),
    (["serve", "-p"], "'-p'"),
    (["serve", "-p", "http", "disk"], "--port: 'http' is not a valid integer"),
    (["serve", "-p", "65536", "disk"], "--port: 65536 is not in the range"),
    (["serve", "-p", "-1", "disk"], "--port: -1 is not in the range"),
    (["serve", "-e", "-1", "disk"], "--shared: -1 is not in the range"),
    (["serve", "-e", "1k", "disk"], "'1k'"),
    (["serve", "-o", "x", "disk"], "--offset: 'x'"),
    (["serve", "-o", "-1", "disk"], "--offset: '-1'"),
    (["serve", "-o", "99999999999999999999", "disk"], "--offset"),
    (["serve", "--cache=fast", "disk"], "--cache: 'fast' is not one of"),
    (["serve", "--aio=native", "disk"], "--aio=native needs O_DIRECT"),
    (["serve", "--cache=unsafe", "--cache=unsafe", "disk"], "--cache can only be specified once"),
    (["serve", "--discard=on", "--discard=off", "disk"], "--discard can only be specified once"),
    (["serve", "--discard=maybe", "disk"], "--discard: 'maybe' is not one of"),
    (["serve", "--detect-zeroes=maybe", "disk"], "'maybe'"),
    (["serve", "--discard=off", "--detect-zeroes=unmap", "disk"], "needs discard=unmap"),
    (["qemu-nbd", "--detect-zeroes=unmap", "disk"], "needs discard=unmap"),
    (["serve", "-x", "x" * 5000, "disk"], "--export-name: 5000 bytes"),
    (["serve", "-D", "x" * 5000, "disk"], "--description: 5000 bytes"),
    (["serve", "-k", "", "disk"], "--socket: the path is empty"),
    (["serve", "--pid-file", "", "disk"], "--pid-file: the path is empty"),
    (["serve", ""], "file name is empty"),
    (["serve", "--fork", ""], "file name is empty"),
    (["serve", "disk\nimage"], "disk\\nimage"),
    (["serve", "disk\x9b31m"], "disk\\x9b31m"),  # a command to a terminal, in one character
    (["serve", "missing"], "missing: No such file or directory"),
    (["serve", "-f", "vmdk", "disk"], "vmdk"),
    (["serve", "-f", "qcow2", "disk"], "disk"),
    (["qemu-nbd", "missing"], "missing: No such file or directory"),
    (["qemu-nbd", "-c", "/dev/nbd0", "disk"], "-c/--connect is not supported yet"),
    (["qemu-nbd", "-L"], "-L/--list is not supported yet"),
    (["qemu-nbd", "-n", "--cache=unsafe", "disk"], "-n and --cache can only be specified once"),
    (["serve", "-f", "raw", "-k", "x" * 200, "disk"], "--socket"),
    (["serve", "-f", "raw", "-k", "disk", "disk"], "--socket: disk: exists and is not a socket"),
    (["serve", "-f", "raw", "-k", "no/s", "disk"], "--socket: no/s: No such file or directory"),
    (["serve", "-f", "raw", "-b", "192.0.2.1", "disk"], "--bind: 192.0.2.1"),
    (["serve", "-f", "raw", "-k", "s", "--pid-file", "no/p", "disk"], "--pid-file: no/p"),
    (["create"], "'FILE'"),
    (["create", "", "1M"], "file name is empty"),
    (["create", "no/new", "1M"], "no/new: cannot create: No such file or directory"),
    (["create", "new"], "new: a new image needs a size"),
    (["create", "new", "12q"], "SIZE: '12q'"),
    (["create", "new", "1", "2"], "extra argument"),
    (["create", "-f", "raw", "new", "1M"], "'raw'"),
    (["create", "-o", "nonsense=1", "new", "1M"], "'nonsense'"),
    (["create", "-o", "cluster_size=x", "new", "1M"], "-o cluster_size: 'x'"),
    (["create", "-b", "disk", "new"], "-b: disk: its format must be given too (-F)"),
    (["create", "-F", "raw", "new", "1M"], "-F: "),
    (["create", "-b", "missing", "-F", "raw", "new"], "missing: No such file or directory"),
    (["create", "-b", "disk", "-F", "raw", "disk"], "the image itself"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    disk = tmp_path / "disk"
    disk.write_bytes(b"guest data " * 1000)
    before = disk.read_bytes(), disk.stat().st_mtime_ns

    status, out, err = run(capsys, *argv)

    assert (status, out) == (1, "")
    assert err.startswith("nbdserve: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert said in err
    assert (disk.read_bytes(), disk.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], *([name, flag] for name in cli_main.COMMANDS for flag in
    ("-h", "--help"))], ids=" ".join)  # fmt: skip
def test_help(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: nbdserve")


@pytest.mark.parametrize("argv", [["--version"], ["-V"], ["qemu-nbd", "--version"]])
def test_version(capsys, argv):
    assert run(capsys, *argv) == (0, f"nbdserve {__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("--port: wrong"), "--port: wrong"),
        (ImageError("disk: not qcow2"), "disk: not qcow2"),
        (FileNotFoundError(2, "No such file", "disk"), "disk: No such file"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("words"), "internal error: OSError('words')"),
        (click.Abort(), "aborted"),
        (KeyError("key"), "internal error: KeyError('key')"),
        (ExceptionGroup("g", [ConfigError("a"), ConfigError("a"), OSError(5, "b")]), "a; b"),
    ],
)
def test_errors_in_words(error, said):
    assert cli_main.describe(error) == said


def test_an_interrupt_is_silent(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main.cli, "main", interrupted)
    assert run(capsys, "serve", "disk") == (1, "", "")


def test_the_command_line_loads_nothing_heavy():
    heavy = ["trio", "construct", "zstandard", "isal", "importlib.metadata", "nbdserve.server"]
    code = (
        "import sys; from nbdserve.cli import main, serve, qemu_nbd, create;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
