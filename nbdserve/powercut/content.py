"""What a disk holds, so that many versions of a large one are cheap: sparse, and shared by pages.

A `Content` has a size and pages of 4 KiB. A page that is not there is zeroes, and one that becomes
zeroes goes, so equal contents have equal pages, however they came to be. Pages are immutable and
belong to all copies that have them. They are kept in chunks, which a copy shares until it changes
one: a copy costs a look at each MiB of data, a change what it changes, whatever the disk's size.

`digest` costs what changed since the last one: it is a hash of a sum, to which each page adds a
number, the SHA-256 of its place and bytes, and takes it out when it goes. Sums so made are no
protection against somebody who chooses pages to make two of them equal; nobody here does.
"""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    Buffer = bytes | bytearray | memoryview

__all__ = ["PAGE", "Content"]

PAGE = 4096
ZEROES = bytes(PAGE)

# A chunk is the pages whose numbers differ in so many of their low bits: 1 MiB.
CHUNK_BITS = 8
PIECE = PAGE << CHUNK_BITS

SUM_MASK = (1 << 256) - 1

# How a file system says that it cannot tell where the holes are.
NO_SEEK_DATA = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class Content:
    """`size` bytes, zeroes at first. Not hashable, as it changes; equal if the bytes are."""

    __slots__ = ("_chunks", "_mine", "_nb_pages", "_sum", "_unhashed", "size")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._chunks: dict[int, dict[int, bytes]] = {}
        self._mine: set[int] = set()  # the chunks that no copy has
        self._nb_pages = 0
        self._sum = 0
        self._unhashed: dict[int, bytes | None] = {}  # pages as they are in the sum, if not as here

    @classmethod
    def of(cls, data: Buffer) -> Content:
        """The content of these bytes."""
        content = cls()
        content.write(0, data)
        return content

    def copy(self) -> Content:
        """The same, which changes by itself."""
        self._settle_sum()  # once, and not in each copy
        twin = Content(self.size)
        twin._chunks = self._chunks.copy()
        self._mine.clear()
        twin._nb_pages = self._nb_pages
        twin._sum = self._sum
        return twin

    # --- reading -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return self.read(0, self.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Content):
            return NotImplemented
        return self.digest() == other.digest()

    def __repr__(self) -> str:
        return f"<Content of {self.size} bytes, {self.data_size} of data>"

    @property
    def data_size(self) -> int:
        """Bytes of pages that are not zeroes."""
        return self._nb_pages * PAGE

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there; what lies past the end reads as zeroes."""
        first, start = divmod(offset, PAGE)
        end = -(-(offset + length) // PAGE)
        if end - first == 1:
            return self._page(first)[start : start + length]
        pages = b"".join(map(self._page, range(first, end)))
        return pages if len(pages) == length else pages[start : start + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes there."""
        done, length = 0, len(buffer)
        while done < length:
            index, start = divmod(offset + done, PAGE)
            piece = min(PAGE - start, length - done)
            buffer[done : done + piece] = self._page(index)[start : start + piece]
            done += piece

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of all that is not zeroes, in whole pages but for the end, in order;
        neighbours are one."""
        first = after = -1
        for number in sorted(self._chunks):
            for index in sorted(self._chunks[number]):
                if index != after:
                    if first >= 0:
                        yield first * PAGE, (after - first) * PAGE
                    first = index
                after = index + 1
        if first >= 0:
            yield first * PAGE, min(after * PAGE, self.size) - first * PAGE

    def extent(self, offset: int) -> tuple[bool, int | None]:
        """(whether there is data at an offset, where that ends, in whole pages; None: nowhere)."""
        index = offset // PAGE
        is_data = self._page(index) is not ZEROES
        while (self._page(index) is not ZEROES) is is_data:
            number = index >> CHUNK_BITS
            if number in self._chunks:
                index += 1
                continue
            later = [other for other in self._chunks if other > number]
            if not later:
                return is_data, None
            index = min(later) << CHUNK_BITS
        return is_data, index * PAGE

    def data(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all that is not zeroes, in pieces of at most 1 MiB."""
        for offset, length in self.extents():
            for start in range(offset, offset + length, PIECE):
                yield start, self.read(start, min(PIECE, offset + length - start))

    def digest(self) -> bytes:
        """Tells contents apart: 32 bytes, the same in every process."""
        self._settle_sum()
        return sha256(b"%d:%064x" % (self.size, self._sum)).digest()

    # --- changing ------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer) -> None:
        """Store bytes; the content grows to hold them."""
        length = len(data)
        if not length:
            return
        self.size = max(self.size, offset + length)
        if length == PAGE and not offset % PAGE:
            self._put(offset // PAGE, bytes(data))
            return
        view = memoryview(data)
        index, start = divmod(offset, PAGE)
        done = 0
        while done < length:
            piece = min(PAGE - start, length - done)
            page = bytes(view[done : done + piece])
            if piece < PAGE:
                old = self._page(index)
                page = old[:start] + page + old[start + piece :]
            self._put(index, page)
            done += piece
            index += 1
            start = 0

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range zeroes; the content grows to hold it."""
        if length <= 0:
            return
        end = offset + length
        self.size = max(self.size, end)
        first, last = -(-offset // PAGE), end // PAGE
        if first > last:  # within one page
            self._zero_within(first - 1, offset % PAGE, end % PAGE)
            return
        if offset % PAGE:
            self._zero_within(first - 1, offset % PAGE, PAGE)
        if end % PAGE:
            self._zero_within(last, 0, end % PAGE)
        numbers = range(first >> CHUNK_BITS, (last - 1 >> CHUNK_BITS) + 1)
        few = self._chunks if len(self._chunks) < len(numbers) else numbers
        for number in [number for number in few if number in self._chunks and number in numbers]:
            for index in [index for index in self._chunks[number] if first <= index < last]:
                self._put(index, ZEROES)

    def discard(self, offset: int, length: int) -> None:
        """Make a range zeroes, as far as the content goes."""
        self.write_zeroes(offset, min(length, self.size - offset))

    def take(self, other: Content, offset: int, length: int) -> None:
        """Make a range what it is in another content, and share its pages."""
        self.write_zeroes(offset, length)
        end = min(offset + length, other.size)
        while offset < end:
            index, start = divmod(offset, PAGE)
            piece = min(PAGE - start, end - offset)
            if piece == PAGE:
                self._put(index, other._page(index))
            else:
                self.write(offset, other.read(offset, piece))
            offset += piece

    def _zero_within(self, index: int, start: int, stop: int) -> None:
        page = self._page(index)
        if page is not ZEROES:
            self._put(index, page[:start] + bytes(stop - start) + page[stop:])

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a sparse file, in place of what is there. Raises OSError."""
        with open(path, "wb") as out:
            for offset, data in self.data():
                out.seek(offset)
                out.write(data)
            out.truncate(self.size)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Content:
        """What a file or block device holds. Raises OSError."""
        with open(path, "rb", buffering=0) as source:
            content = cls(source.seek(0, os.SEEK_END))
            for offset, length in _data_of(source.fileno(), content.size):
                for start in range(offset, offset + length, PIECE):
                    wanted = min(PIECE, offset + length - start)
                    content.write(start, os.pread(source.fileno(), wanted, start))
            return content

    # --- pages ---------------------------------------------------------------------------------

    def _page(self, index: int) -> bytes:
        chunk = self._chunks.get(index >> CHUNK_BITS)
        return ZEROES if chunk is None else chunk.get(index, ZEROES)

    def _put(self, index: int, page: bytes) -> None:
        number = index >> CHUNK_BITS
        chunk = self._chunks.get(number)
        old = None if chunk is None else chunk.get(index)
        if page == (old or ZEROES):
            return
        if number not in self._mine:
            chunk = self._chunks[number] = {} if chunk is None else chunk.copy()
            self._mine.add(number)
        assert chunk is not None
        if page == ZEROES:
            del chunk[index]
            self._nb_pages -= 1
        else:
            chunk[index] = page
            self._nb_pages += old is None
        self._unhashed.setdefault(index, old)

    def _settle_sum(self) -> None:
        for index, old in self._unhashed.items():
            if old is not None:
                self._sum -= _number(index, old)
            page = self._page(index)
            if page is not ZEROES:
                self._sum += _number(index, page)
        self._sum &= SUM_MASK
        self._unhashed.clear()


def _number(index: int, page: bytes) -> int:
    return int.from_bytes(sha256(b"%d:" % index + page).digest(), "little")


def _data_of(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not a hole of a file; all of it, if the system cannot tell."""
    hole = 0
    while hole < size:
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno in NO_SEEK_DATA:
                yield 0, size
            elif error.errno != errno.ENXIO:  # no more data
                raise
            return
        yield data, hole - data
