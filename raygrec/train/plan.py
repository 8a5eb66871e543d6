"""What a run needs before it is started: memory per GPU under each way to spread it, its speed, hours and cost.

The model is built of tensors without content, from the same classes as a run's, so its parameters are counted, not
reckoned; so is what autograd keeps of a forward pass. Rates are datasheets' (`accelerators`), the share of them that
training reaches (MFU) is assumed; both are told. Times are of arithmetic, and of what is sent, alone: a small model
spends more on prompts, kernel launches, the graph and evaluation.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.backbone import Backbone, load_tokenizer, positions
from raygrec.model.galrec import HOPS, GALRec
from raygrec.model.glta import GLTA, Phrases
from raygrec.model.head import positions_at_once
from raygrec.model.last_layer import Asked
from raygrec.model.prompts import Symbols
from raygrec.model.trend import READINGS
from raygrec.train.accelerators import HOST_ADAM, HOST_LINK, NETWORK, Accelerator
from raygrec.train.engine import BUCKET, FEW, frozen_matrices
from raygrec.train.settings import GALRecRun, GLTARun, RunConfig

GIB = 2**30
MFU = 0.35  # share of the datasheet's FLOP/s that training reaches, assumed
RESERVED = 1.5 * GIB  # CUDA, NCCL and what the allocator cannot use, assumed
PASSES = 2  # of the language model over a batch under ZeRO-3
REUSED = 1_000_000_000  # parameters that ZeRO-3 at most leaves whole for their next use, DeepSpeed's default
AHEAD = 50_000_000  # that it fetches before they are asked for, DeepSpeed's default
TERM_TOKENS, MEAN_TERM_TOKENS = 4, 2  # of a term of GLTA's texts, assumed: of a long one, and on average


class Setting(NamedTuple):
    """A way to spread the state over GPUs."""

    stage: int
    optimizer: bool = False
    """The optimizer's state is in the host's memory."""
    parameters: bool = False
    """The parameters are too."""

    @property
    def offload(self) -> str:
        return "all" if self.parameters else "optim" if self.optimizer else "-"


SETTINGS = [Setting(stage) for stage in range(4)] + [
    Setting(1, True),
    Setting(2, True),
    Setting(3, True),
    Setting(3, True, True),
]


@dataclass(frozen=True)
class Sizes:
    """Of the data: users, items, and interactions to train on."""

    users: int
    items: int
    interactions: int
    shown: float
    """Mean length of a history, cut to `max_history`."""
    ordered: bool | None = None
    """Whether histories are in the order of time; None: not known, and taken to be."""


@dataclass(frozen=True)
class Stage:
    """A pass of the loop: prompts of an epoch, and a mean one's tokens and FLOP of its forward pass."""

    name: str
    epochs: int
    batch: int
    micro_batch: int
    prompts: int
    tokens: float
    forward: float


@dataclass(frozen=True)
class Work:
    """What training does, whatever it is spread over.

    total, trained, language_model: parameters, the last without its token table. frozen: those of its matrices that
    stay as they are. followed: by the momentum encoder. largest: bytes of the largest module's weights, which
    ZeRO-3 gathers whole. fixed: bytes of node tables, text vectors, queues and the head's rows. logits: bytes of
    the logits that stand in memory. prompt: bytes that one user's prompts keep for the backward pass.
    longest: tokens of one prompt at most; most, mean: of all prompts of a user with the longest, and with a mean
    history, each kind of prompt by its share. answers: positions with a target, of the longest history. forward: FLOP
    of a mean user's prompts; passes: how many times as many training takes. All this is of the last stage. earlier:
    those before it, which are taken to train as many parameters. host: bytes of the host's memory in which each worker
    has the counts of successors; counting takes some four times that. tuning: bytes of the language model, its
    gradients and moments while it is tuned on the texts, which is done on one GPU before all stages; 0: it is not.
    """

    total: int
    trained: int
    language_model: int
    frozen: int
    followed: int
    largest: int
    fixed: int
    logits: int
    prompt: int
    longest: int
    most: float
    mean: float
    answers: int
    forward: float
    passes: int
    earlier: tuple[Stage, ...] = ()
    host: int = 0
    tuning: int = 0


@dataclass(frozen=True)
class Estimate:
    """One setting: bytes per GPU and of the host per GPU, and what it does; `micro` is 0 where nothing fits.

    tokens_per_second, hours_per_epoch: of the last stage. stages: hours of an epoch of each stage. hours: of all epochs
    of all stages.
    """

    stage: int
    offload: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    other: float
    total: float
    host: float
    micro: int
    tokens_per_second: float
    hours_per_epoch: float
    stages: dict[str, float]
    hours: float


def sizes_of(config: RunConfig, users: int | None, items: int | None, interactions: int | None) -> Sizes:
    """Of the config's store, or as given: all three, where there is no store yet."""
    given = {"--users": users, "--items": items, "--interactions": interactions}
    longest = config.model.max_history
    if all(value is not None for value in given.values()):
        return Sizes(users, items, interactions, min(interactions / users, longest))
    if any(value is not None for value in given.values()):
        missing = next(name for name, value in given.items() if value is None)
        raise InputError(f"{missing} is missing: --users, --items and --interactions stand in for a store together")
    try:
        store = Store.open(config.store)
    except InputError as error:
        raise InputError(f"{error}, or give --users, --items and --interactions") from None
    train = store.interactions("train")
    shown = float(np.minimum(train.lengths, longest).mean())
    return Sizes(store.num_users, store.num_items, len(train.indices), shown, store.ordered)


def plan(
    config: RunConfig,
    sizes: Sizes,
    gpus: int,
    gpu: Accelerator,
    price: float | None = None,
    mfu: float = MFU,
) -> dict[str, Any]:
    """The estimates of all settings, and which would be chosen: the fastest, and of equally fast ones the simplest."""
    work = work_of(config, sizes, gpu.device)
    updates = {one.name: min(one.batch, one.prompts) for one in work.earlier}
    updates["train"] = min(config.train.batch, sizes.users)
    for name, prompts in updates.items():
        if prompts < gpus:
            raise InputError(
                f"{name}: an update of {prompts} prompts has none for some of {gpus} GPUs; plan for fewer, or a larger "
                f"{name}.batch"
            )
    estimates = [estimate(config, sizes, work, setting, gpus, gpu, mfu) for setting in SETTINGS]
    possible = [one for one in estimates if one.micro]
    least = min((one.hours for one in possible), default=0.0)
    chosen = next((one for one in possible if 0.98 * one.hours < least), None)
    found: dict[str, Any] = {
        "recipe": config.recipe,
        "sizes": asdict(sizes),
        "gpus": gpus,
        "gpu": asdict(gpu),
        "precision": config.engine.precision,
        "batch": config.train.batch,
        "epochs": config.train.epochs,
        "stages": {stage.name: stage.epochs for stage in work.earlier} | {"train": config.train.epochs},
        "graph": config.reads_graph,
        "rates": f"datasheet: {gpu.rate(config.engine.precision) / 1e12:g} TFLOP/s",
        "mfu": mfu,
        "work": asdict(work),
        "settings": [asdict(one) for one in estimates],
        "choice": asdict(chosen) if chosen else None,
    }
    if chosen and price is not None:
        found["cost_per_epoch"] = chosen.hours_per_epoch * gpus * price
        found["cost"] = chosen.hours * gpus * price
    return found


def estimate(
    config: RunConfig, sizes: Sizes, work: Work, setting: Setting, gpus: int, gpu: Accelerator, mfu: float
) -> Estimate:
    """Memory, speed and hours of one setting."""
    held, host = state_bytes(work, setting, gpus, 2 if config.engine.precision == "bf16" else 4)
    static = sum(held.values()) + work.fixed + work.logits + RESERVED
    share = -(-config.train.batch // gpus)
    micro = int(min(max((gpu.memory * GIB - static) // work.prompt, 0), share))
    train = config.train
    last = Stage("train", train.epochs, train.batch, max(micro, 1), sizes.users, work.mean, work.forward)
    seconds = {one: _seconds(config, work, setting, gpus, gpu, mfu, one) for one in (*work.earlier, last)}
    hours = {one.name: one.prompts / one.batch * seconds[one] / 3600 for one in seconds}
    activations = max(micro, 1) * work.prompt
    return Estimate(
        setting.stage,
        setting.offload,
        held["weights"],
        held["gradients"],
        held["optimizer"],
        activations,
        held["momentum"] + work.fixed + work.logits + RESERVED,
        static + activations,
        host + work.host,
        micro,
        last.batch * last.tokens / seconds[last],
        hours[last.name],
        hours,
        sum(one.epochs * hours[one.name] for one in seconds),
    )


def state_bytes(work: Work, setting: Setting, gpus: int, width: int) -> tuple[dict[str, float], float]:
    """(bytes per GPU of weights, gradients, optimizer, momentum encoder, and of the host's memory) under DeepSpeed.

    width: bytes of a weight in the model, under ZeRO. Adam keeps two fp32 moments (8 bytes) of each trained parameter,
    and under ZeRO an fp32 copy of it (4 bytes). Without ZeRO, bf16 is autocast: weights and gradients are fp32, but
    for frozen matrices, and weights that are trained have a copy in bf16 from forward to backward pass.
    """
    stage, trained = setting.stage, work.trained
    if stage == 0:
        weights = 4 * work.total + (2 * (trained - work.frozen) if width == 2 else 0)
        held = {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained, "momentum": 4 * work.followed}
        return held, 0.0
    share = 1 / gpus
    bucket = width * min(trained, BUCKET) if gpus > 1 else 0
    whole = max(work.largest, width * min(work.total, REUSED))  # under ZeRO-3
    held = {
        "weights": width * work.total * (1 / gpus if stage == 3 else 1) + (whole if stage == 3 else 0),
        "gradients": width * trained * (share if stage >= 2 else 1) + bucket,
        "optimizer": (8 + 4) * trained * share,
        "momentum": 4 * work.followed * (share if stage == 3 else 1),
    }
    host = 0.0
    if setting.optimizer:
        host += held["optimizer"] + 4 * trained * share
        held["optimizer"] = 0.0
        held["gradients"] = bucket + (width * trained if stage == 1 else 0)
    if setting.parameters:
        host += width * work.total / gpus + held["momentum"]
        held["weights"], held["momentum"] = whole, 0.0
    return held, host


def _seconds(
    config: RunConfig, work: Work, setting: Setting, gpus: int, gpu: Accelerator, mfu: float, stage: Stage
) -> float:
    """Of an update of a stage, padding left out; computing and communicating do not overlap."""
    width = 2 if config.engine.precision == "bf16" and setting.stage else 4
    prompts = stage.batch / gpus
    pieces = -(-prompts // stage.micro_batch)
    seconds = prompts * work.passes * stage.forward / (gpu.rate(config.engine.precision) * mfu)
    link = 1e9 * (gpu.link if gpus <= gpu.node else min(gpu.link, NETWORK))
    others = (gpus - 1) / gpus
    seconds += others * width * sent_parameters(work, setting.stage, gpus, pieces) / link
    share = 1 / gpus
    if setting.optimizer:
        seconds += share * work.trained * (2 * width / HOST_LINK + 28 / HOST_ADAM) / 1e9
    if setting.parameters:
        seconds += share * 2 * width * work.total * pieces / (HOST_LINK * 1e9)
    return seconds


def sent_parameters(work: Work, stage: int, gpus: int, pieces: int) -> float:
    """Parameters that a ring of many GPUs sends from one to the next in an update of so many micro-batches.

    A gradient that is added up everywhere is sent twice, one that is needed on a single GPU once: so under ZeRO 3, and
    under ZeRO 1 and 2 on a `FEW` GPUs. These then send what each GPU has updated. Under ZeRO 2 and 3 gradients are sent
    for every micro-batch. Under ZeRO 3 all weights are, too; the language model's come for each of its `PASSES` and
    back again, unless they are few enough to stay. The momentum encoder's come besides, and not back, as
    does what DeepSpeed had fetched ahead of its pass, for nothing.
    """
    if stage == 3:
        few = 2 * work.total <= REUSED
        again = (0 if few else 2 * PASSES - 1) * work.language_model
        slow = work.total + min(work.total, AHEAD) + (0 if few else PASSES - 1) * work.language_model
        return pieces * (work.trained + work.total + again + (slow if work.followed else 0))
    reduced = 1 if stage and gpus <= FEW else 2
    return work.trained * (reduced * (pieces if stage == 2 else 1) + (stage > 0))


def work_of(config: RunConfig, sizes: Sizes, device: str) -> Work:
    """Counts a model without content; `InputError` where there is none to count."""
    if not isinstance(config, GLTARun | GALRecRun):
        raise InputError(f"recipe {config.recipe}: a plan is of recipes with a language model, glta or galrec")
    longest, most, mean, answers, mean_answers = _prompts(config, sizes)
    with torch.device("meta"):
        model = _model(config, sizes)
    kept = kept_bytes(model.backbone, config, longest, min(longest, round(longest * answers / most)))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wide = 2 if config.engine.precision == "bf16" else 4
    width, rows, tables = model.backbone.width, sizes.items * model.nodes.width, len(model.nodes.items_KId)
    text = _read_by_projector(model)
    fixed = sum(b.nbytes for b in model.buffers()) + 4 * 4 * rows  # R, and its gradient as the head makes it
    fixed += 2 * rows * tables if tables > 1 and config.engine.precision == "bf16" else 0  # the fits' nodes in bf16
    if isinstance(model, GALRec):
        contrast = config.model.contrast
        fixed += len(model.queues) * contrast.queue * (4 * (contrast.projection or width) + 8)
        # Products of the anchors of all GPUs, and which are excluded: those of one side stand at a time.
        anchors = {
            side: config.train.batch * share for side, share in (("user", contrast.users), ("item", contrast.items))
        }
        fixed += max(len(contrast.active(side)) * n * (n + contrast.queue) * (4 + 1) for side, n in anchors.items())
    # Besides, a token keeps what its projector reads, an answer what the head does and its gradient; masks of dropout.
    prompt = most * (kept / longest + 4 * text + width) + answers * (5 * width + 4 * model.nodes.width)
    frozen = isinstance(config, GLTARun) or config.model.tuning != "full"
    return Work(
        total,
        trained,
        _language_model(model.backbone),
        sum(p.numel() for p in frozen_matrices(model)),
        _followed(model),
        wide * max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        int(fixed),
        3 * 4 * sizes.items * positions_at_once(sizes.items, device),
        int(prompt),
        longest,
        most,
        mean,
        answers,
        _forward(model, mean, mean_answers, config.train.micro_batch),
        (2 if frozen else 3) + config.engine.activation_checkpointing,
        _earlier(config, sizes, model),
        _successor_bytes(config, sizes),
        _tuning_bytes(config),
    )


def _followed(model: GLTA | GALRec) -> int:
    """Parameters that a momentum encoder copies."""
    slow = model.slow if isinstance(model, GALRec) else None
    return 0 if slow is None else sum(p.numel() for p in slow.parameters.values())


def _language_model(backbone: Backbone) -> int:
    """Parameters, without the token table."""
    return sum(p.numel() for p in backbone.parameters()) - backbone.model.get_input_embeddings().weight.numel()


def _read_by_projector(model: GLTA | GALRec) -> int:
    """Entries of what an item's token is made of."""
    return (model.item_texts.shape[1] if model.item_texts is not None else 0) + model.nodes.width


def _forward(model: GLTA | GALRec, tokens: float, answers: float, micro_batch: int) -> float:
    """FLOP of the forward pass over prompts of so many tokens and answers."""
    backbone, nodes = model.backbone, model.nodes
    rows, tables = nodes.items_KId[0].numel(), len(nodes.items_KId)
    layers = backbone.model.config.num_hidden_layers
    forward = tokens * (2 * _language_model(backbone) + 4 * layers * backbone.width * tokens)
    forward -= max(tokens - answers, 0) * 2 * backbone.asked_parameters
    # What R is made of; own nodes are asked by every answer.
    made = _read_by_projector(model) - (nodes.width if tables > 1 else 0)
    return forward + answers * 2 * rows * (1 if tables == 1 else 2) + 2 * rows * made / micro_batch


def _earlier(config: GLTARun | GALRecRun, sizes: Sizes, model: GLTA | GALRec) -> tuple[Stage, ...]:
    """GLTA's stages before the last, with descriptions as long as they may be."""
    if not isinstance(config, GLTARun):
        return ()
    found, words = [], Phrases(load_tokenizer(config.backbone.name), config.model)
    if config.model.item_alignment and config.alignment.epochs:
        items = min(config.model.alignment_items, sizes.items)
        tokens = len(words.begin) + items * (2 + config.model.alignment_tokens)
        found.append(("alignment", config.alignment, sizes.items // items, tokens, items))
    if sizes.ordered is not False and config.model.order and config.model.history_loss and config.histories.epochs:
        tokens = len(words.begin) + len(words.instruction) + sizes.shown
        found.append(("histories", config.histories, sizes.users, tokens, sizes.shown))
    return tuple(
        Stage(
            name, of.epochs, of.batch, of.micro_batch, prompts, tokens, _forward(model, tokens, asked, of.micro_batch)
        )
        for name, of, prompts, tokens, asked in found
    )


def _successor_bytes(config: GLTARun | GALRecRun, sizes: Sizes) -> int:
    """Of what follows each item and of those with texts like its own, once per worker: fp64 in sparse matrices, at
    most."""
    if isinstance(config, GLTARun) or config.model.successors is None:
        return 0
    after = config.model.successors
    found = 0
    for entries in (min(after.steps * sizes.interactions, sizes.items**2), after.alike * sizes.items):
        index = 4 if entries < 2**31 else 8
        found += (entries * (8 + index) + (sizes.items + 1) * index) * (entries > 0)
    return found


def _tuning_bytes(config: GLTARun | GALRecRun) -> int:
    """fp32 weights of the whole language model; gradients and two moments of those that are tuned."""
    if config.text_tuning is None or not config.reads_texts:
        return 0
    with torch.device("meta"):
        reader = Backbone(config.backbone.model_copy(update={"layers": None, "pretrained": False})).tune()
    return sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in reader.parameters())


def _prompts(config: GLTARun | GALRecRun, sizes: Sizes) -> tuple[int, float, float, int, float]:
    """`longest`, `most`, `mean` and `answers` of `Work`, and a mean user's answers, of the last stage."""
    model = config.model
    if isinstance(config, GALRecRun):
        contrast, near, far = model.contrast, model.neighbours.one_hop, model.neighbours.two_hop + 1
        longest, per_item, answers = model.longest_prompt, 1 + model.title_tokens, model.max_history + 1
        two_hops = 1.0 if model.readout == "hop2" else contrast.users * bool(contrast.active("user"))
        lent = contrast.items * bool(contrast.active("item"))
        # A prompt without a second hop is its history alone where nothing else reads the user's node and task tokens.
        whole = two_hops if model.readout == "history" and not model.history_sees_user else 1.0
        most = 1 + per_item * model.max_history + whole * 3 + two_hops * far
        most += lent * (1 + per_item + near + 2 + far)
    else:
        words = Phrases(load_tokenizer(config.backbone.name), model)
        texts = [words.profile] * model.texts.profile + [words.prediction] * model.texts.prediction
        tokens = [words.begin, words.instruction, *texts, words.user, words.answer]
        terms = len(texts) * model.texts.terms
        most = sum(map(len, tokens)) + terms * MEAN_TERM_TOKENS
        most += model.max_history + (model.user_token != "none") + model.slots
        longest = most + terms * (TERM_TOKENS - MEAN_TERM_TOKENS)
        per_item, answers = 1, model.max_history * model.history_loss + model.slots
    known = positions(config.backbone.name)
    if known is not None and longest > known:
        raise InputError(
            f"model.max_history={model.max_history} makes prompts of up to {longest} tokens; "
            f"backbone '{config.backbone.name}' reads {known}"
        )
    fewer = model.max_history - sizes.shown
    every_item_answers = isinstance(config, GALRecRun) or model.history_loss
    return longest, most, most - per_item * fewer, answers, answers - fewer * every_item_answers


def _model(config: GLTARun | GALRecRun, sizes: Sizes) -> GLTA | GALRec:
    """The model as its last stage trains it."""
    users, items, width = sizes.users, sizes.items, config.graph.dim
    folds = config.graph.folds if config.reads_graph else 0
    nodes = NodeEmbeddings(
        users=torch.empty(users, width),
        items=torch.empty(items, width),
        users_ego=torch.empty(users, width),
        items_inductive=torch.empty(items, width),
        fold_of=torch.empty(users, dtype=torch.int64),
        fold_items=torch.empty(folds, items, width),
        fold_shares=torch.empty(folds, items, width),
    )
    backbone = Backbone(config.backbone.model_copy(update={"pretrained": False}))
    texts = torch.empty(items, backbone.width) if config.reads_texts else None
    if isinstance(config, GALRecRun):
        symbols = Symbols(backbone.vocabulary, items, users, HOPS)
        return GALRec(config.model, backbone, symbols, nodes, texts, 1.0)
    symbols = Symbols(backbone.vocabulary, items, users, config.model.slots)
    trend = torch.empty(READINGS, items) if config.model.trend is not None else None
    model = GLTA(config.model, backbone, symbols, nodes, texts, 1.0, trend_MI=trend)
    model.train_stage_3(bool(config.model.item_alignment and config.alignment.epochs))
    return model


def kept_bytes(backbone: Backbone, config: RunConfig, length: int, answers: int) -> int:
    """Bytes that autograd keeps of the language model's forward pass over one prompt of `length` tokens, of which so
    many are asked for.

    With activation checkpointing these are each layer's input, and all of one layer.
    """
    asked = _kept_bytes(backbone, config, length, answers)
    if not config.engine.activation_checkpointing:
        return asked
    layers = backbone.model.config.num_hidden_layers
    one = _kept_bytes(backbone, config, length, None) // layers
    inputs = layers * length * backbone.width * (2 if config.engine.precision == "bf16" else 4)
    return inputs + max(asked - (layers - 1) * one, one if layers > 1 else 0)  # the last is kept as it is read


def _kept_bytes(backbone: Backbone, config: RunConfig, length: int, answers: int | None) -> int:
    bf16 = config.engine.precision == "bf16"
    kind = torch.bfloat16 if bf16 else torch.float32
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(pack, nn.Identity()),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        weights = {
            name: torch.empty(p.shape, dtype=kind).requires_grad_(p.requires_grad)
            for name, p in backbone.named_parameters()
        }
        buffers = {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in backbone.named_buffers()}
        own = {tensor.untyped_storage()._cdata for tensor in (*weights.values(), *buffers.values())}
        embeds = torch.zeros(1, length, backbone.width, dtype=kind, requires_grad=True)
        given = embeds, torch.ones(1, length, length, dtype=torch.bool)
        asked = None if answers is None else Asked.first(answers)
        functional_call(backbone, weights | buffers, given, {"asked": asked})
    return sum(storage.nbytes() for storage in kept.values())


def table(found: dict[str, Any]) -> list[str]:
    """The plan as lines of at most 80 columns, GiB per GPU."""
    work, sizes = found["work"], found["sizes"]
    lines = [
        f"{found['recipe']}: {sizes['users']:,} users, {sizes['items']:,} items, "
        f"{sizes['interactions']:,} interactions; batch {found['batch']}",
        f"parameters: {_count(work['total'])}, trained {_count(work['trained'])}; longest prompt "
        f"{work['longest']} tokens",
        f"{found['gpus']} GPUs of {found['gpu']['memory']:g} GiB, {found['precision']}, {found['rates']}; "
        f"MFU {found['mfu']:.0%} assumed",
        "",
        "  ZeRO offload weights  grads  optim  activ  other   total   host micro    epoch",
    ]
    for one in found["settings"]:
        chosen = "→" if one == found["choice"] else " "
        sizes_of_parts = [one[key] / GIB for key in ("weights", "gradients", "optimizer", "activations", "other")]
        cells = "".join(f"{value:{width}.2f}" for value, width in zip(sizes_of_parts, (7, 7, 7, 7, 7), strict=True))
        speed = _duration(one["hours_per_epoch"]) if one["micro"] else "no room"
        lines.append(
            f"{chosen} {one['stage']:>4} {one['offload']:<7}{cells}{one['total'] / GIB:8.2f}"
            f"{one['host'] / GIB:7.2f}{one['micro']:6d}{speed:>9}"
        )
    lines += ["GiB per GPU at the largest micro-batch that fits; host: of its memory, per GPU"]
    return lines + _verdict(found)


def _verdict(found: dict[str, Any]) -> list[str]:
    best = found["choice"]
    if best is None:
        fixed, room = found["work"]["fixed"] / GIB, found["gpu"]["memory"]
        if fixed > room / 2:
            return [
                f"nothing fits: every GPU holds {fixed:.0f} GiB of node tables, text vectors and head rows,",
                "which no ZeRO stage spreads: model.text_vectors=false, a smaller graph.dim",
            ]
        return ["nothing fits: more GPUs, engine.activation_checkpointing=true, or fewer max_history"]
    setting = [f"engine.zero_stage={best['stage']}"]
    setting += ["engine.offload_optimizer=true"] if best["offload"] != "-" else []
    setting += ["engine.offload_parameters=true"] if best["offload"] == "all" else []
    unsure = {"histories": " if ordered"} if found["sizes"]["ordered"] is None else {}
    stages = (
        f"{name}{unsure.get(name, '')} {epochs} × {_duration(best['stages'][name])}"
        for name, epochs in found["stages"].items()
    )
    lines = [
        f"choose: {' '.join(setting)} train.micro_batch={best['micro']}",
        f"then at most {_count(best['tokens_per_second'])} tokens/s in train, "
        f"at least {_duration(best['hours'])} for all epochs:",
        ", ".join(stages),
    ]
    if "cost" in found:
        cost = f"{found['cost']:,.2f}" if found["cost"] >= 0.01 else "under 0.01"
        lines.append(f"cost: {cost} USD for all epochs")
    if tuning := found["work"]["tuning"]:
        lines.append(f"before that, texts are tuned on one GPU: {tuning / GIB:.2f} GiB and its activations")
    graph = "LightGCN, " if found["graph"] else ""
    return [*lines, f"arithmetic only: add prompt assembly, kernel launches, {graph}evaluation"]


def _duration(hours: float) -> str:
    for letter, size in (("h", 1.0), ("min", 60.0)):
        if hours * size >= 1:
            return f"{hours * size:.3g} {letter}"
    return f"{hours * 3600:.2g} s"


def _count(value: float) -> str:
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"
