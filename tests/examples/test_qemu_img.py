"""examples/qemu-img: the script does what it says, and stops where it fails."""

import random

import pytest

import peers

pytestmark = pytest.mark.peer("qemu-img")
MIB = 1 << 20


def run(example, tmp_path):
    source, folder = tmp_path / "source.img", tmp_path / "out"
    source.write_bytes(random.Random(1).randbytes(2 * MIB) + bytes(10 * MIB))
    folder.mkdir()
    return source, folder, example.run("./qemu-img.sh", source, folder)


def test_the_script(example, tmp_path):
    source, folder, done = run(example("qemu-img"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("Images are identical.", f"({12 * MIB} bytes)", '"data": true',
                 "No errors were found"):
        assert said in done.stdout
    for name in ("disk.qcow2", "copy.qcow2"):
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, folder / name)
    assert sorted(path.name for path in folder.iterdir()) == ["copy.qcow2", "disk.qcow2"]


def test_what_differs_ends_it_and_the_server(example, tmp_path):
    copy = example("qemu-img")
    script = copy.folder / "qemu-img.sh"
    changed = script.read_text().replace(
        "qemu-img compare", 'qemu-io -f raw -c "write 0 512" "$disk"; qemu-img compare'
    )
    script.write_text(changed)
    _, folder, done = run(copy, tmp_path)
    assert done.returncode == 1
    assert "Content mismatch at offset 0!" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["disk.qcow2"]
