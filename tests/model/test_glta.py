from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.evaluate.decoding import ranked_lists
from raygrec.graph.lightgcn import propagate_users
from raygrec.model.backbone import Backbone, BackboneConfig
from raygrec.model.glta import GLTA, GLTAConfig, Phrases, ProfileConfig, PromptBuilder
from raygrec.model.nodes import token_scale
from raygrec.model.prompts import PAD, PromptBatch, Symbols
from raygrec.model.trend import READING, Trend
from tests.model.random_nodes import expected_logits, expected_token, parts_around, random_nodes

WORDS = ["[PAD]", "[CLS]", "history", ":", ";", "likes", "wants", "user", "next", ",", *"0123456789"]
TEXT, ITEMS = 60, 20  # token ids below 20 are WORDS, 20 + i is the one word of item i
NO_TEXTS = ProfileConfig(profile=False, prediction=False)

Answers = dict[int, dict[int, float]]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[PAD]"))
    # Digits and signs stand alone: "12" is two tokens.
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, cls_token="[CLS]", pad_token="[PAD]")


def builder(
    train: CSR | list[list[int]],
    ordered: bool = True,
    slots: int = 2,
    item_terms: list[list[int]] | None = None,
    weight: list[float] | None = None,
    term_tokens: list[list[int]] | None = None,
    **settings: object,
) -> PromptBuilder:
    """Without `item_terms`, the one term of item i is i, of weight 1, written as token 20 + i. Without dropout."""
    config = GLTAConfig(slots=slots, **{"dropout": 0.0, **settings})
    train = train if isinstance(train, CSR) else CSR.from_lists(train)
    item_terms = item_terms or [[item] for item in range(ITEMS)]
    term_tokens = term_tokens or [[20 + term] for term in range(ITEMS)]
    return PromptBuilder(
        config,
        Symbols(TEXT, ITEMS, len(train), slots),
        Phrases(tokenizer(), config),
        train,
        ordered,
        CSR.from_lists([[20 + item] * (item % 4) for item in range(ITEMS)]),
        CSR.from_lists(item_terms),
        CSR.from_lists(term_tokens),
        np.array(weight or [1.0] * len(term_tokens), dtype=np.float32),
    )


def answers(batch: PromptBatch) -> list[Answers]:
    """For each prompt, column -> {item: weight} of its answer positions."""
    width = batch.symbols.shape[1]
    found: list[Answers] = [{} for _ in batch.symbols]
    for place, row in enumerate(batch.targets.rows.tolist()):
        prompt, column = divmod(int(batch.answers[row]), width)
        item, weight = int(batch.targets.items[place]), float(batch.targets.weights[place])
        found[prompt].setdefault(column, {})[item] = weight
    return found


def prompts(batch: PromptBatch) -> list[list[int]]:
    return [row[row != PAD].tolist() for row in batch.symbols]


def histories(batch: PromptBatch) -> list[list[int]]:
    return [part.tolist() for part in batch.history.split(batch.history_indptr.diff().tolist())]


def columns(batch: PromptBatch) -> torch.Tensor:
    return batch.slots - torch.arange(len(batch.slots))[:, None] * batch.symbols.shape[1]


def random_rows(seed: int, users: int = 30, repeats: bool = False) -> CSR:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, users)
    if repeats:
        return CSR.from_lists([rng.integers(0, ITEMS // 2, length) for length in lengths])
    return CSR.from_lists([rng.permutation(ITEMS)[:length] for length in lengths])


# ---- recommending and training prompts


def test_a_training_prompt_by_hand():
    terms = [[] for _ in range(ITEMS)]
    terms[3], terms[5], terms[7], terms[2] = [0], [0, 1], [2], [2]
    prompter = builder(
        [[4], [3, 5, 7, 2]],
        item_terms=terms,
        weight=[1.0, 0.5, 9.0],
        term_tokens=[[20], [21, 22], [23]],
        texts=ProfileConfig(terms=1),
        max_history=6,
    )
    draws = next(d for d in map(Draws, range(50)) if histories(prompter.training(np.array([1]), d)) == [[3, 5]])
    batch = prompter.training(np.array([1, 0]), draws)
    item, user, slot = TEXT, TEXT + ITEMS, TEXT + ITEMS + 2
    assert (prompter.symbols.first_item, prompter.symbols.first_user, prompter.symbols.first_slot) == (
        item,
        user,
        slot,
    )
    # Items 3 and 5 share term 0 (score 2): it is the profile; the prediction is term 1, two tokens. Term 2,
    # the heaviest, belongs to the targets 7 and 2 and must not be there.
    likes, wants, who, then = [4, 5], [4, 6], [4, 7], [4, 8, 3]
    start = [1, 2, 3]
    full = [*start, item + 3, item + 5, *likes, 20, *wants, 21, 22, *who, user + 1, *then, slot, slot + 1]
    lone = [*start, item + 4, *likes, *wants, *who, user + 0, *then, slot, slot + 1]
    assert prompts(batch) == [full, lone]
    tail = len(full) - 5
    assert batch.segments[0].tolist() == [0, 0, 0, 1, 2] + [7] * tail
    assert batch.segments[1, :5].tolist() == [0, 0, 0, 1, 7]
    assert columns(batch).tolist() == [[len(full) - 2, len(full) - 1], [len(lone) - 2, len(lone) - 1]]
    first, second = columns(batch)[0].tolist()
    assert answers(batch) == [{3: {5: 1.0}, 4: {7: 1.0}, first: {7: 1.0}, second: {2: 1.0}}, {}]
    assert batch.answers.tolist() == sorted(batch.answers.tolist())
    assert histories(batch) == [[3, 5], [4]]


def test_only_slots_answer_without_history_loss():
    prompter = builder([[3, 5, 7]], history_loss=False, texts=NO_TEXTS, slots=1)
    batch = prompter.training(np.array([0]), Draws(0))
    assert answers(batch) == [{int(columns(batch)[0, 0]): {7: 1.0}}]
    assert batch.segments.unique().tolist() == [0]


def test_history_only_prompts_train_every_position():
    prompter = builder([[3, 5, 7, 2], [6, 1], [9], []], slots=1)
    batch = prompter.training(np.arange(4), Draws(0), whole=False)
    shown = [[1, 2, 3, *(TEXT + i for i in items)] for items in ([3, 5, 7], [6], [9], [])]
    assert prompts(batch) == shown
    assert answers(batch) == [{3: {5: 1.0}, 4: {7: 1.0}, 5: {2: 1.0}}, {3: {1: 1.0}}, {}, {}]
    assert batch.slots.shape == (4, 0)


def test_whole_prompts_show_the_same_histories():
    train, users = random_rows(4), np.arange(30)
    prompter = builder(train, slots=3)
    part, whole = (prompter.training(users, Draws(6), **how) for how in ({"whole": False}, {}))
    assert histories(part) == histories(whole)
    assert (part.slots.shape, whole.slots.shape) == ((30, 0), (30, 3))
    for few, many, slots in zip(answers(part), answers(whole), columns(whole).tolist(), strict=True):
        assert few == {column: items for column, items in many.items() if column not in slots}


@pytest.mark.parametrize("settings", [{"ordered": False}, {"ordered": True, "history_loss": False}])
def test_histories_alone_ask_nothing_where_they_are_not_causal(settings):
    prompter = builder([[3, 5, 7, 2]], **settings)
    assert not prompter.causal
    assert answers(prompter.training(np.array([0]), Draws(0), whole=False)) == [{}]


def test_prompts_show_the_newest_items_and_all_else_reads_the_whole_history():
    texts = ProfileConfig(terms=1, decay=0.5)
    weight = [9.0 if item == 2 else 1.0 for item in range(ITEMS)]
    prompter = builder([list(range(10))], max_history=3, slots=1, texts=texts, weight=weight)
    batch = prompter.training(np.array([0]), Draws(0))
    shown, likes, wants = [TEXT + 6, TEXT + 7, TEXT + 8], [4, 5, 20 + 2], [4, 6, 20 + 8]
    slot = int(columns(batch)[0, 0])
    assert prompts(batch)[0][: 6 + 6] == [1, 2, 3, *shown, *likes, *wants]
    assert histories(batch) == [list(range(9))]
    assert answers(batch)[0] == {3: {7: 1.0}, 4: {8: 1.0}, 5: {9: 1.0}, slot: {9: 1.0}}
    assert batch.segments.max() == 4


SETTINGS = {
    "ordered": {"ordered": True},
    "ordered, short": {"ordered": True, "max_history": 3},
    "ordered, slots only": {"ordered": True, "history_loss": False},
    "ordered, histories only": {"ordered": True, "whole": False},
    "unordered": {"ordered": False},
    "unordered, sampled": {"ordered": False, "targets": "sampled"},
    "unordered, most held out": {"ordered": False, "holdout": 0.9, "max_history": 2},
}


@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeats"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_answer_stands_where_its_position_can_see_it(settings, repeats):
    """Not as history, not through the user, not in a text; over many draws."""
    for seed in range(12):
        train = random_rows(seed, repeats=repeats)
        options = dict(settings)
        whole = options.pop("whole", True)
        prompter = builder(train, slots=3, **options)
        users = np.random.default_rng(seed).permutation(len(train))
        batch = prompter.training(users, Draws(seed), whole)
        attention = batch.attention
        slots = columns(batch)
        for row, (wanted, shown) in enumerate(zip(answers(batch), histories(batch), strict=True)):
            assert set(shown) <= set(train[users[row]].tolist())
            for column, items in wanted.items():
                assert sum(items.values()) == pytest.approx(1)
                seen = set(batch.symbols[row][attention[row, column]].tolist())
                assert not seen & {TEXT + item for item in items}
                assert not seen & {20 + item for item in items}
                if column in slots[row]:
                    assert not set(items) & set(shown)  # what the leave-one-out user vector is made of
                else:
                    assert max(seen) < prompter.symbols.first_user
                    assert batch.symbols[row, column] >= prompter.symbols.first_item
        texts = [{t - 20 for t in p if 20 <= t < 20 + ITEMS} for p in prompts(batch)]
        assert all(text <= set(shown) for text, shown in zip(texts, histories(batch), strict=True))


@pytest.mark.parametrize("ordered", [True, False])
def test_every_user_with_two_items_has_a_target_and_every_count_is_drawn(ordered):
    train = CSR.from_lists([list(range(length)) for length in range(13)])
    prompter = builder(train, ordered, slots=3, holdout=0.5)
    shown = {length: set() for length in range(13)}
    for seed in range(80):
        batch = prompter.training(np.arange(13), Draws(seed))
        for length, (history, wanted) in enumerate(zip(histories(batch), answers(batch), strict=True)):
            shown[length].add(len(history))
            assert bool(wanted) == (length >= 2)
    assert shown[0] == {0}
    assert shown[1] == {1}
    assert shown[2] == {1}
    assert shown[12] == ({9, 10, 11} if ordered else set(range(6, 12)))


@pytest.mark.parametrize("ordered", [True, False])
def test_items_that_texts_or_embeddings_were_made_from_are_shown(ordered):
    """`shown_at_least`: a user's first items are history in every training prompt, never a slot's target."""
    train = CSR.from_lists([list(np.random.default_rng(u).permutation(ITEMS)[:u]) for u in range(12)])
    prompter = builder(train, ordered, slots=4, holdout=0.9)
    prompter.shown_at_least = train.lengths - train.lengths // 2
    drawn = Counter()
    for seed in range(40):
        batch = prompter.training(np.arange(12), Draws(seed))
        slots = columns(batch)
        for user, (shown, wanted) in enumerate(zip(histories(batch), answers(batch), strict=True)):
            first = train[user][: prompter.shown_at_least[user]].tolist()
            assert shown[: len(first)] == first
            targets = {i for column, items in wanted.items() if column in slots[user] for i in items}
            assert not targets & set(first)
            drawn.update([(user, len(shown))])
    assert {count for user, count in drawn if user == 11} == ({7, 8, 9, 10} if ordered else set(range(6, 11)))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_share_of_whole_prompts_shows_no_item(ordered):
    """Its slots name the user's first items, of an unordered history all; what texts were made from is shown still."""
    train = CSR.from_lists([[3, 5, 7], [2, 4, 6, 8, 1], [9, 10]] * 200)
    users = np.arange(600)
    plain, prompter = (builder(train, ordered, slots=2, empty_histories=share) for share in (0.0, 0.3))
    batch = prompter.training(users, Draws(1))
    empty = [user for user, shown in enumerate(histories(batch)) if not shown]
    assert 140 < len(empty) < 220  # within four standard deviations
    slots, found = columns(batch).tolist(), answers(batch)
    for user in empty:
        first, second = slots[user]
        items = train[user].tolist()
        all_of_them = {item: pytest.approx(1 / len(items)) for item in items}
        expected = (
            {first: {items[0]: 1.0}, second: {items[1]: 1.0}}
            if ordered
            else dict.fromkeys((first, second), all_of_them)
        )
        assert found[user] == expected
    same = histories(plain.training(users, Draws(1)))
    assert all(found in ([], before) for found, before in zip(histories(batch), same, strict=True))
    assert all(histories(prompter.training(users, Draws(1), whole=False)))
    prompter.shown_at_least = np.ones(600, dtype=np.int64)
    assert min(map(len, histories(prompter.training(users, Draws(1))))) == 1


def test_repeated_items_are_no_targets():
    prompter = builder([[3, 5, 3, 3, 7]], slots=1, texts=NO_TEXTS)
    batch = prompter.training(np.array([0]), Draws(0))
    assert histories(batch) == [[3, 5, 3, 3]]
    assert answers(batch) == [{3: {5: 1.0}, 6: {7: 1.0}, int(columns(batch)[0, 0]): {7: 1.0}}]
    nothing_new = builder([[3, 3]], slots=1).training(np.array([0]), Draws(0))
    assert answers(nothing_new) == [{}]


def test_unordered_targets_all_and_sampled():
    """Same draws, same history; `sampled` gives slot j one of the items that `all` gives every slot."""
    train = CSR.from_lists([np.random.default_rng(u).permutation(ITEMS)[:9] for u in range(20)])
    batches = {
        kind: builder(train, False, targets=kind, slots=3).training(np.arange(20), Draws(5))
        for kind in ("all", "sampled")
    }
    assert prompts(batches["all"]) == prompts(batches["sampled"])
    for user, (every, one) in enumerate(zip(*map(answers, batches.values()), strict=True)):
        future = set(train[user].tolist()) - set(histories(batches["all"])[user])
        slots = columns(batches["all"])[user].tolist()
        assert every == {slot: {item: pytest.approx(1 / len(future)) for item in future} for slot in slots}
        picked = [item for slot in slots for item in one.get(slot, {})]
        assert len(picked) == len(set(picked)) == min(3, len(future))
        assert set(picked) <= future
        assert list(one) == slots[: len(picked)]


def test_unordered_histories_and_sampled_slots_are_uniform():
    users = 4000
    prompter = builder(CSR.from_lists([[0, 1, 2, 3]] * users), False, targets="sampled", slots=2, texts=NO_TEXTS)
    batch = prompter.training(np.arange(users), Draws(1))
    first_slot, first_shown = Counter(), Counter(history[0] for history in histories(batch))
    for slots, wanted in zip(columns(batch).tolist(), answers(batch), strict=True):
        first_slot.update(wanted[slots[0]])
    for counts in (first_slot, first_shown):
        assert sum(counts.values()) == users
        assert all(abs(counts[item] - users / 4) < 5 * np.sqrt(users * 3 / 16) for item in range(4))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_prompt_does_not_depend_on_its_batch(ordered):
    train = random_rows(3)
    prompter = builder(train, ordered, slots=3, user_dropout=0.5)
    users, draws = np.array([7, 2, 29, 11, 0]), Draws(9, 1)

    def described(batch: PromptBatch) -> list[tuple]:
        segments = [s[: len(p)].tolist() for s, p in zip(batch.segments, prompts(batch), strict=True)]
        kept, slots = batch.user_kept.tolist(), columns(batch).tolist()
        return list(zip(prompts(batch), segments, histories(batch), answers(batch), kept, slots, strict=True))

    together = described(prompter.training(users, draws))
    parts = [part for split in ([7], [2, 29], [11, 0]) for part in described(prompter.training(np.array(split), draws))]
    assert together == parts


def test_recommending_shows_the_given_histories_and_asks_for_the_given_slots():
    prompter = builder([[3], [5]], slots=3, texts=NO_TEXTS, max_history=2)
    batch = prompter.recommending(np.array([1, 0]), CSR.from_lists([[5, 8, 9], []]), slots=1)
    slot, user = prompter.symbols.first_slot, prompter.symbols.first_user
    assert prompts(batch) == [
        [1, 2, 3, TEXT + 8, TEXT + 9, 4, 7, user + 1, 4, 8, 3, slot],
        [1, 2, 3, 4, 7, user, 4, 8, 3, slot],
    ]
    assert batch.slots.tolist() == [[11], [12 + 9]]
    assert not set(batch.answers.tolist()) & set(batch.slots.flatten().tolist())
    assert batch.user_kept.all()
    assert prompter.recommending(np.array([1]), CSR.from_lists([[5]])).slots.shape == (1, 3)


def test_the_user_as_text_or_not_at_all():
    train = [[3, 5]] * 13
    as_text = builder(train, user_token="id", texts=NO_TEXTS, slots=1)
    history = CSR.from_lists([[3], [3]])
    digits = {1: [11], 12: [11, 12]}
    for user, row in zip((1, 12), prompts(as_text.recommending(np.array([1, 12]), history)), strict=True):
        assert row == [1, 2, 3, TEXT + 3, 4, 7, *digits[user], 4, 8, 3, as_text.symbols.first_slot]
    without = builder(train, user_token="none", texts=NO_TEXTS, slots=1)
    assert prompts(without.recommending(np.array([1, 12]), history))[1][4:7] == [4, 8, 3]


@pytest.mark.parametrize(("profile", "prediction"), [(True, False), (False, True)])
def test_each_text_can_be_left_out(profile, prediction):
    texts = ProfileConfig(profile=profile, prediction=prediction, terms=1)
    prompter = builder([[3, 5]], texts=texts, user_token="none", slots=1)
    row = prompts(prompter.recommending(np.array([0]), CSR.from_lists([[3, 5]])))[0]
    # Equal scores: the profile is the lower term, 3; the prediction is the newest of the others, 5.
    assert row[5:8] == ([4, 5, 23] if profile else [4, 6, 25])
    assert row[8:] == [4, 8, 3, prompter.symbols.first_slot]


@pytest.mark.parametrize(("ordered", "wanted"), [(True, 7), (False, 5)])
def test_only_ordered_histories_weigh_their_newest_items_more(ordered, wanted):
    weight = [1.0] * ITEMS
    weight[3], weight[5], weight[7] = 3.0, 1.0, 0.8  # with decay 0.5 item 5 falls to 0.5
    texts = ProfileConfig(terms=1, decay=0.5)
    prompter = builder([[3, 5, 7]], ordered, texts=texts, weight=weight, user_token="none", slots=1)
    row = prompts(prompter.recommending(np.array([0]), CSR.from_lists([[3, 5, 7]])))[0]
    assert row[6:12] == [4, 5, 20 + 3, 4, 6, 20 + wanted]


def test_generated_texts_are_those_of_the_stage_and_user():
    prompter = builder(
        [[3, 5], [5, 3]],
        texts=ProfileConfig(source="generated"),
        user_token="none",
        slots=1,
    )
    for number, stage in enumerate(("train", "valid", "test")):
        base = 20 + 10 * number
        prompter.written[stage] = tuple(CSR.from_lists([[base + n], [base + n + 1, base]]) for n in (1, 5))
    history = CSR.from_lists([[3]])
    for stage, base in (("valid", 30), ("test", 40)):
        row = prompts(prompter.recommending(np.array([1]), history, stage))[0]
        assert row[4:-4] == [4, 5, base + 2, base, 4, 6, base + 6, base]
    row = prompts(prompter.training(np.array([1, 0]), Draws(0)))[0]
    assert row[4:-4] == [4, 5, 22, 20, 4, 6, 26, 20]


# ---- item-text alignment


def test_alignment_prompts_ask_for_the_item_of_each_description():
    prompter = builder([[1]], alignment_tokens=2)
    items = np.random.default_rng(0).permutation(ITEMS).reshape(4, 5)
    batch = prompter.alignment(items, Draws(3))
    item, slot = prompter.symbols.first_item, prompter.symbols.first_slot
    attention, orders = batch.attention, set()
    for row in range(4):
        symbols = batch.symbols[row].tolist()
        assert symbols[:6] == [1, *(item + i for i in items[row])]
        asked = []
        for column, wanted in answers(batch)[row].items():
            [(target, weight)] = wanted.items()
            asked.append(target)
            assert (symbols[column], weight) == (slot, 1.0)
            length = min(target % 4, 2)  # the text of item i is its word, i % 4 times
            assert symbols[column - length : column] == [20 + target] * length
            seen = batch.symbols[row][attention[row, column]].tolist()
            texts = {number - 20 for number in seen if 20 <= number < 20 + ITEMS}
            assert texts == {i for i in asked if i % 4}  # its own and earlier descriptions, no later ones
            assert {number - item for number in seen if item <= number < item + ITEMS} == set(items[row])
        assert sorted(asked) == sorted(items[row])
        assert list(answers(batch)[row]) == columns(batch)[row].tolist()
        orders.add(tuple(items[row].tolist().index(i) for i in asked))
    assert len(orders) > 1  # shuffled, and not alike in every prompt
    assert batch.answers.tolist() == batch.slots.flatten().tolist()


def test_alignment_shuffles_uniformly_and_by_the_draws():
    prompter = builder([[1]])
    items = np.tile(np.arange(3), (1, 1))
    orders = Counter(tuple(prompter.alignment(items, Draws(s)).targets.items.tolist()) for s in range(1200))
    assert len(orders) == 6
    assert all(abs(count - 200) < 5 * np.sqrt(1200 * 5 / 36) for count in orders.values())
    one, two = (prompter.alignment(items, Draws(4)) for _ in range(2))
    assert torch.equal(one.symbols, two.symbols)


# ---- the model


@pytest.fixture(scope="module")
def backbone(backbone_folder):
    return Backbone(BackboneConfig(name=backbone_folder("bert"), layers=2))


def model_of(prompter: PromptBuilder, backbone: Backbone, with_texts: bool = True) -> GLTA:
    """A model none of whose trained parameters is zero."""
    torch.manual_seed(5)
    symbols = prompter.symbols
    texts, nodes = torch.randn(ITEMS, 4), random_nodes(symbols.users, ITEMS)
    texts = 5 + 2 * torch.cat([texts, texts**2], dim=1) if with_texts else None
    scale = token_scale(backbone.model.get_input_embeddings().weight)
    trend = None if prompter.trend is None else prompter.trend.log_shares_MI
    model = GLTA(prompter.config, backbone, symbols, nodes, texts, scale, prompter.ordered, trend)
    prompter.tables = nodes.fold_of.numpy()
    for parameter in (p for p in model.parameters() if p.requires_grad and not p.any()):
        torch.nn.init.normal_(parameter)
    return model


def test_token_scale():
    assert token_scale(torch.tensor([[3.0, -4.0], [0.0, 5.0]])) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize("with_texts", [True, False], ids=["texts", "no texts"])
@pytest.mark.parametrize("head", ["linear", "tied"])
def test_logits_cover_slots_and_catalogue(head, with_texts, backbone):
    prompter = builder([[3, 5, 7], [2]], slots=3, head=head)
    model = model_of(prompter, backbone, with_texts)
    batch = prompter.recommending(np.arange(2), CSR.from_lists([[3], [2, 4, 5]]))
    with torch.no_grad():
        logits = model.slot_logits(batch)
        assert logits.shape == (2, 3, ITEMS)
        torch.testing.assert_close(model.slot_logits(batch, 1), logits[:, :1])
        hidden = model.hidden(batch).padded()
        row, slot = 1, 2
        position = int(columns(batch)[row, slot])
        alone = expected_logits(model, hidden[row, position][None], batch.tables[row])[0]
    torch.testing.assert_close(logits[row, slot], alone)


def with_trend(prompter: PromptBuilder, times: list[list[int]]) -> PromptBuilder:
    """Its training items at these times, and one validation item after them."""
    later = CSR.from_lists([[9], *[[]] * (len(prompter.train) - 1)]), np.array([99])
    prompter.trend = Trend(prompter.train, np.concatenate(times), *later, ITEMS, 0.5)
    return prompter


def test_each_position_is_asked_at_the_moment_of_its_target():
    """The eight interactions have moments of their own: before the first nothing is known up to moment 7 of 64."""
    prompter = with_trend(builder([[3, 5, 7, 4], [2, 6, 3, 1]], slots=2), [[10, 11, 12, 40], [20, 21, 30, 31]])
    moment = {(0, 3): 0, (0, 5): 1, (0, 7): 2, (1, 2): 3, (1, 6): 4, (1, 3): 5, (1, 1): 6, (0, 4): 7}
    batch = prompter.training(np.array([1, 0]), Draws(0))
    prompt = (batch.answers // batch.symbols.shape[1]).tolist()
    assert len(prompt) >= 6
    for place, (row, item) in enumerate(zip(prompt, batch.targets.items.tolist(), strict=True)):
        assert batch.targets.moments[place] == 7 + 8 * moment[1 - row, item]


def test_several_targets_are_asked_for_before_the_first_of_them():
    times = [[10, 11, 12, 40], [20, 21, 30, 31]]
    prompter = with_trend(builder([[3, 5, 7, 4], [2, 6, 3, 1]], ordered=False, slots=2, holdout=0.9), times)
    moment = {3: 0, 5: 1, 7: 2, 4: 7}
    batch = prompter.training(np.array([0]), Draws(0))
    asked = set(moment) - set(batch.history.tolist())
    assert len(asked) > 1
    assert batch.targets.moments.tolist() == [7 + 8 * min(moment[item] for item in asked)] * 2


def test_a_recommendation_has_the_trend_of_its_split(backbone):
    prompter = with_trend(builder([[3, 5, 7], [2]], slots=3), [[1, 2, 8], [3]])
    model, shown = model_of(prompter, backbone), CSR.from_lists([[3], [2, 4, 5]])
    with torch.no_grad():
        plain = model.slot_logits(replace(prompter.recommending(np.arange(2), shown), moment=None))
        for stage in ("valid", "test"):
            logits = model.slot_logits(prompter.recommending(np.arange(2), shown, stage))
            added = prompter.trend.log_shares_MI[READING[stage]]
            torch.testing.assert_close(logits, plain + added)
    assert int((prompter.trend.log_shares_MI[READING["test"]] - prompter.trend.log_shares_MI[-2]).argmax()) == 9


def test_the_loss_is_that_of_logits_with_the_trend(backbone):
    prompter = with_trend(builder([[3, 5, 7, 4], [2, 6, 3, 1]]), [[10, 11, 12, 40], [20, 21, 30, 31]])
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(2), Draws(0))
    with torch.no_grad():
        rows = batch.answers // batch.symbols.shape[1]
        logits = model.matched(model.hidden(batch).at(batch.answers), batch.tables[rows])
        logits = logits + prompter.trend.log_shares_MI[batch.targets.moments]
        expected = functional.cross_entropy(logits, batch.targets.items, reduction="sum")
        torch.testing.assert_close(model(replace(batch, dropout_keys=None)), expected)


@pytest.mark.parametrize("tuned", [True, False], ids=["offsets", "no offsets"])
@pytest.mark.parametrize("seed", ["none", "newest", "sum"])
def test_every_symbol_is_embedded_as_its_kind(backbone, seed, tuned):
    prompter = builder(
        [[3, 5], [2, 4]], user_vector="full", texts=NO_TEXTS, slot_seed=seed, tune_items=tuned, max_history=2
    )
    model = model_of(prompter, backbone)
    batch = prompter.recommending(np.array([1, 0]), CSR.from_lists([[3, 9, 4], [2]]))
    assert (model.item_projector.rows.free is None) == (not tuned)
    fits = model.nodes.items_KId[[2, 1]]  # without user 1 and without user 0
    base = prompter.symbols
    with torch.no_grad():
        embeds = model.embed(batch).padded()
        for row, symbols in enumerate(prompts(batch)):
            for column, symbol in enumerate(symbols):
                if symbol < base.first_item:
                    expected = backbone.embed(torch.tensor(symbol))
                elif symbol < base.first_user:
                    item = symbol - base.first_item
                    expected = expected_token(model, fits[row, item], item)
                elif symbol < base.first_slot:
                    expected = model.user_projector(model.nodes.users_Ud[symbol - base.first_user])
                else:
                    expected = model.answer_slots.weight[symbol - base.first_slot]
                    nodes = {"none": None, "newest": [[4], [2]], "sum": [[3, 9, 4], [2]]}[seed]
                    if nodes:
                        tokens = sum(expected_token(model, fits[row, item], item) for item in nodes[row])
                        expected = expected + tokens / len(nodes[row]) ** 0.5
                        expected = expected + model.user_projector(model.nodes.users_Ud[[1, 0][row]])
                torch.testing.assert_close(embeds[row, column], expected)


@pytest.mark.parametrize("user_token", ["id", "none"])
def test_slots_start_from_no_user_where_the_prompt_has_no_aligned_token(backbone, user_token):
    prompter = builder([[3, 5], [2, 4]], user_token=user_token, texts=NO_TEXTS, slots=1)
    model = model_of(prompter, backbone)
    batch = prompter.recommending(np.array([1, 0]), CSR.from_lists([[3, 9], [2]]))
    with torch.no_grad():
        slots = model.embed(batch).padded().flatten(0, 1)[batch.slots[:, 0]]
        newest = [expected_token(model, model.nodes.items_KId[fit, item], item) for fit, item in ((2, 9), (1, 2))]
        expected = model.answer_slots.weight[0] + torch.stack(newest)
    torch.testing.assert_close(slots, expected)


def test_stage_3_starts_slots_from_their_seed_alone(backbone):
    for seed, starts in (("newest", True), ("none", False)):
        prompter = builder([[3, 5], [2, 4]], slot_seed=seed)
        model = model_of(prompter, backbone)
        before = model.answer_slots.weight.clone()
        model.start_slots()
        assert bool((model.answer_slots.weight == 0).all()) == starts
        assert starts or torch.equal(model.answer_slots.weight, before)


def test_items_have_something_of_their_own_only_where_they_are_tuned(backbone):
    scale = token_scale(backbone.model.get_input_embeddings().weight)
    for tuned in (True, False):
        prompter = builder([[3, 5]], tune_items=tuned)
        model = GLTA(prompter.config, backbone, prompter.symbols, random_nodes(1, ITEMS), None, scale)
        own = [name for name, p in model.item_projector.named_parameters() if len(p) == ITEMS]
        assert own == (["rows.free"] if tuned else [])


def test_a_tied_head_wants_items_that_are_tuned():
    with pytest.raises(ValueError, match="head: tied wants tune_items"):
        GLTAConfig(head="tied", tune_items=False)


def test_leave_out_vectors_are_the_propagated_shown_histories(backbone):
    prompter = builder(random_rows(1, users=12), user_vector="leave_out", slots=2, max_history=4)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(12), Draws(0))
    shown = CSR(batch.history_indptr.numpy(), batch.history.numpy())
    assert shown.lengths.min() == 0
    assert shown.lengths.max() > prompter.config.max_history
    with torch.no_grad():
        embeds = model.embed(batch).padded()[
            batch.symbols.ge(prompter.symbols.first_user) & batch.symbols.lt(prompter.symbols.first_slot)
        ]
        both = [propagate_users(shares, shown) for shares in model.nodes.shares_KId[1:]]
        expected = model.user_projector(torch.stack(both)[torch.arange(12) % 2, torch.arange(12)])
    torch.testing.assert_close(embeds, expected)


def test_leave_out_does_not_read_the_pretrained_user(backbone):
    prompter = builder([[3, 5, 7]], user_vector="leave_out")
    model = model_of(prompter, backbone)
    batch = prompter.training(np.array([0]), Draws(0))
    before = model(batch)
    model.nodes.users_Ud.add_(1.0)
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("vector", ["full", "leave_out"])
def test_user_dropout_leaves_the_bias_alone(vector, backbone):
    prompter = builder([[3, 5, 7]] * 400, user_vector=vector, user_dropout=0.3, texts=NO_TEXTS)
    model = model_of(prompter, backbone)
    model.user_projector.bias.data.normal_()
    batch = prompter.training(np.arange(400), Draws(2))
    dropped = ~batch.user_kept
    assert abs(float(dropped.float().mean()) - 0.3) < 5 * np.sqrt(0.21 / 400)
    is_user = batch.symbols.ge(prompter.symbols.first_user) & batch.symbols.lt(prompter.symbols.first_slot)
    with torch.no_grad():
        tokens = model.embed(batch).padded()[is_user]
    bias = model.user_projector.bias
    torch.testing.assert_close(tokens[dropped], bias.expand(int(dropped.sum()), -1))
    assert (tokens[~dropped] - bias).abs().amax(1).min() > 0


@pytest.mark.parametrize("head", ["linear", "tied"])
@pytest.mark.parametrize("user_token", ["aligned", "id", "none"])
def test_gradients_reach_the_trained_parts_only(user_token, head, backbone):
    prompter = builder([[3, 5, 7], [2, 4]], user_token=user_token, head=head, slots=1)
    model = model_of(prompter, backbone)
    model(prompter.training(np.arange(2), Draws(0))).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert trained == parts_around(head) | {"answer_slots.weight"}
    unread = set() if user_token == "aligned" else {"user_projector.weight", "user_projector.bias"}
    assert reached == trained - unread


@pytest.mark.parametrize("head", ["linear", "tied"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_of_a_batch_is_the_sum_of_its_prompts_losses(settings, head, backbone):
    """Against one unpadded prompt at a time, position by position, with torch's cross-entropy."""
    train = random_rows(2, users=8)
    options = dict(settings)
    whole = options.pop("whole", True)
    prompter = builder(train, slots=3, head=head, **options)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(8), Draws(1), whole)
    slow = torch.zeros(())
    with torch.no_grad():
        for user in range(8):
            one = prompter.training(np.array([user]), Draws(1), whole)
            hidden = model.hidden(one).padded()[0]
            for column, wanted in answers(one)[0].items():
                target = torch.zeros(ITEMS)
                target[list(wanted)] = torch.tensor(list(wanted.values()))
                slow += functional.cross_entropy(expected_logits(model, hidden[column], one.tables[0]), target)
        torch.testing.assert_close(model(batch), slow, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ordered", [True, False])
def test_dropout_of_a_prompt_does_not_depend_on_its_batch(ordered, backbone):
    """And it falls on training prompts only."""
    prompter = builder(random_rows(2, users=8), ordered, slots=3, dropout=0.4)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(8), Draws(1))
    parts = [prompter.training(np.arange(8)[part], Draws(1)) for part in (slice(3), slice(3, 4), slice(4, 8))]
    with torch.no_grad():
        together = model(batch)
        torch.testing.assert_close(sum(map(model, parts)), together, rtol=1e-5, atol=1e-4)
        assert abs(together - model(replace(batch, dropout_keys=None))) > 1e-2
        assert abs(together - model(prompter.training(np.arange(8), Draws(2)))) > 1e-2
    histories = CSR.from_lists([[3, 5], [2]])
    assert prompter.recommending(np.arange(2), histories).dropout_keys is None
    assert prompter.alignment(np.arange(6).reshape(2, 3), Draws(0)).dropout_keys is None


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_falls_on_half_as_many_entries_of_the_item_tokens(rate, backbone):
    prompter = builder(CSR.from_lists([list(range(12))] * 60), slots=1, dropout=rate, texts=NO_TEXTS)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(60), Draws(3))
    is_item = batch.symbols.ge(prompter.symbols.first_item) & batch.symbols.lt(prompter.symbols.first_user)
    with torch.no_grad():
        plain, dropped = (model.embed(one).padded() for one in (replace(batch, dropout_keys=None), batch))
    assert torch.equal(plain[~is_item], dropped[~is_item])
    zero = dropped[is_item] == 0
    assert abs(float(zero.float().mean()) - rate / 2) < 5 * np.sqrt(0.16 / zero.numel()) + 1e-9
    torch.testing.assert_close(dropped[is_item][~zero], plain[is_item][~zero] / (1 - rate / 2))


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_a_history_position_knows_nothing_of_what_follows(kind, backbone_folder):
    prompter = builder([[3, 5, 7, 2], [9, 4]])
    model = model_of(prompter, Backbone(BackboneConfig(name=backbone_folder(kind))))
    histories = CSR.from_lists([[3, 5, 7, 2], [3, 5, 11, 12]])
    with torch.no_grad():
        hidden = model.hidden(prompter.recommending(np.zeros(2, dtype=np.int64), histories)).padded()
    same, rest = slice(0, 5), slice(5, 7)  # the opening and items 3 and 5, then the two others
    torch.testing.assert_close(hidden[0, same], hidden[1, same], rtol=0, atol=1e-6)
    assert (hidden[0, rest] - hidden[1, rest]).abs().amax(1).min() > 1e-3


def gradients(model: GLTA, batch: PromptBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [*SETTINGS.values(), "alignment"], ids=[*SETTINGS, "alignment"])
def test_prompts_whose_opening_a_decoder_has_read_once_are_whole_prompts(settings, attention, backbone_folder):
    options = {"dropout": 0.4} if settings == "alignment" else {"dropout": 0.4, **settings}
    whole = options.pop("whole", True)
    prompter = builder(random_rows(2, users=40), slots=3, **options)
    backbone = Backbone(BackboneConfig(name=backbone_folder("llama"), attention=attention))
    model = model_of(prompter, backbone).double()
    if settings == "alignment":
        batch = prompter.alignment(np.random.default_rng(0).integers(0, ITEMS, (40, 3)), Draws(1))
        opening = [1]
    else:
        batch = prompter.training(np.arange(40), Draws(1), whole)
        opening = [1, 2, 3]
    assert batch.prefix == len(opening)
    assert (batch.symbols[:, : batch.prefix] == torch.tensor(opening)).all()
    same = {"rtol": 1e-5, "atol": 1e-5}
    plain = replace(batch, prefix=0)
    torch.testing.assert_close(model(batch), model(plain), **same)
    torch.testing.assert_close(gradients(model, batch), gradients(model, plain), **same)
    with torch.no_grad():
        if whole:
            torch.testing.assert_close(model.slot_logits(batch), model.slot_logits(plain), **same)
        shown = batch.symbols != PAD
        torch.testing.assert_close(model.hidden(batch).padded()[shown], model.hidden(plain).padded()[shown], **same)


@pytest.mark.parametrize("decoding", ["first", "slots", "autoregressive"])
def test_lists_of_prompts_whose_opening_a_decoder_has_read_once(decoding, backbone_folder, monkeypatch):
    prompter = builder([[3, 5]] * 6, slots=4)
    model = model_of(prompter, Backbone(BackboneConfig(name=backbone_folder("llama"))))
    shown = CSR.from_lists([[3, 5, 7], [], [9], list(range(16)), [1, 2], [4]])
    lists = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(Backbone, "_shares_prefix", lambda *_: False)
        with torch.no_grad():
            lists.append(ranked_lists(model, prompter, decoding, np.arange(6), shown, "test", 4, torch.device("cpu")))
    assert torch.equal(*lists)


def test_a_batch_without_targets_has_a_loss_of_zero_that_can_be_stepped(backbone):
    prompter = builder([[3], []])
    model = model_of(prompter, backbone)
    loss = model(prompter.training(np.arange(2), Draws(0)))
    loss.backward()
    assert loss == 0


def test_node_embeddings_are_scaled_and_stay_out_of_the_saved_weights(backbone):
    model = model_of(builder([[3, 5]] * 50), backbone)
    assert torch.allclose(model.item_texts.mean(0), torch.zeros(8), atol=1e-5)
    assert not any("nodes" in name or name == "item_texts" for name in model.state_dict())
