"""Row 8: full-ranking metrics, against torchmetrics' retrieval metrics on the same scores."""

from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.retrieval import (
    RetrievalHitRate,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalRecall,
)

from bench.speed.measure import compared, in_turns, peak_mib, shares, write
from raygrec.data.arrays import CSR
from raygrec.evaluate.metrics import MetricSums
from raygrec.evaluate.ranking import evaluate_scores

K = 10
USERS, ITEMS, CHUNK = 22_363, 12_101, 256
ROUNDS = 5  # of a chunk each
MANY_ITEMS, FEW_USERS, SMALL_CHUNK = 1_000_000, (16, 64), 8
THEIRS = {
    "precision": RetrievalPrecision,
    "recall": RetrievalRecall,
    "hit": RetrievalHitRate,
    "ndcg": RetrievalNormalizedDCG,
    "mrr": RetrievalMRR,
}


class Chunk:
    """The scores and targets of some users: one to five items each."""

    def __init__(self, number: int, users: int, items: int) -> None:
        generator = torch.Generator().manual_seed(number + 1)
        self.scores = torch.randn(users, items, generator=generator)
        drawn = np.random.default_rng(number + 1)
        self.targets = CSR.from_lists(drawn.choice(items, drawn.integers(1, 6), replace=False) for _ in range(users))

    def ours(self) -> MetricSums:
        users = np.arange(len(self.scores))
        return evaluate_scores(
            lambda rows: self.scores, users, self.targets, [], self.scores.shape[1], (K,), len(users), progress=False
        )

    def theirs(self) -> dict[str, float]:
        users, items = self.scores.shape
        wanted = torch.zeros(users, items, dtype=torch.bool)
        wanted[torch.from_numpy(self.targets.rows), torch.from_numpy(self.targets.indices).long()] = True
        numbers = torch.arange(users).repeat_interleave(items)
        found = {}
        for name, metric in THEIRS.items():
            measure = metric(top_k=K)
            measure.update(self.scores.flatten(), wanted.flatten(), indexes=numbers)
            found[name] = float(measure.compute())
        return found


def main() -> None:
    now: list[Chunk] = [None]
    results: dict[str, list] = {"ours": [], "theirs": []}

    def draw(number: int) -> None:
        now[0] = Chunk(number, CHUNK, ITEMS)

    sides = {
        "raygrec": lambda _: results["ours"].append(now[0].ours().result()),
        "torchmetrics": lambda _: results["theirs"].append(now[0].theirs()),
    }
    seconds = in_turns(sides, ROUNDS, before=draw)
    apart = max(
        abs(ours[f"{name}@{K}"] - theirs[name])
        for ours, theirs in zip(results["ours"], results["theirs"], strict=True)
        for name in THEIRS
    )
    if apart > 1e-5:
        raise SystemExit(f"the two do not compute the same metrics: they differ by {apart}")
    small = {"raygrec": CHUNK, "torchmetrics": CHUNK}
    one = compared(
        f"{USERS:,} users × {ITEMS:,} items",
        seconds,
        *sides,
        moved=4 * CHUNK * ITEMS,
        work=small,
        unit="users/s",
        greatest_difference=apart,
        seconds_for_all=float(np.median(seconds["raygrec"])) * USERS / CHUNK,
        note=f"{ROUNDS} chunks of {CHUNK} users timed; both give the same metrics",
    )
    profile = shares(now[0].ours)
    seconds = in_turns(sides, 2, before=lambda number: now.__setitem__(0, Chunk(number, SMALL_CHUNK, MANY_ITEMS)))
    memory = {str(users): peak_mib(many, users) for users in FEW_USERS}
    two = compared(
        f"{MANY_ITEMS:,} items, chunks of {SMALL_CHUNK} users",
        seconds,
        *sides,
        moved=4 * SMALL_CHUNK * MANY_ITEMS,
        work=dict.fromkeys(sides, SMALL_CHUNK),
        unit="users/s",
        peak_mib={"raygrec": memory},
        note=f"a slice of 100,000 users: 2 chunks timed, memory of {FEW_USERS[0]} and {FEW_USERS[1]} users",
    )
    write(
        "metrics",
        {
            "row": 8,
            "title": f"Precision, recall, hit rate, NDCG and MRR at {K}, full ranking",
            "against": "torchmetrics' retrieval metrics, on the same scores, a chunk of users at a time",
            "target": "≥ 10×, memory bounded",
            "reached": min(one["ratio"]["median"], two["ratio"]["median"]) >= 10,
            "cases": [one, two],
            "where": {f"{ITEMS:,} items": profile},
        },
        "torchmetrics",
    )


def many(users: int) -> Callable[[], None]:
    """Ranks `users` users over the large catalogue, with scores made chunk by chunk."""
    targets = CSR.from_lists([[user] for user in range(users)])

    def score(rows: np.ndarray) -> torch.Tensor:
        return torch.randn(len(rows), MANY_ITEMS, generator=torch.Generator().manual_seed(int(rows[0])))

    return lambda: evaluate_scores(
        score, np.arange(users), targets, [], MANY_ITEMS, (K,), SMALL_CHUNK, progress=False
    ).result()
