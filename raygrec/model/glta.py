"""GLTA: graph nodes aligned with a frozen language model's token space, answered over the whole catalogue.

Paper: "Training Large Recommendation Models via Graph-Language Token Alignment" (arXiv 2502.18757).
"""

from dataclasses import replace
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.data.filters import first_occurrences
from raygrec.draws import Draws
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.backbone import Backbone
from raygrec.model.head import ItemRows, Targets
from raygrec.model.nodes import GraphReader, sum_rows
from raygrec.model.profiles import telling_terms
from raygrec.model.prompts import (
    Placed,
    PromptBatch,
    Symbols,
    as_targets,
    embed_symbols,
    expand,
    join_rows,
    padded,
    repeated,
    truncated,
)
from raygrec.model.trend import MOMENTS, READING, Trend

# What a draw is for: the last counter of every `Draws.uniform` here.
SHUFFLE, HOLDOUT, USER_DROPOUT, DROPOUT, EMPTY = 1, 2, 3, 4, 5


class ProfileConfig(StrictConfig):
    """The two texts about a user; each can be left out (ablations)."""

    profile: bool = True
    """Tags that sum up the items of the history."""
    prediction: bool = True
    """Words that foresee the user's interests."""
    source: Literal["extracted", "generated"] = "extracted"
    """[ours] `generated` needs a causal LM; an encoder extracts the most telling terms."""
    terms: int = Field(4, ge=1)
    """Terms (extracted) or tokens (generated) in each text."""
    decay: float = Field(0.6, gt=0, le=1)
    """Weight of an item per step back from the newest, for prediction terms of ordered histories."""


class GLTAConfig(StrictConfig):
    """The GLTA recipe; every ablation of the paper is a value here."""

    slots: int = Field(10, ge=1)
    """k, the number of answer slots."""
    head: Literal["linear", "tied"] = "linear"
    """`linear` is the paper's, an item's row has maps and a free part of its own; in `tied`, an item is recommended by
    the inner product of the hidden state with its own token (`ItemProjector`)."""
    equal_nodes: bool = False
    """[ours] Items' node vectors all have the same length. LightGCN's are the longer the more users an item has, which
    its bias can say alone."""
    text_vectors: bool = True
    """[ours] Item tokens and the head's rows start from the items' text vectors too, not from their nodes alone."""
    item_alignment: bool = True
    """Stage 2; without it both projectors are trained in stage 3."""
    tune_items: bool = True
    """[ours] Stage 3 goes on training the item projector, and an offset δ_i that is added to what it makes of each
    item's node; the paper freezes both projector and nodes."""
    user_token: Literal["aligned", "id", "none"] = "aligned"
    """`id` writes the user's number as plain text (the paper's ablation)."""
    user_vector: Literal["full", "leave_out"] = "leave_out"
    """[ours] Against node embeddings that know the training targets: `full` reads E_u as it is; `leave_out`
    propagates from the shown history only. `graph.folds` does the same for the item nodes."""
    user_dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a training prompt's user token is dropped out."""
    dropout: float = Field(0.4, ge=0, lt=1)
    """[ours] Stage 3 training: share of the hidden states' entries that the head does not see, and half that share
    of the item tokens'."""
    slot_seed: Literal["auto", "newest", "sum", "none"] = "auto"
    """[ours] What an answer slot's embedding is added to: the token of the newest item (`auto` where histories
    are ordered), the normalised sum of the history's item tokens (`auto` where they are not), or nothing; with
    either, the aligned user token too. A frozen LM has never learned to look up history and user from a slot; the
    residual stream carries them there."""
    texts: ProfileConfig = ProfileConfig()
    order: bool = True
    """[ours] Histories have the store's order, where it has one; false: they are sets, any of whose items may be
    targets."""
    max_history: int = Field(50, ge=1)
    """Newest items that stand in the prompt as tokens. Texts, user vector and slot seeds read the whole history."""
    history_loss: bool = True
    """[ours] Ordered histories: every history position also predicts its next item, under a causal mask, and
    stage 3 begins with prompts that are the histories alone: they train item tokens and head from all positions
    at a fraction of the tokens (`histories` in the run's config)."""
    targets: Literal["all", "sampled"] = "all"
    """[ours] Unordered histories: `sampled` trains slot j on one of the user's items, randomly shuffled (the
    paper's); `all` takes the expectation over the shuffles."""
    holdout: float = Field(0.5, gt=0, lt=1)
    """Unordered histories: up to this share of a user's training items becomes the targets of one prompt."""
    empty_histories: float = Field(0.0, ge=0, lt=1)
    """[ours] Share of stage 3's whole prompts that show no item, so that those of users without a history are no
    news. Items that a text was generated from are shown all the same."""
    trend: float | None = Field(None, gt=0, le=1)
    """[ours] Stores that are split in time: the model learns what a user wants beside what all users took lately, in so
    large a share of the training interactions (`Trend`); None: not beside anything."""
    alignment_items: int = Field(8, ge=2)
    """Items per prompt of stage 2."""
    alignment_tokens: int = Field(24, ge=1)
    """Description tokens per item in stage 2."""
    instruction: str = "history:"
    profile_lead: str = "; likes"
    prediction_lead: str = "; wants"
    user_lead: str = "; user"
    answer_lead: str = "; next:"

    @model_validator(mode="after")
    def _tied_items_are_tuned(self) -> Self:
        if self.head == "tied" and not self.tune_items:
            raise ValueError("head: tied wants tune_items, since a head of fixed tokens would have nothing to train")
        return self


def opening_tokens(tokenizer: object) -> list[int]:
    """The language model's own first token, where it has one."""
    opening = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    return [] if opening is None else [opening]


class Phrases:
    """The fixed wording, tokenised once; `begin` holds the LM's own opening token where it has one."""

    def __init__(self, tokenizer: object, config: GLTAConfig) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        self.begin = opening_tokens(tokenizer)
        self.instruction = encode(config.instruction)
        self.profile = encode(config.profile_lead)
        self.prediction = encode(config.prediction_lead)
        self.user = encode(config.user_lead)
        self.answer = encode(config.answer_lead)
        self.separator = encode(",")
        self.digits = [encode(str(digit)) for digit in range(10)]


class PromptBuilder:
    """Makes the prompts of both alignment stages and of recommending, from arrays alone.

    train: CSR of each user's training items. item_tokens / term_tokens: CSR of token ids. item_terms: CSR of
    term numbers. `written` holds generated texts, (profile, prediction) CSRs of token ids per user, for each
    of train, valid and test. shown_at_least: [U], how many of a user's first training items a training prompt
    must show: those that generated texts were made from. tables: [U], which fit of the item nodes a user's prompts
    read.
    """

    def __init__(
        self,
        config: GLTAConfig,
        symbols: Symbols,
        phrases: Phrases,
        train: CSR,
        ordered: bool,
        item_tokens: CSR,
        item_terms: CSR,
        term_tokens: CSR,
        term_weight: np.ndarray,
    ) -> None:
        self.config = config
        self.symbols = symbols
        self.phrases = phrases
        self.train = train
        self.ordered = ordered
        self.item_tokens = item_tokens
        self.item_terms = item_terms
        self.term_tokens = term_tokens
        self.term_weight = term_weight
        self.written: dict[str, tuple[CSR, CSR]] = {}
        self.shown_at_least: np.ndarray | None = None
        self.tables = np.zeros(len(train), dtype=np.int64)
        self.trend: Trend | None = None

    @property
    def causal(self) -> bool:
        return self.ordered and self.config.history_loss

    def training(self, users: np.ndarray, draws: Draws, whole: bool = True) -> PromptBatch:
        """Stage 3 prompts: part of each user's training items as history, targets from the others.

        whole: False leaves out all but the history, whose positions have targets where `causal`.
        """
        items = self.train.take(users)
        if not self.ordered:
            items = _shuffled_rows(items, users, draws, first=self._fixed_first(users))
        shown = self._shown(users, items.lengths, draws)
        if whole and self.config.empty_histories:
            empty = draws.uniform(users, EMPTY) < self.config.empty_histories
            shown = np.where(empty, 0 if self.shown_at_least is None else self.shown_at_least[users], shown)
        place = np.arange(len(items.indices)) - items.indptr[items.rows]
        seen = place < shown[items.rows]
        history = CSR.from_pairs(items.rows[seen], items.indices[seen], len(users))
        # An item that came before, shown or not, is no target: it may stand in the prompt.
        new = ~seen & first_occurrences(items.rows, items.indices)
        future = CSR.from_pairs(items.rows[new], items.indices[new], len(users))
        kept = draws.uniform(users, USER_DROPOUT) >= self.config.user_dropout
        batch = self._assemble(users, history, future, kept, "train", whole=whole)
        if self.trend is not None:
            batch.targets.moments = self._moments(users, batch)
        keys = (draws.uniform(users, DROPOUT) * 2**53).astype(np.int64)
        return replace(batch, dropout_keys=torch.from_numpy(keys))

    def recommending(
        self, users: np.ndarray, histories: CSR, stage: str = "test", slots: int | None = None
    ) -> PromptBatch:
        """Prompts that show `histories` (one row per user) and answer in `slots` slots (default k).

        stage: "valid" or "test", for texts that were generated for its histories.
        """
        nothing = CSR(np.zeros(len(users) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        batch = self._assemble(users, histories, nothing, np.ones(len(users), dtype=bool), stage, slots)
        return batch if self.trend is None else replace(batch, moment=READING[stage])

    def alignment(self, items: np.ndarray, draws: Draws) -> PromptBatch:
        """Stage 2 prompts: the tokens of n items, then their descriptions, shuffled, each to be matched.

        items: [B, n]. A description sees the item tokens and the descriptions before it; its last position,
        an answer slot, must name its item.
        """
        batch, count = items.shape
        order = np.argsort(draws.uniform(items, SHUFFLE), axis=1)
        asked = np.take_along_axis(items, order, axis=1)
        parts = [repeated(self.phrases.begin, batch), _grid(self.symbols.first_item + items)]
        segments = [np.zeros(part.indptr[-1], dtype=np.int64) for part in parts]
        for place in range(count):
            text = self.item_tokens.take(asked[:, place])
            text = truncated(text, self.config.alignment_tokens, keep="first")
            slot = repeated([self.symbols.first_slot], batch)
            parts += [text, slot]
            segments += [np.full(part.indptr[-1], place + 1) for part in (text, slot)]
        symbols = padded(join_rows(parts))
        levels = padded(join_rows([CSR(p.indptr, s) for p, s in zip(parts, segments, strict=True)]))
        answers = np.flatnonzero(symbols.ravel() == self.symbols.first_slot)
        nothing = torch.zeros(batch + 1, dtype=torch.int64)
        return PromptBatch(
            symbols=torch.from_numpy(symbols),
            segments=torch.from_numpy(levels),
            slots=torch.from_numpy(answers.reshape(batch, count)),
            answers=torch.from_numpy(answers),
            targets=as_targets(np.arange(batch * count), asked.ravel(), batch * count),
            history_indptr=nothing,
            history=torch.zeros(0, dtype=torch.int64),
            tables=torch.zeros(batch, dtype=torch.int64),
            user_kept=torch.ones(batch, dtype=torch.bool),
            prefix=len(self.phrases.begin),
        )

    def _fixed_first(self, users: np.ndarray) -> np.ndarray | None:
        return None if self.shown_at_least is None else self.shown_at_least[users]

    def _shown(self, users: np.ndarray, lengths: np.ndarray, draws: Draws) -> np.ndarray:
        """How many of each user's items the prompt shows: at least one, and one is left to predict."""
        limit = np.minimum(self.config.slots, lengths - 1)
        if not self.ordered:
            limit = np.maximum((lengths * self.config.holdout).astype(np.int64), np.minimum(1, lengths - 1))
        if self.shown_at_least is not None:
            limit = np.minimum(limit, lengths - self.shown_at_least[users])
        held_out = 1 + (draws.uniform(users, HOLDOUT) * np.maximum(limit, 1)).astype(np.int64)
        return np.maximum(lengths - np.minimum(held_out, np.maximum(limit, 0)), np.minimum(1, lengths))

    def _assemble(
        self,
        users: np.ndarray,
        history: CSR,
        future: CSR,
        kept: np.ndarray,
        stage: str,
        slots: int | None = None,
        whole: bool = True,
    ) -> PromptBatch:
        slots = (self.config.slots if slots is None else slots) if whole else 0
        shown = truncated(history, self.config.max_history)
        prefix = self.phrases.begin + self.phrases.instruction
        opening = repeated(prefix, len(users))
        nodes = CSR(shown.indptr, shown.indices.astype(np.int64) + self.symbols.first_item)
        tail = repeated([], len(users))
        if whole:
            texts, user = self._texts(users, history, stage), self._user(users)
            tail = join_rows([*texts, *user, *self._answer(len(users), slots)])
        symbols = padded(join_rows([opening, nodes, tail]))
        first_node = len(prefix)
        first_tail = first_node + shown.lengths
        starts = np.arange(len(users), dtype=np.int64) * symbols.shape[1]
        first_slot = starts + first_tail + tail.lengths - slots
        slot_positions = first_slot[:, None] + np.arange(slots)
        answers, targets = self._targets(shown, future, starts + first_node, slot_positions)
        return PromptBatch(
            symbols=torch.from_numpy(symbols),
            segments=torch.from_numpy(self._segments(symbols.shape, first_node, first_tail)),
            slots=torch.from_numpy(slot_positions),
            answers=torch.from_numpy(answers),
            targets=targets,
            history_indptr=torch.from_numpy(history.indptr),
            history=torch.from_numpy(history.indices.astype(np.int64)),
            tables=torch.from_numpy(self.tables[users]),
            user_kept=torch.from_numpy(kept),
            prefix=first_node,
        )

    def _segments(self, shape: tuple[int, int], first_node: int, first_tail: np.ndarray) -> np.ndarray:
        """Everything sees everything, or (causal) history item j sees only what stands before it."""
        if not self.causal:
            return np.zeros(shape, dtype=np.int64)
        place = np.arange(shape[1])
        causal = np.maximum(place - first_node + 1, 0)
        return np.where(place < first_tail[:, None], causal, self.config.max_history + 1)

    def _texts(self, users: np.ndarray, history: CSR, stage: str) -> list[CSR]:
        texts = self.config.texts
        if not (texts.profile or texts.prediction):
            return []
        if texts.source == "generated":
            profile, prediction = (text.take(users) for text in self.written[stage])
        else:
            decay, count = texts.decay if self.ordered else 1.0, texts.terms
            chosen = telling_terms(history, self.item_terms, self.term_weight, count, count, decay)
            profile, prediction = (expand(terms, self.term_tokens) for terms in chosen)
        parts: list[CSR] = []
        if texts.profile:
            parts += [repeated(self.phrases.profile, len(users)), profile]
        if texts.prediction:
            parts += [repeated(self.phrases.prediction, len(users)), prediction]
        return parts

    def _user(self, users: np.ndarray) -> list[CSR]:
        if self.config.user_token == "none":
            return []
        lead = repeated(self.phrases.user, len(users))
        if self.config.user_token == "aligned":
            return [lead, _grid((self.symbols.first_user + users)[:, None])]
        digits = self.phrases.digits
        return [lead, CSR.from_lists([[t for d in str(user) for t in digits[int(d)]] for user in users])]

    def _answer(self, rows: int, slots: int) -> list[CSR]:
        places = self.symbols.first_slot + np.arange(slots)
        return [repeated(self.phrases.answer, rows), repeated(places, rows)]

    def _targets(
        self, shown: CSR, future: CSR, first_node: np.ndarray, slots: np.ndarray
    ) -> tuple[np.ndarray, Targets]:
        """Answer positions that have a target, ascending by kind, and the targets."""
        place = np.arange(len(future.indices)) - future.indptr[future.rows]
        if self.ordered or self.config.targets == "sampled":
            used = place < slots.shape[1]
            positions, items = slots[future.rows[used], place[used]], future.indices[used]
        else:
            positions = slots[future.rows].ravel()
            items = np.repeat(future.indices, slots.shape[1])
        if self.causal:
            whole = join_rows([shown, truncated(future, 1, keep="first")])
            offset = np.arange(len(whole.indices)) - whole.indptr[whole.rows]
            following = (offset > 0) & first_occurrences(whole.rows, whole.indices)
            before = (first_node[whole.rows] + offset - 1)[following]
            positions = np.concatenate([before, positions])
            items = np.concatenate([whole.indices[following], items])
        answers, rows = np.unique(positions, return_inverse=True)
        return answers, as_targets(rows, items, len(answers))

    def _moments(self, users: np.ndarray, batch: PromptBatch) -> torch.Tensor:
        """[P]: when each answer position of training prompts is asked, before the first of its targets."""
        rows = batch.targets.rows.numpy()
        asked = users[batch.answers.numpy()[rows] // batch.symbols.shape[1]]
        moments = np.full(len(batch.answers), MOMENTS)
        np.minimum.at(moments, rows, self.trend.moments(asked, batch.targets.items.numpy()))
        return torch.from_numpy(moments)


class GLTA(GraphReader):
    """The trained parts (two projectors, answer slots, head) around a frozen backbone."""

    def __init__(
        self,
        config: GLTAConfig,
        backbone: Backbone,
        symbols: Symbols,
        nodes: NodeEmbeddings,
        item_texts: torch.Tensor | None,
        token_scale: float,
        ordered: bool = True,
        trend_MI: torch.Tensor | None = None,
    ) -> None:
        read = (backbone.freeze(), symbols, nodes, item_texts, token_scale, config.head == "tied", config.dropout)
        super().__init__(*read, free=config.tune_items, equal=config.equal_nodes, trend_MI=trend_MI)
        self.config = config
        self.terms = {"cross_entropy": 1.0}
        self.slot_seed = {"auto": "newest" if ordered else "sum"}.get(config.slot_seed, config.slot_seed)
        self.answer_slots = nn.Embedding(symbols.slots, backbone.width)
        nn.init.normal_(self.answer_slots.weight, std=token_scale)

    def forward(self, batch: PromptBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's answer positions; divide by their global count."""
        return self.recommending_loss(self.hidden(batch, batch.answers), batch)

    def slot_logits(self, batch: PromptBatch, slots: int | None = None) -> torch.Tensor:
        """Logits [B, s, I] of the first s answer slots (default: all k)."""
        positions = batch.slots[:, :slots]
        asked = positions.flatten()
        hidden = self.hidden(batch, asked).at(asked)
        tables = batch.tables.repeat_interleave(positions.shape[1])
        logits = self.matched(hidden, tables).view(*positions.shape, -1)
        return logits if batch.moment is None else logits + self.trend_MI[batch.moment]

    def hidden(self, batch: PromptBatch, asked: torch.Tensor | None = None) -> Placed:
        """Last hidden states, of these flat positions or of all."""
        given = self.embed(batch), batch.attention, batch.lengths
        return self.backbone.read(*given, prefix=batch.prefix, asked=asked)

    def embed(self, batch: PromptBatch) -> Placed:
        """Embeddings of the symbols: tokens, and in between projected nodes and answer slots."""

        def items(numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            return self.dropped(self.item_tokens(numbers, batch.tables[rows]), batch, rows, columns)

        here = (batch.symbols >= self.symbols.first_user) & (batch.symbols < self.symbols.first_slot)
        user_rows = here.nonzero()[:, 0]
        user_tokens = self._user_tokens(batch, batch.symbols[here] - self.symbols.first_user, user_rows)

        def users(numbers: torch.Tensor, rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return user_tokens

        def slots(numbers: torch.Tensor, rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            tokens = self.answer_slots(numbers)
            if self.slot_seed == "none":
                return tokens
            return tokens + self._slot_seeds(batch).index_add(0, user_rows, user_tokens)[rows]

        return embed_symbols(batch.symbols, self.symbols, self.backbone.embed, items, users, slots)

    def train_stage_2(self) -> None:
        """Gradients where stage 2 wants them: matching descriptions is for the maps, not for what single items have
        of their own."""
        self.user_projector.requires_grad_(False)
        for rows in self.modules():
            if isinstance(rows, ItemRows) and rows.free is not None:
                rows.free.requires_grad_(False)

    def start_slots(self) -> None:
        """Stage 3's answer slots start from their seed alone, where they have one: not from noise, and not from what
        stage 2's slot has learned about descriptions."""
        if self.slot_seed != "none":
            nn.init.zeros_(self.answer_slots.weight)

    def train_stage_3(self, aligned: bool) -> None:
        """Slots as `start_slots`, and gradients where stage 3 wants them; aligned: stage 2 has trained the items."""
        self.start_slots()
        self.item_projector.requires_grad_(self.config.tune_items or not aligned)
        self.user_projector.requires_grad_(self.config.user_token == "aligned")

    def _slot_seeds(self, batch: PromptBatch) -> torch.Tensor:
        """What each prompt's answer slots start from besides its user token: [B, D], the token of the newest item, or
        of the sum of items."""
        counts = batch.history_indptr.diff()
        if self.slot_seed == "newest":
            shown = torch.cat([batch.history, batch.history.new_zeros(1)])  # prompts may show nothing
            vectors = self.item_rows(shown[(batch.history_indptr[1:] - 1).clamp(min=0)], batch.tables)
        else:
            tables = batch.tables.repeat_interleave(counts, output_size=len(batch.history))
            entries = self.item_rows(batch.history, tables)
            vectors = sum_rows(entries, counts) / counts.clamp(min=1).sqrt()[:, None]
        return self.item_projector.projected(vectors) * (counts > 0)[:, None]

    def _user_tokens(self, batch: PromptBatch, users: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """V_u = W_u E_u + b_u [n, D] of the prompts' users; E_u zero where dropped out."""
        if self.config.user_vector == "leave_out":
            vectors = self.nodes.users(batch)[rows]
        else:
            vectors = self.nodes.users_Ud[users]
        return self.user_projector(vectors * batch.user_kept[rows, None])


def _grid(values: np.ndarray) -> CSR:
    rows, columns = values.shape
    return CSR(np.arange(rows + 1, dtype=np.int64) * columns, values.ravel())


def _shuffled_rows(rows: CSR, users: np.ndarray, draws: Draws, first: np.ndarray | None = None) -> CSR:
    """Each row in random order; with `first`, its first entries stay where they are."""
    key = draws.uniform(users[rows.rows], np.asarray(rows.indices), SHUFFLE)
    if first is not None:
        place = np.arange(len(rows.indices)) - rows.indptr[rows.rows]
        key = np.where(place < first[rows.rows], place - len(key), key)
    order = np.lexsort((key, rows.rows))
    return CSR(rows.indptr, np.asarray(rows.indices)[order])
