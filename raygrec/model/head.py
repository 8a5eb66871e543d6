"""The GLLM head: hidden states to logits over the whole catalogue, and their cross-entropy in chunks."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class ItemRows(nn.Module):
    """The head's rows R [I, r]: R_i = A E_i + P t_i + Δ_i, from node embeddings E and text vectors t of the items.

    Δ, from zero, makes the rows free (`free`); without it they stay functions of E and t, whatever their number.
    Rows therefore start as what the graph and the language model know of an item, not as noise.
    """

    def __init__(self, num_items: int, node_width: int, text_width: int | None, free: bool) -> None:
        super().__init__()
        self.from_node = _row_map(node_width, node_width)
        self.from_text = None if text_width is None else _row_map(text_width, node_width)
        self.free = nn.Parameter(torch.zeros(num_items, node_width)) if free else None

    def forward(self, nodes_Id: torch.Tensor, texts_It: torch.Tensor | None) -> torch.Tensor:
        rows_Ir = self.from_node(nodes_Id)
        if self.from_text is not None:
            rows_Ir = rows_Ir + self.from_text(texts_It)
        return rows_Ir if self.free is None else rows_Ir + self.free


class CatalogueHead(nn.Module):
    """One linear layer from hidden states to |I| logits (GLTA, graph-language logits matching).

    [ours] It is written as two factors, Z = (h Q) Rᵀ + b, of the node embeddings' width r: a position costs
    r · |I| and not D · |I|. `rows` makes R, once per pass.
    """

    def __init__(self, width: int, num_items: int, node_width: int, text_width: int | None, free: bool) -> None:
        super().__init__()
        self.rows = ItemRows(num_items, node_width, text_width, free)
        self.query = nn.Linear(width, node_width)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        self.bias = nn.Parameter(torch.zeros(num_items))

    def forward(self, hidden_PD: torch.Tensor, rows_Ir: torch.Tensor) -> torch.Tensor:
        """Logits [P, I] against the rows."""
        return torch.addmm(self.bias.to(hidden_PD.dtype), self.query(hidden_PD), rows_Ir.T.to(hidden_PD.dtype))


def _row_map(source: int, width: int) -> nn.Linear:
    layer = nn.Linear(source, width, bias=False)
    nn.init.normal_(layer.weight, std=0.3 / source**0.5)
    return layer


def catalogue_cross_entropy(
    head: nn.Module, hidden_PD: torch.Tensor, rows_Ir: torch.Tensor, targets: "Targets", chunks: int = 1
) -> torch.Tensor:
    """Sum over positions of −Σ_i w_i log softmax(Z)_i, over the full catalogue, in `chunks` equal parts.

    The logits of a part are recomputed in the backward pass, so memory is |I| · P / chunks. Every rank must
    pass the same `chunks`: under ZeRO-3 each part gathers the head. hidden_PD: [P, D]. Returns fp32 [].
    """
    total = hidden_PD.new_zeros((), dtype=torch.float32)
    size = max(-(-len(hidden_PD) // chunks), 1)
    for start in range(0, size * chunks, size):
        hidden = hidden_PD[start : start + size]
        part = targets.slice(min(start, len(hidden_PD)), min(start + size, len(hidden_PD)))
        if chunks > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, hidden, rows_Ir, part, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, hidden, rows_Ir, part)
    return total


def _chunk_loss(head: nn.Module, hidden_PD: torch.Tensor, rows_Ir: torch.Tensor, targets: "Targets") -> torch.Tensor:
    logits_PI = head(hidden_PD, rows_Ir).float()
    matched = (logits_PI[targets.rows, targets.items] * targets.weights).sum()
    return logits_PI.logsumexp(dim=1).sum() - matched


class Targets:
    """What answer positions must predict: position p has `items[indptr[p]:indptr[p + 1]]`.

    The weights of a position's items add to 1.
    """

    def __init__(self, indptr: torch.Tensor, items: torch.Tensor, weights: torch.Tensor) -> None:
        self.indptr = indptr
        self.items = items
        self.weights = weights

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def rows(self) -> torch.Tensor:
        """[entries]: the position each entry belongs to."""
        counts = self.indptr.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def slice(self, start: int, stop: int) -> "Targets":
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        indptr = self.indptr[start : stop + 1] - self.indptr[start]
        return Targets(indptr, self.items[first:last], self.weights[first:last])

    def to(self, device: torch.device | str) -> "Targets":
        return Targets(self.indptr.to(device), self.items.to(device), self.weights.to(device))
