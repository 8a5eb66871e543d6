"""A run from config to metrics: what every worker executes, alone or beside others."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.draws import Draws
from raygrec.evaluate.baselines import lightgcn_scores, popularity, popularity_scores
from raygrec.evaluate.decoding import ranked_lists
from raygrec.evaluate.metrics import MetricSums
from raygrec.evaluate.ranking import Score, top_k
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.glta import GLTA, PromptBuilder
from raygrec.model.trend import READING
from raygrec.ranks import from_rank_0, sum_over_ranks, world
from raygrec.train.assembly import (
    Histories,
    Model,
    Prompts,
    build_model,
    build_prompts,
    fixed_parts,
    histories,
    save_model,
)
from raygrec.train.engine import Engine, LocalEngine, make_engine, peak_memory_mib
from raygrec.train.folder import WRITER_LOCK, RunFolder
from raygrec.train.loop import Reporter, Stage, run_stage
from raygrec.train.mirror import Mirror
from raygrec.train.settings import GLTARun, GraphRun, RunConfig
from raygrec.train.trackers import Tracker, tracked

PREDECESSOR = 60.0  # seconds to let an earlier rank 0 of the same run end
ALIGNMENT, TRAINING, HISTORIES = 1, 2, 3  # stage numbers, part of every draw's key

Parts = dict[str, torch.Tensor]  # trained parameters by name
# Users [B], their histories -> lists [B, k]
Ranker = Callable[[np.ndarray, CSR], torch.Tensor]


def run(
    config: RunConfig, folder: RunFolder, reporter: Reporter, distributed: bool, trackers: Sequence[Tracker] = ()
) -> dict[str, Any]:
    """The recipe's stages, then the one reading of the test data by the checkpoint that validation chose.

    Continues from whatever the folder holds. Returns (on every rank) and writes metrics.json's content.
    trackers: besides those of the config; rank 0 tells them how the training goes.
    """
    with ExitStack() as stack:
        # The driver holds the folder too, but its workers may outlive it, or a restarted group meet the one before.
        from_rank_0(lambda: stack.enter_context(folder.held(WRITER_LOCK, PREDECESSOR)))
        done = from_rank_0(folder.metrics)
        if done is not None:
            return done
        if world()[0] == 0:
            reporter = stack.enter_context(tracked(reporter, config, folder, trackers))
            if config.upload_checkpoints:
                folder.saved = stack.enter_context(Mirror(folder, config.upload, reporter.warn)).ask
        return _run(config, folder, reporter, distributed)


def _run(config: RunConfig, folder: RunFolder, reporter: Reporter, distributed: bool) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    store = Store.open(config.store)
    builder = build_prompts(config, store, folder)
    parts: Parts = {}
    if isinstance(config, GLTARun):
        if config.model.item_alignment and config.alignment.epochs:
            parts = _align_items(config, folder, reporter, distributed, store, builder)
        if builder.causal and config.histories.epochs:
            parts = _read_histories(config, folder, reporter, distributed, store, builder, parts)
        model = _stage_3_model(config, folder, distributed, store, builder, parts)
        engine = _train(config, folder, reporter, distributed, store, builder, model, "user-item alignment")
    else:
        model = build_model(config, store, builder, folder, distributed)
        if isinstance(config, GraphRun):
            engine = _as_trained(config, folder, model)
        else:
            engine = _train(config, folder, reporter, distributed, store, builder, model, "training")
    metrics = _final(config, folder, reporter, store, builder, engine)
    if world()[0] == 0:
        best = folder.load_parts(folder.parts_file("train"))
        save_model(config, folder, {**parts, **best, **fixed_parts(model)})
        folder.write_metrics(metrics)
    return metrics


def _align_items(
    config: GLTARun, folder: RunFolder, reporter: Reporter, distributed: bool, store: Store, builder: PromptBuilder
) -> Parts:
    """Stage 2: item projector, answer slot and head learn to match descriptions to items."""
    file = folder.parts_file("alignment")
    if not from_rank_0(lambda: folder.has_parts(file, reporter.warn)):
        model = build_model(config, store, builder, folder, distributed)
        model.train_stage_2()
        size = min(config.model.alignment_items, builder.symbols.items)
        stage = Stage(
            name="alignment",
            number=ALIGNMENT,
            title="item-text alignment",
            config=config.alignment,
            lengths=np.ones(builder.symbols.items),
            build=builder.alignment,
            made_of="items",
            per_prompt=size,
        )
        engine = _engine(config, model, stage, distributed)
        run_stage(stage, engine, config.seed, folder, reporter)
    return folder.load_parts(file)


def _read_histories(
    config: GLTARun,
    folder: RunFolder,
    reporter: Reporter,
    distributed: bool,
    store: Store,
    builder: PromptBuilder,
    parts: Parts,
) -> Parts:
    """The first part of stage 3: item tokens and head learn from every position of the histories alone."""
    file = folder.parts_file("histories")
    if not from_rank_0(lambda: folder.has_parts(file, reporter.warn)):
        model = _stage_3_model(config, folder, distributed, store, builder, parts)
        model.user_projector.requires_grad_(False)
        model.answer_slots.requires_grad_(False)
        trainable = np.flatnonzero(builder.train.lengths >= 2)
        stage = Stage(
            name="histories",
            number=HISTORIES,
            title="user-item alignment, histories",
            config=config.histories,
            lengths=np.minimum(builder.train.lengths[trainable], config.model.max_history),
            build=lambda numbers, draws: builder.training(trainable[numbers], draws, whole=False),
            numbers=trainable,
        )
        engine = _engine(config, model, stage, distributed)
        run_stage(stage, engine, config.seed, folder, reporter)
    return {**parts, **folder.load_parts(file)}


def _train(
    config: RunConfig,
    folder: RunFolder,
    reporter: Reporter,
    distributed: bool,
    store: Store,
    builder: Prompts,
    model: Model,
    title: str,
) -> Engine:
    """The last stage, on the recipe's whole prompts; ends with the best parameters by validation."""
    trainable = np.flatnonzero(builder.train.lengths >= 2)
    valid_users = users_of(store, config, "valid")

    def validate() -> dict[str, float]:
        ranker = model_ranker(config, engine, builder, "first", "valid")
        return evaluate(config, reporter, "validation", ranker, *valid_users)

    stage = Stage(
        name="train",
        number=TRAINING,
        title=title,
        config=config.train,
        lengths=np.minimum(builder.train.lengths[trainable], config.model.max_history),
        build=lambda numbers, draws: builder.training(trainable[numbers], draws),
        numbers=trainable,
        validate=validate,
        metric=f"ndcg@{max(config.evaluate.ks)}",
    )
    engine = _engine(config, model, stage, distributed)
    run_stage(stage, engine, config.seed, folder, reporter)
    engine.load_state(
        {f"param/{name}": value for name, value in folder.load_parts(folder.parts_file("train")).items()},
        0,
        (),
    )
    return engine


def _as_trained(config: GraphRun, folder: RunFolder, model: Model) -> Engine:
    """What the pretraining has made, in the place of what `_train` leaves behind."""
    if world()[0] == 0:
        folder.save_parts(folder.parts_file("train"), {name: value.data for name, value in model.named_parameters()})
    return LocalEngine(model, config.engine)


def _stage_3_model(
    config: GLTARun, folder: RunFolder, distributed: bool, store: Store, builder: PromptBuilder, parts: Parts
) -> GLTA:
    """The model with what earlier stages have trained; user side and, where it was trained, item side as asked."""
    model = build_model(config, store, builder, folder, distributed)
    if parts:
        _load_parts(model, parts)
    model.train_stage_3(aligned=bool(config.model.item_alignment and config.alignment.epochs))
    return model


def _final(
    config: RunConfig,
    folder: RunFolder,
    reporter: Reporter,
    store: Store,
    builder: Prompts,
    engine: Engine,
) -> dict[str, Any]:
    """Validation and test metrics of the chosen parameters and of the baselines that the run contains."""
    read = ("valid", "test") if config.evaluate.test else ("valid",)
    splits = {split: users_of(store, config, split) for split in read}

    def measured(ranker: Callable[[str], Ranker], title: str) -> dict[str, dict[str, float]]:
        return {
            split: evaluate(config, reporter, f"{title}, {split}", ranker(split), *users)
            for split, users in splits.items()
        }

    def model(split: str) -> Ranker:
        return model_ranker(config, engine, builder, config.evaluate.decoding, split)

    metrics: dict[str, Any] = measured(model, config.name)
    shown = {split: users[0].shown for split, users in splits.items()}
    metrics["baselines"] = {
        title: measured(lambda split, scores=scores: _score_ranker(scores[split], config), title)
        for title, scores in _baselines(config, folder, store, builder, shown).items()
    }
    metrics["decoding"] = config.evaluate.decoding
    if isinstance(config, GLTARun):
        metrics["texts"] = config.model.texts.source
    metrics["store"] = store.fingerprint
    metrics["split"] = store.manifest["options"]["split"]
    metrics["workers"] = world()[1]
    memory = torch.zeros(world()[1], dtype=torch.float64)
    memory[world()[0]] = peak_memory_mib()
    metrics["peak_memory_mib"] = sum_over_ranks(memory).tolist()
    return metrics


def _baselines(
    config: RunConfig, folder: RunFolder, store: Store, builder: Prompts, shown: dict[str, CSR]
) -> dict[str, dict[str, Score]]:
    """The scores of the baselines that a run contains, for each split of whose users the histories are `shown`."""
    counts_I = popularity(store.interactions("train"), store.num_items)
    popular = {"Popularity": dict.fromkeys(shown, counts_I)}
    if isinstance(builder, PromptBuilder) and builder.trend is not None:
        log_shares_MI = builder.trend.log_shares_MI
        popular["Recent popularity"] = {split: log_shares_MI[READING[split]].exp() for split in shown}
    found = {title: {split: popularity_scores(of[split]) for split in shown} for title, of in popular.items()}
    if config.reads_graph and not isinstance(config, GraphRun):
        nodes = NodeEmbeddings.load(folder.nodes_file)
        for title, of in popular.items():
            also = "" if title == "Popularity" else f" + {title.lower()}"
            scores = {split: lightgcn_scores(nodes, shown[split], of[split]) for split in shown}
            found[config.graph.name + also] = scores
    return found


def evaluate(
    config: RunConfig,
    reporter: Reporter,
    title: str,
    ranker: Ranker,
    split: Histories,
    users: np.ndarray,
    num_items: int,
) -> dict[str, float]:
    """Full-ranking metrics of `users`, each rank ranking its share; the same figures on every rank."""
    rank, workers = world()
    users = users[split.targets.lengths[users] > 0]
    users = users[np.argsort(split.shown.lengths[users], kind="stable")]
    mine = users[rank::workers]
    # Every rank makes as many passes as the one with the most users: under ZeRO-3 a pass is collective.
    passes = -(-len(users[0::workers]) // config.evaluate.batch)
    sums = MetricSums(tuple(config.evaluate.ks), num_items)
    for number in range(passes):
        reporter.at(title, number + 1)
        part = mine[number * config.evaluate.batch : (number + 1) * config.evaluate.batch]
        lists = ranker(part if len(part) else users[:1], split.shown.take(part if len(part) else users[:1]))
        if len(part):
            sums.add(lists, split.targets.take(part))
        if rank == 0:
            reporter.progress(title, number + 1, passes)
    total = MetricSums.from_tensor(sum_over_ranks(sums.as_tensor()), sums.ks, num_items)
    return total.result()


def model_ranker(config: RunConfig, engine: Engine, builder: Prompts, decoding: str, stage: str) -> Ranker:
    """Ranks with the engine's model in the given decoding; stage: "valid" or "test"."""

    def rank(users: np.ndarray, shown: CSR) -> torch.Tensor:
        with torch.no_grad(), engine.autocast():
            return ranked_lists(
                engine.model, builder, decoding, users, shown, stage, max(config.evaluate.ks), engine.device
            )

    return rank


def _score_ranker(score: Callable[[np.ndarray], torch.Tensor], config: RunConfig) -> Ranker:
    return lambda users, shown: top_k(score(users), max(config.evaluate.ks), [shown], users, overwrite=True)


def _engine(config: RunConfig, model: Model, stage: Stage, distributed: bool) -> Engine:
    return make_engine(model, config.engine, stage.portions(world()[1]), distributed)


def users_of(store: Store, config: RunConfig, split: str) -> tuple[Histories, np.ndarray, int]:
    """What `evaluate` ranks: a split's histories, the users (in validation a fixed draw of at most
    `evaluate.valid_users`) and the size of the catalogue."""
    found = histories(store, split)
    users = np.flatnonzero(found.targets.lengths)
    limit = config.evaluate.valid_users
    if split == "valid" and limit is not None and limit < len(users):
        users = np.sort(users[Draws(config.seed).permutation(len(users))[:limit]])
    return found, users, store.num_items


def _load_parts(model: GLTA, parts: Parts) -> None:
    unknown: Sequence[str] = model.load_state_dict(parts, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"parts that the model does not have: {', '.join(unknown)}")
