"""The fixtures where they are meant to be: in another project, which has nbdserve from a wheel.

Nothing of this repository is on its path. What is in tests/project/ is run as its author would run
it, and his tests are the ones that look closely.
"""

import os
import pathlib
import re

import pytest

from installed import PROJECT, environment, run_there

PLAIN = ["-p", "no:xdist", "-p", "no:trio", "-p", "no:asyncio", "-p", "no:anyio"]
ALL = ["-o", "asyncio_default_fixture_loop_scope=function"]
FULL = 12  # tests in test_sync.py and test_async.py


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> pathlib.Path:
    base = tmp_path_factory.getbasetemp()
    return environment(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def run(there, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    (project / "tests").symlink_to(PROJECT / "tests")

    def pytest_there(*arguments: str):
        options = ("-rA", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}")
        return run_there(there, "python", "-B", "-m", "pytest", *options, *arguments, cwd=project)

    return pytest_there


def passed(output: str) -> int:
    found = re.search(r"=+ (\d+) passed in ", output)
    return int(found[1]) if found else 0


def test_the_installed_one_is_used_and_typed(there, tmp_path):
    where = "import nbdserve, pathlib; print(pathlib.Path(nbdserve.__file__).parent)"
    done = run_there(there, "python", "-c", where, cwd=tmp_path)
    package = pathlib.Path(done.stdout.strip())
    assert package.is_relative_to(there)
    assert (package / "py.typed").exists()


def test_with_plain_pytest(run):
    done = run(*PLAIN, "tests/test_sync.py")
    assert (done.returncode, passed(done.stdout)) == (0, 8), done.stdout + done.stderr


def test_with_all_plugins_under_xdist(run):
    done = run(*ALL, "-n", "2", "tests/test_sync.py", "tests/test_async.py")
    assert (done.returncode, passed(done.stdout)) == (0, FULL), done.stdout + done.stderr
    for kind in ("test_trio", "test_asyncio", "test_anyio[asyncio]", "test_anyio[trio]"):
        assert f"PASSED tests/test_async.py::{kind}\n" in done.stdout


def test_with_trio_mode(run):
    done = run(*ALL, "-o", "trio_mode=true", "tests/test_async.py::test_trio", "tests/test_sync.py")
    assert (done.returncode, passed(done.stdout)) == (0, 9), done.stdout + done.stderr


@pytest.mark.parametrize("xdist", [["-n", "0"], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_report_of_a_failure_has_the_log(run, xdist):
    done = run(*ALL, *xdist, "tests/test_report.py")
    assert done.returncode == 1
    assert re.search(r"-+ log of the nbdserve at \S+/nbd0.sock -+\n", done.stdout), done.stdout
    assert "client on the unix socket connected\n" in done.stdout
