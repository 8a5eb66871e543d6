"""From a store and a config to the things a run works with: node embeddings, prompts, model."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.evaluate.baselines import GraphModel, GraphPrompts, popularity
from raygrec.evaluate.sequential import SequencePrompts, Sequential
from raygrec.graph.cache import load_or_pretrain
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.backbone import Backbone, BackboneConfig, generate, load_tokenizer, resolve
from raygrec.model.galrec import HOPS, GALRec, HopPrompts, tuned
from raygrec.model.glta import GLTA, Phrases, PromptBuilder, opening_tokens
from raygrec.model.nodes import nodes_of_texts, scaled_texts, token_scale
from raygrec.model.profiles import inverse_frequency
from raygrec.model.prompts import Symbols, expand, join_rows, repeated, truncated
from raygrec.model.text_tuning import tuned_reader
from raygrec.model.text_vectors import load_or_read_texts, reading_key
from raygrec.model.trend import Trend
from raygrec.ranks import device
from raygrec.storage import made_once, replaced
from raygrec.tensors import load_tensors, save_tensors
from raygrec.train import manifest
from raygrec.train.engine import full_tensor, loading
from raygrec.train.folder import RunFolder
from raygrec.train.settings import GALRecRun, GLTARun, GraphRun, RunConfig, SequentialRun
from raygrec.train.trackers import check_packages

Model = GLTA | GALRec | Sequential | GraphModel
Prompts = PromptBuilder | HopPrompts | SequencePrompts | GraphPrompts

TEXT_LENGTH = 64  # tokens of an item's text that the store keeps
BACKBONE = "backbone."  # what the names of the language model's parameters begin with
GENERATION_HISTORY = 8  # newest items whose descriptions a causal LM reads
GENERATION_TOKENS = 16  # of each description


@dataclass(frozen=True)
class Histories:
    """What a recommendation may read and what it must find: CSRs with one row per user."""

    shown: CSR
    targets: CSR


def histories(store: Store, split: str) -> Histories:
    """Validation reads the training items; test reads training and validation items, in time order."""
    train = store.interactions("train")
    if split == "valid":
        return Histories(train, store.interactions("valid"))
    return Histories(join_rows([train, store.interactions("valid")]), store.interactions("test"))


def truncated_to(rows: CSR, lengths: np.ndarray) -> CSR:
    """The first `lengths[r]` entries of each row r."""
    place = np.arange(len(rows.indices)) - rows.indptr[rows.rows]
    kept = place < lengths[rows.rows]
    return CSR.from_pairs(rows.rows[kept], np.asarray(rows.indices)[kept], len(rows))


def prepare_run(config: RunConfig, folder: RunFolder) -> None:
    """What must exist before workers start: token ids, node embeddings, generated texts. Each is made once.

    Raises `InputError` for wrong input, and where the run was started with another store.
    """
    check_packages(config.track)
    store = Store.open(config.store)
    # What the folder holds, such as nodes, was made of that store's training edges, which may be another's targets.
    store.kept_by(folder.path)
    _prepare_store(config, store)
    # As a LightGCN is, a tuned language model is another one each time it is made.
    if config.text_tuning is not None and config.reads_texts and not folder.vectors_file.exists():
        save_tensors(folder.vectors_file, {"items": _text_vectors(config, store)}, {"seed": str(config.seed)})
    if not isinstance(config, SequentialRun) and not folder.nodes_file.exists():
        source = "LightGCN" if config.reads_graph else "texts"
        _nodes(config, store).save(folder.nodes_file, {"source": source, "seed": config.seed})
    if isinstance(config, GLTARun) and config.model.texts.source == "generated" and not folder.texts_file.exists():
        with replaced(folder.texts_file) as draft:
            shutil.copyfile(_written_texts(config, store), draft)


def prepare_only(config: RunConfig, nodes: bool = True) -> Path:
    """Makes the part of `prepare_run` that a store keeps for all its runs; returns the store's folder.

    nodes: LightGCN's embeddings, too.
    """
    store = Store.open(config.store)
    _prepare_store(config, store)
    if nodes and config.reads_graph:
        _nodes(config, store)
    if isinstance(config, GLTARun) and config.model.texts.source == "generated":
        _written_texts(config, store)
    return store.path


def _prepare_store(config: RunConfig, store: Store) -> None:
    if config.needs_order and not store.ordered:
        raise InputError(f"{store.path}: {config.name} reads histories in time order; prepare with split=leave-one-out")
    if isinstance(config, GLTARun) and config.model.trend is not None:
        store.times("train")  # or an `InputError`
    _check_splits(config, store)
    if config.reads_backbone:
        _check_backbone(config, store)
    if not isinstance(config, GraphRun) and not (store.interactions("train").lengths >= 2).any():
        raise InputError(f"{store.path}: no user has two training items, one to read and one to predict")
    item_texts(config, store)


def _check_splits(config: RunConfig, store: Store) -> None:
    instead = {"valid": "", "test": ", or train with evaluate.test=false"}
    for split in ("valid", "test") if config.evaluate.test else ("valid",):
        if not len(store.interactions(split).indices):
            raise InputError(
                f"{store.path}: no user has a {split} interaction to find; prepare with {split}_ratio above 0"
                f"{instead[split]}"
            )


def _nodes(config: RunConfig, store: Store) -> NodeEmbeddings:
    if not config.reads_graph:
        texts = item_texts(config, store)
        return nodes_of_texts(texts, store.interactions("train"), store.num_items, config.graph.dim)
    return load_or_pretrain(
        store.interactions("train"),
        store.interactions("valid"),
        store.num_items,
        config.graph,
        config.seed,
        store.path / "graph",
        "cuda" if torch.cuda.is_available() else "cpu",
        scaled_texts(_text_vectors(config, store)) if config.graph.text_weight else None,
    )


def _check_backbone(config: RunConfig, store: Store) -> None:
    """What is known to fail in the workers fails here."""
    with torch.device("meta"):  # no content, so that nothing large is read
        backbone = Backbone(config.backbone.model_copy(update={"pretrained": False}))
        if isinstance(config, GALRecRun):
            tuned(backbone, config.model)
    for settings, needed in _longest_prompts(config, store).items():
        if backbone.positions is not None and needed > backbone.positions:
            raise InputError(
                f"{settings} makes prompts of up to {needed} tokens; "
                f"backbone '{config.backbone.name}' reads {backbone.positions}"
            )


def _longest_prompts(config: RunConfig, store: Store) -> dict[str, int]:
    """Tokens of a prompt at most, by the settings that they come of."""
    table = store.tokens(resolve(config.backbone.name), TEXT_LENGTH)
    if isinstance(config, GALRecRun):
        model = config.model
        return {f"model.max_history={model.max_history} with title_tokens={model.title_tokens}": model.longest_prompt}
    if not isinstance(config, GLTARun):
        return {}
    model, words = config.model, Phrases(load_tokenizer(config.backbone.name), config.model)
    texts = [words.profile] * model.texts.profile + [words.prediction] * model.texts.prediction
    terms = len(texts) * model.texts.terms
    if model.texts.source == "extracted":  # of terms that tell something, and none is in both texts
        telling = inverse_frequency(store.terms, len(store.term_names)) > 0
        terms = int(np.sort(table.terms.lengths[telling])[-terms:].sum()) if terms else 0
    digits = len(str(store.num_users - 1)) * max(map(len, words.digits))
    user = {"none": 0, "aligned": len(words.user) + 1, "id": len(words.user) + digits}[model.user_token]
    phrases = sum(map(len, (words.begin, words.instruction, *texts, words.answer)))
    settings = f"model.max_history={model.max_history} with slots={model.slots} and texts.terms={model.texts.terms}"
    longest = {settings: phrases + model.max_history + terms + user + model.slots}
    if model.item_alignment and config.alignment.epochs:
        text = min(model.alignment_tokens, int(table.items.lengths.max(initial=0)))
        items = min(model.alignment_items, store.num_items)  # each a token, its text and a slot
        settings = f"model.alignment_items={model.alignment_items} with alignment_tokens={model.alignment_tokens}"
        longest[settings] = len(words.begin) + items * (2 + text)
    return longest


def item_texts(config: RunConfig, store: Store) -> torch.Tensor | None:
    """Text vectors [I, D] of the items, where the model reads them."""
    return _text_vectors(config, store) if config.reads_texts else None


def _texts_of(config: RunConfig, store: Store, folder: RunFolder) -> torch.Tensor | None:
    """`item_texts`, or those that the run was started with where a tuned language model made them."""
    kept = folder.vectors_file.exists()
    return load_tensors(folder.vectors_file)["items"] if kept else item_texts(config, store)


def _text_vectors(config: RunConfig, store: Store) -> torch.Tensor:
    tokens, reader = store.tokens(resolve(config.backbone.name), TEXT_LENGTH).items, config.backbone
    if config.text_tuning is not None:
        edges, place = store.interactions("train"), store.path / "text_readers"
        reader = tuned_reader(reader, config.text_tuning, tokens, edges, config.seed, place)
    return load_or_read_texts(reader, tokens, store.path / "text_vectors")


def build_prompts(config: RunConfig, store: Store, folder: RunFolder) -> Prompts:
    """The prompt builder of a run, from the store's arrays and the users' folds."""
    builder = _builder(config, store, folder)
    if config.reads_graph and config.graph.folds:
        # A copy: tensors of one file share its pages, which stay while one of them does.
        builder.tables = NodeEmbeddings.load(folder.nodes_file).fold_of.numpy().copy()
    return builder


def _builder(config: RunConfig, store: Store, folder: RunFolder) -> Prompts:
    after = config.model.successors if isinstance(config, GALRecRun | SequentialRun) else None
    texts = _texts_of(config, store, folder) if after is not None and after.alike else None
    if isinstance(config, SequentialRun):
        return SequencePrompts(config.model, store.num_items, store.interactions("train"), texts)
    if isinstance(config, GraphRun):
        return GraphPrompts(store.num_items, store.interactions("train"))
    tokenizer = load_tokenizer(config.backbone.name)
    if isinstance(config, GALRecRun):
        symbols = Symbols(len(tokenizer), store.num_items, store.num_users, HOPS)
        edges = (store.interactions("train"), store.interactions("train", by="item"))
        titles = store.tokens(resolve(config.backbone.name), TEXT_LENGTH).titles
        return HopPrompts(config.model, symbols, opening_tokens(tokenizer), *edges, titles, texts)
    table = store.tokens(resolve(config.backbone.name), TEXT_LENGTH)
    symbols = Symbols(len(tokenizer), store.num_items, store.num_users, config.model.slots)
    builder = PromptBuilder(
        config.model,
        symbols,
        Phrases(tokenizer, config.model),
        store.interactions("train"),
        store.ordered and config.model.order,
        table.items,
        store.terms,
        table.terms,
        inverse_frequency(store.terms, len(store.term_names)),
    )
    if config.model.trend is not None:
        builder.trend = Trend.of(store, config.model.trend)
    if config.model.texts.source == "generated":
        builder.written = _read_texts(folder.texts_file)
        builder.shown_at_least = builder.train.lengths - builder.train.lengths // 2
    return builder


def build_model(
    config: RunConfig, store: Store, builder: Prompts, folder: RunFolder, distributed: bool, finished: bool = False
) -> Model:
    """The recipe's model with its own initial weights (a function of the seed), on the CPU or partitioned.

    finished: GAL-Rec's language model is the one that the run has tuned, and stays as it is.
    """
    texts = _texts_of(config, store, folder)
    if isinstance(config, SequentialRun):
        torch.manual_seed(config.seed)
        return Sequential(config.model, builder.symbols, texts)
    if finished and isinstance(config, GALRecRun):
        backbone = BackboneConfig(name=str(folder.backbone_folder), attention=config.backbone.attention)
        model = config.model.model_copy(update={"tuning": "frozen"})
        config = config.model_copy(update={"backbone": backbone, "model": model})
    nodes = NodeEmbeddings.load(folder.nodes_file)
    if isinstance(config, GraphRun):
        return GraphModel(builder.symbols, nodes, popularity(builder.train, store.num_items))
    torch.manual_seed(config.seed)
    # Weights that are drawn must be drawn whole: in pieces they would be others than a reader of the run makes.
    with loading(config.engine, distributed and config.backbone.pretrained):
        backbone = Backbone(config.backbone)
        scale = token_scale(full_tensor(backbone.model.get_input_embeddings().weight))
    torch.manual_seed(config.seed)
    if isinstance(config, GALRecRun):
        return GALRec(config.model, backbone, builder.symbols, nodes, texts, scale)
    trend_MI = None if builder.trend is None else builder.trend.log_shares_MI
    return GLTA(config.model, backbone, builder.symbols, nodes, texts, scale, builder.ordered, trend_MI)


def fixed_parts(model: Model) -> dict[str, torch.Tensor]:
    """What a reader of a saved model needs besides its trained parts and the language model."""
    parameters = dict(model.named_parameters())
    kept = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {name: value.float().cpu() for name, value in kept.items() if not name.startswith(BACKBONE)}


def save_model(config: RunConfig, folder: RunFolder, parts: dict[str, torch.Tensor]) -> None:
    """Writes a finished run's model/: the trained parts, and of GAL-Rec the language model by itself.

    model/backbone is what `transformers` loads, tokenizer included, with adapters merged; all in fp32.
    """
    parts = dict(parts)
    with folder.drafted(folder.model_folder) as draft:
        if isinstance(config, GALRecRun):
            torch.manual_seed(config.seed)  # of weights that are neither pretrained nor trained
            backbone = tuned(Backbone(config.backbone), config.model)
            inside = {name.removeprefix(BACKBONE): parts.pop(name) for name in list(parts) if name.startswith(BACKBONE)}
            backbone.load_state_dict({**backbone.state_dict(), **inside})
            backbone.save(draft / folder.backbone_folder.name)
            load_tokenizer(config.backbone.name).save_pretrained(draft / folder.backbone_folder.name)
        folder.save_parts(draft / folder.model_file.name, parts)


def load_model(config: RunConfig, folder: RunFolder, store: Store) -> tuple[Model, Prompts]:
    """A finished run's model, ready to recommend, and its prompts; `InputError` where a file of it is damaged."""
    if (folder.model_folder / manifest.NAME).exists():  # runs of earlier versions have none
        manifest.check(folder.model_folder)
    builder = build_prompts(config, store, folder)
    model = build_model(config, store, builder, folder, distributed=False, finished=True)
    loaded = model.load_state_dict(folder.load_parts(folder.model_file), strict=False)
    reads_users = not isinstance(config, GLTARun) or config.model.user_token == "aligned"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not reads_users:
        trained = {name for name in trained if not name.startswith("user_projector.")}
    missing = [name for name in loaded.missing_keys if name in trained]
    if missing or loaded.unexpected_keys:
        wrong = (missing or loaded.unexpected_keys)[0]
        raise InputError(
            f"{folder.model_file}: '{wrong}' is missing or unknown; expected the parts of a {config.recipe}"
        )
    return model.to(device()).eval(), builder


def _written_texts(config: GLTARun, store: Store) -> Path:
    """The file of what the causal LM writes about the users, made once per store, language model and length."""
    name = reading_key(config.backbone, store.tokens(resolve(config.backbone.name), TEXT_LENGTH).items)
    file = store.path / "written_texts" / f"{name}-{config.model.texts.terms}.safetensors"
    made_once(file, lambda: _write_texts(config, store, file))
    return file


def _write_texts(config: RunConfig, store: Store, file: Path) -> None:
    """Lets the causal LM write each user's profile and prediction, for training, validation and test prompts."""
    tokenizer = load_tokenizer(config.backbone.name)
    table = store.tokens(resolve(config.backbone.name), TEXT_LENGTH)
    train = store.interactions("train")
    sources = {
        "train": truncated_to(train, train.lengths - train.lengths // 2),
        "valid": histories(store, "valid").shown,
        "test": histories(store, "test").shown,
    }
    asks = {"profile": "In short, the user likes", "prediction": "Next, the user will want"}
    tensors: dict[str, torch.Tensor] = {}
    for stage, source in sources.items():
        read = truncated(source, GENERATION_HISTORY)
        descriptions = expand(read, truncated(table.items, GENERATION_TOKENS, keep="first"))
        for kind, ask in asks.items():
            question = repeated(tokenizer.encode(ask, add_special_tokens=False), len(read))
            prompts = join_rows([descriptions, question])
            rows = [prompts[user].tolist() for user in range(len(prompts))]
            answers = generate(config.backbone.name, rows, config.model.texts.terms)
            tensors[f"{stage}/{kind}"] = torch.tensor(answers, dtype=torch.int32)
    save_tensors(file, tensors, {"source": "generated", "backbone": config.backbone.name})


def _read_texts(file: Path) -> dict[str, tuple[CSR, CSR]]:
    tensors = load_tensors(file)

    def rows(name: str) -> CSR:
        users, length = tensors[name].shape
        return CSR(np.arange(users + 1, dtype=np.int64) * length, tensors[name].numpy().ravel())

    return {stage: (rows(f"{stage}/profile"), rows(f"{stage}/prediction")) for stage in ("train", "valid", "test")}
