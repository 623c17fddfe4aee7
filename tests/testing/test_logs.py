"""A server's log is had whole, and the program's own logging does not notice."""

import logging
import threading

import pytest

from nbdserve.testing.logs import Log

ABOVE = logging.getLogger("nbdserve")
CHILD = logging.getLogger("nbdserve.some.module")


class Collects(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def at_root():
    handler = Collects()
    root = logging.getLogger()
    root.addHandler(handler)
    yield handler.messages
    root.removeHandler(handler)


@pytest.fixture
def log():
    log = Log()
    log.open(threading.get_ident())
    yield log
    log.close()


def say_all():
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        CHILD.log(level, "a line at %d", level)


def test_every_line_is_taken_and_only_those_that_were_wanted_go_up(log, at_root):
    say_all()
    lines = str(log).splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "DEBUG a line at 10", "INFO a line at 20", "WARNING a line at 30",
    ]  # fmt: skip
    assert at_root == ["a line at 30"]


def test_afterwards_all_is_as_before():
    before = ABOVE.level, ABOVE.parent, ABOVE.handlers[:], CHILD.isEnabledFor(logging.DEBUG)
    one, other = Log(), Log()
    one.open(1)
    other.open(2)
    one.close()
    assert CHILD.isEnabledFor(logging.DEBUG)
    other.close()
    other.close()
    after = ABOVE.level, ABOVE.parent, ABOVE.handlers[:], CHILD.isEnabledFor(logging.DEBUG)
    assert after == before
    assert not CHILD.isEnabledFor(logging.DEBUG)


def test_a_program_that_wants_debug_lines_has_them(at_root):
    ABOVE.setLevel(logging.DEBUG)
    log = Log()
    log.open(threading.get_ident())
    try:
        say_all()
    finally:
        log.close()
        level = ABOVE.level
        CHILD.debug("afterwards")
        ABOVE.setLevel(logging.NOTSET)
    assert at_root == ["a line at 10", "a line at 20", "a line at 30", "afterwards"]
    assert level == logging.DEBUG


def test_a_program_that_wants_none_has_none(at_root):
    ABOVE.propagate = False
    log = Log()
    log.open(threading.get_ident())
    try:
        say_all()
    finally:
        log.close()
        ABOVE.propagate = True
    assert at_root == []
    assert len(str(log).splitlines()) == 3


def test_caplog_sees_what_it_would_see(log, caplog):
    say_all()
    assert caplog.messages == ["a line at 30"]


def test_caplog_sees_what_it_asks_for_meanwhile(log, caplog):
    with caplog.at_level(logging.INFO):
        say_all()
    assert caplog.messages == ["a line at 20", "a line at 30"]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="nbdserve"):
        say_all()
    assert caplog.messages == ["a line at 10", "a line at 20", "a line at 30"]
    caplog.clear()
    say_all()
    assert caplog.messages == ["a line at 30"]
    assert len(str(log).splitlines()) == 9


def test_a_caplog_that_outlives_the_server_spoils_nothing(caplog, at_root):
    before = ABOVE.level
    log = Log()
    log.open(threading.get_ident())
    with caplog.at_level(logging.DEBUG, logger="nbdserve"):
        log.close()
    log.open(threading.get_ident())
    say_all()
    log.close()
    assert at_root == ["a line at 30"]
    assert ABOVE.level == before


def test_threads_are_kept_apart(log):
    def other():
        mine.open(threading.get_ident())
        CHILD.info("in the other thread")
        mine.close()

    mine = Log()
    CHILD.info("here")
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "in the other thread" in str(mine)
    assert "here" not in str(mine)
    assert "in the other thread" not in str(log)


def test_it_keeps_the_last_lines_only(log):
    for number in range(3000):
        CHILD.debug("line %d", number)
    lines = str(log).splitlines()
    assert len(lines) == 2000
    assert lines[-1].endswith("line 2999")
