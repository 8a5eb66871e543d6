from pathlib import Path

import pytest
import torch

from raygrec.errors import InputError
from raygrec.ranks import from_rank_0, sum_over_ranks, world
from tests.ranks import run_ranks


def refuse() -> None:
    raise InputError("no such file")


def worker(rank: int, folder: str) -> None:
    called = []
    chosen = from_rank_0(lambda: called.append(rank) or {"step": 7})
    total = sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64))
    try:
        from_rank_0(refuse)
    except InputError as error:
        said = str(error)
    torch.save((world(), called, chosen, total.tolist(), said), f"{folder}/{rank}.pt")


def test_three_ranks(tmp_path):
    run_ranks(worker, 3, str(tmp_path))
    for rank in range(3):
        found = torch.load(Path(tmp_path) / f"{rank}.pt")
        assert found == ((rank, 3), [0] if rank == 0 else [], {"step": 7}, [3.0, 3.0], "no such file")


def test_a_process_alone_needs_no_group():
    values = torch.tensor([1.0, 2.0])
    assert world() == (0, 1)
    assert sum_over_ranks(values) is values
    assert from_rank_0(lambda: 5) == 5
    with pytest.raises(InputError, match="no such file"):
        from_rank_0(refuse)
