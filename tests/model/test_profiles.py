import math

import numpy as np
import pytest

from raygrec.data.arrays import CSR
from raygrec.model.profiles import inverse_frequency, telling_terms


def test_inverse_frequency_by_hand():
    item_terms = CSR.from_lists([[0, 1], [0], [0, 2], [0, 2]])
    expected = [0, 0, math.log(2), 0]  # all four items; one item; two; none
    np.testing.assert_allclose(inverse_frequency(item_terms, 4), expected, rtol=1e-6)
    assert inverse_frequency(CSR.from_lists([]), 2).tolist() == [0, 0]


def test_telling_terms_by_hand():
    item_terms = CSR.from_lists([[0], [0, 1], [2], [3]])
    weight = np.array([1.0, 1.5, 1.8, 0.0], dtype=np.float32)
    histories = CSR.from_lists([[2, 0, 1], [3], []])
    profile, prediction = telling_terms(histories, item_terms, weight, profile=1, prediction=2, decay=0.5)
    # Sums: term 0 has 1 + 1, term 1 1.5, term 2 1.8. Without term 0, by age: term 1 1.5, term 2 1.8 / 4.
    assert [profile[row].tolist() for row in range(3)] == [[0], [], []]
    assert [prediction[row].tolist() for row in range(3)] == [[1, 2], [], []]


def reference(history, item_terms, weight, profile, prediction, decay):
    summary, recent = {}, {}
    for place, item in enumerate(history):
        for term in item_terms[item]:
            summary[term] = summary.get(term, 0.0) + float(weight[term])
            recent[term] = recent.get(term, 0.0) + float(weight[term]) * decay ** (len(history) - 1 - place)
    best = sorted((term for term in summary if summary[term] > 0), key=lambda t: (-summary[t], t))[:profile]
    later = [term for term in recent if term not in best and recent[term] > 0]
    return best, sorted(later, key=lambda t: (-recent[t], t))[:prediction]


@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_telling_terms_against_a_slow_reference(seed, decay):
    rng = np.random.default_rng(seed)
    terms, items = 25, 40
    item_terms = CSR.from_lists([rng.permutation(terms)[: rng.integers(0, 6)] for _ in range(items)])
    # Coarse weights make ties common; a history may hold an item twice.
    weight = (rng.integers(0, 4, terms) / 2).astype(np.float32)
    histories = CSR.from_lists([rng.integers(0, items, rng.integers(0, 12)) for _ in range(60)])
    profile, prediction = telling_terms(histories, item_terms, weight, 3, 4, decay)
    for row in range(len(histories)):
        expected = reference(histories[row].tolist(), item_terms, weight, 3, 4, decay)
        assert (profile[row].tolist(), prediction[row].tolist()) == expected


def test_the_terms_of_a_history_do_not_depend_on_the_others():
    rng = np.random.default_rng(5)
    item_terms = CSR.from_lists([rng.permutation(9)[:3] for _ in range(20)])
    weight = rng.random(9).astype(np.float32)
    histories = CSR.from_lists([rng.permutation(20)[: rng.integers(1, 8)] for _ in range(10)])
    together = telling_terms(histories, item_terms, weight, 2, 2, 0.6)
    for row in range(10):
        alone = telling_terms(histories.take(np.array([row])), item_terms, weight, 2, 2, 0.6)
        for one, many in zip(alone, together, strict=True):
            assert one[0].tolist() == many[row].tolist()
