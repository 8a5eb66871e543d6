"""LightGCN: node embeddings of the user-item graph, pretrained with BPR (He et al., SIGIR 2020)."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.nn import functional

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.graph.text_contrast import TextContrast
from raygrec.progress import progress_bar
from raygrec.tensors import load_tensors, save_tensors

_FOLDS = 1  # what a draw is for
AT_ONCE, ON_A_CPU = 2**20, 2**9  # negatives whose rows a step holds at a time; on a CPU few enough for its cache
INITIAL_SCALE = 0.1  # standard deviation of the ego embeddings at the start, as in the authors' code


class LightGCNConfig(StrictConfig):
    """Settings of the pretraining; the defaults were tuned on the validation items of Amazon Beauty."""

    dim: int = Field(128, ge=1)
    layers: int = Field(4, ge=0)
    lr: float = Field(1e-2, gt=0)
    l2: float = Field(1e-4, ge=0)
    batch_size: int = Field(16384, ge=1)
    negatives: int = Field(1, ge=1)
    epochs: int = Field(50, ge=1)
    evaluate_every: int = Field(10, ge=1)
    patience: int = Field(3, ge=1)
    folds: int = Field(0, ge=0)
    """[ours] LightGCN is fitted so many times more, each time without the edges of one part of the users; recipes read
    a user's history, and match it with the catalogue, by the fit that knows none of the user's edges. 0: by the one
    fit on all edges."""
    text_weight: float = Field(0.0, ge=0)
    """Weight of RLMRec-Con's contrast between nodes and the language model's text vectors; 0 is plain LightGCN."""
    text_temperature: float = Field(0.2, gt=0)

    @field_validator("folds")
    @classmethod
    def _one_fold_is_none(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold would be fitted on no edge; use 0 (no folds) or 2 and more")
        return folds

    @property
    def name(self) -> str:
        return "RLMRec-Con" if self.text_weight else "LightGCN"


@dataclass(frozen=True)
class NodeEmbeddings:
    """Final LightGCN embeddings, and the two parts that rebuild a user from any history.

    users [U, d] and items [I, d]: averaged over the layers, eq. (8).
    users_ego [U, d]: the part of `users` that is the user's own, e_u^(0) / (L + 1).
    items_inductive [I, d]: what one item gives to a user who holds it (see `propagate_users`).
    fold_of [U] int64: the user's fold, 1…K; 0 where there are no folds.
    fold_items, fold_shares [K, I, d]: `items` and `items_inductive` of the fit without fold k + 1, turned into the
    space of `items`.
    """

    users: torch.Tensor
    items: torch.Tensor
    users_ego: torch.Tensor
    items_inductive: torch.Tensor
    fold_of: torch.Tensor
    fold_items: torch.Tensor
    fold_shares: torch.Tensor

    @property
    def item_tables(self) -> torch.Tensor:
        """[K + 1, I, d]: `items`, which knows every edge, then those that do not know fold 1…K's."""
        return torch.cat([self.items[None], self.fold_items])

    @property
    def share_tables(self) -> torch.Tensor:
        """[K + 1, I, d], as `item_tables`."""
        return torch.cat([self.items_inductive[None], self.fold_shares])

    def save(self, path: Path, metadata: dict[str, object] | None = None) -> None:
        """Writes one safetensors file, atomically; `metadata` goes into its header as JSON values."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vars(self).items()}
        header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
        save_tensors(path, tensors, header)

    @staticmethod
    def load(path: Path) -> "NodeEmbeddings":
        """Reads what `save` wrote; `InputError` where the file is not such a file."""
        names = list(NodeEmbeddings.__dataclass_fields__)
        tensors = load_tensors(path)
        missing = set(names) - tensors.keys()
        if missing:
            raise InputError(f"{path}: tensor '{min(missing)}' is missing; expected {', '.join(names)}")
        return NodeEmbeddings(*(tensors[name] for name in names))


def normalized_adjacency(train: CSR, num_items: int) -> torch.Tensor:
    """D^-1/2 A D^-1/2 of the bipartite graph, eq. (7); users are nodes 0…U-1, items follow.

    Returns a symmetric sparse CSR tensor [U + I, U + I]; a repeated interaction counts once.
    """
    users, items = _edges(train, num_items)
    rows = np.concatenate([users, items + len(train)])
    columns = np.concatenate([items + len(train), users])
    num_nodes = len(train) + num_items
    order = np.lexsort((columns, rows))
    degrees = np.bincount(rows, minlength=num_nodes)
    weights = 1 / np.sqrt(degrees[rows] * degrees[columns])
    # 32-bit indices: the CPU kernel would otherwise convert them at every product.
    crow = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)
    parts = (crow, columns[order].astype(np.int32), weights[order].astype(np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            *(torch.from_numpy(part) for part in parts), size=(num_nodes, num_nodes), check_invariants=True
        )


def _edges(train: CSR, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (user, item) pairs, sorted: two int64 arrays."""
    items = np.asarray(train.indices, dtype=np.int64)
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        wrong = items.min() if items.min() < 0 else items.max()
        raise InputError(f"training interactions: item {wrong} is outside 0…{num_items - 1}")
    return np.divmod(np.unique(train.rows * num_items + items), num_items)


def _layer_sum(
    adjacency: torch.Tensor, x: torch.Tensor, layers: int, buffers: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Σ_{l = 0…L} A^l x, in one of two buffers where there are any, and then good until they are used again.

    Horner's scheme: x + A(x + A(x + …)) needs one addition a layer. A is symmetric: this is also the map's gradient.
    """
    total = x
    for layer in range(layers):
        total = torch.addmm(x, adjacency, total, out=buffers[layer % 2] if buffers else None)
    return total


def propagate(adjacency: torch.Tensor, ego: torch.Tensor, layers: int) -> torch.Tensor:
    """Final embeddings: the mean of layers 0…L of the light graph convolution, eqs. (7) and (8).

    adjacency: symmetric sparse [N, N]. ego: [N, d]. Returns [N, d].
    """
    return _layer_sum(adjacency, ego, layers) / (layers + 1)


def propagate_users(items_inductive: torch.Tensor, histories: CSR) -> torch.Tensor:
    """Embeddings of users known only by a history: [B rows of `histories`] -> [B, d].

    u(H) = |H|^-1/2 Σ_{i in H} items_inductive[i] for the set H of its items, with
    items_inductive[i] = deg_i^-1/2 Σ_{l=0}^{L-1} e_i^(l) / (L + 1).
    For a user's whole training history, adding the user's row of `users_ego` gives eq. (8) exactly. A history
    without the target leaves the target edge out of the user's own sum (not out of the items' deeper layers).
    A repeated item counts once, as in the adjacency; an empty history gives zeros.
    """
    device = items_inductive.device
    users, items = _edges(histories, len(items_inductive))
    counts_B = np.bincount(users, minlength=len(histories))
    total = functional.embedding_bag(
        torch.from_numpy(items).to(device),
        items_inductive,
        torch.from_numpy(np.cumsum(counts_B) - counts_B).to(device),
        mode="sum",
    )
    return total * torch.from_numpy(counts_B).to(device).clamp(min=1).to(total.dtype).rsqrt()[:, None]


def node_embeddings(adjacency: torch.Tensor, ego: torch.Tensor, layers: int, num_users: int) -> NodeEmbeddings:
    """All that downstream models read, from the ego embeddings [U + I, d]."""
    final = propagate(adjacency, ego, layers)
    degrees = adjacency.crow_indices().diff()[num_users:].clamp(min=1).to(ego.dtype)
    # Σ_{l<L} A^l e is L times the average of one layer less.
    shallow = (
        propagate(adjacency, ego, layers - 1)[num_users:] * layers if layers else torch.zeros_like(ego[num_users:])
    )
    items = final[num_users:]
    return NodeEmbeddings(
        users=final[:num_users],
        items=items,
        users_ego=ego[:num_users] / (layers + 1),
        items_inductive=shallow * degrees.rsqrt()[:, None] / (layers + 1),
        fold_of=torch.zeros(num_users, dtype=torch.int64, device=ego.device),
        fold_items=items.new_zeros(0, *items.shape),
        fold_shares=items.new_zeros(0, *items.shape),
    )


class _Triplets:
    """Draws (user, item, other item) for BPR: every edge once per epoch, negatives uniform over the rest."""

    def __init__(self, train: CSR, num_items: int, negatives: int, generator: torch.Generator) -> None:
        users, items = _edges(train, num_items)
        self.num_items, self.negatives, self.generator = num_items, negatives, generator
        device = generator.device
        self.known = torch.from_numpy(users * num_items + items).to(device)  # ascending
        # A user who holds every item has no negative.
        usable = np.bincount(users, minlength=len(train))[users] < num_items
        if not usable.any():
            raise InputError("training interactions: none that a negative item can be drawn for")
        self.users = torch.from_numpy(users[usable]).to(device)
        self.items = torch.from_numpy(items[usable]).to(device)

    def epoch(self, batch_size: int) -> list[torch.Tensor]:
        """A random order of the edges, in batches of nearly equal size."""
        order = torch.randperm(len(self.users), generator=self.generator, device=self.generator.device)
        return list(order.tensor_split(-(-len(order) // batch_size)))

    def draw(self, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Users [B], their items [B] and negatives [B, n]."""
        users = self.users[edges]
        negatives = self._uniform((len(edges), self.negatives))
        wrong = self._is_known(users[:, None], negatives)
        while wrong.any():
            negatives[wrong] = self._uniform((int(wrong.sum()),))
            wrong &= self._is_known(users[:, None], negatives)
        return users, self.items[edges], negatives

    def _uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        device = self.generator.device
        return torch.randint(self.num_items, shape, generator=self.generator, device=device)

    def _is_known(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        keys = users * self.num_items + items
        places = torch.searchsorted(self.known, keys).clamp(max=len(self.known) - 1)
        return self.known[places] == keys


class _Step:
    """Loss and gradient of a step, eq. (15), written out: one propagation there, one back, in buffers that stay.

    Autograd would keep and clear a matrix of all nodes for each of the places where a batch reads them.
    """

    def __init__(self, adjacency: torch.Tensor, ego_Nd: torch.Tensor, config: LightGCNConfig) -> None:
        self.adjacency, self.ego_Nd, self.config = adjacency, ego_Nd, config
        self.buffers = torch.empty_like(ego_Nd), torch.empty_like(ego_Nd)
        self.by_sums_Nd = torch.empty_like(ego_Nd)

    @torch.no_grad()
    def __call__(
        self, users_B: torch.Tensor, items_B: torch.Tensor, negatives_Bn: torch.Tensor, contrast: TextContrast | None
    ) -> torch.Tensor:
        """Mean of -ln σ(u·i - u·j) over B × n, for node numbers; its gradient is then `ego_Nd.grad`, with that of the
        penalty, and with the contrast's, whose parameters have theirs."""
        share, layers = 1 / (self.config.layers + 1), self.config.layers
        sums_Nd = _layer_sum(self.adjacency, self.ego_Nd, layers, self.buffers)
        by_sums_Nd, loss = self.by_sums_Nd.zero_(), sums_Nd.new_zeros(())
        at_once = max((ON_A_CPU if sums_Nd.device.type == "cpu" else AT_ONCE) // negatives_Bn.shape[1], 1)
        for users_b, items_b, negatives_bn in zip(
            *(nodes.split(at_once) for nodes in (users_B, items_B, negatives_Bn)), strict=True
        ):
            users_bd, items_bd = sums_Nd.index_select(0, users_b), sums_Nd.index_select(0, items_b)
            others_bnd = sums_Nd.index_select(0, negatives_bn.flatten()).view(*negatives_bn.shape, -1)
            apart_bnd = others_bnd - items_bd[:, None]
            losing_bn = (apart_bnd * users_bd[:, None]).sum(-1) * share**2
            loss += functional.softplus(losing_bn).sum() / negatives_Bn.numel()
            slopes_bn1 = losing_bn.sigmoid()[..., None] * (share**2 / negatives_Bn.numel())
            by_negatives_bnd = slopes_bn1 * users_bd[:, None]
            _add_rows(by_sums_Nd, users_b, (slopes_bn1 * apart_bnd).sum(1))
            _add_rows(by_sums_Nd, items_b, -by_negatives_bnd.sum(1))
            _add_rows(by_sums_Nd, negatives_bn.flatten(), by_negatives_bnd.flatten(0, 1))
        if contrast:
            final_Nd = (sums_Nd * share).requires_grad_()
            with torch.enable_grad():
                (self.config.text_weight * contrast(final_Nd, users_B, items_B)).backward()
            by_sums_Nd.add_(final_Nd.grad, alpha=share)
        gradient_Nd = _layer_sum(self.adjacency, by_sums_Nd, layers, self.buffers)
        read_N = torch.cat([users_B, items_B, negatives_Bn.flatten()]).bincount(minlength=len(self.ego_Nd))
        penalty = self.config.l2 / len(users_B)
        self.ego_Nd.grad = gradient_Nd.addcmul_(self.ego_Nd, read_N[:, None].to(gradient_Nd.dtype), value=penalty)
        return loss


def _add_rows(total_Nd: torch.Tensor, nodes_n: torch.Tensor, rows_nd: torch.Tensor) -> None:
    """Adds rows to those of their nodes, in an order that is the same in every run."""
    if total_Nd.device.type == "cpu":
        total_Nd.index_add_(0, nodes_n, rows_nd)
    else:  # where `index_add_` adds in any order
        total_Nd.index_put_((nodes_n,), rows_nd, accumulate=True)


def pretrain(
    train: CSR,
    num_items: int,
    config: LightGCNConfig,
    seed: int,
    valid: CSR | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    device: str | torch.device = "cpu",
    title: str = "LightGCN epochs",
    texts: torch.Tensor | None = None,
) -> tuple[NodeEmbeddings, dict[str, list[float]]]:
    """Trains LightGCN on `train` [U rows of items] and returns its embeddings on the CPU, and the history.

    With `valid` [U rows], stops once NDCG@10 on it has not risen for `patience` evaluations, and returns the
    best epoch's embeddings; without it, the last epoch's. The history lists epoch, loss and ndcg@10 (NaN
    without `valid`) of every epoch that was evaluated. texts: [I, t], where the config gives them weight.
    Raises `InputError` for items out of range, no usable interaction, or a loss that is not finite.
    """
    generator = torch.Generator(device).manual_seed(seed)
    adjacency = normalized_adjacency(train, num_items).to(device)
    triplets = _Triplets(train, num_items, config.negatives, generator)
    ego = torch.empty(adjacency.shape[0], config.dim, device=device).normal_(0, INITIAL_SCALE, generator=generator)
    contrast = None
    if config.text_weight:
        if texts is None:
            raise InputError("LightGCN: text_weight asks for the items' text vectors")
        contrast = TextContrast(texts, train, config.dim, config.text_temperature, generator)
    step = _Step(adjacency, ego, config)
    optimizer = torch.optim.Adam(
        [ego.requires_grad_(), *(contrast.parameters() if contrast else ())], lr=config.lr, fused=True
    )
    history: dict[str, list[float]] = {"epoch": [], "loss": [], "ndcg@10": []}
    best, best_ego, waited = -1.0, ego, 0
    with progress_bar() as bar:
        task = bar.add_task(title, total=config.epochs, note="")
        for epoch in range(1, config.epochs + 1):
            loss = _train_epoch(step, triplets, contrast, optimizer, config)
            bar.advance(task)
            if epoch % config.evaluate_every and epoch != config.epochs:
                continue
            ndcg = _ndcg(adjacency, ego.detach(), config.layers, train, valid) if valid is not None else float("nan")
            for name, value in zip(history, (epoch, loss, ndcg), strict=True):
                history[name].append(value)
            bar.update(task, note=f"loss {loss:.4f} N@10 {ndcg:.4f}")
            if on_epoch:
                on_epoch({"epoch": epoch, "loss": loss, "ndcg@10": ndcg})
            if ndcg > best:
                best, best_ego, waited = ndcg, ego.detach().clone(), 0
            elif valid is not None and (waited := waited + 1) >= config.patience:
                break
    del step, optimizer, ego  # what they hold is as large as what is made now
    embeddings = node_embeddings(adjacency, best_ego.detach(), config.layers, len(train))
    return NodeEmbeddings(*(tensor.cpu() for tensor in vars(embeddings).values())), history


def pretrain_folds(
    train: CSR,
    num_items: int,
    config: LightGCNConfig,
    seed: int,
    whole: NodeEmbeddings,
    epochs: int,
    device: str | torch.device = "cpu",
    texts: torch.Tensor | None = None,
) -> NodeEmbeddings:
    """`whole`, the fit on all of `train`, with the fits that each leave out one fold of users.

    Node embeddings know the edges that they were fitted on: two items of one user lie closer than the items of a
    user they have never seen. A model that learns from such pairs trusts the nodes too much. Here the nodes that a
    user's history is read from know nothing of that user, in training as in validation and test.
    Each fit has its own space; the rotation between its items and those of `whole` brings it back (orthogonal
    Procrustes: Schönemann 1966). epochs: how long to fit, as validation chose for `whole`.
    """
    fold_of = 1 + Draws(seed, _FOLDS).permutation(len(train)) % config.folds
    longest = config.model_copy(update={"epochs": epochs, "evaluate_every": epochs})
    items, shares = [], []
    for fold in range(1, config.folds + 1):
        kept = fold_of[train.rows] != fold
        edges = CSR.from_pairs(train.rows[kept], np.asarray(train.indices)[kept], len(train))
        title = f"LightGCN without fold {fold} of {config.folds}"
        fit, _ = pretrain(edges, num_items, longest, seed, device=device, title=title, texts=texts)
        left, _, right = torch.linalg.svd(fit.items.T.double() @ whole.items.double())
        rotation = (left @ right).to(fit.items.dtype)
        items.append(fit.items @ rotation)
        shares.append(fit.items_inductive @ rotation)
    return replace(
        whole, fold_of=torch.from_numpy(fold_of), fold_items=torch.stack(items), fold_shares=torch.stack(shares)
    )


def _train_epoch(
    step: _Step,
    triplets: _Triplets,
    contrast: TextContrast | None,
    optimizer: torch.optim.Optimizer,
    config: LightGCNConfig,
) -> float:
    """One pass over the edges; returns the mean BPR loss."""
    num_users = len(step.ego_Nd) - triplets.num_items
    losses = []
    for edges in triplets.epoch(config.batch_size):
        users, items, negatives = triplets.draw(edges)
        optimizer.zero_grad()
        losses.append(step(users, items + num_users, negatives + num_users, contrast))
        optimizer.step()
    mean = float(torch.stack(losses).mean())
    if not np.isfinite(mean):
        raise InputError(f"LightGCN: the loss is {mean}; lower lr (now {config.lr})")
    return mean


@torch.no_grad()
def _ndcg(adjacency: torch.Tensor, ego: torch.Tensor, layers: int, train: CSR, valid: CSR) -> float:
    users, items = propagate(adjacency, ego, layers).split([len(train), len(ego) - len(train)])
    sums = evaluate_scores(
        lambda rows: users[torch.from_numpy(rows).to(users.device)] @ items.T,
        np.arange(len(train)),
        targets=valid,
        masks=[train],
        num_items=len(items),
        ks=(10,),
        progress=False,  # the epochs have a bar already
    )
    return sums.result()["ndcg@10"]
