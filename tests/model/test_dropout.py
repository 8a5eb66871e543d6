import numpy as np
import pytest
import torch

from raygrec.model.dropout import keyed_dropout, prompt_dropout


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `count` rows, as a prompt builder draws them, and their places."""
    keys = np.random.default_rng(0).integers(0, 2**53, count)
    return torch.from_numpy(keys), torch.arange(count) % 40


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(rate):
    keys, places = rows(2000)
    kept = keyed_dropout(torch.ones(2000, 64), rate, keys, places, use=1)
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    dropped = (kept == 0).double()
    for axis, number in ((None, 128_000), (0, 2000), (1, 64)):
        mean = dropped.mean() if axis is None else dropped.mean(axis)
        assert ((mean - rate).abs() < 5 * (rate * (1 - rate) / number) ** 0.5).all()


def test_a_row_does_not_depend_on_its_batch():
    keys, places = rows(50)
    values = torch.randn(50, 16)
    whole = keyed_dropout(values, 0.3, keys, places, use=1)
    some = torch.tensor([7, 3, 49])
    assert torch.equal(keyed_dropout(values[some], 0.3, keys[some], places[some], use=1), whole[some])


def test_prompts_are_rows_with_places():
    values = torch.randn(3, 4, 10)
    whole = prompt_dropout(values, 0.4, torch.tensor([5, 6, 7]), use=2)
    for prompt in range(3):
        key, places = torch.tensor([5 + prompt] * 4), torch.arange(4)
        assert torch.equal(whole[prompt], keyed_dropout(values[prompt], 0.4, key, places, use=2))


def test_masks_of_neighbours_are_unrelated():
    """Rows that differ in key, place or use only, and entries beside each other, agree as often as chance has it."""
    count, rate = 3000, 0.5
    one, zero = torch.ones(count, 32), torch.zeros(count, dtype=torch.int64)

    def mask(keys: torch.Tensor, places: torch.Tensor, use: int) -> torch.Tensor:
        return keyed_dropout(one, rate, keys, places, use) == 0

    counting = torch.arange(count)
    by_key, by_place = mask(counting, zero, 1), mask(zero, counting, 1)
    pairs = {
        "use": (by_key, mask(counting, zero, 2)),
        "next key": (by_key[1:], by_key[:-1]),
        "next place": (by_place[1:], by_place[:-1]),
        "key for place": (by_key, by_place),
        "next entry": (by_key[:, 1:], by_key[:, :-1]),
        "place for entry": (by_place[1:, :-1], by_place[:-1, 1:]),
    }
    for name, (first, second) in pairs.items():
        agreeing = (first == second).double().mean()
        assert abs(agreeing - 0.5) < 5 * 0.5 / first.numel() ** 0.5, name


def test_rate_zero_and_gradients():
    keys, places = rows(4)
    values = torch.randn(4, 8, requires_grad=True)
    assert keyed_dropout(values, 0.0, keys, places, use=1) is values
    kept = keyed_dropout(values, 0.5, keys, places, use=1)
    kept.sum().backward()
    assert torch.equal(values.grad, torch.where(kept == 0, 0.0, 2.0))
