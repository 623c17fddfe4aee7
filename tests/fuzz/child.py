"""One process that fuzzes one target with atheris. `python -m fuzz` starts it.

    python -m fuzz.child TARGET FLAG... FOLDER...

Flags and folders are libFuzzer's. It ends the process itself, as libFuzzer does.
"""

from __future__ import annotations

import logging
import sys

import atheris

from fuzz.mutate import mutation
from fuzz.targets import TARGETS


def main(argv: list[str]) -> None:
    """Fuzz until the runs are done or an input fails."""
    name, *flags = argv
    target = TARGETS[name]
    # A server logs what clients do; nobody reads it here.
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=list(target.covers)):
        module, function = target.module, target.function
    # Looked up each time: Fuzz() puts another function there.
    mutate = mutation(module, lambda data, longest: atheris.Mutate(data, longest))
    hooks = {} if mutate is None else {"custom_mutator": mutate}
    atheris.Setup([sys.argv[0], *flags], function, **hooks)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
