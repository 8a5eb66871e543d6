"""The GLLM head: hidden states to logits over the whole catalogue, and their cross-entropy in chunks."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class LinearHead(nn.Module):
    """One linear layer from hidden states to |I| logits (GLTA, graph-language logits matching).

    [ours] Its weight is written as W + E Q with W, from zero, and Q trained: the same layer, whose rows start as
    functions of the item nodes instead of as noise, and which weight decay pulls towards them.
    """

    def __init__(self, width: int, num_items: int, node_width: int) -> None:
        super().__init__()
        self.query = _query(width, node_width)
        self.output = nn.Linear(width, num_items)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_PD: torch.Tensor, items_Id: torch.Tensor) -> torch.Tensor:
        """Logits [P, I], with the node embeddings `items_Id`."""
        return torch.addmm(self.output(hidden_PD), self.query(hidden_PD), items_Id.T.to(hidden_PD.dtype))


class TiedHead(nn.Module):
    """Matches projected hidden states against the item tokens: q(h) · E_i + bias_i.

    With V_i = W E_i + b the match h' · V_i equals (Wᵀ h') · E_i up to a constant over items, so the query
    projects straight to the node width d and the cost is |I| · d, not |I| · D, per position.
    """

    def __init__(self, width: int, num_items: int, node_width: int) -> None:
        super().__init__()
        self.query = _query(width, node_width)
        self.bias = nn.Embedding(num_items, 1)
        nn.init.zeros_(self.bias.weight)

    def forward(self, hidden_PD: torch.Tensor, items_Id: torch.Tensor) -> torch.Tensor:
        """Logits [P, I] against the node embeddings `items_Id`."""
        everything = torch.arange(len(items_Id), device=hidden_PD.device)
        return self.query(hidden_PD) @ items_Id.T + self.bias(everything)[:, 0]


def _query(width: int, node_width: int) -> nn.Linear:
    """Small at first: logits start near zero, the loss near ln |I|, whatever the node width."""
    layer = nn.Linear(width, node_width)
    nn.init.normal_(layer.weight, std=0.02 / node_width**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def catalogue_cross_entropy(
    head: nn.Module, hidden_PD: torch.Tensor, items_Id: torch.Tensor, targets: "Targets", chunks: int = 1
) -> torch.Tensor:
    """Sum over positions of −Σ_i w_i log softmax(Z)_i, over the full catalogue, in `chunks` equal parts.

    The logits of a part are recomputed in the backward pass, so memory is |I| · P / chunks. Every rank must
    pass the same `chunks`: under ZeRO-3 each part gathers the head. hidden_PD: [P, D]. Returns fp32 [].
    """
    total = hidden_PD.new_zeros((), dtype=torch.float32)
    size = max(-(-len(hidden_PD) // chunks), 1)
    for start in range(0, size * chunks, size):
        rows = hidden_PD[start : start + size]
        part = targets.slice(min(start, len(hidden_PD)), min(start + size, len(hidden_PD)))
        if chunks > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, rows, items_Id, part, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, rows, items_Id, part)
    return total


def _chunk_loss(head: nn.Module, hidden_PD: torch.Tensor, items_Id: torch.Tensor, targets: "Targets") -> torch.Tensor:
    logits_PI = head(hidden_PD, items_Id).float()
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
