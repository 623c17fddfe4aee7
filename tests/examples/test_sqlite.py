"""examples/sqlite-power-cut: what it says survives does, and what it says does not is found out."""

import pytest

# 1.5 s; the wrong settings half a second each.
CUTS = "120"

pytestmark = pytest.mark.peer("nbdfuse", "fuse2fs", "mke2fs", "debugfs")


@pytest.fixture
def power_cuts(example):
    copy = example("sqlite-power-cut")
    return lambda *arguments: copy.run("python", "power_cuts.py", *arguments)


def test_every_committed_order_survives(power_cuts):
    done = power_cuts("--cuts", CUTS)
    assert (done.returncode, done.stdout) == (0, f"{CUTS} cuts, nothing lost\n"), done.stderr


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_every_committed_order_survives_more_cuts(power_cuts, seed):
    done = power_cuts("--cuts", "3000", "--orders", "40", "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wrong", [
    ["--synchronous=OFF"],
    ["--journal=DELETE"],
    ["--cache=unsafe"],
    pytest.param(["--synchronous=NORMAL", "--cuts=1000"], marks=pytest.mark.long),
    pytest.param(["--journal=TRUNCATE", "--cuts=1000"], marks=pytest.mark.long),
], ids="".join)
def test_with_a_wrong_setting_it_loses_data(power_cuts, wrong):
    done = power_cuts("--cuts", CUTS, *wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("cut "), done.stderr
