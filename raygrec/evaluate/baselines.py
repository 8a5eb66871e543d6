"""Baselines that need no training of their own: popularity, and LightGCN or RLMRec-Con from node embeddings."""

import numpy as np
import torch
from torch import nn

from raygrec.data.arrays import CSR
from raygrec.evaluate.ranking import Score
from raygrec.graph.lightgcn import NodeEmbeddings, propagate_users
from raygrec.model.nodes import users_of_items
from raygrec.model.prompts import PromptBatch, Symbols, as_targets


def popularity(train: CSR, num_items: int) -> torch.Tensor:
    """[I] training interactions of each item."""
    return torch.from_numpy(np.bincount(train.indices, minlength=num_items).astype(np.float32))


def popularity_scores(counts_I: torch.Tensor) -> Score:
    """Scores every item by its `popularity`, the same for all: users [B] -> [B, I]."""
    return lambda users: counts_I.expand(len(users), len(counts_I))


def lightgcn_scores(
    embeddings: NodeEmbeddings, histories: CSR | None = None, counts_I: torch.Tensor | None = None
) -> Score:
    """Scores by the inner product of LightGCN's final embeddings: users [B] -> [B, I].

    histories: one row per user. When given, each user is rebuilt from that row (`propagate_users` plus the
    user's own part), so that items seen after training, such as the validation item at test time, count too.
    counts_I: what ranks for a user without history, of whom the graph knows nothing: items' popularity.
    """

    def score(users: np.ndarray) -> torch.Tensor:
        rows_B = torch.from_numpy(np.asarray(users, dtype=np.int64)).to(embeddings.items.device)
        if histories is None:
            users_Bd = embeddings.users[rows_B]
        else:
            rebuilt_Bd = propagate_users(embeddings.items_inductive, histories.take(users))
            users_Bd = embeddings.users_ego[rows_B] + rebuilt_Bd
        scores_BI = users_Bd @ embeddings.items.T
        if histories is not None and counts_I is not None:
            scores_BI[histories.lengths[users] == 0] = counts_I.to(scores_BI)
        return scores_BI

    return score


class GraphPrompts:
    """Prompts that are a user and its history; there is nothing to train on."""

    causal = False

    def __init__(self, num_items: int, train: CSR) -> None:
        self.symbols = Symbols(text=0, items=num_items, users=len(train), slots=0)
        self.train = train

    def recommending(
        self, users: np.ndarray, histories: CSR, stage: str = "test", slots: int | None = None
    ) -> PromptBatch:
        """One symbol per user, that answers for its history. `stage`, `slots`: as in GLTA, unused."""
        symbols = torch.from_numpy(self.symbols.first_user + np.asarray(users, dtype=np.int64))[:, None]
        none = np.zeros(0, dtype=np.int64)
        return PromptBatch(
            symbols=symbols,
            segments=torch.zeros_like(symbols),
            slots=torch.arange(len(users))[:, None],
            answers=torch.from_numpy(none),
            targets=as_targets(none, none, 0),
            history_indptr=torch.from_numpy(histories.indptr),
            history=torch.from_numpy(histories.indices.astype(np.int64)),
            tables=torch.zeros(len(users), dtype=torch.int64),
            user_kept=torch.ones(len(users), dtype=torch.bool),
        )


class GraphModel(nn.Module):
    """Node embeddings as a model: `lightgcn_scores` of prompts' histories, counts_I where these are empty."""

    def __init__(self, symbols: Symbols, embeddings: NodeEmbeddings, counts_I: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("counts_I", counts_I, persistent=False)
        self.symbols = symbols
        self.items = nn.Parameter(embeddings.items)
        self.users_ego = nn.Parameter(embeddings.users_ego)
        self.items_inductive = nn.Parameter(embeddings.items_inductive)

    def slot_logits(self, batch: PromptBatch, slots: int | None = None) -> torch.Tensor:
        """Scores [B, 1, I]."""
        own_Bd = self.users_ego[batch.symbols[:, 0] - self.symbols.first_user]
        lengths_B = batch.history_indptr.diff()
        rebuilt_Bd = users_of_items(self.items_inductive, batch.history, lengths_B)
        scores_BI = (own_Bd + rebuilt_Bd) @ self.items.T
        return torch.where(lengths_B[:, None] > 0, scores_BI, self.counts_I)[:, None]
