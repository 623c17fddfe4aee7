"""FUA passed down or emulated, flushes without a task, and the write cache turned on and off."""

import errno

import pytest
import trio
import trio.testing

from fakes import FakeLeaf, FakeNode
from nbdserve.block.run import WRITE, WRITE_FUA, Miss

SIZE = 1 << 20
FLUSH = ["flush_to_os", "flush_to_disk"]


class FuaLeaf(FakeLeaf):
    """Can do FUA; `submit_write` and `submit_flush` complete when the test says so."""

    fua = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.queue = []
        self.flushed = False
        self.by_callback = True

    async def write_fua(self, offset, data):
        await self._do("write_fua", offset, len(data))
        return True

    def submit_write(self, offset, data, done, *, fua=False):
        self._record("submit_write+fua" if fua else "submit_write", offset, len(data))
        self.queue.append(done)

    def flush_nowait(self):
        return self.flushed

    def submit_flush(self, done):
        if self.by_callback:
            self._record("submit_flush")
            self.queue.append(done)
        return self.by_callback

    def complete(self, error=None):
        self.queue.pop(0)(error)


# --- passed down -----------------------------------------------------------------------------


@pytest.mark.parametrize(("fua", "write_cache"), [(True, True), (False, False), (True, False)])
async def test_a_node_that_makes_a_write_durable_is_not_flushed(make, fua, write_cache):
    leaf = FuaLeaf(SIZE)
    await make(leaf, write_cache=write_cache).write(8, b"abc", fua=fua)
    assert leaf.calls == [("write_fua", 8, 3)]


async def test_a_write_without_fua_is_not_made_durable(make):
    leaf = FuaLeaf(SIZE)
    await make(leaf).write(8, b"abc")
    assert leaf.names() == ["write"]


async def test_a_node_that_could_not_is_flushed_after_the_write(make):
    class Unable(FakeNode):
        async def write_fua(self, offset, data):
            await self._do("write_fua", offset, len(data))
            return False

    node = Unable(SIZE)
    await make(node).write(8, b"abc", fua=True)
    assert node.names() == ["write_fua", *FLUSH]


async def test_the_default_of_a_node_is_a_write_and_no_promise(make):
    node = FakeNode(SIZE)
    await make(node).write(8, b"abc", fua=True)
    assert node.names() == ["write", *FLUSH]


async def test_a_durable_write_that_failed_is_not_flushed(make):
    leaf = FuaLeaf(SIZE)
    leaf.errors["write_fua"] = OSError(errno.EIO, "bad sector")
    with pytest.raises(OSError, match="bad sector"):
        await make(leaf).write(8, b"abc", fua=True)
    assert leaf.names() == ["write_fua"]


async def test_zeroes_that_were_detected_are_flushed(make):
    leaf = FuaLeaf(SIZE)
    await make(leaf, detect_zeroes="on").write(0, bytes(512), fua=True)
    assert leaf.names() == ["write_zeroes", *FLUSH]


# --- submitted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fua", "options", "name"),
    [
        (False, {}, "submit_write"),
        (True, {}, "submit_write+fua"),
        (False, {"write_cache": False}, "submit_write+fua"),
    ],
)
async def test_a_submitted_write_says_whether_it_is_durable(make, epochs, fua, options, name):
    leaf, done = FuaLeaf(SIZE), []
    assert make(leaf, **options).submit_write(8, b"abc", done.append, fua=fua) is True
    assert leaf.calls == [(name, 8, 3)]
    assert epochs.oldest() <= epochs.advance()  # its cluster is kept for it
    leaf.complete()
    assert done == [None]


@pytest.mark.parametrize("runs", [Miss.NEEDS_FLUSH, "two"])
async def test_what_takes_a_flush_or_two_writes_is_not_submitted(make, runs):
    root, asked = FakeNode(SIZE), []
    answer = [(FuaLeaf(), 0, 1), (FuaLeaf(), 0, 2)] if runs == "two" else runs
    root.resolve = lambda op, offset, length: asked.append(op) or answer
    assert make(root).submit_write(8, b"abc", print, fua=True) is False
    assert asked == [WRITE_FUA]
    assert make(root).submit_write(8, b"abc", print) is False
    assert asked == [WRITE_FUA, WRITE]


async def test_a_leaf_that_cannot_is_not_asked_to(make):
    leaf = FakeLeaf(SIZE)
    assert make(leaf).submit_write(8, b"abc", print, fua=True) is False
    assert leaf.calls == []


async def test_what_must_be_looked_into_is_not_submitted(make):
    leaf = FuaLeaf(SIZE)
    assert make(leaf, detect_zeroes="on").submit_write(8, b"abc", print, fua=True) is False
    assert leaf.calls == []


# --- flushes without a task ------------------------------------------------------------------


async def test_a_flush_with_nothing_to_do_is_done_at_once(make):
    leaf = FuaLeaf(SIZE)
    backend = make(leaf)
    assert backend.flush_nowait() is False
    leaf.flushed = True
    assert backend.flush_nowait() is True
    assert leaf.calls == []


async def test_a_flush_is_submitted_if_the_tree_can(make):
    leaf, done = FuaLeaf(SIZE), []
    backend = make(leaf)
    assert backend.submit_flush(done.append) is True
    assert done == []
    leaf.complete()
    assert done == [None]
    leaf.by_callback = False
    assert backend.submit_flush(done.append) is False


# --- the write cache turned on and off ---------------------------------------------------------


async def test_turned_off_all_that_was_acknowledged_is_flushed_first(make):
    leaf = FuaLeaf(SIZE)
    leaf.gates["flush_to_disk"] = gate = trio.Event()
    backend = make(leaf)
    assert backend.write_nowait(0, b"x") is None
    returned = []
    async with trio.open_nursery() as nursery:

        async def turn_off():
            await backend.set_write_cache(False)
            returned.append(True)

        nursery.start_soon(turn_off)
        await trio.testing.wait_all_tasks_blocked()
        assert leaf.names() == ["write_nowait", *FLUSH]
        assert returned == []
        # A write that comes meanwhile is durable by itself.
        assert backend.write_nowait(0, b"x") is Miss.WOULD_BLOCK
        assert backend.submit_write(0, b"x", print) is True
        assert leaf.names()[3:] == ["submit_write+fua"]
        gate.set()
    assert returned == [True]
    assert backend.write_cache is False


async def test_turned_on_writes_are_quick_again(make):
    leaf = FuaLeaf(SIZE)
    backend = make(leaf, write_cache=False)
    await backend.set_write_cache(True)
    assert backend.write_nowait(0, b"x") is None
    await backend.write(0, b"x")
    assert leaf.names() == ["write_nowait", "write"]
    assert backend.write_cache is True


@pytest.mark.parametrize("name", ["write", "write_zeroes"])
async def test_turned_off_what_is_in_flight_is_flushed_before_it_is_answered(make, name):
    leaf = FuaLeaf(SIZE)
    leaf.gates[name] = gate = trio.Event()
    backend = make(leaf)
    call = {
        "write": lambda: backend.write(0, b"x"),
        "write_zeroes": lambda: backend.write_zeroes(0, 512, may_unmap=True),
    }[name]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        await backend.set_write_cache(False)
        assert leaf.names() == [name, *FLUSH]
        gate.set()
    assert leaf.names() == [name, *FLUSH, *FLUSH]


@pytest.mark.parametrize("ending", ["flushed", "flush fails", "a bug", "write fails"])
async def test_so_is_what_was_submitted(make, ending):
    leaf, done = FuaLeaf(SIZE), []
    backend = make(leaf)
    assert backend.submit_write(0, b"x", done.append) is True
    await backend.set_write_cache(False)
    failure = OSError(errno.EIO, "bad sector")
    if ending == "write fails":
        leaf.complete(failure)
        assert done == [failure]
        return
    if ending == "flush fails":
        leaf.errors["flush_to_disk"] = failure
    if ending == "a bug":
        leaf.errors["flush_to_disk"] = RuntimeError("a bug")
    leaf.complete()
    assert done == []
    await trio.testing.wait_all_tasks_blocked()
    if ending == "a bug":
        assert "internal error: RuntimeError" in str(done[0])
    else:
        assert done == [failure if ending == "flush fails" else None]
    assert leaf.names() == ["submit_write", *FLUSH, *FLUSH]


async def test_a_flush_that_fails_when_it_is_turned_off_is_told_and_it_stays_off(make):
    leaf = FuaLeaf(SIZE)
    leaf.errors["flush_to_disk"] = OSError(errno.EIO, "gone")
    backend = make(leaf)
    with pytest.raises(OSError, match="gone"):
        await backend.set_write_cache(False)
    assert backend.write_nowait(0, b"x") is Miss.WOULD_BLOCK


async def test_who_turns_it_off_again_waits_for_the_flush_too(make):
    leaf = FuaLeaf(SIZE)
    backend = make(leaf, write_cache=False)
    await backend.set_write_cache(False)
    assert leaf.names() == FLUSH
