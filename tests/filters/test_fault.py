"""The fault node: each kind of fault as the node above meets it, and what it leaves below."""

import errno

import pytest

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.faults import OPS, Fault
from nbdserve.filters.fault import FaultNode

SIZE = 1 << 20

REQUESTS = {
    "read": lambda node: node.read(0, memoryview(bytearray(1024))),
    "write": lambda node: node.write(0, b"x" * 1024),
    "write-zeroes": lambda node: node.write_zeroes(0, 1024, may_unmap=True),
    "discard": lambda node: node.discard(0, BLOCK),
    "flush": lambda node: node.flush(),
    "block-status": lambda node: node.block_status(0, 1024),
}


def faulty(*faults, **options):
    leaf = MemoryLeaf(SIZE)
    return FaultNode(leaf, faults, **options), leaf


@pytest.mark.parametrize("op", OPS)
async def test_one_kind_of_request_fails_and_the_others_reach_the_child(op):
    node, leaf = faulty(Fault(ops=op, error="ENOSPC"))
    for kind, call in REQUESTS.items():
        before = len(leaf.calls)
        if kind == op:
            with pytest.raises(OSError, match="No space left") as caught:
                await call(node)
            assert caught.value.errno == errno.ENOSPC
            assert len(leaf.calls) == before
        else:
            await call(node)
            assert len(leaf.calls) == before + 1
    assert node.statistics()["rules"] == {"0": {"matched": 1, "injected": 1}}
