"""GLTA's three ways from answer slots to a ranked list (paper, decoding)."""

from collections.abc import Callable

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate.ranking import top_k
from raygrec.model.glta import GLTA, PromptBuilder
from raygrec.model.prompts import join_rows


def ranked_lists(
    model: GLTA,
    builder: PromptBuilder,
    decoding: str,
    users: np.ndarray,
    histories: CSR,
    stage: str,
    k: int,
    device: torch.device,
) -> torch.Tensor:
    """The k items recommended to each of `users`, best first: [B, k] int64, none from its history.

    histories: [B] rows, all that a user has interacted with. `first`: top-k of the first slot's logits.
    `slots`: each slot's top item that no earlier slot has taken. `autoregressive`: each item is fed back as the
    history's newest and the first slot answers again. Raises `InputError` where `slots` has fewer slots than k.
    """
    if decoding == "first":
        scores = _logits(model, builder, users, histories, stage, 1, device)[:, 0]
        return top_k(scores, k, [histories], users, overwrite=True)
    if decoding == "slots":
        if k > model.symbols.slots:
            raise InputError(f"decoding slots: a list of {k} needs as many slots, model.slots is {model.symbols.slots}")
        logits_BkI = _logits(model, builder, users, histories, stage, model.symbols.slots, device)
        return _one_per_step(lambda step, _: logits_BkI[:, step], k, histories, users)

    def feed_back(step: int, chosen: torch.Tensor) -> torch.Tensor:
        longer = join_rows([histories, _rows(chosen)])
        return _logits(model, builder, users, longer, stage, 1, device)[:, 0]

    return _one_per_step(feed_back, k, histories, users)


def _logits(
    model: GLTA,
    builder: PromptBuilder,
    users: np.ndarray,
    histories: CSR,
    stage: str,
    slots: int,
    device: torch.device,
) -> torch.Tensor:
    batch = builder.recommending(users, histories, stage, slots)
    return model.slot_logits(batch.to(device)).float()


def _one_per_step(
    scores: Callable[[int, torch.Tensor], torch.Tensor], k: int, histories: CSR, users: np.ndarray
) -> torch.Tensor:
    """Takes the best item of `scores(step, chosen so far)` k times, never one of the history or chosen before."""
    chosen = torch.empty(len(users), 0, dtype=torch.int64)
    for step in range(k):
        best = top_k(scores(step, chosen), 1, [histories, _rows(chosen)], users, seed=step)
        chosen = torch.cat([chosen, best.cpu()], dim=1)
    return chosen


def _rows(items_Bn: torch.Tensor) -> CSR:
    """The items of each row, without the -1 of a row whose catalogue is used up."""
    rows, columns = (items_Bn >= 0).nonzero(as_tuple=True)
    return CSR.from_pairs(rows.numpy(), items_Bn[rows, columns].numpy(), len(items_Bn))
