"""The buffer pool: alignment, sizes, reuse, its bound."""

import mmap

import pytest

from nbdserve.block.buffers import KEPT_BYTES, BufferPool
from nbdserve.engines.memory import address_of


@pytest.mark.parametrize("length", [1, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1])
def test_buffers_are_large_enough_and_aligned_and_used_again(length):
    pool = BufferPool()
    buffer = pool.take(length)
    assert len(buffer) >= length
    assert address_of(buffer) % mmap.PAGESIZE == 0
    buffer[:1] = b"x"
    pool.give(buffer)
    assert pool.take(length) is buffer


def test_buffers_in_use_do_not_overlap():
    pool = BufferPool()
    buffers = [pool.take(4096) for _ in range(600)]
    assert len({address_of(buffer) for buffer in buffers}) == 600


def test_what_is_kept_is_bounded():
    pool = BufferPool()
    for buffer in [pool.take(16 << 20) for _ in range(8)]:
        pool.give(buffer)
    assert pool.statistics() <= KEPT_BYTES + (16 << 20)
