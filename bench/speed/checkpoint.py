"""Row 10, in part: checkpoints against the same bytes on the bare disk, and how long the loop waits for one."""

import os
import shutil
import time
from pathlib import Path

import torch

from bench.quality import WORK
from bench.speed.measure import WALL, compared, in_turns, write
from raygrec.tensors import size
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.writer import CheckpointWriter

FOLDER = WORK / "checkpoint"
PARAMETERS = 22_713_216  # of MiniLM; with both moments of Adam in fp32
ROUNDS = 7


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    folder, raw = RunFolder(FOLDER / "run"), FOLDER / "raw"
    folder.checkpoints.mkdir(parents=True)
    rows = PARAMETERS // 384 // 32
    tensors = {
        f"{kind}/{number}": torch.randn(rows, 384)
        for kind in ("param", "exp_avg", "exp_avg_sq")
        for number in range(32)
    }
    content = b"".join(memoryview(tensor.numpy()).cast("B") for tensor in tensors.values())
    behind = RunFolder(FOLDER / "behind")
    behind.checkpoints.mkdir(parents=True)
    sides = {
        "write": lambda number: folder.save_checkpoint(LoopState("train", number + 2), tensors),
        "raw write": lambda _: write_raw(raw, content),
        "resume": lambda _: resumed(folder),
        "raw read": lambda _: read_raw(raw),
        "at once": lambda number: folder.save_checkpoint(LoopState("train", number + 2), copied(tensors)),
    }
    with CheckpointWriter(behind) as writer:
        sides["in the background"] = lambda number: stall(writer, LoopState("train", number + 2), tensors)
        seconds = in_turns(sides, ROUNDS, clock=time.perf_counter)
    bytes_ = size(tensors)
    cases = [
        compared(
            f"{title} of {bytes_ / 2**20:.0f} MiB",
            seconds,
            ours,
            raw_side,
            moved=bytes_,
            megabytes_per_second=bytes_ / 1e6 / sorted(seconds[ours])[ROUNDS // 2],
        )
        for title, ours, raw_side in (("write", "write", "raw write"), ("resume", "resume", "raw read"))
    ]
    cases.append(compared("the loop stands still", seconds, "in the background", "at once", moved=2 * bytes_))
    shutil.rmtree(FOLDER)
    write(
        "checkpoint",
        {
            "row": 10,
            "clock": WALL,
            "title": "A checkpoint of MiniLM with Adam's moments: safetensors, checksums, manifest, fsync",
            "against": "the same bytes written in one go with fsync, and read with an empty page cache",
            "target": "stated",
            "reached": True,
            "cases": cases,
        },
        "safetensors",
    )


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As an engine does, before anything is written."""
    return {name: value.clone() for name, value in tensors.items()}


def stall(writer: CheckpointWriter, state: LoopState, tensors: dict[str, torch.Tensor]) -> float:
    """Seconds until the loop may go on; returns once all is written."""
    started = time.perf_counter()
    writer.save(state, copied(tensors))
    taken = time.perf_counter() - started
    writer.wait()
    return taken


def resumed(folder: RunFolder) -> None:
    for file in folder.checkpoints.rglob("*.safetensors"):
        forget(file)
    state, tensors = folder.last_checkpoint("train")
    if state.step < 1 or len(tensors) != 96:
        raise SystemExit("the checkpoint is not what was written")


def write_raw(file: Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def read_raw(file: Path) -> None:
    forget(file)
    file.read_bytes()


def forget(file: Path) -> None:
    """Its pages leave the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
