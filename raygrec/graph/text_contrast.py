"""RLMRec-Con: node embeddings pulled to what texts say of their nodes (Ren et al., WWW 2024, arXiv 2310.15950)."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raygrec.data.arrays import CSR

NODES = 2048  # of each side and step, so that the similarities of all pairs stay small


class TextContrast(nn.Module):
    """InfoNCE between nodes and a two-layer map of their text vectors, users' and items' apart.

    texts: [I, t] of the items. [ours] The paper has an LLM write profiles of users and items; here an item's text is
    its own, and a user's vector the mean over its items in `train`.
    """

    def __init__(
        self, texts_It: torch.Tensor, train: CSR, dim: int, temperature: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.temperature = temperature
        items, starts = (torch.from_numpy(part.astype(np.int64)) for part in (train.indices, train.indptr[:-1]))
        means_Ut = functional.embedding_bag(items, texts_It, starts, mode="mean")
        self.register_buffer("texts", torch.cat([means_Ut, texts_It]), persistent=False)
        width = texts_It.shape[1]
        hidden = (width + dim) // 2
        self.map = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))
        self.to(generator.device)
        for layer in (self.map[0], self.map[2]):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, final_Nd: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        """The sum over sides of the mean InfoNCE of their first nodes; each side: [n] node numbers, repeated or not."""
        return sum((self._info_nce(final_Nd, side[:NODES].unique()) for side in sides), final_Nd.new_zeros(()))

    def _info_nce(self, final_Nd: torch.Tensor, nodes_n: torch.Tensor) -> torch.Tensor:
        anchors_nd = functional.normalize(final_Nd[nodes_n])
        texts_nd = functional.normalize(self.map(self.texts[nodes_n]))
        similar_nn = anchors_nd @ texts_nd.T / self.temperature
        return functional.cross_entropy(similar_nn, torch.arange(len(nodes_n), device=nodes_n.device))
