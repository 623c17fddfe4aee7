"""What a server calls for each kind of request in each cache mode: observed, and put into words.

`observe` runs a server under strace and takes the `STEPS`, one request at a time. What each did to
the image becomes a `Record`: what was written, punched or zeroed, and the syncs between. Order
between two syncs means nothing, nor does the number of calls; what is left is what a crash could
tell apart. `DIFFERENCES` are the ways in which we lawfully differ from qemu-nbd.

As a program (`make cache-table`) it writes the tables into docs/caching.md, between the markers.
"""

from __future__ import annotations

import pathlib
import shutil
import struct
import sys
import tempfile
import textwrap
import time
from typing import TYPE_CHECKING, NamedTuple

import peers
from interop.tools import BareClient
from nbdserve.formats.qcow2.node import SETTLE_AFTER
from strace import Access, Kind, Log

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    Records = dict[str, "Record"]

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB

MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")
FORMATS = ("raw", "qcow2")

DIRECT = ("none", "directsync")
WRITE_CACHE_OFF = ("writethrough", "directsync")

SIZE = 64 * MIB  # one L2 table maps it all
ALLOCATED = 16 * MIB  # from the start of the disk

RING_TRACE = pathlib.Path(__file__).parent.parent / "ring_trace.py"

WRITE, FLUSH, TRIM, ZEROES = (
    BareClient.WRITE, BareClient.FLUSH, BareClient.TRIM, BareClient.WRITE_ZEROES
)  # fmt: skip
FUA, NO_HOLE = BareClient.FUA, BareClient.NO_HOLE


class Step(NamedTuple):
    """A request, by its name in the table. `unlinks`: it frees clusters of a qcow2 image, so that
    some time later the server flushes by itself."""

    name: str
    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    unlinks: bool = False


# What a group of steps leaves behind, and what flushing that leaves behind. Not looked at.
SETTLE = [Step("", FLUSH), Step("", FLUSH)]

STEPS = [
    *SETTLE,
    Step("write", WRITE, 1 * MIB, 4 * KIB),
    Step("flush", FLUSH),
    Step("flush again", FLUSH),
    Step("write, FUA", WRITE, 2 * MIB, 4 * KIB, FUA),
    *SETTLE,
    Step("write to new space", WRITE, 32 * MIB, CLUSTER),
    Step("flush after that", FLUSH),
    Step("write to new space, FUA", WRITE, 33 * MIB, CLUSTER, FUA),
    *SETTLE,
    Step("write zeroes, no hole, FUA", ZEROES, 4 * MIB, MIB, FUA | NO_HOLE),
    *SETTLE,
    Step("write zeroes", ZEROES, 6 * MIB, MIB, unlinks=True),
    *SETTLE,
    Step("write zeroes, FUA", ZEROES, 8 * MIB, MIB, FUA, unlinks=True),
    *SETTLE,
    Step("trim, FUA", TRIM, 10 * MIB, MIB, FUA, unlinks=True),
    *SETTLE,
    Step("trim", TRIM, 12 * MIB, MIB, unlinks=True),
    Step("flush after the trim", FLUSH),
]

UNLINKING = {step.name for step in STEPS if step.unlinks} | {"flush after the trim"}

SYNC = "sync"
WITH_DSYNC = " with DSYNC"

ATTEMPTS = 8

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "caching.md"
BEGIN = "<!-- observed: begin (make cache-table) -->\n"
END = "<!-- observed: end -->\n"


class Record(NamedTuple):
    """What was done for one request. `parts`: what happened before, between and after the syncs,
    so one set more than there were syncs. Words: data, or a part of a qcow2 image's metadata, that
    was written; "punch" or "zero" and the part. `direct`: whether writes were with O_DIRECT; None
    if there was none."""

    parts: tuple[frozenset[str], ...]
    direct: bool | None = None

    def __str__(self) -> str:
        """What the table says."""
        words: list[str] = []
        for part in self.parts:
            words += [*sorted(part), SYNC]
        return ", ".join(words[:-1]) or "-"


class Difference(NamedTuple):
    """Where we do not do what qemu-nbd does. Of the two records, `discounted` must be the same."""

    reason: str
    applies: Callable[[str, str, str], bool]  # to format, mode, step
    discounted: Callable[[Record], Record]


def _without_freeing(record: Record) -> Record:
    """What is left is whether, and when, the unlinking is durable."""
    parts = [part - {"punch data", "refcounts"} for part in record.parts]
    # Syncs with nothing between them are one.
    kept = [part for part in parts[:-1] if part] or parts[:1]
    return Record((*kept, parts[-1]) if len(parts) > 1 else (parts[0],), record.direct)


def _dsync_as_sync(record: Record) -> Record:
    """A write with DSYNC, alone since the last sync, is a write and a sync."""
    *before, last = record.parts
    if not last or not all(word.endswith(WITH_DSYNC) for word in last):
        return record
    plain = frozenset(word.removesuffix(WITH_DSYNC) for word in last)
    return record._replace(parts=(*before, plain, frozenset()))


DIFFERENCES = [
    Difference(
        "A freed cluster of a qcow2 image is punched, and its refcount lowered, once no durable L2"
        " entry points to it. qemu-nbd punches at once, and hands the cluster out again before.",
        lambda format, mode, step: format == "qcow2" and step in UNLINKING,
        _without_freeing,
    ),
    Difference(
        "Where nothing but the data has to be durable, either may write it with RWF_DSYNC instead"
        " of syncing afterwards.",
        lambda format, mode, step: step.startswith("write"),
        _dsync_as_sync,
    ),
]


class Server(NamedTuple):
    """Who serves: nbdserve with an engine, or (no engine) qemu-nbd."""

    engine: str | None

    def start(
        self, image: pathlib.Path, mode: str, log: Log
    ) -> contextlib.AbstractContextManager[peers.Server]:
        """Start it under strace, with the same options for either."""
        options = [f"--cache={mode}", "--discard=unmap"]
        format = image.suffix[1:]
        if self.engine is None:
            program = [*log.command(), "qemu-nbd"]
            return peers.qemu_nbd(image, *options, format=format, program=program)
        program = [*log.command(), sys.executable, "-m", "nbdserve"]
        if self.engine == "io_uring":
            program[-2:] = [str(RING_TRACE), str(log.ring)]
        options += [f"--aio={self.engine}", "-f", format]
        return peers.served(image, *options, program=program)


QEMU = Server(None)
THREADS = Server("threads")


def observe(server: Server, mode: str, image: pathlib.Path, folder: pathlib.Path) -> Records:
    """Serve a copy of the image and take all steps.

    Where the server may have flushed by itself meanwhile, because this took too long, it proves
    nothing and is done again.
    """
    folder.mkdir()
    for attempt in range(ATTEMPTS):
        copy = folder / f"{attempt}{image.suffix}"
        shutil.copyfile(image, copy)
        log = Log(folder / f"{attempt}.strace")
        with server.start(copy, mode, log) as running:
            lines, seconds = _take_steps(running.socket_path, log)
        if seconds < SETTLE_AFTER:
            return dict(_records(log.accesses(copy), _parts_of(copy), lines))
    raise AssertionError(f"{ATTEMPTS} times too slow to tell what the server did unasked")


def _take_steps(socket_path: pathlib.Path, log: Log) -> tuple[list[int], float]:
    """How many lines the log had after each step; seconds since the first that unlinks."""
    lines = []
    client = BareClient(socket_path)
    first = None
    for number, step in enumerate(STEPS):
        if step.unlinks and first is None:
            first = time.monotonic()
        data = b"data" * (step.length // 4) if step.command == WRITE else step.length
        client.ask(client.request(step.command, number, step.offset, data, step.flags))
        lines.append(log.nb_lines())
    assert first is not None
    seconds = time.monotonic() - first
    client.close()
    return lines, seconds


def _records(
    accesses: list[Access], part_of: Callable[[int], str], lines: list[int]
) -> Iterator[tuple[str, Record]]:
    for step, start, stop in zip(STEPS[1:], lines, lines[1:], strict=False):
        parts: list[set[str]] = [set()]
        direct = set()
        for access in accesses:
            if not start <= access.place < stop:
                continue
            if access.kind is Kind.SYNC:
                parts.append(set())
                continue
            words = part_of(access.offset)
            if access.kind is Kind.WRITE:
                direct.add(access.direct)
                words += WITH_DSYNC if access.dsync else ""
            else:
                words = f"{access.kind.value} {words}"
            parts[-1].add(words)
        if step.name:
            assert len(direct) < 2, f"{step.name}: some writes with O_DIRECT and some without"
            yield step.name, Record(tuple(map(frozenset, parts)), direct.pop() if direct else None)


def _parts_of(image: pathlib.Path) -> Callable[[int], str]:
    """A function that says which part of the image a host offset is in; no metadata moves here."""
    if image.suffix == ".raw":
        return lambda offset: "data"
    data = image.read_bytes()
    l1_size, l1_offset, table_offset, table_clusters = struct.unpack_from(">IQQI", data, 36)
    l2_tables = struct.unpack_from(f">{l1_size}Q", data, l1_offset)
    blocks = struct.unpack_from(f">{table_clusters * CLUSTER // 8}Q", data, table_offset)
    part = {0: "header", l1_offset: "L1", table_offset: "refcount table"}
    part |= {entry & OFFSET_MASK: "L2" for entry in l2_tables if entry}
    part |= {entry & OFFSET_MASK: "refcounts" for entry in blocks if entry}
    return lambda offset: part.get(offset // CLUSTER * CLUSTER, "data")


def make_images(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """An image of each format, its first part full of data."""
    images = {}
    for format in FORMATS:
        images[format] = folder / f"disk.{format}"
        peers.qemu_img("create", "-q", "-f", format, images[format], str(SIZE))
        peers.qemu_io(images[format], f"write -P 1 0 {ALLOCATED}", options=("-f", format))
    return images


# --- the documentation ---------------------------------------------------------------------------


def render(observed: dict[tuple[str, str], Records]) -> str:
    """The tables, in Markdown: what nbdserve does by format and mode, and where qemu-nbd differs.
    """
    text = []
    for format in FORMATS:
        modes = [mode for mode in MODES if (format, mode) in observed]
        rows = [
            [f"**{format}**", *modes],
            ["---"] * (len(modes) + 1),
            ["O_DIRECT", *("yes" if is_direct(observed[format, mode]) else "no" for mode in modes)],
        ]
        for step in observed[format, modes[0]]:
            rows.append([step, *(str(observed[format, mode][step]) for mode in modes)])
        text += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    text += ["qemu-nbd with the same options does the same, but for this:", ""]
    for difference in DIFFERENCES:
        text += textwrap.wrap(difference.reason, 98, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*text, ""])


def is_direct(records: Records) -> bool:
    """Whether the writes were with O_DIRECT: all, or none."""
    [direct] = {record.direct for record in records.values()} - {None}
    return bool(direct)


def documented(page: pathlib.Path) -> str:
    """What stands between the markers."""
    return page.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Observe, and write it into the page."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = pathlib.Path(name).resolve()
        images = make_images(folder)
        observed = {
            (format, mode): observe(THREADS, mode, images[format], folder / f"{format}-{mode}")
            for format in FORMATS
            for mode in MODES
        }
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + render(observed) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
