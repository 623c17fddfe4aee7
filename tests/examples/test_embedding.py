"""examples/embedding: it ends when it says, by signals too, and tells errors in a line."""

import subprocess

import pytest

import peers
from nbdserve.testing import make_image


@pytest.fixture
def serve_some(example, tmp_path):
    copy = example("embedding")
    make_image(tmp_path / "disk.qcow2", "16M", content=b"\1" * 65536)

    def start(*, image="disk.qcow2", clients=2):
        return copy.start(
            "python", "serve_some.py", tmp_path / image, tmp_path / "nbd.sock", str(clients)
        )

    return start


def finish(process):
    stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


@pytest.mark.peer("qemu-io")
def test_it_ends_after_so_many_clients(serve_some, tmp_path):
    process = serve_some()
    uri = process.stdout.readline().strip()
    peers.qemu_io(uri, "read -P 1 0 64k", "write -P 2 0 64k", options=("-f", "raw"))
    assert process.poll() is None
    peers.qemu_io(uri, "read -P 2 0 64k", options=("-f", "raw"))
    assert finish(process)[::2] == (0, "")
    peers.qemu_io(tmp_path / "disk.qcow2", "read -P 2 0 64k", options=("-r",))
    assert not (tmp_path / "nbd.sock").exists()


@pytest.mark.peer("python3-libnbd")
def test_it_reports_while_a_client_is_there(serve_some):
    process = serve_some(clients=1)
    uri = process.stdout.readline().strip()
    client = (
        "import nbd, sys; handle = nbd.NBD(); handle.connect_uri(sys.argv[1]);"
        " handle.pread(512, 0); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [peers.SYSTEM_PYTHON, "-I", "-c", client, uri], stdin=subprocess.PIPE
    ):
        while "1 reads, 0 writes" not in (line := process.stdout.readline()):
            assert line  # until it has ended
    assert finish(process)[0] == 0


def test_a_signal_ends_it_in_order(serve_some, tmp_path):
    process = serve_some()
    assert process.stdout.readline()
    process.terminate()
    assert finish(process)[::2] == (0, "")
    assert not (tmp_path / "nbd.sock").exists()


def test_an_image_that_is_refused(serve_some, tmp_path):
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(600))
    status, stdout, stderr = finish(serve_some(image="bad.qcow2"))
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert "bad.qcow2" in stderr
