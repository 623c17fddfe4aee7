"""examples/nbdkit: a disk to write to, over an image that stays as it is."""

import pytest

import peers


@pytest.mark.peer("nbdkit", "qemu-img", "qemu-io")
def test_what_is_written_goes_into_the_overlay(example, tmp_path):
    copy = example("nbdkit")
    programs = tmp_path / "programs"  # nbdkit's Python would take a python beside it for its own
    programs.mkdir()
    (programs / "nbdserve").symlink_to(copy.there / "bin" / "nbdserve")
    image = tmp_path / "golden.qcow2"
    peers.qemu_img("create", "-f", "qcow2", image, "16M")
    peers.qemu_io(image, "write -P 1 0 1M")
    before = image.read_bytes()
    command = (
        'qemu-io -f raw -c "read -P 1 0 1M" -c "write -P 2 0 64k" "$uri" &&'
        ' qemu-io -f raw -c "read -P 2 0 64k" -c "read -P 1 64k 64k" "$uri"'
    )
    path = f"{programs}:{peers.SEARCH_PATH}"
    done = copy.run("bash", "overlay.sh", image, command, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote 65536/65536" in done.stdout
    assert "verification failed" not in done.stdout
    assert image.read_bytes() == before
    assert copy.run("bash", "overlay.sh", image, "exit 3", PATH=path).returncode == 3
