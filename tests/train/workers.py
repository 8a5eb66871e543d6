"""Runs the pipeline on n real worker processes of one gloo group, for tests of distribution."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from raygrec.train import loop, pipeline
from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from raygrec.train.settings import RunConfig, run_config
from raygrec.train.writer import CheckpointWriter
from tests.ranks import run_ranks

CUT = 9  # exit code of a process that was cut off


class Cut(Exception):
    """In a process that has other runs to do."""


class Silent:
    def progress(self, *arguments, **more) -> None: ...

    def report(self, record) -> None: ...

    def at(self, task, step) -> None: ...

    def wants_checkpoint(self) -> bool:
        return False

    def warn(self, line) -> None:
        print(line)


def run_workers(config: RunConfig, workers: int, stop_after: int = 0, seconds: float = 300) -> RunFolder:
    """Runs or resumes `config` on `workers` processes; with `stop_after`, all are cut off after that many updates."""
    return run_several([config], workers, stop_after, seconds)[0]


def run_several(configs: list[RunConfig], workers: int, stop_after: int = 0, seconds: float = 300) -> list[RunFolder]:
    """As `run_workers`, one run after the other in the same processes; a cut ends the run, not the processes."""
    folders = [RunFolder(config.out) for config in configs]
    for folder, config in zip(folders, configs, strict=True):
        folder.start(config, resume=True)
        prepare_run(config, folder)
    outs = [folder.path for folder in folders]
    cut_off = bool(stop_after) and len(configs) == 1
    run_ranks(_work, workers, outs, stop_after, ends=CUT if cut_off else 0, seconds=seconds)
    return folders


def _work(rank: int, outs: list[Path], stop_after: int) -> None:
    if stop_after:
        _cut_off(stop_after, ends=len(outs) == 1)
    for out in outs:
        folder = RunFolder(out)
        with suppress(Cut):
            pipeline.run(folder.config(), folder, Silent(), distributed=True)


def _cut_off(after: int, ends: bool) -> None:
    """Right after an update, in the middle of a stage; `ends`: the process with it."""
    step, seen = loop._step, 0
    writers, enter = [], CheckpointWriter.__enter__

    def entered(writer):
        writers.append(writer)
        return enter(writer)

    def counted(*arguments):
        nonlocal seen
        seen += 1
        if seen > after:
            seen = 0
            if ends:
                writers[-1].wait()  # which checkpoint is the newest is then no matter of chance
                os._exit(CUT)
            raise Cut
        return step(*arguments)

    loop._step, CheckpointWriter.__enter__ = counted, entered


def cut_here(config: RunConfig, updates: int) -> None:
    """Trains so many updates in this process, without Ray, and is cut off."""
    step, seen = loop._step, []

    def counted(*arguments: object) -> object:
        seen.append(1)
        if len(seen) > updates:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", counted)
        train_here(config)


def tiny_config(store: Path, backbone: Path, out: Path, /, **changes: object) -> RunConfig:
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
            "contrast": {"queue": 20, "users": 0.6, "items": 0.5, "projection": 5},
            "layer_dropout": 0.2,
        },
        train={"epochs": 2, "batch": 12, "micro_batch": 12, "lr": 0.01, "checkpoint_every": 2},
    )


def tiny_sequential_config(store: Path, backbone: Path, out: Path, /, **changes: object) -> RunConfig:
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


def tiny_graph_config(store: Path, backbone: Path, out: Path, /, **changes: object) -> RunConfig:
    """RLMRec-Con on the tiny store."""
    return _tiny(store, backbone, out, {"graph": {"text_weight": 0.1}, **changes}, recipe="graph")


def _tiny(store: Path, backbone: Path, out: Path, changes: dict[str, object], **recipe: object) -> RunConfig:
    content = {
        "store": store,
        "out": out,
        "graph": {"epochs": 4, "evaluate_every": 2, "dim": 8, "folds": 2, "batch_size": 64},
        "backbone": {"name": str(backbone)},
        "evaluate": {"ks": (2, 3), "batch": 13},
        **recipe,
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    return run_config(content, "test")
