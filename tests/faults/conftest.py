"""`tally` counts trials; the summary says how many there were, and how many faults they met."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.trial import Outcome

counts = {"trials": 0, "faults": 0, "errors": 0}


@pytest.fixture
def tally() -> Callable[[Outcome], None]:
    """To be called with each outcome."""

    def add(outcome: Outcome) -> None:
        counts["trials"] += 1
        counts["faults"] += outcome.injected
        counts["errors"] += len(outcome.errors)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counts["trials"]:
        terminalreporter.write_line(
            "{trials} trials: {faults} faults injected, {errors} errors answered".format(**counts)
        )
