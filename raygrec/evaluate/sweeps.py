"""The report of a hyper-parameter sweep: one page that needs no network, and its figures as PNG.

A sweep folder holds `trials.parquet`, one row a trial, and `reports.parquet`, one row a validation; the columns are
those of `TRIAL_COLUMNS` and `REPORT_COLUMNS`, and one `config.<dotted.key>` per key of the search space.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from raygrec.errors import InputError
from raygrec.evaluate import sweep_figures as figures
from raygrec.evaluate.drawing import Drawing, number, plotly_figure, png, shortened
from raygrec.evaluate.sweep_figures import Key, Sweep
from raygrec.storage import write_whole

TRIAL_COLUMNS = ("trial", "number", "status", "reason", "score", "spread", "epochs", "seconds", "device_seconds")
REPORT_COLUMNS = ("trial", "epoch", "score", "value", "seconds")
STATUSES = ("finished", "pruned", "failed", "unfinished")
TOP = 10
REASONS = 20  # so many different ones are listed

# Nothing is fetched even if a text got through: the page may only run and show what is in it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; max-width: 1300px; margin: 32px auto;
       padding: 0 24px; background: white; }
h1 { font-size: 27px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 2px; }
p { margin: 4px 0; } p.note { color: #5f6670; max-width: 980px; margin-bottom: 10px; } .scroll { overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 18px 0; }
.facts div { font-size: 24px; font-weight: 600; } .facts span { display: block; font-size: 13px; font-weight: 400;
  color: #5f6670; }
.facts .best { color: #D55E00; }
code { font: 13px/1.7 ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f4f6; padding: 2px 6px;
       border-radius: 4px; white-space: nowrap; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin-top: 8px; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e6e9; }
th { cursor: pointer; color: #5f6670; font-weight: 600; border-bottom: 1px solid #5f6670; }
td.words, th.words { text-align: left; } td.long { white-space: normal; min-width: 420px; }
tr.best td { color: #D55E00; font-weight: 600; }
"""

# A click on a heading sorts by that column, a second click the other way; numbers by value, empty cells last.
_SORTING = """
document.querySelectorAll("table.sorted th").forEach((th, at) => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], up = th.dataset.up = th.dataset.up === "1" ? "0" : "1";
  const value = row => row.cells[at].dataset.value;
  [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b), sign = up === "1" ? 1 : -1;
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  }).forEach(row => body.append(row));
}));
"""


def write_report(folder: Path, metric: str, mode: str, title: str) -> Path:
    """Writes `report.html` and `figures/*.png` into a sweep folder and returns the page's path.

    metric: what `score` measures, as `ndcg@10`; mode: `max` or `min`. A figure that the sweep cannot give is replaced
    by a sentence that says why. `InputError` where a table is missing or not as described above, or where the
    packages of the extra `tune` are not installed.
    """
    if mode not in ("max", "min"):
        raise InputError(f"mode: '{mode}' is unknown; it is max or min")
    check_packages()
    sweep = read_sweep(Path(folder), metric, mode)
    drawn = _draw_all(sweep)
    place = Path(folder) / "figures"
    place.mkdir(exist_ok=True)
    for name, (_, drawing) in drawn.items():
        picture = place / f"{name}.png"
        if isinstance(drawing, Drawing):
            write_whole(picture, png(drawing))
        else:
            picture.unlink(missing_ok=True)  # of an earlier report, which this one contradicts
    report = Path(folder) / "report.html"
    write_whole(report, _page(sweep, title, drawn.values()).encode("utf-8", "replace"))
    return report


def best_trial(trials: pd.DataFrame, mode: str) -> pd.Series | None:
    """The row of the best finished trial, of any other with a score where none finished; None without scores.

    Of equal ones the earliest.
    """
    order = figures.ranked(trials, mode)
    return None if order.empty else order.iloc[0]


def read_sweep(folder: Path, metric: str, mode: str) -> Sweep:
    """The two tables of a sweep folder. `InputError` names the file and column that is not as it should be."""
    trials = _read(folder / "trials.parquet", TRIAL_COLUMNS)
    reports = _read(folder / "reports.parquet", REPORT_COLUMNS)
    for column in ("score", "spread", "epochs", "seconds", "device_seconds"):
        trials[column] = _numbers(folder / "trials.parquet", trials[column])
    for column in ("epoch", "score", "value", "seconds"):
        reports[column] = _numbers(folder / "reports.parquet", reports[column])
    for status in set(trials["status"]) - set(STATUSES):
        raise InputError(f"{folder / 'trials.parquet'}: status '{status}' is unknown; it is {', '.join(STATUSES)}")
    if repeated := trials["trial"][trials["trial"].duplicated()].tolist():
        raise InputError(f"{folder / 'trials.parquet'}: trial '{repeated[0]}' stands there twice")
    trials["trial"], reports["trial"] = trials["trial"].astype(str), reports["trial"].astype(str)
    trials["reason"] = [reason if isinstance(reason, str) else "" for reason in trials["reason"]]
    return Sweep(trials.sort_values("number", ignore_index=True), reports, metric, mode)


def _read(file: Path, columns: Iterable[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's complaints are ValueErrors
        raise InputError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    if missing := [column for column in columns if column not in table]:
        raise InputError(f"{file}: column '{missing[0]}' is missing; a sweep's table has {', '.join(columns)}")
    return table


def _numbers(file: Path, series: pd.Series) -> pd.Series:
    """As floats, NaN for all that is not finite."""
    try:
        return pd.to_numeric(series).astype("Float64").astype(float).where(lambda values: np.isfinite(values))
    except (ValueError, TypeError):
        raise InputError(f"{file}: column '{series.name}' holds something that is not a number") from None


def check_packages() -> None:
    """`InputError` that names what the report needs and is not installed; to be asked before a sweep begins."""
    for package in ("matplotlib", "optuna", "plotly"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(f'a sweep\'s report needs the package {package}: pip install "raygrec[tune]"') from None


def _draw_all(sweep: Sweep) -> dict[str, tuple[str, Drawing | str]]:
    """By file name: heading, and the drawing or the words in its place. Keys come in the order of their importance."""
    found = figures.importances(sweep)
    order = list(found) if isinstance(found, dict) else []
    return {
        "learning_curves": ("Learning curves", figures.learning_curves(sweep)),
        "effects": ("Effect of each key", figures.effects(sweep, order)),
        "parallel_coordinates": ("Parallel coordinates", figures.parallel_coordinates(sweep, order)),
        "importance": ("Which keys matter", figures.importance(sweep, found)),
        "cost": ("Cost against quality", figures.cost(sweep)),
    }


def _page(sweep: Sweep, title: str, drawn: Iterable[tuple[str, Drawing | str]]) -> str:
    from plotly.offline import get_plotlyjs

    sections = "\n".join(_section(heading, drawing) for heading, drawing in drawn)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{escape(title)}</h1>
{_header(sweep)}
{_top_table(sweep)}
{sections}
{_failures(sweep)}
<script>{_SORTING}</script>
</body></html>
"""


def _section(heading: str, drawing: Drawing | str) -> str:
    if isinstance(drawing, str):
        return f'<h2>{escape(heading)}</h2>\n<p class="note">{escape(drawing)}</p>'
    plot = plotly_figure(drawing).to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=drawing.name,
        config={"responsive": True, "displayModeBar": False},
    )
    return f'<h2>{escape(drawing.title)}</h2>\n<p class="note">{escape(drawing.note)}</p>\n{plot}'


def _header(sweep: Sweep) -> str:
    trials = sweep.trials
    counts = trials["status"].value_counts().reindex(STATUSES, fill_value=0)
    facts = [(str(len(trials)), "trials")]
    facts += [(str(counts[status]), status) for status in STATUSES if counts[status] or status != "unfinished"]
    facts += [
        (duration(trials["seconds"].sum()), "wall time, summed over trials"),
        (duration(trials["device_seconds"].sum()), "device time (workers × wall)"),
    ]
    cells = "".join(f"<div>{escape(value)}<span>{escape(name)}</span></div>" for value, name in facts)
    best = best_trial(trials, sweep.mode)
    if best is None:
        words = "No trial has a score" + ("; all of them failed." if (trials["status"] == "failed").all() else ".")
        words = "There are no trials." if trials.empty else words
        return f'<div class="facts">{cells}</div><p><b>{words}</b></p>'
    direction = "highest" if sweep.mode == "max" else "lowest"
    cells = (
        f'<div class="best">{escape(_score(best))}<span>best {escape(sweep.metric)} ({direction}), '
        f"trial {best['number']}</span></div>{cells}"
    )
    config = " ".join(f"<code>{escape(text)}</code>" for text in _config(sweep.keys, best.name))
    unfinished = "" if best["status"] == "finished" else f" No trial finished; this one is {escape(best['status'])}."
    others = [
        f"{name.removeprefix('valid.')} {number(best[name])}"
        for name in trials
        if name.startswith("valid.") and name != f"valid.{sweep.metric}" and pd.notna(best[name])
    ]
    also = f"<p>Also on validation: {escape(', '.join(others))}.</p>" if others else ""
    return f'<div class="facts">{cells}</div><p>Best trial:{unfinished} {config}</p>{also}'


def _score(row: pd.Series | dict) -> str:
    """Four digits, and the spread with as many decimals."""
    score, spread = row["score"], row["spread"]
    decimals = 3 - math.floor(math.log10(abs(score))) if 1e-4 <= abs(score) < 1e4 else None
    if decimals is None:
        return number(score) + (f" ± {number(spread)}" if np.isfinite(spread) else "")
    return f"{score:.{decimals}f}" + (f" ± {spread:.{decimals}f}" if np.isfinite(spread) else "")


def _config(keys: Iterable[Key], at: int) -> list[str]:
    """`key=value` as one would write it on the command line, of one trial."""
    return [
        f"{key.column.removeprefix('config.')}={shortened(key.values[at], 60)}"
        for key in keys
        if key.values[at] is not None
    ]


def duration(seconds: float) -> str:
    """`12.3 h`, `14 min` or `35 s`; a dash where it is not known."""
    if not math.isfinite(seconds):
        return "–"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _top_table(sweep: Sweep) -> str:
    top = sweep.ranked.head(TOP)
    if top.empty:
        return ""
    varied = [key for key in sweep.keys if key.varied]
    columns: list[tuple[str, Callable[[dict, int], object], Callable[[dict, int], str]]] = [
        ("trial", lambda row, at: row["number"], lambda row, at: str(row["number"])),
        ("status", lambda row, at: row["status"], lambda row, at: row["status"]),
        (sweep.metric, lambda row, at: row["score"], lambda row, at: _score(row)),
        ("epochs", lambda row, at: row["epochs"], lambda row, at: number(row["epochs"])),
        ("wall", lambda row, at: row["seconds"], lambda row, at: duration(row["seconds"])),
        ("device", lambda row, at: row["device_seconds"], lambda row, at: duration(row["device_seconds"])),
    ]
    for key in varied:
        columns.append(
            (
                key.name,
                lambda row, at, key=key: key.values[at],
                lambda row, at, key=key: shortened(key.values[at], 24),
            )
        )
    head = "".join(f"<th>{escape(name)}</th>" for name, _, _ in columns)
    body = ""
    for index, row in zip(top.index, top.to_dict("records"), strict=True):
        cells = ""
        for _, value, text in columns:
            there = value(row, index)
            empty = there is None or there != there
            sort = "" if empty else escape(str(there))
            cells += f'<td data-value="{sort}">{"–" if empty else escape(text(row, index))}</td>'
        body += f'<tr class="{"best" if row["trial"] == sweep.best else ""}">{cells}</tr>\n'
    fixed = _config([key for key in sweep.keys if not key.varied], top.index[0])
    same = " ".join(f"<code>{escape(text)}</code>" for text in fixed)
    same = f'<p class="note">The same in every trial: {same}</p>' if fixed and len(sweep.trials) > 1 else ""
    heading = f"The best {len(top)} trials" if len(top) > 1 else "The trial"
    how = '<p class="note">Those that finished come first; a click on a heading sorts.</p>' if len(top) > 1 else ""
    return (
        f"<h2>{heading}</h2>{how}"
        f'<div class="scroll"><table class="sorted"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{same}"
    )


def _failures(sweep: Sweep) -> str:
    failed = sweep.trials[sweep.trials["status"] == "failed"]
    if failed.empty:
        return ""
    reasons = failed.groupby("reason", sort=False)["number"].agg(lambda numbers: ", ".join(map(str, numbers)))
    rows = "".join(
        f'<tr><td class="words">{escape(shortened(trials, 60))}</td>'
        f'<td class="words long">{escape(shortened(reason or "no reason given", 300))}</td></tr>\n'
        for reason, trials in reasons.head(REASONS).items()
    )
    more = f'<p class="note">and {len(reasons) - REASONS} more reasons</p>' if len(reasons) > REASONS else ""
    return (
        '<h2>Failed trials</h2><div class="scroll"><table><thead><tr><th class="words">trials</th>'
        f'<th class="words">reason</th></tr></thead><tbody>{rows}</tbody></table></div>{more}'
    )
