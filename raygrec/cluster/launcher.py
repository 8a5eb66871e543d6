"""Runs the training pipeline on Ray Train workers and shows their progress where the driver runs."""

import logging
import os
import threading
import time
from typing import Any

from raygrec.errors import InputError
from raygrec.progress import progress_bar
from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.local import BarReporter
from raygrec.train.settings import RunConfig

# Ray reads these when it is imported or started: logs and usage notes are for files, not for the screen.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")

import ray
from ray import train
from ray.train.torch import TorchTrainer


class Board:
    """An actor that holds what rank 0 last said, for the driver to draw."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int, str]] = []

    def tell(self, task: str, done: int, total: int, note: str) -> None:
        if self.lines and self.lines[-1][0] == task and self.lines[-1][1] < self.lines[-1][2]:
            self.lines.pop()
        self.lines.append((task, done, total, note))

    def take(self) -> list[tuple[str, int, int, str]]:
        lines, self.lines = self.lines, []
        return lines


class RayReporter:
    """Progress to the board, at most a few times a second; records to Ray Train from every rank alike."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.told = 0.0

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done in (1, total) or now - self.told > 0.3:
            self.told = now
            self.board.tell.remote(task, done, total, note)

    def report(self, record: dict[str, Any]) -> None:
        """Rank 0 alone calls this, so nothing collective may happen here; history.jsonl is the record."""


def train_on_ray(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Trains on `config.cluster.workers` Ray Train workers; starts a local Ray where no cluster is given.

    A lost worker restarts the group, which continues from the run folder, `max_failures` times at most.
    Raises `InputError` where the cluster can never hold the workers, and what a worker raised otherwise.
    """
    folder = RunFolder(config.out.absolute())
    config = config.model_copy(update={"out": folder.path, "store": config.store.absolute()})
    folder.start(config, resume)
    prepare_run(config, folder)
    started_here = connect(config)
    try:
        return _fit(config, folder)
    finally:
        if started_here:
            ray.shutdown()


def connect(config: RunConfig) -> bool:
    """Joins the cluster that RAY_ADDRESS names, or starts one on this machine; True where it was started."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        ray.init(address=address, **quiet)
    else:
        # Logical CPUs may exceed the cores: two workers must fit a laptop. One more is the controller's.
        cluster = config.cluster
        cpus = max(os.cpu_count() or 1, int(cluster.workers * cluster.cpus_per_worker) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
    _check_resources(config)
    return not address


def _check_resources(config: RunConfig) -> None:
    cluster, there = config.cluster, ray.cluster_resources()
    for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        wanted = cluster.workers * each
        autoscales = os.environ.get("RAYGREC_AUTOSCALING") == "1"
        if wanted > there.get(kind, 0) and not autoscales:
            raise InputError(
                f"cluster.workers={cluster.workers} × {each:g} {kind} = {wanted:g} {kind}, the cluster has "
                f"{there.get(kind, 0):g}; ask for fewer, or set RAYGREC_AUTOSCALING=1 where it can grow"
            )


def _fit(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    board = ray.remote(num_cpus=0)(Board).remote()
    resources = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpus_per_worker:
        resources["GPU"] = config.cluster.gpus_per_worker
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        scaling_config=train.ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=bool(config.cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=train.RunConfig(
            name=f"{folder.path.name}-{time.time_ns()}",
            storage_path=str(folder.path / "ray"),
            failure_config=train.FailureConfig(max_failures=config.cluster.max_failures, controller_failure_limit=3),
        ),
    )
    stop = threading.Event()
    with progress_bar() as bar:
        drawer = threading.Thread(target=_draw, args=(board, BarReporter(bar), stop), daemon=True)
        drawer.start()
        try:
            trainer.fit()
        finally:
            stop.set()
            drawer.join()
    metrics = folder.metrics()
    if metrics is None:
        raise RuntimeError(f"{folder.path}: the workers ended without metrics; see {folder.path / 'ray'}")
    return metrics


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs; the process group exists already."""
    import torch

    from raygrec.train.pipeline import run

    os.environ["RAYGREC_QUIET"] = "1"
    config = RunConfig.model_validate(arguments["config"])
    if not config.cluster.gpus_per_worker:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    run(config, RunFolder(config.out), RayReporter(arguments["board"]), distributed=True)


def _draw(board: Any, reporter: BarReporter, stop: threading.Event) -> None:
    while True:
        last = stop.is_set()
        try:
            lines = ray.get(board.take.remote(), timeout=10)
        except ray.exceptions.RayError:
            return
        for task, done, total, note in lines:
            reporter.progress(task, done, total, note)
        if last:
            return
        stop.wait(0.3)
