"""Baseline scorers for the full ranking: popularity and LightGCN."""

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.evaluate.ranking import Score
from raygrec.graph.lightgcn import NodeEmbeddings, propagate_users


def popularity_scores(train: CSR, num_items: int) -> Score:
    """Scores every item by its number of training interactions: users [B] -> [B, I]."""
    counts_I = torch.from_numpy(np.bincount(train.indices, minlength=num_items).astype(np.float32))
    return lambda users: counts_I.expand(len(users), num_items)


def lightgcn_scores(embeddings: NodeEmbeddings, histories: CSR | None = None) -> Score:
    """Scores by the inner product of LightGCN's final embeddings: users [B] -> [B, I].

    histories: one row per user. When given, each user is rebuilt from that row (`propagate_users` plus the
    user's own part), so that items seen after training, such as the validation item at test time, count too.
    """

    def score(users: np.ndarray) -> torch.Tensor:
        rows_B = torch.from_numpy(np.asarray(users, dtype=np.int64)).to(embeddings.items.device)
        if histories is None:
            users_Bd = embeddings.users[rows_B]
        else:
            rebuilt_Bd = propagate_users(embeddings.items_inductive, histories.take(users))
            users_Bd = embeddings.users_ego[rows_B] + rebuilt_Bd
        return users_Bd @ embeddings.items.T

    return score
