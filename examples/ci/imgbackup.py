"""Back up a disk that an NBD server has: imgbackup URI FILE.

The backup is there whole or not at all: qemu-img copies into a file beside it, the copy is compared
with the disk, synced and renamed.
"""

import os
import pathlib
import subprocess
import sys


class BackupFailed(Exception):
    pass


def backup(uri: str, path: pathlib.Path, timeout: float = 3600) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        qemu_img("convert", "-f", "raw", "-O", "qcow2", uri, str(partial), timeout=timeout)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", uri, str(partial), timeout=timeout)
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def qemu_img(*arguments: str, timeout: float) -> None:
    try:
        subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True,
                       timeout=timeout)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()
        raise BackupFailed(f"qemu-img {arguments[0]}: {said}") from None
    except subprocess.TimeoutExpired:
        raise BackupFailed(f"qemu-img {arguments[0]}: not done after {timeout:g} s") from None


def sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        backup(sys.argv[1], pathlib.Path(sys.argv[2]))
    except (BackupFailed, OSError) as error:
        sys.exit(f"imgbackup: {error}")
