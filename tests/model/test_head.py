import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raygrec.model.head import (
    CatalogueHead,
    Cells,
    ItemRows,
    OwnNodes,
    Targets,
    TiedHead,
    catalogue_cross_entropy,
    matched,
)

POSITIONS, WIDTH, ITEMS, NODE_WIDTH, TEXT_WIDTH = 7, 5, 11, 3, 4


def single_targets(items: torch.Tensor) -> Targets:
    return Targets(torch.arange(len(items) + 1), items, torch.ones(len(items)))


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and the items' nodes and texts."""
    torch.manual_seed(0)
    return torch.randn(POSITIONS, WIDTH), torch.randn(ITEMS, NODE_WIDTH), torch.randn(ITEMS, TEXT_WIDTH)


def head_of() -> CatalogueHead:
    """A head none of whose parameters is zero."""
    torch.manual_seed(1)
    head = CatalogueHead(WIDTH, ITEMS, NODE_WIDTH, TEXT_WIDTH)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_single_targets_against_torch():
    hidden, nodes, texts = example()
    head = head_of()
    rows = head.rows(nodes, texts)
    wanted = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    loss = head(hidden, rows, single_targets(wanted))
    torch.testing.assert_close(loss, functional.cross_entropy(head(hidden, rows), wanted, reduction="sum"))


def test_soft_targets_against_torch():
    hidden, nodes, texts = example()
    head = head_of()
    rows = head.rows(nodes, texts)
    counts = torch.tensor([1, 3, 2, 1, 4, 1, 2])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    weights = torch.cat([torch.rand(int(count)).softmax(0) for count in counts])
    wanted = torch.cat([torch.randperm(ITEMS)[: int(count)] for count in counts])
    targets = Targets(indptr, wanted, weights)
    dense = torch.zeros(POSITIONS, ITEMS).index_put((targets.rows, wanted), weights)
    expected = functional.cross_entropy(head(hidden, rows), dense, reduction="sum")
    torch.testing.assert_close(head(hidden, rows, targets), expected)


def loss_of(
    head: CatalogueHead, hidden: torch.Tensor, rows: torch.Tensor, targets: Targets, at_once: int
) -> torch.Tensor:
    """`head(hidden, rows, targets)`, of which the logits of `at_once` positions stand in memory."""
    return catalogue_cross_entropy(head.query(hidden), rows, head.bias, targets, at_once)


@pytest.mark.parametrize("at_once", [1, 2, 6, 7, 100])
def test_parts_change_neither_value_nor_gradient(at_once):
    """The gradients are those that autograd finds for the plain product and torch's cross-entropy."""
    hidden, nodes, texts = example()
    hidden.requires_grad_()
    head, wanted = head_of(), torch.tensor([0, 10, 3, 3, 7, 1, 2])
    plain = head.query(hidden) @ head.rows(nodes, texts).T + head.bias
    expected = functional.cross_entropy(plain, wanted, reduction="sum")
    loss = loss_of(head, hidden, head.rows(nodes, texts), single_targets(wanted), at_once)
    torch.testing.assert_close(loss, expected)
    leaves = dict(head.named_parameters()) | {"hidden": hidden}
    gradients = [torch.autograd.grad(3 * one, list(leaves.values())) for one in (loss, expected)]
    for name, found, gradient in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(found, gradient, msg=name)
        assert gradient.abs().max() > 1e-3, name


def test_gradients_of_soft_targets_against_torch():
    """An item that stands twice among a position's targets has both weights."""
    hidden, nodes, texts = example()
    head = head_of()
    items = torch.tensor([2, 2, 5, 0, 1, 2, 3, 9, 9, 10])
    weights = torch.tensor([0.5, 0.25, 0.25, *[1.0] * 5, 0.4, 0.6])
    targets = Targets(torch.tensor([0, 3, 4, 5, 6, 7, 8, 10]), items, weights)
    dense = torch.zeros(POSITIONS, ITEMS).index_put((targets.rows, items), weights, accumulate=True)
    leaves = [hidden.requires_grad_(), *head.parameters()]
    expected = functional.cross_entropy(head(hidden, head.rows(nodes, texts)), dense, reduction="sum")
    loss = loss_of(head, hidden, head.rows(nodes, texts), targets, 2)
    torch.testing.assert_close(loss, expected)
    for found, gradient in zip(*(torch.autograd.grad(one, leaves) for one in (loss, expected)), strict=True):
        torch.testing.assert_close(found, gradient)


def test_logits_that_no_softmax_tells_from_zero_have_a_finite_loss():
    """Their share underflows in fp32; its logarithm does not."""
    hidden, _, _ = example()
    rows = torch.zeros(ITEMS, WIDTH)
    bias = torch.tensor([200.0, *[0.0] * (ITEMS - 1)]).requires_grad_()
    loss = catalogue_cross_entropy(hidden, rows, bias, single_targets(torch.full((POSITIONS,), 1)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200.0 * POSITIONS)
    assert bias.grad.tolist() == pytest.approx([POSITIONS, -POSITIONS, *[0.0] * (ITEMS - 2)])


def test_no_tensor_that_autograd_keeps_grows_with_the_logits():
    """The memory claim of the docstring: gradients of queries, rows and bias alone are kept."""
    hidden, nodes, texts = example()
    head = head_of()
    queries, rows = head.query(hidden).detach().requires_grad_(), head.rows(nodes, texts).detach().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        matched(queries, rows, head.bias, single_targets(torch.arange(POSITIONS)))
    assert [tuple(tensor.shape) for tensor in kept] == [(POSITIONS, NODE_WIDTH), (ITEMS, NODE_WIDTH), (ITEMS,)]


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation returns, those of autograd included."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


@pytest.mark.parametrize("fits", [1, 3])
@pytest.mark.parametrize("with_gradients", [True, False], ids=["training", "evaluation"])
def test_no_tensor_is_larger_than_the_logits_of_the_positions_at_once(fits, with_gradients, monkeypatch):
    """By the head's own choice of how many: 5 of 42, with a trend and with something added to some logits."""
    positions, items, at_once = 42, 60, 5
    monkeypatch.setattr("raygrec.model.head.ON_A_CPU", at_once * items)
    monkeypatch.setattr("raygrec.model.head.FEWEST_AT_ONCE", 1)
    queries, rows = torch.randn(positions, NODE_WIDTH), torch.randn(items, NODE_WIDTH)
    leaves = [leaf.requires_grad_() for leaf in (queries, rows, torch.zeros(items), torch.randn(positions))]
    each, numbers = torch.arange(positions + 1), torch.arange(positions)
    targets = Targets(each, numbers, torch.ones(positions), numbers % 2)
    own = OwnNodes(torch.randn(fits, items, NODE_WIDTH), numbers % fits, torch.eye(NODE_WIDTH)) if fits > 1 else None
    given = targets, own, torch.randn(2, items), Cells(each, numbers, leaves[3])
    with Largest() as largest, torch.set_grad_enabled(with_gradients):
        loss = matched(*leaves[:3], *given)
        if with_gradients:
            loss.backward()
    assert largest.entries == at_once * items
    assert all((leaf.grad is not None) == with_gradients for leaf in leaves)


def test_evaluation_makes_no_gradients(monkeypatch):
    hidden, nodes, texts = example()
    head = head_of()
    with torch.no_grad():
        rows = head.rows(nodes, texts)
        expected = functional.cross_entropy(head(hidden, rows), torch.arange(POSITIONS), reduction="sum")
        monkeypatch.setattr(torch.Tensor, "addmm_", None)  # what gradients of the rows are added up with
        loss = head(hidden, rows, single_targets(torch.arange(POSITIONS)))
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def test_no_positions_give_zero_that_still_reaches_the_head():
    head = head_of()
    _, nodes, texts = example()
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    loss = head(hidden, head.rows(nodes, texts), single_targets(torch.zeros(0).long()))
    loss.backward()
    assert loss == 0
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("tables", [[0, 2, 2, 0, 2, 0, 0], [1] * POSITIONS])
@pytest.mark.parametrize("at_once", [2, 100])
def test_each_position_is_matched_with_the_rows_of_its_own_table(tables, at_once):
    """No position of a table, and positions of all; values and gradients are those of one position at a time."""
    hidden, nodes, texts = example()
    hidden.requires_grad_()
    head, tables = head_of(), torch.tensor(tables)
    nodes_KId = torch.stack([nodes, nodes.flip(0), torch.randn_like(nodes)])
    indptr = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])
    targets = Targets(indptr, torch.tensor([2, 9, 5, 0, 1, 3, 10, 4]), torch.tensor([0.4, 0.6, *[1.0] * 6]))
    alone = [head(hidden[p : p + 1], head.rows(nodes_KId[table], texts)) for p, table in enumerate(tables)]
    rows, own = head.rows(None, texts), OwnNodes(nodes_KId, tables, head.rows.from_node(torch.eye(NODE_WIDTH)))
    torch.testing.assert_close(head(hidden, rows, None, own), torch.cat(alone))
    dense = torch.zeros(POSITIONS, ITEMS).index_put((targets.rows, targets.items), targets.weights)
    expected = -(torch.cat(alone).log_softmax(1) * dense).sum()
    loss = catalogue_cross_entropy(head.query(hidden), rows, head.bias, targets, at_once, own)
    torch.testing.assert_close(loss, expected)
    leaves = [hidden, *head.parameters()]
    for found, gradient in zip(*(torch.autograd.grad(one, leaves) for one in (loss, expected)), strict=True):
        torch.testing.assert_close(found, gradient)
        assert gradient.abs().max() > 1e-3
    rows, own = head.rows(None, texts), own._replace(tables_P=tables[:0])
    nothing = head(hidden[:0], rows, targets.take(torch.arange(0)), own)
    assert nothing == 0 and nothing.requires_grad


@pytest.mark.parametrize("tables", [None, [0, 2, 2, 0, 2, 0, 0]], ids=["one fit", "fits"])
@pytest.mark.parametrize("at_once", [2, 100])
def test_each_position_has_the_trend_of_its_moment(tables, at_once):
    """Values and gradients are those of logits to which the moments' rows are added."""
    hidden, nodes, texts = example()
    hidden.requires_grad_()
    head, trend_MI, moments = head_of(), torch.randn(4, ITEMS), torch.tensor([3, 0, 0, 1, 3, 2, 1])
    nodes_KId = torch.stack([nodes, nodes.flip(0), torch.randn_like(nodes)])
    wanted, own, nodes_n = torch.tensor([0, 10, 3, 3, 7, 1, 2]), None, nodes
    if tables is not None:
        own = OwnNodes(nodes_KId, torch.tensor(tables), head.rows.from_node(torch.eye(NODE_WIDTH)))
        nodes_n = None
    rows = head.rows(nodes_n, texts)
    expected = functional.cross_entropy(head(hidden, rows, None, own) + trend_MI[moments], wanted, reduction="sum")
    targets = Targets(torch.arange(POSITIONS + 1), wanted, torch.ones(POSITIONS), moments)
    loss = catalogue_cross_entropy(head.query(hidden), rows, head.bias, targets, at_once, own, trend_MI)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head(hidden, rows, targets, own, trend_MI), expected)
    leaves = [hidden, *head.parameters()]
    gradients = (torch.autograd.grad(one, leaves, retain_graph=True) for one in (loss, expected))
    for found, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(found, gradient)


def test_what_is_added_in_bf16_is_near_that_of_fp32():
    hidden, nodes, texts = example()
    head, targets = head_of(), single_targets(torch.arange(POSITIONS))
    found = []
    for kind in (torch.float32, torch.bfloat16):
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0], requires_grad=True)
        added = Cells(torch.tensor([0, 2, 2, 3, 3, 3, 6, 6]), torch.tensor([0, 4, 3, 1, 10, 7]), weights)
        head = head.to(kind)
        loss = head(hidden.to(kind), head.rows(nodes.to(kind), texts.to(kind)), targets, added=added)
        loss.backward()
        assert loss.dtype == weights.grad.dtype == torch.float32
        found.append(torch.cat([loss.detach()[None], weights.grad]))
    assert found[0][1:].abs().min() > 0
    torch.testing.assert_close(found[1], found[0], rtol=0.03, atol=0.01)


@pytest.mark.parametrize("tables", [None, [0, 2, 2, 0, 2, 0, 0]], ids=["one fit", "fits"])
@pytest.mark.parametrize("at_once", [2, 100])
def test_some_logits_have_something_added(tables, at_once):
    """Values and gradients, of what is added too, are those of dense logits plus it."""
    hidden, nodes, texts = example()
    weights = torch.randn(6, requires_grad=True)
    added = Cells(torch.tensor([0, 2, 2, 3, 3, 3, 6, 6]), torch.tensor([0, 4, 3, 1, 10, 7]), weights)
    hidden.requires_grad_()
    head, wanted, own = head_of(), torch.tensor([0, 10, 3, 3, 7, 1, 2]), None
    if tables is not None:
        own = OwnNodes(torch.stack([nodes, nodes.flip(0), torch.randn_like(nodes)]), torch.tensor(tables), torch.eye(3))
    rows = head.rows(nodes if own is None else None, texts)
    dense = head(hidden, rows, None, own) + torch.zeros(POSITIONS, ITEMS).index_put((added.rows, added.items), weights)
    torch.testing.assert_close(head(hidden, rows, None, own, added=added), dense)
    expected, targets = functional.cross_entropy(dense, wanted, reduction="sum"), single_targets(wanted)
    loss = catalogue_cross_entropy(head.query(hidden), rows, head.bias, targets, at_once, own, added=added)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head(hidden, rows, targets, own, added=added), expected)
    leaves = [weights, hidden, *head.parameters()]
    gradients = (torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True) for one in (loss, expected))
    for found, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(found, gradient)


def test_in_bf16_loss_is_fp32_and_gradients_are_near_those_of_fp32():
    hidden, nodes, texts = example()
    head, targets = head_of(), single_targets(torch.arange(POSITIONS))
    gradients = []
    for kind in (torch.float32, torch.bfloat16):
        head = head.to(kind)
        head.zero_grad()
        loss = head(hidden.to(kind), head.rows(nodes.to(kind), texts.to(kind)), targets)
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append({name: parameter.grad.float() for name, parameter in head.named_parameters()})
        assert all(parameter.grad.dtype == kind for parameter in head.parameters())
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.05 * exact.norm(), name


def test_rows_in_fp32_match_hidden_states_that_are_not():
    """As under autocast, where the rows keep the free part's precision."""
    hidden, nodes, texts = example()
    head = head_of()
    rows = head.rows(nodes, texts)
    logits = head.bfloat16()(hidden.bfloat16(), rows)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), head.float()(hidden, rows), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("with_texts", [True, False], ids=["texts", "no texts"])
@pytest.mark.parametrize("free", [True, False], ids=["free", "not free"])
def test_the_rows_by_hand(free, with_texts):
    """R_i = A E_i + P t_i + Δ_i, one item and one column at a time."""
    _, nodes, texts = example()
    rows = ItemRows(ITEMS, NODE_WIDTH, TEXT_WIDTH if with_texts else None, free, start=0.5)
    found = rows(nodes, texts if with_texts else None)
    assert found.shape == (ITEMS, NODE_WIDTH)
    for item in range(ITEMS):
        for column in range(NODE_WIDTH):
            expected = sum(rows.from_node.weight[column, d] * nodes[item, d] for d in range(NODE_WIDTH))
            if with_texts:
                expected = expected + sum(rows.from_text.weight[column, t] * texts[item, t] for t in range(TEXT_WIDTH))
            if free:
                assert rows.free[item, column] != 0
                expected = expected + rows.free[item, column]
            torch.testing.assert_close(found[item, column], expected)
    some = torch.tensor([4, 0, 4])
    alone = rows(nodes[some], texts[some] if with_texts else None, some)
    torch.testing.assert_close(alone, found[some])


def test_a_tied_head_has_no_parameter_but_a_bias_an_item():
    assert {name: tuple(p.shape) for name, p in TiedHead(ITEMS).named_parameters()} == {"bias": (ITEMS,)}


def test_only_free_rows_have_parameters_of_an_item():
    own = {free: {n for n, p in ItemRows(ITEMS, 3, 4, free).named_parameters() if len(p) == ITEMS} for free in (0, 1)}
    assert own == {0: set(), 1: {"free"}}


def test_the_head_is_one_linear_layer():
    """Z = functional.linear(h, R Q, R q + b), of rank d."""
    head = head_of()
    hidden, nodes, texts = example()
    rows = head.rows(nodes, texts)
    weight = rows @ head.query.weight
    bias = rows @ head.query.bias + head.bias
    torch.testing.assert_close(head(hidden, rows), functional.linear(hidden, weight, bias))


def test_rows_start_as_functions_of_node_and_text():
    """The free part is zero at first, so that items alike in both have equal logits; then it tells them apart."""
    hidden, nodes, texts = example()
    nodes[1], texts[1] = nodes[0], texts[0]
    head = CatalogueHead(WIDTH, ITEMS, NODE_WIDTH, TEXT_WIDTH)
    logits = head(hidden, head.rows(nodes, texts))
    torch.testing.assert_close(logits[:, 0], logits[:, 1], rtol=0, atol=0)
    assert (logits[:, 0] - logits[:, 2]).abs().max() > 0
    head.rows.free.data[1] += 1.0
    changed = head(hidden, head.rows(nodes, texts))
    assert not torch.equal(changed[:, 1], logits[:, 1])
    assert torch.equal(changed[:, 0], logits[:, 0])


def test_slices_of_targets():
    targets = Targets(torch.tensor([0, 2, 2, 5]), torch.tensor([4, 3, 2, 1, 0]), torch.ones(5))
    part = targets.part(1, 3)
    assert len(part) == 2
    assert part.indptr.tolist() == [0, 0, 3]
    assert part.items.tolist() == [2, 1, 0]
    assert part.rows.tolist() == [1, 1, 1]
    assert len(targets.part(3, 3)) == 0
