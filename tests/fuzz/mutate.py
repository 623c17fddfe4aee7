"""Mutations that know where messages begin, so that what is mutated still gets past the first one.

libFuzzer's own mutations (`primitive`) are told nothing of the protocol: they make most of a
stream unreadable behind the place that they touch. Here a stream is taken apart into its messages;
these are dropped, repeated, exchanged, taken from the seeds, or given to the primitive one by one
with their length made right afterwards, mostly.

A module that has a mutation of its own (image.py) has a function `mutate` like the one made here.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    Primitive = Callable[[bytes, int], bytes]
    Mutation = Callable[[bytes, int, int], bytes]

__all__ = ["mutation"]

UNTOUCHED = 0.3
"""How often the whole input is given to the primitive."""


def mutation(module: ModuleType, primitive: Primitive) -> Mutation | None:
    """A libFuzzer mutator for a target's module: (input, most bytes, seed) to another input.

    None: the primitive alone does well, the input has no parts.
    """
    if hasattr(module, "mutate"):
        own = module.mutate
        return lambda data, longest, seed: own(data, longest, random.Random(seed), primitive)
    if not hasattr(module, "split"):
        return None
    messages = [message for data in module.seeds() for message in module.split(data)[1:]]

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < UNTOUCHED:
            return primitive(data, longest)
        head, *parts = module.split(data)
        at = chance.randrange(len(parts) + 1)
        action = chance.choice(ACTIONS) if len(parts) < MANY else "drop"
        if action == "insert" or at == len(parts):
            parts.insert(at, chance.choice(messages))
        elif action == "drop":
            del parts[at : at + chance.randrange(1, len(parts) + 1)]
        elif action == "repeat":
            parts.insert(at, parts[at])
        elif action == "exchange":
            parts[at], parts[0] = parts[0], parts[at]
        elif action == "head":
            head = primitive(head, len(head) + 1)
        else:
            parts[at] = primitive(parts[at], len(parts[at]) + 64)
            if chance.random() < 0.7:
                parts[at] = module.fix_length(parts[at])
        return b"".join([head, *parts])[:longest]

    return mutate


MANY = 16
"""Messages; of more some are dropped first, for the sake of speed."""

ACTIONS = ("insert", "drop", "repeat", "exchange", "head", "change", "change", "change", "change")
