"""The last layer of a language model, for the positions that are asked for alone.

Nothing reads the others. Of them it needs keys and values, for which BERT makes 2 of the 12 D² products that a layer
makes of a position; queries, what attention puts out, and the feed-forward network are the other 10.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

READ_EVERYWHERE = ("key", "value", "k_proj", "v_proj", "k_norm", "input_layernorm")  # modules, at every position


@dataclass(frozen=True)
class Asked:
    """n > 0 positions of B prompts, row by row: int64 [n] each."""

    rows_n: torch.Tensor
    columns_n: torch.Tensor
    ranks_n: torch.Tensor
    """How many of the same prompt stand before."""
    most: int
    """How many any prompt has."""

    @classmethod
    def of(cls, wanted_BT: torch.Tensor) -> "Asked":
        """The positions that are True; the first where none is, since a model takes part all the same."""
        rows_n, columns_n = wanted_BT.nonzero(as_tuple=True)
        if not len(rows_n):
            return cls.first(1, wanted_BT.device)
        ranks_BT = wanted_BT.cumsum(1)
        return cls(rows_n, columns_n, ranks_BT[rows_n, columns_n] - 1, int(ranks_BT[:, -1].max()))

    @classmethod
    def first(cls, count: int, device: torch.device | None = None) -> "Asked":
        """That many positions of the first prompt."""
        columns_n = torch.arange(count, device=device)
        return cls(torch.zeros_like(columns_n), columns_n, columns_n, count)

    def among(self, values_BT: torch.Tensor) -> torch.Tensor:
        """[n, …] of values [B, T, …]."""
        return values_BT[self.rows_n, self.columns_n]


# (layer, hidden states [B, T, D], positions, mask [B, 1, T, S], what else it is called with) -> [1, n, D]
LastLayer = Callable[..., torch.Tensor]


def asked_parameters(layer: nn.Module) -> int:
    """Parameters of a last layer that read the asked positions alone."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in layer.named_parameters()}  # partitioned or not
    return sum(size for name, size in sizes.items() if not set(name.split(".")) & set(READ_EVERYWHERE))


def last_layer(model: nn.Module, model_type: str) -> tuple[nn.Module, LastLayer] | None:
    """A model's last layer, and how to compute it for some positions; None where raygrec does not know how."""
    if model_type in ("bert", "roberta", "xlm-roberta"):
        return model.encoder.layer[-1], _bert
    if model_type in ("llama", "qwen2", "qwen3", "mistral", "gemma"):
        return model.layers[-1], _llama
    return None


def _bert(
    layer: nn.Module, hidden_BTD: torch.Tensor, asked: Asked, mask_B1TS: torch.Tensor, **_: object
) -> torch.Tensor:
    attention, asked_nD = layer.attention.self, asked.among(hidden_BTD)
    made = attention.query(asked_nD), attention.key(hidden_BTD), attention.value(hidden_BTD)
    by_head = (values.unflatten(-1, (-1, attention.attention_head_size)) for values in made)
    read_1nD = _attend(attention, asked, mask_B1TS, *by_head)
    return layer.feed_forward_chunk(layer.attention.output(read_1nD, asked_nD[None]))


def _llama(
    layer: nn.Module,
    hidden_BTD: torch.Tensor,
    asked: Asked,
    mask_B1TS: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: object = None,
    past_key_values: object = None,
    **_: object,
) -> torch.Tensor:
    attention, normed_BTD = layer.self_attn, layer.input_layernorm(hidden_BTD)
    made = attention.q_proj(asked.among(normed_BTD)), attention.k_proj(normed_BTD), attention.v_proj(normed_BTD)
    queries_nHe, keys_BTHe, values_BTHe = (values.unflatten(-1, (-1, attention.head_dim)) for values in made)
    if hasattr(attention, "q_norm"):
        queries_nHe, keys_BTHe = attention.q_norm(queries_nHe), attention.k_norm(keys_BTHe)
    turned = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # of pairs [n, H, e], by angles [n, e]
    angles_ne = (angles_1Te[0, asked.columns_n] for angles_1Te in position_embeddings)
    queries_nHe, _ = turned(queries_nHe, queries_nHe, *angles_ne)
    keys_BTHe, _ = turned(keys_BTHe, keys_BTHe, *position_embeddings, unsqueeze_dim=2)
    cache = past_key_values if cache is None else cache  # the name until transformers 5.23
    if cache is not None:
        own = keys_BTHe.transpose(1, 2), values_BTHe.transpose(1, 2), attention.layer_idx
        keys_BTHe, values_BTHe = (both.transpose(1, 2) for both in cache.update(*own))
    read_1nD = _attend(attention, asked, mask_B1TS, queries_nHe, keys_BTHe, values_BTHe)
    added_1nD = asked.among(hidden_BTD)[None] + attention.o_proj(read_1nD)
    return added_1nD + layer.mlp(layer.post_attention_layernorm(added_1nD))


def _attend(
    attention: nn.Module,
    asked: Asked,
    mask_B1TS: torch.Tensor,
    queries_nHe: torch.Tensor,
    keys_BSHe: torch.Tensor,
    values_BSHe: torch.Tensor,
) -> torch.Tensor:
    """What the asked positions read: [1, n, H · e]. Every prompt gets as many queries as the one with the most."""
    prompts, most = len(keys_BSHe), asked.most
    places_n = asked.rows_n * most + asked.ranks_n

    def spread(values: torch.Tensor) -> torch.Tensor:
        places = values.new_zeros(prompts * most, *values.shape[1:])
        return places.index_copy(0, places_n, values).unflatten(0, (prompts, most))

    library = sys.modules[type(attention).__module__]
    attend = library.ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, library.eager_attention_forward
    )
    every_B1 = torch.arange(prompts, device=places_n.device)[:, None]
    seen_B1AS = mask_B1TS[every_B1, 0, spread(asked.columns_n)][:, None]
    heads = (by_head.transpose(1, 2) for by_head in (spread(queries_nHe), keys_BSHe, values_BSHe))
    read_BAHe, _ = attend(attention, *heads, seen_B1AS, dropout=0.0, scaling=attention.scaling)
    return read_BAHe.flatten(2).flatten(0, 1).index_select(0, places_n)[None]
