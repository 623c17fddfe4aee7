"""From a configuration to an open tree and back: chains, loops, locks, what is left behind.

Images are made by our own create_image, so that no peer is needed; what QEMU makes is served in
tests/interop.
"""

import contextlib
import errno
import logging
import os
import random
import threading

import pytest
import trio
import trio.testing

from fakes import no_descriptor_left
from nbdserve import opener
from nbdserve.block.backend import BlockBackend
from nbdserve.block.units import align_up
from nbdserve.config import CACHE_MODES, ImageConfig
from nbdserve.drivers import file as file_module
from nbdserve.drivers.file import FileNode
from nbdserve.errors import ConfigError, ImageError, LockedError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.formats.raw import RawNode
from nbdserve.graph import open_backend
from nbdserve.place import MAX_CHAIN

MIB = 1 << 20


def config(path, **options):
    # With threads the calls for the image can be watched, and it may be closed outside of trio.
    return ImageConfig(str(path), **{"aio": "threads", **options})


@pytest.fixture(autouse=True)
def nothing_left_open():
    """Whatever a test does with images, all files are closed and all threads ended after it."""
    with no_descriptor_left():
        yield
    assert not any(thread.name == "nbdserve-io" for thread in threading.enumerate())


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"raw!" * (MIB // 4))
    return path


@pytest.fixture
def make(tmp_path):
    """Creates an empty qcow2 image in tmp_path; `backing` is the name as it is stored."""

    def make(name, backing=None, backing_format="qcow2", size=MIB):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        create_image(
            str(path),
            size,
            backing_file=backing,
            backing_format=backing_format if backing else None,
        )
        return path

    return make


@pytest.fixture
def chain(make, raw):
    """top.qcow2 -> mid.qcow2 -> disk.img."""
    make("mid.qcow2", "disk.img", "raw")
    return make("top.qcow2", "mid.qcow2")


async def read(backend, offset, length):
    data = memoryview(bytearray(b"\xee" * length))
    await backend.read(offset, data)
    return bytes(data)


async def refusal(config, kind=ImageError):
    """Open an image that must be refused; the message, which is one line."""
    with no_descriptor_left(), pytest.raises(kind) as caught:
        async with open_backend(config):
            pytest.fail("it was opened")
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- formats ---------------------------------------------------------------------------------


async def test_a_named_format_is_believed(make):
    path = make("image")
    async with open_backend(config(path, format="qcow2")) as backend:
        assert (type(backend.root), backend.size) == (Qcow2Node, MIB)
        assert backend.filename == str(path)
    async with open_backend(config(path, format="raw")) as backend:
        assert (type(backend.root), backend.size) == (RawNode, align_up(path.stat().st_size, 512))
        await backend.write(0, b"QFI\xfb\0\0\0\x03")  # not guessed, so not guarded


async def test_without_a_name_the_image_is_looked_at(make, raw, caplog):
    async with open_backend(config(make("image"))) as backend:
        assert type(backend.root) is Qcow2Node
    assert caplog.records == []
    async with open_backend(config(raw)) as backend:
        assert type(backend.root) is RawNode
        with pytest.raises(OSError, match="look like qcow2") as caught:
            await backend.write(0, b"QFI\xfb")
        assert caught.value.errno == errno.EPERM
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{raw}: no format was given")


async def test_a_guess_that_cannot_do_harm_is_not_warned_of(raw, caplog):
    async with open_backend(config(raw, read_only=True)):
        pass
    assert caplog.records == []


async def test_an_empty_file_is_an_empty_raw_disk(tmp_path):
    (tmp_path / "empty").touch()
    async with open_backend(config(tmp_path / "empty")) as backend:
        assert backend.size == 0


async def test_other_formats_are_refused(tmp_path, raw):
    with pytest.raises(ImageError, match=r"disk\.img: unknown format 'vdi'; known are qcow2, raw"):
        config(raw, format="vdi")
    (tmp_path / "x.vmdk").write_bytes(b"KDMV" + bytes(508))
    assert "vmdk" in await refusal(config(tmp_path / "x.vmdk"))
    assert str(raw) in await refusal(config(raw, format="qcow2"))


async def test_native_aio_without_o_direct_is_refused(raw):
    assert (await refusal(config(raw, aio="native"), ConfigError)).startswith(
        "--aio=native needs O_DIRECT"
    )


async def test_a_file_that_cannot_be_read_is_named(raw, monkeypatch):
    def broken(fd, buffers, offset, flags=0):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module.os, "preadv", broken)
    assert await refusal(config(raw)) == f"{raw}: Input/output error"


# --- the window ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [512, 1000, MIB - 512])
async def test_an_offset_opens_a_window(raw, make, offset):
    async with open_backend(config(raw, format="raw", offset=offset)) as backend:
        assert backend.size == MIB - offset
        assert await read(backend, 0, 8) == b"raw!raw!"
        await backend.write(0, b"here")
        await backend.flush()
        assert raw.read_bytes()[offset : offset + 4] == b"here"
    async with open_backend(config(make("q"), offset=offset)) as backend:
        assert backend.size == MIB - offset
        await backend.write(backend.size - 4, b"tail")
    async with open_backend(config(make("q").with_name("q"))) as backend:
        assert backend.size == MIB


async def test_the_window_of_a_qcow2_image_ends_at_its_end(make):
    path = make("image")
    async with open_backend(config(path, offset=MIB - 100)) as backend:
        await backend.write(96, b"tail")
    async with open_backend(config(path)) as backend:
        assert await read(backend, MIB - 5, 5) == b"\0tail"


async def test_an_offset_at_the_end_is_an_empty_disk_and_beyond_it_an_error(raw):
    async with open_backend(config(raw, format="raw", offset=MIB)) as backend:
        assert backend.size == 0
    assert await refusal(config(raw, format="raw", offset=MIB + 1), ConfigError) == (
        f"--offset: {MIB + 1} is beyond the end of {raw} ({MIB} bytes)"
    )


async def test_a_window_on_a_guessed_image_is_guarded_where_its_first_sector_shows(raw):
    async with open_backend(config(raw, offset=60)) as backend:
        with pytest.raises(OSError, match="look like vdi"):
            await backend.write(4, b"\x7f\x10\xda\xbe")
        await backend.write(0, b"QFI\xfb")


# --- backing chains --------------------------------------------------------------------------


async def test_a_chain_is_read_through(chain):
    async with open_backend(config(chain)) as backend:
        assert await read(backend, 4, 8) == b"raw!raw!"
        assert backend.statistics()["nodes"].keys() == {
            "root", "root.file",
            "root.backing", "root.backing.file",
            "root.backing.backing", "root.backing.backing.file",
        }  # fmt: skip
        await backend.write(4, b"top!")
    async with open_backend(config(chain)) as backend:
        assert await read(backend, 0, 12) == b"raw!top!raw!"


async def test_reads_submitted_in_a_plug_are_handed_over_together(raw):
    async with open_backend(config(raw)) as backend:
        engine = backend.root.children["file"]._engine
        before = engine.statistics().batches
        with backend.plug():
            for offset in range(0, 40, 4):
                assert backend.submit_read(offset, memoryview(bytearray(4)), lambda error: None)
        assert engine.statistics().batches == before + 1


async def test_only_the_top_is_writable(chain):
    async with open_backend(config(chain)) as backend:
        node, found = backend.root, []
        while node is not None:
            found.append((node.read_only, node.children["file"].read_only))
            node = node.children.get("backing")
    assert found == [(False, False), (True, True), (True, True)]


async def test_backing_names_are_relative_to_the_overlay(tmp_path, make, raw, monkeypatch):
    make("sub/mid.qcow2", "../disk.img", "raw")
    top = make("top.qcow2", "sub/mid.qcow2")
    monkeypatch.chdir("/")
    async with open_backend(config(top)) as backend:
        assert await read(backend, 0, 4) == b"raw!"
    monkeypatch.chdir(tmp_path / "sub")
    async with open_backend(config("../top.qcow2")) as backend:
        assert await read(backend, 0, 4) == b"raw!"


async def test_to_the_overlay_as_it_was_named_that_is(tmp_path, make, raw):
    """As QEMU: of a symbolic link its own folder counts, not where it points."""
    make("sub/top.qcow2", "disk.img", "raw")
    (tmp_path / "link.qcow2").symlink_to("sub/top.qcow2")
    async with open_backend(config(tmp_path / "link.qcow2")) as backend:
        assert await read(backend, 0, 4) == b"raw!"
    assert "sub/disk.img: No such file" in await refusal(config(tmp_path / "sub" / "top.qcow2"))


async def test_absolute_backing_names(make, raw):
    for name in (str(raw), f"file:{raw}"):
        async with open_backend(config(make("top.qcow2", name, "raw"))) as backend:
            assert await read(backend, 0, 4) == b"raw!"


async def test_behind_file_a_name_is_relative_to_where_we_are(
    tmp_path, make, raw, monkeypatch
):
    """QEMU: a name with a protocol is not combined with the overlay's."""
    top = make("sub/top.qcow2", "file:disk.img", "raw")
    monkeypatch.chdir(tmp_path)
    async with open_backend(config(top)) as backend:
        assert await read(backend, 0, 4) == b"raw!"


@pytest.mark.parametrize(
    "name", ["nbd://localhost/x", "nbd:localhost:1", "http://x/y", "fat:x", ":x"]
)
async def test_a_backing_file_that_is_no_file_is_refused(make, name):
    top = make("top.qcow2", name, "raw")
    protocol = name.partition(":")[0]
    message = await refusal(config(top))
    assert message.startswith(f"{top}: backing file {name}: unknown protocol {protocol!r}")


async def test_a_colon_behind_a_slash_is_part_of_a_name(make, tmp_path):
    (tmp_path / "a:b").write_bytes(bytes(512))
    async with open_backend(config(make("top.qcow2", "./a:b", "raw"))):
        pass


async def test_the_format_of_a_backing_file_may_be_guessed(make, raw, caplog):
    mid, top = make("mid.qcow2", "disk.img", "raw"), make("top.qcow2", "mid.qcow2", "qcow2")
    for path in (mid, top):
        # A header extension whose type nobody knows is passed over.
        path.write_bytes(path.read_bytes().replace(bytes.fromhex("e2792aca"), b"none", 1))
    async with open_backend(config(top)) as backend:
        assert await read(backend, 0, 4) == b"raw!"
    assert caplog.records == []


async def test_a_missing_backing_file_is_named_with_its_overlay(tmp_path, make):
    top = make("top.qcow2", "gone.img", "raw")
    assert await refusal(config(top)) == (
        f"{top}: backing file {tmp_path}/gone.img: No such file or directory"
    )


async def test_deep_in_a_chain_the_overlay_that_names_it_is_told(tmp_path, make, raw):
    mid = make("mid.qcow2", "disk.img", "raw")
    make("upper.qcow2", "mid.qcow2")
    top = make("top.qcow2", "upper.qcow2")
    raw.unlink()
    assert await refusal(config(top)) == (
        f"{mid}: backing file {raw}: No such file or directory"
    )


async def test_a_backing_file_in_an_unknown_format(make, raw):
    top = make("top.qcow2", "disk.img", "vpc")
    assert await refusal(config(top)) == (
        f"{top}: backing file {raw}: unknown format 'vpc'; known are qcow2, raw"
    )


async def test_a_backing_file_that_is_damaged(make, raw):
    top = make("top.qcow2", "disk.img", "qcow2")
    message = await refusal(config(top))
    assert message.startswith(f"{top}: backing file ")
    assert f"{raw}" in message


LINKS = {"itself": None, "symbolic link": os.symlink, "hard link": os.link}


@pytest.mark.parametrize("link", ["symbolic link", "hard link"])
async def test_an_image_that_backs_itself(tmp_path, make, link):
    top = make("top.qcow2", "alias.qcow2")
    LINKS[link](top, tmp_path / "alias.qcow2")
    with trio.fail_after(10):
        message = await refusal(config(top))
    assert message == f"{top}: backing file {tmp_path}/alias.qcow2: the backing chain is a loop"


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("read_only", [True, False])
async def test_two_images_that_back_each_other(tmp_path, make, link, read_only):
    one = make("one.qcow2", "two.qcow2")
    two = make("two.qcow2", "one.qcow2" if link == "itself" else "alias.qcow2")
    if link != "itself":
        LINKS[link](one, tmp_path / "alias.qcow2")
    with trio.fail_after(10):
        message = await refusal(config(one, read_only=read_only))
    assert message.startswith(f"{two}: backing file ")
    assert message.endswith(": the backing chain is a loop")


def make_chain(make, length):
    """An image with `length` - 1 backing files; the lowest is empty."""
    make("0")
    for number in range(1, length):
        make(str(number), str(number - 1))
    return make(str(length - 1), str(length - 2))


async def test_the_longest_chain_works(make):
    path = make_chain(make, MAX_CHAIN + 1)
    async with open_backend(config(path)) as backend:
        assert await read(backend, 0, 4) == bytes(4)
        await backend.write(0, b"top")
        assert await read(backend, 0, 4) == b"top\0"


async def test_a_longer_chain_is_refused_in_one_short_line(tmp_path, make):
    path = make_chain(make, MAX_CHAIN + 2)
    message = await refusal(config(path))
    assert message == (
        f"{tmp_path}/1: backing file {tmp_path}/0: "
        f"the backing chain is longer than {MAX_CHAIN} images"
    )


async def test_the_same_base_may_be_in_use_by_many_overlays(make, raw):
    one, two = make("one.qcow2", "disk.img", "raw"), make("two.qcow2", "disk.img", "raw")
    async with open_backend(config(one)), open_backend(config(two)) as backend:
        assert await read(backend, 0, 4) == b"raw!"


# --- data files ------------------------------------------------------------------------------


@pytest.fixture
def with_data(tmp_path):
    """disk.qcow2, whose data is in data.raw, which it names by its whole path."""
    path = tmp_path / "disk.qcow2"
    create_image(str(path), MIB, data_file=str(tmp_path / "data.raw"), data_file_raw=True)
    return path


async def test_a_data_file_is_written_to_at_guest_offsets(with_data):
    before = with_data.read_bytes()
    async with open_backend(config(with_data)) as backend:
        await backend.write(70000, b"guest")
        data_file = backend.root.children["data-file"]
        assert isinstance(data_file, FileNode)
        assert backend.root.children["file"].filename == str(with_data)
    assert with_data.with_name("data.raw").read_bytes() == bytes(70000) + b"guest" + bytes(
        MIB - 70005
    )
    assert with_data.read_bytes() == before


async def test_its_name_counts_from_the_working_directory_as_in_qemu(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    create_image("images/disk.qcow2", MIB, data_file="data.raw")
    async with open_backend(config("images/disk.qcow2")) as backend:
        await backend.write(0, b"guest")
    assert (tmp_path / "data.raw").read_bytes()[:5] == b"guest"
    monkeypatch.chdir(tmp_path / "images")
    message = await refusal(config("disk.qcow2"))
    assert message == "disk.qcow2: data file data.raw: No such file or directory"


async def test_its_name_is_a_path_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_image("disk.qcow2", MIB, data_file="data.raw")
    content = (tmp_path / "disk.qcow2").read_bytes()
    (tmp_path / "disk.qcow2").write_bytes(content.replace(b"data.raw", b"file:raw"))
    assert "data file file:raw: No such" in await refusal(config("disk.qcow2"))
    (tmp_path / "data.raw").rename("file:raw")
    async with open_backend(config("disk.qcow2")):
        pass


@pytest.mark.parametrize("read_only", [False, True])
async def test_it_is_opened_as_its_image_is(with_data, read_only):
    mode = CACHE_MODES["unsafe"]
    async with open_backend(
        config(with_data, read_only=read_only, cache=mode, discard="ignore")
    ) as backend:
        data_file = backend.root.children["data-file"]
        assert data_file.read_only is read_only
        assert data_file.no_flush
        assert data_file._discard is not read_only  # the image decides what it passes on


async def test_two_images_do_not_write_to_one_data_file(tmp_path, with_data):
    other = tmp_path / "other.qcow2"
    other.write_bytes(with_data.read_bytes())
    data_file = tmp_path / "data.raw"
    async with open_backend(config(with_data)):
        message = await refusal(config(other), LockedError)
        assert message.startswith(f"{other}: data file {data_file}: in use by")
    both = [config(path, read_only=True) for path in (with_data, other)]
    async with open_backend(both[0]), open_backend(both[1]):
        pass


async def test_an_image_is_not_its_own_data_file(with_data):
    with_data.with_name("data.raw").unlink()
    os.link(with_data, with_data.with_name("data.raw"))
    for read_only in (False, True):
        message = await refusal(config(with_data, read_only=read_only))
        assert message.endswith("data.raw: holds an image of this chain already")


# --- locks -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def refused_while_open(first, second):
    async with open_backend(first):
        assert "in use by" in await refusal(second, LockedError)
        yield


LOCKED_OUT = {
    "two writers of a qcow2 image": (False, False),
    "a writer while it is read": (True, False),
    "a reader while it is written": (False, True),
}


@pytest.mark.parametrize("case", LOCKED_OUT)
async def test_qcow2_images_exclude(make, case):
    path = make("image")
    first, second = (config(path, read_only=read_only) for read_only in LOCKED_OUT[case])
    async with refused_while_open(first, second):
        pass
    async with open_backend(second):
        pass


async def test_readers_do_not_exclude_each_other(chain):
    async with (
        open_backend(config(chain, read_only=True)) as one,
        open_backend(config(chain, read_only=True)) as two,
    ):
        assert await read(one, 0, 4) == await read(two, 0, 4) == b"raw!"


async def test_an_image_that_backs_an_open_one_is_not_written(make, chain):
    async with refused_while_open(config(chain), config(chain.with_name("mid.qcow2"))):
        pass


async def test_an_image_that_is_written_backs_nothing(chain):
    mid = config(chain.with_name("mid.qcow2"))
    async with open_backend(mid):
        message = await refusal(config(chain), LockedError)
    assert message.startswith(f"{chain}: backing file {mid.filename}: in use by")


async def test_raw_images_may_be_written_by_two_as_in_qemu(raw):
    image = config(raw, format="raw")
    async with open_backend(image), open_backend(image):
        pass


async def test_an_image_that_is_refused_is_not_written(make, raw):
    path = make("image", "gone", "raw")
    before = path.read_bytes(), path.stat().st_mtime_ns
    await refusal(config(path))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


# --- cache modes -----------------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch):
    """Files that were synced, by name."""
    names = []

    def fdatasync(fd):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    return names


@pytest.mark.parametrize("mode", ["writeback", "writethrough", "unsafe"])
async def test_when_a_write_reaches_the_disk(raw, syncs, mode):
    async with open_backend(config(raw, format="raw", cache=CACHE_MODES[mode])) as backend:
        await backend.write(0, b"x")  # in writethrough one durable write
        await backend.flush()
        flushed = mode == "writeback"
        assert len(syncs) == flushed
        await backend.write(0, b"x", fua=True)
        await backend.flush()
        assert len(syncs) == flushed
        await backend.write_zeroes(0, 512, may_unmap=True, fua=True)
        await backend.discard(0, 512, fua=True)
        assert len(syncs) == {"writeback": 3, "writethrough": 2, "unsafe": 0}[mode]
        await backend.flush()
        assert len(syncs) == {"writeback": 3, "writethrough": 2, "unsafe": 0}[mode]


@pytest.mark.parametrize("mode", ["writethrough", "unsafe"])
async def test_modes_reach_all_of_a_chain(chain, syncs, mode):
    async with open_backend(config(chain, cache=CACHE_MODES[mode])) as backend:
        await backend.write(0, b"x" * 100)
        written = chain.read_bytes()
    assert set(syncs) == ({"top.qcow2"} if mode == "writethrough" else set())
    assert (b"x" * 100) in written
    assert chain.read_bytes()[:8] == b"QFI\xfb\0\0\0\x03"


async def test_unsafe_still_leaves_a_whole_image(chain, syncs):
    async with open_backend(config(chain, cache=CACHE_MODES["unsafe"])) as backend:
        await backend.write(5000, b"top!")
    assert syncs == []
    async with open_backend(config(chain)) as backend:
        assert await read(backend, 4996, 12) == b"raw!top!raw!"


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
async def test_discard(raw, discard):
    blocks = raw.stat().st_blocks
    async with open_backend(config(raw, format="raw", discard=discard)) as backend:
        await backend.discard(0, MIB // 2)
        await backend.write_zeroes(MIB // 2, MIB // 2, may_unmap=True)
    assert (raw.stat().st_blocks < blocks) is (discard == "unmap")
    assert raw.read_bytes()[MIB // 2 :] == bytes(MIB // 2)
    assert (raw.read_bytes()[:4] == b"raw!") is (discard == "ignore")


@pytest.mark.parametrize(
    ("mode", "unmapped"), [("off", False), ("on", False), ("unmap", True)]
)
async def test_detect_zeroes(raw, mode, unmapped):
    blocks = raw.stat().st_blocks
    async with open_backend(config(raw, format="raw", detect_zeroes=mode)) as backend:
        await backend.write(0, bytes(MIB))
    assert raw.read_bytes() == bytes(MIB)
    assert (raw.stat().st_blocks < blocks) is unmapped


# --- leaving ---------------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch):
    """Nodes in the order in which they were closed; `closed.errors` by type of node."""

    class Closed(list):
        errors: dict[type, Exception] = {}  # noqa: RUF012

    log = Closed()
    for kind in (FileNode, RawNode, Qcow2Node):

        async def close(self, kind=kind, real=kind.close):
            log.append((kind.__name__, os.path.basename(self.filename)))
            await real(self)
            if kind in log.errors:
                raise log.errors[kind]

        monkeypatch.setattr(kind, "close", close)
    log.errors = {}
    return log


async def test_nodes_close_from_the_root_down(chain, closed):
    async with open_backend(config(chain, offset=512)):
        assert closed == []
    assert closed[0] == ("RawNode", "top.qcow2")  # the window
    for above, below in [
        (("Qcow2Node", "top.qcow2"), ("FileNode", "top.qcow2")),
        (("Qcow2Node", "top.qcow2"), ("Qcow2Node", "mid.qcow2")),
        (("Qcow2Node", "mid.qcow2"), ("FileNode", "mid.qcow2")),
        (("Qcow2Node", "mid.qcow2"), ("RawNode", "disk.img")),
        (("RawNode", "disk.img"), ("FileNode", "disk.img")),
    ]:
        assert closed.index(above) < closed.index(below)
    assert len(closed) == 7


async def test_the_first_error_is_raised_when_all_is_closed(chain, closed):
    first, second = OSError(errno.EIO, "first"), OSError(errno.EIO, "second")
    closed.errors = {Qcow2Node: first, FileNode: second}
    with pytest.raises(OSError, match="first") as caught:
        async with open_backend(config(chain)):
            pass
    assert caught.value is first
    assert len(closed) == 6


async def test_even_a_bug_leaves_nothing_open(chain, closed):
    closed.errors = {Qcow2Node: ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        async with open_backend(config(chain)):
            pass
    assert len(closed) == 6


@pytest.mark.parametrize("image", ["raw", "chain"])
async def test_what_was_written_is_flushed_at_the_end(raw, chain, syncs, image):
    path = {"raw": raw, "chain": chain}[image]
    async with open_backend(config(path, format=None)) as backend:
        assert backend.write_nowait(600, b"x") is None or await backend.write(600, b"x") is None
        assert syncs == []
    assert set(syncs) == {path.name}


async def test_an_image_that_was_only_read_is_not_flushed(chain, syncs):
    async with open_backend(config(chain)) as backend:
        await read(backend, 0, 512)
    assert syncs == []


async def test_a_flush_that_fails_at_the_end_is_told(raw, monkeypatch):
    def fdatasync(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    with pytest.raises(OSError, match="Input/output error"):
        async with open_backend(config(raw, format="raw")) as backend:
            await backend.write(0, b"x")


async def test_what_fails_in_the_body_is_raised_when_all_is_closed(chain, closed):
    with pytest.RaisesGroup(KeyError):
        async with open_backend(config(chain)):
            raise KeyError
    assert len(closed) == 6


@pytest.mark.parametrize("how", ["left", "failed", "cancelled"])
async def test_requests_that_still_run_are_cut_off_before_nodes_close(raw, closed, how):
    events = []

    async def request():
        try:
            await trio.sleep_forever()
        finally:
            events.append(("cut off", list(closed)))

    with contextlib.suppress(ExceptionGroup), trio.CancelScope() as scope:
        async with open_backend(config(raw, format="raw")) as backend:
            backend.nursery.start_soon(request)
            await trio.testing.wait_all_tasks_blocked()
            if how == "failed":
                raise KeyError
            if how == "cancelled":
                scope.cancel()
                await trio.lowlevel.checkpoint()
    assert events == [("cut off", [])]
    assert len(closed) == 2


async def test_a_write_in_a_thread_is_waited_for_before_its_file_closes(raw, closed, monkeypatch):
    """The kernel cannot be called back, and the descriptor's number may be reused."""
    entered, go = trio.Event(), threading.Event()
    token, pwritev, states = trio.lowlevel.current_trio_token(), os.pwritev, []

    def slow(fd, buffers, offset):
        token.run_sync_soon(entered.set)
        assert go.wait(20)
        states.append(list(closed))
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(file_module.os, "pwritev", slow)
    async with open_backend(config(raw, format="raw")) as backend:
        backend.nursery.start_soon(backend.write, 0, b"late")
        await entered.wait()
        threading.Timer(0.02, go.set).start()
    assert states == [[]]
    assert raw.read_bytes()[:4] == b"late"


async def test_so_is_a_read_that_no_task_waits_for(raw, closed, monkeypatch):
    """`submit_read` makes no task that could be cut off; its client may be long gone."""
    entered, go = trio.Event(), threading.Event()
    token, preadv, states = trio.lowlevel.current_trio_token(), os.preadv, []

    def slow(fd, buffers, offset, flags=0):
        token.run_sync_soon(entered.set)
        assert go.wait(20)
        states.append(list(closed))
        return preadv(fd, buffers, offset)

    data, completed = memoryview(bytearray(4)), []
    async with open_backend(config(raw, format="raw")) as backend:
        monkeypatch.setattr(file_module.os, "preadv", slow)
        assert backend.submit_read(0, data, completed.append)
        await entered.wait()
        threading.Timer(0.02, go.set).start()
    assert states == [[]]
    assert completed == [None]
    assert data == b"raw!"


async def test_a_nodes_own_task_ends_before_it_closes(make, closed, monkeypatch):
    """Else it might flush, or discard clusters, into a descriptor that is closed."""
    events = []

    async def settle(self):
        try:
            await trio.sleep_forever()
        finally:
            events.append(list(closed))

    monkeypatch.setattr(Qcow2Node, "settle", settle)
    async with open_backend(config(make("image"))):
        await trio.testing.wait_all_tasks_blocked()
    assert events == [[]]


async def test_read_only_nodes_have_no_task(chain, monkeypatch):
    started = []

    async def settle(self):
        started.append(os.path.basename(self.filename))

    monkeypatch.setattr(Qcow2Node, "settle", settle)
    async with open_backend(config(chain)):
        await trio.testing.wait_all_tasks_blocked()
    assert started == ["top.qcow2"]


async def test_cancelled_while_opening(chain, monkeypatch):
    async def forever(*_, **__):
        await trio.sleep_forever()

    monkeypatch.setattr(opener, "open_qcow2", forever)
    with trio.move_on_after(0.05) as scope:
        async with open_backend(config(chain)):
            pytest.fail("it was opened")
    assert scope.cancelled_caught


async def test_a_body_that_is_cancelled_still_leaves_a_whole_image(make):
    path = make("image")
    content = random.Random(1).randbytes(300_000)
    with trio.CancelScope() as scope:
        async with open_backend(config(path)) as backend:
            await backend.write(70_000, content)
            scope.cancel()
            await trio.sleep_forever()
    async with open_backend(config(path)) as backend:
        assert isinstance(backend, BlockBackend)
        assert await read(backend, 70_000, len(content)) == content
