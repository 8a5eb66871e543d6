import pytest
import torch
from torch.nn import functional

from raygrec.model.head import LinearHead, Targets, TiedHead, catalogue_cross_entropy

POSITIONS, WIDTH, ITEMS, NODE_WIDTH = 7, 5, 11, 3


def single_targets(items: torch.Tensor) -> Targets:
    return Targets(torch.arange(len(items) + 1), items, torch.ones(len(items)))


def example() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(POSITIONS, WIDTH), torch.randn(ITEMS, NODE_WIDTH)


def heads() -> list[torch.nn.Module]:
    torch.manual_seed(1)
    tied = TiedHead(WIDTH, ITEMS, NODE_WIDTH)
    tied.bias.weight.data.normal_()
    linear = LinearHead(WIDTH, ITEMS, NODE_WIDTH)
    linear.output.weight.data.normal_()
    return [linear, tied]


@pytest.mark.parametrize("head", heads(), ids=["linear", "tied"])
def test_single_targets_against_torch(head):
    hidden, items = example()
    wanted = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    loss = catalogue_cross_entropy(head, hidden, items, single_targets(wanted))
    torch.testing.assert_close(loss, functional.cross_entropy(head(hidden, items), wanted, reduction="sum"))


def test_soft_targets_against_torch():
    hidden, items = example()
    head = heads()[0]
    counts = torch.tensor([1, 3, 2, 1, 4, 1, 2])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    weights = torch.cat([torch.rand(int(count)).softmax(0) for count in counts])
    wanted = torch.cat([torch.randperm(ITEMS)[: int(count)] for count in counts])
    targets = Targets(indptr, wanted, weights)
    dense = torch.zeros(POSITIONS, ITEMS).index_put((targets.rows, wanted), weights)
    expected = functional.cross_entropy(head(hidden, items), dense, reduction="sum")
    torch.testing.assert_close(catalogue_cross_entropy(head, hidden, items, targets), expected)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("head", heads(), ids=["linear", "tied"])
def test_chunks_change_neither_value_nor_gradient(head, chunks):
    hidden, items = example()
    targets = single_targets(torch.tensor([0, 10, 3, 3, 7, 1, 2]))
    results = []
    for number in (1, chunks):
        hidden.requires_grad_().grad = None
        head.zero_grad()
        loss = catalogue_cross_entropy(head, hidden, items, targets, number)
        loss.backward()
        results.append([loss.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters())])
    torch.testing.assert_close(*results)


def test_parts_do_not_hold_all_logits_for_the_backward_pass():
    """The memory claim of the docstring: no tensor that autograd keeps is as large as the logits."""
    hidden, items = example()
    kept = []

    def largest(chunks: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            targets = single_targets(torch.arange(POSITIONS))
            catalogue_cross_entropy(heads()[0], hidden.requires_grad_(), items, targets, chunks)
        return sum(tensor.numel() for tensor in kept if tensor.shape[-1:] == (ITEMS,) and tensor.ndim == 2)

    assert largest(1) >= POSITIONS * ITEMS
    assert largest(POSITIONS) == 0


@pytest.mark.parametrize("chunks", [1, 4])
def test_no_positions_give_zero_that_still_reaches_the_head(chunks):
    head = heads()[0]
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    loss = catalogue_cross_entropy(
        head, hidden, torch.zeros(ITEMS, NODE_WIDTH), single_targets(torch.zeros(0).long()), chunks
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(head.output.weight.grad, torch.zeros(ITEMS, WIDTH))


def test_loss_is_fp32_where_the_model_is_not():
    hidden, items = example()
    head = heads()[0].bfloat16()
    loss = catalogue_cross_entropy(head, hidden.bfloat16(), items, single_targets(torch.arange(POSITIONS)), 2)
    assert loss.dtype == torch.float32


def test_tied_logits_are_matches_against_the_projected_item_tokens():
    """(W E_i + b) · h' equals (Wᵀ h') · E_i up to a constant over items: the docstring's claim."""
    hidden, items = example()
    projector = torch.nn.Linear(NODE_WIDTH, WIDTH)
    matched = hidden @ projector(items).T
    head = TiedHead(WIDTH, ITEMS, NODE_WIDTH)
    head.query.weight.data = projector.weight.data.T.clone()
    head.query.bias.data.zero_()
    difference = matched - head(hidden, items)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
    torch.testing.assert_close(matched.softmax(1), head(hidden, items).softmax(1))


def test_slices_of_targets():
    targets = Targets(torch.tensor([0, 2, 2, 5]), torch.tensor([4, 3, 2, 1, 0]), torch.ones(5))
    part = targets.slice(1, 3)
    assert len(part) == 2
    assert part.indptr.tolist() == [0, 0, 3]
    assert part.items.tolist() == [2, 1, 0]
    assert part.rows.tolist() == [1, 1, 1]
    assert len(targets.slice(3, 3)) == 0


def test_the_linear_head_is_one_linear_layer():
    head = heads()[0]
    hidden, items = example()
    weight = head.output.weight + items @ head.query.weight
    bias = head.output.bias + items @ head.query.bias
    torch.testing.assert_close(head(hidden, items), functional.linear(hidden, weight, bias))
