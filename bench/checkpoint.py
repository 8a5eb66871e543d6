"""How long the loop stands still for a checkpoint of 100 MB: written at once, and in the background.

python -m bench.checkpoint [FOLDER]      on the file system of FOLDER, in turns; medians and their ratio
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.writer import CheckpointWriter

TIMES = 8
KINDS = ("param", "exp_avg", "exp_avg_sq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.gettempdir()))
    torch.set_num_threads(1)
    weights = {f"{kind}/{number}": torch.randn(1024, 1024) for kind in KINDS for number in range(8)}
    at_once, behind, written = [], [], []
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as place:
        first, second = RunFolder(Path(place) / "at-once"), RunFolder(Path(place) / "behind")
        with CheckpointWriter(second) as writer:
            for step in range(TIMES):
                state = LoopState("train", step)
                at_once.append(seconds(lambda state=state: first.save_checkpoint(state, copied(weights))))
                behind.append(seconds(lambda state=state: writer.save(state, copied(weights))))
                written.append(behind[-1] + seconds(writer.wait))
    stall, left = statistics.median(at_once), statistics.median(behind)
    print(f"{sum(value.nbytes for value in weights.values()) / 2**20:.0f} MiB, {TIMES} times in turns")
    print(f"at once: {stall:.3f} s; in the background: {left:.3f} s, complete after {statistics.median(written):.3f} s")
    print(f"the loop stands still ×{left / stall:.3f} as long")


def copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As an engine does, before anything is written."""
    return {name: value.clone() for name, value in weights.items()}


def seconds(act: Callable[[], None]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
