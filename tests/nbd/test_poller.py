"""The readiness loop with handlers that a test holds in its hand; turns are counted, not timed."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import trio
import trio.testing

from nbdserve.nbd import poller as module
from nbdserve.nbd.poller import EAGERLY, PATIENCE, READABLE, SLICE, SPIN, WRITABLE, Poller

LONG = 10.0
ENOUGH = 200  # rounds after which whoever has not had a turn is starved


@pytest.fixture
def poller():
    made = Poller()
    yield made
    made.close()


@contextmanager
def pair():
    """A socket to watch, non-blocking, and the other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@asynccontextmanager
async def running(poller, *, alone=False):
    """The loop runs. Unless `alone` there is another client, which never says anything: an only
    client's handler may be called though nothing came."""
    with pair() as (idle, _), trio.fail_after(LONG):
        if not alone:
            poller.register(idle.fileno(), Handler(idle))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            yield
            nursery.cancel_scope.cancel()
        if not alone:
            poller.unregister(idle.fileno())


async def settle():
    await trio.testing.wait_all_tasks_blocked(0.002)


class Handler:
    """Counts its calls. It takes what came, unless `lazy`, and then has no more to do."""

    def __init__(self, sock, *, lazy=False):
        self.sock, self.lazy = sock, lazy
        self.calls = 0
        self.eager = 0  # how often to ask for another call

    def __call__(self):
        self.calls += 1
        if not self.lazy:
            with suppress(BlockingIOError):
                self.sock.recv(100)
        if self.eager:
            self.eager -= 1
            return True
        return False


async def test_called_when_readable_and_only_then(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        async with running(poller):
            await settle()
            assert handler.calls == 0
            for calls in (1, 2, 3):
                theirs.send(b"x")
                await settle()
                assert handler.calls == calls


async def test_called_again_while_it_leaves_something(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours, lazy=True)
        poller.register(ours.fileno(), handler)
        async with running(poller):
            theirs.send(b"x")
            while handler.calls < 20:
                await trio.lowlevel.checkpoint()


async def test_true_asks_for_another_call_though_nothing_came(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        handler.eager = 10
        poller.register(ours.fileno(), handler)
        async with running(poller):
            theirs.send(b"x")
            await settle()
            assert handler.calls == 11


@pytest.mark.parametrize("events", [WRITABLE, READABLE | WRITABLE])
async def test_wanting_writable(poller, events):
    with pair() as (ours, _theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        async with running(poller):
            await settle()
            assert handler.calls == 0
            poller.want(ours.fileno(), events)
            while not handler.calls:
                await trio.lowlevel.checkpoint()
            poller.want(ours.fileno(), READABLE)
            await settle()


async def test_wanting_writable_does_not_mean_readable(poller):
    with pair() as (ours, theirs):
        while True:
            try:
                ours.send(bytes(1 << 16))
            except BlockingIOError:
                break
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        poller.want(ours.fileno(), WRITABLE)
        async with running(poller):
            theirs.send(b"x")
            await settle()
            assert handler.calls == 0
            poller.want(ours.fileno(), READABLE)
            await settle()
            assert handler.calls == 1


async def test_wanting_nothing_and_then_something_again(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        poller.want(ours.fileno(), 0)
        async with running(poller):
            theirs.send(b"x")
            await settle()
            assert handler.calls == 0
            poller.want(ours.fileno(), READABLE)
            await settle()
            assert handler.calls == 1


async def test_wanting_nothing_a_hangup_is_nothing(poller):
    """The epoll reports a hangup even to who wants no events, again and again."""
    with pair() as (ours, theirs):
        handler = Handler(ours, lazy=True)
        poller.register(ours.fileno(), handler)
        poller.want(ours.fileno(), 0)
        async with running(poller):
            theirs.close()
            for _ in range(ENOUGH):
                await trio.lowlevel.checkpoint()
            assert handler.calls <= 2
            poller.want(ours.fileno(), READABLE)
            while handler.calls < 10:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("events", [0, READABLE, WRITABLE])
async def test_unregistered_is_never_called(poller, events):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        poller.want(ours.fileno(), events)
        poller.unregister(ours.fileno())
        async with running(poller):
            theirs.send(b"x")
            await settle()
            assert handler.calls == 0
            poller.register(ours.fileno(), handler)  # the number may be another's by now
            await settle()
            assert handler.calls == 1


@pytest.mark.parametrize("eager", [False, True])
async def test_a_handler_may_end_another_in_the_same_round(poller, eager):
    with pair() as (one, one_client), pair() as (two, two_client):
        socks = {one.fileno(): one, two.fileno(): two}
        called = []

        def handler_of(mine, other):
            def handler():
                called.append(mine)
                socks[mine].recv(1)
                if len(called) == 1:
                    poller.unregister(other)
                return eager and len(called) == 1

            return handler

        poller.register(one.fileno(), handler_of(one.fileno(), two.fileno()))
        poller.register(two.fileno(), handler_of(two.fileno(), one.fileno()))
        for client in (one_client, two_client):
            client.send(b"xx")
        async with running(poller):
            await settle()
        assert called in ([one.fileno()] * 2, [two.fileno()] * 2)


async def test_a_handler_that_ends_itself_is_not_called_again(poller):
    with pair() as (ours, theirs):
        calls = []

        def handler():
            calls.append(1)
            poller.unregister(ours.fileno())
            return True

        poller.register(ours.fileno(), handler)
        theirs.send(b"x")
        async with running(poller):
            await settle()
        assert calls == [1]


# Turns

# Ways to have work to do for ever: the socket stays readable, or the handler asks for more.
FLOODS = {"readable": (True, 0), "eager": (False, 1 << 60)}
each_flood = pytest.mark.parametrize(("lazy", "eager"), FLOODS.values(), ids=FLOODS)


@each_flood
async def test_while_requests_run_as_tasks_every_round_gives_them_a_turn(poller, lazy, eager):
    with pair() as (ours, theirs):
        handler = Handler(ours, lazy=lazy)
        handler.eager = eager
        poller.register(ours.fileno(), handler)
        theirs.send(b"x")
        poller.busy = 1
        async with running(poller):
            await trio.lowlevel.checkpoint()
            for _ in range(50):
                before = handler.calls
                await trio.lowlevel.checkpoint()
                assert handler.calls <= before + 2  # the scheduler shuffles a batch of tasks


@each_flood
async def test_other_tasks_have_a_turn_at_least_each_slice(poller, lazy, eager, monkeypatch):
    """By a clock that gains a tenth of a slice whenever it is asked, at least once a round."""
    now = 0.0

    def clock():
        nonlocal now
        now += SLICE / 10
        return now

    monkeypatch.setattr(module, "perf_counter", clock)
    with pair() as (ours, theirs):
        handler = Handler(ours, lazy=lazy)
        handler.eager = eager
        poller.register(ours.fileno(), handler)
        theirs.send(b"x")
        async with running(poller):
            await trio.lowlevel.checkpoint()
            turns = []
            for _ in range(50):
                before = handler.calls
                await trio.lowlevel.checkpoint()
                turns.append(handler.calls - before)
        assert max(turns) <= 24
        assert sum(turns) > 50  # and the batches between two turns are not single rounds


@each_flood
async def test_one_that_floods_does_not_starve_another(poller, lazy, eager):
    with pair() as (flood, flood_client), pair() as (quiet, quiet_client):
        flooding = Handler(flood, lazy=lazy)
        flooding.eager = eager
        delays = []

        def answer():
            delays.append(flooding.calls - asked)
            quiet.recv(1)
            return False

        poller.register(flood.fileno(), flooding)
        poller.register(quiet.fileno(), answer)
        flood_client.send(b"x")
        async with running(poller):
            while not flooding.calls:
                await trio.lowlevel.checkpoint()
            for _ in range(30):
                asked = flooding.calls
                quiet_client.send(b"?")
                number = len(delays)
                while len(delays) == number:
                    assert flooding.calls < asked + ENOUGH * ENOUGH
                    await trio.lowlevel.checkpoint()
        assert max(delays) <= EAGERLY + 1


@each_flood
async def test_all_that_flood_get_the_same(poller, lazy, eager):
    with pair() as one, pair() as two, pair() as three:
        handlers = []
        for ours, theirs in (one, two, three):
            handler = Handler(ours, lazy=lazy)
            handler.eager = eager
            handlers.append(handler)
            theirs.send(b"x")
            poller.register(ours.fileno(), handler)
        async with running(poller):
            while handlers[0].calls < 1000:
                await trio.lowlevel.checkpoint()
        calls = [handler.calls for handler in handlers]
        assert max(calls) - min(calls) <= EAGERLY


async def test_without_work_it_sleeps(poller, monkeypatch):
    """After an event it goes on asking for SPIN and not longer."""
    asked = []

    class Counting:
        def __init__(self, epoll):
            self.epoll = epoll

        def poll(self, timeout):
            assert timeout == 0
            asked.append(timeout)
            return self.epoll.poll(0)

        def __getattr__(self, name):
            return getattr(self.epoll, name)

    now = 0.0

    def clock():
        nonlocal now
        now += SPIN / 10
        return now

    monkeypatch.setattr(module, "perf_counter", clock)
    poller._epoll = Counting(poller._epoll)
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        async with running(poller):
            await settle()
            asked.clear()
            theirs.send(b"x")
            await settle()
            assert handler.calls == 1
            assert 5 <= len(asked) <= 15


@pytest.mark.parametrize(
    ("took", "patience"),
    [(SPIN / 10, SPIN), (PATIENCE / 2, PATIENCE * 3 / 4), (PATIENCE, SPIN), (1.0, SPIN)],
)
def test_how_long_it_waits_for_the_disk_is_learned_from_the_last_time(monkeypatch, took, patience):
    """A little longer than that took; if it took long, not at all."""

    class Completing:
        eventfd = None

        def reap(self):
            return True

    poller = Poller([Completing()])
    monkeypatch.setattr(module, "perf_counter", lambda: 7.0 + took)
    poller._last = 7.0
    poller._reap()
    assert poller._patience == pytest.approx(patience)
    poller.close()


@pytest.mark.parametrize(("patience", "least", "most"), [(SPIN, 5, 20), (PATIENCE, 50, 80)])
async def test_an_only_client_is_waited_for_that_long(poller, monkeypatch, patience, least, most):
    now = 0.0

    def clock():
        nonlocal now
        now += SPIN / 10
        return now

    monkeypatch.setattr(module, "perf_counter", clock)
    poller._patience = patience
    with pair() as (ours, theirs):
        asked = []

        def handler():
            asked.append(1)
            try:
                return len(ours.recv(100))
            except BlockingIOError:
                return 0

        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            await settle()
            asked.clear()
            theirs.send(b"x")
            await settle()
            assert least <= len(asked) <= most


async def test_while_busy_it_does_not_spin(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        async with running(poller):
            poller.busy = 1
            theirs.send(b"x")
            await settle()
            assert handler.calls == 1


# An only client


async def calls_cease(handler):
    """Its calls stop; how many there were."""
    while True:
        calls = handler.calls
        await trio.sleep(20 * SPIN)
        await settle()
        if handler.calls == calls:
            return calls


async def test_an_only_client_is_left_alone_when_it_says_nothing(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            await settle()
            assert handler.calls == 0
            for _ in range(3):
                before = handler.calls
                theirs.send(b"x")
                assert await calls_cease(handler) > before


async def test_an_only_client_is_called_while_it_does_something(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        handler.eager = 1000
        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            theirs.send(b"x")
            while handler.eager:
                await trio.lowlevel.checkpoint()
            await calls_cease(handler)


@pytest.mark.parametrize("events", [0, WRITABLE])
async def test_what_an_only_client_wants_counts_at_once(poller, events):
    with pair() as (ours, theirs):
        calls = []

        def handler():
            calls.append(None)
            if len(calls) == 5:
                poller.want(ours.fileno(), events)
            return len(calls) < 5

        if events:
            while True:  # fill the socket: it is not writable
                try:
                    ours.send(bytes(1 << 16))
                except BlockingIOError:
                    break
        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            theirs.send(b"x")
            while len(calls) < 5:
                await trio.lowlevel.checkpoint()
            await trio.sleep(20 * SPIN)
            await settle()
            assert len(calls) == 5
            poller.want(ours.fileno(), READABLE)
            while len(calls) < 6:
                await trio.lowlevel.checkpoint()


async def test_a_second_client_is_served_beside_a_busy_one(poller):
    with pair() as (first, other), pair() as (second, theirs):
        busy, handler = Handler(first), Handler(second)
        busy.eager = 1 << 30
        poller.register(first.fileno(), busy)
        async with running(poller, alone=True):
            other.send(b"x")
            while busy.calls < 100:
                await trio.lowlevel.checkpoint()
            poller.register(second.fileno(), handler)
            theirs.send(b"x")
            while not handler.calls:
                await trio.lowlevel.checkpoint()
            poller.unregister(second.fileno())
            before = busy.calls
            while busy.calls < before + 100:
                await trio.lowlevel.checkpoint()


async def test_an_only_client_that_ends_itself_is_not_called_again(poller):
    with pair() as (ours, theirs):
        calls = []

        def handler():
            calls.append(None)
            if len(calls) == 3:
                poller.unregister(ours.fileno())
            return 1

        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            theirs.send(b"x")
            while len(calls) < 3:
                await trio.lowlevel.checkpoint()
            await settle()
            assert len(calls) == 3
        poller.register(ours.fileno(), handler)  # and may come back
        poller.unregister(ours.fileno())


async def test_tasks_have_their_turn_beside_an_only_client(poller):
    with pair() as (ours, theirs):
        handler = Handler(ours)
        handler.eager = 1 << 30
        poller.busy = 1
        poller.register(ours.fileno(), handler)
        async with running(poller, alone=True):
            theirs.send(b"x")
            while not handler.calls:
                await trio.lowlevel.checkpoint()
            before = handler.calls
            for _ in range(50):
                await trio.lowlevel.checkpoint()
            assert handler.calls - before <= 2 * 50
