import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.graph.cache import cache_key, load_or_pretrain
from raygrec.graph.lightgcn import LightGCNConfig

TRAIN = CSR.from_lists([[0, 1], [1, 2], [3]])
VALID = CSR.from_lists([[2], [0], [1]])
CONFIG = LightGCNConfig(dim=4, layers=1, epochs=2, evaluate_every=1)


def test_second_call_reads_the_file(tmp_path):
    first = load_or_pretrain(TRAIN, VALID, 4, CONFIG, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    second = load_or_pretrain(TRAIN, VALID, 4, CONFIG, 0, tmp_path)
    assert torch.equal(first.users, second.users)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "change",
    [
        {"train": CSR.from_lists([[0, 1], [1, 3], [3]])},
        {"train": CSR.from_lists([[0], [1, 1, 2], [3]])},
        {"valid": None},
        {"num_items": 5},
        {"config": CONFIG.model_copy(update={"l2": 0.5})},
        {"seed": 1},
    ],
)
def test_key_follows_everything_the_embeddings_depend_on(change):
    inputs = {"train": TRAIN, "valid": VALID, "num_items": 4, "config": CONFIG, "seed": 0}
    assert cache_key(**inputs) == cache_key(**inputs)
    assert cache_key(**inputs) != cache_key(**(inputs | change))
