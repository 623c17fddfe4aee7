"""How long until a server for a test accepts clients: what docs/testing.md says of it.

    PYTHONPATH=tests python -m bench.fixtures [FOLDER ...]

Prints a table for each folder, by default one in memory and the one for temporary files. Imports
are not counted, as they are done once; the first server of a process is a row of its own.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from nbdserve.powercut.content import Content
from nbdserve.testing.start import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDERS = ("/dev/shm", tempfile.gettempdir())

CASES: dict[str, dict[str, Any]] = {
    "a new disk of 1 GiB": {"size": "1G"},
    "with 1 MiB of content": {"size": "1G", "content": bytes(range(256)) * 4096},
    "power_cut=\"file\"": {"size": "1G", "power_cut": "file"},
    "from memory": {"image": Content(1 << 30), "format": "raw"},
    "in a process": {"size": "1G", "process": True},
}


def timed(folder: str, arguments: dict[str, Any], rounds: int) -> Iterator[float]:
    """Milliseconds of each start."""
    for _ in range(rounds):
        place = tempfile.mkdtemp(dir=folder)
        began = time.perf_counter()
        server = serving(folder=place, **arguments).start()
        yield (time.perf_counter() - began) * 1e3
        server.stop()
        shutil.rmtree(place)


def main(folders: list[str]) -> None:
    [first] = timed(folders[0], CASES["a new disk of 1 GiB"], 1)
    print(f"| the first of a process, in {folders[0]} | {first:.1f} ms | |")
    for folder in folders:
        for name, arguments in CASES.items():
            rounds = 10 if arguments.get("process") else 200
            times = list(timed(folder, arguments, rounds))
            print(
                f"| {name}, in {folder} | {statistics.median(times):.1f} ms"
                f" | {max(times):.1f} ms |"
            )


if __name__ == "__main__":
    main(sys.argv[1:] or list(FOLDERS))
