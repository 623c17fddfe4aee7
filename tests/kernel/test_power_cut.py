"""The power is cut while the kernel writes a file system: what was fsynced is there.

A guest writes files, each with fsync, beside others that it neither syncs nor keeps, and trims.
The server records what it does to the image (recorder.py). When the guest says that a file's fsync
has returned, the length of the record is noted. Then the power goes: the guest is killed, and so is
the server. The image after that cut, and after a cut at any other point of the record
(powercut.py), must hold to this:

* `qemu-img check` finds nothing but leaks;
* the journal can be replayed, and `e2fsck -p` repairs what is left without a question;
* each file whose fsync had returned is there, byte by byte.

In the last test the kernel itself mounts such an image.
"""

import dataclasses
import hashlib
import os
import pathlib
import random
import sys

import pytest

import peers
from kernel.guest import GUEST_TEST, port_of
from kernel.powercut import History

pytestmark = [GUEST_TEST, pytest.mark.peer("debugfs", "qemu-img")]

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
CUTS = 1000 if SOAK else 30
FILES = 60 if SOAK else 15
RECORDER = (sys.executable, pathlib.Path(__file__).with_name("recorder.py"))

# The noise is never synced by its writer, so parts of it are in flight at any time; its deletion
# makes the trims race the writes. After FILES words the host cuts the power.
WORK = """
attach $port $connections -t 30
mke2fs -q -t ext4 -J size=4 /dev/nbd0
mount -t ext4 -o commit=1 /dev/nbd0 /mnt
sync /mnt
(
    while :; do
        for n in 1 2 3; do head -c 900000 /dev/urandom >/mnt/noise.$n; done
        rm /mnt/noise.*
        fstrim /mnt
    done
) &
for n in $(seq 100000); do
    head -c $((n * 7919 % 200000)) /dev/urandom >/tmp/kept
    set -- $(md5sum /tmp/kept)
    dd if=/tmp/kept of=/mnt/kept.$n bs=64k conv=fsync status=none
    echo "kept.$n $1" >&3
done
"""


class _PowerCut(Exception):
    """Enough has been written."""


@dataclasses.dataclass(frozen=True)
class Run:
    """`kept`: (position of the record when its fsync had returned, name, md5) of each file."""

    history: History
    image: pathlib.Path
    kept: list[tuple[int, str, str]]
    syncs: bool = True

    def image_after_cut(self, position, chooser, chance, path):
        path.write_bytes(
            self.history.after_cut(position, chooser, chance, syncs=self.syncs))
        return [(name, digest) for noted, name, digest in self.kept if noted <= position]


def record(guest, folder, mode, connections):
    """Work in the guest until its power is cut."""
    image, log = folder / "disk.qcow2", folder / "log"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    initial = image.read_bytes()
    kept = []

    def noted(word):
        kept.append((log.stat().st_size, *word.split()))
        if len(kept) == FILES:
            raise _PowerCut

    with peers.served(image, "--cache", mode, bind="127.0.0.1",
                      program=(*RECORDER, log)) as server:
        with pytest.raises(_PowerCut):
            guest.run(f"port={port_of(server)} connections={connections}\n{WORK}", on_word=noted)
        server.kill()
        guest.kill()
    return Run(History.read(initial, log), image, kept)


@pytest.fixture(scope="module", params=[
    pytest.param(("writeback", 4), id="writeback-4"),
    pytest.param(("writethrough", 1), id="writethrough-1", marks=pytest.mark.long),
    pytest.param(("none", 1), id="none-1", marks=pytest.mark.long),
])
def run(request, guests, tmp_path_factory):
    return record(guests.healthy(), tmp_path_factory.mktemp("cut"), *request.param)


def assert_holds(image, kept):
    """What the module's docstring says of an image after a cut."""
    checked = peers.run("qemu-img", "check", "-f", "qcow2", image, check=False)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr
    raw = image.with_suffix(".raw")
    peers.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    repaired = peers.run("e2fsck", "-f", "-p", raw, check=False)
    assert repaired.returncode in (0, 1), repaired.stdout + repaired.stderr
    assert peers.run("e2fsck", "-f", "-n", raw, check=False).returncode == 0
    files = image.with_name("files")
    files.mkdir(exist_ok=True)
    for old in files.iterdir():
        old.unlink()
    commands = [f"dump /{name} {files / name}" for name, _ in kept]
    peers.run("debugfs", "-f", "/dev/stdin", raw, stdin="\n".join(commands) + "\n")
    for name, digest in kept:
        path = files / name
        assert path.exists(), f"{name} is not there"
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert found == digest, f"{name} differs"


def test_the_record_is_complete(run):
    found, recorded = run.image.read_bytes(), run.history.everything()
    assert len(found) == len(recorded)
    assert found == recorded
    assert run.history.nb_syncs >= len(run.kept)


def test_what_was_fsynced_survives_each_cut(run, tmp_path):
    chooser = random.Random(1)
    first = run.kept[0][0]
    # Each fsync that has just returned is the sharpest moment for its file.
    moments = [position for position, _, _ in run.kept]
    chosen = [chooser.choice(moments) for _ in range(CUTS // 2)]
    chosen += [chooser.randrange(first, run.history.end) for _ in range(CUTS - len(chosen))]
    for number, position in enumerate(chosen):
        chance = chooser.choice((0.0, 0.1, 0.5, 0.9))
        print(f"cut {number}: at {position} of {run.history.end}, chance {chance}")
        assert_holds(*after(run, position, chooser, chance, tmp_path))


def after(run, position, chooser, chance, folder):
    path = folder / "cut.qcow2"
    return path, run.image_after_cut(position, chooser, chance, path)


def test_a_server_that_forgot_to_sync_is_found_out(run, tmp_path):
    forgetful = dataclasses.replace(run, syncs=False)
    last = run.kept[-1][0]
    with pytest.raises(AssertionError):
        assert_holds(*after(forgetful, last, random.Random(2), 0.5, tmp_path))


@pytest.mark.long
def test_the_kernel_mounts_what_a_cut_left(run, guest, tmp_path):
    image, kept = after(run, run.kept[-1][0], random.Random(3), 0.5, tmp_path)
    sums = "".join(f"{digest}  {name}\n" for name, digest in kept)
    with peers.served(image, bind="127.0.0.1") as server:
        guest.run(f"""
            attach {port_of(server)} 1 -t 30
            mount -t ext4 /dev/nbd0 /mnt
            cd /mnt
            md5sum --quiet -c <<END\n{sums}END
            dd if=/dev/urandom of=new bs=64k count=30 conv=fsync status=none
            cd /
            umount /mnt
            e2fsck -f -p /dev/nbd0
            nbd-client -d /dev/nbd0
        """)
    checked = peers.run("qemu-img", "check", "-f", "qcow2", image, check=False)
    assert checked.returncode in (0, 3), checked.stdout
