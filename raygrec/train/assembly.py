"""From a store and a config to the things a run works with: node embeddings, prompts, model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.graph.cache import load_or_pretrain
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model.backbone import Backbone, generate, load_tokenizer, resolve
from raygrec.model.galrec import HOPS, GALRec, HopPrompts
from raygrec.model.glta import GLTA, Phrases, PromptBuilder, opening_tokens
from raygrec.model.nodes import token_scale
from raygrec.model.profiles import inverse_frequency
from raygrec.model.prompts import Symbols, expand, join_rows, repeated, truncated
from raygrec.model.text_vectors import load_or_read_texts
from raygrec.train.engine import device, full_tensor, loading
from raygrec.train.folder import RunFolder
from raygrec.train.settings import GALRecRun, GLTARun, RunConfig

Model = GLTA | GALRec
Prompts = PromptBuilder | HopPrompts

TEXT_LENGTH = 64  # tokens of an item's text that the store keeps
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


def fitted_items(store: Store, config: RunConfig) -> tuple[CSR, np.ndarray | None]:
    """The edges LightGCN is fitted on, and how many of each user's items that is where it is not all.

    `cross_fit` leaves out the last min(k, half) training items of each user: only they become targets.
    """
    train = store.interactions("train")
    if isinstance(config, GALRecRun) or config.model.user_vector != "cross_fit":
        return train, None
    held_out = np.minimum(config.model.slots, train.lengths // 2)
    return truncated_to(train, train.lengths - held_out), train.lengths - held_out


def truncated_to(rows: CSR, lengths: np.ndarray) -> CSR:
    """The first `lengths[r]` entries of each row r."""
    place = np.arange(len(rows.indices)) - rows.indptr[rows.rows]
    kept = place < lengths[rows.rows]
    return CSR.from_pairs(rows.rows[kept], np.asarray(rows.indices)[kept], len(rows))


def prepare_run(config: RunConfig, folder: RunFolder) -> None:
    """What must exist before workers start: token ids, node embeddings, generated texts. Each is made once."""
    store = Store.open(config.store)
    if isinstance(config, GALRecRun) and not store.ordered:
        raise InputError(f"{store.path}: GAL-Rec reads histories in time order; prepare with split=leave-one-out")
    store.tokens(resolve(config.backbone.name), TEXT_LENGTH)
    item_texts(config, store)
    if not folder.nodes_file.exists():
        edges, _ = fitted_items(store, config)
        place = "cuda" if torch.cuda.is_available() else "cpu"
        nodes = load_or_pretrain(
            edges,
            store.interactions("valid"),
            store.num_items,
            config.graph,
            config.seed,
            store.path / "graph",
            place,
        )
        nodes.save(folder.nodes_file, {"source": "LightGCN", "seed": config.seed})
    if isinstance(config, GLTARun) and config.model.texts.source == "generated" and not folder.texts_file.exists():
        _write_texts(config, store, folder.texts_file)


def item_texts(config: RunConfig, store: Store) -> torch.Tensor | None:
    """Text vectors [I, D] of the items, where the model reads them."""
    wanted = config.model.text_vectors if isinstance(config, GALRecRun) else config.model.head_texts
    if not wanted:
        return None
    tokens = store.tokens(resolve(config.backbone.name), TEXT_LENGTH).items
    return load_or_read_texts(config.backbone, tokens, store.path / "text_vectors")


def build_prompts(config: RunConfig, store: Store, folder: RunFolder) -> Prompts:
    """The prompt builder of a run, from the store's arrays."""
    tokenizer = load_tokenizer(config.backbone.name)
    if isinstance(config, GALRecRun):
        symbols = Symbols(len(tokenizer), store.num_items, store.num_users, HOPS)
        edges = (store.interactions("train"), store.interactions("train", by="item"))
        return HopPrompts(config.model, symbols, opening_tokens(tokenizer), *edges)
    table = store.tokens(resolve(config.backbone.name), TEXT_LENGTH)
    symbols = Symbols(len(tokenizer), store.num_items, store.num_users, config.model.slots)
    builder = PromptBuilder(
        config.model,
        symbols,
        Phrases(tokenizer, config.model),
        store.interactions("train"),
        store.ordered,
        table.items,
        store.terms,
        table.terms,
        inverse_frequency(store.terms, len(store.term_names)),
    )
    builder.shown_at_least = fitted_items(store, config)[1]
    if config.model.texts.source == "generated":
        builder.written = _read_texts(folder.texts_file)
        read = builder.train.lengths - builder.train.lengths // 2
        known = builder.shown_at_least
        builder.shown_at_least = read if known is None else np.maximum(read, known)
    return builder


def build_model(config: RunConfig, store: Store, builder: Prompts, folder: RunFolder, distributed: bool) -> Model:
    """The recipe's model with its own initial weights (a function of the seed), on the CPU or partitioned."""
    texts = item_texts(config, store)
    nodes = NodeEmbeddings.load(folder.nodes_file)
    torch.manual_seed(config.seed)
    with loading(config.engine, distributed):
        backbone = Backbone(config.backbone)
        scale = token_scale(full_tensor(backbone.model.get_input_embeddings().weight))
    torch.manual_seed(config.seed)
    tensors = (nodes.items, texts, nodes.users, nodes.items_inductive)
    if isinstance(config, GALRecRun):
        return GALRec(config.model, backbone, builder.symbols, *tensors, scale)
    return GLTA(config.model, backbone, builder.symbols, *tensors, scale, builder.ordered)


def load_model(config: RunConfig, folder: RunFolder, store: Store) -> tuple[Model, Prompts]:
    """A finished run's model, ready to recommend, and its prompts."""
    builder = build_prompts(config, store, folder)
    model = build_model(config, store, builder, folder, distributed=False)
    loaded = model.load_state_dict(folder.load_parts(folder.model_file), strict=False)
    reads_users = isinstance(config, GALRecRun) or config.model.user_token == "aligned"
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
    save_file(tensors, file, {"source": "generated", "backbone": config.backbone.name})


def _read_texts(file: Path) -> dict[str, tuple[CSR, CSR]]:
    tensors = load_file(file)

    def rows(name: str) -> CSR:
        users, length = tensors[name].shape
        return CSR(np.arange(users + 1, dtype=np.int64) * length, tensors[name].numpy().ravel())

    return {stage: (rows(f"{stage}/profile"), rows(f"{stage}/prediction")) for stage in ("train", "valid", "test")}
