import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.model import text_tuning, text_vectors
from raygrec.model.backbone import BackboneConfig
from raygrec.model.text_tuning import (
    TextTuningConfig,
    drawn_items,
    neighbours_in_time,
    soft_info_nce,
    tune,
    tuned_reader,
)
from raygrec.model.text_vectors import load_or_read_texts
from tests.model.test_text_vectors import files, model_folder, tokens_of  # noqa: F401

ITEMS = 8
# Words w5 to w12, one an item; users take 0 to 3 together, and 4 to 7.
TEXTS = [f"w{number}" for number in range(5, 5 + ITEMS)]
TRAIN = CSR.from_lists([[0, 1, 2], [1, 0, 3], [4, 5, 6], [7, 6, 4], [3, 2], [5, 7], [2], []])


def test_neighbours_in_time_by_hand():
    train = CSR.from_lists([[0, 1, 2, 0], [2, 1], [1, 1]])
    found = neighbours_in_time(train, 4, 2).toarray()
    # 0-1 one step, 0-2 two; 1-2 one; 1-0 two; 2-0 one. Then 2-1. An item is no neighbour of itself.
    expected = np.zeros((4, 4))
    for a, b, weight in ((0, 1, 1 + 1 / 2), (0, 2, 1 / 2 + 1), (1, 2, 1 + 1)):
        expected[a, b] = expected[b, a] = weight
    np.testing.assert_allclose(found, expected)


def test_windows_of_users_are_drawn_and_their_items_once():
    rows = [list(range(10 * user, 10 * user + user)) for user in range(9)]  # user u has u items, of nobody else
    rows[8] = [80, 81, 80, 81, 80, 81, 80, 81]
    train, tuning = CSR.from_lists(rows), TextTuningConfig(users=4, items=3)
    starts = set()
    for update in range(60):
        items = drawn_items(train, tuning, Draws(1, update))
        assert items.tolist() == sorted(set(items.tolist()))
        users, counts = np.unique(items // 10, return_counts=True)
        assert len(users) == 4
        assert users.min() >= 2  # those who have one item or none have nothing to compare
        assert counts.tolist() == [2 if user in (2, 8) else 3 for user in users]
        for user in set(users.tolist()) - {8}:
            mine = items[items // 10 == user]
            assert (np.diff(mine) == 1).all()
            starts.add((user, int(mine[0] % 10)))
    assert starts >= {(7, start) for start in range(5)}
    again = drawn_items(train, tuning, Draws(1, 5))
    assert again.tolist() == drawn_items(train, tuning, Draws(1, 5)).tolist()
    assert again.tolist() != drawn_items(train, tuning, Draws(2, 5)).tolist()


def test_more_users_than_there_are_take_part_once():
    items = drawn_items(TRAIN, TextTuningConfig(users=50), Draws(0))
    assert items.tolist() == list(range(ITEMS))


def test_soft_info_nce_against_plain_loops():
    rng = torch.Generator().manual_seed(1)
    vectors = functional.normalize(torch.randn(6, 5, generator=rng), dim=1).requires_grad_()
    wanted = torch.rand(6, 6, generator=rng) * (torch.rand(6, 6, generator=rng) > 0.5)
    wanted.fill_diagonal_(0)
    wanted[2] = 0  # has nothing to be near to, and is a candidate of others all the same
    losses = []
    for n in range(6):
        if n == 2:
            continue
        exps = {m: math.exp(float(vectors[n].detach() @ vectors[m].detach()) / 0.3) for m in range(6) if m != n}
        terms = [-float(wanted[n, m]) * math.log(exps[m] / sum(exps.values())) for m in exps]
        losses.append(sum(terms) / float(wanted[n].sum()))
    loss = soft_info_nce(vectors, wanted, 0.3)
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() > 0


def test_with_one_neighbour_each_it_is_cross_entropy():
    vectors = functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    target = torch.tensor([1, 0, 3, 2])
    logits = (vectors @ vectors.T / 0.1).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    expected = functional.cross_entropy(logits, target)
    torch.testing.assert_close(soft_info_nce(vectors, 7 * functional.one_hot(target, 4).float(), 0.1), expected)


def test_without_neighbours_nothing_is_learned():
    vectors = torch.eye(3, requires_grad=True)
    loss = soft_info_nce(vectors, torch.zeros(3, 3), 0.1)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert not gradient.any()


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_updates_against_nothing_but_transformers(kind, model_folder, monkeypatch):  # noqa: F811
    """Texts one at a time and unpadded, the gradient cut to length 1, plain AdamW, and the rate by hand."""
    folder = model_folder(kind, {} if kind == "t5" else None)
    tuning = TextTuningConfig(updates=3, users=3, items=2, tokens=2, lr=1e-2, temperature=0.01)
    # Of different lengths, longer ones first, two words of which are read, and in passes of some.
    texts = [f"{text} w{20 + number} w21" if number < 5 else text for number, text in enumerate(TEXTS)]
    monkeypatch.setattr(text_vectors, "TOKENS_PER_PASS", 12)
    found = dict(
        tune(BackboneConfig(name=str(folder)), tuning, tokens_of(folder, texts), TRAIN, seed=4).model.named_parameters()
    )

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).train(False)
    model = model.get_encoder() if kind == "t5" else model
    table = model.get_input_embeddings().weight.requires_grad_(False)
    weights = {name: value for name, value in model.named_parameters() if value is not table}
    start = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.01)
    norms = []
    for update, rate in enumerate((1.0, 0.75, 0.25)):  # of a cosine; the rise takes a tenth of an update
        items = drawn_items(TRAIN, tuning, Draws(4, update))
        read = [" ".join(texts[item].split()[:2]) for item in items]
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in read]
        wanted = torch.from_numpy(neighbours_in_time(TRAIN, ITEMS, 3).toarray()[np.ix_(items, items)]).float()
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        soft_info_nce(functional.normalize(torch.stack(means), dim=1), wanted, tuning.temperature).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)))
        optimizer.step()
    # Gradients of one length make the same steps, whether they are cut or not; BERT's here are short.
    assert max(norms) > 1.5 * min(norms)
    assert (min(norms) > 1) == (kind != "bert")
    assert torch.equal(found.get("embeddings.word_embeddings.weight", table), table)
    agree, moved = [], 0
    for name, value in weights.items():
        if value.grad is None:  # of a pooling layer, which is not read
            continue
        same = found[name] if name in found else found[f"encoder.{name}"]
        expected, change = value - start[name], same - start[name]
        agree.append(torch.isclose(change, expected, rtol=0.02, atol=2e-4).flatten())
        moved += int(expected.abs().mean() > 1e-3)
    # Where a gradient is nothing but rounding, as of the biases of keys, Adam's step is the sign of that.
    assert torch.cat(agree).float().mean() > 0.98
    assert moved > 10


def test_the_rate_rises_and_falls_along_a_cosine():
    rates = [text_tuning._rate(update / 40, (update + 1) / 40) for update in range(40)]
    cosine = [0.5 * (1 + math.cos(math.pi * update / 40)) for update in range(40)]
    assert rates[:4] == pytest.approx([cosine[n] * (n + 1) / 4 for n in range(4)])
    assert rates[4:] == pytest.approx(cosine[4:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_texts_of_items_that_follow_one_another_come_closer(precision, model_folder):  # noqa: F811
    folder, tuning = model_folder("bert"), TextTuningConfig(updates=40, lr=3e-3, temperature=0.2, precision=precision)
    tokens = tokens_of(folder, TEXTS)
    config = BackboneConfig(name=str(folder))
    reader = tuned_reader(config, tuning, tokens, TRAIN, 0, folder.parent / "readers")
    before, after = (load_or_read_texts(one, tokens, folder.parent / "vectors") for one in (config, reader))

    def gap(vectors: torch.Tensor) -> float:
        """Between items of one taste and of different ones."""
        near = vectors @ vectors.T
        same = torch.arange(ITEMS)[:, None] // 4 == torch.arange(ITEMS) // 4
        return float(near[same & ~torch.eye(ITEMS, dtype=torch.bool)].mean() - near[~same].mean())

    assert gap(after) > gap(before) + 0.3


def test_a_tuned_reader_is_kept_and_made_again_where_something_differs(model_folder, monkeypatch):  # noqa: F811
    folder, made = model_folder("bert"), []
    real = text_tuning.tune
    monkeypatch.setattr(text_tuning, "tune", lambda *given: made.append(given) or real(*given))
    config, tokens, kept = BackboneConfig(name=str(folder)), tokens_of(folder, TEXTS), folder.parent / "readers"
    tuning = TextTuningConfig(updates=2)
    first = tuned_reader(config, tuning, tokens, TRAIN, 0, kept)
    assert tuned_reader(config, tuning, tokens, TRAIN, 0, kept) == first
    assert len(made) == 1
    others = [
        (config, tuning.model_copy(update={"lr": 1e-4}), tokens, TRAIN, 0),
        (config, tuning, tokens_of(folder, TEXTS[::-1]), TRAIN, 0),
        (config, tuning, tokens, CSR.from_lists([[0, 1]]), 0),
        (config, tuning, tokens, TRAIN, 1),
    ]
    names = {tuned_reader(*given, kept).name for given in others} | {first.name}
    assert len(names) == len(made) == 5
    assert {str(path) for path in files(kept)} == names
    # All layers are tuned, whatever the model that reads prompts keeps, which is set beside the name.
    short = tuned_reader(config.model_copy(update={"layers": 1}), tuning, tokens, TRAIN, 0, kept)
    assert (short.name, short.layers, len(made)) == (first.name, 1, 5)
    # What plain `transformers` loads, and its tokenizer.
    model, tokenizer = AutoModel.from_pretrained(first.name), AutoTokenizer.from_pretrained(first.name)
    assert model.config.num_hidden_layers == AutoModel.from_pretrained(folder).config.num_hidden_layers
    assert tokenizer("w7").input_ids == AutoTokenizer.from_pretrained(folder)("w7").input_ids


def test_the_same_seed_makes_the_same_model(model_folder):  # noqa: F811
    """All of it, and the pretrained one, whatever reads the prompts."""
    config = BackboneConfig(name=str(model_folder("bert")))
    less = config.model_copy(update={"layers": 1, "pretrained": False})
    given = TextTuningConfig(updates=3, users=2), tokens_of(Path(config.name), TEXTS), TRAIN
    one, same, other = (
        tune(config, *given, seed).state_dict() for config, seed in ((config, 3), (less, 3), (config, 4))
    )
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("train", "changes", "problem"),
    [
        ([[1], [], [2]], {}, "text_tuning: no user has two training items, whose texts could be compared"),
        ([[1, 2], [3, 4]], {"lr": 1e30}, r"text_tuning: the loss is nan; lower lr \(now 1e\+30\)"),
    ],
)
def test_what_cannot_be_tuned_leaves_nothing(train, changes, problem, model_folder):  # noqa: F811
    folder = model_folder("bert")
    tuning, kept = TextTuningConfig(updates=5, **changes), folder.parent / "readers"
    with pytest.raises(InputError, match=f"^{problem}$"):
        tuned_reader(BackboneConfig(name=str(folder)), tuning, tokens_of(folder, TEXTS), CSR.from_lists(train), 0, kept)
    assert files(kept) == []


def test_a_model_that_could_not_be_written_whole_is_not_there(model_folder, monkeypatch):  # noqa: F811
    folder = model_folder("bert")
    given = BackboneConfig(name=str(folder)), TextTuningConfig(updates=1), tokens_of(folder, TEXTS), TRAIN, 0
    kept = folder.parent / "readers"
    with monkeypatch.context() as patched:
        patched.setattr(text_tuning.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned_reader(*given, kept)
    assert files(kept) == []
    place = tuned_reader(*given, kept).name
    shutil.rmtree(place)
    # A process that was killed between has left half of it.
    os.makedirs(f"{kept}/.{os.path.basename(place)}.draft/half")
    assert tuned_reader(*given, kept).name == place
    assert not os.path.exists(f"{kept}/.{os.path.basename(place)}.draft")
