"""What both recipes have around the language model: node and text vectors, projectors into its token space, head."""

import torch
from torch import nn
from torch.nn import functional

from raygrec.data.arrays import CSR
from raygrec.graph.lightgcn import NodeEmbeddings, propagate_users
from raygrec.model.backbone import Backbone
from raygrec.model.dropout import keyed_dropout
from raygrec.model.head import ROW_SCALE, CatalogueHead, Cells, ItemRows, OwnNodes, Targets, TiedHead
from raygrec.model.prompts import Placed, PromptBatch, Symbols
from raygrec.model.successors import SuccessorLogits

# Standard deviations of what a projector reads. Adam moves an item's trained offset as fast whatever stands beside it:
# small nodes leave it the room to correct what they remember of the very edges that are to be predicted.
NODE_SCALE, TEXT_SCALE = 0.1, 0.3
FREE_SCALE = 0.02  # standard deviation with which an item's trained offset starts


def scaled_texts(texts_It: torch.Tensor) -> torch.Tensor:
    """Text vectors without their common direction, with standard deviation `TEXT_SCALE`."""
    centred_It = texts_It - texts_It.mean(0)
    return TEXT_SCALE * centred_It / centred_It.std().clamp(min=1e-6)


def nodes_of_texts(texts_It: torch.Tensor | None, train: CSR, num_items: int, width: int) -> NodeEmbeddings:
    """Where no graph is read: items without a node vector, and users known by the texts of their items alone.

    A user is |H|^-1/2 Σ of the items' `scaled_texts`, in the `width` directions in which these differ most; zero
    without texts.
    """
    shares_Id = torch.zeros(num_items, width)
    if texts_It is not None:
        known_It = scaled_texts(texts_It.float())
        _, directions_tt = torch.linalg.eigh(known_It.T @ known_It)  # ascending
        most = directions_tt.flip(1)[:, :width]
        shares_Id[:, : most.shape[1]] = known_It @ most
    return NodeEmbeddings(
        users=propagate_users(shares_Id, train),
        items=torch.zeros(num_items, width),
        users_ego=torch.zeros(len(train), width),
        items_inductive=shares_Id,
        fold_of=torch.zeros(len(train), dtype=torch.int64),
        fold_items=torch.zeros(0, num_items, width),
        fold_shares=torch.zeros(0, num_items, width),
    )


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
    """Item tokens V_i = W x_i in the token space, x = `rows`.

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

    def projected(self, rows_nr: torch.Tensor) -> torch.Tensor:
        """Tokens W x [n, D]."""
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
    row_of = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(vectors))
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, row_of, vectors)


class NodeTables(nn.Module):
    """Node vectors, with the standard deviation `NODE_SCALE`; fixed, and no part of a checkpoint.

    Items and the shares that users are rebuilt from are there once per fit of the graph: [K + 1, I, d]. Fit 0 knows
    every edge; a history reads the one that knows none of its user's (`PromptBatch.tables`), and is matched with
    the items of that fit. Users two hops away are of fit 0. equal: items' vectors all have the same length.
    """

    def __init__(self, nodes: NodeEmbeddings, equal: bool = False) -> None:
        super().__init__()
        self.width = nodes.items.shape[1]
        of_items, of_users = (NODE_SCALE / known.std().clamp(min=1e-12) for known in (nodes.items, nodes.users))
        tables = nodes.item_tables * of_items
        if equal:
            tables = functional.normalize(tables, dim=-1) * NODE_SCALE * self.width**0.5
        self.register_buffer("items_KId", tables, persistent=False)
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
        tables_n = batch.tables[: len(counts_B)].repeat_interleave(counts_B, output_size=len(batch.history))
        rows_n = tables_n * self.shares_KId.shape[1] + batch.history
        return users_of_items(self.shares_KId.flatten(0, 1), rows_n, counts_B)


def users_of_items(item_shares_Id: torch.Tensor, items_n: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Node vectors [B, d] of users known by their items alone, |H|^-1/2 Σ shares: `propagate_users` on `counts_B[b]`
    entries of `items_n` each."""
    once_n1 = _once(items_n, counts_B, len(item_shares_Id)).to(item_shares_Id.dtype)[:, None]
    sizes_B1 = sum_rows(once_n1, counts_B)
    return sum_rows(item_shares_Id[items_n] * once_n1, counts_B) / sizes_B1.clamp(min=1).sqrt()


def _once(items_n: torch.Tensor, counts_B: torch.Tensor, num_items: int) -> torch.Tensor:
    """[n] bool: whether an entry is the first of its item among the `counts_B[b]` of its user."""
    users_n = torch.arange(len(counts_B), device=items_n.device).repeat_interleave(counts_B, output_size=len(items_n))
    keys_n, order_n = (users_n * num_items + items_n).sort(stable=True)
    first_n = torch.ones_like(keys_n, dtype=torch.bool)
    first_n[1:] = keys_n[1:] != keys_n[:-1]
    return torch.empty_like(first_n).scatter_(0, order_n, first_n)


class GraphReader(nn.Module):
    """A language model that reads nodes as tokens and answers over the catalogue: the base of both recipes.

    The node vectors come from graph pretraining (or `nodes_of_texts`), item_texts [I, t] from the language model before
    it is tuned; both stay fixed. dropout: share of the hidden states' entries that the head does not see in training,
    and half that share of the node tokens'. free: items have something of their own in their tokens. equal: their node
    vectors have the same length. trend_MI: `Trend.log_shares_MI`, added to the logits of a moment.
    successors: how many numbers a cell of those has that prompts bring, which add to the logits; 0: none.
    """

    def __init__(
        self,
        backbone: Backbone,
        symbols: Symbols,
        nodes: NodeEmbeddings,
        item_texts: torch.Tensor | None,
        token_scale: float,
        tied: bool,
        dropout: float,
        free: bool = True,
        equal: bool = False,
        trend_MI: torch.Tensor | None = None,
        successors: int = 0,
    ) -> None:
        super().__init__()
        self.symbols, self.backbone, self.dropout = symbols, backbone, dropout
        self.nodes = NodeTables(nodes, equal)
        self.register_buffer("item_texts", None if item_texts is None else scaled_texts(item_texts), persistent=False)
        shown = (symbols.items, self.nodes.width, None if item_texts is None else item_texts.shape[1])
        self.register_buffer("trend_MI", trend_MI, persistent=False)
        self.item_projector = ItemProjector(*shown, backbone.width, token_scale, tied, free)
        self.user_projector = projector(self.nodes.width, backbone.width, token_scale)
        self.successors = SuccessorLogits(successors) if successors else None
        self.head = TiedHead(symbols.items) if tied else CatalogueHead(backbone.width, *shown)

    def item_rows(self, items_n: torch.Tensor, tables_n: torch.Tensor) -> torch.Tensor:
        """x_i [n, r] of items, each node from the given fit."""
        texts_nt = None if self.item_texts is None else self.item_texts[items_n]
        return self.item_projector.rows(self.nodes.items(items_n, tables_n), texts_nt, items_n)

    def item_tokens(self, items_n: torch.Tensor, tables_n: torch.Tensor) -> torch.Tensor:
        """V_i = W x_i [n, D] of items, each node from the given fit."""
        return self.item_projector.projected(self.item_rows(items_n, tables_n))

    def dropped(
        self, tokens: torch.Tensor, batch: PromptBatch, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Node tokens [n, D] at these places of the prompts, with the dropout of training."""
        if batch.dropout_keys is None:
            return tokens
        return keyed_dropout(tokens, self.dropout / 2, batch.dropout_keys[rows], columns, use=2)

    def recommending_loss(self, hidden: Placed, batch: PromptBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's answer positions."""
        answers_PD, width = hidden.at(batch.answers), batch.symbols.shape[1]
        rows, columns = batch.answers // width, batch.answers % width
        if batch.dropout_keys is not None:
            answers_PD = keyed_dropout(answers_PD, self.dropout, batch.dropout_keys[rows], columns, use=1)
        return self.matched(answers_PD, batch.tables[rows], batch.targets, batch.successors)

    def matched(
        self,
        hidden_PD: torch.Tensor,
        tables_P: torch.Tensor,
        targets: Targets | None = None,
        successors: Cells | None = None,
    ) -> torch.Tensor:
        """Logits [P, I] of hidden states, against items whose nodes are of the given fits; with targets their
        cross-entropy, as `catalogue_cross_entropy`."""
        added = None if self.successors is None else successors.weighing(self.successors(successors.weights))
        tied = isinstance(self.head, TiedHead)
        rows = self.item_projector.rows if tied else self.head.rows
        read = self.item_projector.queries(hidden_PD) if tied else hidden_PD
        nodes = self.nodes
        if len(nodes.items_KId) == 1:
            return self.head(read, rows(nodes.items_Id, self.item_texts), targets, None, self.trend_MI, added)
        # Asked of the module, and not read off its weight, which ZeRO-3 has only while it is called.
        map_dr = rows.from_node(torch.eye(nodes.width, dtype=nodes.items_KId.dtype, device=nodes.items_KId.device))
        own = OwnNodes(nodes.items_KId, tables_P, map_dr)
        return self.head(read, rows(None, self.item_texts), targets, own, self.trend_MI, added)
