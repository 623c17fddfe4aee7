"""`nbdserve nbdkit`: what is nbdkit's, what is ours, and what nbdkit is given."""

import os
import subprocess

import pytest

from nbdserve.cli import nbdkit
from nbdserve.cli.nbdkit import check_python, nbdkit_arguments, python_path, script
from nbdserve.errors import ConfigError


def after_script(*arguments):
    """(nbdkit's options, the parameters)."""
    words = nbdkit_arguments(arguments)
    at = words.index("python")
    assert words[at + 1] == script()
    return words[:at], words[at + 2 :]


@pytest.mark.parametrize(("given", "options", "parameters"), [
    (["d.qcow2"], ["--threads=4"], ["file=d.qcow2"]),
    (["-U", "-", "-f", "d.qcow2", "cache=none"], ["-U-", "-f", "--threads=16"],
     ["file=d.qcow2", "cache=none"]),
    (["--filter=cow", "--filter", "fua", "d", "fuamode=force"],
     ["--filter=cow", "--filter=fua", "--threads=4"], ["file=d", "fuamode=force"]),
    (["-t", "2", "d"], ["-t2"], ["file=d"]),
    (["--threads", "2", "d"], ["--threads=2"], ["file=d"]),
    (["-r", "d"], ["-r", "--threads=4"], ["read-only=on", "file=d"]),
    (["-r", "d", "read-only=off"], ["-r", "--threads=4"], ["file=d", "read-only=off"]),
    (["file=d"], ["--threads=4"], ["file=d"]),
    (["./a=b"], ["--threads=4"], ["file=./a=b"]),
    (["--dump-plugin"], ["--dump-plugin", "--threads=4"], []),
])
def test_what_nbdkit_is_given(given, options, parameters):
    assert after_script(*given) == (options, parameters)


def test_the_command_to_run_has_the_environment_that_was_given(monkeypatch):
    monkeypatch.setenv("PATH", "/my own/bin:/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (run, _), _ = after_script("d", "--run", "nbdinfo $uri")
    assert run == "--run=export PATH='/my own/bin:/bin'; unset PYTHONPATH; nbdinfo $uri"


def test_nbdkit_finds_its_own_python_before_that_of_an_environment(monkeypatch, tmp_path):
    """An interpreter within a program takes its library from beside the first python3 of PATH."""
    (tmp_path / "usr" / "sbin").mkdir(parents=True)
    (tmp_path / "usr" / "sbin" / "nbdkit").touch()
    (tmp_path / "sbin").symlink_to(tmp_path / "usr" / "sbin")
    monkeypatch.setenv("PATH", "/venv/bin:/usr/bin")
    found = nbdkit.settings(str(tmp_path / "sbin" / "nbdkit"))
    assert found["PATH"] == f"{tmp_path}/usr/bin:/venv/bin:/usr/bin"


@pytest.mark.parametrize(("given", "said"), [
    ([], "IMAGE must be given"),
    (["-f"], "IMAGE must be given"),
    (["cache=none"], "IMAGE must be given"),
    (["a", "b"], "'b': one image is served, and 'a' is it"),
    (["--zork", "a"], "option --zork not recognized"),
    (["-p"], "option -p requires argument"),
])
def test_what_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        nbdkit_arguments(given)


@pytest.mark.parametrize(("status", "stdout", "said"), [
    (1, "", "no Python plugin"),
    (0, "name=python\n", "no Python plugin"),
    (0, "python_version=3.9.2\n", "nbdkit's Python is 3.9.2, and 3.11 is needed"),
])
def test_an_nbdkit_that_cannot_run_it(monkeypatch, status, stdout, said):
    done = subprocess.CompletedProcess([], status, stdout, "")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: done)
    with pytest.raises(ConfigError, match=said):
        check_python("nbdkit", {})


def test_no_nbdkit(monkeypatch):
    monkeypatch.setattr(nbdkit.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(ConfigError, match="nbdkit is not installed"):
        nbdkit.find_nbdkit()


def test_the_path_has_the_package_and_its_libraries():
    places = python_path("given").split(os.pathsep)
    assert places[0] == "given"
    for name in ("nbdserve", "trio", "construct"):
        assert any(os.path.isdir(os.path.join(place, name)) for place in places[1:])
