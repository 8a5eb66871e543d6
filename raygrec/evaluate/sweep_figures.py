"""The figures of a hyper-parameter sweep: what each shows, as marks of `evaluate/drawing.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np
import pandas as pd

from raygrec.evaluate.drawing import (
    INK,
    SOFT,
    Axis,
    Band,
    Drawing,
    Label,
    Line,
    Panel,
    Points,
    Scale,
    number,
    shortened,
)

# Okabe and Ito's palette, which colour-blind readers tell apart.
BEST, FINISHED, PRUNED, UNFINISHED = "#D55E00", "#0072B2", "#8b929c", "#56B4E9"
COLOURS = {"finished": FINISHED, "pruned": PRUNED, "failed": INK, "unfinished": UNFINISHED}
SYMBOLS = {"finished": "dot", "pruned": "ring", "failed": "cross", "unfinished": "triangle"}
WORDS = {"finished": "blue", "pruned": "grey ring", "failed": "black cross", "unfinished": "light blue triangle"}

LOG_FROM = 20  # an axis whose values span more than this factor is logarithmic
FEW = 8  # so many distinct numbers are shown as categories
MANY = 60  # with more trials than that their lines are drawn thinner
ENOUGH_FOR_IMPORTANCE = 10  # trials; PED-ANOVA wants five of them among the good ones


@dataclass(frozen=True)
class Key:
    """One key of the search space. values: one per trial, None where the key was not set."""

    column: str
    name: str
    values: list
    scale: Scale

    @property
    def varied(self) -> bool:
        return len({value for value in self.values if value is not None}) > 1


@dataclass(frozen=True)
class Sweep:
    """A sweep folder's tables, cleaned: scores finite or NaN, trials in their order of start with rows from 0 on."""

    trials: pd.DataFrame
    reports: pd.DataFrame
    metric: str
    mode: str

    @cached_property
    def keys(self) -> list[Key]:
        columns = [column for column in self.trials if column.startswith("config.")]
        names = short_names([column.removeprefix("config.") for column in columns])
        return [make_key(column, name, self.trials[column]) for column, name in zip(columns, names, strict=True)]

    @cached_property
    def ranked(self) -> pd.DataFrame:
        return ranked(self.trials, self.mode)

    @cached_property
    def best(self) -> str | None:
        """The id of the best trial, None where no trial has a score."""
        return None if self.ranked.empty else self.ranked.iloc[0]["trial"]

    @cached_property
    def shared_epoch(self) -> float | None:
        """The last epoch that all trials with a score have reported, but for failed ones; None where all have ended.

        A score after few epochs and one after many tell how long trials were let go on, not which are better.
        """
        counted = self.trials[np.isfinite(self.trials["score"]) & (self.trials["status"] != "failed")]
        last = self.reports[self.reports["trial"].isin(counted["trial"])].groupby("trial")["epoch"].max()
        if last.empty or (counted["status"] == "finished").all():
            return None
        return float(last.min())

    @cached_property
    def comparable(self) -> list[float]:
        """The score that each trial had after `shared_epoch`; NaN where it had none."""
        if self.shared_epoch is None:
            return self.trials["score"].tolist()
        before = self.reports[self.reports["epoch"] <= self.shared_epoch].sort_values("epoch")
        return self.trials["trial"].map(before.groupby("trial")["score"].last()).astype(float).tolist()

    @cached_property
    def hover(self) -> dict[str, str]:
        """For each trial what the pointer shows."""
        return {
            row["trial"]: "\n".join(
                [
                    f"trial {row['number']}, {row['status']}",
                    f"{self.metric} {number(row['score'])}",
                    *(f"{key.name} = {shortened(v, 40)}" for key in self.keys if (v := key.values[at]) is not None),
                    *([shortened(row["reason"], 60)] if row["reason"] else []),
                ]
            )
            for at, row in enumerate(self.trials.to_dict("records"))
        }


def ranked(trials: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Trials with a finite score, best first; those that did not finish come after all that did."""
    scored = trials[np.isfinite(trials["score"].astype(float))]
    order = pd.DataFrame(
        {
            "unfinished": scored["status"] != "finished",
            "failed": scored["status"] == "failed",
            "loss": scored["score"] * (-1 if mode == "max" else 1),
            "number": scored["number"],
        }
    )
    return scored.loc[order.sort_values(list(order)).index]


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names by as few of their last parts as tell them apart: `model.tau`, `train.lr` -> `tau`, `lr`."""

    def tail(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    def shortest(name: str) -> str:
        for parts in range(1, name.count(".") + 1):
            if sum(tail(other, parts) == tail(name, parts) for other in names) == 1:
                return tail(name, parts)
        return name

    return [shortest(name) for name in names]


def make_key(column: str, name: str, series: pd.Series) -> Key:
    """Plain values of one config column and the axis that suits them."""
    values = [_plain(value) for value in series]
    there = [value for value in values if value is not None]
    distinct = set(there)
    if not all(isinstance(value, float) for value in there):
        values = [number(value) if isinstance(value, float) else value for value in values]
        return Key(column, name, values, Scale.of_categories(sorted(set(values) - {None}, key=_natural)))
    whole = all(value == int(value) for value in distinct)
    if len(distinct) <= FEW and (whole or len(there) >= 2 * len(distinct) or len(distinct) == 1):
        return Key(column, name, values, Scale.of_categories(sorted(distinct)))
    return Key(column, name, values, Scale.over(there, _looks_logarithmic(there)))


def _looks_logarithmic(values: Sequence[float]) -> bool:
    """Whether they span a wide range, unless their median lies clearly nearer its middle by difference than by ratio.

    A value drawn evenly from 0 to 1 also spans a wide range, and looks wrong on a logarithmic axis.
    """
    low, middle, high = min(values), float(np.median(values)), max(values)
    if low <= 0 or high <= LOG_FROM * low:
        return False
    by_ratio = math.log(middle / low) / math.log(high / low)
    return abs(by_ratio - 0.5) < abs((middle - low) / (high - low) - 0.5) + 0.1


def _plain(value: object) -> float | str | None:
    """A number as float (none that is not finite), all else as words; None for a value that is not there."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return None if value is None or value is pd.NA else str(value)


def _natural(text: str) -> tuple[int, float, str]:
    """Words that are numbers come in the order of the numbers."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def score_scale(scores: Sequence[float], mode: str) -> Scale:
    """An axis for scores that a few trials gone astray do not squeeze: on the bad side it ends near the bulk."""
    finite = np.asarray([score for score in scores if math.isfinite(score)], float)
    if not len(finite):
        return Scale.over([])
    low, middle_low, middle_high, high = np.quantile(finite, [0, 0.25, 0.75, 1])
    room = 3 * (middle_high - middle_low)
    if room and mode == "max":
        low = max(low, middle_low - room)
    elif room:
        high = min(high, middle_high + room)
    return Scale.over([low, high])


def marks_note(sweep: Sweep) -> str:
    """How trials are drawn, of the statuses that occur."""
    there = [status for status in COLOURS if (sweep.trials["status"] == status).any()]
    parts = [f"{WORDS[status]} = {status}" for status in there]
    return f"{', '.join(['orange = best', *parts])}.".capitalize()


def learning_curves(sweep: Sweep) -> Drawing | str:
    """The metric by epoch, a line a trial; the best one on top."""
    reports = sweep.reports[np.isfinite(sweep.reports["value"]) & np.isfinite(sweep.reports["epoch"])]
    if reports.empty:
        return "No trial reported a value of the metric, so there are no learning curves."
    scale = score_scale(reports["value"].tolist(), sweep.mode)
    groups = {trial: part.sort_values("epoch") for trial, part in reports.groupby("trial")}
    order = {"pruned": 0, "unfinished": 1, "failed": 2, "finished": 3}
    rows = [row for row in sweep.trials.to_dict("records") if row["trial"] in groups]
    rows.sort(key=lambda row: (row["trial"] == sweep.best, order[row["status"]]))
    thin = 0.8 if len(rows) > MANY else 1.4
    lines, ends = [], []  # ends are drawn over all lines
    for row in rows:
        part, best = groups[row["trial"]], row["trial"] == sweep.best
        x, y = part["epoch"].tolist(), part["value"].tolist()
        colour = BEST if best else COLOURS[row["status"]]
        light = colour if best or row["status"] != "finished" else _mixed(colour, 0.35)
        dashed = row["status"] == "pruned"
        hover = sweep.hover[row["trial"]]
        lines.append(Line(x, y, light, 3.5 if best else thin, dashed, hover))
        size = 9 if best or row["status"] != "finished" else 5
        symbol, end = _held(y[-1], SYMBOLS[row["status"]], scale)
        ends.append(Points([x[-1]], [end], colour, symbol, size, [hover]))
        if best:
            ends.append(Label(x[-1], end, f"trial {row['number']}", BEST, "right", bold=True))
    low, high = min(0.0, reports["epoch"].min()), reports["epoch"].max()
    x_axis = Scale("even", low, high + 0.08 * ((high - low) or 1))
    silent = len(sweep.trials) - len(groups)
    note = f"Validated {sweep.metric} by epoch, a line a trial. {marks_note(sweep)} Pruned trials are dashed."
    note += f" {silent} of {len(sweep.trials)} trials reported nothing." if silent else ""
    return Drawing(
        "learning_curves",
        "Learning curves",
        note,
        [Panel(x_axis.axis("epoch", 10), scale.axis(sweep.metric), [*lines, *ends])],
    )


def _mixed(colour: str, white: float) -> str:
    """The colour with that share of white."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def _held(value: float, symbol: str, scale: Scale) -> tuple[str, float]:
    """Symbol and place of a score; one beyond the axis lies at its end as an arrow head."""
    if value < scale.low:
        return "below", _end(scale, "max")
    return ("above", _end(scale, "min")) if value > scale.high else (symbol, value)


def _end(scale: Scale, mode: str) -> float:
    """The bad end of an axis for scores, inside by half a symbol."""
    inset = 0.025 * (scale.high - scale.low)
    return scale.low + inset if mode == "max" else scale.high - inset


def _edge_note(sweep: Sweep, scale: Scale) -> str:
    """What the points on the axis' edge mean, where there are any."""
    scores = sweep.trials["score"]
    beyond = " Arrow heads = beyond the axis." if ((scores < scale.low) | (scores > scale.high)).any() else ""
    silent = (scores.isna() & (sweep.trials["status"] == "failed")).any()
    return beyond + (" Crosses on the edge = failed without a score." if silent else "")


def trial_points(sweep: Sweep, places: Sequence[float], scores: Sequence[float], scale: Scale) -> list[Points]:
    """All trials as points: one mark a kind, the best last. places: NaN where a trial has none.

    A failed trial without a score lies on the axis' bad edge; others without one are not drawn.
    """
    edge = _end(scale, sweep.mode)
    kinds: dict[tuple, list] = {}
    for row, x, score in zip(sweep.trials.to_dict("records"), places, scores, strict=True):
        if not math.isfinite(score) and row["status"] == "failed":
            score = edge
        if not (math.isfinite(x) and math.isfinite(score)):
            continue
        symbol, y = _held(score, SYMBOLS[row["status"]], scale)
        best = row["trial"] == sweep.best
        kind = (best, BEST if best else COLOURS[row["status"]], symbol, 11 if best else 7)
        kinds.setdefault(kind, []).append((x, y, sweep.hover[row["trial"]]))
    order = sorted(kinds, key=lambda kind: (kind[0], kind[1] != PRUNED))
    found = []
    for kind in order:
        x, y, hover = map(list, zip(*kinds[kind], strict=True))
        found.append(Points(x, y, *kind[1:], hover))
    return found


def _varied(sweep: Sweep, order: Sequence[str]) -> list[Key] | str:
    """The keys that took more than one value, those named in `order` first; or why nothing can be shown of any."""
    keys = [key for key in sweep.keys if key.varied]
    if sweep.best is None:
        return "no trial has a score"
    if not keys:
        return "no key took more than one value"
    return sorted(keys, key=lambda key: order.index(key.name) if key.name in order else len(order))


def effects(sweep: Sweep, order: Sequence[str] = ()) -> Drawing | str:
    """The score by each key that took more than one value. order: names of keys that come first."""
    keys = _varied(sweep, order)
    if isinstance(keys, str):
        return f"The effect of the keys cannot be shown: {keys}."
    scores = sweep.trials["score"].tolist()
    scale = score_scale(scores, sweep.mode)
    columns = min(4, len(keys))
    panels = [_effect(sweep, key, scores, scale, first=not at % columns) for at, key in enumerate(keys)]
    early = sweep.shared_epoch
    when = "" if early is None else f" after {early:g} epoch{'s' * (early != 1)}, which all of them reached"
    note = (
        f"Best {sweep.metric} of each trial by one key at a time. {marks_note(sweep)} Black line = median over trials "
        f"with such a value{when}, failed ones left out; grey = the middle half of them."
    ) + _edge_note(sweep, scale)
    return Drawing("effects", "Effect of each key", note, panels, columns, 270)


def _effect(sweep: Sweep, key: Key, scores: list[float], scale: Scale, first: bool) -> Panel:
    places = [math.nan if value is None else key.scale.place(value) for value in key.values]
    counted = [
        (place, score)
        for place, score, status in zip(places, sweep.comparable, sweep.trials["status"], strict=True)
        if math.isfinite(place) and math.isfinite(score) and status != "failed"
    ]
    x, y = np.array(counted, float).reshape(-1, 2).T
    trend = _category_trend(x, y) if key.scale.kind == "categories" else _running_trend(x, y, key.scale)
    spread = _jittered(places) if key.scale.kind == "categories" else places
    missing = sum(value is None for value in key.values)
    title = key.name + (f"  (set in {len(places) - missing} of {len(places)})" if missing else "")
    y_axis = scale.axis(sweep.metric if first else "")
    if not first:
        y_axis = Axis(y_axis.low, y_axis.high, [(at, "") for at, _ in y_axis.ticks])
    return Panel(key.scale.axis(title, 4), y_axis, [*trend, *trial_points(sweep, spread, scores, scale)])


def _jittered(places: Sequence[float]) -> list[float]:
    """Places of categories moved apart by a fixed pattern, so that equal points do not hide each other."""
    return [place + 0.22 * ((at * 0.618) % 1 - 0.5) for at, place in enumerate(places)]


def _category_trend(x: np.ndarray, y: np.ndarray) -> list[Band | Line]:
    marks: list = []
    for place in np.unique(x):
        low, middle, high = np.quantile(y[x == place], [0.25, 0.5, 0.75])
        sides = [place - 0.3, place + 0.3]
        if (x == place).sum() > 2:
            marks.append(Band(sides, [low, low], [high, high], INK))
        marks.append(Line(sides, [middle, middle], INK, 2.5))
    return marks


def _running_trend(x: np.ndarray, y: np.ndarray, scale: Scale) -> list[Band | Line]:
    if len(x) < 6:
        return []
    grid = np.linspace(x.min(), x.max(), 60)
    low, middle, high = running_quantiles(x, y, grid, 0.1 * (scale.high - scale.low))
    good = np.isfinite(middle)
    pieces = np.split(np.arange(60), np.flatnonzero(np.diff(good)) + 1)
    bands = [Band(grid[p].tolist(), low[p].tolist(), high[p].tolist(), INK) for p in pieces if good[p[0]]]
    return [*bands, Line(grid.tolist(), middle.tolist(), INK, 2.5)]


def running_quantiles(x: np.ndarray, y: np.ndarray, grid: np.ndarray, bandwidth: float) -> np.ndarray:
    """Quartiles [3, G] of y near each place of `grid` [G], weighted by a Gaussian of x [n] around it.

    NaN where fewer than three points' worth of weight lie near.
    """
    order = np.argsort(y)
    x, y = x[order], y[order]
    weights_Gn = np.exp(-0.5 * ((grid[:, None] - x) / bandwidth) ** 2)
    found = np.full((3, len(grid)), np.nan)
    for at, weights in enumerate(weights_Gn):
        if weights.sum() ** 2 >= 3 * (weights**2).sum() and weights.sum() > 1:
            middles = (np.cumsum(weights) - weights / 2) / weights.sum()
            found[:, at] = np.interp([0.25, 0.5, 0.75], middles, y)
    return found


def parallel_coordinates(sweep: Sweep, order: Sequence[str] = ()) -> Drawing | str:
    """Every key an upright axis, every trial with a score a line through its values, coloured by the score."""
    keys = _varied(sweep, order)
    if isinstance(keys, str):
        return f"There are no parallel coordinates: {keys}."
    scores = sweep.trials["score"].tolist()
    scale = score_scale(scores, sweep.mode)
    at_score = len(keys)
    thin = 0.8 if len(sweep.ranked) > MANY else 1.6
    marks: list = [Line([at, at], [0, 1], SOFT, 1) for at in range(at_score + 1)]
    for row in sweep.ranked.index[::-1]:
        trial, share = sweep.trials.at[row, "trial"], _share(scale, scores[row])
        good = share if sweep.mode == "max" else 1 - share
        y = [_share(key.scale, key.scale.place(v)) if (v := key.values[row]) is not None else -0.09 for key in keys]
        best = trial == sweep.best
        colour = BEST if best else _ramp(good)
        marks.append(
            Line(list(range(at_score + 1)), [*y, share], colour, 4 if best else thin, hover=sweep.hover[trial])
        )
    for at, axis in enumerate([*(key.scale for key in keys), scale]):
        ticks = axis.ticks(5)
        marks += [Label(at, _share(axis, place), shortened(text, 12), INK, "left", size=11) for place, text in ticks]
        missing = at < at_score and None in keys[at].values
        marks += [Label(at, -0.09, "not set", SOFT, "left", size=11)] if missing else []
    names = [shortened(name, 24) for name in [*(key.name for key in keys), sweep.metric]]
    wide = max(map(len, names)) * 9 > 1200 / len(names)  # then neighbours' names stand on two heights
    for at, name in enumerate(names):
        marks.append(Label(at, 1.11 if wide and at % 2 else 1.02, name, INK, "above", bold=True))
    bottom = -0.16 if any(None in key.values for key in keys) else -0.05
    panel = Panel(Axis(-0.55, at_score + 0.4), Axis(bottom, 1.22 if wide else 1.12), marks)
    note = f"A line a trial with a score, the darker the better; the last axis is {sweep.metric}. Orange = best."
    return Drawing("parallel_coordinates", "Parallel coordinates", note, [panel], height=440)


def _share(scale: Scale, place: float) -> float:
    return min(1.0, max(0.0, (place - scale.low) / (scale.high - scale.low)))


def _ramp(share: float) -> str:
    """Pale for 0 to deep blue for 1."""
    stops = [(0.0, (223, 227, 232)), (0.55, (116, 173, 209)), (1.0, (8, 61, 119))]
    parts = [np.interp(share, [at for at, _ in stops], [colour[c] for _, colour in stops]) for c in range(3)]
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def importances(sweep: Sweep) -> dict[str, float] | str:
    """The share of each varied key in what tells good trials apart (PED-ANOVA), largest first; or why there is none.

    Trials that were pruned count with the score they had.
    """
    import optuna

    keys = [key for key in sweep.keys if key.varied]
    rows = sorted(sweep.ranked.index)
    scores = sweep.trials["score"].to_numpy(float)
    if not keys:
        return "no key took more than one value"
    if len(rows) < ENOUGH_FOR_IMPORTANCE:
        return f"it takes {ENOUGH_FOR_IMPORTANCE} trials with a score, here are {len(rows)}"
    if len(set(scores[rows])) == 1:
        return "all trials have the same score"
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(rows))))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if sweep.mode == "max" else "minimize")
        study.add_trials([_optuna_trial(optuna, keys, at, scores[at]) for at in rows])
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError, AssertionError) as error:  # conditions that leave no key in common, say
        return f"optuna could not work it out ({error})"
    finally:
        optuna.logging.set_verbosity(before)
    if not math.isfinite(total := sum(found.values())) or total <= 0:
        return "the good trials' values do not differ from those of all trials"
    return {name: value / total for name, value in sorted(found.items(), key=lambda item: -item[1])}


def _optuna_trial(optuna: object, keys: Sequence[Key], at: int, score: float) -> object:
    kinds = optuna.distributions
    params, distributions = {}, {}
    for key in keys:
        if key.values[at] is None:
            continue
        params[key.name] = key.values[at]
        if key.scale.kind == "categories":
            distributions[key.name] = kinds.CategoricalDistribution(key.scale.categories)
        else:
            there = [value for value in key.values if value is not None]
            distributions[key.name] = kinds.FloatDistribution(min(there), max(there), log=key.scale.kind == "log")
    return optuna.create_trial(params=params, distributions=distributions, value=float(score))


def importance(sweep: Sweep, found: dict[str, float] | str) -> Drawing | str:
    """Bars of `importances`."""
    if isinstance(found, str):
        return f"The importance of the keys cannot be told: {found}."
    marks: list = []
    for at, share in enumerate(reversed(found.values())):
        marks.append(Band([0, share], [at - 0.32] * 2, [at + 0.32] * 2, FINISHED, 0.9))
        marks.append(Label(share, at, f"{share:.0%}", INK, "right"))
    ticks = [(float(at), shortened(name, 28)) for at, name in enumerate(reversed(found))]
    panel = Panel(Axis(0, 1.1 * max(found.values())), Axis(-0.6, len(found) - 0.4, ticks), marks)
    left_out = [key.name for key in sweep.keys if key.varied and key.name not in found]
    note = (
        f"How far each key's values in the top trials differ from those in all {len(sweep.ranked)} trials with a score "
        "(PED-ANOVA), as shares of 1. It says that a key matters, not which value is good; with few trials it is rough."
    )
    note += f" Not told, for they were not always set: {', '.join(left_out)}." if left_out else ""
    return Drawing("importance", "Which keys matter", note, [panel], height=60 + 34 * len(found))


def pareto_front(costs: Sequence[float], scores: Sequence[float], mode: str) -> list[int]:
    """Positions of the points that no cheaper one equals or beats, cheapest first; those not finite are left out."""
    sign = -1 if mode == "max" else 1
    losses = sign * np.asarray(scores, float)
    finite = np.flatnonzero(np.isfinite(losses) & np.isfinite(np.asarray(costs, float)))
    front: list[int] = []
    for at in sorted(finite, key=lambda at: (costs[at], losses[at])):
        if not front or losses[at] < losses[front[-1]]:
            front.append(int(at))
    return front


def cost(sweep: Sweep) -> Drawing | str:
    """Device time against score, with the front of trials that no cheaper one beats."""
    trials = sweep.trials
    seconds = np.where(trials["device_seconds"] > 0, trials["device_seconds"], np.nan)
    scored = seconds[np.isfinite(seconds) & np.isfinite(trials["score"])]
    if not len(scored):
        return "Cost against quality cannot be shown: no trial has both a score and a device time."
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, name = next(((unit, name) for unit, name in units if scored.max() >= 2 * unit), units[-1])
    costs, scores = seconds / unit, trials["score"].to_numpy(float)
    log = scored.max() > LOG_FROM * scored.min()
    there = costs[np.isfinite(costs)]
    x_scale, scale = Scale.over(there, log), score_scale(scores.tolist(), sweep.mode)
    places = [x_scale.place(value) if math.isfinite(value) else math.nan for value in costs]
    front = pareto_front(costs, scores, sweep.mode)
    steps_x, steps_y = [], []
    for at, after in zip(front, [*front[1:], None], strict=True):
        steps_x += [places[at], places[after] if after is not None else x_scale.high]
        steps_y += [scores[at]] * 2
    marks = [Line(steps_x, steps_y, BEST, 2), *trial_points(sweep, places, scores, scale)]
    marks += _front_labels(sweep, [(places[at], scores[at], trials.iloc[at]) for at in front], x_scale, scale)
    room = 0.06 * (scale.high - scale.low)  # for the best one's label
    scale = replace(scale, **({"high": scale.high + room} if sweep.mode == "max" else {"low": scale.low - room}))
    note = (
        f"Device time (workers × seconds) against best {sweep.metric}. {marks_note(sweep)} "
        "Orange line = the best that trials no dearer reached."
    ) + _edge_note(sweep, scale)
    axis = x_scale.axis(f"device {name}", 8)
    return Drawing("cost", "Cost against quality", note, [Panel(axis, scale.axis(sweep.metric), marks)])


def _front_labels(
    sweep: Sweep, front: list[tuple[float, float, pd.Series]], x_scale: Scale, scale: Scale
) -> list[Label]:
    """Names of the front's trials, from the best down, without those that would touch one that is written."""
    labels: list[Label] = []
    for x, y, row in reversed(front):
        near = [
            abs(_share(x_scale, x) - _share(x_scale, other.x)) < 0.08
            and abs(_share(scale, y) - _share(scale, other.y)) < 0.08
            for other in labels
        ]
        if scale.low <= y <= scale.high and not any(near):
            best, side = row["trial"] == sweep.best, "above left" if sweep.mode == "max" else "below left"
            labels.append(Label(x, y, f"trial {row['number']}", BEST if best else INK, side, bold=best))
    return labels
