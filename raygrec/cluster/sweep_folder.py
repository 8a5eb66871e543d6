"""A sweep's folder: what each trial was, what it reported, how it ended; nothing that Ray Tune keeps is needed."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from raygrec.cluster.space import Point, SweepConfig, trial_config
from raygrec.config import read_yaml, validate
from raygrec.errors import InputError
from raygrec.evaluate.sweeps import REPORT_COLUMNS, TRIAL_COLUMNS, best_trial
from raygrec.storage import gone_if_it_fails, replaced, write_whole
from raygrec.train.lock import held

LOCK = ".lock"
MAY_DIFFER = ("trials", "concurrency", "retries", "budget")  # of a sweep that goes on
ENDED = ("finished", "pruned", "failed")

Status = Literal["running", "finished", "pruned", "failed", "unfinished"]


@dataclass
class Outcome:
    """One trial, as far as it has come."""

    trial: str
    number: int
    point: Point
    status: Status = "running"
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """One line of a trial's reports.jsonl.

    value: the sweep's metric at `epoch` of the first seed. score: at the best epoch so far; in the last line, which
    has a `seeds`, the mean over them, and `spread` their standard deviation. seconds: since the trial began, without
    the time between a stop and a resume. device_seconds: the same, times the workers that ran at the time.
    """

    epoch: float
    value: float
    score: float
    seconds: float
    valid: dict[str, float]
    seeds: int | None = None
    spread: float | None = None
    device_seconds: float = 0.0


class TrialFolder:
    """One point's files: outcome.json by the sweep, reports.jsonl and failure.json by the trial, a run per seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self._outcome = path / "outcome.json"
        self._reports = path / "reports.jsonl"
        self._failure = path / "failure.json"

    def run(self, seed: int) -> Path:
        """The run folder of a seed."""
        return self.path / f"seed-{seed}"

    def reports(self) -> list[Report]:
        """All complete lines."""
        if not self._reports.exists():
            return []
        lines = self._reports.read_text(encoding="utf-8").splitlines(True)
        return [Report(**json.loads(line)) for line in lines if line.endswith("\n")]

    def report(self, report: Report) -> None:
        """Appends a line, after the complete ones."""
        before = self.reports()
        lines = [json.dumps(asdict(one)) + "\n" for one in [*before, report]]
        write_whole(self._reports, "".join(lines))

    def outcome(self) -> Outcome | None:
        return Outcome(**json.loads(self._outcome.read_text())) if self._outcome.exists() else None

    def ended(self, outcome: Outcome) -> None:
        """Notes how the trial stands."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self._outcome, json.dumps(asdict(outcome)) + "\n")

    def failure(self) -> tuple[str, bool] | None:
        """Why the trial failed last, and whether it would again."""
        if not self._failure.exists():
            return None
        content = json.loads(self._failure.read_text())
        return content["reason"], content["recurs"]

    def failed(self, reason: str, recurs: bool) -> None:
        write_whole(self._failure, json.dumps({"reason": reason, "recurs": recurs}) + "\n")

    def drop_weights(self) -> None:
        """Leaves configs, histories, metrics and tracebacks of the runs: the best configuration is trained anew."""
        for run in self.path.glob("seed-*"):
            for folder in (run / "checkpoints", run / "model", *run.glob("ray/*/")):
                shutil.rmtree(folder, ignore_errors=True)
            for file in ("nodes", "text_vectors"):
                (run / f"{file}.safetensors").unlink(missing_ok=True)


class SweepFolder:
    """sweep.yaml, trials/, and what is made of them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "sweep.yaml"
        self.job_file = path / "job.yaml"
        self.best_file = path / "best.yaml"
        self.final_file = path / "final.json"
        self.final = path / "final"
        self.tune = path / "tune"

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder belongs to this process while the block runs; `InputError` where it is another's."""
        self._make()
        with held(self.path / LOCK):
            yield

    @contextmanager
    def claimed(self, sweep: SweepConfig, resume: bool) -> Iterator[SweepConfig]:
        """`start`, and where the block fails to make ready what a new sweep needs, the folder is gone again."""
        new = not self.config_file.exists()
        kept = self.start(sweep, resume)
        with gone_if_it_fails(self.path, new):
            yield kept

    def start(self, sweep: SweepConfig, resume: bool) -> SweepConfig:
        """The sweep with a job file of its own, which later edits of the one it was given do not reach.

        An existing sweep is refused unless `resume`, and then it must search the same: only `MAY_DIFFER` may differ.
        """
        self._make()
        job = read_yaml(sweep.job)
        kept = sweep.model_copy(update={"job": self.job_file})
        # What a start leaves that was cut off.
        ours = (LOCK, self.job_file.name, f".{self.job_file.name}.", f".{self.config_file.name}.")
        if self.config_file.exists():
            if not resume:
                raise InputError(
                    f"{self.path}: holds a sweep already; pass --resume to go on with it, or name another out"
                )
            before = self.config()
            changed = [key for key in SweepConfig.model_fields if getattr(before, key) != getattr(kept, key)]
            if read_yaml(self.job_file) != job:
                changed.append("job")
            for key in changed:
                if key not in MAY_DIFFER:
                    raise InputError(
                        f"{self.config_file}: the sweep was started with another '{key}'; name another out"
                    )
        elif any(not file.name.startswith(ours) for file in self.path.iterdir()):
            raise InputError(f"{self.path}: is not empty and holds no sweep; name a folder that does not exist yet")
        else:
            write_whole(self.job_file, yaml.safe_dump(job, sort_keys=False))
        write_whole(self.config_file, yaml.safe_dump(kept.model_dump(mode="json"), sort_keys=False))
        return kept

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be a sweep's folder ({error.strerror or error})") from None

    def config(self) -> SweepConfig:
        """The effective config the sweep was started with."""
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: no sweep there (sweep.yaml is missing)")
        return validate(SweepConfig, read_yaml(self.config_file), str(self.config_file))

    def trial(self, point: Point) -> TrialFolder:
        """The folder of a point: a point that comes twice is trained once."""
        name = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]
        return TrialFolder(self.path / "trials" / name)

    def trials(self) -> Iterator[tuple[Outcome, TrialFolder]]:
        """In the order of their start."""
        folders = [TrialFolder(path.parent) for path in self.path.glob("trials/*/outcome.json")]
        found = [(folder.outcome(), folder) for folder in folders]
        yield from sorted(((one, folder) for one, folder in found if one), key=lambda pair: pair[0].number)

    def reopen_failed(self) -> None:
        """Trials that a fault has ended which need not come again, such as a node's loss, have not ended."""
        for outcome, place in self.trials():
            _, recurs = place.failure() or ("", False)
            if outcome.status == "failed" and not recurs:
                place.ended(replace(outcome, status="unfinished"))

    def point(self, trial: str) -> Point:
        """The point of a trial that has begun."""
        return next(outcome.point for outcome, _ in self.trials() if outcome.trial == trial)

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Trials, one row each, and their reports."""
        sweep = self.config()
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for outcome, folder in self.trials():
            reports = folder.reports()
            last = reports[-1] if reports else None
            rows.append(
                {
                    "trial": outcome.trial,
                    "number": outcome.number,
                    "status": "unfinished" if outcome.status == "running" else outcome.status,
                    "reason": outcome.reason,
                    "score": last.score if last else None,
                    "spread": last.spread if last else None,
                    "epochs": last.epoch if last else 0.0,
                    "seconds": last.seconds if last else 0.0,
                    "device_seconds": last.device_seconds if last else 0.0,
                    **{f"config.{key}": outcome.point.get(key) for key in sweep.space},
                    **({f"valid.{name}": value for name, value in last.valid.items()} if last else {}),
                }
            )
            lines += [
                {"trial": outcome.trial} | {name: getattr(one, name) for name in ("epoch", "score", "value", "seconds")}
                for one in reports
                if one.seeds is None
            ]
        # Columns without rows, too: where every trial has failed, there is still a report.
        return pd.DataFrame(rows, columns=None if rows else TRIAL_COLUMNS), pd.DataFrame(lines, columns=REPORT_COLUMNS)

    def write_results(self) -> pd.DataFrame:
        """trials.parquet, reports.parquet and, where a trial has a score, best.yaml; returns the trials."""
        sweep = self.config()
        trials, reports = self.tables()
        for outcome, folder in self.trials():
            if outcome.status not in ("running", "unfinished"):
                folder.drop_weights()
        for name, table in (("trials", trials), ("reports", reports)):
            with replaced(self.path / f"{name}.parquet") as draft:
                _as_stored(table).to_parquet(draft, index=False)
        best = best_trial(trials, sweep.mode)
        if best is not None:
            config = trial_config(sweep, self.point(best["trial"]), self.path / "best", test=True)
            write_whole(self.best_file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return trials

    def write_final(self, metrics: dict[str, Any]) -> None:
        """final.json: what the best configuration came to, by method and split, a list over seeds."""
        write_whole(self.final_file, json.dumps(metrics, indent=2) + "\n")


def _as_stored(table: pd.DataFrame) -> pd.DataFrame:
    """A key whose values are of several types is stored as text: a parquet column has one."""
    mixed = {
        name: table[name].map(lambda value: None if value is None else str(value))
        for name in table.columns
        if name.startswith("config.")
        and table[name].dropna().map(type).nunique() > 1
        and not table[name].dropna().map(lambda value: type(value) in (int, float)).all()
    }
    return table.assign(**mixed)
