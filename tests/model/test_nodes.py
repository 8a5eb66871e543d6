import pytest
import torch

from raygrec.model.nodes import ItemProjector, frame

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
