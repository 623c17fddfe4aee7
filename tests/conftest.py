"""What every test may rely on: `@pytest.mark.peer`.

A test that needs a program of others names it: `@pytest.mark.peer("qemu-img", "fio")`.  Where
one is missing the test is skipped and the summary says which and why; with CI=true it fails,
because a run that skips must not look like a run that passed.
"""

import os

import pytest

import peers


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {name for marker in item.iter_markers("peer") for name in marker.args}
    missing = sorted(name for name in wanted if not peers.have(name))
    if not missing:
        return
    reason = f"not here, or not allowed to run: {', '.join(missing)} (tools/peers.sh installs them)"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI=true, so this is a failure", pytrace=False)
    pytest.skip(reason)
