import torch

from raygrec.graph.lightgcn import NodeEmbeddings

FOLDS = 2


def random_nodes(users: int, items: int, width: int = 4) -> NodeEmbeddings:
    """Node vectors that all differ, user by user, fit by fit; users' folds go round."""
    return NodeEmbeddings(
        users=3 * torch.randn(users, width),
        items=torch.randn(items, width),
        users_ego=torch.randn(users, width),
        items_inductive=torch.randn(items, width),
        fold_of=1 + torch.arange(users) % FOLDS,
        fold_items=torch.randn(FOLDS, items, width),
        fold_shares=torch.randn(FOLDS, items, width),
    )
