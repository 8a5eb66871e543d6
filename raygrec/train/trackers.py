"""Live figures of a run for those who watch it: TensorBoard, MLflow, Weights & Biases, and whatever a launcher adds.

A tracker works on a thread of its own: the loop never waits for one, and one that fails is named once and dropped.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Protocol

from raygrec.config import flat
from raygrec.errors import InputError
from raygrec.train.folder import RunFolder
from raygrec.train.loop import VALID, Reporter, Watcher
from raygrec.train.settings import RunConfig, TrackConfig

PACKAGES = {"tensorboard": ("tensorboardX",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
SERVERS = ("http", "databricks", "uc")  # of MLflow, which need no database here
EXPERIMENT = "raygrec"  # of MLflow
CLOSING = 30.0  # seconds that trackers may take for their last points


class Tracker(Protocol):
    """Something that shows figures over steps; all its calls come from one thread."""

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One point: the figures of update `step` of `stage`, those of a validation as `valid/…`."""

    def close(self, finished: bool) -> None:
        """The last call; `finished` where the run was not cut off."""


def check_packages(config: TrackConfig) -> None:
    """`InputError` that names the first package which is asked for and not installed."""
    for name, packages in PACKAGES.items():
        if not getattr(config, name):
            continue
        needed = packages[:1] if name == "mlflow" and config.mlflow.startswith(SERVERS) else packages
        for package in needed:
            if find_spec(package) is None:
                install = package if name == "tensorboard" else f"'raygrec[{name}]'"
                raise InputError(f"track.{name}: the package '{package}' is not installed: pip install {install}")


@contextmanager
def tracked(
    reporter: Reporter, config: RunConfig, folder: RunFolder, others: Sequence[Tracker] = ()
) -> Iterator[Watcher]:
    """A reporter that passes points on to the trackers that `config` asks for and to `others`, while the block runs."""
    opens: dict[str, Callable[[], Tracker]] = {}
    track = config.track
    if track.tensorboard:
        opens["TensorBoard"] = lambda: TensorBoard(folder)
    if track.mlflow:
        opens["MLflow"] = lambda: MLflow(track.mlflow, config, folder)
    if track.wandb:
        opens["Weights & Biases"] = lambda: WeightsAndBiases(track.wandb, config, folder)
    opens |= {type(other).__name__: lambda other=other: other for other in others}
    feeds = [Feed(name, make, reporter.warn) for name, make in opens.items()]
    finished = False
    try:
        yield Tracked(reporter, feeds, track.every)
        finished = True
    finally:
        deadline = time.monotonic() + CLOSING
        for feed in feeds:
            feed.end(finished)
        for feed in feeds:
            feed.wait(deadline - time.monotonic())


class Tracked:
    """A reporter with trackers."""

    def __init__(self, reporter: Reporter, feeds: Sequence["Feed"], every: int) -> None:
        self.every = every if feeds else 0
        self._reporter, self._feeds = reporter, feeds

    def point(self, stage: str, step: int, values: dict[str, float]) -> None:
        for feed in self._feeds:
            feed.log(stage, step, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


class Feed:
    """One tracker and its thread."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._points: SimpleQueue = SimpleQueue()
        self._dropped = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self._dropped:
            self._points.put((stage, step, values))

    def end(self, finished: bool) -> None:
        self._points.put(finished)

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._warn(f"{self._name}: has not taken its last figures in {CLOSING:.0f} s; the run ends without them")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while not isinstance(point := self._points.get(), bool):
                tracker.log(*point)
            tracker.close(point)
        except Exception as error:
            self._dropped = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._warn(f"{self._name}: {reason}; it is told nothing more, the run goes on")


class TensorBoard:
    """Events in RUN/tensorboard, each stage a run of TensorBoard's.

    Points after the step that a resumed run goes on from are purged: what is logged first says where that is.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        from tensorboardX import SummaryWriter

        if stage not in self._writers:
            # Its own names have seconds: a run that is resumed within one would overwrite what it goes on from.
            suffix = f".{time.time_ns()}"
            self._writers[stage] = SummaryWriter(str(self._path / stage), purge_step=step, filename_suffix=suffix)
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)
        self._writers[stage].flush()

    def close(self, finished: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """One MLflow run for all processes of a run; points that it has already are left out."""

    def __init__(self, uri: str, config: RunConfig, folder: RunFolder) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        self._run = folder.kept("mlflow", lambda: self._new_run(config, folder.title))
        self._client.update_run(self._run, status="RUNNING")
        self._last: dict[str, int] = {}

    def _new_run(self, config: RunConfig, name: str) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        run = self._client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(config.model_dump(mode="json")).items()]
        for start in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(run, params=params[start : start + 100])
        return run

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if stage not in self._last:
            history = self._client.get_metric_history(self._run, f"{stage}/loss")
            self._last[stage] = max((metric.step for metric in history), default=0)
        if step > self._last[stage]:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, value in _named(stage, values).items()]
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


class WeightsAndBiases:
    """One W&B run for all processes of a run; points that its server has already are left out."""

    def __init__(self, project: str, config: RunConfig, folder: RunFolder) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=folder.title,
            id=folder.kept("wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._last: dict[str, int] = {}

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        place = f"{stage}/step"
        if stage not in self._last:
            self._last[stage] = int(self._run.summary.get(place) or 0)
            for names in (f"{stage}/*", f"{VALID}*"):
                self._run.define_metric(names, step_metric=place)
        if step > self._last[stage]:
            self._run.log({**_named(stage, values), place: step})

    def close(self, finished: bool) -> None:
        self._run.finish(0 if finished else 1)


def _named(stage: str, values: dict[str, float]) -> dict[str, float]:
    """Figures with their stage in front, but for those of validations."""
    return {name if name.startswith(VALID) else f"{stage}/{name}": value for name, value in values.items()}
