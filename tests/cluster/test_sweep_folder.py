from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from raygrec.cluster.space import SweepConfig, read_sweep
from raygrec.cluster.sweep_folder import Outcome, Report, SweepFolder
from raygrec.config import read_yaml
from raygrec.errors import InputError
from raygrec.evaluate.sweeps import best_trial, write_report
from raygrec.train.settings import run_config

JOB = Path(__file__).parent.parent.parent / "jobs" / "galrec.yaml"
VALID = {"ndcg@10": 0.2, "hit@10": 0.3}


@pytest.fixture
def sweep(tmp_path) -> SweepConfig:
    content = {
        "job": str(JOB),
        "out": str(tmp_path / "sweep"),
        "settings": {"cluster.workers": 3},
        "space": {"train.lr": {"choice": [0.001, 0.002]}, "model.head": {"choice": ["linear", "tied"]}},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(content))
    return read_sweep(tmp_path / "space.yaml", [])


@pytest.fixture
def folder(sweep) -> SweepFolder:
    """One trial that ended with two seeds, one pruned after an epoch of a better score, one that reported nothing."""
    folder = SweepFolder(sweep.out)
    folder.start(sweep, resume=False)
    for number, (status, lr) in enumerate((("finished", 0.001), ("pruned", 0.002), ("running", 0.003))):
        point = {"train.lr": lr} | ({"model.head": "tied"} if number else {})
        place = folder.trial(point)
        place.ended(Outcome(place.path.name, number, point, status))
        if number < 2:
            place.report(Report(1.0, 0.1 + number, 0.1 + number, 10.0, VALID, device_seconds=30.0))
    first = folder.trial({"train.lr": 0.001})
    first.report(Report(2.0, 0.08, 0.1, 20.0, VALID, device_seconds=50.0))
    first.report(Report(2.0, 0.08, 0.12, 50.0, VALID, seeds=2, spread=0.03, device_seconds=110.0))
    return folder


def test_tables_hold_every_trial_in_the_order_of_their_start(folder):
    trials = folder.write_results()
    assert trials["status"].tolist() == ["finished", "pruned", "unfinished"]
    assert trials["number"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(trials["score"], [0.12, 1.1, np.nan])
    assert trials["spread"][0] == 0.03
    # The last report tells how long a trial took in all, and its workers, of which some may have come later.
    assert trials["seconds"].tolist() == [50.0, 10.0, 0.0]
    assert trials["device_seconds"].tolist() == [110.0, 30.0, 0.0]
    assert trials["config.model.head"].isna().tolist() == [True, False, False]
    stored = pd.read_parquet(folder.path / "trials.parquet")
    pd.testing.assert_frame_equal(stored, trials, check_dtype=False)
    reports = pd.read_parquet(folder.path / "reports.parquet")
    # The line with the mean over seeds is no epoch of a curve.
    assert reports[["epoch", "score", "value"]].values.tolist() == [[1, 0.1, 0.1], [2, 0.1, 0.08], [1, 1.1, 1.1]]


def test_the_best_is_a_trial_that_ended_and_trains_as_it_stands(folder):
    folder.write_results()
    best = run_config(read_yaml(folder.best_file), "best.yaml")
    assert best.train.lr == 0.001
    assert best.evaluate.test
    assert best.out == folder.path / "best"
    assert best.cluster.workers == 3


def test_failures_that_need_not_recur_are_open_again(folder):
    for number, recurs in enumerate((True, False, None), 3):  # None: the trial's own process was lost
        point = {"train.lr": number / 1000}
        place = folder.trial(point)
        place.ended(Outcome(place.path.name, number, point, "failed", "why"))
        if recurs is not None:
            place.failed("why", recurs)
    folder.reopen_failed()
    found = [(outcome.status, outcome.reason) for outcome, _ in folder.trials()]
    assert found[:3] == [("finished", ""), ("pruned", ""), ("running", "")]
    assert found[3:] == [("failed", "why"), ("unfinished", "why"), ("unfinished", "why")]


def test_a_folder_is_claimed_once_and_resumed_by_the_same_search_alone(sweep, tmp_path):
    folder = SweepFolder(sweep.out)
    kept = folder.start(sweep, resume=False)
    assert read_yaml(kept.job) == read_yaml(JOB)
    assert folder.config() == kept
    with pytest.raises(InputError, match="holds a sweep already; pass --resume"):
        folder.start(sweep, resume=False)
    folder.start(sweep.model_copy(update={"trials": 99, "concurrency": 4}), resume=True)
    assert folder.config().trials == 99
    with pytest.raises(InputError, match="started with another 'seeds'"):
        folder.start(sweep.model_copy(update={"seeds": 2}), resume=True)
    # Its job is the one it was started with, wherever that lay.
    moved = tmp_path / "moved.yaml"
    moved.write_text(JOB.read_text())
    assert folder.start(sweep.model_copy(update={"job": moved, "trials": 99}), resume=True).job == kept.job
    moved.write_text(JOB.read_text().replace("lr: 0.001", "lr: 0.5"))
    with pytest.raises(InputError, match="started with another 'job'"):
        folder.start(sweep.model_copy(update={"job": moved}), resume=True)
    with folder.held(), pytest.raises(InputError, match="is at work there"), folder.held():
        pass


def test_a_folder_with_something_else_in_it_is_left_alone(sweep):
    sweep.out.mkdir()
    (sweep.out / "thesis.txt").write_text("…")
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        SweepFolder(sweep.out).start(sweep, resume=True)
    assert [file.name for file in sweep.out.iterdir()] == ["thesis.txt"]


def test_a_report_that_was_cut_off_does_not_count(folder):
    place = folder.trial({"train.lr": 0.001})
    with (place.path / "reports.jsonl").open("a") as file:
        file.write('{"epoch": 3.0, "val')
    assert [report.epoch for report in place.reports()] == [1.0, 2.0, 2.0]
    place.report(Report(3.0, 0.1, 0.1, 60.0, VALID))
    assert [report.epoch for report in place.reports()] == [1.0, 2.0, 2.0, 3.0]


def test_a_sweep_whose_trials_all_failed_has_tables_and_a_report(sweep):
    folder = SweepFolder(sweep.out)
    folder.start(sweep, resume=False)
    folder.write_results()  # of no trial at all
    point = {"train.lr": 0.001}
    place = folder.trial(point)
    place.ended(Outcome(place.path.name, 0, point, "failed", "the node was lost"))
    trials = folder.write_results()
    assert best_trial(trials, "max") is None
    assert not folder.best_file.exists()
    page = write_report(folder.path, "ndcg@10", "max", "a sweep").read_text(encoding="utf-8")
    assert "all of them failed" in page
    assert "the node was lost" in page
