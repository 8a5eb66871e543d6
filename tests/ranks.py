"""Worker processes that start at once: forks of a server that has imported what they need."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

IMPORTED = ["torch", "deepspeed", "transformers.models.bert.modeling_bert", "raygrec.train.pipeline", __name__]
multiprocessing.set_forkserver_preload(IMPORTED)
FORKS = multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[..., None], workers: int, *arguments: object, ends: int = 0, seconds: float = 300):
    """`function(rank, *arguments)` in so many processes of one gloo group, which all have to end with `ends`."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKS.Process(target=_rank, args=(function, rank, workers, folder, arguments)) for rank in range(workers)
        ]
        for process in processes:
            process.start()
        try:
            for rank, process in enumerate(processes):
                process.join(seconds)
                if process.exitcode != ends:
                    # What another rank says first is often what this one ended of.
                    said = "\n".join(
                        f"rank {one}:\n{(Path(folder) / f'{one}.log').read_text()}" for one in range(workers)
                    )
                    raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{said}")
        finally:
            for process in processes:
                process.kill()


def _rank(function: Callable[..., None], rank: int, workers: int, folder: str, arguments: tuple[object, ...]) -> None:
    import torch
    import torch.distributed as dist

    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    code = 0
    try:
        function(rank, *arguments)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at the interpreter's own end, a thread of the group may abort the process
