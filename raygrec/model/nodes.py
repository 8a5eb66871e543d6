"""What both recipes do with node and text vectors before the language model reads them."""

import torch
from torch import nn

from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.head import ROW_SCALE, ItemRows
from raygrec.model.prompts import PromptBatch

# Standard deviations of what a projector reads. Adam moves an item's trained offset as fast whatever stands beside it:
# small nodes leave it the room to correct what they remember of the very edges that are to be predicted.
NODE_SCALE, TEXT_SCALE = 0.1, 0.3
FREE_SCALE = 0.02  # standard deviation with which an item's trained offset starts


def scaled_texts(texts_It: torch.Tensor) -> torch.Tensor:
    """Text vectors without their common direction, with standard deviation `TEXT_SCALE`."""
    centred_It = texts_It - texts_It.mean(0)
    return TEXT_SCALE * centred_It / centred_It.std().clamp(min=1e-6)


def token_scale(token_embeddings: torch.Tensor) -> float:
    """Root mean square of the backbone's token embeddings: the size a projected node should start with."""
    return float(token_embeddings.detach().float().pow(2).mean().sqrt())


def projector(source: int, width: int, scale: float) -> nn.Linear:
    """The linear map from vectors of about `TEXT_SCALE` into the token space; its outputs start with `scale`."""
    layer = nn.Linear(source, width)
    nn.init.normal_(layer.weight, std=scale / (TEXT_SCALE * source**0.5))
    nn.init.zeros_(layer.bias)
    return layer


class ItemProjector(nn.Module):
    """Item tokens V_i = W x_i in the token space, x = `ItemRows`.

    With a tied head W is a fixed frame, and the head reads tokens back through it: V_iᵀ h = x_iᵀ (Wᵀ h), so that x are
    its rows and Wᵀ h its queries, at r · |I| a position and not D · |I|. [ours] A trained W would be a second factor in
    both places: it makes the x learn faster, and by heart.
    """

    def __init__(
        self,
        num_items: int,
        node_width: int,
        text_width: int | None,
        width: int,
        scale: float,
        tied: bool,
        free: bool = True,
    ) -> None:
        super().__init__()
        self.rows = ItemRows(num_items, node_width, text_width, free, start=FREE_SCALE)
        size = scale / (ROW_SCALE * TEXT_SCALE * node_width**0.5)  # of W's entries
        self.trained = None if tied else nn.Linear(node_width, width, bias=False)
        if self.trained is not None:
            nn.init.normal_(self.trained.weight, std=size)
        self.register_buffer("fixed_Dr", size * frame(width, node_width) if tied else None)

    def forward(self, nodes_nd: torch.Tensor, texts_nt: torch.Tensor | None, items_n: torch.Tensor) -> torch.Tensor:
        """Tokens [n, D] of the items with these numbers, nodes and text vectors."""
        return self.projected(self.rows(nodes_nd, texts_nt, items_n))

    def projected(self, rows_nr: torch.Tensor) -> torch.Tensor:
        """W x [n, D]."""
        return rows_nr @ self.fixed_Dr.T.to(rows_nr.dtype) if self.trained is None else self.trained(rows_nr)

    def queries(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """Wᵀ h [P, r], for a tied head."""
        return hidden_PD @ self.fixed_Dr.to(hidden_PD.dtype)


def frame(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] with orthogonal columns, or rows where these are fewer, and entries of root mean square 1: a
    corner of the discrete cosine transform of the fourth kind, which is the same on every machine."""
    size = max(rows, columns)
    half = torch.arange(size, dtype=torch.float64) + 0.5
    return (2**0.5 * (torch.pi / size * half[:rows, None] * half[:columns]).cos()).float()


def sum_rows(vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, d]: the first counts[0] of `vectors` [n, d] added up, then the next counts[1], …"""
    row_of = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, row_of, vectors)


class NodeTables(nn.Module):
    """Node vectors of graph pretraining, with the standard deviation `scale`; fixed, and no part of a checkpoint.

    Items and the shares that users are rebuilt from are there once per fit of the graph: [K + 1, I, d]. Fit 0 knows
    every edge; a prompt about a user reads the one that knows none of the user's (`PromptBatch.tables`).
    """

    def __init__(self, nodes: NodeEmbeddings, scale: float = NODE_SCALE) -> None:
        super().__init__()
        self.width = nodes.items.shape[1]
        of_items, of_users = scale / nodes.items.std(), scale / nodes.users.std()
        self.register_buffer("items_KId", nodes.item_tables * of_items, persistent=False)
        self.register_buffer("shares_KId", nodes.share_tables * of_users, persistent=False)
        self.register_buffer("users_Ud", nodes.users * of_users, persistent=False)

    @property
    def items_Id(self) -> torch.Tensor:
        """Of the fit that knows every edge."""
        return self.items_KId[0]

    def items(self, items_n: torch.Tensor, tables_n: torch.Tensor) -> torch.Tensor:
        """Vectors [n, d] of items, each from the given fit."""
        return self.items_KId[tables_n, items_n]

    def users(self, batch: PromptBatch) -> torch.Tensor:
        """Vectors [B, d] of the prompts' users by their histories alone, |H|^-1/2 Σ shares (`propagate_users`)."""
        counts_B = batch.history_indptr.diff()
        tables_n = torch.repeat_interleave(batch.tables[: len(counts_B)], counts_B)
        rows_n = tables_n * self.shares_KId.shape[1] + batch.history
        return users_of_items(self.shares_KId.flatten(0, 1), rows_n, counts_B)


def users_of_items(item_shares_Id: torch.Tensor, items_n: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Node vectors [B, d] of users known by their items alone, |H|^-1/2 Σ shares: `propagate_users` on `counts_B[b]`
    entries of `items_n` each."""
    return sum_rows(item_shares_Id[items_n], counts_B) / counts_B.clamp(min=1).sqrt()[:, None]
