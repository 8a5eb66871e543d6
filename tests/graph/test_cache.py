import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.graph.cache import cache_key, load_or_pretrain
from raygrec.graph.lightgcn import LightGCNConfig

TRAIN = CSR.from_lists([[0, 1], [1, 2], [3]])
VALID = CSR.from_lists([[2], [0], [1]])
CONFIG = LightGCNConfig(dim=4, layers=1, epochs=2, evaluate_every=1)


def test_second_call_reads_the_file(tmp_path):
    config = CONFIG.model_copy(update={"folds": 4})
    first = load_or_pretrain(TRAIN, VALID, 4, config, 0, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    written = path.stat().st_mtime_ns
    second = load_or_pretrain(TRAIN, VALID, 4, config, 0, tmp_path)
    assert torch.equal(first.users, second.users)
    assert torch.equal(first.fold_items, second.fold_items)
    assert first.fold_items.shape == (4, 4, 4)
    assert path.stat().st_mtime_ns == written


def test_without_folds_users_read_the_fit_on_all_edges(tmp_path):
    nodes = load_or_pretrain(TRAIN, VALID, 4, CONFIG, 0, tmp_path)
    assert nodes.item_tables.shape == (1, 4, 4)
    assert nodes.fold_of.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"train": CSR.from_lists([[0, 1], [1, 3], [3]])},
        {"train": CSR.from_lists([[0], [1, 1, 2], [3]])},
        {"valid": None},
        {"num_items": 5},
        {"config": CONFIG.model_copy(update={"l2": 0.5})},
        {"seed": 1},
        {"config": CONFIG.model_copy(update={"text_weight": 0.1})},
        {"config": CONFIG.model_copy(update={"text_weight": 0.1}), "texts": torch.ones(4, 2)},
    ],
)
def test_key_follows_everything_the_embeddings_depend_on(change):
    inputs = {"train": TRAIN, "valid": VALID, "num_items": 4, "config": CONFIG, "seed": 0}
    assert cache_key(**inputs) == cache_key(**inputs)
    assert cache_key(**inputs) != cache_key(**(inputs | change))


def test_texts_that_have_no_weight_are_not_part_of_the_key():
    plain = cache_key(TRAIN, VALID, 4, CONFIG, 0)
    other = CONFIG.model_copy(update={"text_temperature": 0.9})
    assert cache_key(TRAIN, VALID, 4, other, 0, torch.ones(4, 2)) == plain
    weighed = CONFIG.model_copy(update={"text_weight": 0.1})
    keys = {cache_key(TRAIN, VALID, 4, weighed, 0, texts) for texts in (None, torch.ones(4, 2), torch.zeros(4, 2))}
    assert len(keys | {plain}) == 4
