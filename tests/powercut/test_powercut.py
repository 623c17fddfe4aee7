"""The power of a tree that was asked for by options: what stands in the log, what comes after the
cut, and what its outcomes are good for."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import trio

from fakes import no_descriptor_left
from interop.tools import BareClient, wait_until
from nbdserve.blockdev import MemoryOptions, Qcow2Options, RawOptions, parse_node
from nbdserve.config import CACHE_MODES, ImageConfig
from nbdserve.errors import ConfigError, ImageError
from nbdserve.filters.power_cut import power_cut_of
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.imageopts import parse_image_opts
from nbdserve.powercut.content import Content
from nbdserve.powercut.powercut import Outcome, PowerCut, PowerLost, file_names
from nbdserve.powercut.writelog import WriteLog
from qcow2_model import assert_sound, guest_bytes

MIB = 1 << 20
ABOVE = "driver=power-cut,file.driver=qcow2,file.file.filename=disk.qcow2"
BELOW = "driver=qcow2,file.driver=power-cut,file.file.filename=disk.qcow2"
RAW = "driver=power-cut,file.driver=raw,file.file.filename=disk.img"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_image("disk.qcow2", 4 * MIB)
    write_old()
    with no_descriptor_left():
        yield


def config(text, **options):
    return ImageConfig("disk", options=parse_node(parse_image_opts(text)), **options)


def opened(text, **options):
    return open_backend(config(text, **options))


async def first(backend, length=4):
    data = bytearray(length)
    await backend.read(0, memoryview(data))
    return bytes(data)


def write_old():
    pathlib.Path("disk.img").write_bytes(b"old." * (MIB // 4))


def files():
    return [pathlib.Path(name).read_bytes() for name in ("disk.qcow2", "disk.img")]


# --- the cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [ABOVE, BELOW, RAW])
async def test_after_the_cut_nothing_happens(place):
    async with opened(place) as backend:
        power_cut = power_cut_of(backend.root)
        await backend.write(0, b"kept")
        await backend.flush()
        power_cut.mark("kept")
        await backend.write(0, b"lost")
        outcome = power_cut.cut()
        assert power_cut.is_cut
        assert outcome.marks == ("kept",)
        moment = len(power_cut.log)
        before = files()
        for request in (
            backend.write(0, b"more"), backend.write(0, b"more", fua=True), backend.flush(),
            backend.write_zeroes(0, 4096, may_unmap=True),
        ):
            with pytest.raises(OSError, match="the power is cut"):
                await request
        if place is not BELOW:  # there its tables are in memory, and some of what they say
            with pytest.raises(OSError, match="the power is cut"):
                await first(backend)
            with pytest.raises(OSError, match="the power is cut"):
                await backend.block_status(0, 4096)
        with pytest.raises(PowerLost):
            power_cut.mark("too late")
        assert len(power_cut.log) == moment
        assert power_cut.cut().content == outcome.content
        other = power_cut.cut(seed=1)
        assert other.content != outcome.content
    assert files() == before
    disk = outcome.content.read(0, 4)
    if place is BELOW:
        assert_sound(bytes(outcome.content), leaks_allowed=True)
        disk = guest_bytes(bytes(outcome.content))[:4]
    assert disk == b"kept"


async def test_what_had_not_returned_fails_and_may_be_there():
    async with opened(RAW) as backend:
        node = backend.root
        arrived, go = trio.Event(), trio.Event()
        write = node.file.write

        async def slow(offset, data):
            arrived.set()
            await go.wait()
            await write(offset, data)

        node.file.write = slow
        failed = []

        async def client(offset):
            with pytest.raises(PowerLost):
                await backend.write(offset, b"new.")
            failed.append(offset)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client, 0)
            await arrived.wait()
            nursery.start_soon(client, 2)  # waits for the other, which it overlaps
            await trio.testing.wait_all_tasks_blocked()
            power_cut = power_cut_of(node)
            outcomes = [power_cut.cut(seed).content.read(0, 6) for seed in (0, 1)]
            go.set()
        assert sorted(failed) == [0, 2]
        assert outcomes == [b"old.ol", b"new.ol"]


async def test_no_flush_makes_nothing_durable_where_flushes_do_nothing():
    for cache, expected in (("writeback", b"new."), ("unsafe", b"old.")):
        write_old()
        async with opened(RAW, cache=CACHE_MODES[cache]) as backend:
            await backend.write(0, b"new.")
            await backend.flush()
            await backend.write(512, b"new.", fua=True)
            content = power_cut_of(backend.root).cut().content
            assert content.read(0, 4) == content.read(512, 4) == expected


async def test_fua_is_durable_in_writethrough():
    async with opened(RAW, cache=CACHE_MODES["writethrough"]) as backend:
        await backend.write(0, b"new.")
        assert power_cut_of(backend.root).cut().content.read(0, 4) == b"new."


# --- outcomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [ABOVE, BELOW])
async def test_all_cuts_of_a_tree(place):
    """Each order was committed by a flush; no outcome lacks one that it has the note of."""
    async with opened(place) as backend:
        power_cut = power_cut_of(backend.root)
        for number in range(5):
            await backend.write(number * 65536, b"%d" % number * 65536)
            await backend.flush()
            power_cut.mark(str(number))
        outcomes = list(power_cut.all_cuts(300))
        assert len(outcomes) == 300
        assert {len(outcome.marks) for outcome in outcomes} == set(range(6))
        for outcome in outcomes:
            disk = bytes(outcome.content)
            if place is BELOW:
                assert_sound(disk, leaks_allowed=True)
                disk = guest_bytes(disk)
            for number in outcome.marks:
                at = int(number) * 65536
                assert disk[at : at + 65536] == number.encode() * 65536
            again = power_cut.outcome(outcome.moment, outcome.seed)
            assert again == outcome
        await backend.write(0, b"the world goes on")


async def test_the_image_and_its_data_file_have_one_log(tmp_path):
    create_image("with-data.qcow2", 4 * MIB, data_file="data.raw")
    tree = ("driver=qcow2,file.driver=power-cut,file.node-name=meta"
            ",file.file.filename=with-data.qcow2,file.log=both.log"
            ",data-file.driver=power-cut,data-file.file.filename=data.raw")
    async with opened(tree) as backend:
        power_cut = power_cut_of(backend.root)
        for number in range(3):
            await backend.write(number * 65536, b"%d" % number * 65536)
            await backend.flush()
            power_cut.mark(str(number))
        outcomes = list(power_cut.all_cuts(100))
    for outcome in outcomes:
        assert list(outcome.contents) == ["meta", "data.raw"]
        image, data = map(bytes, outcome.contents.values())
        assert_sound(image, leaks_allowed=True)
        disk = guest_bytes(image, b"", data)
        assert disk[:: 65536][: len(outcome.marks)] == b"012"[: len(outcome.marks)]
    with pytest.raises(ValueError, match=r"there are several files: meta, data\.raw"):
        outcome.content  # noqa: B018
    outcome.save(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"meta", "data.raw"}
    assert file_names(WriteLog.load("both.log")) == ["meta", "data.raw"]


@pytest.mark.parametrize("place", [RAW, BELOW])
async def test_an_outcome_is_opened_without_a_file(place):
    async with opened(place) as backend:
        await backend.write(0, b"kept")
        await backend.flush()
        outcome = power_cut_of(backend.root).cut()
    before = outcome.content.digest()
    leaf = MemoryOptions(content=outcome.content, filename="outcome")
    kind = Qcow2Options if place is BELOW else RawOptions
    async with open_backend(ImageConfig("outcome", options=kind(file=leaf))) as backend:
        assert await first(backend) == b"kept"
        await backend.write(0, b"more")
        await backend.write(MIB - 512, b"x" * 512, fua=True)
        await backend.write_zeroes(65536, 65536, may_unmap=True)
        await backend.flush()
        assert await first(backend) == b"more"
        assert (await backend.block_status(MIB // 2, MIB // 4))[0].length > 4096
    assert outcome.content.digest() == before  # it was a copy that changed


def test_names_of_files():
    power_cut = PowerCut()
    for name in ("/a/disk", "/b/disk", ""):
        power_cut.log.add_file(Content(10), name)
    assert file_names(power_cut.log) == ["disk", "disk.1", "disk.2"]
    assert list(power_cut.cut().contents) == ["disk", "disk.1", "disk.2"]


def test_one_file_is_saved_by_its_own_name_or_in_a_folder(tmp_path):
    outcome = Outcome(0, 0, (), {"disk": Content.of(b"x")})
    outcome.save(tmp_path)
    outcome.save(tmp_path / "other")
    assert (tmp_path / "disk").read_bytes() == (tmp_path / "other").read_bytes() == b"x"


# --- options --------------------------------------------------------------------------------------


async def test_without_a_history_only_now_can_be_had():
    async with opened(RAW + ",history=off") as backend:
        power_cut = power_cut_of(backend.root)
        for number in range(50):
            await backend.write(0, b"%04d" % number * 20_000)
            await backend.flush()
        assert len(power_cut.log.records) == 0
        await backend.write(0, b"last")
        found = {outcome.content.read(0, 4) for outcome in power_cut.all_cuts(10)}
        assert found == {b"0049", b"last"}
        with pytest.raises(ValueError, match="moment 3: the write log has"):
            power_cut.outcome(3, 0)


async def test_a_full_log_fails_what_would_change_the_disk(caplog):
    async with opened(RAW + ",max-data=1500k") as backend:
        await backend.write(0, b"x" * 400_000)
        for _ in range(2):
            with pytest.raises(OSError, match="the write log is full") as caught:
                await backend.write(0, b"y" * 400_000)
            assert caught.value.errno == 12
        assert await first(backend) == b"xxxx"
        assert power_cut_of(backend.root).cut(seed=1).content.read(0, 4) == b"xxxx"
    said = [each.getMessage() for each in caplog.records if "max-data" in each.getMessage()]
    assert len(said) == 1


REFUSED = [
    (RAW + ",max-data=1M", None),
    (RAW + ",max-data=512k", "disk.img: .* max-data"),
    (RAW + ",log=disk.img", "log: disk.img: exists and is no write log"),
    (RAW + ",log=missing/log", "log: missing/log: No such file"),
    (RAW + ",log=", "log: the path is empty"),
    (RAW + ",history=maybe", "history: 'maybe' is not on or off"),
    (RAW + ",size=3", "size: the driver power-cut has no such option"),
    (BELOW + ",data-file.driver=power-cut,data-file.file.filename=x", "keeps its data itself"),
    (ABOVE + ",history=on,file.file.driver=power-cut,file.file.file.filename=disk.qcow2"
     ",file.file.history=off", "history: another power-cut node of this tree says otherwise"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED)
async def test_options(text, said):
    text = text.replace("file.file.filename=disk.qcow2,history=on", "history=on")
    if said is None:
        async with opened(text):
            return
    with pytest.raises((ConfigError, ImageError), match=said):
        async with opened(text):
            pass


def test_no_name_asks_for_memory():
    with pytest.raises(ConfigError, match="unknown driver 'memory'"):
        parse_node({"driver": "memory"})


async def test_no_image_may_ask_for_a_power_cut():
    tree = {"driver": "power-cut", "file.driver": "raw", "file.file.filename": "disk.img",
            "log": "stolen"}
    create_image("asks.qcow2", MIB, backing_file="json:" + json.dumps(tree), backing_format="raw")
    with pytest.raises(ImageError, match="no image may ask for the driver 'power-cut'"):
        async with opened("driver=qcow2,file.filename=asks.qcow2"):
            pass
    assert "stolen" not in os.listdir()


async def test_a_power_cut_is_not_watched_by_the_guardian():
    """It would write past it, and after the cut."""

    class Guardian:
        def watch(self, *files, **options):
            watched.append(files)

    for text, expected in ((BELOW, 0), ("driver=qcow2,file.filename=disk.qcow2", 1)):
        watched = []
        with shared_by_drives(guardian=Guardian()) as shared:
            async with open_backend(config(text), shared):
                pass
        assert len(watched) == expected


# --- a log in a file ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [ABOVE, BELOW])
def test_a_server_that_is_killed_leaves_its_log(place, tmp_path):
    """kill -9: the log has all that was acknowledged, and cuts can be taken of it."""
    log = "log=the.log" if place is ABOVE else "file.log=the.log"
    server = subprocess.Popen(
        [sys.executable, "-m", "nbdserve", "serve", "-k", "sock", "--image-opts",
         f"{place},{log}"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: os.path.exists("sock"))
        client = BareClient(str(tmp_path / "sock"))
        for number in range(40):
            data = b"%02d" % number * 2048
            client.ask(client.request(client.WRITE, number, number * 4096, data))
            if number == 20:
                client.ask(client.request(client.FLUSH, 99, 0, 0))
        os.kill(server.pid, signal.SIGKILL)
        client.close()
    finally:
        server.kill()
        server.wait()
    log = WriteLog.load("the.log")
    power_cut = PowerCut(log)
    everything = bytes(log.replay()[0])
    least = bytes(power_cut.cut(seed=0).content)
    if place is BELOW:
        for outcome in power_cut.all_cuts(50):
            assert_sound(bytes(outcome.content), leaks_allowed=True)
        disk = guest_bytes(least)
    else:
        disk = least
        assert [everything[at : at + 2] for at in range(0, 40 * 4096, 4096)] == [
            b"%02d" % number for number in range(40)]
    assert [disk[at : at + 2] for at in range(0, 21 * 4096, 4096)] == [
        b"%02d" % number for number in range(21)]
