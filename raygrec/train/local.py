"""A run in this one process, without Ray: how it is debugged, and how it runs on a bare GPU machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygrec.progress import progress_bar, tell
from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder, with_absolute_paths
from raygrec.train.mirror import restore
from raygrec.train.pipeline import run
from raygrec.train.settings import RunConfig


class BarReporter:
    """Draws one bar per task; a task ends when its last step is told."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        if not total:
            return self.warn(task)  # a line that has come as progress
        if task not in self.tasks:
            self.tasks[task] = self.bar.add_task(task, total=total, note=note)
        self.bar.update(self.tasks[task], completed=done, total=total, note=note)
        if done >= total:
            del self.tasks[task]

    def at(self, task: str, step: int) -> None:
        """Nobody waits for this process."""

    def wants_checkpoint(self) -> bool:
        return False

    def report(self, record: dict[str, Any]) -> None:
        """Records go to history.jsonl; a terminal shows the bars only."""

    def warn(self, line: str) -> None:
        tell(line)


def train_here(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Trains in this process and returns the final metrics; `InputError` where the run folder is taken."""
    config = with_absolute_paths(config)
    folder = RunFolder(config.out)
    restore(config, folder, resume)
    with folder.held():
        with folder.claimed(config, resume):
            prepare_run(config, folder)
        with bar_reporter() as reporter:
            metrics = run(config, folder, reporter, distributed=False)
        folder.publish(config)
        return metrics


@contextmanager
def bar_reporter() -> Iterator[BarReporter]:
    """A reporter that draws for as long as the block runs."""
    with progress_bar() as bar:
        yield BarReporter(bar)
