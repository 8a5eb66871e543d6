"""Row 10, in part: updates on 1, 2 and 4 workers under ZeRO 0 to 3: CPU time, wall clock, and the bytes that are sent.

Workers are processes of one thread, 1, 2 and 4 in a gloo group each; all stand ready, and the groups take turns.
"""

import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.speed.measure import compared, in_turns, spread, write
from bench.speed.ready import FEW, beauty, job_config, prompts_of, stage_of
from bench.speed.report import _scaled
from raygrec.data.store import Store
from raygrec.draws import Draws
from raygrec.train.assembly import build_model
from raygrec.train.engine import Engine, make_engine
from raygrec.train.folder import RunFolder
from raygrec.train.loop import _step, epoch_order

WORKERS, STAGES = (1, 2, 4), (0, 1, 2, 3)
ROUNDS, UPDATES, WARM = 7, 2, 2  # updates of a round; messages are counted in the last round that is not timed
# Collectives: which argument is the whole message, and how often a ring passes it on, less each worker's own share.
RING = dict.fromkeys(("_allgather_base_", "allgather_", "reduce_", "broadcast_"), (0, 1))
RING |= {"allreduce_": (0, 2), "_reduce_scatter_base_": (1, 1), "reduce_scatter_": (1, 1)}
WITHOUT_COPY = "model.contrast.momentum=null"  # a pass that under ZeRO 3 alone sends weights
STATE, CONTRAST, COUNTS = KINDS = ("weights and gradients", "contrast", "counts")
ASKED_BY = {"raygrec.model.contrast": CONTRAST, "raygrec.ranks": COUNTS}
Told = dict[str, Any]  # what a worker says of a round


class Side(NamedTuple):
    """Workers with an engine of a ZeRO stage, or of none; they make an update of each of so many shares of a batch."""

    workers: int
    zero: int | None
    shares: int = 1

    @property
    def name(self) -> str:
        if self.zero is None:
            return "1 process" if self.shares == 1 else f"1 process, {self.shares} shares one after the other"
        return f"{self.workers} worker{'s' * (self.workers > 1)}, ZeRO {self.zero}"


ALONE = Side(1, None)
# What several workers would take that had nothing to say to each other, and those that do.
SIDES = [*(Side(1, None, n) for n in WORKERS[1:]), *(Side(n, zero) for n in WORKERS for zero in STAGES)]


class Sent(TorchDispatchMode):
    """Counts the collectives that are called inside: `messages`, and `bytes` that a worker of a ring sends."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("c10d::")
        if function.namespace == "c10d" and name != "barrier":
            place, times = RING[name]
            kind, workers = _kind(), dist.get_world_size()
            self.messages[kind] += 1
            self.bytes[kind] += times * sum(part.nbytes for part in tree_leaves(args[place])) * (workers - 1) / workers
        return function(*args, **(kwargs or {}))


def _kind() -> str:
    """By the module that asks for the message."""
    frame = sys._getframe(2)
    while frame and frame.f_globals["__name__"] not in ASKED_BY:
        frame = frame.f_back
    return ASKED_BY[frame.f_globals["__name__"]] if frame else STATE


def _work(rank: int, workers: int, folder: str, orders: Connection) -> None:
    """One worker: engines that are made when they are first asked for, and rounds of updates with them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{workers}", rank=rank, world_size=workers)
    config = job_config("galrec.yaml", beauty(), "galrec", FEW, WITHOUT_COPY)
    prompts, engines = prompts_of(config), {}
    stage = stage_of(config, prompts)
    for zero, shares, number in iter(orders.recv, None):
        if zero not in engines:
            engine = config.engine.model_copy(update={"zero_stage": zero or 0})
            made = (config.model_copy(update={"engine": engine}), Store.open(config.store), prompts)
            model = build_model(*made, RunFolder(config.out), zero is not None)
            engines[zero] = make_engine(model, engine, 1, zero is not None)
        order = epoch_order(stage.lengths, config.train.batch, Draws(number + WARM))[:UPDATES]
        steps = [
            partial(_step, stage, engines[zero], share, Draws(0, number + WARM, place), 1e-4, False)
            for place, things in enumerate(order)
            for share in np.array_split(things, shares)
        ]
        orders.send(_round(engines[zero], steps, counts=number == -1))
    os._exit(0)  # at the interpreter's own end, a thread of the group may abort the process


def _round(engine: Engine, steps: list[partial[Any]], counts: bool) -> Told:
    """This worker's CPU seconds; seconds and bytes on the loopback device of all; messages; bytes of parameters."""
    sent = Sent()
    dist.barrier()
    carried, cpu, wall = _loopback(), time.process_time(), time.perf_counter()
    with sent if counts else nullcontext():
        for step in steps:
            step()
    dist.barrier()
    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "carried": _loopback() - carried}
    sizes = [(4 * getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    return {**taken, "messages": sent.messages, "bytes": sent.bytes, "total": total, "trained": trained}


def _loopback() -> int:
    """Bytes sent on it so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def main() -> None:
    prompts_of(job_config("galrec.yaml", beauty(), "galrec", FEW, WITHOUT_COPY))  # before several workers look for them
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    found: dict[Side, list[list[Told]]] = {}

    def take(side: Side, number: int) -> float:
        """CPU seconds of all workers for a batch."""
        for pipe in pipes[side.workers]:
            pipe.send((side.zero, side.shares, number))
        told = [pipe.recv() for pipe in pipes[side.workers]]
        found.setdefault(side, []).append(told)
        return sum(one["cpu"] for one in told) / UPDATES

    with tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            ends = [spawn.Pipe() for _ in range(workers)]
            for rank, (_, its) in enumerate(ends):
                spawn.Process(target=_work, args=(rank, workers, folder, its), daemon=True).start()
            pipes[workers] = [mine for mine, _ in ends]
        seconds = in_turns({side.name: partial(take, side) for side in (ALONE, *SIDES)}, ROUNDS, WARM)
        for pipe in itertools.chain(*pipes.values()):
            pipe.send(None)
    write(
        "scaling",
        {
            "row": 10,
            "title": "Updates of GAL-Rec on several workers (jobs/galrec.yaml without momentum encoder, Amazon Beauty, "
            "128 users an update)",
            "against": "one process without DeepSpeed; ratio: its CPU time over that of all workers together, ×1 where "
            "it costs nothing to distribute. Shares one after the other: what every worker does again, such as the "
            "head's rows of all items and Adam, with nothing sent",
            "target": "stated",
            "reached": True,
            "cases": [_case(side, seconds, found) for side in SIDES],
        },
        "deepspeed",
    )


def _case(side: Side, seconds: dict[str, list[float]], found: dict[Side, list[list[Told]]]) -> dict[str, Any]:
    """Besides CPU time: how much sooner an update ends, and what a worker sends for it: counted, by theory, by gloo."""
    workers, counted, timed = side.workers, found[side][WARM - 1], found[side][WARM:]
    alone, wall = (np.array([told[0]["wall"] for told in found[one][WARM:]]) for one in (ALONE, side))
    case = compared(side.name, seconds, side.name, ALONE.name) | {"faster": spread(alone / wall)}
    if workers == 1:
        return case
    total, trained = counted[0]["total"], counted[0]["trained"]
    sent = {kind: sum(told["bytes"][kind] for told in counted) / workers / UPDATES for kind in KINDS}
    messages = {kind: counted[0]["messages"][kind] / UPDATES for kind in KINDS}
    theory = (1 - 1 / workers) * (2 * total + trained if side.zero == 3 else 2 * trained)
    carried = float(np.median([told[0]["carried"] for told in timed])) / workers / UPDATES
    told = [f"{_scaled(sent[kind])}B of {kind} in {messages[kind]:.0f} messages" for kind in KINDS]
    note = (
        f"a worker sends {', '.join(told)}; by theory {_scaled(theory)}B of {STATE}; gloo {_scaled(carried)}B in all; "
    )
    note += f"by the clock an update is done ×{case['faster']['median']:.2f} as fast"
    return case | {"sent": sent, "messages": messages, "theory": theory, "carried": carried, "note": note}
