"""Long reads with structured replies: a chunk for each piece of data or zeroes, done at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.nbd.commands import hole_chunk, read_reply_head

if TYPE_CHECKING:
    from nbdserve.block.backend import BlockBackend
    from nbdserve.block.run import Miss

__all__ = ["put", "read_sparse"]

# Pieces that are answered inline. Their heads, and a read of MAX_INLINE behind a batch of other
# replies, have room in a page of the outbox (budget.OUTGOING).
MAX_PIECES = 256


def put(out: memoryview, fill: int, reply: bytes) -> int:
    """Append to a page that is filled so far; returns how far it is then."""
    end = fill + len(reply)
    out[fill:end] = reply
    return end


def read_sparse(
    backend: BlockBackend, cookie: int, offset: int, length: int, out: memoryview, fill: int
) -> tuple[int | None, Miss | None]:
    """Append all chunks of a READ to `out`; returns how far it is filled then, or None, and why if
    that is known: it cannot be done at once."""
    pieces = backend.map_nowait(offset, length)
    if pieces is None or len(pieces) > MAX_PIECES:
        return None, None
    end = offset + length
    for is_hole, nb_bytes in pieces:
        last = offset + nb_bytes == end
        if is_hole:
            fill = put(out, fill, hole_chunk(cookie, offset, nb_bytes, last=last))
        else:
            head = read_reply_head(cookie, offset, nb_bytes, structured=True, last=last)
            fill = put(out, fill, head)
            miss = backend.read_nowait(offset, out[fill : fill + nb_bytes])
            if miss is not None:
                return None, miss
            fill += nb_bytes
        offset += nb_bytes
    return fill, None
