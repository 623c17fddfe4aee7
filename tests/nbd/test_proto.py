"""Layouts against bytes written by hand from the document, and the twins against the layouts."""

from __future__ import annotations

import struct

import pytest
from construct import ConstructError
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd import proto, wire

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)

# (layout, fields, bytes), each from the document's description of the message.
MESSAGES = {
    "greeting": (
        proto.GREETING,
        {"flags": proto.HandshakeFlag.FIXED_NEWSTYLE | proto.HandshakeFlag.NO_ZEROES},
        "4e42444d41474943 49484156454f5054 0003",
    ),
    "client flags": (
        proto.CLIENT_FLAGS,
        int(proto.ClientFlag.FIXED_NEWSTYLE | proto.ClientFlag.NO_ZEROES),
        "00000003",
    ),
    "option": (
        proto.OPTION_HEADER,
        {"option": proto.Option.SET_META_CONTEXT, "length": 513},
        "49484156454f5054 0000000a 00000201",
    ),
    "option reply": (
        proto.OPTION_REPLY,
        {"option": proto.Option.LIST, "type": proto.OptionReply.ERR_TOO_BIG, "data": b"no"},
        "0003e889045565a9 00000003 80000009 00000002 6e6f",
    ),
    "export name reply": (
        proto.EXPORT_NAME_REPLY,
        {"size": 10 << 20, "flags": 0x0D6D},
        "0000000000a00000 0d6d",
    ),
    "info request": (
        proto.INFO_REQUEST,
        {"export_name": b"vol", "information": [3, 0x99]},
        "00000003 766f6c 0002 0003 0099",
    ),
    "meta context request": (
        proto.META_CONTEXT_REQUEST,
        {"export_name": b"v", "nb_queries": 2, "queries": [b"base:", b""]},
        "00000001 76 00000002 00000005 626173653a 00000000",
    ),
    "server": (proto.SERVER, {"name": b"vol", "description": b"d"}, "00000003 766f6c 64"),
    "info export": (
        proto.INFO_EXPORT,
        {"size": 1 << 40, "flags": 0x050F},
        "0000 0000010000000000 050f",
    ),
    "info name": (proto.INFO_NAME, {"name": b"vol"}, "0001 766f6c"),
    "info description": (proto.INFO_DESCRIPTION, {"description": b"d"}, "0002 64"),
    "info block size": (
        proto.INFO_BLOCK_SIZE,
        {"minimum": 1, "preferred": 4096, "maximum": 1 << 26},
        "0003 00000001 00001000 04000000",
    ),
    "meta context": (
        proto.META_CONTEXT,
        {"context_id": 2, "name": b"base:allocation"},
        "00000002 626173653a616c6c6f636174696f6e",
    ),
    "request": (
        proto.REQUEST,
        {
            "flags": proto.CommandFlag.FAST_ZERO | proto.CommandFlag.FUA,
            "type": proto.Command.WRITE_ZEROES,
            "cookie": 0x0102030405060708,
            "offset": 1 << 32,
            "length": 512,
        },
        "25609513 0011 0006 0102030405060708 0000000100000000 00000200",
    ),
    "simple reply": (
        proto.SIMPLE_REPLY,
        {"error": proto.NbdError.ESHUTDOWN, "cookie": 7},
        "67446698 0000006c 0000000000000007",
    ),
    "last chunk": (
        proto.CHUNK,
        {"flags": proto.ReplyFlag.DONE, "type": proto.ReplyType.NONE, "cookie": 7, "length": 0},
        "668e33ef 0001 0000 0000000000000007 00000000",
    ),
    "data chunk": (
        proto.OFFSET_DATA_CHUNK,
        {
            "flags": 0,
            "type": proto.ReplyType.OFFSET_DATA,
            "cookie": 7,
            "length": 8 + 512,
            "offset": 4096,
        },
        "668e33ef 0000 0001 0000000000000007 00000208 0000000000001000",
    ),
    "hole chunk": (
        proto.OFFSET_HOLE_CHUNK,
        {
            "flags": proto.ReplyFlag.DONE,
            "type": proto.ReplyType.OFFSET_HOLE,
            "cookie": 7,
            "length": 12,
            "offset": 4096,
            "hole_size": 65536,
        },
        "668e33ef 0001 0002 0000000000000007 0000000c 0000000000001000 00010000",
    ),
    "block status chunk": (
        proto.BLOCK_STATUS_CHUNK,
        {
            "flags": proto.ReplyFlag.DONE,
            "type": proto.ReplyType.BLOCK_STATUS,
            "cookie": 7,
            "length": 20,
            "context_id": 1,
            "extents": [
                {"length": 512, "status": 0},
                {"length": 65536, "status": proto.StateFlag.HOLE | proto.StateFlag.ZERO},
            ],
        },
        "668e33ef 0001 0005 0000000000000007 00000014 00000001"
        "00000200 00000000 00010000 00000003",
    ),
    "error chunk": (
        proto.ERROR_CHUNK,
        {
            "flags": proto.ReplyFlag.DONE,
            "type": proto.ReplyType.ERROR,
            "cookie": 7,
            "length": 8,
            "error": proto.NbdError.EIO,
            "message": b"no",
        },
        "668e33ef 0001 8001 0000000000000007 00000008 00000005 0002 6e6f",
    ),
    "error offset chunk": (
        proto.ERROR_OFFSET_CHUNK,
        {
            "flags": 0,
            "type": proto.ReplyType.ERROR_OFFSET,
            "cookie": 7,
            "length": 16,
            "error": proto.NbdError.EIO,
            "message": b"no",
            "offset": 512,
        },
        "668e33ef 0000 8002 0000000000000007 00000010 00000005 0002 6e6f 0000000000000200",
    ),
}


@pytest.mark.parametrize(("layout", "fields", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_layout(layout, fields, expected):
    wire_bytes = bytes.fromhex(expected)
    assert layout.build(fields) == wire_bytes
    parsed = layout.parse(wire_bytes)
    assert layout.build(parsed) == wire_bytes
    for name in fields if isinstance(fields, dict) else ():
        assert parsed[name] == fields[name]


@pytest.mark.parametrize(
    "layout",
    [layout for layout, _, _ in MESSAGES.values() if layout is not proto.CLIENT_FLAGS],
    ids=[name for name in MESSAGES if name != "client flags"],
)
def test_fixed_part_is_not_guessed(layout):
    """A message cut short is an error, never a message with defaults."""
    with pytest.raises(ConstructError):
        layout.parse(b"\x00")


def test_export_name_zeroes():
    assert bytes(124) == proto.EXPORT_NAME_ZEROES


def test_too_many_queries_are_not_parsed():
    many = struct.pack(">II", 0, proto.MAX_QUERIES + 1) + bytes(4 * (proto.MAX_QUERIES + 1))
    with pytest.raises(ConstructError, match="validation"):
        proto.META_CONTEXT_REQUEST.parse(many)
    fewer = struct.pack(">II", 0, proto.MAX_QUERIES) + bytes(4 * proto.MAX_QUERIES)
    assert len(proto.META_CONTEXT_REQUEST.parse(fewer).queries) == proto.MAX_QUERIES


# The twins. Each is drawn as its fields after the magic.

TWINS = {
    "request": (
        proto.REQUEST,
        wire.REQUEST,
        proto.REQUEST_MAGIC,
        {"flags": U16, "type": U16, "cookie": U64, "offset": U64, "length": U32},
    ),
    "simple reply": (
        proto.SIMPLE_REPLY,
        wire.SIMPLE_REPLY,
        proto.SIMPLE_REPLY_MAGIC,
        {"error": U32, "cookie": U64},
    ),
    "chunk": (
        proto.CHUNK,
        wire.CHUNK,
        proto.STRUCTURED_REPLY_MAGIC,
        {"flags": U16, "type": U16, "cookie": U64, "length": U32},
    ),
    "data chunk": (
        proto.OFFSET_DATA_CHUNK,
        wire.OFFSET_DATA_CHUNK,
        proto.STRUCTURED_REPLY_MAGIC,
        {"flags": U16, "type": U16, "cookie": U64, "length": U32, "offset": U64},
    ),
    "hole chunk": (
        proto.OFFSET_HOLE_CHUNK,
        wire.OFFSET_HOLE_CHUNK,
        proto.STRUCTURED_REPLY_MAGIC,
        {
            "flags": U16,
            "type": U16,
            "cookie": U64,
            "length": U32,
            "offset": U64,
            "hole_size": U32,
        },
    ),
}

# Twins that are only part of a declaration, or split it otherwise: test_parts_are_equal.
PARTS = {wire.REQUEST_HEAD, wire.ERROR_HEAD, wire.BLOCK_STATUS_HEAD, wire.EXTENT}


@pytest.mark.parametrize(("layout", "twin", "magic", "fields"), TWINS.values(), ids=TWINS)
@given(data=st.data())
def test_twins_are_equal(layout, twin, magic, fields, data):
    values = {name: data.draw(strategy, label=name) for name, strategy in fields.items()}
    packed = twin.pack(magic, *values.values())
    assert packed == layout.build(values)
    assert twin.size == layout.sizeof()
    assert twin.unpack(packed) == (magic, *values.values())
    parsed = layout.parse(packed)
    assert [parsed[name] for name in values] == list(values.values())


@given(flags=U16, number=U16, cookie=U64, offset=U64, length=U32, message=st.binary(max_size=9))
def test_parts_are_equal(flags, number, cookie, offset, length, message):
    fields = {"flags": flags, "type": number, "cookie": cookie, "offset": offset, "length": length}
    head = proto.REQUEST_MAGIC << 32 | flags << 16 | number
    assert wire.REQUEST_HEAD.pack(head, cookie, offset, length) == proto.REQUEST.build(fields)

    extent = {"length": length, "status": flags}
    assert wire.EXTENT.pack(length, flags) == proto.EXTENT.build(extent)

    fields = {"flags": 1, "type": number, "cookie": cookie}
    chunk = proto.BLOCK_STATUS_CHUNK.build(
        fields | {"length": 12, "context_id": length, "extents": [extent]}
    )
    assert chunk == (
        wire.CHUNK.pack(proto.STRUCTURED_REPLY_MAGIC, 1, number, cookie, 12)
        + wire.BLOCK_STATUS_HEAD.pack(length)
        + wire.EXTENT.pack(length, flags)
    )
    error = fields | {"length": 6 + len(message), "error": length, "message": message}
    assert proto.ERROR_CHUNK.build(error) == (
        wire.CHUNK.pack(proto.STRUCTURED_REPLY_MAGIC, 1, number, cookie, 6 + len(message))
        + wire.ERROR_HEAD.pack(length, len(message))
        + message
    )


def test_every_twin_is_tested():
    assert {twin for _, twin, _, _ in TWINS.values()} | PARTS == {
        value for value in vars(wire).values() if isinstance(value, struct.Struct)
    }
