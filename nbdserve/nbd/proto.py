"""The NBD protocol as data: every number and every message, named as the document names it.

Nothing here decides anything. Constants are enums, so that logs and errors can print
names; messages are `construct` declarations, so that a layout is written down once and
works in both directions: the server builds what the client of the nbd driver parses.
What the hot path packs and unpacks per request has a struct.Struct twin in wire.py.

Numbers the document only reserves for experimental extensions (RESIZE,
EXTENDED_HEADERS) are listed to be recognised in a log; none of them is implemented.

Strings stay bytes here. The document asks for UTF-8 without NUL of at most 4096 bytes,
but a client may send anything, and whoever uses a string must look at it first.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import (
    Array,
    Const,
    ExprValidator,
    GreedyBytes,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
    obj_,
    this,
)

INIT_PASSWORD = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

MAX_STRING = 4096
"""Longest string in bytes ("Conventions")."""

MAX_QUERIES = 256
"""Metadata queries taken in one option: our limit, for which the document has ERR_TOO_BIG.

Clients send one or two. Each costs microseconds of parsing, which on a server of one
thread all other clients would wait for.
"""


class HandshakeFlag(IntFlag):
    """What the server can do, 16 bits in the greeting ("Handshake flags")."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """The client's answer to the greeting, 32 bits ("Client flags")."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do, 16 bits ("Transmission flags")."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client asks for during option haggling ("Option types")."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """The type of an answer to an option; errors have bit 31 set ("Option reply types")."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class InfoType(IntEnum):
    """One aspect of an export, asked for and told in INFO and GO (``NBD_REP_INFO``)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """The type of a request ("Request types")."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """How a request wants to be carried out, 16 bits ("Command flags")."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """Flags of a structured reply chunk ("Structured reply flags")."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """The type of a structured reply chunk; errors have bit 15 set ("Structured reply types")."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class NbdError(IntEnum):
    """The errors a reply may carry ("Error values"); 0 is success and has no name."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class StateFlag(IntFlag):
    """The status of an extent in ``base:allocation``."""

    HOLE = 1 << 0
    ZERO = 1 << 1


# Handshake. "Newstyle negotiation", "Fixed newstyle negotiation".

STRING = Prefixed(Int32ub, GreedyBytes)
"""32 bits of length, then that many bytes."""

GREETING = Struct(
    "password" / Const(INIT_PASSWORD),
    "magic" / Const(OPTION_MAGIC),
    "flags" / Int16ub,  # HandshakeFlag
)

CLIENT_FLAGS = Int32ub

OPTION_HEADER = Struct(
    "magic" / Const(OPTION_MAGIC),
    "option" / Int32ub,  # Option, or one we have never heard of
    "length" / Int32ub,  # bytes of data that follow; lets unknown options be skipped
)

OPTION_REPLY = Struct(
    "magic" / Const(OPTION_REPLY_MAGIC, Int64ub),
    "option" / Int32ub,  # as sent by the client
    "type" / Int32ub,  # OptionReply
    "data" / STRING,
)

EXPORT_NAME_REPLY = Struct(
    "size" / Int64ub,  # bytes
    "flags" / Int16ub,  # TransmissionFlag
)
"""The bare answer to EXPORT_NAME; EXPORT_NAME_ZEROES follow unless NO_ZEROES was negotiated."""

EXPORT_NAME_ZEROES = bytes(124)

INFO_REQUEST = Struct(
    "export_name" / STRING,
    "information" / PrefixedArray(Int16ub, Int16ub),  # InfoType, known or not
    Terminated,
)
"""The data of INFO and GO."""

META_CONTEXT_REQUEST = Struct(
    "export_name" / STRING,
    "nb_queries" / ExprValidator(Int32ub, obj_ <= MAX_QUERIES),
    "queries" / Array(this.nb_queries, STRING),
    Terminated,
)
"""The data of LIST_META_CONTEXT and SET_META_CONTEXT; ValidationError for too many queries."""

# What an OPTION_REPLY of a type that is no error carries as data.

SERVER = Struct(
    "name" / STRING,
    "description" / GreedyBytes,
)

INFO_EXPORT = Struct(
    "type" / Const(InfoType.EXPORT, Int16ub),
    "size" / Int64ub,  # bytes
    "flags" / Int16ub,  # TransmissionFlag
)

INFO_NAME = Struct(
    "type" / Const(InfoType.NAME, Int16ub),
    "name" / GreedyBytes,
)

INFO_DESCRIPTION = Struct(
    "type" / Const(InfoType.DESCRIPTION, Int16ub),
    "description" / GreedyBytes,
)

INFO_BLOCK_SIZE = Struct(
    "type" / Const(InfoType.BLOCK_SIZE, Int16ub),
    "minimum" / Int32ub,  # bytes; a power of two, at most 64 KiB
    "preferred" / Int32ub,  # bytes; a power of two, at least 512 and the minimum
    "maximum" / Int32ub,  # bytes of payload in one request or reply
)

META_CONTEXT = Struct(
    "context_id" / Int32ub,  # 0 in the answer to LIST_META_CONTEXT
    "name" / GreedyBytes,
)

# Transmission. "Request message", "Simple reply message", "Structured reply chunk message".

REQUEST = Struct(
    "magic" / Const(REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,  # CommandFlag
    "type" / Int16ub,  # Command
    "cookie" / Int64ub,  # the client's, returned unread
    "offset" / Int64ub,
    "length" / Int32ub,  # of the range; WRITE alone is followed by as many bytes
)

SIMPLE_REPLY = Struct(
    "magic" / Const(SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,  # NbdError, or 0
    "cookie" / Int64ub,
)
"""Followed by the data of a READ that succeeded, which is no part of the declaration."""

_CHUNK_HEADER = (
    "magic" / Const(STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,  # ReplyFlag
    "type" / Int16ub,  # ReplyType
    "cookie" / Int64ub,
    "length" / Int32ub,  # bytes of payload, that is of everything after this field
)

CHUNK = Struct(*_CHUNK_HEADER)

OFFSET_DATA_CHUNK = Struct(
    *_CHUNK_HEADER,
    "offset" / Int64ub,
)
"""Followed by ``length - 8`` bytes of data, which are no part of the declaration."""

OFFSET_HOLE_CHUNK = Struct(
    *_CHUNK_HEADER,
    "offset" / Int64ub,
    "hole_size" / Int32ub,  # bytes, not 0
)

EXTENT = Struct(
    "length" / Int32ub,  # bytes, not 0
    "status" / Int32ub,  # StateFlag in base:allocation; each context has its own meaning
)

BLOCK_STATUS_CHUNK = Struct(
    *_CHUNK_HEADER,
    "context_id" / Int32ub,
    "extents" / Array((this.length - 4) // 8, EXTENT),
)

_MESSAGE = Prefixed(Int16ub, GreedyBytes)

ERROR_CHUNK = Struct(
    *_CHUNK_HEADER,
    "error" / Int32ub,  # NbdError, not 0
    "message" / _MESSAGE,
)

ERROR_OFFSET_CHUNK = Struct(
    *_CHUNK_HEADER,
    "error" / Int32ub,  # NbdError, not 0
    "message" / _MESSAGE,
    "offset" / Int64ub,
)
