import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from raygrec.cluster.sweep_folder import Outcome, Report, SweepFolder
from raygrec.config import read_yaml
from raygrec.errors import InputError
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from raygrec.train.settings import run_config
from tests.cluster.test_launcher import wait_for
from tests.train.workers import tiny_sequential_config

psutil = pytest.importorskip("psutil")
for library in ("ray", "optuna", "plotly", "matplotlib"):
    pytest.importorskip(library)
pytestmark = pytest.mark.cluster
GOOD, BROKEN, IDLE = 0.01, 1e30, 1e-9  # learning rates: one that learns, one that overflows, one that does nothing


@pytest.fixture
def space(tiny_store, tiny_backbone, tmp_path) -> Path:
    """Three trials, one after another: one ends well, one fails, one is pruned."""
    job = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", cluster={"workers": 1})
    (tmp_path / "job.yaml").write_text(job.model_dump_json())  # JSON is YAML
    content = {
        "job": str(tmp_path / "job.yaml"),
        "out": str(tmp_path / "sweep"),
        "space": {"train.lr": {"choice": [GOOD, BROKEN, IDLE]}},
        "metric": "ndcg@3",
        "searcher": {"name": "grid"},
        "scheduler": {"name": "asha", "grace": 2, "reduction": 2},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "space.yaml"


def started(space: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "raygrec.cli", "tune", str(space), *options, "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAYGREC_QUIET": "0"},
    )


def statuses(folder: SweepFolder) -> list[str]:
    return [outcome.status for outcome, _ in folder.trials()]


def test_a_sweep_whose_driver_is_killed_goes_on_and_accounts_for_every_trial(space):
    folder = SweepFolder(space.parent / "sweep")
    process = started(space)
    # The first has ended well, the second has failed, the third is on its way.
    wait_for(lambda: statuses(folder) == ["finished", "failed", "running"] or process.poll() is not None, 900)
    # Ray's own agents take a minute to notice; what trains goes with the driver.
    below = [one for one in psutil.Process(process.pid).children(recursive=True) if "Agent" not in one.name()]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below), 200)
    first = next(place for _, place in folder.trials())
    metrics_file = first.run(0) / "metrics.json"
    written = metrics_file.stat().st_mtime_ns
    process = started(space, "--resume", "--final-seeds", "1")
    output, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    result = json.loads(output)
    trials = pd.read_parquet(folder.path / "trials.parquet")
    assert trials["status"].tolist() == ["finished", "failed", "pruned"], error
    assert {name: result[name] for name in ("trials", "finished", "failed", "pruned")} == {
        "trials": 3,
        "finished": 1,
        "failed": 1,
        "pruned": 1,
    }
    assert result["left_groups"] == 0
    assert metrics_file.stat().st_mtime_ns == written, "a finished trial was run again"
    assert "the loss is" in trials["reason"][1]
    log = list(folder.trials())[1][1].run(0) / "ray" / "failure.log"
    assert trials["reason"][1].endswith(str(log)) and "Traceback" in log.read_text()
    assert not list(folder.path.rglob("*.pkl"))
    # A trial is the run that its config describes; no trial has read the test set.
    best = run_config(read_yaml(folder.best_file), "best.yaml")
    assert best.evaluate.test and best.train.lr == result["best"]["point"]["train.lr"]
    alone = train_here(best.model_copy(update={"out": space.parent / "alone"}))
    assert result["best"]["score"] == pytest.approx(alone["valid"]["ndcg@3"], abs=1e-6)
    assert result["best"]["score"] == trials["score"][0]
    assert result["final"][best.name]["test"][0] == pytest.approx(alone["test"], abs=1e-6)
    for place in (place for _, place in folder.trials()):
        metrics = RunFolder(place.run(0)).metrics()
        assert metrics is None or "test" not in metrics
    assert Path(result["report"]).stat().st_size > 10_000


def test_an_interrupted_sweep_chooses_nothing(local_ray, space):
    import ray

    from raygrec.cluster.launcher import DRIVER
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import run_sweep

    taken = ray.util.placement_group([{DRIVER: 1}])  # so that the first trial waits
    ray.get(taken.ready())
    sweep = read_sweep(space, [])
    folder = SweepFolder(sweep.out)

    def interrupt() -> None:
        wait_for(lambda: any(folder.tune.glob("experiment_state-*")), 100)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep)
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
        ray.util.remove_placement_group(taken)
    assert statuses(folder) == [] and not folder.best_file.exists()


def test_a_failure_that_need_not_recur_is_tried_again_and_no_other(local_ray, space):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import _anywhere, run_sweep

    content = yaml.safe_load(space.read_text()) | {"space": {"train.lr": {"choice": [GOOD, BROKEN]}}}
    space.write_text(yaml.safe_dump(content))
    sweep = read_sweep(space, ["scheduler.name=none", "train.epochs=1"])
    folder = SweepFolder(sweep.out)
    folder.start(_anywhere(sweep)[0], resume=False)
    for number, (lr, reason) in enumerate([(GOOD, "the node was lost"), (BROKEN, "the loss is nan")]):
        place = folder.trial({"train.lr": lr})
        place.ended(Outcome(place.path.name, number, {"train.lr": lr}, "failed", reason))
        place.failed(reason, recurs=lr == BROKEN)
    run_sweep(sweep, resume=True)
    trials = pd.read_parquet(folder.path / "trials.parquet")
    assert trials[["status", "reason"]].values.tolist() == [["finished", ""], ["failed", "the loss is nan"]]
    assert not folder.trial({"train.lr": BROKEN}).run(0).exists()


def test_a_sweep_without_room_is_refused_with_the_arithmetic(space, tmp_path):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import run_sweep

    with pytest.raises(InputError, match=r"cluster.workers=1 × 1 GPU = 1 GPU, the cluster has 0"):
        run_sweep(read_sweep(space, ["cluster.gpus_per_worker=1"]))
    assert not (tmp_path / "sweep").exists()  # another try may use it


def test_trials_find_a_relative_store_and_backbone_from_anywhere(space, tiny_store, tiny_backbone, monkeypatch):
    from raygrec.cluster import sweep as sweeps
    from raygrec.cluster.space import read_sweep, trial_config

    monkeypatch.chdir(tiny_backbone.parent)
    there = [f"store={os.path.relpath(tiny_store.path)}", f"backbone.name={tiny_backbone.name}"]
    sweep, example = sweeps._anywhere(read_sweep(space, there))
    trial = trial_config(sweep, {"train.lr": GOOD}, space.parent / "run")
    assert (trial.store, trial.backbone.name) == (tiny_store.path, str(tiny_backbone))
    assert (example.store, example.backbone.name) == (tiny_store.path, str(tiny_backbone))


def test_trials_at_once_are_those_that_drivers_and_nodes_have_room_for(space, monkeypatch):
    from raygrec.cluster import sweep as sweeps
    from raygrec.cluster.space import base_config, read_sweep

    sweep = read_sweep(space, ["concurrency=8", "cluster.workers=2", "cluster.cpus_per_worker=3"])
    example = run_config(base_config(sweep), "job.yaml")
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in (8.0, 7.0, 2.0)]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    there = {"CPU": 17.0, "train_driver": 9.0}
    monkeypatch.setattr(sweeps.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(sweeps.ray, "cluster_resources", lambda: there)
    assert sweeps._fitting(sweep, example) == 2  # 2 + 2 + 0 workers of three CPUs
    there["train_driver"] = 1.0
    assert sweeps._fitting(sweep, example) == 1


def test_a_sweep_that_a_kill_cut_off_as_it_began_can_begin(space, tmp_path):
    from raygrec.cluster.space import read_sweep

    folder = SweepFolder(tmp_path / "sweep")
    folder.path.mkdir()
    for name in ("job.yaml", ".sweep.yaml.host-1.draft", ".lock"):
        (folder.path / name).write_text("half")
    folder.start(read_sweep(space, []), resume=False)
    assert read_yaml(folder.job_file) == read_yaml(tmp_path / "job.yaml")
    (folder.path / "other").mkdir()
    folder.config_file.unlink()
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        folder.start(read_sweep(space, []), resume=False)


def trial_at(folder: SweepFolder, lr: float) -> "Trial":  # noqa: F821
    """Ray Tune's view of a trial, without Ray Tune."""
    from raygrec.cluster.sweep import Trial

    trial = Trial.__new__(Trial)
    trial.sweep, trial.point = folder.config(), {"train.lr": lr}
    trial.place = folder.trial(trial.point)
    trial.place.path.mkdir(parents=True, exist_ok=True)
    return trial


def test_a_trial_ends_with_the_mean_over_its_seeds(space, tmp_path):
    from raygrec.cluster.space import read_sweep, trial_config

    folder = SweepFolder(tmp_path / "sweep")
    sweep = folder.start(read_sweep(space, ["seeds=2", "train.epochs=2"]), resume=False)
    trial = trial_at(folder, GOOD)
    runs = [train_here(trial_config(sweep, trial.point, trial.place.run(seed), seed)) for seed in (0, 1)]
    reports = list(trial._reports())  # the runs have ended, and are read
    assert [(report.epoch, report.seeds) for report in reports] == [(1.0, None), (2.0, None), (2.0, 2)]
    scores = [run["valid"]["ndcg@3"] for run in runs]
    assert scores[0] != scores[1]
    assert (reports[-1].score, reports[-1].spread) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    hits = [run["valid"]["hit@3"] for run in runs]
    assert reports[-1].valid["hit@3"] == pytest.approx(np.mean(hits))
    assert reports[0].score == reports[0].valid["ndcg@3"] <= reports[1].score


def test_a_second_trial_at_a_point_that_was_pruned_or_failed_trains_nothing(space, tmp_path):
    from raygrec.cluster.space import read_sweep

    folder = SweepFolder(tmp_path / "sweep")
    folder.start(read_sweep(space, []), resume=False)
    trial = trial_at(folder, GOOD)
    trial.place.ended(Outcome(trial.place.path.name, 0, trial.point, "pruned"))
    trial.place.report(Report(1.0, 0.5, 0.5, 1.0, {}))
    assert list(trial._reports()) == trial.place.reports()
    trial.place.ended(Outcome(trial.place.path.name, 0, trial.point, "failed", "the loss is nan"))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        list(trial._reports())
    assert not trial.place.run(0).exists()


def test_final_runs_are_those_of_their_trial(space, tmp_path, monkeypatch):
    """A sweep made longer may have another best, whose runs are not the old one's."""
    from raygrec.cluster import sweep as sweeps
    from raygrec.cluster.space import read_sweep, trial_config

    folder = SweepFolder(tmp_path / "sweep")
    sweep = folder.start(read_sweep(space, ["train.epochs=2"]), resume=False)
    monkeypatch.setattr(sweeps, "train_on_ray", lambda config, resume: train_here(config))
    tests = []
    for lr in (GOOD, IDLE, GOOD):
        trial = folder.trial({"train.lr": lr}).path.name
        best = trial_config(sweep, {"train.lr": lr}, folder.path / "best", test=True)
        folder.best_file.write_text(yaml.safe_dump(best.model_dump(mode="json")))
        found = sweeps._final(folder, trial, 1)
        tests.append(found[best.name]["test"][0])
    assert tests[0] == tests[2] != tests[1]
    assert len(list(folder.final.glob("*/seed-0"))) == 2


def test_halving_forgets_nothing_over_a_restart_and_lets_the_last_epoch_end():
    from raygrec.cluster.sweep import Halving, Past

    good = Past("good", [{"epoch": epoch, "score": 0.5} for epoch in (1.0, 2.0, 4.0)])
    bad, late = Past("bad", []), Past("late", [])
    again = Halving([good], epochs=4, mode="max", grace_period=1, reduction_factor=2)  # after a restart of the driver
    for trial in (bad, late):
        again.on_trial_add(None, trial)
    assert again.on_trial_result(None, bad, {"epoch": 1.0, "score": 0.4}) == "STOP"
    assert again.on_trial_result(None, late, {"epoch": 1.0, "score": 0.6}) == "CONTINUE"
    assert again.on_trial_result(None, late, {"epoch": 2.0, "score": 0.6}) == "CONTINUE"
    # Whoever has passed the rungs below the last epoch is left to end by itself.
    assert again.on_trial_result(None, late, {"epoch": 4.0, "score": 0.1}) == "CONTINUE"


def test_hyperband_has_the_same_brackets_after_a_restart():
    from raygrec.cluster.sweep import Halving, Past

    def brackets(past: int) -> list[int]:
        reported = [Past(str(number), [{"epoch": 1.0, "score": 0.5}]) for number in range(past)]
        scheduler = Halving(reported, epochs=10, mode="max", grace_period=1, reduction_factor=2, brackets=3)
        for number in range(past, 200):
            scheduler.on_trial_add(None, Past(str(number), []))
        return [scheduler._brackets.index(scheduler._trial_info[str(number)]) for number in range(past, 200)]

    before = brackets(0)
    assert brackets(25) == before[25:]
    # Rungs at 1, 2, 4, 8; at 2, 4, 8; at 4, 8: the more there are, the more trials a bracket gets.
    assert before.count(0) > before.count(1) > before.count(2) > 0


def test_the_median_counts_trials_from_before_a_restart_and_pauses_none():
    from raygrec.cluster.sweep import Median, Past

    past = [Past(name, [{"epoch": 1.0, "score": score}]) for name, score in (("a", 0.2), ("b", 0.4))]
    again = Median(past, mode="max", grace_period=1)
    third, bad, good = (Past(name, []) for name in ("third", "bad", "good"))
    for trial in (third, bad, good):
        again.on_trial_add(None, trial)
    assert again.on_trial_result(None, third, {"epoch": 1.0, "score": 0.3}) == "CONTINUE"  # two others: too few
    assert again.on_trial_result(None, bad, {"epoch": 1.0, "score": 0.29}) == "STOP"
    assert again.on_trial_result(None, good, {"epoch": 1.0, "score": 0.31}) == "CONTINUE"


def test_optuna_knows_after_a_restart_what_trials_came_to_and_ends_what_was_begun(space, tmp_path):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import _searcher

    overrides = ["searcher.name=optuna", "searcher.startup=3", "trials=6"]
    overrides.append("searcher.first=[{train.lr: 0.001}, {train.lr: 0.004}]")
    content = yaml.safe_load(space.read_text()) | {"space": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}
    space.write_text(yaml.safe_dump(content))
    folder = SweepFolder(tmp_path / "sweep")
    sweep = folder.start(read_sweep(space, overrides), resume=False)
    for number, (lr, status) in enumerate([(0.001, "finished"), (0.002, "failed"), (0.003, "running")]):
        place = folder.trial({"train.lr": lr})
        place.ended(Outcome(place.path.name, number, {"train.lr": lr}, status))
        if status == "finished":
            place.report(Report(1.0, 0.5, 0.5, 1.0, {}))
    searcher = _searcher(sweep, folder)
    study = searcher._ot_study
    assert [(trial.params, trial.value, trial.state.name) for trial in study.get_trials()[:2]] == [
        ({"train.lr": 0.001}, 0.5, "COMPLETE"),
        ({"train.lr": 0.002}, None, "FAIL"),
    ]
    # First what was begun, then the known points that were not tried yet.
    assert [searcher.suggest(name) for name in "ab"] == [{"train.lr": 0.003}, {"train.lr": 0.004}]
    assert searcher.suggest("c") != searcher.suggest("d")


def test_optuna_has_a_second_objective(space, tmp_path):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import _searcher

    content = yaml.safe_load(space.read_text()) | {"space": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}
    space.write_text(yaml.safe_dump(content))
    folder = SweepFolder(tmp_path / "sweep")
    overrides = ["searcher={name: optuna, cost: device_seconds}", "scheduler.name=none"]
    sweep = folder.start(read_sweep(space, overrides), resume=False)
    for number, (lr, score, cost) in enumerate([(0.001, 0.5, 40.0), (0.002, 0.4, 90.0), (0.003, 0.3, 10.0)]):
        place = folder.trial({"train.lr": lr})
        place.ended(Outcome(place.path.name, number, {"train.lr": lr}, "finished"))
        place.report(Report(1.0, score, score, 1.0, {}, device_seconds=cost))
    study = _searcher(sweep, folder)._ot_study
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    # Neither better nor cheaper: the second is no choice.
    assert [trial.params["train.lr"] for trial in study.best_trials] == [0.001, 0.003]


def test_a_budget_ends_the_sweep_and_counts_what_was_spent_before_a_restart(space, tmp_path):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import Spent

    folder = SweepFolder(tmp_path / "sweep")
    folder.start(read_sweep(space, ["budget.device_hours=1"]), resume=False)
    place = folder.trial({"train.lr": GOOD})
    place.ended(Outcome(place.path.name, 0, {"train.lr": GOOD}, "finished"))
    place.report(Report(1.0, 0.1, 0.1, 1500.0, {}, device_seconds=3000.0))
    begun = folder.trial({"train.lr": IDLE})
    begun.ended(Outcome(begun.path.name, 1, {"train.lr": IDLE}, "running"))
    begun.report(Report(1.0, 0.1, 0.1, 200.0, {}, device_seconds=400.0))
    spent = Spent(folder.path)
    assert not spent.stop_all()
    assert not spent("7f_1", {"trial": begun.path.name, "device_seconds": 500})  # goes on: 400 of these are known
    assert not spent.stop_all()
    spent("7f_1", {"trial": begun.path.name, "device_seconds": 600})
    assert spent.stop_all()


def test_a_budget_of_hours_counts_from_the_call(space, tmp_path):
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import Spent

    folder = SweepFolder(tmp_path / "sweep")
    folder.start(read_sweep(space, ["budget.hours=0.001"]), resume=False)
    spent = Spent(folder.path)
    assert not spent.stop_all()
    spent.begun -= 3.7
    assert spent.stop_all()
