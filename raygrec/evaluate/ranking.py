"""Full ranking: the k best items of a user's whole catalogue, with ties broken fairly and reproducibly."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate.metrics import MetricSums
from raygrec.progress import track

Score = Callable[[np.ndarray], torch.Tensor]  # user ids [B] -> scores [B, I]
STRIP = 8  # columns of which the greatest stands for all
FEW = 64  # columns of a row that are as good as sorted at once


def evaluate_scores(
    score: Score,
    users: np.ndarray,
    targets: CSR,
    masks: Sequence[CSR],
    num_items: int,
    ks: Sequence[int] = (5, 10),
    chunk: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> MetricSums:
    """Ranks the whole catalogue for each of `users` and sums the metrics.

    score: user ids [B] -> scores [B, I], which are written over. targets and masks: CSR with one row per user id;
    masked items are not ranked, so a target among them is a miss. Users without targets are left out, unscored.
    How users are cut into chunks or spread over workers does not change how ties are broken. Raises `InputError`
    for scores that are not finite.
    """
    users = np.asarray(users)[targets.lengths[users] > 0]
    sums = MetricSums(tuple(ks), num_items)
    starts = range(0, len(users), chunk)
    for start in track(starts, "ranking") if progress else starts:
        rows = users[start : start + chunk]
        lists = top_k(score(rows), max(ks), [mask.take(rows) for mask in masks], rows, seed, overwrite=True)
        sums.add(lists, targets.take(rows))
    return sums


def top_k(
    scores: torch.Tensor,
    k: int,
    masks: Sequence[CSR] = (),
    users: np.ndarray | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> torch.Tensor:
    """The k best items of each row, best first: [B, k] int64, padded with -1 where fewer are left.

    scores: [B, I], compared as float32 and finite as such. masks: CSRs with B rows of items to leave out.
    users: [B] ids, by default the row numbers. Equal scores are ordered at random, by a hash of
    (seed, user, item). overwrite: nobody reads these scores afterwards; masks are written into them where a copy would
    cost as much as the ranking.
    """
    users = np.arange(len(scores)) if users is None else np.asarray(users)
    own = overwrite and scores.is_contiguous()  # rows that share memory are not
    scores = scores.detach().to(torch.float32, copy=bool(masks) and not own)
    if scores.numel() and not torch.stack(scores.aminmax()).isfinite().all():
        row, item = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise InputError(f"scores: row {row}, item {item} is {float(scores[row, item])}; expected finite values")
    for mask in masks:
        places = np.stack([mask.rows, np.asarray(mask.indices, dtype=np.int64)])
        scores[tuple(torch.from_numpy(places).to(scores.device))] = -torch.inf
    # One place more than asked for, to see a tie across the cut.
    values, items = _greatest(scores, min(k + 1, scores.shape[1]))
    tied = ((values[:, 1:] == values[:, :-1]) & values[:, 1:].isfinite()).any(1).nonzero()[:, 0]
    if len(tied):
        _break_ties(scores, values, items, tied, users, seed)
    items = items.masked_fill(values == -torch.inf, -1)[:, :k]
    return torch.nn.functional.pad(items, (0, k - items.shape[1]), value=-1)


def _break_ties(
    scores: torch.Tensor, values: torch.Tensor, items: torch.Tensor, tied: torch.Tensor, users: np.ndarray, seed: int
) -> None:
    """Writes the rows `tied` of values and items [B, places] anew, equal scores by their hash."""
    among = scores[tied]
    # What may have a place scores at least as high as the last one does: mostly little more than there are places.
    wanted = (among >= values[tied, -1:]).sum(1)
    for mine, count in ((wanted <= FEW, FEW), (wanted > FEW, among.shape[1])):
        rows, scored = tied[mine], among[mine]
        if count < among.shape[1]:
            scored, columns = _greatest(scored, count)
        else:
            columns = torch.arange(among.shape[1], device=scores.device).expand(len(rows), -1)
        keys = _tie_free(scored, columns, users[rows.cpu().numpy()], seed)
        places = _greatest(keys, items.shape[1])[1]
        items[rows], values[rows] = columns.gather(1, places), scored.gather(1, places)


def _greatest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k greatest of each row of [B, I] in descending order, and their columns, as `torch.topk`.

    They lie in the k strips of `STRIP` columns whose own greatest are greatest: one pass that only compares, where
    `topk` would arrange each row.
    """
    strips = scores.shape[1] // STRIP
    if strips < 32 * max(k, 1):
        return torch.topk(scores, k)
    among, rest = STRIP * strips, scores.shape[1] - STRIP * strips
    _, chosen = _greatest(scores[:, :among].unflatten(1, (STRIP, strips)).amax(1), k)
    starts = torch.arange(0, among, strips, device=scores.device)
    left_over = torch.arange(among, among + rest, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(chosen[:, :, None] + starts).flatten(1), left_over], 1)
    values, places = scores.gather(1, columns).topk(k)
    return values, columns.gather(1, places)


def _tie_free(scores: torch.Tensor, items: torch.Tensor, users: np.ndarray, seed: int) -> torch.Tensor:
    """[B, C] int64 that orders as (score, hash of the item) does: the float's ordered bits above, the hash below.

    Inside a row no two hashes are equal, as murmur3's finaliser is a bijection.
    """
    bits = (scores + 0.0).view(torch.int32)  # adding zero makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    users_B = torch.from_numpy(np.asarray(users).astype(np.int32)).to(scores.device)
    seeded = torch.tensor(seed, device=scores.device).to(torch.int32)
    hashes = _mix(_mix(users_B + _mix(seeded))[:, None] ^ _mix(items.int()))
    return (ordered.long() << 32) | (hashes.long() & 0xFFFFFFFF)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser on int32; `& mask` makes the signed shift a logical one."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (0x85EBCA6B - 2**32)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * (0xC2B2AE35 - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
