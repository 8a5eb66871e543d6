import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.graph import lightgcn, text_contrast
from raygrec.graph.lightgcn import LightGCNConfig, pretrain
from raygrec.graph.text_contrast import TextContrast

TRAIN = CSR.from_lists([[0, 1], [1, 2], [3], []])
TEXTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def contrast_of(seed: int = 0, temperature: float = 0.3) -> TextContrast:
    return TextContrast(TEXTS, TRAIN, 4, temperature, torch.Generator().manual_seed(seed))


def test_texts_of_users_are_the_means_of_their_items():
    means = [(TEXTS[0] + TEXTS[1]) / 2, (TEXTS[1] + TEXTS[2]) / 2, TEXTS[3], torch.zeros(6)]
    torch.testing.assert_close(contrast_of().texts, torch.cat([torch.stack(means), TEXTS]))


def test_the_loss_by_hand():
    contrast, final = contrast_of(), torch.randn(9, 4)
    expected = 0.0
    for side in ([0, 2, 1], [4, 8]):
        mapped = contrast.map(contrast.texts).detach().numpy()
        total = 0.0
        for node in side:
            scores = []
            for other in side:
                a, b = final[node].numpy(), mapped[other]
                scores.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 0.3)
            total += np.log(np.exp(scores).sum()) - scores[side.index(node)]
        expected += total / len(side)
    found = contrast(final, torch.tensor([2, 0, 1, 0]), torch.tensor([8, 4, 4]))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_so_many_nodes_at_most(monkeypatch):
    monkeypatch.setattr(text_contrast, "NODES", 2)
    contrast, final = contrast_of(), torch.randn(9, 4)
    assert torch.equal(contrast(final, torch.tensor([2, 0, 1])), contrast(final, torch.tensor([0, 2, 3])))


def test_the_maps_start_follows_from_the_generator():
    first, again, other = (contrast_of(seed).map[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pretraining_pulls_nodes_to_their_texts():
    rng = np.random.default_rng(0)
    train = CSR.from_lists([rng.permutation(20)[:5] for _ in range(30)])
    texts = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    texts[10:] = texts[:10]  # two items of every text

    def agreement(weight: float) -> tuple[float, torch.Tensor]:
        """How much more alike two items of one text are than any two."""
        config = LightGCNConfig(dim=8, layers=1, batch_size=64, epochs=30, text_weight=weight)
        items = pretrain(train, 20, config, 0, texts=texts)[0].items
        alike = torch.nn.functional.normalize(items) @ torch.nn.functional.normalize(items).T
        return float(alike.diagonal(10).mean() - alike.mean()), items

    (plain, items), (pulled, _) = agreement(0.0), agreement(1.0)
    assert pulled > plain + 0.3
    config = LightGCNConfig(dim=8, layers=1, batch_size=64, epochs=30)
    assert torch.equal(pretrain(train, 20, config, 0)[0].items, items)
    again = agreement(1.0)[1]
    assert torch.equal(agreement(1.0)[1], again)


def test_the_map_is_trained_too(monkeypatch):
    made = []
    monkeypatch.setattr(lightgcn, "TextContrast", lambda *arguments: made.append(TextContrast(*arguments)) or made[0])
    config = LightGCNConfig(dim=4, epochs=1, text_weight=0.1)
    pretrain(TRAIN, 5, config, 0, texts=TEXTS)
    assert all(parameter.grad.abs().max() > 0 for parameter in made[0].parameters())
    assert made[0].map[2].bias.abs().min() > 1e-4  # it began as zero


def test_a_weight_without_texts_is_refused():
    with pytest.raises(InputError, match="text_weight asks for the items' text vectors"):
        pretrain(TRAIN, 5, LightGCNConfig(text_weight=0.1), 0)
