import os
from pathlib import Path

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.evaluate.baselines import GraphModel, GraphPrompts, lightgcn_scores, popularity, popularity_scores
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.graph.lightgcn import node_embeddings, normalized_adjacency


def test_popularity_counts_training_interactions():
    scores = popularity_scores(popularity(CSR.from_lists([[0, 2], [2], [2, 0]]), 4))(np.array([1, 0]))
    assert scores.tolist() == [[2, 0, 3, 0]] * 2


def test_lightgcn_scores_with_and_without_histories():
    train = CSR.from_lists([[0, 1], [1, 2], [3]])
    ego = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    embeddings = node_embeddings(normalized_adjacency(train, 4), ego, 2, 3)
    users = np.array([2, 0])
    expected = embeddings.users[[2, 0]] @ embeddings.items.T
    torch.testing.assert_close(lightgcn_scores(embeddings)(users), expected)
    torch.testing.assert_close(lightgcn_scores(embeddings, train)(users), expected)
    longer = CSR.from_lists([[0, 1, 3], [1, 2], [3]])
    changed = lightgcn_scores(embeddings, longer)(users)
    torch.testing.assert_close(changed[0], expected[0])
    assert not torch.allclose(changed[1], expected[1])


def test_popular_items_rank_for_users_without_a_history():
    train, counts = CSR.from_lists([[0, 1], [1, 2], []]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    ego = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    embeddings = node_embeddings(normalized_adjacency(train, 4), ego, 2, 3)
    shown = CSR.from_lists([[0, 1], [], [3]])  # the third has one since training
    users = np.array([1, 2, 0])
    found = lightgcn_scores(embeddings, shown, popularity(train, 4))(users)
    assert torch.equal(found[0], counts)
    torch.testing.assert_close(found[1:], lightgcn_scores(embeddings, shown)(users)[1:])


def test_the_graph_model_is_lightgcn_on_what_its_prompts_show():
    train, longer = CSR.from_lists([[0, 1], [1, 2], [3], []]), CSR.from_lists([[0, 1, 3], [1, 2], [3, 0], []])
    ego = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    embeddings = node_embeddings(normalized_adjacency(train, 4), ego, 2, 4)
    prompter = GraphPrompts(4, train)
    users = np.array([2, 0, 3, 1])
    counts = popularity(train, 4)
    model = GraphModel(prompter.symbols, embeddings, counts)
    found = model.slot_logits(prompter.recommending(users, longer.take(users)))
    torch.testing.assert_close(found[:, 0], lightgcn_scores(embeddings, longer, counts)(users))


@pytest.mark.data
@pytest.mark.skipif("RAYGREC_DATA" not in os.environ, reason="RAYGREC_DATA is not set")
def test_popularity_on_beauty_matches_a_count_of_ranks():
    lines = (Path(os.environ["RAYGREC_DATA"]) / "amazon_beauty" / "sequences.txt").read_text().splitlines()
    sequences = [np.array(line.split()[1:], dtype=np.int64) - 1 for line in lines[:2000]]
    num_items = int(max(sequence.max() for sequence in sequences)) + 1
    history = CSR.from_lists([sequence[:-1] for sequence in sequences])
    targets = CSR.from_lists([sequence[-1:] for sequence in sequences])
    users = np.arange(len(sequences))
    sums = evaluate_scores(popularity_scores(popularity(history, num_items)), users, targets, [history], num_items)

    counts = np.bincount(history.indices, minlength=num_items).astype(float)
    chances = []
    for user in users:
        masked = counts.copy()
        masked[history[user]] = -1
        score = masked[targets[user][0]]
        above, level = (masked > score).sum(), (masked == score).sum()
        chances.append(0.0 if score < 0 else np.clip((10 - above) / level, 0, 1))
    spread = np.sqrt(sum(chance * (1 - chance) for chance in chances)) / len(users)
    assert abs(sums.result()["hit@10"] - np.mean(chances)) <= 4 * spread + 1e-9
