"""The handshake phase as a table of states: bytes in, bytes and one outcome out.

Everything that decides what may come next on a connection before its first request is
TRANSITIONS; a diagram can be drawn from it. A step consumes exactly one message and
names the event it was; the table turns the event into the next state, and an event a
state does not list is a bug here, never a client's doing. What the options mean is
options.py's. Only (fixed) newstyle is spoken: the older style is withdrawn.

Any bytes whatsoever lead to replies and an outcome, at a bounded price: the buffer holds
one message at most (65 KiB, see options.py), each byte is looked at once, data that no
option could use is counted and dropped, and both the size and the number of options are
limited. How long a silent client may take is connection.py's question, for there is no
clock here.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from construct import ConstructError

from nbdserve.nbd import options, proto
from nbdserve.nbd.options import Closed, Haggling, Transmission
from nbdserve.nbd.proto import ClientFlag, HandshakeFlag, Option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.nbd.export import Export

__all__ = ["TRANSITIONS", "Closed", "Event", "Handshake", "State", "Transmission"]

MAX_OPTIONS = 128
"""Options one client may send. Real clients send about ten; nbdkit made do with 32 for years.

It also bounds what a client can make us answer at once by sending options without waiting
for replies: 128 times one list of all exports.
"""

MAX_OPTION_LENGTH = 32 << 20
"""Bytes of data after which an option is an attack and not a mistake; the value is qemu-nbd's."""


class State(Enum):
    """What the next bytes from the client are."""

    CLIENT_FLAGS = auto()
    OPTION_HEADER = auto()
    OPTION_DATA = auto()
    EXCESS_DATA = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


class Event(Enum):
    """What a message turned out to be."""

    AGREED = "the client's flags are ones we know"
    ANNOUNCED = "an option with data we can hold"
    TOO_LONG = "an option with more data than it has use for"
    ANSWERED = "an option is done and more may come"
    ENTERED = "an export was chosen"
    ENDED = "the client left, or broke a rule that cannot be answered"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.CLIENT_FLAGS: {
        Event.AGREED: State.OPTION_HEADER,
        Event.ENDED: State.CLOSED,
    },
    State.OPTION_HEADER: {
        Event.ANNOUNCED: State.OPTION_DATA,
        Event.TOO_LONG: State.EXCESS_DATA,
        Event.ENDED: State.CLOSED,
    },
    State.OPTION_DATA: {
        Event.ANSWERED: State.OPTION_HEADER,
        Event.ENTERED: State.TRANSMISSION,
        Event.ENDED: State.CLOSED,
    },
    State.EXCESS_DATA: {
        Event.ANSWERED: State.OPTION_HEADER,
        Event.ENDED: State.CLOSED,
    },
    State.TRANSMISSION: {},
    State.CLOSED: {},
}


class Handshake:
    """One connection's handshake, server side.

    Send ``greeting()``, then feed ``receive()`` and send what it returns until ``outcome``
    is set. After a Transmission ``trailing`` holds what the client sent behind its last
    option: its first requests.

    :param exports: in the order they are listed; names are unique.
    """

    def __init__(self, exports: Sequence[Export]) -> None:
        self.outcome: Transmission | Closed | None = None
        self.trailing = b""
        self.state = State.CLIENT_FLAGS
        self._haggling = Haggling({export.name.encode(): export for export in exports})
        self._fixed_newstyle = False
        self._nb_options = 0
        self._option = 0  # the one whose data is awaited
        self._length = 0  # of that data
        self._message = bytearray()
        self._missing = proto.CLIENT_FLAGS.sizeof()  # bytes until the message is whole
        self._steps: dict[State, Callable[[bytes], tuple[Event, bytes]]] = {
            State.CLIENT_FLAGS: self._client_flags,
            State.OPTION_HEADER: self._option_header,
            State.OPTION_DATA: self._option_data,
            State.EXCESS_DATA: self._excess_data,
        }

    def greeting(self) -> bytes:
        """What the server says first."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        message: bytes = proto.GREETING.build({"flags": flags})
        return message

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take what the client sent, in pieces of any size; return what to send.

        :raises RuntimeError: there already was an outcome, so ``data`` is none of ours.
        """
        if self.outcome is not None:
            raise RuntimeError("the handshake is over")
        view = memoryview(data)
        replies = bytearray()
        while (step := self._steps.get(self.state)) is not None:
            part = view[: self._missing]
            view = view[len(part) :]
            self._missing -= len(part)
            if self.state is not State.EXCESS_DATA:
                self._message += part
            if self._missing:
                return bytes(replies)
            event, reply = step(bytes(self._message))
            self._message.clear()
            replies += reply
            self._move(event)
        if self.state is State.TRANSMISSION:
            self.trailing = bytes(view)
        return bytes(replies)

    def _move(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state][event]
        if self.state is State.OPTION_HEADER:
            self._missing = proto.OPTION_HEADER.sizeof()
        else:
            self._missing = self._length

    # The steps: one whole message in; what it was, and the answer to it, out.

    def _client_flags(self, message: bytes) -> tuple[Event, bytes]:
        flags: int = proto.CLIENT_FLAGS.parse(message)
        # An int, for the complement of an IntFlag has only the bits the enum knows.
        unknown = flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
        if unknown:
            return self._end(f"unknown client flags 0x{unknown:x}")
        self._fixed_newstyle = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._haggling.no_zeroes = bool(flags & ClientFlag.NO_ZEROES)
        return Event.AGREED, b""

    def _option_header(self, message: bytes) -> tuple[Event, bytes]:
        try:
            header = proto.OPTION_HEADER.parse(message)
        except ConstructError:
            return self._end(f"{message[:8]!r} where an option should begin")
        self._option = header.option
        self._length = header.length
        self._nb_options += 1
        name = options.option_name(self._option)
        if self._nb_options > MAX_OPTIONS:
            return self._end(f"more than {MAX_OPTIONS} options")
        if not self._fixed_newstyle and self._option != Option.EXPORT_NAME:
            return self._end(f"{name} from a client that did not agree on fixed newstyle")
        if self._length > MAX_OPTION_LENGTH:
            return self._end(f"{name} with {self._length} bytes of data")
        if self._length > options.handler_of(self._option).longest:
            return Event.TOO_LONG, b""
        return Event.ANNOUNCED, b""

    def _option_data(self, message: bytes) -> tuple[Event, bytes]:
        return self._conclude(options.answer(self._haggling, self._option, message))

    def _excess_data(self, _message: bytes) -> tuple[Event, bytes]:
        return self._conclude(options.answer_excess(self._haggling, self._option, self._length))

    def _conclude(self, answer: options.Answer) -> tuple[Event, bytes]:
        self.outcome = answer.outcome
        if answer.outcome is None:
            return Event.ANSWERED, answer.replies
        if isinstance(answer.outcome, Transmission):
            return Event.ENTERED, answer.replies
        return Event.ENDED, answer.replies

    def _end(self, reason: str) -> tuple[Event, bytes]:
        self.outcome = Closed(reason)
        return Event.ENDED, b""
