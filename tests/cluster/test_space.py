import json
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("optuna")
from raygrec.cluster.space import DomainConfig, first_points, points, read_sweep, suggested, trial_config
from raygrec.errors import InputError

ROOT = Path(__file__).parent.parent.parent
SPACE = {
    "model.tuning": {"choice": ["full", "lora"]},
    "model.lora.rank": {"choice": [4, 8], "when": {"model.tuning": "lora"}},
    "train.lr": {"choice": [0.001, 0.002]},
}


def written(folder: Path, **changed) -> Path:
    content = {"job": str(ROOT / "jobs/galrec.yaml"), "out": str(folder / "sweep"), "space": SPACE, **changed}
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.mark.parametrize("file", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_spaces_that_are_shipped_are_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(file, ["trials=5"])
    assert sweep.trials == 5
    named = points(sweep)
    assert named is None or len(named) == 5


def test_a_grid_has_each_combination_whose_conditions_are_met(tmp_path):
    sweep = read_sweep(written(tmp_path, searcher={"name": "grid"}), [])
    assert points(sweep) == [
        {"model.tuning": "full", "train.lr": 0.001},
        {"model.tuning": "full", "train.lr": 0.002},
        *(
            {"model.tuning": "lora", "model.lora.rank": rank, "train.lr": lr}
            for rank in (4, 8)
            for lr in (0.001, 0.002)
        ),
    ]


def test_a_grid_is_whole_unless_trials_says_otherwise(tmp_path):
    space = {
        "train.lr": {"choice": [0.001 * n for n in range(1, 6)]},
        "model.dropout": {"choice": [0.1, 0.2, 0.3, 0.4, 0.5]},
    }
    file = written(tmp_path, space=space, searcher={"name": "grid"})
    assert len(points(read_sweep(file, []))) == 25
    assert len(points(read_sweep(file, ["trials=7"]))) == 7
    assert len(points(read_sweep(file, ["searcher.name=random"]))) == 20


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(f"job: {ROOT}/jobs/galrec.yaml\nout: {tmp_path}\nspace: {{train.lr: {{choice: [1e-3, 2.5e-3]}}}}\n")
    assert read_sweep(file, ["searcher.first=[{}]"]).space["train.lr"].choice == (0.001, 0.0025)


def test_random_points_are_those_of_the_seed_and_come_once(tmp_path):
    sweeps = [read_sweep(written(tmp_path), [f"searcher.seed={seed}", "trials=6"]) for seed in (0, 0, 1)]
    first, again, other = (points(sweep) for sweep in sweeps)
    assert first == again
    assert first != other
    # The space has six points in all.
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, other))
    assert len(points(read_sweep(written(tmp_path), ["trials=50"]))) == 6


def test_known_points_come_first_with_the_jobs_own_values_where_they_say_nothing(tmp_path):
    settings = {"train.lr": 0.002, "model.lora.rank": 4}
    first = [{}, {"model.tuning": "lora", "train.lr": 0.001}]
    sweep = read_sweep(written(tmp_path, settings=settings, searcher={"first": first}), ["trials=6"])
    expected = [
        {"model.tuning": "full", "train.lr": 0.002},
        {"model.tuning": "lora", "model.lora.rank": 4, "train.lr": 0.001},
    ]
    assert first_points(sweep) == expected
    found = points(sweep)
    assert found[:2] == expected
    assert len({json.dumps(point, sort_keys=True) for point in found}) == len(found) == 6
    assert points(sweep.model_copy(update={"trials": 1})) == expected[:1]


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        ({"choice": ["x", None, 3]}, ["x", None, 3], ["y", 4]),
        ({"uniform": [2, 4]}, [2, 3.3, 4], [1.9, 4.1, "3", True]),
        ({"loguniform": [0.01, 1]}, [0.01, 0.5, 1], [0.009, 0]),
        ({"quniform": [0.1, 0.4, 0.1]}, [0.1, 0.3, 0.4], [0.25, 0.5]),
        ({"randint": [2, 5]}, [2, 4], [5, 1, 2.5]),
    ],
)
def test_what_a_domain_holds(domain, inside, outside):
    held = DomainConfig(**domain)
    assert [held.holds(value) for value in inside] == [True] * len(inside)
    assert [held.holds(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ({"train.lr": 0.5}, r"'train.lr': 0.5 is not in \{'choice': \(0.001, 0.002\)\}"),
        ({"train.rl": 0.001}, r"no key 'train.rl'; .*'train.lr'"),
        ({"model.lora.rank": 4}, r"'model.lora.rank' is searched only where"),
        ({"model.tuning": "lora"}, r"'model.lora.rank': 16, the job's own value, is not in"),
    ],
)
def test_a_first_point_outside_the_space_is_refused(tmp_path, first, said):
    settings = {"model.lora.rank": 16}
    with pytest.raises(InputError, match=said):
        read_sweep(written(tmp_path, settings=settings, searcher={"first": [first]}), [])


def test_a_first_point_has_no_truth_for_a_number_and_no_value_of_a_section_that_the_job_has_not(tmp_path):
    def first(space: dict, point: dict) -> None:
        read_sweep(written(tmp_path, space=space, searcher={"first": [point]}), [])

    with pytest.raises(InputError, match=r"'train.epochs': True is not in"):
        first({"train.epochs": {"choice": [1, 2]}}, {"train.epochs": True})
    steps = {"model.successors.steps": {"choice": [1, 3]}}
    first(steps, {"model.successors.steps": 3})
    with pytest.raises(InputError, match=r"'model.successors.steps': the job has no such section; give it a value"):
        first(steps, {})


def test_draws_keep_to_their_domains_and_spread_over_them():
    random = np.random.default_rng(0)
    drawn = {
        kind: [DomainConfig(**{kind: values}).draw(random) for _ in range(4000)]
        for kind, values in {
            "uniform": (2.0, 4.0),
            "loguniform": (0.01, 1.0),
            "quniform": (0.1, 0.4, 0.1),
            "randint": (2, 5),
        }.items()
    }
    assert np.mean(drawn["uniform"]) == pytest.approx(3, abs=0.05)
    # Half of the draws lie on either side of the geometric mean.
    assert np.mean(np.array(drawn["loguniform"]) < 0.1) == pytest.approx(0.5, abs=0.03)
    assert set(drawn["quniform"]) == {0.1, 0.2, 0.3, 0.4}
    assert set(drawn["randint"]) == {2, 3, 4}
    assert min(drawn["uniform"]) >= 2 and max(drawn["uniform"]) <= 4


def test_optuna_draws_from_the_same_domains():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    domains = {
        "a": DomainConfig(choice=("x", None, 3)),
        "b": DomainConfig(quniform=(0.1, 0.4, 0.1), when={"a": ("x", 3)}),
        "c": DomainConfig(randint=(2, 4)),
        "d": DomainConfig(loguniform=(0.01, 1)),
        "e": DomainConfig(uniform=(2, 4)),
    }
    found = [suggested(domains, study.ask()) for _ in range(60)]
    assert {point["a"] for point in found} == {"x", None, 3}
    assert {point["c"] for point in found} == {2, 3}
    assert all(("b" in point) == (point["a"] is not None) for point in found)
    assert {point["b"] for point in found if "b" in point} == {0.1, 0.2, 0.3, 0.4}
    assert all(0.01 <= point["d"] <= 1 and 2 <= point["e"] <= 4 for point in found)


def test_overrides_are_of_the_sweep_or_of_its_job(tmp_path):
    sweep = read_sweep(
        written(tmp_path),
        ["trials=3", "searcher.name=optuna", "train.epochs=2", "store=here", "space.train.lr={choice: [0.5]}"],
    )
    assert (sweep.trials, sweep.searcher.name) == (3, "optuna")
    assert sweep.settings == {"train.epochs": 2, "store": "here"}
    assert sweep.space["train.lr"].choice == (0.5,)
    run = trial_config(sweep, {"train.lr": 0.5, "model.tuning": "full"}, tmp_path / "run", seed=7)
    assert (run.train.lr, run.train.epochs, run.seed, run.out) == (0.5, 2, 7, tmp_path / "run")
    assert not run.evaluate.test


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metric=test.ndcg@10"], "key 'metric': a sweep chooses by validation"),
        (["searcher.seed=-1"], "key 'searcher.seed': Input should be greater than or equal to 0"),
        (["metric=ndcg@7"], "the runs measure at [5, 10]"),
        (["metric=loss"], "such as ndcg@10"),
        (["train.lrr=3"], "settings: recipe 'galrec' has no key 'train.lrr'; the nearest known key is 'train.lr'"),
        (["space.model.contrast.l9={choice: [1]}"], "nearest known key is 'model.contrast.l"),
        (["space.model.dropout={uniform: [0, 2]}"], "space 'model.dropout' = 2.0: key 'model.dropout'"),
        (["space.seed={choice: [1, 2]}"], "'seed' is the same in all trials"),
        (["space.train.lr={uniform: [2, 1]}"], "expected low < high"),
        (["space.train.lr={loguniform: [0, 1]}"], "of loguniform above 0"),
        (["space.train.lr={choice: [1], uniform: [1, 2]}"], "expected exactly one of"),
        (["space.train.lr={choice: [1], when: {train.batch: 3}}"], "'train.batch', which must be a key above it"),
        (["searcher.name=grid", "space.train.lr={uniform: [1, 2]}"], "a grid needs choice"),
        (["searcher.cost=seconds"], "needs searcher.name=optuna"),
        (["evaluate.test=true"], "trials never read the test set"),
        (["trails=3"], "has no key 'trails'; the nearest known key is 'trials'"),
        (["trials=0"], "key 'trials'"),
        (["scheduler={name: asha, grace: 11}"], "key 'scheduler.grace': 11 epochs, and the runs have 10"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, overrides, message):
    with pytest.raises(InputError) as refused:
        read_sweep(written(tmp_path), overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
