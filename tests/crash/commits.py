"""A program as a user writes one, on a stack as a user asks for one: transactions on an image that
is opened by its options, with a power-cut node above the format or below it.

Each transaction writes new versions of a few slots of the disk and commits, by a flush or by FUA.
Then it notes in the log which version each slot has at least. That is all it relies on: whatever a
power cut leaves, each sector of a slot has a version that was committed or a later one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from nbdserve.blockdev import parse_node
from nbdserve.config import ImageConfig
from nbdserve.filters.power_cut import power_cut_of
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend
from qcow2_model import assert_sound, guest_bytes

if TYPE_CHECKING:
    from nbdserve.block.backend import BlockBackend
    from nbdserve.config import CacheMode
    from nbdserve.powercut.powercut import Outcome, PowerCut

__all__ = ["PLACES", "assert_survived", "cuts_until_caught", "run_program"]

SECTOR = 512
SLOT = 3000  # so that slots share sectors and clusters
NB_SLOTS = 40
NB_TRANSACTIONS = 16

PLACES = {
    "above": {"driver": "power-cut", "file.driver": "qcow2", "file.file.filename": "{}"},
    "below": {"driver": "qcow2", "file.driver": "power-cut", "file.file.filename": "{}"},
}


def version(slot: int, number: int) -> bytes:
    """The bytes of a slot; version 0 is an empty disk."""
    return (b"%02d:%05d;" % (slot, number)) * (SLOT // 9) + b"." * (SLOT % 9) if number else bytes(
        SLOT)


async def run_program(
    place: str, path: str, mode: CacheMode, *, seed: int, check_limit: int
) -> tuple[int, str | None]:
    """Run it on a new image, go through cuts: (how many, what was wrong with the last or None)."""
    create_image(path, NB_SLOTS * SLOT // SECTOR * SECTOR + SECTOR, cluster_size=1024)
    options = {name: text.format(path) for name, text in PLACES[place].items()}
    config = ImageConfig("image", options=parse_node(options), cache=mode)
    async with open_backend(config) as backend:
        power_cut = power_cut_of(backend.root)
        assert power_cut is not None
        await _transactions(backend, power_cut, random.Random(seed))
        number = 0
        for number, outcome in enumerate(power_cut.all_cuts(check_limit), start=1):
            try:
                assert_survived(place, outcome)
            except AssertionError as error:
                power_cut.cut()
                return number, str(error)
        power_cut.cut()
        return number, None


async def _transactions(
    backend: BlockBackend, power_cut: PowerCut, chooser: random.Random
) -> None:
    for number in range(1, NB_TRANSACTIONS + 1):
        slots = chooser.sample(range(NB_SLOTS), 4)
        fua = number % 2 == 0
        async with trio.open_nursery() as nursery:
            for slot in slots:
                data = version(slot, number)
                if fua:
                    nursery.start_soon(_write_through, backend, slot * SLOT, data)
                else:
                    nursery.start_soon(_write, backend, slot * SLOT, data, slot % 3)
        if not fua:
            await backend.flush()
        power_cut.mark(" ".join(f"{slot}={number}" for slot in slots))


async def _write(backend: BlockBackend, offset: int, data: bytes, way: int) -> None:
    """On one of the ways on which a server writes."""
    if way == 0 and backend.write_nowait(offset, data) is None:
        return
    if way == 1:
        answered = trio.Event()
        errors: list[OSError | None] = []

        def done(error: OSError | None) -> None:
            errors.append(error)
            answered.set()

        # Aligned memory, as O_DIRECT wants it.
        buffer = backend.buffers.take(len(data))
        buffer[: len(data)] = data
        if backend.submit_write(offset, buffer[: len(data)], done):
            await answered.wait()
            assert errors == [None]
            return
    await backend.write(offset, data)


async def _write_through(backend: BlockBackend, offset: int, data: bytes) -> None:
    await backend.write(offset, data, fua=True)


def assert_survived(place: str, outcome: Outcome) -> None:
    """Raises AssertionError if the disk lacks anything of what the outcome has the notes of."""
    disk = bytes(outcome.content)
    if place == "below":
        assert_sound(disk, leaks_allowed=True)
        disk = guest_bytes(disk)
    least = dict.fromkeys(range(NB_SLOTS), 0)
    for note in outcome.marks:
        least |= {int(slot): int(number) for slot, number in
                  (each.split("=") for each in note.split())}
    for slot, committed in least.items():
        allowed = [version(slot, number) for number in range(committed, NB_TRANSACTIONS + 1)]
        start = slot * SLOT
        while start < (slot + 1) * SLOT:
            stop = min((start // SECTOR + 1) * SECTOR, (slot + 1) * SLOT)
            low, high = start - slot * SLOT, stop - slot * SLOT
            assert disk[start:stop] in {each[low:high] for each in allowed}, (
                f"{disk[start:start + 20]!r} at {start:#x} is not version {committed} of slot"
                f" {slot} or later"
            )
            start = stop


async def cuts_until_caught(place: str, path: str, mode: CacheMode, limit: int) -> int | None:
    """How many cuts it takes until one shows a bug; None: it was not caught in so many."""
    number, wrong = await run_program(place, path, mode, seed=1, check_limit=limit)
    return number if wrong is not None else None
