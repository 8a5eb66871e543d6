"""GAL-Rec's graph-aware contrast: InfoNCE between hops over all ranks, a queue of more negatives, a slow encoder.

N: representations of one batch, over all ranks unless a function says otherwise. D: their width. K: queue length.

Every rank computes the *global* loss on gathered rows, of which only its own carry gradient (`gathered`); hence
the gradients of the ranks add to the gradient of the global loss, while their losses add to `world` times it.
`contrast_terms` returns what is right in both. A group of w workers gives the loss, the gradient and the queue of
one worker where the rows that meet in one call (a micro-batch of all ranks) are the same, in the same order.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize

from raygrec.ranks import device, shard, world

EMPTY = -1
PAIRS_AT_ONCE = 1024  # rows of the pairwise distances that are held at a time


class Contrast(NamedTuple):
    """Contrastive terms of P pairs as one rank holds them, and what their queue takes after the update.

    shares_P: fp32 [P], see `rank_share`. positives_ND, ids_N: detached, of all ranks, for `NegativeQueue.enqueue`.
    """

    shares_P: torch.Tensor
    positives_ND: torch.Tensor
    ids_N: torch.Tensor


class NegativeQueue:
    """The K newest representations with their node ids, first in first out; the same on every rank.

    MoCo's queue (arXiv 1911.05722, section 3.1), which GAL-Rec takes up so that the number of negatives does not
    depend on the batch. [ours] Rows are unit vectors without gradient, each with its node's id, and enter after
    the update. It is no `nn.Module`, so that no cast or move of the model reaches it; it moves to the device of the
    rows it is fed.
    """

    def __init__(self, length: int, width: int) -> None:
        self._rows_KD = torch.zeros(length, width)
        self._ids_K = torch.full((length,), EMPTY)
        self._oldest = 0  # its place, which the next row takes

    def rows(self) -> torch.Tensor:
        """fp32 [K, D], the oldest first; zero where nothing is stored yet. A copy."""
        return self._rows_KD.roll(-self._oldest, 0)

    def ids(self) -> torch.Tensor:
        """int64 [K]; -1 where nothing is stored yet. A copy."""
        return self._ids_K.roll(-self._oldest, 0)

    def stored(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [K, D] and ids [K] in the order of their places, which `enqueue` writes to: to be read at once."""
        self._rows_KD, self._ids_K = self._rows_KD.to(device), self._ids_K.to(device)
        return self._rows_KD, self._ids_K

    def enqueue(self, rows_ND: torch.Tensor, ids_N: torch.Tensor) -> None:
        """Appends rows in their order and drops the oldest; of more than K rows the last K stay.

        Every rank must pass the same rows: `Contrast` has those of all ranks.

        Raises ValueError where there is not one id per row.
        """
        if len(rows_ND) != len(ids_N):
            raise ValueError(f"the queue was given {len(rows_ND)} rows and {len(ids_N)} ids; every row needs one id")
        length = len(self._ids_K)
        rows_ND, ids_N = rows_ND[max(len(rows_ND) - length, 0) :], ids_N[max(len(ids_N) - length, 0) :]
        if not len(rows_ND):
            return
        rows_KD, ids_K = self.stored(rows_ND.device)
        places_N = (self._oldest + torch.arange(len(rows_ND), device=rows_ND.device)) % length
        rows_KD[places_N] = normalize(rows_ND.detach().float(), dim=1)
        ids_K[places_N] = ids_N.to(ids_K)
        self._oldest = (self._oldest + len(rows_ND)) % length

    def state(self) -> dict[str, torch.Tensor]:
        """`rows` fp32 [K, D] and `ids` int64 [K] in the order of their places, and `oldest` []; copies, on the CPU.

        Rows keep their places, so that sums over them keep their order, and a resumed run its last bit.
        """
        return {
            "rows": self._rows_KD.cpu().clone(),
            "ids": self._ids_K.cpu().clone(),
            "oldest": torch.tensor(self._oldest),
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`; raises ValueError where length or width differ from this queue's."""
        if tensors["rows"].shape != self._rows_KD.shape:
            found, wanted = list(tensors["rows"].shape), list(self._rows_KD.shape)
            raise ValueError(f"the stored queue has [length, width] {found}, this run's has {wanted}")
        self._rows_KD, self._ids_K = tensors["rows"].clone(), tensors["ids"].clone()
        self._oldest = int(tensors["oldest"])


class MomentumCopy:
    """A second copy of parameters that follows them slowly: MoCo's momentum encoder (arXiv 1911.05722, section 3.2).

    p_slow ← m p_slow + (1 − m) p after every update. fp32, without gradient, and no `nn.Module`, as the queue. Of
    parameters that ZeRO-3 has spread over the ranks each rank has the copy of what it holds of them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], momentum: float) -> None:
        self.parameters, self.momentum = parameters, momentum
        self._slow = {name: _held(parameter).float().clone() for name, parameter in parameters.items()}

    @property
    def spread(self) -> bool:
        """Whether a rank holds a part of each parameter only."""
        return any(hasattr(parameter, "ds_tensor") for parameter in self.parameters.values())

    def values(self) -> dict[str, torch.Tensor]:
        """The copies by name, on the device and of the type of the parameters, for `torch.func.functional_call`."""
        return {name: slow.to(self.parameters[name]) for name, slow in self._copies().items()}

    @contextmanager
    def in_place(self, release: Callable[[], None]) -> Iterator[None]:
        """Inside, the parameters have the copies' values in what this rank holds of them.

        release: lets go of what ranks have gathered of them, which would keep its values into the block and out of it.
        """
        release()
        held = {name: _held(parameter) for name, parameter in self.parameters.items()}
        before = {name: value.clone() for name, value in held.items()}
        try:
            for name, slow in self._copies().items():
                held[name].copy_(slow)
            yield
        finally:
            release()
            for name, value in held.items():
                value.copy_(before[name])

    @torch.no_grad()
    def update(self) -> None:
        for name, slow in self._copies().items():
            held = _held(self.parameters[name])
            self._slow[name] = slow.to(held.device).lerp(held.float(), 1 - self.momentum)

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The copies in fp32, whole, on the CPU; collective where they are spread.

        keep: whether this rank wants them.
        """
        found: dict[str, torch.Tensor] = {}
        for name, slow in self._copies().items() if keep or self.spread else ():
            whole = _whole(slow, self.parameters[name])
            if keep:
                found[name] = whole.to("cpu", copy=True)
        return found

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self._slow = {name: tensors[name].clone() for name in self._slow}

    def _copies(self) -> dict[str, torch.Tensor]:
        """As this rank holds them: parameters may have been spread since they were copied whole."""
        for name, parameter in self.parameters.items():
            held = _held(parameter)
            if self._slow[name].shape != held.shape:
                self._slow[name] = shard(self._slow[name], held.numel())
        return self._slow


def _held(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of it: all, or under ZeRO-3 a part."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _whole(held: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """All of what every rank has a part of, as `_held`."""
    if not hasattr(parameter, "ds_tensor"):
        return held
    return gathered(held.to(device()))[: parameter.ds_numel].view(parameter.ds_shape)


def contrast_terms(
    anchors_PND: torch.Tensor, positives_ND: torch.Tensor, ids_N: torch.Tensor, queue: NegativeQueue, temperature: float
) -> Contrast:
    """`info_nce` of P anchor hops against one hop over the rows of all ranks and the queue, as this rank's shares.

    anchors_PND: float [P, N, D], positives_ND: float [N, D], ids_N: int64 [N], all of *this* rank; the ranks' N may
    differ and be 0. Collective: every rank must call it, as often and in the same order. The queue is read, not
    changed.
    """
    *anchors, positives_ND = gathered(torch.stack([*anchors_PND, positives_ND], dim=1)).unbind(1)
    ids_N = gathered(ids_N)
    losses_P = info_nce(torch.stack(anchors), positives_ND, ids_N, *queue.stored(positives_ND.device), temperature)
    return Contrast(rank_share(losses_P), positives_ND.detach(), ids_N)


def info_nce(
    anchors_ND: torch.Tensor,
    positives_ND: torch.Tensor,
    ids_N: torch.Tensor,
    extra_KD: torch.Tensor,
    extra_ids_K: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Sum over anchors n of −log( exp(s_nn / τ) / Σ_{c ∈ C_n} exp(s_nc / τ) ), s the cosine similarity.

    L1–L3 of GAL-Rec for a pair of hops: row n of anchors and positives are two hops of node `ids_N[n]`.
    [ours] C_n is the N positives and the K extra rows, less those of anchor n's own node (false negatives; never
    its own positive) and empty queue places (id -1). Anchors and positives get gradient, extra rows none.

    anchors_ND: float [N, D], or [P, N, D] for P pairs with the same positives. positives_ND: float [N, D].
    ids_N: int64 [N]. extra_KD: float [K, D], unit vectors. extra_ids_K: int64 [K].
    Computed in fp32 at least, under autocast too. Returns [] or [P].
    """
    with torch.autocast(anchors_ND.device.type, enabled=False):
        anchors_ND, positives_ND = _unit(anchors_ND) / temperature, _unit(positives_ND)
        others_NN = ids_N == ids_N[:, None]
        others_NN.diagonal().fill_(False)
        logits_NN = (anchors_ND @ positives_ND.T).masked_fill(others_NN, -torch.inf)
        among_N = logits_NN.logsumexp(-1)
        if len(extra_KD):
            extra_KD = extra_KD.detach().to(anchors_ND.dtype)
            excluded_NK = (extra_ids_K == ids_N[:, None]) | (extra_ids_K == EMPTY)
            among_N = torch.logaddexp(among_N, _AmongExtra.apply(anchors_ND, extra_KD, excluded_NK))
        return (among_N - logits_NN.diagonal(dim1=-2, dim2=-1)).sum(-1)


class _AmongExtra(torch.autograd.Function):
    """log Σ exp(a_n · x_k) over the extra rows k that are not excluded for anchor n: −∞ where all are.

    The gradient is made while the products are there, so that they are held once and nothing waits for the backward
    pass but [..., N, D].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        anchors_ND: torch.Tensor,
        extra_KD: torch.Tensor,
        excluded_NK: torch.Tensor,
    ) -> torch.Tensor:
        weights_NK = (anchors_ND @ extra_KD.T).masked_fill_(excluded_NK, -torch.inf)
        highest_N1 = weights_NK.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights_NK.dtype).min)
        sums_N1 = weights_NK.sub_(highest_N1).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward((weights_NK @ extra_KD) / sums_N1.clamp(min=1))
        return (highest_N1 + sums_N1.log())[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mean_ND,) = ctx.saved_tensors
        return mean_ND * grad_N[..., None], None, None


def gathered(rows_ND: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order; only this rank's own carry gradient.

    rows_ND: [N of this rank, ...] of any dtype, on a device of the process group; N may differ between ranks and be
    0, the rest of the shape may not. Collective. Outside a group of several ranks these are the rows themselves.
    """
    rank, workers = world()
    if workers == 1:
        return rows_ND
    count = torch.tensor([len(rows_ND)], device=rows_ND.device)
    counts = [torch.empty_like(count) for _ in range(workers)]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    # Ranks must pass equal shapes; one row at least, so that no backend meets an empty tensor.
    padded = rows_ND.new_zeros(max(*sizes, 1), *rows_ND.shape[1:])
    padded[: len(rows_ND)] = rows_ND.detach()
    parts = [torch.empty_like(padded) for _ in range(workers)]
    dist.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[rank] = rows_ND
    return torch.cat(parts)


def rank_share(loss: torch.Tensor) -> torch.Tensor:
    """What this rank adds to the step's loss for a global `loss` that every rank computed from `gathered` rows.

    (loss − loss detached) + loss detached / w, for w workers. Its value is loss / w, so that the ranks' values add to
    the loss; its gradient is that of the whole loss, since on each rank that reaches the rank's own rows only.
    """
    value = loss.detach()
    return (loss - value) + value / world()[1]


@torch.no_grad()
def uniformity(rows_ND: torch.Tensor) -> float:
    """log of the mean over pairs n ≠ m of exp(−2 ‖x_n − x_m‖²), x the rows as unit vectors; lower is more uniform.

    Wang & Isola 2020 (arXiv 2005.10242), section 4.1, with t = 2. rows_ND: float [N, D].

    Raises ValueError for fewer than two rows.
    """
    count = len(rows_ND)
    if count < 2:
        raise ValueError(f"uniformity is a mean over pairs of rows; {count} rows have none")
    rows_ND = normalize(rows_ND.double(), dim=1)
    total = 0.0
    for start in range(0, count, PAIRS_AT_ONCE):
        squared = 2 - 2 * rows_ND[start : start + PAIRS_AT_ONCE] @ rows_ND.T
        kernel = (-2 * squared).exp()
        kernel.diagonal(start).zero_()
        total += float(kernel.sum())
    return math.log(total / (count * (count - 1)))


@torch.no_grad()
def alignment(a_ND: torch.Tensor, b_ND: torch.Tensor) -> float:
    """Mean over n of ‖a_n − b_n‖², the rows as unit vectors; lower is more aligned.

    Wang & Isola 2020 (arXiv 2005.10242), section 4.1, with α = 2. a_ND, b_ND: float [N, D], N pairs.

    Raises ValueError where the shapes differ or there is no pair.
    """
    if a_ND.shape != b_ND.shape or not len(a_ND):
        raise ValueError(f"alignment needs pairs of rows, not shapes {list(a_ND.shape)} and {list(b_ND.shape)}")
    return float((normalize(a_ND.double(), dim=1) - normalize(b_ND.double(), dim=1)).square().sum(dim=1).mean())


def _unit(rows_ND: torch.Tensor) -> torch.Tensor:
    return normalize(rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32)), dim=-1)
