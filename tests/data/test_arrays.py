import numpy as np
import pyarrow as pa
import pytest

from raygrec.data.arrays import CSR, Strings, stable_order


@pytest.mark.parametrize("span", [1, 3, 2**31, 2**40, 2**62])
def test_stable_order_is_lexsort(span):
    rng = np.random.default_rng(0)
    last, first = rng.integers(20, size=500).astype(np.int32), rng.integers(-span, span, 500)
    first[::7] = first[0]
    np.testing.assert_array_equal(stable_order(first, last), np.lexsort((first, last)))
    np.testing.assert_array_equal(stable_order(first), np.argsort(first, kind="stable"))


def test_stable_order_of_nothing():
    assert stable_order(np.zeros(0, dtype=np.int32), np.zeros(0)).tolist() == []


def test_transposed_rows_ascend():
    rows = CSR.from_lists([[2, 0], [], [0], [3, 0, 2]])
    assert [rows.transposed(5)[column].tolist() for column in range(5)] == [[0, 2, 3], [], [0, 3], [3], []]


@pytest.mark.parametrize("strings", [["Lamp", "", "Café"], [""], []])
def test_strings_of_arrow(strings):
    whole = pa.array(["before", *strings, "after"], pa.large_string())
    assert list(Strings.from_arrow(whole.slice(1, len(strings)))) == strings
    assert list(Strings.from_arrow(pa.array(strings, pa.large_string()))) == strings
