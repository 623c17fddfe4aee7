"""Option haggling: one small function per NBD_OPT_*, found by OPTION_HANDLERS.

A handler gets the whole data of its option and gives back the whole answer: option
replies as bytes, and an outcome if haggling ends with it. It never sees a partial
message and does no I/O. Framing, limits in time and the order of messages are
handshake.py's; this module knows only what options mean.

Each row of the table also says how many bytes of data its option can make sense of.
More than that is never buffered: handshake.py drops it and has the row's ``excess``
answered. So a client costs us at most the longest row.

Where the document leaves a choice, qemu-nbd 7.2 was asked over a socket and its answer
taken, with these exceptions: a string over 4096 bytes is refused wherever it stands
(qemu-nbd ignores a query of that kind), data after the last query is refused (qemu-nbd
hangs up at the next option), and STARTTLS is unknown here, as TLS is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from construct import ConstructError, ValidationError

from nbdserve.nbd import metacontext, proto
from nbdserve.nbd.export import MAXIMUM_PAYLOAD, MINIMUM_BLOCK_SIZE, Export
from nbdserve.nbd.proto import MAX_QUERIES, MAX_STRING, InfoType, Option, OptionReply

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdserve.nbd.proto import TransmissionFlag

LONGEST_INFO_REQUEST = 4 + MAX_STRING + 2 + 2 * 128
"""Bytes. The longest name and 128 kinds of information, of which the document has four."""

LONGEST_META_CONTEXT_REQUEST = 64 << 10
"""Bytes. MAX_QUERIES queries as long as the document wants strings to be (256 bytes)."""

QUOTED = 80
"""Characters of a client's own words that are repeated to it, as in qemu-nbd."""


@dataclass(frozen=True, slots=True)
class Transmission:
    """Haggling ended well: requests follow.

    ``size`` and ``flags`` are what this client was told, and what its requests are to be
    held against. ``contexts`` are (id, name), in the order their chunks are sent in.
    """

    export: Export
    size: int
    flags: TransmissionFlag
    structured_replies: bool
    contexts: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is to be closed once what was answered so far is sent; why, for the log."""

    reason: str


class Answer(NamedTuple):
    """What an option leads to: bytes for the client, and an end of haggling or None."""

    replies: bytes
    outcome: Transmission | Closed | None = None


@dataclass(slots=True)
class Haggling:
    """What one connection has agreed on so far."""

    exports: Mapping[bytes, Export]
    no_zeroes: bool = False
    structured_replies: bool = False
    selection: tuple[Export, tuple[tuple[int, str], ...]] | None = None

    def enter(self, export: Export) -> Transmission:
        """Choose ``export``; contexts selected for another one are void."""
        selected_for, contexts = self.selection or (None, ())
        return Transmission(
            export=export,
            size=export.backend.size,
            flags=export.flags_for(structured_replies=self.structured_replies),
            structured_replies=self.structured_replies,
            contexts=contexts if selected_for is export else (),
        )


class OptionHandler(NamedTuple):
    """A row of OPTION_HANDLERS.

    ``handle(haggling, option, data)`` answers up to ``longest`` bytes of data,
    ``excess(haggling, option, length)`` a longer option whose data was dropped.
    """

    handle: Callable[[Haggling, int, bytes], Answer]
    longest: int
    excess: Callable[[Haggling, int, int], Answer]


class _Refusal(Exception):
    """Ends a handler; ``answer`` turns it into the error reply. Never leaves this module."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


def option_name(option: int) -> str:
    """The document's name of an option, or its number."""
    return Option(option).name if option in Option.__members__.values() else f"option {option}"


def answer(haggling: Haggling, option: int, data: bytes) -> Answer:
    """Answer an option whose data fits its row. Every option that is not too long ends up here."""
    try:
        return handler_of(option).handle(haggling, option, data)
    except _Refusal as refusal:
        return _refuse(option, refusal.reply, str(refusal))


def answer_excess(haggling: Haggling, option: int, length: int) -> Answer:
    """Answer an option whose ``length`` bytes of data were too many for its row, and dropped."""
    return handler_of(option).excess(haggling, option, length)


def handler_of(option: int) -> OptionHandler:
    """The row of an option; unknown options have one too."""
    return OPTION_HANDLERS.get(option, _UNSUPPORTED)


# Replies


def _reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    message: bytes = proto.OPTION_REPLY.build({"option": option, "type": reply, "data": data})
    return message


def _acknowledge(option: int) -> Answer:
    return Answer(_reply(option, OptionReply.ACK))


def _refuse(option: int, reply: OptionReply, text: str) -> Answer:
    return Answer(_reply(option, reply, text.encode()))


def _takes_no_data(_haggling: Haggling, option: int, length: int) -> Answer:
    text = f"{option_name(option)} takes no data, but {length} bytes came with it"
    return _refuse(option, OptionReply.ERR_INVALID, text)


def _too_big(_haggling: Haggling, option: int, length: int) -> Answer:
    text = f"{option_name(option)}: {length} bytes of data are more than this server takes"
    return _refuse(option, OptionReply.ERR_TOO_BIG, text)


# Requests


def _parse(layout: Any, option: int, data: bytes) -> Any:  # noqa: ANN401 - construct is untyped
    try:
        return layout.parse(data)
    except ValidationError:
        text = f"{option_name(option)}: more than {MAX_QUERIES} queries"
        raise _Refusal(OptionReply.ERR_TOO_BIG, text) from None
    except ConstructError:
        text = f"{option_name(option)}: the lengths inside do not match its {len(data)} bytes"
        raise _Refusal(OptionReply.ERR_INVALID, text) from None


def _check_strings(option: int, *strings: bytes) -> None:
    for string in strings:
        if len(string) > MAX_STRING:
            text = f"a string of {len(string)} bytes, {MAX_STRING} are allowed"
            raise _Refusal(OptionReply.ERR_INVALID, f"{option_name(option)}: {text}")
        if b"\0" in string:
            text = f"{option_name(option)}: a string contains a NUL byte"
            raise _Refusal(OptionReply.ERR_INVALID, text)


def _find(haggling: Haggling, name: bytes) -> Export:
    export = haggling.exports.get(name)
    if export is None:
        raise _Refusal(OptionReply.ERR_UNKNOWN, f"no export is named {_quote(name)}")
    return export


def _quote(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


# The options


def _export_name(haggling: Haggling, _option: int, name: bytes) -> Answer:
    export = haggling.exports.get(name)
    if export is None:  # this option's answer has no room for an error
        return Answer(b"", Closed(f"EXPORT_NAME: no export is named {_quote(name)}"))
    entered = haggling.enter(export)
    message: bytes = proto.EXPORT_NAME_REPLY.build({"size": entered.size, "flags": entered.flags})
    zeroes = b"" if haggling.no_zeroes else proto.EXPORT_NAME_ZEROES
    return Answer(message + zeroes, entered)


def _export_name_too_long(_haggling: Haggling, _option: int, length: int) -> Answer:
    return Answer(b"", Closed(f"EXPORT_NAME: a name of {length} bytes, {MAX_STRING} are allowed"))


def _abort(_haggling: Haggling, option: int, _ignored: object) -> Answer:
    return Answer(_reply(option, OptionReply.ACK), Closed("the client ended the negotiation"))


def _list(haggling: Haggling, option: int, _data: bytes) -> Answer:
    replies = b"".join(
        _reply(
            option,
            OptionReply.SERVER,
            proto.SERVER.build({"name": name, "description": export.description.encode()}),
        )
        for name, export in haggling.exports.items()
    )
    return Answer(replies + _reply(option, OptionReply.ACK))


def _info(haggling: Haggling, option: int, data: bytes) -> Answer:
    export, requested = _info_request(haggling, option, data)
    entered = haggling.enter(export)
    blocks: list[bytes] = []
    if InfoType.NAME in requested:
        blocks.append(proto.INFO_NAME.build({"name": export.name.encode()}))
    if export.description:
        blocks.append(proto.INFO_DESCRIPTION.build({"description": export.description.encode()}))
    blocks.append(
        proto.INFO_BLOCK_SIZE.build(
            {
                "minimum": MINIMUM_BLOCK_SIZE,
                "preferred": export.preferred_block_size,
                "maximum": MAXIMUM_PAYLOAD,
            }
        )
    )
    blocks.append(proto.INFO_EXPORT.build({"size": entered.size, "flags": entered.flags}))
    replies = b"".join(_reply(option, OptionReply.INFO, block) for block in blocks)
    return Answer(
        replies + _reply(option, OptionReply.ACK),
        entered if option == Option.GO else None,
    )


def _info_request(haggling: Haggling, option: int, data: bytes) -> tuple[Export, set[int]]:
    request = _parse(proto.INFO_REQUEST, option, data)
    name: bytes = request.export_name
    _check_strings(option, name)
    return _find(haggling, name), set(request.information)


def _structured_reply(haggling: Haggling, option: int, _data: bytes) -> Answer:
    if haggling.structured_replies:
        text = "STRUCTURED_REPLY: already negotiated"
        return _refuse(option, OptionReply.ERR_INVALID, text)
    haggling.structured_replies = True
    return _acknowledge(option)


def _list_meta_context(haggling: Haggling, option: int, data: bytes) -> Answer:
    # Allowed before STRUCTURED_REPLY, as in qemu-nbd: looking is not using.
    export, queries = _meta_context_request(haggling, option, data)
    listed = [(0, name) for name in metacontext.listing(export.contexts, queries)]
    return _meta_contexts(option, listed)


def _set_meta_context(haggling: Haggling, option: int, data: bytes) -> Answer:
    haggling.selection = None  # also if this fails
    if not haggling.structured_replies:
        text = "SET_META_CONTEXT: needs STRUCTURED_REPLY first"
        return _refuse(option, OptionReply.ERR_INVALID, text)
    export, queries = _meta_context_request(haggling, option, data)
    selected = metacontext.select(export.contexts, queries)
    haggling.selection = export, tuple(selected)
    return _meta_contexts(option, selected)


def _set_meta_context_too_big(haggling: Haggling, option: int, length: int) -> Answer:
    haggling.selection = None
    return _too_big(haggling, option, length)


def _meta_context_request(
    haggling: Haggling, option: int, data: bytes
) -> tuple[Export, list[bytes]]:
    request = _parse(proto.META_CONTEXT_REQUEST, option, data)
    name: bytes = request.export_name
    queries: list[bytes] = list(request.queries)
    _check_strings(option, name, *queries)
    return _find(haggling, name), queries


def _meta_contexts(option: int, contexts: list[tuple[int, str]]) -> Answer:
    replies = b"".join(
        _reply(
            option,
            OptionReply.META_CONTEXT,
            proto.META_CONTEXT.build({"context_id": context_id, "name": name.encode()}),
        )
        for context_id, name in contexts
    )
    return Answer(replies + _reply(option, OptionReply.ACK))


def _unsupported(_haggling: Haggling, option: int, _ignored: object) -> Answer:
    text = f"{option_name(option)} is not supported"
    return _refuse(option, OptionReply.ERR_UNSUP, text)


OPTION_HANDLERS: dict[int, OptionHandler] = {
    Option.EXPORT_NAME: OptionHandler(_export_name, MAX_STRING, _export_name_too_long),
    Option.ABORT: OptionHandler(_abort, 0, _abort),
    Option.LIST: OptionHandler(_list, 0, _takes_no_data),
    Option.INFO: OptionHandler(_info, LONGEST_INFO_REQUEST, _too_big),
    Option.GO: OptionHandler(_info, LONGEST_INFO_REQUEST, _too_big),
    Option.STRUCTURED_REPLY: OptionHandler(_structured_reply, 0, _takes_no_data),
    Option.LIST_META_CONTEXT: OptionHandler(
        _list_meta_context, LONGEST_META_CONTEXT_REQUEST, _too_big
    ),
    Option.SET_META_CONTEXT: OptionHandler(
        _set_meta_context, LONGEST_META_CONTEXT_REQUEST, _set_meta_context_too_big
    ),
}
"""Every option this server takes; all others are answered ERR_UNSUP and their data dropped."""

_UNSUPPORTED = OptionHandler(_unsupported, 0, _unsupported)
