"""Progress bars with rate and time left, on standard error: one display per process, tasks come and go."""

import atexit
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

T = TypeVar("T")

WIDE = 100  # columns from which on bars are long and the time so far is shown
KEPT_FROM = 2.0  # seconds; a task that took less leaves no line behind
AT_ONCE = 0.1  # seconds; what a task reports so soon was done before it began, as in a run that is resumed
TOLD_AFTER = 10.0  # seconds after which a log learns how fast a task is and how long it will take

console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


def quiet() -> bool:
    """True when RAYGREC_QUIET is set: workers and tests draw no bars and print no lines."""
    return os.environ.get("RAYGREC_QUIET", "") not in ("", "0")


def tell(line: str) -> None:
    """Prints one line on standard error, beside the bars."""
    if not quiet():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """The tasks of one `progress_bar()`.

    A task is done when its steps are, or when the context ends. One that took `KEPT_FROM` seconds leaves a
    line such as `ranking: 44/44 in 2.9 s, 15.2/s` behind. Without a terminal these lines are all there is,
    and one more for a task that takes long.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[TaskID, Task] = {}

    def add_task(self, description: str, total: float | None = None, note: str = "") -> TaskID:
        """Starts a task of `total` steps (None: unknown); `note` stands at the end of its bar."""
        self._settle()
        number = self._progress.add_task(description, total=total, note=note, before=0, told=False)
        self._tasks[number] = next(task for task in self._progress.tasks if task.id == number)
        return number

    def advance(self, number: TaskID, steps: float = 1) -> None:
        """Adds `steps` to a task."""
        self._settle(but=number)
        self._progress.advance(number, steps)
        self._tell(self._tasks[number])

    def update(
        self,
        number: TaskID,
        *,
        completed: float | None = None,
        total: float | None = None,
        note: str | None = None,
    ) -> None:
        """Sets the steps done so far, the number of all steps, or the note."""
        self._settle(but=number)
        task = self._tasks[number]
        fields = {} if note is None else {"note": note}
        if completed and not task.completed and _seconds(task) < AT_ONCE:
            fields["before"] = completed
        self._progress.update(number, completed=completed, total=total, **fields)
        self._tell(task)

    def close(self) -> None:
        """Ends all tasks."""
        for number, task in self._tasks.items():
            self._close(task)
            self._progress.remove_task(number)
        self._tasks.clear()

    def _settle(self, but: TaskID | None = None) -> None:
        # A finished task stays on the screen until another one moves, so that its last note can still be set.
        for number, task in self._tasks.items():
            if task.finished and task.visible and number != but:
                self._close(task)

    def _close(self, task: Task) -> None:
        if task.visible and _seconds(task) >= KEPT_FROM:
            spent = f"{_seconds(task):.1f} s" if _seconds(task) < 60 else clock(_seconds(task))
            self._print(f"{task.description}: {_count(task)} in {spent}, {_rate(_mean_speed(task))}", task)
        self._progress.update(task.id, visible=False)

    def _tell(self, task: Task) -> None:
        if task.fields["told"] or is_drawn() or task.finished or _seconds(task) < TOLD_AFTER:
            return
        task.fields["told"] = True
        left = "" if task.time_remaining is None else f", {clock(task.time_remaining)} left"
        self._print(f"{task.description}: {_count(task)} so far, {_rate(_mean_speed(task))}{left}", task)

    def _print(self, line: str, task: Task) -> None:
        if not quiet():
            text = ", ".join(filter(None, (line, task.fields["note"])))
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display:
    """The live display, shown while any `progress_bar` is open: rich allows one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._progress: Progress | None = None

    def enter(self) -> Progress:
        with self._lock:
            self._open += 1
            if self._progress is None:
                self._progress = _new_progress()
                self._progress.start()
            return self._progress

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stop()

    def abandon(self) -> None:
        """At the process's end: gives the cursor back where a loop was left without closing its bar."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


_display = _Display()
atexit.register(_display.abandon)


@contextmanager
def progress_bar() -> Iterator[Bars]:
    """Bars in the house layout; `add_task(description, total=…)` starts one. May be nested."""
    bars = Bars(_display.enter())
    try:
        yield bars
    finally:
        bars.close()
        _display.leave()


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields from `iterable` and draws a bar; `total` defaults to `len(iterable)` where it has one."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    with progress_bar() as bars:
        task = bars.add_task(description, total=total)
        for element in iterable:
            yield element
            bars.advance(task)


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        text = Text(task.description, no_wrap=True)
        text.truncate(34 if _is_wide() else 26, overflow="ellipsis")
        return text


class _Bar(BarColumn):
    def render(self, task: Task) -> object:
        self.bar_width = 18 if _is_wide() else 10
        return super().render(task)


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_count(task), style="progress.download", justify="right")


class _Speed(ProgressColumn):
    """Steps per second, as measured by rich's own moving window."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _rate(speed), style="progress.data.speed", justify="right")


class _Time(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = "" if task.total is None else f"{clock(task.time_remaining)} left"
        if not _is_wide():
            return Text(left, style="progress.remaining")
        so_far = Text(f"{clock(_seconds(task))} so far", style="progress.elapsed")
        return so_far.append(f", {left}" if left else "", style="progress.remaining")


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")


def _new_progress() -> Progress:
    whole = {"no_wrap": True}
    columns = (
        _Description(Column(**whole)),
        _Bar(table_column=Column(**whole)),
        _Count(Column(**whole)),
        _Speed(Column(**whole)),
        _Time(Column(**whole)),
        _Note(),  # the one column that gives way where the terminal is narrow
    )
    return Progress(
        *columns,
        console=console,
        disable=not is_drawn(),
        transient=True,
        refresh_per_second=4,
        get_time=monotonic,
        # rich would send it to standard error, also where it is a pipe that waits for a result.
        redirect_stdout=sys.stdout.isatty(),
    )


def is_drawn() -> bool:
    """Whether there is a terminal to draw on, and somebody to look."""
    return console.is_terminal and not console.is_dumb_terminal and not quiet()


def _is_wide() -> bool:
    return console.width >= WIDE


def _seconds(task: Task) -> float:
    elapsed = task.elapsed if task.finished_time is None else task.finished_time
    return elapsed or 0.0


def _mean_speed(task: Task) -> float:
    return (task.completed - task.fields["before"]) / _seconds(task)


def _count(task: Task) -> str:
    done = f"{int(task.completed):,}"
    return done if task.total is None else f"{done}/{int(task.total):,}"


def _rate(speed: float) -> str:
    """Three digits or more: 0.034/s, 1.23/s, 15.2/s, 408/s, 12,345/s."""
    digits = 3 if speed < 0.1 else 2 if speed < 10 else 1 if speed < 1000 else 0
    return f"{speed:,.{digits}f}/s"


def clock(seconds: float | None) -> str:
    """mm:ss or h:mm:ss; --:-- for what is not known."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
