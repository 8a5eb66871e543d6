"""What a sweep shows while it runs: a live table in a terminal, a line per ended trial in a log."""

import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raygrec.cluster.space import point_of, points
from raygrec.cluster.sweep_folder import ENDED, Outcome, SweepFolder, TrialFolder
from raygrec.evaluate.sweep_figures import short_names
from raygrec.evaluate.sweeps import best_trial
from raygrec.progress import clock, console, is_drawn, tell

SHOWN_RUNNING = 8


class SweepView(tune.Callback):
    """Notes how each trial stands in its folder, and shows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: Live | None = None
        self.trials: dict[str, tuple[Trial, Outcome]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "live": None, "trials": {}}

    def setup(self, **info: Any) -> None:
        self.folder = SweepFolder(self.path)
        self.sweep = self.folder.config()
        self.numbers = {outcome.trial: outcome.number for outcome, _ in self.folder.trials()}
        named = points(self.sweep)
        self.total = self.sweep.limit if named is None else len(named)
        self.begun, self.ended, self.drawn = time.monotonic(), 0, 0.0
        if is_drawn():
            self.live = Live(console=console, auto_refresh=False, transient=True)
            self.live.start()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        place = self._place(trial)
        known = place.outcome()
        name = place.path.name
        if known and known.status in ENDED:
            return  # the same point once more: its reports are told again
        if known and known.status == "running" and any(outcome.trial == name for _, outcome in self.trials.values()):
            return  # the same point twice at once: one outcome for both
        number = self.numbers.setdefault(name, len(self.numbers))
        outcome = Outcome(name, number, known.point if known else point_of(trial.config))
        self.trials[trial.trial_id] = (trial, outcome)
        place.ended(outcome)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        last = trial.last_result or {}
        if last.get("complete"):
            self._ended(trial, "finished", "")
        elif last.get("done"):
            self._ended(trial, "pruned", f"{self.sweep.scheduler.name}, epoch {last['epoch']:g}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        failure = self._place(trial).failure()
        self._ended(trial, "failed", failure[0] if failure else "the node or process that drove it was lost")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self.live and time.monotonic() - self.drawn > 0.5:
            self.drawn = time.monotonic()
            self.live.update(self._table(), refresh=True)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial, outcome in self.trials.values():
            if outcome.status == "running":  # Ray Tune says nothing of those that it stops with the sweep
                self._ended(trial, "unfinished", "the budget was spent")

    def close(self) -> None:
        """Gives the terminal back."""
        if self.live:
            self.live.stop()
            self.live = None

    def _place(self, trial: Trial) -> TrialFolder:
        return self.folder.trial(point_of(trial.config))

    def _ended(self, trial: Trial, status: str, reason: str) -> None:
        if trial.trial_id not in self.trials:
            return
        _, outcome = self.trials[trial.trial_id]
        outcome.status, outcome.reason = status, reason
        self._place(trial).ended(outcome)
        self.ended += 1
        score = (trial.last_result or {}).get("score")
        shown = "" if score is None else f", {self.sweep.metric} {score:.4f}"
        why = f" ({reason})" if reason else ""
        tell(f"trial {outcome.number}: {status}{why}{shown}; {_settings(outcome)}")

    def _table(self) -> Group:
        table, _ = self.folder.tables()
        counts = table["status"].value_counts().to_dict() if len(table) else {}
        running = [(trial, outcome) for trial, outcome in self.trials.values() if outcome.status == "running"]
        done = sum(counts.get(status, 0) for status in ("finished", "pruned", "failed"))
        heading = Text(f"{done}/{self.total} trials", style="bold")
        parts = [f"{counts.get(status, 0)} {status}" for status in ("finished", "pruned", "failed")]
        heading.append(f"   {len(running)} running, " + ", ".join(parts), style="default")
        best = best_trial(table, self.sweep.mode)
        if best is not None:
            heading.append(f"   best {self.sweep.metric} {best['score']:.4f}", style="green")
        heading.append(f"   {self._left(self.total - done)} left", style="cyan")
        rows = Table(box=None, pad_edge=False)
        for name in ("trial", "epoch", self.sweep.metric, "time", "settings"):
            rows.add_column(name, no_wrap=True, overflow="ellipsis")
        for trial, outcome in running[:SHOWN_RUNNING]:
            last = trial.last_result or {}
            score = f"{last['score']:.4f}" if "score" in last else "…"
            epoch = f"{last['epoch']:g}" if "epoch" in last else "…"
            rows.add_row(str(outcome.number), epoch, score, clock(last.get("seconds")), _settings(outcome))
        return Group(heading, rows)

    def _left(self, trials: int) -> str:
        """As long as the trials that ended in this call took, by the number that ended."""
        if not self.ended:
            return clock(None)
        return clock(max(trials, 0) * (time.monotonic() - self.begun) / self.ended)


def _settings(outcome: Outcome) -> str:
    """The point in few words: keys by as many of their last parts as tell them apart."""
    names = short_names(list(outcome.point))
    return " ".join(f"{name}={_short(value)}" for name, value in zip(names, outcome.point.values(), strict=True))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
