import html
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raygrec.errors import InputError
from raygrec.evaluate.drawing import Scale, number
from raygrec.evaluate.sweep_figures import (
    Sweep,
    effects,
    importances,
    learning_curves,
    make_key,
    pareto_front,
    running_quantiles,
    score_scale,
    short_names,
)
from raygrec.evaluate.sweeps import best_trial, read_sweep, write_report

ALL = {"learning_curves", "effects", "parallel_coordinates", "importance", "cost"}
HOSTILE = "<script>document.body.id='hacked'</script>"


def made_up(count: int, keys: int = 3, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A sweep in which only `train.lr` matters; every third trial is pruned after epoch 1 of 4, one has failed."""
    draws = np.random.default_rng(seed)
    rate = 10 ** draws.uniform(-5, -2, count)
    top = 0.05 - 0.01 * (np.log10(rate) + 3.5) ** 2
    pruned = np.arange(count) % 3 == 1
    epochs = np.where(pruned, 1.0, 4.0)
    trials = pd.DataFrame(
        {
            "trial": [f"t{at}" for at in range(count)],
            "number": range(count),
            "status": np.where(pruned, "pruned", "finished"),
            "reason": "",
            "score": np.where(pruned, 0.8, 1.0) * top,
            "spread": np.nan,
            "epochs": epochs,
            "seconds": 60 * epochs,
            "device_seconds": 120 * epochs,
            "config.train.lr": rate,
            "config.model.tuning": draws.choice(["full", "lora"], count),
            "config.model.rank": pd.array(draws.choice([4, 8], count), dtype="Int64"),
            **{f"config.other.key{at}": draws.uniform(size=count) for at in range(keys - 3)},
            "valid.recall@10": top * 2,
        }
    )
    trials.loc[trials["config.model.tuning"] == "full", "config.model.rank"] = pd.NA
    if count > 5:
        trials.loc[5, ["status", "reason", "score"]] = ["failed", f"out of memory {HOSTILE}", np.nan]
    reports = [
        {"trial": row.trial, "epoch": epoch, "score": value, "value": value, "seconds": 60 * epoch}
        for row in trials.itertuples()
        for epoch in range(1, int(row.epochs) + 1)
        if math.isfinite(value := row.score * epoch / row.epochs)
    ]
    return trials, pd.DataFrame(reports, columns=["trial", "epoch", "score", "value", "seconds"])


def saved(folder: Path, trials: pd.DataFrame, reports: pd.DataFrame) -> Path:
    trials.to_parquet(folder / "trials.parquet")
    reports.to_parquet(folder / "reports.parquet")
    return folder


def report_of(folder: Path, trials: pd.DataFrame, reports: pd.DataFrame, mode: str = "max") -> tuple[str, set[str]]:
    """The page without plotly's own source, and the names of the pictures."""
    page = write_report(saved(folder, trials, reports), "ndcg@10", mode, "A & B").read_text(encoding="utf-8")
    return page[page.index("<body>") :], {file.stem for file in (folder / "figures").iterdir()}


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]*>", " ", page, flags=re.S)))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Folder, page and pictures of 24 trials."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, *report_of(folder, *made_up(24))


def test_page_names_the_counts_the_best_and_its_config(usual):
    folder, page, pictures = usual
    trials = pd.read_parquet(folder / "trials.parquet")
    best = trials.loc[trials["score"].where(trials["status"] == "finished").idxmax()]
    text = words_of(page)
    assert "A & B" in text and "24 trials 15 finished 8 pruned 1 failed" in text
    assert f"best ndcg@10 (highest), trial {best['number']}" in text and f"{best['score']:.5f}" in text
    assert f"train.lr={number(best['config.train.lr'])}" in text
    # 16 trials that went 4 epochs and 8 that went 1, at 60 s an epoch on 2 workers
    assert "72 min wall" in text and "2.4 h device" in text
    assert pictures == ALL
    assert all((folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_page_fetches_nothing_and_holds_plotly_once(usual):
    page = (usual[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("* plotly.js v") == 1
    assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=.(?!data:)", page.replace(_plotly_source(), ""))
    assert "default-src 'none'" in page
    assert set(re.findall(r'<div id="(\w+)" class="plotly-graph-div"', page)) == ALL


def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_top_table_holds_the_ten_best_finished_first(usual):
    folder, page, _ = usual
    trials = pd.read_parquet(folder / "trials.parquet")
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    numbers = [int(at) for at in re.findall(r'<tr class="\w*"><td data-value="(\d+)"', body)]
    finished = trials[trials["status"] == "finished"].sort_values("score", ascending=False)
    assert numbers == finished["number"].head(10).tolist()


def test_texts_of_others_are_escaped(tmp_path):
    trials, reports = made_up(12)
    trials["config.model.tuning"] = f"a{HOSTILE}"
    trials.loc[0, "config.model.tuning"] = f"b$_x {HOSTILE}"
    trials[f"config.key{HOSTILE}"] = trials["number"] % 2
    folder = saved(tmp_path, trials, reports)
    page = write_report(folder, f"ndcg{HOSTILE}", "max", f"Title {HOSTILE}").read_text(encoding="utf-8")
    assert "hacked" in page and HOSTILE not in page and "<script>document.body" not in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH: no browser to open the page in")
def test_page_renders_in_a_browser(usual, tmp_path):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=8000 --dump-dom"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path}", (usual[0] / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    dom = done.stdout[done.stdout.index("<body") :]
    assert not re.search(r"CONSOLE.*", done.stderr), done.stderr
    parts = re.split(r'<div id="(\w+)" class="plotly-graph-div', dom)
    drawn = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(drawn) == ALL
    assert all(part.count('class="main-svg"') >= 2 for part in drawn.values())
    # one path a trial with reports, and one a trial with a score: plotly drew the data, not only its frame
    assert drawn["learning_curves"].count('class="js-line"') == 23
    assert "hacked" not in re.search(r"<body[^>]*>", dom).group()


def test_one_trial(tmp_path):
    page, pictures = report_of(tmp_path, *made_up(1))
    assert pictures == {"learning_curves", "cost"}
    assert "no key took more than one value" in words_of(page)


def test_all_failed(tmp_path):
    trials, reports = made_up(6)
    trials[["status", "score", "reason"]] = ["failed", np.nan, None]
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "cost.png").write_bytes(b"of an earlier report")
    page, pictures = report_of(tmp_path, trials, reports.head(0))
    assert "No trial has a score; all of them failed." in words_of(page) and not pictures
    assert "0, 1, 2, 3, 4, 5 no reason given" in words_of(page)


def test_no_trials(tmp_path):
    trials, reports = made_up(1)
    page, pictures = report_of(tmp_path, trials.head(0), reports.head(0))
    assert "There are no trials." in words_of(page) and not pictures


def test_scores_that_are_not_finite_and_times_that_are_missing(tmp_path):
    trials, reports = made_up(14)
    trials.loc[[0, 2], "score"] = [np.nan, np.inf]
    trials.loc[3, ["seconds", "epochs"]] = np.nan
    reports.loc[reports["trial"] == "t3", "value"] = np.nan
    page, pictures = report_of(tmp_path, trials, reports)
    assert pictures == ALL and "nan" not in words_of(page).lower()
    assert best_trial(read_sweep(tmp_path, "m", "max").trials, "max")["trial"] not in ("t0", "t2")


def test_200_trials_of_12_keys_stay_small(tmp_path):
    page, pictures = report_of(tmp_path, *made_up(200, keys=12))
    assert pictures == ALL and (tmp_path / "report.html").stat().st_size < 8e6
    assert page.count("key8") > 2  # the last key is drawn too


def test_best_trial():
    trials, _ = made_up(12)
    trials["score"] = np.arange(12.0)
    trials.loc[5, "score"] = np.nan
    # 10 is pruned (10 % 3 == 1): it comes after all that finished
    assert best_trial(trials, "max")["number"] == 11 and best_trial(trials.head(11), "max")["number"] == 9
    assert best_trial(trials, "min")["number"] == 0
    assert best_trial(trials[trials["status"] == "pruned"], "min")["number"] == 1
    assert best_trial(trials.loc[[5]], "max") is None
    assert best_trial(trials.assign(score=1.0).iloc[::-1], "max")["number"] == 0


def test_wrong_input_is_named(tmp_path, monkeypatch):
    trials, reports = made_up(2)
    with pytest.raises(InputError, match=r"mode: 'up'.*max or min"):
        write_report(tmp_path, "m", "up", "t")
    with pytest.raises(InputError, match=r"trials\.parquet: cannot be read"):
        write_report(tmp_path, "m", "max", "t")
    for wrong, message in (
        (trials.drop(columns="status"), "column 'status' is missing"),
        (trials.assign(status="done"), "status 'done' is unknown; it is finished"),
        (trials.assign(trial="t0"), "trial 't0' stands there twice"),
        (trials.assign(score="good"), "column 'score' holds something that is not a number"),
    ):
        with pytest.raises(InputError, match=rf"trials\.parquet: {message}"):
            write_report(saved(tmp_path, wrong, reports), "m", "max", "t")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r'plotly: pip install "raygrec\[tune\]"$'):
        write_report(tmp_path, "m", "max", "t")


def test_modules_load_without_the_extra_and_without_ray():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['ray', 'optuna', 'plotly', 'matplotlib', 'torch'])); "
    subprocess.run([sys.executable, "-c", blocked + "import raygrec.evaluate.sweeps"], check=True, timeout=60)


def test_names_are_short_where_that_is_unambiguous():
    assert short_names(["model.tau", "train.lr", "graph.lr", "seed"]) == ["tau", "train.lr", "graph.lr", "seed"]
    assert short_names(["a.b.x", "c.b.x", "x"]) == ["a.b.x", "c.b.x", "x"]


@pytest.mark.parametrize(
    ("values", "kind", "categories"),
    [
        ([1024, 0, 4096, None], "categories", (0.0, 1024.0, 4096.0)),
        (["16", "4", "8"], "categories", ("4", "8", "16")),
        ([True, None, False], "categories", ("false", "true")),
        ([0.5, 0.5, 0.5], "categories", (0.5,)),
        ([0.1, 0.2, 0.1, 0.2], "categories", (0.1, 0.2)),
        ([1e-4, 1e-3, 1e-2, 2e-2], "log", ()),
        ([0.01, 0.4, 0.5, 0.9], "even", ()),  # spans much, but evenly by difference
        ([0.0, 0.4, 0.5, 0.9], "even", ()),
        ([math.nan, math.inf], "categories", ()),
    ],
)
def test_axis_that_suits_a_key(values, kind, categories):
    key = make_key("config.k", "k", pd.Series(values, dtype=object))
    assert (key.scale.kind, key.scale.categories) == (kind, categories)
    for value in key.values:
        assert value is None or key.scale.low < key.scale.place(value) < key.scale.high


def test_ticks_are_round_and_lie_where_they_say():
    for place, text in Scale.over([0.011, 2.0], log=True).ticks(5):
        assert float(text) == pytest.approx(10**place)
    for place, text in Scale.over([0.0113, 0.0497]).ticks(5):
        assert float(text) == pytest.approx(place)
    assert len(Scale.over([1e-12, 1e12], log=True).ticks(5)) <= 5
    assert Scale.over([0.5]).ticks() and Scale.over([]).ticks()


def test_running_quantiles_equal_numpys_where_all_weigh_the_same():
    x, y = np.zeros(9), np.random.default_rng(0).normal(size=9)
    found = running_quantiles(x, y, np.array([0.0]), 1.0)[:, 0]
    np.testing.assert_allclose(found, np.quantile(y, [0.25, 0.5, 0.75], method="hazen"))
    # far from all points nothing is said; near a cluster only its own points count
    x, y = np.repeat([0.0, 10.0], 9), np.repeat([1.0, 2.0], 9)
    assert running_quantiles(x, y, np.array([0.0, 5.0, 10.0]), 0.5)[1] == pytest.approx([1, math.nan, 2], nan_ok=True)


def test_an_outlier_does_not_squeeze_the_axis():
    bulk = [0.04, 0.041, 0.042, 0.043]
    assert score_scale([*bulk, -7.0], "max").low > 0.03 and score_scale([*bulk, -7.0], "min").low < -7
    assert score_scale([*bulk, 1e9], "min").high < 0.06 and score_scale([*bulk, 1e9], "max").high > 1e9


def test_pareto_front_against_all_pairs():
    draws = np.random.default_rng(1)
    cost, score = draws.integers(1, 9, 40).astype(float), draws.integers(1, 9, 40).astype(float)
    cost[3], score[4] = np.nan, np.nan
    for mode, sign in (("max", 1), ("min", -1)):
        beaten = [
            any(cost[b] <= cost[a] and sign * score[b] >= sign * score[a] and (cost[b], score[b]) != (cost[a], score[a])
                for b in range(40))
            for a in range(40)
        ]  # fmt: skip
        expected = {(cost[a], score[a]) for a in range(40) if not beaten[a] and a not in (3, 4)}
        front = pareto_front(cost, score, mode)
        assert [(cost[a], score[a]) for a in front] == sorted(expected)


def sweep_of(trials: pd.DataFrame, reports: pd.DataFrame, mode: str = "max") -> Sweep:
    return Sweep(trials, reports, "ndcg@10", mode)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_importance_finds_the_key_that_matters(mode):
    trials, reports = made_up(60, keys=5)
    trials["score"] *= 1 if mode == "max" else -1
    found = importances(sweep_of(trials, reports, mode))
    assert next(iter(found)) == "lr" and found["lr"] > 0.4 and sum(found.values()) == pytest.approx(1)


def test_importance_says_why_there_is_none():
    trials, reports = made_up(60)
    assert "here are 8" in importances(sweep_of(*made_up(9)))
    assert "same score" in importances(sweep_of(trials.assign(score=0.5), reports))
    constant = trials.drop(columns=[c for c in trials if c.startswith("config.")]).assign(**{"config.k": 1})
    assert "more than one value" in importances(sweep_of(constant, reports))


def test_curves_mark_how_each_trial_ended():
    trials, reports = made_up(12)
    reports = pd.concat([reports, pd.DataFrame([{"trial": "t5", "epoch": 1, "value": 0.01}])], ignore_index=True)
    marks = learning_curves(sweep_of(trials, reports)).panels[0].marks
    lines, ends = ([mark for mark in marks if type(mark).__name__ == kind] for kind in ("Line", "Points"))
    assert len(lines) == 12 and [line.dashed for line in lines].count(True) == (trials["status"] == "pruned").sum()
    symbols = [end.symbol for end in ends]
    assert (symbols.count("ring"), symbols.count("cross"), symbols.count("dot")) == (4, 1, 7)
    best = best_trial(trials, "max")["score"]
    assert lines[-1].width > lines[0].width and lines[-1].y[-1] == best  # the best comes last, over the others
    assert (ends[-1].x, ends[-1].y) == ([4], [best])


def test_trends_compare_trials_after_as_many_epochs():
    trials, reports = made_up(12)
    sweep = sweep_of(trials, reports)
    assert sweep.shared_epoch == 1  # every third trial was pruned there
    at_one = reports[reports["epoch"] == 1].set_index("trial")["score"]
    expected = [at_one.get(trial, math.nan) for trial in trials["trial"]]
    assert sweep.comparable == pytest.approx(expected, nan_ok=True)
    drawing = effects(sweep)
    assert "after 1 epoch, which all of them reached" in drawing.note
    (tuning,) = (panel for panel in drawing.panels if panel.x.title == "tuning")
    medians = [mark.y[0] for mark in tuning.marks if type(mark).__name__ == "Line"]
    kinds = trials["config.model.tuning"]
    assert medians == pytest.approx([np.nanmedian(np.array(expected)[kinds == kind]) for kind in sorted(set(kinds))])
    trials = trials[trials["status"] == "finished"].reset_index(drop=True)
    ended = sweep_of(trials, reports)
    assert (ended.shared_epoch, ended.comparable) == (None, trials["score"].tolist())


def test_effect_panels_hold_every_trial_with_the_key_set():
    trials, reports = made_up(12)
    panels = {panel.x.title: panel for panel in effects(sweep_of(trials, reports)).panels}
    (rank,) = [title for title in panels if title.startswith("rank")]
    held = trials["config.model.rank"].notna().sum()
    assert rank == f"rank  (set in {held} of 12)" and set(panels) == {"lr", "tuning", rank}
    for title, expected in (("lr", 12), (rank, held)):  # the failed one lies on the edge
        points = [mark for mark in panels[title].marks if type(mark).__name__ == "Points"]
        assert sum(len(mark.x) for mark in points) == expected
