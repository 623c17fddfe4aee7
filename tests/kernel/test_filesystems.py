"""A file system's whole life on a disk of ours, by the kernel's own client.

Attach, mkfs, mount, write with fsync, delete, trim, unmount, fsck, detach; then the server is
stopped and started again, and what was written is read back. The image is clean each time, and
trimming gave back what was deleted, to the disk of the host too.
"""

import itertools
import json
import os

import pytest

import peers
from kernel.guest import GUEST_TEST, port_of

pytestmark = [GUEST_TEST, pytest.mark.peer("qemu-img")]

MIB = 1 << 20
MODES = ["writeback", "writethrough", "none", "unsafe", "directsync"]

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
EVERY = list(itertools.product(["ext4", "xfs"], MODES, [1, 4]))
# Each kind of mode, and both numbers of connections.
SHORT = [
    ("ext4", "writeback", 4),
    ("ext4", "writethrough", 1),
    ("ext4", "none", 1),
    ("ext4", "unsafe", 4),
]
LONG = [
    ("ext4", "writeback", 1),
    ("ext4", "writethrough", 4),
    ("xfs", "none", 4),
    ("xfs", "writeback", 1),
]

MAKE = {"ext4": "mke2fs -q -t ext4 /dev/nbd0", "xfs": "mkfs.xfs -q -f /dev/nbd0"}
CHECK = {"ext4": "e2fsck -f -n /dev/nbd0", "xfs": "xfs_repair -n /dev/nbd0"}
SIZE = {"ext4": "96M", "xfs": "320M"}

ATTACH = "dmesg -c >/dev/null; attach $port $connections -t 30"

# The page cache is dropped before reading, so that it is the disk that is read. The files to be
# deleted are big, so that trimming shows.
LIFE = f"""
{ATTACH}
test $(ls -d /sys/block/nbd0/mq/* | wc -l) = $connections
$mkfs
mount -t $type /dev/nbd0 /mnt
for n in 1 2 3 4 5 6; do
    head -c ${{n}}00001 /dev/urandom >/mnt/kept.$n
    sync /mnt/kept.$n
    dd if=/dev/urandom of=/mnt/trash.$n bs=1M count=3 conv=fsync status=none &
done
wait
sync
(cd /mnt; md5sum kept.*) >/tmp/sums
echo written >&3
rm /mnt/trash.*
sync
fstrim -v /mnt
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt; md5sum --quiet -c /tmp/sums)
umount /mnt
$fsck
nbd-client -d /dev/nbd0
! dmesg | grep -e 'timed out' -e 'error' -e 'Dead'
"""

AGAIN = f"""
{ATTACH}
mount -t $type -o ro /dev/nbd0 /mnt
(cd /mnt; md5sum --quiet -c /tmp/sums)
umount /mnt
nbd-client -d /dev/nbd0
! dmesg | grep -e 'timed out' -e 'error' -e 'Dead'
"""


def allocated(image):
    """Bytes of the disk that the image has data for, and that the image takes on the host's."""
    rows = json.loads(peers.qemu_img("map", "-U", "--output=json", image))
    return sum(row["length"] for row in rows if row["data"]), 512 * image.stat().st_blocks


@pytest.mark.parametrize(
    ("kind", "mode", "connections"),
    [
        *SHORT,
        *(pytest.param(*case, marks=pytest.mark.long)
          for case in (EVERY if SOAK else LONG) if case not in SHORT),
    ],
    ids=str,
)
def test_the_life_of_a_file_system(guest, tmp_path, kind, mode, connections):
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, SIZE[kind])
    words = f"type={kind} connections={connections} mkfs='{MAKE[kind]}' fsck='{CHECK[kind]}'"
    before = []
    for script in (LIFE, AGAIN):
        with peers.served(image, "--cache", mode, bind="127.0.0.1") as server:
            guest.run(
                f"port={port_of(server)} {words}\n{script}",
                on_word=lambda _: before.append(allocated(image)))
        peers.qemu_img_check(image)
    for then, now in zip(before[0], allocated(image), strict=True):
        assert then - now > 12 * MIB  # of the 18 that were deleted
