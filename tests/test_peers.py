"""The tests' own tools: what they let pass, what they must not."""

import pathlib
import re
import subprocess
import sys

import pytest

import peers

TESTS = pathlib.Path(__file__).parent
PEERS_SH = TESTS.parent / "tools" / "peers.sh"


def test_a_failing_program_is_told_with_its_output() -> None:
    with pytest.raises(peers.PeerFailed, match=r"exit status 3\nstderr:\nno luck"):
        peers.run("sh", "-c", "echo no luck >&2; exit 3")


@pytest.mark.peer("qemu-img")
def test_a_clean_image_passes_the_check_and_a_leak_does_not(tmp_path) -> None:
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    peers.qemu_img_check(image)
    with open(image, "r+b") as file:
        # A new image is header, refcount table, refcount block, L1 table: claim a fifth cluster.
        file.truncate(5 * 65536)
        file.seek(2 * 65536 + 4 * 2)
        file.write((1).to_bytes(2, "big"))
    with pytest.raises(peers.PeerFailed, match='"leaks": 1'):
        peers.qemu_img_check(image)


@pytest.mark.peer("qemu-io")
def test_a_pattern_that_differs_is_a_failure(tmp_path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(65536))
    peers.qemu_io(image, "read -P 0 0 64k", options=("-f", "raw"))
    with pytest.raises(peers.PeerFailed, match="Pattern verification failed"):
        peers.qemu_io(image, "read -P 1 0 64k", options=("-f", "raw"))


@pytest.mark.peer("qemu-nbd", "qemu-img", "nbdinfo", "python3-libnbd")
def test_a_server_serves_inside_and_is_gone_afterwards(tmp_path) -> None:
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    size = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); print(h.get_size())"
    with peers.qemu_nbd(image) as server:
        assert peers.run("nbdinfo", "--size", server.uri).stdout == "1048576\n"
        assert peers.libnbd(size, server.uri) == "1048576\n"
    assert server.process.returncode == 0
    assert not server.socket_path.exists()


@pytest.mark.peer("qemu-nbd")
def test_a_server_that_does_not_start_is_told_with_its_reason(tmp_path) -> None:
    with (pytest.raises(peers.PeerFailed, match="No such file"),
          peers.qemu_nbd(tmp_path / "none.qcow2")):
        pass


@pytest.mark.peer("nbdkit")
def test_a_server_is_stopped_when_the_body_fails() -> None:
    def body() -> None:
        with peers.nbdkit("null") as server:
            started.append(server.process)
            raise KeyError

    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(KeyError):
        body()
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("ci", "summary"),
    [("", "1 passed, 2 skipped"), ("true", "1 failed, 1 passed, 1 error")],
)
def test_a_missing_peer_is_skipped_aloud_but_fails_in_ci(tmp_path, monkeypatch, ci, summary):
    for name in ("conftest.py", "facilities.py", "installed.py", "peers.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from facilities import lacking\n"
        "@pytest.mark.peer('sh')\ndef test_here(): pass\n"
        "@pytest.mark.peer('sh', 'no-such-program')\ndef test_there(): pass\n"
        "def test_elsewhere(): lacking('no such device')\n")
    monkeypatch.setenv("CI", ci)
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir",
         tmp_path, "-o", "markers=peer\nclock", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert summary in said
    assert "not here, or not allowed: no-such-program" in said
    assert "no such device" in said


def test_every_peer_that_a_test_names_is_one_that_is_installed() -> None:
    tables = re.findall(r'PEERS="\n(.*?)^"', PEERS_SH.read_text(), re.MULTILINE | re.DOTALL)
    assert len(tables) == 1
    installed = {line.split()[0] for line in tables[0].splitlines()}
    named = {
        name
        for path in (*TESTS.rglob("test_*.py"), TESTS / "kernel" / "guest.py")
        for mark in re.findall(r"mark\.peer\(([^)]*)\)", path.read_text())
        for name in re.findall(r'"([^"]+)"', mark)
    }
    assert named <= installed
    assert named > {"qemu-img", "guest-kernel"}
