"""GAL-Rec: a language model fine-tuned to imitate a graph network's aggregation, hop by hop.

Paper: "Enhancing Collaborative Semantics of Language Model-Driven Recommendations via Graph-Aware Learning"
(arXiv 2406.13235). What it leaves open is our reading, marked [ours], and a value of the config.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.func import functional_call

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.data.filters import first_occurrences
from raygrec.draws import Draws
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.graph.neighbours import NeighbourConfig, NeighbourSampler
from raygrec.model.backbone import Backbone, LoRAConfig
from raygrec.model.contrast import EMPTY, MomentumCopy, NegativeQueue, contrast_terms
from raygrec.model.head import Cells, Targets
from raygrec.model.nodes import GraphReader
from raygrec.model.prompts import (
    Placed,
    PromptBatch,
    Symbols,
    as_targets,
    embed_symbols,
    expand,
    join_rows,
    newest,
    padded,
    repeated,
    truncated,
)
from raygrec.model.successors import SuccessorConfig, Successors

HOPS = 3
# What a draw is for: the second counter of every `Draws.uniform` here or a later one; neighbours have the use first.
ITEM, DROPOUT, CONTRASTED = 1, 2, 3


class PairConfig(StrictConfig):
    """One InfoNCE term: the anchor's hop is pulled to the positive's hop of the same node."""

    side: Literal["user", "item"]
    anchor: int = Field(ge=0, lt=HOPS)
    positive: int = Field(2, ge=0, lt=HOPS)
    weight: Literal["l1", "l2", "l3"]


class ContrastConfig(StrictConfig):
    """The graph-aware learning module: λ1 L1 + λ2 L2 + λ3 L3."""

    l1: float = Field(0.1, ge=0)
    l2: float = Field(0.1, ge=0)
    l3: float = Field(0.1, ge=0)
    pairs: tuple[PairConfig, ...] = (
        PairConfig(side="user", anchor=0, weight="l1"),
        PairConfig(side="user", anchor=1, weight="l2"),
        PairConfig(side="item", anchor=0, weight="l3"),
        PairConfig(side="item", anchor=1, weight="l3"),
    )
    """[ours] L1: user, 2-hop against 0-hop. L2: user, 2-hop against 1-hop. L3: item, 2-hop against both. The 2-hop
    side gives the candidates, so that all pairs of a side share one queue."""
    temperature: float = Field(0.1, gt=0)
    queue: int = Field(1024, ge=0)
    """Length of the queues of negatives, one for users and one for items; 0 leaves the batch's own. [ours] Pairs of
    a side with another positive hop have a queue of their own, so that all its candidates are of one kind."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """MoCo's momentum encoder, such as 0.999: all positives, and with them the queue, then come from a second copy
    of what makes representations that follows it slowly and gets no gradient; anchors alone do. None: both sides
    are of the model itself and both get gradient. Costs a second pass without gradient, and that copy of what is
    trained."""
    projection: int | None = Field(None, ge=1)
    """[ours] MoCo v2's projection head: hops are compared after two layers with so many entries at the end, which
    nothing else reads. None: the hidden states themselves are compared."""
    users: float = Field(0.2, gt=0, le=1)
    """[ours] Share of the user prompts that are contrasted. Only these have the two-hop segment in training, unless
    it recommends."""
    items: float = Field(0.2, ge=0, le=1)
    """[ours] Item prompts per user prompt: a user lends one item of its history with this probability."""

    @model_validator(mode="after")
    def _one_side_per_weight(self) -> Self:
        for weight in ("l1", "l2", "l3"):
            if len({pair.side for pair in self.pairs if pair.weight == weight}) > 1:
                raise ValueError(f"pairs: those of {weight} must all be of users or all of items")
        return self

    @property
    def compared(self) -> list[PairConfig]:
        """The pairs that weigh anything."""
        return [pair for pair in self.pairs if getattr(self, pair.weight) > 0]

    def active(self, side: str) -> list[PairConfig]:
        """Those of a side."""
        return [pair for pair in self.compared if pair.side == side]


class GALRecConfig(StrictConfig):
    """The GAL-Rec recipe; every reading and every ablation is a value here."""

    neighbours: NeighbourConfig = NeighbourConfig()
    contrast: ContrastConfig = ContrastConfig()
    graph_vectors: bool = True
    """External embeddings: the LightGCN vector in a node's token, and in the head's row of an item. Without it no
    graph is pretrained, and users are known by the texts of their items (`nodes_of_texts`)."""
    equal_nodes: bool = False
    """[ours] Items' node vectors all have the same length. LightGCN's are the longer the more users an item has, which
    its bias can say alone."""
    text_vectors: bool = True
    """External embeddings: the frozen text vector in an item's token, and in the head's row."""
    tuning: Literal["full", "lora", "frozen"] = "full"
    """`full` trains the language model but for its token table; `lora` adapters of it; `frozen` what is around it."""
    backbone_lr: float = Field(0.1, gt=0)
    """Learning rate of a fully tuned language model as a share of the others'; that of adapters is `lora.lr`."""
    lora: LoRAConfig = LoRAConfig()
    readout: Literal["history", "hop1", "hop2"] = "history"
    """[ours] Which position recommends: the newest history item's, which like all before it was trained to name the
    next, or a task token's, which has one target a prompt."""
    history_sees_user: bool = False
    """[ours] The literal block order lets history items see the 0-hop segment; the user's vector is made of the
    very items that the history positions must predict, so by default they do not."""
    max_history: int = Field(50, ge=1)
    title_tokens: int = Field(0, ge=0, le=64)
    """External embeddings: so many first tokens of its title follow an item's token in a user's history and in the
    item's own prompt. An item's last token names the next."""
    successors: SuccessorConfig | None = None
    """[ours] What other users took after the items of the history, added to the logits (`Successors`)."""
    head: Literal["linear", "tied"] = "tied"
    """`tied`: an item is recommended by the inner product of the hidden state with its own token (`ItemProjector`), as
    masked language models name words; in `linear` its row has a node map, text map and free part of its own."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Share of the hidden states' entries that the head does not see, and half that share of the node tokens'."""
    layer_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what each layer of the language model adds to its hidden states that is dropped in training."""

    @property
    def name(self) -> str:
        """That of the method in tables; without node vectors and contrast the language model reads no graph."""
        plain = self.graph_vectors or self.contrast.compared or not self.text_vectors
        if self.successors is None:
            return "GAL-Rec" if plain else "GAL-Rec, texts alone"
        return f"GAL-Rec{' +' if plain else ', texts and'} {self.successors.name}"

    @model_validator(mode="after")
    def _shares_by_texts(self) -> Self:
        if self.successors is not None:
            self.successors.check(self.text_vectors)
        return self

    @property
    def longest_prompt(self) -> int:
        """Symbols of a prompt at most, with one to open it."""
        item = 1 + self.title_tokens
        return 1 + item + max(self.max_history * item, self.neighbours.one_hop) + self.neighbours.two_hop + HOPS


@dataclass(frozen=True)
class HopBatch(PromptBatch):
    """R prompts with hop segments, users' first, then items'.

    hops: [R, 3] int64, flat positions of the task tokens; −1 where one is left out. own: [R, T] bool, the 0-hop
    segment, which sees itself and the prompt's opening only.
    nodes: [R] int64, user or item numbers. num_users: how many of the R are users. contrasted: [R] bool, whose hops
    are compared. counts: [4], answer positions and the `anchors` of L1 to L3.
    """

    hops: torch.Tensor | None = None
    own: torch.Tensor | None = None
    nodes: torch.Tensor | None = None
    num_users: int = 0
    contrasted: torch.Tensor | None = None
    anchors: tuple[int, int, int] = (0, 0, 0)

    @property
    def counts(self) -> torch.Tensor:
        return torch.tensor([len(self.answers), *self.anchors], dtype=torch.float64)

    def lengths_to(self, hops: int) -> torch.Tensor:
        """[R] symbols up to the task token of the first `hops` hops; all where that is left out."""
        ends = self.hops[:, hops - 1]
        return torch.where(ends >= 0, ends % self.symbols.shape[1] + 1, self.lengths)

    @property
    def attention(self) -> torch.Tensor:
        """[R, T, T] bool: block-causal between segments, but for the 0-hop segment."""
        other = ~self.own & (self.segments > 0)
        return super().attention & ~(self.own[:, :, None] & other[:, None, :])


class HopPrompts:
    """Makes GAL-Rec's prompts from arrays: `[begin] node <hop0> | neighbours <hop1> | two hops away <hop2>`.

    The node stands before its neighbours, so that its place does not tell how many there are. A prompt that is not
    contrasted and whose newest history item recommends is `[begin] neighbours` alone: nothing would read the rest.

    train: CSR of each user's training items in time order; by_item: the same edges by item. `opening` holds the
    language model's own first token, where it has one. titles: the token ids of each item's title, of which the
    first `title_tokens` follow the item's node; not read where these are 0. texts: [I, t], the items' vectors, for
    `Successors`. tables: [U], which fit of the item nodes a
    user's prompts read.
    """

    def __init__(
        self,
        config: GALRecConfig,
        symbols: Symbols,
        opening: list[int],
        train: CSR,
        by_item: CSR,
        titles: CSR | None = None,
        texts: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        nodes = _column(symbols.first_item + np.arange(symbols.items))
        shown = [truncated(titles, config.title_tokens, keep="first")] if config.title_tokens else []
        self.items = join_rows([nodes, *shown])
        self.symbols = symbols
        self.opening = opening
        self.train = train
        self.sampler = NeighbourSampler(train, by_item, config.neighbours)
        self.successors: Successors | None = None
        if config.successors is not None:
            self.successors = Successors(train, symbols.items, config.successors, texts)
        self.causal = True
        self.tables = np.zeros(len(train), dtype=np.int64)
        # Every user's training target, not only those of a batch: prompts must not depend on their batch.
        users = np.flatnonzero(train.lengths)
        self.hidden = self.sampler.edges(users, np.asarray(train.indices)[train.indptr[users + 1] - 1])

    def training(self, users: np.ndarray, draws: Draws) -> HopBatch:
        """Each user's training items but the last, which every earlier position and the read-out lead up to;
        besides, prompts of some items of these histories."""
        rows = self.train.take(users)
        place = np.arange(len(rows.indices)) - rows.indptr[rows.rows]
        last = place == rows.lengths[rows.rows] - 1
        history = CSR.from_pairs(rows.rows[~last], rows.indices[~last], len(users))
        target = CSR.from_pairs(rows.rows[last], rows.indices[last], len(users))
        items = self._lent_items(users, history, draws) if self._contrasts("item") else np.zeros(0, dtype=np.int64)
        contrasted = (draws.uniform(users, CONTRASTED) < self.config.contrast.users) & self._contrasts("user")
        two_hops = contrasted | (self.config.readout == "hop2")
        batch, shown, read = self._assemble(users, history, target, items, draws, two_hops, contrasted)
        nodes = np.concatenate([users, items + len(self.train)])
        keys = (draws.uniform(nodes, np.arange(len(nodes)) >= len(users), DROPOUT) * 2**53).astype(np.int64)
        return replace(batch, dropout_keys=torch.from_numpy(keys), successors=self._after(users, shown, read))

    def recommending(
        self, users: np.ndarray, histories: CSR, stage: str = "test", slots: int | None = None
    ) -> HopBatch:
        """Prompts that show `histories` and answer at the read-out position. `stage`, `slots`: as in GLTA, unused."""
        nothing = CSR(np.zeros(len(users) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        none = np.zeros(0, dtype=np.int64)
        two_hops = np.full(len(users), self.config.readout == "hop2")
        batch, shown, _ = self._assemble(users, histories, nothing, none, Draws(0), two_hops, np.zeros_like(two_hops))
        return replace(batch, successors=self._after(users, shown, newest(shown)))

    def describing(self, users: np.ndarray, histories: CSR, draws: Draws) -> HopBatch:
        """Prompts that show `histories` and have all hops, for `GALRec.representations`."""
        nothing = CSR(np.zeros(len(users) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        none = np.zeros(0, dtype=np.int64)
        every = np.ones(len(users), dtype=bool)
        return self._assemble(users, histories, nothing, none, draws, every, ~every)[0]

    def _after(self, users: np.ndarray, shown: CSR, read: np.ndarray) -> Cells | None:
        return None if self.successors is None else self.successors.after(users, shown, read)

    def _contrasts(self, side: str) -> bool:
        return bool(self.config.contrast.active(side))

    def _lent_items(self, users: np.ndarray, history: CSR, draws: Draws) -> np.ndarray:
        lends = (draws.uniform(users, ITEM, 0) < self.config.contrast.items) & (history.lengths > 0)
        place = (draws.uniform(users, ITEM, 1) * history.lengths).astype(np.int64)
        return np.asarray(history.indices)[(history.indptr[:-1] + place)[lends]].astype(np.int64)

    def _assemble(
        self,
        users: np.ndarray,
        history: CSR,
        target: CSR,
        items: np.ndarray,
        draws: Draws,
        two_hops: np.ndarray,
        contrasted: np.ndarray,
    ) -> tuple[HopBatch, CSR, np.ndarray]:
        """The prompts, the part of `history` that they show, and the newest entry of it that each answer knows."""
        base, top, first = self.symbols, self.config.max_history + 1, len(self.opening)
        sees_user = self.config.history_sees_user
        shown = truncated(history, self.config.max_history)
        count = len(users) + len(items)
        # Where nothing reads the own segment and the task tokens, a prompt is its history alone.
        bare = ~two_hops & (history.lengths > 0) & (self.config.readout == "history" and not sees_user)
        whole, has_two = (np.concatenate([asked, np.full(len(items), True)]) for asked in (~bare, two_hops))
        own = _where(whole, _stacked([_column(base.first_user + users), self.items.take(items)]))
        place = np.arange(len(shown.indices)) - shown.indptr[shown.rows]
        one = [expand(shown, self.items)]
        symbols_of = self.items.lengths[shown.indices]
        one_levels = [CSR(one[0].indptr, np.repeat(place + 1, symbols_of))]
        # Where the last symbol of each shown item stands in its segment.
        item_ends = np.cumsum(symbols_of) - one[0].indptr[shown.rows] - 1
        two = [self._users_two_hops_away(users, shown, draws, two_hops)]
        if len(items):
            near, far = self.sampler.of_items(items, draws, self.hidden)
            one.append(CSR(near.indptr, base.first_user + near.indices.astype(np.int64)))
            one_levels.append(CSR(near.indptr, np.ones(len(near.indices), dtype=np.int64)))
            two.append(CSR(far.indptr, base.first_item + far.indices.astype(np.int64)))
        one, one_levels, two = _stacked(one), _stacked(one_levels), _stacked(two)
        tokens = [
            _where(kept, repeated([base.first_slot + hop], count)) for hop, kept in enumerate((whole, whole, has_two))
        ]
        own_level = 0 if sees_user else top  # neighbours, which are below, do not see it there
        parts = [
            (repeated(self.opening, count), 0),
            (own, own_level),
            (tokens[0], own_level),
            (one, one_levels),
            (tokens[1], top),
            (two, top + 1),
            (tokens[2], top + 2),
        ]
        symbols = padded(join_rows([part for part, _ in parts]))
        levels = padded(join_rows([_like(part, level) for part, level in parts]))
        columns, starts = np.arange(symbols.shape[1]), np.arange(count, dtype=np.int64) * symbols.shape[1]
        hop0 = starts + first + own.lengths
        first_of_one = hop0 + whole
        hop1 = first_of_one + one.lengths
        hop2 = hop1 + two.lengths + 1
        last_of_one = np.where(one.lengths > 0, first_of_one + one.lengths - 1, hop0)
        readout = {"history": last_of_one, "hop1": hop1, "hop2": hop2}[self.config.readout][: len(users)]
        own_places = (columns >= first) & (columns <= first + own.lengths[:, None])
        hops = np.where(np.stack([whole, whole, has_two], axis=1), np.stack([hop0, hop1, hop2], axis=1), -1)
        answers, read, targets = _targets(history, shown, target, first_of_one[shown.rows] + item_ends, readout)
        batch = HopBatch(
            symbols=torch.from_numpy(symbols),
            segments=torch.from_numpy(levels),
            slots=torch.from_numpy(readout[:, None]),
            answers=torch.from_numpy(answers),
            targets=targets,
            history_indptr=torch.from_numpy(history.indptr),
            history=torch.from_numpy(history.indices.astype(np.int64)),
            tables=torch.from_numpy(np.concatenate([self.tables[users], np.zeros(len(items), dtype=np.int64)])),
            user_kept=torch.ones(len(users), dtype=torch.bool),
            hops=torch.from_numpy(hops),
            own=torch.from_numpy(own_places & whole[:, None]),
            nodes=torch.from_numpy(np.concatenate([users, items]).astype(np.int64)),
            num_users=len(users),
            contrasted=torch.from_numpy(np.concatenate([contrasted, np.full(len(items), True)])),
            anchors=self._anchors(int(contrasted.sum()), len(items)),
        )
        return batch, shown, read

    def _anchors(self, users: int, items: int) -> tuple[int, int, int]:
        sides = {pair.weight: users if pair.side == "user" else items for pair in self.config.contrast.pairs}
        return tuple(sides.get(weight, 0) for weight in ("l1", "l2", "l3"))

    def _users_two_hops_away(self, users: np.ndarray, shown: CSR, draws: Draws, asked: np.ndarray) -> CSR:
        """[B] rows of symbols, empty but for the users that are `asked` for."""
        rows = np.flatnonzero(asked)
        near = self.sampler.of_users(users[rows], shown.take(rows), draws)
        return CSR.from_pairs(rows[near.rows], self.symbols.first_user + near.indices.astype(np.int64), len(users))


def _targets(
    history: CSR, shown: CSR, target: CSR, item_ends: np.ndarray, readout: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Targets]:
    """The position in `item_ends` of every shown item predicts the next, and so does the read-out; an item that came
    before is none. Also the newest entry of `shown` that each position knows, −1 where there is none."""
    whole = join_rows([history, target])
    first_shown = whole.indptr[:-1] + history.lengths - shown.lengths
    offset = np.arange(len(whole.indices)) - first_shown[whole.rows]
    new = first_occurrences(whole.rows, whole.indices)
    following = (offset > 0) & new
    final = (offset == shown.lengths[whole.rows]) & new
    before = shown.indptr[whole.rows[following]] + offset[following] - 1
    positions = [item_ends[before], readout[whole.rows[final]]]
    items = [whole.indices[following], whole.indices[final]]
    answers, places, rows = np.unique(np.concatenate(positions), return_index=True, return_inverse=True)
    read = np.concatenate([before, newest(shown)[whole.rows[final]]])[places]
    return answers, read, as_targets(rows, np.concatenate(items), len(answers))


def _where(kept: np.ndarray, rows: CSR) -> CSR:
    """The rows that are `kept`, the others empty."""
    mine = kept[rows.rows]
    return CSR.from_pairs(rows.rows[mine], np.asarray(rows.indices)[mine], len(rows))


def _column(values: np.ndarray) -> CSR:
    return CSR(np.arange(len(values) + 1, dtype=np.int64), values.ravel())


def _like(part: CSR, level: CSR | int) -> CSR:
    """The segment of every symbol of `part`."""
    return level if isinstance(level, CSR) else CSR(part.indptr, np.full(len(part.indices), level))


def _stacked(parts: list[CSR]) -> CSR:
    """The rows of each part, one part below the other."""
    ends = np.cumsum([0, *(part.indptr[-1] for part in parts)])
    indptr = np.concatenate([[0], *(part.indptr[1:] + end for part, end in zip(parts, ends, strict=False))])
    return CSR(indptr, np.concatenate([part.indices for part in parts]))


def tuned(backbone: Backbone, config: GALRecConfig) -> Backbone:
    """The backbone with gradients where `config.tuning` wants them, and the adapters and dropout it asks for."""
    ways = {"lora": lambda: backbone.adapt(config.lora), "full": backbone.tune, "frozen": backbone.freeze}
    made = ways[config.tuning]()
    return made.drop(config.layer_dropout) if config.layer_dropout else made


class _Contrasted(nn.Module):
    """`GALRec.contrasted` as a module's forward, as `functional_call` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: HopBatch, rows_N: torch.Tensor) -> torch.Tensor:
        return self.model.contrasted(batch, rows_N)


class GALRec(GraphReader):
    """The language model, projectors of external embeddings, task tokens, head, and the queues of negatives."""

    def __init__(
        self,
        config: GALRecConfig,
        backbone: Backbone,
        symbols: Symbols,
        nodes: NodeEmbeddings,
        item_texts: torch.Tensor | None,
        token_scale: float,
    ) -> None:
        read = (tuned(backbone, config), symbols, nodes, item_texts, token_scale)
        kinds = config.head == "tied", config.dropout
        after = 0 if config.successors is None else config.successors.kinds
        super().__init__(*read, *kinds, equal=config.equal_nodes, successors=after)
        self.config = config
        contrast = config.contrast
        self.terms = {"cross_entropy": 1.0, "l1": contrast.l1, "l2": contrast.l2, "l3": contrast.l3}
        self.lr_shares = {"backbone.": config.lora.lr if config.tuning == "lora" else config.backbone_lr}
        self.hop_tokens = nn.Embedding(HOPS, backbone.width)
        nn.init.normal_(self.hop_tokens.weight, std=token_scale)
        width = contrast.projection or backbone.width
        self.projection = None
        if contrast.projection and contrast.compared:
            layers = nn.Linear(backbone.width, backbone.width), nn.GELU(), nn.Linear(backbone.width, width)
            self.projection = nn.Sequential(*layers)
        self.slow = None
        if contrast.momentum is not None and contrast.compared:
            unread = "head.", "successors."
            trained = {n: p for n, p in self.named_parameters() if p.requires_grad and not n.startswith(unread)}
            self.slow = MomentumCopy(trained, contrast.momentum)
        # With a momentum encoder the two-hop segments are its own to read: no anchor sees them.
        last = [pair.anchor if self.slow is not None else max(pair.anchor, pair.positive) for pair in contrast.compared]
        answers = 2 if config.readout == "hop2" else 1  # histories stand before `<hop1>`
        self.hops_read = 1 + max([answers, *last])
        kinds = dict.fromkeys((pair.side, pair.positive) for pair in contrast.compared)
        self.queues = {kind: NegativeQueue(contrast.queue, width) for kind in kinds}
        self._fresh: list[tuple[tuple[str, int], torch.Tensor, torch.Tensor]] = []
        self.release: Callable[[], None] = lambda: None
        """Lets go of the parameters that this rank has gathered from others; the engine's, where it spreads them."""

    def forward(self, batch: HopBatch) -> torch.Tensor:
        """[4]: cross-entropy summed over answer positions, and L1 to L3, each summed over its anchors.

        The contrastive sums are this rank's share of the global ones (`contrast_terms`). Divide by `batch.counts`,
        summed over all ranks.
        """
        rows_of = self._compared(batch)
        slow_N3D = self._slowly_contrasted(batch, torch.cat(list(rows_of.values()))) if rows_of else None
        hops = batch.hops[:, : self.hops_read]
        hidden = self.hidden(batch, self.hops_read, torch.cat([batch.answers, hops[hops >= 0]]))
        recommended = self.recommending_loss(hidden, batch)
        return torch.stack([recommended, *self._contrast(hidden, batch, rows_of, slow_N3D)])

    def _compared(self, batch: HopBatch) -> dict[str, torch.Tensor]:
        """The prompts of each side that anything contrasts."""
        is_user = torch.arange(len(batch.nodes), device=batch.nodes.device) < batch.num_users
        rows_of = {"user": is_user & batch.contrasted, "item": ~is_user}
        return {side: rows.nonzero()[:, 0] for side, rows in rows_of.items() if self.config.contrast.active(side)}

    def _contrast(
        self, hidden: Placed, batch: HopBatch, rows_of: dict[str, torch.Tensor], slow_N3D: torch.Tensor | None
    ) -> list[torch.Tensor]:
        config = self.config.contrast
        sums = {name: hidden.rows_ND.new_zeros((), dtype=torch.float32) for name in ("l1", "l2", "l3")}
        if not rows_of:
            return list(sums.values())
        rows_N = torch.cat(list(rows_of.values()))
        own_N3D = self._projected(hidden.at(batch.hops[rows_N]))  # all at once: ZeRO-3 gathers weights at each call
        sizes = [len(rows) for rows in rows_of.values()]
        positives_N3D = own_N3D if slow_N3D is None else slow_N3D
        parts = zip(rows_of.items(), own_N3D.split(sizes), positives_N3D.split(sizes), strict=True)
        for (side, rows), anchors_N3D, positives_N3D in parts:
            pairs = config.active(side)
            for positive in dict.fromkeys(pair.positive for pair in pairs):
                mine = [pair for pair in pairs if pair.positive == positive]
                anchors_PND = anchors_N3D[:, [pair.anchor for pair in mine]].transpose(0, 1)
                read = anchors_PND, positives_N3D[:, positive], batch.nodes[rows]
                contrast = contrast_terms(*read, self.queues[side, positive], config.temperature)
                for pair, share in zip(mine, contrast.shares_P, strict=True):
                    sums[pair.weight] = sums[pair.weight] + share
                self._fresh.append(((side, positive), contrast.positives_ND, contrast.ids_N))
        return list(sums.values())

    def contrasted(self, batch: HopBatch, rows_N: torch.Tensor) -> torch.Tensor:
        """[N, 3, width] hops of these prompts as the contrast compares them, by a pass that reads no other prompt."""
        keys = None if batch.dropout_keys is None else batch.dropout_keys[rows_N]
        width = batch.symbols.shape[1]
        starts_N = torch.arange(len(rows_N), device=rows_N.device) * width
        hops_N3 = starts_N[:, None] + batch.hops[rows_N] % width
        given = self.embed(batch, rows_N), batch.attention[rows_N], batch.lengths[rows_N], keys
        return self._projected(self.backbone.read(*given, asked=hops_N3.flatten()).at(hops_N3))

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.projection is None else self.projection(rows)

    @torch.no_grad()
    def _slowly_contrasted(self, batch: HopBatch, rows_N: torch.Tensor) -> torch.Tensor | None:
        """`contrasted` by the momentum copy; None without one, and where there is nothing to contrast."""
        if self.slow is None or not (len(rows_N) or self.slow.spread):
            return None
        if self.slow.spread:  # then a pass is collective, also on no row
            with self.slow.in_place(self.release):
                return self.contrasted(batch, rows_N if len(rows_N) else rows_N.new_zeros(1))[: len(rows_N)]
        values = {f"model.{name}": value for name, value in self.slow.values().items()}
        return functional_call(_Contrasted(self), values, (batch, rows_N))

    def after_update(self) -> None:
        """Lets the positives of the update's passes, of all ranks, into the queues; the momentum copy follows."""
        if self.slow is not None:
            self.slow.update()
        for kind, rows_ND, nodes_N in self._fresh:
            self.queues[kind].enqueue(rows_ND, nodes_N)
        self._fresh = []

    def figures(self) -> dict[str, float]:
        """What is worth watching while it trains: the share of the queues that holds representations."""
        filled = sum(int((queue.ids() != EMPTY).sum()) for queue in self.queues.values())
        places = sum(len(queue.ids()) for queue in self.queues.values())
        return {"queue_fill": filled / places} if places else {}

    def carried_state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """What a checkpoint needs besides parameters: the queues and the momentum copy; collective where parameters
        are spread. keep: whether this rank wants it."""
        states = {f"{side}{hop}": queue.state() for (side, hop), queue in self.queues.items()} if keep else {}
        if self.slow is not None:
            states["momentum"] = self.slow.state(keep)
        return {f"{part}/{name}": value for part, state in states.items() for name, value in state.items()}

    def load_carried_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for (side, hop), queue in self.queues.items():
            queue.load_state({name: tensors[f"{side}{hop}/{name}"] for name in ("rows", "ids", "oldest")})
        if self.slow is not None:
            prefix = "momentum/"
            found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self.slow.load_state(found)
        self._fresh = []

    def slot_logits(self, batch: HopBatch, slots: int | None = None) -> torch.Tensor:
        """Logits [B, 1, I] at the read-out position."""
        hidden = self.hidden(batch, asked=batch.slots[:, 0]).at(batch.slots[:, 0])
        return self.matched(hidden, batch.tables[: len(hidden)], successors=batch.successors)[:, None]

    def hidden(self, batch: HopBatch, hops: int = HOPS, asked: torch.Tensor | None = None) -> Placed:
        """Last hidden states, of these flat positions or of all; of each prompt up to the task token of its first
        `hops` hops, where it has that."""
        given = self.embed(batch), batch.attention, batch.lengths_to(hops), batch.dropout_keys
        return self.backbone.read(*given, asked=asked)

    def lengths_read(self, batch: HopBatch) -> torch.Tensor:
        """[R] symbols that `forward` reads of each prompt; the momentum copy may read more."""
        return batch.lengths_to(self.hops_read)

    def representations(self, batch: HopBatch) -> torch.Tensor:
        """Hidden states [R, 3, D] of the task tokens; every hop must be in the prompts."""
        return self.hidden(batch, asked=batch.hops.flatten()).at(batch.hops)

    def embed(self, batch: HopBatch, rows_N: torch.Tensor | None = None) -> Placed:
        """Embeddings of the symbols, of these prompts or of all."""
        rows_N = torch.arange(len(batch.symbols), device=batch.symbols.device) if rows_N is None else rows_N

        def items(numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            rows = rows_N[rows]
            return self.dropped(self.item_tokens(numbers, batch.tables[rows]), batch, rows, columns)

        def users(numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            # A user's own token is rebuilt from the history before the target, of which the prompt shows the newest.
            rows = rows_N[rows]
            nodes, mine = self.nodes.users_Ud[numbers], batch.own[rows, columns]
            nodes[mine] = self.nodes.users(batch)[rows[mine]]
            return self.dropped(self.user_projector(nodes), batch, rows, columns)

        def hops(numbers: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            return self.hop_tokens(numbers)

        return embed_symbols(batch.symbols[rows_N], self.symbols, self.backbone.embed, items, users, hops)
