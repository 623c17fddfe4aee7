"""The fault node: each kind of fault as the node above meets it, and what it leaves below."""

import errno
import logging
from contextlib import suppress

import pytest
import trio
import trio.testing

from memory_leaf import BLOCK, MemoryLeaf
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.blockdev import parse_node
from nbdserve.config import ImageConfig
from nbdserve.errors import DisconnectError
from nbdserve.faults import OPS, Fault
from nbdserve.filters.fault import FaultNode
from nbdserve.graph import open_backend
from nbdserve.imageopts import parse_image_opts
from qcow2_model import assert_sound, guest_bytes, new_image

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


async def outcome(call):
    """The errno that a request fails with, 0 if it does not."""
    try:
        await call
    except OSError as error:
        return error.errno
    return 0


# --- errors --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "name", ["EIO", "ENOSPC", "EROFS", "EPERM", "ENOMEM", "EINVAL", "EOPNOTSUPP", "ESHUTDOWN"]
)
async def test_any_error_by_its_name(name):
    node, _ = faulty(Fault(error=name))
    assert await outcome(REQUESTS["read"](node)) == getattr(errno, name)


async def test_a_write_with_fua_is_one_write_and_nothing_else():
    node, leaf = faulty(Fault(ops="write", error="EIO", after=1, count=1),
                        Fault(ops="flush", error="ENOSPC"))  # fmt: skip
    assert await node.write_fua(0, b"a" * 512)
    assert [name for name, *_ in leaf.calls] == ["write", "flush"]
    assert await outcome(node.write_fua(0, b"b" * 512)) == errno.EIO
    assert await node.write_fua(0, b"c" * 512)
    assert await outcome(node.flush()) == errno.ENOSPC


async def test_a_child_that_can_do_fua_is_asked_for_it():
    node, leaf = faulty(Fault(ops="read", error="EIO"))
    asked = []

    async def write_fua(offset, data):
        asked.append((offset, len(data)))
        return True

    leaf.write_fua = write_fua
    assert await node.write_fua(8, b"a" * 512)
    assert (asked, leaf.calls) == ([(8, 512)], [])


async def test_a_gathered_write_is_one_request():
    node, leaf = faulty(Fault(ops="write", error="EIO", after=1))
    await node.writev(0, [b"a" * 100, b"b" * 200])
    assert leaf.calls == [("write", 0, 300)]
    assert leaf.data[:301] == b"a" * 100 + b"b" * 200 + b"\0"
    assert await outcome(node.writev(0, [b"a", b"b"])) == errno.EIO


# --- what is done in part, or not at all ---------------------------------------------------------


async def test_a_short_write_does_its_first_sectors_and_fails():
    node, leaf = faulty(Fault(ops="write", short=2, error="ENOSPC"))
    assert await outcome(node.write(1024, b"a" * 4096)) == errno.ENOSPC
    assert leaf.calls == [("write", 1024, 1024)]
    assert leaf.data == bytes(1024) + b"a" * 1024 + bytes(SIZE - 2048)


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("way", ["write", "fua", "writev"])
async def test_a_torn_write_does_some_sectors(silent, way):
    node, leaf = faulty(Fault(torn=True, silent=silent), seed=3)
    data = bytes(range(256)) * 16
    calls = {
        "write": lambda: node.write(512, data),
        "fua": lambda: node.write_fua(512, data),
        "writev": lambda: node.writev(512, [data[:1000], data[1000:]]),
    }
    assert await outcome(calls[way]()) == (0 if silent else errno.EIO)
    found = leaf.data[512 : 512 + len(data)]
    kept = [n for n in range(8) if found[n * 512 : n * 512 + 512] == data[:512]]
    assert 0 < len(kept) < 8
    assert sum(map(bool, found)) == len(kept) * 510  # of 512 bytes two are 0
    assert leaf.data[:512] == bytes(512)
    assert leaf.data[512 + len(data) :] == bytes(SIZE - 512 - len(data))


async def test_torn_zeroes():
    node, leaf = faulty(Fault(torn=True, silent=True), seed=3)
    leaf.fill(0, b"x" * SIZE)
    await node.write_zeroes(512, 4096, may_unmap=False, fallback=False)
    assert 0 < leaf.data.count(0) < 4096
    assert leaf.data.count(0) % 512 == 0
    assert {name for name, *_ in leaf.calls} == {"zeroes+fast"}


@pytest.mark.parametrize("op", ["write", "write-zeroes", "discard", "flush"])
async def test_what_is_lost_is_acknowledged_and_not_done(op):
    node, leaf = faulty(Fault(ops=op, lost=True))
    await REQUESTS[op](node)
    assert leaf.calls == []
    assert await node.write_fua(0, b"a" * 512)
    assert bool(leaf.calls) is (op != "write")


async def test_bits_are_flipped_for_who_reads_and_not_on_the_medium():
    node, leaf = faulty(Fault(flip_bits=5, offset=4096, length=512), seed=7)
    leaf.fill(0, b"x" * SIZE)

    async def read(offset, length):
        buffer = bytearray(length)
        await node.read(offset, memoryview(buffer))
        return bytes(buffer)

    bad = await read(0, 8192)
    changed = [n for n, byte in enumerate(bad) if byte != ord("x")]
    assert 0 < len(changed) <= 5
    assert all(4096 <= n < 4608 for n in changed)
    assert await read(4096, 512) == bad[4096:4608]
    assert await read(0, 4096) == b"x" * 4096
    assert leaf.data == b"x" * SIZE
    node.faults.clear()
    assert await read(0, 8192) == b"x" * 8192


# --- what takes its time -------------------------------------------------------------------------


async def test_delay_and_jitter(autojump_clock):
    node, _ = faulty(Fault(ops="write", delay=1, jitter=2), Fault(ops="write", delay=10), seed=5)
    start = trio.current_time()
    await node.read(0, memoryview(bytearray(512)))
    await node.flush()
    assert trio.current_time() == start
    waits = []
    for _ in range(2):
        start = trio.current_time()
        await REQUESTS["write"](node)
        waits.append(trio.current_time() - start)
    assert all(11 < seconds < 13 for seconds in waits)
    assert waits[0] != waits[1]
    twin, _ = faulty(Fault(ops="write", delay=1, jitter=2), Fault(ops="write", delay=10), seed=5)
    start = trio.current_time()
    await REQUESTS["write"](twin)
    assert trio.current_time() - start == pytest.approx(waits[0])


async def test_delayed_requests_wait_side_by_side_and_the_others_pass(autojump_clock):
    node, leaf = faulty(Fault(ops="write", delay=5))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(node.write, number * 512, b"a" * 512)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await REQUESTS["read"](node)
        assert trio.current_time() - start < 1
        assert [name for name, *_ in leaf.calls] == ["read"]
    assert trio.current_time() - start == pytest.approx(5)


async def test_a_bandwidth_is_shared_by_all_that_match(autojump_clock):
    node, _ = faulty(Fault(ops="read+write", bps=1000))
    start = trio.current_time()
    for _ in range(5):
        await node.write(0, b"a" * 1000)
        await node.read(0, memoryview(bytearray(1000)))
        await node.flush()
        await node.write_zeroes(0, 100_000, may_unmap=True)
    assert trio.current_time() - start == pytest.approx(8.9)  # a tenth of a second is for nothing


async def test_stuck_until_released_and_then_done(nursery):
    node, leaf = faulty(Fault(ops="write", stuck=True), Fault(ops="flush", stuck=True, error="EIO"))
    outcomes = []

    async def ask(kind):
        outcomes.append((kind, await outcome(REQUESTS[kind](node))))

    for kind in ("write", "write", "flush"):
        nursery.start_soon(ask, kind)
    await node.faults.wait_stuck(3)
    await ask("read")
    assert (node.faults.stuck, outcomes) == (3, [("read", 0)])
    assert node.faults.release() == 3
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(outcomes) == [("flush", errno.EIO), ("read", 0), ("write", 0), ("write", 0)]
    nursery.start_soon(ask, "write")
    await node.faults.wait_stuck()
    assert [name for name, *_ in leaf.calls] == ["read", "write", "write"]
    node.faults.clear()
    await trio.testing.wait_all_tasks_blocked()
    assert len(outcomes) == 5


async def test_stuck_while_there_is_a_file(tmp_path):
    broken = tmp_path / "broken"
    node, _ = faulty(Fault(stuck=True, if_file=str(broken)))
    await REQUESTS["write"](node)
    broken.touch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(REQUESTS["write"], node)
        await node.faults.wait_stuck()
        broken.unlink()
    assert node.faults.stuck == 0
    await REQUESTS["write"](node)


async def test_a_rule_that_is_removed_lets_go_what_it_held_up(autojump_clock):
    node, _ = faulty()
    rules = [node.faults.add(fault) for fault in (
        Fault(ops="read", stuck=True), Fault(ops="write", delay=1000), Fault(ops="discard", bps=1),
        Fault(ops="flush", stuck=True),
    )]  # fmt: skip
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for kind in ("read", "write", "discard", "discard", "flush"):
            nursery.start_soon(REQUESTS[kind], node)
        await trio.testing.wait_all_tasks_blocked()
        for rule in rules[:3]:
            node.faults.remove(rule)
        await trio.testing.wait_all_tasks_blocked()
        assert (node.faults.stuck, trio.current_time()) == (1, start)
        with pytest.raises(ValueError, match="list"):
            node.faults.remove(rules[0])
        node.faults.clear()
    assert trio.current_time() == start


async def test_what_is_cancelled_while_it_waits_is_not_done(autojump_clock):
    for fault in (Fault(stuck=True), Fault(delay=1000), Fault(bps=1)):
        node, leaf = faulty(fault)
        waits = []
        node.on_wait = waits.append
        with trio.move_on_after(1):
            for _ in range(2):  # the first of a bandwidth goes at once
                await REQUESTS["write"](node)
        assert len(leaf.calls) == (1 if fault.bps else 0)
        assert sum(waits) == 0
        assert node.faults.stuck == 0


# --- among other things --------------------------------------------------------------------------


async def test_a_disconnect_is_an_error_that_the_front_end_knows():
    node, leaf = faulty(Fault(ops="write", disconnect=True, after=1))
    await REQUESTS["write"](node)
    with pytest.raises(DisconnectError):
        await REQUESTS["write"](node)
    assert len(leaf.calls) == 1


async def test_each_injection_is_logged_with_what_was_done(caplog, autojump_clock):
    caplog.set_level(logging.INFO, "nbdserve.faults")
    node, _ = faulty(
        Fault(ops="read", error="EIO"), Fault(ops="write", short=1),
        Fault(ops="discard", delay=0.5), Fault(ops="write-zeroes", lost=True),
        Fault(ops="flush", disconnect=True), seed=9, room=0,
    )  # fmt: skip
    for call in REQUESTS.values():
        await outcome(call(node))
    assert [record.message for record in caplog.records] == [
        "memory: faults by seed 9",
        "memory: read of 1024 bytes at 0 fails with EIO [fault 0, match 1]",
        "memory: write of 1024 bytes at 0 has 512 bytes at 0 done, and fails with"
        " Input/output error [fault 1, match 1]",
        "memory: write of 1024 bytes at 0 fails with ENOSPC: it needs 4096 bytes of room,"
        " 0 are left [room]",
        "memory: write-zeroes of 1024 bytes at 0 has nothing done, and claims success"
        " [fault 3, match 1]",
        "memory: discard of 4096 bytes at 0 is held up for 0.500000 s [fault 2, match 1]",
        "memory: flush has no reply, its client is dropped [fault 4, match 1]",
    ]
    node.node_name = "disk0"
    caplog.clear()
    node.faults.add(Fault(ops="block-status", error="EIO"))
    await outcome(REQUESTS["block-status"](node))
    assert caplog.messages == [
        "disk0: block-status of 1024 bytes at 0 fails with EIO [fault 5, match 1]"
    ]


async def test_handles_and_statistics_count():
    node, _ = faulty(Fault(ops="read", error="EIO", count=1))
    rule = node.faults.add(Fault(ops="read+write", delay=0.0001, after=1))
    for kind in ("read", "read", "write", "flush"):
        await outcome(REQUESTS[kind](node))
    assert (rule.matched, rule.injected) == (3, 2)
    assert node.statistics() == {
        "seed": 0,
        "room": None,
        "stuck": 0,
        "rules": {"0": {"matched": 2, "injected": 1}, "1": {"matched": 3, "injected": 2}},
    }


async def test_while_there_are_faults_nothing_goes_round_it_else_everything():
    node, leaf = faulty()
    leaf.queues = leaf.flushed = True
    assert node.resolve(READ, 0, BLOCK) == leaf.resolve(READ, 0, BLOCK)
    assert node.flush_nowait()
    assert node.submit_flush(lambda error: None)
    for disturb in (lambda: node.faults.add(Fault(ops="flush", error="EIO")),
                    lambda: setattr(node.faults, "room", 100)):  # fmt: skip
        disturb()
        assert node.resolve(WRITE, 0, BLOCK) is node.resolve(READ, 0, 1) is Miss.OPAQUE
        assert not node.allocate_nowait(0, b"x")
        assert not node.flush_nowait()
        assert not node.submit_flush(lambda error: None)
        node.faults.clear()
        node.faults.room = None
        assert node.resolve(WRITE, 0, BLOCK) == [(leaf, 0, BLOCK)]


async def test_it_looks_like_its_child():
    leaf = MemoryLeaf(SIZE, read_only=True)
    node = FaultNode(leaf)
    assert (node.size, node.read_only, node.filename) == (SIZE, True, "memory")
    assert node.children == {"file": leaf}
    assert node.is_filter


async def test_who_waits_says_so_to_the_front_end(nursery, autojump_clock):
    node, _ = faulty(Fault(delay=1))
    backend = BlockBackend(node, Epochs(), nursery, write_cache=True)
    waits = []
    backend.on_wait = waits.append
    await backend.write(0, b"x")
    assert waits == [1, -1]


async def test_a_backend_that_stops_lets_go_all_that_is_held_up(nursery, autojump_clock):
    node, _ = faulty(Fault(ops="write", stuck=True), Fault(ops="discard", bps=1),
                     Fault(ops="flush", delay=1000))  # fmt: skip
    backend = BlockBackend(node, Epochs(), nursery, write_cache=True)
    start = trio.current_time()
    async with trio.open_nursery() as requests:
        for kind in ("write", "discard", "discard", "flush"):
            requests.start_soon(REQUESTS[kind], node)
        await trio.testing.wait_all_tasks_blocked()
        backend.drain_begin()
    node.faults.add(Fault(stuck=True, delay=1000))
    node.faults.add(Fault(ops="write", bps=1))
    for _ in range(3):
        await REQUESTS["write"](node)
    assert trio.current_time() == start


@pytest.mark.parametrize("fails", [False, True])
async def test_an_image_is_closed_although_writes_to_its_file_are_stuck(tmp_path, fails):
    """What was not flushed is written by the closing, which nobody could let go."""
    path = tmp_path / "image"
    path.write_bytes(new_image(tmp_path, 1 << 20))
    tree = parse_node(parse_image_opts(f"driver=qcow2,file.driver=fault,file.file.filename={path}"))
    nodes, rescued = [], []

    async def rescue():
        await trio.sleep(10)
        nodes[0].faults.clear()
        rescued.append("as nothing else did")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rescue)
        with suppress(BaseExceptionGroup):
            async with open_backend(ImageConfig(str(path), options=tree)) as backend:
                nodes.append(backend.root.children["file"])
                await backend.write(0, b"x" * 512)
                rule = nodes[0].faults.add(Fault(ops="write", stuck=True))
                if fails:
                    raise KeyError
        nursery.cancel_scope.cancel()
    assert not rescued
    assert rule.injected > 0
    assert_sound(path.read_bytes())
    assert guest_bytes(path.read_bytes())[:512] == b"x" * 512
