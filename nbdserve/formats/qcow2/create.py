"""Making a new, empty qcow2 image on disk.

Three steps, so that nothing is destroyed before it is certain what shall take its place:
plan.py checks every option and lays the image out, touching no file; `write_image` puts a plan into
an open file; `create_image` opens the file between the two. An existing file is overwritten, as
qemu-img does.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2.plan import NewImageOptions, plan_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.formats.qcow2.plan import NewImage

__all__ = ["create_image", "write_image"]


def create_image(
    path: str,
    size: int,
    *,
    sync: bool = True,
    **options: Any,  # noqa: ANN401 - checked by NewImageOptions
) -> None:
    """Make `path` an empty qcow2 image; overwrites what is there.

    `size` and `options` are those of NewImageOptions. The backing file is not opened. The data file
    is made, too: a regular file that is all one hole. Without `sync` it is for the operating system
    to make it durable.

    :raises ConfigError: an option cannot be honoured; nothing was touched.
    :raises ImageError: the file cannot be opened or written, with the errno of the reason. A file
        that was made for it is gone again; one that was there holds no image any more.
    """
    wanted = NewImageOptions(size, **options)
    plan = plan_image(wanted)
    if wanted.backing_file is not None:
        # A relative name counts from the image's folder. It may also be no path at all.
        name = os.path.join(os.path.dirname(path), wanted.backing_file)
        _check_is_another("backing_file", wanted.backing_file, name, path)
    data_file = wanted.data_file
    if data_file is None:
        _create(path, lambda fd: write_image(fd, plan, sync=sync))
        return
    _check_is_another("data_file", data_file, data_file, path)
    existed = os.path.lexists(data_file)
    _create(data_file, lambda fd: _write_hole(fd, plan.data_size, sync=sync))
    try:
        _create(path, lambda fd: write_image(fd, plan, sync=sync))
    except ImageError:
        if not existed:
            os.unlink(data_file)
        raise


def _check_is_another(option: str, value: str, path: str, image: str) -> None:
    try:
        same = os.path.samefile(image, path)
    except OSError:  # one of them is not there
        same = os.path.abspath(image) == os.path.abspath(path)
    if same:
        raise ConfigError(f"{option}: {value!r} is the image itself")


def _create(path: str, write: Callable[[int], None]) -> None:
    """Make or overwrite a file. Raises ImageError."""
    existed = os.path.lexists(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            write(fd)
        except OSError:
            if not existed:
                os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"{path}: cannot create: {error.strerror}", error.errno) from None


def write_image(fd: int, plan: NewImage, *, sync: bool = True) -> None:
    """Put a planned image into a file or a block device open for writing, durably if `sync`.

    The header goes last and alone: a crash then leaves a file without a qcow2 header or a whole
    image.

    :raises OSError: as the system says.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 0)
    position = _write(fd, bytes(len(plan.header)), 0)
    position = _write(fd, plan.refcount_table, position)
    position = _write(fd, plan.refcount_blocks, position)
    for piece in plan.mapping():
        position = _write(fd, piece, position)
    if sync:
        os.fsync(fd)
    _write(fd, plan.header, 0)
    if sync:
        os.fsync(fd)


def _write_hole(fd: int, nb_bytes: int, *, sync: bool) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    os.ftruncate(fd, 0)
    os.ftruncate(fd, nb_bytes)
    if sync:
        os.fsync(fd)


def _write(fd: int, data: bytes, position: int) -> int:
    """The position behind what was written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        view = view[written:]
        position += written
    return position
