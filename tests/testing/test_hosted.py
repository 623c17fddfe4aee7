"""A context manager of trio in a thread: it starts, is called, ends, and nobody waits for ever."""

import contextlib
import subprocess
import sys
import threading

import pytest
import trio

from nbdserve.testing.hosted import Hosted, run_in_thread


class Thing:
    def __init__(self):
        self.entered = self.left = False
        self.fail = trio.Event()
        self.thread = threading.get_ident()


@contextlib.asynccontextmanager
async def manager(*, on_enter=None, on_leave=None):
    if on_enter is not None:
        raise on_enter
    thing = Thing()
    thing.entered = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, thing)
        try:
            yield thing
        finally:
            thing.left = True
            nursery.cancel_scope.cancel()
    if on_leave is not None:
        raise on_leave


async def fails(thing):
    await thing.fail.wait()
    raise OSError("by itself")


def flat(caught):
    error = caught.value
    while isinstance(error, BaseExceptionGroup):
        [error] = error.exceptions
    return str(error)


@pytest.fixture
def hosted():
    found = Hosted(manager(), "hosted")
    yield found
    with contextlib.suppress(BaseException):
        found.stop()
    assert not found._thread.is_alive()


def test_it_lives_in_a_thread_of_its_own(hosted):
    thing = hosted.start()
    assert thing.entered
    assert thing.thread != threading.get_ident()
    assert hosted.call(threading.get_ident) == thing.thread
    hosted.stop()
    assert thing.left


def test_an_error_on_entering_is_the_starters():
    hosted = Hosted(manager(on_enter=OSError("no")), "hosted")
    with pytest.raises(OSError, match="no"):
        hosted.start()
    hosted._thread.join()


def test_an_error_on_leaving_is_the_stoppers():
    hosted = Hosted(manager(on_leave=OSError("late")), "hosted")
    hosted.start()
    for _ in range(2):
        with pytest.raises(OSError, match="late"):
            hosted.stop()


def test_what_is_called_raises_where_it_was_called(hosted):
    hosted.start()
    with pytest.raises(ZeroDivisionError):
        hosted.call(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        hosted.call(sys.exit)
    assert hosted.call(pow, 2, 10) == 1024


def test_an_asynchronous_function(hosted):
    async def add(one, other):
        await trio.lowlevel.checkpoint()
        return one + other

    async def fails():
        raise OSError("asked for")

    hosted.start()
    assert hosted.run(add, 1, 2) == 3
    with pytest.raises(OSError, match="asked for"):
        hosted.run(fails)
    assert hosted.run(add, 3, 4) == 7


def test_a_call_from_the_thread_itself_does_not_wait_for_it(hosted):
    hosted.start()
    assert hosted.call(lambda: hosted.call(pow, 2, 3)) == 8


def test_it_ends_by_itself(hosted):
    thing = hosted.start()
    hosted.call(thing.fail.set)
    hosted._thread.join()
    for use in (hosted.stop, lambda: hosted.call(int), lambda: hosted.run(trio.sleep, 0)):
        with pytest.raises((OSError, BaseExceptionGroup)) as caught:
            use()
        assert flat(caught) == "by itself"


def test_after_the_end_a_call_says_so(hosted):
    hosted.start()
    hosted.stop()
    hosted.stop()
    with pytest.raises(RuntimeError, match="hosted has ended"):
        hosted.call(int)


def test_who_waits_for_a_function_when_it_stops_is_told(hosted):
    hosted.start()
    began = threading.Event()
    said = []

    async def for_ever():
        began.set()
        await trio.sleep_forever()

    def wait():
        try:
            hosted.run(for_ever)
        except RuntimeError as error:
            said.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    began.wait()
    hosted.stop()
    waiter.join()
    assert said == ["hosted has ended"]


def test_calls_that_race_with_the_end_return(hosted):
    hosted.start()
    outcomes = []

    def call():
        while True:
            try:
                outcomes.append(hosted.call(pow, 2, 2))
            except RuntimeError:
                outcomes.append("ended")
                return

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    hosted.stop()
    for caller in callers:
        caller.join(30)
    assert not any(caller.is_alive() for caller in callers)
    assert outcomes.count("ended") == 4


def test_trio_in_a_thread_for_one_function():
    async def whole(length):
        await trio.lowlevel.checkpoint()
        return length

    async def fails():
        raise KeyError("none")

    assert run_in_thread(whole, 5) == 5
    with pytest.raises(KeyError):
        run_in_thread(fails)


FORGETFUL = """
from nbdserve.testing import serving
one = serving(size="1M").start()
two = serving(size="1M", process={process}).start()
print(one.socket.parent, two.socket.parent, getattr(two, "pid", 0))
"""


@pytest.mark.parametrize("process", [False, True])
def test_a_program_that_forgets_to_stop_ends_and_leaves_nothing(process):
    argv = [sys.executable, "-W", "error", "-c", FORGETFUL.format(process=process)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    import pathlib

    *folders, pid = done.stdout.split()
    assert not any(pathlib.Path(folder).exists() for folder in folders)
    assert pid == "0" or not pathlib.Path("/proc", pid).exists()
