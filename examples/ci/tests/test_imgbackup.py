"""Does the backup tool notice what goes wrong? Each test has a disk of its own, in milliseconds.

`nbd_server` and `qcow2_image` come with nbdserve; nothing is mounted, and nobody is root.
"""

import pytest
from imgbackup import BackupFailed, backup

from nbdserve.testing import Fault, random, read_image

CONTENT = {0: random("1M"), "30M": random("1M", seed=1)}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "disk.qcow2"


def test_the_backup_is_the_disk(nbd_server, qcow2_image, target) -> None:
    base = qcow2_image("64M", content=CONTENT)
    overlay = qcow2_image(backing=base, content={"10M": b"changed since"})
    server = nbd_server(overlay)
    backup(server.uri, target)
    server.stop()
    assert read_image(target) == read_image(overlay)


@pytest.mark.parametrize("fault", [
    Fault(ops="read", offset=30 << 20, length=4096, error="EIO"),
    # The copy has it, the comparison reads again and finds it.
    Fault(ops="read", flip_bits=1, count=1),
    Fault(ops="read", disconnect=True, after=3),
], ids=["bad sector", "a bit flips", "connection lost"])
def test_a_bad_disk_leaves_no_backup(nbd_server, target, fault) -> None:
    target.write_bytes(b"yesterday's")
    server = nbd_server(size="64M", content=CONTENT, faults=[fault])
    with pytest.raises(BackupFailed):
        backup(server.uri, target, timeout=60)
    assert [path.name for path in target.parent.iterdir()] == ["disk.qcow2"]
    assert target.read_bytes() == b"yesterday's"


def test_a_disk_that_hangs_is_given_up(nbd_server, target) -> None:
    server = nbd_server(size="64M", content=CONTENT, faults=[Fault(ops="read", stuck=True)])
    with pytest.raises(BackupFailed, match="not done after"):
        backup(server.uri, target, timeout=1)
    assert not list(target.parent.iterdir())
