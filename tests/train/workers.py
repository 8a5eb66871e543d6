"""Runs the pipeline on n real worker processes of one gloo group, for tests of distribution."""

import json
import os
import subprocess
import sys
from pathlib import Path

from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.settings import RunConfig, run_config

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from pathlib import Path
from raygrec.train.folder import RunFolder
from raygrec.train import loop, pipeline
from raygrec.train.writer import CheckpointWriter
dist.init_process_group("gloo")
stop, gently = json.loads(sys.argv[2]), len(json.loads(sys.argv[1])) > 1
class Cut(Exception): pass
if stop:
    # Cut off for real: the process ends in the middle of a stage, right after an update.
    step = loop._step
    seen = [0]
    def counted(*arguments):
        seen[0] += 1
        if seen[0] > stop:
            seen[0] = 0
            if not gently:
                # Which checkpoint is the last is then no matter of chance.
                for writer in writers:
                    writer.wait()
                os._exit(9)
            raise Cut
        return step(*arguments)
    loop._step = counted
    writers, enter = [], CheckpointWriter.__enter__
    def entered(self):
        writers[:] = [self]
        return enter(self)
    CheckpointWriter.__enter__ = entered
class Silent:
    def progress(self, *a, **k): pass
    def report(self, *a, **k): pass
    def at(self, *a): pass
    def wants_checkpoint(self): return False
    def warn(self, line): print(line)
for out in json.loads(sys.argv[1]):
    folder = RunFolder(Path(out))
    try:
        pipeline.run(folder.config(), folder, Silent(), distributed=True)
    except Cut:
        pass
    dist.barrier()
# Without the interpreter's own end, at which a thread of the process group may still run and abort the process.
os._exit(0)
"""


def run_workers(config: RunConfig, workers: int, stop_after: int = 0, seconds: float = 300) -> RunFolder:
    """Runs or resumes `config` on `workers` processes; with `stop_after`, all are cut off after that many updates."""
    return run_several([config], workers, stop_after, seconds)[0]


def run_several(configs: list[RunConfig], workers: int, stop_after: int = 0, seconds: float = 300) -> list[RunFolder]:
    """As `run_workers`, one run after the other in the same processes; a cut ends the run, not the processes."""
    folders = [RunFolder(config.out) for config in configs]
    for folder, config in zip(folders, configs, strict=True):
        folder.start(config, resume=True)
        prepare_run(config, folder)
    port = str(20000 + os.getpid() % 20000 + workers)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps([str(config.out) for config in configs]), json.dumps(stop_after)],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=seconds)
        if process.returncode != (9 if stop_after and len(configs) == 1 else 0):
            raise AssertionError(f"a worker ended with {process.returncode}:\n{output}")
    return folders


def tiny_config(store: Path, backbone: Path, out: Path, **changes: object) -> RunConfig:
    """A run of a few dozen updates on the tiny store."""
    return _tiny(
        store,
        backbone,
        out,
        changes,
        model={"slots": 3, "max_history": 6, "alignment_items": 4},
        alignment={"epochs": 2, "batch": 4, "micro_batch": 2, "lr": 0.01},
        histories={"epochs": 1, "batch": 12, "micro_batch": 3, "lr": 0.01, "checkpoint_every": 2},
        train={"epochs": 3, "batch": 12, "micro_batch": 3, "lr": 0.01, "checkpoint_every": 2},
    )


def tiny_galrec_config(store: Path, backbone: Path, out: Path, /, **changes: object) -> RunConfig:
    """GAL-Rec, eight updates on the tiny store, each in one pass: in-batch negatives are those of a pass."""
    return _tiny(
        store,
        backbone,
        out,
        changes,
        recipe="galrec",
        model={
            "max_history": 6,
            "neighbours": {"one_hop": 3, "two_hop": 2},
            "contrast": {"queue": 20, "users": 0.6, "items": 0.5},
        },
        train={"epochs": 2, "batch": 12, "micro_batch": 12, "lr": 0.01, "checkpoint_every": 2},
    )


def tiny_sequential_config(store: Path, backbone: Path, out: Path, **changes: object) -> RunConfig:
    """A sequential baseline, sixteen updates on the tiny store."""
    return _tiny(
        store,
        backbone,
        out,
        changes,
        recipe="sequential",
        model={"width": 16, "max_history": 6, "text_vectors": True, "filter": "frequency"},
        train={"epochs": 4, "batch": 12, "micro_batch": 3, "lr": 0.01, "checkpoint_every": 2},
    )


def tiny_graph_config(store: Path, backbone: Path, out: Path, **changes: object) -> RunConfig:
    """RLMRec-Con on the tiny store."""
    return _tiny(store, backbone, out, {"graph": {"text_weight": 0.1}, **changes}, recipe="graph")


def _tiny(store: Path, backbone: Path, out: Path, changes: dict[str, object], **recipe: object) -> RunConfig:
    content = {
        "store": store,
        "out": out,
        "graph": {"epochs": 4, "evaluate_every": 2, "dim": 8, "folds": 2, "batch_size": 64},
        "backbone": {"name": str(backbone)},
        "evaluate": {"ks": (2, 3), "batch": 7},
        **recipe,
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    return run_config(content, "test")
