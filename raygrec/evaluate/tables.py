"""Result tables for the terminal and for Markdown, in the field's notation (P@5 N@5 H@5 …)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from raygrec.errors import InputError

SHORT_NAMES = {"precision": "P", "ndcg": "N", "hit": "H", "recall": "R", "mrr": "MRR", "coverage": "Cov"}
DEFAULT_METRICS = ("precision@5", "ndcg@5", "hit@5", "precision@10", "ndcg@10", "hit@10")
RATIO_METRIC = "ndcg@10"


@dataclass(frozen=True)
class Row:
    """One method: its name, and one metric dict (as of `MetricSums.result`) per seed."""

    name: str
    seeds: Sequence[dict[str, float]]


def short_name(metric: str) -> str:
    """`ndcg@10` -> `N@10`."""
    name, _, k = metric.partition("@")
    return f"{SHORT_NAMES.get(name, name)}@{k}"


def format_values(values: Sequence[float]) -> str:
    """`.0242`, or mean ± sample standard deviation `.0242±.0003` where there is more than one seed."""
    mean = _short(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean}±{_short(statistics.stdev(values))}"


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def table_cells(
    rows: Sequence[Row], metrics: Sequence[str] = DEFAULT_METRICS, reference: str = "LightGCN"
) -> tuple[list[str], list[list[str]]]:
    """Header and cells; the last column is mean N@10 over that of the row `reference`, where there is one.

    Raises `InputError` for a row without seeds or without one of the metrics.
    """
    for row in rows:
        for metric in metrics:
            if not row.seeds or any(metric not in seed for seed in row.seeds):
                raise InputError(f"table row '{row.name}': '{metric}' is missing")
    base = next((_mean(row, RATIO_METRIC) for row in rows if row.name == reference), 0.0)
    header = ["method", *(short_name(metric) for metric in metrics)]
    cells = [[row.name, *(format_values([seed[metric] for seed in row.seeds]) for metric in metrics)] for row in rows]
    if base:
        header.append(f"{short_name(RATIO_METRIC)} ratio")
        for line, row in zip(cells, rows, strict=True):
            line.append(f"×{_mean(row, RATIO_METRIC) / base:.2f}")
    return header, cells


def _mean(row: Row, metric: str) -> float:
    return statistics.fmean(seed.get(metric, 0.0) for seed in row.seeds)


def terminal_table(
    rows: Sequence[Row],
    title: str = "",
    metrics: Sequence[str] = DEFAULT_METRICS,
    reference: str = "LightGCN",
) -> Table:
    """A rich table that fits 100 columns with six metrics; `title` should say data set and split."""
    header, cells = table_cells(rows, metrics, reference)
    table = Table(title=title or None, box=None, padding=(0, 1, 0, 0), collapse_padding=True)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=bool(column), overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table


def markdown_table(rows: Sequence[Row], metrics: Sequence[str] = DEFAULT_METRICS, reference: str = "LightGCN") -> str:
    """The same table in GitHub's Markdown, with the number of seeds, ending in a newline."""
    header, cells = table_cells(rows, metrics, reference)
    header, cells = [*header, "seeds"], [[*line, str(len(row.seeds))] for line, row in zip(cells, rows, strict=True)]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in line] for line in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
