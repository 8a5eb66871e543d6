from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

pytest.importorskip("ray")
from raygrec.cluster.space import read_sweep
from raygrec.cluster.sweep_folder import Report, SweepFolder
from raygrec.cluster.sweep_view import SweepView

JOB = Path(__file__).parent.parent.parent / "jobs" / "glta.yaml"


@pytest.fixture
def view(tmp_path) -> SweepView:
    content = {
        "job": str(JOB),
        "out": str(tmp_path / "sweep"),
        "space": {"train.lr": {"uniform": [0.1, 1.0]}, "histories.lr": {"uniform": [0.1, 1.0]}},
        "searcher": {"name": "optuna"},
        "scheduler": {"name": "asha"},
        "trials": 9,
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(content))
    sweep = read_sweep(tmp_path / "space.yaml", [])
    SweepFolder(sweep.out).start(sweep, resume=False)
    view = SweepView(sweep.out)
    view.setup()
    return view


def begun(view: SweepView, number: int, **last) -> SimpleNamespace:
    """A trial that has started and, where `last` has a score, reported it."""
    point = {"train.lr": number / 10, "histories.lr": 0.5}
    trial = SimpleNamespace(trial_id=str(number), config={"folder": str(view.path), **point}, last_result=last)
    view.on_trial_start(0, [], trial)
    if "score" in last:
        score = last["score"]
        view.folder.trial(point).report(Report(last["epoch"], score, score, last["seconds"], {"ndcg@10": score}))
    return trial


def test_trials_end_as_their_last_report_says(view):
    ends = [
        {"epoch": 3.0, "score": 0.3, "seconds": 60.0, "complete": True, "done": True},
        {"epoch": 1.0, "score": 0.4, "seconds": 20.0, "complete": False, "done": True},
    ]
    for number, last in enumerate(ends, 1):
        view.on_trial_complete(0, [], begun(view, number, **last))
    begun(view, 3, epoch=2.0, score=0.2, seconds=40.0)
    view.on_trial_error(0, [], begun(view, 4))
    failing = begun(view, 5)
    view._place(failing).failed("the loss is nan", recurs=True)
    view.on_trial_error(0, [], failing)
    view.on_experiment_end([])
    found = [(outcome.number, outcome.status, outcome.reason) for outcome, _ in view.folder.trials()]
    assert found == [
        (0, "finished", ""),
        (1, "pruned", "asha, epoch 1"),
        (2, "unfinished", "the budget was spent"),
        (3, "failed", "the node or process that drove it was lost"),
        (4, "failed", "the loss is nan"),
    ]
    # A sweep that goes on counts from there, and a trial that starts again keeps its number.
    again = SweepView(view.path)
    again.setup()
    begun(again, 3)
    begun(again, 6)
    numbers = {outcome.point["train.lr"]: outcome.number for outcome, _ in view.folder.trials()}
    assert (numbers[0.3], numbers[0.6]) == (2, 5)


def test_the_table_says_how_far_the_sweep_is(view):
    finished = begun(view, 1, epoch=3.0, score=0.3, seconds=60.0, complete=True, done=True)
    view.on_trial_complete(0, [], finished)
    begun(view, 2, epoch=2.0, score=0.25, seconds=125.0, complete=False, done=False)
    begun(view, 3)
    view.begun -= 100  # seconds ago: one trial of nine took as long
    text = StringIO()
    Console(file=text, width=100).print(view._table())
    heading, _, *rows = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert heading == "1/9 trials 2 running, 1 finished, 0 pruned, 0 failed best ndcg@10 0.3000 13:20 left"
    # Two rates: their names keep what tells them apart.
    assert rows == ["1 2 0.2500 02:05 train.lr=0.2 histories.lr=0.5", "2 … … --:-- train.lr=0.3 histories.lr=0.5"]
