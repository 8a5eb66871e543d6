"""The GLLM head: hidden states to logits over the whole catalogue, and their cross-entropy a part at a time."""

from copy import copy
from typing import NamedTuple, Self

import torch
from torch import nn
from torch.nn import functional

# Logits that stand in memory: 64 MiB in fp32; on a CPU 2 MiB, which its cache holds.
LOGITS_AT_ONCE, ON_A_CPU = 2**24, 2**19
# … or those of so many positions: they take less room than R and its gradient, and with fewer the time would go into
# reading and writing these.
FEWEST_AT_ONCE = 64
ROW_SCALE = 0.3  # standard deviation of the rows' start where what they are made of has 1


class ItemRows(nn.Module):
    """Rows [n, r] of items: A E_i + P t_i + Δ_i, from node embeddings E and text vectors t.

    Δ makes the rows free (`free`); it starts with the standard deviation `start`. Without it they stay functions of E
    and t, whatever their number. Rows therefore start as what the graph and the language model know of an item.
    """

    def __init__(
        self, num_items: int, node_width: int, text_width: int | None, free: bool = True, start: float = 0.0
    ) -> None:
        super().__init__()
        self.from_node = _row_map(node_width, node_width)
        self.from_text = None if text_width is None else _row_map(text_width, node_width)
        self.free = nn.Parameter(start * torch.randn(num_items, node_width)) if free else None

    def forward(
        self, nodes_nd: torch.Tensor | None, texts_nt: torch.Tensor | None, items_n: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[n, r] of the items with these numbers, nodes and text vectors; None: of all.

        nodes_nd: None leaves A E_i out; what is left must be something.
        """
        parts = [] if nodes_nd is None else [self.from_node(nodes_nd)]
        if self.from_text is not None:
            parts.append(self.from_text(texts_nt))
        if self.free is not None:
            # A view: ZeRO-3 would keep a parameter whole that a module returns as it is.
            parts.append(self.free.view_as(self.free) if items_n is None else functional.embedding(items_n, self.free))
        return sum(parts[1:], parts[0])


class OwnNodes(NamedTuple):
    """Rows whose node part A E_i is of another fit of the graph for each position: E `nodes_KId` [K, I, d], each
    position's fit `tables_P` [P], and Aᵀ `map_dr` [d, r].

    (A E_i)ᵀ q is read as E_iᵀ (Aᵀ q): nothing of the size of all fits' rows is made, nor its gradient.
    """

    nodes_KId: torch.Tensor
    tables_P: torch.Tensor
    map_dr: torch.Tensor


class CatalogueHead(nn.Module):
    """One linear layer from hidden states to |I| logits (GLTA, graph-language logits matching).

    [ours] It is written as two factors, Z = (h Q) Rᵀ + b, of the node embeddings' width r: a position costs
    r · |I| and not D · |I|. `rows` makes R, once per pass.
    """

    def __init__(self, width: int, num_items: int, node_width: int, text_width: int | None) -> None:
        super().__init__()
        self.rows = ItemRows(num_items, node_width, text_width)
        self.query = nn.Linear(width, node_width)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        self.bias = nn.Parameter(torch.zeros(num_items))

    def forward(
        self,
        hidden_PD: torch.Tensor,
        rows_Ir: torch.Tensor,
        targets: "Targets | None" = None,
        own: OwnNodes | None = None,
        trend_MI: torch.Tensor | None = None,
        added: "Cells | None" = None,
    ) -> torch.Tensor:
        """See `matched`."""
        return matched(self.query(hidden_PD), rows_Ir, self.bias, targets, own, trend_MI, added)


class TiedHead(nn.Module):
    """Inner products of queries with rows that items have anyway, plus a bias each."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_items))

    def forward(
        self,
        queries_Pr: torch.Tensor,
        rows_Ir: torch.Tensor,
        targets: "Targets | None" = None,
        own: OwnNodes | None = None,
        trend_MI: torch.Tensor | None = None,
        added: "Cells | None" = None,
    ) -> torch.Tensor:
        """See `matched`."""
        return matched(queries_Pr, rows_Ir, self.bias, targets, own, trend_MI, added)


def _row_map(source: int, width: int) -> nn.Linear:
    layer = nn.Linear(source, width, bias=False)
    nn.init.normal_(layer.weight, std=ROW_SCALE / source**0.5)
    return layer


def matched(
    queries_Pr: torch.Tensor,
    rows_Ir: torch.Tensor,
    bias_I: torch.Tensor,
    targets: "Targets | None",
    own: OwnNodes | None = None,
    trend_MI: torch.Tensor | None = None,
    added: "Cells | None" = None,
) -> torch.Tensor:
    """What a head returns: logits Z = q Rᵀ + b [P, I], or with targets their cross-entropy (`catalogue_cross_entropy`).

    own: a part of R that `rows_Ir` leaves out. trend_MI: for the cross-entropy, what is added to the logits at each
    of the moments that `Targets.moments` counts. added: what some logits have besides, cells of P positions, none of
    them twice.
    """
    if targets is not None:
        return catalogue_cross_entropy(queries_Pr, rows_Ir, bias_I, targets, own=own, trend_MI=trend_MI, added=added)
    logits_PI = torch.addmm(bias_I.to(queries_Pr.dtype), queries_Pr, rows_Ir.T.to(queries_Pr.dtype))
    if own is not None:
        queries_Pd = queries_Pr @ own.map_dr.T.to(queries_Pr.dtype)
        for table in own.tables_P.unique():
            mine = (own.tables_P == table).nonzero()[:, 0]
            logits_PI[mine] += queries_Pd[mine] @ own.nodes_KId[table].T.to(queries_Pd.dtype)
    if added is not None:
        logits_PI = logits_PI.index_put(added.places, added.weights.to(logits_PI.dtype), accumulate=True)
    return logits_PI


def catalogue_cross_entropy(
    queries_Pr: torch.Tensor,
    rows_Ir: torch.Tensor,
    bias_I: torch.Tensor,
    targets: "Targets",
    at_once: int | None = None,
    own: OwnNodes | None = None,
    trend_MI: torch.Tensor | None = None,
    added: "Cells | None" = None,
) -> torch.Tensor:
    """Sum over positions of −Σ_i w_i log softmax(Z)_i, over the full catalogue; Z = q Rᵀ + b, plus a row of the trend.

    The logits of `at_once` positions stand in memory (default: `positions_at_once`): each part of the positions leaves
    its gradient behind in the forward pass (softmax(Z) − w, times R and q), and its logits are gone. None is computed
    twice. own: a part of R that `rows_Ir` leaves out. added: what some logits have besides, fp32 cells of P positions,
    none of them twice. Returns fp32 [].
    """
    at_once = positions_at_once(len(rows_Ir), rows_Ir.device.type) if at_once is None else at_once
    made, starts = torch.is_grad_enabled(), range(0, len(queries_Pr), at_once)
    if own is None:
        parts = [(start, start + at_once, []) for start in starts]
        return _cross_entropy(queries_Pr, None, rows_Ir, bias_I, targets, trend_MI, added, parts, made)
    order = own.tables_P.argsort(stable=True)
    ends = own.tables_P.bincount(minlength=len(own.nodes_KId)).cumsum(0).tolist()
    tables = list(zip([0, *ends[:-1]], ends, own.nodes_KId.to(queries_Pr.dtype), strict=True))
    parts = [
        (
            start,
            start + at_once,
            [
                (max(start, first), min(start + at_once, end), nodes_Id)
                for first, end, nodes_Id in tables
                if max(start, first) < min(start + at_once, end)
            ],
        )
        for start in starts
    ]
    queries_Pr = queries_Pr.index_select(0, order)
    queries_Pd = queries_Pr @ own.map_dr.T.to(queries_Pr.dtype)
    added = None if added is None else added.take(order)
    return _cross_entropy(queries_Pr, queries_Pd, rows_Ir, bias_I, targets.take(order), trend_MI, added, parts, made)


def positions_at_once(num_items: int, device: str) -> int:
    """How many positions' logits may stand in memory of a device of that kind, as torch calls it."""
    return max((ON_A_CPU if device == "cpu" else LOGITS_AT_ONCE) // num_items, FEWEST_AT_ONCE)


def _cross_entropy(
    queries_Pr: torch.Tensor,
    queries_Pd: torch.Tensor | None,
    rows_Ir: torch.Tensor,
    bias_I: torch.Tensor,
    targets: "Targets",
    trend_MI: torch.Tensor | None,
    added: "Cells | None",
    parts: list[tuple[int, int, list[tuple[int, int, torch.Tensor]]]],
    with_gradients: bool,
) -> torch.Tensor:
    # Tensors that have a gradient must stand among the arguments by themselves.
    weights = None if added is None else added.weights
    given = queries_Pr, queries_Pd, rows_Ir, bias_I, weights, targets, trend_MI, added, parts, with_gradients
    return _CrossEntropy.apply(*given)


class _CrossEntropy(torch.autograd.Function):
    """The gradients of a sum are known up to a factor before its backward pass begins.

    parts: positions from and to; where there are queries_Pd, also which of them are matched with which nodes [I, d].
    """

    @staticmethod
    def forward(ctx, queries_Pr, queries_Pd, rows_Ir, bias_I, weights_C, targets, trend_MI, added, parts, made):  # noqa: ANN001
        kind = queries_Pr.dtype
        # The bias as one more column of R, against ones.
        rows_Is = torch.cat([rows_Ir, bias_I[:, None]], dim=1).to(kind)
        queries_Ps = torch.cat([queries_Pr, queries_Pr.new_ones(len(queries_Pr), 1)], dim=1)
        total = queries_Pr.new_zeros((), dtype=torch.float32)
        if made:
            by_queries_Pr = torch.empty_like(queries_Pr)
            by_queries_Pd = None if queries_Pd is None else torch.empty_like(queries_Pd)
            by_rows_Is = torch.zeros_like(rows_Is, dtype=torch.float32)
            by_weights_C = None if added is None else torch.empty_like(weights_C)
        last = 0  # of the cells that have been added
        with torch.autocast(queries_Pr.device.type, enabled=False):
            for start, stop, own in parts:
                part_ps = queries_Ps[start:stop]
                part = targets.part(start, start + len(part_ps))
                places = (part.rows, part.items)
                logits_pI = part_ps @ rows_Is.T
                for first, end, nodes_Id in own:
                    logits_pI[first - start : end - start].addmm_(queries_Pd[first:end], nodes_Id.T)
                if part.moments is not None:
                    logits_pI += trend_MI[part.moments].to(kind)
                if added is not None:
                    cells = added.part(start, start + len(part))
                    begun, last = last, last + len(cells.items)
                    logits_pI.index_put_(cells.places, weights_C[begun:last].to(kind), accumulate=True)
                log_shares_pI = logits_pI.float().log_softmax(dim=1)
                total -= (log_shares_pI[places] * part.weights).sum()
                if not made:
                    continue
                excess_pI = log_shares_pI.exp_().index_put_(places, -part.weights, accumulate=True).to(kind)
                if added is not None:
                    by_weights_C[begun:last] = excess_pI[cells.places]
                by_queries_Pr[start:stop] = excess_pI @ rows_Is[:, :-1]
                for first, end, nodes_Id in own:
                    by_queries_Pd[first:end] = excess_pI[first - start : end - start] @ nodes_Id
                if kind == torch.float32:
                    by_rows_Is.addmm_(excess_pI.T, part_ps)
                else:
                    by_rows_Is += excess_pI.T @ part_ps
        if made:
            by_rows_Ir, by_bias_I = by_rows_Is[:, :-1].to(rows_Ir.dtype), by_rows_Is[:, -1].to(bias_I.dtype)
            ctx.save_for_backward(by_queries_Pr, by_queries_Pd, by_rows_Ir, by_bias_I, by_weights_C)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):  # noqa: ANN001
        found = [None if gradient is None else gradient * scale for gradient in ctx.saved_tensors]
        return *found, *[None] * 5


class Cells:
    """Some items of each of P positions, with weights: position p has `items[indptr[p]:indptr[p + 1]]`.

    weights: [entries], or [entries, n] where an entry has several.
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
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(self.items))

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and items of the entries, as an index of [P, I]."""
        return self.rows, self.items

    def weighing(self, weights: torch.Tensor) -> "Cells":
        """The same items with other weights."""
        return Cells(self.indptr, self.items, weights)

    def part(self, start: int, stop: int) -> Self:
        """Those of the positions from `start` to `stop`."""
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        return self._of(self.indptr[start : stop + 1] - self.indptr[start], slice(first, last), slice(start, stop))

    def take(self, positions: torch.Tensor) -> Self:
        """Those of some positions, in that order."""
        counts = self.indptr.diff()[positions]
        indptr = nn.functional.pad(counts.cumsum(0), (1, 0))
        offsets = torch.repeat_interleave(self.indptr[positions] - indptr[:-1], counts)
        return self._of(indptr, offsets + torch.arange(len(offsets), device=offsets.device), positions)

    def to(self, device: torch.device | str) -> Self:
        """All of it on that device."""
        kept = copy(self)
        vars(kept).update({name: value.to(device) for name, value in vars(self).items() if value is not None})
        return kept

    def _of(self, indptr: torch.Tensor, entries: torch.Tensor | slice, positions: torch.Tensor | slice) -> Self:
        kept = copy(self)
        kept.indptr, kept.items, kept.weights = indptr, self.items[entries], self.weights[entries]
        return kept


class Targets(Cells):
    """What answer positions must predict; the weights of a position's items add to 1.

    moments: [positions], when it is to be predicted, where that matters (`model/trend.py`).
    """

    def __init__(
        self, indptr: torch.Tensor, items: torch.Tensor, weights: torch.Tensor, moments: torch.Tensor | None = None
    ) -> None:
        super().__init__(indptr, items, weights)
        self.moments = moments

    def _of(self, indptr: torch.Tensor, entries: torch.Tensor | slice, positions: torch.Tensor | slice) -> Self:
        kept = super()._of(indptr, entries, positions)
        kept.moments = None if self.moments is None else self.moments[positions]
        return kept
