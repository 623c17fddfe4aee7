"""`python -m limits [NUMBER]`: the table of docs/reliability.md, so many clients of each kind."""

from __future__ import annotations

import pathlib
import resource
import sys
import tempfile
import time

import peers
from limits import crowd, measure

SECONDS = 1.0
MIB = 1 << 20


def rate(honest: crowd.Honest) -> float:
    """Reads of 4 KiB a second, one at a time."""
    start, done = time.monotonic(), 0
    while time.monotonic() < start + SECONDS:
        honest.read(done % 1000 * 4096, 4096)
        done += 1
    return done / (time.monotonic() - start)


def row(image: pathlib.Path, kind: str, number: int) -> list[str]:
    with peers.served(image) as server, crowd.Honest(server.socket_path) as honest:
        pid = server.process.pid
        honest.read(0, 4096)
        alone = rate(honest)
        memory, fds = measure.resident(pid), measure.descriptors(pid)
        with crowd.crowd(kind, server.socket_path, number):
            measure.settled(pid)
            among, used = measure.resident(pid), measure.descriptors(pid)
            beside = rate(honest)
            start = time.monotonic()
            honest.read(0, MIB)
            long = time.monotonic() - start
        measure.wait_until(lambda: measure.descriptors(pid) == fds, "the descriptors are back")
        after = measure.descriptors(pid)
        each = (among - memory) / number / 1024
        return [
            kind, f"{memory >> 20}", f"{among >> 20}", f"{each:.0f}", f"{alone:,.0f}",
            f"{beside:,.0f}", f"{long:.2f}", f"{fds} / {used} / {after}",
        ]  # fmt: skip


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"| {number} clients | RSS before, MiB | among them | KiB each | honest reads/s alone"
          " | beside them | 1 MiB read, s | descriptors before / among / after |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        image = pathlib.Path(folder) / "disk.qcow2"
        peers.qemu_img("create", "-f", "qcow2", image, "1G")
        peers.qemu_io(image, "write -P 1 0 64M")
        for kind in crowd.KINDS:
            print("| " + " | ".join(row(image, kind, number)) + " |", flush=True)


main()
