"""What every test of the targets needs: the shared loop is closed behind it."""

from __future__ import annotations

import logging

import pytest

from fuzz import loop


@pytest.fixture(autouse=True)
def _quiet():
    """Nobody reads what a server says of its clients; and the thread's next trio run is its own."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    loop.close()
