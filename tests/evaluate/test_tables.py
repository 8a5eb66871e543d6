import pytest
from rich.console import Console

from raygrec.errors import InputError
from raygrec.evaluate.tables import DEFAULT_METRICS, Row, format_values, markdown_table, terminal_table


def metrics(value: float) -> dict[str, float]:
    return dict.fromkeys(DEFAULT_METRICS, value)


ROWS = [Row("LightGCN", [metrics(0.02)]), Row("GLTA", [metrics(0.03), metrics(0.05)])]


def test_one_seed_has_no_spread_and_more_have_the_sample_standard_deviation():
    assert format_values([0.0242]) == ".0242"
    assert format_values([0.03, 0.05]) == ".0400±.0141"
    assert format_values([1.0]) == "1.0000"


def test_markdown_table():
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == "| method | P@5 | N@5 | H@5 | P@10 | N@10 | H@10 | N@10 ratio | seeds |"
    assert lines[2].startswith("| LightGCN | .0200 |") and lines[2].endswith("| ×1.00 | 1 |")
    assert lines[3].count(".0400±.0141") == 6 and lines[3].endswith("| ×2.00 | 2 |")


def test_no_ratio_without_the_reference_row():
    assert "ratio" not in markdown_table([Row("Popularity", [metrics(0.01)])])


def test_terminal_table_fits_100_columns():
    console = Console(width=100, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(
            terminal_table([*ROWS, Row("GLTA without profile text", [metrics(0.01), metrics(0.02)])], "Beauty")
        )
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count(".0400±.0141") == 6 and "×2.00" in text and "…" not in text


def test_a_missing_metric_names_row_and_metric():
    with pytest.raises(InputError, match=r"'GLTA': 'ndcg@5' is missing"):
        markdown_table([Row("GLTA", [{"precision@5": 0.1}])])
    with pytest.raises(InputError, match="'GLTA'"):
        markdown_table([Row("GLTA", [])])
