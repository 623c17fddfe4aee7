"""What is refused: one line on stderr that names what is wrong, exit status 1, and not a byte of
the image changed."""

import contextlib
import os
import socket
import struct
import tempfile

import pytest

import peers
from facilities import lacking
from interop.images import MIB, Recipe, make
from interop.tools import refused, sha256

INCOMPATIBLE_FEATURES = 72
"""Offset of the header field ("incompatible_features")."""


@pytest.fixture
def image(tmp_path):
    return make(Recipe(4 * MIB, fill=0, commands=("write -P 1 0 1M",)), tmp_path / "disk.qcow2")


@pytest.fixture
def socket_path():
    """Where a server would listen, if it came to that; nothing may be there afterwards."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        path = os.path.join(folder, "s")
        yield path
        assert not os.path.lexists(path)


def refuse(image, socket_path, *options, command="serve"):
    """The one line, of an image that is as it was afterwards."""
    before = sha256(image)
    line = refused("-k", socket_path, *options, image, command=command)
    assert sha256(image) == before
    return line


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.parametrize(("options", "says"), [
    (["--nonsense"], "--nonsense"),
    (["-p", "65536"], "--port"),
    (["-p", "http"], "--port"),
    (["-e", "-1"], "--shared"),
    (["-e", "many"], "--shared"),
    (["--aio=native"], "--aio=native needs O_DIRECT"),
    (["--cache=fast"], "--cache"),
    (["--discard=maybe"], "--discard"),
    (["--detect-zeroes=maybe"], "--detect-zeroes"),
    (["-f", "vmdk"], "vmdk"),
    (["-f", ""], "format"),
    (["--image-refs=some"], "--image-refs: 'some' is neither any nor none nor a folder"),
    (["-o", "4M1"], "--offset"),
    (["-o", "-1"], "--offset"),
    (["-o", "5M"], "--offset"),
    (["-x", "x" * 5000], "export"),
    (["-D", "x" * 5000], "description"),
    (["--cache"], "--cache"),
    (["-k", "/tmp/" + "x" * 200], "--socket"),
    (["-k", "/no/such/folder/s"], "/no/such/folder/s"),
    (["--pid-file", "/no/such/folder/pid"], "/no/such/folder/pid"),
    (["second.qcow2"], "second.qcow2"),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_bad_option(image, socket_path, command, options, says):
    # The image first: an option that wants a value must not take it.
    before = sha256(image)
    line = refused("-k", socket_path, image, *options, command=command)
    assert says in line
    assert sha256(image) == before


@pytest.mark.parametrize(("options", "says"), [
    (["-s"], "--snapshot"), (["-c", "/dev/nbd0"], "--connect"),
    (["-l", "x"], "--load-snapshot"), (["--tls-creds=x"], "--tls-creds")])
@pytest.mark.peer("qemu-img", "qemu-io")
def test_an_option_of_qemu_nbd_that_is_not_there_yet(image, socket_path, options, says):
    assert says in refuse(image, socket_path, *options, command="qemu-nbd")


@pytest.mark.parametrize("argv", [[], ["-k", "s"]])
def test_no_image(argv):
    assert "IMAGE" in refused(*argv)


def test_an_unknown_command():
    assert "sevre" in refused("disk.qcow2", command="sevre")


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_place_in_use(image, tmp_path, socket_path, family):
    before = sha256(image)
    if family == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            line = refused("-p", port, image)
        assert port in line
    else:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
            other.bind(socket_path)
            other.listen()
            assert socket_path in refused("-k", socket_path, image)
        os.unlink(socket_path)
        note = tmp_path / "note"
        note.write_text("not a socket")
        assert str(note) in refused("-k", note, image)
        assert note.read_text() == "not a socket"
    assert sha256(image) == before


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [[], ["-f", "qcow2"], ["-f", "raw"]], ids=" ".join)
@pytest.mark.parametrize(("kind", "reason"), [
    ("missing", "No such file"), ("directory", "irectory"), ("fifo", ""), ("socket", ""),
    ("/dev/null", ""), ("dangling", "No such file"), ("not/there", "No such file")])
def test_what_is_no_image(tmp_path, socket_path, kind, reason, format):
    path = tmp_path / kind
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
                sock.bind(str(path))
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
    line = refused("-k", socket_path, *format, path)
    assert str(path) in line
    assert reason in line


@pytest.mark.parametrize(("content", "says"), [
    (b"", "qcow2"), (b"QFI\xfb", "qcow2"), (b"not an image" * 1000, "qcow2"),
    (b"QFI\xfb\0\0\0\x09" + bytes(1000), "version"), (b"QFI\xfb\0\0\0\x03" + bytes(1000), ""),
    (b"QFI\xfb\0\0\0\x03" + b"\xff" * 1000, ""),
], ids=["empty", "magic", "text", "version 9", "zeroes", "ones"])
def test_qcow2_that_is_none(tmp_path, socket_path, content, says):
    path = tmp_path / "disk"
    path.write_bytes(content)
    line = refuse(path, socket_path, "-f", "qcow2")
    assert "disk" in line
    assert says in line


@pytest.mark.parametrize("read_only", [[], ["-r"]], ids=" ".join)
@pytest.mark.peer("qemu-img")
def test_another_format_is_not_taken_for_raw(tmp_path, socket_path, read_only):
    path = tmp_path / "disk.vmdk"
    peers.qemu_img("create", "-q", "-f", "vmdk", path, "1M")
    assert "vmdk" in refuse(path, socket_path, *read_only)


@pytest.mark.peer("qemu-img", "qemu-io", "setpriv")
def test_a_file_that_may_only_be_read(image, socket_path):
    image.chmod(0o400)
    # Root may write it all the same, but for a root without that capability.
    program = ("setpriv", "--bounding-set=-dac_override") if os.getuid() == 0 else ()
    before = sha256(image)
    line = refused("-k", socket_path, image, program=program)
    assert "Permission denied" in line
    assert sha256(image) == before


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.parametrize("kind", ["backing file", "data file"])
@pytest.mark.peer("qemu-img")
def test_a_file_that_an_image_may_not_name(tmp_path, socket_path, command, kind):
    secret, image, elsewhere = (tmp_path / name for name in ("secret", "top.qcow2", "elsewhere"))
    secret.write_bytes(bytes(MIB))
    elsewhere.mkdir()
    options = {
        "backing file": ("-F", "raw", "-b", secret),
        "data file": ("-o", f"data_file={secret}"),
    }
    peers.qemu_img("create", "-q", "-f", "qcow2", *options[kind], image, "1M")
    for allowed, says in (("none", "images may name no other"), (elsewhere, f"not in {elsewhere}")):
        line = refuse(image, socket_path, f"--image-refs={allowed}", command=command)
        assert f"{image}: {kind} {secret}: " in line
        assert says in line
    with peers.served(image, f"--image-refs={tmp_path}"):
        pass


# --- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [[], ["-r"]], ids=" ".join)
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_qemu_has_it_open_for_writing(image, socket_path, ours):
    with peers.qemu_nbd(image):
        line = refuse(image, socket_path, *ours)
    assert str(image) in line
    assert "lock" in line


@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_qemu_has_it_open_for_reading(image, socket_path):
    with peers.qemu_nbd(image, "-r"):
        assert "lock" in refuse(image, socket_path)
        with peers.served(image, "-r") as server:
            peers.qemu_img("info", server.uri)


@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_we_have_it_open(image, socket_path):
    with peers.served(image):
        for words in (["info", image], ["check", image], ["resize", image, "+1M"],
                      ["snapshot", "-c", "s", image]):
            done = peers.run("qemu-img", *words, check=False)
            assert done.returncode == 1, words
            assert "lock" in done.stderr
        peers.qemu_img("info", "-U", image)
        assert "lock" in refuse(image, socket_path)
        with pytest.raises(peers.PeerFailed, match="lock"), peers.qemu_nbd(image):
            pass
    with peers.served(image, "-r"), peers.served(image, "-r"), peers.qemu_nbd(image, "-r"):
        peers.qemu_img("info", image)
        assert peers.run("qemu-img", "resize", image, "+1M", check=False).returncode == 1
    peers.qemu_img("resize", image, "+1M")


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_backing_file_in_use_is_locked_too(tmp_path, socket_path):
    overlay = make(Recipe(MIB, backing=Recipe(MIB)), tmp_path / "disk.qcow2")
    base = tmp_path / "below" / "base.qcow2"
    with peers.served(overlay):
        assert peers.run("qemu-img", "resize", base, "+1M", check=False).returncode == 1
        assert "lock" in refuse(base, socket_path)
        with peers.served(base, "-r"):
            peers.qemu_img("info", base)
    with peers.qemu_nbd(base):
        line = refuse(overlay, socket_path)
    assert str(base) in line
    assert "lock" in line


# --- features -------------------------------------------------------------------------------------


def extended_l2(path):
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "4M")


def encrypted_luks(path):
    # qemu-img measures the key derivation and gives up where the machine is too busy for that.
    for _ in range(20):
        if _encrypt(path, "luks", "encrypt.iter-time=10").returncode == 0:
            return
    lacking("qemu-img: Unable to get accurate CPU usage, twenty times")


def encrypted_aes(path):
    assert _encrypt(path, "aes").returncode == 0


def _encrypt(path, method, *options):
    words = ",".join([f"encrypt.format={method}", "encrypt.key-secret=s", *options])
    return peers.run("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x",
                     "-o", words, path, "4M", check=False)


def plain(path):
    peers.qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    peers.qemu_io(path, "write -P 1 0 1M")


def snapshots(path):
    plain(path)
    peers.qemu_img("snapshot", "-c", "before", path)
    peers.qemu_io(path, "write -P 2 512k 1M")


def bitmaps(path):
    plain(path)
    peers.qemu_img("bitmap", "--add", path, "changed")


def not_closed(path):
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    with peers.qemu_nbd(path) as server:
        peers.qemu_io(server.uri, "write -P 1 0 1M", "flush", options=("-f", "raw"))
        server.kill()


def set_feature(path, bit):
    plain(path)
    with open(path, "r+b") as file:
        file.seek(INCOMPATIBLE_FEATURES)
        file.write(struct.pack(">Q", 1 << bit))


def corrupt(path):
    set_feature(path, 1)


def unknown_feature(path):
    set_feature(path, 40)


NEVER = [(extended_l2, "extended L2"), (encrypted_luks, "encrypt"), (encrypted_aes, "encrypt"),
         (unknown_feature, "40")]
READ_ONLY = [(snapshots, "snapshot"), (bitmaps, "bitmap"), (not_closed, "not closed cleanly"),
             (corrupt, "corrupt")]


@pytest.mark.parametrize(("build", "says"), NEVER + READ_ONLY, ids=lambda p: getattr(
    p, "__name__", "-"))
@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")
def test_a_feature_that_is_not_served(tmp_path, socket_path, build, says):
    path = tmp_path / "disk.qcow2"
    build(path)
    for command in ("serve", "qemu-nbd"):
        line = refuse(path, socket_path, command=command)
        assert str(path) in line
        assert says in line
    if (build, says) in NEVER:
        assert says in refuse(path, socket_path, "-r")
    overlay = tmp_path / "overlay.qcow2"
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay, "4M")
    if (build, says) in NEVER:
        line = refuse(overlay, socket_path)
        assert str(path) in line
        assert says in line


@pytest.mark.parametrize("build", [build for build, _ in READ_ONLY])
@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")
def test_a_feature_that_only_writing_would_harm_is_read(tmp_path, build):
    path = tmp_path / "disk.qcow2"
    build(path)
    before = sha256(path)
    peers.qemu_img("convert", "-U", "-O", "raw", path, tmp_path / "raw")
    with peers.served(path, "-r") as server:
        peers.qemu_img_compare(server.uri, tmp_path / "raw")
    assert sha256(path) == before
    overlay = tmp_path / "overlay.qcow2"
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay, "4M")
    with peers.served(overlay) as server:
        peers.qemu_img_compare(server.uri, tmp_path / "raw")
    assert sha256(path) == before


# --- data files -----------------------------------------------------------------------------------


DATA_FILES = [
    ("missing", "No such file"), ("folder", "data: "), ("fifo", "neither a regular file"),
    ("the image", "holds an image of this chain"), ("unnamed", "names none")]


@pytest.mark.parametrize(("what", "says", "is_backing"), [
    *((*case, is_backing) for case in DATA_FILES for is_backing in (False, True)),
    # Who only reads a data file lets others write to it, as QEMU does.
    ("locked", "lock", False)])
@pytest.mark.peer("qemu-img", "qemu-nbd")
def test_a_data_file_that_cannot_be_had(tmp_path, socket_path, what, says, is_backing):
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "4M")
    top = path
    if is_backing:
        top = tmp_path / "top.qcow2"
        peers.qemu_img("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", top)
    if what == "locked":
        with peers.qemu_nbd(data, format="raw"):
            line = refuse(top, socket_path)
    else:
        if what == "unnamed":
            content = path.read_bytes()
            path.write_bytes(content.replace(os.fsencode(data), bytes(len(os.fsencode(data)))))
        else:
            data.unlink()
        if what == "folder":
            data.mkdir()
        elif what == "fifo":
            os.mkfifo(data)
        elif what == "the image":
            os.link(path, data)
        line = refuse(top, socket_path)
    assert says in line
    if what == "unnamed":
        assert str(path) in line
    else:
        assert line.startswith(f"nbdserve: {path}: data file {data}: ")


# --- backing files --------------------------------------------------------------------------------


def overlay(path, backing, format="qcow2"):
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, path, "1M")
    return path


@pytest.mark.peer("qemu-img")
def test_a_chain_that_is_a_loop(tmp_path, socket_path):
    names = ["a.qcow2", "b.qcow2", "c.qcow2"]
    for name, below in zip(names, names[1:] + names[:1], strict=True):
        overlay(tmp_path / name, below)
    own = overlay(tmp_path / "self.qcow2", "self.qcow2")
    os.link(own, tmp_path / "link.qcow2")
    for name in ("a.qcow2", "c.qcow2", "self.qcow2", "link.qcow2"):
        for options in ([], ["-r"]):
            line = refuse(tmp_path / name, socket_path, *options)
            assert name in line
            assert "loop" in line


@pytest.mark.parametrize(("backing", "format"), [
    ("missing.qcow2", "qcow2"), ("missing.raw", "raw"), ("folder", "raw"), ("fifo", "raw"),
    ("text", "qcow2"), ("text", "vmdk"), ("nbd://127.0.0.1:1/x", "raw"),
    ("json:{\"driver\":\"null-co\"}", "raw")])
@pytest.mark.peer("qemu-img")
def test_a_backing_file_that_cannot_be_had(tmp_path, socket_path, backing, format):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("text" * 1000)
    line = refuse(overlay(tmp_path / "disk.qcow2", backing, format), socket_path)
    assert str(tmp_path / "disk.qcow2") in line
    assert backing in line or format in line
