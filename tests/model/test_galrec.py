from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.graph.lightgcn import propagate_users
from raygrec.model.backbone import Backbone, BackboneConfig
from raygrec.model.contrast import info_nce
from raygrec.model.galrec import HOPS, GALRec, GALRecConfig, HopBatch, HopPrompts
from raygrec.model.head import Cells
from raygrec.model.nodes import nodes_of_texts, token_scale
from raygrec.model.prompts import PAD, Symbols
from tests.model.random_nodes import expected_logits, expected_token, parts_around, random_nodes

TEXT, ITEMS, BEGIN = 60, 20, 1
EVERY_USER_LENDS = {"items": 1.0}

Answers = dict[int, dict[int, float]]
TITLES = CSR.from_lists([[20 + item, 40 + item] for item in range(ITEMS)])  # no token is of two items


def hop_prompts(train: CSR | list[list[int]], titles: CSR = TITLES, **settings: object) -> HopPrompts:
    """Without dropout; every user is contrasted and lends an item; `<hop1>` recommends; no titles but where
    `title_tokens` asks."""
    train = train if isinstance(train, CSR) else CSR.from_lists(train)
    settings = {"dropout": 0.0, "contrast": EVERY_USER_LENDS, "readout": "hop1", **settings}
    settings["contrast"] = {"users": 1.0, **settings["contrast"]}
    config = GALRecConfig(**settings)
    symbols = Symbols(TEXT, ITEMS, len(train), HOPS)
    return HopPrompts(config, symbols, [BEGIN], train, train.transposed(ITEMS), titles)


def rows(batch: HopBatch, values: torch.Tensor | None = None) -> list[list[int]]:
    """The symbols of each prompt, or what stands at their places."""
    values = batch.symbols if values is None else values
    return [value[symbols != PAD].tolist() for value, symbols in zip(values, batch.symbols, strict=True)]


def in_row(batch: HopBatch, places: torch.Tensor) -> list[list[int]]:
    """Flat positions [n, m] of the first n prompts as columns; −1 stays."""
    first = torch.arange(len(places))[:, None] * batch.symbols.shape[1]
    return torch.where(places < 0, places, places - first).tolist()


def answers(batch: HopBatch) -> list[Answers]:
    """For each user's prompt, column -> {item: weight}."""
    width = batch.symbols.shape[1]
    found: list[Answers] = [{} for _ in range(batch.num_users)]
    for place, row in enumerate(batch.targets.rows.tolist()):
        prompt, column = divmod(int(batch.answers[row]), width)
        wanted, item = found[prompt].setdefault(column, {}), int(batch.targets.items[place])
        wanted[item] = wanted.get(item, 0.0) + float(batch.targets.weights[place])
    return found


def histories(batch: HopBatch) -> list[list[int]]:
    return [part.tolist() for part in batch.history.split(batch.history_indptr.diff().tolist())]


def random_rows(seed: int, users: int = 14, items: int = ITEMS, repeats: bool = False, fewest: int = 0) -> CSR:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(fewest, 9, users)
    if repeats:
        return CSR.from_lists([rng.integers(0, items // 2, length) for length in lengths])
    return CSR.from_lists([rng.permutation(items)[:length] for length in lengths])


# ---- prompts by hand

# With `recent` no draw decides. User 0 shows 3 and 5. By 5, the newest: user 2, whose latest it is, then user 1.
# Item 5 has users 0 and 1, newest edge first; user 2's is a training target, as are 7 of user 0 and 2 of user 1.
TRAIN = [[3, 5, 7], [5, 9, 2], [4, 5], [2, 7]]
RECENT = {"neighbours": {"choice": "recent"}, "max_history": 4}
HOP0, HOP1, HOP2 = (TEXT + ITEMS + len(TRAIN) + hop for hop in range(HOPS))


def item(number: int) -> int:
    return TEXT + number


def user(number: int) -> int:
    return TEXT + ITEMS + number


def lending(prompter: HopPrompts, users: list[int], lent: list[int]) -> HopBatch:
    """Training prompts of draws in which `users` lend the items `lent`."""
    batches = (prompter.training(np.array(users), Draws(seed)) for seed in range(100))
    return next(batch for batch in batches if batch.nodes[len(users) :].tolist() == lent)


def test_training_prompts_by_hand():
    batch = lending(hop_prompts(TRAIN, **RECENT), [0, 2], [5, 4])
    assert rows(batch) == [
        [BEGIN, user(0), HOP0, item(3), item(5), HOP1, user(2), user(1), HOP2],
        [BEGIN, user(2), HOP0, item(4), HOP1, HOP2],
        [BEGIN, item(5), HOP0, user(0), user(1), HOP1, item(3), item(9), HOP2],
        [BEGIN, item(4), HOP0, user(2), HOP1, HOP2],
    ]
    assert rows(batch, batch.segments) == [
        [0, 5, 5, 1, 2, 5, 6, 6, 7],
        [0, 5, 5, 1, 5, 7],
        [0, 5, 5, 1, 1, 5, 6, 6, 7],
        [0, 5, 5, 1, 5, 7],
    ]
    assert in_row(batch, batch.hops) == [[2, 5, 8], [2, 4, 5], [2, 5, 8], [2, 4, 5]]
    assert batch.own.nonzero().tolist() == [[row, column] for row in range(4) for column in (1, 2)]
    assert batch.nodes.tolist() == [0, 2, 5, 4]
    assert (batch.num_users, histories(batch)) == (2, [[3, 5], [4]])
    assert answers(batch) == [{3: {5: 1.0}, 4: {7: 1.0}, 5: {7: 1.0}}, {3: {5: 1.0}, 4: {5: 1.0}}]
    assert batch.counts.tolist() == [5, 2, 2, 2]


def test_where_the_history_sees_the_user_the_node_is_of_the_first_segment():
    batch, other = (
        lending(hop_prompts(TRAIN, history_sees_user=sees, **RECENT), [0, 2], [5, 4]) for sees in (True, False)
    )
    assert rows(batch) == rows(other)
    assert rows(batch, batch.segments)[0] == [0, 0, 0, 1, 2, 5, 6, 6, 7]
    assert (answers(batch), in_row(batch, batch.hops)) == (answers(other), in_row(other, other.hops))


def test_a_prompt_of_which_only_the_history_is_read_holds_nothing_else():
    settings = {"readout": "history", "title_tokens": 1, **RECENT}
    nothing = {"l1": 0.0, "l2": 0.0, "items": 0.0}
    batch = hop_prompts(TRAIN, contrast=nothing, **settings).training(np.array([0, 2]), Draws(0))
    title = {number: TITLES[number][0] for number in (3, 4, 5)}
    assert rows(batch) == [[BEGIN, item(3), title[3], item(5), title[5]], [BEGIN, item(4), title[4]]]
    assert batch.hops.tolist() == [[-1, -1, -1]] * 2
    assert not batch.own.any()
    assert answers(batch) == [{2: {5: 1.0}, 4: {7: 1.0}}, {2: {5: 1.0}}]
    assert in_row(batch, batch.slots) == [[4], [2]]
    whole = hop_prompts(TRAIN, **settings).training(np.array([0, 2]), Draws(0))
    assert answers(whole) == [{4: {5: 1.0}, 6: {7: 1.0}}, {4: {5: 1.0}}]  # behind the node and `<hop0>`


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_a_node_itself_does_not_know_how_many_neighbours_it_has(kind, backbone_folder):
    """Neither its representation nor that of an item with a title; its neighbours' does."""
    train = CSR.from_lists([[3, number, 19] for number in range(4, 14)])
    prompters = [
        hop_prompts(train, title_tokens=titles, neighbours={"one_hop": near}) for titles in (0, 2) for near in (1, 2, 7)
    ]
    model = model_of(prompters[0], Backbone(BackboneConfig(name=backbone_folder(kind))))
    found = []
    for prompter in prompters:
        batch = next(
            b for b in (prompter.training(np.arange(10), Draws(seed)) for seed in range(99)) if 3 in b.nodes[10:]
        )
        with torch.no_grad():
            found.append(model.representations(batch)[10:][batch.nodes[10:] == 3][0])
    for first, *others in (found[:3], found[3:]):
        for other in others:
            torch.testing.assert_close(other[0], first[0], rtol=1e-5, atol=1e-6)
            assert (other[1] - first[1]).abs().max() > 1e-3


def test_prompts_with_titles_by_hand():
    """Item 3 has three tokens of text, 5 has one and 4 none; two are asked for."""
    titles = CSR.from_lists([{3: [13, 14, 15], 5: [16]}.get(number, []) for number in range(ITEMS)])
    prompter = hop_prompts(TRAIN, titles, title_tokens=2, **RECENT)
    batch = lending(prompter, [0, 2], [3, 4])
    assert rows(batch) == [
        [BEGIN, user(0), HOP0, item(3), 13, 14, item(5), 16, HOP1, user(2), user(1), HOP2],
        [BEGIN, user(2), HOP0, item(4), HOP1, HOP2],
        [BEGIN, item(3), 13, 14, HOP0, user(0), HOP1, item(5), HOP2],
        [BEGIN, item(4), HOP0, user(2), HOP1, HOP2],
    ]
    assert rows(batch, batch.segments) == [
        [0, 5, 5, 1, 1, 1, 2, 2, 5, 6, 6, 7],
        [0, 5, 5, 1, 5, 7],
        [0, 5, 5, 5, 5, 1, 5, 6, 7],
        [0, 5, 5, 1, 5, 7],
    ]
    assert in_row(batch, batch.hops) == [[2, 8, 11], [2, 4, 5], [4, 6, 8], [2, 4, 5]]
    own = [[1, 2], [1, 2], [1, 2, 3, 4], [1, 2]]
    assert batch.own.nonzero().tolist() == [[row, column] for row in range(4) for column in own[row]]
    assert answers(batch) == [{5: {5: 1.0}, 7: {7: 1.0}, 8: {7: 1.0}}, {3: {5: 1.0}, 4: {5: 1.0}}]
    read_out = hop_prompts(TRAIN, titles, **{**RECENT, "title_tokens": 2, "readout": "history"})
    asked = read_out.recommending(np.array([0, 2, 3]), CSR.from_lists([[4, 3], [3, 4], []]))
    assert rows(asked)[:2] == [
        [BEGIN, item(4), item(3), 13, 14],
        [BEGIN, item(3), 13, 14, item(4)],
    ]
    assert rows(asked)[2] == [BEGIN, user(3), HOP0, HOP1]  # for want of a history the user speaks
    assert in_row(asked, asked.slots) == [[4], [4], [2]]
    # Opening, an item's own prompt, a history of four with their titles, four nodes two hops away, task tokens.
    assert prompter.config.longest_prompt == 1 + 3 + 4 * 3 + 4 + 3


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
@pytest.mark.parametrize("place", [1, 2])
def test_the_title_of_a_later_item_changes_no_earlier_representation(place, kind, backbone_folder):
    """Nor does its length; the item's own representation it does change, and all that follow."""
    history, side = [3, 5, 9], {"title_tokens": 3, "readout": "history"}
    other = history[place]

    def states(text: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        titles = CSR.from_lists([text if number == other else [20 + number, 40 + number] for number in range(ITEMS)])
        prompter = hop_prompts([[*history, 7], [2, 4]], titles, **side)
        model = model_of(prompter, Backbone(BackboneConfig(name=backbone_folder(kind))))
        batch = prompter.training(np.array([0]), Draws(0))
        row = rows(batch)[0]
        with torch.no_grad():
            hidden = model.hidden(batch).padded()[0]
        hop1 = row.index(prompter.symbols.first_slot + 1)
        starts = [row.index(item(number)) for number in history] + [hop1]
        return [hidden[first:end] for first, end in pairwise(starts)], hidden[hop1]

    before, hop1 = states([30, 31])
    for text in ([30, 32], [30, 31, 33], []):
        after, hop1_after = states(text)
        for number in range(place):
            torch.testing.assert_close(after[number], before[number], rtol=1e-6, atol=1e-6)
        for number in range(place, 3):
            assert (after[number][-1] - before[number][-1]).abs().max() > 1e-4
        assert (hop1_after - hop1).abs().max() > 1e-4


@pytest.mark.parametrize(("readout", "columns"), [("history", [4, 3]), ("hop1", [5, 4]), ("hop2", [8, 5])])
def test_where_prompts_answer(readout, columns):
    prompter = hop_prompts(TRAIN, readout=readout, **RECENT)
    batch = prompter.training(np.array([0, 2]), Draws(0))
    assert in_row(batch, batch.slots) == [[column] for column in columns]
    first, second = ({column: {target: 1.0}} for column, target in zip(columns, (7, 5), strict=True))
    assert answers(batch) == [{3: {5: 1.0}, 4: {7: 1.0}} | first, {3: {5: 1.0}} | second]
    assert batch.answers.tolist() == sorted(set(batch.answers.tolist()))
    assert batch.counts[0] == len(batch.answers)
    asked = prompter.recommending(np.array([0, 2]), CSR.from_lists([[3, 5], [4]]))
    alone = 2 if readout == "history" else 0  # then nothing stands before the history
    assert in_row(asked, asked.slots) == [[column - alone] for column in columns]


MATRICES = {
    # opening, the node and <hop0>, two neighbours, <hop1>, two nodes two hops away, <hop2>
    ("user", False): """
        1........
        111......
        111......
        1..1.....
        1..11....
        111111...
        11111111.
        11111111.
        111111111""",
    ("user", True): """
        111......
        111......
        111......
        1111.....
        11111....
        111111...
        11111111.
        11111111.
        111111111""",
    ("item", False): """
        1........
        111......
        111......
        1..11....
        1..11....
        111111...
        11111111.
        11111111.
        111111111""",
    ("item", True): """
        111......
        111......
        111......
        11111....
        11111....
        111111...
        11111111.
        11111111.
        111111111""",
}


def matrix(side: str, sees_user: bool) -> torch.Tensor:
    return torch.tensor([[sign == "1" for sign in row.strip()] for row in MATRICES[side, sees_user].split()])


@pytest.mark.parametrize("sees_user", [False, True])
def test_attention_by_hand(sees_user):
    batch = lending(hop_prompts(TRAIN, history_sees_user=sees_user, **RECENT), [0, 2], [5, 4])
    attention = batch.attention
    assert torch.equal(attention[0], matrix("user", sees_user))
    assert torch.equal(attention[2], matrix("item", sees_user))
    # A prompt of six symbols: one neighbour, nothing two hops away, three places of padding.
    short = [0, 1, 2, 3, 5, 8]
    assert torch.equal(attention[1][:6, :6], matrix("user", sees_user)[short][:, short])
    assert torch.equal(attention[1][6:], torch.eye(9, dtype=torch.bool)[6:])
    assert not attention[1][:6, 6:].any()


@pytest.mark.parametrize("sees_user", [False, True])
@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_a_representation_follows_from_what_its_position_may_see_and_from_nothing_else(
    kind, sees_user, backbone_folder
):
    """By the model itself: change the embedding at one place, and see which hidden states change."""
    prompter = hop_prompts(TRAIN, history_sees_user=sees_user, **RECENT)
    model = model_of(prompter, Backbone(BackboneConfig(name=backbone_folder(kind))))
    batch = lending(prompter, [0, 2], [5, 4])
    with torch.no_grad():
        embeds = model.embed(batch).padded()
        before = model.backbone(embeds, batch.attention)
        for row, side in ((0, "user"), (2, "item")):
            expected = matrix(side, sees_user)
            if kind == "llama":
                expected = expected & torch.ones_like(expected).tril()
            for column in range(9):
                other = embeds.clone()
                other[row, column] += torch.randn(embeds.shape[-1])
                moved = (model.backbone(other, batch.attention) - before).abs().amax(2)
                assert (moved[row] > 1e-4).tolist() == expected[:, column].tolist()
                still = moved > 1e-5
                still[row] &= ~expected[:, column]
                assert not still.any()


# ---- what a training prompt must not tell

CHOICES = [
    {},
    {"max_history": 2},
    {"readout": "hop2", "max_history": 3},
    {"readout": "history", "neighbours": {"choice": "uniform", "two_hop": 30, "one_hop": 30}},
    {"neighbours": {"choice": "recent", "two_hop": 30}, "max_history": 5},
    {"title_tokens": 2, "readout": "history", "max_history": 5},
]


@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeats"])
@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_no_answer_stands_where_its_position_can_see_it(settings, repeats):
    """Not as history, not in the user's vector, not as an edge of its own or an item's prompt; over many draws."""
    seen_far = asked = 0
    for seed in range(20):
        train = random_rows(seed, items=12, repeats=repeats)
        edges = {(user, int(item)) for user in range(len(train)) for item in train[user]}
        prompter = hop_prompts(train, **settings)
        users = np.random.default_rng(seed).permutation(len(train))[:10]
        batch = prompter.training(users, Draws(seed))
        attention, base = batch.attention, prompter.symbols
        targets = set()
        for row, (wanted, history) in enumerate(zip(answers(batch), histories(batch), strict=True)):
            assert history == train[users[row]].tolist()[:-1]
            for column, items in wanted.items():
                asked += 1
                assert sum(items.values()) == pytest.approx(1)
                seen = set(batch.symbols[row][attention[row, column]].tolist())
                assert not seen & {token for item in items for token in (base.first_item + item, *TITLES[item])}
                if max(seen) >= base.first_user:
                    # It sees the user's vector, made of the whole history, and perhaps users two hops away.
                    assert not set(items) & set(history)
                    targets |= {(int(users[row]), item) for item in items}
            far = batch.symbols[row][~batch.own[row]].tolist()
            others = {s - base.first_user for s in far if base.first_user <= s < base.first_slot}
            seen_far += len(others)
            assert int(users[row]) not in others
            for other in others:  # by a shown item, which no target is
                assert any((other, item) in edges for item in history[-prompter.config.max_history :])
        edges -= targets
        for row in range(batch.num_users, len(batch.symbols)):
            number = int(batch.nodes[row])
            others = batch.symbols[row][~batch.own[row]].tolist()
            near = [s - base.first_user for s in others if base.first_user <= s < base.first_slot]
            far = [s - base.first_item for s in others if base.first_item <= s < base.first_user]
            assert all((user, number) in edges for user in near)
            paths = {i for u in range(len(train)) if (u, number) in edges for i in range(ITEMS) if (u, i) in edges}
            assert set(far) <= paths - {number}
    assert asked > 150
    assert seen_far > 100


def test_a_history_position_sees_the_user_where_it_is_told_to():
    """The block order taken literally: the vector is made of the items that the history positions must predict."""
    for sees_user in (False, True):
        batch = hop_prompts(TRAIN, history_sees_user=sees_user, **RECENT).training(np.array([0]), Draws(0))
        item_of, own = rows(batch)[0].index(item(3)), rows(batch)[0].index(user(0))
        assert bool(batch.attention[0, item_of, own]) == sees_user


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([3, 5, 3, 3, 7], {3: {5: 1.0}, 6: {7: 1.0}, 7: {7: 1.0}}),
        ([3, 5, 3], {3: {5: 1.0}}),
        ([3, 3], {}),
    ],
)
def test_items_that_came_before_are_no_targets(items, expected):
    batch = hop_prompts([items, [2, 4]]).training(np.array([0]), Draws(0))
    assert answers(batch) == [expected]
    assert batch.counts[0] == len(expected)


def test_an_item_that_came_before_what_is_shown_is_no_target():
    batch = hop_prompts([[7, 3, 5, 3, 7]], max_history=2, contrast={"items": 0.0}).training(np.array([0]), Draws(0))
    assert rows(batch)[0][3:5] == [item(5), item(3)]
    assert answers(batch) == [{}]


def test_every_prompt_trains_the_newest_items():
    batch = hop_prompts([list(range(10))], max_history=3).training(np.array([0]), Draws(0))
    assert rows(batch)[0][3:6] == [item(6), item(7), item(8)]
    assert histories(batch) == [list(range(9))]
    assert answers(batch) == [{3: {7: 1.0}, 4: {8: 1.0}, 5: {9: 1.0}, 6: {9: 1.0}}]


@pytest.mark.parametrize("settings", [*CHOICES, {"contrast": {"items": 0.5}}], ids=str)
def test_a_prompt_does_not_depend_on_its_batch(settings):
    """Nor an item's prompt on whose targets are in the batch: workers draw what one process draws."""
    lent = 0
    for seed in range(6):
        prompter = hop_prompts(random_rows(seed, fewest=2, items=12), **settings)
        users, draws = np.array([7, 2, 13, 11, 0, 5]), Draws(seed, 1)

        def described(batch: HopBatch) -> tuple[list[tuple], list[tuple]]:
            hops, nodes, keys = in_row(batch, batch.hops), batch.nodes.tolist(), batch.dropout_keys.tolist()
            prompts = list(zip(rows(batch), rows(batch, batch.segments), hops, nodes, keys, strict=True))
            asked = list(zip(answers(batch), histories(batch), in_row(batch, batch.slots), strict=True))
            count = batch.num_users
            return list(zip(prompts[:count], asked, strict=True)), prompts[count:]

        together = described(prompter.training(users, draws))
        parts = [described(prompter.training(users[part], draws)) for part in (slice(1), slice(1, 3), slice(3, 6))]
        assert together[0] == [prompt for users_part, _ in parts for prompt in users_part]
        assert together[1] == [prompt for _, items_part in parts for prompt in items_part]
        lent += len(together[1])
    assert lent > 10


def test_items_are_lent_uniformly_and_as_often_as_asked():
    users = 3000
    train = CSR.from_lists([[0, 1, 2, 3, 4 + user % 16] for user in range(users)])
    prompter = hop_prompts(train, contrast={"items": 0.3}, neighbours={"one_hop": 1, "two_hop": 1, "candidates": 1})
    lent = prompter.training(np.arange(users), Draws(2)).nodes[users:]
    assert abs(len(lent) - 0.3 * users) < 5 * np.sqrt(0.21 * users)
    counts = lent.bincount(minlength=ITEMS)
    assert counts[4:].sum() == 0  # a target is not lent
    assert (counts[:4] - len(lent) / 4).abs().max() < 5 * np.sqrt(len(lent) * 3 / 16)
    assert not torch.equal(lent, prompter.training(np.arange(users), Draws(3)).nodes[users:])


def test_what_is_contrasted_is_what_prompts_hold():
    users = np.arange(3)

    def hops(**settings: object) -> tuple[list[bool], int]:
        batch = hop_prompts(TRAIN, **settings).training(users, Draws(0))
        assert batch.contrasted.tolist() == [bool(batch.anchors[0])] * 3 + [True] * (len(batch.nodes) - 3)
        assert batch.anchors[:2] == (3 * bool(batch.contrasted[0]),) * 2
        return (batch.hops[:3, 2] >= 0).tolist(), len(batch.nodes) - 3

    assert hops() == ([True] * 3, 3)
    assert hops(contrast={"items": 1.0, "l3": 0.0}) == ([True] * 3, 0)
    assert hops(contrast={"items": 1.0, "l1": 0.0, "l2": 0.0}) == ([False] * 3, 3)
    nothing = {"l1": 0.0, "l2": 0.0, "l3": 0.0}
    assert hops(contrast=nothing, readout="hop2") == ([True] * 3, 0)
    assert hops(contrast={"users": 1e-9, "items": 1.0}, readout="hop2") == ([True] * 3, 3)


# ---- recommending


@pytest.mark.parametrize("readout", ["history", "hop1", "hop2"])
def test_recommending_prompts_hold_the_given_histories_and_no_target(readout):
    """User 0 has 7 in training: where it is not in the given history, nothing of the prompt comes from it."""
    prompter = hop_prompts(TRAIN, readout=readout, **RECENT)
    batch = prompter.recommending(np.array([0, 3]), CSR.from_lists([[3, 5], []]), "valid", 1)
    before = [] if readout == "history" else [user(0), HOP0]
    after = {"history": [], "hop1": [HOP1], "hop2": [HOP1, user(2), user(1), HOP2]}
    assert rows(batch) == [
        [BEGIN, *before, item(3), item(5), *after[readout]],
        [BEGIN, user(3), HOP0, HOP1, *[HOP2] * (readout == "hop2")],
    ]
    assert histories(batch) == [[3, 5], []]
    assert not set(batch.answers.tolist()) & set(batch.slots.flatten().tolist())
    assert batch.dropout_keys is None
    assert torch.equal(batch.symbols, prompter.recommending(np.array([0, 3]), CSR.from_lists([[3, 5], []])).symbols)


@pytest.mark.parametrize("head", ["linear", "tied"])
@pytest.mark.parametrize("readout", ["history", "hop1", "hop2"])
def test_logits_are_those_of_the_read_out(readout, head, backbone):
    prompter = hop_prompts(TRAIN, readout=readout, head=head)
    model = model_of(prompter, backbone)
    batch = prompter.recommending(np.arange(4), CSR.from_lists([[3, 5], [5], [], [2, 7, 9]]))
    with torch.no_grad():
        logits = model.slot_logits(batch, 1)
        assert logits.shape == (4, 1, ITEMS)
        hidden = model.hidden(batch).padded()
        for row, [column] in enumerate(in_row(batch, batch.slots)):
            expected = expected_logits(model, hidden[row, column][None], batch.tables[row])
            torch.testing.assert_close(logits[row], expected)
        # Only the history speaks for a user: the vector that has seen its training targets is not read.
        model.nodes.users_Ud[:4] += 1.0
        changed = (model.slot_logits(batch) - logits).abs().amax((1, 2)) > 1e-5
    assert changed.tolist() == [readout == "hop2" and bool(row) for row in ([3, 5], [5], [], [2, 7, 9])]


# ---- the model


@pytest.fixture
def backbone(backbone_folder) -> Backbone:
    return Backbone(BackboneConfig(name=backbone_folder("bert"), layers=2))


def model_of(prompter: HopPrompts, backbone: Backbone, with_texts: bool = True) -> GALRec:
    """A model none of whose parameters around the backbone is zero."""
    torch.manual_seed(5)
    symbols = prompter.symbols
    texts, nodes = torch.randn(ITEMS, 4), random_nodes(symbols.users, ITEMS)
    texts = 5 + 2 * torch.cat([texts, texts**2], dim=1) if with_texts else None
    scale = token_scale(backbone.model.get_input_embeddings().weight)
    if not prompter.config.graph_vectors:
        nodes = nodes_of_texts(texts, prompter.train, ITEMS, 4)
    model = GALRec(prompter.config, backbone, symbols, nodes, texts, scale)
    prompter.tables = nodes.fold_of.numpy()
    for parameter in (p for p in model.parameters() if p.requires_grad and not p.any()):
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("with_texts", [True, False], ids=["texts", "no texts"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_every_symbol_is_embedded_as_its_kind(graph, with_texts, backbone):
    prompter = hop_prompts(random_rows(1, fewest=1), graph_vectors=graph, max_history=3, title_tokens=1)
    model = model_of(prompter, backbone, with_texts)
    batch = prompter.training(np.arange(14), Draws(0))
    history = CSR(batch.history_indptr.numpy(), batch.history.numpy())
    assert history.lengths.max() > prompter.config.max_history
    mine = torch.stack([propagate_users(shares, history) for shares in model.nodes.shares_KId])
    base = prompter.symbols
    kinds = set()
    with torch.no_grad():
        embeds = model.embed(batch).padded()
        for row, symbols in enumerate(rows(batch)):
            # Users read the fit without them, items the fit on all edges; without a graph there is one.
            fit = 1 + row % 2 if graph and row < 14 else 0
            for column, symbol in enumerate(symbols):
                if symbol < base.first_item:
                    kind, expected = "text", backbone.embed(torch.tensor(symbol))
                elif symbol < base.first_user:
                    item = symbol - base.first_item
                    kind, expected = "item", expected_token(model, model.nodes.items_KId[fit, item], item)
                elif symbol >= base.first_slot:
                    kind, expected = "hop", model.hop_tokens.weight[symbol - base.first_slot]
                elif batch.own[row, column]:
                    kind, expected = "own", model.user_projector(mine[fit, row])
                else:
                    kind, expected = "other", model.user_projector(model.nodes.users_Ud[symbol - base.first_user])
                kinds.add(kind)
                torch.testing.assert_close(embeds[row, column], expected)
    assert kinds == {"text", "item", "hop", "own", "other"}
    assert {bool(table.any()) for table in model.nodes.items_KId} == {graph}
    assert {bool(table.any()) for table in (model.nodes.users_Ud, *mine)} == {graph or with_texts}


PAIRS = [
    {"side": "user", "anchor": 2, "positive": 0, "weight": "l1"},
    {"side": "item", "anchor": 2, "positive": 1, "weight": "l2"},
    {"side": "user", "anchor": 0, "positive": 1, "weight": "l3"},
]


def plain_hidden(model: GALRec, batch: HopBatch) -> list[torch.Tensor]:
    """Hidden states [T, D] of each prompt by itself, without padding."""
    attention, embeds = batch.attention, model.embed(batch).padded()
    lengths = (batch.symbols != PAD).sum(1).tolist()
    return [
        model.backbone(embeds[row : row + 1, :n], attention[row : row + 1, :n, :n])[0] for row, n in enumerate(lengths)
    ]


def plain_projection(model: GALRec, hops: torch.Tensor) -> torch.Tensor:
    """Hidden states as the contrast compares them."""
    if model.config.contrast.projection is None:
        return hops
    inner, _, outer = model.projection
    return functional.gelu(hops @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias


def plain_terms(
    model: GALRec, batch: HopBatch, before: dict[tuple[str, int], tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    """The four sums, with torch's cross-entropy over materialised logits and `info_nce` on the hops' states."""
    hidden = plain_hidden(model, batch)
    recommended = torch.zeros(())
    for row, wanted in enumerate(answers(batch)):
        for column, items in wanted.items():
            target = torch.zeros(ITEMS)
            target[list(items)] = torch.tensor(list(items.values()))
            recommended += functional.cross_entropy(
                expected_logits(model, hidden[row][column], batch.tables[row]), target
            )
    hops = torch.stack([hidden[row][columns] for row, columns in enumerate(in_row(batch, batch.hops))])
    hops, users = plain_projection(model, hops), batch.num_users
    parts = {"user": (hops[:users], batch.nodes[:users]), "item": (hops[users:], batch.nodes[users:])}
    sums = {"l1": torch.zeros(()), "l2": torch.zeros(()), "l3": torch.zeros(())}
    for pair in model.config.contrast.pairs:
        states, nodes = parts[pair.side]
        read = before[pair.side, pair.positive]
        tau = model.config.contrast.temperature
        sums[pair.weight] += info_nce(states[:, pair.anchor], states[:, pair.positive], nodes, *read, tau)
    return torch.stack([recommended, *sums.values()])


@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.parametrize("pairs", [{}, {"pairs": PAIRS}], ids=["default", "other"])
def test_the_terms_of_the_loss(pairs, projection, backbone):
    contrast = {**EVERY_USER_LENDS, "queue": 30, "temperature": 0.2, "projection": projection, **pairs}
    prompter = hop_prompts(random_rows(2, fewest=2), contrast=contrast, max_history=3)
    model = model_of(prompter, backbone)
    with torch.no_grad():
        # Nodes that meet again in the queue, and places of it that are still empty.
        numbers = {"user": torch.arange(20) % 14, "item": torch.arange(20)}
        for (side, _), queue in model.queues.items():
            queue.enqueue(torch.randn(20, projection or backbone.width), numbers[side])
        before = {kind: (queue.rows(), queue.ids()) for kind, queue in model.queues.items()}
        assert len(before) == (3 if pairs else 2)
        batch = prompter.training(np.arange(14), Draws(1))
        expected = plain_terms(model, batch, before)
        assert expected.min() > 1
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-3)
    users, items = 14, len(batch.nodes) - 14
    counts = {"default": [users, users, items], "other": [users, items, users]}
    assert batch.counts.tolist() == [len(batch.answers), *counts["other" if pairs else "default"]]
    assert list(model.terms) == ["cross_entropy", "l1", "l2", "l3"]


@pytest.mark.parametrize("readout", ["history", "hop2"])
def test_successors_of_what_a_position_has_read_are_added_to_its_logits(readout, backbone):
    """Also where items with a title of several tokens are read, some of them not, and two positions have one target."""
    train = random_rows(3)
    prompter = hop_prompts(train, successors={}, readout=readout, max_history=3, title_tokens=1)
    model, users = model_of(prompter, backbone), np.arange(14)
    batch = prompter.training(users, Draws(0))
    added = [logits_of(model, batch.successors.part(p, p + 1)) for p in range(len(batch.answers))]
    assert sum(len(cells.items) for cells in added) > 50
    shown = [train[user][max(len(train[user]) - 4, 0) : -1] for user in users]
    with torch.no_grad():
        hidden = model.hidden(batch).padded()
        expected, width = 0.0, batch.symbols.shape[1]
        for place, cells in zip(batch.answers.tolist(), added, strict=True):
            row, column = divmod(place, width)
            # How many of its items stand up to here: each is an item and a token of its title.
            known = int(
                ((batch.symbols[row, : column + 1] >= TEXT) & (batch.symbols[row, : column + 1] < TEXT + ITEMS)).sum()
            )
            known -= readout == "hop2" and len(shown[row]) < known
            history = CSR.from_lists([shown[row][:known]])
            alone = logits_of(model, prompter.successors.after(users[[row]], history, np.array([known - 1])))
            assert cells.items.tolist() == alone.items.tolist()
            torch.testing.assert_close(cells.weights, alone.weights)
            logits = expected_logits(model, hidden[row, column][None], batch.tables[row])
            logits[0, cells.items] += cells.weights
            for item, weight in answers(batch)[row][column].items():
                expected -= weight * logits.log_softmax(1)[0, item]
        torch.testing.assert_close(model(batch)[0], expected)
        # Recommending, of the newest of the items that are shown: three, whatever went before.
        recommending = prompter.recommending(users[:2], CSR.from_lists([[1, 0, 2, 4, 5], []]))
        found = model.slot_logits(recommending)[:, 0]
        alone = logits_of(model, prompter.successors.after(users[:1], CSR.from_lists([[2, 4, 5]]), np.array([2])))
        model.successors = None
        plain = model.slot_logits(recommending)[:, 0]
    assert len(alone.items) > 3
    plain[0, alone.items] += alone.weights
    torch.testing.assert_close(found, plain)


def logits_of(model: GALRec, found: Cells) -> Cells:
    return found.weighing(model.successors(found.weights))


@pytest.mark.parametrize("sees_user", [True, False])
@pytest.mark.parametrize("readout", ["history", "hop1", "hop2"])
def test_where_nothing_is_contrasted_prompts_are_read_up_to_the_last_answer(readout, sees_user, backbone):
    contrast = {"l1": 0.0, "l2": 0.0, "l3": 0.0}
    settings = {"readout": readout, "history_sees_user": sees_user, "contrast": contrast, "max_history": 3}
    prompter = hop_prompts(random_rows(2, fewest=1), **settings)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(14), Draws(1))
    empty = torch.zeros(0, backbone.width), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        expected = plain_terms(model, batch, {("user", 2): empty, ("item", 2): empty})[0]
        torch.testing.assert_close(model(batch), torch.stack([expected, *torch.zeros(3)]), rtol=1e-5, atol=1e-3)


def test_weights_are_the_configs_and_terms_of_none_are_zero(backbone):
    prompter = hop_prompts(TRAIN, contrast={"items": 1.0, "l1": 0.0, "l2": 0.7, "l3": 0.0})
    model = model_of(prompter, backbone)
    assert model.terms == {"cross_entropy": 1.0, "l1": 0.0, "l2": 0.7, "l3": 0.0}
    terms = model(prompter.training(np.arange(3), Draws(0)))
    assert (terms != 0).tolist() == [True, False, True, False]


def test_without_a_contrast_nothing_is_projected_or_followed(backbone):
    contrast = {"l1": 0.0, "l2": 0.0, "l3": 0.0, "projection": 6, "momentum": 0.9}
    model = model_of(hop_prompts(TRAIN, contrast=contrast), backbone)
    assert model.projection is None and model.slow is None


def test_queues_take_the_positives_after_the_update(backbone):
    prompter = hop_prompts(TRAIN, contrast={"items": 1.0, "queue": 5})
    model = model_of(prompter, backbone)
    batch, other = prompter.training(np.array([0, 2]), Draws(1)), prompter.training(np.array([1]), Draws(1))
    with torch.no_grad():
        first = model(batch)
        torch.testing.assert_close(model(batch), first, rtol=0, atol=0)  # the queues are as they were
        model._fresh = []
        for one in (batch, other):  # two passes of one update
            model(one)
        assert model.queues["user", 2].ids().tolist() == [-1] * 5
        model.after_update()
        ids = {"user": [0, 2, 1], "item": [*batch.nodes[2:].tolist(), int(other.nodes[1])]}
        far = [
            hidden[columns[2]]
            for one in (batch, other)
            for hidden, columns in zip(plain_hidden(model, one), in_row(one, one.hops), strict=True)
        ]
        for side, numbers in (("user", [0, 1, 4]), ("item", [2, 3, 5])):
            queue, states = model.queues[side, 2], [far[number] for number in numbers]
            assert queue.ids().tolist() == [-1, -1, *ids[side]]
            torch.testing.assert_close(queue.rows()[2:], functional.normalize(torch.stack(states)))
        model.after_update()
        assert model.queues["user", 2].ids().tolist() == [-1, -1, 0, 2, 1]  # nothing enters twice


def with_momentum(
    backbone_folder, projection: int | None = None, **settings: object
) -> tuple[HopPrompts, GALRec, GALRec]:
    """A model whose momentum copy is a model of other parameters, which comes third."""
    contrast = {"items": 1.0, "queue": 9, "momentum": 0.75, "temperature": 0.2, "projection": projection}
    prompter = hop_prompts(random_rows(2, fewest=2), contrast=contrast, max_history=3, **settings)
    model, other = (
        model_of(prompter, Backbone(BackboneConfig(name=backbone_folder("bert"), layers=2))) for _ in range(2)
    )
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
                if name in model.slow.state():
                    model.slow._slow[name] = parameter.clone()
    other.head = model.head
    return prompter, model, other


@pytest.mark.parametrize(("tuning", "projection"), [("full", None), ("lora", None), ("full", 6)])
def test_positives_and_the_queue_are_the_momentum_copys(tuning, projection, backbone_folder):
    prompter, model, other = with_momentum(backbone_folder, projection, tuning=tuning)
    batch = prompter.training(np.arange(14), Draws(1))
    places = torch.tensor(in_row(batch, batch.hops))
    with torch.no_grad():
        for queue in model.queues.values():
            queue.enqueue(torch.randn(5, projection or 16), torch.arange(5))
    before = {side: (queue.rows(), queue.ids()) for (side, _), queue in model.queues.items()}

    def hops(one: GALRec) -> torch.Tensor:
        hidden = plain_hidden(one, batch)
        states = torch.stack([rows[columns] for rows, columns in zip(hidden, places, strict=True)])
        return plain_projection(one, states)

    anchors, keys = hops(model), hops(other).detach()
    expected = []
    for rows, side, hop in (
        (slice(14), "user", 0),
        (slice(14), "user", 1),
        (slice(14, None), "item", 0),
        (slice(14, None), "item", 1),
    ):
        expected.append(info_nce(anchors[rows, hop], keys[rows, 2], batch.nodes[rows], *before[side], temperature=0.2))
    expected = torch.stack([expected[0], expected[1], expected[2] + expected[3]])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def gradients(terms: torch.Tensor) -> dict[str, torch.Tensor | None]:
        found = torch.autograd.grad(terms.sum(), list(trained.values()), retain_graph=True, allow_unused=True)
        return dict(zip(trained, found, strict=True))

    terms = model(batch)[1:]
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-3)
    # Gradient comes by the anchors alone.
    found = gradients(terms)
    for name, wanted in gradients(expected).items():
        if wanted is not None:
            torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-3, msg=name)
    model.after_update()
    for side, rows in (("user", slice(14)), ("item", slice(14, None))):
        newest = functional.normalize(keys[rows, 2])[-9:]
        torch.testing.assert_close(model.queues[side, 2].rows()[-len(newest) :], newest, rtol=1e-4, atol=1e-5)


def test_the_model_itself_does_not_read_the_hops_that_only_its_copy_compares(backbone):
    contrast = {"users": 0.5, "items": 0.5, "momentum": 0.9}
    prompter = hop_prompts(random_rows(4, fewest=3), contrast=contrast)
    batch = prompter.training(np.arange(14), Draws(1))
    width, contrasted = batch.symbols.shape[1], batch.hops[:, 2] >= 0
    read = model_of(prompter, backbone).lengths_read(batch)
    assert 0 < contrasted.sum() < len(batch.symbols)
    for row in range(len(batch.symbols)):
        end = int(batch.hops[row, 1]) - row * width + 1 if contrasted[row] else int(batch.lengths[row])
        assert read[row] == end <= batch.lengths[row] - 2 * contrasted[row]
    both = model_of(hop_prompts(random_rows(4, fewest=3), contrast=contrast | {"momentum": None}), backbone)
    assert torch.equal(both.lengths_read(batch), batch.lengths)


def test_where_nothing_is_contrasted_the_momentum_copy_is_not_asked(backbone):
    contrast = {"users": 1e-9, "items": 0.0, "momentum": 0.9, "queue": 3}
    model = model_of(prompter := hop_prompts(TRAIN, contrast=contrast), backbone)
    terms = model(prompter.training(np.arange(3), Draws(0)))
    assert terms[0] > 0 and terms[1:].tolist() == [0, 0, 0]
    model.after_update()
    assert model.queues["user", 2].ids().tolist() == [-1, -1, -1]


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_the_momentum_copy_holds_what_is_trained_before_the_head_and_follows_it(tuning, backbone_folder):
    prompter, model, _ = with_momentum(backbone_folder, 6, tuning=tuning)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")}
    assert any(name.startswith("backbone.") for name in trained) == (tuning != "frozen")
    state = model.carried_state()
    slow = {name.removeprefix("momentum/"): value for name, value in state.items() if name.startswith("momentum/")}
    assert slow.keys() == trained.keys()
    model.after_update()
    for name, parameter in trained.items():
        followed = model.carried_state()[f"momentum/{name}"]
        torch.testing.assert_close(followed, 0.75 * slow[name] + 0.25 * parameter.detach())
    model.load_carried_state(state)
    assert all(torch.equal(value, state[name]) for name, value in model.carried_state().items())
    assert not any("slow" in name or "momentum" in name for name in model.state_dict())
    # Nothing else is read from the copy: recommending is the model's own.
    asked = prompter.recommending(np.arange(2), CSR.from_lists([[3, 5], [2]]))
    plain = GALRec.slot_logits(model, asked)
    model.slow._slow = {name: value + 1 for name, value in model.slow._slow.items()}
    assert torch.equal(model.slot_logits(asked), plain)


def test_queues_go_through_a_checkpoint(backbone):
    prompter = hop_prompts(TRAIN, contrast={"items": 1.0, "queue": 4})
    model, other = model_of(prompter, backbone), model_of(prompter, backbone)
    batch, later = (prompter.training(np.arange(3), Draws(seed)) for seed in (1, 2))
    with torch.no_grad():
        model(batch)
        model.after_update()
        state = model.carried_state()
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            f"{side}2/{name}": shape
            for side in ("user", "item")
            for name, shape in (("rows", (4, 16)), ("ids", (4,)), ("oldest", ()))
        }
        other(later)  # is forgotten
        assert not torch.equal(other(batch), model(batch))
        other.load_carried_state(state)
        model._fresh = []
        for one in (model, other):
            one(later)
            one.after_update()
        assert all(torch.equal(value, other.carried_state()[name]) for name, value in model.carried_state().items())
        assert torch.equal(other(batch), model(batch))
    assert not any("queue" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_gradients_reach_the_trained_parts_only(tuning, kind, backbone_folder):
    head = "linear" if tuning == "lora" else "tied"
    prompter = hop_prompts(TRAIN, tuning=tuning, backbone_lr=0.25, lora={"lr": 0.5}, head=head)
    model = model_of(prompter, Backbone(BackboneConfig(name=backbone_folder(kind), layers=2)))
    terms = model(prompter.training(np.arange(3), Draws(0)))
    terms.sum().backward()
    around = parts_around(head) | {"hop_tokens.weight"}
    inside = {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    table = {name for name in inside if "word_embeddings" in name or "embed_tokens" in name or "shared" in name}
    assert len(table) == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in inside if "lora_" in name}
    assert bool(adapters) == (tuning == "lora")
    assert trained == around | {"full": inside - table, "lora": adapters, "frozen": set()}[tuning]
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-9}
    # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding.
    biases = {name for name in trained if name.endswith("key.bias")}
    assert reached | biases == trained
    assert model.lr_shares == {"backbone.": 0.5 if tuning == "lora" else 0.25}


# ---- dropout


@pytest.mark.parametrize("rates", [{"dropout": 0.4}, {"layer_dropout": 0.4}], ids=["around", "inside"])
def test_dropout_falls_on_training_prompts_and_does_not_depend_on_the_batch(rates, backbone):
    prompter = hop_prompts(random_rows(2, fewest=2), **rates)
    model = model_of(prompter, backbone)
    users = np.arange(14)
    batch = prompter.training(users, Draws(1))
    parts = [prompter.training(users[part], Draws(1)) for part in (slice(3), slice(3, 4), slice(4, 14))]
    with torch.no_grad():
        together = model(batch)[0]
        torch.testing.assert_close(sum(model(part)[0] for part in parts), together, rtol=1e-5, atol=1e-4)
        assert abs(together - model(replace(batch, dropout_keys=None))[0]) > 1e-2
        assert abs(together - model(replace(batch, dropout_keys=batch.dropout_keys + 1))[0]) > 1e-2
        histories = CSR.from_lists([[3, 5], [2]])
        asked = prompter.recommending(users[:2], histories)
        undropped = hop_prompts(random_rows(2, fewest=2))
        undropped.tables = prompter.tables
        plain = undropped.recommending(users[:2], histories)
        assert torch.equal(model.slot_logits(asked), model.slot_logits(plain))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_falls_on_half_as_many_entries_of_the_node_tokens(rate, backbone):
    prompter = hop_prompts(CSR.from_lists([list(range(12))] * 60), dropout=rate)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(60), Draws(3))
    is_node = batch.symbols.ge(prompter.symbols.first_item) & batch.symbols.lt(prompter.symbols.first_slot)
    with torch.no_grad():
        plain, dropped = (model.embed(one).padded() for one in (replace(batch, dropout_keys=None), batch))
    assert torch.equal(plain[~is_node], dropped[~is_node])
    # Prompts of the same item are dropped alike: fewer independent entries than there are.
    zero = dropped[:60][is_node[:60]] == 0
    assert abs(float(zero.float().mean()) - rate / 2) < 5 * np.sqrt(0.16 / zero.numel()) + 1e-9
    kept = dropped[is_node] != 0
    torch.testing.assert_close(dropped[is_node][kept], plain[is_node][kept] / (1 - rate / 2))


# ---- what else may happen


def test_prompts_without_targets_have_a_loss_that_can_be_stepped(backbone):
    prompter = hop_prompts([[3, 3], [3, 3, 3]])
    model = model_of(prompter, backbone)
    terms = model(prompter.training(np.arange(2), Draws(0)))
    terms.sum().backward()
    assert terms[0] == 0
    assert model.item_projector.rows.free.grad.isfinite().all()


def test_node_embeddings_are_scaled_and_stay_out_of_the_saved_weights(backbone):
    model = model_of(hop_prompts([[3, 5]] * 50), backbone)
    assert torch.allclose(model.item_texts.mean(0), torch.zeros(8), atol=1e-5)
    assert not any("nodes" in name or name == "item_texts" for name in model.state_dict())


def test_a_share_of_the_users_is_contrasted_and_does_not_depend_on_the_batch():
    train = random_rows(3, fewest=2)
    prompter = hop_prompts(train, contrast={"users": 0.4, "items": 0.3})
    users = np.arange(14)
    batch = prompter.training(users, Draws(6))
    contrasted = batch.hops[:14, 2] >= 0
    assert 0 < contrasted.sum() < 14
    assert batch.anchors == (int(contrasted.sum()), int(contrasted.sum()), len(batch.nodes) - 14)
    parts = [prompter.training(users[part], Draws(6)) for part in (slice(5), slice(5, 14))]
    assert torch.cat([part.hops[: part.num_users, 2] >= 0 for part in parts]).equal(contrasted)
    others = prompter.training(users, Draws(7)).hops[:14, 2] >= 0
    assert not others.equal(contrasted)
    every = rows(hop_prompts(train, contrast={"users": 1.0, "items": 0.3}).training(users, Draws(6)))
    for row, symbols in enumerate(rows(batch)[:14]):
        # Without the two-hop segment a prompt is the same up to there.
        assert symbols == every[row][: len(symbols)]
        assert (len(symbols) == len(every[row])) == bool(contrasted[row])


def test_representations_are_the_hidden_states_of_the_task_tokens(backbone):
    prompter = hop_prompts(TRAIN)
    model = model_of(prompter, backbone)
    batch = prompter.training(np.arange(3), Draws(0))
    with torch.no_grad():
        found, hidden = model.representations(batch), model.hidden(batch).padded()
    for row, columns in enumerate(in_row(batch, batch.hops)):
        torch.testing.assert_close(found[row], hidden[row, columns])
