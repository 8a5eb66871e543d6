"""Sweeps: Ray Tune over runs on Ray Train workers, pruned, resumable, chosen by validation alone."""

import functools
import logging
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from raygrec.cluster.launcher import (
    DRIVER,
    REDRAWN_EVERY,
    RunOnWorkers,
    WorkerError,
    connect,
    refuse_jobs_copy,
    train_on_ray,
    workers_at_once,
)
from raygrec.cluster.space import (
    FOLDER,
    POINT,
    SweepConfig,
    base_config,
    first_points,
    longest_run,
    point_of,
    points,
    suggested,
    trial_config,
)
from raygrec.cluster.sweep_folder import ENDED, Report, SweepFolder, TrialFolder
from raygrec.cluster.sweep_view import SweepView
from raygrec.cluster.task import where_there_is_room
from raygrec.config import read_yaml
from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.evaluate.sweeps import best_trial, check_packages, write_report
from raygrec.train.assembly import prepare_only, prepare_run
from raygrec.train.folder import RunFolder, with_absolute_paths
from raygrec.train.settings import RunConfig, run_config

# Ray Tune reads these when it is imported or started.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "20")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # which would end a sweep on Ctrl-C as if it were done

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

SCORE, STUDY = "score", "sweep"
GONE_AFTER = 60.0  # seconds that a pruned trial's workers may take to end


def run_sweep(sweep: SweepConfig, resume: bool = False, final_seeds: int = 0) -> dict[str, Any]:
    """Runs, or goes on with, a sweep; writes its tables, best.yaml and report.

    final_seeds: the best configuration is then trained with so many seeds and read on test once. Returns counts,
    the best trial and, where asked, the final metrics. Raises `InputError` for wrong input, also where the cluster
    can never hold a trial, and `WorkerError` where no trial has a score.
    """
    check_packages()
    sweep = sweep.model_copy(update={"out": sweep.out.absolute(), "job": sweep.job.absolute()})
    refuse_jobs_copy(sweep.out)
    sweep, example = _anywhere(sweep)
    store = Store.open(example.store)
    folder = SweepFolder(sweep.out)
    started_here = False
    try:
        with folder.held():
            with folder.claimed(sweep, resume) as sweep:
                store.kept_by(folder.path)
                started_here = connect(example.cluster, sweep.concurrency)
                # The same for all trials; a trial makes the nodes itself where these are searched.
                nodes = not any(key.startswith("graph.") for key in sweep.space)
                where_there_is_room(example.cluster, prepare_only, example, nodes)
            with _quiet_tune():
                _search(sweep, folder, example)
            trials = folder.write_results()
            return _concluded(sweep, folder, trials, final_seeds)
    finally:
        if started_here:
            ray.shutdown()


def _anywhere(sweep: SweepConfig) -> tuple[SweepConfig, RunConfig]:
    """The sweep with the paths of its runs in its settings, absolute, and the run that all of its trials vary."""
    given = run_config(base_config(sweep), str(sweep.job))
    example = with_absolute_paths(given)
    paths = {"store": str(example.store)}
    if example.backbone.name != given.backbone.name and "backbone.name" not in sweep.space:
        paths["backbone.name"] = example.backbone.name
    return sweep.model_copy(update={"settings": {**sweep.settings, **paths}}), example


def _search(sweep: SweepConfig, folder: SweepFolder, example: RunConfig) -> None:
    """Runs the trials that have not ended. What Ray Tune keeps is pickled and never read: the trials' folders tell
    searcher and scheduler what they knew before a stop."""
    folder.reopen_failed()
    ended = {outcome.trial: place for outcome, place in folder.trials() if outcome.status in ENDED}
    named = points(sweep)
    if named is not None:
        named = [point for point in named if folder.trial(point).path.name not in ended]
    left = sweep.limit - len(ended) if named is None else len(named)
    if left <= 0:
        return
    shutil.rmtree(folder.tune, ignore_errors=True)
    view = SweepView(folder.path)
    tuner = tune.Tuner(
        tune.with_resources(Trial, {DRIVER: 1}),
        param_space={FOLDER: str(folder.path)} | ({POINT: tune.grid_search(named)} if named else {}),
        tune_config=tune.TuneConfig(
            search_alg=None if named else _searcher(sweep, folder),
            scheduler=_scheduler(sweep, example, ended),
            num_samples=1 if named else left,
            max_concurrent_trials=_fitting(sweep, example),
            trial_dirname_creator=_dirname,
        ),
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.path),
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            stop=Spent(folder.path),
            callbacks=[view],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        view.close()
    shutil.rmtree(folder.tune, ignore_errors=True)


def _fitting(sweep: SweepConfig, example: RunConfig) -> int:
    """Trials that the cluster holds at once, and no more than asked for."""
    if os.environ.get("RAYGREC_AUTOSCALING") == "1":
        return sweep.concurrency
    drivers = int(ray.cluster_resources().get(DRIVER, 0))
    return max(1, min(sweep.concurrency, drivers, workers_at_once(example.cluster) // example.cluster.fewest))


def _dirname(trial: TuneTrial) -> str:
    return trial.trial_id


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Ray Tune and Optuna say what SweepView says already."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air", "optuna")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Trial(tune.Trainable):
    """Ray Tune's view of a trial: each `step` gives one report of the runs that it drives.

    Everything that matters is in the trial's folder. Started again, a trial gives all its reports again and, unless
    it was pruned, goes on with its run from the last checkpoint.
    """

    def setup(self, config: dict[str, Any]) -> None:
        os.environ["RAYGREC_QUIET"] = "1"
        self.run: RunOnWorkers | None = None
        sweep_folder = SweepFolder(Path(config[FOLDER]))
        self.sweep = sweep_folder.config()
        self.point = point_of(config)
        self.place = sweep_folder.trial(self.point)
        self.place.path.mkdir(parents=True, exist_ok=True)
        failure = self.place.failure()
        if failure and failure[1]:
            raise RuntimeError(failure[0])
        self.coming = self._reports()
        self.told: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        try:
            report = next(self.coming, None)
        except Exception as error:
            recurs = isinstance(error, InputError) or (isinstance(error, WorkerError) and error.recurs)
            self.place.failed(" ".join(str(error).split()) or type(error).__name__, recurs)
            raise
        if report is None:  # of a trial that had ended early before
            return self.told | {"done": True}
        self.told = {
            "trial": self.place.path.name,
            "epoch": report.epoch,
            SCORE: report.score,
            "seconds": report.seconds,
            "device_seconds": report.device_seconds,
            "complete": report.seeds is not None,
            "done": report.seeds is not None,
        }
        return self.told

    def cleanup(self) -> None:
        """Where the trial is pruned, its workers end with it: they would keep their place otherwise."""
        if self.run is not None:
            self.run.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: the trial's folder holds all."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Nothing, likewise."""

    def _reports(self) -> Iterator[Report]:
        """All seeds' runs, one after the other; the epochs of the first are reported as they end."""
        with FileLock(self.place.lock):  # of two trials at one point, the second finds the first one's work
            outcome, known = self.place.outcome(), self.place.reports()
            if outcome is not None and outcome.status == "failed":
                raise RuntimeError(outcome.reason)
            if outcome is not None and outcome.status == "pruned":
                yield from known
                return
            clock = Clock(known[-1] if known else None)
            ends: list[dict[str, float]] = []
            report = None
            base = run_config(base_config(self.sweep), str(self.sweep.job)).seed
            for number in range(self.sweep.seeds):
                config = trial_config(self.sweep, self.point, self.place.run(base + number), base + number)
                kept = Best(self.sweep, config)
                for epoch, valid, workers in self._epochs(config):
                    kept.see(valid)
                    seconds, devices = clock.read(workers)
                    if number:
                        continue
                    report = Report(
                        epoch, valid[self.sweep.metric], kept.score, seconds, kept.valid, device_seconds=devices
                    )
                    report = self._noted(report, known)
                    yield report
                metrics = RunFolder(config.out).metrics()
                seconds, devices = clock.read(metrics["workers"])
                ends.append(metrics["valid"])  # by `evaluate.decoding`; epochs are measured by the first slot
            scores = [end[self.sweep.metric] for end in ends]
            spread = statistics.stdev(scores) if len(scores) > 1 else None
            last = Report(
                report.epoch,
                report.value,
                statistics.fmean(scores),
                seconds,
                {name: statistics.fmean(end[name] for end in ends) for name in ends[0]},
                len(scores),
                spread,
                devices,
            )
            last = self._noted(last, known)
            self.place.drop_weights()
            yield last

    def _noted(self, report: Report, known: list[Report]) -> Report:
        """The report as it was noted before a stop, or else now."""
        for one in known:
            if (one.epoch, one.seeds) == (report.epoch, report.seeds):
                return one
        self.place.report(report)
        return report

    def _epochs(self, config: RunConfig) -> Iterator[tuple[float, dict[str, float], int]]:
        """(epoch, validation metrics, workers that ran it) of a run, old ones first, while it goes on."""
        folder, seen = RunFolder(config.out), 0.0
        if folder.metrics() is None:
            with folder.claimed(config, resume=folder.config_file.exists()):
                where_there_is_room(config.cluster, prepare_run, config, folder)
            self.run = RunOnWorkers(config, folder, controller_failures=-1)
            while self.run.goes_on(REDRAWN_EVERY):
                for one in _validations(folder, seen):
                    seen = one[0]
                    yield one
            self.run.finish()
        for one in _validations(folder, seen):
            seen = one[0]
            yield one
        if not seen:  # nothing was trained epoch by epoch: all there is, is the end
            yield 1.0, folder.metrics()["valid"], folder.metrics()["workers"]


class Clock:
    """Seconds of a trial, and of its devices, of which there may be more or fewer from report to report."""

    def __init__(self, last: Report | None) -> None:
        """last: report before a stop, from which the counting goes on."""
        self.seconds, self.devices = (last.seconds, last.device_seconds) if last else (0.0, 0.0)
        self.begun = time.monotonic()

    def read(self, workers: int) -> tuple[float, float]:
        """Both, where so many workers ran since the last reading."""
        now = time.monotonic()
        passed, self.begun = now - self.begun, now
        self.seconds += passed
        self.devices += passed * workers
        return self.seconds, self.devices


class Best:
    """The validation metrics at the epoch whose parameters a run keeps."""

    def __init__(self, sweep: SweepConfig, config: RunConfig) -> None:
        self.metric, self.chooser = sweep.metric, f"ndcg@{max(config.evaluate.ks)}"
        self.valid: dict[str, float] = {}

    def see(self, valid: dict[str, float]) -> None:
        if not self.valid or valid[self.chooser] > self.valid[self.chooser]:
            self.valid = valid

    @property
    def score(self) -> float:
        return self.valid[self.metric]


def _validations(folder: RunFolder, after: float) -> Iterator[tuple[float, dict[str, float], int]]:
    for record in folder.history():
        if record["stage"] == "train" and "valid" in record and record["epoch"] > after:
            yield record["epoch"], record["valid"], record["workers"]


class Spent(tune.Stopper):
    """Ends the sweep when its budget is spent; `hours` count from the call, device hours over all of its calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device_seconds: dict[str, float] | None = None
        self.begun = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if self.device_seconds is not None:
            self.device_seconds[result["trial"]] = result["device_seconds"]
        return False

    def stop_all(self) -> bool:
        folder = SweepFolder(self.path)
        if self.device_seconds is None:
            self.begun = time.monotonic()
            trials, _ = folder.tables()
            self.device_seconds = (
                dict(zip(trials["trial"], trials["device_seconds"], strict=True)) if len(trials) else {}
            )
            self.budget = folder.config().budget
        hours = (time.monotonic() - self.begun) / 3600
        devices = sum(self.device_seconds.values()) / 3600
        return (self.budget.hours is not None and hours >= self.budget.hours) or (
            self.budget.device_hours is not None and devices >= self.budget.device_hours
        )


def _searcher(sweep: SweepConfig, folder: SweepFolder) -> OptunaSearch:
    """Optuna, which knows what trials came to before a stop and tries first what was not ended, then `first`."""
    import optuna

    searcher, known = sweep.searcher, list(folder.trials())
    metrics, modes = [SCORE], [sweep.mode]
    if searcher.cost:
        metrics, modes = [SCORE, searcher.cost], [sweep.mode, "min"]
    storage = optuna.storages.InMemoryStorage()
    directions = ["maximize" if mode == "max" else "minimize" for mode in modes]
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions)
    for outcome, place in known:
        if outcome.status in ENDED:
            study.enqueue_trial(outcome.point)
            trial = study.ask()
            suggested(sweep.space, trial)
            last = place.reports()[-1:]
            values = [[getattr(report, metric) for metric in metrics] for report in last]
            study.tell(trial, *values, state=optuna.trial.TrialState.COMPLETE if last else optuna.trial.TrialState.FAIL)
    begun = [outcome.point for outcome, _ in known]
    for point in [
        *(outcome.point for outcome, _ in known if outcome.status not in ENDED),
        *(point for point in first_points(sweep) if point not in begun),
    ]:
        study.enqueue_trial(point)
    return OptunaSearch(
        space=functools.partial(suggested, sweep.space),
        sampler=optuna.samplers.TPESampler(seed=searcher.seed + len(known), n_startup_trials=searcher.startup),
        metric=metrics if searcher.cost else SCORE,
        mode=modes if searcher.cost else sweep.mode,
        storage=storage,
        study_name=STUDY,
    )


@dataclass(eq=False)
class Past:
    """A trial that ended before a stop, as far as schedulers look at one."""

    trial_id: str
    results: list[dict[str, float]]


class Remembers:
    """A scheduler that, in a sweep that goes on, knows what the trials that ended before have reported."""

    def __init__(self, past: list[Past], **settings: Any) -> None:
        super().__init__(metric=SCORE, time_attr="epoch", **settings)
        self.past = past

    def on_trial_add(self, controller: Any, trial: TuneTrial) -> None:
        past, self.past = self.past, []
        for one in past:
            super().on_trial_add(controller, one)
            for result in one.results:
                self.on_trial_result(controller, one, result)
            self.on_trial_complete(controller, one, one.results[-1])
        super().on_trial_add(controller, trial)


class Brackets(AsyncHyperBandScheduler):
    """Draws a trial's bracket by its number, so that a sweep that goes on has the same ones."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.added = 0

    def on_trial_add(self, controller: Any, trial: TuneTrial | Past) -> None:
        super().on_trial_add(controller, trial)
        weights = [math.exp(len(bracket._rungs)) for bracket in self._brackets]
        self._trial_info[trial.trial_id] = random.Random(self.added).choices(self._brackets, weights)[0]
        self.added += 1


class Halving(Remembers, Brackets):
    """Asynchronous successive halving; its last rung is below the last epoch, so that whoever gets there ends."""

    def __init__(self, past: list[Past], epochs: int, **settings: Any) -> None:
        super().__init__(past, max_t=epochs + 1, **settings)
        for bracket in self._brackets:
            bracket._rungs = [rung for rung in bracket._rungs if rung[0] < epochs]


class Median(Remembers, MedianStoppingRule):
    """Ends trials whose best is below the median of the others' means; pauses none while there are too few others."""

    def __init__(self, past: list[Past], **settings: Any) -> None:
        super().__init__(past, hard_stop=True, min_time_slice=math.inf, **settings)


def _scheduler(sweep: SweepConfig, example: RunConfig, ended: dict[str, TrialFolder]) -> TrialScheduler:
    scheduler = sweep.scheduler
    if scheduler.name == "none":
        return FIFOScheduler()
    past = [Past(trial, _results(place)) for trial, place in ended.items()]
    past = [one for one in past if one.results]
    if scheduler.name == "median":
        return Median(past, mode=sweep.mode, grace_period=scheduler.grace)
    return Halving(
        past,
        longest_run(sweep, example),
        mode=sweep.mode,
        grace_period=scheduler.grace,
        reduction_factor=scheduler.reduction,
        brackets=3 if scheduler.name == "hyperband" else 1,
    )


def _results(place: TrialFolder) -> list[dict[str, float]]:
    return [{"epoch": one.epoch, SCORE: one.score, "time_total_s": one.seconds} for one in place.reports()]


def _concluded(sweep: SweepConfig, folder: SweepFolder, trials: Any, final_seeds: int) -> dict[str, Any]:
    """Report and final runs, and what the command line shows."""
    title = f"{sweep.job.stem}: {sweep.searcher.name}, {sweep.scheduler.name}"
    counts = trials["status"].value_counts().to_dict() if len(trials) else {}
    result: dict[str, Any] = {"folder": str(folder.path), "trials": len(trials), **counts}
    if len(trials):
        result["report"] = str(write_report(folder.path, sweep.metric, sweep.mode, title))
    result["left_groups"] = _left_groups()
    best = best_trial(trials, sweep.mode)
    if best is None:
        why = next((f": {reason}" for reason in trials.get("reason", []) if reason), "")
        raise WorkerError(f"{folder.path}: no trial has a score{why}")
    score, point = float(best[SCORE]), folder.point(best["trial"])
    result["best"] = {"trial": best["trial"], SCORE: score, "point": point, "config": str(folder.best_file)}
    if final_seeds:
        result["final"] = _final(folder, best["trial"], final_seeds)
    return result


def _left_groups() -> int:
    """Placement groups of this job that still hold resources, after those of pruned trials have had time to go."""
    deadline, job = time.monotonic() + GONE_AFTER, ray.get_runtime_context().get_job_id()
    while True:
        # The id of a group ends with that of the job that made it.
        groups = ray.util.placement_group_table().items()
        held = [group for group, about in groups if group.endswith(job) and about["state"] != "REMOVED"]
        if not held or time.monotonic() > deadline:
            return len(held)
        time.sleep(0.5)


def _final(folder: SweepFolder, trial: str, seeds: int) -> dict[str, Any]:
    """Trains best.yaml with several seeds; each run reads the test set once."""
    content = read_yaml(folder.best_file)
    runs = []
    for number in range(seeds):
        given = content | {"seed": content["seed"] + number, "out": str(folder.final / trial / f"seed-{number}")}
        config = run_config(given, str(folder.best_file))
        metrics = RunFolder(config.out).metrics()
        runs.append(metrics or train_on_ray(config, resume=RunFolder(config.out).config_file.exists()))
    names = [*runs[0]["baselines"], config.name]
    result = {
        name: {split: [(run["baselines"].get(name) or run)[split] for run in runs] for split in ("valid", "test")}
        for name in names
    }
    folder.write_final(result)
    return result
