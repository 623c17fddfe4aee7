"""Each operation on the files fails while an image is opened, and while it is closed.

An image that cannot be opened is refused with an error that names a file, is not changed, and
leaves no descriptor behind; closing reports what it could not do, and lets go of everything all the
same.
"""

import errno
import os

import pytest

from fakes import no_descriptor_left
from nbdserve.config import ImageConfig
from nbdserve.drivers.file import FileNode
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend
from qcow2_model import assert_sound, guest_bytes

MIB = 1 << 20
AUTOCLEAR = 95  # the last byte of the autoclear feature bits


@pytest.fixture(autouse=True)
def nothing_left_open():
    with no_descriptor_left():
        yield


@pytest.fixture
def images(tmp_path):
    """An overlay on a qcow2 image; it has an autoclear bit that nobody knows."""
    base, top = tmp_path / "base", tmp_path / "top"
    create_image(str(base), MIB)
    create_image(str(top), MIB, backing_file="base", backing_format="qcow2")
    content = bytearray(top.read_bytes())
    content[AUTOCLEAR] |= 0x80
    top.write_bytes(content)
    return top, base


class Failing:
    """FileNode with an operation that fails: the one of that number, or none; `count`: of all."""

    def __init__(self, monkeypatch, number=None, error=errno.EIO):
        self.count = 0
        self.number = number
        self._error = error
        for name in ("read", "write", "flush"):
            monkeypatch.setattr(FileNode, name, self._failing(getattr(FileNode, name)))

    def _failing(self, really):
        async def operation(node, *args):
            self.count += 1
            if self.count == self.number:
                raise OSError(self._error, os.strerror(self._error))
            await really(node, *args)

        return operation


def config(path):
    return ImageConfig(str(path), aio="threads")


async def opened_and_closed(images, failing):
    """The number of operations until the image is open, and until it is closed."""
    async with open_backend(config(images[0])) as backend:
        until_open = failing.count
        await backend.write(0, b"x" * 70000)
    return until_open, failing.count


async def test_every_operation_of_opening_fails(images, monkeypatch):
    with monkeypatch.context() as patch:
        until_open, _ = await opened_and_closed(images, Failing(patch))
    assert until_open > 6
    top, base = images
    content = bytearray(top.read_bytes())
    content[AUTOCLEAR] |= 0x80  # it was cleared
    top.write_bytes(content)
    before = [path.read_bytes() for path in images]
    for number in range(1, until_open + 1):
        with monkeypatch.context() as patch:
            Failing(patch, number)
            with pytest.raises(ImageError) as caught:
                async with open_backend(config(top)):
                    pass
        text = str(caught.value)
        assert text.startswith(str(top)), text
        assert "\n" not in text
        assert caught.value.errno == errno.EIO
        after = [path.read_bytes() for path in images]
        if after != before:  # the flush after the bits were cleared failed
            assert number == until_open
            after[0] = before[0]
        assert after == before
        assert base.read_bytes() == before[1]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_every_operation_of_closing_fails(images, monkeypatch, error):
    top, _ = images
    start = top.read_bytes()
    with monkeypatch.context() as patch:
        until_open, until_closed = await opened_and_closed(images, Failing(patch))
    assert until_closed > until_open + 2
    reported = []
    for number in range(until_open + 1, until_closed + 1):
        top.write_bytes(start)
        with monkeypatch.context() as patch:
            failing = Failing(patch, number, error)
            try:
                await opened_and_closed(images, failing)
            except* OSError as group:
                reported.append({caught.errno for caught in group.exceptions})
        content = top.read_bytes()
        assert_sound(content, leaks_allowed=True)
        disk = guest_bytes(content, bytes(MIB))
        assert disk[:70000] in (b"x" * 70000, bytes(70000))
    assert len(reported) > 2
    assert all(numbers == {error} for numbers in reported)
