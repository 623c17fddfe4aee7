"""One trial: a program runs once while the files fail as planned, and all that comes out is held
against what may.

`Disk` knows of each byte which values it may have: a request that succeeded leaves one, one that
failed leaves the old or the new, on the bytes that it covered and no others.

What is asked of each trial:
* a request fails with the errno of the fault and none other, and only after one was injected; once
  nothing fails any more all succeed, but that flushes and FUA go on failing after a failed sync;
* what a read returns, then and later, may be;
* what was acknowledged as durable is in the file if everything not synced by then is taken away;
* with the power cut at any moment, and whenever it ends, the image leaks at most;
* the requests that failed, sent again when nothing fails any more, succeed; and then the image
  closes without a leak. Closed while its files go on failing, it works again when they do.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from faults.faulty import FULL, Faults, FaultyFile, Plan, Until
from faults.programs import Program, content_of, empty, with_compressed
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.formats.raw import RawNode
from nbdserve.powercut.outcomes import state_at
from qcow2_model import (
    Request,
    assert_sound,
    audit,
    differences,
    guest_bytes,
    open_memory,
    read_all,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from faults.filtered import FilterFaults
    from qcow2_model import Buffer

__all__ = ["WAYS", "BackendDrive", "Drive", "Failed", "Files", "Outcome", "by_backend", "run_trial"]

PATIENCE = 60  # seconds for a trial of milliseconds: what takes longer hangs
CUTS = 3


class Failed(Exception):
    """A request was answered with an error: its number, as the drive's client sees it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Drive(Protocol):
    """Does requests in one way."""

    async def perform(self, request: Request) -> bytes | None:
        """What a read returns. Raises Failed."""

    def seen(self, number: int) -> int:
        """What the client sees of an errno."""


@asynccontextmanager
async def by_backend(backend: BlockBackend, way: str) -> AsyncIterator[Drive]:
    """A drive that needs nothing around it."""
    yield BackendDrive(backend, way)


class BackendDrive:
    """As a front end does requests. `way`: inline: what can be done at once is; submit: what a leaf
    can do alone is queued with it; task: neither."""

    def __init__(self, backend: BlockBackend, way: str) -> None:
        self._backend = backend
        self._way = way

    def seen(self, number: int) -> int:
        return number

    async def perform(self, request: Request) -> bytes | None:
        try:
            return await self._perform(request)
        except OSError as error:
            raise Failed(error.errno or 0) from error

    async def _perform(self, request: Request) -> bytes | None:
        backend, way = self._backend, self._way
        offset, length, flag = request.offset, request.length, request.flag
        match request.kind:
            case "write":
                data = request.data
                if way == "submit" and await submit(
                    backend.submit_write, offset, data, fua=flag
                ):
                    return None
                if way == "task" or flag or backend.write_nowait(offset, data) is not None:
                    await backend.write(offset, data, fua=flag)
            case "read":
                buffer = bytearray(length)
                view = memoryview(buffer)
                if way == "submit" and await submit(backend.submit_read, offset, view):
                    return bytes(buffer)
                if way == "task" or backend.read_nowait(offset, view) is not None:
                    await backend.read(offset, view)
                return bytes(buffer)
            case "zero":
                await backend.write_zeroes(offset, length, may_unmap=flag)
            case "discard":
                await backend.discard(offset, length)
            case "status":
                await backend.block_status(offset, length)
            case "flush":
                await self._flush()
        return None

    async def _flush(self) -> None:
        backend = self._backend
        if self._way != "task":
            if backend.flush_nowait():
                return
            if await submit(lambda _offset, _data, done: backend.submit_flush(done), 0, b""):
                return
        await backend.flush()


WAYS = ("inline", "submit", "task")


# --- what the disk may hold ----------------------------------------------------------------------


class Disk:
    """The virtual disk: `content` with what succeeded, and what failed as alternatives to it."""

    def __init__(self, content: bytes, *, discards: bool) -> None:
        self.content = bytearray(content)
        self.alternatives: list[tuple[int, bytes]] = []
        self._discards = discards

    def copy(self) -> Disk:
        """As it is now."""
        twin = Disk(bytes(self.content), discards=self._discards)
        twin.alternatives = list(self.alternatives)
        return twin

    def effects(self, request: Request) -> list[tuple[int, bytes]]:
        """What a request puts where."""
        match request.kind:
            case "write":
                return [(request.offset, request.data)]
            case "zero":
                return [(request.offset, bytes(request.length))]
            case "discard" if self._discards:
                start = -(-request.offset // 512) * 512
                end = (request.offset + request.length) // 512 * 512
                return [(start, bytes(max(0, end - start)))]
        return []

    def succeeded(self, request: Request) -> None:
        """It is done."""
        for offset, data in self.effects(request):
            end = offset + len(data)
            self.content[offset:end] = data
            self.alternatives = [
                piece
                for start, old in self.alternatives
                for piece in (
                    (start, old[: max(0, offset - start)]),
                    (max(start, end), old[max(0, end - start) :]),
                )
                if piece[1]
            ]

    def failed(self, request: Request) -> None:
        """Any part of it may be done."""
        self.alternatives += self.effects(request)

    def check(self, offset: int, data: Buffer, what: str) -> None:
        """Raises AssertionError if a byte is neither old nor new."""
        for position in differences(self.content[offset : offset + len(data)], data):
            at = offset + position
            allowed = {self.content[at]} | {
                new[at - start]
                for start, new in self.alternatives
                if start <= at < start + len(new)
            }
            assert data[position] in allowed, (
                f"{what}: byte {at:#x} is {data[position]:#x}, not one of {sorted(allowed)}"
            )


# --- the image and its files ---------------------------------------------------------------------


class Files(NamedTuple):
    """All files of an image, and what their faults are."""

    faults: Faults | FilterFaults
    image: FaultyFile
    backing: FaultyFile | None
    data_file: FaultyFile | None

    @classmethod
    def of(
        cls, program: Program, start: Start, faults: Faults | FilterFaults | None = None
    ) -> Files:
        """Files as they are before the program."""
        faults = faults or Faults()
        image = FaultyFile(start.image, faults.of_files)
        return cls(
            faults,
            image,
            FaultyFile(program.old, faults.of_files) if program.backing else None,
            FaultyFile(start.data_file, faults.of_files, beside=image)
            if program.has_data_file
            else None,
        )

    def again(self, program: Program) -> Files:
        """The same files as they are now, and nothing fails."""
        data = b"" if self.data_file is None else bytes(self.data_file.content)
        return Files.of(program, Start(bytes(self.image.content), data, b""))


class Start(NamedTuple):
    """What the files hold at first, and what the disk reads as."""

    image: bytes
    data_file: bytes
    disk: bytes


_starts: dict[Program, Start] = {}


async def start_of(program: Program) -> Start:
    """The files with what was done `before`; the same for every trial of a program."""
    if program not in _starts:
        _starts[program] = await _prepare(program)
    return _starts[program]


async def _prepare(program: Program) -> Start:
    files = Files.of(program, Start(empty(program), bytes(program.size), b""))
    before = program.before
    if program.compressed:
        before = (Request("write", 0, 12 * 512, 1), *before)
    disk = Disk(program.old[: program.size].ljust(program.size, b"\0"), discards=True)
    async with opened(program, files) as backend:
        drive = BackendDrive(backend, "task")
        for request in before:
            await drive.perform(request)
            disk.succeeded(request)
    image = bytes(files.image.content)
    data = b"" if files.data_file is None else bytes(files.data_file.content)
    if program.compressed:
        image = with_compressed(image, 12)
        disk.content[: 12 * 512] = b"".join(map(content_of, range(12)))
    if not program.raw:
        assert_sound(image)
        assert read_image(program, image, data) == disk.content
    return Start(image, data, bytes(disk.content))


def read_image(program: Program, image: Buffer, data_file: Buffer) -> bytes:
    """The disk of an image, from bytes alone."""
    return guest_bytes(image, program.old, data_file if program.has_data_file else None)


@asynccontextmanager
async def opened(program: Program, files: Files) -> AsyncIterator[BlockBackend]:
    """The drive of a program's files, for the body; then closed."""
    over = files.faults.over
    backing = None if files.backing is None else RawNode(over(files.backing))
    if not program.raw:
        async with open_memory(
            over(files.image),
            backing=backing,
            data_file=None if files.data_file is None else over(files.data_file),
            cache_sizes=program.caches,
        ) as (backend, _node):
            yield backend
        return
    root = RawNode(over(files.image))
    async with trio.open_nursery() as nursery:
        yield BlockBackend(root, Epochs(), nursery, write_cache=True)
        nursery.cancel_scope.cancel()
    await root.flush()


# --- the trial -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """kinds: of all operations; injected: how many failed; errors: what the client saw."""

    kinds: list[str]
    injected: int
    errors: list[int]


async def run_trial(
    program: Program,
    plan: Plan | None,
    drive_of: Callable[[BlockBackend], AbstractAsyncContextManager[Drive]],
    faults_of: Callable[[Plan | None], Faults | FilterFaults] = Faults,
) -> Outcome:
    """Run a program with a fault. Raises AssertionError."""
    start = await start_of(program)
    trial = _Trial(program, start, plan, faults_of(plan))
    with trio.fail_after(PATIENCE):
        await trial.run(drive_of)
        trial.check_files()
        if plan is not None and plan.until is Until.NEVER:
            await trial.check_again()
    return Outcome(trial.faults.kinds, trial.faults.injected, trial.errors)


class _Trial:
    def __init__(
        self,
        program: Program,
        start: Start,
        plan: Plan | None,
        faults: Faults | FilterFaults,
    ) -> None:
        self.errors: list[int] = []
        self._program = program
        self._files = Files.of(program, start, faults)
        self.faults = faults
        self._plan = plan
        self._ends = plan is None or plan.until is not Until.NEVER
        self._disk = Disk(start.disk, discards=program.version == 3 or not program.backing)
        self._again: list[Request] = []
        self._durable: list[tuple[int, Disk]] = []  # (moment of the log, what is surely there)
        self._closed_well = False

    async def run(
        self, drive_of: Callable[[BlockBackend], AbstractAsyncContextManager[Drive]]
    ) -> None:
        """Open, run the program, close."""
        faults = self.faults
        faults.paused = True
        try:
            async with opened(self._program, self._files) as backend, drive_of(backend) as drive:
                await self._run(backend, drive)
        except OSError as error:
            if not faults.injected or self._plan is None:
                raise AssertionError("closing failed, and nothing below") from error
            if error.errno != self._plan.fault.errno:
                raise AssertionError(f"closing failed with {error.errno}") from error
        else:
            self._closed_well = True

    async def _run(self, backend: BlockBackend, drive: Drive) -> None:
        faults = self.faults
        faults.paused = False
        for request in self._program.requests:
            await self._perform(drive, request)
        if not self._ends:
            return
        faults.lift()
        await self._check_disk(backend, "in the end")
        again, self._again = self._again, []
        for request in [*again, Request("flush")]:
            await self._perform(drive, request)
        await self._check_disk(backend, "after the retry")

    async def _check_disk(self, backend: BlockBackend, when: str) -> None:
        self.faults.paused = True
        self._disk.check(0, await read_all(backend), when)
        self.faults.paused = False

    async def _perform(self, drive: Drive, request: Request) -> None:
        faults, disk = self.faults, self._disk
        before = faults.injected
        log = self._files.image.writes
        try:
            data = await drive.perform(request)
        except Failed as failed:
            self.errors.append(failed.number)
            self._check_error(drive, request, failed.number, new=faults.injected > before)
            disk.failed(request)
            if request.kind != "flush":
                self._again.append(request)
            return
        if data is not None:
            disk.check(request.offset, data, "a read")
        disk.succeeded(request)
        if request.kind == "flush":
            self._durable.append((len(log), disk.copy()))

    def _check_error(self, drive: Drive, request: Request, number: int, *, new: bool) -> None:
        assert self._plan is not None, f"{request} failed with {number} and no fault"
        fault = self._plan.fault
        assert number == drive.seen(fault.errno), f"{request}: {number} instead of {fault}"
        if not new:
            assert self.faults.failed_sync, f"{request} failed, and nothing below it did"
            assert request.kind == "flush" or request.flag or self._program.caches
        if fault is FULL:
            assert request.kind != "flush", "what was in the file already could not be flushed"

    # --- the files afterwards -------------------------------------------------------------------

    def check_files(self) -> None:
        """What is in them when it has ended, and what would be had the power been cut."""
        image = self._files.image
        if self._program.raw:
            self._disk.check(0, bytes(image.content[: self._program.size]), "the file")
            return
        found = audit(image.content)
        assert not found.wrong, "; ".join(found.wrong[:5])
        if self._closed_well and not self.faults.failed_sync:
            assert not found.leaks, f"closed in order, and {len(found.leaks)} clusters leak"
        if self._closed_well:
            self._disk.check(0, self._guest_bytes(), "the file")
        for length, disk in self._durable:
            survivor = self._cut(length, None)
            disk.check(0, read_image(self._program, *survivor), f"durable at {length}")
        chance = random.Random(len(image.writes))
        for _ in range(CUTS):
            content, _ = self._cut(chance.randint(0, len(image.writes)), chance)
            wrong = audit(content).wrong
            assert not wrong, f"with the power cut: {wrong[:5]}"

    def _guest_bytes(self) -> bytes:
        data_file = self._files.data_file
        data = b"" if data_file is None else bytes(data_file.content)
        return read_image(self._program, self._files.image.content, data)

    def _cut(self, moment: int, chance: random.Random | None) -> tuple[bytes, bytes]:
        """Image and data file if the power is cut at a moment of their log: without what was not
        synced, or with a random choice of sectors of it."""
        state = state_at(self._files.image.writes, moment)
        image, *others = state.nothing_kept() if chance is None else state.sample(chance)
        return bytes(image), bytes(others[0]) if others else b""

    async def check_again(self) -> None:
        """Opened anew, with files that are well again: what was not flushed is lost or not; the
        image works."""
        program = self._program
        files = self._files.again(program)
        async with opened(program, files) as backend:
            drive = BackendDrive(backend, "inline")
            disk = Disk(await read_all(backend), discards=self._disk._discards)
            for request in program.requests:
                data = await drive.perform(request)
                if data is not None:
                    disk.check(request.offset, data, "a read of the image opened anew")
                disk.succeeded(request)
        if not program.raw:
            assert_sound(files.image.content, leaks_allowed=True)
