"""What a process holds, by /proc."""

from __future__ import annotations

import os
import pathlib
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
"""Seconds to wait for what should happen soon: a loaded machine fails no test."""


def resident(pid: int) -> int:
    """Bytes of memory in use; not what other processes share with it, as files' pages are."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


def settled(pid: int) -> None:
    """Wait until the process has nothing to do: two looks find the same CPU time and memory."""
    last = None

    def the_same() -> bool:
        nonlocal last
        before, last = last, (cpu_seconds(pid), resident(pid) >> 20)
        time.sleep(0.1)
        return before == last

    wait_until(the_same, "nothing to do")
