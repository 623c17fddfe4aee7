"""O_DIRECT is asked for where it means something."""

import os
import pathlib

import pytest

import peers
from bench import images
from bench.images import Image, require_direct_io


def test_memory_has_no_direct_io(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = peers.run("stat", "--file-system", "--format=%T", tmp_path).stdout.strip()
    monkeypatch.setattr(images, "IN_MEMORY", frozenset({kind}))
    with pytest.raises(peers.PeerFailed, match=f"on {kind}, without O_DIRECT: set TMPDIR"):
        require_direct_io(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_refuses_the_flag_has_no_direct_io(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(images, "IN_MEMORY", frozenset())
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(peers.PeerFailed, match="without O_DIRECT"):
        require_direct_io(tmp_path)


@pytest.mark.peer(peers.O_DIRECT)
def test_a_cool_image_is_not_in_the_page_cache(tmp_path: pathlib.Path) -> None:
    """On a disk: what is in memory is all page cache."""
    image = Image(tmp_path / "disk.raw", "raw")
    image.path.write_bytes(bytes(1 << 20))
    image.settle()

    def cached(fd: int) -> bool:
        try:
            return os.preadv(fd, [bytearray(4096)], 512 << 10, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False

    with open(image.path, "rb", buffering=0) as file:
        assert cached(file.fileno())
        image.cool()
        assert not cached(file.fileno())
