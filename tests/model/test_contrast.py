"""The contrastive terms against loops over numbers, and on real gloo groups against one plain process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from raygrec.model.contrast import (
    MomentumCopy,
    NegativeQueue,
    alignment,
    contrast_terms,
    gathered,
    info_nce,
    rank_share,
    uniformity,
)
from tests.ranks import run_ranks

ANCHORS, EXTRA, WIDTH, TEMPERATURE = 5, 4, 3, 0.2
NO_ROWS, NO_IDS = torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Anchors, positives, their ids, extra rows, their ids: nodes met twice in the batch, in the queue, in both."""
    torch.manual_seed(0)
    rows = [torch.randn(count, WIDTH, dtype=dtype) for count in (ANCHORS, ANCHORS, EXTRA)]
    extra = functional.normalize(rows[2], dim=1)
    return rows[0], rows[1], torch.tensor([3, 8, 3, 5, 6]), extra, torch.tensor([8, 9, -1, 3])


def loop_info_nce(anchors, positives, ids, extra, extra_ids, temperature) -> float:
    def similarity(a, b):
        return float(np.dot(a, b) / math.sqrt(np.dot(a, a)) / math.sqrt(np.dot(b, b)))

    total = 0.0
    for n, anchor in enumerate(anchors):
        own = similarity(anchor, positives[n]) / temperature
        among = math.exp(own)
        for c, candidate in enumerate(positives):
            if c != n and ids[c] != ids[n]:
                among += math.exp(similarity(anchor, candidate) / temperature)
        for c, candidate in enumerate(extra):
            if extra_ids[c] not in (-1, ids[n]):
                among += math.exp(similarity(anchor, candidate) / temperature)
        total -= own - math.log(among)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05])
@pytest.mark.parametrize("extra", [0, 2, EXTRA])
def test_info_nce_against_a_double_loop(extra, temperature):
    anchors, positives, ids, rows, row_ids = example()
    arguments = anchors, positives, ids, rows[:extra], row_ids[:extra]
    expected = loop_info_nce(*(tensor.double().numpy() for tensor in arguments), temperature)
    assert float(info_nce(*arguments, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("extra", [0, EXTRA])
def test_pairs_with_the_same_positives_are_as_each_alone(extra):
    anchors, positives, ids, rows, row_ids = example(torch.float64)
    rest = ids, rows[:extra], row_ids[:extra], TEMPERATURE
    both = torch.stack([anchors, 0.3 * anchors.flip(0) + 0.1]).requires_grad_()
    together = info_nce(both, positives.requires_grad_(), *rest)
    alone = torch.stack([info_nce(one, positives, *rest) for one in both])
    torch.testing.assert_close(together, alone)
    weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
    found, expected = (torch.autograd.grad((losses @ weights), (both, positives)) for losses in (together, alone))
    torch.testing.assert_close(found, expected)


def test_info_nce_against_torch_where_nothing_is_excluded():
    anchors, positives, _, extra, _ = example()
    candidates = torch.cat([functional.normalize(positives), extra])
    expected = functional.cross_entropy(
        functional.normalize(anchors) @ candidates.T / TEMPERATURE, torch.arange(ANCHORS), reduction="sum"
    )
    loss = info_nce(anchors, positives, torch.arange(ANCHORS), extra, torch.arange(10, 10 + EXTRA), TEMPERATURE)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("ids", "extra_id", "counted"),
    [
        ([0, 1], 2, [2, 2]),
        ([0, 0], 2, [1, 1]),
        ([0, 1], 0, [1, 2]),
        ([0, 1], -1, [1, 1]),
        ([0, 0], 0, [0, 0]),
    ],
    ids=["all differ", "twice in the batch", "first in the queue", "empty queue", "one node"],
)
def test_masks_by_hand(ids, extra_id, counted):
    """All rows are equal, so that an anchor's loss is the logarithm of the number of its candidates."""
    rows = torch.ones(2, WIDTH)
    extra = functional.normalize(torch.ones(1, WIDTH), dim=1)
    loss = info_nce(rows, rows, torch.tensor(ids), extra, torch.tensor([extra_id]), TEMPERATURE)
    assert float(loss) == pytest.approx(sum(math.log(1 + negatives) for negatives in counted), abs=1e-6)


def test_excluded_candidates_get_no_gradient():
    """Node 0 is met twice; each time the other's positive is no candidate, and so is without gradient from it."""
    anchors, positives, _, extra, extra_ids = example()
    positives.requires_grad_()
    anchors = torch.cat([anchors[:1], torch.zeros(1, WIDTH)])
    info_nce(anchors, positives[:2], torch.tensor([0, 0]), extra, extra_ids, TEMPERATURE).backward()
    assert torch.equal(positives.grad[1], torch.zeros(WIDTH))
    assert positives.grad[0].abs().max() > 1e-3


def test_gradients_against_finite_differences():
    anchors, positives, ids, extra, extra_ids = example(torch.float64)
    leaves = (anchors.requires_grad_(), positives.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, p: info_nce(a, p, ids, extra, extra_ids, TEMPERATURE), leaves)


def test_the_queue_gets_no_gradient():
    anchors, positives, ids, extra, extra_ids = example()
    info_nce(anchors.requires_grad_(), positives, ids, extra.requires_grad_(), extra_ids, TEMPERATURE).backward()
    assert extra.grad is None
    assert anchors.grad.abs().max() > 0


@pytest.mark.parametrize("extra", [0, EXTRA])
def test_no_anchors_give_zero_that_still_reaches_the_encoder(extra):
    encoder = nn.Linear(WIDTH, WIDTH)
    _, _, _, rows, row_ids = example()
    hidden = encoder(NO_ROWS)
    loss = info_nce(hidden, hidden, NO_IDS, rows[:extra], row_ids[:extra], TEMPERATURE)
    loss.backward()
    assert loss == 0
    assert torch.equal(encoder.weight.grad, torch.zeros(WIDTH, WIDTH))


@pytest.mark.parametrize("temperature", [1.0, 0.07, 1e-4])
def test_one_anchor_without_negatives_is_exactly_zero(temperature):
    anchors, positives, ids, _, _ = example()
    anchor = anchors[:1].requires_grad_()
    loss = info_nce(anchor, positives[:1], ids[:1], NO_ROWS, NO_IDS, temperature)
    loss.backward()
    assert loss == 0
    assert torch.equal(anchor.grad, torch.zeros(1, WIDTH))


def test_small_temperatures_and_large_rows_stay_finite():
    """At τ = 1e-4 the exponentials alone would overflow; the loss is then the gap to the nearest negative over τ."""
    anchors = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e-4, 0.0]], requires_grad=True)
    positives = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    extra = torch.tensor([[1.0, 0.0, 0.0]])
    loss = info_nce(anchors, positives, torch.tensor([0, 1]), extra, torch.tensor([2]), 1e-4)
    loss.backward()
    assert loss.item() == pytest.approx((1.0 - 0.6) / 1e-4, rel=1e-5)
    assert anchors.grad.isfinite().all()


def test_info_nce_is_fp32_whatever_comes_in():
    """Under autocast and from bf16 rows: what a caller gets who rounds the rows and computes in fp32."""
    anchors, positives, ids, extra, extra_ids = example()
    halves = anchors.bfloat16(), positives.bfloat16()
    expected = info_nce(halves[0].float(), halves[1].float(), ids, extra, extra_ids, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(*halves, ids, extra, extra_ids, 0.05)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_rank_share_of_one_process_is_the_loss():
    loss = torch.tensor(2.5, requires_grad=True)
    share = rank_share(loss * loss)
    share.backward()
    assert share == 6.25
    assert loss.grad == 5.0


def test_gathered_of_one_process_is_the_same_tensor():
    rows = torch.randn(2, WIDTH)
    assert gathered(rows) is rows


UNIT = torch.eye(3)


def test_the_queue_by_hand():
    """Length 3: partly filled, filled, wrapped round, and by more rows than it holds."""
    queue = NegativeQueue(3, 3)
    assert queue.ids().tolist() == [-1, -1, -1]
    assert torch.equal(queue.rows(), torch.zeros(3, 3))
    queue.enqueue(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([7, 4]))
    assert queue.ids().tolist() == [-1, 7, 4]
    assert torch.equal(queue.rows(), torch.stack([torch.zeros(3), UNIT[1], UNIT[0]]))
    queue.enqueue(torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.5, 0.0]]), torch.tensor([9, 7]))
    assert queue.ids().tolist() == [4, 9, 7]
    assert torch.equal(queue.rows(), UNIT[[0, 2, 1]])
    queue.enqueue(UNIT[[0, 1, 2, 2, 0]], torch.tensor([1, 2, 3, 4, 5]))
    assert queue.ids().tolist() == [3, 4, 5]
    assert torch.equal(queue.rows(), UNIT[[2, 2, 0]])
    queue.enqueue(torch.zeros(0, 3), NO_IDS)
    assert queue.ids().tolist() == [3, 4, 5]


def test_a_queue_of_no_length_stays_empty():
    queue = NegativeQueue(0, 3)
    queue.enqueue(UNIT, torch.arange(3))
    assert queue.rows().shape == (0, 3)
    assert queue.ids().shape == (0,)


def test_the_queue_holds_fp32_rows_without_gradient_that_no_later_change_reaches():
    queue, fed = NegativeQueue(2, 3), UNIT[:2].clone().bfloat16().requires_grad_()
    queue.enqueue(fed, torch.tensor([0, 1]))
    fed.data.fill_(9.0)
    assert queue.rows().dtype == torch.float32
    assert not queue.rows().requires_grad
    assert torch.equal(queue.rows(), UNIT[:2])


def test_the_queue_goes_through_a_checkpoint():
    queue, other = NegativeQueue(4, 3), NegativeQueue(4, 3)
    queue.enqueue(UNIT, torch.tensor([5, 6, 7]))
    state = queue.state()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} == {
        "rows": (torch.float32, (4, 3)),
        "ids": (torch.int64, (4,)),
        "oldest": (torch.int64, ()),
    }
    other.load_state(state)
    for each in (queue, other):
        each.enqueue(UNIT[:2], torch.tensor([8, 9]))
    assert other.ids().tolist() == queue.ids().tolist() == [6, 7, 8, 9]
    assert torch.equal(other.rows(), queue.rows())
    for place, found in zip(queue.stored(UNIT.device), other.stored(UNIT.device), strict=True):
        assert torch.equal(place, found)  # not the order alone: sums over places keep their last bit
    assert (state["ids"].tolist(), state["oldest"].item()) == ([5, 6, 7, -1], 3)


def test_the_queue_refuses_what_does_not_fit():
    queue = NegativeQueue(4, 3)
    with pytest.raises(ValueError, match="3 rows and 2 ids"):
        queue.enqueue(UNIT, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\[5, 3\], this run's has \[4, 3\]"):
        queue.load_state(NegativeQueue(5, 3).state())


def test_the_momentum_copy_by_hand():
    """p_slow ← 0.75 p_slow + 0.25 p, in fp32 whatever the parameters are."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    copy = MomentumCopy({"w": parameter}, 0.75)
    assert torch.equal(copy.values()["w"], parameter)
    parameter.data = torch.tensor([2.0, 0.0], dtype=torch.bfloat16)
    assert copy.state()["w"].tolist() == [1.0, 2.0]
    copy.update()
    assert copy.state()["w"].tolist() == [1.25, 1.5]
    parameter.data = torch.tensor([1.0 + 2**-7, 0.0], dtype=torch.bfloat16)
    copy.update()
    assert copy.state()["w"].tolist() == [0.75 * 1.25 + 0.25 * (1 + 2**-7), 1.125]
    assert (copy.state()["w"].dtype, copy.values()["w"].dtype) == (torch.float32, torch.bfloat16)
    assert not copy.values()["w"].requires_grad


def test_the_momentum_copy_goes_through_a_checkpoint():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    copy = MomentumCopy({"w": parameter}, 0.5)
    parameter.data = torch.tensor([3.0, 3.0])
    copy.update()
    state = copy.state()
    other = MomentumCopy({"w": parameter}, 0.5)
    other.load_state(state)
    for each in (copy, other):
        each.update()
    assert copy.state()["w"].tolist() == other.state()["w"].tolist() == [2.5, 2.75]
    assert state["w"].tolist() == [2.0, 2.5]


SPREAD = {"matrix": torch.arange(10.0).view(2, 5), "pair": torch.tensor([-1.0, 3.0])}


def spread_parameters(rank: int, workers: int) -> dict[str, nn.Parameter]:
    """As ZeRO-3 leaves them: each rank holds an equal part of the values, filled up with zeros at the end."""
    found = {}
    for name, value in SPREAD.items():
        size = -(-value.numel() // workers)
        parameter = nn.Parameter(torch.zeros(0))
        parameter.ds_tensor = functional.pad(value.flatten(), (0, workers * size - value.numel())).split(size)[rank]
        parameter.ds_tensor = parameter.ds_tensor.bfloat16()
        parameter.ds_numel, parameter.ds_shape = value.numel(), value.shape
        found[name] = parameter
    return found


def spread_worker(rank: int, folder: str) -> None:
    """One of three ranks, which divide neither ten values nor two."""
    parameters = spread_parameters(rank, 3)
    copy, released = MomentumCopy(parameters, 0.75), []
    assert copy.spread
    for parameter in parameters.values():
        parameter.ds_tensor.add_(4.0)
    copy.update()  # to what they were, and a quarter of 4
    whole = copy.state()
    assert copy.state(keep=False) == {}
    before = {name: parameter.ds_tensor.clone() for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError, match="stops"), copy.in_place(lambda: released.append(held(parameters))):
        inside = held(parameters)
        raise RuntimeError("stops")
    assert all(torch.equal(parameters[name].ds_tensor, value) for name, value in before.items())
    for seen, expected in zip(released, (before, inside), strict=True):
        assert all(torch.equal(seen[name], value) for name, value in expected.items())
    other = MomentumCopy(spread_parameters(rank, 3), 0.75)
    other.load_state(whole)
    again = other.state()
    with other.in_place(lambda: None):
        loaded = held(other.parameters)
    torch.save({"whole": whole, "again": again, "inside": inside, "loaded": loaded}, f"{folder}/{rank}.pt")


def held(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.ds_tensor.clone() for name, parameter in parameters.items()}


def test_the_momentum_copy_of_parameters_that_are_spread(tmp_path):
    run_ranks(spread_worker, 3, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for name, value in SPREAD.items():
        for one in found:
            assert torch.equal(one["whole"][name], value + 1)
            assert torch.equal(one["again"][name], value + 1)
        for kind in ("inside", "loaded"):
            parts = torch.cat([one[kind][name] for one in found])
            assert parts.dtype == torch.bfloat16
            assert torch.equal(parts[: value.numel()].float(), value.flatten() + 1)


def test_uniformity_by_hand():
    """Squared distances of e1, −e1 and e2: 4, 2 and 2."""
    rows = torch.stack([2 * UNIT[0], -UNIT[0], 5 * UNIT[1]])
    assert uniformity(rows) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3), abs=1e-12)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0.0, abs=1e-12)


def test_uniformity_of_more_rows_than_are_compared_at_once():
    torch.manual_seed(0)
    rows = functional.normalize(torch.randn(1500, 3, dtype=torch.float64))
    expected = torch.pdist(rows).square().mul(-2).exp().mean().log()
    assert uniformity(rows) == pytest.approx(float(expected), abs=1e-10)


def test_alignment_by_hand():
    """Squared distances of the pairs: 0, 2 and 4."""
    other = torch.stack([3 * UNIT[0], UNIT[2], -UNIT[2]])
    assert alignment(2 * UNIT, other) == pytest.approx(2.0, abs=1e-12)


def test_uniformity_and_alignment_refuse_what_has_no_pairs():
    with pytest.raises(ValueError, match="1 rows have none"):
        uniformity(UNIT[:1])
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        alignment(NO_ROWS, NO_ROWS)
    with pytest.raises(ValueError, match=r"\[3, 3\] and \[2, 3\]"):
        alignment(UNIT, UNIT[:2])


# One run of several updates: a linear encoder of two views of the nodes of each global batch, in float64 so that
# only the queue rounds; the loss is divided by the number of anchors, as the training loop does.
INPUT, UPDATES, BATCH, LENGTH, RATE = 6, 4, 7, 10, 0.2
SPLITS = [[7], [3, 4], [7, 0], [2, 0, 4, 1]]


def encoder_of() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(INPUT, WIDTH, dtype=torch.float64)


def global_batch(update: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views [BATCH, INPUT] and node ids, of which some meet again in the batch or in the queue."""
    random = torch.Generator().manual_seed(update)
    views = torch.randn(2, BATCH, INPUT, generator=random, dtype=torch.float64)
    return views[0], views[1], torch.randint(9, (BATCH,), generator=random)


def plain_run() -> list[dict[str, torch.Tensor]]:
    """The run in one process, written without the module: the queue is a list, an anchor's candidates another."""
    encoder, stored, records = encoder_of(), [], []
    for update in range(UPDATES):
        first, second, ids = global_batch(update)
        anchors, positives = (functional.normalize(encoder(view)) for view in (first, second))
        batch = list(zip(ids.tolist(), positives, strict=True))
        loss = 0.0
        for n, (node, positive) in enumerate(batch):
            others = [row for c, (other, row) in enumerate(batch) if c != n and other != node]
            others += [row.double() for other, row in stored if other != node]
            logits = torch.stack([positive, *others]) @ anchors[n] / TEMPERATURE
            loss = loss + (logits.logsumexp(0) - logits[0]) / BATCH
        gradients = torch.autograd.grad(loss, list(encoder.parameters()))
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
            parameter.data -= RATE * gradient
        stored = [*stored, *((node, row.detach().float()) for node, row in batch)][-LENGTH:]
        records.append(
            {
                "loss": loss.detach(),
                "weight": gradients[0],
                "bias": gradients[1],
                "ids": torch.tensor([-1] * (LENGTH - len(stored)) + [node for node, _ in stored]),
                "rows": torch.cat([torch.zeros(LENGTH - len(stored), WIDTH), *(row[None] for _, row in stored)]),
            }
        )
    return records


def worker(rank: int, split: list[int], folder: str) -> None:
    """One rank of a gloo group: the run on its rows of every global batch, then `gathered` by itself."""
    encoder, queue, records = encoder_of(), NegativeQueue(LENGTH, WIDTH), []
    for update in range(UPDATES):
        first, second, ids = (tensor.split(split)[rank] for tensor in global_batch(update))
        term = contrast_terms(encoder(first)[None], encoder(second), ids, queue, TEMPERATURE)
        share = term.shares_P.sum() / BATCH
        gradients = torch.autograd.grad(share, list(encoder.parameters()))
        loss = share.detach().clone()
        for value in (loss, *gradients):
            dist.all_reduce(value)
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
            parameter.data -= RATE * gradient
        queue.enqueue(term.positives_ND, term.ids_N)
        records.append(
            {"loss": loss, "weight": gradients[0], "bias": gradients[1], "ids": queue.ids(), "rows": queue.rows()}
        )
    torch.save((records, gathered_facts(rank, split)), f"{folder}/{rank}.pt")


def gathered_facts(rank: int, split: list[int]) -> dict[str, object]:
    whole = torch.arange(7 * WIDTH).reshape(7, WIDTH)
    own = whole.split(split)[rank]
    leaf = own.float().requires_grad_()
    rows = gathered(leaf)
    (rows * whole).sum().backward()
    return {
        "int64": torch.equal(gathered(own), whole) and gathered(own).dtype == torch.int64,
        "flat": torch.equal(gathered(own[:, 0]), whole[:, 0]),
        "bf16": torch.equal(gathered(own.bfloat16()), whole.bfloat16()),
        "fp32": torch.equal(rows, whole.float()),
        "strided": torch.equal(gathered(own.T.contiguous().T), whole),
        "no rows": gathered(own[:0]).shape == (0, WIDTH),
        "gradient": torch.equal(leaf.grad, own.float()),
    }


@pytest.fixture(scope="module", params=SPLITS, ids=str)
def workers_run(request, tmp_path_factory) -> list[tuple[list[dict[str, torch.Tensor]], dict[str, object]]]:
    """What each rank of a group saw, for one split of every global batch over its ranks."""
    folder: Path = tmp_path_factory.mktemp("group")
    run_ranks(worker, len(request.param), request.param, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(request.param))]


def test_workers_have_the_loss_and_the_gradient_of_one_process(workers_run):
    for records, _ in workers_run:
        for update, (found, expected) in enumerate(zip(records, plain_run(), strict=True)):
            for name in ("loss", "weight", "bias"):
                torch.testing.assert_close(
                    found[name], expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, at=(update, name): f"{at}: {m}"
                )
                assert expected[name].abs().max() > 1e-2


def test_workers_have_the_queue_of_one_process(workers_run):
    for records, _ in workers_run:
        for found, expected, first in zip(records, plain_run(), workers_run[0][0], strict=True):
            assert torch.equal(found["ids"], expected["ids"])
            torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-6, atol=1e-6)
            assert torch.equal(found["rows"], first["rows"])


def test_gathered_rows_of_workers(workers_run):
    for _, facts in workers_run:
        assert [name for name, holds in facts.items() if not holds] == []
