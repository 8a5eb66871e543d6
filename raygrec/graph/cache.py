"""LightGCN embeddings kept on disk, and reused while nothing that they depend on has changed."""

import hashlib
from pathlib import Path

import numpy as np

from raygrec.data.arrays import CSR
from raygrec.graph.lightgcn import LightGCNConfig, NodeEmbeddings, pretrain

CODE_VERSION = 1  # raise it when a change to lightgcn.py changes the embeddings


def cache_key(train: CSR, valid: CSR | None, num_items: int, config: LightGCNConfig, seed: int) -> str:
    """SHA-256 over the edges, the validation items, the config, the seed and the version of the code."""
    digest = hashlib.sha256()
    digest.update(f"lightgcn {CODE_VERSION} {num_items} {seed} {config.model_dump_json()}".encode())
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
) -> NodeEmbeddings:
    """Returns the embeddings in `folder` made from exactly these inputs; trains and saves them otherwise.

    The file is `lightgcn-<first 16 digits of the key>.safetensors`; its header holds config, seed and
    history. The device is not part of the key.
    """
    path = folder / f"lightgcn-{cache_key(train, valid, num_items, config, seed)[:16]}.safetensors"
    if path.exists():
        return NodeEmbeddings.load(path)
    embeddings, history = pretrain(train, num_items, config, seed, valid, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    embeddings.save(path, {"config": config.model_dump(), "seed": seed, "history": history})
    return embeddings
