"""LightGCN embeddings kept on disk, and reused while nothing that they depend on has changed."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.graph.lightgcn import LightGCNConfig, NodeEmbeddings, pretrain, pretrain_folds
from raygrec.storage import made_once

CODE_VERSION = 2  # raise it when a change to lightgcn.py changes the embeddings


def cache_key(
    train: CSR,
    valid: CSR | None,
    num_items: int,
    config: LightGCNConfig,
    seed: int,
    texts: torch.Tensor | None = None,
) -> str:
    """SHA-256 over the edges, the validation items, the config, the seed, the texts that the config gives weight
    and the version of the code."""
    digest = hashlib.sha256()
    settings = config.model_dump_json(exclude=None if config.text_weight else {"text_weight", "text_temperature"})
    digest.update(f"lightgcn {CODE_VERSION} {num_items} {seed} {settings}".encode())
    if config.text_weight and texts is not None:
        digest.update(texts.numpy().astype("<f4"))
    for interactions in (train, valid):
        if interactions is None:
            digest.update(b"none")
            continue
        digest.update(f"{len(interactions)} {len(interactions.indices)} ".encode())
        digest.update(np.ascontiguousarray(interactions.indptr, dtype="<i8"))
        digest.update(np.ascontiguousarray(interactions.indices, dtype="<i4"))
    return digest.hexdigest()


def load_or_pretrain(
    train: CSR,
    valid: CSR | None,
    num_items: int,
    config: LightGCNConfig,
    seed: int,
    folder: Path,
    device: str = "cpu",
    texts: torch.Tensor | None = None,
) -> NodeEmbeddings:
    """Returns the embeddings in `folder` made from exactly these inputs; trains and saves them otherwise.

    The file is `lightgcn-<first 16 digits of the key>.safetensors`; its header holds config, seed and
    history. The device is not part of the key. `config.folds` fits more are made where it asks for them. Of
    several processes that want the same file at once, one makes it.
    """
    path = folder / f"lightgcn-{cache_key(train, valid, num_items, config, seed, texts)[:16]}.safetensors"
    made_once(path, lambda: _make(path, train, valid, num_items, config, seed, device, texts))
    return NodeEmbeddings.load(path)


def _make(
    path: Path,
    train: CSR,
    valid: CSR | None,
    num_items: int,
    config: LightGCNConfig,
    seed: int,
    device: str,
    texts: torch.Tensor | None,
) -> None:
    embeddings, history = pretrain(train, num_items, config, seed, valid, device=device, texts=texts)
    if config.folds:
        best = int(np.nanargmax(history["ndcg@10"])) if valid is not None else -1
        epochs = int(history["epoch"][best])
        embeddings = pretrain_folds(train, num_items, config, seed, embeddings, epochs, device, texts)
    embeddings.save(path, {"config": config.model_dump(), "seed": seed, "history": history})
