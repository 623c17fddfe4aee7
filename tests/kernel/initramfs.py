"""What the guest boots from: busybox, the tools that the tests use, the modules they need.

An initramfs is a cpio archive of the "newc" format (the kernel's buffer-format.rst), written here
so that it needs no root, no cpio and no depmod. What a program needs is what ldd says; what a
module needs is in the module (`depends=`), and they are loaded in that order.

The archive is kept beside the kernel under a name made of all that went into it, so a changed tool
or a changed init makes a new one.
"""

import hashlib
import lzma
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator

import peers

INIT = pathlib.Path(__file__).with_name("init")
ATTACH = pathlib.Path(__file__).with_name("attach")

# Those a Debian has anyway, and those of tools/peers.sh.
PROGRAMS = (
    "dash", "dd", "cat", "cp", "rm", "md5sum", "sync", "seq", "mount", "umount", "fstrim",
    "blkdiscard", "nbd-client", "mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair",
)  # fmt: skip

# Those a cloud kernel has built in or does not have are left out.
MODULES = ("virtio_pci", "virtio_net", "nbd", "xfs")

OPTIONS = {"nbd": "nbds_max=4 max_part=0"}

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


def initramfs(kernel: pathlib.Path) -> pathlib.Path:
    """The archive for the kernel in this folder; made if it is not there yet."""
    files = dict(_contents(kernel))
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for name, (mode, source) in files.items():
        digest.update(f"{name} {mode} {_identity(source)}\n".encode())
    path = kernel / f"initramfs-{digest.hexdigest()[:16]}.cpio"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=kernel, delete=False) as file:
            for number, (name, (mode, source)) in enumerate(files.items(), 1):
                file.write(_member(number, name, mode, _bytes_of(source)))
            file.write(_member(0, "TRAILER!!!", 0, b""))
        os.rename(file.name, path)
    return path


Source = pathlib.Path | bytes


def _contents(kernel: pathlib.Path) -> Iterator[tuple[str, tuple[int, Source]]]:
    """(path in the guest, (mode, where its bytes are)) of everything, folders first."""
    modules = _modules(kernel / "modules")
    files: dict[str, tuple[int, Source]] = {"init": (0o100755, INIT)}
    files["attach"] = (0o100644, ATTACH)
    files |= {f"modules/{name}.ko": (0o100644, path) for name, path in modules.items()}
    order = "".join(f"{name}.ko {OPTIONS.get(name, '')}\n" for name in modules)
    files["modules/order"] = (0o100644, order.encode())
    files["dev/console"] = (stat.S_IFCHR | 0o600, b"")
    for name in ("bin/busybox", *(f"usr/sbin/{program}" for program in PROGRAMS)):
        program = _program(pathlib.PurePath(name).name)
        files[name] = (0o100755, program)
        for library in _LIBRARY.findall(peers.run("ldd", program, check=False).stdout):
            files[library.lstrip("/")] = (0o100755, pathlib.Path(library).resolve())
    folders = {str(parent) for name in files for parent in pathlib.PurePath(name).parents} - {"."}
    for folder in sorted(folders):
        yield folder, (0o040755, b"")
    yield from sorted(files.items())


def _program(name: str) -> pathlib.Path:
    found = shutil.which(name, path=peers.SEARCH_PATH)
    if found is None:
        raise peers.PeerFailed(f"{name} is not here (tools/peers.sh installs it)")
    return pathlib.Path(found).resolve()


def _modules(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """name -> file of MODULES and what they need, in the order in which they can be loaded."""
    there = {
        path.name.split(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")
    }
    loaded: dict[str, pathlib.Path] = {}

    def load(name: str) -> None:
        if name in loaded or name not in there:
            return
        depends = _DEPENDS.search(b"\0" + _bytes_of(there[name]))
        for needed in (depends[1].decode() if depends else "").split(","):
            load(needed.replace("-", "_"))
        loaded[name] = there[name]

    for name in MODULES:
        load(name)
    return loaded


def _bytes_of(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    data = source.read_bytes()
    return lzma.decompress(data) if source.suffix == ".xz" else data


def _identity(source: Source) -> str:
    """What changes when the bytes do, without reading all of them."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if source in (INIT, ATTACH):
        return hashlib.sha256(source.read_bytes()).hexdigest()
    status = source.stat()
    return f"{source} {status.st_size} {status.st_mtime_ns}"


def _member(number: int, name: str, mode: int, data: bytes) -> bytes:
    """One file: 110 bytes of hexadecimal fields, the name, the data, each padded to 4 bytes."""
    rdev = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
