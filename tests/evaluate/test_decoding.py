import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate.decoding import ranked_lists
from raygrec.train.assembly import build_model, build_prompts, histories, prepare_run
from raygrec.train.folder import RunFolder
from tests.train.workers import tiny_config

USERS = np.array([3, 0, 17, 40, 5])
SLOTS = 6
DECODINGS = ("first", "slots", "autoregressive")


@pytest.fixture(scope="module")
def untrained(tiny_store, tiny_backbone, tmp_path_factory):
    """A model whose answers are spread out, and its prompts."""
    config = tiny_config(
        tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("decoding") / "run", model={"slots": SLOTS}
    )
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    builder = build_prompts(config, tiny_store, folder)
    model = build_model(config, tiny_store, builder, folder, distributed=False).eval()
    torch.nn.init.normal_(model.head.rows.free)
    return model, builder


@pytest.fixture(scope="module")
def shown(tiny_store) -> CSR:
    return histories(tiny_store, "test").shown.take(USERS)


@torch.no_grad()
def decode(untrained, decoding: str, shown: CSR, k: int) -> list[list[int]]:
    model, builder = untrained
    return ranked_lists(model, builder, decoding, USERS, shown, "test", k, torch.device("cpu")).tolist()


@torch.no_grad()
def slot_logits(untrained, row: int, history: list[int], slots: int) -> np.ndarray:
    """[slots, I] for one user alone."""
    model, builder = untrained
    batch = builder.recommending(USERS[row : row + 1], CSR.from_lists([history]), "test", slots)
    return model.slot_logits(batch)[0].numpy()


def best(logits_I: np.ndarray, taken: list[int]) -> int:
    return max((item for item in range(len(logits_I)) if item not in taken), key=lambda item: logits_I[item])


def test_first_sorts_the_first_slots_logits(untrained, shown):
    for row, found in enumerate(decode(untrained, "first", shown, 4)):
        logits = slot_logits(untrained, row, shown[row].tolist(), 1)[0]
        expected = [item for item in np.argsort(-logits).tolist() if item not in shown[row]]
        assert found == expected[:4]


def test_slots_takes_each_slots_best_item_that_is_left(untrained, shown):
    contested = False
    for row, found in enumerate(decode(untrained, "slots", shown, SLOTS)):
        history = shown[row].tolist()
        logits = slot_logits(untrained, row, history, SLOTS)
        expected: list[int] = []
        for slot in range(SLOTS):
            expected.append(best(logits[slot], history + expected))
            contested |= best(logits[slot], history) != expected[-1]
        assert found == expected
    assert contested  # else the rule about earlier slots was not tested


def test_autoregressive_feeds_each_item_back(untrained, shown):
    for row, found in enumerate(decode(untrained, "autoregressive", shown, 4)):
        history = shown[row].tolist()
        expected: list[int] = []
        for _ in range(4):
            logits = slot_logits(untrained, row, history + expected, 1)[0]
            expected.append(best(logits, history + expected))
        assert found == expected


@pytest.mark.parametrize("decoding", DECODINGS)
def test_no_item_twice_and_none_of_the_history(untrained, shown, decoding):
    for row, found in enumerate(decode(untrained, decoding, shown, SLOTS)):
        assert len(set(found)) == SLOTS
        assert not set(found) & set(shown[row].tolist())


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_list_ends_with_the_catalogue(untrained, decoding):
    almost_all = CSR.from_lists([range(23), range(21), range(22), range(24), range(20)])
    lengths = [sum(item >= 0 for item in found) for found in decode(untrained, decoding, almost_all, SLOTS)]
    assert lengths == [1, 3, 2, 0, 4]


def test_slots_refuses_lists_longer_than_its_slots(untrained, shown):
    with pytest.raises(InputError, match=r"decoding slots: a list of 7 needs as many slots, model.slots is 6"):
        decode(untrained, "slots", shown, 7)
