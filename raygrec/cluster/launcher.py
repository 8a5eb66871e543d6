"""Runs the training pipeline on Ray Train workers and shows their progress where the driver runs."""

import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from raygrec.errors import InputError, StorageError
from raygrec.progress import progress_bar, tell
from raygrec.ranks import from_rank_0
from raygrec.train.assembly import prepare_run
from raygrec.train.engine import NonFiniteError
from raygrec.train.folder import RunFolder, with_absolute_paths
from raygrec.train.local import BarReporter
from raygrec.train.mirror import restore
from raygrec.train.settings import ClusterConfig, RunConfig, run_config

# Ray reads these when it is imported or started.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import train
from ray.train.torch import TorchTrainer

from raygrec.cluster.board import Failure, put_up_board
from raygrec.cluster.gauges import Gauges
from raygrec.cluster.heartbeat import Heart, Watch
from raygrec.cluster.introduction import Introduction
from raygrec.cluster.task import as_task, where_there_is_room

T = TypeVar("T")

STARTING = "starting workers"
DRIVER = "train_driver"  # the resource that a sweep's trials sit on, so that they never take the workers' CPUs
JOBS_COPIES = "runtime_resources"  # Ray's folder for what jobs bring along
REDRAWN_EVERY = 0.3  # seconds
STOPPED_AFTER = 30.0  # seconds that workers may take to end
RESIZED_EVERY = 60.0  # seconds between two looks at whether a run of a variable number of workers has room for more


class WorkerError(RuntimeError):
    """A run that its workers could not finish; the message names the file with their tracebacks.

    recurs: whether it would end in the same way if it were started again.
    """

    def __init__(self, message: str, recurs: bool = False) -> None:
        super().__init__(message)
        self.recurs = recurs


class RayReporter:
    """Progress to the board, at most a few times a second; what Ray says of the nodes to every rank alike."""

    def __init__(self, board: Any, heart: Heart) -> None:
        self.board, self.heart = board, heart
        self.told = 0.0
        self.notice: train.PreemptionInfo | None = None

    def at(self, task: str, step: int) -> None:
        self.heart.at = (task, step)

    def wants_checkpoint(self) -> bool:
        """Whether a node is about to be taken away, and this is the first that is heard of it; waits for all ranks."""
        notice = train.get_preemption_info()
        if notice is None or notice == self.notice:
            return False
        self.notice = notice
        if train.get_context().get_world_rank() == 0:
            ranks = ", ".join(map(str, notice.preempted_ranks))
            when = "" if notice.deadline_ms is None else f" in {max(0, notice.deadline_ms / 1000 - time.time()):.0f} s"
            self.warn(f"the node of rank {ranks} will be taken away{when}; a checkpoint is written now")
        return True

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done in (1, total) or now - self.told > REDRAWN_EVERY:
            self.told = now
            self.board.tell.remote(task, done, total, note)

    def report(self, record: dict[str, Any]) -> None:
        """Rank 0 alone calls this, so nothing collective may happen here; history.jsonl is the record."""

    def warn(self, line: str) -> None:
        """A task of no steps: the driver prints its name."""
        self.board.tell.remote(line, 0, 0, "")


def train_on_ray(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Trains on `config.cluster.workers` Ray Train workers; starts a local Ray where no cluster is given.

    A lost worker restarts the group, which continues from the run folder, `max_failures` times at most.
    Raises `InputError` for wrong input, also where the cluster can never hold the workers, and `WorkerError`
    where the workers failed.
    """
    config = with_absolute_paths(config)
    refuse_jobs_copy(config.out)
    folder = RunFolder(config.out)
    restore(config, folder, resume)
    started_here = False
    try:
        with folder.held():
            with folder.claimed(config, resume):
                started_here = connect(config.cluster)
                where_there_is_room(config.cluster, prepare_run, config, folder)
            metrics = _fit(config, folder)
            folder.publish(config)
            return metrics
    finally:
        if started_here:
            ray.shutdown()


def refuse_jobs_copy(out: Path) -> None:
    """`InputError` where `out` is inside the copy of the code that a submitted job works in."""
    if JOBS_COPIES in out.parts:
        raise InputError(f"{out}: goes away with the job's copy of the code; name an absolute path in out")


def on_cluster(cluster: ClusterConfig, function: Callable[..., T], *arguments: object) -> T:
    """Runs `function` as one task of the cluster that RAY_ADDRESS names; raises as `connect` and `as_task` do."""
    if not os.environ.get("RAY_ADDRESS"):
        raise InputError("--ray: RAY_ADDRESS names no cluster; set it, or leave --ray out to work in this process")
    connect(cluster.model_copy(update={"workers": 1}))
    return as_task(cluster, function, *arguments)


def connect(cluster: ClusterConfig, trials: int = 0) -> bool:
    """Joins the cluster that RAY_ADDRESS names, or starts one on this machine; True where it was started.

    trials: of a sweep, at once, where it is one; the machine's own cluster then has that many of `DRIVER`.
    """
    if ray.is_initialized():
        check_resources(cluster, trials)
        return False
    address = os.environ.get("RAY_ADDRESS")
    settings = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    # `log_to_driver` holds for workers alone: the raylet would still write of lost ones to standard output.
    ray._private.worker._worker_logs_enabled = False
    with progress_bar() as bars:
        task = bars.add_task("joining Ray" if address else "starting Ray", total=1)
        if address:
            _join(address, settings)
        else:
            # Logical CPUs may exceed the cores: two workers must fit a laptop. One more is the controller's.
            cpus = max(os.cpu_count() or 1, int(max(trials, 1) * cluster.most * cluster.cpus_per_worker) + 1)
            resources = {DRIVER: trials} if trials else None
            ray.init(num_cpus=cpus, resources=resources, include_dashboard=False, **settings)
        bars.advance(task)
    try:
        check_resources(cluster, trials)
    except InputError:
        ray.shutdown()
        raise
    return not address


def _join(address: str, settings: dict[str, Any]) -> None:
    host, _, port = address.rpartition(":")
    try:
        if host and "://" not in address:
            # Ray itself would try for minutes before it says that nobody is there.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})") from None


def check_resources(cluster: ClusterConfig, trials: int = 0) -> None:
    """`InputError` with the arithmetic where the cluster, as it is, could never hold one run of these workers."""
    there = ray.cluster_resources()
    if os.environ.get("RAYGREC_AUTOSCALING") != "1":
        _check_workers(cluster, there)
    if trials:
        _check_drivers(int(there.get(DRIVER, 0)), trials)


def _check_workers(cluster: ClusterConfig, there: dict[str, float]) -> None:
    for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        wanted = cluster.fewest * each
        if wanted > there.get(kind, 0):
            raise InputError(
                f"cluster.workers={cluster.fewest} × {each:g} {kind} = {wanted:g} {kind}, the cluster has "
                f"{there.get(kind, 0):g}; ask for fewer, or set RAYGREC_AUTOSCALING=1 where it can grow"
            )
    if (room := workers_at_once(cluster)) < cluster.fewest:
        raise InputError(
            f"cluster.workers={cluster.fewest}, each of {cluster.cpus_per_worker:g} CPU and "
            f"{cluster.gpus_per_worker:g} GPU of one node: the cluster's nodes hold {room} such; ask for less per "
            "worker, or set RAYGREC_AUTOSCALING=1 where it can grow"
        )


def workers_at_once(cluster: ClusterConfig) -> int:
    """How many such workers the nodes that are there could hold, if nothing else ran on them."""
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) / need + 1e-6) for kind, need in each.items() if need) for node in nodes)


def _check_drivers(places: int, trials: int) -> None:
    """Trials sit on `DRIVER`, of which the sweep's own job may hold one."""
    free = int(ray.available_resources().get(DRIVER, 0))
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by `ray job submit`
    if places < 1 or (submitted and places == 1 and free == 0):
        raise InputError(
            f"a sweep's trials sit on the resource '{DRIVER}', of which the cluster has {places}, {free} free; start "
            f"its head with --resources='{{\"{DRIVER}\": {trials + 1}}}': one for each trial at once, one for the job"
        )
    if not free:
        tell(f"all {places} '{DRIVER}' are taken: trials wait until one is free")


class RunOnWorkers:
    """A run on Ray Train workers, which goes on in the background until `finish` is called."""

    def __init__(self, config: RunConfig, folder: RunFolder, controller_failures: int = 3) -> None:
        """controller_failures: how often the workers may find no place before the run is given up; −1: they wait."""
        self.folder = folder
        self.board = put_up_board()
        self._watch = Watch(self.board, config.cluster.stall_seconds, tell)
        self._raised: list[BaseException] = []
        trainer = _trainer(config, folder, self.board, controller_failures)
        # In the main thread, Ray would answer Ctrl-C itself, and slowly.
        self._running = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self._running.start()

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._raised.append(error)

    def goes_on(self, seconds: float) -> bool:
        """Waits so long at most; whether the run is still going on."""
        self._running.join(seconds)
        self._watch.look()
        if _asked(self.board.failed):
            self.stop()  # Ray Train would start the workers once more, to hear the same
        return self._running.is_alive()

    def stop(self) -> None:
        """Ends the workers before the run has, and gives back the place they have."""
        controller = _asked(self.board.controlled, STOPPED_AFTER)
        if controller is not None and self._running.is_alive():
            with suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=STOPPED_AFTER)

    def finish(self) -> dict[str, Any]:
        """The metrics, once the run has ended; `InputError` or `WorkerError` where it failed."""
        self._running.join()
        failure = ray.get(self.board.failed.remote())
        if failure or self._raised:
            raise _explained(failure, self._raised, self.folder, self._watch.line)
        metrics = self.folder.metrics()
        if metrics is None:
            raise WorkerError(f"{self.folder.path}: the workers ended without metrics; see {self.folder.path / 'ray'}")
        return metrics


def _fit(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    run = RunOnWorkers(config, folder)
    with progress_bar() as bars:
        reporter = BarReporter(bars)
        reporter.progress(STARTING, 0, config.cluster.most)
        workers = 0
        while run.goes_on(REDRAWN_EVERY):
            for line in _asked(run.board.take) or ():
                if line[0] == STARTING:
                    if workers:
                        tell(_restarted(workers, line[2]))
                    workers = line[2]
                reporter.progress(*line)
    return run.finish()


def _restarted(before: int, workers: int) -> str:
    why = "a worker was lost" if before == workers else f"workers: {workers} instead of {before}"
    return f"{why}; the run goes on from its last checkpoint"


def _trainer(config: RunConfig, folder: RunFolder, board: Any, controller_failures: int) -> TorchTrainer:
    cluster = config.cluster
    if cluster.fewest < cluster.most:
        # Ray counts on a lost node for twenty seconds more, and a start that did so fails without being one of ours.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")
        controller_failures = -1
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        scaling_config=train.ScalingConfig(
            num_workers=cluster.workers,
            elastic_resize_monitor_interval_s=RESIZED_EVERY,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=train.RunConfig(
            name=f"{folder.path.name}-{time.time_ns()}",
            storage_path=str(folder.path / "ray"),
            callbacks=[Introduction(board)],
            failure_config=train.FailureConfig(
                max_failures=cluster.max_failures,
                max_preemption_failures=cluster.max_preemptions,
                controller_failure_limit=controller_failures,
            ),
        ),
    )


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs; the process group exists already."""
    import torch

    from raygrec.train.pipeline import run

    os.environ["RAYGREC_QUIET"] = "1"
    config, board = run_config(arguments["config"], "the run's config"), arguments["board"]
    if ray.get(board.failed.remote()):
        return  # Ray Train restarts the group after any failure; this one would only repeat itself
    if not config.cluster.gpus_per_worker:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    context = train.get_context()
    heart = Heart(board, from_rank_0(time.time_ns), context.get_world_rank())
    reporter = RayReporter(board, heart)
    if context.get_world_rank() == 0:
        reporter.progress(STARTING, context.get_world_size(), context.get_world_size())
    try:
        with heart.beating():
            run(config, RunFolder(config.out), reporter, distributed=True, trackers=[Gauges(config.out)])
    except Exception as error:
        if _recurs(error):
            ray.get(board.fail.remote(_as_failure(error)))
        raise


def _recurs(error: Exception) -> bool:
    """False for what may come of a lost peer or a lost file system, and be gone after a restart."""
    return isinstance(error, NonFiniteError | StorageError) or not isinstance(error, RuntimeError | OSError)


def _as_failure(error: Exception) -> Failure:
    ours = isinstance(error, InputError | NonFiniteError | StorageError)
    message = str(error) if ours else f"{type(error).__name__}: {error}"
    return Failure(isinstance(error, InputError), message, traceback.format_exc())


def _explained(failure: Failure | None, raised: list[BaseException], folder: RunFolder, stall: str = "") -> Exception:
    """The one line for the user; the whole story is in ray/failure.log of the run folder."""
    story = failure.trace if failure else str(raised[0])
    message = failure.message if failure else stall or story.strip().splitlines()[-1]
    file = folder.path / "ray" / "failure.log"
    where = f"; the worker's traceback is in {file}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{story.rstrip()}\n", encoding="utf-8")
    except OSError:
        where = ""  # a full disk may be what ended the run
    if failure and failure.wrong_input:
        return InputError(message)
    return WorkerError(f"{' '.join(message.split())}{where}", recurs=failure is not None)


def _asked(question: Any, seconds: float = 10.0) -> Any:
    """What a board's method answers; None where the board is slow or gone, which ends no run."""
    try:
        return ray.get(question.remote(), timeout=seconds)
    except ray.exceptions.RayError:
        return None
