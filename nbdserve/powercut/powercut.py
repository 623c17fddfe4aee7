"""The power of a tree of nodes: it can be cut, once, and then says what the disk may hold.

All power-cut nodes of a tree have one `PowerCut`, and so one log: of the image, and of its data
file. Whoever tests a program has it `mark` what the program may rely on from now on ("order 7 is
committed"), and takes outcomes: `cut` of this moment, which stops the world, or `all_cuts`, which
does not. Each `Outcome` has the notes made until then. The program survives if what it finds on
every outcome agrees with the notes of that outcome.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.powercut.outcomes import States, all_cuts, cut
from nbdserve.powercut.writelog import MAX_DATA, WriteLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nbdserve.powercut.content import Content
    from nbdserve.powercut.outcomes import Images

__all__ = ["Outcome", "PowerCut", "PowerLost", "file_names", "outcome_of", "outcomes_of"]


class PowerLost(OSError):
    """The request came after the power was cut, or had not returned by then."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the power is cut")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a disk holds after a power cut. A moment and a seed give the same again.

    `marks`: the notes made until then. `contents`: of each file, by its name without folders.
    """

    moment: int
    seed: int
    marks: tuple[str, ...]
    contents: Mapping[str, Content]

    @property
    def content(self) -> Content:
        """That of the only file. Raises ValueError: there are several."""
        if len(self.contents) > 1:
            raise ValueError(f"there are several files: {', '.join(self.contents)}")
        return next(iter(self.contents.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the only file there; several, or one into a folder that exists, by their names in
        the folder, which is made. Raises OSError."""
        if len(self.contents) == 1 and not os.path.isdir(path):
            self.content.save(path)
            return
        os.makedirs(path, exist_ok=True)
        for name, content in self.contents.items():
            content.save(Path(path, name))


class PowerCut:
    """`log`: of all nodes. `is_cut`: the power is gone."""

    def __init__(self, log: WriteLog | None = None) -> None:
        self.log = WriteLog(max_data=MAX_DATA) if log is None else log
        self.is_cut = False
        self._given: dict[str, object] = {}
        self._states: States | None = None

    def agree(
        self, history: bool | None = None, max_data: int | None = None, log: str | None = None
    ) -> None:
        """What the options of one more node say of the log, before it has any records; None: that
        is for others to say. Raises ValueError: others said something else; OSError: of `log`."""
        for name, value in (("history", history), ("max-data", max_data), ("log", log)):
            if value is not None and self._given.setdefault(name, value) != value:
                raise ValueError(f"{name}: another power-cut node of this tree says otherwise")
        if log is not None and not self.log.is_streamed:
            self.log.stream_to(log)
        if history is not None:
            self.log.history = history
        if max_data is not None:
            self.log.max_data = max_data

    def mark(self, note: str) -> None:
        """A note of what has happened up to now, for outcomes from now on. Raises PowerLost, and
        OSError if the log is streamed and cannot be."""
        if self.is_cut:
            raise PowerLost
        self.log.mark(note.encode())

    def cut(self, seed: int = 0) -> Outcome:
        """Stop the world, now: every request that has not returned fails, and so do all to come.

        Returns what `seed` says is left; 0: all was lost that may be. May be called again, with
        another seed, for another outcome of the same moment.
        """
        self.is_cut = True
        self.log.close()
        return self.outcome(len(self.log), seed)

    def outcome(self, moment: int, seed: int) -> Outcome:
        """What is left if the power goes at a moment. Raises ValueError: there is no such one."""
        if self._states is None or self._states.now != len(self.log):
            self._states = States(self.log)
        return _outcome(self.log, moment, self._states.at(moment).outcome(seed), seed)

    def all_cuts(self, limit: int, seed: int = 0) -> Iterator[Outcome]:
        """Distinct outcomes, at most `limit`, evenly over the whole log; over the present moment
        without a history. They differ in what the files hold, or in the notes. The world goes on;
        what is done meanwhile is in none of them."""
        return outcomes_of(self.log, limit, seed)


def outcomes_of(log: WriteLog, limit: int, seed: int = 0) -> Iterator[Outcome]:
    """`PowerCut.all_cuts` of a log that was loaded."""
    for moment, images, number in all_cuts(log, limit, seed=seed):
        yield _outcome(log, moment, images, number)


def outcome_of(
    log: WriteLog, moment: int, seed: int = 0, *, replay: bool = False
) -> Outcome:
    """`PowerCut.outcome` of a log that was loaded. `replay`: not the power goes but the process,
    and all is there that had begun. Raises ValueError: there is no such moment."""
    images = tuple(log.replay(moment)) if replay else cut(log, moment, seed)
    return _outcome(log, moment, images, seed)


def _outcome(log: WriteLog, moment: int, images: Images, seed: int) -> Outcome:
    marks = tuple(note.decode(errors="replace") for note in log.marks(moment))
    return Outcome(moment, seed, marks, dict(zip(file_names(log), images, strict=True)))


def file_names(log: WriteLog) -> list[str]:
    """The names of the files of a log without their folders; numbered where that leaves two of one
    name or none."""
    names: list[str] = []
    for number, name in enumerate(log.names):
        short = os.path.basename(name) or "disk"
        names.append(f"{short}.{number}" if short in names else short)
    return names
