"""What a sweep searches: the YAML of tune_spaces/, checked against the config of the runs before anything starts."""

import json
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from raygrec.config import StrictConfig, apply_overrides, known_keys, nearest_key, read_yaml, validate
from raygrec.errors import InputError
from raygrec.train.settings import RECIPES, RunConfig, run_config

Value = float | int | str | bool | None
Point = dict[str, Any]  # values by dotted key of the run's config

MEASURES = ("precision", "recall", "hit", "ndcg", "mrr", "coverage")
FOLDER, POINT = "folder", "point"  # what Ray Tune hands a trial: the sweep's folder, and a named point
SOME = 20  # trials, where a space that is no grid does not say how many
RESERVED = ("store", "out", "seed", "recipe", "evaluate.test")


class DomainConfig(StrictConfig):
    """The values that one key may take: exactly one of the kinds below."""

    choice: tuple[Value, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None
    """[low, high, step]."""
    randint: tuple[int, int] | None = None
    """[low, high), as in Ray Tune."""
    when: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)
    """The key is searched only where each of these keys, which the space holds above it, has such a value."""

    @model_validator(mode="after")
    def _is_one_domain(self) -> Self:
        kinds = [kind for kind in ("choice", "uniform", "loguniform", "quniform", "randint") if getattr(self, kind)]
        if len(kinds) != 1:
            raise ValueError("expected exactly one of choice, uniform, loguniform, quniform, randint, with values")
        if self.choice is None:
            low, high, *step = getattr(self, kinds[0])
            if not low < high or (kinds[0] == "loguniform" and low <= 0) or (step and step[0] <= 0):
                raise ValueError(f"{kinds[0]}: expected low < high, of loguniform above 0, of quniform a step above 0")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """All choices, or the two ends of the range."""
        if self.choice is not None:
            return self.choice
        if self.randint is not None:
            return (self.randint[0], self.randint[1] - 1)
        return (self.uniform or self.loguniform or self.quniform)[:2]

    def holds(self, value: Value) -> bool:
        """Whether `value` is one of the domain's."""
        if self.choice is not None:
            return any(one == value and isinstance(one, bool) == isinstance(value, bool) for one in self.choice)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.quniform is not None:
            steps = (value - self.quniform[0]) / self.quniform[2]
            if abs(steps - round(steps)) > 1e-6:
                return False
        low, high = self.ends
        return low <= value <= high and (self.randint is None or value == int(value))

    def applies(self, point: Point) -> bool:
        """Whether a point drawn so far meets `when`."""
        wanted = {key: value if isinstance(value, tuple) else (value,) for key, value in self.when.items()}
        return all(key in point and point[key] in values for key, values in wanted.items())

    def draw(self, random: np.random.Generator) -> Value:
        """One value at random."""
        if self.choice is not None:
            return self.choice[random.integers(len(self.choice))]
        if self.randint is not None:
            return int(random.integers(*self.randint))
        if self.loguniform is not None:
            return float(np.exp(random.uniform(*np.log(self.loguniform))))
        if self.quniform is not None:
            low, high, step = self.quniform
            return _tidy(low + step * int(random.integers(math.floor((high - low) / step + 1e-9) + 1)))
        return float(random.uniform(*self.uniform))

    def suggest(self, key: str, trial: Any) -> Value:
        """One value by an Optuna trial."""
        if self.choice is not None:
            return trial.suggest_categorical(key, list(self.choice))
        if self.randint is not None:
            return trial.suggest_int(key, self.randint[0], self.randint[1] - 1)
        if self.loguniform is not None:
            return trial.suggest_float(key, *self.loguniform, log=True)
        if self.quniform is not None:
            low, high, step = self.quniform
            return _tidy(trial.suggest_float(key, low, high, step=step))
        return trial.suggest_float(key, *self.uniform)


class SearcherConfig(StrictConfig):
    """Who names the next point."""

    name: Literal["grid", "random", "optuna"] = "random"
    """`grid`: every combination of choices; `random`; `optuna`: the tree-structured Parzen estimator (TPE)."""
    seed: int = Field(0, ge=0, lt=2**32)
    startup: int = Field(8, ge=1)
    """Optuna: trials at random before it models anything."""
    first: tuple[Point, ...] = ()
    """Random, optuna: points to try before any other. A key that one leaves out has the job's own value, so `{}` is the
    job as it stands."""
    cost: Literal["seconds", "device_seconds"] | None = None
    """Optuna: a second objective, to be kept low; the sweep's metric is the first."""

    @model_validator(mode="after")
    def _only_optuna_has_two(self) -> Self:
        if self.cost and self.name != "optuna":
            raise ValueError("cost: a second objective needs searcher.name=optuna")
        if self.first and self.name == "grid":
            raise ValueError("first: a grid tries every point")
        return self


class SchedulerConfig(StrictConfig):
    """Who ends trials early."""

    name: Literal["none", "asha", "hyperband", "median"] = "none"
    """`asha`: asynchronous successive halving; `hyperband`: the same in three brackets of growing grace; `median`:
    below the median of the other trials' means so far."""
    grace: int = Field(1, ge=1)
    """Epochs before a trial can end early."""
    reduction: float = Field(3, gt=1)
    """One in so many goes on, at each rung (asha, hyperband)."""


class BudgetConfig(StrictConfig):
    """When a sweep ends although trials are left; what runs then is stopped."""

    hours: float | None = Field(None, gt=0)
    device_hours: float | None = Field(None, gt=0)
    """Summed over trials: workers × hours."""


class SweepConfig(StrictConfig):
    """A sweep: what is tuned, over what, by whom, and for how long."""

    job: Path
    """The run config that trials differ from."""
    out: Path
    """The sweep's folder; on a cluster, a path that all nodes share."""
    settings: Point = Field(default_factory=dict)
    """Of the job, by dotted key; the same in all trials."""
    space: dict[str, DomainConfig] = Field(min_length=1)
    searcher: SearcherConfig = SearcherConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    trials: int | None = Field(None, ge=1)
    """At most; by default all points of a grid, and otherwise 20."""
    concurrency: int = Field(1, ge=1)
    """Trials at once, at most; fewer where the cluster has no room."""
    seeds: int = Field(1, ge=1)
    """Runs a trial; its score is their mean. Only the first can be ended early."""
    metric: str = "ndcg@10"
    """Of validation."""
    mode: Literal["max", "min"] = "max"
    budget: BudgetConfig = BudgetConfig()
    retries: int = Field(1, ge=0)
    """How often a trial that failed is started again, where that could help; then it is skipped."""

    @field_validator("metric")
    @classmethod
    def _is_of_validation(cls, metric: str) -> str:
        if "test" in metric.lower():
            raise ValueError("a sweep chooses by validation; the best configuration is read on test at the end")
        measure, _, k = metric.removeprefix("valid.").partition("@")
        if measure not in MEASURES or not k.isdigit():
            raise ValueError(f"expected one of {', '.join(MEASURES)}, at a k, such as ndcg@10")
        return f"{measure}@{k}"

    @property
    def limit(self) -> int | None:
        """Trials at most; None for all points of a grid."""
        return SOME if self.trials is None and self.searcher.name != "grid" else self.trials

    @model_validator(mode="after")
    def _conditions_stand_above(self) -> Self:
        seen: set[str] = set()
        for key, domain in self.space.items():
            for condition in domain.when:
                if condition not in seen:
                    raise ValueError(f"space: '{key}' depends on '{condition}', which must be a key above it")
            seen.add(key)
        if self.searcher.name == "grid":
            for key, domain in self.space.items():
                if domain.choice is None:
                    raise ValueError(f"space: '{key}': a grid needs choice")
        return self


def read_sweep(path: Path, overrides: list[str]) -> SweepConfig:
    """The sweep of a YAML file, with `key=value` overrides of its own keys or, by dotted key, of the job's.

    Raises `InputError` where a key is unknown to the runs, or a value of the space makes no run.
    """
    content = read_yaml(path)
    own = {key.partition(".")[0] for key in known_keys(SweepConfig)}
    for override in overrides:
        key = override.partition("=")[0]
        section, _, rest = key.partition(".")
        if section in own and section not in ("space", "settings"):
            content = apply_overrides(content, [override])
            continue
        # Keys of the job have dots of their own.
        section, rest = (section, rest) if section in own else ("settings", key)
        content[section] = {**(content.get(section) or {}), rest: _value(override)}
    sweep = validate(SweepConfig, content, str(path))
    check_space(sweep, str(path))
    return sweep


def point_of(config: dict[str, Any]) -> Point:
    """The point in what Ray Tune calls a trial's config."""
    if POINT in config:
        return config[POINT]
    return {key: value for key, value in config.items() if key != FOLDER}


def base_config(sweep: SweepConfig) -> dict[str, Any]:
    """The content of the job's config with the sweep's settings."""
    return with_values(read_yaml(sweep.job), sweep.settings)


def with_values(content: dict[str, Any], point: Point) -> dict[str, Any]:
    """`content` with each dotted key of `point` set."""
    return apply_overrides(content, [f"{key}={json.dumps(value)}" for key, value in point.items()])


def trial_config(sweep: SweepConfig, point: Point, out: Path, seed: int | None = None, test: bool = False) -> RunConfig:
    """The run of a point. Trials never read the test set."""
    content = with_values(base_config(sweep), point) | {"out": str(out)}
    if seed is not None:
        content["seed"] = seed
    # All trials would copy theirs to one address.
    own = {"evaluate.test": test, "upload_checkpoints": False}
    return run_config(with_values(content, own), str(sweep.job))


def check_space(sweep: SweepConfig, source: str) -> None:
    """`InputError` for a key that the runs do not have, and for a value at the ends of a domain that makes no run."""
    recipe = run_config(read_yaml(sweep.job), str(sweep.job)).recipe
    keys = known_keys(RECIPES[recipe])
    for section, given in (("settings", sweep.settings), ("space", sweep.space)):
        for key in given:
            if key not in keys:
                nearest = nearest_key(key, [*keys, *known_keys(SweepConfig)])
                raise InputError(f"{source}: {section}: recipe '{recipe}' has no key '{key}'{nearest}")
    base = base_config(sweep)
    run = run_config(base, f"{source}: {sweep.job}")
    for key in sweep.space:
        if key in RESERVED or key.startswith("cluster."):
            raise InputError(f"{source}: space: '{key}' is the same in all trials; give it under settings")
    if "evaluate.test" in sweep.settings:
        raise InputError(f"{source}: settings: 'evaluate.test': trials never read the test set")
    if sweep.metric.partition("@")[2] not in {str(k) for k in run.evaluate.ks}:
        raise InputError(f"{source}: key 'metric': {sweep.metric}, and the runs measure at {list(run.evaluate.ks)}")
    for key, domain in sweep.space.items():
        for value in domain.ends:
            try:
                run_config(with_values(base, {**_least(sweep.space, key), key: value}), f"space '{key}' = {value}")
            except InputError as error:
                raise InputError(f"{source}: {error}") from None
    epochs = longest_run(sweep, run)
    if sweep.scheduler.name != "none" and sweep.scheduler.grace > epochs:
        raise InputError(f"{source}: key 'scheduler.grace': {sweep.scheduler.grace} epochs, and the runs have {epochs}")
    try:
        first_points(sweep)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def longest_run(sweep: SweepConfig, run: RunConfig) -> int:
    """Epochs of the longest run in the space; run: one of its."""
    domain = sweep.space.get("train.epochs")
    return max(domain.ends) if domain else run.train.epochs


def _least(space: dict[str, DomainConfig], wanted: str) -> Point:
    """First values of the keys above `wanted`, such that its conditions are met."""
    point: Point = {}
    needed = {**space[wanted].when}
    for key in reversed(list(space)):
        if key in needed:
            needed |= {**space[key].when, **needed}
    for key, domain in space.items():
        if key in needed:
            value = needed[key]
            point[key] = value[0] if isinstance(value, tuple) else value
        elif key != wanted and domain.applies(point):
            point[key] = domain.ends[0]
    return point


def first_points(sweep: SweepConfig) -> list[Point]:
    """The points that are tried before any other; `InputError` where one lies outside the space."""
    run = run_config(base_config(sweep), str(sweep.job))
    found = []
    for given in sweep.searcher.first:
        point = walk(sweep.space, lambda key, _, given=given: given[key] if key in given else _own_value(run, key))
        for key in given:
            if key not in sweep.space:
                raise InputError(f"searcher.first: the space has no key '{key}'{nearest_key(key, [*sweep.space])}")
            if key not in point:
                raise InputError(f"searcher.first: '{key}' is searched only where {sweep.space[key].when}")
        for key, value in point.items():
            if not sweep.space[key].holds(value):
                whose = "" if key in given else ", the job's own value,"
                domain = sweep.space[key].model_dump(exclude_defaults=True, exclude={"when"})
                raise InputError(f"searcher.first: '{key}': {value!r}{whose} is not in {domain}")
        found.append(point)
    return found


def _own_value(run: RunConfig, key: str) -> Value:
    try:
        return attrgetter(key)(run)
    except AttributeError:
        message = f"searcher.first: '{key}': the job has no such section; give it a value in the point"
        raise InputError(message) from None


def walk(space: dict[str, DomainConfig], pick: Callable[[str, DomainConfig], Value]) -> Point:
    """One point: each key whose conditions are met, in the space's order."""
    point: Point = {}
    for key, domain in space.items():
        if domain.applies(point):
            point[key] = pick(key, domain)
    return point


def suggested(space: dict[str, DomainConfig], trial: Any) -> Point:
    """One point by an Optuna trial."""
    return walk(space, lambda key, domain: domain.suggest(key, trial))


def points(sweep: SweepConfig) -> list[Point] | None:
    """What grid and random search will try, each point once; None where a searcher learns from what it has seen."""
    if sweep.searcher.name == "optuna":
        return None
    if sweep.searcher.name == "grid":
        return list(_grid(list(sweep.space.items()), {}))[: sweep.limit]
    random = np.random.default_rng(sweep.searcher.seed)
    found = {json.dumps(point, sort_keys=True): point for point in first_points(sweep)[: sweep.limit]}
    for _ in range(100 * sweep.limit):
        if len(found) == sweep.limit:
            break
        point = walk(sweep.space, lambda _, domain: domain.draw(random))
        found.setdefault(json.dumps(point, sort_keys=True), point)
    return list(found.values())


def _grid(rest: list[tuple[str, DomainConfig]], point: Point) -> Iterator[Point]:
    if not rest:
        yield point
        return
    (key, domain), *others = rest
    if not domain.applies(point):
        yield from _grid(others, point)
        return
    for value in domain.choice or ():
        yield from _grid(others, {**point, key: value})


def _value(override: str) -> Any:
    """The value of `key=value`."""
    return apply_overrides({}, ["key=" + override.partition("=")[2]])["key"]


def _tidy(value: float) -> float:
    """Without the noise of binary fractions, which would make two names for one value."""
    return float(f"{value:.12g}")
