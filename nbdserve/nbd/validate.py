"""Which requests are refused before anything is done about them: one table, one function.

COMMANDS says of every command what it may carry, what it needs and how it fails. It is
the only place that knows; the block stack behind it may rely on a request that passed
being in range, and asserts instead of checking again. What a session negotiated is
wholly described by its size, its transmission flags and whether it selected metadata
contexts, so a Validator is made of these three and of nothing alive.

A request may be wrong in several ways; nbdkit's order decides which error it gets (its
validate_request): read-only, range, flags, length. Zero-length requests succeed and do
nothing, as in qemu-nbd; only BLOCK_STATUS cannot, having no extent to answer with. A
FLUSH with a range is refused, since the document reserves those fields. DISC has no row:
it is never answered, so there is no error it could get, and whoever reads requests must
look for it before (or, at no cost to others, when) it is refused here.

The values are the document's ("Error values"). qemu-nbd 7.2 answers EINVAL also where the
document wants ENOSPC or EPERM.

This runs once per request. Each command is compiled into a plain tuple of ints, and a
good request passes five comparisons. Enum flags are far too slow here: one ``&`` of two
IntFlags costs as much as all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.nbd.export import MAXIMUM_PAYLOAD
from nbdserve.nbd.proto import Command, CommandFlag, NbdError, TransmissionFlag

if TYPE_CHECKING:
    from nbdserve.nbd.options import Transmission

_EINVAL = int(NbdError.EINVAL)
_UNLIMITED = 1 << 32
"""Bytes. Longer than the longest length on the wire."""


_NO_COMMAND_FLAGS = CommandFlag(0)
_NO_TRANSMISSION_FLAGS = TransmissionFlag(0)


class Payload(Enum):
    """Who sends as many bytes as the request's length says; a payload has a largest size."""

    NONE = auto()
    FROM_CLIENT = auto()
    TO_CLIENT = auto()


@dataclass(frozen=True, slots=True)
class CommandRule:
    """A row of COMMANDS.

    ``flags`` are valid besides FUA, which is valid everywhere. ``needs`` must be among the
    session's transmission flags. ``past_end`` is the error for a range beyond the export, or
    for any range at all if the command is not ``ranged``. ``shortest`` is in bytes.
    """

    flags: CommandFlag = _NO_COMMAND_FLAGS
    needs: TransmissionFlag = _NO_TRANSMISSION_FLAGS
    ranged: bool = True
    past_end: NbdError = NbdError.EINVAL
    payload: Payload = Payload.NONE
    writes: bool = False
    shortest: int = 0


COMMANDS: dict[Command, CommandRule] = {
    Command.READ: CommandRule(flags=CommandFlag.DF, payload=Payload.TO_CLIENT),
    Command.WRITE: CommandRule(payload=Payload.FROM_CLIENT, writes=True, past_end=NbdError.ENOSPC),
    Command.FLUSH: CommandRule(needs=TransmissionFlag.SEND_FLUSH, ranged=False),
    Command.TRIM: CommandRule(needs=TransmissionFlag.SEND_TRIM, writes=True),
    Command.CACHE: CommandRule(needs=TransmissionFlag.SEND_CACHE),
    Command.WRITE_ZEROES: CommandRule(
        flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        needs=TransmissionFlag.SEND_WRITE_ZEROES,
        writes=True,
        past_end=NbdError.ENOSPC,
    ),
    Command.BLOCK_STATUS: CommandRule(flags=CommandFlag.REQ_ONE, shortest=1),
}
"""Every command that has an answer. All others, RESIZE too, are answered EINVAL."""

FLAG_NEEDS: dict[CommandFlag, TransmissionFlag] = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}
"""Command flags that are only valid where a transmission flag was advertised."""


class _Compiled(NamedTuple):
    """A CommandRule in a session: ints to compare with. 0 for ``refusal`` is no refusal."""

    refusal: int
    end: int
    past_end: int
    forbidden: int
    longest: int
    too_long: int
    shortest: int


class Validator:
    """COMMANDS for one session.

    :param size: of the export in bytes, as this client was told.
    :param flags: transmission flags, as this client was told.
    :param block_status: whether the client selected any metadata context.
    """

    __slots__ = ("_rules",)

    def __init__(self, size: int, flags: TransmissionFlag, *, block_status: bool) -> None:
        self._rules: dict[int, _Compiled] = {
            int(command): _compile(rule, size, flags) for command, rule in COMMANDS.items()
        }
        if not block_status:
            rule = self._rules[Command.BLOCK_STATUS]
            self._rules[Command.BLOCK_STATUS] = rule._replace(refusal=_EINVAL)

    @classmethod
    def of(cls, session: Transmission) -> Validator:
        """The rules for what a handshake ended with."""
        return cls(session.size, session.flags, block_status=bool(session.contexts))

    def validate(self, flags: int, command: int, offset: int, length: int) -> int:
        """Return 0 if the request is a good one, else the NBD_E* value to answer it with.

        The arguments are the request's fields as they came, in the order they came in.
        """
        rule = self._rules.get(command)
        if rule is None:
            return _EINVAL
        refusal, end, past_end, forbidden, longest, too_long, shortest = rule
        if refusal:
            return refusal
        if offset + length > end:  # may exceed 64 bits, and does not wrap
            return past_end
        if flags & forbidden:
            return _EINVAL
        if length > longest:
            return too_long
        if length < shortest:
            return _EINVAL
        return 0


def _compile(rule: CommandRule, size: int, flags: TransmissionFlag) -> _Compiled:
    refusal = 0
    if rule.needs & ~flags:
        refusal = _EINVAL
    if rule.writes and TransmissionFlag.READ_ONLY in flags:
        refusal = int(NbdError.EPERM)
    allowed = rule.flags | CommandFlag.FUA
    for flag, needed in FLAG_NEEDS.items():
        if needed not in flags:
            allowed &= ~flag
    # With structured replies a client is told to ask again for less ("NBD_CMD_READ").
    retry = rule.payload is Payload.TO_CLIENT and TransmissionFlag.SEND_DF in flags
    return _Compiled(
        refusal=refusal,
        end=size if rule.ranged else 0,
        past_end=int(rule.past_end),
        forbidden=0xFFFF & ~int(allowed),
        longest=_UNLIMITED if rule.payload is Payload.NONE else MAXIMUM_PAYLOAD,
        too_long=int(NbdError.EOVERFLOW if retry else NbdError.EINVAL),
        shortest=rule.shortest,
    )
