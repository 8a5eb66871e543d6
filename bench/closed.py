"""Recommenders without training: EASE (Steck 2019, arXiv 1905.03375), two-hop paths, and successors, by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.evaluate.baselines import popularity
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.model.prompts import newest
from raygrec.model.successors import SuccessorConfig, Successors
from raygrec.train.assembly import Histories, histories

REGULARISATION = (25, 50, 100, 200, 400, 800, 1600, 3200)

# (users, what they have taken) -> scores [B, I]
Score = Callable[[np.ndarray, CSR], torch.Tensor]


def ease_metrics(path: Path, seed: int) -> dict[str, Any]:
    """Validation and test metrics of the regularisation that validates best; `seed` orders ties.

    Users without a history, whom no map can tell from each other, get what is popular.
    """
    store = Store.open(path)
    train = _dense(store.interactions("train"), store.num_items)
    counts_I = popularity(store.interactions("train"), store.num_items)
    gram = train.T @ train
    found = {strength: weights(gram, strength) for strength in REGULARISATION}

    def by(maps: torch.Tensor) -> Score:
        def score(_: np.ndarray, shown: CSR) -> torch.Tensor:
            scores = _dense(shown, store.num_items) @ maps
            scores[shown.lengths == 0] = counts_I
            return scores

        return score

    valid = {strength: _ranked(store, "valid", by(maps), seed) for strength, maps in found.items()}
    best = max(valid, key=lambda strength: valid[strength]["ndcg@10"])
    return {"valid": valid[best], "test": _ranked(store, "test", by(found[best]), seed), "regularisation": best}


def weights(gram: torch.Tensor, strength: float) -> torch.Tensor:
    """B [I, I] of the smallest ‖X − XB‖² + λ‖B‖² with a zero diagonal; gram: XᵀX."""
    inverse = torch.linalg.inv(gram.double() + strength * torch.eye(len(gram), dtype=torch.float64))
    maps = -inverse / inverse.diagonal()
    maps.fill_diagonal_(0.0)
    return maps.float()


def successor_metrics(path: Path, seed: int) -> dict[str, Any]:
    """Validation and test metrics of `Successors` as they are by default; what has none is ranked by popularity."""
    store = Store.open(path)
    train = store.interactions("train")
    successors = Successors(train, store.num_items, SuccessorConfig())
    shares_I = _below_one_path(train, store.num_items)

    def score(users: np.ndarray, shown: CSR) -> torch.Tensor:
        found = successors.after(users, shown, newest(shown))
        return shares_I.repeat(len(users), 1).index_put(found.places, found.weights, accumulate=True)

    return {split: _ranked(store, split, score, seed) for split in ("valid", "test")}


def two_hop_metrics(path: Path, seed: int) -> dict[str, Any]:
    """Validation and test metrics of the number of paths item, user, item from a history to each item, in any order of
    time; what has none is ranked by popularity."""
    store = Store.open(path)
    train = store.interactions("train")
    edges = _sparse(train, store.num_items)
    paths = edges.T @ edges
    shares_I = _below_one_path(train, store.num_items)

    def score(_: np.ndarray, shown: CSR) -> torch.Tensor:
        return torch.from_numpy((_sparse(shown, store.num_items) @ paths).toarray()) + shares_I

    return {split: _ranked(store, split, score, seed) for split in ("valid", "test")}


def _below_one_path(train: CSR, num_items: int) -> torch.Tensor:
    """Popularity, to order what nothing else does."""
    counts_I = popularity(train, num_items)
    return 1e-3 * counts_I / counts_I.max()


def _ranked(store: Store, split: str, score: Score, seed: int) -> dict[str, float]:
    read: Histories = histories(store, split)
    users = np.flatnonzero(read.targets.lengths)

    def scores(rows: np.ndarray) -> torch.Tensor:
        return score(rows, read.shown.take(rows))

    return evaluate_scores(
        scores, users, read.targets, [read.shown], store.num_items, seed=seed, progress=False
    ).result()


def _dense(rows: CSR, items: int) -> torch.Tensor:
    return torch.from_numpy(_sparse(rows, items).toarray())


def _sparse(rows: CSR, items: int) -> csr_array:
    """1 for each item of a row, however often it comes."""
    ones = np.ones(len(rows.indices), dtype=np.float32)
    return csr_array((ones, (rows.rows, rows.indices)), (len(rows), items)).minimum(1)


METHODS = {
    "EASE": ease_metrics,
    "Two-hop paths alone": two_hop_metrics,
    "Successors alone": successor_metrics,
}
