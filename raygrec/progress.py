"""Progress bars with rate and time left, on standard error."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


class RateColumn(ProgressColumn):
    """Steps per second, as measured by rich's own moving window."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="progress.data.speed")


def quiet() -> bool:
    """True when RAYGREC_QUIET is set: workers and tests draw no bars."""
    return os.environ.get("RAYGREC_QUIET", "") not in ("", "0")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich `Progress` in the house layout; `add_task(description, total=…)` starts a bar."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, disable=quiet(), refresh_per_second=4) as bar:
        yield bar


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields from `iterable` and draws a bar; `total` defaults to `len(iterable)` where it has one."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, note="")
        for element in iterable:
            yield element
            bar.advance(task)
