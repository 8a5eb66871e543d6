from dataclasses import replace

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.model.head import Cells, Targets
from raygrec.model.prompts import (
    PAD,
    PromptBatch,
    Symbols,
    as_targets,
    expand,
    join_rows,
    padded,
    repeated,
    truncated,
)


def lists(rows: CSR) -> list[list[int]]:
    return [rows[row].tolist() for row in range(len(rows))]


def batch_of(symbols: list[list[int]], segments: list[list[int]]) -> PromptBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return PromptBatch(
        symbols=torch.tensor(symbols),
        segments=torch.tensor(segments),
        slots=torch.zeros(len(symbols), 0, dtype=torch.int64),
        answers=nothing,
        targets=Targets(torch.zeros(1, dtype=torch.int64), nothing, torch.zeros(0)),
        history_indptr=torch.zeros(len(symbols) + 1, dtype=torch.int64),
        history=nothing,
        tables=torch.zeros(len(symbols), dtype=torch.int64),
        user_kept=torch.ones(len(symbols), dtype=torch.bool),
    )


def test_symbols_follow_each_other():
    symbols = Symbols(text=10, items=5, users=3, slots=2)
    assert (symbols.first_item, symbols.first_user, symbols.first_slot) == (10, 15, 18)


def test_join_rows():
    parts = [CSR.from_lists([[1, 2], [], [3]]), CSR.from_lists([[], [4], [5, 6]]), repeated([9], 3)]
    assert lists(join_rows(parts)) == [[1, 2, 9], [4, 9], [3, 5, 6, 9]]
    assert lists(join_rows([CSR.from_lists([[], []])])) == [[], []]


def test_join_rows_keeps_numbers_beyond_32_bits():
    large = CSR(np.array([0, 1]), np.array([2**40]))
    assert lists(join_rows([large, large])) == [[2**40, 2**40]]


def test_repeated():
    assert lists(repeated([7, 8], 2)) == [[7, 8], [7, 8]]
    assert lists(repeated([], 2)) == [[], []]
    assert lists(repeated([7], 0)) == []


def test_expand():
    pieces = CSR.from_lists([[10], [], [20, 21]])
    assert lists(expand(CSR.from_lists([[2, 0], [1], [], [1, 2]]), pieces)) == [
        [20, 21, 10],
        [],
        [],
        [20, 21],
    ]
    assert lists(expand(CSR.from_lists([[], []]), pieces)) == [[], []]


def test_truncated():
    rows = CSR.from_lists([[1, 2, 3], [], [4], [5, 6]])
    assert lists(truncated(rows, 2)) == [[2, 3], [], [4], [5, 6]]
    assert lists(truncated(rows, 2, keep="first")) == [[1, 2], [], [4], [5, 6]]
    assert lists(truncated(rows, 1)) == [[3], [], [4], [6]]


def test_padded():
    rows = CSR.from_lists([[1, 2, 3], [], [4]])
    assert padded(rows).tolist() == [[1, 2, 3], [PAD] * 3, [4, PAD, PAD]]
    assert padded(rows, multiple=4).shape == (3, 4)
    assert padded(CSR.from_lists([[]])).tolist() == [[PAD]]
    assert padded(CSR.from_lists([])).shape[0] == 0


def test_targets_share_the_weight_of_their_position():
    targets = as_targets(np.array([2, 0, 2, 2]), np.array([5, 6, 7, 8]), 3)
    assert targets.indptr.tolist() == [0, 1, 1, 4]
    assert targets.items.tolist() == [6, 5, 7, 8]
    assert targets.weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert targets.rows.tolist() == [0, 2, 2, 2]


def test_attention_by_hand():
    batch = batch_of([[5, 6, 7, 8], [5, 6, PAD, PAD]], [[0, 1, 1, 2], [0, 1, 9, 9]])
    assert batch.attention.int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]],
    ]


def test_every_position_attends_to_something_and_none_to_padding():
    rng = np.random.default_rng(0)
    rows = CSR.from_lists([rng.integers(0, 9, length) for length in (0, 1, 5, 8)])
    symbols = padded(rows)
    segments = np.where(symbols == PAD, PAD, rng.integers(0, 3, symbols.shape))
    attention = batch_of(symbols.tolist(), segments.tolist()).attention
    assert attention.any(dim=2).all()
    others = ~torch.eye(symbols.shape[1], dtype=torch.bool)
    assert not (attention & others & torch.from_numpy(symbols == PAD)[:, None, :]).any()


def test_moving_a_batch_moves_all_of_it():
    still = batch_of([[1, 2]], [[0, 0]])
    unmoved = ("targets", "prefix", "moment", "successors")
    assert still.to("meta").dropout_keys is None
    still.targets.moments = torch.zeros(len(still.targets), dtype=torch.int64)
    cells = Cells(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    moved = replace(still, dropout_keys=torch.zeros(1, dtype=torch.int64), successors=cells).to("meta")
    assert {value.device.type for name, value in vars(moved).items() if name not in unmoved} == {"meta"}
    for part in (moved.targets, moved.successors):
        assert {value.device.type for value in vars(part).values()} == {"meta"}
