import torch
from torch import nn

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


def expected_logits(model: nn.Module, hidden_PD: torch.Tensor, table: int) -> torch.Tensor:
    """What a recipe's head must say of hidden states of prompts that read that fit of the nodes: `linear`, rows and a
    query of its own; `tied`, the inner products with the tokens of all items."""
    known = model.nodes.items_KId[table], model.item_texts
    if model.config.head == "linear":
        return model.head.query(hidden_PD) @ model.head.rows(*known).T + model.head.bias
    tokens_ID = model.item_projector.projected(model.item_projector.rows(*known))
    return hidden_PD @ tokens_ID.T + model.head.bias


def expected_token(model: nn.Module, node_d: torch.Tensor, item: int) -> torch.Tensor:
    """W (A E_i + P t_i + δ_i) [D]."""
    of = model.item_projector
    row_r = of.rows.from_node.weight @ node_d
    if model.item_texts is not None:
        row_r = row_r + of.rows.from_text.weight @ model.item_texts[item]
    if of.rows.free is not None:
        row_r = row_r + of.rows.free[item]
    return (of.fixed_Dr if of.trained is None else of.trained.weight) @ row_r


def parts_around(head: str) -> set[str]:
    """The trained parameters that both recipes have around the language model."""
    rows = {f"rows.{part}" for part in ("from_node.weight", "from_text.weight", "free")}
    around = {"user_projector.weight", "user_projector.bias", "head.bias", *(f"item_projector.{part}" for part in rows)}
    if head == "linear":
        around |= {"item_projector.trained.weight", *(f"head.{part}" for part in (*rows, "query.weight", "query.bias"))}
    return around
