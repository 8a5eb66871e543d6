import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch_geometric.nn import LightGCN

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.graph import lightgcn
from raygrec.graph.lightgcn import (
    LightGCNConfig,
    NodeEmbeddings,
    _Step,
    _Triplets,
    node_embeddings,
    normalized_adjacency,
    pretrain,
    pretrain_folds,
    propagate,
    propagate_users,
)
from raygrec.graph.text_contrast import TextContrast

USERS, ITEMS = 30, 20


def pyg_of(train: CSR, ego: torch.Tensor, layers: int) -> tuple[LightGCN, torch.Tensor]:
    """PyG's model with those ego embeddings, and the edges both ways."""
    edges = torch.from_numpy(np.stack([train.rows, train.indices + USERS]).astype(np.int64))
    pyg = LightGCN(USERS + ITEMS, ego.shape[1], layers)
    pyg.embedding.weight.data = ego.clone()
    return pyg, torch.cat([edges, edges.flip(0)], 1)


@pytest.fixture
def train() -> CSR:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 8, USERS)  # some users, and perhaps items, have no edge
    return CSR.from_lists([rng.choice(ITEMS - 1, size, replace=False) for size in lengths])


@pytest.fixture
def ego() -> torch.Tensor:
    return torch.randn(USERS + ITEMS, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def blocks() -> tuple[CSR, CSR]:
    """Two communities by parity; each user holds 6 of its 10 items, a seventh is the validation item."""
    rng = np.random.default_rng(0)
    picks = [rng.choice(10, 7, replace=False) * 2 + user % 2 for user in range(USERS)]
    return CSR.from_lists([pick[:6] for pick in picks]), CSR.from_lists([pick[6:] for pick in picks])


def test_adjacency_by_hand_counts_repeats_once():
    adjacency = normalized_adjacency(CSR.from_lists([[0, 1, 0], [1]]), num_items=2).to_dense()
    half, one = 1 / np.sqrt(2), 1 / 2
    upper = torch.tensor([[half, one], [0, half]])  # degrees: users 2 and 1, items 1 and 2
    expected = torch.zeros(4, 4)
    expected[:2, 2:], expected[2:, :2] = upper, upper.T
    torch.testing.assert_close(adjacency, expected)


def test_item_out_of_range_is_an_input_error():
    with pytest.raises(InputError, match="item 5 is outside 0…2"):
        normalized_adjacency(CSR.from_lists([[0, 5]]), num_items=3)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagate_equals_pyg(train, ego, layers):
    pyg, edges = pyg_of(train, ego, layers)
    torch.testing.assert_close(
        propagate(normalized_adjacency(train, ITEMS), ego, layers), pyg.get_embedding(edges), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("layers", "at_once"), [(0, 4), (1, 3), (3, 1)])
def test_a_step_has_the_loss_and_the_gradient_of_pyg(train, ego, layers, at_once, monkeypatch):
    """In parts or not. Two negatives of an edge are two edges with one each; nodes read twice are penalised twice."""
    monkeypatch.setattr(lightgcn, "ON_A_CPU", at_once)
    users, items = torch.tensor([3, 3, 7, 9]), torch.tensor([1, 2, 2, 5]) + USERS
    negatives = torch.tensor([[4, 4], [0, 7], [8, 2], [1, 6]]) + USERS
    pyg, edges = pyg_of(train, ego, layers)
    u, i, j = users.repeat_interleave(2), items.repeat_interleave(2), negatives.flatten()
    pairs = torch.cat([torch.stack([u, i]), torch.stack([u, j])], dim=1)
    loss = pyg.recommendation_loss(*pyg(edges, pairs).chunk(2), lambda_reg=0)
    penalty = sum(pyg.embedding.weight[nodes].square().sum() for nodes in (users, items, j)) / (2 * len(users))
    (loss + 0.3 * penalty).backward()

    ours = ego.clone().requires_grad_()
    step = _Step(normalized_adjacency(train, ITEMS), ours, LightGCNConfig(layers=layers, l2=0.3))
    for _ in range(2):  # its buffers hold the step before
        torch.testing.assert_close(step(users, items, negatives, None), loss.detach())
        torch.testing.assert_close(ours.grad, pyg.embedding.weight.grad, atol=1e-5, rtol=1e-5)


def test_a_step_adds_the_gradient_of_the_contrast_with_texts(train, ego):
    adjacency = normalized_adjacency(train, ITEMS)
    texts = torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(1))
    contrast = TextContrast(texts, train, ego.shape[1], 0.2, torch.Generator().manual_seed(2))
    nodes = torch.tensor([3, 4]), torch.tensor([31, 32]), torch.tensor([[40], [41]])
    config = LightGCNConfig(layers=2, text_weight=0.7)
    found = []
    for used in (None, contrast):
        ours = ego.clone().requires_grad_()
        _Step(adjacency, ours, config)(*nodes, used)
        found.append(ours.grad)
    by_map = [p.grad.clone() for p in contrast.parameters()]
    contrast.zero_grad()
    theirs = ego.clone().requires_grad_()
    dense = adjacency.to_dense()
    (0.7 * contrast((theirs + dense @ theirs + dense @ dense @ theirs) / 3, *nodes[:2])).backward()
    torch.testing.assert_close(found[1] - found[0], theirs.grad)
    torch.testing.assert_close(by_map, [p.grad for p in contrast.parameters()])


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_own_part_plus_history_rebuilds_every_user(train, ego, layers):
    embeddings = node_embeddings(normalized_adjacency(train, ITEMS), ego, layers, USERS)
    rebuilt = embeddings.users_ego + propagate_users(embeddings.items_inductive, train)
    torch.testing.assert_close(rebuilt, embeddings.users)


def test_propagate_users_without_the_target_edge_by_hand():
    items_inductive = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    users = propagate_users(items_inductive, CSR.from_lists([[0, 1], [], [1]]))
    expected = torch.tensor([[1 / np.sqrt(2), 2 / np.sqrt(2)], [0, 0], [0, 2]], dtype=torch.float32)
    torch.testing.assert_close(users, expected)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_repeated_items_count_once_where_users_are_rebuilt(ego, layers):
    """As in the adjacency, in rows that begin and end with a repeat."""
    once, repeated = CSR.from_lists([[0, 1], [], [2, 0], [1]]), CSR.from_lists([[0, 1, 1, 1], [], [2, 2, 0, 2], [1, 1]])
    embeddings = node_embeddings(normalized_adjacency(repeated, 3), ego[:7], layers, 4)
    rebuilt = propagate_users(embeddings.items_inductive, repeated)
    torch.testing.assert_close(embeddings.users_ego + rebuilt, embeddings.users)
    torch.testing.assert_close(rebuilt, propagate_users(embeddings.items_inductive, once))


def test_negatives_are_uniform_over_the_items_a_user_does_not_hold():
    triplets = _Triplets(CSR.from_lists([[0, 1], [0, 1, 2, 3]]), 4, 900, torch.Generator().manual_seed(0))
    users, items, negatives = triplets.draw(torch.arange(2))
    assert users.tolist() == [0, 0] and items.tolist() == [0, 1]  # user 1 holds everything
    counts = negatives.flatten().bincount(minlength=4)
    assert counts[:2].sum() == 0
    assert abs(int(counts[2]) - 900) < 4 * np.sqrt(450)  # within four standard deviations


def test_an_epoch_visits_every_edge_once(train):
    batches = _Triplets(train, ITEMS, 1, torch.Generator().manual_seed(0)).epoch(batch_size=10)
    assert max(map(len, batches)) <= 10
    assert torch.cat(batches).sort().values.tolist() == list(range(len(train.indices)))


def test_pretrain_finds_communities_and_repeats_itself(blocks):
    train, valid = blocks
    config = LightGCNConfig(dim=8, layers=2, batch_size=64, epochs=20)
    embeddings, history = pretrain(train, ITEMS, config, seed=0, valid=valid)
    scores = embeddings.users @ embeddings.items.T
    assert scores[::2, ::2].min() > scores[::2, 1::2].max()
    assert history["loss"][-1] < history["loss"][0]
    again, _ = pretrain(train, ITEMS, config, seed=0, valid=valid)
    torch.testing.assert_close(again.users, embeddings.users, rtol=0, atol=0)


def test_early_stopping_returns_the_best_epoch(blocks):
    train, valid = blocks
    config = LightGCNConfig(dim=8, layers=2, batch_size=64, epochs=60, evaluate_every=2, patience=2)
    seen: list[dict[str, float]] = []
    embeddings, history = pretrain(train, ITEMS, config, seed=0, valid=valid, on_epoch=seen.append)
    best = int(np.argmax(history["ndcg@10"]))
    assert [report["epoch"] for report in seen] == history["epoch"]
    assert history["epoch"][-1] < 60 and len(seen) == best + 1 + config.patience
    until_best = config.model_copy(update={"epochs": int(history["epoch"][best])})
    expected, _ = pretrain(train, ITEMS, until_best, seed=0)
    torch.testing.assert_close(embeddings.users, expected.users, rtol=0, atol=0)


def folded(train: CSR, folds: int = 3) -> NodeEmbeddings:
    config = LightGCNConfig(dim=8, layers=2, batch_size=64, folds=folds)
    whole, _ = pretrain(train, ITEMS, config.model_copy(update={"epochs": 4}), seed=0)
    return pretrain_folds(train, ITEMS, config, 0, whole, epochs=4)


def test_a_fold_of_users_leaves_no_trace_in_its_own_tables(blocks):
    """Give one user other items: distances between the items of that user's fit stay, those of the others change."""
    train, _ = blocks
    before = folded(train)
    assert torch.bincount(before.fold_of).tolist() == [0, 10, 10, 10]
    user = 7
    rows = [train[row] if row != user else (train[row] + 1) % ITEMS for row in range(USERS)]
    after = folded(CSR.from_lists(rows))
    own = int(before.fold_of[user]) - 1
    for name in ("fold_items", "fold_shares"):
        # Each fit is turned towards the fit on all edges, which knows the user: compare what turning leaves as it is.
        same = [
            torch.allclose(a @ a.T, b @ b.T, atol=1e-5)
            for a, b in zip(getattr(before, name), getattr(after, name), strict=True)
        ]
        assert same == [fold == own for fold in range(3)]


def test_folds_are_turned_into_the_space_of_the_whole_fit(blocks):
    """By scipy's own solution of the orthogonal Procrustes problem."""
    train, _ = blocks
    nodes = folded(train)
    for fold in range(3):
        kept = (nodes.fold_of != fold + 1).numpy()[train.rows]
        edges = CSR.from_pairs(train.rows[kept], train.indices[kept], USERS)
        fit, _ = pretrain(edges, ITEMS, LightGCNConfig(dim=8, layers=2, batch_size=64, epochs=4), seed=0)
        rotation = torch.from_numpy(orthogonal_procrustes(fit.items.numpy(), nodes.items.numpy())[0])
        torch.testing.assert_close(nodes.fold_items[fold], fit.items @ rotation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(nodes.fold_shares[fold], fit.items_inductive @ rotation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nodes.item_tables[1:], nodes.fold_items)
    assert torch.equal(nodes.item_tables[0], nodes.items) and torch.equal(nodes.share_tables[0], nodes.items_inductive)


def test_one_fold_is_refused():
    with pytest.raises(ValueError, match="one fold would be fitted on no edge"):
        LightGCNConfig(folds=1)


def test_pretrain_refuses_a_graph_without_negatives():
    with pytest.raises(InputError, match="negative"):
        pretrain(CSR.from_lists([[0, 1]]), 2, LightGCNConfig(), seed=0)


def test_save_and_load(train, ego, tmp_path):
    embeddings = node_embeddings(normalized_adjacency(train, ITEMS), ego, 2, USERS)
    path = tmp_path / "nodes.safetensors"
    embeddings.save(path, {"seed": 0})
    loaded = NodeEmbeddings.load(path)
    for name, tensor in vars(embeddings).items():
        assert torch.equal(getattr(loaded, name), tensor)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_load_names_a_damaged_file(tmp_path):
    path = tmp_path / "nodes.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"nodes\.safetensors: not readable"):
        NodeEmbeddings.load(path)
