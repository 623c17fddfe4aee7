"""The defaults of a node, and the flush chain that all nodes share."""

import errno

import pytest

from fakes import FakeLeaf, FakeNode
from nbdserve.block.node import Extent, Leaf, Node
from nbdserve.block.run import READ, WRITE, Miss


def plain():
    return Node("plain", 4096, read_only=False)


def test_by_default_a_node_hides_what_is_below():
    node = plain()
    assert node.resolve(READ, 0, 512) is Miss.OPAQUE
    assert node.resolve(WRITE, 0, 512) is Miss.OPAQUE
    assert node.allocate_nowait(0, b"x") is False
    assert node.children == {}
    assert node.cluster_size == 1
    assert node.statistics() == {}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda node: node.read(0, memoryview(bytearray(1))), errno.EIO),
        (lambda node: node.write(0, b"x"), errno.EPERM),
        (lambda node: node.write_zeroes(0, 1, may_unmap=True), errno.EOPNOTSUPP),
    ],
)
async def test_what_a_node_does_not_do_is_an_error_that_names_it(call, error):
    with pytest.raises(OSError, match="Node") as caught:
        await call(plain())
    assert caught.value.errno == error


async def test_by_default_everything_is_data_and_a_discard_is_a_hint():
    node = plain()
    await node.discard(0, 4096)
    assert await node.block_status(512, 100) == [Extent(100, data=True, zero=False)]


async def test_writev_is_writes_one_behind_the_other():
    node = FakeNode()
    await node.writev(10, [b"abc", b"", bytearray(b"de"), memoryview(b"f")])
    assert node.bytes[9:17] == b"\0abcdef\0"


async def test_a_leaf_is_a_run_of_itself_and_blocks():
    leaf = Leaf("leaf", 4096, read_only=False)
    assert leaf.resolve(READ, 7, 9) == [(leaf, 7, 9)]
    assert leaf.read_nowait(0, memoryview(bytearray(1))) is False
    assert leaf.write_nowait(0, b"x") is False
    assert leaf.writev_nowait(0, [b"x"]) is False
    with pytest.raises(OSError, match="Leaf does not read"):
        leaf.submit_read(0, memoryview(bytearray(1)), lambda error: None)


# --- the flush chain -------------------------------------------------------------------------


def tree(*, no_flush=False):
    """A node on a file and a data file, with a backing file; one log of all four."""
    children = {role: FakeLeaf() for role in ("backing", "file", "data_file")}
    node = FakeNode(no_flush=no_flush, **children)
    log = []
    for name, member in [*children.items(), ("node", node)]:
        member._record = lambda step, *_, name=name: log.append((name, step))
    return node, log


async def test_the_chain_goes_down_in_order_and_leaves_backing_files_alone():
    node, log = tree()
    await node.flush()
    assert log == [
        ("node", "flush_to_os"),
        ("node", "flush_to_disk"),
        ("file", "flush_to_os"),
        ("file", "flush_to_disk"),
        ("data_file", "flush_to_os"),
        ("data_file", "flush_to_disk"),
    ]


async def test_no_flush_still_hands_all_metadata_to_the_os_and_syncs_nothing():
    """A window on an image has no metadata, but what is below it has."""
    node, log = tree(no_flush=True)
    for child in node.children.values():
        child.no_flush = True
    await node.flush()
    assert log == [
        ("node", "flush_to_os"),
        ("file", "flush_to_os"),
        ("data_file", "flush_to_os"),
    ]


@pytest.mark.parametrize("step", ["flush_to_os", "flush_to_disk"])
async def test_an_error_stops_the_chain(step):
    file = FakeLeaf()
    node = FakeNode(file=file)
    node.errors[step] = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        await node.flush()
    assert file.calls == []


async def test_an_error_below_means_that_the_node_was_not_flushed():
    file = FakeLeaf()
    node = FakeNode(file=file, data_file=FakeLeaf())
    file.errors["flush_to_disk"] = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        await node.flush()
    assert node.names() == ["flush_to_os", "flush_to_disk"]
    assert node.children["data-file"].calls == []
