"""What a row of the fault matrix works with: nodes, runs on them, and what they are compared with."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from raygrec.cluster.launcher import train_on_ray
from raygrec.train.folder import RunFolder
from raygrec.train.settings import RunConfig
from tests.tiny import make_backbone, make_store
from tests.train.workers import run_workers, tiny_galrec_config

STEPS = 48  # of every run; validated after every fourth epoch
LENGTH = {"epochs": STEPS // 4, "patience": STEPS, "evaluate_every": 4, "lr": 0.003, "checkpoint_every": 1}
EPOCH = 12  # updates of the longer runs, in which what comes from outside has time to be heard of
LONGER = {"batch": 4, "micro_batch": 4, "epochs": 30, "patience": 30, "evaluate_every": 10, "checkpoint_every": 9999}
CLOSE = 1e-4  # relative, between runs on different numbers of workers
PATIENCE = 400.0  # seconds to wait for anything


class VainError(AssertionError):
    """Something that a row waited for did not come."""


@dataclass
class Hit:
    """A fault: what was done, after which update, and when the run was past it again."""

    what: str
    step: int
    at: float = field(default_factory=time.monotonic)
    back: float | None = None


@dataclass
class Comparison:
    """A run beside one that nothing happened to."""

    figure: str
    found: float
    expected: float
    exactly: bool
    difference: float
    """The largest relative one over losses and metrics; infinity where they are not of the same kind."""
    identical: bool
    """Losses, metrics and parameters, to the bit."""

    @property
    def holds(self) -> bool:
        return self.identical if self.exactly else self.difference <= CLOSE


class World:
    """What all rows share: the data, a head node with the drivers, and the runs that nothing happens to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("store", "backbone"):
            (place / name).mkdir()
        self.store = make_store(place / "store").path
        self.backbone = make_backbone(place / "backbone")
        # Nodes without the dashboard's agent, which needs more CPU to start than all else of them.
        ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not wanted")
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "resources": {"train_driver": 4}, "include_dashboard": False},
        )
        ray._private.worker._worker_logs_enabled = False  # the raylet would write of each lost worker
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self._whole: dict[str, RunFolder] = {}

    def config(self, out: Path, **changes: Any) -> RunConfig:
        train = LENGTH | changes.pop("train", {})
        cluster = {"max_failures": 10} | changes.pop("cluster", {})
        return tiny_galrec_config(self.store, self.backbone, out, train=train, cluster=cluster, **changes)

    def whole(self, workers: int, **changes: Any) -> RunFolder:
        """The uninterrupted run, on processes without Ray; one for all rows that need it."""
        key = json.dumps([workers, changes], sort_keys=True)
        if key not in self._whole:
            config = self.config(self.place / f"whole-{len(self._whole)}", **changes)
            self._whole[key] = run_workers(config, workers, seconds=4 * PATIENCE)
        return self._whole[key]

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


class Run:
    """A run whose driver is a thread of this process."""

    def __init__(self, config: RunConfig, resume: bool) -> None:
        self.folder = RunFolder(config.out)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._drive, args=(config, resume), daemon=True)
        self._thread.start()

    def _drive(self, config: RunConfig, resume: bool) -> None:
        try:
            train_on_ray(config, resume)
        except BaseException as error:
            self.error = error

    def alive(self) -> bool:
        return self._thread.is_alive()

    def why(self) -> str:
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"


class Command:
    """A run, or a sweep, whose driver is a process of its own, started as a user does."""

    def __init__(self, folder: Path, *arguments: object, address: str) -> None:
        self.folder = RunFolder(folder)
        command = [sys.executable, "-m", "raygrec.cli", *map(str, arguments)]
        self._said = folder.with_name(f"{folder.name}-{time.time_ns()}.log")
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=said, env=os.environ | {"RAY_ADDRESS": address, "RAYGREC_QUIET": "0"}
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """All that it wrote."""
        return self._said.read_text()

    def why(self) -> str:
        lines = self.said().strip().splitlines()
        return f"exit code {self.process.poll()}: {lines[-1] if lines else ''}" if self.process.poll() else ""


class Scene:
    """One try of one row: its folder, nodes and random numbers, and what it saw."""

    def __init__(self, world: World, place: Path, seed: int, row: str) -> None:
        self.world, self.place = world, place
        self.random = random.Random(f"{row} {seed}")
        self.nodes: list[Any] = []
        self.hits: list[Hit] = []
        self.comparisons: list[Comparison] = []
        self.started: list[Run | Command] = []
        place.mkdir(parents=True)

    # ---- nodes and runs

    def add_nodes(self, count: int = 2, cpus: int = 1) -> None:
        """Real nodes beside the head, which the drivers sit on and which has no CPU for workers."""
        self.nodes += [self.world.cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20) for _ in range(count)]

    def lose_node(self, node: Any) -> None:
        """All of its processes at once, as when a machine goes."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        below = raylet.children(recursive=True)
        self.world.cluster.remove_node(node, allow_graceful=False)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes.remove(node)

    def busy_nodes(self) -> list[Any]:
        """Those with training workers."""
        parents = {parent.pid for worker in self.workers() for parent in worker.parents()}
        return [node for node in self.nodes if node.all_processes["raylet"][0].process.pid in parents]

    def announce_loss(self, node: Any, seconds: float) -> None:
        """What a cloud's notice becomes: Ray is told that the node goes away in so many seconds."""
        client = ray._raylet.GcsClient(address=self.world.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node.node_id, reason, "spot", int(1000 * (time.time() + seconds)))
        if not accepted:
            raise VainError(f"the notice was refused: {why}")

    def config(self, name: str = "run", **changes: Any) -> RunConfig:
        return self.world.config(self.place / name, **changes)

    def start(self, config: RunConfig, resume: bool = False) -> Run:
        self.started.append(Run(config, resume))
        return self.started[-1]

    def command(self, config: RunConfig, *options: str) -> Command:
        """`raygrec train` in a process of its own."""
        file = config.out.with_suffix(".yaml")
        file.write_text(config.model_dump_json())  # JSON is YAML
        return self.raygrec(config.out, "train", file, *options)

    def raygrec(self, folder: Path, *arguments: object) -> Command:
        self.started.append(Command(folder, *arguments, address=self.world.cluster.address))
        return self.started[-1]

    # ---- when and what

    def step(self, first: int = 4, last: int = STEPS - 14) -> int:
        """A random number of updates."""
        return self.random.randint(first, last)

    def until(self, run: Run | Command, step: int) -> None:
        """Waits for the checkpoint of `step`."""
        self.wait(lambda: newest(run.folder) >= step or not run.alive())
        if not run.alive():
            raise VainError(f"the run ended before update {step}: {run.why() or 'well'}")

    def hit(self, run: Run | Command, what: str) -> None:
        """Notes a fault that is done next."""
        self.hits.append(Hit(what, newest(run.folder)))

    def end(self, run: Run | Command, fails: str = "") -> RunFolder:
        """Waits for the run's end, which must be a good one, or say `fails`."""
        self.wait(lambda: self._note_return(run) or not run.alive())
        self._note_return(run)
        why = run.why()
        if fails and fails not in why:
            raise VainError(f"expected '{fails}', found: {why or 'a run that ended well'}")
        if not fails and why:
            raise VainError(why)
        return run.folder

    def _note_return(self, run: Run | Command) -> None:
        for hit in self.hits:
            if hit.back is None and (newest(run.folder) > hit.step or run.folder.metrics() is not None):
                hit.back = time.monotonic()

    def wait(self, condition: Callable[[], object], every: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise VainError(f"waited {PATIENCE:g} s in vain")
            time.sleep(every)

    def workers(self) -> list[psutil.Process]:
        """The training workers of all nodes."""
        below = psutil.Process().children(recursive=True)
        return [one for one in below if alive(one) and "RayTrainWorker" in name_of(one)]

    def rank_0(self, run: Run | Command) -> psutil.Process:
        """The worker that holds the run's writer lock."""
        return psutil.Process(int((run.folder.path / ".writer.lock").read_text().split()[1]))

    def others(self, run: Run | Command) -> list[psutil.Process]:
        return [one for one in self.workers() if one.pid != self.rank_0(run).pid]

    def cut(self, run: Run, step: int) -> None:
        """Kills all workers of a run that may not restart."""
        self.until(run, step)
        self.hit(run, f"all workers killed at {step}")
        kill(*self.workers())
        self.end(run, fails="WorkerError")
        if run.folder.metrics() is not None:
            raise VainError("the run was over before it was cut")

    # ---- what came of it

    def compare(self, folder: RunFolder, workers: int = 2, exactly: bool = True, **changes: Any) -> None:
        """Beside the uninterrupted run on so many workers: to the bit, or as close as another number of them gets."""
        self.comparisons.append(compared(folder, self.world.whole(workers, **changes), exactly))

    def clean(self) -> None:
        for run in self.started:
            if isinstance(run, Command) and run.alive():
                run.process.kill()
                run.process.wait()
        for node in list(self.nodes):
            self.lose_node(node)
        deadline = time.monotonic() + 60
        while any(isinstance(run, Run) and run.alive() for run in self.started) and time.monotonic() < deadline:
            time.sleep(0.1)


def newest(folder: RunFolder) -> int:
    """Updates that the newest checkpoint has seen."""
    return max((int(path.name.split("-")[1]) for path in folder.checkpoints.glob("train-" + 8 * "[0-9]")), default=0)


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `place` while the block runs; False where none can be mounted."""
    place.mkdir()
    mounted = (
        not os.geteuid()
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


def compared(folder: RunFolder, whole: RunFolder, exactly: bool) -> Comparison:
    found, expected = folder.metrics(), whole.metrics()
    if found is None:
        raise VainError(f"{folder.path}: the run has no metrics")
    split = "test" if "test" in found else "valid"
    numbers = [list(_numbers(one, split)) for one in (found, expected)]
    numbers = [
        [*one, *(record["loss"] for record in where.history())]
        for one, where in zip(numbers, (folder, whole), strict=True)
    ]
    same = len(numbers[0]) == len(numbers[1])
    difference = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(*numbers, strict=True)) if same else math.inf
    same = not difference
    if folder.model_file.exists():  # a sweep's trials keep none
        parameters = [one.load_parts(one.model_file) for one in (folder, whole)]
        same = same and all(torch.equal(value, parameters[0][name]) for name, value in parameters[1].items())
    figure = f"{split} ndcg@3"
    return Comparison(figure, found[split]["ndcg@3"], expected[split]["ndcg@3"], exactly, difference, same)


def _numbers(metrics: dict[str, Any], split: str) -> Iterator[float]:
    for name in ("valid", split):
        yield from metrics[name].values()
        for baseline in metrics["baselines"].values():
            yield from baseline[name].values()
