"""EASE (Steck 2019, arXiv 1905.03375): the best linear map from histories to items, in closed form."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.evaluate.baselines import popularity
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.train.assembly import histories

REGULARISATION = (25, 50, 100, 200, 400, 800, 1600, 3200)


def ease_metrics(path: Path, seed: int) -> dict[str, Any]:
    """Validation and test metrics of the regularisation that validates best; `seed` orders ties.

    Users without a history, whom no map can tell from each other, get what is popular.
    """
    store = Store.open(path)
    train = _dense(store.interactions("train"), store.num_items)
    gram = train.T @ train
    found = {strength: weights(gram, strength) for strength in REGULARISATION}
    valid = {strength: _ranked(store, "valid", maps, seed) for strength, maps in found.items()}
    best = max(valid, key=lambda strength: valid[strength]["ndcg@10"])
    return {"valid": valid[best], "test": _ranked(store, "test", found[best], seed), "regularisation": best}


def weights(gram: torch.Tensor, strength: float) -> torch.Tensor:
    """B [I, I] of the smallest ‖X − XB‖² + λ‖B‖² with a zero diagonal; gram: XᵀX."""
    inverse = torch.linalg.inv(gram.double() + strength * torch.eye(len(gram), dtype=torch.float64))
    maps = -inverse / inverse.diagonal()
    maps.fill_diagonal_(0.0)
    return maps.float()


def _ranked(store: Store, split: str, maps: torch.Tensor, seed: int) -> dict[str, float]:
    read = histories(store, split)
    users = np.flatnonzero(read.targets.lengths)
    counts_I = popularity(store.interactions("train"), store.num_items)

    def score(rows: np.ndarray) -> torch.Tensor:
        scores = _dense(read.shown.take(rows), store.num_items) @ maps
        scores[read.shown.lengths[rows] == 0] = counts_I
        return scores

    sums = evaluate_scores(score, users, read.targets, [read.shown], store.num_items, seed=seed, progress=False)
    return sums.result()


def _dense(rows: CSR, items: int) -> torch.Tensor:
    table = torch.zeros(len(rows), items)
    table[torch.from_numpy(rows.rows), torch.from_numpy(np.asarray(rows.indices, dtype=np.int64))] = 1.0
    return table
