"""The matrix: what races what, where, on which images.

Three tables, all multiplied out. `PAIRS`: two requests over one guest cluster or its neighbours
(`PLACES`), overlapping or only sharing it, and beside them one who frees clusters and wants new
ones at once (`CHURN`), so that what was freed too early is handed out. `CROWDS`: more of one kind
than two. `VARIANTS`: how the file answers, how small the caches are, whether the settle task runs.

`chosen` deals cases out by a seed. All of them, with each place and each variant, are some three
million; a long run goes from seed to seed.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

from races.images import C
from races.world import QUICK, SUBMIT, TASK, Case, Op

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CROWDS", "PAIRS", "chosen"]

# A guest cluster, what it is (see images.py).
PLACES = {
    "data, or compressed": 2,
    "the last before zeroes that have room": 7,
    "zero, with room": 8,
    "the last such, before one without": 9,
    "zero, without": 10,
    "the last before what is not allocated": 11,
    "not allocated": 20,
    "the last of a table": 63,
    "the last but one of a table that is not there": 190,
}

# Requests over a cluster at `at` and its neighbours.
REQUESTS = {
    "head": lambda at: Op("write", at, C // 2),
    "tail": lambda at: Op("write", at + C // 2, C // 2),
    "over the edge": lambda at: Op("write", at + C - 100, 200),
    "two": lambda at: Op("write", at, 2 * C),
    "quick": lambda at: Op("write", at + 10, C // 4, way=QUICK),
    "quick two": lambda at: Op("write", at, 2 * C, way=QUICK),
    "submitted": lambda at: Op("write", at + C // 4, C // 4, way=SUBMIT),
    "durable": lambda at: Op("write", at + C // 4, C // 2, way=SUBMIT, fua=True),
    "read": lambda at: Op("read", at - C, 3 * C),
    "quick read": lambda at: Op("read", at, C, way=QUICK),
    "submitted read": lambda at: Op("read", at, C, way=SUBMIT),
    "zero": lambda at: Op("zero", at, C),
    "zero, keep": lambda at: Op("zero", at, 2 * C, unmap=False),
    "zero in part": lambda at: Op("zero", at + 50, C - 150),
    "zero three in part": lambda at: Op("zero", at - C + 50, 3 * C - 100),
    "discard": lambda at: Op("discard", at, C),
    "discard in part": lambda at: Op("discard", at - C + 1, 3 * C - 2, fua=True),
    "status": lambda at: Op("status", at - C, 3 * C),
    "flush": lambda at: Op("flush"),
    "quick flush": lambda at: Op("flush", way=QUICK),
    "cache off": lambda at: Op("cache", 0, 0),
}

CHANGES = [
    "head", "tail", "over the edge", "two", "quick", "quick two", "submitted", "durable", "zero",
    "zero, keep", "zero in part", "zero three in part", "discard", "discard in part",
]  # fmt: skip

# Each with each, but two that change nothing.
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(REQUESTS, 2)
    if pair[0] in CHANGES or pair[1] in CHANGES
]

# Frees the cluster and others, has that made durable, and wants clusters.
CHURN = {
    "nobody else": lambda at: (),
    "discard and reuse": lambda at: (
        Op("discard", at - C, 3 * C), Op("flush"), Op("flush"), Op("write", 100 * C, 2 * C),
        Op("write", 140 * C, C, way=QUICK),
    ),
    "overwrite elsewhere and reuse": lambda at: (
        Op("zero", 60 * C, 4 * C), Op("flush"), Op("flush"), Op("write", 30 * C, 5 * C),
    ),
    "flush": lambda at: (Op("flush"), Op("read", at, C), Op("flush")),
}  # fmt: skip

CROWDS = {
    "one new table": [
        (Op("write", (130 + 5 * n) * C + 7, C, way=way),)
        for n, way in enumerate((TASK, QUICK, TASK, TASK))
    ],
    "several new tables": [
        (Op("write", 64 * C * n - C // 2, C), Op("read", 64 * C * n - C, 2 * C)) for n in (1, 2, 3)
    ],
    "many clusters, one block": [
        (Op("write", (20 + 6 * n) * C, 5 * C), Op("write", (80 + 4 * n) * C, 300)) for n in range(3)
    ],
    "one cluster": [
        *(
            (Op("write", 20 * C + n * 64, 64, way=way),)
            for n, way in enumerate((TASK, QUICK, TASK))
        ),
        (Op("read", 20 * C, C), Op("read", 20 * C, C)),
    ],
    "flushes": [
        (Op("write", 20 * C, C, fua=True),),
        (Op("flush"), Op("write", 21 * C, C), Op("flush")),
        (Op("flush", way=QUICK), Op("discard", 0, 4 * C, fua=True)),
        (Op("read", 20 * C, 2 * C),),
    ],
    "freed and wanted": [
        (Op("discard", 0, 5 * C), Op("flush"), Op("write", 0, 5 * C)),
        (Op("zero", 3 * C, 4 * C), Op("flush"), Op("write", 2 * C + 5, 3 * C)),
        (Op("read", 0, 7 * C, way=SUBMIT), Op("read", 0, 7 * C)),
    ],
    "the write cache": [
        (Op("cache", 0, 0), Op("cache", 0, 1)),
        (Op("write", 5 * C, 100, way=SUBMIT), Op("write", 20 * C, C, way=QUICK)),
        (Op("write", 6 * C, 100, way=QUICK), Op("zero", 4 * C, C)),
        (Op("write", 21 * C, C),),
    ],
    "back and forth over the tables": [
        (Op("write", 63 * C, 2 * C), Op("write", 10 * C, C), Op("write", 130 * C, C)),
        (Op("read", 62 * C, 4 * C), Op("write", 191 * C, 2 * C), Op("read", 0, 4 * C)),
        (Op("discard", 60 * C, 8 * C), Op("flush"), Op("write", 1 * C, C + 9)),
    ],
    "a lock on more than is changed": [
        (Op("write", 11 * C, C + 100), Op("read", 11 * C, 2 * C)),
        (Op("write", 12 * C + 150, 100),),
        (Op("write", 12 * C + 300, 100), Op("discard", 10 * C, 3 * C)),
    ],
    "tables come and go": [
        (Op("write", 20 * C, C), Op("write", 70 * C + 5, C)),
        (Op("write", 71 * C, C), Op("write", 130 * C, C), Op("flush"), Op("read", 0, C)),
        (Op("read", 60 * C, 8 * C), Op("zero", 20 * C, 300), Op("read", 130 * C, C)),
    ],
    "freed here, wanted there": [
        (Op("discard", 0, 8 * C), Op("flush"), Op("write", 100 * C, 9 * C), Op("flush")),
        (Op("write", 120 * C, 9 * C), Op("write", 150 * C, 9 * C)),
        (Op("read", 0, 8 * C, way=SUBMIT), Op("read", 0, 8 * C)),
    ],
    "the whole disk": [
        (Op("discard", 0, 200 * C),),
        (Op("write", 1 * C, 3 * C), Op("write", 190 * C, C)),
        (Op("read", 0, 12 * C), Op("flush")),
    ],
    "compressed, read and overwritten": [
        (Op("read", 0, 4 * C), Op("read", 0, 4 * C)),
        (Op("write", 1 * C + 100, 100), Op("flush"), Op("write", 100 * C, C)),
        (Op("discard", 0, 1 * C), Op("write", 2 * C, C), Op("flush")),
    ],
}

VARIANTS = [
    {"settle": settle, "write_cache": write_cache, "refuses": refuses, **caches}
    for caches in ({"warm": True}, {"warm": True}, {"tables": 3}, {"tables": 1})
    for refuses in (False, True)
    for settle in (False, True)
    for write_cache in (True, True, False)
]


def chosen(image: str, seed: int, number: int | None = None) -> Iterator[tuple[str, Case]]:
    """All crowds and so many pairs on an image, or all of them; place and variant are dealt."""
    dice = random.Random(f"{image} {seed}")
    for name, actors in CROWDS.items():
        yield name, Case(image, tuple(actors), **dice.choice(VARIANTS))
    pairs = PAIRS if number is None else dice.sample(PAIRS, number)
    for one, other in pairs:
        place, churn = dice.choice(list(PLACES)), dice.choice(list(CHURN))
        at = PLACES[place] * C
        more = CHURN[churn](at)
        actors = (REQUESTS[one](at),), (REQUESTS[other](at),)
        name = f"{one} and {other}, {place}, {churn}"
        yield name, Case(image, (*actors, more) if more else actors, **dice.choice(VARIANTS))
