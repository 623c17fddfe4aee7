"""The filter that changes nothing, and filters of users' own."""

import pytest

from fakes import FakeLeaf
from nbdserve.block import filter as filters
from nbdserve.block.filter import FilterNode, find_filter, register_filter
from nbdserve.block.run import READ, Miss
from nbdserve.blockdev import parse_node
from nbdserve.config import ImageConfig
from nbdserve.errors import ConfigError
from nbdserve.graph import open_backend


class Inverted(FilterNode):
    """All bits of the disk are turned over."""

    def __init__(self, file, mask="255"):
        super().__init__(file)
        self.mask = int(mask)

    async def read(self, offset, buffer):
        await self.file.read(offset, buffer)
        buffer[:] = bytes(byte ^ self.mask for byte in buffer)

    async def write(self, offset, data):
        await self.file.write(offset, bytes(byte ^ self.mask for byte in data))


@pytest.fixture
def inverted(monkeypatch):
    monkeypatch.setattr(filters, "_registered", {})
    register_filter("inverted", Inverted)


REQUESTS = {
    "read": (lambda node: node.read(8, memoryview(bytearray(9))), [("read", 8, 9)]),
    "write": (lambda node: node.write(8, bytes(9)), [("write", 8, 9)]),
    "fua": (lambda node: node.write_fua(8, bytes(9)), [("write", 8, 9)]),
    "writev": (
        lambda node: node.writev(8, [bytes(3), bytes(4)]), [("write", 8, 3), ("write", 11, 4)]
    ),
    "zeroes": (
        lambda node: node.write_zeroes(8, 9, may_unmap=True, fallback=False),
        [("write_zeroes", 8, 9, True, False)],
    ),
    "discard": (lambda node: node.discard(8, 9), [("discard", 8, 9)]),
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_what_it_is_asked_it_asks_its_child(kind):
    call, expected = REQUESTS[kind]
    child = FakeLeaf(1 << 20)
    assert not await call(FilterNode(child))  # a write with FUA is not durable yet
    assert child.calls == expected


def test_nothing_goes_round_it():
    node = FilterNode(FakeLeaf(1 << 20))
    assert node.resolve(READ, 0, 512) is Miss.OPAQUE
    assert not node.flush_nowait()
    assert not node.submit_flush(lambda error: None)


def test_it_is_as_long_as_its_child():
    child = FakeLeaf(4096)
    node = FilterNode(child)
    child.size = 8192
    assert node.size == 8192


async def serve_once(path, **options):
    tree = parse_node({"driver": "inverted", "file.driver": "file", "file.filename": str(path),
                       **options})
    async with open_backend(ImageConfig("x", options=tree)) as backend:
        before = bytearray(4)
        await backend.read(0, memoryview(before))
        assert backend.read_nowait(0, memoryview(before)) is Miss.OPAQUE
        await backend.write(512, b"\1\2", fua=True)
    return bytes(before)


async def test_a_filter_of_a_users_own_is_asked_for_by_its_name(inverted, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1024))
    assert await serve_once(path) == b"\xff" * 4
    assert path.read_bytes()[512:514] == b"\xfe\xfd"
    assert await serve_once(path, mask="15") == b"\x0f" * 4


@pytest.mark.parametrize(("options", "said"), [
    ({"colour": "red"}, "driver=inverted: got an unexpected keyword argument 'colour'"),
    ({"mask": "red"}, "driver=inverted: invalid literal"),
])
async def test_options_that_it_has_not(inverted, tmp_path, options, said):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1024))
    with pytest.raises(ConfigError, match=said):
        await serve_once(path, **options)


def test_an_installed_package_may_have_filters(monkeypatch, tmp_path):
    monkeypatch.setattr(filters, "_registered", {})
    assert find_filter("shouting") is None
    (tmp_path / "shouting.py").write_text(
        "from nbdserve.block.filter import FilterNode\nclass Shouting(FilterNode): pass\n"
    )
    info = tmp_path / "shouting-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[nbdserve.filters]\nshouting = shouting:Shouting\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_filter("shouting")
    assert found is not None
    assert found.driver == "shouting"
