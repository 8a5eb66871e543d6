"""What both recipes do with node and text vectors before the language model reads them."""

import torch
from torch import nn

TEXT_SCALE = 0.3  # of the text vectors beside nodes of scale 1: an update of Adam moves all their columns at once


def scaled_texts(texts_It: torch.Tensor) -> torch.Tensor:
    """Text vectors without their common direction, with standard deviation `TEXT_SCALE`."""
    centred_It = texts_It - texts_It.mean(0)
    return TEXT_SCALE * centred_It / centred_It.std().clamp(min=1e-6)


def token_scale(token_embeddings: torch.Tensor) -> float:
    """Root mean square of the backbone's token embeddings: the size a projected node should start with."""
    return float(token_embeddings.detach().float().pow(2).mean().sqrt())


def projector(source: int, width: int, scale: float) -> nn.Linear:
    """The linear map from node vectors into the token space; its outputs start with `scale`."""
    layer = nn.Linear(source, width)
    nn.init.normal_(layer.weight, std=scale / source**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def sum_rows(vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, d]: the first counts[0] of `vectors` [n, d] added up, then the next counts[1], …"""
    row_of = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, row_of, vectors)


def users_of_items(item_shares_Id: torch.Tensor, items_n: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Node vectors [B, d] of users known by their items alone, |H|^-1/2 Σ shares: `propagate_users` on `counts_B[b]`
    entries of `items_n` each."""
    return sum_rows(item_shares_Id[items_n], counts_B) / counts_B.clamp(min=1).sqrt()[:, None]
