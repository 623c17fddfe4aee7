"""Trees that are asked for node by node: what stands on what, what each node was told, what is
refused, and what backing file names make of them."""

import errno
import json

import pytest
import trio

import peers
from facilities import folder_in_memory
from fakes import no_descriptor_left
from nbdserve import opener
from nbdserve.blockdev import parse_node
from nbdserve.config import (
    CACHE_AUTO,
    CACHE_MODES,
    ImageConfig,
    RateLimit,
    ThrottleConfig,
    ThrottleLimits,
)
from nbdserve.drivers.direct import DirectFileNode
from nbdserve.drivers.file import FileNode
from nbdserve.drivers.locks import PERMISSIONS, Permission, Role
from nbdserve.errors import ConfigError, ImageError, LockedError
from nbdserve.filters.throttle import ThrottleNode
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.formats.raw import RawNode
from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.imageopts import parse_image_opts
from nbdserve.place import MAX_CHAIN

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left_open():
    with no_descriptor_left():
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"raw!" * (MIB // 4))
    return path


@pytest.fixture
def image(tmp_path):
    create_image("disk.qcow2", MIB)
    return tmp_path / "disk.qcow2"


@pytest.fixture
def overlay(tmp_path, raw):
    create_image("top.qcow2", MIB, backing_file="disk.img", backing_format="raw")
    return tmp_path / "top.qcow2"


def tree(text, **options):
    """A configuration from --image-opts."""
    return ImageConfig("tree", options=parse_node(parse_image_opts(text)), **options)


def nodes(backend):
    """(class, node) by role."""
    return {role.removeprefix("root").removeprefix("."): node for role, node in backend._nodes()}


def kinds(backend):
    return {role: type(node) for role, node in nodes(backend).items()}


async def read(backend, offset, length):
    data = memoryview(bytearray(b"\xee" * length))
    await backend.read(offset, data)
    return bytes(data)


async def refusal(text, kind=ConfigError, shared=None, **options):
    """The one line that a tree is refused with when it is opened."""
    with no_descriptor_left(), pytest.raises(kind) as caught:
        async with open_backend(tree(text, **options), shared):
            pytest.fail("it was opened")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- data files ----------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    """split.qcow2, whose data is in data.raw."""
    create_image("split.qcow2", MIB, data_file="data.raw", data_file_raw=True)
    return tmp_path / "data.raw"


QCOW2 = "driver=qcow2,file.filename=disk.qcow2"
SPLIT = "driver=qcow2,file.filename=split.qcow2"


async def test_a_data_file_by_its_options(split):
    other = split.rename("other.raw")
    message = "split.qcow2: data file data.raw: No such file or directory"
    assert await refusal(SPLIT, ImageError) == message
    async with open_backend(tree(f"{SPLIT},data-file.filename=other.raw")) as backend:
        assert kinds(backend) == {"": Qcow2Node, "file": FileNode, "data-file": FileNode}
        await backend.write(5, b"data")
    assert other.read_bytes() == b"\0" * 5 + b"data" + bytes(MIB - 9)


async def test_what_a_data_file_inherits(split):
    text = f"{SPLIT},cache.no-flush=on,discard=ignore,data-file.filename=data.raw"
    async with open_backend(tree(text)) as backend:
        data_file = nodes(backend)["data-file"]
        assert data_file.no_flush
        assert data_file._discard  # the node above decides what it passes on
        assert not data_file.read_only
    async with open_backend(tree(f"{text},read-only=on,data-file.cache.no-flush=off")) as backend:
        data_file = nodes(backend)["data-file"]
        assert data_file.read_only
        assert not data_file.no_flush


@pytest.mark.parametrize("below", ["raw", "throttle", "qcow2"])
async def test_a_data_file_may_be_any_tree(split, below):
    options = {
        "raw": "data-file.driver=raw,data-file.offset=512,data-file.file.filename=data.raw",
        "throttle": "data-file.driver=throttle,data-file.throttle-group=g"
                    ",data-file.file.filename=data.raw",
        "qcow2": "data-file.driver=qcow2,data-file.file.filename=data.qcow2",
    }[below]
    if below == "raw":
        split.write_bytes(bytes(MIB + 512))
    create_image("data.qcow2", MIB)
    with shared_by_drives({"g": ThrottleLimits(iops_total=RateLimit(1 << 30))}) as shared:
        async with open_backend(tree(f"{SPLIT},{options}"), shared) as backend:
            await backend.write(70000, b"data")
            await backend.write(70000, b"more", fua=True)
            await backend.discard(0, 65536)
            await backend.flush()
            assert await read(backend, 69999, 6) == b"\0more\0"
    if below != "qcow2":
        at = 70000 + 512 * (below == "raw")
        assert split.read_bytes()[at : at + 4] == b"more"


async def test_a_data_file_is_refused_where_the_image_has_none(image, raw):
    text = f"{QCOW2},data-file.filename=disk.img"
    assert await refusal(text) == "data-file: disk.qcow2 keeps its data itself"


async def test_bad_options_of_a_data_file_are_named(split):
    text = f"{SPLIT},data-file.filename=data.raw,data-file.read-only=on"
    assert (await refusal(text)).startswith("data-file.read-only=on: the node above")


async def test_a_data_file_may_be_named_in_a_backing_file_name(split):
    name = json.dumps({
        "driver": "qcow2", "file.filename": "split.qcow2", "data-file.filename": "other.raw"
    })
    other = split.rename("other.raw")
    create_image("top.qcow2", MIB, backing_file=f"json:{name}", backing_format="qcow2")
    other.write_bytes(b"data".ljust(MIB, b"\0"))
    async with open_backend(tree("driver=qcow2,file.filename=top.qcow2")) as backend:
        assert nodes(backend)["backing.data-file"].read_only
        assert await read(backend, 0, 5) == b"data\0"


# --- what stands on what -------------------------------------------------------------------------



async def test_a_tree_is_what_a_name_and_a_format_are(image):
    for config in (tree(QCOW2), ImageConfig("disk.qcow2", "qcow2"), ImageConfig("disk.qcow2")):
        async with open_backend(config) as backend:
            assert kinds(backend) == {"": Qcow2Node, "file": FileNode}
            await backend.write(5, b"data")
            assert await read(backend, 4, 6) == b"\0data\0"


async def test_probing(image, raw, caplog):
    async with open_backend(tree("file.filename=disk.qcow2")) as backend:
        assert kinds(backend) == {"": Qcow2Node, "file": FileNode}
    async with open_backend(tree("file.filename=disk.img,file.driver=file")) as backend:
        assert kinds(backend) == {"": RawNode, "file": FileNode}
        with pytest.raises(OSError, match="look like qcow2"):
            await backend.write(0, b"QFI\xfb")
    assert "no format was given" in caplog.text
    assert await refusal("l2-cache-size=1M,file.filename=disk.img") == (
        "l2-cache-size: the driver raw has no such option"
    )
    async with open_backend(tree("l2-cache-size=1M,file.filename=disk.qcow2")):
        pass


async def test_only_a_plain_file_is_probed(image):
    text = "file.driver=raw,file.file.filename=disk.qcow2"
    assert await refusal(text) == "driver must be given: only a plain file can be probed"


async def test_a_file_alone_is_its_bytes(image):
    async with open_backend(tree("driver=file,filename=disk.qcow2")) as backend:
        assert kinds(backend) == {"": FileNode}
        assert await read(backend, 0, 4) == b"QFI\xfb"


async def test_a_name_in_options_is_taken_as_it_is(tmp_path, raw):
    raw.rename(tmp_path / "json:{}")
    async with open_backend(tree("driver=raw,file.filename=json:{}")) as backend:
        assert await read(backend, 0, 4) == b"raw!"


async def test_the_driver_must_fit_the_file(raw):
    text = "driver=raw,file.driver=host_device,file.filename=disk.img"
    assert await refusal(text, ImageError) == (
        "disk.img: the driver host_device is not for a regular file"
    )


@pytest.mark.parametrize(
    ("window", "offset", "size"),
    [("", 0, MIB), ("offset=1k", 1024, MIB - 1024), ("offset=2,size=512", 2, 512),
     ("offset=1M", MIB, 0), ("size=1M", 0, MIB), ("offset=1,size=0", 1, 0)],
)
async def test_a_window(raw, window, offset, size):
    content = bytes(i & 255 for i in range(7, 7 + MIB))
    raw.write_bytes(content)
    async with open_backend(tree(f"driver=raw,file.filename=disk.img,{window}")) as backend:
        assert backend.size == size
        assert await read(backend, 0, size) == content[offset : offset + size]
        if size:
            await backend.write(size - 1, b"x")
            content = content[: offset + size - 1] + b"x" + content[offset + size :]
    assert raw.read_bytes() == content


@pytest.mark.parametrize("window", ["offset=1048577", "offset=1M,size=512", "size=1049088"])
async def test_a_window_beyond_the_end(raw, window):
    message = await refusal(f"driver=raw,file.filename=disk.img,{window}", ImageError)
    assert message.startswith("disk.img: offset: ")
    assert message.endswith(" is beyond the end (1048576 bytes)")


async def test_an_image_in_a_window_does_not_grow_beyond_it(tmp_path, image):
    content = image.read_bytes()
    behind = b"behind" * 1000
    (tmp_path / "big.img").write_bytes(b"x" * 512 + content + bytes(MIB) + behind)
    text = (
        "driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=big.img,"
        f"file.size={len(content) // 512 * 512 + MIB // 2}"
    )
    async with open_backend(tree(text)) as backend:
        assert kinds(backend) == {"": Qcow2Node, "file": RawNode, "file.file": FileNode}
        await backend.write(0, b"fits")
        await backend.write(0, b"1" * (MIB // 4))
        with pytest.raises(OSError, match="beyond") as caught:
            await backend.write(MIB // 4, b"2" * (MIB // 2))
        assert caught.value.errno == errno.ENOSPC
        assert await read(backend, MIB // 4 - 2, 2) == b"11"
    data = (tmp_path / "big.img").read_bytes()
    assert data.startswith(b"x" * 512 + b"QFI\xfb")
    assert data.endswith(bytes(MIB // 2) + behind)


async def test_an_image_in_an_image(tmp_path, image):
    async with open_backend(ImageConfig("disk.qcow2", "qcow2")) as outer:
        create_image("inner.qcow2", MIB // 4)
        inner = (tmp_path / "inner.qcow2").read_bytes()
        await outer.write(0, inner)
    text = "driver=qcow2,file.driver=qcow2,file.file.filename=disk.qcow2"
    async with open_backend(tree(text)) as backend:
        assert backend.size == MIB // 4
        await backend.write(70_000, b"nested")
        window = backend.root.children["file"]
        with pytest.raises(OSError, match="beyond") as caught:
            await window.write(MIB - 4, b"beyond")
        assert caught.value.errno == errno.ENOSPC
        await backend.flush()
    async with open_backend(tree(text)) as backend:
        assert await read(backend, 69_999, 8) == b"\0nested\0"


# --- throttle nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=disk.qcow2",
            {"": ThrottleNode, "file": Qcow2Node, "file.file": FileNode},
        ),
        (
            "driver=qcow2,file.driver=throttle,file.throttle-group=g,"
            "file.file.filename=disk.qcow2",
            {"": Qcow2Node, "file": ThrottleNode, "file.file": FileNode},
        ),
    ],
)
async def test_a_throttle_anywhere(image, autojump_clock, text, expected):
    autojump_clock.autojump_threshold = 0.01
    limits = ThrottleLimits(bps_write=RateLimit(1 << 20))
    with shared_by_drives({"g": limits}) as shared:
        async with open_backend(tree(text), shared) as backend:
            assert kinds(backend) == expected
            await backend.write(0, b"1" * 400_000)
            start = trio.current_time()
            await backend.write(400_000, b"2" * 400_000)
            assert trio.current_time() > start
            assert await read(backend, 399_999, 2) == b"12"
        async with open_backend(tree(QCOW2), shared) as backend:
            assert await read(backend, 399_999, 2) == b"12"


async def test_a_throttle_node_shares_a_group_with_a_drive(image, raw, autojump_clock):
    autojump_clock.autojump_threshold = 0.01
    with shared_by_drives({"g": ThrottleLimits(iops_total=RateLimit(10))}) as shared:
        one = ImageConfig("disk.qcow2", throttle=ThrottleConfig(group="g"))
        two = tree("driver=throttle,throttle-group=g,file.filename=disk.img")
        async with open_backend(one, shared) as drive, open_backend(two, shared) as node:
            start = trio.current_time()
            for _ in range(10):
                await read(drive, 0, 512)
                await read(node, 0, 512)
            assert trio.current_time() - start == pytest.approx(1.8, abs=0.3)
            assert node.root.statistics()["group"] == "g"


async def test_a_group_that_nobody_made(image):
    text = "driver=throttle,throttle-group=g,file.filename=disk.qcow2"
    assert await refusal(text) == "throttle-group: there is no group 'g'"


# --- what each node was told ---------------------------------------------------------------------


async def test_cache_options_go_down_the_tree(overlay, syncs):
    text = "driver=qcow2,cache.no-flush=on,file.filename=top.qcow2"
    async with open_backend(tree(text)) as backend:
        assert all(node.no_flush for node in nodes(backend).values())
        await backend.write(0, b"x")
        await backend.flush()
    assert syncs == []


@pytest.fixture
def syncs(monkeypatch):
    """The files that were synced."""
    files = []
    flush = FileNode.flush_to_disk

    async def flush_to_disk(self):
        files.append(self.filename)
        await flush(self)

    monkeypatch.setattr(FileNode, "flush_to_disk", flush_to_disk)
    return files


async def test_what_a_child_is_told_goes_before_that(overlay, syncs):
    text = "driver=qcow2,cache.no-flush=on,file.cache.no-flush=off,file.filename=top.qcow2"
    async with open_backend(tree(text)) as backend:
        said = {role: node.no_flush for role, node in nodes(backend).items()}
        assert said == {"": True, "file": False, "backing": True, "backing.file": True}
        await backend.write(0, b"x")
        await backend.flush()
        assert syncs[0] == "top.qcow2"


async def test_the_command_line_is_for_what_options_leave_open(image):
    text = f"{QCOW2},cache.direct=off"
    async with open_backend(tree(text, cache=CACHE_MODES["none"])) as backend:
        assert type(backend.root.children["file"]) is FileNode
        assert not backend.queues_reads
    async with open_backend(tree(f"{QCOW2},cache.direct=on")) as backend:
        assert type(backend.root.children["file"]) is DirectFileNode
        assert backend.queues_reads
        await backend.write(1, b"direct")
        assert await read(backend, 0, 8) == b"\0direct\0"


async def test_a_backing_file_with_o_direct_below_an_image_without(overlay):
    text = "driver=qcow2,file.filename=top.qcow2,backing.cache.direct=on"
    async with open_backend(tree(text)) as backend:
        assert [type(node) for node in nodes(backend).values()].count(DirectFileNode) == 1
        assert type(nodes(backend)["backing.file"]) is DirectFileNode
        await backend.write(4, b"new!")
        assert await read(backend, 0, 12) == b"raw!new!raw!"


async def test_engines_are_shared_by_files_that_want_the_same(overlay, image):
    text = "driver=qcow2,file.filename=top.qcow2,file.aio=threads,backing.file.aio=io_uring"
    other = tree(QCOW2, aio="io_uring")
    with shared_by_drives() as shared:
        async with open_backend(tree(text), shared) as one, open_backend(other, shared) as two:
            assert [engine.name for engine in one.engines] == ["threads", "io_uring"]
            assert two.engines == one.engines[1:]
            with one.plug():
                pass
            assert await read(one, 0, 4) == b"raw!"
            await two.write(0, b"two")
        assert [engine.name for engine in shared.engines] == ["threads", "io_uring"]


async def test_linux_aio_needs_o_direct_in_each_file(overlay):
    text = "driver=qcow2,file.filename=top.qcow2,backing.cache.direct=off"
    native = {"cache": CACHE_MODES["none"], "aio": "native"}
    assert "--aio=native needs O_DIRECT" in await refusal(text, **native)
    async with open_backend(tree(f"{text},backing.file.aio=threads", **native)) as backend:
        assert [engine.name for engine in backend.engines] == ["native", "threads"]
        assert await read(backend, 0, 4) == b"raw!"


async def test_read_only(image):
    async with open_backend(tree(f"{QCOW2},read-only=on")) as backend:
        assert backend.read_only
        assert all(node.read_only for node in nodes(backend).values())
    text = f"{QCOW2},read-only=on,file.read-only=off"
    async with open_backend(tree(text)) as backend:
        assert backend.read_only
        assert not backend.root.children["file"].read_only
    text = "driver=raw,read-only=on,cache.no-flush=on,file.read-only=off,file.cache.no-flush=off"
    async with open_backend(tree(f"{text},file.filename=disk.qcow2")) as backend:
        assert backend.read_only
        assert backend.root.no_flush
        assert not backend.root.children["file"].no_flush
    message = await refusal(f"{QCOW2},file.read-only=on")
    assert message == "file.read-only=on: the node above is not read-only and writes to it"


async def test_discard_stops_where_it_is_ignored(raw):
    async with open_backend(tree("driver=raw,discard=ignore,file.filename=disk.img")) as backend:
        await backend.discard(0, MIB)
        assert await read(backend, 0, 4) == b"raw!"
    text = "driver=raw,file.discard=ignore,file.filename=disk.img"
    async with open_backend(tree(text)) as backend:
        await backend.discard(0, MIB)
        assert await read(backend, 0, 4) == b"raw!"
    async with open_backend(tree("driver=raw,file.filename=disk.img", discard="unmap")) as backend:
        await backend.discard(0, MIB)
        assert await read(backend, 0, 4) == bytes(4)


async def test_what_is_freed_in_an_image_is_discarded_in_its_file_only_if_it_may_be(image):
    kept = {}
    for discard in ("ignore", "unmap"):
        async with open_backend(tree(QCOW2, discard=discard)) as backend:
            await backend.write(0, b"x" * MIB)
            await backend.flush()
            await backend.root.discard(0, MIB)
        kept[discard] = image.stat().st_blocks
    assert kept["unmap"] < kept["ignore"] - MIB // 1024


async def test_discards_are_ignored_at_the_top_or_in_files(image):
    text = "driver=raw,file.driver=qcow2,file.discard=ignore,file.file.filename=disk.qcow2"
    message = "file.discard=ignore: only for the uppermost node and files"
    assert await refusal(text) == message


async def test_detect_zeroes(raw):
    text = "driver=raw,detect-zeroes=unmap,discard=unmap,file.filename=disk.img"
    async with open_backend(tree(text)) as backend:
        await backend.write(0, bytes(MIB))
    assert raw.stat().st_blocks == 0


async def test_cache_sizes(image):
    async with open_backend(tree(f"{QCOW2},l2-cache-size=0,refcount-cache-size=64k")) as backend:
        await backend.write(0, b"x" * MIB)
        assert await read(backend, 0, MIB) == b"x" * MIB
        assert backend.root.image.l2._capacity == 0


# --- locks ---------------------------------------------------------------------------------------


async def test_force_share_reads_what_somebody_writes(image):
    async with open_backend(tree(QCOW2)) as writer:
        assert "in use by" in await refusal(f"{QCOW2},read-only=on", LockedError)
        async with open_backend(tree(f"{QCOW2},force-share=on", read_only=True)):
            pass
        async with open_backend(ImageConfig("disk.qcow2", read_only=True, force_share=True)):
            pass
        await writer.write(0, b"x")


async def test_force_share_excludes_nobody(image):
    reader = tree(f"{QCOW2},force-share=on,read-only=on")
    async with open_backend(reader), open_backend(tree(QCOW2)) as writer:
        await writer.write(0, b"x")


async def test_locking_off_takes_and_minds_no_locks(image):
    careless = tree(f"{QCOW2},file.locking=off")
    async with open_backend(tree(QCOW2)), open_backend(careless):
        pass
    async with open_backend(careless), open_backend(tree(QCOW2)):
        pass


@pytest.mark.parametrize(
    ("text", "role"),
    [
        (QCOW2, "FORMAT_RW"),
        (f"{QCOW2},read-only=on,file.read-only=off", "FORMAT_RO"),
        ("driver=raw,file.filename=disk.qcow2", "RAW_RW"),
        ("file.filename=disk.qcow2", "FORMAT_RW"),
        ("driver=raw,read-only=on,file.filename=disk.qcow2", "RAW_RO"),
        ("driver=raw,file.driver=qcow2,file.file.filename=disk.qcow2", "FORMAT_RW"),
        ("driver=qcow2,file.driver=raw,file.file.filename=disk.qcow2", "FORMAT_RW"),
        ("driver=file,filename=disk.qcow2", "RAW_RW"),
        ("driver=raw,file.driver=raw,file.file.filename=disk.qcow2", "RAW_RW"),
    ],
)
async def test_the_nearest_format_says_what_is_locked(image, monkeypatch, text, role):
    locks = []
    monkeypatch.setattr(FileNode, "lock", lambda self, *permissions: locks.append(permissions))
    async with open_backend(tree(text)):
        pass
    assert locks == [PERMISSIONS[Role[role]]]


async def test_force_share_locks(overlay, monkeypatch):
    locks = {}

    def lock(self, permissions, shared):
        locks[self.filename] = (permissions, shared)

    monkeypatch.setattr(FileNode, "lock", lock)
    async with open_backend(ImageConfig(str(overlay), read_only=True, force_share=True)):
        pass
    one = (Permission.CONSISTENT_READ, Permission.ALL)
    assert locks == {str(overlay): one, f"{overlay.parent}/disk.img": one}


# --- node names ----------------------------------------------------------------------------------


async def test_node_names(overlay, image):
    text = "driver=qcow2,node-name=top,file.filename=top.qcow2,backing.node-name=base"
    with shared_by_drives() as shared:
        async with open_backend(tree(text), shared) as backend:
            names = {role: node.node_name for role, node in nodes(backend).items()}
            assert (names[""], names["backing"]) == ("top", "base")
            assert all(names[role].startswith("#block") for role in ("file", "backing.file"))
            assert len(set(names.values())) == 4
            counters = backend.statistics()["nodes"]
            assert counters["root"]["node_name"] == "top"
            assert counters["root.backing"]["node_name"] == "base"
            message = await refusal(f"{QCOW2},node-name=base", shared=shared)
            assert message == "node-name: 'base' is given to two nodes"
        async with open_backend(tree(f"{QCOW2},node-name=base"), shared):
            pass


async def test_a_name_twice_in_one_tree(image):
    message = await refusal(f"{QCOW2},node-name=a,file.node-name=a")
    assert message == "node-name: 'a' is given to two nodes"


# --- backing files -------------------------------------------------------------------------------

TOP = "driver=qcow2,file.filename=top.qcow2"


async def test_no_backing_file_whatever_the_image_says(overlay, raw):
    raw.unlink()
    for text in (f"{TOP},backing=", f"backing=,{TOP}"):
        async with open_backend(tree(text)) as backend:
            assert kinds(backend) == {"": Qcow2Node, "file": FileNode}
            assert await read(backend, 0, 4) == bytes(4)


async def test_another_backing_file(overlay, tmp_path):
    (tmp_path / "other.img").write_bytes(b"other")
    for driver in ("", ",backing.driver=raw"):
        text = f"{TOP},backing.file.filename=other.img{driver}"
        async with open_backend(tree(text)) as backend:
            assert await read(backend, 0, 6) == b"other\0"


@pytest.mark.parametrize("where", ["backing.file", "backing"])
async def test_a_backing_file_behind_a_filter(overlay, where):
    """Its file is named further down than usual; what the image names is not asked for either."""
    fault = f"{where}.driver=fault,{where}.faults.0.ops=read,{where}.faults.0.offset=4"
    driver = "backing.file.driver=raw," if where == "backing" else ""
    file = f"{driver}backing.file.file.filename=disk.img"
    text = f"{TOP},{fault},{where}.faults.0.error=EIO,{file}"
    async with open_backend(tree(text)) as backend:
        assert await read(backend, 0, 4) == b"raw!"
        with pytest.raises(OSError, match="a fault"):
            await read(backend, 0, 8)


@pytest.mark.parametrize(
    "name", ["nbd://localhost/x", "json:{", 'json:{"offset": 512, "file.filename": "gone"}']
)
async def test_of_a_name_that_is_not_used_nothing_is_used(raw, name):
    make_overlay("top.qcow2", name, "raw")
    async with open_backend(tree(f"{TOP},backing.file.filename=disk.img")) as backend:
        assert type(backend.root.children["backing"]) is RawNode  # of the format, no less
        assert await read(backend, 0, 8) == b"raw!raw!"


async def test_options_for_the_backing_file_that_the_image_names(overlay):
    text = f"{TOP},backing.node-name=base,backing.size=512"
    async with open_backend(tree(text)) as backend:
        assert backend.root.children["backing"].node_name == "base"
        assert await read(backend, 508, 8) == b"raw!\0\0\0\0"


async def test_a_backing_file_for_an_image_that_names_none(image, raw):
    text = f"{QCOW2},backing.driver=raw,backing.file.filename=disk.img"
    async with open_backend(tree(text)) as backend:
        assert await read(backend, 0, 4) == b"raw!"
        await backend.write(1, b"xx")
        assert await read(backend, 0, 4) == b"rxx!"
    text = f"{QCOW2},backing.driver=file,backing.filename=disk.img"
    async with open_backend(tree(text)) as backend:
        assert kinds(backend) == {"": Qcow2Node, "file": FileNode, "backing": FileNode}
        assert await read(backend, 4, 4) == b"raw!"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("backing.node-name=x,backing.aio=threads", "backing.aio: the driver raw has no such"),
        ("backing.read-only=off", "backing.read-only=off: nothing here writes to a backing file"),
        ("backing.driver=qcow2", "disk.img"),
        ("backing.driver=file,backing.filename=disk.img", "file.filename: the driver file has no"),
    ],
)
async def test_options_that_do_not_fit_the_backing_file(overlay, options, said):
    message = await refusal(f"{TOP},{options}", (ConfigError, ImageError))
    assert message.startswith("top.qcow2: backing file ")
    assert said in message


def make_overlay(name, backing, backing_format):
    create_image(name, MIB, backing_file=backing, backing_format=backing_format)


def spelled(tree):
    return f"json:{json.dumps(tree)}"


@pytest.mark.parametrize(
    "tree",
    [
        {"driver": "raw", "file": {"driver": "file", "filename": "disk.img"}},
        {"file.filename": "disk.img"},
        {"driver": "qcow2", "file": {"filename": "disk.img"}},  # the header's format wins
        {"driver": "raw", "file.driver": "file", "file": {"filename": "disk.img"}},
        {"file.driver": "raw", "file.file.filename": "disk.img"},
    ],
)
async def test_a_json_name_in_an_image(raw, tree):
    make_overlay("top.qcow2", spelled(tree), "raw")
    async with open_backend(ImageConfig("top.qcow2")) as backend:
        assert await read(backend, 0, 8) == b"raw!raw!"
        await backend.write(2, b"12")
        assert await read(backend, 0, 8) == b"ra12raw!"
    assert raw.read_bytes() == b"raw!" * (MIB // 4)


async def test_names_within_json_are_relative_to_where_we_are(tmp_path, raw):
    (tmp_path / "sub").mkdir()
    make_overlay("sub/top.qcow2", spelled({"driver": "raw", "file.filename": "disk.img"}), "raw")
    async with open_backend(ImageConfig("sub/top.qcow2")) as backend:
        assert await read(backend, 0, 4) == b"raw!"


async def test_a_window_as_a_backing_file(raw):
    raw.write_bytes(bytes(512) + b"window" + bytes(MIB))
    name = spelled({"driver": "raw", "offset": 512, "size": 512, "file.filename": "disk.img"})
    make_overlay("top.qcow2", name, "raw")
    async with open_backend(ImageConfig("top.qcow2")) as backend:
        assert await read(backend, 0, 8) == b"window\0\0"
        assert await read(backend, 510, 8) == bytes(8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("json:", "not valid JSON"),
        ("json:[]", "not a JSON object"),
        ("json:{}", "json:{}: file.filename must be given"),
        ('json:{"driver": "file"}', 'json:{"driver": "file"}: file.filename must be given'),
        ('json:{"file": "disk.img"}', "file: there is no node 'disk.img'"),
        ("json:" + '{"file":' * 100 + "1" + "}" * 100, "more than 32 brackets within each other"),
        ("json:" + "[" * 1000, "more than 32 brackets within each other"),
        ('json:{"driver":"raw","file.filename":"a\\u0000b"}', "contains a NUL byte"),
        ('json:{"driver":"raw","file.filename":"\\ud800"}', "is not valid Unicode"),
        ('json:{"file.driver":"nbd","file.host":"x"}', "no image may ask for the driver 'nbd'"),
        ('json:{"read-only":false,"file.filename":"disk.img"}', "nothing here writes to a backing"),
        ('json:{"file.filename":"gone"}', "gone: No such file or directory"),
        ('json:{"file.filename":"top.qcow2"}', "the backing chain is a loop"),
        ('json:{"file.filename":"' + "x" * 300 + '"}', "File name too long"),
        ('json:{"file.driver":"throttle","file.throttle-group":"g","file.file.filename":"disk.img"}',
         "there is no group 'g'"),
    ],
)  # fmt: skip
async def test_hostile_names(raw, name, said):
    make_overlay("top.qcow2", name, "raw")
    with no_descriptor_left(), pytest.raises(ImageError) as caught:
        async with open_backend(ImageConfig("top.qcow2")):
            pytest.fail("it was opened")
    assert said in str(caught.value)
    assert str(caught.value).startswith("top.qcow2: backing file ")
    assert "\n" not in str(caught.value)


def wrapped(depth, name):
    """An image below so many raw windows."""
    tree = {"driver": "qcow2", "file.filename": name}
    for _ in range(depth):
        tree = {"driver": "raw", "file": tree}
    return tree


async def test_names_can_make_a_path_only_so_long(raw, tmp_path):
    """Nothing but the limit says so, the stack in particular."""
    create_image("0", MIB)
    for number in range(1, 10):
        make_overlay(str(number), spelled(wrapped(24, str(number - 1))), "raw")
    async with open_backend(ImageConfig("8")) as backend:
        assert len(nodes(backend)) == 9 * 2 + 8 * 24
        assert await read(backend, 0, 4) == bytes(4)
    with no_descriptor_left(), pytest.raises(ImageError) as caught:
        async with open_backend(ImageConfig("9")):
            pytest.fail("it was opened")
    message = f"1: backing file 0: the backing chain is longer than {MAX_CHAIN} images"
    assert str(caught.value) == message


async def test_names_can_make_a_tree_only_so_large(monkeypatch):
    monkeypatch.setattr(opener, "MAX_NODES", 50)
    create_image("0", MIB)
    for number in range(1, 3):
        make_overlay(str(number), spelled(wrapped(24, str(number - 1))), "raw")
    async with open_backend(ImageConfig("1")):
        pass
    with no_descriptor_left(), pytest.raises(ImageError, match="more than 50 nodes in all"):
        async with open_backend(ImageConfig("2")):
            pytest.fail("it was opened")


# --- --cache=auto ------------------------------------------------------------------------------


@pytest.fixture
def in_memory():
    """A folder in memory, where there is no O_DIRECT."""
    with folder_in_memory() as folder:
        yield folder


def files_of(backend):
    return [node for _, node in backend._nodes() if isinstance(node, FileNode)]


@pytest.mark.peer(peers.IO_URING, peers.O_DIRECT)
async def test_auto_is_o_direct_where_all_files_have_it(overlay, caplog):
    config = ImageConfig(str(overlay), format="qcow2", cache=CACHE_AUTO)
    with shared_by_drives() as shared:
        async with open_backend(config, shared) as backend:
            assert [type(file) for file in files_of(backend)] == [DirectFileNode] * 2
            assert [engine.name for engine in backend.engines] == ["io_uring"]
    [record] = caplog.records
    assert "--cache=auto: none" in record.getMessage()


@pytest.mark.peer(peers.IO_URING)
async def test_auto_is_writeback_where_one_file_has_no_o_direct(in_memory, caplog):
    base = in_memory / "base.img"
    base.write_bytes(b"raw!" * (MIB // 4))
    create_image("top.qcow2", MIB, backing_file=str(base), backing_format="raw")
    async with open_backend(ImageConfig("top.qcow2", cache=CACHE_AUTO)) as backend:
        assert [type(file) for file in files_of(backend)] == [FileNode] * 2
        assert backend.write_cache
        await backend.write(0, b"written")
    [record] = caplog.records
    assert "--cache=auto: writeback" in record.getMessage()
    assert str(base) in record.getMessage()


async def test_auto_is_writeback_without_io_uring(image, caplog, monkeypatch):
    def forbidden(self):
        raise PermissionError(errno.EPERM, "not allowed")

    monkeypatch.setattr("nbdserve.engines.io_uring.IoUringEngine.__init__", forbidden)
    async with open_backend(ImageConfig(str(image), cache=CACHE_AUTO)) as backend:
        assert [type(file) for file in files_of(backend)] == [FileNode]
    assert "--cache=auto: writeback" in caplog.messages[-1]


async def test_what_is_wrong_with_an_image_auto_does_not_hide(image):
    image.write_bytes(b"QFI\xfb" + bytes(200))
    with pytest.raises(ImageError):
        async with open_backend(ImageConfig(str(image), format="qcow2", cache=CACHE_AUTO)):
            pass
