"""Options of nodes beside QEMU: what it takes we take, what it refuses we refuse, and the tree that
both make of the same words holds the same bytes."""

import json
import pathlib

import pytest
import trio

import peers
from interop.images import MIB, Recipe, make
from interop.tools import NBDSERVE, refused
from nbdserve.blockdev import parse_node
from nbdserve.config import ImageConfig, ThrottleLimits
from nbdserve.errors import NbdserveError
from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.imageopts import parse_image_opts

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Recipe(2 * MIB, fill=0.5), pathlib.Path("disk.qcow2"))
    make(Recipe(1 * MIB, format="raw"), pathlib.Path("base.img"))
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "top.qcow2")
    return tmp_path


def we_take(name, image_opts=True):
    """Whether an image opens, for writing, with a throttle group g at hand."""
    async def take():
        options = parse_node(parse_image_opts(name)) if image_opts else None
        with shared_by_drives({"g": ThrottleLimits()}) as shared:
            async with open_backend(ImageConfig(name, options=options), shared):
                pass

    try:
        trio.run(take)
    except NbdserveError:
        return False
    except BaseExceptionGroup as group:
        if group.split(NbdserveError)[1] is not None:
            raise
        return False
    return True


def qemu_takes(name, image_opts=True):
    group = ["--object", "throttle-group,id=g"] if image_opts else []
    words = ["--image-opts", name] if image_opts else [name]
    return peers.run("qemu-io", *group, *words, "-c", "read 0 512", check=False).returncode == 0


IMAGE = "driver=qcow2,file.filename=disk.qcow2"
TOP = "driver=qcow2,file.filename=top.qcow2"
WINDOW = "driver=raw,file.filename=base.img"


@pytest.mark.parametrize("text", [
    IMAGE, "file.filename=disk.qcow2", "driver=file,filename=disk.qcow2", f"{IMAGE},",
    "", "disk.qcow2", "file=disk.qcow2", "filename=disk.qcow2", "driver=qcow2",
    "driver=qcow2,filename=disk.qcow2", "driver=nonsense,file.filename=disk.qcow2",
    "driver=qcow2,,file.filename=disk.qcow2", f",{IMAGE}", f"{IMAGE},=x", f"{IMAGE},id=x",
    f"{IMAGE},file=x", "driver=qcow2,file=x,file.driver=file", f"{IMAGE},nonsense=1",
    f"{IMAGE},file.nonsense=1", f"{IMAGE},cache=none", f"{IMAGE},cache.writeback=on",
    f"{IMAGE},auto-read-only=yes", f"{IMAGE},read-only=off", f"{IMAGE},noread-only",
    f"{IMAGE},read-only=maybe", f"{IMAGE},cache.direct=", f"{IMAGE},cache.direct=true",
    f"{IMAGE},cache.no-flush=y", f"{IMAGE},cache.no-flush=Y", f"{IMAGE},cache.direct=1",
    f"{IMAGE},discard=on", f"{IMAGE},discard=x", f"{IMAGE},detect-zeroes=on",
    f"{IMAGE},detect-zeroes=unmap,discard=off", f"{IMAGE},detect-zeroes=unmap,discard=unmap",
    f"{IMAGE},detect-zeroes=x", f"{IMAGE},auto-read-only=on", f"{IMAGE},force-share=on",
    f"{IMAGE},node-name=disk-0.a_b", f"{IMAGE},node-name=1x", f"{IMAGE},node-name=",
    f"{IMAGE},node-name={'a' * 31}", f"{IMAGE},node-name={'a' * 32}",
    f"{IMAGE},node-name=a,file.node-name=a", f"{IMAGE},node-name=a,file.node-name=b",
    f"{IMAGE},file.aio=threads", f"{IMAGE},file.aio=native", f"{IMAGE},file.aio=x",
    f"{IMAGE},file.locking=on", f"{IMAGE},file.locking=off", f"{IMAGE},file.locking=x",
    f"{IMAGE},file.driver=file", f"{IMAGE},file.driver=host_device", f"{IMAGE},file.read-only=on",
    f"{IMAGE},l2-cache-size=1M", f"{IMAGE},l2-cache-size=x", f"{IMAGE},refcount-cache-size=1M",
    f"{IMAGE},cache-size=2M,l2-cache-size=1M", f"{IMAGE},cache-size=1M,l2-cache-size=2M",
    f"{IMAGE},cache-size=1M,l2-cache-size=512k,refcount-cache-size=512k",
    f"{IMAGE},backing.file.filename=base.img", f"{IMAGE},backing=", f"{IMAGE},backing.node-name=x",
    f"{IMAGE},backing.driver=file,backing.filename=base.img",
    f"{TOP},backing.node-name=x,backing.file.node-name=y", f"{TOP},backing=x", f"{TOP},backing=",
    f"{TOP},backing.driver=file,backing.filename=base.img", f"{TOP},backing.driver=qcow2",
    f"{TOP},backing.file.filename=disk.qcow2,backing.driver=qcow2",
    f"{TOP},backing.file.filename=gone", f"{TOP},backing.l2-cache-size=1M",
    WINDOW, f"{WINDOW},offset=1k", f"{WINDOW},size=1000", f"{WINDOW},size=1k,offset=512",
    f"{WINDOW},offset=2M", f"{WINDOW},offset=1M,size=512", f"{WINDOW},offset=x",
    "driver=raw,file.driver=qcow2,file.file.filename=disk.qcow2",
    "driver=qcow2,file.driver=raw,file.file.filename=disk.qcow2",
    "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=disk.qcow2",
    "driver=throttle,throttle-group=g,file.filename=disk.qcow2",
    "driver=throttle,throttle-group=h,file.filename=disk.qcow2",
    "driver=throttle,file.filename=disk.qcow2",
    "driver=qcow2,file.driver=throttle,file.throttle-group=g,file.file.filename=disk.qcow2",
    'driver=qcow2,file.filename=json:{"filename":"disk.qcow2"}',
    "driver=qcow2,file.filename=file:disk.qcow2",
])  # fmt: skip
def test_image_opts_are_taken_or_refused_as_by_qemu(here, text):
    assert we_take(text) == qemu_takes(text)


@pytest.mark.parametrize("text", [
    '{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}',
    "{'driver':'qcow2','file':{'filename':'disk.qcow2'}}",
    "{'driver':'qcow2','file.filename':'disk.qcow2'}",
    "{'driver':'qcow2','file.driver':'file','file':{'filename':'disk.qcow2'}}",
    "{'file':{'filename':'disk.qcow2'},'read-only':false}",
    "{'file':{'filename':'disk.qcow2'},'read-only':'off'}",
    "{'file':{'filename':'disk.qcow2'},'read-only':0}",
    "{'file':{'filename':'disk.qcow2'},'l2-cache-size':65536}",
    "{'file':{'filename':'disk.qcow2'},'l2-cache-size':'64k'}",
    "{'file':{'filename':'disk.qcow2'},'nonsense':{}}",
    "{'file':{'filename':'disk.qcow2'},'backing':null}",
    "{'file':{'filename':'disk.qcow2'},'file':{'filename':'disk.qcow2'}}",
    "{'filename':'disk.qcow2'}", "{'file':'disk.qcow2'}", "{'driver':'file'}",
    "[]", "{", "", "null", "{'file.filename':'disk.qcow2'} x", "{'file.filename':'disk.qcow2}",
    r"{'file':{'filename':'\u0064isk.qcow2'}}", r"{'file':{'filename':'disk.qcow2\u0000'}}",
])  # fmt: skip
def test_json_names_are_taken_or_refused_as_by_qemu(here, text):
    assert we_take(f"json:{text}", False) == qemu_takes(f"json:{text}", False)


def test_where_we_refuse_and_qemu_does_not(here):
    """The list in docs/options.md, "Where it differs from QEMU"."""
    for text in (
        f"{IMAGE},read-only=on,read-only=off",
        f"{TOP},backing.read-only=off",
        f"{IMAGE},lazy-refcounts=on",
        f"{IMAGE},file.detect-zeroes=on",
        f"{WINDOW},backing=",
        "driver=raw,file.discard=off,file.driver=qcow2,file.file.filename=disk.qcow2",
        "file.driver=raw,file.file.filename=disk.qcow2",
    ):
        assert (text, we_take(text), qemu_takes(text)) == (text, False, True)
    for text in (
        "json:{'file':{'filename':'disk.qcow2'},'l2-cache-size':[]}",
        "json:{'driver':null,'file':{'filename':'disk.qcow2'}}",
        "json:{'file':{'filename':'disk.qcow2'},'file.filename':'disk.qcow2'}",
    ):
        assert (text, we_take(text, False), qemu_takes(text, False)) == (text, False, True)


TREES = [
    (IMAGE, 2 * MIB),
    (f"{IMAGE},cache.direct=on,file.aio=io_uring", 2 * MIB),
    (f"{IMAGE},cache.no-flush=on,l2-cache-size=0", 2 * MIB),
    (f"{TOP},backing.cache.direct=on", 1 * MIB),
    (f"{TOP},backing=", 1 * MIB),
    (f"{TOP},backing.file.filename=disk.qcow2,backing.driver=qcow2", 1 * MIB),
    (f"{WINDOW},offset=1k,size=64k", 64 << 10),
    ("driver=raw,offset=3,size=64k,file.driver=qcow2,file.file.filename=disk.qcow2", 64 << 10),
    ("driver=qcow2,file.driver=raw,file.file.filename=top.qcow2", 1 * MIB),
]


def identical(uri, text, copy):
    """Compare what a server has with what QEMU reads from the same tree."""
    peers.qemu_img("convert", "-U", "--image-opts", "-O", "raw", text, copy)
    peers.qemu_img_compare(uri, copy)


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.parametrize(("text", "size"), TREES)
def test_a_tree_is_served_and_written(here, text, size, command):
    always = ("-t",) if command == "qemu-nbd" else ()
    with peers.served(text, "--image-opts", *always, command=command) as server:
        info = json.loads(peers.qemu_img("info", "--output=json", server.uri))
        assert info["virtual-size"] == size
        identical(server.uri, text, "before")
        peers.qemu_io(server.uri, "write -P 7 1000 30000", "write -z 512 1k", "flush",
                      options=("-f", "raw"))
        server.stop()
    for image in ("disk.qcow2", "top.qcow2"):
        peers.qemu_img_check(image)
    with peers.served(text, "--image-opts", "-r", *always, command=command) as server:
        identical(server.uri, text, "after")
        peers.qemu_io(server.uri, "read -P 7 2000 29000", options=("-r", "-f", "raw"))


@pytest.mark.parametrize("name", [
    "json:{'driver':'raw','file':{'driver':'file','filename':'base.img'}}",
    'json:{"driver":"raw","offset":1024,"file.filename":"base.img"}',
    'json:{"driver":"raw","size":"64k","file.driver":"file","file.filename":"base.img"}',
    "json:{'file':{'filename':'base.img','locking':'off'}}",
    "file:base.img",
])  # fmt: skip
def test_an_overlay_on_a_name_with_options(here, name):
    base = (here / "base.img").read_bytes()
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "over.qcow2", "1M")
    with peers.served("over.qcow2") as server:
        identical(server.uri, "driver=qcow2,file.filename=over.qcow2", "before")
        peers.qemu_io(server.uri, "write -P 7 1000 30000", "flush", options=("-f", "raw"))
    peers.qemu_img_check("over.qcow2")
    peers.qemu_io("over.qcow2", "read -P 7 1000 30000", options=("-f", "qcow2"))
    with peers.served("over.qcow2", "-r") as server:
        identical(server.uri, "driver=qcow2,file.filename=over.qcow2", "after")
    assert (here / "base.img").read_bytes() == base


def test_an_overlay_that_we_make_on_such_a_name(here):
    name = 'json:{"driver":"raw","offset":512,"file.filename":"base.img"}'
    peers.run(*NBDSERVE, "create", "-b", name, "-F", "raw", "over.qcow2")
    info = json.loads(peers.qemu_img("info", "--output=json", "over.qcow2"))
    assert (info["backing-filename"], info["virtual-size"]) == (name, MIB - 512)
    with peers.served("over.qcow2") as server:
        identical(server.uri, "driver=qcow2,file.filename=over.qcow2", "copy")


def test_a_chain_on_json_names(here):
    """Down to an image whose own backing file is in yet another folder."""
    (here / "sub").mkdir()
    names = ["json:{'driver':'qcow2','file.filename':'top.qcow2'}",
             'json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/1.qcow2"}}']
    for number, name in enumerate(names, 1):
        peers.qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2",
                       f"sub/{number}.qcow2")
        peers.qemu_io(f"sub/{number}.qcow2", f"write -P {number} {number}00k 10k",
                      options=("-f", "qcow2"))
    with peers.served("sub/2.qcow2") as server:
        identical(server.uri, "driver=qcow2,file.filename=sub/2.qcow2", "copy")


def test_a_missing_file_behind_json(here):
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "json:{'file.filename':'gone'}",
                   "-F", "raw", "over.qcow2", "1M")
    assert refused("over.qcow2") == (
        "nbdserve: over.qcow2: backing file gone: No such file or directory\n"
    )


@pytest.mark.peer("nbdinfo")
def test_several_exports_that_share_a_throttle(here):
    options = ("-x", "one", "--export", "two=top.qcow2", "--object",
               "throttle-group,id=g,x-iops-total=100000", "--throttle", "group=g")
    with peers.served("disk.qcow2", *options) as server:
        assert server.stdout().endswith(f"\n'nbd+unix:///two?socket={server.socket_path}'\n")
        listed = json.loads(peers.run("nbdinfo", "--list", "--json", server.uri).stdout)
        sizes = {export["export-name"]: export["export-size"] for export in listed["exports"]}
        assert sizes == {"one": 2 * MIB, "two": MIB}
        for name, image in (("one", "disk.qcow2"), ("two", "top.qcow2")):
            uri = f"nbd+unix:///{name}?socket={server.socket_path}"
            identical(uri, f"driver=qcow2,file.filename={image}", "copy")
            peers.qemu_io(uri, "write -P 3 5000 5000", "flush", options=("-f", "raw"))
    for image in ("disk.qcow2", "top.qcow2"):
        peers.qemu_img_check(image)
        peers.qemu_io(image, "read -P 3 5000 5000", options=("-f", "qcow2"))


def test_the_second_image_is_refused_like_the_first(here):
    line = refused("disk.qcow2", "--export", "two=gone.qcow2")
    assert line == "nbdserve: gone.qcow2: No such file or directory\n"
    assert "in use by" in refused("disk.qcow2", "--export", "two=disk.qcow2")


def test_force_share_reads_beside_a_writer(here):
    with peers.qemu_nbd("disk.qcow2"):
        assert "in use by" in refused("disk.qcow2", "-r")
        with peers.served("disk.qcow2", "-r", "--force-share") as server:
            identical(server.uri, IMAGE, "copy")
        with peers.served(f"{IMAGE},force-share=on", "--image-opts", "-r", "-t",
                          command="qemu-nbd") as server:
            identical(server.uri, IMAGE, "copy")
