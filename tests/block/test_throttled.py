"""A backend behind a throttle: what asks, what counts for how much, what never waits."""

import errno
import inspect

import pytest
import trio
import trio.testing

from fakes import FakeLeaf, FakeNode
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.node import MAX_INLINE
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.block.throttled import ThrottledBackend
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.throttle_group import ThrottleGroup

SIZE = 4 << 20
FLUSH = ["flush_to_os", "flush_to_disk"]


class Gate:
    """A throttle that says no while it is closed; `passed`: what it let go and has not back."""

    def __init__(self):
        self.passed = []
        self.open = trio.Event()
        self.draining = False

    def admit_nowait(self, op, nb_bytes):
        if self.open.is_set():
            self.passed.append((op, nb_bytes))
        return self.open.is_set()

    def take_back(self, op, nb_bytes):
        self.passed.remove((op, nb_bytes))

    async def admit(self, op, nb_bytes):
        await self.open.wait()
        self.passed.append((op, nb_bytes))

    def drain_begin(self):
        self.draining = True
        self.open.set()

    def statistics(self):
        return {"passed": len(self.passed)}


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def make(nursery, epochs, gate):
    def make(root, **options):
        return ThrottledBackend(root, epochs, nursery, gate, **{"write_cache": True, **options})

    return make


def buffer(length):
    return memoryview(bytearray(length))


WAYS = {
    "read": (lambda b, n: b.read(0, buffer(n)), READ, "read"),
    "write": (lambda b, n: b.write(0, bytes(n)), WRITE, "write"),
    "zeroes": (lambda b, n: b.write_zeroes(0, n, may_unmap=True), WRITE, "write_zeroes"),
    "discard": (lambda b, n: b.discard(0, n), WRITE, "discard"),
}


# --- the synchronous way ---------------------------------------------------------------------


async def test_what_is_let_go_goes_straight_to_the_leaf(make, gate):
    leaf = FakeLeaf(SIZE)
    backend = make(leaf)
    gate.open.set()
    assert backend.write_nowait(8, b"hello") is None
    data = buffer(5)
    assert backend.read_nowait(8, data) is None
    assert data == b"hello"
    assert gate.passed == [(WRITE, 5), (READ, 5)]
    assert backend.misses == {Miss.THROTTLED: 0}


async def test_what_is_not_let_go_is_a_miss_and_reaches_no_node(make, gate):
    leaf = FakeLeaf(SIZE)
    backend = make(leaf)
    assert backend.write_nowait(0, b"x") is Miss.THROTTLED
    assert backend.read_nowait(0, buffer(1)) is Miss.THROTTLED
    assert backend.submit_read(0, buffer(1), print) is False
    assert leaf.calls == []
    assert backend.statistics()["misses"] == {"THROTTLED": 3}


async def test_who_misses_for_another_reason_does_not_pay(make, gate):
    leaf = FakeLeaf(SIZE)
    leaf.blocks = True
    backend = make(leaf)
    gate.open.set()
    assert backend.read_nowait(0, buffer(1)) is Miss.WOULD_BLOCK
    assert backend.write_nowait(0, b"x") is Miss.WOULD_BLOCK
    assert backend.write_nowait(0, bytes(MAX_INLINE + 1)) is Miss.WOULD_BLOCK
    assert make(FakeNode(SIZE)).submit_read(0, buffer(1), print) is False
    assert gate.passed == []


async def test_a_read_is_paid_for_once_when_it_is_queued(make, gate):
    leaf = FakeLeaf(SIZE)
    leaf.blocks = True
    leaf.submit_read = lambda offset, buffer, done: done(None)
    gate.open.set()
    backend, completed = make(leaf), []
    assert backend.read_nowait(0, buffer(7)) is Miss.WOULD_BLOCK
    assert backend.submit_read(0, buffer(7), completed.append) is True
    assert completed == [None]
    assert gate.passed == [(READ, 7)]


AT_ONCE = {
    "read_nowait": (lambda b: b.read_nowait(0, buffer(7)), READ),
    "write_nowait": (lambda b: b.write_nowait(0, bytes(7)), WRITE),
    "submit_read": (lambda b: b.submit_read(0, buffer(7), print), READ),
    "submit_write": (lambda b: b.submit_write(0, bytes(7), print), WRITE),
}


@pytest.mark.parametrize("way", AT_ONCE)
async def test_who_fails_at_once_has_paid(make, gate, way):
    """The client is answered with the error, and nobody asks again."""
    call, op = AT_ONCE[way]
    leaf = FakeLeaf(SIZE)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    setattr(leaf, way, fail)
    gate.open.set()
    with pytest.raises(OSError, match="Input/output error"):
        call(make(leaf))
    assert gate.passed == [(op, 7)]


# --- the asynchronous way --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_waits_before_everything_else(make, gate, epochs, nursery, way):
    call, op, name = WAYS[way]
    leaf, waits = FakeLeaf(SIZE), []
    backend = make(leaf, write_cache=False)
    backend.on_wait = waits.append
    nursery.start_soon(call, backend, 512)
    await trio.testing.wait_all_tasks_blocked()
    assert leaf.calls == []
    tag = epochs.advance()
    assert epochs.oldest() > tag  # in no epoch
    assert waits == [1]
    gate.open.set()
    await trio.testing.wait_all_tasks_blocked()
    assert gate.passed == [(op, 512)]
    assert leaf.names() == [name, *(FLUSH if name in ("write", "write_zeroes") else [])]
    assert waits == [1, -1]


@pytest.mark.parametrize("way", WAYS)
async def test_who_fails_later_has_paid(make, gate, way):
    call, op, name = WAYS[way]
    leaf = FakeLeaf(SIZE)
    leaf.errors[name] = OSError(errno.EIO, "Input/output error")
    gate.open.set()
    with pytest.raises(OSError, match="Input/output error"):
        await call(make(leaf), 512)
    assert gate.passed == [(op, 512)]


@pytest.mark.parametrize("way", WAYS)
async def test_who_need_not_wait_does_not_say_so(make, gate, way):
    call, op, _ = WAYS[way]
    backend, waits = make(FakeLeaf(SIZE)), []
    backend.on_wait = waits.append
    gate.open.set()
    await call(backend, 512)
    assert gate.passed == [(op, 512)]
    assert waits == []


async def test_who_gives_up_waiting_says_so(make, autojump_clock):
    backend, waits = make(FakeLeaf(SIZE)), []
    backend.on_wait = waits.append
    with trio.move_on_after(1):
        await backend.write(0, b"x")
    assert waits == [1, -1]


async def test_a_flush_and_a_block_status_never_wait(make, gate):
    leaf = FakeLeaf(SIZE)
    backend = make(leaf)
    await backend.flush()
    await backend.block_status(0, SIZE)
    assert leaf.names()[:2] == FLUSH
    assert backend.map_nowait(0, 512) == [(False, 512)]
    assert gate.passed == []


async def test_flags_are_passed_on(make, gate):
    gate.open.set()
    leaf = FakeLeaf(SIZE)
    backend = make(leaf, discard=False)
    await backend.write_zeroes(1, 2, may_unmap=True, fast=True, fua=True)
    await backend.write(3, b"x", fua=True)
    await backend.discard(4, 5, fua=True)
    assert leaf.calls[0] == ("write_zeroes", 1, 2, False, False)
    assert leaf.names() == ["write_zeroes", *FLUSH, "write", *FLUSH, *FLUSH]


async def test_draining_reaches_the_throttle_and_every_node(make, gate):
    class Held(FakeNode):
        drained = 0

        def drain_begin(self):
            self.drained += 1

    file = Held(SIZE)
    root = Held(SIZE, file=file)
    make(root).drain_begin()
    assert gate.draining
    assert (root.drained, file.drained) == (1, 1)


async def test_statistics_have_the_throttles(make):
    assert make(FakeLeaf(SIZE)).statistics()["throttle"] == {"passed": 0}


async def test_a_backend_without_a_throttle_pays_nothing(nursery):
    """No method of its own, no attribute looked at: the hot path is the one without."""
    assert not BlockBackend.throttled
    for name in ("read_nowait", "write_nowait", "submit_read"):
        assert "throttl" not in inspect.getsource(getattr(BlockBackend, name))
    assert "throttle" not in BlockBackend(
        FakeLeaf(SIZE), Epochs(), nursery, write_cache=True
    ).statistics()


async def test_with_a_real_group_the_two_ways_share_one_account(nursery, autojump_clock):
    member = ThrottleGroup("g", ThrottleLimits(iops_total=RateLimit(10))).join()
    backend = ThrottledBackend(FakeLeaf(SIZE), Epochs(), nursery, member, write_cache=True)
    assert backend.read_nowait(0, buffer(1)) is None
    assert backend.write_nowait(0, b"x") is None
    assert backend.read_nowait(0, buffer(1)) is Miss.THROTTLED
    start = trio.current_time()
    await backend.read(0, buffer(1))
    await backend.write(0, b"x")
    assert trio.current_time() - start == pytest.approx(0.2)
