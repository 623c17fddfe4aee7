"""examples/ci: both jobs are what they say, and their steps run, on nothing but what they install.

The steps are run as they stand in the files, in a new virtual environment, by a process that may
nothing a plain user may not. Only where nbdserve comes from is other than there: a constraint of
pip's names the wheel of this tree. All else that the steps install is from the index.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pip
import pytest
import yaml

import peers
from installed import clean_environment

GITHUB, GITLAB = ".github/workflows/test.yml", ".gitlab-ci.yml"
# What the steps of others do is not run here; that there is nothing else is checked.
ACTIONS = ["actions/checkout", "actions/setup-python", "actions/upload-artifact"]
# Words with which a job asks for more than to run as any user does.
MORE = ("sudo", "privileged", "mount", "modprobe", "losetup", "nbd-client", "apt", "services",
        "container", "options", "--device", "dind")
# Of every process that steps start. Who is not root has no capability to give up.
PLAIN = ["setpriv", "--no-new-privs"]
if os.geteuid() == 0:
    PLAIN += ["--bounding-set=-all", "--inh-caps=-all"]

pytestmark = pytest.mark.peer("setpriv")


@pytest.fixture
def job(example):
    """A copy of the project, and what GitHub's job runs in it."""
    copy = example("ci")
    steps = github(copy.folder)["steps"]
    return copy, [step["run"] for step in steps if "run" in step]


def github(folder):
    (job,) = yaml.safe_load((folder / GITHUB).read_text())["jobs"].values()
    return job


def gitlab(folder):
    jobs = yaml.safe_load((folder / GITLAB).read_text())
    assert list(jobs) == ["test"]
    return jobs["test"]


def step(copy, command, environment):
    """As a runner does: by a shell that ends at the first error."""
    return subprocess.run(
        [*PLAIN, "bash", "-e", "-c", command], cwd=copy.folder, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def new_environment(folder, there):
    """Python and pip, and nothing else: what a step of others, or the image, has prepared."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (modules,) = folder.glob("lib/python*/site-packages")
    (modules / "pip").symlink_to(pathlib.Path(pip.__file__).parent)
    (wheel,) = there.glob("wheels/nbdserve-*.whl")
    constraint = folder / "constraint.txt"
    constraint.write_text(f"nbdserve @ {wheel.as_uri()}\n")
    return {
        **clean_environment(),
        "PATH": os.pathsep.join([str(folder / "bin"), peers.SEARCH_PATH]),
        "PIP_CONSTRAINT": str(constraint),
        "PIP_NO_COMPILE": "1",  # for speed
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def test_github_runs_it_as_any_user(example):
    job = github(example("ci").folder)
    assert sorted(job) == ["runs-on", "steps", "timeout-minutes"]
    assert re.fullmatch(r"ubuntu-\d+\.04", job["runs-on"])
    *used, kept = [step for step in job["steps"] if "uses" in step]
    assert [step["uses"].split("@")[0] for step in (*used, kept)] == ACTIONS
    assert job["steps"][-1] is kept
    assert kept["if"] == "failure()"
    assert kept["with"]["path"] == "reports/"


def test_gitlab_runs_the_same(job):
    copy, commands = job
    other = gitlab(copy.folder)
    assert sorted(other) == ["artifacts", "before_script", "image", "script", "timeout"]
    assert re.fullmatch(r"python:3\.\d+-slim", other["image"])
    assert other["before_script"] + other["script"] == commands
    kept = other["artifacts"]
    assert kept["when"] == "on_failure"
    assert (kept["paths"], kept["reports"]) == (["reports/"], {"junit": "reports/junit.xml"})


@pytest.mark.parametrize("file", [GITHUB, GITLAB])
def test_neither_asks_for_more(example, file):
    text = (example("ci").folder / file).read_text()
    said = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert [word for word in MORE if word in said] == []
    assert "nbdserve" in said


def test_the_steps(job, there, tmp_path):
    copy, (install, tests) = job
    environment = new_environment(tmp_path / "environment", there)
    done = step(copy, install, environment)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Processing {re.escape(str(there))}/wheels/nbdserve-\S+", done.stdout)
    done = step(copy, tests, environment)
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout
    results = xml.etree.ElementTree.parse(copy.folder / "reports" / "junit.xml").getroot()[0]
    assert (results.get("tests"), results.get("failures")) == ("9", "0")


def test_what_is_kept_of_a_failure(job, tmp_path):
    """A flush is forgotten: the junit report tells of a cut, and the write log has that disk."""
    copy, (_, tests) = job
    tool = copy.folder / "slots.py"
    flush = "        self.disk.flush()\n        header"
    assert flush in tool.read_text()
    tool.write_text(tool.read_text().replace(flush, "        header"))
    done = step(copy, tests, copy.environment)
    assert done.returncode == 1
    assert "2 failed, 7 passed" in done.stdout

    kept = shutil.copytree(copy.folder / "reports", tmp_path / "artifact")
    assert sorted(path.name for path in kept.iterdir()) == ["junit.xml", "power-cut.log"]
    results = xml.etree.ElementTree.parse(kept / "junit.xml").getroot()
    told = [failure.get("message") for failure in results.iter("failure")]
    (cut,) = [found[0] for text in told if (found := re.search(r"--moment \d+ --seed \d+", text))]
    made = copy.run("nbdserve", "cut", kept / "power-cut.log", "-o", kept / "disk.img",
                    *shlex.split(cut))
    assert made.returncode == 0, made.stderr
    look = copy.run("python", "-c", LOOK, kept / "disk.img")
    assert "slots.Damaged" in look.stderr


LOOK = """
import sys
from disk import Disk
from slots import Slots
from nbdserve.testing import serving
with serving(sys.argv[1], format="raw") as server, Disk(server.socket) as disk:
    Slots(disk).firmware()
"""
