"""Row 1: LightGCN's epochs and its way to the same validation metric, against PyG's LightGCN and RecBole's.

RecBole is compared where RECBOLE_PYTHON names an interpreter that has it, see prepare.py.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch_geometric.nn.models import LightGCN

from bench.quality import ROOT, WORK
from bench.speed.measure import compared, in_turns, peak_mib, shares, write
from bench.speed.prepare import RECBOLE, process
from bench.speed.ready import beauty
from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.graph.lightgcn import LightGCNConfig, pretrain

ROUNDS = 3
EVERY, EPOCHS = 5, 40
EDGES = (1_000_000, 10_000_000, 50_000_000)
MOST_BYTES = 16e9  # that the largest may take

Curve = list[tuple[float, float]]  # (CPU seconds since training began, validation N@10)


class PyG:
    """PyG's model in the loop of its example: its own propagation, its loss, Adam, one negative an edge."""

    def __init__(self, train: CSR, num_items: int, config: LightGCNConfig) -> None:
        torch.manual_seed(0)
        self.users, self.items = len(train), num_items
        self.edges = torch.stack(
            [torch.from_numpy(train.rows), torch.from_numpy(np.asarray(train.indices, dtype=np.int64)) + self.users]
        )
        self.both_ways = torch.cat([self.edges, self.edges.flip(0)], dim=1)
        self.model = LightGCN(self.users + self.items, config.dim, config.layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.config = config

    def epoch(self) -> None:
        order = torch.randperm(self.edges.shape[1])
        for batch in order.tensor_split(-(-len(order) // self.config.batch_size)):
            self.step(self.edges[:, batch])

    def step(self, edges: torch.Tensor) -> None:
        others = torch.randint(self.users, self.users + self.items, (edges.shape[1],))
        labels = torch.cat([edges, torch.stack([edges[0], others])], dim=1)
        self.optimizer.zero_grad()
        right, wrong = self.model(self.both_ways, labels).chunk(2)
        loss = self.model.recommendation_loss(right, wrong, node_id=labels.unique(), lambda_reg=self.config.l2)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def ndcg(self, train: CSR, valid: CSR) -> float:
        users, items = self.model.get_embedding(self.both_ways).split([self.users, self.items])
        sums = evaluate_scores(
            lambda rows: users[torch.from_numpy(rows)] @ items.T,
            np.arange(self.users),
            valid,
            [train],
            self.items,
            (10,),
            progress=False,
        )
        return sums.result()["ndcg@10"]


def epoch_of(train: CSR, num_items: int, config: LightGCNConfig) -> float:
    """Seconds of the second epoch; the first also pays for what is made once."""
    stamps: list[float] = []
    two = config.model_copy(update={"epochs": 2, "evaluate_every": 1})
    pretrain(train, num_items, two, 0, on_epoch=lambda _: stamps.append(time.process_time()))
    return stamps[1] - stamps[0]


def work_of(edges: int, nodes: int, config: LightGCNConfig, steps: int) -> tuple[float, float]:
    """(operations, bytes) of so many steps: each layer reads every edge both ways once forward and once backward."""
    products = steps * 2 * config.layers * 2 * edges
    flops = products * 2 * config.dim
    moved = steps * nodes * config.dim * 4 * 2 * (2 * config.layers + 3) + products * 8
    return flops, moved


def main() -> None:
    store = Store.open(beauty())
    train, items, config = store.interactions("train"), store.num_items, LightGCNConfig()
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: [on_beauty(train, items, config)],
        lambda: [synthetic(EDGES[0])],
        lambda: to_quality(store, config),
        lambda: [synthetic(EDGES[1])],
        lambda: [synthetic(EDGES[2])],
    ]
    where = {"two epochs on Amazon Beauty": shares(lambda: epoch_of(train, items, config))}
    cases: list[dict[str, Any]] = []
    for part in parts:
        cases += part()
        told(cases, where, config)  # a row that is cut off has what it had


def told(cases: list[dict[str, Any]], where: dict[str, dict[str, float]], config: LightGCNConfig) -> None:
    quality = [case["ratio"]["median"] for case in cases if "best" in case]
    memory = {case["edges"]: case["peak_mib"]["raygrec"][""] * 2**20 for case in cases if "edges" in case}
    an_edge = [found / edges for edges, found in memory.items()]
    linear = len(memory) == len(EDGES) and max(an_edge) < 1.2 * an_edge[0] and max(memory.values()) < MOST_BYTES
    write(
        "lightgcn",
        {
            "row": 1,
            "title": f"LightGCN, d = {config.dim}, {config.layers} layers, batches of {config.batch_size:,} edges",
            "against": "PyG's LightGCN in its example's loop, and RecBole's by its own trainer "
            "(`bench/speed/recbole_lightgcn.py`)",
            "target": "≥ 5× to equal quality; memory linear in edges, 50 M under 16 GB",
            "reached": len(quality) > 1 and min(quality) >= 5 and linear,
            "cases": cases,
            "where": where,
        },
        "torch-geometric",
    )


def on_beauty(train: CSR, items: int, config: LightGCNConfig) -> dict[str, Any]:
    theirs = PyG(train, items, config)
    sides = {"raygrec": lambda _: epoch_of(train, items, config), "PyG": lambda _: theirs.epoch()}
    seconds = in_turns(sides, ROUNDS, warm=0)
    steps = -(-len(train.indices) // config.batch_size)
    flops, moved = work_of(len(train.indices), len(train) + items, config, steps)
    memory = {side: {"": peak_mib(beauty_epoch, side)} for side in sides}
    return compared("an epoch on Amazon Beauty", seconds, *sides, flops, moved, peak_mib=memory)


def to_quality(store: Store, config: LightGCNConfig) -> list[dict[str, Any]]:
    """Seconds until each reached the lower of both best N@10; against PyG some epochs of the one, then as many of the
    other."""
    train, valid = store.interactions("train"), store.interactions("valid")
    theirs = PyG(train, store.num_items, config)
    clocks, curves = {"raygrec": 0.0, "PyG": 0.0}, {"raygrec": [], "PyG": []}
    begun = time.process_time()

    def take_turns(record: dict[str, float]) -> None:
        nonlocal begun
        clocks["raygrec"] += time.process_time() - begun
        curves["raygrec"].append((clocks["raygrec"], record["ndcg@10"]))
        begun = time.process_time()
        for _ in range(EVERY):
            theirs.epoch()
        found = theirs.ndcg(train, valid)
        clocks["PyG"] += time.process_time() - begun
        curves["PyG"].append((clocks["PyG"], found))
        print(record["epoch"], curves["raygrec"][-1], curves["PyG"][-1], flush=True)
        begun = time.process_time()

    longer = config.model_copy(update={"epochs": EPOCHS, "evaluate_every": EVERY, "patience": EPOCHS})
    pretrain(train, store.num_items, longer, 0, valid, take_turns)
    if RECBOLE in os.environ:
        curves["RecBole"] = by_recbole(store, longer)
    else:
        print(f"RecBole is left out, {RECBOLE} names no interpreter that has it")
    return [to_equal_quality(side, curves["raygrec"], curve) for side, curve in curves.items() if side != "raygrec"]


def to_equal_quality(side: str, ours: Curve, theirs: Curve) -> dict[str, Any]:
    best = {"raygrec": max(ndcg for _, ndcg in ours), side: max(ndcg for _, ndcg in theirs)}
    goal = min(best.values())
    curves = {"raygrec": ours, side: theirs}
    needed = {name: [next(at for at, ndcg in curve if ndcg >= goal)] for name, curve in curves.items()}
    return compared(
        f"to validation N@10 {goal:.4f} on Amazon Beauty, {side}",
        needed,
        "raygrec",
        side,
        best=best,
        curves=curves,
        note=f"N@10 every {EVERY} of {EPOCHS} epochs, evaluation included; one way each",
    )


def by_recbole(store: Store, config: LightGCNConfig) -> Curve:
    """Its way by its own trainer, loader and evaluator, on the store's interactions with the same settings."""
    folder = WORK / "recbole-beauty"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [store.interactions(split) for split in ("train", "valid", "test")]
    users = np.concatenate([part.rows for part in parts])
    items = np.concatenate([np.asarray(part.indices) for part in parts])
    columns = {"user_id:token": users, "item_id:token": items, "timestamp:float": np.arange(len(users))}
    pd.DataFrame(columns).to_csv(folder / f"{folder.name}.inter", sep="\t", index=False)
    settings = config.model_dump(include={"dim", "layers", "lr", "l2", "batch_size", "epochs", "evaluate_every"})
    script = ROOT / "bench/speed/recbole_lightgcn.py"
    curve, _, _ = process([os.environ[RECBOLE], "-W", "ignore", str(script), str(folder), json.dumps(settings)])
    return [(at, ndcg) for at, ndcg in curve]


def power_law(edges: int) -> tuple[CSR, int]:
    """A tenth as many users as edges, a fortieth as many items; few of both have most of the edges."""
    drawn = np.random.default_rng(0)
    users, items = edges // 10, edges // 40
    rows = (users * drawn.random(edges) ** 1.5).astype(np.int64)
    columns = (items * drawn.random(edges) ** 2.5).astype(np.int64)
    pairs = np.unique(rows * items + columns)
    return CSR.from_pairs(pairs // items, pairs % items, users), items


def large(edges: int) -> LightGCNConfig:
    """Few propagations an epoch: four, whatever the size."""
    return LightGCNConfig(dim=64, layers=3, batch_size=-(-edges // 4))


def synthetic(edges: int) -> dict[str, Any]:
    """An epoch and its memory on made-up edges; PyG only where its messages fit beside other work."""
    train, items = power_law(edges)
    config = large(len(train.indices))
    ours = lambda _: epoch_of(train, items, config)  # noqa: E731
    sides: dict[str, Callable[[int], object]] = {"raygrec": ours}
    if edges <= EDGES[0]:
        theirs = PyG(train, items, config)
        sides["PyG"] = lambda _: theirs.epoch()
    seconds = in_turns(sides, 2 if len(sides) > 1 else 1, warm=0)
    flops, moved = work_of(len(train.indices), len(train) + items, config, 4)
    memory = {side: {"": peak_mib(synthetic_epoch, side, edges)} for side in sides}
    return compared(
        f"an epoch of {edges:,} drawn edges",
        seconds,
        "raygrec",
        list(sides)[-1],
        flops,
        moved,
        peak_mib=memory,
        edges=len(train.indices),
        note=f"{len(train.indices):,} distinct; d = {config.dim}, {config.layers} layers, four updates an epoch",
    )


def beauty_epoch(side: str) -> Callable[[], object]:
    store = Store.open(beauty())
    return _epoch(side, store.interactions("train"), store.num_items, LightGCNConfig())


def synthetic_epoch(side: str, edges: int) -> Callable[[], object]:
    train, items = power_law(edges)
    return _epoch(side, train, items, large(len(train.indices)))


def _epoch(side: str, train: CSR, items: int, config: LightGCNConfig) -> Callable[[], object]:
    """All that a side needs besides the interactions counts."""
    if side == "PyG":
        return lambda: PyG(train, items, config).epoch()
    return lambda: pretrain(train, items, config.model_copy(update={"epochs": 1}), 0)
