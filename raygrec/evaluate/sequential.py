"""Sequential baselines without a language model: SASRec with full-softmax cross-entropy, and a BSARec-like filter.

Papers: "Self-Attentive Sequential Recommendation" (Kang and McAuley, ICDM 2018) and "An Attentive Inductive Bias for
Sequential Recommendation beyond the Self-Attention" (Shin et al., BSARec, AAAI 2024). Both were published with other
losses or prompts; what differs here is marked [ours].
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.data.filters import first_occurrences
from raygrec.draws import Draws
from raygrec.model.backbone import passes
from raygrec.model.dropout import prompt_dropout
from raygrec.model.head import Cells, TiedHead
from raygrec.model.nodes import scaled_texts
from raygrec.model.prompts import Placed, PromptBatch, Symbols, as_targets, newest, padded, truncated
from raygrec.model.successors import SuccessorConfig, SuccessorLogits, Successors

DROPOUT = 1  # what a draw is for: the last counter of every `Draws.uniform` here
INITIAL_SCALE = 0.02
USES = 4  # dropouts in a layer

# (values [B, T, n], what they are) -> values with some entries dropped
Drop = Callable[[torch.Tensor, int], torch.Tensor]


class SequentialConfig(StrictConfig):
    """A causal transformer over item embeddings, which its output shares."""

    width: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    """Of the embeddings, and of what attention, filter and feed-forward network add; attention weights keep all."""
    max_history: int = Field(50, ge=1)
    predicts: Literal["every", "newest"] = "every"
    """`every`: every item of a history predicts the next, in one pass, and places count from the oldest item. `newest`:
    each beginning of a history is a prompt of its own, as in BSARec's code, whose newest item alone predicts; places
    count from that, and the filter may look ahead. A pass then holds every beginning of `micro_batch` histories."""
    text_vectors: bool = False
    """A linear map of the frozen language model's text vectors is added to the item embeddings."""
    successors: SuccessorConfig | None = None
    """[ours] What other users took after the items of the history, added to the logits (`Successors`)."""
    filter: Literal["none", "frequency"] = "none"
    """`frequency`: BSARec's rescaler of low and high frequencies beside self-attention. [ours] Causal where every item
    predicts."""
    alpha: float = Field(0.7, ge=0, le=1)
    """Share of the filter; self-attention has the rest."""
    cutoff: int = Field(5, ge=1)
    """c, how many of a window's frequencies, the lowest, are low; each but the constant counts twice."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.successors is not None:
            self.successors.check(self.text_vectors)
        return self

    @property
    def name(self) -> str:
        method = "SASRec-CE" if self.filter == "none" else "BSARec-like"
        after = [] if self.successors is None else [self.successors.name]
        return " + ".join([method, *["text"] * self.text_vectors, *after])


class SequencePrompts:
    """Makes prompts that are the items of a history and nothing else, oldest first, padded at the end.

    train: CSR of each user's training items in time order. texts: [I, t], the items' vectors, for `Successors`.
    """

    causal = True

    def __init__(self, config: SequentialConfig, num_items: int, train: CSR, texts: torch.Tensor | None = None) -> None:
        self.max_history, self.predicts = config.max_history, config.predicts
        self.symbols = Symbols(text=0, items=num_items, users=0, slots=0)
        self.train = train
        self.successors: Successors | None = None
        if config.successors is not None:
            self.successors = Successors(train, num_items, config.successors, texts)

    def training(self, users: np.ndarray, draws: Draws) -> PromptBatch:
        """Each user's training items but the last; every one predicts the next, unless that came before already."""
        rows = self.train.take(users)
        entries = np.arange(len(rows.indices))
        later = rows.indptr[rows.rows + 1] - 1 - entries
        shown = entries[(later >= 1) & (later <= self.max_history)]
        history = CSR.from_pairs(rows.rows[shown], rows.indices[shown], len(users))
        answered = first_occurrences(rows.rows, rows.indices)[shown + 1]
        place = np.arange(len(shown)) - history.indptr[history.rows]
        count = int(answered.sum())
        targets = as_targets(np.arange(count), rows.indices[shown + 1][answered], count)
        if self.predicts == "newest":
            batch = self._assemble(_beginnings(history, np.flatnonzero(answered), place[answered] + 1))
            answers, drawn = batch.slots[:, 0], draws.uniform(users[history.rows[answered]], DROPOUT, place[answered])
        else:
            batch = self._assemble(history)
            answers = torch.from_numpy((history.rows * batch.symbols.shape[1] + place)[answered])
            drawn = draws.uniform(users, DROPOUT)
        keys = torch.from_numpy((drawn * 2**53).astype(np.int64))
        after = self._after(users, history, np.flatnonzero(answered))
        return replace(batch, answers=answers, targets=targets, dropout_keys=keys, successors=after)

    def recommending(
        self, users: np.ndarray, histories: CSR, stage: str = "test", slots: int | None = None
    ) -> PromptBatch:
        """Prompts that show `histories` and answer at their newest item. `stage`, `slots`: as in GLTA, unused."""
        shown = truncated(histories, self.max_history)
        return replace(self._assemble(shown), successors=self._after(users, shown, newest(shown)))

    def _after(self, users: np.ndarray, shown: CSR, read: np.ndarray) -> Cells | None:
        return None if self.successors is None else self.successors.after(users, shown, read)

    def _assemble(self, history: CSR) -> PromptBatch:
        symbols = padded(history)
        count, width = symbols.shape
        newest = np.arange(count) * width + np.maximum(history.lengths - 1, 0)
        none = np.zeros(0, dtype=np.int64)
        return PromptBatch(
            symbols=torch.from_numpy(symbols),
            segments=torch.arange(width).expand(count, width),
            slots=torch.from_numpy(newest[:, None]),
            answers=torch.from_numpy(none),
            targets=as_targets(none, none, 0),
            history_indptr=torch.from_numpy(history.indptr),
            history=torch.from_numpy(history.indices.astype(np.int64)),
            tables=torch.zeros(count, dtype=torch.int64),
            user_kept=torch.ones(count, dtype=torch.bool),
        )


def _beginnings(history: CSR, ends: np.ndarray, lengths: np.ndarray) -> CSR:
    """A row for each entry of `ends`: the so many items of its row up to it."""
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.repeat(ends + 1 - lengths - indptr[:-1], lengths) + np.arange(indptr[-1])
    return CSR(indptr, np.asarray(history.indices)[entries])


class ItemTable(nn.Module):
    """Item embeddings [I, d], in and out: free ones, plus a map of text vectors [I, t] where there are any."""

    def __init__(self, num_items: int, width: int, texts_It: torch.Tensor | None) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(num_items, width) * INITIAL_SCALE)
        self.register_buffer("texts", None if texts_It is None else scaled_texts(texts_It), persistent=False)
        self.from_text = None if texts_It is None else nn.Linear(texts_It.shape[1], width, bias=False)

    def forward(self) -> torch.Tensor:
        return self.free if self.from_text is None else self.free + self.from_text(self.texts)


class FrequencyFilter(nn.Module):
    """BSARec's frequency rescaler: LN(x + dropout(low + β² high)), with high = x − low and one β per column.

    The paper transforms the whole window of `max_history` positions, so every position mixes in those after it; it
    can train the last position only. [ours] Zeros stand before the history's start. [ours] Where every item predicts,
    low is at each position what the paper's low-pass gives the last position of the window that ends there: a causal
    filter with the same kernel.
    """

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        window = config.max_history
        passed = torch.arange(window // 2 + 1) <= config.cutoff // 2
        self.causal = config.predicts == "every"
        self.register_buffer("kernel", torch.fft.irfft(passed.to(torch.complex64), n=window), persistent=False)
        self.root_beta = nn.Parameter(torch.randn(config.width))  # the authors' start
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x_BTd: torch.Tensor, drop: Drop, use: int) -> torch.Tensor:
        place = torch.arange(x_BTd.shape[1], device=x_BTd.device)
        lag_TT = place[:, None] - place
        share_TT = self.kernel[lag_TT % len(self.kernel)]
        low_BTd = (share_TT * (lag_TT >= 0) if self.causal else share_TT) @ x_BTd
        return self.norm(x_BTd + drop(low_BTd + self.root_beta.square() * (x_BTd - low_BTd), use))


class Layer(nn.Module):
    """Causal self-attention, mixed with the filter where there is one, then a feed-forward network; norms come last."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.alpha = config.heads, config.alpha
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.filter = FrequencyFilter(config) if config.filter == "frequency" else None
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTd: torch.Tensor, drop: Drop, use: int) -> torch.Tensor:
        mixed_BTd = self.attention_norm(x_BTd + drop(self._attend(x_BTd), use))
        if self.filter is not None:
            mixed_BTd = self.alpha * self.filter(x_BTd, drop, use + 1) + (1 - self.alpha) * mixed_BTd
        inner = drop(functional.gelu(self.inner(mixed_BTd)), use + 2)
        return self.norm(mixed_BTd + drop(self.outer(inner), use + 3))

    def _attend(self, x_BTd: torch.Tensor) -> torch.Tensor:
        # Padding stands at the end, where the causal mask hides it.
        parts = self.attention_in(x_BTd).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads_BHTe = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.attention_out(heads_BHTe.transpose(1, 2).flatten(2))


class Sequential(nn.Module):
    """SASRec or its BSARec-like sibling; item_texts [I, t] where the config reads text vectors."""

    def __init__(self, config: SequentialConfig, symbols: Symbols, item_texts: torch.Tensor | None) -> None:
        super().__init__()
        self.config, self.symbols = config, symbols
        self.terms = {"cross_entropy": 1.0}
        self.table = ItemTable(symbols.items, config.width, item_texts)
        self.places = nn.Embedding(config.max_history, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = TiedHead(symbols.items)
        self.successors = None if config.successors is None else SuccessorLogits(config.successors.kinds)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_SCALE)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, batch: PromptBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's answer positions; divide by their global count."""
        rows_Id = self.table()
        answers_Pd = self.hidden(batch, rows_Id).at(batch.answers)
        return self.head(answers_Pd, rows_Id, batch.targets, added=self._added(batch))

    def slot_logits(self, batch: PromptBatch, slots: int | None = None) -> torch.Tensor:
        """Logits [B, 1, I] at the newest item."""
        rows_Id = self.table()
        return self.head(self.hidden(batch, rows_Id).at(batch.slots[:, 0]), rows_Id, added=self._added(batch))[:, None]

    def _added(self, batch: PromptBatch) -> Cells | None:
        found = batch.successors
        return None if self.successors is None else found.weighing(self.successors(found.weights))

    def hidden(self, batch: PromptBatch, rows_Id: torch.Tensor) -> Placed:
        """Last hidden states, by `passes` on prompts of like length."""
        where_BT, parts_nd, count = torch.zeros_like(batch.symbols), [], 0
        for mine, width in passes(batch.lengths, self):
            rows = torch.tensor(mine or [0][: len(where_BT)], dtype=torch.int64, device=where_BT.device)
            keys = None if batch.dropout_keys is None else batch.dropout_keys[rows]
            parts_nd.append(self._read(batch.symbols[rows, :width], keys, rows_Id).flatten(0, 1))
            if mine:  # a pass on no prompt of its own takes part, and is not looked at
                where_BT[rows, :width] = count + torch.arange(len(parts_nd[-1]), device=rows.device).view(-1, width)
            count += len(parts_nd[-1])
        return Placed(torch.cat(parts_nd), where_BT)

    def _read(self, symbols_BT: torch.Tensor, keys_B: torch.Tensor | None, rows_Id: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, d]; zero in padding."""
        shown_BT = symbols_BT >= 0
        shown_BT1 = shown_BT[..., None]
        items_BTd = functional.embedding(symbols_BT.clamp(min=0), rows_Id)
        places_BT = torch.arange(shown_BT.shape[1], device=shown_BT.device).expand_as(shown_BT)
        if self.config.predicts == "newest":
            places_BT = (shown_BT.sum(1, keepdim=True) - 1 - places_BT).clamp(min=0)

        def drop(values_BTn: torch.Tensor, use: int) -> torch.Tensor:
            return values_BTn if keys_B is None else prompt_dropout(values_BTn, self.config.dropout, keys_B, use)

        x_BTd = drop(self.norm(items_BTd + self.places(places_BT)), 0) * shown_BT1
        for number, layer in enumerate(self.layers):
            x_BTd = layer(x_BTd, drop, 1 + USES * number) * shown_BT1
        return x_BTd
