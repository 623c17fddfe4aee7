"""The programs people use, against our server: what goes in comes out, in every way to connect,
and what they say about an export is what they say about qemu-nbd's."""

import filecmp
import json
import shlex

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make, write_disk
from interop.tools import client, map_of

SIZE = 8 * MIB


@pytest.fixture
def empty(tmp_path):
    """An image with nothing in it."""
    return make(Recipe(SIZE, fill=0), tmp_path / "disk.qcow2")


@pytest.fixture
def filled(tmp_path):
    """An image of some of everything, and the raw disk it stands for."""
    backing = Recipe(5 * MIB, "cluster_size=4k")
    commands = ("write -P 7 1M 300k", "write -z 2M 100k", "discard 3M 1M", "write -P 9 7M 1k")
    image = make(Recipe(SIZE, backing=backing, commands=commands), tmp_path / "disk.qcow2")
    raw = tmp_path / "disk.raw"
    peers.qemu_img("convert", "-O", "raw", image, raw)
    return image, raw


@pytest.fixture
def source(tmp_path):
    """A raw disk to copy from."""
    path = tmp_path / "source"
    write_disk(path, SIZE)
    return path


# --- nbdinfo --------------------------------------------------------------------------------------


def said_of(uri, *options):
    """What nbdinfo says of the one export, without where it is and how long a request may be:
    ours may have 64 MiB, qemu-nbd's 32."""
    said = json.loads(peers.run("nbdinfo", "--json", *options, uri).stdout)
    (export,) = said.pop("exports")
    del export["uri"], export["block_size_maximum"]
    return said, export


@pytest.mark.parametrize("more", [(), ("-r",), ("-x", "a name", "-D", "what it is")])
@pytest.mark.peer("nbdinfo", "qemu-nbd", "qemu-img", "qemu-io")
def test_nbdinfo_says_the_same_of_us_as_of_qemu_nbd(filled, more):
    image, _ = filled
    name = "a name" if "-x" in more else ""
    with peers.qemu_nbd(image, *more) as qemu:
        uri = qemu.uri.replace("///", f"///{name.replace(' ', '%20')}")
        theirs = [said_of(uri), said_of(qemu.uri, "--list"), map_of(uri)]
        text = peers.run("nbdinfo", uri).stdout
    with peers.served(image, *more) as server:
        bare = server.uri.replace("a%20name", "")
        assert [said_of(server.uri), said_of(bare, "--list"), map_of(server.uri)] == theirs
        assert peers.run("nbdinfo", server.uri).stdout.splitlines()[:4] == text.splitlines()[:4]
        assert peers.run("nbdinfo", "--size", server.uri).stdout == f"{SIZE}\n"
        can = ("connect", "read", "write", "trim", "zero", "flush", "fua", "multi-conn", "df")
        for what in can:
            refused = "-r" in more and what in ("write", "trim", "zero")
            word = ("--is", "write") if what == "write" else ("--can", what)
            done = peers.run("nbdinfo", *word, server.uri, check=False)
            assert done.returncode == (2 if refused else 0), what


# --- copies in and out ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    (), ("--connections=4", "--requests=64"), ("--synchronous",), ("--request-size=4194304",),
    ("--destination-is-zero", "--flush"), ("--allocated",),
], ids=" ".join)
@pytest.mark.peer("nbdcopy", "qemu-img")
def test_nbdcopy_in_and_out(tmp_path, served, empty, source, options):
    with served(empty) as server:
        peers.run("nbdcopy", *options, source, server.uri)
        options = tuple(option for option in options if option != "--destination-is-zero")
        peers.run("nbdcopy", *options, server.uri, tmp_path / "out")
    assert filecmp.cmp(source, tmp_path / "out", shallow=False)
    peers.qemu_img_check(empty)
    peers.qemu_img_compare(source, empty)


@pytest.mark.peer("nbdcopy", "qemu-img")
def test_nbdcopy_from_one_server_to_another(tmp_path, served, empty, filled):
    image, raw = filled
    other = make(Recipe(SIZE, "cluster_size=512", fill=0), tmp_path / "other.qcow2")
    with served(image) as source, served(other) as target:
        peers.run("nbdcopy", source.uri, target.uri)
    peers.qemu_img_check(other)
    peers.qemu_img_compare(other, raw)


@pytest.mark.parametrize("options", ["", "-W -m 8", "-S 0", "--target-is-zero"])
@pytest.mark.peer("qemu-img")
def test_qemu_img_converts_into_our_export(served, empty, source, options):
    with served(empty) as server:
        peers.qemu_img("convert", "-n", *shlex.split(options), "-f", "raw", "-O", "raw",
                       source, server.uri)
        peers.qemu_img_compare(server.uri, source)
    peers.qemu_img_check(empty)
    peers.qemu_img_compare(source, empty)


@pytest.mark.peer("qemu-img", "qemu-io")
def test_qemu_io_through_our_server(served, empty):
    with served(empty) as server:
        peers.qemu_io(
            server.uri, "write -P 1 0 1M", "write -P 2 1000000 333", "write -f -P 3 3M 64k",
            "write -z 128k 64k", "write -z -u 256k 100k", "discard 512k 128k",
            "aio_write -P 4 5M 1M", "aio_write -P 5 6M 70k", "aio_flush", "flush",
            "writev -P 6 7M 4k 64k 100", "read -P 1 0 128k", "read -P 0 128k 64k",
            "read -P 0 256k 100k", "read -P 2 1000000 333", "read -P 4 5M 1M",
            options=("-f", "raw", "-d", "unmap"))
    peers.qemu_img_check(empty)
    peers.qemu_io(
        empty, "read -P 1 1000400 512", "read -P 2 1000000 333", "read -P 3 3M 64k",
        "read -P 0 128k 64k", "read -P 0 256k 100k", "read -P 5 6M 70k", "read -P 6 7M 4k")


@pytest.mark.peer("qemu-img")
def test_an_image_inside_an_export(tmp_path, served, empty, source):
    """An export can hold a qcow2 image as well as a file can; QEMU writes it, then reads it."""
    packed = tmp_path / "packed.qcow2"
    peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", source, packed)
    with served(empty) as server:
        peers.run("nbdcopy", packed, server.uri)
        inside = f"driver=qcow2,file.driver=nbd,file.path={server.socket_path}"
        peers.qemu_img("compare", "--image-opts", inside, f"driver=raw,file.filename={source}")
    peers.qemu_img_check(empty)


# --- fio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cluster_size", "job"), [
    # Blocks of 3 KiB: neighbours in flight share a cluster that is not there yet.
    ("64k", "--rw=randwrite --bs=3k --iodepth=32 --size=2304k --offset_increment=2304k"),
    ("4k", "--rw=randwrite --bs=9k --iodepth=16 --size=4608k --offset_increment=4608k"),
    ("2M", "--rw=randrw --bsrange=512-200k --bs_unaligned --iodepth=16 --size=8M"
           " --offset_increment=8M --serialize_overlap=1"),
    ("64k", "--rw=write --bs=1000k --iodepth=8 --size=8000k --offset_increment=8000k"),
], ids=["3k", "9k", "mixed", "1000k"])
@pytest.mark.peer("fio", "qemu-img")
def test_fio_verifies_what_it_wrote_over_four_connections(tmp_path, served, cluster_size, job):
    image = make(Recipe(32 * MIB, f"cluster_size={cluster_size}", fill=0), tmp_path / "disk")
    with served(image) as server:
        peers.run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--numjobs=4",
            "--thread", "--group_reporting", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0",
            *job.split())
    peers.qemu_img_check(image)


# --- libnbd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("replies", ["structured", "simple"])
@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io")
def test_reads_of_every_length_on_four_connections(served, filled, replies):
    image, raw = filled
    with served(image) as server:
        client("read", server.uri, raw, replies)


UNIFORM = ("write -P 7 0 1M", "write -P 9 1100k 50k", "write -z 1200k 300k")
"""Each sector of one byte: what the client action "overlap" needs."""


@pytest.mark.parametrize(("recipe", "server_options"), [
    (Recipe(SIZE, fill=0), ()),
    (Recipe(SIZE, "compat=0.10", fill=0), ()),
    (Recipe(SIZE, "cluster_size=512", fill=0), ()),
    (Recipe(SIZE, "cluster_size=2M", fill=0), ()),
    (Recipe(SIZE, "refcount_bits=1", fill=0, commands=UNIFORM), ("--detect-zeroes=unmap",)),
    (Recipe(SIZE, "cluster_size=4k", fill=0, commands=UNIFORM), ("--discard=ignore",)),
    (Recipe(SIZE, "cluster_size=16k", backing=Recipe(SIZE, fill=0, commands=UNIFORM)), ()),
    (Recipe(SIZE, "compat=0.10", backing=Recipe(MIB, fill=0, commands=UNIFORM[:1])), ()),
], ids=["64k", "v2", "512", "2M", "detect-zeroes", "no-discard", "backing", "short-backing"])
@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io")
def test_requests_in_flight_over_overlapping_ranges(tmp_path, served, recipe, server_options):
    image = make(recipe, tmp_path / "disk.qcow2")
    with served(image, *server_options) as server:
        client("overlap", server.uri, 4, 12)
        peers.qemu_img("convert", "-f", "raw", server.uri, tmp_path / "out")
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, tmp_path / "out")


@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io")
def test_overlapping_requests_that_are_never_synced(tmp_path, served):
    image = make(Recipe(SIZE, "cluster_size=16k", backing=Recipe(SIZE, fill=0, commands=UNIFORM)),
                 tmp_path / "disk.qcow2")
    options = (f"driver=qcow2,file.filename={image},file.aio={served.aio},cache.no-flush=on,"
               f"cache.direct={'on' if served.direct else 'off'}")
    with peers.served(options, "--image-opts") as server:
        client("overlap", server.uri, 4, 12)
    peers.qemu_img_check(image)


@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io")
def test_overlapping_requests_over_compressed_clusters(tmp_path, served):
    plain = make(Recipe(SIZE, fill=0, commands=UNIFORM), tmp_path / "plain.qcow2")
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("convert", "-O", "qcow2", "-c", plain, image)
    with served(image, write_cache=False) as server:
        client("overlap", server.uri, 4, 3)
    peers.qemu_img_check(image)


@pytest.mark.parametrize("replies", ["structured", "simple"])
@pytest.mark.peer("python3-libnbd", "qemu-img")
def test_requests_of_one_byte_and_of_64_mib(tmp_path, served, replies):
    image = make(Recipe(128 * MIB + 512, fill=0), tmp_path / "disk.qcow2")
    with served(image) as server:
        client("sizes", server.uri, replies)
    peers.qemu_img_check(image)


@pytest.mark.parametrize("cluster_size", ["512", "4k"])
@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io")
def test_one_read_over_thousands_of_pieces(tmp_path, served, cluster_size):
    image, raw = tmp_path / "disk.qcow2", tmp_path / "raw"
    step = 2 * (512 if cluster_size == "512" else 4 * KIB)
    with open(raw, "wb") as file:
        for number in range(1500):
            file.seek(number * step)
            file.write(bytes([number % 255 + 1]) * (step // 2))
        file.truncate(1500 * step)
    peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-S", "512",
                   "-o", f"cluster_size={cluster_size}", raw, image)
    with served(image) as server:
        client("checkered", server.uri, raw)


@pytest.mark.parametrize("action", ["requests", "status"])
@pytest.mark.peer("python3-libnbd", "qemu-img")
def test_flags_and_block_status(served, empty, action):
    with served(empty) as server:
        client(action, server.uri)
    peers.qemu_img_check(empty)


@pytest.mark.parametrize("mode", ["read-only", "writable"])
@pytest.mark.peer("python3-libnbd", "qemu-img")
def test_bad_requests_get_the_documents_errors(empty, mode):
    with peers.served(empty, *(["-r"] if mode == "read-only" else [])) as server:
        client("refused", server.uri, mode)
    peers.qemu_img_check(empty)


@pytest.mark.peer("python3-libnbd", "qemu-img")
def test_ways_to_negotiate(empty):
    with peers.served(empty, "-x", "ex port/1", "-D", "für alle") as server:
        client("options", server.uri, "ex port/1", "für alle", SIZE)
        client("export_name", server.uri, SIZE)
        client("unknown_export", server.uri.replace("///ex", "///no-"))
        client("unknown_export", server.uri.replace("///ex%20port/1", "///"))
    peers.qemu_img_check(empty)


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.peer("python3-libnbd", "qemu-img", "qemu-io", "nbdcopy")
def test_tcp(tmp_path, served, filled, bind):
    image, raw = filled
    with served(image, bind=bind) as server:
        assert ("[::1]" in server.uri) == (bind == "::1")
        client("read", server.uri, raw, "structured")
        peers.run("nbdcopy", server.uri, tmp_path / "out")
        client("apply", server.uri, _written(tmp_path / "operations"), raw)
    assert not filecmp.cmp(raw, tmp_path / "out", shallow=False)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, raw)


def _written(path):
    path.write_text(json.dumps(
        [("write", number * 100_000, 70_000, number) for number in range(40)]))
    return path


@pytest.mark.parametrize("bind", [None, "127.0.0.1"])
@pytest.mark.peer("python3-libnbd", "qemu-img")
def test_64_clients_at_once(served, empty, bind):
    with served(empty, bind=bind) as server:
        client("many", server.uri, 64)
    peers.qemu_img_check(empty)
