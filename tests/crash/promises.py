"""What must be true of whatever a crash leaves.

* No cluster has fewer references counted than it has: leaks are all that may be wrong. Asked of our
  own reader (qcow2_model.audit), and of `qemu-img check`.
* Each piece of the disk is what was promised to be durable, or what a request wrote that began
  later, or together with the one that promised; and never a third thing. A piece is the part of a
  sector that the same requests cover: sectors may be torn from each other, but not in themselves.
* Of a raw data file the same holds without the image.
* The image can be opened and written to again, here and in QEMU, and is then as sound.

What unsafe promises is less: all this if the process dies, but nothing if the power goes.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import TYPE_CHECKING, NamedTuple

import peers
from crash.plans import Plan
from crash.record import History, record
from crash.scratch import scratch
from qcow2_model import Request, assert_sound, guest_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crash.plans import Image
    from crash.record import Begun, Written

__all__ = ["Judge", "assert_qemu_agrees", "works_again"]


class Piece(NamedTuple):
    """A part of a sector and all that it may read as."""

    start: int
    stop: int
    allowed: frozenset[bytes]


class Judge:
    """Holds what crashes left against what a history promised."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._pieces: dict[tuple[int, int, int], list[Piece]] = {}

    def assert_harmless(self, moment: int, images: Sequence[bytes]) -> None:
        """Raises AssertionError if a crash at this moment may not leave these files."""
        image = self._history.image
        assert_sound(images[0], leaks_allowed=True)
        beside = images[1] if image.data_file else None
        self.assert_kept(moment, guest_bytes(images[0], image.old, beside))
        if self._history.is_raw:
            self.assert_kept(moment, images[1].ljust(image.size, b"\0")[: image.size])

    def assert_kept(self, moment: int, disk: bytes) -> None:
        """Raises AssertionError if the disk may not read so after a crash at this moment."""
        assert len(disk) == self._history.image.size
        for start, stop, allowed in self._allowed(moment):
            if disk[start:stop] not in allowed:
                raise AssertionError(
                    f"a crash at moment {moment}: bytes {start:#x} to {stop:#x} are neither what"
                    f" was durable nor what was written later: {disk[start:stop][:16].hex()}..."
                )

    def _allowed(self, moment: int) -> list[Piece]:
        history = self._history
        flushed = [promise for promise in history.flushed if promise.moment <= moment]
        written = [promise for promise in history.written if promise.moment <= moment]
        begun = [request for request in history.begun if request.moment < moment]
        key = len(flushed), len(written), len(begun)
        if key not in self._pieces:
            best = max(flushed, key=lambda promise: promise.batch)
            effects = [request.effect for request in begun if request.batch >= best.batch]
            edges = {0, len(best.content), *range(0, len(best.content), 512)}
            for offset, data in effects + [promise.effect for promise in written]:
                edges |= {offset, offset + len(data)}
            cuts = sorted(edges)
            allowed = [{best.content[start:stop]} for start, stop in pairs(cuts)]
            place = {start: number for number, start in enumerate(cuts)}
            for offset, data in effects:
                for number in range(place[offset], place[offset + len(data)]):
                    start, stop = cuts[number] - offset, cuts[number + 1] - offset
                    allowed[number].add(data[start:stop])
            for promise in written:
                if promise.batch >= best.batch:
                    _narrow(promise, begun, cuts, place, allowed)
            self._pieces[key] = [
                Piece(start, stop, frozenset(values))
                for (start, stop), values in zip(pairs(cuts), allowed, strict=True)
            ]
        return self._pieces[key]


def _narrow(
    promise: Written,
    begun: list[Begun],
    cuts: list[int],
    place: dict[int, int],
    allowed: list[set[bytes]],
) -> None:
    """A durable write was acknowledged: what was there before it may not be there any more.

    `allowed`: what the pieces between `cuts` may read as; `place`: the number of each cut.
    """
    offset, data = promise.effect
    others = [request.effect for request in begun if request.batch >= promise.batch]
    for number in range(place[offset], place[offset + len(data)]):
        start, stop = cuts[number], cuts[number + 1]
        allowed[number] &= {data[start - offset : stop - offset]} | {
            other.data[start - other.offset : stop - other.offset]
            for other in others
            if other.offset <= start and stop <= other.offset + len(other.data)
        }


def pairs(numbers: list[int]) -> list[tuple[int, int]]:
    """Each with the next."""
    return list(itertools.pairwise(numbers))


# --- the image's second life ----------------------------------------------------------------------


def works_again(image: Image, files: Sequence[bytes], tag: int = 0) -> History:
    """What the crash left can be opened and written to, and then nothing is wrong but the old
    leaks. The history of that, so that it may end in a crash, too."""
    size = image.cluster_size
    writes = [
        Request("write", at, min(size + 188, image.size - at), at + tag)
        for at in range(0, image.size, max(4 * size, image.size // 20 // size * size))
    ]
    plan = Plan("works again", image, (tuple(writes), (Request("flush"),)))
    return record(plan, files, leaks=True)


def assert_qemu_agrees(image: Image, files: Sequence[bytes], *, write: bool) -> None:
    """qemu-img check finds nothing but leaks, QEMU reads what our own reader does, and, with
    `write`, can write to it, and it is sound then."""
    with scratch() as folder:
        options = _options(folder, image, files)
        assert_qemu_says_sound(options)
        if not write:
            return
        disk = guest_bytes(files[0], image.old, files[1] if image.data_file else None)
        raw = pathlib.Path(folder, "raw")
        raw.write_bytes(disk)
        same = f"driver=raw,file.filename={raw}"
        done = peers.run("qemu-img", "compare", "--image-opts", options, same, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        length = min(image.size, 3 * image.cluster_size) // 512 * 512
        if length and not image.leaks:
            commands = ["-c", f"write -P 66 0 {length}", "-c", f"read -P 66 0 {length}"]
            done = peers.run("qemu-io", "--image-opts", *commands, options, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "failed" not in done.stdout, done.stdout
            assert_qemu_says_sound(options)


def assert_qemu_says_sound(options: str) -> None:
    done = peers.run("qemu-img", "check", "--image-opts", options, check=False)
    assert done.returncode in (0, 3), f"qemu-img check: {done.stdout}{done.stderr}"


def _options(folder: str, image: Image, files: Sequence[bytes]) -> str:
    """--image-opts of a crash's files, which are written into a folder."""
    names = ["image", "data"]
    for name, content in zip(names, files, strict=False):
        pathlib.Path(folder, name).write_bytes(content)
    options = f"driver=qcow2,file.filename={folder}/image"
    if image.data_file:
        options += f",data-file.filename={folder}/data"
    if image.backing:
        pathlib.Path(folder, "old").write_bytes(image.old)
        options += f",backing.driver=raw,backing.file.filename={folder}/old"
    return options
