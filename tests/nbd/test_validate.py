"""Every command with every flag, every edge of the range, and every error value.

The oracle of the big table is written the other way round from the code: per flag, the
commands that take it (the document's "Command flags").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd.export import MAXIMUM_PAYLOAD, Export
from nbdserve.nbd.options import Transmission
from nbdserve.nbd.proto import Command, CommandFlag, NbdError, TransmissionFlag
from nbdserve.nbd.validate import COMMANDS, Payload, Validator

SIZE = 10 << 20
RW = TransmissionFlag(0x0D6D)
RW_DF = RW | TransmissionFlag.SEND_DF
RO = TransmissionFlag(0x050F)
RO_DF = RO | TransmissionFlag.SEND_DF

READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS = (
    Command.READ,
    Command.WRITE,
    Command.FLUSH,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
)
EVERY = frozenset({READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS})
WRITES = frozenset({WRITE, TRIM, ZEROES})

TAKEN_BY = {
    CommandFlag.FUA: EVERY,
    CommandFlag.NO_HOLE: {ZEROES},
    CommandFlag.DF: {READ},
    CommandFlag.REQ_ONE: {STATUS},
    CommandFlag.FAST_ZERO: {ZEROES},
}
"""A bit that is not here is taken by none."""


def test_table_covers_the_document():
    assert set(COMMANDS) == EVERY
    assert {c for c, rule in COMMANDS.items() if rule.writes} == WRITES
    assert {c: r.payload for c, r in COMMANDS.items() if r.payload is not Payload.NONE} == {
        READ: Payload.TO_CLIENT,
        WRITE: Payload.FROM_CLIENT,
    }


@pytest.mark.parametrize("bit", range(16))
@pytest.mark.parametrize("command", range(12))
@pytest.mark.parametrize("session", [RW, RW_DF, RO, RO_DF], ids=["rw", "rw-df", "ro", "ro-df"])
def test_every_command_with_every_flag(session, command, bit):
    structured = TransmissionFlag.SEND_DF in session
    validator = Validator(SIZE, session, block_status=structured)
    length = 0 if command == FLUSH else 512
    flag = 1 << bit

    if command not in EVERY or (command == STATUS and not structured):
        known = False
    elif flag == CommandFlag.DF:
        known = command == READ and structured
    else:
        known = command in TAKEN_BY.get(flag, ())
    if command in WRITES and TransmissionFlag.READ_ONLY in session:
        expected = NbdError.EPERM
    else:
        expected = 0 if known else NbdError.EINVAL

    assert validator.validate(flag, command, 0, length) == expected
    # A wrong flag stays wrong in company.
    assert validator.validate(flag | CommandFlag.FUA, command, 0, length) == expected


@pytest.mark.parametrize("command", [*EVERY, 2, 8, 9, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("session", [RW_DF, RO_DF], ids=["rw", "ro"])
def test_without_flags(session, command):
    validator = Validator(SIZE, session, block_status=True)
    expected = 0
    if command not in EVERY:
        expected = NbdError.EINVAL
    elif command in WRITES and session is RO_DF:
        expected = NbdError.EPERM
    assert validator.validate(0, command, 0, 0 if command == FLUSH else 1) == expected


@pytest.mark.parametrize("command", sorted(EVERY - {FLUSH}))
@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [
        (0, SIZE, True),
        (SIZE - 1, 1, True),
        (SIZE - 512, 512, True),
        (SIZE - 512, 513, False),
        (SIZE, 1, False),
        (0, SIZE + 1, False),
        (SIZE + 1, 0, False),
        (SIZE + 1, 512, False),
        ((1 << 63) - 1, 1, False),
        ((1 << 64) - 512, 512, False),  # the sum is 2**64, which is 0 in 64 bits
        ((1 << 64) - 512, 1024, False),
        ((1 << 64) - 1, (1 << 32) - 1, False),
    ],
)
def test_range(command, offset, length, fits):
    validator = Validator(SIZE, RW_DF, block_status=True)
    past_end = NbdError.ENOSPC if command in (WRITE, ZEROES) else NbdError.EINVAL
    assert validator.validate(0, command, offset, length) == (0 if fits else past_end)


@pytest.mark.parametrize("command", sorted(EVERY - {FLUSH}))
@pytest.mark.parametrize("offset", [0, 512, SIZE])
def test_zero_length(command, offset):
    """Nothing done is done well, as in qemu-nbd; but there is no status of nothing."""
    validator = Validator(SIZE, RW_DF, block_status=True)
    expected = NbdError.EINVAL if command == STATUS else 0
    assert validator.validate(0, command, offset, 0) == expected


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 0, 0), (0, 1, 22), (1, 0, 22), (512, 512, 22), ((1 << 64) - 1, 1, 22)],
)
@pytest.mark.parametrize("session", [RW, RO])
def test_flush_has_no_range(session, offset, length, expected):
    validator = Validator(SIZE, session, block_status=False)
    assert validator.validate(0, FLUSH, offset, length) == expected


@pytest.mark.parametrize(
    ("session", "command", "expected"),
    [
        (RW, READ, NbdError.EINVAL),
        (RW_DF, READ, NbdError.EOVERFLOW),
        (RW, WRITE, NbdError.EINVAL),
        (RW_DF, WRITE, NbdError.EINVAL),
        # No payload, no limit ("Size constraints").
        (RW_DF, TRIM, 0),
        (RW_DF, ZEROES, 0),
        (RW_DF, CACHE, 0),
        (RW_DF, STATUS, 0),
    ],
)
def test_longer_than_a_payload(session, command, expected):
    validator = Validator(1 << 40, session, block_status=True)
    assert validator.validate(0, command, 0, MAXIMUM_PAYLOAD) == 0
    assert validator.validate(0, command, 0, MAXIMUM_PAYLOAD + 1) == expected
    assert validator.validate(0, command, 0, (1 << 32) - 1) == expected


@pytest.mark.parametrize(
    ("missing", "command", "flags"),
    [
        (TransmissionFlag.SEND_FLUSH, FLUSH, 0),
        (TransmissionFlag.SEND_TRIM, TRIM, 0),
        (TransmissionFlag.SEND_CACHE, CACHE, 0),
        (TransmissionFlag.SEND_WRITE_ZEROES, ZEROES, 0),
        (TransmissionFlag.SEND_FUA, WRITE, CommandFlag.FUA),
        (TransmissionFlag.SEND_FAST_ZERO, ZEROES, CommandFlag.FAST_ZERO),
        (TransmissionFlag.SEND_DF, READ, CommandFlag.DF),
    ],
)
def test_what_was_not_advertised_is_refused(missing, command, flags):
    with_it = Validator(SIZE, RW_DF, block_status=False)
    without = Validator(SIZE, RW_DF & ~missing, block_status=False)
    assert with_it.validate(flags, command, 0, 0) == 0
    assert without.validate(flags, command, 0, 0) == NbdError.EINVAL


def test_order_of_errors():
    """Read-only before range, range before flags, flags before length: nbdkit's order."""
    read_only = Validator(SIZE, RO_DF, block_status=True)
    writable = Validator(1 << 20, RW_DF, block_status=True)
    assert read_only.validate(0xFFFF, WRITE, SIZE, 512) == NbdError.EPERM
    assert writable.validate(0xFFFF, WRITE, SIZE, 512) == NbdError.ENOSPC
    huge = Validator(1 << 40, RW_DF, block_status=True)
    assert huge.validate(0xFFFF, READ, 0, MAXIMUM_PAYLOAD + 1) == NbdError.EINVAL


def test_block_status_needs_a_context():
    validator = Validator(SIZE, RW_DF, block_status=False)
    assert validator.validate(0, STATUS, 0, 512) == NbdError.EINVAL


def test_empty_export():
    validator = Validator(0, RW, block_status=False)
    assert validator.validate(0, READ, 0, 0) == 0
    assert validator.validate(0, READ, 0, 1) == NbdError.EINVAL
    assert validator.validate(0, WRITE, 0, 1) == NbdError.ENOSPC


@dataclass
class FakeBackend:
    size: int = SIZE * 2
    read_only: bool = False


@pytest.mark.parametrize("contexts", [(), ((0, "base:allocation"),)])
def test_made_from_what_the_client_was_told(contexts):
    """The export has grown since; this client does not know, and is held to what it does."""
    session = Transmission(Export("", FakeBackend()), SIZE, RW_DF, True, contexts)
    validator = Validator.of(session)
    assert validator.validate(0, READ, SIZE, 512) == NbdError.EINVAL
    assert validator.validate(CommandFlag.DF, READ, SIZE - 512, 512) == 0
    assert validator.validate(0, STATUS, 0, 512) == (0 if contexts else NbdError.EINVAL)


@given(
    request=st.binary(min_size=24, max_size=24),
    command=st.integers(0, 9),
    session=st.integers(0, 0x1FFF).map(TransmissionFlag),
    size=st.integers(0, (1 << 63) - 1),
    block_status=st.booleans(),
)
def test_any_request_gets_a_value_of_the_document(request, command, session, size, block_status):
    """Any bytes give 0 or an NBD_E* value, and 0 only for what lies inside the export."""
    flags, _, _, offset, length = struct.unpack(">HHQQI", request)
    error = Validator(size, session, block_status=block_status).validate(
        flags, command, offset, length
    )
    if error:
        assert NbdError(error) in (
            NbdError.EPERM,
            NbdError.EINVAL,
            NbdError.ENOSPC,
            NbdError.EOVERFLOW,
        )
    else:
        assert offset + length <= size
        assert not flags & ~0x1F
