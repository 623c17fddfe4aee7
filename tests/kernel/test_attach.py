"""A fault of the kernel's driver, shown to be the driver's; and that `attach` gets by it.

The driver reads each connection in a work item that blocks. Where the kernel cannot start workers
at once, the workqueue's rescuer takes several of these items, blocks in the first, and the replies
on the other connections lie in their sockets unread. Here the kernel's thread that starts workers
has the lowest priority beside busy processes, so it happens each time in a guest that has just
booted, and with any server. Linux 6.12 gets its workers in time.
"""

import re
import signal

import pytest

import peers
from kernel.guest import GUEST_TEST, port_of, started

pytestmark = [GUEST_TEST, pytest.mark.peer("qemu-img"), pytest.mark.long]

# Process 2 makes the kernel's threads. With the lowest priority, which they inherit, beside busy
# processes with a high one it is a while until a worker works.
BUSY = """
renice -n 19 -p 2 >/dev/null
renice -n -10 -p $$ >/dev/null
busy=
for n in 1 2 3 4; do
    sh -c 'while :; do :; done' &
    busy="$busy $!"
done
usleep 300000
"""

# Each of four processors has a queue of its own, which is one of the connections.
READ_ON_EACH = """
reads=
for n in 0 1 2 3; do
    taskset $((1 << n)) dd if=/dev/nbd0 of=/dev/null bs=4k count=1 skip=$n iflag=direct &
    reads="$reads $!"
done
"""


@pytest.fixture
def server(tmp_path):
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    with peers.served(image, "--verbose", bind="127.0.0.1") as server:
        yield server


def run_until(sign, script, **options):
    """Run a script in a guest that has just booted, whose kernel has not had to start many workers
    yet; in another one if there is no `sign` of the fault in its output. Returns the output."""
    for _ in range(3):
        with started() as guest:
            if not guest.run("uname -r").output.startswith("6.1."):
                pytest.skip("this kernel has its workers in time")
            output = guest.run(f"{BUSY}\n{script}", **options).output
        if re.search(sign, output, re.M):
            return output
    raise AssertionError(f"nothing in three guests; the last said\n{output}")


def test_replies_lie_unread_in_the_sockets_of_the_guest(server):
    output = run_until(r"^readers=1 rescuer=/proc/\d+$", f"""
        nbd-client 10.0.2.2 {port_of(server)} /dev/nbd0 -C 4 -t 600
        usleep 1000000
        kill $busy
        readers
        echo "readers=$readers rescuer=$rescuer"
        {READ_ON_EACH}
        unread() {{
            while read -r slot local remote state queues rest; do
                case $queues in *:00000000 | tx_queue) ;; *) echo "$queues" ;; esac
            done </proc/net/tcp
        }}
        if test "$readers" -lt 4; then
            for look in $(seq 1000); do
                test -z "$(unread)" || break
                usleep 50000
            done
        fi
        echo look >&3
        echo "unread=$(unread | wc -l)"
        nbd-client -d /dev/nbd0
        wait
    """, on_word=lambda _: server.process.send_signal(signal.SIGUSR1))
    assert re.search(r"^unread=[123]$", output, re.M), output
    server.stop()
    statistics = server.stderr()
    assert " connection " in statistics
    assert "in_flight" not in statistics  # all was answered


def test_attach_tries_again(server):
    output = run_until("^attach: try 1: 1 of 4 connections have a reader$", f"""
        (until grep -q '^attach: try 1' /tmp/output; do usleep 20000; done; kill $busy) &
        attach {port_of(server)} 4 -t 30
        {READ_ON_EACH}
        for read in $reads; do wait "$read"; done
        readers
        echo "readers=$readers"
        nbd-client -d /dev/nbd0
    """)
    assert "readers=4" in output
