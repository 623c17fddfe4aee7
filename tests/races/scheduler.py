"""Trio with a scheduler of our own: one task at a time, chosen by a schedule, again and again.

Law: every await that yields, in the product, in the tests and in trio's own locks, is a choice, and
nothing else is. trio asks its run queue for a batch of tasks; ours hands out one. So what happens
follows from the choices alone: no clock, no order of a set, no random number. A run is repeated by
its schedule, and how long it may take is counted in steps.

All tasks stand in line, a new one behind the one that started it, and choice 0 is the first that
can run. Who is passed over goes to the end of the line. So the schedule without any other choice
lets each task run until it waits for another; one with a single deviation, at step k, holds a task
at its k-th await until nothing else can run; two deviations hold the next at its m-th in turn.
`explore` goes through all of them up to a number of deviations (delay-bounded scheduling: Emmi,
Qadeer, Rakamaric, 2011); `Dice` rolls the choices of a seed, for what takes more than a few.

Each step takes a millisecond; while nothing can run, time jumps to the next deadline. If there is
none and no descriptor is ready, the tasks wait for each other: `Stuck`.

It reaches into trio in one place, `Runner.runq`; test_scheduler.py would tell if that were gone.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from trio.lowlevel import Task

__all__ = ["Deviations", "Dice", "Result", "Schedule", "Scheduler", "Stuck", "explore", "rolled"]

# Steps after which a run is taken for one that never ends.
MAX_STEPS = 20_000

# Seconds.
STEP = 0.001


class Stuck(AssertionError):
    """Tasks wait for each other, or go round in circles."""


class Schedule:
    """The choices of one run; this one never deviates. `name` makes it again."""

    name = "Schedule()"

    def choose(self, step: int, count: int) -> int:
        """Which of `count` tasks runs, at a step at which there is a choice."""
        return 0


class Deviations(Schedule):
    """All choices are 0 but those listed as (step, choice)."""

    def __init__(self, *choices: tuple[int, int]) -> None:
        self.name = f"Deviations({', '.join(map(str, choices))})"
        self._at = dict(choices)

    def choose(self, step: int, count: int) -> int:
        return min(self._at.get(step, 0), count - 1)


class Dice(Schedule):
    """Rolled. Uniform dice let tasks advance side by side; those of odd seeds go on with the same
    task mostly, which leaves another far behind."""

    def __init__(self, seed: int) -> None:
        self.name = f"Dice({seed})"
        self._random = random.Random(seed)
        self._keep = (0.0, 0.8)[seed % 2]

    def choose(self, step: int, count: int) -> int:
        if self._random.random() < self._keep:
            return 0
        return self._random.randrange(count)


class Scheduler(trio.abc.Clock):
    """Runs one coroutine function under a schedule; `racing` turns the choices on.

    `counts`: how many tasks there were to choose from at each step of the race. `on_step`: called
    before each step of the race; what it raises ends the run. `at`: called before the step of that
    number.
    """

    def __init__(self, schedule: Schedule, *, max_steps: int = MAX_STEPS) -> None:
        self.racing = False
        self.counts: list[int] = []
        self.on_step: Callable[[], None] | None = None
        self.at: Mapping[int, Callable[[], object]] = {}
        self._schedule = schedule
        self._steps = 0
        self._max_steps = max_steps
        self._now = 0.0
        self._idle = False
        self._line: list[Task] = []
        self._known: set[Task] = set()
        self._last: Task | None = None
        self._failure: BaseException | None = None
        self._scope = trio.CancelScope()

    def run(self, function: Callable[[Scheduler], Awaitable[object]]) -> None:
        """Raises what the function raised, or what `on_step` found before; alone, in no group."""
        try:
            trio.run(self._main, function, clock=self)
        except BaseException as error:
            raise self._failure or _single(error) from None
        if self._failure is not None:
            raise self._failure

    async def _main(self, function: Callable[[Scheduler], Awaitable[object]]) -> None:
        GLOBAL_RUN_CONTEXT.runner.runq = _RunQueue(self)
        with self._scope:
            await function(self)

    # --- the choice ----------------------------------------------------------------------------

    def pick(self, tasks: list[Task]) -> Task:
        """The task that runs next."""
        self._idle = False
        self._steps += 1
        self._now += STEP
        if self._steps > self._max_steps:
            self._fail(Stuck(f"no end after {self._max_steps} steps"))
            self._max_steps *= 2
        if not self.racing:
            return tasks[0]
        step = len(self.counts)
        if step in self.at:
            self.at[step]()
        if self.on_step is not None and self._failure is None:
            try:
                self.on_step()
            except AssertionError as error:
                self._fail(error)
        self._stand_in_line(tasks)
        self.counts.append(len(tasks))
        choice = self._schedule.choose(step, len(tasks)) if len(tasks) > 1 else 0
        runnable = set(tasks)
        ready = [task for task in self._line if task in runnable]
        for passed_over in ready[:choice]:
            self._line.remove(passed_over)
            self._line.append(passed_over)
        self._last = ready[choice]
        return self._last

    def _stand_in_line(self, tasks: list[Task]) -> None:
        new = [task for task in tasks if task not in self._known]
        if new:
            self._known.update(new)
            place = self._line.index(self._last) + 1 if self._last is not None else 0
            self._line[place:place] = new

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._scope.cancel()

    # --- the clock -----------------------------------------------------------------------------

    def start_clock(self) -> None:
        """See trio.abc.Clock."""

    def current_time(self) -> float:
        """See trio.abc.Clock."""
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Nothing can run. The first time sockets are asked, by not sleeping; the second time the
        clock jumps, if that helps."""
        if self._idle:
            if deadline == math.inf:
                again = self._failure is not None
                self._fail(Stuck(f"after {self._steps} steps all wait: {_waiting()}"))
                if again:  # cancelled, and shielded from it
                    raise self._failure  # type: ignore[misc]
            else:
                self._now = max(self._now, deadline)
        self._idle = True
        return 0


class _RunQueue(deque["Task"]):
    """trio takes `list(queue)` and then calls `clear`; it gets one task."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def __iter__(self) -> Iterator[Task]:
        self._picked: Task | None = None
        if self:
            self._picked = self._scheduler.pick(list(super().__iter__()))
            yield self._picked

    def clear(self) -> None:
        if self._picked is not None:
            self.remove(self._picked)


def _waiting() -> str:
    """The innermost line of each task that waits."""
    lines = []
    for task in GLOBAL_RUN_CONTEXT.runner.tasks:
        frames = [frame for frame, _ in task.iter_await_frames() if _is_ours(frame.f_code)]
        if frames:
            code = frames[-1].f_code
            lines.append(f"{code.co_qualname} ({code.co_filename}:{frames[-1].f_lineno})")
    return ", ".join(sorted(lines))


def _is_ours(code: object) -> bool:
    return "/trio/" not in code.co_filename  # type: ignore[attr-defined]


def _single(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


# --- many runs -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came of a number of runs. `failed`: the name of the schedule, and what went wrong."""

    schedules: int
    failed: tuple[str, BaseException] | None = None


def explore(
    run: Callable[[Schedule], list[int]], *, deviations: int, most: int, seed: int = 0
) -> Result:
    """Call `run`, which returns `Scheduler.counts`, with all schedules of up to `deviations`
    deviations, the fewest first. Of a level that has more than what is left of `most`, that many
    are drawn by `seed`. Stops at the first that fails."""
    dice = random.Random(seed)
    level: list[tuple[tuple[int, int], ...]] = [()]
    done = 0
    for depth in range(deviations + 1):
        if len(level) > most - done:
            level = dice.sample(level, most - done)
        below: list[tuple[tuple[int, int], ...]] = []
        for choices in level:
            schedule = Deviations(*choices)
            try:
                counts = run(schedule)
            except Exception as error:
                return Result(done + 1, (schedule.name, error))
            done += 1
            if depth < deviations:
                first = choices[-1][0] + 1 if choices else 0
                below += [
                    (*choices, (step, choice))
                    for step in range(first, len(counts))
                    for choice in range(1, counts[step])
                ]
        level = below
        if done >= most:
            break
    return Result(done)


def rolled(run: Callable[[Schedule], list[int]], seeds: range) -> Result:
    """Call `run` with the dice of each seed. Stops at the first that fails."""
    for number, seed in enumerate(seeds):
        schedule = Dice(seed)
        try:
            run(schedule)
        except Exception as error:
            return Result(number + 1, (schedule.name, error))
    return Result(len(seeds))
