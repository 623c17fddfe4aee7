"""The server dies, is stopped or stands still while a file system is mounted on it.

What nbd-client 3.24 does is not much: once it has attached, no process of it is left, so nobody
reconnects, with `-persist` neither. Requests fail with EIO: at once, or after the `-t` seconds if
they were in flight. The way back is: unmount, `nbd-client -d`, attach again, fsck, mount; and what
was fsynced before is there.
"""

import signal
import threading

import pytest

import peers
from kernel.guest import port_of

pytestmark = pytest.mark.peer(
    "guest-kernel", "qemu-system-x86_64", "busybox", "nbd-client", "mke2fs", "mkfs.xfs",
    "setpriv", "qemu-img")  # fmt: skip

SETUP = """
attach $port $options
mke2fs -q -t ext4 -E lazy_itable_init=1 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
for n in 1 2 3; do dd if=/dev/urandom of=/mnt/kept.$n bs=100k count=9 conv=fsync status=none; done
(cd /mnt; md5sum kept.*) >/tmp/sums
"""

# The host ends the server at the word; from then on writes with fsync must fail, and soon.
THROUGH_DEATH = """
(while head -c 500000 /dev/urandom >/mnt/noise && sync /mnt/noise; do :; done) 2>/dev/null &
usleep 300000
echo now >&3
n=0
while dd if=/dev/urandom of=/mnt/late bs=64k count=4 conv=fsync status=none; do
    n=$((n + 1))
    test $n -lt 1000
done
wait
umount /mnt || umount /mnt
nbd-client -d /dev/nbd0
"""

AGAIN = """
attach $port $options
e2fsck -f -p /dev/nbd0 || test $? = 1
mount -t ext4 /dev/nbd0 /mnt
(cd /mnt; md5sum --quiet -c /tmp/sums)
umount /mnt
e2fsck -f -n /dev/nbd0
nbd-client -d /dev/nbd0
"""


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    return path


def serve(image, mode="writeback"):
    return peers.served(image, "--cache", mode, bind="127.0.0.1")


@pytest.mark.parametrize(
    ("signum", "options", "mode"),
    [
        (signal.SIGKILL, "1 -t 3", "writeback"),
        (signal.SIGKILL, "4 -t 3", "unsafe"),  # the page cache outlives the process
        (signal.SIGKILL, "4 -t 3 -persist", "none"),
        (signal.SIGTERM, "4 -t 3", "writeback"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_was_fsynced_outlives_the_server(guest, image, signum, options, mode):
    with serve(image, mode) as server:
        values = f"port={port_of(server)} options='{options}'\n"
        guest.run(values + SETUP)
        end = server.kill if signum == signal.SIGKILL else server.stop
        guest.run(THROUGH_DEATH, on_word=lambda _: end())
    checked = peers.run("qemu-img", "check", "-f", "qcow2", image, check=False)
    # Killed, it may leave leaks; asked to stop, nothing.
    allowed = (0, 3) if signum == signal.SIGKILL else (0,)
    assert checked.returncode in allowed, checked.stdout + checked.stderr
    with serve(image, mode) as server:
        guest.run(f"port={port_of(server)} options='{options}'\n{AGAIN}")
    assert peers.run(
        "qemu-img", "check", "-f", "qcow2", image, check=False).returncode in allowed


def test_a_server_that_stands_still_for_a_while_harms_nothing(guest, image):
    with serve(image) as server:
        values = f"port={port_of(server)} options='2 -t 60'\n"
        guest.run(values + SETUP)
        timers = []

        def stand_still(_word):
            server.process.send_signal(signal.SIGSTOP)
            timers.append(threading.Timer(2, server.process.send_signal, [signal.SIGCONT]))
            timers[0].start()

        guest.run("""
            (for n in 1 2 3 4 5 6; do
                dd if=/dev/urandom of=/mnt/kept.$n bs=64k count=20 conv=fsync status=none
            done) &
            echo now >&3
            wait $!
            (cd /mnt; md5sum kept.*) >/tmp/sums
            echo 3 >/proc/sys/vm/drop_caches
            (cd /mnt; md5sum --quiet -c /tmp/sums)
            umount /mnt
            e2fsck -f -n /dev/nbd0
            nbd-client -d /dev/nbd0
        """, on_word=stand_still)
        timers[0].join()
    peers.qemu_img_check(image)


def test_the_client_is_gone_without_goodbye(guest, image):
    """The guest's device is disconnected under a mounted file system, and attached again."""
    with serve(image) as server:
        values = f"port={port_of(server)} options='4 -t 30'\n"
        guest.run(values + SETUP)
        guest.run("nbd-client -d /dev/nbd0; umount /mnt || umount /mnt")
        guest.run(values + AGAIN)
    peers.qemu_img_check(image)
