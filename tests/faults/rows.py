"""The rows of the fault matrix.

A row is a function of a `Scene`: it starts a run, waits for a random update, says what it does (`scene.hit`), does it,
and compares how the run ends with the uninterrupted one. Its name is what `python -m tests.faults NAME` runs.
"""

import itertools
import os
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from raygrec.cluster import launcher
from raygrec.cluster.sweep_folder import SweepFolder
from raygrec.train.folder import RunFolder
from tests.faults.scene import EPOCH, LONGER, Run, Scene, VainError, kill, newest, small_disk
from tests.train.test_folder import flip

Row = Callable[[Scene], None]
ROWS: dict[str, Row] = {}


def row(name: str, **arguments: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a row; one function may make several, with `arguments` of their own."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROWS[name] = partial(function, **arguments)
        return function

    return register


@row("worker-killed")
def worker_killed(scene: Scene) -> None:
    scene.add_nodes(2)
    run = scene.start(scene.config())
    scene.until(run, scene.step())
    scene.hit(run, "kill -9 of rank 1")
    kill(*scene.others(run))
    scene.compare(scene.end(run))


@row("rank-0-killed-while-it-saves")
def rank_0_killed(scene: Scene) -> None:
    scene.add_nodes(2)
    run = scene.start(scene.config())
    scene.until(run, scene.step())
    rank_0 = scene.rank_0(run)
    for _ in range(3):  # a checkpoint takes milliseconds: where the shot comes late, once more
        scene.wait(lambda: drafts(run.folder.checkpoints) or not run.alive(), every=0)
        scene.hit(run, "kill -9 of rank 0 with a half-written checkpoint")
        kill(rank_0)
        rank_0.wait(30)
        if half := drafts(run.folder.checkpoints):
            break
        scene.until(run, newest(run.folder) + 4)
        rank_0 = scene.rank_0(run)
    if not half:
        raise VainError("no kill came in the middle of a checkpoint")
    scene.compare(scene.end(run))


def drafts(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob(".train-*.draft"))


@row("node-lost")
def node_lost(scene: Scene) -> None:
    scene.add_nodes(3)
    run = scene.start(scene.config())
    scene.until(run, scene.step())
    scene.hit(run, "a node with a worker lost, one of three")
    scene.lose_node(scene.random.choice(scene.busy_nodes()))
    scene.compare(scene.end(run))


@row("driver-killed")
def driver_killed(scene: Scene) -> None:
    scene.add_nodes(2)
    config = scene.config()
    run = scene.command(config)
    scene.until(run, scene.step())
    scene.hit(run, "kill -9 of the driver, then --resume")
    run.process.kill()
    run.process.wait()
    scene.compare(scene.end(scene.command(config, "--resume")))


@row("preempted-with-notice")
def preempted(scene: Scene) -> None:
    """All ranks write a checkpoint at the next step; Ray Train restarts the run on another node at the deadline."""
    scene.add_nodes(3)
    run = scene.command(scene.config(train=LONGER, cluster={"max_failures": 0}))
    scene.until(run, EPOCH * scene.random.randint(1, 3))
    node, notice = scene.random.choice(scene.busy_nodes()), 12
    scene.hit(run, f"a node's loss announced {notice} s ahead, then the node lost")
    scene.announce_loss(node, notice)
    scene.wait(lambda: "a checkpoint is written now" in run.said() or not run.alive())
    scene.wait(lambda: newest(run.folder) % EPOCH or not run.alive())  # none is due there
    scene.wait(lambda: time.monotonic() > scene.hits[0].at + notice)
    scene.lose_node(node)
    scene.compare(scene.end(run), train=LONGER)
    if "the run goes on from its last checkpoint" not in run.said():
        raise VainError("the run was over before the node went")


@row("worker-stopped")
def worker_stopped(scene: Scene) -> None:
    scene.add_nodes(2)
    run = scene.command(scene.config(cluster={"stall_seconds": 8}))
    scene.until(run, scene.step())
    scene.hit(run, "SIGSTOP of rank 1, which is named, then ended")
    for worker in scene.others(run):
        worker.suspend()
    scene.compare(scene.end(run))
    if not re.search(r"rank 1 stands at step \d+ of training and was last heard of .*; the others wait", run.said()):
        raise VainError("nobody named rank 1")


@row("elastic-1-2")
def elastic(scene: Scene) -> None:
    scene.add_nodes(2)
    launcher.RESIZED_EVERY = 3.0
    train = LONGER | {"epochs": 80, "patience": 80}  # alone a worker is quick, and a node takes its time
    run = scene.start(scene.config(train=train, cluster={"workers": (1, 2)}))
    scene.until(run, EPOCH * scene.random.randint(1, 3))
    scene.hit(run, "a node of two lost: on with one worker; a node added: two again")
    scene.lose_node(scene.random.choice(scene.busy_nodes()))
    scene.wait(lambda: ran_on(run)[-1:] == [1] or not run.alive())
    scene.add_nodes(1)
    folder = scene.end(run)
    if ran_on(run) != [2, 1, 2]:
        raise VainError(f"ran on {ran_on(run)} workers, one after another")
    scene.compare(folder, exactly=False, train=train)


def ran_on(run: Run) -> list[int]:
    """Numbers of workers, in their order."""
    return [workers for workers, _ in itertools.groupby(record["workers"] for record in run.folder.history())]


@row("disk-full")
def disk_full(scene: Scene) -> None:
    scene.add_nodes(2)
    with small_disk(scene.place / "disk", "64m") as mounted:
        config = scene.config("disk/run")
        run = scene.start(config)
        scene.until(run, scene.step())
        scene.hit(run, "no room for the next checkpoint, then --resume")
        filler = scene.place / "disk" / "filler"
        if mounted:
            fill(filler)
        else:
            resource.prlimit(scene.rank_0(run).pid, resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
        scene.end(run, fails="cannot be written: ")
        filler.unlink(missing_ok=True)
        scene.compare(scene.end(scene.start(config, resume=True)))


def fill(file: Path) -> None:
    """Takes what room there is on its disk."""
    with open(file, "wb", buffering=0) as out:
        for size in (2**20, 2**12):
            try:
                while out.write(bytes(size)):
                    pass
            except OSError:
                continue


@row("checkpoint-truncated", damage=lambda file: os.truncate(file, file.stat().st_size // 2))
@row("checkpoint-flipped", damage=flip)
def checkpoint_damaged(scene: Scene, damage: Callable[[Path], None]) -> None:
    scene.add_nodes(2)
    config = scene.config(cluster={"max_failures": 0})
    run = scene.start(config)
    scene.cut(run, scene.step())
    step = newest(run.folder)
    scene.hit(run, f"the newest checkpoint, {step}, damaged")
    damage(run.folder.checkpoints / f"train-{step:08d}" / "state.safetensors")
    scene.compare(scene.end(scene.start(config, resume=True)))


@row("2-1-2-workers-zero-1", stage=1, sizes=(2, 1, 2))
@row("2-1-2-workers-zero-2", stage=2, sizes=(2, 1, 2))
@row("2-1-2-workers-zero-3", stage=3, sizes=(2, 1, 2))
@row("2-4-workers-zero-1", stage=1, sizes=(2, 4))
@row("2-4-workers-zero-2", stage=2, sizes=(2, 4))
@row("2-4-workers-zero-3", stage=3, sizes=(2, 4))
def resized(scene: Scene, stage: int, sizes: tuple[int, ...]) -> None:
    scene.add_nodes(2, cpus=max(sizes) // 2)
    engine = {"zero_stage": stage}
    steps = sorted(scene.random.sample(range(4, 34), len(sizes) - 1))
    for number, workers in enumerate(sizes):
        config = scene.config(engine=engine, cluster={"workers": workers, "max_failures": 0})
        run = scene.start(config, resume=number > 0)
        if number < len(steps):
            scene.cut(run, max(steps[number], newest(run.folder) + 3))
    folder = scene.end(run)
    if folder.metrics()["workers"] != sizes[-1]:
        raise VainError(f"ended on {folder.metrics()['workers']} workers")
    scene.compare(folder, exactly=False, engine=engine)


@row("node-lost-in-a-sweep")
def sweep_node_lost(scene: Scene) -> None:
    """Two trials at once, one worker each."""
    scene.add_nodes(3)
    job = scene.config("job", cluster={"workers": 1})
    (scene.place / "job.yaml").write_text(job.model_dump_json())
    rates = [0.003, 0.006]
    space = {
        "job": str(scene.place / "job.yaml"),
        "out": str(scene.place / "sweep"),
        "space": {"train.lr": {"choice": rates}},
        "metric": "ndcg@3",
        "searcher": {"name": "grid"},
        "scheduler": {"name": "none"},
        "concurrency": 2,
    }
    (scene.place / "space.yaml").write_text(yaml.safe_dump(space))
    sweep = scene.raygrec(scene.place / "sweep", "tune", scene.place / "space.yaml", "--json")
    folder = SweepFolder(scene.place / "sweep")
    sweep.folder = RunFolder(folder.trial({"train.lr": scene.random.choice(rates)}).run(0))
    scene.until(sweep, scene.step(last=20))
    scene.hit(sweep, "a node with a trial's worker lost, one of three")
    scene.lose_node(scene.random.choice(scene.busy_nodes()))
    scene.end(sweep)
    if [outcome.status for outcome, _ in folder.trials()] != ["finished", "finished"]:
        raise VainError(str([outcome for outcome, _ in folder.trials()]))
    for rate in rates:
        scene.compare(RunFolder(folder.trial({"train.lr": rate}).run(0)), workers=1, train={"lr": rate})


@row("two-runs-one-folder")
def two_runs(scene: Scene) -> None:
    scene.add_nodes(2)
    config = scene.config()
    run = scene.command(config)
    scene.until(run, scene.step(last=8))
    scene.hit(run, "a second run in its folder, new and with --resume, refused")
    for second in [scene.command(config), scene.command(config, "--resume")]:
        scene.wait(lambda second=second: not second.alive())
        if second.process.returncode != 2 or "is at work there" not in second.why():
            raise VainError(f"the second run: {second.why() or 'was let in'}")
    scene.compare(scene.end(run))
