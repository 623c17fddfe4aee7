"""Which queries list and select which contexts; answers as given by qemu-nbd 7.2 -A -B."""

from __future__ import annotations

import pytest

from nbdserve.nbd.metacontext import BASE_ALLOCATION, MetaContext, listing, select

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP_0 = "qemu:dirty-bitmap:bm0"
BITMAP_1 = "qemu:dirty-bitmap:bm1"
ALL = [BASE, DEPTH, BITMAP_0, BITMAP_1]

CONTEXTS = (
    BASE_ALLOCATION,
    MetaContext(DEPTH, ("qemu:",)),
    MetaContext(BITMAP_0, ("qemu:", "qemu:dirty-bitmap:")),
    MetaContext(BITMAP_1, ("qemu:", "qemu:dirty-bitmap:")),
)


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], ALL, []),
        (["base:"], [BASE], []),
        ([BASE], [BASE], [0]),
        (["qemu:"], [DEPTH, BITMAP_0, BITMAP_1], []),
        (["qemu:dirty-bitmap:"], [BITMAP_0, BITMAP_1], []),
        ([BITMAP_1, BASE], [BASE, BITMAP_1], [0, 3]),
        ([BASE, BASE, "base:"], [BASE], [0]),
        (["qemu:", DEPTH], [DEPTH, BITMAP_0, BITMAP_1], [1]),
        (["qemu:dirty-bitmap:bm"], [], []),
        (["base:allocation:x"], [], []),
        (["BASE:ALLOCATION"], [], []),
        (["base:nonsense"], [], []),
        (["x-unknown:", "x-unknown:thing"], [], []),
        (["base", "", ":"], [], []),
    ],
)
def test_queries(queries, listed, selected):
    encoded = [query.encode() for query in queries]
    assert listing(CONTEXTS, encoded) == listed
    assert select(CONTEXTS, encoded) == [(i, ALL[i]) for i in selected]


def test_queries_are_bytes():
    assert select(CONTEXTS, [b"base:\xff", b"\xffbase:allocation"]) == []
    assert listing(CONTEXTS, [b"\xff"]) == []
    name = MetaContext("qemu:dirty-bitmap:жук", ("qemu:",))
    assert select([name], ["qemu:dirty-bitmap:жук".encode()]) == [(0, "qemu:dirty-bitmap:жук")]
