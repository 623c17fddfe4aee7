"""The kept corpus: of many inputs those few that reach what no smaller one does.

    python -m fuzz.keep TARGET FOLDER    # with the inputs of FOLDER

What an input reaches is the set of steps from one line to the next in the modules that its target
covers, seen by tracing; libFuzzer's own measure, which counts how often too, would keep ten times
as many. The smallest inputs are asked first, and one that adds nothing is dropped.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import sys
from typing import TYPE_CHECKING

from fuzz.targets import CORPUS, TARGETS, Target

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction

    Arc = tuple[str, int, int]

__all__ = ["arcs", "smallest"]


def arcs(target: Target, data: bytes) -> set[Arc]:
    """The steps that an input takes."""
    found: set[Arc] = set()
    covers = target.covers

    def local(frame: FrameType, event: str, _arg: object) -> TraceFunction:
        if event == "line":
            code = frame.f_code
            found.add((code.co_filename, last.get(id(frame), 0), frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        return local

    def enter(frame: FrameType, _event: str, _arg: object) -> TraceFunction | None:
        if frame.f_globals.get("__name__", "").startswith(covers):
            last.pop(id(frame), None)
            return local
        return None

    last: dict[int, int] = {}
    before = sys.gettrace()
    sys.settrace(enter)
    try:
        target.function(data)
    finally:
        sys.settrace(before)
    return found


def smallest(target: Target, inputs: list[bytes]) -> list[bytes]:
    """Those that are kept."""
    seen: set[Arc] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        reached = arcs(target, data)
        if not reached <= seen:
            seen |= reached
            kept.append(data)
    return kept


def main(argv: list[str]) -> None:
    """Rewrite the corpus of a target."""
    name, folder = argv
    target = TARGETS[name]
    logging.disable(logging.CRITICAL)
    inputs = [file.read_bytes() for file in pathlib.Path(folder).iterdir()] + target.corpus
    kept = smallest(target, inputs)
    place = CORPUS / name
    place.mkdir(parents=True, exist_ok=True)
    for file in place.iterdir():
        file.unlink()
    for data in kept:
        (place / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{name}: {len(kept)} of {len(inputs)} inputs kept, {sum(map(len, kept)):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
