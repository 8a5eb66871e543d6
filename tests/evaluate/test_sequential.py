from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.evaluate.decoding import ranked_lists
from raygrec.evaluate.sequential import FrequencyFilter, SequencePrompts, Sequential, SequentialConfig
from raygrec.model.backbone import passes
from raygrec.model.prompts import PAD, PromptBatch

ITEMS = 12
OTHERS = [[3, 5, 4], [11, 2, 6]]  # have successors of what HISTORIES have
HISTORIES = [[3, 5, 7, 3, 9], [0, 1], [4, 11, 2, 8, 10, 6, 0], [5]]
KINDS = {
    "plain": {},
    "text": {"text_vectors": True},
    "filter": {"filter": "frequency", "cutoff": 3},
    "both": {"filter": "frequency", "text_vectors": True},
    "newest": {"filter": "frequency", "cutoff": 3, "predicts": "newest"},
    "successors": {"successors": {"steps": 2}},
}


def prompts_of(rows: list[list[int]] | None = None, **changes: object) -> SequencePrompts:
    config = SequentialConfig(**{"width": 8, "max_history": 6, "dropout": 0.4, **changes})
    return SequencePrompts(config, ITEMS, CSR.from_lists(HISTORIES if rows is None else rows))


def model_of(**changes: object) -> Sequential:
    """A model whose every parameter is far from zero and from one, so that nothing is without effect."""
    config = SequentialConfig(**{"width": 8, "max_history": 6, "dropout": 0.4, **changes})
    torch.manual_seed(0)
    texts = torch.randn(ITEMS, 5) if config.text_vectors else None
    model = Sequential(config, prompts_of().symbols, texts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def shown(rows: list[list[int]], **changes: object) -> PromptBatch:
    """Prompts that show the given histories."""
    return prompts_of(rows, **changes).recommending(np.arange(len(rows)), CSR.from_lists(rows))


def logits(model: Sequential, batch: PromptBatch) -> torch.Tensor:
    """[B, T, I] at every position."""
    rows = model.table()
    hidden = model.hidden(batch, rows).padded()
    return model.head(hidden.flatten(0, 1), rows).view(*hidden.shape[:2], -1)


# ---- prompts


def test_training_prompts_by_hand():
    batch = prompts_of(max_history=4).training(np.array([0, 2, 1, 3]), Draws(0))
    assert batch.symbols.tolist() == [[3, 5, 7, 3], [2, 8, 10, 6], [0, PAD, PAD, PAD], [PAD] * 4]
    # The 3 that user 0 bought again is no target: it came before.
    assert batch.answers.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert batch.targets.items.tolist() == [5, 7, 9, 8, 10, 6, 0, 1]
    assert batch.targets.indptr.tolist() == list(range(9))
    assert batch.counts.tolist() == [8]
    assert [part.tolist() for part in batch.history.split(batch.history_indptr.diff().tolist())] == [
        [3, 5, 7, 3],
        [2, 8, 10, 6],
        [0],
        [],
    ]


def test_each_beginning_of_a_history_is_a_prompt_where_the_newest_item_alone_predicts():
    batch = prompts_of(max_history=4, predicts="newest").training(np.array([0, 2, 1, 3]), Draws(0))
    rows = [[3], [3, 5], [3, 5, 7, 3], [2], [2, 8], [2, 8, 10], [2, 8, 10, 6], [0]]
    assert batch.symbols.tolist() == [row + [PAD] * (4 - len(row)) for row in rows]
    assert batch.answers.tolist() == [0, 5, 11, 12, 17, 22, 27, 28]
    assert batch.targets.items.tolist() == [5, 7, 9, 8, 10, 6, 0, 1]
    assert batch.targets.indptr.tolist() == list(range(9))
    assert len(set(batch.dropout_keys.tolist())) == 8


def test_an_item_that_came_before_what_is_shown_is_no_target():
    batch = prompts_of([[7, 1, 2, 7]], max_history=2).training(np.array([0]), Draws(0))
    assert batch.symbols.tolist() == [[1, 2]]
    assert (batch.answers.tolist(), batch.targets.items.tolist()) == ([0], [2])


def test_recommending_prompts_by_hand():
    rows = [[3, 5], [], [1, 2, 3, 4, 5, 6, 7]]
    batch = prompts_of(max_history=4).recommending(np.array([5, 0, 9]), CSR.from_lists(rows))
    assert batch.symbols.tolist() == [[3, 5, PAD, PAD], [PAD] * 4, [4, 5, 6, 7]]
    assert batch.slots.tolist() == [[1], [4], [11]]
    assert (len(batch.answers), len(batch.targets), batch.dropout_keys) == (0, 0, None)


def test_the_segments_say_what_the_model_does():
    batch = shown([[1, 2, 3], [4]])
    assert torch.equal(batch.attention[0], torch.ones(3, 3, dtype=torch.bool).tril())


# ---- the model


@pytest.mark.parametrize("kind", ["plain", "text", "places from the newest"])
def test_it_is_torchs_own_transformer(kind):
    model = model_of(**KINDS.get(kind, {"predicts": "newest"}))
    batch = shown(HISTORIES)
    layers = []
    for layer in model.layers:
        own = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True).eval()
        names = {
            "self_attn.in_proj_": layer.attention_in,
            "self_attn.out_proj.": layer.attention_out,
            "norm1.": layer.attention_norm,
            "linear1.": layer.inner,
            "linear2.": layer.outer,
            "norm2.": layer.norm,
        }
        own.load_state_dict(
            {f"{name}{part}": v for name, module in names.items() for part, v in module.state_dict().items()}
        )
        layers.append(own)
    table = model.table.free
    if kind == "text":
        texts = torch.manual_seed(0) and torch.randn(ITEMS, 5)
        texts = texts - texts.mean(0)
        table = table + 0.3 * texts / texts.std() @ model.table.from_text.weight.T
    with torch.no_grad():
        for row, history in enumerate(HISTORIES):
            length = min(len(history), 6)
            places = model.places.weight[:length]
            x = table[torch.tensor(history[-6:])] + (places.flip(0) if kind == "places from the newest" else places)
            x = functional.layer_norm(x, (8,), model.norm.weight, model.norm.bias)[None]
            for own in layers:
                x = own(x, src_mask=torch.ones(length, length, dtype=torch.bool).triu(1))
            expected = x[0] @ table.T + model.head.bias
            torch.testing.assert_close(logits(model, batch)[row, :length], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.slot_logits(batch)[row, 0], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cutoff", [1, 3, 5, 100])
@pytest.mark.parametrize("window", [6, 7])
def test_the_filter_is_the_papers_at_the_last_position_of_each_window(cutoff, window):
    torch.manual_seed(0)
    layer = FrequencyFilter(SequentialConfig(width=4, filter="frequency", cutoff=cutoff, max_history=window))
    with torch.no_grad():
        layer.norm.weight.normal_()
        layer.norm.bias.normal_()
    x = torch.randn(2, 5, 4)
    found = layer(x, lambda values, use: values, 0)
    beta = layer.root_beta.detach().numpy() ** 2
    for row in range(2):
        for end in range(5):
            padded = np.zeros((window, 4))
            padded[window - 1 - end :] = x[row, : end + 1]
            spectrum = np.fft.fft(padded, axis=0)
            frequency = np.abs(np.fft.fftfreq(window, 1 / window))
            low = np.fft.ifft(spectrum * (frequency <= cutoff // 2)[:, None], axis=0).real[-1]
            filtered = x[row, end].numpy() + low + beta * (x[row, end].numpy() - low)
            expected = functional.layer_norm(
                torch.tensor(filtered, dtype=torch.float32), (4,), layer.norm.weight, layer.norm.bias
            )
            torch.testing.assert_close(found[row, end], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [6, 7])
def test_the_filter_is_the_papers_at_every_position_where_the_newest_predicts(window):
    torch.manual_seed(0)
    config = SequentialConfig(width=4, filter="frequency", cutoff=3, max_history=window, predicts="newest")
    layer = FrequencyFilter(config)
    layer.norm = nn.Identity()
    x = torch.randn(2, 5, 4)
    x[1, 3:] = 0  # padding
    beta = layer.root_beta.detach().numpy() ** 2
    found = layer(x, lambda values, use: values, 0).detach().numpy()
    for row, length in enumerate((5, 3)):
        padded = np.zeros((window, 4))
        padded[window - length :] = x[row, :length]
        spectrum = np.fft.fft(padded, axis=0)
        low = np.fft.ifft(spectrum * (np.abs(np.fft.fftfreq(window, 1 / window)) <= 1)[:, None], axis=0).real
        expected = (padded + low + beta * (padded - low))[window - length :]
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_like_length_are_read_together_with_the_same_result(kind):
    model = model_of(**KINDS[kind])
    lengths = np.random.default_rng(0).integers(0, 7, 40)
    rows = [np.random.default_rng(n).integers(0, ITEMS, length).tolist() for n, length in enumerate(lengths)]
    batch = replace(shown(rows, **KINDS[kind]), dropout_keys=torch.arange(40))
    there, results = batch.symbols >= 0, []
    for read in (
        lambda table: model._read(batch.symbols, batch.dropout_keys, table),
        lambda table: model.hidden(batch, table).padded(),
    ):
        model.zero_grad()
        hidden = read(model.table())[there]
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)
    assert len(passes(batch.lengths, model)) == 2


@pytest.mark.parametrize("kind", ["plain", "newest"])
def test_prompts_that_predict_nothing_new_have_no_loss(kind):
    """All that a user's history leads to came before; `newest` then has no prompt at all."""
    batch = prompts_of([[2, 2], [4, 4, 4]], **KINDS[kind]).training(np.arange(2), Draws(0))
    model = model_of(**KINDS[kind])
    loss = model(batch)
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert len(batch.symbols) == (0 if kind == "newest" else 2)


def test_alpha_mixes_the_filter_with_attention():
    models = [model_of(filter="frequency", alpha=alpha, layers=1) for alpha in (0.0, 1.0, 0.25)]
    plain = model_of(layers=1)
    plain.load_state_dict(models[0].state_dict(), strict=False)
    batch = shown(HISTORIES)
    with torch.no_grad():
        torch.testing.assert_close(logits(models[0], batch), logits(plain, batch))
        layers = [model.layers[0] for model in models]
        for layer in layers:  # what comes after the mixing is made to do nothing
            layer.outer.weight.zero_(), layer.outer.bias.zero_()
            layer.norm = nn.Identity()
        attended, filtered, mixed = (model.hidden(batch, model.table()).padded() for model in models)
        torch.testing.assert_close(mixed, 0.25 * filtered + 0.75 * attended)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "newest"])
def test_a_position_does_not_see_what_comes_after_it(kind):
    model = model_of(**KINDS[kind])
    before = [3, 5, 7, 1, 9]
    with torch.no_grad():
        first = logits(model, shown([before]))[0]
        for place in range(5):
            changed = before.copy()
            changed[place] = 10
            then = logits(model, shown([changed]))[0]
            assert torch.equal(then[:place], first[:place])
            assert (then[place:] - first[place:]).abs().amax(1).min() > 1e-3


def test_an_empty_history_reads_no_item():
    model = model_of()
    with torch.no_grad():
        before = model.slot_logits(shown([[]]))
        model.table.free[0] += 1
        assert (model.slot_logits(shown([[]])) - before)[0, 0, 1:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind):
    model = model_of(**KINDS[kind])
    prompter = prompts_of([*HISTORIES, *OTHERS], **KINDS[kind])
    users = np.arange(len(HISTORIES))
    with torch.no_grad():
        together = model.slot_logits(prompter.recommending(users, CSR.from_lists(HISTORIES)))
        for row, history in enumerate(HISTORIES):
            alone = model.slot_logits(prompter.recommending(users[[row]], CSR.from_lists([history])))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
        # The masks of dropout neither: a batch cut in two has the same loss, and so has one in another order.
        whole = model(prompter.training(users, Draws(1, 2)))
        parts = sum(model(prompter.training(part, Draws(1, 2))) for part in (users[2:], users[:2]))
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-4)
        assert not torch.isclose(model(prompter.training(users, Draws(1, 3))), whole)


def test_the_loss_is_the_cross_entropy_of_every_target():
    model, prompter = model_of(dropout=0.0), prompts_of(dropout=0.0)
    batch = prompter.training(np.arange(4), Draws(0))
    with torch.no_grad():
        at = logits(model, batch).flatten(0, 1)[batch.answers]
        expected = functional.cross_entropy(at, batch.targets.items, reduction="sum")
        torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("predicts", ["every", "newest"])
def test_successors_of_what_a_position_has_read_are_added_to_its_logits(predicts):
    settings = {"predicts": predicts, "dropout": 0.0, "max_history": 4}
    train = [[0, 1, 2, 3, 4, 5], [1, 3, 2], [5, 4, 1, 2], [2, 6]]
    prompter, model = prompts_of(train, successors={}, **settings), model_of(successors={}, **settings)
    batch = prompter.training(np.array([0, 2, 3]), Draws(0))
    plain = model_of(**settings)
    plain.load_state_dict(model.state_dict(), strict=False)
    cut, read = CSR.from_lists([[1, 2, 3, 4], [5, 4, 1], [2]]), np.arange(8)
    found = prompter.successors.after(np.array([0, 2, 3]), cut, read)
    found = found.weighing(model.successors(found.weights))
    assert found.indptr.diff().tolist() == [2, 3, 3, 4, 0, 1, 4, 3]
    with torch.no_grad():
        rows = plain.table()
        at = plain.head(plain.hidden(batch, rows).at(batch.answers), rows)
        expected = at.index_put(found.places, found.weights, accumulate=True)
        torch.testing.assert_close(
            model(batch), functional.cross_entropy(expected, batch.targets.items, reduction="sum")
        )
        # Recommending, of the newest of the items that are shown.
        shown = prompter.recommending(np.array([0]), CSR.from_lists([[5, 6, 1, 2, 3, 4]]))
        one = found.part(3, 4)
        expected = plain.slot_logits(shown)[0].index_put((one.rows, one.items), one.weights, accumulate=True)
        torch.testing.assert_close(model.slot_logits(shown)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_on_every_sublayer_with_a_mask_of_its_own(kind, monkeypatch):
    model, prompter = model_of(**KINDS[kind]), prompts_of(**KINDS[kind])
    seen = []

    def recorded(values: torch.Tensor, rate: float, keys: torch.Tensor, use: int) -> torch.Tensor:
        seen.append(use)
        assert rate == 0.4
        assert (values.shape[:2], keys.shape) == (batch.symbols.shape, batch.dropout_keys.shape)
        return values

    monkeypatch.setattr("raygrec.evaluate.sequential.prompt_dropout", recorded)
    batch = prompter.training(np.arange(4), Draws(0))
    model(batch)
    # Embeddings, and in each of two layers attention, (filter,) inner and outer feed-forward.
    assert len(set(seen)) == len(seen) == 1 + 2 * (4 if model.config.filter == "frequency" else 3)
    seen.clear()
    model.slot_logits(shown(HISTORIES, **KINDS[kind]))
    assert not seen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    model, prompter = model_of(**KINDS[kind]), prompts_of([*HISTORIES, *OTHERS], **KINDS[kind])
    model(prompter.training(np.arange(4), Draws(0))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad.abs().max() > 0, name


def test_the_models_start_is_small():
    torch.manual_seed(0)
    model = Sequential(SequentialConfig(text_vectors=True), prompts_of().symbols, torch.randn(ITEMS, 300))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_found(kind):
    """Item i is followed by item i + 1: the model names the next one, and after it the one after."""
    rows = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    prompter = prompts_of(rows, **KINDS[kind])
    torch.manual_seed(0)
    texts = torch.randn(ITEMS, 5) if "text_vectors" in KINDS[kind] else None
    model = Sequential(SequentialConfig(width=16, max_history=6, dropout=0.1, **KINDS[kind]), prompter.symbols, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(80):
        batch = prompter.training(np.arange(len(rows)), Draws(0, step))
        (model(batch) / batch.counts).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = CSR.from_lists([[(start + step) % ITEMS for step in range(3)] for start in range(ITEMS)])
    users = np.arange(len(asked))
    with torch.no_grad():
        lists = ranked_lists(model, prompter, "autoregressive", users, asked, "test", 2, torch.device("cpu"))
    assert lists[:, 0].tolist() == [(int(asked[user][-1]) + 1) % ITEMS for user in users]
    assert lists[:, 1].tolist() == [(int(asked[user][-1]) + 2) % ITEMS for user in users]
