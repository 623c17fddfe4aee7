"""The filter in a server for tests. It need not be installed for that: it is registered here."""

import os

import pytest
from hot_blocks import HotBlocks

from nbdserve.block.filter import register_filter

MIB = 1 << 20


@pytest.fixture
def disk(nbd_server, tmp_path):
    register_filter("hot-blocks", HotBlocks)
    plain = tmp_path / "disk.img"
    plain.write_bytes(b"")
    os.truncate(plain, 64 * MIB)
    # The driver right above the file: no format is between them, so the disk is raw.
    return nbd_server(plain, format="hot-blocks", options={"block-size": "1M", "top": 2})


def hot(disk):
    nodes = disk.statistics()["exports"][""]["nodes"].values()
    return next(node for node in nodes if node["driver"] == "hot-blocks")


def test_the_hottest_come_first(disk) -> None:
    for requests, block in enumerate([40, 5, 7], start=1):
        for _ in range(requests):
            disk.write(block * MIB, b"x" * 4096)
    assert list(hot(disk)["written"].items()) == [(str(7 * MIB), 3), (str(5 * MIB), 2)]
    assert hot(disk)["read"] == {}


def test_a_request_may_touch_two_blocks(disk) -> None:
    disk.write(3 * MIB - 1, b"xx")
    assert disk.read(3 * MIB - 1, 2) == b"xx"
    assert hot(disk)["read"] == hot(disk)["written"] == {str(2 * MIB): 1, str(3 * MIB): 1}
