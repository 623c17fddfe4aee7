"""The server dies, is stopped or stands still while a file system is mounted on it.

What nbd-client 3.24 does is not much: once it has attached, no process of it is left, so nobody
reconnects, with `-persist` neither, though a server is there again on the same port. Requests fail
with EIO: at once, or after the `-t` seconds if they were in flight. The way back is: unmount,
`nbd-client -d`, attach again, fsck, mount; and what was fsynced before is there.
"""

import contextlib
import signal
import threading
import time

import pytest

import peers
from kernel.guest import GUEST_TEST, port_of

pytestmark = [GUEST_TEST, pytest.mark.peer("qemu-img")]

SETUP = """
attach $port $options
mke2fs -q -t ext4 -E lazy_itable_init=1 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
for n in 1 2 3; do dd if=/dev/urandom of=/mnt/kept.$n bs=100k count=9 conv=fsync status=none; done
(cd /mnt; md5sum kept.*) >/tmp/sums
"""

# The host ends the server at the word, and starts another one in its place; from then on writes
# with fsync must fail, for the device is dead.
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
echo dead >&3
! dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct status=none
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


def serve(image, mode="writeback", port=0):
    return peers.served(image, "--cache", mode, "-p", str(port), bind="127.0.0.1")


def assert_sound(image, *, leaks):
    """`qemu-img check`, once the guardian of a server that was killed has let go of the image."""
    while True:
        checked = peers.run("qemu-img", "check", "-f", "qcow2", image, check=False)
        if "lock" not in checked.stderr:
            break
        time.sleep(0.02)
    assert checked.returncode in ((0, 3) if leaks else (0,)), checked.stdout + checked.stderr


def connections_to(port):
    listed = peers.run("ss", "--tcp", "--no-header", "state", "established", f"sport = :{port}")
    return len(listed.stdout.splitlines())


@pytest.mark.parametrize(
    ("signum", "options", "mode"),
    [
        pytest.param(signal.SIGKILL, "4 -t 10", "writeback", id="SIGKILL-writeback-4"),
        # The page cache outlives the process.
        pytest.param(signal.SIGKILL, "1 -t 10", "unsafe", id="SIGKILL-unsafe-1",
                     marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, "4 -t 10 -persist", "none", id="SIGKILL-none-4-persist",
                     marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "4 -t 10", "writeback", id="SIGTERM-writeback-4",
                     marks=pytest.mark.long),
    ],
)
def test_what_was_fsynced_outlives_the_server(guest, image, signum, options, mode):
    killed = signum == signal.SIGKILL
    seen = []
    with contextlib.ExitStack() as servers:
        server = servers.enter_context(serve(image, mode))
        port = port_of(server)

        def on_word(word):
            if word == "now":
                if killed:
                    server.kill()
                else:
                    server.stop()
                assert_sound(image, leaks=killed)
                servers.enter_context(serve(image, mode, port))
            else:
                seen.append(connections_to(port))

        values = f"port={port} options='{options}'\n"
        guest.run(values + SETUP)
        guest.run(THROUGH_DEATH, on_word=on_word)
        assert seen == [0]  # nobody has come back
        guest.run(values + AGAIN)
    assert_sound(image, leaks=killed)


@pytest.mark.long
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


@pytest.mark.long
def test_the_client_is_gone_without_goodbye(guest, image):
    """The guest's device is disconnected under a mounted file system, and attached again."""
    with serve(image) as server:
        values = f"port={port_of(server)} options='4 -t 30'\n"
        guest.run(values + SETUP)
        guest.run("nbd-client -d /dev/nbd0; umount /mnt || umount /mnt")
        guest.run(values + AGAIN)
    peers.qemu_img_check(image)
