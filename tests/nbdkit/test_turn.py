"""The lock between trio's thread and others: who has it when, and that nobody is kept out."""

import threading

import trio

from nbdserve.nbdkit.turn import Turn

ROUNDS = 2000


class Run:
    """Trio in a thread, with a turn; `stop` it."""

    def __init__(self, task) -> None:
        self.turn = Turn()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(task,))
        self.thread.start()
        assert self.started.wait(20)

    def _run(self, task) -> None:
        trio.run(self._main, task, instruments=[self.turn])

    async def _main(self, task) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            self.started.set()
            await self.stopping.wait()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        self.token.run_sync_soon(self.stopping.set)
        self.thread.join(20)
        assert not self.thread.is_alive()


def test_nothing_runs_beside_the_one_whose_turn_it_is():
    """Each adds to a number in two steps that another would come between."""
    total = 0

    def add() -> None:
        nonlocal total
        seen = total
        for _ in range(20):
            pass
        total = seen + 1

    async def task() -> None:
        for _ in range(ROUNDS):
            add()
            await trio.lowlevel.checkpoint()
        done.set()
        await trio.sleep_forever()

    def other() -> None:
        for _ in range(ROUNDS):
            run.turn.enter()
            add()
            run.turn.leave()

    done = threading.Event()
    run = Run(task)
    others = [threading.Thread(target=other) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(60)
    assert done.wait(60)
    run.stop()
    assert total == 4 * ROUNDS


def test_a_busy_trio_lets_others_in():
    """It never waits for I/O, only asks whether there is some."""
    async def task() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    run = Run(task)
    for _ in range(200):
        run.turn.enter()
        run.turn.leave()
    run.stop()


def test_busy_others_let_trio_in():
    stopping = False

    def other() -> None:
        while not stopping:
            run.turn.enter()
            run.turn.leave()

    async def task() -> None:
        for _ in range(200):
            await trio.lowlevel.checkpoint()
        finished.set()
        await trio.sleep_forever()

    finished = threading.Event()
    run = Run(task)
    others = [threading.Thread(target=other) for _ in range(4)]
    for thread in others:
        thread.start()
    assert finished.wait(60)
    stopping = True
    for thread in others:
        thread.join(20)
    run.stop()


def test_trio_wakes_while_it_was_kept_waiting():
    """What happens in another's turn is seen by trio's tasks afterwards."""
    async def task() -> None:
        await event.wait()
        woken.set()
        await trio.sleep_forever()

    event, woken = trio.Event(), threading.Event()
    run = Run(task)
    run.turn.enter()
    run.token.run_sync_soon(event.set)
    assert not woken.wait(0.01)
    run.turn.leave()
    assert woken.wait(20)
    run.stop()
