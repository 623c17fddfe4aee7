"""An export: a name in front of a block backend, and what clients are told about it.

Everything a client learns of an export before its first request comes from here: size,
transmission flags, block sizes, metadata contexts. Nothing here does I/O, and nothing
depends on one connection, save that SEND_DF goes only to clients that negotiated
structured replies.

The flags are those of qemu-nbd 7.2 (nbd_export_create): 0x0d6d writable, 0x050f
read-only, CAN_MULTI_CONN only where more than one client may connect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError
from nbdserve.nbd.metacontext import BASE_ALLOCATION, MetaContext
from nbdserve.nbd.proto import TransmissionFlag

if TYPE_CHECKING:
    from nbdserve.block.backend import BlockBackend

MINIMUM_BLOCK_SIZE = 1
"""Bytes. Unaligned edges are our work, not the client's, so no client need ask for block sizes."""

MAXIMUM_PAYLOAD = 64 << 20
"""Bytes in one READ or WRITE, as in nbdkit and libnbd; the document asks for 32 MiB at least."""

_ALWAYS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_CACHE
)
_WRITABLE = (
    TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """One thing to connect to. Two exports are equal only if they are the same one.

    :param name: as clients ask for it; "" is the default export.
    :param description: shown to people by clients that list exports.
    :param preferred_block_size: bytes; where requests need no read-modify-write. QEMU
        always says 4096.
    :param multi_conn: whether several clients may be connected at once; they then see
        each other's flushes.
    :raises ConfigError: a preferred block size the protocol does not allow.
    """

    name: str
    backend: BlockBackend
    description: str = ""
    preferred_block_size: int = 4096
    multi_conn: bool = True
    contexts: tuple[MetaContext, ...] = (BASE_ALLOCATION,)

    def __post_init__(self) -> None:
        size = self.preferred_block_size
        if size & (size - 1) or not 512 <= size <= MAXIMUM_PAYLOAD:
            raise ConfigError(
                f"export {self.name!r}: the preferred block size {size} is not a power of two"
                f" from 512 to {MAXIMUM_PAYLOAD}"
            )

    @property
    def transmission_flags(self) -> TransmissionFlag:
        """The flags for a client without structured replies."""
        flags = _ALWAYS
        flags |= TransmissionFlag.READ_ONLY if self.backend.read_only else _WRITABLE
        if self.multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return flags

    def flags_for(self, *, structured_replies: bool) -> TransmissionFlag:
        """The flags for one client: SEND_DF needs structured replies ("Transmission flags")."""
        if structured_replies:
            return self.transmission_flags | TransmissionFlag.SEND_DF
        return self.transmission_flags
