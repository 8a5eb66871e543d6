"""Profile and prediction text of a history: the most telling terms, or what a causal LM says of it.

GLTA lets the language model write both texts from the descriptions of a user's items. An encoder cannot
write; for it [ours] they are extracted, TF-IDF-like. Only the history that a prompt shows is ever read, so
a training target cannot reach its own prompt through these texts.
"""

import numpy as np

from raygrec.data.arrays import CSR


def inverse_frequency(item_terms: CSR, num_terms: int) -> np.ndarray:
    """[terms] float32: ln(|I| / items that carry the term); 0 for a term of one item: it tells no taste."""
    carriers = np.bincount(np.asarray(item_terms.indices), minlength=num_terms)
    weight = np.log(max(len(item_terms), 1) / np.maximum(carriers, 1)).astype(np.float32)
    weight[carriers < 2] = 0
    return weight


def telling_terms(
    histories: CSR, item_terms: CSR, term_weight: np.ndarray, profile: int, prediction: int, decay: float
) -> tuple[CSR, CSR]:
    """The `profile` terms that sum up each history and the `prediction` terms that point past it.

    A term scores Σ over the history's items of its inverse frequency. Prediction terms are scored alike, with
    an item's weight falling by `decay` per step back from the newest (1: no order), and are no profile terms.
    Returns two CSRs of term numbers, best first, one row per history.
    """
    age = histories.indptr[histories.rows + 1] - 1 - np.arange(len(histories.indices))
    recency = np.power(decay, age)
    carried = item_terms.take(np.asarray(histories.indices))
    rows = histories.rows[carried.rows]
    pairs, inverse = np.unique(rows * len(term_weight) + carried.indices, return_inverse=True)
    rows, terms = pairs // len(term_weight), pairs % len(term_weight)
    once = term_weight[carried.indices]
    summary = np.bincount(inverse, weights=once, minlength=len(pairs))
    recent = np.bincount(inverse, weights=once * recency[carried.rows], minlength=len(pairs))
    chosen = _best_per_row(rows, summary, profile)
    profile_terms = CSR.from_pairs(rows[chosen], terms[chosen], len(histories))
    recent[chosen] = 0
    later = _best_per_row(rows, recent, prediction)
    return profile_terms, CSR.from_pairs(rows[later], terms[later], len(histories))


def _best_per_row(rows: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of each row's `count` largest positive scores, all best ones first; equal ones keep the given order.

    rows: ascending.
    """
    sizes = np.bincount(rows)
    starts, sizes = (np.cumsum(sizes) - sizes)[sizes > 0], sizes[sizes > 0]
    scores, found = scores.copy(), [np.zeros(0, dtype=np.int64)]
    for _ in range(count if len(rows) else 0):  # a few passes are a fraction of sorting all
        best = np.repeat(np.maximum.reduceat(scores, starts), sizes)
        equal = np.flatnonzero((scores == best) & (best > 0))
        found.append(equal[np.diff(rows[equal], prepend=-1) > 0])
        scores[found[-1]] = 0
    return np.concatenate(found)
