"""The training loop of one stage: the same on one process and on any number of workers."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.model.backbone import passes
from raygrec.model.prompts import PromptBatch
from raygrec.ranks import from_rank_0, sum_over_ranks, world
from raygrec.train.engine import Engine, NonFiniteError, give_back_memory, peak_memory_mib
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.settings import StageConfig
from raygrec.train.writer import CheckpointWriter

ASK_EVERY = 5.0  # seconds between two questions whether the run will soon be ended from outside
VALID = "valid/"  # what the names of a validation's figures begin with
ORDER = 2**32  # keeps the draws of an epoch's order apart from those of its steps


class Reporter(Protocol):
    """Where a run tells how it is doing, and what it hears; only rank 0 speaks, but for `at` and `wants_checkpoint`."""

    def at(self, task: str, step: int) -> None:
        """Every rank, as it begins `step` of `task`; called often, and so quick."""

    def wants_checkpoint(self) -> bool:
        """Every rank after the same step, a few seconds apart: whether to write a checkpoint now, on all ranks alike.

        True where the run is about to be ended from outside, once for each notice of it.
        """

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of `task`."""

    def report(self, record: dict[str, Any]) -> None:
        """One record of history.jsonl, after it was written."""

    def warn(self, line: str) -> None:
        """Something that does not end the run and that its user should know."""


class Watcher(Reporter, Protocol):
    """A reporter that rank 0 tells live figures, too."""

    every: int
    """Updates between two calls of `point`, besides those at validations; 0: nobody watches."""

    def point(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Live figures of update `step` of a stage, see `_figures`; those of a validation are named `valid/…`."""


@dataclass(frozen=True)
class Stage:
    """What one stage trains on.

    name: of its checkpoints and reports. lengths: [n] sort key of the n things (users or items) that prompts are
    made of, for batches of little padding. made_of: what they are. numbers: [n] theirs in the store; None where they
    are 0…n-1. per_prompt: things in one prompt. build: (things [B, per_prompt] or [B],
    draws) -> B prompts. validate: -> metrics, of which `metric` is maximised; None where the last step is the result.
    """

    name: str
    number: int
    title: str
    config: StageConfig
    lengths: np.ndarray
    build: Callable[[np.ndarray, Draws], PromptBatch]
    validate: Callable[[], dict[str, float]] | None = None
    metric: str = "ndcg@10"
    per_prompt: int = 1
    made_of: str = "users"
    numbers: np.ndarray | None = None

    @property
    def prompts(self) -> int:
        """Prompts of an update: `config.batch`, or as many as there are."""
        return min(self.config.batch, len(self.lengths) // self.per_prompt)

    def portions(self, workers: int) -> int:
        """Micro-batches per worker and update."""
        return portions(self.prompts, self.config.micro_batch, workers)


def epoch_order(lengths: np.ndarray, batch: int, draws: Draws) -> np.ndarray:
    """[steps, batch] things of one epoch: a random order, sorted by length inside pools of 16 batches.

    What does not fill a batch is left for another epoch. A function of the draws' key alone.
    """
    steps = len(lengths) // batch
    order = draws.permutation(len(lengths))[: steps * batch]
    pool = 16 * batch
    sorted_pools = [
        part[np.argsort(lengths[part], kind="stable")]
        for part in (order[start : start + pool] for start in range(0, len(order), pool))
    ]
    batches = np.concatenate(sorted_pools).reshape(steps, batch) if steps else np.zeros((0, batch), dtype=np.int64)
    return batches[draws.permutation(steps)]


def learning_rate(step: int, total: int, config: StageConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine to zero; `step` counts from 0."""
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def portions(batch: int, micro_batch: int, workers: int) -> int:
    """Micro-batches per worker and update: none may be empty, so one may hold a prompt more than `micro_batch`."""
    return max(1, min(-(-batch // (micro_batch * workers)), batch // workers))


class Update(NamedTuple):
    """What an update has shown, the same on every rank.

    sums: each term's sum over all ranks. counts: what it was summed over. tokens: symbols that all ranks have read.
    places: rows · width of what they were read in. norm: of the gradient. ask: whether any rank wanted that.
    """

    sums: list[float]
    counts: list[float]
    tokens: float
    places: float
    norm: float
    ask: bool


class Pace:
    """Tokens per second since it was made or set back."""

    def __init__(self) -> None:
        self.set_back()

    def set_back(self) -> None:
        self.tokens, self._since = 0.0, time.monotonic()

    def rate(self) -> float:
        return self.tokens / (time.monotonic() - self._since)


def run_stage(
    stage: Stage,
    engine: Engine,
    seed: int,
    folder: RunFolder,
    reporter: Reporter | Watcher,
) -> LoopState:
    """Runs a stage to its end, from its last checkpoint where there is one.

    The trained parameters end in `folder.parts_file(stage.name)`: the best by validation, else the last.
    """
    if stage.prompts < world()[1]:
        raise InputError(
            f"{stage.name}: an update of {stage.prompts} prompts has none for some of {world()[1]} workers; use fewer "
            f"workers or a larger {stage.name}.batch"
        )
    state = _resume(stage, engine, seed, folder, reporter) or _fresh(stage, folder)
    with CheckpointWriter(folder) as writer:
        _updates(stage, engine, seed, folder, reporter, state, writer)
    if stage.validate is None:
        parts = _parameters(engine.state(keep=world()[0] == 0))
        if world()[0] == 0:
            folder.save_parts(folder.parts_file(stage.name), parts)
    _barrier()
    return state


def _updates(
    stage: Stage,
    engine: Engine,
    seed: int,
    folder: RunFolder,
    reporter: Reporter | Watcher,
    state: LoopState,
    writer: CheckpointWriter,
) -> None:
    """From where `state` is to the last update, or to where validation has waited long enough."""
    config, rank = stage.config, world()[0]
    batch = stage.prompts * stage.per_prompt
    steps_per_epoch = len(stage.lengths) // batch
    total = steps_per_epoch * config.epochs
    terms = engine.model.terms
    every = getattr(reporter, "every", 0)
    of_epoch, of_point = Pace(), Pace()
    order, asked = np.zeros((0, batch)), time.monotonic()
    while state.step < total and state.waited < config.patience:
        epoch, place = divmod(state.step, steps_per_epoch)
        if place == 0 or not len(order):
            order = epoch_order(stage.lengths, batch, Draws(seed, stage.number, ORDER, epoch))
        rate = learning_rate(state.step, total, config)
        draws = Draws(seed, stage.number, epoch, place)
        reporter.at(stage.title, state.step + 1)
        ask = rank == 0 and time.monotonic() - asked > ASK_EVERY
        try:
            update = _step(stage, engine, order[place], draws, rate, ask)
        except NonFiniteError as error:
            raise _with_batch(error, stage, state.step + 1, epoch + 1, order[place], folder) from None
        state.add(update.sums, update.counts)
        state.step += 1
        ends_epoch = state.step % steps_per_epoch == 0
        validates = ends_epoch and stage.validate is not None and _is_due(stage, state.step, steps_per_epoch, total)
        figures: dict[str, float] = {}
        if rank == 0:
            loss = weighted_loss(terms, update.sums, update.counts)
            reporter.progress(stage.title, state.step, total, f"loss {loss:.3f}")
            for pace in (of_epoch, of_point):
                pace.tokens += update.tokens
            if every and (validates or state.step % every == 0):
                figures = _figures(update, rate, of_point.rate(), engine.model)
                of_point.set_back()
        improved = False
        if ends_epoch:
            record = _record(stage, state, state.step / steps_per_epoch, rate, update.norm, of_epoch.rate(), terms)
            if validates:
                record["valid"] = stage.validate()
                improved = _improves(state, record["valid"][stage.metric])
                figures |= {VALID + name.replace("@", "_at_"): value for name, value in record["valid"].items()}
            state.records += 1
            if rank == 0:
                folder.report(record)
                reporter.report(record)
            state.sums, state.counts = [], []
            of_epoch.set_back()
            of_point.set_back()
        if rank == 0 and every and figures:
            reporter.point(stage.name, state.step, figures)
        asked = time.monotonic() if update.ask else asked
        wanted = update.ask and reporter.wants_checkpoint()
        writer.check()
        if ends_epoch or wanted or state.step % config.checkpoint_every == 0:
            writer.wait()  # before there is another copy of the state in memory
            give_back_memory()
            tensors = engine.state(keep=rank == 0)
            if rank == 0:
                writer.save(state, tensors, _parameters(tensors) if improved else None)
            del tensors
            if wanted:
                writer.wait()  # there may be no later


def _figures(update: Update, rate: float, tokens_per_second: float, model: Any) -> dict[str, float]:
    """What is told of one update while the run goes on, apart from validations.

    loss: Σ weight · mean, of which `terms/…` are the parts. padding: the share of places without a symbol, of what all
    ranks have read. tokens_per_second: of all ranks, since the point before or the epoch's start. peak_memory_mib: of
    rank 0. What the model itself tells comes besides: GAL-Rec's `queue_fill`.
    """
    figures = {
        "loss": weighted_loss(model.terms, update.sums, update.counts),
        "lr": rate,
        "gradient_norm": update.norm,
        "tokens_per_second": tokens_per_second,
        "padding": 1 - update.tokens / max(update.places, 1),
        "peak_memory_mib": peak_memory_mib(),
    }
    if len(model.terms) > 1:
        means = _means(update.sums, update.counts)
        weighted = zip(model.terms.items(), means, strict=True)
        figures |= {f"terms/{name}": weight * mean for (name, weight), mean in weighted}
    return figures | (model.figures() if hasattr(model, "figures") else {})


def _record(
    stage: Stage, state: LoopState, epoch: float, rate: float, norm: float, tokens_per_second: float, terms: dict
) -> dict[str, Any]:
    """The line of history.jsonl for what has been trained since the last one."""
    record = {
        "stage": stage.name,
        "step": state.step,
        "epoch": epoch,
        "loss": weighted_loss(terms, state.sums, state.counts),
        "lr": rate,
        "gradient_norm": norm,
        "tokens_per_second": tokens_per_second,
        "workers": world()[1],
        "peak_memory_mib": peak_memory_mib(),
    }
    if len(terms) > 1:
        record["terms"] = dict(zip(terms, _means(state.sums, state.counts), strict=True))
    return record


def _step(stage: Stage, engine: Engine, things: np.ndarray, draws: Draws, rate: float, ask: bool) -> Update:
    """One update of `things`, of which this rank reads its share; ask: whether this rank wants something asked."""
    rank, workers = world()
    prompts = things if stage.per_prompt == 1 else things.reshape(-1, stage.per_prompt)
    mine = np.array_split(prompts, workers * stage.portions(workers))[rank::workers]
    batches = [stage.build(piece, draws) for piece in mine]
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    read = [_read(engine.model, batch) for batch in batches]
    told = counts.new_tensor([*np.sum(read, axis=0), ask])
    counts, told = sum_over_ranks(torch.cat([counts, told])).split([len(counts), len(told)])
    share = torch.tensor(list(engine.model.terms.values()), dtype=torch.float64) / counts.clamp(min=1)
    sums = torch.zeros_like(counts, device=engine.device)
    for number, batch in enumerate(batches):
        terms = engine.loss(batch.to(engine.device)).reshape(-1)
        sums += terms.detach()
        engine.backward((terms * share.to(terms)).sum(), last=number == len(batches) - 1)
    sums = sum_over_ranks(sums.cpu())
    if not sums.isfinite().all():
        total = weighted_loss(engine.model.terms, sums.tolist(), counts.tolist())
        raise NonFiniteError(f"the loss is {total}")
    norm = engine.update(rate)
    if hasattr(engine.model, "after_update"):
        engine.model.after_update()
    tokens, places, asks = told.tolist()
    return Update(sums.tolist(), counts.tolist(), tokens, places, norm, bool(asks))


def _read(model: Any, batch: PromptBatch) -> tuple[int, int]:
    """Symbols of a batch that the forward pass reads, and the places in which they stand."""
    lengths = model.lengths_read(batch) if hasattr(model, "lengths_read") else batch.lengths
    return int(lengths.sum()), sum(len(rows) * width for rows, width in passes(lengths, model))


def _with_batch(
    error: NonFiniteError, stage: Stage, step: int, epoch: int, things: np.ndarray, folder: RunFolder
) -> NonFiniteError:
    """The error that says where it was, and in which file the numbers of the batch are."""
    numbers = things if stage.numbers is None else stage.numbers[things]
    where = {"stage": stage.name, "step": step, "epoch": epoch, stage.made_of: numbers.tolist()}
    if world()[0] == 0:
        folder.write_batch({"error": str(error), **where})
    return NonFiniteError(
        f"{stage.name}: {error} in step {step} (epoch {epoch}); its {len(numbers)} {stage.made_of} are in "
        f"{folder.batch_file}; nothing was updated, lower {stage.name}.lr"
    )


def weighted_loss(terms: dict[str, float], sums: list[float], counts: list[float]) -> float:
    """Σ over terms of weight · sum / count."""
    return sum(weight * mean for weight, mean in zip(terms.values(), _means(sums, counts), strict=True))


def _means(sums: list[float], counts: list[float]) -> list[float]:
    return [total / max(count, 1.0) for total, count in zip(sums, counts, strict=True)]


def _is_due(stage: Stage, step: int, steps_per_epoch: int, total: int) -> bool:
    return step == total or (step // steps_per_epoch) % stage.config.evaluate_every == 0


def _improves(state: LoopState, metric: float) -> bool:
    """Takes a validation into the state; whether the parameters are the best so far."""
    if metric <= state.best:
        state.waited += 1
        return False
    state.best, state.best_step, state.waited = metric, state.step, 0
    return True


def _parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters in an engine's state, by their own names."""
    prefix = "param/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fresh(stage: Stage, folder: RunFolder) -> LoopState:
    """The state before the first update; records of an earlier try that left no checkpoint are forgotten."""
    state = LoopState(stage.name, records=sum(record["stage"] != stage.name for record in folder.history()))
    _barrier()
    if world()[0] == 0:
        folder.forget_after(state.records)
    return state


def _resume(stage: Stage, engine: Engine, seed: int, folder: RunFolder, reporter: Reporter) -> LoopState | None:
    """The state of the checkpoint that rank 0 has chosen, loaded on all; None where there is none."""
    place = from_rank_0(lambda: folder.newest_checkpoint(stage.name, reporter.warn))
    if place is None:
        return None
    state, tensors = folder.read_checkpoint(place)
    best = folder.parts_file(stage.name)
    if state.best_step and not from_rank_0(lambda: folder.has_parts(best, reporter.warn)):
        raise InputError(f"{best}: is missing or damaged, and no other file holds the best parameters; train again")
    things = np.arange(stage.per_prompt)
    example = stage.build(things if stage.per_prompt == 1 else things[None], Draws(seed)).to(engine.device)
    engine.load_state(tensors, state.step, (example,))
    if world()[0] == 0:
        folder.go_on_from(state)
    _barrier()
    return state


def _barrier() -> None:
    if world()[1] > 1:
        torch.distributed.barrier()
