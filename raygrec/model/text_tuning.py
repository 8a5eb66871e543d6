"""The language model tuned on the items' texts until they tell which items users take one after another."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.model.backbone import Backbone, BackboneConfig, load_tokenizer
from raygrec.model.prompts import truncated
from raygrec.model.successors import step_counts
from raygrec.model.text_vectors import TextReader, alike_in_length, reading_key
from raygrec.progress import progress_bar
from raygrec.storage import gone_if_it_fails, made_once, writing

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CODE_VERSION = 1  # raise it when a change here changes the tuned model
WEIGHT_DECAY, CLIP, WARMUP = 0.01, 1.0, 0.1  # as sentence encoders are commonly tuned
USERS, STARTS = 1, 2  # what is drawn


class TextTuningConfig(StrictConfig):
    """[ours] Contrast between the texts of items that users took within a few steps of one another."""

    updates: int = Field(150, ge=1)
    users: int = Field(64, ge=1)
    """Users of an update, drawn without repetition."""
    items: int = Field(4, ge=2)
    """So many items, one after another, of each of them: their texts are read, and are all the candidates there are."""
    steps: int = Field(3, ge=1, le=100)
    """Items so many steps apart belong together, k steps with weight 1/k, whichever came first."""
    tokens: int = Field(40, ge=1)
    """First tokens of each text that are read in tuning."""
    temperature: float = Field(0.05, gt=0)
    lr: float = Field(5e-5, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"


def tuned_reader(
    config: BackboneConfig, tuning: TextTuningConfig, tokens: CSR, train: CSR, seed: int, folder: Path
) -> BackboneConfig:
    """The backbone `config` tuned on the items' token ids `tokens` (one row per item), kept in `folder`.

    It is a model of its own in `transformers` format, tokenizer included, of all layers. Made again where backbone,
    tokens, `train` (each user's training items in time order), seed or settings have changed; of several processes
    that want it at once, one makes it. Raises `InputError` where no user has two items or the loss is not finite.
    """
    digest = hashlib.sha256(f"{CODE_VERSION} {seed} {tuning.model_dump_json()} {reading_key(config, tokens)}".encode())
    digest.update(np.ascontiguousarray(train.indptr, dtype="<i8"))
    digest.update(np.ascontiguousarray(train.indices, dtype="<i4"))
    place = folder / digest.hexdigest()[:16]

    def make() -> None:
        draft = place.with_name(f".{place.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        backbone = tune(config, tuning, tokens, train, seed)
        with gone_if_it_fails(draft, new=True), writing(place):
            backbone.save(draft)
            load_tokenizer(config.name).save_pretrained(draft)
            os.replace(draft, place)

    made_once(place, make)
    return config.model_copy(update={"name": str(place)})


def tune(config: BackboneConfig, tuning: TextTuningConfig, tokens: CSR, train: CSR, seed: int) -> Backbone:
    """Tunes the whole pretrained language model; see `tuned_reader`, which keeps it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    backbone = Backbone(config.model_copy(update={"layers": None, "pretrained": True})).tune().to(device)
    read = TextReader(backbone, config.name)
    texts, pairs = truncated(tokens, tuning.tokens, keep="first"), neighbours_in_time(train, len(tokens), tuning.steps)
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=tuning.lr, weight_decay=WEIGHT_DECAY)
    with progress_bar() as bar:
        task = bar.add_task("text tuning", total=tuning.updates, note="")
        for update in range(tuning.updates):
            items = drawn_items(train, tuning, Draws(seed, update))
            wanted = torch.from_numpy(pairs[items][:, items].toarray()).float().to(device)
            with torch.autocast(device, torch.bfloat16, enabled=tuning.precision == "bf16"):
                parts = alike_in_length(texts.lengths[items])
                vectors_nD = torch.cat([read([texts[item] for item in items[part]]) for part in parts])
            order = torch.from_numpy(np.argsort(np.concatenate(parts))).to(device)
            loss = soft_info_nce(vectors_nD[order], wanted, tuning.temperature)
            value = loss.item()
            if not np.isfinite(value):
                raise InputError(f"text_tuning: the loss is {value}; lower lr (now {tuning.lr})")
            for group in optimizer.param_groups:
                group["lr"] = tuning.lr * _rate(update / tuning.updates, (update + 1) / tuning.updates)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            bar.update(task, completed=update + 1, note=f"loss {value:.3f}")
    return backbone.freeze().cpu()


def neighbours_in_time(train: CSR, num_items: int, steps: int) -> "csr_array":
    """w [I, I]: Σ_k 1/k · # of times that a user took two items k ≤ `steps` steps apart; 0 of an item with itself."""
    after = step_counts(train, steps, np.asarray(train.indices), (num_items, num_items)).tocsr()
    both = (after + after.T).tocsr()
    both.setdiag(0)
    both.eliminate_zeros()
    return both


def drawn_items(train: CSR, tuning: TextTuningConfig, draws: Draws) -> np.ndarray:
    """The different items [n], ascending, of one update: a window of the history of each of its users.

    Raises `InputError` where no user has two items.
    """
    able = np.flatnonzero(train.lengths >= 2)
    if not len(able):
        raise InputError("text_tuning: no user has two training items, whose texts could be compared")
    users = able[np.argsort(draws.uniform(able, USERS), kind="stable")[: tuning.users]]
    starts = (draws.uniform(users, STARTS) * np.maximum(train.lengths[users] - tuning.items + 1, 1)).astype(np.int64)
    rows = train.take(users)
    place = np.arange(len(rows.indices)) - rows.indptr[rows.rows] - starts[rows.rows]
    return np.unique(np.asarray(rows.indices)[(place >= 0) & (place < tuning.items)])


def soft_info_nce(vectors_nD: torch.Tensor, wanted_nn: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over the n with any w_nm of −Σ_m w_nm / Σ_m' w_nm' · log( exp(s_nm / τ) / Σ_{m' ≠ n} exp(s_nm' / τ) ).

    s: inner products of the unit vectors [n, D]. wanted: w ≥ 0 [n, n], 0 on its diagonal. InfoNCE (arXiv 1807.03748)
    with more than one positive, each by its share. fp32 []; 0 where there is no w at all.
    """
    with torch.autocast(vectors_nD.device.type, enabled=False):
        totals_n = wanted_nn.sum(1)
        have = totals_n > 0
        if not have.any():
            return vectors_nD.sum() * 0.0
        logits_nn = vectors_nD.float() @ vectors_nD.float().T / temperature
        itself_nn = torch.eye(len(wanted_nn), dtype=torch.bool, device=wanted_nn.device)
        log_nn = logits_nn.masked_fill(itself_nn, -torch.inf).log_softmax(1).masked_fill(itself_nn, 0.0)
        return -((wanted_nn * log_nn).sum(1)[have] / totals_n[have]).mean()


def _rate(before: float, after: float) -> float:
    """Share of the learning rate: a rise over the first `WARMUP` of the updates, and a cosine to zero over all."""
    return min(1.0, after / WARMUP) * 0.5 * (1 + float(np.cos(np.pi * before)))
