import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from raygrec.data.arrays import CSR
from raygrec.graph.lightgcn import propagate_users
from raygrec.model.nodes import (
    NODE_SCALE,
    ItemProjector,
    NodeTables,
    frame,
    nodes_of_texts,
    scaled_texts,
    users_of_items,
)
from tests.model.random_nodes import random_nodes

ITEMS, NODE_WIDTH, TEXT_WIDTH, WIDTH = 7, 3, 4, 5


def test_a_tied_head_is_the_inner_product_with_every_token():
    """Rows and queries of rank r give V_iᵀ h, with its gradients."""
    torch.manual_seed(0)
    projector = ItemProjector(ITEMS, NODE_WIDTH, TEXT_WIDTH, WIDTH, 0.05, tied=True)
    nodes, texts, hidden = torch.randn(ITEMS, NODE_WIDTH), torch.randn(ITEMS, TEXT_WIDTH), torch.randn(6, WIDTH)
    wanted = torch.randn(6, ITEMS)
    found = projector.queries(hidden) @ projector.rows(nodes, texts).T
    expected = hidden @ projector.projected(projector.rows(nodes, texts)).T
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((z * wanted).sum(), list(projector.parameters())) for z in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_start_with_the_size_that_is_asked_for(tied):
    """Of items with text vectors of the size that `scaled_texts` gives them."""
    torch.manual_seed(0)
    projector = ItemProjector(1000, 64, 384, 256, 0.05, tied)
    tokens = projector.projected(projector.rows(torch.zeros(1000, 64), 0.3 * torch.randn(1000, 384)))
    assert abs(float(tokens.detach().pow(2).mean().sqrt()) / 0.05 - 1) < 0.1


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 1)])
def test_a_frame_keeps_angles(shape):
    found = frame(*shape)
    assert found.shape == shape
    gram = found.T @ found if shape[0] >= shape[1] else found @ found.T
    torch.testing.assert_close(gram, max(shape) * torch.eye(min(shape)))


def test_without_a_graph_users_are_what_their_items_texts_say():
    """|H|^-1/2 Σ of the items' texts, in the directions that scikit-learn's PCA finds; items have no vector."""
    torch.manual_seed(0)
    texts, width = torch.randn(9, 6) * torch.tensor([5.0, 1, 4, 1, 3, 1]) + 7, 3
    train = CSR.from_lists([[0, 4, 8, 2], [], [3]])
    nodes = nodes_of_texts(texts, train, 9, width)
    found = PCA(width).fit_transform(scaled_texts(texts).numpy())
    users = np.stack([found[[0, 4, 8, 2]].sum(0) / 2, np.zeros(width), found[3]])
    np.testing.assert_allclose(nodes.users @ nodes.users.T, users @ users.T, rtol=1e-4, atol=1e-5)
    assert not nodes.items.any()
    tables = NodeTables(nodes)
    assert not tables.items_Id.any()
    assert float(tables.users_Ud.std()) == pytest.approx(NODE_SCALE)


def test_equal_nodes_point_where_they_did_and_are_as_long_as_each_other():
    """Those of every fit; an item without a vector has none."""
    nodes = random_nodes(5, ITEMS, NODE_WIDTH)
    nodes.items[3] = 0.0
    kept, equal = NodeTables(nodes).items_KId, NodeTables(nodes, equal=True).items_KId
    length = NODE_SCALE * NODE_WIDTH**0.5
    expected = torch.full(equal.shape[:2], length)
    expected[0, 3] = 0.0
    torch.testing.assert_close(equal.norm(dim=-1), expected)
    torch.testing.assert_close(equal * kept.norm(dim=-1, keepdim=True), kept * equal.norm(dim=-1, keepdim=True))
    assert torch.equal(NodeTables(nodes).users_Ud, NodeTables(nodes, equal=True).users_Ud)


def test_texts_with_fewer_columns_than_node_vectors_keep_all_of_them():
    texts, train = torch.randn(9, 4), CSR.from_lists([[item] for item in range(9)])
    nodes = nodes_of_texts(texts, train, 9, 6)
    known = scaled_texts(texts)
    torch.testing.assert_close(nodes.users @ nodes.users.T, known @ known.T)
    assert not nodes_of_texts(None, train, 9, 6).users.any()


@pytest.mark.parametrize("rows", [[[0, 1, 1, 1], [], [4, 0, 4], [4]], [[], []], [[3, 3]]])
def test_users_of_items_count_repeated_items_once(rows):
    """And are those that `propagate_users` makes, of rows with repeats and without."""
    torch.manual_seed(0)
    shares, histories = torch.randn(ITEMS, NODE_WIDTH), CSR.from_lists(rows)
    items, counts = torch.from_numpy(histories.indices.astype(np.int64)), torch.from_numpy(histories.lengths)
    found = users_of_items(shares, items, counts)
    for one in (histories, CSR.from_lists([sorted(set(row)) for row in rows])):
        torch.testing.assert_close(found, propagate_users(shares, one))
